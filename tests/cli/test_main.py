"""Start and end of the command line."""

import os
import subprocess
import sys
from importlib import import_module

import pytest

from nesso_tune.cli.main import VERBS
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
