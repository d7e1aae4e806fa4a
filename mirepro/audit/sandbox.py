"""Runs a stage where it can do no harm: bubblewrap without network and home, with one writable folder.

The judge's own code runs in it too where bubblewrap is installed; code of the source runs nowhere else, unless the
auditor trusts it.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from mirepro import determinism
from mirepro.errors import UserError
from mirepro.profiles import Profile

OWN = Path(__file__).resolve().parents[2]
"""The root of the judge's installation."""
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
BUBBLEWRAP, NONE = "bubblewrap", "none"
FILE_BYTES = 8 << 30
"""The largest file that code of the source may write."""
TAIL = 1 << 16
"""Bytes kept of what it prints."""
LIMITS = ("MIREPRO_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Instruction sets that the auditor restricts stages to; the tier's own variables count before them."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: exit code and the last lines of what it wrote."""

    code: int
    tail: str


@dataclass(frozen=True)
class Sandbox:
    """How stages are run.

    Attributes:
        kind: `bubblewrap` or `none`.
        trusted: The auditor said that the source's code may run outside a sandbox.
        live: Processes that run now.
        ended: Set when no further one may begin.
    """

    kind: str
    trusted: bool = False
    live: "set[subprocess.Popen[bytes]]" = field(default_factory=set, compare=False)
    ended: Event = field(default_factory=Event, compare=False)

    def words(self) -> str:
        """For the report."""
        if self.kind == BUBBLEWRAP:
            return "bubblewrap: no network, no home, no view of the committed results, one writable folder"
        return "none: only this installation's own code ran" + (", or code the auditor trusted" * self.trusted)

    def end(self) -> None:
        """Kills whatever runs and lets nothing begin; the threads that wait for it see its end and clear up."""
        self.ended.set()
        for process in list(self.live):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def find(trust: bool) -> Sandbox:
    """bubblewrap where it is installed and works (user namespaces can be forbidden)."""
    command = shutil.which("bwrap")
    if command and not subprocess.run([*_walls(command, []), "true"], capture_output=True, check=False).returncode:
        return Sandbox(BUBBLEWRAP, trust)
    return Sandbox(NONE, trust)


def _walls(command: str, writable: list[Path], readable: list[Path] | None = None) -> list[str]:
    """bubblewrap's arguments: an empty root with the system, the interpreter and what is named."""
    result = [command, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for place in SYSTEM:
        if os.path.islink(place):
            result += ["--symlink", os.readlink(place), place]
        elif os.path.exists(place):
            result += ["--ro-bind", place, place]
    result += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for path in dict.fromkeys([sys.base_prefix, sys.prefix, *map(str, readable or [])]):
        result += ["--ro-bind", path, path]
    for path in map(str, writable):
        result += ["--bind", path, path]
    return result


def execute(
    sandbox: Sandbox, box: Path, profile: Profile, stage: str, own: bool, timeout: float | None = None
) -> Outcome:
    """Runs a stage on the folder `box` in a sandbox of its own.

    Args:
        sandbox: Where.
        box: The stage's root; the only place it can write to.
        profile: Whose stage, for tier and threads.
        stage: Its name, `kind` or `kind@key`.
        own: Whether the judge's own code computes it; else the code in the box.
        timeout: Seconds.

    Raises:
        UserError: Code of the source would run without a sandbox.
    """
    if own:
        with Worker(sandbox, box, profile) as worker:
            return worker.run(stage, timeout)
    if sandbox.kind == NONE and not sandbox.trusted:
        raise UserError(f"{stage}: the audited code is not this installation's; apt-get install bubblewrap, or use "
                        "--trust-code if you trust it")  # fmt: skip
    kind, _, key = stage.partition("@")
    process = _start(sandbox, box, profile, ["mirepro", "stage", kind, *([key] if key else []), "--profile",
                                             profile.name], own=False)  # fmt: skip
    try:
        output = _listen(process, timeout)
        code = 124 if output is None else process.wait(timeout)
    except subprocess.TimeoutExpired:
        code, output = 124, None
    finally:
        _kill(sandbox, process)
    lines = (f"stopped after {timeout:g} s" if output is None else output.decode(errors="replace")).strip().splitlines()
    return Outcome(code, "\n".join(line[:500] for line in lines[-8:]))


def _listen(process: "subprocess.Popen[bytes]", timeout: float | None) -> bytes | None:
    """The end of what a process writes, however much that is; None where it goes on for longer than `timeout` s."""
    assert process.stdout is not None
    kept, end = b"", None if timeout is None else time.monotonic() + timeout
    while select.select([process.stdout], [], [], None if end is None else max(0.0, end - time.monotonic()))[0]:
        piece = os.read(process.stdout.fileno(), TAIL)
        if not piece:
            return kept
        kept = (kept + piece)[-TAIL:]
    return None


class Worker:
    """The judge's own code in one sandbox, which computes one stage after another; see `mirepro.audit.worker`.

    A failed stage ends it, and the next stage starts it anew. It dies with this process.

    Args:
        sandbox: Where.
        box: The stages' root; the only place they can write to.
        profile: Whose stages, for tier and threads.
    """

    def __init__(self, sandbox: Sandbox, box: Path, profile: Profile) -> None:
        self._place = (sandbox, box, profile)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the sandbox with whatever runs in it."""
        process, self._process = self._process, None
        if process is not None:
            _kill(self._place[0], process)

    def run(self, stage: str, timeout: float | None = None) -> Outcome:
        """Computes a stage, `kind` or `kind@key`, in at most `timeout` seconds."""
        if self._process is None:
            sandbox, box, profile = self._place
            words = ["mirepro.audit.worker", str(box), profile.name]
            self._process = _start(sandbox, box, profile, words, own=True)
        try:
            outcome = self._ask(self._process, stage, timeout)
        except BaseException:
            self.close()
            raise
        if outcome.code:
            self.close()
        return outcome

    def _ask(self, process: "subprocess.Popen[bytes]", stage: str, timeout: float | None) -> Outcome:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended; what it wrote says why
            process.stdin.write(f"{stage}\n".encode())
            process.stdin.flush()
        if not select.select([process.stdout], [], [], timeout)[0]:
            return Outcome(124, f"stopped after {timeout:g} s")
        line = process.stdout.readline()
        if line.startswith(b"{"):
            answer = json.loads(line)
            return Outcome(int(answer["code"]), str(answer["tail"]))
        rest = (line + process.stdout.read()).decode(errors="replace").strip().splitlines()
        return Outcome(process.wait() or 1, "\n".join(rest[-8:]) or "its process ended")


def _start(
    sandbox: Sandbox, box: Path, profile: Profile, words: list[str], own: bool
) -> "subprocess.Popen[bytes]":
    """Starts `python -m words` in a sandbox around the folder `box`."""
    if sandbox.ended.is_set():
        raise UserError(f"{' '.join(words)}: not begun; the audit has ended")
    command, environment = [sys.executable, "-m", *words], _environment(profile, OWN if own else box)
    if sandbox.kind == BUBBLEWRAP:
        readable = [OWN / "mirepro"] if own else []
        walls = _walls(str(shutil.which("bwrap")), [box], readable)
        bounds = [] if own else ["prlimit", f"--fsize={FILE_BYTES}", f"--data={_memory()}", "--core=0", "--"]
        sets = [part for name, value in environment.items() for part in ("--setenv", name, value)]
        command = [*walls, *sets, "--chdir", str(box), "--", *bounds, *command]
    process = subprocess.Popen(
        command, cwd=box, env=environment, stdin=subprocess.PIPE if own else subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    sandbox.live.add(process)
    return process


def _memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kill(sandbox: Sandbox, process: "subprocess.Popen[bytes]") -> None:
    """Ends a process with its group and waits for it."""
    sandbox.live.discard(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with suppress(BrokenPipeError):
            pipe.close()


def _environment(profile: Profile, code: Path) -> dict[str, str]:
    """Nothing of the auditor's environment but the tier's variables and `LIMITS`; caches stay in memory."""
    limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
    return limits | determinism.environment(profile.tier, profile.threads) | {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(code), "HOME": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1", "MPLCONFIGDIR": "/tmp", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
