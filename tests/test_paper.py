"""The full-scale profile: all rows and tables, refusal without data, and its stages on a miniature ImageNet."""

import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mirepro import codelocks, execution, files, objectives, params, profiles, stages
from mirepro.data import imagenet
from mirepro.errors import UserError
from mirepro.launch import work
from mirepro.objectives.base import Step
from mirepro.objectives.regions import Region
from mirepro.report import claims
from mirepro.report.metrics import MODELS
from mirepro.transfer import detection

NAMES = ["n01440764", "n02000000", "n15075141"]
SMALL = {
    "tier": "portable", "threads": 1, "datasets": ["imagenet"], "detect": {"sets": None},
    "pretrain": {"device": "cpu", "epochs": 2, "batch": 32, "digest": 2, "monitor": 1,
                 "encoder": {"arch": "resnet10", "width": 8}, "views": {"size": 32}},
    "evaluate": {"device": "cpu", "anchors": 2, "gallery": 3, "views": {"size": 32},
                 "linear": {"iterations": 20, "author_epochs": 1, "author_batch": 32, "l2": [1.0, 10.0]}},
}  # fmt: skip
"""What the miniature shrinks; rows, objectives and stages stay the profile's own."""
SIZE = 1_271_167
"""Rows of the paper's bank."""
OPTIONS: dict[str, Any] = {"k": 8, "queue": 40, "n_clusters": 6, "n_clusterings": 2, "classes": 3, "outer": 0.5}


@pytest.fixture(scope="module")
def paper(root: Path) -> profiles.Profile:
    """The profile."""
    return profiles.load(root, "imagenet")


def test_every_row_is_possible_at_paper_scale(paper: profiles.Profile) -> None:
    for name in paper.runs:
        run = paper.run(name)
        objective = objectives.create(run.objective, run.options)
        assert objective.check(1_271_167, run.pretrain.encoder.dim) == [], name
    for model, data in {(entry.model, entry.data) for entry in paper.detect_runs.values()}:
        detection.check(model, paper.recipe(data))
    assert (paper.recipe("lvis").detections, paper.recipe("coco").detections) == (300, 100)
    assert [paper.recipe(data).repeat_threshold for data in ("coco", "voc", "lvis")] == [0, 0, 0.001]
    with pytest.raises(UserError, match=r"detect\.sets\.lvis: not in datasets"):
        dataclasses.replace(paper, values=paper.values | {"datasets": ["imagenet"]}).recipe("imagenet")
    with pytest.raises(UserError, match="empty"):  # control
        objectives.create("ring", {"outer": 1e-7}).check(1_271_167, 128)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_cpu", "cifar100", "stl10"])
