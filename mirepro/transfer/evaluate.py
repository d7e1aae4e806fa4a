"""Transfer to classification: weighted kNN and linear evaluation of one frozen encoder, in one process."""

import operator
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mirepro import encoders, files, metrics, ops, views
from mirepro.data import shards
from mirepro.data.images import Images
from mirepro.encoders import Ensemble
from mirepro.errors import UserError
from mirepro.params import EvaluateParams, LinearParams
from mirepro.transfer import knn, linear
from mirepro.transfer.author import Author
from mirepro.transfer.frozen import freeze

KINDS = ("flat", "pool")


@torch.no_grad()
def embed(model: Ensemble, rgb: Tensor) -> dict[str, Tensor]:
    """Features of a batch.

    Args:
        model: The frozen encoder.
        rgb: Views `(b, 3, S, S)` in [0, 1].

    Returns:
        `flat` `(b, F h w)`, `pool` `(b, F)` and unit embeddings `z` `(b, D)`, all where the encoder is.
    """
    inputs = views.modalities(rgb, model.modalities)
    maps = [model.encoder(name).feature_map(inputs[name]) for name in model.modalities]
    pooled = [m.mean((2, 3)) for m in maps]
    heads = [model.encoder(name).head(p) for name, p in zip(model.modalities, pooled, strict=True)]
    z = torch.cat([torch.nn.functional.normalize(h) for h in heads], 1) / len(heads) ** 0.5
    return {"flat": torch.cat(maps, 1).flatten(1), "pool": torch.cat(pooled, 1), "z": z}


def features(model: Ensemble, images: Images, size: int, kinds: Collection[str]) -> dict[str, Tensor]:
    """Features of all N images, plain and of this size, of the kinds that `embed` names; the others are not held.

    They are made where the encoder is, and lie on the CPU.
    """
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for index in images.ahead(torch.arange(len(images)).split(256), lambda batch: batch):
        found = embed(model, views.plain(images[index].to(model.device), size))
        for kind in kinds:
            parts[kind].append(found[kind].cpu())
    return {kind: torch.cat(pieces) for kind, pieces in parts.items()}


def check(params: EvaluateParams) -> None:
    """Refuses impossible settings with UserError."""
    rules = {
        "k_nn": (bool(params.k_nn) and min(params.k_nn, default=0) >= 1, "a list of numbers of neighbours"),
        "tau": (params.tau > 0, "a positive temperature"),
        "anchors": (params.anchors >= 1, "1 or more"),
        "gallery": (params.gallery >= 1, "1 or more"),
        "linear.l2": (bool(params.linear.l2) and min(params.linear.l2, default=-1.0) >= 0, "a list of L2 values"),
        "linear.converged": (set(params.linear.converged) <= set(KINDS), f"some of {', '.join(KINDS)}"),
        "linear.author_epochs": (params.linear.author_epochs >= 1, "1 or more"),
        "linear.author_batch": (params.linear.author_batch >= 1, "1 or more"),
    }
    for key, (right, remedy) in rules.items():
        if not right:
            raise UserError(f"evaluate.{key}: {operator.attrgetter(key)(params)!r} is impossible; use {remedy}")
    views.check(params.views)


