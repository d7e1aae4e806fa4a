"""Detection transfer by one protocol for every row: rates on train, choice on val, test read once at the end.

Four variants per model: `tuned` (the rate with the best val AP50), `fixed` (the rate all rows share), `long` (a longer
schedule at the chosen rate) and `frozen` (the chosen rate, trunk untouched). The recipe is torchvision's with AdamW in
place of SGD, because a few hundred steps must do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirepro import checkpoint, encoders, files, rng
from mirepro.data import shards
from mirepro.errors import UserError
from mirepro.params import DetectParams
from mirepro.transfer import coco_eval, detection_data, detection_model, sampling, voc_eval
from mirepro.transfer.coco_eval import Prediction
from mirepro.transfer.detection_data import Scenes
from mirepro.transfer.detection_model import Detector

MODELS = {"box": "Faster", "mask": "mask", "keypoint": "keypoint"}
SHOWN, SHOWN_SCORE = 12, 0.3
_SAMPLING = 1 << 40  # sample number of the keys that seed torch's RoI sampling; images have smaller ones


@dataclass(frozen=True)
class Variant:
    """One training: learning rate, factor of the schedule, and whether the trunk stays as it is."""

    lr: float
    length: int = 1
    frozen: bool = False

    @property
    def name(self) -> str:
        """Name of its file in the resume folder."""
        return f"lr{self.lr:g}-x{self.length}{'-frozen' if self.frozen else ''}"


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
    if not 0 <= params.flip <= 1:
        raise UserError(f"detect.flip: {params.flip} is impossible; use a share in [0, 1]")
    if not 0 <= params.repeat_threshold <= 1:
        raise UserError(
            f"detect.repeat_threshold: {params.repeat_threshold} is impossible; use a share in [0, 1], 0 for no repeats"
        )


def set_mode(detector: Detector, training: bool, frozen: bool) -> None:
    """Training or evaluation mode; a frozen trunk keeps its running statistics and takes no gradient."""
    detector.train(training)
    trunk = detector.backbone.trunk
    trunk.train(training and not frozen)
    trunk.requires_grad_(not frozen)


@torch.no_grad()
def calibrate(detector: Detector, images: Tensor, batch: int) -> None:
    """Running statistics of the trunk's BatchNorm = averages over the training images, for every row alike."""
    norms = [m for m in detector.backbone.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    detector.backbone.trunk.train()
    for part in images.split(batch):
        detector.backbone.maps(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Feed:
    """Maps of the trunk for chosen images, mirrored where asked; a frozen trunk computes them once."""

    def __init__(self, detector: Detector, images: Tensor, batch: int, frozen: bool) -> None:
        self.detector, self.images, self.cache = detector, images, None
        if frozen:
            calibrate(detector, images, batch)
            set_mode(detector, False, True)
            with torch.no_grad():
                parts = [detector.backbone.maps(x) for x in torch.cat([images, images.flip(-1)]).split(batch)]
            self.cache = [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def maps(self, index: Tensor, mirrored: Tensor) -> list[Tensor]:
        """Images `(B,)` int64 and whether each is mirrored `(B,)` bool -> the maps that the FPN uses."""
        if self.cache is not None:
            return [maps[index + mirrored * len(self.images)] for maps in self.cache]
        x = self.images[index]
        return self.detector.backbone.maps(torch.where(mirrored[:, None, None, None], x.flip(-1), x))


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first share `warmup` of the steps, then a linear fall to 0; in (0, 1]."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def train(detector: Detector, scenes: Scenes, variant: Variant, params: DetectParams, seed: int) -> None:
    """Trains in place.

    Torchvision samples anchors and RoIs with torch's generator, which gets a key of its own for every step.

    Raises:
        UserError: The loss is no number any more.
    """
    factors, epochs = scenes.repeat_factors(params.repeat_threshold), params.epochs * variant.length
    feed = Feed(detector, scenes.images, params.batch, variant.frozen)
    set_mode(detector, True, variant.frozen)
    weights = [p for p in detector.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, variant.lr, weight_decay=params.weight_decay, fused=True)
    steps = sampling.steps(factors, params.batch, epochs, seed)
    for step, index, mirrored in sampling.batches(factors, params.batch, epochs, params.flip, seed):
        torch.manual_seed(int(rng.words(seed, rng.Stream.TRANSFER, step, [_SAMPLING], 1)[0, 0]))
        optimiser.param_groups[0]["lr"] = variant.lr * rate(step, steps, params.warmup)
        chosen = zip(mirrored.tolist(), index.tolist(), strict=True)
        targets = [scenes.targets[side][i] for side, i in chosen]
        loss = torch.stack(list(detector.losses(feed.maps(index, mirrored), targets).values())).sum()
        if not torch.isfinite(loss):
            raise UserError(f"detect: the loss is {loss.item()} at step {step} with lr {variant.lr}; lower detect.lrs")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, params.clip)
        optimiser.step()


@torch.no_grad()
def predict(detector: Detector, images: Tensor, batch: int) -> list[Prediction]:
    """Predictions of images `(N, 3, S, S)`, in evaluation mode."""
    set_mode(detector, False, True)
    found = []
    for part in images.split(batch):
        found += detector.predict(detector.backbone.maps(part))
    return [_prediction(item) for item in found]


def _prediction(item: dict[str, Tensor]) -> Prediction:
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
    """Trains the variants of one run, keeping each finished one in a folder until the stage is done."""

    def __init__(
        self,
        fresh: Callable[[], Detector],
        scenes: Scenes,
        params: DetectParams,
        seed: int,
        work: Path,
        fingerprint: str,
    ) -> None:
        self.fresh, self.scenes, self.params, self.seed = fresh, scenes, params, seed
        self.work, self.fingerprint = work, fingerprint

    def detector(self, variant: Variant) -> Detector:
        """The trained detector of a variant: read if an earlier, interrupted stage finished it, else trained.

        Raises:
            UserError: What is there belongs to another run or variant.
        """
        detector, folder = self.fresh(), self.work / variant.name
        mark = f"{self.fingerprint[:12]} {variant.name}"
        saved = checkpoint.load(folder, mark)
        if saved is not None:
            detector.load_state_dict(saved.tensors)
            return detector
        train(detector, self.scenes, variant, self.params, self.seed)
        checkpoint.save(folder, mark, detector.state_dict(), {})
        return detector


def _choose(bench: Bench, val: Scenes, model: str, params: DetectParams) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best val score (the smaller one wins a tie), and the whole grid."""
    grid = {}
    for lr in sorted(params.lrs):
        found = predict(bench.detector(Variant(lr)), val.images, params.batch)
        stats = score(val, found, model, params)
        grid[f"{lr:g}"] = {task: stats[task]["AP50"] for task in stats} | {"score": val_score(stats)}
    chosen = max(sorted(params.lrs), key=lambda lr: grid[f"{lr:g}"]["score"])
    return chosen, grid


def _shown(predictions: Sequence[Prediction]) -> dict[str, Any]:
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
    return {"split": "test", "images": images}


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
        work: Folder that survives a kill; finished variants wait there.
        out: Folder for `detections.json`.
        fingerprint: Names the run; finished variants of another one are refused.

    Returns:
        The metrics JSON.

    Raises:
        UserError: Bad parameters, data without such objects, or anchors that miss more than 5 % of val's boxes.
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

    recall = fresh().anchor_recall([target["boxes"] for target in val.targets[0]])
    if recall < 0.95:
        raise UserError(f"detect.anchors: only {recall:.1%} of val's boxes meet an anchor; change the anchors' sizes")
    bench = Bench(fresh, train_set, params, seed, work, fingerprint)
    chosen, grid = _choose(bench, val, model, params)
    variants = _variants(chosen, params)
    detectors = {variant: bench.detector(variant) for variant in dict.fromkeys(variants.values())}
    test = read("test", train_set.used)
    found = {variant: predict(detector, test.images, params.batch) for variant, detector in detectors.items()}
    stats = {label: score(test, found[variant], model, params) for label, variant in variants.items()}
    files.write_json(out / "detections.json", _shown(found[variants["tuned"]]))
    steps = partial(sampling.steps, train_set.repeat_factors(params.repeat_threshold), params.batch, seed=seed)
    detail = {
        "anchor_recall": recall, "categories": train_set.categories, "chosen": chosen, "grid": grid,
        "images": {"train": len(train_set.images), "val": len(val.images), "test": len(test.images)},
        "images_seen": {
            label: params.batch * steps(epochs=params.epochs * variant.length) for label, variant in variants.items()
        },
        "oks_sigmas": train_set.sigmas, "parameters": encoders.count(detectors[variants["tuned"]]),
        "trials": len(params.lrs),
    }  # fmt: skip
    head = {"schema": "mirepro.metrics/1", "stage": "detect", "run": run, "row": row, "seed": seed, "model": model}
    return head | {"cells": _cells(stats, variants, model, params), "detail": detail}
