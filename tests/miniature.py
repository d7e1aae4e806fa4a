"""A small copy of the repository whose stages are quick fakes; code locks, DVC and the launcher are the real ones."""

import compileall
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

from mirepro import profiles, stages
from mirepro.launch.plan import Pipeline

FAKES = {
    "pretrain.py": """
from mirepro.params import RunParams

def never():
    from mirepro import ops
    from mirepro.objectives import base

def pretrain(run: RunParams, data_folder, work, out, fingerprint):
    (work / "started").write_text(fingerprint)
    if (data_folder.parent.parent / "kill").exists():
        raise KeyboardInterrupt
    if (data_folder.parent.parent / "slow").exists():
        import time
        time.sleep(600)  # until somebody ends it
    (out / "encoder.safetensors").write_text(f"{run.objective} {run.seed} {sorted(run.options.items())}")
    return {"schema": "mirepro.metrics/1", "cells": {"estimate": {"value": run.seed, "unit": "nats", "protocol": ""}}}
""",
    "transfer/evaluate.py": """
from mirepro.params import EvaluateParams

def evaluate(run, row, seed, params: EvaluateParams, pretrained, data_folder, work, out, fingerprint):
    (out / "test.json").write_text((pretrained / "encoder.safetensors").read_text())
    return {"run": run}
""",
    "transfer/controls.py": """
from mirepro.params import EvaluateParams

def controls(params: EvaluateParams, data_folder):
    return {"rows": {}}
""",
    "transfer/detection.py": """
from mirepro.params import DetectParams

def detect(run, row, seed, model, params: DetectParams, pretrained, data_folder, work, out, fingerprint):
    (out / "detections.json").write_text((pretrained / "encoder.safetensors").read_text())
    return {"run": run, "model": model}
""",
    "toy.py": """
from mirepro.params import ToyParams

def toy(params: ToyParams, out):
    (out / "banks.json").write_text("[]")
    return {"banks": params.banks}
""",
    "data/__init__.py": """
NAMES = ("desk", "scenes")

def build(name, folder):
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "0.tar").write_text(name)
""",
    "data/shards.py": "",
    "preflight.py": "def check(profile):\n    pass\n",
    "report/tables.py": """
from mirepro import files

def build(root, profile, layout):
    names = sorted(str(path.relative_to(root)) for path in (root / "metrics" / profile).rglob("*.json"))
    files.write_json(root / "tables" / profile / "T1.json", names)
""",
    "report/page.py": """
from mirepro import files

def build(root, profile, layout, key, view=None):
    files.write_text(root / ("view" if view else "reports") / profile / "index.html", "page")
""",
}

PARAMS = """
profile: desk
params: params.yaml
root: .
tier: portable
threads: 1
datasets: [desk, scenes]
pretrain: {data: desk}
rows:
  ball: {objective: ball, options: {k: 16}}
  ring: {objective: ring, options: {k: 16}}
runs:
  ball-s0: {row: ball, objective: ball, seed: 0}
  ring-s0: {row: ring, objective: ring, seed: 0}
evaluate: {data: desk}
detect: {}
toy: {}
detect_runs:
  ring-s0-mask: {run: ring-s0, row: ring, seed: 0, model: mask, data: scenes}
tables:
  T1: {rows: {ball: [ball-s0], ring: [ring-s0]}}
"""


class Miniature:
    """The copy and commands in it.

    Args:
        source: The real repository.
        root: Folder to fill.
    """

    def __init__(self, source: Path, root: Path) -> None:
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(source / "mirepro", root / "mirepro", ignore=ignore)
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", "dvc.yaml", ".gitignore"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, root / name)
        for name, text in FAKES.items():
            (root / "mirepro" / name).write_text(text)
        version = root / "mirepro" / "ops_version.json"
        version.write_text('{"neighbors": "1.0.0"}\n')
        self.edit("mirepro/determinism.py", "", "\n\ndef configure_torch(*_):\n    pass\n")
        # Every command is a process; none has to compile what no edit touched. Hashes of the sources decide, not times.
        rest, checked = re.compile("/audit/"), PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root / "mirepro", quiet=2, rx=rest, invalidation_mode=checked)
        (root / "params.yaml").write_text(PARAMS)
        for name in ("desk", "scenes"):
            (root / "data" / name).mkdir(parents=True)
            (root / "data" / name / "manifest.json").write_text(f'{{"name": "{name}"}}\n')
        command = root / "bin" / "mirepro"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mirepro "$@"\n')
        command.chmod(0o755)
        subprocess.run(["git", "init", "-q", str(root)], check=True)

    @property
    def environment(self) -> dict[str, str]:
        """The copy's package and commands first."""
        path = f"{self.root / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PYTHONPATH": str(self.root), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, module: str = "mirepro", **options: object) -> subprocess.CompletedProcess[str]:
        """`python -m module arguments` in the copy."""
        settings = {"cwd": self.root, "env": self.environment, "text": True, "capture_output": True} | options
        return subprocess.run([sys.executable, "-m", module, *arguments], **settings)  # type: ignore[call-overload]

    def edit(self, name: str, old: str, new: str) -> str:
        """Replaces text in a file (appends where `old` is empty); returns the content before."""
        path = self.root / name
        before = path.read_text() if path.exists() else ""
        assert old in before
        path.write_text(before.replace(old, new) if old else before + new)
        return before

    def restore(self, name: str, before: str) -> None:
        """Undoes an edit; an empty file is deleted."""
        path = self.root / name
        path.write_text(before) if before else path.unlink()

    def stale(self) -> set[str]:
        """Names of the stale stages, after the code locks were made anew; what `mirepro status` prints."""
        profile = profiles.load(self.root, "desk")
        stages.relock(profile)
        return set(Pipeline(self.root, ["dvc.yaml"]).plan().stale)
