"""COCO import: boxes, masks and keypoints arrive unchanged; every damage is one line that names the file."""

import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from mirepro.data import annotations, coco, shards
from mirepro.errors import UserError

POINTS = ["nose", "left_eye", "right_eye"]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
NAN, INFINITE = float("nan"), float("inf")
JUNK = [None, True, "x", -1, 0.5, 10**400, NAN, INFINITE, [], [None], [[1, 2]], {}, {"size": [30, 40], "counts": 3}]
"""Values that JSON allows; few fields may be one of them."""


def annotation(number, image, category, box, segmentation=None):
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": 0,
            "segmentation": segmentation or polygon}  # fmt: skip


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 3, "val2017": 3})
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


@pytest.mark.parametrize("name", ["train2017", "val2017"])
def test_a_part_of_coco_is_not_coco(source, tmp_path, name):
    """The last image has no annotation, so that nothing else shows that it is missing."""
    edited(source, lambda c: c["images"].pop(), name=name)
    refused(source, tmp_path / "out", rf"instances_{name}\.json: 2 images, not 3; .* as coco_mini")
    counts = coco.import_mini(source, tmp_path / "out")  # control: nothing else is wrong with it
    assert sum(one["images"] for one in counts.values()) == 5


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


@pytest.mark.parametrize("box", [[30, 3, 12, 4], [-3, 3, 5, 4], [3, 3, 5, -1], [3, 28, 5, 4]])
def test_a_box_outside_its_image(source, tmp_path, box):
    edited(source, lambda c: c["annotations"][0].update(bbox=box))
    refused(source, tmp_path / "out", r"instances_train2017\.json: annotation 2: box .* outside its image")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), r"annotation 2: bbox: \[1, 2\] is not \[x, y, w"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 2: no image 99"),
        (lambda c: c["annotations"][0].update(category_id=7), "annotation 2: no category 7"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=[5]), "annotation 4: bad segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 2: segmentation: .* is not polygons"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 81]]), "annotation 2: bad segmentation"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 2: no 'bbox'"),
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c["images"][0].update(file_name="../../x.jpg"), 'image 1: file_name: "../../x.jpg" is not the name'),
        (lambda c: c["categories"].pop(), "categories of train2017 and val2017 differ"),
        (lambda c: c["annotations"].pop(1), r"annotation 3 is not in instances_train2017\.json"),
    ],
)
def test_bad_annotations(source, tmp_path, change, match):
    edited(source, change)
    refused(source, tmp_path / "out", match)


FIELDS = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"],
    "categories": ["id", "name"],
}
PEOPLE = {"annotations": ["id", "keypoints"], "categories": ["id", "keypoints"]}


def fields(parts):
    return [(part, key) for part, keys in parts.items() for key in keys]


FITTING = {"name": ["x"], "coco_url": ["x"], "area": [0.5], "keypoints": [[]], "neg_category_ids": [[]],
           "not_exhaustive_category_ids": [[]]}  # fmt: skip
"""What of `JUNK` has a field's type."""


def refused_as_junk(path, part, key, refuse):
    """Every junk value of the first entry's field, and none at all, is a line that names file, entry and field.

    Args:
        path: The annotation file; it is as before in the end.
        part: Its list.
        key: The field.
        refuse: Imports, and is told the pattern of the message.
    """
    sound = path.read_text()
    content = json.loads(sound)
    entry = content[part][0]
    name = f"{part}[0]" if key == "id" else f"{annotations.ENTRIES[part]} {entry['id']}"
    for value in JUNK:
        if value not in FITTING.get(key, []):
            entry[key] = value
            path.write_text(json.dumps(content))
            refuse(rf"{re.escape(f'{path.name}: {name}: {key}: ')}.* is not .*; fetch the file again$")
    del entry[key]
    path.write_text(json.dumps(content))
    refuse(re.escape(f"{path.name}: {name}: no {key!r}; fetch the file again"))
    path.write_text(sound)


