"""Every inert or contradictory knob is found, and nothing else is."""

import math

import pytest
from ruamel.yaml import YAML

from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import find_recipe, shipped_recipes
from nesso_tune.recipes.cluster_rules import slurm_seconds
from nesso_tune.recipes.rules import RULES, lint
from nesso_tune.recipes.secrets import masked, secret_kind
from tests.support.recipe_texts import SFT, read


def yaml(text):
    return YAML(typ="safe", pure=True).load(text)


def schedule(text):
    return f"train: {{schedule: {{{text}}}}}"


def source(text):
    return f"data: {{sources: [{{path: a}}, {{path: b, {text}}}]}}"


# name: (recipe, path of the finding, words)
FIRES = {
    "compiled pairs": ("{method: dpo, train: {torch_compile: true}}", "train.torch_compile", "which pairs do not have"),
    "compiled rows of any length": (
        "{data: {packing: false}, train: {torch_compile: true}}", "train.torch_compile", "rows that are not packed",
    ),
    "flash in float32": (
        "{model: {attention: flash, dtype: float32}}", "model.attention", "flash kernels do not compute in float32",
    ),
    "constant, an end": (schedule("type: constant, constant_ratio: 0.5"), "train.schedule.constant_ratio", "effect"),
    "constant with a floor": (schedule("type: constant, min_ratio: 0.1"), "train.schedule.min_ratio", "no effect"),
    "two warm-ups": (schedule("warmup_ratio: 0.1, warmup_steps: 5"), "train.schedule.warmup_steps", "contradicts"),
    "warm-up to the end": (
        schedule("warmup_ratio: 0.5, constant_ratio: 0.5, min_ratio: 0.1"),
        "train.schedule.warmup_ratio",
        "should end at 0.5",
    ),
    "warm-up beyond the end": (
        schedule("warmup_ratio: 0.5, constant_ratio: 0.4, min_ratio: 0"), "train.schedule.warmup_ratio", ".4",
    ),
    "a rest without a rate": (
        schedule("type: linear, constant_ratio: 0.8"), "train.schedule.constant_ratio", "for the last 20% of the run",
    ),
    "a template": ("chat: {template: chatlm}", "chat.template", "`chatlm` is not known"),
    "a default system message": (
        "chat: {default_system: {Italian: x}}", "chat.default_system.Italian", "`Italian` is not a language code",
    ),
    "a shape": ("model: {overrides: {hidden_size: 8}}", "model.overrides.hidden_size", "changes the shape of weights"),
    "a dtype of the config": ("model: {overrides: {dtype: x}}", "model.overrides.dtype", "is set by another key"),
    "turns of texts": (
        "data: {turns_to_train: last, sources: [{path: a, format: completion}]}", "data.turns_to_train", "no effect",
    ),
    "a format": (source("format: sharegtp"), "data.sources.1.format", "`sharegtp` is not known"),
    "a language": (source("language: Pyhton"), "data.sources.1.language", "`Pyhton` is not a language code"),
    "a language's rule": (source("rules: {IT: {weight: 2}}"), "data.sources.1.rules.IT", "`IT` is not a language code"),
    "a language's share": (
        "data: {mixture: {by: language, shares: {it: 0.5, EN: 0.5}}}", "data.mixture.shares.EN", "not a language code",
    ),
    "two lengths": ("train: {num_epochs: 1, max_steps: 5}", "train.num_epochs", "contradicts train.max_steps"),
    "two batches": (
        "train: {global_batch_size: 8, gradient_accumulation_steps: 2}", "train.gradient_accumulation_steps",
        "contradicts train.global_batch_size",
    ),
    "two splits": ("data: {validation_size: 50, validation_sources: [{path: v}]}", "data.validation_size", "beside"),
    "adapter over nothing": ("model: {random_init: true, adapter: {r: 4}}", "model.adapter", "not useful"),
    "shares of a qlora": (
        "{model: {adapter: {type: qlora}}, distributed: {fsdp: full_shard}}", "distributed.fsdp",
        "contradicts model.adapter.type: qlora, whose 4-bit weights cannot be sharded",
    ),
    "shards of a qlora": (
        "{model: {adapter: {type: qlora}}, distributed: {state_dict: sharded}}", "distributed.state_dict",
        "cannot be sharded",
    ),
    "shares of 8-bit moments": (
        "{train: {optimizer: adamw_8bit}, distributed: {fsdp: full_shard}}", "distributed.fsdp",
        "contradicts train.optimizer: adamw_8bit, whose 8-bit moments cannot be sharded",
    ),
    "shards of 8-bit moments": (
        "{train: {optimizer: adamw_8bit}, distributed: {state_dict: sharded}}", "distributed.state_dict",
        "cannot be sharded",
    ),
    "revision of nothing": ("model: {random_init: true, revision: main}", "model.revision", "no effect"),
    "smoothing of sigmoid": ("dpo: {label_smoothing: 0.1}", "dpo.label_smoothing", "no effect on the loss sigmoid"),
    "smoothing of others": (
        "dpo: {label_smoothing: 0.1, loss: {ipo: 1.0, sft: 0.1}}", "dpo.label_smoothing", "the loss ipo, sft",
    ),
    "exo without smoothing": ("dpo: {loss: {exo_pair: 1.0}}", "dpo.loss", "needs label_smoothing"),
    "micro batch of no batch": (
        "train: {micro_batch_size: auto}", "train.micro_batch_size", "auto needs the number of rows of a step",
    ),
    "micro batch of a varying batch": (
        "train: {micro_batch_size: auto, gradient_accumulation_steps: 8}", "train.micro_batch_size", "auto needs",
    ),
    "sorted by auto": (
        "{dpo: {loss: {aot: 1.0}}, train: {micro_batch_size: auto, global_batch_size: 16}}", "dpo.loss",
        "aot sorts all pairs of a step, which micro_batch_size: auto may split",
    ),
    "sorted by parts": (
        "{dpo: {loss: {aot: 1.0}}, train: {micro_batch_size: 4, global_batch_size: 16}}", "dpo.loss",
        "aot sorts all pairs of a step, but its 16 pairs are in micro batches of 4",
    ),
    "sorted by accumulation": (
        "{dpo: {loss: {sft: 1.0, aot_unpaired: 1.0}}, train: {gradient_accumulation_steps: 3}}", "dpo.loss",
        "aot_unpaired sorts all pairs of a step, but its 3",
    ),
    "sorted alone": ("dpo: {loss: {aot: 1.0}}", "dpo.loss", "needs more than one pair per step"),
    "alike": ("dpo: {ld_alpha: 1.0}", "dpo.ld_alpha", "like null"),
    "answer in messages": (source("format: messages, response_field: x"), "data.sources.1.response_field", "messages"),
    "prompt in sharegpt": (source("format: sharegpt, prompt_field: x"), "data.sources.1.prompt_field", "sharegpt"),
    "messages in alpaca": (source("format: alpaca, roles: {utente: user}"), "data.sources.1.roles", "alpaca"),
    "pair in alpaca": (source("format: alpaca, chosen_field: x"), "data.sources.1.chosen_field", "alpaca"),
    "input in messages": (source("format: messages, input_field: x"), "data.sources.1.input_field", "messages"),
    "score of what": (source("min_score: 1"), "data.sources.1.min_score", "needs score_field"),
    "score for what": (source("score_field: q"), "data.sources.1.score_field", "without min_score"),
    "two languages": (source("language: it, language_field: l"), "data.sources.1.language_field", "beside language"),
    "score of a rule": (source("rules: {en: {min_score: 1}}"), "data.sources.1.rules.en.min_score", "score_field"),
    "score of what is not kept": (
        source("score_field: q, rules: {en: {keep: false, min_score: 1}}"), "data.sources.1.rules.en.min_score",
        "together with keep: false",
    ),
    "text in messages": (source("format: messages, text_field: x"), "data.sources.1.text_field", "format: messages"),
    "columns of a reader": (source("format: a.py:f, prompt_field: x"), "data.sources.1.prompt_field", "user-defined"),
    "weight of a rule held out": (
        "data: {validation_sources: [{path: v, rules: {it: {weight: 2.0}}}]}",
        "data.validation_sources.0.rules.it.weight", "sees every row once",
    ),
    "shares of more than all": (
        "data: {mixture: {by: language, shares: {it: 0.6, en: 0.6}}}", "data.mixture.shares", "sum to 1.2",
    ),
    "shares of nobody": (
        "data: {sources: [{path: a.jsonl}], mixture: {by: source, shares: {a.json: 1.0}}}",
        "data.mixture.shares.a.json", "is not a source",
    ),
    "shares and weights": (
        "data: {sources: [{path: a, weight: 2.0}], mixture: {by: language, shares: {it: 1.0}}}",
        "data.sources.0.weight", "contradicts data.mixture",
    ),
    "personal data in token ids": (
        "data: {clean: {personal_data: mask}, sources: [{path: a, format: pretokenized}]}",
        "data.sources.0.format", "cannot be searched",
    ),
    "overlap with nothing": (
        "data: {validation_size: 0, clean: {validation_overlap: drop}}", "data.clean.validation_overlap",
        "no validation rows",
    ),
    "a late warning": (
        "data: {preferences: {conflicting: {warn: 0.5, fail: 0.1}}}", "data.preferences.conflicting.warn", "never",
    ),
    "patience for nothing": (
        "train: {early_stopping_patience: 2}", "train.early_stopping_patience", "requires train.best_metric",
    ),
    "the best of what": ("train: {best_metric: eval_los}", "train.best_metric", "select weights"),
    "the best of a reward": (
        "{method: dpo, train: {best_metric: eval_rewards/chosen}}", "train.best_metric", "not a metric",
    ),
    "the best of no evaluation": ("{evaluation: null, train: {best_metric: eval_loss}}", "train.best_metric", "null"),
    "the best of nothing held out": (
        "{data: {validation_size: 0}, train: {best_metric: eval_loss/it}}", "train.best_metric", "there are none",
    ),
    "the best of no answers": (
        "{evaluation: {samples: 0}, train: {best_metric: stop_rate}}", "train.best_metric", "evaluation.samples is 0",
    ),
    "the best of another method": (
        "{method: sft, train: {best_metric: eval_rewards/accuracies}}", "train.best_metric", "method: dpo only",
    ),
    "the best of no source": (
        "{data: {sources: [{path: a}, {path: b, alias: bb}]}, train: {best_metric: eval_loss/source/b}}",
        "train.best_metric", "data.sources has no source of this name",
    ),
    "the best of a source that is only trained on": (
        "{data: {sources: [{path: a}, {path: b}], validation_sources: [{path: c}, {path: d}]},"
        " train: {best_metric: stop_rate/source/a}}", "train.best_metric", "data.validation_sources has no source",
    ),
    "the best of the one source": (
        "{data: {sources: [{path: a}]}, train: {best_metric: eval_loss/source/a}}", "train.best_metric", "several",
    ),
    "shards of nothing": ("distributed: {fsdp: none, state_dict: sharded}", "distributed.state_dict", "no effect"),
    "GPUs said twice": ("cluster: {gpus_per_node: 4, extra: [--exclusive, --gres=gpu:8]}", "cluster.extra.1",
                        "--gres is set by other keys"),
    "time said twice": ('cluster: {extra: ["--time=1:00:00"]}', "cluster.extra.0", "--time"),
    "an abbreviation": ('cluster: {extra: ["--gpus-per-no=3"]}', "cluster.extra.0", "--gpus-per-node is set"),
    "many jobs": ('cluster: {extra: ["--array=1-2"]}', "cluster.extra.0", "--array"),
    "a number of Slurm's own": ("cluster: {env: {SLURM_NNODES: '4'}}", "cluster.env.SLURM_NNODES", "by the job"),
    "a home": ("cluster: {python: ~/venv/bin/python}", "cluster.python", "is not expanded"),
    "an image at home": ("cluster: {container: ~/a.sif}", "cluster.container", "is not expanded"),
    "mounts said twice": ("cluster: {container: {image: a, options: [--env=A=b, '--bind /a']}}",
                          "cluster.container.options.1", "--bind is set"),
    "a container without Slurm's variables": ("cluster: {container: {image: a, options: [--cleanenv]}}",
                                              "cluster.container.options.0", "--cleanenv is set"),
    "options of an interpreter": ("cluster: {python: python3 -u}", "cluster.python", "is the path of an interpreter"),
    "two modules": ("cluster: {modules: [gcc/13 openmpi]}", "cluster.modules.0", "is more than one word"),
    "a kind of GPU": ("cluster: {gpu_type: gpu:a100}", "cluster.gpu_type", "is the type alone"),
    "hours": ("cluster: {time: 24h}", "cluster.time", "24h is not a time of Slurm"),
    "a time that is over": ("cluster: {time: '5:00'}", "cluster.time", "not longer than save_before_s (300 s)"),
    "another time that is over": (
        "cluster: {time: '1:00:00', save_before_s: 7200}", "cluster.time", "not longer than save_before_s (7200 s)"),
    "hours of the CPU job": ("cluster: {prepare: {time: 2h}}", "cluster.prepare.time", "2h is not a time of Slurm"),
    "a type of no GPU": ("cluster: {gpu_option: none, gpu_type: a100}", "cluster.gpu_type", "has no effect"),
    "a container as interpreter": ("cluster: {python: /usr/bin/apptainer exec a.sif python}", "cluster.python",
                                   "not a command"),
    "tasks said twice": ("cluster: {srun_options: [--mpi=none, --ntasks=4]}", "cluster.srun_options.1", "--ntasks"),
    "a time of the CPU job": ("cluster: {prepare: {extra: ['--time=1:00:00']}}", "cluster.prepare.extra.0", "--time"),
    "a token in a job": ("cluster: {env: {HF_TOKEN: x}}", "cluster.env.HF_TOKEN", "is a secret"),
    "a token anywhere": (source("split: hf_abcdefghijklmnopqrst0"), "data.sources.1.split", "looks like a secret"),
    "a way out": ("output_dir: ../elsewhere", "output_dir", "outside"),
    "threads said twice": ("cluster: {env: {OMP_NUM_THREADS: '4'}}", "cluster.env.OMP_NUM_THREADS", "by the job"),
    "in a validation source": (
        "data: {validation_sources: [{path: v, min_score: 1}]}", "data.validation_sources.0.min_score", "score_field",
    ),
}  # fmt: skip

