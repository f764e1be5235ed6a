"""Alarms: each at its limit, said once, the same after a resume, and none where nothing is wrong."""

import json
import logging

import pytest

from nesso_tune.run import train
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.training.alarms import Alarms
from nesso_tune.training.dpo import PairTrainer
from tests.support.logs import logged
from tests.support.runs import metrics, recipe, steps

LAST = 900
PARENT = {"event": "parent", "stop_rate": 1.0, "stop_rate/it": 1.0, "language_fidelity": 1.0,
          "language_fidelity/it": 1.0, "repetition_rate": 0.0, "answer_tokens": 10.0}  # fmt: skip
SOUND = {"answers": 8, "answers/it": 4, "answers_told": 8, "answers_told/it": 4, "stop_rate": 1.0, "stop_rate/it": 1.0,
         "expected_stop_rate": 1.0, "expected_stop_rate/it": 1.0, "language_fidelity": 1.0, "language_fidelity/it": 1.0,
         "repetition_rate": 0.0, "answer_tokens": 10.0, "expected_tokens": 10.0, "answer_length_ratio": 1.0,
         "logps/chosen_shift": 0.0, "eval_logps/chosen_shift": 0.0}  # fmt: skip


def numbered(method, *changes):
    """Lines of a run's metrics.jsonl: what differs from a sound evaluation, one after another; DPO knows its parent."""
    first = [{"step": 0, **PARENT}] if method == "dpo" else []
    return first + [{"step": i + 1, **SOUND, **change} for i, change in enumerate(changes)]


def alarms(method, lines):
    """(step, alarm) of the alarms that lines of metrics.jsonl begin."""
    looking = Alarms(MetricsLog(None, writes=False), method, LAST, enabled=True)
    return [(line["step"], one.alarm) for line in lines for one in looking.started_by(line)]


BAD = {
    "chosen_falls": [{"logps/chosen_shift": -0.11}, {"eval_logps/chosen_shift": -0.11}],
    "stop_rate_falls": [{"stop_rate": 0.5}, {"stop_rate/it": 0.5}],
    "language_fidelity_falls": [{"language_fidelity": 0.5}, {"language_fidelity/it": 0.25}],
    "repetition_rises": [{"repetition_rate": 0.5}],
    "answers_grow": [{"answer_length_ratio": 1.6}],
    "answers_shrink": [{"answer_length_ratio": 0.6}],
}
IN_BOTH = ("stop_rate_falls", "language_fidelity_falls", "repetition_rises")


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, many in BAD.items() for bad in many])
def test_an_alarm_begins_with_the_second_line_and_is_said_once_until_it_is_over(name, bad):
    assert alarms("dpo", numbered("dpo", {}, bad, {}, bad, {}, {})) == [], "it passes"
    assert alarms("dpo", numbered("dpo", {}, bad, bad, bad, bad)) == [(3, name)]
    assert alarms("dpo", numbered("dpo", bad, bad, {**bad, **dict.fromkeys(bad, "nan")}, bad)) == [(2, name)]
    assert alarms("dpo", numbered("dpo", bad, bad, {}, bad, {}, bad, bad)) == [(2, name), (7, name)]
    end = [*numbered("dpo", {}), {**SOUND, **bad, "step": LAST}]
    assert alarms("dpo", end) == [(LAST, name)], "there is no second line after the last"
    many = {**bad, **dict.fromkeys(("answers", "answers/it", "answers_told", "answers_told/it"), 6)}
    assert alarms("sft", numbered("sft", {}, many, many, many)) == ([(3, name)] if name in IN_BOTH else [])


@pytest.mark.parametrize(
    "fine",
    [
        {"logps/chosen_shift": -0.09, "eval_logps/chosen_shift": -0.1},
        {"logps/chosen_shift": 3.0},
        {"stop_rate": 0.75, "stop_rate/it": 0.75},
        {"stop_rate": 0.5, "expected_stop_rate": 0.6},  # the data's own answers are cut, too
        {"stop_rate/it": 0.5, "answers/it": 3},  # too few to say so
        {"language_fidelity": 0.5, "answers_told": 3},
        {"stop_rate/source/a.jsonl": 0.0, "answers/source/a.jsonl": 8},
        {"repetition_rate": 0.25},
        {"answer_length_ratio": 1.5},
        {"answer_length_ratio": 2.9, "expected_tokens": 20.0},  # the chosen answers are twice as long as the parent's
        {"answer_length_ratio": 0.67},
        {"answer_length_ratio": 0.4, "expected_tokens": 5.0},
    ],
)
def test_no_alarm_at_the_limit_or_where_the_data_explains_it(fine):
    assert alarms("dpo", numbered("dpo", {}, fine, fine, fine)) == []


