"""Reading files of every type: rows with their locations, or an error with location and remedy."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from nesso_tune import DataError
from nesso_tune.data.file_formats import read_records
from nesso_tune.data.files import content_hash, expand, is_local
from nesso_tune.data.sources import count_records
from nesso_tune.recipes.sections import Source

ROWS = [{"a": "è"}, {"a": "b\nc"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"

GOOD = {
    "lines": ("x.jsonl", LINES),
    "no last line break": ("x.jsonl", LINES.rstrip()),
    "windows line ends": ("x.jsonl", LINES.replace(b"\n", b"\r\n")),
    "byte order mark": ("x.jsonl", BOM + LINES),
    "byte order marks of files that were joined": (
        "x.jsonl",
        BOM + LINES[: LINES.index(b"\n") + 1] + BOM + LINES[LINES.index(b"\n") + 1 :],
    ),
    "blank lines": ("x.jsonl", b"\n" + LINES.replace(b"\n", b"\n  \n")),
    "array": ("x.json", json.dumps(ROWS).encode()),
    "array with byte order mark": ("x.json", BOM + b"\n " + json.dumps(ROWS, indent=2).encode()),
    "array by another name": ("x.jsonl", json.dumps(ROWS).encode()),
    "lines by another name": ("x.txt", LINES),
    "lines by a binary name": ("x.parquet", LINES),
}


@pytest.mark.parametrize(("name", "content"), GOOD.values(), ids=GOOD)
def test_rows_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for row, _ in read_records(tmp_path / name)] == ROWS


BAD = {
    "cut short": (LINES + b'{"a": "b', r"x.jsonl:3: is not JSON \(Unterminated string.*\); correct the line"),
    "two objects in a line": (b'{"a": 1}{"a": 2}', r"x.jsonl:1: is not JSON \(Extra data\)"),
    "a list in the middle": (LINES + b"[1]\n", r"x.jsonl:3: a row must be a JSON object, got list"),
    "a text": (b'"a"\n', r"x.jsonl:1: a row must be a JSON object, got str"),
    "array of texts": (b'["a"]', r"x.jsonl row 1: a row must be a JSON object"),
    "array cut short": (b'[{"a": 1},\n{"a"', r"x.jsonl:2: is not JSON"),
    "array of bad bytes": (b'[{"a": "\xe8"}]', r"x.jsonl:1: is not UTF-8 text"),
    "latin-1": (LINES + b'{"a": "\xe8"}', r"x.jsonl:3: is not UTF-8 text; if it is Windows-1252, convert it: iconv"),
    "nested without end": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", r"x.jsonl:1: is not JSON"),
    "array nested without end": (b"[" * 200_000, r"x.jsonl:1: is not readable JSON .it is nested too deeply"),
    "a key twice": (LINES + b'{"a": 1, "a": 2}', r"x.jsonl:3: is not JSON \(the key `a` stands twice in an object\)"),
    "a key twice in an array": (b'[{"a": 1},\n{"b": {"a": 1, "a": 2}}]', r"x.jsonl:2: is .*\(the key `a` stands twice"),
    "an endless integer": (b'{"a": ' + b"9" * 5000 + b"}", r"\(an integer has thousands of digits\)"),
    "lists of messages": (b'[[{"role": "user"}]]', r'x.jsonl row 1: .* got list; write \{"messages": \[...\]\}'),
    "empty": (b"", "x.jsonl: is empty; give a file with rows"),
    "blank": (BOM + b" \n\n", "x.jsonl: is empty"),
    "zip": (b"PK\x03\x04...", "x.jsonl: is an archive of files; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd...", "x.jsonl: is damaged"),
    "csv": (b"a,b\n1,2\n", "x.jsonl:1: is not JSON; it looks like a table of text; rename it"),
    "binary": (bytes(range(256)), "x.jsonl: is a binary file of a kind that is not read"),
    "a web page": (b"\n<!DOCTYPE html><html>a, b</html>", "x.jsonl: is a web page; download the file itself"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "x.jsonl: is a pointer to a file in Git LFS; fetch"),
    "a chat, not a table": (b"01/02/24, 10:00 - A: b\n01/02/24, 10:01 - B: c\n", r"x.jsonl:1: is not JSON \(Extra"),
}


@pytest.mark.parametrize(("content", "expected"), BAD.values(), ids=BAD)
def test_invalid_rows_are_reported_with_their_location(tmp_path, content, expected):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        list(read_records(tmp_path / "x.jsonl"))


def test_locations_are_line_numbers(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n" + LINES)
    assert [where for _, where in read_records(tmp_path / "x.jsonl")] == [f"{tmp_path}/x.jsonl:{n}" for n in (2, 3)]
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    assert [where for _, where in read_records(tmp_path / "x.json")] == [f"{tmp_path}/x.json row {n}" for n in (1, 2)]


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "è"}], "n": i} for i in range(3000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = list(read_records(tmp_path / "x.parquet"))
    assert [row for row, _ in read] == rows
    assert read[-1][1].endswith("x.parquet row 3000")


def test_damaged_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(bytes(8) + LINES)
    with pytest.raises(DataError, match=r"x.parquet: is not a readable Parquet file"):
        list(read_records(tmp_path / "x.parquet"))
    text = pa.array([b"\xe8"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"a": text}), tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin.parquet: .*utf-8"):
        list(read_records(tmp_path / "latin.parquet"))


def names(paths, root):
    return [str(path.relative_to(root)) for path in paths]


def test_folders_and_globs_in_a_fixed_order(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.json", "sub/c.PARQUET", "README.md", "d.ndjson"):
        (tmp_path / name).write_bytes(LINES)
    assert names(expand(str(tmp_path)), tmp_path) == ["a.json", "b.jsonl", "d.ndjson", "sub/c.PARQUET"]
    assert names(expand(f"{tmp_path}/*.json*"), tmp_path) == ["a.json", "b.jsonl"]
    assert names(expand(f"{tmp_path}/**/*.PARQUET"), tmp_path) == ["sub/c.PARQUET"]
    monkeypatch.chdir(tmp_path / "sub")
    assert [p.name for p in expand("../?.jsonl")] == ["b.jsonl"]


def test_links_are_followed_once(tmp_path):
    for name in ("here/sub", "there/more"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_bytes(LINES)
    for link, target in {"here/linked": "there", "here/same": "here/sub", "there/above": "here"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert names(expand(f"{tmp_path}/here"), tmp_path) == ["here/linked/more/x.jsonl", "here/sub/x.jsonl"]
    (tmp_path / "here" / "sub" / "y.jsonl").symlink_to("gone.jsonl")
    for path in ("here", "here/sub/*.jsonl", "here/sub/y.jsonl"):
        with pytest.raises(DataError, match=r"y\.jsonl: is a link to gone\.jsonl, which does not exist; restore"):
            expand(f"{tmp_path}/{path}")


def test_an_existing_file_with_brackets_in_its_name_is_not_a_glob(tmp_path):
    (tmp_path / "x[1].jsonl").write_bytes(LINES)
    assert names(expand(f"{tmp_path}/x[1].jsonl"), tmp_path) == ["x[1].jsonl"]


def test_compressed_files_in_a_folder_are_not_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert names(expand(str(tmp_path)), tmp_path) == ["a.jsonl", "b.jsonl.gz"]


def test_missing_files(tmp_path):
    (tmp_path / "here.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"there.jsonl: no such file; did you mean .*here.jsonl"):
        expand(f"{tmp_path}/there.jsonl")
    with pytest.raises(DataError, match=r"\*.parquet: matches no file"):
        expand(f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder contains no data file .*; it is empty; name the files"):
        expand(f"{tmp_path}/empty")
    (tmp_path / "empty" / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"the folder contains no data file .*; only x\.tar\.gz; name the files"):
        expand(f"{tmp_path}/empty")


@pytest.mark.parametrize(
    ("path", "local"),
    [("HuggingFaceTB/smoltalk", False), ("data/x.jsonl", True), ("./a/b", True), ("a/*", True), ("~/x/y", True),
     ("x", True), ("a/b/c", True), ("data/x.csv", True)],
)  # fmt: skip
def test_local_paths_and_hub_ids(path, local):
    assert is_local(path) is local


def test_the_hash_depends_on_the_content_alone(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(LINES)
    two.write_bytes(LINES)
    assert content_hash([one]) == content_hash([two])
    two.write_bytes(LINES.replace(b"b", b"d"))
    assert content_hash([one]) != content_hash([two])
    assert content_hash([one, two]) != content_hash([two, one])


def test_the_count_equals_the_number_of_rows_read(tmp_path):
    contents = {
        "plain": '{"a": 1}\n{"a": 2}\n', "no last break": '{"a": 1}\n{"a": 2}',
        "blank lines": '{"a": 1}\n\n \n{"a": 2}\n', "an array": '[{"a": 1},\n{"a": 2}]', "one": '{"a": 1}',
    }  # fmt: skip
    for name, content in contents.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(content)
        assert count_records(Source(path=str(file))) == len(list(read_records(file))), name


def test_nulls_that_arrow_fills_in_are_dropped(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w", "tool_calls": calls}]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "x.parquet")
    ((row, _),) = read_records(tmp_path / "x.parquet")
    assert row == {"messages": turns}
