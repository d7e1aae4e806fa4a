"""What an objective is: positives, negatives, loss, estimate.

`f_ij = <z_i, M[j]> / tau`; k counts the terms of the partition including the positive; natural logarithms (nats).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mirepro.errors import UserError
from mirepro.rng import Stream

if TYPE_CHECKING:
    from mirepro.banks import Bank
    from mirepro.encoders import Ensemble


@dataclass(frozen=True)
class Step:
    """Where the run stands; every draw is a function of it."""

    seed: int
    step: int
    total_steps: int
    epoch: int = 0
    total_epochs: int = 1


@dataclass(frozen=True)
class Query:
    """One direction of a batch: anchors against the bank of `modality`.

    Attributes:
        z: `(B, D)` anchors.
        bank: The N rows they are compared with.
        index: `(B,)` int64 own rows.
        modality: Whose bank it is.
        step: Where the run stands.
        key: `(B, D)` positives, where they are no rows of the bank.
    """

    z: Tensor
    bank: "Bank"
    index: Tensor
    modality: str
    step: Step
    key: Tensor | None = None

    @property
    def size(self) -> int:
        """N."""
        return self.bank.size


@dataclass(frozen=True)
class Terms:
    """Per anchor, nats: `loss` `(B,)`, and `estimate` `(B,)` where the objective has one."""

    loss: Tensor
    estimate: Tensor | None = None
    negatives: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """Of a batch, nats: the scalar loss to minimise and the mean estimate (None where nothing may be claimed)."""

    loss: Tensor
    estimate: float | None


@dataclass
class Objective:
    """Base class: uniform negatives, cross-entropy `CE - log k`, estimate `log k - CE`.

    The fields of a subclass are its options; configuration and messages come from them. Each names its source by the
    tags of docs/deviations.md: [paper], [code] (the authors' or their peers'), [derived], [measured], [unverified].

    Attributes:
        k: Terms of the partition, the positive included [code: 4096 noise draws beside the positive].
        tau: Temperature, f = <z, row> / tau [code: .07].
        momentum: m, the weight of the old row in the bank's update [code: .5, as `ir_nce`, `la` and `cmc_nce` have it].
        own_row: `keep` the own row among the negatives [code], or `exclude` it [derived: then a bound only without
            replacement].
        replacement: Draws with [code] or without replacement [derived].
    """

    modalities: ClassVar[tuple[str, ...]] = ("rgb",)
    claim: ClassVar[str] = "no"  # "yes": a bound by its form; "certified": only where the certificate holds; "no"
    uses_labels: ClassVar[bool] = False
    companions: ClassVar[tuple[str, ...]] = ()  # further embeddings that `embed` returns, of one more view each

    k: int = 256
    tau: float = 0.07
    momentum: float = 0.0
    own_row: str = "keep"
    replacement: bool = True
    labels: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def validate(self) -> None:
        """Refuses options that are impossible whatever the data, with UserError."""
        self._require(self.k >= 2, "k", "at least 2 (the positive and one negative)")
        self._require(self.tau > 0, "tau", "a positive temperature")
        self._require(0 <= self.momentum <= 1, "momentum", "a value in [0, 1]")
        self._require(self.own_row in ("keep", "exclude"), "own_row", "'keep' or 'exclude'")

    def check(self, size: int, dim: int) -> list[str]:
        """Refuses what is impossible for a bank of `size` rows (UserError); returns warnings."""
        del dim
        if not self.replacement:
            self._require(self.k - 1 <= size - 1, "k", f"at most {size} without replacement")
        return []

    def _require(self, condition: bool, key: str, remedy: str) -> None:
        if not condition:
            raise UserError(
                f"objective {type(self).__name__}.{key}: {getattr(self, key)!r} is impossible; use {remedy}"
            )

    def pairs(self) -> list[tuple[str, str]]:
        """(anchor's modality, bank's modality) of each direction."""
        return [("rgb", "rgb")] if len(self.modalities) == 1 else [("L", "ab"), ("ab", "L")]

    def initialise(self, model: "Ensemble", seed: int) -> None:
        """Makes the objective's own parameters and state beside the initial encoder from the run's seed."""

    def embed(self, model: "Ensemble", views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Embeds the samples of one shard for training.

        Args:
            model: The encoder.
            views: RGB in [0, 1] `(b, 3, S, S)`: the view that every objective sees, then one per companion.

        Returns:
            Embeddings `(b, D)` per modality, and the companions.
        """
        return model.embed(views[0])

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the objective itself, trained with the encoder."""
        return []

    def refresh(self, banks: Mapping[str, "Bank"], epoch: int, seed: int) -> None:
        """Called before each epoch."""

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside parameters and banks; labels are made anew by `refresh`."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`."""

    def cap(self, size: int) -> float:
        """The largest estimate that k terms over a bank of `size` rows allow, nats."""
        return min(math.log(self.k), math.log(size))

    def region(self, size: int, step: Step) -> tuple[int, int]:
        """Ranks [lo, hi) by similarity to the anchor that negatives come from."""
        del step
        return 0, size

    def draw(self, q: Query, count: int) -> Tensor:
        """`(B, count)` int64 bank rows drawn uniformly from the region; the same variates in every direction."""
        low, high = self.region(q.size, q.step)
        return q.bank.region_sample(
            q.z.detach(),
            low,
            high,
            count,
            seed=q.step.seed,
            step=q.step.step,
            sample_index=q.index,
            stream=Stream.NEGATIVE,
            own=q.index,
            exclude_own=self.own_row == "exclude",
            replacement=self.replacement,
            **self.exclusions(q),
        )

    def exclusions(self, q: Query) -> dict[str, Any]:
        """Further arguments of `Bank.region_sample`: cluster mates to leave out."""
        del q
        return {}

    @property
    def bounded(self) -> bool:
        """Without its own row in the population an objective bounds only when it draws without replacement."""
        return self.own_row == "keep" or not self.replacement

    def terms(self, q: Query) -> Terms:
        """Loss and estimate of each anchor: `CE - log k` and its negative."""
        negatives = self.draw(q, self.k - 1)
        ce = q.bank.gather_nce(q.z, torch.cat([q.index[:, None], negatives], 1), self.tau)
        loss = ce - math.log(self.k)
        return Terms(loss, -loss.detach() if self.claim != "no" and self.bounded else None, negatives)

    def queries(self, z: Mapping[str, Tensor], banks: Mapping[str, "Bank"], index: Tensor, step: Step) -> list[Query]:
        """One query per direction."""
        return [Query(z[anchor], banks[other], index, other, step) for anchor, other in self.pairs()]

    def __call__(
        self,
        z: Mapping[str, Tensor],
        banks: Mapping[str, "Bank"],
        index: Tensor,
        step: Step,
        labels: Tensor | None = None,
    ) -> Output:
        """Loss of a batch: the mean over anchors, summed over directions; the estimate is the directions' mean.

        Args:
            z: Embeddings `(B, D)` per modality.
            banks: Bank per modality.
            index: `(B,)` int64 own rows.
            step: Where the run stands.
            labels: `(B,)` classes; only the supervised reference may read them.
        """
        del labels
        terms = [self.terms(q) for q in self.queries(z, banks, index, step)]
        loss = torch.stack([t.loss.mean() for t in terms]).sum()
        estimates = [float(t.estimate.mean()) for t in terms if t.estimate is not None]
        return Output(loss, sum(estimates) / len(estimates) if len(estimates) == len(terms) else None)

    def update(self, banks: Mapping[str, "Bank"], z: Mapping[str, Tensor], index: Tensor) -> None:
        """Writes the batch into the banks; after the loss and after backward."""
        for name in self.modalities:
            banks[name].update(index, z[name], self.momentum)
