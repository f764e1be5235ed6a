"""Creates the quickstart base: a small tokenizer and the configuration of a tiny model, without weights.

Trains a byte-level BPE tokenizer like that of Llama 3 on ``recipes/quickstart/data`` and writes it with a Zagreus-like
``LlamaForCausalLM`` configuration to ``recipes/quickstart/base``. As in Llama 3.2, the tokenizer adds the BOS token
(post-processor) and has no pad token, no chat template, and some reserved special tokens.

Offline and deterministic: ``python scripts/make_quickstart_base.py``.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart"
FILES = ("conversations", "heldout", "pairs", "pairs_heldout")
VOCAB_SIZE = 2048
MAX_LENGTH = 512
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = [BOS, EOS, *(f"<|reserved_special_token_{i}|>" for i in range(8))]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts(data: Path) -> Iterator[str]:
    """Yields every message, prefixed by its role, and every answer of the data files."""
    for name in FILES:
        for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for message in row.get("messages", row.get("prompt")):
                yield f"{message['role']}\n{message['content']}"
            yield from (row[key] for key in ("chosen", "rejected") if key in row)


def train_tokenizer(data: Path) -> Tokenizer:
    """Trains the byte-level BPE. The special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos]
    )
    return tokenizer


def main() -> None:
    """Writes the tokenizer and the configuration."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(QUICKSTART / "data"), bos_token=BOS, eos_token=EOS, model_max_length=MAX_LENGTH
    )
    fast.save_pretrained(QUICKSTART / "base")
    # fmt: off
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=len(fast), max_position_embeddings=MAX_LENGTH,
        hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-5, initializer_range=0.07,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=None, tie_word_embeddings=True,
    )
    # fmt: on
    config.save_pretrained(QUICKSTART / "base")


if __name__ == "__main__":
    main()
