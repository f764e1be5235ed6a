"""Whether a run directory may be resumed, and how.

The decision is made in two steps, and neither of them writes anything. `decide_resume` looks at the folder and the
recipe, before data and model are loaded. `confirm_resume` compares the data, tokenizer, weights and environment that
were loaded with those that the manifest records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nesso_tune.data.privacy import comparable_recipe
from nesso_tune.errors import NessoError, Problem, RecipeError, RunEnvironmentError
from nesso_tune.planning.auto import Recorded
from nesso_tune.recipes.builtin import path_keys
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.checkpoint import CHECKPOINT_PREFIX, MANIFEST, checkpoints, read_json, read_manifest
from nesso_tune.runs.layout import DAMAGED, FINAL, LATER, changed_final_files
from nesso_tune.runs.provenance import RunFacts

Manifest = Mapping[str, Any]
Changes = dict[str, tuple[Any, Any]]  # {dotted key: (value of the run, value now)}

# Keys of the recipe that a finished or running model does not depend on; they may change at any time.
FREE_KEYS = ("output_dir", "checkpoint", "logging", "evaluation", "distributed", "cluster", "data.preferences",
             "train.profile", "card")  # fmt: skip
MICRO_BATCH = "train.micro_batch_size"
# Facts that must not change, whatever is allowed.
FIXED_FACTS = {
    "data": "the data", "tokenizer": "the tokenizer or template", "base": "the base model's weights",
    "global_batch": "the global batch",
}  # fmt: skip
# Facts that may change; the results are then no longer bit-identical.
ENVIRONMENT_FACTS = {
    "world_size": "processes", "threads": "CPU threads", "device": "device", "attention": "attention",
    "torch_compile": "compiled layers", "python": "Python", "versions": "", "nesso_tune": "nesso-tune",
}  # fmt: skip
_SECTIONS_OF = {"data": ("data.",), "tokenizer": ("chat.", "model."), "base": ("model.",)}  # recipe keys behind a fact


@dataclass(frozen=True)
class ResumeDecision:
    """What to do with a run directory.

    Attributes:
        action: `fresh` starts at step 0, `continue` resumes from `checkpoint`, `finished` leaves the run as it is,
            `refused` raises `refusal`.
        checkpoint: the verified checkpoint of `continue`.
        refusal: the error of `refused`, with all reasons.
        notes: messages for the user.
        set_aside: (folder, new name) of folders to rename before training: damaged ones, and checkpoints later than
            the one that was chosen.
        changed: recipe keys with another value than the run's, which `--allow-changes` accepts.
        moved: recipe keys that name another file than the run's; `confirm_resume` compares the content.
        environment: differences of the environment, {name: (value of the checkpoint, value now)}.
    """

    action: Literal["fresh", "continue", "finished", "refused"]
    checkpoint: Path | None = None
    refusal: NessoError | None = None
    notes: tuple[str, ...] = ()
    set_aside: tuple[tuple[Path, str], ...] = ()
    changed: Changes = field(default_factory=dict)
    moved: Changes = field(default_factory=dict)
    environment: Changes = field(default_factory=dict)

    def raise_if_refused(self) -> None:
        """Raises the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal


FRESH = ResumeDecision("fresh")


def decide_resume(
    run: Path,
    manifest: Manifest | None,
    recipe: Recipe,
    resume: str = "auto",
    *,
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
) -> ResumeDecision:
    """Decides from the folder and the recipe; data and model are not compared yet.

    Args:
        run: the run directory.
        manifest: its manifest; None if it contains no run.
        recipe: the recipe to run.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: start a new run in place of this one.
        allow_changes: dotted recipe keys that may have another value than in the run.

    Raises:
        OSError: if a checkpoint cannot be read at the moment, which does not mean that it is damaged.
    """
    chosen = None if resume in ("auto", "never") else Path(resume)
    finished = manifest is not None and bool(manifest.get("finished")) and _is_complete(manifest, run)
    if chosen is not None and (refusal := _refusal_of_choice(chosen, run, manifest, finished, overwrite)):
        return _refused(refusal)
    if manifest is None or overwrite:
        return FRESH
    recorded = manifest["recipe"]
    comparable = comparable_recipe(recorded, recipe, manifest.get("salt", ""))
    changed = differences(_with_new_keys(recorded, comparable, recipe.model_dump(exclude_defaults=True)), comparable)
    if changed.get(MICRO_BATCH, (None, None))[1] == "auto":
        del changed[MICRO_BATCH]  # it keeps that of the run, see `recorded_choices`
    moved = {key: changed.pop(key) for key in list(changed) if _names_content(key, changed[key], recipe)}
    if problems := [_changed_key(run, key, *changed[key]) for key in changed if key not in allow_changes]:
        return _refused(RecipeError(problems))
    if finished and changed:
        what = f"its run is finished: changing {', '.join(changed)} would have no effect"
        return _refused(RecipeError(str(run), what, "train it again with --overwrite, or set another output_dir"))
    if finished:
        return ResumeDecision("finished", moved=moved)
    if resume == "never":
        remedy = "use --resume auto, or --overwrite"
        return _refused(RunEnvironmentError(str(run), "contains an unfinished run", remedy))
    decision = _newest(run, bool(manifest.get("finished"))) if chosen is None else _chosen(run, chosen)
    return replace(decision, changed=changed, moved=moved)