def test_it_does_not_come_and_go_around_its_limit():
    around = [{"logps/chosen_shift": value} for value in (-0.12, -0.11, -0.09, -0.13, -0.12, -0.06, -0.2, -0.2)]
    assert alarms("dpo", numbered("dpo", *around)) == [(2, "chosen_falls")]
    gone = [*around, {"logps/chosen_shift": -0.05}, *around]
    assert alarms("dpo", numbered("dpo", *gone)) == [(2, "chosen_falls"), (11, "chosen_falls")]


def test_without_a_parent_line_nothing_is_compared_with_it():
    bad = {"stop_rate": 0.0, "repetition_rate": 1.0, "answer_length_ratio": 9.0}
    assert alarms("dpo", numbered("dpo", *[bad] * 3)[1:]) == []


def test_sft_may_begin_badly_but_not_end_so():
    worst = {"stop_rate": 0.0, "stop_rate/it": 0.0, "language_fidelity/it": 0.0, "repetition_rate": 1.0}
    some = [*numbered("sft", worst, worst, worst)]
    assert alarms("sft", some) == []
    names = ["stop_rate_falls", "language_fidelity_falls", "repetition_rises"]
    assert alarms("sft", [*some, {**SOUND, **worst, "step": LAST}]) == [(LAST, name) for name in names]
    cut = {**SOUND, "expected_stop_rate": 0.25, "stop_rate": 0.2, "step": LAST}
    assert alarms("sft", [*some, cut]) == [], "the data's answers are longer than what may be generated"
    alone = {f"train_{name}": value for name, value in {**SOUND, **worst}.items()}
    assert alarms("sft", [{**alone, "step": LAST}]) == [(LAST, name) for name in names], (
        "of prompts that were trained on"
    )


def test_where_a_run_stops_early_is_its_end():
    for method in ("sft", "dpo"):
        lines = numbered(method, {}, {}, {"stop_rate": 0.25})
        assert alarms(method, lines) == []
        assert alarms(method, [*lines, {"step": 3, "event": "early_stopped"}]) == [(3, "stop_rate_falls")]


def history():
    """A DPO run in which alarms come, last, go and come again."""
    shift = [0.0, -0.2, -0.2, -0.2, 0.0, -0.2, -0.06, -0.2, -0.2, -0.2]
    stop = [1.0, 0.5, 1.0, 0.5, 0.5, 0.5, 0.9, 0.5, 0.25, 0.25]
    changes = [{"logps/chosen_shift": a, "stop_rate": b} for a, b in zip(shift, stop, strict=True)]
    return numbered("dpo", *changes)


def test_a_run_that_is_continued_neither_repeats_an_alarm_nor_loses_one(tmp_path):
    lines = history()
    wanted = [(3, "chosen_falls"), (5, "stop_rate_falls"), (9, "chosen_falls"), (9, "stop_rate_falls")]
    assert alarms("dpo", lines) == wanted
    for step in range(len(lines)):
        path, said = tmp_path / f"{step}.jsonl", []
        for session in (range(step + 1), range(step + 1, len(lines))):
            log = MetricsLog(path, writes=True)
            looking = Alarms(log, "dpo", LAST, enabled=True)
            looking.replay(path)
            with logged() as messages:
                for i in session:
                    log.write(lines[i])
                    looking.check(lines[i])
            said += messages
        written = [json.loads(text) for text in path.read_text().splitlines()]
        events = [line for line in written if line.get("event") == "alarm"]
        assert [(line["step"], line["alarm"]) for line in events] == wanted, step
        assert said == [f"alarm at step {line['step']}: {line['alarm']}: {line['said']}" for line in events]
        assert {"step", "event", "alarm", "figure", "value", "limit", "said"} == set(events[0])
        assert (events[0]["value"], events[0]["limit"]) == (-0.2, -0.1)


