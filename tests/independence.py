"""What `test_independence.py` runs in processes of different settings: `independence.py FOLDER SEED [reversed]`.

Imports images from class folders, locks code, pretrains, evaluates, and prints the digest of every file it made, and
of what the operating system says about its settings (which has to differ).
"""

import hashlib
import json
import locale
import os
import sys
import time
from pathlib import Path


def reverse_listings() -> None:
    """Folders are listed in another order than the disk's."""
    listdir, scandir = os.listdir, os.scandir

    class Reversed:
        def __init__(self, *arguments: object) -> None:
            self.entries = sorted(scandir(*arguments), key=lambda entry: entry.name, reverse=True)

        def __iter__(self):
            return iter(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

    os.listdir = lambda *arguments: sorted(listdir(*arguments), reverse=True)
    os.scandir = Reversed


def work(root: Path, folder: Path, seed: int) -> None:
    """A small piece of every computation."""
    import numpy as np
    from PIL import Image

    from mirepro import codelocks, determinism, params, pretrain
    from mirepro.data import cifar
    from mirepro.files import write_json
    from mirepro.transfer.evaluate import evaluate

    determinism.configure_torch("portable", 1)
    cifar.CLASSES, cifar.COUNTS, cifar.VAL = ("cat", "dog", "emu"), {"train": 30, "test": 8}, 6
    noise = np.random.default_rng(0)
    for split, count in cifar.COUNTS.items():
        for i in range(3 * count):
            path = folder / "source" / split / cifar.CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    cifar.import_cifar10(folder / "source", folder / "data")
    small = {"epochs": 2, "batch": 16, "digest": 2, "encoder": {"width": 4, "stem": "tiny", "dim": 8, "norm": True}}
    for name in ("ring", "cave"):
        options = {"k": 5} | ({"n_clusters": 8} if name == "cave" else {})
        plain = {"row": name, "seed": seed, "objective": name, "options": options, "pretrain": small}
        run = params.build(params.RunParams, plain, "run")
        for part in ("work", "out"):
            (folder / name / part).mkdir(parents=True)
        metrics = pretrain.pretrain(run, folder / "data", folder / name / "work", folder / name / "out", "f")
        write_json(folder / name / "metrics.json", metrics)
    values = params.build(params.EvaluateParams, {"k_nn": [1, 5], "linear": {"author_epochs": 1}}, "evaluate")
    places = [folder / name for name in ("resumed", "evaluated")]
    for place in places:
        place.mkdir()
    metrics = evaluate("ring-s0", "ring", 0, values, folder / "ring" / "out", folder / "data", *places, "f")
    write_json(folder / "evaluated" / "metrics.json", metrics)
    codelocks.write(root, "independence", ["ring", "cave"])
    (root / "locks" / "independence").rename(folder / "locks")


def main() -> None:
    """Works and prints JSON."""
    root, folder = Path(os.environ["PYTHONPATH"]), Path(sys.argv[1])
    if "reversed" in sys.argv:
        reverse_listings()
    facts = {
        "hash": hash("mirepro"),
        "locale": locale.setlocale(locale.LC_ALL, ""),
        "time": time.strftime("%Y-%m-%d %H %z"),
        "path": str(root),
        "cores": len(os.sched_getaffinity(0)),
        "listing": [name for name in os.listdir(root / "mirepro") if name.endswith(".py")],
    }
    work(root, folder, int(sys.argv[2]))
    made = ("data", "ring/out", "cave/out", "evaluated", "locks")  # a checkpoint's presence depends on speed
    kept = [*folder.glob("*/metrics.json"), *(path for name in made for path in (folder / name).rglob("*"))]
    digests = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept if path.is_file()
    }
    print(json.dumps({"facts": facts, "digests": dict(sorted(digests.items()))}))


if __name__ == "__main__":
    main()
