"""Objectives on two views (moco, moco_ring, simclr) against float64 formulas, with controls that must fail."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirepro import encoders, objectives, rng
from mirepro.bank import MemoryBank
from mirepro.encoders import Ensemble
from mirepro.errors import UserError
from mirepro.objectives.base import Step
from mirepro.objectives.moco import Moco
from mirepro.objectives.regions import ranks
from mirepro.params import EncoderParams
from tests.contrasts import D, unit

STEP = Step(0, 3, 10, 1, 2)
QUEUE = 50


def model() -> Ensemble:
    """A small encoder with weights."""
    made = Ensemble(EncoderParams(width=4, dim=D))
    encoders.initialise(made, 0)
    return made


def moco(name: str = "moco", **options) -> Moco:
    objective = objectives.create(name, {"queue": QUEUE} | options)
    assert isinstance(objective, Moco)
    objective.check(200, D)
    objective.initialise(model(), 0)
    return objective


def losses(objective, n: int = 8, seed: int = 0, **z) -> torch.Tensor:
    values = {"rgb": unit(seed + 1, n), objective.companions[0]: unit(seed + 2, n)} | z
    return objective.terms(objective.queries(values, {}, torch.arange(n), STEP)[0]).loss.double()


def oracle(objective: Moco, anchors: torch.Tensor, keys: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """`logsumexp(f_+, f of the ranks) - f_+ - log(1 + m)` in float64."""
    positive = (anchors.double() * keys.double()).sum(1) / objective.tau
    f = (anchors.double() @ objective.keys.rows.double().T / objective.tau).sort(1, descending=True).values
    every = torch.cat([positive[:, None], f[:, low:high]], 1)
    return torch.logsumexp(every, 1) - positive - math.log(1 + high - low)


@settings(max_examples=25, deadline=None)
@given(
    queue=st.integers(2, 90), n=st.integers(1, 12), seed=st.integers(0, 1000), tau=st.sampled_from([0.05, 0.07, 0.5]),
    outer=st.sampled_from([0.5, 0.7, 1.0]), inner=st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
def test_moco_ring_is_the_enumerated_ring_of_the_queue(queue, n, seed, tau, outer, inner):
    objective = moco("moco_ring", queue=queue, tau=tau, outer=outer, inner=inner)
    anchors, keys = unit(seed + 1, n), unit(seed + 2, n)
    found = losses(objective, n, seed)
    low, high = ranks(outer, inner, queue)
    assert torch.allclose(found, oracle(objective, anchors, keys, low, high), atol=1e-4)
    if high - low > 1:  # control: a ring one rank narrower
        assert not torch.allclose(found, oracle(objective, anchors, keys, low, high - 1), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 1000), tau=st.sampled_from([0.05, 0.1, 0.5]))
def test_simclr_is_the_enumerated_softmax_over_the_batch(n, seed, tau):
    found = losses(objectives.create("simclr", {"tau": tau}), n, seed)
    z = torch.cat([unit(seed + 1, n), unit(seed + 2, n)]).double()
    expected, itself = [], []
    for i in range(2 * n):
        f = z @ z[i] / tau
        others = torch.cat([f[:i], f[i + 1 :]])
        expected.append(torch.logsumexp(others, 0) - f[(i + n) % (2 * n)] - math.log(2 * n - 1))
        itself.append(torch.logsumexp(f, 0) - f[(i + n) % (2 * n)] - math.log(2 * n - 1))
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert not torch.allclose(found, torch.stack(itself), atol=1e-4)  # control: the anchor among its negatives


def test_moco_of_the_whole_queue_is_moco_ring_without_its_cuts_bit_for_bit():
    whole = losses(moco())
    assert torch.equal(whole, losses(moco("moco_ring", outer=1.0, inner=0.0)))
    assert not torch.equal(whole, losses(moco("moco_ring", outer=1.0, inner=0.1)))


def test_the_positive_counts_once_and_where_it_stands_does_not_matter():
    objective = moco()
    anchors, keys = unit(1, 8), unit(2, 8)
    before = losses(objective)
    objective.keys.rows = objective.keys.rows[rng.permutation(0, 3, 0, QUEUE).copy()]
    assert torch.allclose(before, losses(objective), atol=1e-5)  # a relabelled queue changes nothing
    objective.keys.rows[:8] = keys  # the positive among the negatives, too: it counts once more, no less
    assert torch.allclose(losses(objective), oracle(objective, anchors, keys, 0, QUEUE), atol=1e-4)
    assert not torch.allclose(before, losses(objective), atol=1e-4)


def test_closed_forms():
    same = unit(5, 1).expand(8, D).contiguous()
    objective = moco()
    objective.keys.rows[:] = same[0]
    assert losses(objective, rgb=same, key=same).abs().max() < 1e-4
    assert losses(objective, rgb=same, key=-same).min() > 1  # control
    assert losses(objectives.create("simclr", {}), rgb=same, twin=same).abs().max() < 1e-4
    hot = losses(moco(tau=1e6))
    assert hot.abs().max() < 1e-4
    cold = losses(moco(tau=0.01))
    assert torch.isfinite(cold).all()


def test_gradients_reach_both_views_of_simclr_and_the_anchor_alone_in_moco():
    for objective, both in ((objectives.create("simclr", {}), True), (moco(), False)):
        z = {"rgb": unit(1, 8).requires_grad_(), objective.companions[0]: unit(2, 8).requires_grad_()}
        losses(objective, **z).mean().backward()
        assert z["rgb"].grad is not None
        assert (z[objective.companions[0]].grad is not None) == both
    assert not moco().keys.rows.requires_grad


def test_the_queue_holds_the_latest_keys_in_order_and_wraps():
    objective, bank = moco(queue=10), {"rgb": MemoryBank(30, D, seed=0)}
    initial, keys = objective.keys.rows.clone(), unit(9, 12)
    for i in range(3):
        part = keys[4 * i : 4 * i + 4]
        objective.update(bank, {"rgb": unit(i, 4), "key": part}, torch.arange(4 * i, 4 * i + 4))
        if i == 1:
            assert torch.equal(objective.keys.rows, torch.cat([keys[:8], initial[8:]]))
    assert torch.equal(objective.keys.rows, torch.cat([keys[10:12], keys[2:10]]))  # the two oldest have given way
    assert objective.start == 2
    assert torch.equal(bank["rgb"].rows[:4], unit(0, 4))  # the memory bank holds the anchors


@pytest.mark.parametrize("m", [0.0, 0.9, 1.0])
def test_the_key_encoder_follows_the_encoder(m):
    objective = moco(encoder_momentum=m)
    old = [weight.clone() for weight in objective.encoder.parameters()]
    with torch.no_grad():
        for weight in objective.model.parameters():
            weight += 1
    objective.update({"rgb": MemoryBank(30, D, seed=0)}, {"rgb": unit(1, 4), "key": unit(2, 4)}, torch.arange(4))
    for before, own, other in zip(old, objective.encoder.parameters(), objective.model.parameters(), strict=True):
        assert torch.allclose(own.double(), m * before.double() + (1 - m) * other.double(), atol=1e-6)
        assert torch.equal(own, before) == (m == 1)
        assert not own.requires_grad


def test_keys_come_from_the_momentum_encoder_and_the_second_view():
    objective = moco()
    first, second = (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    z = objective.embed(objective.model.train(), [first, second])
    assert torch.equal(z["key"], objective.encoder.embed(second)["rgb"])
    assert z["rgb"].requires_grad
    assert not z["key"].requires_grad
    again = objective.embed(objective.model, [first, first])
    assert not torch.equal(z["key"], again["key"])
    with torch.no_grad():
        for weight in objective.encoder.parameters():
            weight *= 1.5
    assert not torch.equal(z["key"], objective.embed(objective.model, [first, second])["key"])


def test_state_restores_queue_and_key_encoder():
    objective, other = moco(), moco()
    bank = {"rgb": MemoryBank(30, D, seed=0)}
    with torch.no_grad():
        for weight in objective.model.parameters():
            weight *= 1.1
    objective.update(bank, {"rgb": unit(1, 4), "key": unit(2, 4)}, torch.arange(4))
    saved = {name: value.clone() for name, value in objective.state().items()}
    assert not all(torch.equal(value, saved[name]) for name, value in other.state().items())
    other.load_state(saved)
    assert other.state().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in other.state().items())


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("moco", {"queue": 0}, "queue"),
        ("moco", {"encoder_momentum": 1.5}, "encoder_momentum"),
        ("moco", {"own_row": "exclude"}, "own_row"),
        ("moco", {"replacement": False}, "replacement"),
        ("moco_ring", {"outer": 0.0}, "outer"),
        ("simclr", {"own_row": "exclude"}, "own_row"),
        ("simclr", {"queue": 5}, "queue"),
    ],
)
def test_impossible_options_are_refused_by_name(name, options, key):
    with pytest.raises(UserError, match=key):
        objectives.create(name, options)


def test_an_empty_ring_is_refused_and_a_queue_longer_than_an_epoch_warned_about():
    with pytest.raises(UserError, match="outer"):
        objectives.create("moco_ring", {"queue": 5}).check(200, D)
    assert "own image" in objectives.create("moco", {"queue": 201}).check(200, D)[0]
    assert objectives.create("moco", {"queue": 200}).check(200, D) == []
    assert np.isclose(objectives.create("moco", {}).queue, 65536)
