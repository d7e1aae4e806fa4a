"""Images by batch: the same bytes kept in memory or read from the shards, by any number of threads."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mirepro.data import images, shards
from mirepro.errors import UserError
from tests.test_pretrain import bytes_of, data, run, train

__all__ = ["data"]


@pytest.mark.parametrize("threads", [1, 3])
def test_read_or_kept_the_images_are_the_same(data, monkeypatch, threads):
    split, index = shards.open(data, "train"), torch.tensor([7, 3, 3, 79, 0])
    kept = images.Images(split, threads)
    monkeypatch.setattr(images, "MEMORY", 0)
    read = images.Images(split, threads)
    assert torch.equal(kept[index], read[index])
    assert torch.equal(read[index], torch.from_numpy(split.images(None))[index])
    assert (len(read), read[index].dtype) == (80, torch.uint8)
    assert not torch.equal(read[index], read[index.flip(0)])  # control: the order is the index's


def test_what_is_read_is_not_held(data, monkeypatch):
    """No more than a batch is decoded for a batch; the control is a split that is kept."""
    decoded, original = [], shards.Split.image
    monkeypatch.setattr(shards.Split, "image", lambda self, i, size=None: decoded.append(i) or original(self, i, size))
    for memory, first, second in ((0, 1, 4), (10**6, 81, 0)):
        monkeypatch.setattr(images, "MEMORY", memory)
        decoded.clear()
        split = images.Images(shards.open(data, "train"))
        assert len(decoded) == first
        decoded.clear()
        split[torch.arange(4)]
        assert len(decoded) == second


def test_the_next_batch_is_decoded_meanwhile_and_once(data, monkeypatch):
    """While the caller holds a batch its successor is decoded, no further one, and no image again."""
    decoded, original = [], shards.Split.image
    monkeypatch.setattr(shards.Split, "image", lambda self, i, size=None: decoded.append(i) or original(self, i, size))
    monkeypatch.setattr(images, "MEMORY", 0)
    split = images.Images(shards.open(data, "train"), 2)
    batches = [torch.tensor(b) for b in ([5, 1, 2], [9, 5, 3], [4, 0, 7])]
    decoded.clear()
    due: list[int] = []
    for number, batch in enumerate(split.ahead(batches, lambda b: b[:2])):  # another process reads the third
        assert torch.equal(batch, batches[number])
        for new in ([5, 1, 9], [4, 0], [])[number]:
            due.append(new)
        until = time.monotonic() + 10
        while len(decoded) < len(due) and time.monotonic() < until:
            time.sleep(0.001)
        assert sorted(decoded) == sorted(due)
        assert torch.equal(split[batch[:2]], torch.from_numpy(split._split.images(None))[batch[:2]])
        del decoded[len(due) :]  # `images` decoded all of them for the comparison
    decoded.clear()
    split[batches[0]]
    assert sorted(decoded) == [1, 2, 5]  # control: nothing is kept afterwards


@pytest.mark.parametrize("name", ["ring", "moco", "random"])
def test_a_run_from_the_shards_equals_one_from_memory(data, tmp_path, monkeypatch, name):
    params = run(name, epochs=0 if name == "random" else 2)
    kept = train(params, data, tmp_path / "kept")
    monkeypatch.setattr(images, "MEMORY", 0)
    assert bytes_of(train(params, data, tmp_path / "read")) == bytes_of(kept)


def test_images_of_different_sizes_are_refused(tmp_path, monkeypatch):
    def picture(i):
        out = io.BytesIO()
        Image.fromarray(np.full((8, 8 + (i == 3), 3), i, np.uint8)).save(out, "PNG")
        return shards.Sample(f"{i}", out.getvalue(), ".png", 0, [])

    shards.write(tmp_path, "x", {"train": [picture(i) for i in range(4)]}, {"classes": ["a"]})
    monkeypatch.setattr(images, "MEMORY", 0)
    read = images.Images(shards.open(tmp_path, "train"))
    assert read[torch.arange(3)].shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match="different sizes"):
        read[torch.arange(4)]
