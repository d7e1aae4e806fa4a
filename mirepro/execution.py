"""A job: fingerprint -> resumable work folder -> outputs placed as a whole, so that a kill costs nothing finished."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mirepro import files, ranks
from mirepro.errors import UserError

KEEP = "MIREPRO_KEEP"  # environment variable: finished work stays when it is collected


@dataclass(frozen=True)
class Job:
    """A computation whose outputs are placed as a whole.

    Attributes:
        params: Plain values that decide the result.
        needs: Files and folders, relative to the root, that decide the result.
        compute: `(work, out, fingerprint) -> metrics`; `work` survives a kill, `out` is an empty folder to fill.
        metrics: Where the metrics go, relative to the root.
        outputs: Where `out` goes, relative to the root; None if the stage has metrics only.
        image: Digest of the container image that computes it; None without a container.
        shared: Whether all ranks compute it together; the others leave it to the first rank.
    """

    params: Mapping[str, Any]
    needs: tuple[str, ...]
    compute: Callable[[Path, Path, str], dict[str, Any]]
    metrics: str
    outputs: str | None = None
    image: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Done:
    """What the provenance says about a finished stage."""

    seconds: float
    fingerprint: str | None = None
    collected: bool = field(default=False)


def fingerprint(root: Path, stage: str, job: Job) -> str:
    """sha256 of everything a job's result depends on: stage, resolved parameters, data, code locks.

    Raises:
        UserError: An input is missing.
    """
    needs = {name: content_digest(root / name) for name in job.needs}
    values = {"stage": stage, "params": job.params, "needs": needs} | ({"image": job.image} if job.image else {})
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(path: Path) -> str:
    """sha256 of a file, or of a folder's file names and contents.

    Raises:
        UserError: No such path.
    """
    if path.is_file():
        return files.sha256(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file; run the stage that makes it (`mirepro repro`)")
    inner = sorted(item for item in path.rglob("*") if item.is_file())
    return hashlib.sha256("\n".join(f"{p.relative_to(path)} {files.sha256(p)}" for p in inner).encode()).hexdigest()


def work_folder(root: Path, mark: str) -> Path:
    """Where the job with this fingerprint computes."""
    return root / ".mirepro" / "work" / mark


def execute(
    root: Path, stage: str, job: Job, collect: bool = True, launch: Callable[[str], None] | None = None
) -> Done | None:
    """Computes a job, or resumes it, or only collects what an earlier process had finished.

    Where `KEEP` stands in the environment, the finished work stays until `release`: a caller that is killed between
    this and its own record of the stage asks again, and nothing is computed twice.

    Of several ranks the first one does this; the others compute along where all are needed, write nothing and get None.

    Args:
        root: The repository's root.
        stage: The stage's name.
        job: What to compute.
        collect: Place the result; otherwise it stays in the work folder.
        launch: Computes the job with this fingerprint elsewhere; by default it is computed here.

    Raises:
        UserError: The disk is full or read-only, and whatever the computation refuses.
    """
    mark = fingerprint(root, stage, job)
    if not ranks.leads():
        _follow(job, mark)
        return None
    work = work_folder(root, mark)
    if launch is not None and not (work / "finished").is_dir():
        launch(mark)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work.with_suffix(".lock")):
            work.mkdir(exist_ok=True)
            finished = work / "finished"
            collected = finished.is_dir()
            if not collected and launch is not None:
                raise UserError(f"{stage}: another command has collected its result; run the command again")
            if not collected:
                _compute(work, finished, job, mark)
            elif job.shared:
                ranks.dismiss()
            seconds = files.read_json(finished / "seconds.json")
            if collect:
                _collect(root, finished, job)
                if KEEP not in os.environ:
                    _remove(work)
    except OSError as error:
        raise files.refusal(Path(error.filename or work), error) from error
    return Done(seconds, mark, collected)


def release(root: Path, marks: Container[str]) -> None:
    """Removes the work folders of jobs whose results are recorded; one that a process uses at the moment stays."""
    folder = work_folder(root, "")
    for mark in {path.name.removesuffix(".lock") for path in folder.glob("*")}:
        if mark in marks:
            with suppress(Timeout), FileLock(folder / f"{mark}.lock", blocking=False):
                _remove(folder / mark)


def _remove(work: Path) -> None:
    """Removes a work folder and its lock, which the caller holds; a kill half-way leaves no half of a result."""
    with suppress(FileNotFoundError):
        os.replace(work / "finished", work / "partial")
    shutil.rmtree(work, ignore_errors=True)
    work.with_suffix(".lock").unlink(missing_ok=True)


def _follow(job: Job, mark: str) -> None:
    if job.shared:
        nowhere = Path(os.devnull)
        job.compute(nowhere, nowhere, mark)


def _compute(work: Path, finished: Path, job: Job, mark: str) -> None:
    """Fills `finished`; its existence says that the computation is complete."""
    started = time.time()
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    for folder in (work / "state", partial / "out"):
        folder.mkdir(parents=True, exist_ok=True)
    metrics = job.compute(work / "state", partial / "out", mark)
    files.write_json(partial / "metrics.json", metrics)
    files.write_json(partial / "seconds.json", round(time.time() - started, 3))
    os.replace(partial, finished)
    files.sync_folder(work)


def _collect(root: Path, finished: Path, job: Job) -> None:
    place(finished / "metrics.json", root / job.metrics)
    if job.outputs is not None:
        place(finished / "out", root / job.outputs)


def place(source: Path, target: Path) -> None:
    """Copies a file or folder beside its target and renames it there; the source stays for a repetition."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    for stale in (fresh, target) if source.is_dir() else ():
        shutil.rmtree(stale, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, fresh, copy_function=_copy)
    else:
        _copy(source, fresh)
    os.replace(fresh, target)
    files.sync_folder(target.parent)


def _copy(source: Path | str, target: Path | str) -> None:
    """Copies a file's content and makes it survive a power cut."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
