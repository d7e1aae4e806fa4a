"""Contrast within the batch (Chen et al. 2020, NT-Xent): two views of each image, all other embeddings as negatives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mirepro.bank import WholeBank
from mirepro.banks import Bank
from mirepro.objectives.base import Objective, Query, Step, Terms

if TYPE_CHECKING:
    from mirepro.encoders import Ensemble


@dataclass
class Simclr(Objective):
    """`logsumexp_{j != i} f_ij - f_i,twin(i) - log(2B - 1)` over both views as anchors; gradients flow on both sides.

    Both views of a shard pass the encoder as one batch, as in the author code. The two views of a negative image are no
    independent draws, so that no bound is claimed. Nothing is drawn: `k` serves `nce_at_equal_f` alone, for which the
    memory bank is kept (m = 0).

    Not there: the projection head of two layers (this project's has one), blur, LARS.

    Attributes:
        tau: [unverified: google-research/simclr has .1 on ImageNet, .5 on CIFAR-10].
    """

    companions: ClassVar[tuple[str, ...]] = ("twin",)
    tau: float = 0.1

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(self.own_row == "keep", "own_row", "'keep': a batch has no own rows")
        self._require(self.replacement, "replacement", "true: nothing is drawn")

    def embed(self, model: "Ensemble", views: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Objective.embed`: both views in one batch."""
        z, twin = model.embed(torch.cat(list(views)))["rgb"].chunk(2)
        return {"rgb": z, "twin": twin}

    def queries(self, z: Mapping[str, Tensor], banks: Mapping[str, Bank], index: Tensor, step: Step) -> list[Query]:
        """All 2B embeddings against themselves; without twins against the bank, as diagnostics of the end do."""
        if "twin" not in z:
            return super().queries(z, banks, index, step)
        both = torch.cat([z["rgb"], z["twin"]])
        return [Query(both, WholeBank(both), torch.arange(len(both), device=both.device), "rgb", step)]

    def terms(self, q: Query) -> Terms:
        """See `Objective.terms`; no estimate."""
        both = q.bank.rows
        f = q.z @ both.T / self.tau
        positive = (q.z * both.roll(q.size // 2, 0)).sum(1) / self.tau
        others = f.masked_fill(torch.eye(q.size, dtype=torch.bool, device=f.device), -torch.inf)
        return Terms(torch.logsumexp(others, 1) - positive - math.log(q.size - 1))
