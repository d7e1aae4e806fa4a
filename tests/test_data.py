"""Rendered data: the same bytes everywhere, honest labels, and no class leak through colour, area or position."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__

from mirepro import data
from mirepro.data import compose, desk, gate, masks, patterns, render, scenes, shapes, shards
from mirepro.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Both rendered data sets, built against the frozen manifests."""
    root = tmp_path_factory.mktemp("data")
    for name in data.NAMES:
        (root / name).mkdir()
        shutil.copy(ROOT / "data" / name / "manifest.json", root / name)
        data.build(name, root / name)
    return root


@pytest.fixture(scope="session")
def train(built):
    return shards.open(built / "desk", "train")


@pytest.fixture(scope="session")
def test(built):
    return shards.open(built / "desk", "test")


def digest(samples):
    return hashlib.sha256(b"".join(s.image + json.dumps(s.objects).encode() for s in samples)).hexdigest()


def test_frozen_manifests_hold(built):
    for name in data.NAMES:
        assert shards.verify(built / name)["name"] == name


def test_a_scene_depends_on_its_number_alone():
    together = desk.batch(np.arange(10), np.arange(10))
    assert digest([together[7]]) == digest(desk.batch(np.array([7]), np.array([7])))
    assert digest([together[7]]) != digest(desk.batch(np.array([8]), np.array([7])))


def test_the_bytes_do_not_depend_on_the_vector_unit():
    """NumPy with all its dispatched instruction sets switched off renders the same."""
    program = """
import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from mirepro.data import desk, scenes
from tests.test_data import digest
print(sum(__cpu_features__[f] for f in __cpu_dispatch__))
print(digest(desk.batch(np.arange(96), np.arange(96)) + scenes.batch(scenes.FIRST + np.arange(12))))
"""
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=plain, capture_output=True, text=True, check=True
    )
    features, there = run.stdout.split()
    assert features == "0"
    scene = desk.batch(np.arange(96), np.arange(96)) + scenes.batch(scenes.FIRST + np.arange(12))
    assert there == digest(scene)


def scene_numbers(module, monkeypatch) -> list[int]:
    """The numbers of all scenes that a generator asks for."""
    found: list[int] = []
    monkeypatch.setattr(module, "batch", lambda scene, *_: found.extend(scene.tolist()) or ())
    for name in module.SPLITS:
        list(module.split(name))
    return found


def test_desk_and_scenes_have_no_scene_in_common(monkeypatch):
    numbers = scene_numbers(desk, monkeypatch) + scene_numbers(scenes, monkeypatch)
    assert len(set(numbers)) == len(numbers) == sum(desk.SPLITS.values()) + sum(scenes.SPLITS.values())
    one, other = (render.Draws(np.array([number]), 8) for number in (0, scenes.FIRST))
    assert not np.array_equal(one.values, other.values), "all 64 bits count"
    assert not np.array_equal(one.bits, other.bits)
    monkeypatch.setattr(scenes, "FIRST", 0)  # control
    assert set(scene_numbers(scenes, monkeypatch)) < set(numbers)


@pytest.mark.parametrize("name", data.NAMES)
def test_splits_have_their_sizes_and_no_common_image(built, name):
    module = {"desk": desk, "scenes": scenes}[name]
    splits = [shards.open(built / name, split) for split in module.SPLITS]
    assert [s.size for s in splits] == list(module.SPLITS.values())
    images = [bytes(content) for s in splits for content in s.files]
    assert len(set(images)) == len(images)


