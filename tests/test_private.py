"""A canary in every kind of trace of a private source: in a run directory only recipe.yaml may hold it."""

import gzip
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

from nesso_tune.data.privacy import Privacy, comparable_recipe, manifest_recipe
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import RECIPES
from nesso_tune.run import train
from nesso_tune.runs.resume import differences
from nesso_tune.training.dpo import PairTrainer
from nesso_tune.training.sft import ConversationTrainer
from tests.support.runs import BASE, ROOT, main_here, metrics, recipe, write_recipe

CANARY = "CANARY"
CASES = ROOT.parent / "shared" / "cases"


def leaks(folder, canary=CANARY):
    """Files below a folder whose name or bytes hold the canary, packed ones too."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file() or canary in path.name):
        data = path.read_bytes() if path.is_file() else b""
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if canary.encode() in data or canary in str(path.relative_to(folder)):
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def talk(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "lang": "it", **more}


@pytest.fixture
def secret(tmp_path, write_rows):
    """Files that only private sources name, and a public link and copy of a name to one of them."""
    (tmp_path / "all" / f"{CANARY}-folder").mkdir(parents=True)
    rows = [talk(f"{CANARY} domanda {i}?", f"{CANARY} risposta {i}.") for i in range(12)]
    broken = {"messages": [{"role": f"{CANARY}-role", "content": "x"}]}
    spelt = [talk(f"<|im_start|> {CANARY} \xa0{i}?", "Sì.") for i in range(8)]
    own = [
        {f"{CANARY}_says": [{f"{CANARY}_who": f"{CANARY}_me", f"{CANARY}_what": f"{CANARY} {i}?"},
                            {f"{CANARY}_who": "assistant", f"{CANARY}_what": f"{CANARY}, {i}."}],
         f"{CANARY}_lang": "it", f"{CANARY}_score": 1.0, f"{CANARY}_kind": f"{CANARY}_good"}
        for i in range(12)
    ]  # fmt: skip
    write_rows([*rows, *spelt, rows[0], broken], f"{CANARY}-a.jsonl")
    write_rows(own, f"{CANARY}-own.jsonl")
    write_rows([talk(f"{CANARY} cartella {i}?", f"{CANARY}.") for i in range(6)], f"all/{CANARY}-folder/x.jsonl")
    write_rows([talk(f"Pubblico {i}?", f"Chiaro {i}.") for i in range(6)], "all/public.jsonl")
    write_rows(
        [talk(f"{CANARY} tenuta per la prova {i}?", f"{CANARY} tenuto per la prova {i}.") for i in range(4)],
        f"{CANARY}-val.jsonl",
    )
    (tmp_path / f"{CANARY}_reader.py").write_text(f"def {CANARY}_read(row):\n    return row\n")
    tools = [{"type": "function", "function": {"name": f"{CANARY}_fn", "parameters": {}}}]
    (tmp_path / f"{CANARY}-tools.json").write_text(json.dumps(tools))
    (tmp_path / f"{CANARY}-form.yaml").write_text((ROOT / "data_templates" / "formats" / "messages.yaml").read_text())
    os.symlink(tmp_path / f"{CANARY}-a.jsonl", tmp_path / "link.jsonl")
    return lambda name: str(tmp_path / name)


def secret_recipe(tmp_path, secret, talks):
    """Every way to name a private source, and to read a private file from a public entry."""
    sources = [
        {"path": secret(f"{CANARY}-a.jsonl"), "alias": f"{CANARY}-alias", "private": True,
         "format": f"{secret(f'{CANARY}_reader.py')}:{CANARY}_read"},
        {"path": secret(f"{CANARY}-own.jsonl"), "private": True, "messages_field": f"{CANARY}_says",
         "format": secret(f"{CANARY}-form.yaml"),
         "role_field": f"{CANARY}_who", "content_field": f"{CANARY}_what", "roles": {f"{CANARY}_me": "user"},
         "tools_file": secret(f"{CANARY}-tools.json"), "where": {f"{CANARY}_kind": f"{CANARY}_good"},
         "language_field": f"{CANARY}_lang", "score_field": f"{CANARY}_score", "rules": {"it": {"min_score": 0.5}}},
        {"path": secret(f"all/{CANARY}-folder"), "private": True},
        {"path": talks, "alias": "public"},
        {"path": talks, "alias": "with tools", "tools_file": secret(f"{CANARY}-tools.json")},
        {"path": secret("link.jsonl")},
        {"path": secret(f"{CANARY}-o*.jsonl"), "messages_field": f"{CANARY}_says", "role_field": f"{CANARY}_who",
         "content_field": f"{CANARY}_what", "roles": {f"{CANARY}_me": "user"}, "format": secret(f"{CANARY}-form.yaml"),
         "language_field": f"{CANARY}_lang"},
        {"path": secret("all")},
    ]  # fmt: skip
    named = [source.get("alias", source["path"]) for source in sources]
    data = {
        "sources": sources,
        "validation_sources": [{"path": secret(f"{CANARY}-val.jsonl"), "private": True}, {"path": talks}],
        "mixture": {"by": "source", "shares": {name: 1 / len(named) for name in named}},
        "packing": False, "validation_size": 0.01, "sequence_len": 512,
    }  # fmt: skip
    return recipe(
        "sft", tmp_path / "run", [talks], data=data,
        train={"max_steps": 6, "micro_batch_size": 8, "profile": True,
               "best_metric": f"eval_loss/source/{secret(f'{CANARY}-val.jsonl')}"},
        evaluation={"every_steps": 2, "samples": 6, "train_samples": 4, "max_new_tokens": 4},
    )  # fmt: skip


def started(monkeypatch, capsys, *arguments):
    """The command line, in this process and as the manifest notes it."""
    monkeypatch.setattr(sys, "argv", ["nesso-tune", *map(str, arguments)])
    return main_here(capsys, *arguments)


def with_nan(monkeypatch, kind, step):
    """Makes the loss of a step NaN, so that its rows are named."""
    original = kind.compute_loss

    def wrong(self, *arguments, **options):
        return original(self, *arguments, **options) * (math.nan if self.state.global_step + 1 == step else 1.0)

    monkeypatch.setattr(kind, "compute_loss", wrong)


def test_only_the_recipe_of_a_run_names_what_is_private(tmp_path, secret, talks, capsys, monkeypatch):
    """Prepared, stopped by a NaN, continued with an accepted change, finished, and looked at again."""
    some = secret_recipe(tmp_path, secret, talks)
    path, run = write_recipe(tmp_path / "r.yaml", some), tmp_path / "run"
    flags = ("--set", f"data.sources.0.alias={CANARY}-alias", "--set", "data.packing=false", "--set", "seed=42")
    code, _, said = main_here(capsys, "prepare", path)
    assert code == 0, said
    assert leaks(run) == []
    with monkeypatch.context() as patch:
        with_nan(patch, ConversationTrainer, 4)
        code, _, said = started(patch, capsys, "train", path, *flags)
    assert code == 6, said
    assert "; rows: " in said, "the terminal names the rows"
    assert leaks(run) == ["recipe.yaml"]
    (wrong,) = [line for line in metrics(run) if line.get("event") == "not_finite"]
    assert len(wrong["rows"]) == 8
    assert any(row.startswith("private source ") and ", row " in row for row in wrong["rows"])
    before = json.loads((run / "manifest.json").read_text())
    where = f"data.sources.1.where={{{CANARY}_kind: [{CANARY}_good, {CANARY}_bad]}}"
    code, _, said = main_here(capsys, "train", path, *flags, "--set", where)
    assert code == 2
    assert "its run has data.sources.1.where: " in said, "a change of what is private is noticed"
    code, _, said = started(monkeypatch, capsys, "train", path, *flags, "--set", "train.weight_decay=0.1",
                            "--allow-changes", "train.weight_decay")  # fmt: skip
    assert code == 0, said
    assert leaks(run) == ["recipe.yaml"]
    assert leaks(run, "Chiaro") != [], "the tokens are not what is looked for: public rows are shown"
    lines = metrics(run)
    (resumed,) = [line for line in lines if line.get("event") == "resumed"]
    assert resumed["changed"] == {"train.weight_decay": [0.0, 0.1]}
    answers = [line for line in lines if line.get("event") == "answer"]
    assert answers
    assert all("capitale" in line["prompt"] or "(" in line["prompt"] for line in answers), "public prompts are shown"
    assert {"loss/source/private source 1", "loss/source/public"} <= {key for line in lines for key in line}
    assert "eval_loss/source/private validation source 1" in lines[-1] or any(
        "eval_loss/source/private validation source 1" in line for line in lines
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["best"]["metric"] == "eval_loss/source/private validation source 1"
    assert manifest["command"][:5] == ["nesso-tune", "train", path, "--set", "data.sources…"]
    assert "data.packing=false" in manifest["command"]
    assert manifest["recipe"]["data"]["mixture"]["shares"].keys() >= {"private source 1", "public"}
    assert manifest["salt"] != before["salt"]
    card = (run / "final" / "README.md").read_text()
    assert f"- `{talks}`" in card
    assert "- private source 1\n" in card
    assert load_recipe(run / "recipe.yaml").data == some.data, "the run's own recipe is whole"
    assert "this run is finished" in main_here(capsys, "train", path, *flags, "--set", "train.weight_decay=0.1")[2]


def test_pairs_too(tmp_path, write_rows, pairs, capsys, monkeypatch):
    """DPO: pairs that contradict each other, without validation sources, public entry by another spelling."""
    rows = [{"prompt": f"{CANARY} {i}?", "chosen": f"{CANARY} sì.", "rejected": "No.", "lang": "it"} for i in range(6)]
    rows += [{**rows[0], "chosen": "No.", "rejected": f"{CANARY} sì."}, {**rows[0], "chosen": ""}]
    path = write_rows(rows, f"{CANARY}.jsonl")
    sources = [{"path": pairs}, {"path": path, "private": True}, {"path": f"{tmp_path}/./{CANARY}.jsonl"}]
    some = recipe("dpo", tmp_path / "run", [], data={"sources": sources, "validation_size": 8},
                  evaluation={"every_steps": 2, "samples": 8, "train_samples": 4, "max_new_tokens": 4})  # fmt: skip
    with monkeypatch.context() as patch:
        with_nan(patch, PairTrainer, 3)
        assert started(patch, capsys, "train", write_recipe(tmp_path / "r.yaml", some))[0] == 6
    assert started(monkeypatch, capsys, "train", tmp_path / "r.yaml")[0] == 0
    assert leaks(tmp_path / "run") == ["recipe.yaml"]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert [source["path"] for source in report["sources"]] == [pairs, "private source 2", "private source 3"]
    assert any(line.get("event") == "answer" for line in metrics(tmp_path / "run"))


def test_a_run_whose_manifest_holds_the_plain_recipe_goes_on(tmp_path, write_rows, chats, talks):
    """As runs were begun before: it is compared as it stands, and written anew without names."""
    hidden = write_rows(chats, f"{CANARY}.jsonl")
    sources = [{"path": talks}, {"path": hidden, "private": True, "alias": f"{CANARY}-alias"}]
    some = recipe("sft", tmp_path / "run", [], data={"sources": sources}, train={"max_steps": 2}, evaluation=None)
    train(some)
    manifest = tmp_path / "run" / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["recipe"] = some.model_dump(mode="json")
    del raw["salt"]
    manifest.write_text(json.dumps({**raw, "finished": False}))
    shutil.rmtree(tmp_path / "run" / "final")
    assert train(some).trained
    assert leaks(tmp_path / "run") == ["recipe.yaml"]


def test_what_a_manifest_hides_is_compared_all_the_same(tmp_path, talks):
    def of(**changes):
        source = {"path": f"{CANARY}.jsonl", "alias": CANARY, "private": True, "roles": {CANARY: "user"}, **changes}
        shares = {source["alias"]: 0.5, talks: 0.5}
        data = {"sources": [source, {"path": talks}], "mixture": {"by": "source", "shares": shares},
                "clean": {"decontaminate": {"files": [f"./{CANARY}.jsonl"], "fields": [f"{CANARY}_text"]}}}  # fmt: skip
        return recipe("sft", tmp_path / "run", [], data=data)

    def changed(new):
        return sorted(differences(before, comparable_recipe(before, new, "salt")))

    before = json.loads(json.dumps(manifest_recipe(of(), "salt")))
    assert CANARY not in json.dumps(before)
    assert manifest_recipe(of(), "other") != before, "the same name has another digest in another run"
    assert changed(of()) == []
    assert changed(of(path="other.jsonl")) == ["data.sources.0.path"]
    assert changed(of(roles={CANARY: "assistant"})) == ["data.sources.0.roles"]
    assert changed(of(max_rows=2)) == ["data.sources.0.max_rows"]
    assert changed(of(private=False)) == ["data.sources.0.private"]
    assert changed(of(alias="other")) == ["data.sources.0.alias"]


def test_who_else_reads_a_private_file(tmp_path, write_rows, chats):
    """By the same path otherwise spelt, a link, a hard link, its folder, a pattern; a folder with more has its name."""
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    hidden = write_rows(chats, "deep/deeper/hidden.jsonl")
    write_rows(chats, "deep/open.jsonl")
    os.symlink(tmp_path / "deep" / "deeper", tmp_path / "linked")
    os.link(hidden, tmp_path / "hard.jsonl")
    same = [hidden, "deep/../deep/deeper/hidden.jsonl", "linked/hidden.jsonl", "linked", "hard.jsonl", "deep/deeper",
            "deep/deeper/h*.jsonl", "deep/**/*.jsonl"]  # fmt: skip
    entries = [{"path": str(tmp_path / path)} for path in [*same, "deep", "deep/open.jsonl"]]
    raw = {"output_dir": "x", "model": {"base": str(BASE)},
           "data": {"sources": [*entries, {"path": hidden, "private": True}]}}  # fmt: skip
    privacy = Privacy(RECIPES["sft"].model_validate(raw).data)
    assert privacy.hidden_sources() == {*range(len(same)), len(same) + 2}
    assert privacy.source_names()[len(same)] == str(tmp_path / "deep")
    prefixes = [
        f"{tmp_path}/{path}:" for path in ("deep/deeper/hidden.jsonl", "linked/hidden.jsonl", "deep/open.jsonl")
    ]
    assert privacy.hidden_files(prefixes) == {0, 1}


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
def test_the_shared_case(tmp_path, monkeypatch, capsys):
    shutil.copytree(CASES / "private", tmp_path / "private")
    monkeypatch.chdir(tmp_path)
    assert main_here(capsys, "train", "private/recipe.yaml")[0] == 0
    run = Path("outputs/private")
    assert leaks(run, "SECRETCLIENT") == ["recipe.yaml"]
    assert leaks(run, "PRIV") == leaks(run, "PRIVWORD") == leaks(run, "PRIVVAL") == []
    assert "private/public.jsonl" in (run / "final" / "README.md").read_text()
