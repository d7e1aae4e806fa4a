"""The order of detection training: unchanged without repeats; repeat-factor sampling by its definition."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirepro import rng
from mirepro.transfer import sampling

BATCH = 4
labels_of = st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=30)


def arrays(labels: list[list[int]]) -> list[np.ndarray]:
    return [np.array(own, np.int64) for own in labels]


def rare(n: int = 200) -> list[np.ndarray]:
    """Category 0 in every image, 1 in every tenth, 2 in one."""
    return arrays([[0] + [1] * (2 * (i % 10 == 0)) + [2] * (i == 7) for i in range(n)])


def drawn(factors: np.ndarray, epochs: int, seed: int = 0) -> list[tuple[int, list[int], list[bool]]]:
    found = sampling.batches(factors, BATCH, epochs, 0.5, seed)
    return [(step, index.tolist(), mirrored.tolist()) for step, index, mirrored in found]


@settings(max_examples=100, deadline=None)
@given(labels_of, st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]))
def test_factors_are_those_of_the_definition(labels: list[list[int]], threshold: float) -> None:
    found = sampling.repeat_factors(arrays(labels), threshold)
    for own, factor in zip(labels, found, strict=True):
        expected = 1.0
        for category in own:
            share = sum(category in other for other in labels) / len(labels)
            expected = max(expected, math.sqrt(threshold / share))
        assert factor == pytest.approx(expected, rel=1e-14)


def test_objects_count_once_an_image() -> None:
    """Category 1 is in 20 of 200 images, twice in each: with t = .4 its factor is 2, not sqrt(2)."""
    factors = sampling.repeat_factors(rare(), 0.4)
    assert (factors[0], factors[1], factors[7]) == (2.0, 1.0, pytest.approx(math.sqrt(0.4 * 200)))


def test_counts_are_the_factors_on_average() -> None:
    factors = sampling.repeat_factors(rare(), 0.25)  # 1, 1.58 and 7.07
    epochs = 400
    counts = np.stack([np.bincount(sampling.places(factors, 3, epoch), minlength=200) for epoch in range(epochs)])
    assert (np.abs(counts - factors) < 1).all(), "every epoch has the factor, rounded down or up"
    error = math.sqrt(0.25 / epochs)  # the largest standard error of a mean of ones and zeros
    assert (np.abs(counts.mean(0) - factors) < 5 * error).all()
    assert (counts[:, 1] == 1).all()
    fixed = np.stack([np.bincount(sampling.places(np.floor(factors), 3, e), minlength=200) for e in range(epochs)])
    assert np.abs(fixed.mean(0) - factors).max() > 5 * error, "control: rounding down always is seen"


def test_rounding_is_drawn_anew_each_epoch_image_and_seed() -> None:
    half = np.full(400, 1.5)
    draws = [np.bincount(sampling.places(half, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(draws):
        assert 150 < (one == 2).sum() < 250
        assert all(100 < (one != other).sum() < 300 for other in draws[:i])
    assert (draws[0] == np.bincount(sampling.places(half, 0, 0))).all()


def test_every_epoch_holds_its_images_as_often_as_drawn() -> None:
    factors = sampling.repeat_factors(rare(), 0.25)
    found, start = drawn(factors, 3), 0
    assert [step for step, _, _ in found] == list(range(sampling.steps(factors, BATCH, 3, 0)))
    for epoch in range(3):
        expected = Counter(sampling.places(factors, 0, epoch).tolist())
        count = expected.total() // BATCH
        shown = Counter(image for _, index, _ in found[start : start + count] for image in index)
        assert shown <= expected
        assert (expected - shown).total() == expected.total() % BATCH
        start += count
    assert start == len(found) > 3 * (200 // BATCH)
    assert {len(index) for _, index, _ in found} == {BATCH}


def test_repeats_of_an_image_are_mirrored_one_by_one() -> None:
    pairs = [pair for _, index, mirrored in drawn(np.full(40, 8.0), 1) for pair in zip(index, mirrored, strict=True)]
    sides = [side for image, side in pairs if image == 5]
    assert len(sides) == 8
    assert 0 < sum(sides) < 8


def test_the_order_is_a_function_of_the_seed() -> None:
    factors = sampling.repeat_factors(rare(), 0.25)
    assert drawn(factors, 2) == drawn(factors, 2) == drawn(factors, 3)[: len(drawn(factors, 2))]
    assert drawn(factors, 2) != drawn(factors, 2, seed=1)


@pytest.mark.parametrize(("n", "seed"), [(3, 0), (64, 0), (67, 5)])
def test_without_repeats_the_order_is_that_of_plain_epochs(n: int, seed: int) -> None:
    """Written down anew: a permutation of the images each epoch, mirrored by the image's own draw."""
    expected, per_epoch = [], max(1, n // BATCH)
    for epoch in range(3):
        order = rng.permutation(seed, rng.Stream.TRANSFER, epoch, n)
        for i in range(per_epoch):
            index = order[i * BATCH : (i + 1) * BATCH]
            mirrored = rng.uniform(seed, rng.Stream.TRANSFER, epoch, index, 3)[:, 2] < 0.5
            expected.append((epoch * per_epoch + i, index.tolist(), mirrored.tolist()))
    labels = arrays([[0, i % 7] for i in range(n)])
    off = sampling.repeat_factors(labels, 0.0)
    assert (off == 1).all()
    assert drawn(off, 3, seed) == expected
    assert sampling.steps(off, BATCH, 3, seed) == 3 * per_epoch
    if n > 7:  # control: a threshold above the shares changes the order
        assert drawn(sampling.repeat_factors(labels, 1.0), 3, seed) != expected
