"""Reads what the stages measured: `metrics/<profile>/...`, one record for each run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.errors import UserError

SCHEMA = "mirepro.metrics/1"
CONTROLS = ("colour", "area_position", "pixels", "hog")
PRIMARY = ("linear_flat", "linear_author_flat")
"""T1's column for headlines: the first that was measured."""
MODELS = {"T2": "mask", "T3": "mask", "T4": "keypoint", "T8": "voc", "T9": "lvis", "T10": "lvis"}
"""End of the names of the detection runs that a table reads: the model, or the data set where it is not COCO."""
BUDGET = ("images_seen", "images_seen_long", "parameters", "trials")
"""What a detector cost, as columns."""


@dataclass(frozen=True)
class Record:
    """One run: its seed (None for a control without randomness) and its cells {name: {value, unit, protocol}}.

    A control brings the answers along that a run keeps in its test.json. The row is that of params.yaml, which a table
    may call otherwise; the detail is the evaluation's or the detection's.
    """

    run: str
    seed: int | None
    cells: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Any] = field(default_factory=dict)
    row: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> dict[str, Any]:
    """Reads one metrics file.

    Raises:
        UserError: The file is missing, no JSON, or has another schema.
    """
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("schema", SCHEMA) != SCHEMA:
        raise UserError(f"{path}: expected schema {SCHEMA}; run the stage that makes it again")
    return content


def record(root: Path, profile: str, table: str, run: str) -> Record:
    """All cells that a run contributes to a table.

    A detection table reads the run's file of its model or data set, every other table joins evaluation and pretraining
    (rows without pretraining, such as a random encoder, may have no pretraining file).
    """
    folder = root / "metrics" / profile
    if table in MODELS:
        content = read(folder / "detect" / f"{run}-{MODELS[table]}.json")
        return _record(run, {**content, "cells": detected(content)}, {})
    content = read(folder / "evaluate" / f"{run}.json")
    training = folder / "pretrain" / f"{run}.json"
    before = read(training)["cells"] if training.exists() else {}
    return _record(run, content, before)


def _record(run: str, content: Mapping[str, Any], before: Mapping[str, Any]) -> Record:
    cells, detail = {**before, **content["cells"]}, content.get("detail") or {}
    return Record(run, content.get("seed"), cells, row=content.get("row", run), detail=detail)


def detected(content: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a detection's metrics, and its budget, which stands in their detail, as cells."""
    detail = content.get("detail") or {}
    seen = detail.get("images_seen") or {}
    values = (seen.get("tuned"), seen.get("long"), detail.get("parameters"), detail.get("trials"))
    spent = {name: value for name, value in zip(BUDGET, values, strict=True) if value is not None}
    return {**content["cells"], **{name: {"value": spent[name], "unit": "count", "protocol": ""} for name in spent}}


def controls(root: Path, profile: str) -> dict[str, Record]:
    """The control rows in their fixed order; empty when the profile has none."""
    path = controls_path(root, profile)
    if not path.exists():
        return {}
    rows = read(path)["rows"]
    names = [name for name in CONTROLS if name in rows] + sorted(set(rows) - set(CONTROLS))
    return {
        name: Record(name, None, rows[name].get("cells", rows[name]), (rows[name].get("answers") or [{}])[0])
        for name in names
    }


def controls_path(root: Path, profile: str) -> Path:
    """Where the controls' metrics stand."""
    return root / "metrics" / profile / "controls.json"


def records(root: Path, profile: str, layout: Mapping[str, Any], table: str) -> dict[str, list[Record]]:
    """The rows of a table in the layout's order, then (T1) the controls that the layout does not place itself."""
    fixed = controls(root, profile) if table == "T1" else {}
    result: dict[str, list[Record]] = {}
    for row, runs in rows_of(layout, table).items():
        if not runs and row not in fixed:
            raise UserError(f"tables.{table}.rows.{row}: no runs and no such control; list at least one run")
        result[row] = [record(root, profile, table, run) for run in runs] if runs else [fixed[row]]
    return result | {row: [item] for row, item in fixed.items() if row not in result}


def rows_of(layout: Mapping[str, Any], table: str) -> dict[str, list[str]]:
    """The layout's {row: [run, ...]} of a table; empty when the table is not part of the profile.

    Raises:
        UserError: The layout has another shape.
    """
    rows = (layout.get(table) or {}).get("rows") or {}
    if not isinstance(rows, Mapping):
        raise UserError(f"tables.{table}.rows: expected a mapping of row to list of runs, got {rows!r}")
    return {str(row): list(runs or []) for row, runs in rows.items()}


def value(item: Record, column: str) -> float | None:
    """A cell's value; None when it was not measured or is COCO's -1 (no such ground truth)."""
    number = item.cells.get(column, {}).get("value")
    if number is None:
        return None
    precision = column.split("_")[0] in ("box", "mask", "keypoint")
    return None if precision and number < 0 else float(number)
