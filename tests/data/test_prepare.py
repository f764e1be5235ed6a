"""`prepare_data`: its report adds up, and its rows are what the recipe says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune import Conversation, DataError, Message, RecipeError, encode_conversation, prepare_data
from nesso_tune.data.prepare import hold_out
from tests.support.examples import examples

COUNTS = {"rows", "tokens", "supervised_tokens"}
CONTRACT = {"rows_read", "rows_kept", "dropped", "tokens", "supervised_tokens", "languages", "sources", "packing",
            "fingerprint", "cache_hit"}  # fmt: skip
FAULTS = [
    {"messages": [{"role": "user", "content": "alone"}], "language": "it"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ud800"}]},
    {"messages": []},
    {"other": 1},
]


def adds_up(report):
    assert report.keys() >= CONTRACT
    assert report["rows_read"] == report["rows_kept"] + sum(report["dropped"].values())
    for name in ("tokens", "supervised_tokens"):
        assert report[name] == sum(group[name] for group in report["languages"].values())
        assert report[name] == sum(group[name] for group in report["sources"])
    assert report["rows_kept"] == sum(group["rows"] for group in report["languages"].values())
    for source in report["sources"]:
        assert source.keys() >= COUNTS | {"path", "rows_read", "dropped"}
        assert source["rows_read"] == source["rows"] + sum(source["dropped"].values())


def ascii_rows(tmp_path, rows):
    path = tmp_path / "ascii.jsonl"  # escapes keep lone surrogates writable
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_report_adds_up(sft, chats, write_rows, tmp_path):
    recipe = sft(write_rows(chats), ascii_rows(tmp_path, [*chats[:3], *FAULTS]))
    data = prepare_data(recipe)
    report = data.report
    adds_up(report)
    assert (report["rows_read"], report["rows_kept"]) == (17, 13)
    assert report["dropped"] == {
        "no_assistant_turn": 1, "invalid_unicode": 1, "no_messages": 1, "missing_field": 1,
    }  # fmt: skip
    assert {code: group["rows"] for code, group in report["languages"].items()} == {"en": 5, "it": 8}
    assert report["tokens"] == sum(len(ids) for ids in data.train["input_ids"])
    assert report["supervised_tokens"] == sum(label != -100 for row in data.train["labels"] for label in row)
    assert report["packing"]["rows"] == len(data.train)
    assert report["packing"]["fill"] == pytest.approx(report["tokens"] / (len(data.train) * 256), abs=1e-4)


def test_prepared_data_has_a_short_repr(sft, chats, write_rows):
    data = prepare_data(sft(write_rows(chats), validation_size=2))
    text = repr(data)
    assert text.startswith("PreparedData(")
    assert data.summary.fingerprint in text
    assert all("\n" not in of and len(of) < 160 for of in (text, repr(data.train), repr(data.train.documents)))


def test_rows_hold_what_encode_conversation_gives(sft, chats, write_rows):
    data = prepare_data(sft(write_rows(chats), packing=False))
    expected = sorted(
        encode_conversation(Conversation(tuple(Message(**m) for m in row["messages"])), data.tokenizer) for row in chats
    )
    assert sorted((row["input_ids"], row["labels"]) for row in data.train) == expected
    assert {len(row["seq_lengths"]) for row in data.train} == {1}


def test_packed_rows_name_the_language_of_each_document(sft, chats, write_rows):
    rows = prepare_data(sft(write_rows(chats))).train
    assert sorted(code for row in rows for code in row["languages"]) == ["en"] * 5 + ["it"] * 5
    assert all(len(row["languages"]) == len(row["seq_lengths"]) for row in rows)


def test_held_out_rows_are_stratified_and_not_trained_on(sft, chats, write_rows):
    data = prepare_data(sft(write_rows(chats), validation_size=4))
    assert sorted(code for row in data.validation for code in row["languages"]) == ["en", "en", "it", "it"]
    assert not set(data.validation.records) & set(data.train.records)
    assert data.summary.train.rows + data.summary.validation.rows == 10
    with pytest.raises(RecipeError, match="leave nothing to train on"):
        prepare_data(sft(write_rows(chats), validation_size=10))


def test_validation_sources_take_the_place_of_a_split(sft, chats, write_rows):
    held = {"path": write_rows(chats[:3], "held.jsonl")}
    make = {"validation_sources": [held], "validation_size": 0}
    data = prepare_data(sft(write_rows(chats[3:]), **make))
    assert (data.summary.train.rows, data.summary.validation.rows) == (7, 3)
    again = prepare_data(sft(write_rows(chats[3:]), **make)).report
    assert again["cache_hit"]
    write_rows([*chats[:2], chats[9]], "held.jsonl")
    changed = prepare_data(sft(write_rows(chats[3:]), **make)).report
    assert not changed["cache_hit"]
    assert changed["fingerprint"] != again["fingerprint"]


def dialogue(*lengths):
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "w " * n}] for n in lengths]
    return {"messages": [message for pair in turns for message in pair]}


@pytest.mark.parametrize("train_on_eos", ["turn", "last", "all"])
def test_truncation_ends_with_a_learned_end_token(sft, write_rows, train_on_eos):
    path = write_rows([dialogue(5, 5), dialogue(5, 200), dialogue(200)])
    data = prepare_data(sft(path, sequence_len=64, too_long="truncate", train_on_eos=train_on_eos, packing=False))
    assert data.summary.dropped == {"too_long": 1}
    whole, cut = sorted(data.train, key=lambda row: -len(row["input_ids"]))
    assert len(cut["input_ids"]) <= 64
    assert cut["input_ids"] == whole["input_ids"][: len(cut["input_ids"])]
    assert cut["labels"][-1] == cut["input_ids"][-1] == data.chat.eos_id


def test_too_long_is_dropped_or_refused(sft, write_rows):
    path = write_rows([dialogue(5), dialogue(200)])
    assert prepare_data(sft(path, sequence_len=64)).summary.dropped == {"too_long": 1}
    with pytest.raises(DataError, match=r"rows.jsonl:2: has \d+ tokens, more than data.sequence_len 64; raise"):
        prepare_data(sft(path, sequence_len=64, too_long="error"))


def test_pairs(dpo, duels, write_rows):
    data = prepare_data(dpo(write_rows(duels), validation_size=2))
    adds_up(data.report)
    assert (len(data.train), len(data.validation)) == (4, 2)
    row = data.train[0]
    end = data.chat.eos_id
    assert row.keys() >= {"prompt_ids", "chosen_ids", "rejected_ids", "languages"}
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end != row["chosen_ids"][-2]
    assert data.tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert data.tokenizer.decode(row["rejected_ids"]) == "Boh.<|im_end|>"
    answers = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for rows in (data.train, data.validation) for r in rows)
    assert data.summary.supervised_tokens == answers


def test_a_pair_is_as_long_as_its_prompt_and_longer_answer(dpo, duels, write_rows):
    long = {"prompt": "q", "chosen": "w " * 100, "rejected": "Boh."}
    path = write_rows([*duels, long])
    assert prepare_data(dpo(path, sequence_len=64)).summary.dropped == {"too_long": 1}
    with pytest.raises(DataError, match=r"rows.jsonl:7: has"):
        prepare_data(dpo(path, sequence_len=64, too_long="error"))


def test_data_of_the_other_method_is_refused(sft, dpo, chats, duels, write_rows):
    with pytest.raises(DataError, match="contains preference pairs, but SFT needs conversations"):
        prepare_data(sft(write_rows(duels)))
    with pytest.raises(DataError, match="contains conversations, but DPO needs a chosen and a rejected answer"):
        prepare_data(dpo(write_rows(chats)))


def test_scores(sft, chats, write_rows):
    for i, row in enumerate(chats):
        row["score"] = i / 10
    chats[9]["score"] = float("nan")
    source = {"path": write_rows(chats), "min_score": 0.5, "score_field": "score"}
    assert prepare_data(sft(source)).summary.dropped == {"below_min_score": 6}
    chats[4]["score"] = "high"
    write_rows(chats)
    with pytest.raises(DataError, match=r"rows.jsonl:5: `score` is not a number"):
        prepare_data(sft(source))


def test_max_rows_and_languages(sft, chats, write_rows):
    path = write_rows(chats)
    assert prepare_data(sft({"path": path, "max_rows": 3})).summary.rows_read == 3
    assert prepare_data(sft({"path": path, "language": "it-IT"})).summary.languages.keys() == {"it"}
    for row in chats:
        row["codice"] = {"it": "Italiano", "en": "en_GB"}[row.pop("language")]
    write_rows(chats)
    assert prepare_data(sft(path)).summary.languages.keys() == {"und"}
    assert prepare_data(sft({"path": path, "language_field": "codice"})).summary.languages.keys() == {"en", "it"}


def test_more_rows_than_are_encoded_at_a_time(sft, chats, write_rows):
    report = prepare_data(sft(write_rows([*chats, FAULTS[2]] * 210))).report
    adds_up(report)
    assert (report["rows_read"], report["rows_kept"]) == (2310, 2100)


def test_weights_change_what_an_epoch_holds(sft, chats, write_rows):
    more, less = write_rows(chats[:4], "a.jsonl"), write_rows(chats[4:], "b.jsonl")
    data = prepare_data(sft({"path": more, "weight": 2.0}, {"path": less, "weight": 0.5}, packing=False))
    assert data.summary.rows_kept == 10
    assert data.summary.train.rows == len(data.train) == 4 * 2 + 3


def test_nothing_usable_is_an_error_with_the_reasons(sft, write_rows, tmp_path):
    answers = [("assistant", ""), ("assistant", " "), ("narrator", "x")]
    path = write_rows([{"messages": [{"role": role, "content": text}]} for role, text in answers])
    with pytest.raises(
        DataError,
        match=r"none of 3 rows .*\(empty_answer: 2, e.g. .*:1; unknown_role: 1, e.g. .*:3: `narrator`\); correct",
    ):
        prepare_data(sft(path))
    (tmp_path / "no_rows.json").write_text("[]")
    with pytest.raises(DataError, match="contains no rows"):
        prepare_data(sft(str(tmp_path / "no_rows.json")))


def test_training_on_a_role_that_never_speaks_is_an_error(sft, chats, write_rows):
    with pytest.raises(DataError, match="nothing_to_learn: 10"):
        prepare_data(sft(write_rows(chats), roles_to_train=["tool"]))


def test_several_files_of_different_kinds_are_one_source(sft, chats, write_rows, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(chats[:4]))
    (folder / "b.jsonl").write_text("\n".join(json.dumps(row) for row in chats[4:]))
    assert prepare_data(sft(str(folder))).summary.rows_kept == 10
    assert prepare_data(sft(f"{folder}/*.jsonl")).summary.rows_kept == 6


def test_only_the_hub_knows_subsets(sft, chats, write_rows):
    with pytest.raises(RecipeError, match="`subset` has no effect on local files"):
        prepare_data(sft({"path": write_rows(chats), "subset": "all"}))


def test_a_huge_row_and_odd_text(sft, write_rows):
    odd = "\u0000\u200b\u2028\u00a0\ufeff🇮🇹" * 3
    turns = [[("user", odd), ("assistant", odd)], [("user", "q"), ("assistant", "parola " * 100_000)]]
    rows = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    data = prepare_data(sft(write_rows(rows), sequence_len=512))
    assert data.summary.dropped == {"too_long": 1}
    learned = np.array(data.train[0]["labels"])
    assert data.tokenizer.decode(learned[learned != -100]) == f"{odd}<|im_end|>"


def test_nothing_heavy_is_loaded(sft, chats, write_rows):
    recipe = Path(write_rows([])).with_name("recipe.yaml")
    recipe.write_text(sft(write_rows(chats)).to_yaml())
    code = ("import sys; from nesso_tune import load_recipe, prepare_data; prepare_data(load_recipe(sys.argv[1]));"
            "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.stdout == "[]\n"


def test_answers_that_are_one_text_in_two_forms_are_no_pair(dpo, write_rows):
    call = {"name": "f", "arguments": {"a": 1}}
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    row = {"prompt": "q", "rejected": text, "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    report = prepare_data(dpo(write_rows([row, {"prompt": "q", "chosen": "a", "rejected": "b"}]))).report
    assert report["dropped"] == {"chosen_equals_rejected": 1}
    assert report["examples_of_dropped"]["chosen_equals_rejected"].endswith("rows.jsonl:1")


@examples(100)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=200), st.data())
def test_rows_are_split_exactly_and_in_proportion(languages, data):
    languages = np.array(languages)
    size = data.draw(st.integers(1, len(languages) - 1))
    train, held = hold_out(languages, size, seed=1)
    assert len(held) == size
    assert sorted([*train, *held]) == list(range(len(languages)))
    for code in range(4):
        share = size * (languages == code).mean()
        assert abs((languages[held] == code).sum() - share) < 1


def test_a_share_holds_out_a_row_of_every_language_that_has_ten():
    languages = np.array([0] * 1000 + [1] * 10 + [2] * 9)
    _, held = hold_out(languages, 0.05, seed=1)
    assert np.bincount(languages[held], minlength=3).tolist() == [50, 1, 0]


def test_the_seed_decides():
    languages = np.zeros(100, dtype=int)
    assert hold_out(languages, 10, 1)[1].tolist() == hold_out(languages, 10, 1)[1].tolist()
    assert hold_out(languages, 10, 1)[1].tolist() != hold_out(languages, 10, 2)[1].tolist()


@pytest.mark.parametrize("size", [0, 0.01])
def test_nothing_is_held_out_of_little(size):
    train, held = hold_out(np.zeros(5, dtype=int), size, 1)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize("size", [5, 10_000])
def test_holding_out_everything_is_an_error(size):
    with pytest.raises(RecipeError, match=r"validation_size: .* of 5 usable rows leave nothing to train on; .*e.g. 1"):
        hold_out(np.zeros(5, dtype=int), size, 1)