def test_only_the_process_that_writes_looks(tmp_path):
    silent = Alarms(MetricsLog(tmp_path / "metrics.jsonl", writes=False), "dpo", LAST, enabled=False)
    with logged() as said:
        for line in history():
            silent.check(line)
    assert said == []


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A tiny model that answers eight questions by heart, and pairs whose rejected answers are a word longer."""
    folder = tmp_path_factory.mktemp("parent")
    facts = {"Quanto fa due più due?": "Due più due fa quattro.", "Come ti chiami?": "Mi chiamo Nesso.",
             "Di che colore è il cielo?": "Il cielo è azzurro.", "Dove vivi?": "Vivo in un computer.",
             "What is two plus two?": "Two plus two is four.", "What is your name?": "My name is Nesso.",
             "What colour is the sky?": "The sky is blue.", "Where do you live?": "I live in a computer."}  # fmt: skip
    codes = ["it"] * 4 + ["en"] * 4
    rows = [{"prompt": q, "response": a, "lang": code} for (q, a), code in zip(facts.items(), codes, strict=True)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": row["response"][:-1] + " forse.",
              "lang": row["lang"]} for row in rows]  # fmt: skip
    for name, some in (("rows", rows * 4), ("held", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        rates = {"max_steps": 40, "micro_batch_size": 4, "learning_rate": 3e-3}
        train(recipe("sft", folder / "sft", [folder / "rows.jsonl"], train=rates, evaluation=EVALUATION,
                     data={"validation_sources": [{"path": str(folder / "held.jsonl")}], "validation_size": 0.01},
                     checkpoint={"every_steps": 40}))  # fmt: skip
    assert [line for line in metrics(folder / "sft") if line.get("event") == "alarm"] == [], "it is a healthy run"
    return folder


EVALUATION = {"every_steps": 10, "samples": 8, "max_new_tokens": 24}
HEALTHY = {"beta": 0.1, "loss": {"sigmoid": 1.0, "sft": 0.3}}, 3e-4  # as in the quickstart
WRONG = {"beta": 0.05, "loss": {"sigmoid": 1.0}}, 5e-3


def preferring(parent, run, dpo, rate, every=10):
    pairs = str(parent / "pairs.jsonl")
    return recipe(
        "dpo", run, [pairs], model={"base": str(parent / "sft" / "final"), "random_init": False}, dpo=dpo,
        data={"validation_sources": [{"path": pairs}], "validation_size": 0.01}, evaluation=EVALUATION,
        train={"max_steps": 30, "micro_batch_size": 4, "learning_rate": rate}, checkpoint={"every_steps": every},
    )  # fmt: skip


def alarm_lines(run):
    return [line for line in metrics(run) if line.get("event") == "alarm"]


def test_a_healthy_dpo_run_has_no_alarm(tmp_path, parent):
    train(preferring(parent, tmp_path / "run", *HEALTHY))
    assert alarm_lines(tmp_path / "run") == []
    shifts = steps(tmp_path / "run", "eval_logps/chosen_shift")
    assert len(shifts) == 3
    assert min(shifts.values()) > -0.05


class Stopped(Exception):
    """Stands for a run that ends in the middle."""


def dies_at(step, original=PairTrainer.training_step):
    def training_step(self, *arguments):
        if self.state.global_step >= step:
            raise Stopped
        return original(self, *arguments)

    return training_step


def test_dpo_without_restraint_has_alarms_and_the_same_ones_after_a_resume(tmp_path, parent, monkeypatch):
    whole = tmp_path / "whole"
    with logged(logging.WARNING) as warnings:
        train(preferring(parent, whole, *WRONG))
    said = [line for line in warnings if line.startswith("alarm at step")]
    wanted = alarm_lines(whole)
    names = {line["alarm"] for line in wanted}
    assert "chosen_falls" in names
    assert names & {"stop_rate_falls", "repetition_rises", "answers_grow", "answers_shrink"}
    assert len(said) == len(wanted)
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.index("Alarms") < page.index("<svg")
    assert f"<td>{wanted[0]['alarm']}</td>" in page
    # it dies after the evaluation of step 20, and goes on from there, or from before
    for every in (20, 15):
        with monkeypatch.context() as patch:
            patch.setattr(PairTrainer, "training_step", dies_at(23))
            broken = preferring(parent, tmp_path / f"{every}", *WRONG, every=every)
            with pytest.raises(Stopped):
                train(broken)
        train(broken)
        assert {"step": every, "event": "resumed"} in metrics(tmp_path / f"{every}")
        assert alarm_lines(tmp_path / f"{every}") == wanted
        lines = [[line for line in metrics(run) if "answers" in line] for run in (whole, tmp_path / f"{every}")]
        assert lines[0] == lines[1], "with the parent's, which was asked once"
