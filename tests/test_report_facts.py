"""What tables state beside their numbers: grids, OKS sigmas, unverified definitions, sizes of features."""

import re
import shutil
from pathlib import Path

import pytest
import reported
from reported import KEY, LAYOUT

from mirepro import files, objectives
from mirepro.report import facts, metrics, page, tables, text
from mirepro.report.metrics import Record

RATES = "lr grid 5e-05, 0.0001 (2 trials)"
SIGMAS = "OKS sigmas 0.026, 0.079, times x in columns @x"


def record(column: str, detail: dict) -> Record:
    return Record("a-s0", 0, {column: {"value": 1.0, "unit": "%", "protocol": "p"}}, row="a", detail=detail)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic tree with its tables."""
    folder = tmp_path_factory.mktemp("facts")
    reported.write(folder)
    tables.build(folder, "desk", LAYOUT)
    return folder


def table(root: Path, name: str) -> dict:
    return files.read_json(root / f"tables/desk/{name}.json")


def protocols(root: Path, name: str, column: str) -> set[str]:
    return {row["cells"][column]["protocol"] for row in table(root, name)["rows"]}


def notes(root: Path, name: str) -> dict[str, str]:
    return {row["row"]: row["note"] for row in table(root, name)["rows"]}


@pytest.mark.parametrize(
    ("column", "stated"),
    [
        ("linear_flat", "p; L2 grid 0.1, 1, 10000 (3 trials)"),
        ("linear_pool", "p"),  # controls: no grid of this kind, a protocol without one, another column
        ("linear_author_flat", "p"),
        ("knn_1", "p"),
    ],
)
def test_a_linear_protocol_states_its_grid(column: str, stated: str) -> None:
    detail = {"grid": {"flat": {"0.1": 3.0, "10000.0": 1.0, "1.0": 2.0}}, "trials": 3}
    assert facts.protocol(record(column, detail), column) == stated
    assert facts.protocol(record(column, {}), column) == "p"


@pytest.mark.parametrize(
    ("column", "stated"),
    [
        ("box_AP_tuned", f"p; {RATES}"),
        ("mask_AP50_long", f"p; {RATES}"),
        ("keypoint_AP@x2_frozen", f"p; {RATES}; {SIGMAS}"),
        ("keypoint_AP_fixed", f"p; {SIGMAS}"),
        ("box_AP_fixed", "p"),  # control: a rate that nobody chose
    ],
)
def test_a_detectors_protocol_states_grid_and_sigmas(column: str, stated: str) -> None:
    detail = {"grid": {"0.0001": {}, "5e-05": {}}, "trials": 2, "oks_sigmas": [0.026, 0.079]}
    assert facts.protocol(record(column, detail), column) == stated
    assert facts.protocol(record(column, {}), column) == "p"


def test_equal_sigmas_are_stated_once() -> None:
    assert facts.sigmas([0.05, 0.05]) == "OKS sigma 0.05 for every keypoint, times x in columns @x"
    assert facts.sigmas([0.05, 0.1]) != facts.sigmas([0.05, 0.05])


def test_tables_have_grids_and_sigmas(made: Path) -> None:
    assert protocols(made, "T1", "linear_flat") >= {"frozen encoder; L2 chosen on val; L2 grid 0.1, 1, 10 (3 trials)"}
    chosen = "torchvision recipe, lr chosen on val; lr grid 0.002, 0.004, 0.008 (3 trials)"
    assert protocols(made, "T2", "box_AP_tuned") == protocols(made, "T3", "mask_AP50_long") == {chosen}
    (keypoints,) = protocols(made, "T4", "keypoint_AP_tuned")
    assert keypoints.startswith(f"{chosen}; OKS sigma 0.05")
    assert not any("sigma" in line for line in protocols(made, "T2", "box_AP_tuned"))  # control


def test_a_detector_has_its_budget_beside_it(made: Path) -> None:
    for name in ("T2", "T3", "T4"):
        content = table(made, name)
        heading, columns = text.groups(content)[-1]
        assert heading == "Budget"
        assert text.cells(content["rows"][0], columns) == ["1,600", "3,200", "267,141", "3"]
    assert tables.precision_columns("box", [[record("box_AP_tuned", {})]]) == ["box_AP_tuned"]  # control


def test_unverified_definitions_are_those_of_the_documentation(root: Path) -> None:
    lines = (root / "docs/deviations.md").read_text().splitlines()
    tagged = [line for line in lines if line.startswith("|") and line.rstrip().endswith("| [unverified] |")]
    assert all(any(f"`{name}`" in line for line in tagged) for name in facts.UNVERIFIED)
    assert any("`*_annealed`" in line for line in tagged)
    named = {name for line in tagged for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named & set(objectives.names()) <= set(facts.UNVERIFIED)
    said = {
        name for name in objectives.names()
        if "definition unverified" in (root / f"mirepro/objectives/{name}.py").read_text().splitlines()[0]
    }  # fmt: skip
    assert {"cave"} < said <= set(facts.UNVERIFIED)
    assert "la" not in facts.UNVERIFIED  # control: read in the authors' code


@pytest.mark.parametrize("row", ["cave", "cave_numerator", "cave_constant", "cmc_ring", "ball_annealed", "moco_ring"])
def test_rows_are_unverified_as_their_objectives_are(row: str) -> None:
    assert facts.definition(row) == "definition unverified"


@pytest.mark.parametrize("row", ["ir", "ball", "ring", "ring_l01", "cmc", "cmc_w32", "moco", "la_constant", ""])
def test_other_rows_are_not(row: str) -> None:
    assert facts.definition(row) == ""


def test_notes_state_unverified_definitions_and_other_features(made: Path) -> None:
    found = notes(made, "T1")
    other = "features: 704 flat, 176 pool (other rows: 512 flat, 128 pool)"
    assert found["cave"] == "n = 3: no ordering claim; definition unverified"
    assert found["cmc"] == other
    assert found["cmc_ring"] == f"n = 3: no ordering claim; definition unverified; {other}"
    assert found["pixels"] == "control without randomness"
    assert found["ir"] == ""  # control
    assert f"| {other} |" in (made / "tables/desk/T1.md").read_text()
    assert not any("features" in note for note in notes(made, "T6").values())  # control: all of one size


def test_the_note_goes_by_the_run_not_by_what_the_table_calls_it(made: Path) -> None:
    layout = {"T6": {"rows": {"clusters left out": ["cave-s0"], "cave": ["ball-s0"]}}}
    rows = {row["row"]: row["note"] for row in tables.make(made, "desk", layout, "T6", {})["rows"]}
    assert "unverified" in rows["clusters left out"]
    assert "unverified" not in rows["cave"]


def test_the_page_marks_what_the_notes_say(made: Path) -> None:
    shown = page.present(table(made, "T1"))
    marks = {line["row"]: (line["marks"], line["n"]) for part in shown["parts"] for line in part["lines"]}
    assert (marks["ir"], marks["cave"], marks["cmc"]) == (("", "5"), ("‡", "3*"), ("§", "5"))
    assert (marks["cmc_ball"], marks["pixels"]) == (("‡§", "3*"), ("", "–"))
    legend = "; ".join(shown["notes"])
    assert "‡ definition unverified" in legend
    assert "§ features: 704 flat" in legend
    assert "‡" not in "; ".join(page.present(table(made, "T2"))["notes"])  # control


def test_the_page_shows_the_marks(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported.fake_data(monkeypatch)
    content = page.build(made, "desk", LAYOUT, KEY, None).read_text()
    assert '<th scope="row">cave&nbsp;‡</th>' in content
    assert '<th scope="row">ball</th>' in content  # control
    assert "OKS sigma 0.05 for every keypoint" in content


def test_ablations_show_the_authors_protocol(made: Path) -> None:
    """At full scale nothing else on flattened features was measured."""
    for name in ("T6", "T7"):
        content = table(made, name)
        assert "linear_author_flat" in content["columns"]
        assert sum(len(columns) for _, columns in text.groups(content)) == len(content["columns"])
        shown = {row["cells"]["linear_author_flat"]["mean"] for row in content["rows"]}
        assert None not in shown
    short = {"table": "T6", "columns": table(made, "T6")["columns"][1:]}
    assert [len(columns) for _, columns in text.groups(short)] == [5, 7]  # control: the last group would lack one


def test_every_column_is_an_accuracy_or_says_what_it_is(made: Path) -> None:
    columns = {column for name in ("T1", "T6", "T7") for column in tables.COLUMNS[name]} | {*metrics.BUDGET}
    needless = {*tables.ACCURACY} - {"linear_author_flat"}  # whose name does not say for how many epochs
    assert columns - needless == set(facts.MEANINGS)
    for name, shown in (("T1", "covariance rank"), ("T6", "own-row copies"), ("T5", None)):
        meanings = dict(page.meanings(table(made, name)))
        assert shown in meanings if shown else not meanings
    assert "own-row copies" not in dict(page.meanings(table(made, "T1")))  # control: a column that T1 has not


def test_a_bound_holds_in_every_epoch_or_the_cell_says_no() -> None:
    """The estimate beside it is that of the last epoch; control: another column's share of 1."""
    shares = ((1.0, 0.0, ""), (0.533, 0.183, ""), (0.5, None, ""), (None, None, "by form"), (None, None, ""))
    shown = [text.cell(tables.entry(mean, std, 3, unit, ""), "certified_share") for mean, std, unit in shares]
    assert shown == ["yes", "no (0.533 ± 0.183)", "no (0.500)", "by form", "n/a"]
    assert text.cell(tables.entry(1.0, 0.0, 3, "", ""), "t3_share") == "1.000 ± 0.000"


