"""Saving and loading the checkpoints of a training run; see `runs/checkpoint.py` for their layout on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from nesso_tune.runs import checkpoint as ckpt
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.layout import delete_overwritten
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training import state_dict
from nesso_tune.training.run_state import RunState, reshard_state


@dataclass(frozen=True)
class Checkpointer:
    """Writes the checkpoints of a run. Every rank takes part in each of them.

    Attributes:
        disk: checks that there is space before each save.
        keep: number of newest checkpoints that are kept.
        sharded: each rank writes its own shard of the tensors.
        provenance: written into every manifest.
    """

    disk: DiskSpace
    keep: int
    sharded: bool
    provenance: RunFacts

    def save(self, trainer: Trainer, state: RunState, epoch: float) -> None:
        """Saves a checkpoint of the current step and removes old ones.

        Args:
            trainer: holds the weights and the optimizer.
            state: of this rank.
            epoch: epochs trained, for the manifest.
        """
        run, step = Path(trainer.args.output_dir), trainer.state.global_step
        is_main = trainer.accelerator.is_main_process
        writer = ckpt.CheckpointWriter(run, step)
        if is_main:
            self.disk.check_save(step)
            writer.begin()
        trainer.accelerator.wait_for_everyone()
        rank, counters = trainer.accelerator.process_index, state.state_dict()
        writer.write_json(f"rng-{rank}.json", state_dict.get_rng_state())
        writer.write_json(_state_file(rank), counters)
        self._save_tensors(trainer, writer)
        if is_main:
            trainer.state.save_to_json(str(writer.staging / TRAINER_STATE_NAME))
            writer.adopt(TRAINER_STATE_NAME)
        each = gather_object([(writer.file_records(), state.tokens, state.supervised_tokens)])
        if is_main:
            files = {name: entry for written, *_ in each for name, entry in written.items()}
            progress = {
                "step": step,
                "epoch": epoch,
                "tokens": sum(tokens for _, tokens, _ in each),
                "supervised_tokens": sum(supervised for *_, supervised in each),
                **({} if state.best is None else {"best": state.best.state_dict()}),
            }
            written = writer.finish({**self.provenance.to_dict(), **progress}, files)
            delete_overwritten(run)
            ckpt.prune(run, self.keep, written)
        trainer.accelerator.wait_for_everyone()

    def _save_tensors(self, trainer: Trainer, writer: ckpt.CheckpointWriter) -> None:
        model, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
        if self.sharded:
            state_dict.save_shards(writer.staging, model, optimizer)
            writer.adopt(state_dict.shard_pattern(trainer.accelerator.process_index))
            return
        # the optimizer first: its file is the larger one, and is hashed while the weights are written
        moments = state_dict.get_optimizer_state(model, optimizer)
        if trainer.accelerator.is_main_process:
            writer.write_tensors(ckpt.MOMENTS, moments)
        del moments  # never hold both in memory
        weights = state_dict.get_weights(model)
        if trainer.accelerator.is_main_process:
            writer.write_tensors(ckpt.WEIGHTS, weights)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint, sharded or whole."""
    if state_dict.is_sharded(checkpoint):
        state_dict.load_shards(checkpoint, model)
    else:
        state_dict.set_weights(model, ckpt.read_tensors(checkpoint, ckpt.WEIGHTS))


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Loads the optimizer state of a checkpoint, sharded or whole."""
    if state_dict.is_sharded(checkpoint):
        state_dict.load_shards(checkpoint, model, optimizer)
    else:
        state_dict.set_optimizer_state(model, optimizer, ckpt.read_tensors(checkpoint, ckpt.MOMENTS))


def read_run_state(checkpoint: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The `RunState.state_dict` that a rank resumes with."""
    saved = range(_saved_world_size(checkpoint))
    return reshard_state([ckpt.read_json(checkpoint, _state_file(i)) for i in saved], rank, world_size)


def load_rng_state(checkpoint: Path, rank: int, world_size: int, seed: int) -> None:
    """Restores the random states of a rank.

    If the world size has changed, no saved state belongs to this rank: it is reseeded deterministically from `seed`.
    """
    if _saved_world_size(checkpoint) == world_size:
        state_dict.set_rng_state(ckpt.read_json(checkpoint, f"rng-{rank}.json"))
    else:
        set_seed(seed + rank)


def _saved_world_size(checkpoint: Path) -> int:
    return len(list(checkpoint.glob("counters-*.json")))


def _state_file(rank: int) -> str:
    return f"counters-{rank}.json"
