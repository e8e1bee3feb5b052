"""The bigram baseline: the counted table against a plain loop, the trained one against the counted one."""

import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bigram
from bigram import bigram_loss, count_pairs, cross_entropy_backward, cross_entropy_forward, train_table
from common.errors import UserError
from data import corpus, verse
from data.tokenizers import CharTokenizer

needs_shakespeare = pytest.mark.skipif(
    not corpus.SHAKESPEARE_FILE.exists(), reason="needs data/shakespeare_char/input.txt: python -m data.corpus"
)
rows_of_ids = st.lists(st.integers(0, 4), min_size=2, max_size=40).map(np.array)


def splits(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :], tokenizer.vocab_size


@given(rows_of_ids, rows_of_ids, st.floats(1e-3, 10))
def test_the_counted_loss_is_that_of_a_plain_loop(train_ids, val_ids, alpha):
    pairs = Counter(pairwise(train_ids.tolist()))
    firsts = Counter(train_ids[:-1].tolist())
    nll = [-math.log((pairs[a, b] + alpha) / (firsts[a] + 5 * alpha)) for a, b in pairwise(val_ids.tolist())]
    assert bigram_loss(train_ids, val_ids, 5, alpha=alpha) == pytest.approx(math.fsum(nll) / len(nll), rel=1e-12)


def test_a_loss_worked_out_on_paper():
    # After a came b twice and c once; with alpha 1 and three tokens, P(b|a) = 3/6 and P(c|a) = 2/6; c was never first.
    a, b, c = range(3)
    train_ids = np.array([a, b, a, b, a, c])
    assert bigram_loss(train_ids, np.array([a, b]), 3, alpha=1.0) == pytest.approx(math.log(2))
    assert bigram_loss(train_ids, np.array([a, c]), 3, alpha=1.0) == pytest.approx(math.log(3))
    assert bigram_loss(train_ids, np.array([c, c, a]), 3, alpha=1.0) == pytest.approx(math.log(3))
    assert bigram_loss(train_ids, np.array([a, b, b]), 3, alpha=1.0) == pytest.approx((math.log(2) + math.log(5)) / 2)


@given(rows_of_ids, rows_of_ids, st.integers(1, 7))
@settings(deadline=None)
def test_counting_in_chunks_makes_no_difference(train_ids, val_ids, size):
    loss, counts = bigram_loss(train_ids, val_ids, 5), count_pairs(train_ids, 5)
    expected = np.zeros((5, 5))
    for a, b in pairwise(train_ids.tolist()):
        expected[a, b] += 1
    assert counts.tolist() == expected.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigram, "CHUNK", size)
        assert bigram_loss(train_ids, val_ids, 5) == loss
        assert count_pairs(train_ids, 5).tolist() == expected.tolist()


def test_a_large_vocabulary_needs_no_table():
    # A table of GPT-2's vocabulary would have 2.5 thousand million entries.
    ids = np.array([50_256, 0, 50_256, 0, 7], dtype=np.uint16)
    assert bigram_loss(ids, ids, 50_257, alpha=1.0) == pytest.approx(
        -(2 * math.log(3 / 50_259) + math.log(2 / 50_259) + math.log(2 / 50_259)) / 4
    )


def test_unigram_entropy():
    assert bigram.unigram_entropy(np.array([0, 1, 2, 3]), 9) == pytest.approx(math.log(4))
    assert bigram.unigram_entropy(np.array([5, 5, 5]), 9) == 0
    assert bigram.unigram_entropy(np.array([0, 0, 0, 1]), 2) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(deadline=None)
