"""metrics/<profile> -> tables/<profile>/T1..T7.{json,md} and the verdicts on the claims."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.metrics import BY_FORM
from mirepro.report import claims, facts, metrics, published, statistics, text
from mirepro.report.published import Published

Table = dict[str, Any]

TITLES = {
    "T1": "Linear evaluation and nearest neighbours",
    "T2": "Boxes (torchvision recipe)",
    "T3": "Instance masks (torchvision recipe)",
    "T4": "Keypoints (torchvision recipe)",
    "T5": "Mutual information on the Gaussian toy",
    "T6": "Negatives",
    "T7": "Views",
    "T8": "Boxes on PASCAL VOC (torchvision recipe)",
    "T9": "Boxes on LVIS (torchvision recipe)",
    "T10": "Instance masks on LVIS (torchvision recipe)",
}
ACCURACY = ("linear_flat", "linear_pool", "linear_author_flat", "linear_author_pool",
            "knn_1", "knn_5", "knn_20", "knn_200")  # fmt: skip
ABLATED = ("linear_flat", "linear_pool", "linear_author_flat", "knn_1", "knn_200")
INFORMATION = ("estimate", "cap", "nce_at_equal_f", "mi_views", "certified_share", "t3_share", "fallback_share",
               "images_seen", "parameters")  # fmt: skip
REGION = ("estimate", "cap", "nce_at_equal_f", "mi_views", "certified_share", "fallback_share", "own_copies",
          "same_class_share")  # fmt: skip
COLLAPSE = ("covariance_rank", "alignment", "uniformity")
TOY = ("mi", "estimate", "se", "bias", "sd", "certified")
COLUMNS = {
    "T1": ACCURACY + INFORMATION + COLLAPSE,
    "T5": TOY,
    "T6": (*ABLATED, *REGION),
    "T7": (*ABLATED, "estimate", "cap", "nce_at_equal_f", "mi_views"),
}
TASKS = {"T2": "box", "T3": "mask", "T4": "keypoint", "T8": "box", "T9": "box", "T10": "mask"}
VARIANTS = ("tuned", "fixed", "long", "frozen")
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR1", "AR10", "AR20", "AR100",
              "AR300", "AR", "AR50", "AR75", "ARs", "ARm", "ARl", "VOC07", "VOC10")  # fmt: skip
FEW_SEEDS = {1: "n = 1: supports no claim"}


def build(root: Path, profile: str, layout: Mapping[str, Any]) -> None:
    """Writes every table of the profile and `claims.{json,md}`.

    Args:
        root: Folder that holds metrics/, runs/ and tables/.
        profile: Name of the profile.
        layout: `{T1: {rows: {row: [run, ...]}, note: what to know of the whole table}, ...}`.

    Raises:
        UserError: A metrics file is missing or broken, or the layout has another shape.
    """
    values = published.read(find(root, f"published/{profile}.csv"))
    folder = root / "tables" / profile
    for name in TITLES:
        table = make(root, profile, layout, name, values)
        if table is not None:
            check(table)
            files.write_json(folder / f"{name}.json", table)
            files.write_text(folder / f"{name}.md", markdown(table))
    file = claims.load(profile)
    write_claims(folder, file, claims.judge(root, profile, layout, file))


def find(root: Path, name: str) -> Path:
    """A file of the repository that a profile's own root may lack (published values, documentation)."""
    return root / name if (root / name).exists() else Path(__file__).resolve().parents[2] / name


def make(root: Path, profile: str, layout: Mapping[str, Any], name: str, values: Published) -> Table | None:
    """One table; None when it is not part of the profile."""
    if name == "T5":
        path = root / "metrics" / profile / "toy.json"
        return toy(metrics.read(path)) if path.exists() else None
    if not metrics.rows_of(layout, name):
        return None
    records = metrics.records(root, profile, layout, name)
    columns = COLUMNS.get(name) or precision_columns(TASKS[name], records.values())
    others = facts.usual(records.values())
    rows = [
        {
            "row": row,
            "note": note(items, others),
            "cells": {column: cell(items, column, values.get((row, published_as(name, column)))) for column in columns},
        }
        for row, items in records.items()
    ]
    remark = layout[name].get("note")
    noted = {"note": str(remark)} if remark else {}
    return {"table": name, "title": TITLES[name], **noted, "columns": list(columns), "rows": rows}


def note(records: list[metrics.Record], others: str = "") -> str:
    """What a reader has to know of a row: how far it may be used, what nobody checked, features of another size.

    Args:
        records: The row's runs.
        others: Sizes of the other rows' features.
    """
    first = records[0]
    parts = [support(records), facts.definition(first.row), facts.features(first, others)]
    return "; ".join(part for part in parts if part)


def support(records: list[metrics.Record]) -> str:
    """How far a row may be used: five seeds enter claims, three allow no ordering, one supports nothing."""
    if records[0].seed is None:
        return "control without randomness"
    if len(records) >= 5:
        return ""
    return FEW_SEEDS.get(len(records), f"n = {len(records)}: no ordering claim")


def cell(records: list[metrics.Record], column: str, published: float | None) -> dict[str, Any]:
    """Mean and sample standard deviation over the runs that have a value."""
    values = [v for v in (metrics.value(item, column) for item in records) if v is not None]
    known = [item for item in records if column in item.cells]
    return entry(
        statistics.mean(values) if values else None,
        statistics.deviation(values) if values else None,
        len(values),
        next((item.cells[column]["unit"] for item in known), ""),
        " | ".join(text.merge([facts.protocol(item, column) for item in known])),
        published,
    )


