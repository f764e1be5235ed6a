"""Prepared data is keyed by content: paths and names change nothing but the names that are shown."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nesso_tune import DataError, RecipeError, cache, prepare_data
from nesso_tune.data.cache_key import software_versions
from nesso_tune.data.locations import rename_locations
from nesso_tune.data.prepare import dropped_file
from nesso_tune.data.sources import check_output
from nesso_tune.recipes.schema import SFTRecipe

CASES = Path(__file__).parents[3] / "shared" / "cases"


def rows_of(data):
    return [row["input_ids"] for row in data.train]


@pytest.fixture
def folder(tmp_path, write_rows, chats):
    """Two data files in a folder, one with unusable rows, and the auxiliary files that a recipe may name."""
    (tmp_path / "data").mkdir()
    write_rows([*chats[:6], {"messages": []}, chats[0]], "data/a.jsonl")
    write_rows([*chats[6:], {"messages": [{"role": "user", "content": "?"}]}], "data/b.jsonl")
    (tmp_path / "data" / "tools.txt").write_text('[{"name": "f", "parameters": {"type": "object"}}]')
    (tmp_path / "data" / "mine.yaml").write_text(
        "kind: conversation\nmessages_field: [messages]\nrole_field: [role]\ncontent_field: [content]\n"
        "roles: {user: user, assistant: assistant}\n"
    )
    (tmp_path / "data" / "asked.txt").write_text('{"prompt": "Di che colore è il cielo?"}\n')
    return tmp_path / "data"


@pytest.fixture
def recipe_in(sft):
    def make(folder, path="*.jsonl", **keys):
        source = {"path": f"{folder}/{path}", "format": f"{folder}/mine.yaml", "tools_file": f"{folder}/tools.txt"}
        clean = {"duplicates": "drop", "decontaminate": {"files": [f"{folder}/asked.txt"], "ngram": 4}}
        return sft(source | keys, clean=clean, validation_size=2, sequence_len=512)

    return make


def test_moved_renamed_and_linked_data_is_the_same_under_its_current_names(folder, recipe_in, tmp_path, monkeypatch):
    first = prepare_data(recipe_in(folder))
    same = {}
    monkeypatch.chdir(tmp_path)
    same["relative"] = recipe_in("data")
    same["dotted"] = recipe_in("./x/../data") if (tmp_path / "x").mkdir() is None else None
    same["a folder"] = recipe_in(folder, "")
    (tmp_path / "link").symlink_to(folder)
    same["linked"] = recipe_in(tmp_path / "link")
    same["called otherwise"] = recipe_in(folder, alias="mine")
    shutil.copytree(folder, tmp_path / "else where")
    (tmp_path / "else where" / "b.jsonl").rename(tmp_path / "else where" / "a: of 3.jsonl")
    for file, new in (("a.jsonl", "A 1.jsonl"), ("mine.yaml", "m.yaml"), ("tools.txt", "t"), ("asked.txt", "q")):
        (tmp_path / "else where" / file).rename(tmp_path / "else where" / new)
    moved = recipe_in(tmp_path / "else where").model_dump(mode="json")
    moved["data"]["sources"][0] |= {
        "format": f"{tmp_path}/else where/m.yaml", "tools_file": f"{tmp_path}/else where/t"
    }  # fmt: skip
    moved["data"]["clean"]["decontaminate"]["files"] = [f"{tmp_path}/else where/q"]
    same["renamed"] = SFTRecipe.model_validate(moved)
    for name, recipe in same.items():
        data = prepare_data(recipe)
        assert data.summary.cache_hit, name
        assert data.summary.fingerprint == first.summary.fingerprint, name
        source = recipe.data.sources[0]
        assert data.summary.sources[0].path == source.path, name
        assert data.summary.sources[0].alias == source.alias, name
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("NESSO_TUNE_CACHE", str(tmp_path / f"cache-{name}"))
            fresh = prepare_data(recipe)  # under these names from the start
            listed = dropped_file(fresh).read_text()
        assert replace(fresh.summary, cache_hit=True) == data.summary, name
        assert fresh.train.documents.prefixes == data.train.documents.prefixes, name
        assert dropped_file(data).read_text() == listed, name
        assert len(listed.splitlines()) == 4, "two of no use, a repeated one, and one that is asked in an evaluation"
    assert f"{tmp_path}/else where/A 1.jsonl:7" in listed


def test_the_content_of_each_file_counts(folder, recipe_in):
    recipe = recipe_in(folder)
    seen = {prepare_data(recipe).summary.fingerprint}
    for name, old, new in (
        ("a.jsonl", "Roma", "Toma"), ("mine.yaml", "[content]", "[content, text]"), ("tools.txt", '"f"', '"g"'),
        ("asked.txt", "Di che colore", "Chi ha visto mai"),
    ):  # fmt: skip
        file = folder / name
        file.write_text(file.read_text().replace(old, new))
        report = prepare_data(recipe).report
        assert not report["cache_hit"], name
        seen.add(report["fingerprint"])
    assert len(seen) == 4, "another mapping that reads the same is the same data"


def test_a_name_that_decides_what_a_row_is_counts(sft, tmp_path):
    """One line with a list of objects: rows in a .json file, one row in a .jsonl file."""
    row = {
        "q": {"text": "Chi?"},
        "answers": [{"question": "Io?", "answer": "Tu."}, {"question": "Tu?", "answer": "Io."}],
    }
    for name in ("rows.json", "row.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    wrapped = sft(str(tmp_path / "rows.json"))
    assert prepare_data(wrapped).summary.rows_kept == 2
    columns = {"format": "alpaca", "prompt_field": "q.text", "response_field": "answers.0.answer"}
    assert prepare_data(sft({"path": str(tmp_path / "row.jsonl"), **columns})).summary.rows_kept == 1
    with pytest.raises(DataError, match="its format is not recognised"):  # not the rows in the cache
        prepare_data(sft(str(tmp_path / "row.jsonl")))


def test_shares_by_source_do_not_depend_on_names(sft, write_rows, chats, tmp_path):
    def made(a, b):
        sources = [{"path": a, "alias": "one"}, b]
        return prepare_data(sft(*sources, mixture={"by": "source", "shares": {"one": 0.25, b: 0.75}})).report

    a, b = write_rows(chats[:5], "a.jsonl"), write_rows(chats[5:], "b.jsonl")
    first = made(a, b)
    other = shutil.copy(b, tmp_path / "c.jsonl")
    second = made(a, str(other))
    assert second["fingerprint"] == first["fingerprint"]
    assert [group["name"] for group in second["mixture"]] == ["one", str(other)]


def test_names_in_locations():
    names = {"a": "A", "a:1": "other", "b c.jsonl": "B"}
    texts = {
        "a:5": "A:5", "a:1:5": "A:1:5", "b c.jsonl row 3": "B row 3", "a:5: of b c.jsonl:2": "A:5: of B:2",
        "of a:9": "of A:9", "x/a:5": "x/a:5", "a:5: 12 tokens": "A:5: 12 tokens", "nothing a here": "nothing a here",
    }  # fmt: skip
    for text, expected in texts.items():
        assert rename_locations(text, names) == expected, text


def test_other_code_or_packages_prepare_again_with_the_same_fingerprint(sft, write_rows, chats, monkeypatch):
    recipe = sft(write_rows(chats))
    first = prepare_data(recipe).report
    assert any(entry.startswith("tokenizers ") for entry in software_versions())
    monkeypatch.setattr("nesso_tune.data.cache_key.software_versions", lambda: ["tokenizers 9"])
    second = prepare_data(recipe).report
    assert not second["cache_hit"]
    assert second["fingerprint"] == first["fingerprint"]


READER = """
from myhelper import fix
import json, os
HERE = os.path.dirname(__file__)
def f(row):
    import lazily.inside as late
    return {"prompt": fix(row["q"]), "response": json.load(open(os.path.join(HERE, "map.json"))).get(row["a"], late.NO)}
