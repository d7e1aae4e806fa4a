"""From recomputed tables and re-run stages to the evidence, and the verdict, of every cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirepro.audit import boxes, cells, safe, verdicts
from mirepro.audit.cells import Address, Cell, Part
from mirepro.audit.integrity import Audited
from mirepro.audit.policy import FRESH, Policy
from mirepro.audit.recompute import Recomputed
from mirepro.audit.rerun import Plan, Rerun
from mirepro.audit.verdicts import Evidence, Rule
from mirepro.report import metrics, statistics

IMAGE_TABLES = ("T1", "T6", "T7")


@dataclass
class Gathered:
    """All that cells are judged by.

    Attributes:
        audited: What is audited.
        committed: The committed cells with the shares of their runs.
        policy: How cells are judged.
        same_key: Whether equal bytes are promised between both machines.
        level: Of the audit.
        recomputed: Level 1.
        plan: Stages chosen for re-runs.
        reruns: What came of them.
        missing: Why chosen stages could not be run.
        again: Cells from the metrics with the re-run ones in their place.
        fresh: Values of fresh seeds by (row, column) of T1.
    """

    audited: Audited
    committed: list[Cell]
    policy: Policy
    same_key: bool
    level: int
    recomputed: Recomputed = field(default_factory=Recomputed)
    plan: Plan = field(default_factory=lambda: Plan([]))
    reruns: Mapping[str, Rerun] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    again: Mapping[Address, Cell] = field(default_factory=dict)
    fresh: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)


def merge(gathered: Gathered, box: Path, merged: Path) -> None:
    """Fills `again` and `fresh`: the committed metrics with the re-run ones in their place, in the folder `merged`.

    Raises:
        UserError: A re-run left malformed metrics.
    """
    audited = gathered.audited
    name = audited.name
    boxes.put(audited.copy, merged, [f"metrics/{name}", f"published/{name}.csv", f"runs/{name}/evaluate"])
    for stage, result in gathered.reruns.items():
        path = f"metrics/{name}/{stage.replace('@', '/')}.json"
        if not result.error:
            safe.read_json(box / path)
            (merged / path).parent.mkdir(parents=True, exist_ok=True)
            (merged / path).write_bytes(safe.regular(box / path))
            answers = f"runs/{name}/{stage.replace('@', '/')}/test.json"
            if (box / answers).is_file() and (merged / answers).is_file():
                (merged / answers).write_bytes(safe.regular(box / answers))
    made = cells.make(merged, audited.profile)
    gathered.again = {cell.address: cell for cell in cells.collect(merged, audited.profile, made)}
    gathered.fresh = _fresh(gathered, merged)


def _fresh(gathered: Gathered, merged: Path) -> dict[tuple[str, str], tuple[float, ...]]:
    """Values of the fresh runs whose training and evaluation succeeded."""
    values: dict[tuple[str, str], list[float]] = {}
    for row, runs in gathered.plan.fresh.items():
        for run in runs:
            result = gathered.reruns.get(f"evaluate@{run}")
            if result is None or result.error:
                continue
            record = metrics.record(merged, gathered.audited.name, "T1", run)
            for column in record.cells:
                value = metrics.value(record, column)
                if value is not None:
                    values.setdefault((row, column), []).append(value)
    return {key: tuple(found) for key, found in values.items()}


def judge(gathered: Gathered) -> list[dict[str, Any]]:
    """Every cell's verdict with all that it was read from, as the report holds it."""
    made = cells.contents(gathered.recomputed.made)
    cases = [_case(gathered, cell, made.get(cell.address)) for cell in gathered.committed]
    known = {cell.address for cell in gathered.committed}
    lost = Evidence(None, missing="The metrics give this cell, but the committed table lacks it.")
    for address in sorted(made.keys() - known) if not gathered.recomputed.missing else ():
        cases.append((Cell(address, made[address], ()), lost, Rule(), 1))
    found = verdicts.judge([(evidence, rule) for _, evidence, rule, _ in cases])
    return [_entry(gathered, case, verdict) for case, verdict in zip(cases, found, strict=True)]


Case = tuple[Cell, Evidence, Rule, int]
"""A cell with its evidence, its rule and the level that the evidence reaches."""


def _case(gathered: Gathered, cell: Cell, made: Mapping[str, Any] | None) -> Case:
    if gathered.recomputed.missing:
        return cell, Evidence(None, published=cell.values, missing=gathered.recomputed.missing), Rule(), 1
    if made != cell.content:  # a table that its own metrics do not give is wrong under any policy
        step = f"the committed metrics give {_difference(cell.content, made)}"
        return cell, Evidence(False, published=cell.values, step=step), Rule(), 1
    rule = gathered.policy.rule(*cell.address)
    lacking = [gathered.missing[part.stage] for part in cell.parts if part.stage in gathered.missing]
    if lacking:
        return cell, Evidence(None, published=cell.values, missing=lacking[0]), rule, gathered.level
    parts = [part for part in cell.parts if part.stage in gathered.reruns]
    fresh = gathered.fresh.get((cell.address[1], cell.address[2]), ()) if cell.address[0] == FRESH else ()
    if not parts and not fresh:
        return cell, Evidence(True, published=cell.values), Rule(), 1
    return cell, _rerun(gathered, cell, parts, fresh), rule, gathered.level


