"""Kills a reproduction again and again at random moments and compares its end with an uninterrupted one.

`python tests/kill.py --kills 100` works on a miniature of the repository; `--desk` on a clone with the desk profile's
real stages (long; `--target pretrain@ir-s0` for one chain of stages; `--given` where this checkout's own results stand,
which spares the uninterrupted run; `--folder PLACE` to go on later with the same command).
`--break NAME` damages the miniature's code on purpose: the harness has to notice.
"""

import argparse
import glob
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from miniature import Miniature

from mirepro import files
from mirepro.launch import dvc

RESULTS = ("runs", "metrics", "tables", "reports", "locks", ".mirepro/work")
VICTIMS = ("head", "stage", "all")
HANGS = 3600  # seconds
SURVIVES = 20  # seconds that a run is watched after a kill of one of its stages, before the next kill
MOMENTS: dict[str, tuple[str, ...]] = {
    "any": (),
    "checkpoint": (".mirepro/work/*/state/.checkpoint*.new", ".mirepro/work/*/state/checkpoint.safetensors"),
    "computed": (".mirepro/work/*/finished",),
    "collecting": ("runs/*/*/.*.new", "metrics/*/.*.new", "metrics/*/*/.*.new"),
    "committing": (".dvc.lock.new", "dvc.lock"),
    "claiming": (".dvc/tmp/rwlock.lock",),
}
"""What is waited for: one of these files, written after the waiting began; then a few milliseconds pass."""

PRETRAIN = """
import time
import torch
from mirepro import checkpoint, files
from mirepro.params import RunParams

def never():
    from mirepro import ops
    from mirepro.objectives import base

def pretrain(run: RunParams, data_folder, work, out, fingerprint):
    saved = checkpoint.load(work, fingerprint)
    state = saved.tensors["state"] if saved else torch.full((50_000,), len(run.objective))
    for step in range(saved.facts["step"] if saved else 0, 25):
        state = state * 6364136223846793005 + step
        time.sleep(0.02)
        checkpoint.save(work, fingerprint, {"state": state}, {"step": step + 1})
    for name in ("encoder.safetensors", "bank.safetensors", "history.jsonl"):
        files.write_text(out / name, state.numpy().tobytes().hex())
    return {"schema": "mirepro.metrics/1", "sum": int(state.sum())}
"""

BREAKS = {
    "resume": ("mirepro/pretrain.py", 'saved.facts["step"] if', 'saved.facts["step"] - 1 if'),
    "collect": ("mirepro/execution.py", 'partial = work / "partial"', "partial = finished"),
}
"""Deliberate mistakes: a step computed twice; results that count as finished while they are written."""


class Broken(Exception):
    """A rerun failed or ended in other results; the message says which."""


@dataclass
class Subject:
    """A repository that is killed.

    Attributes:
        root: Its folder.
        environment: Of the commands.
        command: Brings everything up to date.
        mend: Runs after a kill; plain DVC cannot repair what it left half-written.
        expected: Digests of the results of an uninterrupted run.
    """

    root: Path
    environment: dict[str, str]
    command: list[str]
    mend: list[str] | None = None
    expected: dict[str, str] = field(default_factory=dict)

    def start(self, command: Sequence[str] | None = None) -> "subprocess.Popen[bytes]":
        """Starts the command as leader of its own session; its output goes to a file beside the repository."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command or self.command, cwd=self.root, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        """Output of the last command."""
        return self.root.with_suffix(".log")

    def results(self) -> dict[str, str]:
        """Digests of every output, hidden leftovers too; dvc.lock by stage, because stages end in any order."""
        found = {
            str(path.relative_to(self.root)): files.sha256(path)
            for name in RESULTS
            for path in (self.root / name).rglob("*")
            if path.is_file()
        }
        lock = dvc.entries((self.root / "dvc.lock").read_text(encoding="utf-8"))
        return found | {
            f"dvc.lock:{name.strip()}": hashlib.sha256(entry.encode()).hexdigest() for name, entry in lock.items()
        }

    def forget(self) -> None:
        """Back to nothing done."""
        for name in (*RESULTS, ".mirepro", ".dvc/tmp", ".dvc/cache"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "dvc.lock").unlink(missing_ok=True)

    def processes(self) -> dict[int, int]:
        """Process ids and groups of everything that works in the repository."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                cwd, state = (folder / "cwd").readlink(), (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if cwd.is_relative_to(self.root) and state != "Z":
                    found[int(folder.name)] = os.getpgid(int(folder.name))
            except OSError:
                continue
        return found

    def used(self) -> float:
        """Processor seconds of these processes and of the children that they took leave of."""
        ticks = 0
        for pid in self.processes():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill(self, victim: str, head: int, draw: random.Random) -> str:
        """SIGKILL to the head alone, to a process group that it started, or to everything; returns who got it."""
        processes = self.processes()
        groups = sorted(set(processes.values()) - {os.getpgid(head)})
        if victim == "all":
            while processes := self.processes():
                for pid in processes:
                    _signal(os.kill, pid)
        elif victim == "stage" and groups:
            _signal(os.killpg, draw.choice(groups))
        else:
            victim = "head"
            _signal(os.kill, head)
        return victim


