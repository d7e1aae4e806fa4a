"""k-means over the bank with a fixed initialisation and a fixed order of every sum."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mirepro import rng
from mirepro.banks import Bank


def kmeans(bank: Bank, clusters: int, *, seed: int, step: int, iterations: int) -> Tensor:
    """Lloyd's algorithm; an empty cluster keeps its centroid.

    Args:
        bank: N rows.
        clusters: Number of clusters, at most N.
        seed: Seed of the run.
        step: Number of the clustering: another initial choice of rows.
        iterations: Assignments before the last one.

    Returns:
        `(n,)` int64 cluster of each row that this process holds.
    """
    start = rng.permutation(seed, rng.Stream.KMEANS, step, bank.size)[:clusters].copy()
    centroids = bank.take(torch.from_numpy(start).to(bank.rows.device))
    for _ in range(iterations):
        centroids = bank.means(bank.assign(centroids), centroids)
    return bank.assign(centroids)


def clusterings(
    banks: Mapping[str, Bank], *, count: int, clusters: int, epoch: int, seed: int, iterations: int
) -> dict[str, Tensor]:
    """`(count, n)` int64 labels of the held rows per modality.

    The clusterings are independent, so that C_i can be their union (LA).
    """
    return {
        name: torch.stack(
            [kmeans(bank, clusters, seed=seed, step=epoch * count + i, iterations=iterations) for i in range(count)]
        )
        for name, bank in banks.items()
    }
