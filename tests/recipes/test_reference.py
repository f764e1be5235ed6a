"""docs/recipe.md says what the schema says."""

import importlib.util

from tests.support.runs import ROOT


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "make_recipe_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == script.reference(), "run python scripts/make_recipe_reference.py"
    for key in ("`constant_ratio`", "`beta`", "`min_score`", "`target_modules`"):
        assert key in page
