"""The stages: what each one needs and computes, how one is run, and the provenance it leaves."""

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mirepro import codelocks, determinism, files, params, preflight, profiles, ranks, site
from mirepro.errors import UserError
from mirepro.execution import Done, Job, execute, fingerprint, release
from mirepro.profiles import Profile


def code(profile: Profile) -> None:
    """Checks all parameters and regenerates the code locks; the only stage that runs every time."""
    relock(profile)  # before anything is refused: DVC has removed the locks
    profile.check()
    preflight.check(profile)


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
    return Job(params.plain(run), needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}", shared=True)


def evaluate(profile: Profile, name: str) -> Job:
    """Nearest neighbours and linear evaluation of one run."""
    entry = profile.entry("runs", name)
    values = profile.build(params.EvaluateParams, "evaluate")
    pretrained = f"runs/{profile.name}/pretrain/{name}"
    folder = f"data/{values.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.transfer.evaluate import evaluate

        determinism.check_device("evaluate.device", values.device, profile.tier)
        names, root = (name, entry.row, entry.seed), profile.root
        return evaluate(*names, values, root / pretrained, root / folder, work, out, fingerprint)

    needs = (f"{folder}/manifest.json", f"locks/{profile.name}/evaluate.json", pretrained)
    outputs = f"{profile.name}/evaluate/{name}"
    plain = _resolved(profile, values, entry)
    return Job(plain, needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}")


def detect(profile: Profile, name: str) -> Job:
    """Detection with one model (boxes, boxes and masks, or boxes and keypoints) on one run and one data set."""
    entry = profile.entry("detect_runs", name)
    values = profile.recipe(entry.data)
    pretrained = f"runs/{profile.name}/pretrain/{entry.run}"
    folder = f"data/{entry.data}"

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        from mirepro.transfer.detection import detect

        determinism.check_device("detect.device", values.device, profile.tier)
        names, root = (entry.run, entry.row, entry.seed, entry.model), profile.root
        return detect(*names, values, root / pretrained, root / folder, work, out, fingerprint)

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

        return toy(values, out)

    needs, outputs = (f"locks/{profile.name}/toy.json",), f"{profile.name}/toy"
    return Job(_resolved(profile, values), needs, compute, f"metrics/{outputs}.json", f"runs/{outputs}")


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


Launch = Callable[[Profile, str, str | None, str], None]
"""Computes the stage (profile, kind, key) with this fingerprint in another process, and waits for it."""


def run(root: Path, profile_name: str, kind: str, key: str | None = None, launch: Launch | None = None) -> None:
    """Runs one stage.

    Args:
        root: The repository's root.
        profile_name: The profile's name.
        kind: The class of stages.
        key: The one of that class.
        launch: Computes a stage of `JOBS` elsewhere; by default it is computed here.

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
    done: Done | None = None
    if kind in JOBS:
        elsewhere = None if launch is None else partial(launch, profile, kind, key)
        done = execute(root, *described(profile, kind, key), launch=elsewhere)
    elif ranks.leads():
        DIRECT[kind](profile, *keys)
        done = Done(time.time() - started)
    if done is not None:
        _record(profile, kind, keys, done)


class _Unfinished(Exception):
    """There is no result to collect."""


def collect(root: Path, profile_name: str, kind: str, key: str | None = None) -> bool:
    """Does what `run` would where a stage's result waits in its work folder; else it computes nothing: False.

    Raises:
        UserError: See `run`.
    """

    def refuse(*_: object) -> None:
        raise _Unfinished

    profile = profiles.load(root, profile_name)
    if kind not in JOBS or determinism.departures(profile.tier, profile.threads):
        return False  # `run` would start its own process anew
    try:
        run(root, profile_name, kind, key, refuse)
    except _Unfinished:
        return False
    return True


def prepare(root: Path, profile_name: str, kind: str, key: str | None) -> None:
    """Computes a stage's job and leaves the result in its work folder; `run` only collects it then.

    Does nothing where the last run had the same fingerprint: DVC will find that the stage is up to date.

    Raises:
        UserError: Whatever the stage refuses.
    """
    profile = profiles.load(root, profile_name)
    determinism.reexec_if_needed(profile.tier, profile.threads)
    name, job = described(profile, kind, key)
    if not current(profile, name, job):
        execute(root, name, job, collect=False)


def current(profile: Profile, name: str, job: Job) -> bool:
    """Whether the stage's last run had the same fingerprint, and what it left is still there."""
    record = provenance(profile) / f"{name}.json"
    before = files.read_json(record)["fingerprint"] if record.is_file() else None
    left = [profile.root / path for path in (job.metrics, job.outputs) if path is not None]
    return before == fingerprint(profile.root, name, job) and all(path.exists() for path in left)


def described(profile: Profile, kind: str, key: str | None) -> tuple[str, Job]:
    """A stage's name and its job, which sets torch up before it computes (collecting needs no torch)."""
    job = JOBS[kind](profile, *(() if key is None else (key,)))

    def compute(work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
        determinism.configure_torch(profile.tier, profile.threads)
        return job.compute(work, out, fingerprint)

    where = site.chosen(profile.root, JOBS)
    image = None if where is None else where.section(kind).image
    return f"{kind}@{key}" if key else kind, replace(job, compute=compute, image=image)


def recorded(profile: Profile, addresses: Iterable[str]) -> None:
    """Removes the work that was kept until DVC's record of these stages."""
    records = [provenance(profile) / f"{address.rpartition(':')[2]}.json" for address in addresses]
    release(profile.root, {files.read_json(path)["fingerprint"] for path in records if path.is_file()})


def provenance(profile: Profile) -> Path:
    """The folder of facts that vary between machines."""
    return profile.root / ".mirepro" / "provenance" / profile.name


def _record(profile: Profile, kind: str, keys: tuple[str, ...], done: Done) -> None:
    stage = "@".join((kind, *keys))
    facts: dict[str, Any] = {"stage": stage, "host": platform.node(), "python": platform.python_version()}
    facts |= {"seconds": round(done.seconds, 3), "fingerprint": done.fingerprint, "collected": done.collected}
    facts |= {"key": determinism.key(profile.tier, profile.threads)}
    facts |= {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    files.write_json(provenance(profile) / f"{stage}.json", facts)
