"""Turns pydantic validation errors into problems with file, line and remedy.

Unknown keys are compared with all keys of the recipe models and with those of other tools, to suggest the right name
or section. `OTHER_TOOL_KEYS` has the equivalent keys of Axolotl, TRL, transformers and LLaMA-Factory.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from nesso_tune.errors import Problem, RecipeError, closest, shortened
from nesso_tune.recipes.builtin import LICENSE, PATH_ERROR
from nesso_tune.recipes.cluster_rules import LINE, MOUNT, SLURM_OPTION, SLURM_WORD, VALUE, VARIABLE_NAME
from nesso_tune.recipes.rules import lint
from nesso_tune.recipes.secrets import masked
from nesso_tune.recipes.yaml_source import Document, KeyPath

Model = TypeVar("Model", bound=BaseModel)
# Recipe key: its names in other tools.
OTHER_TOOL_KEYS: dict[str, tuple[str, ...]] = {
    "method": ("rl", "stage", "task", "rl_type"),
    "output_dir": ("output", "out_dir", "output_path", "save_dir"),
    "model.base": ("base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path"),
    "model.revision": ("revision_of_model", "model_revision"),
    "model.attention": ("flash_attention", "flash_attn", "attn_implementation", "sdp_attention", "xformers_attention"),
    "model.dtype": ("bf16", "fp16", "tf32", "torch_dtype", "precision"),
    "model.overrides": ("overrides_of_model_config", "config_overrides", "model_kwargs", "override_model_config"),
    "model.adapter": ("peft", "use_peft", "finetuning_type", "peft_config", "lora"),
    "model.adapter.type": ("use_dora", "load_in_4bit", "quantization_bit", "quantization_config", "bnb_config"),
    "model.adapter.r": ("lora_r", "lora_rank", "rank"),
    "model.adapter.alpha": ("lora_alpha",),
    "model.adapter.dropout": ("lora_dropout",),
    "model.adapter.target_modules": ("lora_target_modules", "lora_target", "lora_target_linear"),
    "chat.template": ("chat_template", "chat_template_path", "chat_template_jinja"),
    "chat.eos_token": ("special_tokens", "eos"),
    "chat.pad_token": ("pad",),
    "chat.new_tokens": ("tokens", "new_special_tokens", "added_tokens_overrides", "resize_vocab"),
    "chat.default_system": ("default_system_message", "system_prompt", "default_system_prompt"),
    "data.sources": ("datasets", "dataset", "dataset_name", "train_dataset", "dataset_dir", "dataset_path"),
    "data.sequence_len": ("max_length", "max_seq_length", "cutoff_len", "max_seq_len", "model_max_length", "seq_len"),
    "data.packing": ("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "neat_packing"),
    "data.roles_to_train": ("train_on_inputs", "assistant_only_loss", "completion_only_loss", "train_on_prompt"),
    "data.turns_to_train": ("mask_history", "train_on_last_turn_only", "only_train_on_last_turn", "last_turn_only"),
    "data.reasoning": ("enable_thinking", "split_thinking", "template_thinking_key", "reasoning_field"),
    "data.validation_size": ("val_set_size", "val_size", "test_size", "eval_size", "validation_split"),
    "data.validation_sources": ("test_datasets", "eval_dataset", "eval_datasets", "validation_dataset"),
    "data.mixture": ("mix_strategy", "interleave_probs", "probabilities", "dataset_mixture", "interleave"),
    "data.clean.duplicates": ("dataset_exact_deduplication", "deduplicate", "dedup", "exact_duplicates"),
    "data.clean.near_duplicates": ("minhash", "near_dedup", "fuzzy_dedup"),
    "data.clean.decontaminate": ("decontamination", "decontaminate_against"),
    "data.clean.personal_data": ("pii", "remove_pii", "mask_pii", "pii_masking", "anonymize"),
    "data.too_long": ("excess_length_strategy", "truncation_mode", "packing_strategy"),
    "train.num_epochs": ("num_train_epochs", "epochs", "n_epochs"),
    "train.max_steps": ("max_train_steps", "steps", "num_steps"),
    "train.micro_batch_size": ("per_device_train_batch_size", "batch_size", "per_device_eval_batch_size"),
    "train.gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "gradient_accumulation"),
    "train.global_batch_size": ("effective_batch_size", "total_batch_size"),
    "train.learning_rate": ("lr", "learning_rate_peak"),
    "train.optimizer": ("optim", "optimiser"),
    "train.adam_epsilon": ("eps",),
    "train.deterministic": ("full_determinism", "deterministic_mode", "use_deterministic_algorithms"),
    "train.max_grad_norm": ("gradient_clipping", "grad_clip", "gradient_clip_val"),
    "train.best_metric": ("metric_for_best_model", "load_best_model_at_end", "save_best_model", "monitor"),
    "train.early_stopping_patience": ("early_stopping", "patience", "early_stop_patience"),
    "train.profile": ("profiler", "torch_profiler", "profiler_steps", "pytorch_profiler"),
    "train.gradient_checkpointing": ("activation_checkpointing", "use_gradient_checkpointing"),
    "train.schedule.type": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "train.schedule.warmup_ratio": ("warmup",),
    "train.schedule.constant_ratio": ("cosine_constant_lr_ratio",),
    "train.schedule.min_ratio": ("cosine_min_lr_ratio", "lr_scheduler_kwargs", "min_lr_rate", "min_lr_ratio"),
    "dpo.beta": ("rl_beta", "dpo_beta", "pref_beta"),
    "dpo.loss": ("loss_type", "loss_weights", "pref_loss", "rpo_alpha", "dpo_loss", "pref_ftx"),
    "dpo.label_smoothing": ("dpo_label_smoothing", "label_smoothing_factor"),
    "dpo.reference": ("ref_model", "reference_model"),
    "distributed.fsdp": ("fsdp_config", "fsdp_version", "deepspeed", "fsdp_sharding_strategy"),
    "distributed.state_dict": ("fsdp_state_dict_type", "state_dict_type"),
    "distributed.timeout_s": ("ddp_timeout",),
    "checkpoint.every_steps": ("save_steps", "saves_per_epoch", "save_strategy"),
    "checkpoint.keep": ("save_total_limit",),
    "evaluation.every_steps": ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"),
    "logging.every_steps": ("logging_steps",),
    "logging.report_to": ("wandb_project", "use_wandb", "use_mlflow", "use_tensorboard", "trackers"),
    "card.name": ("hub_model_id", "model_card_name"),
    "card.license": ("licence", "model_license"),
    "messages_field": ("field_messages", "conversation_field", "messages_column"),
    "role_field": ("message_field_role", "message_property_mappings", "role_column"),
    "content_field": ("message_field_content", "content_column"),
    "path": ("name_or_path", "data_files", "file", "file_name", "ds_type"),
    "subset": ("config_name", "dataset_config", "name"),
    "format": ("type", "formatting", "kind"),
    "language": ("lang",),
}  # fmt: skip
# Key of another tool: recipe key.
EQUIVALENT_KEYS = {theirs: ours for ours, names in OTHER_TOOL_KEYS.items() for theirs in names}
# Key of another tool without an equivalent: the reason.
UNSUPPORTED_KEYS = {
    "neftune_noise_alpha": "NEFTune is not supported",
    "greater_is_better": "train.best_metric determines the direction",
    "early_stopping_threshold": "any improvement of train.best_metric counts",
    "tensor_parallel_size": "tensor parallelism is not supported",
    "load_in_8bit": "only 4-bit quantization is supported (model.adapter.type: qlora)",
}


MAX_PROBLEMS = 50  # problems listed per file
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
    "too_short": "a list with items",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}
PATTERNS = {  # descriptions of the patterns in `builtin.py` and `cluster_rules.py`
    LINE: "one line of text",
    LICENSE: "a licence as the hub names it, in lower case, e.g. apache-2.0",
    VALUE: "text without null characters",
    SLURM_WORD: "one word without quotes, # or \\",
    SLURM_OPTION: "one option such as --exclusive or --mail-type=END, without blanks, quotes or #",
    MOUNT: "absolute paths, as /HOST, /HOST:/CONTAINER or /HOST:/CONTAINER:ro, without commas",
    VARIABLE_NAME: "a variable's name, of letters, digits and _",
}
EMPTY = ("too_short", "string_too_short", "string_pattern_mismatch")


def validated(
    document: Document, model: type[Model], raw: Mapping[str, Any], problems: Iterable[Problem] = ()
) -> Model:
    """The model of a document.

    Args:
        document: has the locations of the keys.
        model: the recipe class.
        raw: values to validate: those of the document, or the same as sections.
        problems: found before.

    Raises:
        RecipeError: with all problems.
    """
    found = list(problems)
    try:
        result = model.model_validate(raw)
    except ValidationError as error:
        found += recipe_problems(error, document, model)
    if found or document.problems:
        mistakes = limit_problems(_in_order([*document.problems, *found]), document)
        raise RecipeError(Problem(masked(one.where), masked(one.what), masked(one.remedy)) for one in mistakes)
    return result


def recipe_problems(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Problem]:
    """All problems of a recipe in file order: validation errors and findings of the lint rules."""
    by_path: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_path_in_file(item, document.value), []).append(item)
    findings = lint_problems(document)
    wrong = [*by_path, *(where for where, _ in findings)]
    above = {path[:end] for path in wrong for end in range(len(path))}  # a section is not reported if a key in it is
    found = sorted((path for path in by_path if path not in above), key=lambda path: _line(document, path))
    listed = [(path, _problem(path, by_path[path], document, model)) for path in found[: MAX_PROBLEMS + 1]]
    listed = sorted([*listed, *findings], key=lambda pair: _line(document, pair[0]))
    return limit_problems([problem for _, problem in listed], document, len(found) + len(findings))


def limit_problems(problems: list[Problem], document: Document, count: int | None = None) -> list[Problem]:
    """The first `MAX_PROBLEMS` problems of a file, and the number of the others. `count` is the total number."""
    remaining = (len(problems) if count is None else count) - MAX_PROBLEMS
    if remaining <= 0 or len(problems) <= MAX_PROBLEMS:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem(document.name, f"has {remaining:,} more problems", "correct these first")]


def _in_order(problems: list[Problem]) -> list[Problem]:
    def line(problem: Problem) -> int:
        tail = problem.where.rsplit(":", 1)[-1]
        return int(tail) if tail.isdigit() else 0

    return sorted(dict.fromkeys(problems), key=line)


def lint_problems(document: Document) -> list[tuple[KeyPath, Problem]]:
    """Findings of the lint rules, as problems with their key paths."""
    findings = lint(document.value if isinstance(document.value, Mapping) else {})
    return [(f.path, Problem(document.where(f.path), f"{_quoted(f.path)} {f.what}", f.remedy)) for f in findings]


def _problem(path: KeyPath, items: list[Mapping[str, Any]], document: Document, model: type[BaseModel]) -> Problem:
    where, key, item = document.where(path), f"`{_dotted(path)}`" if path else "the file", items[0]
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return Problem(where, f"unknown key {key}", suggest_key(model, path))
    if kind == "invalid_key":
        return Problem(where, f"the key {key} is not text", "write its name as text")
    if kind == "missing":
        what = f"{key} is missing" if len(path) > 1 else f"the key {key} is missing"
        return Problem(where, what, f"add it: {_description(model, path)}")
    if value is None:
        return Problem(where, f"{key} is not set", f"give it a value: {_description(model, path)}")
    if kind == PATH_ERROR:
        remedy = item["ctx"]["remedy"]
        return Problem(where, f"{key} {item['ctx']['what']}",
                       f'{remedy} --set {_dotted(path)}="{value}"' if remedy.endswith(":") else remedy)  # fmt: skip
    if kind == "value_error":
        return Problem(where, f"{key} is wrong ({item['ctx']['error']})", "correct it")
    blank = isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
    if blank and any(one["type"] in EMPTY for one in items):
        return Problem(where, f"{key} must not be empty", f"give it a value: {_description(model, path)}")
    if kind == "string_pattern_mismatch" and (words := PATTERNS.get(item["ctx"]["pattern"])):
        return Problem(where, f"{key} must be {words}, not {_value_text(value)}", f"write {words}")
    wanted = _alternatives(items)
    choices = [c for one in items if one["type"] == "literal_error" for c in _choices(one)]
    guess = closest(str(value), choices) if choices else None
    remedy = f"did you mean `{guess}`?" if guess else _remedy(path, value, wanted, model)
    return Problem(where, f"{key} must be {' or '.join(wanted)}, not {_value_text(value)}", remedy)


def suggest_key(model: type[BaseModel], path: KeyPath) -> str:
    """Remedy for the unknown key at `path`: its name in nesso-tune, its section, or its spelling."""
    *above, key = [str(part) for part in path if isinstance(part, str)]
    if key in UNSUPPORTED_KEYS:
        return f"remove it: {UNSUPPORTED_KEYS[key]}"
    section = section_at(model, path[:-1])
    siblings = list(section.model_fields) if section else []
    name = EQUIVALENT_KEYS.get(key, key)
    if name in siblings:
        return f"it is called `{'.'.join((*map(shortened, above), name))}` here"
    if places := _places(model, key, above):
        return f"it belongs to {places}"
    if places := _places(model, name, above):
        return f"it is called {places} here"
    parent: Any = model.__base__  # the recipe classes have a common one
    for other in parent.__subclasses__() if "method" in model.model_fields else ():
        if places := _places(other, name, above):
            return f"remove it: {places} is only for method: {other.model_fields['method'].default}"
    everywhere = sorted({names[-1] for names in key_paths(model)})
    for names, cutoff in ((siblings, 0.8), (everywhere, 0.8), (siblings, 0.6)):
        if guess := closest(key, names, cutoff):
            here = ".".join(shortened(str(part)) for part in (*path[:-1], guess))  # with list indices, as in --set
            places = f"`{here}`" if guess in siblings else _places(model, guess, above)
            return f"did you mean {places}?"
    return f"remove it; the keys here are {', '.join(siblings)}"


def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The section model at `path` (list indices are skipped); the model itself at the root."""
    names = tuple(part for part in path if isinstance(part, str))
    if not names:
        return model
    return key_paths(model).get(names) or key_paths(model).get(names[:-1])  # a user-defined name, as in rules.en


