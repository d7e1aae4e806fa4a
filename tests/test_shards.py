"""Shards: what was written comes back, equal bytes for equal samples, every damage is named."""

import io

import numpy as np
import pytest
from PIL import Image

from mirepro.data import compose, masks, shards
from mirepro.errors import UserError

META = {"title": "t", "classes": ["a", "b"], "categories": ["c"], "keypoints": {"names": [], "flips": [], "sigmas": []}}


def sample(i, size=(8, 6)):
    image = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    mask = np.zeros((size[1], size[0]), bool)
    mask[1:4, 2:6] = True
    one = {"bbox": [2, 1, 4, 3], "category": 0, "area": 12.0, "iscrowd": 0, "segmentation": masks.encode(mask),
           "keypoints": [2.0, 1.0, 2, 0, 0, 0]}  # fmt: skip
    return shards.Sample(f"{i:03d}", compose.ppm(image), ".ppm", i % 2, [one])


def write(folder, n=5):
    return shards.write(folder, "tiny", {"train": (sample(i) for i in range(n)), "test": [sample(9)]}, META)


def test_round_trip(tmp_path):
    write(tmp_path)
    split = shards.open(tmp_path, "train")
    assert split.size == len(split) == 5
    assert split.labels.tolist() == [0, 1, 0, 1, 0]
    assert split.images().shape == (5, 3, 6, 8)
    assert split.images()[3].transpose(1, 2, 0).tobytes() == sample(3).image[-6 * 8 * 3 :]
    assert split.objects[2] == sample(2).objects
    assert split.classes == ["a", "b"]


def test_equal_samples_give_equal_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")
    assert write(tmp_path / "c", 4) != write(tmp_path / "a")


def test_resizing_moves_boxes_masks_and_keypoints_along(tmp_path):
    write(tmp_path)
    split = shards.open(tmp_path, "test")
    assert split.images(16).shape == (1, 3, 16, 16)
    one = split.objects_at(16)[0][0]
    assert one["bbox"] == pytest.approx([4, 16 / 6, 8, 8])
    assert one["keypoints"][:3] == pytest.approx([4, 16 / 6, 2])
    rows, columns = np.nonzero(masks.decode(one["segmentation"], 16, 16))
    assert (columns.min(), columns.max()) == (4, 11)
    assert (rows.min(), rows.max()) == (3, 10)


def test_a_new_writing_replaces_the_old_and_leaves_nothing_behind(tmp_path):
    write(tmp_path)
    (tmp_path / ".shards-killed").mkdir()
    write(tmp_path, 3)
    assert shards.open(tmp_path, "train").size == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "shards"]


def test_an_interrupted_writing_leaves_the_old_data(tmp_path):
    def broken():
        yield sample(0)
        raise KeyboardInterrupt

    write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path, "tiny", {"train": broken()}, META)
    assert shards.open(tmp_path, "train").size == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "shards"]


def test_shards_are_cut_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    manifest = write(tmp_path)
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert shards.open(tmp_path, "train").keys == [f"{i:03d}" for i in range(5)]


def test_one_changed_byte_is_found(tmp_path):
    write(tmp_path)
    shards.verify(tmp_path)
    path = tmp_path / "shards" / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-000\.tar: sha256 differs"):
        shards.verify(tmp_path)
    with pytest.raises(UserError, match=r"train-000\.tar"):
        shards.open(tmp_path, "train")
    shards.open(tmp_path, "test")
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        shards.verify(tmp_path)


def test_a_foreign_or_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        shards.verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a data manifest"):
        shards.verify(tmp_path)


def test_images_of_several_sizes_need_a_size(tmp_path):
    shards.write(tmp_path, "tiny", {"train": [sample(0), sample(1, (9, 9))]}, META)
    split = shards.open(tmp_path, "train")
    with pytest.raises(UserError, match="give a size"):
        split.images()
    assert split.images(12).shape == (2, 3, 12, 12)
    assert split.shapes.tolist() == [[6, 8], [9, 9]]


def test_other_image_formats_are_read(tmp_path):
    file = io.BytesIO()
    Image.new("L", (5, 4), 77).save(file, "PNG")
    shards.write(tmp_path, "tiny", {"train": [shards.Sample("x", file.getvalue(), ".png", None)]}, META)
    split = shards.open(tmp_path, "train")
    assert (split.images() == 77).all()
    assert split.labels.tolist() == [-1]
    assert split.masks(0).shape == (0, 4, 5)
