"""The chat tokenizer: the tokenizer of a base model with control tokens and a chat template, and without implicit BOS.

It is a set of files. Data preparation reads them with `tokenizers`; training, `final/` and inference servers read the
same files with transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from nesso_tune.chat.base_template import DEFAULT_TEMPLATE, BaseTemplate, choose_template, match_base_template
from nesso_tune.chat.encoding import ChatEncoder, token_id
from nesso_tune.chat.jinja import to_jinja
from nesso_tune.chat.render import TrainOnEos, TurnsToTrain
from nesso_tune.chat.special_tokens import (
    CHAT_KEY,
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    NewTokens,
    PlacedTokens,
    parse_tokenizer,
    place_control_tokens,
    read_tokenizer,
    remove_implicit_tokens,
    token_text,
    vocabulary_size,
)
from nesso_tune.chat.template import ChatTemplate, DefaultSystem, load_template
from nesso_tune.conversation import Conversation
from nesso_tune.errors import ModelError, RecipeError
from nesso_tune.hub import base_folder, check_pinned
from nesso_tune.recipes.sections import ChatSection, ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Only the template adds tokens to a text. Some readers of tokenizer_config.json assume otherwise: llama.cpp prepends
# BOS or a space for some tokenizers, unless these keys are set.
NO_IMPLICIT_TOKENS = {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": False}


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with chat template, as files.

    Attributes:
        template: the chat template.
        default_system: system message for conversations without one.
        files: contents of the files in `final/` by name.
        placed: control tokens that the base does not have.
        starts_from: for each placed id, the ids whose mean embedding initializes its row.
        size: number of ids.
        backend: the tokenizer of the `tokenizers` library.
        bos_id: id of the BOS token that the template adds; None if it adds none.
        eos_id: id of the token that ends a turn.
        pad_id: id of the padding token.
        notes: messages to the user about the choice of the template.
    """

    template: ChatTemplate
    default_system: DefaultSystem
    files: dict[str, str]
    placed: PlacedTokens
    starts_from: dict[int, tuple[int, ...]]
    size: int
    backend: Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines token ids and masks, without keys that only other programs read."""
        config = {k: v for k, v in json.loads(self.files[CONFIG_FILE]).items() if k not in NO_IMPLICIT_TOKENS}
        relevant = {**self.files, CONFIG_FILE: _text(config), TEMPLATE_FILE: self._template_with_masks}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _template_with_masks(self) -> str:
        return to_jinja(self.template, self.default_system, masks=True)

    @cached_property
    def encoder(self) -> ChatEncoder:
        """Encoder of conversations with this tokenizer and template."""
        return ChatEncoder(self.backend, self.template, self.bos_id, self.default_system)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token, whether the template adds it or not."""
        name = json.loads(self.files[CONFIG_FILE]).get("bos_token")
        return None if name is None else self.backend.token_to_id(name)

    @property
    def new_ids(self) -> list[int]:
        """Ids of renamed and appended tokens, whose embeddings are not pre-trained."""
        return sorted(self.starts_from)

    def save(self, folder: Path) -> None:
        """Writes the files into an existing folder."""
        for name, content in self.files.items():
            (folder / name).write_text(content, encoding="utf-8")

    def load(self) -> PreTrainedTokenizerBase:
        """The tokenizer as a transformers object; its chat template supports `return_assistant_tokens_mask`."""
        from transformers import AutoTokenizer

        with TemporaryDirectory() as folder:
            self.save(Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = self._template_with_masks
        return tokenizer


def chat_tokenizer(model: ModelSection, chat: ChatSection) -> ChatTokenizer:
    """The chat tokenizer of a recipe. See `build_chat_tokenizer`."""
    check_pinned(model)
    folder = base_folder(model.base, model.revision)
    where = f"model.base {model.base}"
    return build_chat_tokenizer(
        folder, chat, where,
        trust_remote_code=model.trust_remote_code,
        has_weights=not model.random_init,  # random weights were not trained with any template
        context=model.overrides.get("max_position_embeddings"),
    )  # fmt: skip


def build_chat_tokenizer(
    folder: Path,
    chat: ChatSection,
    where: str,
    trust_remote_code: bool = False,
    has_weights: bool = True,
    context: Any = None,
) -> ChatTokenizer:
    """Builds the chat tokenizer of a base model.

    Args:
        folder: folder of the base model.
        chat: the `chat` section of the recipe.
        where: the place named in errors.
        trust_remote_code: allow code of the model to run.
        has_weights: whether the base has trained weights, which may depend on its own chat template.
        context: length of the model's context, if the recipe overrides it.

    Raises:
        ModelError: if there is no tokenizer, or if it has too few reserved slots.
        RecipeError: if the end or padding token does not fit the template, or if the base has an unknown chat template
            and the recipe names none.
    """
    tokenizer, config = read_tokenizer(folder, where, trust_remote_code)
    config["model_max_length"] = context or config.get("model_max_length")
    own = config.pop(CHAT_KEY, None)
    bos = token_text(config.get("bos_token"))
    undecided = own is None and chat.template is None and has_weights
    base_eos = token_text(config.get("eos_token"))
    foreign = match_base_template(folder, bos, chat.default_system, base_eos) if undecided else None
    template, notes = _chosen_template(own, foreign, chat, where)
    default_system = chat.default_system if chat.default_system is not None else (own or {}).get("default_system")
    _check_end(chat, template)
    placed = place_control_tokens(tokenizer, list(template.control_tokens), chat.new_tokens, where)
    remove_implicit_tokens(tokenizer)
    text = json.dumps(tokenizer, ensure_ascii=False)
    ready = parse_tokenizer(text, where)
    pad = chat.pad_token or template.pad_token
    if ready.token_to_id(pad) is None:
        raise RecipeError("chat.pad_token", f"{pad} is not in the vocabulary", "name a token that the tokenizer has")
    if template.bos and (bos is None or ready.token_to_id(bos) is None):
        raise ModelError(where, "the template begins with BOS, but the tokenizer has none", "use another chat.template")
    files = {
        TOKENIZER_FILE: text,
        CONFIG_FILE: _config_text(config, template, pad, default_system),
        TEMPLATE_FILE: to_jinja(template, default_system),
    }
    return ChatTokenizer(
        template=template,
        default_system=default_system,
        files=files,
        placed=placed,
        starts_from=_initial_embeddings(ready, base_eos, template, placed),
        size=vocabulary_size(tokenizer),
        backend=ready,
        bos_id=ready.token_to_id(bos) if template.bos and bos else None,
        eos_id=token_id(ready, template.eos_token),
        pad_id=token_id(ready, pad),
        notes=notes,
    )


def _check_end(chat: ChatSection, template: ChatTemplate) -> None:
    """Raises RecipeError if the recipe names another end token than the template has."""
    if chat.eos_token not in (None, template.eos_token):
        raise RecipeError(
            "chat.eos_token",
            f"{chat.eos_token} is not the token that ends turns in this template ({template.eos_token}): "
            "the model would not learn to stop",
            "remove it, or use a template that ends turns with it",
        )


def _chosen_template(
    own: dict[str, Any] | None, foreign: BaseTemplate | None, chat: ChatSection, where: str
) -> tuple[ChatTemplate, tuple[str, ...]]:
    """The template of a base trained by nesso-tune, of the recipe, or the equivalent of the base's own template.

    Args:
        own: the specification saved by nesso-tune with the base.
        foreign: the bundled template that matches the base's Jinja template, if it decides.
        chat: the `chat` section of the recipe.
        where: the place named in errors.

    Raises:
        ModelError: if the saved specification is damaged.
        RecipeError: if the recipe names another template than the one that the base was trained with.
    """
    if own is None:
        name, notes = (chat.template, ()) if chat.template is not None else choose_template(foreign, where)
        return load_template(name), notes
    try:
        template = ChatTemplate.model_validate(own["template"])
    except (ValueError, KeyError, TypeError):
        what = f"`{CHAT_KEY}` in its tokenizer_config.json is damaged"
        raise ModelError(where, what, "create the model again") from None
    if chat.template is not None and load_template(chat.template) != template:
        raise RecipeError(
            "chat.template", f"{chat.template} is not the template that {where} was trained with",
            "remove the key: the base contains its template and tokens",
        )  # fmt: skip
    return template, ()


def _config_text(config: dict[str, Any], template: ChatTemplate, pad: str, default_system: DefaultSystem) -> str:
    kept = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "bos_token": token_text(config.get("bos_token")),
        "eos_token": template.eos_token,
        "pad_token": pad,
        "model_max_length": config.get("model_max_length"),
        "clean_up_tokenization_spaces": False,
        **NO_IMPLICIT_TOKENS,
        CHAT_KEY: {"template": template.model_dump(), "default_system": default_system},
    }
    return _text({key: value for key, value in kept.items() if value is not None})


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False)


