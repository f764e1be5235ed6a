"""Files of every type: the same rows from each, found by their bytes, and remedies that work."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shlex
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from nesso_tune import DataError, RecipeError, prepare_data
from nesso_tune.data.blocks import BLOCK_BYTES
from nesso_tune.data.file_formats import file_blocks, file_format, is_json_lines, read_records, splits_in
from nesso_tune.data.sources import count_records, source_records, source_size
from nesso_tune.data.tables import find_delimiter
from nesso_tune.recipes.sections import Source
from tests.support.examples import examples

SHARED = Path(__file__).parents[3] / "shared"
ROWS = [
    {"prompt": f"Perché «{i}»?\nDimmi; subito, \"adesso\".", "response": f'{{"n": {i}}}' if i % 3 else f"Così\t{i}: è."}
    for i in range(40)
]  # fmt: skip


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def cell(value):
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(rows, delimiter=",", encoding="utf-8", **options):
    """A table of text; lists and objects are JSON text, other values too unless they are text, null is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, **options)
    writer.writerow(columns)
    for row in rows:
        writer.writerow(map(cell, (row.get(column) for column in columns)))
    return out.getvalue().encode(encoding)


def encodable(rows, encoding="cp1252"):
    return json.loads(json.dumps(rows, ensure_ascii=False).encode(encoding, "replace").decode(encoding))


