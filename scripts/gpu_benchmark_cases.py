"""Workload of gpu_benchmark.py: seeded synthetic data, recipes, and the cases to measure."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
SEED = 1
METHODS = ("sft", "dpo")
RATES = {"sft": 1e-4, "dpo": 1e-6}


@dataclass(frozen=True)
class Size:
    """Dimensions of the workload.

    Attributes:
        model: arguments of LlamaConfig.
        length: maximum sequence length by method; of the packed row in SFT.
        micro, accumulation: micro batch size and micro batches per step, by method.
        steps, first: steps by method, and how many of them are warm-up, not measured.
        document: median and maximum tokens of a conversation.
        prompt, answer: minimum and maximum tokens of the parts of a pair.
    """

    model: dict[str, Any]
    length: dict[str, int]
    micro: dict[str, int]
    accumulation: dict[str, int]
    steps: dict[str, int]
    first: dict[str, int]
    document: tuple[int, int]
    prompt: tuple[int, int]
    answer: tuple[int, int]

    def rows(self, method: str) -> int:
        """Number of rows of a run."""
        return self.steps[method] * self.micro[method] * self.accumulation[method]


ZAGREUS = Size(
    model={"vocab_size": 128256, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
           "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "max_position_embeddings": 4096},
    length={"sft": 4096, "dpo": 1024},
    micro={"sft": 4, "dpo": 8},
    accumulation={"sft": 1, "dpo": 2},
    steps={"sft": 20, "dpo": 16},
    first={"sft": 5, "dpo": 4},
    document=(300, 3000),
    prompt=(100, 300),
    answer=(150, 400),
)  # fmt: skip
TOY = Size(
    model={"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    length={"sft": 128, "dpo": 128},
    micro={"sft": 2, "dpo": 2},
    accumulation={"sft": 1, "dpo": 2},
    steps={"sft": 3, "dpo": 3},
    first={"sft": 1, "dpo": 1},
    document=(40, 110),
    prompt=(10, 30),
    answer=(10, 30),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        method: sft or dpo.
        side: ours or TRL.
        traits: deviations from the default.
    """

    method: str
    side: str
    traits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Label in the tables."""
        return ", ".join([self.side, *self.traits])


# The most important cases first, in case a run is interrupted.
CASES = (
    Case("sft", "ours"),
    Case("sft", "TRL"),
    Case("dpo", "ours"),
    Case("dpo", "TRL"),
    Case("dpo", "ours", ("cached reference",)),
    Case("dpo", "TRL", ("precomputed reference",)),
    Case("sft", "TRL", ("rows apart",)),
    Case("sft", "ours", ("checkpointing",)),
    Case("sft", "TRL", ("checkpointing",)),
    Case("sft", "ours", ("compiled",)),
    Case("sft", "TRL", ("rows apart", "checkpointing")),
    Case("sft", "ours", ("checkpointing", "compiled")),
    Case("sft", "TRL", ("flex",)),
)
# The toy has one case each of checkpointing and compiling; flex attention has no backward pass on a CPU.
NOT_IN_TOY = (
    Case("sft", "TRL", ("checkpointing",)),
    Case("sft", "TRL", ("rows apart", "checkpointing")),
    Case("sft", "ours", ("checkpointing", "compiled")),
    Case("sft", "TRL", ("flex",)),
)


def recipe(case: Case, size: Size, work: Path) -> dict[str, Any]:
    """The recipe of a case. All cases of a method train on the same rows."""
    method = case.method
    train: dict[str, Any] = {
        "max_steps": size.steps[method],
        "micro_batch_size": size.micro[method],
        "gradient_accumulation_steps": size.accumulation[method],
        "learning_rate": RATES[method],
        "gradient_checkpointing": "checkpointing" in case.traits,
        "schedule": {"type": "constant", "warmup_steps": 0},
    }
    if method == "sft":
        train["torch_compile"] = "compiled" in case.traits
    return {
        "method": method,
        "output_dir": str(work / "run"),
        "seed": SEED,
        "model": {"base": str(work / "base")},
        "data": {
            "sequence_len": size.length[method],
            "validation_size": 0,
            "sources": [{"path": str(work / f"{method}.jsonl")}],
        },
        "train": train,
        "evaluation": None,
        "logging": {"every_steps": 1},
        "checkpoint": {"every_steps": 1_000_000},
    }


def write_recipe(case: Case, size: Size, work: Path) -> Path:
    """Writes the recipe of a case."""
    file = work / f"{case.method}.yaml"
    file.write_text(json.dumps(recipe(case, size, work)), encoding="utf-8")
    return file


class RandomText:
    """Random words of a language, with approximately a given number of tokens."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._words, self._per_word = rng, {}, {}
        tokenizer = Tokenizer.from_file(str(QUICKSTART / "base" / "tokenizer.json"))
        lines = (QUICKSTART / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
        for language in ("it", "en"):
            rows = [row for row in map(json.loads, lines) if row["language"] == language]
            found = sorted({word for row in rows for m in row["messages"] for word in m["content"].split()})
            tokens = tokenizer.encode(" ".join(found), add_special_tokens=False).ids
            self._words[language], self._per_word[language] = found, len(tokens) / len(found)

    def text(self, language: str, tokens: float) -> str:
        """A text of at least one word."""
        count = max(1, round(tokens / self._per_word[language]))
        return " ".join(self._rng.choice(self._words[language], size=count))


TEMPLATE_TOKENS = 8  # around a user and an assistant message


def conversations(size: Size) -> Iterator[dict[str, Any]]:
    """Conversations with 1.2 times the tokens of an SFT run, log-normal in length; about half of them supervised."""
    rng = np.random.default_rng([SEED, 0])
    words, (median, longest) = RandomText(rng), size.document
    left = 1.2 * size.rows("sft") * size.length["sft"]
    while left > 0:
        wanted = min(float(rng.lognormal(np.log(median), 0.9)), longest)
        language = str(rng.choice(["it", "en"]))
        turns = min(int(rng.geometric(0.5)), max(1, int(wanted / (3 * TEMPLATE_TOKENS))))
        each, messages = wanted / turns - TEMPLATE_TOKENS, []
        for _ in range(turns):
            share = rng.uniform(0.2, 0.75)
            for role, part in (("user", share), ("assistant", 1 - share)):
                messages.append({"role": role, "content": words.text(language, part * each)})
        left -= wanted
        yield {"messages": messages, "language": language}


def pairs(size: Size) -> Iterator[dict[str, Any]]:
    """The preference pairs of a DPO run."""
    rng = np.random.default_rng([SEED, 1])
    words = RandomText(rng)
    for _ in range(size.rows("dpo")):
        language = str(rng.choice(["it", "en"]))
        prompt, chosen, rejected = (
            words.text(language, rng.uniform(*bounds)) for bounds in (size.prompt, size.answer, size.answer)
        )
        messages = [{"role": "user", "content": prompt}]
        yield {"prompt": messages, "chosen": chosen, "rejected": rejected, "language": language}


def write_data(size: Size, work: Path) -> None:
    """Writes sft.jsonl and dpo.jsonl."""
    for method, rows in (("sft", conversations(size)), ("dpo", pairs(size))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (work / f"{method}.jsonl").write_text(text, encoding="utf-8")
