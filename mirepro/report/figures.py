"""The report's figures as inline SVG: equal input gives equal bytes; text follows the page's colour."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mirepro.report import statistics

FONT = "mirepro"  # our name for the font file inside matplotlib: a system's own DejaVu may be another version
INK = "#010203"  # becomes currentColor, so that a dark page has light axes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#7570b3", "#e69f00")
DASHES = ("-", "--", ":", "-.")
PATTERNS = {"-": "", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}

Points = Sequence[tuple[float, float]]
Series = Mapping[str, Points]


def style(index: int) -> tuple[str, str]:
    """Colour and dash of the index-th row, the same in every figure."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def draw(name: str, size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """Runs `paint(figure)` and returns an inline SVG element whose ids start with the name."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": "mirepro", "svg.fonttype": "path", "font.family": FONT, "font.size": 10,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK,
        "grid.alpha": 0.15, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(), io.StringIO() as file:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        _register_font()
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return _inline(file.getvalue(), name)


def _register_font() -> None:
    from matplotlib import font_manager, get_data_path

    fonts = font_manager.fontManager.ttflist
    if all(entry.name != FONT for entry in fonts):
        fonts.append(font_manager.FontEntry(fname=f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", name=FONT))


def _inline(svg: str, name: str) -> str:
    """Keeps the drawing only, scales with its box, and keeps ids of several figures apart."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\n?", "", svg)
    head = re.search(r'viewBox="[^"]*"', svg)
    start = f'<svg class="figure" role="img" aria-labelledby="{name}-caption" {head.group(0) if head else ""}>'
    svg = start + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return svg.replace(INK, "currentColor").strip()


def curves(name: str, label: str, series: Series, order: Sequence[str], caps: Series | None = None) -> str:
    """Means over seeds along the epochs; a cap is a thin line in its row's colour."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for row, points in series.items():
            colour, dash = style(order.index(row))
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.6)
        for row, points in (caps or {}).items():
            axes.plot(*zip(*points, strict=True), color=style(order.index(row))[0], linewidth=0.8, alpha=0.55)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw(name, (5.2, 3.4), paint)


def pairs(name: str, label: str, panels: Sequence[Mapping[str, Sequence[Points]]], order: Sequence[str]) -> str:
    """A panel for each pair of rows: of each row the mean over seeds as a thick line, then every seed as a thin one."""

    def paint(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            for row, (mean, *seeds) in panel.items():
                colour, dash = style(order.index(row))
                for points in seeds:
                    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=0.7, alpha=0.4)
                axes.plot(*zip(*mean, strict=True), color=colour, linestyle=dash, linewidth=1.8, label=row)
            axes.legend(frameon=False, loc="best", fontsize=9, handlelength=1.2)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].set_ylabel(label)

    return draw(name, (5.2, 3.4), paint)


def dots(name: str, label: str, rows: Mapping[str, Sequence[float]]) -> str:
    """A line per row: every seed as a pale dot, the mean with its 95 % t interval (five and more seeds: filled)."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for place, values in enumerate(rows.values()):
            centre, limits = statistics.mean(values), statistics.interval(values)
            axes.plot(values, [place] * len(values), "o", color=COLOURS[1], alpha=0.35, markersize=4, zorder=2)
            if limits:
                axes.plot(limits, [place, place], "-", color=COLOURS[0], linewidth=1.6, zorder=3)
            face = COLOURS[0] if len(values) >= 5 else "none"
            axes.plot([centre], [place], "o", color=COLOURS[0], markerfacecolor=face, markersize=6, zorder=4)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.set_xlim(left=0)

    return draw(name, (5.6, 0.8 + 0.24 * len(rows)), paint)


def toy(name: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """Bias (with 3 standard errors) and redraw deviation of every estimator of one case."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, case in enumerate(cases):
            if case.get("bias") is not None:
                error = 3 * (case.get("se") or 0.0)
                left.errorbar([case["bias"]], [place], xerr=[error], fmt="o", color=COLOURS[0], markersize=5)
            if case.get("sd") is not None:
                right.barh([place], [case["sd"]], color=COLOURS[1], height=0.55)
        left.axvline(0, color=INK, linewidth=0.8)
        left.set_yticks(range(len(cases)), [case["name"] for case in cases])
        left.invert_yaxis()
        left.set_xlabel("bias (nats)")
        right.set_xlabel("redraw sd (nats)")

    return draw(name, (5.2, 0.8 + 0.27 * len(cases)), paint)


def swatch(index: int) -> str:
    """A short line in a row's style, for the legend."""
    colour, dash = style(index)
    pattern = f' stroke-dasharray="{PATTERNS[dash]}"' if PATTERNS[dash] else ""
    line = f'<line x1="0" y1="5" x2="28" y2="5" stroke="{colour}" stroke-width="2.5"{pattern}/>'
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'