"""


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader that imports a module, a package when it is called, and reads a table."""
    here = tmp_path / "reader"
    (here / "lazily").mkdir(parents=True)
    (here / "rd.py").write_text(READER)
    (here / "myhelper.py").write_text("from lazily import shared\ndef fix(t): return t + shared.MARK\n")
    (here / "lazily" / "__init__.py").write_text("")
    (here / "lazily" / "inside.py").write_text("from .shared import MARK\nNO = 'no'\n")
    (here / "lazily" / "shared.py").write_text("MARK = '!'\n")
    (here / "map.json").write_text('{"uno": "DUE"}')
    (here / "d.jsonl").write_text("".join(json.dumps({"q": f"domanda {i}", "a": "uno"}) + "\n" for i in range(3)))
    monkeypatch.syspath_prepend(str(here))
    return here


def test_changes_of_imported_modules_and_declared_files_are_detected(reader, sft):
    source = {"path": f"{reader}/d.jsonl", "format": f"{reader}/rd.py:f", "reads": [f"{reader}/map.json"]}
    recipe = sft(source)
    first = prepare_data(recipe)
    assert prepare_data(recipe).summary.cache_hit
    known = [rows_of(first)]
    for name, old, new in (
        ("map.json", "DUE", "TRE"), ("myhelper.py", "t +", "t.upper() +"), ("lazily/shared.py", "!", "?"),
        ("rd.py", '["q"]', '["a"]'), ("lazily/inside.py", "'no'", "'na'"),
    ):  # fmt: skip
        file = reader / name
        times, text = file.stat(), file.read_text().replace(old, new)
        file.write_text(text)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # Python alone would take its compiled code
        data = prepare_data(recipe)
        assert not data.summary.cache_hit, name
        assert (rows_of(data) in known) == (name == "lazily/inside.py"), name
        known.append(rows_of(data))
    moved = shutil.copytree(reader, reader.parent / "moved")
    again = sft({"path": f"{moved}/d.jsonl", "format": f"{moved}/rd.py:f", "reads": [f"{moved}/map.json"]})
    assert prepare_data(again).summary.fingerprint == data.summary.fingerprint


