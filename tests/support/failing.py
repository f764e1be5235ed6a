"""The command line with a full disk on rank 1 at its first checkpoint. For tests only."""

import errno

from nesso_tune.runs.checkpoint import CheckpointWriter

write = CheckpointWriter.write_json


def full(self, name, data):
    if name == "rng-1.json":
        raise OSError(errno.ENOSPC, "No space left on device", str(self.staging / name))
    write(self, name, data)


CheckpointWriter.write_json = full

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
