"""The author protocol against a slow float64 oracle, resumed at any step, and its seed."""

import math

import numpy as np
import pytest
import torch

from mirepro import checkpoint, rng, views
from mirepro.data import shards
from mirepro.data.images import Images
from mirepro.errors import UserError
from mirepro.notice import NOTICE
from mirepro.params import EvaluateParams, LinearParams, ViewParams
from mirepro.transfer import author, evaluate, linear
from tests.test_detection import pretrained
from tests.test_pretrain import data

__all__ = ["data", "pretrained"]
SGD = LinearParams(author_epochs=3, author_lr=0.02, author_batch=32)
PARAMS = EvaluateParams(linear=SGD, views=ViewParams(size=8))


def embed(rgb):
    return {"flat": rgb.flatten(1), "pool": rgb.mean((2, 3))}


def training(data, seed=0, params=PARAMS):
    split = shards.open(data, "train")
    classes = torch.from_numpy(split.labels)
    return author.Author(embed, Images(split), classes, len(split.classes), seed, params)


def oracle(data, kind, seed=0):
    """Weights and bias with all features at hand, in float64."""
    split, linear = shards.open(data, "train"), PARAMS.linear
    pixels, index = torch.from_numpy(split.images()), torch.arange(len(split))
    theta = [np.zeros(1)] * 2
    for epoch in range(linear.author_epochs):
        rgb = views.batch(pixels, PARAMS.views, seed=seed, epoch=epoch, index=index, view=2)
        x = embed(rgb)[kind].double().numpy()
        if epoch == 0:
            mean, deviation = x.mean(0), x.std(0)
            theta = [np.zeros((x.shape[1], len(split.classes))), np.zeros(len(split.classes))]
            velocity = [np.zeros_like(t) for t in theta]
        x = (x - mean) / deviation
        order = rng.permutation(seed, rng.Stream.TRANSFER, epoch, len(x))
        for begin in range(0, len(x), linear.author_batch):
            batch = order[begin : begin + linear.author_batch]
            p = np.exp(x[batch] @ theta[0] + theta[1])
            residual = p / p.sum(1, keepdims=True) - np.eye(len(split.classes))[split.labels[batch]]
            for i, gradient in enumerate((x[batch].T @ residual / len(batch), residual.mean(0))):
                velocity[i] = linear.author_momentum * velocity[i] + gradient
                theta[i] = theta[i] - linear.author_lr * velocity[i]
    return theta


@pytest.mark.parametrize("kind", ["flat", "pool"])
def test_batch_by_batch_equals_all_features_at_once(kind, data, tmp_path):
    layer = training(data).train(tmp_path, "f")[kind]
    weight, bias = oracle(data, kind)
    assert np.allclose(layer.weight.numpy(), weight, atol=2e-5)
    assert np.allclose(layer.bias.numpy(), bias, atol=2e-5)
    other, _ = oracle(data, kind, seed=1)
    assert not np.allclose(layer.weight.numpy(), other, atol=2e-3), "control: another seed has other views and orders"


def weights(layers):
    return {kind: (layer.weight, layer.bias, layer.standardise.mean) for kind, layer in layers.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for kind in a for x, y in zip(a[kind], b[kind], strict=True))


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_an_interrupted_training_goes_on_at_its_step_to_the_same_bits(step, data, tmp_path, monkeypatch):
    """Three steps an epoch, the last of them smaller; nine are all."""
    whole = weights(training(data).train(tmp_path / "a", "f"))
    taken, take = [], author.Author._take

    def counted(self, index):
        if len(taken) == step and self.step == step and not taken[-1] < 0:
            taken.append(-1)
            raise KeyboardInterrupt
        take(self, index)
        taken.append(self.step)

    monkeypatch.setattr(author.Author, "_take", counted)
    for name, value in {"SECONDS": -1.0, "SHARE": math.inf}.items():
        monkeypatch.setattr(checkpoint, f"WITHIN_{name}", value)
    if step < 9:
        with pytest.raises(KeyboardInterrupt):
            training(data).train(tmp_path / "b", "f")
    else:
        training(data).train(tmp_path / "b", "f")
    assert equal(weights(training(data).train(tmp_path / "b", "f")), whole)
    assert [number for number in taken if number > 0] == list(range(1, 10)), "no step is taken twice"


def test_a_training_that_is_told_to_stop_leaves_a_checkpoint_at_once(data, tmp_path, monkeypatch):
    """The notice comes in the middle of a step."""
    taken, take = [], author.Author._take

    def stop():
        raise KeyboardInterrupt

    def warned(self, index):
        if taken == [1, 2, 3, 4]:
            NOTICE.give(stop, 300.0)
        take(self, index)
        taken.append(self.step)

    monkeypatch.setattr(author.Author, "_take", warned)
    with pytest.raises(KeyboardInterrupt):
        training(data).train(tmp_path, "f")
    assert taken == [1, 2, 3, 4, 5]
    training(data).train(tmp_path, "f")
    assert taken == list(range(1, 10)), "no step is taken twice"


def test_control_a_layer_that_forgets_its_momentum_differs(data, tmp_path, monkeypatch):
    begun = training(data)
    for index in begun._batches():
        begun._take(index)
        if begun.step == 4:
            break
    end, ends = weights(training(data).train(tmp_path / "a", "f")), []
    for forgets in ("nothing", "velocity"):
        saved = {k: v.clone() * (not k.endswith(forgets)) for k, v in begun.tensors().items()}
        again = training(data)
        again.resume(checkpoint.Checkpoint(saved, {"step": 4}))
        checkpoint.save(tmp_path / forgets, "f", again.tensors(), {"step": 4})
        ends.append(equal(weights(training(data).train(tmp_path / forgets, "f")), end))
    assert ends == [True, False]


def test_moments_of_parts_are_those_of_all_rows():
    x = torch.from_numpy(np.random.default_rng(0).normal(1e3, 1e-3, (77, 5)).astype(np.float32))
    x[:, 3], x[:, 4] = 0.1, 0.0
    moments = author.Moments()
    for part in x.split(10):
        moments.add(part)
    made, whole = moments.standardiser(), author.Standardiser.fit(x)
    assert torch.allclose(made.mean, whole.mean, rtol=1e-6)
    assert torch.allclose(made.scale, whole.scale, rtol=1e-6)
    assert made.scale[3:].tolist() == [0.0, 0.0], "constant features stay so"


def test_the_test_split_is_opened_after_every_choice(data, pretrained, tmp_path, monkeypatch):
    """Planted: a split test that cannot be opened; when it is asked for, all choices have been made."""
    made, real = [], {"open": shards.open, "fit": linear.fit, "train": author.Author.train}

    def opened(folder, name):
        if name == "test":
            raise UserError("test was opened")
        return real["open"](folder, name)

    monkeypatch.setattr(evaluate.shards, "open", opened)
    monkeypatch.setattr(linear, "fit", lambda *a: made.append("fit") or real["fit"](*a))
    monkeypatch.setattr(author.Author, "train", lambda *a: made.append("train") or real["train"](*a))
    params = EvaluateParams(k_nn=(1,), anchors=2, gallery=3, linear=SGD, views=ViewParams(size=16))
    with pytest.raises(UserError, match="test was opened"):
        evaluate.evaluate("ir-s0", "ir", 0, params, pretrained, data, tmp_path, tmp_path, "f")
    assert made == ["train", "fit", "fit"]
