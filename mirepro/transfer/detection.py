"""Detection transfer by one protocol for every row: rates on train, choice on val, test read once at the end.

Four variants per model: `tuned` (the rate with the best val AP50), `fixed` (the rate all rows share), `long` (a longer
schedule at the chosen rate) and `frozen` (the chosen rate, trunk untouched). The recipe is torchvision's with AdamW in
place of SGD, because a few hundred steps must do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirepro import checkpoint, encoders, files
from mirepro.data import shards
from mirepro.errors import UserError
from mirepro.params import DetectParams
from mirepro.progress import Bar
from mirepro.transfer import coco_eval, detection_data, detection_model, sampling, voc_eval
from mirepro.transfer.coco_eval import Prediction
from mirepro.transfer.detection_data import Scenes
from mirepro.transfer.detection_model import Detector
from mirepro.transfer.detection_training import Training, Variant, set_mode

MODELS = {"box": "Faster", "mask": "mask", "keypoint": "keypoint"}
SHOWN, SHOWN_SCORE = 12, 0.3


def check(model: str, params: DetectParams) -> None:
    """Refuses impossible parameters with UserError."""
    if model not in MODELS:
        raise UserError(f"detect model: {model!r} is unknown; known: {', '.join(MODELS)}")
    if params.fixed_lr not in params.lrs or min(params.lrs) <= 0:
        raise UserError(f"detect.fixed_lr: {params.fixed_lr} must be one of detect.lrs = {list(params.lrs)}, all > 0")
    for key in ("size", "batch", "epochs", "keypoint_epochs", "long", "fpn", "min_stride", "detections"):
        if getattr(params, key) < 1:
            raise UserError(f"detect.{key}: {getattr(params, key)} is impossible; use 1 or more")
    if not 0 <= params.warmup < 1 or not params.anchors:
        raise UserError("detect.warmup, detect.anchors: use a share in [0, 1) and at least one anchor level")
    for key in ("flip", "min_recall"):
        if not 0 <= getattr(params, key) <= 1:
            raise UserError(f"detect.{key}: {getattr(params, key)} is impossible; use a share in [0, 1]")
    if not 0 <= params.repeat_threshold <= 1:
        raise UserError(
            f"detect.repeat_threshold: {params.repeat_threshold} is impossible; use a share in [0, 1], 0 for no repeats"
        )


def anchor_recall(detector: Detector, scenes: Scenes, params: DetectParams) -> float:
    """Share of a split's boxes that some anchor meets; less than `min_recall` is refused with UserError."""
    recall = detector.anchor_recall(scenes.boxes())
    if recall < params.min_recall:
        raise UserError(
            f"detect.anchors: only {recall:.1%} of the boxes meet an anchor, less than detect.min_recall = "
            f"{params.min_recall:.1%}; change the anchors' sizes, or lower detect.min_recall"
        )
    return recall


@torch.no_grad()
def predict(detector: Detector, scenes: Scenes, batch: int) -> list[Prediction]:
    """Predictions for all images, in evaluation mode."""
    set_mode(detector, False, True)
    found: list[Prediction] = []
    for index in scenes.batches(batch):
        found += map(_prediction, detector.predict(detector.maps(scenes.pictures(index))))
    return found


def _prediction(found: dict[str, Tensor]) -> Prediction:
    item = {name: value.cpu() for name, value in found.items()}
    boxes = item["boxes"].double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    masks = [coco_eval.encode(mask[0]) for mask in (item["masks"] >= 0.5).numpy()] if "masks" in item else None
    points = item["keypoints"].double().numpy() if "keypoints" in item else None
    return Prediction(boxes, item["scores"].double().numpy(), item["labels"].numpy() - 1, masks, points)


