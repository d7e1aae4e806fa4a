"""What a profile would cost: hours, memory and disk of each stage, from rates that were measured.

Work is counted, not guessed: multiply-adds of the encoder for every image it sees, of the scan of the bank for every
anchor, of the clusterings. The rates (work per second) stand in `benchmarks/results/rates.json` with the machine they
were measured on (`python -m benchmarks.rates`); a rate that nobody measured gives no number.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.params import EncoderParams, EvaluateParams, RunParams
from mirepro.profiles import Profile

RATES = "benchmarks/results/rates.json"
PARTS = ("encoder", "scan", "assign", "solve")
FINAL = 2
"""Passes over all training images after the last epoch, in units of one forward pass: views and embeddings."""
SCANNING = ("ball", "ring", "cave", "cave_numerator", "la", "cmc_ball", "cmc_ring")
CLUSTERING = ("cave", "cave_numerator", "la")
COMPANION = {"moco": 1, "moco_ring": 1, "simclr": 3}
"""Work on an image's second view, in units of one forward pass: keys are only looked at, twins are learnt from."""
NUMBER = 14
"""Bytes of an image's number in a gallery, a line of its own."""
DEFAULT_SIDE = 256
"""Side of stored images whose shards are not here."""
SIZES = {"imagenet": (1_271_167, 10_000, 50_000, 1000), "cifar10": (45_000, 5000, 10_000, 10),
         "cifar100": (45_000, 5000, 10_000, 100), "stl10": (4500, 500, 8000, 10)}  # fmt: skip
"""Images of train, val and test, and classes, of data sets that may not be here."""
SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "desk": 32}


@dataclass(frozen=True)
class Data:
    """How much data a stage reads."""

    train: int
    val: int
    test: int
    classes: int
    side: int


@dataclass(frozen=True)
class Work:
    """What a stage computes and holds.

    Attributes:
        encoder: Multiply-adds of encoders; an image that is learnt from counts three times one that is looked at.
        scan: Multiply-adds of scores against the bank or the queue.
        assign: Multiply-adds of clusterings: rows against centroids.
        solve: Multiply-adds of the linear evaluation.
        memory: Bytes held at once, without the libraries.
        disk: Bytes of the outputs.
    """

    encoder: float
    scan: float
    assign: float
    solve: float
    memory: float
    disk: float


def data(root: Path, name: str) -> Data:
    """Sizes of a data set: its manifest's, else those that are known."""
    path = root / "data" / name / "manifest.json"
    side = SIDES.get(name, DEFAULT_SIDE)
    if not path.is_file():
        return Data(*SIZES[name], side)
    manifest = files.read_json(path)
    train, val, test = (manifest["splits"][split]["samples"] for split in ("train", "val", "test"))
    return Data(train, val, test, len(manifest["meta"]["classes"]), side)


def encoder(run: RunParams) -> tuple[float, int, int, int]:
    """Multiply-adds of one image, parameters, values of C5 and channels of C5, over all modalities."""
    from mirepro import objectives

    return _encoder(run.pretrain.encoder, objectives.load(run.objective).modalities, run.pretrain.views.size)


