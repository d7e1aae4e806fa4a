"""faster-coco-eval's numbers are pycocotools' own; LVIS's federated rules by hand-made cases."""

from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mirepro.transfer import coco_eval
from mirepro.transfer.coco_eval import Federated, Prediction

SIZE, KEYPOINTS, SIGMAS = 160, 5, [0.025, 0.05, 0.1, 0.07, 0.06]


def shape(draw: np.random.Generator) -> tuple[list[float], np.ndarray]:
    """A box and an ellipse's mask in it."""
    w, h = draw.uniform(6, 120, 2)
    x, y = draw.uniform(0, SIZE - w), draw.uniform(0, SIZE - h)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return [x, y, w, h], ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 < 0.25


def scene(draw: np.random.Generator) -> tuple[list[dict[str, Any]], Prediction]:
    """Objects of an image, some of them crowds or hidden, and what a middling detector makes of them."""
    objects, found = [], []
    for _ in range(draw.integers(0, 6)):
        box, mask = shape(draw)
        points = np.stack([draw.uniform(box[0], box[0] + box[2], KEYPOINTS),
                           draw.uniform(box[1], box[1] + box[3], KEYPOINTS),
                           draw.integers(0, 3, KEYPOINTS) * (draw.random() < 0.8)], 1)  # fmt: skip
        category = int(draw.integers(0, 4))
        objects.append({"bbox": box, "category": category, "area": float(mask.sum()),
                        "iscrowd": int(draw.random() < 0.15), "segmentation": coco_eval.encode(mask),
                        "keypoints": points.ravel().tolist()})  # fmt: skip
        if draw.random() < 0.8:
            shift = int(draw.integers(-4, 5))
            moved = np.roll(mask, shift, 1)
            near = points + draw.normal(0, 4, points.shape)
            label = category if draw.random() < 0.9 else (category + 1) % 4
            found.append(([box[0] + shift, *box[1:]], moved, label, near))
    for _ in range(draw.integers(0, 4)):
        box, mask = shape(draw)
        found.append((box, mask, int(draw.integers(0, 4)), draw.uniform(0, SIZE, (KEYPOINTS, 3))))
    scores = np.sort(draw.random(len(found)).round(2))[::-1]  # ties, too
    boxes, drawn, labels, points = zip(*found, strict=True) if found else ((), (), (), ())
    prediction = Prediction(np.array(boxes, float).reshape(-1, 4), scores, np.array(labels, np.int64),
                            [coco_eval.encode(m) for m in drawn],
                            np.array(points, float).reshape(-1, KEYPOINTS, 3))  # fmt: skip
    return objects, prediction


def reference(truth: Any, predictions: list[Prediction], task: str) -> list[float | None]:
    """pycocotools' statistics in percent."""
    own = COCO()
    own.dataset = truth.dataset
    own.createIndex()
    judge = COCOeval(own, own.loadRes(coco_eval.results(predictions, task)), coco_eval.KINDS[task])
    if task == "keypoint":
        judge.params.kpt_oks_sigmas = np.array(SIGMAS)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return [None if value < 0 else 100 * float(value) for value in judge.stats]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_numbers_are_those_of_pycocotools(task: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(seed)
    objects, predictions = map(list, zip(*(scene(draw) for _ in range(40)), strict=True))
    truth = coco_eval.ground_truth(objects, SIZE, 4)
    sigmas = SIGMAS if task == "keypoint" else None
    found = list(coco_eval.evaluate(truth, predictions, task, sigmas).values())
    expected = reference(coco_eval.ground_truth(objects, SIZE, 4), predictions, task)
    assert [value is None for value in found] == [value is None for value in expected]
    known = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    assert len(known) >= 8
    assert 5 < known[0][0] < 95
    assert np.allclose(*zip(*known, strict=True), rtol=0, atol=1e-10)
    other = list(coco_eval.evaluate(truth, [*predictions[1:], predictions[0]], task, sigmas).values())
    assert not np.allclose([v or 0 for v in other], [v or 0 for v in expected], atol=1e-3)  # control


BOXES = ([10, 10, 40, 40], [90, 90, 30, 30])


def thing(category: int, place: int = 0) -> dict[str, Any]:
    return {"bbox": BOXES[place], "category": category, "area": 1600.0, "iscrowd": 0, "segmentation": []}


def finds(*pairs: tuple[int, int], top: float = 0.9) -> Prediction:
    """Finds (category, place), the surest first."""
    boxes = np.array([BOXES[place] for _, place in pairs], float).reshape(-1, 4)
    return Prediction(boxes, np.linspace(top, 0.5, len(pairs)), np.array([c for c, _ in pairs], np.int64))


def federated(predictions: list[Prediction], absent: list[list[int]], partial: list[list[int]]) -> dict[str, Any]:
    """Image 0 shows category 0 (rare), image 1 category 1 (frequent)."""
    rules = Federated(["r", "f"], absent, partial)
    truth = coco_eval.ground_truth([[thing(0)], [thing(1)]], SIZE, 2, rules)
    return coco_eval.evaluate(truth, predictions, "box")


RIGHT = [finds((0, 0)), finds((1, 0))]
STRAY = [finds((0, 0), top=0.8), finds((0, 1), (1, 0))]  # category 0 found in image 1, where it is not


def test_finds_of_categories_nobody_looked_for_do_not_count() -> None:
    nothing: list[list[int]] = [[], []]
    assert federated(RIGHT, nothing, nothing)["AP"] == pytest.approx(100)
    assert federated(STRAY, nothing, nothing)["AP"] == pytest.approx(100)
    looked = federated(STRAY, [[], [0]], nothing)  # looked for in vain: now the stray find is false
    assert looked["APr"] < 60
    assert looked["APf"] == pytest.approx(100)
    assert looked["AP"] == pytest.approx((looked["APr"] + 100) / 2)
    plain = coco_eval.ground_truth([[thing(0)], [thing(1)]], SIZE, 2)  # control: COCO's rules count it everywhere
    assert coco_eval.evaluate(plain, STRAY, "box")["AP"] == pytest.approx(looked["AP"])


def test_unlabelled_finds_of_a_partly_labelled_category_do_not_count() -> None:
    twice = [finds((0, 1), (0, 0)), finds((1, 0))]  # two of category 0 in image 0, one of them labelled
    assert federated(twice, [[], []], [[], []])["APr"] < 60
    assert federated(twice, [[], []], [[0], []])["APr"] == pytest.approx(100)


def test_no_more_than_300_finds_of_an_image_count_and_absent_groups_are_none() -> None:
    last = [finds(*[(0, 1)] * 300, (0, 0)), finds((1, 0))]
    assert federated(last, [[], []], [[], []])["APr"] == pytest.approx(0)
    assert federated([finds(*[(0, 1)] * 299, (0, 0)), RIGHT[1]], [[], []], [[], []])["APr"] > 0
    assert federated(RIGHT, [[], []], [[], []])["APc"] is None
    assert tuple(federated(RIGHT, [[], []], [[], []])) == tuple(coco_eval.LVIS_STATS)
