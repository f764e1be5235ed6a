"""The command line with FSDP on CPU and a log of the rows each process reads. For tests only.

ROWS_READ: file for the position of every row that is read. FIRST_GRADIENTS: see `gradients.py`.
"""

import json
import os

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.trainer import BaseTrainer
from tests.support.gradients import clip_and_save

read = RunDataset.__getitem__


def logged_read(self, position):
    if file := os.environ.get("ROWS_READ"):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(position) + "\n")
    return read(self, position)


RunDataset.__getitem__, BaseTrainer._clip_grad_norm = logged_read, clip_and_save

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
