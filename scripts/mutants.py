"""Sixty faults planted in the code, one at a time: the tests named beside each of them must fail.

    python scripts/mutants.py             # all, about N minutes on two cores
    python scripts/mutants.py --only mask # those whose name contains a word

Each mutant replaces one piece of code in a copy of the source tree and runs the tests that should notice. A mutant that
survives is a hole in the tests: the script lists it and ends with exit code 1. Run it after a change of the test suite.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
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
RATE, RATES = "lr_schedule.py", "tests/test_lr_schedule.py"
HEAD, HEADS = (
    "model/lm_head.py",
    "tests/model/test_lm_head.py tests/training/test_sft.py tests/training/test_dpo_step.py",
)
SFT, DPO = "training/sft.py", "training/dpo.py"
BATCH, STEPS = (
    "training/dataset.py",
    "tests/training/test_sft.py tests/training/test_dpo_step.py tests/training/test_dpo.py",
)

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
    Mutant("mask: end of last turn", RENDER, '"last": i == last', '"last": i >= last', CHAT),
    Mutant("mask: end token of every turn", RENDER, '{"turn": trained[i]', '{"turn": True', CHAT),
    Mutant("mask: end token never", RENDER, '"all": True', '"all": trained[i]', CHAT),
    Mutant(
        "mask: header learned",
        RENDER,
        "template.header_of(message.role))",
        "template.header_of(message.role), trained[i])",
        CHAT,
    ),
    Mutant(
        "mask: separator learned",
        RENDER,
        "_template_segments(template, template.separator)",
        "_template_segments(template, template.separator, trained[i])",
        CHAT,
    ),
    Mutant("mask: no BOS", RENDER, 'out = [Segment(BOS, "control")] if template.bos else []', "out = []", CHAT),
    Mutant(
        "mask: default system for unknown language",
        RENDER,
        "default_system.get(conversation.language, first)",
        "default_system.get(conversation.language)",
        CHAT,
    ),
    Mutant("mask: labels off", ENCODE, "token if yes else IGNORED", "token", CHAT),
    Mutant(
        "mask: cut at an unlearned turn",
        ENCODE,
        "any(self.trained[start : end - 1])",
        "any(self.trained[start:end])",
        CHAT + " tests/data/test_prepare.py",
    ),
    Mutant(
        "mask: cut beyond the length",
        ENCODE,
        "if end <= length and any",
        "if end <= length + 1 and any",
        CHAT + " tests/data/test_prepare.py",
    ),
    Mutant(
        "mask: special tokens from text",
        ENCODE,
        "return ids if self._special.isdisjoint(ids) else self._apart(text)",
        "return ids",
        CHAT + " tests/chat/test_special_tokens.py tests/test_security.py",
    ),
    Mutant(
        "mask: special tokens encoded",
        ENCODE,
        "self._tokenizer.encode_special_tokens = True",
        "self._tokenizer.encode_special_tokens = False",
        CHAT,
    ),
    # packing and mixture
    Mutant("packing: capacity exceeded", PACK, "fitting = rooms >> length", "fitting = rooms >> (length - 1)", PACKING),
    Mutant(
        "packing: loosest fit",
        PACK,
        "room = length + (fitting & -fitting).bit_length() - 1",
        "room = length + fitting.bit_length() - 1",
        PACKING,
    ),
    Mutant("packing: full rows kept", PACK, "if left := room - length:", "if (left := room - length) >= 0:", PACKING),
    Mutant(
        "packing: one order for all epochs",
        PACK,
        "default_rng([self._seed, epoch])",
        "default_rng([self._seed, 0])",
        PACKING,
    ),
    Mutant("packing: seed ignored", PACK, "default_rng([self._seed, epoch])", "default_rng([0, epoch])", PACKING),
    Mutant(
        "packing: rows not shuffled",
        PACK,
        "shuffled = [packed[i] for i in rng.permutation(len(packed))]",
        "shuffled = packed",
        PACKING,
    ),
    Mutant(
        "packing: stale pattern",
        PACK,
        "if self._pattern is None or self._pattern[0] != key:",
        "if self._pattern is None:",
        PACKING + " " + MIXTURE,
    ),
    Mutant(
        "packing: shortest first",
        PACK,
        "np.lexsort((rng.random(len(entries)), -lengths))",
        "np.lexsort((rng.random(len(entries)), lengths))",
        PACKING,
    ),
    Mutant(
        "mixture: fraction ignored",
        MIX,
        "part = round((self.times - whole) * len(self.entries))",
        "part = round((self.times - whole) * 0)",
        MIXTURE,
    ),
    Mutant(
        "mixture: same sample each epoch",
        MIX,
        "shuffled = rng.permutation(self.entries)",
        "shuffled = self.entries",
        MIXTURE,
    ),
    Mutant("mixture: repeat ignored", MIX, "mixture.repeat * tokens[name] / share", "tokens[name] / share", MIXTURE),
    # schedule
    Mutant(
        "schedule: warm-up starts at one", RATE, "return step / warmup_steps", "return (step + 1) / warmup_steps", RATES
    ),
    Mutant("schedule: no floor", RATE, "return min_ratio + (1.0 - min_ratio) * falling", "return falling", RATES),
    Mutant(
        "schedule: decay to the end", RATE, "decay_end = constant_ratio * total_steps", "decay_end = total_steps", RATES
    ),
    Mutant(
        "schedule: decay without warm-up",
        RATE,
        "(step - warmup_steps) / (decay_end - warmup_steps)",
        "step / decay_end",
        RATES,
    ),
    Mutant(
        "schedule: linear is cosine",
        RATE,
        'if shape == "cosine" else 1.0 - progress',
        "if True else 1.0 - progress",
        RATES,
    ),
    Mutant(
        "schedule: constant decays",
        RATE,
        'if shape == "constant":\n        return 1.0',
        'if shape == "none":\n        return 1.0',
        RATES,
    ),
    # losses
    Mutant(
        "loss: mean per process",
        SFT,
        " * self.accelerator.num_processes",
        "",
        "tests/distributed/test_process_group.py",
    ),
    Mutant(
        "loss: counted twice",
        SFT,
        "return -outputs.log_probs.sum() / num_items_in_batch",
        "return -2 * outputs.log_probs.sum() / num_items_in_batch",
        "tests/training/test_sft.py tests/training/test_independent.py",
    ),
    Mutant(
        "loss: padding in a group",
        SFT,
        "ones = torch.ones_like(losses)",
        "ones = torch.ones_like(losses) * 2",
        "tests/training/test_sft.py",
    ),
    Mutant(
        "loss: rejected as chosen",
        DPO,
        "sft = -outputs.log_probs.chunk(2)[0].sum()",
        "sft = -outputs.log_probs.chunk(2)[1].sum()",
        STEPS,
    ),
    Mutant("loss: no sft weight", DPO, "return preference + sft_weight(self) * sft", "return preference + sft", STEPS),
    Mutant(
        "loss: reference swapped",
        DPO,
        '{"ref_chosen_logps": both[:, 0], "ref_rejected_logps": both[:, 1]}',
        '{"ref_chosen_logps": both[:, 1], "ref_rejected_logps": both[:, 0]}',
        STEPS,
    ),
    Mutant(
        "loss: margins without beta",
        DPO,
        '"rewards/margins": trainer.beta * (shift - other)',
        '"rewards/margins": shift - other',
        STEPS,
    ),
    Mutant("loss: chosen shift per answer", DPO, "shift / mask.chunk(2)[0].sum(dim=1)", "shift", STEPS),
    Mutant(
        "loss: sft term per micro batch",
        DPO,
        "micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes",
        "micro_batches = self.accelerator.num_processes",
        STEPS + " tests/training/test_independent.py",
    ),
    Mutant("loss: first token of a document", BATCH, 'laid["labels"][positions == 0] = IGNORED', "pass", STEPS),
    Mutant(
        "loss: answers see each other",
        BATCH,
        "torch.cat([torch.tensor([asked]), torch.arange(end, end + rejected - 1)])",
        "torch.arange(end - 1, end + rejected - 1)",
        STEPS,
    ),
    Mutant("loss: head gradient sign", HEAD, "scale = -grad[:, None]", "scale = grad[:, None]", HEADS),
    Mutant(
        "loss: head without bias gradient",
        HEAD,
        "to_bias += (slope * scale[part]).sum(dim=0)",
        "pass",
        HEADS + " tests/model/test_forward.py",
    ),
    Mutant("loss: head drops a chunk", HEAD, "range(0, count, size)", "range(0, count - 1, size)", HEADS),
)


def survives(mutant: Mutant) -> bool:
    """Runs the tests on a copy of the tree with the fault in it; whether all of them pass."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            (shutil.copytree(source, f"{folder}/{name}", ignore=ignore) if source.is_dir()
             else shutil.copy(source, f"{folder}/{name}"))  # fmt: skip
        file = Path(folder, "nesso_tune", mutant.file)
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            sys.exit(f"{mutant.name}: {mutant.file} contains {mutant.old!r} {text.count(mutant.old)} times")
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": folder, "TMPDIR": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"{mutant.name}: the tests did not run\n{done.stdout[-2000:]}")
        last = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(
            f"{'SURVIVES' if done.returncode == 0 else 'killed':<9}{mutant.name:<40}{(last or [''])[0][:100]}",
            flush=True,
        )
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
    with ThreadPoolExecutor(2) as pool:
        alive = [mutant.name for mutant, yes in zip(chosen, pool.map(survives, chosen), strict=True) if yes]
    print(f"{len(chosen)} mutants, {len(chosen) - len(alive)} killed, survivors: {alive or 'none'}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
