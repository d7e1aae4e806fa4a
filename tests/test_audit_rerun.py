"""Levels 2 and 3 on a small result that was really computed: evaluations and trainings are run again, sandboxed."""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from audited import Project
from cluster import until

from benchmarks.harness import AVX2
from mirepro import codelocks
from mirepro.audit import boxes, control, levels, output, rerun, sandbox
from mirepro.audit.levels import Options
from mirepro.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sandbox.find(False).kind == sandbox.NONE, reason="bubblewrap is not installed"),
]
ONE = ("evaluate@ir-s0",)


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A published result, computed here."""
    return Project(root, tmp_path_factory.mktemp("published"), real=True)


@pytest.fixture
def forged(project: Project, tmp_path: Path) -> Project:
    """A copy whose publisher can make everything fit together again."""
    copy = object.__new__(Project)
    copy.root = tmp_path / "copy"
    shutil.copytree(project.root, copy.root, symlinks=True)
    copy.profile = levels.integrity.profiles.load(copy.root, "desk")
    return copy


def audit(what: Path, out: Path, level: int, **options: Any) -> dict[str, Any]:
    """The report of a quiet audit; the report's files are written too."""
    report = levels.audit(Options(str(what), out, level, **options), lambda line: None)
    output.write(out, report, None)
    return report


def cells(report: dict[str, Any], row: str = "ir") -> dict[str, dict[str, Any]]:
    """A row's cells by column."""
    return {cell["column"]: cell for cell in report["cells"] if cell["row"] == row}


def test_evaluated_again(project: Project, tmp_path: Path) -> None:
    """Two evaluations give the same bytes in the judge's sandbox; the negative control does not."""
    report = audit(project.root, tmp_path / "out", 2, select=("evaluate@ir-s0", "evaluate@ball-s1"), jobs=2)
    assert report["verdict"] == "REPRODUCED", report["why"]
    assert [(s["metrics_identical"], s["outputs_identical"], s["own"]) for s in report["stages"]] == [(True,) * 3] * 2
    assert [control["differs"] for control in report["controls"]] == [True, True, True]
    assert "linear_flat" in report["controls"][2]["where"]
    cell = cells(report)["knn_1"]
    assert (cell["level"], cell["rerun"], cell["runs"]) == (2, 1, 3)
    assert cells(report)["estimate"]["level"] == 1


def isa(project: Project) -> str:
    """The instruction set that the operators take in a stage's environment."""
    environment = sandbox._environment(project.profile, sandbox.OWN)
    program = "from mirepro import _build_info; print(_build_info.isa())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("level", [2, 3])
