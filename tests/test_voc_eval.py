"""PASCAL VOC's own average precision against a slow transcription of its definition, and by hand-made cases."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirepro.transfer import voc_eval
from mirepro.transfer.coco_eval import Prediction

PLACES = ([0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10], [60, 0, 10, 10])
Objects = list[list[dict[str, Any]]]


def thing(box: list[float], category: int = 0, difficult: int = 0) -> dict[str, Any]:
    return {"bbox": box, "category": category, "iscrowd": difficult}


def finds(*found: tuple[list[float], float] | tuple[list[float], float, int]) -> Prediction:
    """Finds (box, score, category = 0)."""
    boxes = np.array([one[0] for one in found], float).reshape(-1, 4)
    labels = np.array([one[2] if len(one) > 2 else 0 for one in found], np.int64)
    return Prediction(boxes, np.array([one[1] for one in found], float), labels)


def corners(box: list[float]) -> tuple[float, float, float, float]:
    """The devkit's xmin, ymin, xmax, ymax: pixels from 1, the last one included."""
    x, y, w, h = (float(v) for v in box)
    return x + 1, y + 1, x + w, y + h


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes as the devkit writes it, with a 1 at every width."""
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)
    iw, ih = min(ax2, bx2) - max(ax1, bx1) + 1, min(ay2, by2) - max(ay1, by1) + 1
    if iw <= 0 or ih <= 0:
        return 0.0
    whole = (ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1) - iw * ih
    return iw * ih / whole


def curve(objects: Objects, predictions: list[Prediction], category: int) -> tuple[list[float], list[float], int]:
    """Recall and precision after every find of a class, and the number of objects to be found."""
    truth = [[t for t in things if t["category"] == category] for things in objects]
    count = sum(not t["iscrowd"] for things in truth for t in things)
    found = [(-float(p.scores[i]), image, i) for image, p in enumerate(predictions)
             for i in range(len(p.scores)) if p.labels[i] == category]  # fmt: skip
    taken: set[tuple[int, int]] = set()
    hits, wrong = 0, 0
    recall, precision = [], []
    for _, image, i in sorted(found):
        best, which = -np.inf, -1
        for j, one in enumerate(truth[image]):
            iou = overlap(list(predictions[image].boxes[i]), one["bbox"])
            if iou > best:
                best, which = iou, j
        if best >= 0.5 and truth[image][which]["iscrowd"]:
            continue
        if best >= 0.5 and (image, which) not in taken:
            taken.add((image, which))
            hits += 1
        else:
            wrong += 1
        recall.append(hits / count if count else np.nan)
        precision.append(hits / (hits + wrong))
    return recall, precision, count


def reference(objects: Objects, predictions: list[Prediction], categories: int) -> dict[str, float | None]:
    """Both numbers by their definition, in plain float64."""
    eleven, areas = [], []
    for category in range(categories):
        recall, precision, count = curve(objects, predictions, category)
        if not count:
            continue
        pairs = list(zip(recall, precision, strict=True))
        eleven.append(sum(max([p for r, p in pairs if r >= tenth / 10], default=0.0) / 11 for tenth in range(11)))
        known, total = [0.0, *recall, 1.0], 0.0
        for i in range(1, len(known)):
            total += (known[i] - known[i - 1]) * max([*precision[i - 1 :], 0.0])
        areas.append(total)
    if not eleven:
        return {"VOC07": None, "VOC10": None}
    return {"VOC07": 100 * float(np.mean(eleven)), "VOC10": 100 * float(np.mean(areas))}


def compare(objects: Objects, predictions: list[Prediction], categories: int) -> dict[str, float | None]:
    found = voc_eval.evaluate(objects, predictions, categories)
    expected = reference(objects, predictions, categories)
    assert list(found) == list(expected) == list(voc_eval.PROTOCOLS)
    for name, value in found.items():
        assert value == (None if expected[name] is None else pytest.approx(expected[name], abs=1e-9))
        assert value is None or 0 <= value <= 100 + 1e-9
    return found


side = st.integers(1, 8)
box = st.tuples(st.integers(0, 8), st.integers(0, 8), side, side).map(list)
objects_of = st.lists(st.builds(thing, box, st.integers(0, 2), st.integers(0, 1)), max_size=4)
found_in = st.lists(st.tuples(box, st.sampled_from([0.1, 0.5, 0.5, 0.9]), st.integers(0, 2)), max_size=6)
image = st.tuples(objects_of, found_in.map(lambda found: finds(*found)))


@settings(max_examples=150, deadline=None)
@given(st.lists(image, min_size=1, max_size=5))
def test_numbers_are_those_of_the_definition(images: list[tuple[list[dict[str, Any]], Prediction]]) -> None:
    """Few boxes and scores, so that ties, duplicates, empty classes and classes of difficult objects are frequent."""
    objects, predictions = map(list, zip(*images, strict=True))
    compare(objects, predictions, 3)


def middling(draw: np.random.Generator, size: float = 1.0) -> tuple[Objects, list[Prediction]]:
    """60 images with what a middling detector makes of them, in pixels of `size`."""
    objects, predictions = [], []
    for _ in range(60):
        boxes = np.concatenate([draw.uniform(0, 60, (5, 2)), draw.uniform(10, 40, (5, 2))], 1)
        labels, near = draw.integers(0, 4, 5), boxes + draw.normal(0, 3, (5, 4))
        difficult = draw.random(5) < 0.3
        objects.append([thing(list(b * size), int(c), int(d))
                        for b, c, d in zip(boxes, labels, difficult, strict=True)])  # fmt: skip
        stray = np.concatenate([draw.uniform(0, 60, (4, 2)), draw.uniform(10, 40, (4, 2))], 1)
        scores = np.concatenate([draw.uniform(0.3, 1, 5), draw.uniform(0, 0.8, 4)]).round(2)
        predictions.append(Prediction(np.concatenate([near, stray]) * size, scores,
                                      np.concatenate([labels, draw.integers(0, 4, 4)])))  # fmt: skip
    return objects, predictions


@pytest.mark.parametrize("seed", [0, 1])
def test_a_middling_detector_and_the_control_that_difficult_objects_are_misses(seed: int) -> None:
    objects, predictions = middling(np.random.default_rng(seed))
    found = compare(objects, predictions, 4)
    assert all(10 < value < 90 for value in found.values() if value is not None)
    counted = [[{**one, "iscrowd": 0} for one in things] for things in objects]
    harder = compare(counted, predictions, 4)
    dropped = [[one for one in things if not one["iscrowd"]] for things in objects]
    penalised = compare(dropped, predictions, 4)
    for name, value in found.items():
        assert value is not None
        assert abs(value - (harder[name] or 0)) > 0.1, "control: difficult objects counted as objects"
        assert value > (penalised[name] or 0) + 1, "control: finds of difficult objects counted as false"


def test_resizing_changes_nothing_and_the_devkits_width_at_every_size_would() -> None:
    """Boxes have edges here, so the IoU is that of the original pixels; the control adds 1 after resizing."""
    small, large = (middling(np.random.default_rng(3), size) for size in (0.125, 1.0))
    assert voc_eval.evaluate(*small, 4) == pytest.approx(voc_eval.evaluate(*large, 4))
    wide = [[{**one, "bbox": [*one["bbox"][:2], *(s + 1 for s in one["bbox"][2:])]} for one in t] for t in small[0]]
    wider = [Prediction(p.boxes + np.array([0, 0, 1, 1]), p.scores, p.labels) for p in small[1]]
    assert voc_eval.evaluate(wide, wider, 4) != pytest.approx(voc_eval.evaluate(*large, 4), abs=0.1)


def test_one_object_is_found_once_and_the_nearest_object_is_the_one() -> None:
    once = [thing(PLACES[0]), thing(PLACES[1])]
    twice = finds((PLACES[0], 0.9), (PLACES[0], 0.8), (PLACES[1], 0.7))
    found = compare([once], [twice], 1)
    assert found["VOC10"] == pytest.approx(100 * (1 / 2 + 2 / 3 / 2))
    assert found["VOC07"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    overlapping = [thing([0, 0, 10, 10]), thing([2, 0, 10, 10])]  # both finds are nearest to the first: no second hit
    both = compare([overlapping], [finds(([0, 0, 10, 10], 0.9), ([0.5, 0, 10, 10], 0.8))], 1)
    assert both["VOC10"] == pytest.approx(50)


def test_finds_of_difficult_objects_do_not_count_however_many() -> None:
    objects = [[thing(PLACES[0], difficult=1), thing(PLACES[1])]]
    found = compare(objects, [finds((PLACES[0], 0.9), (PLACES[0], 0.8), (PLACES[1], 0.7))], 1)
    assert found == {"VOC07": pytest.approx(100), "VOC10": pytest.approx(100)}
    stray = compare(objects, [finds((PLACES[2], 0.9), (PLACES[1], 0.7))], 1)  # control
    assert stray["VOC10"] == pytest.approx(50)


def test_classes_without_objects_stay_out_of_the_mean() -> None:
    right, none = finds((PLACES[0], 0.9), (PLACES[1], 0.9, 1)), finds()
    assert compare([[thing(PLACES[0])]], [right], 3)["VOC07"] == pytest.approx(100)
    assert compare([[thing(PLACES[0]), thing(PLACES[1], 1, 1)]], [right], 3)["VOC10"] == pytest.approx(100)
    assert compare([[thing(PLACES[0]), thing(PLACES[2], 2)]], [right], 3)["VOC10"] == pytest.approx(50)  # control
    assert compare([[thing(PLACES[1], 1, 1)]], [right], 3) == {"VOC07": None, "VOC10": None}
    assert compare([[]], [none], 3) == {"VOC07": None, "VOC10": None}
    assert compare([[thing(PLACES[0])]], [none], 3) == {"VOC07": 0, "VOC10": 0}


def test_equal_scores_count_in_the_order_of_images_and_finds() -> None:
    objects = [[thing(PLACES[0])], [thing(PLACES[0])]]
    right, wrong = finds((PLACES[0], 0.5)), finds((PLACES[2], 0.5))
    first, last = compare(objects, [right, wrong], 1), compare(objects, [wrong, right], 1)
    assert (first["VOC10"], last["VOC10"]) == (pytest.approx(50), pytest.approx(25))
    inner = finds((PLACES[2], 0.5), (PLACES[0], 0.5))
    assert compare(objects, [inner, finds()], 1)["VOC10"] == pytest.approx(25)


def test_an_overlap_of_exactly_one_half_is_enough() -> None:
    objects = [[thing([0, 0, 10, 10])]]
    assert compare(objects, [finds(([0, 0, 10, 20], 0.9))], 1)["VOC07"] == pytest.approx(100)
    assert compare(objects, [finds(([0, 0, 10, 20.1], 0.9))], 1)["VOC07"] == 0


def test_three_of_ten_reach_the_recall_three_tenths() -> None:
    """0:.1:1 in floats holds .30000000000000004, which 3 / 10 would miss; every recall of tenths counts here."""
    for hits in range(11):
        objects = [[thing(PLACES[0])] for _ in range(10)]
        predictions = [finds((PLACES[0], 0.9)) if i < hits else finds() for i in range(10)]
        expected = 100 * (hits + 1) / 11 if hits else 0
        assert compare(objects, predictions, 1)["VOC07"] == pytest.approx(expected)
