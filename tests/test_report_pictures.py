"""Pictures of the page: shrunk exactly, within its limit, and left out where terms forbid to pass them on."""

import hashlib
import re
import shutil
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reported
from numpy.typing import NDArray
from reported import KEY, LAYOUT

import mirepro.data as data
from mirepro.data import catalogue, masks
from mirepro.errors import UserError
from mirepro.report import exhibits, page, pictures, tables

BIG = {**LAYOUT, "data": {"images": "imagenet", "scenes": "coco"}}
CITED = "no licence stated; cite the technical report"


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), np.uint8)


def large(folder: Path, split: str) -> types.SimpleNamespace:
    """Stands for ImageNet's squares and COCO's photographs with people on them."""
    content = reported.fake_open(folder, split)
    height, width = (480, 640) if folder.name == "coco" else (256, 256)
    content.image = lambda index, size=None: picture(height, width, index)
    return content


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic tree with its tables."""
    folder = tmp_path_factory.mktemp("pictures")
    reported.write(folder)
    tables.build(folder, "desk", LAYOUT)
    for name in ("imagenet", "coco", "cifar10"):
        shutil.copytree(folder / "data/desk", folder / "data" / name)
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a page's time and are no matter here."""
    monkeypatch.setattr(exhibits, "curves", lambda *_: {"figures": [], "legend": []})
    for name in ("dots", "toy"):
        monkeypatch.setattr(exhibits, name, lambda *_: [])


def build(tree: Path, layout: dict, view: dict | None = None) -> str:
    return page.build(tree, "desk", layout, KEY, view).read_text()


def test_a_shrunk_image_is_the_rounded_mean_of_areas() -> None:
    """Against fractions, pixel by pixel, for ratios that are no whole numbers."""
    image = picture(7, 10)
    shrunk = pictures.resized(image, 3, 4)
    for c, i, j in np.ndindex(3, 3, 4):
        top, left = Fraction(7 * i, 3), Fraction(10 * j, 4)
        total = Fraction(0)
        for y, x in np.ndindex(7, 10):
            high = min(top + Fraction(7, 3), y + 1) - max(top, Fraction(y))
            wide = min(left + Fraction(10, 4), x + 1) - max(left, Fraction(x))
            total += max(high, Fraction(0)) * max(wide, Fraction(0)) * int(image[c, y, x])
        assert shrunk[c, i, j] == int(total / (Fraction(7, 3) * Fraction(10, 4)) + Fraction(1, 2))
    assert not np.array_equal(shrunk, image[:, ::3, ::3][:, :, :4])  # control: pixels left out instead


def test_a_shrunk_images_bytes_are_golden() -> None:
    image = (np.arange(3 * 256 * 256) ** 2 % 251).astype(np.uint8).reshape(3, 256, 256)
    digest = hashlib.sha256(pictures.thumbnail(image, 32).tobytes()).hexdigest()
    assert digest[:16] == "609d8d90b72e0782"
    image[0, 0, :8] ^= 255
    assert hashlib.sha256(pictures.thumbnail(image, 32).tobytes()).hexdigest() != digest


def test_small_images_keep_their_bytes() -> None:
    image = picture(32, 30)
    assert pictures.thumbnail(image, 32) is image
    assert np.array_equal(pictures.resized(image, 32, 30), image)
    assert pictures.thumbnail(picture(33, 32), 32).shape == (3, 32, 31)  # control
    assert pictures.thumbnail(picture(480, 640), 32).shape == (3, 24, 32)
    assert pictures.thumbnail(picture(1, 640), 32).shape == (3, 1, 32)


def test_marks_scale_with_their_image() -> None:
    mask = np.zeros((480, 640), bool)
    mask[120:360, 160:320] = True
    rings = [[160, 120, 320, 120, 320, 360]]
    objects = [
        {"bbox": [160, 120, 160, 240], "segmentation": masks.encode(mask), "keypoints": [320, 240, 2, 0, 0, 0]},
        {"bbox": [0, 0, 640, 480], "segmentation": rings},
    ]
    drawn = pictures.marks(objects, (480, 640), 64)
    assert '<rect x="16" y="16" width="16" height="32"' in drawn
    assert '<rect x="0" y="0" width="64" height="64"' in drawn
    assert 'd="M32 32h0"' in drawn
    assert 'd="M16 16L32 16L32 48z"' in drawn
    runs = re.findall(r"M16 (\d+)h16v1H16z", drawn)
    assert [int(y) for y in runs] == list(range(16, 48))
    assert drawn != pictures.marks(objects, (640, 480), 64)  # control: sides exchanged


