"""Sixty-eight faults planted in the code, one at a time: the tests named beside each of them must fail.

    python scripts/mutants.py             # all
    python scripts/mutants.py --only mask # those whose name contains a word

Each mutant replaces one piece of code in a copy of the source tree and runs the tests that should notice. A mutant that
survives is a hole in the tests: the script lists it and ends with exit code 1. The same tests first run without a fault
and must pass. Run it after a change of the test suite.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("nesso_tune", "tests", "recipes", "data_templates", "scripts", "docs", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, the only occurrence of `old` becomes `new`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


RENDER, ENCODE, CHAT = "chat/render.py", "chat/encoding.py", "tests/chat/test_encoding.py tests/chat/test_render.py"
PACK, PACKING = "data/packing.py", "tests/data/test_packing.py"
MIX, MIXTURE = "data/mixture.py", "tests/data/test_mixture.py"
FAMILIES, REASONING = "tests/chat/test_families.py", "tests/data/test_reasoning.py"
RATE, RATES = "lr_schedule.py", "tests/test_lr_schedule.py"
HEAD, HEADS = "model/lm_head.py", "tests/model/test_lm_head.py tests/training/test_dpo_step.py"
SFT, DPO, LOSS, BATCH = "training/sft.py", "training/dpo.py", "training/losses.py", "training/dataset.py"
STEPS = "tests/training/test_sft.py tests/training/test_dpo_step.py tests/training/test_dpo.py"
SAVE, SAVED = "runs/checkpoint.py", "tests/runs/test_checkpoint.py tests/runs/test_run_directory.py"
TENSORS, STATE = "training/state_dict.py", "training/run_state.py"
RESUME, RESUMED = "runs/resume.py", "tests/runs/test_resume.py tests/runs/test_run_directory.py"
RULE, RULES = "recipes/rules.py", "tests/recipes/test_rules.py"
DATA_RULE = "recipes/data_rules.py"

MUTANTS = (
    # masks
    Mutant(
        "mask: role ignored",
        RENDER,
        "message.role in roles_to_train if message.train is None",
        "True if message.train is None",
        CHAT,
    ),
    Mutant(
        "mask: train flag ignored",
        RENDER,
        "if message.train is None else message.train for",
        "if True else message.train for",
        CHAT,
    ),
    Mutant("mask: end of later turns", RENDER, '"last": i == last', '"last": i >= last', CHAT),
    Mutant("mask: end token of every turn", RENDER, '{"turn": trained[i]', '{"turn": True', CHAT),
    Mutant("mask: end tokens of trained turns only", RENDER, '"all": True', '"all": trained[i]', CHAT),
    Mutant(
        "mask: header supervised",
        RENDER,
        "[*_template_segments(template, start), ",
        "[*_template_segments(template, start, trained), ",
        CHAT,
    ),
    Mutant(
        "mask: separator supervised",
        RENDER,
        "_template_segments(template, separator)",
        "_template_segments(template, separator, trained)",
        CHAT,
    ),
    Mutant("mask: no BOS", RENDER, 'out = [Segment(BOS, "control")] if template.bos else []', "out = []", CHAT),
    Mutant(
        "mask: default system of no language",
        RENDER,
        "default_system.get(language, first)",
        "default_system.get(language)",
        CHAT,
    ),
    Mutant("templates: history keeps reasoning", RENDER, "if i < last_user:", "if False:", FAMILIES),
    Mutant("templates: prompt supervised", RENDER, 'start + reasoning, ""', "start, reasoning", FAMILIES),
    Mutant("templates: results in turns of their own", RENDER, "not 0 < i < len(messages)", "True", FAMILIES),
    Mutant("turns: earlier ones supervised", RENDER, "[False] * last + [True]", "trained[: last + 1]", REASONING),
    Mutant(
        "turns: no prompt leads there", RENDER, "for message in messages[i + 1 :])", "for message in ())", REASONING
    ),
    Mutant("reasoning: default keeps it", "data/reasoning.py", 'if data.reasoning == "error":', "if False:", REASONING),
    Mutant(
        "reasoning: equal pairs",
        "data/convert.py",
        "better.tool_calls, better.reasoning) == (worse.content, worse.tool_calls, worse.reasoning)",
        "better.tool_calls) == (worse.content, worse.tool_calls)",
        REASONING,
    ),
    Mutant("mask: labels everywhere", ENCODE, "token if yes else IGNORE_INDEX for", "token for", CHAT),
    Mutant(
        "mask: cut at a turn of an end token",
        ENCODE,
        "any(self.trained[start : end - 1])",
        "any(self.trained[start:end])",
        CHAT + " tests/data/test_faults.py",
    ),
    Mutant(
        "mask: cut beyond the length",
        ENCODE,
        "if end <= length and any",
        "if end <= length + 1 and any",
        CHAT + " tests/data/test_faults.py",
    ),
    Mutant(
        "mask: special tokens from text",
        ENCODE,
        "return ids if self._special.isdisjoint(ids) else self._split_special(text)",
        "return ids",
        CHAT + " tests/chat/test_special_tokens.py",
    ),
    Mutant(
        "mask: special tokens encoded",
        ENCODE,
        "self._tokenizer.encode_special_tokens = True",
        "self._tokenizer.encode_special_tokens = False",
        CHAT,
    ),
    # packing and mixture
    Mutant(
        "packing: capacity exceeded", PACK, "fitting = spaces >> length", "fitting = spaces >> (length - 1)", PACKING
    ),
    Mutant("packing: loosest fit", PACK, "(fitting & -fitting).bit_length()", "fitting.bit_length()", PACKING),
    Mutant("packing: filled space stays marked", PACK, "spaces ^= 1 << space", "pass", PACKING),
    Mutant(
        "packing: one order for all epochs",
        PACK,
        "default_rng([self._seed, epoch])",
        "default_rng([self._seed, 0])",
        PACKING,
    ),
    Mutant("packing: seed ignored", PACK, "default_rng([self._seed, epoch])", "default_rng([0, epoch])", PACKING),
    Mutant(
        "packing: stale packing",
        PACK,
        "if self._packing is None or self._packing[0] != key:",
        "if self._packing is None:",
        PACKING + " " + MIXTURE,
    ),
    Mutant(
        "packing: shortest first",
        PACK,
        "(rng.random(len(records)), -lengths)",
        "(rng.random(len(records)), lengths)",
        PACKING,
    ),
    Mutant(
        "mixture: fraction ignored",
        MIX,
        "round((self.repeats - whole) * len(self.records))",
        "round((self.repeats - whole) * 0)",
        PACKING,
    ),
    Mutant(
        "mixture: same sample each epoch",
        MIX,
        "shuffled = rng.permutation(self.records)",
        "shuffled = self.records",
        MIXTURE,
    ),
    Mutant("mixture: repeat ignored", MIX, "min(mixture.repeat * int(", "min(int(", MIXTURE),
    # schedule
    Mutant(
        "schedule: warm-up one step early",
        RATE,
        "return step / warmup_steps",
        "return (step + 1) / warmup_steps",
        RATES,
    ),
    Mutant(
        "schedule: no floor",
        RATE,
        "return min_ratio + (1.0 - min_ratio) * _decay(progress, shape)",
        "return _decay(progress, shape)",
        RATES,
    ),
    Mutant(
        "schedule: decay to the end", RATE, "decay_end = constant_ratio * total_steps", "decay_end = total_steps", RATES
    ),
    Mutant(
        "schedule: decay during warm-up",
        RATE,
        "(step - warmup_steps) / (decay_end - warmup_steps)",
        "step / decay_end",
        RATES,
    ),
    Mutant("schedule: linear is cosine", RATE, 'if shape == "cosine":', "if True:", RATES),
    Mutant(
        "schedule: constant decays",
        RATE,
        'if shape == "constant":\n        return 1.0',
        'if shape == "none":\n        return 1.0',
        RATES,
    ),
    # losses
    Mutant(
        "loss: processes not counted",
        SFT,
        "num_items_in_batch, self.accelerator.num_processes)",
        "num_items_in_batch, 1)",
        "tests/distributed/test_process_group.py",
    ),
    Mutant(
        "loss: doubled",
        LOSS,
        "return -log_probs.sum() / num_tokens * scale",
        "return -2 * log_probs.sum() / num_tokens * scale",
        STEPS + " tests/training/test_independent.py",
    ),
    Mutant(
        "loss: accuracy counted twice",
        SFT,
        "is_top1.float(), ones)",
        "is_top1.float() * 2, ones)",
        STEPS + " tests/training/test_evaluator.py",
    ),
    Mutant(
        "loss: sft term of rejected answers",
        DPO,
        "outputs.log_probs.chunk(2)[0], num_items",
        "outputs.log_probs.chunk(2)[1], num_items",
        STEPS,
    ),
    Mutant(
        "loss: sft term without weight",
        DPO,
        "return preference + sft_weight * nll_loss",
        "return preference + nll_loss",
        STEPS,
    ),
    Mutant("loss: reference swapped", DPO, '"ref_chosen_logps": both[:, 0]', '"ref_chosen_logps": both[:, 1]', STEPS),
    Mutant("loss: margins without beta", DPO, '"rewards/margins": trainer.beta * ', '"rewards/margins": ', STEPS),
    Mutant("loss: chosen shift per answer", DPO, "chosen_ratio / mask.chunk(2)[0].sum(dim=1)", "chosen_ratio", STEPS),
    Mutant(
        "loss: first token of a document",
        BATCH,
        'arrays["labels"][positions == 0] = IGNORE_INDEX',
        "pass",
        STEPS + " tests/model/test_attention.py",
    ),
    Mutant(
        "loss: rejected after chosen",
        BATCH,
        "torch.cat([torch.tensor([last]), torch.arange(end, end + rejected - 1)])",
        "torch.arange(end - 1, end + rejected - 1)",
        STEPS,
    ),
    Mutant("loss: gradient of the head inverted", HEAD, "scale = -grad[:, None]", "scale = grad[:, None]", HEADS),
    Mutant(
        "loss: no gradient of the bias",
        HEAD,
        "grad_bias += (slope * scale[chunk]).sum(dim=0)",
        "pass",
        HEADS + " tests/model/test_forward.py",
    ),
    # checkpoints
    Mutant("checkpoint: manifest not verified", SAVE, 'if manifest["self"] != json_sha256(body):', "if False:", SAVED),
    Mutant(
        "checkpoint: best pruned",
        SAVE,
        "map(_best_step, kept) if step is not None}",
        "map(_best_step, kept) if False}",
        SAVED + " tests/training/test_evaluator.py",
    ),
    Mutant(
        "checkpoint: existing folder not replaced",
        SAVE,
        "replace_folder(self.staging, self.final)",
        "self.staging.rename(self.final)",
        SAVED + " tests/runs/test_overwrite.py",
    ),
    Mutant(
        "checkpoint: tokens forgotten",
        STATE,
        'self.tokens, self.supervised_tokens = state["tokens"], state["supervised_tokens"]',
        "pass",
        "tests/runs/test_checkpoint.py tests/training/test_throughput.py",
    ),
    Mutant(
        "checkpoint: metrics forgotten",
        STATE,
        'self.metrics.load_state_dict(state["tally"])',
        "pass",
        "tests/runs/test_checkpoint.py tests/test_kill_at_random.py",
    ),
    Mutant(
        "checkpoint: spike window forgotten",
        STATE,
        'self.spike_guard.load_state_dict(state.get("usual") or {})',
        "pass",
        "tests/training/test_numerical_checks.py",
    ),
    Mutant(
        "checkpoint: best forgotten",
        STATE,
        'self.best.load_state_dict(state.get("best"))',
        "pass",
        "tests/training/test_evaluator.py",
    ),
    # resume
    Mutant(
        "resume: changed keys accepted",
        RESUME,
        "for key in changed if key not in allow_changes]",
        "for key in changed if False]",
        RESUMED,
    ),
    Mutant("resume: changed data accepted", RESUME, "if manifest.get(name) == now[name] or", "if True or", RESUMED),
    Mutant(
        "resume: damaged checkpoint used",
        RESUME,
        "damaged.append((checkpoint, str(why)))",
        "return checkpoint, damaged",
        RESUMED,
    ),
    Mutant("resume: never ignored", RESUME, 'if resume == "never":', "if False:", RESUMED),
    Mutant(
        "resume: later checkpoints stay",
        RESUME,
        'set_aside = tuple((folder, f"{LATER}{folder.name}") for folder in later)',
        "set_aside = ()",
        RESUMED,
    ),
    Mutant(
        "resume: other environment not noted",
        RESUME,
        "if environment:\n",
        "if False:\n",
        RESUMED + " tests/runs/test_checkpoint.py",
    ),
    # recipe rules
    Mutant(
        "rule: exclusive keys",
        RULE,
        "if all(get(raw, *rule.section, key) is not None for key in rule.keys):",
        "if False:",
        RULES,
    ),
    Mutant(
        "rule: keys without effect", RULE, "if get(raw, *rule.section, rule.key) == rule.value:", "if False:", RULES
    ),
    Mutant("rule: warm-up beyond the decay", RULE, "and warmup >= end > 0:", "and warmup > end > 0:", RULES),
    Mutant("rule: patience without a metric", RULE, "if patience is not None and metric is None:", "if False:", RULES),
    Mutant(
        "rule: what cannot be sharded",
        RULE,
        'if get(raw, "distributed", key) == sharding:',
        "if False:",
        RULES,
    ),
    Mutant(
        "rule: smoothing of other losses",
        RULE,
        "if smoothing and not names & set(SMOOTHED_LOSSES):",
        "if False:",
        RULES,
    ),
)


def run_tests(tests: Collection[str], mutant: Mutant | None = None) -> subprocess.CompletedProcess[str]:
    """Runs test files on a copy of the tree, with the fault of a mutant in it, until the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            (shutil.copytree(source, f"{folder}/{name}", ignore=ignore) if source.is_dir()
             else shutil.copy(source, f"{folder}/{name}"))  # fmt: skip
        if mutant is not None:
            file = Path(folder, "nesso_tune", mutant.file)
            text = file.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                sys.exit(f"{mutant.name}: {mutant.file} contains {mutant.old!r} {text.count(mutant.old)} times")
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "TMPDIR": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{mutant.name if mutant else 'without a fault'}: the tests did not run\n{done.stdout[-2000:]}")
    return done


def survives(mutant: Mutant) -> bool:
    """Whether the tests of a mutant pass with its fault in the code."""
    done = run_tests(mutant.tests.split(), mutant)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    outcome = "killed" if done.returncode else "SURVIVES"
    print(f"{outcome:<9}{mutant.name:<40}{(failed or [''])[0][:100]}", flush=True)
    return done.returncode == 0


def main() -> None:
    """Runs all mutants, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the names of the mutants to run")
    parser.add_argument("--check", action="store_true", help="only check that every mutant's code is found once")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.check:
        for mutant in chosen:
            found = (ROOT / "nesso_tune" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
            print(f"{found} {mutant.name}") if found != 1 else None
        return
    without = run_tests(sorted({file for mutant in chosen for file in mutant.tests.split()}))
    if without.returncode:
        sys.exit(f"the tests fail without a fault\n{without.stdout[-2000:]}")
    with ThreadPoolExecutor(2) as pool:
        alive = [mutant.name for mutant, yes in zip(chosen, pool.map(survives, chosen), strict=True) if yes]
    print(f"{len(chosen)} mutants, {len(chosen) - len(alive)} killed, survivors: {alive or 'none'}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
