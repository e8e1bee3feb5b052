"""Hypothesis strategies: models and batches with everything that breaks such code."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from numpygpt import GPTConfig
from tests.helpers import Arrays, random_weights

FRESH, USUAL, LARGE, HUGE = 0.04, 1.0, 6.0, 40.0  # gains of random_weights; at HUGE, logits reach hundreds

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def configs(
    draw: st.DrawFn,
    vocab_sizes: tuple[int, ...] = (1, 2, 3, 7, 13, 17),
    block_sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 9),
) -> GPTConfig:
    """Small models with odd sizes. At least 3 channels: LayerNorm makes constants of fewer, see test_model."""
    n_head = draw(st.integers(1, 4))
    head_size = draw(st.sampled_from([size for size in (1, 2, 3, 5, 7, 8) if n_head * size >= 3]))
    return GPTConfig(
        vocab_size=draw(st.sampled_from(vocab_sizes)),
        block_size=draw(st.sampled_from(block_sizes)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * head_size,
        dropout=0.0,
        bias=draw(st.booleans()),
    )


@dataclass
class Example:
    """One model in float64, with one batch, and how NumPy cuts attention into tiles."""

    config: GPTConfig
    params: Arrays
    idx: np.ndarray
    targets: np.ndarray
    attention_tile: int
    description: str

    def __repr__(self) -> str:
        return f"Example({self.config}, {self.description}, idx={self.idx.tolist()}, targets={self.targets.tolist()})"


@st.composite
def examples(draw: st.DrawFn, gains: tuple[float, ...] = (FRESH, USUAL)) -> Example:
    """See make_example; T up to the window, and every way to cut, lay out and fill a batch."""
    config = draw(configs())
    return make_example(
        config,
        B=draw(st.integers(1, 3)),
        T=draw(st.integers(1, config.block_size)),
        gain=draw(st.sampled_from(gains)),
        seed=draw(SEEDS),
        ids=draw(st.sampled_from(["random", "equal", "ends"])),
        ignored=draw(st.sampled_from(["none", "some", "but one"])),
        layout=draw(st.sampled_from(["C", "F", "strided", "int32", "uint8"])),
        attention_tile=draw(st.sampled_from([64, 1, 2, 3, 5])),
    )


def make_example(
    config: GPTConfig,
    *,
    B: int = 3,
    T: int = 7,
    gain: float = USUAL,
    seed: int = 0,
    ids: str = "random",
    ignored: str = "some",
    layout: str = "C",
    attention_tile: int = 3,
) -> Example:
    """Weights and a batch. ids: random, all equal, or only the first and the last of the vocabulary; ignored: which
    targets are -1; layout: see lay_out."""
    rng, V = np.random.default_rng(seed), config.vocab_size
    idx = {
        "random": rng.integers(V, size=(B, T)),
        "equal": np.full((B, T), rng.integers(V)),
        "ends": rng.choice([0, V - 1], (B, T)),
    }[ids]
    targets = rng.integers(V, size=(B, T))
    keep = {"none": np.ones((B, T)), "some": rng.random((B, T)) < 0.5, "but one": np.zeros((B, T))}[ignored].astype(
        bool
    )
    keep[rng.integers(B), rng.integers(T)] = True
    targets = np.where(keep, targets, -1)
    return Example(
        config,
        random_weights(config, seed, gain),
        lay_out(idx, layout),
        lay_out(targets, "int32" if layout == "uint8" else layout),  # an unsigned type has no -1
        attention_tile,
        f"gain={gain}, seed={seed}, layout={layout}, attention_tile={attention_tile}",
    )


def lay_out(ids: np.ndarray, layout: str) -> np.ndarray:
    """The same ids, in another memory layout or integer type."""
    if layout == "F":
        return np.asfortranarray(ids)
    if layout == "strided":
        wide = np.full((2 * ids.shape[0], 3 * ids.shape[1]), 999)
        wide[::-2, ::3] = ids
        return wide[::-2, ::3]
    return np.ascontiguousarray(ids, {"int32": np.int32, "uint8": np.uint8}.get(layout, np.int64))


# In every run, whatever else is drawn: several layers and heads, tiles of attention with a rest, ignored targets.
TYPICAL = [
    make_example(GPTConfig(vocab_size=13, block_size=9, n_layer=2, n_head=2, n_embd=6, dropout=0.0, bias=bias))
    for bias in (True, False)
]
