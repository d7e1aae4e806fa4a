"""Paired tests over seeds, Holm's correction, intervals. Results are rounded where they are printed, not here."""

import math
from collections.abc import Sequence

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
    from scipy import stats

    spread, centre = deviation(differences), mean(differences) + margin
    if spread is None:
        raise ValueError("a t test needs at least two differences")
    if spread == 0:
        return 0.0 if centre > 0 else 1.0
    count = len(differences)
    return float(stats.t.sf(centre / (spread / math.sqrt(count)), count - 1))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """t interval of the mean; None for fewer than two values."""
    from scipy import stats

    spread = deviation(values)
    if spread is None:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
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
    sums = np.empty(draws, np.int64)
    for start in range(0, draws, 200):
        samples = np.arange(start, min(start + 200, draws))
        index = rng.mulhi(rng.words(0, rng.Stream.BOOTSTRAP, 0, samples, count), count)
        sums[samples] = difference[index].sum(1)
    sums.sort()
    tail = round((1 - level) / 2 * draws)
    scale = 100.0 / (seeds * count)
    return float(sums[tail]) * scale, float(sums[draws - 1 - tail]) * scale
