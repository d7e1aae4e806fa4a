"""Pretraining with real processes: resume after kill -9, damaged and foreign checkpoints, split discipline."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from mirepro import (
    banks,
    checkpoint,
    diagnostics,
    diff,
    encoders,
    kmeans,
    objectives,
    pretrain,
    ranks,
    reference,
    rng,
    settings,
    views,
)
from mirepro.bank import WholeBank
from mirepro.data import shards
from mirepro.errors import UserError
from mirepro.notice import NOTICE
from mirepro.params import EncoderParams, OptimParams, PretrainParams, RunParams, ViewParams

SMALL = PretrainParams(
    epochs=3,
    batch=16,
    monitor=1,
    digest=2,
    encoder=EncoderParams(width=4, stem="tiny", dim=8, norm=True),
    optim=OptimParams(lr=0.02, schedule="cosine"),
    views=ViewParams(size=16),
)


def samples(first: int, n: int):
    noise = rng.words(first, rng.Stream.TOY, 0, np.arange(n), 192).view(np.uint8).reshape(n, 16, 16, 3)
    for i in range(n):
        yield shards.Sample(f"{i:04d}", b"P6\n16 16\n255\n" + noise[i].tobytes(), ".ppm", i % 4, [])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    splits = {"train": samples(1, 80), "val": samples(2, 24), "test": samples(3, 24)}
    shards.write(folder, "tiny", splits, {"classes": ["a", "b", "c", "d"]})
    return folder


def run(objective: str = "ir", seed: int = 0, **changes) -> RunParams:
    options = {"classes": 4} if objective == "supervised" else {"k": 5}
    if objective in ("la", "cave", "cave_numerator"):
        options |= {"n_clusters": 8}
    if objective.startswith("moco"):
        options |= {"queue": 36}
    return RunParams(objective, seed, objective, options, dataclasses.replace(SMALL, **changes))


def train(params: RunParams, data: Path, work: Path, fingerprint: str = "f") -> Path:
    out = work / "out"
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    pretrain.pretrain(params, data, work, out, fingerprint)
    return out


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Outputs of `run()`, never interrupted."""
    return train(run(), data, tmp_path_factory.mktemp("whole"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_trains_and_its_artefacts_load(name, data, tmp_path):
    params = run(name, epochs=0 if name == "random" else 3)
    out = tmp_path / "out"
    out.mkdir()
    metrics = pretrain.pretrain(params, data, tmp_path, out, "f")
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(history) == params.pretrain.epochs
    assert all(np.isfinite(line["loss"]) for line in history)
    assert metrics["cells"]["images_seen"]["value"] == 80 * params.pretrain.epochs
    model = encoders.load(out / "encoder.safetensors")
    z = model.embed(torch.rand(2, 3, 16, 16))
    assert all(torch.allclose(value.norm(dim=1), torch.ones(2), atol=1e-5) for value in z.values())
    claims = objectives.load(name).claim != "no"
    assert (metrics["cells"]["estimate"]["value"] is not None) == claims


def test_equal_runs_have_equal_bytes_and_another_seed_differs(whole, data, tmp_path):
    first, again = whole, train(run(), data, tmp_path / "b")
    assert bytes_of(first) == bytes_of(again)
    assert diff.diff(first, again) is None
    other = train(run(seed=1), data, tmp_path / "c")
    assert bytes_of(first)["encoder.safetensors"] != bytes_of(other)["encoder.safetensors"]
    told = diff.diff(first, other) or ""
    assert told.startswith("first difference at step 2: bank.rgb, ")
    assert told.endswith(" more tensors")


def timed(line: dict) -> set[str]:
    """Entries of a line of history that tell a time, by their name or by their value."""
    words = re.compile("time|second|minute|hour|date|clock|wall|elapsed|duration|per_s")
    return {name for name, value in line.items() if words.search(name) or isinstance(value, str) or (value or 0) > 1e8}


def test_history_holds_no_times(whole):
    lines = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert [timed(line) for line in lines] == [set()] * 3
    for entry in ({"images_per_second": 9.5}, {"finished": "2020-05-27 12:00"}, {"at": 1590537600.0}, {"wall_s": 3}):
        assert timed(lines[0] | entry) == entry.keys(), "control"


def halted(params: RunParams, data: Path, work: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Trains up to a step, then goes on from the newest checkpoint; the steps at which it went on."""
    resume, train_step, begun = pretrain.Trainer.resume, pretrain.Trainer.train_step, []

    def noted(trainer, saved):
        resume(trainer, saved)
        begun.append(trainer.step)

    def stopped(trainer, index):
        if trainer.step == step and begun == [0]:
            raise KeyboardInterrupt
        return train_step(trainer, index)

    with monkeypatch.context() as patch:
        for name, value in {"SECONDS": -1.0, "SHARE": math.inf}.items():
            patch.setattr(checkpoint, f"WITHIN_{name}", value)
        patch.setattr(pretrain, "WITHIN_STEPS", 1)
        patch.setattr(pretrain.Trainer, "resume", noted)
        patch.setattr(pretrain.Trainer, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(params, data, work)
        train(params, data, work)
    return begun


@pytest.mark.parametrize("name", ["ir_nce", "la", "cave", "cmc_ring", "moco_ring", "supervised"])
def test_a_run_goes_on_within_an_epoch(name, data, tmp_path, monkeypatch):
    assert halted(run(name), data, tmp_path / "a", monkeypatch, 8) == [0, 8]
    assert bytes_of(tmp_path / "a/out") == bytes_of(train(run(name), data, tmp_path / "b"))


@pytest.mark.parametrize("within", [True, False])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_at_once(within, data, tmp_path, monkeypatch):
    """Within an epoch of five steps, or after its last one; the notice comes in the middle of a step."""
    steps, resume, train_step = [], pretrain.Trainer.resume, pretrain.Trainer.train_step
    told = 7 if within else 9

    def stop() -> None:
        raise KeyboardInterrupt

    def noted(trainer, saved):
        resume(trainer, saved)
        steps.append(trainer.step)

    def warned(trainer, index):
        if trainer.step == told and steps == [0]:
            NOTICE.give(stop, 300.0)
        return train_step(trainer, index)

    monkeypatch.setattr(checkpoint, "BETWEEN_SECONDS", 1e9)
    monkeypatch.setattr(pretrain.Trainer, "resume", noted)
    monkeypatch.setattr(pretrain.Trainer, "train_step", warned)
    with pytest.raises(KeyboardInterrupt):
        train(run("cave"), data, tmp_path / "a")
    train(run("cave"), data, tmp_path / "a")
    assert steps == [0, told + 1]
    assert bytes_of(tmp_path / "a/out") == bytes_of(train(run("cave"), data, tmp_path / "b"))
    assert signal.setitimer(signal.ITIMER_REAL, 0.0) == (0.0, 0.0), "the alarm is off"


def test_control_clusters_of_a_begun_epoch_matter(data, tmp_path, monkeypatch):
    whole = bytes_of(train(run("cave"), data, tmp_path / "b"))
    monkeypatch.setattr(banks, "held", lambda bank, values: torch.zeros_like(values))
    halted(run("cave"), data, tmp_path / "a", monkeypatch, 8)
    assert bytes_of(tmp_path / "a/out")["chain.txt"] != whole["chain.txt"]


@pytest.mark.parametrize("name", ["la", "cave"])
def test_a_run_clusters_its_bank_anew_before_each_epoch_but_the_first(name, data, tmp_path, monkeypatch):
    begin, found = pretrain.Trainer.begin, []

    def noted(trainer, epoch):
        begin(trainer, epoch)
        made = kmeans.clusterings(trainer.banks, count=3, clusters=8, epoch=epoch, seed=0, iterations=5)
        found.append((trainer.objective.labels["rgb"].clone(), made["rgb"]))

    monkeypatch.setattr(pretrain.Trainer, "begin", noted)
    train(run(name), data, tmp_path)
    assert torch.equal(found[0][0], torch.arange(80)[None])
    assert [torch.equal(*pair) for pair in found] == [False, True, True]
    assert not torch.equal(found[1][0], found[2][0])


PROGRAM = """
import sys
from pathlib import Path
from mirepro import checkpoint, pretrain
from tests.test_pretrain import run
checkpoint.BETWEEN_SECONDS = 0.0
work = Path(sys.argv[2])
(work / "out").mkdir(parents=True, exist_ok=True)
pretrain.pretrain(run(sys.argv[3], epochs=30), Path(sys.argv[1]), work, work / "out", "f")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ir", "la", "cmc_nce", "supervised", "moco_ring", "simclr"])
def test_kill_9_at_random_moments_changes_no_bit(name, data, tmp_path):
    whole = train(run(name, epochs=30), data, tmp_path / "whole")
    work, kills = tmp_path / "killed", 0
    command = [sys.executable, "-c", PROGRAM, str(data), str(work), name]
    for attempt in range(24):
        process = subprocess.Popen(command, env=os.environ)
        deadline = time.monotonic() + 300
        before = _stamp(work)
        while process.poll() is None and _stamp(work) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.03 * (attempt % 7))
        if kills < 8 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            if kills >= 2:
                break
            shutil.rmtree(work)  # it was over too soon; from nothing again
            kills = 0
    assert kills >= 2
    assert process.returncode == 0
    assert bytes_of(work / "out") == bytes_of(whole)


def _stamp(work: Path) -> int:
    path = work / checkpoint.NAME
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_a_foreign_one_is_refused(data, tmp_path, capsys):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, "mine", {"x": torch.tensor([value])}, {"epoch": int(value)})
    loaded = checkpoint.load(tmp_path, "mine")
    assert loaded is not None
    assert loaded.facts["epoch"] == 2
    current = tmp_path / checkpoint.NAME
    current.write_bytes(current.read_bytes()[:-7])
    loaded = checkpoint.load(tmp_path, "mine")
    assert loaded is not None
    assert loaded.facts["epoch"] == 1
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="another run"):
        checkpoint.load(tmp_path, "theirs")
    checkpoint.clear(tmp_path)
    assert checkpoint.load(tmp_path, "mine") is None


