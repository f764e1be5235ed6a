"""How often real texts are taken for what they are not: python -m tests.benchmarks.answers FOLDER

FOLDER holds sft_it.jsonl, sft_en.jsonl, sft_multiturn.jsonl, pref_it.jsonl and pref_en.jsonl, each row with the name of
its section in `_source`. Languages: single sentences and answers of sections whose language is known. Loops: every text
of every row, whole and cut after 256 tokens, with the quickstart's tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nesso_tune.generation.answers import detected_language, ends_in_loop

BASE = Path(__file__).parent.parent.parent / "recipes" / "quickstart" / "base"
FILES = ("sft_it", "sft_en", "sft_multiturn", "pref_it", "pref_en")
KNOWN = {  # section: a column of single texts, and their language
    "tatoeba_ita_eng": (("ita", "it"), ("eng", "en")),
    "stanford_alpaca_5000": (("output", "en"),),
    "llamafactory_alpaca_en_demo": (("output", "en"),),
    "gpteacher_roleplay": (("response", "en"),),
    "self_instruct_user_oriented": (("instruction", "en"),),
}


def texts(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from texts(entry)


def main(folder: Path) -> None:
    """Prints how many texts are told and told wrongly, by language, and how many end in a loop, and those that do."""
    told: Counter[tuple[str, str]] = Counter()
    looping: dict[int | None, list[str]] = {None: [], 256: []}
    tokenizer, count = Tokenizer.from_file(str(BASE / "tokenizer.json")), 0
    for name in FILES:
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for column, language in KNOWN.get(row.pop("_source"), ()):
                found = detected_language(row.get(column) or "")
                told[language, "right" if found == language else "not" if found == "und" else "wrong"] += 1
            for text in texts(row):
                ids, count = tokenizer.encode(text).ids, count + 1
                for limit, found_there in looping.items():
                    if ends_in_loop(ids[:limit]):
                        found_there.append(tokenizer.decode(ids[:limit])[-100:])
    print(dict(sorted(told.items())))
    for limit, found_there in looping.items():
        print(
            f"{len(found_there)} of {count:,} texts end in a loop{f' when cut after {limit} tokens' if limit else ''}"
        )
        print("".join(f"  {text!r}\n" for text in found_there))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
