"""ImageNet import: folders and the nested tars, parallel and resumed, give the same shards; damage is one line."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mirepro.data import imagenet, packing, shards
from mirepro.errors import UserError

NAMES = ["n01440764", "n02000000", "n15075141"]
SYNSETS = imagenet.SYNSETS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three classes: four training images (one of them for validation) and two test images each."""
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    monkeypatch.setattr(imagenet, "SYNSETS", hashlib.sha256("\n".join(NAMES).encode()).hexdigest())
    monkeypatch.setattr(imagenet, "COUNTS", {"train": 12, "val": 6})
    monkeypatch.setattr(imagenet, "PER_CLASS", {"train": (4, 4), "val": (2, 2)})
    monkeypatch.setattr(imagenet, "VAL", 1)


def jpeg(seed, width=50, height=40):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "folders"
    for c, name in enumerate(NAMES):
        for part, numbers in (("train", range(4)), ("val", range(2))):
            (root / part / name).mkdir(parents=True)
            for i in numbers:
                own = f"{name}_{i}" if part == "train" else f"ILSVRC2012_val_{2 * c + i + 1:08d}"
                (root / part / name / f"{own}.JPEG").write_bytes(jpeg(10 * c + i + (100 if part == "val" else 0)))
    return root


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def class_tar(folder, extra=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            add(tar, path.name, path.read_bytes())
        for name, content in extra:
            add(tar, name, content)
    return out.getvalue()


def kit(path, numbers):
    """A development kit: class i has the number 3 - i, and one inner node comes last."""
    rows = [(3 - i, name, "x", "x", 0) for i, name in enumerate(NAMES)] + [(9, "n00000009", "x", "x", 3)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    out = io.BytesIO()
    scipy.io.savemat(out, {"synsets": np.array(rows, kind)})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", out.getvalue())
        add(tar, f"ILSVRC2012_devkit_t12/data/{imagenet.TRUTH}", "".join(f"{n}\n" for n in numbers).encode())


@pytest.fixture
def tars(folders, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    with tarfile.open(root / imagenet.TARS["train"], "w") as tar:
        for name in NAMES:
            add(tar, f"{name}.tar", class_tar(folders / "train" / name))
    with tarfile.open(root / imagenet.TARS["val"], "w") as tar:
        for path in sorted((folders / "val").glob("*/*"), key=lambda p: p.name):
            add(tar, path.name, path.read_bytes())
    kit(root / imagenet.TARS["kit"], [3, 3, 2, 2, 1, 1])
    return root


def refused(source, target, match):
    with pytest.raises(UserError, match=match) as caught:
        imagenet.import_imagenet(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def manifest(folder):
    return (folder / "manifest.json").read_bytes()


def test_folders_keep_their_bytes(folders, tmp_path):
    counts = imagenet.import_imagenet(folders, tmp_path / "out", side=0)
    assert counts == {"train": {"images": 9}, "val": {"images": 3}, "test": {"images": 6}}
    train, val = shards.open(tmp_path / "out", "train"), shards.open(tmp_path / "out", "val")
    assert not set(train.keys) & set(val.keys)
    assert train.classes == NAMES
    for key, content, label in zip(train.keys, train.files, train.labels, strict=True):
        assert key.startswith(NAMES[label])
        assert bytes(content) == (folders / "train" / NAMES[label] / f"{key}.JPEG").read_bytes()


def test_squares_by_default(folders, tmp_path):
    imagenet.import_imagenet(folders, tmp_path / "out", side=24)
    images = shards.open(tmp_path / "out", "test").images()
    assert images.shape == (6, 3, 24, 24)
    with Image.open(folders / "val" / NAMES[0] / "ILSVRC2012_val_00000001.JPEG") as image:
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, (5, 0, 45, 40)))
    assert np.abs(images[0].transpose(1, 2, 0).astype(int) - expected).mean() < 12  # JPEG of noise
    stretched = np.asarray(Image.fromarray(expected).transpose(Image.Transpose.ROTATE_180))
    assert np.abs(images[0].transpose(1, 2, 0).astype(int) - stretched).mean() > 12  # control


def test_the_tars_give_the_same_shards(folders, tars, tmp_path):
    for side in (0, 24):
        imagenet.import_imagenet(folders, tmp_path / f"a{side}", side)
        imagenet.import_imagenet(tars, tmp_path / f"b{side}", side)
        assert manifest(tmp_path / f"a{side}") == manifest(tmp_path / f"b{side}")
    assert manifest(tmp_path / "a0") != manifest(tmp_path / "a24")


def test_the_index_finds_every_image(folders, tmp_path):
    imagenet.import_imagenet(folders, tmp_path / "out", side=0)
    lines = (tmp_path / "out/shards/train.index").read_text().splitlines()
    split = shards.open(tmp_path / "out", "train")
    for line, content in zip(lines, split.files, strict=True):
        name, offset, size, label, key = line.split("\t")
        file = (tmp_path / "out/shards" / name).read_bytes()
        assert file[int(offset) : int(offset) + int(size)] == bytes(content)
        assert key.startswith(NAMES[int(label)])


def packed(folders, target, **options):
    names = sorted(p.name for p in (folders / "train").iterdir())
    items = imagenet._labelled(names, imagenet._folders(folders / "train", "train"))
    return packing.pack(target, "x", {"train": items}, {"classes": names}, per_shard=5, **options)


def test_processes_and_a_resumed_import_change_nothing(folders, tmp_path, monkeypatch):
    packed(folders, tmp_path / "one")
    packed(folders, tmp_path / "many", jobs=3)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "many")
    write, written = packing.write_shard, []

    def killed(job, work):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.name)
        write(job, work)

    monkeypatch.setattr(packing, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        packed(folders, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    later = []
    monkeypatch.setattr(packing, "write_shard", lambda job, work: (later.append(job.name), write(job, work)))
    packed(folders, tmp_path / "again")
    assert (written, later) == (["train-0000.tar", "train-0001.tar"], ["train-0002.tar"])
    assert manifest(tmp_path / "again") == manifest(tmp_path / "one")
    shards.verify(tmp_path / "again")
    assert not list(tmp_path.glob(".*importing"))


def test_a_changed_image_is_not_taken_from_an_earlier_attempt(folders, tmp_path):
    victim = folders / "train" / NAMES[2] / f"{NAMES[2]}_3.JPEG"
    good = victim.read_bytes()
    victim.write_bytes(good[:300])
    with pytest.raises(UserError, match=r"n15075141_3\.JPEG: corrupt image"):
        packed(folders, tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()
    first = folders / "train" / NAMES[0] / f"{NAMES[0]}_0.JPEG"
    first.write_bytes(jpeg(77))
    victim.write_bytes(good)
    packed(folders, tmp_path / "out")
    assert bytes(shards.open(tmp_path / "out", "train").files[0]) == jpeg(77)


def test_a_failed_import_keeps_the_old_data(folders, tmp_path):
    imagenet.import_imagenet(folders, tmp_path / "out", 0)
    before = manifest(tmp_path / "out")
    (folders / "val" / NAMES[1] / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match="corrupt image"):
        imagenet.import_imagenet(folders, tmp_path / "out", 0)
    assert manifest(tmp_path / "out") == before
    shards.verify(tmp_path / "out")


def test_missing_and_foreign_files(folders, tmp_path):
    (folders / "train" / NAMES[1] / f"{NAMES[1]}_2.JPEG").unlink()
    refused(folders, tmp_path / "out", "train has 3 images of class n02000000, not 4 to 4")
    (folders / "train" / NAMES[1] / "notes.txt").write_text("x")
    refused(folders, tmp_path / "out", r"notes\.txt: not an image of ImageNet's train part")
    shutil.rmtree(folders / "train" / NAMES[1])
    refused(folders, tmp_path / "out", r"train has 2 classes \(n01440764 to n15075141\), not 3")
    (folders / "train" / NAMES[0]).rename(folders / "train" / "n01440763")
    (folders / "train" / "n01440764x").mkdir()
    refused(folders, tmp_path / "out", "n01440764x: not a class folder")


def test_wrong_total_and_wrong_classes(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(imagenet.COUNTS, "train", 13)
    refused(folders, tmp_path / "out", "train has 12 images, not 13")
    monkeypatch.setitem(imagenet.COUNTS, "train", 12)
    (folders / "train" / NAMES[0]).rename(folders / "train" / "n01440763")
    refused(folders, tmp_path / "out", r"\(n01440763 to n15075141\), not 3 \(n01440764 to n15075141\)")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_foreign_class_between_the_first_and_the_last(folders, tmp_path, part):
    (folders / part / NAMES[1]).rename(folders / part / "n02000001")
    for path in (folders / part / "n02000001").glob(f"{NAMES[1]}_*"):
        path.rename(path.with_name(path.name.replace(NAMES[1], "n02000001")))
    refused(folders, tmp_path / "out", f"{part}: the 3 WordNet ids are not those of ILSVRC 2012 .*; fetch the data")


def test_three_classes_are_not_imagenet(folders, tmp_path, monkeypatch):
    """Control of the fixture: it is what lets a miniature through."""
    monkeypatch.setattr(imagenet, "SYNSETS", SYNSETS)
    refused(folders, tmp_path / "out", "not 385e02404994")


def test_unknown_layout(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "neither train/<id>/")
    refused(tmp_path / "nothing", tmp_path / "out", "no such folder")


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "n01440764_9.txt"])
def test_a_member_cannot_lead_elsewhere(folders, tars, tmp_path, name):
    with tarfile.open(tars / imagenet.TARS["train"], "w") as tar:
        for one in NAMES:
            add(tar, f"{one}.tar", class_tar(folders / "train" / one, [(name, b"x")]))
    refused(tars, tmp_path / "out", r"img_train\.tar:n01440764\.tar: member .*(leads elsewhere|is no image)")


def test_a_link_is_refused(tars, tmp_path):
    with tarfile.open(tars / imagenet.TARS["val"], "a") as tar:
        info = tarfile.TarInfo("ILSVRC2012_val_00000007.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
    refused(tars, tmp_path / "out", "is a link or leads elsewhere")


def test_damaged_tars(tars, tmp_path):
    path = tars / imagenet.TARS["train"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(tars, tmp_path / "out", r"img_train\.tar.*(not a complete tar file|classes)")
    path.write_text("no tar")
    refused(tars, tmp_path / "out", r"img_train\.tar: not a complete tar file")
    path.write_bytes(content)
    kit(tars / imagenet.TARS["kit"], [3, 3, 2, 2, 1])
    refused(tars, tmp_path / "out", "6 images, but .* has 5 lines")
    kit(tars / imagenet.TARS["kit"], [3, 3, 2, 2, 1, 8])
    refused(tars, tmp_path / "out", "no class 8")
    (tars / imagenet.TARS["kit"]).write_text("no tar")
    refused(tars, tmp_path / "out", "not ImageNet's development kit")


def test_the_note_is_json_of_its_shard(folders, tmp_path):
    packed(folders, tmp_path / "out")
    part = json.loads(manifest(tmp_path / "out"))["splits"]["train"]
    assert [s["file"] for s in part["shards"]] == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert part["index"]["file"] == "train.index"