def interrupted(params: RunParams, data: Path, work: Path, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains with a checkpoint after every epoch, and stops before the one after `epoch` is written."""
    original = pretrain.Trainer.finish

    def finish(trainer: pretrain.Trainer, number: int) -> None:
        original(trainer, number)
        if number == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "BETWEEN_SECONDS", -1.0)
        patch.setattr(pretrain.Trainer, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            train(params, data, work)


@pytest.mark.parametrize("keep", [1.0, 0.6, 0.0])
def test_a_run_goes_on_from_the_checkpoint_before_a_truncated_one(keep, whole, data, tmp_path, monkeypatch, capsys):
    interrupted(run(), data, tmp_path / "cut", 2, monkeypatch)
    current = tmp_path / "cut" / checkpoint.NAME
    content = current.read_bytes()
    current.write_bytes(content[: int(keep * len(content))])
    begun = []
    original = pretrain.Trainer.begin
    monkeypatch.setattr(pretrain.Trainer, "begin", lambda self, n: begun.append(n) or original(self, n))
    assert bytes_of(train(run(), data, tmp_path / "cut")) == bytes_of(whole)
    assert begun == ([2] if keep == 1 else [1, 2])
    assert ("damaged checkpoint removed" in capsys.readouterr().err) == (keep < 1)


@pytest.mark.parametrize("other", ["another seed", "another code lock"])
def test_a_run_refuses_the_checkpoint_of_another_by_name(other, data, tmp_path, monkeypatch):
    interrupted(run(), data, tmp_path, 1, monkeypatch)
    before = bytes_of(tmp_path / "out") | {"": (tmp_path / checkpoint.NAME).read_bytes()}
    with pytest.raises(UserError, match=rf"{checkpoint.NAME}: checkpoint of another run \(f, not {other[:12]}\)"):
        train(run(seed=1), data, tmp_path, fingerprint=other)  # which covers parameters, data and code
    assert bytes_of(tmp_path / "out") | {"": (tmp_path / checkpoint.NAME).read_bytes()} == before


def test_control_views_from_a_global_generator_do_not_survive_a_resume(data, tmp_path, monkeypatch):
    """Two uninterrupted runs agree all the same: only keyed draws make a resumed one equal, too."""
    params, uniform = run(digest=1), rng.uniform
    kinds = {"keyed": uniform, "global": lambda *key: global_uniform(uniform, *key)}
    for name, draw in kinds.items():
        monkeypatch.setattr(views.rng, "uniform", draw)
        runs = []
        for part in ("whole", "again", "resumed"):
            np.random.seed(0)
            if part == "resumed":
                interrupted(params, data, tmp_path / name / part, 1, monkeypatch)
                np.random.seed(0)  # a new process
            runs.append(train(params, data, tmp_path / name / part))
        assert diff.diff(runs[0], runs[1]) is None
        if name == "keyed":
            assert diff.diff(runs[0], runs[2]) is None
        else:
            assert "first difference at step 6: " in diff.diff(runs[0], runs[2])  # the first after the checkpoint


def global_uniform(keyed, seed, stream, epoch, index, width):
    """What `rng.uniform` returns, but views come from NumPy's global generator."""
    if stream != rng.Stream.VIEW:
        return keyed(seed, stream, epoch, index, width)
    return np.random.random((len(index), width)).astype(keyed(seed, stream, epoch, index[:1], width).dtype)


def test_pretraining_never_opens_the_test_split(data, tmp_path, monkeypatch):
    opened, original, chosen = [], shards.open, pretrain.opened
    monkeypatch.setattr(shards, "open", lambda folder, split: opened.append(split) or original(folder, split))
    train(run(epochs=1), data, tmp_path / "honest")
    assert sorted(set(opened)) == ["train", "val"]
    monkeypatch.setattr(pretrain, "opened", lambda *call: shards.open(call[1], "test") and chosen(*call))  # control
    train(run(epochs=1), data, tmp_path / "planted")
    assert "test" in opened


def test_what_pretraining_learns_does_not_depend_on_the_test_split(whole, data, tmp_path, monkeypatch):
    """Without shards of test, however they might be read; the control monitors on them."""
    copy = shutil.copytree(data, tmp_path / "data")
    for path in copy.glob("shards/test*"):
        path.unlink()
    assert bytes_of(train(run(), copy, tmp_path / "honest")) == bytes_of(whole)
    original = shards.open
    monkeypatch.setattr(shards, "open", lambda folder, split: original(folder, {"val": "test"}.get(split, split)))
    with pytest.raises(UserError, match="test"):
        train(run(), copy, tmp_path / "planted")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch": 81}, "batch"),
        ({"batch": 0}, "batch"),
        ({"shards": 3}, "shards"),
        ({"bank_shards": -1}, "pretrain.bank_shards: -1"),
        ({"bank_shards": 81}, "pretrain.bank_shards: 81 .* at most the 80 training images"),
        ({"epochs": -1}, "epochs"),
        ({"precision": "int8"}, "precision"),
        ({"optim": OptimParams(schedule="linear")}, "schedule"),
        ({"encoder": EncoderParams(arch="vit")}, "arch"),
        ({"encoder": EncoderParams(width=0)}, "width"),
    ],
)
def test_impossible_settings_are_refused_by_name(data, tmp_path, change, key):
    with pytest.raises(UserError, match=key):
        train(run(**change), data, tmp_path)


