"""The banks of a run: whole on every rank, or spread over the ranks in blocks."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mirepro.bank import MemoryBank, WholeBank
from mirepro.bank_shards import ShardedBank
from mirepro.errors import UserError
from mirepro.params import RunParams
from mirepro.ranks import World

Bank = WholeBank | ShardedBank
"""What is asked about rows, by all ranks alike; the answers are the same on all of them, but those per held row."""


def create(run: RunParams, modalities: Sequence[str], size: int, world: World, device: torch.device) -> dict[str, Bank]:
    """One bank per modality.

    Args:
        run: Gives seed, dimension and the number of blocks, 0 for whole banks.
        modalities: Their names; the place decides the initial rows.
        size: N.
        world: The ranks that share the blocks.
        device: Where the rows lie.

    Raises:
        UserError: The ranks cannot share the blocks, or the device has no room for the rows.
    """
    dim, blocks = run.pretrain.encoder.dim, run.pretrain.bank_shards
    _check_room(4 * dim * len(modalities) * -(-size // (world.size if blocks else 1)), blocks, device)

    def make(modality: int) -> Bank:
        if blocks == 0:
            return MemoryBank(size, dim, seed=run.seed, modality=modality, device=device)
        return ShardedBank(size, dim, world=world, blocks=blocks, seed=run.seed, modality=modality, device=device)

    return {name: make(modality) for modality, name in enumerate(modalities)}


def _check_room(needed: int, blocks: int, device: torch.device) -> None:
    """Refuses rows that are sure not to fit; results depend on the number of blocks, so that it is not chosen here."""
    import psutil

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        remedy = "more ranks" if blocks else "`bank_shards: V` and several ranks, whose number divides V"
        what = f"the bank's rows take {needed / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free"
        raise UserError(f"pretrain.bank_shards: {blocks}: {what}; use {remedy}")


def nearest(z: Mapping[str, Tensor], banks: Mapping[str, Bank]) -> Tensor:
    """`(B,)` int64: the row most similar to each query `(B, D)` by the sum of its scores in all modalities."""
    joined = copy.copy(next(iter(banks.values())))
    joined.rows = torch.cat([bank.rows for bank in banks.values()], 1)
    return joined.neighbors(torch.cat(list(z.values()), 1), 1)[1][:, 0]


def collect(bank: Bank, values: Tensor) -> Tensor:
    """`(C, n)` values of each rank's rows -> `(C, N)` on the first rank; all ranks ask."""
    return bank.world.collect(values.T, bank.counts).T if isinstance(bank, ShardedBank) else values


def held(bank: Bank, values: Tensor) -> Tensor:
    """`(C, N)` values of all rows -> `(C, n)` of those that this rank holds."""
    return values[:, bank.numbers()].contiguous()
