"""A run goes on with a version that has recipe keys which the version that began it did not have."""

import pytest

from nesso_tune.recipes.schema import dump
from nesso_tune.runs.resume import _with_new_keys, differences
from tests.support.runs import recipe


@pytest.mark.parametrize("stated", [False, True])
def test_a_key_that_a_manifest_lacks_counts_as_its_default(stated):
    now = recipe("sft", "run", ["rows.jsonl"], train={"deterministic": stated})
    recorded = dump(now)
    del recorded["train"]["deterministic"]
    recorded["train"]["weight_decay"] = 0.1
    filled = _with_new_keys(recorded, dump(now), now.model_dump(exclude_defaults=True))
    expected = {"train.weight_decay": (0.1, 0.0)}
    assert differences(filled, dump(now)) == expected | ({"train.deterministic": (None, True)} if stated else {})
