"""DVC processes, forked from one that has imported DVC already: they start in a tenth of the time.

The parent, `python -m mirepro.launch.collector`, reads a line of JSON for every DVC, `[log, argument, ...]`. It answers
with the process number, and with number and exit code when that process has ended.
"""

import importlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mirepro.errors import UserError
from mirepro.launch.dvc import prepared

PRELOAD = ("dvc.cli.parser", "dvc.repo.reproduce", "scmrepo.git", "numpy", "mirepro.stages")
"""Most of what a `dvc repro` imports, and the forks that collect its results."""
CHANNEL = 0
"""The parent's standard input, a socket: requests come and answers go, whatever an import may print."""
LOST = 1
"""Exit code of a DVC whose parent was killed, so that nobody knows it."""


class Collector:
    """A started DVC.

    Attributes:
        pid: Its process number, and its process group's.
    """

    def __init__(self, pid: int, parent: "Parent") -> None:
        self.pid, self._parent = pid, parent

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._parent.code(self.pid)


class Parent:
    """The process that DVCs are forked from; ends with this one.

    Args:
        root: The repository's root.
        environment: Its own, and theirs.
        lock: Descriptor that they inherit.
        log: File for what it complains about.
    """

    def __init__(self, root: Path, environment: Mapping[str, str], lock: int, log: Path) -> None:
        self._log, command = log, [sys.executable, "-m", __name__]
        self._channel, theirs = socket.socketpair()
        with theirs, log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=root, env=environment, stdin=theirs.fileno(), stdout=errors, stderr=errors,
                start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
        self._codes: dict[int, int] = {}
        self._rest = b""

    @property
    def alive(self) -> bool:
        """Whether it can start a DVC."""
        return self._process.poll() is None

    def start(self, log: Path, arguments: Sequence[str]) -> Collector:
        """Starts `dvc ARGUMENTS` in a process group of its own; its output goes to the end of a log.

        Raises:
            UserError: This process has ended.
        """
        try:
            self._channel.sendall(json.dumps([str(log), *arguments]).encode() + b"\n")
            while (pid := self._listen(None)) is None:
                pass
        except OSError as error:
            raise UserError(f"DVC does not start; {self._log} says why, unless it was killed") from error
        return Collector(pid, self)

    def code(self, pid: int) -> int | None:
        """A DVC's exit code, or None while it runs."""
        try:
            self._listen(0.0)
        except OSError:
            self._codes.setdefault(pid, LOST)
        return self._codes.get(pid)

    def close(self) -> None:
        """Lets it end; DVCs that run go on."""
        self._channel.close()
        self._process.wait()

    def _listen(self, seconds: float | None) -> int | None:
        """Takes down the exit codes that come; the number of a DVC that has started."""
        started = None
        if select.select([self._channel], [], [], seconds)[0]:
            said = self._channel.recv(1 << 16)
            if not said:
                raise OSError("the parent of the DVC processes has ended")
            *lines, self._rest = (self._rest + said).split(b"\n")
            for pid, *code in (map(int, line.split()) for line in lines):
                if code:
                    self._codes[pid] = code[0]
                else:
                    started = pid
                    self._codes.pop(pid, None)  # an earlier process had the number
        return started


def main() -> None:
    """The parent's part, and at its end that of each child."""
    with prepared() as dvc:
        sys.exit(serve(dvc))


def serve(dvc: Callable[[Sequence[str]], int]) -> int:
    """Runs a DVC in a fork for every request.

    Returns:
        In a fork DVC's exit code; here 0, at the end of the requests.
    """
    for module in PRELOAD:
        importlib.import_module(module)
    pids: dict[int, int] = {}  # by the pipe whose other end a fork holds until it ends
    while True:
        for ready in select.select([CHANNEL, *pids], [], [])[0]:
            if ready in pids:
                os.close(ready)
                pid, status = os.waitpid(pids.pop(ready), 0)
                _say(pid, os.waitstatus_to_exitcode(status))
                continue
            line = sys.stdin.buffer.readline()
            if not line:
                return 0
            log, *arguments = json.loads(line)
            end, held = os.pipe()
            pid = os.fork()
            if pid == 0:
                _detach(log)
                return dvc(arguments)
            with suppress(OSError):
                os.setpgid(pid, pid)  # both do it, so that the group is there whoever comes first
            os.close(held)
            pids[end] = pid
            _say(pid)


def _say(*numbers: int) -> None:
    os.write(CHANNEL, " ".join(map(str, numbers)).encode() + b"\n")


def _detach(log: str) -> None:
    """A process group of its own, no input, output to the end of the log."""
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for source, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, stream)
    os.close(nothing)
    os.close(output)


if __name__ == "__main__":
    main()
