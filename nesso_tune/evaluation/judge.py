"""A judge for answers: a language model behind an OpenAI-compatible endpoint that gives each answer 1 to 5 points."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from nesso_tune import cache
from nesso_tune.errors import RunEnvironmentError, shortened
from nesso_tune.evaluation.results import AnsweredPrompt, TaskResult, means_by_group
from nesso_tune.logs import logger

CACHE_KIND = "judgements"
METRIC = "judge_score"
API_KEY = "NESSO_TUNE_JUDGE_KEY"  # environment variable with the key of the endpoint, if it needs one
TIMEOUT_S = 120
MIN_SCORE, MAX_SCORE = 1, 5
SCORE = re.compile(r"(?:score|punteggio|voto)\W{0,5}([1-5])(?![\d.])", re.IGNORECASE)
ALONE = re.compile(r"^\W*([1-5])(?:\s*/\s*5)?\W*$")
INSTRUCTION = """\
You grade one answer of an assistant to a user. Judge whether it does what the user asks, whether its facts are right, \
whether it is written well, and whether it is in the language that the user expects. Length alone is no merit.

1: useless or wrong. 2: mostly wrong or off topic. 3: partly right. 4: right, with small faults. 5: right and complete.

The user:
<<<
{prompt}
>>>

The answer:
<<<
{answer}
>>>

Reply with a line `score: N` and nothing else, where N is 1, 2, 3, 4 or 5."""


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model to use there.

    Attributes:
        url: base address; `/chat/completions` is added.
        model: name of the model at the endpoint.
    """

    url: str
    model: str


def parse_score(reply: str) -> int | None:
    """The score in a judge's reply; None if there is none, or several different ones."""
    found = set(SCORE.findall(reply)) or set(ALONE.findall(reply))
    return int(found.pop()) if len(found) == 1 else None


def judged(result: TaskResult, judge: Judge) -> TaskResult:
    """The result with `judge_score`, in total and by language. Judgements are cached; an empty answer gets 1 point.

    Raises:
        RunEnvironmentError: if the endpoint cannot be reached or refuses a request.
    """
    answers = result.answers
    content = [[answer.prompt, answer.text] for answer in answers]
    key = cache.key_of([INSTRUCTION, judge.model, content])

    def build(folder: Path) -> dict[str, Any]:
        scores = [judge_answer(judge, answer) for answer in answers]
        (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
        return {"model": judge.model}

    def read(folder: Path, note: Mapping[str, Any]) -> list[int | None]:
        scores: list[int | None] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        return scores

    scores, _, _ = cache.get_or_build(CACHE_KIND, key, build, read, "judgements")
    if unread := sum(score is None for score in scores):
        logger.warning(f"{judge.model}: {unread} of {len(scores)} replies have no score and are left out")
    languages: Sequence[str] = [answer.language for answer in answers]
    metrics = means_by_group(METRIC, scores, [lambda i: languages[i]])
    return replace(result, metrics={**result.metrics, **metrics})


def judge_answer(judge: Judge, answer: AnsweredPrompt) -> int | None:
    """1 to 5 points for an answer, 1 for an empty one; None for a reply without a score.

    Raises:
        RunEnvironmentError: if the endpoint cannot be reached or refuses the request.
    """
    if not answer.text.strip():
        return MIN_SCORE
    content = INSTRUCTION.format(prompt=answer.prompt, answer=answer.text)
    body = {
        "model": judge.model,
        "temperature": 0,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": content}],
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(API_KEY):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{judge.url.rstrip('/')}/chat/completions"
    try:
        with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=TIMEOUT_S) as response:
            reply = json.load(response)["choices"][0]["message"]["content"]
    except HTTPError as error:
        remedy = f"check the model's name, and the key in {API_KEY}" if error.code in (401, 403, 404) else "try again"
        raise RunEnvironmentError(url, f"refused a request ({error.code} {error.reason})", remedy) from None
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise RunEnvironmentError(url, f"cannot be reached ({reason})", "check --judge and the network") from None
    except (ValueError, LookupError, TypeError):
        remedy = "name an endpoint that speaks OpenAI's chat completions, e.g. http://localhost:8000/v1"
        raise RunEnvironmentError(url, "its reply is no chat completion", remedy) from None
    score = parse_score(str(reply))
    if score is None:
        logger.info(f"{judge.model}: no score in the reply {shortened(str(reply))!r}")
    return score
