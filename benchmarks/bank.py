"""Speed of the bank operators against torch and, where installed, faiss: `python -m benchmarks.bank [--rows N]`.

All contenders work on the same tensors in one process, alternating; medians and minima; ratios are what counts.
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mirepro import files, ops, rng

Contenders = dict[str, Callable[[], object]]


def unit(rows: int, dim: int, stream: int) -> Tensor:
    """`(rows, dim)` float32 unit rows."""
    x = torch.from_numpy(rng.normal(0, stream, 0, np.arange(rows), dim).astype(np.float32))
    return torch.nn.functional.normalize(x)


def works(z: Tensor, bank: Tensor, k: int) -> dict[str, Contenders]:
    """What is measured: name -> contender -> call."""
    n = len(bank)
    low, high = n // 100, n // 10
    index = torch.from_numpy(rng.mulhi(rng.words(0, 1, 0, np.arange(len(z)), k), n))
    sample = {"seed": 0, "step": 0, "sample_index": torch.arange(len(z))}

    def torch_ring() -> Tensor:
        order = (z @ bank.T).topk(high).indices[:, low:]
        return order.gather(1, torch.randint(high - low, (len(z), k)))

    def nce(call: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def step() -> object:
            leaf = z.clone().requires_grad_()
            call(leaf).sum().backward()
            return leaf.grad

        return step

    def torch_nce(leaf: Tensor) -> Tensor:
        f = torch.bmm(bank[index], leaf[:, :, None])[:, :, 0] / 0.07
        return torch.logsumexp(f, 1) - f[:, 0]

    top: Contenders = {
        "mirepro": lambda: ops.neighbors(z, bank, k),
        "torch mm + topk": lambda: (z @ bank.T).topk(k),
    }
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        top["faiss"] = lambda: faiss.knn(z.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return {
        f"top-{k}": top,
        f"ring 1-10 %, {k} draws": {
            "mirepro": lambda: ops.region_sample(z, bank, low, high, k, **sample),
            "torch mm + topk": torch_ring,
        },
        f"NCE over {k}, forward and backward": {
            "mirepro": nce(lambda leaf: ops.gather_nce(leaf, bank, index, 0.07)),
            "torch gather + bmm": nce(torch_nce),
        },
    }


def measure(contenders: Contenders, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, alternating; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_number:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 50_000), ("dim", 128), ("batch", 128), ("k", 4096), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON file, for example benchmarks/results/DATE-CPU.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    z, bank = unit(arguments.batch, arguments.dim, 1), unit(arguments.rows, arguments.dim, 2)
    table = Table("work", "contender", "median ms", "min ms", "times mirepro (medians)")
    results = {}
    for work, contenders in works(z, bank, arguments.k).items():
        times = measure(contenders, arguments.repeats)
        own = statistics.median(times["mirepro"])
        for name, row in times.items():
            median = statistics.median(row)
            results[f"{work}: {name}"] = {"median_ms": median, "min_ms": min(row), "ratio": median / own}
            table.add_row(work, name, f"{median:.1f}", f"{min(row):.1f}", f"{median / own:.2f}")
    Console().print(table)
    if arguments.out:
        setting = {key: value for key, value in vars(arguments).items() if key != "out"}
        facts = {"setting": setting, "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        files.write_json(arguments.out, facts | {"results": results})


if __name__ == "__main__":
    main()
