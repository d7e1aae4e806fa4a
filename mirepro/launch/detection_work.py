"""What detection stages compute, hold and write; multiply-adds are counted on the detector's own modules."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mirepro import encoders, files, objectives
from mirepro.data import images as stored
from mirepro.errors import UserError
from mirepro.launch.work import Work
from mirepro.params import DetectParams, EncoderParams, RunParams
from mirepro.transfer import detection_model
from mirepro.transfer.detection import SHOWN
from mirepro.transfer.detection_model import Detector
from mirepro.transfer.detection_training import Variant

FIND = 200
"""Bytes of a find in detections.json, about; keypoints and large masks take more."""
OBJECTS = 8
"""Objects of an image, whose masks are drawn for a step; COCO has 7.3 on average, LVIS more."""


@dataclass(frozen=True)
class Scenes:
    """How much data a detection stage reads: images of each split, categories, keypoints of an object."""

    train: int
    val: int
    test: int
    categories: int
    keypoints: int = 0


SIZES = {"coco": Scenes(106_459, 11_828, 5000, 80, 17), "voc": Scenes(14_896, 1655, 4952, 20),
         "lvis": Scenes(90_153, 10_017, 19_809, 1203)}  # fmt: skip
"""Of data sets that may not be here; a tenth of the training images is val."""


@dataclass(frozen=True)
class Cost:
    """Of one detector.

    Attributes:
        trunk: Multiply-adds of an image's maps.
        learnt: Those of pyramid and heads, where it is learnt from.
        tested: The same in a test.
        weights: Parameters.
        values: Values of the maps of an image.
    """

    trunk: float
    learnt: float
    tested: float
    weights: int
    values: int


def scenes(root: Path, name: str) -> Scenes:
    """Sizes of a data set: its manifest's, else those that are known."""
    path = root / "data" / name / "manifest.json"
    if not path.is_file() and name not in SIZES:
        raise UserError(f"{path}: no such file, and the size of {name} is not known otherwise; import the data")
    if not path.is_file():
        return SIZES[name]
    manifest = files.read_json(path)
    train, val, test = (manifest["splits"][split]["samples"] for split in ("train", "val", "test"))
    meta = manifest["meta"]
    return Scenes(train, val, test, len(meta["categories"]), len(meta.get("keypoints", {}).get("names", [])))


def detection(run: RunParams, model: str, params: DetectParams, sizes: Scenes) -> Work:
    """A detection stage: every learning rate and variant is trained, val is read for each rate, test for each variant.

    Repeat-factor sampling makes an epoch longer by what the data decide, which is not counted.
    """
    each = cost(run.pretrain.encoder, objectives.load(run.objective).modalities, model, params, sizes)
    lr = max(params.lrs)
    others = {Variant(lr, params.long), Variant(lr, frozen=True)}
    trained = others | {Variant(each) for each in params.lrs}
    epochs = params.keypoint_epochs if model == "keypoint" else params.epochs
    maps = 2 * sizes.train * 4 * each.values  # of both views; a frozen trunk's are kept where they fit
    seen = sum(
        epochs * variant.length * 3 * (each.learnt + each.trunk * (not variant.frozen))
        # the statistics of BatchNorm, and both views of every image, or one at every step
        + each.trunk * variant.frozen * (1 + (2 if maps <= stored.MEMORY else epochs * variant.length))
        for variant in trained
    )
    tested = len(others | {Variant(lr), Variant(params.fixed_lr)})  # at most: the chosen rate may be the fixed one
    tests = (each.trunk + each.tested) * (sizes.val * len(params.lrs) + sizes.test * tested)
    decoded = [3 * params.size**2 * count for count in (sizes.train, sizes.val, sizes.test)]
    held = sum(size for size in decoded if size <= stored.MEMORY) + 2 * maps * (maps <= stored.MEMORY)
    held += 16 * each.weights * len(trained) + params.batch * params.size**2 * (12 + 2 * OBJECTS * (model == "mask"))
    shown = SHOWN * params.detections * FIND
    return Work(0.0, 0.0, 0.0, 0.0, held, shown, detector=seen * sizes.train + tests)


@cache
def cost(encoder: EncoderParams, modalities: tuple[str, ...], model: str, params: DetectParams, sizes: Scenes) -> Cost:
    """Counts the parts on shapes alone; RoIs are as many as may be, so that fewer objects make it an upper bound."""
    with torch.device("meta"):
        trunk = encoders.Ensemble(encoder, modalities)
        detector = detection_model.build(trunk, model, params, sizes.categories, sizes.keypoints).eval()
        image = torch.empty(1, 3, params.size, params.size)
        positive = int(params.roi_samples * params.roi_positive)
        looked, maps = counted(lambda: detector.backbone.maps(image))
        dense, _ = counted(lambda: _dense(detector, maps))
        learnt = _rois(detector, model, params, params.roi_samples, positive)
        tested = _rois(detector, model, params, params.proposals, params.detections)
    values = sum(level.numel() for level in maps)
    return Cost(looked, dense + learnt, dense + tested, encoders.count(detector), values)


def counted(compute: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    """Multiply-adds of a computation, and its result."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = compute()
    return counter.get_total_flops() / 2, result


def _dense(detector: Detector, maps: list[Tensor]) -> list[Tensor]:
    """What is computed everywhere in an image: the pyramid and the proposals' scores and boxes."""
    fused = list(detector.backbone.fuse(maps).values())
    scores, boxes = detector.rcnn.rpn.head(fused)
    return [*scores, *boxes]


def _rois(detector: Detector, model: str, params: DetectParams, boxes: int, finds: int) -> float:
    """Multiply-adds of the heads on so many RoIs of the box head and of the model's own head."""
    heads = detector.rcnn.roi_heads
    pooled = torch.empty(boxes, params.fpn, params.box_pool, params.box_pool)
    total, _ = counted(lambda: list(heads.box_predictor(heads.box_head(pooled))))
    if model != "box" and finds:
        side = (params.mask if model == "mask" else params.keypoint).pool
        head, predictor = getattr(heads, f"{model}_head"), getattr(heads, f"{model}_predictor")
        own, _ = counted(lambda: [predictor(head(torch.empty(finds, params.fpn, side, side)))])
        total += own
    return total
