"""What SFT and DPO share of a trainer: every override of transformers' and TRL's trainers stands here.

Taken over from transformers: data order (`get_train_dataloader`), set-up of FSDP (`_prepare_for_training`), schedule
(`create_scheduler`), checkpoints (`_save_checkpoint`, `_load_*`), evaluation (`evaluate`), what a log line holds
(`log`), and the look at loss and gradient before an update (`training_step`, `_clip_grad_norm`); around its own are put
the time that batches take (`get_batch_samples`) and the end of a run that has stopped early (`_run_epoch`). Taken over
from TRL: telemetry, which is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from nesso_tune.distributed.process_group import from_first
from nesso_tune.model.loading import not_compiled
from nesso_tune.planning.plan import Plan
from nesso_tune.runs import checkpoint as ckpt
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.layout import delete_overwritten
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training import state_dict
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.dataset import RunOrder
from nesso_tune.training.evaluation import Best
from nesso_tune.training.fsdp import set_precision, tied_tables_together
from nesso_tune.training.grouped_metrics import Tally
from nesso_tune.training.numerical_checks import Guard, check_evaluation, check_trained
from nesso_tune.training.state_dict import random_states, set_random_states
from nesso_tune.training.throughput import SQUARES, Throughput, WithSquares

Evaluate = Callable[[Any], dict[str, Any]]  # takes the trainer, returns metrics


@dataclass
class Track:
    """What a run's trainer needs to know beyond TRL's arguments, and what it counts."""

    plan: Plan
    order: RunOrder
    tally: Tally
    guard: Guard
    log: MetricsLog
    alarms: Alarms
    evaluate: Evaluate | None
    best: Best | None  # None: the last weights are taken
    throughput: Throughput
    room: DiskSpace
    keep: int
    in_shards: bool  # each process writes its own share of a checkpoint's tensors
    facts: RunFacts  # recorded in every checkpoint's manifest
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of earlier sessions
    started: float = field(default_factory=time.monotonic)

    def epochs_at(self, step: int) -> float:
        """Epochs of the rows that were seen when `step` steps were made."""
        return self.order.epoch_at(step * self.plan.global_batch)

    def elapsed(self) -> float:
        """Seconds of training, earlier sessions included."""
        return self.seconds + time.monotonic() - self.started


# A mixin of transformers' Trainer: type checkers take its attributes for granted.
_Base: Any = object


class TrackedTrainer(_Base):
    """Mixed into TRL's trainers, before them. `track` is set before training starts."""

    track: Track
    lr_scheduler: Any
    control: Any

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def get_train_dataloader(self) -> DataLoader:
        """The run's rows in their order; accelerate deals them to the processes."""
        loader = DataLoader(
            self.track.order,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=False,
            collate_fn=WithSquares(self.data_collator),
            num_workers=0,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro batches of a step; how long they are waited for is noted."""
        return super().get_batch_samples(self.track.throughput.timed(epoch_iterator), num_batches, device)

    def _run_epoch(self, **options: Any) -> None:
        """Nothing is left to train where an earlier session has stopped early."""
        if self.track.best is not None and self.track.best.out_of_patience:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**options)

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        set_precision(self)
        with tied_tables_together(self.model):
            return super()._prepare_for_training(*arguments, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The plan's schedule, a function of the step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.track.plan.multiplier)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _set_schedule(self, step: int) -> None:
        """Puts the schedule where it stands after `step` optimizer steps."""
        schedule = self.lr_scheduler
        schedule.last_epoch, schedule._step_count = step, step + 1
        factor = self.track.plan.multiplier(step)
        schedule._last_lr = [base * factor for base in schedule.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro batch; its share of the step's loss is noted for the look before the update."""
        self.track.throughput.add(inputs.pop(SQUARES))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.track.guard.note(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not self.track.guard.lets_pass(self, float(norm)):
            for parameter in model.parameters():
                parameter.grad = None  # the optimizer passes over what has none: no update, and no decay either
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of metrics.jsonl for each logging step, and the same for the trackers."""
        if "loss" not in logs:  # the closing summary of transformers repeats what the lines say
            return
        track = self.track
        logs |= track.tally.means(self.sum_over_processes)  # over tokens (SFT) or pairs (DPO), by language
        track.tally.reset()
        logs |= track.throughput.line(self) | {"seconds": round(track.elapsed(), 3)}
        began = time.monotonic()
        # transformers counts the whole run as one epoch, and puts that into the line
        self.state.epoch = round(track.epochs_at(self.state.global_step), 4)
        super().log(logs, start_time)
        track.log.write({"step": self.state.global_step, **logs})
        track.alarms.look({"step": self.state.global_step, **logs})
        track.throughput.paused += time.monotonic() - began

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss on the validation rows and answers to some prompts; one line of metrics.jsonl, and for the trackers."""
        assert self.track.evaluate is not None  # the pace asks for none otherwise
        began, was_training = time.monotonic(), self.model.training
        self.model.eval()
        with not_compiled():
            metrics = self.track.evaluate(self)
        self.model.train(was_training)
        self.track.log.write({"step": self.state.global_step, **metrics})
        check_evaluation(self, from_first(metrics))
        self.track.alarms.look({"step": self.state.global_step, **metrics})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        # trackers listen to log lines, and sort them by the beginning of a name
        tracked = {name if name.startswith("eval_") else f"eval_{name}": value for name, value in numbers.items()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, tracked)
        self._look_for_the_best(numbers)
        self.track.throughput.paused += time.monotonic() - began
        return numbers

    def _look_for_the_best(self, metrics: dict[str, float]) -> None:
        """Has the weights of a better evaluation saved, and ends the run when none was better for too long."""
        best, step = self.track.best, self.state.global_step
        if best is None:
            return
        if best.note(step, from_first(metrics)):
            self.control.should_save = True
        if best.out_of_patience and step < self.track.plan.steps:
            self.control.should_save = self.control.should_training_stop = True
            found = {"metric": best.metric, "value": best.value, "best_step": best.step}
            self.track.log.write({"step": step, "event": "early_stopped", **found})
            self.track.alarms.look({"step": step, "event": "early_stopped"})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began, track, main = time.monotonic(), self.track, self.accelerator.is_main_process
        check_trained(self)
        writer = ckpt.CheckpointWriter(Path(self.args.output_dir), self.state.global_step)
        if main:
            track.room.check_save(self.state.global_step)
            writer.begin()
        self.accelerator.wait_for_everyone()
        rank, counts = self.accelerator.process_index, self._counters()
        writer.write_json(f"rng-{rank}.json", random_states())
        writer.write_json(f"counters-{rank}.json", counts)
        self._save_tensors(writer)
        if main:
            self.state.save_to_json(str(writer.staging / TRAINER_STATE_NAME))
            writer.adopt(TRAINER_STATE_NAME)
        noted = gather_object([(writer.file_records(), track.tokens, track.supervised_tokens)])
        if main:
            files = {name: facts for own, *_ in noted for name, facts in own.items()}
            where = {
                "step": self.state.global_step,
                "epoch": track.epochs_at(self.state.global_step),
                "tokens": sum(tokens for _, tokens, _ in noted),
                "supervised_tokens": sum(supervised for *_, supervised in noted),
                **({} if track.best is None else {"best": track.best.state()}),
            }
            written = writer.finish({**track.facts.to_dict(), **where}, files)
            delete_overwritten(Path(self.args.output_dir))
            ckpt.prune(Path(self.args.output_dir), track.keep, written)
        self.accelerator.wait_for_everyone()
        track.throughput.paused += time.monotonic() - began

    def _save_tensors(self, writer: ckpt.CheckpointWriter) -> None:
        wrapped, optimizer = self.model_wrapped, self.optimizer.optimizer
        if self.track.in_shards:
            state_dict.save_shards(writer.staging, wrapped, optimizer)
            writer.adopt(state_dict.shards_of(self.accelerator.process_index))
            return
        moments = state_dict.moments_of(
            wrapped, optimizer
        )  # first: the larger file is hashed while the other is written
        if self.accelerator.is_main_process:
            writer.write_tensors(ckpt.MOMENTS, moments)
        del moments  # never both in memory
        weights = state_dict.weights_of(wrapped)
        if self.accelerator.is_main_process:
            writer.write_tensors(ckpt.WEIGHTS, weights)

    def _counters(self) -> dict[str, Any]:
        track = self.track
        return {
            "tokens": track.tokens,
            "supervised_tokens": track.supervised_tokens,
            "seconds": track.elapsed(),
            "tally": track.tally.state(),
            "usual": track.guard.state(),
            "best": None if track.best is None else track.best.state(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, model = Path(resume_from_checkpoint), model or self.model
        if state_dict.is_sharded(folder):
            state_dict.load_shards(folder, model)
        else:
            state_dict.set_weights(model, ckpt.read_tensors(folder, ckpt.WEIGHTS))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), self.optimizer.optimizer
        if state_dict.is_sharded(folder):
            state_dict.load_shards(folder, self.model_wrapped, optimizer)
        else:
            state_dict.set_moments(self.model_wrapped, optimizer, ckpt.read_tensors(folder, ckpt.MOMENTS))
        self._set_schedule(self.state.global_step)
        counts, track = own_share(folder, self.accelerator.process_index, self.accelerator.num_processes), self.track
        track.tokens, track.supervised_tokens = counts["tokens"], counts["supervised_tokens"]
        track.seconds = counts["seconds"]
        track.tally.restore(counts["tally"])
        track.guard.restore(counts.get("usual") or {})
        if track.best is not None:
            track.best.restore(counts.get("best"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bfloat16 needs no scaling, so a file of that name is not ours."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, rank = Path(checkpoint), self.accelerator.process_index
        if processes_of(folder) == self.accelerator.num_processes:
            set_random_states(ckpt.read_json(folder, f"rng-{rank}.json"))
        else:  # no state belongs to this process: another one, but the same at every such resume
            set_seed(self.args.seed + 1_000_003 * self.state.global_step + rank)


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(checkpoint.glob("counters-*.json")))


def own_share(checkpoint: Path, rank: int, processes: int) -> dict[str, Any]:
    """The counters that a process goes on with: its own, or, at another number of processes, all on the first one."""
    written = processes_of(checkpoint)
    each = [ckpt.read_json(checkpoint, f"counters-{i}.json") for i in range(written)]
    if written == processes:
        return dict(each[rank])
    names = ("tokens", "supervised_tokens")
    whole = {name: sum(counts[name] for counts in each) if rank == 0 else 0 for name in names}
    tallies = torch.tensor([counts["tally"] for counts in each], dtype=torch.float64).sum(dim=0)
    tally = tallies if rank == 0 else torch.zeros_like(tallies)
    seconds = max(counts["seconds"] for counts in each)
    same = {name: each[0].get(name) for name in ("usual", "best")}  # on all processes
    return {**whole, "seconds": seconds, "tally": tally.tolist(), **same}
