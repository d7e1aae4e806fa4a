"""k-means over the bank with a fixed initialisation and a fixed order of every sum."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mirepro import ops, rng
from mirepro.bank import MemoryBank


def kmeans(rows: Tensor, clusters: int, *, seed: int, step: int, iterations: int) -> Tensor:
    """Lloyd's algorithm; an empty cluster keeps its centroid.

    Args:
        rows: `(N, D)` float32.
        clusters: Number of clusters, at most N.
        seed: Seed of the run.
        step: Number of the clustering: another initial choice of rows.
        iterations: Assignments before the last one.

    Returns:
        `(N,)` int64 cluster of each row.
    """
    clusters = min(clusters, len(rows))
    start = rng.permutation(seed, rng.Stream.KMEANS, step, len(rows))[:clusters].copy()
    centroids = rows[torch.from_numpy(start).to(rows.device)]
    for _ in range(iterations):
        centroids = means(rows, ops.bank_assign(rows, centroids), centroids)
    return ops.bank_assign(rows, centroids)


def means(rows: Tensor, labels: Tensor, previous: Tensor) -> Tensor:
    """`(K, D)` means of each cluster's rows, summed in row order in float64; empty ones keep the previous row."""
    clusters, values = labels.cpu().numpy(), rows.cpu().numpy()
    order = np.argsort(clusters, kind="stable")
    present, first, counts = np.unique(clusters[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order].astype(np.float64), first, axis=0)
    centroids = previous.to("cpu", copy=True)
    centroids[torch.from_numpy(present)] = torch.from_numpy((sums / counts[:, None]).astype(np.float32))
    return centroids.to(rows.device)


def clusterings(
    banks: Mapping[str, MemoryBank], *, count: int, clusters: int, epoch: int, seed: int, iterations: int
) -> dict[str, Tensor]:
    """`(count, N)` int64 labels per modality: independent clusterings, so that C_i can be their union (LA)."""
    return {
        name: torch.stack(
            [
                kmeans(bank.rows, clusters, seed=seed, step=epoch * count + i, iterations=iterations)
                for i in range(count)
            ]
        )
        for name, bank in banks.items()
    }
