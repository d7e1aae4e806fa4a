"""What a reproduction shows, on a terminal and elsewhere."""

import re
from types import SimpleNamespace

import pytest

from mirepro.launch import board as module
from mirepro.launch.board import Board, Line, clock

NOW = 1000.0


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The board's clock stands still, however long a test takes."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW))


def test_clock() -> None:
    assert clock(59.6) == "1:00"
    assert clock(3723) == "1:02:03"


def shown(job: str = "") -> None:
    """A board of two stages, one of which has ended."""
    with Board({"toy": 10.0, "pretrain@ir-s0": 100.0}, 1) as board:
        board.finish("toy", 20.0, True)
        board.show([Line("pretrain@ir-s0", NOW - 50, "25%  loss 1.5", "RUNNING" if job else "", job)])


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("TTY_COMPATIBLE", "1"), ("TERM", "xterm"), ("COLUMNS", "90"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    shown()
    lines = capsys.readouterr().err.splitlines()
    assert any("1 of 2 stages, 0:00, about 3:20 left" in line for line in lines)  # twice as slow as expected
    assert any(line.split() == ["pretrain@ir-s0", "0:50", "2:30", "25%", "loss", "1.5"] for line in lines)


def test_a_terminal_gets_the_columns_of_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """State, job and node of each, and what is computed here has none of them."""
    for name, value in (("TTY_COMPATIBLE", "1"), ("TERM", "xterm"), ("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Board({"toy": 10.0, "pretrain@ir-s0": 100.0, "pretrain@la-s0": 100.0}, 3) as board:
        board.show([
            Line("pretrain@ir-s0", NOW - 50, "25%  loss 1.5", "running", "17", "n2"),
            Line("pretrain@la-s0", NOW - 5, "", "queued Priority", "18"),
            Line("toy", NOW - 2, ""),
        ])  # fmt: skip
    lines = [re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", line).split() for line in capsys.readouterr().err.splitlines()]
    assert ["stage", "state", "job", "node", "time", "left", "progress"] in lines
    assert ["pretrain@ir-s0", "running", "17", "n2", "0:50", "0:50", "25%", "loss", "1.5"] in lines
    assert ["pretrain@la-s0", "queued", "Priority", "18", "0:05", "1:35"] in lines
    assert ["toy", "0:02", "0:08"] in lines


def test_elsewhere_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown()
    assert capsys.readouterr().err == "[1/2] toy done in 20.0 s  about 3:20 left\n"
    shown(job="17")
    assert capsys.readouterr().err.splitlines()[1:] == ["pretrain@ir-s0 is job 17"]
