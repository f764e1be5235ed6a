"""The model card: every value comes from a file of the model folder, and the chain of training travels with it."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from nesso_tune.errors import RecipeError
from nesso_tune.evaluation.records import MetricRecord, SuiteRecord
from nesso_tune.export.card import CONFIG, MODEL_FIELDS, STAGE_FIELDS, find, model_card, placeholders
from nesso_tune.export.publish import keep_results
from nesso_tune.export.stages import PROVENANCE, read_stages
from nesso_tune.recipes import load_recipe
from nesso_tune.run import train
from tests.support.runs import main_here, recipe, write_recipe


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of SFT with a private source, and DPO of a copy of its `final/`, which is all that is left of the SFT."""
    folder = tmp_path_factory.mktemp("chain")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    chats = [{"prompt": f"Quanto fa {i} + 1?", "response": f"Fa {i + 1}.", "lang": "it"} for i in range(12)]
    pairs = [{"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "No idea.", "lang": "en"}
             for i in range(12)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        secret = write("segretissimo.jsonl", [{**row, "prompt": "Segreto: " + row["prompt"]} for row in chats])
        sources = [write("chats.jsonl", chats), {"path": secret, "private": True, "alias": "nascosto"}]
        data = {"sources": [{"path": sources[0]}, sources[1]]}
        sft = train(recipe("sft", folder / "one" / "sft", [], data=data)).model_dir
        shutil.copytree(sft, folder / "elsewhere" / "final")
        shutil.rmtree(folder / "one")
        model = {"base": str(folder / "elsewhere" / "final"), "random_init": False}
        train(recipe("dpo", folder / "dpo", [write("pairs.jsonl", pairs)], model=model))
    return folder


def changed(value):
    return value + 7 if isinstance(value, (int, float)) else "Changed-value"


def copy_of(final, tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    for name in (PROVENANCE, CONFIG):
        shutil.copyfile(final / name, folder / name)
    return folder


def with_value(folder, name, key, value):
    raw = json.loads((folder / name).read_text())
    *path, last = key.split(".")
    place = find(raw, ".".join(path)) if path else raw
    place[int(last) if isinstance(place, list) else last] = value
    (folder / name).write_text(json.dumps(raw))


def test_the_card_changes_with_each_of_its_sources(chain, tmp_path):
    final = chain / "dpo" / "final"
    assert (final / "README.md").read_text(encoding="utf-8") == model_card(final)
    fields = [(field.file, field.key, field.format) for field in MODEL_FIELDS]
    fields += [(PROVENANCE, f"stages.{i}.{field.key}", field.format) for i in range(2) for field in STAGE_FIELDS]
    known = [one for one in fields if find(json.loads((final / one[0]).read_text()), one[1]) not in (None, "")]
    assert len(known) >= len(fields) - 2, "a base without commit"
    more = ["stages.1.hyperparameters.dpo\\.beta", "stages.0.sources.0.rows", "stages.0.languages.it",
            "stages.1.metrics.eval_loss", "stages.0.name", "stages.1.card.name"]  # fmt: skip
    folder = copy_of(final, tmp_path)
    for file, key, form in [*known, *((PROVENANCE, key, None) for key in more)]:
        before, text = (folder / file).read_text(), model_card(folder)
        if "\\." in key:
            raw = json.loads(before)
            raw["stages"][1]["hyperparameters"]["dpo.beta"] = 123.5
            (folder / file).write_text(json.dumps(raw))
            shown = "123.5"
        else:
            value = changed(find(json.loads(before), key))
            with_value(folder, file, key, value)
            shown = str(value) if form is None or isinstance(value, str) else f"{value:{form}}"
        after = model_card(folder)
        assert after != text, key
        assert shown in after or form is None, key
        (folder / file).write_text(before)
    assert model_card(folder) == text


def test_the_chain_and_the_data_of_both_stages(chain):
    card = (chain / "dpo" / "final" / "README.md").read_text(encoding="utf-8")
    stages = read_stages(chain / "dpo" / "final")
    assert [stage.method for stage in stages] == ["sft", "dpo"]
    assert f"random weights of the shape {stages[0].base} → SFT (sft) → DPO (dpo)" in card
    assert f"{chain}/chats.jsonl`: 10 rows" in card or f"{chain}/chats.jsonl`: 12 rows" in card
    assert f"{chain}/pairs.jsonl" in card
    assert "\n- private source 2\n" in card
    assert "- en\n- it" in card or "- it\n- en" in card
    for file in (chain / "dpo" / "final").iterdir():
        content = file.read_bytes()
        assert not [word for word in (b"segretissimo", b"nascosto", b"Segreto") if word in content], file.name


OWN_CARD = """card: {name: Nesso prova, license: apache-2.0, citation: 'Rossi, 2026', acknowledgements: Grazie,
  text: 'Riga una.

  Riga due.'}
"""


def complete_recipe(run):
    """Writes a card section into the recipe.yaml of a run."""
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^card:\n(  .*\n)+", lambda _: OWN_CARD, text))


def test_what_is_unknown_is_a_placeholder_until_the_recipe_says_it(chain, tmp_path, capsys):
    run = tmp_path / "dpo"
    shutil.copytree(chain / "dpo", run)
    assert placeholders((run / "final" / "README.md").read_text()) == [
        ("the licence", "set card.license in recipe.yaml of the run and run `nesso-tune card RUN`"),
        ("the citation", "set card.citation in recipe.yaml of the run and run `nesso-tune card RUN`"),
    ]
    code, _, said = main_here(capsys, "export", run, "--unchecked", "-o", tmp_path / "before")
    assert code == 0, said
    asks = ("the licence", "set card.license in recipe.yaml of the run and export it again")
    assert placeholders((tmp_path / "before" / "README.md").read_text())[0] == asks
    complete_recipe(run)
    code, _, said = main_here(capsys, "export", run, "--unchecked", "-o", tmp_path / "out")
    assert code == 0, said
    card = (tmp_path / "out" / "README.md").read_text()
    assert placeholders(card) == []
    assert card.startswith("---\nlanguage:\n")
    for part in (
        "license: apache-2.0",
        "# Nesso prova",
        "Rossi, 2026",
        "Grazie",
        "Not checked: the answers of this export",
    ):
        assert part in card
    assert [stage.name for stage in read_stages(tmp_path / "out")] == ["sft", "dpo"]


def front_matter(folder):
    """The metadata of a card as the hub reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_words_that_yaml_reads_otherwise_are_quoted(chain, tmp_path):
    folder = copy_of(chain / "dpo" / "final", tmp_path)
    with_value(folder, PROVENANCE, "stages.0.languages", {"no": 7, "it": 5})
    for name in ("no", "1.0", "mit"):
        with_value(folder, PROVENANCE, "stages.1.card.license", name)
        (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
        assert front_matter(folder)["license"] == name
        assert {"no", "it"} <= set(front_matter(folder)["language"])


def test_the_card_of_an_average_names_the_data_of_every_model(chain, run, tmp_path, capsys):
    """Also of one that is not among the stages of the run."""
    shutil.copytree(run, tmp_path / "other")
    with_value(tmp_path / "other" / "final", PROVENANCE, "stages.1.languages", {"fr": 9})
    with_value(tmp_path / "other" / "final", PROVENANCE, "stages.1.name", "un-altro")
    average = f"final,{tmp_path / 'other'}"
    code, _, said = main_here(capsys, "export", run, "--unchecked", "--average", average, "-o", tmp_path / "out")
    assert code == 0, said
    assert {"it", "en", "fr"} <= set(front_matter(tmp_path / "out")["language"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3. DPO: un-altro (another model of the mean)" in card
    assert card.count("(another model of the mean)") == 1, "both have the same SFT"


def test_a_source_that_is_private_in_the_run_is_hidden_in_other_models_of_an_average(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "other")
    with_value(tmp_path / "other" / "final", PROVENANCE, "stages.1.name", "un-altro")
    text = (run / "recipe.yaml").read_text()
    private = re.sub(r"private: false", "private: true", text)
    assert private != text
    (run / "recipe.yaml").write_text(re.sub(r"alias: null", "alias: nascosto", private))
    average = f"final,{tmp_path / 'other'}"
    code, _, said = main_here(capsys, "export", run, "--unchecked", "--average", average, "-o", tmp_path / "out")
    assert code == 0, said
    (others,) = json.loads((tmp_path / "out" / PROVENANCE).read_text())["export"]["others"][-1:]
    assert others["name"] == "un-altro"
    assert [source["name"] for source in others["sources"]] == ["private source"]


def test_a_bracket_in_the_text_of_the_author_ends_no_line(chain):
    (found,) = placeholders("See [placeholder: foo bar\n\n## Model\n]")
    assert found[0] == "foo bar"


@pytest.mark.parametrize(("key", "value", "message"), [
    ("name", "a: b\n---", "must be one line of text, not"),
    ("license", "Apache 2.0", "must be a licence as the hub names it, in lower case, e.g. apache-2.0, not"),
])  # fmt: skip
def test_the_form_of_keys_of_the_card_is_said_in_words(chain, key, value, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(chain / "dpo" / "recipe.yaml", {f"card.{key}": value})


@pytest.fixture
def run(chain, tmp_path, monkeypatch):
    """A copy of the DPO run."""
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(chain / "cache"))
    shutil.copytree(chain / "dpo", tmp_path / "run")
    return tmp_path / "run"


def test_card_writes_the_section_of_the_recipe_and_the_results(run, capsys):
    complete_recipe(run)
    keep_results(run / "final", [SuiteRecord("mine", "My suite", [], [MetricRecord("right", 0.5, None, {})])])
    code, out, said = main_here(capsys, "card", run)
    assert (code, out) == (0, f"card  {run}/final/README.md\n"), said
    card = (run / "final" / "README.md").read_text()
    for part in ("# Nesso prova", "license: apache-2.0", "Riga una.\nRiga due.", "My suite", "| right | 0.5000 |"):
        assert part in card
    assert placeholders(card) == []
    assert read_stages(run / "final")[-1].card["name"] == "Nesso prova", "it travels with the model"
    assert card == model_card(run / "final")
    code, _, said = main_here(capsys, "export", run, "--unchecked", "-o", run.parent / "out")
    assert code == 0, said
    code, _, said = main_here(capsys, "train", run / "recipe.yaml", "--set", f"output_dir={run}")
    assert (code, "this run is finished" in said) == (0, True), said
    assert main_here(capsys, "card", run / "final")[0] == 0, "the same again"


def test_card_keeps_a_card_that_was_edited(run, capsys):
    card = run / "final" / "README.md"
    card.write_text("# Mine\n")
    code, _, said = main_here(capsys, "card", run)
    assert (code, "was edited, or files" in said) == (5, True), said
    assert card.read_text() == "# Mine\n"
    assert main_here(capsys, "card", run, "--overwrite")[0] == 0
    assert card.read_text() == model_card(run / "final")


def test_card_that_was_interrupted_can_be_run_again(run, capsys, monkeypatch):
    complete_recipe(run)
    with monkeypatch.context() as patch:
        patch.setattr("nesso_tune.export.card.write_stages", lambda *_: 1 / 0)
        assert main_here(capsys, "card", run)[0] == 1
    assert read_stages(run / "final")[-1].card["name"] is None
    assert main_here(capsys, "card", run)[0] == 0
    assert read_stages(run / "final")[-1].card["name"] == "Nesso prova"


def test_folders_without_a_card_to_write(run, capsys, tmp_path):
    def error(folder):
        code, _, said = main_here(capsys, "card", folder)
        assert code == 5
        return said

    assert "is not a run directory; name the output_dir" in error(tmp_path / "absent")
    shutil.copytree(run / "final", tmp_path / "out")
    assert f"{tmp_path}/out: is a model folder, not a run; name the run" in error(tmp_path / "out")
    (run / "final" / PROVENANCE).unlink()
    assert "has no readable provenance.json, from which cards are made; edit README.md by hand" in error(run)
    (run / "final").rename(run / "candidate")
    assert "has no final/: the run is not finished" in error(run), "killed before the verdict of its gate"
    (run / "candidate" / "evaluations").mkdir()
    (run / "candidate" / "evaluations" / "not-worse.gate.json").touch()
    assert "has no final/: its gate refused the model" in error(run)
    (run / "candidate").rename(run / "elsewhere")
    assert "has no final/: the run is not finished; finish it with the same `nesso-tune train`" in error(run)


def test_the_code_in_the_card_runs(chain, monkeypatch, capsys):
    final = chain / "dpo" / "final"
    (code,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(final)
    found = {}
    exec(code, found)
    answer = found["output"][0][found["inputs"]["input_ids"].shape[1] :]
    assert len(answer) > 0
    assert capsys.readouterr().out == found["tokenizer"].decode(answer, skip_special_tokens=True) + "\n"


def test_another_card_is_not_another_run(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(chain / "cache"))
    known = load_recipe(chain / "dpo" / "recipe.yaml", {"card.license": "mit"})
    code, _, said = main_here(capsys, "train", write_recipe(tmp_path / "dpo.yaml", known))
    assert (code, "this run is finished" in said) == (0, True), said


def test_a_source_that_a_later_stage_calls_private_is_hidden(chain, tmp_path):
    from nesso_tune.export.stages import without_private

    stages = read_stages(chain / "dpo" / "final")
    later = load_recipe(chain / "dpo" / "recipe.yaml")
    assert without_private(stages, later) == stages
    private = {"path": str(chain / "chats.jsonl"), "private": True}
    later = later.model_copy(update={"data": later.data.model_validate({"sources": [private]})})
    assert "chats" not in repr([stage.sources for stage in without_private(stages, later)])


def test_a_damaged_provenance_file_is_reported(chain, tmp_path, caplog):
    folder = copy_of(chain / "dpo" / "final", tmp_path)
    (folder / PROVENANCE).write_text('{"stages": [{"method": "sft"}]}')
    assert read_stages(folder) == []
    assert "earlier stages of this model will be missing" in caplog.text
