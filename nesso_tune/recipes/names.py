"""What other tools call things, and what a misspelt name was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Keys of Axolotl, TRL / transformers and LLaMA-Factory, by what they are called here.
CALLED_HERE: dict[str, tuple[str, ...]] = {
    "method": ("rl", "stage", "task", "rl_type"),
    "output_dir": ("output", "out_dir", "output_path", "save_dir"),
    "model.base": ("base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path"),
    "model.revision": ("revision_of_model", "model_revision"),
    "model.attention": ("flash_attention", "flash_attn", "attn_implementation", "sdp_attention", "xformers_attention"),
    "model.dtype": ("bf16", "fp16", "tf32", "torch_dtype", "precision"),
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
    "data.validation_size": ("val_set_size", "val_size", "test_size", "eval_size", "validation_split"),
    "data.validation_sources": ("test_datasets", "eval_dataset", "eval_datasets", "validation_dataset"),
    "data.mixture": ("mix_strategy", "interleave_probs", "probabilities", "dataset_mixture", "interleave"),
    "data.clean.duplicates": ("dataset_exact_deduplication", "deduplicate", "dedup", "exact_duplicates"),
    "data.clean.near_duplicates": ("minhash", "near_dedup", "fuzzy_dedup"),
    "data.clean.decontaminate": ("decontamination", "decontaminate_against"),
    "data.too_long": ("excess_length_strategy", "truncation_mode", "packing_strategy"),
    "train.num_epochs": ("num_train_epochs", "epochs", "n_epochs"),
    "train.max_steps": ("max_train_steps", "steps", "num_steps"),
    "train.micro_batch_size": ("per_device_train_batch_size", "batch_size", "per_device_eval_batch_size"),
    "train.gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "gradient_accumulation"),
    "train.global_batch_size": ("effective_batch_size", "total_batch_size"),
    "train.learning_rate": ("lr", "learning_rate_peak"),
    "train.optimizer": ("optim", "optimiser"),
    "train.adam_epsilon": ("eps",),
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
    "messages_field": ("field_messages", "conversation_field", "messages_column"),
    "role_field": ("message_field_role", "message_property_mappings", "role_column"),
    "content_field": ("message_field_content", "content_column"),
    "path": ("name_or_path", "data_files", "file", "file_name", "ds_type"),
    "subset": ("config_name", "dataset_config", "name"),
    "format": ("type", "formatting", "kind"),
    "language": ("lang",),
}  # fmt: skip
FOREIGN = {theirs: ours for ours, names in CALLED_HERE.items() for theirs in names}
NAMES_LIST = {
    "neftune_noise_alpha": "NEFTune is not offered",
    "greater_is_better": "the name of train.best_metric says which way is better",
    "early_stopping_threshold": "any improvement of train.best_metric counts",
    "tensor_parallel_size": "tensor parallelism is not in version 1",
    "load_in_8bit": "a base is held in 4 bits (model.adapter.type: qlora) or not quantised",
}


LANGUAGE_NAMES = {
    "italian": "it", "italiano": "it", "ita": "it", "english": "en", "inglese": "en", "eng": "en", "french": "fr",
    "german": "de", "spanish": "es", "portuguese": "pt",
}  # fmt: skip
OTHER_LANGUAGES = ("other", "und")  # all that are not named; rows that say no language
CODE = re.compile(r"[a-z]{2,3}")


def language_code(said: str) -> str | None:
    """`it` for `it`, `IT`, `it-IT`, `ita` and `Italian`; None for what is no code, e.g. `Python`."""
    code = said.strip().lower().replace("_", "-").split("-")[0]
    code = LANGUAGE_NAMES.get(code, code)
    return code if CODE.fullmatch(code) else None


LONGEST = 200  # characters from which a word is no misspelt name


def closest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` was most likely meant to be, or None."""
    if len(word) > LONGEST:
        return None
    short = [choice for choice in choices if len(choice) <= LONGEST]  # a comparison's time grows with both lengths
    found = difflib.get_close_matches(word.lower(), short, n=1, cutoff=cutoff)
    return found[0] if found else None


def shortened(text: str, most: int = 60) -> str:
    """A name or value as a message shows it: whole, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[: most - 20]}... ({len(text):,} characters)"
