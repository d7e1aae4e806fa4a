"""Scenes as tensors, when they are needed: images at their final size, torchvision targets, COCO ground truth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core.coco import COCO
from numpy.typing import NDArray
from torch import Tensor

from mirepro import files
from mirepro.data import masks, shards
from mirepro.data.images import Images
from mirepro.errors import UserError
from mirepro.transfer import coco_eval, sampling
from mirepro.transfer.coco_eval import Federated

Target = dict[str, Tensor]
MARKS = {"box": "bbox", "mask": "segmentation", "keypoint": "keypoints"}
"""What an object of COCO's must have for each model."""


@dataclass(frozen=True)
class Scenes:
    """One split.

    Attributes:
        images: The images, `(b, 3, S, S)` uint8 by sample.
        objects: COCO objects of each image, `category` numbered from 0 among the used categories.
        size: S, the side in pixels.
        model: "box", "mask" or "keypoint": what targets hold beside boxes.
        swap: Number of the keypoint that each keypoint is in the mirror image.
        categories: Names of the used categories.
        sigmas: OKS sigma per keypoint; empty for data without keypoints.
        used: Numbers of the used categories in the data set.
        federated: LVIS's rules; None where every image is labelled for every category.
        voc: Whether PASCAL VOC's own numbers are stated beside COCO's; a crowd is an object marked difficult then.
    """

    images: Images
    objects: list[list[dict[str, Any]]]
    size: int
    model: str
    swap: list[int]
    categories: list[str]
    sigmas: list[float]
    used: list[int]
    federated: Federated | None = None
    voc: bool = False

    def __len__(self) -> int:
        return len(self.objects)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """The numbers of all images in their order, `(b,)` int64 with b up to `batch`."""
        return iter(torch.arange(len(self)).split(batch))

    def pictures(self, index: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Images `(b,)` int64, those mirrored that `(b,)` bool says -> `(b, 3, S, S)` float32 in [0, 1]."""
        x = self.images[index].float() / 255
        return x if mirrored is None else torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    def target(self, image: int, mirrored: bool = False) -> Target:
        """Torchvision's target of an image or of its mirror image."""
        target = _target(_things(self.objects[image]), self.size, self.model, len(self.swap))
        return _mirror(target, self.size, self.swap) if mirrored else target

    def boxes(self) -> list[Tensor]:
        """The boxes `(n, 4)` of each image, as corners."""
        return [_corners(_things(found)) for found in self.objects]

    def repeat_factors(self, threshold: float) -> NDArray[np.float64]:
        """`(N,)` how often each image comes in an epoch of training (see `sampling.repeat_factors`)."""
        labels = [np.array([thing["category"] for thing in _things(found)], np.int64) for found in self.objects]
        return sampling.repeat_factors(labels, threshold)

    def truth(self) -> COCO:
        """COCO's index of the objects."""
        return coco_eval.ground_truth(self.objects, self.size, len(self.categories), self.federated)


def load(
    split: shards.Split, model: str, size: int, sigma: float | None = None, used: Sequence[int] | None = None
) -> Scenes:
    """Reads a split for one model.

    Args:
        split: Opened split of a data set with objects.
        model: "box", "mask", or "keypoint", which uses the categories that have keypoints only.
        size: Side in pixels.
        sigma: OKS sigma of every keypoint; None takes the data's own.
        used: Numbers of the used categories, those of the training split; None finds them here.

    Raises:
        UserError: The split has no such objects, or the federated rules are not those of the manifest.
    """
    objects, points = split.objects_at(size), split.keypoints if model == "keypoint" else {}
    used = _used(objects, model, len(split.categories)) if used is None else list(used)
    number = {category: i for i, category in enumerate(used)}
    kept = [
        [{**thing, "category": number[thing["category"]]} for thing in found if thing["category"] in number]
        for found in objects
    ]
    if not any(thing.get(MARKS[model]) for things in kept for thing in things):
        raise UserError(f"{split.folder}: the {split.name} split has no objects with {model}s; use data that have them")
    return Scenes(
        Images(split, torch.get_num_threads(), size),
        kept,
        size,
        model,
        list(points.get("flips", [])),
        [split.categories[category] for category in used],
        [float(own if sigma is None else sigma) for own in points.get("sigmas", [])],
        used,
        _rules(split) if "federated" in split.meta else None,
        split.meta.get("evaluation") == "voc",
    )


def _used(objects: Sequence[Sequence[dict[str, Any]]], model: str, categories: int) -> list[int]:
    """All categories; for keypoints, those that have some."""
    if model != "keypoint":
        return list(range(categories))
    return sorted({thing["category"] for things in objects for thing in things if thing.get(MARKS[model])})


def _rules(split: shards.Split) -> Federated:
    """`federated.json` of an LVIS split, checked against the manifest."""
    path = split.folder / "federated.json"
    if not path.is_file() or files.sha256(path) != split.meta["federated"]:
        raise UserError(f"{path}: missing or not the manifest's; import the data again")
    rules = files.read_json(path)[split.name]
    absent, partial = ([rules[key][part] for key in split.keys] for part in (0, 1))
    return Federated(split.meta["frequencies"], absent, partial)


def _things(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is learnt of an image's objects: no crowds, no boxes without area."""
    return [t for t in found if not t.get("iscrowd") and min(t["bbox"][2:]) > 0]


def _corners(things: Sequence[dict[str, Any]]) -> Tensor:
    corners = torch.tensor([t["bbox"] for t in things], dtype=torch.float32).view(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners


def _target(things: Sequence[dict[str, Any]], size: int, model: str, keypoints: int) -> Target:
    """Boxes `(n, 4)` as corners, labels from 1, masks `(n, S, S)` uint8, keypoints `(n, K, 3)`."""
    corners = _corners(things)
    target = {"boxes": corners, "labels": torch.tensor([t["category"] + 1 for t in things], dtype=torch.int64)}
    if model == "mask":
        drawn = [masks.decode(t["segmentation"], size, size) for t in things]
        target["masks"] = torch.from_numpy(np.array(drawn, np.uint8).reshape(-1, size, size))
    elif model == "keypoint":
        points = [t["keypoints"] for t in things]
        target["keypoints"] = torch.tensor(points, dtype=torch.float32).view(len(things), keypoints, 3)
    return target


def _mirror(target: Target, size: int, swap: Sequence[int]) -> Target:
    """The target of the horizontally flipped image; keypoint i is what was keypoint swap[i] (left <-> right)."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    mirrored = {**target, "boxes": torch.stack([size - x2, y1, size - x1, y2], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    if "keypoints" in target:
        points = target["keypoints"].clone()
        points[..., 0] = size - points[..., 0]
        mirrored["keypoints"] = points[:, list(swap)]
    return mirrored