def evaluate(
    run: str,
    row: str,
    seed: int,
    params: EvaluateParams,
    pretrained: Path,
    data_folder: Path,
    work: Path,
    out: Path,
    fingerprint: str,
) -> dict[str, Any]:
    """kNN and linear evaluation; every choice is made on val, test is read once.

    Args:
        run: Name of the run.
        row: Its row in the tables.
        seed: Its seed.
        params: Protocols.
        pretrained: Folder with encoder.safetensors and bank.safetensors.
        data_folder: Data set.
        work: Folder that survives a kill, for the SGD's checkpoints.
        out: Folder to fill: gallery.json, test.json.
        fingerprint: Names the run; a checkpoint of another one is refused.

    Returns:
        The metrics document.
    """
    check(params)
    model = freeze(encoders.load(pretrained / "encoder.safetensors")).to(params.device)
    train, val = (_opened(data_folder, name) for name in ("train", "val"))
    n_classes, converged = len(train[2]), params.linear.converged
    # First what keeps checkpoints, so that no restart repeats the rest before it.
    training = Author(partial(_linear_features, model), *train[:2], n_classes, seed, params)
    layers = training.train(work, fingerprint)
    x = features(model, train[0], params.views.size, (*converged, "z"))
    x_val = features(model, val[0], params.views.size, converged)
    chosen, cells, detail = _converged((x, train[1]), (x_val, val[1]), n_classes, params.linear)
    for kind, layer in layers.items():
        chosen[f"linear_author_{kind}"] = kind, layer
        sgd = f"SGD lr {params.linear.author_lr}, momentum {params.linear.author_momentum}"
        cells[f"linear_author_{kind}"] = f"{sgd}, {params.linear.author_epochs} epochs, train augmentation, {kind} C5"
    # Every choice is made: only now is test opened.
    images, y, _ = _opened(data_folder, "test")
    x_test = features(model, images, params.views.size, (*KINDS, "z"))
    predicted = {name: classifier.predict(x_test[kind]) for name, (kind, classifier) in chosen.items()}
    votes = knn.predict(x_test["z"], x["z"], train[1], k_nn=params.k_nn, tau=params.tau, n_classes=n_classes)
    for k, prediction in votes.items():
        predicted[f"knn_{k}"] = prediction
        cells[f"knn_{k}"] = f"weighted kNN on z, k {k}, tau {params.tau}"
    _write(out, predicted, y, gallery(pretrained, params))
    values = {
        name: metrics.cell(linear.top1(predicted[name], y), "%", f"{protocol}; test top-1")
        for name, protocol in cells.items()
    }
    left_out = metrics.cell(None, "%", "softmax regression left out: evaluate.linear.converged")
    values |= {f"linear_{kind}": left_out for kind in KINDS if kind not in params.linear.converged}
    return metrics.document("evaluate", run, row, seed, values, detail)


def _linear_features(model: Ensemble, rgb: Tensor) -> dict[str, Tensor]:
    found = embed(model, rgb)
    return {kind: found[kind] for kind in KINDS}


def _opened(folder: Path, name: str) -> tuple[Images, Tensor, list[str]]:
    """Images, classes `(N,)` int64 and names of the classes of a split."""
    split = shards.open(folder, name)
    return Images(split, torch.get_num_threads()), torch.from_numpy(split.labels), split.classes


def _converged(
    train: tuple[Mapping[str, Tensor], Tensor], val: tuple[Mapping[str, Tensor], Tensor], n_classes: int,
    params: LinearParams,
) -> tuple[dict[str, tuple[str, linear.Classifier]], dict[str, str], dict[str, Any]]:  # fmt: skip
    """Softmax regressions with their kinds of features, their protocols, and how L2 was chosen."""
    found: dict[str, tuple[str, linear.Classifier]] = {}
    cells: dict[str, str] = {}
    detail: dict[str, Any] = {"grid": {}, "chosen": {}, "trials": len(params.l2), "features": {}}
    for kind in params.converged:
        pair = [(x[kind], y) for x, y in (train, val)]
        classifier, detail["grid"][kind], chosen = linear.fit(pair[0], pair[1], n_classes, params)
        detail["chosen"][kind], detail["features"][kind] = chosen, train[0][kind].shape[1]
        found[f"linear_{kind}"] = kind, classifier
        cells[f"linear_{kind}"] = f"softmax regression on {kind} C5, L2 {chosen} of {detail['trials']} chosen on val"
    return found, cells, detail


def gallery(pretrained: Path, params: EvaluateParams) -> dict[str, Any]:
    """Nearest rows (ball) and rows from rank 1 % on (ring) of a few evenly spaced anchors, by the final bank."""
    with safe_open(pretrained / "bank.safetensors", "pt") as banks:
        split = banks.metadata()["split"]
        rows = torch.cat([banks.get_tensor(name) for name in banks.keys()], 1)  # noqa: SIM118
    n = len(rows)
    anchors = torch.arange(params.anchors) * (n // params.anchors)
    start, end = n // 100, n // 10
    _, near = ops.neighbors(rows[anchors].contiguous(), rows, max(end, params.gallery + 1))
    ring = torch.linspace(start, end - 1, params.gallery).long()
    items = []
    for anchor, order in zip(anchors.tolist(), near, strict=True):
        ball = [i for i in order.tolist() if i != anchor][: params.gallery]
        items.append({"index": anchor, "ball": ball, "ring": order[ring].tolist()})
    return {"split": split, "anchors": items}


def _write(out: Path, predicted: dict[str, Tensor], classes: Tensor, pictures: dict[str, Any]) -> None:
    files.write_json(out / "test.json", linear.answers(predicted, classes))
    files.write_json(out / "gallery.json", pictures)
