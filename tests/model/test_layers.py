"""Each forward/backward pair of numpygpt.py against two witnesses: PyTorch's autograd on the same tensors and a random
dout, and finite differences of its own forward. A test here says which pair is wrong; test_model says only that one is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn import functional as F

import numpygpt
import torchgpt
from numpygpt import GPTConfig
from tests.helpers import (
    Arrays,
    assert_as_exact_as_torch,
    assert_close,
    assert_finite_differences,
    property_test,
    random_weights,
    rms,
    tiles_of,
    to_torch,
)
from tests.strategies import SEEDS

Backward = Callable[[np.ndarray], Arrays]


@dataclass
class Case:
    """One call of one layer.

    tensors: what the gradient is taken of, in float64
    run: tensors -> the NumPy layer's output, and a function from dout to {name: gradient}
    witness: tensors -> PyTorch's output
    scales: where terms may cancel to nothing, their size: of a gradient, of the output ("out")
    h: steps of finite differences where 1e-3 is too long
    """

    tensors: Arrays
    run: Callable[[Arrays], tuple[np.ndarray, Backward]]
    witness: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    seed: int
    attention_tile: int = 64
    scales: dict[str, float] = field(default_factory=dict)
    h: dict[str, float] = field(default_factory=dict)


def named(names: tuple[str, ...], grads: tuple) -> Arrays:
    """Gradients by name; a parameter that is not there (no bias) must have None."""
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Leading dimensions: none, one or two."""
    return tuple(draw(st.lists(st.integers(1, 4), max_size=2)))


