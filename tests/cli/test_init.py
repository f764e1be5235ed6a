"""`nesso-tune init`: a recipe that loads, from a base and files."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from nesso_tune.cli.main import main
from nesso_tune.planning.shapes import known_config, shape_of
from nesso_tune.recipe_draft import choose_values
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import shipped_recipes
from nesso_tune.recipes.yaml_source import read_document

ZAGREUS, EIGHT = "mii-llm/zagreus-0.4B-ita", "meta-llama/Llama-3.1-8B"


@pytest.fixture
def init(capsys, tmp_path, monkeypatch):
    """Runs `init` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["init", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_a_recipe_from_ones_own_file(init, talks, tmp_path):
    code, out, err = init("mine", "--base", ZAGREUS, "--data", talks)
    assert (code, err) == (0, "")
    assert out.rstrip().endswith("next: nesso-tune check mine.yaml")
    assert "30 rows, format messages; it ~50%, en ~50%" in out
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.method, recipe.output_dir, recipe.model.base) == ("sft", "outputs/mine", ZAGREUS)
    assert recipe.data.sources[0].path == talks
    assert (recipe.data.sources[0].format, recipe.data.sources[0].language) == ("messages", None)
    assert recipe.train.learning_rate == pytest.approx(6e-5, rel=0.1), "1e-3 at 256 times as many tokens per step"
    assert recipe.chat.template == "chatml"


def test_reasoning_in_the_answers_is_decided_in_the_recipe(init, write_rows, tmp_path):
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Twice 2."},
    ]
    code, _, err = init("mine", "--base", ZAGREUS, "--data", write_rows([{"messages": turns}] * 20))
    assert (code, err) == (0, "")
    assert load_recipe(tmp_path / "mine.yaml").data.reasoning == "drop"
    assert "reasoning: drop " in (tmp_path / "mine.yaml").read_text()


def test_the_text_explains_itself_and_fits_the_schema_beside_it(init, talks, tmp_path):
    init("mine", "--base", ZAGREUS, "--data", talks)
    text = (tmp_path / "mine.yaml").read_text()
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.MULTILINE)
    schema = json.loads((tmp_path / named).read_text())
    assert list(Draft202012Validator(schema).iter_errors(read_document(tmp_path / "mine.yaml").value)) == []
    keys = [line for line in text.splitlines() if re.match(r" +\w+: \S", line)]
    assert sum("  # " in line for line in keys) >= 8, "most values have their reason"
    assert max(map(len, text.splitlines())) <= 120


def test_pairs_become_dpo_from_the_result_of_sft(init, talks, pairs, tmp_path):
    init("first", "--base", ZAGREUS, "--data", talks)
    code, out, _ = init("second", "--data", pairs, "--base", "outputs/first/final")
    assert code == 0
    assert out.rstrip().endswith("later: nesso-tune train first.yaml second.yaml, one after the other")
    recipe = load_recipe(tmp_path / "second.yaml")
    assert (recipe.method, recipe.data.sources[0].format) == ("dpo", "preference")
    assert recipe.train.learning_rate == pytest.approx(2.5e-7, rel=0.1), "the size is that of the first one's base"
    assert recipe.dpo.loss == {"sigmoid": 1.0, "sft": 0.2}
    assert recipe.chat.template is None, "template and tokens come with the base"


def test_several_files_after_one_option(init, talks, write_rows, chats, tmp_path):
    more = write_rows(chats, "more words.jsonl")
    code, _, _ = init("--data", talks, more, "both", "--base", ZAGREUS)
    assert code == 0
    assert [source.path for source in load_recipe(tmp_path / "both.yaml").data.sources] == [talks, more]


def test_a_base_in_a_folder(init, talks, base, tmp_path):
    code, out, _ = init("--base", base, "--data", talks)
    assert code == 0
    assert "my-sft.yaml: sft from" in out, "the method is the default name"
    assert "(1.1 M parameters)" in out
    assert load_recipe(tmp_path / "my-sft.yaml").data.sequence_len == 512, "the context of the base"
    assert load_recipe(tmp_path / "my-sft.yaml").model.random_init, "it has no weights"


