"""What the stages would refuse, said before the first one runs."""

import hashlib
from collections.abc import Iterable

from mirepro import bounds, determinism, files, params
from mirepro.errors import UserError
from mirepro.profiles import Profile

EVALUATED = ("train", "val", "test")


def check(profile: Profile) -> None:
    """Has every run's settings and objective, and every other stage's settings, checked by the code that reads them.

    That code needs torch, seconds to load; what it has accepted is remembered until parameters, data or code change.

    Raises:
        UserError: An unknown option, or a value that is impossible by itself or for this number of images.
    """
    accepted = profile.root / ".mirepro" / "accepted" / profile.name
    mark = _mark(profile)
    if accepted.is_file() and accepted.read_text(encoding="utf-8") == mark:
        return
    bounds.finite(profile.values)
    _pretraining(profile)
    _transfer(profile)
    files.write_text(accepted, mark)


def _mark(profile: Profile) -> str:
    """sha256 of everything that decides what is accepted."""
    root = profile.root
    manifests = [root / "data" / name / "manifest.json" for name in profile.values["datasets"]]
    locks = sorted((root / "locks" / profile.name).rglob("*.json"))
    paths = [profile.path, *manifests, *locks, *(root / "mirepro" / name for name in ("preflight.py", "bounds.py"))]
    text = "\n".join(f"{path.relative_to(root)} {files.sha256(path)}" for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()


def _pretraining(profile: Profile) -> None:
    from mirepro import encoders, objectives, settings
    from mirepro.data import shards

    data = profile.values["pretrain"]["data"]
    manifest = shards.read_manifest(profile.root / "data" / data)
    sizes, classes = manifest["splits"], len(manifest["meta"]["classes"])
    seen: set[str] = set()
    for name, entry in profile.runs.items():
        if entry.row in seen:
            continue  # the seed decides nothing here
        seen.add(entry.row)
        run = profile.run(name)
        try:
            objective = objectives.create(run.objective, run.options)
            settings.check_split(run.pretrain, objective.uses_labels)
            _check_splits("pretrain.data", data, sizes, run.pretrain.split, "val")
            size = sizes[run.pretrain.split]["samples"]
            settings.check(run.pretrain, size)
            bounds.check("pretrain.optim", run.pretrain.optim, bounds.OPTIM)
            encoders.check(run.pretrain.encoder)
            determinism.check_device("pretrain.device", run.pretrain.device, run.tier, here=False)
            objective.check(size, run.pretrain.encoder.dim)
            if getattr(objective, "n_clusters", 1) > size:
                raise UserError(f"objective {run.objective}.n_clusters: more than {size} training images; use fewer")
            if hasattr(objective, "background") and getattr(objective, "inner", 0.0) > 0:
                raise UserError(f"objective {run.objective}.inner: its background begins at rank 0; leave it out")
            if objective.uses_labels and getattr(objective, "classes", classes) != classes:
                raise UserError(f"objective {run.objective}.classes: use {classes}, as the data have")
        except UserError as error:
            raise UserError(f"rows.{entry.row}: {error}") from error


def _check_splits(key: str, data: str, known: Iterable[str], *wanted: str) -> None:
    """Refuses data without a split that a stage reads, late perhaps."""
    for split in wanted:
        if split not in known:
            raise UserError(f"{key}: {data} has no split {split}; known: {', '.join(known)}")


def _transfer(profile: Profile) -> None:
    from mirepro import toy
    from mirepro.data import shards
    from mirepro.transfer import detection, evaluate

    values = profile.build(params.EvaluateParams, "evaluate")
    evaluate.check(values)
    bounds.check("evaluate.linear", values.linear, bounds.LINEAR)
    known = shards.read_manifest(profile.root / "data" / values.data)["splits"]
    _check_splits("evaluate.data", values.data, known, *EVALUATED)
    determinism.check_device("evaluate.device", values.device, profile.tier, here=False)
    for model, data in sorted({(entry.model, entry.data) for entry in profile.detect_runs.values()}):
        recipe = profile.recipe(data)
        detection.check(model, recipe)
        bounds.check("detect", recipe, bounds.DETECT)
        determinism.check_device("detect.device", recipe.device, profile.tier, here=False)
        _check_splits("detect_runs", data, shards.read_manifest(profile.root / "data" / data)["splits"], *EVALUATED)
    toy.check(profile.build(params.ToyParams, "toy"))
