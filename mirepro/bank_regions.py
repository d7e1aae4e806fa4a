"""Regions of ranks over a bank that is spread over ranks: thresholds, sizes, draws; what `csrc/cpu/region.cpp` does.

Codes of scores are counted digit by digit (a radix selection), so that no keys travel. Every number is an integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import bank_parts, ops, rng
from mirepro.bank_parts import Part

DIGITS = ((21, 2048), (10, 2048), (0, 1024))
"""Rounds of the selection over codes of 32 bits: lowest bit, and number of values, of the digit that is counted."""

_WORST = torch.iinfo(torch.int64).max

Key = tuple[int, int, int]
"""Seed, stream and step of draws."""


@dataclass(frozen=True)
class Region:
    """The ranks [lo, hi) as one rank sees them, `(B,)` int64 each.

    Attributes:
        first: Code of the first member; of this rank's rows with that code the first `skip` come before it.
        last: Code of the last member; of this rank's rows with that code the first `take` do not come after it.
    """

    first: Tensor
    last: Tensor
    skip: Tensor
    take: Tensor

    def mask(self, code: Tensor, seen: Tensor) -> Tensor:
        """Members among this rank's next rows.

        Args:
            code: `(B, T)`.
            seen: `(2, B)` earlier rows with the code of the first and of the last member; moves on.

        Returns:
            `(B, T)` bool.
        """
        first, last = code == self.first[:, None], code == self.last[:, None]
        begun = first & (first.cumsum(1) + seen[0, :, None] > self.skip[:, None])
        goes_on = last & (last.cumsum(1) + seen[1, :, None] <= self.take[:, None])
        seen += torch.stack([first.sum(1), last.sum(1)])
        return (begun | (code > self.first[:, None])) & (goes_on | (code < self.last[:, None]))


@dataclass(frozen=True)
class Exclusion:
    """Who is left out.

    Attributes:
        own: `(B,)` own rows; None leaves nobody out.
        labels: `(C, n)` labels of this rank's rows.
        of_own: `(C, B)` labels of the own rows; where given, their mates are left out, too.
    """

    own: Tensor | None = None
    labels: Tensor | None = None
    of_own: Tensor | None = None

    def masks(self, members: Tensor, begin: int, first: int) -> tuple[Tensor, Tensor]:
        """Of members `(B, T)` of a tile: those left, and those but the own row."""
        if self.own is None:
            return members, members
        row = torch.arange(first + begin, first + begin + members.shape[1], device=members.device)
        others = members & (row != self.own[:, None])
        if self.labels is None or self.of_own is None:
            return others, others
        left = others.clone()
        for labels, of_own in zip(self.labels[:, begin : begin + len(row)], self.of_own, strict=True):
            left &= labels != of_own[:, None]
        return left, others


def find(part: Part, z: Tensor, lo: int, hi: int) -> Region:
    """Finds the codes of the first and of the last rank, then shares the rows of equal codes by index."""
    if not 0 <= lo < hi <= part.size:
        raise ValueError(f"ranks: need 0 <= lo_rank < hi_rank <= {part.size}, got [{lo}, {hi})")
    rank = torch.tensor([lo, hi - 1], device=z.device).expand(len(z), 2)
    code = torch.full_like(rank, -(1 << 31))
    for shift, values in DIGITS:
        mine = _digits(part, z, code, shift, values)
        upto = part.sum(mine.clone()).cumsum(2)
        digit = torch.searchsorted(upto, rank[..., None].contiguous(), right=True)
        earlier = torch.where(digit > 0, upto.gather(2, (digit - 1).clamp(min=0)), 0)
        rank, code = rank - earlier[..., 0], code + (digit[..., 0] << shift)
    equal = part.world.gather(mine.gather(2, digit)[None, ..., 0])
    left = rank - bank_parts.before(equal)[part.world.rank]
    return Region(code[:, 0], code[:, 1], left[:, 0], left[:, 1] + 1)


def _digits(part: Part, z: Tensor, code: Tensor, shift: int, values: int) -> Tensor:
    """`(B, 2, values)` int64: this rank's codes that have the prefixes `code` `(B, 2)`, by their next digit."""
    count = code.new_zeros((*code.shape, values))
    for _, found in part.codes(z):
        for e in range(2):
            digit = (found - code[:, e, None]) >> shift
            inside = (digit >= 0) & (digit < values)
            count[:, e].scatter_add_(1, digit.clamp(0, values - 1), inside.long())
    return count


