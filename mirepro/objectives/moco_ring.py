"""Momentum contrast with negatives from the ring of the queue (Wu et al. 2020; definition unverified)."""

from dataclasses import dataclass

from mirepro.objectives.moco import Moco


@dataclass
class MocoRing(Moco):
    """`moco` with the queue's ranks [floor(l m_u), m_u) by similarity to the anchor; all of them, none drawn.

    Attributes:
        outer: u, a share of the queue [unverified].
        inner: l [unverified].
    """

    outer: float = 0.1
    inner: float = 0.1
