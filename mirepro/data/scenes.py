"""The detection scenes: 64 x 64 images of one to three of the desk data's shapes, none of its scenes."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mirepro import rng
from mirepro.data import compose, desk, render
from mirepro.data.patterns import PATTERNS
from mirepro.data.shapes import SHAPES
from mirepro.data.shards import Sample

SIZE = 64
SPLITS = {"train": 400, "val": 96, "test": 192}
FIRST = 1 << 32
"""First scene number; the desk data end far below."""
BATCH = 48
DRAWS = 400
OBJECTS = 3
PLACES = 12

META = {**desk.META, "title": "Rendered scenes of one to three shapes", "classes": []}


def _place(draws: render.Draws, scale: render.F64, others: list[render.Layer]) -> render.F64:
    """`(B, 2)` the one of some random places that is farthest from the objects that are there already."""
    spots = 0.66 * scale[:, None, None] + draws.take(2 * PLACES).reshape(-1, PLACES, 2) * (
        SIZE - 1.32 * scale[:, None, None]
    )
    room = np.full(spots.shape[:2], np.inf)
    for other in others:
        dx, dy = (spots - other.centre[:, None]).transpose(2, 0, 1)
        room = np.minimum(room, dx * dx + dy * dy)
    return spots[np.arange(len(spots)), np.argmax(room, axis=1)]


def layers(scene: NDArray[np.int64]) -> tuple[list[render.Layer], render.Draws, render.I64]:
    """Four pieces of clutter, three objects (one or two of them may be absent), two pieces that may hide parts."""
    draws = render.Draws(scene, DRAWS)
    order = compose.palette(draws)
    behind = [compose.clutter(draws, order, SIZE * draws.take(2), 5.0, 9.0, 0.5) for _ in range(4)]
    objects: list[render.Layer] = []
    for i in range(OBJECTS):
        word = draws.take_bits()
        shape, pattern = rng.mulhi(word[:, 0], len(SHAPES)), rng.mulhi(word[:, 1], len(PATTERNS))
        scale = draws.between(14.0, 19.0)
        centre = _place(draws, scale, objects)
        present = i <= scene % OBJECTS
        pair = compose.colours(draws, order)
        objects.append(compose.thing(draws, shape, pattern, centre, scale, pair, present=present, **compose.CALM))
    hiding = [compose.clutter(draws, order, compose.beside(draws, o, np.full(len(scene), 16.0)), 3.5, 6.0, 0.4)
              for o in objects[:2]]  # fmt: skip
    return [*behind, *objects, *hiding], draws, order


def batch(scene: NDArray[np.int64]) -> list[Sample]:
    """Renders scenes (B,)."""
    things, draws, order = layers(scene)
    targets = range(4, 4 + OBJECTS)
    images, owner = render.scene(things, *compose.background(draws, order), SIZE)
    found = [compose.annotations(owner, things, i) for i in targets]
    return [
        Sample(f"{number - FIRST:06d}", compose.ppm(image), ".ppm", None, [one for one in objects if one])
        for number, image, objects in zip(scene, images, zip(*found, strict=True), strict=True)
    ]


def split(name: str) -> Iterator[Sample]:
    """The samples of a split."""
    first = FIRST + sum(list(SPLITS.values())[: list(SPLITS).index(name)])
    for start in range(0, SPLITS[name], BATCH):
        yield from batch(first + np.arange(start, min(start + BATCH, SPLITS[name])))
