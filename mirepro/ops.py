"""Typed face of the compiled operators: memory bank (C++ and CUDA in `csrc`, float32) and views (C++).

A score is one sequential float32 fused-multiply-add chain over the dimension, so every result has the same bits for
every thread count and instruction set (`MIREPRO_ISA=scalar|avx2|avx512` forces one) and on CUDA. Regions are ranks of
the scores, descending, ties by lower index. No operator holds a B x N or B x K x D buffer. Bad input raises
`ValueError`.

`mirepro.reference` states every operator again, slowly, in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirepro.errors import UserError
from mirepro.rng import Stream

BUILD_COMMAND = "python setup.py build_ext --inplace"


def _libraries(folder: Path, cuda: bool) -> list[Path]:
    """The shared objects to load: the operators, and their CUDA kernels where they were built and can run."""
    found = sorted(folder.glob("_ops.*so"))
    if not found:
        raise UserError(f"mirepro/_ops.*so: the compiled operators are missing; build them with `{BUILD_COMMAND}`")
    return [found[0], *sorted(folder.glob("_ops_cuda.*so"))[:1]] if cuda else [found[0]]


def _load() -> None:
    for library in _libraries(Path(__file__).parent, torch.cuda.is_available()):
        torch.ops.load_library(str(library))


_load()
_ops = torch.ops.mirepro


def neighbors(z: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of every query.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        k: 1 to N.

    Returns:
        Scores `(B, k)` float32, descending, and row indices `(B, k)` int64; ties by lower index.

    Raises:
        ValueError: Shapes or k do not fit, or a row holds NaN or inf.
    """
    return _ops.neighbors(z.detach(), bank.detach(), k)


def region_thresholds(z: Tensor, bank: Tensor, lo_rank: int, hi_rank: int) -> Tensor:
    """Exact order statistics of every query's scores.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        lo_rank: First rank, 0 is the most similar row.
        hi_rank: One past the last rank, at most N.

    Returns:
        `(B, 2)` float32: the scores of rank `lo_rank` and of rank `hi_rank - 1`.

    Raises:
        ValueError: Shapes or ranks do not fit, or a row holds NaN or inf.
    """
    return _ops.region_thresholds(z.detach(), bank.detach(), lo_rank, hi_rank)


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
    """Members of every query's region after exclusion.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        lo_rank: First rank.
        hi_rank: One past the last rank.
        own: `(B,)` int64 own rows; needed for exclusion.
        labels: `(C, N)` int64, one clustering per row; mates share a label with the own row in any of them.
        exclude_own: Remove the own row after the ranks are cut.
        exclude_mates: Remove the own row and its mates after the ranks are cut.

    Returns:
        `(B,)` int64; 0 where nobody is left and `region_sample` falls back to the region without the own row.

    Raises:
        ValueError: As `region_sample`.
    """
    return _ops.region_size(z.detach(), bank.detach(), lo_rank, hi_rank, own, labels, exclude_own, exclude_mates)


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
    """Uniform draws from every query's region.

    Draw t is the member of number `mulhi(word t, size)` in bank-index order, with the words of `rng.words(seed,
    stream, step, sample)`. Without replacement member m has priority word m and the k smallest are drawn, in that
    order, ties by number. Where exclusion leaves nobody, the region without the own row is used; where that is
    empty too, the region itself.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        lo_rank: First rank.
        hi_rank: One past the last rank.
        k: Draws per query.
        seed: 32-bit seed of the run.
        step: Step, 32 bits.
        sample_index: `(B,)` int64, identifies each query's draws.
        stream: What the draws are for.
        own: `(B,)` int64 own rows; needed for exclusion.
        labels: `(C, N)` int64 cluster labels.
        exclude_own: Remove the own row after the ranks are cut.
        exclude_mates: Remove the own row and its mates after the ranks are cut.
        replacement: False draws distinct members.

    Returns:
        `(B, k)` int64 bank rows.

    Raises:
        ValueError: Shapes or ranks do not fit, a row holds NaN or inf, an exclusion lacks `own`, or k exceeds the
            members of a draw without replacement.
    """
    return _ops.region_sample(
        z.detach(), bank.detach(), lo_rank, hi_rank, k, seed & 0xFFFFFFFF, int(stream), step, sample_index, own, labels,
        exclude_own, exclude_mates, replacement,
    )  # fmt: skip


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
    """Log-sum-exp of f = s / tau over every query's region, and over the mates in it; differentiable in z.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        lo_rank: First rank.
        hi_rank: One past the last rank.
        tau: Temperature, > 0.
        own: `(B,)` int64 own rows. An own row always counts as a member (the last rank gives way) and as a mate.
        labels: `(C, N)` int64 cluster labels; without them the own row is its only mate.

    Returns:
        `(B,)` float32 in nats over all members, and over the mates (-inf without `own`).

    Raises:
        ValueError: Shapes or ranks do not fit, tau <= 0, or a row holds NaN or inf.
    """
    every, mates, *_ = _ops.region_logsumexp(z, bank.detach(), lo_rank, hi_rank, tau, own, labels, _wants_gradient(z))
    return every, mates


def gather_nce(z: Tensor, bank: Tensor, index: Tensor, tau: float) -> Tensor:
    """Softmax cross-entropy of every query over gathered bank rows; differentiable in z.

    `CE = logsumexp_t(s_t / tau) - s_0 / tau`; the log k of the bound is the caller's.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        index: `(B, K)` int64 bank rows, the positive in column 0.
        tau: Temperature, > 0.

    Returns:
        `(B,)` float32 in nats.

    Raises:
        ValueError: Shapes or indices do not fit, tau <= 0, or a row holds NaN or inf.
    """
    return _ops.gather_nce(z, bank.detach(), index, tau, _wants_gradient(z))[0]


