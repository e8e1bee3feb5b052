"""Learning: AdamW and clipping against PyTorch's, and whole stretches of training by both trainers, in step."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import numpygpt
from data import corpus, verse
from data.tokenizers import CharTokenizer
from numpygpt import GPTConfig
from tests.helpers import (
    ENGINES,
    assert_close,
    property_test,
    rms,
    to_torch,
    train_config,
)
from tests.model.test_dropout import played_back, recorded_masks
from tests.runs import make_engine
from tests.strategies import SEEDS
from training.batches import Batches, split
from training.config import TrainConfig, learning_rate

# ---------------------------------------------------------------------------------------------------------------------
# One step


@property_test(
    seed=SEEDS,
    steps=st.integers(1, 8),
    betas=st.tuples(st.sampled_from([0.0, 0.9, 0.95]), st.sampled_from([0.0, 0.99, 0.999])),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1, 2.0]),
    size=st.sampled_from([1e-9, 1.0, 1e6]),
)
def test_adamw_parity(seed: int, steps: int, betas: tuple, eps: float, weight_decay: float, size: float) -> None:
    """Weights, m and v after a few steps, each with a rate of its own, against torch.optim.AdamW.

    size: of the gradients, from far below eps to far above. A failure: the update is another one; the larger betas, the
    longer it takes to show in a loss.
    """
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (3, 4), "vector": (5,), "one": (1, 1), "cube": (2, 2, 2)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    theirs = {name: param.requires_grad_() for name, param in to_torch(params).items()}
    groups = [
        {"params": [param for param in theirs.values() if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in theirs.values() if param.ndim < 2], "weight_decay": 0.0},
    ]
    witness = torch.optim.AdamW(groups, betas=betas, eps=eps)
    ours = numpygpt.AdamW(params, betas=betas, eps=eps, weight_decay=weight_decay)
    for _ in range(steps):
        lr = float(rng.uniform(0, 0.1))
        grads = {name: size * rng.standard_normal(shape) * (rng.random(shape) < 0.8) for name, shape in shapes.items()}
        for name, grad in grads.items():
            theirs[name].grad = torch.from_numpy(grad.copy())
        for group in witness.param_groups:
            group["lr"] = lr
        witness.step()
        kept = {name: grad.copy() for name, grad in grads.items()}
        ours.step(grads, lr)
        assert all(np.array_equal(grads[name], kept[name]) for name in grads), "step changed the gradients"
    assert ours.t == steps
    for name, param in params.items():
        state, meaning = witness.state[theirs[name]], "AdamW is not PyTorch's."
        assert_close("AdamW", "weights", param, theirs[name].detach().numpy(), ADAMW, meaning=meaning)
        assert_close("AdamW", "m", ours.m[name], state["exp_avg"].numpy(), ADAMW, meaning=meaning)
        assert_close("AdamW", "v", ours.v[name], state["exp_avg_sq"].numpy(), ADAMW, meaning=meaning)


@property_test(seed=SEEDS, size=st.sampled_from([1e-12, 0.1, 1.0, 1e6]), max_norm=st.sampled_from([1e-3, 1.0, 100.0]))
def test_clip_parity(seed: int, size: float, max_norm: float) -> None:
    """Norm and clipped gradients against torch.nn.utils.clip_grad_norm_.

    A failure: the norm is not that of all tensors together, or small gradients are scaled too.
    """
    rng = np.random.default_rng(seed)
    grads = {name: size * rng.standard_normal(shape) for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", (1,)))}
    grads["c"] *= 100
    before = {name: grad.copy() for name, grad in grads.items()}
    theirs = [torch.zeros(grad.shape, dtype=torch.float64).requires_grad_() for grad in grads.values()]
    for param, grad in zip(theirs, grads.values(), strict=True):
        param.grad = torch.from_numpy(grad.copy())
    their_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = numpygpt.clip_grad_norm(grads, max_norm)
    assert_close("clipping", "norm", norm, their_norm.numpy(), 1e-14, meaning="The norm is not the global one.")
    for (name, grad), param in zip(grads.items(), theirs, strict=True):
        assert_close("clipping", name, grad, param.grad.numpy(), 1e-14, meaning="Clipping scales by another factor.")
        if norm < max_norm:
            assert np.array_equal(grad, before[name]), "gradients within the limit were scaled"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_leaves_a_norm_that_is_not_finite_alone(bad: float) -> None:
    """A failure: one broken gradient spreads over all tensors, and hides where it came from."""
    grads = {"a": np.array([1.0, bad]), "b": np.array([3.0])}
    norm = numpygpt.clip_grad_norm(grads, 1.0)
    assert not math.isfinite(norm)
    assert grads["a"][0] == 1
    assert grads["b"][0] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Many steps

MODEL = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
RECIPE = {"max_steps": 200, "warmup_steps": 20, "batch_size": 6, "grad_accum": 2, "learning_rate": 5e-3, "min_lr": 5e-4}
# The clip is low enough to clip, and high enough not to do so always.
RECIPE |= {"weight_decay": 0.1, "grad_clip": 0.95}

# The gates, and what was measured. Both runs start bit-equal, and rounding grows as they learn.
ADAMW = 3e-14  # 4e-15 over a thousand examples
LOSS = 1e-13  # 5e-16, at any of the 200 steps
NORM, STATE = 1e-12, 1e-12  # 2e-13; 6e-14
# But AdamW divides by the gradient's size, and the key bias has a gradient of 0: what is learned there is the rounding
# of either engine. It has no effect on the model.
KEY_BIAS = 1e-9  # 1e-10
FLOAT32 = 10  # times as far as PyTorch strays: 1.9

needs_shakespeare = pytest.mark.skipif(
    not corpus.SHAKESPEARE_FILE.exists(), reason="needs data/shakespeare_char/input.txt: python -m data.corpus"
)
of_each_text = pytest.mark.parametrize("text", [pytest.param("shakespeare_char", marks=needs_shakespeare), "verse"])


def tokens_of(name: str) -> tuple[np.ndarray, int]:
    """Ids of the first 100,000 characters, and how many different ones there are."""
    text = verse.write(100_000) if name == "verse" else corpus.load_corpus(name).text[:100_000]
    tokenizer = CharTokenizer.from_text(text)
    return np.asarray(tokenizer.encode(text)), tokenizer.vocab_size


def trainers(config: GPTConfig, training: TrainConfig) -> list:
    """Both engines as the trainers use them; PyTorch's attention is explicit, so that masks can be played back."""
    return [make_engine(kind, config, training, attention="explicit") for kind in ENGINES]


