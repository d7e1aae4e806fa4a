"""Programs in forks of one process that has done their imports: one import for all, and none sees another's state."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, os, sys
exec(sys.argv[1])
code, cases = json.load(sys.stdin)
for number, (words, changes, place) in enumerate(cases):
    if (child := os.fork()) == 0:
        status = 1
        try:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
            for name, value in changes.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            os.chdir(place)
            sys.argv = words
            exec(code, {"__name__": "forked", "sys": sys})
            status = 0
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except Exception as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Case = tuple[list[str], Mapping[str, str | None], Path]


def run(
    code: str, cases: list[Case], imports: str, environment: Mapping[str, str] = os.environ
) -> list[CompletedProcess[str]]:
    """Runs the code once in each case.

    Args:
        code: Of the program; an exception prints its message alone.
        cases: `(sys.argv, changes of the environment, working folder)`; None unsets a variable.
        imports: What the process does before it forks; nothing that starts threads.
        environment: Of that process.
    """
    command = [sys.executable, "-c", PROGRAM, imports]
    given = json.dumps([code, [(words, dict(changes), str(place)) for words, changes, place in cases]])
    with tempfile.TemporaryDirectory() as name:
        options = {
            "cwd": name,
            "env": {**environment, "PYTHONPATH": str(ROOT)},
            "capture_output": True,
            "text": True,
            "check": True,
        }
        codes = subprocess.run(command, input=given, **options).stdout.split()  # type: ignore[call-overload]
        texts = [[(Path(name) / f"{i}.{end}").read_text() for end in ("out", "err")] for i in range(len(cases))]
    return [
        CompletedProcess(case[0], int(status), *pair) for case, status, pair in zip(cases, codes, texts, strict=True)
    ]


def forked(code: str, *environments: Mapping[str, str | None]) -> list[str]:
    """What the code prints, or its exception says, in each environment, torch being imported but not used before."""
    done = run(code, [([""], changes, ROOT) for changes in environments], "import torch")
    return [item.stdout + item.stderr for item in done]
