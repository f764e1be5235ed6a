"""`make test` draws the same examples on each run, whatever ran before and whatever the hashes of texts are."""

import os
import subprocess
import sys
from pathlib import Path

DRAW = """
import hashlib, importlib, sys
from hypothesis import given, strategies as st
from tests.support.examples import examples
for name in sys.argv[1:]:
    importlib.import_module(name)
drawn = hashlib.sha256()

@examples(200)
@given(st.tuples(st.text(), st.integers(), st.floats(), st.sets(st.text(max_size=3), max_size=3).map(sorted)))
def draw(values):
    drawn.update(repr(values).encode())

draw()
print(drawn.hexdigest())
"""


def test_examples_are_the_same_in_each_process():
    def digest_of(seed, *loaded):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        environment.pop("NESSO_TUNE_EXAMPLES", None)
        return subprocess.Popen(
            [sys.executable, "-c", DRAW, *loaded], stdout=subprocess.PIPE, text=True, env=environment
        )

    one, other = digest_of("1"), digest_of("2", "nesso_tune.recipes.error_messages", "nesso_tune.recipes.rules")
    digests = [process.communicate()[0] for process in (one, other)]
    assert digests[0] == digests[1] != ""
