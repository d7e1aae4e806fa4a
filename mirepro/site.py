"""A site file: where the stages of each class run. It decides no result, so it stands outside the pipeline."""

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirepro import params
from mirepro.errors import UserError

VARIABLE = "MIREPRO_LAUNCH"
EXECUTORS = ("slurm", "local")
RUNTIMES = ("podman", "apptainer", "pyxis")
SHARED = "all"
"""The section whose values every class of stages starts from."""

HEEDED_HERE = {"gpus", "time", "grace", "tasks", "setup"}
"""The keys of a section that mean something to a job of this machine."""
RANKED = "pretrain"
"""The class of stages that several tasks can share."""

OWN = {
    "account", "array", "comment", "cpus-per-task", "error", "gpus-per-node", "job-name", "mem", "nodes",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "signal", "time",
}  # fmt: skip
"""sbatch options that this program sets itself."""


@dataclass(frozen=True)
class Section:
    """What a job of one class asks for; None leaves it to the cluster.

    Attributes:
        gpus: GPUs of each node.
        cpus: Cores of each task; by default the profile's threads.
        memory: Of each node, in Slurm's spelling: "32G".
        time: Limit of one run of the job, in minutes or Slurm's spelling ("1-12:00:00"); a requeued job starts anew.
        grace: Seconds between the signal to stop and the limit.
        nodes: Nodes of a job; several are for pretraining only.
        tasks: Processes on each node; likewise.
        image: Container image by digest: "registry/name@sha256:...".
        runtime: What starts the image: podman, apptainer or pyxis.
        binds: Folders the container sees beside the repository, "host:container" or one path for both.
        setup: Shell lines before the job's command.
        options: Further sbatch options by their long names: {reservation = "x", exclusive = true}.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int = 0
    cpus: int | None = None
    memory: str | None = None
    time: str | int = "1:00:00"
    grace: int = 60
    nodes: int = 1
    tasks: int = 1
    image: str | None = None
    runtime: str = "podman"
    binds: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def minutes(self) -> int:
        """The time limit."""
        return parse_minutes(self.time)


@dataclass(frozen=True)
class Site:
    """A place to run stages.

    Attributes:
        name: What MIREPRO_LAUNCH names.
        executor: slurm, or local for jobs on this machine that outlive the command.
        poll: Seconds between looks at the queue.
        settle: Seconds that a result may need to appear after its job has left the queue (shared file systems).
        retries: Further attempts after a lost node, a time-out or a crash that made no progress.
        requeues: How often Slurm may requeue one job that reached its time limit.
        sections: What each class of stages asks for.
    """

    name: str
    executor: str = "slurm"
    poll: float = 5.0
    settle: float = 20.0
    retries: int = 3
    requeues: int = 10_000
    sections: Mapping[str, Section] = field(default_factory=dict)

    def section(self, kind: str) -> Section:
        """What a stage of this class asks for."""
        return self.sections.get(kind, Section())


def parse_minutes(value: str | int) -> int:
    """Minutes, rounded up, of Slurm's ways to write a time: 90, "90:00", "1:30:00", "1-12", "1-12:00".

    Raises:
        UserError: Anything else, or no time at all.
    """
    text = str(value)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"time: {value!r} is no time; write minutes or days-hours:minutes:seconds")
    days, *fields = match.groups()
    numbers = [int(part) for part in fields if part is not None]
    units = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    seconds = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if seconds == 0:
        raise UserError(f"time: {value!r} is no time; write minutes or days-hours:minutes:seconds")
    return math.ceil(seconds / 60)


def chosen(root: Path, kinds: Iterable[str]) -> Site | None:
    """The site that MIREPRO_LAUNCH names; None for `inline`, where a stage computes in its own process.

    Raises:
        UserError: See `load`.
    """
    name = os.environ.get(VARIABLE, "inline")
    return None if name in ("", "inline") else load(root, name, kinds)


def load(root: Path, name: str, kinds: Iterable[str]) -> Site:
    """Reads launch/<name>.toml; `local` and `slurm` need no file.

    Args:
        root: The repository's root.
        name: The site's name.
        kinds: The classes of stages that may have a section.

    Raises:
        UserError: No such site, unknown key (with the nearest known one), an impossible value, or one nobody heeds.
    """
    path = root / "launch" / f"{name}.toml"
    if not path.is_file() and name in EXECUTORS:
        values: dict[str, Any] = {"executor": name}
    else:
        values = _read(path, name)
    sections = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
    classes = {f.name for f in dataclasses.fields(Site)} - {"name", "sections"}
    _known(values, classes | {SHARED, *kinds}, str(path), "key")
    site = params.build(Site, values | {"name": name}, str(path))
    _known(sections, {SHARED, *kinds}, str(path), "section")
    for key, section in sections.items():
        _known(section, {f.name for f in dataclasses.fields(Section)}, f"{path}: {key}", "key")
    shared = sections.pop(SHARED, {})
    built = {kind: _section(shared | sections.get(kind, {}), f"{path}: {kind}") for kind in kinds}
    _check(site, path)
    for kind, section in built.items():
        _heeded(site.executor, kind, section, f"{path}: {kind}")
    return dataclasses.replace(site, sections=built)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = sorted(file.stem for file in path.parent.glob("*.toml"))
        known = ", ".join(dict.fromkeys(["inline", *EXECUTORS, *found]))
        raise UserError(f"{VARIABLE}: {name!r}: no file {path}; known: {known}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error}); correct it") from error


def _known(values: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"{where}: {key}: unknown {what}; {hint}")


def _section(values: Mapping[str, Any], where: str) -> Section:
    values = dict(values)
    time = values.pop("time", Section.time)  # the one value of two types
    section = dataclasses.replace(params.build(Section, values, where), time=time)
    try:
        parse_minutes(time)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    rules = {
        "gpus": (section.gpus in (0, section.tasks), f"0, or {section.tasks}: one for each of a node's tasks"),
        "cpus": (section.cpus is None or section.cpus >= 1, "1 or more"),
        "nodes": (section.nodes >= 1, "1 or more"),
        "tasks": (section.tasks >= 1, "1 or more"),
        "grace": (1 <= section.grace < 60 * section.minutes, "some seconds, fewer than the time limit has"),
        "memory": (section.memory is None or re.fullmatch(r"\d+[KMGT]?", section.memory), 'a size such as "32G"'),
        "runtime": (section.runtime in RUNTIMES, " or ".join(RUNTIMES)),
        "image": (section.image is None or "@sha256:" in section.image, 'a digest: "registry/name@sha256:..."'),
    }
    for key, (right, remedy) in rules.items():
        if not right:
            raise UserError(f"{where}.{key}: {getattr(section, key)!r} is impossible; use {remedy}")
    for key, value in section.options.items():
        if key in OWN:
            raise UserError(f"{where}.options.{key}: set by the launcher; use the section's own key, or leave it out")
        if value is False or not isinstance(value, str | int | bool):
            raise UserError(f"{where}.options.{key}: expected text, a number or true, got {value!r}")
    return section


def _heeded(executor: str, kind: str, section: Section, where: str) -> None:
    """Refuses what would be ignored."""
    plain = Section()
    changed = {key: value for key, value in vars(section).items() if value != getattr(plain, key)}
    for key, value in changed.items():
        if executor == "local" and key not in HEEDED_HERE:
            remedy = 'leave it out, or set executor = "slurm"'
            raise UserError(f"{where}.{key}: {value!r} means nothing to jobs of this machine; {remedy}")
        if kind != RANKED and key in ("nodes", "tasks"):
            raise UserError(f"{where}.{key}: {value!r} is impossible, such a stage is one task; set it in [{RANKED}]")


def _check(site: Site, path: Path) -> None:
    rules = {
        "executor": (site.executor in EXECUTORS, " or ".join(EXECUTORS)),
        "poll": (site.poll > 0, "some seconds"),
        "settle": (site.settle >= 0, "0 or more seconds"),
        "retries": (site.retries >= 0, "0 or more"),
        "requeues": (site.requeues >= 0, "0 or more"),
    }
    for key, (right, remedy) in rules.items():
        if not right:
            raise UserError(f"{path}: {key}: {getattr(site, key)!r} is impossible; use {remedy}")
