"""What the README shows is what the commands print."""

import re
import shutil

import pytest

from tests.support.runs import ROOT, main_here

README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = ROOT / "recipes" / "quickstart" / "data"


def shown(command):
    """The lines that the README prints below a command."""
    (block,) = re.findall(rf"\$ nesso-tune {re.escape(command)}\n(.*?)```", README, re.DOTALL)
    return [line.rstrip() for line in block.splitlines() if line.strip() and line != "…"]


@pytest.fixture
def user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copy(DATA / "conversations.jsonl", "chats.jsonl")
    shutil.copy(DATA / "toolcalls.jsonl", "toolcalls.jsonl")

    def run(command):
        code, out, err = main_here(capsys, *command.split())
        assert code == 0, err
        return [line.rstrip() for line in (out + err).splitlines()]

    return run


def test_the_first_hour(user, tmp_path):
    for command in (
        "init mine --base mii-llm/zagreus-0.4B-ita --data chats.jsonl toolcalls.jsonl",
        "check recipes/sft.yaml --nodes 4 --gpus-per-node 8 --gpu a100-64gb",
        "preview mine.yaml -n 1",
        "train mine.yaml --smoke",
    ):
        printed = user(command)
        lines = shown(command)
        assert len(lines) > 3
        assert [line for line in lines if line not in printed] == [], command
    recipe = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    (sample,) = re.findall(r"```yaml\n(data:\n.*?)```", README, re.DOTALL)
    assert sample in recipe