def test_a_declared_file_must_exist_and_requires_a_reader(reader, sft):
    source = {"path": f"{reader}/d.jsonl", "format": f"{reader}/rd.py:f", "reads": [f"{reader}/mop.json"]}
    with pytest.raises(DataError, match=r"mop\.json: no such file; did you mean .*map\.json"):
        prepare_data(sft(source))
    for fmt in ("auto", "messages"):
        with pytest.raises(ValueError, match=r"reads: has no effect without a user-defined reader; set format: FILE"):
            sft(source | {"format": fmt})


def test_two_readers_with_helper_modules_of_the_same_name(tmp_path, sft, write_rows):
    path, made = write_rows([{"q": "a"}, {"q": "b"}]), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"WORD = '{name}'\n")
        (tmp_path / name / "rd.py").write_text(
            "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\nfrom helper import WORD\n"
            "def f(row): return {'prompt': row['q'], 'response': WORD}\n"
        )
        data = prepare_data(sft({"path": path, "format": f"{tmp_path}/{name}/rd.py:f"}))
        made.append(data.tokenizer.decode(data.train[0]["input_ids"]))
    assert "one" in made[0]
    assert "two" in made[1]


LIB = "sys.path.insert(0, os.path.join(os.path.dirname(__file__), '{}'))"
LATE = {  # readers, by what is inside `f` and before it
    "folder_by_the_file": ("from late_a import A", LIB.format("lib")),
    "folder_by_the_function": (f"{LIB.format('lib2')}; from late_b import A", ""),
    "package_on_the_path": ("from late_pack.deep.one import A", ""),
    "star_in_a_package": ("from late_star.up import two; A = two.A", ""),
    "star_beside": ("A = three.A", f"{LIB.format('.')}\nfrom late_near import *"),
}


def test_late_and_star_imports_of_a_reader_are_found_from_the_start(tmp_path, sft, write_rows, monkeypatch):
    """Whether they are imported yet does not matter, nor do .pyc files of the same second."""
    texts = {
        "path/late_pack/deep/__init__.py": "", "path/late_star/__init__.py": "",
        "path/late_star/up.py": "from .all import *\n", "path/late_star/all/__init__.py": "__all__ = ['two']\n",
        "late_near/__init__.py": "__all__ = ['three']\n",
        **{f"{name}.py": f"import os, sys\n{before}\ndef f(row):\n    {inside}\n"
                         "    return {'prompt': row['q'], 'response': A}\n" for name, (inside, before) in LATE.items()},
    }  # fmt: skip
    answers = ("lib/late_a.py", "lib2/late_b.py", "path/late_pack/deep/one.py", "path/late_star/all/two.py",
               "late_near/three.py")  # fmt: skip
    for file in (*texts, *answers):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(texts.get(file, ""))
    monkeypatch.setattr("sys.path", [str(tmp_path / "path"), *sys.path])
    rows = write_rows([{"q": "a"}, {"q": "b"}])
    for answer in ("uno", "due"):
        for file in answers:
            (tmp_path / file).write_text(f"A = '{answer}'\n")
        for name in LATE:
            recipe = sft({"path": rows, "format": f"{tmp_path}/{name}.py:f"})
            data = prepare_data(recipe)
            assert not data.summary.cache_hit, name
            assert answer in data.tokenizer.decode(data.train[0]["input_ids"]), name
            assert prepare_data(recipe).summary.cache_hit, name


