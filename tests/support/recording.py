"""The command line with FSDP on CPU processes, noting which rows of the run each process reads. For tests only."""

import json
import os

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.order import RunOrder

original = RunOrder.__getitem__


def noted(self, position):
    with open(os.environ["ROWS_READ"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(position) + "\n")
    return original(self, position)


RunOrder.__getitem__ = noted

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
