"""DVC's stages on a miniature repository with fake computations: what an edit re-runs, interruption, collection."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cluster import until
from miniature import Miniature

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")

ALL = {
    "data@desk", "data@scenes", "pretrain@ball-s0", "pretrain@ring-s0", "evaluate@ball-s0", "evaluate@ring-s0",
    "controls", "detect@ring-s0-mask", "toy", "tables", "report",
}  # fmt: skip
END = {"tables", "report"}
RING = {"pretrain@ring-s0", "evaluate@ring-s0", "detect@ring-s0-mask"} | END
BALL = {"pretrain@ball-s0", "evaluate@ball-s0"} | END


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """A miniature in which everything is up to date."""
    miniature = Miniature(root, tmp_path_factory.mktemp("miniature") / "repo")
    assert miniature.stale() == ALL
    result = miniature.run("repro", "--jobs", "2")
    assert result.returncode == 0, result.stderr
    assert "11 stages ran" in result.stdout
    return miniature


@contextmanager
def edited(miniature: Miniature, name: str, old: str, new: str) -> Iterator[None]:
    """An edit that is undone."""
    before = miniature.edit(name, old, new)
    try:
        yield
    finally:
        miniature.restore(name, before)


DETECT = {"detect@ring-s0-mask"} | END
LOOP, DETECTOR = "mirepro/pretrain.py", "mirepro/transfer/detection.py"
FRESH = "from mirepro.objectives.base import Objective\n\n\nclass Fresh(Objective):\n    pass\n"
FIELD = "size: int = 64"

EDITS: dict[str, tuple[str, str, str, set[str]]] = {
    "nothing": ("params.yaml", "", "", set()),
    "an objective's parameter": ("params.yaml", "ring, options: {k: 16}", "ring, options: {k: 8}", RING),
    "a new objective": ("mirepro/objectives/fresh.py", "", FRESH, set()),
    "an objective's code": ("mirepro/objectives/ring.py", "inner: float = 0.1", "inner: float = 0.2", RING),
    "the detector's code": (DETECTOR, "", "\nlevels = 5\n", DETECT),
    "the detector's parameters": ("mirepro/params.py", FIELD, FIELD + "\n    extra: int = 0", DETECT),
    "a comment in the loop": (LOOP, "", "\n# why\n", set()),
    "a docstring in the loop": (LOOP, "def never():", 'def never():\n    """Never."""', set()),
    "the loop": (LOOP, "", "\nclip = 1.0\n", RING | BALL),
    "the base objective": ("mirepro/objectives/base.py", "k: int = 256", "k: int = 255", RING | BALL),
    "the operators": ("mirepro/ops_version.json", "1.0.0", "1.1.0", RING | BALL),
    "the operators' Python source": ("mirepro/ops.py", "", "\nspeed = 2\n", set()),
    "the toy's parameter": ("params.yaml", "toy: {}", "toy: {banks: 2}", {"toy"} | END),
    "the shared schedule": ("params.yaml", "pretrain: {data: desk}", "pretrain: {data: desk, epochs: 2}", RING | BALL),
    "the data's manifest": ("data/scenes/manifest.json", "", "\n", {"data@scenes"} | DETECT),
}


def test_several_targets_run_and_a_misspelled_one_among_them_lets_none_start(made: Miniature) -> None:
    absent = [made.root / "metrics" / "desk" / f"{name}.json" for name in ("toy", "controls")]
    for path in absent:
        path.unlink()
    refused = made.run("repro", "toy", "nosuch")
    assert refused.returncode == 2
    assert refused.stderr.startswith("mirepro: Stage 'nosuch' not found inside 'dvc.yaml' file")
    assert len(refused.stderr.splitlines()) == 1
    assert not any(path.exists() for path in absent)
    done = made.run("repro", "toy", "controls")
    assert done.returncode == 0, done.stderr
    assert "2 stages ran" in done.stdout
    assert all(path.is_file() for path in absent)


@pytest.mark.parametrize("case", EDITS)
def test_what_an_edit_makes_stale(made: Miniature, case: str) -> None:
    name, old, new, expected = EDITS[case]
    with edited(made, name, old, new):
        assert made.stale() == expected


def test_no_op_runs_code_alone(made: Miniature) -> None:
    lock = (made.root / "dvc.lock").read_bytes()
    serial = made.run("repro", module="dvc")
    assert serial.stdout.count("Running stage") == 1
    assert "Running stage 'code'" in serial.stdout
    assert "nothing was stale" in made.run("repro").stdout
    assert (made.root / "dvc.lock").read_bytes() == lock


def test_dry_run_agrees(made: Miniature) -> None:
    with edited(made, *EDITS["an objective's parameter"][:3]):
        lines = made.run("repro", "--dry", module="dvc").stdout.splitlines()
        assert "Running stage 'pretrain@ring-s0':" in lines
        assert "Running stage 'pretrain@ball-s0':" not in lines


@pytest.mark.slow
def test_only_the_edited_stages_run(made: Miniature) -> None:
    name, old, new, expected = EDITS["the toy's parameter"]
    untouched = made.root / ".mirepro" / "provenance" / "desk" / "pretrain@ring-s0.json"
    before = untouched.stat().st_mtime_ns
    with edited(made, name, old, new):
        assert f"{len(expected)} stages ran" in made.run("repro").stdout
        assert json.loads((made.root / "metrics/desk/toy.json").read_text()) == {"banks": 2}
    assert untouched.stat().st_mtime_ns == before
    assert made.run("repro").returncode == 0  # back to the committed state
    assert made.stale() == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", [("mirepro", "repro"), ("dvc", "repro", "code")])
def test_a_refused_parameter_costs_no_lock(made: Miniature, command: tuple[str, ...]) -> None:
    """DVC removes a stage's outputs before its command runs; the control is that it was asked to."""

    def locks() -> dict[Path, str]:
        return {path: path.read_text() for path in (made.root / "locks").rglob("*.json")}

    module, *words = command
    before = locks()
    with edited(made, "params.yaml", "toy: {}", "toy: {bankz: 3}"):
        result = made.run(*words, module=module)
        assert result.returncode != 0
        assert "toy.bankz: unknown key" in result.stderr
        assert locks() == before
    assert len(before) > 3
    assert made.run("repro").returncode == 0


