"""Settings of CUDA: the allocator and deterministic algorithms."""

import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from nesso_tune import RecipeError
from nesso_tune.model import cuda
from nesso_tune.model.cuda import (
    ALLOCATOR_VARIABLES,
    bind_to_near_cores,
    deterministic_algorithms,
    use_expandable_segments,
)
from nesso_tune.planning.hardware import BINDING_VARIABLE


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


CASES = [
    ("0-1,8\n", {0, 1, 2, 8}, "2", {0, 1, 8}),  # near its GPU, and in the allocation of the job
    ("0-63", {64, 65}, "1", None),  # the job has none of them
    ("0", {0, 1, 2, 3}, "4", None),  # fewer than its threads
    (None, {0, 1}, "1", None),  # the system does not say
]


@pytest.mark.parametrize(("near", "allowed", "threads", "expected"), CASES)
def test_a_process_stays_on_the_cores_near_its_gpu(near, allowed, threads, expected, tmp_path, monkeypatch):
    (folder := tmp_path / "0001:c1:00.0").mkdir()
    if near is not None:
        (folder / "local_cpulist").write_text(near)
    device, bound = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xC1, pci_device_id=0), []
    monkeypatch.setattr(cuda, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: device}.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append(cores))
    for name, value in {"LOCAL_RANK": "3", "OMP_NUM_THREADS": threads}.items():
        monkeypatch.setenv(name, value)
    bind_to_near_cores()
    assert bound == [], "only jobs ask for it"
    monkeypatch.setenv(BINDING_VARIABLE, "1")
    bind_to_near_cores()
    assert bound == ([] if expected is None else [expected])
