"""Every causal-LM architecture of the installed transformers, trained for a step and read back by plain transformers.

    python -m tests.benchmarks.architectures --out docs/architectures.md [NAME ...]

For each architecture a tiny random base (tests/support/architectures.py) is trained with `data.packing` true and false:

- the loss of step 1, against the mean over the supervised tokens of all documents, each by itself through the forward
  of plain transformers (relative difference);
- the gradient of step 1, against that of this mean: the largest difference, as a share of the parameter's norm, over
  the parameters that have one, and the number of parameters that have one in one of both only;
- the last `eval_loss`, against the loss of the validation documents by `final/` in plain transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nesso_tune.data.prepare import prepare_data, unpacked
from nesso_tune.errors import NessoError
from nesso_tune.model import loading
from nesso_tune.model.lm_head import ForwardPath, forward_path
from nesso_tune.recipes.schema import Recipe
from nesso_tune.run import train
from nesso_tune.training.trainer import BaseTrainer
from tests.support.architectures import TOKENIZER, CannotBeBuilt, architectures, tiny
from tests.support.runs import recipe

QUESTIONS = ["Qual è la capitale d'Italia?", "Chi sei?", "What is two plus two, and why?", "Ciao!", "Name a colour.",
             "Quanto fa uno più uno?", "Who painted the Mona Lisa?", "Di che colore è il cielo?"]  # fmt: skip
ANSWERS = ["Roma.", "Mi chiamo Nesso e rispondo in italiano.", "Four, since two and two are four.", "Ciao, come va?",
           "Blue.", "Due.", "Leonardo da Vinci painted it in Florence.", "Azzurro, di giorno."]  # fmt: skip


@dataclass
class Outcome:
    """What a run of one architecture gave."""

    loss: float = float("nan")
    loss_off: float = float("nan")
    gradient_off: float = float("nan")
    gradients_missing: int = -1
    eval_off: float = float("nan")
    path: ForwardPath = field(default_factory=ForwardPath)
    refused: str = ""

    @property
    def right(self) -> bool:
        near = self.loss_off <= 1e-5 and self.gradient_off <= 1e-3 and self.eval_off <= 1e-4
        return near and self.gradients_missing == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    lines, skipped = [], []
    for kind in architectures():
        name = kind.model_type
        if options.names and name not in options.names:
            continue
        began = time.monotonic()
        try:
            base = tiny(kind)
        except CannotBeBuilt as reason:
            skipped.append((name, str(reason)))
            print(f"{name}: not built: {reason}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            both = [outcome(base, Path(folder), packing) for packing in (True, False)]
        lines.append((name, type(base).__name__, *both))
        print(_row(*lines[-1]), f"{time.monotonic() - began:.1f} s", flush=True)
        if options.out:
            options.out.write_text(_page(lines, skipped), encoding="utf-8")


def outcome(base: PreTrainedModel, folder: Path, packing: bool, raises: bool = False) -> Outcome:
    """Trains the base, and compares; a refusal is an outcome too, unless it shall be raised."""
    some = _recipe(base, folder, packing)
    first: dict[str, Tensor] = {}
    clip = BaseTrainer._clip_grad_norm

    def kept(self: Any, model: Any) -> Any:
        if self.state.global_step == 0:
            first.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(self, model)

    BaseTrainer._clip_grad_norm = kept  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(some)
        return _compared(some, first)
    except NessoError as error:
        if raises:
            raise
        return Outcome(refused=f"{type(error).__name__}: {error}")
    except Exception as error:
        traceback.print_exc()
        return Outcome(refused=f"FAILED {type(error).__name__}: {error}")
    finally:
        BaseTrainer._clip_grad_norm = clip  # type: ignore[method-assign]


def _recipe(base: PreTrainedModel, folder: Path, packing: bool) -> Recipe:
    """Two steps of all rows each, without weight decay, over conversations of unequal length."""
    home = folder / "base"
    if not home.exists():
        base.save_pretrained(home)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (home / name).write_bytes((TOKENIZER / name).read_bytes())
        rows = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe(
        "sft", folder / f"run-{packing}", [folder / "rows.jsonl"],
        model={"base": str(home), "random_init": False},
        data={"packing": packing, "sequence_len": 96},
        train={"max_steps": 2, "micro_batch_size": 2, "weight_decay": 0.0, "gradient_accumulation_steps": 2},
        checkpoint={"every_steps": 1},
        evaluation={"samples": 0},
    )  # fmt: skip


def _compared(some: Recipe, first: dict[str, Tensor]) -> Outcome:
    run = Path(some.output_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["loss"] for line in lines if line["step"] == 1 and "loss" in line)
    reported = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    data = prepare_data(some)
    begun = loading.load_model(some.model, data.chat, some.seed)
    if json.loads((run / "manifest.json").read_text())["unpacked"]:
        data = unpacked(data, some)
    batch = (some.train.gradient_accumulation_steps or 1) * some.train.micro_batch_size
    plain = AutoModelForCausalLM.from_pretrained(some.model.base, dtype=torch.float32).eval()
    plain.load_state_dict(begun.state_dict())
    _no_padding_rows(plain)
    wanted = mean_loss(plain, [data.stream[i] for i in range(batch)])
    wanted.backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None and p.grad.any()}
    ours = {n: g for n, g in first.items() if g.any()}
    largest = max(float(g.norm()) for g in theirs.values())
    off = [float((ours[n] - g).norm()) / max(float(g.norm()), 1e-3 * largest) for n, g in theirs.items() if n in ours]
    final = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32).eval()
    with torch.no_grad():
        evaluated = float(mean_loss(final, list(data.validation)))
    return Outcome(
        loss, abs(loss / float(wanted.detach()) - 1), max(off), len(ours.keys() ^ theirs.keys()),
        abs(reported / evaluated - 1), forward_path(begun),
    )  # fmt: skip


def _no_padding_rows(model: PreTrainedModel) -> None:
    """The end token is padding in name only: its row has a gradient."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def mean_loss(model: PreTrainedModel, rows: list[dict[str, Any]]) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, each document alone through the model's own forward."""
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    losses = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (torch.tensor(row[name][start : start + length]) for name in ("input_ids", "labels"))
            start += length
            logits = torch.log_softmax(model(input_ids=ids[None], **cache).logits[0, :-1].float(), dim=-1)
            learned = labels[1:] != -100
            losses.append(-logits[learned].gather(1, ids[1:][learned][:, None])[:, 0])
    return torch.cat(losses).mean()


