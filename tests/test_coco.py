"""COCO import: boxes, masks and keypoints arrive unchanged; every damage is one line that names the file."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mirepro.data import coco, shards
from mirepro.errors import UserError

POINTS = ["nose", "left_eye", "right_eye"]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def annotation(number, image, category, box, segmentation=None):
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": 0,
            "segmentation": segmentation or polygon}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for first, name in ((1, "train2017"), (11, "val2017")):
        (root / name).mkdir()
        images = [{"id": first + i, "file_name": f"{first + i:012d}.jpg", "width": 40, "height": 30} for i in range(3)]
        for image in images:
            noise = np.random.default_rng(image["id"]).integers(0, 256, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(noise).save(root / name / image["file_name"])
        crowd = {**annotation(4, first, 18, [0, 0, 10, 30], {"size": [30, 40], "counts": [0, 300, 900]}), "iscrowd": 1}
        person = annotation(3, first + 1, 1, [5, 6, 20, 12])
        found = [annotation(2, first, 18, [0, 0, 40, 30]), person, crowd, annotation(9, first, 18, [3, 3, 0, 4])]
        write(root, "instances", name, {"images": images, "annotations": found, "categories": CATEGORIES})
        person = {**person, "keypoints": [8, 9, 2, 7, 8, 1, 0, 0, 0], "num_keypoints": 2}
        categories = [{**CATEGORIES[1], "keypoints": POINTS}]
        write(root, "person_keypoints", name, {"images": images, "annotations": [person], "categories": categories})
    return root


def write(root, kind, name, content):
    (root / "annotations" / f"{kind}_{name}.json").write_text(json.dumps(content))


def edited(root, change, kind="instances", name="train2017"):
    """Changes one annotation file in place."""
    content = json.loads((root / "annotations" / f"{kind}_{name}.json").read_text())
    change(content)
    write(root, kind, name, content)


def refused(source, target, match):
    with pytest.raises(UserError, match=match) as caught:
        coco.import_coco(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def test_import(source, tmp_path):
    counts = coco.import_coco(source, tmp_path / "out")
    assert counts["test"] == {"images": 3, "objects": 3, "crowd": 1, "keypoints": 1, "dropped": 1}
    assert [counts[split]["images"] for split in ("train", "val")] == [2, 1]
    keys = [shards.open(tmp_path / "out", split).keys for split in ("train", "val", "test")]
    assert len({key for part in keys for key in part}) == 6
    split = shards.open(tmp_path / "out", "test")
    assert bytes(split.files[1]) == (source / "val2017" / "000000000012.jpg").read_bytes()
    assert split.categories == ["person", "dog"]
    assert split.keypoints["flips"] == [0, 2, 1]
    dog, crowd = split.objects[0]
    assert (dog["category"], dog["bbox"], dog["keypoints"]) == (1, [0, 0, 40, 30], [])
    assert crowd["iscrowd"] == 1
    assert split.masks(0)[1].sum() == 300
    assert split.masks(1)[0].sum() == 240
    assert split.objects[1][0]["keypoints"] == [8, 9, 2, 7, 8, 1, 0, 0, 0]
    assert split.objects[2] == []


def test_scaling(source, tmp_path):
    coco.import_coco(source, tmp_path / "out")
    split = shards.open(tmp_path / "out", "test")
    assert split.images(60).shape == (3, 3, 60, 60)
    one = split.objects_at(60)[1][0]
    assert one["bbox"] == pytest.approx([7.5, 12, 30, 24])
    assert one["area"] == pytest.approx(720)
    assert one["keypoints"][:3] == pytest.approx([12, 18, 2])


def test_a_tar_gives_the_same_shards(source, tmp_path):
    with tarfile.open(tmp_path / "coco.tar", "w") as tar:
        tar.add(source, ".")
    coco.import_coco(source, tmp_path / "a")
    coco.import_coco(tmp_path / "coco.tar", tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_missing_and_corrupt_images(source, tmp_path):
    path = source / "val2017" / "000000000012.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(source, tmp_path / "out", r"val2017/000000000012\.jpg: corrupt image")
    path.unlink()
    refused(source, tmp_path / "out", r"val2017/000000000012\.jpg: missing")
    Image.new("RGB", (41, 30)).save(path)
    refused(source, tmp_path / "out", r"000000000012\.jpg: 41 x 30 pixels; instances_val2017\.json says 40 x 30")


@pytest.mark.parametrize("box", [[30, 3, 12, 4], [-3, 3, 5, 4], [3, 3, 5, -1], [3, 28, 5, 4], [float("nan"), 3, 5, 4]])
def test_a_box_outside_its_image(source, tmp_path, box):
    edited(source, lambda c: c["annotations"][0].update(bbox=box))
    refused(source, tmp_path / "out", r"instances_train2017\.json: annotation 2: box .* outside its image")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "annotation 2: box"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 2: no image 99"),
        (lambda c: c["annotations"][0].update(category_id=7), "annotation 2: no category 7"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=[5]), "annotation 4: bad segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 2: bad segmentation"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotations: entry without 'bbox'"),
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c["images"][0].update(file_name="../../x.jpg"), "image 1: file name '../../x.jpg' leads elsewhere"),
        (lambda c: c["categories"].pop(), "categories of train2017 and val2017 differ"),
        (lambda c: c["annotations"].pop(1), r"annotation 3 is not in instances_train2017\.json"),
    ],
)
def test_bad_annotations(source, tmp_path, change, match):
    edited(source, change)
    refused(source, tmp_path / "out", match)


def test_bad_keypoints_and_bad_json(source, tmp_path):
    edited(source, lambda c: c["annotations"][0]["keypoints"].pop(), "person_keypoints")
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: annotation 3: 8 keypoint numbers, not 9")
    path = source / "annotations" / "person_keypoints_train2017.json"
    path.write_text(path.read_text()[:-5])
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: not valid JSON")
    path.unlink()
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: no such file")


def test_no_annotations_folder(tmp_path):
    (tmp_path / "x").mkdir()
    refused(tmp_path / "x", tmp_path / "out", "no folder annotations/")
