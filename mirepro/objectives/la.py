"""Local aggregation (Zhuang et al. 2019, author code)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from mirepro.objectives.base import Query, Step, Terms
from mirepro.objectives.clusters import Clustered
from mirepro.objectives.ir_nce import IrNce


@dataclass
class La(Clustered):
    """`-log( sum_{B_i and C_i} e^f / sum_{B_i} e^f )` after warm-up epochs of `ir_nce`; i belongs to both sets.

    B_i holds the background `min(background, floor(outer N))` most similar rows (the last gives way to i).

    Attributes:
        momentum: [code: .5].
        outer: Largest share of the bank that the background takes [derived: small banks].
        background: k_B [code: 4096].
        epsilon: Added in the logarithm [code: 1e-7; none here].
        warmup_fraction: Share of the epochs that train by `ir_nce` first [code: 10 of 200].
    """

    momentum: float = 0.5
    outer: float = 0.1
    background: int = 4096
    epsilon: float = 0.0
    warmup_fraction: float = 0.05
    warmup: IrNce = field(default_factory=IrNce, init=False, repr=False)

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(self.background >= 1, "background", "1 or more")
        self._require(self.epsilon >= 0, "epsilon", "0 or a small positive number (author code: 1e-7)")
        self._require(0 <= self.warmup_fraction < 1, "warmup_fraction", "a fraction of the run in [0, 1)")
        self.warmup = IrNce(k=self.k, tau=self.tau, momentum=self.momentum, own_row=self.own_row)

    def region(self, size: int, step: Step) -> tuple[int, int]:
        """The background's ranks [0, k_B)."""
        _, high = super().region(size, step)
        return 0, min(self.background, high)

    def warmup_epochs(self, total: int) -> int:
        """Epochs of `ir_nce`, at least one where the fraction is positive (author code: 10 of 200)."""
        return math.ceil(Fraction(str(self.warmup_fraction)) * total)

    def terms(self, q: Query) -> Terms:
        """See `Objective.terms`; no estimate."""
        if q.step.epoch < self.warmup_epochs(q.step.total_epochs):
            return self.warmup.terms(q)
        low, high = self.region(q.size, q.step)
        everything, mates = q.bank.region_logsumexp(
            q.z, low, high, self.tau, own=q.index, labels=self.labels[q.modality]
        )
        if self.epsilon == 0:
            return Terms(everything - mates)
        return Terms(-torch.log(torch.exp(mates - everything) + self.epsilon))

    def state(self) -> dict[str, Tensor]:
        """The warm-up's normaliser."""
        return self.warmup.state() | super().state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`."""
        super().load_state(state)
        self.warmup.load_state({name: value for name, value in state.items() if name.startswith("z.")})
