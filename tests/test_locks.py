"""The committed results in a clone without data or cache: locks are current, and a sample of them comes out again."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mirepro import profiles

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ("evaluate@ir-s0", "toy")  # with what they need: data, one pretraining
TRACKED = ("dvc.lock", "locks", "metrics", "tables", "reports")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "dvc.lock").exists(), reason="nothing has been committed to compare with"),
]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone of the committed state, with this checkout's compiled operators and a `mirepro` that runs the clone."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    for library in (ROOT / "mirepro").glob("*.so"):
        shutil.copy(library, folder / "mirepro")
    commands = tmp_path / "bin"
    commands.mkdir()
    script = commands / "mirepro"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mirepro.cli "$@"\n')
    script.chmod(0o755)
    return folder


def execute(clone: Path, *command: str, code: int = 0, isa: str = "avx2") -> str:
    path = os.pathsep.join([str(clone.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    # The operators choose AVX-512 where they can; the committed results must come out of AVX2 as well.
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone), "MIREPRO_ISA": isa}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def stale(clone: Path, pipeline: str = "dvc.yaml", profile: str = "desk") -> list[str]:
    """Stages that DVC would run although nothing but data and cached outputs is missing."""
    execute(clone, "mirepro", "stage", "code", "--profile", profile)
    output = execute(clone, "dvc", "repro", "--dry", "--allow-missing", pipeline)
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.mark.parametrize(("command", "code"), [("mirepro", 1), ("dvc", 255)])
def test_nothing_starts_with_an_impossible_option(clone, command, code):
    """The control is the next test: with what is committed, `code` passes."""
    params = clone / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("inner: 0.01", "inner: 1.01"))
    assert params.read_text() != text
    output = execute(clone, command, "repro", code=code)
    assert "mirepro: rows.ring_l01: objective Ring.inner: 1.01 is impossible; use" in output
    assert "Traceback" not in output
    assert execute(clone, "git", "status", "--porcelain", *TRACKED) == ""
    assert not (clone / ".mirepro" / "provenance").exists()


def test_all_locks_are_current(clone):
    assert stale(clone) == ["code"]
    assert execute(clone, "git", "status", "--porcelain", *TRACKED) == ""
    params = clone / "params.yaml"
    text = params.read_text()
    assert "inner: 0.01" in text
    params.write_text(text.replace("inner: 0.01", "inner: 0.02"))
    dry = ("dvc", "repro", "--dry", "--allow-missing")
    output = execute(clone, *dry, "pretrain@ring_l01-s0", code=255)  # a stale stage needs the absent data
    assert "failed to reproduce 'pretrain@ring_l01-s0'" in output
    assert "'pretrain@ir-s0' didn't change" in execute(clone, *dry, "pretrain@ir-s0")


LOCKS = sorted(ROOT.glob("profiles/*/dvc.lock"))


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.parent.name for lock in LOCKS])
def test_the_locks_of_other_profiles_are_current(clone, lock):
    pipeline, name = str(lock.with_suffix(".yaml").relative_to(ROOT)), lock.parent.name
    assert stale(clone, pipeline, name) == [f"{pipeline}:code"]
    assert execute(clone, "git", "status", "--porcelain", *TRACKED, str(lock.relative_to(ROOT))) == ""
    loop = clone / "mirepro/pretrain.py"
    loop.write_text(loop.read_text() + "\nCHANGED = True\n")
    execute(clone, "mirepro", "stage", "code", "--profile", name)
    output = execute(clone, "dvc", "repro", "--dry", "--allow-missing", f"{pipeline}:pretrain@ir-s0", code=255)
    assert f"failed to reproduce '{pipeline}:pretrain@ir-s0'" in output  # control: it is stale, and needs absent data


def named(profile: profiles.Profile) -> set[str]:
    """Stages of the profile's pipeline."""
    values = profile.values
    runs = {f"{kind}@{run}" for kind in ("pretrain", "evaluate") for run in profile.runs}
    more = {f"data@{data}" for data in values["datasets"]} | {f"detect@{run}" for run in profile.detect_runs}
    return runs | more | {"code", "controls", "toy", "tables", "report"}


@pytest.mark.parametrize("name", ["desk", *(lock.parent.name for lock in LOCKS)])
def test_a_lock_names_the_stages_of_its_pipeline_alone(name):
    """DVC keeps what a pipeline once had, and an image or an audit would look for its results. Control: a row less."""
    profile = profiles.load(ROOT, name)
    lock = set(yaml.load(profile.path.with_name("dvc.lock").read_text(), yaml.CSafeLoader)["stages"])
    assert lock == named(profile)
    fewer = {run: entry for run, entry in profile.values["runs"].items() if run != "ir-s0"}
    assert lock - named(dataclasses.replace(profile, values=profile.values | {"runs": fewer})) == {
        "pretrain@ir-s0", "evaluate@ir-s0",
    }  # fmt: skip


@pytest.mark.timeout(1800)
def test_a_sample_of_the_locks_comes_out_again_from_nothing(clone):
    for target in SAMPLE:
        (clone / f"metrics/desk/{target.replace('@', '/')}.json").unlink()
    execute(clone, "mirepro", "repro", *SAMPLE, "--jobs", "2")
    assert execute(clone, "git", "status", "--porcelain", *TRACKED) == ""
    bank = clone / "runs/desk/pretrain/ir-s0/bank.safetensors"
    assert bank.stat().st_size > 3072 * 64 * 4  # it was trained here, not fetched


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("beside", "isa"),
    [((), ""), pytest.param((sys.executable, "-m", "tests.with_slurm"), "avx2", marks=pytest.mark.infra)],
    ids=["inline", "slurm"],
)
def test_everything_comes_out_again_from_nothing(clone, beside, isa):
    """Once with what the processor has, once with AVX2 forced; the control is the next test."""
    output = execute(clone, *beside, "mirepro", "repro", "--jobs", str(os.cpu_count()), isa=isa)
    stages = len(yaml.safe_load((clone / "dvc.lock").read_text())["stages"]) - 1
    assert f"{stages} stages ran; everything asked for is up to date" in output
    assert execute(clone, "git", "status", "--porcelain", *TRACKED) == ""


@pytest.mark.timeout(1800)
def test_another_seed_does_not_come_out(clone):
    params = clone / "params.yaml"
    line = "  random-s0: {row: random, objective: random, seed: 0}"
    assert line in params.read_text()
    params.write_text(params.read_text().replace(line, line.replace("seed: 0", "seed: 7")))
    execute(clone, "mirepro", "repro", "evaluate@random-s0", "--jobs", "2")
    assert "metrics/desk/evaluate/random-s0.json" in execute(clone, "git", "status", "--porcelain", *TRACKED)
