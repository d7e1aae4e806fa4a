"""Rates of `mirepro plan` from a finished reproduction: `python -m benchmarks.rates [--profile desk] [--root .]`.

Runs of seed 0 are fitted (non-negative least squares on the counted work), of detection those with masks of `ir` and
`random`; all other runs check the fit. The speeds of the bank's scan and of its clustering come from the benchmarks
with 1.28 M rows.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from mirepro import determinism, files, profiles
from mirepro.launch import budget
from mirepro.launch.work import Work

BANK = "benchmarks/results/2026-11-25-zen5-1281167.json"
CLUSTERING = "benchmarks/results/2026-11-25-zen5-clustering.json"
OWN = {"pretrain": ("encoder",), "evaluate": ("solve",), "detect": ("detector",)}
"""The parts that each kind of stages determines."""
LIBRARIES_GB = 0.68
"""Resident memory of a stage once its libraries are imported, measured."""

Times = dict[str, float]


def times(root: Path, profile: str) -> Times:
    """Seconds of the finished stages."""
    found = (root / ".mirepro" / "provenance" / profile).glob("*@*.json")
    return {path.stem: files.read_json(path)["seconds"] for path in found}


def scan() -> float:
    """Multiply-adds per second of the scan that draws from a ring, one thread."""
    content = files.read_json(BANK)
    setting, ring = content["setting"], content["results"]["ring 1-10 %, 4096 draws: mirepro"]
    return float(setting["batch"] * setting["rows"] * setting["dim"] / (ring["median_ms"] / 1000))


def assign() -> float:
    """Multiply-adds per second of a clustering's iteration, means included, one thread; the slower kind of rows."""
    content = files.read_json(CLUSTERING)
    setting, found = content["setting"], content["clustering"].values()
    return float(setting["rows"] * setting["clusters"] * setting["dim"] / max(kind["iteration_s"] for kind in found))


def fitted(name: str) -> bool:
    """Whether a stage is one of those that the rates are fitted to; detection has no other seeds than 0."""
    kind, _, run = name.partition("@")
    return run in ("ir-s0-mask", "random-s0-mask") if kind == "detect" else run.endswith("-s0")


def fit(works: dict[str, Work], measured: Times, kind: str, rates: dict[str, float | None]) -> tuple[float, dict]:
    """Seconds before the first image, and the rates of this kind's own parts; the others are taken as given."""
    names = [n for n in measured if n.startswith(f"{kind}@") and fitted(n) and n in works]
    given = [p for p in budget.PARTS if p not in OWN[kind] and rates.get(p)]
    rest = [measured[n] - sum(getattr(works[n], p) / rates[p] for p in given) for n in names]  # type: ignore[operator]
    first = 0.0 if kind == "detect" else 1.0  # one amount of work alone tells no start from a rate
    columns = [[first, *(getattr(works[n], p) for p in OWN[kind])] for n in names]
    weights = np.array(columns) / np.array(measured_row := [measured[n] for n in names])[:, None]
    scale = np.maximum(np.abs(weights).max(0), 1e-300)
    answer, _ = nnls(weights / scale, np.array(rest) / np.array(measured_row))
    values = answer / scale
    own = {p: (1 / v if v > 0 else None) for p, v in zip(OWN[kind], values[1:], strict=True)}
    return float(values[0]), own


def device(path: Path | None) -> dict:
    """The rates of a GPU: what was measured on it, None for the other parts."""
    found = {"model": "no device at hand so far", "rates": {}} if path is None else files.read_json(path)
    return dict.fromkeys(budget.PARTS) | found["rates"] | {"what": found["model"], "start": {}}


def main() -> None:
    """Fits, checks, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="desk")
    parser.add_argument("--root", type=Path, default=Path(), help="of the finished reproduction")
    where = f"one core of {determinism.cpu('model name')}, scan and assign of the AMD EPYC (zen 5) of their benchmarks"
    parser.add_argument("--what", default=where, help="the machine")
    parser.add_argument("--device", type=Path, help="result of benchmarks.device, for the GPU's rates")
    options = parser.parse_args()
    works = budget.works(profiles.load(Path().resolve(), options.profile))
    measured = times(options.root, options.profile)
    rates: dict = {"what": options.what, "scan": scan(), "start": {}}
    rates["assign"] = assign()
    for kind in OWN:
        rates["start"][kind], own = fit(works, measured, kind, rates)
        rates |= own
    errors = defaultdict(list)
    for name in sorted(measured.keys() & works.keys()):
        kind = name.partition("@")[0]
        if not fitted(name):
            predicted = budget.seconds(works[name], rates, kind)
            errors[kind].append(None if predicted is None else predicted / measured[name])
    gpu = device(options.device)
    check = {
        kind: {"runs": len(e), "median": statistics.median(e), "least": min(e), "most": max(e)}
        for kind, e in errors.items()
    }
    for kind, facts in check.items():
        print(kind, "predicted / measured, runs that were not fitted:", facts)
    content = {"machines": {"CPU": rates, "GPU": gpu}, "check": check, "libraries_gb": LIBRARIES_GB}
    files.write_json(budget.RATES, content)


if __name__ == "__main__":
    main()