@st.composite
def embeddings(draw: st.DrawFn) -> Case:
    B, T, V, C = (draw(st.integers(1, n)) for n in (3, 5, 7, 5))
    seed = draw(SEEDS)
    rng = np.random.default_rng(seed)
    idx = rng.integers(V, size=(B, T)) if draw(st.booleans()) else np.full((B, T), rng.integers(V))
    tensors = {"wte": rng.standard_normal((V, C)), "wpe": rng.standard_normal((T + draw(st.integers(0, 2)), C))}

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, saved = numpygpt.embedding_forward(idx, t["wte"], t["wpe"])
        return out, lambda dout: named(("wte", "wpe"), numpygpt.embedding_backward(dout, saved))

    def witness(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.embedding(torch.from_numpy(idx), t["wte"]) + t["wpe"][:T]

    return Case(tensors, run, witness, seed, scales={"wte": (B * T) ** 0.5, "wpe": B**0.5})


@st.composite
def layernorms(draw: st.DrawFn) -> Case:
    C, lead, seed, bias = draw(st.integers(1, 9)), draw(shapes()), draw(SEEDS), draw(st.booleans())
    rng = np.random.default_rng(seed)
    size, shift = draw(st.sampled_from([0.01, 1, 100])), draw(st.sampled_from([0, 1]))  # 0.01: eps matters
    tensors = {"x": size * (shift + rng.standard_normal((*lead, C))), "weight": rng.standard_normal(C)}
    if bias:
        tensors["bias"] = rng.standard_normal(C)

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, saved = numpygpt.layernorm_forward(t["x"], t["weight"], t.get("bias"))
        return out, lambda dout: named(("x", "weight", "bias"), numpygpt.layernorm_backward(dout, saved))

    # Of a gradient through one or two channels no more is left than rounding, and a mean that is much larger than the
    # spread around it costs digits: these are the sizes before that.
    spread = np.sqrt(tensors["x"].var(-1) + 1e-5)
    lost = 1 + rms(tensors["x"].mean(-1) / spread)
    scales = {"x": lost * rms(1 / spread) * rms(tensors["weight"]), "weight": lost, "out": lost}
    return Case(
        tensors,
        run,
        lambda t: F.layer_norm(t["x"], (C,), t["weight"], t.get("bias")),
        seed,
        scales=scales,
        h={"x": 1e-3 * spread.min()},
    )


@st.composite
def linears(draw: st.DrawFn) -> Case:
    lead, n_in, n_out, seed = draw(shapes()), draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(SEEDS)
    rng = np.random.default_rng(seed)
    tensors = {"x": rng.standard_normal((*lead, n_in)), "weight": rng.standard_normal((n_out, n_in))}
    if draw(st.booleans()):
        tensors["bias"] = rng.standard_normal(n_out)
    if lead and draw(st.booleans()):
        tensors["x"] = np.asfortranarray(tensors["x"])

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, saved = numpygpt.linear_forward(t["x"], t["weight"], t.get("bias"))
        return out, lambda dout: named(("x", "weight", "bias"), numpygpt.linear_backward(dout, saved))

    return Case(tensors, run, lambda t: F.linear(t["x"], t["weight"], t.get("bias")), seed)


@st.composite
def gelus(draw: st.DrawFn) -> Case:
    seed, size = draw(SEEDS), draw(st.sampled_from([0.1, 1, 5, 30]))
    tensors = {"x": size * np.random.default_rng(seed).standard_normal((*draw(shapes()), 5))}

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, saved = numpygpt.gelu_forward(t["x"])
        return out, lambda dout: {"x": numpygpt.gelu_backward(dout, saved)}

    return Case(tensors, run, lambda t: F.gelu(t["x"], approximate="tanh"), seed, scales={"x": 1.0, "out": size})


@st.composite
def dropouts(draw: st.DrawFn) -> Case:
    B, lead, seed, p = draw(st.integers(1, 3)), draw(shapes()), draw(SEEDS), draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    tensors = {"x": np.random.default_rng(seed).standard_normal((B, *lead, 5))}
    drawn = np.stack([np.random.default_rng(b).random((*lead, 5), dtype=np.float32) for b in range(B)])

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, scale = numpygpt.dropout_forward(t["x"], p, [np.random.default_rng(b) for b in range(B)])
        return out, lambda dout: {"x": numpygpt.dropout_backward(dout, scale)}

    return Case(tensors, run, lambda t: t["x"] * torch.from_numpy(drawn >= p) / (1 - p), seed, scales={"x": 1.0})


@st.composite
def softmaxes(draw: st.DrawFn) -> Case:
    seed, size = draw(SEEDS), draw(st.sampled_from([0.1, 1, 30, 1000]))
    tensors = {"x": size * np.random.default_rng(seed).standard_normal((*draw(shapes()), draw(st.integers(1, 6))))}

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        probs = numpygpt.softmax_forward(t["x"])
        return probs, lambda dout: {"x": numpygpt.softmax_backward(dout, probs)}

    return Case(tensors, run, lambda t: t["x"].softmax(-1), seed, scales={"x": rms(run(tensors)[0])})


@st.composite
def scaled_dot_product_attentions(draw: st.DrawFn) -> Case:
    """As many queries as keys, or fewer: then they are the last ones."""
    B, nh, hs, seed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(SEEDS)
    keys, p = draw(st.integers(1, 7)), draw(st.sampled_from([0.0, 0.3]))
    queries, size = draw(st.integers(1, keys)), draw(st.sampled_from([0.1, 1, 5]))
    rng = np.random.default_rng(seed)
    tensors = {"q": size * rng.standard_normal((B, nh, queries, hs))}
    tensors |= {name: rng.standard_normal((B, nh, keys, hs)) for name in "kv"}
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    drawn = np.stack([np.random.default_rng(b).random((nh, queries, keys), dtype=np.float32) for b in range(B)])
    scale = torch.from_numpy((drawn >= p) / (1 - p))

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        rngs = [np.random.default_rng(b) for b in range(B)]
        out, saved = numpygpt.scaled_dot_product_attention_forward(t["q"], t["k"], t["v"], p, rngs)
        return out, lambda dout: named(("q", "k", "v"), numpygpt.scaled_dot_product_attention_backward(dout, saved))

    def witness(t: dict[str, torch.Tensor]) -> torch.Tensor:
        if p == 0.0:
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=seen)
        att = (t["q"] @ t["k"].mT / hs**0.5).masked_fill(~seen, -torch.inf)
        return (att.softmax(-1) * scale.to(att.dtype)) @ t["v"]

    # A query that sees one key has the gradient 0, and a key or value that every query dropped, too.
    return Case(tensors, run, witness, seed, scales=dict.fromkeys("qkv", size) | {"out": 1.0})


