"""BALL with the close neighbours in the numerator: the other reading of CAVE (definition unverified)."""

from dataclasses import dataclass

import torch

from mirepro.objectives.base import Query, Terms
from mirepro.objectives.clusters import Clustered


@dataclass
class CaveNumerator(Clustered):
    """`log(sum_P e^f + sum_neg e^f) - log sum_P e^f` with P = {i} and C_i, negatives from the ball [unverified]."""

    def terms(self, q: Query) -> Terms:
        """See `Objective.terms`."""
        negatives = self.draw(q, self.k - 1)
        others = torch.logsumexp(q.bank.gather_dot(q.z, negatives) / self.tau, 1)
        _, mates = q.bank.region_logsumexp(q.z, 0, q.size, self.tau, own=q.index, labels=self.labels[q.modality])
        return Terms(torch.logaddexp(mates, others) - mates, None, negatives)
