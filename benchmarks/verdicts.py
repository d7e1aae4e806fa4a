"""How often the ladder of verdicts errs: `python -m benchmarks.verdicts [--out benchmarks/results/verdicts.json]`.

Simulated audits go through `mirepro.audit.verdicts.judge` itself. The unit is the standard deviation of the published
law; a margin is the narrowest that the policy check accepts for that many seeds. A miss is EQUIVALENT (fresh seeds) or
CONSISTENT (one fresh run) where the law moved by a margin or more; a false alarm is DIVERGED where it did not move.
Each bound has a control, a wrong ladder, that has to break it; exit 1 if a bound is broken or a control holds.
"""

import argparse
import math
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mirepro import files
from mirepro.audit import verdicts
from mirepro.audit.verdicts import CONSISTENT, DIVERGED, EQUIVALENT, INCONCLUSIVE, Evidence, Rule

ALPHA = 0.05
SEEDS = (3, 5, 10)
SHIFTS = (0.0, 0.5, 1.0, 2.0)
MARGINS = (1.0, 1.5, 2.0, 2.5, 3.0)
CELLS = 20
Draw = np.random.Generator
LAWS: dict[str, tuple[Callable[[Draw, int], np.ndarray], float]] = {
    "normal": (lambda draw, count: draw.standard_normal(count), 1.0),
    "heavier tails (t, 3 df)": (lambda draw, count: draw.standard_t(3, count) / math.sqrt(3), 1.0),
    "re-runs twice as wide": (lambda draw, count: draw.standard_normal(count), 2.0),
    "skewed (exponential)": (lambda draw, count: draw.standard_exponential(count) - 1, 1.0),
}
"""Draws of mean 0 and sd 1, and what re-runs are multiplied by."""


@dataclass(frozen=True)
class Setting:
    """What is simulated: as many fresh seeds or one, a law, seeds on either side, and the shift in margins."""

    test: str
    law: str
    seeds: int
    shift: float


@dataclass(frozen=True)
class Row:
    """A setting with the shares of its verdicts among `draws` audits."""

    setting: Setting
    margin: float
    draws: int
    rates: dict[str, float]


@cache
def narrowest(seeds: int) -> float:
    """The narrowest margin, in hundredths of a published sd, that the policy check accepts."""
    steps = range(1, 1000)
    place = bisect_left(steps, verdicts.least_power(), key=lambda step: verdicts.power(step / 100, seeds, seeds))
    return steps[place] / 100


def evidence(draw: Draw, setting: Setting, margin: float) -> Evidence:
    """One simulated cell whose bytes differ."""
    law, scale = LAWS[setting.law]
    published = tuple(law(draw, setting.seeds).tolist())
    count = setting.seeds if setting.test == "tost" else 1
    new = tuple((law(draw, count) * scale + setting.shift * margin).tolist())
    return Evidence(False, published=published, fresh=new)


def simulate(setting: Setting, draws: int, alpha: float = ALPHA, margin: float | None = None) -> Row:
    """Shares of the verdicts of single cells."""
    draw = np.random.default_rng([ord(letter) for letter in repr(setting)])
    wide = margin or narrowest(setting.seeds)
    rule = Rule("tost", wide, alpha)
    names = [verdicts.judge([(evidence(draw, setting, wide), rule)])[0].name for _ in range(draws)]
    known = (EQUIVALENT, CONSISTENT, INCONCLUSIVE, DIVERGED)
    return Row(setting, wide, draws, {name: names.count(name) / draws for name in known})


def family(setting: Setting, wrong: str, tables: int, corrected: bool = True) -> float:
    """Share of tables of `CELLS` such cells in which at least one has the wrong verdict."""
    draw = np.random.default_rng([ord(letter) for letter in repr(setting)])
    margin = narrowest(setting.seeds)
    rule = Rule("tost", margin, ALPHA)
    found = 0
    for _ in range(tables):
        cases = [(evidence(draw, setting, margin), rule) for _ in range(CELLS)]
        judged = verdicts.judge(cases) if corrected else [verdicts.judge([case])[0] for case in cases]
        found += any(verdict.name == wrong for verdict in judged)
    return found / tables


def unbounded(setting: Setting, draws: int) -> float:
    """Control: "no significant difference" taken for equivalence, without any margin."""
    from scipy import stats

    draw = np.random.default_rng(0)
    pairs = [evidence(draw, setting, narrowest(setting.seeds)) for _ in range(draws)]
    old, new = np.array([pair.published for pair in pairs]), np.array([pair.fresh for pair in pairs])
    return float((stats.ttest_ind(new, old, axis=1, equal_var=False).pvalue > ALPHA).mean())


def two_sigma(setting: Setting, draws: int) -> float:
    """Control: alarm beyond two published standard deviations, however few seeds they come from."""
    draw = np.random.default_rng(0)
    pairs = [evidence(draw, setting, 1.0) for _ in range(draws)]
    old, new = np.array([pair.published for pair in pairs]), np.array([pair.fresh for pair in pairs])[:, 0]
    return float((np.abs(new - old.mean(1)) > 2 * old.std(1, ddof=1)).mean())


