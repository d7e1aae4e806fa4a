"""One rank's rows of a memory bank that is spread over ranks: layout, exchanges, scores tile by tile.

N rows lie in V blocks of consecutive rows; each of R ranks holds V / R consecutive blocks. V belongs to the result, R
does not.
"""

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from mirepro import ops, ranks
from mirepro.errors import UserError
from mirepro.ranks import World

AT_ONCE = 1 << 20
"""Scores or random words in memory at a time; part of the results where floats are summed tile by tile."""


def edges(size: int, blocks: int, world: World) -> list[int]:
    """Where the blocks of a rank begin and the last one ends.

    Args:
        size: N.
        blocks: V; block v holds the rows [v N // V, (v + 1) N // V).
        world: Whose rank asks.

    Returns:
        V / R + 1 rows, ascending.

    Raises:
        UserError: The ranks do not divide the blocks, or there are fewer rows than blocks.
    """
    if blocks < 1 or blocks % world.size:
        possible = ", ".join(str(count) for count in range(1, blocks + 1) if blocks % count == 0)
        raise UserError(
            f"rank {world.rank}: {world.size} ranks cannot share pretrain.bank_shards {blocks} equally; "
            f"start one of {possible}"
        )
    if size < blocks:
        raise UserError(f"pretrain.bank_shards: {blocks} blocks are too many for {size} rows; use at most {size}")
    own = blocks // world.size
    return [block * size // blocks for block in range(world.rank * own, (world.rank + 1) * own + 1)]


def encode(score: Tensor) -> Tensor:
    """Float32 scores as int64 codes in [-2^31, 2^31): smaller is better, -0 equals +0 (see csrc/key.h)."""
    bits = (score + 0.0).view(torch.int32).long()
    return ~torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def decode(code: Tensor) -> Tensor:
    """The scores of codes."""
    ascending = ~code
    return torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).int().view(torch.float32)


def before(count: Tensor) -> Tensor:
    """`(R, ...)` counts per rank -> sums over the ranks before."""
    return count.cumsum(0) - count


def best(keys: Tensor, k: int) -> Tensor:
    """`(R, B, w)` int64 keys without ties -> `(B, k)`: the k smallest of each query, ascending."""
    return keys.transpose(0, 1).flatten(1).sort(1).values[:, :k]


class Part:
    """`rows` `(n, D)` float32 of a bank of `size` rows, from row `first` on.

    Attributes:
        edges: Where this rank's blocks begin and end, see `edges`.
        counts: Rows of each rank.
        widest: Rows of the rank that has most.
    """

    rows: Tensor

    def __init__(self, size: int, *, world: World, blocks: int) -> None:
        """Lays the bank out; `UserError` as `edges`."""
        self.world, self.size, self.edges = world, size, edges(size, blocks, world)
        self.first = self.edges[0]
        others = [edges(size, blocks, World(rank, world.size)) for rank in range(world.size)]
        self.counts = [other[-1] - other[0] for other in others]
        self.widest = max(self.counts)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each of this rank's blocks, counted from `first`."""
        for begin, end in zip(self.edges, self.edges[1:], strict=False):
            yield begin - self.first, end - self.first

    def block(self, row: int) -> int:
        """Which of this rank's blocks holds a row, counted from `first`."""
        return bisect_right(self.edges, self.first + row) - 1

    def require_rows(self, index: Tensor, name: str) -> None:
        """Raises ValueError unless `index` holds rows of the bank."""
        if index.dtype != torch.int64:
            raise ValueError(f"{name}: dtype must be int64")
        outside = (index < 0) | (index >= self.size)
        if bool(outside.any()):
            raise ValueError(f"{name}: {int(index[outside][0])} is outside [0, {self.size})")

    def mine(self, index: Tensor) -> Tensor:
        """Which rows of the bank this rank holds."""
        return (index >= self.first) & (index < self.first + len(self.rows))

    def local(self, index: Tensor) -> Tensor:
        """Rows of the bank, counted from `first`; for rows of other ranks any row of this one."""
        return (index - self.first).clamp(0, len(self.rows) - 1)

    def sum(self, integers: Tensor) -> Tensor:
        """Over ranks, in place; exact in any order, which floats are not."""
        if self.world.size > 1:
            import torch.distributed as dist

            with ranks._contact(self.world.rank):
                dist.all_reduce(integers)
        return integers

    def fill(self, values: Tensor, mine: Tensor) -> Tensor:
        """Float32 values, each from the one rank that holds it. Added as integers, so that -0 stays -0."""
        return self.sum(torch.where(mine, values.view(torch.int32), 0)).view(torch.float32)

    def tiles(self, queries: int) -> Iterator[tuple[int, int]]:
        """Rows [begin, end), counted from `first`, whose scores with all queries fit `AT_ONCE`; within blocks."""
        step = max(1, AT_ONCE // max(1, queries))
        for begin, end in self.blocks():
            for at in range(begin, end, step):
                yield at, min(end, at + step)

    def codes(self, z: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First row and codes `(B, T)` of every tile."""
        for begin, end in self.tiles(len(z)):
            every = torch.arange(end - begin, device=z.device).expand(len(z), -1)
            yield begin, encode(ops.gather_dot(z, self.rows[begin:end], every))
