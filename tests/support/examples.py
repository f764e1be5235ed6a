"""Hypothesis profiles: fixed examples in `make test`, fresh and more examples in `make fuzz`."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers

SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large]  # they depend on the load of the machine
# No shrinking: a failure reproduces on the next run, and shrinking takes up to five minutes.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=SUPPRESSED,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
settings.register_profile(
    "fuzz", derandomize=False, database=None, deadline=None, print_blob=True, suppress_health_check=SUPPRESSED
)
settings.load_profile("fixed")

# Hypothesis also draws constants from the modules loaded so far, which depend on the order of the tests.
providers._get_local_constants = lambda: providers._local_constants

EXAMPLES_FACTOR = int(os.environ.get("NESSO_TUNE_EXAMPLES") or (5 if "NESSO_TUNE_ALL" in os.environ else 1))


def examples(count: int) -> settings:
    """Settings with `count` examples, multiplied by NESSO_TUNE_EXAMPLES if it is set."""
    return settings(max_examples=count * EXAMPLES_FACTOR)
