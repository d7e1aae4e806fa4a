"""A memory bank spread over ranks gives the bits of the whole one: real processes that meet through gloo."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mirepro import bank_parts, bank_regions, banks, ops, rng
from mirepro.bank import MemoryBank
from mirepro.bank_shards import ShardedBank
from mirepro.errors import UserError
from mirepro.params import EncoderParams, PretrainParams, RunParams
from mirepro.ranks import World
from tests.bank_shards import AT_ONCE, PROBLEMS, RANKED, Whole, answers, part_answers, part_sums, problem, spread, sums
from tests.ops_cases import unit
from tests.test_ranks import finish, start


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the ranks: torch's sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal, the sign of a zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the answers that are not the same."""
    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]


def expected(name: str) -> dict[str, torch.Tensor]:
    """The whole bank's answers."""
    z, rows, own, labels = problem(name)
    found = answers(Whole(rows), z, own, labels)
    return found | {"initial": MemoryBank(len(rows), 5, seed=8, modality=1).rows}


@pytest.mark.parametrize("at_once", [AT_ONCE, 1 << 20])
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_rank_answers_like_the_whole_bank(name, at_once, monkeypatch):
    monkeypatch.setattr(bank_parts, "AT_ONCE", at_once)
    assert differing(part_answers(name, World()), expected(name)) == []


def test_the_problems_hold_negative_zeros_ties_and_fallbacks():
    dot = expected("zeros")["dot"]
    assert bool(((dot == 0) & torch.signbit(dot)).any())
    score = expected("ties")["neighbors 103 score"]
    assert bool((score.diff() == 0).any())
    assert not expected("zeros")["0-41 size exclude_mates"].any()


