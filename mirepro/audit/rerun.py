"""Levels 2 and 3: evaluations, or pretraining too, are run again in a box that does not hold the committed results."""

import fnmatch
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from mirepro import diff, files, params
from mirepro.audit import boxes, safe, source
from mirepro.audit.cells import Cell
from mirepro.audit.integrity import Audited
from mirepro.audit.sandbox import Outcome, Sandbox, Worker, execute
from mirepro.errors import UserError
from mirepro.profiles import Profile

SECONDS = 12 * 3600.0


@dataclass(frozen=True)
class Rerun:
    """What came of one stage.

    Attributes:
        stage: `kind@key` or `kind`.
        own: Whether the judge's own code ran; else the audited code in the sandbox.
        seconds: Duration.
        error: Last lines of a failure; empty if none.
        metrics_identical: Whether the metrics file has the committed bytes.
        outputs_identical: Whether the outputs have the digest in dvc.lock; None where a stage has none.
        step: The first difference, in words.
    """

    stage: str
    own: bool
    seconds: float
    error: str = ""
    metrics_identical: bool = False
    outputs_identical: bool | None = None
    step: str = ""


@dataclass
class Plan:
    """Stages to run: chains that may run side by side, each in its order.

    Attributes:
        chains: Stage names.
        fresh: `{row: [run, ...]}` of new runs with fresh seeds.
        runs: Parameters of the new runs.
    """

    chains: list[list[str]]
    fresh: dict[str, list[str]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        """All of them."""
        return [stage for chain in self.chains for stage in chain]


def plan(profile: Profile, cells: Sequence[Cell], level: int, select: Sequence[str], seeds: int = 0) -> Plan:
    """Chooses the stages: those that `select` names, or that measure a table it names.

    Without a selection all of them; at level 2, which takes trained weights as they are pinned, all but the detections:
    they train a detector each, of which nothing is pinned.

    Raises:
        UserError: A pattern names nothing.
    """
    sources = {part.stage for cell in cells for part in cell.parts}
    measured = sources | {f"evaluate@{stage.partition('@')[2]}" for stage in sources if stage.startswith("pretrain@")}
    tables: dict[str, set[str]] = {}
    for cell in cells:
        tables.setdefault(cell.address[0], set()).update(part.stage for part in cell.parts)
    chosen: set[str] = set()
    for pattern in select or (["*"] if level > 2 else sorted(quick(measured))):
        found = tables.get(pattern) or {stage for stage in measured if fnmatch.fnmatchcase(stage, pattern)}
        if not found:
            raise UserError(f"--select {pattern}: no table and no stage is called so; try T1 or 'evaluate@ir-*'")
        chosen |= found
    if level < 3:
        return Plan([[stage] for stage in sorted(chosen) if not stage.startswith("pretrain@")])
    result = Plan(_chains(profile, chosen))
    _add_fresh(profile, result, seeds)
    return result


def quick(stages: Iterable[str]) -> set[str]:
    """The stages that train neither encoder nor detector."""
    return {stage for stage in stages if stage.partition("@")[0] not in ("pretrain", "detect")}


def _chains(profile: Profile, chosen: set[str]) -> list[list[str]]:
    """Pretraining of each run concerned, then whatever was chosen of it."""
    runs: dict[str, list[str]] = {}
    alone = []
    for stage in sorted(chosen):
        kind, _, key = stage.partition("@")
        if kind in ("controls", "toy"):
            alone.append([stage])
            continue
        run = profile.detect_runs[key].run if kind == "detect" else key
        chain = runs.setdefault(run, [f"pretrain@{run}"])
        wanted = f"evaluate@{run}" if kind == "pretrain" else stage
        chain += [] if wanted in chain else [wanted]
    return alone + list(runs.values())


def _add_fresh(profile: Profile, result: Plan, seeds: int) -> None:
    """Fresh runs for every row concerned, with seeds above all that the profile uses."""
    first = 1 + max((entry.seed for entry in profile.runs.values()), default=-1)
    retrained = [chain[0].partition("@")[2] for chain in result.chains if chain[0].startswith("pretrain@")]
    for row in dict.fromkeys(profile.runs[run].row for run in retrained) if seeds else ():
        for seed in range(first, first + seeds):
            name = f"{row}-s{seed}"
            result.runs[name] = {"row": row, "objective": profile.rows[row].objective, "seed": seed}
            result.fresh.setdefault(row, []).append(name)
            result.chains.append([f"pretrain@{name}", f"evaluate@{name}"])


def own_code(stage: str, profile: Profile, same: Mapping[str, bool]) -> bool:
    """Whether the judge's code for a stage has the hashes of the audited locks."""
    kind, _, key = stage.partition("@")
    run = profile.detect_runs[key].run if kind == "detect" else key
    objective = f"objectives/{profile.runs[run].objective}" if kind == "pretrain" else None
    return same[kind] and (objective is None or same[objective])


def prepare(audited: Audited, box: Path, chosen: Plan, level: int, same: Mapping[str, bool]) -> Profile:
    """A box for the plan: data, parameters with fresh runs, and at level 2 the committed checkpoints under test.

    Raises:
        UserError: The audited code is needed and cannot run here.
    """
    profile = boxes.base(audited.copy, box, audited.profile, audited.profile.values["datasets"])
    if chosen.runs:
        profile = boxes.set_parameters(box, profile, {"runs": chosen.runs})
    if level == 2:
        boxes.put(audited.copy, box, [f"runs/{audited.name}/pretrain/{_pretrained(profile, s)}" for s in chosen.stages])
    if not all(own_code(stage, profile, same) for stage in chosen.stages) and not (box / "mirepro").exists():
        boxes.add_code(audited.copy, box)
    return profile


def _pretrained(profile: Profile, stage: str) -> str:
    kind, _, key = stage.partition("@")
    return profile.detect_runs[key].run if kind == "detect" else key or "none"


def missing(audited: Audited, stage: str, level: int) -> str:
    """What a stage needs that is not there; empty if nothing."""
    run = _pretrained(audited.profile, stage)
    wanted = f"runs/{audited.name}/pretrain/{run}"
    needed = level == 2 and stage.partition("@")[0] in ("evaluate", "detect")
    return f"{wanted} is not there (--remote)" if needed and not (audited.copy / wanted).is_dir() else ""


@contextmanager
def processors(jobs: int, sandbox: Sandbox) -> Iterator[Executor]:
    """Threads for that many things at a time; when something fails, the others end and no further one begins."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            sandbox.end()
            raise


@dataclass
class Runner:
    """Runs the chains of a plan and remembers what is finished, so that a killed audit goes on.

    Attributes:
        audited: What is audited.
        box: Where stages run.
        profile: The box's profile.
        sandbox: How they run.
        same: Locks that agree with the judge's code.
        records: Folder of finished stages.
        say: Told about progress.
    """

    audited: Audited
    box: Path
    profile: Profile
    sandbox: Sandbox
    same: Mapping[str, bool]
    records: Path
    say: Callable[[str], None] = print

    def data(self, sets: Sequence[str]) -> None:
        """Renders the data sets whose shards are not in the box.

        Raises:
            UserError: A data set cannot be made.
        """
        for name in sets:
            if not (self.box / "data" / name / "shards").is_dir():
                self.say(f"data@{name}")
                outcome = execute(self.sandbox, self.box, self.profile, f"data@{name}", own=True, timeout=SECONDS)
                if outcome.code:
                    raise UserError(f"data {name}: {outcome.tail or outcome.code}; `mirepro data import` it first")

    def run(self, chosen: Plan, jobs: int, pool: Executor) -> dict[str, Rerun]:
        """Runs everything in a pool of that many jobs; a failed stage ends its chain only.

        Stages of the judge's own code share one sandbox for each job; each stage of other code gets its own.
        """
        started, total, lock = time.monotonic(), len(chosen.stages), Lock()
        results: dict[str, Rerun] = {}
        free: SimpleQueue[Worker] = SimpleQueue()

        def chain(stages: list[str]) -> None:
            for stage in stages:
                worker = free.get()
                try:
                    result = self._stage(worker, stage)
                finally:
                    free.put(worker)
                with lock:
                    results[stage] = result
                    left = (time.monotonic() - started) / len(results) * (total - len(results))
                    state = "failed" if result.error else f"{result.seconds:.0f} s"
                    self.say(f"[{len(results)}/{total}] {stage}: {state}; about {left:.0f} s left")
                if result.error:
                    return

        with ExitStack() as workers:
            for _ in range(jobs):
                free.put(workers.enter_context(Worker(self.sandbox, self.box, self.profile)))
            list(pool.map(chain, chosen.chains))
        return results

    def _stage(self, worker: Worker, stage: str) -> Rerun:
        record = self.records / f"{stage}.json"
        if record.is_file():
            return params.build(Rerun, files.read_json(record), record.name)
        own = own_code(stage, self.profile, self.same)
        started = time.monotonic()
        outcome = worker.run(stage, SECONDS) if own else _apart(self.sandbox, self.box, self.profile, stage)
        seconds = round(time.monotonic() - started, 2)
        if outcome.code:
            return Rerun(stage, own, seconds, outcome.tail or f"exit {outcome.code}")
        result = compare(self.audited, self.box, stage, own, seconds)
        files.write_json(record, asdict(result))
        return result


def compute(sandbox: Sandbox, box: Path, profile: Profile, stage: str, same: Mapping[str, bool]) -> Outcome:
    """Runs one stage on a box, by the judge's own code where that is the audited one."""
    if own_code(stage, profile, same):
        return execute(sandbox, box, profile, stage, own=True, timeout=SECONDS)
    return _apart(sandbox, box, profile, stage)


def _apart(sandbox: Sandbox, box: Path, profile: Profile, stage: str) -> Outcome:
    """Runs a stage of the source's code in a room of its own, which nothing but this stage's results leaves.

    So it can neither change what others are given nor what they have found.
    """
    name, run, (metrics, outputs) = profile.name, _pretrained(profile, stage), results(profile, stage)
    given = ["params.yaml", str(profile.path.relative_to(profile.root)), f"locks/{name}", "mirepro"]
    given += [f"data/{data}" for data in profile.values["datasets"]]
    given += [] if stage.startswith("pretrain@") else [f"runs/{name}/pretrain/{run}"]
    with tempfile.TemporaryDirectory(prefix="room-", dir=box.parent) as folder:
        room = Path(folder)
        boxes.put(box, room, given)
        outcome = execute(sandbox, room, profile, stage, own=False, timeout=SECONDS)
        if not outcome.code:
            try:
                boxes.take(room, box, (metrics, outputs))
            except UserError as error:
                return Outcome(1, str(error))
    return outcome


def results(profile: Profile, stage: str) -> tuple[str, str]:
    """A stage's metrics file and its folder of outputs."""
    place = f"{profile.name}/{stage.replace('@', '/')}"
    return f"metrics/{place}.json", f"runs/{place}"


def compare(audited: Audited, box: Path, stage: str, own: bool, seconds: float) -> Rerun:
    """A finished stage's metrics and outputs against the committed ones."""
    metrics, outputs = results(audited.profile, stage)
    old, new = audited.copy / metrics, box / metrics
    same = old.is_file() and new.is_file() and old.read_bytes() == new.read_bytes()
    if not new.is_file():
        return Rerun(stage, own, seconds, f"it left no {metrics}")
    found = {str(path.relative_to(box)): source.hashes(path) for path in safe.walk(box / outputs)} if (
        box / outputs).is_dir() else {}  # fmt: skip
    promised = audited.outputs().get(outputs)
    equal = None if not found else promised is not None and source.folder_md5(found, outputs) == promised
    step = "" if same and equal is not False else _first(audited, box, outputs, metrics, same)
    return Rerun(stage, own, seconds, "", same, equal, step)


def _first(audited: Audited, box: Path, outputs: str, metrics: str, same: bool) -> str:
    """The first differing step where both have a digest chain, else the files that differ."""
    chain = f"{outputs}/chain.txt"
    if (audited.copy / chain).is_file() and (box / chain).is_file():
        try:
            safe.regular(audited.copy / chain, safe.JSON_BYTES)
            words = diff.diff(audited.copy / chain, box / chain)
        except (UserError, AttributeError, TypeError, KeyError, RecursionError):
            words = "the committed digest chain is damaged"
        if words:
            return words if len(words) < 200 else f"{words[:200]} ..."
    folders = [root / outputs for root in (audited.copy, box)]
    there = [folder for folder in folders if folder.is_dir()]
    names = sorted({str(path.relative_to(folder)) for folder in there for path in safe.walk(folder)})
    differing = [f"{outputs}/{name}" for name in names if not _equal(*(folder / name for folder in folders))]
    return ", ".join(differing + ([] if same else [metrics])) or f"{outputs} is not what dvc.lock says"


def _equal(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()
