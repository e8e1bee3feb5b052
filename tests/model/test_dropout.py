"""Dropout. What NumPy drew is played back into PyTorch, so that both engines drop the same elements and can be compared
to the last digits; and what is drawn has the right rate, scale, place and address.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import numpygpt
import torchgpt
from numpygpt import GPTConfig
from tests.helpers import (
    ATTENTIONS,
    Arrays,
    assert_close,
    loss_and_grads,
    property_test,
    random_weights,
    rms,
    tiles_of,
    torch_twin,
    uncancelled_scales,
)
from tests.strategies import SEEDS
from training.parallel import loss_and_grads_in_parts

CONFIG = GPTConfig(vocab_size=7, block_size=9, n_layer=2, n_head=2, n_embd=6, dropout=0.3)
GRADIENTS = 1e-12  # 6e-14 over a thousand examples
PLACES = 1 + 3 * CONFIG.n_layer  # embeddings; then in each layer attention weights, attention output, MLP output


@contextmanager
def recorded_masks() -> Iterator[list[np.ndarray]]:
    """The factors (0 or 1 / (1 - p)) that numpygpt multiplies with, in the order of its calls.

    Attention works in tiles of queries: its factors are put together to (B, nh, T, T). What a tile leaves out lies in
    the future; there stand NaNs, which nothing may touch.
    """
    masks, dropout_forward = [], numpygpt.dropout_forward

    def recording(x: np.ndarray, p: float, rngs: list | None) -> tuple[np.ndarray, np.ndarray | None]:
        out, scale = dropout_forward(x, p, rngs)
        assert scale is not None, "nothing was dropped"
        if scale.ndim == 3:
            masks.append(scale)
        else:
            B, nh, rows, seen = scale.shape
            if seen == rows:  # the first tile of its layer
                masks.append(np.full((B, nh, 0, 0), np.nan))
            whole = np.full((B, nh, seen, seen), np.nan)
            whole[:, :, : seen - rows, : seen - rows] = masks[-1]
            whole[:, :, seen - rows :] = scale
            masks[-1] = whole
        return out, scale

    with mock.patch.object(numpygpt, "dropout_forward", recording):
        yield masks


@contextmanager
def played_back(masks: list[np.ndarray], p: float) -> Iterator[None]:
    """Inside, torchgpt's F.dropout multiplies with these, in order, and checks that it was asked to drop with p."""
    queue = list(masks)

    def dropout(x: torch.Tensor, rate: float = 0.5, training: bool = True) -> torch.Tensor:
        assert training, "F.dropout is off in training mode"
        assert rate == p, f"F.dropout is called with {rate}, not {p}"
        assert queue, "PyTorch drops in more places than NumPy"
        mask = torch.from_numpy(np.nan_to_num(queue.pop(0)))
        assert mask.shape == x.shape, f"NumPy drops in {tuple(mask.shape)} where PyTorch does in {tuple(x.shape)}"
        return x * mask

    with mock.patch.object(torchgpt.F, "dropout", dropout):
        yield
    assert not queue, f"PyTorch drops in {len(queue)} places fewer than NumPy"


@property_test(
    always=[{"seed": 0, "n_layer": 2, "n_head": 2, "T": 9, "p": 0.3, "bias": True, "tile": 4}],
    seed=SEEDS,
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    T=st.integers(1, 9),
    p=st.sampled_from([0.1, 0.3, 0.7]),
    bias=st.booleans(),
    tile=st.sampled_from([64, 1, 2, 4]),
)
def test_dropout_parity(seed: int, n_layer: int, n_head: int, T: int, p: float, bias: bool, tile: int) -> None:
    """Loss and every gradient with dropout in all four places.

    A failure while test_model passes: dropout stands in another place in one engine, or a backward pass does not use
    the mask of its forward pass.
    """
    config = GPTConfig(7, 9, n_layer=n_layer, n_head=n_head, n_embd=4 * n_head, dropout=p, bias=bias)
    params, rng = random_weights(config, seed), np.random.default_rng(seed)
    idx, targets = rng.integers(7, size=(2, 2, T))
    model, twin = numpygpt.GPT(config, params), torch_twin(config, params).train()
    with tiles_of(tile):
        with recorded_masks() as masks:
            loss, grads = model.loss_and_grads(idx, targets, rng=np.random.default_rng(seed))
        assert len(masks) == 1 + 3 * n_layer, f"dropout in {len(masks)} places, not in {1 + 3 * n_layer}"
        _, forward_loss = model.forward(idx, targets, rng=np.random.default_rng(seed))
    with played_back(masks, p):
        their_loss, their_grads = loss_and_grads(twin, idx, targets)
    assert forward_loss == loss, "forward and loss_and_grads drop differently with the same rng"
    scales = uncancelled_scales(model, idx, targets)
    assert_close(
        "the model with dropout, float64",
        "loss",
        loss,
        their_loss,
        1e-13,
        scale=1.0,
        meaning="Dropout stands elsewhere.",
    )
    for name, grad in grads.items():
        scale = max(rms(their_grads[name]), scales[name])
        meaning = "The backward pass does not reverse the forward pass that dropped."
        assert_close(
            "the model with dropout, float64", name, grad, their_grads[name], GRADIENTS, scale=scale, meaning=meaning
        )