def recipe(tokens: np.ndarray, training: TrainConfig, steps: int) -> Iterator[tuple[int, list, float]]:
    """Number, micro-batches and learning rate of each step: what a trainer's train_step takes."""
    batches = Batches(tokens, MODEL["block_size"], training.batch_size, training.seed)
    for step in range(steps):
        yield step, split(batches.at(step), training.grad_accum), learning_rate(step, training)


def compare_states(what: str, ours: object, theirs: object, meaning: str) -> None:
    """Weights, m and v of two engines, tensor by tensor."""
    for kind in ("weights", "m", "v"):
        mine, others = (getattr(engine.save(), kind) for engine in (ours, theirs))
        assert list(mine) == list(others)
        for name in mine:
            limit = KEY_BIAS if kind == "weights" and name.endswith("c_attn.bias") else STATE
            assert_close(f"{what}: {kind}", name, mine[name], others[name], limit, meaning=meaning)


@of_each_text
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trajectory_parity_float64(optimizer: str, text: str) -> None:
    """200 steps with warm-up, cosine, clipping, decay and accumulation, from one seed: the loss at every step, and in
    the end weights, m and v.

    A failure while test_model passes: the engines learn differently from the same gradients; see the tests of AdamW and
    clipping above, and of the schedule in test_semantics.
    """
    tokens, V = tokens_of(text)
    config, training = GPTConfig(V, dropout=0.0, **MODEL), train_config(**RECIPE, optimizer=optimizer)
    ours, theirs = trainers(config, training)
    norms, losses = [], []
    for step, micro_batches, lr in recipe(tokens, training, 200):
        loss, norm = ours.train_step(step, micro_batches, lr)
        their_loss, their_norm = map(float, theirs.train_step(step, micro_batches, lr))
        meaning = f"The loss curves part at step {step}."
        assert_close("200 steps, float64", "loss", loss, np.float64(their_loss), LOSS, meaning=meaning)
        assert_close("200 steps, float64", "norm", norm, np.float64(their_norm), NORM, meaning=meaning)
        norms.append(norm)
        losses.append(loss)
    clipped = np.mean(np.array(norms) > training.grad_clip)
    assert 0.1 < clipped < 0.9, f"{clipped:.0%} of the steps were clipped: the test does not cover both cases"
    assert np.mean(losses[-10:]) < losses[0] - 1, "it learned nothing: the test is void"
    meaning = "The same losses, but another state: the next steps will differ."
    compare_states("200 steps, float64", ours, theirs, meaning)


