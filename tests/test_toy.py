"""The Gaussian toy against its references (24 banks, standard errors .001-.004)."""

import math
import statistics
from pathlib import Path

import pytest

from mirepro import files, toy
from mirepro.params import ToyParams

REFERENCES = {
    5: {"nce_16": 0.637, "nce_256": 0.713, "nce_4096": 0.719, "ball_.5": 0.142, "ball_.1": -0.709,
        "ball_.01": -1.402, "ring_1-.1": 1.200, "ring_.1-.01": -0.577},
    20: {"nce_16": 1.935, "nce_256": 2.700, "nce_4096": 2.859, "ball_.5": 2.085, "ball_.1": 0.682,
         "ball_.01": -1.018, "ring_1-.1": 4.056, "ring_.1-.01": 1.387},
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def cases(out):
    rows = toy.toy(ToyParams(banks=4, redraws=4), out)["detail"]["cases"]
    return {(row["d"], row["name"]): row for row in rows}


@pytest.mark.parametrize("d", [5, 20])
def test_estimates_agree_with_the_references(cases, d):
    for name, reference in REFERENCES[d].items():
        row = cases[d, name]
        assert abs(row["value"] - reference) <= 3 * math.hypot(0.004, row["se"]) + 5e-4, name
        assert abs(row["value"] + 0.2 - reference) > 3 * math.hypot(0.004, row["se"]), name


@pytest.mark.parametrize("d", [5, 20])
def test_order_and_claims(cases, d):
    values = [cases[d, f"nce_{k}"] for k in (16, 256, 4096)]
    assert values[0]["value"] < values[1]["value"] < values[2]["value"] <= values[2]["mi"] + 3 * values[2]["se"]
    ring = cases[d, "ring_1-.1"]
    assert ring["value"] > ring["mi"]
    assert not ring["certified"]
    assert cases[d, "nce_16"]["certified"]


def test_a_partition_without_the_positive_exceeds_the_information():
    params = ToyParams(banks=1)
    positive, scores = toy.critic(20, 0.5, params, 0)
    kind, mi = toy.ESTIMATORS[0], toy.information(20, 0.5)
    proper = float((toy.sampled(positive, scores, kind, 0, 0) - positive).mean()) + mi
    wrong = float((toy.sampled(positive, scores, kind, 0, 0, with_positive=False) - positive).mean()) + mi
    assert proper < mi < wrong


def test_redraws_of_the_ring_vary_least(cases):
    assert cases[20, "ring_.1-.01"]["sd"] < cases[20, "ball_.1"]["sd"] < cases[20, "nce_256"]["sd"]
    assert cases[20, "nce_256"]["sd"] == pytest.approx(0.34, abs=0.03)


def test_the_banks_give_the_table(cases, out):
    banks = {(row["d"], row["name"]): row for row in files.read_json(out / "banks.json")}
    assert banks.keys() == cases.keys()
    for key, row in banks.items():
        assert len(row["values"]) == len(row["certificates"]) == 4
        assert statistics.fmean(row["values"]) == pytest.approx(cases[key]["value"], abs=1e-12)
        assert statistics.stdev(row["values"]) / 2 == pytest.approx(cases[key]["se"], rel=1e-9)
        if cases[key]["certified"]:
            assert statistics.fmean(row["values"]) < statistics.fmean(row["certificates"])
