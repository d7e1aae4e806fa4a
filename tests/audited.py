"""A small published result to audit: real code, parameters, locks and formats; tiny data; results real or made up."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mirepro import codelocks, determinism, files, profiles
from mirepro.audit import integrity
from mirepro.data import desk, shards
from mirepro.report import page, tables

SEEDS = (0, 1, 2)
ROWS = ("ir", "ball")
IMAGES = {"train": 384, "val": 96, "test": 96}


def parameters(root: Path) -> dict[str, Any]:
    """The desk profile cut down to two rows and very short runs."""
    values = yaml.safe_load((root / "params.yaml").read_text())
    runs = {f"{row}-s{seed}": {"row": row, "objective": row, "seed": seed} for row in ROWS for seed in SEEDS}
    values["datasets"], values["runs"], values["detect_runs"] = ["desk"], runs, {}
    values["rows"] = {row: {"objective": row, "options": {"k": 16}} for row in ROWS}
    values["tables"] = {"T1": {"rows": {row: [f"{row}-s{seed}" for seed in SEEDS] for row in ROWS}}}
    values["pretrain"] |= {"epochs": 1, "batch": 64, "monitor": 1, "digest": 2}
    values["pretrain"]["encoder"] |= {"width": 4, "dim": 16}
    values["evaluate"] |= {"k_nn": [1, 5], "linear": {"tolerance": 0.01, "iterations": 20, "author_epochs": 1}}
    return values


class Project:
    """A publisher's checkout.

    Args:
        source: The real repository, for its code and texts.
        root: Folder to fill.
        real: Whether the runs are computed; else their results are made up.
        code: Folder of the package that computes them, else the real repository.
    """

    def __init__(self, source: Path, root: Path, real: bool = False, code: Path | None = None) -> None:
        self.root, self.real, self.code = root, real, code or source
        shutil.copytree(source / "mirepro", root / "mirepro", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("dvc.yaml", "docs/deviations.md", "requirements.lock", "docs/audit.md"):
            if (source / name).exists():
                (root / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, root / name)
        self.write("params.yaml", yaml.safe_dump(parameters(source), sort_keys=False))
        splits = {split: itertools.islice(desk.split(split), count) for split, count in IMAGES.items()}
        shards.write(root / "data" / "desk", "desk", splits, desk.META)
        self.profile = profiles.load(root, "desk")
        codelocks.write(root, "desk", ROWS)
        integrity.receipts(root, self.profile)
        self.compute() if real else self.invent()
        self.publish()

    def write(self, name: str, text: str) -> None:
        """Writes a file."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def compute(self) -> None:
        """Runs every stage for real."""
        tier = determinism.environment("portable", 1)
        environment = os.environ | tier | {"PYTHONPATH": str(self.code)}
        stages = [f"{kind}@{run}" for run in self.profile.runs for kind in ("pretrain", "evaluate")]
        lines = ["from pathlib import Path", "from mirepro import stages"]
        for stage in [*stages, "controls", "toy"]:
            kind, _, key = stage.partition("@")
            lines.append(f"stages.run(Path({str(self.root)!r}), 'desk', {kind!r}, {key or None!r})")
        subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, check=True, cwd=self.code)
        shutil.rmtree(self.root / ".mirepro")

    def invent(self) -> None:
        """Results of the right form with values from a generator."""
        from safetensors.numpy import save_file

        draw = np.random.default_rng(7)
        for place, run in enumerate(self.profile.runs):
            row, _, seed = run.rpartition("-s")
            shared = {"schema": "mirepro.metrics/1", "run": run, "row": row, "seed": int(seed)}
            columns = ("linear_flat", "linear_pool", "knn_1", "knn_5")
            measured = {c: _entry(20 + 5 * (row == "ball") + draw.normal(), "%") for c in columns}
            trained = {"estimate": _entry(1 + draw.normal() / 10, "nats"), "images_seen": _entry(384.0, "images")}
            for stage, cells in (("evaluate", measured), ("pretrain", trained)):
                files.write_json(self.root / f"metrics/desk/{stage}/{run}.json", shared | {"cells": cells})
            answers = {"n": 96, "linear_flat": np.packbits(draw.random(96) < 0.2).tobytes().hex()}
            files.write_json(self.root / f"runs/desk/evaluate/{run}/test.json", answers)
            folder = self.root / f"runs/desk/pretrain/{run}"
            folder.mkdir(parents=True)
            save_file({"weight": np.full(8, place, np.float32)}, folder / "encoder.safetensors")
            files.write_text(folder / "history.jsonl", '{"epoch": 1, "loss": 3.5}\n')
            links = [{"step": step, "chain": str(step) * 8, "tensors": {}} for step in (2, 4, 6)]
            files.write_text(folder / "chain.txt", "".join(json.dumps(link) + "\n" for link in links))
        source = Path(__file__).resolve().parent.parent / "metrics" / "desk"
        shutil.copyfile(source / "toy.json", self.root / "metrics" / "desk" / "toy.json")
        controls = files.read_json(source / "controls.json")
        for row in controls["rows"].values():
            row["answers"] = [answers] * len(row["answers"])
        files.write_json(self.root / "metrics/desk/controls.json", controls)

    def publish(self) -> None:
        """Tables, report, lock and commit."""
        layout = self.profile.values["tables"]
        tables.build(self.root, "desk", layout)
        page.build(self.root, "desk", layout, determinism.key("portable", 1), None)
        self.lock()
        commit(self.root)

    def lock(self) -> None:
        """Writes dvc.lock as DVC would."""
        stages: dict[str, Any] = {"code": {"cmd": "x", "outs": [self.entry("locks/desk")]}}
        for stage, command in integrity.expected(self.profile).items():
            kind, _, key = stage.partition("@")
            place = f"{kind}/{key}" if key else kind
            own = [f"runs/desk/{place}", f"metrics/desk/{place}.json"]
            own = {"data": [f"{own[0]}.json"], "tables": ["tables/desk"], "report": ["reports/desk"]}.get(kind, own)
            needs = [f"locks/desk/{kind}.json"]
            needs += {"tables": ["metrics/desk"], "evaluate": [f"runs/desk/pretrain/{key}"]}.get(kind, [])
            keys = {"pretrain": ["pretrain", f"runs.{key}"], "tables": ["tables"]}.get(kind, ["tier"])
            values = self.profile.values
            found = {k: values["runs"][key] if k.startswith("runs.") else values[k] for k in keys}
            stages[stage] = {
                "cmd": command, "params": {"params.yaml": json.loads(json.dumps(found))},
                "deps": [self.entry(name) for name in needs],
                "outs": [self.entry(name) for name in own if (self.root / name).exists()],
            }  # fmt: skip
        self.write("dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))

    def entry(self, name: str) -> dict[str, str]:
        """`{path, hash, md5}` with DVC's digest, written out here."""
        path = self.root / name
        if path.is_file():
            return {"path": name, "hash": "md5", "md5": hashlib.md5(path.read_bytes()).hexdigest()}
        inner = sorted(item for item in path.rglob("*") if item.is_file())
        listed = [
            {"md5": hashlib.md5(item.read_bytes()).hexdigest(), "relpath": str(item.relative_to(path))}
            for item in inner
        ]
        md5 = hashlib.md5(json.dumps(listed).encode()).hexdigest()
        return {"path": name, "hash": "md5", "md5": f"{md5}.dir"}


def commit(root: Path) -> None:
    """Commits all but runs and shards."""
    (root / ".gitignore").write_text("/runs/\n/data/*/shards/\n")
    who = ["-c", "user.name=p", "-c", "user.email=p@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "results", "--allow-empty"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)


def _entry(value: float, unit: str) -> dict[str, Any]:
    return {"value": float(value), "unit": unit, "protocol": "made up"}
