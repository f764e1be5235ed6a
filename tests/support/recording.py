"""The command line with FSDP on CPU processes, noting what each process does. For tests only.

ROWS_READ: a file that gets the position of every row of the run that is read. FIRST_GRADIENTS: see `gradients.py`.
"""

import json
import os

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.trainer import BaseTrainer
from tests.support.gradients import kept

read = RunDataset.__getitem__


def noted(self, position):
    if file := os.environ.get("ROWS_READ"):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(position) + "\n")
    return read(self, position)


RunDataset.__getitem__, BaseTrainer._clip_grad_norm = noted, kept

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
