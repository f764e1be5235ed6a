"""Runs on a CPU as on a GPU that has no memory for a micro batch of more than some rows. For tests only.

As a program: the command line, with ROWS_OF_RANK, the number of rows that fit on each rank, such as `4,2`, and
MEMORY_OF_RANK, the GiB of each GPU, 80 by default.
"""

import os
from contextlib import contextmanager

import pytest
import torch

import nesso_tune.run
from nesso_tune.distributed import world
from nesso_tune.distributed.process_group import world_size
from nesso_tune.planning.hardware import GIB, Gpu
from nesso_tune.planning.plan import World

LENGTH = 128  # tokens of a packed row


def limit_rows(model, rows, length=LENGTH):
    """Makes the forward pass of a model raise what CUDA raises, for more than `rows` rows of tokens."""

    def check(_, __, arguments):
        if arguments["input_ids"].numel() > rows * length:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    return model.base_model.register_forward_pre_hook(check, with_kwargs=True)


@contextmanager
def small_gpu(rows, memory=80 * GIB, length=LENGTH):
    """Runs in this process find such a GPU, whose table has no speeds."""
    load = nesso_tune.run.load_model

    def load_limited(*arguments):
        model = load(*arguments)
        limit_rows(model, rows, length)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "detect_world", lambda: World(world_size(), Gpu("small", memory)))
        patch.setattr(nesso_tune.run, "load_model", load_limited)
        yield


if __name__ == "__main__":
    from nesso_tune.cli.main import main

    rank = int(os.environ["RANK"])
    memory = float(os.environ.get("MEMORY_OF_RANK", "80,80").split(",")[rank])
    with small_gpu(int(os.environ["ROWS_OF_RANK"].split(",")[rank]), round(memory * GIB)):
        main()
