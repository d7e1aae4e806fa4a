"""Contrastive multiview coding on L and ab: negatives from the ring in the other modality's bank."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.ring import Ring


@dataclass
class CmcRing(Ring):
    """`ring` per direction, L against the ab bank and ab against the L bank, summed; both share their variates.

    That a region is ranked in the other modality's bank is [unverified].
    """

    modalities: ClassVar[tuple[str, ...]] = ("L", "ab")
