"""Detection: evaluator against hand-made cases, targets, determinism, resume, and learning."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from mirepro import checkpoint, data, encoders
from mirepro.data import shards
from mirepro.errors import UserError
from mirepro.notice import NOTICE
from mirepro.params import DetectParams, EncoderParams, HeadParams
from mirepro.transfer import coco_eval, detection, detection_data, detection_model, sampling, voc_eval
from mirepro.transfer.coco_eval import Prediction
from mirepro.transfer.detection_training import Training, Variant, calibrate

SIZE = 32
TINY = DetectParams(
    size=SIZE, batch=8, epochs=1, keypoint_epochs=1, fpn=8, box_hidden=16, mask=HeadParams(6, 8, 1),
    keypoint=HeadParams(6, 8, 1), lrs=(0.001, 0.003), fixed_lr=0.001, anchors=(0.2, 0.3, 0.45), scales=(1.0, 1.41),
    min_stride=2, proposals=10, proposals_before=30, roi_samples=16, detections=5,
)  # fmt: skip


class FakeSplit:
    """Bright squares (category 0) and wide bars (category 1) on a dark ground, one or two an image, five keypoints.

    The first `bare` images are empty.
    """

    name, folder = "val", Path("data/fake")
    categories = ["square", "bar"]  # noqa: RUF012
    meta: dict[str, Any] = {}  # noqa: RUF012
    keypoints = {"names": list("abcde"), "flips": [1, 0, 3, 2, 4], "sigmas": [0.05] * 5}  # noqa: RUF012

    def __init__(self, n: int, seed: int, bare: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.pixels = draw.integers(0, 40, (n, 3, SIZE, SIZE)).astype(np.uint8)
        self.things: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        for i in range(bare, n):
            for half in range(draw.integers(1, 3)):
                self._add(i, int(draw.integers(0, 2)), int(draw.integers(1, 14)), int(draw.integers(1, 6)) + 16 * half)

    def _add(self, i: int, category: int, x: int, y: int) -> None:
        w, h = (9, 9) if category == 0 else (16, 6)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[y : y + h, x : x + w] = True
        self.pixels[i][:, mask] = np.array([[220], [60 + 150 * category], [40]], np.uint8)
        corners = [(x, y), (x + w, y), (x, y + h), (x + w, y + h), (x + w / 2, y + h / 2)]
        self.things[i].append(
            {"bbox": [x, y, w, h], "category": category, "area": float(w * h), "iscrowd": 0,
             "segmentation": coco_eval.encode(mask), "keypoints": [float(v) for c in corners for v in (*c, 2)]}
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int, size: int | None = None) -> np.ndarray:
        return self.pixels[index]

    def images(self, size: int | None = None) -> np.ndarray:
        return self.pixels

    def objects_at(self, size: int) -> list[list[dict[str, Any]]]:
        return self.things


def _load(split: FakeSplit, model: str, size: int, used: list[int] | None = None) -> detection_data.Scenes:
    return detection_data.load(cast(shards.Split, split), model, size)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    ensemble = encoders.Ensemble(EncoderParams(width=8, stem="tiny", dim=8))
    encoders.initialise(ensemble, 0)
    encoders.save(tmp_path / "run" / "encoder.safetensors", ensemble)
    return tmp_path / "run"


@pytest.fixture
def scenes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    opened: list[str] = []

    def opener(path: Path, split: str) -> FakeSplit:
        opened.append(split)
        return FakeSplit({"train": 16, "val": 8, "test": 8}[split], len(split))

    monkeypatch.setattr(detection, "shards", SimpleNamespace(open=opener, opened=opened))
    return folder


def _perfect(scenes: detection_data.Scenes, shift: float = 0.0) -> list[Prediction]:
    """Ground truth as prediction; keypoints moved right by `shift` x sqrt(area)."""
    found = []
    for things in scenes.objects:
        points = np.array([t.get("keypoints") for t in things], float).reshape(len(things), -1, 3)
        points[..., 0] += shift * np.sqrt([t["area"] for t in things])[:, None]
        found.append(
            Prediction(
                np.array([t["bbox"] for t in things], float),
                np.linspace(0.9, 0.8, len(things)),
                np.array([t["category"] for t in things]),
                [t["segmentation"] for t in things],
                points,
            )
        )
    return found


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_ground_truth_as_prediction_is_perfect(task: str) -> None:
    scenes = _load(FakeSplit(12, 0), "keypoint", SIZE)
    stats = coco_eval.evaluate(scenes.truth(), _perfect(scenes), task, scenes.sigmas)
    assert tuple(stats) == (coco_eval.KEYPOINT_STATS if task == "keypoint" else coco_eval.BOX_STATS)
    assert stats["AP"] == stats["AP50"] == stats["AP75"] == pytest.approx(100)
    assert stats["APl"] is None, "no large object exists"


def test_wrong_labels_and_empty_predictions_score_zero() -> None:
    scenes = _load(FakeSplit(12, 0), "mask", SIZE)
    wrong = [dataclasses.replace(p, labels=1 - p.labels) for p in _perfect(scenes)]
    none = Prediction(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), [])
    for predictions in (wrong, [none] * 12):
        stats = coco_eval.evaluate(scenes.truth(), predictions, "box")
        assert stats["AP"] is not None
        assert stats["AP"] < 10


@pytest.mark.parametrize("sigma", [0.025, 0.05, 0.1])
def test_oks_of_a_shift_by_two_sigma(sigma: float) -> None:
    """OKS = exp(-1/2) = .607: true at the thresholds .5, .55 and .6 and false at the seven above."""
    scenes = _load(FakeSplit(12, 0), "keypoint", SIZE)
    truth = scenes.truth()
    stats = coco_eval.evaluate(truth, _perfect(scenes, 2 * sigma), "keypoint", [sigma] * 5)
    assert stats["AP"] == pytest.approx(30)
    judge = coco_eval.COCOeval_faster(
        truth,
        truth.loadRes(coco_eval.results(_perfect(scenes, 2 * sigma), "keypoint")),
        "keypoints",
        kpt_oks_sigmas=[sigma] * 5,
    )
    judge.evaluate()
    best = [float(np.max(v)) for v in judge.ious.values() if len(v)]
    assert np.allclose(best, math.exp(-0.5), atol=1e-9)
    far = coco_eval.evaluate(truth, _perfect(scenes, 4 * sigma), "keypoint", [sigma] * 5)
    assert far["AP50"] == pytest.approx(0, abs=1e-9), "a shift by 4 sigma has OKS exp(-2)"


def test_sigmas_are_never_assumed() -> None:
    scenes = _load(FakeSplit(2, 0), "keypoint", SIZE)
    with pytest.raises(ValueError, match="sigmas"):
        coco_eval.evaluate(scenes.truth(), _perfect(scenes), "keypoint")


def test_mirror_images_swap_left_and_right() -> None:
    scenes = _load(FakeSplit(3, 1), "keypoint", SIZE)
    target, mirror = (scenes.target(0, mirrored) for mirrored in (False, True))
    assert torch.equal(mirror["boxes"][:, 0], SIZE - target["boxes"][:, 2])
    left, right = mirror["keypoints"][:, 0, 0], mirror["keypoints"][:, 1, 0]
    assert (left < right).all(), "keypoint 0 is the upper left corner in the mirror too"
    masks = [_load(FakeSplit(3, 1), "mask", SIZE).target(0, mirrored)["masks"] for mirrored in (False, True)]
    assert torch.equal(masks[0].flip(-1), masks[1])


@pytest.mark.parametrize("model", ["mask", "keypoint"])
def test_images_without_objects_have_empty_targets(model: str) -> None:
    scenes = _load(FakeSplit(4, 2, bare=2), model, SIZE)
    for side in ([scenes.target(i, mirrored) for i in range(4)] for mirrored in (False, True)):
        shape = (0, SIZE, SIZE) if model == "mask" else (0, 5, 3)
        assert [len(target["boxes"]) for target in side[:2]] == [0, 0]
        assert all(target["boxes"].shape == (0, 4) and target[f"{model}s"].shape == shape for target in side[:2])
        assert all(len(target["boxes"]) > 0 for target in side[2:])
    for used in (None, [0, 1]):  # of the training split, and of val and test, which learn the categories from it
        with pytest.raises(UserError, match=f"data/fake: the val split has no objects with {model}s"):
            _load(FakeSplit(2, 2, bare=2), model, SIZE, used)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_the_share_of_mirrored_images(flip: float) -> None:
    flags = torch.cat([mirrored for _, _, mirrored in sampling.batches(np.ones(64), 8, 4, flip, 0)]).float()
    assert flags.mean().item() == pytest.approx(flip, abs=0.1)


def _detector(model: str, pretrained: Path, seed: int = 0, params: DetectParams = TINY) -> detection_model.Detector:
    ensemble = encoders.load(pretrained / "encoder.safetensors")
    detector = detection_model.build(ensemble, model, params, 2, 5)
    detection_model.initialise(detector, seed)
    return detector


def _train(model: str, pretrained: Path, seed: int, params: DetectParams = TINY, frozen: bool = False) -> Any:
    scenes = _load(FakeSplit(16, 0), model, SIZE)
    detector = _detector(model, pretrained, params=params)
    Training(detector, scenes, Variant(0.003, frozen=frozen), params, seed).run()
    return detector.state_dict()


@pytest.mark.parametrize("model", ["mask", "keypoint"])
def test_training_is_deterministic(model: str, pretrained: Path) -> None:
    first, again, other = (_train(model, pretrained, seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_frozen_trunk_keeps_its_weights_and_a_tuned_one_trains_batchnorm(pretrained: Path) -> None:
    before = _detector("mask", pretrained).state_dict()
    frozen, tuned = (_train("mask", pretrained, 0, frozen=frozen) for frozen in (True, False))
    learned = [n for n in before if "trunk" in n and n.endswith("weight") and ".head." not in n]
    norms = [n for n in learned if torch.equal(before[n], torch.ones_like(before[n]))]
    assert norms
    assert all(torch.equal(before[n], frozen[n]) for n in learned)
    assert not any(torch.equal(before[n], tuned[n]) for n in norms)


def test_small_batches_take_groupnorm_in_new_layers(pretrained: Path) -> None:
    small = _detector("mask", pretrained, params=dataclasses.replace(TINY, batch=4))
    new = [m for name, m in small.named_modules() if "trunk" not in name]
    assert any(isinstance(m, torch.nn.GroupNorm) for m in new)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in new)


def test_stages_above_the_used_maps_are_not_computed(pretrained: Path) -> None:
    rgb = torch.rand(2, 3, SIZE, SIZE)
    pyramid = encoders.load(pretrained / "encoder.safetensors").eval().pyramid(rgb)
    for stages in (2, 3, 4):
        anchors = (0.1, 0.2, 0.3, 0.42)[-stages:]
        backbone = _detector("mask", pretrained, params=dataclasses.replace(TINY, anchors=anchors)).backbone.eval()
        kept = {name.split(".")[3] for name, _ in backbone.trunk.named_parameters() if ".layer" in name}
        assert kept == {f"layer{i + 1}" for i in range(stages)}
        wanted = [pyramid[level] for level in backbone.levels]
        assert all(map(torch.equal, backbone.maps(rgb), wanted))


@pytest.mark.parametrize("width", [8, 12])
def test_the_mask_predictor_computes_what_torchvisions_does(width: int) -> None:
    plain = MaskRCNNPredictor(width, width, 3).double()
    own = detection_model.MaskPredictor(width, width, 3).double()
    own.load_state_dict(plain.state_dict())
    results = []
    for predictor in (plain, own):
        x = torch.rand(5, width, 7, 7, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
        logits = predictor(x)
        assert logits.shape == (5, 3, 14, 14)
        logits.square().sum().backward()
        results.append([logits, x.grad, *(weight.grad for weight in predictor.parameters())])
    for value, oracle in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-12)
    bent = own(torch.rand(5, width, 7, 7, dtype=torch.float64))
    assert not torch.allclose(bent, results[0][0])  # control: other inputs, other logits


def test_ensembles_of_two_modalities_train(tmp_path: Path) -> None:
    ensemble = encoders.Ensemble(EncoderParams(width=8, stem="tiny", dim=8), ("L", "ab"))
    encoders.initialise(ensemble, 0)
    encoders.save(tmp_path / "encoder.safetensors", ensemble)
    assert all(torch.isfinite(value).all() for value in _train("mask", tmp_path, 0).values())


def test_anchor_recall_and_impossible_parameters(pretrained: Path) -> None:
    boxes = _load(FakeSplit(16, 0), "mask", SIZE).boxes()
    assert _detector("mask", pretrained).anchor_recall(boxes) >= 0.95
    wrong = dataclasses.replace(TINY, anchors=(3.0, 4.0))
    assert _detector("mask", pretrained, params=wrong).anchor_recall(boxes) < 0.95
    with pytest.raises(UserError, match=r"detect\.anchors"):
        _detector("mask", pretrained, params=dataclasses.replace(TINY, anchors=(0.1,) * 7))
    for change in (
        {"min_recall": -0.1},
        {"min_recall": 1.5},
        {"fixed_lr": 0.5},
        {"batch": 0},
        {"warmup": 1.0},
        {"repeat_threshold": -0.1},
        {"repeat_threshold": 1.5},
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            detection.check("mask", dataclasses.replace(TINY, **change))
    with pytest.raises(UserError, match="panoptic"):
        detection.check("panoptic", TINY)


def _run(
    model: str, pretrained: Path, folder: Path, out: Path, params: DetectParams = TINY, mark: str = "0123456789ab"
) -> dict[str, Any]:
    return detection.detect("ir-s0", "ir", 0, model, params, pretrained, folder, out.parent / "work", out, mark)


@pytest.mark.parametrize("model", ["mask", "keypoint"])
def test_stage_writes_all_cells_and_reads_test_last(
    model: str, pretrained: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    metrics = _run(model, pretrained, scenes_folder, tmp_path / "out")
    assert detection.shards.opened == ["train", "val", "test"]  # type: ignore[attr-defined]
    stats = {"box": coco_eval.BOX_STATS, "mask": coco_eval.BOX_STATS, "keypoint": coco_eval.KEYPOINT_STATS}
    for task, names in ((task, stats[task]) for task in ("box", model)):
        for variant in ("tuned", "fixed", "long", "frozen"):
            assert {f"{task}_{name}_{variant}" for name in names} <= set(metrics["cells"])
    assert ("keypoint_AP50@x0.5_tuned" in metrics["cells"]) == (model == "keypoint")
    assert metrics["detail"]["anchor_recall"] >= 0.95
    shown = detection.files.read_json(tmp_path / "out" / "detections.json")
    assert (shown["size"], len(shown["images"])) == (SIZE, 8)


def test_an_early_look_at_test_is_seen(
    pretrained: Path, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the order above: rates that are chosen on test."""
    opener = detection.shards.open
    monkeypatch.setattr(detection.shards, "open", lambda path, split: opener(path, {"val": "test"}.get(split, split)))
    _run("mask", pretrained, scenes_folder, tmp_path / "out")
    assert detection.shards.opened == ["train", "test", "test"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["mask", "keypoint"])
