"""VOC and LVIS import: boxes, difficult objects, masks and the federated rules; every damage is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from mirepro.data import lvis, shards, voc
from mirepro.errors import UserError
from tests.test_coco import fields, refused_as_junk

IDS = {("VOC2007", "trainval"): ["000005", "000007"], ("VOC2012", "trainval"): ["2008_000002"],
       ("VOC2007", "test"): ["000001"]}  # fmt: skip
XML = """<annotation><folder>VOC</folder><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>dog</name><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>24</xmax><ymax>17</ymax></bndbox></object>
<object><name>person</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>
<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part></object>
</annotation>"""
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(path)


@pytest.fixture
def devkit(tmp_path, monkeypatch):
    monkeypatch.setattr(voc, "COUNTS", {key: len(ids) for key, ids in IDS.items()})
    root = tmp_path / "VOCdevkit"
    for (year, part), ids in IDS.items():
        (root / year / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / year / "Annotations").mkdir(exist_ok=True)
        (root / year / "ImageSets/Main" / f"{part}.txt").write_text("\n".join(ids) + "\n")
        for seed, one in enumerate(ids):
            picture(root / year / "JPEGImages" / f"{one}.jpg", seed)
            (root / year / "Annotations" / f"{one}.xml").write_text(XML)
    return root


def refused(importer, source, target, match):
    with pytest.raises(UserError, match=match) as caught:
        importer(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not [p for p in target.parent.iterdir() if p.name.startswith(".")]


def test_voc(devkit, tmp_path):
    counts = voc.import_voc(devkit, tmp_path / "out")
    assert [counts[s] for s in ("val", "test")] == [{"images": 1, "objects": 2, "crowd": 1}] * 2
    assert counts["train"]["images"] == 2
    split = shards.open(tmp_path / "out", "test")
    assert split.meta["evaluation"] == "voc"
    dog, person = split.objects[0]
    assert (dog["bbox"], dog["area"], dog["iscrowd"]) == ([4, 5, 20, 12], 240, 0)
    assert (person["bbox"], person["iscrowd"]) == ([0, 0, 40, 30], 1)
    assert [split.categories[t["category"]] for t in (dog, person)] == ["dog", "person"]
    keys = [shards.open(tmp_path / "out", s).keys for s in ("train", "val", "test")]
    assert len({key for part in keys for key in part}) == 4


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("<annotation>", f"{BOMB}<annotation>", "not valid XML .*declares a document type"),
        ("</annotation>", "", "not valid XML"),
        ("<xmax>24<", "<xmax>41<", "object 0: box .* outside its image"),
        ("<xmin>5<", "<xmin>0<", "object 0: box .* outside its image"),
        ("<xmin>5<", "<xmin>nan<", "object 0: box .* outside its image"),
        ("<xmin>5<", "<xmin>five<", "bndbox/xmin: 'five' is no number"),
        ("<width>40<", "<width>41<", "says 41 x 30 pixels, its image has 40 x 30"),
        ("<xmin>5<", "<xmin><", "bndbox/xmin: '' is no number"),
        ("<ymax>17</ymax>", "", "bndbox/ymax: None is no number"),
        ("<width>40</width>", "", "size/width: None is no number"),
        ("<width>40<", "<width>inf<", "says inf x 30 pixels, its image has 40 x 30"),
        ("<difficult>0<", "<difficult>yes<", "object 0: difficult: 'yes' is not 0 or 1"),
        ("<name>dog<", "<name>dragon<", "object 0: no category 'dragon'"),
        ("<name>dog</name>", "", "object 0: no category ''"),
    ],
)
def test_bad_voc_annotations(devkit, tmp_path, old, new, match):
    path = devkit / "VOC2007/Annotations/000001.xml"
    assert old in XML
    path.write_text(XML.replace(old, new, 1))
    refused(voc.import_voc, devkit, tmp_path / "out", rf"000001\.xml: {match}")


def test_a_document_type_in_another_encoding(devkit, tmp_path):
    text = f'<?xml version="1.0" encoding="UTF-16"?>{BOMB}{XML}'
    (devkit / "VOC2007/Annotations/000001.xml").write_bytes(text.encode("utf-16"))
    refused(voc.import_voc, devkit, tmp_path / "out", "declares a document type")
    (devkit / "VOC2007/Annotations/000001.xml").write_bytes(text.replace(BOMB, "").encode("utf-16"))
    voc.import_voc(devkit, tmp_path / "out")  # control: the encoding alone is fine


def test_damaged_voc(devkit, tmp_path):
    out, run = tmp_path / "out", voc.import_voc
    image = devkit / "VOC2007/JPEGImages/000001.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    refused(run, devkit, out, r"000001\.jpg: corrupt image")
    image.unlink()
    refused(run, devkit, out, r"000001\.jpg: missing")
    image.write_bytes(content)
    (devkit / "VOC2007/Annotations/000001.xml").unlink()
    refused(run, devkit, out, r"000001\.xml: missing")
    ids = devkit / "VOC2007/ImageSets/Main/test.txt"
    ids.write_text("../../x\n")
    refused(run, devkit, out, "image id '../../x' leads elsewhere")
    ids.write_text("")
    refused(run, devkit, out, r"test\.txt: 0 images, not 1")
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", out, "no folders VOC2007/ and VOC2012/")


CATEGORIES = [{"id": 3, "name": "zebra", "frequency": "r"}, {"id": 1, "name": "ant", "frequency": "f"}]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(lvis, "COUNTS", {"train": 3, "test": 2})
    monkeypatch.setattr(lvis, "CATEGORIES", 2)
    root = tmp_path / "lvis"
    (root / "val2017").mkdir(parents=True)
    for first, name, count in ((1, "train", 3), (11, "test", 2)):
        images = [{"id": first + i, "coco_url": f"http://images.cocodataset.org/train2017/{first + i:012d}.jpg",
                   "width": 40, "height": 30, "neg_category_ids": [1], "not_exhaustive_category_ids": [3]}
                  for i in range(count)]  # fmt: skip
        for image in images:
            picture(root / "train2017" / f"{image['id']:012d}.jpg", image["id"])
        box = {"area": 240.0, "bbox": [5, 6, 20, 12], "segmentation": [[5, 6, 25, 6, 25, 18, 5, 18]]}
        found = [{"id": 7, "image_id": first, "category_id": 3, **box}]
        content = {"images": images, "annotations": found, "categories": CATEGORIES}
        (root / lvis.FILES[name]).write_text(json.dumps(content))
    return root


def test_lvis(source, tmp_path):
    counts = lvis.import_lvis(source, tmp_path / "out")
    assert [counts[s]["images"] for s in ("train", "val", "test")] == [2, 1, 2]
    assert counts["test"] == {"images": 2, "objects": 1, "dropped": 0}
    split = shards.open(tmp_path / "out", "test")
    assert (split.categories, split.meta["frequencies"]) == (["ant", "zebra"], ["f", "r"])
    assert (split.objects[0][0]["category"], split.masks(0)[0].sum()) == (1, 240)
    rules = (tmp_path / "out/federated.json").read_text()
    assert json.loads(rules)["test"]["000000000011"] == [[0], [1]]
    assert split.meta["federated"] == lvis.hashlib.sha256(rules.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["annotations"][0].update(bbox=[30, 3, 12, 4]), "annotation 7: box .* outside its image"),
        (lambda c: c["annotations"][0].update(bbox=[float("nan"), 3, 5, 4]), "annotation 7: bbox: .NaN, 3"),
        (lambda c: c["annotations"][0].update(category_id=2), "annotation 7: no category 2"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 7: no image 99"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "annotation 7: segmentation: .* is not polygons"),
        (lambda c: c["annotations"][0].pop("area"), "annotation 7: no 'area'"),
        (lambda c: c["images"][0].update(neg_category_ids=[9]), "image 1: neg_category_ids: no category 9"),
        (
            lambda c: c["images"][0].update(coco_url="http://images.cocodataset.org/train2017/../x.jpg"),
            "leads elsewhere",
        ),
        (lambda c: c["categories"][0].update(frequency="q"), 'category 3: frequency: "q" is not r, c or f'),
        (lambda c: c["images"].pop(), "2 images of 2 categories, not 3 of 2"),
        (lambda c: c["categories"][0].update(name="lion"), "categories of .* differ"),
        (lambda c: c.pop("images"), "no list 'images'"),
    ],
)
def test_bad_lvis_annotations(source, tmp_path, change, match):
    content = json.loads((source / lvis.FILES["train"]).read_text())
    change(content)
    (source / lvis.FILES["train"]).write_text(json.dumps(content))
    refused(lvis.import_lvis, source, tmp_path / "out", match)


@pytest.mark.parametrize(("part", "key"), fields({
    "images": ["id", "coco_url", "width", "height", "neg_category_ids", "not_exhaustive_category_ids"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "segmentation"],
    "categories": ["id", "name", "frequency"],
}))  # fmt: skip
def test_wrong_types_in_lvis(source, tmp_path, part, key):
    path = source / lvis.FILES["train"]
    refused_as_junk(path, part, key, lambda match: refused(lvis.import_lvis, source, tmp_path / "out", match))
    lvis.import_lvis(source, tmp_path / "out")  # control: what was there before


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_an_id_that_stands_twice_in_lvis(source, tmp_path, part):
    path = source / lvis.FILES["test"]
    content = json.loads(path.read_text())
    content[part].append(content[part][0])
    path.write_text(json.dumps(content))
    number = content[part][0]["id"]
    refused(lvis.import_lvis, source, tmp_path / "out", rf"lvis_v1_val\.json: \w+ {number}: its id stands there twice")


def test_damaged_lvis(source, tmp_path):
    out, run = tmp_path / "out", lvis.import_lvis
    path = source / "train2017/000000000011.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(run, source, out, r"000000000011\.jpg: corrupt image")
    path.unlink()
    refused(run, source, out, r"000000000011\.jpg: missing")
    picture(path, 1)
    text = (source / lvis.FILES["test"]).read_text()
    (source / lvis.FILES["test"]).write_text(text[:-5])
    refused(run, source, out, r"lvis_v1_val\.json: not valid JSON")
    (source / lvis.FILES["test"]).unlink()
    refused(run, source, out, r"lvis_v1_val\.json: no such file")
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", out, "no folders train2017/ and val2017/")
