"""The random reference: an encoder that is never trained; its BatchNorm is calibrated by one pass."""

from dataclasses import dataclass

from mirepro.objectives.base import Objective


@dataclass
class Random(Objective):
    """Takes no step; use it with `epochs: 0`."""
