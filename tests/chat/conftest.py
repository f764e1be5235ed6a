"""A small tokenizer with ids that can be read: every byte is its own id, so goldens are plain ASCII codes."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nesso_tune import load_tokenizer

TWO_BREAKS, HE, BOS, EOS, SLOTS = 256, 257, 258, 259, 260  # ids after the 256 bytes
WORDS = r"\p{L}+|\p{N}|\s*[\r\n]+|\s+|[^\s\p{L}\p{N}]+"


def byte_letters():
    """The letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def byte_tokenizer(slots):
    """256 bytes, two merges, BOS and EOS, `slots` reserved tokens; it puts BOS before every text."""
    letters = byte_letters()
    newline = letters[10]
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {newline * 2: TWO_BREAKS, "he": HE}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(newline, newline), ("h", "e")]))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(slots))]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", BOS)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def write_base(tmp_path_factory):
    """Writes a folder with a tokenizer, its configuration, and a context length; returns the path."""

    def write(tokenizer=None, slots=4, edit=None, **config):
        folder = tmp_path_factory.mktemp("base")
        content = json.loads((tokenizer or byte_tokenizer(slots)).to_str())
        if edit:
            edit(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def byte_base(write_base):
    """The byte-level base with four reserved slots."""
    return write_base()


@pytest.fixture(scope="session")
def tokenizer(byte_base):
    """It, ready for chat."""
    return load_tokenizer(byte_base)


LLAMA3_LIKE = """\
bos: true
header: "<|start_header_id|>{role}<|end_header_id|>\\n\\n"
end: "<|eot_id|>"
control_tokens:
  "<|start_header_id|>": "start of a header"
  "<|end_header_id|>": "end of a header"
  "<|eot_id|>": "end of the turn"
eos_token: "<|eot_id|>"
pad_token: "<|eot_id|>"
"""


@pytest.fixture(scope="session")
def llama3_file(tmp_path_factory):
    """A template file of one's own, with BOS."""
    path = tmp_path_factory.mktemp("templates") / "llama3_like.yaml"
    path.write_text(LLAMA3_LIKE)
    return str(path)
