"""DVCs forked from one parent: exit codes, kills, what they inherit; DVC itself is real in the tests of pipelines."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirepro.errors import UserError
from mirepro.launch import collector, dvc
from mirepro.launch.collector import Collector, Parent

STANDIN = """
import os, signal, sys, time
from mirepro.launch import collector
from contextlib import contextmanager

def dvc(words):
    print("said", *words, flush=True)
    if words[0] == "hang":
        time.sleep(600)
    if words[0] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if words[0] == "raise":
        raise ValueError("no")
    return int(words[1])

@contextmanager
def prepared():
    yield dvc

collector.PRELOAD = ()
collector.prepared = prepared
collector.main()
"""
"""A parent whose DVC does as it is told."""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    """One that holds a lock, and whose processes are gone in the end."""
    started = subprocess.Popen

    def standin(command: list[str], **options: object) -> object:
        assert command[1:] == ["-m", "mirepro.launch.collector"]
        return started([sys.executable, "-c", STANDIN], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(collector.subprocess, "Popen", standin)
    environment = os.environ | {"PYTHONPATH": str(Path(collector.__file__).parent.parent.parent)}
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parent = Parent(tmp_path, environment, lock.fileno(), tmp_path / "dvc.log")
    yield parent
    parent.close()


def end(child: Collector, seconds: float = 30.0) -> int | None:
    """Its exit code, None where it goes on."""
    until = time.monotonic() + seconds
    while (code := child.poll()) is None and time.monotonic() < until:
        time.sleep(0.01)
    return code


def free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_codes_and_logs(parent: Parent, tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    log.write_text("before\n")
    assert [end(parent.start(log, ["exit", str(code)])) for code in (0, 3)] == [0, 3]
    assert log.read_text() == "before\nsaid exit 0\nsaid exit 3\n"
    assert end(parent.start(log, ["die"])) == -signal.SIGKILL
    assert end(parent.start(log, ["raise"])) == 1
    assert "ValueError: no" in log.read_text()
    assert parent.alive


def test_two_at_a_time_in_groups_of_their_own(parent: Parent, tmp_path: Path) -> None:
    slow, other = (parent.start(tmp_path / "log", ["hang"]) for _ in range(2))
    assert end(parent.start(tmp_path / "log", ["exit", "4"])) == 4
    assert [os.getpgid(child.pid) for child in (slow, other)] == [slow.pid, other.pid]
    os.killpg(slow.pid, signal.SIGINT)
    assert end(slow) in (130, -signal.SIGINT, 1)
    assert end(other, 0.2) is None
    os.killpg(other.pid, signal.SIGKILL)
    assert end(other) == -signal.SIGKILL


def test_a_lock_is_held_until_the_last_dvc_ends(parent: Parent, tmp_path: Path) -> None:
    child = parent.start(tmp_path / "log", ["hang"])
    parent.close()
    assert not parent.alive
    assert not free(tmp_path / "lock")
    os.killpg(child.pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while not free(tmp_path / "lock") and time.monotonic() < until:
        time.sleep(0.01)
    assert free(tmp_path / "lock")


def test_a_killed_parent(parent: Parent, tmp_path: Path) -> None:
    """Its DVCs count as failed and go on; the next one is refused in a line."""
    child = parent.start(tmp_path / "log", ["hang"])
    assert child.poll() is None
    parent._process.kill()
    assert end(child) == collector.LOST
    with pytest.raises(UserError, match=r"DVC does not start; .*dvc\.log says why"):
        parent.start(tmp_path / "log", ["exit", "0"])
    assert not parent.alive
    assert not free(tmp_path / "lock")
    os.killpg(child.pid, signal.SIGKILL)


def test_children_are_known_as_dvc() -> None:
    """By their command line, so that what they claim is not taken from them; control: another process."""
    for words, known in ((["-m", "mirepro.launch.collector"], True), (["-m", "mirepro.launch.nursery"], False)):
        command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"  # it runs, and has its command line
            assert dvc._is_dvc(process.pid) == known
        finally:
            process.kill()
            process.wait()
