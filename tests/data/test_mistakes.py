"""Mistakes with files as a new user makes them: what is said leads to a prepared data set."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from nesso_tune import DataError, NessoError, prepare_data
from nesso_tune.data.files import expand
from tests.data.test_file_formats import CHATGPT, carried_out, json_lines, table
from tests.support.runs import main_here

ROWS = [{"prompt": f"Perché, dimmi, {i}?", "response": f"Così; e basta: {i}."} for i in range(12)]


@pytest.fixture
def prepared(sft, tmp_path, monkeypatch):
    """Prepares a source with these keys in an empty folder; returns the number of rows kept."""
    monkeypatch.chdir(tmp_path)

    def prepare(path, **keys):
        return prepare_data(sft({"path": path, **keys})).summary.rows_kept

    return prepare


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_the_delimiter_of_another_country(prepared, delimiter):
    Path("dati.csv").write_bytes(table(ROWS, delimiter, "cp1252"))
    assert prepared("dati.csv") == len(ROWS)


@pytest.mark.parametrize("delimiter", ["^", "~", "#", "§"])
def test_a_delimiter_that_nobody_uses(prepared, delimiter, tmp_path):
    Path("dati.csv").write_bytes(table(ROWS, delimiter, "cp1252"))
    with pytest.raises(DataError, match=r"dati.csv:1: has one column, .*; write it with commas, e\.g\. py") as error:
        prepared("dati.csv")
    carried_out(error, tmp_path)
    assert prepared("dati.csv.csv") == len(ROWS)


def test_a_table_called_json_lines(prepared, tmp_path):
    Path("dati.jsonl").write_bytes(table(ROWS, ";"))
    with pytest.raises(DataError, match=r"dati.jsonl:1: is not JSON; it looks like a table") as error:
        prepared("dati.jsonl")
    carried_out(error, tmp_path)
    assert prepared("dati.csv") == len(ROWS)


def test_a_compressed_file_called_json(prepared):
    Path("dati.json").write_bytes(gzip.compress(json_lines(ROWS)))
    assert prepared("dati.json") == len(ROWS)


def test_a_folder_of_splits(prepared, capsys):
    Path("dati").mkdir()
    for name in ("validation", "test"):
        Path("dati", f"{name}.jsonl").write_bytes(json_lines(ROWS))
    with pytest.raises(DataError, match=r"dati: contains the splits test, validation, not train; set") as error:
        prepared("dati")
    for split in re.findall(r"split: (\w+)", str(error.value)):
        assert prepared("dati", split=split) == len(expand("dati", split)) * len(ROWS)
    Path("dati", "train.jsonl").write_bytes(json_lines(ROWS))
    assert prepared("dati") == len(ROWS)
    Path("dati", "other.jsonl").write_bytes(json_lines(ROWS))
    with pytest.raises(DataError, match=r"dati: mixes the splits .* with files of none \(other\.jsonl\); name"):
        prepared("dati")
    assert prepared("dati/t*.jsonl") == len(ROWS), "a glob; the split of test.jsonl is not read"


def test_a_wrong_column(prepared):
    Path("dati.csv").write_bytes(table([{"domanda": r["prompt"], "risposta": r["response"]} for r in ROWS], ";"))
    with pytest.raises(NessoError, match=r"did you mean `domanda`\?"):
        prepared("dati.csv", format="alpaca", prompt_field="domnda", response_field="risposta")
    assert prepared("dati.csv", format="alpaca", prompt_field="domanda", response_field="risposta") == len(ROWS)


def test_a_spreadsheet(prepared, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
        book.active.append(row)
    book.save("dati.xlsx")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "python_calamine", None)
        with pytest.raises(DataError, match=r"dati.xlsx: is a spreadsheet, .*; pip install '.*\[excel\]', or"):
            prepared("dati.xlsx")
    pytest.importorskip("python_calamine")
    assert prepared("dati.xlsx") == len(ROWS)


def test_the_chats_of_another_tool(prepared, capsys, whole_base):
    Path("conversations.json").write_text(json.dumps(CHATGPT))
    with pytest.raises(DataError, match=r"is an export of ChatGPT, .*; set format: ") as error:
        prepared("conversations.json")
    reader = str(error.value).rpartition("format: ")[2]
    assert prepared("conversations.json", format=reader) == len(CHATGPT)
    turns = [{"sender": "human", "text": "Chi sei?"}, {"sender": "assistant", "text": "Nesso."}]
    Path("claude.json").write_text(json.dumps([{"name": "x", "chat_messages": turns}] * 5))
    for name, data in {"mine": ["conversations.json", "--format", reader], "other": ["claude.json"]}.items():
        code, _, said = main_here(capsys, "init", name, "--base", whole_base, "--data", *data)
        assert code == 0, said
        code, _, said = main_here(capsys, "prepare", f"{name}.yaml")
        assert code == 0, said