def score(scenes: Scenes, predictions: Sequence[Prediction], model: str, params: DetectParams) -> dict[str, Any]:
    """COCO's numbers per task; keypoint AP also at other OKS sigmas (`AP@x0.5` = half of them); VOC's own on VOC."""
    truth = scenes.truth()
    stats: dict[str, Any] = {"box": coco_eval.evaluate(truth, predictions, "box")}
    if scenes.voc:
        stats["box"] |= voc_eval.evaluate(scenes.objects, predictions, len(scenes.categories))
    if model != "box":
        stats[model] = coco_eval.evaluate(truth, predictions, model, scenes.sigmas or None)
    for factor in params.sensitivity if model == "keypoint" else ():
        other = coco_eval.evaluate(truth, predictions, model, [factor * sigma for sigma in scenes.sigmas])
        stats[model] |= {f"{name}@x{factor:g}": other[name] for name in ("AP", "AP50")}
    return stats


def val_score(stats: dict[str, Any]) -> float:
    """What the learning rate is chosen by: AP50 averaged over the model's tasks."""
    return float(np.mean([task["AP50"] or 0.0 for task in stats.values()]))


class Bench:
    """Trains the variants of one run, keeping each, finished or not, in a folder until the stage is done."""

    def __init__(
        self,
        name: str,
        fresh: Callable[[], Detector],
        scenes: Scenes,
        params: DetectParams,
        seed: int,
        work: Path,
        fingerprint: str,
    ) -> None:
        self.name, self.fresh, self.scenes, self.params, self.seed = name, fresh, scenes, params, seed
        self.work, self.fingerprint = work, fingerprint

    def detector(self, variant: Variant) -> Detector:
        """The trained detector of a variant; where an earlier, interrupted stage began it, the training goes on.

        Raises:
            UserError: What is there belongs to another run or variant.
        """
        training = Training(self.fresh().to(self.params.device), self.scenes, variant, self.params, self.seed)
        folder, mark = self.work / variant.name, f"{self.fingerprint[:12]} {variant.name}"
        training.resume(checkpoint.load(folder, mark))
        clock, batch = checkpoint.Clock(), self.params.batch

        def after(loss: float) -> None:
            bar.advance(batch, loss=loss)
            if training.step == training.steps or clock.due(within=True):
                with clock.writing():
                    checkpoint.save(folder, mark, training.tensors(), {"step": training.step})

        with Bar(f"{self.name} {variant.name}", training.steps * batch, training.step * batch) as bar:
            training.run(after)
        return training.detector


