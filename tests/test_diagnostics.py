"""What may be claimed (certificate, T3, shares, final MI) against float64 formulas, with controls that must fail."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirepro import diagnostics, objectives, reference, rng
from mirepro.bank import MemoryBank, WholeBank
from mirepro.objectives.base import Objective, Query, Step
from tests.contrasts import B, N, setting, terms, unit

STEP = Step(0, 3, 10, 1, 2)
FEW = settings(max_examples=40, deadline=None)
REGIONS = ("ir", "ball", "ring", "cave", "cmc_ball", "cmc_ring")


def lattice(seed: int, n: int, d: int) -> Tensor:
    """Entries in quarters: float32 scores are exact, and ties abound."""
    words = rng.words(seed, rng.Stream.TOY, 1, np.arange(n), d)
    return torch.from_numpy(((words % 5).astype(np.float32) - 2) / 4)


def integers(seed: int, n: int, most: int) -> Tensor:
    return torch.from_numpy(rng.mulhi(rng.words(seed, rng.Stream.TOY, 2, np.arange(n), 1)[:, 0], most))


def oracle(objective: Objective, q: Query, classes: Tensor) -> dict[str, float]:
    """The diagnostics of one direction from their definitions, in float64."""
    n, (low, high), excluded = q.size, objective.region(q.size, q.step), "cave" in type(objective).__name__.lower()
    f = reference.scores(q.z, q.bank.rows) / objective.tau
    everything, own = torch.logsumexp(f, 1), f.gather(1, q.index[:, None])[:, 0]
    labels = objective.labels.get(q.modality)
    draws = reference.region_sample(
        q.z, q.bank.rows, low, high, objective.k - 1, seed=q.step.seed, step=q.step.step, sample_index=q.index,
        own=q.index, labels=labels, exclude_mates=excluded, replacement=objective.replacement,
    )  # fmt: skip
    drawn = torch.logsumexp(torch.cat([own[:, None], f.gather(1, draws)], 1), 1)
    estimate = math.log(objective.k) + own - drawn
    slack = math.log(n) - (everything - own).mean() - estimate.mean() - 3 * estimate.std() / math.sqrt(len(f))
    members = reference._members(q.z, q.bank.rows, low, high, q.index, labels, False, excluded)
    lowest = torch.stack([row[rows].min() for row, (rows, _) in zip(f, members, strict=True)])
    above = lowest - (everything - math.log(n))
    assume(abs(slack) > 1e-4 and above.abs().min() > 1e-4)  # else rounding decides
    return {
        "certified_share": float(slack >= 0),
        "t3_share": float((above >= 0).double().mean()),
        "fallback_share": sum(fell for _, fell in members) / len(members),
        "own_copies": float(sum((row == i).sum() for row, i in zip(draws, q.index, strict=True))) / len(draws),
        "same_class_share": float((classes[draws] == classes[q.index, None]).double().mean()),
    }


@FEW
@given(
    st.sampled_from(REGIONS), st.integers(2, 12), st.integers(2, 60), st.integers(1, 8), st.integers(0, 10**6),
    st.sampled_from([0.5, 0.8, 1.0]), st.sampled_from([0.07, 0.5]), st.integers(2, 30),
)  # fmt: skip
def test_an_epochs_diagnostics_equal_their_definitions(
    name: str, b: int, n: int, d: int, seed: int, outer: float, tau: float, k: int
) -> None:
    options = {"k": k, "tau": tau} | ({} if name == "ir" else {"outer": outer})
    objective = objectives.create(name, options)
    banks = {m: WholeBank(lattice(seed + i, n, d)) for i, m in enumerate(objective.modalities)}
    z = {m: lattice(seed + 10 + i, b, d) for i, m in enumerate(objective.modalities)}
    if name == "cave":
        objective.labels = {"rgb": torch.stack([integers(seed + i, n, 4) for i in range(2)])}
    index, classes = integers(seed + 3, b, n), integers(seed + 4, n, 3)
    found = diagnostics.epoch(objective, z, banks, index, STEP, classes)
    directions = [oracle(objective, q, classes) for q in objective.queries(z, banks, index, STEP)]
    wanted = {key: sum(one[key] for one in directions) / len(directions) for key in directions[0]}
    if name == "cave":  # asks more than T3: that the mates in the ball lie above, too
        assert found.pop("t3_share") <= wanted.pop("t3_share")
    assert found == pytest.approx(wanted, abs=1e-12)


def made(name: str, **options) -> Objective:
    return objectives.create(name, {"k": 17} | options)


def epoch(objective: Objective, z: Mapping[str, Tensor], banks: Mapping, index: Tensor, **more) -> dict[str, float]:
    return diagnostics.epoch(objective, z, banks, index, STEP, more.get("classes", torch.arange(N)))


def test_rings_of_easy_rows_are_not_certified_and_balls_are() -> None:
    """RING(1, l) exceeds the information where anchors tell little of their own rows."""
    z, (_, banks, _), index = {"rgb": unit(7, N)}, setting(), torch.arange(N)
    assert epoch(made("ball", outer=0.1), z, banks, index)["certified_share"] == 1
    assert epoch(made("ring", outer=1.0, inner=0.5), z, banks, index)["certified_share"] == 0


def test_one_anchor_has_no_standard_error_and_no_certificate() -> None:
    """However far below the limit its estimate stays; control: the same estimate of two anchors."""
    z, banks, index = setting()
    objective = made("ball", outer=0.1)
    for count, certified in ((1, 0), (2, 1)):
        few = {name: value[:1].repeat(count, 1) for name, value in z.items()}
        (query,) = objective.queries(few, banks, index[:1].repeat(count), STEP)
        everything, _ = query.bank.region_logsumexp(query.z, 0, query.size, objective.tau)
        assert diagnostics._certified(objective, query, torch.full((count,), -50.0), everything) == certified


@pytest.mark.parametrize(("below", "certified"), [(2.9, 0), (3.1, 1)])
def test_a_certificate_needs_three_standard_errors(below: float, certified: float) -> None:
    z, banks, index = setting()
    objective = made("ring")
    q = objective.queries(z, banks, index, STEP)[0]
    f = reference.scores(q.z, q.bank.rows) / objective.tau
    everything = torch.logsumexp(f, 1)
    bound = math.log(N) - (everything - f.gather(1, index[:, None])[:, 0]).mean()
    spread = torch.linspace(-1, 1, B).double()
    estimate = bound - below * spread.std() / math.sqrt(B) + spread
    assert diagnostics._certified(objective, q, estimate, everything) == certified


def test_t3_holds_where_the_region_lies_above_the_log_mean_exp() -> None:
    """Half of the rows are opposite to the anchors: the other half is above the mean, the whole bank is not."""
    _, _, index = setting()
    z, banks = {"rgb": unit(1, 1).expand(B, -1).contiguous()}, {"rgb": MemoryBank(N, 16, seed=0)}
    banks["rgb"].rows = torch.cat([z["rgb"][:1].expand(N // 2, -1), -z["rgb"][:1].expand(N // 2, -1)]).contiguous()
    assert epoch(made("ball", outer=0.5), z, banks, index)["t3_share"] == 1
    assert epoch(made("ball", outer=0.51), z, banks, index)["t3_share"] == 0


@pytest.mark.parametrize("outer", [0.05, 0.2, 0.6])
def test_shares_are_those_of_the_whole_region_where_all_of_it_is_drawn(outer: float) -> None:
    z, banks, index = setting()
    classes, size = integers(1, N, 4), int(outer * N)
    objective = made("ball", k=size + 1, outer=outer, replacement=False)
    found = epoch(objective, z, banks, index, classes=classes)
    members = reference.order(z["rgb"], banks["rgb"].rows)[:, :size]
    share = float((classes[members] == classes[index][:, None]).double().mean())
    assert found["same_class_share"] == pytest.approx(share)
    assert found["own_copies"] == pytest.approx(float((members == index[:, None]).any(1).double().mean()))
    others = epoch(objective, z, banks, index, classes=integers(2, N, 4))
    assert others["same_class_share"] != pytest.approx(share), "control: other classes"


def test_an_objective_without_draws_or_estimate_has_no_such_diagnostics() -> None:
    z, banks, index = setting()
    la = made("la", warmup_fraction=0.0)
    la.refresh(banks, 0, 0)
    assert epoch(la, z, banks, index).keys() == {"t3_share", "fallback_share"}
    assert "certified_share" not in epoch(made("ir_nce"), z, banks, index)
    assert "certified_share" in epoch(made("ir"), z, banks, index)


@FEW
@given(st.integers(2, 600), st.integers(1, 20), st.sampled_from([1, 2]), st.integers(0, 10**6), st.integers(2, 40))
def test_nce_at_equal_f_is_the_sampled_bound_of_all_images(n: int, d: int, directions: int, seed: int, k: int) -> None:
    objective = objectives.create("cmc_ring" if directions == 2 else "ring", {"k": k, "outer": 0.5})
    banks = {m: MemoryBank(n, d, seed=seed, modality=i) for i, m in enumerate(objective.modalities)}
    z = {m: unit(seed + i + 1, n, d) for i, m in enumerate(objective.modalities)}
    words = rng.words(STEP.seed, rng.Stream.NEGATIVE, STEP.step, np.arange(n), k - 1)
    rows = torch.cat([torch.arange(n)[:, None], torch.from_numpy(rng.mulhi(words, n))], 1)
    ces = [reference.gather_nce(z[a], banks[o].rows, rows, objective.tau).mean() for a, o in objective.pairs()]
    wanted = math.log(k) - float(sum(ces)) / len(ces)
    found = diagnostics.nce(objective, z, banks, STEP)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found == diagnostics.nce(objectives.create("cmc" if directions == 2 else "ir", {"k": k}), z, banks, STEP)
    assert found <= math.log(k) + 1e-5


def test_nce_at_equal_f_is_not_the_objectives_own_estimate() -> None:
    z, banks, _ = setting()
    z = {"rgb": unit(7, N)}
    ring = made("ring", outer=1.0, inner=0.5)
    own = float(terms(ring, z, banks, torch.arange(N), STEP)[0].estimate.mean())
    assert own > diagnostics.nce(ring, z, banks, STEP) + 0.1
    other = Step(0, 4, 10, 1, 2)
    assert diagnostics.nce(ring, z, banks, other) != diagnostics.nce(ring, z, banks, STEP), "other draws"


@FEW
@given(st.integers(1, 80), st.integers(1, 20), st.sampled_from(["ir", "cmc"]), st.integers(0, 10**6))
def test_held_out_information_takes_all_other_images_as_negatives(n: int, d: int, name: str, seed: int) -> None:
    objective = objectives.create(name, {"tau": 0.3})
    first, second = ({m: unit(seed + 2 * i + v, n, d) for i, m in enumerate(objective.modalities)} for v in (0, 1))
    wanted = []
    for anchor, other in objective.pairs():
        f = reference.scores(first[anchor], second[other]) / objective.tau
        wanted.append(math.log(n) - (torch.logsumexp(f, 1) - f.diagonal()).mean())
    found = diagnostics.held_out(objective, first, second)
    assert found == pytest.approx(float(sum(wanted)) / len(wanted), abs=1e-4)
    assert found <= math.log(n) + 1e-5


def test_held_out_information_falls_where_the_second_views_are_others() -> None:
    z, noise, objective = {"rgb": unit(1, 60)}, {"rgb": unit(2, 60)}, objectives.create("ir", {})
    assert diagnostics.held_out(objective, z, z) > math.log(60) - 0.2
    assert diagnostics.held_out(objective, z, noise) < 0
    assert diagnostics.held_out(objective, z, {"rgb": z["rgb"].roll(1, 0)}) < 0
