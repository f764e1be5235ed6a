"""`final/` in other programs: models are trained here and read by transformers 4.57, lm-eval, gguf and plain Jinja.

`make elsewhere`, or with an environment that has these already:

    python -m tests.benchmarks.elsewhere --python /path/to/python

The other programs get an environment of their own, since they need another transformers. It prints a table, and ends
with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

from nesso_tune.chat.base_template import ALL_SAMPLES, _template_variables
from nesso_tune.run import train
from tests.support.runs import BASE, recipe

PACKAGES = ["transformers==4.57.6", "lm-eval==0.4.13", "gguf==0.19.0", "accelerate", "jinja2",
            f"torch=={torch.__version__.split('+')[0]}"]  # fmt: skip
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "max_position_embeddings": 1024, "initializer_range": 0.2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i / 4 for i in range(8)], "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64}
BY_LAYER = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}  # fmt: skip


def theta(value: float, rope_type: str = "default", **more: Any) -> dict[str, Any]:
    """Rotary parameters with a base of their own."""
    return {"rope_type": rope_type, "rope_theta": value, **more}


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": theta(1e4)},
    "llama, theta 1e6": {"model_type": "llama", "rope_parameters": theta(1e6)},
    "llama, llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, linear": {"model_type": "llama", "rope_parameters": theta(1e4, "linear", factor=4.0)},
    "llama, dynamic": {"model_type": "llama", "rope_parameters": theta(2e4, "dynamic", factor=4.0)},
    "llama, yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama, longrope": {"model_type": "llama", "rope_parameters": LONGROPE},
    "qwen2, theta 1e6": {"model_type": "qwen2", "rope_parameters": theta(1e6)},
    "qwen3, theta 1e6": {"model_type": "qwen3", "rope_parameters": theta(1e6)},
    "qwen3, yarn": {"model_type": "qwen3", "rope_parameters": YARN},
    "mistral, window 64": {"model_type": "mistral", "sliding_window": 64, "rope_parameters": theta(1e6)},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 64, "rope_parameters": BY_LAYER,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3, longrope": {"model_type": "phi3", "original_max_position_embeddings": 64, "pad_token_id": 0,
                       "rope_parameters": LONGROPE},
    "stablelm, a quarter": {"model_type": "stablelm", "rope_parameters": theta(5e4, partial_rotary_factor=0.25)},
    "gpt_neox, a half": {"model_type": "gpt_neox", "rope_parameters": theta(5e4, partial_rotary_factor=0.5)},
    "olmo2, linear": {"model_type": "olmo2", "rope_parameters": theta(5e5, "linear", factor=4.0)},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, "rope_parameters": theta(2e6)},
}  # fmt: skip
TEMPLATES = ("chatml", "llama3")


def main() -> None:
    """Trains, asks the other environment, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".venv/elsewhere"), help="where all of it goes")
    parser.add_argument("--python", help="interpreter of an environment with the packages; else one is made")
    asked = parser.parse_args()
    python = asked.python or _environment(asked.folder / "venv")
    rows = asked.folder / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"prompt": f"Quanto fa {i} + 1?", "response": f"Fa {i + 1}."}) + "\n"
                            for i in range(12)))  # fmt: skip
    for name, shape in SHAPES.items():
        _made(asked.folder / "models" / name.replace(", ", "-").replace(" ", "_"), shape, rows, name)
    there = Path(__file__).with_name("elsewhere_there.py")
    sys.exit(subprocess.run([python, str(there), str(asked.folder / "models"), __version__], check=False).returncode)


def _environment(folder: Path) -> str:
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():  # an interrupted installation goes on
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        ready.touch()
    return str(python)


def _made(folder: Path, shape: dict[str, Any], rows: Path, name: str) -> None:
    """A model of a shape, trained for two steps by our trainer, and what it is here: logits, and its prompts' text."""
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((BASE / file).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "config.json").write_text(json.dumps({**SIZES, "vocab_size": len(tokenizer), **shape}))
    template = TEMPLATES[list(SHAPES).index(name) % 2]
    some = recipe("sft", folder / "run", [rows], train={"max_steps": 2}, evaluation=None, chat={"template": template},
                  model={"base": str(base)})  # fmt: skip
    final = train(some, overwrite=True).model_dir
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    torch.manual_seed(1)
    ids = torch.randint(3, len(tokenizer), (2, 200))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    tokenizer = AutoTokenizer.from_pretrained(final)
    chats = []
    for conversation in ALL_SAMPLES.values():
        asked = _template_variables(conversation, tokenizer.bos_token)
        variables = {key: asked[key] for key in ("tools", "add_generation_prompt")}
        text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, **variables)
        written = tokenizer.apply_chat_template(asked["messages"], return_dict=False, **variables)
        chats.append({"asked": asked, "text": text, "ids": list(written)})
    torch.save({"ids": ids, "logits": logits, "chats": chats, "name": name}, folder / "here.pt")


if __name__ == "__main__":
    main()
