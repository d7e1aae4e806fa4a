"""report.html: one self-contained page of an audit; every text of the source is escaped, nothing is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirepro.audit import integrity, recompute, verdicts
from mirepro.report import page, tables, text

MARKS = {
    verdicts.EXACT: "=", verdicts.EQUIVALENT: "≈", verdicts.CONSISTENT: "~", verdicts.INCONCLUSIVE: "?",
    verdicts.DIVERGED: "≠", verdicts.MISSING: "∅", verdicts.FAILED: "!",
}  # fmt: skip
LEVELS = {
    0: "verified: digests, locks and signature",
    1: "tables recomputed from the committed metrics; nothing was re-run",
    2: "evaluations re-run from the committed checkpoints",
    3: "trained and evaluated again",
}
LISTED = 200


def render(report: Mapping[str, Any], key: str | None) -> str:
    """The page.

    Args:
        report: The content of report.json.
        key: Id of the key that signs the audit; None where nothing is signed.
    """
    import jinja2

    folders = [Path(__file__).with_name("templates"), Path(page.__file__).with_name("templates")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    content = environment.get_template("audit.html.j2").render(context(report, key))
    return content.rstrip("\n") + "\n"


def context(report: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    """Everything the template shows."""
    cells = report["cells"]
    names = list(dict.fromkeys(cell["table"] for cell in cells))
    return {
        "report": report,
        "level": LEVELS[report["level"]],
        "marks": MARKS, "meanings": verdicts.MEANINGS,
        "overview": [(name, _share(report["counts"].get(name, 0), len(cells))) for name in verdicts.LADDER],
        "matrix": [(name, count([cell for cell in cells if cell["table"] == name])) for name in names],
        "tables": [present(name, [cell for cell in cells if cell["table"] == name]) for name in names],
        "claims": [(claim, recompute.claim_verdict(claim)) for claim in report["claims"]],
        "papers": [cell for cell in cells if cell["paper"]],
        "untranscribed": sum(cell["paper"] is None for cell in cells),
        "departures": departures(report["key"]),
        "graph": graph(report),
        "key": page.flat(report["key"]["here"]), "pinned": page.flat(report["key"]["pinned"]),
        "rules": report["policy"]["content"].get("rules", []),
        "signed": key,
    }  # fmt: skip


def departures(key: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(library, version here, version that the source pins) wherever both are known and differ."""
    here, pinned = key["here"].get("versions", {}), key["pinned"]
    return [(name, here[name], pinned[name]) for name in sorted(here.keys() & pinned) if here[name] != pinned[name]]


def _share(number: int, total: int) -> dict[str, Any]:
    return {"count": number, "percent": round(100 * number / total, 2) if total else 0}


def count(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Cells by verdict."""
    return {name: sum(cell["verdict"] == name for cell in cells) for name in verdicts.LADDER}


def present(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table as the template wants it: groups of columns, and reasons, equal ones together."""
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    placed = {(cell["row"], cell["column"]): cell for cell in cells}
    shaped = {"table": name, "columns": columns, "rows": [
        {"row": row, "cells": {column: _content(placed.get((row, column))) for column in columns}} for row in rows
    ]}  # fmt: skip
    parts = [
        {"heading": heading, "head": [(c, text.heading(c, shaped)) for c in group], "lines": [
            (row, [_shown(placed.get((row, column)), column) for column in group]) for row in rows
        ]}
        for heading, group in text.groups(shaped)
    ]  # fmt: skip
    reasons = grouped(cells)
    return {
        "name": name, "title": tables.TITLES.get(name, ""), "parts": parts,
        "levels": sorted({cell["level"] for cell in cells}),
        "reasons": reasons[:LISTED], "more": max(0, len(reasons) - LISTED), "counts": count(cells),
    }  # fmt: skip


def grouped(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each verdict and reason once, worst first, with the cells that share it; of EXACT ones only their number."""
    shared: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        shared.setdefault((cell["verdict"], cell["reason"]), []).append(f"{cell['row']} / {cell['column']}")
    order = sorted(shared, key=lambda pair: verdicts.LADDER.index(pair[0]), reverse=True)
    return [
        {"verdict": name, "reason": reason, "cells": [] if name == verdicts.EXACT else shared[name, reason],
         "count": len(shared[name, reason])} for name, reason in order
    ]  # fmt: skip


def _content(cell: Mapping[str, Any] | None) -> dict[str, Any]:
    committed = cell["committed"] if cell else {"mean": None, "std": None, "n": 0}
    return {**committed, "unit": cell["unit"] if cell else "", "published": None}


def _shown(cell: Mapping[str, Any] | None, column: str) -> dict[str, Any] | None:
    """One cell: its number, verdict and reason."""
    if cell is None:
        return None
    again = cell["rerun_mean"]
    return {
        "text": text.cell(_content(cell), column), "verdict": cell["verdict"], "mark": MARKS[cell["verdict"]],
        "reason": cell["reason"], "level": cell["level"], "runs": cell["runs"], "rerun": cell["rerun"],
        "again": None if again is None else text.number(again, cell["unit"], column),
    }  # fmt: skip


def graph(report: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """Provenance from left to right: columns of boxes with a state each."""
    states = {check["name"]: check["status"] for check in report["checks"]}
    stages: dict[str, list[bool]] = {}
    for item in report["stages"]:
        good = not item["error"] and item["metrics_identical"] and item["outputs_identical"] is not False
        stages.setdefault(item["stage"].partition("@")[0], []).append(good)

    def box(name: str, state: str, words: str) -> dict[str, str]:
        return {"name": name, "state": state.replace(" ", "-"), "words": words}

    def again(kind: str) -> dict[str, str]:
        found = stages.get(kind, [])
        state = integrity.UNKNOWN if not found else integrity.PASS if all(found) else integrity.FAIL
        return box(kind, state, f"{sum(found)} of {len(found)} re-runs identical" if found else "not re-run")

    def looked(name: str, *checks: str) -> dict[str, str]:
        found = [states.get(check, integrity.UNKNOWN) for check in checks]
        order = (integrity.FAIL, integrity.UNKNOWN, integrity.PASS)
        state = min(found, key=order.index)
        return box(name, state, {integrity.PASS: "fits", integrity.FAIL: "does not fit"}.get(state, "not checked"))

    return [
        [looked("code", "code"), looked("data", "data"), looked("parameters", "parameters")],
        [again("pretrain")],
        [again("evaluate"), again("detect"), again("controls"), again("toy")],
        [looked("metrics", "metrics")],
        [looked("tables", "tables recomputed"), looked("report", "report recomputed")],
    ]
