"""The controls of T1: large data are reduced, and said to be; small data stay as they are."""

import io
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirepro import files
from mirepro.data import gate, shards
from mirepro.errors import UserError
from mirepro.params import EvaluateParams, LinearParams
from mirepro.transfer import controls
from tests.test_pretrain import data

__all__ = ["data"]

PARAMS = EvaluateParams(k_nn=(1, 5, 20, 200), linear=LinearParams(l2=(1.0, 100.0), iterations=3))


def protocols(document: dict[str, Any]) -> dict[str, set[str]]:
    """Of every control, without the L2 that was chosen."""
    return {
        name: {re.sub(r"L2 \S+", "L2 _", cell["protocol"]) for cell in row["cells"].values()}
        for name, row in document["rows"].items()
    }


def every(split: shards.Split) -> np.ndarray:
    return np.arange(len(split))


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """Three splits of ten images of 16 px, each with an object."""

    def sample(i: int, value: int) -> shards.Sample:
        thing = {"bbox": [i, 2, 3, 4], "area": 12 + i, "category": 0}
        pixels = np.random.default_rng(10 * value + i).integers(0, 256, 16 * 16 * 3).astype(np.uint8)
        return shards.Sample(f"{i}", b"P6\n16 16\n255\n" + pixels.tobytes(), ".ppm", i % 2, [thing])

    splits = {name: [sample(i, v) for i in range(10)] for v, name in enumerate(("train", "val", "test"))}
    shards.write(tmp_path / "objects", "objects", splits, {"classes": ["a", "b"]})
    return tmp_path / "objects"


def test_large_data_are_reduced_and_the_protocols_say_so(objects, monkeypatch):
    committed = protocols(files.read_json(Path(__file__).parent.parent / "metrics/desk/controls.json"))
    assert protocols(controls.controls(PARAMS, objects)) == committed  # control: nothing is reduced, nothing is said
    for side, most, said in ((8, 50_000, ", at 8 px"), (32, 4, ", 4 of 10 training images"),
                             (8, 4, ", at 8 px, 4 of 10 training images")):  # fmt: skip
        monkeypatch.setattr(controls, "SIDE", side)
        monkeypatch.setattr(controls, "IMAGES", most)
        found = protocols(controls.controls(PARAMS, objects))
        unseen = said.removeprefix(", at 8 px")  # area and position are not read from images
        for name, texts in committed.items():
            assert found[name] == {text + (unseen if name == "area_position" else said) for text in texts}


def test_the_regression_sees_the_reduced_images_alone(data, monkeypatch):
    """Features and classes of evenly spaced training images, of all others; images by Pillow's filter."""
    monkeypatch.setattr(controls, "SIDE", 8)
    monkeypatch.setattr(controls, "IMAGES", 7)
    monkeypatch.setattr(controls, "_row", lambda params, x, y, n_classes, reduced: {"x": x, "y": y})
    seen = controls.controls(PARAMS, data)["rows"]["pixels"]
    train, test = (shards.open(data, name) for name in ("train", "test"))
    chosen = [0, 11, 22, 34, 45, 57, 68]
    assert np.array_equal(seen["x"]["train"].numpy(), controls.pixels(train.images(8)[chosen]))
    assert seen["y"]["train"].tolist() == train.labels[chosen].tolist()
    assert np.array_equal(seen["x"]["test"].numpy(), controls.pixels(test.images(8)))
    assert seen["y"]["test"].tolist() == test.labels.tolist()


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_batches_and_limits_change_no_byte_of_small_data(data, monkeypatch, batch):
    """The features of all images at once, as they are stored; the control is a smaller side."""
    split = shards.open(data, "train")
    images = split.images(None)
    monkeypatch.setattr(controls, "BATCH", batch)
    found = controls.features(split, every(split))
    assert found["colour"].tobytes() == gate.colour(images).astype(np.float32).tobytes()
    assert found["pixels"].tobytes() == (images.reshape(80, -1).astype(np.float32) / np.float32(255)).tobytes()
    assert found["hog"].tobytes() == controls.hog(images).tobytes()
    monkeypatch.setattr(controls, "SIDE", 8)
    reduced = controls.features(split, every(split))
    assert not any(np.array_equal(found[name], reduced[name]) for name in controls.SEEN)


def test_all_of_the_desk_and_cifar_and_an_even_part_of_imagenet() -> None:
    for whole in (3072, 45_000, 50_000):
        assert np.array_equal(controls._training(whole), np.arange(whole))
    part = controls._training(1_271_167)
    assert (len(part), part[0], part[-1]) == (50_000, 0, 1_271_141)
    assert set(np.diff(part)) == {25, 26}


def held(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """How many results of a method are alive after each of its calls."""
    original, alive, counts = getattr(owner, name), [None], []

    def noted(self: Any, *args: Any) -> Any:
        made = original(self, *args)
        alive.append(None)
        weakref.finalize(made, alive.pop)
        counts.append(len(alive) - 1)
        return made

    monkeypatch.setattr(owner, name, noted)
    return counts


def test_no_more_than_a_batch_is_held(data, monkeypatch):
    """And one image that is not reduced yet; the control is a batch of everything."""
    split = shards.open(data, "train")
    monkeypatch.setattr(controls, "SIDE", 8)
    decoded, reduced = held(monkeypatch, Image.Image, "convert"), held(monkeypatch, shards.Split, "image")
    for batch, most in ((4, 5), (80, 81)):  # the first image, which tells the size, comes on top
        monkeypatch.setattr(controls, "BATCH", batch)
        decoded.clear()
        reduced.clear()
        controls.features(split, every(split))
        assert len(reduced) > 80
        assert max(reduced) == most
        assert max(decoded) <= 2


def test_images_of_different_sizes_are_refused(tmp_path):
    def picture(i: int, side: int) -> shards.Sample:
        out = io.BytesIO()
        Image.fromarray(np.full((8, side, 3), i, np.uint8)).save(out, "PNG")
        return shards.Sample(f"{i}", out.getvalue(), ".png", 0, [])

    shards.write(tmp_path, "x", {"train": [picture(i, 8 + (i == 3)) for i in range(4)]}, {"classes": ["a"]})
    split = shards.open(tmp_path, "train")
    assert controls.features(split, np.arange(3))["pixels"].shape == (3, 192)
    for index in (np.arange(4), np.array([3])):
        with pytest.raises(UserError, match="different sizes"):
            controls.features(split, index)
