"""The other side of `elsewhere.py`: run by the environment that has transformers 4.57, lm-eval and gguf."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import jinja2
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ASKED = 450  # tokens that lm-eval is to write
OLDER = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)  # what transformers 4 reads of the rotary embedding
TASK = """\
task: long_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {asked}}}
metric_list: [{{metric: exact_match}}]
"""


def main(models: Path, here: str) -> int:
    """Prints a table of the models; returns 1 if anything is otherwise than here."""
    names = ("transformers", "tokenizers", "lm_eval", "gguf", "jinja2", "torch")
    print(f"trained and read by transformers {here}; read again by", ", ".join(f"{n} {version(n)}" for n in names))
    print("\n| shape | largest difference of logits | with `rope_parameters` alone | prompts equal | plain Jinja | "
          "add_bos_token |\n|---|---|---|---|---|---|")  # fmt: skip
    good = [_compared(folder) for folder in sorted(models.iterdir()) if (folder / "here.pt").exists()]
    final = models / "llama" / "run" / "final"
    limited = models.parent / "limited"
    shutil.copytree(final, limited, dirs_exist_ok=True)
    settings = json.loads((final / "generation_config.json").read_text())
    (limited / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 256}))
    written, cut = _answers(final, models.parent), _answers(limited, models.parent)
    print(
        f"\nlm-eval, asked for {ASKED} tokens: {written}; with `max_new_tokens: 256` in generation_config.json: {cut}"
    )
    return 0 if all(good) and max(written) == ASKED else 1


def _compared(folder: Path) -> bool:
    here, final = torch.load(folder / "here.pt", weights_only=True), folder / "run" / "final"
    difference = _difference(final, here)
    settings = json.loads((final / "config.json").read_text())
    alone = AutoConfig.for_model(**{key: value for key, value in settings.items() if key not in OLDER})
    tokenizer = AutoTokenizer.from_pretrained(final)
    source = (final / "chat_template.jinja").read_text(encoding="utf-8")
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    chats, equal, rendered = here["chats"], 0, 0
    for chat in chats:
        asked = chat["asked"]
        variables = {key: asked[key] for key in ("tools", "add_generation_prompt")}
        ids = tokenizer.apply_chat_template(asked["messages"], **variables)
        again = tokenizer(chat["text"])["input_ids"]  # a server that encodes the rendered text adds nothing either
        equal += ids == chat["ids"] == again
        rendered += plain.render(**asked) == chat["text"]
    bos = _add_bos(final)
    print(f"| {here['name']} | {difference:.1e} | {_difference(final, here, config=alone):.1e} | "
          f"{equal} of {len(chats)} | {rendered} of {len(chats)} | {bos} |", flush=True)  # fmt: skip
    return difference <= 1e-5 and equal == rendered == len(chats) and bos is False


def _difference(final: Path, here: dict[str, Any], **options: Any) -> float:
    """The largest difference of a model's logits from those that it has where it was trained."""
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return float((model(input_ids=here["ids"]).logits - here["logits"]).abs().max())


def _add_bos(final: Path) -> Any:
    """What a GGUF file says whose vocabulary settings were read from a model folder."""
    file = final.parent / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    gguf.SpecialVocab(final, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf.GGUFReader(file).fields["tokenizer.ggml.add_bos_token"].contents()


def _answers(final: Path, folder: Path) -> list[int]:
    """Lengths in tokens of the answers that lm-eval gets."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    rows = folder / "few.jsonl"
    rows.write_text("".join((folder / "rows.jsonl").read_text().splitlines(keepends=True)[:2]))
    (tasks / "long_answers.yaml").write_text(TASK.format(rows=rows.resolve(), asked=ASKED))
    model, lengths = HFLM(pretrained=str(final), device="cpu", dtype="float32", batch_size=1), []
    generate = model.model.generate

    def counted(*arguments: Any, **options: Any) -> Any:
        out = generate(*arguments, **options)
        lengths.append(out.shape[1] - options["input_ids"].shape[1])
        return out

    model.model.generate = counted
    manager = TaskManager(include_path=str(tasks))
    simple_evaluate(model, tasks=["long_answers"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0)
    return lengths


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
