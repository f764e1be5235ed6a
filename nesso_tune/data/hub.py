"""Reading data sets on the hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from nesso_tune.chat.network import offline_if_unreachable
from nesso_tune.data.blocks import ROWS, Block, Objects, without_nulls
from nesso_tune.errors import DataError, RunEnvironmentError
from nesso_tune.recipes.data import Source


def hub_fingerprint(source: Source) -> str:
    """Identifies the content of a hub data set at the revision that is in the local cache."""
    return str(_load(source.path, source.subset, source.split, source.revision)._fingerprint)


def hub_blocks(source: Source) -> Iterator[Block]:
    """A hub data set in blocks, with `id row N` as the place of a row.

    Rows are decoded by `datasets`: what it keeps as JSON or in other ways of its own is not in the table as it is.
    """
    rows = _load(source.path, source.subset, source.split, source.revision)
    share = hub_size(source) / max(1, len(rows))
    for start in range(0, len(rows), ROWS):
        columns = rows[start : start + ROWS]
        count = min(ROWS, len(rows) - start)
        decoded = [without_nulls({name: values[i] for name, values in columns.items()}) for i in range(count)]
        yield Objects(f"{source.path} row ", start + 1, decoded, round(share * count))


def hub_size(source: Source) -> int:
    """Bytes of a hub data set in memory."""
    return int(_load(source.path, source.subset, source.split, source.revision).data.nbytes)


def is_cached(source: Source) -> bool:
    """Whether a hub data set is in the local cache. Only to be asked where `HF_HUB_OFFLINE` is set."""
    try:
        _load(source.path, source.subset, source.split, source.revision)
    except (DataError, RunEnvironmentError):
        return False
    return True


@lru_cache(maxsize=8)
def _load(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    """The data set, fetched into the hub's cache unless it is there.

    Raises:
        DataError: if there is no such data set, subset or split.
        RunEnvironmentError: if the hub cannot be reached.
    """
    offline_if_unreachable()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except DatasetNotFoundError:
        raise DataError(
            path, "no such file here and no such data set on the hub", "check the name; private sets need HF_TOKEN"
        ) from None
    except ValueError as error:  # an unknown subset or split; the message lists those that exist
        raise DataError(path, str(error).splitlines()[0], "correct subset or split") from None
    except (ConnectionError, OSError) as error:
        raise RunEnvironmentError(
            path, f"is not here, and the hub cannot be reached ({type(error).__name__})",
            "check the path, or run `nesso-tune prepare` where there is a network",
        ) from None  # fmt: skip
