"""The cost of a bank spread over ranks: what is counted is what the ranks do and send."""

from collections.abc import Iterable, Iterator

import pytest
import torch

from mirepro import profiles
from mirepro.bank_shards import ShardedBank
from mirepro.errors import UserError
from mirepro.launch import spread
from mirepro.launch.spread import Question
from mirepro.ranks import World

ROWS, DIM, BATCH, DRAWS = 103, 8, 6, 40


def step(bank: ShardedBank, region: bool) -> None:
    """Draws, scores, gradient."""
    z = torch.nn.functional.normalize(torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0)))
    z.requires_grad_()
    low, high = (10, 60) if region else (0, ROWS)
    index = bank.region_sample(z, low, high, DRAWS, seed=0, step=0, sample_index=torch.arange(BATCH))
    bank.gather_nce(z, index, 0.07).sum().backward()


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("region", [False, True])
def test_what_is_counted_is_what_happens(monkeypatch: pytest.MonkeyPatch, region: bool) -> None:
    """One rank does and sends here what each of two would send."""
    sent: list[int] = []
    scored: list[int] = []
    exact, codes = World.total, ShardedBank.codes

    def total(world: World, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        found = exact(world, parts)
        sent.append(size(found))
        return found

    def counted(bank: ShardedBank, z: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for begin, code in codes(bank, z):
            scored.append(code.numel())
            yield begin, code

    monkeypatch.setattr(World, "gather", lambda _, rows: sent.append(size([rows])) or rows)
    monkeypatch.setattr(ShardedBank, "sum", lambda _, integers: sent.append(size([integers])) or integers)
    monkeypatch.setattr(World, "total", total)
    monkeypatch.setattr(ShardedBank, "codes", counted)
    step(ShardedBank(ROWS, DIM, world=World(), blocks=2, seed=0), region)
    question = Question(ROWS, DIM, 2, BATCH, DRAWS, region)
    assert (sum(sent), len(sent)) == (question.sent, question.exchanges)
    assert sum(scored) == 2 * question.scores


def test_it_scales_as_it_must() -> None:
    rates = {"score_s": 1e-9, "score_s_per_dim": 1e-11, "exchange_s": 1e-4, "byte_s": 1e-9}
    big = Question(10**9, 128, 64, 256, 4096, region=True)
    half = Question(10**9, 128, 128, 256, 4096, region=True)
    assert spread.seconds(big, rates)[0] == pytest.approx(2 * spread.seconds(half, rates)[0])
    assert (big.held, big.collected) == (8_000_000_000, 512_000_000_000)
    assert big.sent == half.sent
    alone = Question(10**9, 128, 1, 256, 4096, region=True)
    assert spread.seconds(alone, rates)[1] == 0
    whole = Question(10**9, 128, 64, 256, 4096, region=False)
    assert spread.seconds(whole, rates)[0] == 0


def test_the_plan_says_it(root) -> None:
    profile = profiles.load(root, "imagenet")
    shown = spread.lines(profile, 10**9, 64)
    assert "a rank's rows: 8 GB; a checkpoint: 512 GB" in shown[-2]
    for rows, ranks, words in ((0, 1, "--bank-rows 0"), (5, 6, "use 1 to 5"), (5, 0, "--ranks 0")):
        with pytest.raises(UserError, match=words):
            spread.lines(profile, rows, ranks)
