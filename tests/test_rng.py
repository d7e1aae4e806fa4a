"""Philox against its published vectors; distributions against scipy, each with a control that fails."""

import numpy as np
import pytest
from scipy import stats

from mirepro import rng

VECTORS = [  # Random123's kat_vectors for philox4x32, 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_matches_its_published_vectors(counter, key, expected):
    assert tuple(rng.philox(np.array(counter, np.uint32), key)) == expected


def test_a_draw_depends_only_on_its_own_coordinates():
    together = rng.words(3, rng.Stream.VIEW, 5, np.arange(10), 7)
    alone = rng.words(3, rng.Stream.VIEW, 5, [4], 5)
    assert np.array_equal(together[4, :5], alone[0])
    assert not np.array_equal(alone, rng.words(4, rng.Stream.VIEW, 5, [4], 5))
    assert not np.array_equal(alone, rng.words(3, rng.Stream.ORDER, 5, [4], 5))
    assert not np.array_equal(alone, rng.words(3, rng.Stream.VIEW, 5, [4 + 2**32], 5))


def test_logarithm_and_quantiles_against_scipy():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 1000), np.linspace(0.5, 2, 999)])
    assert np.allclose(rng.log(x), np.log(x), rtol=2e-15, atol=2e-16)
    p = np.concatenate([np.geomspace(1e-12, 0.5, 500), np.linspace(0.01, 1 - 1e-9, 500)])
    assert np.allclose(rng.inverse_normal(p), stats.norm.ppf(p), rtol=1e-12, atol=1e-14)


def test_draws_follow_their_distributions():
    normal = rng.normal(0, rng.Stream.TOY, 0, np.arange(500), 20).ravel()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(normal + 0.1, "norm").pvalue < 1e-3
    uniform = rng.uniform(0, rng.Stream.TOY, 1, np.arange(500), 20).ravel()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_permutation_is_a_permutation_and_changes_with_the_epoch():
    first = rng.permutation(0, rng.Stream.ORDER, 0, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, rng.permutation(0, rng.Stream.ORDER, 1, 1000))


def test_no_samples_no_draws():
    assert rng.words(3, rng.Stream.VIEW, 5, [], 7).shape == (0, 7)
    assert rng.uniform(3, rng.Stream.VIEW, 5, [], 0).shape == (0, 0)
