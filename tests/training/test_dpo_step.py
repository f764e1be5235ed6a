"""The DPO step without padding and with shared prompts: TRL's loss, gradients and metrics, and their closed forms."""

from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.model.attention import AttentionSpans, enable_document_attention
from nesso_tune.model.lm_head import PackedRow, attach_supervised_head
from nesso_tune.recipes.rules import SMOOTHED_LOSSES, SORTED_LOSSES
from nesso_tune.recipes.schema import LossName
from nesso_tune.training import dpo, losses
from nesso_tune.training.dataset import PairCollator
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups
from tests.support.runs import BASE

VOCABULARY = 61
SIZES = [(5, 7, 3), (2, 1, 6), (9, 4, 4), (3, 6, 5)]  # tokens of prompt, chosen and rejected answer
LANGUAGES = ("it", "en", "en", "it")
GROUPS = Groups(("en", "it"), ("",))
LOSSES = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "hinge": {"loss_type": ["hinge"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 1.0},  # a larger one magnifies what float32 rounds
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "exo_pair, smoothed": {"loss_type": ["exo_pair"], "label_smoothing": 0.05},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot, smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "discopop": {"loss_type": ["discopop"]},
    "sft": {"loss_type": ["sft"], "loss_weights": [0.7]},
    "sigmoid and sft, long answers discounted": {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "ld_alpha": 0.5,
    },
    "four": {"loss_type": ["sft", "hinge", "aot", "ipo"], "loss_weights": [0.2, 0.5, 1.0, 0.3]},
}


