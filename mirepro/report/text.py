"""How numbers, columns and small tables are written, for Markdown and HTML alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from mirepro.metrics import BY_FORM
from mirepro.report.metrics import BUDGET, MODELS

ABSENT = "n/a"
NAMES = {
    "linear_flat": "linear, flattened",
    "linear_pool": "linear, pooled",
    "linear_author_flat": "author protocol, flattened",
    "linear_author_pool": "author protocol, pooled",
    "knn_1": "1-NN",
    "knn_5": "5-NN",
    "knn_20": "20-NN",
    "knn_200": "200-NN",
    "estimate": "estimate",
    "cap": "cap",
    "nce_at_equal_f": "NCE at equal f",
    "mi_views": "held-out MI of views",
    "certified_share": "certified bound",
    "t3_share": "T3 share",
    "fallback_share": "fallbacks",
    "own_copies": "own-row copies",
    "same_class_share": "same-class share",
    "images_seen": "images seen",
    "images_seen_long": "images seen, long",
    "parameters": "parameters",
    "trials": "tuning trials",
    "covariance_rank": "covariance rank",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "mi": "exact MI",
    "se": "standard error",
    "bias": "bias",
    "sd": "redraw sd",
    "certified": "certified",
}
COUNTS = BUDGET
DECIMALS = {"%": 1, "nats": 3}
GROUPS = {
    "T1": (("Accuracy", 8), ("Mutual information and budget", 9), ("Signs of collapse", 3)),
    "T6": (("Accuracy", 5), ("Mutual information and region", 8)),
}


def groups(table: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The table's columns in portions that fit a page, each with a heading (empty for a single one)."""
    columns, name = list(table["columns"]), table["table"]
    if name in MODELS:
        main = [column for column in columns if _statistic(column) in ("AP", "AP50", "AP75", "VOC07", "VOC10")]
        budget = [column for column in columns if column in BUDGET]
        rest = [column for column in columns if column not in (*main, *budget)]
        parts = (("Average precision", main), ("All other COCO numbers", rest), ("Budget", budget))
        return [part for part in parts if part[1]]
    result, start = [], 0
    for heading, count in GROUPS.get(name, (("", len(columns)),)):
        result.append((heading, columns[start : start + count]))
        start += count
    return result


def _statistic(column: str) -> str:
    return column.partition("_")[2].rpartition("_")[0]


def heading(column: str, table: Mapping[str, Any]) -> str:
    """A column's title with its unit."""
    name = NAMES.get(column, column)
    if column not in NAMES and column.count("_") >= 2:
        name = f"{_statistic(column)}, {column.rpartition('_')[2]}"
    units = [row["cells"][column]["unit"] for row in table["rows"] if row["cells"][column]["unit"]]
    unit = next(iter(units), "")
    return f"{name} ({unit})" if unit in DECIMALS else name


def number(value: float | None, unit: str = "", column: str = "") -> str:
    """A number as the tables show it; None is n/a."""
    if unit == BY_FORM:
        return BY_FORM
    if value is None:
        return ABSENT
    if unit == "yes/no":
        return "yes" if value else "no"
    if column in COUNTS or unit in ("images", "count"):
        return f"{value:,.0f}"
    return signed_zero(f"{value:.{DECIMALS.get(unit, 3)}f}")


def signed_zero(digits: str) -> str:
    """-0.0 reads as 0.0."""
    return digits.lstrip("-") if float(digits) == 0 else digits


def cell(content: Mapping[str, Any], column: str) -> str:
    """`mean ± std`, with the published value behind it where one was transcribed."""
    unit = content["unit"]
    if column == "certified_share" and content["mean"] == 1:
        return "yes"  # in every epoch of every run
    text = number(content["mean"], unit, column)
    if content["std"] is not None and column not in COUNTS:
        text += f" ± {number(content['std'], unit, column)}"
    if column == "certified_share" and content["mean"] is not None:
        text = f"no ({text})"
    if content["published"] is not None:
        text += f" (published {number(content['published'], unit, column)})"
    return text


def cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The texts of a row's cells."""
    return [cell(row["cells"][column], column) for column in columns]


def span(limits: Sequence[float] | None) -> str:
    """An interval."""
    return ABSENT if limits is None else f"{signed_zero(f'{limits[0]:.1f}')} to {signed_zero(f'{limits[1]:.1f}')}"


def merge(protocols: Sequence[str]) -> list[str]:
    """Protocols that differ in two words at most become one, e.g. `L2 0.01/0.1 chosen on val`."""
    groups: list[list[list[str]]] = []
    for words in (protocol.split() for protocol in dict.fromkeys(protocols) if protocol):
        fitting = next((group for group in groups if _alike(group[0], words)), None)
        if fitting is None:
            groups.append([words])
        else:
            fitting.append(words)
    return [" ".join(_joined(words) for words in zip(*group, strict=True)) for group in groups]


def _joined(words: Sequence[str]) -> str:
    """The words once each, with the stop at their end, if they all have it, once: `k 128/256;`."""
    stop = next((stop for stop in ";," if all(word.endswith(stop) for word in words)), "")
    return "/".join(dict.fromkeys(part for word in words for part in word.removesuffix(stop).split("/"))) + stop


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 2


def verdict(item: Mapping[str, Any]) -> list[str]:
    """The texts of a judged claim."""
    p = item["p_holm"]
    return [
        item["text"],
        NAMES.get(item["column"], item["column"]),
        str(item["n"]),
        ABSENT if item["difference"] is None else signed_zero(f"{item['difference']:+.1f}"),
        span(item["interval"]),
        span(item["bootstrap"]),
        ABSENT if p is None else ("< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"),
        item["verdict"],
    ]


def pipe_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows) + "\n"


def read_pipe_table(markdown: str) -> list[list[str]]:
    """The rows of the first Markdown table in a text, heading first, without the rule."""
    lines: list[str] = []
    for line in markdown.splitlines():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    rows = [[part.strip() for part in line.strip().strip("|").split("|")] for line in lines]
    return [row for row in rows if set("".join(row)) - set("-: ")]


def inline(markdown: str) -> str:
    """Code spans and emphasis of one Markdown cell as HTML; everything else is escaped."""
    import re

    from markupsafe import Markup, escape

    safe = str(escape(markdown))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
    return Markup(safe)
