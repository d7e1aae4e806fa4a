"""What a step costs where the bank is spread over ranks (`pretrain.bank_shards`): bytes held and sent, and seconds.

Everything is counted from what `mirepro.bank_shards` does; the constants (seconds per score, per exchange, per byte)
are measured by `python -m benchmarks.spread`, with the machine and how far predictions were off beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirepro import files
from mirepro.errors import UserError
from mirepro.params import PretrainParams
from mirepro.profiles import Profile

RATES = "benchmarks/results/spread.json"
PASSES = 5
"""How often a draw from a region scores a rank's rows: three digits of the thresholds, members, the drawn ones."""
DIGITS = 2 * 8 * (2048 + 2048 + 1024)
"""Bytes of the counts of digits for both ends of a region, per query."""


@dataclass(frozen=True)
class Question:
    """A step's question to a bank: negatives for every query, their scores, the gradient, the new rows.

    Attributes:
        rows: N, of the whole bank.
        dim: D.
        ranks: R, which hold N / R rows each.
        batch: Queries B.
        draws: K of each query.
        region: Whether they are drawn from a region of ranks; draws from the whole bank need no scores.
    """

    rows: int
    dim: int
    ranks: int
    batch: int
    draws: int
    region: bool

    @property
    def scores(self) -> float:
        """Scores that a rank computes."""
        return PASSES * self.batch * self.rows / self.ranks if self.region else 0.0

    @property
    def exchanges(self) -> int:
        """Collective exchanges: of scores and gradients; of digits, equal codes, members and rows of a region."""
        return 0 if self.ranks == 1 else 2 + 6 * self.region

    @property
    def sent(self) -> int:
        """Bytes that a rank puts into them."""
        drawn = DIGITS + 16 + 24 + 8 * self.draws if self.region else 0
        return 0 if self.ranks == 1 else self.batch * (drawn + 4 * self.draws + 4 * self.dim)

    @property
    def held(self) -> int:
        """Bytes of a rank's rows."""
        return 4 * self.dim * -(-self.rows // self.ranks)

    @property
    def collected(self) -> int:
        """Bytes in the first rank's CPU memory when a checkpoint is written."""
        return 4 * self.dim * self.rows


def seconds(question: Question, rates: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a rank's scores on one core, and of the exchanges.

    Args:
        question: What is asked.
        rates: `score_s` and `score_s_per_dim` (seconds of a score, and per dimension), `exchange_s`, `byte_s`.
    """
    scores = question.scores * (rates["score_s"] + question.dim * rates["score_s_per_dim"])
    return scores, question.exchanges * rates["exchange_s"] + question.sent * rates["byte_s"]


def lines(profile: Profile, rows: int, ranks: int) -> list[str]:
    """The costs of a profile's step with such a bank as text: draws from the whole bank, and from a region.

    Raises:
        UserError: A number is impossible.
    """
    if rows < 1:
        raise UserError(f"--bank-rows {rows}: impossible; use 1 or more")
    if not 1 <= ranks <= rows:
        raise UserError(f"--ranks {ranks}: impossible for a bank of {rows} rows; use 1 to {rows}")
    values = profile.build(PretrainParams, "pretrain")
    dim, batch = values.encoder.dim, values.batch
    draws = max(int((row.options or {}).get("k", 1)) for row in profile.rows.values())
    rates = files.read_json(profile.root / RATES)
    shown = [f"{'draws from':<12}{'scores, s':>12}{'exchanges, s':>14}{'sent, MB':>10}"]
    whole, region = (Question(rows, dim, ranks, batch, draws, kind) for kind in (False, True))
    for name, question in (("whole bank", whole), ("region", region)):
        scores, exchanges = seconds(question, rates)
        shown.append(f"{name:<12}{scores:>12.3g}{exchanges:>14.3g}{question.sent / 1e6:>10.3g}")
    shown.append(f"a step of {batch} queries, {draws} draws each, {dim} dimensions; each of {ranks} ranks, one core")
    shown.append(f"a rank's rows: {region.held / 1e9:.3g} GB; a checkpoint: {region.collected / 1e9:.3g} GB, in the "
                 "first rank's CPU memory while it is written")  # fmt: skip
    low, high = rates["check"]["least"], rates["check"]["most"]
    shown.append(f"rates: {rates['what']}; steps that were not fitted took {low:.2f} to {high:.2f} times as long")
    return shown
