"""The whole model: logits, loss and every gradient, against three witnesses: its twin in PyTorch, Hugging Face's GPT-2,
which nobody here wrote, and finite differences. And what both engines share beyond that: names, sizes, fresh weights.
"""

import ast
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

import numpygpt
import torchgpt
from numpygpt import GPTConfig
from tests.helpers import (
    ROOT,
    Arrays,
    assert_as_exact_as_torch,
    assert_close,
    assert_finite_differences,
    forward,
    loss_and_grads,
    property_test,
    random_weights,
    rms,
    tiles_of,
    torch_twin,
    uncancelled_scales,
)
from tests.strategies import HUGE, LARGE, SEEDS, TYPICAL, USUAL, Example, examples
from training.parallel import loss_and_grads_in_parts, loss_in_parts

# The gates, and the worst that a thousand examples gave.
LOGITS, GRADIENTS = 1e-13, 1e-12  # 1e-14 and 1e-13; with Hugging Face, 9e-14 and 2e-13
LARGE_LOGITS, LARGE_GRADIENTS = 1e-11, 1e-10  # 7e-12
FLOAT32 = 200  # 24 times PyTorch's own rounding
FINITE_DIFFERENCES = 1e-11  # 8e-13, all of it rounding of the differences

ALWAYS = [{"example": example} for example in TYPICAL]
VARIANTS = {
    "sdpa": {"attention": "sdpa"},
    "explicit": {"attention": "explicit"},
    "padded": {"pad_vocab_to": 8},
    "recomputed": {"recompute": True},
}
of_each_variant = pytest.mark.parametrize("variant", VARIANTS)

FORWARD = "Forward passes differ: compare the layers in test_layers."
BACKWARD = "The loss agrees, so a backward pass is wrong: in this tensor's layer, or in one that stands after it."


def compare(
    what: str, ours: tuple[np.ndarray, float, Arrays], theirs: tuple[np.ndarray, float, Arrays], scales: dict, gates
) -> None:
    """(logits, loss, gradients) of two engines, tensor by tensor."""
    (logits, loss, grads), (their_logits, their_loss, their_grads) = ours, theirs
    size = max(1.0, rms(their_logits))
    assert_close(what, "logits", logits, their_logits, gates[0], scale=size, meaning=FORWARD)
    assert_close(
        what, "loss", loss, their_loss, gates[0], scale=size, meaning="The logits agree: cross-entropy is wrong."
    )
    assert list(grads) == list(their_grads), f"{what}: gradients of other parameters, or in another order"
    for name, grad in grads.items():
        scale = max(rms(their_grads[name]), scales[name])
        assert_close(what, name, grad, their_grads[name], gates[1], scale=scale, meaning=BACKWARD)


def all_of(model: object, example: Example) -> tuple[np.ndarray, float, Arrays]:
    """Logits, loss and gradients."""
    with tiles_of(example.attention_tile):
        logits, _ = forward(model, example.idx)
        return logits, *loss_and_grads(model, example.idx, example.targets)


def compare_engines(what: str, variant: str, example: Example, gates: tuple[float, float]) -> None:
    ours = numpygpt.GPT(example.config, example.params)
    theirs = torch_twin(example.config, example.params, **VARIANTS[variant]).train()  # the dropout rate is 0
    scales = uncancelled_scales(ours, example.idx, example.targets)
    compare(what, all_of(ours, example), all_of(theirs, example), scales, gates)


@of_each_variant
@property_test(always=ALWAYS, example=examples())
def test_parity_float64(variant: str, example: Example) -> None:
    """A failure: the two engines are not one function."""
    compare_engines("NumPy and PyTorch, float64", variant, example, (LOGITS, GRADIENTS))


@of_each_variant
@property_test(example=examples(gains=(LARGE, HUGE)))
def test_parity_float64_with_large_weights(variant: str, example: Example) -> None:
    """Attention that is all but one-hot and logits in the hundreds, where errors grow from layer to layer.

    A failure: something overflows, saturates or cancels in one engine and not in the other.
    """
    compare_engines("NumPy and PyTorch, float64, large weights", variant, example, (LARGE_LOGITS, LARGE_GRADIENTS))


