"""The only source of randomness: Philox4x32-10, a pure function of (seed, stream, step, sample, draw).

Nothing here keeps a state, so worker count, batch split, rank count and resume point cannot change a draw. The
arithmetic uses integers, + - * / and sqrt only, so that every CPU gives the same bits.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)


class Stream(IntEnum):
    """What a draw is for: the second word of the Philox key."""

    VIEW = 1
    NEGATIVE = 2
    ORDER = 3
    WEIGHT = 4
    BANK = 5
    DATA = 6
    KMEANS = 7
    TOY = 8
    TRANSFER = 9
    BOOTSTRAP = 10


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 of each counter.

    Args:
        counter: `(..., 4)` uint32 counters.
        key: Two 32-bit words.

    Returns:
        `(..., 4)` uint32 random words.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(_MULTIPLIERS[0]) * c0
        p1 = np.uint64(_MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(seed: int, stream: int, step: int, sample: ArrayLike, n: int) -> NDArray[np.uint32]:
    """The first n random words of each sample.

    The key is (seed, stream), the counter (block, sample low, sample high, step); draw t is word t % 4 of block t // 4.

    Args:
        seed: 32-bit seed of the run.
        stream: What the draw is for.
        step: Step or epoch, 32 bits.
        sample: `(B,)` sample indices, 64 bits.
        n: Words per sample.

    Returns:
        `(B, n)` uint32.
    """
    samples = np.atleast_1d(np.asarray(sample)).astype(np.uint64)
    blocks = (n + 3) // 4
    counter = np.empty((len(samples), blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = (samples & _MASK)[:, None]
    counter[..., 2] = (samples >> np.uint64(32))[:, None]
    counter[..., 3] = step
    return philox(counter, (seed & 0xFFFFFFFF, int(stream))).reshape(len(samples), 4 * blocks)[:, :n]


def mulhi(word: NDArray[np.uint32], size: ArrayLike) -> NDArray[np.int64]:
    """Maps words to integers in [0, size): the high half of word * size (size < 2^32)."""
    product = word.astype(np.uint64) * np.asarray(size).astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


def uniform(seed: int, stream: int, step: int, sample: ArrayLike, n: int) -> NDArray[np.float32]:
    """`(B, n)` float32 in [0, 1), multiples of 2^-24."""
    return (words(seed, stream, step, sample, n) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(seed: int, stream: int, step: int, sample: ArrayLike, n: int) -> NDArray[np.float64]:
    """`(B, n)` float64 standard normal draws by inversion of the distribution function."""
    return inverse_normal((words(seed, stream, step, sample, n).astype(np.float64) + 0.5) * 2.0**-32)


def permutation(seed: int, stream: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A permutation of range(n): indices ordered by 64-bit priorities, ties by index."""
    pair = words(seed, stream, epoch, np.arange(n), 2).astype(np.uint64)
    return np.argsort((pair[:, 0] << np.uint64(32)) | pair[:, 1], kind="stable")


def log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm from + - * / alone (libm and NumPy choose variants by CPU); relative error below 1e-15."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < np.sqrt(0.5)
    mantissa, exponent = np.where(low, 2 * mantissa, mantissa), exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    total, square = np.zeros_like(s), s * s
    for odd in range(23, 0, -2):
        total = total * square + 1.0 / odd
    return exponent * 0.6931471805599453 + 2 * s * total


_A = (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
      13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608)  # fmt: skip
_B = (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
      5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0)  # fmt: skip
_C = (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
      3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734)  # fmt: skip
_D = (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
      0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0)  # fmt: skip
_E = (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
      0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772)  # fmt: skip
_F = (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
      0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0)  # fmt: skip


def _ratio(x: NDArray[np.float64], over: tuple[float, ...], under: tuple[float, ...]) -> NDArray[np.float64]:
    top, bottom = np.full_like(x, over[0]), np.full_like(x, under[0])
    for a, b in zip(over[1:], under[1:], strict=True):
        top, bottom = top * x + a, bottom * x + b
    return top / bottom


def inverse_normal(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles of the standard normal distribution (Wichura 1988, algorithm AS 241, PPND16)."""
    q = p - 0.5
    central = q * _ratio(0.180625 - q * q, _A, _B)
    r = np.sqrt(-log(np.where(q < 0, p, 1 - p)))
    tail = np.where(r <= 5, _ratio(r - 1.6, _C, _D), _ratio(r - 5, _E, _F))
    return np.where(np.abs(q) <= 0.425, central, np.where(q < 0, -tail, tail))
