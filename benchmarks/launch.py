"""Cost of stages as Slurm jobs: `python -m benchmarks.launch` (root, Slurm and munge installed; docs/slurm.md).

A cluster of its own on this machine, and a small copy of the repository whose stages sleep; launcher, DVC and submitit
are the real ones. First one stage through the launcher and the same command by plain sbatch, in turns; then
many in parallel, of which none may get lost. Other work on the machine is stated as its load.
"""

import argparse
import collections
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mirepro import files
from tests.cluster import Cluster, until
from tests.miniature import Miniature

ROOT = Path(__file__).resolve().parent.parent

STAGE = """
from mirepro.params import RunParams

def never():
    from mirepro import ops
    from mirepro.objectives import base

def pretrain(run: RunParams, data_folder, work, out, fingerprint):
    import time
    seconds = float((data_folder.parent.parent / "seconds").read_text())
    time.sleep(seconds)
    (out / "encoder.safetensors").write_text(f"{run.objective} {run.seed}")
    return {"schema": "mirepro.metrics/1", "cells": {"slept": {"value": seconds, "unit": "s", "protocol": ""}}}
"""

ACCOUNT = """
import atexit, os, resource, sys
KINDS = {"mirepro.launch.collector": "dvc", "stage": "collect", "submitit.core._submit": "jobs", "repro": "head"}

STARTED, exit = os.getpid(), os._exit

def account():
    forked = "fork of " * (os.getpid() != STARTED)
    kind = forked + next((KINDS[word] for word in sys.orig_argv if word in KINDS), "other")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    path = os.path.join(os.environ["MIREPRO_BENCH_CPU"], f"{kind}.{os.getpid()}.{os.urandom(4).hex()}")
    with open(path, "w") as file:
        file.write(str(usage.ru_utime + usage.ru_stime))

def leave(code):
    account()
    exit(code)

if "MIREPRO_BENCH_CPU" in os.environ:
    atexit.register(account)
    os._exit = leave
"""
"""sitecustomize.py: every Python process leaves the CPU seconds it took, by what it was."""

SITE = "executor = 'slurm'\npoll = 1.0\nsettle = 5.0\n[all]\ntime = 10\n"
"""submitit looks for a job's result once a second; so does this."""


class Sleepers(Miniature):
    """A copy of the repository whose pretraining stages sleep.

    Args:
        root: Folder to fill.
        count: Stages.
    """

    def __init__(self, root: Path, count: int) -> None:
        super().__init__(ROOT, root)
        self.names = [f"ball-s{i}" for i in range(count)]
        values = yaml.safe_load((root / "params.yaml").read_text())
        values["runs"] = {name: {"row": "ball", "objective": "ball", "seed": i} for i, name in enumerate(self.names)}
        values |= {"detect_runs": {}, "tables": {"T1": {"rows": {"ball": self.names}}}}
        (root / "params.yaml").write_text(yaml.safe_dump(values))
        (root / "mirepro/pretrain.py").write_text(STAGE)
        (root / "sitecustomize.py").write_text(ACCOUNT)
        (root / "launch").mkdir()
        (root / "launch/bench.toml").write_text(SITE)
        self.call("dvc", "repro", "code", "data")

    def call(self, *words: str, **variables: str) -> None:
        """`python -m words` in the copy; its errors are this program's."""
        result = self.run(*words[1:], module=words[0], env=self.environment | variables)
        if result.returncode:
            sys.exit(f"{' '.join(words)}: exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")

    def sleep(self, seconds: float) -> None:
        """Sets the sleep and makes every stage stale."""
        (self.root / "seconds").write_text(str(seconds))
        values = yaml.safe_load((self.root / "params.yaml").read_text())
        for entry in values["runs"].values():
            entry["seed"] += 1000
        (self.root / "params.yaml").write_text(yaml.safe_dump(values))

    def slept(self) -> int:
        """Stages that dvc.lock pins with the present parameters; those of an earlier round have other seeds."""
        locked = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        runs = yaml.safe_load((self.root / "params.yaml").read_text())["runs"]
        pinned = {name: locked.get(f"pretrain@{name}", {}).get("params", {}).get("params.yaml", {}) for name in runs}
        return sum(pinned[name].get(f"runs.{name}") == entry for name, entry in runs.items())


