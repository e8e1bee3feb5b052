"""The bigram: guess the next token from the last one alone. The baseline that every GPT must beat.

    python bigram.py [--data NAME|FILE] [--alpha F] [--steps N]

One table, found twice. Once by counting: of all tokens that followed `a` in the training text, how many were `b`? And
once as a network would: a (V, V) table of logits, softmax, cross-entropy, gradients by hand, and steps downhill. The
second must arrive where the first one is, for that is the lowest point there is; so a learned loss can be checked
against a counted one before the same softmax and the same cross-entropy sit on top of a transformer.

A pair that the training text lacks must not be impossible, so every pair counts as seen `alpha` times more than it was.
Losses are mean nats per token over the whole validation split, each token but the first predicted once.
"""

import math
import sys
from collections.abc import Iterator
from typing import Annotated

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

from common.cli import parse, run_program
from common.errors import UserError
from data.corpus import load_corpus
from data.tokenizers import CharTokenizer

ALPHA = 0.1
CHUNK = 1 << 20  # tokens counted at a time: a corpus may be a memory-mapped file larger than memory
MAX_TABLE = 1 << 18  # logits, of 512 distinct characters: about 20 seconds of descent; more is left out


def bigram_loss(train_ids: np.ndarray, val_ids: np.ndarray, vocab_size: int, *, alpha: float = ALPHA) -> float:
    """The loss on val_ids (m,) of the table counted on train_ids (n,), both integers in [0, vocab_size).

    Mean nats per token over val_ids[1:]. No (V, V) table is made, so vocab_size may be GPT-2's: only pairs that
    val_ids holds are counted. Raises UserError for fewer than two tokens, or an alpha that is not positive.
    """
    check_alpha(alpha)
    for ids, name in ((train_ids, "training"), (val_ids, "validation")):
        if len(ids) < 2:
            raise UserError(f"the {name} split has {len(ids)} tokens; a bigram needs at least 2")
    asked = np.unique(np.concatenate([np.unique(keys) for keys in key_chunks(val_ids, vocab_size)]))
    times = np.zeros(len(asked), dtype=np.int64)  # how often each pair of `asked` occurs in val_ids
    for keys in key_chunks(val_ids, vocab_size):
        times += np.bincount(np.searchsorted(asked, keys), minlength=len(asked))
    pairs = np.zeros(len(asked), dtype=np.int64)  # how often it occurs in train_ids
    firsts = np.zeros(vocab_size, dtype=np.int64)  # how often each token is followed by another there
    for keys in key_chunks(train_ids, vocab_size):
        places = np.minimum(np.searchsorted(asked, keys), len(asked) - 1)
        pairs += np.bincount(places[asked[places] == keys], minlength=len(asked))
        firsts += np.bincount(keys // vocab_size, minlength=vocab_size)
    nll = np.log(firsts[asked // vocab_size] + alpha * vocab_size) - np.log(pairs + alpha)
    return float((nll * times).sum() / times.sum())


def key_chunks(ids: np.ndarray, vocab_size: int) -> Iterator[np.ndarray]:
    """pair_keys(ids), CHUNK at a time."""
    for start in range(0, len(ids) - 1, CHUNK):
        yield pair_keys(ids[start : start + CHUNK + 1], vocab_size)


def pair_keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """(n - 1,) int64: one number for each pair of neighbours in ids (n,), first * vocab_size + second."""
    ids = np.asarray(ids, dtype=np.int64)
    return ids[:-1] * vocab_size + ids[1:]


def check_alpha(alpha: float) -> None:
    """Raise UserError unless alpha is a positive number."""
    if not 0 < alpha < math.inf:
        raise UserError(f"alpha is {alpha}: expected a positive number, or unseen pairs would be impossible")


def count_pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V, V) int64: how often token b (column) follows token a (row) in ids (n,)."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    for keys in key_chunks(ids, vocab_size):
        counts += np.bincount(keys, minlength=len(counts))
    return counts.reshape(vocab_size, vocab_size)


def unigram_entropy(ids: np.ndarray, vocab_size: int) -> float:
    """The entropy, in nats, of the frequencies of the tokens in ids (n,): the loss of guessing without looking."""
    frequencies = np.bincount(ids, minlength=vocab_size) / len(ids)
    seen = frequencies[frequencies > 0]
    return float(-(seen * np.log(seen)).sum())


def cross_entropy_forward(logits: np.ndarray, counts: np.ndarray) -> tuple[float, tuple]:
    """Mean nats of all pairs that counts (V, V) counts, when row a of logits (V, V) predicts what follows a; cache.

    All pairs at once: the (a, b) that occur n times have the same loss, so it is taken n times.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)  # the same softmax, and no exp can overflow
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -(counts * log_probs).sum() / counts.sum()
    return float(loss), (log_probs, counts)


def cross_entropy_backward(cache: tuple) -> np.ndarray:
    """dlogits (V, V). The loss of one pair, log(sum(exp(row a))) - row_a[b], has the gradient softmax - one-hot."""
    log_probs, counts = cache
    return (counts.sum(axis=1, keepdims=True) * np.exp(log_probs) - counts) / counts.sum()


def train_table(counts: np.ndarray, *, steps: int, learning_rate: float = 2.0, momentum: float = 0.9) -> np.ndarray:
    """Logits (V, V) after `steps` of gradient descent from zero on the pairs in counts (V, V), all positive.

    A row's gradient is as small as its token is rare. But the rows share no parameter, each is a problem of its own,
    so each may have its own step: learning_rate / the share of pairs that are the row's. The curvature of a row is at
    most half its share, which keeps a rate of 2 stable. Logits of pairs that hardly ever occur have a long way down a
    gentle slope; momentum takes it in a tenth of the steps.
    """
    logits, velocity = np.zeros(counts.shape), np.zeros(counts.shape)
    steps_of_rows = learning_rate * counts.sum() / counts.sum(axis=1, keepdims=True)
    for _ in range(steps):
        _, cache = cross_entropy_forward(logits, counts)
        velocity = momentum * velocity - steps_of_rows * cross_entropy_backward(cache)
        logits += velocity
    return logits


def report(data: str | None, alpha: float, steps: int) -> None:
    """Print the baselines of a corpus, in nats per character."""
    check_alpha(alpha)
    if steps < 0:
        raise UserError(f"steps is {steps}: expected 0 or more")
    corpus = load_corpus(data)
    tokenizer = CharTokenizer.from_text(corpus.text)
    size = tokenizer.vocab_size
    train_ids, val_ids = tokenizer.encode(corpus.train_text), tokenizer.encode(corpus.val_text)
    counted = bigram_loss(train_ids, val_ids, size, alpha=alpha)
    print(f"{corpus.name}: {len(train_ids):,} training and {len(val_ids):,} validation characters, {size:,} distinct")
    print("nats per character")
    print(f"  {math.log(size):.4f}  uniform")
    print(f"  {unigram_entropy(train_ids, size):.4f}  unigram entropy of the training split")
    print(f"  {counted:.4f}  bigram, counted: whole validation split, alpha {alpha}")
    if size * size <= MAX_TABLE:
        table = train_table(count_pairs(train_ids, size) + alpha, steps=steps)
        trained, _ = cross_entropy_forward(table, count_pairs(val_ids, size))
        print(f"  {trained:.4f}  bigram, trained: {steps:,} steps of gradient descent, {trained - counted:+.6f}")
    else:
        print(f"          bigram, trained: left out, a table of {size:,} x {size:,} would take too long")
    if corpus.entropy_per_char is not None:
        print(f"  {corpus.entropy_per_char:.4f}  the grammar's exact entropy, the floor")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def arguments(
        data: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None,
        alpha: float = ALPHA,
        steps: int = 5_000,
    ) -> tuple[str | None, float, int]:
        """The bigram baseline of a corpus: counted, and trained by gradient descent.

        Args:
            data: shakespeare_char, verse, or the path of a UTF-8 text file.
            alpha: how often every pair counts as seen beyond what it was.
            steps: of gradient descent.
        """
        return data, alpha, steps

    def program() -> int:
        report(*parse(arguments, "python bigram.py", argv))
        return 0

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