def test_stage_takes_images_without_objects_in_every_split(
    model: str, pretrained: Path, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of 16 training images are bare, so that the first batches hold few objects or none."""
    sizes = {"train": (16, 10), "val": (8, 3), "test": (8, 3)}
    monkeypatch.setattr(
        detection, "shards", SimpleNamespace(open=lambda path, split: FakeSplit(sizes[split][0], 1, sizes[split][1]))
    )
    cells = _run(model, pretrained, scenes_folder, tmp_path / "out")["cells"]
    assert all(
        cells[f"{task}_AP50_{variant}"]["value"] >= 0 for task in ("box", model) for variant in ("tuned", "long")
    )


def test_keypoints_have_a_schedule_of_their_own(pretrained: Path, scenes_folder: Path, tmp_path: Path) -> None:
    params = dataclasses.replace(TINY, keypoint_epochs=2)
    seen = {
        model: _run(model, pretrained, scenes_folder, tmp_path / model / "out", params)["detail"]["images_seen"]
        for model in ("mask", "keypoint")
    }
    assert seen["mask"] == {"tuned": 16, "fixed": 16, "long": 32, "frozen": 16}
    assert seen["keypoint"] == {"tuned": 32, "fixed": 32, "long": 64, "frozen": 32}


@pytest.mark.parametrize(
    ("step", "damaged", "threshold"), [(4, 0, 0.0), (5, 0, 0.0), (5, 1, 0.0), (5, 0, 1.0), (9, 0, 0.0)]
)
def test_interrupted_stage_goes_on_at_its_step_to_the_same_bits(
    step: int,
    damaged: int,
    threshold: float,
    pretrained: Path,
    scenes_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two variants, within a longer one, within that of a frozen trunk; with a damaged newest checkpoint."""
    params = dataclasses.replace(TINY, repeat_threshold=threshold)
    taken: list[str] = []
    halts, descend = [step], Training._descend

    def counted(training: Training, loss: torch.Tensor) -> None:
        if halts == [len(taken)]:
            halts.clear()
            raise KeyboardInterrupt
        taken.append(training.variant.name)
        descend(training, loss)

    monkeypatch.setattr(Training, "_descend", counted)
    for name, value in {"SECONDS": -1.0, "SHARE": math.inf}.items():
        monkeypatch.setattr(checkpoint, f"WITHIN_{name}", value)
    with pytest.raises(KeyboardInterrupt):
        _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out", params)
    whole = _run("mask", pretrained, scenes_folder, tmp_path / "b" / "out", params)
    total = len(taken) - step
    for path in sorted((tmp_path / "a" / "work").rglob(checkpoint.NAME))[:damaged]:
        path.write_bytes(path.read_bytes()[:-1])
    resumed = _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out", params)
    assert len(taken) == 2 * total + damaged, "no step is taken twice, but for one where a checkpoint was damaged"
    assert resumed == whole
    assert (tmp_path / "a/out/detections.json").read_bytes() == (tmp_path / "b/out/detections.json").read_bytes()


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_stage_that_is_told_to_stop_leaves_a_checkpoint_at_once(
    step: int, pretrained: Path, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a variant, of a longer one, of a frozen trunk; the notice comes in its middle."""
    taken: list[int] = []
    tells, descend = [step], Training._descend

    def stop() -> None:
        raise KeyboardInterrupt

    def warned(training: Training, loss: torch.Tensor) -> None:
        if tells == [len(taken)]:
            tells.clear()
            NOTICE.give(stop, 300.0)
        taken.append(training.step)
        descend(training, loss)

    monkeypatch.setattr(Training, "_descend", warned)
    with pytest.raises(KeyboardInterrupt):
        _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out")
    assert len(taken) == step + 1
    _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out")
    assert taken == [0, 1, 0, 1, 0, 1, 2, 3, 0, 1], "no step is taken twice"


def test_control_a_step_that_forgets_its_moments_differs(
    pretrained: Path, scenes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the optimiser's state a resumed training would end elsewhere."""
    scenes, begun, ends = _load(FakeSplit(16, 0), "mask", SIZE), [], []

    def after(loss: float) -> None:
        if training.step == 1:
            begun.append({name: value.clone() for name, value in training.tensors().items()})

    training = Training(_detector("mask", pretrained), scenes, Variant(0.003), TINY, 0)
    training.run(after)
    for forgets in ("nothing", "optimiser"):
        saved = {name: value for name, value in begun[0].items() if not name.startswith(forgets)}
        again = Training(_detector("mask", pretrained), scenes, Variant(0.003), TINY, 0)
        again.resume(checkpoint.Checkpoint(saved, {"step": 1}))
        again.run()
        pairs = zip(training.tensors().values(), again.tensors().values(), strict=True)
        ends.append(all(torch.equal(a, b) for a, b in pairs))
    assert ends == [True, False]


def test_a_finished_variant_of_another_run_is_refused_by_name(
    pretrained: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    """A file copied by hand; the work folder itself is named by the run's fingerprint."""
    _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out")
    with pytest.raises(UserError, match=r"checkpoint of another run \(0123456789ab, not ba9876543210\)"):
        _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out", mark="ba9876543210")
    first, second = sorted((tmp_path / "a" / "work").rglob("checkpoint.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=f"{second}: checkpoint of another run"):
        _run("mask", pretrained, scenes_folder, tmp_path / "a" / "out")


def test_repeats_are_trained_counted_and_named(pretrained: Path, scenes_folder: Path, tmp_path: Path) -> None:
    """Of 16 images some show a category that not all of them show; the control is the same run without repeats."""
    runs = {
        threshold: _run(
            "box", pretrained, scenes_folder, tmp_path / str(threshold) / "out",
            dataclasses.replace(TINY, batch=2, repeat_threshold=threshold),
        )
        for threshold in (0.0, 1.0)
    }  # fmt: skip
    factors = _load(FakeSplit(16, len("train")), "box", SIZE).repeat_factors(1.0)
    assert 16 + 2 <= factors.sum() < 32
    seen = {threshold: run["detail"]["images_seen"] for threshold, run in runs.items()}
    assert seen[0.0] == {"tuned": 16, "fixed": 16, "long": 32, "frozen": 16}
    assert seen[1.0]["tuned"] == len(sampling.places(factors, 0, 0)) // 2 * 2 > 16
    assert seen[1.0]["long"] == 2 * sampling.steps(factors, 2, 2, 0)
    protocols = {threshold: run["cells"]["box_AP_tuned"]["protocol"] for threshold, run in runs.items()}
    assert "batch 2, repeat-factor sampling with t = 1, linear decay" in protocols[1.0]
    assert "batch 2, linear decay" in protocols[0.0]
    assert not any("VOC" in name for name in runs[0.0]["cells"])


def test_vocs_own_numbers_stand_beside_cocos(tmp_path: Path) -> None:
    split = FakeSplit(12, 0)
    split.meta = {"evaluation": "voc"}
    scenes = _load(split, "box", SIZE)
    plain = detection.score(_load(FakeSplit(12, 0), "box", SIZE), _perfect(scenes), "box", TINY)["box"]
    stats = detection.score(scenes, _perfect(scenes), "box", TINY)
    assert stats["box"] == plain | {"VOC07": pytest.approx(100), "VOC10": pytest.approx(100)}
    assert tuple(plain) == coco_eval.BOX_STATS, "control: other data have no such numbers"
    assert detection.val_score(stats) == plain["AP50"]
    cells = detection._cells({"tuned": stats}, {"tuned": Variant(0.1)}, "box", TINY)
    for name, text in voc_eval.PROTOCOLS.items():
        assert cells[f"box_{name}_tuned"]["protocol"] == f"{cells['box_AP_tuned']['protocol']}; {text}"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "least"), [("mask", 60.0), ("keypoint", 60.0)])
def test_training_learns_and_an_untrained_detector_does_not(model: str, least: float, pretrained: Path) -> None:
    params = dataclasses.replace(TINY, epochs=30, fpn=16, box_hidden=32)
    train, val = (_load(FakeSplit(n, n), model, SIZE) for n in (64, 32))
    detector = _detector(model, pretrained, params=params)
    untrained = detection.score(val, detection.predict(detector, val, 16), model, params)
    assert all((stats["AP50"] or 0) < 2 for stats in untrained.values())
    Training(detector, train, Variant(0.003), params, 0).run()
    trained = detection.score(val, detection.predict(detector, val, 16), model, params)
    assert all(stats["AP50"] >= least for stats in trained.values()), trained


@pytest.fixture(scope="module")
def desk_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The desk's own scenes, 24 a split, rendered by the project's data build."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirepro.data.scenes.SPLITS", {"train": 24, "val": 24, "test": 24})
        data.build("scenes", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mask", "keypoint"])
def test_an_untrained_detector_finds_nothing_in_the_desks_scenes(model: str, desk_scenes: Path) -> None:
    """Untrained heads on an untrained trunk score below 2; the control is the truth itself, which scores 100."""
    ensemble = encoders.Ensemble(EncoderParams(stem="tiny", norm=True))
    encoders.initialise(ensemble, 0)
    params = DetectParams()
    val = detection_data.load(shards.open(desk_scenes, "val"), model, params.size, params.oks_sigma)
    detector = detection_model.build(ensemble, model, params, len(val.categories), len(val.sigmas))
    detection_model.initialise(detector, 0)
    calibrate(detector, val, params.batch)
    found = detection.predict(detector, val, params.batch)
    stats = detection.score(val, found, model, params)
    assert sum(len(p.scores) for p in found) > 0, "the score threshold hides everything, so the check sees nothing"
    assert all((values["AP50"] or 0) < 2 for values in stats.values()), stats
    assert detection.score(val, _perfect(val), model, params)[model]["AP50"] == pytest.approx(100)
