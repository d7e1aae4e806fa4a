"""Paired tests over seeds, Holm's correction, intervals. Results are rounded where they are printed, not here."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mirepro import rng


def mean(values: Sequence[float]) -> float:
    """Exactly rounded mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def one_sided(differences: Sequence[float], margin: float = 0.0) -> float:
    """p of the paired t test against "the mean difference is at most -margin".

    Args:
        differences: One difference per seed, at least two.
        margin: Non-inferiority margin in the unit of the differences; 0 asks for a strict advantage.
    """
    from scipy.special import stdtr  # scipy.stats takes seconds to import

    spread, centre = deviation(differences), mean(differences) + margin
    if spread is None:
        raise ValueError("a t test needs at least two differences")
    if spread == 0:
        return 0.0 if centre > 0 else 1.0
    count = len(differences)
    return float(stdtr(count - 1, -centre / (spread / math.sqrt(count))))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """t interval of the mean; None for fewer than two values."""
    from scipy.special import stdtrit

    spread = deviation(values)
    if spread is None:
        return None
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    adjusted, running = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = running
    return adjusted


def bootstrap(
    better: NDArray[np.bool_], worse: NDArray[np.bool_], draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval, in %, of the accuracy difference over resampled test images.

    The same images are drawn for both rows and all seeds; sums are integers, so every machine gets the same bits.

    Args:
        better: `(S, N)` correct answers of one row's seeds.
        worse: `(S, N)` of the other row, seeds in the same order.
    """
    seeds, count = better.shape
    difference = better.sum(0, dtype=np.int64) - worse.sum(0, dtype=np.int64)
    sums = np.sort(np.concatenate([difference[index].sum(1) for index in _drawn(count, draws)]))
    tail = round((1 - level) / 2 * draws)
    scale = 100.0 / (seeds * count)
    return float(sums[tail]) * scale, float(sums[draws - 1 - tail]) * scale


@lru_cache(1)
def _drawn(count: int, draws: int) -> list[NDArray[np.int64]]:
    """Images of each draw, `(200, count)` at a time; all pairs of rows are compared on the same ones."""
    parts = np.split(np.arange(draws), range(200, draws, 200))
    return [rng.mulhi(rng.words(0, rng.Stream.BOOTSTRAP, 0, part, count), count) for part in parts]
