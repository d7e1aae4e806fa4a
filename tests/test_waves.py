"""The order of a parallel reproduction, groups that DVC collects, and an interruption while a stage starts."""

import os
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from mirepro import files
from mirepro.launch import waves
from mirepro.launch.plan import Plan
from mirepro.profiles import Profile


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


class Brief:
    """A computation of a twentieth of a second."""

    pid = None

    def __init__(self) -> None:
        self.ends = time.monotonic() + 0.05

    @property
    def exitcode(self) -> int | None:
        return 0 if time.monotonic() > self.ends else None


class BriefStarter(GroupStarter):
    """Notes how many computations are at work whenever one starts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.workers: list[Brief] = []
        self.most = 0

    def start(self, name: str) -> waves.Running:
        item = super().start(name)
        item.worker = Brief()
        self.workers.append(item.worker)
        self.most = max(self.most, sum(worker.exitcode is None for worker in self.workers))
        return item


@pytest.mark.parametrize("together", [1, 4])
def test_results_wait_for_each_other_while_all_slots_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Control: a DVC for every result or two."""
    monkeypatch.setattr(waves, "TOGETHER", together)
    starter, names = BriefStarter(tmp_path), [f"s{i}" for i in range(24)]
    plan = Plan({name: set() for name in names}, names, {})
    waves.Wave(starter, plan, 2, waves.Board({}, 2, quiet=True)).run()  # type: ignore[arg-type]
    assert sorted(starter.done) == sorted(names)
    assert starter.most == 2  # a result that waits takes no slot, and no third computation starts
    sizes = [len(group) for group in starter.groups]
    assert sum(sizes) == 24
    if together == 4:
        assert min(sizes[:3]) >= 4
        assert len(sizes) <= 9
    else:
        assert len(sizes) > 9


@pytest.mark.parametrize("known", [False, True])
def test_the_longest_chain_goes_first_also_where_nothing_ran_yet(tmp_path: Path, known: bool) -> None:
    """Control: where a kind's stages have run, their own times count."""
    profile = Profile(tmp_path, tmp_path / "params.yaml", {"profile": "desk"})
    record = {"stage": "evaluate@old", "seconds": 500.0}
    if known:
        files.write_json(waves.stages.provenance(profile) / "evaluate@old.json", record)
    needs: dict[str, set[str]] = {"pretrain@a": set(), "pretrain@b": set(), "evaluate@a": {"pretrain@a"}}
    needs |= {"detect@b": {"pretrain@b"}, "tables": {"evaluate@a", "detect@b"}}
    expected = waves.estimates(profile, list(needs))
    assert expected["detect@b"] > expected["pretrain@a"] > expected["tables"]
    board = waves.Board(expected, 1, quiet=True)
    order = list(waves.Wave(GroupStarter(tmp_path), Plan(needs, list(needs), {}), 1, board)._waiting)  # type: ignore[arg-type]
    assert order[0] == ("pretrain@a" if known else "pretrain@b")
    assert (order.index("evaluate@a") < order.index("detect@b")) == known
    assert order[-1] == "tables"


def test_a_result_does_not_wait_for_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "PATIENCE", 0.0)
    starter, names = BriefStarter(tmp_path), [f"s{i}" for i in range(24)]
    waves.Wave(starter, Plan({n: set() for n in names}, names, {}), 2, waves.Board({}, 2, quiet=True)).run()  # type: ignore[arg-type]
    assert len(starter.groups) > 9  # control: the test above, with patience


def test_a_result_that_is_needed_does_not_wait(tmp_path: Path) -> None:
    starter, names = BriefStarter(tmp_path), ["a", "b", "c"]
    plan = Plan({"a": set(), "b": {"a"}, "c": {"b"}}, names, {})
    waves.Wave(starter, plan, 2, waves.Board({}, 2, quiet=True)).run()  # type: ignore[arg-type]
    assert starter.groups == [["a"], ["b"], ["c"]]


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