@pytest.mark.parametrize("name", PROBLEMS)
def test_sums_of_blocks_are_those_of_the_whole_bank_but_for_rounding(name):
    z, rows, own, labels = problem(name)
    found, whole = part_sums(name, World()), sums(Whole(rows), z, own, labels)
    whole["means"] = Whole(rows).means(ops.bank_assign(rows, z), z)
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    one = part_sums(name, World(), blocks=1)
    assert same(one["dot gradient"], whole["dot gradient"])
    assert same(one["means"], whole["means"])
    if name == "plain":  # the control: blocks do show
        assert not same(one["dot gradient"], found["dot gradient"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_answer_like_the_whole_bank(size, tmp_path, monkeypatch):
    for code, _, errors in finish(start(size, tmp_path, program="tests.bank_shards")):
        assert code == 0, errors
    monkeypatch.setattr(bank_parts, "AT_ONCE", AT_ONCE)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name in RANKED:
        alone, whole = part_sums(name, World()), expected(name)
        for answer, total in (part[name] for part in found):
            assert differing(answer, whole) == []
            assert differing(total, alone) == []
    whole = expected("ties")
    for control in (part["control"] for part in found):
        assert size == 1 or not same(control["neighbors"], whole["neighbors 2 row"])
        assert not same(control["draws"], whole["34-69 draws "])


@pytest.mark.parametrize(
    ("size", "blocks", "world", "message"),
    [
        (9, 4, World(1, 3), "rank 1: 3 ranks cannot share pretrain.bank_shards 4 equally; start one of 1, 2, 4"),
        (3, 4, World(), "pretrain.bank_shards: 4 blocks are too many for 3 rows; use at most 3"),
    ],
)
def test_an_impossible_layout_is_refused(size, blocks, world, message):
    with pytest.raises(UserError) as caught:
        ShardedBank(size, 2, world=world, blocks=blocks, seed=0)
    assert str(caught.value) == message


@pytest.mark.parametrize(("free", "blocks"), [(10**9, 0), (10**3, 0), (10**3, 2)])
def test_a_bank_without_room_is_refused_with_the_remedy(free, blocks, monkeypatch):
    """80 rows of two modalities take 10 kB; the control has room for them."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    values = dataclasses.replace(PretrainParams(), bank_shards=blocks, encoder=EncoderParams(dim=16))
    params = RunParams("cmc", 0, "cmc", pretrain=values)
    if free == 10**9:
        assert list(banks.create(params, ("L", "ab"), 80, World(), torch.device("cpu"))) == ["L", "ab"]
        return
    with pytest.raises(UserError, match=r"pretrain\.bank_shards: \d: the bank's rows take .* GB free; use ") as told:
        banks.create(params, ("L", "ab"), 80, World(), torch.device("cpu"))
    assert ("more ranks" in str(told.value)) == (blocks > 0)


@pytest.mark.parametrize(("size", "blocks"), [(4, 4), (103, 4), (103, 8), (7, 6), (1000, 12)])
def test_ranks_cover_all_rows_in_the_same_blocks(size, blocks):
    whole = bank_parts.edges(size, blocks, World())
    assert (whole[0], whole[-1]) == (0, size)
    for count in (count for count in range(1, blocks + 1) if blocks % count == 0):
        parts = [bank_parts.edges(size, blocks, World(rank, count)) for rank in range(count)]
        assert [0, *(edge for part in parts for edge in part[1:])] == whole


def test_words_of_a_range_are_those_of_rng():
    for first, last in ((0, 0), (0, 9), (3, 4), (5, 14), (8, 12)):
        expected = rng.words(3, 2, 7, (1 << 33) + 5, 16)[0, first:last]
        assert bank_regions.words((3, 2, 7), (1 << 33) + 5, first, last).tolist() == expected.tolist()


def test_codes_order_scores_and_give_them_back():
    score = torch.tensor([3.0, 1.5, 1e-40, 0.0, -0.0, -1e-40, -2.0])
    code = bank_parts.encode(score)
    assert code.tolist() == sorted(code.tolist())
    assert code[3] == code[4]
    assert same(bank_parts.decode(code), score + 0.0)


Z, ROWS = torch.from_numpy(unit(3, 4, 1)), torch.from_numpy(unit(20, 4, 2))
OWN, DRAWS = torch.arange(3), {"seed": 1, "step": 2, "sample_index": torch.arange(3)}


@pytest.mark.parametrize(
    "ask",
    [
        lambda bank: bank.neighbors(Z, 0),
        lambda bank: bank.neighbors(Z, 21),
        lambda bank: bank.neighbors(Z / 0, 1),
        lambda bank: bank.neighbors(Z.double(), 1),
        lambda bank: bank.region_thresholds(Z, 3, 3),
        lambda bank: bank.region_size(Z, 2, 21),
        lambda bank: bank.region_size(Z, 0, 20, exclude_own=True),
        lambda bank: bank.region_size(Z, 0, 20, own=OWN + 18, exclude_own=True),
        lambda bank: bank.region_size(Z, 0, 20, own=OWN[:2], exclude_own=True),
        lambda bank: bank.region_size(Z, 0, 20, own=OWN, labels=torch.zeros((1, 9), dtype=torch.int64)),
        lambda bank: bank.region_size(Z / 0, 0, 20),
        lambda bank: bank.region_sample(Z, 0, 5, 0, **DRAWS),
        lambda bank: bank.region_sample(Z, 0, 5, 6, replacement=False, **DRAWS),
        lambda bank: bank.region_sample(Z, 0, 5, 2, **DRAWS | {"sample_index": OWN[:2]}),
        lambda bank: bank.region_logsumexp(Z, 0, 5, 0.0),
        lambda bank: bank.gather_dot(Z, OWN[:, None] + 18),
        lambda bank: bank.gather_nce(Z, OWN[:, None], -1.0),
        lambda bank: bank.update(OWN - 1, Z, 0.5),
        lambda bank: bank.update(OWN, Z / 0, 0.5),
        lambda bank: bank.update(OWN, Z[:2], 0.5),
        lambda bank: bank.update(OWN, Z, 1.5),
    ],
)
def test_what_the_operators_refuse_is_refused(ask):
    with pytest.raises(ValueError) as whole:
        ask(Whole(ROWS))
    with pytest.raises(ValueError) as spread_out:
        ask(spread(ROWS, World()))
    assert str(spread_out.value).partition(":")[0] == str(whole.value).partition(":")[0]
