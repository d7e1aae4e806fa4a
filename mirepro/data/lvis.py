"""Imports LVIS v1: boxes and masks on COCO 2017 images; train and val from lvis_v1_train, test is lvis_v1_val.

LVIS is federated: an image says which categories were looked for in vain (`neg_category_ids`) and which were not
searched exhaustively. That stands in `federated.json` beside the manifest, which pins it. Source: Gupta, Dollar and
Girshick, LVIS: a dataset for large vocabulary instance segmentation (2019); https://www.lvisdataset.org/dataset.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirepro import files, rng
from mirepro.data import annotations, shards, sources
from mirepro.data.shards import Sample
from mirepro.errors import UserError

FILES = {"train": "lvis_v1_train.json", "test": "lvis_v1_val.json"}
COUNTS = {"train": 100_170, "test": 19_809}
CATEGORIES = 1203
RULES = ("neg_category_ids", "not_exhaustive_category_ids")
FIELDS = {
    "images": {"id": annotations.ID, "coco_url": annotations.TEXT, "width": annotations.PIXELS,
               "height": annotations.PIXELS, **dict.fromkeys(RULES, annotations.IDS)},
    "annotations": {"id": annotations.ID, "image_id": annotations.ID, "category_id": annotations.ID,
                    "bbox": annotations.BOX, "area": annotations.AREA, "segmentation": annotations.SHAPE},
    "categories": {"id": annotations.ID, "name": annotations.TEXT,
                   "frequency": annotations.Kind("r, c or f", lambda value: value in ("r", "c", "f"))},
}  # fmt: skip
CHOICE = 15
"""Epoch word of the draw that chooses the validation tenth."""

_URL = re.compile(r"https?://images\.cocodataset\.org/((?:train|val)2017/\d{12}\.jpg)")

Counts = dict[str, dict[str, int]]


def import_lvis(path: Path | str, folder: Path | str) -> Counts:
    """Imports LVIS into shards.

    Args:
        path: Folder (or a tar of it) with the two files of `FILES` (or `annotations/` with them) and COCO's
            `train2017/` and `val2017/`.
        folder: The data set's folder.

    Returns:
        For each split: images, objects, dropped (annotations whose box has no area).

    Raises:
        UserError: A file is missing or damaged, wrong counts, a bad box, ...; nothing is written then.
    """
    with sources.unpacked(path, Path(folder)) as source:
        base = sources.root(source, "train2017", "val2017")
        if base is None:
            raise UserError(f"{path}: no folders train2017/ and val2017/ inside; LVIS uses the images of COCO 2017")
        parts = {name: _Part(base, name) for name in FILES}
        if parts["train"].categories != parts["test"].categories:
            raise UserError(f"{base}: the categories of {' and '.join(FILES.values())} differ")
        order = rng.permutation(0, rng.Stream.DATA, CHOICE, len(parts["train"].images)).tolist()
        val = set(order[: max(1, len(order) // 10)])
        images = {"train": [one for i, one in enumerate(parts["train"].images) if i not in val],
                  "val": [one for i, one in enumerate(parts["train"].images) if i in val],
                  "test": parts["test"].images}  # fmt: skip
        counts: Counts = {split: dict.fromkeys(("images", "objects", "dropped"), 0) for split in images}
        splits = {split: parts["test" if split == "test" else "train"].samples(chosen, counts[split])
                  for split, chosen in images.items()}  # fmt: skip
        rules = files.dump_json({split: parts["train"].federated(chosen) for split, chosen in images.items()})
        shards.write(folder, "lvis", splits, parts["train"].meta(rules))
        files.write_text(Path(folder) / "federated.json", rules)
    return counts


class _Part:
    """One annotation file."""

    def __init__(self, base: Path, name: str) -> None:
        self.base = base
        inner = base / "annotations" / FILES[name]
        self.path = inner if inner.is_file() else base / FILES[name]
        content = annotations.read(self.path, "an LVIS", FIELDS)
        if len(content["images"]) != COUNTS[name] or len(content["categories"]) != CATEGORIES:
            raise UserError(f"{self.path}: {len(content['images'])} images of {len(content['categories'])} categories, "
                            f"not {COUNTS[name]} of {CATEGORIES}; fetch it again")  # fmt: skip
        self.categories = sorted((c["id"], c["name"], c["frequency"]) for c in content["categories"])
        self.numbers = {number: i for i, (number, _, _) in enumerate(self.categories)}
        self.images = sorted(content["images"], key=lambda i: i["id"])
        self.annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        known = {image["id"] for image in self.images}
        for one in sorted(content["annotations"], key=lambda a: a["id"]):
            if one["image_id"] not in known:
                raise UserError(f"{self.path}: annotation {one['id']}: no image {one['image_id']}")
            self.annotations[one["image_id"]].append(one)

    def meta(self, rules: str) -> dict[str, Any]:
        """The data set's part of the manifest."""
        names = [name for _, name, _ in self.categories]
        return {"title": "LVIS v1", "classes": [], "categories": names,
                "keypoints": {"names": [], "flips": [], "sigmas": []},
                "frequencies": [kind for _, _, kind in self.categories],
                "federated": hashlib.sha256(rules.encode()).hexdigest()}  # fmt: skip

    def federated(self, images: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
        """For each image's key: categories that are absent, and those that were not searched exhaustively."""
        return {f"{image['id']:012d}": [self._known(image, key) for key in RULES] for image in images}

    def _known(self, image: dict[str, Any], key: str) -> list[int]:
        for number in image[key]:
            if number not in self.numbers:
                raise UserError(f"{self.path}: image {image['id']}: {key}: no category {number}")
        return sorted(self.numbers[number] for number in image[key])

    def samples(self, images: list[dict[str, Any]], counts: dict[str, int]) -> Iterator[Sample]:
        """The images with their objects."""
        for image in images:
            match = _URL.fullmatch(image["coco_url"])
            if match is None:
                raise UserError(f"{self.path}: image {image['id']}: coco_url {image['coco_url']!r} leads elsewhere")
            content, size = sources.read_image(self.base / match[1])
            if size != (image["width"], image["height"]):
                raise UserError(f"{self.base / match[1]}: {size[0]} x {size[1]} pixels; {self.path.name} says "
                                f"{image['width']} x {image['height']}")  # fmt: skip
            objects = [self._object(one, *size) for one in self.annotations.get(image["id"], [])]
            kept = [thing for thing in objects if min(thing["bbox"][2:]) > 0]
            counts["images"] += 1
            counts["objects"] += len(kept)
            counts["dropped"] += len(objects) - len(kept)
            yield Sample(f"{image['id']:012d}", content, ".jpg", None, kept)

    def _object(self, one: dict[str, Any], width: int, height: int) -> dict[str, Any]:
        where = f"{self.path}: annotation {one['id']}"
        if one["category_id"] not in self.numbers:
            raise UserError(f"{where}: no category {one['category_id']}")
        annotations.check_shape(one, width, height, where)
        return {"bbox": one["bbox"], "category": self.numbers[one["category_id"]], "area": float(one["area"]),
                "iscrowd": 0, "segmentation": one["segmentation"], "keypoints": []}  # fmt: skip
