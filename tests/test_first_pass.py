"""The certified first passes: the bits of the canonical scores on banks that invite mistakes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirepro import ops, rng
from tests import ops_cases
from tests.forked import forked

PASSES = ["bf16", "int8"]


def unit(n: int, d: int, seed: int) -> Tensor:
    return torch.from_numpy(ops_cases.unit(n, d, seed))


def banks(n: int, d: int) -> dict[str, Tensor]:
    """Banks of n rows on which rounding could change an order, a count or an error."""
    plain, few = unit(n, d, 11), unit(16, d, 12)
    close = torch.nn.functional.normalize(few.repeat(n // 16 + 1, 1)[:n] + 1e-4 * unit(n, d, 13))
    norms = torch.logspace(-20, 7, n)[:, None]
    zeros = plain.clone()
    zeros[::3] = 0
    huge = plain.clone()
    huge[5] *= 1e12
    return {
        "plain": plain,
        "duplicates": few.repeat(n // 16 + 1, 1)[:n],
        "constant": plain[:1].expand(n, d).contiguous(),
        "clusters": close,
        "norms": plain * norms,
        "tiny": plain * 1e-30,
        "denormal": plain * 1e-41,
        "huge": huge,
        "zero rows": zeros,
        "one large entry": torch.cat([plain[:, 1:] * 1e-3, torch.ones(n, 1)], 1),
    }


def answers(z: Tensor, bank: Tensor, k: int, lo: int, hi: int) -> list[Tensor]:
    """Outputs of the operators that scan."""
    own = torch.arange(len(z)) % len(bank)
    sample = {"seed": 1, "step": 2, "sample_index": own, "own": own, "exclude_own": True}
    return [
        *ops.neighbors(z, bank, k),
        ops.region_thresholds(z, bank, lo, hi),
        ops.region_size(z, bank, lo, hi, own=own, exclude_own=True),
        ops.region_sample(z, bank, lo, hi, 40, **sample),  # type: ignore[arg-type]
        ops.bank_assign(z, bank),
    ]


def with_pass(monkeypatch: pytest.MonkeyPatch, name: str, *problem: object) -> list[Tensor]:
    monkeypatch.setenv("MIREPRO_FIRST_PASS", name)
    return answers(*problem)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(banks(64, 4)))
@pytest.mark.parametrize("first_pass", PASSES)
def test_same_bits_as_canonical_scores(first_pass: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, d, b in ((3000, 37, 40), (700, 64, 3)):
        bank = banks(n, d)[name]
        z = torch.cat([unit(b - 2, d, 3), bank[7:8], torch.zeros(1, d)])
        for k, lo, hi in ((1, 0, 1), (50, 30, 700), (n, n // 3, n)):
            want = with_pass(monkeypatch, "exact", z, bank, k, lo, hi)
            got = with_pass(monkeypatch, first_pass, z, bank, k, lo, hi)
            for a, e in zip(got, want, strict=True):
                assert torch.equal(a, e)


def test_rounded_scores_alone_would_be_wrong() -> None:
    """The control: without the certificate the order changes."""
    z, bank = unit(40, 37, 3), banks(3000, 37)["plain"]
    rounded = (z.bfloat16().float() @ bank.bfloat16().float().T).topk(50).indices
    assert not torch.equal(rounded, ops.neighbors(z, bank, 50)[1])


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 1500), st.integers(1, 80), st.integers(0, 10**6), st.integers(1, 3),
    st.sampled_from(PASSES),
)  # fmt: skip
def test_any_shape_and_stride(b: int, n: int, d: int, seed: int, stride: int, first_pass: str) -> None:
    scale = torch.from_numpy(rng.uniform(seed, 3, 0, np.arange(n), 1)) * 4
    z, bank = unit(b, d * stride, seed)[:, ::stride], (unit(n, d * stride, seed + 1) * scale)[:, ::stride]
    hi = 1 + seed % n
    with pytest.MonkeyPatch.context() as patch:
        want = with_pass(patch, "exact", z, bank, hi, hi // 2, hi)
        got = with_pass(patch, first_pass, z, bank, hi, hi // 2, hi)
    for a, e in zip(got, want, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("first_pass", PASSES)
def test_bad_rows_are_named(first_pass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIREPRO_FIRST_PASS", first_pass)
    bank = unit(900, 20, 1)
    for bad in (np.nan, np.inf):
        bank[777, 19] = bad
        with pytest.raises(ValueError, match="bank: row 777"):
            ops.neighbors(unit(3, 20, 2), bank, 5)


def test_unknown_first_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIREPRO_FIRST_PASS", "fp4")
    with pytest.raises(ValueError, match="MIREPRO_FIRST_PASS=fp4"):
        ops.neighbors(unit(3, 20, 2), unit(900, 20, 1), 5)


def test_scalar_passes_and_several_threads() -> None:
    """Without AVX-512 a pass may be forced too, and gives the golden bits with any number of threads."""
    code = "import json, torch; from tests import ops_cases; torch.set_num_threads(3); "
    code += "print(json.dumps(ops_cases.digests()))"
    found = forked(code, *({"MIREPRO_ISA": "scalar", "MIREPRO_FIRST_PASS": first_pass} for first_pass in PASSES))
    assert [json.loads(text) for text in found] == [ops_cases.digests()] * len(PASSES)
