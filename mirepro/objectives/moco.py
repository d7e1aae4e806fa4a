"""Momentum contrast (He et al. 2020): keys from a momentum encoder, negatives from a queue of the latest of them."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mirepro.bank import MemoryBank
from mirepro.banks import Bank
from mirepro.encoders import Ensemble
from mirepro.objectives.base import Query, Step, Terms
from mirepro.objectives.regions import Region

_QUEUE = 2  # number of the queue's initial rows; the banks' are 0 and 1


@dataclass
class Moco(Region):
    """`log(e^f_+ + sum_region e^f) - f_+ - log(1 + m)`: f_+ with the key of a second view, m queue rows of the region.

    The region is the whole queue, and all of it counts: nothing is drawn. Keys of older encoders and the positive are
    no draws from one distribution, so that no bound is claimed. The memory bank is kept (m = 0) for monitoring and for
    `nce_at_equal_f`, which `k` serves alone.

    The queue starts with random unit rows. Not there: shuffled BatchNorm (without effect on one shard), the second
    version's head of two layers. The code named here is facebookresearch/moco; its CIFAR-10 demo has `tau` .1.

    Attributes:
        outer: 1, the whole queue [code].
        queue: Keys in the queue [code: 65536; CIFAR-10 demo 4096].
        encoder_momentum: Weight of the old key encoder [code: .999; CIFAR-10 demo .99].
    """

    companions: ClassVar[tuple[str, ...]] = ("key",)
    outer: float = 1.0
    queue: int = 65536
    encoder_momentum: float = 0.999
    keys: MemoryBank = field(init=False, repr=False)
    model: Ensemble = field(init=False, repr=False)
    encoder: Ensemble = field(init=False, repr=False)
    start: int = field(default=0, init=False, repr=False)

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(self.queue >= 1, "queue", "1 or more rows")
        self._require(0 <= self.encoder_momentum <= 1, "encoder_momentum", "a value in [0, 1]")
        self._require(self.own_row == "keep", "own_row", "'keep': the queue has no own rows")
        self._require(self.replacement, "replacement", "true: nothing is drawn")

    def check(self, size: int, dim: int) -> list[str]:
        """Refuses an empty region of the queue; warns where the queue outlasts an epoch."""
        super().check(self.queue, dim)
        longer = self.queue > size
        return [f"the queue of {self.queue} keys holds older keys of the anchor's own image"] if longer else []

    def initialise(self, model: Ensemble, seed: int) -> None:
        """Copies the encoder and fills the queue."""
        self.model, self.encoder = model, copy.deepcopy(model).requires_grad_(False)
        self.encoder.train()  # for good: its BatchNorm reads the batch alone, the running moments are never used
        self.keys = MemoryBank(self.queue, model.params.dim, seed=seed, modality=_QUEUE, device=model.device)

    def embed(self, model: Ensemble, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """See `Objective.embed`: the second view by the momentum encoder."""
        with torch.no_grad():
            key = self.encoder.embed(views[1])["rgb"]
        return {**model.embed(views[0]), "key": key}

    def queries(self, z: Mapping[str, Tensor], banks: Mapping[str, Bank], index: Tensor, step: Step) -> list[Query]:
        """Anchors against the queue; without keys against the bank, as diagnostics of the final encoder do."""
        if "key" not in z:
            return super().queries(z, banks, index, step)
        return [Query(z["rgb"], self.keys, index, "rgb", step, z["key"].detach())]

    def terms(self, q: Query) -> Terms:
        """See `Objective.terms`; no estimate."""
        assert q.key is not None
        low, high = self.region(q.size, q.step)
        positive = (q.z * q.key).sum(1) / self.tau
        negatives, _ = q.bank.region_logsumexp(q.z, low, high, self.tau)
        return Terms(torch.logaddexp(positive, negatives) - positive - math.log(1 + high - low))

    @torch.no_grad()
    def update(self, banks: Mapping[str, Bank], z: Mapping[str, Tensor], index: Tensor) -> None:
        """Writes the batch into bank and queue, the oldest keys give way; the key encoder follows the encoder."""
        super().update(banks, z, index)
        rows = torch.arange(self.start, self.start + len(index), device=index.device) % self.queue
        self.keys.update(rows, z["key"], 0.0)
        self.start = (self.start + len(index)) % self.queue
        for own, other in zip(self.encoder.parameters(), self.model.parameters(), strict=True):
            own.mul_(self.encoder_momentum).add_(other, alpha=1 - self.encoder_momentum)

    def state(self) -> dict[str, Tensor]:
        """Queue, where it goes on, and the key encoder."""
        weights = {f"encoder.{name}": weight for name, weight in self.encoder.named_parameters()}
        return super().state() | weights | {"keys": self.keys.rows, "start": torch.tensor([self.start])}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`."""
        super().load_state(state)
        self.keys.rows, self.start = state["keys"], int(state["start"])
        for name, weight in self.encoder.named_parameters():
            weight.copy_(state[f"encoder.{name}"])