def test_rows_of_small_sets_are_possible_and_fit_their_regions(root: Path, name: str) -> None:
    profile = profiles.load(root, name)
    profile.check()
    for key in profile.runs:
        run = profile.run(key)
        sizes = work.data(root / "nowhere", run.pretrain.data, run.pretrain.split)
        size, classes = sizes.train, sizes.classes
        assert objectives.create(run.objective, run.options).check(size, run.pretrain.encoder.dim) == [], key
        assert run.options.get("classes", profile.name) in (classes, profile.name)
    more = {**profile.run("ring-s0").options, "k": size // 10}
    assert "repeat rows" in objectives.create("ring", more).check(size, 128)[0]  # control: the ring has a tenth less
    tables = [table["rows"] for label, table in profile.values["tables"].items() if label != "data"]
    assert {run for rows in tables for runs in rows.values() for run in runs} == set(profile.runs)


@pytest.mark.parametrize(
    ("name", "more"),
    [("cifar10", {"ball_annealed"}), ("cifar10_cpu", {"ball_annealed"}), ("cifar100", set()), ("stl10", set())],
)
def test_small_sets_have_every_row_and_claims_of_cifar10(root: Path, name: str, more: set[str]) -> None:
    """That the claims' rows have their seeds is tested for every profile in test_claims.py."""
    profile, file = profiles.load(root, name), claims.load(name)
    rows = {"ir_nce", "ir", "ball", "ring", "cave", "la", "cmc", "cmc_ring", "moco", "moco_ring", "simclr",
            "supervised", "random"}  # fmt: skip
    assert rows | more <= set(profile.rows)
    shown = profile.values["tables"]["T1"]["rows"]
    for row in {row for claim in file.claims for row in (claim.better, claim.than)} - {"pixels"}:
        assert shown[row] == [f"{row}-s{seed}" for seed in range(file.seeds)]
    assert len(shown["ir_nce"]) < file.seeds  # control: no claim names it
    assert set(file.claims) <= set(claims.load("cifar10").claims)
    assert file.claims != claims.load("desk").claims


def test_every_objective_and_every_table_is_there(paper: profiles.Profile) -> None:
    assert {entry.objective for entry in paper.runs.values()} == set(objectives.names())
    tables = paper.values["tables"]
    assert set(tables) == {"data", "T1", "T2", "T3", "T4", "T6", "T7", "T8", "T9", "T10"}
    named = {run for name in ("T1", "T6", "T7") for runs in tables[name]["rows"].values() for run in runs}
    assert named == set(paper.runs)
    wanted = {f"{run}-{end}" for t, end in MODELS.items() for runs in tables[t]["rows"].values() for run in runs}
    assert wanted == set(paper.detect_runs)
    ends = {"coco": ("mask", "keypoint"), "voc": ("voc",), "lvis": ("lvis",)}
    assert all(name.rpartition("-")[2] in ends[entry.data] for name, entry in paper.detect_runs.items())


def trained(profile: profiles.Profile, name: str) -> str:
    """What a run trains: ranks at the paper's bank stand for the options that only choose them."""
    run = profile.run(name)
    objective = objectives.create(run.objective, run.options)
    if not isinstance(objective, Region):
        return repr((run.objective, run.options, run.pretrain))
    options = {
        key: value for key, value in run.options.items() if key not in ("outer", "inner", "inner_of", "background")
    }
    region = [objective.region(SIZE, Step(0, step, 100)) for step in (0, 99)]
    return repr((run.objective, options, region, run.pretrain))


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar10_cpu", "desk"])
def test_every_row_of_an_ablation_trains_something_else(root: Path, name: str) -> None:
    profile = profiles.load(root, name)
    for table in ("T6", "T7"):
        runs = [run for row in profile.values["tables"].get(table, {"rows": {}})["rows"].values() for run in row]
        assert len({trained(profile, run) for run in runs}) == len(runs)
    assert trained(profile, "ball-s0") == trained(profile, "ball-s1")  # control: two seeds of one row
    rows = {row: {"objective": "la", "options": {"k": 64, "outer": outer, "background": size}} for row, size, outer in
            (("a", 4096, 0.1), ("b", 4096, 0.05), ("c", 1024, 0.1))}  # fmt: skip
    runs = {f"{row}-s0": {"row": row, "objective": "la", "seed": 0} for row in rows}
    more = {key: profile.values[key] | extra for key, extra in (("rows", rows), ("runs", runs))}
    larger = dataclasses.replace(profile, values=profile.values | more)
    one, same, other = (trained(larger, run) for run in runs)
    assert one == same != other  # the background is smaller than either ball


def test_sizes_are_those_of_the_closest_code(paper: profiles.Profile) -> None:
    run = paper.run("ir-s0")
    encoder, optim = run.pretrain.encoder, run.pretrain.optim
    assert (encoder.arch, encoder.width, encoder.stem, encoder.dim, encoder.norm) == (
        "resnet18", 64, "imagenet", 128, False,
    )  # fmt: skip
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.schedule) == (0.03, 0.9, 1e-4, "step")
    assert [round(m * run.pretrain.epochs) for m in optim.milestones] == [120, 160]
    assert paper.run("ir_constant-s0").pretrain.optim.schedule == "constant"
    assert (run.pretrain.batch, run.pretrain.views.size, run.options["k"], paper.tier) == (256, 224, 4096, "exact")


def import_miniature(base: Path) -> None:
    """ImageNet's folders with three classes in `base/source`, imported by the reader into `base/data/imagenet`."""
    for c, name in enumerate(NAMES):
        for part, count in (("train", 30), ("val", 8)):
            (base / "source" / part / name).mkdir(parents=True)
            for i in range(count):
                own = f"{name}_{i}" if part == "train" else f"ILSVRC2012_val_{8 * c + i + 1:08d}"
                (base / "source" / part / name / f"{own}.JPEG").write_bytes(picture(c, i + 1000 * (part == "val")))
    with pytest.MonkeyPatch.context() as patch:
        synsets = hashlib.sha256("\n".join(NAMES).encode()).hexdigest()
        for key, value in {"CLASSES": 3, "SYNSETS": synsets, "COUNTS": {"train": 90, "val": 24}, "VAL": 5,
                           "PER_CLASS": {"train": (30, 30), "val": (8, 8)}}.items():  # fmt: skip
            patch.setattr(imagenet, key, value)
        imagenet.import_imagenet(base / "source", base / "data" / "imagenet", side=40)


