"""Real data in many formats, if available in ../shared beside the repository."""

import gzip
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from nesso_tune import DataError, prepare_data
from nesso_tune.chat.render import parse_tool_calls
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data.formats import load_format
from nesso_tune.data.languages import detect_language
from nesso_tune.data.messages import to_messages
from nesso_tune.data.personal_data import find_personal_data
from nesso_tune.data.record_reader import make_record_reader
from nesso_tune.data.sources import source_records
from nesso_tune.data.tools import read_tool_file
from nesso_tune.recipes.sections import ChatSection, ModelSection, Source
from tests.data.test_file_formats import encodable, json_lines, table
from tests.support.runs import thorough

SHARED = Path(__file__).parents[3] / "shared"


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return str(path)


@thorough
def test_twelve_thousand_conversations_fill_packed_rows(sft):
    data = prepare_data(sft(shared("bench/sft.jsonl"), sequence_len=4096, validation_size=100))
    report = data.report
    assert report["rows_read"] == 11_997 == report["rows_kept"] + sum(report["dropped"].values())
    assert report["rows_kept"] > 11_900
    assert report["packing"]["fill"] >= 0.98
    assert report["languages"].keys() == {"it", "en"}
    assert report["validation"]["rows"] == 100
    lengths = [sum(row["seq_lengths"]) for row in data.train]
    assert sum(lengths) == report["train"]["tokens"]
    assert max(lengths) <= 4096


def test_preference_pairs(dpo):
    report = prepare_data(dpo(shared("bench/pref.jsonl"), sequence_len=8192)).report
    assert report["rows_read"] == 900 == report["rows_kept"] + sum(report["dropped"].values())
    assert report["rows_kept"] > 850, report["dropped"]
    assert report["languages"].keys() == {"it", "en"}


SQUAD = "kind: instruction\nprompt_field: [context]\ninput_field: [question]\nresponse_field: [answers.0.text]\n"
SEEDS = """\
kind: instruction
prompt_field: [instruction]
input_field: [instances.0.input]
response_field: [instances.0.output]
"""
PAGES = 'kind: instruction\nprompt_template: "Traduci in italiano:\\n\\n{page_en}"\nresponse_field: [page_it]\n'
SPOKEN = """\
kind: conversation
messages_field: [dialogue, conversation]
role_field: [role]
content_field: [content]
speakers: [user, assistant]
system_field: [persona]
"""
VOTES = """\
kind: choice
prompt_field: [instruction]
input_field: [input]
choice_fields: [response1, response2]
label_fields: [annotator1, annotator2, annotator3]
labels: [1, 2]
"""
CAUSES = """\
kind: choice
prompt_template: "{premise} ({question})"
choice_fields: [choice1, choice2]
label_fields: [label]
labels: [0, 1]
"""
BFCL = """\
def calls(row):
    if not row.get("ground_truth"):
        return None
    said = [{"name": name, "arguments": {key: values[0] for key, values in asked.items()}}
            for call in row["ground_truth"] for name, asked in call.items()]
    return {"messages": [*row["question"][0], {"role": "assistant", "tool_calls": said}], "tools": row["function"]}
"""
# file: {section: (keys of its source, rows kept, what is dropped besides the other sections)}
SECTIONS = {
    "sft_en.jsonl": {
        "stanford_alpaca_5000": ({}, 1850, {"empty_answer": 1}),
        "gpteacher_roleplay": ({}, 1923, {}),
        "llamafactory_alpaca_en_demo": ({}, 999, {}),
        "gsm8k_alpaca_fmt": ({}, 800, {}),
        "self_instruct_seed": ({"format": SEEDS}, 175, {}),
        "self_instruct_user_oriented": ({"format": SEEDS}, 252, {}),
    },
    "sft_it.jsonl": {
        "squad_it_test": ({"format": SQUAD}, 3423, {"empty_answer": 2}),
        "tldr_pages_it": ({"format": PAGES}, 1420, {}),
        "tatoeba_ita_eng": ({"format": "alpaca", "prompt_field": "eng", "response_field": "ita"}, 1000, {}),
        "javascript_questions_it": ({"format": "completion", "text_field": "markdown"}, 155, {}),
    },
    "sft_multiturn.jsonl": {
        "xpersona_it_valid": ({"format": SPOKEN}, 140, {}),
        "xpersona_it_test": ({"format": SPOKEN}, 140, {}),
        "xpersona_en_valid": ({"format": SPOKEN}, 300, {}),
        "chatterbot_corpus_it": ({"format": SPOKEN}, 562, {}),
        "fastchat_dummy_conversation": ({}, 500, {}),
    },
    "toolcall.jsonl": {
        "glaive_toolcall_en_demo": ({}, 300, {}),
        "reason_tool_use_demo_50": ({}, 50, {}),
        "bfcl_v4_single_turn": ({"format": BFCL}, 1000, {"left_out_by_reader": 240}),
    },
    "pref_en.jsonl": {
        "llamafactory_dpo_en_demo": ({}, 300, {}),
        "llmbar": ({"format": "choice", "labels": [1, 2]}, 419, {}),
        "pandalm_testset_v1": (
            {"format": VOTES}, 414, {"no_preferred_answer": 42, "empty_answer": 25},
        ),
    },
    "pref_it.jsonl": {"xcopa_it": ({"format": CAUSES}, 600, {})},
}  # fmt: skip
ODDITIES = {  # as they are known of these files
    "sft_en.jsonl": {"no_break_space": 6, "zero_width_character": 2},
    "sft_it.jsonl": {"no_break_space": 143, "zero_width_character": 1, "html_entity": 1, "template_placeholder": 927},
    "sft_multiturn.jsonl": {"zero_width_character": 12, "stand_in_turn": 300, "ends_without_answer": 42},
    "toolcall.jsonl": {"null_property_removed": 10},
    "pref_en.jsonl": {"no_break_space": 1, "zero_width_character": 1, "control_character": 2, "html_entity": 2,
                      "mojibake": 1, "template_placeholder": 2, "number_as_text": 3},
    "pref_it.jsonl": {},
}  # fmt: skip
REPEATED = {"sft_en.jsonl": 14, "toolcall.jsonl": 35, "sft_multiturn.jsonl": 3, "pref_it.jsonl": 0}


