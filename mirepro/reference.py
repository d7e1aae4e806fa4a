"""The operators of `mirepro.ops` once more, slowly, in float64 and plain PyTorch: the oracle of the tests.

Same signatures and rules; B x N matrices and Python loops are welcome here. Gradients come from autograd.
"""

import numpy as np
import torch
from torch import Tensor

from mirepro import rng
from mirepro.rng import Stream


def scores(z: Tensor, bank: Tensor) -> Tensor:
    """`(B, N)` float64 inner products."""
    return z.double() @ bank.double().T


def order(z: Tensor, bank: Tensor) -> Tensor:
    """`(B, N)` int64: bank rows by score descending, then index ascending."""
    return torch.sort(scores(z, bank).detach(), dim=1, descending=True, stable=True).indices


def neighbors(z: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores `(B, k)` float64 and rows `(B, k)` int64 of the k most similar bank rows."""
    index = order(z, bank)[:, :k]
    return scores(z, bank).gather(1, index), index


def region_thresholds(z: Tensor, bank: Tensor, lo_rank: int, hi_rank: int) -> Tensor:
    """`(B, 2)` float64: the scores of rank `lo_rank` and of rank `hi_rank - 1`."""
    return scores(z, bank).gather(1, order(z, bank)[:, [lo_rank, hi_rank - 1]])


def mates(own: int, labels: Tensor | None, n: int) -> set[int]:
    """Rows that share a label with the own row in any clustering, the own row included."""
    if labels is None:
        return {own}
    return set(torch.nonzero((labels == labels[:, own : own + 1]).any(0)).flatten().tolist()) | {own}


def _members(
    z: Tensor,
    bank: Tensor,
    lo_rank: int,
    hi_rank: int,
    own: Tensor | None,
    labels: Tensor | None,
    exclude_own: bool,
    exclude_mates: bool,
) -> list[tuple[list[int], bool]]:
    """Sorted members of every query's region after exclusion, and whether it fell back."""
    result = []
    for i, ranks in enumerate(order(z, bank)[:, lo_rank:hi_rank].tolist()):
        if own is None or not (exclude_own or exclude_mates):
            result.append((sorted(ranks), False))
            continue
        row = int(own[i])
        removed = mates(row, labels if exclude_mates else None, len(bank))
        kept = sorted(set(ranks) - removed)
        result.append((kept or sorted(set(ranks) - {row}) or sorted(ranks), not kept))
    return result


def region_size(
    z: Tensor,
    bank: Tensor,
    lo_rank: int,
    hi_rank: int,
    *,
    own: Tensor | None = None,
    labels: Tensor | None = None,
    exclude_own: bool = False,
    exclude_mates: bool = False,
) -> Tensor:
    """`(B,)` int64 members after exclusion, 0 where the region falls back."""
    members = _members(z, bank, lo_rank, hi_rank, own, labels, exclude_own, exclude_mates)
    return torch.tensor([0 if fallback else len(rows) for rows, fallback in members])


def region_sample(
    z: Tensor,
    bank: Tensor,
    lo_rank: int,
    hi_rank: int,
    k: int,
    *,
    seed: int,
    step: int,
    sample_index: Tensor,
    stream: int = Stream.NEGATIVE,
    own: Tensor | None = None,
    labels: Tensor | None = None,
    exclude_own: bool = False,
    exclude_mates: bool = False,
    replacement: bool = True,
) -> Tensor:
    """`(B, k)` int64 uniform draws from every query's region."""
    members = _members(z, bank, lo_rank, hi_rank, own, labels, exclude_own, exclude_mates)
    drawn = []
    for sample, (rows, _) in zip(sample_index.tolist(), members, strict=True):
        if replacement:
            number = rng.mulhi(rng.words(seed, stream, step, sample, k)[0], len(rows))
        else:
            number = np.argsort(rng.words(seed, stream, step, sample, len(rows))[0], kind="stable")[:k]
        drawn.append([rows[m] for m in number])
    return torch.tensor(drawn)


def region_logsumexp(
    z: Tensor,
    bank: Tensor,
    lo_rank: int,
    hi_rank: int,
    tau: float,
    *,
    own: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(B,)` float64 log-sum-exp over the region and over the mates in it, in nats."""
    f = scores(z, bank) / tau
    every, close = [], []
    for i, ranks in enumerate(order(z, bank)[:, lo_rank:hi_rank].tolist()):
        if own is None:
            chosen: list[int] = []
        else:
            row = int(own[i])
            ranks = ranks if row in ranks else [*ranks[:-1], row]
            chosen = sorted(set(ranks) & mates(row, labels, len(bank)))
        every.append(torch.logsumexp(f[i, ranks], 0))
        close.append(torch.logsumexp(f[i, chosen], 0) if chosen else f.new_tensor(-torch.inf))
    return torch.stack(every), torch.stack(close)


def gather_dot(z: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """`(B, K)` float64 scores with the gathered rows."""
    return torch.einsum("bd,bkd->bk", z.double(), bank.double()[index])


def gather_nce(z: Tensor, bank: Tensor, index: Tensor, tau: float) -> Tensor:
    """`(B,)` float64 cross-entropy, the positive in column 0."""
    f = gather_dot(z, bank, index) / tau
    return torch.logsumexp(f, 1) - f[:, 0]


def bank_update_(bank: Tensor, index: Tensor, z: Tensor, momentum: float) -> None:
    """In place `bank[i] <- normalize(m bank[i] + (1 - m) z)`; m = 0 stores z, a zero vector keeps the old row."""
    for i, row in zip(index.tolist(), z.detach().double(), strict=True):
        mixed = momentum * bank[i].double() + (1 - momentum) * row
        if momentum < 1 and mixed.norm() > 0:
            bank[i] = (row if momentum == 0 else mixed / mixed.norm()).to(bank.dtype)


def bank_assign(bank: Tensor, centroids: Tensor) -> Tensor:
    """`(N,)` int64 nearest centroid, ties by lower index."""
    value = scores(bank, centroids) - centroids.double().square().sum(1) / 2
    return value.argmax(1)
