"""CIFAR-100 and STL-10 import: pixels and labels arrive, every damage is one line and leaves nothing."""

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from mirepro.data import cifar as cifar10
from mirepro.data import cifar100, shards, stl10
from mirepro.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three training images of every class (one for validation); one or two test images."""
    monkeypatch.setattr(cifar100, "COUNTS", {"train": 3, "test": 1})
    monkeypatch.setattr(cifar100, "VAL", 1)
    monkeypatch.setattr(stl10, "COUNTS", {"train": 30, "test": 20, "unlabeled": 7})
    monkeypatch.setattr(stl10, "VAL", 1)


def refused(importer, source, target, match):
    with pytest.raises(UserError, match=match) as caught:
        importer(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def cifar(tmp_path):
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    for part, each in cifar100.COUNTS.items():
        labels = [c for _ in range(each) for c in range(100)]
        content = {b"data": np.stack([noise(1000 * c + i, 3072) for i, c in enumerate(labels)]),
                   b"fine_labels": labels, b"coarse_labels": [c // 5 for c in labels]}  # fmt: skip
        (root / part).write_bytes(pickle.dumps(content, 2))
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": [f"c{i:02d}".encode() for i in range(100)]}, 2))
    return root


def change(path, **values):
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content | {k.encode(): v for k, v in values.items()}, 2))


def test_cifar100(cifar, tmp_path):
    counts = cifar100.import_cifar100(cifar, tmp_path / "out")
    assert counts == {"train": {"images": 200}, "val": {"images": 100}, "test": {"images": 100}}
    train, val = (shards.open(tmp_path / "out", s) for s in ("train", "val"))
    assert set(np.bincount(train.labels)) == {2}
    assert set(np.bincount(val.labels)) == {1}
    assert not set(train.keys) & set(val.keys)
    assert train.classes[7] == "c07"
    label, place = (int(x) for x in train.keys[5].split("-"))
    expected = noise(1000 * label + 100 * place + label, 3072).reshape(3, 32, 32)
    assert np.array_equal(train.images()[5], expected)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(cifar, cifar.name)
    cifar100.import_cifar100(tmp_path / "c.tar.gz", tmp_path / "b")
    assert (tmp_path / "b/manifest.json").read_bytes() == (tmp_path / "out/manifest.json").read_bytes()


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (shutil.copyfile, (self.path, self.path + ".copy"))


def test_cifar100_is_not_taken_for_cifar10(cifar, tmp_path):
    refused(cifar10.import_cifar10, cifar, tmp_path / "out", r"as in CIFAR-100; `mirepro data import cifar100`")


def test_damaged_cifar100(cifar, tmp_path):
    out, run = tmp_path / "out", cifar100.import_cifar100
    original = (cifar / "train").read_bytes()
    labels = pickle.loads(original)[b"fine_labels"]
    change(cifar / "train", fine_labels=[1, *labels[1:]])
    refused(run, cifar, out, "train: 2 images of class 0, not 3")
    change(cifar / "train", fine_labels=[100, *labels[1:]])
    refused(run, cifar, out, "train: not 3072 bytes and a fine label")
    (cifar / "train").write_bytes(original[:500])
    refused(run, cifar, out, "train: not a file of CIFAR-100")
    victim = tmp_path / "victim"
    victim.write_text("x")
    (cifar / "train").write_bytes(pickle.dumps(Attack(str(victim))))
    refused(run, cifar, out, "asks for shutil.copyfile")
    assert not (tmp_path / "victim.copy").exists()
    pickle.loads((cifar / "train").read_bytes())  # control: an ordinary unpickler runs it
    assert (tmp_path / "victim.copy").exists()
    (cifar / "train").write_bytes(original)
    change(cifar / "meta", fine_label_names=[b"x"] * 100)
    refused(run, cifar, out, "meta: 100 fine_label_names, not 100 different ones")
    (cifar / "meta").unlink()
    refused(run, cifar, out, "no files train, test and meta")


@pytest.fixture
def stl(tmp_path):
    root = tmp_path / "stl10_binary"
    root.mkdir()
    for part, count in stl10.COUNTS.items():
        noise(count, count, 3, 96, 96).tofile(root / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(root / f"{part}_y.bin")
    (root / "class_names.txt").write_text("\n".join(stl10.CLASSES) + "\n")
    return root


def test_stl10(stl, tmp_path):
    counts = stl10.import_stl10(stl, tmp_path / "out")
    assert [c["images"] for c in counts.values()] == [20, 10, 20, 7]
    test, free = (shards.open(tmp_path / "out", s) for s in ("test", "unlabelled"))
    assert test.labels[:3].tolist() == [0, 1, 2]
    assert set(free.labels) == {-1}
    raw = noise(20, 20, 3, 96, 96)  # channel, column, row
    image = test.image(4)
    assert image[2, 10, 30] == raw[4, 2, 30, 10]
    assert np.array_equal(image, raw[4].transpose(0, 2, 1))
    assert not np.array_equal(image, raw[4])  # control: the file's order is not ours
    train, val = (shards.open(tmp_path / "out", s) for s in ("train", "val"))
    assert sorted([*train.keys, *val.keys]) == [f"{i:06d}" for i in range(30)]
    assert set(np.bincount(val.labels)) == {1}


def test_damaged_stl10(stl, tmp_path):
    out, run = tmp_path / "out", stl10.import_stl10
    path = stl / "unlabeled_X.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(run, stl, out, r"unlabeled_X\.bin: 193535 bytes, not 193536")
    path.unlink()
    refused(run, stl, out, r"unlabeled_X\.bin: missing")
    path.write_bytes(content)
    labels = np.fromfile(stl / "train_y.bin", np.uint8)
    for value, match in ((11, "a label is not 1 to 10"), (2, "2 images of class airplane, not 3")):
        np.concatenate([[np.uint8(value)], labels[1:]]).astype(np.uint8).tofile(stl / "train_y.bin")
        refused(run, stl, out, match)
    labels.tofile(stl / "train_y.bin")
    (stl / "class_names.txt").write_text("cat dog")
    refused(run, stl, out, "classes cat, dog; not those of STL-10")
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", out, r"no train_X\.bin")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("../evil")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    refused(run, tmp_path / "s.tar", out, "evil' leads out of the archive")
