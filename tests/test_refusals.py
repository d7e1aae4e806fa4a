"""What `mirepro` refuses, as processes in a copy of the repository: one line, no traceback, nothing left behind."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

from mirepro import cli
from mirepro.data import shards
from tests.copied import Copy, bound
from tests.test_cifar import folders, packed, small
from tests.test_coco import edited, source

__all__ = ["folders", "small", "source"]

Z = {"normaliser": "lemniscate"}
WIDE = {"encoder": {"dim": 128}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"epochs": 3}, "params.yaml: epochs: unknown key; known: profile, params,"),
    "mistyped key": ({"pretrain": {"epoch": 3}}, "pretrain.epoch: unknown key; known: bank_shards, batch, data, "
                     "device, digest, encoder, epochs,"),
    "mistyped option": ({"rows": {"ball": {"options": {"outr": 0.1}}}}, "rows.ball: objective ball.outr: unknown key"),
    "wrong type": ({"pretrain": {"batch": "many"}}, "pretrain.batch: expected int, got 'many'"),
    "u = 0": ({"rows": {"ball": {"options": {"outer": 0}}}}, "rows.ball: objective Ball.outer: 0.0 is impossible"),
    "l = 1": ({"rows": {"ring": {"options": {"inner": 1}}}}, "rows.ring: objective Ring.inner: 1.0 is impossible"),
    "batch": ({"pretrain": {"batch": 3073}}, "pretrain.batch: 3073 is impossible; use between 1 and the 3072"),
    "constant Z": ({"rows": {"ir_nce": {"options": Z | {"tau": 0.1}, "pretrain": WIDE}}},
                   "rows.ir_nce: objective IrNce.normaliser: 'lemniscate' is impossible; use 'first_batch': the "
                   "constant needs dim 128 and tau 0.07, not 128, 0.1"),
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "largest batch": {"pretrain": {"batch": 3072}},
    "constant Z of its temperature": {"rows": {"ir_nce": {"options": Z | {"tau": 0.07}, "pretrain": WIDE}}},
    "as it is": {},
}
READERS = {"check": ["data", "check"], "stage": ["stage", "data"]}
TRAIN = ["stage", "pretrain", "ir-s0"]


def said(result: CompletedProcess[str]) -> str:
    """The one line of a command that refused something."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("mirepro: ")
    return result.stderr


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """No test leaves a change in it."""
    return Copy(root, tmp_path_factory.mktemp("copy") / "repository")


def imported(folder: Path, damaged: bool) -> None:
    """A data set with a manifest; damage is one bit of its shard."""
    images = [shards.Sample(f"{i:03d}", bytes(99), ".ppm", i) for i in range(9)]
    shards.write(folder, folder.name, {"train": images}, {"classes": []})
    path = folder / "shards" / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= damaged
    path.write_bytes(content)


@pytest.fixture(scope="module")
def commands(copy: Copy) -> dict[str, CompletedProcess[str]]:
    """`mirepro stage code` with every change of the parameters, and what reads a data set, sound or flipped."""
    changes = {name: change for name, (change, _) in BAD.items()} | GOOD
    cases = {name: (copy.changed(change), ["stage", "code"]) for name, change in changes.items()}
    for data in ("sound", "flipped"):
        imported(copy.root / "data" / data, data == "flipped")
        text = copy.changed({"datasets": ["desk", "scenes", data], "pretrain": {"data": data}})
        cases |= {f"{data}: {name}": (text, [*words, data]) for name, words in READERS.items()}
    cases["flipped: train"] = (text, TRAIN)
    done = copy.fork(cases)
    (copy.root / "params.yaml").write_text(cases["as it is"][0])  # accepted by now: other tests need no torch
    return done


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(commands: dict[str, CompletedProcess[str]], name: str) -> None:
    assert BAD[name][1] in said(commands[name])


@pytest.mark.parametrize("name", GOOD)
def test_control_good_parameters(commands: dict[str, CompletedProcess[str]], name: str) -> None:
    assert (commands[name].returncode, commands[name].stderr) == (0, "")


def test_a_process_of_python_says_the_same(copy: Copy, commands: dict[str, CompletedProcess[str]]) -> None:
    path = copy.root / "params.yaml"
    before = path.read_text()
    path.write_text(copy.changed(BAD["mistyped key"][0]))
    alone, fork = copy.run("stage", "code"), commands["mistyped key"]
    path.write_text(before)
    assert (alone.returncode, alone.stdout, alone.stderr) == (fork.returncode, fork.stdout, fork.stderr)


@pytest.mark.parametrize("name", [*READERS, "train"])
def test_a_flipped_bit_in_a_shard(copy: Copy, commands: dict[str, CompletedProcess[str]], name: str) -> None:
    assert "data/flipped/shards/train-000.tar: sha256 differs from" in said(commands[f"flipped: {name}"])
    assert sorted(path.name for path in (copy.root / "runs").rglob("*.json")) == ["sound.json"]


@pytest.mark.parametrize("name", READERS)
def test_control_sound_shards(commands: dict[str, CompletedProcess[str]], name: str) -> None:
    assert commands[f"sound: {name}"].returncode == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [("stage code", "locks/desk/"), ("repro toy", ".mirepro"), ("stage data desk", "data/desk")],
)
def test_a_read_only_folder(copy: Copy, arguments: str, name: str) -> None:
    (copy.root / ".mirepro" / "waves.lock").unlink(missing_ok=True)
    with copy.read_only() as before:
        line = said(copy.run(*arguments.split(), before=before))
    assert f"{copy.root}/{name}" in line
    assert "cannot write (Permission denied); make the folder writable" in line


