"""Imports STL-10 from its binary files: 4500 train, 500 val (50 of every class), 8000 test, 100,000 unlabelled.

Every image is 3 x 96 x 96 bytes in column-major order (channel, column, row); labels are 1 to 10. Source: Coates, Lee
and Ng, An analysis of single layer networks in unsupervised feature learning (2011).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirepro.data import shards, sources
from mirepro.data.compose import ppm
from mirepro.data.picks import inside
from mirepro.data.shards import Sample
from mirepro.errors import UserError

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
COUNTS = {"train": 5000, "test": 8000, "unlabeled": 100_000}
SIZE = 96
VAL = 50
CHOICE = 13
"""Epoch word of the draw that chooses the validation set."""

META = {
    "title": "STL-10",
    "classes": list(CLASSES),
    "categories": [],
    "keypoints": {"names": [], "flips": [], "sigmas": []},
}


def import_stl10(path: Path | str, folder: Path | str) -> dict[str, dict[str, int]]:
    """Imports STL-10 into shards.

    Args:
        path: Folder (or a tar of it) with `train_X.bin`, `train_y.bin`, `test_X.bin`, `test_y.bin`,
            `unlabeled_X.bin`, `class_names.txt`.
        folder: The data set's folder.

    Returns:
        `{"images": n}` of each split.

    Raises:
        UserError: A file is missing or has another length, classes or counts differ; nothing is written then.
    """
    with sources.unpacked(path, Path(folder)) as source:
        found = sources.root(source, "train_X.bin")
        if found is None:
            raise UserError(f"{path}: no train_X.bin inside; give STL-10's binary version")
        _check_names(found / "class_names.txt")
        splits = {"train": _labelled(found, "train", False), "val": _labelled(found, "train", True),
                  "test": _labelled(found, "test", False), "unlabelled": _unlabelled(found)}  # fmt: skip
        manifest = shards.write(folder, "stl10", splits, META)
    return {split: {"images": part["samples"]} for split, part in manifest["splits"].items()}


def _check_names(path: Path) -> None:
    try:
        names = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable ({error.strerror}); complete the data") from error
    if names != list(CLASSES):
        raise UserError(f"{path}: classes {', '.join(names)}; not those of STL-10 in their order")


def read_images(path: Path, count: int) -> NDArray[np.uint8]:
    """`(count, 3, 96, 96)` mapped pixels in the file's order: channel, column, row.

    Raises:
        UserError: The file is missing or has another length.
    """
    _sized(path, count * 3 * SIZE**2)
    return np.memmap(path, np.uint8, "r", shape=(count, 3, SIZE, SIZE))


def read_labels(path: Path, count: int) -> NDArray[np.int64]:
    """`(count,)` class numbers from 0.

    Raises:
        UserError: The file is missing, has another length, or a label is not 1 to 10.
    """
    _sized(path, count)
    labels = np.fromfile(path, np.uint8).astype(np.int64) - 1
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(CLASSES):
        raise UserError(f"{path}: a label is not 1 to {len(CLASSES)}; fetch it again")
    return labels


def _sized(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable ({error.strerror}); complete the data") from error
    if found != size:
        raise UserError(f"{path}: {found} bytes, not {size}; fetch it again")


def _labelled(folder: Path, part: str, val: bool) -> Iterator[Sample]:
    """Images in the file's order; of the training part those outside (or, with `val`, inside) the choice."""
    images = read_images(folder / f"{part}_X.bin", COUNTS[part])
    labels = read_labels(folder / f"{part}_y.bin", COUNTS[part])
    counts, each = np.bincount(labels, minlength=len(CLASSES)), COUNTS[part] // len(CLASSES)
    for label in np.flatnonzero(counts != each)[:1]:
        raise UserError(f"{folder / part}_y.bin: {counts[label]} images of class {CLASSES[label]}, not {each}; "
                        "fetch it again")  # fmt: skip
    places = [0] * len(CLASSES)
    for number, label in enumerate(labels.tolist()):
        place, places[label] = places[label], places[label] + 1
        if part == "test" or inside(CHOICE, label, place, each, VAL) == val:
            yield _sample(number, images[number], label)


def _unlabelled(folder: Path) -> Iterator[Sample]:
    for number, image in enumerate(read_images(folder / "unlabeled_X.bin", COUNTS["unlabeled"])):
        yield _sample(number, image, None)


def _sample(number: int, image: NDArray[np.uint8], label: int | None) -> Sample:
    return Sample(f"{number:06d}", ppm(np.ascontiguousarray(image.transpose(2, 1, 0))), ".ppm", label)
