"""Renders a chat template that came with a model. Run as a program, so that its limits bind nothing else.

It reads a request as JSON from stdin and writes one answer for each rendering to stdout. Jinja's sandbox keeps a
template from running code, but not from looping for ever or filling the memory: hence a process, a time and a limit.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

MEMORY = 512 << 20  # bytes that a template may take
LONGEST = 10_000_000  # characters that a template may write
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")  # a tag that only transformers knows


def main() -> None:
    """Answers `{"template", "renderings": [variables], "seconds"}` with `[{"text"} or {"error"}]`."""
    request = json.load(sys.stdin)
    jinja = environment()
    limit(request["seconds"])
    json.dump(answers(jinja, request["template"], request["renderings"]), sys.stdout)


def answers(jinja: Any, source: str, renderings: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What a template writes with each set of variables: {"text"}, or {"error"}."""
    try:
        template = jinja.from_string(without_generation(source))  # constant expressions are evaluated here
    except Exception as error:
        return [{"error": said(error)}] * len(renderings)
    return [_answer(template, variables) for variables in renderings]


def _answer(template: Any, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = template.render(**variables)
    except Exception as error:  # templates raise whatever their authors wrote
        return {"error": said(error)}
    return {"text": text} if len(text) <= LONGEST else {"error": f"wrote more than {LONGEST:,} characters"}


def said(error: Exception) -> str:
    """The first line of an error, or its kind."""
    if isinstance(error, MemoryError):
        return f"needed more than {MEMORY >> 20} MB of memory"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"failed ({lines[0][:200]})"


def limit(seconds: float) -> None:
    """Bounds the memory and the time of this process, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = size + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        cpu = int(seconds) + 5  # ends it should its parent be gone
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))


def environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def without_generation(source: str) -> str:
    """A template without `generation` blocks: what stands in them is written as it is."""
    return GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", source)


if __name__ == "__main__":
    main()