def test_a_module_of_a_reader_whose_folder_is_gone_is_not_used(reader, sft, monkeypatch):
    """Its name may be that of a module of the next reader."""
    first = prepare_data(sft({"path": f"{reader}/d.jsonl", "format": f"{reader}/rd.py:f"}))
    other = reader.rename(reader.parent / "other")
    (other / "myhelper.py").write_text("def fix(t): return 'other'\n")
    monkeypatch.syspath_prepend(str(other))
    second = prepare_data(sft({"path": f"{other}/d.jsonl", "format": f"{other}/rd.py:f"}))
    assert rows_of(second) != rows_of(first)


@pytest.mark.skipif(not (CASES / "reader").is_dir(), reason="the collection of small inputs is not here")
def test_the_reader_of_the_collection(tmp_path, sft):
    here = shutil.copytree(CASES / "reader", tmp_path / "r")
    recipe = sft({"path": f"{here}/d.jsonl", "format": f"{here}/rd.py:f", "reads": [f"{here}/map.json"]})
    for name, old, new in (("map.json", "DUE", "SEI"), ("myhelper.py", "NEW", "OLD")):
        before = prepare_data(recipe)
        (here / name).write_text((here / name).read_text().replace(old, new))
        after = prepare_data(recipe)
        assert not after.summary.cache_hit
        assert rows_of(after) != rows_of(before)


@pytest.mark.parametrize(
    ("path", "output"),
    [("data", "data/run"), ("data/**/*.jsonl", "data/deep/run"), ("data/*/*.jsonl", "data/run"), ("data", "data"),
     ("data/*", "data"), ("link", "data/run"), ("data", "link/run"), ("**/*.json*", "outputs/run"),
     ("*/*.jsonl", "runs"), ("*/*.jsonl", "else/where"), ("*/*/*.jsonl", "runs/one"), ("dd/*/*.jsonl", "else/where"),
     ("**/runs/*.jsonl", "runs"), ("dd/*.jsonl", "out"), ("dd", "out")],
)  # fmt: skip
def test_an_output_dir_among_the_data_is_rejected(tmp_path, sft, write_rows, chats, monkeypatch, path, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for folder in ("dd", "else/where"):
        (tmp_path / folder).mkdir(parents=True)
    for link, target in (
        ("link", "data"),
        ("runs", "else/where"),
        ("dd/b", "../runs"),
        ("dd/m.jsonl", "../out/metrics.jsonl"),
    ):
        (tmp_path / link).symlink_to(target)
    write_rows(chats, "data/deep/a.jsonl")
    write_rows(chats, "dd/a.jsonl")
    write_rows(chats, "data/a.jsonl")
    for keys in ({}, {"validation_sources": [{"path": path}]}):
        recipe = sft("data/a.jsonl" if keys else path, **keys).model_copy(update={"output_dir": output})
        with pytest.raises(
            RecipeError, match=r"output_dir: .* is inside data\..*sources\.0\.path|is inside output_dir"
        ):
            check_output(recipe)


def test_data_in_output_dir_is_rejected_and_siblings_are_not(
    tmp_path, tmp_path_factory, sft, write_rows, chats, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "out/run/data"):
        (tmp_path / folder).mkdir(parents=True)
    write_rows(chats, "data/a.jsonl")
    write_rows(chats, "out/run/data/a.jsonl")
    (tmp_path / "files").symlink_to("out/run/data")
    (tmp_path / "runs").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    for path in ("out/run/data/a.jsonl", "out/run/data", "out/run/data/*.jsonl", "files", "files/a.jsonl"):
        with pytest.raises(
            RecipeError, match=r"data\.sources\.0\.path: .* is inside output_dir out/run, which is reserved for"
        ):
            check_output(sft(path).model_copy(update={"output_dir": "out/run"}))
    for path, output in (
        ("data/*.jsonl", "data/run"), ("*/a.jsonl", "out/x"), ("data", "data-run"), ("data/a.jsonl", "data/run"),
        ("out/run/data", "out/other"), ("*/a.jsonl", "runs"), ("**/*.jsonl", "runs/x"), ("org/name", "org/name/run"),
    ):  # fmt: skip
        check_output(sft(path).model_copy(update={"output_dir": output}))


def test_hub_data_is_not_looked_up_in_the_cache():
    assert cache.load("documents", "nothing", lambda folder, note: folder) is None
