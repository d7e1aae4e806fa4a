"""COCO's numbers through faster-coco-eval: 12 for boxes and masks, 10 for keypoints; -1 (nothing to judge) is None.

LVIS's are federated: a category counts in an image only where it was looked for. Source: Gupta, Dollar and Girshick,
LVIS: a dataset for large vocabulary instance segmentation (2019); rules as in their lvis-api.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from numpy.typing import NDArray

KINDS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
BOX_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
LVIS_STATS = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium",
              "APl": "AP_large", "APr": "APr", "APc": "APc", "APf": "APf", "AR300": "AR_all", "ARs": "AR_small",
              "ARm": "AR_medium", "ARl": "AR_large"}  # fmt: skip
LVIS_DETECTIONS = 300
"""Most detections of an image that count."""


@dataclass(frozen=True)
class Federated:
    """What LVIS knows of its labels.

    Attributes:
        frequencies: r, c or f (rare, common, frequent) of each category.
        absent: Categories of each image that were looked for in vain: a find is false.
        partial: Categories of each image that were not labelled exhaustively: a find without a label is ignored. Finds
            of a category that is neither labelled nor in `absent` are ignored, too.
    """

    frequencies: Sequence[str]
    absent: Sequence[Sequence[int]]
    partial: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        boxes: `(n, 4)` x, y, width, height in pixels.
        scores: `(n,)`, falling.
        labels: `(n,)` categories from 0.
        masks: Compressed RLE per object, or None.
        keypoints: `(n, K, 3)` x, y, score, or None.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: list[dict[str, Any]] | None = None
    keypoints: NDArray[np.float64] | None = None


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Compressed RLE of a `(H, W)` mask, with text counts as in COCO's JSON."""
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = code["counts"]
    return {"size": [int(n) for n in code["size"]], "counts": counts if isinstance(counts, str) else counts.decode()}


def ground_truth(
    objects: Sequence[Sequence[dict[str, Any]]], size: int, categories: int, federated: Federated | None = None
) -> COCO:
    """A COCO index over images 1..n from the objects of each image (see `data.shards`)."""
    annotations: list[dict[str, Any]] = []
    for image, found in enumerate(objects):
        for thing in found:
            points = thing.get("keypoints") or []
            annotations.append(
                {**thing, "id": len(annotations) + 1, "image_id": image + 1, "category_id": thing["category"] + 1,
                 "iscrowd": thing.get("iscrowd", 0), "keypoints": points,
                 "num_keypoints": sum(v > 0 for v in points[2::3])}
            )  # fmt: skip
    images: list[dict[str, Any]] = [{"id": i + 1, "width": size, "height": size} for i in range(len(objects))]
    names: list[dict[str, Any]] = [{"id": i + 1, "name": str(i)} for i in range(categories)]
    if federated is not None:
        for name, kind in zip(names, federated.frequencies, strict=True):
            name["frequency"] = kind
        for facts, absent, partial in zip(images, federated.absent, federated.partial, strict=True):
            facts["neg_category_ids"] = [category + 1 for category in absent]
            facts["not_exhaustive_category_ids"] = [category + 1 for category in partial]
    return COCO({"images": images, "annotations": annotations, "categories": names})


def results(predictions: Sequence[Prediction], task: str) -> list[dict[str, Any]]:
    """Predictions as COCO's result list of one task."""
    found = []
    for image, p in enumerate(predictions):
        for i in range(len(p.scores)):
            item: dict[str, Any] = {
                "image_id": image + 1, "category_id": int(p.labels[i]) + 1, "score": float(p.scores[i])
            }  # fmt: skip
            if task == "box":
                item["bbox"] = [float(v) for v in p.boxes[i]]
            elif task == "mask":
                assert p.masks is not None
                item["segmentation"] = dict(p.masks[i])
            else:
                assert p.keypoints is not None
                item["keypoints"] = [float(v) for v in p.keypoints[i].reshape(-1)]
            found.append(item)
    return found


def evaluate(
    truth: COCO, predictions: Sequence[Prediction], task: str, sigmas: Sequence[float] | None = None
) -> dict[str, float | None]:
    """COCO's numbers in percent.

    Args:
        truth: See `ground_truth`.
        predictions: One per image, in the order of the images.
        task: "box", "mask" or "keypoint"; not "keypoint" for a federated index.
        sigmas: OKS sigma of each keypoint, as a share of sqrt(mask area); COCO's own are never assumed.

    Returns:
        Statistic -> percent, None where the evaluator has nothing to judge.
    """
    if task == "keypoint" and sigmas is None:
        raise ValueError("keypoint evaluation needs the OKS sigmas")
    judge = COCOeval_faster(
        truth,
        truth.loadRes(results(predictions, task)),
        KINDS[task],
        kpt_oks_sigmas=None if sigmas is None else list(sigmas),
        rle_iou_max_workers=1,
    )
    if "neg_category_ids" in next(iter(truth.imgs.values()), {}):
        return _federated(judge)
    judge.run()
    names = KEYPOINT_STATS if task == "keypoint" else BOX_STATS
    return {name: _percent(value) for name, value in zip(names, judge.stats, strict=True)}


def _federated(judge: COCOeval_faster) -> dict[str, float | None]:
    judge.lvis_style, judge.params.maxDets = True, [LVIS_DETECTIONS]
    judge.run()
    return {name: _percent(judge.stats_as_dict[label]) for name, label in LVIS_STATS.items()}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
