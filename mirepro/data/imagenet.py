"""Imports ImageNet (ILSVRC 2012, classification): class folders, or the tars as they are handed out.

Choices are made on ten training images of every class (`val`); `test` is the official validation set, which is read
once. The bank then has 1,271,167 rows. Source: Russakovsky et al., ImageNet large scale visual recognition challenge
(2015); counts and the class order (sorted WordNet ids) as there.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from mirepro import rng
from mirepro.data import packing
from mirepro.data.packing import Item
from mirepro.errors import UserError

CLASSES = 1000
FIRST, LAST = "n01440764", "n15075141"
"""The first and the last class in the order of WordNet ids: tench and toilet tissue."""
SYNSETS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""sha256 of the sorted ids, joined by line feeds: the same of timm 1.0.31 (imagenet_synsets.txt) and of
tensorflow-datasets 4.9.10 (imagenet2012/labels.txt)."""
COUNTS = {"train": 1_281_167, "val": 50_000}
PER_CLASS = {"train": (732, 1300), "val": (50, 50)}
"""Least and largest number of images of a class."""
VAL = 10
SIDE = 256
CHOICE = 11
"""Epoch word of the draw that chooses the validation set."""
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar", "kit": "ILSVRC2012_devkit_t12.tar.gz"}
TRUTH = "ILSVRC2012_validation_ground_truth.txt"

_SYNSET = re.compile(r"n\d{8}")
_NAMES = {"train": re.compile(r"n\d{8}_\d+\.JPEG"), "val": re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")}

Found = dict[str, list[Item]]
"""Items by WordNet id; their labels are set last."""


def import_imagenet(path: Path | str, folder: Path | str, side: int = SIDE, jobs: int = 1) -> dict[str, dict[str, int]]:
    """Imports ImageNet into shards.

    Args:
        path: Folder with `train/<id>/*.JPEG` and `val/<id>/*.JPEG`, or with the three tars of `TARS`.
        folder: The data set's folder.
        side: Side of the stored squares; 0 keeps the images' bytes (pretraining needs equal sizes).
        jobs: Processes.

    Returns:
        `{"images": n}` of each split.

    Raises:
        UserError: Unknown layout, wrong classes or counts, a corrupt image; the data set's folder stays as it was.
    """
    source = Path(path)
    if not source.is_dir():
        raise UserError(f"{path}: no such folder; give the folder with train/ and val/, or with {TARS['train']} ...")
    if all((source / part).is_dir() for part in ("train", "val")):
        found = {part: _folders(source / part, part) for part in ("train", "val")}
    elif all((source / name).is_file() for name in TARS.values()):
        found = {"train": _train_tar(source / TARS["train"]), "val": _val_tar(source)}
    else:
        raise UserError(f"{path}: neither train/<id>/ and val/<id>/ nor {', '.join(TARS.values())} inside")
    for part, classes in found.items():
        _check(source, part, classes)
    names = sorted(found["train"])
    splits = {"train": _chosen(names, found["train"], False), "val": _chosen(names, found["train"], True),
              "test": _labelled(names, found["val"])}  # fmt: skip
    meta = {"title": "ImageNet", "classes": names, "categories": [],
            "keypoints": {"names": [], "flips": [], "sigmas": []}}  # fmt: skip
    per_shard = 25_000 if side else 9000  # about 1 GB
    manifest = packing.pack(folder, "imagenet", splits, meta, side=side, per_shard=per_shard, jobs=jobs)
    return {split: {"images": part["samples"]} for split, part in manifest["splits"].items()}


def _check(source: Path, part: str, classes: Found) -> None:
    """Classes, their order and all counts as published."""
    names = sorted(classes)
    if len(names) != CLASSES or (names[0], names[-1]) != (FIRST, LAST):
        ends = f"{names[0]} to {names[-1]}" if names else "none"
        raise UserError(f"{source}: {part} has {len(names)} classes ({ends}), not {CLASSES} ({FIRST} to {LAST}); "
                        "complete the data")  # fmt: skip
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if digest != SYNSETS:
        raise UserError(f"{source}: {part}: the {CLASSES} WordNet ids are not those of ILSVRC 2012 (sha256 "
                        f"{digest[:12]}..., not {SYNSETS[:12]}...); fetch the data again")  # fmt: skip
    least, most = PER_CLASS[part]
    for name in names:
        if not least <= len(classes[name]) <= most:
            raise UserError(f"{source}: {part} has {len(classes[name])} images of class {name}, not {least} to {most}; "
                            "complete the data")  # fmt: skip
    total = sum(len(items) for items in classes.values())
    if total != COUNTS[part]:
        raise UserError(f"{source}: {part} has {total} images, not {COUNTS[part]}; complete the data")


def _folders(folder: Path, part: str) -> Found:
    """`<id>/*.JPEG`."""
    found: Found = {}
    for child in sorted(folder.iterdir()):
        if not (child.is_dir() and _SYNSET.fullmatch(child.name)):
            raise UserError(f"{child}: not a class folder named by a WordNet id such as {FIRST}; remove it")
        found[child.name] = [_file(path, part) for path in sorted(child.iterdir())]
    return found


def _file(path: Path, part: str) -> Item:
    if not _NAMES[part].fullmatch(path.name):
        raise UserError(f"{path}: not an image of ImageNet's {part} part; remove it")
    facts = path.stat()
    return Item(path.stem, 0, str(path), 0, facts.st_size, facts.st_mtime_ns, str(path))


class _Window:
    """A part of a file, as far as tarfile reads it."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        self.at = at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        self.file.seek(self.start + self.at)
        content = self.file.read(left if count < 0 else min(count, left))
        self.at += len(content)
        return content


def _members(path: Path, file: Any, where: str) -> Iterator[tarfile.TarInfo]:
    """Plain files of an uncompressed tar, in its order.

    Raises:
        UserError: A member is a link or would leave the archive, or the tar is damaged.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isfile() or "/" in member.name.removeprefix("./") or ".." in member.name:
                    raise UserError(f"{where}: member {member.name!r} is a link or leads elsewhere; nothing imported")
                yield member
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{where}: not a complete tar file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror}); check the file") from error


