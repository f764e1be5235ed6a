"""The ends of the declared range of versions."""

from scripts.version_range import requirements

PROJECT = """
[project]
dependencies = ["torch>=2.11,<2.16", "numpy>=2"]
optional-dependencies.dev = ["pytest>=9", "torch>=2.11,<2.16"]
"""


def test_oldest_is_the_lower_bound_and_newest_has_no_upper_one():
    assert requirements("oldest", PROJECT) == ["torch==2.11", "numpy==2", "pytest>=9"]
    assert requirements("newest", PROJECT) == ["torch>=2.11", "numpy>=2", "pytest>=9"]
