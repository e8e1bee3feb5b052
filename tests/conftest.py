"""Settings of the whole suite.

Hypothesis runs the same examples every time ("ci", the default), so that a failure is a change of the code and never of
the weather; `--hypothesis-profile thorough` runs a thousand a test.
"""

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile("ci")

torch.set_num_threads(1)  # on models this small, threads only cost


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """A script starts what it puts into the background with SIGINT ignored, and so do all processes below it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_configure(config: pytest.Config) -> None:
    """Where numpygpt overflows or divides by zero, NumPy only warns: here that is an error."""
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning:numpygpt")
