"""The one JSON shape of every stage's metrics."""

import math
from collections.abc import Mapping
from typing import Any

SCHEMA = "mirepro.metrics/1"
BY_FORM = "by form"  # unit of a certificate where none is needed: the estimate is a bound by its form


def cell(value: float | None, unit: str, protocol: str) -> dict[str, Any]:
    """A number with its unit and, in one line, how it was measured; None and NaN mean that it does not apply."""
    return {"value": None if value is None or math.isnan(value) else float(value), "unit": unit, "protocol": protocol}


def document(
    stage: str, run: str, row: str, seed: int, cells: Mapping[str, Any], detail: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics file of one stage."""
    return {
        "schema": SCHEMA,
        "stage": stage,
        "run": run,
        "row": row,
        "seed": seed,
        "cells": dict(cells),
        "detail": dict(detail),
    }
