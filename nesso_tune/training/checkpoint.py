"""Saving and loading the checkpoints of a training run; see `runs/checkpoint.py` for their layout on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from nesso_tune.distributed.process_group import barrier, exchange_later
from nesso_tune.errors import first_line
from nesso_tune.logs import EVERY_RANK, logger
from nesso_tune.planning.memory import MIN_BACKGROUND_BYTES
from nesso_tune.recipes.schema import CheckpointSection
from nesso_tune.runs import checkpoint as ckpt
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.layout import delete_overwritten
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training import state_dict
from nesso_tune.training.run_state import RunState, reshard_state
from nesso_tune.training.state_dict import HostCopies

CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass
class Checkpointer:
    """Writes the checkpoints of a run. Every rank takes part in each of them.

    In the background, each rank writes from a copy of its state while training goes on, and rank 0 completes the
    checkpoint when all ranks are done. One write is in progress at most. The ranks exchange what they wrote through
    their store, because collective operations belong to the main thread.

    Attributes:
        disk: checks that there is space before each save.
        section: the recipe's `checkpoint`.
        sharded: each rank writes its own shard of the tensors.
        provenance: written into every manifest.
        timeout_s: seconds that rank 0 waits for the other ranks' files.
    """

    disk: DiskSpace
    section: CheckpointSection
    sharded: bool
    provenance: RunFacts
    timeout_s: int
    _background: bool | None = field(default=None, init=False)
    _copies: HostCopies = field(default_factory=HostCopies, init=False)
    _write: Future[None] | None = field(default=None, init=False)

    def save(self, trainer: Trainer, state: RunState, epoch: float) -> None:
        """Saves a checkpoint of the current step and removes old ones, or begins to.

        Args:
            trainer: holds the weights and the optimizer.
            state: of this rank.
            epoch: epochs trained, for the manifest.
        """
        self.wait()
        run, step = Path(trainer.args.output_dir), trainer.state.global_step
        is_main, rank = trainer.accelerator.is_main_process, trainer.accelerator.process_index
        writer = ckpt.CheckpointWriter(run, step)
        if is_main:
            self.disk.check_save(step)
            writer.begin()
        trainer.accelerator.wait_for_everyone()
        writer.write_json(f"rng-{rank}.json", state_dict.get_rng_state())
        writer.write_json(_state_file(rank), state.state_dict())
        if is_main:
            trainer.state.stateful_callbacks = _callback_states(trainer)
            trainer.state.save_to_json(str(writer.staging / TRAINER_STATE_NAME))
            writer.adopt(TRAINER_STATE_NAME)
        best = {} if state.best is None else {"best": state.best.state_dict()}
        facts = {**self.provenance.to_dict(), "step": step, "epoch": epoch, **best}
        tokens = state.tokens, state.supervised_tokens
        if self._background is None:  # once, as the copies are kept in memory
            self._background = self._in_background(trainer)
        exchange = exchange_later(writer.final.name, self.timeout_s, in_thread=self._background)

        def complete() -> None:
            each = exchange((writer.file_records(), *tokens))
            if each is not None:  # on rank 0
                files = {name: entry for written, *_ in each for name, entry in written.items()}
                counts = {"tokens": sum(n for _, n, _ in each), "supervised_tokens": sum(n for *_, n in each)}
                written = writer.finish({**facts, **counts}, files)
                delete_overwritten(run)
                ckpt.prune(run, self.section.keep, written)

        if self._background:
            self._write = _in_thread([*self._copy_tensors(trainer, writer), complete])
        else:
            self._save_tensors(trainer, writer)
            complete()
            trainer.accelerator.wait_for_everyone()

    def wait(self) -> None:
        """Waits until no checkpoint is being written. Raises what made the write fail."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def raise_if_failed(self) -> None:
        """Raises what made a write in the background fail; does not wait for one that is in progress."""
        if self._write is not None and self._write.done():
            self.wait()

    @contextmanager
    def finished_at_end(self) -> Iterator[None]:
        """At the end of the block, on every rank: the last checkpoint is complete, also after an error of the run."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except Exception as error:
                logger.warning(f"the checkpoint in progress is not complete ({first_line(error)})", extra=EVERY_RANK)
            raise
        self.wait()
        barrier()

    def _in_background(self, trainer: Trainer) -> bool:
        """Whether training goes on before the files are written: `auto` asks all ranks."""
        if self.section.asynchronous != "auto":
            return self.section.asynchronous
        size, local = self.disk.checkpoint, int(os.environ.get("LOCAL_WORLD_SIZE") or "1")
        copies = size * local // trainer.accelerator.num_processes if self.sharded else size
        fits = size >= MIN_BACKGROUND_BYTES and 2 * copies <= available_memory()
        return fits if trainer.accelerator.num_processes == 1 else all(gather_object([fits]))

    def _save_tensors(self, trainer: Trainer, writer: ckpt.CheckpointWriter) -> None:
        model, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
        if self.sharded:
            state_dict.save_shards(writer.staging, state_dict.get_shards(model, optimizer))
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

    def _copy_tensors(self, trainer: Trainer, writer: ckpt.CheckpointWriter) -> list[Callable[[], None]]:
        """Copies the state, and returns what writes the copies to the same files as `_save_tensors`."""
        model, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
        if self.sharded:
            shards = self._copies.of(state_dict.get_shards(model, optimizer), model, optimizer)
            pattern = state_dict.shard_pattern(trainer.accelerator.process_index)
            return [state_dict.plan_shards(writer.staging, shards), partial(writer.adopt, pattern)]
        moments = state_dict.get_optimizer_state(model, optimizer, offload=False)
        weights = state_dict.get_weights(model, offload=False)
        if not trainer.accelerator.is_main_process:
            return []
        states = {ckpt.MOMENTS: moments, ckpt.WEIGHTS: weights}
        files = {name: self._copies.of(state, model, optimizer) for name, state in states.items()}
        return [partial(writer.write_tensors, name, tensors) for name, tensors in files.items()]


def _in_thread(steps: list[Callable[[], None]]) -> Future[None]:
    """Runs steps in a thread that does not keep the process alive; what a step holds is freed after it."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            while steps:
                steps.pop(0)()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)

    Thread(target=run, name="nesso-tune checkpoint", daemon=True).start()
    return result


def available_memory() -> int:
    """Free host memory in bytes, also within the limits of the control groups of this process; 0 if it is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        group = CONTROL_GROUPS / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    except (OSError, StopIteration, ValueError):
        return 0
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no limit, or the first version of control groups
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(statistics["inactive_file"]))  # the page cache is given up
    return max(0, free)


def _callback_states(trainer: Trainer) -> dict[str, list[dict[str, Any]]]:
    """The states of the user's callbacks, in their order, by class."""
    states: dict[str, list[dict[str, Any]]] = {}
    for callback in trainer.stateful_callbacks:
        states.setdefault(type(callback).__name__, []).append(callback.state())
    return states


def load_callback_states(trainer: Trainer) -> None:
    """Restores the attributes that the user's callbacks export, in the objects that were passed."""
    left = {name: list(states) for name, states in trainer.state.stateful_callbacks.items() if isinstance(states, list)}
    for callback in trainer.stateful_callbacks:
        if states := left.get(type(callback).__name__):
            for name, value in states.pop(0).get("attributes", {}).items():
                setattr(callback, name, value)


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
