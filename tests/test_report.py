"""Tables, claims and page from a synthetic tree of metrics; every check has a control that must fail."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import reported
from reported import KEY, LAYOUT, SEEDED, SETTINGS

from mirepro import files, metrics
from mirepro.errors import UserError
from mirepro.report import claims, exhibits, page, tables, text


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic tree of everything the report reads."""
    root = tmp_path_factory.mktemp("report")
    reported.write(root)
    return root


@pytest.fixture
def root(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tree that a test may change; images come from `reported.fake_open`."""
    reported.fake_data(monkeypatch)
    return Path(shutil.copytree(tree, tmp_path / "root"))


def table(root: Path, name: str) -> dict:
    return files.read_json(root / f"tables/desk/{name}.json")


def row_of(content: dict, name: str) -> dict:
    return next(row for row in content["rows"] if row["row"] == name)


def verdicts(root: Path) -> dict[str, str]:
    return {item["id"]: item["verdict"] for item in table(root, "claims")["claims"]}


def set_cell(root: Path, run: str, column: str, value: float | None) -> None:
    path = root / f"metrics/desk/evaluate/{run}.json"
    content = files.read_json(path)
    content["cells"][column]["value"] = value
    files.write_json(path, content)


def test_two_builds_are_byte_equal_and_other_numbers_are_not(root: Path) -> None:
    def build() -> dict[str, bytes]:
        tables.build(root, "desk", LAYOUT)
        page.build(root, "desk", LAYOUT, KEY, None)
        made = [*root.glob("tables/desk/*"), *root.glob("reports/desk/*")]
        return {path.name: path.read_bytes() for path in made}

    first = build()
    shutil.rmtree(root / "tables")
    shutil.rmtree(root / "reports")
    assert build() == first
    assert {f"T{i}.{kind}" for i in range(1, 8) for kind in ("json", "md")} <= set(first)
    set_cell(root, "ir-s0", "linear_flat", 50.0)
    changed = build()
    assert changed["index.html"] != first["index.html"]
    assert changed["T1.json"] != first["T1.json"]
    assert changed["T2.json"] == first["T2.json"]


def test_headlines_take_the_authors_protocol_where_the_other_was_not_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls have only the other; the control of this test is the profile as it is."""
    monkeypatch.setattr("mirepro.report.figures.dots", lambda name, label, rows: rows)
    for column, protocol in (("linear_flat", "flattened"), ("linear_author_flat", "author protocol, flattened")):
        (plot,) = exhibits.dots(root, "desk", LAYOUT)
        assert f"top-1 ({protocol})" in plot["caption"]
        assert "ir" in plot["svg"]
        assert ("pixels" in plot["svg"]) == (column == "linear_flat")
        tables.build(root, "desk", LAYOUT)
        (card, *_) = page.best(table(root, "T1"), column, "Linear top-1")
        assert card in page.cards({"T1": table(root, "T1")}, {"claims": []})
        for path in (root / "metrics/desk/evaluate").iterdir():
            set_cell(root, path.stem, "linear_flat", None)


def test_neighbours_are_those_of_ring_or_else_of_the_first_trained_row(root: Path) -> None:
    shutil.copytree(root / "runs/desk/evaluate/ring-s0", root / "runs/desk/evaluate/ir-s0", dirs_exist_ok=True)

    def shown(*rows: str) -> list[str]:
        layout = LAYOUT | {"T1": {"rows": {row: [f"{row}-s0"] for row in rows}}}
        return [gallery["run"] for gallery in exhibits.galleries(root, "desk", layout)]

    assert shown("random", "ir", "ring") == ["ring-s0", "random-s0"]
    assert shown("random", "ir") == ["ir-s0", "random-s0"]
    assert shown("ir") == ["ir-s0"]


def test_a_profile_may_have_claims_of_its_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.build(root, "desk", LAYOUT)
    assert "ring-ball" in verdicts(root)  # control: those of all profiles without their own
    own = "{id: mine, table: T1, column: linear_flat, better: cmc, than: ir}"
    files.write_text(tmp_path / "claims.desk.yaml", f"alpha: 0.05\nseeds: 5\nnote: Mine.\nclaims: [{own}]\n")
    monkeypatch.setattr(claims, "PATH", tmp_path / "claims.yaml")
    tables.build(root, "desk", LAYOUT)
    assert verdicts(root) == {"mine": "supported"}
    assert (root / "tables/desk/claims.md").read_text().startswith("# Claims\n\nMine.\n\nPaired")


def test_cells_hold_mean_and_sample_deviation(root: Path) -> None:
    for seed, value in enumerate((30.0, 32.0, 34.0, 36.0, 38.0)):
        set_cell(root, f"ir-s{seed}", "linear_flat", value)
    tables.build(root, "desk", LAYOUT)
    cell = row_of(table(root, "T1"), "ir")["cells"]["linear_flat"]
    assert (cell["mean"], cell["n"], cell["unit"], cell["published"]) == (34.0, 5, "%", None)
    assert cell["std"] == pytest.approx(math.sqrt(10))
    assert text.cell(cell, "linear_flat") == "34.0 ± 3.2"


def test_rows_keep_the_layouts_order_and_say_what_they_support(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    rows = table(root, "T1")["rows"]
    assert [row["row"] for row in rows] == [*SEEDED, "colour", "area_position", "pixels", "hog"]
    notes = {row["row"]: row["note"] for row in rows}
    assert notes["ir"] == ""
    assert "no ordering claim" in notes["cave"]
    assert "control" in notes["pixels"]
    assert "supports no claim" in table(root, "T6")["rows"][0]["note"]


def test_schema_accepts_what_is_built_and_refuses_a_broken_table(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    made = [name for name in tables.TITLES if (root / f"tables/desk/{name}.json").is_file()]
    assert set(made) == (LAYOUT.keys() & tables.TITLES.keys()) | {"T5"}
    for name in made:
        tables.check(table(root, name))
    broken = table(root, "T1")
    broken["rows"][0]["cells"]["knn_1"]["mean"] = "35.1"
    with pytest.raises(UserError, match=r"T1.*knn_1\.mean"):
        tables.check(broken)
    extra = table(root, "T1")
    del extra["rows"][0]["cells"]["knn_1"]
    with pytest.raises(UserError, match="not the table's columns"):
        tables.check(extra)


def test_absent_values_render_as_absent(root: Path) -> None:
    set_cell(root, "ir-s3", "linear_flat", None)
    tables.build(root, "desk", LAYOUT)
    assert row_of(table(root, "T1"), "ir")["cells"]["linear_flat"]["n"] == 4
    boxes = row_of(table(root, "T2"), "ir")["cells"]
    assert boxes["box_APs_tuned"]["mean"] is None
    assert text.cell(boxes["box_APs_tuned"], "box_APs_tuned") == "n/a"
    assert boxes["box_AP_tuned"]["mean"] is not None
    assert "| n/a |" in (root / "tables/desk/T2.md").read_text()
    assert "-1.0" not in (root / "tables/desk/T2.md").read_text()


def test_published_values_stand_beside_and_empty_ones_do_not(root: Path) -> None:
    path = root / "published/desk.csv"
    head = "paper,version,table,row,column,value,unit,page,transcribed_by,pdf_sha256\n"
    files.write_text(path, head + f"p,1,2,ir,linear_flat,47.5,%,4,x,{'0' * 64}\np,1,2,ball,linear_flat,,%,4,x,\n")
    tables.build(root, "desk", LAYOUT)
    content = table(root, "T1")
    assert row_of(content, "ir")["cells"]["linear_flat"]["published"] == 47.5
    assert row_of(content, "ball")["cells"]["linear_flat"]["published"] is None
    assert "(published 47.5)" in (root / "tables/desk/T1.md").read_text()
    files.write_text(path, head + f"p,1,2,ir,linear_flat,about 47,%,4,x,{'0' * 64}\n")
    with pytest.raises(UserError, match=r"desk\.csv"):
        tables.build(root, "desk", LAYOUT)


def test_bounds_by_form_need_no_certificate(root: Path) -> None:
    """Of one objective a bound by its form, of another one certified now and then; the toy's cases likewise."""
    for run, unit, value in (("T6-u=1-s0", metrics.BY_FORM, None), ("T6-u=.1-s0", "%", 25.0)):
        path = root / f"metrics/desk/pretrain/{run}.json"
        content = files.read_json(path)
        content["cells"]["certified_share"] = {"value": value, "unit": unit, "protocol": "p"}
        files.write_json(path, content)
    toy = files.read_json(root / "metrics/desk/toy.json")
    toy["detail"]["cases"][0] |= {"bound": True}
    files.write_json(root / "metrics/desk/toy.json", toy)
    tables.build(root, "desk", LAYOUT)
    lines = (root / "tables/desk/T6.md").read_text().splitlines()
    shown = {name: " ".join(line for line in lines if line.startswith(f"| {name} ")) for name in SETTINGS["T6"]}
    assert metrics.BY_FORM in shown["u=1"]
    assert metrics.BY_FORM not in shown["u=.1"]
    assert "25.0" in shown["u=.1"]
    certified = [row["cells"]["certified"] for row in table(root, "T5")["rows"]]
    assert certified[0]["unit"] == metrics.BY_FORM
    assert {cell["unit"] for cell in certified[1:]} == {"yes/no"}
    broken = table(root, "T5")
    broken["rows"][0]["cells"]["certified"]["mean"] = 1.0
    with pytest.raises(UserError, match=r"certified"):
        tables.check(broken)


def bootstraps(root: Path) -> dict[str, list[float] | None]:
    tables.build(root, "desk", LAYOUT)
    return {item["id"]: item["bootstrap"] for item in table(root, "claims")["claims"]}


def test_images_are_resampled_against_a_control_too(root: Path) -> None:
    assert bootstraps(root)["ir-pixels"] is None  # nothing says which images the control got right
    path = root / "metrics/desk/controls.json"
    content = files.read_json(path)
    right = np.arange(200) % 10 == 0
    content["rows"]["pixels"] = {
        "cells": content["rows"]["pixels"],
        "answers": [{"linear_flat": np.packbits(right).tobytes().hex(), "n": 200}],
    }
    files.write_json(path, content)
    low, high = bootstraps(root)["ir-pixels"]
    runs = [files.read_json(root / f"runs/desk/evaluate/ir-s{seed}/test.json")["linear_flat"] for seed in range(5)]
    answers = [np.unpackbits(np.frombuffer(bytes.fromhex(run), np.uint8))[:200] for run in runs]
    assert low < 100 * (np.mean(answers) - right.mean()) < high
    content["rows"]["pixels"]["answers"][0]["n"] = 150
    files.write_json(path, content)
    with pytest.raises(UserError, match="ir-pixels: its rows were tested on different numbers of images"):
        tables.build(root, "desk", LAYOUT)


def test_missing_metrics_name_the_file(root: Path) -> None:
    (root / "metrics/desk/evaluate/ball-s2.json").unlink()
    with pytest.raises(UserError, match=r"ball-s2\.json"):
        tables.build(root, "desk", LAYOUT)


def test_verdicts_follow_the_data(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    before = verdicts(root)
    assert before["ir-random"] == before["ring-ball"] == claims.SUPPORTED
    for seed in range(5):
        set_cell(root, f"ir-s{seed}", "linear_flat", 13.0 + seed / 10)
    tables.build(root, "desk", LAYOUT)
    after = verdicts(root)
    assert after["ir-random"] == claims.REJECTED
    assert after["ring-random"] == claims.SUPPORTED
    set_cell(root, "ir-s4", "linear_flat", None)
    tables.build(root, "desk", LAYOUT)
    assert verdicts(root)["ir-random"] == claims.SEEDS


def test_only_the_layouts_own_data_are_shown(root: Path) -> None:
    assert exhibits.split_of(root, LAYOUT, "scenes", "train") is not None  # control: a layout without data
    assert exhibits.split_of(root, {"data": {"images": "desk"}}, "images", "train") is not None
    assert exhibits.split_of(root, {"data": {"images": "desk"}}, "scenes", "train") is None


def test_original_stands_beside_simplified(root: Path) -> None:
    pairs = {"ir_nce": ["ir_nce-s0", "ir_nce-s1"], "ir": ["ir-s0"], "la": ["la-s0"], "cave": ["cave-s0"]}
    shown = exhibits.curves(root, "desk", {"T1": {"rows": pairs}})["figures"][-1]
    assert shown["name"] == "curve-pairs"
    assert panels(shown["svg"]) == 2
    shutil.rmtree(root / "runs/desk/pretrain/cave-s0")  # control: a pair of which one was not trained is left out
    assert panels(exhibits.curves(root, "desk", {"T1": {"rows": pairs}})["figures"][-1]["svg"]) == 1
    assert exhibits.curves(root, "desk", {"T1": {"rows": {"ir": ["ir-s0"]}}})["figures"][-1]["name"] == "curve-knn1_val"


def panels(svg: str) -> int:
    """How many axes a figure has."""
    return len(re.findall(r'id="[\w-]*axes_\d+"', svg))


def test_page_is_self_contained_and_complete(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    path = page.build(root, "desk", LAYOUT, KEY, None)
    content = path.read_text()
    assert path == root / "reports/desk/index.html"
    assert len(content.encode()) < page.LIMIT
    assert not foreign(content)
    assert foreign('<img src="https://example.org/a.png">')
    assert foreign("<style>a{background:url(http://x/y)}</style>")
    assert "<script" not in content
    for part in ("claims", "T1", "T5", "T7", "curves", "neighbours", "detections", "data", "deviations", "key"):
        assert f'id="{part}"' in content, part
    ids = re.findall(r'\bid="([^"]+)"', content)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', content)) | set(re.findall(r"url\(#([^)]+)\)", content))
    assert used <= set(ids)
    assert not re.search(r"\b20[2-9]\d-\d\d-\d\d\b", content)


def foreign(content: str) -> list[str]:
    """References to anything outside the page."""
    return re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*(?:https?:)?//[^"')]+""", content)


def test_view_goes_elsewhere_and_holds_what_varies(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    view = {"environment": {"host": "box-17"}, "durations": {"pretrain": {"ir-s0": "31 s"}}, "lock_hash": "abc123"}
    path = page.build(root, "desk", LAYOUT, KEY, view)
    assert path == root / "view/desk/index.html"
    assert all(word in path.read_text() for word in ("box-17", "pretrain.ir-s0", "abc123"))
    assert "box-17" not in page.build(root, "desk", LAYOUT, KEY, None).read_text()


def test_page_of_a_profile_without_most_parts(root: Path) -> None:
    for name in ("toy.json", "controls.json"):
        (root / "metrics/desk" / name).unlink()
    shutil.rmtree(root / "data")
    layout = {"T1": {"rows": {"ir": ["ir-s0"]}}}
    shutil.rmtree(root / "runs")
    tables.build(root, "desk", layout)
    content = page.build(root, "desk", layout, KEY, None).read_text()
    assert 'id="T1"' in content
    assert 'id="T2"' not in content
    assert "not enough seeds" in content


def test_values_are_escaped(root: Path) -> None:
    tables.build(root, "desk", LAYOUT)
    content = page.build(root, "desk", LAYOUT, {"cpu": "<b>&"}, None).read_text()
    assert "&lt;b&gt;&amp;" in content
    assert "<b>&" not in content
