"""The images of a split as tensors, by sample index; what does not fit into memory is decoded batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro.data.shards import Split
from mirepro.errors import UserError

MEMORY = 4 * 10**9
"""Bytes of decoded images that one split may keep; a larger one is decoded from its mapped shards again and again."""


class Images:
    """Images of equal size, indexed by sample: `images[index]` is `(b, 3, S, S)` uint8 in the order of `index`.

    Args:
        split: The opened split.
        threads: Decoders of a batch that is not kept; their number changes no byte.
        side: S, to which images are resized; None takes them as they are stored.

    Raises:
        UserError: Images differ in size.
    """

    def __init__(self, split: Split, threads: int = 1, side: int | None = None) -> None:
        self._split, self._side, self._shape = split, side, split.image(0, side).shape
        small = len(split) * int(np.prod(self._shape)) <= MEMORY
        self._kept = torch.from_numpy(split.images(side)) if small else None
        self._pool = None if small else ThreadPoolExecutor(threads)
        self._ahead: dict[int, Future[NDArray[np.uint8]]] = {}

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images of samples `(b,)` int64."""
        if self._pool is None:
            assert self._kept is not None
            return self._kept[index]
        decoded = self._decode(self._pool, index)
        images = [decoded[i].result() for i in index.tolist()]
        if any(image.shape != self._shape for image in images):
            raise UserError(f"{self._split.folder}: images of different sizes; import the data again with a side")
        return torch.from_numpy(np.stack(images))

    def ahead(self, batches: Sequence[Tensor], part: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Yields the batches `(B,)`; images of the next one are decoded while the caller computes on the current one.

        Args:
            batches: Samples of each step, int64.
            part: What this process reads of a batch.
        """
        for number, batch in enumerate(batches):
            if self._pool is not None:
                self._ahead = self._decode(self._pool, torch.cat([part(b) for b in batches[number : number + 2]]))
            yield batch
        self._ahead = {}

    def _decode(self, pool: ThreadPoolExecutor, index: Tensor) -> dict[int, Future[NDArray[np.uint8]]]:
        wanted = dict.fromkeys(index.tolist())
        return {i: self._ahead.get(i) or pool.submit(self._split.image, i, self._side) for i in wanted}