@property_test(seed=SEEDS, p=st.sampled_from([0.1, 0.3, 0.7]))
def test_masks_have_the_right_rate_and_scale(seed: int, p: float) -> None:
    """A failure: what is kept is not scaled up to make up for what is dropped, or the rate is not p; so evaluation sees
    other activations than training did."""
    x = np.ones((2, 50, 40))
    out, scale = numpygpt.dropout_forward(x, p, [np.random.default_rng([seed, b]) for b in range(2)])
    assert set(np.unique(out)) == {0.0, 1 / (1 - p)}
    assert np.array_equal(out, scale)
    dropped = (out == 0).mean()
    assert abs(dropped - p) < 5 * np.sqrt(p * (1 - p) / out.size), f"{dropped} dropped, not {p}"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_torch_drops_with_the_rate_that_it_is_given(attention: str) -> None:
    """torchgpt's own masks, seen from outside: with a value, but no query and no key, attention's output is a mean over
    what was kept; over many draws it has the variance that dropout gives it.

    A failure: the fused kernel is called with another rate than the explicit path, or with none.
    """
    C, T, p, draws = 2, 4, 0.25, 4000
    config = GPTConfig(1, T, n_layer=1, n_head=1, n_embd=C, dropout=p, bias=False)
    module = torchgpt.Attention(config, attention).double()
    with torch.no_grad():
        module.c_attn.weight.zero_()
        module.c_attn.weight[2 * C :] = torch.eye(C)
        module.c_proj.weight.copy_(torch.eye(C))
        torch.manual_seed(0)
        out = module(torch.ones(draws, T, C).double(), p).numpy()
    # At position t a mean over t + 1 factors of mean 1 and variance p / (1 - p), and then one such factor more.
    v = p / (1 - p)
    assert out.mean(axis=(0, 2)) == pytest.approx(np.ones(T), abs=0.05)
    assert out.var(axis=(0, 2)) == pytest.approx([(1 + v / (t + 1)) * (1 + v) - 1 for t in range(T)], rel=0.1)
    assert np.array_equal(module(torch.ones(1, T, C).double()).detach().numpy(), np.ones((1, T, C)))


def test_every_place_and_every_sequence_has_a_mask_of_its_own() -> None:
    """A failure: one mask is used twice. The same channels are then dropped together, everywhere."""
    idx = np.random.default_rng(0).integers(7, size=(3, 9))
    with recorded_masks() as masks:
        numpygpt.GPT(CONFIG, random_weights(CONFIG, 0)).forward(idx, rng=np.random.default_rng(1))
    assert len(masks) == PLACES
    rows = [np.nan_to_num(mask[b]).tobytes() for mask in masks for b in range(3)]
    assert len(set(rows)) == len(rows), "two sequences, or two places, drop the same"
    attention = [mask for mask in masks if mask.ndim == 4]
    assert all(not np.array_equal(mask[:, 0], mask[:, 1], equal_nan=True) for mask in attention), "two heads do"


@property_test(seed=SEEDS)
def test_a_mask_is_drawn_anew_for_every_step(seed: int) -> None:
    """The same generator state gives the same loss; the generator after it, another one.

    A failure: dropout cannot be repeated, or never changes.
    """
    model = numpygpt.GPT(CONFIG, random_weights(CONFIG, seed))
    idx, targets = np.random.default_rng(seed).integers(7, size=(2, 2, 9))
    rng = np.random.default_rng(seed)
    losses = [model.loss_and_grads(idx, targets, rng=rng)[0] for _ in range(3)]
    assert len(set(losses)) == 3
    assert model.loss_and_grads(idx, targets, rng=np.random.default_rng(seed))[0] == losses[0]


@property_test(seed=SEEDS, cut=st.integers(1, 3), threads=st.integers(1, 3))
def test_parity_of_a_batch_and_its_pieces_with_dropout(seed: int, cut: int, threads: int) -> None:
    """What is dropped in a sequence does not depend on the sequences beside it: neither with one generator that all
    pieces share, nor with one generator for each sequence.

    A failure: gradient accumulation, or another number of threads, trains with other masks.
    """
    params = random_weights(CONFIG, seed)
    idx, targets = np.random.default_rng(seed).integers(7, size=(2, 4, 9))
    whole = numpygpt.GPT(CONFIG, params).loss_and_grads(idx, targets, rng=np.random.default_rng(seed))
    model, halves, rng = numpygpt.GPT(CONFIG, params), (slice(0, cut), slice(cut, 4)), np.random.default_rng(seed)
    pieces = [
        loss_and_grads_in_parts(model, idx[rows], targets[rows], rng=rng, count=36, threads=threads) for rows in halves
    ]
    compare_sums("a batch and its pieces, dropout", whole, pieces)
    rngs = numpygpt.rng_per_sequence(np.random.default_rng(seed), 4)
    pieces = [model.loss_and_grads(idx[rows], targets[rows], rng=rngs[rows], count=36) for rows in halves]
    compare_sums("a batch and its pieces, dropout", whole, pieces)


def compare_sums(what: str, whole: tuple[float, Arrays], pieces: list[tuple[float, Arrays]]) -> None:
    meaning = "What is dropped depends on how a batch is cut."
    assert_close(what, "loss", sum(loss for loss, _ in pieces), whole[0], 1e-13, scale=1.0, meaning=meaning)
    for name, grad in whole[1].items():
        scale = max(rms(grads[name]) for _, grads in pieces)
        assert_close(what, name, sum(grads[name] for _, grads in pieces), grad, 1e-12, scale=scale, meaning=meaning)


def test_a_rate_of_zero_drops_nothing() -> None:
    """A failure: a generator alone, without a rate, changes the model."""
    config = GPTConfig(**{**vars(CONFIG), "dropout": 0.0})
    model = numpygpt.GPT(config, random_weights(config, 0))
    idx, targets = np.random.default_rng(0).integers(7, size=(2, 2, 9))
    with_rng, without = (model.loss_and_grads(idx, targets, rng=rng) for rng in (np.random.default_rng(0), None))
    assert with_rng[0] == without[0]
    assert all(np.array_equal(with_rng[1][name], without[1][name]) for name in without[1])