@pytest.mark.slow
def test_missing_shards_are_made_again(made: Miniature) -> None:
    shutil.rmtree(made.root / "data" / "desk" / "shards")
    assert "data@desk" in made.stale()
    assert made.run("repro").returncode == 0
    assert (made.root / "data" / "desk" / "shards" / "0.tar").exists()


@pytest.mark.slow
def test_failure_stops_with_the_log(made: Miniature) -> None:
    line = "def toy(params: ToyParams, out):"
    with edited(made, "mirepro/toy.py", line, f"{line}\n    1 / 0"):
        result = made.run("repro")
        assert result.returncode == 1
        assert "toy failed" in result.stderr
        assert "ZeroDivisionError" in result.stderr
    assert made.run("repro").returncode == 0


@pytest.mark.slow
def test_finished_work_is_collected(made: Miniature) -> None:
    """Killed between computing and placing: the rerun places what stands there."""
    line = '    place(finished / "metrics.json"'
    with edited(made, "mirepro/toy.py", "params.banks", "7"):
        with edited(made, "mirepro/execution.py", line, f"    os._exit(9)\n{line}"):
            assert made.run("repro", "toy").returncode == 1
        assert not (made.root / "metrics/desk/toy.json").exists()
        assert made.run("repro", "toy").returncode == 0
        record = json.loads((made.root / ".mirepro/provenance/desk/toy.json").read_text())
        assert record["collected"] is True
        assert json.loads((made.root / "metrics/desk/toy.json").read_text()) == {"banks": 7}
    assert made.run("repro").returncode == 0


@pytest.mark.slow
def test_a_result_is_collected_without_a_command_of_its_own(made: Miniature) -> None:
    """Only quick stages start one; in the control plain DVC, which runs every command."""
    line, ran = "    launcher = chosen(root)\n", made.root / "ran"
    with edited(made, "mirepro/launch/jobs.py", line, f"{line}    open({str(ran)!r}, 'a').write(f'{{kind}} ')\n"):
        with edited(made, "mirepro/toy.py", "params.banks", "11"):
            assert made.run("repro").returncode == 0
            assert json.loads((made.root / "metrics/desk/toy.json").read_text()) == {"banks": 11}
            assert ran.read_text() == "code tables report "
            assert made.stale() == set()
        ran.unlink()
        with edited(made, "mirepro/toy.py", "params.banks", "12"):
            assert made.run("repro", module="dvc").returncode == 0
            assert ran.read_text() == "code toy tables report "
    ran.unlink()
    assert made.run("repro").returncode == 0


