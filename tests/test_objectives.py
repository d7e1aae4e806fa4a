"""The invariants of the objectives, against float64 formulas; each has a control that must fail."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
import torch

from mirepro import encoders, objectives, rng
from mirepro.bank import MemoryBank
from mirepro.errors import UserError
from mirepro.objectives.base import Objective, Step
from mirepro.params import EncoderParams
from tests.contrasts import B, D, N, enumerated, ready, setting, terms, unit

SOURCE = re.compile(r"\[[^]]*\b(paper|code|derived|measured|unverified)\b[^]]*\]")


TAGGED = {cls for name in objectives.names() for cls in objectives.load(name).__mro__ if issubclass(cls, Objective)}


@pytest.mark.parametrize("cls", sorted(TAGGED, key=lambda cls: cls.__name__))
def test_every_option_names_its_source(cls: type[Objective]) -> None:
    own = {field.name for field in dataclasses.fields(cls) if field.init} & inspect.get_annotations(cls).keys()
    assert untold(own, cls.__doc__ or "") == set()


def test_an_option_without_a_source_is_seen() -> None:
    text = "\n    Attributes:\n        k: Terms [code].\n        tau: Warmth,\n            that is [unverified].\n"
    assert untold({"k", "tau"}, text) == set()
    assert untold({"k", "momentum"}, text) == {"momentum"}
    assert untold({"k", "tau"}, text.replace("[unverified]", "")) == {"tau"}


def untold(names: set[str], text: str) -> set[str]:
    """Those of the options that a docstring does not describe with a tag of docs/deviations.md."""
    entries = re.findall(r"^        (\w+): (.*(?:\n            .*)*)", text, re.MULTILINE)
    return names - {name for name, words in entries if SOURCE.search(words)}


@pytest.mark.parametrize("name", ["ir", "ball", "ring", "cave", "cmc", "cmc_ball", "cmc_ring"])
def test_estimates_stay_below_their_cap(name):
    objective = objectives.create(name, {"k": 17})
    _, banks, index = setting(objective.modalities)
    perfect = {m: banks[o].rows[index] for (m, o) in objective.pairs()}
    objective = ready(name, banks)
    for t in terms(objective, perfect, banks, index):
        assert float(t.estimate.max()) <= objective.cap(N) + 1e-5
    assert objective.cap(N) == pytest.approx(math.log(17))


@pytest.mark.parametrize("name", ["ir", "ball", "cmc", "cmc_ball"])
@pytest.mark.parametrize("k", [300, 4000])
def test_more_terms_than_rows_are_capped_by_the_rows(name, k):
    """Of the enumerated form: draws that happen to miss the own row can take an anchor beyond log N, up to log k.

    Rings have no own row among theirs, so that nothing but log k bounds their estimates.
    """
    objective = objectives.create(name, {"k": k})
    _, banks, index = setting(objective.modalities)
    perfect = {m: banks[o].rows[index] for (m, o) in objective.pairs()}
    objective = ready(name, banks, k=k, tau=0.01)
    assert objective.cap(N) <= math.log(N) < math.log(k)
    for q in objective.queries(perfect, banks, index, Step(0, 9, 10)):
        estimate = -enumerated(objective, q)
        assert float(estimate.max()) <= objective.cap(N) + 1e-4
        assert float(estimate.max()) > objective.cap(N // 2)  # control: the cap of half the rows is too low
        assert float(objective.terms(q).estimate.max()) <= math.log(k) + 1e-5


def test_caps():
    assert objectives.create("ir", {"k": 17}).cap(5) == pytest.approx(math.log(5))
    assert objectives.create("ball", {"k": 17, "outer": 0.5}).cap(20) == pytest.approx(math.log(17) - math.log(1 + 1.6))
    assert objectives.create("ball", {"k": 17, "outer": 0.5}).cap(40) == pytest.approx(math.log(17))


def test_ir_estimate_is_the_sampled_cross_entropy():
    z, banks, index = setting()
    objective = ready("ir", banks)
    t = terms(objective, z, banks, index)[0]
    rows = torch.cat([index[:, None], t.negatives], 1)
    f = (z["rgb"].double()[:, None] * banks["rgb"].rows.double()[rows]).sum(2) / 0.07
    expected = torch.logsumexp(f, 1) - f[:, 0] - math.log(17)
    assert torch.allclose(t.loss.double(), expected, atol=1e-4)
    words = rng.words(0, rng.Stream.NEGATIVE, 3, index.numpy(), 16)
    assert np.array_equal(t.negatives.numpy(), rng.mulhi(words, N))


@pytest.mark.parametrize("name", ["ir", "ball", "ring", "cave", "cmc", "cmc_ball", "cmc_ring"])
def test_identical_rows_give_log_k(name):
    """CE = log k in every direction, so that nothing is left of the loss CE - log k."""
    objective = objectives.create(name, {"k": 17})
    z, banks, index = setting(objective.modalities)
    for bank in banks.values():
        bank.rows[:] = bank.rows[0].clone()
    objective = ready(name, banks)
    if name == "cave":
        objective.labels = {"rgb": (torch.arange(N) // 5)[None]}
    assert float(objective(z, banks, index, Step(0, 0, 10)).loss) == pytest.approx(0, abs=1e-5)
    for bank in banks.values():
        bank.rows[index] *= 0.99
    assert float(objective(z, banks, index, Step(0, 0, 10)).loss) != pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["ir", "ball", "ring"])
def test_a_high_temperature_gives_log_k_and_a_low_one_does_not_underflow(name):
    z, banks, index = setting()
    hot = ready(name, banks, tau=1e6)
    assert float(hot(z, banks, index, Step(0, 0, 10)).loss) == pytest.approx(0, abs=1e-4)
    cold = terms(ready(name, banks, tau=0.01), z, banks, index)[0].loss
    assert torch.isfinite(cold).all()
    assert cold.abs().max() > 1


def test_one_hot_bank_has_its_closed_form():
    banks = {"rgb": MemoryBank(N, N, seed=0)}
    banks["rgb"].rows = torch.eye(N)
    index = torch.arange(B)
    objective = ready("ir", banks, tau=0.5)
    t = terms(objective, {"rgb": torch.eye(N)[:B]}, banks, index)[0]
    copies = (t.negatives == index[:, None]).sum(1).double()
    expected = torch.log((1 + copies) + (16 - copies) * math.exp(-2)) - math.log(17)
    assert torch.allclose(t.loss.double(), expected, atol=1e-5)


def test_ir_nce_by_hand():
    z, banks, index = setting()
    objective = ready("ir_nce", banks)
    t = terms(objective, z, banks, index)[0]
    rows = torch.cat([index[:, None], t.negatives], 1)
    e = torch.exp((z["rgb"].double()[:, None] * banks["rgb"].rows.double()[rows]).sum(2) / 0.07)
    p, c = e / (e.mean() * N), 17 / N
    expected = -torch.log(p[:, 0] / (p[:, 0] + c)) - torch.log(c / (p[:, 1:] + c)).sum(1)
    assert torch.allclose(t.loss.double(), expected, rtol=1e-4)
    with pytest.raises(UserError, match="normaliser"):
        ready("ir_nce", banks, normaliser="lemniscate")


@pytest.mark.parametrize("name", ["cmc", "cmc_ball", "cmc_ring", "cmc_nce"])
def test_cmc_is_symmetric_under_swapping_modalities_with_banks(name):
    objective = objectives.create(name, {"k": 17})
    z, banks, index = setting(objective.modalities)
    loss = ready(name, banks)(z, banks, index, Step(0, 0, 10)).loss
    swapped_z, swapped = {"L": z["ab"], "ab": z["L"]}, {"L": banks["ab"], "ab": banks["L"]}
    other = ready(name, swapped)(swapped_z, swapped, index, Step(0, 0, 10)).loss
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    same = ready(name, banks)(swapped_z, banks, index, Step(0, 0, 10)).loss
    assert float(loss) != pytest.approx(float(same), rel=1e-6)


def test_cmc_shares_its_index_set_between_the_directions():
    z, banks, index = setting(("L", "ab"))
    left, right = terms(ready("cmc", banks), z, banks, index)
    assert torch.equal(left.negatives, right.negatives)
    left, right = terms(ready("cmc_ball", banks), z, banks, index)
    assert not torch.equal(left.negatives, right.negatives)


def test_bank_rules():
    banks = MemoryBank(N, D, seed=0)
    assert torch.allclose(banks.rows.norm(dim=1), torch.ones(N), atol=1e-6)
    before = banks.rows.clone()
    z, index = unit(1, B), torch.arange(B)
    banks.update(index, z, 1.0)
    assert torch.equal(before, banks.rows)
    banks.update(index, z, 0.0)
    assert torch.equal(banks.rows[:B], z)
    assert torch.equal(banks.rows[B:], before[B:])
    banks.update(torch.tensor([7, 7]), z[:2], 0.5)
    once = torch.nn.functional.normalize(0.5 * z[7] + 0.5 * z[0], dim=0)
    twice = torch.nn.functional.normalize(0.5 * once + 0.5 * z[1], dim=0)
    assert torch.allclose(banks.rows[7], twice, atol=1e-6)
    assert not torch.allclose(banks.rows[7], once, atol=1e-3)


def test_updating_before_the_loss_is_visible():
    z, banks, index = setting()
    objective = ready("ir", banks)
    honest = terms(objective, z, banks, index)[0].estimate
    objective.update(banks, z, index)
    leaked = terms(objective, z, banks, index)[0].estimate
    assert float(leaked.min()) > float(honest.max())


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("ball", {"outer": 0}, "outer"),
        ("ball", {"outer": 1.5}, "outer"),
        ("ring", {"inner": 1}, "inner"),
        ("ring", {"inner": 1.0}, "inner"),
        ("ir", {"k": 1}, "k"),
        ("ir", {"tau": 0}, "tau"),
        ("ir", {"temperature": 0.1}, "temperature"),
        ("ir", {"momentum": 2}, "momentum"),
        ("la", {"n_clusters": 0}, "n_clusters"),
        ("ir", {"own_row": "drop"}, "own_row"),
        ("nothing", {}, "nothing"),
    ],
)
def test_impossible_options_are_refused_by_name(name, options, key):
    with pytest.raises(UserError, match=key):
        objectives.create(name, options)


def test_supervised_rows_come_from_the_seed():
    """Paired seeds differ in the classes' rows as in everything else; the same seed gives the same ones."""
    weights = []
    for seed in (0, 1, 0):
        objective = objectives.create("supervised", {"classes": 5})
        objective.initialise(encoders.Ensemble(EncoderParams(width=4, dim=D)), seed)
        weights.append(objective.weight.detach().clone())
    assert weights[0].shape == (5, D)
    assert torch.equal(weights[0], weights[2])
    assert not (weights[0] == weights[1]).any()
