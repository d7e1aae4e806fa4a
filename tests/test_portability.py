"""Equal bits on this CPU, with AVX2 forced, and on emulated ones; controls that must differ."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mirepro import determinism, files
from mirepro.bank import MemoryBank
from tests import forked
from tests.portability import GOLDEN, ROOT, THREADS, Digests, Miniature, child, different

CPUS = ("Haswell", "EPYC-Rome")
ALWAYS = (("Haswell", 2), ("EPYC-Rome", 1))
"""Each processor and each number of threads once; the other pairs are for `make test-slow`."""


def marks(cpu: str, threads: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xdist_group(cpu), *([] if (cpu, threads) in ALWAYS else [pytest.mark.full])]


EMULATED = [pytest.param(cpu, threads, marks=marks(cpu, threads)) for cpu in CPUS for threads in THREADS]
REGENERATE = "a wanted change of results: `python -m tests.portability --write`"


@pytest.fixture(scope="module")
def golden() -> dict[str, Digests]:
    """The committed digests by number of threads."""
    return files.read_json(GOLDEN)


@pytest.fixture(scope="module")
def emulator() -> str:
    """The user-mode emulator; skips where it is missing, unless MIREPRO_REQUIRE_INFRA=1."""
    found = shutil.which("qemu-x86_64")
    if found is None:
        reason = "qemu-x86_64 is missing; apt-get install qemu-user"
        pytest.fail(reason) if os.environ.get("MIREPRO_REQUIRE_INFRA") == "1" else pytest.skip(reason)
    return found


def check(found: dict[str, Any], golden: dict[str, Digests], threads: int) -> None:
    """Every digest is the golden one."""
    assert different(found["digests"], golden[str(threads)]) == [], REGENERATE


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_native_digests_are_golden(golden: dict[str, Digests], threads: int) -> None:
    check(child(threads), golden, threads)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_digests_with_avx2_forced_are_golden(golden: dict[str, Digests], threads: int) -> None:
    found = child(threads, MIREPRO_ISA="avx2")
    assert found["isa"] == "avx2"
    check(found, golden, threads)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("cpu", "threads"), EMULATED)
def test_digests_on_an_emulated_cpu_are_golden(
    emulator: str, golden: dict[str, Digests], cpu: str, threads: int
) -> None:
    found = child(threads, prefix=(emulator, "-cpu", cpu))
    assert (found["isa"], found["best_isa"]) == ("avx2", "avx2"), "the operators must see the emulated CPU"
    check(found, golden, threads)


@pytest.mark.slow
def test_threads_and_tier_change_digests(golden: dict[str, Digests]) -> None:
    """Controls: the number of threads is a parameter, and without the tier's variables this CPU computes otherwise."""
    assert different(golden["1"], golden["2"])
    if torch.cpu._is_avx512_supported():
        pinned = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OPENBLAS_CORETYPE",
                  "NPY_DISABLE_CPU_FEATURES")  # fmt: skip
        found = child(1, "--tier", "fast", **dict.fromkeys(pinned))
        assert different(found["digests"], golden["1"])


EXACT = """
import json, sys, tempfile
from pathlib import Path
from mirepro import determinism
from tests.portability import Miniature
determinism.configure_torch("exact", int(sys.argv[1]))
with tempfile.TemporaryDirectory() as name:
    small = Miniature(Path(name))
    print(json.dumps({"data": small.data(), "ir": small.run("ir")}))
"""


def exact(threads: int, count: int = 1) -> list[Digests]:
    """Digests of one objective in tier `exact`, computed by `count` processes."""
    pinned = determinism.environment("portable", threads)
    kept = {name: value for name, value in os.environ.items() if name not in pinned}
    cases: list[forked.Case] = [(["", str(threads)], {}, ROOT)] * count
    done = forked.run(EXACT, cases, "import mirepro, torch", kept | determinism.environment("exact", threads))
    assert all(item.returncode == 0 for item in done), done
    return [json.loads(item.stdout) for item in done]


@pytest.mark.slow
def test_exact_results_are_equal_for_an_equal_key_and_another_number_of_threads_differs() -> None:
    (one, again), (two,) = exact(1, 2), exact(2)
    assert different(one, again) == []
    assert "ir/encoder.safetensors" in different(one, two)
    assert one["data"] == two["data"]
    assert determinism.key("exact", 1) != determinism.key("exact", 2)


def test_another_seed_and_one_perturbed_bank_row_change_digests(
    golden: dict[str, Digests], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Miniature(tmp_path).data()

    def run(name: str, seed: int) -> Digests:
        shutil.copytree(tmp_path / "data", tmp_path / name / "data")
        return {"ir": Miniature(tmp_path / name, seed).run("ir")}

    wanted = {"ir": golden["1"]["ir"]}
    assert different(run("same", 0), wanted) == []
    assert "ir/encoder.safetensors" in different(run("seed", 1), wanted)
    original = MemoryBank.__init__

    def perturbed(self: MemoryBank, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.rows[0, 0] = torch.nextafter(self.rows[0, 0], torch.tensor(2.0))

    monkeypatch.setattr(MemoryBank, "__init__", perturbed)
    assert "ir/chain.txt" in different(run("row", 0), wanted)
