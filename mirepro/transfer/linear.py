"""Linear evaluation: L2-regularised softmax regression to convergence, its strength chosen on val."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro.params import LinearParams


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of the training features `(F,)`; constant features map to 0."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> "Standardiser":
        """From training features `(N, F)`."""
        return cls.of(x.double().mean(0), x.double().std(0, unbiased=False))

    @classmethod
    def of(cls, mean: Tensor, deviation: Tensor) -> "Standardiser":
        """From mean and deviation `(F,)` float64."""
        scale = torch.where(deviation > 1e-8, 1 / deviation, torch.zeros_like(deviation))
        return cls(mean.float(), scale.float())

    def __call__(self, x: Tensor) -> Tensor:
        """`(B, F)` -> `(B, F)`."""
        return (x - self.mean) * self.scale


@dataclass(frozen=True)
class Classifier:
    """Weights `(F, C)` and bias `(C,)` on standardised features."""

    standardise: Standardiser
    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """`(B, F)` -> `(B,)` int64 classes."""
        return (self.standardise(x) @ self.weight + self.bias).argmax(1)


@dataclass(frozen=True)
class Basis:
    """Principal axes of standardised features: a rotation, which leaves L2 as it is, reduced to their rank.

    Attributes:
        x: `(N, R + 1)` float32 training features in the axes, with a column of ones.
        axes: `(F, R)` float32 orthonormal columns.
        variance: `(R + 1,)` float64 mean squares of the columns of `x`.
    """

    x: NDArray[np.float32]
    axes: NDArray[np.float32]
    variance: NDArray[np.float64]

    @classmethod
    def fit(cls, x: NDArray[np.float32]) -> "Basis":
        """From standardised features `(N, F)`; axes without variance are left out, where the optimum is 0."""
        n, features = x.shape
        if features <= n:
            exact = x.astype(np.float64)
            variance, axes = np.linalg.eigh(exact.T @ exact / n)
        else:
            _, singular, rows = np.linalg.svd(x.astype(np.float64), full_matrices=False)
            variance, axes = singular**2 / n, rows.T
        kept = variance > max(n, features) * np.finfo(np.float64).eps * variance.max()
        rotation = np.ascontiguousarray(axes[:, kept], np.float32)
        columns = np.concatenate([x @ rotation, np.ones((n, 1), np.float32)], 1)
        return cls(columns, rotation, np.append(variance[kept], 1.0))

    def weights(self, theta: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`(R + 1, C)` in the axes -> weights `(F, C)` and bias `(C,)` on standardised features."""
        return self.axes @ theta[:-1].astype(np.float32), theta[-1].astype(np.float32)


ROWS = 1 << 16
"""Rows of features that are scored at a time."""


def minimise(
    basis: Basis, classes: NDArray[np.int64], l2: float, start: NDArray[np.float64], params: LinearParams
) -> NDArray[np.float64]:
    """Minimises mean cross-entropy + l2 / (2 F) |W|^2 by L-BFGS from `start` `(R + 1, C)`; the bias is not shrunk.

    Each axis is measured in units of its curvature at equal probabilities, variance / C + l2 / F (Boehning 1992), so
    that few iterations suffice. The products are NumPy's: its OpenBLAS keeps AVX2 in the portable tier, torch's MKL
    does not.
    """
    from scipy import optimize

    n, n_classes = len(classes), start.shape[1]
    shrink = np.full((len(start), 1), l2 / len(basis.axes))
    shrink[-1] = 0
    unit = 1 / np.sqrt(basis.variance[:, None] / n_classes + shrink)
    parts = [slice(begin, begin + ROWS) for begin in range(0, n, ROWS)]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = unit * flat.reshape(start.shape)
        found = [_cross_entropy(basis.x[part], classes[part], theta.astype(np.float32)) for part in parts]
        loss = sum(value for value, _ in found) / n
        gradient = reduce(np.add, (value for _, value in found)) / n + shrink * theta
        return float(loss + (shrink * theta * theta).sum() / 2), (unit * gradient).ravel()

    options = {"maxiter": params.iterations, "gtol": params.tolerance, "ftol": 0.0, "maxcor": 10}
    found = optimize.minimize(objective, (start / unit).ravel(), jac=True, method="L-BFGS-B", options=options)
    return unit * found.x.reshape(start.shape)


def _cross_entropy(
    x: NDArray[np.float32], classes: NDArray[np.int64], theta: NDArray[np.float32]
) -> tuple[float, NDArray[np.float32]]:
    """Summed over rows `(n, R)`, and its gradient by theta `(R, C)`."""
    onehot = np.eye(theta.shape[1], dtype=np.float32)[classes]
    logits = x @ theta
    logits -= logits.max(1, keepdims=True)
    p = np.exp(logits)
    total = p.sum(1, keepdims=True)
    loss = np.log(total).sum(dtype=np.float64) - (logits * onehot).sum(dtype=np.float64)
    p /= total
    p -= onehot
    return float(loss), x.T @ p


def fit(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], n_classes: int, params: LinearParams
) -> tuple[Classifier, dict[str, float], float]:
    """Chooses L2 on val, from strong to weak.

    Each solution's start is the last one moved on by as much as that moved: the path is smooth in log L2, and such a
    start takes a quarter less iterations than the last solution itself.

    Args:
        train: Features `(N, F)` float32 and classes `(N,)` int64.
        val: The same of the validation split.
        n_classes: Number of classes.
        params: L2 values (relative to 1 / F), iterations, tolerance.

    Returns:
        The chosen classifier, val top-1 (percent) of each L2, the chosen L2; ties go to the stronger one.
    """
    standardise = Standardiser.fit(train[0])
    basis, x_val = Basis.fit(standardise(train[0]).numpy()), standardise(val[0]).numpy()
    classes = train[1].numpy()
    theta = previous = np.zeros((len(basis.variance), n_classes))
    grid: dict[str, float] = {}
    best: tuple[float, float, Classifier] | None = None
    for l2 in sorted(params.l2, reverse=True):
        previous, theta = theta, minimise(basis, classes, l2, 2 * theta - previous, params)
        weight, bias = basis.weights(theta)
        accuracy = top1(torch.from_numpy((x_val @ weight + bias).argmax(1)), val[1])
        grid[repr(l2)] = accuracy
        if best is None or accuracy > best[0]:
            best = accuracy, l2, Classifier(standardise, torch.from_numpy(weight), torch.from_numpy(bias))
    assert best is not None
    return best[2], grid, best[1]


def top1(predicted: Tensor, classes: Tensor) -> float:
    """Percent correct."""
    return 100 * float((predicted == classes).double().mean())


def answers(predicted: Mapping[str, Tensor], classes: Tensor) -> dict[str, Any]:
    """Which images each prediction `(N,)` got right, as hex of packed bits, and their number `n`."""
    bits = {name: np.packbits((value == classes).numpy()).tobytes().hex() for name, value in predicted.items()}
    return {**bits, "n": len(classes)}