def test_shards_are_part_of_the_protocol_and_gradients_add_up_in_a_tree(whole, data, tmp_path):
    assert run() == run(shards=1)
    one, two = whole, train(run(shards=2), data, tmp_path)
    assert bytes_of(one)["encoder.safetensors"] != bytes_of(two)["encoder.safetensors"]  # BatchNorm sees a shard alone
    parts = [[torch.tensor([1e8])], [torch.tensor([1.0])], [torch.tensor([-1e8])], [torch.tensor([1.0])]]
    assert float(ranks.tree_sum(parts)[0]) == float((parts[0][0] + parts[1][0]) + (parts[2][0] + parts[3][0]))
    assert [float(t) for t in ranks.tree_sum([[torch.tensor(3.0)]])] == [3.0]


def test_without_normalisation_shards_give_the_gradient_of_the_whole_batch(data):
    gradients = []
    for n in (1, 4):
        trainer = pretrain.Trainer(run(shards=n), shards.open(data, "train"), shards.open(data, "val"))
        trainer.begin(0)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.eval()
        trainer.train_step(trainer.batches(0)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("spoilt", [False, pytest.param(True, id="control")])
def test_the_optimiser_takes_each_gradient_in_its_weights_layout(spoilt, data, monkeypatch):
    """Torch's fused SGD pairs the elements of weight and gradient by address, whatever their strides say."""
    trainer = pretrain.Trainer(run(), shards.open(data, "train"), shards.open(data, "val"))
    before = [weight.detach().double() for weight in trainer.weights]
    schedule = trainer._schedule

    def turn() -> None:
        schedule()
        for weight in filter(lambda weight: weight.dim() == 4, trainer.weights):
            assert weight.grad is not None
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)

    if spoilt:
        monkeypatch.setattr(trainer, "_schedule", turn)
    trainer.begin(0)
    trainer.train_step(trainer.batches(0)[0])
    lr, decay = trainer.optimiser.param_groups[0]["lr"], trainer.params.optim.weight_decay
    right = [
        torch.allclose(weight.detach().double(), old - lr * (weight.grad.double() + decay * old), atol=1e-7)
        for weight, old in zip(trainer.weights, before, strict=True)
        if weight.grad is not None
    ]
    assert len(right) == len(before)
    assert all(right) != spoilt


