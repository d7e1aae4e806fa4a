"""`la`, `cave` and `cave_numerator`: cluster mates, warm-up, fallbacks; each with a control."""

import math

import numpy as np
import pytest
import torch

from mirepro import objectives, rng
from mirepro.objectives.base import Step
from tests.contrasts import B, N, la, late, ready, setting, terms


def test_cave_with_the_innermost_ranks_as_mates_is_ring_and_with_itself_is_ball_exclude():
    z, banks, index = setting()
    bank = banks["rgb"].rows
    cave = ready("cave", banks, outer=0.3)
    order = (z["rgb"] @ bank.T).argsort(1, descending=True)
    for i in range(B):
        one = {"rgb": z["rgb"][i : i + 1]}
        own = order[i, 0][None]  # the anchor's own row is its nearest, so that C_i are the ranks [0, 6)
        labels = torch.arange(N)
        labels[order[i, :6]] = int(own)
        cave.labels = {"rgb": labels[None]}
        ring = terms(ready("ring", banks, outer=0.3, inner=0.1), one, banks, own)[0].loss
        assert torch.equal(ring, terms(cave, one, banks, own)[0].loss)
    cave.labels = {"rgb": torch.arange(N)[None]}
    ball = ready("ball", banks, outer=0.3, own_row="exclude")
    assert torch.equal(terms(ball, z, banks, index)[0].loss, terms(cave, z, banks, index)[0].loss)


def test_cave_falls_back_when_the_region_is_empty():
    z, banks, index = setting()
    cave = ready("cave", banks)
    query = cave.queries(z, banks, index, Step(0, 3, 10))[0]
    assert cave.fallbacks(query) == 0
    cave.labels = {"rgb": torch.zeros(1, N, dtype=torch.int64)}
    assert cave.fallbacks(query) == 1
    assert torch.isfinite(terms(cave, z, banks, index)[0].loss).all()


def test_la_equals_the_enumerated_softmaxes():
    z, banks, index = setting()
    f = z["rgb"].double() @ banks["rgb"].rows.double().T / 0.07
    own = f.gather(1, index[:, None])[:, 0]
    alone = torch.arange(N)[None]
    full = terms(la(banks, alone, outer=1.0), z, banks, index, late())[0].loss
    assert torch.allclose(full.double(), torch.logsumexp(f, 1) - own, atol=1e-4)
    narrow = terms(la(banks, alone, background=20, outer=1.0), z, banks, index, late())[0].loss
    expected = []
    for i in range(B):
        order = f[i].argsort(descending=True)[:20].tolist()
        members = order if int(index[i]) in order else [*order[:-1], int(index[i])]
        expected.append(torch.logsumexp(f[i, members], 0) - own[i])
    assert torch.allclose(narrow.double(), torch.stack(expected), atol=1e-4)
    everyone = torch.zeros(1, N, dtype=torch.int64)
    assert terms(la(banks, everyone), z, banks, index, late())[0].loss.abs().max() < 1e-5
    assert full.abs().max() > 1e-2


def test_more_clusterings_never_raise_la():
    z, banks, index = setting()
    first, second = (torch.from_numpy(rng.mulhi(rng.words(s, 7, 0, np.arange(N), 1)[:, 0], 10)) for s in (1, 2))
    one = terms(la(banks, first[None]), z, banks, index, late())[0].loss
    two = terms(la(banks, torch.stack([first, second])), z, banks, index, late())[0].loss
    assert (two <= one + 1e-6).all()
    assert (two < one - 1e-3).any()


def test_la_warms_up_with_ir_nce():
    z, banks, index = setting()
    early = Step(0, 0, 10, 0, 10)
    warm = terms(la(banks, torch.arange(N)[None]), z, banks, index, early)[0].loss
    assert torch.equal(warm, terms(ready("ir_nce", banks), z, banks, index, early)[0].loss)
    assert not torch.equal(warm, terms(la(banks, torch.arange(N)[None]), z, banks, index, late())[0].loss)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7, 0.2])
