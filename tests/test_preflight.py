"""What any stage would refuse is refused by the first one."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirepro import params, preflight, profiles
from mirepro.errors import UserError


def desk(root: Path, tmp_path: Path, change: dict[str, Any]) -> profiles.Profile:
    """The desk profile with changed values, and what is looked at beside it."""
    values = profiles.merge(params.read_yaml(root / "params.yaml"), change)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    for path in (
        "mirepro/preflight.py",
        "mirepro/bounds.py",
        *(f"data/{name}/manifest.json" for name in values["datasets"]),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, tmp_path / path)
    return profiles.load(tmp_path, "desk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"ring": {"options": {"outre": 0.1}}}}, "rows.ring: objective ring.outre: unknown key; known: "),
        ({"rows": {"ring": {"options": {"k": "many"}}}}, "rows.ring: objective ring.k: expected int"),
        ({"rows": {"ball": {"options": {"outer": 0.0}}}}, "rows.ball: objective Ball.outer: 0.0 is impossible"),
        ({"rows": {"ring": {"options": {"inner": 1.0}}}}, "rows.ring: objective Ring.inner: 1.0 is impossible"),
        ({"rows": {"ir": {"options": {"tau": 0.0}}}}, "rows.ir: objective Ir.tau: 0.0 is impossible"),
        ({"rows": {"ir": {"pretrain": {"batch": 10**6}}}}, "rows.ir: pretrain.batch: 1000000 is impossible"),
        ({"rows": {"ir": {"pretrain": {"encoder": {"arch": "vgg"}}}}}, "rows.ir: encoder.arch: 'vgg' is unknown"),
        ({"rows": {"ir": {"pretrain": {"split": "test"}}}}, "rows.ir: pretrain.split: 'test' is impossible; use "),
        ({"rows": {"ir": {"pretrain": {"split": "unlabelled", "monitor": 0}}}},
         "rows.ir: pretrain.data: desk has no split unlabelled; known: test, train, val"),
        ({"rows": {"ir": {"pretrain": {"device": "tpu"}}}}, "rows.ir: pretrain.device: 'tpu' is impossible"),
        ({"rows": {"ir": {"pretrain": {"device": "cuda"}}}}, "rows.ir: pretrain.device: 'cuda' is impossible in tier"),
        ({"rows": {"supervised": {"options": {"classes": 5}}}},
         "rows.supervised: objective supervised.classes: use 96, as the data have"),
        ({"rows": {"x": {"objective": "irr"}}, "runs": {"x-s0": {"row": "x", "objective": "irr", "seed": 0}}},
         "rows.x: objective: 'irr' is unknown; known: ball"),
        ({"pretrain": {"data": "scenes"}}, "rows.supervised: objective supervised.classes: use "),
        ({"evaluate": {"tau": -1.0}}, "evaluate.tau: -1.0 is impossible"),
        ({"evaluate": {"device": "cuda"}}, "evaluate.device: 'cuda' is impossible in tier portable"),
        ({"detect": {"flip": 2.0}}, "detect.flip: 2.0 is impossible"),
        ({"detect": {"clip": -1.0}}, "detect.clip: -1.0 is impossible; use a positive number"),
        ({"detect": {"scales": []}}, "detect.scales: [] is impossible; use positive numbers, at least one"),
        ({"detect": {"oks_sigma": 0.0}}, "detect.oks_sigma: 0.0 is impossible; use a positive number, or null"),
        ({"detect": {"mask": {"pool": 7, "width": 8, "layers": 0}}}, "detect.mask.layers: 0 is impossible; use 1"),
        ({"detect": {"roi_positive": 0.0}}, "detect.roi_positive: 0.0 is impossible; use a share in (0, 1]"),
        ({"evaluate": {"linear": {"author_lr": 0.0}}}, "evaluate.linear.author_lr: 0.0 is impossible"),
        ({"pretrain": {"optim": {"lr": math.nan}}}, "pretrain.optim.lr: nan is impossible; use a finite number"),
        ({"evaluate": {"linear": {"l2": [1.0, math.inf]}}}, "evaluate.linear.l2[1]: inf is impossible"),
        ({"rows": {"ir": {"pretrain": {"optim": {"milestones": [0.8, 0.6]}}}}},
         "rows.ir: pretrain.optim.milestones: [0.8, 0.6] is impossible; use shares of the run in (0, 1), rising"),
        ({"rows": {"la": {"options": {"n_clusters": 10**6}}}}, "rows.la: objective la.n_clusters: more than "),
        ({"rows": {"la": {"options": {"inner": 0.05}}}}, "rows.la: objective la.inner: its background begins at "),
        ({"toy": {"banks": 0}}, "toy.banks: 0 is impossible"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    profile = desk(root, tmp_path, change)
    with pytest.raises(UserError) as caught:
        preflight.check(profile)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / ".mirepro").exists()


@pytest.mark.slow
def test_accepted_values_are_not_looked_at_again(root: Path, tmp_path: Path) -> None:
    """A second check loads no torch; after any change there is one again."""
    profile = desk(root, tmp_path, {})
    preflight.check(profile)
    code = f"""
import sys
from pathlib import Path
from mirepro import preflight, profiles
preflight.check(profiles.load(Path({str(tmp_path)!r}), "desk"))
print("torch" in sys.modules)
"""

    def looked() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout

    assert looked() == "False\n"
    desk(root, tmp_path, {"toy": {"banks": 5}})
    assert looked() == "True\n"
    shutil.copytree(root / "locks" / "desk", tmp_path / "locks" / "desk")
    assert looked() == "True\n"
    assert looked() == "False\n"


def test_profiles_are_accepted(root: Path) -> None:
    """All settings of all profiles, for as many images as their data sets have where these are known."""
    for name in profiles.names(root):
        profile = profiles.load(root, name)
        if all((root / "data" / data / "manifest.json").is_file() for data in profile.values["datasets"]):
            preflight.check(profile)
