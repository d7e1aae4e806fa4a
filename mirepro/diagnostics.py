"""What numbers may claim: certificate, T3 share, fallbacks, copies and false negatives; final MI; signs of collapse."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mirepro import ops
from mirepro.banks import Bank
from mirepro.objectives.base import Objective, Query, Step
from mirepro.objectives.ir import Ir

CHUNK = 256  # anchors at a time, so that memory does not grow with the square of the bank


@torch.no_grad()
def epoch(
    objective: Objective,
    z: Mapping[str, Tensor],
    banks: Mapping[str, Bank],
    index: Tensor,
    step: Step,
    classes: Tensor,
) -> dict[str, float]:
    """Diagnostics of one batch, averaged over the directions.

    Args:
        objective: Whose negatives.
        z: Embeddings `(B, D)` per modality.
        banks: As they stood when the loss was taken.
        index: `(B,)` own rows.
        step: The batch's step.
        classes: `(N,)` class of each bank row, -1 where it has none; read for diagnostics only.
    """
    rows = [_query(objective, q, classes) for q in objective.queries(z, banks, index, step)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _query(objective: Objective, q: Query, classes: Tensor) -> dict[str, float]:
    terms = objective.terms(q)
    everything, _ = q.bank.region_logsumexp(q.z, 0, q.size, objective.tau)
    values = {}
    if terms.estimate is not None:
        values["certified_share"] = _certified(objective, q, terms.estimate, everything)
    low, high = objective.region(q.size, q.step)
    lowest = q.bank.region_thresholds(q.z, low, high)[:, 1] / objective.tau
    values["t3_share"] = float((lowest >= everything - math.log(q.size)).double().mean())
    fallbacks = getattr(objective, "fallbacks", None)
    values["fallback_share"] = fallbacks(q) if fallbacks else 0.0
    if terms.negatives is not None:
        values["own_copies"] = float((terms.negatives == q.index[:, None]).double().sum(1).mean())
        if int(classes[q.index].min()) >= 0:
            same = classes[terms.negatives] == classes[q.index][:, None]
            values["same_class_share"] = float(same.double().mean())
    return values


def _certified(objective: Objective, q: Query, estimate: Tensor, everything: Tensor) -> float:
    """1 where mean estimate + 3 standard errors <= log N - CE_full (Barber-Agakov, exact for the finite bank)."""
    positive = q.bank.gather_dot(q.z, q.index[:, None])[:, 0] / objective.tau
    bound = math.log(q.size) - float((everything - positive).double().mean())
    estimate = estimate.double()
    error = float(estimate.std()) / math.sqrt(len(estimate)) if len(estimate) > 1 else math.inf
    return float(float(estimate.mean()) + 3 * error <= bound)


@torch.no_grad()
def nce(objective: Objective, z: Mapping[str, Tensor], banks: Mapping[str, Bank], step: Step) -> float:
    """The unrestricted `ir` estimate of the final f against the final bank, nats: objectives compared at equal f.

    Args:
        objective: Gives k, tau and the directions.
        z: Embeddings `(N, D)` per modality of fresh views of all training images, in bank order.
        banks: Final banks.
        step: A step no training batch has used.
    """
    plain = Ir(k=objective.k, tau=objective.tau)
    index = torch.arange(len(next(iter(z.values()))), device=next(iter(z.values())).device)
    sums = 0.0
    for q in objective.queries(z, banks, index, step):
        pieces = [replace(q, z=q.z[rows], index=rows) for rows in index.split(CHUNK)]
        estimates = [estimate for piece in pieces if (estimate := plain.terms(piece).estimate) is not None]
        sums += float(torch.cat(estimates).double().mean())
    return sums / len(objective.pairs())


@torch.no_grad()
def held_out(objective: Objective, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """I(view; view') from below, nats: two fresh views of validation images, all others as distinct negatives.

    Args:
        objective: Gives tau and the directions.
        first: Embeddings `(N_val, D)` per modality of one view.
        second: The same of another view.
    """
    estimates = []
    for anchor, other in objective.pairs():
        n = len(first[anchor])
        index = torch.arange(n, device=first[anchor].device)[:, None]
        everything, _ = ops.region_logsumexp(first[anchor], second[other], 0, n, objective.tau)
        positive = ops.gather_dot(first[anchor], second[other], index)[:, 0] / objective.tau
        estimates.append(math.log(n) - float((everything - positive).double().mean()))
    return sum(estimates) / len(estimates)


@torch.no_grad()
def collapse(objective: Objective, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Whether embeddings fall together: effective rank, alignment and uniformity, averaged over the directions.

    Args:
        objective: Gives the directions.
        first: Embeddings `(N_val, D)` per modality of one view.
        second: The same of another view.

    Returns:
        `covariance_rank`: exp of the entropy of the covariance's eigenvalues, 1 to D (Roy and Vetterli 2007).
        `alignment`: mean |z - z'|^2 of an image's two views, 0 to 4. `uniformity`: log of the mean e^{-2 |z - w|^2}
        over pairs of different images, nats, at most 0 (Wang and Isola 2020).
    """
    rows = []
    for anchor, other in objective.pairs():
        z, index = first[anchor], torch.arange(len(first[anchor]), device=first[anchor].device)[:, None]
        same = ops.gather_dot(z, second[other], index)[:, 0].double()
        rows.append((_effective_rank(z), float((2 - 2 * same).mean()), _uniformity(z, index)))
    means = (sum(values) / len(rows) for values in zip(*rows, strict=True))
    return dict(zip(("covariance_rank", "alignment", "uniformity"), means, strict=True))


def _effective_rank(z: Tensor) -> float:
    """NumPy's product and eigenvalues: its OpenBLAS keeps AVX2 in the portable tier."""
    rows = z.cpu().numpy().astype(np.float64)
    rows -= rows.mean(0)
    share = np.linalg.eigvalsh(rows.T @ rows).clip(0)
    share = share[share > 0] / share.sum() if share.any() else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))


def _uniformity(z: Tensor, index: Tensor) -> float:
    """Since |z - w|^2 = 2 - 2 z.w, it is a log-sum-exp of scores at temperature 1/4, less each row's own."""
    n = len(z)
    if n < 2:
        return math.nan
    everything, _ = ops.region_logsumexp(z, z, 0, n, 0.25)
    own = 4 * ops.gather_dot(z, z, index)[:, 0].double()
    others = float((everything.double().exp() - own.exp()).sum()) / (n * (n - 1))
    return math.log(others) - 4
