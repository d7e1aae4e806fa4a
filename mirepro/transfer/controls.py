"""Controls beside the objectives: colour, pixels, HOG, object area and position. No network.

Large data are reduced (`SIDE`, `IMAGES`), which the protocols of their cells then say.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import metrics
from mirepro.data import gate, shards
from mirepro.errors import UserError
from mirepro.params import EvaluateParams
from mirepro.transfer import knn, linear

SIDE = 32
"""Larger images are reduced to squares of this side: the regression on pixels builds a matrix of features by features,
0.3 TB at ImageNet's 256 px."""
IMAGES = 50_000
"""Training images, evenly spaced, that enter the regression and the votes: at this side their pixels take 0.6 GB."""
BATCH = 256
"""Images that are turned into features at a time; HOG's arrays take 30 times the images' bytes."""

_CELL, _BINS = 8, 9


def colour(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images `(N, 3, S, S)` -> `(N, 6)`: mean and standard deviation of each channel."""
    return gate.colour(images).astype(np.float32)


def pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images `(N, 3, S, S)` -> `(N, 3 S S)`: raw values in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def hog(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images `(N, 3, S, S)` -> `(N, cells^2 * 9)`: histograms of oriented gradients (Dalal & Triggs 2005).

    Cells have 8 px; an image's histograms are scaled to L2 norm 1 together.
    """
    gray = images.astype(np.float64).mean(1)
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


SEEN = {"colour": colour, "pixels": pixels, "hog": hog}
"""Controls that are made of images; area and position come from the labels."""


def features(split: shards.Split, index: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """`(n, F)` of every control, of the samples `(n,)`.

    Area and position are the area of the object's mask and the centre of its box, in pixels of the stored image; width
    and height would reveal the outline.
    """
    parts = [_seen(split, index[begin : begin + BATCH]) for begin in range(0, len(index), BATCH)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in SEEN}
    objects = split.objects
    return found | {"area_position": gate.area_position([objects[i] for i in index]).astype(np.float32)}


def _seen(split: shards.Split, index: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """`(b, F)` of the controls that are made of images, each of which is reduced as soon as it is decoded."""
    side = _side(split)
    first, *images = (split.image(i, side) for i in (0, *index.tolist()))
    if any(image.shape != first.shape for image in images):
        raise UserError(f"{split.folder}: images of different sizes; import the data again with a side")
    stacked = np.stack(images)
    return {name: feature(stacked) for name, feature in SEEN.items()}


def _side(split: shards.Split) -> int | None:
    """The side to which images are reduced; None leaves them as they are stored."""
    return SIDE if max(split.image(0).shape[1:]) > SIDE else None


def _training(n: int) -> NDArray[np.int64]:
    """At most `IMAGES` of n samples, evenly spaced: of data in the order of their classes, the same share of each."""
    kept = min(n, IMAGES)
    return np.arange(kept) * n // kept


def _reduced(split: shards.Split, kept: int, seen: bool) -> str:
    """What a control's protocol adds where its images (if it has `seen` them) or their number were reduced."""
    side = f", at {SIDE} px" if seen and _side(split) else ""
    return side + (f", {kept} of {len(split)} training images" if kept < len(split) else "")


def controls(params: EvaluateParams, data_folder: Path) -> dict[str, Any]:
    """Linear and kNN top-1 of every control that the data set's labels allow."""
    splits = {name: shards.open(data_folder, name) for name in ("train", "val", "test")}
    train = splits["train"]
    index = {name: np.arange(len(split)) for name, split in splits.items()} | {"train": _training(len(train))}
    found = {name: features(split, index[name]) for name, split in splits.items()}
    y = {name: torch.from_numpy(split.labels[index[name]]) for name, split in splits.items()}
    rows: dict[str, Any] = {}
    for name in [*SEEN, "area_position"] if all(train.objects) else SEEN:
        x = {split: torch.from_numpy(value[name]) for split, value in found.items()}
        rows[name] = _row(params, x, y, len(train.classes), _reduced(train, len(index["train"]), name in SEEN))
    return {"schema": metrics.SCHEMA, "stage": "controls", "rows": rows}


def _row(
    params: EvaluateParams, x: dict[str, Tensor], y: dict[str, Tensor], n_classes: int, reduced: str
) -> dict[str, Any]:
    """Cells of one control, and which test images each of them got right (see `linear.answers`)."""
    classifier, _, chosen = linear.fit((x["train"], y["train"]), (x["val"], y["val"]), n_classes, params.linear)
    predicted = {"linear_flat": classifier.predict(x["test"])}
    protocols = {"linear_flat": f"softmax regression, L2 {chosen} chosen on val, test top-1"}
    z = {name: torch.nn.functional.normalize(classifier.standardise(value)) for name, value in x.items()}
    votes = knn.predict(z["test"], z["train"], y["train"], k_nn=params.k_nn, tau=params.tau, n_classes=n_classes)
    for k, prediction in votes.items():
        predicted[f"knn_{k}"] = prediction
        protocols[f"knn_{k}"] = f"weighted kNN, k {k}, cosine of standardised features, test top-1"
    cells = {
        name: metrics.cell(linear.top1(predicted[name], y["test"]), "%", text + reduced)
        for name, text in protocols.items()
    }
    return {"cells": cells, "answers": [linear.answers(predicted, y["test"])]}  # in a list: no metric to DVC