def _row(name: str, model: str, packed: Outcome, unpacked_: Outcome) -> str:
    cells = [_figures(packed), _figures(unpacked_)]
    if packed.refused and cells[0] == cells[1]:
        cells[1] = "the same"
    return f"| {name} | {_way(packed)} | {' | '.join(cells)} |"


def _way(one: Outcome) -> str:
    if one.refused:
        return "refused" if not one.refused.startswith("FAILED") else "fails"
    path = one.path
    head = {"supervised": "head", "trl": "TRL's head", "own": "own forward"}[path.head]
    rows = "by document" if path.padding_free else "packed with masks" if path.packs_by_position_ids else "unpacked"
    padding = {"mask": "", "none": ", no mask", "alone": ", row by row"}[path.padding]
    return f"{head}, {rows}{padding}"


def _figures(one: Outcome) -> str:
    if one.refused:
        reason = re.sub(r"^ModelError: (model\.base \S+: )?", "", one.refused)
        return reason.replace("|", "/").split("; ")[0]  # without the remedy
    missing = f", {one.gradients_missing} gradients in one only" if one.gradients_missing else ""
    sign = "" if one.right else "**differs** "
    return f"{sign}{one.loss:.5f}: {one.loss_off:.0e}, {one.gradient_off:.0e}{missing}, {one.eval_off:.0e}"


def _page(lines: list[Any], skipped: list[tuple[str, str]]) -> str:
    good = [line for line in lines if all(one.right for one in line[2:])]
    refused = [line for line in lines if line[2].refused and not line[2].refused.startswith("FAILED")]
    text = [HEADER.format(
        transformers=transformers.__version__, torch=torch.__version__, all=len(lines) + len(skipped), built=len(lines),
        good=len(good), refused=len(refused), other=len(lines) - len(good) - len(refused),
    )]  # fmt: skip
    text += ["| architecture | path | packed | unpacked |", "|---|---|---|---|"]
    text += [_row(*line) for line in lines]
    text += ["", "## Not built", "", "| architecture | why |", "|---|---|"]
    text += [f"| {name} | {reason.replace('|', '/').strip()} |" for name, reason in skipped]
    return "\n".join(text) + "\n"


HEADER = """# Architectures

Training results for every causal-LM architecture of transformers {transformers} (torch {torch}, CPU, float32).
Written by `python -m tests.benchmarks.architectures --out docs/architectures.md`.

Of {all} configuration classes, {built} were built as tiny random bases. Their sizes follow from the names of the
configuration's fields, never from the name of the architecture. **{good} train correctly, packed and unpacked;
{refused} are refused before the first step; {other} differ or fail.**

Each row of the table has the path chosen (below), and for `data.packing: true` and `false`: the loss of step 1; its
relative difference from the mean over the same documents, each alone through the forward pass of plain transformers
(limit 1e-5); the largest difference of a parameter's gradient from the gradient of this mean, relative to its norm
(limit 1e-3); and the relative difference of the last `eval_loss` from that of `final/` in plain transformers (limit
1e-4). The standard deviation of the logits is 2 or more, because small logits would hide the effect of the head; weight
decay and dropout are 0.

- **head**: the LM head runs on supervised positions only. **TRL's head**: for logits that are capped or scaled in ways
  that TRL supports. **own forward**: the logits come from the model's own forward pass, which takes more time and
  memory.
- **by document**: no padding, attention within each document. **packed with masks**: position ids restart at each
  document of a row and so separate the documents. **unpacked**: the model mixes packed documents, so each document is a
  row of its own, padded on the right, regardless of `data.packing`; the run reports this, with the loss packed and
  alone.

Mixtures of experts and multimodal models are refused because version 1 does not train them, and other models because
they attend to the tokens that they predict. The row gives the reason, and in the latter case the two losses.

The balance loss of the router of a mixture of experts is not part of the loss, neither reported nor optimised.
"""

if __name__ == "__main__":
    sys.exit(main())
