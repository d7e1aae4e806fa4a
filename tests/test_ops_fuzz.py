"""Fuzzing of every operator over shapes, strides and options against the float64 oracle.

`MIREPRO_FUZZ=5000 pytest tests/test_ops_fuzz.py` tries that many problems per test instead of a few seconds' worth.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirepro import ops, reference, rng
from tests import test_ops

FUZZ = settings(
    max_examples=int(os.environ.get("MIREPRO_FUZZ", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WIDTHS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 65, 127, 128, 129, 257]))
ROWS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 383, 384, 385, 769]), st.integers(1, 2000))
QUERIES = st.one_of(st.integers(0, 5), st.sampled_from([31, 32, 33, 65]))


def lattice(n: int, d: int, seed: int) -> Tensor:
    """Entries in quarters, for any n and d >= 0: scores are exact, and ties abound."""
    return test_ops.lattice(max(n, 1), max(d, 1), seed)[:n, :d]


def unit(n: int, d: int, seed: int) -> Tensor:
    return test_ops.unit(max(n, 1), max(d, 1), seed)[:n, :d]


def below(limit: int, n: int, k: int, seed: int) -> Tensor:
    """`(n, k)` int64 in [0, limit)."""
    return torch.from_numpy(rng.mulhi(rng.words(seed, 1, 0, np.arange(max(n, 1)), k), limit))[:n]


def columns_apart(t: Tensor) -> Tensor:
    wide = torch.zeros(*t.shape[:-1], 3 * t.shape[-1], dtype=t.dtype) + 7
    wide[..., ::3] = t
    return wide[..., ::3]


def rows_apart(t: Tensor) -> Tensor:
    tall = torch.zeros(2 * t.shape[0], *t.shape[1:], dtype=t.dtype) + 7
    tall[1::2] = t
    return tall[1::2]


def shifted(t: Tensor) -> Tensor:
    """Contiguous, but no address is a multiple of a vector's size."""
    flat = torch.zeros(t.numel() + 5, dtype=t.dtype) + 7
    flat[3 : 3 + t.numel()] = t.flatten()
    return flat[3 : 3 + t.numel()].view(t.shape)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t


LAYOUTS = {f.__name__: f for f in (Tensor.contiguous, columns_apart, rows_apart, shifted, transposed)}
layouts = st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=6, max_size=6)