def overhead(copy: Sleepers, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds beyond the sleep of one stage, in turns: its command by plain sbatch, by the launcher, and by `repro`."""
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for i in range(rounds):
        name = copy.names[i % len(copy.names)]
        stage, repro = ("stage", "pretrain", name), ("repro", f"pretrain@{name}")
        turns: dict[str, Callable[[], None]] = {
            "command alone": partial(copy.call, "mirepro", *stage),
            "command by sbatch": partial(sbatch, copy, *stage),
            "command by the launcher": partial(copy.call, "mirepro", *stage, MIREPRO_LAUNCH="bench"),
            "repro alone": partial(copy.call, "mirepro", *repro),
            "repro by the launcher": partial(copy.call, "mirepro", *repro, MIREPRO_LAUNCH="bench"),
        }
        for kind, turn in turns.items():
            copy.sleep(seconds)
            started = time.monotonic()
            turn()
            spent[kind].append(round(time.monotonic() - started - seconds, 2))
    medians = {kind: round(statistics.median(values), 2) for kind, values in spent.items()}
    return {"stage_seconds": seconds, "median": medians, "all": spent}


def sbatch(copy: Sleepers, *words: str) -> None:
    """The command in a job; `sbatch --wait` would look every few seconds, a file is seen at once."""
    end = copy.root / "end"
    end.unlink(missing_ok=True)
    line = f"cd {copy.root} && {sys.executable} -m mirepro {' '.join(words)}; echo $? > {end}.new; mv {end}.new {end}"
    command = ["sbatch", "--quiet", f"--output={copy.root}/sbatch.log", f"--wrap={line}"]
    subprocess.run(command, check=True, env=copy.environment | {"MIREPRO_LAUNCH": "inline"})
    until(end.exists, 120, "the job's end")
    if end.read_text().strip() != "0":
        sys.exit((copy.root / "sbatch.log").read_text())


def many(copy: Sleepers, slots: int, jobs: int, seconds: float) -> dict[str, Any]:
    """All stages through `mirepro repro --jobs JOBS`; their wall time against the ideal, and where CPU time went.

    With as many jobs as slots the head keeps the slots busy, with more of them Slurm's own queue does.
    """
    copy.sleep(seconds)
    cpu = Path(tempfile.mkdtemp(prefix="cpu-", dir=copy.root))
    before, started = usage(), time.monotonic()
    copy.call("mirepro", "repro", "pretrain", "--jobs", str(jobs), MIREPRO_LAUNCH="bench", MIREPRO_BENCH_CPU=str(cpu))
    wall = time.monotonic() - started
    parts: dict[str, float] = collections.defaultdict(float)
    for path in cpu.iterdir():
        parts[path.name.partition(".")[0]] += float(path.read_text())
    if (after := usage()) is not None and before is not None:
        parts["slurm and rest"] = after - before - sum(parts.values())
    ideal = seconds * -(-len(copy.names) // slots)
    return {
        "stages": len(copy.names), "slots": slots, "jobs": jobs, "stage_seconds": seconds,
        "wall": round(wall, 1), "ideal": ideal, "ratio": round(wall / ideal, 3), "collected": copy.slept(),
        "cpu_seconds": {name: round(value, 1) for name, value in sorted(parts.items())},
    }  # fmt: skip


def usage() -> float | None:
    """CPU seconds of this process's control group (v1), with those of the cluster's daemons; None elsewhere."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if "cpuacct" in line.split(":")[1].split(","))
        return int(Path(f"/sys/fs/cgroup/cpuacct{own}/cpuacct.usage").read_text()) / 1e9 if own != "/" else None
    except (OSError, StopIteration):
        return None


def show(result: dict[str, Any]) -> None:
    """Prints tables."""
    table = Table("seconds beyond the stage's own", "median", "all", box=None)
    for kind, value in result["overhead"]["median"].items():
        table.add_row(kind, f"{value:.2f}", " ".join(map(str, result["overhead"]["all"][kind])))
    runs = Table("stages", "slots", "jobs", "each", "wall", "of the ideal", "collected", "CPU seconds", box=None)
    for run in result["many"]:
        cpu = ", ".join(f"{name} {value}" for name, value in run["cpu_seconds"].items())
        values = [run[key] for key in ("stages", "slots", "jobs", "stage_seconds", "wall", "ratio", "collected")]
        runs.add_row(*map(str, values), cpu)
    console = Console(width=160)
    console.print(table)
    console.print(runs)


def main() -> None:
    """Measures, prints, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of the overhead's measurement")
    parser.add_argument("--stages", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--jobs", type=int, help="of `mirepro repro` [default: as many as slots]")
    parser.add_argument("--seconds", type=float, nargs="*", default=[20.0, 5.0], help="sleep of each of many stages")
    parser.add_argument("--repeats", type=int, default=1, help="of every run of many stages")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background, where shells ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)  # so that the daemons are stopped
    with tempfile.TemporaryDirectory(prefix="mirepro-launch-") as name:
        folder = Path(name)
        cluster = Cluster(folder / "slurm", cpus=-(-options.slots // 2))
        os.environ |= cluster.environment
        load = os.getloadavg()
        try:
            cluster.start()
            copy = Sleepers(folder / "copy", options.stages)
            result: dict[str, Any] = {"overhead": overhead(copy, options.rounds, 2.0)}
            turns = [(options.jobs or options.slots, seconds) for seconds in options.seconds]
            result["many"] = [many(copy, options.slots, *turn) for turn in turns for _ in range(options.repeats)]
            result["slurm"] = cluster.version
        finally:
            cluster.stop()
    result |= {"date": str(date.today()), "cores": os.cpu_count(), "system": platform.machine()}
    result |= {"load_before": [round(value, 2) for value in load]}
    if options.out:
        files.write_json(options.out, result)
    show(result)


if __name__ == "__main__":
    main()
