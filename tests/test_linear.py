"""Linear evaluation and kNN against slow references."""

import numpy as np
import pytest
import torch
from scipy import optimize

from mirepro import rng
from mirepro.errors import UserError
from mirepro.params import EvaluateParams, LinearParams, ViewParams
from mirepro.transfer import evaluate, knn, linear

N, F, C = 120, 6, 4


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = rng.normal(seed, rng.Stream.TOY, 0, np.arange(N), F)
    y = (x[:, :C] + 0.5 * rng.normal(seed, rng.Stream.TOY, 1, np.arange(N), C)).argmax(1)
    return torch.from_numpy((3 * x + 1).astype(np.float32)), torch.from_numpy(y)


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_softmax_regression_reaches_the_optimum(l2):
    x, y = problem()
    classifier, _, _ = linear.fit((x, y), (x, y), C, LinearParams(l2=(l2,)))
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double().numpy()
    onehot = np.eye(C)[y.numpy()]

    def objective(flat):
        theta = flat.reshape(F + 1, C)
        logits = z @ theta[:-1] + theta[-1]
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= logits.max(1, keepdims=True)
        return -(log_p * onehot).sum() / N + l2 / (2 * F) * (theta[:-1] ** 2).sum()

    best = optimize.minimize(objective, np.zeros((F + 1) * C), method="L-BFGS-B", options={"maxiter": 2000})
    ours = torch.cat([classifier.weight, classifier.bias[None]]).double().numpy().ravel()
    assert objective(ours) == pytest.approx(best.fun, abs=1e-4)
    assert objective(1.2 * ours + 0.05) > best.fun + 1e-4
    assert np.allclose(classifier.weight.double().numpy().ravel(), best.x[: F * C], atol=0.03)


def wide(features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features of very unequal directions, more or fewer than images, and classes one-hot."""
    x = rng.normal(seed, rng.Stream.TOY, 2, np.arange(N), features) @ np.diag(0.6 ** np.arange(features))
    x = x @ rng.normal(seed, rng.Stream.TOY, 3, np.arange(features), features)
    x = (x - x.mean(0)) / x.std(0)
    return x.astype(np.float32), np.eye(C, dtype=np.float32)[problem(seed)[1].numpy()]


def gradient(theta: np.ndarray, x: np.ndarray, onehot: np.ndarray, l2: float) -> np.ndarray:
    """Of the objective at `(F + 1, C)`, float64, in the features' own coordinates."""
    logits = x @ theta[:-1] + theta[-1]
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = (p / p.sum(1, keepdims=True) - onehot) / len(x)
    return np.concatenate([x.T @ residual + l2 / x.shape[1] * theta[:-1], residual.sum(0)[None]])


@pytest.mark.parametrize("features", [10, 30, 150])
@pytest.mark.parametrize("l2", [0.01, 1.0, 1e4])
def test_the_solver_converges_in_an_ill_conditioned_basis(features, l2):
    x, onehot = wide(features)
    basis = linear.Basis.fit(x)
    start = np.zeros((len(basis.variance), C))

    def solution(params):
        weight, bias = basis.weights(linear.minimise(basis, onehot.argmax(1), l2, start, params))
        return np.concatenate([weight, bias[None]]).astype(np.float64)

    wide64, labels = x.astype(np.float64), onehot.astype(np.float64)

    def objective(flat):
        theta = flat.reshape(features + 1, C)
        logits = wide64 @ theta[:-1] + theta[-1]
        top = logits.max(1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        value = -(log_p * labels).sum() / N + l2 / (2 * features) * (theta[:-1] ** 2).sum()
        return value, gradient(theta, wide64, labels, l2).ravel()

    options = {"maxiter": 20000, "maxfun": 40000, "gtol": 1e-9, "ftol": 0.0}
    best = optimize.minimize(objective, np.zeros((features + 1) * C), jac=True, method="L-BFGS-B", options=options)
    ours, stopped = solution(LinearParams()), solution(LinearParams(iterations=1))
    assert np.abs(gradient(ours, wide64, labels, l2)).max() < 5e-4
    assert objective(ours.ravel())[0] - best.fun < 1e-5
    assert np.array_equal(ours, solution(LinearParams()))
    if l2 < 1e4:  # one step solves the strongest
        assert objective(stopped.ravel())[0] - best.fun > 1e-4


def test_a_basis_is_a_rotation_reduced_to_the_rank():
    x, _ = wide(8)
    double = np.concatenate([x, x], 1)
    basis = linear.Basis.fit(double)
    assert basis.axes.shape == (16, 8)
    assert np.allclose(basis.axes.T @ basis.axes, np.eye(8), atol=1e-5)
    assert np.allclose(basis.x[:, :-1] @ basis.axes.T, double, atol=1e-4)
    assert not np.allclose(basis.x[:, :4] @ basis.axes[:, :4].T, double, atol=1e-2)


def test_answers_are_packed_and_counted():
    answers = linear.answers({"a": torch.tensor([1, 2, 3] * 5)}, torch.tensor([1, 2, 0] * 5))
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(answers["a"]), np.uint8))[: answers["n"]]
    assert bits.tolist() == [1, 1, 0] * 5


def test_l2_is_chosen_on_val_and_ties_go_to_the_stronger():
    (x, y), (x_val, y_val) = problem(0), problem(1)
    params = LinearParams(l2=(0.01, 1.0, 1e4))
    _, grid, chosen = linear.fit((x, y), (x_val, y_val), C, params)
    assert set(grid) == {"0.01", "1.0", "10000.0"}
    assert grid[repr(chosen)] == max(grid.values())
    assert chosen == max(float(l2) for l2, value in grid.items() if value == max(grid.values()))
    assert len(set(grid.values())) > 1


def test_constant_features_are_ignored():
    x, y = problem()
    wide = torch.cat([x, torch.full((N, 1), 7.0)], 1)
    classifier, _, _ = linear.fit((wide, y), (wide, y), C, LinearParams(l2=(1.0,)))
    assert torch.isfinite(classifier.weight).all()
    assert classifier.weight[-1].abs().max() == 0


def test_knn_matches_brute_force_for_many_k_at_once():
    x, y = problem()
    z = torch.nn.functional.normalize(x)
    query = torch.nn.functional.normalize(problem(3)[0][:20])
    votes = knn.predict(query, z, y, k_nn=(1, 7, 500), tau=0.07, n_classes=C)
    scores = query.double() @ z.double().T
    for k, predicted in votes.items():
        for i in range(20):
            order = np.argsort(-scores[i].numpy(), kind="stable")[:k]
            weight = np.zeros(C)
            for j in order:
                weight[y[j]] += np.exp((float(scores[i, j]) - float(scores[i].max())) / 0.07)
            assert int(predicted[i]) == weight.argmax()
    assert not torch.equal(votes[1], votes[500])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"k_nn": ()}, "k_nn"),
        ({"k_nn": (0,)}, "k_nn"),
        ({"anchors": 0}, "anchors"),
        ({"tau": 0.0}, "tau"),
        ({"linear": LinearParams(l2=())}, "l2"),
        ({"linear": LinearParams(author_epochs=0)}, "author_epochs"),
        ({"views": ViewParams(crop=(2.0, 3.0))}, "crop"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, key):
    with pytest.raises(UserError, match=key):
        evaluate.check(EvaluateParams(**change))
