"""What the page shows besides tables: curves, the toy's figure, galleries of the data, neighbours and detections."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.report import figures, metrics, pictures, statistics, text

Exhibit = dict[str, Any]

GALLERY_ROWS = ("ring", "random")
DETECTION_ROWS = ("supervised", "ring", "ir", "random")
ANCHORS, MEMBERS, DRAWN = 6, 4, 6
CURVES = (
    ("loss", "loss (nats)", "Training loss"),
    ("estimate", "estimate (nats)", "Estimate of the training objective; thin lines are its caps"),
    ("knn1_val", "1-NN on val (%)", "Nearest-neighbour accuracy on validation images"),
)
DATA = {"images": "desk", "scenes": "scenes"}
"""What a layout without `data` shows."""
SIMPLIFIED = (("ir_nce", "ir"), ("la", "cave"), ("cmc_nce", "cmc"))
"""An objective as its authors' code has it, and the simplified one."""


def curves(root: Path, profile: str, layout: Mapping[str, Any]) -> Exhibit:
    """Training curves, means over seeds: `{figures: [{name, svg, caption}], legend: [(row, swatch)]}`."""
    rows = {row: [history(root, profile, run) for run in runs] for row, runs in metrics.rows_of(layout, "T1").items()}
    rows = {row: lines for row, lines in rows.items() if any(lines)}
    shown = []
    for key, label, caption in CURVES:
        series = {row: points for row, lines in rows.items() if (points := average(lines, key))}
        caps = {row: points for row in series if key == "estimate" and (points := average(rows[row], "cap"))}
        if series:
            name = f"curve-{key}"
            svg = figures.curves(name, label, series, list(rows), caps)
            shown.append({"name": name, "svg": svg, "caption": caption})
    shown += _pairs(rows)
    return {"figures": shown, "legend": [(row, figures.swatch(place)) for place, row in enumerate(rows)]}


def _pairs(rows: Mapping[str, list[list[dict[str, Any]]]]) -> list[Exhibit]:
    """Nearest-neighbour accuracy along the epochs, a panel for each pair that was trained."""
    panels = [panel for pair in SIMPLIFIED if len(panel := _panel(rows, pair)) == len(pair)]
    if not panels:
        return []
    svg = figures.pairs("curve-pairs", "1-NN on val (%)", panels, list(rows))
    caption = "Objectives as their authors' code has them beside the simplified ones: mean and every seed"
    return [{"name": "curve-pairs", "svg": svg, "caption": caption}]


def _panel(
    rows: Mapping[str, list[list[dict[str, Any]]]], pair: tuple[str, str]
) -> dict[str, list[list[tuple[float, float]]]]:
    """Of each row that was trained and watched the mean over seeds, and then the seeds."""
    panel = {}
    for row in pair:
        seeds = [points for seed in rows.get(row, []) if (points := average([seed], "knn1_val"))]
        if seeds:
            panel[row] = [average(rows[row], "knn1_val"), *seeds]
    return panel


def history(root: Path, profile: str, run: str) -> list[dict[str, Any]]:
    """The lines of a run's history.jsonl; empty when the run was not trained.

    Raises:
        UserError: A line is not JSON.
    """
    path = root / "runs" / profile / "pretrain" / run / "history.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: a line is not JSON ({error}); run the pretraining stage again") from error


def average(lines: list[list[dict[str, Any]]], key: str) -> list[tuple[float, float]]:
    """Mean over seeds per epoch of a logged value, epochs without one left out."""
    values: dict[float, list[float]] = {}
    for seed in lines:
        for line in seed:
            if line.get(key) is not None:
                values.setdefault(line["epoch"], []).append(line[key])
    return [(epoch, statistics.mean(values[epoch])) for epoch in sorted(values)]


def dots(root: Path, profile: str, layout: Mapping[str, Any]) -> list[Exhibit]:
    """The dot plot of T1's primary column."""
    records = metrics.records(root, profile, layout, "T1")
    measured = {column: _measured(records, column) for column in metrics.PRIMARY}
    column = next((column for column, rows in measured.items() if rows.keys() - set(metrics.CONTROLS)), None)
    if column is None:
        return []
    protocol = text.NAMES[column].removeprefix("linear, ")
    caption = f"Linear top-1 ({protocol}): every seed, mean and 95 % t interval; hollow: fewer than five seeds"
    svg = figures.dots("dots-linear", "test top-1 (%)", measured[column])
    return [{"name": "dots-linear", "svg": svg, "caption": caption}]


def _measured(records: Mapping[str, list[metrics.Record]], column: str) -> dict[str, list[float]]:
    """The values of every row that has some."""
    found = {row: [metrics.value(item, column) for item in items] for row, items in records.items()}
    known = {row: [value for value in values if value is not None] for row, values in found.items()}
    return {row: values for row, values in known.items() if values}