def sources_of(name, folder):
    """The sources of a file with several sections; writes their format files and readers into a folder."""
    for section, (keys, _, _) in SECTIONS[name].items():
        fmt = keys.get("format", "auto")
        if "\n" in fmt:
            file = folder / (f"{section}.py" if fmt.startswith("def ") else f"{section}.yaml")
            file.write_text(fmt)
            fmt = f"{file}:calls" if fmt.startswith("def ") else str(file)
        yield {"path": shared(f"data/{name}"), "alias": section, "where": {"_source": section}, **keys, "format": fmt}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_of_every_file(sft, dpo, tmp_path, name):
    make = dpo if name.startswith("pref") else sft
    report = prepare_data(make(*sources_of(name, tmp_path), sequence_len=16384, reasoning="drop")).report
    assert report["rows_read"] == report["rows_kept"] + sum(report["dropped"].values())
    for source in report["sources"]:
        _, kept, dropped = SECTIONS[name][source["alias"]]
        others = source["dropped"].pop("not_selected", 0)
        assert (source["rows"], source["dropped"]) == (kept, dropped), source["alias"]
        assert source["rows_read"] == kept + sum(dropped.values()) + others
    assert {mark: of["rows"] for mark, of in report["oddities"].items()} == ODDITIES[name]
    assert report["duplicates"] == REPEATED.get(name, report["duplicates"])


def test_evaluation_prompts_are_removed_from_training(sft, write_rows):
    ifeval = shared("data/ifeval_en.jsonl")
    as_texts = prepare_data(sft({"path": ifeval, "format": "completion", "text_field": "prompt"}, sequence_len=4096))
    assert as_texts.summary.rows_kept == as_texts.summary.rows_read == 541
    prompts = [json.loads(line)["prompt"] for line in Path(ifeval).read_text().splitlines()]
    rows = [{"prompt": f"Please: {text.upper()}", "response": "No."} for text in prompts]
    against = {"decontaminate": {"files": [ifeval]}}
    clean = {"path": shared("data/sft_en.jsonl"), "where": {"_source": "gsm8k_alpaca_fmt"}}
    report = prepare_data(sft(write_rows(rows), clean, sequence_len=4096, clean=against)).report
    contaminated, innocent = report["sources"]
    assert contaminated["dropped"] == {"contains_evaluation_text": 541}
    assert innocent["dropped"].get("contains_evaluation_text", 0) == 0
    assert "ifeval_en.jsonl:1" in report["examples_of_dropped"]["contains_evaluation_text"]


