"""Whether an exported model answers as the model that it was made from, in the runtime that will serve it.

Prompts in two languages, with and without system message and tools, must get the same token ids. Then, at every
position of the model's own greedy answers, the runtime must predict the same likeliest token, unless the margin of
the model's prediction is within the error that the rounding of the export causes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from nesso_tune.chat.special_tokens import CHAT_KEY
from nesso_tune.errors import ModelError
from nesso_tune.export.weights import load_final
from nesso_tune.model.forward import choose_generation_mode, generate_greedily
from nesso_tune.recipes.builtin import shipped_folder

PROMPTS = 64
ANSWER_TOKENS = 32
BATCH = 16
CANDIDATES = 64  # likeliest tokens of a position over which the rounding error is measured
ROUNDING_FLOOR = 1e-4  # error of float32 sums in another order, as a fraction of the largest logit
END = -1  # a runtime's token that ends the answer and that it does not report
BLOCK = 32  # weights that share a scale in q8_0
SYSTEM = {"it": "Sei un assistente conciso.", "en": "You are a concise assistant."}
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, as chat templates read it."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None


def prompts(supports_tools: bool) -> list[Prompt]:
    """Questions of the bundled rows, balanced over languages: half plain, the others with system message or tools."""
    folder = shipped_folder("recipes") / "quickstart" / "data"
    rows = list(_rows(folder / "heldout.jsonl"))
    tools = next(_rows(folder / "toolcalls.jsonl"))["tools"][:1]  # short, so that it fits into small contexts
    by_language = [[row for row in rows if row["language"] == code] for code in SYSTEM]
    out = []
    for i, row in enumerate(islice((row for pair in zip(*by_language, strict=False) for row in pair), PROMPTS)):
        question = [message for message in row["messages"] if message["role"] != "system"][:1]
        kind = (i // 2) % 4  # a pair of languages has the same kind
        system = [{"role": "system", "content": SYSTEM[row["language"]]}] if kind in (1, 3) else []
        out.append(Prompt([*system, *question], tools if kind in (2, 3) and supports_tools else None))
    return out


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


class Runtime(Protocol):
    """A program that serves the exported model."""

    name: str

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, up to and including the header of the assistant's turn."""

    def likeliest(self, prompt_ids: Sequence[int], answer: Sequence[int]) -> list[int]:
        """The likeliest token at each position of an answer, given the tokens before it.

        `END` stands for a token that ends the answer.
        """


@dataclass(frozen=True)
class ReferenceAnswer:
    """Greedy answer of the model before the export.

    Attributes:
        prompt: the prompt.
        prompt_ids: its token ids.
        ids: the answer, with its end token, at most `ANSWER_TOKENS`.
        candidates: ids of the likeliest tokens at each position of the answer, [positions, CANDIDATES].
        logits: of the candidates, in the same shape and in descending order.
    """

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    candidates: Tensor
    logits: Tensor

    @property
    def likeliest(self) -> list[int]:
        """The likeliest token at each position; another one than the answer's only in a near-tie."""
        return [int(token) for token in self.candidates[:, 0]]

    @property
    def margins(self) -> list[float]:
        """Difference of the two largest logits at each position."""
        return [float(margin) for margin in self.logits[:, 0] - self.logits[:, 1]]


@dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        runtime: name and version of the runtime.
        prompts: number of prompts, all with equal token ids.
        equal_answers: number of greedy answers that are equal as a whole.
        positions: number of compared positions.
        near_ties: number of positions with another token, where the margin is within the rounding error.
        error: largest difference of logits that rounding causes.
        first_difference: the first position in `near_ties`, in words.
    """

    runtime: str
    prompts: int
    equal_answers: int
    positions: int
    near_ties: int
    error: float
    first_difference: str = ""

    def __str__(self) -> str:
        tokens = f"{self.positions - self.near_ties:,} of {self.positions:,} likeliest tokens"
        count = "one near-tie," if self.near_ties == 1 else f"{self.near_ties} near-ties, the first"
        ties = f"; {count} {self.first_difference}" if self.near_ties else ""
        answers = f"{self.equal_answers} of {self.prompts} greedy answers and {tokens} equal"
        error = f"logit error of rounding {self.error:.2g}"
        return f"{self.runtime}: ids of {self.prompts} prompts equal, {answers} ({error}){ties}"


@torch.no_grad()
def reference_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[ReferenceAnswer]:
    """The model's greedy answers to those `prompts` that fit into a context of so many tokens, and its largest logits.

    Raises:
        ModelError: if no prompt fits.
    """
    spec = (tokenizer.init_kwargs.get(CHAT_KEY) or {}).get("template") or {}
    asked = [(prompt, _prompt_ids(tokenizer, prompt)) for prompt in prompts(spec.get("tools") is not None)]
    asked = [(prompt, ids) for prompt, ids in asked if context is None or len(ids) + ANSWER_TOKENS <= context]
    if not asked:
        raise ModelError("export", f"a context of {context} tokens is too short for the check", "use --unchecked")
    # A batch is padded to its longest prompt, and a runtime may keep what a prompt shares with the one before.
    asked.sort(key=lambda entry: (entry[0].tools is not None, entry[1]))
    mode, ends, pad, out = choose_generation_mode(model), end_ids(model), int(tokenizer.pad_token_id), []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        found = generate_greedily(model, [ids for _, ids in batch], mode, ANSWER_TOKENS, pad=pad, end=None)
        for (prompt, ids), answer in zip(batch, found, strict=True):
            answer = answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))]
            logits = _answer_logits(model, ids, answer)
            top = logits.topk(min(CANDIDATES, logits.shape[-1]))
            out.append(ReferenceAnswer(prompt, ids, answer, top.indices, top.values))
    return out


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [ends])


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    ids = tokenizer.apply_chat_template(
        prompt.messages, tools=prompt.tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in ids]


def _answer_logits(model: PreTrainedModel, prompt_ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits that predict each token of the answer, [positions, vocabulary]."""
    ids = torch.tensor([[*prompt_ids, *answer[:-1]]])
    # Without the logits of the prompt, which take most of the head's time and memory.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": len(answer)} if keeps else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits[0, -len(answer) :]
    return logits.float()


