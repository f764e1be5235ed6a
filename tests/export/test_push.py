"""Upload to a local stub of the hub: a dry run by default, exactly the listed files, nothing private."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from nesso_tune.export.push import plan_upload
from nesso_tune.export.weights import FinishedRun
from nesso_tune.hub import http_error
from nesso_tune.run import train
from tests.support.hub_stub import Hub
from tests.support.runs import main_here, recipe

CANARY = "segretissimo"
REPO = "mii-llm/nesso-prova"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    paths = [folder / "chats.jsonl", folder / f"{CANARY}.jsonl"]
    for path in paths:
        rows = [
            {"prompt": f"{path.stem}: quanto fa {i} + 1?", "response": f"Fa {i + 1}.", "lang": "it"} for i in range(12)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    private = {"path": str(paths[1]), "alias": f"{CANARY}-alias", "private": True}
    data = {"sources": [{"path": str(paths[0])}, private]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        card = {"license": "apache-2.0", "citation": "Rossi, 2026"}
        train(recipe("sft", folder / "run", [], data=data, evaluation=None, card=card))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield made
    made.close()


def pushed(capsys, run, *options):
    return main_here(capsys, "export", run, "--unchecked", "--push", "--repo", REPO, *options)


def test_a_dry_run_lists_what_the_upload_then_contains(run, hub, capsys):
    code, listed, said = pushed(capsys, run)
    assert code == 0, said
    assert (hub.requests, "nothing was uploaded" in said) == ([], True)
    assert listed.startswith(f"{REPO} (private: members of the organisation can read it), ")
    code, again, said = pushed(capsys, run, "--yes")
    assert code == 0, said
    assert again == listed
    repository = hub.repositories[REPO]
    sent = {name: content for name, content in repository["files"].items() if name != ".gitattributes"}
    assert sorted(sent) == [line.split()[-1] for line in listed.splitlines()[1:]]
    assert all(content == (run / "export" / "hf" / name).read_bytes() for name, content in sent.items())
    assert repository["private"] is True
    assert {token for *_, token in hub.requests if token} == {"Bearer hf_test"}
    (secret,) = (source.path for source in FinishedRun.open(run).recipe.data.sources if source.private)
    content = Path(secret).read_bytes()
    hashes = [hashlib.new(kind, content).hexdigest()[:12] for kind in ("sha256", "sha1", "md5")]
    words = [CANARY, *hashes, json.loads((run / "manifest.json").read_text())["data"]]
    for word in words:
        assert word not in repr(hub.requests)
        assert not [name for name, content in sent.items() if word.encode() in content], word


def test_an_interrupted_upload_continues(run, hub, capsys):
    hub.fail_at = "/commit/"
    code, _, said = pushed(capsys, run, "--yes")
    assert (code, "run the same command again to continue" in said) == (5, True), said
    assert sorted(hub.repositories[REPO]["files"]) == [".gitattributes"]
    hub.fail_at, before = None, len(hub.requests)
    code, _, said = pushed(capsys, run, "--yes")
    assert code == 0, said
    assert not [path for method, path, _ in hub.requests[before:] if method == "PUT"], "the weights were there"
    assert "model.safetensors" in hub.repositories[REPO]["files"]
    code, _, said = pushed(capsys, run, "--yes")
    assert code == 0, "the same model again"


def test_a_repository_of_another_model_stays(run, hub, capsys):
    hub.repositories[REPO] = {"private": True, "files": {"config.json": b"{}"}}
    code, _, said = pushed(capsys, run, "--yes")
    assert (code, "exists and has another config.json; choose another name" in said) == (5, True), said
    assert hub.repositories[REPO]["files"] == {"config.json": b"{}"}
    hub.repositories[REPO]["files"] = {}
    code, _, said = pushed(capsys, run, "--yes", "--public")
    assert (code, "exists and is private" in said) == (5, True), said


def test_options_and_token(run, hub, capsys, monkeypatch):
    code, _, said = main_here(capsys, "export", run, "--public")
    assert (code, "--public: has no effect without --push" in said) == (2, True)
    code, _, said = main_here(capsys, "export", run, "--push")
    assert (code, "add --repo ORG/NAME" in said) == (2, True)
    code, _, said = main_here(capsys, "export", run, "--unchecked", "--push", "--repo", "a/b/c")
    assert (code, "is not a repository name; write ORG/NAME" in said) == (2, True)
    monkeypatch.delenv("HF_TOKEN")
    code, _, said = pushed(capsys, run, "--yes")
    assert (code, "HF_TOKEN is not set" in said) == (5, True)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_test\n", " hf_test\r\n"])
def test_line_breaks_around_a_token_are_no_part_of_it(run, hub, capsys, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, said = pushed(capsys, run, "--yes")
    assert code == 0, said
    assert {sent for *_, sent in hub.requests if sent} == {"Bearer hf_test"}


@pytest.mark.parametrize("token", ["hf_sec\nret", "hf_secrèt", "hf_sec ret"])
def test_a_malformed_token_is_not_printed(run, hub, capsys, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, said = pushed(capsys, run, "--yes")
    assert (code, "HF_TOKEN has characters that no token has; copy the token" in said) == (5, True), said
    assert "hf_sec" not in said
    assert hub.requests == []


def test_an_error_of_the_connection_is_no_bug(run, hub, capsys, monkeypatch):
    """The HTTP library under huggingface_hub has errors that are no OSError."""

    def refused(*_, **__):
        raise http_error()("Connection refused")

    monkeypatch.setattr(HfApi, "list_repo_tree", refused)
    code, _, said = pushed(capsys, run, "--yes")
    assert (code, "the upload failed (" in said) == (5, True), said
    assert "run the same command again" in said


@pytest.mark.parametrize("repo", ["bad", "a/b/c", "a/", "/b", "mii-llm/è", "mii-llm/a--b", "mii-llm/.a", "a/b.git"])
def test_a_malformed_repository_name_is_refused_before_an_export(run, hub, capsys, repo):
    (run / "export" / "hf").mkdir(parents=True)
    (run / "export" / "hf" / ".nesso-export").touch()
    code, _, said = main_here(capsys, "export", run, "--unchecked", "--push", "--repo", repo)
    assert (code, f"--repo: {repo} is not a repository name" in said) == (2, True), said
    assert [file.name for file in (run / "export" / "hf").iterdir()] == [".nesso-export"]


def test_placeholders_are_listed_after_the_files_and_refuse_the_upload(run, hub, capsys):
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        text.replace("Rossi, 2026", "null").replace("license: apache-2.0", "license: null")
    )
    missing = [f"README.md: the {what} is missing; set card.{key} in recipe.yaml of the run and export it again"
               for what, key in (("licence", "license"), ("citation", "citation"))]  # fmt: skip
    code, listed, said = pushed(capsys, run)
    assert (code, "nothing was uploaded: complete the above first" in said) == (0, True), said
    assert listed.splitlines()[-2:] == missing
    assert "model.safetensors" in listed
    before = (run / "export" / "hf" / "model.safetensors").stat().st_ino
    code, listed, said = pushed(capsys, run, "--yes")
    assert (code, listed) == (2, ""), said
    assert all(line in said for line in missing), said
    assert (run / "export" / "hf" / "model.safetensors").stat().st_ino == before, "refused before the export"
    assert hub.requests == []


def test_an_alias_in_the_card_section_is_refused(run, capsys):
    text = (run / "recipe.yaml").read_text()
    assert "Rossi, 2026" in text
    for citation in (f"Rossi, {CANARY}-alias", f'"Rossi:\\n{CANARY}-alias"', f'"Rossi:\\n\\t{CANARY}-alias"'):
        (run / "recipe.yaml").write_text(text.replace("Rossi, 2026", citation))
        code, _, said = pushed(capsys, run)
        assert (code, "names a private source" in said) == (4, True), said
    assert not (run / "export").exists(), "nothing is exported first"


def test_the_name_of_a_private_folder_may_be_a_word(run, capsys):
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"path: .*segretissimo.jsonl", "path: private/chat", text))
    assert "path: private/chat" in (run / "recipe.yaml").read_text()
    code, _, said = pushed(capsys, run)
    assert code == 0, said
    (run / "recipe.yaml").write_text(text.replace("Rossi, 2026", "Rossi, private/chat"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"path: .*segretissimo.jsonl", "path: private/chat", text))
    code, _, said = pushed(capsys, run)
    assert (code, "names a private source" in said) == (4, True), said


@pytest.mark.parametrize(("name", "content", "code", "message"), [
    ("optimizer.safetensors", "x", 4, "is not a file of a model"),
    ("metrics.jsonl", "x", 4, "is not a file of a model"),
    ("README.md", f"Trained on {CANARY}.jsonl.", 4, "names a private source"),
    ("chat_template.jinja", f"{{# {CANARY}.jsonl #}}", 4, "names a private source"),
])  # fmt: skip
def test_what_is_refused(run, tmp_path, name, content, code, message):
    from nesso_tune.errors import NessoError

    folder = tmp_path / "out"
    shutil.copytree(run / "final", folder)
    finished = FinishedRun.open(run)
    assert plan_upload(finished, folder, REPO, public=True).lines()[0].startswith(f"{REPO} (public: everybody")
    (folder / name).write_text(content)
    with pytest.raises(NessoError, match=message) as refused:
        plan_upload(finished, folder, REPO, public=True)
    assert refused.value.exit_code == code
