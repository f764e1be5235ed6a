"""Start and end of the command line."""

import os
import subprocess
import sys
from importlib import import_module
from unittest.mock import ANY

import pytest

from nesso_tune.cli import main as command_line
from nesso_tune.cli.main import VERBS
from nesso_tune.errors import Preempted, RecipeError
from tests.support.runs import ROOT, main_here

FRAGILE = """
import os
class Late:
    def __del__(self, end=os._exit):  # as destructors of libraries can do at interpreter shutdown
        end(134)
late = Late()
import atexit
atexit.register(lambda: print("tidied up"))
from nesso_tune.cli.main import main
main(["schema"])
"""
IMPORTS = """
import sys
from nesso_tune.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
print("\\nLOADED", [name for name in ("numpy", "pydantic", "tokenizers", "nesso_tune.data") if name in sys.modules])
"""


CHECK = """
import sys
from nesso_tune.cli.main import main
try:
    main(["check", "quickstart/sft", "--set", "output_dir=outputs/of-this-test"])
except SystemExit as end:
    assert not end.code
print("\\nLOADED", [name for name in ("numpy", "torch", "transformers", "datasets") if name in sys.modules])
"""


def run_python(code, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout


def test_a_process_of_a_launcher_exits_without_teardown():
    for processes in ("1", "2"):
        code, out = run_python(FRAGILE, WORLD_SIZE=processes)
        assert code == 0
        assert out.endswith("}\ntidied up\n"), "output is flushed and atexit functions run"
    others = FRAGILE.replace('main(["schema"])', 'main(["--help"])')
    assert run_python(others)[0] == 134, "other processes run destructors"


def test_check_of_data_that_is_not_prepared_loads_no_numpy(tmp_path):
    code, out = run_python(CHECK, NESSO_TUNE_CACHE=str(tmp_path))
    assert code == 0
    assert "from the first 500 rows" in out
    assert out.endswith("LOADED []\n")


def test_help_imports_no_verb():
    code, out = run_python(IMPORTS)
    assert code == 0
    assert out.endswith("LOADED []\n")
    for verb in VERBS:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_agrees_with_their_modules(verb, capsys):
    module, summary = VERBS[verb]
    function = getattr(import_module(f"nesso_tune.cli.{module}"), verb)
    assert function.__doc__.startswith(summary)
    code, out, _ = main_here(capsys, verb, "--help")
    assert code == 0
    assert " ".join(summary.split()) in " ".join(out.split())
    assert "--help" in out


def test_an_unknown_verb(capsys):
    code, _, err = main_here(capsys, "schemma")
    assert code == 2
    assert "No such command 'schemma'. Did you mean 'schema'?" in err


def test_a_rank_waits_for_the_one_that_prints_an_error_and_else_prints_it(capsys, monkeypatch):
    """Otherwise the launcher could kill rank 0 before it prints what all ranks have found."""
    waits = []
    monkeypatch.setattr(command_line.time, "sleep", waits.append)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main_here(capsys, "check", "missing.yaml") == (2, "", ANY)
    assert waits == [command_line.RANK0_PRINTS_S]
    command_line._print_error(RecipeError("a", "is wrong", "correct it"))
    assert (capsys.readouterr().err, len(waits)) == ("a: is wrong; correct it\n", 2)
    command_line._print_error(Preempted("a", "stopped", "start it again"))
    assert (capsys.readouterr().err, len(waits)) == ("", 2), "it is no error of one rank"
    monkeypatch.setenv("RANK", "0")
    command_line._print_error(RecipeError("a", "is wrong", "correct it"))
    assert (capsys.readouterr().err, len(waits)) == ("a: is wrong; correct it\n", 2)
