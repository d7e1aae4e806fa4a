"""Digests of everything the portable tier promises, on miniature inputs, in one process.

`python -m tests.portability` prints them as JSON; with `--write` it runs itself with 1 and with 2 threads and rewrites
tests/golden/portable.json. Every objective takes two training steps and is evaluated once; a piece of both rendered
data sets, the toy, detection and the tables with their claims come along. The encoder and the detector are as wide as
those of the desk profile, so that the libraries choose the same kernels.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirepro import determinism, files

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/portable.json"
THREADS = (1, 2)
WHOLE = ("cmc", "ir", "supervised")
"""Rows whose images are as large as the desk profile's; the others' encoders are the same, and an emulator slow."""
SPLITS = {"train": 8, "val": 4, "test": 4}
SCENES = {"train": 2, "val": 1, "test": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {},
    "supervised": {"classes": 96},
    "ball": {"outer": 0.3},
    "ball_annealed": {"outer": 0.3, "annealed": True},
    "ring": {"outer": 0.5, "inner": 0.2},
    "cmc_ball": {"outer": 0.3},
    "cmc_ring": {"outer": 0.5, "inner": 0.2},
    "cave": {"outer": 0.3, "n_clusters": 4},
    "cave_numerator": {"outer": 0.3, "n_clusters": 4},
    "la": {"outer": 0.3, "n_clusters": 4, "warmup_fraction": 0.0},
    "moco": {"queue": 12},
    "moco_ring": {"queue": 20, "outer": 0.5, "inner": 0.2},
}

Digests = dict[str, dict[str, str]]


def sha(content: bytes) -> str:
    """First 16 hex digits of sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def folder(path: Path) -> dict[str, str]:
    """The digest of every file in a folder."""
    return {item.name: sha(item.read_bytes()) for item in sorted(path.iterdir()) if item.is_file()}


def views(row: str) -> dict[str, Any]:
    """Parameters of a row's views."""
    return {"size": 32 if row in WHOLE else 16, "crop": (0.6, 1.0)}


def rows() -> list[str]:
    """Every objective, and the annealed ball."""
    from mirepro import objectives

    return [*objectives.names(), "ball_annealed"]


