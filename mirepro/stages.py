"""A stage: parameters -> fingerprint -> resumable work folder -> run -> outputs placed -> provenance."""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from mirepro import codelocks, determinism, files, params, profiles
from mirepro.errors import UserError
from mirepro.profiles import Profile


@dataclass(frozen=True)
class Job:
    """A computation whose outputs are placed as a whole.

    Attributes:
        params: Plain values that decide the result.
        needs: Files and folders, relative to the root, that decide the result.
        compute: `(work, out, fingerprint) -> metrics`; `work` survives a kill, `out` is an empty folder to fill.
        metrics: Where the metrics go, relative to the root.
        outputs: Where `out` goes, relative to the root; None if the stage has metrics only.
    """

    params: Mapping[str, Any]
    needs: tuple[str, ...]
    compute: Callable[[Path, Path, str], dict[str, Any]]
    metrics: str
    outputs: str | None = None


def code(profile: Profile) -> None:
    """Checks all parameters and regenerates the code locks; the only stage that runs every time."""
    profile.check()
    relock(profile)


def relock(profile: Profile) -> None:
    """Writes the code locks; a data set whose shards are gone loses its receipt, so that its stage runs again.

    Raises:
        UserError: A data set has no manifest, or the code cannot be read.
    """
    codelocks.write(profile.root, profile.name, sorted({entry.objective for entry in profile.runs.values()}))
    for name in profile.values["datasets"]:
        folder = profile.root / "data" / name
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder}: no manifest.json; restore it from git, or `mirepro data import {name} PATH`")
        if not any((folder / "shards").glob("*.tar")) or _damaged(folder, name):
            _receipt(profile, name).unlink(missing_ok=True)


def _damaged(folder: Path, name: str) -> bool:
    """Whether shards that the project can render again differ from their manifest."""
    from mirepro import data

    manifest = files.read_json(folder / "manifest.json") if name in data.NAMES else {}
    shards = [shard for part in manifest.get("splits", {}).values() for shard in part["shards"]]
    paths = [folder / "shards" / shard["file"] for shard in shards]
    return any(
        not path.is_file() or files.sha256(path) != shard["sha256"] for path, shard in zip(paths, shards, strict=True)
    )


def _receipt(profile: Profile, name: str) -> Path:
    return profile.root / "runs" / profile.name / "data" / f"{name}.json"


def data(profile: Profile, name: str) -> None:
    """Renders a data set of the project's own, or checks an imported one; the receipt names its manifest."""
    from mirepro import data
    from mirepro.data import shards

    folder = profile.root / "data" / name
    if name in data.NAMES:
        data.build(name, folder)
    else:
        shards.verify(folder)
    files.write_json(_receipt(profile, name), {"data": name, "manifest": files.sha256(folder / "manifest.json")})


def pretrain(profile: Profile, name: str) -> Job:
    """Trains one run."""
    run = profile.run(name)
    folder = f"data/{run.pretrain.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.pretrain import pretrain

        return pretrain(run, profile.root / folder, work, out, fingerprint)

    locks = f"locks/{profile.name}"
    needs = (f"{folder}/manifest.json", f"{locks}/pretrain.json", f"{locks}/objectives/{run.objective}.json")
    outputs = f"{profile.name}/pretrain/{name}"
    return Job(params.plain(run), needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}")


def evaluate(profile: Profile, name: str) -> Job:
    """Nearest neighbours and linear evaluation of one run."""
    entry = profile.entry("runs", name)
    values = profile.build(params.EvaluateParams, "evaluate")
    pretrained = f"runs/{profile.name}/pretrain/{name}"
    folder = f"data/{values.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.transfer.evaluate import evaluate

        return evaluate(name, entry.row, entry.seed, values, profile.root / pretrained, profile.root / folder, out)

    needs = (f"{folder}/manifest.json", f"locks/{profile.name}/evaluate.json", pretrained)
    outputs = f"{profile.name}/evaluate/{name}"
    plain = _resolved(profile, values, entry)
    return Job(plain, needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}")


def detect(profile: Profile, name: str) -> Job:
    """Detection with one model (boxes and masks, or boxes and keypoints) on one run."""
    entry = profile.entry("detect_runs", name)
    values = profile.build(params.DetectParams, "detect")
    pretrained = f"runs/{profile.name}/pretrain/{entry.run}"
    folder = f"data/{values.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.transfer.detection import detect

        root = profile.root
        return detect(
            entry.run, entry.row, entry.seed, entry.model, values, root / pretrained, root / folder, work, out
        )

    lock = f"locks/{profile.name}/detect.json"
    needs = (f"{folder}/manifest.json", lock, f"{pretrained}/encoder.safetensors")
    outputs = f"{profile.name}/detect/{name}"
    plain = _resolved(profile, values, entry)
    return Job(plain, needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}")


def controls(profile: Profile) -> Job:
    """The control rows of T1."""
    values = profile.build(params.EvaluateParams, "evaluate")
    folder = f"data/{values.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.transfer.controls import controls

        return controls(values, profile.root / folder)

    needs = (f"{folder}/manifest.json", f"locks/{profile.name}/controls.json")
    return Job(_resolved(profile, values), needs, compute, f"metrics/{profile.name}/controls.json")


