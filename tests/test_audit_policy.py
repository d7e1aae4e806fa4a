"""The audit's policy: strict reading, safe defaults, margins that can show something; reading a stranger's files."""

import os
from pathlib import Path

import pytest

from mirepro.audit import policy, safe, verdicts
from mirepro.errors import UserError

GOOD = """
schema: mirepro.audit-policy/1
rules:
  - {table: T1, column: "linear_*", test: tost, margin: 6}
  - {table: T1, row: random, test: band, margin: 0.5}
claims:
  alpha: 0.05
  seeds: 5
  claims: [{id: a, table: T1, column: linear_flat, better: ball, than: ir}]
"""
RULES = GOOD[: GOOD.index("claims:")]


def load(tmp_path: Path, text: str) -> policy.Policy:
    """A policy from its text."""
    (tmp_path / "audit.yaml").write_text(text)
    return policy.load(tmp_path / "audit.yaml", "test").policy


def test_last_match_counts_and_exact_is_the_default(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert found.rule("T1", "ir", "linear_flat") == verdicts.Rule("tost", 6.0)
    assert found.rule("T1", "random", "linear_flat") == verdicts.Rule("band", 0.5)
    assert found.rule("T1", "ir", "knn_1").test == "exact"
    assert policy.load(None, "").policy.rule("T9", "x", "y") == verdicts.Rule("exact")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rules:", "rule:", "rule: unknown key"),
        ("margin: 6", "margins: 5", "margins: unknown key"),
        ("margin: 6", "margin: wide", "expected float"),
        ("margin: 6", "margin: -1", "is impossible"),
        ("margin: 6", "margin: .inf", "is impossible"),
        ("margin: 6", "margin: .nan", "is impossible"),
        ("margin: 6", "margin: 6, alpha: 0.5", "alpha 0.5"),
        (", margin: 6", "", "need a margin"),
        ("test: tost", "test: ttest", "'ttest' is unknown"),
        ("test: tost", "test: exact", "exact takes none"),
        ("policy/1", "policy/2", "expected mirepro.audit-policy/1"),
        ("better: ball, ", "", "better: missing key"),
        ("claims:\n  alpha: 0.05", "claims:\n  alpha: 2.0", "alpha must lie"),
        ("seeds: 5", "seeds: 0", "seeds be at least 2"),
        ("than: ir}", "than: ir}, {id: a, table: T1, column: knn_1, better: ball, than: ir}", "share an id"),
        ("schema:", "x: &a {}\ny: *a\nschema:", "aliases"),
        ("rules:", "schema: x\nrules:", "repeated"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    load(tmp_path, GOOD)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_margins_that_show_nothing(tmp_path: Path) -> None:
    rule = load(tmp_path, RULES)
    values = [10.0, 12.0, 14.0]  # sd 2: a margin of 6 is 3 sd
    assert policy.check(rule, {("T1", "ir", "linear_flat"): values, ("T1", "random", "knn_1"): values}) == []
    wider = {("T1", "ir", "linear_flat"): [9.9, 12.0, 14.1], ("T1", "random", "knn_1"): values}
    (problem,) = policy.check(rule, wider)
    assert "too narrow" in problem
    assert "4 seeds on both sides would do" in problem
    (problem,) = policy.check(rule, {("T1", "ir", "linear_flat"): [9.0], ("T1", "random", "knn_1"): values})
    assert "at least two published seeds" in problem
    with pytest.raises(UserError, match="correct the policy before the audit"):
        policy.refuse([problem], "audit.yaml")


def test_tables_that_fresh_seeds_do_not_measure(tmp_path: Path) -> None:
    cells = [("T1", "ir", "linear_flat"), ("T6", "ir", "linear_flat"), ("T6", "ir", "knn_1"), ("T7", "x", "linear_x")]
    assert load(tmp_path, RULES).beyond_fresh(cells) == {}
    assert load(tmp_path, RULES.replace("table: T1, column", "column")).beyond_fresh(cells) == {"T6": 1, "T7": 1}


def test_a_claim_about_nothing(tmp_path: Path) -> None:
    rule = load(tmp_path, GOOD.replace(RULES, "schema: mirepro.audit-policy/1\n"))
    cells = {("T1", row, "linear_flat"): [1.0] for row in ("ball", "ir")}
    assert policy.check(rule, cells) == []
    assert policy.check(rule, {("T1", "ball", "linear_flat"): [1.0], ("T1", "ir", "knn_1"): [1.0]}) == [
        "claim a: T1/ir/linear_flat is no cell of the tables"
    ]


def test_a_rule_for_nothing(tmp_path: Path) -> None:
    cells = {("T1", "random", "linear_pool"): [1.0]}
    assert policy.check(load(tmp_path, RULES), cells) == []
    (problem,) = policy.check(load(tmp_path, RULES.replace("row: random", "row: ramdon")), cells)[:1]
    assert "too narrow" not in problem
    problems = policy.check(load(tmp_path, RULES.replace("row: random", "row: ramdon")), {("T1", "ir", "linear_x"): []})
    assert problems == ["rule T1/ramdon/* names no cell of the tables"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1, "a": 2}', "repeated"),
        ("[" * 30_000, "strict JSON"),
        ("[" * 60 + "]" * 60, "nested deeper"),
        ("1" * 5000, "strict JSON"),
        ('{"a": 1e999}', "1e999 is no number"),
        ("-" + "1" * 400, "more than 20 digits"),
        ('["\\uD800"]', "strict JSON"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin1"), "strict JSON"),
    ],
)
def test_hostile_json(tmp_path: Path, text: str, message: str) -> None:
    """Infinite numbers, integers beyond floating point and half characters would be read, but could not be written."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        safe.read_json(tmp_path / "x.json")


def test_huge_files_links_and_pipes(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(safe.JSON_BYTES + 1)
    (tmp_path / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("huge.json", "link.json", "pipe.json", "absent.json"):
        with pytest.raises(UserError, match=r"refused|no such file"):
            safe.read_json(tmp_path / name)
    with pytest.raises(UserError, match=r"links are never followed|neither a file"):
        list(safe.walk(tmp_path))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../b", "a//b", "", "a\\b", "a\0b", 3, None])
def test_paths_out_of_the_folder(name: object) -> None:
    assert safe.inside("a/b.tar", "manifest") == "a/b.tar"
    with pytest.raises(UserError):
        safe.inside(name, "manifest")


def test_pickles_are_refused(tmp_path: Path) -> None:
    import pickle

    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "good.safetensors")
    safe.harmless(tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("bad.safetensors", "bad.pkl"):
        with pytest.raises(UserError, match="pickle"):
            safe.harmless(tmp_path / name)
