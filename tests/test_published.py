"""The checker of published values: every line's place, number, provenance and PDF; the templates hold none."""

import csv
import hashlib
from pathlib import Path

import pytest

from mirepro import profiles
from mirepro.errors import UserError
from mirepro.report import published, tables

HEAD = ",".join(published.COLUMNS)
PDF = b"%PDF-1.5 a paper"
GOOD = f"arXiv:2005.13149,v1,2,ir,linear_author_flat,43.5,%,7,A. Reader,{hashlib.sha256(PDF).hexdigest()}"
FILLED = {"version": "v1", "table": "2", "value": "43.5", "page": "7", "transcribed_by": "A. Reader",
          "pdf_sha256": "0" * 64}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"ir": {"linear_author_flat", "knn_1"}}


def file(folder: Path, *lines: str, head: str = HEAD) -> Path:
    path = folder / "x.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_a_transcribed_value_is_read_and_an_empty_one_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, GOOD, "arXiv:2005.13149,,,ir,knn_1,,%,,,")
    assert published.read(path) == {("ir", "linear_author_flat"): 43.5}
    assert published.check(path, KNOWN) == (1, 2)
    assert published.read(tmp_path / "none.csv") == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (GOOD.replace("43.5", "about 43"), ":2: value 'about 43' is no number"),
        (GOOD.replace("43.5", "nan"), ":2: value 'nan' is no number"),
        (GOOD.replace(",7,", ",,"), ":2: page is empty beside a value"),
        (GOOD.replace("A. Reader", ""), ":2: transcribed_by is empty beside a value"),
        (GOOD.replace(",v1,", ", ,"), ":2: version is empty beside a value"),
        (GOOD[:-1], ":2: pdf_sha256 is not the output of `sha256sum`"),
        (GOOD + ",more", ":2: not 10 fields"),
        (GOOD.rpartition(",")[0], ":2: not 10 fields"),
        (GOOD.replace(",ir,", ",,"), ":2: row and column"),
        (GOOD + "\n" + GOOD, ":3: row and column .* stand twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        published.read(file(tmp_path, line))


def test_other_columns_places_and_papers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its columns are not"):
        published.read(file(tmp_path, head=HEAD.replace("page", "Seite")))
    with pytest.raises(UserError, match="ir, linear_author_flat: no table"):
        published.check(file(tmp_path, GOOD), {"ir": {"knn_1"}})
    with pytest.raises(UserError, match="ir, linear_author_flat: no table"):
        published.check(file(tmp_path, GOOD), {"ball": KNOWN["ir"]})
    right, wrong = tmp_path / "right.pdf", tmp_path / "wrong.pdf"
    right.write_bytes(PDF)
    wrong.write_bytes(PDF + b"!")
    assert published.check(file(tmp_path, GOOD), KNOWN, [wrong, right]) == (1, 1)
    with pytest.raises(UserError, match="not from these"):
        published.check(file(tmp_path, GOOD), KNOWN, [wrong])


OWN_DATA = ("desk", "coco_cpu")
"""Profiles of data that no paper has numbers of."""
METHODS = {"ir", "ball", "la", "cmc", "cmc_ball", "ring", "cave", "cmc_ring", "moco", "moco_ring", "random",
           "supervised"}  # fmt: skip
"""Rows of T1 that the papers may print; the others are this project's own."""


def test_the_committed_templates_invent_nothing(root: Path) -> None:
    for path in (root / "published").glob("*.csv"):
        assert path.read_text().splitlines()[0] == HEAD
        if path.name != "anchors.csv":  # no profile: sanity anchors of other papers, shown beside nothing
            assert published.read(path) == {}


@pytest.mark.parametrize("name", [name for name in profiles.names(ROOT) if name not in OWN_DATA])
def test_a_filled_copy_of_every_template_passes(root: Path, tmp_path: Path, name: str) -> None:
    layout = profiles.load(root, name).values["tables"]
    lines = published._lines(root / f"published/{name}.csv")
    copy = tmp_path / "x.csv"

    def write(*more: dict[str, str]) -> None:
        with copy.open("w", newline="") as file:
            writer = csv.DictWriter(file, published.COLUMNS)
            writer.writeheader()
            writer.writerows(line | FILLED for line in (*lines.values(), *more))

    write()
    assert published.check(copy, tables.places(layout)) == (len(lines), len(lines))
    ablated = {row for table in ("T6", "T7") for row in layout.get(table, {"rows": ()})["rows"]}
    rows = {row for row, column in lines if column == "linear_author_flat"}
    assert rows == ablated | (METHODS & layout["T1"]["rows"].keys())
    write(next(iter(lines.values())) | {"row": "cmc_square"})  # control
    with pytest.raises(UserError, match="cmc_square, linear_author_flat: no table of the profile has this cell"):
        published.check(copy, tables.places(layout))


def test_the_papers_templates_have_every_row_of_transfer(root: Path) -> None:
    layout = profiles.load(root, "imagenet").values["tables"]
    lines = published._lines(root / "published/imagenet.csv")
    tasks = {"T2": "box", "T3": "mask", "T4": "keypoint", "T8": "T8.box", "T9": "T9.box", "T10": "T10.mask"}
    rows = {name: set(layout[name]["rows"]) - {"simclr"} for name in tasks}  # neither abstract names it
    wanted = {(row, f"{task}_AP50_long") for name, task in tasks.items() for row in rows[name]}
    assert wanted <= lines.keys()
    assert ("cmc_ring", "keypoint_AP50_frozen") not in lines  # control


def test_a_value_stands_beside_its_cell_and_no_other(root: Path, tmp_path: Path) -> None:
    layout = {"T2": {"rows": {"ir": ["ir-s0"]}}, "T8": {"rows": {"ir": ["ir-s0"]}}}
    places = tables.places(layout)
    assert {"box_AP50_long", "T8.box_AP50_long"} <= places["ir"]
    assert "T9.box_AP50_long" not in places["ir"]
    folder = tmp_path / "metrics/x/detect"
    folder.mkdir(parents=True)
    for end in ("mask", "voc"):
        cell = '{"value": 10.0, "unit": "%", "protocol": "p"}'
        (folder / f"ir-s0-{end}.json").write_text(f'{{"seed": 0, "cells": {{"box_AP50_long": {cell}}}}}')
    values = {("ir", "T8.box_AP50_long"): 50.0}
    shown = {}
    for name in ("T2", "T8"):
        table = tables.make(tmp_path, "x", layout, name, values)
        assert table is not None
        shown[name] = table["rows"][0]["cells"]["box_AP50_long"]["published"]
    assert shown == {"T2": None, "T8": 50.0}
