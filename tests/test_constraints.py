"""Every dependency has a pinned version, and pyproject.toml allows it."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one.specifier for one in found}


def test_every_dependency_is_pinned_within_what_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    pins = pinned()
    for one in wanted:
        (pin,) = pins[canonicalize_name(one.name)]
        assert pin.operator == "=="
        assert one.specifier.contains(pin.version), f"{one} does not allow {pin}"
