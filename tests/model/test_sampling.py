"""Generation: the same text from both engines, the text that the logits say, and with the key/value cache the text that
comes without it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import numpygpt
import torchgpt
from numpygpt import GPTConfig
from tests.helpers import (
    ALL_ENGINES,
    ENGINES,
    Arrays,
    assert_close,
    forward,
    generate,
    make,
    property_test,
    random_weights,
    tiles_of,
)
from tests.strategies import SEEDS, configs

of_both = pytest.mark.parametrize("engine", ENGINES)
of_all = pytest.mark.parametrize("engine", ALL_ENGINES)

MODULES: dict[str, ModuleType] = {"numpy": numpygpt, "torch": torchgpt}


def sample(engine: str, logits: np.ndarray, temperature: float, top_k: int | None, rng: object) -> np.ndarray:
    """The sampler of either engine alone: logits (B, V) -> (B,)."""
    if engine == "numpy":
        kept = logits.copy()
        tokens = numpygpt.sample(logits, temperature, top_k, rng)
        assert np.array_equal(logits, kept), "sample overwrote the logits"
        return tokens
    return torchgpt.sample(torch.from_numpy(logits.copy()), temperature, top_k, rng).numpy()


class Uniforms:
    """In place of a generator: these numbers, again and again."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.drawn = numbers, 0

    def random(self, size: int) -> np.ndarray:
        self.drawn += size
        return np.resize(np.array(self.numbers, np.float64), size)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


