"""What stages compute, hold and write, counted and not guessed.

Multiply-adds of the encoder for every image it sees, of the scan of the bank for every anchor, of the clusterings, of
the linear evaluation; bytes of what is held at once and of the outputs.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mirepro import files
from mirepro.errors import UserError
from mirepro.params import EncoderParams, EvaluateParams, RunParams

FINAL = 2
"""Passes over all training images after the last epoch, in units of one forward pass: views and embeddings."""
SCANNING = ("ball", "ring", "cave", "cave_numerator", "la", "cmc_ball", "cmc_ring")
CLUSTERING = ("cave", "cave_numerator", "la")
COMPANION = {"moco": 1, "moco_ring": 1, "simclr": 3}
"""Work on an image's second view, in units of one forward pass: keys are only looked at, twins are learnt from."""
NUMBER = 14
"""Bytes of an image's number in a gallery, a line of its own."""
COPIES = 6
"""Of converged training features, in float32: plain, standardised, twice for float64, in their axes, with ones."""
DEFAULT_SIDE = 256
"""Side of stored images whose shards are not here."""
SIZES = {"imagenet": (1_271_167, 10_000, 50_000, 1000), "cifar10": (45_000, 5000, 10_000, 10),
         "cifar100": (45_000, 5000, 10_000, 100), "stl10": (4500, 500, 8000, 10)}  # fmt: skip
"""Images of train, val and test, and classes, of data sets that may not be here."""
UNLABELLED = {"stl10": 100_000}
"""Images of their unlabelled split."""
SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "desk": 32}


@dataclass(frozen=True)
class Data:
    """How much data a stage reads."""

    train: int
    val: int
    test: int
    classes: int
    side: int


@dataclass(frozen=True)
class Work:
    """What a stage computes and holds.

    Attributes:
        encoder: Multiply-adds of encoders; an image that is learnt from counts three times one that is looked at.
        scan: Multiply-adds of scores against the bank or the queue.
        assign: Multiply-adds of clusterings: rows against centroids.
        solve: Multiply-adds of the linear evaluation.
        detector: Multiply-adds of detectors; learning from an image counts three times looking at it.
        memory: Bytes held at once, without the libraries.
        disk: Bytes of the outputs.
    """

    encoder: float
    scan: float
    assign: float
    solve: float
    memory: float
    disk: float
    detector: float = 0.0


def data(root: Path, name: str, learnt: str = "train") -> Data:
    """Sizes of a data set, with split `learnt` for `train`: its manifest's, else those that are known.

    Raises:
        UserError: Unknown sizes, or no such split.
    """
    path = root / "data" / name / "manifest.json"
    side = SIDES.get(name, DEFAULT_SIDE)
    if not path.is_file() and name not in SIZES:
        raise UserError(f"{path}: no such file, and the size of {name} is not known otherwise; import the data")
    if not path.is_file() and learnt == "train":
        return Data(*SIZES[name], side)
    if not path.is_file() and learnt == "unlabelled" and name in UNLABELLED:
        return replace(Data(*SIZES[name], side), train=UNLABELLED[name])
    manifest = files.read_json(path) if path.is_file() else {"splits": {}}
    if learnt not in manifest["splits"]:
        raise UserError(f"pretrain.split: {name} has no split {learnt}; use train")
    train, val, test = (manifest["splits"][split]["samples"] for split in (learnt, "val", "test"))
    return Data(train, val, test, len(manifest["meta"]["classes"]), side)


def encoder(run: RunParams) -> tuple[float, int, int, int]:
    """Multiply-adds of one image, parameters, values of C5 and channels of C5, over all modalities."""
    return _encoder(run.pretrain.encoder, _modalities(run), run.pretrain.views.size)


@cache
def _encoder(values: EncoderParams, modalities: tuple[str, ...], size: int) -> tuple[float, int, int, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mirepro import encoders

    with torch.device("meta"):
        model = encoders.Ensemble(values, modalities)
        inputs = {name: torch.empty(2, encoders.CHANNELS[name], size, size) for name in modalities}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    cells = math.ceil(size / model.strides[-1]) ** 2
    return counter.get_total_flops() / 4, encoders.count(model), model.channels[-1] * cells, model.channels[-1]


def pretraining(run: RunParams, sizes: Data) -> Work:
    """A pretraining stage."""
    from mirepro import objectives
    from mirepro.data import images as stored

    p, modalities = run.pretrain, len(_modalities(run))
    macs, weights, _, _ = encoder(run)
    anchors = p.epochs * (sizes.train // p.batch) * p.batch
    looks = FINAL * sizes.train * bool(p.epochs) + sizes.train * (not p.epochs)
    looks += sizes.val * (2 + (p.epochs // p.monitor if p.monitor else 0))
    dim, scan, assign = p.encoder.dim, 0.0, 0.0
    if run.objective in SCANNING:
        scan = float(anchors) * sizes.train * dim * modalities
    options = objectives.options(run.objective) | dict(run.options)
    if run.objective in CLUSTERING:
        runs = options["n_clusterings"] * (options["iterations"] + 1)
        assign = float(p.epochs - 1) * runs * sizes.train * options["n_clusters"] * dim * modalities
    queue = options.get("queue", 0)
    scan += float(anchors) * queue * dim
    bank = sizes.train * dim * 4 * modalities
    decoded = [3 * sizes.side**2 * count for count in (sizes.train, sizes.val)]
    images = sum(size for size in decoded if size <= stored.MEMORY)
    labels = sizes.train * 8 * options.get("n_clusterings", 0)
    views = 12 * 3 * p.views.size**2 * 4 * p.batch
    memory = images + 3 * bank + 8 * queue * dim + labels * modalities + views + 16 * weights
    learnt = (3 + COMPANION.get(run.objective, 0)) * anchors
    return Work((learnt + looks) * macs, scan, assign, 0.0, memory, 4 * weights + bank)


def evaluation(run: RunParams, params_: EvaluateParams, sizes: Data) -> Work:
    """An evaluation stage; of the training images `transfer.evaluate` holds the features of converged regressions."""
    from mirepro.data import images as stored

    macs, weights, flat, pooled = encoder(run)
    linear, everything = params_.linear, sizes.train + sizes.val + sizes.test
    converged = sum({"flat": flat, "pool": pooled}[kind] for kind in linear.converged)
    looks = everything + (linear.author_epochs + 1) * sizes.train
    passes = 2.0 * len(linear.l2) * linear.iterations * converged + 3.0 * linear.author_epochs * (flat + pooled)
    solve = passes * sizes.train * sizes.classes
    decoded = [3 * sizes.side**2 * count for count in (sizes.train, sizes.val, sizes.test)]
    kept = sum(size for size in decoded if size <= stored.MEMORY)
    dim = run.pretrain.encoder.dim * len(_modalities(run))
    held = converged * (COPIES * sizes.train + sizes.val) + (flat + pooled) * sizes.test
    held += dim * (sizes.train + sizes.test)
    memory = kept + 4.0 * held + 4 * weights
    answers = sizes.test / 4 * (len(params_.k_nn) + 2 + len(linear.converged))  # a bit each, as hexadecimal digits
    gallery = 2 * NUMBER * params_.anchors * params_.gallery
    return Work(looks * macs, 0.0, 0.0, solve, memory, answers + gallery)


def _modalities(run: RunParams) -> tuple[str, ...]:
    from mirepro import objectives

    return objectives.load(run.objective).modalities
