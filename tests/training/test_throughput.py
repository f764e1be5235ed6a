"""Figures of speed and memory in every log line, the same for trackers, and a trace of a few steps."""

import gzip
import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from nesso_tune.model.adapters import adapt
from nesso_tune.planning.hardware import bf16_peak
from nesso_tune.run import train
from nesso_tune.runs.disk_space import DiskSpace
from nesso_tune.runs.run_directory import open_run
from nesso_tune.training import throughput
from nesso_tune.training.dataset import RunDataset
from nesso_tune.training.evaluator import Evaluator
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.throughput import (
    SQUARED_LENGTHS,
    WHOLE_SEQUENCES,
    AttentionCostCollator,
    Throughput,
    TrainingFlops,
    squared_lengths,
    whole_sequences,
)
from tests.support.logs import logged
from tests.support.runs import loaded, metrics, recipe, steps

NAMES = ("tokens_per_second", "supervised_tokens_per_second", "peak_memory_gb", "data_wait_share")


def lines(folder):
    return [line for line in metrics(folder) if "loss" in line]


def tiny(**more):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 500}  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **more), attn_implementation="eager")


def counted(model, length, supervised):
    """What torch counts of a forward and a backward pass over one document, the head on its last positions."""
    model.enable_input_require_grads()  # else the first layer's inputs, of frozen tables, have no gradient
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(torch.zeros(1, length, dtype=torch.long)).last_hidden_state
        model.get_output_embeddings()(hidden[:, length - supervised :]).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
def test_the_operations_of_a_step_are_those_that_torch_counts(tied):
    """But for the half of attention that a causal kernel leaves out."""
    model, length, supervised = tiny(tie_word_embeddings=tied), 80, 30
    operations = TrainingFlops.of(model)
    whole = operations.token * length + operations.supervised * supervised + 2 * operations.square * length**2
    assert counted(model, length, supervised) == pytest.approx(whole, rel=0.001)  # rotary angles are products too


def test_under_an_adapter_frozen_weights_have_no_gradient(whole_base, tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks],
                  model={"base": whole_base, "random_init": False, "attention": "eager",
                         "adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}})  # fmt: skip
    _, model = loaded(some)
    frozen = TrainingFlops.of(model)
    adapt(model, some.model, [], some.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    operations, length, supervised = frozen.under_adapter(trained), 60, 20
    assert operations.token < frozen.token
    whole = operations.token * length + operations.supervised * supervised + 2 * operations.square * length**2
    assert counted(model, length, supervised) == pytest.approx(whole, rel=0.002)


def test_a_batch_says_how_much_attention_it_takes():
    collate = AttentionCostCollator(lambda rows: {"input_ids": len(rows)})
    expected = {"input_ids": 2, SQUARED_LENGTHS: 9 + 16 + 25, WHOLE_SEQUENCES: (12, 49 + 25)}
    assert collate([{"seq_lengths": [3, 4]}, {"seq_lengths": [5]}]) == expected
    seen = torch.ones(6, 6).tril()  # who sees whom, in a row of two tokens of prompt, one and three of the answers
    seen[3:, 2] = 0
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}
    assert squared_lengths(pair) == pytest.approx(2 * seen.sum() - 6), "twice, less every token's look at itself"
    assert whole_sequences(pair) == (3 + 5, 9 + 25), "others compute the prompt with each answer"


@pytest.fixture
def known_gpu(monkeypatch):
    """Stands for a GPU of a known peak, in operations a second."""
    monkeypatch.setattr(throughput, "device_peak", lambda: 1e9)
    return 1e9


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_every_line_has_them(tmp_path, request, monkeypatch, known_gpu, method):
    read, add = [], Throughput.add

    def noted(self, squares, whole):
        read.append((squares, *whole))
        add(self, squares, whole)

    monkeypatch.setattr(Throughput, "add", noted)
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    some = recipe(method, tmp_path / "run", [source], train={"gradient_accumulation_steps": 2},
                  logging={"every_steps": 2})  # fmt: skip
    with logged() as messages:
        train(some)
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == [1, 2, 4]
    _, model = loaded(some)
    needed, before, batches = TrainingFlops.of(model), {"tokens": 0, "supervised_tokens": 0, "step": 0}, iter(read)
    for line in written:
        tokens, learned = (line[name] - before[name] for name in ("tokens", "supervised_tokens"))
        busy = tokens / line["tokens_per_second"]
        assert line["supervised_tokens_per_second"] == pytest.approx(learned / busy, rel=1e-3)
        read_since = [next(batches) for _ in range(2 * (line["step"] - before["step"]))]
        squares, whole_tokens, whole_squares = map(sum, zip(*read_since, strict=True))
        assert squares > tokens
        assert whole_squares >= squares
        assert (whole_tokens == tokens) is (method == "sft")
        done = needed.token * tokens + needed.supervised * learned + needed.square * squares
        assert line["mfu"] == pytest.approx(done / busy / known_gpu, rel=0.01)
        common = (needed.token + needed.supervised) * whole_tokens + 2 * needed.square * whole_squares
        assert line["mfu_common"] == pytest.approx(common / busy / known_gpu, rel=0.01)
        assert line["mfu_common"] > line["mfu"]
        assert 0 <= line["data_wait_share"] < 0.5
        assert 0.2 < line["peak_memory_gb"] < 50
        before = line
    assert next(batches, None) is None
    assert sum("% MFU" in message for message in messages) == 3


def test_waiting_for_rows_shows(tmp_path, talks, monkeypatch):
    """Evaluation and saving, slow ones too, are no time of training."""

    def slow(method, seconds):
        def slowly(self, *arguments):
            time.sleep(seconds)
            return method(self, *arguments)

        return slowly

    for owner, name, seconds in (
        (RunDataset, "__getitem__", 0.2),
        (Evaluator, "__call__", 0.7),
        (DiskSpace, "check_save", 0.7),
    ):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name), seconds))
    train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 4}))
    _, second, third, _ = lines(tmp_path / "run")
    assert second["data_wait_share"] > 0.5, "two rows a step; one step and one batch are read ahead"
    busy = (third["tokens"] - second["tokens"]) / third["tokens_per_second"]
    assert busy < 0.7, "after step 2 it evaluates and saves"


