"""Transfer to classification: weighted kNN and linear evaluation of one frozen encoder, in one process."""

import operator
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
    splits = {name: shards.open(data_folder, name) for name in ("train", "val", "test")}
    images = {name: Images(split, torch.get_num_threads()) for name, split in splits.items()}
    y = {name: torch.from_numpy(split.labels) for name, split in splits.items()}
    n_classes, converged = len(splits["train"].classes), params.linear.converged
    # First what keeps checkpoints, so that no restart repeats the rest before it.
    training = Author(partial(_linear_features, model), images["train"], y["train"], n_classes, seed, params)
    layers = training.train(work, fingerprint)
    kinds = {"train": (*converged, "z"), "val": converged, "test": (*KINDS, "z")}
    x = {name: features(model, images[name], params.views.size, kinds[name]) for name in splits}
    predicted, cells, detail = _converged(x, y, n_classes, params.linear)
    for kind, layer in layers.items():
        predicted[f"linear_author_{kind}"] = layer.predict(x["test"][kind])
        sgd = f"SGD lr {params.linear.author_lr}, momentum {params.linear.author_momentum}"
        cells[f"linear_author_{kind}"] = f"{sgd}, {params.linear.author_epochs} epochs, train augmentation, {kind} C5"
    votes = knn.predict(
        x["test"]["z"], x["train"]["z"], y["train"], k_nn=params.k_nn, tau=params.tau, n_classes=n_classes
    )
    for k, prediction in votes.items():
        predicted[f"knn_{k}"] = prediction
        cells[f"knn_{k}"] = f"weighted kNN on z, k {k}, tau {params.tau}"
    _write(out, predicted, y["test"], gallery(pretrained, params))
    values = {
        name: metrics.cell(linear.top1(predicted[name], y["test"]), "%", f"{protocol}; test top-1")
        for name, protocol in cells.items()
    }
    left_out = metrics.cell(None, "%", "softmax regression left out: evaluate.linear.converged")
    values |= {f"linear_{kind}": left_out for kind in KINDS if kind not in params.linear.converged}
    return metrics.document("evaluate", run, row, seed, values, detail)


def _linear_features(model: Ensemble, rgb: Tensor) -> dict[str, Tensor]:
    found = embed(model, rgb)
    return {kind: found[kind] for kind in KINDS}


def _converged(
    x: Mapping[str, Mapping[str, Tensor]], y: Mapping[str, Tensor], n_classes: int, params: LinearParams
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Softmax regressions: their predictions on test, their protocols, and how L2 was chosen."""
    predicted: dict[str, Tensor] = {}
    cells: dict[str, str] = {}
    detail: dict[str, Any] = {"grid": {}, "chosen": {}, "trials": len(params.l2), "features": {}}
    for kind in params.converged:
        pair = [(x[name][kind], y[name]) for name in ("train", "val")]
        classifier, detail["grid"][kind], chosen = linear.fit(pair[0], pair[1], n_classes, params)
        detail["chosen"][kind], detail["features"][kind] = chosen, x["train"][kind].shape[1]
        predicted[f"linear_{kind}"] = classifier.predict(x["test"][kind])
        cells[f"linear_{kind}"] = f"softmax regression on {kind} C5, L2 {chosen} of {detail['trials']} chosen on val"
    return predicted, cells, detail


def gallery(pretrained: Path, params: EvaluateParams) -> dict[str, Any]:
    """Nearest rows (ball) and rows from rank 1 % on (ring) of a few evenly spaced anchors, by the final bank."""
    banks = load_file(pretrained / "bank.safetensors")
    rows = torch.cat(list(banks.values()), 1)
    n = len(rows)
    anchors = torch.arange(params.anchors) * (n // params.anchors)
    start, end = n // 100, n // 10
    _, near = ops.neighbors(rows[anchors].contiguous(), rows, max(end, params.gallery + 1))
    ring = torch.linspace(start, end - 1, params.gallery).long()
    items = []
    for anchor, order in zip(anchors.tolist(), near, strict=True):
        ball = [i for i in order.tolist() if i != anchor][: params.gallery]
        items.append({"index": anchor, "ball": ball, "ring": order[ring].tolist()})
    return {"split": "train", "anchors": items}


def _write(out: Path, predicted: dict[str, Tensor], classes: Tensor, pictures: dict[str, Any]) -> None:
    files.write_json(out / "test.json", linear.answers(predicted, classes))
    files.write_json(out / "gallery.json", pictures)
