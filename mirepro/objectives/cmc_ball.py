"""Contrastive multiview coding on L and ab: negatives from the ball in the other modality's bank."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.ball import Ball


@dataclass
class CmcBall(Ball):
    """`ball` per direction, L against the ab bank and ab against the L bank, summed; both share their variates.

    That a region is ranked in the other modality's bank is [unverified].
    """

    modalities: ClassVar[tuple[str, ...]] = ("L", "ab")