def _initial_embeddings(
    ready: Tokenizer, base_eos: str | None, template: ChatTemplate, placed: PlacedTokens
) -> dict[int, tuple[int, ...]]:
    """For each new token id, the ids whose mean embedding initializes it: its text in the template, and the old EOS."""
    out = {}
    for token, position in {**placed.renamed, **placed.added}.items():
        ids = list(ready.encode(template.control_tokens[token], add_special_tokens=False).ids)
        if token == template.end and base_eos is not None and (eos := ready.token_to_id(base_eos)) is not None:
            ids.append(eos)
        out[position] = tuple(dict.fromkeys(ids))
    return out


def load_tokenizer(
    base: str | Path, template: str | Path = DEFAULT_TEMPLATE, new_tokens: NewTokens = "auto"
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model with a chat template, as a transformers object.

    Args:
        base: hub id or folder.
        template: name or file of a chat template.
        new_tokens: ids of new control tokens; see the recipe key `chat.new_tokens`.

    Raises:
        ModelError, RecipeError: see `build_chat_tokenizer`.
    """
    chat = ChatSection(template=str(template), new_tokens=new_tokens)
    return chat_tokenizer(ModelSection(base=str(base)), chat).load()


@lru_cache(maxsize=4)
def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer with chat template.

    Raises:
        ModelError: if the tokenizer has no template specification.
    """
    own = tokenizer.init_kwargs.get(CHAT_KEY)
    if own is None:
        raise ModelError("tokenizer", "has no nesso-tune chat template", "load it with nesso_tune.load_tokenizer")
    template = ChatTemplate.model_validate(own["template"])
    bos = tokenizer.bos_token_id if template.bos else None
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # the encoder changes its settings
    return ChatEncoder(copy, template, bos, own["default_system"])


def encode_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    roles_to_train: Collection[str] = ("assistant",),
    train_on_eos: TrainOnEos = "turn",
    turns_to_train: TurnsToTrain = "all",
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation.

    Args:
        conversation: the messages.
        tokenizer: from `load_tokenizer`, or from the folder of a trained model.
        roles_to_train: roles whose content is supervised.
        train_on_eos: which end tokens are supervised.
        turns_to_train: whether all turns of these roles are supervised, or only the last one.

    Returns:
        `input_ids` and `labels` of the same length; labels are unshifted, -100 where not supervised.

    Raises:
        ModelError: if the tokenizer has no nesso-tune chat template.
        RecipeError: if the template cannot write the conversation, or not as the model would generate it.
    """
    encoded = encoder_of(tokenizer).conversations([conversation], roles_to_train, train_on_eos, turns_to_train)[0]
    return encoded.ids, encoded.labels
