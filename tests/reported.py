"""A synthetic tree of everything the report reads, for its tests."""

import json
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirepro import files
from mirepro.report import tables

SEEDED = {"ir": (34.0, 5), "ball": (35.0, 5), "ring": (36.0, 5), "la": (33.0, 5), "cmc": (38.0, 5),
          "ir_nce": (33.5, 3), "cave": (34.4, 3), "cave_numerator": (30.3, 3), "cmc_nce": (36.0, 3),
          "cmc_ball": (37.0, 3), "cmc_ring": (37.5, 3), "ball_annealed": (35.5, 3),
          "random": (14.0, 5), "supervised": (61.0, 3)}  # fmt: skip
DETECTED = ("random", "supervised", "ir", "ball", "ring", "la", "cmc")
SETTINGS = {"T6": ("u=1", "u=.1", "u=.01"), "T7": ("all", "none")}
LAYOUT = {
    "T1": {"rows": {row: [f"{row}-s{seed}" for seed in range(n)] for row, (_, n) in SEEDED.items()}},
    **{name: {"rows": {row: [f"{row}-s0"] for row in DETECTED}} for name in ("T2", "T3", "T4")},
    **{name: {"rows": {row: [f"{name}-{row}-s0"] for row in rows}} for name, rows in SETTINGS.items()},
}
KEY = {"tier": "portable", "threads": 1, "isa": "avx2", "torch": "2.14.1"}


def noise(*parts: object) -> float:
    """A fixed number in [-1, 1) that depends on the parts only."""
    return zlib.crc32(repr(parts).encode()) / 2**31 - 1


def cells(unit: str, protocol: str, **values: float | None) -> dict:
    return {name: {"value": value, "unit": unit, "protocol": protocol} for name, value in values.items()}


def metrics_file(root: Path, stage: str, run: str, content: dict, detail: dict | None = None) -> None:
    row, seed = run.rsplit("-s", 1)
    head = {"schema": "mirepro.metrics/1", "stage": stage, "run": run, "row": row, "seed": int(seed)}
    files.write_json(root / f"metrics/desk/{stage}/{run}.json", {**head, "cells": content, "detail": detail or {}})


def evaluated(row: str) -> dict:
    """The detail of an evaluation: two encoders of CMC have more features than one of the others."""
    flat, pool = (704, 176) if row.startswith("cmc") else (512, 128)
    grid = {kind: {"0.1": 30.0, "1.0": 31.0, "10.0": 29.0} for kind in ("flat", "pool")}
    return {"features": {"flat": flat, "pool": pool}, "grid": grid, "trials": 3}


def write_run(root: Path, row: str, run: str, level: float) -> None:
    top = level + noise(run)
    columns = (*tables.ACCURACY[:2], *tables.ACCURACY[2:])
    accuracy = {column: round(top - 1.3 * place, 3) for place, column in enumerate(columns)}
    protocol = "frozen encoder; L2 chosen on val"
    metrics_file(root, "evaluate", run, cells("%", protocol, **accuracy), evaluated(row))
    correct = np.array([noise(run, i) < accuracy["linear_flat"] / 50 - 1 for i in range(200)])
    answers = {"linear_flat": np.packbits(correct).tobytes().hex(), "n": 200}
    files.write_json(root / f"runs/desk/evaluate/{run}/test.json", answers)
    if row in ("random", "supervised"):
        return
    nats = cells("nats", "training anchors", estimate=3 + noise(run, 1), cap=6.23, nce_at_equal_f=4.1, mi_views=2.2)
    shares = cells("%", "last epoch", certified_share=0.0 if row == "ring" else None, fallback_share=None)
    budget = cells("count", "whole run", images_seen=30720, parameters=312_000)
    metrics_file(root, "pretrain", run, {**nats, **shares, **budget})
    lines = [
        {"epoch": e, "step": 24 * e, "loss": 5 - e / 3 + noise(run, e) / 9, "estimate": e / 3, "cap": 6.23,
         "lr": 0.03, "knn1_val": 10 + 2 * e} for e in range(1, 11)
    ]  # fmt: skip
    path = root / f"runs/desk/pretrain/{run}/history.jsonl"
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_detection(root: Path, row: str, run: str) -> None:
    level = {"random": 22.0, "supervised": 44.0}.get(row, 31.0)
    for model, task in (("mask", "box"), ("mask", "mask"), ("keypoint", "keypoint")):
        names = ["AP", "AP50", "AP75", "APl", "AR100"] + ([] if task == "keypoint" else ["APs"])
        content = {f"{task}_{s}_{v}": (-1.0 if s == "APs" else level + 20 * (s == "AP50") + noise(run, s, v))
                   for s in names for v in tables.VARIANTS}  # fmt: skip
        path = root / f"metrics/desk/detect/{run}-{model}.json"
        known = files.read_json(path)["cells"] if path.exists() else {}
        merged = {**known, **cells("%", "torchvision recipe, lr chosen on val", **content)}
        grid = {"0.002": {"score": 1.0}, "0.008": {"score": 3.0}, "0.004": {"score": 2.0}}
        detail = {"grid": grid, "trials": 3, "oks_sigmas": [0.05] * 5 if model == "keypoint" else [],
                  "images_seen": {"tuned": 1600, "long": 3200}, "parameters": 267_141}  # fmt: skip
        head = {"schema": "mirepro.metrics/1", "run": run, "row": row, "seed": 0}
        files.write_json(path, {**head, "cells": merged, "detail": detail})
    rle = {"size": [64, 64], "counts": [64 * 10 + 10, *([20, 44] * 19), 20, 64 * 35 - 30]}
    points = [[12.0, 14.0], [20.0, 20.0]]
    images = [{"index": i, "boxes": [[10, 10, 20, 20]], "scores": [0.91], "labels": [i % 3], "masks": [rle],
               "keypoints": [points]} for i in range(12)]  # fmt: skip
    for model in ("mask", "keypoint"):
        files.write_json(root / f"runs/desk/detect/{run}-{model}/detections.json", {"split": "test", "images": images})


