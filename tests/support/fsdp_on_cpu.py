"""Runs the command line with FSDP on CPU processes. For tests only.

accelerate silently replaces FSDP by DDP on CPU, because it only promotes the distributed types of GPUs. This patch
promotes `MULTI_CPU` too, which allows testing FSDP2 (gloo, DTensor parameters) without a GPU.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def init_with_fsdp(self, *arguments, **options):
    original(self, *arguments, **options)
    plugin = options.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin


AcceleratorState.__init__ = init_with_fsdp

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
