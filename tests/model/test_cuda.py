"""Settings of CUDA: the allocator and deterministic algorithms."""

import os
from contextlib import suppress

import pytest
import torch

from nesso_tune import RecipeError
from nesso_tune.model.cuda import ALLOCATOR_VARIABLES, deterministic_algorithms, use_expandable_segments


def test_segments_of_the_allocator_grow_unless_the_user_has_configured_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    environment = {}
    use_expandable_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ALLOCATOR_VARIABLES:
        environment = {name: "max_split_size_mb:512"}
        use_expandable_segments(environment)
        assert environment == {name: "max_split_size_mb:512"}


def test_a_build_without_cuda_gets_no_allocator_setting(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    environment = {}
    use_expandable_segments(environment)
    assert environment == {}


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
def test_torch_accepts_the_setting():
    """A misspelled option would be an error at the first allocation on a GPU."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    with pytest.raises(ValueError, match="Unrecognized key"):
        torch._C._accelerator_setAllocatorSettings("expandable_segment:True")


def test_on_cpus_deterministic_changes_nothing(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(True):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_on_gpus_operations_are_deterministic_for_the_run(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")  # restored at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with suppress(KeyError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    error = pytest.raises(RecipeError, match=r"train.deterministic: cuBLAS is not deterministic with .*=:0:0")
    with error, deterministic_algorithms(True):
        pass
