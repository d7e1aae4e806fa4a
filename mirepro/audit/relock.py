"""`mirepro relock`: trainings keep their results when their code changes but computes the same, on committed evidence.

A training is re-pinned to the changed code only where that code computes the recorded digests of the first steps, and
the recorded outputs and metrics from the recorded final state. The steps between are not shown; an audit of level 3
shows them.
"""

import fnmatch
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirepro import determinism, diff, files, params, stages
from mirepro.audit import safe
from mirepro.audit.integrity import FAIL, PASS, Audited, Check
from mirepro.errors import UserError
from mirepro.launch.plan import Pipeline
from mirepro.profiles import Profile

if TYPE_CHECKING:
    from mirepro.pretrain import Trainer

SCHEMA = "mirepro.relock/1"
FOLDER = "relocks"
STEPS = 100


@dataclass(frozen=True)
class Evidence:
    """What was shown before a training was re-pinned.

    Attributes:
        stage: `pretrain@<run>`.
        before: `{lock: md5}` that the results were computed under.
        after: `{lock: md5}` of the code that was shown to compute the same.
        modules: Modules whose hashes differ; None where the former locks are not those of the last commit.
        steps: Steps that were computed anew.
        total: Steps of the training.
        digests: `{step: link of the digest chain}`, computed anew and equal to the recorded ones.
        outputs: md5 of the outputs, as in dvc.lock.
        metrics: md5 of the metrics.
        key: Determinism key of the machine that showed it.
    """

    schema: str
    stage: str
    before: dict[str, str]
    after: dict[str, str]
    modules: tuple[str, ...] | None
    steps: int
    total: int
    digests: dict[str, str]
    outputs: str
    metrics: str
    key: dict[str, Any]

    @property
    def words(self) -> str:
        """In one line."""
        return f"{self.stage}: the first {self.steps} of {self.total} steps, outputs and metrics are the recorded ones"


def path(root: Path, profile: str, stage: str) -> Path:
    """Where a stage's evidence lies."""
    return root / FOLDER / profile / f"{stage}.json"


def relock(profile: Profile, patterns: Sequence[str], steps: int = STEPS, say: Callable[[str], None] = print) -> int:
    """Re-pins the stale trainings among the named stages to the present code, each that proves to be unchanged.

    Args:
        profile: Whose stages.
        patterns: Stages, or shell patterns such as `pretrain@*`.
        steps: How many steps to compute anew; rounded up to the next recorded digest.
        say: Told about each stage.

    Returns:
        The number of stages refused.

    Raises:
        UserError: A pattern names no training, or the number of steps is impossible.
    """
    if steps < 1:
        raise UserError(f"--steps: {steps} is impossible; use 1 or more")
    chosen = _chosen(profile, patterns)
    determinism.reexec_if_needed(profile.tier, profile.threads)
    determinism.configure_torch(profile.tier, profile.threads)
    stages.code(profile)
    refused = 0
    for stage in chosen:
        try:
            evidence = _one(profile, stage, steps)
        except UserError as error:
            say(f"{stage}: refused: {error}")
            refused += 1
            continue
        say(f"{stage}: nothing to do" if evidence is None else f"{evidence.words}; re-pinned")
    return refused


def _chosen(profile: Profile, patterns: Sequence[str]) -> list[str]:
    known = [f"pretrain@{run}" for run in profile.runs]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise UserError(f"relock {pattern}: names no training; only those have digests of their steps, such as "
                            f"{next(iter(known), 'pretrain@ir-s0')}; run others again: `mirepro repro`")  # fmt: skip
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _one(profile: Profile, stage: str, steps: int) -> Evidence | None:
    """Shows that one training's code is equivalent and re-pins it; None where it is not stale."""
    target = stage if profile.pipeline == "dvc.yaml" else f"{profile.pipeline}:{stage}"
    pipeline = Pipeline(profile.root, [target])
    changed = pipeline.differences(target)
    if not changed:
        return None
    other = [f"{name} {what}" for name, what in changed if not name.startswith("locks/") or what != "modified"]
    if other:
        raise UserError(f"more than code has changed: {', '.join(other[:3])}; `mirepro repro {stage}`")
    evidence = _show(profile, stage, steps)
    files.write_json(path(profile.root, profile.name, stage), asdict(evidence))
    code = target.removesuffix(stage) + "code"
    pipeline.commit([code, target])
    return evidence