@cache
def _encoder(values: EncoderParams, modalities: tuple[str, ...], size: int) -> tuple[float, int, int, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mirepro import encoders

    with torch.device("meta"):
        model = encoders.Ensemble(values, modalities)
        inputs = {name: torch.empty(2, encoders.CHANNELS[name], size, size) for name in modalities}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    cells = math.ceil(size / model.strides[-1]) ** 2
    return counter.get_total_flops() / 4, encoders.count(model), model.channels[-1] * cells, model.channels[-1]


def pretraining(run: RunParams, sizes: Data) -> Work:
    """A pretraining stage."""
    from mirepro import objectives
    from mirepro.data import images as stored

    p, modalities = run.pretrain, len(objectives.load(run.objective).modalities)
    macs, weights, _, _ = encoder(run)
    anchors = p.epochs * (sizes.train // p.batch) * p.batch
    looks = FINAL * sizes.train * bool(p.epochs) + sizes.train * (not p.epochs)
    looks += sizes.val * (2 + (p.epochs // p.monitor if p.monitor else 0))
    dim, scan, assign = p.encoder.dim, 0.0, 0.0
    if run.objective in SCANNING:
        scan = float(anchors) * sizes.train * dim * modalities
    options = objectives.options(run.objective) | dict(run.options)
    if run.objective in CLUSTERING:
        runs = options["n_clusterings"] * (options["iterations"] + 1)
        assign = float(p.epochs - 1) * runs * sizes.train * options["n_clusters"] * dim * modalities
    queue = options.get("queue", 0)
    scan += float(anchors) * queue * dim
    bank = sizes.train * dim * 4 * modalities
    decoded = [3 * sizes.side**2 * count for count in (sizes.train, sizes.val)]
    images = sum(size for size in decoded if size <= stored.MEMORY)
    labels = sizes.train * 8 * options.get("n_clusterings", 0)
    views = 12 * 3 * p.views.size**2 * 4 * p.batch
    memory = images + 3 * bank + 8 * queue * dim + labels * modalities + views + 16 * weights
    learnt = (3 + COMPANION.get(run.objective, 0)) * anchors
    return Work((learnt + looks) * macs, scan, assign, 0.0, memory, 4 * weights + bank)


def evaluation(run: RunParams, params_: EvaluateParams, sizes: Data) -> Work:
    """An evaluation stage; `transfer.evaluate` holds all features at once."""
    from mirepro.data import images as stored

    macs, weights, flat, pooled = encoder(run)
    everything, linear = sizes.train + sizes.val + sizes.test, params_.linear
    looks = everything + linear.author_epochs * sizes.train
    passes = 2.0 * len(linear.l2) * linear.iterations + 3.0 * linear.author_epochs
    solve = passes * sizes.train * (flat + pooled) * sizes.classes
    decoded = [3 * sizes.side**2 * count for count in (sizes.train, sizes.val, sizes.test)]
    kept = sum(size for size in decoded if size <= stored.MEMORY)
    memory = kept + 4.0 * (flat + pooled) * (everything + 2 * sizes.train)
    answers = sizes.test / 4 * (len(params_.k_nn) + 4)  # a bit each, written as hexadecimal digits
    gallery = 2 * NUMBER * params_.anchors * params_.gallery
    return Work(looks * macs, 0.0, 0.0, solve, memory + 4 * weights, answers + gallery)


def works(profile: Profile) -> dict[str, Work]:
    """The work of every pretraining and evaluation stage; detection has no measured model and is left out."""
    values = profile.build(EvaluateParams, "evaluate")
    result, kept = {}, {}
    for name, entry in profile.runs.items():
        if entry.row not in kept:  # seeds do not change the work
            run = profile.run(name)
            kept[entry.row] = (pretraining(run, data(profile.root, run.pretrain.data)),
                               evaluation(run, values, data(profile.root, values.data)))  # fmt: skip
        result[f"pretrain@{name}"], result[f"evaluate@{name}"] = kept[entry.row]
    return result


def seconds(work: Work, rates: dict[str, Any], kind: str) -> float | None:
    """Predicted wall time of a stage; None where a rate that it needs was not measured."""
    total = rates["start"].get(kind, 0.0)
    for part in PARTS:
        amount, rate = getattr(work, part), rates[part]
        if amount and not rate:
            return None
        total += amount / rate if amount else 0.0
    return float(total)


def lines(profile: Profile) -> list[str]:
    """The plan as text: the stages of a row together, then what all of them cost."""
    rates = files.read_json(profile.root / RATES)
    machines = rates["machines"]
    head = f"{'stages':<28}{'n':>3}" + "".join(f"{name + ', h each':>22}" for name in machines)
    shown = [head + f"{'memory, GB':>12}{'disk, GB':>10}"]
    totals, disk = dict.fromkeys(machines, 0.0), 0.0
    groups: dict[tuple[str, str], list[Work]] = {}
    stages = works(profile)
    for name, work in stages.items():
        kind, _, run = name.partition("@")
        groups.setdefault((kind, profile.runs[run].row), []).append(work)
    for (kind, row), found in groups.items():
        cells = ""
        for machine, own in machines.items():
            each = seconds(found[0], own, kind)
            totals[machine] += math.nan if each is None else each * len(found) / 3600
            cells += f"{'not measured' if each is None else format(each / 3600, '.3g'):>22}"
        disk += found[0].disk * len(found)
        memory = found[0].memory / 1e9 + rates["libraries_gb"]
        shown.append(f"{kind + '@' + row:<28}{len(found):>3}{cells}{memory:>12.3g}{found[0].disk / 1e9:>10.2g}")
    for machine, total in totals.items():
        said = "not measured" if math.isnan(total) else f"{total:,.3g} h"
        shown.append(f"{machine} ({machines[machine]['what']}): {said} in all")
    shown.append(f"disk of the outputs: {disk / 1e9:.3g} GB (twice that with DVC's cache on another file system)")
    shown += ["", *_tables(profile, stages, rates), ""]
    detections = f"{len(profile.detect_runs)} detection stages, " if profile.detect_runs else ""
    shown.append(f"not predicted: {detections}controls, toy")
    return shown


def _tables(profile: Profile, found: dict[str, Work], rates: dict[str, Any]) -> list[str]:
    """What the runs of each table cost, pretraining and evaluation; tables share runs."""
    machines = rates["machines"]
    shown = [f"{'runs of':<12}{'n':>5}" + "".join(f"{name + ', h':>22}" for name in machines) + f"{'disk, GB':>10}"]
    for table, layout in profile.values["tables"].items():
        runs = sorted({run for row in (layout.get("rows") or {}).values() for run in row or []})
        stages = [f"{kind}@{run}" for run in runs for kind in ("pretrain", "evaluate")]
        cells = ""
        for own in machines.values():
            each = [seconds(found[stage], own, stage.partition("@")[0]) for stage in stages]
            hours = None if None in each else sum(filter(None, each)) / 3600
            cells += f"{'not measured' if hours is None else format(hours, ',.3g'):>22}"
        disk = sum(found[stage].disk for stage in stages) / 1e9
        shown += [f"{table:<12}{len(runs):>5}{cells}{disk:>10.2g}"] if runs else []
    return shown
