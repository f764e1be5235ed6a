"""`final/` and its card."""

import pytest

from nesso_tune.run import train
from tests.support.runs import recipe


def test_a_private_source_leaves_no_trace_in_final(tmp_path, talks, write_rows, chats):
    secret = write_rows(chats, "segretissimo.jsonl")
    some = recipe("sft", tmp_path / "run", [talks])
    sources = (*some.data.sources, some.data.sources[0].model_copy(update={"path": secret, "private": True}))
    some = some.model_copy(update={"data": some.data.model_copy(update={"sources": sources})})
    final = train(some).model_dir
    assert "talks.jsonl" in (final / "README.md").read_text(encoding="utf-8")
    for file in final.iterdir():
        assert b"segretissimo" not in file.read_bytes(), file.name


@pytest.mark.parametrize("system", ["Sei Nesso.", {"it": "Sei Nesso.", "en": "You are Nesso."}])
def test_default_system_is_in_the_shipped_template(tmp_path, talks, system):
    from transformers import AutoTokenizer

    final = train(recipe("sft", tmp_path / "run", [talks], chat={"default_system": system})).model_dir
    tokenizer = AutoTokenizer.from_pretrained(final)
    turn = [{"role": "user", "content": "Ciao"}]
    assert "Sei Nesso." in tokenizer.apply_chat_template(turn, tokenize=False)
    own = [{"role": "system", "content": "Altro."}, *turn]
    assert "Nesso" not in tokenizer.apply_chat_template(own, tokenize=False)
    if isinstance(system, dict):
        assert "You are Nesso." in tokenizer.apply_chat_template(turn, tokenize=False, language="en")


def test_final_is_replaced_as_a_whole(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    final = train(some).model_dir
    (final / "stale.bin").write_bytes(b"old")
    train(some, overwrite=True)
    assert not (final / "stale.bin").exists()
    assert not list((tmp_path / "run").glob(".*.partial"))
