"""Checkpoints: damage of every kind is seen, the one before stands in, another run's is refused; atomic files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mirepro import checkpoint, files
from mirepro.errors import UserError


def save(folder: Path, epoch: int, fingerprint: str = "mine") -> None:
    checkpoint.save(folder, fingerprint, {"x": torch.full((5,), float(epoch))}, {"epoch": epoch})


def epoch(folder: Path, fingerprint: str = "mine") -> int | None:
    """The epoch that a resumed run would start from; facts and tensors have to agree."""
    loaded = checkpoint.load(folder, fingerprint)
    if loaded is None:
        return None
    assert torch.equal(loaded.tensors["x"], torch.full((5,), float(loaded.facts["epoch"])))
    return loaded.facts["epoch"]


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def foreign_format(content: bytes) -> bytes:
    """A file with the right digest that is no checkpoint of this program."""
    from hashlib import sha256

    from safetensors.torch import save as to_safetensors

    plain = to_safetensors({"x": torch.ones(5)}, {"mirepro": json.dumps(["something else"])})
    return plain + sha256(plain).digest()


DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "truncated by a byte": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "without its digest": lambda content: content[:-32],
    "a bit of the header": lambda content: flip(content, 20),
    "a bit of a tensor": lambda content: flip(content, len(content) - 40),
    "a bit of the digest": lambda content: flip(content, len(content) - 1),
    "zeros at the end": lambda content: content + bytes(512),
    "zeros alone": lambda content: bytes(len(content)),
    "another program's": foreign_format,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    current = tmp_path / checkpoint.NAME
    current.write_bytes(DAMAGES[damage](current.read_bytes()))
    assert epoch(tmp_path) == 1
    assert capsys.readouterr().err == f"{current}: damaged checkpoint removed\n"
    save(tmp_path, 3)  # must not replace the good one by the damaged one
    (tmp_path / checkpoint.NAME).unlink()
    assert epoch(tmp_path) == 1


def test_undamaged_is_used_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control of the test above: nothing is reported where nothing is wrong."""
    for number in (1, 2):
        save(tmp_path, number)
    current = tmp_path / checkpoint.NAME
    current.write_bytes(bytes(current.read_bytes()))
    assert epoch(tmp_path) == 2
    assert capsys.readouterr().err == ""


def test_both_damaged_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert epoch(tmp_path) is None
    assert capsys.readouterr().err.count("damaged checkpoint removed") == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_another_runs_is_refused_and_left_alone(tmp_path: Path, damaged: bool) -> None:
    for number in (1, 2):
        save(tmp_path, number, "theirs")
    if damaged:
        (tmp_path / checkpoint.NAME).write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint of another run \(theirs, not mine\).*remove the folder"):
        checkpoint.load(tmp_path, "mine")
    assert epoch(tmp_path, "theirs") == (1 if damaged else 2)


def test_half_written_is_never_looked_at_and_used_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / f".{checkpoint.NAME}.new"
    half.write_bytes(b"x" * 100_000)
    assert epoch(tmp_path) == 1
    save(tmp_path, 2)
    assert epoch(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.NAME, checkpoint.PREVIOUS}


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_dying_in_the_middle_of_saving_keeps_a_good_one(tmp_path: Path, call: str) -> None:
    """The process ends at the system call, as SIGKILL would end it."""
    for number in (1, 2):
        save(tmp_path, number)
    code = (
        "import os, sys, torch; from pathlib import Path; from mirepro import checkpoint\n"
        f"os.{call} = lambda *_: os._exit(9)\n"
        "checkpoint.save(Path(sys.argv[1]), 'mine', {'x': torch.full((5,), 3.0)}, {'epoch': 3})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ).returncode == 9
    assert epoch(tmp_path) == 2


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    """Many processes write the same file: it always is one of the contents, whole, and nothing is left beside it."""
    code = (
        "import sys; from pathlib import Path; from mirepro import files\n"
        "path, i = Path(sys.argv[1]), 0\n"
        "while i < 40 or not path.with_name('enough').exists():\n"
        "    i += 1; files.write_bytes(path, sys.argv[2].encode() * 300_000)"
    )
    path, enough, end = tmp_path / "file", tmp_path / "enough", time.monotonic() + 120
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 300_000
            assert len(set(content)) == 1
            seen.add(content[:1])
        if len(seen) > 1 or time.monotonic() > end:
            enough.touch()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(seen) > 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["enough", "file"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="free some disk space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
