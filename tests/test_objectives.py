"""The invariants of the objectives, against float64 formulas; each has a control that must fail."""

import dataclasses
import inspect
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

from mirepro import encoders, objectives, reference, rng
from mirepro.bank import MemoryBank, WholeBank
from mirepro.errors import UserError
from mirepro.objectives.base import Objective, Step
from mirepro.objectives.regions import Region, ranks
from mirepro.params import EncoderParams

N, D, B = 200, 16, 12
CONTRASTIVE = [name for name in objectives.names() if name not in ("supervised", "random")]
PAIRED = [name for name in CONTRASTIVE if objectives.load(name).companions]  # two views; tests/test_pairs.py
SAMPLED = [name for name in CONTRASTIVE if name not in ("la", *PAIRED)]


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


def unit(seed: int, n: int, d: int = D) -> torch.Tensor:
    x = rng.normal(seed, rng.Stream.TOY, 0, np.arange(n), d)
    return torch.from_numpy((x / np.sqrt((x * x).sum(1, keepdims=True))).astype(np.float32))


def setting(modalities=("rgb",), companions=(), n: int = N, d: int = D, seed: int = 0):
    banks = {m: MemoryBank(n, d, seed=seed, modality=i) for i, m in enumerate(modalities)}
    z = {m: unit(seed + 100 + i, B, d) for i, m in enumerate((*modalities, *companions))}
    index = torch.from_numpy(rng.permutation(seed, rng.Stream.ORDER, 0, n)[:B].copy())
    return z, banks, index


def ready(name: str, banks, **options):
    objective = objectives.create(name, {"k": 17} | options)
    objective.check(next(iter(banks.values())).size, next(iter(banks.values())).rows.shape[1])
    objective.initialise(encoders.Ensemble(EncoderParams(width=4, dim=D), objective.modalities), 0)
    objective.refresh(banks, 0, 0)
    return objective


def terms(objective, z, banks, index, step=None):
    step = step or Step(0, 3, 10, 1, 2)
    return [objective.terms(q) for q in objective.queries(z, banks, index, step)]


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


def enumerated(objective, q):
    """log((e^{f_ii} + (k - 1) mean_region e^f) / k) - f_ii, of the bank's own sums over the objective's region."""
    low, high = objective.region(q.size, q.step)
    region, _ = q.bank.region_logsumexp(q.z, low, high, objective.tau)
    own = q.bank.gather_dot(q.z, q.index[:, None])[:, 0] / objective.tau
    return torch.logaddexp(own, region - math.log(high - low) + math.log(objective.k - 1)) - math.log(objective.k) - own


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


@pytest.mark.parametrize("name", ["ir", "ball", "ring", "cave", "cmc", "cmc_ball", "cmc_ring"])
def test_estimates_stay_below_their_cap(name):
    objective = objectives.create(name, {"k": 17})
    _, banks, index = setting(objective.modalities)
    perfect = {m: banks[o].rows[index] for (m, o) in objective.pairs()}
    objective = ready(name, banks)
    for t in terms(objective, perfect, banks, index):
        assert float(t.estimate.max()) <= objective.cap(N) + 1e-5
    assert objective.cap(N) == pytest.approx(math.log(17))


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


def la(banks, labels, **options):
    objective = ready("la", banks, **options)
    objective.labels = {"rgb": labels}
    return objective


def late() -> Step:
    return Step(0, 9, 10, 1, 2)


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


