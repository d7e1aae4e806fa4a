"""A computation launched on a real Slurm, and the clusters that tests share."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing, until, working

from mirepro.launch import slurm
from mirepro.launch.launcher import Launcher, Ticket
from mirepro.launch.ledger import Attempt
from mirepro.site import Section, Site

HERE = Path(__file__).resolve().parent


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Cluster]:
    """A running cluster; its commands, and its jobs' imports, work in this process's environment.

    Skips where Slurm is missing, unless MIREPRO_REQUIRE_INFRA=1.
    """
    lacking = missing(options.get("accounts", False))
    if os.geteuid() != 0:
        lacking.append("root")
    if lacking:
        reason = f"needs {', '.join(lacking)} (apt-get install slurm-wlm slurmdbd munge mariadb-server)"
        pytest.fail(reason) if os.environ.get("MIREPRO_REQUIRE_INFRA") == "1" else pytest.skip(reason)
    cluster = Cluster(folder, **options)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}")
    monkeypatch.setattr(slurm, "PATIENCE", 120.0)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster that most tests share: no accounts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from start(tmp_path_factory.mktemp("slurm"), monkeypatch)


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on the shared cluster no job is left, and no node is drained."""
    yield
    if "cluster" in request.fixturenames:
        shared: Cluster = request.getfixturevalue("cluster")
        until(lambda: not shared.run("squeue", "--noheader"), 120, "an empty queue")
        until(lambda: shared.run("sinfo", "-h", "-o", "%T", "-p", "main") == "idle", 120, "idle nodes")


@pytest.fixture
def own(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that a test may harm; its options come from `indirect` parameters."""
    yield from start(tmp_path / "slurm", monkeypatch, **getattr(request, "param", {}))


class Bench:
    """Launches one computation in a folder of its own."""

    def __init__(self, root: Path, call: Callable[..., None], *arguments: Any, **section: Any) -> None:
        self.root, self.work = root, root / ".mirepro" / "work" / "f"
        self.work.mkdir(parents=True, exist_ok=True)
        values = {"time": 30, "grace": 60} | section
        self.site = Site("test", poll=0.5, settle=2.0, retries=2, sections={"pretrain": Section(**values)})
        self.ticket = Ticket("pretrain@a", "pretrain", "f", self.work, partial(call, self.work, *arguments), 1)
        self.launcher = Launcher(root, self.site)
        self.handle = self.launcher.start(self.ticket)

    def wait(self, seconds: float = 300) -> None:
        """Until the result stands."""
        until(self.handle.poll, seconds, "result")

    def running(self, seconds: float = 120) -> None:
        """Until the job has begun to compute."""
        until(lambda: self.handle.poll() or self.runs(), seconds, "start")

    def checkpointed(self, seconds: float = 120) -> None:
        """Until the computation has left a checkpoint."""
        until(lambda: self.handle.poll() or (self.work / "state" / "step").exists(), seconds, "checkpoint")

    def runs(self) -> list[list[str]]:
        """Job id and first step of every run of the computation."""
        path = self.work / "runs"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def attempts(self) -> list[Attempt]:
        """What the ledger knows."""
        entry = self.launcher.ledger.read("f")
        assert entry is not None
        return entry.attempts


def living(bench: Bench) -> list[str]:
    """Processes that compute in the bench's folder."""
    return working(bench.root)
