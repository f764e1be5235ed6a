"""Counts where the host would wait for a GPU in one optimizer step, on a CPU.

A tensor counts as one on the device if it is a weight or a buffer of the model, went through accelerate's
`send_to_device`, was created on a given device, or was computed from such a tensor. A wait is an operation whose result
the host needs before it can go on: a value read from the device, or a result whose size depends on values.

    with count_waits(step=2) as found:
        train(recipe)
    found.waits  # {(operation, place in the source): count}
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import accelerate.accelerator
import accelerate.data_loader
import accelerate.utils
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nesso_tune.training import dpo, sft
from nesso_tune.training.callbacks import IntervalCallback
from nesso_tune.training.trainer import BaseTrainer

WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::is_nonzero", "aten::equal", "aten::masked_scatter_backward",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


@dataclass
class Found:
    """What one step does: waits and copies to the device by place, operations on the device, and micro batches."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    micro_batches: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found
        self._on_device: dict[int, Any] = {}  # storages are kept alive, so that no id is used twice

    def mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._on_device[storage._cdata] = storage

    def marked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._on_device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device, name = any(map(self.marked, tensors)), func.name().split(".")[0]
        if on_device:
            self.found.operations += not func.is_view
            if name in WAITS or (name in INDEXING and any(_is_mask(index) for index in args[1])):
                self.found.waits[name, _place()] += 1
        with torch._C.DisableTorchFunctionSubclass():  # as in C++: results are plain tensors
            out = func(*args, **kwargs)
        if on_device:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.mark(leaf)
        return out


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _place() -> str:
    """The innermost line of the package, and the line of a library that it called."""
    frames = [frame for frame in traceback.extract_stack() if "device_waits" not in frame.filename]
    own = [i for i, f in enumerate(frames) if "/nesso_tune/" in f.filename and "site-packages" not in f.filename]
    libraries = [
        i for i, f in enumerate(frames) if any(f"/{n}/" in f.filename for n in ("trl", "transformers", "accelerate"))
    ]
    at = max(own[-1:] + libraries[-1:])
    frame = frames[at]
    return f"{frame.filename.rsplit('/', 2)[-2]}/{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.line}"


@contextmanager
def count_waits(step: int) -> Iterator[Found]:
    """Counts the waits of optimizer step `step` of the run inside, between fetching its batches and its update."""
    found = Found()
    watch = _Watch(found)
    active = False

    def begin(trainer: BaseTrainer) -> None:
        nonlocal active
        if not active and trainer.state.global_step + 1 == step:
            for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), trainer.run_state.metrics._sums):
                watch.mark(tensor)
            active = True
            watch.__enter__()

    def end() -> None:
        nonlocal active
        if active:
            active = False
            watch.__exit__(None, None, None)

    get_batches, training_step, send = (
        BaseTrainer.get_batch_samples, BaseTrainer.training_step, accelerate.utils.send_to_device
    )  # fmt: skip
    reads = {name: getattr(Tensor, name) for name in ("tolist", "cpu", "numpy")}
    create = torch.tensor

    def get_batch_samples(self: BaseTrainer, *arguments: Any) -> Any:
        begin(self)
        return get_batches(self, *arguments)

    def counted_step(self: BaseTrainer, *arguments: Any, **options: Any) -> Any:
        found.micro_batches += active
        return training_step(self, *arguments, **options)

    def sent(data: Any, *arguments: Any, **options: Any) -> Any:
        out = send(data, *arguments, **options)
        for leaf in _leaves(out):
            watch.mark(leaf)
            found.copies["a batch"] += active
        return out

    def created(*arguments: Any, **options: Any) -> Tensor:
        made = create(*arguments, **options)
        if active and options.get("device") is not None:
            watch.mark(made)
            found.copies[_place()] += 1
        return made

    def reading(name: str) -> Any:
        def read(self: Tensor, *arguments: Any, **options: Any) -> Any:
            if active and watch.marked(self):
                found.waits[name, _place()] += 1
            return reads[name](self, *arguments, **options)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseTrainer, "get_batch_samples", get_batch_samples)
        patch.setattr(BaseTrainer, "training_step", counted_step)
        for module in (accelerate.utils, accelerate.data_loader, accelerate.accelerator, accelerate.utils.operations,
                       sft, dpo):  # fmt: skip
            if hasattr(module, "send_to_device"):
                patch.setattr(module, "send_to_device", sent)
        patch.setattr(torch, "tensor", created)
        for name in reads:
            patch.setattr(Tensor, name, reading(name))
        on_step_end = IntervalCallback.on_step_end

        def ended(self: Any, *arguments: Any, **options: Any) -> Any:
            end()
            return on_step_end(self, *arguments, **options)

        patch.setattr(IntervalCallback, "on_step_end", ended)
        try:
            yield found
        finally:
            end()


def _leaves(data: Any) -> list[Tensor]:
    """The tensors of a batch, also those in dataclasses."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, dict):
        return [leaf for value in data.values() for leaf in _leaves(value)]
    if isinstance(data, (list, tuple)):
        return [leaf for value in data for leaf in _leaves(value)]
    fields = getattr(data, "__dataclass_fields__", {})
    return [leaf for name in fields for leaf in _leaves(getattr(data, name))]
