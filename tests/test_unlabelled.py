"""Pretraining on images without labels (STL-10's unlabelled split): what runs, what is left out, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mirepro import pretrain, settings
from mirepro.data import shards
from mirepro.errors import UserError
from mirepro.params import EvaluateParams
from mirepro.transfer import evaluate
from tests.test_pretrain import run, samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    free = [dataclasses.replace(one, label=None) for one in samples(3, 120)]
    splits = {"train": list(samples(1, 64)), "val": list(samples(2, 40)), "unlabelled": free}
    shards.write(folder, "tiny", splits, {"classes": ["a", "b", "c", "d"]})
    return folder


def trained(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    chosen = run(**changes)
    for name in ("work", "out"):
        (folder / name).mkdir(parents=True)
    return pretrain.pretrain(chosen, data, folder / "work", folder / "out", "0")


def test_a_bank_of_unlabelled_images_has_their_number_and_no_class_shares(data: Path, tmp_path: Path) -> None:
    free = trained(data, tmp_path / "free", split="unlabelled", monitor=0, epochs=2)
    seen = trained(data, tmp_path / "seen", monitor=0, epochs=2)
    seen_images, free_images = (document["cells"]["images_seen"]["value"] for document in (seen, free))
    assert free_images == 2 * (120 // run().pretrain.batch) * run().pretrain.batch > seen_images
    assert free["cells"]["same_class_share"]["value"] is None
    assert seen["cells"]["same_class_share"]["value"] > 0  # the control: with labels it is measured
    params = EvaluateParams(anchors=2, gallery=2)
    for name, split, size in (("free", "unlabelled", 120), ("seen", "train", 64)):
        found = evaluate.gallery(tmp_path / name / "out", params)
        assert found["split"] == split
        assert [item["index"] for item in found["anchors"]] == [0, size // 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "test"}, r"pretrain\.split: 'test' is impossible; use train or unlabelled"),
        ({"split": "unlabelled", "monitor": 1}, r"pretrain\.monitor: 1, and images without labels"),
        ({"split": "unlabelled", "monitor": 0, "objective": "supervised", "options": {"classes": 4}},
         r"pretrain\.split: unlabelled, and the objective learns from labels"),
    ],
)  # fmt: skip
def test_what_has_no_labels_cannot_be_asked_for_them(changes: dict[str, Any], words: str, data: Path) -> None:
    objective = {name: changes[name] for name in ("objective", "options") if name in changes}
    chosen = dataclasses.replace(run(**{k: v for k, v in changes.items() if k not in objective}), **objective)
    with pytest.raises(UserError, match=words):
        pretrain.opened(chosen, data)


def test_data_without_that_split_are_refused_and_the_usual_split_needs_none(tmp_path: Path) -> None:
    shards.write(tmp_path, "tiny", {"train": list(samples(1, 64)), "val": list(samples(2, 40))}, {"classes": ["a"]})
    with pytest.raises(UserError, match="no split 'unlabelled'; known: train, val"):
        pretrain.opened(run(split="unlabelled", monitor=0), tmp_path)
    train, val = pretrain.opened(run(), tmp_path)
    assert (train.size, val.size) == (64, 40)
    settings.check_split(run().pretrain, uses_labels=True)