class Float64Bank(WholeBank):
    """The rows, and answers in float64 and with autograd's gradients."""

    def region_sample(self, z, *ranks, **who):
        return reference.region_sample(z, self.rows, *ranks, **who)

    def region_logsumexp(self, z, *ranks, **who):
        return reference.region_logsumexp(z, self.rows, *ranks, **who)

    def gather_dot(self, z, index):
        return reference.gather_dot(z, self.rows, index)

    def gather_nce(self, z, index, tau):
        return reference.gather_nce(z, self.rows, index, tau)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_gradients_equal_float64_finite_differences_of_the_whole_composition(name):
    """A step of 1e-6 changes no region and no draw."""
    z, banks, index = setting(objectives.load(name).modalities, objectives.load(name).companions)
    objective, step = ready(name, banks, **({"queue": 50} if "moco" in name else {})), late()
    objective.labels = dict.fromkeys(banks, (torch.arange(N) // 5)[None])
    leaf = {m: value.clone().requires_grad_() for m, value in z.items()}
    objective(leaf, banks, index, step).loss.backward()
    slow = {m: Float64Bank(bank.rows) for m, bank in banks.items()}
    if "key" in z:
        objective.keys = Float64Bank(objective.keys.rows)
    exact = {m: value.double().requires_grad_() for m, value in z.items()}
    objective(exact, slow, index, step).loss.backward()
    for m in exact.keys() - {"key"}:
        gradient = exact[m].grad
        for seed in range(3):
            move = 1e-6 * unit(seed, B).double()
            ends = [objective(z | {m: z[m].double() + sign * move}, slow, index, step).loss for sign in (1, -1)]
            slope, told = float(ends[0] - ends[1]) / 2e-6, float((gradient * move).sum()) / 1e-6
            assert told == pytest.approx(slope, rel=1e-6, abs=1e-7)
            assert 1.001 * told != pytest.approx(slope, rel=1e-6, abs=1e-7)
        assert torch.allclose(leaf[m].grad.double(), gradient, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(leaf[m].grad.double(), 1.01 * gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_gradients_match_finite_differences_and_stop_at_the_bank(name):
    objective = objectives.create(name, {"k": 17})
    z, banks, index = setting(objective.modalities, objective.companions)
    step = late()
    everything = {"outer": 1.0} if name == "la" else {}  # else a moved anchor would change its own region
    for objective_labels in (None, (torch.arange(N) // 5)[None]):
        objective = ready(name, banks, **everything)
        if objective_labels is not None:
            objective.labels = dict.fromkeys(banks, objective_labels)
        leaf = {m: value.clone().requires_grad_() for m, value in z.items()}
        objective(leaf, banks, index, step).loss.backward()
        modality = objective.modalities[0]
        direction = unit(77, B)
        eps = 1e-2
        shifted = []
        for sign in (1, -1):
            moved = dict(z) | {modality: z[modality] + sign * eps * direction}
            fixed = _fixed_draws(objective, z, banks, index, step, moved)
            shifted.append(fixed)
        numeric = (shifted[0] - shifted[1]) / (2 * eps)
        exact = float((leaf[modality].grad.double() * direction.double()).sum())
        assert exact == pytest.approx(numeric, rel=2e-2, abs=2e-3)
        assert all(bank.rows.grad is None and not bank.rows.requires_grad for bank in banks.values())


def _fixed_draws(objective, z, banks, index, step, moved) -> float:
    """Loss at `moved` embeddings with the draws selected at `z`: no gradient flows through the selection."""
    total = 0.0
    queries = zip(objective.queries(z, banks, index, step), objective.queries(moved, banks, index, step), strict=True)
    for here, there in queries:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "draw", lambda _, count, q=here: type(objective).draw(objective, q, count))
            total += float(objective.terms(there).loss.double().mean())
    return total


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


def test_rotation_and_relabelling_leave_the_enumerated_losses():
    z, banks, index = setting()
    rotation, _ = torch.linalg.qr(unit(5, D).double())
    labels = (torch.arange(N) // 5)[None]
    before = terms(la(banks, labels, outer=1.0), z, banks, index, late())[0].loss
    turned = {"rgb": MemoryBank(N, D, seed=0)}
    turned["rgb"].rows = (banks["rgb"].rows.double() @ rotation).float()
    moved = {"rgb": (z["rgb"].double() @ rotation).float()}
    after = terms(la(turned, labels, outer=1.0), moved, turned, index, late())[0].loss
    assert torch.allclose(before, after, atol=1e-3)
    order = torch.from_numpy(rng.permutation(3, 3, 0, N).copy())
    mixed = {"rgb": MemoryBank(N, D, seed=0)}
    mixed["rgb"].rows = banks["rgb"].rows[order]
    where = order.argsort()
    relabelled = terms(la(mixed, (torch.arange(N) // 5)[order][None], outer=1.0), z, mixed, where[index], late())[
        0
    ].loss
    assert torch.allclose(before, relabelled, atol=1e-4)


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


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_gradients_are_orthogonal_to_z_after_the_normalisation(name):
    objective = objectives.create(name, {"k": 17})
    z, banks, index = setting(objective.modalities, objective.companions)
    objective = ready(name, banks)
    raw = {m: (3 * value).requires_grad_() for m, value in z.items()}
    objective(
        {m: torch.nn.functional.normalize(value) for m, value in raw.items()}, banks, index, late()
    ).loss.backward()
    for m, value in raw.items():
        gradient = value.grad
        if m == "key":
            assert gradient is None, "keys take no gradient"
            continue
        assert (gradient * z[m]).sum(1).abs().max() <= 1e-5 * max(1.0, float(gradient.norm(dim=1).max()))
        assert gradient.abs().max() > 1e-4


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
