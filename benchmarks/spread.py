"""Rates of a bank that is spread over ranks: `python -m benchmarks.spread` (results in `results/spread.json`).

Draws from a ring and the scores of what was drawn, as in a step, with their backward pass. Seconds per score are fitted
on one rank with half of the settings; exchanges are timed between two ranks of this machine (gloo over loopback: a
cluster's network differs). The other settings, and steps of two ranks, check the prediction of `mirepro plan`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from mirepro import files, ranks
from mirepro.bank_shards import ShardedBank
from mirepro.launch import spread
from mirepro.launch.spread import Question
from tests.cluster import free_port

BLOCKS, TAU, REPEATS = 4, 0.07, 3
FITTED = [(65536, 64, 32), (65536, 256, 32), (131072, 128, 32)]
CHECKED = [(262144, 128, 16), (131072, 64, 64), (524288, 128, 32), (65536, 128, 128)]
"""Rows, dimensions, queries."""
MESSAGES = (8, 1 << 23)
"""Bytes of the exchanges that give the seconds of an exchange and of a byte."""


def question(rows: int, dim: int, batch: int, count: int) -> Question:
    """4096 draws from a ring."""
    return Question(rows, dim, count, batch, 4096, region=True)


def ask(bank: ShardedBank, asked: Question, step: int) -> None:
    """One step's draws, scores, gradient and update."""
    generator = torch.Generator().manual_seed(step)
    z = torch.nn.functional.normalize(torch.randn(asked.batch, asked.dim, generator=generator)).requires_grad_()
    own = torch.randperm(asked.rows, generator=generator)[: asked.batch]
    low, high = asked.rows // 100, asked.rows // 10
    index = bank.region_sample(z, low, high, asked.draws, seed=0, step=step, sample_index=own)
    bank.gather_nce(z, index, TAU).sum().backward()
    bank.update(own, z, 0.5)


def median(world: ranks.World, call: Callable[[int], object]) -> float:
    """Median seconds of `call(step)` after one to warm up; all ranks begin together."""
    taken = []
    for step in range(REPEATS + 1):
        world.share(lambda: None)
        begin = time.perf_counter()
        call(step)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def measure(world: ranks.World, settings: list[tuple[int, int, int]]) -> list[float]:
    """Seconds of a step in each setting."""
    found = []
    for rows, dim, batch in settings:
        bank = ShardedBank(rows, dim, world=world, blocks=BLOCKS, seed=0)
        asked = question(rows, dim, batch, world.size)
        found.append(median(world, lambda step, bank=bank, asked=asked: ask(bank, asked, step)))  # type: ignore[misc]
    return found


def exchanges(world: ranks.World) -> list[float]:
    """Seconds of an exchange of each size."""
    import torch.distributed as dist

    parts = [torch.zeros(size // 8, dtype=torch.int64) for size in MESSAGES]
    return [median(world, lambda _, part=part: dist.all_reduce(part)) for part in parts]  # type: ignore[misc]


def rank(out: Path) -> None:
    """One of two ranks: what exchanges and the checked settings take."""
    torch.set_num_threads(1)
    with ranks.join(BLOCKS, "benchmark") as world:
        found = {"exchanges": exchanges(world), "checked": measure(world, CHECKED)}
        if world.leader:
            files.write_json(out, found)


def pair(out: Path) -> dict[str, list[float]]:
    """Starts two ranks and waits for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    subprocess.run([*command, "-m", "benchmarks.spread", "--rank", "--out", str(out)], check=True)
    found: dict[str, list[float]] = json.loads(out.read_text())
    out.unlink()
    return found


def rates(fitted: list[float], messages: list[float]) -> dict[str, float]:
    """The constants of `spread.seconds`: a score is fitted, relative errors squared; the exchanges give theirs."""
    scores = [question(*setting, 1) for setting in FITTED]
    columns = np.array([[q.scores, q.scores * q.dim] for q in scores]) / np.array(fitted)[:, None]
    fixed, per_dim = np.linalg.lstsq(columns, np.ones(len(fitted)), rcond=None)[0]
    byte = (messages[1] - messages[0]) / (MESSAGES[1] - MESSAGES[0])
    return {"score_s": float(fixed), "score_s_per_dim": float(per_dim), "exchange_s": messages[0], "byte_s": byte}


def main() -> None:
    """Parses, measures, fits, checks, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(spread.RATES))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.out)
        return
    torch.set_num_threads(1)
    alone = ranks.World()
    fitted, checked = measure(alone, FITTED), measure(alone, CHECKED)
    two = pair(options.out.with_suffix(".ranks.json"))
    found = rates(fitted, two["exchanges"])
    table, factors, steps = Table("rows", "D", "B", "ranks", "s", "predicted"), [], []
    for count, took in ((1, checked), (2, two["checked"])):
        for setting, seconds in zip(CHECKED, took, strict=True):
            predicted = sum(spread.seconds(question(*setting, count), found))
            factors.append(seconds / predicted)
            steps.append([*setting, count, seconds, predicted])
            table.add_row(*map(str, setting), str(count), f"{seconds:.3f}", f"{predicted:.3f}")
    Console().print(table)
    check = {"least": min(factors), "most": max(factors), "steps": steps}
    what = f"one core of {harness.processor()}, two ranks over loopback, {date.today()}"
    files.write_json(options.out, {"what": what} | found | {"check": check})
    print(options.out)


if __name__ == "__main__":
    main()
