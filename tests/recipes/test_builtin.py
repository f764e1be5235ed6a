"""Paths: `~` once, for every key, flag and variable that is one; a shell's variables nowhere."""

from pathlib import Path

import pytest

from nesso_tune import RecipeError, RunEnvironmentError, SFTRecipe
from nesso_tune.cache import cache_root
from nesso_tune.data.privacy import source_name
from nesso_tune.planning.shapes import hub_cache
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import flag_path, path_keys
from nesso_tune.recipes.load import validate
from nesso_tune.recipes.schema import RECIPES
from nesso_tune.recipes.sections import ModelSection
from tests.support.recipe_texts import SFT, problem, with_value
from tests.support.runs import main_here

LISTS = ("reads", "files")
KEYS = sorted(path_keys(RECIPES["sft"]) | path_keys(RECIPES["dpo"]))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def document(key, value):
    """The small recipe with one path set, and what that needs beside it."""
    text = SFT.replace("path: rows.jsonl", "path: rows.jsonl\n      format: rd.py:f")
    if "validation_sources" in key:
        text += "  validation_sources: [{path: held.jsonl, format: rd.py:f}]\n"
    if key[-1] == "files":
        text += "  clean: {decontaminate: {files: [x]}}\n"
    return with_value(text, key, [value] if key[-1] in LISTS else value)


def value_of(recipe, key):
    node = recipe
    for part in key:
        node = getattr(node, part)
        node = node[0] if isinstance(node, tuple) else node
    return node


def test_these_keys_are_paths():
    assert {".".join(key) for key in KEYS} == {
        "output_dir", "model.base", "chat.template", "data.clean.decontaminate.files", "evaluation.gate",
        *(f"data.{s}.{key}" for s in ("sources", "validation_sources")
          for key in ("path", "format", "tools_file", "reads")),
    }  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_every_path_is_expanded_once_and_holds_no_variable(key, home):
    suffix = {"format": ".py:f", "template": ".yaml", "gate": ".yaml"}.get(key[-1], "")
    assert value_of(validate(document(key, f"~/a/b{suffix}")), key) == f"{home}/a/b{suffix}"
    for variable in ("$SCRATCH", "${SCRATCH}"):
        with pytest.raises(RecipeError) as error:
            validate(document(key, f"{variable}/b{suffix}"))
        assert (
            f"contains {variable}, but variables are not expanded in recipes; write the path itself, or let the shell"
            in str(error.value)
        )


def test_a_variable_is_named_with_its_line_and_what_works_instead():
    where = "r.yaml:2: `output_dir`"
    assert problem(SFT.replace("output_dir: out", "output_dir: $SCRATCH/run")) == (
        f"{where} contains $SCRATCH, but variables are not expanded in recipes; write the path itself, or "
        'let the shell expand it: --set output_dir="$SCRATCH/run"'
    )
    assert 'it: --set data.sources.0.path="${D}/x.jsonl"' in problem(SFT.replace("rows.jsonl", "${D}/x.jsonl"))


def test_the_text_of_a_cluster_keeps_its_variables():
    text = f"{SFT}cluster: {{modules: ['$M'], env: {{PRICE: '5 $ to $5'}}, container: a$b.sqsh}}\n"
    cluster = validate(with_value(text, ("seed",), 1)).cluster
    assert (cluster.modules, cluster.env["PRICE"], cluster.container.image) == (("$M",), "5 $ to $5", "a$b.sqsh")
    for value in ("$SCRATCH/tmp", "~/tmp", "${SCRATCH}/tmp", "/a:$PATH", "$(id -u)"):
        said = problem(f"{SFT}cluster: {{env: {{TMPDIR: '{value}'}}}}\n")
        assert f"`cluster.env.TMPDIR` {value} is not expanded; write the value, or export it in cluster.setup" in said
    said = problem(f"{SFT}cluster: {{container: {{image: a, mounts: ['/scratch/$USER']}}}}\n")
    assert "`cluster.container.mounts.0` /scratch/$USER is not expanded; write the path" in said
    for value in ("~/image.sqsh", {"image": "~/image.sqsh", "runtime": "apptainer"}):
        assert "~/image.sqsh is not expanded; write the path" in problem(f"{SFT}cluster: {{container: {value}}}\n")


def test_folders_of_nobody_are_refused_and_odd_names_are_names(home):
    assert "`output_dir` is ~nobody0/x, and there is no user `nobody0`; write the full path" in problem(
        SFT.replace("output_dir: out", "output_dir: ~nobody0/x")
    )
    for name in ("~draft.jsonl", "a~b/c.jsonl", "./~/x.jsonl", "cost$.jsonl", "a$5.jsonl", "org/name"):
        assert validate(with_value(SFT, ("data", "sources", "path"), name)).data.sources[0].path == name
    assert flag_path("~") == home


def test_in_python_and_on_the_command_line(recipe_file, home, capsys, monkeypatch):
    assert ModelSection(base="~/b").base == f"{home}/b"
    assert (
        SFTRecipe(output_dir="~/x", model={"base": "b"}, data={"sources": [{"path": "~/r"}]}).output_dir == f"{home}/x"
    )
    file = recipe_file()
    recipe = load_recipe("~/r.yaml", {"output_dir": "~/x", "data.sources.0.path": "~/d.jsonl"})
    assert (recipe.output_dir, recipe.data.sources[0].path) == (f"{home}/x", f"{home}/d.jsonl")
    code, _, said = main_here(capsys, "check", file, "--set", "output_dir=$SCRATCH/run")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("--set: `output_dir` contains $SCRATCH")
    code, _, said = main_here(capsys, "preview", "quickstart/sft", "--html=~nobody0/page.html")
    assert (code, said) == (2, "~nobody0/page.html: there is no user `nobody0`; write the full path\n")
    monkeypatch.chdir(home)
    assert main_here(capsys, "preview", "quickstart/sft", "-n", 1, "--html=~/pages/a.html")[0] == 0
    assert (Path(home) / "pages" / "a.html").is_file()
    assert not (Path(home) / "~").exists()


def test_a_share_and_a_metric_may_be_called_by_a_path(home):
    text = f"{SFT}    - path: b.jsonl\n  mixture: {{by: source, shares: {{~/a.jsonl: 0.5, b.jsonl: 0.5}}}}\n"
    text += "train: {best_metric: eval_loss/source/~/a.jsonl}\n"
    for key in ("path", "alias"):
        recipe = validate(with_value(text, ("data", "sources", key), "~/a.jsonl"))
        assert set(recipe.data.mixture.shares) == {f"{home}/a.jsonl", "b.jsonl"}
        assert recipe.train.best_metric == f"eval_loss/source/{source_name(recipe.data.sources[0])}"


def test_the_environment(home, monkeypatch):
    monkeypatch.setenv("NESSO_TUNE_CACHE", "~/cache")
    assert cache_root() == Path(home) / "cache"
    monkeypatch.setenv("NESSO_TUNE_CACHE", "cache")
    assert cache_root() == Path.cwd() / "cache"
    monkeypatch.setenv("NESSO_TUNE_CACHE", "$SCRATCH/cache")
    with pytest.raises(RunEnvironmentError, match=r"_CACHE: contains the unexpanded variable \$SCRATCH: \$SCR"):
        cache_root()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "~/$USER0/hf")
    monkeypatch.setenv("USER0", "me")
    assert hub_cache() == Path(home) / "me" / "hf" / "hub"
