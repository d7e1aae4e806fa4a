"""Imports COCO: instances and person keypoints, images as they are; train and val from train2017, test is val2017.

Source: Lin et al., Microsoft COCO: common objects in context (2014); https://cocodataset.org/#format-data.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirepro import rng
from mirepro.data import annotations, shards, sources
from mirepro.data.shards import Sample
from mirepro.errors import UserError

PARTS = {"train": "train2017", "val": "train2017", "test": "val2017"}
"""Choices are made on a tenth of train2017, so that val2017 (the public test) is read once."""
COUNTS = {"train2017": 118_287, "val2017": 5000}
"""Images of each annotation file."""
SIGMAS = [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
          0.089, 0.089]  # fmt: skip
"""Standard deviations of the person keypoints in pycocotools' evaluation."""
FIELDS = {
    "images": {"id": annotations.ID, "file_name": annotations.FILE, "width": annotations.PIXELS,
               "height": annotations.PIXELS},
    "annotations": {"id": annotations.ID, "image_id": annotations.ID, "category_id": annotations.ID,
                    "bbox": annotations.BOX, "area": annotations.AREA, "iscrowd": annotations.FLAG,
                    "segmentation": annotations.SHAPE},
    "categories": {"id": annotations.ID, "name": annotations.TEXT},
}  # fmt: skip
PEOPLE = {
    "annotations": {"id": annotations.ID, "keypoints": annotations.POSE},
    "categories": {"id": annotations.ID, "keypoints": annotations.TEXTS},
}

Counts = dict[str, dict[str, int]]


def import_coco(path: Path | str, folder: Path | str) -> Counts:
    """Imports COCO into shards.

    Args:
        path: Folder (or a tar of it) with `annotations/` and `train2017/`, `val2017/`.
        folder: The data set's folder.

    Returns:
        For each split: images, objects, crowd (of the objects), keypoints (objects with at least one), dropped
        (annotations whose box has no area).

    Raises:
        UserError: A file is missing or damaged, wrong counts, a box outside its image, ...; nothing is written then.
    """
    return _import(path, folder, COUNTS)


def import_mini(path: Path | str, folder: Path | str) -> Counts:
    """Imports a part of COCO in COCO's layout, however many images it has; the rest as `import_coco`."""
    return _import(path, folder, {})


def _import(path: Path | str, folder: Path | str, images: Mapping[str, int]) -> Counts:
    """Imports what has so many `images` in each annotation file; files that are not named may have any number."""
    with sources.unpacked(path, Path(folder)) as source:
        base = sources.root(source, "annotations")
        if base is None:
            raise UserError(f"{path}: no folder annotations/ inside; give COCO's folder")
        parts = {split: _Part(base, name, split, images.get(name)) for split, name in PARTS.items()}
        if parts["train"].categories != parts["test"].categories:
            raise UserError(f"{base}/annotations: the categories of train2017 and val2017 differ")
        counts = {split: part.counts for split, part in parts.items()}
        shards.write(folder, "coco", {s: part.samples() for s, part in parts.items()}, parts["train"].meta())
    return counts


