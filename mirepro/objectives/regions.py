"""Restricted regions: the ball of the u*N most similar rows and the ring inside it; annealing."""

import math
from dataclasses import dataclass
from fractions import Fraction

from mirepro.objectives.base import Objective, Step


def ranks(outer: float | Fraction, inner: float, size: int, relative: bool = True) -> tuple[int, int]:
    """Ranks [lo, hi) of a region of a bank of `size` rows, in exact arithmetic of the decimals as written.

    Args:
        outer: u, the ball's fraction of the bank.
        inner: l, where the ring begins: a fraction of the ball, or of the bank.
        size: N.
        relative: Whether l is a fraction of the ball.
    """
    high = int(_exact(outer) * size)
    return int(_exact(inner) * (high if relative else size)), high


def _exact(decimal: float | Fraction) -> Fraction:
    return decimal if isinstance(decimal, Fraction) else Fraction(str(decimal))


@dataclass
class Region(Objective):
    """Negatives from the ranks [floor(l m_u), m_u), m_u = floor(u N); u may fall from 1 over the first half.

    Attributes:
        outer: u, a share of the bank and never of the batch [code]; .1 [code].
        inner: l, where the region begins [unverified].
        inner_of: Whether l is a share of the outer `ball` or of the `bank` [unverified, hence an option].
        annealed: Whether u falls linearly from 1 over the first half of the run [schedule unverified].
    """

    outer: float = 0.1
    inner: float = 0.0
    inner_of: str = "ball"
    annealed: bool = False

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        self._require(0 < self.outer <= 1, "outer", "a fraction u of the bank in (0, 1]")
        self._require(0 <= self.inner < 1, "inner", "a fraction l in [0, 1)")
        self._require(self.inner_of in ("ball", "bank"), "inner_of", "'ball' or 'bank'")

    def fraction(self, step: Step) -> Fraction:
        """u at this step: constant, or linear from 1 to `outer` over the first half of the run."""
        final = _exact(self.outer)
        half = max(1, step.total_steps // 2)
        if not self.annealed or step.step >= half:
            return final
        return 1 + (final - 1) * Fraction(step.step, half)

    def region(self, size: int, step: Step) -> tuple[int, int]:
        """Ranks [lo, hi) at this step."""
        return ranks(self.fraction(step), self.inner, size, self.inner_of == "ball")

    def check(self, size: int, dim: int) -> list[str]:
        """Refuses an empty region; warns where the region is smaller than the number of draws."""
        warnings = super().check(size, dim)
        low, high = ranks(self.outer, self.inner, size, self.inner_of == "ball")
        self._require(high > low, "outer", f"a larger fraction: ranks [{low}, {high}) of {size} rows are empty")
        if not self.replacement:
            most = high - low - (self.own_row == "exclude")
            self._require(self.k - 1 <= most, "k", f"at most {most + 1} without replacement")
        if self.k - 1 > high - low:
            draws = f"{self.k - 1} draws from a region of {high - low} rows repeat rows"
            warnings.append(f"{draws}; the cap is {self.cap(size):.3f} nats")
        return warnings

    @property
    def bounded(self) -> bool:
        """Without its own row only draws without replacement from all other rows bound."""
        return self.own_row == "keep" or (not self.replacement and self.outer == 1 and self.inner == 0)

    def cap(self, size: int) -> float:
        """`log k`, less `log(1 + (k - 1) / m)` where draws outnumber the m rows of the region (oversampling), nats."""
        low, high = ranks(self.outer, self.inner, size, self.inner_of == "ball")
        excess = (self.k - 1) / max(1, high - low)
        return super().cap(size) if excess <= 1 else math.log(self.k) - math.log(1 + excess)
