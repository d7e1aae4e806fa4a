"""k-means against Lloyd's algorithm in float64, its rules for ties and empty clusters, and LA's clusterings."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mirepro import bank, kmeans, rng
from mirepro.bank import WholeBank
from tests.contrasts import unit

F64 = NDArray[np.float64]


def starts(n: int, clusters: int, seed: int = 0, step: int = 0) -> NDArray[np.int64]:
    """The rows that the centroids begin with."""
    return rng.permutation(seed, rng.Stream.KMEANS, step, n)[:clusters]


def lloyd(rows: F64, clusters: int, seed: int, step: int, iterations: int, margins: list[float]) -> list[int]:
    """Clusters by Euclidean distance, row by row; `margins` gets how far each choice was from another one.

    Equal centroids, of which the first is taken, leave no doubt.
    """
    centroids = [rows[i].copy() for i in starts(len(rows), clusters, seed, step)]
    for iteration in range(iterations + 1):
        labels = []
        for row in rows:
            squares = [float(((row - centroid) ** 2).sum()) for centroid in centroids]
            labels.append(squares.index(min(squares)))
            best = centroids[labels[-1]]
            others = [s for s, c in zip(squares, centroids, strict=True) if not np.array_equal(c, best)]
            margins.append(min(others, default=np.inf) - min(squares))
        if iteration < iterations:
            for cluster in range(clusters):
                members = [row for row, label in zip(rows, labels, strict=True) if label == cluster]
                if members:  # an empty cluster keeps its centroid
                    centroids[cluster] = np.mean(members, axis=0).astype(np.float32).astype(np.float64)
    return labels


def found(rows: Any, clusters: int, seed: int = 0, step: int = 0, iterations: int = 5) -> list[int]:
    whole = WholeBank(torch.as_tensor(np.asarray(rows, np.float32)))
    return kmeans.kmeans(whole, clusters, seed=seed, step=step, iterations=iterations).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), st.integers(1, 20), st.integers(0, 10**6),
    st.integers(0, 3), st.integers(0, 6),
)  # fmt: skip
def test_clusters_are_those_of_lloyds_algorithm(
    n: int, different: int, d: int, clusters: int, seed: int, step: int, iterations: int
) -> None:
    """Rows may be many times the same, so that centroids start equal and clusters become empty."""
    clusters, margins = min(clusters, n), list[float]()
    place = rng.mulhi(rng.words(seed, rng.Stream.TOY, 3, np.arange(n), 1)[:, 0], different)
    rows = 4 * rng.normal(seed, rng.Stream.TOY, 4, np.arange(different), d).astype(np.float32)[place]
    wanted = lloyd(rows.astype(np.float64), clusters, seed, step, iterations, margins)
    assume(min(margins) > 1e-4)  # else rounding decides
    assert found(rows, clusters, seed, step, iterations) == wanted


def test_the_oracle_tells_iterations_and_starts_apart() -> None:
    rows = rng.normal(0, rng.Stream.TOY, 4, np.arange(60), 3)
    wanted = lloyd(rows.astype(np.float32).astype(np.float64), 8, 0, 0, 5, [])
    assert found(rows, 8) == wanted
    assert found(rows, 8, iterations=0) != wanted
    assert found(rows, 8, step=1) != wanted
    assert found(rows, 8, seed=1) != wanted


def test_a_row_between_two_centroids_belongs_to_the_first() -> None:
    """Centroids -1 and 1, all other rows at 0, which the first keeps as it moves to -1/5."""
    rows, (low, high) = np.zeros((6, 1)), starts(6, 2)
    rows[low], rows[high] = -1, 1
    for iterations in (0, 1):
        assert found(rows, 2, iterations=iterations) == [int(i == high) for i in range(6)]
    rows[rows == 0] = 1e-3  # control: nearer to the second
    assert found(rows, 2, iterations=0) == [int(i != low) for i in range(6)]


def test_an_empty_cluster_keeps_its_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both centroids start at 5; the first takes all rows and moves to 7, so that the second has the fives again."""
    rows = np.full((4, 1), 9.0)
    rows[starts(4, 2)] = 5
    fives = (rows[:, 0] == 5).astype(int).tolist()
    assert found(rows, 2, iterations=0) == [0] * 4
    assert found(rows, 2, iterations=1) == fives
    assert found(rows, 2, iterations=2) == fives
    monkeypatch.setattr(bank, "cluster_means", lambda total, _: (total[:, :-1] / total[:, -1:].clamp(min=1)).float())
    assert found(rows, 2, iterations=1) == [0] * 4, "control: at zero it would get nothing"


def test_clusterings_differ_by_number_epoch_seed_and_modality() -> None:
    banks = {"L": WholeBank(unit(1, 90)), "ab": WholeBank(unit(2, 90))}
    labels = kmeans.clusterings(banks, count=3, clusters=7, epoch=4, seed=5, iterations=2)
    assert labels.keys() == banks.keys()
    for name, one in banks.items():
        assert labels[name].shape == (3, 90)
        for i in range(3):
            assert labels[name][i].tolist() == found(one.rows, 7, seed=5, step=12 + i, iterations=2)
    assert not torch.equal(labels["L"], labels["ab"])
    for epoch, seed in ((5, 5), (4, 6)):
        others = kmeans.clusterings(banks, count=3, clusters=7, epoch=epoch, seed=seed, iterations=2)
        assert not torch.equal(others["L"], labels["L"])