def _difference(committed: Mapping[str, Any], made: Mapping[str, Any] | None) -> str:
    if made is None:
        return "no such cell"
    names = [name for name in committed if committed[name] != made.get(name)]
    return ", ".join(f"{name} {made.get(name)} where the table says {committed[name]}" for name in names)


def _rerun(gathered: Gathered, cell: Cell, parts: list[Part], fresh: tuple[float, ...]) -> Evidence:
    """Evidence from re-runs of some or all of a cell's runs."""
    failed = [gathered.reruns[part.stage].error for part in parts if gathered.reruns[part.stage].error]
    failed += _upstream_errors(gathered, parts)
    if failed:
        return Evidence(None, published=cell.values, failed=f"A re-run failed: {failed[0].splitlines()[-1][:200]}")
    again = gathered.again.get(cell.address)
    new = {part.run: part for part in again.parts} if again else {}
    steps = [step for part in parts if (step := _step(gathered, part, new.get(part.run)))]
    if not steps and parts and (again is None or again.content != cell.content):
        steps = [f"the re-run gives {_difference(cell.content, again.content if again else None)}"]
    pairs = [(new[part.run].value if part.run in new else None, part.value) for part in parts]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return Evidence(
        identical=not steps if parts else None,
        same_key=gathered.same_key,
        published=cell.values,
        rerun=tuple(float(a) for a, _ in both),
        originals=tuple(float(b) for _, b in both),
        fresh=fresh,
        step="; ".join(steps[:2]) + (f"; and {len(steps) - 2} more runs" if len(steps) > 2 else ""),
        images=_images(gathered.audited, cell),
        lost=sum((a is None) != (b is None) for a, b in pairs),
        repeated=len(parts),
        runs=len(cell.parts),
    )


def _trained(gathered: Gathered, part: Part) -> Rerun | None:
    """The repeated pretraining that a share depends on."""
    kind, _, key = part.stage.partition("@")
    run = gathered.audited.profile.detect_runs[key].run if kind == "detect" else key
    return gathered.reruns.get(f"pretrain@{run}")


def _upstream_errors(gathered: Gathered, parts: list[Part]) -> list[str]:
    found = [_trained(gathered, part) for part in parts]
    return [result.error for result in found if result is not None and result.error]


def _step(gathered: Gathered, part: Part, new: Part | None) -> str:
    """Where one run's share left the committed one; empty if its value and the weights behind it are the same."""
    trained, own = _trained(gathered, part), gathered.reruns[part.stage]
    if trained is not None and trained.outputs_identical is False:
        return f"{trained.stage}: {trained.step}"
    if part.stage == "toy" and not own.metrics_identical:
        return f"toy: {own.step}"
    if new is None or new.entry != part.entry:
        return f"{part.stage}: {own.step or 'another value'}"
    return ""


def _images(audited: Audited, cell: Cell) -> int | None:
    """Test images behind an accuracy."""
    if cell.address[0] not in IMAGE_TABLES or cell.content["unit"] != "%":
        return None
    manifest = safe.read_json(audited.copy / "data" / audited.profile.values["evaluate"]["data"] / "manifest.json")
    count = manifest.get("splits", {}).get("test", {}).get("samples")
    return count if isinstance(count, int) and 0 < count < 10**9 else None


def _entry(gathered: Gathered, case: Case, verdict: verdicts.Verdict) -> dict[str, Any]:
    """A cell of report.json."""
    cell, evidence, rule, level = case
    table, row, column = cell.address
    again = gathered.again.get(cell.address)
    return {
        "table": table, "row": row, "column": column, "unit": cell.content["unit"],
        "committed": {name: cell.content[name] for name in ("mean", "std", "n")},
        "rerun_mean": again.content["mean"] if again and level > 1 and evidence.rerun else None,
        "runs": len(cell.parts), "rerun": sum(part.stage in gathered.reruns for part in cell.parts),
        "level": level, "verdict": verdict.name, "reason": verdict.reason, "numbers": verdict.numbers,
        "inputs": verdicts.inputs(evidence, rule),
        "paper": paper(
            cell.content["published"], cell.content["mean"], cell.values, gathered.policy.rule(*cell.address)
        ),
    }  # fmt: skip


def paper(value: float | None, mean: float | None, values: Sequence[float], rule: Rule) -> dict[str, Any] | None:
    """A transcribed value of the paper beside the cell's mean and seeds; None where either is not there."""
    if value is None or mean is None:
        return None
    if rule.margin is not None:
        inside = abs(mean - value) <= rule.margin
        return {"value": value, "verdict": verdicts.CONSISTENT if inside else verdicts.DIVERGED,
                "reason": f"{'within' if inside else 'beyond'} the declared ±{rule.margin:g}"}  # fmt: skip
    spread = statistics.deviation(values)
    if not spread:
        return {"value": value, "verdict": verdicts.INCONCLUSIVE, "reason": "fewer than two seeds here, no margin"}
    half = verdicts.prediction(len(values), 1, rule.alpha) * spread
    inside = abs(mean - value) <= half
    words = f"{'inside' if inside else 'outside'} the prediction interval ±{half:.3g} of {len(values)} seeds"
    return {"value": value, "verdict": verdicts.CONSISTENT if inside else verdicts.DIVERGED, "reason": words}
