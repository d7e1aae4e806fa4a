"""Full disk and read-only folders, with real file systems: one line, nothing half-written, a rerun goes on."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import until
from miniature import Miniature

from mirepro import checkpoint, execution, files, pretrain
from mirepro.errors import UserError
from tests.copied import lacking
from tests.test_pretrain import bytes_of, data, run, train

__all__ = ["data"]


@pytest.fixture
def small(tmp_path: Path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        lacking("root, and the right to mount a tmpfs")
    yield folder
    # The last processes of a command may still be about to leave.
    until(lambda: subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0, 60, "unmounting")


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_right_is_a_failure_where_everything_is_required(
    monkeypatch: pytest.MonkeyPatch, required: str, outcome: type[BaseException]
):
    monkeypatch.setenv("MIREPRO_REQUIRE_INFRA", required)
    with pytest.raises(outcome, match="needs the right to mount"):
        lacking("the right to mount")


def test_a_full_disk_is_one_line_and_keeps_the_old_file(small: Path):
    path = small / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(UserError, match=r"result\.json: cannot write \(No space left.*free some disk space"):
        files.write_bytes(path, b"x" * 2_000_000)
    assert files.read_json(path) == {"a": 1}
    assert [item.name for item in small.iterdir()] == ["result.json"]
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}


def test_a_read_only_folder_is_one_line(small: Path):
    files.write_json(small / "result.json", {"a": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(UserError, match="read-only; use another folder"):
        files.write_json(small / "result.json", {"a": 2})
    assert files.read_json(small / "result.json") == {"a": 1}


def everything(miniature: Miniature) -> dict[str, str]:
    """Digests of all results of a miniature."""
    names = ("runs", "metrics", "tables", "reports", "locks")
    found = [path for name in names for path in (miniature.root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(miniature.root)): files.sha256(path) for path in found}


@pytest.mark.slow
def test_a_reproduction_on_a_full_disk_says_so_and_goes_on(root: Path, small: Path, tmp_path: Path):
    """Free space from nothing to enough for some stages; the control is a disk that is large enough."""
    large = Miniature(root, tmp_path / "large")
    assert large.run("repro", "--jobs", "2").returncode == 0
    subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
    full = Miniature(root, small / "repo")
    lines = []
    for free in (0, 60_000, 200_000):
        disk = os.statvfs(small)
        (small / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize - free))
        result = full.run("repro", "--jobs", "2")
        assert result.returncode in (1, 2)
        assert "Traceback" not in result.stderr
        lines.append(result.stderr.splitlines())
        assert "free some disk space and run the command again" in result.stderr
        (small / "filler").unlink()
    assert sum("done in" in line for line in lines[2]) > sum("done in" in line for line in lines[0]) == 0
    assert full.run("repro", "--jobs", "2").returncode == 0
    assert everything(full) == everything(large)
    assert not list((full.root / ".mirepro" / "work").iterdir())


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_run_whose_checkpoint_cannot_be_written_goes_on_from_the_one_before(
    small: Path, data: Path, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
):
    whole = bytes_of(train(run(), data, tmp_path / "whole"))
    monkeypatch.setattr(checkpoint, "BETWEEN_SECONDS", -1.0)
    original, begun = pretrain.Trainer.begin, []

    def begin(trainer: pretrain.Trainer, epoch: int) -> None:
        original(trainer, epoch)
        begun.append(epoch)
        if begun == [0, 1]:
            spoil(small, trouble)

    monkeypatch.setattr(pretrain.Trainer, "begin", begin)

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        return pretrain.pretrain(run(), data, small, out, fingerprint)  # checkpoints have a disk of their own

    job, root = execution.Job({}, (), compute, "metrics/a.json", "runs/a"), tmp_path / "root"
    message = {"full": "No space left.*free some disk space", "read-only": "read-only; use another folder"}[trouble]
    with pytest.raises(UserError, match=rf"checkpoint.*safetensors: cannot write \(.*{message}"):
        execution.execute(root, "a", job)
    assert not (root / "runs").exists()
    repair(small, trouble)
    execution.execute(root, "a", job)
    assert begun == [0, 1, 1, 2], "the first epoch was saved"
    assert bytes_of(root / "runs" / "a") == whole


def spoil(folder: Path, trouble: str) -> None:
    """Leaves no byte in a file system, or forbids writing."""
    if trouble == "full":
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def repair(folder: Path, trouble: str) -> None:
    """Undoes `spoil`."""
    if trouble == "full":
        (folder / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def test_an_import_onto_a_full_disk_leaves_nothing(small: Path, tmp_path: Path):
    from PIL import Image

    for split, count in (("train", 3), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((32, 32), 100).convert("RGB").save(folder / f"{i}.jpg")
    (small / "filler").write_bytes(b"x" * 1_020_000)
    program = (
        "import sys\nfrom mirepro.data import cifar\nfrom mirepro.errors import UserError\n"
        "cifar.COUNTS, cifar.VAL = {'train': 3, 'test': 3}, 1\n"
        "cifar.CLASSES = ('cat', 'dog')\n"
        "try:\n    cifar.import_cifar10(sys.argv[1], sys.argv[2])\n"
        "except UserError as error:\n    sys.exit(str(error))\n"
    )
    target = small / "data"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "source"), str(target)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (target / "manifest.json").exists()