def test_classes_are_balanced(train):
    assert train.images().shape == (3072, 3, 32, 32)
    assert set(np.bincount(train.labels)) == {32}
    assert len(train.classes) == 96
    found = [o[0]["category"] for o in train.objects]
    assert np.array_equal(found, train.labels // len(patterns.PATTERNS))


@pytest.mark.parametrize("name", data.NAMES)
def test_boxes_masks_and_keypoints_agree(built, name):
    split = shards.open(built / name, "val")
    for i, objects in enumerate(split.objects):
        for one, mask in zip(objects, split.masks(i), strict=True):
            x, y, w, h = one["bbox"]
            assert mask.sum() == one["area"] == mask[y : y + h, x : x + w].sum()
            assert all(line.any() for line in (mask[y], mask[y + h - 1], mask[:, x], mask[:, x + w - 1]))
            for px, py, v in np.array(one["keypoints"]).reshape(-1, 3):
                assert v == 0 or mask[int(py), int(px)] == (v == 2)


def test_every_keypoint_shows_unless_something_hides_it():
    """Without clutter in front all keypoints of an object inside the image are visible; with it some are not."""
    scene, label = np.arange(480), np.arange(480) % 96
    layers, draws, order = desk.layers(scene, label)
    background = compose.background(draws, order)
    shares = []
    target = len(layers) - 2
    for shown in (layers[: target + 1], layers):
        _, owner = render.scene(shown, *background, desk.SIZE)
        found = compose.annotations(owner, layers, target)
        v = np.array([one["keypoints"][2::3] for one in found if one]).ravel()
        shares.append((v[v > 0] == 2).mean())
    assert shares[0] > 0.998
    assert 0.9 < shares[1] < 0.99


def test_outlines_have_area_one_and_contain_their_keypoints():
    line = ((np.arange(400) + 0.5) / 100 - 2).astype(np.float32)
    u, v = np.broadcast_arrays(line[None], line[:, None])
    for number, shape in enumerate(shapes.OUTLINES):
        assert shapes.inside(number, u, v).mean() * 16 == pytest.approx(1, abs=0.02)
        for x, y in shape.keypoints:
            at = np.array([[x]], np.float32), np.array([[y]], np.float32)
            assert shapes.inside(number, *at).all(), shape.name


def test_no_shape_is_its_own_rotation_or_another_shape():
    """Overlap of outlines over all quarter turns and mirror images; 1 would mean that pose or class is ambiguous."""
    line = ((np.arange(200) + 0.5) / 50 - 2).astype(np.float32)
    u, v = np.broadcast_arrays(line[None], line[:, None])
    planes = [shapes.inside(k, u, v) for k in range(len(shapes.SHAPES))]
    for i, first in enumerate(planes):
        for j, second in enumerate(planes):
            for turn in range(4):
                for mirrored in (False, True):
                    other = np.rot90(second[:, ::-1] if mirrored else second, turn)
                    overlap = (first & other).sum() / (first | other).sum()
                    same = i == j and turn == 0 and not mirrored
                    assert overlap == 1 if same else overlap < 0.85, (i, j, turn, mirrored)


def test_gate_colour_area_and_position_do_not_tell_the_class(train, test):
    limit = 1.5 / 96
    colours = gate.colour(train.images()), gate.colour(test.images())
    places = gate.area_position(train.objects), gate.area_position(test.objects)
    for steps in (30, 100):
        for features in (colours, places):
            assert gate.linear_accuracy(features[0], train.labels, features[1], test.labels, steps) <= limit
    outline = [np.eye(12)[s.labels // 8] for s in (train, test)]  # control: a feature that knows the shape
    assert gate.linear_accuracy(outline[0], train.labels, outline[1], test.labels, 30) > 4 * limit


def test_scenes_hold_one_to_three_objects(built):
    split = shards.open(built / "scenes", "train")
    assert np.bincount([len(o) for o in split.objects], minlength=4).min(initial=999, where=[False, True, True, True])
    assert max(len(o) for o in split.objects) == 3
    assert min(len(o) for o in split.objects) == 1
    assert np.bincount([o["category"] for objects in split.objects for o in objects]).min() > 40
    assert set(split.labels) == {-1}


def test_rendering_differs_from_a_changed_manifest(tmp_path):
    manifest = json.loads((ROOT / "data/scenes/manifest.json").read_text())
    manifest["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: split 'val' of scenes"):
        data.build("scenes", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json"]


def test_unknown_names_are_refused(built):
    with pytest.raises(UserError, match="desk, scenes"):
        data.build("dask", built / "x")
    with pytest.raises(UserError, match="no split 'tset'"):
        shards.open(built / "desk", "tset")


def test_run_lengths_are_those_of_pycocotools():
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    for shape, share in [((7, 5), 0.5), ((64, 300), 0.02), ((300, 64), 0.98), ((4, 4), 0.0), ((4, 4), 1.0)]:
        mask = rng.random(shape) < share
        text = masks.encode(mask)
        assert text["counts"].encode() == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        assert np.array_equal(masks.decode(text, *shape), mask)
    with pytest.raises(ValueError, match="fill"):
        masks.decode(text, 4, 5)
