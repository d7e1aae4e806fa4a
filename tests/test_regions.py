"""Regions of negatives: what is drawn from them, what shrinking and annealing do; each with a control."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mirepro import objectives, reference, rng
from mirepro.bank import MemoryBank
from mirepro.errors import UserError
from mirepro.objectives.base import Step
from mirepro.objectives.regions import Region, ranks
from tests.contrasts import CONTRASTIVE, SAMPLED, B, D, N, enumerated, la, late, ready, setting, terms, unit


def test_ball_of_everything_is_ir_bit_for_bit():
    z, banks, index = setting()
    ir = terms(ready("ir", banks), z, banks, index)[0].loss
    assert torch.equal(ir, terms(ready("ball", banks, outer=1.0), z, banks, index)[0].loss)
    assert not torch.equal(ir, terms(ready("ball", banks, outer=0.9), z, banks, index)[0].loss)


def test_ring_without_inner_part_is_ball_bit_for_bit():
    z, banks, index = setting()
    ball = terms(ready("ball", banks, outer=0.3), z, banks, index)[0].loss
    assert torch.equal(ball, terms(ready("ring", banks, outer=0.3, inner=0.0), z, banks, index)[0].loss)
    assert not torch.equal(ball, terms(ready("ring", banks, outer=0.3, inner=0.2), z, banks, index)[0].loss)


def test_the_enumerated_loss_is_the_formula_in_float64_and_the_mean_of_sampled_ones():
    z, banks, index = setting()
    objective = ready("ring", banks, outer=0.3, inner=0.2, k=400)
    f = (z["rgb"].double() @ banks["rgb"].rows.double().T / 0.07).sort(1, descending=True).values
    own = (z["rgb"].double() * banks["rgb"].rows[index].double()).sum(1) / 0.07
    mean = f[:, 12:60].exp().mean(1)
    wanted = torch.log((own.exp() + 399 * mean) / 400) - own
    query = objective.queries(z, banks, index, Step(0, 0, 10))[0]
    assert torch.allclose(enumerated(objective, query).double(), wanted, atol=1e-4)
    assert not torch.allclose(enumerated(ready("ring", banks, outer=0.3), query).double(), wanted, atol=1e-4)
    sampled = [terms(objective, z, banks, index, Step(0, step, 10))[0].loss.double() for step in range(20)]
    assert torch.stack(sampled).mean(0) == pytest.approx(wanted.numpy(), abs=0.05)


@pytest.mark.parametrize(("ball", "ring"), [("ball", "ring"), ("cmc_ball", "cmc_ring")])
@settings(max_examples=10, deadline=None)
@given(st.integers(40, 300), st.integers(2, 40), st.integers(2, 500), st.integers(0, 10**6))
def test_the_enumerated_loss_grows_as_u_shrinks_and_ring_estimates_exceed_ball(ball, ring, n, d, k, seed):
    def losses(name, **options):
        objective = objectives.create(name, {"k": k} | options)
        z, banks, _ = setting(objective.modalities, n=n, d=d, seed=seed)
        return enumerated(objective, objective.queries(z, banks, torch.arange(B) * 3, Step(seed, 0, 10))[0]).double()

    balls = {u: losses(ball, outer=u) for u in (1.0, 0.5, 0.2, 0.1, 0.05)}
    for wide, narrow in itertools.pairwise(balls.values()):
        assert (narrow >= wide - 1e-4).all()
        assert not (wide >= narrow).all(), "control"
    for u, inner in itertools.product(balls, (0.0, 0.2, 0.5)):
        estimate = -losses(ring, outer=u, inner=inner)
        assert (estimate >= -balls[u] - 1e-4).all()
        assert torch.equal(estimate, -balls[u]) == (ranks(u, inner, n)[0] == 0), "equal without a hole"


@pytest.mark.parametrize(("outer", "inner"), [(0.1, 0.0), (0.3, 0.1), (1.0, 0.5)])
def test_every_draw_has_its_rank_and_all_members_are_equally_likely(outer, inner):
    z, banks, index = setting()
    objective = ready("ring", banks, outer=outer, inner=inner, k=2)
    low, high = ranks(outer, inner, N)
    order = (z["rgb"].double() @ banks["rgb"].rows.double().T).argsort(1, descending=True)
    rank = order.argsort(1)
    counts = np.zeros(high - low)
    for step in range(40):
        q = objective.queries(z, banks, index, Step(0, step, 100))[0]
        drawn = rank.gather(1, objective.draw(q, 64))
        assert int(drawn.min()) >= low
        assert int(drawn.max()) < high
        counts += np.bincount((drawn - low).flatten().numpy(), minlength=high - low)
    assert counts.min() > 0
    assert stats.chisquare(counts).pvalue > 1e-3
    skewed = counts.copy()
    skewed[0] = 0
    assert stats.chisquare(skewed * counts.sum() / skewed.sum()).pvalue < 1e-3


def test_region_sizes_are_fractions_of_the_bank():
    assert ranks(0.1, 0.0, 50_000) == (0, 5_000)
    assert ranks(0.1, 0.1, 1_281_167) == (12_811, 128_116)
    assert ranks(0.1, 0.01, 50_000, relative=False) == (500, 5_000)
    assert ranks(0.29, 0.0, 100) == (0, 29)  # 0.29 * 100 is 28.999... in binary floating point


def moved(banks, rows):
    """Banks whose rows are `rows` of the old ones."""
    result = {name: MemoryBank(N, D, seed=0) for name in banks}
    for name, bank in result.items():
        bank.rows = rows(banks[name].rows).float()
    return result


def turned(z, banks, matrix):
    return {name: (x.double() @ matrix).float() for name, x in z.items()}, moved(banks, lambda x: x.double() @ matrix)


ENUMERATED = {"ball": {"outer": 0.3}, "ring": {"outer": 0.3, "inner": 0.2}, "cmc": {},
              "cmc_ring": {"outer": 0.3, "inner": 0.2}, "la": {}}  # fmt: skip


def losses_of(name, z, banks, index, order):
    """`(directions, B)` enumerated losses; rows that were five in a row before `order` moved them are LA's mates."""
    if name == "la":
        return torch.stack([t.loss for t in terms(la(banks, order[None] // 5, outer=1.0), z, banks, index, late())])
    objective = ready(name, banks, **ENUMERATED[name])
    return torch.stack([enumerated(objective, q) for q in objective.queries(z, banks, index, late())])


@pytest.mark.parametrize("name", ENUMERATED)
def test_rotation_and_relabelling_leave_the_enumerated_losses(name):
    z, banks, index = setting(objectives.create(name, {}).modalities)
    same = torch.arange(N)
    before = losses_of(name, z, banks, index, same)
    rotation, _ = torch.linalg.qr(unit(5, D).double())
    assert torch.allclose(before, losses_of(name, *turned(z, banks, rotation), index, same), atol=1e-3)
    order = torch.from_numpy(rng.permutation(3, 3, 0, N).copy())
    mixed = moved(banks, lambda rows: rows[order])
    assert torch.allclose(before, losses_of(name, z, mixed, order.argsort()[index], order), atol=1e-4)
    skew = rotation.clone()  # controls: no rotation, and rows that moved without their numbers
    skew[0] *= 2
    assert not torch.allclose(before, losses_of(name, *turned(z, banks, skew), index, same), atol=0.1)
    assert not torch.allclose(before, losses_of(name, z, mixed, index, order), atol=0.1)


@pytest.mark.parametrize("name", SAMPLED)
def test_an_anchor_does_not_depend_on_its_batch_mates_and_draws_on_coordinates_only(name):
    objective = objectives.create(name, {"k": 17})
    z, banks, index = setting(objective.modalities)
    objective = ready(name, banks)
    together = terms(objective, z, banks, index)
    half = {m: value[5:] for m, value in z.items()}
    alone = terms(objective, half, banks, index[5:])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.negatives[5:], b.negatives)
        assert torch.allclose(a.loss[5:], b.loss, rtol=1e-5)
    later = terms(objective, z, banks, index, Step(0, 4, 10, 1, 2))
    assert not torch.equal(together[0].negatives, later[0].negatives)
    other = terms(objective, z, banks, index, Step(1, 3, 10, 1, 2))
    assert not torch.equal(together[0].negatives, other[0].negatives)


@pytest.mark.parametrize("name", [name for name in CONTRASTIVE if issubclass(objectives.load(name), Region)])
@settings(max_examples=10, deadline=None)
@given(st.integers(2, 301), st.integers(100, 5000))
def test_annealing_starts_at_everything_falls_and_ends_at_the_final_value(name, total, n):
    """l stays what it is; `la` has no hole."""
    options = {"outer": 0.1} | ({"background": n} if name == "la" else {"inner": 0.2})
    annealed, constant = (objectives.create(name, options | {"annealed": value}) for value in (True, False))
    found = [annealed.region(n, Step(0, step, total)) for step in range(total)]
    for step, (low, high) in enumerate(found):
        u = max(Fraction(1, 10), 1 - Fraction(9, 10) * Fraction(step, total // 2))
        assert high == int(u * n)
        assert low == (0 if name == "la" else int(Fraction(1, 5) * high))
    assert found[0][1] == n
    assert found[total // 2] == found[-1] == constant.region(n, Step(0, 0, total))
    assert constant.region(n, Step(0, 0, total))[1] == n // 10 < found[0][1]


@pytest.mark.parametrize("name", ["ring", "cave", "cave_numerator", "cmc_ball", "cmc_ring"])
def test_draws_follow_the_annealed_region(name):
    objective = objectives.create(name, {})
    z, banks, index = setting(objective.modalities)
    objective, final = (ready(name, banks, k=65, outer=0.1, annealed=value) for value in (True, False))
    for step in (0, 2, 4, 5, 9):
        q, fixed = (one.queries(z, banks, index, Step(0, step, 10))[0] for one in (objective, final))
        rank = reference.order(q.z, q.bank.rows).argsort(1).gather(1, objective.draw(q, 64))
        low, high = objective.region(N, q.step)
        assert low <= int(rank.min())
        assert int(rank.max()) < high
        assert (int(rank.max()) < final.region(N, q.step)[1]) == (step >= 5), "the annealed region is wider"
        assert torch.equal(objective.draw(q, 64), final.draw(fixed, 64)) == (step >= 5)


def test_an_empty_region_is_refused():
    with pytest.raises(UserError, match="outer"):
        objectives.create("ball", {"outer": 0.001}).check(100, D)
    assert not objectives.create("ball", {"k": 5}).check(100, D)


@pytest.mark.parametrize(("name", "rows"), [("ball", 20), ("ring", 15), ("cave", 20), ("cmc_ball", 20)])
def test_an_oversampled_region_is_warned_about_with_its_cap(name, rows):
    """log k - log(1 + (k - 1) / m)."""
    inner = {"inner": 0.25} if name == "ring" else {}
    (warning,) = objectives.create(name, {"k": 50, "outer": 0.1, **inner}).check(200, D)
    assert warning.startswith(f"49 draws from a region of {rows} rows repeat rows")
    told = re.search(r"the cap is (\d+\.\d+) nats$", warning)
    assert told is not None
    assert float(told[1]) == pytest.approx(math.log(50) - math.log(1 + 49 / rows), abs=5e-4)
    assert float(told[1]) != pytest.approx(math.log(50), abs=5e-4)
    assert objectives.create(name, {"k": rows + 1, "outer": 0.1, **inner}).check(200, D) == []


def test_without_the_own_row_nothing_is_claimed_unless_drawn_without_replacement():
    z, banks, index = setting()
    assert terms(ready("ir", banks, own_row="exclude"), z, banks, index)[0].estimate is None
    part = ready("ball", banks, own_row="exclude", replacement=False, outer=0.5)
    assert terms(part, z, banks, index)[0].estimate is None
    without = ready("ir", banks, own_row="exclude", replacement=False)
    t = terms(without, z, banks, index)[0]
    assert t.estimate is not None
    assert all(len(set(row.tolist())) == 16 for row in t.negatives)
    assert not (t.negatives == index[:, None]).any()
