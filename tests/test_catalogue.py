"""What `mirepro data check` says about data that are not there, and what `data import` refuses."""

import pytest

from mirepro.data import catalogue, shards
from mirepro.data.shards import Sample
from mirepro.errors import UserError

META = {"title": "x", "classes": ["a"], "categories": [], "keypoints": {"names": [], "flips": [], "sigmas": []}}


def test_every_missing_set_says_where_from_and_on_what_terms(tmp_path):
    for name, state in catalogue.states(tmp_path, catalogue.ENTRIES).items():
        assert catalogue.missing(state)
        assert "\n" not in state
        for part in ("https://" if name != "voc" else "http://", "terms: ", f"mirepro data import {name} PATH", " GB"):
            assert part in state
    assert not catalogue.missing(catalogue.states(tmp_path, ["desk"])["desk"])


def test_intact_cleared_and_damaged(tmp_path):
    shards.write(tmp_path / "voc", "voc", {"train": [Sample("k", b"P6 1 1 255 abc", ".ppm", 0)]}, META)
    assert catalogue.states(tmp_path, ["voc"]) == {"voc": "intact"}
    path = tmp_path / "voc/shards/train-000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=r"train-000\.tar: sha256 differs"):
        catalogue.states(tmp_path, ["voc"])
    path.unlink()
    assert catalogue.states(tmp_path, ["voc"])["voc"].startswith("its shards are missing; PASCAL VOC")


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"data 'moon': no .*manifest\.json; known: desk"):
        catalogue.states(tmp_path, ["moon"])
    with pytest.raises(UserError, match="data import: 'moon' is unknown; known: cifar10"):
        catalogue.load("moon", tmp_path, tmp_path / "out", None, 1)
    with pytest.raises(UserError, match="data import voc: --side is for imagenet"):
        catalogue.load("voc", tmp_path, tmp_path / "out", 256, 1)
    for kind in catalogue.ENTRIES:  # every kind has its reader, and each refuses an empty folder
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="inside"):
            catalogue.load(kind, tmp_path / "empty", tmp_path / "out", None, 1)