@property_test(always=ALWAYS, example=examples())
def test_parity_float32(example: Example) -> None:
    """A failure: in float32, NumPy's model is further from the truth than PyTorch's own float32, by more than rounding
    explains; or it leaves float32 on the way."""
    params = {name: param.astype(np.float32) for name, param in example.params.items()}
    wide = numpygpt.GPT(example.config, {name: param.astype(np.float64) for name, param in params.items()})
    logits, loss, grads = all_of(numpygpt.GPT(example.config, params), example)
    logits32, loss32, grads32 = all_of(torch_twin(example.config, params), example)
    true_logits, true_loss, truth = all_of(wide, example)
    assert loss.dtype == np.float32, f"the loss of a float32 model has dtype {loss.dtype}"
    scales = uncancelled_scales(wide, example.idx, example.targets)
    what, meaning = "float32", "Somewhere digits are lost, or the dtype changes."
    for name, *three, scale in [
        ("logits", logits, logits32, true_logits, max(1.0, rms(true_logits))),
        ("loss", loss, loss32, true_loss, max(1.0, rms(true_logits))),
        *((name, grads[name], grads32[name], truth[name], max(rms(truth[name]), scales[name])) for name in truth),
    ]:
        assert_as_exact_as_torch(what, name, *three, FLOAT32, scale=scale, meaning=meaning)


@pytest.mark.parametrize("channels", [1, 2])
@property_test(seed=SEEDS)
def test_parity_of_models_with_one_or_two_channels(channels: int, seed: int) -> None:
    """LayerNorm makes zeros of one channel and -1, 1 of two: what is left of the gradient through it is rounding, or
    1e-5 of the rest. So here the size of each gradient is that of the head's."""
    config = GPTConfig(5, 4, n_layer=2, n_head=1, n_embd=channels, dropout=0.0)
    params, rng = random_weights(config, seed), np.random.default_rng(seed)
    idx, targets = rng.integers(5, size=(2, 2, 4))
    theirs = loss_and_grads(torch_twin(config, params), idx, targets)
    ours = loss_and_grads(numpygpt.GPT(config, params), idx, targets)
    size = rms(theirs[1]["wte.weight"]) + rms(theirs[1].get("ln_f.bias"))
    assert_close("one or two channels", "loss", ours[0], theirs[0], 1e-13, scale=1.0, meaning=FORWARD)
    for name, grad in ours[1].items():
        assert_close("one or two channels", name, grad, theirs[1][name], 1e-10, scale=size, meaning=BACKWARD)


# ---------------------------------------------------------------------------------------------------------------------
# The third witness


def hugging_face_twin(config: GPTConfig, params: Arrays) -> object:
    """GPT2LMHeadModel with these weights. Its linear layers are transposed; a model without biases has zeros there."""
    modeling = pytest.importorskip(
        "transformers.models.gpt2.modeling_gpt2", reason="needs transformers: pip install -r requirements-dev.txt"
    )
    gpt2 = modeling.GPT2LMHeadModel(
        modeling.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=1e-5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).double()
    with torch.no_grad():
        for name, theirs in gpt2.transformer.named_parameters():
            ours = torch.from_numpy(params[name]) if name in params else torch.zeros(theirs.shape)
            theirs.copy_(ours.T if is_transposed(name) else ours)
    return gpt2.eval()


def is_transposed(name: str) -> bool:
    return bool(re.search(r"(c_attn|c_proj|c_fc)\.weight$", name))


@property_test(always=ALWAYS, example=examples())
def test_parity_with_hugging_face(example: Example) -> None:
    """Logits, loss and gradients of Hugging Face's GPT-2, its own loss included.

    A failure while test_parity_float64 passes: both engines have the same mistake, and are no GPT-2.
    """
    gpt2 = hugging_face_twin(example.config, example.params)
    idx, targets = torch.tensor(example.idx.astype(np.int64)), torch.tensor(example.targets.astype(np.int64))
    logits = gpt2(idx).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    grads = {}
    for name, param in gpt2.transformer.named_parameters():
        if name in example.params:
            grads[name] = (param.grad.T if is_transposed(name) else param.grad).numpy()
    model = numpygpt.GPT(example.config, example.params)
    theirs = (logits.detach().numpy(), loss.item(), {name: grads[name] for name in example.params})
    scales = uncancelled_scales(model, example.idx, example.targets)
    compare("NumPy and Hugging Face, float64", all_of(model, example), theirs, scales, (LOGITS, GRADIENTS))


