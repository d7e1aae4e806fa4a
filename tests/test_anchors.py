"""What the anchors meet of a split's boxes: in parts of bounded size, and how few of them a stage takes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from mirepro.errors import UserError
from mirepro.transfer import detection, detection_model
from tests.test_detection import SIZE, TINY, FakeSplit, _detector, _load, _run, pretrained, scenes_folder

__all__ = ["pretrained", "scenes_folder"]


@pytest.mark.parametrize("count", [1, detection_model.COMPARED, detection_model.COMPARED + 1, 70])
def test_boxes_meet_the_anchors_in_parts(count: int, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as all at once, also where images are bare; control: parts without a limit are one."""
    detector, held = _detector("mask", pretrained), []

    def counted(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        held.append(len(boxes))
        return box_iou(boxes, anchors)

    monkeypatch.setattr(detection_model, "box_iou", counted)
    corners = torch.rand(count, 2, 2, generator=torch.manual_seed(count)).mul(SIZE).sort(1).values.flatten(1)
    boxes = [torch.zeros(0, 4), *corners.split(5), torch.zeros(0, 4)]
    recall = detector.anchor_recall(boxes)
    assert sum(held) == count
    assert max(held) <= detection_model.COMPARED
    monkeypatch.setattr(detection_model, "COMPARED", count + 1)
    assert detector.anchor_recall(boxes) == recall
    assert held[-1] == count
    assert 0 < recall < 1 or count == 1


def test_a_low_floor_lets_small_boxes_through(pretrained: Path) -> None:
    """Every second box is a speck that no anchor meets; the control is the default's refusal."""
    split = FakeSplit(8, 0)
    for things in split.things:
        things.append(things[0] | {"bbox": [3, 3, 1, 1]})
        things[1:-1] = []
    scenes, detector = _load(split, "box", SIZE), _detector("box", pretrained)
    low = dataclasses.replace(TINY, min_recall=0.5)
    assert detection.anchor_recall(detector, scenes, low) == 0.5
    with pytest.raises(UserError, match=r"detect\.anchors: only 50\.0% .* detect\.min_recall = 95\.0%") as caught:
        detection.anchor_recall(detector, scenes, TINY)
    assert "\n" not in str(caught.value)


def test_a_stage_refuses_anchors_below_its_floor_before_it_trains(
    pretrained: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    """The control: with no floor the same anchors train, and the metrics say what they meet."""
    poor = dataclasses.replace(TINY, anchors=(3.0, 4.0))
    with pytest.raises(UserError, match=r"detect\.anchors: only 0\.0%"):
        _run("box", pretrained, scenes_folder, tmp_path / "a/out", poor)
    assert not (tmp_path / "a").exists()
    poor = dataclasses.replace(poor, min_recall=0.0)
    assert _run("box", pretrained, scenes_folder, tmp_path / "a/out", poor)["detail"]["anchor_recall"] == 0
