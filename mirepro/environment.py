"""What varies between machines and enters no result: versions, processor, commit, durations."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
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
        "processor": determinism.cpu("model name"),
        "cores": os.cpu_count(),
        "commit": _commit(root),
        "requirements.lock": _hash(root / "requirements.lock"),
        **versions,
    }


def exactness(profile: Profile) -> dict[str, Any]:
    """The determinism key of a profile's results and everything behind it, for `mirepro env`."""
    differing = determinism.departures(profile.tier, profile.threads)
    names = sorted({*determinism.environment(profile.tier, profile.threads), *differing})
    wanted = {name: os.environ.get(name) for name in names} | {name: pair[0] for name, pair in differing.items()}
    return {
        "key": determinism.key(profile.tier, profile.threads),
        "variables": {name: {"wanted": wanted[name], "standing": os.environ.get(name)} for name in names},
        "threads": {"of a stage": profile.threads, "cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0))},
        "operators": _operators(profile.root),
        "gpus": determinism.gpus(),
        "flags": sorted(determinism.cpu("flags").split()),
    }


def _operators(root: Path) -> dict[str, Any]:
    """How the compiled operators were built, and the instruction set they find and use here."""
    facts: dict[str, Any] = {"versions": files.read_json(root / "mirepro" / "ops_version.json")}
    try:
        from mirepro import _build_info as info  # type: ignore[attr-defined]
    except ImportError:
        return facts | {"build": "missing; run `python setup.py build_ext --inplace`"}
    found = {"compiler": info.compiler(), "cuda": info.cuda_arch_list() or "not built"}
    return facts | found | {"isa found": info.best_isa(), "isa used": info.isa()}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts for people: one line each; variables that stand otherwise than wanted say so."""
    result = []
    for name, value in facts.items():
        if name == "variables":
            result += [f"{name}:", *(f"  {_variable(key, **pair)}" for key, pair in value.items())]
        elif isinstance(value, Mapping):
            result += [f"{name}:", *(f"  {line}" for line in lines(value))]
        else:
            result.append(f"{name}: {' '.join(map(str, value)) or 'none' if isinstance(value, list) else value}")
    return result


def _variable(name: str, wanted: str | None, standing: str | None) -> str:
    text = f"{name}: {wanted or 'unset'}"
    return text if wanted == standing else f"{text} (here {standing or 'unset'}; a stage sets it itself)"


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
