"""Recipe files on disk."""

import pytest

from nesso_tune.recipes import load_recipe

from .texts import SFT


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe (text or bytes); returns the path."""

    def write(content=SFT, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def override(recipe_file):
    """Loads the small SFT recipe with overrides."""
    return lambda overrides, text=SFT: load_recipe(recipe_file(text), overrides)
