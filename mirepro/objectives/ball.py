"""Negatives from the ball of difficult contrasts."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.regions import Region


@dataclass
class Ball(Region):
    """Negatives uniform from the m_u most similar rows: a bound for every u (restricted estimate <= NCE) [derived].

    Attributes:
        inner: 0, the ball has no hole [code].
    """

    claim: ClassVar[str] = "yes"
    inner: float = 0.0
