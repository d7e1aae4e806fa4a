"""The memory bank, one unit row per training image and modality, as one process holds it whole."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import ops, rng


class WholeBank:
    """Questions to `rows` `(N, D)` float32: those of `mirepro.ops`, where they are documented.

    `ShardedBank` answers the same ones; `banks.Bank` is either.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def size(self) -> int:
        """N, the number of rows."""
        return len(self.rows)

    def numbers(self) -> Tensor:
        """`(N,)` int64: the rows of the bank that this process holds."""
        return torch.arange(self.size, device=self.rows.device)

    def whole(self) -> Tensor:
        """`(N, D)`: all rows."""
        return self.rows

    def load(self, rows: Tensor) -> None:
        """Takes over all rows `(N, D)`."""
        self.rows = rows.to(self.rows.device)

    def take(self, index: Tensor) -> Tensor:
        """`(K, D)` float32 rows `(K,)` of the bank."""
        return self.rows[index]

    def update(self, index: Tensor, z: Tensor, momentum: float) -> None:
        """`M[i] <- normalize(m M[i] + (1 - m) z)`, duplicates in order of appearance.

        Args:
            index: `(B,)` int64 rows.
            z: `(B, D)` float32 embeddings; no gradient is kept.
            momentum: m weights the OLD row; 0 stores z, 1 changes nothing.
        """
        ops.bank_update_(self.rows, index, z.detach(), momentum)

    def neighbors(self, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `ops.neighbors`."""
        return ops.neighbors(z, self.rows, k)

    def region_thresholds(self, z: Tensor, lo_rank: int, hi_rank: int) -> Tensor:
        """See `ops.region_thresholds`."""
        return ops.region_thresholds(z, self.rows, lo_rank, hi_rank)

    def region_size(self, z: Tensor, lo_rank: int, hi_rank: int, **who: Any) -> Tensor:
        """See `ops.region_size`."""
        return ops.region_size(z, self.rows, lo_rank, hi_rank, **who)

    def region_sample(self, z: Tensor, lo_rank: int, hi_rank: int, k: int, **who: Any) -> Tensor:
        """See `ops.region_sample`."""
        return ops.region_sample(z, self.rows, lo_rank, hi_rank, k, **who)

    def region_logsumexp(
        self, z: Tensor, lo_rank: int, hi_rank: int, tau: float, **who: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `ops.region_logsumexp`."""
        return ops.region_logsumexp(z, self.rows, lo_rank, hi_rank, tau, **who)

    def gather_dot(self, z: Tensor, index: Tensor) -> Tensor:
        """See `ops.gather_dot`."""
        return ops.gather_dot(z, self.rows, index)

    def gather_nce(self, z: Tensor, index: Tensor, tau: float) -> Tensor:
        """See `ops.gather_nce`."""
        return ops.gather_nce(z, self.rows, index, tau)

    def assign(self, centroids: Tensor) -> Tensor:
        """See `ops.bank_assign`."""
        return ops.bank_assign(self.rows, centroids)

    def means(self, labels: Tensor, previous: Tensor) -> Tensor:
        """`(K, D)` float32 means of the clusters `(N,)`, summed in row order in float64.

        Empty ones keep the previous row.
        """
        total = cluster_sums(self.rows.cpu().numpy(), labels.cpu().numpy(), len(previous))
        return cluster_means(total.to(previous.device), previous)


class MemoryBank(WholeBank):
    """A bank that starts with random rows of length 1.

    Rows change through `update` alone, after the loss and after backward, so that they stay part of the critic.
    """

    def __init__(
        self, size: int, dim: int, *, seed: int, modality: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(initial(np.arange(size), dim, seed, modality).to(device))


def initial(index: NDArray[np.int64], dim: int, seed: int, modality: int) -> Tensor:
    """`(n, D)` float32 unit rows that a bank has in the places `(n,)` before the first update."""
    draws = rng.normal(seed, rng.Stream.BANK, modality, index, dim)
    return torch.from_numpy((draws / np.sqrt((draws * draws).sum(1, keepdims=True))).astype(np.float32))


def cluster_sums(values: NDArray[np.float32], clusters: NDArray[np.int64], count: int) -> Tensor:
    """`(K, D + 1)` float64: each cluster's sum of rows, in row order, and their number."""
    total = np.zeros((count, values.shape[1] + 1))
    order = np.argsort(clusters, kind="stable")
    present, first, members = np.unique(clusters[order], return_index=True, return_counts=True)
    total[present, :-1] = np.add.reduceat(values[order].astype(np.float64), first, axis=0)
    total[present, -1] = members
    return torch.from_numpy(total)


def cluster_means(total: Tensor, previous: Tensor) -> Tensor:
    """`(K, D)` float32 from `cluster_sums`; empty clusters keep the previous row."""
    count = total[:, -1:]
    return torch.where(count > 0, total[:, :-1] / count.clamp(min=1), previous.double()).float()
