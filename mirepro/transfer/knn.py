"""Weighted k-nearest-neighbour classification, many k at once (Wu et al. 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mirepro import ops


def predict(
    z: Tensor, bank: Tensor, classes: Tensor, *, k_nn: Sequence[int], tau: float, n_classes: int
) -> dict[int, Tensor]:
    """Votes of the nearest rows with weights e^{s / tau}.

    Args:
        z: `(B, D)` unit queries.
        bank: `(N, D)` unit rows.
        classes: `(N,)` int64 class of each row.
        k_nn: Numbers of neighbours; those above N are cut to N.
        tau: Temperature of the weights.
        n_classes: Number of classes.

    Returns:
        `(B,)` int64 predictions for each k; ties go to the lower class.
    """
    most = min(max(k_nn), len(bank))
    scores, index = ops.neighbors(z.contiguous(), bank.contiguous(), most)
    weights = torch.exp((scores - scores[:, :1]).double() / tau)
    votes = torch.zeros(len(z), n_classes, dtype=torch.float64)
    predictions = {}
    for rank in range(most):
        votes[torch.arange(len(z)), classes[index[:, rank]]] += weights[:, rank]
        if rank + 1 in {min(k, most) for k in k_nn}:
            predictions[rank + 1] = votes.argmax(1)
    return {k: predictions[min(k, most)] for k in k_nn}
