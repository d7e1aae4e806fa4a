"""What a profile would cost: hours, memory and disk of each stage, from rates that were measured.

The rates (counted work per second) stand in `benchmarks/results/rates.json` with the machine they were measured on
(`python -m benchmarks.rates`); a rate that nobody measured gives no number.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.launch import detection_work, work
from mirepro.launch.work import Work
from mirepro.params import EvaluateParams
from mirepro.profiles import Profile
from mirepro.report.metrics import MODELS

RATES = "benchmarks/results/rates.json"
PARTS = ("encoder", "scan", "assign", "solve", "detector")


def works(profile: Profile) -> dict[str, Work]:
    """The work of every pretraining, evaluation and detection stage."""
    values = profile.build(EvaluateParams, "evaluate")
    result: dict[str, Work] = {}
    kept: dict[str, tuple[Work, Work]] = {}
    for name, entry in profile.runs.items():
        if entry.row not in kept:  # seeds do not change the work
            run = profile.run(name)
            kept[entry.row] = (work.pretraining(run, work.data(profile.root, run.pretrain.data, run.pretrain.split)),
                               work.evaluation(run, values, work.data(profile.root, values.data)))  # fmt: skip
        result[f"pretrain@{name}"], result[f"evaluate@{name}"] = kept[entry.row]
    return result | {f"detect@{name}": detection(profile, name) for name in profile.detect_runs}


def detection(profile: Profile, name: str) -> Work:
    """The work of a detection stage."""
    entry = profile.detect_runs[name]
    sizes = detection_work.scenes(profile.root, entry.data)
    return detection_work.detection(profile.run(entry.run), entry.model, profile.recipe(entry.data), sizes)


def seconds(work: Work, rates: Mapping[str, Any], kind: str) -> float | None:
    """Predicted wall time of a stage; None where a rate that it needs was not measured."""
    total = rates["start"].get(kind, 0.0)
    for part in PARTS:
        amount, rate = getattr(work, part), rates.get(part)
        if amount and not rate:
            return None
        total += amount / rate if amount else 0.0
    return float(total)


def given(rate: float) -> dict[str, Any]:
    """The rates of a GPU that nobody measured here.

    Args:
        rate: Multiply-adds a second that it is taken to reach in every part.

    Raises:
        UserError: The rate is impossible.
    """
    if not 0 < rate < math.inf:
        raise UserError(f"--gpu-rate: {rate:g} is impossible; use multiply-adds a second, for example 4e12")
    what = f"a GPU at {rate:g} multiply-adds a second throughout (given, not measured)"
    return dict.fromkeys(PARTS, rate) | {"start": {}, "what": what}


def lines(profile: Profile, gpu_rate: float | None = None) -> list[str]:
    """The plan as text: the stages of a row together, then what all of them cost.

    Args:
        profile: Whose stages.
        gpu_rate: See `given`; None takes the measured rates.
    """
    rates, stages = files.read_json(profile.root / RATES), works(profile)
    machines = rates["machines"] | ({} if gpu_rate is None else {"GPU": given(gpu_rate)})
    groups: dict[str, list[str]] = {}
    for name in stages:
        groups.setdefault(re.sub(r"-s\d+(?=-|$)", "", name), []).append(name)
    wide = max(map(len, groups), default=0) + 2
    head = f"{'stages':<{wide}}{'n':>4}" + "".join(f"{name + ', h each':>22}" for name in machines)
    shown = [head + f"{'memory, GB':>12}{'disk, GB':>10}"]
    for label, names in groups.items():
        one = stages[names[0]]
        cells = "".join(_hours(stages, names[:1], own) for own in machines.values())
        memory = one.memory / 1e9 + rates["libraries_gb"]
        shown.append(f"{label:<{wide}}{len(names):>4}{cells}{memory:>12.3g}{one.disk / 1e9:>10.2g}")
    for own in machines.values():
        shown.append(f"{own['what']}: {_hours(stages, stages, own).strip()} h in all")
    disk = sum(work.disk for work in stages.values())
    shown.append(f"disk of the outputs: {disk / 1e9:.3g} GB (twice that with DVC's cache on another file system)")
    return [*shown, "", *_tables(profile, stages, machines), "", _left_out(profile)]


def _left_out(profile: Profile) -> str:
    repeated = [data for data in profile.values["datasets"] if profile.recipe(data).repeat_threshold]
    more = "".join(f", the longer epochs of {data} (repeat-factor sampling)" for data in repeated)
    return f"not predicted: controls, toy{more}"


def _hours(stages: Mapping[str, Work], names: Iterable[str], rates: Mapping[str, Any]) -> str:
    """A cell: the hours of some stages one after the other."""
    each = [seconds(stages[name], rates, name.partition("@")[0]) for name in names]
    return f"{'not measured' if None in each else format(sum(filter(None, each)) / 3600, ',.3g'):>22}"


def _tables(profile: Profile, stages: Mapping[str, Work], machines: Mapping[str, Any]) -> list[str]:
    """What the runs of each table cost, pretraining and evaluation or detection; tables share runs."""
    shown = [f"{'runs of':<12}{'n':>5}" + "".join(f"{name + ', h':>22}" for name in machines) + f"{'disk, GB':>10}"]
    for table, layout in profile.values["tables"].items():
        runs = sorted({run for row in (layout.get("rows") or {}).values() for run in row or []})
        end = f"detect@{{}}-{MODELS[table]}" if table in MODELS else "evaluate@{}"
        names = [kind.format(run) for run in runs for kind in ("pretrain@{}", end)]
        lost = [name for name in names if name not in stages]
        if lost:
            raise UserError(f"tables.{table}: {lost[0]} is no stage of the profile; correct params.yaml")
        cells = "".join(_hours(stages, names, own) for own in machines.values())
        disk = sum(stages[name].disk for name in names) / 1e9
        shown += [f"{table:<12}{len(runs):>5}{cells}{disk:>10.2g}"] if runs else []
    return shown
