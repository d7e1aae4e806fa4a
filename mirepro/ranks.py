"""One training run on several processes (ranks), each with its share of the virtual shards; the bits stay the same.

Every rank holds the whole state: weights, optimiser, banks, history. It embeds its own shards, and exchanges three
things: embeddings and BatchNorm moments in shard order, and gradients, summed in one fixed tree. Everything else (the
objective on the global batch, the step, the banks) is computed alike everywhere. The first rank alone writes.

With `bank_shards` a rank holds its rows of the banks, and what is asked about them is computed together.
"""

import contextlib
import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mirepro.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for a silent one; the death of a rank is noticed at once."""

_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def identity() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torchrun's, submitit's or Slurm's variables; (0, 1) without.

    submitit's and Slurm's are translated to torchrun's, so that they outlive a re-execution.

    Raises:
        UserError: torchrun's variables are no numbers, or contradict each other.
    """
    environ = os.environ
    if "RANK" not in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    if "RANK" not in environ and "SUBMITIT_EXECUTOR" in environ:
        from submitit.helpers import JobEnvironment, TorchDistributedEnvironment

        if JobEnvironment().num_tasks > 1:
            if environ["SUBMITIT_EXECUTOR"] == "local":
                environ.setdefault("MASTER_ADDR", "127.0.0.1")
            _export(TorchDistributedEnvironment())
    try:
        rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE: {error}; start through torchrun, or unset them") from error
    if not 0 <= rank < size:
        raise UserError(f"RANK: {rank} of {size} ranks is impossible; start through torchrun, or unset it")
    return rank, size


def leads() -> bool:
    """Whether this process is the first rank, or the only one."""
    return identity()[0] == 0


def _export(job: Any) -> None:
    names = {"RANK": "rank", "WORLD_SIZE": "world_size", "LOCAL_RANK": "local_rank"}
    names |= {"MASTER_ADDR": "master_addr", "MASTER_PORT": "master_port"}
    for variable, name in names.items():
        os.environ.setdefault(variable, str(getattr(job, name)))


def tree_sum(parts: Sequence[Sequence["Tensor"]]) -> list["Tensor"]:
    """Sums the shards' gradients pairwise: (0+1)+(2+3)..., the same tree whichever rank computed them."""
    rows = [list(part) for part in parts]
    while len(rows) > 1:
        pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        rows = [[a + b for a, b in zip(*pair, strict=True)] if len(pair) == 2 else pair[0] for pair in pairs]
    return rows[0]


@dataclass(frozen=True)
class World:
    """The ranks of a run. One process alone is a world, too, and exchanges nothing.

    As a context it ends when all ranks have left it; after an error nobody waits, so that the first message is the
    cause.
    """

    rank: int = 0
    size: int = 1

    @property
    def leader(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def lead(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """`call(*arguments)` on the first rank; None on the others."""
        return call(*arguments) if self.leader else None

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on every rank; its UserError is raised on every rank, too."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        box: list[Any] = [self.lead(_attempt, make)]
        with _contact(self.rank):
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def part(self, batch: "Tensor") -> "Tensor":
        """This rank's rows of a batch `(B, ...)`: those of its shards."""
        return batch.chunk(self.size)[self.rank]

    def gather(self, rows: "Tensor") -> "Tensor":
        """`(n, ...)` of each rank -> `(size * n, ...)` in the order of ranks, which is that of shards and samples."""
        if self.size == 1:
            return rows
        import torch.distributed as dist

        everything = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        with _contact(self.rank):
            dist.all_gather_single(everything, rows.contiguous())
        return everything

    def collect(self, rows: "Tensor", counts: Sequence[int]) -> "Tensor":
        """`(n, ...)` of each rank, n as in `counts` -> all of them on the first rank's CPU, none on the others."""
        rows = rows.cpu().contiguous()
        if self.size == 1:
            return rows
        import torch.distributed as dist

        with _contact(self.rank):
            if not self.leader:
                dist.send(rows, 0)
                return rows[:0]
            everything = rows.new_empty((sum(counts), *rows.shape[1:]))
            own, *others = everything.split(list(counts))
            own.copy_(rows)
            for rank, part in enumerate(others, 1):
                dist.recv(part, rank)
        return everything

    def total(self, parts: Sequence[Sequence["Tensor"]]) -> list["Tensor"]:
        """`tree_sum` over the shards of all ranks, given the gradients of this rank's shards.

        A power of two of consecutive shards is a whole subtree, because each rank starts at a multiple of it; only
        then is it summed before the exchange.
        """
        if self.size == 1:
            return tree_sum(parts)
        import torch

        rows = [tree_sum(parts)] if len(parts).bit_count() == 1 else parts
        mine = torch.stack([torch.cat([gradient.reshape(-1) for gradient in row]) for row in rows])
        (flat,) = tree_sum([[row] for row in self.gather(mine)])
        pieces = flat.split([gradient.numel() for gradient in parts[0]])
        return [piece.clone().view_as(gradient) for piece, gradient in zip(pieces, parts[0], strict=True)]

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1 and kind is None:
            import torch.distributed as dist

            with _contact(self.rank):
                dist.barrier()
            dist.destroy_process_group()


def join(shards: int, fingerprint: str) -> World:
    """Meets the other ranks.

    Args:
        shards: Virtual shards of the run; the ranks share them equally.
        fingerprint: Names the run; all ranks have to agree.

    Raises:
        UserError: The ranks do not divide the shards, do not meet, or are about to compute different runs.
        SystemExit: The first rank finds nothing left to compute.
    """
    rank, size = identity()
    if shards % size:
        possible = ", ".join(str(count) for count in range(1, shards + 1) if shards % count == 0)
        raise UserError(
            f"rank {rank}: {size} ranks cannot share pretrain.shards {shards} equally; start one of {possible}"
        )
    return _meet(rank, size, fingerprint)


def dismiss() -> None:
    """Sends the other ranks home: the first one finds nothing to compute."""
    _meet(*identity(), None)


def _meet(rank: int, size: int, fingerprint: str | None) -> World:
    world = World(rank, size)
    if size == 1:
        return world
    import torch
    import torch.distributed as dist

    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)  # no orphans where the launcher itself is killed
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _contact(rank):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    agreed = world.share(lambda: fingerprint)
    if agreed is None:
        with world:
            pass
        raise SystemExit(0)
    if agreed != fingerprint:
        raise UserError(f"rank {rank}: other parameters, data or code than the first rank; use one checkout for all")
    return world


def _attempt(make: Callable[[], T]) -> T | UserError:
    try:
        return make()
    except UserError as error:
        return error


@contextlib.contextmanager
def _contact(rank: int) -> Iterator[None]:
    """Turns a broken exchange into one line: its cause is another rank's error, which stands above."""
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError) as error:
        what = str(error).partition("] ")[2].partition(". ")[0] or str(error) or type(error).__name__
        raise UserError(
            f"rank {rank}: lost the other ranks ({what.splitlines()[0][:200]}); the first error says why; the same "
            "command resumes"
        ) from error