def test_columns_that_had_to_be_found_are_named(init, write_rows, tmp_path):
    rows = [{"domanda": f"Come si dice {i}?", "risposta": f"Si dice: {i}, credo."} for i in range(9)]
    code, out, _ = init("mine", "--base", EIGHT, "--data", write_rows(rows))
    assert code == 0
    assert "prompt_field domanda" in out
    recipe = load_recipe(tmp_path / "mine.yaml")
    source = recipe.data.sources[0]
    assert (source.prompt_field, source.response_field, source.language) == ("domanda", "risposta", "it")
    assert recipe.chat.template == "llama3"
    assert recipe.train.learning_rate == pytest.approx(9e-7, rel=0.05), "1e-5 at 128 times as many tokens per step"


def test_without_a_base_the_default_is_said(init, talks):
    code, _, err = init("--data", talks)
    assert code == 0
    assert err == f"no --base given, using {ZAGREUS}\n"


def test_a_base_that_is_nearly_known(init, talks):
    code, _, err = init("--base", "mii-llm/zagreus-0.4b-ita", "--data", talks)
    assert code == 0
    assert "did you mean mii-llm/zagreus-0.4B-ita?" in err


@pytest.mark.parametrize("name", ["run: v2", "null", "2024", 'a "b" c', "è#1", "tab\there"])
def test_any_name_makes_a_recipe_that_loads(init, talks, tmp_path, name):
    code, _, err = init(name, "--base", ZAGREUS, "--data", talks)
    assert code == 0, err
    assert load_recipe(tmp_path / f"{name}.yaml").output_dir == f"outputs/{name}"


def test_data_cannot_write_into_the_recipe(init, write_rows, chats, tmp_path):
    rows = [{**row, "language": "it\nmodel: x"} for row in chats]
    path = write_rows(rows, 'odd "name" \u2028: #1.jsonl')
    code, _, err = init("mine", "--base", ZAGREUS, "--data", path)
    assert code == 0, err
    assert load_recipe(tmp_path / "mine.yaml").data.sources[0].path == path


def test_a_file_that_is_given_twice_is_read_once(init, talks, tmp_path):
    code, _ = init("twice", "--data", "talks.jsonl", "./talks.jsonl", str(tmp_path / "talks.jsonl"))[:2]
    assert code == 0
    assert [source.path for source in load_recipe(tmp_path / "twice.yaml").data.sources] == ["talks.jsonl"]


