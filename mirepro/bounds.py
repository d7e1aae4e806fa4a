"""Values that no run can mean, though the stages' own code would take them: `preflight` refuses them.

The code of a stage checks what it depends on itself; a rule that stands here makes no result stale.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from mirepro.errors import UserError

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what to use instead."""
COUNT: Rule = (lambda value: value >= 1, "1 or more")
POSITIVE: Rule = (lambda value: value > 0, "a positive number")
SHARE: Rule = (lambda value: 0 <= value < 1, "a share in [0, 1)")
SIZES: Rule = (lambda values: bool(values) and min(values) > 0, "positive numbers, at least one")

OPTIM: Mapping[str, Rule] = {
    "momentum": SHARE,
    "warmup": SHARE,
    "milestones": (
        lambda values: list(values) == sorted(values) and all(0 < value < 1 for value in values),
        "shares of the run in (0, 1), rising",
    ),
}
LINEAR: Mapping[str, Rule] = {
    "iterations": COUNT,
    "tolerance": POSITIVE,
    "author_lr": POSITIVE,
    "author_momentum": SHARE,
}
DETECT: Mapping[str, Rule] = {
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "clip": POSITIVE,
    "anchors": SIZES,
    "scales": SIZES,
    "canonical": POSITIVE,
    **dict.fromkeys((f"{head}.{key}" for head in ("mask", "keypoint") for key in ("pool", "width", "layers")), COUNT),
    **dict.fromkeys(("box_pool", "box_hidden", "heatmap", "sampling", "rpn_samples", "roi_samples"), COUNT),
    **dict.fromkeys(("proposals", "proposals_before"), COUNT),
    "roi_positive": (lambda value: 0 < value <= 1, "a share in (0, 1]"),
    "score": SHARE,
    "oks_sigma": (lambda value: value is None or value > 0, "a positive number, or null for the data's own"),
    "sensitivity": (lambda values: all(value > 0 for value in values), "positive factors"),
}


def check(where: str, values: object, rules: Mapping[str, Rule]) -> None:
    """Refuses with UserError the first value that breaks its rule.

    Args:
        where: Key of the values, for the message.
        values: A dataclass of parameters.
        rules: By the values' own keys, with dots where they are nested.
    """
    for key, (right, remedy) in rules.items():
        value = operator.attrgetter(key)(values)
        if not right(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{where}.{key}: {shown} is impossible; use {remedy}")


def finite(values: object, where: str = "") -> None:
    """Refuses with UserError a NaN or an infinity anywhere in plain YAML values; no comparison would notice a NaN."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            finite(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            finite(value, f"{where}[{number}]")
    elif isinstance(values, float) and not math.isfinite(values):
        raise UserError(f"{where}: {values} is impossible; use a finite number")
