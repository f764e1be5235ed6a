"""How often the language of a row is told: python -m tests.benchmarks.languages FOLDER

FOLDER holds sft_it.jsonl, sft_en.jsonl and sft_multiturn.jsonl, each row with the name of its section in `_source`. A
section counts whose language is known. Every row is a row of the section as it would be trained on: its texts together.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nesso_tune.data.languages import detect_language

# section: columns of its texts, and their language
KNOWN = {
    "squad_it_test": (("context", "question"), "it"),
    "javascript_questions_it": (("markdown",), "it"),
    "tldr_pages_it": (("page_it",), "it"),
    "tatoeba_ita_eng": (("ita",), "it"),
    "xpersona_it_valid": (("dialogue",), "it"),
    "xpersona_it_test": (("dialogue",), "it"),
    "chatterbot_corpus_it": (("conversation",), "it"),
    "gpteacher_roleplay": (("instruction", "response"), "en"),
    "stanford_alpaca_5000": (("instruction", "input", "output"), "en"),
    "llamafactory_alpaca_en_demo": (("instruction", "input", "output"), "en"),
    "gsm8k_alpaca_fmt": (("instruction", "output"), "en"),
    "self_instruct_seed": (("instruction",), "en"),
    "self_instruct_user_oriented": (("instruction",), "en"),
    "xpersona_en_valid": (("dialogue",), "en"),
}


def texts(value: Any) -> Iterator[str]:
    """All texts in a column."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from texts(entry)


def main(folder: Path) -> None:
    """Prints a table: section, language, rows, median characters, share told right, what the others were taken for."""
    told: dict[str, Counter[str]] = defaultdict(Counter)
    lengths: dict[str, list[int]] = defaultdict(list)
    for name in ("sft_it", "sft_en", "sft_multiturn"):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if (section := row["_source"]) in KNOWN:
                text = " ".join(text for column in KNOWN[section][0] for text in texts(row.get(column)))
                told[section][detect_language(text)] += 1
                lengths[section].append(len(text))
    print("| section | language | rows | median characters | detected | confused with |")
    print("|---|---|---|---|---|---|")
    for section, (_, language) in KNOWN.items():
        counts, rows = told[section], told[section].total()
        others = ", ".join(f"{code} {n}" for code, n in counts.most_common() if code != language)
        median = statistics.median(lengths[section])
        print(f"| `{section}` | {language} | {rows:,} | {median:,.0f} | {counts[language] / rows:.1%} | {others} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
