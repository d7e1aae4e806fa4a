"""Transfer to classification: weighted kNN and linear evaluation of one frozen encoder, in one process."""

import operator
from collections.abc import Callable
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
from mirepro.params import EvaluateParams, ViewParams
from mirepro.transfer import knn, linear
from mirepro.transfer.frozen import freeze

KINDS = ("flat", "pool")


@torch.no_grad()
def features(model: Ensemble, images: Images, view: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Features of views of all N images.

    Args:
        model: The frozen encoder.
        images: The images.
        view: Stored images `(b, 3, S, S)` uint8 and their indices `(b,)` -> RGB in [0, 1].

    Returns:
        `flat` `(N, F h w)`, `pool` `(N, F)` and unit embeddings `z` `(N, D)`.
    """
    rows: dict[str, list[Tensor]] = {"flat": [], "pool": [], "z": []}
    for index in torch.arange(len(images)).split(256):
        inputs = views.modalities(view(images[index], index), model.modalities)
        maps = [model.encoder(name).feature_map(inputs[name]) for name in model.modalities]
        pooled = [m.mean((2, 3)) for m in maps]
        heads = [model.encoder(name).head(p) for name, p in zip(model.modalities, pooled, strict=True)]
        z = torch.cat([torch.nn.functional.normalize(h) for h in heads], 1) / len(heads) ** 0.5
        rows["flat"].append(torch.cat(maps, 1).flatten(1))
        rows["pool"].append(torch.cat(pooled, 1))
        rows["z"].append(z)
    return {name: torch.cat(pieces) for name, pieces in rows.items()}


def check(params: EvaluateParams) -> None:
    """Refuses impossible settings with UserError."""
    rules = {
        "k_nn": (bool(params.k_nn) and min(params.k_nn, default=0) >= 1, "a list of numbers of neighbours"),
        "tau": (params.tau > 0, "a positive temperature"),
        "anchors": (params.anchors >= 1, "1 or more"),
        "gallery": (params.gallery >= 1, "1 or more"),
        "linear.l2": (bool(params.linear.l2) and min(params.linear.l2, default=-1.0) >= 0, "a list of L2 values"),
        "linear.author_epochs": (params.linear.author_epochs >= 1, "1 or more"),
        "linear.author_batch": (params.linear.author_batch >= 1, "1 or more"),
    }
    for key, (right, remedy) in rules.items():
        if not right:
            raise UserError(f"evaluate.{key}: {operator.attrgetter(key)(params)!r} is impossible; use {remedy}")
    views.check(params.views)


def evaluate(
    run: str, row: str, seed: int, params: EvaluateParams, pretrained: Path, data_folder: Path, out: Path
) -> dict[str, Any]:
    """kNN and linear evaluation; every choice is made on val, test is read once.

    Args:
        run: Name of the run.
        row: Its row in the tables.
        seed: Its seed.
        params: Protocols.
        pretrained: Folder with encoder.safetensors and bank.safetensors.
        data_folder: Data set.
        out: Folder to fill: gallery.json, test.json.

    Returns:
        The metrics document.
    """
    check(params)
    model = freeze(encoders.load(pretrained / "encoder.safetensors"))
    splits = {name: shards.open(data_folder, name) for name in ("train", "val", "test")}
    size = params.views.size
    images = {name: Images(split, torch.get_num_threads()) for name, split in splits.items()}
    x = {name: features(model, values, lambda rgb, _: views.plain(rgb, size)) for name, values in images.items()}
    y = {name: torch.from_numpy(split.labels) for name, split in splits.items()}
    n_classes = len(splits["train"].classes)
    predicted: dict[str, Tensor] = {}
    detail: dict[str, Any] = {"grid": {}, "chosen": {}, "trials": len(params.linear.l2), "features": {}}
    cells: dict[str, Any] = {}
    for kind in KINDS:
        pair = [(x[name][kind], y[name]) for name in ("train", "val")]
        classifier, detail["grid"][kind], chosen = linear.fit(pair[0], pair[1], n_classes, params.linear)
        detail["chosen"][kind], detail["features"][kind] = chosen, x["train"][kind].shape[1]
        predicted[f"linear_{kind}"] = classifier.predict(x["test"][kind])
        cells[f"linear_{kind}"] = f"softmax regression on {kind} C5, L2 {chosen} of {detail['trials']} chosen on val"
    for kind, classifier in _author(model, images["train"], y["train"], n_classes, seed, params).items():
        predicted[f"linear_author_{kind}"] = classifier.predict(x["test"][kind])
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
    return metrics.document("evaluate", run, row, seed, values, detail)


def _author(
    model: Ensemble, images: Images, classes: Tensor, n_classes: int, seed: int, params: EvaluateParams
) -> dict[str, linear.Classifier]:
    solvers: dict[str, linear.Author] = {}
    for epoch in range(params.linear.author_epochs):
        drawn: dict[str, Any] = {"seed": seed, "epoch": epoch, "view": 2}
        x = features(model, images, partial(_augmented, params.views, drawn))
        for kind in KINDS:
            solvers.setdefault(kind, linear.Author(x[kind], n_classes, seed, params.linear)).epoch(x[kind], classes)
    return {kind: solver.classifier() for kind, solver in solvers.items()}


def _augmented(params: ViewParams, drawn: dict[str, Any], images: Tensor, index: Tensor) -> Tensor:
    return views.batch(images, params, index=index, **drawn)


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
