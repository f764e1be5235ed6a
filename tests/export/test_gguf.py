"""GGUF files against transformers, in llama.cpp: token ids of prompts, and likeliest tokens of random models."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("xllamacpp", reason="needs the extra gguf")

from nesso_tune.chat.tokenizer import build_chat_tokenizer
from nesso_tune.errors import ModelError
from nesso_tune.export import parity
from nesso_tune.export.exporter import export
from nesso_tune.export.gguf_format import (
    GGUF,
    LlamaCppRuntime,
    check_architecture,
    context_length,
    rotary_parameters,
    write_gguf,
)
from nesso_tune.export.gguf_vocabulary import LLAMA3_SPLIT, QWEN2_SPLIT, Vocabulary
from nesso_tune.export.weights import FinishedRun
from nesso_tune.recipes.sections import ChatSection
from nesso_tune.run import train
from tests.support.runs import BASE, main_here, recipe, sums

TEXTS = [
    "Perché no?  Sì, 12345 volte…\n\n\tdoppio  spazio",
    "l'università's naïve café — 你好 🙂",
    "x" * 40 + " 3.14 ]]>\r\n",
]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "max_position_embeddings": 1024, "initializer_range": 0.2}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 5e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
GEMMA = {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": None,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}}  # fmt: skip
SHAPES = {
    "llama": ({"model_type": "llama", "rope_parameters": THETA}, "llama3"),
    "llama, llama3 scaling, reserved rows": (
        {"model_type": "llama", "rope_parameters": LLAMA3, "vocab_size": 2048}, "llama3, ignore_merges"),
    "llama, linear, biases, untied": ({"model_type": "llama", "rope_parameters": LINEAR, "attention_bias": True,
                                       "mlp_bias": True, "tie_word_embeddings": False}, "gpt-2"),
    "llama, yarn": ({"model_type": "llama", "rope_parameters": YARN}, "digits"),
    "mistral": ({"model_type": "mistral", "sliding_window": None, "rope_parameters": THETA}, "sentencepiece"),
    "qwen2": ({"model_type": "qwen2", "rope_parameters": THETA}, "qwen2"),
    "qwen3, yarn": ({"model_type": "qwen3", "rope_parameters": YARN, "tie_word_embeddings": True}, "qwen2"),
    "gemma3": ({"model_type": "gemma3_text", **GEMMA}, "sentencepiece"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(parity, "PROMPTS", 8)
    monkeypatch.setattr(parity, "ANSWER_TOKENS", 12)
    torch.set_num_threads(1)


def sentencepiece():
    """tokenizer.json as transformers converts a SentencePiece BPE model with byte fallback."""
    text = (BASE.parent / "data" / "conversations.jsonl").read_text(encoding="utf-8")
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(text.split("\n"), trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"]))
    learned = json.loads(learner.to_str())["model"]
    pieces = [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda entry: entry[1])][1:]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    special = [{"id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i in range(3)]  # fmt: skip
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
             "vocab": {name: i for i, name in enumerate(names)}, "merges": learned["merges"]}  # fmt: skip
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "model": model,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None,
            "post_processor": None, "decoder": decoder}  # fmt: skip


def tokenizer_json(kind):
    if kind == "sentencepiece":
        return sentencepiece()
    raw = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = raw["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == LLAMA3_SPLIT
    if kind == "qwen2":
        split["pattern"]["Regex"] = QWEN2_SPLIT
        raw["normalizer"] = {"type": "NFC"}
    if kind in ("gpt-2", "digits"):
        raw["pre_tokenizer"] = {**byte_level, "use_regex": True}
    if kind == "digits":
        digits = {"type": "Digits", "individual_digits": True}
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, raw["pre_tokenizer"]]}
    raw["model"]["ignore_merges"] = kind == "llama3, ignore_merges"
    return raw


def model_folder(folder, shape, kind):
    """A random model with a chat tokenizer, as `final/` has it."""
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer_json(kind)), encoding="utf-8")
    names = ("<s>", "</s>") if kind == "sentencepiece" else ("<|begin_of_text|>", "<|end_of_text|>")
    (base / "tokenizer_config.json").write_text(json.dumps(dict(zip(("bos_token", "eos_token"), names, strict=True))))
    (base / "config.json").write_text("{}")
    chat = build_chat_tokenizer(base, ChatSection(), "base")
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**SIZES, "vocab_size": chat.size, "eos_token_id": chat.eos_id, **shape})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():  # norms and biases that are not 1 and 0
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=0.0 if "bias" in name or "gemma" in config.model_type else 1.0, std=0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = chat.eos_id, chat.pad_id
    final = folder / "final"
    model.save_pretrained(final)
    chat.save(final)
    return final, model, AutoTokenizer.from_pretrained(final)


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_same(tmp_path, name):
    shape, kind = SHAPES[name]
    final, model, tokenizer = model_folder(tmp_path, shape, kind)
    answers, ends = parity.reference_answers(model, tokenizer), parity.end_ids(model)
    write_gguf(model, final, tmp_path / "x.gguf", "float32", name)
    runtime = LlamaCppRuntime(tmp_path / "x.gguf", threads=1)
    found = parity.compare(runtime, answers, ends, parity.rounding_error(model, answers), name)
    assert found.prompts == 8
    assert found.near_ties <= 1, str(found)
    for text in TEXTS:
        asked = parity.Prompt([{"role": "user", "content": text}])
        assert runtime.prompt_ids(asked) == parity._prompt_ids(tokenizer, asked), text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_rounding_is_that_of_llama_cpp(tmp_path, dtype):
    """The weights are rounded as our measure of the error rounds them, and the answers stay within that error."""
    final, model, tokenizer = model_folder(tmp_path, *SHAPES["llama"])
    answers, ends = parity.reference_answers(model, tokenizer), parity.end_ids(model)
    write_gguf(model, final, tmp_path / "x.gguf", dtype, "x")
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    parity.round_linear_layers(model, dtype)
    found = written["blk.1.ffn_down.weight"]
    values = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
    torch.testing.assert_close(values, model.model.layers[1].mlp.down_proj.weight, rtol=0, atol=1e-6)
    error = parity.rounding_error(model, answers)
    assert error > 10 * parity.ROUNDING_FLOOR
    assert parity.compare(LlamaCppRuntime(tmp_path / "x.gguf", 1), answers, ends, error, "x").prompts == 8


def test_a_wrong_file_is_noticed(tmp_path):
    """With the rotary embedding of the other kind, and with a BOS that llama.cpp adds."""
    final, model, tokenizer = model_folder(tmp_path, *SHAPES["qwen2"])
    answers, ends = parity.reference_answers(model, tokenizer), parity.end_ids(model)
    error = parity.rounding_error(model, answers)
    model.config.rope_parameters = {**THETA, "rope_theta": 100.0}
    write_gguf(model, final, tmp_path / "x.gguf", "float32", "x")
    with pytest.raises(ModelError, match=r"llama.cpp .* answers differently at token \d+"):
        parity.compare(LlamaCppRuntime(tmp_path / "x.gguf", 1), answers, ends, error, "x")
    template = final / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    write_gguf(model, final, tmp_path / "x.gguf", "float32", "x")
    with pytest.raises(ModelError, match=r"encodes a prompt differently: token 0 is"):
        parity.compare(LlamaCppRuntime(tmp_path / "x.gguf", 1), answers, ends, error, "x")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "phi3"}, "unknown architecture phi3; supported are gemma3_text, llama, mistral, qwen2, qwen3"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "does not compute llama with this activation"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
    ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}, "not full attention every 6 layers"),
    ({"model_type": "gemma3_text", "query_pre_attn_scalar": 99}, "not the size of a head"),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ({"model_type": "qwen2", "rope_parameters": {**YARN, "beta_fast": 4.0}}, "yarn with beta_fast"),
    ({"model_type": "llama", "rope_parameters": {**YARN, "truncate": False}}, "yarn with truncate: false"),
    ({"model_type": "qwen2", "rope_parameters": LLAMA3}, "compute qwen2 with rope_type llama3; .* yarn$"),
    ({"model_type": "qwen3", "attention_bias": True}, "does not compute qwen3 with this attention_bias"),
    ({"model_type": "gemma3_text", "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "attention_bias": True},
     "does not compute gemma3_text with this attention_bias"),
])  # fmt: skip
def test_shapes_that_llama_cpp_lacks(changes, message):
    config = AutoConfig.for_model(**{**SIZES, "vocab_size": 90, **changes, "pad_token_id": 0})
    check = rotary_parameters if "rope_parameters" in changes else check_architecture
    with pytest.raises(ModelError, match=message):
        check(config)


def test_a_file_that_llama_cpp_cannot_load_is_an_error_of_the_export(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"llama.cpp .* cannot load the file .*; export --to hf"):
        LlamaCppRuntime(tmp_path / "x.gguf", threads=1)


def test_prompts_longer_than_the_window_of_mistral_are_left_out(tmp_path):
    """llama.cpp computes it without its window, so the context of the file is shorter."""
    shape = {"model_type": "mistral", "sliding_window": 64, "rope_parameters": THETA}
    final, model, tokenizer = model_folder(tmp_path, shape, "sentencepiece")
    answers = parity.reference_answers(model, tokenizer, context_length(model.config))
    assert 0 < len(answers) < len(parity.reference_answers(model, tokenizer, 1024))
    write_gguf(model, final, tmp_path / "x.gguf", "float32", "x")
    runtime = LlamaCppRuntime(tmp_path / "x.gguf", threads=1)
    error, ends = parity.rounding_error(model, answers), parity.end_ids(model)
    assert parity.compare(runtime, answers, ends, error, "x").prompts == len(answers)
    long = parity.reference_answers(model, tokenizer, 1024)
    with pytest.raises(ModelError, match="refuses a request"):
        parity.compare(runtime, long, ends, error, "x")


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: raw["model"].update(type="Unigram", vocab=[["a", 0.0]]), "a Unigram tokenizer"),
    (lambda raw: raw["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), r"does not know \(\\w\+\)"),
    (lambda raw: raw.update(normalizer={"type": "Lowercase"}), r"does not know \(Lowercase\)"),
])  # fmt: skip
def test_tokenizers_that_gguf_lacks(tmp_path, change, message):
    final, *_ = model_folder(tmp_path, *SHAPES["llama"])
    raw = json.loads((final / "tokenizer.json").read_text(encoding="utf-8"))
    change(raw)
    (final / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ModelError, match=f"{message}.*; export --to hf"):
        Vocabulary.read(final, rows=10**4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        train(recipe("sft", folder / "run", [sums(folder)], evaluation=None))
    return folder / "run"


def test_export_of_a_run(run, tmp_path, capsys):
    code, _, said = main_here(capsys, "export", run, "--to", "gguf", "--dtype", "q8_0", "-o", tmp_path / "out")
    assert code == 0, said
    assert "ids of 8 prompts equal" in said
    assert f"llama-quantize {tmp_path}/out/run-Q8_0.gguf {tmp_path}/out/run-Q4_K_M.gguf Q4_K_M" in said
    fields = gguf.GGUFReader(tmp_path / "out" / "run-Q8_0.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == (run / "final" / "chat_template.jinja").read_text()


def test_without_the_runtime(run, tmp_path, capsys, monkeypatch):
    import nesso_tune.cli.export as cli

    hidden = {"xllamacpp": None, "gguf": None}
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in hidden else object())
    code, _, said = main_here(capsys, "export", run, "--to", "gguf", "-o", tmp_path / "out", "--unchecked")
    assert (code, "gguf is not installed; pip install 'nesso-tune[gguf]'" in said) == (5, True)
    del hidden["gguf"]
    code, _, said = main_here(capsys, "export", run, "--to", "gguf", "-o", tmp_path / "out")
    assert (code, "xllamacpp is not installed; pip install" in said, "or export with --unchecked" in said) == (
        5,
        True,
        True,
    )
    assert not (tmp_path / "out").exists()
    code, _, said = main_here(capsys, "export", run, "--to", "gguf", "-o", tmp_path / "out", "--unchecked")
    assert (code, "not checked" in said) == (0, True)


def test_templates_whose_system_message_llama_cpp_changes(tmp_path, capsys):
    chat = {"template": "mistral"}
    train(recipe("sft", tmp_path / "run", [sums(tmp_path)], evaluation=None, chat=chat))
    code, _, said = main_here(capsys, "export", tmp_path / "run", "--to", "gguf", "--unchecked")
    assert (code, "passes the system message of templates with [SYSTEM_PROMPT] in parts" in said) == (4, True), said


def test_nothing_is_written_for_an_unknown_architecture(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "final" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "olmo2"}))
    found = FinishedRun(tmp_path / "run", {}, FinishedRun.open(run).recipe)
    with pytest.raises(ModelError, match="unknown architecture olmo2"):
        export(found, GGUF, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
