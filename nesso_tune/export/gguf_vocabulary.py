"""The vocabulary of a GGUF file, from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from nesso_tune.chat.special_tokens import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, token_text
from nesso_tune.errors import ModelError, shortened

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of the pre-tokenizer in llama.cpp, by the pattern that splits texts and by `ignore_merges` of the BPE model.
PRE_TOKENIZERS = {
    (LLAMA3_SPLIT, True): "llama-bpe",
    (LLAMA3_SPLIT, False): "smaug-bpe",
    (QWEN2_SPLIT, False): "qwen2",
    (TEKKEN_SPLIT, True): "tekken",
    ("gpt-2", False): "gpt-2",
    ("digits gpt-2", False): "smollm",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a GGUF file and how texts are split into them.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE with byte fallback).
        pre: name of the pre-tokenizer.
        tokens: by id; rows of the embedding without a token have a placeholder.
        types: kind of each token.
        merges: of byte-level BPE, in order.
        scores: of SentencePiece tokens, in the order of the merges.
        special: ids by role: bos, eos, pad, unk.
        chat_template: the Jinja template.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    chat_template: str

    @classmethod
    def read(cls, folder: Path, rows: int) -> Vocabulary:
        """Reads the tokenizer of a model folder.

        Args:
            folder: from `save_final`.
            rows: number of rows of the embedding.

        Raises:
            ModelError: if llama.cpp has no counterpart of the tokenizer.
        """
        tokenizer = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        model, added = tokenizer["model"], {entry["id"]: entry for entry in tokenizer["added_tokens"]}
        if model.get("type", "BPE") != "BPE":
            raise _unsupported(f"a {model['type']} tokenizer")
        by_id = {number: token for token, number in model["vocab"].items()}
        by_id |= {number: entry["content"] for number, entry in added.items()}
        ids = {token: number for number, token in by_id.items()}
        tokens = [by_id.get(number, f"[PAD{number}]") for number in range(max(rows, *by_id, 0))]
        if len(tokens) > rows:
            raise ModelError(
                "--to gguf", f"the model has {rows} embedding rows for {len(tokens)} tokens", "train again"
            )
        merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
        is_bytes = not model.get("byte_fallback")
        special = {role: ids[text] for role in ("bos", "eos", "pad", "unk")
                   if (text := token_text(config.get(f"{role}_token"))) in ids}  # fmt: skip
        return cls(
            model="gpt2" if is_bytes else "llama",
            pre=_byte_level_name(tokenizer) if is_bytes else _sentencepiece_name(tokenizer),
            tokens=tokens,
            types=[_type(number, by_id, added, not is_bytes, model.get("unk_token")) for number in range(len(tokens))],
            merges=[" ".join(pair) for pair in merges] if is_bytes else [],
            scores=[] if is_bytes else _scores(tokens, merges),
            special=special,
            chat_template=(folder / TEMPLATE_FILE).read_text(encoding="utf-8"),
        )

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds the keys `tokenizer.…`. Only the template adds tokens to a text: no BOS, no EOS, no leading space."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        writer.add_chat_template(self.chat_template)


def _type(
    number: int, by_id: dict[int, str], added: dict[int, Any], has_byte_tokens: bool, unknown: str | None
) -> gguf.TokenType:
    if number not in by_id:
        return gguf.TokenType.UNUSED
    if by_id[number] == unknown:
        return gguf.TokenType.UNKNOWN
    if number in added:
        return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
    if has_byte_tokens and BYTE_TOKEN.fullmatch(by_id[number]):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The score of a token is minus the number of the first merge that forms it, as SentencePiece writes it."""
    order: dict[str, int] = {}
    for number, pair in enumerate(merges):
        order.setdefault("".join(pair), number)
    last = len(merges)
    return [-float(order.get(token, last)) for token in tokens]


def _byte_level_name(tokenizer: dict[str, Any]) -> str:
    """Name of the pre-tokenizer of byte-level BPE in llama.cpp.

    Raises:
        ModelError: if it splits texts in another way than those of llama.cpp that are known here.
    """
    stages = tokenizer.get("pre_tokenizer") or {}
    parts = stages["pretokenizers"] if stages.get("type") == "Sequence" else [stages]
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    split = _split(parts)
    name = PRE_TOKENIZERS.get((split, bool(tokenizer["model"].get("ignore_merges"))))
    if name is None or normalizer not in (None, "NFC"):  # llama.cpp does not normalise: texts in NFC are the same
        found = shortened(split if normalizer in (None, "NFC") else str(normalizer), 80)
        raise _unsupported(f"a pre-tokenizer that llama.cpp does not know ({found})")
    return name


def _split(parts: list[dict[str, Any]]) -> str:
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated" and not parts[1].get("use_regex"):
        return str(parts[0]["pattern"].get("Regex"))
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "digits gpt-2"
    return "+".join(map(str, kinds))


def _sentencepiece_name(tokenizer: dict[str, Any]) -> str:
    """`default`, if spaces become ▁ and nothing else is done to a text."""
    stages = [tokenizer.get(key) or {"type": None} for key in ("normalizer", "pre_tokenizer")]
    steps = [step for stage in stages for step in stage.get("normalizers", stage.get("pretokenizers", [stage]))]
    kinds = {step["type"] for step in steps if step["type"] is not None}
    replaces = [step for step in steps if step["type"] == "Replace"]
    is_plain = all(step["pattern"].get("String") == " " and step["content"] == "▁" for step in replaces)
    splits_words = any(step["type"] == "Metaspace" and step.get("split", True) for step in steps)
    if not kinds <= {"Replace", "Metaspace", "Split", "Prepend"} or not is_plain or splits_words:
        raise _unsupported(f"a normalizer or pre-tokenizer that llama.cpp lacks ({', '.join(sorted(kinds))})")
    return "default"


def _unsupported(what: str) -> ModelError:
    remedy = "export --to hf; byte-level and SentencePiece BPE are supported"
    return ModelError("--to gguf", f"the model has {what}", remedy)
