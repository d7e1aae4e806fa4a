"""Imports CIFAR-100 from its original pickles; 45k train, 5k val (50 of every class), 10k test, the fine labels.

Source: Krizhevsky, Learning multiple layers of features from tiny images (2009).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mirepro.data import shards, sources
from mirepro.data.cifar import SIZE, Unpickler
from mirepro.data.compose import ppm
from mirepro.data.picks import inside
from mirepro.data.shards import Sample
from mirepro.errors import UserError

CLASSES = 100
COUNTS = {"train": 500, "test": 100}
"""Images per class."""
VAL = 50
CHOICE = 12
"""Epoch word of the draw that chooses the validation set."""


def import_cifar100(path: Path | str, folder: Path | str) -> dict[str, dict[str, int]]:
    """Imports CIFAR-100 into shards.

    Args:
        path: Folder (or a tar of it) with `train`, `test` and `meta`.
        folder: The data set's folder.

    Returns:
        `{"images": n}` of each split.

    Raises:
        UserError: Unknown layout, wrong counts, a damaged pickle; nothing is written then.
    """
    with sources.unpacked(path, Path(folder)) as source:
        found = sources.root(source, "train", "test", "meta")
        if found is None or (found / "train").is_dir():
            raise UserError(f"{path}: no files train, test and meta inside; give CIFAR-100's Python version")
        names = read_names(found / "meta")
        splits = {"train": _samples(found, "train", False), "val": _samples(found, "train", True),
                  "test": _samples(found, "test", False)}  # fmt: skip
        meta = {"title": "CIFAR-100", "classes": names, "categories": [],
                "keypoints": {"names": [], "flips": [], "sigmas": []}}  # fmt: skip
        manifest = shards.write(folder, "cifar100", splits, meta)
    return {split: {"images": part["samples"]} for split, part in manifest["splits"].items()}


def _load(path: Path) -> dict[bytes, Any]:
    """A pickle of plain values and NumPy arrays; see `cifar.Unpickler`."""
    try:
        with path.open("rb") as file:
            content = Unpickler(file).load()
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        return content
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable ({error.strerror}); complete the data") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a file of CIFAR-100 ({type(error).__name__}: {error}); fetch it again") from error


def read_names(path: Path) -> list[str]:
    """Names of the fine classes in their order.

    Raises:
        UserError: Missing, damaged, or not a hundred different names in alphabetical order.
    """
    raw = _load(path).get(b"fine_label_names", [])
    names = [n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in raw]
    if len(names) != CLASSES or sorted(set(names)) != names:
        raise UserError(f"{path}: {len(names)} fine_label_names, not {CLASSES} different ones in alphabetical order; "
                        "fetch it again")  # fmt: skip
    return names


def read_part(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels `(N, 3072)` uint8 (channel, row, column) and N fine labels.

    Raises:
        UserError: Missing, damaged, or a pickle that asks for anything but NumPy arrays.
    """
    content = _load(path)
    pixels, labels = content.get(b"data"), content.get(b"fine_labels")
    good = isinstance(labels, list) and all(type(c) is int and 0 <= c < CLASSES for c in labels)
    if not (good and isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8) or (
        pixels.shape != (len(labels or []), 3 * SIZE**2)
    ):
        raise UserError(f"{path}: not {3 * SIZE**2} bytes and a fine label of 0 to 99 for each image; fetch it again")
    return pixels, list(labels or [])


def _samples(folder: Path, part: str, val: bool) -> Iterator[Sample]:
    """Classes take turns, so that a prefix of a split holds all of them."""
    pixels, labels = read_part(folder / part)
    rows: list[list[np.ndarray]] = [[] for _ in range(CLASSES)]
    for row, label in zip(pixels, labels, strict=True):
        rows[label].append(row)
    for label, found in enumerate(rows):
        if len(found) != COUNTS[part]:
            raise UserError(f"{folder / part}: {len(found)} images of class {label}, not {COUNTS[part]}; fetch again")
    for i in range(COUNTS[part]):
        for label, found in enumerate(rows):
            if part == "test" or inside(CHOICE, label, i, COUNTS[part], VAL) == val:
                image = found[i].reshape(3, SIZE, SIZE).transpose(1, 2, 0)
                yield Sample(f"{label:02d}-{i:05d}", ppm(image), ".ppm", label)