def entry(
    mean: float | None, std: float | None, n: int, unit: str, protocol: str, published: float | None = None
) -> dict[str, Any]:
    """A cell of the JSON, rounded to nine significant digits."""
    shown = [None if value is None else float(f"{value:.9g}") for value in (mean, std)]
    return {"mean": shown[0], "std": shown[1], "n": n, "unit": unit, "protocol": protocol, "published": published}


def precision_columns(task: str, rows: Iterable[list[metrics.Record]]) -> list[str]:
    """`<task>_<stat>_<variant>` of the cells present: AP, AP50, AP75 of every variant, the rest, the budget."""
    present = {name for records in rows for item in records for name in item.cells}
    names = {name for name in present if name.startswith(f"{task}_")}

    def order(name: str) -> tuple[bool, int, int, str]:
        statistic, _, variant = name.removeprefix(f"{task}_").rpartition("_")
        rank = STATISTICS.index(statistic) if statistic in STATISTICS else len(STATISTICS)
        place = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
        return rank >= 3, place, rank, name

    if not names:
        raise UserError(f"metrics: no detection run has a {task}_* cell; run the detect stages again")
    return [*sorted(names, key=order), *(name for name in metrics.BUDGET if name in present)]


def toy(content: Mapping[str, Any]) -> Table:
    """T5: a row per estimator and case, exact mutual information beside the estimate."""
    rows = []
    for case in content["detail"]["cases"]:
        count, verdict = int(case.get("banks", 1)), case.get("certified")
        cells = {
            "mi": entry(case["mi"], None, 1, "nats", "-d/2 log(1 - rho^2)"),
            "estimate": entry(case["value"], None, count, "nats", "log k - CE, optimal critic"),
            "se": entry(case.get("se"), None, count, "nats", "standard error of the estimate over independent banks"),
            "bias": entry(case.get("bias"), None, count, "nats", "estimate - mi"),
            "sd": entry(case.get("sd"), None, count, "nats", "standard deviation over redraws, averaged over anchors"),
            "certified": entry(None, None, count, BY_FORM, "a bound by its form needs no certificate")
            if case.get("bound")
            else entry(
                None if verdict is None else float(verdict), None, count, "yes/no", "estimate + 3 se <= log N - CE_full"
            ),
        }
        rows.append({"row": f"d={case['d']} ρ={case['rho']:g} {case['name']}", "cells": cells})
    return {"table": "T5", "title": TITLES["T5"], "columns": list(TOY), "rows": rows}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a table."""
    return files.read_json(Path(__file__).with_name("table.schema.json"))


def check(table: Table) -> None:
    """Refuses a table that is not of the documented form or has a cell outside its columns.

    Raises:
        UserError: Names the place in the table.
    """
    import jsonschema

    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(table))
    if problem is not None:
        raise UserError(f"table {table.get('table')}: {problem.json_path}: {problem.message}; check the metrics files")
    for row in table["rows"]:
        if set(row["cells"]) != set(table["columns"]):
            raise UserError(f"table {table['table']}: row {row['row']}: its cells are not the table's columns")


def places(layout: Mapping[str, Any]) -> dict[str, set[str]]:
    """Row -> columns under which published values may stand (see `published_as`)."""
    found: dict[str, set[str]] = {}
    for name in TITLES:
        detected = [f"{TASKS[name]}_{item}_{variant}" for item in STATISTICS for variant in VARIANTS if name in TASKS]
        columns = {published_as(name, column) for column in COLUMNS.get(name, detected)}
        for row in metrics.rows_of(layout, name):
            found.setdefault(row, set()).update(columns)
    return found


def published_as(table: str, column: str) -> str:
    """How a column is called in published/*.csv: other data sets than COCO repeat its columns."""
    return f"{table}.{column}" if table in ("T8", "T9", "T10") else column


def markdown(table: Table) -> str:
    """The table for reading in a terminal or on a forge: one Markdown table for each group of columns."""
    parts = [f"# {table['table']} {table['title']}\n", *([f"{table['note']}\n"] if "note" in table else [])]
    for heading, columns in text.groups(table):
        parts.append(f"## {heading}\n" if heading else "")
        head = ["row", *(text.heading(column, table) for column in columns), "note"]
        lines = [[row["row"], *text.cells(row, columns), row.get("note", "")] for row in table["rows"]]
        parts.append(text.pipe_table(head, lines))
    parts.append("Mean ± sample standard deviation over seeds; n/a: not measured or not defined.\n")
    return "\n".join(part for part in parts if part)


def write_claims(folder: Path, file: claims.Claims, verdicts: list[dict[str, Any]]) -> None:
    """Writes `claims.{json,md}`."""
    rules = {"alpha": file.alpha, "seeds": file.seeds, "note": file.note}
    files.write_json(folder / "claims.json", rules | {"claims": verdicts})
    files.write_text(folder / "claims.md", claims_markdown(file, verdicts))


def claims_markdown(file: claims.Claims, verdicts: list[dict[str, Any]]) -> str:
    """The verdicts as a Markdown table."""
    head = ["claim", "column", "n", "difference", "95 % interval (seeds)", "95 % interval (images)", "p (Holm)",
            "verdict"]  # fmt: skip
    lines = [text.verdict(item) for item in verdicts]
    rule = f"Paired one-sided t tests over at least {file.seeds} seeds, Holm over {len(verdicts)} claims, level "
    parts = ["# Claims", file.note, f"{rule}{file.alpha:g}.", text.pipe_table(head, lines)]
    return "\n\n".join(filter(None, parts))
