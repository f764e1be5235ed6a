"""Runs the command line with FSDP on CPU processes. For tests only.

Stock accelerate quietly turns FSDP on CPU into DDP: it promotes only GPU kinds. This promotes `MULTI_CPU` the same
way, so that real FSDP2 (gloo, DTensor parameters) can be tested without a GPU.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def promoted(self, *arguments, **options):
    original(self, *arguments, **options)
    plugin = options.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin


AcceleratorState.__init__ = promoted

if __name__ == "__main__":
    from nesso_tune.cli.main import main

    main()
