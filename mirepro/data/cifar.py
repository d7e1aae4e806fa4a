"""Imports CIFAR-10: class folders of images, or the original pickles; 45k train, 5k val, 10k test.

The validation set is a fixed choice of equal size from every training class. JPEG files keep their bytes; pixels from
the pickles become PPM. Source: Krizhevsky, Learning multiple layers of features from tiny images (2009).
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mirepro import rng
from mirepro.data import shards, sources
from mirepro.data.compose import ppm
from mirepro.data.shards import Sample
from mirepro.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 5000, "test": 1000}
"""Images per class."""
VAL = 500
"""Training images per class that become the validation set."""
SIZE = 32
CHOICE = 10
"""Epoch word of the draw that chooses the validation set."""
PICKLES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

META = {
    "title": "CIFAR-10",
    "classes": list(CLASSES),
    "categories": [],
    "keypoints": {"names": [], "flips": [], "sigmas": []},
}


def import_cifar10(path: Path | str, folder: Path | str) -> dict[str, dict[str, int]]:
    """Imports CIFAR-10 into shards.

    Args:
        path: Folder with `train/<class>/*` and `test/<class>/*` or with `data_batch_1` ...; or a tar of either.
        folder: The data set's folder.

    Returns:
        `{"images": n}` of each split.

    Raises:
        UserError: Unknown layout, wrong counts, a corrupt file; nothing is written then.
    """
    with sources.unpacked(path, Path(folder)) as source:
        if (found := sources.root(source, "train", "test")) is not None:
            if not (found / "train").is_dir():
                raise UserError(f"{path}: train and test are files, as in CIFAR-100; `mirepro data import cifar100`")
            read: _Reader = _FolderReader(found)
        elif (found := sources.root(source, "data_batch_1", "test_batch")) is not None:
            read = _PickleReader(found)
        else:
            raise UserError(f"{path}: neither train/<class>/ and test/<class>/ nor data_batch_1 ... test_batch inside")
        splits = {"train": read.samples("train", False), "val": read.samples("train", True),
                  "test": read.samples("test", False)}  # fmt: skip
        manifest = shards.write(folder, "cifar10", splits, META)
    return {split: {"images": part["samples"]} for split, part in manifest["splits"].items()}


def chosen(label: int, count: int) -> set[int]:
    """Positions in a training class that go to the validation set: the first of a fixed permutation."""
    return set(rng.permutation(label, rng.Stream.DATA, CHOICE, count)[:VAL].tolist())


class _Reader:
    """Samples of a part by class; subclasses say where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def members(self, part: str) -> list[list[Any]]:
        """For each class what `sample` needs for each of its images."""
        raise NotImplementedError

    def sample(self, key: str, member: Any, label: int) -> Sample:
        """Reads one image."""
        raise NotImplementedError

    def samples(self, part: str, val: bool) -> Iterator[Sample]:
        """Training images outside (or, with `val`, inside) the validation choice; all test images.

        Raises:
            UserError: A class has another number of images than CIFAR-10.
        """
        members = self.members(part)
        for label, found in enumerate(members):
            if len(found) != COUNTS[part]:
                raise UserError(f"{self.folder}/{part}: {len(found)} images of class {CLASSES[label]}, "
                                f"not {COUNTS[part]}; complete the data")  # fmt: skip
        picks = [chosen(label, COUNTS[part]) if part == "train" else set() for label in range(len(members))]
        for i in range(COUNTS[part]):  # classes take turns, so that a prefix of a split holds all of them
            for label, found in enumerate(members):
                if (i in picks[label]) == val:
                    yield self.sample(f"{CLASSES[label]}-{i:05d}", found[i], label)


class _FolderReader(_Reader):
    def members(self, part: str) -> list[list[Any]]:
        names = {p.name for p in (self.folder / part).iterdir() if p.is_dir()}
        if names != set(CLASSES):
            odd = ", ".join(sorted(names ^ set(CLASSES)))
            raise UserError(f"{self.folder / part}: missing or unknown class folders: {odd}")
        return [sorted(p for p in (self.folder / part / c).iterdir() if p.is_file()) for c in CLASSES]

    def sample(self, key: str, member: Path, label: int) -> Sample:
        content, size = sources.read_image(member)
        if size != (SIZE, SIZE):
            raise UserError(f"{member}: {size[0]} x {size[1]} pixels, not {SIZE} x {SIZE}")
        if member.suffix not in (".jpg", ".png", ".ppm"):
            raise UserError(f"{member}: not a .jpg, .png or .ppm file")
        return Sample(key, content, member.suffix, label)


class _PickleReader(_Reader):
    def members(self, part: str) -> list[list[Any]]:
        result: list[list[Any]] = [[] for _ in CLASSES]
        for name in PICKLES[part]:
            pixels, labels = read_batch(self.folder / name)
            for row, label in zip(pixels, labels, strict=True):
                result[label].append(row)
        return result

    def sample(self, key: str, member: np.ndarray, label: int) -> Sample:
        return Sample(key, ppm(member.reshape(3, SIZE, SIZE).transpose(1, 2, 0)), ".ppm", label)


class Unpickler(pickle.Unpickler):
    """Knows nothing but NumPy arrays: a pickle can otherwise run any program."""

    ALLOWED = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
               "numpy.dtype", "_codecs.encode")  # fmt: skip

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Reads one of the original pickles.

    Returns:
        Pixels `(N, 3072)` uint8 (channel, row, column) and N labels.

    Raises:
        UserError: Missing, damaged, not a CIFAR-10 batch, or a pickle that asks for anything but NumPy arrays.
    """
    try:
        with path.open("rb") as file:
            batch = Unpickler(file).load()
        pixels, labels = batch[b"data"], list(batch[b"labels"])
    except OSError as error:
        raise UserError(f"{path}: missing or unreadable ({error.strerror}); complete the data") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a CIFAR-10 batch ({type(error).__name__}: {error}); fetch it again") from error
    good = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * SIZE**2)
    if not good or not all(isinstance(c, int) and 0 <= c < len(CLASSES) for c in labels):
        raise UserError(f"{path}: not {3 * SIZE**2} bytes and a label of 0 to 9 for each image; fetch it again")
    return pixels, labels