RECORD = "        _record(profile, kind, keys, done)\n"
DIE = '        if kind == "toy":\n            import os\n\n            os.killpg(0, 9)\n'
KEPT = ', KEEP: "1"}'


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_nothing_is_computed_twice_where_dvc_died_before_its_record(made: Miniature, kept: bool) -> None:
    """DVC is killed while it looks at what was collected; the control keeps no finished work, and computes it again."""
    value, work = 8 + kept, made.root / ".mirepro/work"
    shutil.rmtree(work, ignore_errors=True)  # other tests' failures
    counting = f"open('count', 'a').write('x') * {value}"
    with (
        edited(made, "mirepro/toy.py", "params.banks", counting),
        edited(made, "mirepro/launch/waves.py", KEPT, KEPT if kept else "}"),
    ):
        with edited(made, "mirepro/stages.py", RECORD, RECORD + DIE):
            assert "exit -9" in made.run("repro", "toy").stderr
        assert json.loads((made.root / "metrics/desk/toy.json").read_text()) == {"banks": value}
        assert "toy" in made.stale()
        assert bool(list(work.iterdir())) == kept
        result = made.run("repro", "toy")
        assert result.returncode == 0, result.stderr
        assert json.loads((made.root / "metrics/desk/toy.json").read_text()) == {"banks": value}
        assert "toy" not in made.stale()
    assert (made.root / "count").read_text() == ("x" if kept else "xx")
    (made.root / "count").unlink()
    assert not list(work.iterdir())
    assert made.run("repro").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_reaches_the_stages(made: Miniature, number: int) -> None:
    """A terminal that closes tells the whole process group."""
    (made.root / "slow").touch()
    shutil.rmtree(made.root / ".mirepro" / "work")
    with edited(made, *EDITS["the loop"][:3]):
        command = [sys.executable, "-m", "mirepro", "repro", "--jobs", "1"]
        options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        head = subprocess.Popen(command, cwd=made.root, env=made.environment, **options)
        started = _wait_for(made.root / ".mirepro" / "work", "*/state/started")
        (os.killpg if number == signal.SIGHUP else os.kill)(head.pid, number)
        error = head.communicate(timeout=120)[1]
        assert head.returncode == 130
        assert error.strip().splitlines()[-1] == "mirepro: interrupted; the same command continues"
        assert started.exists()
        until(lambda: not _alive(made.root), 60, "the end of its processes")
    (made.root / "slow").unlink()
    assert made.run("repro").returncode == 0
    assert made.stale() == set()


def _wait_for(folder: Path, pattern: str) -> Path:
    until(lambda: next(folder.glob(pattern), None), 120, pattern)
    return next(folder.glob(pattern))


def _alive(root: Path) -> bool:
    """Whether any process still works in the miniature."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cwd").readlink() == root and b"sleep" not in (folder / "comm").read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.slow
def test_serial_and_parallel_agree(root: Path, made: Miniature, tmp_path: Path) -> None:
    other = Miniature(root, tmp_path / "repo")
    assert other.run("repro", module="dvc").returncode == 0
    locks = [yaml.safe_load((m.root / "dvc.lock").read_text()) for m in (made, other)]
    assert locks[0] == locks[1]
    for name in ("metrics", "tables", "reports", "locks"):
        for path in (made.root / name).rglob("*.json"):
            assert path.read_bytes() == (other.root / path.relative_to(made.root)).read_bytes()


def test_profiles_share_one_pipeline(root: Path) -> None:
    copies = list(root.glob("profiles/*/dvc.yaml"))
    assert copies
    for copy in copies:
        assert copy.read_bytes() == (root / "dvc.yaml").read_bytes(), f"cp dvc.yaml {copy}"
        assert not copy.is_symlink()


def test_nothing_persists_and_results_stay_in_git(root: Path) -> None:
    text = (root / "dvc.yaml").read_text()
    assert "persist" not in text
    kept = ("metrics/", "tables/", "reports/", "locks/")
    seen = 0
    for stage in yaml.safe_load(text)["stages"].values():
        body = stage.get("do", stage)
        for item in body.get("outs", []) + body.get("metrics", []):
            path, options = next(iter(item.items())) if isinstance(item, dict) else (item, {})
            if path.startswith(kept):
                seen += 1
                assert options.get("cache") is False, path
    assert seen == 8