def test_nothing_is_said_of_a_share_of_an_unknown_peak(tmp_path, talks):
    with logged() as messages:
        train(recipe("sft", tmp_path / "run", [talks], evaluation=None))
    assert all(set(NAMES) < set(line) and "mfu" not in line for line in lines(tmp_path / "run"))
    assert len(messages) >= 4
    assert not any("MFU" in message for message in messages)


class Stopped(Exception):
    """Stands for a run that ends in the middle."""


def test_a_run_that_goes_on_counts_from_there(tmp_path, talks, monkeypatch):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 8}, checkpoint={"every_steps": 5})
    with monkeypatch.context() as patch:
        original = ConversationTrainer.training_step

        def step(self, *arguments):
            if self.state.global_step == 6:
                raise Stopped
            return original(self, *arguments)

        patch.setattr(ConversationTrainer, "training_step", step)
        with pytest.raises(Stopped):
            train(some)
    train(some)
    written = {line["step"]: line for line in lines(tmp_path / "run")}
    for number in (6, 7, 8):
        now, before = written[number], written[number - 1]
        shares = [(now[name] - before[name]) / now[f"{name}_per_second"] for name in ("tokens", "supervised_tokens")]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3), "the time of one step by either count"
        assert shares[0] < 5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM-64GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Tesla T4", None),
        ("NVIDIA GH200 480GB", None), ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI250X", 191.5), ("AMD Instinct MI100", None),
    ],
)  # fmt: skip
def test_the_peak_by_the_name_that_a_driver_gives(name, peak):
    assert bf16_peak(name) == peak


