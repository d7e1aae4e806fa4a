"""Cost of the tiers: step time of portable, exact and fast on the CPU: `python -m benchmarks.tiers [--steps N]`.

Every measurement is a process of its own with the tier's environment; the tiers take turns, so that a slow minute of
the machine hits all of them. Only ratios are claims. A step is views, forward, objective, backward, update of weights
and bank, as in a run; the bank operators have the same bits and the same code in every tier.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mirepro import determinism, files, params
from mirepro.params import RunParams

MODELS = {
    "desk": {"arch": "resnet10", "width": 16, "stem": "tiny", "dim": 64, "norm": True},
    "resnet18": {"arch": "resnet18", "width": 64, "stem": "small", "dim": 128, "norm": True},
}
"""The desk profile's encoder, and a ResNet-18 of the usual width; both see images of 32 x 32 pixels."""

IMAGES, SIZE = 512, 32


def run(model: str, batch: int, tier: str, threads: int) -> RunParams:
    """Parameters of a run with this encoder."""
    pretrain = {"epochs": 1000, "batch": batch, "monitor": 0, "digest": 10**6, "encoder": MODELS[model]}
    options = {"k": 16, "outer": 0.1, "inner": 0.1}
    plain = {"row": "ring", "seed": 0, "objective": "ring", "options": options, "pretrain": pretrain}
    return params.build(RunParams, plain | {"tier": tier, "threads": threads}, "run")


def child(folder: Path, model: str, batch: int, tier: str, threads: int, steps: int) -> None:
    """Prints the milliseconds of each step after two of warming up."""
    from mirepro import pretrain
    from mirepro.data import shards

    determinism.configure_torch(tier, threads)
    split = {name: shards.open(folder, name) for name in ("train", "val")}
    trainer = pretrain.Trainer(run(model, batch, tier, threads), split["train"], split["val"])
    trainer.begin(0)
    times = []
    for index in [index for epoch in range(steps) for index in trainer.batches(epoch)][: steps + 2]:
        started = time.perf_counter()
        trainer.train_step(index)
        times.append(1000 * (time.perf_counter() - started))
    print(json.dumps(times[2:]))


def data(folder: Path) -> None:
    """Random images of four classes."""
    import numpy as np

    from mirepro import rng
    from mirepro.data import shards

    def samples(first: int, count: int) -> Iterator[shards.Sample]:
        words = rng.words(first, rng.Stream.TOY, 0, np.arange(count), 3 * SIZE * SIZE // 4)
        for i, pixels in enumerate(words.astype("<u4").view(np.uint8)):
            head = f"P6\n{SIZE} {SIZE}\n255\n".encode()
            yield shards.Sample(f"{i:04d}", head + pixels[: 3 * SIZE * SIZE].tobytes(), ".ppm", i % 4, [])

    splits = {name: samples(number, IMAGES if number == 0 else 8) for number, name in enumerate(("train", "val"))}
    shards.write(folder, "tiers", splits, {"classes": ["a", "b", "c", "d"]})


def measure(folder: Path, model: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each tier's steps, from `rounds` processes each."""
    times: dict[str, list[float]] = {tier: [] for tier in determinism.TIERS}
    for _ in range(arguments.rounds):
        for tier in determinism.TIERS:
            gone = dict.fromkeys(determinism.environment("portable", 1))
            kept = {name: value for name, value in os.environ.items() if name not in gone}
            environment = kept | determinism.environment(tier, arguments.threads)
            numbers = map(str, (arguments.batch, arguments.threads, arguments.steps))
            command = [sys.executable, "-m", "benchmarks.tiers", "--child", str(folder), model, tier, *numbers]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            times[tier] += json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    if sys.argv[1:2] == ["--child"]:
        folder, model, tier, *numbers = sys.argv[2:]
        batch, threads, steps = map(int, numbers)
        child(Path(folder), model, batch, tier, threads, steps)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("steps", 8), ("rounds", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON file, for example benchmarks/results/DATE-tiers-CPU.json")
    arguments = parser.parse_args()
    table = Table("encoder", "tier", "median ms a step", "min ms", "times fast (medians)")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data(Path(folder))
        for model in MODELS:
            times = measure(Path(folder), model, arguments)
            fast = statistics.median(times["fast"])
            for tier, row in times.items():
                median = statistics.median(row)
                results[f"{model}: {tier}"] = {"median_ms": median, "min_ms": min(row), "ratio": median / fast}
                table.add_row(model, tier, f"{median:.1f}", f"{min(row):.1f}", f"{median / fast:.2f}")
    Console().print(table)
    if arguments.out:
        import importlib.metadata

        setting = {key: value for key, value in vars(arguments).items() if key != "out"}
        facts = {"setting": setting, "cpu": determinism.cpu("model name"), "cores": os.cpu_count()}
        facts |= {"system": platform.machine(), "date": date.today().isoformat()}
        facts |= {"torch": importlib.metadata.version("torch")}
        files.write_json(arguments.out, facts | {"results": results})


if __name__ == "__main__":
    main()
