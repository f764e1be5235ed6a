"""Provenance of a run: what it is made of and where it runs, as its manifests record it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from nesso_tune.cache import key_of
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.recipes.secrets import masked_word

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers")
# Version of the `data` fingerprint: 3 covers the tokens alone, 2 covered the bytes of the files too, 1 their paths.
DATA_IDENTITY = 3
_BYTE_IDENTITY = 2


@dataclass(frozen=True)
class RunFacts:
    """What the manifests of a run and of its checkpoints record; the names of the fields are their JSON keys.

    Attributes:
        nesso_tune: version of nesso-tune.
        versions: versions of the libraries that the result depends on.
        python: version of Python.
        base: hash of the base model's configuration and weights.
        tokenizer: fingerprint of the tokenizer and the chat template.
        data: fingerprint of the prepared data.
        identity: how `data` was computed, see `DATA_IDENTITY`.
        start: what training starts from: base, tokenizer and data.
        recipe_hash: hash of the resolved recipe.
        world_size: number of ranks.
        global_batch: rows per optimizer step, over all ranks.
        micro_batch: rows per rank and forward pass, as the recipe says or `auto` chose.
        fsdp: `full_shard`, `hybrid_shard` or `none`, likewise.
        threads: CPU threads of torch.
        device: name of the GPU, or `cpu`.
        attention: implementation of attention and its kernel.
        unpacked: the recipe asks for packing, but the model cannot isolate packed documents.
        torch_compile: whether layers are compiled.
        frozen_weights: precision of the frozen base under an adapter; None without one.
        command: the command line, without secrets and private names.
    """

    nesso_tune: str
    versions: dict[str, str]
    python: str
    base: str
    tokenizer: str
    data: str
    identity: int
    start: str
    recipe_hash: str
    world_size: int
    global_batch: int
    micro_batch: int
    fsdp: str
    threads: int
    device: str
    attention: str
    unpacked: bool
    torch_compile: bool
    frozen_weights: str | None
    command: list[str]

    @classmethod
    def collect(
        cls, recipe: Recipe, data: PreparedData, plan: Plan, base: str, attention: str = "",
        identity: int = DATA_IDENTITY,
    ) -> RunFacts:  # fmt: skip
        """Collects the facts of a run in this process.

        Args:
            recipe: the recipe as the user gave it.
            data, plan: the prepared data and the plan that are trained on.
            base: hash of the base model, from `model.loading.base_hash`.
            attention: implementation of attention in words.
            identity: version of the data fingerprint; that of its manifest for a run that resumes.
        """
        import torch

        fingerprint = data.byte_fingerprint if identity == _BYTE_IDENTITY else data.summary.fingerprint

        quantizer = ("bitsandbytes",) if recipe.needs_bitsandbytes else ()
        return cls(
            nesso_tune=version("nesso-tune"),
            versions={name: version(name) for name in (*PACKAGES, *quantizer)},
            python=platform.python_version(),
            base=base,
            tokenizer=data.chat.fingerprint,
            data=fingerprint,
            identity=identity,
            start=f"{base}-{data.chat.fingerprint}-{fingerprint}",
            recipe_hash=key_of(dump(recipe)),
            world_size=plan.processes,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            fsdp="none" if not plan.sharded else "full_shard" if plan.replicas == 1 else "hybrid_shard",
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            attention=attention,
            unpacked=data.summary.packing.unpacked,
            torch_compile=plan.torch_compile,
            frozen_weights=recipe.model.dtype if recipe.model.adapter is not None else None,
            command=_command(Privacy(recipe.data)),
        )

    def trained_by(self, plan: Plan) -> RunFacts:
        """The facts with the micro batch of a plan that was changed before the first step."""
        return replace(self, micro_batch=plan.micro_batch)

    def resumed(self, manifest: Mapping[str, Any]) -> RunFacts:
        """The facts of a run that resumes the checkpoint with this manifest.

        The base stays in the precision that the run began with; runs that did not record it began in float32.
        """
        if self.frozen_weights in (None, "float32"):
            return self
        return replace(self, frozen_weights=manifest.get("frozen_weights") or "float32")

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON data."""
        return asdict(self)


def data_identity(manifest: Mapping[str, Any]) -> int:
    """The version of the data fingerprint with which a run with this manifest can be compared."""
    return _BYTE_IDENTITY if manifest.get("identity") == _BYTE_IDENTITY else DATA_IDENTITY


def _command(privacy: Privacy) -> list[str]:
    """The command line of this process, without secrets and private names."""
    words = [word.encode("utf-8", "backslashreplace").decode() for word in sys.argv]
    return privacy.shown_command([masked_word(word) for word in words])
