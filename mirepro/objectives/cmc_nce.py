"""Contrastive multiview coding on L and ab as published: binary NCE (Tian et al. 2019, author code)."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.ir_nce import IrNce


@dataclass
class CmcNce(IrNce):
    """`ir_nce` per direction, L against the ab bank and ab against L's, summed; both share their variates [code]."""

    modalities: ClassVar[tuple[str, ...]] = ("L", "ab")
