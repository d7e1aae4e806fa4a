"""Signs of a collapse against slow float64 formulas, and on embeddings that did fall together."""

import math

import numpy as np
import pytest
import torch

from mirepro import diagnostics, objectives

IR = objectives.create("ir", {"k": 4})


def unit(n: int, dim: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Unit rows around one direction: the smaller the spread, the closer."""
    x = np.random.default_rng(seed).normal(size=(n, dim)) * spread
    x[:, 0] += 1 - spread
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def found(z: np.ndarray, other: np.ndarray) -> dict[str, float]:
    return diagnostics.collapse(IR, {"rgb": torch.from_numpy(z)}, {"rgb": torch.from_numpy(other)})


def oracle(z: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """By the definitions: squared distances of all pairs, eigenvalues of the covariance."""
    z, other = z.astype(np.float64), other.astype(np.float64)
    share = np.linalg.eigvalsh(np.cov(z.T))
    share = share[share > 1e-12 * share.max()] / share.sum()
    apart = ((z[:, None] - z[None]) ** 2).sum(2)[~np.eye(len(z), dtype=bool)]
    return {
        "covariance_rank": float(np.exp(-(share * np.log(share)).sum())),
        "alignment": float(((z - other) ** 2).sum(1).mean()),
        "uniformity": float(np.log(np.exp(-2 * apart).mean())),
    }


@pytest.mark.parametrize(("n", "dim", "spread"), [(2, 2, 1.0), (40, 8, 1.0), (300, 16, 0.3), (300, 16, 0.02)])
def test_they_are_what_their_definitions_say(n: int, dim: int, spread: float) -> None:
    z, other = unit(n, dim, 1, spread), unit(n, dim, 2, spread)
    for name, value in oracle(z, other).items():
        assert found(z, other)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_embeddings_that_fall_together_show_it() -> None:
    """One point: rank 1, nothing apart. Control: embeddings that fill the sphere."""
    point, wide = np.tile(unit(1, 16, 3), (200, 1)), unit(200, 16, 4)
    fallen, spread = found(point, point), found(wide, wide)
    assert fallen["covariance_rank"] == pytest.approx(1.0)
    assert fallen["uniformity"] == pytest.approx(0.0, abs=1e-5)
    assert fallen["alignment"] == pytest.approx(0.0, abs=1e-5)
    assert spread["covariance_rank"] > 14
    assert spread["uniformity"] < -3


def test_a_rank_does_not_see_a_small_cloud_which_uniformity_does() -> None:
    cloud, wide = (found(z, z) for z in (unit(200, 16, 6, 1e-3), unit(200, 16, 6)))
    assert cloud["covariance_rank"] > 12
    assert cloud["uniformity"] > -0.01 > -3 > wide["uniformity"]


def test_one_image_has_no_other() -> None:
    z = unit(1, 4, 5)
    assert math.isnan(found(z, z)["uniformity"])
    assert found(z, z)["covariance_rank"] == pytest.approx(1.0)