def _signal(send: Callable[[int, int], None], number: int) -> None:
    with suppress(ProcessLookupError):
        send(number, signal.SIGKILL)


def stamps(root: Path, patterns: Sequence[str]) -> set[tuple[str, int]]:
    """Files of the patterns with the time they were written."""
    found = set()
    # Not Path.glob, which fails where a folder goes away while it looks.
    for path in (path for pattern in patterns for path in glob.glob(str(root / pattern))):
        with suppress(OSError):
            found.add((path, os.stat(path).st_mtime_ns))
    return found


class Clock:
    """Processor seconds that a repository's processes have used since now; they stand for time on a busy machine."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._looked = subject, time.monotonic()
        self._start = self._last = subject.used()

    def seconds(self) -> float:
        """Looks at the processes, a few times a second; those that ended as orphans are not counted."""
        if time.monotonic() - self._looked > 0.2:
            self._last, self._looked = max(self._last, self._subject.used()), time.monotonic()
        return self._last - self._start


def wait(subject: Subject, head: "subprocess.Popen[bytes]", moment: str, longest: float, draw: random.Random) -> bool:
    """Returns at the moment, or when the head has ended; False where the moment did not come within `longest` s."""
    clock, latest, end = Clock(subject), draw.uniform(0, longest), time.monotonic() + HANGS
    patterns = MOMENTS[moment]
    if not patterns:
        while head.poll() is None and clock.seconds() < latest and time.monotonic() < end:
            time.sleep(0.01)
        return True
    before = stamps(subject.root, patterns)
    skipped = draw.randrange(4)  # not always the first file of its kind
    while head.poll() is None and skipped >= 0 and clock.seconds() < longest and time.monotonic() < end:
        now = stamps(subject.root, patterns)
        skipped -= bool(now - before)
        before = now
        time.sleep(0.001)
    time.sleep(draw.choice([0, 0.001, 0.003, 0.01, 0.1]))
    return skipped < 0


def _ended(head: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit code; None where it goes on, as it does when it can repeat what was killed."""
    try:
        return head.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def attempts(subject: Subject, kills: int, longest: float, seed: int, done: int = 0) -> Iterator[str]:
    """Kills and reruns until all kills are spent and everything is up to date; yields what was killed and when.

    Args:
        subject: What is killed.
        kills: How often.
        longest: Processor seconds that a run is given at most before it is killed.
        seed: Of the moments and the victims.
        done: Kills that an earlier call made already.

    Raises:
        Broken: A run that nobody killed failed, left a process behind, or ended in other results.
    """
    head, hit, missed = None, False, 0
    while True:
        if head is None:
            head, hit = subject.start(), False
        killed = ""
        if done < kills:
            # A run that was over before its moment would be over again: the next one draws anew.
            draw = random.Random(f"{seed} {done}" + f" {missed}" * bool(missed))
            moment, victim = draw.choice([*MOMENTS]), draw.choice(VICTIMS)
            came = wait(subject, head, moment, longest, draw)
            if head.poll() is None:
                killed = f"{moment if came else 'any'}/{subject.kill(victim, head.pid, draw)}"
        hit = hit or bool(killed)
        code = _ended(head, SURVIVES if killed else HANGS)
        head = head if code is None else None
        if killed:
            done, missed = done + 1, 0
            yield killed
        if code is None and not killed:
            raise Broken(f"a run hangs:\n{subject.log.read_text(errors='replace')}")
        if code != 0 and not hit:
            raise Broken(f"an undisturbed run failed (exit {code}):\n{subject.log.read_text(errors='replace')}")
        if code == 0 and not killed:
            compare(subject)
            if done == kills:
                return
            subject.forget()
            missed += 1
        elif subject.mend and code is not None:
            subject.start(subject.mend).wait(timeout=600)


def compare(subject: Subject) -> None:
    """Raises Broken where results differ or a process stays."""
    end = time.monotonic() + 300
    while (left := subject.processes()) and time.monotonic() < end:
        time.sleep(0.1)
    if left:
        raise Broken(f"processes stay behind: {left}")
    found = subject.results()
    names = found.keys() | subject.expected.keys()
    differing = sorted(name for name in names if found.get(name) != subject.expected.get(name))
    if differing:
        raise Broken(f"{len(differing)} of {len(names)} results differ: {', '.join(differing[:5])}")


