"""Data sets as plain tar shards with a manifest of sha256 digests.

`<folder>/manifest.json` pins `<folder>/shards/<split>-NNN.tar`. A sample is an image file followed by a JSON file of
the same key with its label and objects. Headers are constant: equal samples give equal bytes.
"""

import io
import json
import mmap
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirepro import files
from mirepro.data import masks
from mirepro.errors import UserError

SCHEMA = "mirepro.data/1"
SHARD_BYTES = 10**9
REMEDY = "build or import the data again (`mirepro data --help`)"

_open = open


@dataclass(frozen=True)
class Sample:
    """One image file with what is known about it.

    Attributes:
        key: Unique in the split, at most 90 ASCII characters.
        image: The image file's bytes.
        suffix: `.ppm`, `.jpg` or `.png`.
        label: Class number or None.
        objects: `{"bbox": [x, y, w, h], "category", "area", "iscrowd", "segmentation", "keypoints": [x, y, v, ...]}`
            in pixels; categories are numbered from 0.
    """

    key: str
    image: bytes
    suffix: str
    label: int | None
    objects: list[dict[str, Any]] = field(default_factory=list)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def _write_split(folder: Path, split: str, samples: Iterable[Sample]) -> dict[str, Any]:
    """Writes one split's shards and returns its part of the manifest."""
    count = 0
    names: list[str] = []
    stream = iter(samples)
    pending = next(stream, None)
    while pending is not None:
        name = f"{split}-{len(names):03d}.tar"
        names.append(name)
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            while pending is not None and tar.offset < SHARD_BYTES:
                note = json.dumps({"label": pending.label, "objects": pending.objects}, separators=(",", ":"))
                _add(tar, pending.key + pending.suffix, pending.image)
                _add(tar, pending.key + ".json", note.encode())
                count, pending = count + 1, next(stream, None)
    shards = [{"file": n, "bytes": (folder / n).stat().st_size, "sha256": files.sha256(folder / n)} for n in names]
    return {"samples": count, "shards": shards}