def parquet_bytes(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow_bytes(rows, opened=pa.ipc.new_file):
    out = pa.BufferOutputStream()
    made = pa.Table.from_pylist(rows)
    with opened(out, made.schema) as writer:
        writer.write_table(made)
    return out.getvalue().to_pybytes()


EXPORTS = {
    "gz": ("x.jsonl.gz", lambda rows: gzip.compress(json_lines(rows))),
    "gz in several members": ("x.gz", lambda rows: b"".join(gzip.compress(json_lines([row])) for row in rows)),
    "gz called json": ("x.json", lambda rows: gzip.compress(json_lines(rows))),
    "bz2": ("x.jsonl.bz2", lambda rows: bz2.compress(json_lines(rows))),
    "xz": ("x.jsonl.xz", lambda rows: lzma.compress(json_lines(rows))),
    "zst": ("x.jsonl.zst", lambda rows: pa.Codec("zstd").compress(json_lines(rows), asbytes=True)),
    "zst in several frames": ("x.zst", lambda rows: b"".join(
        pa.Codec("zstd").compress(json_lines([row]), asbytes=True) for row in rows)),
    "lz4": ("x.lz4", lambda rows: pa.Codec("lz4").compress(json_lines(rows), asbytes=True)),
    "utf-16": ("x.jsonl", lambda rows: json_lines(rows).decode().encode("utf-16")),
    "utf-16 without a mark": ("x.jsonl", lambda rows: json_lines(rows).decode().encode("utf-16-le")),
    "csv": ("x.csv", table),
    "csv of Excel": ("x.csv", lambda rows: table(rows, ";", "utf-8-sig")),
    "csv with its separator": ("x.csv", lambda rows: b"sep=;\r\n" + table(rows, ";")),
    "csv of Excel as Unicode": ("x.txt.csv", lambda rows: table(rows, "\t", "utf-16")),
    "csv all quoted": ("x.csv", lambda rows: table(rows, ",", quoting=csv.QUOTE_ALL)),
    "csv.gz": ("x.csv.gz", lambda rows: gzip.compress(table(rows, ";"))),
    "tsv": ("x.tsv", lambda rows: table(rows, "\t")),
    "pipes": ("x.csv", lambda rows: table(rows, "|")),
    "array": ("x.json", lambda rows: json.dumps(rows).encode()),
    "pretty array": ("x.json", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode()),
    "array.gz": ("x.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "pretty rows": ("x.json", lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode()),
    "wrapped": ("x.json", lambda rows: json.dumps({"data": rows}).encode()),
    "wrapped among others": ("x.json", lambda rows: json.dumps(
        {"version": "1", "info": {"by": ["a"]}, "rows": rows, "end": None}, indent=1).encode()),
    "a split": ("x.json", lambda rows: json.dumps({"test": rows[:3], "train": rows, "dev": rows[:4]}).encode()),
    "parquet": ("x.parquet", parquet_bytes),
    "parquet by another name": ("x.bin", parquet_bytes),
    "feather": ("x.feather", arrow_bytes),
    "arrow stream": ("x.arrow", lambda rows: arrow_bytes(rows, pa.ipc.new_stream)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "export"), EXPORTS.values(), ids=EXPORTS)
def test_the_same_rows_from_every_type(tmp_path, name, export):
    file = tmp_path / name
    file.write_bytes(export(ROWS))
    read = list(read_records(file))
    assert [row for row, _ in read] == ROWS
    assert len({where for _, where in read}) == len(ROWS)
    assert all(re.fullmatch(rf"{re.escape(str(file))}(:| row )\d+", where) for _, where in read)
    source = Source(path=str(file))
    assert count_records(source) == len(ROWS)
    assert 0 < sum(block.size for block in file_blocks(file)) <= max(source_size(source), 2 * len(json_lines(ROWS)))


def test_cp1252_is_found_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "nesso_tune")
    rows = [*encodable(ROWS), {"prompt": "€ “quanto”", "response": "È così"}]
    (tmp_path / "x.csv").write_bytes(table(rows, ";", "cp1252"))
    assert [row for row, _ in read_records(tmp_path / "x.csv")] == rows
    assert "x.csv: read as cp1252 text" in caplog.text


def test_the_row_of_a_table_is_at_its_first_line(tmp_path):
    (tmp_path / "x.csv").write_text('\n"a";b\n"1\n2";3\n\n4;5\n')
    assert [(row, where.rpartition(":")[2]) for row, where in read_records(tmp_path / "x.csv")] == [
        ({"a": "1\n2", "b": "3"}, "3"), ({"a": "4", "b": "5"}, "6")
    ]  # fmt: skip


def test_json_in_a_table_is_a_list_except_in_a_column_of_texts(tmp_path):
    turns = [{"role": "user", "content": "Ciao; a te"}]
    rows = [{"messages": turns, "answers": [{"text": "x"}], "chosen": turns, "response": '["a"]', "n": 1}] * 3
    (tmp_path / "x.csv").write_bytes(table(rows))
    assert [row for row, _ in read_records(tmp_path / "x.csv")] == [{**row, "n": "1"} for row in rows]
    named = Source(path=str(tmp_path / "x.csv"), format="alpaca", prompt_field="n", response_field="answers")
    assert next(source_records(named))[0]["answers"] == '[{"text": "x"}]'


@pytest.mark.parametrize("stray", [False, True], ids=["quoted", "stray quotes"])
def test_quotes_between_tabs_in_a_file_that_is_longer_than_the_sample(tmp_path, stray):
    if stray:
        lines = ["a\tb", '"Ciao\tx', *(f"riga {i}\t{'y' * 300}" for i in range(5000))]
    else:
        lines = ["a\tb", *(f'riga {i}\t"{{""k"": ""{"y" * 300}""}}"' for i in range(5000))]
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    rows = [row for row, _ in read_records(tmp_path / "x.tsv")]
    assert len(rows) == len(lines) - 1
    assert rows[0] == ({"a": '"Ciao', "b": "x"} if stray else {"a": "riga 0", "b": {"k": "y" * 300}})


def test_lists_in_a_table_as_python_writes_them(tmp_path):
    turns = [{"role": "user", "content": 'L\'ora "esatta"?', "weight": None}]
    rows = [{"messages": turns, "response": "['a']"}] * 3
    (tmp_path / "x.csv").write_bytes(table([{**row, "messages": repr(turns)} for row in rows]))
    assert [row for row, _ in read_records(tmp_path / "x.csv")] == rows


def test_quotes_between_tabs_are_text_where_nothing_is_quoted(tmp_path):
    (tmp_path / "x.tsv").write_text('a\tb\n"Ciao" disse\tx\ny\t5" di tubo\n')
    assert [row["a"] for row, _ in read_records(tmp_path / "x.tsv")] == ['"Ciao" disse', "y"]


def zipped(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


FAULTS = {
    "a title above the header": ("x.csv", b"Dati 2024;;\na;b;c\n", r"x.csv:1: is a title, .*; the first line must"),
    "a comment above the header": ("x.csv", b"# dati\na,b\n1,2\n", r"x.csv:2: has 2 fields .*; the first line must"),
    "no rows in a list": ("x.json", b'{"data": []}', r"x.json: contains no rows"),
    "an archive of other things": ("x.docx", zipped("word/document.xml"), r"x.docx: is an archive without data files"),
    "a PDF": ("x.pdf", b"%PDF-1.4\n", r"x.pdf: is a PDF document; extract"),
    "unequal rows": ("x.csv", b"a;b\n1;2\n1;2;3\n", r"x.csv:3: has 3 fields between `;`, the header has 2; quote"),
    "wrong quotes": ("x.csv", b'a,b\n1,2\n"x"y,2\n', r"x.csv:3: is not a row of a table \(.*\); quote fields"),
    "a quote without end": ("x.csv", b'a,b\n1,2\n"x,2\n3,4\n', r"x.csv:3: is not a row of a table"),
    "a column twice": ("x.csv", b"a,b,a\n1,2,3\n", r"x.csv: has two columns `a`; rename one"),
    "damaged utf-8": ("x.csv", "a,b\nè,é\nò,ù\n".encode().replace("é".encode(), b"\xc3"), r"x.csv:2: is not UTF-8"),
    "an unknown encoding": ("x.csv", b"a,b\n\x81\x8d,1\n", r"x.csv: is neither UTF-8 nor Windows-1252"),
    "gz cut short": ("x.gz", gzip.compress(json_lines(ROWS))[:-10], r"x.gz: is damaged \(.*\); download or compress"),
    "gz with a wrong byte": ("x.gz", gzip.compress(json_lines(ROWS))[:-8] + bytes(8), r"x.gz: is damaged"),
    "bz2 cut short": ("x.bz2", bz2.compress(json_lines(ROWS))[:-10], r"x.bz2: is damaged"),
    "xz cut short": ("x.xz", lzma.compress(json_lines(ROWS))[:-10], r"x.xz: is damaged"),
    "zst cut short": ("x.zst", pa.Codec("zstd").compress(json_lines(ROWS), asbytes=True)[:-5], r"x.zst: is damaged"),
    "a wrapped list cut short": ("x.json", b'{"data": [{"a": 1},\n{"a', r"x.json:2: is not JSON"),
    "two lists of rows": ("x.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', r"x.json: has several lists of rows: a, b;"),
    "another split": ("x.json", b'{"test": [{"x": 1}], "dev": [{"x": 1}]}', r"contains the splits dev, test, not"),
    "by column": ("x.json", b'{"a": {"0": 1, "1": 2}, "b": {"0": 1, "1": 2}}', r"x.json: is a table by column"),
    "no comma": ("x.json", b'[{"a": 1} {"a": 2}]', r"x.json:1: is not JSON \(Expecting ',' delimiter\)"),
    "more after an array": ("x.json", b'[{"a": 1}]\n[{"a": 1}]', r"x.json:2: is not JSON \(Extra data\); if every"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), FAULTS.values(), ids=FAULTS)
def test_damage_is_an_error_with_its_place(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        list(read_records(tmp_path / name))


SPLIT = {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}
SHAPES = {
    "one conversation": ({"messages": [{"role": "user", "content": "a"}]}, "lines"),
    "one of other names": ({"messages": [{"who": "user", "what": "a"}]}, "lines"),
    "one with tools": ({"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "a"}]}, "lines"),
    "one with a list of objects": (SPLIT, "lines"),
    "a list of conversations": ({"conversations": [{"messages": [{"role": "user", "content": "a"}]}]}, "wrapped"),
    "a list of texts": ({"data": [{"text": "a"}], "version": 1.1}, "wrapped"),
}


@pytest.mark.parametrize(("value", "kind"), SHAPES.values(), ids=SHAPES)
def test_one_object_is_a_row_or_wraps_rows(tmp_path, value, kind):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(value))
    assert file_format(file).kind == kind
    file.write_text(json.dumps(value, indent=1) + "\n")
    assert file_format(file).kind == ("objects" if kind == "lines" else kind)
    file.write_text(2 * (json.dumps(value) + "\n"))
    assert file_format(file).kind == "lines", "several lines are rows, whatever they hold"
    assert is_json_lines(file)


def test_maps_and_columns_of_one_name_in_parquet(tmp_path):
    maps, text = pa.map_(pa.string(), pa.string()), pa.array(["a"])
    parquet.write_table(pa.table({"m": pa.array([[("x", "1"), ("y", None)]], maps)}), tmp_path / "m.parquet")
    assert [row for row, _ in read_records(tmp_path / "m.parquet")] == [{"m": {"x": "1"}}]
    parquet.write_table(pa.table({"m": pa.array([[("x", "1"), ("x", "2")]], maps)}), tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"m\.parquet: is not readable from row 1 on \(.*x"):
        list(read_records(tmp_path / "m.parquet"))
    parquet.write_table(pa.Table.from_arrays([text, text], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has two columns `a`; rename one"):
        list(read_records(tmp_path / "a.parquet"))


def test_a_first_object_of_many_megabytes(tmp_path):
    file, text = tmp_path / "x.json", "x" * 9_000_000
    file.write_text(json.dumps({"data": [{"prompt": "a", "response": text}, {"prompt": "b", "response": "c"}]}))
    assert [len(row["response"]) for row, _ in read_records(file)] == [len(text), 1]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": text}]}))
    assert [list(row) for row, _ in read_records(file)] == [["messages"]]


@examples(100)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ), max_size=4), min_size=1, max_size=8),
    st.sampled_from([None, 0, 3]), st.integers(1, 40),
)  # fmt: skip
def test_any_array_is_read_as_json_reads_it(tmp_path_factory, rows, indent, window):
    file = tmp_path_factory.mktemp("array") / "x.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    file.write_bytes(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nesso_tune.data.json_files.BLOCK_BYTES", window)  # every value crosses the end of a window
        assert [row for row, _ in read_records(file)] == json.loads(file.read_text())


def test_the_memory_of_an_array_does_not_grow_with_it(tmp_path):
    def peak(count):
        file = tmp_path / f"{count}.json"
        with file.open("w") as out:
            out.write("[")
            row = json.dumps({"prompt": "a", "response": "x" * 5000})
            out.writelines(f"{',' if i else ''}{row}" for i in range(count))
            out.write("]")
        tracemalloc.start()
        blocks = sum(block.count() for block in file_blocks(file))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert blocks == count
        return most

    small, large = peak(500), peak(5000)
    assert large < 1.2 * small
    assert large < 12 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [("a,b\n1;2,3\n", ","), ("a;b\nx, y;z\n", ";"), ("a\tb\n1,2\t3,4\n", "\t"), ("text\nx\n", ","),
     ("sep=|\na|b\n", "|"), ('a;b;c\n"x, y; z";"q\nr";1\n', ";")],
)  # fmt: skip
def test_delimiters(text, delimiter):
    assert find_delimiter(text)[0] == delimiter


def test_saved_data_sets(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f", "arguments": value}]}], "n": i}
            for i, value in enumerate([{"x": 1}, {"x": "uno", "y": [1]}, {"z": None}])]  # fmt: skip
    lines = tmp_path / "x.jsonl"
    lines.write_bytes(json_lines(rows))
    made = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    made.save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of map()")
    assert [row for row, _ in source_records(Source(path=str(tmp_path / "one")))] == rows
    both = datasets.DatasetDict({"train": made.select([0]), "test": made.select([1, 2])})
    both.save_to_disk(str(tmp_path / "both"))
    assert [row["n"] for row, _ in source_records(Source(path=str(tmp_path / "both")))] == [0]
    assert [row["n"] for row, _ in source_records(Source(path=str(tmp_path / "both"), split="test"))] == [1, 2]
    made.to_parquet(tmp_path / "x.parquet")
    assert [row for row, _ in read_records(tmp_path / "x.parquet")] == rows


def test_spreadsheets(tmp_path, caplog):
    pytest.importorskip("python_calamine")
    openpyxl = pytest.importorskip("openpyxl")
    caplog.set_level("INFO", "nesso_tune")
    book = openpyxl.Workbook()
    for row in (["prompt", "response", "n"], ["Perché?", "Così.", 3], [None, None, None], ["E poi?", "Basta.", 0.5]):
        book.active.append(row)
    book.create_sheet("altro").append(["x"])
    book.save(tmp_path / "x.xlsx")
    assert [(row, where.rpartition(" ")[2]) for row, where in read_records(tmp_path / "x.xlsx")] == [
        ({"prompt": "Perché?", "response": "Così.", "n": "3"}, "2"),
        ({"prompt": "E poi?", "response": "Basta.", "n": "0.5"}, "4"),
    ]  # fmt: skip
    assert "reads sheet Sheet, not altro" in caplog.text


def test_a_spreadsheet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with zipfile.ZipFile(tmp_path / "x.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(DataError, match=r"needs the package python-calamine; pip install 'nesso-tune\[excel\]', or"):
        list(read_records(tmp_path / "x.xlsx"))


def carried_out(error, folder):
    """Runs the command that a remedy gives."""
    remedy = error.value.problems[0].remedy
    command = remedy.partition(", e.g. ")[2] or re.split(r": (?=\w+ )", remedy)[-1]
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)


def test_the_remedies_of_archives_and_odd_files_work(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("rows.jsonl", json_lines(ROWS))
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(json_lines(ROWS))
        archive.addfile(info, io.BytesIO(json_lines(ROWS)))
    for name in ("z.zip", "t.tar.gz"):
        with pytest.raises(DataError, match="is an archive of files; unpack it and name the folder") as error:
            list(read_records(tmp_path / name))
        carried_out(error, tmp_path)
        assert [row for row, _ in source_records(Source(path=str(tmp_path / name[0])))] == ROWS
    made = {
        "a.jsonl": (table(ROWS, ";"), "looks like a table", "a.csv"),
        "b.jsonl": (json_lines(encodable(ROWS)).decode().encode("cp1252"), "is not UTF-8", "b.utf8.jsonl"),
        "c.parquet.gz": (gzip.compress(parquet_bytes(ROWS)), "another binary kind", "c.parquet"),
        "d.json": (json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}).encode(),
                   "by column", "d.jsonl"),
        "e.json": (json.dumps({"note": [{"x": 1}], "rows": ROWS}).encode(), "several lists", "rows.jsonl"),
        "l'e$.json": (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(), "by column",
                      "l'e$.jsonl"),
        "g.json": (json.dumps({"columns": ["prompt", "response"], "index": list(range(40)),
                               "data": [list(row.values()) for row in ROWS]}).encode(), "by column", "g.jsonl"),
        "h.json": (json.dumps({f"id{i}": row for i, row in enumerate(ROWS)}).encode(), "by their names", "h.jsonl"),
        "i.json": (json.dumps({"result": {"data": ROWS}}).encode(), "has its rows inside `result`", "rows.jsonl"),
        "j.jsonl": (b"".join(line + b",\n" for line in json_lines(ROWS).splitlines()), "Extra data", "j.jsonl"),
        "k.jsonl": ("".join(f"{row!r}\n" for row in ROWS).encode(), "property name", "k.jsonl.jsonl"),
        "l'm.txt": (table(ROWS, ";"), "looks like a table", "l'm.csv"),
        "f.parquet.zst": (pa.Codec("zstd").compress(parquet_bytes(ROWS), asbytes=True), "binary kind", "f.parquet"),
    }  # fmt: skip
    for name, (content, what, result) in made.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=what) as error:
            list(read_records(tmp_path / name))
        carried_out(error, tmp_path)
        expected = encodable(ROWS) if name == "b.jsonl" else ROWS
        assert [row for row, _ in read_records(tmp_path / result)] == expected, name