def net(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def pairs():
    generator = torch.Generator().manual_seed(1)

    def some(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return [
        {"prompt_ids": some(p), "chosen_ids": some(c), "rejected_ids": some(r), "languages": [LANGUAGES[i]],
         "sources": [""], "pair": i}
        for i, (p, c, r) in enumerate(SIZES)
    ]  # fmt: skip


def by_rows(model):
    """The same weights, by document and with the head on learned positions."""
    ours = deepcopy(model)
    assert enable_document_attention(ours, "sdpa")
    attach_supervised_head(ours)
    return ours


def reference(inputs, ld_alpha=None):
    """Log-probabilities of the answers under another model."""
    chosen, rejected = answers_under(net(seed=7), inputs, ld_alpha)
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


@torch.no_grad()
def answers_under(model, inputs, ld_alpha=None):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    mask = inputs["completion_mask"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1) * mask
    return losses.answer_log_probs(log_probs, inputs["completion_mask"], ld_alpha).chunk(2)


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A trainer for any settings; its `_compute_loss` is TRL's own, with TRL's head on the padded batch."""

    def made(model, **settings):
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, max_length=None, precompute_ref_log_probs=False, **settings,
        )  # fmt: skip
        rows = [{"prompt": "Uno?", "chosen": "Due.", "rejected": "Tre."}]  # for its constructor
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = dpo.PairTrainer(
            model=model, ref_model=net(seed=7), args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.precompute_ref_logps = True  # the batch has them
        return trainer

    return made


def ours_and_theirs(trl, settings, split=(0, 4), rows=True):
    """Our loss of a step of some micro batches, and TRL's of all its pairs at once, with their gradients."""
    inputs = PairCollator(0, GROUPS, by_document=False)(pairs())
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= reference(inputs, settings.get("ld_alpha"))
    model = net()
    ours = by_rows(model) if rows else deepcopy(model)
    trainer = trl(model.train(), **settings)
    if not rows:
        add_fused_lm_head(ours, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs = DPOTrainer._compute_loss(trainer, model, dict(inputs), False)
    theirs.backward()
    given = zip(inputs["ref_chosen_logps"].tolist(), inputs["ref_rejected_logps"].tolist(), strict=True)
    trainer.reference = dict(enumerate(given))
    tally = GroupedMetrics(dpo.dpo_metrics(dict(zip(trainer.loss_types, trainer.loss_weights, strict=True))), GROUPS)
    trainer.run_state = SimpleNamespace(metrics=tally, tokens=0, supervised_tokens=0)
    trainer.state.global_step = 1
    batches = [PairCollator(0, GROUPS, by_document=rows)(pairs()[start:end]) for start, end in pairwise(split)]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    losses = [trainer.compute_loss(ours.train(), dict(batch), num_items_in_batch=items) for batch in batches]
    (loss := sum(losses) / len(losses)).backward()
    return SimpleNamespace(trainer=trainer, theirs=theirs.detach(), model=model, loss=loss.detach(), ours=ours,
                           tally=tally, inputs=inputs)  # fmt: skip


def check_gradients(both):
    for (name, ours), theirs in zip(both.ours.named_parameters(), both.model.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad,
            theirs.grad,
            rtol=1e-5,
            atol=1e-5 * float(theirs.grad.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_loss_gradients_and_metrics_are_trls(trl, settings):
    both = ours_and_theirs(trl, settings)
    assert float(both.loss) == pytest.approx(float(both.theirs), rel=1e-6)
    check_gradients(both)
    means, reported = both.tally.means(), both.trainer._metrics["train"]
    for name in dpo.PAIR_METRICS:
        assert means[name] == pytest.approx(reported[name][0], rel=1e-5, abs=1e-6), name
    assert means["token_accuracy"] == pytest.approx(reported["mean_token_accuracy"][0], abs=1e-6)
    assert means["loss"] == pytest.approx(float(both.theirs), rel=1e-6), "what is reported is what is optimised"
    ratios = answers_under(both.model, both.inputs, settings.get("ld_alpha"))[0] - both.inputs["ref_chosen_logps"]
    per_token = ratios / torch.tensor([chosen for _, chosen, _ in SIZES])
    assert means["logps/chosen_shift"] == pytest.approx(float(per_token.mean()), rel=1e-5)


@pytest.mark.parametrize(("split", "rows"), [((0, 1, 2, 3, 4), True), ((0, 2, 4), True), ((0, 2, 4), False)])
def test_a_step_is_trls_loss_of_all_its_pairs_however_it_is_split(trl, split, rows):
    """TRL's own sft term is a mean over each micro batch: 1e-2 off where the answers differ in length."""
    settings = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.2, 0.5], "ld_alpha": 0.5}
    both = ours_and_theirs(trl, settings, split, rows)
    assert float(both.loss) == pytest.approx(float(both.theirs), rel=1e-6)
    check_gradients(both)
    means = both.tally.means()
    assert means["loss"] == pytest.approx(float(both.theirs), rel=1e-6)
    assert means["loss"] == means["loss_preference"] + 0.5 * means["loss_sft"]
    for name, counts in (("loss_preference", [1] * len(SIZES)), ("loss_sft", [chosen for _, chosen, _ in SIZES])):
        parts = sum(means[f"{name}/{code}"] * n for code, n in zip(LANGUAGES, counts, strict=True))
        assert means[name] == pytest.approx(parts / sum(counts), rel=1e-6), name


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_is_a_mean_over_pairs_or_known_to_be_none(trl, name):
    """Whatever TRL adds: its loss of each pair alone is our value for the pair."""
    inputs = PairCollator(0, GROUPS, by_document=False)(pairs())
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= {key: values.flip(0) for key, values in reference(inputs).items()}  # so that its order is another one
    trainer = trl(net(), loss_type=[name], label_smoothing=0.1 if name in SMOOTHED_LOSSES else 0.0)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    ours = by_rows(net())
    with torch.no_grad():
        outputs = ours(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                       fused_lm_head=True)  # fmt: skip
        whole = DPOTrainer._compute_loss(trainer, lambda **_: outputs, dict(inputs), False)
        alone = torch.stack([trls_loss_of_pair(trainer, outputs, inputs, i) for i in range(len(SIZES))])
        values = losses.preference_losses(trainer, lambda **_: outputs, dict(inputs))
    separable = float(alone.mean()) == pytest.approx(float(whole), rel=1e-6)
    assert separable == (name not in (*SORTED_LOSSES, losses.SFT))
    if name != losses.SFT:
        assert type(values) is torch.Tensor
        assert float(values.mean()) == pytest.approx(float(whole), rel=1e-6)
    if separable:
        torch.testing.assert_close(values, alone, rtol=1e-6, atol=1e-7)


def trls_loss_of_pair(trainer, outputs, inputs, pair):
    """TRL's own loss of a batch of one pair, from outputs already computed."""
    both = [pair, pair + len(SIZES)]
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    of_pair = SimpleNamespace(**{name: getattr(outputs, name)[both] for name in fields})
    own = {name: value[[pair] if name.startswith("ref_") else both] for name, value in inputs.items()}
    return DPOTrainer._compute_loss(trainer, lambda **_: of_pair, own, False)


def closed_form(name, policy, given, beta):
    """Losses of pairs as their papers have them, in float64."""
    chosen, rejected = (policy[i] - given[i] for i in (0, 1))
    gap = chosen - rejected
    tokens = [torch.tensor([size[i] for size in SIZES], dtype=torch.float64) for i in (1, 2)]
    return {
        "sigmoid": lambda: -functional.logsigmoid(beta * gap),  # arXiv:2305.18290, eq. 7
        "ipo": lambda: (chosen / tokens[0] - rejected / tokens[1] - 1 / (2 * beta)) ** 2,  # arXiv:2310.12036, eq. 17
        "hinge": lambda: torch.relu(1 - beta * gap),  # arXiv:2305.10425
        "robust": lambda: (-functional.logsigmoid(beta * gap) * 0.9 + functional.logsigmoid(-beta * gap) * 0.1) / 0.8,
        "sigmoid_norm": lambda: -functional.logsigmoid(beta * (chosen / tokens[0] - rejected / tokens[1])),
        "apo_zero": lambda: 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected),  # arXiv:2408.06266
    }[name]()


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero"])
def test_loss_is_its_closed_form_in_float64(trl, name):
    both = ours_and_theirs(trl, LOSSES[name])
    exact = net().double()
    mask, ids = both.inputs["completion_mask"][:, 1:], both.inputs["input_ids"]
    logits = exact(input_ids=ids, attention_mask=both.inputs["attention_mask"]).logits[:, :-1]
    sums = (logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * mask).sum(1)
    given = [both.inputs[key].double() for key in ("ref_chosen_logps", "ref_rejected_logps")]
    wanted = closed_form(name, sums.chunk(2), given, LOSSES[name].get("beta", 0.1)).mean()
    wanted.backward()
    assert float(both.loss) == pytest.approx(float(wanted), rel=2e-6)
    for ours, theirs in zip(both.ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max())
        )


def test_log_probs_are_those_of_each_answer_alone():
    model = net()
    ours = by_rows(model)
    batch = PairCollator(0, GROUPS)(pairs())
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        got = ours(
            input_ids=batch["input_ids"], labels=labels, packed_row=batch["packed_row"], fused_lm_head=True
        ).log_probs
    for i, pair in enumerate(pairs()):
        for side, name in ((i, "chosen_ids"), (i + len(SIZES), "rejected_ids")):
            ids = torch.tensor([pair["prompt_ids"] + pair[name]])
            with torch.no_grad():
                alone = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            start, end = len(pair["prompt_ids"]) - 1, ids.shape[1] - 1
            torch.testing.assert_close(got[side, start:end], alone[start:], rtol=1e-5, atol=1e-5)
            assert not got[side, :start].any()
            assert not got[side, end:].any()


MUTANTS = {
    "the rejected answer sees the chosen one": lambda sizes: AttentionSpans.from_documents([*map(sum, sizes)]),
    "the rejected answer does not see the prompt": lambda sizes: AttentionSpans.from_documents(
        [n for p, c, r in sizes for n in (p + c, r)]
    ),
    "positions run on": lambda sizes: AttentionSpans(**{
        **vars(AttentionSpans.from_pairs(sizes)), "position_ids": torch.arange(sum(map(sum, sizes)))[None]
    }),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_leak_would_be_seen(mutant):
    ours = by_rows(net())
    batch = PairCollator(0, GROUPS)(pairs())
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    row = batch["packed_row"]
    with torch.no_grad():
        right, wrong = (
            ours(input_ids=batch["input_ids"], labels=labels, packed_row=one, fused_lm_head=True).log_probs
            for one in (row, PackedRow(row.input_ids, mutant(SIZES), row.logits_to_keep))
        )
    assert float((right - wrong).abs().max()) > 1e-2


def test_a_pairs_row_holds_each_prompt_once():
    row = PairCollator(0, GROUPS)(pairs())["packed_row"]
    assert row.input_ids.shape == (1, sum(map(sum, SIZES)))
    assert row.spans.lengths == (12, 8, 3, 8, 13, 13, 9, 8)
    assert row.spans.position_ids[0, :15].tolist() == [*range(12), 5, 6, 7]
    assert row.logits_to_keep[:7].tolist() == [4, 5, 6, 7, 8, 9, 10], (
        "the chosen answer is predicted from the prompt on"
    )
    assert row.logits_to_keep[18:21].tolist() == [4, 12, 13], (
        "and the rejected one from the same last token of the prompt"
    )


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_reference_batches_hold_all_pairs_and_no_more_tokens_than_a_micro_batch(micro):
    from nesso_tune.training.reference import length_sorted_batches

    sizes = [sum(SIZES[i % 3]) + i for i in range(17)]
    batches = length_sorted_batches(sizes, micro)
    assert sorted(row for batch in batches for row in batch) == list(range(17))
    most = sum(sorted(sizes, reverse=True)[:micro])
    assert all(sum(sizes[row] for row in batch) <= most for batch in batches)
