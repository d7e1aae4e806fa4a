"""Linear evaluation: L2-regularised softmax regression to convergence, and the author protocol's SGD."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirepro import rng
from mirepro.params import LinearParams


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of the training features `(F,)`; constant features map to 0."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> "Standardiser":
        """From training features `(N, F)`."""
        deviation = x.double().std(0, unbiased=False)
        scale = torch.where(deviation > 1e-8, 1 / deviation, torch.zeros_like(deviation))
        return cls(x.double().mean(0).float(), scale.float())

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


def _fit(x: Tensor, onehot: Tensor, l2: float, start: Tensor, params: LinearParams) -> Tensor:
    """Minimises mean cross-entropy + l2 / (2 F) |W|^2 by L-BFGS from `start` `(F + 1, C)`; the bias is not shrunk."""
    n, features = x.shape
    theta = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [theta],
        max_iter=params.iterations,
        tolerance_grad=params.tolerance,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            logits = torch.addmm(theta[-1], x, theta[:-1])
            log_p = torch.log_softmax(logits, 1)
            residual = (log_p.exp() - onehot) / n
            gradient = torch.empty_like(theta)
            torch.mm(x.T, residual, out=gradient[:-1])
            gradient[:-1] += l2 / features * theta[:-1]
            gradient[-1] = residual.sum(0)
            theta.grad = gradient
            return -(log_p * onehot).sum() / n + l2 / (2 * features) * theta[:-1].square().sum()

    solver.step(closure)  # type: ignore[arg-type]
    return theta.detach()


def fit(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], n_classes: int, params: LinearParams
) -> tuple[Classifier, dict[str, float], float]:
    """Chooses L2 on val, from strong to weak with warm starts.

    Args:
        train: Features `(N, F)` float32 and classes `(N,)` int64.
        val: The same of the validation split.
        n_classes: Number of classes.
        params: L2 values (relative to 1 / F), iterations, tolerance.

    Returns:
        The chosen classifier, val top-1 (percent) of each L2, the chosen L2; ties go to the stronger one.
    """
    standardise = Standardiser.fit(train[0])
    x, x_val = standardise(train[0]), standardise(val[0])
    onehot = nn.functional.one_hot(train[1], n_classes).float()
    theta = torch.zeros(x.shape[1] + 1, n_classes)
    grid: dict[str, float] = {}
    best: tuple[float, float, Tensor] | None = None
    for l2 in sorted(params.l2, reverse=True):
        theta = _fit(x, onehot, l2, theta, params)
        accuracy = top1((x_val @ theta[:-1] + theta[-1]).argmax(1), val[1])
        grid[repr(l2)] = accuracy
        if best is None or accuracy > best[0]:
            best = (accuracy, l2, theta)
    assert best is not None
    return Classifier(standardise, best[2][:-1], best[2][-1]), grid, best[1]


def top1(predicted: Tensor, classes: Tensor) -> float:
    """Percent correct."""
    return 100 * float((predicted == classes).double().mean())


class Author:
    """The author protocol: SGD on features of augmented training images, one epoch at a time.

    Args:
        x: Features `(N, F)` of the first epoch, which standardise all of them.
        n_classes: Number of classes.
        seed: Decides the order of the images.
        params: Learning rate, momentum, batch.
    """

    def __init__(self, x: Tensor, n_classes: int, seed: int, params: LinearParams) -> None:
        self._standardise, self._seed, self._params, self._epoch = Standardiser.fit(x), seed, params, 0
        self._theta = [torch.zeros(x.shape[1], n_classes), torch.zeros(n_classes)]
        self._velocity = [torch.zeros_like(t) for t in self._theta]

    def epoch(self, features: Tensor, classes: Tensor) -> None:
        """One pass over features `(N, F)` with classes `(N,)`."""
        order = torch.from_numpy(rng.permutation(self._seed, rng.Stream.TRANSFER, self._epoch, len(classes)))
        x, params = self._standardise(features), self._params
        onehot = nn.functional.one_hot(classes, len(self._theta[1])).float()
        for index in order.split(params.author_batch):
            residual = (torch.softmax(x[index] @ self._theta[0] + self._theta[1], 1) - onehot[index]) / len(index)
            gradients = (x[index].T @ residual, residual.sum(0))
            for t, v, gradient in zip(self._theta, self._velocity, gradients, strict=True):
                v.mul_(params.author_momentum).add_(gradient)
                t -= params.author_lr * v
        self._epoch += 1

    def classifier(self) -> Classifier:
        """The classifier so far."""
        return Classifier(self._standardise, *self._theta)
