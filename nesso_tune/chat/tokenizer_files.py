"""The files of a base's tokenizer, read as data."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from nesso_tune.errors import ModelError

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
CHAT_KEY = "nesso_chat"  # where tokenizer_config.json keeps the template's spec


def read_tokenizer(folder: Path, where: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of tokenizer.json, and bos, eos, context length and our template's spec from the files beside it.

    Raises:
        ModelError: if there is no tokenizer, or one that cannot be read.
    """
    try:
        if not (folder / "tokenizer.json").is_file():
            return _converted(folder, where, trust_remote_code)
        tokenizer = _json(folder / "tokenizer.json")
        if not isinstance(tokenizer.get("added_tokens"), list) or not _has_vocabulary(tokenizer.get("model")):
            raise ValueError("tokenizer.json holds no vocabulary")
        older = _json(folder / "special_tokens_map.json")  # where older models keep bos and eos
        config: dict[str, Any] = {key: older[key] for key in ("bos_token", "eos_token") if key in older}
        config |= _json(folder / "tokenizer_config.json")
        context = config.get("model_max_length")
        if not isinstance(context, int) or context > 10**9:
            config["model_max_length"] = _json(folder / "config.json").get("max_position_embeddings")
        return tokenizer, config
    except (OSError, ValueError) as error:
        raise ModelError(where, f"its tokenizer cannot be read ({error})", "fetch the model again") from None


def _json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one if there is no such file."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return content


def _has_vocabulary(model: Any) -> bool:
    return isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))


def parsed(text: str, where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        ModelError: if it describes none.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(where, f"its tokenizer.json is damaged ({error})", "fetch the model again") from None


def _converted(folder: Path, where: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenizers in older file formats, converted by transformers."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with TemporaryDirectory() as converted:
            loaded.save_pretrained(converted)
            return _json(Path(converted) / "tokenizer.json"), _json(Path(converted) / "tokenizer_config.json")
    except Exception:  # transformers raises whatever its parsers raise
        raise ModelError(
            where, "has no tokenizer (no tokenizer.json, nor files to make one from)", "name a complete model folder"
        ) from None


def token_name(entry: Any) -> str | None:
    """The text of a token that tokenizer_config.json names, alone or with its properties."""
    return entry.get("content") if isinstance(entry, dict) else entry