def weights_within(prefix: str, n_head: int, head_size: int, bias: bool, seed: int) -> tuple[GPTConfig, Arrays]:
    config = GPTConfig(1, 1, n_layer=1, n_head=n_head, n_embd=n_head * head_size, dropout=0.0, bias=bias)
    return config, numpygpt.select_prefix(random_weights(config, seed), prefix)


@st.composite
def modules(draw: st.DrawFn, prefix: str, run_numpy: Callable, make_torch: Callable) -> Case:
    """Attention, MLP or Block: the modules of torchgpt.py are the witnesses."""
    n_head, head_size, seed = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 5])), draw(SEEDS)
    if n_head * head_size < 5:
        head_size = 5  # few channels are now and then all but equal, and LayerNorm as good as not differentiable
    B, T, attention = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.sampled_from(["sdpa", "explicit"]))
    config, params = weights_within(prefix, n_head, head_size, draw(st.booleans()), seed)
    x = np.random.default_rng(seed + 1).standard_normal((B, T, config.n_embd))
    module = make_torch(config, attention).double().eval()

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        out, saved, backward = run_numpy(t["x"], {name: t[name] for name in params}, n_head)

        def grads_of(dout: np.ndarray) -> Arrays:
            dx, grads = backward(dout, saved)
            return {"x": dx} | {name: grad for name, grad in grads.items() if grad is not None}

        return out, grads_of

    def witness(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(module, {name: t[name] for name in params}, (t["x"],))

    h = dict.fromkeys(["x", *params], 5e-4)
    return Case({"x": x, **params}, run, witness, seed, attention_tile=draw(st.sampled_from([64, 1, 2, 3, 5])), h=h)


def run_attention(x: np.ndarray, params: Arrays, n_head: int) -> tuple:
    return (*numpygpt.attention_forward(x, params, n_head), numpygpt.attention_backward)


def run_mlp(x: np.ndarray, params: Arrays, n_head: int) -> tuple:
    return (*numpygpt.mlp_forward(x, params), numpygpt.mlp_backward)


def run_block(x: np.ndarray, params: Arrays, n_head: int) -> tuple:
    return (*numpygpt.block_forward(x, params, n_head), numpygpt.block_backward)


@st.composite
def cross_entropies(draw: st.DrawFn) -> Case:
    B, T, V, seed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(SEEDS)
    size, extra = draw(st.sampled_from([0.1, 1, 30, 1000])), draw(st.integers(0, 3))
    rng = np.random.default_rng(seed)
    tensors = {"logits": size * rng.standard_normal((B, T, V))}
    targets = rng.integers(-1, V, size=(B, T))
    targets[0, 0] = max(targets[0, 0], 0)
    count = int((targets >= 0).sum()) + extra  # extra: these are part of a larger batch

    def run(t: Arrays) -> tuple[np.ndarray, Backward]:
        loss, saved = numpygpt.cross_entropy_forward(t["logits"], targets, count)
        return np.asarray(loss), lambda dout: {"logits": dout * numpygpt.cross_entropy_backward(saved)}

    def witness(t: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.from_numpy(targets).flatten()
        return F.cross_entropy(t["logits"].flatten(0, 1), flat, ignore_index=-1, reduction="sum") / count

    return Case(tensors, run, witness, seed, scales={"logits": 1 / count, "out": max(1.0, size)})


LAYERS: dict[str, st.SearchStrategy[Case]] = {
    "embedding": embeddings(),
    "layernorm": layernorms(),
    "linear": linears(),
    "gelu": gelus(),
    "dropout": dropouts(),
    "softmax": softmaxes(),
    "scaled_dot_product_attention": scaled_dot_product_attentions(),
    "attention": modules("h.0.attn.", run_attention, lambda c, kind: torchgpt.Attention(c, kind)),
    "mlp": modules("h.0.mlp.", run_mlp, lambda c, kind: torchgpt.MLP(c)),
    "block": modules("h.0.", run_block, lambda c, kind: torchgpt.Block(c, kind)),
    "cross_entropy": cross_entropies(),
}
# The gates, and the worst that a thousand examples a layer gave.
FLOAT64 = 1e-13  # 1.4e-14, in the block's c_attn.bias
FLOAT32 = 50  # 8 times PyTorch's own rounding, in the block's c_fc.weight
FINITE_DIFFERENCES = 5e-12  # 1.2e-12, all of it rounding of the differences

of_each_layer = pytest.mark.parametrize("layer", LAYERS)


def run_numpy(case: Case, dtype: type) -> tuple[Arrays, np.ndarray]:
    """{"out" and each tensor's gradient}, and the dout that it is for."""
    with tiles_of(case.attention_tile):
        out, backward = case.run({name: tensor.astype(dtype) for name, tensor in case.tensors.items()})
        dout = np.random.default_rng(case.seed).standard_normal(out.shape).astype(dtype)
        grads = backward(dout.copy())
    assert set(grads) == set(case.tensors), "a gradient for each tensor, and none for what is not there"
    return {"out": out, **grads}, dout


def run_torch(case: Case, dout: np.ndarray) -> Arrays:
    tensors = to_torch({name: tensor.astype(dout.dtype) for name, tensor in case.tensors.items()})
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = case.witness(tensors)
    out.backward(torch.from_numpy(dout).to(out.dtype))
    return {"out": out.detach().numpy(), **{name: tensor.grad.numpy() for name, tensor in tensors.items()}}


@of_each_layer
@property_test(data=st.data())
def test_layer_parity_float64(layer: str, data: st.DataObject) -> None:
    """A failure: this layer's forward ("out") or its backward computes another function than PyTorch does."""
    case = data.draw(LAYERS[layer])
    ours, dout = run_numpy(case, np.float64)
    for name, theirs in run_torch(case, dout).items():
        assert_close(
            f"{layer}, float64",
            name,
            ours[name],
            theirs,
            FLOAT64,
            scale=max(rms(theirs), case.scales.get(name, 0.0)),
            meaning=f"{layer}_{'forward' if name == 'out' else 'backward'} is not what PyTorch computes.",
        )


@of_each_layer
@property_test(data=st.data())
def test_layer_parity_float32(layer: str, data: st.DataObject) -> None:
    """A failure: in float32 this layer loses digits that PyTorch keeps, or it leaves float32."""
    case = data.draw(LAYERS[layer])
    case.tensors = {name: tensor.astype(np.float32).astype(np.float64) for name, tensor in case.tensors.items()}
    ours, dout = run_numpy(case, np.float32)
    theirs = run_torch(case, dout)
    with tiles_of(case.attention_tile):
        out, backward = case.run(case.tensors)
        truth = {"out": out, **backward(dout.astype(np.float64))}
    for name in truth:
        assert_as_exact_as_torch(
            f"{layer}, float32",
            name,
            ours[name],
            theirs[name],
            truth[name],
            FLOAT32,
            scale=max(rms(truth[name]), case.scales.get(name, 0.0)),
            meaning=f"{layer}_{'forward' if name == 'out' else 'backward'} rounds more than it has to.",
        )


@of_each_layer
@property_test(data=st.data())
def test_layer_finite_differences(layer: str, data: st.DataObject) -> None:
    """A failure: this layer's backward is not the derivative of its own forward."""
    case = data.draw(LAYERS[layer])
    with tiles_of(case.attention_tile):
        out, backward = case.run(case.tensors)
        rng = np.random.default_rng(case.seed)
        dout = rng.standard_normal(out.shape)
        assert_finite_differences(
            f"{layer}, finite differences",
            lambda tensors: float((case.run(tensors)[0] * dout).sum()),
            case.tensors,
            backward(dout.copy()),
            rng,
            FINITE_DIFFERENCES,
            h=case.h,
            magnitude=float(np.abs(out * dout).sum()) + case.scales.get("out", 0.0),
            meaning=f"{layer}_backward is not the derivative of {layer}_forward.",
        )
