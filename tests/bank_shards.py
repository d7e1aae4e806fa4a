"""Questions to a memory bank, whole or spread over ranks. `python -m tests.bank_shards OUT` is one rank of a bank."""

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from mirepro import bank_parts, bank_shards, ops, ranks
from mirepro.bank import WholeBank
from tests.ops_cases import unit

BLOCKS, AT_ONCE = 4, 128
RANKED = ("plain", "ties", "small", "zeros")
PROBLEMS = (*RANKED, "equal")


class Whole(WholeBank):
    """The whole bank, asked like one rank's part."""

    first = 0

    def __init__(self, rows: Tensor):
        super().__init__(rows.clone())

    def sum(self, integers: Tensor) -> Tensor:
        return integers


def problem(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries `(6, D)`, rows `(N, D)`, own rows `(6,)`, half of them the nearest ones, and labels `(2, N)`."""
    size, dim = {"equal": (9, 4), "small": (5, 3), "zeros": (41, 4)}.get(name, (103, 8))
    z, rows = torch.from_numpy(unit(6, dim, 1)), torch.from_numpy(unit(size, dim, 2))
    if name in ("ties", "equal"):
        rows = rows[torch.arange(size) % (7 if name == "ties" else 1)]
    if name == "zeros":  # scores of 0, of -0 by underflow, and others
        rows[::3] = 0
        rows[1::3] = torch.tensor([0, 0, 0, -1e-30])
        z[:3] = torch.tensor([0, 0, 0, 1e-30])
    own = torch.arange(6) * 31 % size
    own[:3] = ops.neighbors(z, rows, 1)[1][:3, 0]
    labels = torch.stack([torch.arange(size) * (c + 7) % 5 for c in range(2)])
    return z, rows, own, labels * 0 if name == "zeros" else labels


def answers(bank, z: Tensor, own: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the whole bank and one on ranks have to say alike; at last the bank is updated."""
    size, found = bank.size, {}
    for k in sorted({1, 2, size // 3 + 1, size}):
        found[f"neighbors {k} score"], found[f"neighbors {k} row"] = bank.neighbors(z, k)
    for low, high in {(0, size), (0, 1), (size - 1, size), (size // 3, 2 * size // 3 + 1)}:
        found |= {f"{low}-{high} {name}": value for name, value in region(bank, z, own, labels, low, high)}
    key = {"seed": 3, "step": 4, "sample_index": own + (1 << 33)}
    index = torch.cat([own[:, None], bank.region_sample(z, 0, size, 40, **key)], 1)
    found["dot"], found["nce"] = bank.gather_dot(z, index), bank.gather_nce(z, index, 0.07)
    found["assign"] = everywhere(bank, bank.assign(z))
    for momentum in (0.0, 0.5, 1.0):
        bank.update(torch.cat([own, own]), torch.cat([z, z.flip(0)]), momentum)
        found[f"update {momentum}"] = bank.take(torch.arange(size))
    return found


def region(bank, z: Tensor, own: Tensor, labels: Tensor, low: int, high: int) -> Iterator[tuple[str, Tensor]]:
    """Thresholds, sizes and draws of one region, with each exclusion."""
    yield "thresholds", bank.region_thresholds(z, low, high)
    for who in ({}, {"exclude_own": True}, {"exclude_mates": True}):
        name, company = " ".join(who), {"own": own, "labels": labels} | who
        key = {"seed": 5, "step": 6, "sample_index": own + (1 << 33)} | company
        size = bank.region_size(z, low, high, **company)
        yield f"size {name}", size
        yield f"draws {name}", bank.region_sample(z, low, high, 7, **key)
        most = max(1, min(int(size.min()), 100))
        yield f"distinct {name}", bank.region_sample(z, low, high, most, replacement=False, **key)


def everywhere(bank, mine: Tensor) -> Tensor:
    """`(n,)` of each rank -> `(N,)`."""
    every = torch.zeros(bank.size, dtype=torch.int64)
    every[bank.first : bank.first + len(mine)] = mine
    return bank.sum(every)


def sums(bank, z: Tensor, own: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums of floats over rows, whose order the blocks decide."""
    z = z.clone().requires_grad_()
    index = torch.cat([own[:, None], bank.region_sample(z, 0, bank.size, 40, seed=3, step=4, sample_index=own)], 1)
    weight = torch.linspace(-1, 2, index.numel()).view(index.shape)
    (dot,) = torch.autograd.grad((bank.gather_dot(z, index) * weight).sum(), z)
    (nce,) = torch.autograd.grad(bank.gather_nce(z, index, 0.07).sum(), z)
    found = {"dot gradient": dot, "nce gradient": nce}
    for low, high in {(0, 1), (bank.size // 3, 2 * bank.size // 3 + 1)}:
        for name, company in {"all": {}, "mates": {"own": own, "labels": labels}}.items():
            every, mates = bank.region_logsumexp(z, low, high, 0.07, **company)
            (slope,) = torch.autograd.grad((every * 2 - mates.where(mates > -torch.inf, 0)).sum(), z)
            found |= {f"{low}-{high} {name} sum": every, f"{low}-{high} {name} mates": mates}
            found[f"{low}-{high} {name} gradient"] = slope
    return {name: value.detach() for name, value in found.items()}


def spread(rows: Tensor, world: ranks.World, blocks: int = BLOCKS) -> bank_shards.ShardedBank:
    """This rank's part of a bank."""
    bank = bank_shards.ShardedBank(*rows.shape, world=world, blocks=blocks, seed=0)
    bank.rows = rows[bank.first : bank.edges[-1]].clone()
    return bank


def part_answers(name: str, world: ranks.World) -> dict[str, Tensor]:
    """All answers of a bank on ranks."""
    z, rows, own, labels = problem(name)
    bank = spread(rows, world)
    mine = labels[:, bank.first : bank.edges[-1]]
    drawn = bank_shards.ShardedBank(len(rows), 5, world=world, blocks=BLOCKS, seed=8, modality=1)
    return answers(bank, z, own, mine) | {"initial": drawn.take(torch.arange(len(rows)))}


def part_sums(name: str, world: ranks.World, blocks: int = BLOCKS) -> dict[str, Tensor]:
    """All sums of a bank on ranks."""
    z, rows, own, labels = problem(name)
    bank = spread(rows, world, blocks)
    found = sums(bank, z, own, labels[:, bank.first : bank.edges[-1]])
    return found | {"means": bank.means(bank.assign(z), z)}


def mistaken(world: ranks.World) -> dict[str, Tensor]:
    """The controls: a merge that takes equal scores from the last rank first, and numbers that count the own rank."""
    z, rows, own, _ = problem("ties")
    bank, right = spread(rows, world), bank_parts.best
    key = {"seed": 5, "step": 6, "sample_index": own + (1 << 33)}

    def careless(keys: Tensor, k: int) -> Tensor:
        return right(keys ^ 0xFFFFFFFF, k) ^ 0xFFFFFFFF

    with mock.patch.object(bank_parts, "best", careless):
        found = {"neighbors": bank.neighbors(z, 2)[1]}
    with mock.patch.object(bank_parts, "before", lambda count: count.cumsum(0)):
        found["draws"] = bank.region_sample(z, len(rows) // 3, 2 * len(rows) // 3 + 1, 7, **key)
    return found


def main(out: str) -> None:
    """Writes this rank's answers; tiles are small, so that there are several in a block."""
    bank_parts.AT_ONCE = AT_ONCE
    torch.set_num_threads(1)
    with ranks.join(BLOCKS, "f") as world:
        found = {name: (part_answers(name, world), part_sums(name, world)) for name in RANKED}
        found["control"] = mistaken(world)
        torch.save(found, Path(out) / f"{world.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