def test_formats_that_need_a_format_file_are_reported(sft, dpo):
    with pytest.raises(DataError, match=r"its format is not recognised \(its columns are .*premise"):
        prepare_data(dpo(shared("data/pref_it.jsonl")))
    with pytest.raises(DataError, match=r"not recognised|no column|can be used"):
        prepare_data(sft({"path": shared("data/sft_it.jsonl"), "max_rows": 20}))


def said_and_parsed(text):
    """The turns of rendered ChatML as (role, text between header and end)."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    assert "".join(f"<|im_start|>{role}\n{body}<|im_end|>\n" for role, body in turns) == text
    return turns


@pytest.mark.parametrize(("section", "rows"), [("glaive_toolcall_en_demo", 300), ("reason_tool_use_demo_50", 50)])
def test_conversations_with_tools_survive_a_round_trip(base, section, rows):
    source = Source(path=shared("data/toolcall.jsonl"), where={"_source": section})
    chat = chat_tokenizer(ModelSection(base=base), ChatSection())
    reader = make_record_reader(source, "sft")
    items = [reader.read(row, where) for row, where in source_records(source) if row["_source"] == section]
    items = [replace(item, messages=tuple(replace(turn, reasoning=None) for turn in item.messages)) for item in items]
    assert len(items) == rows
    calls = 0
    for item, encoded in zip(items, chat.encoder.conversations(items), strict=True):
        text = chat.backend.decode(encoded.ids, skip_special_tokens=False)
        turns = said_and_parsed(text)
        offered = turns[0][1].partition("<tools>\n")[2].partition("\n</tools>")[0]
        assert [json.loads(line) for line in offered.splitlines()] == list(item.tools)
        speaking = turns[len(turns) - sum(message.role != "system" for message in item.messages) :]
        spoken = [message for message in item.messages if message.role != "system"]
        for (role, body), message in zip(speaking, spoken, strict=True):
            assert role == message.role
            if role == "assistant":
                made = list(message.tool_calls) or parse_tool_calls(message.content)
                assert json.dumps(parse_tool_calls(body)) == json.dumps(made)  # with their arguments in order
                calls += len(made)
            if role == "tool":
                assert body == f"<tool_response>\n{message.content}\n</tool_response>"
        learned = [i for i, yes in zip(encoded.ids, encoded.trained, strict=True) if yes]
        answers = [f"{body}<|im_end|>" for role, body in speaking if role == "assistant"]
        assert chat.backend.decode(learned, skip_special_tokens=False) == "".join(answers)
    assert calls > rows / 4


def test_agentic_cases_are_prompts_with_their_tools(base):
    chat = chat_tokenizer(ModelSection(base=base), ChatSection())
    tools = read_tool_file(Path(shared("data/toolcall_nesso_tools.json")))
    rows = map(json.loads, Path(shared("data/toolcall.jsonl")).read_text().splitlines())
    cases = [row for row in rows if row["_source"] == "nesso_agentic_eval_100"]
    assert (len(cases), len(tools)) == (50, 9)
    for case in cases:
        messages = to_messages(case["messages"], load_format("messages"))
        text = chat.backend.decode(
            chat.encoder.prompt(messages, case["lang"].lower(), tools), skip_special_tokens=False
        )
        assert text.endswith("<|im_start|>assistant\n")
        turns = said_and_parsed(text.removesuffix("<|im_start|>assistant\n"))
        assert [role for role, _ in turns] == ["system", *(message["role"] for message in case["messages"])]
        for tool in tools:
            assert json.dumps(tool, ensure_ascii=False) in turns[0][1]


def test_language_detection():
    """On the sections whose language is known; undetermined counts as an error."""
    known = {"squad_it_test": "it", "stanford_alpaca_5000": "en", "gsm8k_alpaca_fmt": "en", "gpteacher_roleplay": "en",
             "xpersona_it_valid": "it", "xpersona_it_test": "it", "xpersona_en_valid": "en"}  # fmt: skip
    right, total = Counter(), Counter()
    for name in ("sft_it", "sft_en", "sft_multiturn"):
        for line in Path(shared(f"data/{name}.jsonl")).read_text().splitlines():
            row = json.loads(line)
            if row["_source"] not in known or total[row["_source"]] == 300:
                continue
            texts = [row.get(key, "") for key in ("context", "question", "instruction", "output", "response")]
            texts += [turn for pair in row.get("dialogue", ()) for turn in pair]
            total[row["_source"]] += 1
            right[row["_source"]] += detect_language(" ".join(texts)) == known[row["_source"]]
    for section, n in total.items():
        assert right[section] / n >= 0.98, section


@pytest.mark.parametrize("name", ["sft_it", "sft_en", "sft_multiturn", "pref_it", "pref_en", "toolcall", "ifeval_en"])
def test_no_number_in_code_or_mathematics_is_taken_for_personal_data(name):
    """Public sections have made-up addresses, and neither bank accounts nor phone numbers that are assigned."""
    found = Counter()
    for line in Path(shared(f"data/{name}.jsonl")).read_text().splitlines():
        found.update(kind for kind, _, _ in find_personal_data(line))
    assert found.keys() <= {"email"}


ROWS_OF_A_SECTION = None if os.environ.get("NESSO_TUNE_ALL") else 12  # in each export
EXPORTS = {
    "csv of Excel": ("x.csv", lambda rows: table(rows, ";", "cp1252")),
    "tsv": ("x.tsv", lambda rows: table(rows, "\t")),
    "gz": ("x.jsonl.gz", lambda rows: gzip.compress(json_lines(rows))),
    "zst": ("x.jsonl.zst", lambda rows: pa.Codec("zstd").compress(json_lines(rows), asbytes=True)),
    "array": ("x.json", lambda rows: json.dumps(rows).encode()),
    "pretty array": ("x.json", lambda rows: json.dumps(rows, indent=2).encode()),
    "pretty rows": ("x.json", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode()),
    "wrapped": ("x.json", lambda rows: json.dumps({"data": rows}).encode()),
}


ALL_SECTIONS = [(name, section) for name in SECTIONS for section in SECTIONS[name]]


@pytest.mark.parametrize(
    "section", [pytest.param(each, marks=thorough if i % 3 else ()) for i, each in enumerate(ALL_SECTIONS)], ids=str
)
def test_every_section_is_the_same_in_files_of_every_type(sft, dpo, tmp_path, monkeypatch, section):
    name, section = section
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    source = next(source for source in sources_of(name, tmp_path) if source["alias"] == section)
    lines = [json.loads(line) for line in Path(source["path"]).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in lines if row["_source"] == section]
    # A table cannot tell false from its text
    rows = [row for row in rows if False not in (row.get("response1"), row.get("response2"))]
    # datasets writes such a small number in columns of JSON as 0.0
    rows = [row for row in rows if "e-12" not in json.dumps(row)]
    rows = encodable(rows[:ROWS_OF_A_SECTION])
    recipe = dpo if name.startswith("pref") else sft

    reasoning = {"reasoning": "drop"} if section.startswith("reason_tool_use") else {}

    def fingerprint(path):
        data = prepare_data(recipe({**source, "path": str(path), "where": {}}, sequence_len=8192, **reasoning))
        assert data.summary.rows_kept > 0
        return data.summary.fingerprint

    lines = tmp_path / "x.jsonl"
    lines.write_bytes(json_lines(rows))
    expected = fingerprint(lines)
    for export, (file, write) in EXPORTS.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / file).write_bytes(write(rows))
        assert fingerprint(tmp_path / "files" / file) == expected, export
    made = datasets.load_dataset("json", data_files=str(lines), split="train")
    made.to_parquet(tmp_path / "x.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    for path in ("x.parquet", "saved", "both"):
        assert fingerprint(tmp_path / path) == expected, path