def write_rest(root: Path) -> None:
    rows = {name: cells("%", "no training", linear_flat=v, knn_1=v - 1) for name, v in
            {"hog": 19.0, "pixels": 12.0, "colour": 1.2, "area_position": 1.4}.items()}  # fmt: skip
    files.write_json(root / "metrics/desk/controls.json", {"schema": "mirepro.metrics/1", "rows": rows})
    estimators = {"nce_16": -0.94, "nce_256": -0.18, "nce_4096": -0.02, "ball_.5": -0.79, "ball_.1": -2.2,
                  "ball_.01": -3.9, "ring_1_.1": 1.18, "ring_.1_.01": -1.49}  # fmt: skip
    cases = [{"d": d, "rho": 0.5, "mi": 0.1438 * d, "name": name, "value": 0.1438 * d + bias, "se": 0.004, "bias": bias,
              "sd": 0.3 + bias / 20, "certified": bias < 0 if "r" in name else None}
             for d in (5, 20) for name, bias in estimators.items()]  # fmt: skip
    files.write_json(root / "metrics/desk/toy.json", {"schema": "mirepro.metrics/1", "detail": {"cases": cases}})
    anchors = [
        {"index": i, "ball": [i + 1, i + 9, i + 96, i + 4], "ring": [i + 7, i + 30, i + 50, i + 60]} for i in range(8)
    ]
    for run in ("ring-s0", "random-s0"):
        files.write_json(root / f"runs/desk/evaluate/{run}/gallery.json", {"split": "train", "anchors": anchors})
    for name in ("desk", "scenes"):
        files.write_json(root / f"data/{name}/manifest.json", {})


def fake_open(folder: Path, split: str) -> types.SimpleNamespace:
    """Stands for `data.shards.open`: images with a gradient and a square."""
    scenes, count = folder.name == "scenes", 120
    size = 64 if scenes else 32
    grid = np.arange(size)
    images = np.zeros((count, 3, size, size), np.uint8)
    for i in range(count):
        images[i] = ((grid[:, None] * (i + 3) + grid[None] * 5)[None] + 60 * np.arange(3)[:, None, None]) % 256
        images[i, i % 3, size // 4 : size // 2, size // 4 : size // 2] = 250
    shape = {"bbox": [10.0, 10.0, 20.0, 20.0], "category": 1, "area": 400.0, "iscrowd": 0,
             "segmentation": [[10, 10, 30, 10, 30, 30]], "keypoints": [12, 12, 2, 25, 14, 1]}  # fmt: skip
    return types.SimpleNamespace(
        name=folder.name, size=count, labels=np.arange(count) % 12, classes=[f"class {i}" for i in range(12)],
        categories=["arrow", "flag", "key"], objects=[[shape]] * count, image=lambda index, size=None: images[index],
    )  # fmt: skip


def write(root: Path) -> None:
    """Metrics, histories, galleries and detections of `LAYOUT`."""
    for row, (level, n) in SEEDED.items():
        for seed in range(n):
            write_run(root, row, f"{row}-s{seed}", level)
    for row in DETECTED:
        write_detection(root, row, f"{row}-s0")
    for name, rows in SETTINGS.items():
        for row in rows:
            write_run(root, row, f"{name}-{row}-s0", 30.0)
    write_rest(root)


def fake_data(monkeypatch: pytest.MonkeyPatch, opened: Any = fake_open) -> None:
    """Images come from `opened` instead of shards."""
    import mirepro.data

    fake = types.ModuleType("mirepro.data.shards")
    fake.open = opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mirepro.data.shards", fake)
    monkeypatch.setattr(mirepro.data, "shards", fake, raising=False)
