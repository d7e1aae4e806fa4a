"""Statistics, claims file, pictures and figures of the report, each against a hand-made or independent answer."""

import io
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mirepro.errors import UserError
from mirepro.report import claims, pictures, statistics, text


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([0.01, 0.04]) != pytest.approx([0.02, 0.08])  # Bonferroni would be wrong


def test_paired_t_by_hand() -> None:
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]  # t = 3 / (sqrt(2.5) / sqrt(5)) = 4.2426 on 4 degrees of freedom
    assert statistics.one_sided(differences) == pytest.approx(0.00662, abs=1e-5)
    assert statistics.one_sided([-d for d in differences]) == pytest.approx(1 - 0.00662, abs=1e-5)
    assert statistics.one_sided([-0.5] * 4 + [-0.4], margin=1.0) < 0.05 < statistics.one_sided([-0.5] * 4 + [-0.4])
    assert statistics.one_sided([1.0, 1.0]) == 0.0
    low, high = statistics.interval(differences) or (0, 0)
    assert (low, high) == pytest.approx((3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5)), abs=1e-5)


def test_bootstrap_covers_the_difference() -> None:
    index = np.arange(1000)
    better, worse = np.stack([index % 10 < 6] * 2), np.stack([index % 10 < 4] * 2)
    low, high = statistics.bootstrap(better, worse)
    assert 15 < low < 20 < high < 25
    assert statistics.bootstrap(better, worse) == (low, high)
    assert statistics.bootstrap(better, better) == (0.0, 0.0)


def test_claims_file_is_checked(tmp_path: Path) -> None:
    good = claims.PATH.read_text()
    assert {claim.id for claim in claims.read(claims.PATH).claims} >= {"ir-random", "ring-ball", "ball-ir"}
    for change, message in (
        (("than: pixels", "then: pixels"), "then"),
        (("margin: 1.0", "margin: -1.0"), "margin: -1.0 is impossible"),
        (("margin: 1.0", "margin: .nan"), "margin: nan is impossible"),
        (("id: ball-random", "id: ir-random"), "share an id"),
        (("alpha: 0.05", "alpha: 5"), "alpha"),
    ):
        path = tmp_path / "claims.yaml"
        path.write_text(good.replace(*change))
        with pytest.raises(UserError, match=message):
            claims.read(path)


def test_png_is_stored_and_reads_back() -> None:
    from PIL import Image

    image = np.arange(3 * 150 * 160, dtype=np.uint32).astype(np.uint8).reshape(3, 150, 160)
    content = pictures.png(image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1), image)
    start = content.index(b"IDAT") + 4
    assert struct.unpack("<BHH", content[start + 2 : start + 7]) == (0, 65535, 0)  # a stored block, not the last
    assert len(content) > image.size


def test_masks_agree_with_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((40, 50), np.uint8)
    mask[3:17, 5:31] = 1
    mask[10:30, 20:24] ^= 1
    rle = coco.encode(np.asfortranarray(mask))
    decoded = pictures.decode_rle({"size": rle["size"], "counts": rle["counts"].decode()})
    assert np.array_equal(decoded, mask.astype(bool))
    path = pictures.mask_path(decoded)
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", path)
    assert sum(int(run[2]) for run in runs) == mask.sum()
    assert all(mask[int(y), int(x)] for x, y, _, _ in runs)


def test_protocols_that_differ_in_words_merge() -> None:
    merged = text.merge(["L2 0.1 of 7, flat", "L2 0.01 of 7, flat", "L2 0.1 of 7, flat", ""])
    assert merged == ["L2 0.1/0.01 of 7, flat"]
    assert text.merge(["a b", "a b c"]) == ["a b", "a b c"]
    assert text.merge(["k 128; bound", "k 256; bound"]) == ["k 128/256; bound"]
    assert text.merge(["k 128/256; bound", "k 512; bound"]) == ["k 128/256/512; bound"]
    assert text.merge(["a b c d", "w x y d"]) == ["a b c d", "w x y d"]  # control: three words are another protocol


def test_keypoints_of_annotations_and_predictions() -> None:
    assert pictures.visible([1, 2, 2, 3, 4, 0]) == [(1.0, 2.0)]
    assert pictures.visible([[1, 2], [3, 4]]) == [(1.0, 2.0), (3.0, 4.0)]
    assert pictures.visible(None) == []


def test_report_starts_without_heavy_modules() -> None:
    code = "import sys, mirepro.report.tables, mirepro.report.page; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in modules  # the control: the list is not empty
    assert not {"torch", "matplotlib", "scipy", "jinja2", "jsonschema"} & set(modules)


def test_figures_use_the_packaged_font(caplog: pytest.LogCaptureFixture) -> None:
    from mirepro.report import figures

    svg = figures.dots("name", "label", {"row": [1.0, 2.0], "single": [3.0]})
    assert "findfont" not in caplog.text
    assert 'id="name-DejaVuSans-' in svg
    assert svg == figures.dots("name", "label", {"row": [1.0, 2.0], "single": [3.0]})
    assert "currentColor" in svg
    assert figures.INK not in svg
