"""One self-contained page: `reports/<profile>/index.html`, byte-identical for equal inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.report import claims, exhibits, facts, metrics, tables, text

LIMIT = 2_000_000
EXPLANATIONS = {
    "T1": "Frozen encoders on test images. Controls need no training: what they reach needs no learning.",
    "T2": "Fine-tuned on images that pretraining did not see. Every row has the same recipe and learning-rate grid.",
    "T3": "The same models as the boxes.",
    "T4": "OKS with the standard deviations stated in the protocol.",
    "T5": "The exact value is known here, so the bias of every estimator can be read off. A ring may exceed it.",
    "T6": "One run for each setting: where negatives come from. Nothing here supports a claim.",
    "T7": "One run for each setting: which augmentations are on. Nothing here supports a claim.",
    "T8": "COCO's evaluation, and VOC's own at IoU .5 (VOC07: 11 recalls, VOC10: area); difficult objects are ignored.",
    "T9": "Federated evaluation: a category counts where it was looked for; r, c, f: rare, common, frequent.",
    "T10": "The same models as the boxes.",
}
MARKS = {
    "no ordering": ("*", "fewer than five seeds: no ordering claim"),
    "supports no": ("†", "a single run: supports no claim"),
    "control": ("–", "control without randomness"),
}
"""By a word of the note: mark of a row's number of runs, and its meaning."""
ROW_MARKS = {"unverified": ("‡", "definition unverified (see Deviations)"), "features": ("§", "")}
"""Likewise, marks of a row's name; without a meaning the note's own words stand."""


def build(
    root: Path, profile: str, layout: Mapping[str, Any], key: Mapping[str, Any], view: Mapping[str, Any] | None
) -> Path:
    """Writes the page and returns its path.

    Args:
        root: Folder that holds metrics/, tables/, runs/, data/ and reports/.
        profile: Name of the profile.
        layout: The `tables` mapping of params.yaml.
        key: Determinism key to print.
        view: What differs between machines (environment, durations, lock hash): the page then goes to view/<profile>/,
            out of git, and shows pictures that must not be passed on as well.

    Raises:
        UserError: An input is missing or broken, or the page would exceed its size limit.
    """
    content = render(context(root, profile, layout, key, view))
    if len(content.encode()) > LIMIT:
        raise UserError(f"report: {len(content.encode())} bytes exceed {LIMIT}; show fewer images (report/exhibits.py)")
    path = root / ("reports" if view is None else "view") / profile / "index.html"
    files.write_text(path, content)
    return path


