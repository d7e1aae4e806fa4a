"""The registry: one objective, one file; a new file in this folder is found by itself."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from mirepro.errors import UserError
from mirepro.objectives.base import Objective
from mirepro.params import build

_SHARED = ("base", "regions", "clusters")


def names() -> list[str]:
    """Keys of all objectives, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def load(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        UserError: No such objective.
    """
    if name not in names():
        raise UserError(f"objective: {name!r} is unknown; known: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )


def create(name: str, options: Mapping[str, Any]) -> Objective:
    """An objective with its options checked by type and range.

    Raises:
        UserError: Unknown objective, unknown key, impossible value.
    """
    objective = build(load(name), options, f"objective {name}")
    assert isinstance(objective, Objective)
    objective.validate()
    return objective


def options(name: str) -> dict[str, Any]:
    """The options of an objective with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(load(name)) if field.init}