def write_profile(base: Path, values: dict[str, Any], classes: int = OPTIONS["classes"]) -> profiles.Profile:
    """The profile with these values in `base`; options and encoders of its rows shrink, too."""
    name, options = values["profile"], OPTIONS | {"classes": classes}
    for row in values["rows"].values():
        row["options"] = {k: options.get(k, v) for k, v in row.get("options", {}).items()}
        (row.get("pretrain") or {}).pop("encoder", None)
    (base / "profiles" / name).mkdir(parents=True, exist_ok=True)
    (base / "profiles" / name / "params.yaml").write_text(yaml.safe_dump(values))
    small = profiles.load(base, name)
    small.check()
    codelocks.write(base, name, objectives.names())
    return small


@pytest.fixture(scope="module")
def miniature(root: Path, paper: profiles.Profile, tmp_path_factory: pytest.TempPathFactory) -> profiles.Profile:
    """The profile on a miniature ImageNet, with `SMALL` in place of its sizes."""
    base = tmp_path_factory.mktemp("paper")
    import_miniature(base)
    shutil.copy(root / "params.yaml", base)
    (base / "mirepro").symlink_to(root / "mirepro")
    return write_profile(base, profiles.merge(params.read_yaml(paper.path), SMALL) | {"detect_runs": {}})


def picture(label: int, seed: int) -> bytes:
    noise = np.random.default_rng(10_000 * label + seed).integers(0, 120, (50, 60, 3))
    noise[..., label] += 120
    out = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def compute(profile: profiles.Profile, kind: str, key: str) -> dict[str, Any]:
    """Runs one stage as its command does."""
    name, job = stages.described(profile, kind, key)
    execution.execute(profile.root, name, job)
    return dict(files.read_json(profile.root / job.metrics))


FAST = ("ring", "la", "cmc_ring", "supervised", "moco_ring", "simclr")


@pytest.mark.parametrize(
    "run", [pytest.param(f"{name}-s0", marks=() if name in FAST else pytest.mark.slow) for name in objectives.names()]
)
def test_a_run_of_the_profile_on_a_miniature(miniature: profiles.Profile, run: str) -> None:
    trained = compute(miniature, "pretrain", run)
    assert trained["cells"]["images_seen"]["value"] == (0 if run == "random-s0" else 2 * 64)
    assert (miniature.root / "runs/imagenet/pretrain" / run / "encoder.safetensors").is_file()
    if run != "ring-s0":
        return
    judged = compute(miniature, "evaluate", run)["cells"]
    assert judged["linear_flat"]["value"] is None  # evaluate.linear.converged
    assert judged["linear_pool"]["value"] > 60  # the classes differ in colour; chance is 33
    assert 0 <= judged["knn_1"]["value"] <= 100


def test_images_of_different_sizes_are_refused(miniature: profiles.Profile, tmp_path: Path) -> None:
    from mirepro.data import packing, shards

    items = []
    for i, size in enumerate(((50, 60), (60, 50))):
        Image.new("RGB", size).save(tmp_path / f"{i}.jpg")
        path = tmp_path / f"{i}.jpg"
        items.append(packing.Item(str(i), 0, str(path), 0, path.stat().st_size, 0, str(path)))
    meta = miniature.values and {"title": "x", "classes": ["a"], "categories": [], "keypoints": {}}
    packing.pack(tmp_path / "kept", "x", {"train": items}, meta)
    with pytest.raises(UserError, match="different sizes"):
        shards.open(tmp_path / "kept", "train").images(None)
    packing.pack(tmp_path / "square", "x", {"train": items}, meta, side=40)
    assert shards.open(tmp_path / "square", "train").images(None).shape == (2, 3, 40, 40)


@pytest.mark.parametrize("command", [["mirepro", "status", "--profile", "imagenet"],
                                     ["dvc", "repro", "profiles/imagenet/dvc.yaml", "--dry", "--allow-missing"],
                                     ["mirepro", "data", "check", "--profile", "imagenet"]])  # fmt: skip
def test_missing_data_are_refused_before_anything_runs(root: Path, tmp_path: Path, command: list[str]) -> None:
    shutil.copytree(root / "mirepro", tmp_path / "mirepro", ignore=shutil.ignore_patterns("*.so"))
    for name in (".dvc/config", ".dvcignore", "dvc.yaml", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    shutil.copytree(root / "profiles", tmp_path / "profiles")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", *command]
        return subprocess.run(arguments, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)

    process = run()
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    assert "imagenet" in process.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    if command[0] != "dvc":
        assert process.returncode == 2
        return
    assert "mirepro stage data imagenet" not in process.stdout
    for name in ("imagenet", "coco", "voc", "lvis"):  # control: with manifests and locks the data stages would run
        files.write_json(tmp_path / "data" / name / "manifest.json", {})
    codelocks.write(tmp_path, "imagenet", objectives.names())
    assert "mirepro stage data imagenet" in run().stdout