@pytest.mark.parametrize("first", [False, pytest.param(True, id="control")])
def test_a_step_updates_the_bank_after_loss_and_diagnostics_have_read_it(first, data, monkeypatch):
    """With m = 0 a row that was updated before the loss would be its own anchor, f_ii = 1 / tau."""
    trainer = pretrain.Trainer(run(), shards.open(data, "train"), shards.open(data, "val"))
    objective, bank = trainer.objective, trainer.banks["rgb"]
    if first:
        call = type(objective).__call__

        def early(self, z, banks, index, *rest):
            self.update(banks, {name: value.detach() for name, value in z.items()}, index)
            return call(self, z, banks, index, *rest)

        monkeypatch.setattr(type(objective), "__call__", early)
    trainer.begin(0)
    for index in trainer.batches(0):
        before, position = bank.rows.clone(), trainer.position()
        output = trainer.train_step(index)
    z = bank.rows[index].clone()  # m = 0 stores the embeddings
    assert not torch.equal(z, before[index])
    words = rng.words(0, rng.Stream.NEGATIVE, position.step, index.numpy(), objective.k - 1)
    rows = torch.cat([index[:, None], torch.from_numpy(rng.mulhi(words, len(before)))], 1)
    ces = [reference.gather_nce(z, m, rows, objective.tau).mean() for m in (before, bank.rows)]
    losses = [float(ce) - math.log(objective.k) for ce in ces]
    assert losses[0] > losses[1] + 0.1
    assert float(output.loss.detach()) == pytest.approx(losses[first], abs=1e-4)
    told = diagnostics.epoch(objective, {"rgb": z}, {"rgb": WholeBank(before)}, index, position, trainer.classes)
    assert (trainer.diagnosis == told) != first


