"""docs/kernels.svg from the committed results of `benchmarks.bank`: `python -m benchmarks.chart`."""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mirepro import files

RESULTS = {
    "N = 1,281,167, AVX-512": "2026-11-25-zen5-n1281167-b128.json",
    "N = 1,281,167, AVX2 only": "2026-11-25-zen5-n1281167-b128-avx2.json",
    "N = 50,000, AVX-512": "2026-11-25-zen5-n50000-b128.json",
}
COLOURS = {"torch": "#0072b2", "faiss": "#d55e00"}


def bars(path: Path) -> list[tuple[str, float]]:
    """`work: rival` and how many times this package's processor time it takes, the last one first."""
    rows = files.read_json(path)["results"]
    rivals = {name: row["processor_ratio"] for name, row in rows.items() if ": mirepro" not in name}
    return list(rivals.items())[::-1]


def paint(figure: Figure) -> None:
    """One panel per file, one bar per rival."""
    found = {title: bars(Path("benchmarks/results") / name) for title, name in RESULTS.items()}
    heights = [len(rows) for rows in found.values()]
    panels = figure.subplots(len(found), sharex=True, gridspec_kw={"height_ratios": heights})
    for panel, (title, rows) in zip(panels, found.items(), strict=True):
        names, ratios = [name for name, _ in rows], [ratio for _, ratio in rows]
        drawn = panel.barh(names, ratios, color=[COLOURS["faiss" if "faiss" in name else "torch"] for name in names])
        panel.bar_label(drawn, [f"{ratio:.1f}" for ratio in ratios], padding=3)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(title, loc="left", fontsize=10)
    panels[-1].set_xlabel("processor time, times that of mirepro (one thread)")


def main() -> None:
    """Draws the figure; equal results give equal bytes."""
    with mpl.rc_context({"svg.hashsalt": "mirepro", "svg.fonttype": "path", "font.size": 8}), io.StringIO() as file:
        figure = Figure(figsize=(8, 7), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
        files.write_text("docs/kernels.svg", file.getvalue())


if __name__ == "__main__":
    main()
