"""Saves the gradients of the first optimizer step before clipping. For tests only."""

import os

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from nesso_tune.training.state_dict import canonical_name
from nesso_tune.training.trainer import BaseTrainer

clip = BaseTrainer._clip_grad_norm


def clip_and_save(self, model):
    """Replaces `_clip_grad_norm`: writes the full gradients by canonical name to the file FIRST_GRADIENTS."""
    file = os.environ.get("FIRST_GRADIENTS")
    if file and self.state.global_step == 0:
        gradients = {canonical_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        if self.is_world_process_zero():
            save_file({name: gradient.contiguous() for name, gradient in whole.items()}, file)
    return clip(self, model)
