"""CIFAR-10 import: both layouts and tars of them; every damage is one line that names the file, and leaves nothing."""

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from mirepro.data import cifar, shards
from mirepro.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Five training (two of them for validation) and two test images per class."""
    monkeypatch.setattr(cifar, "COUNTS", {"train": 5, "test": 2})
    monkeypatch.setattr(cifar, "VAL", 2)


def pixels(label, i):
    return np.random.default_rng(100 * label + i).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "source"
    for part, count in cifar.COUNTS.items():
        for label, name in enumerate(cifar.CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels(label, i)).save(root / part / name / f"{i:04d}.jpg")
    return root


@pytest.fixture
def pickles(tmp_path):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    rows = [(pixels(c, i).transpose(2, 0, 1).ravel(), c) for i in range(5) for c in range(10)]
    for part, names in cifar.PICKLES.items():
        for j, name in enumerate(names):
            own = rows[10 * j : 10 * j + 10] if part == "train" else rows[:20]
            batch = {b"data": np.stack([r for r, _ in own]), b"labels": [c for _, c in own], b"batch_label": b"x"}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def packed(folder, mode="w"):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, mode) as tar:
        tar.add(folder, folder.name)
    return path


def refused(source, target, match):
    with pytest.raises(UserError, match=match) as caught:
        cifar.import_cifar10(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def test_class_folders(folders, tmp_path):
    counts = cifar.import_cifar10(folders, tmp_path / "out")
    assert counts == {"train": {"images": 30}, "val": {"images": 20}, "test": {"images": 20}}
    train, val = shards.open(tmp_path / "out", "train"), shards.open(tmp_path / "out", "val")
    assert not set(train.keys) & set(val.keys)
    assert set(np.bincount(val.labels)) == {2}
    assert train.classes == list(cifar.CLASSES)
    name, number = train.keys[0].split("-")
    assert bytes(train.files[0]) == (folders / "train" / name / f"{int(number):04d}.jpg").read_bytes()


def test_original_pickles_keep_their_pixels(pickles, tmp_path):
    cifar.import_cifar10(pickles, tmp_path / "out")
    for split in (shards.open(tmp_path / "out", s) for s in ("train", "val", "test")):
        for key, image, label in zip(split.keys, split.images(), split.labels, strict=True):
            assert np.array_equal(image.transpose(1, 2, 0), pixels(label, int(key.split("-")[1])))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("layout", ["folders", "pickles"])
def test_a_tar_of_either_gives_the_same_shards(layout, mode, tmp_path, request):
    source = request.getfixturevalue(layout)
    cifar.import_cifar10(source, tmp_path / "a")
    cifar.import_cifar10(packed(source, mode), tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_a_failed_import_keeps_the_old_data(folders, tmp_path):
    cifar.import_cifar10(folders, tmp_path / "out")
    (folders / "test/truck/0001.jpg").unlink()
    with pytest.raises(UserError, match="1 images of class truck, not 2"):
        cifar.import_cifar10(folders, tmp_path / "out")
    assert shards.open(tmp_path / "out", "train").size == 30


def test_missing_image(folders, tmp_path):
    (folders / "train/frog/0003.jpg").unlink()
    refused(folders, tmp_path / "out", "source/train: 4 images of class frog, not 5")


def test_corrupt_image(folders, tmp_path):
    path = folders / "train/frog/0003.jpg"
    path.write_bytes(path.read_bytes()[:300])
    refused(folders, tmp_path / "out", r"train/frog/0003\.jpg: corrupt image")
    refused(packed(folders), tmp_path / "out", r"source\.tar:source/train/frog/0003\.jpg: corrupt image")
    path.write_text("no image")
    refused(folders, tmp_path / "out", r"train/frog/0003\.jpg: corrupt image")


def test_wrong_size(folders, tmp_path):
    Image.new("RGB", (30, 32)).save(folders / "test/dog/0000.jpg")
    refused(folders, tmp_path / "out", r"test/dog/0000\.jpg: 30 x 32 pixels")


def test_wrong_classes(folders, tmp_path):
    (folders / "train/frog").rename(folders / "train/toad")
    refused(folders, tmp_path / "out", "class folders: frog, toad")


def test_unknown_layout(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "neither train/")
    refused(tmp_path / "nothing", tmp_path / "out", "no such file or folder")


def test_missing_and_damaged_pickles(pickles, tmp_path):
    content = (pickles / "data_batch_3").read_bytes()
    (pickles / "data_batch_3").write_bytes(content[:1000])
    refused(pickles, tmp_path / "out", "data_batch_3: not a CIFAR-10 batch")
    (pickles / "data_batch_3").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}))
    refused(pickles, tmp_path / "out", "data_batch_3: not 3072 bytes")
    (pickles / "data_batch_3").unlink()
    refused(pickles, tmp_path / "out", "data_batch_3: missing")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (shutil.copyfile, (self.path, self.path + ".copy"))


def test_a_pickle_cannot_run_anything(pickles, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("x")
    (pickles / "data_batch_1").write_bytes(pickle.dumps(Attack(str(victim))))
    refused(pickles, tmp_path / "out", "data_batch_1: not a CIFAR-10 batch .*asks for shutil.copyfile")
    assert not (tmp_path / "victim.copy").exists()
    pickle.loads(pickle.dumps(Attack(str(victim))))  # control: an ordinary unpickler runs it
    assert (tmp_path / "victim.copy").exists()


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil/evil.jpg"])
def test_a_tar_member_cannot_escape(folders, tmp_path, name):
    path = packed(folders)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    refused(path, tmp_path / "out", "evil.jpg' leads out of the archive")
    assert not (tmp_path.parent / "evil.jpg").exists()


def test_a_link_in_a_tar_is_refused(folders, tmp_path):
    (folders / "train/frog/0000.jpg").unlink()
    (folders / "train/frog/0000.jpg").symlink_to("/etc/hostname")
    refused(packed(folders), tmp_path / "out", r"0000\.jpg' is a link or a device")


def test_damaged_tars(folders, tmp_path):
    path = packed(folders, "w:gz")
    path.write_bytes(path.read_bytes()[:-4000])
    refused(path, tmp_path / "out", r"source\.tar: not a complete tar file")
    path.write_text("no tar")
    refused(path, tmp_path / "out", r"source\.tar: not a complete tar file")
