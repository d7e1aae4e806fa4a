"""Log-sum-exp over regions of a bank that is spread over ranks; what `csrc/cpu/region_logsumexp.cpp` defines.

That operator adds members one after the other in index order, in arithmetic of its own. Here each block is summed by
torch in float64, tile by tile, and blocks are joined in a tree: other roundings, the same for every number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mirepro import bank_regions
from mirepro.bank_parts import Part, decode
from mirepro.bank_regions import Region


@dataclass(frozen=True)
class Sums:
    """The members of every query's region and the mates among them.

    Attributes:
        z: `(B, D)` queries without gradient.
        own: `(B,)` rows that count as members and as mates.
        labels: `(C, n)` labels of this rank's rows.
        of_own: `(C, B)` labels of the own rows.
    """

    part: Part
    z: Tensor
    region: Region
    tau: float
    own: Tensor | None
    labels: Tensor | None
    of_own: Tensor | None

    def tiles(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row of every tile, f = s / tau `(B, T)` float64, and who counts `(2, B, T)`: members, mates."""
        seen = torch.zeros((2, len(self.z)), dtype=torch.int64, device=self.z.device)
        for begin, code in self.part.codes(self.z):
            members = self.region.mask(code, seen)
            own = self._own(begin, members)
            members = members | own
            yield begin, decode(code).double() / self.tau, torch.stack([members, members & self._mates(begin, own)])

    def _own(self, begin: int, members: Tensor) -> Tensor:
        """`(B, T)` bool: the own rows."""
        if self.own is None:
            return torch.zeros_like(members)
        row = torch.arange(begin, begin + members.shape[1], device=members.device) + self.part.first
        return row == self.own[:, None]

    def _mates(self, begin: int, own: Tensor) -> Tensor:
        """`(B, T)` bool: the own rows and all that share a label with them."""
        mates = own
        if self.labels is not None and self.of_own is not None:
            for labels, of_own in zip(self.labels[:, begin : begin + own.shape[1]], self.of_own, strict=True):
                mates = mates | (labels == of_own[:, None])
        return mates

    def admit(self) -> "Sums":
        """Where the own row is no member, the member of the last rank gives way to it."""
        if self.own is None:
            return self
        inside = torch.zeros(len(self.z), dtype=torch.int64, device=self.z.device)
        seen = inside.new_zeros((2, len(self.z)))
        for begin, code in self.part.codes(self.z):
            members = self.region.mask(code, seen)
            inside += (members & self._own(begin, members)).sum(1)
        absent = self.part.sum(inside) == 0
        return replace(self, region=replace(self.region, take=self.region.take - absent.long()))

    def values(self) -> Tensor:
        """`(2, B)` float64 in nats over members and over mates; -inf over nobody."""
        shape = (len(self.part.edges) - 1, 2, len(self.z))
        blocks = torch.full(shape, -torch.inf, dtype=torch.float64, device=self.z.device)
        for begin, f, who in self.tiles():
            block = self.part.block(begin)
            blocks[block] = torch.logaddexp(blocks[block], torch.logsumexp(f.where(who, -torch.inf), 2))
        rows = list(self.part.world.gather(blocks))
        while len(rows) > 1:
            pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
            rows = [torch.logaddexp(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return rows[0]

    def slopes(self, values: Tensor) -> Tensor:
        """`(2, B, D)` float32 gradients of the values in z."""
        width = self.z.shape[1]
        parts = [
            [torch.zeros((2, *self.z.shape), dtype=torch.float64, device=values.device)] for _ in self.part.blocks()
        ]
        for begin, f, who in self.tiles():
            weight = torch.where(who, (f - values[..., None]).exp(), 0.0)
            rows = self.part.rows[begin : begin + f.shape[1]].double()
            parts[self.part.block(begin)][0] += (weight.flatten(0, 1) @ rows).view(2, -1, width)
        return (self.part.world.total(parts)[0] / self.tau).float()


def logsumexp(
    part: Part, z: Tensor, lo: int, hi: int, tau: float, own: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ShardedBank.region_logsumexp`."""
    if tau <= 0:
        raise ValueError("tau: must be positive")
    queries = z.detach()
    bank_regions.check(part, queries, own, labels)
    of_own = bank_regions.labels_of(part, own, labels)
    region = bank_regions.find(part, queries, lo, hi)
    return _LogSumExp.apply(z, Sums(part, queries, region, tau, own, labels, of_own).admit())


class _LogSumExp(torch.autograd.Function):
    """The forward pass already holds the gradients; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
        values = sums.values()
        ctx.save_for_backward(*(sums.slopes(values) if ctx.needs_input_grad[0] else ()))
        every, mates = values.float()
        return every, mates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        every, mates = ctx.saved_tensors
        return grads[0][:, None] * every + grads[1][:, None] * mates, None
