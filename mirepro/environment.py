"""What varies between machines and enters no result: versions, processor, commit, durations."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mirepro import determinism, files, stages
from mirepro.profiles import Profile

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "dvc", "safetensors", "faster-coco-eval")


def environment(root: Path) -> dict[str, Any]:
    """Facts about this machine and checkout, for bug reports and the untracked view of the report."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processor": determinism.key("exact", 1)["cpu"],
        "cores": os.cpu_count(),
        "commit": _commit(root),
        "requirements.lock": _hash(root / "requirements.lock"),
        **versions,
    }


def view(profile: Profile) -> dict[str, Any]:
    """What the untracked view of the report shows beside the tracked page."""
    records = [files.read_json(path) for path in sorted(stages.provenance(profile).glob("*.json"))]
    durations = {record["stage"]: f"{record['seconds']:.1f} s on {record['host']}" for record in records}
    locks = {name: _hash(profile.path.with_name(name)) for name in ("dvc.lock", "params.yaml")}
    return {"environment": environment(profile.root), "durations": durations, "locks": locks}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "none"


def _commit(root: Path) -> str:
    """The commit, with a plus sign where tracked files were changed; "none" outside git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
