"""Shards of a data set too large for one pass: written in parallel, and a killed import goes on where it stopped.

The plan (which image lies where, in which shard) is made first, without reading an image; then every shard is a job of
its own. A finished shard lies beside a note with the digest of its plan, and is used again as long as that digest
fits. Nothing of it is visible in the data set's folder before all shards are there.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mirepro import files
from mirepro.data import shards
from mirepro.errors import UserError

QUALITY = 95
"""JPEG quality of images that are stored in another size."""


@dataclass(frozen=True)
class Item:
    """An image that is not read yet: `size` bytes at `offset` of the file `path`, shown to people as `where`."""

    key: str
    label: int
    path: str
    offset: int
    size: int
    stamp: int
    where: str


@dataclass(frozen=True)
class Job:
    """One shard: its file's name, its items, and the side of the stored squares (0: the images' own bytes)."""

    name: str
    items: tuple[Item, ...]
    side: int

    @property
    def digest(self) -> str:
        """Names the shard's content before any image is read."""
        plan = [shards.SCHEMA, self.side, QUALITY, [astuple(item) for item in self.items]]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def pack(
    folder: Path | str, name: str, splits: Mapping[str, Iterable[Item]], meta: Mapping[str, Any], *,
    side: int = 0, per_shard: int = 9000, jobs: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Writes shards, index and manifest; the old ones stay until the new ones are complete.

    `shards/<split>.index` has one line an image: shard, offset, bytes, label, key. It lets a loader seek.

    Args:
        folder: The data set's folder.
        name: The data set's name.
        splits: Items by split, in their order.
        meta: As for `shards.write`.
        side: Side of the stored squares in pixels; 0 keeps every image's bytes.
        per_shard: Images of one shard.
        jobs: Processes.

    Returns:
        The manifest.

    Raises:
        UserError: An image is corrupt, or the folder cannot be written; finished shards wait for the next attempt.
    """
    folder = Path(folder)
    work = folder.parent / f".{folder.name}.importing"
    parts = {split: _cut(split, tuple(items), side, per_shard) for split, items in splits.items()}
    try:
        work.mkdir(parents=True, exist_ok=True)
        _work([job for part in parts.values() for job in part], work, jobs)
        manifest = {"schema": shards.SCHEMA, "name": name, "meta": dict(meta)}
        manifest["splits"] = {split: _gather(split, part, work) for split, part in parts.items()}
        _publish(work, folder, {job.name for part in parts.values() for job in part} | {f"{s}.index" for s in parts})
        files.write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise files.refusal(folder, error) from error
    return manifest


def _cut(split: str, items: tuple[Item, ...], side: int, per_shard: int) -> list[Job]:
    starts = range(0, len(items), per_shard)
    return [Job(f"{split}-{i:04d}.tar", items[s : s + per_shard], side) for i, s in enumerate(starts)]


def _work(todo: list[Job], work: Path, jobs: int) -> None:
    left = [job for job in todo if not _finished(job, work)]
    if jobs <= 1 or len(left) <= 1:
        for job in left:
            write_shard(job, work)
        return
    with ProcessPoolExecutor(min(jobs, len(left))) as pool:
        try:
            for _ in pool.map(write_shard, left, [work] * len(left)):
                pass
        except BrokenProcessPool as error:
            raise UserError(f"{work}: a process of the import was killed; run it again with fewer --jobs") from error
        except BaseException:  # a corrupt image, Ctrl-C: what has not begun is left to the next attempt
            pool.shutdown(cancel_futures=True)
            raise


def _note(job: Job, work: Path) -> Path:
    return work / f"{job.name}.json"


def _finished(job: Job, work: Path) -> bool:
    note, path = _note(job, work), work / job.name
    if not (note.is_file() and path.is_file()):
        return False
    facts = files.read_json(note)
    return bool(facts["digest"] == job.digest and facts["shard"]["bytes"] == path.stat().st_size)


def write_shard(job: Job, work: Path) -> None:
    """Writes one shard and, when it is complete, its note."""
    fresh, lines = work / f".{job.name}.new", []
    try:
        with tarfile.open(fresh, "w", format=tarfile.USTAR_FORMAT) as tar:
            for item in job.items:
                content, suffix = stored(item, job.side)
                lines.append(f"{job.name}\t{tar.offset + tarfile.BLOCKSIZE}\t{len(content)}\t{item.label}\t{item.key}")
                shards._add(tar, item.key + suffix, content)
                note = json.dumps({"label": item.label, "objects": []}, separators=(",", ":"))
                shards._add(tar, item.key + ".json", note.encode())
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        shard = {"file": job.name, "bytes": fresh.stat().st_size, "sha256": files.sha256(fresh)}
        os.replace(fresh, work / job.name)
        files.write_json(_note(job, work), {"digest": job.digest, "shard": shard, "index": lines})
    finally:
        fresh.unlink(missing_ok=True)


def stored(item: Item, side: int) -> tuple[bytes, str]:
    """An image as it is stored, and its suffix; it is decoded in any case, so that a corrupt one is found now.

    With a `side`: the shorter side is resized to it (bilinear), the central square cut out, JPEG of quality 95.

    Raises:
        UserError: The image is missing, cut short or does not decode.
    """
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            content = file.read(item.size)
        if len(content) != item.size:
            raise UserError(f"{item.where}: {len(content)} bytes, not {item.size}; fetch it again")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return (content, ".jpg") if not side else (_square(image, side), ".jpg")
    except FileNotFoundError as error:
        raise UserError(f"{item.where}: missing; complete the data") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <_io")[0]
        raise UserError(f"{item.where}: corrupt image ({reason}); fetch it again") from error


def _square(image: Image.Image, side: int) -> bytes:
    rgb, least = image.convert("RGB"), min(image.size)
    left, top = (image.width - least) // 2, (image.height - least) // 2
    box = (left, top, left + least, top + least)
    out = io.BytesIO()
    rgb.resize((side, side), Image.Resampling.BILINEAR, box).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _gather(split: str, part: list[Job], work: Path) -> dict[str, Any]:
    """A split's part of the manifest; writes its index."""
    notes = [files.read_json(_note(job, work)) for job in part]
    lines = [line for note in notes for line in note["index"]]
    path = work / f"{split}.index"
    files.write_text(path, "".join(f"{line}\n" for line in lines))
    index = {"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
    return {"samples": len(lines), "shards": [note["shard"] for note in notes], "index": index}


def _publish(work: Path, folder: Path, wanted: set[str]) -> None:
    """The work folder becomes the folder of shards, without what is no part of it."""
    for path in work.iterdir():
        if path.name not in wanted:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    old = folder / ".shards-old"
    shutil.rmtree(old, ignore_errors=True)
    if (folder / "shards").exists():
        os.rename(folder / "shards", old)
    os.rename(work, folder / "shards")
    files.sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
