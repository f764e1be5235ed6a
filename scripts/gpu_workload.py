"""What gpu_smoke.py and gpu_benchmark.py train: generated rows and a base model with random weights, without a network.

python scripts/gpu_workload.py FOLDER SIZE_AS_JSON        (saves the base model; prints facts about the machine)
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_wheels import ROOT

QUICKSTART, SEED = ROOT / "recipes" / "quickstart", 1
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.5, 8  # of the quickstart's tokenizer; around two messages
RATES = {"sft": 1e-4, "dpo": 1e-6}
COLUMNS = {"sft": ("input_ids", "labels", "seq_lengths"), "dpo": ("prompt_ids", "chosen_ids", "rejected_ids")}
Line = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Workload: model shape, row length and rows per step by method, steps, and words of the generated rows."""

    shape: tuple[int, ...]  # vocabulary, hidden, intermediate, layers, heads, key and value heads, head dimension
    length: dict[str, int]
    rows: dict[str, int]
    steps: int = 15
    first: int = 5  # also the logging interval: the measurement is from one log line to another
    document: tuple[int, int] = (200, 1800)  # words: median and maximum of a conversation
    answer: tuple[int, int] = (60, 260)  # words: minimum and maximum of each part of a pair


ZAGREUS = Size((128256, 960, 2560, 32, 15, 5, 64), {"sft": 4096, "dpo": 1024}, {"sft": 32, "dpo": 16})
TOY = Size((4096, 64, 128, 2, 4, 2, 16), {"sft": 128, "dpo": 256}, {"sft": 8, "dpo": 8}, 4, 2, (30, 70), (8, 20))


