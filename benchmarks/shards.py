"""Cost of virtual shards in one process: `python -m benchmarks.shards [--run KEY] [--steps N]`.

A training step with the batch cut into several shards against the same step uncut. All contenders live in one process
and alternate step by step; medians and minima; the medians' ratios are what counts.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from itertools import cycle
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mirepro import determinism, files, profiles
from mirepro.data import shards
from mirepro.params import RunParams
from mirepro.pretrain import Trainer


def trainer(run: RunParams, folder: Path, count: int) -> Trainer:
    """A run that is about to take its first step, with `count` shards."""
    params = dataclasses.replace(run.pretrain, shards=count, monitor=0, digest=10**9)
    made = Trainer(dataclasses.replace(run, pretrain=params), shards.open(folder, "train"), shards.open(folder, "val"))
    made.begin(0)
    return made


def measure(trainers: dict[int, Trainer], steps: int) -> dict[int, list[float]]:
    """Milliseconds of each step after the first, alternating over the contenders."""
    times: dict[int, list[float]] = {count: [] for count in trainers}
    batches = {count: cycle(made.batches(0)) for count, made in trainers.items()}
    for number in range(steps + 1):
        for count, made in trainers.items():
            start = time.perf_counter()
            made.train_step(next(batches[count]))
            if number:
                times[count].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="desk")
    parser.add_argument("--run", default="ir-s0", help="a run of the profile, as pretraining names it")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file, for example benchmarks/results/shards-DATE-CPU.json")
    arguments = parser.parse_args()
    profile = profiles.load(Path.cwd(), arguments.profile)
    determinism.configure_torch(profile.tier, profile.threads)
    run = profile.run(arguments.run)
    folder = profile.root / "data" / run.pretrain.data
    times = measure({count: trainer(run, folder, count) for count in arguments.shards}, arguments.steps)
    base = statistics.median(times[arguments.shards[0]])
    title = f"{arguments.run}, batch {run.pretrain.batch}, {profile.threads} thread(s), tier {profile.tier}"
    table = Table("shards", "median ms", "min ms", f"times {arguments.shards[0]} shard(s)", title=title)
    results = {}
    for count, row in times.items():
        median = statistics.median(row)
        results[str(count)] = {"median_ms": median, "min_ms": min(row), "ratio": median / base}
        table.add_row(str(count), f"{median:.1f}", f"{min(row):.1f}", f"{median / base:.2f}")
    Console().print(table)
    if arguments.out:
        setting = {"batch": run.pretrain.batch, "threads": profile.threads, "tier": profile.tier}
        setting |= {key: value for key, value in vars(arguments).items() if key != "out"}
        facts = {"setting": setting, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        files.write_json(arguments.out, facts | {"results": results})


if __name__ == "__main__":
    main()
