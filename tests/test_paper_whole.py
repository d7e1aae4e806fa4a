"""Profiles as DVC sees them: the full one computed from import to report on miniatures, and dry runs of all of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dvc.repo import Repo
from PIL import Image

from mirepro import codelocks, files, objectives, params, profiles
from mirepro.data import catalogue, coco, lvis, stl10, voc
from tests import test_paper
from tests.test_coco import CATEGORIES, POINTS, annotation, write
from tests.test_small_sets import cifar, small, stl
from tests.test_voc_lvis import devkit, source

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")]
__all__ = ["cifar", "devkit", "small", "source", "stl"]

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("random-s0", "ir-s0", "ball_u05-s0", "cmc_ring-s0", "moco_ring-s0", "view_none-s0")
DETECT = ("ir-s0-mask", "ir-s0-keypoint", "ir-s0-voc", "ir-s0-lvis")
HEAD = {"pool": 6, "width": 8, "layers": 1}
SMALL = {
    "datasets": ["imagenet", "coco", "voc", "lvis"],
    "toy": {"cases": [[5, 0.5]], "banks": 2, "rows": 512, "anchors": 32, "redraws": 2},
    "detect": {"device": "cpu", "size": 48, "batch": 2, "epochs": 1, "keypoint_epochs": 1, "anchors": [0.45],
               "canonical": 0.5, "fpn": 8, "box_hidden": 16, "lrs": [0.001, 0.002], "fixed_lr": 0.001,
               "mask": HEAD, "keypoint": HEAD, "roi_samples": 16, "proposals": 20, "proposals_before": 40,
               "rpn_samples": 16, "sets": {"voc": {"epochs": 1}}},
}  # fmt: skip
"""Beside `test_paper.SMALL`; kinds of stages, data sets, tables and the rows that are kept stay the profile's own."""


class Checkout:
    """A copy of the repository without results; `mirepro` and `dvc` run what it holds."""

    def __init__(self, source: Path, root: Path) -> None:
        self.root = root
        shutil.copytree(source / "mirepro", root / "mirepro", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(source / "profiles", root / "profiles")
        for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, root / name)
        command = root / "bin" / "mirepro"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mirepro "$@"\n')
        command.chmod(0o755)
        subprocess.run(["git", "init", "-q", str(root)], check=True)

    def run(self, module: str, *arguments: str, code: int = 0) -> str:
        """What `python -m module arguments` prints."""
        path = os.pathsep.join([str(self.root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=self.root, text=True, capture_output=True, check=False,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(self.root)},
        )  # fmt: skip
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def forget(self) -> None:
        """Leaves what a clone of committed results has: neither data nor artefacts nor DVC's cache."""
        for folder in (self.root / "runs", self.root / ".dvc/cache", *self.root.glob("data/*/shards")):
            shutil.rmtree(folder, ignore_errors=True)

    def dry(self, profile: str, code: int = 0) -> list[str]:
        """Stages that a dry run would run."""
        output = self.run("dvc", "repro", "--dry", "--allow-missing", f"profiles/{profile}/dvc.yaml", code=code)
        return [line.split("'")[1].rpartition(":")[2] for line in output.splitlines() if line.startswith("Running")]

    def edit(self, profile: str, **values: Any) -> None:
        """Other values for some of a profile's top-level keys."""
        path = self.root / "profiles" / profile / "params.yaml"
        path.write_text(yaml.safe_dump(params.read_yaml(path) | values))


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Checkout:
    """A copy of this repository."""
    (tmp_path / "repository").mkdir()
    return Checkout(root, tmp_path / "repository")


def people(base: Path) -> Path:
    """COCO's layout: a person with keypoints and a dog in each of ten and three images."""
    (base / "annotations").mkdir(parents=True)
    for first, name, count in ((1, "train2017", 10), (21, "val2017", 3)):
        (base / name).mkdir()
        facts = [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30} for i in range(first, first + count)
        ]
        for fact in facts:
            noise = np.random.default_rng(fact["id"]).integers(0, 256, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(noise).save(base / name / fact["file_name"])
        persons = [annotation(2 * f["id"], f["id"], 1, [5, 6, 20, 12]) for f in facts]
        dogs = [annotation(2 * f["id"] + 1, f["id"], 18, [14, 10, 20, 16]) for f in facts]
        write(base, "instances", name, {"images": facts, "annotations": persons + dogs, "categories": CATEGORIES})
        posed = [{**one, "keypoints": [8, 9, 2, 17, 8, 1, 20, 16, 2], "num_keypoints": 3} for one in persons]
        categories = [{**CATEGORIES[1], "keypoints": POINTS}]
        write(base, "person_keypoints", name, {"images": facts, "annotations": posed, "categories": categories})
    return base


def reduced(values: dict[str, Any], small: dict[str, Any], kept: tuple[str, ...] = RUNS) -> dict[str, Any]:
    """The profile with the runs `kept` (and those of `DETECT` that it has) alone, and tables without empty rows."""
    merged = profiles.merge(profiles.merge(values, test_paper.SMALL), small)
    merged["runs"] = {name: merged["runs"][name] for name in kept}
    merged["detect_runs"] = {name: merged["detect_runs"][name] for name in DETECT if name in merged["detect_runs"]}
    for name, table in merged["tables"].items():
        if name != "data":
            rows = {label: [run for run in runs if run in kept] for label, runs in table["rows"].items()}
            table["rows"] = {label: runs for label, runs in rows.items() if runs and (name in ("T1", "T6", "T7") or
                                                                                      runs == ["ir-s0"])}  # fmt: skip
    return merged


@pytest.fixture
def paper(checkout: Checkout, tmp_path: Path, devkit: Path, source: Path) -> Checkout:
    """The full profile on miniatures of its four data sets, each through its own reader."""
    base = checkout.root
    test_paper.import_miniature(base)
    coco.import_mini(people(tmp_path / "coco"), base / "data/coco")
    content = json.loads((source / lvis.FILES["train"]).read_text())
    content["annotations"] = [{**content["annotations"][0], "id": 7 + i, "image_id": 1 + i} for i in range(3)]
    (source / lvis.FILES["train"]).write_text(json.dumps(content))
    lvis.import_lvis(source, base / "data/lvis")
    voc.import_voc(devkit, base / "data/voc")
    test_paper.write_profile(base, reduced(params.read_yaml(base / "profiles/imagenet/params.yaml"), SMALL))
    return checkout


@pytest.mark.timeout(3600)
def test_the_full_profile_from_data_to_report_and_its_lock(paper: Checkout) -> None:
    root = paper.root
    paper.run("mirepro", "repro", "--profile", "imagenet", "--jobs", "2")
    locked = yaml.safe_load((root / "profiles/imagenet/dvc.lock").read_text())["stages"]
    stages = {f"{kind}@{run}" for kind in ("pretrain", "evaluate") for run in RUNS}
    stages |= {f"detect@{run}" for run in DETECT} | {f"data@{name}" for name in SMALL["datasets"]}
    assert set(locked) == stages | {"code", "controls", "toy", "tables", "report"}
    tables = {path.stem for path in (root / "tables/imagenet").glob("T*.json")}
    assert tables == {f"T{number}" for number in range(1, 11)}
    cells = files.read_json(root / "metrics/imagenet/detect/ir-s0-keypoint.json")["cells"]
    assert "keypoint_AP_tuned" in cells
    page = (root / "reports/imagenet/index.html").read_text()
    assert all(run.removesuffix("-s0") in page for run in ("ir-s0", "cmc_ring-s0", "moco_ring-s0"))
    lock_holds(paper, "imagenet")


def lock_holds(checkout: Checkout, name: str) -> None:
    """Nothing is computed twice, here and in a clone of the results; the control is another toy."""
    ran = checkout.run("dvc", "repro", f"profiles/{name}/dvc.yaml")
    assert [line for line in ran.splitlines() if line.startswith("Running")] == [
        f"Running stage 'profiles/{name}/dvc.yaml:code':"
    ]
    checkout.forget()
    assert checkout.dry(name) == ["code"]
    checkout.edit(name, toy=SMALL["toy"] | {"seed": 1})
    assert "toy" in checkout.dry(name)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["stl10", "cifar100"])
