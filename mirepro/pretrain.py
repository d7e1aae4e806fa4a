"""Pretraining: the loop, its shard seam, resume, and the run's metrics."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from mirepro import (
    banks,
    checkpoint,
    determinism,
    diagnostics,
    encoders,
    files,
    metrics,
    objectives,
    ranks,
    rng,
    settings,
    views,
)
from mirepro.data import shards
from mirepro.data.images import Images
from mirepro.errors import UserError
from mirepro.moments import Moments
from mirepro.notice import NOTICE
from mirepro.objectives.base import Objective, Output, Step
from mirepro.params import RunParams
from mirepro.progress import Bar

WITHIN_STEPS = 16
"""So often it is asked within an epoch whether a checkpoint is due; one process alone knows of a notice at once."""
_ALONE = ranks.World()


def pretrain(run: RunParams, data_folder: Path, work: Path, out: Path, fingerprint: str) -> dict[str, Any]:
    """Trains one run, resuming from its own checkpoint; on several ranks the first one writes.

    Args:
        run: Row, seed, objective and everything else that decides the result.
        data_folder: Data set with the split to train on and val; test is never opened.
        work: Folder that survives a kill.
        out: Folder to fill: encoder.safetensors, bank.safetensors, history.jsonl, chain.txt.
        fingerprint: Names the run; a checkpoint of another one is refused.

    Returns:
        The run's metrics document; an empty one on other ranks than the first.

    Raises:
        UserError: Impossible parameters, damaged data, a foreign checkpoint.
    """
    with ranks.join(run.pretrain.shards, fingerprint) as world:
        trainer = Trainer(run, *opened(run, data_folder), world)
        trainer.resume(world.share(lambda: checkpoint.load(work, fingerprint)))
        trainer.loop(work, fingerprint)
        trainer.write(out)
        document = trainer.metrics()  # on all ranks, among which a bank may be spread
        return document if world.leader else {}


def opened(run: RunParams, data_folder: Path) -> tuple[shards.Split, shards.Split]:
    """The split to train on, and val.

    Raises:
        UserError: A split is missing, damaged, or of no use to the objective.
    """
    settings.check_split(run.pretrain, objectives.create(run.objective, run.options).uses_labels)
    return shards.open(data_folder, run.pretrain.split), shards.open(data_folder, "val")


class Trainer:
    """The state of a run: model, objective, banks, optimiser, history, digest chain."""

    def __init__(self, run: RunParams, train: shards.Split, val: shards.Split, world: ranks.World = _ALONE) -> None:
        self.run, self.params, self.world = run, run.pretrain, world
        settings.check(self.params, train.size)
        determinism.check_device("pretrain.device", self.params.device, run.tier)
        self.device = torch.device(self.params.device)
        self.objective: Objective = objectives.create(run.objective, run.options)
        self.warnings = self.objective.check(train.size, self.params.encoder.dim)
        if self.objective.uses_labels and getattr(self.objective, "classes", 0) != len(train.classes):
            raise UserError(f"objective {run.objective}.classes: use {len(train.classes)}, as the data have")
        for warning in self.warnings:
            world.lead(lambda line: print(line, file=sys.stderr), f"{run.row}-s{run.seed}: {warning}")
        self.images, self.val = Images(train, run.threads), Images(val, run.threads)
        self.classes, self.val_classes = (torch.from_numpy(split.labels).to(self.device) for split in (train, val))
        self.model = encoders.Ensemble(self.params.encoder, self.objective.modalities)
        encoders.initialise(self.model, run.seed)
        self.model.to(self.device)
        self.moments = Moments(self.model)
        self.objective.initialise(self.model, run.seed)
        self.banks = banks.create(run, self.objective.modalities, train.size, world, self.device)
        self.weights = [*self.model.parameters(), *self.objective.parameters()]
        optim = self.params.optim
        self.optimiser = torch.optim.SGD(
            self.weights, optim.lr, optim.momentum, weight_decay=optim.weight_decay, fused=True
        )
        self.steps_per_epoch = train.size // self.params.batch
        self.total_steps = self.params.epochs * self.steps_per_epoch
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self.chain: list[dict[str, Any]] = []
        self.monitor: dict[str, float | None] = {}
        self.sums: dict[str, float] = {}

    def loop(self, work: Path, fingerprint: str) -> None:
        """All steps that are left; a checkpoint now and then."""
        clock, batch = checkpoint.Clock(), self.params.batch
        title, total = f"{self.run.row}-s{self.run.seed}", self.total_steps * batch
        with Bar(title, total, self.step * batch, shown=self.world.leader) as bar:
            for epoch in range(self.epoch, self.params.epochs):
                self.begin(epoch)
                for index in self.images.ahead(self.batches(epoch)[self._taken(epoch) :], self.world.part):
                    output = self.train_step(index)
                    bar.advance(batch, loss=float(output.loss.detach()), estimate=output.estimate, **self.monitor)
                    if 0 < self._taken(epoch) < self.steps_per_epoch and self._asks():
                        self._save(work, fingerprint, clock, within=True)
                self.finish(epoch)
                self._save(work, fingerprint, clock, within=False)
        if self.total_steps == 0:
            self.calibrate()

    def _asks(self) -> bool:
        """Whether the ranks ask each other after this step if a checkpoint is due."""
        return self.step % WITHIN_STEPS == 0 or (self.world.size == 1 and NOTICE.given)

    def _save(self, work: Path, fingerprint: str, clock: checkpoint.Clock, within: bool) -> None:
        """A checkpoint if one is due; the first rank's clock decides for all, which collect their rows for it."""
        if self.world.share(lambda: clock.due(within)):
            with clock.writing():
                self.world.lead(checkpoint.save, work, fingerprint, self.tensors(), self.facts())

    def _taken(self, epoch: int) -> int:
        """Steps of an epoch that are done."""
        return self.step - epoch * self.steps_per_epoch

    def batches(self, epoch: int) -> list[Tensor]:
        """`(B,)` int64 sample indices of each step; the incomplete last batch is left out."""
        order = torch.from_numpy(rng.permutation(self.run.seed, rng.Stream.ORDER, epoch, len(self.images)))
        return list(order[: self.steps_per_epoch * self.params.batch].split(self.params.batch))

    def begin(self, epoch: int) -> None:
        """Starts an epoch: clusterings and the like; one that a checkpoint has begun goes on with its own."""
        self.model.train()
        self.epoch = epoch
        if self._taken(epoch) == 0:
            self.objective.refresh(self.banks, epoch, self.run.seed)
            self.sums = {"loss": 0.0, "estimate": 0.0}

    def position(self) -> Step:
        """Where the run stands."""
        return Step(self.run.seed, self.step, self.total_steps, self.epoch, self.params.epochs)

    def train_step(self, index: Tensor) -> Output:
        """Views -> embeddings per shard -> the objective on the global batch -> backward per shard -> step -> bank.

        Where there are other ranks, they embed their own shards meanwhile.

        Args:
            index: `(B,)` sample indices, on the CPU.
        """
        parts = self.embed(self.world.part(index))
        z = {name: self.world.gather(torch.cat([part[name].detach() for part in parts])) for name in parts[0]}
        z = {name: value.requires_grad_() for name, value in z.items()}
        if not all(torch.isfinite(value).all() for value in z.values()):
            raise self._diverged("an embedding is not finite")
        self.optimiser.zero_grad()
        position, index = self.position(), index.to(self.device)
        output = self.objective(z, self.banks, index, position, self.classes[index])
        output.loss.backward()
        self._backward(parts, z)
        self._schedule()
        self.optimiser.step()
        if self.step % self.steps_per_epoch == self.steps_per_epoch - 1 and not self.objective.uses_labels:
            self.diagnosis = diagnostics.epoch(self.objective, z, self.banks, index, position, self.classes)
        self.objective.update(self.banks, z, index)
        self._count(output)
        return output

    def embed(self, index: Tensor) -> list[dict[str, Tensor]]:
        """Embeds views of the samples `(b,)` of this rank, shard by shard, and folds all shards' BatchNorm moments."""
        running, parts, moments = self.moments.take(), [], []
        for piece in index.chunk(self.params.shards // self.world.size):
            count = 1 + len(self.objective.companions)
            parts.append(self._embed([self._view(self.images, piece, self.epoch, view) for view in range(count)]))
            moments.append(self.moments.take())
        self.moments.fold(running, self.world.gather(torch.stack(moments)), len(parts))
        return parts

    def _view(self, images: Images, index: Tensor, epoch: int | None, view: int = 0) -> Tensor:
        """`(b, 3, S, S)`: a view of samples `(b,)` in an epoch; without one the plain images."""
        pixels, params = images[index].to(self.device), self.params.views
        if epoch is None:
            return views.plain(pixels, params.size)
        return views.batch(pixels, params, seed=self.run.seed, epoch=epoch, index=index, view=view)

    def _embed(self, rgb: list[Tensor]) -> dict[str, Tensor]:
        """Views `(b, 3, S, S)` of one shard -> embeddings `(b, D)` float32; BatchNorm sees this shard alone."""
        kind = settings.PRECISIONS[self.params.precision]
        with torch.autocast(rgb[0].device.type, kind or torch.bfloat16, enabled=kind is not None):
            z = self.objective.embed(self.model, rgb)
        if kind is None:
            return z
        return {name: torch.nn.functional.normalize(value.float()) for name, value in z.items()}

    def _backward(self, parts: list[dict[str, Tensor]], z: dict[str, Tensor]) -> None:
        """Gradients of the weights from dz, shard by shard, summed over all ranks' shards in a fixed tree."""
        weights = list(self.model.parameters())
        mine = {name: self.world.part(value.grad) for name, value in z.items() if value.grad is not None}
        pieces = {name: value.chunk(len(parts)) for name, value in mine.items()}
        gradients = []
        for number, part in enumerate(parts):
            outputs = [part[name] for name in pieces]
            gradients.append(torch.autograd.grad(outputs, weights, [pieces[name][number] for name in pieces]))
        for weight, gradient in zip(weights, self.world.total(gradients), strict=True):
            weight.grad = gradient.contiguous()  # the fused optimiser takes weight and gradient for one layout

    def _schedule(self) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate(self.params.optim, self.step / self.total_steps)

    def _count(self, output: Output) -> None:
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        self.sums["loss"] += loss
        self.sums["estimate"] += math.nan if output.estimate is None else output.estimate
        self.step += 1
        if self.step % self.params.digest == 0 or self.step == self.total_steps:
            state = self.model.state_dict() | {f"bank.{name}": bank.whole() for name, bank in self.banks.items()}
            parts = self.world.share(lambda: determinism.digests(state))
            previous = self.chain[-1]["chain"] if self.chain else ""
            link = determinism.chain(previous, self.step, parts)
            self.chain.append({"step": self.step, "chain": link, "tensors": parts})

    def _diverged(self, what: str) -> UserError:
        return UserError(f"{self.run.row}-s{self.run.seed}: {what} at step {self.step}; lower optim.lr")

    def finish(self, epoch: int) -> None:
        """Ends an epoch: one line of history."""
        if self.params.monitor and (epoch + 1) % self.params.monitor == 0:
            self.monitor = {"1-NN": self.nearest_neighbour()}
        means = {name: value / self.steps_per_epoch for name, value in self.sums.items()}
        estimate = None if math.isnan(means["estimate"]) else means["estimate"]
        line = {
            "epoch": epoch + 1,
            "step": self.step,
            "loss": means["loss"],
            "estimate": estimate,
            "cap": None if estimate is None else self.objective.cap(len(self.images)),
            "lr": self.optimiser.param_groups[0]["lr"],
            "knn1_val": self.monitor.get("1-NN"),
        }
        self.history.append(line | ({} if self.objective.uses_labels else self.diagnosis))
        self.epoch = epoch + 1

    @torch.no_grad()
    def embeddings(self, images: Images, *, epoch: int | None = None, view: int = 0) -> dict[str, Tensor]:
        """Embeddings `(N, D)` per modality in evaluation mode: of a fresh view where `epoch` is given, else plain."""
        self.model.eval()
        parts = []
        for index in torch.arange(len(images)).split(256):
            parts.append(self.model.embed(self._view(images, index, epoch, view)))
        return {name: torch.cat([part[name] for part in parts]) for name in self.model.modalities}

    def nearest_neighbour(self) -> float:
        """1-NN top-1 on val against the bank's rows, percent."""
        hits = self.classes[banks.nearest(self.embeddings(self.val), self.banks)] == self.val_classes
        return 100 * float(hits.double().mean())

    @torch.no_grad()
    def calibrate(self) -> None:
        """BatchNorm statistics by one pass over plain training images, for an encoder that takes no step."""
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.model.train()
        for index in torch.arange(len(self.images)).split(self.params.batch):
            self.model.embed(self._view(self.images, index, None))

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds as tensors, on the first rank; all ranks ask."""
        buffers = {
            f"optim.{i}": self.optimiser.state[weight]["momentum_buffer"]
            for i, weight in enumerate(self.weights)
            if self.optimiser.state.get(weight, {}).get("momentum_buffer") is not None
        }
        begun = self.objective.labels if self._taken(self.epoch) else {}  # `begin` makes those of a new epoch
        return (
            {f"model.{name}": value for name, value in self.model.state_dict().items()}
            | {f"bank.{name}": bank.whole() for name, bank in self.banks.items()}
            | {f"labels.{name}": banks.collect(self.banks[name], value) for name, value in begun.items()}
            | {f"objective.{name}": value for name, value in self.objective.state().items()}
            | {f"parameter.{i}": value.data for i, value in enumerate(self.objective.parameters())}
            | buffers
        )

    def facts(self) -> dict[str, Any]:
        """Everything else a checkpoint holds."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "chain": self.chain,
            "monitor": self.monitor,
            "sums": self.sums,
        }

    def resume(self, saved: checkpoint.Checkpoint | None) -> None:
        """Restores a checkpoint; None starts anew."""
        if saved is None:
            return
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value if group == "bank" else value.to(self.device)
        self.model.load_state_dict(groups["model"])
        for name, rows in groups["bank"].items():
            self.banks[name].load(rows)
        self.objective.labels = {n: banks.held(self.banks[n], v) for n, v in groups.get("labels", {}).items()}
        self.objective.load_state(groups.get("objective", {}))
        for i, parameter in enumerate(self.objective.parameters()):
            parameter.data.copy_(groups["parameter"][str(i)])
        for i, weight in enumerate(self.weights):
            if str(i) in groups.get("optim", {}):
                self.optimiser.state[weight]["momentum_buffer"] = groups["optim"][str(i)]
        for name in ("epoch", "step", "history", "chain", "monitor", "sums"):
            setattr(self, name, saved.facts[name])

    def write(self, out: Path) -> None:
        """Writes the run's artefacts; all ranks call it, the first one writes."""
        rows = {name: bank.whole().cpu().contiguous() for name, bank in self.banks.items()}
        if not self.world.leader:
            return
        encoders.save(out / "encoder.safetensors", self.model)
        files.write_bytes(out / "bank.safetensors", to_safetensors(rows, {"split": self.params.split}))
        for name, lines in (("history.jsonl", self.history), ("chain.txt", self.chain)):
            files.write_text(out / name, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))

    def metrics(self) -> dict[str, Any]:
        """The run's metrics document; reads train and val only. All ranks ask together."""
        last = self.history[-1] if self.history else {}
        fresh = self.params.epochs
        pair = [self.embeddings(self.val, epoch=fresh, view=view) for view in (0, 1)]
        mi, fallen = diagnostics.held_out(self.objective, *pair), diagnostics.collapse(self.objective, *pair)
        shares = [line["certified_share"] for line in self.history if "certified_share" in line]
        k, tau = self.objective.k, self.objective.tau
        claim = {"yes": "bound by its form", "certified": "bound only where certified", "no": "objective only"}
        cells = {
            "estimate": (
                last.get("estimate"),
                "nats",
                f"mean over the last epoch; k {k}; {claim[self._claim()]}",
            ),
            "cap": (last.get("cap"), "nats", "largest estimate that k draws from the region allow"),
            "nce_at_equal_f": (self._nce(), "nats", f"unrestricted ir estimate of the final f, fresh views, k {k}"),
            "mi_views": (mi, "nats", f"held out: two fresh views of {len(self.val)} val images, tau {tau}"),
            "certified_share": (
                (None, metrics.BY_FORM, "a bound by its form needs no certificate")
                if self._claim() == "yes"
                else (sum(shares) / len(shares) if shares else None, "", "share of epochs with a certificate")
            ),
            "images_seen": (self.step * self.params.batch, "", "training images drawn"),
            "parameters": (encoders.count(self.model), "", "trainable parameters of the encoders"),
        } | {
            name: (last.get(name), "", "last batch of the last epoch")
            for name in ("t3_share", "fallback_share", "own_copies", "same_class_share")
        }
        views = f"two fresh views of {len(self.val)} val images"
        units = {"covariance_rank": "", "alignment": "", "uniformity": "nats"}
        cells |= {name: (fallen[name], unit, views) for name, unit in units.items()}
        detail = {"warnings": self.warnings, "chain": self.chain[-1]["chain"] if self.chain else None}
        run = f"{self.run.row}-s{self.run.seed}"
        rows = {name: metrics.cell(*values) for name, values in cells.items()}
        return metrics.document("pretrain", run, self.run.row, self.run.seed, rows, detail)

    def _claim(self) -> str:
        return self.objective.claim if self.objective.bounded else "no"

    def _nce(self) -> float | None:
        if self.total_steps == 0 or self.objective.uses_labels:
            return None
        position = Step(self.run.seed, self.total_steps, self.total_steps, self.params.epochs, self.params.epochs)
        z = self.embeddings(self.images, epoch=self.params.epochs)
        return diagnostics.nce(self.objective, z, self.banks, position)