def test_parity_with_the_loss_of_hugging_face() -> None:
    """Its own loss shifts the labels itself, and rounds to float32: as a check that batches mean the same to both.

    A failure while the logits agree: targets are not the next tokens.
    """
    config = GPTConfig(7, 6, n_layer=2, n_head=2, n_embd=6, dropout=0.0)
    params = random_weights(config, seed=0)
    text = np.random.default_rng(0).integers(7, size=(3, 6))
    ids = torch.from_numpy(text)
    theirs = hugging_face_twin(config, params)(ids, labels=ids).loss.item()
    ours = numpygpt.GPT(config, params).forward(text[:, :-1], text[:, 1:])[1]
    assert_close("Hugging Face", "loss", ours, np.float64(theirs), 1e-6, meaning="Targets are not the next tokens.")


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences


@pytest.mark.parametrize("bias", [True, False])
def test_finite_differences_of_the_whole_model(bias: bool) -> None:
    """Along a random direction of each parameter tensor, and in one entry of it.

    A failure: the gradient is not the derivative of the model's own loss, whatever PyTorch says.
    """
    rng = np.random.default_rng(1)
    config = GPTConfig(5, 5, n_layer=2, n_head=2, n_embd=10, dropout=0.0, bias=bias)
    params = random_weights(config, seed=1)
    idx, targets = rng.integers(5, size=(2, 3, 4))
    targets[0, 1] = -1
    model = numpygpt.GPT(config, params)

    def loss(tensors: Arrays) -> float:
        model.params = tensors
        return float(model.forward(idx, targets)[1])

    with tiles_of(3):
        _, grads = model.loss_and_grads(idx, targets)
        assert_finite_differences(
            "the model, finite differences",
            loss,
            params,
            grads,
            rng,
            FINITE_DIFFERENCES,
            magnitude=1.0,
            meaning="The gradient is not the derivative of the loss.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# One batch in parts


@property_test(
    always=[{"example": TYPICAL[0], "pieces": [1, 3, 2]}],
    example=examples(gains=(USUAL,)),
    pieces=st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_parity_of_a_batch_and_its_uneven_pieces(example: Example, pieces: list[int]) -> None:
    """Gradient accumulation. A failure: pieces do not weigh as much as the targets that they have, so that the update
    depends on how a batch is cut."""
    model = numpygpt.GPT(example.config, example.params)
    idx, targets = np.concatenate([example.idx] * 2), np.concatenate([example.targets] * 2)
    loss, grads = model.loss_and_grads(idx, targets)
    count, start, total, sums = int((targets >= 0).sum()), 0, 0.0, {name: 0.0 for name in grads}
    while start < len(idx):
        rows = slice(start, start + pieces[start % 3])
        part_loss, part = model.loss_and_grads(idx[rows], targets[rows], count=count)
        total += part_loss
        sums = {name: sums[name] + part[name] for name in part}
        start = rows.stop
    scales = uncancelled_scales(model, idx, targets)
    logits, _ = model.forward(idx)
    compare("a batch and its pieces", (logits, total, sums), (logits, loss, grads), scales, (1e-14, 1e-12))


@property_test(
    always=[{"example": TYPICAL[0], "threads": 2}], example=examples(gains=(USUAL,)), threads=st.integers(2, 5)
)
def test_parity_of_one_thread_and_many(example: Example, threads: int) -> None:
    """A failure: cutting a batch among threads changes more than rounding, or is not the same every time."""
    model, idx, targets = numpygpt.GPT(example.config, example.params), example.idx, example.targets
    with tiles_of(example.attention_tile):
        first, again = (loss_and_grads_in_parts(model, idx, targets, threads=threads) for _ in range(2))
    logits, loss, grads = all_of(model, example)
    scales = uncancelled_scales(model, idx, targets)
    compare("one thread and many", (logits, *first), (logits, loss, grads), scales, (1e-13, 1e-12))
    assert first[0] == again[0], "the loss of the same batch differs between two calls"
    for name in grads:
        assert np.array_equal(first[1][name], again[1][name]), f"the gradient of {name} differs between two calls"
    evaluated = loss_in_parts(model, idx, np.maximum(targets, 0), threads=threads)  # evaluation has no targets of -1
    size = max(1.0, rms(logits))
    expected = model.forward(idx, np.maximum(targets, 0))[1]
    assert_close(
        "one thread and many", "evaluation", evaluated, expected, 1e-13, scale=size, meaning="Parts weigh wrong."
    )


@property_test(always=ALWAYS, example=examples(gains=(USUAL,)))
def test_non_contiguous_weights_make_no_difference(example: Example) -> None:
    """A failure: the model depends on how the arrays that it was given lie in memory."""
    model = numpygpt.GPT(example.config, {name: np.asfortranarray(param) for name, param in example.params.items()})
    ours = numpygpt.GPT(example.config, example.params)
    scales = uncancelled_scales(ours, example.idx, example.targets)
    compare("memory layout", all_of(model, example), all_of(ours, example), scales, (1e-13, 1e-12))


# ---------------------------------------------------------------------------------------------------------------------
# Structure


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@property_test(seed=SEEDS, example=examples())
def test_initial_weights_are_bit_equal(dtype: str, seed: int, example: Example) -> None:
    """A failure: one seed no longer gives both engines the same start, under the same names, in the same order."""
    ours = numpygpt.GPT(example.config, seed=seed, dtype=np.dtype(dtype).type).params
    theirs = torchgpt.GPT(example.config, seed=seed, dtype=getattr(torch, dtype)).state_dict()
    assert list(ours) == list(theirs) == list(numpygpt.param_shapes(example.config))
    for name, param in ours.items():
        assert param.dtype == dtype == str(theirs[name].dtype).removeprefix("torch."), name
        assert param.tobytes() == theirs[name].numpy().tobytes(), f"{name} is not bit-equal in the two engines"


def test_initial_weights_are_as_specified() -> None:
    """A failure: a tensor's distribution is not the one in the design, which still learns, but otherwise."""
    config = GPTConfig(vocab_size=500, block_size=200, n_layer=8, n_head=4, n_embd=64)
    for name, param in numpygpt.init_params(config, seed=1, dtype=np.float64).items():
        if name.endswith(".bias"):
            assert not param.any(), f"{name} must start at 0"
        elif param.ndim == 1:
            assert (param == 1).all(), f"{name}, a LayerNorm's gain, must start at 1"
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            # The standard error of a standard deviation is std / sqrt(2 n); of a mean, std / sqrt(n).
            assert abs(param.std() / std - 1) < 5 / math.sqrt(2 * param.size), (
                f"{name}: standard deviation {param.std()}"
            )
            assert abs(param.mean()) < 5 * std / math.sqrt(param.size), f"{name}: mean {param.mean()}"
            # The fourth moment of a normal distribution is 3 std^4, and that of a uniform one 1.8.
            assert abs(np.mean((param / std) ** 4) - 3) < 5 * math.sqrt(96 / param.size), f"{name} is not normal"


def test_each_tensor_has_random_numbers_of_its_own() -> None:
    """A failure: two tensors are drawn from the same stream, and begin equal."""
    params = numpygpt.init_params(GPTConfig(7, 7, n_layer=2, n_head=1, n_embd=7), seed=3)
    starts = [param.ravel()[:7].tobytes() for param in params.values() if param.ndim == 2]
    assert len(set(starts)) == len(starts)
    other = numpygpt.init_params(GPTConfig(7, 7, n_layer=2, n_head=1, n_embd=7), seed=4)
    assert not np.array_equal(params["wte.weight"], other["wte.weight"]), "the seed has no effect"


def test_the_weights_of_one_seed_are_the_same_in_both_dtypes() -> None:
    """A failure: float32 and float64 runs of one seed no longer start from the same numbers."""
    config = GPTConfig(11, 5, n_layer=1, n_head=1, n_embd=4)
    single, double = (numpygpt.init_params(config, 7, dtype) for dtype in (np.float32, np.float64))
    for name in single:
        assert np.array_equal(single[name], double[name].astype(np.float32)), name


def test_parameter_counts() -> None:
    """A failure: the models are no longer those of the literature."""
    full = GPTConfig(vocab_size=65, block_size=256)
    assert numpygpt.GPT(full).num_params() == 10_770_816
    assert torchgpt.GPT(full).num_params() == 10_770_816
    gpt2 = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    assert sum(math.prod(shape) for shape in numpygpt.param_shapes(gpt2).values()) == 124_439_808


def test_defaults() -> None:
    """A failure: who says nothing gets another model, or another recipe, than the design promises."""
    full = GPTConfig(vocab_size=65, block_size=256)
    assert vars(full) == vars(GPTConfig(65, 256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=True))
    small = GPTConfig(5, 4, n_layer=1, n_head=1, n_embd=4)
    for params in (
        numpygpt.init_params(small),
        numpygpt.GPT(small).params,
        {name: param.numpy() for name, param in torchgpt.GPT(small).state_dict().items()},
    ):
        for name, param in numpygpt.init_params(small, seed=1337, dtype=np.float32).items():
            assert params[name].tobytes() == param.tobytes(), f"{name} is not that of seed 1337 in float32"
    optimizer = numpygpt.AdamW({})
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.99), 1e-8, 0.1)
    assert torchgpt.GPT(small).h[0].attn.attention == "sdpa"


