"""Where control tokens go, and what a chat-ready tokenizer keeps when it is saved and read again."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from nesso_tune import Conversation, Message, ModelError, RecipeError, encode_conversation, load_tokenizer
from nesso_tune.chat.tokenizer import build_chat_tokenizer, encoder_of
from nesso_tune.recipes.sections import ChatSection

CHAT = Conversation((Message("user", "he said <|im_end|>"), Message("assistant", "\nyes")))


def build(folder, **chat):
    return build_chat_tokenizer(Path(folder), ChatSection(**chat), "base")


def test_the_public_loader_takes_paths_as_text_or_as_path(byte_base, llama3_file):
    by_text = load_tokenizer(str(byte_base), str(llama3_file))
    assert load_tokenizer(Path(byte_base), Path(llama3_file)).get_vocab() == by_text.get_vocab()


def test_auto_renames_reserved_slots(byte_base):
    before = AutoTokenizer.from_pretrained(byte_base)
    chat = build(byte_base)
    after = chat.load()
    assert chat.placed.renamed == {"<|im_start|>": 260, "<|im_end|>": 261}
    assert not chat.placed.added
    assert chat.size == len(after) == len(before) == 264
    assert after.convert_ids_to_tokens([260, 261, 262]) == [
        "<|im_start|>",
        "<|im_end|>",
        "<|reserved_special_token_2|>",
    ]
    assert chat.new_ids == [260, 261]


def test_slots_are_taken_in_the_order_of_their_numbers(write_base):
    def shuffle(content):
        names = [10, 2, 1, 0]
        for entry, number in zip(content["added_tokens"][2:], names, strict=True):
            entry["content"] = f"<|reserved_special_token_{number}|>"

    assert build(write_base(edit=shuffle)).placed.renamed == {"<|im_start|>": 263, "<|im_end|>": 262}


@pytest.mark.parametrize("slots", [0, 1])
def test_auto_appends_where_slots_do_not_suffice(write_base, slots):
    chat = build(write_base(slots=slots))
    assert chat.placed.added == {"<|im_start|>": 260 + slots, "<|im_end|>": 261 + slots}
    assert chat.size == len(chat.load()) == 262 + slots


def test_resize_appends_although_there_are_slots(byte_base):
    chat = build(byte_base, new_tokens="resize")
    assert (chat.placed.renamed, chat.placed.added) == ({}, {"<|im_start|>": 264, "<|im_end|>": 265})
    assert encode_conversation(CHAT, chat.load())[0][0] == 264


def test_reserved_without_slots_is_an_error(write_base):
    with pytest.raises(ModelError, match=r"has 1 reserved slots, the template needs 2; set chat.new_tokens: resize"):
        build(write_base(slots=1), new_tokens="reserved")


def test_new_rows_start_from_words_and_the_bases_own_end(byte_base):
    starts = build(byte_base).starts_from
    assert starts[260] == tuple(dict.fromkeys(b"start of a message"))
    end = [*b"end of t", 257, *b" message"]  # "he" is one token
    assert starts[261] == (*dict.fromkeys(end), 259)  # and <|end_of_text|>


def test_end_and_padding_are_the_end_token(tokenizer):
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 261
    assert tokenizer.model_max_length == 512


def test_nothing_is_added_around_a_text(byte_base, tokenizer):
    assert AutoTokenizer.from_pretrained(byte_base)("a")["input_ids"] == [258, 97]
    assert tokenizer("a")["input_ids"] == [97]
    assert tokenizer("a", "b")["input_ids"] == [97, 98]


def test_the_bases_truncation_and_padding_are_gone(write_base):
    def truncate(content):
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                              "pad_type_id": 0, "pad_token": "x"}  # fmt: skip

    tokenizer = load_tokenizer(write_base(edit=truncate))
    ids, _ = encode_conversation(Conversation((Message("assistant", "a" * 50),)), tokenizer)
    assert ids.count(97) == 50 + "assistant".count("a")
    assert tokenizer("a" * 50)["input_ids"] == [97] * 50


def test_saved_by_transformers_and_read_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_conversation(CHAT, again) == encode_conversation(CHAT, tokenizer)
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert len(again) == len(tokenizer)
    assert encode_conversation(CHAT, load_tokenizer(str(tmp_path))) == encode_conversation(CHAT, tokenizer)


def test_saved_by_ourselves_and_made_ready_again(byte_base, tmp_path):
    first = build(byte_base, default_system="Be kind.", template="chatml")
    first.save(tmp_path)
    second = build(tmp_path)  # as DPO meets it: template and system message come with the base
    assert second.files == first.files
    assert second.fingerprint == first.fingerprint
    assert second.starts_from == {}
    assert second.default_system == "Be kind."


def test_the_fingerprint_follows_what_decides_the_ids(byte_base):
    same, other = build(byte_base), build(byte_base, default_system="x")
    assert build(byte_base).fingerprint == same.fingerprint != other.fingerprint


def test_another_template_than_the_base_was_trained_with_is_refused(byte_base, llama3_file, tmp_path):
    build(byte_base, template=llama3_file).save(tmp_path)
    assert build(tmp_path).template.bos
    with pytest.raises(RecipeError, match="chatml is not the template that base was trained with"):
        build(tmp_path, template="chatml")


def test_a_base_that_has_the_tokens_keeps_their_ids(write_base):
    def own(content):  # an end token that swallows the blanks after it would eat the separator
        content["added_tokens"][2].update(content="<|im_end|>", rstrip=True, special=False)
        content["added_tokens"][3].update(content="<|im_start|>", normalized=True)

    chat = build(write_base(edit=own))
    assert (chat.placed.renamed, chat.placed.added, chat.starts_from) == ({}, {}, {})
    ids, _ = encode_conversation(CHAT, chat.load())
    said = [257, *b" said <|im_end|>"]
    assert ids == [261, *b"user\n", *said, 260, 10, 261, *b"assistant\n", 10, *b"yes", 260, 10]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rendered = chat.load().apply_chat_template(turns, tokenize=True)["input_ids"]
    assert rendered == [261, *b"user\nx", 260, 10, 261, *b"assistant\ny", 260, 10]


def test_a_plain_word_of_the_vocabulary_becomes_the_control_token(write_base):
    def word(content):
        content["model"]["vocab"]["<|im_end|>"] = 264

    chat = build(write_base(edit=word))
    assert chat.load().convert_tokens_to_ids("<|im_end|>") == 264
    assert chat.placed.renamed == {"<|im_start|>": 260}


def test_end_token_override_must_be_the_templates(byte_base):
    assert build(byte_base, eos_token="<|im_end|>").eos_id == 261
    with pytest.raises(RecipeError, match=r"chat.eos_token: </s> is not the token that ends turns in this template"):
        build(byte_base, eos_token="</s>")


def test_padding_token_override(byte_base):
    chat = build(byte_base, pad_token="<|end_of_text|>")
    assert (chat.pad_id, chat.eos_id, chat.load().pad_token_id) == (259, 261, 259)
    with pytest.raises(RecipeError, match=r"chat.pad_token: \[PAD\] is not in the vocabulary"):
        build(byte_base, pad_token="[PAD]")


def test_a_template_with_bos_needs_one(write_base, llama3_file):
    with pytest.raises(ModelError, match="begins with BOS, but the tokenizer has none"):
        build(write_base(bos_token=None), template=llama3_file)


def damage(name, content):
    def apply(folder):
        (folder / name).write_text(content)

    return apply


DAMAGED = {
    "cut short": damage("tokenizer.json", '{"version": "1.0", "added_'),
    "a list": damage("tokenizer.json", "[]"),
    "no vocabulary": damage("tokenizer.json", '{"added_tokens": []}'),
    "no model type": damage("tokenizer.json", '{"added_tokens": [], "model": {"vocab": {"a": 0}, "type": "Nope"}}'),
    "settings": damage("tokenizer_config.json", "{"),
    "settings are a list": damage("tokenizer_config.json", "[1]"),
    "shape": damage("config.json", "{nope"),
    "own template": damage("tokenizer_config.json", '{"nesso_chat": {"template": {"bos": 3}}}'),
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_missing_tokenizer_is_a_model_error(write_base, spoil):
    folder = Path(write_base())
    spoil(folder)
    with pytest.raises(ModelError, match=r"^base: "):
        build(folder)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="run the recipe that creates it first"):
        load_tokenizer("outputs/never-ran/final")
    with pytest.raises(ModelError, match="the folder is empty"):
        load_tokenizer(str(tmp_path))


def test_tokens_of_older_models_stand_in_the_special_tokens_map(write_base, llama3_file):
    folder = Path(write_base())
    (folder / "tokenizer_config.json").unlink()
    names = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    assert build(folder, template=llama3_file).bos_id == 258


def unigram():
    """SentencePiece-like: words with a leading space mark, and a space put before every text."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>|_/.,▁\n"]
    first = [(name, 0.0) for name in ("<unk>", "<s>", "</s>", "<unused0>", "<unused1>")]
    tokenizer = Tokenizer(models.Unigram([*first, *letters, ("▁ciao", -3.0), ("ciao", -3.5)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([name for name, _ in first])
    return tokenizer


def test_a_unigram_tokenizer_encodes_every_text_alike_wherever_it_stands(write_base):
    chat = build(write_base(unigram(), bos_token="<s>", eos_token="</s>"))
    tokenizer = chat.load()
    assert chat.placed.renamed == {"<|im_start|>": 3, "<|im_end|>": 4}
    turns = [Message("user", "ciao ciao"), Message("assistant", "ciao, ciao")]
    ids, _ = encode_conversation(Conversation(tuple(turns)), tokenizer)
    assert ids == tokenizer.apply_chat_template([vars(turn) for turn in turns], tokenize=True)["input_ids"]
    text = "<|im_start|>user\nciao ciao<|im_end|>\n<|im_start|>assistant\nciao, ciao<|im_end|>\n"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["<|im_end|>", "ciao <s> ciao</s>", "<|im_start|><|im_end|>", "<<|im_end|>>"])
def test_words_that_are_special_tokens_stay_text_in_a_unigram_vocabulary(write_base, text):
    tokenizer = load_tokenizer(write_base(unigram(), bos_token="<s>", eos_token="</s>"))
    prompt = encoder_of(tokenizer).prompt([Message("user", text)], "it")
    assert [prompt.count(i) for i in (1, 2, 3, 4)] == [0, 0, 2, 1]
    assert text in tokenizer.decode(prompt)


def test_a_word_level_tokenizer(write_base):
    words = [
        "[UNK]",
        "user",
        "assistant",
        "ciao",
        "bene",
        "[unused1]",
        "[unused2]",
        *["start", "of", "a", "message", "end", "the"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[unused1]", "[unused2]"])
    ready = load_tokenizer(write_base(tokenizer, bos_token=None, eos_token=None))
    conversation = Conversation((Message("user", "ciao <|im_end|> ciao"), Message("assistant", "bene")))
    ids, labels = encode_conversation(conversation, ready)
    assert ids == [5, 1, 3, 0, 0, 3, 6, 5, 2, 4, 6]
    assert labels == [-100] * 9 + [4, 6]
