"""Transfer on a device: on tensors without values that claim to be on a GPU, and on a real one."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import overfit
from mirepro import checkpoint, determinism, encoders, profiles, stages, views
from mirepro.data import shards
from mirepro.data.images import Images
from mirepro.errors import UserError
from mirepro.params import EncoderParams, EvaluateParams, ViewParams
from mirepro.transfer import detection_model, detection_training, evaluate
from mirepro.transfer.author import Author
from mirepro.transfer.detection_training import Feed, Training, Variant
from tests.test_detection import SIZE, TINY, FakeSplit, _load, _run, pretrained, scenes_folder
from tests.test_pretrain import data, run, train

__all__ = ["data", "pretrained", "scenes_folder"]

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ENCODER = EncoderParams(width=8, stem="tiny", dim=8)


def test_a_detector_learns_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maps, kept or not, and the optimiser's state after a resume; control: maps that are made elsewhere."""
    monkeypatch.setattr(detection_training, "calibrate", lambda *_: None)  # counts its batches, a matter of values
    scenes = _load(FakeSplit(8, 0), "mask", SIZE)
    with FakeTensorMode(allow_non_fake_inputs=True):  # an operation on two devices is refused as a GPU would refuse it
        with torch.device("cuda"):
            detector = detection_model.build(encoders.Ensemble(ENCODER), "mask", TINY, 2, 0)
        for frozen in (False, True):
            maps = Feed(detector, scenes, 8, frozen).maps(torch.arange(2), torch.tensor([True, False]))
            assert {level.device.type for level in (*maps, *detector.backbone.fuse(maps).values())} == {"cuda"}
        with pytest.raises(RuntimeError, match="device"):
            detector.backbone.maps(scenes.pictures(torch.arange(2)))
        training = Training(detector, scenes, Variant(0.001), TINY, 0)
        saved = {f"detector.{name}": value.cpu() for name, value in detector.state_dict().items()}
        saved |= {"optimiser.0.step": torch.tensor(1.0), "optimiser.0.exp_avg": training._weights[0].detach().cpu()}
        training.resume(checkpoint.Checkpoint(saved, {"step": 1}))
        assert {value.device.type for value in training._optimiser.state[training._weights[0]].values()} == {"cuda"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_overfit_benchmark_trains_where_it_is_told(
    device: str, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for any other than the CPU; each of the two is the other's control."""
    where = []

    def trained(detector: detection_model.Detector, *_: object) -> SimpleNamespace:
        where.append(detector.device.type)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(overfit, "Training", trained)
    monkeypatch.setattr(overfit, "calibrate", lambda *_: None)
    monkeypatch.setattr(overfit.Trial, "_score", lambda self, detector, scenes: where.append(detector.device.type))
    scenes = _load(FakeSplit(2, 0), "mask", SIZE)
    params = dataclasses.replace(TINY, device=device)
    assert overfit.Trial(pretrained, "mask", params, 0.001, scenes, scenes).run()["anchor_recall"] >= 0.95
    assert where == [device] * 4


def test_the_overfit_benchmark_learns_from_all_images_of_two_splits() -> None:
    """In their order, objects beside their images; control: the few simple ones of one split."""
    parts = [_load(FakeSplit(count, seed), "mask", SIZE) for count, seed in ((3, 0), (2, 1))]
    joined = overfit.every(*parts)
    assert (len(joined), len(overfit.simple(parts[0], 2))) == (5, 2)
    index = torch.tensor([4, 0, 2])
    expected = [parts[1].images[torch.tensor([1])], parts[0].images[torch.tensor([0, 2])]]
    assert torch.equal(joined.images[index], torch.cat(expected))
    assert joined.objects == [*parts[0].objects, *parts[1].objects]
    assert not torch.equal(joined.images[index], joined.images[index.flip(0)])


def test_an_evaluation_computes_where_its_encoder_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and layers, also after a resume; what leaves is on the CPU. Control: features that are elsewhere."""
    monkeypatch.setattr(views, "batch", lambda pixels, *_, **__: pixels / 255)  # draws by numbers, a matter of values
    split, params = shards.open(data, "train"), EvaluateParams(device="cuda", views=ViewParams(size=16))
    images, classes, index = Images(split), torch.from_numpy(split.labels), torch.arange(16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = encoders.Ensemble(ENCODER).eval()
        found = evaluate.features(model, images, 16, evaluate.KINDS)
        assert {value.device.type for value in found.values()} == {"cpu"}
        training = Author(partial(evaluate._linear_features, model), images, classes, 4, 0, params)
        training._take(index)
        assert {value.device.type for value in training.tensors().values()} == {"cuda"}
        saved = {name: value.cpu() for name, value in training.tensors().items()}
        training.resume(checkpoint.Checkpoint(saved, {"step": 1}))
        training._take(index)
        assert {value.device.type for value in training.tensors().values()} == {"cuda"}
        layer = training.layers["pool"].classifier()
        assert {value.device.type for value in (layer.standardise.mean, layer.weight, layer.bias)} == {"cpu"}
        with pytest.raises(RuntimeError, match="device"):
            training.layers["pool"].step(found["pool"][:16], classes[:16])


def test_an_evaluation_takes_its_encoder_to_the_device(
    data: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still:
        def to(self, device: str) -> None:
            raise UserError(f"asked to go to {device}")

    monkeypatch.setattr(evaluate, "freeze", lambda model: Still())
    for name in ("cuda", "cpu"):
        with pytest.raises(UserError, match=f"asked to go to {name}"):
            _evaluated(EvaluateParams(device=name), pretrained, data, tmp_path / name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[NO_GPU, pytest.mark.gpu])])
def test_an_evaluation_repeats_its_bits(device: str, data: Path, tmp_path: Path) -> None:
    """Features and the author protocol's layers, by their digests; control: another seed draws other views."""
    torch.use_deterministic_algorithms(True)
    try:
        runs = zip("abc", (0, 0, 1), strict=True)
        first, again, other = (_bits(device, seed, data, tmp_path / name) for name, seed in runs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == again
    assert first["z"] == other["z"]
    assert first["flat.weight"] != other["flat.weight"]


def _bits(device: str, seed: int, data: Path, work: Path) -> dict[str, str]:
    split, params = shards.open(data, "train"), EvaluateParams(device=device, views=ViewParams(size=16))
    images, model = Images(split), encoders.Ensemble(ENCODER)
    encoders.initialise(model, 0)
    model.eval().to(device)
    take = partial(evaluate._linear_features, model)
    layers = Author(take, images, torch.from_numpy(split.labels), 4, seed, params).train(work, "f")
    found = evaluate.features(model, images, 16, (*evaluate.KINDS, "z"))
    found |= {f"{kind}.weight": layer.weight for kind, layer in layers.items()}
    return determinism.digests(found)


def _evaluated(params: EvaluateParams, pretrained: Path, data: Path, work: Path) -> tuple[dict[str, Any], bytes]:
    (work / "out").mkdir(parents=True)
    document = evaluate.evaluate("ir-s0", "ir", 0, params, pretrained, data, work, work / "out", "f")
    return document, (work / "out/test.json").read_bytes()


@NO_GPU
@pytest.mark.gpu
def test_a_detector_on_a_gpu_repeats_its_bits(pretrained: Path, scenes_folder: Path, tmp_path: Path) -> None:
    params = dataclasses.replace(TINY, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [_run("mask", pretrained, scenes_folder, tmp_path / name / "out", params) for name in "ab"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0] == runs[1]
    assert (tmp_path / "a/out/detections.json").read_bytes() == (tmp_path / "b/out/detections.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "tier", "said"), [("tpu", "exact", "'tpu'"), ("cuda", "portable", "impossible in tier portable")]
)
def test_impossible_devices_are_refused(name: str, tier: str, said: str) -> None:
    for here in (True, False):
        with pytest.raises(UserError, match=f"detect.device: .*{said}"):
            determinism.check_device("detect.device", name, tier, here)
        determinism.check_device("detect.device", "cpu", tier, here)


@pytest.mark.parametrize(("device", "tier", "said"), [("tpu", "exact", "'tpu'"), ("cuda", "portable", "tier portable")])
def test_no_training_begins_on_an_impossible_device(
    data: Path, tmp_path: Path, device: str, tier: str, said: str
) -> None:
    wrong = dataclasses.replace(run(device=device), tier=tier)
    with pytest.raises(UserError, match=f"pretrain.device: .*{said}"):
        train(wrong, data, tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_here_is_refused_where_it_computes() -> None:
    determinism.check_device("detect.device", "cuda", "exact", here=False)
    with pytest.raises(UserError, match=r"detect\.device: torch finds no CUDA device here"):
        determinism.check_device("detect.device", "cuda", "exact")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("kind", ["evaluate", "detect"])
def test_no_stage_computes_without_its_device(kind: str, root: Path, tmp_path: Path) -> None:
    name = {"evaluate": "ir-s0", "detect": "ir-s0-mask"}[kind]
    job = getattr(stages, kind)(profiles.load(root, "imagenet"), name)
    with pytest.raises(UserError, match=rf"{kind}\.device: torch finds no CUDA device here"):
        job.compute(tmp_path, tmp_path, "f")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_training_begins_without_its_device(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrain\.device: torch finds no CUDA device here"):
        train(dataclasses.replace(run(device="cuda"), tier="exact"), data, tmp_path)
