"""How the command line ends."""

import os
import subprocess
import sys

from tests.support.runs import ROOT

FRAGILE = """
import os
class Late:
    def __del__(self, end=os._exit):  # what a library's objects may do while Python takes itself apart
        end(134)
late = Late()
import atexit
atexit.register(lambda: print("tidied up"))
from nesso_tune.cli.main import main
main(["schema"])
"""


def ends(**launched):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **launched}
    done = subprocess.run([sys.executable, "-c", FRAGILE], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout


def test_a_launchers_process_ends_as_it_should_whatever_libraries_leave_behind():
    for processes in ("1", "2"):
        code, out = ends(WORLD_SIZE=processes)
        assert code == 0
        assert out.endswith("}\ntidied up\n"), "everything is written, and what was registered is done"
    assert ends()[0] == 134, "otherwise Python takes itself apart, which is what this is about"
