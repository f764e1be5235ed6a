"""The command line with a loss that is NaN at one step on one process. For tests only.

NAN_AT_STEP, NAN_AT_RANK: where.
"""

import math
import os

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training.sft import ConversationTrainer

STEP, RANK = int(os.environ["NAN_AT_STEP"]), int(os.environ["NAN_AT_RANK"])
compute = ConversationTrainer.compute_loss


def wrong(self, *arguments, **options):
    loss = compute(self, *arguments, **options)
    here = self.state.global_step + 1 == STEP and self.accelerator.process_index == RANK
    return loss * math.nan if here else loss


ConversationTrainer.compute_loss = wrong

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