def test_with_avx2_alone(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """Results of AVX-512 operators, evaluated and trained again with AVX2, are EXACT; the negative control differs."""
    if isa(project) != "avx512":
        pytest.skip("the processor has no AVX-512, so that the results were made with AVX2 too")
    for name, value in AVX2.items():
        monkeypatch.setenv(name, value)
    assert isa(project) == "avx2"
    report = audit(project.root, tmp_path / "out", level, select=ONE)
    assert report["verdict"] == "REPRODUCED", report["why"]
    stages = {stage["stage"]: (stage["metrics_identical"], stage["outputs_identical"]) for stage in report["stages"]}
    assert stages == dict.fromkeys(["pretrain@ir-s0", "evaluate@ir-s0"][3 - level :], (True, True))
    found = cells(report)["linear_flat"]
    assert (found["verdict"], found["level"], report["controls"][-1]["differs"]) == ("EXACT", level, True)


def test_trained_again_with_fresh_seeds(project: Project, tmp_path: Path) -> None:
    """One run trained again is exact down to its weights; fresh seeds are judged by the margin."""
    policy = tmp_path / "policy.yaml"
    rule = "{row: ir, column: linear_flat, test: tost, margin: 60}"
    policy.write_text(f"schema: mirepro.audit-policy/1\nrules: [{rule}]\n")
    report = audit(project.root, tmp_path / "out", 3, select=ONE, seeds=2, policy=policy)
    assert report["verdict"] == "REPRODUCED", report["why"]
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages.keys() == {f"{kind}@ir-s{seed}" for kind in ("pretrain", "evaluate") for seed in (0, 3, 4)}
    assert stages["pretrain@ir-s0"]["outputs_identical"]
    cell = cells(report)["linear_flat"]
    assert (cell["verdict"], "Fresh seeds: EQUIVALENT" in cell["reason"]) == ("EXACT", True)
    assert len(cell["inputs"]["evidence"]["fresh"]) == 2
    assert report["controls"][-1]["what"].startswith("ir-s0 trained and evaluated with seed 1000")


def test_invented_metrics(forged: Project, tmp_path: Path) -> None:
    """Metrics, tables, report and lock that fit together but were never measured: level 1 cannot tell, level 2 can."""
    path = forged.root / "metrics/desk/evaluate/ir-s0.json"
    content = json.loads(path.read_text())
    content["cells"]["linear_flat"]["value"] += 10
    path.write_text(levels.files.dump_json(content))
    forged.publish()
    assert audit(forged.root, tmp_path / "one", 1)["verdict"] == "REPRODUCED"
    report = audit(forged.root, tmp_path / "two", 2, select=ONE)
    assert report["exit_code"] == 1
    wrong = {name for name, cell in cells(report).items() if cell["verdict"] == "DIVERGED"}
    assert wrong == {"linear_flat"}
    assert "evaluate@ir-s0" in cells(report)["linear_flat"]["reason"]
    band = tmp_path / "band.yaml"
    band.write_text("schema: mirepro.audit-policy/1\nrules: [{column: linear_flat, test: band, margin: 11.0}]\n")
    report = audit(forged.root, tmp_path / "two", 2, select=ONE, policy=band)
    assert cells(report)["linear_flat"]["verdict"] == "CONSISTENT"


def test_a_better_seed_under_another_name(forged: Project, tmp_path: Path) -> None:
    """Seed 1 sold as seed 0, everything fitting: training again names the first step that differs."""
    for folder in ("pretrain", "evaluate"):
        shutil.rmtree(forged.root / f"runs/desk/{folder}/ir-s0")
        shutil.copytree(forged.root / f"runs/desk/{folder}/ir-s1", forged.root / f"runs/desk/{folder}/ir-s0")
        text = (forged.root / f"metrics/desk/{folder}/ir-s1.json").read_text()
        content = json.loads(text) | {"run": "ir-s0", "seed": 0}
        (forged.root / f"metrics/desk/{folder}/ir-s0.json").write_text(levels.files.dump_json(content))
    forged.publish()
    report = audit(forged.root, tmp_path / "two", 2, select=ONE)
    assert cells(report)["linear_flat"]["verdict"] == "EXACT"
    report = audit(forged.root, tmp_path / "three", 3, select=ONE)
    assert cells(report)["linear_flat"]["verdict"] == "DIVERGED"
    assert "first difference at step 2" in cells(report)["linear_flat"]["reason"]


HOSTILE = """

def _spy() -> dict:
    import os, pathlib, socket
    for act in (
        lambda: pathlib.Path({mark!r}).write_text("was here"),
        lambda: socket.create_connection(("127.0.0.1", 22), 1),
        lambda: pathlib.Path("/root/.was-here").write_text("x"),
    ):
        try:
            act()
        except OSError:
            pass
    for place in ({copy!r}, {out!r}, "/work", "/tmp", "."):
        for path in pathlib.Path(place).rglob("evaluate/ir-s0.json"):
            import json
            return json.loads(path.read_text())
    return {{}}

_honest = evaluate

def evaluate(*arguments):
    return _spy() or _honest(*arguments) | {{"cells": {{}}}}
"""


def test_hostile_code(forged: Project, tmp_path: Path) -> None:
    """Audited code that wants to write, to connect and to replay the committed metrics finds none of it."""
    mark = tmp_path / "mark"
    path = forged.root / "mirepro/transfer/evaluate.py"
    values = {"mark": str(mark), "copy": str(forged.root), "out": str(tmp_path / "out")}
    path.write_text(path.read_text() + HOSTILE.format(**values))
    codelocks.write(forged.root, "desk", ["ball", "ir"])
    forged.publish()
    report = audit(forged.root, tmp_path / "out", 2, select=ONE)
    (stage,) = report["stages"]
    assert not stage["own"]
    assert cells(report)["linear_flat"]["verdict"] in ("DIVERGED", "FAILED")
    assert not mark.exists()
    assert not Path("/root/.was-here").exists()
    nowhere = sandbox.Sandbox(sandbox.NONE)
    with pytest.raises(UserError, match="--trust-code"):
        sandbox.execute(nowhere, tmp_path, forged.profile, stage["stage"], own=False)


LINKING = """

def evaluate(*arguments):
    import os, pathlib, shutil
    box = pathlib.Path.cwd()
    for kind in ("metrics", "runs"):
        place = box / kind / "desk/evaluate"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        os.symlink({copy!r} + f"/{{kind}}/desk/evaluate", place)
    os._exit(0)
"""
TREE = """

def toy(*arguments, **options):
    import json, os, pathlib
    for path in pathlib.Path.cwd().rglob("evaluate/*.json"):
        path.write_text("{}")
    for path in (pathlib.Path.cwd() / "data").rglob("*.tar"):
        path.write_bytes(b"")
    place = pathlib.Path.cwd() / "metrics/desk/evaluate"
    place.mkdir(parents=True, exist_ok=True)
    (place / "ir-s0.json").write_text("{}")
    os.write(1, b"x" * 10_000_000)
    os._exit(3)
"""


def rewritten(project: Project, module: str, text: str) -> None:
    """Appends code to a module of the source and makes everything fit together again."""
    path = project.root / module
    path.write_text(path.read_text() + text)
    codelocks.write(project.root, "desk", ["ball", "ir"])
    project.publish()


@pytest.mark.parametrize("checked", [True, pytest.param(False, id="control")])
def test_results_that_are_links(
    forged: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Code that shows the committed files as its results has failed; where links were followed it would be EXACT."""
    if not checked:
        monkeypatch.setattr(boxes.Path, "is_symlink", lambda self: False)
    out = tmp_path / "out"
    rewritten(forged, "mirepro/transfer/evaluate.py", LINKING.format(copy=str(out / "work/copy")))
    report = audit(forged.root, out, 2, select=ONE)
    (stage,) = report["stages"]
    assert stage["metrics_identical"] != checked
    assert ("links are never followed" in stage["error"]) == checked
    assert (cells(report)["linear_flat"]["verdict"] == "FAILED") == checked


def test_one_stage_cannot_reach_another(forged: Project, tmp_path: Path) -> None:
    """What a stage of foreign code writes beside its own results is lost, and of what it prints the end is kept."""
    rewritten(forged, "mirepro/toy.py", TREE)
    report = audit(forged.root, tmp_path / "out", 2, select=(*ONE, "toy"))
    found = {stage["stage"]: stage for stage in report["stages"]}
    assert (found["evaluate@ir-s0"]["own"], found["toy"]["own"]) == (True, False)
    assert cells(report)["linear_flat"]["verdict"] == "EXACT"
    assert set(found["toy"]["error"]) == {"x"}
    assert len(found["toy"]["error"]) == 500


def test_a_control_without_evaluations(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A re-run of the toy has a negative control too; where nothing can be perturbed, nothing was shown."""
    report = audit(project.root, tmp_path / "out", 2, select=("toy",))
    assert [(seen["level"], seen["differs"]) for seen in report["controls"]] == [(0, True), (1, True), (2, True)]
    monkeypatch.setattr(control, "_twins", lambda *_: None)
    report = audit(project.root, tmp_path / "out", 2, select=("toy",))
    assert (report["verdict"], report["controls"][-1]["differs"]) == ("INCONCLUSIVE", False)


def test_other_code_with_equal_results(forged: Project, tmp_path: Path) -> None:
    """Code that differs from the judge's runs from the copy, in the sandbox, and is told apart in the report."""
    path = forged.root / "mirepro/transfer/knn.py"
    path.write_text(path.read_text() + "\nUNUSED = 1\n")
    codelocks.write(forged.root, "desk", ["ball", "ir"])
    forged.publish()
    report = audit(forged.root, tmp_path / "out", 2, select=ONE)
    assert [(stage["own"], stage["metrics_identical"]) for stage in report["stages"]] == [(False, True)]
    assert report["verdict"] == "REPRODUCED", report["why"]


def test_killed_and_continued(project: Project, root: Path, tmp_path: Path) -> None:
    """After a kill the finished stages are not run again."""
    command = [sys.executable, "-m", "mirepro", "audit", str(project.root), "-o", "out", "--level", "2"]
    command += ["--select", "evaluate@ir-*"]
    env, finished = os.environ | {"PYTHONPATH": str(root)}, str(tmp_path / "out/work/again-*/done/*.json")
    for _ in range(5):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        until(lambda p=process: p.poll() is not None or glob.glob(finished), 300, "a finished stage")  # not Path.glob
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (tmp_path / "out/report.json").exists():
            break
        shutil.rmtree(tmp_path / "out")  # it was over before the kill
    done = list(tmp_path.glob("out/work/again-*/done/*.json"))
    assert done
    assert not (tmp_path / "out/report.json").exists()
    recorded = json.loads(done[0].read_text())
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert recorded in report["stages"]
    assert len(report["stages"]) == 3


def working(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (place / "cwd").readlink().is_relative_to(folder):
                found.append((place / "cmdline").read_text().replace("\0", " "))
    return found


def test_interrupted_audit_ends_what_runs_beside(project: Project, root: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the head alone; level 1, the negative control and the re-runs end with it, at once."""
    command = [sys.executable, "-m", "mirepro", "audit", str(project.root), "-o", "out", "--level", "3", "--jobs", "2"]
    env = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    until(lambda: len(working(tmp_path / "out/work")) > 1, 120, "stages of the audit")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    until(lambda: not working(tmp_path), 10, "the end of all processes")
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize("ended", [True, pytest.param(False, id="control")])
def test_a_failure_ends_what_runs_beside(project: Project, tmp_path: Path, ended: bool) -> None:
    """Control: without it the failure waits for the end of what runs beside it."""
    (tmp_path / "mirepro").mkdir()
    (tmp_path / "mirepro/__main__.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(8)\n")
    walls, begun = sandbox.find(False), tmp_path / "begun"
    if not ended:
        object.__setattr__(walls, "end", lambda: None)
    with suppress(UserError), rerun.processors(2, walls) as pool:
        beside = pool.submit(sandbox.execute, walls, tmp_path, project.profile, "toy", own=False)
        until(begun.exists, 30, "the stage beside")
        raise UserError("broken")
    assert (beside.result().code == 0) != ended
    if ended:
        with pytest.raises(UserError, match="has ended"):
            sandbox.execute(walls, tmp_path, project.profile, "toy", own=False)
