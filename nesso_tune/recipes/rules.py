"""Lint rules of recipes: keys without effect and contradictory keys are errors.

The rules read the raw recipe, so they run even if other keys are invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from posixpath import normpath
from typing import Any

from nesso_tune.lr_schedule import DECAYING_TYPES
from nesso_tune.metric_registry import (
    ANSWER_METRICS,
    TRAIN_PREFIX,
    VALIDATION_METRICS,
    metric_of,
    overall_metric,
    own_metrics,
    suggest_metric,
)
from nesso_tune.recipes.builtin import SOURCE_SEPARATOR
from nesso_tune.recipes.cluster_rules import CLUSTER_RULES
from nesso_tune.recipes.data_rules import (
    DATA_RULES,
    Finding,
    Raw,
    get,
    invalid_language_code,
    unknown_source,
    unknown_template,
)
from nesso_tune.recipes.secrets import find_secrets
from nesso_tune.recipes.yaml_source import KeyPath

SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
SORTED_LOSSES = ("aot", "aot_unpaired")  # over the sorted log-ratios of a batch: not a mean over pairs
# Keys of config.json that `model.overrides` must not change.
_OTHER_BASE = "remove it, or use a base with this value"
FIXED_CONFIG_KEYS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "tie_word_embeddings", "model_type", "architectures",
                     "attention_bias", "mlp_bias", "n_embd", "n_layer", "n_head", "n_inner"), _OTHER_BASE),
    **dict.fromkeys(("dtype", "torch_dtype"), "use model.dtype"),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), "use chat.template, or chat.pad_token"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), "use model.attention"),
    "quantization_config": "use model.adapter.type: qlora",
    "auto_map": "use model.trust_remote_code",
}  # fmt: skip


@dataclass(frozen=True)
class Exclusive:
    """Two mutually exclusive keys of a section."""

    section: KeyPath
    keys: tuple[str, str]
    remedy: str


@dataclass(frozen=True)
class Inert:
    """Keys of a section that have no effect while another key of it has the given value."""

    section: KeyPath
    key: str
    value: str
    inert: tuple[str, ...]
    remedy: str


# Rules that JSON Schema can express; `json_schema.py` exports them for editors.
EXCLUSIVE = (
    Exclusive(("train", "schedule"), ("warmup_ratio", "warmup_steps"), "keep one of the two"),
    Exclusive(("train",), ("max_steps", "num_epochs"), "set one and null the other"),
    Exclusive(("train",), ("global_batch_size", "gradient_accumulation_steps"), "set one and null the other"),
)
INERT = (
    Inert(("train", "schedule"), "type", "constant", ("constant_ratio", "min_ratio"), "remove it, or set type: cosine"),
)


def lint(raw: Raw) -> list[Finding]:
    """Findings of all rules. A key is set if it is present and not null."""
    return [finding for rule in RULES for finding in rule(raw)]


def remove_excluded(raw: Any, overrides: Mapping[str, Any]) -> None:
    """Removes keys of a recipe that are mutually exclusive with an override."""
    for rule in EXCLUSIVE:
        names = {key: ".".join(map(str, (*rule.section, key))) for key in rule.keys}
        for key, other in (rule.keys, rule.keys[::-1]):
            section: Any = raw
            for part in rule.section:
                section = section.get(part) if isinstance(section, dict) else None
            if overrides.get(names[key]) is not None and names[other] not in overrides and isinstance(section, dict):
                section.pop(other, None)


def _exclusive(raw: Raw) -> Iterator[Finding]:
    for rule in EXCLUSIVE:
        first, other = rule.keys
        if all(get(raw, *rule.section, key) is not None for key in rule.keys):
            yield Finding(
                (*rule.section, other), f"contradicts {'.'.join(map(str, (*rule.section, first)))}", rule.remedy
            )


def _inert(raw: Raw) -> Iterator[Finding]:
    for rule in INERT:
        if get(raw, *rule.section, rule.key) == rule.value:
            for key in rule.inert:
                if get(raw, *rule.section, key) is not None:
                    yield Finding((*rule.section, key), f"has no effect under {rule.key}: {rule.value}", rule.remedy)


def _schedule(raw: Raw) -> Iterator[Finding]:
    here: KeyPath = ("train", "schedule")
    warmup, end = get(raw, *here, "warmup_ratio"), get(raw, *here, "constant_ratio")
    if isinstance(warmup, (int, float)) and isinstance(end, (int, float)) and warmup >= end > 0:
        yield Finding(
            (*here, "warmup_ratio"),
            f"warms up to {warmup:g} of the run, but the decay should end at {end:g} (constant_ratio)",
            "make it smaller than constant_ratio",
        )
    decays = get(raw, *here, "type") in (None, *DECAYING_TYPES)
    if decays and isinstance(end, (int, float)) and 0 < end < 1 and get(raw, *here, "min_ratio") is None:
        yield Finding(
            (*here, "constant_ratio"),
            f"keeps the learning rate at 0 for the last {1 - end:.0%} of the run: min_ratio is not set",
            "set min_ratio: 0.1, or constant_ratio: 1.0",
        )


def _validation(raw: Raw) -> Iterator[Finding]:
    if get(raw, "data", "validation_sources") and get(raw, "data", "validation_size") not in (None, 0, 0.01):
        yield Finding(
            ("data", "validation_size"),
            "has no effect beside data.validation_sources",
            "keep one of the two",
        )


def _best_metric(raw: Raw) -> Iterator[Finding]:
    metric, patience = get(raw, "train", "best_metric"), get(raw, "train", "early_stopping_patience")
    if patience is not None and metric is None:  # the metric also selects the weights in final/, so it must be explicit
        yield Finding(
            ("train", "early_stopping_patience"), "requires train.best_metric",
            "set train.best_metric: eval_loss, or remove it",
        )  # fmt: skip
    if isinstance(metric, str) and (fault := _best_metric_problem(raw, metric)) is not None:
        yield Finding(("train", "best_metric"), *fault)


def _best_metric_problem(raw: Raw, metric: str) -> tuple[str, str] | None:
    """Why this recipe does not measure a metric, and the remedy; None if it can measure it."""
    overall, registered = overall_metric(metric), metric_of(metric)
    if overall is None or registered is None:
        names = [*VALIDATION_METRICS, *ANSWER_METRICS, *own_metrics()]
        remedy = f"{suggest_metric(metric, names)}, or register your own (nesso_tune.answer_metric) before"
        return f"`{metric}` is not a metric that can select weights", remedy
    method, evaluation = get(raw, "method"), get(raw, "evaluation")
    on_training_prompts = overall.startswith(TRAIN_PREFIX)
    no_validation = get(raw, "data", "validation_size") == 0 and not get(raw, "data", "validation_sources")
    if "evaluation" in raw and evaluation is None:
        return "evaluation: null disables all metrics", "set evaluation: {}, or remove it"
    if "checkpoint" in raw and raw["checkpoint"] is None:
        return "checkpoint: null keeps no weights of earlier evaluations", "set checkpoint: {}, or remove it"
    if registered.method is not None and method in ("sft", "dpo") and method != registered.method:
        return f"`{metric}` is measured under method: {registered.method} only", "use eval_loss"
    if no_validation and not on_training_prompts:
        return (
            f"`{metric}` needs validation rows, and there are none",
            "set data.validation_size, or remove it",
        )
    if registered.measured_on == "answers" and get(evaluation, "samples") == 0:
        return (
            f"`{metric}` is measured on generated answers, and evaluation.samples is 0",
            "set evaluation.samples: 8",
        )
    if metric.startswith(f"{overall}{SOURCE_SEPARATOR}"):
        fault = unknown_source(raw, metric.removeprefix(f"{overall}{SOURCE_SEPARATOR}"), not on_training_prompts)
        return (f"`{metric}` {fault[0]}", fault[1]) if fault is not None else None
    return None


def _compile(raw: Raw) -> Iterator[Finding]:
    if get(raw, "train", "torch_compile") is not True:
        return
    lacking = "pairs" if get(raw, "method") == "dpo" else "rows that are not packed"
    if get(raw, "method") == "dpo" or get(raw, "data", "packing") is False:
        yield Finding(
            ("train", "torch_compile"), f"requires a constant sequence length, which {lacking} do not have",
            "set it to false",
        )  # fmt: skip


def _overrides(raw: Raw) -> Iterator[Finding]:
    overrides = get(raw, "model", "overrides")
    for key in overrides if isinstance(overrides, Mapping) else ():
        if (remedy := FIXED_CONFIG_KEYS.get(str(key))) is not None:
            what = "changes the shape of weights" if remedy == _OTHER_BASE else "is set by another key"
            yield Finding(("model", "overrides", key), what, remedy)


def _model(raw: Raw) -> Iterator[Finding]:
    if get(raw, "model", "attention") == "flash" and get(raw, "model", "dtype") == "float32":
        yield Finding(
            ("model", "attention"), "flash kernels do not compute in float32",
            "set model.dtype: bfloat16, or attention: auto",
        )  # fmt: skip
    if get(raw, "model", "random_init") is True:
        if get(raw, "model", "adapter") is not None:
            yield Finding(("model", "adapter"), "is not useful with random weights", "set adapter: null")
        runs_code = get(raw, "model", "trust_remote_code") is True
        if get(raw, "model", "revision") is not None and not runs_code:
            yield Finding(("model", "revision"), "has no effect with random_init: true", "remove it")


def _unshardable(raw: Raw) -> Iterator[Finding]:
    found = (
        (("model", "adapter", "type"), "qlora", "4-bit weights", "lora"),
        (("train", "optimizer"), "adamw_8bit", "8-bit moments", "adamw_torch_fused"),
    )
    for path, value, state, other in found:
        if get(raw, *path) != value:
            continue
        for key, sharding in (("fsdp", "full_shard"), ("fsdp", "hybrid_shard"), ("state_dict", "sharded")):
            if get(raw, "distributed", key) == sharding:
                key_and_value = f"{'.'.join(path)}: "
                yield Finding(
                    ("distributed", key), f"contradicts {key_and_value}{value}, whose {state} cannot be sharded",
                    f"remove it (each process then holds the whole state), or set {key_and_value}{other}",
                )  # fmt: skip


def _distributed(raw: Raw) -> Iterator[Finding]:
    if get(raw, "distributed", "fsdp") == "none" and get(raw, "distributed", "state_dict") == "sharded":
        yield Finding(
            ("distributed", "state_dict"), "has no effect under fsdp: none: nothing is sharded",
            "remove it, or set fsdp: full_shard",
        )  # fmt: skip


def _secrets(raw: Raw) -> Iterator[Finding]:
    for path, kind in find_secrets(raw):
        remedy = "remove it, revoke it if it was shared, and use an environment variable such as HF_TOKEN"
        yield Finding(path, f"looks like a secret {kind}: a recipe is recorded and shared", remedy)


def _template(raw: Raw) -> Iterator[Finding]:
    yield from unknown_template(("chat", "template"), get(raw, "chat", "template"), "chat")
    yield from unknown_template(("evaluation", "gate"), get(raw, "evaluation", "gate"), "gates")
    systems = get(raw, "chat", "default_system")
    for code in systems if isinstance(systems, Mapping) else ():
        yield from invalid_language_code(("chat", "default_system", code), code)


def _output(raw: Raw) -> Iterator[Finding]:
    folder = get(raw, "output_dir")
    if isinstance(folder, str) and "\0" in folder:
        yield Finding(("output_dir",), "contains a NUL character", "correct it")
    if isinstance(folder, str) and normpath(folder).split("/")[0] == "..":
        yield Finding(
            ("output_dir",), f"{folder} is outside the working directory", "use an absolute path if this is intended"
        )


def _dpo(raw: Raw) -> Iterator[Finding]:
    losses = get(raw, "dpo", "loss")
    names = set(losses) if isinstance(losses, Mapping) else {"sigmoid"}
    smoothing = get(raw, "dpo", "label_smoothing")
    if smoothing and not names & set(SMOOTHED_LOSSES):
        yield Finding(
            ("dpo", "label_smoothing"),
            f"has no effect on the loss {', '.join(sorted(names))}",
            f"remove it, or use one of {', '.join(SMOOTHED_LOSSES)}",
        )
    if "exo_pair" in names and not smoothing:
        yield Finding(("dpo", "loss"), "exo_pair needs label_smoothing above 0", "set dpo.label_smoothing: 0.001")
    if names == {"sft"} and get(raw, "dpo", "beta") not in (None, 0.1):
        yield Finding(
            ("dpo", "beta"), "has no effect on the loss sft alone", "add a preference loss, e.g. sigmoid: 1.0"
        )
    for name in sorted(names & set(SORTED_LOSSES)):
        yield from _sorted_loss(raw, name)
    if get(raw, "dpo", "ld_alpha") == 1:
        yield Finding(("dpo", "ld_alpha"), "1.0 weighs all tokens equally, like null", "remove it")


def _micro_batch(raw: Raw) -> Iterator[Finding]:
    if get(raw, "train", "micro_batch_size") == "auto" and get(raw, "train", "global_batch_size") is None:
        yield Finding(
            ("train", "micro_batch_size"), "auto needs the number of rows of a step, which must not depend on the GPU",
            "set train.global_batch_size (instead of gradient_accumulation_steps), or set a number",
        )  # fmt: skip


def _sorted_loss(raw: Raw, loss: str) -> Iterator[Finding]:
    """Reports a sorted loss if a micro batch is not the whole batch of an optimizer step."""
    rows, whole, times = (
        get(raw, "train", key) for key in ("micro_batch_size", "global_batch_size", "gradient_accumulation_steps")
    )
    rows = 1 if rows is None else rows
    if rows == "auto":
        yield Finding(
            ("dpo", "loss"), f"{loss} sorts all pairs of a step, which micro_batch_size: auto may split",
            "set train.micro_batch_size to train.global_batch_size and use one device, or use another loss",
        )  # fmt: skip
    if not isinstance(rows, int):
        return
    step = whole if isinstance(whole, int) else rows * times if isinstance(times, int) else rows
    if step > rows:
        yield Finding(
            ("dpo", "loss"), f"{loss} sorts all pairs of a step, but its {step} pairs are in micro batches of {rows}",
            f"set train.micro_batch_size: {step} and one device, or use another loss",
        )  # fmt: skip
    elif step == 1:
        yield Finding(("dpo", "loss"), f"{loss} needs more than one pair per step", "raise train.micro_batch_size")


RULES: tuple[Callable[[Raw], Iterator[Finding]], ...] = (
    _exclusive, _inert, _schedule, _micro_batch, _compile, _validation, _best_metric, _model, _overrides,
    _unshardable, _distributed, *CLUSTER_RULES, _secrets, _template, _output, _dpo, *DATA_RULES,
)  # fmt: skip
