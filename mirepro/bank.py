"""The memory bank: one unit row per training image and modality."""

import numpy as np
import torch
from torch import Tensor

from mirepro import ops, rng


class MemoryBank:
    """`rows` `(N, D)` float32, one row of length 1 per training image.

    Rows change through `update` alone, after the loss and after backward, so that they stay part of the critic.
    """

    def __init__(
        self, size: int, dim: int, *, seed: int, modality: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        draws = rng.normal(seed, rng.Stream.BANK, modality, np.arange(size), dim)
        rows = (draws / np.sqrt((draws * draws).sum(1, keepdims=True))).astype(np.float32)
        self.rows = torch.from_numpy(rows).to(device)

    @property
    def size(self) -> int:
        """N, the number of rows."""
        return len(self.rows)

    def update(self, index: Tensor, z: Tensor, momentum: float) -> None:
        """`M[i] <- normalize(m M[i] + (1 - m) z)`, duplicates in order of appearance.

        Args:
            index: `(B,)` int64 rows.
            z: `(B, D)` float32 embeddings; no gradient is kept.
            momentum: m weights the OLD row; 0 stores z, 1 changes nothing.
        """
        ops.bank_update_(self.rows, index, z.detach(), momentum)
