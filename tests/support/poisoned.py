"""The command line with a NaN loss at one step on one rank. For tests only.

NAN_AT_STEP, NAN_AT_RANK: step and rank. NAN_IN=weights: NaN in the last row of the first weight after that step
instead; with sharded weights, in the shard of that rank.
"""

import math
import os

from torch.distributed.tensor import DTensor

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.callbacks import IntervalCallback
from nesso_tune.training.sft import ConversationTrainer

STEP, RANK = int(os.environ["NAN_AT_STEP"]), int(os.environ["NAN_AT_RANK"])
compute = ConversationTrainer.compute_loss


def nan_loss(self, *arguments, **options):
    loss = compute(self, *arguments, **options)
    here = self.state.global_step + 1 == STEP and self.accelerator.process_index == RANK
    return loss * math.nan if here else loss


def nan_weight(self, args, state, control, model=None, **more):
    weight = next(iter(model.parameters())).detach()
    sharded = isinstance(weight, DTensor)
    if state.global_step == STEP and (not sharded or int(os.environ["RANK"]) == RANK):
        (weight.to_local() if sharded else weight)[-1] = math.nan
    return on_step_end(self, args, state, control, model=model, **more)


if os.environ.get("NAN_IN") == "weights":
    on_step_end, IntervalCallback.on_step_end = IntervalCallback.on_step_end, nan_weight
else:
    ConversationTrainer.compute_loss = nan_loss

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
