"""Checkpoints of a running job: when one is due; whole or absent, this run's or refused, the previous one kept."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from mirepro import files
from mirepro.errors import UserError
from mirepro.notice import NOTICE

BETWEEN_SECONDS = 2.0
"""Since the last checkpoint, before another one between two epochs."""
WITHIN_SECONDS, WITHIN_SHARE = 60.0, 0.05
"""The same within an epoch; longer where writing would take more than this share of the time."""
NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
_DIGEST = 32


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and plain JSON facts of a run between two steps."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Clock:
    """Says when a training's next checkpoint is due: now and then, and at once when the process is to be stopped."""

    def __init__(self) -> None:
        self._written, self._cost = time.monotonic(), 0.0
        NOTICE.heard = True

    def due(self, within: bool) -> bool:
        """Whether it is time, within an epoch or between two of them."""
        wait = max(WITHIN_SECONDS, self._cost / WITHIN_SHARE) if within else BETWEEN_SECONDS
        return NOTICE.given or time.monotonic() - self._written > wait

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing; its end answers a notice, which may end the process."""
        begin = time.monotonic()
        yield
        self._written = time.monotonic()
        self._cost = self._written - begin
        NOTICE.answer()


def save(folder: Path, fingerprint: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically, keeping the one before; the file ends with the sha256 of what precedes it."""
    meta = json.dumps({"fingerprint": fingerprint, "facts": facts}, sort_keys=True)
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    content = to_safetensors(copies, {"mirepro": meta})
    current = folder / NAME
    if current.exists():
        previous = folder / PREVIOUS
        previous.unlink(missing_ok=True)
        os.link(current, previous)
    files.write_bytes(current, content + hashlib.sha256(content).digest())


def load(folder: Path, fingerprint: str) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None where there is none.

    A damaged one is removed with a line of warning, so that the next `save` keeps the good one and not its remains.

    Raises:
        UserError: A checkpoint belongs to another run (other parameters, data or code).
    """
    for path in (folder / NAME, folder / PREVIOUS):
        if not path.exists():
            continue
        checkpoint = _read(path, fingerprint)
        if checkpoint is not None:
            return checkpoint
        print(f"{path}: damaged checkpoint removed", file=sys.stderr)
        path.unlink()
    return None


def _read(path: Path, fingerprint: str) -> Checkpoint | None:
    raw = path.read_bytes()
    content, digest = raw[:-_DIGEST], raw[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    try:
        length = int.from_bytes(content[:8], "little")
        meta = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["mirepro"])
        owner, facts = meta["fingerprint"], meta["facts"]
        tensors = from_safetensors(content)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    if owner != fingerprint:
        raise UserError(
            f"{path}: checkpoint of another run ({owner[:12]}, not {fingerprint[:12]}): other parameters, data or "
            "code; remove the folder to start anew"
        )
    return Checkpoint(tensors, facts)


def clear(folder: Path) -> None:
    """Removes the checkpoints of a finished run."""
    for name in (NAME, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