def _choose(bench: Bench, val: Scenes, model: str, params: DetectParams) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best val score (the smaller one wins a tie), and the whole grid."""
    grid = {}
    for lr in sorted(params.lrs):
        found = predict(bench.detector(Variant(lr)), val, params.batch)
        stats = score(val, found, model, params)
        grid[f"{lr:g}"] = {task: stats[task]["AP50"] for task in stats} | {"score": val_score(stats)}
    chosen = max(sorted(params.lrs), key=lambda lr: grid[f"{lr:g}"]["score"])
    return chosen, grid


def _shown(predictions: Sequence[Prediction], size: int) -> dict[str, Any]:
    """Finds on the first test images, in pixels of images of this size."""
    images = []
    for i, p in enumerate(predictions[:SHOWN]):
        keep = np.flatnonzero(p.scores >= SHOWN_SCORE)
        images.append(
            {
                "index": i,
                "boxes": p.boxes[keep].round(3).tolist(),
                "scores": p.scores[keep].round(4).tolist(),
                "labels": p.labels[keep].tolist(),
                "masks": None if p.masks is None else [p.masks[j] for j in keep],
                "keypoints": None if p.keypoints is None else p.keypoints[keep, :, :2].round(3).tolist(),
            }
        )
    return {"split": "test", "size": size, "images": images}


def _protocol(name: str, variant: Variant, model: str, params: DetectParams) -> str:
    trunk = "trunk frozen" if variant.frozen else "trunk fine-tuned"
    choice = "fixed" if name == "fixed" else "chosen on val AP50"
    repeats = f", repeat-factor sampling with t = {params.repeat_threshold:g}" if params.repeat_threshold else ""
    return (
        f"torchvision recipe, {MODELS[model]} R-CNN + FPN, {trunk}; AdamW, lr {variant.lr:g} ({choice}), "
        f"{params.epochs * variant.length} epochs of batch {params.batch}{repeats}, linear decay with warm-up; test"
    )


def _variants(chosen: float, params: DetectParams) -> dict[str, Variant]:
    return {
        "tuned": Variant(chosen),
        "fixed": Variant(params.fixed_lr),
        "long": Variant(chosen, params.long),
        "frozen": Variant(chosen, frozen=True),
    }


def _cells(
    stats: dict[str, Any], variants: dict[str, Variant], model: str, params: DetectParams
) -> dict[str, dict[str, Any]]:
    """`<task>_<statistic>_<variant>` with the protocol beside each number."""
    cells = {}
    for label, variant in variants.items():
        shared = _protocol(label, variant, model, params)
        for task, values in stats[label].items():
            for name, value in values.items():
                own = voc_eval.PROTOCOLS.get(name)
                protocol = f"{shared}; {own}" if own else shared
                cells[f"{task}_{name}_{label}"] = {"value": value, "unit": "%", "protocol": protocol}
    return cells


def detect(
    run: str,
    row: str,
    seed: int,
    model: str,
    params: DetectParams,
    pretrained: Path,
    data_folder: Path,
    work: Path,
    out: Path,
    fingerprint: str,
) -> dict[str, Any]:
    """Runs the protocol on one pretrained trunk.

    Args:
        run: Name of the pretraining run.
        row: Its row in the tables.
        seed: Seed of heads, order and sampling.
        model: "box", "mask" or "keypoint".
        params: Sizes, schedules and rates.
        pretrained: Folder with `encoder.safetensors`.
        data_folder: Data set with objects.
        work: Folder that survives a kill; the variants' checkpoints wait there.
        out: Folder for `detections.json`.
        fingerprint: Names the run; variants of another one are refused.

    Returns:
        The metrics JSON.

    Raises:
        UserError: Bad parameters, no such objects, or anchors that meet less than `min_recall` of val's boxes.
    """
    check(model, params)
    params = replace(params, epochs=params.keypoint_epochs if model == "keypoint" else params.epochs)

    def read(split: str, used: list[int] | None = None) -> Scenes:
        return detection_data.load(shards.open(data_folder, split), model, params.size, params.oks_sigma, used)

    train_set = read("train")
    val = read("val", train_set.used)

    def fresh() -> Detector:
        trunk = encoders.load(pretrained / "encoder.safetensors")
        detector = detection_model.build(trunk, model, params, len(train_set.categories), len(train_set.sigmas))
        detection_model.initialise(detector, seed)
        return detector

    recall = anchor_recall(fresh(), val, params)
    bench = Bench(f"{run} {model}", fresh, train_set, params, seed, work, fingerprint)
    chosen, grid = _choose(bench, val, model, params)
    variants = _variants(chosen, params)
    detectors = {variant: bench.detector(variant) for variant in dict.fromkeys(variants.values())}
    test = read("test", train_set.used)
    found = {variant: predict(detector, test, params.batch) for variant, detector in detectors.items()}
    stats = {label: score(test, found[variant], model, params) for label, variant in variants.items()}
    files.write_json(out / "detections.json", _shown(found[variants["tuned"]], params.size))
    steps = partial(sampling.steps, train_set.repeat_factors(params.repeat_threshold), params.batch, seed=seed)
    detail = {
        "anchor_recall": recall, "categories": train_set.categories, "chosen": chosen, "grid": grid,
        "images": {"train": len(train_set), "val": len(val), "test": len(test)},
        "images_seen": {
            label: params.batch * steps(epochs=params.epochs * variant.length) for label, variant in variants.items()
        },
        "oks_sigmas": train_set.sigmas, "parameters": encoders.count(detectors[variants["tuned"]]),
        "trials": len(params.lrs),
    }  # fmt: skip
    head = {"schema": "mirepro.metrics/1", "stage": "detect", "run": run, "row": row, "seed": seed, "model": model}
    return head | {"cells": _cells(stats, variants, model, params), "detail": detail}
