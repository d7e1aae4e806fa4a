"""The order of a parallel reproduction, groups that DVC collects, and an interruption while a stage starts."""

import os
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

from mirepro.launch import waves
from mirepro.launch.plan import Plan


def test_keep_going_leaves_out_what_needs_the_failed_stage() -> None:
    needs: dict[str, set[str]] = {"a": set(), "b": {"a"}, "c": {"b"}, "d": set()}
    assert waves._needing(Plan(needs, list(needs), {}), "a") == {"b", "c"}
    assert waves._needing(Plan(needs, list(needs), {}), "d") == set()


class Computed:
    """A computation that is over."""

    exitcode, pid = 0, None


class GroupStarter:
    """Starts stages that are computed already; a DVC that collects `bad` among others fails for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.groups, self.done = folder, [], []

    def start(self, name: str) -> waves.Running:
        log = self.folder / f"{name}.log"
        log.touch()
        return waves.Running(name, Computed(), log, log)

    def recorded(self, names: list[str]) -> None:
        self.done += names

    def collect(self, items: list[waves.Running]) -> None:
        self.groups.append([item.name for item in items])
        code = "exit 1" if "bad" in self.groups[-1] else "exit 0"
        process = subprocess.Popen(["sh", "-c", code], start_new_session=True)
        for item in items:
            item.process, item.mates = process, len(items)


@pytest.mark.parametrize("names", [["a", "bad", "b", "c"], ["a", "b", "c"]])
def test_a_group_that_dvc_refuses_is_collected_one_by_one(tmp_path: Path, names: list[str]) -> None:
    starter = GroupStarter(tmp_path)
    plan = Plan({name: set() for name in names}, names, {})
    wave = waves.Wave(starter, plan, 8, waves.Board({}, 8, quiet=True))  # type: ignore[arg-type]
    if "bad" in names:
        with pytest.raises(waves.StageFailed, match=r"^bad failed \(exit 1\)") as caught:
            wave.run()
        assert "failed" not in str(caught.value).replace("bad failed", "")
        assert sorted(starter.groups[1:]) == [[name] for name in sorted(names)]
    else:
        wave.run()
    assert starter.groups[0] == names
    assert sorted(starter.done) == sorted(set(names) - {"bad"})
    assert len(starter.groups) == (1 + len(names) if "bad" in names else 1)


class Sleeping:
    """A computation at work."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()


class InterruptedStarter(GroupStarter):
    """Ctrl-C comes when a computation has begun and its start has not returned yet."""

    def start(self, name: str) -> waves.Running:
        item = super().start(name)
        item.worker = self.worker = Sleeping()
        os.kill(os.getpid(), signal.SIGINT)
        return item


@pytest.mark.parametrize("held", [True, False])
def test_a_stage_that_is_starting_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """Control: where the signal is not held back, nobody knows the process."""
    if not held:
        monkeypatch.setattr(waves, "uninterrupted", lambda children: nullcontext())
    starter = InterruptedStarter(tmp_path)
    wave = waves.Wave(starter, Plan({"a": set()}, ["a"], {}), 1, waves.Board({}, 1, quiet=True))  # type: ignore[arg-type]
    try:
        with pytest.raises(KeyboardInterrupt):
            wave.run()
        assert (starter.worker.process.poll() is not None) == held
    finally:
        starter.worker.process.kill()
        starter.worker.process.wait()