def toy(root: Path, profile: str) -> list[Exhibit]:
    """One bias/deviation figure for each case of the Gaussian toy."""
    path = root / "metrics" / profile / "toy.json"
    if not path.exists():
        return []
    shown: list[Exhibit] = []
    cases: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for case in metrics.read(path)["detail"]["cases"]:
        cases.setdefault((case["d"], case["rho"]), []).append(case)
    for (d, rho), items in cases.items():
        name = f"toy-{len(shown)}"
        caption = f"d = {d}, ρ = {rho:g}, exact MI {items[0]['mi']:.3f} nats: bias with 3 standard errors, redraw sd"
        shown.append({"name": name, "svg": figures.toy(name, items), "caption": caption})
    return shown


def split_of(root: Path, layout: Mapping[str, Any], kind: str, split: str) -> Any:
    """An opened split of the layout's data (`data: {images: desk, scenes: scenes}`); None when it has none such."""
    import mirepro.data.shards as shards

    name = (layout.get("data") or DATA).get(kind)
    return shards.open(root / "data" / name, split) if name and (root / f"data/{name}/manifest.json").exists() else None


def label_of(split: Any, index: int) -> str:
    """The class name of a sample."""
    label = int(split.labels[index])
    return str(split.classes[label]) if 0 <= label < len(split.classes) else ""


def samples(split: Any, count: int = 40) -> list[Exhibit]:
    """Evenly spaced images of a split with their class names."""
    if split is None:
        return []
    total = len(split.labels)
    chosen = [place * total // count for place in range(min(count, total))]
    return [{"uri": pictures.uri(split.image(i)), "label": label_of(split, i)} for i in chosen]


def scenes(split: Any, count: int = DRAWN) -> list[Exhibit]:
    """Scenes with their annotations drawn."""
    if split is None:
        return []
    size, objects = split.image(0).shape[-1], split.objects_at(split.image(0).shape[-1])
    return [
        {"uri": pictures.uri(split.image(i, size)), "size": size, "marks": pictures.truth(objects[i])}
        for i in range(min(count, split.size))
    ]


def galleries(root: Path, profile: str, layout: Mapping[str, Any]) -> list[Exhibit]:
    """Anchors with members of their ball and of their ring, for the rows that tell most."""
    shown = []
    rows = metrics.rows_of(layout, "T1")
    for row in GALLERY_ROWS:
        path = root / "runs" / profile / "evaluate" / f"{(rows.get(row) or [''])[0]}" / "gallery.json"
        if path.exists():
            content = files.read_json(path)
            split = split_of(root, layout, "images", content["split"])
            if split is not None:
                shown.append({"row": row, "run": rows[row][0], "anchors": _anchors(split, content)})
    return shown


def _anchors(split: Any, content: Mapping[str, Any]) -> list[Exhibit]:
    def tile(index: int, anchor: int) -> Exhibit:
        same = int(split.labels[index]) == int(split.labels[anchor])
        return {"uri": pictures.uri(split.image(index)), "label": label_of(split, index), "same": same}

    return [
        {
            "anchor": tile(item["index"], item["index"]),
            "ball": [tile(i, item["index"]) for i in item["ball"][:MEMBERS]],
            "ring": [tile(i, item["index"]) for i in item["ring"][:MEMBERS]],
        }
        for item in content["anchors"][:ANCHORS]
    ]


def detections(root: Path, profile: str, layout: Mapping[str, Any]) -> Exhibit | None:
    """Test images, once, and on them the truth and what some rows found; None without detection runs."""
    found = []
    for table, model in (("T2", "mask"), ("T4", "keypoint")):
        rows = metrics.rows_of(layout, table)
        for row in DETECTION_ROWS:
            path = root / "runs" / profile / "detect" / f"{(rows.get(row) or [''])[0]}-{model}" / "detections.json"
            if path.exists():
                found.append((f"{row}, {'boxes and masks' if model == 'mask' else 'keypoints'}", files.read_json(path)))
    split = split_of(root, layout, "scenes", found[0][1]["split"]) if found else None
    if split is None:
        return None
    size = side(found, split)
    chosen, objects = [item["index"] for item in found[0][1]["images"][:DRAWN]], split.objects_at(size)
    shown = [{"title": "annotation", "cells": [{"marks": pictures.truth(objects[i]), "text": ""} for i in chosen]}]
    for title, content in found:
        by_index = {item["index"]: item for item in content["images"]}
        shown.append({"title": title, "cells": [_detected(by_index.get(i), split.categories) for i in chosen]})
    return {"size": size, "images": [pictures.uri(split.image(i, size)) for i in chosen], "rows": shown}


def side(found: list[tuple[str, Any]], split: Any) -> int:
    """The image side, in pixels, that the detections refer to: as recorded, by a mask, else that of the images."""
    for _, content in found:
        masks = [mask for image in content["images"] for mask in image.get("masks") or []]
        if "size" in content or masks:
            return int(content.get("size") or masks[0]["size"][0])
    return int(split.image(0).shape[-1])


def _detected(image: Mapping[str, Any] | None, categories: list[str]) -> Exhibit:
    if image is None:
        return {"marks": "", "text": "not drawn"}
    names = [categories[k] if 0 <= k < len(categories) else str(k) for k in image["labels"]]
    text = ", ".join(f"{name} {score:.2f}" for name, score in zip(names, image["scores"], strict=True))
    return {"marks": pictures.found(image), "text": text or "nothing"}