SILENT = {
    "shards": "distributed: {state_dict: sharded}",
    "the best loss": "train: {best_metric: eval_loss, early_stopping_patience: 3}",
    "the best of a source": "train: {best_metric: eval_loss/source/a.jsonl}",
    "the best of one of several": (
        "{data: {sources: [{path: ~/a}, {path: b}]}, train: {best_metric: eval_loss/source/~/a}}"
    ),
    "the best of a private source": (
        "{data: {sources: [{path: a, private: true}, {path: a}]}, train: {best_metric: eval_loss/source/a}}"
    ),
    "the best of a private source by its number": (
        "{data: {validation_sources: [{path: a, private: true}, {path: b}]},"
        " train: {best_metric: eval_loss/source/private validation source 1}}"
    ),
    "the best of a source that is trained on": (
        "{data: {sources: [{path: a}, {path: b}], validation_sources: [{path: c}]},"
        " train: {best_metric: train_stop_rate/source/a}}"
    ),
    "the best of a language": "{method: dpo, train: {best_metric: eval_rewards/accuracies/it}}",
    "the best on training prompts": "{data: {validation_size: 0}, train: {best_metric: train_stop_rate}}",
    "the best of what is held out": (
        "{data: {validation_size: 0, validation_sources: [{path: v}]}, train: {best_metric: eval_loss}}"
    ),
    "job": "cluster: {extra: [--exclusive, --mail-type=END], env: {NCCL_DEBUG: INFO}}",
    "container": "cluster: {container: {image: a, options: [--env=A=b]}, srun_options: [--cpu-bind=none]}",
    "nothing": "{}",
    "a rest without a rate, said": schedule("constant_ratio: 0.8, min_ratio: 0"),
    "languages by their names": source("language: Italiano, rules: {other: {weight: 2}, und: {keep: false}}"),
    "cosine": schedule("type: cosine, constant_ratio: 0.8, min_ratio: 0.3, warmup_ratio: 0.03"),
    "unset knobs": schedule(
        "type: constant, constant_ratio: null, min_ratio: null, warmup_steps: 5, warmup_ratio: null"
    ),
    "one length": "train: {num_epochs: null, max_steps: 5}",
    "auto": "train: {global_batch_size: 8, micro_batch_size: auto}",
    "one batch": "train: {global_batch_size: 8, gradient_accumulation_steps: null}",
    "validation sources alone": "data: {validation_size: 0, validation_sources: [{path: v}]}",
    "random weights": "model: {random_init: true, adapter: null, revision: null}",
    "adapter": "model: {random_init: false, adapter: {r: 4}, revision: main}",
    "qlora on many GPUs": "{model: {adapter: {type: qlora}}, cluster: {nodes: 2}, distributed: {fsdp: auto}}",
    "8 bits on many GPUs": "{train: {optimizer: adamw_8bit}, cluster: {nodes: 2}, distributed: {fsdp: none}}",
    "dora, shared": "{model: {adapter: {type: dora}}, cluster: {nodes: 2}, distributed: {fsdp: full_shard}}",
    "robust": "dpo: {label_smoothing: 0.1, loss: {robust: 1.0}}",
    "exo": "dpo: {label_smoothing: 0.001, loss: {exo_pair: 1.0}}",
    "length": "dpo: {ld_alpha: 0.5}",
    "sorted": "{dpo: {loss: {aot: 1.0}}, train: {micro_batch_size: 16, global_batch_size: 16}}",
    "messages": source("format: messages, messages_field: m, role_field: r, content_field: c, roles: {a: user}"),
    "preference": source("format: preference, prompt_field: p, chosen_field: c, rejected_field: r"),
    "alpaca": source("format: alpaca, prompt_field: p, input_field: i, response_field: r"),
    "own format": source("format: mine.yaml, response_field: x, roles: {a: user}"),
    "score": source("min_score: 1, score_field: q"),
    "language": source("language: null, language_field: l"),
    "wrong types": "{train: {schedule: [1]}, data: {sources: [3, null, {format: [a]}]}, model: true, dpo: {loss: [x]}}",
}


