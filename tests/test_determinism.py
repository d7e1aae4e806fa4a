"""Tiers: their variables, what a wrong environment is told, the key."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mirepro import determinism
from mirepro.errors import UserError
from tests import forked


def python(code: str, **changes: str | None) -> "subprocess.CompletedProcess[str]":
    """Runs code in a process whose environment is changed; None unsets."""
    env = {**os.environ, **changes}
    kept = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=False)


NAMES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")
LATE = "import mirepro; print('imported')"
AFTERWARDS = """
import os, torch
torch.ones(9).sum()
torch.backends.cpu.get_cpu_capability()
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
from mirepro import determinism
determinism.configure_torch("portable", 1)
"""
SETTINGS = """
import json, torch
from mirepro import determinism
determinism.configure_torch(sys.argv[2], 2)
cudnn = torch.backends.cudnn
print(json.dumps({
    "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
    "cudnn": [cudnn.deterministic, cudnn.benchmark], "tf32": [cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32],
}))
"""
Said = dict[tuple[str, ...], CompletedProcess[str]]


@pytest.fixture(scope="module")
def said() -> Said:
    """What programs say that meet a torch imported before them, each in its environment."""
    fast: dict[str, str | None] = {"MIREPRO_TIER": "fast"}
    programs: dict[tuple[str, ...], tuple[list[str], dict[str, str | None]]] = {("right",): ([LATE], {})}
    for name in NAMES:
        programs[name, "None"] = [LATE], {name: None}
        programs[name, "'default'"] = [LATE], {name: "default"}
        programs[name, "fast"] = [LATE], {name: None} | fast
    programs["afterwards",] = [AFTERWARDS], {"ATEN_CPU_CAPABILITY": "default"} | fast
    for tier in determinism.TIERS:
        programs["settings", tier] = [SETTINGS, tier], {}
    cases: list[forked.Case] = [(["", *words], changes, forked.ROOT) for words, changes in programs.values()]
    return dict(zip(programs, forked.run("exec(sys.argv[1])", cases, "import torch"), strict=True))


def test_import_after_torch_in_the_right_environment_is_silent(said: Said) -> None:
    assert (said["right",].stdout, said["right",].stderr) == ("imported\n", "")


@pytest.mark.parametrize("name", NAMES)
def test_import_after_torch_in_a_wrong_environment_is_refused(said: Said, name: str) -> None:
    for value in ("None", "'default'"):
        last = said[name, value].stderr.strip().splitlines()[-1]
        assert f"{name}: {value}, tier portable wants" in last
        assert "MIREPRO_TIER=fast" in last
    assert said[name, "fast"].stdout == "imported\n"


def test_a_wrong_environment_before_torch_is_no_matter() -> None:
    before = "import mirepro, torch; print('imported')"
    assert python(before, **dict.fromkeys(NAMES)).stdout == "imported\n"  # nothing is computed yet


def test_variables_set_after_torch_decided_are_noticed(said: Said) -> None:
    import torch

    assert "torch computes with DEFAULT instead of AVX2" in said["afterwards",].stderr
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"


REEXEC = """
import json, os, sys
from mirepro import determinism
determinism.reexec_if_needed(sys.argv[1], 2)
assert not determinism.departures(sys.argv[1], 2)
print(json.dumps({name: os.environ.get(name) for name in sys.argv[2:]}))
"""


@pytest.mark.parametrize("tier", determinism.TIERS)
def test_a_command_starts_itself_again_with_the_tiers_environment(tier: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(REEXEC)
    names = ["ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS"]
    wanted = {
        "portable": ["avx2", None, "2"],
        "exact": [None, ":4096:8", "2"],
        "fast": [None, None, "2"],
    }
    here = {"PYTHONPATH": str(Path(determinism.__file__).parent.parent), "PATH": os.environ["PATH"]}
    environment = here | ({} if tier == "portable" else {"ATEN_CPU_CAPABILITY": "avx2"})
    command = [sys.executable, str(program), tier, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert list(json.loads(result.stdout).values()) == wanted[tier]


def test_bad_tiers_are_named() -> None:
    with pytest.raises(UserError, match="tier: 'slow' is unknown; known: portable, exact, fast"):
        determinism.environment("slow", 1)
    with pytest.raises(UserError, match="threads: 0 is impossible"):
        determinism.environment("portable", 0)


def test_settings_of_torch_in_each_tier(said: Said) -> None:
    """Also those that only a GPU heeds; `fast`, the control, leaves torch's own."""
    found = {tier: json.loads(said["settings", tier].stdout) for tier in determinism.TIERS}
    strict = {"threads": 2, "deterministic": True, "cudnn": [True, False], "tf32": [False, False]}
    assert found["exact"] == found["portable"] == strict
    assert found["fast"] == {"threads": 2, "deterministic": False, "cudnn": [False, False], "tf32": [True, False]}


def test_gpus_are_part_of_the_key_of_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = determinism.key("exact", 1)
    for name, model in (("0000:01:00.0", "NVIDIA H100"), ("0000:02:00.0", "NVIDIA H200")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(f"Model: \t {model}\nIRQ: 7\n")
    monkeypatch.setattr(determinism, "Path", lambda folder: tmp_path if folder == "/proc/driver/nvidia/gpus" else None)
    assert determinism.key("exact", 1) == before | {"gpus": ["NVIDIA H100", "NVIDIA H200"]}
    assert "gpus" not in determinism.key("portable", 1)


def test_the_key_says_what_results_depend_on() -> None:
    portable, exact = determinism.key("portable", 1), determinism.key("exact", 1)
    assert portable["isa"] == "avx2"
    assert "cpu" not in portable  # portable results are the same on every tested processor
    assert "cpu" in exact
    assert portable != determinism.key("portable", 2)


def test_portable_env_is_the_tiers_environment() -> None:
    """The file that make, the tests and the images read says what the program wants, also when a shell reads it."""
    root = Path(determinism.__file__).parent.parent
    command = ["/bin/sh", "-c", f"set -a; . {root}/portable.env; exec {sys.executable} -c 'import torch, mirepro'"]
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root)}
    result = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


TWICE = """
import sys
from contextlib import suppress
from mirepro.cli import main
for words in (["--json"], []):
    sys.argv = ["mirepro", "env", *words]
    with suppress(SystemExit):
        main()
    print("----" if words else "", flush=True)
"""


def test_env_prints_the_key_and_what_is_behind_it() -> None:
    root = Path(determinism.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "MKL_CBWR": "AVX2"}
    command, options = [sys.executable, "-c", TWICE], {"cwd": root, "env": environment, "text": True, "check": True}
    lines, text = subprocess.run(command, capture_output=True, **options).stdout.split("----\n")
    facts = json.loads(lines)
    assert facts["key"] == determinism.key("portable", 1)
    assert facts["variables"]["MKL_CBWR"] == {"wanted": "COMPATIBLE", "standing": "AVX2"}
    assert facts["variables"]["ATEN_CPU_CAPABILITY"] == {"wanted": "avx2", "standing": "avx2"}
    assert facts["variables"].keys() == determinism.environment("portable", 1).keys()
    assert facts["operators"]["isa found"] in ("scalar", "avx2", "avx512")
    assert "avx2" in facts["flags"]
    assert "  MKL_CBWR: COMPATIBLE (here AVX2; a stage sets it itself)\n" in text
    assert "  ATEN_CPU_CAPABILITY: avx2\n" in text