def toy(profile: Profile) -> Job:
    """The Gaussian toy of T5."""
    values = profile.build(params.ToyParams, "toy")

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.toy import toy

        return toy(values)

    needs = (f"locks/{profile.name}/toy.json",)
    return Job(_resolved(profile, values), needs, compute, f"metrics/{profile.name}/toy.json")


def _resolved(profile: Profile, values: Any, entry: Any = None) -> dict[str, Any]:
    shared = {"tier": profile.tier, "threads": profile.threads, "values": params.plain(values)}
    return shared | {"entry": params.plain(entry)}


def tables(profile: Profile) -> None:
    """Tables and the verdicts on the claims."""
    from mirepro.report import tables

    tables.build(profile.root, profile.name, profile.values["tables"])


def report(profile: Profile, view: Mapping[str, Any] | None = None) -> None:
    """The page; with `view` the untracked one that also shows what differs between machines."""
    from mirepro.report import page

    key = determinism.key(profile.tier, profile.threads)
    page.build(profile.root, profile.name, profile.values["tables"], key, view)


DIRECT: dict[str, Callable[..., None]] = {"code": code, "data": data, "tables": tables, "report": report}
"""Quick stages that write their files one by one, each atomically."""

JOBS: dict[str, Callable[..., Job]] = {
    "pretrain": pretrain, "evaluate": evaluate, "controls": controls, "detect": detect, "toy": toy,
}  # fmt: skip
"""Stages that compute in a work folder."""

KEYED = ("data", "pretrain", "evaluate", "detect")


def run(root: Path, profile_name: str, kind: str, key: str | None = None) -> None:
    """Runs one stage.

    Raises:
        UserError: Unknown stage, missing or superfluous key, and whatever the stage refuses.
    """
    if kind not in DIRECT and kind not in JOBS:
        raise UserError(f"stage {kind!r}: unknown; known: {', '.join([*DIRECT, *JOBS])}")
    if (key is not None) != (kind in KEYED):
        raise UserError(f"stage {kind}: {'needs a key, for example a run' if key is None else 'takes no key'}")
    profile = profiles.load(root, profile_name)
    keys = () if key is None else (key,)
    if kind != "code":
        determinism.reexec_if_needed(profile.tier, profile.threads)
    started = time.time()
    if kind in DIRECT:
        DIRECT[kind](profile, *keys)
        _record(profile, kind, keys, Done(time.time() - started))
    else:
        _record(profile, kind, keys, execute(root, *_job(profile, kind, key)))


def prepare(root: Path, profile_name: str, kind: str, key: str | None) -> None:
    """Computes a stage's job and leaves the result in its work folder; `run` only collects it then.

    Does nothing where the last run had the same fingerprint: DVC will find that the stage is up to date.

    Raises:
        UserError: Whatever the stage refuses.
    """
    profile = profiles.load(root, profile_name)
    determinism.reexec_if_needed(profile.tier, profile.threads)
    name, job = _job(profile, kind, key)
    record = provenance(profile) / f"{name}.json"
    before = files.read_json(record)["fingerprint"] if record.is_file() else None
    if before != fingerprint(root, name, job) or not (root / job.metrics).is_file():
        execute(root, name, job, collect=False)


def _job(profile: Profile, kind: str, key: str | None) -> tuple[str, Job]:
    """A stage's name and its job, which sets torch up before it computes (collecting needs no torch)."""
    job = JOBS[kind](profile, *(() if key is None else (key,)))

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        determinism.configure_torch(profile.tier, profile.threads)
        return job.compute(work, out, fingerprint)

    return f"{kind}@{key}" if key else kind, replace(job, compute=compute)


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
    text = json.dumps({"stage": stage, "params": job.params, "needs": needs}, sort_keys=True, default=str)
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


def execute(root: Path, stage: str, job: Job, collect: bool = True) -> Done:
    """Computes a job, or resumes it, or only collects what an earlier process had finished.

    Raises:
        UserError: The disk is full or read-only, and whatever the computation refuses.
    """
    mark = fingerprint(root, stage, job)
    work = root / ".mirepro" / "work" / mark
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work.with_suffix(".lock")):
            work.mkdir(exist_ok=True)
            finished = work / "finished"
            collected = finished.is_dir()
            if not collected:
                _compute(work, finished, job, mark)
            seconds = files.read_json(finished / "seconds.json")
            if collect:
                _collect(root, finished, job)
                shutil.rmtree(work)
    except OSError as error:
        raise files.refusal(Path(error.filename or work), error) from error
    if collect:
        work.with_suffix(".lock").unlink(missing_ok=True)
    return Done(seconds, mark, collected)


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
        shutil.copytree(source, fresh)
    else:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
    files.sync_folder(target.parent)


def provenance(profile: Profile) -> Path:
    """The folder of facts that vary between machines."""
    return profile.root / ".mirepro" / "provenance" / profile.name


def _record(profile: Profile, kind: str, keys: tuple[str, ...], done: Done) -> None:
    stage = "@".join((kind, *keys))
    facts: dict[str, Any] = {"stage": stage, "host": platform.node(), "python": platform.python_version()}
    facts |= {"seconds": round(done.seconds, 3), "fingerprint": done.fingerprint, "collected": done.collected}
    facts |= {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    files.write_json(provenance(profile) / f"{stage}.json", facts)
