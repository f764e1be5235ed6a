"""Reads the tokenizer files of a base model as JSON, and adds control tokens to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokenizers import Tokenizer

from nesso_tune.errors import ModelError

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
CHAT_KEY = "nesso_chat"  # key in tokenizer_config.json with the template specification

NewTokens = Literal["auto", "reserved", "resize"]
NO_LEADING_SPACE: dict[str, dict[str, Any]] = {
    "Metaspace": {"add_prefix_space": False, "prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"start": 0},
}
RESERVED_TOKEN = re.compile(r"^<?[<\[|]*(?:reserved|unused|extra)[a-z_]*?[_-]?(\d+)[|\]>]*$", re.IGNORECASE)


def read_tokenizer(folder: Path, where: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of tokenizer.json, and of tokenizer_config.json with the defaults of other files filled in.

    Raises:
        ModelError: if there is no tokenizer or it cannot be read.
    """
    try:
        if not (folder / "tokenizer.json").is_file():
            return _converted(folder, where, trust_remote_code)
        tokenizer = _json(folder / "tokenizer.json")
        if not isinstance(tokenizer.get("added_tokens"), list) or not _has_vocabulary(tokenizer.get("model")):
            raise ValueError("tokenizer.json contains no vocabulary")
        older = _json(folder / "special_tokens_map.json")  # BOS and EOS of older models
        config: dict[str, Any] = {key: older[key] for key in ("bos_token", "eos_token") if key in older}
        config |= _json(folder / "tokenizer_config.json")
        context = config.get("model_max_length")
        if not isinstance(context, int) or context > 10**9:
            config["model_max_length"] = _json(folder / "config.json").get("max_position_embeddings")
        return tokenizer, config
    except (OSError, ValueError) as error:
        raise ModelError(where, f"its tokenizer cannot be read ({error})", "download the model again") from None


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} contains no JSON object")
    return content


def _has_vocabulary(model: Any) -> bool:
    return isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """Builds the tokenizer from the text of tokenizer.json.

    Raises:
        ModelError: if it is invalid.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(where, f"its tokenizer.json is damaged ({error})", "download the model again") from None


def _converted(folder: Path, where: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a tokenizer in an older file format, converted by transformers."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with TemporaryDirectory() as converted:
            loaded.save_pretrained(converted)
            return _json(Path(converted) / "tokenizer.json"), _json(Path(converted) / "tokenizer_config.json")
    except Exception:  # transformers does not wrap errors of its parsers
        raise ModelError(
            where, "has no tokenizer (no tokenizer.json, and no files to convert)", "name a complete model folder"
        ) from None


def token_text(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with properties."""
    return entry.get("content") if isinstance(entry, dict) else entry


@dataclass(frozen=True)
class PlacedTokens:
    """New control tokens as {token: id}: those that rename reserved slots, and those that are appended."""

    renamed: dict[str, int]
    added: dict[str, int]


def place_control_tokens(tokenizer: dict[str, Any], wanted: list[str], how: NewTokens, where: str) -> PlacedTokens:
    """Makes every wanted token a special token, in place.

    Args:
        tokenizer: content of tokenizer.json.
        wanted: control tokens of the template.
        how: where tokens that are not in the vocabulary go; see the recipe key `chat.new_tokens`.
        where: the place named in errors.

    Raises:
        ModelError: if `how` is `reserved` and there are too few reserved slots.
    """
    added_tokens = {entry["content"]: entry for entry in tokenizer["added_tokens"]}
    for token in wanted:
        if token in added_tokens:
            added_tokens[token].update(_special(added_tokens[token]["id"], token))  # some strip the spaces around them
    in_vocabulary = _vocabulary(tokenizer)
    missing = [token for token in wanted if token not in added_tokens]
    renamed, added = {}, {}
    slots = _reserved_slots(tokenizer)
    absent = [token for token in missing if token not in in_vocabulary]
    if how == "reserved" and len(slots) < len(absent):
        raise ModelError(
            where, f"the tokenizer has {len(slots)} reserved slots, the template needs {len(absent)}",
            "set chat.new_tokens: resize",
        )  # fmt: skip
    use_slots = how == "reserved" or (how == "auto" and len(slots) >= len(absent))
    for token in missing:
        if token in in_vocabulary:  # a regular token becomes special and keeps its id
            tokenizer["added_tokens"].append(_special(in_vocabulary[token], token))
        elif use_slots:
            renamed[token] = _rename(tokenizer, slots.pop(0), token)
        else:
            added[token] = _append(tokenizer, token)
    tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])
    return PlacedTokens(renamed, added)


def remove_implicit_tokens(tokenizer: dict[str, Any]) -> None:
    """Removes what the tokenizer adds to every text (BOS, EOS, a leading space), and truncation and padding, in place.

    Only the template adds tokens, and a text has the same ids at every position of a conversation.
    """
    tokenizer["truncation"] = tokenizer["padding"] = None
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        tokenizer[part] = _without_leading_space(tokenizer.get(part))
    processor = tokenizer.get("post_processor")
    steps = processor.get("processors", []) if processor and processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step and step["type"] == "ByteLevel"]
    tokenizer["post_processor"] = kept[0] if kept else None


def _without_leading_space(part: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder that neither adds nor removes a leading space."""
    if not part or part["type"] == "Prepend":
        return None
    part = {**part, **{key: off for key, off in NO_LEADING_SPACE.get(part["type"], {}).items() if key in part}}
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            part[key] = [kept for inner in part[key] if (kept := _without_leading_space(inner))]
    return part


def vocabulary_size(tokenizer: dict[str, Any]) -> int:
    """Number of ids: the highest id plus one."""
    ids = [entry["id"] for entry in tokenizer["added_tokens"]]
    return max([*_vocabulary(tokenizer).values(), *ids], default=-1) + 1


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: i for i, (token, _) in enumerate(vocabulary)}  # Unigram: a list of [token, score]


def _reserved_slots(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    found = [(m, e) for e in tokenizer["added_tokens"] if (m := RESERVED_TOKEN.match(e["content"]))]
    return [entry for match, entry in sorted(found, key=lambda pair: int(pair[0].group(1)))]


def _rename(tokenizer: dict[str, Any], slot: dict[str, Any], token: str) -> int:
    old, position = slot["content"], int(slot["id"])
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[token] = vocabulary.pop(old)
    elif isinstance(vocabulary, list) and position < len(vocabulary) and vocabulary[position][0] == old:
        vocabulary[position] = [token, vocabulary[position][1]]
    slot.update(_special(position, token))
    return position


def _append(tokenizer: dict[str, Any], token: str) -> int:
    position = vocabulary_size(tokenizer)
    tokenizer["added_tokens"].append(_special(position, token))
    return position


def _special(token_id: int, token: str) -> dict[str, Any]:
    return {
        "id": token_id, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