def confirm_resume(decision: ResumeDecision, run: Path, facts: RunFacts) -> ResumeDecision:
    """Compares what was loaded with what the manifest records.

    Args:
        decision: from `decide_resume`, not refused.
        run: the run directory.
        facts: those of this process.

    Returns:
        The decision, refused if a fact changed that must not; its notes are those of this comparison only.
    """
    decision = replace(decision, notes=())
    if decision.action == "fresh" and not decision.moved:
        return decision
    manifest, finished = read_json(decision.checkpoint or run, MANIFEST), decision.action == "finished"
    if problems := list(_changed_facts(run, manifest, facts, finished, decision.moved)):
        return _refused(RecipeError(problems))
    if finished:
        return decision
    notes = _notes_on_moved(decision.moved)
    if decision.checkpoint is None:
        return replace(decision, notes=tuple(notes))
    environment = _environment_changes(manifest, facts)
    if environment:
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in environment.items())
        checkpoint = decision.checkpoint.name
        notes.append(f"resuming {checkpoint} in a different environment ({changes}): results may not be bit-identical")
    return replace(decision, notes=tuple(notes), environment=environment)


def recorded_choices(run: Path, checkpoint: Path | None) -> Recorded:
    """What `auto` chose in the run that resumes from a checkpoint, which it keeps, also on another GPU.

    A run on a single process did not choose whether to shard. Runs that did not record their choices sharded on
    several processes, and their recipe has the number of rows.
    """
    if checkpoint is None:
        return Recorded()
    manifest, recipe = read_json(checkpoint, MANIFEST), read_json(run, MANIFEST).get("recipe") or {}
    micro_batch = manifest.get("micro_batch") or (recipe.get("train") or {}).get("micro_batch_size")
    before = "none" if (recipe.get("distributed") or {}).get("fsdp") == "none" else "full_shard"
    sharded = None if manifest.get("world_size") == 1 else manifest.get("fsdp", before) != "none"
    return Recorded(micro_batch if isinstance(micro_batch, int) else None, sharded)


