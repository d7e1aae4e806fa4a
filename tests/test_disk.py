"""Full disk and read-only folders, with real file systems: one line, nothing half-written, a rerun goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirepro import files
from mirepro.errors import UserError


@pytest.fixture
def small(tmp_path: Path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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
