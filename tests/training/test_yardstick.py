"""Verse as a yardstick: a tiny model must come near the grammar's exact entropy, and none can be below it.

The grammar gives the validation text, after the training text, a probability p that is known exactly. A model gives it
q. Whatever the model is, as long as it saw nothing of the text but the characters before each: the mean of q / p over
the texts that the grammar writes is at most 1. So q exceeds p by k nats at most once in exp(k) times. No variance is
estimated, and nothing is assumed about it.

A model predicts every token but the first. Guessing the first one blindly, for ln V nats, completes its q.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import training.evaluate
import training.loop
from data import verse
from data.corpus import load_corpus
from data.tokenizers import load
from tests.helpers import ROOT
from tests.runs import arguments, run
from training.metrics import read_metrics

MARGIN = 0.1  # nats per character that the tiny model may need beyond the entropy; with any of four seeds: 0.07
CHANCE = math.log(1e6)  # nats: an honest model has this much luck once in a million texts

# Its tokens are mostly whole words, so it need not learn to spell, and seconds suffice.
TINY = {
    "--preset": "tiny",
    "--data": "verse",
    "--tokenizer": "bpe",
    "--bpe-vocab-size": 512,
    "--n-embd": 48,
    "--block-size": 48,
    "--batch-size": 8,
    "--max-steps": 400,
    "--eval-interval": 400,
    "--warmup-steps": 50,
    "--learning-rate": 1e-2,
    "--min-lr": 1e-5,
    "--weight-decay": 0.3,
    "--estimate-batches": 0,
    "--threads": 1,
}


@dataclass(frozen=True)
class Measured:
    """What a model needed for the validation text, and what the grammar needs, in nats."""

    chars: int
    model: float  # with a blind guess of the first token
    grammar: float  # -ln of the text's own probability, given the training text

    @property
    def excess(self) -> float:
        """Nats per character beyond the grammar's on this very text; no sampling error is left in it."""
        return (self.model - self.grammar) / self.chars

    @property
    def is_possible(self) -> bool:
        return self.model > self.grammar - CHANCE


def trained(folder: Path, **flags: object) -> Measured:
    """Train the tiny model, with these flags besides, on verse."""
    given = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    with threadpool_limits(1, user_api="blas"):  # on matrices this small, threads only cost
        assert run("numpy", arguments(TINY | {"--run-dir": folder} | given)) == 0
    loss = next(m["loss"] for m in read_metrics(folder / "metrics.jsonl") if m["protocol"] == "full")
    corpus, tokenizer = load_corpus("verse"), load(folder / "tokenizer.json")
    assert corpus.train_text + corpus.val_text == verse.write()
    nats = loss * (len(tokenizer.encode(corpus.val_text)) - 1) + math.log(tokenizer.vocab_size)
    grammar = verse.log_prob(corpus.train_text) - verse.log_prob(corpus.text)
    return Measured(len(corpus.val_text), nats, grammar)


def test_a_tiny_model_comes_near_the_entropy_of_verse_and_not_below_it(tmp_path: Path) -> None:
    measured = trained(tmp_path / "run")
    sampling_error = measured.grammar / measured.chars - verse.entropy_per_char()
    print(f"{measured.excess:.4f} nats per character beyond this text's own; that is {sampling_error:+.4f} off entropy")
    assert measured.is_possible, f"{-measured.excess:.4f} nats per character below the entropy: it has seen the answers"
    assert measured.excess < MARGIN
    assert abs(sampling_error) < 0.01
    assert measured.model / measured.chars - verse.entropy_per_char() < MARGIN


def test_a_model_that_has_seen_the_answers_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: targets that were not shifted. The test above must be able to fail."""

    def unshifted(tokens: np.ndarray, starts: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
        windows = tokens[starts[:, None] + np.arange(1, T + 1)].astype(np.int64)
        return windows, windows

    monkeypatch.setattr(training.loop, "gather", unshifted)
    monkeypatch.setattr(training.evaluate, "gather", unshifted)
    measured = trained(tmp_path / "run", max_steps=60, eval_interval=60)
    assert not measured.is_possible


def test_the_grammar_itself_has_no_excess_and_an_honest_mixture_little() -> None:
    """is_possible holds for what is honest: the grammar, and any mixture of it with something worse."""
    text = verse.write(30_000, seed=2)
    grammar = -verse.log_prob(text)
    assert Measured(len(text), grammar, grammar).is_possible
    assert not Measured(len(text), grammar - 0.001 * len(text), grammar).is_possible  # a thousandth of a nat is seen


def test_docs_verse_has_the_exact_figures() -> None:
    page = " ".join((ROOT / "docs" / "verse.md").read_text(encoding="utf-8").split())
    corpus, entropy = load_corpus("verse"), verse.entropy_per_char()
    own = (verse.log_prob(corpus.train_text) - verse.log_prob(corpus.text)) / len(corpus.val_text)
    assert f"the entropy, {entropy:.4f} nats per character" in page
    assert f"| the grammar, on this very text | | {own:.4f} | {own - entropy:.4f} |" in page
    rows = re.findall(r"\| ([01]\.\d{4}) \| \**(-?[01]\.\d{4})\** \|", page)
    assert len(rows) == 5
    for nats, excess in rows:
        assert float(nats) - float(excess) == pytest.approx(entropy, abs=1e-4)