def _with_new_keys(recorded: Mapping[str, Any], now: Mapping[str, Any], stated: Any) -> dict[str, Any]:
    """A recorded recipe with the keys that the version which began the run did not have, where they have their default.

    Args:
        recorded: the recipe of the manifest.
        now: the recipe of this call, in the same form.
        stated: its values that are no defaults.
    """
    stated = stated if isinstance(stated, Mapping) else {}
    result = {key: now[key] for key in now if key not in recorded and key not in stated} | dict(recorded)
    for key, value in recorded.items():
        if isinstance(value, Mapping) and isinstance(now.get(key), Mapping):
            result[key] = _with_new_keys(value, now[key], stated.get(key))
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Changes:
    """Dotted keys with different values in two recipes, with both values. `FREE_KEYS` are left out."""
    found: Changes = {}
    for key in sorted({*old, *new}):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE_KEYS or a == b:
            continue
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = ({str(i): item for i, item in enumerate(items)} for items in (a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{name}.")
        else:
            found[name] = (a, b)
    return found


def _refused(refusal: NessoError) -> ResumeDecision:
    return ResumeDecision("refused", refusal=refusal)


def _refusal_of_choice(
    checkpoint: Path, run: Path, manifest: Manifest | None, finished: bool, overwrite: bool
) -> NessoError | None:
    """Why a checkpoint that `--resume` names is not continued from, if so; its files are verified later."""
    if overwrite:
        return RecipeError("--overwrite", f"would remove {checkpoint}, which --resume names", "remove one of the two")
    if manifest is None or checkpoint.resolve() not in [saved.resolve() for saved in checkpoints(run)]:
        return RunEnvironmentError(str(checkpoint), f"is no checkpoint of a run in {run}", "name one of this run")
    if finished:
        return RunEnvironmentError(
            str(run),
            f"its run is finished: {checkpoint} would not be continued",
            "remove its final/, or use --overwrite",
        )
    return None


def _chosen(run: Path, checkpoint: Path) -> ResumeDecision:
    """Continues from the checkpoint that `--resume` names; later ones are set aside, or they would be newest again."""
    try:
        read_manifest(checkpoint)
    except ValueError as why:
        return _refused(RunEnvironmentError(str(checkpoint), f"cannot be used: {why}", "name another checkpoint"))
    saved = checkpoints(run)
    later = saved[: saved.index(run / checkpoint.name)]
    set_aside = tuple((folder, f"{LATER}{folder.name}") for folder in later)
    return ResumeDecision("continue", checkpoint, set_aside=set_aside)


def _newest(run: Path, was_finished: bool) -> ResumeDecision:
    """Continues from the newest complete checkpoint; damaged later ones, and a damaged `final/`, are set aside."""
    newest, damaged = _newest_complete(run)
    if newest is None and (damaged or any(run.glob(f"{DAMAGED}{CHECKPOINT_PREFIX}*"))):
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in damaged) or "all were set aside before"
        return _refused(  # nothing is set aside now: the next start is refused in the same way
            RunEnvironmentError(str(run), f"no checkpoint is usable ({reasons})", "start again with --overwrite")
        )
    set_aside = [(folder, f"{DAMAGED}{folder.name}") for folder, _ in damaged]
    notes = [f"{folder.name}: {why}; set aside as {DAMAGED}{folder.name}" for folder, why in damaged]
    if newest is None:
        notes.append("the unfinished run has no checkpoint: it starts from the beginning")
    if was_finished:
        kept = ""
        if os.path.lexists(run / FINAL):
            set_aside.append((run / FINAL, f"{DAMAGED}{FINAL}"))
            kept = f"; the existing one is kept as {DAMAGED}{FINAL}"
        notes.insert(0, f"final/ is missing or damaged: it is created again{kept}")
    return ResumeDecision(
        "fresh" if newest is None else "continue", newest, notes=tuple(notes), set_aside=tuple(set_aside)
    )


def _newest_complete(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is usable, and the later ones that are not, each with the reason."""
    damaged: list[tuple[Path, str]] = []
    for checkpoint in checkpoints(run):
        try:
            read_manifest(checkpoint)
        except ValueError as why:
            damaged.append((checkpoint, str(why)))
        else:
            return checkpoint, damaged
    return None, damaged


def _is_complete(manifest: Manifest, run: Path) -> bool:
    """Whether `final/` of a finished run has all its files; an edited card and added files are accepted."""
    recorded = isinstance(manifest.get("final"), Mapping) and (run / FINAL).is_dir()
    return recorded and not changed_final_files(run, manifest)


def _changed_key(run: Path, key: str, old: Any, new: Any) -> Problem:
    old, new = (json.dumps(value, ensure_ascii=False) for value in (old, new))
    remedy = "undo it, set another output_dir, "
    if key.startswith(("data.", "model.base", "model.overrides", "method", "seed", "chat.")):
        remedy += "or start again with --overwrite"
    else:
        remedy += f"--overwrite, or accept it with --allow-changes {key}"
    return Problem(str(run), f"its run has {key}: {old}, the recipe now has {new}", remedy)


def _changed_facts(run: Path, manifest: Manifest, facts: RunFacts, finished: bool, moved: Changes) -> Iterator[Problem]:
    """The facts that must not change and did. A finished model does not depend on the global batch any more."""
    now = facts.to_dict()
    for name, what in FIXED_FACTS.items():
        if manifest.get(name) == now[name] or (finished and name == "global_batch"):
            continue
        if name == "data" and manifest.get("identity") != facts.identity:
            version = manifest.get("nesso_tune")
            yield Problem(
                str(run), f"was started by nesso-tune {version}, whose data fingerprints cannot be compared",
                "continue it with that version, or start again with --overwrite",
            )  # fmt: skip
            continue
        keys = {key: values for key, values in moved.items() if key.startswith(_SECTIONS_OF.get(name, ()))}
        named = "".join(f"; {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in keys.items())
        remedy = f"restore the content or the value of {', '.join(keys)}" if keys else "undo the change"
        yield Problem(
            str(run), f"{what} changed ({manifest.get(name)} -> {now[name]}{named})",
            f"{remedy}, or start again with --overwrite or another output_dir",
        )  # fmt: skip


def _names_content(key: str, values: tuple[Any, Any], recipe: Recipe) -> bool:
    """Whether a key is only a path or a name of content, which is compared itself in `confirm_resume`."""
    names = tuple(part for part in key.split(".") if not part.isdigit())
    if names[:3] == ("data", "mixture", "shares"):  # a share may have the path of its source as name
        return None in values
    return names in path_keys(type(recipe)) or names == ("model", "revision") or names[-1] == "alias"


def _notes_on_moved(moved: Changes) -> list[str]:
    """A note per kind of moved content; without values, since names of data may be private."""
    kinds = {"model.": "the base", "chat.": "the template"}
    keys: dict[str, list[str]] = {}
    for key in moved:
        kind = next((name for section, name in kinds.items() if key.startswith(section)), "the data")
        keys.setdefault(kind, []).append(key)
    return [f"{kind} was moved or renamed ({', '.join(keys[kind])}); its content is the same" for kind in keys]


def _environment_changes(manifest: Manifest, facts: RunFacts) -> Changes:
    """{name: (recorded, now)} of the environment facts that differ; each library version counts on its own."""
    found: Changes = {}
    now_of = facts.to_dict()
    for fact, name in ENVIRONMENT_FACTS.items():
        before, now = manifest.get(fact), now_of[fact]
        pairs = {name: (before, now)}
        if isinstance(now, Mapping):
            old = before if isinstance(before, Mapping) else {}
            pairs = {each: (old.get(each), now[each]) for each in now}
        found |= {each: pair for each, pair in pairs.items() if pair[0] != pair[1]}
    return found
