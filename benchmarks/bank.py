"""Speed of the bank operators against torch and, where installed, faiss: `python -m benchmarks.bank [--rows N]`.

`--isa avx2` limits all contenders to AVX2; `--scaling` adds tables over N, B, k and threads.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contenders, Results, measure
from mirepro import ops, rng


def unit(rows: int, dim: int, stream: int) -> Tensor:
    """`(rows, dim)` float32 unit rows."""
    draws = torch.randn(rows, dim, generator=torch.Generator().manual_seed(stream))
    return torch.nn.functional.normalize(draws)


def faiss_module() -> ModuleType | None:
    """faiss with torch's number of threads, None where it is not installed."""
    if not importlib.util.find_spec("faiss"):
        return None
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


@contextlib.contextmanager
def first_pass(name: str) -> Iterator[None]:
    """Forces the certified first pass."""
    os.environ["MIREPRO_FIRST_PASS"] = name
    yield
    del os.environ["MIREPRO_FIRST_PASS"]


def exact_neighbors(z: Tensor, bank: Tensor, k: int) -> object:
    """Float32 scores from the beginning."""
    with first_pass("exact"):
        return ops.neighbors(z, bank, k)


def top(z: Tensor, bank: Tensor, k: int) -> Contenders:
    """The k most similar rows."""
    contenders: dict[str, Callable[[], object]] = {
        "mirepro": lambda: ops.neighbors(z, bank, k),
        "mirepro, float32 only": lambda: exact_neighbors(z, bank, k),
        "torch mm + topk": lambda: (z @ bank.T).topk(k),
    }
    if faiss := faiss_module():
        contenders["faiss"] = lambda: faiss.knn(z.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return contenders


def ring(z: Tensor, bank: Tensor, k: int) -> Contenders:
    """Draws from the ranks between 1 % and 10 %; torch may look for the two thresholds or order the region."""
    n = len(bank)
    low, high = n // 100, n // 10
    sample = {"seed": 0, "step": 0, "sample_index": torch.arange(len(z))}

    def ordered() -> Tensor:
        order = (z @ bank.T).topk(high).indices[:, low:]
        return order.gather(1, torch.randint(high - low, (len(z), k)))

    def unordered() -> Tensor:
        value, order = (z @ bank.T).topk(high, sorted=False)
        ring = value.topk(high - low, largest=False, sorted=False).indices
        return order.gather(1, ring.gather(1, torch.randint(high - low, (len(z), k))))

    return {
        "mirepro": lambda: ops.region_sample(z, bank, low, high, k, **sample),  # type: ignore[arg-type]
        "torch mm + topk": ordered,
        "torch mm + topk, unordered": unordered,
    }


def nce(z: Tensor, bank: Tensor, k: int) -> Contenders:
    """Sampled cross-entropy, forward and backward."""
    index = torch.from_numpy(rng.mulhi(rng.words(0, 1, 0, np.arange(len(z)), k), len(bank)))

    def step(call: Callable[[Tensor], Tensor]) -> object:
        leaf = z.clone().requires_grad_()
        call(leaf).sum().backward()
        return leaf.grad

    def gather_bmm(leaf: Tensor) -> Tensor:
        f = torch.bmm(bank[index], leaf[:, :, None])[:, :, 0] / 0.07
        return torch.logsumexp(f, 1) - f[:, 0]

    return {
        "mirepro": lambda: step(lambda leaf: ops.gather_nce(leaf, bank, index, 0.07)),
        "torch gather + bmm": lambda: step(gather_bmm),
    }


def assignment(rows: Tensor, centroids: Tensor) -> Contenders:
    """Nearest centroid of every row: most of an iteration of k-means."""
    half = centroids.square().sum(1) / 2
    contenders: dict[str, Callable[[], object]] = {
        "mirepro": lambda: ops.bank_assign(rows, centroids),
        "torch mm + argmax": lambda: torch.cat([(x @ centroids.T - half).argmax(1) for x in rows.split(4096)]),
    }
    if faiss := faiss_module():
        contenders["faiss"] = lambda: faiss.knn(rows.numpy(), centroids.numpy(), 1, metric=faiss.METRIC_L2)
    return contenders


def threads(call: Callable[[], object]) -> Contenders:
    """One thread and two."""

    def run(number: int) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        result = call()
        torch.set_num_threads(before)
        return result

    return {"1 thread": lambda: run(1), "2 threads": lambda: run(2)}


def scaling(results: Results, bank: Tensor, batch: int, k: int, repeats: int) -> None:
    """Tables over N, B, k and threads, around the sizes of the run."""
    z = unit(256, bank.shape[1], 1)
    for rows in [n for n in (50_000, 200_000, 800_000) if n < len(bank)]:
        results.add(f"top-{k}, N = {rows}", measure(top(z[:batch], bank[:rows], k), repeats))
        results.add(f"ring, N = {rows}", measure(ring(z[:batch], bank[:rows], k), repeats))
    for size in [b for b in (32, 64, 256) if b != batch]:
        results.add(f"top-{k}, B = {size}", measure(top(z[:size], bank, k), repeats))
        results.add(f"ring, B = {size}", measure(ring(z[:size], bank, k), repeats))
    for count in [c for c in (16, 512, len(bank) // 10) if c != k]:
        results.add(f"top-{count}", measure(top(z[:batch], bank, count), repeats))


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    parser = harness.parser(
        __doc__, rows=50_000, dim=128, batch=128, k=4096, repeats=5, points=100_000, centroids=10_000
    )
    parser.add_argument("--scaling", action="store_true", help="tables over N, B, k and threads")
    options = parser.parse_args()
    harness.start(options)
    z, bank, k = unit(options.batch, options.dim, 1), unit(options.rows, options.dim, 2), options.k
    results = Results(options)
    products = 2.0 * bank.numel()
    results.add(f"top-{k}", measure(top(z, bank, k), options.repeats), flops=products * len(z))
    results.add(f"ring 1-10 %, {k} draws", measure(ring(z, bank, k), options.repeats), flops=products * len(z))
    read = 4.0 * len(z) * k * options.dim
    results.add(f"NCE over {k}, forward and backward", measure(nce(z, bank, k), options.repeats), read=read)
    if options.points:
        points, centroids = unit(options.points, options.dim, 3), unit(options.centroids, options.dim, 4)
        work, flops = f"assignment {len(points)} x {len(centroids)}", 2.0 * points.numel() * len(centroids)
        results.add(work, measure(assignment(points, centroids), 3), flops=flops)
    if options.scaling:
        for name, make in (("top", top), ("ring", ring), ("NCE", nce)):
            contenders = threads(make(z, bank, k)["mirepro"])
            results.add(f"{name}, threads", measure(contenders, options.repeats))
        scaling(results, bank, options.batch, k, 2)
    results.finish()


if __name__ == "__main__":
    main()