def test_gradients_by_hand_are_those_of_finite_differences(seed, size):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(size, size)) * 3
    counts = rng.integers(0, 9, size=(size, size)) + 0.5
    loss, cache = cross_entropy_forward(logits, counts)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-(counts * np.log(probs)).sum() / counts.sum(), rel=1e-12)
    step = 1e-5
    numeric = np.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        nudge = np.zeros_like(logits)
        nudge[place] = step
        up, down = cross_entropy_forward(logits + nudge, counts)[0], cross_entropy_forward(logits - nudge, counts)[0]
        numeric[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(cross_entropy_backward(cache), numeric, atol=1e-9)


def test_large_logits_do_not_overflow():
    loss, cache = cross_entropy_forward(np.array([[1e4, 0.0], [0.0, -1e4]]), np.ones((2, 2)))
    assert loss == pytest.approx(5e3)
    assert np.isfinite(cross_entropy_backward(cache)).all()


def entropy_of_table(counts):
    """The lowest loss that any table has on these counts: that of the counts themselves."""
    return -(counts * np.log(counts / counts.sum(axis=1, keepdims=True))).sum() / counts.sum()


def test_the_trained_table_reaches_the_counts_and_goes_no_lower():
    train_ids, val_ids, size = splits(verse.write(100_000))
    counts = count_pairs(train_ids, size) + bigram.ALPHA
    table = train_table(counts, steps=5_000)
    trained, _ = cross_entropy_forward(table, counts)
    assert 0 <= trained - entropy_of_table(counts) < 1e-4
    on_validation, _ = cross_entropy_forward(table, count_pairs(val_ids, size))
    assert on_validation == pytest.approx(bigram_loss(train_ids, val_ids, size), abs=2e-4)


@needs_shakespeare
def test_the_line_that_each_plot_of_tiny_shakespeare_shows():
    train_ids, val_ids, size = splits(corpus.load_corpus("shakespeare_char").text)
    counted = bigram_loss(train_ids, val_ids, size)
    assert counted == pytest.approx(2.4838, abs=5e-5)
    table = train_table(count_pairs(train_ids, size) + bigram.ALPHA, steps=5_000)
    trained, _ = cross_entropy_forward(table, count_pairs(val_ids, size))
    assert trained == pytest.approx(counted, abs=1e-4)


def test_bad_input_is_one_line():
    ids = np.array([0, 1, 0])
    for arguments, alpha, fault in [
        ((ids[:1], ids, 2), 1, "the training split has 1 tokens; a bigram needs at least 2"),
        ((ids, ids[:0], 2), 1, "the validation split has 0 tokens"),
        ((ids, ids, 2), 0, "alpha is 0: expected a positive number"),
        ((ids, ids, 2), -1.0, "alpha is -1.0"),
        ((ids, ids, 2), math.nan, "alpha is nan"),
        ((ids, ids, 2), math.inf, "alpha is inf"),
    ]:
        with pytest.raises(UserError, match=fault) as error:
            bigram_loss(*arguments, alpha=alpha)
        assert len(str(error.value).splitlines()) == 1


def test_the_command_prints_each_baseline_above_the_next(capsys):
    assert bigram.main(["--data", "verse"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "verse: 360,000 training and 40,000 validation characters, 48 distinct"
    uniform, unigram, counted, trained, floor = (float(line.split()[0]) for line in printed[2:])
    assert uniform == pytest.approx(math.log(48), abs=1e-4)
    assert uniform > unigram > counted > floor
    assert trained == pytest.approx(counted, abs=2e-4)
    assert floor == pytest.approx(verse.entropy_per_char(), abs=1e-4)


def test_the_command_leaves_a_table_out_that_would_take_too_long(capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(map(chr, range(0x4E00, 0x5200))) * 2, encoding="utf-8")
    assert bigram.main(["--data", str(path)]) == 0
    assert "trained: left out, a table of 1,024 x 1,024" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--data", "nowhere"], "no file 'nowhere'"),
        (["--data", "verse", "--alpha", "0"], "alpha is 0.0"),
        (["--data", "verse", "--steps", "-1"], "steps is -1"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(capsys, arguments, fault):
    assert bigram.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {fault}")
    assert len(printed.err.splitlines()) == 1


def test_importing_it_loads_no_framework():
    check = "import sys, bigram; print([name for name in ('torch', 'regex', 'tiktoken') if name in sys.modules])"
    root = Path(bigram.__file__).parent
    run = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
