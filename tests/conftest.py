"""The portable tier's variables before numpy or torch are imported; slow tests after the fast ones."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from audited import Project

ROOT = Path(__file__).resolve().parent.parent
SLOW = 2400  # seconds, in place of pyproject.toml's
for line in (ROOT / "portable.env").read_text().splitlines():
    name, value = line.split("=", 1)
    os.environ[name] = value
# A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup's child, whose own children are to be hung up
    signal.signal(signal.SIGHUP, lambda *_: None)
assert "torch" not in sys.modules, "torch was imported before the portable tier's variables were set"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs slow tests late, so that a mistake shows early, and of these the longest group first.

    With pytest-xdist a group stays on one worker: a file's fast or slow tests, which share their fixtures, and all
    tests of daemons, which would disturb one another; a test may name a group of its own. Slow ones have time enough
    on a busy machine, too. What is marked full is slow, too.
    """
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.slow)
    marks = [{mark.name for mark in item.iter_markers()} for item in items]
    ranks = [("infra" in names or "slow" in names, "infra" not in names) for names in marks]
    for item, names in zip(items, marks, strict=True):
        if "infra" in names:
            item.add_marker(pytest.mark.xdist_group("infra"))
        elif "xdist_group" not in names:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {'slow' if 'slow' in names else 'fast'}"))
        if "slow" in names and "timeout" not in names:
            item.add_marker(pytest.mark.timeout(SLOW))
    order = sorted(range(len(items)), key=ranks.__getitem__)
    items[:] = [items[place] for place in order]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> "Project":
    """A published result with made-up numbers; tests work on copies."""
    from audited import Project

    return Project(root, tmp_path_factory.mktemp("published"))