@contextmanager
def allowed(path: Path, permissions: int) -> Iterator[None]:
    """Other permissions for a while."""
    mode = path.stat().st_mode
    path.chmod(permissions)
    try:
        yield
    finally:
        path.chmod(mode)


def test_what_no_writer_guards_is_one_line_too(copy: Copy) -> None:
    """A receipt that has to go, and a file that may not be read; the control is the same command afterwards."""
    receipt = copy.root / "runs/desk/data/desk.json"
    receipt.parent.mkdir(parents=True, exist_ok=True)
    receipt.touch()
    told = "Permission denied; check that it is there and that you may read and write it\n"
    with allowed(receipt.parent, 0o555):
        assert said(copy.run("stage", "code", before=bound())) == f"mirepro: {receipt}: {told}"
    assert receipt.exists()
    parameters = copy.root / "params.yaml"
    with allowed(parameters, 0o000):
        assert said(copy.run("stage", "code", before=bound())) == f"mirepro: {parameters}: {told}"
    assert copy.run("stage", "code", before=bound()).returncode == 0
    assert not receipt.exists()


@pytest.mark.parametrize("bug", [KeyError("x"), OSError("nothing is named"), OSError(errno.EBADF, "Bad descriptor")])
def test_control_a_bug_stays_a_traceback(monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    monkeypatch.setattr(cli, "app", Mock(side_effect=bug))
    with pytest.raises(type(bug)) as caught:
        cli.main()
    assert caught.value is bug


def left(copy: Copy) -> list[str]:
    """What an import may not leave behind."""
    return sorted(path.name for path in (copy.root / "data").iterdir() if path.name not in ("desk", "scenes"))


@pytest.mark.parametrize("wrap", [None, packed], ids=["folder", "tar"])
def test_import_of_damaged_annotations(copy: Copy, source: Path, wrap: Callable[[Path], Path] | None) -> None:
    edited(source, lambda content: content["annotations"][0].update(bbox=None))
    before = left(copy)
    line = said(copy.run("data", "import", "coco", str(wrap(source) if wrap else source)))
    assert "annotations/instances_train2017.json: annotation 2: bbox: null is not [x, y, width, height]" in line
    assert left(copy) == before


def test_import_says_when_the_manifest_changes(copy: Copy, source: Path) -> None:
    """The control of the test before: sound data are imported, and their counts are printed."""
    line = said(copy.run("data", "import", "coco", str(source)))
    assert "instances_train2017.json: 3 images, not 118287; fetch it again, or import" in line
    first, again = (copy.run("data", "import", "coco_mini", str(source)) for _ in range(2))
    picture = source / "val2017" / "000000000011.jpg"
    Image.new("RGB", (40, 30)).save(picture)
    other = copy.run("data", "import", "coco_mini", str(source))
    shutil.rmtree(copy.root / "data" / "coco_mini")
    lines = first.stdout.splitlines()
    assert lines[2] == "test: 3 images, 3 objects, 1 crowd, 1 keypoints, 1 dropped"
    assert [line.split()[:3] for line in lines[:2]] == [["train:", "2", "images,"], ["val:", "1", "images,"]]
    assert again.stdout == first.stdout
    notice = f"{copy.root}/data/coco_mini/manifest.json: differs from the one before; results of that data are stale"
    assert other.stdout.splitlines()[:3] == lines
    assert other.stdout.splitlines()[3].startswith(notice)
    assert [done.returncode for done in (first, again, other)] == [0, 0, 0]
    assert [done.stderr for done in (first, again, other)] == ["", "", ""]


@pytest.fixture
def reduced(copy: Copy) -> Iterator[Copy]:
    """CIFAR-10 has five training and two test images of every class here."""
    path = copy.root / "mirepro/data/cifar.py"
    before = path.read_text()
    counts = {'"train": 5000, "test": 1000': '"train": 5, "test": 2', "\nVAL = 500\n": "\nVAL = 2\n"}
    for old, new in counts.items():
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    yield copy
    path.write_text(before)


def test_import_of_other_counts(copy: Copy, folders: Path) -> None:
    before = left(copy)
    line = said(copy.run("data", "import", "cifar10", str(folders)))
    assert f"{folders}/train: 5 images of class airplane, not 5000; complete the data" in line
    assert left(copy) == before


@pytest.mark.parametrize("wrap", [None, packed], ids=["folder", "tar"])
def test_import_of_a_damaged_image(reduced: Copy, folders: Path, wrap: Callable[[Path], Path] | None) -> None:
    path = folders / "train/frog/0003.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:300])
    before = left(reduced)
    line = said(reduced.run("data", "import", "cifar10", str(wrap(folders) if wrap else folders)))
    assert "train/frog/0003.jpg: corrupt image" in line
    assert left(reduced) == before
    path.write_bytes(content)  # the control
    done = reduced.run("data", "import", "cifar10", str(wrap(folders) if wrap else folders))
    shutil.rmtree(reduced.root / "data" / "cifar10")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "train: 30 images\nval: 20 images\ntest: 20 images\n"


def test_import_of_nothing(copy: Copy, tmp_path: Path) -> None:
    assert "'coca' is unknown; known: cifar10," in said(copy.run("data", "import", "coca", str(tmp_path)))
    assert "no such file or folder" in said(copy.run("data", "import", "coco", str(tmp_path / "nowhere")))
