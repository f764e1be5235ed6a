"""The error that rounding causes, and the logits that are compared."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nesso_tune.export import parity

PROMPT, ANSWER = list(range(3, 40)), [5, 9, 2, 44, 17]


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=16)).eval()


def answer_of(model):
    with torch.no_grad():
        top = parity._answer_logits(model, PROMPT, ANSWER).topk(64)
    prompt = parity.Prompt([{"role": "user", "content": "?"}])
    return [parity.ReferenceAnswer(prompt, PROMPT, ANSWER, top.indices, top.values)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_modules_have_the_error_of_computing_with_the_dtype(model, dtype):
    answers, computed = answer_of(model), copy.deepcopy(model).to(getattr(torch, dtype))
    parity.round_modules(model, dtype)
    assert model.dtype == torch.float32
    errors = [parity.rounding_error(one, answers) for one in (model, computed)]
    assert errors[0] == pytest.approx(errors[1], rel=0.6)
    assert errors[0] > 2 * parity.ROUNDING_FLOOR * float(answers[0].logits.abs().max())


def test_logits_of_an_answer_are_those_of_the_whole_sequence(model):
    with torch.no_grad():
        found = parity._answer_logits(model, PROMPT, ANSWER)
        whole = model(input_ids=torch.tensor([PROMPT + ANSWER])).logits[0]
    torch.testing.assert_close(found, whole[len(PROMPT) - 1 : -1], rtol=1e-5, atol=1e-6)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[1]))
    parity._answer_logits(model, PROMPT, ANSWER)
    assert shapes == [len(ANSWER)], "the head does not compute the prompt"
