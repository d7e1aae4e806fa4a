"""The memory bank spread over ranks, for banks that one device cannot hold; with the bits of the whole bank.

Every rank asks the same question about the same queries at the same time and gets the answer of `mirepro.ops` on the
whole bank. What is compared, counted or drawn is exact. Where floats are summed over rows (log-sum-exp over a region,
gradients in z, centroids) the whole bank's order cannot be kept without moving rows: they are summed per block of
`bank_parts` and over blocks in a tree, so that bits depend on the number of blocks and not on that of ranks.

A rank holds its rows, some arrays of `bank_parts.AT_ONCE` entries and what the docstrings name; never B x N scores or
B x K x D rows. "Sends" counts the bytes that each rank puts into collective exchanges, per query.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirepro import bank_logsumexp, bank_parts, bank_regions, ops
from mirepro.bank import cluster_means, cluster_sums, initial
from mirepro.bank_parts import Part, decode, encode
from mirepro.ranks import World
from mirepro.rng import Stream


class ShardedBank(Part):
    """A `MemoryBank` of which each rank holds the rows of its blocks.

    All arguments are equal on all ranks, but `labels`. Rows change through `update` alone. Errors are those of
    `mirepro.ops`; where one names a row of the bank, it counts from this rank's first.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        world: World,
        blocks: int,
        seed: int,
        modality: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draws the rows that `MemoryBank` draws.

        Raises:
            UserError: The ranks do not divide the blocks, or there are fewer rows than blocks.
        """
        super().__init__(size, world=world, blocks=blocks)
        self.rows = initial(np.arange(self.first, self.edges[-1]), dim, seed, modality).to(device)

    def numbers(self) -> Tensor:
        """`(n,)` int64: the rows of the bank that this rank holds."""
        return torch.arange(self.first, self.edges[-1], device=self.rows.device)

    def whole(self) -> Tensor:
        """`(N, D)` on the first rank's CPU, `(0, D)` on the others. Sends 4 D bytes per row to the first rank."""
        return self.world.collect(self.rows, self.counts)

    def load(self, rows: Tensor) -> None:
        """Takes over this rank's of all rows `(N, D)`."""
        self.rows = rows[self.first : self.edges[-1]].to(self.rows.device, copy=True)

    def update(self, index: Tensor, z: Tensor, momentum: float) -> None:
        """As `MemoryBank.update`: every rank changes its own rows, in order of appearance. Sends nothing."""
        self.require_rows(index, "index")
        z = z.detach()
        if index.shape != z.shape[:1]:
            raise ValueError("bank, index and z: shapes (N, D), (B,), (B, D) do not fit")
        if not bool(torch.isfinite(z).all()):
            raise ValueError(f"z: row {int((~torch.isfinite(z)).any(1).int().argmax())} holds NaN or inf")
        mine = self.mine(index)
        ops.bank_update_(self.rows, index[mine] - self.first, z[mine], momentum)

    def take(self, index: Tensor) -> Tensor:
        """`(K, D)` float32 rows `(K,)` of the bank. Sends 4 D bytes per row."""
        self.require_rows(index, "index")
        return self.fill(self.rows[self.local(index)], self.mine(index)[:, None])

    def neighbors(self, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `ops.neighbors`. Sends 8 min(k, n) bytes; every rank holds those of all ranks."""
        if not 1 <= k <= self.size:
            raise ValueError(f"k: need 1 <= k <= {self.size}, got {k}")
        score, row = ops.neighbors(z, self.rows, min(k, len(self.rows)))
        worst = torch.iinfo(torch.int64).max
        keys = torch.full((len(z), min(k, self.widest)), worst, device=row.device)
        keys[:, : row.shape[1]] = encode(score) << 32 | (row + self.first)
        keys = bank_parts.best(self.world.gather(keys[None]), k)
        return decode(keys >> 32), keys & 0xFFFFFFFF

    def region_thresholds(self, z: Tensor, lo_rank: int, hi_rank: int) -> Tensor:
        """As `ops.region_thresholds`. Sends 80 KiB of counts and 16 bytes; scores its rows 3 times."""
        region = bank_regions.find(self, z.detach(), lo_rank, hi_rank)
        return decode(torch.stack([region.first, region.last], 1))

    def region_size(
        self,
        z: Tensor,
        lo_rank: int,
        hi_rank: int,
        *,
        own: Tensor | None = None,
        labels: Tensor | None = None,
        exclude_own: bool = False,
        exclude_mates: bool = False,
    ) -> Tensor:
        """As `ops.region_size`, but `labels` `(C, n)` are those of this rank's rows.

        Sends 24 bytes, 8 C with labels, and what `region_thresholds` sends unless the region is the whole bank; scores
        its rows 4 times.
        """
        asked = bank_regions.population(self, z.detach(), lo_rank, hi_rank, own, labels, exclude_own, exclude_mates)
        count, kind = asked.count()
        return torch.where(kind == 0, count.sum(0), 0)

    def region_sample(
        self,
        z: Tensor,
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
        """As `ops.region_sample`, but `labels` `(C, n)` are those of this rank's rows.

        A draw is the number of a member in index order; each rank finds the rows of those it holds. Sends 8 k bytes,
        the same again without replacement, and what `region_size` sends; scores its rows 5 times. Draws with
        replacement from the whole bank, mates included, need no scores and send nothing.
        """
        if k < 1:
            raise ValueError("k: must be at least 1")
        if sample_index.shape != z.shape[:1]:
            raise ValueError("sample_index: needs one entry per query")
        asked = bank_regions.population(self, z.detach(), lo_rank, hi_rank, own, labels, exclude_own, exclude_mates)
        key = (seed, int(stream), step)
        if asked.region is None and replacement and not exclude_mates:
            return self._anywhere(key, sample_index, k, own if exclude_own else None)
        return asked.draw(key, sample_index, k, replacement)

    def region_logsumexp(
        self,
        z: Tensor,
        lo_rank: int,
        hi_rank: int,
        tau: float,
        *,
        own: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.region_logsumexp` up to rounding, but `labels` `(C, n)` are those of this rank's rows.

        Values and gradients are summed per block, then over blocks: never the operator's bits, which adds members one
        after the other. Sends 16 V / R bytes, 8 with `own`, 8 C with labels, with a gradient 16 D (V / R times as much
        where that is no power of two), and what `region_thresholds` sends; scores its rows 4 to 6 times.
        """
        return bank_logsumexp.logsumexp(self, z, lo_rank, hi_rank, tau, own, labels)

    def gather_dot(self, z: Tensor, index: Tensor) -> Tensor:
        """As `ops.gather_dot`. Sends 4 K bytes.

        The gradient in z is summed per block in the order of columns, then over blocks: its bits are those of
        `ops.gather_dot` for one block only. Backward runs on all ranks in the same order, and sends 4 D bytes (V / R
        times as much where that is no power of two).
        """
        self.require_rows(index, "index")
        return _GatherDot.apply(z, index, self)

    def gather_nce(self, z: Tensor, index: Tensor, tau: float) -> Tensor:
        """As `ops.gather_nce`, whose arithmetic gets the scores as rows of width 1. Sends 4 K bytes.

        The gradient is that of a softmax of torch over `gather_dot`: never the bits of `ops.gather_nce`.
        """
        score = self.gather_dot(z, index)
        rows, one = score.detach().reshape(-1, 1), score.new_ones((len(z), 1))
        value = ops.gather_nce(one, rows, torch.arange(len(rows), device=rows.device).view(index.shape), tau)
        if not score.requires_grad:
            return value
        f = score.double() / tau
        slope = torch.logsumexp(f, 1) - f[:, 0]
        return value + (slope - slope.detach()).float()

    def assign(self, centroids: Tensor) -> Tensor:
        """As `ops.bank_assign`: `(n,)` int64 clusters of this rank's rows. Sends nothing."""
        return ops.bank_assign(self.rows, centroids)

    def means(self, labels: Tensor, previous: Tensor) -> Tensor:
        """`(K, D)` float32 means of the clusters `(n,)` of this rank's rows; empty ones keep the previous row.

        Summed in float64 in row order within a block, then over blocks: `WholeBank.means` for one block only.
        Sends 8 K (D + 1) bytes in all (V / R times as much where that is no power of two).
        """
        clusters, values, count = labels.cpu().numpy(), self.rows.cpu().numpy(), len(previous)
        parts = [[cluster_sums(values[a:b], clusters[a:b], count).to(previous.device)] for a, b in self.blocks()]
        (total,) = self.world.total(parts)
        return cluster_means(total, previous)

    def _anywhere(self, key: bank_regions.Key, sample: Tensor, k: int, own: Tensor | None) -> Tensor:
        """Draws from the whole bank: a number is a row, or the next one from the own row on."""
        if own is None or self.size == 1:
            return bank_regions.numbers(key, sample, torch.full_like(sample, self.size), k)
        number = bank_regions.numbers(key, sample, torch.full_like(sample, self.size - 1), k)
        return number + (number >= own[:, None])


class _GatherDot(torch.autograd.Function):
    """Scores from the ranks that hold the rows; gradients per block."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, bank: ShardedBank) -> Tensor:
        ctx.save_for_backward(index)
        ctx.bank = bank
        return bank.fill(ops.gather_dot(z.detach(), bank.rows, bank.local(index)), bank.mine(index))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        bank, (index,), parts = ctx.bank, ctx.saved_tensors, []
        for begin, end in bank.blocks():
            place = index - bank.first - begin
            inside = (place >= 0) & (place < end - begin)
            weight, place = torch.where(inside, grads[0], 0.0), place.clamp(0, end - begin - 1)
            parts.append([torch.ops.mirepro.gather_dot_backward(weight, bank.rows[begin:end], place)])
        return bank.world.total(parts)[0], None, None
