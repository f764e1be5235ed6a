"""Whether a run may be resumed: fresh, continued, finished or refused, with the reasons, and nothing is written."""

import json

import pytest

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.planning.auto import Recorded
from nesso_tune.runs.checkpoint import MANIFEST, CheckpointWriter
from nesso_tune.runs.provenance import DATA_IDENTITY, RunFacts, data_identity
from nesso_tune.runs.resume import (
    FRESH,
    ResumeDecision,
    confirm_resume,
    decide_resume,
    differences,
    recorded_choices,
)
from nesso_tune.runs.run_directory import open_run, write_end, write_start
from tests.support.runs import recipe

FACTS = RunFacts(
    nesso_tune="0", versions={}, python="3", base="", tokenizer="", data="", identity=2, start="", recipe_hash="",
    world_size=1, global_batch=1, micro_batch=2, fsdp="none", threads=1, device="cpu", attention="", unpacked=False,
    torch_compile=False, frozen_weights=None, command=[],
)  # fmt: skip


@pytest.fixture
def begun(tmp_path, talks):
    """A recipe and the directory of its run, with checkpoints at steps 2 and 4."""
    some = recipe("sft", tmp_path / "run", [talks])
    run = open_run(some)
    write_start(run, some, FACTS)
    for step in (2, 4):
        writer = CheckpointWriter(run.path, step)
        writer.begin()
        writer.write_json("rng-0.json", {})
        writer.finish(FACTS.to_dict(), writer.file_records())
    run.close()
    return some, run.path


def decided(begun, *arguments, **options):
    some, run = begun
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    decision = decide_resume(run, json.loads((run / MANIFEST).read_text()), some, *arguments, **options)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before, "a decision writes nothing"
    return decision


def test_a_folder_without_a_run_and_an_overwritten_one_are_fresh(begun):
    assert decide_resume(begun[1], None, begun[0]) == FRESH
    assert decided(begun, overwrite=True) == FRESH


def test_an_unfinished_run_continues_from_the_newest_or_the_chosen_checkpoint(begun):
    run = begun[1]
    assert decided(begun) == ResumeDecision("continue", run / "checkpoint-4")
    later = ((run / "checkpoint-4", "later-checkpoint-4"),)
    assert decided(begun, str(run / "checkpoint-2")) == ResumeDecision(
        "continue", run / "checkpoint-2", set_aside=later
    )
    (run / "checkpoint-4" / "rng-0.json").write_text("[]")
    decision = decided(begun)
    assert (decision.action, decision.checkpoint) == ("continue", run / "checkpoint-2")
    assert decision.set_aside == ((run / "checkpoint-4", "damaged-checkpoint-4"),)
    assert decision.notes == ("checkpoint-4: rng-0.json is damaged; set aside as damaged-checkpoint-4",)


def test_a_finished_run_is_finished_while_its_model_is_complete(begun):
    some, run = begun
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    opened = open_run(some)
    write_end(opened)
    opened.close()
    assert decided(begun) == ResumeDecision("finished")
    (run / "final" / "config.json").unlink()
    decision = decided(begun)
    assert (decision.action, decision.checkpoint) == ("continue", run / "checkpoint-4")
    assert decision.set_aside == ((run / "final", "damaged-final"),)


def test_refusals_have_their_reasons(begun):
    some, run = begun
    decision = decided(begun, "never")
    assert decision.action == "refused"
    with pytest.raises(RunEnvironmentError, match="contains an unfinished run"):
        decision.raise_if_refused()
    other = some.model_copy(update={"seed": 7, "train": some.train.model_copy(update={"weight_decay": 0.1})})
    refusal = decided((other, run)).refusal
    assert isinstance(refusal, RecipeError)
    assert len(refusal.problems) == 2, "each changed key"
    accepted = decided((other, run), allow_changes=("seed", "train.weight_decay"))
    assert accepted.action == "continue"
    assert accepted.changed == {"seed": (42, 7), "train.weight_decay": (0.0, 0.1)}


def test_facts_are_compared_with_the_checkpoint(begun):
    run, decision = begun[1], decided(begun)
    assert confirm_resume(decision, run, FACTS) == decision
    elsewhere = RunFacts(**{**FACTS.to_dict(), "threads": 7, "versions": {"torch": "9"}})
    confirmed = confirm_resume(decision, run, elsewhere)
    assert confirmed.environment == {"CPU threads": (1, 7), "torch": (None, "9")}
    assert "checkpoint-4 in a different environment (CPU threads 1 -> 7, torch None -> 9)" in confirmed.notes[0]
    other = RunFacts(**{**FACTS.to_dict(), "base": "b", "global_batch": 2})
    refusal = confirm_resume(decision, run, other).refusal
    assert [problem.what for problem in refusal.problems] == [
        "the base model's weights changed ( -> b)", "the global batch changed (1 -> 2)"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="weights changed"):
        confirm_resume(ResumeDecision("finished"), run, other).raise_if_refused()
    batch = RunFacts(**{**FACTS.to_dict(), "global_batch": 2})
    assert confirm_resume(ResumeDecision("finished"), run, batch).action == "finished", (
        "the model does not depend on it"
    )


