"""The supervised reference: softmax over classes on the same embedding and views; not contrastive."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mirepro import rng
from mirepro.banks import Bank
from mirepro.objectives.base import Objective, Output, Step

if TYPE_CHECKING:
    from mirepro.encoders import Ensemble


@dataclass
class Supervised(Objective):
    """Cross-entropy of the classes, logits `<z, w_c> / tau` with one learnt row w_c per class.

    Attributes:
        classes: As the data have; another number is refused [derived].
    """

    uses_labels: ClassVar[bool] = True
    classes: int = 96
    weight: nn.Parameter = field(init=False, repr=False)

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(self.classes >= 2, "classes", "the number of classes of the data set")

    def initialise(self, model: "Ensemble", seed: int) -> None:
        """Makes the classes' rows."""
        dim = model.params.dim
        draws = rng.normal(seed, rng.Stream.WEIGHT, 1, np.arange(self.classes), dim) / dim**0.5
        self.weight = nn.Parameter(torch.from_numpy(draws.astype(np.float32)).to(model.device))

    def parameters(self) -> list[nn.Parameter]:
        """The classes' rows."""
        return [self.weight]

    def __call__(
        self,
        z: Mapping[str, Tensor],
        banks: Mapping[str, Bank],
        index: Tensor,
        step: Step,
        labels: Tensor | None = None,
    ) -> Output:
        """See `Objective.__call__`; no estimate."""
        del banks, index, step
        assert labels is not None
        logits = torch.cat([z[name] for name in self.modalities], 1) @ self.weight.T / self.tau
        return Output(nn.functional.cross_entropy(logits, labels), None)