@pytest.mark.parametrize("arch", ["resnet10", "resnet50"])
@pytest.mark.parametrize("channels", [1, 3])
def test_maps_lie_channels_last_only_where_the_width_fills_vectors(arch, channels):
    x = torch.rand(2, channels, 32, 32)
    for width, layout in ((8, torch.channels_last), (4, torch.contiguous_format), (2, torch.contiguous_format)):
        trunk = encoders.Trunk(arch, width, "tiny", channels).eval()
        encoders.initialise(trunk, 0)
        maps = trunk(x)
        assert all(item.is_contiguous(memory_format=layout) for item in maps)
        trunk.aligned = not trunk.aligned  # without a gradient either layout is safe; they differ by rounding alone
        for one, other in zip(maps, trunk(x), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_schedules():
    rate = settings.learning_rate
    assert [rate(OptimParams(lr=1.0, schedule="step"), p) for p in (0.0, 0.59, 0.6, 0.9)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    assert rate(OptimParams(lr=1.0, schedule="cosine"), 0.5) == pytest.approx(0.5)
    assert rate(OptimParams(lr=1.0, warmup=0.1), 0.05) == pytest.approx(0.5)


@pytest.mark.parametrize(("k", "warned"), [(50, True), (9, False)])
def test_a_run_prints_the_cap_of_an_oversampled_region_and_records_it(k, warned, data, tmp_path, capsys):
    """A tenth of 80 rows are 8."""
    params = dataclasses.replace(run("ball", epochs=1), options={"k": k})
    history = (train(params, data, tmp_path) / "history.jsonl").read_text()
    cap = math.log(k) - (math.log(1 + (k - 1) / 8) if warned else 0)
    assert json.loads(history)["cap"] == pytest.approx(cap)
    said = f"ball-s0: {k - 1} draws from a region of 8 rows repeat rows; the cap is {cap:.3f} nats\n"
    assert capsys.readouterr().err == (said if warned else "")


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_is_a_parameter(kind, whole, data, tmp_path):
    half = train(run(precision=kind), data, tmp_path / kind)
    written = bytes_of(half)["encoder.safetensors"]
    assert written != bytes_of(whole)["encoder.safetensors"]
    assert all(torch.isfinite(weight).all() for weight in safetensors.torch.load(written).values())
    losses = [json.loads(line)["loss"] for line in (half / "history.jsonl").read_text().splitlines()]
    assert len(losses) == SMALL.epochs
    assert np.isfinite(losses).all()


def first_gradient(kind, data, scale):
    """The weights' gradient of a run's first step, where those of the embeddings are `scale` times theirs."""
    trainer = pretrain.Trainer(run(precision=kind), shards.open(data, "train"), shards.open(data, "val"))
    backward = trainer._backward

    def scaled(parts, z):
        for value in z.values():
            value.grad *= scale
        backward(parts, z)

    trainer._backward = scaled
    trainer.begin(0)
    trainer.train_step(trainer.batches(0)[0])
    return torch.cat([weight.grad.double().flatten() for weight in trainer.weights]) / scale


def test_gradients_of_float16_have_room_below_without_a_scaler(data):
    """No scaler lifts them over float16's smallest number; a ten-thousandth of a batch's would still be there."""
    right = first_gradient("float32", data, 1.0)

    def error(kind, scale):
        return float((first_gradient(kind, data, scale) - right).norm() / right.norm())

    usual = error("float16", 1.0)
    assert 0 < usual < 0.2
    assert error("float16", 1e-4) == pytest.approx(usual, abs=0.01)
    assert error("float16", 1e-9) > 0.9  # control: gone
    assert error("bfloat16", 1e-9) < 0.2  # which has float32's range


def test_a_diverging_run_says_so(data, tmp_path):
    with pytest.raises(UserError, match=r"lower optim\.lr"):
        train(run(optim=OptimParams(lr=1e30)), data, tmp_path)


def test_in_evaluation_mode_an_embedding_does_not_depend_on_its_batch_mates():
    model = encoders.Ensemble(SMALL.encoder)
    encoders.initialise(model, 0)
    rgb = torch.from_numpy(rng.uniform(0, rng.Stream.TOY, 0, np.arange(6), 3 * 256).reshape(6, 3, 16, 16))
    training = model.train().embed(rgb)["rgb"][:1], model.embed(rgb[:3])["rgb"][:1]
    assert not torch.allclose(*training, atol=1e-4)
    alone, together = model.eval().embed(rgb[:1])["rgb"], model.embed(rgb)["rgb"][:1]
    assert torch.allclose(alone, together, atol=1e-6)


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (encoders.Ensemble(SMALL.encoder) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        torch.manual_seed(int(torch.randint(1000, (1,))))
        encoders.initialise(model, seed)
    weights = [model.encoder("rgb").trunk.stem[0].weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
