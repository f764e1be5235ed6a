"""A program that trains recipes on several ranks with the library, and goes on after an error. For tests only."""

import os
import sys

from nesso_tune import load_recipe, train
from tests.support import waiting_group  # noqa: F401 - its process group waits for all ranks

if __name__ == "__main__":
    for path in sys.argv[1:]:
        try:
            print("trained", train(load_recipe(path)).trained, flush=True)
        except Exception as error:
            print("caught", type(error).__name__, flush=True)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads must not outlive their objects
