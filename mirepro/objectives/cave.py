"""Negatives from the ball without the anchor's close neighbours (definition unverified)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mirepro.objectives.base import Query
from mirepro.objectives.clusters import Clustered


@dataclass
class Cave(Clustered):
    """Negatives uniform from `B_i \\ C_i`; an anchor without any falls back to B_i without i [unverified]."""

    claim: ClassVar[str] = "certified"

    def exclusions(self, q: Query) -> dict[str, Any]:
        """Leaves out the cluster mates in the bank's modality."""
        return {"labels": self.labels[q.modality], "exclude_mates": True}

    def fallbacks(self, q: Query) -> float:
        """Share of anchors whose region is empty."""
        low, high = self.region(q.size, q.step)
        sizes = q.bank.region_size(q.z.detach(), low, high, own=q.index, **self.exclusions(q))
        return float((sizes == 0).double().mean())
