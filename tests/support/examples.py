"""Examples of property tests: the same on each run of `make test`, fresh and many under `make fuzz`."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]  # both depend on how busy the machine is
# Without shrinking: a failure is the same on the next run, and shrinking takes up to five minutes.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE,
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
settings.register_profile(
    "fuzz", derandomize=False, database=None, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE
)
settings.load_profile("fixed")

# hypothesis also draws constants that it finds in the modules loaded so far: these differ with the order of the tests.
providers._get_local_constants = lambda: providers._local_constants

MANY = int(os.environ.get("NESSO_TUNE_EXAMPLES") or (5 if "NESSO_TUNE_ALL" in os.environ else 1))


def examples(count: int) -> settings:
    """That many examples, under the profile that was chosen; by hand NESSO_TUNE_EXAMPLES times as many."""
    return settings(max_examples=count * MANY)
