"""The first hour with one's own files: init, check, preview, a smoke run, a word with the result. Nothing is edited."""

import json

import pytest

from nesso_tune.recipes import load_recipe
from tests.data.test_real import shared
from tests.support.runs import main_here, thorough


@pytest.fixture
def user(tmp_path, monkeypatch, capsys):
    """An empty folder, a hub that cannot be reached, and the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*arguments):
        code, out, err = main_here(capsys, *arguments)
        assert code == 0, err
        return out, err

    return run


def part_of(name, prefix, path):
    """The rows of a shared file that come from one source, as a file of one's own."""
    with open(shared(name), encoding="utf-8") as stream:
        rows = [line for line in stream if json.loads(line).get("_source", "").startswith(prefix)]
    path.write_text("".join(rows), encoding="utf-8")
    return path.name


FILES = {
    "conversations": ("bench/sft.jsonl", "", {"method": "sft", "format": "messages", "language": None}),
    "pairs": ("data/pref_en.jsonl", "llamafactory", {"method": "dpo", "format": "preference", "language": "en"}),
    "tools": ("data/toolcall.jsonl", "glaive", {"method": "sft", "format": "sharegpt", "language": "en"}),
}


# each kind of file with a base that is here; by hand also with a base on the hub
@pytest.mark.parametrize(
    ("name", "prefix", "expected", "own_base"),
    [
        pytest.param(*file, own, id=f"{kind}-{'a base here' if own else 'a base on the hub'}",
                     marks=() if own else thorough)
        for kind, file in FILES.items() for own in (True, False)
    ],
)  # fmt: skip
def test_from_a_file_to_a_chat(user, tmp_path, whole_base, name, prefix, expected, own_base):
    data = part_of(name, prefix, tmp_path / "mine.jsonl")
    base = whole_base if own_base else "mii-llm/zagreus-0.4B-ita"
    out, _ = user("init", "mine", "--base", base, "--data", data)
    source = load_recipe("mine.yaml").data.sources[0]
    assert load_recipe("mine.yaml").method == expected["method"]
    assert (source.format, source.language) == (expected["format"], expected["language"])
    for step in ("check", "preview", "train"):
        assert f"nesso-tune {step}" in out, "each step names the next one"
        options = {"check": ["--gpu", "a100-80gb"], "preview": ["-n", "1"], "train": ["--smoke"]}[step]
        shown, said = user(step, "mine.yaml", *options)
        out = shown + said
    assert "nesso-tune chat outputs/mine-smoke/final" in out
    assert not (tmp_path / "outputs" / "mine").exists()
    answer, _ = user("chat", "outputs/mine-smoke/final", "--prompt", "Ciao!", "--max-new-tokens", "4")
    assert answer.endswith("\n")