def test_marks_of_an_unshrunk_image_stay_where_they_are() -> None:
    item = {"bbox": [10.25, 3, 5, 6], "segmentation": masks.encode(np.eye(64, dtype=bool)), "keypoints": [[7.5, 8.0]]}
    drawn = pictures.marks([item], (64, 64), 64)
    assert pictures.mask_path(np.eye(64, dtype=bool)) in drawn
    assert '<rect x="10.2" y="3" width="5" height="6"' in drawn
    assert "M7.5 8h0" in drawn
    assert drawn != pictures.marks([item], (128, 128), 64)  # control


def test_only_the_best_finds_are_drawn() -> None:
    count = exhibits.FINDS + 1
    image = {"boxes": [[1, 1, 2, 2]] * count, "scores": [0.9] * count, "labels": [0] * count, "masks": None}
    shown = exhibits._detected(image, ["key"], 512, 64)
    assert shown["marks"].count("<rect") == shown["text"].count("key") == exhibits.FINDS
    fewer = {name: value and value[:2] for name, value in image.items()}
    assert exhibits._detected(fewer, ["key"], 512, 64)["marks"].count("<rect") == 2  # control


def test_a_page_of_large_images_stays_under_the_limit(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported.fake_data(monkeypatch, large)
    content = build(tree, BIG, {})
    assert content.count("data:image/png") == 40 + 2 * 6 * 9 + 6 + 6
    assert len(content.encode()) < page.LIMIT


@pytest.mark.parametrize("kept", ["TILE", "SCENE"])
@pytest.mark.usefixtures("no_figures")
def test_without_thumbnails_it_would_be_refused(tree: Path, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """The control of the test above."""
    reported.fake_data(monkeypatch, large)
    monkeypatch.setattr(exhibits, kept, 256)
    with pytest.raises(UserError, match="bytes exceed 2000000"):
        build(tree, BIG, {})


@pytest.mark.usefixtures("no_figures")
def test_the_tracked_page_leaves_out_what_must_not_be_passed_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(folder: Path, split: str) -> Any:
        opened.append(folder.name)
        return large(folder, split)

    reported.fake_data(monkeypatch, watched)
    tracked = build(tree, BIG)
    assert opened == []
    assert "data:image/png" not in tracked
    assert "Pictures of imagenet and coco are left out" in tracked
    view = build(tree, BIG, {})  # controls: the view, and data of the project's own or free ones
    assert "data:image/png" in view
    assert "are left out" not in view
    half = build(tree, {**LAYOUT, "data": {"images": "cifar10", "scenes": "coco"}})
    assert half.count("data:image/png") == 40 + 2 * 6 * 9
    assert "Pictures of coco are left out" in half
    own = build(tree, LAYOUT)
    assert "data:image/png" in own
    assert "are left out" not in own


def test_pictures_are_shown_where_the_catalogues_terms_forbid_nothing() -> None:
    free = {name for name, entry in catalogue.ENTRIES.items() if entry.terms == CITED}
    assert set(exhibits.PASSED_ON) == free | set(data.NAMES)
    forbidden = catalogue.ENTRIES.keys() - free
    assert forbidden == {"imagenet", "stl10", "coco", "coco_mini", "voc", "lvis"}  # control: both kinds are there
    assert all(re.search("ImageNet|Flickr|COCO", catalogue.ENTRIES[name].terms) for name in forbidden)


@pytest.mark.parametrize("name", ["stl10", "lvis", "another"])
def test_unknown_data_are_withheld(name: str) -> None:
    layout = {"data": {"images": name}}
    assert exhibits.withheld(layout) == [name]
    assert exhibits.public(layout)["data"] == {}
    assert exhibits.split_of(Path("/"), exhibits.public(layout), "scenes", "train") is None
    assert exhibits.public({"data": {"images": "desk"}})["data"] == {"images": "desk"}  # control