class Miniature:
    """A small profile in a folder: its data, then whatever is asked of it.

    Args:
        root: Empty folder.
        seed: Of all runs.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.seed = root, seed

    def data(self) -> dict[str, str]:
        """Desk images of 32 classes and scenes, with their annotations."""
        from mirepro.data import desk, scenes, shards

        first, images, pictures = 0, {}, {}
        for name, n in SPLITS.items():  # scenes lie twice as far apart: of these every split shows keypoints
            images[name] = desk.batch(first + np.arange(n), np.arange(n) * 5 % 96)
            pictures[name] = scenes.batch(scenes.FIRST + 2 * first + np.arange(SCENES[name]))
            first += n
        made = {
            "desk": shards.write(self.root / "data/desk", "desk", images, desk.META),
            "scenes": shards.write(self.root / "data/scenes", "scenes", pictures, scenes.META),
        }
        return {name: sha(files.dump_json(manifest).encode()) for name, manifest in made.items()}

    def run(self, row: str) -> dict[str, str]:
        """Two training steps and the evaluation of one objective."""
        from mirepro.params import EvaluateParams, LinearParams, RunParams, ViewParams
        from mirepro.pretrain import pretrain
        from mirepro.transfer.evaluate import evaluate

        trained, evaluated = self._fresh(f"pretrain/{row}"), self._fresh(f"evaluate/{row}")
        objective = row.removesuffix("_annealed")
        params = RunParams(row, self.seed, objective, {"k": 16} | OPTIONS.get(row, {}), self._pretrain(row))
        first = pretrain(params, self.root / "data/desk", self._fresh(f"work/{row}"), trained, row)
        linear = LinearParams(l2=(1.0, 100.0), iterations=12, author_epochs=1, author_batch=8)
        protocol = EvaluateParams(k_nn=(1, 5), anchors=2, gallery=3, linear=linear, views=ViewParams(**views(row)))
        resumed = self._fresh(f"work/evaluate/{row}")
        second = evaluate(row, row, self.seed, protocol, trained, self.root / "data/desk", resumed, evaluated, row)
        for stage, document in (("pretrain", first), ("evaluate", second)):
            files.write_json(self.root / f"metrics/mini/{stage}/{row}.json", document)
        made = {"pretrain": sha(files.dump_json(first).encode()), "evaluate": sha(files.dump_json(second).encode())}
        return folder(trained) | folder(evaluated) | made | {"features": self._features(trained, views(row)["size"])}

    def _features(self, trained: Path, size: int) -> str:
        """What the frozen encoder makes of the validation images; accuracies alone would hide a last bit."""
        from mirepro import encoders
        from mirepro.data import shards
        from mirepro.data.images import Images
        from mirepro.transfer.evaluate import features
        from mirepro.transfer.frozen import freeze

        model = freeze(encoders.load(trained / "encoder.safetensors"))
        images = Images(shards.open(self.root / "data/desk", "val"))
        found = features(model, images, size, ("flat", "pool", "z"))
        return sha(files.dump_json(determinism.digests(found)).encode())

    def _pretrain(self, row: str) -> Any:
        from mirepro.params import EncoderParams, OptimParams, PretrainParams, ViewParams

        return PretrainParams(
            epochs=0 if row == "random" else 1, batch=4, monitor=1, digest=1, views=ViewParams(**views(row)),
            encoder=EncoderParams(width=11 if row.startswith("cmc") else 16, stem="tiny", dim=64, norm=True),
            optim=OptimParams(lr=0.015, schedule="cosine"),
        )  # fmt: skip

    def detect(self, model: str) -> dict[str, str]:
        """Two training steps of a detector on the random encoder, also long and frozen: weights, finds, AP."""
        from mirepro import checkpoint
        from mirepro.params import DetectParams
        from mirepro.transfer import detection

        out, encoder = self._fresh(f"detect/{model}"), self.root / "runs/mini/pretrain/random"
        params, scenes = DetectParams(epochs=1, keypoint_epochs=1, batch=1, lrs=(0.004,)), self.root / "data/scenes"
        work = self._fresh(f"work/{model}")
        detection.SHOWN_SCORE = 0.0  # after two steps nothing is sure
        document = detection.detect("random", "random", self.seed, model, params, encoder, scenes, work, out, "f")
        made = {"metrics": sha(files.dump_json(document).encode())}
        for variant in sorted(work.iterdir()):
            saved = checkpoint.load(variant, f"f {variant.name}")
            assert saved is not None
            tensors = {name.removeprefix("detector."): value for name, value in saved.tensors.items()}
            made[variant.name] = sha(files.dump_json(determinism.digests(tensors)).encode())
        return folder(out) | made

    def linear(self) -> dict[str, str]:
        """Weights of the softmax regression with more images than features and with fewer; the controls' features."""
        import torch

        from mirepro import rng
        from mirepro.data import shards
        from mirepro.params import LinearParams
        from mirepro.transfer import controls, linear

        split = shards.open(self.root / "data/desk", "train")
        found = controls.features(split, np.arange(len(split)))
        made = {name: sha(value.tobytes()) for name, value in found.items()}
        for n, features in ((301, 67), (45, 131)):
            x = torch.from_numpy(rng.uniform(self.seed, rng.Stream.TOY, 0, np.arange(2 * n), features))
            pair = (x[:n], torch.arange(n) % 7), (x[n:], torch.arange(n) % 7)
            layer, grid, _ = linear.fit(*pair, 7, LinearParams(l2=(1.0, 100.0), iterations=20))
            parts = determinism.digests({"weight": layer.weight, "bias": layer.bias})
            made[f"{n}x{features}"] = sha(files.dump_json([parts, grid]).encode())
        return made

    def toy(self) -> dict[str, str]:
        """Table T5's numbers with few anchors and rows; odd numbers, because OpenBLAS's kernels differ in the rest."""
        from mirepro.params import ToyParams
        from mirepro.toy import toy

        out = self._fresh("toy")
        document = toy(ToyParams(banks=2, rows=513, anchors=65, redraws=3, seed=self.seed), out)
        files.write_json(self.root / "metrics/mini/toy.json", document)
        return {"toy": sha(files.dump_json(document).encode())} | folder(out)

    def bank(self) -> dict[str, str]:
        """Answers and sums of banks in four blocks, as ranks hold them (`pretrain.bank_shards`)."""
        from mirepro.ranks import World
        from tests import bank_shards

        alone, made = World(), {}
        for name in bank_shards.RANKED:
            found = bank_shards.part_answers(name, alone) | bank_shards.part_sums(name, alone)
            made[name] = sha(files.dump_json(determinism.digests(found)).encode())
        return made

    def tables(self) -> dict[str, str]:
        """T1 of all runs, T5, and the verdicts: other runs' evaluations stand for the five seeds of two rows."""
        from mirepro.report import tables

        names, metrics, runs = rows(), self.root / "metrics/mini", self.root / "runs/mini/evaluate"
        layout = {row: [row] for row in names}
        for place, row in enumerate(("ir", "ball")):
            layout[row] = [f"{row}-s{seed}" for seed in range(5)]
            for seed, run in enumerate(layout[row]):
                twin = names[2 * seed + place]
                for stage, source in (("pretrain", row), ("evaluate", twin)):
                    document = files.read_json(metrics / stage / f"{source}.json")
                    files.write_json(metrics / stage / f"{run}.json", document | {"seed": seed})
                files.write_bytes(runs / run / "test.json", (runs / twin / "test.json").read_bytes())
        tables.build(self.root, "mini", {"T1": {"rows": layout}})
        return folder(self.root / "tables/mini")

    def _fresh(self, name: str) -> Path:
        path = self.root / "runs/mini" / name
        path.mkdir(parents=True)
        return path

    def parts(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Everything, part by part."""
        yield "data", self.data()
        yield "toy", self.toy()
        yield "linear", self.linear()
        yield "bank", self.bank()
        for row in rows():
            yield row, self.run(row)
        yield "detect_mask", self.detect("mask")
        yield "detect_keypoint", self.detect("keypoint")
        yield "tables", self.tables()


def compute(tier: str, threads: int, seed: int = 0, verbose: bool = False) -> Digests:
    """All digests, in this process, under the environment that stands."""
    import time

    determinism.configure_torch(tier, threads)
    found: Digests = {}
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        for part, digests in Miniature(Path(name), seed).parts():
            found[part] = digests
            if verbose:
                print(f"{time.monotonic() - start:6.1f} s {part} {digests}", file=sys.stderr, flush=True)
    return found


def child(threads: int, *arguments: str, prefix: Sequence[str] = (), **changes: str | None) -> dict[str, Any]:
    """What this module prints in a process of its own.

    Args:
        threads: Number of threads; the portable tier's variables are set for it.
        arguments: Further ones.
        prefix: Command that runs the interpreter: an emulator.
        changes: Environment variables on top; None unsets one.
    """
    tier = determinism.environment("portable", threads) | {"OMP_WAIT_POLICY": "passive"}  # spinning starves emulators
    wanted = os.environ | tier | {"PYTHONPATH": str(ROOT)} | changes
    env = {name: value for name, value in wanted.items() if value is not None}
    command = [*prefix, sys.executable, "-m", "tests.portability", "--threads", str(threads), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout)


def different(one: Digests, other: Digests) -> list[str]:
    """`part/artefact` of every digest that differs or is on one side only."""
    keys = sorted({(part, name) for side in (one, other) for part in side for name in side[part]})
    return [f"{part}/{name}" for part, name in keys if one.get(part, {}).get(name) != other.get(part, {}).get(name)]


def main() -> None:
    """Prints the digests and the instruction set they were computed with, or rewrites the golden file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tier", default="portable", choices=determinism.TIERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show each part on stderr when it is done")
    parser.add_argument("--write", action="store_true", help="rewrite tests/golden/portable.json")
    options = parser.parse_args()
    if options.write:
        files.write_json(GOLDEN, {str(threads): child(threads)["digests"] for threads in THREADS})
        return
    from mirepro import _build_info

    found = compute(options.tier, options.threads, options.seed, options.verbose)
    json.dump({"isa": _build_info.isa(), "best_isa": _build_info.best_isa(), "digests": found}, sys.stdout)


if __name__ == "__main__":
    main()
