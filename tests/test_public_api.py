"""What users import is pinned."""

import nesso_tune

PUBLIC = [
    "Conversation", "DPORecipe", "DataError", "GateRefused", "Message", "ModelError", "NessoError", "NumericalError",
    "Preempted", "PreferencePair", "RecipeError", "RunEnvironmentError", "SFTRecipe", "encode_conversation",
    "load_recipe", "load_tokenizer", "lr_multiplier", "make_plan", "prepare_data", "preview", "train",
]  # fmt: skip


def test_all_is_pinned():
    assert nesso_tune.__all__ == PUBLIC


def test_every_name_can_be_imported_and_is_documented():
    for name in PUBLIC:
        assert getattr(nesso_tune, name).__doc__, name


def test_exit_codes_are_the_contract():
    codes = {
        name: getattr(nesso_tune, name).exit_code for name in PUBLIC if hasattr(getattr(nesso_tune, name), "exit_code")
    }
    assert codes == {
        "NessoError": 1, "RecipeError": 2, "DataError": 3, "ModelError": 4, "RunEnvironmentError": 5,
        "NumericalError": 6, "GateRefused": 7, "Preempted": 75,
    }  # fmt: skip
