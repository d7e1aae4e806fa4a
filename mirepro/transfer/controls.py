"""Controls beside the objectives: colour, pixels, HOG, object area and position. No network."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import metrics
from mirepro.data import gate, shards
from mirepro.params import EvaluateParams
from mirepro.transfer import knn, linear

_CELL, _BINS = 8, 9


def colour(split: shards.Split) -> NDArray[np.float32]:
    """`(N, 6)`: mean and standard deviation of each channel."""
    return gate.colour(split.images(None)).astype(np.float32)


def pixels(split: shards.Split) -> NDArray[np.float32]:
    """`(N, 3 S S)`: raw values in [0, 1]."""
    x = split.images(None)
    return x.reshape(len(x), -1).astype(np.float32) / np.float32(255)


def hog(split: shards.Split) -> NDArray[np.float32]:
    """`(N, cells^2 * 9)`: histograms of oriented gradients (Dalal & Triggs 2005) on 8 px cells, L2 per image."""
    gray = split.images(None).astype(np.float64).mean(1)
    dy, dx = np.gradient(gray, axis=(1, 2))
    magnitude = np.sqrt(dx * dx + dy * dy)
    angle = np.mod(np.arctan2(dy, dx), np.pi) / np.pi * _BINS
    lower = np.floor(angle).astype(np.int64)
    share = angle - lower
    n, side, _ = gray.shape
    cells = side // _CELL
    histogram = np.zeros((n, cells, cells, _BINS))
    for b in range(_BINS):
        weight = magnitude * ((lower % _BINS == b) * (1 - share) + ((lower + 1) % _BINS == b) * share)
        cropped = weight[:, : cells * _CELL, : cells * _CELL]
        histogram[..., b] = cropped.reshape(n, cells, _CELL, cells, _CELL).sum((2, 4))
    flat = histogram.reshape(n, -1)
    return (flat / np.sqrt((flat * flat).sum(1, keepdims=True) + 1e-6)).astype(np.float32)


def area_position(split: shards.Split) -> NDArray[np.float32]:
    """`(N, 3)`: area of the object's mask and centre of its box; width and height would reveal the outline."""
    return gate.area_position(split.objects).astype(np.float32)


CONTROLS = {"colour": colour, "area_position": area_position, "pixels": pixels, "hog": hog}


def controls(params: EvaluateParams, data_folder: Path) -> dict[str, Any]:
    """Linear and kNN top-1 of every control that the data set's labels allow."""
    splits = {name: shards.open(data_folder, name) for name in ("train", "val", "test")}
    rows: dict[str, Any] = {}
    for name, feature in CONTROLS.items():
        if name == "area_position" and not all(splits["train"].objects):
            continue
        x = {split: torch.from_numpy(feature(value)) for split, value in splits.items()}
        y = {split: torch.from_numpy(value.labels) for split, value in splits.items()}
        rows[name] = _row(params, x, y, len(splits["train"].classes))
    return {"schema": metrics.SCHEMA, "stage": "controls", "rows": rows}


def _row(params: EvaluateParams, x: dict[str, Tensor], y: dict[str, Tensor], n_classes: int) -> dict[str, Any]:
    """Cells of one control, and which test images each of them got right (see `linear.answers`)."""
    classifier, _, chosen = linear.fit((x["train"], y["train"]), (x["val"], y["val"]), n_classes, params.linear)
    predicted = {"linear_flat": classifier.predict(x["test"])}
    protocols = {"linear_flat": f"softmax regression, L2 {chosen} chosen on val, test top-1"}
    z = {name: torch.nn.functional.normalize(classifier.standardise(value)) for name, value in x.items()}
    votes = knn.predict(z["test"], z["train"], y["train"], k_nn=params.k_nn, tau=params.tau, n_classes=n_classes)
    for k, prediction in votes.items():
        predicted[f"knn_{k}"] = prediction
        protocols[f"knn_{k}"] = f"weighted kNN, k {k}, cosine of standardised features, test top-1"
    cells = {name: metrics.cell(linear.top1(predicted[name], y["test"]), "%", text) for name, text in protocols.items()}
    return {"cells": cells, "answers": [linear.answers(predicted, y["test"])]}  # in a list: no metric to DVC
