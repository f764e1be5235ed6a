"""Subprocesses of gpu_benchmark.py; each prints its result as one JSON line.

python scripts/gpu_benchmark_child.py setup|look|trl WORK [CASE]
"""

import json
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gpu_benchmark_accuracy import compare_accuracy
from gpu_benchmark_cases import METHODS, QUICKSTART, RATES, SEED, Case, Size
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nesso_tune import load_recipe, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.recipes.sections import ChatSection, ModelSection
from nesso_tune.training.dataset import pair_tokens
from nesso_tune.training.throughput import TrainingFlops, device_peak, peak_memory, squared_lengths

ON_GPU = torch.cuda.is_available()


def rows_of(size: Size, method: str, work: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Prepared data and the rows of a run in training order."""
    data = prepare_data(load_recipe(str(work / f"{method}.yaml")))
    wanted = size.rows(method)
    if len(data.train) < wanted:
        raise ValueError(f"{method}: a run needs {wanted} rows, but there are {len(data.train)}")
    return data, [data.stream[i] for i in range(wanted)]


def setup(size: Size, work: Path) -> dict[str, Any]:
    """Saves a base model with random weights; returns facts about the machine and the workload of each step."""
    base = work / "base"
    chat = chat_tokenizer(ModelSection(base=str(QUICKSTART / "base")), ChatSection())
    torch.manual_seed(SEED)
    config = LlamaConfig(
        **size.model, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=chat.bos_token_id, eos_token_id=chat.eos_id, pad_token_id=chat.pad_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base)
    chat.save(base)  # both sides then start with the same embeddings of the chat tokens
    operations = TrainingFlops.of(model)
    return {
        "gpu": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "peak": device_peak(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "flash_attn": find_spec("flash_attn") is not None,
        "parameters": model.num_parameters(),
        **{method: [workload(rows, operations) for rows in steps(size, method, work)] for method in METHODS},
    }


def steps(size: Size, method: str, work: Path) -> list[list[dict[str, Any]]]:
    """The rows of each step."""
    rows, each = rows_of(size, method, work)[1], size.micro[method] * size.accumulation[method]
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def workload(rows: list[dict[str, Any]], operations: TrainingFlops) -> dict[str, float]:
    """Rows, tokens and operations of a step, the same for both sides."""
    if "labels" in rows[0]:
        tokens = sum(len(row["input_ids"]) for row in rows)
        supervised = sum(label != -100 for row in rows for label in row["labels"])
    else:
        tokens = sum(map(pair_tokens, rows))
        supervised = sum(len(row[name]) for row in rows for name in ("chosen_ids", "rejected_ids"))
    squares = sum(map(squared_lengths, rows))
    needed = operations.token * tokens + operations.supervised * supervised + operations.square * squares
    return {"rows": len(rows), "tokens": tokens, "supervised_tokens": supervised, "operations": needed}


def trl_attention(traits: tuple[str, ...] = ()) -> str:
    """Attention implementation for TRL: flash attention if installed."""
    if "flex" in traits:
        return "flex_attention"
    return "flash_attention_2" if find_spec("flash_attn") and ON_GPU else "sdpa"


class StepTimer(TrainerCallback):
    """Records time and loss of each logged step. Logging synchronizes with the device."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        """Starts the clock."""
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called by the trainer."""
        if logs and "loss" in logs:
            self.seconds.append(time.monotonic() - self._began)
            self.losses.append(logs["loss"])


class PreparedPairs(DPOTrainer):
    """DPOTrainer for tokenized pairs that times the precomputation of reference log-probabilities."""

    reference_s = 0.0

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any) -> Any:
        began = time.monotonic()
        found = super()._precompute_ref_logps(*arguments)
        self.reference_s += time.monotonic() - began
        return found


def trl(size: Size, case: Case, work: Path) -> dict[str, Any]:
    """Trains with TRL on the same rows in the same order and precision."""
    method, traits, base, watch = case.method, case.traits, work / "base", StepTimer()
    rows, tokenizer = rows_of(size, method, work)[1], AutoTokenizer.from_pretrained(base)
    liger = ON_GPU and find_spec("liger_kernel") is not None
    shared = {
        "output_dir": str(work / "trl"), "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "seed": SEED, "use_cpu": not ON_GPU, "bf16": True, "use_liger_kernel": liger,
        "max_steps": size.steps[method], "per_device_train_batch_size": size.micro[method],
        "gradient_accumulation_steps": size.accumulation[method], "learning_rate": RATES[method],
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "weight_decay": 0.0,
        "gradient_checkpointing": "checkpointing" in traits, "train_sampling_strategy": "sequential",
        "max_length": None,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": trl_attention(traits)},
    }  # fmt: skip
    given: dict[str, Any] = {"model": str(base), "processing_class": tokenizer, "callbacks": [watch]}
    make = _sft if method == "sft" else _dpo
    trainer = make(shared, given, rows, traits)
    watch.begin()
    trainer.train()
    reference = getattr(trainer, "reference_s", 0.0)
    kernel = f"{trainer.model.config._attn_implementation}{', liger' if liger else ''}"
    return {
        "seconds": watch.seconds, "losses": watch.losses, "peak_memory_gb": peak_memory() / 1e9, "attention": kernel,
        **({"reference_s": reference} if reference else {}),
    }  # fmt: skip


def _sft(shared: dict[str, Any], given: dict[str, Any], rows: list[dict[str, Any]], traits: Any) -> SFTTrainer:
    separate = "rows apart" in traits
    columns = ("input_ids", "labels", "seq_lengths")
    data = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    args = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}, packing=False, padding_free=not separate)
    if separate:
        given |= {"data_collator": separate_rows(given["processing_class"].pad_token_id)}
    return SFTTrainer(**given, args=args, train_dataset=data)


def _dpo(shared: dict[str, Any], given: dict[str, Any], rows: list[dict[str, Any]], traits: Any) -> DPOTrainer:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    args = DPOConfig(**shared, beta=0.1, precompute_ref_log_probs="precomputed reference" in traits)
    return PreparedPairs(**given, args=args, train_dataset=data)


def separate_rows(pad_id: int) -> Any:
    """TRL's collator, but packed rows remain a batch: attention masks then cover one row instead of the whole batch."""
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_id, return_position_ids=True)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collator(rows)
        del batch["attention_mask"]  # transformers separates documents by position_ids only without a mask
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch

    return collate


def main() -> None:
    """Runs one command of gpu_benchmark.py."""
    command, work = sys.argv[1], Path(sys.argv[2])
    size = Size(**json.loads((work / "size.json").read_text(encoding="utf-8")))
    if command == "setup":
        result = setup(size, work)
    elif command == "look":
        section = load_recipe(str(work / "sft.yaml")).model
        result = compare_accuracy(
            work, section, {method: rows_of(size, method, work) for method in METHODS}, trl_attention()
        )
    else:
        result = trl(size, Case(**json.loads(sys.argv[3])), work)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
