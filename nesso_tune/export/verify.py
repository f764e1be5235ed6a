"""Repeats the evaluation of a finished run on its model folder, by transformers alone in another process.

The loss of validation rows in training must be the loss that transformers computes with the weights on disk. Otherwise
a weight was saved wrongly, a setting is missing in config.json, or the trainer computes another model.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from nesso_tune.data.packing import Rows
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.workers import follow_parent
from nesso_tune.distributed.process_group import is_main_process
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError
from nesso_tune.export import plain_loss
from nesso_tune.files import format_bytes
from nesso_tune.logs import logger
from nesso_tune.model.lm_head import forward_path
from nesso_tune.model.loading import TINY_MODEL, not_compiled
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import FINAL
from nesso_tune.training.fit import Trainer
from nesso_tune.training.grouped_metrics import Groups
from nesso_tune.training.method import method_of

Amount = Literal["sample", "all", "none"]
OPTION = "--verify"
SAMPLE_ROWS, SAMPLE_TOKENS = 32, 4096
DEVIATION = 0.012  # of the log-probability of a token, in bfloat16
FLOOR = {True: 1e-4, False: 0.003}  # of `rounding_limit`, by precision
# Variables of launchers: transformers would take the other process for one of a group.
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_",
    "FSDP_",
)


@dataclass(frozen=True)
class Verified:
    """The loss of the same rows in training and in transformers, in nats per supervised token.

    Attributes:
        rows, tokens: number of rows and of their supervised tokens.
        loss_in_training: the weights in training, rounded to the precision of the folder.
        loss: the folder's weights in transformers.
        largest_difference: of the loss of a single row.
        transformers: version of transformers.
    """

    rows: int
    tokens: int
    loss_in_training: float
    loss: float
    largest_difference: float
    transformers: str

    def __str__(self) -> str:
        return (
            f"loss of {self.rows:,} rows {self.loss:.6g} in transformers {self.transformers}, "
            f"{self.loss_in_training:.6g} in training (largest difference of a row {self.largest_difference:.1g})"
        )


@dataclass(frozen=True)
class RowLosses:
    """Rows and their loss in training.

    Attributes:
        rows: validation rows, or training rows if there are none.
        tokens: supervised tokens of each row.
        log_likelihoods: summed log-probability of these tokens.
        precise: computed in float32, not in bfloat16.
    """

    rows: Rows
    tokens: list[int]
    log_likelihoods: list[float]
    precise: bool

    @classmethod
    def in_training(
        cls, trainer: Trainer, model: PreTrainedModel, recipe: Recipe, data: PreparedData, amount: Amount
    ) -> RowLosses:
        """Computes the loss as the evaluations of the run do. Every process must call this.

        The weights are rounded in place to the precision of the folder, so that rounding is no difference. Those under
        an adapter are not: the folder has the rounded sum of both.
        """
        rows = chosen_rows(data.validation if len(data.validation) else data.train, amount)
        method, groups = method_of(recipe), Groups.of(rows.documents)
        collate = method.collator(forward_path(model), data.chat.pad_id, groups, None)
        if recipe.model.adapter is None:
            with torch.no_grad():
                for weight in trainer.model_wrapped.parameters():
                    weight.copy_(weight.to(getattr(torch, recipe.model.dtype)))
        trainer.model.eval()
        with not_compiled():
            batches = [collate([row]) for row in rows]
            tokens = [int(batch["supervised_tokens"]) for batch in batches]
            found = [method.log_likelihood(trainer, batch) for batch in batches]
        return cls(rows, tokens, found, precise=recipe.model.dtype == "float32")

    def sequences(self) -> list[dict[str, list[int]]]:
        """The documents of the rows, as `plain_loss.log_likelihoods` takes them; of a pair, both answers."""
        found = []
        for i in range(len(self.rows)):
            found += [_sequence(self.rows, int(record), part) for record, part in self._parts(i)]
        return found

    def compare(self, log_likelihoods: Sequence[float], transformers: str, name: str = FINAL) -> Verified:
        """Compares the rows with the log-likelihoods of their `sequences` in transformers.

        Args:
            log_likelihoods: in transformers.
            transformers: its version.
            name: of the folder, in errors.

        Raises:
            ModelError: if the loss of a row, or of all together, differs by more than rounding.
        """
        own = iter(log_likelihoods)
        found = [sum(islice(own, len(self._parts(i)))) for i in range(len(self.rows))]
        tokens = [*self.tokens, sum(self.tokens)]
        here, there = (
            [-value / max(n, 1) for value, n in zip([*values, sum(values)], tokens, strict=True)]
            for values in (self.log_likelihoods, found)
        )
        differences = [abs(a - b) for a, b in zip(here, there, strict=True)]
        for i, (difference, n) in enumerate(zip(differences, tokens, strict=True)):
            if not difference <= rounding_limit(n, self.precise):  # also if it is not a number
                which = "all rows together" if i == len(self.rows) else f"row {i + 1} of {len(self.rows):,}"
                raise ModelError(
                    f"{name}/", f"its loss in transformers {transformers} is {there[i]:.6g}, in training {here[i]:.6g} "
                    f"({which}, {n:,} tokens)",
                    "it was not written; the checkpoints are intact; report the model's architecture, or write "
                    f"{name}/ without this check: {OPTION} none",
                )  # fmt: skip
        return Verified(len(self.rows), tokens[-1], here[-1], there[-1], max(differences[:-1]), transformers)

    def _parts(self, row: int) -> list[tuple[int, int]]:
        """(record, answer) of each sequence of a row; the answer is 0 in conversations."""
        answers = (0,) if self.rows.documents.documents_per_record == 1 else (1, 2)
        return [(int(record), answer) for record in self.rows.members(row) for answer in answers]


def chosen_rows(rows: Rows, amount: Amount) -> Rows:
    """All rows, or some at equal distances: at most `SAMPLE_ROWS`, and at least one of at most `SAMPLE_TOKENS`."""
    if amount == "all":
        return rows
    spread = np.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).round().astype(int)
    sizes = np.cumsum(rows.token_counts[spread])
    chosen = spread[: max(1, int((sizes <= SAMPLE_TOKENS).sum()))]
    members = [rows.members(int(row)) for row in chosen]
    bounds = np.cumsum([0, *map(len, members)])
    return Rows(rows.documents, np.concatenate(members), bounds, rows.first_pair)


def _sequence(rows: Rows, record: int, answer: int) -> dict[str, list[int]]:
    """The ids of a document, or of a prompt with one of its answers, and the positions of the supervised tokens."""
    documents = rows.documents
    slices = [documents.token_slice(record, part) for part in ((0, answer) if answer else (0,))]
    ids, supervised = (np.concatenate([of[part] for part in slices]) for of in (documents.ids, documents.supervised))
    return {"ids": ids.tolist(), "supervised": (np.flatnonzero(supervised[1:]) + 1).tolist()}


def rounding_limit(tokens: int, precise: bool) -> float:
    """Largest difference of the mean loss of some tokens that rounding explains, in nats per token.

    In bfloat16, the log-probability of a token moves by 0.012 (standard deviation) if hidden states are rounded
    otherwise; see `dpo.rounding_limit`. Ten standard deviations of the mean are allowed, and at least `FLOOR`.
    """
    return FLOOR[True] if precise else max(10 * DEVIATION / math.sqrt(max(tokens, 1)), FLOOR[False])


class Verifier:
    """Verifies `final/` of one run, in a `with` block around it.

    On Linux, the other process is forked at once, before the run has loaded anything, since to import transformers
    takes longer than to verify a tiny model. It serves such models, on one CPU thread. Others get a new interpreter,
    which can use a GPU.

    Attributes:
        amount: which rows.
        verified: the comparison, once there is one.

    Raises:
        RecipeError: if there is no such amount.
    """

    def __init__(self, amount: Amount) -> None:
        if amount not in get_args(Amount):
            raise RecipeError("verify", f"must be one of {', '.join(get_args(Amount))}, not {amount!r}", "correct it")
        self.amount: Amount = amount
        self.verified: Verified | None = None
        self._forked: Connection | None = None

    def __enter__(self) -> Verifier:
        forks = sys.platform == "linux" and not torch.cuda.is_initialized()
        if self.amount != "none" and is_main_process() and forks:
            with suppress(OSError):  # not enough memory to fork: a new interpreter serves
                self._fork()
        return self

    def _fork(self) -> None:
        context = get_context("fork")
        own, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(own, other))
        self._process.start()
        other.close()
        self._forked = own

    def __exit__(self, *_: object) -> None:
        if self._forked is not None:
            self._process.kill()
            self._process.join()
            self._forked.close()
            self._forked = None

    def losses_in_training(
        self, trainer: Trainer, model: PreTrainedModel, recipe: Recipe, data: PreparedData
    ) -> RowLosses | None:
        """`RowLosses.in_training`, or None if nothing is to be verified. Every process must call this."""
        return None if self.amount == "none" else RowLosses.in_training(trainer, model, recipe, data, self.amount)

    def verify(
        self,
        folder: Path,
        model: PreTrainedModel,
        losses: RowLosses | None,
        trust_remote_code: bool,
        name: str = FINAL,
    ) -> None:
        """Compares the loss in training with that of a model folder. Nothing happens if the memory does not suffice.

        Args:
            folder: the model folder.
            model: the model, for its size.
            losses: from `losses_in_training`.
            trust_remote_code: as in the recipe.
            name: that the folder gets after it was verified: `final`, or `candidate` before a gate.

        Raises:
            ModelError: if transformers cannot load the folder, or its loss differs by more than rounding.
            RunEnvironmentError: if the process is killed.
        """
        if losses is None or not _fits_into_memory(model, losses, name):
            return
        request = {"folder": str(folder), "sequences": losses.sequences(), "trust_remote_code": trust_remote_code}
        try:
            reply = self._ask(request, is_tiny=model.num_parameters() < TINY_MODEL)
        except (EOFError, OSError, ValueError):
            raise RunEnvironmentError(
                f"{name}/", "the process that verifies it was killed",
                f"check whether the machine ran out of memory; run again, or with {OPTION} none",
            ) from None  # fmt: skip
        if "error" in reply:
            raise ModelError(
                f"{name}/", f"transformers cannot use it ({reply['error']})",
                f"it was not written; the checkpoints are intact; to write it anyway: {OPTION} none",
            )  # fmt: skip
        self.verified = losses.compare(reply["log_likelihoods"], reply["transformers"], name)
        logger.info(f"{name}/ verified: {self.verified}")

    def _ask(self, request: dict[str, Any], is_tiny: bool) -> dict[str, Any]:
        if self._forked is None or not is_tiny:
            return _ask_new(request)
        self._forked.send(request)
        reply: dict[str, Any] = self._forked.recv()
        return reply


def _fits_into_memory(model: PreTrainedModel, losses: RowLosses, name: str) -> bool:
    longest = int(losses.rows.documents.sequence_lengths[losses.rows.records].max())
    needed = 4 * (model.num_parameters() + 3 * longest * model.config.get_text_config().vocab_size)
    free = psutil.virtual_memory().available
    if needed > free:
        what = f"this takes {format_bytes(needed)} of memory, {format_bytes(free)} are free"
        logger.warning(f"{name}/ is not verified: {what}")
    return needed <= free


def _serve(parents: Connection, own: Connection) -> None:
    """Runs in the forked process, which the run ends."""
    follow_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a run that is asked to stop may still finish
    parents.close()
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    with suppress(EOFError):
        while True:
            own.send(plain_loss.reply(own.recv()))


def _ask_new(request: dict[str, Any]) -> dict[str, Any]:
    """Asks a new interpreter, outside the process group of the run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.empty_cache()
    done = subprocess.run(
        [sys.executable, "-P", plain_loss.__file__],
        input=json.dumps({**request, "gpu": gpu}),
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
        check=False,
    )
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply
