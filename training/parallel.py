"""Speed for the NumPy engine: threads that share a batch, and memory that is kept.

numpygpt.py knows nothing of this. NumPy releases Python's lock while it computes, so threads run side by side. It pays
when the BLAS is told to use one thread itself. Each thread computes a part of the batch, which is just a smaller batch:
`count` makes the losses and gradients of the parts add up to those of the whole, and with one random generator for each
sequence the parts drop what the whole batch would. So results do not depend on the number of parts, except for the
order of additions.
"""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from numpygpt import GPT, Generator, Generators, Muon, Params, rng_per_sequence

__all__ = ["MuonInParts", "add_grads", "loss_and_grads_in_parts", "loss_in_parts", "tune_process"]

Result = TypeVar("Result")


def tune_process(threads: int) -> None:
    """Make this process fast for `threads` computing threads: it keeps freed memory, and switches threads sooner.

    By default glibc, Linux's C library, takes every large array from the system as fresh pages, and their first touch
    costs a good part of a small training step. So large arrays get no page mappings of their own, and nothing below
    2 GB is handed back. Other systems' libraries are left alone. Both settings hold for the whole process.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the names and numbers of <malloc.h>
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if threads > 1:
        # A thread that comes back from the BLAS may find Python's lock taken: ask for it sooner than after 5 ms.
        sys.setswitchinterval(1e-4)


def loss_and_grads_in_parts(
    gpt: GPT,
    idx: np.ndarray,
    targets: np.ndarray,
    *,
    rng: Generator | Generators | None = None,
    count: int | None = None,
    threads: int = 1,
) -> tuple[float, Params]:
    """gpt.loss_and_grads(idx, targets, rng=rng, count=count), by `threads` threads, one for each part of the batch."""
    rngs = rng_per_sequence(rng, len(idx))
    count = int((targets >= 0).sum()) if count is None else count

    def loss_and_grads(part: slice) -> tuple[float, Params]:
        part_rngs = None if rngs is None else rngs[part]
        loss, grads = gpt.loss_and_grads(idx[part], targets[part], rng=part_rngs, count=count)
        return float(loss), grads

    (loss, grads), *others = run_in_parts(loss_and_grads, len(idx), threads)
    for other_loss, other_grads in others:
        loss += other_loss
        add_grads(grads, other_grads)
    return loss, grads


def loss_in_parts(gpt: GPT, idx: np.ndarray, targets: np.ndarray, *, threads: int = 1) -> float:
    """The loss of gpt.forward(idx, targets), likewise. No target may be -1: parts weigh as many tokens as they have."""

    def loss_sum(part: slice) -> float:
        _, loss = gpt.forward(idx[part], targets[part])
        assert loss is not None  # as there are targets
        return float(loss) * targets[part].size

    return sum(run_in_parts(loss_sum, len(idx), threads)) / targets.size


class MuonInParts:
    """numpygpt's Muon by `threads` threads, each of which has matrices of its own. The updates are the same bits."""

    def __init__(self, params: Params, *, weight_decay: float, threads: int = 1) -> None:
        names = sorted(params, key=lambda name: params[name].shape)  # so that each thread gets as many of every shape
        parts = [names[i::threads] for i in range(min(threads, len(names)))]
        self.parts = [Muon({name: params[name] for name in part}, weight_decay=weight_decay) for part in parts]

    @property
    def m(self) -> Params:
        """The momentum of all matrices."""
        return {name: m for muon in self.parts for name, m in muon.m.items()}

    def step(self, grads: Params, lr: float) -> None:
        """Muon.step. grads may have more than the matrices' gradients."""

        def step_part(part: slice) -> None:
            for muon in self.parts[part]:
                muon.step({name: grads[name] for name in muon.params}, lr)

        run_in_parts(step_part, len(self.parts), len(self.parts))


def add_grads(grads: Params, others: Params) -> Params:
    """grads plus others, in place."""
    for name, grad in grads.items():
        grad += others[name]
    return grads


def run_in_parts(function: Callable[[slice], Result], length: int, threads: int) -> list[Result]:
    """Cut range(length) into slices, one for each thread but none empty -> [function(slice), ...], in order.

    The first slice is computed in the calling thread, each other one in a new thread.
    """
    n = min(threads, length)
    first, *others = (slice(length * i // n, length * (i + 1) // n) for i in range(n))
    if not others:
        return [function(first)]
    with ThreadPoolExecutor(n - 1) as pool:
        futures = [pool.submit(function, part) for part in others]  # they start now
        return [function(first), *(future.result() for future in futures)]
