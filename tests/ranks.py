"""One rank of small runs: `python -m tests.ranks DATA WORK OBJECTIVES SHARDS [EPOCHS]`; torchrun's variables as usual.

OBJECTIVES is a list with commas; SHARDS is the number of shards, or with that of the bank's, as in 4:2; EPOCHS below 3
leaves after so many, as a preempted job does. The variable MIREPRO_TEST_DIE=RANK:STEP kills that rank before that step;
MIREPRO_TEST_FAIL=RANK:STEP makes it raise; MIREPRO_TEST_STOP=RANK:STEP tells it to stop, with code 9;
MIREPRO_TEST_MOVE=RANK:STEP makes it change a row of its banks. Checkpoints are written between epochs, with
MIREPRO_TEST_OFTEN every second step.
"""

import gc
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from mirepro import checkpoint, cli, files, pretrain
from mirepro.errors import UserError
from mirepro.notice import NOTICE
from tests.test_pretrain import run

EPOCHS = 3


class Faulty(pretrain.Trainer):
    """Breaks where it is told to."""

    last = EPOCHS

    def train_step(self, index):
        here = f"{self.world.rank}:{self.step}"
        if os.environ.get("MIREPRO_TEST_DIE") == here:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("MIREPRO_TEST_FAIL") == here:
            raise ZeroDivisionError("the cause")
        if os.environ.get("MIREPRO_TEST_STOP") == here:
            NOTICE.give(partial(sys.exit, 9), 300.0)
        if os.environ.get("MIREPRO_TEST_MOVE") == here:
            for bank in self.banks.values():
                bank.rows[-1, 0] = torch.nextafter(bank.rows[-1, 0], torch.tensor(2.0))
        return super().train_step(index)

    def begin(self, epoch):
        if epoch == self.last:
            with self.world:
                pass
            sys.exit(0)
        super().begin(epoch)

    def resume(self, saved):
        super().resume(saved)
        self.world.lead(print, f"resumed at {self.step}")
        held = len(self.images) // self.world.size if self.params.bank_shards else len(self.images)
        assert all(len(bank.rows) == held for bank in self.banks.values())


def take_turns(mark: Path) -> None:
    """The first rank's last store must be gone before another rank looks for the next one at the same port."""
    end = time.monotonic() + 60
    if os.environ["RANK"] == "0":
        gc.collect()
        mark.touch()
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.01)


def train(data: str, work: str, objectives: str, shards: str, epochs: str = str(EPOCHS)) -> None:
    """Trains each objective in a folder of its own; the first rank writes the metrics beside the outputs."""
    checkpoint.BETWEEN_SECONDS, pretrain.Trainer, Faulty.last = -1.0, Faulty, int(epochs)
    if "MIREPRO_TEST_OFTEN" in os.environ:
        checkpoint.WITHIN_SECONDS, pretrain.WITHIN_STEPS, checkpoint.WITHIN_SHARE = -1.0, 2, math.inf
    if "MIREPRO_TEST_STOP" in os.environ:
        pretrain.WITHIN_STEPS = 2
    own, _, blocks = shards.partition(":")
    for number, objective in enumerate(objectives.split(",")):
        if number and "MASTER_PORT" in os.environ:
            take_turns(Path(work) / f".next-{os.environ['MASTER_PORT']}-{number}")
        folder = Path(work) / objective
        (folder / "out").mkdir(parents=True, exist_ok=True)
        params = run(objective, shards=int(own), bank_shards=int(blocks or 0), epochs=EPOCHS)
        metrics = pretrain.pretrain(params, Path(data), folder, folder / "out", "f")
        if metrics:
            files.write_json(folder / "out" / "metrics.json", metrics)


if __name__ == "__main__":
    try:
        train(*sys.argv[1:])
    except UserError as error:
        cli.complain(str(error), 2)
