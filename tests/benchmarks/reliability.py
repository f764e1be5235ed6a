"""What safety costs: the look before each update, and the pause of a save. Run by hand on a quiet machine:

    python -m tests.benchmarks.reliability [--layers 8] [--hidden 512] [--steps 240] [--saves 9] [--length 256]

Both sides are measured in one process, in turn; what is printed are ratios of medians.

- step: seconds of an optimizer step with everything that this package adds before and after the update (the look at
  loss and gradient norm, the question whether to stop), against the same trainer with these left out.
- save: seconds of `_save_checkpoint` (staging, safetensors, fsync, SHA-256, manifest, rename), against a plain writer
  of the same state: `torch.save` of weights and optimizer, flush, fsync, the oldest removed.
- pause: seconds of `_save_checkpoint` with `checkpoint.asynchronous`, which copies the state, against those without,
  and the seconds until the checkpoint is complete, while nothing else is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from nesso_tune.data.prepare import prepare_data
from nesso_tune.distributed.preemption import PreemptionCallback, StopRequest
from nesso_tune.model.loading import base_hash, load_model
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.runs.run_directory import open_run, write_start
from nesso_tune.training.fit import add_adapter, fit
from nesso_tune.training.numerical_checks import SpikeGuard
from tests.support.runs import BASE, recipe

KEEP = 3  # checkpoints, on both sides
BLOCK = 1  # steps that are measured on one side before the other has its turn


def base_of(folder: Path, layers: int, hidden: int) -> Path:
    """The quickstart's base with another shape; its weights are random."""
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden,
               "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class InTurn(TrainerCallback):
    """Leaves the additions out in every second block of steps, and times each step."""

    def __init__(self) -> None:
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._look, self._note, self._ask = SpikeGuard.allows_update, SpikeGuard.add, PreemptionCallback.on_step_end
        self._began = 0.0

    def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        """Called by the trainer."""
        self.whole = state.global_step // BLOCK % 2 == 0
        SpikeGuard.allows_update = self._look if self.whole else lambda *_: True  # type: ignore[method-assign]
        SpikeGuard.add = self._note if self.whole else lambda *_: None  # type: ignore[method-assign]
        PreemptionCallback.on_step_end = self._ask if self.whole else lambda *a, **_: a[3]  # type: ignore[method-assign]
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        """Called by the trainer, after the others."""
        if state.global_step > 20:
            self.times[self.whole].append(time.perf_counter() - self._began)

    def restore(self) -> None:
        """Puts everything back."""
        SpikeGuard.allows_update, SpikeGuard.add, PreemptionCallback.on_step_end = self._look, self._note, self._ask  # type: ignore[method-assign]


def plain(trainer, folder: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    """Weights and optimizer, as a trainer without a promise writes them, but safe on the disk; it keeps as many."""
    folder /= f"plain-{number}"
    folder.mkdir()
    for name, state in (("model.pt", trainer.model.state_dict()), ("optimizer.pt", trainer.optimizer.state_dict())):
        with (folder / name).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(folder.with_name(f"plain-{number - KEEP}"), ignore_errors=True)


def seconds(what) -> float:  # type: ignore[no-untyped-def]
    """How long something takes, with what others wrote brought to the disk before."""
    os.sync()
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def main() -> None:
    """Measures both and prints them."""
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 8), ("hidden", 512), ("steps", 240), ("saves", 9), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default=None, help="where to write: the disk that is measured")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as name:
        folder = Path(name)
        os.environ["NESSO_TUNE_CACHE"] = str(folder / "cache")
        (folder / "base").mkdir()
        base = base_of(folder / "base", said.layers, said.hidden)
        rows = [{"prompt": f"Quanto fa {i} + {i + 1}?" * 3, "response": f"Fa {2 * i + 1}." * 3, "lang": "it"}
                for i in range(400)]  # fmt: skip
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        some = recipe("sft", folder / "run", [folder / "rows.jsonl"], model={"base": str(base)},
                      data={"sequence_len": said.length, "validation_size": 0}, evaluation=None,
                      logging={"every_steps": 10},
                      train={"max_steps": said.steps, "micro_batch_size": 2},
                      checkpoint={"every_steps": said.steps, "keep": KEEP})  # fmt: skip
        data = prepare_data(some)
        plan = make_plan(some, World(), data.volume)
        model = load_model(some.model, data.chat, some.seed)
        facts = RunFacts.collect(some, data, plan, base_hash(some.model))
        run, turn = open_run(some), InTurn()
        write_start(run, some, facts)
        with StopRequest() as request, measured(turn):
            flops = add_adapter(model, some, [], facts)
            trainer = fit(model, data, some, plan, run, facts, flops, DiskSpace(run.path, 0, 0), request)
        turn.restore()
        print(f"{model.num_parameters() / 1e6:.0f} M parameters, {torch.get_num_threads()} threads")
        with_it, without = (statistics.median(turn.times[side] or [0.0]) for side in (True, False))
        if without:  # more steps than those of the warm-up
            print(f"step: {with_it * 1000:.2f} ms with, {without * 1000:.2f} ms without: {with_it / without:.4f}")
        ours, pauses, whole, theirs = [], [], [], []
        for i in range(KEEP + 1 + said.saves):
            ours.append(save(trainer, asynchronous=False)[0])
            pause, complete = save(trainer, asynchronous=True)
            pauses, whole = [*pauses, pause], [*whole, complete]
            theirs.append(seconds(lambda: plain(trainer, folder, i)))  # noqa: B023 - called at once
        # from then on each takes the room that it gave back
        ours, pauses, whole, theirs = (times[KEEP + 1 :] for times in (ours, pauses, whole, theirs))
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"save: {a:.2f} s ours, {b:.2f} s plain: {a / b:.3f}   ({sorted(round(x, 2) for x in ours)},"
              f" {sorted(round(x, 2) for x in theirs)})")  # fmt: skip
        c, d = statistics.median(pauses), statistics.median(whole)
        print(f"pause: {c:.2f} s asynchronous, {a:.2f} s synchronous: {c / a:.3f}; complete after {d:.2f} s"
              f"   ({sorted(round(x, 2) for x in pauses)})")  # fmt: skip


def save(trainer, asynchronous: bool) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Saves a checkpoint; seconds that training would wait, and until it is complete."""
    trainer.state.global_step += 1
    saver = trainer.checkpointer
    saver._background = asynchronous
    pause = seconds(lambda: trainer._save_checkpoint(trainer.model, None))
    began = time.perf_counter()
    saver.wait()
    return pause, pause + time.perf_counter() - began


class measured:  # noqa: N801 - read as a word
    """Adds the timing callback to the trainer that `fit` makes."""

    def __init__(self, turn: InTurn) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        import nesso_tune.training.fit as module

        self._made = module._train

        def timed(trainer, *rest):  # type: ignore[no-untyped-def]
            added = trainer.add_callback
            trainer.add_callback = lambda one: (added(one), added(self._turn))
            self._made(trainer, *rest)

        module._train = timed

    def __exit__(self, *_: object) -> None:
        import nesso_tune.training.fit as module

        module._train = self._made


if __name__ == "__main__":
    main()
