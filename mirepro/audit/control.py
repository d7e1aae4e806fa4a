"""Negative controls: what is perturbed has to differ, or the equality of the rest shows nothing."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirepro.audit import boxes, integrity, rerun, safe, source
from mirepro.audit.integrity import FAIL, Audited
from mirepro.audit.rerun import Plan, Runner
from mirepro.profiles import Profile

PERTURBED = 1000
"""Added to a seed."""


def entry(level: int, what: str, where: Sequence[str]) -> dict[str, Any]:
    """A control of report.json; without a difference it has failed."""
    return {"level": level, "what": what, "differs": bool(where), "where": list(where)}


def byte(audited: Audited, folder: Path) -> dict[str, Any]:
    """Level 0: one bit of one output, in a copy of that file, must contradict dvc.lock."""
    promised = [path for path in sorted(audited.outputs()) if path in audited.found]
    if not promised:
        return entry(0, "no output to change", [])
    content = bytearray(safe.regular(audited.copy / promised[0]))
    content[-1:] = bytes([content[-1] ^ 1]) if content else b"\1"
    changed = folder / "changed"
    changed.write_bytes(content)
    other = replace(audited, found=audited.found | {promised[0]: source.hashes(changed)})
    found = integrity.digests(other, "outs")
    words = [item for item in found.items if promised[0] in item] if found.status == FAIL else []
    return entry(0, f"{promised[0]}: one bit changed", words)


def again(audited: Audited, box: Path, chosen: Plan, level: int, runner: Runner) -> dict[str, Any]:
    """Levels 2 and 3: an evaluation of another checkpoint, or a training with another seed and its evaluation."""
    twins = _twins(audited, chosen, level)
    if not twins:
        return entry(level, "no checkpoint to evaluate in place of another's", [])
    run, other = twins
    sets = {audited.profile.values[stage]["data"] for stage in ("evaluate", "pretrain")}
    profile = boxes.base(audited.copy, box, audited.profile, sets)
    boxes.put(runner.box, box, [f"data/{name}/shards" for name in audited.profile.values["datasets"]])
    profile, stages, what = _perturbed(audited, box, profile, run, other, level)
    if not all(rerun.own_code(stage, profile, runner.same) for stage in stages) and not (box / "mirepro").exists():
        boxes.add_code(audited.copy, box)
    for stage in stages:
        runner.say(f"negative control: {stage}")
        outcome = rerun.compute(runner.sandbox, box, profile, stage, runner.same)
        if outcome.code:
            return entry(level, f"{what}: {outcome.tail}", [])
    name = f"metrics/{audited.name}/evaluate/{run}.json"
    theirs, ours = (safe.read_json(root / name)["cells"] for root in (audited.copy, box))
    return entry(level, what, sorted(column for column in theirs if theirs[column] != ours.get(column)))


def _perturbed(
    audited: Audited, box: Path, profile: Profile, run: str, other: str, level: int
) -> tuple[Profile, list[str], str]:
    """The profile, the stages and the words of a perturbation."""
    if level >= 3:
        seed = profile.runs[run].seed + PERTURBED
        profile = boxes.set_parameters(box, profile, {"runs": {run: {"seed": seed}}})
        return profile, [f"pretrain@{run}", f"evaluate@{run}"], f"{run} trained and evaluated with seed {seed}"
    folder = f"runs/{audited.name}/pretrain"
    shutil.copytree(audited.copy / folder / other, box / folder / run, symlinks=True, dirs_exist_ok=True)
    return profile, [f"evaluate@{run}"], f"{run} evaluated with the checkpoint of {other}"


def _twins(audited: Audited, chosen: Plan, level: int) -> tuple[str, str] | None:
    """An evaluated run, of the chosen ones if there are any, and another run of its row (else any other)."""
    rows = audited.profile.runs
    named = [stage.partition("@")[2] for stage in chosen.stages if stage.startswith("evaluate@")]
    folder = audited.copy / "runs" / audited.name / "pretrain"
    for run in [*(run for run in named if run in rows), *rows]:
        if not (audited.copy / f"metrics/{audited.name}/evaluate/{run}.json").is_file():
            continue
        others = sorted((name for name in rows if name != run), key=lambda name: rows[name].row != rows[run].row)
        present = [name for name in others if (folder / name).is_dir()]
        if level >= 3 or present:
            return run, (present or [run])[0]
    return None