def _item(path: Path, part: str, member: tarfile.TarInfo, start: int, where: str) -> Item:
    name = member.name.removeprefix("./")
    if not _NAMES[part].fullmatch(name):
        raise UserError(f"{where}: member {member.name!r} is no image of ImageNet's {part} part; fetch the tar again")
    stamp = path.stat().st_mtime_ns
    offset = start + member.offset_data
    if offset + member.size > path.stat().st_size:
        raise UserError(f"{where}: not a complete tar file ({name} is cut short); fetch it again")
    return Item(name.removesuffix(".JPEG"), 0, str(path), offset, member.size, stamp, f"{where}:{name}")


def _train_tar(path: Path) -> Found:
    """A tar of one tar for each class."""
    found: Found = {}
    with path.open("rb") as file, path.open("rb") as inner:
        for member in _members(path, file, str(path)):
            name = member.name.removeprefix("./").removesuffix(".tar")
            if not _SYNSET.fullmatch(name):
                raise UserError(f"{path}: member {member.name!r} is no tar of a class; fetch it again")
            window, where = _Window(inner, member.offset_data, member.size), f"{path}:{member.name}"
            images = [_item(path, "train", one, member.offset_data, where) for one in _members(path, window, where)]
            found[name] = sorted(images, key=lambda item: item.key)
    return found


def _val_tar(source: Path) -> Found:
    """A flat tar; the classes stand in the development kit."""
    path = source / TARS["val"]
    with path.open("rb") as file:
        items = sorted((_item(path, "val", one, 0, str(path)) for one in _members(path, file, str(path))),
                       key=lambda item: item.key)  # fmt: skip
    names, truth = _kit(source / TARS["kit"])
    if len(truth) != len(items):
        raise UserError(f"{path}: {len(items)} images, but {TRUTH} has {len(truth)} lines; fetch both again")
    found: Found = {}
    for item, number in zip(items, truth, strict=True):
        if number not in names:
            raise UserError(f"{source / TARS['kit']}: {TRUTH}: no class {number}; fetch it again")
        found.setdefault(names[number], []).append(item)
    return found


def _kit(path: Path) -> tuple[dict[int, str], list[int]]:
    """WordNet id of each class number, and the class number of each validation image."""
    import scipy.io

    try:
        with tarfile.open(path) as tar:
            members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
            meta, lines = (tar.extractfile(members[name]) for name in ("meta.mat", TRUTH))
            if meta is None or lines is None:
                raise ValueError("meta.mat or the ground truth is no file")
            synsets = scipy.io.loadmat(BytesIO(meta.read()), squeeze_me=True)["synsets"]
            truth = [int(line) for line in lines.read().split()]
        names = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets if int(one["num_children"]) == 0}
    except Exception as error:  # a damaged MAT file can raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not ImageNet's development kit ({type(error).__name__}: {reason})") from error
    return names, truth


def _labelled(names: list[str], classes: Found) -> list[Item]:
    """All items in the order of the classes, with their labels."""
    return [replace(item, label=label) for label, name in enumerate(names) for item in classes[name]]


def _chosen(names: list[str], classes: Found, val: bool) -> list[Item]:
    """Training items outside (or, with `val`, inside) the choice of `VAL` images of every class."""
    result = []
    for label, name in enumerate(names):
        order = rng.permutation(label, rng.Stream.DATA, CHOICE, len(classes[name]))
        picks = set(order[:VAL].tolist())
        result += [replace(item, label=label) for i, item in enumerate(classes[name]) if (i in picks) == val]
    return result