@dataclass(frozen=True)
class Population:
    """Whom a query draws from, in index order: the members of a region (None is the whole bank) after exclusion.

    Attributes:
        z: `(B, D)` queries without gradient.
    """

    part: Part
    z: Tensor
    region: Region | None
    exclusion: Exclusion

    def members(self) -> Iterator[tuple[int, Tensor]]:
        """First row and members `(B, T)` before exclusion of every tile; the whole bank needs no scores."""
        if self.region is None:
            for begin, end in self.part.tiles(len(self.z)):
                yield begin, torch.ones((len(self.z), end - begin), dtype=torch.bool, device=self.z.device)
            return
        seen = torch.zeros((2, len(self.z)), dtype=torch.int64, device=self.z.device)
        for begin, code in self.part.codes(self.z):
            yield begin, self.region.mask(code, seen)

    def masks(self) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """Of every tile: those left after exclusion, those but the own row, all members."""
        for begin, members in self.members():
            yield begin, (*self.exclusion.masks(members, begin, self.part.first), members)

    def count(self) -> tuple[Tensor, Tensor]:
        """Members per rank `(R, B)`, and which of `masks` they are `(B,)`: the first one with anybody in it."""
        mine = torch.zeros((len(self.z), 3), dtype=torch.int64, device=self.z.device)
        for _, masks in self.masks():
            mine += torch.stack([mask.sum(1) for mask in masks], 1)
        every = self.part.world.gather(mine[None])
        kind = (every.sum(0) > 0).int().argmax(1)
        return every.gather(2, kind.expand(len(every), -1)[..., None])[..., 0], kind

    def rows(self, number: Tensor, kind: Tensor) -> Tensor:
        """`(B, k)` rows of the bank of the members with these numbers.

        Args:
            number: `(B, k)` int64, counted from this rank's first member; one rank holds each.
            kind: As `count` returns it.
        """
        found = torch.zeros_like(number)
        seen = torch.zeros((len(number), 1), dtype=torch.int64, device=number.device)
        for begin, masks in self.masks():
            chosen = torch.stack(masks, 1).gather(1, kind[:, None, None].expand(-1, 1, masks[0].shape[1]))[:, 0]
            upto, here = chosen.cumsum(1), number - seen
            inside = (here >= 0) & (here < upto[:, -1:])
            found += torch.where(inside, torch.searchsorted(upto, here + 1) + self.part.first + begin, 0)
            seen += upto[:, -1:]
        return self.part.sum(found)

    def draw(self, key: Key, sample: Tensor, k: int, replacement: bool) -> Tensor:
        """`(B, k)` rows, see `ops.region_sample`."""
        count, kind = self.count()
        if replacement:
            number = numbers(key, sample, count.sum(0), k)
        else:
            number = _distinct(self.part, key, sample, count, k)
        return self.rows(number - bank_parts.before(count)[self.part.world.rank][:, None], kind)


def population(
    part: Part, z: Tensor, lo: int, hi: int, own: Tensor | None, labels: Tensor | None, exclude: bool, mates: bool
) -> Population:
    """Checks the arguments of `ops.region_size`; `labels` `(C, n)` are this rank's."""
    if own is None and (exclude or mates):
        raise ValueError("own: needed to exclude the own row or its mates")
    check(part, z, own, labels)
    of_own = labels_of(part, own, labels) if mates else None
    region = None if (lo, hi) == (0, part.size) else find(part, z, lo, hi)
    return Population(part, z, region, Exclusion(own if exclude or mates else None, labels, of_own))


def check(part: Part, z: Tensor, own: Tensor | None, labels: Tensor | None) -> None:
    """Raises ValueError unless queries, own rows and this rank's labels fit."""
    ops.gather_dot(z, part.rows[:1], torch.zeros((len(z), 1), dtype=torch.int64, device=z.device))  # checks z
    if own is not None:
        part.require_rows(own, "own")
        if own.shape != z.shape[:1]:
            raise ValueError("own: needs one row per query")
    if labels is not None and labels.shape[1:] != part.rows.shape[:1]:
        raise ValueError(f"labels: needs one column for each of this rank's {len(part.rows)} rows, shape (C, n)")


def labels_of(part: Part, own: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """`(C, B)` labels of the own rows, from the ranks that hold them; None where either lacks."""
    if own is None or labels is None:
        return None
    return part.sum(torch.where(part.mine(own), labels[:, part.local(own)], 0))


def numbers(key: Key, sample: Tensor, size: Tensor, k: int) -> Tensor:
    """`(B, k)` numbers below `size` `(B,)`, with replacement."""
    drawn = rng.words(*key, sample.cpu().numpy(), k)
    return torch.from_numpy(rng.mulhi(drawn, size.cpu().numpy()[:, None])).to(size.device)


def _distinct(part: Part, key: Key, sample: Tensor, count: Tensor, k: int) -> Tensor:
    """`(B, k)` numbers of the members with the smallest words; a rank looks at the words of its own members."""
    size, first = count.sum(0), bank_parts.before(count)[part.world.rank]
    for row in torch.nonzero(size < k).flatten().tolist()[:1]:
        raise ValueError(
            f"k: {k} draws without replacement from the {int(size[row])} members of row {row}; "
            "lower k or widen the region"
        )
    mine = torch.full((len(sample), k), _WORST)
    ranges = zip(sample.tolist(), first.tolist(), count[part.world.rank].tolist(), strict=True)
    for i, (who, begin, members) in enumerate(ranges):
        found = _smallest(key, who, begin, begin + members, k)
        mine[i, : len(found)] = torch.from_numpy(found)
    return bank_parts.best(part.world.gather(mine[None].to(count.device)), k) & 0xFFFFFFFF


def _smallest(key: Key, sample: int, first: int, last: int, k: int) -> NDArray[np.int64]:
    """The k smallest of (word << 32 | number) over the numbers [first, last), less 2^63 so that int64 holds them."""
    found = np.empty(0, np.uint64)
    for begin in range(first, last, bank_parts.AT_ONCE):
        number = np.arange(begin, min(last, begin + bank_parts.AT_ONCE), dtype=np.uint64)
        drawn = words(key, sample, begin, begin + len(number)).astype(np.uint64)
        found = np.sort(np.concatenate([found, drawn << np.uint64(32) | number]))[:k]
    return (found ^ np.uint64(1 << 63)).view(np.int64)


def words(key: Key, sample: int, first: int, last: int) -> NDArray[np.uint32]:
    """The words [first, last) of `rng.words` for one sample, without those before."""
    seed, stream, step = key
    start = first // 4
    counter = np.empty((-(-last // 4) - start, 4), np.uint32)
    counter[:, 0] = np.arange(start, start + len(counter), dtype=np.uint32)
    counter[:, 1:] = sample & 0xFFFFFFFF, sample >> 32 & 0xFFFFFFFF, step
    return rng.philox(counter, (seed & 0xFFFFFFFF, int(stream))).reshape(-1)[first - 4 * start : last - 4 * start]
