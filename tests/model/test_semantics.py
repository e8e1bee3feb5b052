"""What a GPT must and must not do, whatever its numbers: each test is one sentence that is true of both engines."""

import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

import numpygpt
import torchgpt
from numpygpt import GPTConfig
from tests.helpers import (
    ALL_ENGINES,
    Arrays,
    assert_close,
    forward,
    generate,
    loss_and_grads,
    make,
    property_test,
    random_weights,
    rms,
    tiles_of,
    to_torch,
    torch_twin,
    train_config,
)
from tests.strategies import SEEDS
from training import evaluate as evaluation
from training.config import learning_rate

on_some = partial(property_test, share=0.3)
of_each_engine = pytest.mark.parametrize("engine", ALL_ENGINES)

CONFIG = GPTConfig(vocab_size=7, block_size=9, n_layer=2, n_head=2, n_embd=6, dropout=0.0)


def batch(seed: int, B: int = 3, T: int = 9) -> tuple[np.ndarray, np.ndarray]:
    idx, targets = np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(2, B, T))
    return idx, targets


def with_scores_of(params: Arrays, gain: float) -> Arrays:
    """The same weights, with attention scores gain**2 times as large."""
    return {name: gain * param if "c_attn.weight" in name else param for name, param in params.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Time


@of_each_engine
@on_some(seed=SEEDS, t=st.integers(0, 7), gain=st.sampled_from([1.0, 1e3, 1e7]), tile=st.sampled_from([64, 1, 2, 4]))
def test_the_future_changes_nothing(engine: str, seed: int, t: int, gain: float, tile: int) -> None:
    """Logits up to t are bit-equal whatever comes after t, also where scores reach 1e14 or -1e14.

    A failure: tokens see what they are to predict. Training losses become too good, and samples bad.
    """
    model = make(engine, CONFIG, with_scores_of(random_weights(CONFIG, seed), gain))
    idx, _ = batch(seed)
    changed = idx.copy()
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + np.random.default_rng(seed).integers(6)) % 7
    with tiles_of(tile):
        before, after = forward(model, idx)[0], forward(model, changed)[0]
    assert np.array_equal(before[:, : t + 1], after[:, : t + 1]), f"logits up to {t} depend on tokens after {t}"
    assert not np.array_equal(before[:, t + 1 :], after[:, t + 1 :]), "the tokens after t have no effect at all"


@of_each_engine
@on_some(seed=SEEDS, t=st.integers(0, 7), tile=st.sampled_from([64, 1, 2, 4]))
def test_no_gradient_flows_into_the_future(engine: str, seed: int, t: int, tile: int) -> None:
    """A failure: the loss at t moves the positions after t, which the prediction at t cannot have seen."""
    idx, targets = batch(seed)
    targets[:, :t], targets[:, t + 1 :] = -1, -1
    with tiles_of(tile):
        _, grads = loss_and_grads(make(engine, CONFIG, random_weights(CONFIG, seed)), idx, targets)
    assert not grads["wpe.weight"][t + 1 :].any(), f"a loss at {t} has a gradient for later positions"
    assert grads["wpe.weight"][: t + 1].any(axis=1).all(), f"a loss at {t} has no gradient for some earlier position"


@of_each_engine
def test_every_token_sees_itself_and_all_before_it_equally_if_queries_are_zero(engine: str) -> None:
    """With q = 0 all scores are 0, so attention is the plain mean of the values so far, which can be worked out.

    A failure: attention's weights are no softmax over exactly the tokens up to and including the own one.
    """
    T, C = 9, CONFIG.n_embd
    params = numpygpt.select_prefix(random_weights(CONFIG, seed=1), "h.0.attn.")
    params["c_attn.weight"][:C], params["c_attn.bias"][:C] = 0, 0
    x = np.random.default_rng(1).standard_normal((2, T, C))
    values = x @ params["c_attn.weight"][2 * C :].T + params["c_attn.bias"][2 * C :]
    means = values.cumsum(axis=1) / np.arange(1, T + 1)[:, None]
    expected = means @ params["c_proj.weight"].T + params["c_proj.bias"]
    if engine == "numpy":
        with tiles_of(4):
            actual, _ = numpygpt.attention_forward(x, params, CONFIG.n_head)
    else:
        module = torchgpt.Attention(CONFIG, engine).double()
        module.load_state_dict(to_torch(params))
        actual = module(torch.from_numpy(x)).detach().numpy()
    assert_close("the mean of the past", "out", actual, expected, 1e-14, meaning="Attention is no mean over the past.")


@of_each_engine
@on_some(seed=SEEDS, tile=st.sampled_from([64, 1, 2, 4]))
def test_one_long_sequence_is_all_of_its_prefixes(engine: str, seed: int, tile: int) -> None:
    """The loss of a sequence is the mean of what its T prefixes, each alone, say about their next token.

    A failure: what is predicted at t depends on how long the sequence is.
    """
    model = make(engine, CONFIG, random_weights(CONFIG, seed))
    idx, targets = batch(seed, B=2)
    with tiles_of(tile):
        logits, loss = forward(model, idx, targets)
        lasts = []
        for t in range(9):
            only_last = np.full((2, t + 1), -1)
            only_last[:, -1] = targets[:, t]
            prefix_logits, last = forward(model, idx[:, : t + 1], only_last)
            lasts.append(last)
            assert_close("prefix", f"logits at {t}", prefix_logits[:, -1], logits[:, t], 1e-12, meaning="T matters.")
    assert_close(
        "prefixes", "loss", np.mean(lasts), loss, 1e-13, meaning="The mean over tokens is not one over tokens."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@of_each_engine
@on_some(seed=SEEDS)
def test_the_order_of_a_batch_does_not_matter(engine: str, seed: int) -> None:
    """A failure: rows of a batch see each other."""
    model = make(engine, CONFIG, random_weights(CONFIG, seed))
    idx, targets = batch(seed, B=4)
    order = np.array([2, 0, 3, 1])
    logits, loss = forward(model, idx, targets)
    again, loss_again = forward(model, idx[order], targets[order])
    assert_close("reordered batch", "logits", again, logits[order], 1e-12, meaning="Rows of a batch see each other.")
    assert_close("reordered batch", "loss", loss_again, loss, 1e-14, meaning="Rows of a batch see each other.")


@of_each_engine
@on_some(seed=SEEDS)
def test_a_batch_is_the_mean_of_its_rows(engine: str, seed: int) -> None:
    """A failure: the loss, or a gradient, is scaled by the batch size once too often, or not at all."""
    model = make(engine, CONFIG, random_weights(CONFIG, seed))
    idx, targets = batch(seed)
    loss, grads = loss_and_grads(model, idx, targets)
    rows = [loss_and_grads(model, idx[b : b + 1], targets[b : b + 1]) for b in range(3)]
    assert_close("mean of rows", "loss", np.mean([row for row, _ in rows]), loss, 1e-14, meaning="The mean is not one.")
    for name, grad in grads.items():
        mean = np.mean([row[name] for _, row in rows], axis=0)
        assert_close(
            "mean of rows", name, mean, grad, 1e-12, scale=max(rms(r[name]) for _, r in rows), meaning="Scaled."
        )


@of_each_engine
@on_some(seed=SEEDS)
def test_ignored_targets_count_for_nothing(engine: str, seed: int) -> None:
    """The mean is over the targets that are not -1, and what stands in ignored places is as if it were not there.

    A failure: ignored tokens dilute the loss, or are taken for the last token of the vocabulary.
    """
    model = make(engine, CONFIG, random_weights(CONFIG, seed))
    idx, targets = batch(seed)
    targets[np.random.default_rng(seed).random(targets.shape) < 0.6] = -1
    targets[0, 0] = 0
    logits, loss = forward(model, idx, targets)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, columns = np.nonzero(targets >= 0)
    expected = -log_probs[rows, columns, targets[rows, columns]].mean()
    assert_close(
        "ignored targets", "loss", loss, expected, 1e-13, meaning="The loss is not the mean over real targets."
    )


@of_each_engine
def test_weights_of_zero_know_nothing(engine: str) -> None:
    """A failure: the loss is not in nats, or not a mean: all logits are 0, so it is log V to the last bit but one."""
    zeros = {name: np.zeros_like(param) for name, param in random_weights(CONFIG, 0).items()}
    logits, loss = forward(make(engine, CONFIG, zeros), *batch(0))
    assert not logits.any()
    assert loss == pytest.approx(math.log(7), rel=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# State


@of_each_engine
@on_some(seed=SEEDS)
def test_calls_leave_nothing_behind(engine: str, seed: int) -> None:
    """A second call gives the same bits, also after other calls, and after the caller has overwritten the gradients of
    the first; inputs and weights are as they were.

    A failure: something is kept between calls, or an in-place operation works on an array that somebody else holds.
    """
    params = random_weights(CONFIG, seed)
    model = make(engine, CONFIG, params)
    idx, targets = batch(seed)
    inputs = idx.copy(), targets.copy()
    loss, grads = loss_and_grads(model, idx, targets)
    kept = {name: grad.copy() for name, grad in grads.items()}
    logits, _ = forward(model, idx)
    kept_logits = logits.copy()
    for array in (logits, *grads.values()):
        array[...] = np.nan
    loss_and_grads(model, *batch(seed + 1, B=1, T=4))
    generate(model, idx, 3, rng=np.random.default_rng(0))
    loss_again, grads_again = loss_and_grads(model, idx, targets)
    assert loss == loss_again, "the loss of the second call differs"
    for name, grad in kept.items():
        assert np.array_equal(grad, grads_again[name]), f"the gradient of {name} differs in the second call"
    assert np.array_equal(forward(model, idx)[0], kept_logits), "the logits of the second call differ"
    assert np.array_equal(idx, inputs[0]), "idx was overwritten"
    assert np.array_equal(targets, inputs[1]), "targets were overwritten"
    weights = model.params if engine == "numpy" else {name: p.detach().numpy() for name, p in model.named_parameters()}
    for name, param in params.items():
        assert np.array_equal(weights[name], param), f"{name} was overwritten"


@of_each_engine
@on_some(seed=SEEDS, dropout=st.sampled_from([0.1, 0.9]))
def test_evaluation_does_not_depend_on_dropout(engine: str, seed: int, dropout: float) -> None:
    """A failure: dropout is live in evaluation, or scales it. Losses look worse than they are, and never the same."""
    params, (idx, targets) = random_weights(CONFIG, seed), batch(seed)
    config = GPTConfig(**{**vars(CONFIG), "dropout": dropout})
    logits, loss = forward(make(engine, CONFIG, params), idx, targets)
    dropping = make(engine, config, params)
    for _ in range(2):
        again, loss_again = forward(dropping, idx, targets)
        assert np.array_equal(logits, again), "logits without dropout depend on its rate"
        assert loss == loss_again, "the loss without dropout depends on its rate"


@pytest.mark.parametrize("engine", ["sdpa", "explicit"])
def test_generation_never_drops(engine: str) -> None:
    """torchgpt generates without dropout also in training mode, and never switches the mode, not even for a moment.

    A failure: samples drawn in the middle of a training run are worse than the model; or whoever uses the model between
    two tokens, in another thread for example, finds it in another mode.
    """
    config = GPTConfig(**{**vars(CONFIG), "dropout": 0.9})
    model = make(engine, config, random_weights(config, 2))
    idx, _ = batch(2, T=2)
    texts = []
    for mode in (False, True, True):
        model.train(mode)
        with mock.patch.object(torch.nn.Module, "train", side_effect=AssertionError("the mode was switched")):
            texts.append(generate(model, idx, 12, temperature=0.5, rng=np.random.default_rng(5)))
        assert model.training == mode, "generate changed the model's mode"
        assert all(module.training == mode for module in model.modules()), "generate changed a module's mode"
    assert np.array_equal(texts[0], texts[1])
    assert np.array_equal(texts[0], texts[2])


def test_models_share_no_weights() -> None:
    """A failure: training one model changes another one, or the arrays that the caller gave. But a read-only array, a
    file mapped into memory, is not copied."""
    params = random_weights(CONFIG, 0)
    kept = {name: param.copy() for name, param in params.items()}
    first, second, twin = numpygpt.GPT(CONFIG, params), numpygpt.GPT(CONFIG, params), torch_twin(CONFIG, params)
    for name, param in first.params.items():
        param += 1
        assert np.array_equal(second.params[name], kept[name]), f"two models share {name}"
        assert np.array_equal(twin.state_dict()[name].numpy(), kept[name]), f"the engines share {name}"
        assert np.array_equal(params[name], kept[name]), f"the model changed the caller's {name}"
    for param in params.values():
        param.flags.writeable = False
    assert all(numpygpt.GPT(CONFIG, params).params[name] is params[name] for name in params), (
        "mapped weights are copied"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


@on_some(seed=SEEDS)
def test_the_tied_matrix_gets_both_gradients(seed: int) -> None:
    """wte is the embedding and the head. The gradient of each use alone, by PyTorch with the other one held constant.

    A failure: one use overwrites the gradient of the other.
    """
    params, (idx, targets) = random_weights(CONFIG, seed), batch(seed)
    linear, embedding = F.linear, torch.nn.Embedding.forward

    def constant_head(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, weight.detach() if weight.shape == (7, 6) else weight, bias)

    with mock.patch.object(torchgpt.F, "linear", constant_head):
        _, as_embedding = loss_and_grads(torch_twin(CONFIG, params), idx, targets)
    with mock.patch.object(torch.nn.Embedding, "forward", lambda self, ids: embedding(self, ids).detach()):
        _, as_head = loss_and_grads(torch_twin(CONFIG, params), idx, targets)
    both = as_embedding["wte.weight"] + as_head["wte.weight"]
    assert rms(as_embedding["wte.weight"]) > 1e-3, "the witness is void"
    assert rms(as_head["wte.weight"]) > 1e-3, "the witness is void"
    for engine in ALL_ENGINES:
        _, grads = loss_and_grads(make(engine, CONFIG, params), idx, targets)
        meaning = "The gradients of the two uses do not add."
        assert_close(f"tied gradient, {engine}", "wte.weight", grads["wte.weight"], both, 1e-12, meaning=meaning)


@of_each_engine
@on_some(seed=SEEDS)
def test_a_repeated_token_gets_all_of_its_gradient(engine: str, seed: int) -> None:
    """Tokens 0 to 3 have the same embedding here, so it does not matter which of them the text repeats: not for the
    loss, and not for the sum of their rows of wte's gradient.

    A failure: where a token stands several times in a batch, only one of its places counts.
    """
    params, (idx, targets) = random_weights(CONFIG, seed), batch(seed)
    params["wte.weight"][:4] = params["wte.weight"][0]
    model = make(engine, CONFIG, params)
    loss, grads = loss_and_grads(model, idx % 4, targets)
    loss_same, grads_same = loss_and_grads(model, np.full_like(idx, 3), targets)
    assert loss == loss_same
    sums = grads["wte.weight"][:4].sum(axis=0), grads_same["wte.weight"][:4].sum(axis=0)
    scale = rms(grads["wte.weight"]) + rms(grads_same["wte.weight"])
    assert_close("repeated token", "wte.weight", sums[1], sums[0], 1e-12, scale=scale, meaning="A place is lost.")


@of_each_engine
@on_some(seed=SEEDS)
def test_the_key_bias_has_no_effect(engine: str, seed: int) -> None:
    """It adds the same number, query . bias, to all scores of a query, and softmax does not see it.

    A failure: q, k and v stand in another order, or softmax is none.
    """
    C, (idx, targets) = CONFIG.n_embd, batch(seed)
    params = random_weights(CONFIG, seed)
    loss, grads = loss_and_grads(make(engine, CONFIG, params), idx, targets)
    for i in range(CONFIG.n_layer):
        dbias = grads[f"h.{i}.attn.c_attn.bias"]
        assert np.abs(dbias[C : 2 * C]).max() < 1e-14 * (rms(dbias) + 1), f"layer {i}: the key bias has a gradient"
        assert rms(dbias[:C]) > 1e-8, f"layer {i}: the query bias has no gradient"
        assert rms(dbias[2 * C :]) > 1e-8, f"layer {i}: the value bias has no gradient"
        params[f"h.{i}.attn.c_attn.bias"][C : 2 * C] += np.random.default_rng(seed).standard_normal(C)
    again = forward(make(engine, CONFIG, params), idx, targets)[1]
    assert_close("another key bias", "loss", again, loss, 1e-12, scale=1.0, meaning="The key bias changes the loss.")


@of_each_engine
@on_some(seed=SEEDS)
def test_heads_are_interchangeable(engine: str, seed: int) -> None:
    """Exchanging whole heads, in q, k, v and in what c_proj reads, leaves the model as it is.

    A failure: heads are cut out of the channels differently on the way in and on the way out.
    """
    C, hs = CONFIG.n_embd, 3
    params, (idx, _) = random_weights(CONFIG, seed), batch(seed)
    swapped = np.r_[hs : 2 * hs, :hs]
    other = dict(params)
    for i in range(CONFIG.n_layer):
        rows = np.concatenate([swapped, C + swapped, 2 * C + swapped])
        for name in ("weight", "bias"):
            other[f"h.{i}.attn.c_attn.{name}"] = params[f"h.{i}.attn.c_attn.{name}"][rows]
        other[f"h.{i}.attn.c_proj.weight"] = params[f"h.{i}.attn.c_proj.weight"][:, swapped]
    logits = [forward(make(engine, CONFIG, weights), idx)[0] for weights in (params, other)]
    assert_close(
        "heads exchanged", "logits", logits[1], logits[0], 1e-12, meaning="Heads are cut differently in and out."
    )


@of_each_engine
@on_some(seed=SEEDS)
def test_token_ids_are_only_names(engine: str, seed: int) -> None:
    """A failure: some id is treated unlike the others."""
    params, (idx, targets) = random_weights(CONFIG, seed), batch(seed)
    order = np.random.default_rng(seed).permutation(7)
    renamed = {**params, "wte.weight": params["wte.weight"][np.argsort(order)]}
    logits, loss = forward(make(engine, CONFIG, params), idx, targets)
    again, loss_again = forward(make(engine, CONFIG, renamed), order[idx], order[targets])
    assert_close("tokens renamed", "logits", again[..., order], logits, 1e-12, meaning="Some id is special.")
    assert_close("tokens renamed", "loss", loss_again, loss, 1e-13, meaning="Some id is special.")


# ---------------------------------------------------------------------------------------------------------------------
# Training: what decays, the schedule, the evaluation

DECAYED = {
    "wte.weight",
    "wpe.weight",
    *(f"h.{i}.{name}.weight" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}


def test_exactly_the_matrices_decay() -> None:
    """With gradients of 0, a step of AdamW does nothing but decay.

    A failure: LayerNorm gains or biases are pulled to zero, or a matrix is not; and it still trains, a little worse.
    """
    params = random_weights(CONFIG, 0)
    before = {name: param.copy() for name, param in params.items()}
    numpygpt.AdamW(params, weight_decay=0.5).step(
        {name: np.zeros_like(param) for name, param in params.items()}, lr=0.1
    )
    assert {name for name in params if not np.array_equal(params[name], before[name])} == DECAYED
    for name in DECAYED:
        assert np.allclose(params[name], 0.95 * before[name], rtol=1e-15, atol=0), f"{name} decays by another factor"


def test_exactly_the_matrices_decay_in_the_torch_trainer() -> None:
    """The same of train_torch.py's optimizer."""
    import train_torch

    flags = train_torch.DeviceFlags("cpu", compile=False, graph=False, pad_vocab=False)
    engine = train_torch.TorchEngine(CONFIG, train_config(weight_decay=0.5), flags)
    before = {name: param.detach().clone() for name, param in engine.gpt.named_parameters()}
    for param in engine.gpt.parameters():
        param.data.add_(1)
        param.grad = torch.zeros_like(param)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.1
    engine.optimizer.step()
    after = dict(engine.gpt.named_parameters())
    assert {name for name in before if not torch.equal(after[name], before[name] + 1)} == DECAYED


def test_the_learning_rate_of_every_step() -> None:
    """The points that the docstring of learning_rate names, and no rate above the peak or, past the warm-up, below the
    floor.

    A failure: the warm-up is off by one, or the decay does not end where it should.
    """
    config = train_config()
    anchors = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1, 101: 0.1, 10**6: 0.1}
    for step, rate in anchors.items():
        assert learning_rate(step, config) == pytest.approx(rate, rel=1e-12), f"step {step}"
    assert learning_rate(32, config) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)), rel=1e-12)
    linear = train_config(schedule="linear")
    assert learning_rate(32, train_config(optimizer="muon")) == learning_rate(32, linear), "Muon's default"
    assert learning_rate(32, train_config(optimizer="muon", schedule="cosine")) == learning_rate(32, config)
    for step, rate in (anchors | {20: 0.9, 32: 1 - 0.22, 91: 0.19}).items():
        assert learning_rate(step, linear) == pytest.approx(rate, rel=1e-12), f"step {step}"
    for schedule in (config, linear):
        rates = [learning_rate(step, schedule) for step in range(130)]
        assert rates[:10] == sorted(rates[:10])
        assert rates[9:] == sorted(rates[9:], reverse=True)
        assert all(0.1 <= rate <= 1 for rate in rates[9:])
    early = train_config(decay_steps=50)
    assert learning_rate(30, early) == pytest.approx(0.55, rel=1e-12)
    assert [learning_rate(step, early) for step in (50, 60, 99)] == [0.1, 0.1, 0.1]


