"""The public names, their documentation and their types are pinned."""

import os
import pydoc
import subprocess
import sys
from pathlib import Path

import nesso_tune

REPOSITORY = Path(nesso_tune.__file__).parent.parent

PUBLIC = [
    "Conversation", "DPORecipe", "DataError", "GateRefused", "Message", "ModelError", "NessoError", "NumericalError",
    "Preempted", "PreferencePair", "RecipeError", "RunEnvironmentError", "SFTRecipe", "encode_conversation",
    "load_recipe", "load_tokenizer", "lr_multiplier", "make_plan", "prepare_data", "preview", "train",
]  # fmt: skip


def test_all_is_pinned():
    assert nesso_tune.__all__ == PUBLIC == sorted(nesso_tune._MODULES)


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


def test_help_is_short_and_names_everything():
    page = pydoc.plain(pydoc.render_doc(nesso_tune))
    assert len(page.splitlines()) < 120
    assert [name for name in PUBLIC if name not in page] == []
    assert set(PUBLIC) < set(dir(nesso_tune)), "completion still offers all names"


USER_CODE = """
from nesso_tune import SFTRecipe, load_recipe, train

recipe = load_recipe("quickstart/sft")
reveal_type(recipe)
reveal_type(train(recipe).model_dir)
if isinstance(recipe, SFTRecipe):
    reveal_type(recipe.data.packing)
train("quickstart/sft")
"""
# Only modules that these names need are followed, which keeps the check cheap.
MYPY = """
[mypy]
strict = true
plugins = pydantic.mypy
[mypy-nesso_tune.data.*,nesso_tune.chat.*,nesso_tune.model.*,nesso_tune.training.*,nesso_tune.distributed.*]
follow_imports = skip
[mypy-nesso_tune.generation.*,nesso_tune.export.*,nesso_tune.reports.*,nesso_tune.launch.*,nesso_tune.cache]
follow_imports = skip
[mypy-torch.*,numpy.*,transformers.*,trl.*,peft.*,accelerate.*,datasets.*,rich.*]
follow_imports = skip
"""


def test_a_user_sees_the_types(tmp_path):
    """The package stands on PYTHONPATH, where mypy reads types only of packages with py.typed."""
    (tmp_path / "user.py").write_text(USER_CODE)
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600).stdout
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in out.splitlines() if "Revealed" in line]
    assert revealed == [
        "nesso_tune.recipes.schema.SFTRecipe | nesso_tune.recipes.schema.DPORecipe", "pathlib.Path", "bool",
    ], out  # fmt: skip
    errors = [line for line in out.splitlines() if ": error: " in line]
    assert len(errors) == 1, out
    assert 'Argument 1 to "train" has incompatible type "str"' in errors[0]