@torch.no_grad()
def rounding_error(model: PreTrainedModel, answers: Sequence[ReferenceAnswer]) -> float:
    """Largest difference of the logits of a rounded model from those in `answers`, over their candidates."""
    error = 0.0
    for answer in answers:
        logits = _answer_logits(model, answer.prompt_ids, answer.ids).gather(1, answer.candidates)
        error = max(error, float((logits - answer.logits).abs().max()))
        error = max(error, ROUNDING_FLOOR * float(answer.logits.abs().max()))
    return error


@torch.no_grad()
def round_linear_layers(model: PreTrainedModel, dtype: str) -> None:
    """Rounds matrices and the inputs of linear layers to a dtype, in place, as llama.cpp computes with it."""
    convert = _rounding(dtype)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            module.weight.copy_(convert(module.weight))
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(lambda _, inputs: (convert(inputs[0]), *inputs[1:]))


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: str) -> None:
    """Rounds all weights to a dtype, in place."""
    convert = _rounding(dtype)
    for weight in model.parameters():
        weight.copy_(convert(weight))


def round_modules(model: PreTrainedModel, dtype: str) -> None:
    """Rounds weights, inputs and outputs of all modules to a dtype, in place, as if all was computed with it.

    Sums stay in float32: a CPU may compute in 16 bits a hundred times slower.
    """
    convert = _rounding(dtype)

    def converted(value: Any) -> Any:
        return convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    round_weights(model, dtype)
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: tuple(map(converted, inputs)))
        module.register_forward_hook(lambda _, __, output: converted(output))


def _rounding(dtype: str) -> Callable[[Tensor], Tensor]:
    if dtype != "q8_0":
        return lambda values: values.to(getattr(torch, dtype)).to(values.dtype)
    return lambda values: _to_q8_0(values) if values.shape[-1] % BLOCK == 0 else values.half().to(values.dtype)


def _to_q8_0(values: Tensor) -> Tensor:
    """Rounds to 8 bits with a scale in float16 for each block of 32, and back."""
    blocks = values.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0).round()
    return (steps * scale.half().to(values.dtype)).reshape(values.shape)


def compare(
    runtime: Runtime, answers: Sequence[ReferenceAnswer], ends: frozenset[int], error: float, where: str
) -> Parity:
    """Compares a runtime with the model's own answers.

    Args:
        runtime: serves the export.
        answers: from `reference_answers`.
        ends: tokens that end an answer.
        error: from `rounding_error`. A swap of two tokens needs a margin of at most twice the error.
        where: the export, as errors name it.

    Raises:
        ModelError: with the first prompt or token that differs.
    """
    for answer in answers:
        _check_prompt(runtime, answer, where)
    equal = positions = 0
    ties: list[str] = []
    for answer in answers:
        own = _near_ties(runtime, answer, ends, 2 * error, where)
        equal += not own
        positions += len(answer.ids)
        ties += own
    return Parity(runtime.name, len(answers), equal, positions, len(ties), error, ties[0] if ties else "")


def _check_prompt(runtime: Runtime, answer: ReferenceAnswer, where: str) -> None:
    found = runtime.prompt_ids(answer.prompt)
    if found != answer.prompt_ids:
        pairs = zip(found, answer.prompt_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(answer.prompt_ids)))
        raise ModelError(
            where, f"{runtime.name} encodes a prompt differently: token {at} is {_at(found, at)}, not "
            f"{_at(answer.prompt_ids, at)} (question: {answer.prompt.messages[-1]['content'][:60]!r})",
            "nothing was exported; report this tokenizer",
        )  # fmt: skip


def _at(ids: Sequence[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "missing"


def _near_ties(
    runtime: Runtime, answer: ReferenceAnswer, ends: frozenset[int], tolerance: float, where: str
) -> list[str]:
    """Positions of an answer where the runtime predicts another token within the tolerance, in words."""
    ties, question = [], repr(answer.prompt.messages[-1]["content"][:60])
    found = runtime.likeliest(answer.prompt_ids, answer.ids)
    for at, (token, expected, margin) in enumerate(zip(found, answer.likeliest, answer.margins, strict=True)):
        if token == expected or (token == END and expected in ends):
            continue
        what = f"at token {at} of its answer to {question}: {token} instead of {expected}, margin {margin:.3g}"
        if margin > tolerance:
            raise ModelError(
                where, f"{runtime.name} answers differently {what}, rounding error {tolerance / 2:.3g}",
                "nothing was exported; report the model's architecture",
            )  # fmt: skip
        ties.append(what)
    return ties


class TransformersRuntime:
    """The exported folder in transformers, in float32."""

    name = "transformers"

    def __init__(self, folder: Path, model: PreTrainedModel | None = None) -> None:
        """Takes a model folder; `model` if transformers alone does not load it."""
        self._model = load_final(folder) if model is None else model
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See `Runtime`."""
        return _prompt_ids(self._tokenizer, prompt)

    @torch.no_grad()
    def likeliest(self, prompt_ids: Sequence[int], answer: Sequence[int]) -> list[int]:
        """See `Runtime`."""
        return [int(token) for token in _answer_logits(self._model, prompt_ids, answer).argmax(dim=-1)]