def test_files_of_a_folder_that_are_not_alike_become_sources(init, write_rows, chats, tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in {"a": chats, "b": [{"prompt": "Chi sei?", "response": "Sono Nesso."}] * 4}.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert init("mine", "--base", ZAGREUS, "--data", "data")[0] == 0
    sources = load_recipe(tmp_path / "mine.yaml").data.sources
    assert [(source.path, source.format) for source in sources] == [
        ("data/a.jsonl", "messages"),
        ("data/b.jsonl", "alpaca"),
    ]


CHOICES = [
    {"prompt": f"Quale risposta è la migliore, la {i}?", "output_1": f"La prima, {i}.", "output_2": f"Un'altra, {i}.",
     "label": 1 + i % 2} for i in range(9)
]  # fmt: skip


def test_the_recipe_of_labelled_answers_loads(init, write_rows, whole_base, tmp_path):
    code, _, err = init("mine", "--base", whole_base, "--data", write_rows(CHOICES))
    assert code == 0, err
    source = load_recipe(tmp_path / "mine.yaml").data.sources[0]
    assert (source.format, source.choice_fields, source.labels) == ("choice", ("output_1", "output_2"), (1, 2))


def test_format_and_columns_can_be_given(init, write_rows, tmp_path):
    rows = [{"a": f"Perché {i}?", "b": f"Perché sì, e perché no: {i}."} for i in range(9)]
    code, _, err = init("mine", "--base", ZAGREUS, "--data", write_rows(rows), "--format", "alpaca",
                        "--field", "prompt=a", "--field", "response_field=b")  # fmt: skip
    assert code == 0, err
    source = load_recipe(tmp_path / "mine.yaml").data.sources[0]
    assert (source.format, source.prompt_field, source.response_field) == ("alpaca", "a", "b")


def test_a_reader_can_be_given(init, write_rows, tmp_path):
    (tmp_path / "r.py").write_text("def faq(row): return {'prompt': row['a'], 'response': row['b']}\n")
    path = write_rows([{"a": f"Perché {i}?", "b": "Perché sì."} for i in range(9)])
    code, out, err = init("mine", "--base", ZAGREUS, "--data", path, "--format", "r.py:faq")
    assert code == 0, err
    assert load_recipe(tmp_path / "mine.yaml").data.sources[0].format == "r.py:faq"
    assert "9 rows, format r.py:faq" in out


def test_one_unreadable_file_of_several_is_left_out(init, talks, write_rows, chats, tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(chats, "data/a.jsonl")
    (tmp_path / "data" / "b.jsonl").write_text("{broken\n")
    code, _, err = init("mine", "--base", ZAGREUS, "--data", "data")
    assert code == 0, err
    assert "left out: data/b.jsonl:1: is not JSON" in err
    assert [source.path for source in load_recipe(tmp_path / "mine.yaml").data.sources] == ["data/a.jsonl"]
    code, _, err = init("other", "--base", ZAGREUS, "--data", "data/b.jsonl", talks)
    assert code == 0, err
    assert [source.path for source in load_recipe(tmp_path / "other.yaml").data.sources] == [talks]


def test_splits_of_a_folder(init, write_rows, chats, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "dev", "test"):
        write_rows(chats, f"data/{name}.jsonl")
    code, out, err = init("mine", "--base", ZAGREUS, "--data", "data")
    assert code == 0, err
    assert "data: split test is not used" in err
    assert "data (split validation), for validation: 10 rows" in out
    data = load_recipe(tmp_path / "mine.yaml").data
    assert [(source.path, source.split) for source in data.sources] == [("data", "train")]
    assert [(source.path, source.split) for source in data.validation_sources] == [("data", "validation")]


def test_splits_by_the_names_of_files(init, write_rows, chats, tmp_path):
    for name in ("train", "valid", "test"):
        write_rows(chats, f"{name}.jsonl")
    code, _, err = init("mine", "--base", ZAGREUS, "--data", "train.jsonl", "valid.jsonl", "test.jsonl")
    assert code == 0, err
    assert "test.jsonl: a test split is not used" in err
    data = load_recipe(tmp_path / "mine.yaml").data
    assert [source.path for source in (*data.sources, *data.validation_sources)] == ["train.jsonl", "valid.jsonl"]
    assert init("only", "--base", ZAGREUS, "--data", "test.jsonl")[0] == 0, "nothing else was named"


def test_splits_in_one_file(init, chats, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"train": chats, "validation": chats[:4], "test": chats[:3]}))
    code, out, err = init("mine", "--base", ZAGREUS, "--data", "all.json")
    assert code == 0, err
    assert "all.json (split validation), for validation: 4 rows" in out
    data = load_recipe(tmp_path / "mine.yaml").data
    assert [source.split for source in (*data.sources, *data.validation_sources)] == ["train", "validation"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_without_a_gpu_the_dtype_is_float32(init, talks, tmp_path, monkeypatch, gpus):
    (tmp_path / "gpus").mkdir()
    for i in range(gpus):
        (tmp_path / "gpus" / str(i)).mkdir()
    monkeypatch.setattr("nesso_tune.launch.command.DRIVER_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert init("mine", "--base", ZAGREUS, "--data", talks)[0] == 0
    assert load_recipe(tmp_path / "mine.yaml").model.dtype == ("bfloat16" if gpus else "float32")


def test_rows_beyond_the_context_are_noted(init, write_rows, base):
    rows = [{"prompt": "a", "response": "x " * 4000}] * 3 + [{"prompt": "a", "response": "b"}]
    _, out, _ = init("mine", "--base", base, "--data", write_rows(rows))
    assert "note: about 75% of the rows are longer than the context of the base, and are dropped" in out


def test_a_folder_can_have_the_name_of_a_recipe(init, talks, tmp_path):
    (tmp_path / "mine").mkdir()
    assert init("mine", "--base", ZAGREUS, "--data", talks)[0] == 0
    assert (tmp_path / "mine.yaml").is_file()


def test_dpo_from_a_base_that_cannot_chat_is_noted(init, pairs, whole_base):
    _, out, _ = init("mine", "--base", whole_base, "--data", pairs)
    assert "DPO usually starts from the result of SFT" in out


FAULTS = {
    "no data": ([], 3, "add --data FILE"),
    "no such file": (["--data", "absent.jsonl"], 3, "absent.jsonl: no such file"),
    "cut short": (["--data", "gz.jsonl"], 3, "gz.jsonl: is damaged"),
    "no rows": (["--data", "empty.jsonl"], 3, "is empty"),
    "an odd shape": (["--data", "odd.jsonl"], 3, "its format is not recognised (its columns are a, b)"),
    "two kinds": (["--data", "talks.jsonl", "pairs.jsonl"], 3, "create one recipe for each"),
    "the other method": (["--data", "talks.jsonl", "--method", "dpo"], 3, "contains conversations, but DPO needs"),
    "the other data": (["--data", "pairs.jsonl", "--method", "sft"], 3, "contains preference pairs, but SFT needs"),
    "no method": (["--data", "talks.jsonl", "--method", "dop"], 2, "did you mean `dpo`?"),
    "dpo from nothing": (["--data", "pairs.jsonl"], 4, "add --base outputs/NAME/final"),
    "no such base": (["--data", "talks.jsonl", "--base", "./nowhere"], 4, "no such folder"),
    "a folder without model": (["--data", "talks.jsonl", "--base", "folder"], 4, "has no config.json"),
    "a damaged base": (["--data", "talks.jsonl", "--base", "damaged"], 4, "cannot be read"),
    "a run directory": (["--data", "talks.jsonl", "--base", "run"], 4, "has no config.json; name run/final"),
    "blank data": (["--data", " "], 3, "add --data FILE"),
    "an odd table": (["--data", "t.csv"], 3, "its format is not recognised (its columns are a, b)"),
    "an unknown field": (["--data", "talks.jsonl", "--field", "promt=a"], 2, "did you mean `prompt`?"),
    "a field without column": (["--data", "talks.jsonl", "--field", "prompt"], 2, "write --field prompt=COLUMN"),
    "a field of another format": (
        ["--data", "talks.jsonl", "--format", "messages", "--field", "prompt=q"],
        2,
        "init: `data.sources.0.prompt_field` has no effect",
    ),
    "an unknown format": (["--data", "talks.jsonl", "--format", "mesages"], 2, "did you mean `messages`?"),
    "two names": (["a", "b", "--data", "talks.jsonl"], 2, "takes one NAME"),
    "already there": (["there", "--data", "talks.jsonl"], 5, "there.yaml: already exists; give another NAME"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(init, talks, pairs, tmp_path, arguments, code, words):
    import gzip

    (tmp_path / "gz.jsonl").write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n')[:-9])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "damaged" / name).write_text("{")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    got, out, err = init(*arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["there.yaml"], "nothing is written"


def test_the_list_has_every_recipe_with_its_command(init):
    code, out, _ = init("--list")
    assert code == 0
    for name in shipped_recipes():
        assert re.search(rf"^{re.escape(name)}$", out, re.MULTILINE)
    assert out.count("command   ") == out.count("hardware  ") == out.count("cost      ") == len(shipped_recipes())
    assert "nesso-tune train recipes/sft.yaml recipes/dpo.yaml" in out


class Data:
    """What `choose` reads of a detected source."""

    def __init__(self, rows, characters):
        self.rows, self.characters = rows, (characters,) * 100


def test_values_follow_the_size_of_data_and_base():
    small, large = (shape_of(known_config(base)) for base in (ZAGREUS, EIGHT))
    few, many = Data(300, 800), Data(2_000_000, 2000)
    assert choose_values("sft", [many], small).global_batch_size == 256
    assert choose_values("sft", [few], small).global_batch_size == 8
    assert choose_values("sft", [few], small).sequence_len < choose_values("sft", [many], small).sequence_len == 4096
    assert choose_values("sft", [Data(10**6, 60_000)], small).sequence_len == 4096, "never beyond the context"
    assert choose_values("sft", [Data(10**6, 60_000)], large).sequence_len == 16384
    assert choose_values("dpo", [Data(60_000, 3000)], small).sequence_len == 1024
    assert choose_values("dpo", [Data(60_000, 3000)], small).global_batch_size == 128
    assert choose_values("sft", [many], small).learning_rate == pytest.approx(1e-3, rel=0.05)
    assert choose_values("sft", [many], large).learning_rate == pytest.approx(1e-5, rel=0.05)
    assert choose_values("sft", [many], None).learning_rate == 2e-5
    assert choose_values("sft", [many], small).validation_size == 2000
    assert choose_values("sft", [few], small).validation_size == 0.1
    for method in ("sft", "dpo"):
        for data in (few, many, Data(1, 1), Data(10**9, 10)):
            for shape in (small, large, None):
                values = choose_values(method, [data], shape)
                assert values.global_batch_size.bit_count() == 1, "any usual number of GPUs divides it"
                assert 1e-8 < values.learning_rate <= 1e-3