class _Part:
    """A split of train2017 or val2017: both annotation files, joined by annotation id."""

    def __init__(self, base: Path, name: str, split: str, size: int | None) -> None:
        self.images_folder = base / name
        self.path = base / "annotations" / f"instances_{name}.json"
        self.people_path = base / "annotations" / f"person_keypoints_{name}.json"
        instances = annotations.read(self.path, "a COCO", FIELDS)
        if size not in (None, len(instances["images"])):
            raise UserError(f"{self.path}: {len(instances['images'])} images, not {size}; fetch it again, or import a "
                            "part of COCO as coco_mini")  # fmt: skip
        people = annotations.read(self.people_path, "a COCO", PEOPLE)
        self.categories = sorted((c["id"], c["name"]) for c in instances["categories"])
        self.numbers = {number: i for i, (number, _) in enumerate(self.categories)}
        self.points: list[str] = next((c["keypoints"] for c in people["categories"] if c["keypoints"]), [])
        self.poses = {a["id"]: self._pose(a) for a in people["annotations"]}
        self.posed = {c["id"] for c in people["categories"] if c["keypoints"]}
        self.images = sorted(instances["images"], key=lambda i: i["id"])
        self.annotations = self._by_image(instances["annotations"])
        order = rng.permutation(0, rng.Stream.DATA, 0, len(self.images))
        chosen = set(order[: max(1, len(order) // 10)].tolist())
        if split != "test":
            self.images = [one for i, one in enumerate(self.images) if (i in chosen) == (split == "val")]
        self.counts = dict.fromkeys(("images", "objects", "crowd", "keypoints", "dropped"), 0)

    def _pose(self, annotation: dict[str, Any]) -> list[float]:
        pose = annotation["keypoints"]
        if len(pose) != 3 * len(self.points):
            raise UserError(f"{self.people_path}: annotation {annotation['id']}: {len(pose)} keypoint numbers, "
                            f"not {3 * len(self.points)}")  # fmt: skip
        return list(pose)

    def _by_image(self, annotations: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        known, result = {i["id"] for i in self.images}, defaultdict(list)
        for one in sorted(annotations, key=lambda a: a["id"]):
            if one["image_id"] not in known:
                raise UserError(f"{self.path}: annotation {one['id']}: no image {one['image_id']}")
            result[one["image_id"]].append(one)
        if lost := set(self.poses) - {a["id"] for a in annotations}:
            raise UserError(f"{self.people_path}: annotation {min(lost)} is not in {self.path.name}")
        return result

    def meta(self) -> dict[str, Any]:
        """The data set's part of the manifest."""
        swap = {"left": "right", "right": "left"}
        mirrored = ["_".join(swap.get(word, word) for word in p.split("_")) for p in self.points]
        flips = [self.points.index(m) if m in self.points else i for i, m in enumerate(mirrored)]
        sigmas = SIGMAS if len(self.points) == len(SIGMAS) else [0.08] * len(self.points)
        keypoints = {"names": self.points, "flips": flips, "sigmas": sigmas}
        names = [name for _, name in self.categories]
        return {"title": "COCO 2017", "classes": [], "categories": names, "keypoints": keypoints}

    def samples(self) -> Iterator[Sample]:
        """All images in the order of their ids."""
        for image in self.images:
            path = self.images_folder / image["file_name"]
            content, size = sources.read_image(path)
            if size != (image["width"], image["height"]):
                raise UserError(f"{path}: {size[0]} x {size[1]} pixels; {self.path.name} says "
                                f"{image['width']} x {image['height']}")  # fmt: skip
            self.counts["images"] += 1
            objects = [self._object(a, *size) for a in self.annotations.get(image["id"], [])]
            yield Sample(f"{image['id']:012d}", content, path.suffix, None, [o for o in objects if o])

    def _object(self, one: dict[str, Any], width: int, height: int) -> dict[str, Any] | None:
        """The annotation with our category number and its keypoints; None when its box is empty."""
        where = f"{self.path}: annotation {one['id']}"
        if one["category_id"] not in self.numbers:
            raise UserError(f"{where}: no category {one['category_id']}")
        annotations.check_shape(one, width, height, where)
        if min(one["bbox"][2:]) <= 0:
            self.counts["dropped"] += 1
            return None
        pose = self.poses.get(one["id"], [])
        if one["category_id"] in self.posed and not pose:
            raise UserError(f"{where}: has no keypoints in {self.people_path.name}; fetch both files again")
        self.counts["objects"] += 1
        self.counts["crowd"] += one["iscrowd"]
        self.counts["keypoints"] += any(pose[2::3])
        return {
            "bbox": one["bbox"], "category": self.numbers[one["category_id"]], "area": float(one["area"]),
            "iscrowd": one["iscrowd"], "segmentation": one["segmentation"], "keypoints": pose,
        }  # fmt: skip
