"""The Gaussian toy (table T5): exact mutual information beside every estimator, with the optimal critic.

x and y are jointly Gaussian in d dimensions with correlation rho; MI = -d/2 log(1 - rho^2). The bank holds rows drawn
from p(y), the positive is not among them. The control variate is f_ii, whose mean is the MI (objectives' section 2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirepro import files, metrics, rng
from mirepro.errors import UserError
from mirepro.objectives.regions import ranks
from mirepro.params import ToyParams

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimator:
    """k terms from the ranks that u and l cut; `bound` says whether its form makes it one."""

    name: str
    k: int
    outer: float = 1.0
    inner: float = 0.0
    bound: bool = True


ESTIMATORS = (
    Estimator("nce_16", 16),
    Estimator("nce_256", 256),
    Estimator("nce_4096", 4096),
    Estimator("ball_.5", 256, 0.5),
    Estimator("ball_.1", 256, 0.1),
    Estimator("ball_.01", 256, 0.01),
    Estimator("ring_1-.1", 256, 1.0, 0.1, bound=False),
    Estimator("ring_.1-.01", 256, 0.1, 0.1, bound=False),
)


def information(d: int, rho: float) -> float:
    """The exact MI, nats."""
    return -d / 2 * math.log(1 - rho * rho)


def critic(d: int, rho: float, params: ToyParams, bank: int) -> tuple[Array, Array]:
    """Optimal f for one bank: positives `(A,)`, and `(A, N)` bank scores sorted in descending order.

    f(x, y) = log p(y | x) - log p(y).
    """
    draws = rng.normal(params.seed, rng.Stream.TOY, 2 * bank, np.arange(params.anchors), 2 * d)
    x = draws[:, :d]
    y = rho * x + math.sqrt(1 - rho * rho) * draws[:, d:]
    rows = rng.normal(params.seed, rng.Stream.TOY, 2 * bank + 1, np.arange(params.rows), d)
    spread, constant = 2 * (1 - rho * rho), -d / 2 * math.log(1 - rho * rho)
    positive = constant - ((y - rho * x) ** 2).sum(1) / spread + (y**2).sum(1) / 2
    squares = (rows**2).sum(1)
    distance = squares - 2 * rho * (x @ rows.T) + (rho * rho * (x**2).sum(1))[:, None]
    scores = constant - distance / spread + squares / 2
    return positive, -np.sort(-scores, axis=1)


def sampled(
    positive: Array, scores: Array, kind: Estimator, seed: int, step: int, *, with_positive: bool = True
) -> Array:
    """`(A,)` estimates log k - CE from k - 1 draws of the region; without the positive it is no bound (the control)."""
    low, high = ranks(kind.outer, kind.inner, scores.shape[1])
    words = rng.words(seed, rng.Stream.NEGATIVE, step, np.arange(len(positive)), kind.k - 1)
    negatives = np.take_along_axis(scores, low + rng.mulhi(words, high - low), 1)
    top = np.maximum(positive, negatives.max(1))
    partition = np.exp(negatives - top[:, None]).sum(1) + (np.exp(positive - top) if with_positive else 0)
    return math.log(kind.k if with_positive else kind.k - 1) + positive - top - np.log(partition)


def certificate(positive: Array, scores: Array) -> float:
    """log(N + 1) - CE over the positive and all N rows, nats: the bound the estimate must stay below."""
    top = np.maximum(positive, scores[:, 0])
    partition = np.exp(scores - top[:, None]).sum(1) + np.exp(positive - top)
    return float((math.log(scores.shape[1] + 1) + positive - top - np.log(partition)).mean())


def check(params: ToyParams) -> None:
    """Refuses impossible settings with UserError."""
    for key, least in (("banks", 1), ("rows", 200), ("anchors", 2), ("redraws", 2)):
        if getattr(params, key) < least:
            raise UserError(f"toy.{key}: {getattr(params, key)} is impossible; use {least} or more")
    for d, rho in params.cases:
        if d < 1 or not 0 <= rho < 1:
            raise UserError(f"toy.cases: ({d}, {rho}) is impossible; use d >= 1 and a correlation in [0, 1)")


def toy(params: ToyParams, out: Path) -> dict[str, Any]:
    """All cases and estimators; the metrics document of table T5.

    `out/banks.json` gets what its means and standard errors are taken over: each bank's estimate and certificate, nats.
    """
    check(params)
    cases = [case for d, rho in params.cases for case in _case(d, rho, params)]
    banks = [{key: case[key] for key in ("d", "rho", "name")} | case.pop("by_bank") for case in cases]
    files.write_json(out / "banks.json", banks)
    protocol = f"{params.banks} banks of {params.rows} rows, {params.anchors} anchors, control variate f_ii"
    cells = {f"d{c['d']}.{c['name']}": metrics.cell(c["value"], "nats", protocol) for c in cases}
    return metrics.document("toy", "toy", "toy", params.seed, cells, {"cases": cases})


def _case(d: int, rho: float, params: ToyParams) -> Iterator[dict[str, Any]]:
    mi = information(d, rho)
    values: dict[str, list[float]] = {e.name: [] for e in ESTIMATORS}
    raw: dict[str, list[Array]] = {e.name: [] for e in ESTIMATORS}
    limits, spread = [], {}
    for bank in range(params.banks):
        positive, scores = critic(d, rho, params, bank)
        limits.append(certificate(positive, scores))
        for kind in ESTIMATORS:
            estimate = sampled(positive, scores, kind, params.seed, bank)
            values[kind.name].append(float((estimate - positive).mean()) + mi)
            raw[kind.name].append(estimate)
            if bank == 0:
                again = [sampled(positive, scores, kind, params.seed, 1000 + r) for r in range(params.redraws)]
                spread[kind.name] = float(np.std(again, axis=0, ddof=1).mean())
    for kind in ESTIMATORS:
        row, pooled = np.array(values[kind.name]), np.concatenate(raw[kind.name])
        error = float(pooled.std(ddof=1)) / math.sqrt(len(pooled))
        yield {
            "d": d,
            "rho": rho,
            "banks": params.banks,
            "mi": mi,
            "name": kind.name,
            "value": float(row.mean()),
            "se": float(row.std(ddof=1) / math.sqrt(len(row))) if len(row) > 1 else None,
            "bias": float(row.mean()) - mi,
            "sd": spread[kind.name],
            "bound": kind.bound,
            "certified": bool(pooled.mean() + 3 * error <= np.mean(limits)),
            "by_bank": {"values": values[kind.name], "certificates": limits},
        }
