"""Imports PASCAL VOC 2007 and 2012 boxes: train and val from both years' trainval, test is VOC 2007's.

Objects marked difficult count as crowd: evaluation ignores them, training leaves them out. VOC has no masks for most
images, so objects carry no segmentation. The manifest's `evaluation` asks for VOC's own numbers beside COCO's.
Source: Everingham et al., The PASCAL visual object classes challenge (2010).
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from mirepro import rng
from mirepro.data import shards, sources
from mirepro.data.shards import Sample
from mirepro.errors import UserError

CATEGORIES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
              "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")  # fmt: skip
LISTS = {"train": (("VOC2007", "trainval"), ("VOC2012", "trainval")), "test": (("VOC2007", "test"),)}
COUNTS = {("VOC2007", "trainval"): 5011, ("VOC2012", "trainval"): 11540, ("VOC2007", "test"): 4952}
CHOICE = 14
"""Epoch word of the draw that chooses the validation tenth."""

META = {
    "title": "PASCAL VOC 07+12",
    "classes": [],
    "categories": list(CATEGORIES),
    "keypoints": {"names": [], "flips": [], "sigmas": []},
    "evaluation": "voc",
}

Counts = dict[str, dict[str, int]]


def import_voc(path: Path | str, folder: Path | str) -> Counts:
    """Imports VOC into shards.

    Args:
        path: Folder (or a tar of it) with `VOC2007/` and `VOC2012/`, for example `VOCdevkit`.
        folder: The data set's folder.

    Returns:
        For each split: images, objects, crowd (of the objects: difficult ones).

    Raises:
        UserError: A file is missing or damaged, a box lies outside its image, ...; nothing is written then.
    """
    with sources.unpacked(path, Path(folder)) as source:
        base = sources.root(source, "VOC2007", "VOC2012")
        if base is None:
            raise UserError(f"{path}: no folders VOC2007/ and VOC2012/ inside; unpack VOC's tars into one folder")
        names = {split: _listed(base, split) for split in LISTS}
        order = rng.permutation(0, rng.Stream.DATA, CHOICE, len(names["train"])).tolist()
        val = set(order[: max(1, len(order) // 10)])
        chosen = {"train": [n for i, n in enumerate(names["train"]) if i not in val],
                  "val": [n for i, n in enumerate(names["train"]) if i in val], "test": names["test"]}  # fmt: skip
        counts: Counts = {split: dict.fromkeys(("images", "objects", "crowd"), 0) for split in chosen}
        shards.write(folder, "voc", {s: _samples(base, ids, counts[s]) for s, ids in chosen.items()}, META)
    return counts


def _listed(base: Path, split: str) -> list[tuple[str, str]]:
    """(year, image id) of a split, from `ImageSets/Main`."""
    result = []
    for year, part in LISTS[split]:
        path = base / year / "ImageSets" / "Main" / f"{part}.txt"
        try:
            ids = path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: missing or unreadable; complete the data") from error
        if len(ids) != COUNTS[year, part] or len(set(ids)) != len(ids):
            raise UserError(f"{path}: {len(set(ids))} images, not {COUNTS[year, part]}; complete the data")
        for one in ids:
            if not one.replace("_", "").isalnum():
                raise UserError(f"{path}: image id {one!r} leads elsewhere; restore the file")
        result += [(year, one) for one in ids]
    return result


def _samples(base: Path, ids: list[tuple[str, str]], counts: dict[str, int]) -> Iterator[Sample]:
    for year, one in ids:
        path = base / year / "JPEGImages" / f"{one}.jpg"
        content, size = sources.read_image(path)
        objects = read_objects(base / year / "Annotations" / f"{one}.xml", size)
        counts["images"] += 1
        counts["objects"] += len(objects)
        counts["crowd"] += sum(thing["iscrowd"] for thing in objects)
        yield Sample(f"{year}-{one}", content, ".jpg", None, objects)


def read_xml(path: Path) -> ElementTree.Element:
    """An annotation file's root; a document type, and with it every entity, is refused before it is read.

    Raises:
        UserError: The file is missing, not XML, or declares a document type.
    """

    def refuse(name: str, *rest: Any) -> None:
        raise ValueError(f"it declares a document type {name!r}")

    try:
        content = path.read_bytes()
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = refuse
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable ({error.strerror}); complete the data") from error
    except (ValueError, LookupError, expat.ExpatError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not valid XML ({error}); fetch it again") from error


def read_objects(path: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Objects of an annotation file; boxes from corners that count from 1 and include the last pixel.

    Args:
        path: The XML file.
        size: The image's (width, height).

    Raises:
        UserError: See `read_xml`; also another image size, an unknown category, a box outside the image.
    """
    tree = read_xml(path)
    stated = tuple(_number(tree, f"size/{key}", path) for key in ("width", "height"))
    if stated != size:
        raise UserError(f"{path}: says {stated[0]:g} x {stated[1]:g} pixels, its image has {size[0]} x {size[1]}")
    return [_object(one, i, path, size) for i, one in enumerate(tree.iter("object"))]


def _number(node: ElementTree.Element, key: str, path: Path) -> float:
    text = node.findtext(key)
    try:
        return float(text or "")
    except ValueError as error:
        raise UserError(f"{path}: {key}: {text!r} is no number; fetch it again") from error


def _object(node: ElementTree.Element, place: int, path: Path, size: tuple[int, int]) -> dict[str, Any]:
    name = (node.findtext("name") or "").strip()
    if name not in CATEGORIES:
        raise UserError(f"{path}: object {place}: no category {name!r}")
    x1, y1, x2, y2 = (_number(node, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax"))
    if not (1 <= x1 <= x2 <= size[0] and 1 <= y1 <= y2 <= size[1]):
        raise UserError(f"{path}: object {place}: box {[x1, y1, x2, y2]} lies outside its image of "
                        f"{size[0]} x {size[1]} pixels")  # fmt: skip
    difficult = (node.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{path}: object {place}: difficult: {difficult!r} is not 0 or 1; fetch it again")
    width, height = x2 - x1 + 1, y2 - y1 + 1
    return {"bbox": [x1 - 1, y1 - 1, width, height], "category": CATEGORIES.index(name), "area": width * height,
            "iscrowd": int(difficult), "segmentation": [], "keypoints": []}  # fmt: skip