@dataclass
class Problem:
    """Queries, bank, ranks and company; `laid` gives the same values in other places."""

    z: Tensor
    bank: Tensor
    lo: int
    hi: int
    k: int
    own: Tensor
    labels: Tensor | None
    layout: list[str]

    def laid(self) -> tuple[Tensor, ...]:
        tensors = (self.z, self.bank, self.own, self.labels)
        pairs = zip(tensors, self.layout, strict=False)
        return tuple(None if t is None else LAYOUTS[name](t) for t, name in pairs)  # type: ignore[misc]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    b, n, d, seed = draw(QUERIES), draw(ROWS), draw(WIDTHS), draw(st.integers(0, 10**6))
    lo = draw(st.integers(0, n - 1))
    hi = draw(st.one_of(st.just(n), st.integers(lo + 1, n)))
    own, labels = below(n, b, 1, seed)[:, 0], below(draw(st.integers(1, 9)), 2, n, seed + 1)
    bank = lattice(n, d, seed + 1)
    kind = draw(st.sampled_from(["plain", "repeated", "constant"]))
    if kind == "repeated":
        bank = bank[torch.arange(n) % max(1, n // 7)]
    if kind == "constant":
        bank = bank[:1].expand(n, d)
    k = draw(st.one_of(st.integers(1, 30), st.just(5000)))
    with_labels = draw(st.booleans())
    return Problem(lattice(b, d, seed), bank, lo, hi, k, own, labels if with_labels else None, draw(layouts))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def choose(threads: int, first_pass: str, patch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(threads)
    patch.setenv("MIREPRO_FIRST_PASS", first_pass)


THREADS = st.sampled_from([1, 2, 3, 7])
PASSES = st.sampled_from(["", "exact", "bf16", "int8"])


@FUZZ
@given(problems(), THREADS, PASSES)
def test_neighbors_thresholds_and_sums(problem: Problem, threads: int, first_pass: str) -> None:
    p = problem
    z, bank, own, labels = p.laid()
    with pytest.MonkeyPatch.context() as patch:
        choose(threads, first_pass, patch)
        score, index = ops.neighbors(z, bank, p.hi)
        thresholds = ops.region_thresholds(z, bank, p.lo, p.hi)
        sums = ops.region_logsumexp(z, bank, p.lo, p.hi, 0.5, own=own, labels=labels)
    want = reference.neighbors(p.z, p.bank, p.hi)
    assert torch.equal(index, want[1])
    assert torch.equal(score.double(), want[0])
    assert torch.equal(thresholds.double(), reference.region_thresholds(p.z, p.bank, p.lo, p.hi))
    assert [len(part) for part in sums] == [len(z)] * 2
    if len(z):
        wanted = reference.region_logsumexp(p.z, p.bank, p.lo, p.hi, 0.5, own=p.own, labels=p.labels)
        for a, b in zip(sums, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@FUZZ
@given(problems(), THREADS, st.booleans(), st.sampled_from(["none", "own", "mates"]))
def test_sizes_and_draws(problem: Problem, threads: int, replacement: bool, exclude: str) -> None:
    p = problem
    sample = p.own * 2**33 + 5
    with pytest.MonkeyPatch.context() as patch:
        choose(threads, "", patch)
        z, bank, own, labels = p.laid()
        flags: dict[str, Any] = {"exclude_own": exclude == "own", "exclude_mates": exclude == "mates"}
        size = ops.region_size(z, bank, p.lo, p.hi, own=own, labels=labels, **flags)
        given = {"seed": p.hi, "step": 2**32 - 1, "replacement": replacement}
        members = reference._members(p.z, p.bank, p.lo, p.hi, p.own, p.labels, *flags.values())
        k = p.k if replacement else min([p.k, *(len(rows) for rows, _ in members)])
        laid = LAYOUTS[p.layout[4]](sample)
        drawn = ops.region_sample(z, bank, p.lo, p.hi, k, own=own, labels=labels, sample_index=laid, **flags, **given)
    assert size.tolist() == [0 if fallback else len(rows) for rows, fallback in members]
    assert drawn.shape == (len(p.z), k)
    if len(p.z):
        more: dict[str, Any] = {"own": p.own, "labels": p.labels, "sample_index": sample, **flags, **given}
        assert torch.equal(drawn, reference.region_sample(p.z, p.bank, p.lo, p.hi, k, **more))


@FUZZ
@given(QUERIES, ROWS, WIDTHS, st.sampled_from([1, 15, 16, 17, 300, 4097]), st.integers(0, 10**6), layouts, THREADS)
def test_gathers(b: int, n: int, d: int, k: int, seed: int, layout: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    z, bank = unit(b, d, seed), unit(n, d, seed + 1)
    index = below(n, b, k, seed)
    lay = [LAYOUTS[name] for name in layout]
    leaf = z.clone().requires_grad_()
    ce = ops.gather_nce(lay[0](leaf), lay[1](bank), lay[2](index), 0.1)
    dot = ops.gather_dot(lay[0](leaf), lay[1](bank), lay[2](index))
    got = torch.autograd.grad((ce.sum() + dot.square().sum()), leaf)[0] if b * d else leaf
    assert (ce.shape, dot.shape) == ((b,), (b, k))
    exact = z.double().requires_grad_()
    want_ce, want_dot = reference.gather_nce(exact, bank, index, 0.1), reference.gather_dot(exact, bank, index)
    torch.testing.assert_close(ce.double(), want_ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dot.double(), want_dot, rtol=0, atol=2e-6)
    if b * d:
        want = torch.autograd.grad(want_ce.sum() + want_dot.square().sum(), exact)[0]
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * k**0.5)


@FUZZ
@given(QUERIES, ROWS, WIDTHS, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6), layouts, THREADS, PASSES)
def test_update_and_assignment(
    b: int, n: int, d: int, momentum: float, seed: int, layout: list[str], threads: int, first_pass: str
) -> None:
    z, bank = lattice(b, d, seed), lattice(n, d, seed + 1)
    index = below(n, b, 1, seed)[:, 0]
    lay = [LAYOUTS[name] for name in layout]
    with pytest.MonkeyPatch.context() as patch:
        choose(threads, first_pass, patch)
        assigned = ops.bank_assign(lay[0](bank), lay[1](bank[: n // 2 + 1]))
    assert torch.equal(assigned, reference.bank_assign(bank, bank[: n // 2 + 1]))
    got, want = lay[2](bank.clone()), bank.clone()
    if not got.is_contiguous():
        with pytest.raises(ValueError, match="contiguous"):
            ops.bank_update_(got, lay[3](index), lay[4](z), momentum)
        return
    ops.bank_update_(got, lay[3](index), lay[4](z), momentum)
    reference.bank_update_(want, index, z, momentum)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_empty_banks_and_no_columns_are_refused() -> None:
    z, none, own = unit(2, 4, 0), torch.zeros(0, 4), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: ops.neighbors(z, none, 1),
        lambda: ops.region_thresholds(z, none, 0, 1),
        lambda: ops.region_sample(z, none, 0, 1, 1, seed=0, step=0, sample_index=own),
        lambda: ops.region_logsumexp(z, none, 0, 1, 0.1),
        lambda: ops.gather_nce(z, none, own[:, None], 0.1),
        lambda: ops.gather_dot(z, unit(3, 4, 1), own[:, None][:, :0]),
        lambda: ops.bank_update_(none, own, z, 0.5),
        lambda: ops.bank_assign(z, none),
    ):
        with pytest.raises(ValueError):
            call()
    assert ops.bank_assign(none, z).shape == (0,)


def test_the_oracle_notices_a_wrong_stride() -> None:
    """The control: numbers taken from beside a view give other answers."""
    z, bank = lattice(3, 5, 1), lattice(90, 5, 2)
    beside = columns_apart(bank).untyped_storage()
    wrong = torch.tensor(beside).view(torch.float32)[: bank.numel()].view_as(bank)
    assert not torch.equal(ops.neighbors(z, wrong, 40)[1], reference.neighbors(z, bank, 40)[1])