@pytest.fixture
def hub_clone(tmp_path):
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    for split, rows in {"train": ROWS, "test": ROWS[:2], "validation": ROWS[2:5]}.items():
        half = max(1, len(rows) // 2)
        for i, part in enumerate((rows[:half], rows[half:])):
            (folder / "data" / f"{split}-0000{i}-of-00002.parquet").write_bytes(parquet_bytes(part))
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("# x")
    (folder / ".git").mkdir()
    (folder / ".git" / "rows.jsonl").write_bytes(json_lines(ROWS))
    return folder


def read_split(folder, split="train"):
    return [row for row, _ in source_records(Source(path=str(folder), split=split))]


def test_splits_of_a_clone_of_a_hub_data_set(hub_clone, caplog):
    caplog.set_level("INFO", "nesso_tune")
    assert read_split(hub_clone) == ROWS
    assert read_split(hub_clone, "test") == ROWS[:2]
    assert read_split(hub_clone, "valid") == read_split(hub_clone, "validation") == ROWS[2:5]
    assert len(read_split(hub_clone, "all")) == len(ROWS) + 5
    assert f"{hub_clone}: reads split train, not test, validation" in caplog.text
    assert caplog.text.count(f"{hub_clone}: skips .git, README.md, dataset_infos.json (") == 1
    with pytest.raises(DataError, match="contains the splits test, train, validation, not tost; set split: test"):
        read_split(hub_clone, "tost")


def test_splits_in_other_names(tmp_path, write_rows):
    for name in ("a/train/x", "a/dev/x", "b/mine", "b/mine_test", "c/x", "c/y", "d/test_1", "d/test_2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows([{"prompt": name, "response": "x"}], f"{name}.jsonl")
    assert [row["prompt"] for row in read_split(tmp_path / "a", "validation")] == ["a/dev/x"]
    with pytest.raises(DataError, match=r"mixes the splits test with files of none \(mine\.jsonl\); name the files"):
        read_split(tmp_path / "b")
    assert len(read_split(tmp_path / "b", "all")) == 2
    assert len(read_split(tmp_path / "d")) == 2, "nothing is mixed"
    assert len(read_split(f"{tmp_path}/a/*/*.jsonl")) == 1
    for path in ("c", "c/x.jsonl", "c/*.jsonl"):
        with pytest.raises(RecipeError, match="`split` has no effect on local files whose names carry no splits"):
            read_split(tmp_path / path, "test")


def test_hidden_files_are_read_only_if_they_are_named(tmp_path, write_rows):
    for name in (".ipynb_checkpoints/a-checkpoint", "a", "~$b"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows([{"prompt": name}], f"d/{name}.jsonl")
    assert len(read_split(tmp_path / "d")) == len(read_split(f"{tmp_path}/d/**/*.jsonl")) == 1
    assert len(read_split(f"{tmp_path}/d/.ipynb_checkpoints/*.jsonl")) == 1
    assert len(read_split(tmp_path / "d" / ".ipynb_checkpoints" / "a-checkpoint.jsonl")) == 1


def test_the_splits_in_a_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"train": ROWS, "val": ROWS[:2]}))
    assert splits_in(file) == ["train", "val"]
    assert [read_split(file, split) for split in ("val", "validation")] == [ROWS[:2]] * 2
    assert len(read_split(file, "all")) == len(ROWS) + 2


