"""Test data enter no choice: neither L2, nor its grid, nor any classifier; those of val do (the control)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mirepro import encoders
from mirepro.bank import MemoryBank
from mirepro.data import shards
from mirepro.params import EncoderParams, EvaluateParams, LinearParams, ViewParams
from mirepro.transfer import author, controls, evaluate, linear
from tests.test_pretrain import samples

PARAMS = EvaluateParams(
    k_nn=(1, 5), anchors=2, gallery=2, views=ViewParams(size=16),
    linear=LinearParams(l2=(0.01, 1.0, 100.0, 1e4), iterations=20, author_epochs=1, author_batch=40),
)  # fmt: skip
SIZES = {"train": 80, "val": 40, "test": 40}
Change = Callable[[list[shards.Sample]], list[shards.Sample]]


def permuted(split: list[shards.Sample]) -> list[shards.Sample]:
    """Every image gets the label of another class."""
    return [dataclasses.replace(one, label=((one.label or 0) + 1) % 4) for one in split]


def corrupted(split: list[shards.Sample]) -> list[shards.Sample]:
    """Other images of the same labels."""
    others = samples(9, len(split))
    return [dataclasses.replace(one, image=other.image) for one, other in zip(split, others, strict=True)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    model = encoders.Ensemble(EncoderParams(width=4, stem="tiny", dim=8))
    encoders.initialise(model, 0)
    encoders.save(folder / "encoder.safetensors", model)
    save_file({"rgb": MemoryBank(80, 8, seed=0).rows}, folder / "bank.safetensors", {"split": "train"})
    return folder


def built(folder: Path, changed: str, change: Change) -> Path:
    """Data whose split `changed` is not what it was; none for ""."""
    splits = {name: list(samples(number, n)) for number, (name, n) in enumerate(SIZES.items(), 1)}
    splits |= {changed: change(splits[changed])} if changed else {}
    shards.write(folder, "tiny", splits, {"classes": ["a", "b", "c", "d"]})
    return folder


class Watch:
    """What was chosen: each regression's grid, its L2 and its classifier, and the layers of the author protocol."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[Any] = []
        self.layers: list[linear.Classifier] = []
        fit, train = linear.fit, author.Author.train

        def noted(*arguments: Any) -> Any:
            classifier, grid, l2 = fit(*arguments)
            self.chosen.append((grid, l2, self._bytes(classifier)))
            return classifier, grid, l2

        def trained(*arguments: Any) -> Any:
            layers = train(*arguments)
            self.layers += [self._bytes(layer) for layer in layers.values()]
            return layers

        monkeypatch.setattr(linear, "fit", noted)
        monkeypatch.setattr(author.Author, "train", trained)

    @staticmethod
    def _bytes(classifier: linear.Classifier) -> Any:
        parts = (classifier.weight, classifier.bias, classifier.standardise.mean, classifier.standardise.scale)
        return [part.numpy().tobytes() for part in parts]


def evaluated(folder: Path, pretrained: Path, data: Path, patch: pytest.MonkeyPatch) -> tuple[Watch, dict[str, Any]]:
    folder.mkdir()
    watch = Watch(patch)
    document = evaluate.evaluate("ir-s0", "ir", 0, PARAMS, pretrained, data, folder, folder, "f")
    return watch, document


@pytest.mark.parametrize("change", [permuted, corrupted])
def test_the_evaluation_chooses_without_the_test_split(
    change: Change, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for split in ("", "test", "val"):
        data = built(tmp_path / f"data{split}", split, change)
        with monkeypatch.context() as patch:
            found[split] = evaluated(tmp_path / f"out{split}", pretrained, data, patch)
    (plain, document), (watch, other), (control, third) = found.values()
    assert watch.chosen == plain.chosen
    assert len(plain.chosen) == len(plain.layers) == 2
    assert other["detail"] == document["detail"]
    assert watch.layers == plain.layers == control.layers, "the author protocol has no choice to make"
    assert other["cells"] != document["cells"], "test data are read"
    assert third["detail"]["grid"] != document["detail"]["grid"]
    assert third["detail"]["chosen"] != document["detail"]["chosen"]
    assert control.chosen != plain.chosen


@pytest.mark.parametrize("change", [permuted, corrupted])
def test_the_controls_choose_without_the_test_split(
    change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for split in ("", "test", "val"):
        data = built(tmp_path / f"data{split}", split, change)
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            found[split] = watch.chosen, controls.controls(PARAMS, data)
    (plain, document), (chosen, other), (control, _) = found.values()
    assert len(plain) == 3  # colour, pixels, HOG
    assert chosen == plain
    assert other != document, "test data are read"
    assert all(there[0] != here[0] for there, here in zip(control, plain, strict=True))
    assert [there[1] for there in control] != [here[1] for here in plain]


def test_a_choice_on_test_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The splits in other roles."""
    opened = shards.open
    monkeypatch.setattr(shards, "open", lambda folder, name: opened(folder, {"val": "test"}.get(name, name)))
    found = []
    for split in ("", "test"):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            controls.controls(PARAMS, built(tmp_path / f"data{split}", split, permuted))
            found.append(watch.chosen)
    assert found[0] != found[1]
