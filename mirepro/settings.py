"""What a pretraining may be asked for: the rules of its parameters, its learning rate."""

import math
import operator

import torch

from mirepro import views
from mirepro.errors import UserError
from mirepro.params import OptimParams, PretrainParams

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPLITS = ("train", "unlabelled")


def check(params: PretrainParams, size: int) -> None:
    """Refuses impossible settings with UserError."""
    rules = {
        "batch": (1 <= params.batch <= size, f"between 1 and the {size} training images"),
        "shards": (params.shards >= 1 and params.batch % params.shards == 0, f"a divisor of the batch {params.batch}"),
        "bank_shards": (0 <= params.bank_shards <= size, f"0 (whole banks) or at most the {size} training images"),
        "epochs": (params.epochs >= 0, "0 or more"),
        "encoder.norm": (not params.encoder.norm or params.batch > params.shards, "two images a shard, or norm: false"),
        "precision": (params.precision in PRECISIONS, " or ".join(PRECISIONS)),
        "monitor": (params.monitor >= 0, "0 (never) or a number of epochs"),
        "digest": (params.digest >= 1, "a number of steps"),
    }
    for key, (right, remedy) in rules.items():
        if not right:
            value = operator.attrgetter(key)(params)
            raise UserError(f"pretrain.{key}: {value!r} is impossible; use {remedy}")
    optim = params.optim
    for key in ("lr", "momentum", "weight_decay", "warmup"):
        if getattr(optim, key) < 0:
            raise UserError(f"optim.{key}: {getattr(optim, key)} is impossible; use 0 or more")
    schedules = ("constant", "step", "cosine")
    if params.optim.schedule not in schedules:
        raise UserError(f"optim.schedule: {params.optim.schedule!r} is unknown; known: {', '.join(schedules)}")
    views.check(params.views)


def check_split(params: PretrainParams, uses_labels: bool) -> None:
    """Refuses with UserError a split that is not for training, and what asks for labels where there are none."""
    if params.split not in SPLITS:
        raise UserError(f"pretrain.split: {params.split!r} is impossible; use {' or '.join(SPLITS)}")
    if params.split == "unlabelled" and uses_labels:
        raise UserError("pretrain.split: unlabelled, and the objective learns from labels; use train in its row")
    if params.split == "unlabelled" and params.monitor:
        raise UserError(f"pretrain.monitor: {params.monitor}, and images without labels give a neighbour none; use 0")


def learning_rate(optim: OptimParams, progress: float) -> float:
    """Learning rate at `progress` in [0, 1): linear warm-up, then constant, step (x.1 a milestone) or cosine."""
    if progress < optim.warmup:
        return optim.lr * (progress / optim.warmup)
    if optim.schedule == "step":
        return optim.lr * 0.1 ** sum(progress >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr
