"""Kernels that a computation launches and the bytes that they move, without running them.

Eager kernels are the operations that are not views. Compiled kernels are the nodes that Inductor's scheduler has after
fusion, with the bytes that it states for each. Both count every input and every output of a kernel once.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = {"aten::detach", "aten::empty", "aten::empty_like", "aten::alias", "aten::_unsafe_view", "aten::lift_fresh",
             "aten::new_empty", "aten::empty_strided", "prim::device"}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, `fused` for one that Inductor generates, and the bytes that it reads and writes."""

    name: str
    bytes: int

    @property
    def elementwise(self) -> bool:
        """Whether it is neither a matrix product nor attention."""
        return not any(word in self.name for word in ("mm", "attn"))


class EagerKernels(TorchDispatchMode):
    """Lists the kernels of a block in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if not func.is_view and name not in NO_KERNEL:
            inputs = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.found.append(Kernel(name, sum(map(_bytes, [*inputs.values(), *outputs]))))
        return out


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; those of an expanded dimension are there once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


class _ReadError(Exception):
    """Ends a compilation whose kernels have been read."""


def compiled_with(found: list[list[Kernel]]) -> Callable[[Any, Any], Any]:
    """A backend of torch.compile that appends the kernels of each graph, forward and backward, to `found`.

    No code is generated: the graphs run as they are, also on fake tensors.
    """

    def read(nodes: list[Any]) -> list[Any]:
        found.append([kernel for node in nodes if (kernel := _kernel(node)) is not None])
        raise _ReadError

    def inner_compile(graph: Any, inputs: Any, **options: Any) -> Any:
        plain = copy.deepcopy(graph)
        try:
            with config.patch(_post_fusion_custom_pass=read, force_disable_caches=True):
                compile_fx_inner(graph, inputs, **options)
        except Exception as error:
            if "_ReadError" not in repr(error):
                raise

        def run(arguments: list[Any]) -> Any:
            own = list(arguments)
            arguments.clear()
            return plain.forward(*own)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner_compile)


def _kernel(node: Any) -> Kernel | None:
    """A node of the scheduler as a kernel; None if it launches none."""
    kind = type(node).__name__
    if "Extern" not in kind:
        return None if "Nop" in kind else Kernel("fused", node.get_read_write_buffers_sizes())
    name = str(getattr(node.node, "python_kernel_name", None))
    return None if "MultiOutput" in type(node.node).__name__ else Kernel(name, node.get_read_write_buffers_sizes())