def miniature(root: Path, folder: Path, plain: bool = False, broken: str | None = None) -> tuple[Subject, float]:
    """A miniature, with a mistake in its code if wanted, and the seconds that an uninterrupted run of it takes."""
    small = Miniature(root, folder / "repo")
    (small.root / "mirepro" / "pretrain.py").write_text(PRETRAIN)
    repro = [sys.executable, "-m", "mirepro", "repro", "--jobs", "2"]
    mend = [*repro, "code"] if plain else None
    subject = Subject(small.root, small.environment, [sys.executable, "-m", "dvc", "repro"] if plain else repro, mend)
    if broken:
        small.edit(*BREAKS[broken])
    return subject, reference(subject)


def reference(subject: Subject) -> float:
    """Gives the subject the results of an uninterrupted run, which are then removed; returns its processor seconds."""
    clock, end = Clock(subject), time.monotonic() + 4 * 3600
    head = subject.start()
    while head.poll() is None and time.monotonic() < end:
        clock.seconds()
        time.sleep(0.1)
    if head.poll() != 0:
        raise Broken(f"the uninterrupted run failed:\n{subject.log.read_text(errors='replace')}")
    seconds = clock.seconds()
    subject.expected = subject.results()
    subject.forget()
    return seconds


def desk(root: Path, folder: Path, target: str | None, given: bool) -> tuple[Subject, float]:
    """A clone with the compiled operators; a folder that has one already goes on.

    Args:
        root: Checkout to clone.
        folder: Where to.
        target: A stage and what it needs; None for everything.
        given: Whether the uninterrupted run starts from the checkout's results, and else from nothing.

    Raises:
        Broken: The folder was begun with another commit or target.
    """
    clone, expected = folder / "repo", folder / "expected.json"
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(clone), "PATH": path}
    repro = [sys.executable, "-m", "mirepro", "repro", "--jobs", "2", *([target] if target else [])]
    subject = Subject(clone, environment, repro)
    begun = {"commit": _commit(root), "target": target}
    if not expected.exists():
        _clone(root, folder)
        if given:
            for name in ("runs", "data", ".dvc/cache"):
                shutil.copytree(root / name, clone / name, dirs_exist_ok=True)
        else:
            subject.forget()
        files.write_json(expected, begun | {"seconds": reference(subject), "results": subject.expected})
    document = files.read_json(expected)
    if differing := [f"{key} {document[key]}" for key in begun if document[key] != begun[key]]:
        raise Broken(f"{folder} was begun with {', '.join(differing)}; use another --folder")
    subject.expected = document["results"]
    return subject, document["seconds"]


def _commit(root: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def _clone(root: Path, folder: Path) -> None:
    """A clone in `repo`, and in `bin` the command that its stages call."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "repo", ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(root), str(folder / "repo")], check=True)
    for library in (root / "mirepro").glob("*.so"):
        shutil.copy(library, folder / "repo" / "mirepro")
    command = folder / "bin" / "mirepro"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mirepro "$@"\n')
    command.chmod(0o755)


def main() -> None:
    """Parses, kills, counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=60, help="processor seconds until a kill, at most (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="plain `dvc repro` instead of `mirepro repro`")
    parser.add_argument("--desk", action="store_true", help="the real stages of the desk profile")
    parser.add_argument("--target", help="with --desk: a stage and what it needs")
    parser.add_argument("--given", action="store_true", help="with --desk: take this checkout's results for granted")
    parser.add_argument("--folder", type=Path, help="with --desk: work there, keep it, and go on from there")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="damage the miniature's code first")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        place = (arguments.folder or Path(folder)).resolve()
        try:
            subject, seconds = (
                desk(root, place, arguments.target, arguments.given)
                if arguments.desk
                else miniature(root, place, arguments.plain, arguments.broken)
            )
        except Broken as error:
            sys.exit(str(error))
        print(f"uninterrupted: {seconds:.0f} processor seconds, {len(subject.expected)} results", flush=True)
        longest = arguments.longest if arguments.desk else min(seconds, arguments.longest)
        kill_and_count(subject, arguments.kills, longest, arguments.seed, place / "kills.txt")


def kill_and_count(subject: Subject, kills: int, longest: float, seed: int, record: Path) -> None:
    """Makes the kills that the record lacks; exits with a message where something is broken."""
    done = record.read_text().splitlines() if record.exists() else []
    try:
        for what in attempts(subject, kills, longest, seed, len(done)):
            done.append(what)
            record.write_text("\n".join(done) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {len(done)} kills; {what}", flush=True)
    except Broken as error:
        subject.kill("all", os.getpid(), random.Random(0))
        sys.exit(f"after {len(done)} kills: {error}")
    print("all equal;", ", ".join(f"{what} {count}" for what, count in sorted(Counter(done).items())))


if __name__ == "__main__":
    main()
