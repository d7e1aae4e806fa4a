"""Negatives from the ring: the ball without its innermost rows."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.regions import Region


@dataclass
class Ring(Region):
    """Negatives uniform from the ranks [floor(l m_u), m_u); a bound only where the certificate holds.

    Attributes:
        inner: l [unverified]; .1 [code: ranks 1 to 10 %].
    """

    claim: ClassVar[str] = "certified"
    inner: float = 0.1