CHATGPT = [{"title": "t", "current_node": "d", "mapping": {
    "a": {"parent": None, "message": None},
    "b": {"parent": "a", "message": {"author": {"role": "user"},
                                     "content": {"content_type": "text", "parts": ["Chi sei?"]}}},
    "c": {"parent": "b", "message": {"author": {"role": "assistant"},
                                     "content": {"content_type": "text", "parts": ["Scartato."]}}},
    "d": {"parent": "b", "message": {"author": {"role": "assistant"},
                                     "content": {"content_type": "text", "parts": ["Nesso."]}}},
}}] * 3  # fmt: skip


def test_the_export_of_chatgpt_is_read_by_the_shipped_reader(tmp_path, monkeypatch, sft):
    monkeypatch.chdir(tmp_path)
    Path("conversations.json").write_text(json.dumps(CHATGPT))
    with pytest.raises(DataError, match=r"is an export of ChatGPT, .*; set format: recipes/readers") as error:
        prepare_data(sft("conversations.json"))
    reader = str(error.value).rpartition("format: ")[2]
    data = prepare_data(sft({"path": "conversations.json", "format": reader}))
    assert data.summary.rows_kept == 3
    text = data.tokenizer.decode(data.train[0]["input_ids"])
    assert "Nesso." in text
    assert "Scartato" not in text
