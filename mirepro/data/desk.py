"""The desk data: 32 x 32 images of one object each, 96 classes = 12 shapes x 8 surface patterns.

Colours, pose, scale, light, clutter and occlusion are free; the class lies in outline and texture alone.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mirepro.data import compose, render
from mirepro.data.patterns import PATTERNS
from mirepro.data.shapes import SHAPES
from mirepro.data.shards import Sample

SIZE = 32
SPLITS = {"train": 3072, "val": 960, "test": 1920}
CLASSES = [f"{shape.name}-{pattern}" for shape in SHAPES for pattern in PATTERNS]
BATCH = 96
DRAWS = 192

META = {
    "title": "Rendered shapes with patterns",
    "classes": CLASSES,
    "categories": [shape.name for shape in SHAPES],
    "keypoints": compose.KEYPOINTS,
}


def layers(scene: NDArray[np.int64], label: NDArray[np.int64]) -> tuple[list[render.Layer], render.Draws, render.I64]:
    """The things of each scene from back to front: two of clutter, the object, one that may hide a part of it."""
    draws = render.Draws(scene, DRAWS)
    scale = draws.between(14.5, 17.5)
    offset = np.stack([draws.between(-1, 1), draws.between(-1, 1)], 1)
    centre = SIZE / 2 + offset * (SIZE / 2 - 0.8 * scale)[:, None]
    order = compose.palette(draws)
    pair = compose.colours(draws, order)
    shape, pattern = label // len(PATTERNS), label % len(PATTERNS)
    target = compose.thing(draws, shape, pattern, centre, scale, pair, **compose.CALM)
    behind = [compose.clutter(draws, order, SIZE * draws.take(2), 4.0, 7.0, 0.5) for _ in range(2)]
    hiding = compose.clutter(draws, order, compose.beside(draws, target, scale), 4.0, 6.0, 0.5)
    return [*behind, target, hiding], draws, order


def batch(scene: NDArray[np.int64], label: NDArray[np.int64]) -> list[Sample]:
    """Renders scenes (B,) with given classes (B,)."""
    things, draws, order = layers(scene, label)
    target = len(things) - 2
    images, owner = render.scene(things, *compose.background(draws, order), SIZE)
    objects = compose.annotations(owner, things, target)
    return [
        Sample(f"{number:06d}", compose.ppm(image), ".ppm", int(c), [one] if one else [])
        for number, image, c, one in zip(scene, images, label, objects, strict=True)
    ]


def split(name: str) -> Iterator[Sample]:
    """The samples of a split; classes take turns, and every scene number is used once."""
    first = sum(list(SPLITS.values())[: list(SPLITS).index(name)])
    for start in range(0, SPLITS[name], BATCH):
        index = np.arange(start, min(start + BATCH, SPLITS[name]))
        yield from batch(first + index, index % len(CLASSES))