def context(
    root: Path, profile: str, layout: Mapping[str, Any], key: Mapping[str, Any], view: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything the template shows."""
    folder = root / "tables" / profile
    made = {
        name: files.read_json(folder / f"{name}.json") for name in tables.TITLES if _part(root, profile, layout, name)
    }
    for table in made.values():
        tables.check(table)
    judged = files.read_json(folder / "claims.json")
    deviations = tables.find(root, "docs/deviations.md")
    shown = exhibits.public(layout) if view is None else layout
    return {
        "profile": profile,
        "command": "make repro" if profile == "desk" else f"mirepro repro --profile {profile}",
        "cards": cards(made, judged),
        "tables": [present(table) for table in made.values()],
        "published": any(published(table) for table in made.values()),
        "judged": judged,
        "verdicts": [(text.verdict(item), item["verdict"].replace(" ", "-")) for item in judged["claims"]],
        "plots": exhibits.dots(root, profile, layout) if "T1" in made else [],
        "curves": exhibits.curves(root, profile, layout),
        "toy": exhibits.toy(root, profile),
        "galleries": exhibits.galleries(root, profile, shown),
        "samples": exhibits.samples(exhibits.split_of(root, shown, "images", "train")),
        "scenes": exhibits.scenes(exhibits.split_of(root, shown, "scenes", "train")),
        "detections": exhibits.detections(root, profile, shown),
        "withheld": exhibits.withheld(layout) if view is None else [],
        "deviations": text.read_pipe_table(deviations.read_text(encoding="utf-8")) if deviations.exists() else [],
        "key": flat(key),
        "view": {title.replace("_", " "): flat(part) for title, part in (view or {}).items()},
    }


def _part(root: Path, profile: str, layout: Mapping[str, Any], name: str) -> bool:
    """Whether a table belongs to the profile (the toy needs no layout)."""
    return bool(layout.get(name)) or (name == "T5" and (root / "metrics" / profile / "toy.json").exists())


def render(content: Mapping[str, Any]) -> str:
    """Fills the template; every value is escaped unless the template says otherwise."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["inline"] = text.inline
    return environment.get_template("page.html.j2").render(content).rstrip("\n") + "\n"


def present(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table as the template wants it: texts by group of columns, marks for few seeds, protocols by column."""
    parts = []
    for heading, columns in text.groups(table):
        lines = [
            {"row": row["row"], "marks": marks(row), "n": seeds(row), "cells": text.cells(row, columns)}
            for row in table["rows"]
        ]
        parts.append({"heading": heading, "head": [text.heading(c, table) for c in columns], "lines": lines})
    return {
        "name": table["table"], "title": table["title"], "parts": parts,
        "text": " ".join(filter(None, (EXPLANATIONS.get(table["table"]), table.get("note")))),
        "counted": any("note" in row for row in table["rows"]), "protocols": protocols(table),
        "notes": legend(table), "meanings": meanings(table),
    }  # fmt: skip


def meanings(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(column, what it is) of those whose name does not say it; T5's protocols do."""
    if table["table"] == "T5":
        return []
    return [(text.NAMES[name], facts.MEANINGS[name]) for name in table["columns"] if name in facts.MEANINGS]


def legend(table: Mapping[str, Any]) -> list[str]:
    """Every mark of the table with its meaning."""
    parts = dict.fromkeys(part for row in table["rows"] for part in row.get("note", "").split("; "))
    lines = [
        f"{mark} {meaning or part}"
        for word, (mark, meaning) in (MARKS | ROW_MARKS).items()
        for part in parts
        if word in part
    ]
    return list(dict.fromkeys(lines))


def marks(row: Mapping[str, Any]) -> str:
    """The marks of the row's name."""
    return "".join(mark for word, (mark, _) in ROW_MARKS.items() if word in row.get("note", ""))


def seeds(row: Mapping[str, Any]) -> str:
    """The row's number of runs with the mark of its note."""
    note = row.get("note", "")
    mark = next((mark for word, (mark, _) in MARKS.items() if word in note), "")
    return mark if mark == "–" else f"{max(cell['n'] for cell in row['cells'].values())}{mark}"


def protocols(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(columns, protocol); columns of equal protocol share a line, a detector's numbers go by its variant."""
    lines: dict[str, dict[str, None]] = {}
    for column in table["columns"]:
        detected = table["table"] in tables.TASKS
        name = column.rpartition("_")[2] if detected else text.heading(column, table)
        for protocol in text.merge([row["cells"][column]["protocol"] for row in table["rows"]]):
            lines.setdefault(protocol, {})[name] = None
    return [("; ".join(names), protocol) for protocol, names in lines.items()]


def published(table: Mapping[str, Any]) -> bool:
    """Whether any cell stands beside a transcribed value."""
    return any(cell["published"] is not None for row in table["rows"] for cell in row["cells"].values())


def cards(made: Mapping[str, Any], judged: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline: (what, number, explanation)."""
    verdicts = [item["verdict"] for item in judged["claims"]]
    count = verdicts.count(claims.SUPPORTED)
    open_ones = verdicts.count(claims.SEEDS)
    rest = f"{verdicts.count(claims.REJECTED)} not supported" + (
        f", {open_ones} without enough seeds" if open_ones else ""
    )
    result = [("Claims supported", f"{count} of {len(verdicts)}", rest)] if verdicts else []
    for name, columns, what in (
        ("T1", metrics.PRIMARY, "Linear top-1"),
        ("T2", ("box_AP50_tuned",), "Box AP50"),
        ("T3", ("mask_AP50_tuned",), "Mask AP50"),
        ("T4", ("keypoint_AP50_tuned",), "Keypoint AP50"),
    ):
        known = [column for column in columns if name in made and column in made[name]["columns"]]
        result += next(filter(None, (best(made[name], column, what) for column in known)), [])
    return result


def best(table: Mapping[str, Any], column: str, what: str) -> list[tuple[str, str, str]]:
    """The highest row trained without labels, of those with enough seeds if there are any, beside the references."""
    rows = {row["row"]: row["cells"][column] for row in table["rows"] if row["cells"][column]["mean"] is not None}
    learned = {
        row["row"]: rows[row["row"]]
        for row in table["rows"]
        if row["row"] in rows and row["row"] not in ("random", "supervised") and "control" not in row.get("note", "")
    }
    if not learned:
        return []
    notes = {row["row"]: row.get("note", "") for row in table["rows"]}
    firm = [row for row in learned if not any(word in notes[row] for word in ("no ordering", "supports no"))]
    top = max(firm or learned, key=lambda row: learned[row]["mean"])
    beside = [f"{row}\u00a0{joined(text.cell(rows[row], column))}" for row in ("random", "supervised") if row in rows]
    of = f"of {learned[top]['n']} seeds" if firm else notes[top].partition(";")[0]
    explanation = f"highest trained without labels ({of}): {top}" + (f"; {', '.join(beside)}" if beside else "")
    return [(f"{what} (%)", joined(text.cell(learned[top], column)), explanation)]


def joined(number: str) -> str:
    """Keeps a number and its deviation on one line."""
    return number.replace(" ", "\u00a0")


def flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain values as (dotted key, text) pairs."""
    if not isinstance(values, Mapping):
        return [(prefix or "value", str(values))]
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        pairs += flat(value, f"{prefix}.{name}" if prefix else str(name))
    return pairs
