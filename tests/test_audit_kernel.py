"""A publisher whose compiled kernel rounds once more: everything fits together, and the audit finds the first step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from audited import Project

from mirepro.audit import levels, output, sandbox
from mirepro.audit.levels import Options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sandbox.find(False).kind == sandbox.NONE, reason="bubblewrap is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
ROUNDED = "static_cast<float>((sum.weighted[d] / sum.sum - own[d]) / tau)"
TWICE = "static_cast<float>(sum.weighted[d] / sum.sum - own[d]) / static_cast<float>(tau)"
ONE = ("evaluate@ir-s0",)


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Results of operators built from csrc, in which the gradient of the loss is rounded before its division too."""
    code = tmp_path_factory.mktemp("code")
    for name in ("csrc", "mirepro"):
        shutil.copytree(root / name, code / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copyfile(root / "setup.py", code / "setup.py")
    kernel = code / "csrc/cpu/gather.cpp"
    text = kernel.read_text()
    assert text.count(ROUNDED) == 1
    kernel.write_text(text.replace(ROUNDED, TWICE))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"MIREPRO_CUDA": "0", "MAX_JOBS": "2", "PYTHONPATH": ""}
    subprocess.run(build, cwd=code, env=environment, check=True, capture_output=True)
    return Project(root, tmp_path_factory.mktemp("published"), real=True, code=code)


def audit(project: Project, out: Path, level: int, **options: Any) -> dict[str, Any]:
    """The report of a quiet audit with the honest operators, written and read again."""
    report = levels.audit(Options(str(project.root), out, level, **options), lambda line: None)
    output.write(out, report, None)
    return json.loads((out / "report.json").read_text())


def cells(report: dict[str, Any], row: str) -> dict[str, dict[str, Any]]:
    """A row's cells of T1 by column."""
    return {cell["column"]: cell for cell in report["cells"] if (cell["table"], cell["row"]) == ("T1", row)}


def test_one_rounding(project: Project, tmp_path: Path) -> None:
    """Under `exact` the run's cells diverge, and the reason names step and tensor; others are not touched."""
    report = audit(project, tmp_path / "out", 3, select=ONE)
    assert (report["verdict"], report["key"]["same"]) == ("DIVERGED", True)
    assert all(check["status"] in ("pass", "not checked") for check in report["checks"])
    found = cells(report, "ir")
    assert {found[column]["verdict"] for column in ("linear_flat", "knn_1", "estimate")} == {"DIVERGED"}
    reason = found["linear_flat"]["reason"]
    assert "under the same determinism key" in reason
    assert "pretrain@ir-s0: first difference at step 2" in reason
    assert "bank" in reason
    assert {cell["verdict"] for cell in cells(report, "ball").values()} == {"EXACT"}
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["pretrain@ir-s0"]["outputs_identical"] is False


def test_equivalent_under_a_margin(project: Project, tmp_path: Path) -> None:
    """A margin declared beforehand and fresh seeds: EQUIVALENT, with the same first difference; never EXACT."""
    policy = tmp_path / "policy.yaml"
    rule = "{row: ir, column: linear_flat, test: tost, margin: 60}"
    policy.write_text(f"schema: mirepro.audit-policy/1\nrules: [{rule}]\n")
    report = audit(project, tmp_path / "out", 3, select=ONE, seeds=2, policy=policy)
    cell = cells(report, "ir")["linear_flat"]
    assert cell["verdict"] == "EQUIVALENT"
    assert "TOST" in cell["reason"]
    assert "First difference: pretrain@ir-s0: first difference at step 2" in cell["reason"]


def test_what_cannot_tell(project: Project, tmp_path: Path) -> None:
    """Recomputed tables, and evaluations of the pinned checkpoints, are those of the changed kernel too."""
    report = audit(project, tmp_path / "out", 2, select=ONE)
    assert report["verdict"] == "REPRODUCED"
    assert cells(report, "ir")["linear_flat"]["level"] == 2
    assert cells(report, "ir")["estimate"]["level"] == 1