def gather_dot(z: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Scores of every query with gathered bank rows; differentiable in z.

    Args:
        z: `(B, D)` float32 queries.
        bank: `(N, D)` float32.
        index: `(B, K)` int64 bank rows.

    Returns:
        `(B, K)` float32.

    Raises:
        ValueError: Shapes or indices do not fit, or a row holds NaN or inf.
    """
    return _ops.gather_dot(z, bank.detach(), index)


def bank_update_(bank: Tensor, index: Tensor, z: Tensor, momentum: float) -> None:
    """In place `bank[i] <- normalize(m bank[i] + (1 - m) z)`, duplicates in order of appearance.

    A zero vector keeps the old row; m = 0 stores z as it is, m = 1 changes nothing.

    Args:
        bank: `(N, D)` float32, contiguous.
        index: `(B,)` int64 rows.
        z: `(B, D)` float32 new embeddings, normalised.
        momentum: Weight m of the old row, 0 to 1.

    Raises:
        ValueError: Shapes, indices or momentum do not fit, or a row of z holds NaN or inf.
    """
    _ops.bank_update_(bank, index, z.detach(), momentum)


def bank_assign(bank: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid (Euclidean) of every bank row, as argmax of `dot - |c|^2 / 2`; ties by lower index.

    Args:
        bank: `(N, D)` float32.
        centroids: `(K, D)` float32.

    Returns:
        `(N,)` int64.

    Raises:
        ValueError: Shapes do not fit, or a row holds NaN or inf.
    """
    return _ops.bank_assign(bank.detach(), centroids.detach())


def augment(
    images: Tensor, boxes: Tensor, gray: Tensor, order: Tensor, amount: Tensor, flip: Tensor, size: int
) -> Tensor:
    """Crop with antialiased bilinear resize (as PIL's of a cropped image), gray, colour jitter, flip; CPU only.

    Args:
        images: `(B, 3, S, S)` uint8.
        boxes: `(B, 4)` int64: top, left, height, width.
        gray: `(B,)` bool: give all channels the luma.
        order: `(B, 4)` int64: the step of each place: 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none.
        amount: `(B, 4)` float32 how much of each step: factors less 1, and turns of the hue in [-0.5, 0.5].
        flip: `(B,)` bool: left to right.
        size: Side of the views, 1 or more.

    Returns:
        `(B, 3, size, size)` float32 in [0, 1], up to rounding.

    Raises:
        ValueError: Shapes, dtypes, steps, amounts or size do not fit, or a box does not lie in its image.
    """
    return _ops.augment(images, boxes, gray.long(), order, amount, flip.long(), size)


def _wants_gradient(z: Tensor) -> bool:
    return torch.is_grad_enabled() and z.requires_grad


def _register_fakes(namespace: str) -> None:
    """Shapes and dtypes for tracing; the arguments are those of the schemas in csrc/schemas.h."""

    def size(z: Tensor, *_: Any) -> Tensor:
        return z.new_empty((z.shape[0],), dtype=torch.int64)

    def sample(z: Tensor, _bank: Tensor, _lo: int, _hi: int, k: int, *_: Any) -> Tensor:
        return z.new_empty((z.shape[0], k), dtype=torch.int64)

    def best(z: Tensor, _bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return z.new_empty((z.shape[0], k)), z.new_empty((z.shape[0], k), dtype=torch.int64)

    def nce(z: Tensor, _bank: Tensor, _index: Tensor, _tau: float, gradient: bool) -> tuple[Tensor, Tensor]:
        return z.new_empty((z.shape[0],)), z.new_empty((z.shape[0], z.shape[1] if gradient else 0))

    def logsumexp(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pair = [nce(z, z, z, 1.0, rest[-1]) for _ in range(2)]
        return pair[0][0], pair[1][0], pair[0][1], pair[1][1]

    def nothing(*_: Any) -> None:
        return None

    fakes: dict[str, Callable[..., Any]] = {
        "neighbors": best,
        "region_thresholds": lambda z, *_: z.new_empty((z.shape[0], 2)),
        "region_size": size,
        "region_sample": sample,
        "region_logsumexp": logsumexp,
        "gather_nce": nce,
        "gather_dot": lambda z, _bank, index: z.new_empty(index.shape),
        "gather_dot_backward": lambda grad, bank, _index: grad.new_empty((grad.shape[0], bank.shape[1])),
        "bank_update_": nothing,
        "bank_assign": size,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


def _register_gradients(namespace: str) -> None:
    """The forward pass already holds d value / d z; backward only scales it. Nothing flows into the bank."""

    def keep_nce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    def nce(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        return grad[:, None] * ctx.saved_tensors[0], None, None, None, None

    def keep_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:])

    def logsumexp(ctx: Any, every: Tensor, mates: Tensor, *_: Tensor) -> tuple[Any, ...]:
        d_every, d_mates = ctx.saved_tensors
        return every[:, None] * d_every + mates[:, None] * d_mates, *(None,) * 7

    def keep_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    def dot(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ops.gather_dot_backward(grad, *ctx.saved_tensors), None, None

    torch.library.register_autograd(f"{namespace}::gather_nce", nce, setup_context=keep_nce)
    torch.library.register_autograd(f"{namespace}::region_logsumexp", logsumexp, setup_context=keep_logsumexp)
    torch.library.register_autograd(f"{namespace}::gather_dot", dot, setup_context=keep_dot)


def _views(images: Tensor, *rest: Any) -> Tensor:
    return images.new_empty((images.shape[0], 3, rest[-1], rest[-1]), dtype=torch.float32)


_register_fakes("mirepro")
torch.library.register_fake("mirepro::augment", _views)
_register_gradients("mirepro")
