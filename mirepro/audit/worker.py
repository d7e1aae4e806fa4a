"""`python -m mirepro.audit.worker ROOT PROFILE`: stages by the judge's own code on a foreign folder.

Names of stages come in on stdin, one a line; for each a line of JSON goes out, `{"code": 0, "tail": "last lines"}`.
A stage is computed in a process of its own, forked from this one, which has imported the stage's code already: imports
cost as much as a third of an evaluation, and no stage sees what another left in memory.
"""

import importlib
import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import BinaryIO

from mirepro import codelocks, stages
from mirepro.errors import UserError

FILE_BYTES = 8 << 30
LINES, LETTERS = 8, 500
"""How much of a stage's output is reported."""


def main(arguments: list[str]) -> int:
    """Answers until stdin ends."""
    root, profile = arguments
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    for line in sys.stdin:
        kind, _, key = line.strip().partition("@")
        if kind in codelocks.ENTRIES:
            importlib.import_module(codelocks.ENTRIES[kind])
        with tempfile.TemporaryFile() as log:
            code = _forked(Path(root), profile, kind, key or None, log)
            print(json.dumps({"code": code, "tail": tail(log)}), flush=True)
    return 0


def _forked(root: Path, profile: str, kind: str, key: str | None, log: BinaryIO) -> int:
    """Runs a stage in a child; returns its exit code, 128 and the signal's number where it was killed."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    status = 1
    try:  # the child can neither read names nor write answers
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        status = _one(root, profile, kind, key)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _one(root: Path, profile: str, kind: str, key: str | None) -> int:
    """Runs a stage; bad input is one line on stderr and status 2, anything else a traceback and 1."""
    try:
        stages.run(root, profile, kind, key)
    except UserError as error:
        print(f"mirepro: {error}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def tail(log: BinaryIO) -> str:
    """The last lines of an output, each cut."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LINES * 4 * LETTERS))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return "\n".join(line[:LETTERS] for line in lines[-LINES:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
