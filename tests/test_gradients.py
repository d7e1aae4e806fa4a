"""Gradients of the objectives against finite differences in float64."""


import pytest
import torch

from mirepro import objectives, reference
from mirepro.bank import WholeBank
from tests.contrasts import CONTRASTIVE, B, N, late, ready, setting, unit


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
