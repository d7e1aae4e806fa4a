"""Reproductions killed at random moments end as an uninterrupted one does, and the harness sees it where they do not.

More of it: `python tests/kill.py --kills 100` (miniature), `--desk` (the real stages).
"""

from pathlib import Path

import kill
import pytest

pytestmark = pytest.mark.slow


def test_ten_kills_change_nothing(root: Path, tmp_path: Path) -> None:
    subject, seconds = kill.miniature(root, tmp_path)
    killed = list(kill.attempts(subject, 10, seconds, 0))
    assert len(killed) == 10
    assert len({what.partition("/")[0] for what in killed}) > 2


def test_plain_dvc_too(root: Path, tmp_path: Path) -> None:
    subject, seconds = kill.miniature(root, tmp_path, plain=True)
    assert len(list(kill.attempts(subject, 3, seconds, 1))) == 3


@pytest.mark.parametrize("mistake", kill.BREAKS)
def test_mistakes_are_noticed(root: Path, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: kills during training, which the code with a mistake does not survive."""
    monkeypatch.setattr(kill, "MOMENTS", {"checkpoint": kill.MOMENTS["checkpoint"]})
    monkeypatch.setattr(kill, "VICTIMS", ("all",))
    subject, seconds = kill.miniature(root, tmp_path, broken=mistake)
    with pytest.raises(kill.Broken, match=r"results differ|an undisturbed run failed"):
        list(kill.attempts(subject, 3, seconds, 0))
