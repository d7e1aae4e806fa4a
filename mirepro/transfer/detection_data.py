"""Scenes as tensors: images at their final size, torchvision targets with their mirror images, COCO ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core.coco import COCO
from torch import Tensor

from mirepro.data import masks, shards
from mirepro.errors import UserError
from mirepro.transfer import coco_eval

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Scenes:
    """One split.

    Attributes:
        images: `(N, 3, S, S)` float32 in [0, 1].
        objects: COCO objects of each image, `category` numbered from 0 among the used categories.
        targets: Torchvision targets of each image, and of its mirror image.
        categories: Names of the used categories.
        sigmas: OKS sigma per keypoint; empty for data without keypoints.
    """

    images: Tensor
    objects: list[list[dict[str, Any]]]
    targets: tuple[list[Target], list[Target]]
    categories: list[str]
    sigmas: list[float]

    def truth(self) -> COCO:
        """COCO's index of the objects."""
        return coco_eval.ground_truth(self.objects, self.images.shape[-1], len(self.categories))


def load(split: shards.Split, model: str, size: int, sigma: float | None = None) -> Scenes:
    """Reads a split for one model.

    Args:
        split: Opened split of a data set with objects.
        model: "mask", or "keypoint", which uses the categories that have keypoints only.
        size: Side in pixels.
        sigma: OKS sigma of every keypoint; None takes the data's own.

    Raises:
        UserError: The data have no such objects.
    """
    objects, points = split.objects_at(size), split.keypoints if model == "keypoint" else {}
    used = _used(objects, model)
    if not used:
        raise UserError(f"detect: the data have no objects with {model}s; use a data set that has them")
    number = {category: i for i, category in enumerate(used)}
    kept = [
        [{**thing, "category": number[thing["category"]]} for thing in found if thing["category"] in number]
        for found in objects
    ]
    targets = [_target(found, size, model) for found in kept]
    swap = points.get("flips", [])
    return Scenes(
        torch.from_numpy(split.images(size)).float() / 255,
        kept,
        (targets, [_mirror(target, size, swap) for target in targets]),
        [split.categories[category] for category in used],
        [float(own if sigma is None else sigma) for own in points.get("sigmas", [])],
    )


def _used(objects: Sequence[Sequence[dict[str, Any]]], model: str) -> list[int]:
    key = "segmentation" if model == "mask" else "keypoints"
    return sorted({thing["category"] for found in objects for thing in found if thing.get(key)})


def _target(found: Sequence[dict[str, Any]], size: int, model: str) -> Target:
    """Boxes `(n, 4)` as corners, labels from 1, masks `(n, S, S)` uint8 or keypoints `(n, K, 3)`; crowds left out."""
    things = [t for t in found if not t.get("iscrowd") and min(t["bbox"][2:]) > 0]
    corners = torch.tensor([t["bbox"] for t in things], dtype=torch.float32).view(-1, 4)
    corners[:, 2:] += corners[:, :2]
    target = {"boxes": corners, "labels": torch.tensor([t["category"] + 1 for t in things], dtype=torch.int64)}
    if model == "mask":
        drawn = [masks.decode(t["segmentation"], size, size) for t in things]
        target["masks"] = torch.from_numpy(np.array(drawn, np.uint8).reshape(-1, size, size))
    else:
        points = [t["keypoints"] for t in things]
        target["keypoints"] = torch.tensor(points, dtype=torch.float32).view(len(things), -1, 3)
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
        mirrored["keypoints"] = points[:, list(swap)] if len(points) else points
    return mirrored
