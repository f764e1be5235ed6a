"""The trainer that SFT and DPO share: every override of a method of transformers' or TRL's trainers is here.

Overrides of transformers' `Trainer`: data order (`get_train_dataloader`), FSDP set-up (`_prepare_for_training`),
learning-rate schedule (`create_scheduler`), checks of loss and gradient before an update (`training_step`,
`_clip_grad_norm`), log lines (`log`), evaluation (`evaluate`), checkpoints (`_save_checkpoint`, `_load_*`), time spent
waiting for data (`get_batch_samples`), and the end of a run that has stopped early (`_run_epoch`). Overrides of TRL's
trainers: telemetry, which is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from nesso_tune.distributed.process_group import broadcast_from_rank0
from nesso_tune.errors import RecipeError
from nesso_tune.model.loading import not_compiled
from nesso_tune.planning.plan import Plan
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.checkpoint import (
    Checkpointer,
    load_callback_states,
    load_optimizer,
    load_rng_state,
    load_weights,
    read_run_state,
)
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.evaluator import EARLY_STOPPED, Evaluator
from nesso_tune.training.fsdp import keep_tied_embeddings_together, set_precision
from nesso_tune.training.grouped_metrics import sum_over_processes
from nesso_tune.training.numerical_checks import check_evaluation, check_trained
from nesso_tune.training.run_state import RunState
from nesso_tune.training.throughput import SQUARED_LENGTHS, WHOLE_SEQUENCES, AttentionCostCollator, Throughput


class WeightCasts:
    """Keeps autocast's copies of the weights in bfloat16 over the micro batches of a step; they are made in the first.

    Autocast drops them when its outermost context ends, which is the forward pass of each micro batch. The optimizer
    changes the weights, so they must not be kept longer than a step.
    """

    def __init__(self) -> None:
        self._open = False

    @contextmanager
    def kept(self, last: bool) -> Iterator[None]:
        """Context of a micro batch; `last` is the last one of a step."""
        if not self._open:
            torch.autocast_increment_nesting()  # type: ignore[no-untyped-call]
            self._open = True
        try:
            yield
        except BaseException:
            self._close()
            raise
        if last:
            self._close()

    def _close(self) -> None:
        self._open = False
        if torch.autocast_decrement_nesting() == 0:  # type: ignore[no-untyped-call]
            torch.clear_autocast_cache()  # type: ignore[no-untyped-call]


class BaseTrainer(Trainer):
    """Goes before TRL's trainer among the bases of a trainer. `set_up` must be called before training starts."""

    lr_scheduler: Any  # set by transformers
    control: TrainerControl
    plan: Plan
    run_dataset: RunDataset
    run_state: RunState
    metrics_log: MetricsLog
    alarms: Alarms
    evaluator: Evaluator | None
    throughput: Throughput
    checkpointer: Checkpointer
    stateful_callbacks: Sequence[ExportableState] = ()  # of the user; their states are in checkpoints
    preempted = False  # a signal stops the run, not a callback
    _weight_casts: WeightCasts
    _fetch_batches: Callable[[], Any] | None = None
    _next_batches: Any = None  # the micro batches of the next step, fetched ahead

    def set_up(
        self,
        *,
        plan: Plan,
        run_dataset: RunDataset,
        run_state: RunState,
        metrics_log: MetricsLog,
        alarms: Alarms,
        evaluator: Evaluator | None,
        throughput: Throughput,
        checkpointer: Checkpointer,
    ) -> None:
        """Gives the trainer what TRL's arguments do not cover.

        Args:
            plan: steps, batch sizes, learning-rate schedule and intervals.
            run_dataset: all rows of the run, in order.
            run_state: counters and running statistics that a checkpoint holds.
            metrics_log: `metrics.jsonl`.
            alarms: checked with each line of it.
            evaluator: None if the run does not evaluate.
            throughput: speed and memory of each log line.
            checkpointer: saves checkpoints.
        """
        self.plan, self.run_dataset, self.run_state = plan, run_dataset, run_state
        self.metrics_log, self.alarms, self.evaluator = metrics_log, alarms, evaluator
        self.throughput, self.checkpointer = throughput, checkpointer
        self._weight_casts = WeightCasts()

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every process."""
        return sum_over_processes(self.accelerator, tensor)

    def epochs_at(self, step: int) -> float:
        """Epochs trained after `step` optimizer steps."""
        return self.run_dataset.epoch_at(step * self.plan.global_batch)

    # Set-up

    def _send_telemetry(self) -> None:
        """Sends nothing."""

    def get_train_dataloader(self) -> DataLoader:
        """The rows of the run in order. Accelerate distributes the micro batches over the processes."""
        loader = DataLoader(
            self.run_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=False,
            collate_fn=AttentionCostCollator(self.data_collator),
            num_workers=0,
            pin_memory=torch.cuda.is_available(),  # for copies that do not wait, see `accelerator_config`
        )
        return self.accelerator.prepare(loader)

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        set_precision(self)
        with keep_tied_embeddings_together(self.model):
            return super()._prepare_for_training(*arguments, **options)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The plan's learning-rate schedule, a function of the step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.plan.multiplier)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Steps

    def _run_epoch(self, **options: Any) -> None:
        """Trains, unless an earlier session has stopped early, or a callback stops the run when training begins."""
        best = self.run_state.best
        if self.control.should_training_stop or (best is not None and best.out_of_patience):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro batches of a step; the time spent waiting for them is measured.

        Those of the first step are fetched here, those of later ones during the step before. A checkpoint that could
        not be written in the background ends the run here.
        """
        self.checkpointer.raise_if_failed()
        self._fetch_batches = partial(
            super().get_batch_samples, self.throughput.time_batches(epoch_iterator), num_batches, device
        )
        batches, self._next_batches = self._next_batches or self._fetch_batches(), None
        return batches

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a micro batch; its loss is kept for the check before the update.

        After the last micro batch of a step, the next step's are collated and copied while a GPU still computes.
        """
        self.throughput.add(inputs.pop(SQUARED_LENGTHS), inputs.pop(WHOLE_SEQUENCES))
        with self._weight_casts.kept(last=self.accelerator.sync_gradients or self.is_fsdp_enabled):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.run_state.spike_guard.add(loss)
        if self.accelerator.sync_gradients and self._fetch_batches is not None:
            self._next_batches = self._fetch_batches()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not self.run_state.spike_guard.allows_update(self, norm):
            for parameter in model.parameters():
                parameter.grad = None  # the optimizer skips parameters without one: no update and no weight decay
        return norm

    # Logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes one line of `metrics.jsonl` per logging step, and sends it to the trackers."""
        if "loss" not in logs:  # transformers' closing summary repeats earlier lines
            return
        state = self.run_state
        logs |= state.metrics.means(self.sum_over_processes)  # over tokens (SFT) or pairs (DPO), by language
        state.metrics.reset()
        logs |= self.throughput.measure() | {"seconds": round(state.seconds, 3)}
        with self.throughput.paused():
            self._correct_epoch()
            super().log(logs, start_time)
            self.metrics_log.write({"step": self.state.global_step, **logs})
            self.alarms.check({"step": self.state.global_step, **logs})
        if self._stopped_by_callback():  # evaluated and saved as at the end
            self.control.should_evaluate = self.evaluator is not None
            self.control.should_save = self.plan.save_every is not None

    def _correct_epoch(self) -> None:
        """Sets the epoch for lines and callbacks: transformers counts the whole run as one."""
        self.state.epoch = round(self.epochs_at(self.state.global_step), 4)

    def _stopped_by_callback(self) -> bool:
        return self.control.should_training_stop and not self.preempted and self.state.global_step < self.plan.steps

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluates the model, writes one line of `metrics.jsonl` and sends it to the trackers.

        Raises:
            RecipeError: if a callback asks for it, and the recipe has no evaluation.
        """
        if self.evaluator is None:
            raise RecipeError("evaluation", "is null, but a callback asks for an evaluation", "set evaluation: {}")
        self._correct_epoch()
        with self.throughput.paused():
            was_training = self.model.training
            self.model.eval()
            with not_compiled():
                metrics = self.evaluator(self)
            self.model.train(was_training)
            self.metrics_log.write({"step": self.state.global_step, **metrics})
            check_evaluation(self, self.metrics_log, broadcast_from_rank0(metrics))
            self.alarms.check({"step": self.state.global_step, **metrics})
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
            # trackers receive log lines and group metrics by the prefix of their names
            tracked = {name if name.startswith("eval_") else f"eval_{name}": value for name, value in numbers.items()}
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, tracked)
            self._update_best(numbers)
        if self._stopped_by_callback():
            self.control.should_save = self.plan.save_every is not None
        return numbers

    def _update_best(self, metrics: dict[str, float]) -> None:
        """Requests a checkpoint for a better evaluation, and the end of the run when patience is exhausted."""
        best, step = self.run_state.best, self.state.global_step
        if best is None:
            return
        if best.update(step, broadcast_from_rank0(metrics)):
            self.control.should_save = True
        if best.out_of_patience and step < self.plan.steps:
            self.control.should_save = self.control.should_training_stop = True
            found = {"metric": best.metric, "value": best.value, "best_step": best.step}
            self.metrics_log.write({"step": step, "event": EARLY_STOPPED, **found})
            self.alarms.check({"step": step, "event": EARLY_STOPPED})

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            check_trained(self, self.metrics_log)
            self.checkpointer.save(self, self.run_state, self.epochs_at(self.state.global_step))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also loads the run state, which transformers has no hook for."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(folder, self.model_wrapped, self.optimizer.optimizer)
        self._set_schedule(self.state.global_step)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.run_state.load_state_dict(read_run_state(folder, rank, world_size))

    def _set_schedule(self, step: int) -> None:
        """Puts the learning-rate schedule where it is after `step` optimizer steps."""
        schedule = self.lr_scheduler
        schedule.last_epoch, schedule._step_count = step, step + 1
        factor = self.plan.multiplier(step)
        schedule._last_lr = [base * factor for base in schedule.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _load_callback_state(self) -> None:
        load_callback_states(self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loads nothing: bfloat16 needs no loss scaling."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
            seed = self.args.seed + 1_000_003 * self.state.global_step
            load_rng_state(Path(checkpoint), rank, world_size, seed)