def _show(profile: Profile, stage: str, steps: int) -> Evidence:
    """Computes the first steps with the present code and compares.

    Raises:
        UserError: Something differs; the first difference is named.
    """
    from mirepro.pretrain import Trainer, opened

    name = stage.partition("@")[2]
    run = profile.run(name)
    recorded = profile.root / "runs" / profile.name / "pretrain" / name
    metrics = profile.root / "metrics" / profile.name / "pretrain" / f"{name}.json"
    data = profile.root / "data" / run.pretrain.data
    trainer = Trainer(run, *opened(run, data))
    period = run.pretrain.digest
    steps = min(-(-steps // period) * period, trainer.total_steps)
    with tempfile.TemporaryDirectory(prefix="mirepro-relock-") as place:
        advance(trainer, steps)
        words = _steps_differ(trainer, recorded, Path(place) / "first")
        shown = {str(link["step"]): link["chain"] for link in trainer.chain}
        words = words or _end_differs(trainer, recorded, metrics, Path(place) / "last")
    if words:
        raise UserError(f"the changed code computes something else: {words}; `mirepro repro {stage}`")
    entry = stages_of(profile)[stage]
    before = {one["path"]: one["md5"] for one in entry["deps"] if one["path"].startswith("locks/")}
    after = {lock: hashlib.md5((profile.root / lock).read_bytes()).hexdigest() for lock in before}
    outputs = {one["path"].partition("/")[0]: one["md5"] for one in entry["outs"]}
    modules, key = _modules(profile.root, before), determinism.key(profile.tier, profile.threads)
    return Evidence(SCHEMA, stage, before, after, modules, steps, trainer.total_steps, shown,
                    outputs["runs"], outputs["metrics"], key)  # fmt: skip


def stages_of(profile: Profile) -> dict[str, dict[str, Any]]:
    """The entries of the profile's dvc.lock."""
    content: dict[str, dict[str, Any]] = params.read_yaml(profile.path.with_name("dvc.lock"))["stages"]
    return content


def advance(trainer: "Trainer", steps: int) -> None:
    """Takes the first steps of a training, with the work between its epochs."""
    for epoch in range(trainer.params.epochs):
        if trainer.step >= steps:
            return
        trainer.begin(epoch)
        for index in trainer.batches(epoch):
            if trainer.step >= steps:
                return
            trainer.train_step(index)
        trainer.finish(epoch)
    if trainer.total_steps == 0:
        trainer.calibrate()


def _steps_differ(trainer: "Trainer", recorded: Path, fresh: Path) -> str:
    """The first difference between a training's first steps and epochs and the recorded ones; empty if none."""
    trainer.write(fresh)
    for name in ("chain.txt", "history.jsonl"):
        ours = (fresh / name).read_text()
        theirs = (recorded / name).read_text()
        if theirs.startswith(ours):
            continue
        if name == "history.jsonl":
            return "the recorded history of an epoch differs"
        files.write_text(fresh / "recorded.txt", "".join(theirs.splitlines(True)[: len(trainer.chain)]))
        return diff.diff(fresh / "recorded.txt", fresh / name) or "the digest chains differ"
    return ""


def _end_differs(trainer: "Trainer", recorded: Path, metrics: Path, fresh: Path) -> str:
    """The first file that the present code writes otherwise from the recorded final state; empty if none."""
    if trainer.step < trainer.total_steps:
        _load(trainer, recorded)
    trainer.write(fresh)
    names = {item.name for folder in (recorded, fresh) for item in folder.iterdir()}
    for name in sorted(names):
        if not all((folder / name).is_file() for folder in (recorded, fresh)):
            return f"{name} is not among the outputs of both"
        if (recorded / name).read_bytes() != (fresh / name).read_bytes():
            return f"{name} comes out differently"
    return "" if files.dump_json(trainer.metrics()) == metrics.read_text() else "the metrics come out differently"


def _load(trainer: "Trainer", recorded: Path) -> None:
    """Puts a training into its recorded final state, as far as outputs and metrics depend on it."""
    from safetensors.torch import load_file

    from mirepro import encoders

    trainer.model.load_state_dict(encoders.load(recorded / "encoder.safetensors").state_dict())
    for name, rows in load_file(recorded / "bank.safetensors").items():
        trainer.banks[name].load(rows)
    lines = (recorded / "history.jsonl").read_text().splitlines()
    trainer.history = [safe.parse_json(line.encode(), "history.jsonl") for line in lines]
    trainer.chain = diff.read(recorded)
    trainer.epoch, trainer.step = trainer.params.epochs, trainer.total_steps


def _modules(root: Path, before: Mapping[str, str]) -> tuple[str, ...] | None:
    """Modules whose hashes differ between the former locks, where the last commit has them, and the present ones."""
    differing: set[str] = set()
    for lock, md5 in before.items():
        command = ["git", "-C", str(root), "show", f"HEAD:{lock}"]
        old = subprocess.run(command, capture_output=True, check=False).stdout
        if hashlib.md5(old).hexdigest() != md5:
            return None
        a, b = safe.parse_json(old, lock), files.read_json(root / lock)
        differing |= {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    return tuple(sorted(differing))


def check(audited: Audited) -> Check:
    """The evidence of re-pinned trainings fits their locks, outputs and recorded digests."""
    prefix = f"{FOLDER}/{audited.name}/"
    names = sorted(name for name in audited.found if name.startswith(prefix))
    wrong: list[str] = []
    shown: list[str] = []
    for name in names:
        try:
            evidence = params.build(Evidence, safe.read_json(audited.copy / name), name)
            words = _contradiction(audited, evidence, name.removeprefix(prefix).removesuffix(".json"))
        except UserError as error:
            words = str(error)
        except (AttributeError, TypeError, KeyError, ValueError, RecursionError):
            words = "the training's digest chain is damaged"
        wrong += [f"{name}: {words}"] if words else []
        shown += [] if words else [evidence.words]
    if wrong:
        return Check("relocks", FAIL, "evidence of re-pinned trainings does not fit", wrong)
    if not names:
        return Check("relocks", PASS, "no training was re-pinned after a change of its code")
    words = f"{len(names)} trainings were re-pinned after a change of code; only level 3 shows the steps left out"
    return Check("relocks", PASS, words, shown)


def _contradiction(audited: Audited, evidence: Evidence, stage: str) -> str:
    """What a stage's evidence says otherwise than its entry in dvc.lock and its digests; empty if nothing."""
    entry = audited.lock.get(stage)
    if entry is None or (evidence.schema, evidence.stage) != (SCHEMA, stage):
        return "not the evidence of a stage of this pipeline"
    locks = {one["path"]: one["md5"] for one in entry.get("deps") or [] if one["path"].startswith("locks/")}
    if evidence.after != locks:
        return "of other code than the stage is pinned to; delete it if the stage was trained again"
    outputs = {one["md5"] for one in entry.get("outs") or []}
    if not {evidence.outputs, evidence.metrics} <= outputs:
        return "of other outputs than the recorded ones"
    chain = audited.copy / "runs" / audited.name / stage.replace("@", "/") / "chain.txt"
    if evidence.steps and chain.is_file():
        safe.regular(chain, safe.JSON_BYTES)
        links = {str(link["step"]): link["chain"] for link in diff.read(chain)}
        shown = {step: link for step, link in links.items() if int(step) <= evidence.steps}
        if not shown or evidence.digests != shown:
            return "digests that are not those of the training"
    return ""
