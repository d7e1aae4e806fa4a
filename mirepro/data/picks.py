"""Which training images become the validation set: a fixed choice of every class."""

from functools import lru_cache

from mirepro import rng


@lru_cache(maxsize=4096)
def chosen(choice: int, label: int, count: int, size: int) -> frozenset[int]:
    """The first `size` of a fixed permutation of a class's `count` positions.

    Args:
        choice: Epoch word of the draw; one for each data set.
        label: The class.
        count: Images of the class.
        size: How many are chosen.
    """
    return frozenset(rng.permutation(label, rng.Stream.DATA, choice, count)[:size].tolist())


def inside(choice: int, label: int, place: int, count: int, size: int) -> bool:
    """Whether the image at `place` of a class is chosen; see `chosen`."""
    return place in chosen(choice, label, count, size)
