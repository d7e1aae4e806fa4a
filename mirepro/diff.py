"""Compares the digest chains of two runs: the first step and the first tensor that differ."""

import json
from pathlib import Path
from typing import Any

from mirepro.errors import UserError


def read(run: Path) -> list[dict[str, Any]]:
    """Links of a run's chain.

    Raises:
        UserError: The folder holds no chain, or a damaged one.
    """
    path = run / "chain.txt" if run.is_dir() else run
    try:
        links = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not links or any(not {"step", "chain", "tensors"} <= link.keys() for link in links):
            raise UserError(f"{path}: holds no digests; name the folder of a run that took steps")
        return links
    except OSError as error:
        raise UserError(f"{path}: no digest chain; name a run's folder under runs/") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged digest chain; run the pretraining again") from error


def diff(first: Path, second: Path) -> str | None:
    """One line about the first difference, or None where the chains are identical."""
    a, b = read(first), read(second)
    for left, right in zip(a, b, strict=False):
        if left["step"] != right["step"]:
            return f"the chains record other steps: {left['step']} and {right['step']}"
        if left["chain"] != right["chain"]:
            names = sorted(left["tensors"].keys() | right["tensors"].keys())
            differing = [name for name in names if left["tensors"].get(name) != right["tensors"].get(name)]
            return f"first difference at step {left['step']}: {_listed(differing) or 'before this step'}"
    if len(a) != len(b):
        return f"equal for {min(len(a), len(b))} records, then one run goes on: {len(a)} and {len(b)} records"
    return None


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more tensors" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