@dataclass
class Prompt:
    """A model, a prompt, and how to continue it."""

    config: GPTConfig
    params: Arrays
    idx: np.ndarray
    new: int
    options: dict
    seed: int
    attention_tile: int


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Prompts that end within the window, at its edge and far beyond; temperatures from 0 to hot, and every k."""
    config = draw(configs(vocab_sizes=(2, 7, 13), block_sizes=(1, 2, 4, 7)))
    edge = config.block_size
    return make_prompt(
        config,
        T=draw(st.sampled_from([1, edge, edge + 1, 3 * edge])),
        new=draw(st.sampled_from([edge + 3, 2, 1, 0])),
        B=draw(st.integers(1, 3)),
        ties=draw(st.sampled_from([0, 2, config.vocab_size])),
        seed=draw(SEEDS),
        attention_tile=draw(st.sampled_from([64, 1, 3])),
        temperature=draw(st.sampled_from([0, 1e-3, 0.5, 1.0, 2.0, 100.0])),
        top_k=draw(st.one_of(st.none(), st.integers(1, config.vocab_size + 2))),
    )


def make_prompt(
    config: GPTConfig,
    *,
    T: int,
    new: int,
    B: int = 2,
    ties: int = 0,
    seed: int = 0,
    attention_tile: int = 3,
    **options,
) -> Prompt:
    """Weights and a prompt. ties: so many tokens have the same embedding, of zeros, and with it the same logit."""
    params, rng = random_weights(config, seed), np.random.default_rng(seed)
    params["wte.weight"][:ties] = 0
    return Prompt(config, params, rng.integers(config.vocab_size, size=(B, T)), new, options, seed, attention_tile)


SMALL = GPTConfig(vocab_size=7, block_size=5, n_layer=2, n_head=2, n_embd=6, dropout=0.0)
ALWAYS = [
    {"prompt": make_prompt(SMALL, T=1, new=12, temperature=1.0, top_k=None)},
    {"prompt": make_prompt(SMALL, T=4, new=3, temperature=0.7, top_k=4, ties=3)},
    {"prompt": make_prompt(SMALL, T=12, new=3, temperature=2.0, top_k=5)},
]


@property_test(always=ALWAYS, prompt=prompts())
def test_sampling_parity(prompt: Prompt) -> None:
    """The same weights and the same generator give the same tokens in both engines, and leave it in the same state.

    A failure while test_model passes: the samplers, the caches or the cropping differ.
    """
    texts, states = {}, {}
    for engine in ALL_ENGINES:
        rng = np.random.default_rng(prompt.seed)
        with tiles_of(prompt.attention_tile):
            model = make(engine, prompt.config, prompt.params)
            texts[engine] = generate(model, prompt.idx, prompt.new, rng=rng, **prompt.options)
        states[engine] = rng.bit_generator.state
    B, T = prompt.idx.shape
    for engine in ALL_ENGINES:
        assert texts[engine].shape == (B, T + prompt.new)
        assert texts[engine].dtype == np.int64
        assert np.array_equal(texts[engine][:, :T], prompt.idx), f"{engine}: the prompt has changed"
        assert np.array_equal(texts[engine], texts["numpy"]), f"{engine} writes another text than numpy"
        assert states[engine] == states["numpy"], f"{engine} draws more or fewer random numbers than numpy"


@contextmanager
def recorded_logits(engine: str) -> Iterator[list[np.ndarray]]:
    """The logits that each step of generation samples from."""
    seen, module = [], MODULES[engine]
    original = module.sample

    def recording(logits: object, *others: object) -> object:
        seen.append(np.array(logits if engine == "numpy" else logits.numpy()))
        return original(logits, *others)

    with mock.patch.object(module, "sample", recording):
        yield seen


@of_both
@property_test(always=ALWAYS, prompt=prompts())
def test_the_cache_changes_nothing(engine: str, prompt: Prompt) -> None:
    """At every step the logits are those of a whole forward pass over the last block_size tokens.

    A failure: cached keys and values stand at wrong positions, are stale, or the context is cropped wrongly. Samples
    then decay after the first tokens, or at the window's edge.
    """
    model = make(engine, prompt.config, prompt.params)
    with tiles_of(prompt.attention_tile), recorded_logits(engine) as seen:
        text = generate(model, prompt.idx, prompt.new, rng=np.random.default_rng(prompt.seed), **prompt.options)
    assert len(seen) == prompt.new
    T = prompt.idx.shape[1]
    for step, logits in enumerate(seen):
        context = text[:, max(0, T + step - prompt.config.block_size) : T + step]
        expected = forward(model, context)[0][:, -1]
        meaning = f"Step {step} samples from other logits than those of its context."
        assert_close("cached", "logits", logits, expected, CACHE, scale=1.0, meaning=meaning)


CACHE = 1e-12  # 1e-13 over a thousand examples


@of_both
def test_a_stream_goes_on_where_generate_ends(engine: str) -> None:
    """A failure: sample.py, which streams, writes another text than generate."""
    config = GPTConfig(7, 5, n_layer=2, n_head=2, n_embd=6, dropout=0.0)
    model = make(engine, config, random_weights(config, 0))
    idx = np.array([[1, 2], [3, 4]])
    text = generate(model, idx, 12, rng=np.random.default_rng(0))
    prompt = idx if engine == "numpy" else torch.from_numpy(idx)
    stream = model.stream(prompt, rng=np.random.default_rng(0))
    for t in range(2, 14):
        assert np.array_equal(np.asarray(next(stream)), text[:, t]), f"token {t}"


@of_both
def test_rows_of_a_prompt_are_continued_independently(engine: str) -> None:
    """Greedily, so that no random number depends on the row. A failure: rows of a prompt see each other."""
    config = GPTConfig(7, 5, n_layer=2, n_head=2, n_embd=6, dropout=0.0)
    model = make(engine, config, random_weights(config, 3))
    idx = np.random.default_rng(0).integers(7, size=(3, 4))
    together = generate(model, idx, 9, temperature=0)
    for b in range(3):
        assert np.array_equal(generate(model, idx[b : b + 1], 9, temperature=0), together[b : b + 1])


@of_both
def test_without_a_generator_texts_differ(engine: str) -> None:
    """A failure: "no seed" is a seed."""
    config = GPTConfig(7, 5, n_layer=1, n_head=1, n_embd=6, dropout=0.0)
    model = make(engine, config, random_weights(config, 0))
    first, second = (generate(model, np.zeros((1, 1), np.int64), 50, temperature=10.0) for _ in range(2))
    assert not np.array_equal(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler

SOME_LOGITS = st.lists(st.sampled_from([-1e9, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 1e9]), min_size=1, max_size=9)


@property_test(
    row=SOME_LOGITS,
    temperature=st.sampled_from([0, 1e-300, 1e-3, 0.5, 1.0, 3.0, 1e30]),
    top_k=st.one_of(st.none(), st.integers(1, 11)),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=SEEDS,
)
def test_sampler_parity(row: list, temperature: float, top_k: int | None, dtype: type, seed: int) -> None:
    """On the same logits, with ties and extremes, and float32 or float64.

    A failure: top-k, ties, temperature or the inversion of the distribution differ between the engines.
    """
    logits = np.array([row, row[::-1], sorted(row)], dtype)
    ours, theirs = (sample(engine, logits, temperature, top_k, np.random.default_rng(seed)) for engine in ENGINES)
    assert np.array_equal(ours, theirs), f"NumPy draws {ours}, PyTorch {theirs}"


@of_both
@property_test(
    # Token 0 at a temperature of 0.5; another one if that is not used, or multiplied by.
    always=[{"row": [2.0, 1.0, 0.0], "temperature": 0.5, "top_k": 3, "u": 0.8}],
    row=SOME_LOGITS,
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.integers(1, 11),
    u=st.floats(0, 0.99),
)
def test_the_sampler_inverts_the_distribution(engine: str, row: list, temperature: float, top_k: int, u: float) -> None:
    """One uniform number a row: the token is the first whose cumulative probability is above it; in plain Python.

    A failure: probabilities are those of other logits; multiplied by the temperature, say, or cut by another k.
    """
    kth = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
    weights = [math.exp((x - max(row)) / temperature) if x >= kth else 0.0 for x in row]
    total, so_far, expected = math.fsum(weights), 0.0, None
    for token, weight in enumerate(weights):
        so_far += weight
        if so_far > u * total * (1 + 1e-12):
            expected = token
            break
        if so_far > u * total * (1 - 1e-12):
            return  # on the edge, where rounding decides
    rng = Uniforms(u)
    assert sample(engine, np.array([row]), temperature, top_k, rng) == [expected]
    assert rng.drawn == 1, f"{rng.drawn} random numbers drawn for one row"


@of_both
def test_no_token_without_probability_is_drawn_at_the_ends(engine: str) -> None:
    """A failure: u = 0 draws a first token that has probability 0, or the largest u a last one."""
    first, last = Uniforms(0.0), Uniforms(np.nextafter(1, 0))
    logits = np.array([[-np.inf, -1e9, 0.0, 1.0, -1e9]])
    assert sample(engine, logits, 1.0, None, first) == [2]
    assert sample(engine, logits, 1.0, None, last) == [3]
    many = np.zeros((1, 1001))
    many[0, -1] = -1e9
    assert sample(engine, many, 1.0, None, first) == [0]
    assert sample(engine, many, 1.0, None, last) == [999]


@of_both
def test_the_sampler_works_in_float64(engine: str) -> None:
    """A failure: float32 models draw by sums in float32; the engines add in another order, and their texts part."""
    row = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    cdf = np.exp(row.astype(np.float64)).cumsum()
    u = cdf[:-1] / cdf[-1] + 1e-10  # just above the share of each token, where the next one begins
    drawn = sample(engine, np.tile(row, (999, 1)), 1.0, None, Uniforms(*u))
    assert np.array_equal(drawn, np.arange(1, 1000))


@of_both
def test_top_k_keeps_ties_and_nothing_else(engine: str) -> None:
    """A failure: which of two equally likely tokens survives depends on their ids, or k + 1 tokens do."""
    logits = np.array([[2.0, 1.0, 3.0, 1.0, 0.0, 1.0]])
    reachable = {1: {2}, 2: {0, 2}, 3: {0, 1, 2, 3, 5}, 4: {0, 1, 2, 3, 5}, 5: {0, 1, 2, 3, 5}, 6: set(range(6))}
    for k in (1, 2, 3, 4, 5, 6, 7, 10**6, None):
        drawn = {int(sample(engine, logits, 5.0, k, Uniforms(u))[0]) for u in np.linspace(0, 0.9999, 500)}
        assert drawn == reachable.get(k, set(range(6))), f"top_k {k} draws {sorted(drawn)}"


@of_both
@property_test(seed=SEEDS, top_k=st.sampled_from([1, 2, 17, 250, 499, 500]))
def test_top_k_of_a_large_vocabulary(engine: str, seed: int, top_k: int) -> None:
    """A failure: what finds the k-th largest of few numbers does not find it among many."""
    row = np.random.default_rng(seed).standard_normal(500)
    drawn = sample(engine, np.tile(row, (2000, 1)), 1e6, top_k, np.random.default_rng(seed))
    assert set(drawn) <= set(np.argsort(-row)[:top_k]), "a token beyond the k likeliest was drawn"
    assert len(set(drawn)) > 0.5 * top_k, "some of the k likeliest tokens are never drawn"


@of_both
@property_test(row=SOME_LOGITS, seed=SEEDS)
def test_temperature_0_is_argmax(engine: str, row: list, seed: int) -> None:
    """And draws nothing; of equally likely tokens it takes the first. So does top_k 1 without ties at any temperature.

    A failure: greedy text is not greedy, or a division by zero.
    """
    rng = Uniforms(0.5)
    assert sample(engine, np.array([row]), 0, None, rng) == [row.index(max(row))]
    assert rng.drawn == 0, "a random number was drawn"
    if row.count(max(row)) == 1:
        assert sample(engine, np.array([row]), 3.0, 1, np.random.default_rng(seed)) == [row.index(max(row))]


@of_both
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (2.0, 5)])
def test_what_is_drawn_has_the_distribution_of_softmax(engine: str, temperature: float, top_k: int | None) -> None:
    """A chi-squared test over 20,000 draws with a fixed seed.

    A failure: the sampler's distribution is not the model's.
    """
    row = np.array([1.0, 0.0, -1.0, 2.0, 0.5, 0.5, -2.0, 1.5])
    weights = np.exp(row / temperature)
    if top_k is not None:
        weights[row < np.sort(row)[-top_k]] = 0
    expected = 20_000 * weights / weights.sum()
    drawn = sample(engine, np.tile(row, (20_000, 1)), temperature, top_k, np.random.default_rng(1))
    counts = np.bincount(drawn, minlength=8)
    possible = expected > 0
    assert not counts[~possible].any(), "tokens beyond top_k were drawn"
    chi2 = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # A chi-squared variable has mean n and variance 2 n.
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), f"chi-squared is {chi2:.0f} with {freedom} degrees of freedom"
    u = np.random.default_rng(1).random(20_000)
    assert np.corrcoef(u, drawn)[0, 1] > 0.9, "draws are not in the order of the uniform numbers"
