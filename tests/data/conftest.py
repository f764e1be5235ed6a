"""Recipes in one line."""

import pytest

from nesso_tune import DPORecipe, SFTRecipe


@pytest.fixture
def sft(base, tmp_path):
    """An SFT recipe over sources (paths or dicts) with keys of `data`."""

    def make(*sources, seed=42, chat=None, **data):
        data = {"sequence_len": 256, "validation_size": 0} | data
        return SFTRecipe.model_validate(
            {"output_dir": str(tmp_path / "run"), "seed": seed, "model": {"base": base}, "chat": chat or {},
             "data": {**data, "sources": [s if isinstance(s, dict) else {"path": s} for s in sources]}}
        )  # fmt: skip

    return make


@pytest.fixture
def dpo(base, tmp_path):
    """A DPO recipe over sources (paths or dicts) with keys of `data`."""

    def make(*sources, **data):
        data = {"sequence_len": 256, "validation_size": 0} | data
        return DPORecipe.model_validate(
            {"output_dir": str(tmp_path / "run"), "model": {"base": base},
             "data": {**data, "sources": [s if isinstance(s, dict) else {"path": s} for s in sources]}}
        )  # fmt: skip

    return make


@pytest.fixture
def duels():
    """Six preference pairs."""
    return [
        {"prompt": f"Domanda {i}?", "chosen": f"Sì, la risposta è {i}.", "rejected": "Boh.", "lang": "it"}
        for i in range(6)
    ]