def write(
    folder: Path | str, name: str, splits: Mapping[str, Iterable[Sample]], meta: Mapping[str, Any],
    frozen: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes shards and manifest; the old ones stay until the new ones are complete.

    Args:
        folder: The data set's folder.
        name: The data set's name.
        splits: Samples by split.
        meta: `title`, `classes`, `categories`, `keypoints`.
        frozen: The folder's manifest is there already and must come out the same.

    Returns:
        The manifest.

    Raises:
        UserError: The folder cannot be written, or the result differs from the frozen manifest.
    """
    folder = Path(folder)
    work, fresh = None, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".shards-*"):  # what a killed writer left
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=".shards-", dir=folder))
        parts = {split: _write_split(work, split, samples) for split, samples in splits.items()}
        manifest = {"schema": SCHEMA, "name": name, "meta": dict(meta), "splits": parts}
        if frozen:
            _compare(manifest, files.read_json(folder / "manifest.json"), folder / "manifest.json")
        _place(work, folder / "shards")
        if not frozen:
            files.write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise files.refusal(folder, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if fresh and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    return manifest


def _place(work: Path, target: Path) -> None:
    """Moves a finished folder to its place, the old one out of the way first."""
    os.chmod(work, 0o755)
    old = work.with_name(work.name + "-old")
    if target.exists():
        os.rename(target, old)
    os.rename(work, target)
    files.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _compare(made: dict[str, Any], frozen: dict[str, Any], path: Path) -> None:
    for split, part in made["splits"].items():
        if frozen.get("splits", {}).get(split) != part:
            raise UserError(f"{path}: split {split!r} of {made['name']} came out differently from this manifest; "
                            "the renderer or the manifest was changed (`git diff`)")  # fmt: skip
    if made != frozen:
        raise UserError(f"{path}: names, classes or keypoints differ from those of {made['name']}; restore the file")


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a data set.

    Raises:
        UserError: It is missing or not a manifest.
    """
    path = Path(folder) / "manifest.json"
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: not a data manifest ({SCHEMA}); {REMEDY}")
    return manifest


def verify(folder: Path | str, splits: Iterable[str] | None = None) -> dict[str, Any]:
    """Compares every shard with the manifest.

    Raises:
        UserError: A shard is missing or has other bytes.
    """
    manifest = read_manifest(folder)
    for split in manifest["splits"] if splits is None else splits:
        for shard in manifest["splits"][split]["shards"]:
            path = Path(folder) / "shards" / shard["file"]
            if not path.is_file():
                raise UserError(f"{path}: no such file; {REMEDY}")
            if path.stat().st_size != shard["bytes"] or files.sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: sha256 differs from {folder}/manifest.json; {REMEDY}")
    return manifest


def open(folder: Path | str, split: str) -> "Split":
    """Opens a split after checking its bytes against the manifest.

    Raises:
        UserError: No such split, or the shards differ from the manifest.
    """
    known = read_manifest(folder)["splits"]
    if split not in known:
        raise UserError(f"{folder}: no split {split!r}; known: {', '.join(known)}")
    return Split(Path(folder), split, verify(folder, [split]))


def _members(path: Path) -> Iterator[tuple[str, memoryview]]:
    """Names and contents of a plain tar file, mapped into memory, without tarfile's cost per member."""
    with _open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = 0
    while content[at] != 0:
        size = int(bytes(content[at + 124 : at + 135]), 8)
        yield bytes(content[at : at + 100]).rstrip(b"\0").decode(), content[at + 512 : at + 512 + size]
        at += 512 + size + -size % 512


class Split:
    """A split: encoded images (mapped, not read), labels, objects."""

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        self.name, self.folder, self.meta = name, folder, manifest["meta"]
        self.keys: list[str] = []
        self.files: list[memoryview] = []
        self.notes: list[dict[str, Any]] = []
        for shard in manifest["splits"][name]["shards"]:
            for member, content in _members(folder / "shards" / shard["file"]):
                if member.endswith(".json"):
                    self.keys.append(member.removesuffix(".json"))
                    self.notes.append(json.loads(bytes(content)))
                else:
                    self.files.append(content)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.files)

    @property
    def classes(self) -> list[str]:
        """Names of the labels."""
        return list(self.meta["classes"])

    @property
    def categories(self) -> list[str]:
        """Names of the objects' categories."""
        return list(self.meta["categories"])

    @property
    def keypoints(self) -> dict[str, Any]:
        """`names`, `flips` (the keypoint that each becomes in a mirror image) and OKS `sigmas`."""
        return dict(self.meta["keypoints"])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """`(N,)` class numbers; -1 where there is none."""
        return np.array([-1 if n["label"] is None else n["label"] for n in self.notes], np.int64)

    @property
    def objects(self) -> list[list[dict[str, Any]]]:
        """The objects of each image, in pixels of the stored image."""
        return [n["objects"] for n in self.notes]

    @cached_property
    def shapes(self) -> NDArray[np.int64]:
        """`(N, 2)` height and width of the stored images."""
        sizes = []
        for content in self.files:
            with Image.open(io.BytesIO(content)) as image:
                sizes.append((image.height, image.width))
        return np.array(sizes, np.int64).reshape(-1, 2)

    def image(self, index: int, size: int | None = None) -> NDArray[np.uint8]:
        """One RGB image `(3, H, W)`, or `(3, size, size)` by Pillow's bilinear filter."""
        with Image.open(io.BytesIO(self.files[index])) as file:
            image = file.convert("RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    def images(self, size: int | None = None) -> NDArray[np.uint8]:
        """All images `(N, 3, S, S)`.

        Raises:
            UserError: No size is given and the stored images differ in size.
        """
        images = [self.image(i, size) for i in range(len(self))]
        if len({i.shape for i in images}) > 1:
            raise UserError(f"{self.folder}: images of different sizes; give a size")
        return np.stack(images)

    def masks(self, index: int) -> NDArray[np.bool_]:
        """`(objects, H, W)` masks of one image, in the size of the stored image."""
        height, width = (int(s) for s in self.shapes[index])
        found = [masks.decode(o["segmentation"], height, width) for o in self.notes[index]["objects"]]
        return np.stack(found) if found else np.zeros((0, height, width), bool)

    def objects_at(self, size: int) -> list[list[dict[str, Any]]]:
        """The objects of each image after `images(size)`: boxes, areas, keypoints, masks (as run lengths) scaled."""
        return [
            [_scaled(o, int(h), int(w), size) for o in n["objects"]]
            for n, (h, w) in zip(self.notes, self.shapes, strict=True)
        ]


def _scaled(one: dict[str, Any], height: int, width: int, size: int) -> dict[str, Any]:
    """One object after its image was resized to `size` x `size`."""
    if (height, width) == (size, size):
        return one
    sx, sy = size / width, size / height
    x, y, w, h = one["bbox"]
    result = {**one, "bbox": [x * sx, y * sy, w * sx, h * sy], "area": one["area"] * sx * sy}
    if one.get("segmentation"):
        mask = masks.decode(one["segmentation"], height, width)
        result["segmentation"] = masks.encode(masks.resize(mask, size))
    if one.get("keypoints"):
        points = np.array(one["keypoints"], np.float64).reshape(-1, 3) * (sx, sy, 1)
        result["keypoints"] = [float(p) for p in points.ravel()]
    return result
