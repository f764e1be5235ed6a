"""Tiny base models with adapters."""

import copy
import json
import shutil

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.model.adapters import adapt
from nesso_tune.model.loading import load_model
from nesso_tune.recipes.sections import ChatSection, LoraSection, ModelSection
from tests.support.runs import BASE, recipe

KINDS = ("lora", "dora", "qlora")
ROWS = torch.tensor(
    [[2, 40, 41, 42, 3, 43], [2, 50, 51, 3, 52, 53]]
)  # 2 and 3 are chat tokens in renamed reserved slots


def base_in(parent, tied=True, **more):
    """Saves a base with random weights, with tied or untied embeddings; `more` is added to its config.json."""
    folder = parent / f"base-{tied}"
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | more))
    return folder


def adapted(folder, kind, dtype="float32", **section):
    """The base, a copy with an adapter, the model section and the chat tokenizer."""
    model = ModelSection(base=str(folder), dtype=dtype, adapter=LoraSection(type=kind, r=4, **section))
    chat = chat_tokenizer(model, ChatSection())
    plain = load_model(model, chat, seed=1)
    held = copy.deepcopy(plain)
    adapt(held, model, chat.new_ids, seed=1)
    return plain, held, model, chat


def learn(model, dtype="float32"):
    """Five steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ROWS, labels=ROWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model, dtype="float32"):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        return model.eval()(ROWS).logits.float()


def apart(one, other):
    return float((one - other).detach().norm() / other.detach().norm())


def switch_off(model):
    """Disables the adapters of all layers."""
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(False)


def of(base, kind, method, run, source, **sections):
    """A recipe that trains an adapter."""
    model = {"base": str(base), "random_init": False, "adapter": {"type": kind, "r": 4}}
    return recipe(method, run, [source], model=model, **sections)
