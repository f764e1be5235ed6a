"""`torch.compile` of the decoder layers: the elementwise work between the matrix products becomes a few kernels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from nesso_tune.errors import RunEnvironmentError


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every decoder layer of a model in place, for rows of one constant length.

    What compiled code makes depends on software and machine alone, so that a resumed run rounds as the first did.

    Raises:
        RunEnvironmentError: if nothing can be compiled here.
    """
    if (lacking := _lacking()) is not None:
        raise RunEnvironmentError("train.torch_compile", lacking, "install it, or set torch_compile: false")
    blocks = set(model._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=False)


def can_compile() -> bool:
    """Whether this machine has what compiled code is built with."""
    return _lacking() is None


def _lacking() -> str | None:
    if torch.cuda.is_available():
        return None  # torch brings Triton along
    compilers = ("g++", "clang++", "c++")
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is installed ({', '.join(compilers)})"


@contextmanager
def not_compiled() -> Iterator[None]:
    """Layers compute as they are written: for rows of other lengths, and with other needs, than those of training."""
    with torch.compiler.set_stance("force_eager"):
        yield
