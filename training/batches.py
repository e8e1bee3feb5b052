"""Which tokens are read at which step. Randomness here is addressed, not consumed.

Whatever is random at a step is drawn from a generator made for that step alone, from (seed, what for, step). Nothing is
carried from one step to the next, so a resumed run needs no stored generator to continue exactly as it would have, and
both engines read the same tokens.
"""

import tempfile
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, shorten
from data.corpus import Corpus
from data.tokenizers import Tokenizer
from training.config import TrainConfig

STREAMS = ("epoch", "estimate", "dropout", "sample")  # an order is part of the addresses: append only

# idx and targets, each (B, T) integers, the targets one token further on: NumPy's arrays, or an engine's own.
Batch = tuple[Any, Any]


def step_rng(seed: int, step: int, stream: str) -> np.random.Generator:
    """The generator of one stream at one step (or epoch). All (seed, step, stream) are independent of each other."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(stream), step)))


class Batches:
    """The training split in an endless order without replacement: each token is learned from once an epoch.

    tokens: (n,) integers, n > block_size
    block_size, batch_size: T and B of the batches

    In each epoch the split is cut into windows of T tokens that do not overlap; where the first one begins is drawn
    for each epoch, so that over the epochs a token is seen at every position of a window, and with every context. The
    windows are then shuffled. Step s reads windows s B to (s + 1) B of the endless sequence of epochs, so a batch may
    begin in one epoch and end in the next. At most 2 T tokens at the ends of the split are left out of an epoch.

    Raises UserError if the split is too short for a single window.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int) -> None:
        if len(tokens) <= block_size:
            raise UserError(
                f"the training split has {len(tokens)} tokens, but a window needs block_size + 1 = {block_size + 1}: "
                "use a longer text, or lower block_size"
            )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        # One window fewer than fit, if that leaves any: so there is room to begin anywhere in the first T tokens.
        self.windows_per_epoch = max(1, len(tokens) // block_size - 1)

    def starts(self, step: int) -> np.ndarray:
        """(B,) integers: where the windows begin of the batch for the update that follows `step` updates."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {n // self.windows_per_epoch for n in numbers}
        drawn = {epoch: epoch_starts(self.seed, epoch, self.block_size, len(self.tokens)) for epoch in epochs}
        return np.array([drawn[n // self.windows_per_epoch][n % self.windows_per_epoch] for n in numbers])

    def at(self, step: int) -> Batch:
        """idx, targets (B, T) of that batch."""
        return gather(self.tokens, self.starts(step), self.block_size)


@lru_cache(maxsize=2)  # most batches lie in one epoch, a few in two
def epoch_starts(seed: int, epoch: int, T: int, num_tokens: int) -> np.ndarray:
    """(windows per epoch,): where each window of an epoch begins, in the order in which they are read."""
    rng = step_rng(seed, epoch, "epoch")
    K = max(1, num_tokens // T - 1)
    offset = rng.integers(min(T, num_tokens - K * T))
    starts = rng.permutation(K)
    starts *= T  # in place: a large corpus has millions of windows
    starts += offset
    starts.flags.writeable = False  # it is shared
    return starts


def random_batch(tokens: np.ndarray, block_size: int, batch_size: int, rng: np.random.Generator) -> Batch:
    """idx, targets (B, T) from random places of tokens (n,), with replacement; T is block_size, or n - 1 if less."""
    T = min(block_size, len(tokens) - 1)
    return gather(tokens, rng.integers(len(tokens) - T, size=batch_size), T)


def gather(tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
    """idx (B, T) from tokens (n,) at starts (B,), and targets (B, T), the same one token further on."""
    windows = tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64)
    return windows[:, :-1], windows[:, 1:]


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` micro-batches whose sizes differ by at most one. parts is at most B."""
    edges = [len(batch[0]) * part // parts for part in range(parts + 1)]
    idx, targets = batch
    return [(idx[first:last], targets[first:last]) for first, last in pairwise(edges)]


def encode(
    tokenizer: Tokenizer, pieces: Iterable[str], folder: Path, start: int, special: Collection[str]
) -> np.ndarray:
    """The token ids of a text, (n,) unsigned integers, mapped from a file: a large corpus takes disk and not memory.

    Pages of the file that were read count as memory all the same, so an id has no more bytes than it needs.

    The file has no name: it is in the folder as long as the array is, and a crash leaves nothing of it.
    start: where in its corpus the text begins
    special: the special tokens to read in it

    Raises UserError that says from where on something cannot be encoded.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        for piece in pieces:
            try:
                file.write(tokenizer.encode(piece, allowed_special=special).astype(dtype).tobytes())
            except UserError as error:
                raise UserError(f"from its character {start:,} on, {error}") from error
            start += len(piece)
        file.flush()
        return np.memmap(file, dtype, mode="r") if file.tell() else np.empty(0, dtype)


def special_tokens(tokenizer: Tokenizer, training: TrainConfig, corpus: Corpus) -> tuple[str, ...]:
    """The special tokens that are to be read in the text. If there are any, and they are not: say so. Raises UserError.

    Texts are cut at white space before they are encoded, so a special token that holds some could be cut in two.
    """
    if training.special_tokens:
        if not tokenizer.special_tokens:
            raise UserError(f"the tokenizer {training.tokenizer} has no special tokens: leave out --special-tokens")
        for token in tokenizer.special_tokens:
            if len(token.split()) > 1 or token != token.strip():
                raise UserError(f"special token {shorten(token)} holds white space: it cannot be read in a text")
        return tokenizer.special_tokens
    for token in tokenizer.special_tokens:
        if times := corpus.utf8.count(token.encode()):
            print(
                f"{corpus.name} holds {shorten(token)} {times:,} time{'s' * (times > 1)}, learned as ordinary text: "
                "--special-tokens would read it as the special token"
            )
    return ()
