"""What the tests of objectives share: random banks and batches, objectives that are ready, their terms."""

import math

import numpy as np
import torch

from mirepro import encoders, objectives, rng
from mirepro.bank import MemoryBank
from mirepro.objectives.base import Step
from mirepro.params import EncoderParams

N, D, B = 200, 16, 12
CONTRASTIVE = [name for name in objectives.names() if name not in ("supervised", "random")]
PAIRED = [name for name in CONTRASTIVE if objectives.load(name).companions]  # two views; tests/test_pairs.py
SAMPLED = [name for name in CONTRASTIVE if name not in ("la", *PAIRED)]


def unit(seed: int, n: int, d: int = D) -> torch.Tensor:
    x = rng.normal(seed, rng.Stream.TOY, 0, np.arange(n), d)
    return torch.from_numpy((x / np.sqrt((x * x).sum(1, keepdims=True))).astype(np.float32))


def setting(modalities=("rgb",), companions=(), n: int = N, d: int = D, seed: int = 0):
    banks = {m: MemoryBank(n, d, seed=seed, modality=i) for i, m in enumerate(modalities)}
    z = {m: unit(seed + 100 + i, B, d) for i, m in enumerate((*modalities, *companions))}
    index = torch.from_numpy(rng.permutation(seed, rng.Stream.ORDER, 0, n)[:B].copy())
    return z, banks, index


def ready(name: str, banks, **options):
    objective = objectives.create(name, {"k": 17} | options)
    objective.check(next(iter(banks.values())).size, next(iter(banks.values())).rows.shape[1])
    objective.initialise(encoders.Ensemble(EncoderParams(width=4, dim=D), objective.modalities), 0)
    objective.refresh(banks, 0, 0)
    return objective


def terms(objective, z, banks, index, step=None):
    step = step or Step(0, 3, 10, 1, 2)
    return [objective.terms(q) for q in objective.queries(z, banks, index, step)]


def enumerated(objective, q):
    """log((e^{f_ii} + (k - 1) mean_region e^f) / k) - f_ii, of the bank's own sums over the objective's region."""
    low, high = objective.region(q.size, q.step)
    region, _ = q.bank.region_logsumexp(q.z, low, high, objective.tau)
    own = q.bank.gather_dot(q.z, q.index[:, None])[:, 0] / objective.tau
    return torch.logaddexp(own, region - math.log(high - low) + math.log(objective.k - 1)) - math.log(objective.k) - own


def la(banks, labels, **options):
    objective = ready("la", banks, **options)
    objective.labels = {"rgb": labels}
    return objective


def late() -> Step:
    return Step(0, 9, 10, 1, 2)
