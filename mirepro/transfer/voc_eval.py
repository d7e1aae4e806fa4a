"""PASCAL VOC's own average precision at IoU .5: over 11 recalls (VOC 2007) and as an area (VOC 2010 and later).

The devkit's rules: detections of a class by falling score; each belongs to the object of its class and image with the
highest IoU, difficult ones included. IoU >= .5 with an object that nobody took is a hit, with a taken one a false
positive (a duplicate), with a difficult one nothing at all, and everything else is a false positive. Difficult objects
do not count among those to be found.

Pixels: the devkit's corners include the last pixel, so that a box is `xmax - xmin + 1` wide. `data.voc` stores that
width from the edge `xmin - 1`, hence edges without the 1 give the devkit's areas and IoU, and resizing an image changes
none of them. The devkit compares recalls with the floats 0:.1:1, here whole numbers are compared (3 of 10 do reach .3).

Source: Everingham et al., The PASCAL visual object classes challenge (2010); VOCevaldet.m and VOCap.m of its devkit.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirepro.transfer.coco_eval import Prediction

OVERLAP = 0.5
_RULES = "mean over classes, difficult objects neither counted nor penalised"
PROTOCOLS = {
    "VOC07": f"PASCAL VOC 2007's AP at IoU .5, precision at 11 recalls, {_RULES}",
    "VOC10": f"PASCAL VOC 2010's AP at IoU .5, area under the curve, {_RULES}",
}
"""Statistic -> how it is measured."""

Objects = Sequence[Sequence[dict[str, Any]]]


def evaluate(objects: Objects, predictions: Sequence[Prediction], categories: int) -> dict[str, float | None]:
    """The devkit's numbers in percent.

    Args:
        objects: Objects of each image (see `data.shards`); `iscrowd` means difficult.
        predictions: One per image. Equal scores count in the order of the images, then of the finds in their image.
        categories: Number of classes.

    Returns:
        Statistic -> percent, the mean over the classes that have an object to be found; None where none has.
    """
    judged = [judge(objects, predictions, category) for category in range(categories)]
    known = [(hits, count) for hits, count in judged if count]
    if not known:
        return dict.fromkeys(PROTOCOLS)
    return {
        name: 100 * math.fsum(measure(hits, count) for hits, count in known) / len(known)
        for name, measure in (("VOC07", eleven_points), ("VOC10", area))
    }


def judge(objects: Objects, predictions: Sequence[Prediction], category: int) -> tuple[NDArray[np.bool_], int]:
    """Judges the finds of one class.

    Returns:
        Whether each find that counts is a hit `(n,)`, by falling score, and the number of objects to be found.
    """
    scores, targets, difficult = [np.zeros(0)], [np.zeros(0, np.int64)], [False]
    for things, found in zip(objects, predictions, strict=True):
        own = [thing for thing in things if thing["category"] == category]
        mine = found.labels == category
        nearest = assign(found.boxes[mine], np.array([thing["bbox"] for thing in own], np.float64).reshape(-1, 4))
        scores.append(found.scores[mine])
        targets.append(np.where(nearest < 0, 0, nearest + len(difficult)))
        difficult += [bool(thing.get("iscrowd")) for thing in own]
    target = np.concatenate(targets)[np.argsort(-np.concatenate(scores), kind="stable")]
    target = target[~np.array(difficult)[target]]
    hits = np.zeros(len(target), np.bool_)
    hits[np.unique(target, return_index=True)[1]] = True  # the surest find of each object
    return hits & (target > 0), len(difficult) - 1 - sum(difficult)  # number 0 is no object


def assign(found: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The object of highest IoU for each find, the first of equal ones; -1 where that IoU is below `OVERLAP`.

    Args:
        found: `(n, 4)` x, y, width, height.
        boxes: `(m, 4)` of the objects, with an area.

    Returns:
        `(n,)` indices.
    """
    if not len(boxes):
        return np.full(len(found), -1)
    near, far = found[:, None, :2], found[:, None, :2] + found[:, None, 2:]
    sides = np.minimum(far, boxes[:, :2] + boxes[:, 2:]) - np.maximum(near, boxes[:, :2])
    common = np.maximum(sides, 0).prod(2)
    iou = common / (found[:, 2:].prod(1)[:, None] + boxes[:, 2:].prod(1) - common)
    return np.where(iou.max(1) >= OVERLAP, iou.argmax(1), -1)


def precision(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(n,)` precision of the first 1..n finds."""
    return np.cumsum(hits) / np.arange(1, len(hits) + 1)


def eleven_points(hits: NDArray[np.bool_], count: int) -> float:
    """Mean over the recalls 0, .1, ..., 1 of the highest precision at that recall or a higher one, 0 beyond the last.

    Args:
        hits: See `judge`.
        count: Objects to be found, at least 1.
    """
    values, found = precision(hits), np.cumsum(hits)
    return math.fsum(values[10 * found >= tenth * count].max(initial=0) for tenth in range(11)) / 11


def area(hits: NDArray[np.bool_], count: int) -> float:
    """Area under the precision that was made to fall with recall; arguments as of `eleven_points`."""
    highest = np.maximum.accumulate(precision(hits)[::-1])[::-1]
    return math.fsum(highest[hits]) / count  # recall rises by 1 / count at each hit
