"""Instance discrimination in cross-entropy form."""

from dataclasses import dataclass
from typing import ClassVar

from mirepro.objectives.base import Objective


@dataclass
class Ir(Objective):
    """Negatives uniform over the bank, with replacement: InfoNCE against a memory bank (objectives `ir`)."""

    claim: ClassVar[str] = "yes"