@cache
def key_paths(model: type[BaseModel]) -> dict[tuple[str, ...], type[BaseModel] | None]:
    """All keys of `model` by path (without list indices), each with its section model, if any."""
    out: dict[tuple[str, ...], type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        out[(name,)] = section
        if section is not None:
            out |= {(name, *below): kind for below, kind in key_paths(section).items()}
    return out


def _places(model: type[BaseModel], name: str, section: list[str]) -> str:
    """Paths of a key (a name or a dotted path), those in `section` if there are any; "" if there are none."""
    wanted = tuple(name.split("."))
    found = [names for names in key_paths(model) if names[-len(wanted) :] == wanted]
    found = [names for names in found if "validation_sources" not in names[:-1]]  # `sources` has the same keys
    found = [names for names in found if list(names[: len(section)]) == section] or found
    return " or ".join(f"`{'.'.join(names)}`" for names in found)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section model in a field's annotation, unwrapping Optional, tuple and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg))), None)


def _remedy(path: KeyPath, value: Any, wanted: list[str], model: type[BaseModel]) -> str:
    """The most likely intended value."""
    if isinstance(value, str):
        number = value.strip().replace(",", ".")
        if any(word.startswith("a number") or word == "a whole number" for word in wanted) and _is_number(number):
            return f"write {number}, without quotes and with a decimal point"
        section = section_at(model, path) if "a section of keys" in wanted else None
        required = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
        if len(required) == 1:
            name = path[-1] if isinstance(path[-1], str) else "-"
            return f"write `{name}{':' if name != '-' else ''} {{{required[0]}: {value}}}`"
    return f"write {' or '.join(wanted)}"


def _is_number(text: str) -> bool:
    """Whether a text is a finite number: `nan` and `inf` are not values to suggest."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _alternatives(items: list[Mapping[str, Any]]) -> list[str]:
    """Expected values of all union branches, without duplicates."""
    first_bound = next((one for one in items if one["type"] in BOUNDS), None)
    wanted = dict.fromkeys(_wanted(one) for one in items if one["type"] not in BOUNDS or one is first_bound)
    return [words for words in wanted if words != "a whole number" or "a number" not in wanted]


def _wanted(item: Mapping[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        choices = _choices(item)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return f"a number {words} {context[bound]:.12g}"
    return EXPECTED.get(kind) or str(item["msg"]).lower()


def _choices(item: Mapping[str, Any]) -> list[str]:
    return [word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]


@cache
def key_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The docstring of each key of a section.

    They are read from the source on first use. pydantic's `use_attribute_docstrings` reads it on every import, which
    takes a tenth of the time of `check`.
    """
    found: dict[str, str] = {}
    own = [kind for kind in reversed(model.__mro__) if issubclass(kind, BaseModel) and kind is not BaseModel]
    for section in own:
        (definition,) = ast.parse(dedent(inspect.getsource(section))).body
        assert isinstance(definition, ast.ClassDef)
        for key, text in pairwise(definition.body):
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
                found[key.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _description(model: type[BaseModel], path: KeyPath) -> str:
    """Description of a key in the schema."""
    names = [part for part in path if isinstance(part, str)] or [""]
    section = section_at(model, tuple(names[:-1]))
    text = key_descriptions(section).get(names[-1], "see the schema") if section else "see the schema"
    return text[0].lower() + text[1:].rstrip(".")


def _value_text(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quoted(path: KeyPath) -> str:
    return f"`{_dotted(path)}`" if path else "a key"


def _dotted(path: KeyPath) -> str:
    return ".".join(shortened(str(part)) for part in path)


def _line(document: Document, path: KeyPath) -> int:
    where = document.where(path).rsplit(":", 1)[-1]
    return int(where) if where.isdigit() else 0


def _path_in_file(item: Mapping[str, Any], value: Any) -> KeyPath:
    """The part of pydantic's location that exists in the file: union branches are not keys."""
    path: list[str | int] = []
    for part in item["loc"]:
        in_list = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, Mapping) and part in value):
            value = value[part]
            path.append(part)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else tuple(path)