@on_some(length=st.integers(2, 60), block_size=st.integers(1, 9), batch_size=st.integers(1, 5))
def test_the_evaluation_predicts_each_token_once(length: int, block_size: int, batch_size: int) -> None:
    """Each token but the first is a target exactly once, and what stands before it in its window is its context.

    A failure: tokens are left out, counted twice or, where the batch size matters, weighed unequally.
    """
    tokens, seen = np.arange(length), []

    def loss(idx: np.ndarray, targets: np.ndarray) -> float:
        assert idx.shape == targets.shape
        assert idx.shape[1] <= block_size
        assert np.array_equal(idx + 1, targets), "a target is not the token after its input"
        assert (np.diff(idx, axis=1) == 1).all(), "a window is not consecutive"
        seen.extend(targets.ravel().tolist())
        return float(np.sqrt(targets).mean())

    result = evaluation.evaluate(loss, tokens, block_size, batch_size)
    assert sorted(seen) == list(range(1, length)), "not every token was predicted exactly once"
    assert result == pytest.approx(np.sqrt(np.arange(1, length)).mean(), rel=1e-13), "tokens are weighed unequally"


@of_each_engine
def test_the_evaluation_is_the_same_for_every_batch_size(engine: str) -> None:
    """And it is what the windows, taken one by one, give.

    A failure: two people who evaluate the same model report two numbers.
    """
    model, tokens = make(engine, CONFIG, random_weights(CONFIG, 0)), np.random.default_rng(0).integers(7, size=101)
    results = [
        evaluation.evaluate(lambda *batch: forward(model, *batch)[1], tokens, 9, size) for size in (1, 2, 5, 100)
    ]
    windows = [(tokens[i : i + 9], tokens[i + 1 : i + 10]) for i in range(0, 100, 9)]
    nats = [forward(model, idx[None, : len(targets)], targets[None])[1] * len(targets) for idx, targets in windows]
    for result in results:
        assert result == pytest.approx(sum(nats) / 100, rel=1e-12)