@pytest.mark.parametrize(
    ("kind", "part", "key"),
    [*[("instances", *one) for one in fields(FIELDS)], *[("person_keypoints", *one) for one in fields(PEOPLE)]],
)
def test_wrong_types(source, tmp_path, kind, part, key):
    path = source / f"annotations/{kind}_train2017.json"
    refused_as_junk(path, part, key, lambda match: refused(source, tmp_path / "out", match))
    coco.import_coco(source, tmp_path / "out")  # control: what was there before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["images"].append(c["images"][0]), "image 1: its id stands there twice"),
        (lambda c: c["annotations"].append(c["annotations"][1]), "annotation 3: its id stands there twice"),
        (lambda c: c["categories"].append(c["categories"][0]), "category 18: its id stands there twice"),
        (lambda c: c["images"].insert(0, None), r"images\[0\]: null is no object"),
        (lambda c: c["annotations"][0].update(id="2"), r'annotations\[0\]: id: "2" is not a whole number'),
        (lambda c: c["annotations"][0].update(bbox=["3", 3, 5, 4]), r'annotation 2: bbox: \["3", 3, 5, 4\] is not'),
        (lambda c: c["annotations"][0].update(bbox=[NAN, 3, 5, 4]), r"annotation 2: bbox: \[NaN, 3, 5, 4\] is not"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, INFINITE]]), "annotation 2: segmentation"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=[10**14]), "annotation 4: bad segmentation"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts="o" * 99), "annotation 4: bad segmentation"),
        (lambda c: c["annotations"][2]["segmentation"].update(size=[40, 30]), "annotation 4: bad segmentation"),
        (lambda c: c["images"][0].update(file_name="a\0.jpg"), r'image 1: file_name: "a\\u0000\.jpg" is not'),
        (lambda c: c["images"][0].update(file_name="x" * 999), r'image 1: file_name: "x+\.\.\. is not'),
    ],
)
def test_bad_values_and_ids(source, tmp_path, change, match):
    edited(source, change)
    refused(source, tmp_path / "out", rf"instances_train2017\.json: {match}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        *[(text, "no list 'images'; not a COCO annotation file") for text in ("null", "3", "[]", '"images"', "{}")],
        ('{"images": {}}', "no list 'images'"),
        (f'{{"images": {"9" * 5000}}}', "not valid JSON"),
        (f'{{"images": {"[" * 5000}', "not valid JSON"),
    ],
)
def test_no_object_of_lists(source, tmp_path, text, match):
    (source / "annotations/instances_val2017.json").write_text(text)
    refused(source, tmp_path / "out", rf"instances_val2017\.json: {match}")


def test_bad_keypoints_and_bad_json(source, tmp_path):
    edited(source, lambda c: c["annotations"].clear(), "person_keypoints")
    refused(source, tmp_path / "out", r"annotation 3: has no keypoints in person_keypoints_train2017\.json; fetch both")
    edited(
        source,
        lambda c: c["annotations"].append({"id": 3, "keypoints": [8, 9, 2, 7, 8, 1, 0, 0, 0]}),
        "person_keypoints",
    )
    edited(source, lambda c: c["annotations"][0]["keypoints"].pop(), "person_keypoints")
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: annotation 3: 8 keypoint numbers, not 9")
    edited(source, lambda c: c["annotations"][0].update(keypoints=[8, 9, 3, 7, 8, 1, 0, 0, 0]), "person_keypoints")
    refused(source, tmp_path / "out", r"train2017\.json: annotation 3: keypoints: \[8, 9, 3, .* is not a list of x, y")
    path = source / "annotations" / "person_keypoints_train2017.json"
    path.write_text(path.read_text()[:-5])
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: not valid JSON")
    path.unlink()
    refused(source, tmp_path / "out", r"person_keypoints_train2017\.json: no such file")


def test_no_annotations_folder(tmp_path):
    (tmp_path / "x").mkdir()
    refused(tmp_path / "x", tmp_path / "out", "no folder annotations/")
