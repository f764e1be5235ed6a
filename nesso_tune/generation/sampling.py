"""Several sampled answers to each prompt: in memory, or in a JSON Lines file that an interrupted call continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nesso_tune.conversation import Conversation, Message
from nesso_tune.data.languages import detect_language
from nesso_tune.errors import RecipeError, RunEnvironmentError, check_instance, check_whole
from nesso_tune.files import json_sha256
from nesso_tune.generation.inference import ChatModel, Sampling, load_chat_model
from nesso_tune.logs import logger

GREEDY = Sampling()
BATCH_PROMPTS = 8  # each batch has a seed of its own, so a continued file equals one that was never interrupted


@dataclass(frozen=True)
class SampledAnswer:
    """A sampled answer, and whether it ends with the end token."""

    text: str
    stopped: bool


def generate(
    model: str | Path | ChatModel,
    prompts: str | Conversation | Iterable[str | Conversation],
    *,
    n: int = 1,
    sampling: Sampling = GREEDY,
    seed: int = 42,
) -> list[list[SampledAnswer]]:
    """Answers of a model to prompts, in batches. `nesso-tune generate` writes the same answers to a file.

    Args:
        model: a `final/` folder, a run directory, a checkpoint, a hub id, or what `load_chat_model` returned.
        prompts: user turns, or conversations that end with one; also a single one.
        n: answers per prompt.
        sampling: maximum length, temperature (0 for greedy decoding) and top_p.
        seed: of the random numbers; the state of random generators is kept.

    Returns:
        For each prompt, its `n` answers.

    Raises:
        RecipeError: for an argument of another type or out of range, and for several answers by greedy decoding, which
            would be equal.
        ModelError: if there is no such model, or it has no chat template.
        DataError: if a prompt leaves no room for an answer in the model's context, or is not valid Unicode.
    """
    check_instance("sampling", sampling, Sampling, "Sampling(temperature=0.8)")
    check_count(n, sampling, "n", "temperature")
    check_whole("seed", seed, 0)
    asked = _conversations(prompts)
    chat = model if isinstance(model, ChatModel) else load_chat_model(str(model))
    starts = range(0, len(asked), BATCH_PROMPTS)
    batches = [chat.sample(asked[i : i + BATCH_PROMPTS], n, sampling, seed + i) for i in starts]
    return [[SampledAnswer(*answer) for answer in answers] for batch in batches for answers in batch]


def check_count(n: int, sampling: Sampling, name: str, temperature_name: str) -> None:
    """Raises RecipeError for no answers, and for several by greedy decoding; the names are those of the arguments."""
    check_whole(name, n, 1)
    if n > 1 and sampling.is_greedy:
        remedy = f"set {temperature_name} above 0, or {name} to 1"
        raise RecipeError(name, f"greedy decoding gives {n} equal answers", remedy)


def _conversations(prompts: str | Conversation | Iterable[str | Conversation]) -> list[Conversation]:
    """The prompts as conversations.

    Raises:
        RecipeError: for anything but texts, and conversations that end with a turn that is not the model's.
    """
    remedy = 'write a list of texts, or of Conversation((Message("user", "…"),))'
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable | Conversation):
        raise RecipeError("prompts", f"must be a list, not {type(prompts).__name__}", remedy)
    found = []
    for i, prompt in enumerate([prompts] if isinstance(prompts, str | Conversation) else prompts):
        if isinstance(prompt, str):
            prompt = Conversation((Message("user", prompt),), language=detect_language(prompt))
        if not isinstance(prompt, Conversation):
            raise RecipeError(f"prompts[{i}]", f"must be text or a Conversation, not {type(prompt).__name__}", remedy)
        if not all(isinstance(turn, Message) and isinstance(turn.content, str) for turn in prompt.messages):
            raise RecipeError(f"prompts[{i}]", "has a turn that is no Message with a text", remedy)
        if not prompt.messages or prompt.messages[-1].role not in ("user", "tool"):
            raise RecipeError(f"prompts[{i}]", "does not end with a user turn", "remove the last turn, or add one")
        found.append(prompt)
    return found


def write_samples(
    file: Path,
    model: ChatModel,
    model_digest: str,
    prompts: Sequence[Conversation],
    n: int,
    sampling: Sampling,
    seed: int,
) -> int:
    """Appends a line for each prompt that the file lacks; returns the number of new lines.

    A line is `{"prompt": messages, "language", "answers": [{"text", "stopped"}], "settings"}`. Lines are written in
    whole batches; a last line that is incomplete is removed.

    Args:
        file: the file to write or continue.
        model: the model.
        model_digest: hash of the model, part of `settings`.
        prompts: conversations that end with a user turn.
        n: answers per prompt.
        sampling: temperature above 0 for n > 1.
        seed: of the random numbers.

    Raises:
        RunEnvironmentError: if the file has lines of another model, other prompts or other settings.
    """
    turns = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]
    settings = json_sha256([model_digest, turns, n, asdict(sampling), seed])[:16]
    done = _complete_lines(file, settings, len(prompts))
    if done:
        logger.info(f"{file}: continues after {done} of {len(prompts)} prompts")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        for start in range(done, len(prompts), BATCH_PROMPTS):
            batch = range(start, min(start + BATCH_PROMPTS, len(prompts)))
            answers = model.sample([prompts[i] for i in batch], n, sampling, seed + start)
            for i, own in zip(batch, answers, strict=True):
                found = [asdict(SampledAnswer(*answer)) for answer in own]
                line = {
                    "prompt": turns[i],
                    "language": prompts[i].language,
                    "answers": found,
                    "settings": settings,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    return len(prompts) - done


def _complete_lines(file: Path, settings: str, count: int) -> int:
    """Cuts a file after its last complete batch; returns the number of lines that stay."""
    if not file.exists():
        return 0
    lines = file.read_bytes().split(b"\n")[:-1]  # the last part has no line break: incomplete, or empty
    for number, line in enumerate(lines, 1):
        try:
            own = json.loads(line)["settings"] == settings
        except (ValueError, LookupError, TypeError):
            own = False
        if not own:
            what = "was written with another model, other prompts or other settings"
            raise RunEnvironmentError(f"{file}:{number}", what, "name another file, or remove it")
    done = len(lines) if len(lines) == count else len(lines) // BATCH_PROMPTS * BATCH_PROMPTS
    with file.open("rb+") as stream:
        stream.truncate(sum(len(line) + 1 for line in lines[:done]))
    return done
