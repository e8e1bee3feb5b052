"""Two measures of a model on a split: the exact one that runs are compared by, and a quick estimate of it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import SupportsFloat

import numpy as np

from training.batches import Batch, gather, random_batch, step_rng

# idx, targets (B, T) -> mean loss in nats. It may be a number on a GPU: all are asked for before one is looked at.
LossFunction = Callable[[np.ndarray, np.ndarray], SupportsFloat]

TOKENS_AT_ONCE = 2048  # of an evaluation batch: few enough for a CPU's cache, enough to keep its cores busy


def evaluate(
    loss: LossFunction,
    tokens: np.ndarray,
    block_size: int,
    batch_size: int | None = None,
    watch: Callable[[Iterator[Batch]], Iterable[Batch]] = iter,
) -> float:
    """The mean loss over a whole split, tokens (n,) with n >= 2, in nats per token. Nothing about it is random.

    The split is read in windows of block_size that do not overlap, the last of them as short as it must be. So each of
    the n - 1 tokens that have a token before them is predicted exactly once. The sum is taken in float64; the batch
    size decides how many windows are computed at once, and nothing else.

    watch: the batches pass through it, one by one as they are needed: a progress bar. What it raises is passed on

    Raises ValueError if the loss is not finite.
    """
    windows = consecutive_windows(tokens, block_size, batch_size or max(1, TOKENS_AT_ONCE // block_size))
    losses = [(loss(idx, targets), targets.size) for idx, targets in watch(windows)]
    total = sum(float(mean) * size for mean, size in losses)
    return finite(total / (len(tokens) - 1))


def consecutive_windows(tokens: np.ndarray, block_size: int, batch_size: int) -> Iterator[Batch]:
    """idx, targets (B, T) which together predict tokens[1:], each once; a last short window is a batch by itself."""
    whole, rest = divmod(len(tokens) - 1, block_size)
    starts = block_size * np.arange(whole)
    for first in range(0, whole, batch_size):
        yield gather(tokens, starts[first : first + batch_size], block_size)
    if rest:
        yield gather(tokens, np.array([whole * block_size]), rest)


def estimate(
    loss: LossFunction, tokens: np.ndarray, block_size: int, batch_size: int, num_batches: int, seed: int, step: int
) -> float:
    """The mean loss of a few random batches in nats per token: quick, noisy, and only to watch a run by.

    Raises ValueError if it is not finite.
    """
    rng = step_rng(seed, step, "estimate")
    losses = [loss(*random_batch(tokens, block_size, batch_size, rng)) for _ in range(num_batches)]
    return finite(math.fsum(map(float, losses)) / num_batches)


def finite(loss: float) -> float:
    """The loss, unless it is NaN or infinite: then ValueError."""
    if not math.isfinite(loss):
        raise ValueError(f"not finite: the loss in evaluation is {loss}")
    return loss


def bits_per_char(nats_per_token: float, num_tokens: int, num_chars: int) -> float:
    """The same loss over the characters that the tokens stand for: what makes tokenizers comparable."""
    return nats_per_token * num_tokens / (math.log(2) * num_chars)
