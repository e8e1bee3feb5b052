"""The clock that the benchmarks share: contenders take turns, and ratios are taken within each round."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from common.errors import UserError

Name = TypeVar("Name", bound=Hashable)


@contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """NumPy's BLAS with n threads. PyTorch's threads are its own."""
    from threadpoolctl import threadpool_limits  # not at the top: without it, run_program says what to do

    with threadpool_limits(n, user_api="blas"):
        yield


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """How long a call takes: the mean of so many."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def alternate(
    contenders: Mapping[Name, Callable[[], object]], rounds: int, calls: int = 1, uncounted: int = 0
) -> dict[Name, np.ndarray]:
    """Seconds of a call of each contender in each round, (rounds,): in a round each has one turn.

    A turn is so many calls that are not counted, and then so many that are. Two rounds before warm up.
    """
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    for i in tqdm(range(rounds + 2), desc="rounds", leave=False, disable=None):
        for name, function in contenders.items():
            for _ in range(uncounted):
                function()
            elapsed = seconds(function, calls)
            if i >= 2:
                times[name].append(elapsed)
    return {name: np.array(values) for name, values in times.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> str:
    """Median over the rounds of their quotient, with its quartiles."""
    low, middle, high = np.percentile(numerator / denominator, (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def high_water() -> float:
    """The most memory that this process has had, in MB of 1e6 bytes. Raises UserError where the system does not tell.

    It never falls, so each thing that is measured needs a process of its own.
    """
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError as error:  # Windows
        raise UserError("this bench measures memory too, which it can on Linux and macOS only") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
