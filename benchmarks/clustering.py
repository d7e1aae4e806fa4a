"""Clustering the bank at full scale, for `la` and `cave`: `python -m benchmarks.clustering [--rows N --clusters K]`.

The assignment of `--points` rows against torch (and faiss, where installed), then one whole iteration of k-means: the
assignment of all rows and the means of all clusters. A clustering and an epoch are that iteration times their number.
Two kinds of rows: without structure, as a bank begins, and around centres, as it becomes.
"""

import torch
from torch import Tensor

from benchmarks import bank as operators
from benchmarks import harness
from mirepro import ops
from mirepro.bank import WholeBank

CLUSTERINGS, ITERATIONS = 10, 5
"""Of one refresh, which is one epoch's, at full scale."""


def rows(count: int, dim: int, centres: int, spread: float) -> Tensor:
    """`(count, dim)` unit rows around unit centres; a large spread leaves no structure."""
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(1)) * (spread / dim**0.5)
    chosen = torch.randint(centres, (count,), generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.normalize(operators.unit(centres, dim, 3)[chosen] + noise)


def main() -> None:
    """Parses, measures, prints a table, writes JSON."""
    options = harness.parser(__doc__, rows=1_281_167, dim=128, clusters=30_000, points=5000, repeats=3).parse_args()
    harness.start(options)
    results, found = harness.Results(options), {}
    for kind, spread in (("no structure", 1e3), ("around centres", 1.0)):
        values = rows(options.rows, options.dim, options.clusters, spread)
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(4))
        centroids = values[order[: options.clusters]]
        part, work = values[: options.points], 2.0 * options.dim * options.clusters
        times = harness.measure(operators.assignment(part, centroids), options.repeats)
        results.add(f"assignment of {len(part)} rows, {kind}", times, flops=work * len(part))
        assignment, means = harness.Times(), harness.Times()
        labels = assignment.take(lambda v=values, c=centroids: ops.bank_assign(v, c))
        means.take(lambda v=values, n=labels, c=centroids: WholeBank(v).means(n, c))
        results.add(f"assignment of all rows, {kind}", {"mirepro": assignment}, flops=work * len(values))
        results.add(f"means of all clusters, {kind}", {"mirepro": means})
        assign, mean = (times.processor[0] / 1000 for times in (assignment, means))
        clustering = ITERATIONS * (assign + mean) + assign
        found[kind] = {
            "assigned_multiply_adds_per_s": work / 2 * len(values) / assign,
            "iteration_s": assign + mean,
            "clustering_s": clustering,
            "epoch_h": CLUSTERINGS * clustering / 3600,
        }
    results.finish(clusterings=CLUSTERINGS, iterations=ITERATIONS, clustering=found)


if __name__ == "__main__":
    main()
