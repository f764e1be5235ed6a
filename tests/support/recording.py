"""The command line with FSDP on CPU processes, noting what each process does. For tests only.

ROWS_READ: a file that gets the position of every row of the run that is read. FIRST_GRADIENTS: a file that gets the
gradients of the first optimizer step, before clipping, whole and by canonical name.
"""

import json
import os

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.order import RunOrder
from nesso_tune.training.state import canonical
from nesso_tune.training.trainer import TrackedTrainer

read, clip = RunOrder.__getitem__, TrackedTrainer._clip_grad_norm


def noted(self, position):
    if file := os.environ.get("ROWS_READ"):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(position) + "\n")
    return read(self, position)


def kept(self, model):
    file = os.environ.get("FIRST_GRADIENTS")
    if file and self.state.global_step == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        if self.is_world_process_zero():
            save_file({canonical(name): g.contiguous() for name, g in whole.items()}, file)
    return clip(self, model)


RunOrder.__getitem__, TrackedTrainer._clip_grad_norm = noted, kept

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
