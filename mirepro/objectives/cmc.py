"""Contrastive multiview coding on L and ab: cross-entropy form, negatives uniform over the other modality's bank."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.ir import Ir


@dataclass
class Cmc(Ir):
    """`ir` per direction, L against the ab bank and ab against L's, summed; both share their variates [paper, code]."""

    modalities: ClassVar[tuple[str, ...]] = ("L", "ab")
