"""What the page shows besides tables: curves, the toy's figure, galleries of the data, neighbours and detections."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.report import figures, metrics, pictures, statistics, text

Exhibit = dict[str, Any]

DETECTION_ROWS = ("supervised", "ring", "ir", "random")
ANCHORS, MEMBERS, DRAWN, FINDS = 6, 4, 6, 8
TILE, SCENE = 32, 64
"""Largest sides of samples and of scenes, in pixels: the desk's. With them ImageNet's page fits its limit."""
CURVES = (
    ("loss", "loss (nats)", "Training loss"),
    ("estimate", "estimate (nats)", "Estimate of the training objective; thin lines are its caps"),
    ("knn1_val", "1-NN on val (%)", "Nearest-neighbour accuracy on validation images"),
)
DATA = {"images": "desk", "scenes": "scenes"}
"""What a layout without `data` shows."""
PASSED_ON = ("desk", "scenes", "cifar10", "cifar100")
"""Data sets whose pictures a page in git may show: rendered here, or no terms keep anyone from passing them on (see
`data.catalogue`). Those of any other are withheld."""
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


def data_of(layout: Mapping[str, Any]) -> dict[str, str]:
    """The layout's data sets by kind: `{images: desk, scenes: scenes}`."""
    return dict(DATA if layout.get("data") is None else layout["data"])


def withheld(layout: Mapping[str, Any]) -> list[str]:
    """The layout's data sets whose pictures no page in git may show."""
    return [name for name in data_of(layout).values() if name not in PASSED_ON]


def public(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The layout without the data sets whose pictures are withheld."""
    return {**layout, "data": {kind: name for kind, name in data_of(layout).items() if name in PASSED_ON}}


def split_of(root: Path, layout: Mapping[str, Any], kind: str, split: str) -> Any:
    """An opened split of the layout's data of a kind, images or scenes; None when it has none such."""
    import mirepro.data.shards as shards

    name = data_of(layout).get(kind)
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
    return [tile(split, i) for i in chosen]


def tile(split: Any, index: int) -> Exhibit:
    """A small picture of a sample, and its class name."""
    return {"uri": pictures.uri(pictures.thumbnail(split.image(index), TILE)), "label": label_of(split, index)}


def scenes(split: Any, count: int = DRAWN) -> list[Exhibit]:
    """Scenes with their annotations drawn."""
    if split is None:
        return []
    size, objects = min(split.image(0).shape[-1], SCENE), split.objects
    return [scene(split.image(i), objects[i], size) for i in range(min(count, split.size))]


def scene(image: Any, objects: list[dict[str, Any]], size: int) -> Exhibit:
    """An image `(3, H, W)` as the square that detectors see, and its annotations."""
    uri = pictures.uri(pictures.resized(image, size, size))
    return {"uri": uri, "size": size, "marks": pictures.marks(objects, image.shape[1:], size)}


def galleries(root: Path, profile: str, layout: Mapping[str, Any]) -> list[Exhibit]:
    """Anchors with members of their ball and of their ring: for `ring`, or else the first trained row, and `random`."""
    shown = []
    rows = metrics.rows_of(layout, "T1")
    trained = [row for row in ("ring", *rows) if rows.get(row) and row != "random"]
    for row in (*trained[:1], "random"):
        path = root / "runs" / profile / "evaluate" / f"{(rows.get(row) or [''])[0]}" / "gallery.json"
        if path.exists():
            content = files.read_json(path)
            split = split_of(root, layout, "images", content["split"])
            if split is not None:
                anchors, labelled = _anchors(split, content), bool((split.labels >= 0).any())
                shown.append({"row": row, "run": rows[row][0], "anchors": anchors, "labelled": labelled})
    return shown


def _anchors(split: Any, content: Mapping[str, Any]) -> list[Exhibit]:
    def member(index: int, anchor: int) -> Exhibit:
        one, other = int(split.labels[index]), int(split.labels[anchor])
        return tile(split, index) | {"same": one == other >= 0}  # images without a label have -1

    return [
        {
            "anchor": tile(split, item["index"]),
            "ball": [member(i, item["index"]) for i in item["ball"][:MEMBERS]],
            "ring": [member(i, item["index"]) for i in item["ring"][:MEMBERS]],
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
    frame, objects = side(found, split), split.objects
    size, chosen = min(frame, SCENE), [item["index"] for item in found[0][1]["images"][:DRAWN]]
    drawn = [scene(split.image(i), objects[i], size) for i in chosen]
    shown = [{"title": "annotation", "cells": [{"marks": item["marks"], "text": ""} for item in drawn]}]
    for title, content in found:
        by_index = {item["index"]: item for item in content["images"]}
        cells = [_detected(by_index.get(i), split.categories, frame, size) for i in chosen]
        shown.append({"title": title, "cells": cells})
    return {"size": size, "finds": FINDS, "images": [item["uri"] for item in drawn], "rows": shown}


def side(found: list[tuple[str, Any]], split: Any) -> int:
    """The image side, in pixels, that the detections refer to: as recorded, by a mask, else that of the images."""
    for _, content in found:
        masks = [mask for image in content["images"] for mask in image.get("masks") or []]
        if "size" in content or masks:
            return int(content.get("size") or masks[0]["size"][0])
    return int(split.image(0).shape[-1])


def _detected(image: Mapping[str, Any] | None, categories: list[str], frame: int, size: int) -> Exhibit:
    """The best finds of an image, which come with falling scores."""
    if image is None:
        return {"marks": "", "text": "not drawn"}
    names = [categories[k] if 0 <= k < len(categories) else str(k) for k in image["labels"][:FINDS]]
    text = ", ".join(f"{name} {score:.2f}" for name, score in zip(names, image["scores"], strict=False))
    return {"marks": pictures.marks(pictures.finds(image)[:FINDS], (frame, frame), size), "text": text or "nothing"}