@pytest.mark.parametrize(("text", "path", "words"), FIRES.values(), ids=FIRES)
def test_it_fires(text, path, words):
    (finding,) = lint(yaml(text))
    assert ".".join(map(str, finding.path)) == path
    assert words in finding.what
    assert finding.remedy


@pytest.mark.parametrize("text", SILENT.values(), ids=SILENT)
def test_it_is_silent(text):
    assert lint(yaml(text)) == []


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_clean_with_their_defaults_filled_in(name):
    assert lint(yaml(find_recipe(name).read_text())) == []
    assert lint(yaml(load_recipe(name).to_yaml())) == []


def test_every_rule_has_a_case():
    silent = [rule.__name__ for rule in RULES if not any(list(rule(yaml(text))) for text, _, _ in FIRES.values())]
    assert silent == []


def test_a_finding_stops_a_recipe():
    assert read(SFT + "train: {schedule: {type: constant}}\n").train.schedule.type == "constant"


@pytest.mark.parametrize(
    "said",
    ["data/sk-parallel-corpus-v2.jsonl", "org/en-sk-translation-corpus", "meta/sk-llama-3b-instruct-v1",
     "runs/hf_conversazioniitaliane", "a94a8fe5ccb19ba61c4c0873d391e987982fbbd3", "sk-some-long-words-of-a-name"],
)  # fmt: skip
def test_names_that_are_no_secrets(said):
    assert secret_kind(said) is None


@pytest.mark.parametrize("said", ["hf_" + "aB3" * 11, "sk-proj-" + "aB3" * 12, "sk-" + "aB3" * 16, "ghp_" + "aB3" * 12])
def test_a_secret_is_seen_and_masked(said):
    assert secret_kind(f"x {said}") is not None
    assert said not in masked(f"x {said} y")


def test_code_of_the_hub_may_be_pinned_without_its_weights():
    assert not lint({"model": {"random_init": True, "trust_remote_code": True, "revision": "a1" * 20}})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("5:30", 330), ("24:00:00", 86_400), ("1-12", 129_600), ("1-0:30", 88_200), ("2-1:02:03", 176_523),
     ("UNLIMITED", math.inf), ("24h", None), ("1-", None), ("1:2:3:4", None)],
)  # fmt: skip
def test_time_limits_of_slurm(time, seconds):
    assert slurm_seconds(time) == seconds
