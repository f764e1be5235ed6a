"""The house: imports point down, files stay small, light modules stay light."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nesso_tune"
LAYERS = [
    ("logs",),
    ("errors", "conversation", "lr_schedule"),
    ("files",),
    ("metric_registry",),
    ("recipes",),
    ("planning",),
    ("hub", "cache"),
    ("chat",),
    ("data",),
    ("model", "distributed"),
    ("runs", "generation"),
    ("training", "evaluation"),
    ("export", "reports", "launch"),
    ("run", "smoke", "recipe_draft"),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft")
DEFERRED = {  # they load numpy, a fifth of the time of `check`, which a recipe without local data does not need
    ("estimate.py", "nesso_tune.data.filtering"),
    ("estimate.py", "nesso_tune.data.prepare"),
}


@cache
def imported(path):
    """(module, line, whether inside a function) of every import of a file."""
    tree, found = ast.parse(path.read_text()), []
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if names == ["nesso_tune"]:  # a module at the root, e.g. `from nesso_tune import cache`
            names = [f"nesso_tune.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [(name, node.lineno, id(node) in inside) for name in names]
    return found


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = layer_of(path)
    if own in ("__init__", "__main__"):
        return
    for name, line, deferred in imported(path):
        if not name.startswith("nesso_tune"):
            continue
        other = [*name.split("."), ""][1]
        assert LEVEL[other] <= LEVEL[own], f"{path.name}:{line} imports {name} from a layer above"
        if LEVEL[other] == LEVEL[own]:
            assert other == own, f"{path.name}:{line}: {own} and {other} are side by side and do not know each other"
        assert not deferred or own == "cli" or (path.name, name) in DEFERRED, (
            f"{path.name}:{line} hides an import of {name} in a function"
        )


def test_no_cycles_between_modules():
    graph = {}
    for path in MODULES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        names = [n for n, _, deferred in imported(path) if not deferred]
        graph[module] = {n for n in names if n.startswith("nesso_tune.") and n != module}
    graph["nesso_tune"] = set()  # its imports are for type checkers only

    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        for other in graph.get(module, ()) if module not in done else ():
            visit(other, [*trail, module])
        done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name} is too long"


@pytest.mark.parametrize("layer", ["recipes", "planning", "chat", "data"])
def test_light_layers_never_import_torch(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        for name, line, deferred in imported(path):
            root = name.split(".")[0]
            typing_only = "TYPE_CHECKING" in path.read_text() and root == "transformers"
            assert root != "torch", f"{path.name}:{line}"
            assert root not in HEAVY or deferred or typing_only, f"{path.name}:{line} imports {name} at once"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["check", "recipes/sft.yaml"], ["check", "recipes/dpo.yaml", "--json"], ["check", "quickstart/sft"]],
)
def test_help_and_check_load_nothing_heavy(arguments):
    code = (
        "import sys\nfrom nesso_tune.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert "LOADED []" in done.stdout


def test_files_that_the_architecture_page_names_exist():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.(?:py|md|yaml))`", page)
    assert len(named) > 40
    places = (PACKAGE, PACKAGE.parent)
    assert [name for name in named if "NAME" not in name and not any((p / name).exists() for p in places)] == []