def test_a_small_set_from_import_to_report_and_its_lock(
    checkout: Checkout, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Pixels are noise: what the stages take from the importers counts here, not what they learn."""
    root, runs = checkout.root, ("random-s0", "supervised-s0", "ring-s0")
    monkeypatch.setattr(stl10, "COUNTS", {"train": 60, "test": 20, "unlabeled": 80})
    source = request.getfixturevalue({"stl10": "stl", "cifar100": "cifar"}[name])
    catalogue.load(name, source, root / "data" / name, None, 1)
    sizes = {"datasets": [name], "toy": SMALL["toy"], "pretrain": {"monitor": 0, "epochs": 1}}
    values = reduced(params.read_yaml(root / f"profiles/{name}/params.yaml"), sizes, runs)
    test_paper.write_profile(root, values, {"stl10": 10, "cifar100": 100}[name])
    checkout.run("mirepro", "repro", "--profile", name, "--jobs", "2")
    locked = yaml.safe_load((root / f"profiles/{name}/dvc.lock").read_text())["stages"]
    stages = {f"{kind}@{run}" for kind in ("pretrain", "evaluate") for run in runs} | {f"data@{name}"}
    assert set(locked) == stages | {"code", "controls", "toy", "tables", "report"}
    seen = {run: files.read_json(root / f"metrics/{name}/pretrain/{run}.json")["cells"]["images_seen"] for run in runs}
    learnt = {"stl10": (64, 32), "cifar100": (192, 192)}[name]  # whole batches: of 80 without labels; of 50 or 200
    assert [seen[run]["value"] for run in runs] == [0, learnt[1], learnt[0]]
    assert list(files.read_json(root / f"tables/{name}/T1.json")["rows"][0]["cells"])
    page = (root / f"reports/{name}/index.html").read_text()
    assert all(run.removesuffix("-s0") in page for run in runs)
    lock_holds(checkout, name)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("profiles/*/params.yaml")))
def test_a_dry_run_is_clean_once_a_profile_has_its_lock(checkout: Checkout, name: str) -> None:
    """DVC cannot look beyond a stage that never ran, so every stage gets outputs made up and DVC's record of them."""
    profile, target = profiles.load(checkout.root, name), f"profiles/{name}/dvc.yaml"
    for data in profile.values["datasets"]:
        files.write_json(checkout.root / "data" / data / "manifest.json", {"name": data})
    codelocks.write(checkout.root, name, objectives.names())
    with Repo(str(checkout.root)) as repo:
        stages = [stage for stage in repo.index.stages if stage.path_in_repo == target]
        for stage in stages:
            for path in (Path(item.fs_path) for item in (*stage.deps, *stage.outs)):
                if path.name != "params.yaml":
                    files.write_text(path if path.suffix else path / "made.txt", stage.addressing)
    kinds = (profile.runs, profile.runs, profile.detect_runs, profile.values["datasets"])
    assert len(stages) == sum(map(len, kinds)) + len(("code", "controls", "toy", "tables", "report"))
    checkout.run("mirepro.launch.dvc", "commit", "--force", target)
    checkout.forget()
    assert checkout.dry(name) == ["code"]
    checkout.edit(name, toy={"seed": 1})  # control
    assert "toy" in checkout.dry(name)
