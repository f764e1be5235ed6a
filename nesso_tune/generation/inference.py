"""Chat inference with a trained model, with the same rendering of conversations as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from nesso_tune.chat.special_tokens import CHAT_KEY
from nesso_tune.chat.tokenizer import encoder_of
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Message
from nesso_tune.errors import ModelError, first_line
from nesso_tune.hub import base_folder, is_hub_id
from nesso_tune.model.forward import choose_generation_mode

OnText = Callable[[str], None]
UNLIMITED_CONTEXT = 1 << 30  # tokens; for models whose config has no maximum


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; temperature 0 means greedy decoding."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0


class ChatModel:
    """A model and its tokenizer, ready to generate answers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._uses_cache = choose_generation_mode(model) != "uncached"

    def generate(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        language: str = UNKNOWN_LANGUAGE,
        on_text: OnText | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The model's next turn.

        Args:
            messages: the conversation so far, ending with a user or tool turn.
            sampling: sampling parameters.
            language: code that selects the default system message.
            on_text: called with each piece of text as it is generated.
            tools: tools that the model may call.
        """
        ids = torch.tensor([self._prompt_ids(messages, language, tools)], device=self._model.device)
        limits = {"max_new_tokens": sampling.max_new_tokens, "max_length": None, "use_cache": self._uses_cache}
        settings = GenerationConfig(**{**self._model.generation_config.to_diff_dict(), **limits})
        if sampling.temperature > 0:
            settings.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p)
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=None if on_text is None else _Streamer(self._tokenizer, on_text),
        )
        return str(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def remaining_context(
        self, messages: Sequence[Message], language: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Number of tokens that the model's context leaves for an answer."""
        context = getattr(self._model.config, "max_position_embeddings", None) or UNLIMITED_CONTEXT
        return int(context) - len(self._prompt_ids(messages, language, tools))

    def _prompt_ids(self, messages: Sequence[Message], language: str, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encodes by segments if the model has a template spec: control tokens in a message then stay plain text."""
        if CHAT_KEY in self._tokenizer.init_kwargs:
            return encoder_of(self._tokenizer).prompt(messages, language, tools)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        template = self._tokenizer.get_chat_template(tools=list(tools) or None)
        variables = {"messages": turns, "tools": list(tools) or None, "add_generation_prompt": True}
        text = render_jinja(template, {**self._tokenizer.special_tokens_map, **variables}, self._tokenizer.name_or_path)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def load_chat_model(model: str) -> ChatModel:
    """Loads a model folder, the `final/` of a run directory, or a hub model.

    Raises:
        ModelError: if there is no such model, or it has no chat template.
    """
    folder, here = Path(model), Path(model).exists()
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif not folder.is_dir() and (here or not is_hub_id(model) or folder.parent.is_dir()):
        raise ModelError(model, "no such model folder", "train it first, or name a folder with config.json and weights")
    else:
        folder = base_folder(model, weights=True, where=model)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where = str(model)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(where, "has no weights (*.safetensors)", "name the final/ folder of a finished run")
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


class _Streamer(TextStreamer):
    """Passes finished words to `on_text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self._on_text(text)
