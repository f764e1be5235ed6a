"""The command line with FSDP on CPU, and the number of all-gathers while prompts are answered. For tests only.

ALL_GATHERS: file for the number of each evaluation on rank 0. LAYER_BY_LAYER: as if the whole weights did not fit.
"""

import os

from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import tests.support.fsdp_on_cpu  # noqa: F401 - promotes FSDP on CPU
from nesso_tune.training import fit
from nesso_tune.training.evaluator import Evaluator

gather, generate, count = _fsdp_param_group.foreach_all_gather, Evaluator._generate, 0


def counted_gather(*arguments, **options):
    global count
    count += 1
    return gather(*arguments, **options)


def counted_generate(self, trainer, prompts):
    before = count
    answers = generate(self, trainer, prompts)
    if os.environ["RANK"] == "0":
        with open(os.environ["ALL_GATHERS"], "a", encoding="utf-8") as stream:
            stream.write(f"{count - before}\n")
    return answers


_fsdp_param_group.foreach_all_gather, Evaluator._generate = counted_gather, counted_generate
if "LAYER_BY_LAYER" in os.environ:
    fit._shares_prompts = lambda recipe, plan: False

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