@of_each_text
def test_trajectory_parity_with_dropout(text: str) -> None:
    """20 steps in which PyTorch drops what NumPy dropped.

    A failure while the run without dropout passes: masks are not those of the step, or of the micro-batch.
    """
    tokens, V = tokens_of(text)
    config, training = GPTConfig(V, dropout=0.2, **MODEL), train_config(**RECIPE)
    ours, theirs = trainers(config, training)
    for step, micro_batches, lr in recipe(tokens, training, 20):
        with recorded_masks() as masks:
            loss, _ = ours.train_step(step, micro_batches, lr)
        with played_back(masks, config.dropout):
            their_loss = float(theirs.train_step(step, micro_batches, lr)[0])
        meaning = f"The loss curves part at step {step}."
        assert_close("20 steps, dropout", "loss", loss, np.float64(their_loss), LOSS, meaning=meaning)
    compare_states("20 steps, dropout", ours, theirs, "The same losses, but another state.")


def losses_of(engine: str, config: GPTConfig, training: TrainConfig, tokens: np.ndarray, steps: int) -> np.ndarray:
    trainer = make_engine(engine, config, training, attention="explicit")
    return np.array([float(trainer.train_step(*step)[0]) for step in recipe(tokens, training, steps)])


@of_each_text
def test_trajectory_parity_float32(text: str) -> None:
    """In float32 every run strays from the float64 run: a rounding of 6e-8 is fed back into the weights at every step,
    and AdamW divides by gradients that are all but 0. So the runs of two engines cannot agree to more digits than one
    run has. What can be asked is that NumPy's strays no further than PyTorch's own.

    A failure: NumPy's training loses digits that PyTorch keeps.
    """
    tokens, V = tokens_of(text)
    config, narrow = GPTConfig(V, dropout=0.0, **MODEL), train_config(**RECIPE, dtype="float32")
    truth = losses_of("numpy", config, train_config(**RECIPE), tokens, 100)
    strays = [np.abs(losses_of(engine, config, narrow, tokens, 100) - truth) for engine in ENGINES]
    for start in range(0, 100, 20):
        ours, theirs = (rms(stray[start : start + 20]) for stray in strays)
        ratio = ours / theirs
        assert ratio < FLOAT32, f"steps {start} and on: NumPy strays {ours:.1e}, {ratio:.1f} times as far as PyTorch"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_batch_is_learned_by_heart(engine: str) -> None:
    """A failure: the model, or its optimizer, cannot even do what needs no generalisation."""
    rng = np.random.default_rng(0)
    idx, targets = rng.integers(11, size=(2, 3, 8))
    idx[:, 0] = [0, 1, 2]  # so that the rows can be told apart from the start
    training = train_config(weight_decay=0.0)
    trainer = make_engine(engine, GPTConfig(11, 8, n_layer=2, n_head=2, n_embd=16, dropout=0.0), training)
    losses = [float(trainer.train_step(step, [(idx, targets)], 1e-2)[0]) for step in range(150)]
    assert losses[0] > 2
    assert losses[-1] < 0.01, f"after 150 steps on one batch the loss is {losses[-1]}"
