"""The checker of published values: every line's place, number, provenance and PDF; the templates hold none."""

import hashlib
from pathlib import Path

import pytest

from mirepro import profiles
from mirepro.errors import UserError
from mirepro.report import published, tables

HEAD = ",".join(published.COLUMNS)
PDF = b"%PDF-1.5 a paper"
GOOD = f"arXiv:2005.13149,v1,2,ir,linear_author_flat,43.5,%,7,A. Reader,{hashlib.sha256(PDF).hexdigest()}"
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


def test_the_committed_templates_name_cells_of_their_profiles_and_invent_nothing(root: Path) -> None:
    for name in profiles.names(root):
        path = root / "published" / f"{name}.csv"
        if name not in ("desk", "coco_cpu"):  # no paper has numbers of these data
            done, lines = published.check(path, tables.places(profiles.load(root, name).values["tables"]))
            assert (done, lines >= 8) == (0, True)
    places = tables.places(profiles.load(root, "imagenet").values["tables"])
    assert all(column in places[row] for row, column in published._lines(root / "published/imagenet.csv"))
    for path in (root / "published").glob("*.csv"):
        assert path.read_text().splitlines()[0] == HEAD
        if path.name != "anchors.csv":  # no profile: sanity anchors of other papers, shown beside nothing
            assert published.read(path) == {}


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