def test_a_tables_note_stands_under_its_title(made: Path, tmp_path: Path) -> None:
    """In JSON, Markdown and page; control: a table without one."""
    made = shutil.copytree(made, tmp_path / "made")
    layout = {**LAYOUT, "data": {}, "T1": LAYOUT["T1"] | {"note": "Re-encoded <images>."}}
    tables.build(made, "desk", layout)
    html = page.build(made, "desk", layout, KEY, None).read_text()
    assert table(made, "T1")["note"] == "Re-encoded <images>."
    assert (made / "tables/desk/T1.md").read_text().splitlines()[2] == "Re-encoded <images>."
    assert html.count("Re-encoded &lt;images&gt;.") == 1
    assert "note" not in table(made, "T6")


def test_headlines_are_of_rows_with_enough_seeds(made: Path) -> None:
    """A higher row of three seeds does not stand there; control: a table in which no row has more than one."""
    content = table(made, "T1")
    for row in content["rows"]:
        row["cells"]["linear_flat"]["mean"] = {"cave": 90.0, "ring": 80.0}.get(row["row"], 10.0)
    ((_, number, words),) = page.best(content, "linear_flat", "Linear top-1")
    assert (number[:4], words.partition(";")[0]) == ("80.0", "highest trained without labels (of 5 seeds): ring")
    ((_, _, words),) = page.best(table(made, "T2"), "box_AP50_tuned", "Box AP50")
    assert "(n = 1: supports no claim)" in words


def test_a_page_without_claims_has_no_section_of_them(made: Path) -> None:
    judged = files.read_json(made / "tables/desk/claims.json")
    for claims, shown in ((judged["claims"], True), ([], False)):
        files.write_json(made / "tables/desk/claims.json", judged | {"claims": claims})
        html = page.build(made, "desk", {**LAYOUT, "data": {}}, KEY, None).read_text()
        assert ('id="claims"' in html, 'href="#claims"' in html, "Claims supported" in html) == (shown,) * 3
