"""The compiled operators against the float64 oracle, their invariances, errors, gradients and golden bits."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mirepro import _build_info, files, ops, reference, rng
from tests import forked, ops_cases

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/ops.json"
VERSIONS = ROOT / "mirepro/ops_version.json"


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(ops_cases.unit(n, d, seed))


def lattice(n: int, d: int, seed: int) -> Tensor:
    """Entries in quarters: float32 and float64 scores agree exactly, and ties abound."""
    words = rng.words(seed, rng.Stream.DATA, 1, np.arange(n), d)
    return torch.from_numpy(((words % 5).astype(np.float32) - 2) / 4)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 700), st.integers(1, 21), st.integers(0, 10**6))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    b, n, d, seed = draw(SHAPES)
    lo = draw(st.integers(0, n - 1))
    return lattice(b, d, seed), lattice(n, d, seed + 1), lo, draw(st.integers(lo + 1, n))


FEW = settings(max_examples=25, deadline=None)


@FEW
@given(problems())
def test_neighbors_and_thresholds_equal_the_oracle(problem: tuple[Tensor, Tensor, int, int]) -> None:
    z, bank, lo, hi = problem
    score, index = ops.neighbors(z, bank, hi)
    want_score, want_index = reference.neighbors(z, bank, hi)
    assert torch.equal(index, want_index)
    assert torch.equal(score.double(), want_score)
    thresholds = reference.region_thresholds(z, bank, lo, hi)
    assert torch.equal(ops.region_thresholds(z, bank, lo, hi).double(), thresholds)


@FEW
@given(problems(), st.integers(1, 20), st.booleans(), st.sampled_from(["none", "own", "mates"]))
def test_samples_and_sizes_equal_the_oracle(
    problem: tuple[Tensor, Tensor, int, int], k: int, replacement: bool, exclude: str
) -> None:
    z, bank, lo, hi = problem
    seed = hi * 31 + k
    own = torch.from_numpy(rng.mulhi(rng.words(seed, 1, 0, np.arange(len(z)), 1)[:, 0], len(bank)))
    labels = torch.from_numpy(rng.mulhi(rng.words(seed, 2, 0, np.arange(2), len(bank)), 5))
    more = {"own": own, "labels": labels, "exclude_own": exclude == "own", "exclude_mates": exclude == "mates"}
    assert torch.equal(ops.region_size(z, bank, lo, hi, **more), reference.region_size(z, bank, lo, hi, **more))
    more |= {"seed": seed, "step": 3, "sample_index": torch.arange(len(z)) * 2**33, "replacement": replacement}
    if not replacement:
        members = reference._members(z, bank, lo, hi, own, labels, exclude == "own", exclude == "mates")
        k = min(k, *(len(rows) for rows, _ in members), 20)
    want = reference.region_sample(z, bank, lo, hi, k, **more)
    assert torch.equal(ops.region_sample(z, bank, lo, hi, k, **more), want)


@FEW
@given(problems(), st.booleans(), st.booleans())
def test_region_logsumexp_equals_the_oracle(
    problem: tuple[Tensor, Tensor, int, int], with_own: bool, with_labels: bool
) -> None:
    z, bank, lo, hi = problem
    own = torch.arange(len(z)) % len(bank) if with_own else None
    labels = (torch.arange(len(bank)) % 3)[None] if with_labels else None
    got = ops.region_logsumexp(z, bank, lo, hi, 0.3, own=own, labels=labels)
    want = reference.region_logsumexp(z, bank, lo, hi, 0.3, own=own, labels=labels)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@FEW
@given(SHAPES, st.integers(1, 40))
def test_gathers_equal_the_oracle(shape: tuple[int, int, int, int], k: int) -> None:
    b, n, d, seed = shape
    z, bank = unit(b, d, seed), unit(n, d, seed + 1)
    index = torch.from_numpy(rng.mulhi(rng.words(seed, 3, 0, np.arange(b), k), n))
    dot = ops.gather_dot(z, bank, index).double()
    torch.testing.assert_close(dot, reference.gather_dot(z, bank, index), rtol=0, atol=2e-6)
    for tau in (0.07, 0.01, 1e6):
        want = reference.gather_nce(z, bank, index, tau)
        got = ops.gather_nce(z, bank, index, tau).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 / min(tau, 1))


@FEW
@given(SHAPES, st.integers(1, 450))
def test_bank_assign_equals_the_oracle(shape: tuple[int, int, int, int], k: int) -> None:
    _, n, d, seed = shape
    bank, centroids = lattice(n, d, seed), lattice(k, d, seed + 2)
    assert torch.equal(ops.bank_assign(bank, centroids), reference.bank_assign(bank, centroids))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_bank_update(momentum: float) -> None:
    bank, z = unit(20, 9, 1), unit(6, 9, 2)
    z[3] = 0
    index = torch.tensor([4, 7, 4, 9, 0, 4])
    got, want = bank.clone(), bank.clone()
    ops.bank_update_(got, index, z, momentum)
    reference.bank_update_(want, index, z, momentum)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-7)
    untouched = [i for i in range(20) if i not in index.tolist()]
    assert torch.equal(got[untouched], bank[untouched])
    if momentum == 0:
        assert torch.equal(got[4], z[5])
        assert torch.equal(got[9], bank[9])
    if momentum == 1:
        assert torch.equal(got, bank)


def test_bank_update_depends_on_the_order_of_duplicates() -> None:
    z, index = unit(2, 9, 2), torch.tensor([4, 4])
    one, other = unit(20, 9, 1), unit(20, 9, 1)
    ops.bank_update_(one, index, z, 0.5)
    ops.bank_update_(other, index, z.flip(0), 0.5)
    assert not torch.equal(one, other)


def test_selection_on_a_bank_larger_than_the_sample() -> None:
    """Brackets come from a sample here; a bank ordered by class and a constant bank must not mislead them."""
    n = 20_000
    z = lattice(5, 8, 1)
    for bank in (lattice(n, 8, 2), lattice(96, 8, 3).repeat(n // 96 + 1, 1)[:n], torch.full((n, 8), 0.25)):
        score, index = ops.neighbors(z, bank, 300)
        want = reference.neighbors(z, bank, 300)
        assert torch.equal(index, want[1])
        assert torch.equal(score.double(), want[0])
        own = torch.arange(5)
        more = {"seed": 1, "step": 0, "sample_index": own}
        for lo, hi, k in ((200, 2000, 100), (200, 2000, 50), (0, n, 40)):  # listed, looked up, unscanned
            got = ops.region_sample(z, bank, lo, hi, k, **more)
            assert torch.equal(got, reference.region_sample(z, bank, lo, hi, k, **more))


def test_empty_rest_falls_back_to_the_region_without_own() -> None:
    bank = unit(50, 8, 1)
    z, own, labels = bank[:4].clone(), torch.arange(4), torch.zeros(1, 50, dtype=torch.int64)
    more = {"own": own, "labels": labels, "exclude_mates": True}
    assert ops.region_size(z, bank, 0, 10, **more).tolist() == [0] * 4
    drawn = ops.region_sample(z, bank, 0, 10, 200, seed=0, step=0, sample_index=own, **more)
    inside = ops.neighbors(z, bank, 10)[1]
    for i in range(4):
        assert set(drawn[i].tolist()) == set(inside[i].tolist()) - {i}
    alone = ops.region_sample(z, bank, 0, 1, 5, seed=0, step=0, sample_index=own, own=own, exclude_own=True)
    assert torch.equal(alone, own[:, None].expand(4, 5))


def test_draws_are_the_words_of_the_rng_and_uniform() -> None:
    z, bank, k = unit(3, 8), unit(400, 8, 1), 40_000
    sample = torch.tensor([5, 2**40 + 1, 7])
    drawn = ops.region_sample(z, bank, 10, 110, k, seed=9, step=4, sample_index=sample)
    members = torch.sort(reference.order(z, bank)[:, 10:110], dim=1).values
    number = torch.from_numpy(rng.mulhi(rng.words(9, rng.Stream.NEGATIVE, 4, sample.numpy(), k), 100))
    assert torch.equal(drawn, members.gather(1, number))
    for i in range(3):
        counts = torch.bincount(torch.searchsorted(members[i], drawn[i]), minlength=100)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
        skewed = counts.numpy() * (1 + 0.1 * (np.arange(100) < 50))
        assert stats.chisquare(skewed).pvalue < 1e-4  # the control
    other = ops.region_sample(z, bank, 10, 110, k, seed=10, step=4, sample_index=sample)
    assert not torch.equal(drawn, other)


def test_small_temperature_does_not_underflow() -> None:
    z = unit(2, 16)
    bank = torch.cat([-z, -z, z])
    ce = ops.gather_nce(z, bank, torch.tensor([[0, 2, 2], [4, 1, 3]]), 0.01)
    assert torch.isfinite(ce).all()
    torch.testing.assert_close(ce, torch.tensor([np.log(3), 0.0], dtype=torch.float32), rtol=0, atol=1e-4)
    every, own = ops.region_logsumexp(z, bank, 0, 6, 0.01, own=torch.tensor([0, 1]))
    assert torch.isfinite(every).all()
    torch.testing.assert_close(own, torch.full((2,), -100.0), rtol=1e-5, atol=0)


Loss = Callable[[Tensor], Tensor]


def gradient(loss: Loss, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0].double()


def losses(module: Any, bank: Tensor) -> list[Loss]:
    """One scalar loss per differentiable operator, of the compiled ones or of the oracle."""
    index, own, labels = torch.arange(4 * 30).reshape(4, 30) % 90, torch.arange(4), (torch.arange(90) % 7)[None]
    weight = torch.linspace(0.5, 2, 4).double()

    def logsumexp(z: Tensor) -> Tensor:
        every, mates = module.region_logsumexp(z, bank, 5, 40, 0.1, own=own, labels=labels)
        return ((every - 0.7 * mates) * weight).sum()

    return [
        lambda z: (module.gather_nce(z, bank, index, 0.07) * weight).sum(),
        lambda z: (module.gather_dot(z, bank, index).square() * weight[:, None]).sum(),
        logsumexp,
    ]


def test_gradients_equal_autograd_of_the_oracle_and_finite_differences() -> None:
    z, bank = unit(4, 12), unit(90, 12, 1)
    step = 1e-6 * unit(4, 12, 9).double()
    for compiled, oracle in zip(losses(ops, bank), losses(reference, bank), strict=True):
        got, want = gradient(compiled, z), gradient(oracle, z.double())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        slope = (oracle(z.double() + step) - oracle(z.double() - step)) / 2
        torch.testing.assert_close((got * step).sum(), slope, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("number", range(3), ids=["gather_nce", "gather_dot", "region_logsumexp"])
def test_no_gradient_reaches_the_bank(number: int) -> None:
    """Though it requires one; autograd of the oracle is the control. All operators that have a gradient are here."""
    grads = []
    for module in (ops, reference):
        z, bank = unit(4, 12).requires_grad_(), unit(90, 12, 1).requires_grad_()
        losses(module, bank)[number](z).backward()
        assert z.grad is not None
        assert z.grad.abs().max() > 1e-3
        grads.append(bank.grad)
    assert grads[0] is None
    assert grads[1] is not None


def test_no_gradient_reaches_the_bank_of_the_bare_operators() -> None:
    """Without the wrappers, which detach it."""
    bare, index, own = torch.ops.mirepro, torch.arange(12).reshape(4, 3), torch.arange(4)
    calls: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda z, bank: bare.gather_nce(z, bank, index, 0.1, True)[0],
        lambda z, bank: bare.gather_dot(z, bank, index),
        lambda z, bank: bare.region_logsumexp(z, bank, 5, 40, 0.1, own, None, True)[0],
    ]
    for call in calls:
        z, bank = unit(4, 12).requires_grad_(), unit(90, 12, 1).requires_grad_()
        call(z, bank).sum().backward()
        assert z.grad is not None
        assert bank.grad is None


def bad_calls(device: str = "cpu") -> dict[str, tuple[Callable[[], Any], str]]:
    z, bank, one = unit(3, 4).to(device), unit(9, 4, 1).to(device), torch.arange(3, device=device)
    nan_z, nan_bank = z.clone(), bank.clone()
    nan_z[2, 1], nan_bank[7, 3] = np.nan, np.inf
    wide = torch.arange(9, device=device).expand(3, 9)
    return {
        "nan query": (lambda: ops.neighbors(nan_z, bank, 2), r"z: row 2"),
        "nan bank": (lambda: ops.neighbors(z, nan_bank, 2), r"bank: row 7"),
        "nan region": (lambda: ops.region_thresholds(z, nan_bank, 0, 2), r"bank: row 7"),
        "nan gather": (lambda: ops.gather_nce(z, nan_bank, wide, 0.1), r"bank: row 7"),
        "nan dot": (lambda: ops.gather_dot(z, nan_bank, wide), r"bank: row 7"),
        "nan assign": (lambda: ops.bank_assign(nan_bank, z), r"bank: row 7"),
        "nan update": (lambda: ops.bank_update_(bank, one, nan_z, 0.5), r"z: row 2"),
        "nan logsumexp": (lambda: ops.region_logsumexp(z, nan_bank, 0, 9, 0.1), r"bank: row 7"),
        "k": (lambda: ops.neighbors(z, bank, 10), r"k: need"),
        "ranks": (lambda: ops.region_thresholds(z, bank, 4, 4), r"ranks: need"),
        "index": (lambda: ops.gather_dot(z, bank, wide + 1), r"index: 9"),
        "width": (lambda: ops.neighbors(z, bank[:, :3], 2), r"widths differ"),
        "dtype": (lambda: ops.neighbors(z.double(), bank, 2), r"z: dtype"),
        "tau": (lambda: ops.gather_nce(z, bank, wide, 0.0), r"tau"),
        "momentum": (lambda: ops.bank_update_(bank, one, z, 1.5), r"momentum"),
        "own": (lambda: ops.region_size(z, bank, 0, 3, exclude_own=True), r"own: needed"),
        "too many": (
            lambda: ops.region_sample(z, bank, 0, 3, 4, seed=0, step=0, sample_index=one, replacement=False),
            r"draws without replacement from the 3 members of row 0",
        ),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_input_is_a_value_error_that_names_it(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck() -> None:
    z, bank = unit(3, 8), unit(70, 8, 1)
    index, own, labels = torch.arange(12).reshape(3, 4), torch.arange(3), (torch.arange(70) % 5)[None]
    o, grad = torch.ops.mirepro, unit(3, 8).requires_grad_()
    samples = [
        (o.neighbors, (z, bank, 5)),
        (o.region_thresholds, (z, bank, 2, 9)),
        (o.region_size, (z, bank, 2, 9, own, labels, True, True)),
        (o.region_sample, (z, bank, 2, 9, 6, 1, 2, 3, own, own, None, True, False, True)),
        (o.region_logsumexp, (grad, bank, 2, 9, 0.1, own, labels, True)),
        (o.gather_nce, (grad, bank, index, 0.1, True)),
        (o.gather_nce, (z, bank, index, 0.1, False)),
        (o.gather_dot, (grad, bank, index)),
        (o.gather_dot_backward, (unit(3, 4), bank, index)),
        (o.bank_update_, (bank.clone(), own, z, 0.5)),
        (o.bank_assign, (bank, z)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator, arguments)


DIGESTS = """
import json, os, torch
torch.set_num_threads(int(os.environ["THREADS"]))
from mirepro import _build_info
from tests import ops_cases
print(json.dumps([_build_info.isa(), ops_cases.every()]))
"""
LEVELS = ["scalar", "avx2", "avx512"]
CASES = [("scalar", 1), ("avx2", 2), ("avx512", 2), ("avx512", 3), ("mmx", 1)]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, CompletedProcess[str]]:
    """Digests with other instruction sets and numbers of threads, and the import of a package without its extension."""
    place = tmp_path_factory.mktemp("bare")
    for name in ("errors.py", "rng.py", "ops.py"):
        files.write_text(place / "mirepro" / name, (ROOT / "mirepro" / name).read_text())
    files.write_text(place / "mirepro" / "__init__.py", "")
    cases: list[forked.Case] = [
        (["", DIGESTS], {"MIREPRO_ISA": isa, "THREADS": str(threads)}, ROOT) for isa, threads in CASES
    ]
    done = forked.run("exec(sys.argv[1])", [*cases, (["", "import mirepro.ops"], {}, place)], "import torch")
    return dict(zip([*CASES, "bare"], done, strict=True))


@pytest.mark.parametrize("case", CASES[:-1])
def test_same_bits_for_every_instruction_set_and_thread_count(
    elsewhere: dict[Any, CompletedProcess[str]], case: tuple[str, int]
) -> None:
    if LEVELS.index(case[0]) > LEVELS.index(_build_info.best_isa()):
        pytest.skip(f"this CPU lacks {case[0]}")
    assert json.loads(elsewhere[case].stdout) == [case[0], ops_cases.every()]


def test_unknown_instruction_set_is_refused(elsewhere: dict[Any, CompletedProcess[str]]) -> None:
    refused = elsewhere["mmx", 1]
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("MIREPRO_ISA=mmx: unknown")


def golden_faults(digests: dict[str, str], versions: dict[str, int], golden: dict[str, dict[str, object]]) -> list[str]:
    """Operators whose output changed without a version rise, or whose golden file is stale."""
    return [
        f"{name}: outputs changed; raise its version in mirepro/ops_version.json and run `python -m tests.ops_cases`"
        for name in digests
        if golden.get(name) != {"version": versions.get(name), "sha256": digests[name]}
    ]


def test_golden_outputs() -> None:
    versions, golden = json.loads(VERSIONS.read_text()), json.loads(GOLDEN.read_text())
    digests = ops_cases.every()
    assert set(versions) == set(golden) == set(digests)
    assert golden_faults(digests, versions, golden) == []
    assert golden_faults({**digests, "gather_nce": "0" * 64}, versions, golden)  # the control


def test_build_information() -> None:
    assert _build_info.compiler()
    assert _build_info.isa() in LEVELS
    assert isinstance(_build_info.cuda_arch_list(), str)


def test_missing_extension_names_the_build_command(elsewhere: dict[Any, CompletedProcess[str]]) -> None:
    assert elsewhere["bare"].returncode != 0
    assert ops.BUILD_COMMAND in elsewhere["bare"].stderr
