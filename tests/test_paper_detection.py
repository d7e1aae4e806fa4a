"""The full profile's detection on PASCAL VOC and LVIS, end to end on miniatures with the real layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mirepro import codelocks, encoders, files, objectives, params, profiles, stages
from mirepro.data import lvis, shards, voc
from mirepro.errors import UserError
from mirepro.params import EncoderParams
from mirepro.report import tables
from mirepro.transfer import detection_data
from tests.test_voc_lvis import devkit, source

__all__ = ["devkit", "source"]
SMALL = {"device": "cpu", "size": 48, "batch": 2, "epochs": 2, "anchors": [0.45], "canonical": 0.5, "fpn": 8,
         "box_hidden": 16, "lrs": [0.001, 0.002], "fixed_lr": 0.001, "mask": {"pool": 6, "width": 8, "layers": 1},
         "roi_samples": 16, "proposals": 20, "proposals_before": 40, "rpn_samples": 16, "sets": {"voc": {"epochs": 3}}}
"""What the miniature shrinks; entries, data sets, models and LVIS's own settings stay the profile's."""


@pytest.fixture
def small(root: Path, tmp_path: Path, devkit: Path, source: Path) -> profiles.Profile:
    """The profile on the two miniatures, and one encoder that was never trained."""
    base = tmp_path / "repository"
    content = json.loads((source / lvis.FILES["train"]).read_text())
    content["annotations"] = [{**content["annotations"][0], "id": 7 + i, "image_id": 1 + i} for i in range(3)]
    (source / lvis.FILES["train"]).write_text(json.dumps(content))
    voc.import_voc(devkit, base / "data/voc")
    lvis.import_lvis(source, base / "data/lvis")
    values = params.read_yaml(root / "profiles/imagenet/params.yaml")
    values = profiles.merge(values, {"tier": "portable", "threads": 1, "detect": SMALL}) | {"datasets": ["voc", "lvis"]}
    values["detect_runs"] = {name: values["detect_runs"][name] for name in ("ir-s0-voc", "ir-s0-lvis")}
    for key in ("pretrain", "evaluate"):
        values[key]["data"] = "voc"
    (base / "profiles/imagenet").mkdir(parents=True)
    (base / "profiles/imagenet/params.yaml").write_text(yaml.safe_dump(values))
    shutil.copy(root / "params.yaml", base)
    (base / "mirepro").symlink_to(root / "mirepro")
    ensemble = encoders.Ensemble(EncoderParams(width=8, stem="tiny", dim=8))
    encoders.initialise(ensemble, 0)
    encoders.save(base / "runs/imagenet/pretrain/ir-s0/encoder.safetensors", ensemble)
    profile = profiles.load(base, "imagenet")
    profile.check()
    codelocks.write(base, "imagenet", objectives.names())
    return profile


def compute(profile: profiles.Profile, key: str) -> dict[str, Any]:
    """Runs one detection stage as its command does."""
    torch.set_num_threads(1)
    name, job = stages.described(profile, "detect", key)
    assert f"data/{profile.detect_runs[key].data}/manifest.json" in job.needs
    stages.execute(profile.root, name, job)
    return dict(files.read_json(profile.root / job.metrics))


def test_stages_and_tables(small: profiles.Profile) -> None:
    boxes, federated = compute(small, "ir-s0-voc"), compute(small, "ir-s0-lvis")
    assert boxes["model"] == "box"
    assert boxes["detail"]["images_seen"] == {"tuned": 6, "fixed": 6, "long": 12, "frozen": 6}
    assert boxes["detail"]["categories"] == list(voc.CATEGORIES)
    assert "Faster R-CNN" in boxes["cells"]["box_AP50_tuned"]["protocol"]
    assert not any(name.startswith("mask") for name in boxes["cells"])
    assert not any("VOC" in name for name in federated["cells"])
    assert "repeat-factor sampling with t = 0.001" in federated["cells"]["mask_AP_tuned"]["protocol"]
    assert "repeat-factor" not in boxes["cells"]["box_AP_tuned"]["protocol"]
    assert [small.recipe(name).min_recall for name in ("voc", "lvis")] == [0.7, 0.5]
    assert 0 <= boxes["cells"]["box_AP50_tuned"]["value"] <= 100
    assert {f"{task}_APr_{v}" for task in ("box", "mask") for v in ("tuned", "long")} <= set(federated["cells"])
    assert federated["cells"]["box_APf_tuned"]["value"] is None  # no frequent category has a box in this test split
    assert federated["detail"]["categories"] == ["ant", "zebra"]
    rows = {"rows": {"ir": ["ir-s0"]}}
    for name, column in (
        ("T8", "box_AP50_tuned"),
        ("T8", "box_VOC07_tuned"),
        ("T8", "box_VOC10_long"),
        ("T9", "box_APr_tuned"),
        ("T10", "mask_APr_tuned"),
    ):
        table = tables.make(small.root, "imagenet", {name: rows}, name, {})
        assert table is not None
        tables.check(table)
        own = boxes if name == "T8" else federated
        assert table["rows"][0]["cells"][column]["mean"] == pytest.approx(own["cells"][column]["value"])
        assert "APr" in tables.markdown(table) or name == "T8"


def test_the_federated_rules_are_read_and_pinned(small: profiles.Profile) -> None:
    folder = small.root / "data/lvis"
    scenes = detection_data.load(shards.open(folder, "test"), "mask", 48)
    assert scenes.federated is not None
    assert (scenes.federated.frequencies, scenes.federated.absent[0], scenes.federated.partial[0]) == (
        ["f", "r"], [0], [1],
    )  # fmt: skip
    assert scenes.truth().imgs[1]["neg_category_ids"] == [1]
    rules = folder / "federated.json"
    rules.write_text(rules.read_text().replace("000000000011", "000000000099"))
    with pytest.raises(UserError, match=r"federated\.json: missing or not the manifest's"):
        detection_data.load(shards.open(folder, "test"), "mask", 48)


def test_categories_are_numbered_by_the_data_set_in_every_split(small: profiles.Profile) -> None:
    """LVIS's val shows no ant here; the number of the zebra must not depend on it."""
    for split in ("train", "val", "test"):
        scenes = detection_data.load(shards.open(small.root / "data/lvis", split), "box", 48, used=[0, 1])
        assert scenes.categories == ["ant", "zebra"]
        assert {thing["category"] for things in scenes.objects for thing in things} <= {1}


def test_masks_are_refused_where_there_are_none(small: profiles.Profile) -> None:
    with pytest.raises(UserError, match="no objects with masks"):
        detection_data.load(shards.open(small.root / "data/voc", "train"), "mask", 48)