def accepted(seeds: int, count: int) -> dict[str, Any]:
    """False equivalence among the audits whose published seeds pass the policy check, and with Welch's test alone.

    A margin passes if it is wide against the published spread, so that these audits are those of a small spread. The
    margin is nine tenths of the narrowest, where Welch's test errs most often.
    """
    from scipy import stats

    margin = round(0.9 * narrowest(seeds), 2)
    setting = Setting("tost", "normal", seeds, 1.0)
    draw = np.random.default_rng(seeds)
    passed: list[Evidence] = []
    draws = 0
    while len(passed) < count:
        draws += 1
        pair = evidence(draw, setting, margin)
        if np.std(pair.published, ddof=1) <= margin / narrowest(seeds):
            passed.append(pair)
    names = [verdicts.judge([(pair, Rule("tost", margin, ALPHA))])[0].name for pair in passed]
    old, new = np.array([pair.published for pair in passed]), np.array([pair.fresh for pair in passed])
    above = stats.ttest_ind(new, old - margin, axis=1, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(new, old + margin, axis=1, equal_var=False, alternative="less").pvalue
    return {"seeds": seeds, "margin": margin, "accepted": count / draws,
            "false_equivalence": names.count(EQUIVALENT) / count,
            "welch_alone": float((np.maximum(above, below) <= ALPHA).mean())}  # fmt: skip


def bounds(draws: int) -> list[dict[str, Any]]:
    """Error rates that have to stay below alpha, each beside a wrong ladder that must not.

    Args:
        draws: Simulated cells for each rate.
    """
    result = []

    def bound(what: str, setting: Setting, rate: float, count: int, controls: dict[str, float]) -> None:
        limit = ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / count)
        result.append({"what": what, **asdict(setting), "rate": rate, "limit": limit, "draws": count,
                       "holds": rate <= limit, "controls": controls,
                       "controls_fail": all(found > limit for found in controls.values())})  # fmt: skip

    for seeds in SEEDS:
        for law in LAWS:
            edge = Setting("tost", law, seeds, 1.0)
            row, controls = simulate(edge, draws), {"no margin": unbounded(edge, draws)}
            controls |= {"alpha 0.2": simulate(edge, draws // 4, 0.2).rates[EQUIVALENT]} if law == "normal" else {}
            bound("false equivalence", edge, row.rates[EQUIVALENT], draws, controls)
        passed = accepted(seeds, 2 * draws)
        edge = Setting("tost", "normal", seeds, 1.0)
        bound("false equivalence of accepted policies", edge, passed["false_equivalence"], 2 * draws,
              {"Welch alone": passed["welch_alone"]})  # fmt: skip
        still = Setting("interval", "normal", seeds, 0.0)
        bound("false alarm", still, simulate(still, draws).rates[DIVERGED], draws, {"2 sd": two_sigma(still, draws)})
    tables = max(draws // CELLS, 1)
    for what, test, shift, wrong in (
        (f"any false equivalence of {CELLS}", "tost", 1.0, EQUIVALENT),
        (f"any false alarm of {CELLS}", "interval", 0.0, DIVERGED),
    ):
        setting = Setting(test, "normal", 3, shift)
        alone = {"no correction": family(setting, wrong, tables, corrected=False)}
        bound(what, setting, family(setting, wrong, tables), tables, alone)
    return result


def problems(found: Sequence[dict[str, Any]]) -> list[str]:
    """Bounds that are broken, and controls that keep them."""
    named = [(f"{one['what']}, {one['law']}, {one['seeds']} seeds", one) for one in found]
    return [f"{name}: {one['rate']:.3f} exceeds {one['limit']:.3f}" for name, one in named if not one["holds"]] + [
        f"{name}: a control stays below {one['limit']:.3f}" for name, one in named if not one["controls_fail"]
    ]


def powers(draws: int) -> list[dict[str, Any]]:
    """Share of equal normal laws that are found equivalent, simulated and computed, by seeds and margin."""
    return [
        {"seeds": seeds, "margin": margin, "computed": verdicts.power(margin, seeds, seeds),
         "simulated": simulate(Setting("tost", "normal", seeds, 0.0), draws, margin=margin).rates[EQUIVALENT]}
        for seeds in SEEDS for margin in MARGINS
    ]  # fmt: skip


def show(rows: Sequence[Row], limits: Sequence[dict[str, Any]], power: Sequence[dict[str, Any]]) -> None:
    """Prints the three tables."""
    console = Console(width=120)
    table = Table("test", "law", "seeds", "shift (margins)", EQUIVALENT, CONSISTENT, INCONCLUSIVE, DIVERGED)
    for row in rows:
        one = row.setting
        table.add_row(one.test, one.law, str(one.seeds), f"{one.shift:g}", *(f"{r:.3f}" for r in row.rates.values()))
    console.print(table)
    table = Table("error", "law", "seeds", "rate", "alpha + 2 s.e.", "controls")
    for item in limits:
        controls = ", ".join(f"{name}: {rate:.3f}" for name, rate in item["controls"].items())
        numbers = (f"{item['rate']:.4f}", f"{item['limit']:.4f}")
        table.add_row(item["what"], item["law"], str(item["seeds"]), *numbers, controls)
    console.print(table)
    table = Table("power at n = ", *(f"margin {margin:g} sd" for margin in MARGINS))
    for seeds in SEEDS:
        found = [f"{item['computed']:.2f} ({item['simulated']:.2f})" for item in power if item["seeds"] == seeds]
        table.add_row(str(seeds), *found)
    console.print(table)


def main() -> None:
    """Parses, simulates, prints, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400, help="audits for each rate; eight times as many at a bound")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    started = time.process_time()
    settings = [Setting(*one) for one in ((t, law, n, s) for t in ("tost", "interval") for law in LAWS
                                          for n in SEEDS for s in SHIFTS)]  # fmt: skip
    rows = [simulate(setting, arguments.draws) for setting in settings]
    limits, power = bounds(8 * arguments.draws), powers(arguments.draws)
    show(rows, limits, power)
    if arguments.out:
        plain = [asdict(row.setting) | {"margin": row.margin, "draws": row.draws} | row.rates for row in rows]
        files.write_json(arguments.out, {"alpha": ALPHA, "rates": plain, "bounds": limits, "power": power})
    wrong = problems(limits)
    print("\n".join([*wrong, f"{time.process_time() - started:.0f} s of one core"]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
