"""Chat inference with a trained model, with the same rendering of conversations as in training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from nesso_tune.chat.base_template import render_jinja
from nesso_tune.chat.render import parse_answer
from nesso_tune.chat.special_tokens import CHAT_KEY
from nesso_tune.chat.template import ChatTemplate
from nesso_tune.chat.tokenizer import encoder_of
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message
from nesso_tune.errors import DataError, ModelError, RecipeError, check_whole, first_line, shortened
from nesso_tune.files import json_sha256, sha256
from nesso_tune.generation.answers import Answer, Prompt, generate_answers
from nesso_tune.generation.checkpoint_folder import is_checkpoint, model_folder_of
from nesso_tune.hub import base_folder, is_hub_id
from nesso_tune.logs import logger
from nesso_tune.model.forward import choose_generation_mode
from nesso_tune.recipes.builtin import flag_path

MIN_TEMPERATURE = 1e-5  # below, the most likely token has all the probability, and logits over it overflow
OnText = Callable[[str], None]
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # suffixes of files that decide the answers
PROVENANCE = "provenance.json"  # does not
KNOWN_SHARE = 0.5  # of the loss of guessing: below, a model knows an answer
UNLIMITED_CONTEXT = 1 << 30  # tokens; for models whose config has no maximum


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        max_new_tokens: maximum length of an answer in tokens.
        temperature: 0 means greedy decoding, and so does any value below `MIN_TEMPERATURE`.
        top_p: nucleus sampling: cumulative probability of the tokens that are sampled.

    Raises:
        RecipeError: for a value that is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            what = f"must be a finite number of at least 0, not {self.temperature!r}"
            raise RecipeError("temperature", what, "write 0 for greedy decoding, or about 0.7 to sample")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise RecipeError("top_p", f"must be a number above 0 and at most 1, not {self.top_p!r}", "correct it")

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; they replace those of the model's generation_config."""
        if self.is_greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of a given answer, without the end token.

    Attributes:
        nats: summed over its tokens.
        guessing: that of a model for which all tokens are equally likely.
        bytes: length of the answer in UTF-8.
    """

    nats: float
    guessing: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def is_known(self) -> bool:
        """Whether the model finds the answer much likelier than by guessing."""
        return self.nats < KNOWN_SHARE * self.guessing


class ChatModel:
    """A model and its tokenizer, ready to generate answers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._mode = choose_generation_mode(model)
        self._uses_cache = self._mode != "uncached"

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return encoder_of(self._tokenizer).template if CHAT_KEY in self._tokenizer.init_kwargs else None

    def generate(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        language: str = UNKNOWN_LANGUAGE,
        on_text: OnText | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The model's next turn, as text; `read` makes a message of it.

        Args:
            messages: the conversation so far, ending with a user or tool turn.
            sampling: sampling parameters.
            language: code that selects the default system message.
            on_text: called with each piece of text as it is generated.
            tools: tools that the model may call.
        """
        ids = torch.tensor([self._prompt_ids(messages, language, tools)], device=self._model.device)
        limits = {"max_new_tokens": sampling.max_new_tokens, "max_length": None, "use_cache": self._uses_cache}
        own = self._model.generation_config.to_diff_dict()
        settings = GenerationConfig(**{**own, **limits, **sampling.settings})
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=None if on_text is None else _Streamer(self._tokenizer, on_text, self._shown_tokens()),
        )
        return _decode(self._tokenizer, out[0, ids.shape[1] :].tolist(), self._shown_tokens())

    def read(self, answer: str) -> Message:
        """The message that renders to an answer of `generate`: its reasoning, content and calls."""
        return Message("assistant", answer) if self._template is None else parse_answer(answer, self._template)

    def _shown_tokens(self) -> frozenset[int]:
        """Control tokens that answers contain, in calls and around reasoning; they are part of the text."""
        template = self._template
        if template is None:
            return frozenset()
        texts = [template.tools.call] if template.tools is not None else []
        texts += [template.reasoning.start, template.reasoning.end] if template.reasoning is not None else []
        names = {piece for text in texts for piece, is_control in template.pieces(text) if is_control}
        return frozenset(self._tokenizer.convert_tokens_to_ids(name) for name in names)

    def answers(
        self, conversations: Sequence[Conversation], max_new_tokens: int, rank: int = 0, world_size: int = 1
    ) -> list[Answer]:
        """Greedy answers to many conversations in batches; see `generate_answers`.

        A conversation that leaves no room for an answer in the model's context gets an empty one that does not stop.
        """
        context = self._context
        prompts = [Prompt(self._prompt_ids(c.messages, c.language, c.tools), [], [], c.language) for c in conversations]
        fitting = [prompt for prompt in prompts if len(prompt.ids) < context]
        if len(fitting) < len(prompts):
            logger.warning(f"{len(prompts) - len(fitting)} prompts are longer than the context of {context} tokens")
        generated = iter(
            generate_answers(
                self._model, self._tokenizer, fitting, max_new_tokens, nullcontext(), rank, world_size, self._mode
            )
        )
        return [
            next(generated) if len(prompt.ids) < context else Answer(prompt, "", "", "", stopped=False)
            for prompt in prompts
        ]

    @torch.no_grad()
    def answer_losses(
        self, conversations: Sequence[Conversation], answers: Sequence[str], rank: int = 0, world_size: int = 1
    ) -> list[AnswerLoss | None]:
        """How likely the model finds given answers; None for one that does not fit into the context.

        With a world size, each process computes its part, and all processes get all losses.
        """
        losses = {
            i: self._answer_loss(conversations[i], answers[i]) for i in range(rank, len(conversations), world_size)
        }
        if world_size > 1:
            losses = dict(gather_object(list(losses.items())))
        return [losses[i] for i in range(len(conversations))]

    def _answer_loss(self, conversation: Conversation, answer: str) -> AnswerLoss | None:
        prompt = self._prompt_ids(conversation.messages, conversation.language, conversation.tools)
        ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids or len(prompt) + len(ids) > self._context:
            return None
        inputs = torch.tensor([prompt + ids], device=self._model.device)
        logits = self._model(input_ids=inputs, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, inputs[0, len(prompt) :], reduction="sum").item()
        return AnswerLoss(nats, len(ids) * math.log(logits.shape[-1]), len(answer.encode()))

    @property
    def _context(self) -> int:
        return int(getattr(self._model.config, "max_position_embeddings", None) or UNLIMITED_CONTEXT)

    def sample(
        self, conversations: Sequence[Conversation], n: int, sampling: Sampling, seed: int
    ) -> list[list[tuple[str, bool]]]:
        """Several sampled answers to each conversation, each with whether it ends with the end token.

        The answers depend on the seed and on the conversations alone: the state of random generators is kept.

        Raises:
            DataError: if a conversation leaves no room for an answer in the model's context.
        """
        if self._mode != "batch" and len(conversations) > 1:
            each = [self.sample([one], n, sampling, seed + i) for i, one in enumerate(conversations)]
            return [answers for (answers,) in each]
        ids = [self._prompt_ids(c.messages, c.language, c.tools) for c in conversations]
        longest, pad, end = max(map(len, ids)), self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        context = self._context
        if longest >= context:
            text = shortened(conversations[max(range(len(ids)), key=lambda i: len(ids[i]))].messages[-1].content)
            raise DataError("prompt", f"`{text}` fills the context of {context} tokens", "shorten it, or remove it")
        limits = {"max_new_tokens": min(sampling.max_new_tokens, context - longest), "max_length": None}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            out = self._model.generate(
                input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in ids], device=self._model.device),
                attention_mask=torch.tensor(
                    [[0] * (longest - len(p)) + [1] * len(p) for p in ids], device=self._model.device
                ),
                num_return_sequences=n, use_cache=self._uses_cache, pad_token_id=pad, eos_token_id=end,
                **limits, **sampling.settings,
            )  # fmt: skip
        found = []
        for row in out[:, longest:].tolist():
            stopped = end in row
            answer = row[: row.index(end)] if stopped else row
            found.append((str(self._tokenizer.decode(answer, skip_special_tokens=True)), stopped))
        return [found[i : i + n] for i in range(0, len(found), n)]

    def remaining_context(
        self, messages: Sequence[Message], language: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Number of tokens that the model's context leaves for an answer."""
        return self._context - len(self._prompt_ids(messages, language, tools))

    def _prompt_ids(self, messages: Sequence[Message], language: str, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encodes by segments if the model has a template spec: control tokens in a message then stay plain text.

        Raises:
            DataError: for a text that cannot be encoded.
        """
        for message in messages:
            _check_text(message.content)
        if CHAT_KEY in self._tokenizer.init_kwargs:
            return encoder_of(self._tokenizer).prompt(messages, language, tools)
        turns = [
            {"role": m.role, "content": m.content, **({"reasoning_content": m.reasoning} if m.reasoning else {})}
            for m in messages
        ]
        template = self._tokenizer.get_chat_template(tools=list(tools) or None)
        variables = {"messages": turns, "tools": list(tools) or None, "add_generation_prompt": True}
        text = render_jinja(template, {**self._tokenizer.special_tokens_map, **variables}, self._tokenizer.name_or_path)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_text(text: str) -> None:
    """Raises DataError for a text with lone surrogates, halves of characters that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"`{shortened(text)}` is not valid Unicode (a lone surrogate, character {error.start + 1})"
        raise DataError("prompt", what, "decode its bytes as UTF-8") from None


def load_chat_model(model: str, where: str | None = None) -> ChatModel:
    """Loads a model folder, the `final/` of a run directory, a checkpoint, or a hub model.

    Args:
        model: its path or hub id.
        where: its name in errors.

    Raises:
        ModelError: if there is no such model, or it has no chat template.
    """
    folder, where = find_model_folder(model), where or str(model)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        weights = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types for a damaged folder
        raise ModelError(where, f"cannot be loaded ({first_line(error)})", "check the folder") from None
    if tokenizer.chat_template is None:
        raise ModelError(where, "has no chat template: it is a base model", "train it on conversations first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ChatModel(weights.to(device).eval(), tokenizer)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], shown: frozenset[int]) -> str:
    """The text of an answer, without special tokens except those in `shown`."""
    if not shown:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    hidden = _special_ids(tokenizer) - shown
    return str(tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def find_model_folder(model: str) -> Path:
    """The folder of a model: itself, the `final/` of a run directory, or the snapshot of a hub model.

    For a checkpoint, it is a temporary folder; see `model_folder_of`.

    Raises:
        ModelError: if there is no such model, or it has no weights.
    """
    folder = Path(flag_path(model))
    if is_checkpoint(folder):
        return model_folder_of(folder)
    here, is_folder = os.path.exists(folder), os.path.isdir(folder)  # of pathlib they fail for a name that is too long
    if os.path.isdir(folder / "final"):
        folder = folder / "final"
    elif not is_folder and (here or not is_hub_id(model) or folder.parent.is_dir()):
        raise ModelError(
            shortened(model, 300),
            "no such model folder",
            "train it first, or name a folder with config.json and weights",
        )
    else:
        folder = base_folder(str(folder), weights=True, where=model)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(str(model), "has no weights (*.safetensors)", "name the final/ folder of a finished run")
    return folder


def model_digest(folder: Path) -> str:
    """Hash of the weights, configuration, tokenizer and chat template in a model folder."""
    files = sorted(f for f in folder.iterdir() if f.suffix in MODEL_FILES and f.name != PROVENANCE and f.is_file())
    return json_sha256({file.name: sha256(file) for file in files})


class _Streamer(TextStreamer):
    """Passes finished words to `on_text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, shown: frozenset[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=not shown)
        self._on_text = on_text
        self._hidden = _special_ids(tokenizer) - shown if shown else frozenset[int]()

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, and with each token."""
        if self.next_tokens_are_prompt or not self._hidden.intersection(value.flatten().tolist()):
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self._on_text(text)
