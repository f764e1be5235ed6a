"""Settings of CUDA that hold for a process: the memory allocator, and deterministic algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch

from nesso_tune.errors import RecipeError

# torch reads the first of these at the first allocation; the others are its older names, which still work
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # with others, cuBLAS may choose another algorithm on each call


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Lets CUDA's allocator grow its segments, unless the user has configured it: rows of changing length then fragment
    the memory less. Has no effect after the first allocation on a GPU."""
    if torch.version.cuda is not None and not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Makes operations on GPUs deterministic if `enabled`; on CPUs they are, and nothing changes.

    Raises:
        RecipeError: if CUBLAS_WORKSPACE_CONFIG is set to a value with which cuBLAS is not deterministic.
    """
    if not enabled or not torch.cuda.is_available():
        yield
        return
    chosen = os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if torch.version.cuda is not None and chosen not in DETERMINISTIC_WORKSPACES:
        raise RecipeError(
            "train.deterministic", f"cuBLAS is not deterministic with {WORKSPACE}={chosen}",
            f"unset {WORKSPACE}, or set it to {DETERMINISTIC_WORKSPACES[0]}",
        )  # fmt: skip
    before, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention is not deterministic; torch 2.15 prefers it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
