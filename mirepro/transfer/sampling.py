"""Which training images a detection step sees: a new order each epoch, images of rare categories several times.

Repeat-factor sampling: a category c that a share f_c of the images show has the factor max(1, sqrt(t / f_c)), an image
the largest factor of its categories; it comes that often in an epoch, the fraction resolved by a draw. Source: Gupta,
Dollar and Girshick, LVIS: a dataset for large vocabulary instance segmentation (2019).

Draws are words of stream TRANSFER at (epoch, number): 0 and 1 order the places of an epoch, 2 mirrors the image at a
place, 3 rounds an image's factor. Without repeats place and image are the same number.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirepro import rng


def repeat_factors(labels: Sequence[NDArray[np.int64]], threshold: float) -> NDArray[np.float64]:
    """How often each image comes in an epoch, on average.

    Args:
        labels: Categories of each image's objects, one for each object.
        threshold: The share t of images below which a category is repeated; 0 repeats none.

    Returns:
        `(N,)`, at least 1; 1 for an image without objects.
    """
    shown = [np.unique(own) for own in labels]
    images = np.bincount(np.concatenate([np.zeros(0, np.int64), *shown]))
    share = np.maximum(images, 1) / max(1, len(shown))
    factors = np.maximum(1.0, np.sqrt(threshold / share))
    return np.array([factors[own].max(initial=1.0) for own in shown])


def places(factors: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """`(M,)` the images of an epoch before they are shuffled, each as often as it comes."""
    whole = np.floor(factors)
    images = np.arange(len(factors))
    more = rng.uniform(seed, rng.Stream.TRANSFER, epoch, images, 4)[:, 3] < factors - whole
    return np.repeat(images, whole.astype(np.int64) + more)


def steps(factors: NDArray[np.float64], batch: int, epochs: int, seed: int) -> int:
    """Number of batches of a training."""
    return sum(max(1, len(places(factors, seed, epoch)) // batch) for epoch in range(epochs))


def batches(
    factors: NDArray[np.float64], batch: int, epochs: int, flip: float, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Step, image indices and mirrored flags (a share `flip`); full batches, a new order and new flips each epoch.

    Args:
        factors: `(N,)` how often each image comes in an epoch (see `repeat_factors`).
        batch: Images of a step; fewer where an epoch has fewer.
        epochs: Epochs.
        flip: Share of mirrored images.
        seed: Seed of the run.
    """
    step = 0
    for epoch in range(epochs):
        image = places(factors, seed, epoch)
        order = rng.permutation(seed, rng.Stream.TRANSFER, epoch, len(image))
        for i in range(max(1, len(image) // batch)):
            chosen = order[i * batch : (i + 1) * batch]
            mirrored = rng.uniform(seed, rng.Stream.TRANSFER, epoch, chosen, 3)[:, 2] < flip
            yield step, torch.from_numpy(image[chosen]), torch.from_numpy(mirrored)
            step += 1
