"""What the benchmarks share: the environment of a comparison, alternating measurement, the machine's own peak, results.

All contenders of a work run in one process on the same tensors, taking turns: medians and minima; ratios count. Beside
the time on the clock stands the processor's time, which other programs on the machine disturb less.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from mirepro import _build_info, determinism, files

T = TypeVar("T")
Contenders = Mapping[str, Callable[[], object]]

AVX2 = {
    "MIREPRO_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FAISS_OPT_LEVEL": "AVX2",
}
"""Limits everybody: these operators, torch with its libraries, faiss."""


def parser(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """Options of every benchmark, and whole numbers with their defaults."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (numbers | {"threads": 1}).items():
        result.add_argument(f"--{name}", type=int, default=default)
    result.add_argument("--isa", choices=("best", "avx2"), default="best", help="instruction set of all contenders")
    result.add_argument("--out", type=Path, help="JSON file, for example benchmarks/results/DATE-CPU.json")
    return result


def start(options: argparse.Namespace) -> None:
    """Begins anew in an environment that lets every contender use the same instruction set, and sets the threads.

    The portable tier's variables would hold torch back, not these operators.
    """
    limits = AVX2 if options.isa == "avx2" else {}
    wanted = dict.fromkeys([*AVX2, *determinism.environment("portable", 1)]) | limits
    wanted |= {"OMP_NUM_THREADS": str(os.cpu_count())}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        kept = {name: value for name, value in os.environ.items() if name not in wanted}
        kept |= {name: value for name, value in wanted.items() if value is not None}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept)
    torch.set_num_threads(options.threads)


@dataclass
class Times:
    """Milliseconds of each call: on the clock, and of the processor in all threads."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def take(self, call: Callable[[], T]) -> T:
        """Times a call and returns its result."""
        clock, processor = time.perf_counter(), time.process_time()
        result = call()
        self.clock.append(1000 * (time.perf_counter() - clock))
        self.processor.append(1000 * (time.process_time() - processor))
        return result

    def least(self) -> float:
        """The least disturbed time: the processor's of a single thread, which nobody else can lengthen."""
        return min(self.processor if torch.get_num_threads() == 1 else self.clock)


def measure(contenders: Contenders, repeats: int) -> dict[str, Times]:
    """Times of each contender, alternating; the first round warms up."""
    times = {name: Times() for name in contenders}
    for round_number in range(repeats + 1):
        for name, call in contenders.items():
            (times[name] if round_number else Times()).take(call)
    return times


def rate(work: float, call: Callable[[], object]) -> float:
    """Billions of `work` per second, best of five."""
    return work / measure({"": call}, 5)[""].least() / 1e6


def gemm_rate() -> float:
    """GFLOP/s of torch's float32 product of two 2048 x 2048 matrices."""
    a = torch.ones(2048, 2048)
    return rate(2.0 * 2048**3, lambda: a @ a)


def read_rate() -> float:
    """GB/s at which torch adds up 512 MB."""
    x = torch.ones(2**27)
    return rate(4.0 * 2**27, lambda: x.sum())


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


COLUMNS = ("median_ms", "min_ms", "ratio", "processor_ms", "processor_ratio", "share_of_peak")


@dataclass
class Results:
    """Rows of a table, and the same as a document.

    Attributes:
        own: The contender that the others are compared with.
    """

    options: argparse.Namespace
    own: str = "mirepro"
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peak = {"gemm_gflops": gemm_rate(), "read_gb_per_s": read_rate()}
        titles = ("work", "contender", "median ms", "min ms", f"times {self.own}", "processor", "times", "of the peak")
        self.table = Table(*titles)

    def add(self, work: str, times: Mapping[str, Times], *, flops: float = 0, read: float = 0) -> None:
        """One work: times per contender; `flops` or bytes to `read` give the share of the machine's peak."""
        own = times[self.own] if self.own in times else next(iter(times.values()))
        ideal = flops / self.peak["gemm_gflops"] / 1e6 + read / self.peak["read_gb_per_s"] / 1e6
        for name, taken in times.items():
            cell = {"median_ms": statistics.median(taken.clock), "min_ms": min(taken.clock)}
            cell["ratio"] = cell["median_ms"] / statistics.median(own.clock)
            if taken.processor:
                cell["processor_ms"] = statistics.median(taken.processor)
                cell["processor_ratio"] = cell["processor_ms"] / statistics.median(own.processor)
            if ideal:
                cell["share_of_peak"] = ideal / taken.least()
            self.rows[f"{work}: {name}"] = cell
            shown = [f"{cell[key]:.2f}" if key in cell else "" for key in COLUMNS]
            self.table.add_row(work, name, *shown)

    def finish(self, **more: Any) -> None:
        """Prints the table; writes the document where `--out` says."""
        Console(width=140 if not sys.stdout.isatty() else None).print(self.table)
        Console().print({name: round(value, 1) for name, value in self.peak.items()}, more)
        if self.options.out is None:
            return
        setting = {key: value for key, value in vars(self.options).items() if key != "out"}
        facts = {"date": f"{date.today()}", "setting": setting, "processor": processor(), "torch": torch.__version__}
        files.write_json(
            self.options.out, facts | {"isa": _build_info.isa()} | self.peak | more | {"results": self.rows}
        )
