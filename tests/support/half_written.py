"""The command line whose write of the checkpoint at step STOPS_AT stays half done for ever. For tests only."""

import os
import time

from nesso_tune.runs import checkpoint

save = checkpoint.save_tensors


def save_half(tensors, file):
    save(tensors, file)
    if file.parent.name == f".checkpoint-{os.environ['STOPS_AT']}.partial":
        os.truncate(file, file.stat().st_size // 2)
        time.sleep(3600)


checkpoint.save_tensors = save_half

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
