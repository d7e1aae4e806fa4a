"""The sampler: uniform by chi-square and by Kolmogorov-Smirnov against NumPy's choice, and independent of the batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mirepro import ops, reference
from tests.test_ops import unit

LO, HI, STEPS, SURE = 40, 340, 60, 1e-4
MEMBERS = HI - LO
Numbers = NDArray[np.int64]


def numbers(k: int, replacement: bool) -> Numbers:
    """`(STEPS * 8, k)`: each draw's number among its region's members, over steps and samples."""
    z, bank = unit(8, 12), unit(1000, 12, 1)
    members = torch.sort(reference.order(z, bank)[:, LO:HI], dim=1).values
    result = []
    for step in range(STEPS):
        sample = torch.arange(8) * 1013 + step
        drawn = ops.region_sample(z, bank, LO, HI, k, seed=3, step=step, sample_index=sample, replacement=replacement)
        place = torch.searchsorted(members, drawn)
        assert torch.equal(members.gather(1, place), drawn)
        result.append(place.numpy())
    return np.concatenate(result)


def choice(k: int, replacement: bool, seed: int = 0) -> Numbers:
    """The same from NumPy's generator."""
    generator = np.random.default_rng(seed)
    return np.array([generator.choice(MEMBERS, k, replace=replacement) for _ in range(8 * STEPS)])


def biased(k: int, replacement: bool) -> Numbers:
    """Every twentieth query prefers the first half: a sampler that must not pass."""
    drawn = choice(k, replacement, 1)
    drawn[::20] //= 2
    return drawn


def chi_square(drawn: Numbers, replacement: bool) -> float:
    """p-value of equal shares; the members of a draw without replacement vary less, by known covariances."""
    queries, k = drawn.shape
    counts, expected = np.bincount(drawn.ravel(), minlength=MEMBERS), queries * k / MEMBERS
    free = 1 if replacement else (MEMBERS - k) / (MEMBERS - 1)
    return float(stats.chi2.sf(np.square(counts - expected).sum() / expected / free, MEMBERS - 1))


def kolmogorov_smirnov(drawn: Numbers, replacement: bool) -> float:
    """p-value against NumPy's choice; of draws without replacement the first ones, which are independent."""
    pair = (drawn, choice(drawn.shape[1], replacement, 2))
    one, other = (x.ravel() if replacement else x[:, 0] for x in pair)
    return float(stats.ks_2samp(one, other).pvalue)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("test", [chi_square, kolmogorov_smirnov])
def test_draws_are_uniform(test: Callable[[Numbers, bool], float], replacement: bool) -> None:
    assert test(numbers(250, replacement), replacement) > SURE
    assert test(choice(250, replacement), replacement) > SURE


@pytest.mark.parametrize("test", [chi_square, kolmogorov_smirnov])
def test_a_biased_sampler_fails(test: Callable[[Numbers, bool], float]) -> None:
    assert test(biased(250, True), True) < SURE


def test_draws_of_a_query_and_of_its_neighbours_are_independent() -> None:
    """Correlations between successive draws, between queries of a step and between steps."""
    x = numbers(250, True).reshape(STEPS, 8, 250) - (MEMBERS - 1) / 2
    for one, other in ((x[..., 1:], x[..., :-1]), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        assert stats.pearsonr(one.ravel(), other.ravel()).pvalue > SURE
    assert stats.pearsonr(x[1:].ravel(), (x[1:] + 0.1 * x[:-1]).ravel()).pvalue < SURE  # the control


def outputs(z: Tensor, bank: Tensor, own: Tensor, sample: Tensor) -> list[Tensor]:
    """Everything that is computed query by query."""
    labels = (torch.arange(len(bank)) % 50)[None]
    company = {"own": own, "labels": labels, "exclude_mates": True}
    draws = {"seed": 2, "step": 9, "sample_index": sample, **company}
    index = ops.region_sample(z, bank, 20, 600, 33, **draws)  # type: ignore[arg-type]
    distinct = ops.region_sample(z, bank, 20, 600, 33, replacement=False, **draws)  # type: ignore[arg-type]
    return [
        index,
        distinct,
        *ops.neighbors(z, bank, 77),
        ops.region_thresholds(z, bank, 20, 600),
        ops.region_size(z, bank, 20, 600, **company),  # type: ignore[arg-type]
        *ops.region_logsumexp(z, bank, 20, 600, 0.1, own=own, labels=labels),
        ops.gather_nce(z, bank, index, 0.1),
        ops.gather_dot(z, bank, index),
        ops.bank_assign(z, bank),
    ]


@pytest.mark.parametrize("piece", [1, 31, 32, 100, 128, 129])
def test_the_batch_may_be_split_anywhere(piece: int) -> None:
    b = 12 if piece == 1 else 150
    z, bank, own, sample = unit(b, 24), unit(3000, 24, 1), torch.arange(b) * 19, torch.arange(b) * 2**34 + 7
    whole = outputs(z, bank, own, sample)
    pieces = zip(z.split(piece), own.split(piece), sample.split(piece), strict=True)
    parts = [outputs(queries, bank, rows, samples) for queries, rows, samples in pieces]
    for at_once, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(at_once, torch.cat(split))
    assert not torch.equal(whole[0], outputs(z, bank, own, torch.arange(b) * 2**34 + 8)[0])  # the control
