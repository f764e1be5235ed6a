"""Renders an untrusted chat template; run as a program, to limit its time and memory.

Reads a request as JSON from stdin and writes the results as JSON to stdout. Jinja's sandbox keeps a template from
running code, but not from looping forever or exhausting the memory.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

MAX_MEMORY = 512 << 20  # bytes
MAX_CHARACTERS = 10_000_000  # of a rendered text
GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")  # a tag of transformers


def main() -> None:
    """Request: `{"template", "renderings": [variables], "seconds", "now"}`. Response: `[{"text"} or {"error"}]`."""
    request = json.load(sys.stdin)
    jinja = environment(datetime.fromisoformat(request["now"]) if request.get("now") else None)
    _limit_resources(request["seconds"])
    json.dump(_render_all(jinja, request["template"], request["renderings"]), sys.stdout)


def _render_all(jinja: Any, source: str, renderings: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Renders a template with each set of variables: {"text"} or {"error"}."""
    try:
        template = jinja.from_string(without_generation_tags(source))  # evaluates constants, so it can fail
    except Exception as error:
        return [{"error": _message(error)}] * len(renderings)
    return [_render(template, variables) for variables in renderings]


def _render(template: Any, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = template.render(**variables)
    except Exception as error:  # templates can raise any exception
        return {"error": _message(error)}
    return (
        {"text": text} if len(text) <= MAX_CHARACTERS else {"error": f"wrote more than {MAX_CHARACTERS:,} characters"}
    )


def _message(error: Exception) -> str:
    """The first line of an error, or its type."""
    if isinstance(error, MemoryError):
        return f"needed more than {MAX_MEMORY >> 20} MB of memory"
    lines = str(error).splitlines() or [type(error).__name__]
    return f"failed ({lines[0][:200]})"


def _limit_resources(seconds: float) -> None:
    """Limits memory and CPU time of this process, if the system supports it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = size + MAX_MEMORY
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        cpu = int(seconds) + 5  # ends the process if its parent no longer does
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))


def environment(now: datetime | None = None) -> Any:
    """The Jinja environment of transformers for chat templates. `now` is the time that templates read."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = (now or datetime.now()).strftime
    return jinja


def without_generation_tags(source: str) -> str:
    """The template without `generation` tags; their content stays."""
    return GENERATION_TAG.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", source)


if __name__ == "__main__":
    main()