def write_data(size: Size, work: Path) -> None:
    """Seeded Italian and English conversations, log-normal in length and half of them supervised, and pairs."""
    rng, words = random.Random(SEED), {}
    lines = (QUICKSTART / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for language in ("it", "en"):
        texts = [m["content"] for row in map(json.loads, lines) if row["language"] == language for m in row["messages"]]
        words[language] = sorted({word for text in texts for word in text.split()})

    def conversations() -> Iterator[Line]:
        left = 1.4 * size.steps * size.rows["sft"] * size.length["sft"]
        while left > 0:
            language = rng.choice(["it", "en"])
            wanted = min(rng.lognormvariate(0, 0.9) * size.document[0], size.document[1])
            turns, messages = min(rng.choice([1, 1, 1, 1, 2, 2, 3, 4]), max(1, int(wanted / 40))), []
            for _ in range(turns):
                share = rng.uniform(0.2, 0.75)
                for role, part in (("user", share), ("assistant", 1 - share)):
                    count = max(1, int(part * wanted / turns))
                    messages.append({"role": role, "content": " ".join(rng.choices(words[language], k=count))})
            left -= wanted * TOKENS_PER_WORD + TEMPLATE_TOKENS * turns
            yield {"messages": messages, "language": language}

    def pairs() -> Iterator[Line]:
        for _ in range(size.steps * size.rows["dpo"]):
            language = rng.choice(["it", "en"])
            parts = [" ".join(rng.choices(words[language], k=rng.randint(*size.answer))) for _ in range(3)]
            prompt = [{"role": "user", "content": parts[0]}]
            yield {"prompt": prompt, "chosen": parts[1], "rejected": parts[2], "language": language}

    for method, rows in (("sft", conversations()), ("dpo", pairs())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (work / f"{method}.jsonl").write_text(text, encoding="utf-8")


def save_base(size: Size, folder: Path) -> Any:
    """Saves a Llama with random bfloat16 weights and the quickstart's tokenizer, and returns it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nesso_tune.chat.tokenizer import chat_tokenizer
    from nesso_tune.recipes.sections import ChatSection, ModelSection

    chat = chat_tokenizer(ModelSection(base=str(QUICKSTART / "base")), ChatSection())
    torch.manual_seed(SEED)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    config = LlamaConfig(**dict(zip(names, size.shape, strict=True)), max_position_embeddings=max(size.length.values()),
                         tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=chat.bos_token_id,
                         eos_token_id=chat.eos_id, pad_token_id=chat.pad_id)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    chat.save(folder)  # both sides then start with the same embeddings of the chat tokens
    return model


def write_recipe(size: Size, method: str, work: Path, folder: Path, sections: Line) -> Path:
    """Writes the recipe of a run in `folder`. All runs of a method train on the same rows in the same order."""
    train = {"max_steps": size.steps, "global_batch_size": size.rows[method], "learning_rate": RATES[method],
             "schedule": {"type": "constant", "warmup_steps": 0}}  # fmt: skip
    sources = [{"path": str(work / f"{method}.jsonl")}]
    data = {"sequence_len": size.length[method], "validation_size": 0, "sources": sources}
    recipe: Line = {
        "method": method, "output_dir": str(folder), "seed": SEED, "model": {"base": str(work / "base")}, "data": data,
        "train": train, "logging": {"every_steps": size.first}, "evaluation": None,
        "checkpoint": {"every_steps": 1_000_000},
    }  # fmt: skip
    for name, section in sections.items():
        recipe[name] = (recipe[name] or {}) | section if isinstance(section, dict) else section
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def prepared(size: Size, method: str, work: Path) -> list[Line]:
    """The rows of a run in training order."""
    from nesso_tune import load_recipe, prepare_data

    data = prepare_data(load_recipe(str(write_recipe(size, method, work, work / f"{method}-rows", {}))))
    return [data.stream[i] for i in range(size.steps * size.rows[method])]


def workload(row: Line, flops: Any) -> tuple[int, float, float]:
    """Tokens of a row, its FLOPs as `metrics.jsonl` counts them, and as is common.

    The common count has the head on every token and full attention over each sequence.

    Args:
        row: a prepared row.
        flops: nesso_tune's TrainingFlops of the model.
    """
    from nesso_tune.training.throughput import squared_lengths

    if "labels" in row:
        sequences, tokens = [len(row["input_ids"])], len(row["input_ids"])
        supervised = sum(label != -100 for label in row["labels"])
    else:
        prompt, chosen, rejected = (len(row[name]) for name in COLUMNS["dpo"])
        sequences, supervised = [prompt + chosen, prompt + rejected], chosen + rejected
        tokens = prompt + supervised
    needed = flops.token * tokens + flops.supervised * supervised + flops.square * squared_lengths(row)
    return tokens, needed, sum((flops.token + flops.supervised) * n + 2 * flops.square * n * n for n in sequences)


class Failed(Exception):
    """A case failed; the message is the last line of its output."""


def run(command: list[str], log: Path, settings: dict[str, str], seconds: float, done: Any = None) -> str:
    """Runs a command in its own process group, until it ends or `done()`, and returns its output; logs go beside `log`.

    Raises:
        Failed: on a non-zero exit code or a timeout.
    """
    output, errors, end = log.with_suffix(".out"), log.with_suffix(".err"), time.monotonic() + seconds
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=settings, cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and not (done and done()):
            if time.monotonic() > end:
                raise Failed(f"not finished after {seconds:.0f} s")
            time.sleep(0.02)
        if process.poll():
            said = errors.read_text(errors="replace").strip().splitlines()
            raise Failed(said[-1].strip() if said else f"exit code {process.poll()}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return output.read_text()


COMPARE = """import sys; from safetensors.torch import load_file; a, b = map(load_file, sys.argv[1:])
print(max(float((a[name].float() - b[name].float()).abs().max()) for name in a))"""


def difference(one: Path, other: Path, settings: dict[str, str], seconds: float) -> float:
    """The largest difference of the final weights of two runs; 0 if the files are equal, byte for byte."""
    files = [next(folder.glob("final/*.safetensors")) for folder in (one, other)]
    if len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1:
        return 0.0
    return float(run([sys.executable, "-c", COMPARE, *map(str, files)], one, settings, seconds))


if __name__ == "__main__":
    import torch

    save_base(Size(**json.loads(sys.argv[2])), Path(sys.argv[1]))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({"gpu": name, "torch": torch.__version__, "bitsandbytes": find_spec("bitsandbytes") is not None}))