def names_in(file: str) -> list[str]:
    """Functions and classes of a module, and the methods of its GPT, in the order in which they are read."""
    names = []
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
            if node.name == "GPT":
                names += [f"GPT.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)]
    return names


def test_names_line_up_in_both_files() -> None:
    """A failure: who reads the files side by side meets the same things under other names or in another order."""
    layers = {"attention_forward": "Attention", "mlp_forward": "MLP", "block_forward": "Block"}
    layers["scaled_dot_product_attention_forward"] = "scaled_dot_product_attention"
    ours = [layers.get(name, name) for name in names_in("numpygpt.py")]
    theirs = names_in("torchgpt.py")
    common = [name for name in ours if name in theirs]
    assert common == [name for name in theirs if name in ours]
    assert {"scaled_dot_product_attention", "Attention", "MLP", "Block", "GPT", "sample"} <= set(common)
    assert {f"GPT.{m}" for m in ("num_params", "forward", "generate", "stream", "_stream")} <= set(common)


def test_weights_move_to_torch_under_the_same_names_and_shapes() -> None:
    """A failure: loading needs a mapping or a transposition, which the design rules out."""
    for bias in (True, False):
        config = GPTConfig(7, 5, n_layer=2, n_head=2, n_embd=6, bias=bias)
        shapes = {name: tuple(param.shape) for name, param in torchgpt.GPT(config).state_dict().items()}
        assert shapes == numpygpt.param_shapes(config)
        assert sorted(shapes) == sorted(
            ["wte.weight", "wpe.weight"]
            + [
                f"{layer}.{kind}"
                for layer in ["ln_f"]
                + [
                    f"h.{i}.{part}"
                    for i in range(2)
                    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
                ]
                for kind in (["weight", "bias"] if bias else ["weight"])
            ]
        )


def test_a_fresh_model_is_uncertain() -> None:
    """A failure: fresh weights already prefer some tokens; the loss before training must be little more than log V."""
    config = GPTConfig(vocab_size=65, block_size=16, n_layer=2, dropout=0.0)
    idx, targets = np.random.default_rng(0).integers(65, size=(2, 4, 16))
    # Logits have variance 384 * 0.02^2 = 0.15, and the mean of exp of such a number is exp(0.15 / 2).
    assert numpygpt.GPT(config).forward(idx, targets)[1] == pytest.approx(math.log(65) + 0.077, abs=0.1)


def test_each_backward_stands_under_its_forward() -> None:
    """A failure: who checks a gradient has to look for what it is the gradient of."""
    names = names_in("numpygpt.py")
    backwards = [name for name in names if name.endswith("_backward") and not name.startswith("GPT.")]
    assert len(backwards) >= 10
    for name in backwards:
        assert names[names.index(name) - 1] == name.replace("_backward", "_forward")
