"""Which tokens are read at which step. Randomness here is addressed, not consumed.

Whatever is random at a step is drawn from a generator made for that step alone, from (seed, what for, step). Nothing is
carried from one step to the next, so a resumed run needs no stored generator to go on exactly as it would have, and
both engines read the same tokens.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np

from common.errors import UserError

__all__ = ["Batches", "step_rng"]

STREAMS = ("epoch", "estimate", "dropout", "sample")  # an order is part of the addresses: append only

Batch = tuple[np.ndarray, np.ndarray]  # idx and targets, each (B, T) int64; targets are idx one token further on


def step_rng(seed: int, step: int, stream: str) -> np.random.Generator:
    """The generator of one stream at one step (or epoch). All (seed, step, stream) are independent of each other."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), step)))


class Batches:
    """The training split in an endless order without replacement: each token is learned from once an epoch.

    tokens: (n,) integers, n > block_size
    block_size, batch_size: T and B of the batches

    In each epoch the split is cut into windows of T tokens that do not overlap; where the first one begins is drawn
    anew each epoch, so that over the epochs a token is seen at every position of a window, and with every context. The
    windows are then shuffled. Step s reads windows s B to (s + 1) B of the endless sequence of epochs, so a batch may
    begin in one epoch and end in the next. At most 2 T tokens at the ends of the split are left out of an epoch.

    Raises UserError if the split is too short for a single window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
    ) -> None:
        if len(tokens) <= block_size:
            raise UserError(
                f"the training split has {len(tokens)} tokens, but a window needs block_size + 1 = {block_size + 1}: "
                "use a longer text, or lower block_size"
            )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.read: Callable[[np.ndarray, np.ndarray, int], Batch] = read_windows  # a GPU has its own way to gather
        # One window fewer than fit, if that leaves any: so there is room to begin anywhere in the first T tokens.
        self.windows_per_epoch = max(1, len(tokens) // block_size - 1)
        self._epoch_starts = lru_cache(maxsize=2)(self._draw_epoch)  # a batch touches two epochs

    def __reduce__(self) -> tuple:
        """How to make the same in another process: its caches do not travel."""
        return Batches, (self.tokens, self.block_size, self.batch_size, self.seed)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """(windows_per_epoch,): where each window of an epoch begins, in the order in which they are read."""
        rng = step_rng(self.seed, epoch, "epoch")
        T, K = self.block_size, self.windows_per_epoch
        offset = rng.integers(min(T, len(self.tokens) - K * T))
        starts = rng.permutation(K)
        starts *= T  # in place: a large corpus has millions of windows
        starts += offset
        return starts

    def at(self, step: int) -> Batch:
        """idx, targets (B, T): the batch of the update that follows `step` updates."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self._epoch_starts(n // self.windows_per_epoch)[n % self.windows_per_epoch] for n in numbers]
        return self.read(self.tokens, np.array(starts), self.block_size)


def random_batch(tokens: np.ndarray, block_size: int, batch_size: int, rng: np.random.Generator) -> Batch:
    """idx, targets (B, T) from random places of tokens (n,), with replacement; T is block_size, or n - 1 if less."""
    T = min(block_size, len(tokens) - 1)
    return read_windows(tokens, rng.integers(len(tokens) - T, size=batch_size), T)


def read_windows(tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
    """idx (B, T) from tokens (n,) at starts (B,), and targets (B, T), the same one token further on."""
    windows = tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` micro-batches whose sizes differ by at most one. parts is at most B."""
    edges = [len(batch[0]) * part // parts for part in range(parts + 1)]
    return [tuple(ids[first:last] for ids in batch) for first, last in pairwise(edges)]
