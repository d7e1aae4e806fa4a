"""Instance discrimination as published: binary noise-contrastive estimation (Wu et al. 2018, author code)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirepro.objectives.base import Objective, Query, Terms

LEMNISCATE = 2.24556  # author code's constant: mean e^f for d = 128 and tau = 0.07


@dataclass
class IrNce(Objective):
    """`-log P_i/(P_i + k'/N) - sum_neg log (k'/N)/(P_n + k'/N)` with P = e^f / Z and k' = k noise draws.

    Z is fixed from the first batch as mean(e^f) N, or by the constant of the author code, which holds for d = 128 and
    tau = .07 only.

    Attributes:
        momentum: [code: .5].
        normaliser: `first_batch` [code], or the author code's constant Z = 2.24556 N [code].
    """

    momentum: float = 0.5
    normaliser: str = "first_batch"
    z: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(self.normaliser in ("first_batch", "lemniscate"), "normaliser", "'first_batch' or 'lemniscate'")

    def check(self, size: int, dim: int) -> list[str]:
        """The author code's constant is refused for any other dimension or temperature."""
        allowed = self.normaliser != "lemniscate" or (dim == 128 and self.tau == 0.07)
        self._require(
            allowed, "normaliser", f"'first_batch': the constant needs dim 128 and tau 0.07, not {dim}, {self.tau}"
        )
        return super().check(size, dim)

    def terms(self, q: Query) -> Terms:
        """See `Objective.terms`; no estimate."""
        noise = self.draw(q, self.k)
        f = q.bank.gather_dot(q.z, torch.cat([q.index[:, None], noise], 1)) / self.tau
        log_p = f - self._log_z(q, f.detach())
        log_noise = math.log(self.k / q.size)
        total = torch.logaddexp(log_p, log_p.new_tensor(log_noise))
        loss = (total[:, 0] - log_p[:, 0]) + (total[:, 1:] - log_noise).sum(1)
        return Terms(loss, None, noise)

    def _log_z(self, q: Query, f: Tensor) -> float:
        """log Z of the bank's modality, fixed at its first use."""
        if self.normaliser == "lemniscate":
            return math.log(LEMNISCATE * q.size)
        if q.modality not in self.z:
            mean = float(torch.logsumexp(f.double().flatten(), 0)) - math.log(f.numel())
            self.z[q.modality] = mean + math.log(q.size)
        return self.z[q.modality]

    def state(self) -> dict[str, Tensor]:
        """log Z per modality."""
        return super().state() | {f"z.{name}": torch.tensor([z], dtype=torch.float64) for name, z in self.z.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`."""
        super().load_state(state)
        self.z = {name[2:]: float(value) for name, value in state.items() if name.startswith("z.")}