def test_las_epsilon_is_added_in_the_logarithm(epsilon):
    z, banks, index = setting()
    labels = (torch.arange(N) // 10)[None]
    f = z["rgb"].double() @ banks["rgb"].rows.double().T / 0.07
    mates = torch.stack([torch.logsumexp(f[i, labels[0] == labels[0, j]], 0) for i, j in enumerate(index.tolist())])
    ratio = torch.exp(mates - torch.logsumexp(f, 1))
    loss = terms(la(banks, labels, outer=1.0, epsilon=epsilon), z, banks, index, late())[0].loss.double()
    assert torch.allclose(loss, -torch.log(ratio + epsilon), atol=1e-4)
    assert not torch.allclose(loss, -torch.log(ratio + epsilon + 0.1), atol=1e-4)


def test_las_warm_up_scales_with_the_schedule():
    """The author code's 10 of 200 epochs; at least one where the share is positive."""
    la = objectives.create("la", {})
    assert [la.warmup_epochs(total) for total in (1, 2, 20, 21, 100, 200, 400)] == [1, 1, 1, 2, 5, 10, 20]
    assert objectives.create("la", {"warmup_fraction": 0.0}).warmup_epochs(200) == 0
    assert objectives.create("la", {"warmup_fraction": 0.07}).warmup_epochs(100) == 7, "no float above the decimal"
    z, banks, index = setting()
    steps = [Step(0, 3, 400, epoch, 40) for epoch in range(40)]
    losses = [[terms(ready(name, banks), z, banks, index, step)[0].loss for step in steps] for name in ("la", "ir_nce")]
    assert [epoch for epoch, pair in enumerate(zip(*losses, strict=True)) if torch.equal(*pair)] == [0, 1]


@pytest.mark.parametrize("name", ["la", "cave", "cave_numerator"])
def test_clusters_start_as_every_row_alone_and_are_made_anew_each_epoch(name):
    _, banks, _ = setting()
    objective = objectives.create(name, {"n_clusterings": 2, "n_clusters": 8})
    objective.refresh(banks, 0, 0)
    assert torch.equal(objective.labels["rgb"], torch.arange(N)[None])
    found = []
    for epoch, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        objective.refresh(banks, epoch, seed)
        labels = objective.labels["rgb"]
        assert labels.shape == (2, N)
        assert set(labels.flatten().tolist()) <= set(range(8))
        assert not torch.equal(labels[0], labels[1]), "each clustering starts elsewhere"
        found.append(labels)
    assert torch.equal(found[0], found[3])
    assert not any(torch.equal(found[0], other) for other in found[1:3]), "another epoch, another seed"
    banks["rgb"].rows = banks["rgb"].rows.flip(0)
    objective.refresh(banks, 1, 0)
    assert not torch.equal(objective.labels["rgb"], found[0]), "another bank"


def test_identical_rows_give_cave_numerator_the_count_of_its_terms():
    z, banks, index = setting()
    banks["rgb"].rows[:] = banks["rgb"].rows[0].clone()
    objective = ready("cave_numerator", banks)
    for size in (1, 5):
        objective.labels = {"rgb": (torch.arange(N) // size)[None]}
        loss = terms(objective, z, banks, index)[0].loss
        assert torch.allclose(loss, torch.full((B,), math.log((size + 16) / size)), atol=1e-5)


def test_identical_rows_give_la_the_ratio_of_its_sets():
    z, banks, index = setting()
    banks["rgb"].rows[:] = banks["rgb"].rows[0].clone()
    labels = (torch.arange(N) // 10)[None]
    loss = terms(la(banks, labels, outer=1.0), z, banks, index, late())[0].loss
    assert torch.allclose(loss, torch.full((B,), -math.log(10 / N)), atol=1e-5)
