"""What tables state beside their numbers, from a run's row and the detail of its metrics."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mirepro.report.metrics import Record

UNVERIFIED = ("cave", "cave_numerator", "cmc_ball", "cmc_ring", "moco_ring", "simclr")
"""Objectives whose definition nobody could check; docs/deviations.md has the reasons."""
TASKS = ("box", "mask", "keypoint")
MEANINGS = {
    "linear_author_flat": "the public code's recipe: SGD on augmented images, for the epochs that its protocol states; "
                          "the code has 100",
    "estimate": "what the row's own objective estimates of the mutual information, mean over the last epoch",
    "cap": "the largest value that so many draws let an estimate take",
    "nce_at_equal_f": "ir's estimate of the final encoder, with the row's own k and tau and negatives from the whole "
                      "bank: one measure for rows of equal k and tau",
    "mi_views": "lower bound of I(view; view'): two fresh views of each val image, all other images as negatives",
    "certified_share": "whether the last batch of every epoch has estimate + 3 standard errors <= log N - "
                       "cross-entropy over the whole bank, itself a bound; no: in which share of the epochs, and the "
                       "estimate, that of the last one, is no bound; by form: a bound that needs no certificate; n/a: "
                       "an objective only",
    "t3_share": "share of anchors whose lowest-scoring row of the region reaches the bank's log-mean-exp, which is "
                "enough for a bound and not necessary; of cave, which leaves rows of the region out, a lower bound",
    "fallback_share": "share of anchors whose region is empty; they draw from the ball without their own row",
    "own_copies": "how often the anchor's own row is drawn among its negatives",
    "same_class_share": "share of the negatives that have the anchor's class: false negatives",
    "covariance_rank": "exp of the entropy of the covariance's eigenvalues, of one view of val: 1 where embeddings lie "
                       "on a line; it does not see how far apart they are",
    "alignment": "mean squared distance of two views of an image of val (cmc and its kin: of L and ab), 0 to 4",
    "uniformity": "log of the mean of exp(-2 squared distance) of different images of val, of one view: 0 where they "
                  "are one point",
    "images_seen": "training images drawn; of a detector's schedule, without those of the encoder's pretraining",
    "images_seen_long": "the same on the long schedule",
    "parameters": "trainable parameters of the encoders; of the whole detector where one is trained",
    "trials": "learning rates tried on val, each a schedule of its own",
}  # fmt: skip
"""What the columns of trained rows are that are not accuracies or COCO's own."""


def definition(row: str) -> str:
    """Whether nobody could check what a row of params.yaml is; variants of an objective are named after it."""
    unknown = any(f"{row}_".startswith(f"{name}_") for name in UNVERIFIED) or row.endswith("_annealed")
    return "definition unverified" if unknown else ""


def protocol(item: Record, column: str) -> str:
    """A cell's protocol, and from which values it was chosen, and by which standard deviations OKS goes."""
    task, kind = column.split("_")[0], column.removeprefix("linear_")
    known = item.detail.get("grid") or {}
    parts = [item.cells[column]["protocol"]]
    if task == "linear" and kind in known:
        parts.append(grid("L2", known[kind], item.detail))
    if task in TASKS and known and not column.endswith("_fixed"):
        parts.append(grid("lr", known, item.detail))
    if task == "keypoint" and item.detail.get("oks_sigmas"):
        parts.append(sigmas(item.detail["oks_sigmas"]))
    return "; ".join(parts)


def grid(name: str, values: Iterable[str], detail: Mapping[str, Any]) -> str:
    """E.g. `lr grid 0.002, 0.004, 0.008 (3 trials)`."""
    tried = sorted(map(float, values))
    return f"{name} grid {', '.join(f'{value:g}' for value in tried)} ({detail.get('trials', len(tried))} trials)"


def sigmas(values: list[float]) -> str:
    """OKS's standard deviations, one for each keypoint; once where they are all equal."""
    distinct = values if len(set(values)) > 1 else values[:1]
    plural, each = ("s", "") if len(distinct) > 1 else ("", " for every keypoint")
    return f"OKS sigma{plural} {', '.join(f'{value:g}' for value in distinct)}{each}, times x in columns @x"


def usual(rows: Iterable[list[Record]]) -> str:
    """The sizes of features that most rows share; empty where none has any."""
    known = [sizes(items[0]) for items in rows if sizes(items[0])]
    return Counter(known).most_common(1)[0][0] if known else ""


def features(item: Record, others: str) -> str:
    """Says so where a row's features are not as many as the other rows'."""
    own = sizes(item)
    return f"features: {own} (other rows: {others})" if own not in ("", others) else ""


def sizes(item: Record) -> str:
    """E.g. `512 flat, 128 pool`: how many numbers the linear evaluation has for an image."""
    return ", ".join(f"{size} {kind}" for kind, size in (item.detail.get("features") or {}).items())
