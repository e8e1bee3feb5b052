"""Settings of the whole suite.

Hypothesis runs the same examples every time ("ci", the default), so that a failure is a change of the code and never of
the weather; `--hypothesis-profile thorough` runs a thousand a test.
"""

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile("ci")

torch.set_num_threads(1)  # on models this small, threads only cost


def pytest_configure(config: pytest.Config) -> None:
    """Where numpygpt overflows or divides by zero, NumPy only warns: here that is an error."""
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning:numpygpt")
