"""The quickstart end to end: SFT and DPO from the built-in recipes with one command."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, command, fresh_command, main_here, metrics


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Output of SFT and DPO, run in an empty folder by the names of the built-in recipes."""
    folder = tmp_path_factory.mktemp("home")
    done = fresh_command(
        "train", "quickstart/sft", "quickstart/dpo", cwd=folder, NESSO_TUNE_CACHE=str(folder / "cache")
    )
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr, "a warning that a user cannot act on"
    return folder / "outputs" / "quickstart"


def last(run):
    return [line for line in metrics(run) if "eval_loss" in line][-1]


def test_sft_learns_the_answers_and_stops(home):
    line = last(home / "sft")
    assert line["train_exact_match"] >= 0.95
    assert line["exact_match"] >= 0.6, "unseen phrasings"
    assert line["stop_rate"] == line["train_stop_rate"] == 1.0
    assert {line[f"stop_rate/{code}"] for code in ("it", "en")} == {1.0}


def test_dpo_learns_the_chosen_style_and_stops(home):
    line = last(home / "dpo")
    assert line["eval_rewards/accuracies"] >= 0.9
    assert line["closer_to_chosen"] >= 0.9
    assert line["stop_rate"] == 1.0
    shown = [line for line in metrics(home / "dpo") if line.get("event") == "answer"]
    offers = ("Posso aiutarti con altro?", "Can I help with anything else?")
    assert all(one["answer"].endswith(offers) for one in shown[-8:])


def test_no_alarms(home):
    for run in ("sft", "dpo"):
        assert [line for line in metrics(home / run) if line.get("event") == "alarm"] == []
        assert {last(home / run)[f"language_fidelity{part}"] for part in ("", "/it", "/en")} == {1.0}
        assert last(home / run)["repetition_rate"] == 0
    assert min(line["logps/chosen_shift"] for line in metrics(home / "dpo") if "logps/chosen_shift" in line) > -0.05


def test_validation_loss_decreases_in_both_languages(home):
    for run in ("sft", "dpo"):
        first, *_, end = [line for line in metrics(home / run) if "eval_loss" in line]
        for key in ("eval_loss/it", "eval_loss/en"):
            assert end[key] < first[key]


def test_chat_prints_only_the_answer_to_stdout(home, capsys):
    done = command("chat", home / "dpo" / "final", "--prompt", "Qual è la capitale d'Italia?")
    assert done.returncode == 0
    assert done.stdout == "La capitale d'Italia è Roma. Posso aiutarti con altro?\n"
    assert "[transformers]" not in done.stderr
    code, out, _ = main_here(capsys, "chat", home / "dpo", "--prompt", "What is the capital of Italy?")
    assert code == 0
    assert out.startswith("The capital of Italy is Rome.")


def test_the_snippet_of_the_model_card_runs_without_nesso_tune(home):
    final = home / "sft" / "final"
    (snippet,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = snippet.replace("Ciao! Chi sei?", "Quanti giorni ha una settimana?")
    guarded = f"import sys; sys.modules['nesso_tune'] = None\n{code}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", guarded], capture_output=True, text=True, cwd=final, env=environment, check=True
    )
    assert "sette" in done.stdout.lower()


def test_final_is_a_plain_hugging_face_folder(home):
    from transformers import AutoTokenizer

    for run in ("sft", "dpo"):
        final = home / run / "final"
        names = {path.name for path in final.iterdir()}
        assert {
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "generation_config.json",
            "README.md",
        } <= names
        tokenizer = AutoTokenizer.from_pretrained(final)
        generation = json.loads((final / "generation_config.json").read_text())
        assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
        assert tokenizer.eos_token_id in generation["eos_token_id"]
        config = json.loads((final / "config.json").read_text())
        assert config["use_cache"] is True
        assert config["vocab_size"] == len(tokenizer), "reserved slots are renamed, no tokens added"
        # for other programs: no limit on new tokens, no added prefix, no generation tag in the template
        assert (config["rope_theta"], config["rope_scaling"]) == (config["rope_parameters"]["rope_theta"], None)
        assert config["torch_dtype"] == config["dtype"]
        assert generation["max_length"] == config["max_position_embeddings"]
        assert "max_new_tokens" not in generation
        settings = json.loads((final / "tokenizer_config.json").read_text())
        assert settings["add_bos_token"] is settings["add_eos_token"] is settings["add_prefix_space"] is False
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "generation %}" not in (final / "chat_template.jinja").read_text(encoding="utf-8")


def test_training_and_serving_encode_prompts_alike(home):
    """`chat` sends the ids of the exported template, without BOS."""
    from transformers import AutoTokenizer

    from nesso_tune.chat.tokenizer import encoder_of
    from nesso_tune.conversation import Message

    tokenizer = AutoTokenizer.from_pretrained(home / "sft" / "final")
    turns = [Message("user", "Ciao"), Message("assistant", "Ciao!"), Message("user", "Come stai?")]
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert encoder_of(tokenizer).prompt(turns, "it") == list(ids)
    assert tokenizer.bos_token_id not in ids
    rendered = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert tokenizer(rendered)["input_ids"] == list(ids), "the tokenizer adds no special tokens"


def test_a_finished_run_is_not_repeated(home, capsys, monkeypatch):
    monkeypatch.chdir(home.parent.parent)
    before = (home / "sft" / "final" / "model.safetensors").stat().st_mtime_ns
    code, _, err = main_here(capsys, "train", "quickstart/sft", "quickstart/dpo")
    assert code == 0
    assert err.count("this run is finished") == 2
    assert (home / "sft" / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_bundled_data_matches_its_description():
    folder = ROOT / "recipes" / "quickstart" / "data"
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
            for name in ("conversations", "heldout", "pairs", "pairs_heldout")}  # fmt: skip
    assert len(rows["conversations"]) >= 300
    assert len(rows["pairs"]) >= 100
    for name, some in rows.items():
        italian = sum(row["language"] == "it" for row in some)
        assert italian == len(some) / 2, f"{name}: half Italian, half English"
    talks = [row["messages"] for row in rows["conversations"]]
    assert sum(sum(m["role"] == "assistant" for m in talk) > 1 for talk in talks) >= 40, "some multi-turn"
    assert sum(talk[0]["role"] == "system" for talk in talks) >= 40, "some with a system prompt"
    asked = {row["messages"][-2]["content"] for row in rows["conversations"]}
    assert not asked & {row["messages"][-2]["content"] for row in rows["heldout"]}, "never seen"