class Tracker(TrainerCallback):
    """Stands for an integration of transformers: those listen to log lines."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append({"step": state.global_step, **logs})


def test_trackers_get_the_same_numbers(tmp_path, talks, monkeypatch):
    tracker = Tracker()
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda _: [tracker])
    train(recipe("sft", tmp_path / "run", [talks], train={"num_epochs": 2, "max_steps": None}))
    trained, evaluated = (
        [line for line in tracker.seen if "loss" in line],
        [x for x in tracker.seen if "eval_loss" in x],
    )
    assert trained == lines(tmp_path / "run")
    assert trained[-1]["epoch"] == pytest.approx(2, abs=0.4)
    written = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert evaluated == [
        {name if name == "step" or name.startswith("eval_") else f"eval_{name}": value for name, value in line.items()}
        for line in written
    ]
    assert len(evaluated) > 1
    assert "eval_stop_rate/it" in evaluated[0]


def test_tensorboard(tmp_path, talks):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe("sft", tmp_path / "run", [talks], logging={"report_to": ["tensorboard"]}))
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for tag, name in (("train/loss", "loss"), ("train/tokens_per_second", "tokens_per_second"),
                      ("eval/loss", "eval_loss"), ("eval/stop_rate", "stop_rate")):  # fmt: skip
        seen = {event.step: event.value for event in events.Scalars(tag)}
        assert seen == pytest.approx(steps(tmp_path / "run", name)), tag


@pytest.fixture
def plain(tmp_path, talks):
    """A run of ten steps without a profile, and the sections of one with it."""
    sections = {"train": {"max_steps": 10}, "evaluation": None}
    train(recipe("sft", tmp_path / "plain", [talks], **sections))
    sections["train"]["profile"] = True
    return sections


def traces(folder):
    return sorted(path.name for path in (folder / "profile").iterdir())


def test_a_profile_names_the_operations_and_changes_nothing(tmp_path, talks, plain, capfd):
    assert not (tmp_path / "plain" / "profile").exists()
    capfd.readouterr()
    some = recipe("sft", tmp_path / "run", [talks], checkpoint={"every_steps": 10}, **plain)
    with logged() as messages:
        train(some)
    for key in ("loss", "grad_norm", "tokens"):
        assert steps(tmp_path / "run", key) == steps(tmp_path / "plain", key)
    assert traces(tmp_path / "run") == ["steps-6-8.json.gz"], "after the first five"
    start = f"profile of steps 6 to 8: {tmp_path / 'run' / 'profile' / 'steps-6-8.json.gz'} (open it in"
    assert any(message.startswith(start) for message in messages)
    assert "profiler_start" not in capfd.readouterr().err
    with gzip.open(tmp_path / "run" / "profile" / "steps-6-8.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {"aten::mm", "aten::scaled_dot_product_attention", "aten::embedding"} <= set(names)
    assert sum(name.startswith("Optimizer.step") for name in names) >= 3
    opened = open_run(some, overwrite=True)
    assert not (tmp_path / "run" / "profile").exists(), "--overwrite moves it aside with the run"
    opened.close()
    assert traces(tmp_path / "run") == ["steps-6-8.json.gz"], "and puts it back with it"


@pytest.mark.parametrize(("most", "evaluate_every", "file"), [(2, 9, "steps-2-2"), (1, 9, "steps-1-1"),
                                                              (9, 7, "steps-6-7")])  # fmt: skip
def test_a_short_run_is_profiled_as_far_as_it_goes(tmp_path, talks, most, evaluate_every, file):
    """And not its evaluations."""
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": most, "profile": True},
                  checkpoint={"every_steps": 9}, evaluation={"every_steps": evaluate_every, "samples": 0})  # fmt: skip
    train(some)
    assert traces(tmp_path / "run") == [f"{file}.json.gz"]


def test_a_run_may_be_profiled_from_where_it_goes_on(tmp_path, talks, plain, monkeypatch):
    """Also in the middle of a recording that a kill cuts short."""
    original = ConversationTrainer.training_step

    def step(self, *arguments):
        if self.state.global_step == 6:
            raise Stopped
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ConversationTrainer, "training_step", step)
        with pytest.raises(Stopped):
            train(recipe("sft", tmp_path / "run", [talks], **{**plain, "train": {"max_steps": 10}}))
    train(recipe("sft", tmp_path / "run", [talks], checkpoint={"every_steps": 5}, **plain))
    assert traces(tmp_path / "run") == ["steps-10-10.json.gz"], "it goes on from step 6: five steps are let pass"
    assert steps(tmp_path / "run") == steps(tmp_path / "plain")