def test_differences_name_dotted_keys_and_leave_free_ones_out():
    old = {"seed": 1, "train": {"learning_rate": 1e-3, "schedule": {"type": "cosine"}}, "logging": {"every_steps": 1}}
    new = {"seed": 1, "train": {"learning_rate": 2e-3, "schedule": {"type": "linear"}}, "logging": {"every_steps": 9}}
    assert differences(old, new) == {
        "train.learning_rate": (1e-3, 2e-3),
        "train.schedule.type": ("cosine", "linear"),
    }


def test_changed_paths_and_names_are_compared_by_content(tmp_path, talks, pairs):
    """A key that says how rows are read is refused at once, with both values."""
    some = recipe("sft", tmp_path / "run", [talks])
    open_run(some).close()
    run = open_run(some)
    write_start(run, some, FACTS)
    run.close()
    raw = some.model_dump(mode="json")
    raw["data"]["sources"][0] |= {"path": pairs, "alias": "mine", "format": "messages"}
    raw["model"]["revision"] = "0" * 40
    raw["chat"]["template"] = "llama3"
    raw["model"]["random_init"] = False
    with pytest.raises(RecipeError, match=r"its run has model\.random_init: true, the recipe now has false") as error:
        open_run(type(some).model_validate(raw))
    assert len(error.value.problems) == 1
    raw["model"]["random_init"] = True
    del raw["model"]["revision"]
    again = open_run(type(some).model_validate(raw))
    assert sorted(again.decision.moved) == [
        "chat.template", "data.sources.0.alias", "data.sources.0.format", "data.sources.0.path"
    ]  # fmt: skip
    assert not again.changed
    again.close()


def test_a_run_keeps_the_data_fingerprint_with_which_it_began(begun, tmp_path):
    some, _ = begun
    opened = open_run(some)
    assert opened.data_identity == FACTS.identity == 2, "the bytes of the files count"
    opened.close()
    assert open_run(recipe("sft", tmp_path / "other", ["rows.jsonl"])).data_identity == DATA_IDENTITY == 3
    assert [data_identity({"identity": i}) for i in (1, 2, 3)] == [3, 2, 3]


def test_data_fingerprints_of_earlier_versions_cannot_be_compared(tmp_path):
    recorded = {**FACTS.to_dict(), "nesso_tune": "0.0", "data": "b"}
    del recorded["identity"]
    (tmp_path / "manifest.json").write_text(json.dumps(recorded))
    decision = confirm_resume(ResumeDecision("finished"), tmp_path, FACTS)
    with pytest.raises(RecipeError, match=r"started by nesso-tune 0\.0, .*; continue it with that version"):
        decision.raise_if_refused()


CHOICES = {  # what a checkpoint records, what the recipe of its run says, and what is kept
    "no checkpoint": (None, {}, Recorded()),
    "one process chooses no sharding": ({"micro_batch": 4, "fsdp": "none", "world_size": 1}, {}, Recorded(4, None)),
    "sharded": ({"micro_batch": 4, "fsdp": "full_shard", "world_size": 2}, {}, Recorded(4, True)),
    "hybrid": ({"micro_batch": 4, "fsdp": "hybrid_shard", "world_size": 4}, {}, Recorded(4, True)),
    "replicated": ({"micro_batch": 4, "fsdp": "none", "world_size": 2}, {}, Recorded(4, False)),
    "an earlier version": ({"world_size": 2}, {"train": {"micro_batch_size": 3}}, Recorded(3, True)),
    "an earlier version, one process": ({"world_size": 1}, {"train": {"micro_batch_size": 3}}, Recorded(3, None)),
    "an earlier version under DDP": ({"world_size": 2}, {"distributed": {"fsdp": "none"}}, Recorded(None, False)),
}


@pytest.mark.parametrize(("checkpoint", "begun_with", "kept"), CHOICES.values(), ids=CHOICES)
def test_what_auto_chose_is_kept(tmp_path, checkpoint, begun_with, kept):
    (tmp_path / MANIFEST).write_text(json.dumps({"recipe": begun_with}))
    folder = None if checkpoint is None else tmp_path / "checkpoint-2"
    if folder is not None:
        folder.mkdir()
        (folder / MANIFEST).write_text(json.dumps(checkpoint))
    assert recorded_choices(tmp_path, folder) == kept


def test_a_number_of_rows_may_become_auto_but_no_other_number(begun):
    some, run = begun

    def resumed_with(micro_batch, **keys):
        other = some.model_copy(
            update={"train": some.train.model_copy(update={"micro_batch_size": micro_batch, **keys})}
        )
        return decide_resume(run, json.loads((run / MANIFEST).read_text()), other).action

    assert resumed_with("auto") == "continue"
    assert resumed_with(4) == resumed_with("auto", weight_decay=0.5) == "refused"
