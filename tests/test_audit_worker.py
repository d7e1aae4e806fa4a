"""The judge's own stages in one sandbox: answers, failures, time limits, kills, and a process for each stage."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from audited import Project

from mirepro import profiles
from mirepro.audit import sandbox, worker
from mirepro.audit.sandbox import Sandbox, Worker

KINDS = [sandbox.NONE, sandbox.find(False).kind]


@pytest.fixture
def box(project: Project, tmp_path: Path) -> Path:
    """A folder in which `tables` can run."""
    shutil.copytree(project.root, tmp_path / "box", symlinks=True)
    shutil.rmtree(tmp_path / "box/tables")
    return tmp_path / "box"


@pytest.fixture(params=dict.fromkeys(KINDS))
def own(box: Path, request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker with each sandbox that works here."""
    with Worker(Sandbox(request.param), box, profiles.load(box, "desk")) as made:
        yield made


def processes(made: Worker) -> list[psutil.Process]:
    """The worker's processes."""
    assert made._process is not None
    parent = psutil.Process(made._process.pid)
    return [parent, *parent.children(recursive=True)]


def gone(found: list[psutil.Process]) -> bool:
    """Whether processes end soon; the kernel ends those inside bubblewrap after it."""
    return not psutil.wait_procs(found, timeout=120)[1]


def test_one_process_answers_for_all_stages(own: Worker, box: Path) -> None:
    """Two stages in the same sandbox; a third that fails ends it, and the next one has another."""
    assert own.run("tables").code == 0
    assert (box / "tables/desk/T1.json").is_file()
    first = processes(own)
    (box / "tables/desk/T1.json").unlink()
    assert own.run("tables").code == 0
    assert (box / "tables/desk/T1.json").is_file()
    assert processes(own) == first
    failed = own.run("nothing")
    assert (failed.code, "stage 'nothing': unknown" in failed.tail) == (2, True)
    assert gone(first)
    assert own.run("tables").code == 0
    assert processes(own) != first


def test_closing_leaves_no_process(own: Worker) -> None:
    assert own.run("tables").code == 0
    alive = processes(own)
    own.close()
    assert gone(alive)
    own.close()


def test_a_killed_sandbox_is_a_failure_and_no_hang(own: Worker) -> None:
    assert own.run("tables").code == 0
    for process in reversed(processes(own)):
        with suppress(psutil.NoSuchProcess):  # bubblewrap ends by itself when what runs in it ends
            process.kill()
    outcome = own.run("tables")
    assert (outcome.code != 0, outcome.tail) == (True, "its process ended")
    assert own.run("tables").code == 0


def test_time_limit(own: Worker) -> None:
    """A worker that never answers is left, and its processes end; the next stage has another."""
    assert own.run("tables").code == 0
    stopped = processes(own)
    for process in stopped:
        process.suspend()
    assert own.run("tables", 0.01) == sandbox.Outcome(124, "stopped after 0.01 s")
    assert gone(stopped)
    assert own.run("tables", 300).code == 0


def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[..., Any]) -> tuple[int, str]:
    """Exit code and output of a stage that does something."""

    def run(*_: object) -> None:
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest's own go elsewhere
        act()

    monkeypatch.setattr(worker.stages, "run", run)
    with (tmp_path / "log").open("w+b") as log:
        return worker._forked(tmp_path, "desk", "toy", None, log), worker.tail(log)


def test_stages_share_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage leaves in memory, the environment or its working folder is gone for the next one."""

    def leave() -> None:
        os.environ["MIREPRO_LEFT"] = "here"
        sys.modules["left"] = sys
        os.chdir("/")
        print("left")

    here = Path.cwd()
    assert forked(tmp_path, monkeypatch, leave) == (0, "left")
    assert ("MIREPRO_LEFT" in os.environ, "left" in sys.modules, Path.cwd()) == (False, False, here)


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash, an exit and an unknown error are told apart; output is cut."""
    killed = forked(tmp_path, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert killed == (137, "")
    code, text = forked(tmp_path, monkeypatch, lambda: 1 / 0)
    assert (code, text.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    assert forked(tmp_path, monkeypatch, lambda: sys.exit(0))[0] == 1
    code, text = forked(tmp_path, monkeypatch, lambda: print("x" * 100_000 + "\n" + "y\n" * 50))
    assert (code, text) == (0, "\n".join(["y"] * worker.LINES))


def test_a_stage_cannot_answer_for_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it writes, also past Python's streams, goes to its log; it reads nothing."""

    def forge() -> None:
        os.write(1, b'{"code": 0, "tail": "forged"}\n')
        print(repr(os.read(0, 10)))

    code, text = forked(tmp_path, monkeypatch, forge)
    assert (code, text) == (0, '{"code": 0, "tail": "forged"}\nb\'\'')
