"""A GPT by hand: forward, backward, optimizer and sampling in plain NumPy, to be read from top to bottom.

A GPT reads token ids. At every position it gives V scores (logits), one for each token that could come next. Inside,
each token is a vector of C numbers; together they are the residual stream x (B, T, C). Blocks read x and add to it, in
turn by attention (each token looks at itself and the tokens before it) and by an MLP (each token by itself). Training
moves softmax(logits[b, t]) towards targets[b, t], the token that followed idx[b, t] in the text.

What is here: the GPT-2 architecture (Radford et al. 2019; pre-LayerNorm, learned positions, tanh GELU, the output head
tied to the token embedding), every gradient (docs/derivations.md derives them), clipping, AdamW, Muon, and generation
with a key/value cache. What is not: autograd, data, training loops, files, threads. torchgpt.py beside this file is the
same model in PyTorch, with the same names in the same order; the tests prove that the two are one function.

Letters used for shapes, here and everywhere in the project:

    B  sequences in a batch          C  channels, n_embd               V  vocabulary size
    T  tokens in a sequence          nh, hs  heads, head size; C = nh * hs
    L  layers                        ... any leading dimensions

Conventions. Each `layer_forward` returns its output and `saved`, the activations that its backward needs (dropout saves
its scale, softmax its output). `layer_backward` stands directly under it, unpacks `saved` on its first line and returns
gradients, always of the loss: `dx` is d loss / d x and has the shape of x, and so for every name. `dout` is the
gradient of the forward's output. In the residual stream, input and output gradients are both called `dx`.
A linear layer is x @ weight.T + bias, as in PyTorch, so weights move between the two engines without a transposition.
Every function follows the dtype of the parameters: float32 to train, float64 to check gradients to many digits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Params = dict[str, Array]
Grads = dict[str, Array | None]  # None for a bias that the model does not have
Saved = tuple
Generator = np.random.Generator
Generators = Sequence[Generator]  # one for each sequence of a batch
KVCache = tuple[Array, Array]  # the keys and the values of one layer


# ---------------------------------------------------------------------------------------------------------------------
# The configuration, and the parameters that it implies


@dataclass(frozen=True)
class GPTConfig:
    """The seven numbers that make a GPT. The defaults are the full model: 10,770,816 parameters at V 65, T 256.

    vocab_size: V, how many different tokens there are
    block_size: the longest T that the model can see, in tokens
    n_layer, n_head, n_embd: L, nh and C
    dropout: the probability with which an activation is dropped in training, in [0, 1)
    bias: False leaves out the bias of every linear layer and LayerNorm

    NumPy's numbers become Python's, so that a config can be saved as JSON. Raises ValueError that names the field.
    """

    vocab_size: int
    block_size: int
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.2
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))  # a frozen dataclass is set this way
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd {self.n_embd} and n_head {self.n_head}")
        number = is_integer(self.dropout) or isinstance(self.dropout, (float, np.floating))
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if not isinstance(self.bias, (bool, np.bool_)):
            raise ValueError(f"bias must be True or False, got {self.bias!r}")
        object.__setattr__(self, "dropout", float(self.dropout))
        object.__setattr__(self, "bias", bool(self.bias))


def param_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """GPT-2's name and the shape of every parameter, in the order in which they are drawn. Nothing is allocated.

    wte, wpe: token and position embedding; h.i: block i, with ln_1, attn, ln_2, mlp; ln_f: the final LayerNorm
    """
    V, C = config.vocab_size, config.n_embd
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    layers = {f"h.{i}.{layer}": shape for i in range(config.n_layer) for layer, shape in block.items()}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (config.block_size, C)}
    for layer, shape in {**layers, "ln_f": (C,)}.items():
        shapes[f"{layer}.weight"] = shape  # a linear layer's (out, in), or a LayerNorm's gain (C,)
        if config.bias:
            shapes[f"{layer}.bias"] = shape[:1]
    return shapes


def init_params(config: GPTConfig, seed: int = 1337, dtype: type = np.float32) -> Params:
    """Draw initial weights: Normal(0, 0.02) for matrices, zero biases, unit LayerNorm gains.

    As in GPT-2, except that GPT-2 uses 0.01 for wpe. Each block adds to the residual stream twice, through its two
    c_proj; drawing those with 0.02 / sqrt(2 L) keeps the stream's variance independent of depth (Radford et al. 2019,
    section 2.3). The numbers are drawn in float64 and then rounded, so the float32 weights of a seed are the rounded
    float64 weights of that seed. Raises ValueError if the seed is not an integer of at least 0.
    """
    check_count("seed", seed)
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in param_shapes(config).items():
        if name.endswith(".bias"):
            params[name] = np.zeros(shape, dtype)
        elif len(shape) == 1:
            params[name] = np.ones(shape, dtype)
        else:
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            params[name] = (std * rng.standard_normal(shape)).astype(dtype)
    return params


def select_prefix(params: Params, prefix: str) -> Params:
    """The parameters whose names start with prefix, under the rest of their names: what one module needs."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# The layers: each forward with its backward under it


def embedding_forward(idx: Array, wte: Array, wpe: Array) -> tuple[Array, Saved]:
    """Look up a vector for what each token is and one for where it stands, and add them: idx (B, T) -> x (B, T, C).

    wte (V, C) has a learned row for each token id, wpe (block_size, C) one for each position.
    """
    T = idx.shape[1]
    return wte[idx] + wpe[:T], (idx, wte.shape, wpe.shape)


def embedding_backward(dx: Array, saved: Saved) -> tuple[Array, Array]:
    """dx (B, T, C) -> dwte (V, C), dwpe (block_size, C).

    A row that was copied to several places gets the sum of their gradients. np.add.at adds one by one; with
    dwte[idx] += dx, an id that occurs twice would get only one of its gradients.
    """
    idx, wte_shape, wpe_shape = saved
    T = idx.shape[1]
    dwte = np.zeros(wte_shape, dx.dtype)
    np.add.at(dwte, idx, dx)
    dwpe = np.zeros(wpe_shape, dx.dtype)
    dwpe[:T] = dx.sum(axis=0)
    return dwte, dwpe


# The next three are sums along an axis. As products with a vector of ones they run in the BLAS, the library behind @,
# several times faster than NumPy's own sum. (np.dot, because @ with a vector keeps Python's lock while it computes.)


def sum_last_axis(x: Array) -> Array:
    """(..., n) -> (..., 1)."""
    n = x.shape[-1]
    return np.dot(x.reshape(-1, n), np.ones(n, x.dtype)).reshape(*x.shape[:-1], 1)


def mean_last_axis(x: Array) -> Array:
    """(..., n) -> (..., 1)."""
    return sum_last_axis(x) / x.shape[-1]


def sum_tokens(x: Array) -> Array:
    """Sum along all axes except the last, (..., n) -> (n,)."""
    flat = x.reshape(-1, x.shape[-1])
    return np.dot(np.ones(len(flat), x.dtype), flat)


def layernorm_forward(x: Array, weight: Array, bias: Array | None, eps: float = 1e-5) -> tuple[Array, Saved]:
    """Give every token mean 0 and variance 1 over its channels, then a gain and a shift (Ba et al. 2016).

    x (..., C), weight (C,), bias (C,) or None -> (..., C). eps keeps the division finite where all channels are equal.
    """
    centered = x - mean_last_axis(x)
    variance = mean_last_axis(centered * centered)
    variance[np.isinf(variance)] = np.nan  # an overflow: 1 / sqrt(inf) = 0 would hide it; check_finite finds NaN
    rstd = 1 / np.sqrt(variance + eps)
    xhat = centered * rstd
    out = xhat * weight
    if bias is not None:
        out += bias
    return out, (xhat, rstd, weight, bias is not None)


def layernorm_backward(dout: Array, saved: Saved) -> tuple[Array, Array, Array | None]:
    """dout (..., C) -> dx (..., C), dweight (C,), dbias (C,) or None.

    x acts on xhat in three ways: directly, through the mean and through the variance. Each gives dx one term. To see
    why two of them subtract: adding a constant to x, or stretching it about its mean, changes neither xhat (apart from
    eps) nor the loss. So dx has no component along these two directions, (1, ..., 1) and xhat. As xhat has mean 0 and
    mean square 1, subtracting mean(dxhat) removes the first, and subtracting xhat mean(dxhat xhat) the second.
    """
    xhat, rstd, weight, has_bias = saved
    dweight = sum_tokens(dout * xhat)
    dbias = sum_tokens(dout) if has_bias else None
    dxhat = dout * weight
    dx = rstd * (dxhat - mean_last_axis(dxhat) - xhat * mean_last_axis(dxhat * xhat))
    return dx, dweight, dbias


def linear_forward(x: Array, weight: Array, bias: Array | None) -> tuple[Array, Saved]:
    """x (..., in), weight (out, in), bias (out,) or None -> x @ weight.T + bias (..., out)."""
    flat = x.reshape(-1, x.shape[-1])  # one large product for all tokens, instead of one for each sequence
    out = flat @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight)), (x, weight, bias is not None)


def linear_backward(dout: Array, saved: Saved) -> tuple[Array, Array, Array | None]:
    """dout (..., out) -> dx (..., in), dweight (out, in), dbias (out,) or None.

    out[n, o] = sum_i x[n, i] weight[o, i] + bias[o]: each factor's gradient is dout times the other factor, summed
    over the index that the factor does not have. Shapes alone then say where the transposes go.
    """
    x, weight, has_bias = saved
    flat, dflat = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dx = (dflat @ weight).reshape(x.shape)
    dweight = dflat.T @ flat
    dbias = sum_tokens(dflat) if has_bias else None
    return dx, dweight, dbias


GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def gelu_forward(x: Array) -> tuple[Array, Saved]:
    """GELU in the tanh form that GPT-2 uses (Hendrycks & Gimpel 2016, section 2), element by element: (...) -> (...).

    out = x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3): about 0 for very negative x, about x for large x.
    Without a nonlinearity between them, two linear layers collapse into one.
    """
    tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    out = 0.5 * x * (1 + tanh)
    return out, (x, tanh)


def gelu_backward(dout: Array, saved: Saved) -> Array:
    """dout (...) -> dx (...).

    The product rule on x/2 and 1 + tanh(u): d out / d x = 1/2 (1 + tanh + x (1 - tanh^2) slope), where slope = du/dx =
    sqrt(2/pi) (1 + 3 * 0.044715 x^2).
    """
    x, tanh = saved
    slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return 0.5 * dout * (1 + tanh + x * (1 - tanh * tanh) * slope)


def dropout_forward(x: Array, p: float, rngs: Generators | None) -> tuple[Array, Array | None]:
    """Drop each element with probability p and scale the others by 1 / (1 - p): x (B, ...) -> (B, ...).

    Training with random holes keeps a unit from relying on certain others (Srivastava et al. 2014). The scale keeps the
    expected value, so x passes unchanged when dropout is off: rngs None. Each sequence b has a generator of its own,
    rngs[b]: what is dropped in it does not depend on which other sequences are computed beside it.
    """
    if rngs is None or p == 0.0:
        return x, None
    mask = np.stack([rng.random(x.shape[1:], dtype=np.float32) >= p for rng in rngs])
    scale = mask * x.dtype.type(1 / (1 - p))
    return x * scale, scale


def dropout_backward(dout: Array, scale: Array | None) -> Array:
    """dout (B, ...) -> dx (B, ...): out = x * scale, so dx = dout * scale, with the same scale as in the forward."""
    return dout if scale is None else dout * scale


def softmax_forward(x: Array) -> Array:
    """exp(x) / sum(exp(x)) along the last axis: (..., n) -> (..., n), positive numbers that sum to 1.

    Subtracting the maximum doesn't change the result (the factor exp(-max) cancels), and keeps exp from overflowing. An
    entry of -inf gets exactly 0. The probabilities are also what the backward needs.
    """
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / sum_last_axis(exp)


def softmax_backward(dprobs: Array, probs: Array) -> Array:
    """dprobs, probs (..., n) -> dx (..., n).

    d probs[j] / d x[i] = probs[j] (1[i = j] - probs[i]). Multiply by dprobs[j], sum over j, and what is left is
    probs[i] (dprobs[i] - sum_j dprobs[j] probs[j]).
    """
    return probs * (dprobs - sum_last_axis(dprobs * probs))


def scaled_dot_product_attention_forward(
    q: Array, k: Array, v: Array, dropout: float = 0.0, rngs: Generators | None = None
) -> tuple[Array, Saved]:
    """Causal attention: softmax(q k^T / sqrt(hs)) v, with the future masked (Vaswani et al. 2017, section 3.2.1).

    Every token asks with a query, and every token offers a key and a value. The query is compared with the keys of its
    own token and of those before it. The better a key fits, the more of its value the query gets.

    q (B, nh, queries, hs), k and v (B, nh, keys, hs) -> (B, nh, queries, hs). There may be fewer queries than keys (in
        a tile, or with a cache): they are the last tokens', so query i may see the keys up to keys - queries + i.
    dropout, rngs: as dropout_forward's p and rngs
    """
    hs, queries, keys = q.shape[-1], q.shape[-2], k.shape[-2]
    scores = q @ k.swapaxes(-1, -2)  # 1. how well each key fits each query: (B, nh, queries, keys)
    att = scores / math.sqrt(hs)  # 2. hs products of either sign add up to about sqrt(hs): too large for softmax
    future = np.triu(np.ones((queries, keys), bool), k=1 + keys - queries)  # where the key is of a later token
    att = np.where(future, -np.inf, att)  # 3. no looking ahead; not -1e9, say, as a real score could be lower still
    probs = softmax_forward(att)  # 4. scores become shares: each query's sum to 1, and the future gets exactly 0
    weights, scale = dropout_forward(probs, dropout, rngs)  # 5.
    out = weights @ v  # 6. the average of the values, with these weights
    return out, (q, k, v, probs, weights, scale)


def scaled_dot_product_attention_backward(dout: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """dout (B, nh, queries, hs) -> dq, dk, dv with the shapes of q, k, v. The forward's steps in reverse.

    The mask needs no line. Where it put -inf, probs is exactly 0, and so is weights: dv gets nothing from there. dprobs
    there is not 0, it is any number. But softmax_backward uses it only times probs: in the entry's own gradient, and in
    the sum that all entries of the row share. So masked scores get the gradient 0, and leave the others alone.
    """
    q, k, v, probs, weights, scale = saved
    hs = q.shape[-1]
    # 6. was out = weights @ v: as in the linear layer, each factor's gradient is dout times the other factor
    dweights = dout @ v.swapaxes(-1, -2)
    dv = weights.swapaxes(-1, -2) @ dout
    # 5. was weights = probs * scale
    dprobs = dropout_backward(dweights, scale)
    # 4. was probs = softmax(att), and 3. the mask
    datt = softmax_backward(dprobs, probs)
    # 2. was att = scores / sqrt(hs)
    dscores = datt / math.sqrt(hs)
    # 1. was scores = q @ k.T: a product once more
    dq = dscores @ k
    dk = dscores.swapaxes(-1, -2) @ q
    return dq, dk, dv


ATTENTION_TILE = 64  # queries at a time: fewer skip more of the future, more make larger products


def causal_tiles(T: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Cut the queries, the last T of num_keys tokens, into tiles; yield each tile's queries and the keys they may see.

    Half of the (T, T) scores are masked anyway. A tile leaves out the keys that lie in the future of all its queries,
    so most of that half is neither computed nor saved. The sums stay the same.
    """
    for first in range(0, T, ATTENTION_TILE):
        end = min(first + ATTENTION_TILE, T)
        yield slice(first, end), slice(0, num_keys - T + end)


def attention_forward(
    x: Array,
    params: Params,
    n_head: int,
    dropout: float = 0.0,
    rngs: Generators | None = None,
    kv_cache: KVCache | None = None,
    start: int = 0,
) -> tuple[Array, Saved]:
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2.2): x (B, T, C) -> (B, T, C).

    One linear layer makes all queries, keys and values. They are cut into nh heads of hs channels; each head attends by
    itself, so each can look for something else. A second linear layer mixes what the heads found.

    params: c_attn.weight (3C, C) and .bias (3C,), c_proj.weight (C, C) and .bias (C,), or no biases
    dropout, rngs: as dropout_forward's p and rngs
    kv_cache, start: for generation only. Two arrays (B, nh, block_size, hs) that hold the keys and the values of the
        first `start` tokens. The T tokens of x come after those; their own keys and values are added to the arrays.
    """
    B, T, C = x.shape
    qkv, qkv_saved = linear_forward(x, params["c_attn.weight"], params.get("c_attn.bias"))  # (B, T, 3C)
    qkv = qkv.reshape(B, T, 3, n_head, C // n_head)  # the 3C channels seen as q, k and v, each cut into heads
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    if kv_cache is not None:
        k_cache, v_cache = kv_cache
        end = start + T
        k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v
        k, v = k_cache[:, :, :end], v_cache[:, :, :end]  # each (B, nh, start + T, hs)

    heads = np.empty_like(q)
    tiles_saved = []
    for queries, keys in causal_tiles(T, k.shape[2]):
        heads[:, :, queries], saved = scaled_dot_product_attention_forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], dropout, rngs
        )
        tiles_saved.append((queries, keys, saved))

    y = heads.swapaxes(1, 2).reshape(B, T, C)  # the heads side by side again
    out, proj_saved = linear_forward(y, params["c_proj.weight"], params.get("c_proj.bias"))
    out, out_scale = dropout_forward(out, dropout, rngs)
    return out, (qkv_saved, n_head, tiles_saved, proj_saved, out_scale)


def attention_backward(dout: Array, saved: Saved) -> tuple[Array, Grads]:
    """dout (B, T, C) -> dx (B, T, C), the parameters' gradients. The forward's lines in reverse."""
    qkv_saved, n_head, tiles_saved, proj_saved, out_scale = saved
    B, T, C = dout.shape
    grads: Grads = {}
    dout = dropout_backward(dout, out_scale)
    dy, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dout, proj_saved)
    dheads = dy.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)  # (B, nh, T, hs)

    dqkv = np.zeros((B, T, 3, n_head, C // n_head), dy.dtype)
    dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)  # views, each (B, nh, T, hs): what they get lands in dqkv
    for queries, keys, tile_saved in reversed(tiles_saved):
        dq_tile, dk_tile, dv_tile = scaled_dot_product_attention_backward(dheads[:, :, queries], tile_saved)
        dq[:, :, queries] = dq_tile  # each query is in one tile,
        dk[:, :, keys] += dk_tile  # but a key is seen by its own tile and all later ones: their gradients add up
        dv[:, :, keys] += dv_tile

    dqkv = dqkv.reshape(B, T, 3 * C)
    dx, grads["c_attn.weight"], grads["c_attn.bias"] = linear_backward(dqkv, qkv_saved)
    return dx, grads


def mlp_forward(x: Array, params: Params, dropout: float = 0.0, rngs: Generators | None = None) -> tuple[Array, Saved]:
    """Two linear layers with a GELU between them, four times as wide inside, on each token alone: (B, T, C) -> same.

    params: c_fc.weight (4C, C) and .bias (4C,), c_proj.weight (C, 4C) and .bias (C,), or no biases
    """
    hidden, fc_saved = linear_forward(x, params["c_fc.weight"], params.get("c_fc.bias"))  # (B, T, 4C)
    hidden, gelu_saved = gelu_forward(hidden)
    out, proj_saved = linear_forward(hidden, params["c_proj.weight"], params.get("c_proj.bias"))
    out, out_scale = dropout_forward(out, dropout, rngs)
    return out, (fc_saved, gelu_saved, proj_saved, out_scale)


def mlp_backward(dout: Array, saved: Saved) -> tuple[Array, Grads]:
    """dout (B, T, C) -> dx (B, T, C), the parameters' gradients: the forward's calls in reverse."""
    fc_saved, gelu_saved, proj_saved, out_scale = saved
    grads: Grads = {}
    dout = dropout_backward(dout, out_scale)
    dhidden, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dout, proj_saved)
    dhidden = gelu_backward(dhidden, gelu_saved)
    dx, grads["c_fc.weight"], grads["c_fc.bias"] = linear_backward(dhidden, fc_saved)
    return dx, grads


def block_forward(
    x: Array,
    params: Params,
    n_head: int,
    dropout: float = 0.0,
    rngs: Generators | None = None,
    kv_cache: KVCache | None = None,
    start: int = 0,
) -> tuple[Array, Saved]:
    """One transformer block, (B, T, C) -> (B, T, C): each branch reads the residual stream x and adds to it.

    params holds the block's parameters by their names within the block; the rest is as in attention_forward.
    """
    branch, ln_1_saved = layernorm_forward(x, params["ln_1.weight"], params.get("ln_1.bias"))
    branch, attn_saved = attention_forward(
        branch, select_prefix(params, "attn."), n_head, dropout, rngs, kv_cache, start
    )
    x = x + branch
    branch, ln_2_saved = layernorm_forward(x, params["ln_2.weight"], params.get("ln_2.bias"))
    branch, mlp_saved = mlp_forward(branch, select_prefix(params, "mlp."), dropout, rngs)
    x = x + branch
    return x, (ln_1_saved, attn_saved, ln_2_saved, mlp_saved)


def block_backward(dx: Array, saved: Saved) -> tuple[Array, Grads]:
    """dx (B, T, C) of the output -> dx (B, T, C) of the input, the parameters' gradients.

    A sum hands its gradient to both sides: to the branch, and unchanged around it. So each branch's gradient is
    *added* to the stream's own.
    """
    ln_1_saved, attn_saved, ln_2_saved, mlp_saved = saved
    grads: Grads = {}
    dbranch, mlp_grads = mlp_backward(dx, mlp_saved)
    dbranch, grads["ln_2.weight"], grads["ln_2.bias"] = layernorm_backward(dbranch, ln_2_saved)
    dx = dx + dbranch
    dbranch, attn_grads = attention_backward(dx, attn_saved)
    dbranch, grads["ln_1.weight"], grads["ln_1.bias"] = layernorm_backward(dbranch, ln_1_saved)
    dx = dx + dbranch
    grads |= {"mlp." + name: grad for name, grad in mlp_grads.items()}
    grads |= {"attn." + name: grad for name, grad in attn_grads.items()}
    return dx, grads


def cross_entropy_forward(logits: Array, targets: Array, count: int) -> tuple[np.floating, Saved]:
    """The mean surprise at the true next tokens: logits (B, T, V), targets (B, T) -> (sum of -log p(target)) / count.

    p is softmax(logits), log the natural one, so the unit is the nat. Targets of -1 are ignored; count is the number of
    the others. If these sequences are a part of a larger batch, count is the whole batch's. Two micro-batches of 100
    targets, say: count = 200 for both. Then their losses add up to the loss of the whole batch, and so do their
    gradients.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=-1))  # log p = shifted - log_sum
    ids = np.maximum(targets, 0)  # 0 is as good as -1: ignored tokens are left out of the sum
    at_target = np.take_along_axis(shifted, ids[..., None], axis=-1)[..., 0]
    loss = (log_sum - at_target)[targets >= 0].sum() / count
    return loss.astype(logits.dtype), (logits, targets, count)


def cross_entropy_backward(saved: Saved) -> Array:
    """dlogits (B, T, V) of the loss itself.

    -log p(target) = log(sum_j exp(logits[j])) - logits[target]. Its derivative is softmax(logits), minus 1 at the
    target. This is the one place where the mean's division by count enters the gradients. The softmax is computed here
    and not in the forward, which is also used alone, for evaluation.
    """
    logits, targets, count = saved
    dlogits = softmax_forward(logits)
    b, t = np.nonzero(targets >= 0)
    dlogits[b, t, targets[b, t]] -= 1
    dlogits[targets < 0] = 0
    dlogits /= count
    return dlogits


def gpt_forward(
    idx: Array,
    params: Params,
    config: GPTConfig,
    rngs: Generators | None = None,
    kv_cache: list[KVCache] | None = None,
    start: int = 0,
    for_backward: bool = True,
) -> tuple[Array, Saved]:
    """The whole model, idx (B, T) -> logits (B, T, V): embeddings, L blocks, a last LayerNorm, and the head.

    The head is wte once more ("tied"): a token's logit is the product of x with that token's own embedding.

    rngs: dropout is on if they are given
    kv_cache, start: for generation only. For each layer what attention_forward takes; the T tokens of idx come after
        `start` others. Generation needs only the last token's logits, so the result is (B, 1, V)
    for_backward: False keeps nothing of the blocks: less memory, but gpt_backward cannot follow
    """
    x, embedding_saved = embedding_forward(idx, params["wte.weight"], params["wpe.weight"][start:])
    x, embedding_scale = dropout_forward(x, config.dropout, rngs)
    blocks_saved = []
    for i in range(config.n_layer):
        block_params, block_cache = select_prefix(params, f"h.{i}."), None if kv_cache is None else kv_cache[i]
        x, saved = block_forward(x, block_params, config.n_head, config.dropout, rngs, block_cache, start)
        if for_backward:
            blocks_saved.append(saved)
    if kv_cache is not None:
        x = x[:, -1:]
    x, ln_f_saved = layernorm_forward(x, params["ln_f.weight"], params.get("ln_f.bias"))
    logits, head_saved = linear_forward(x, params["wte.weight"], None)
    return logits, (config, embedding_saved, embedding_scale, blocks_saved, ln_f_saved, head_saved)


def gpt_backward(dlogits: Array, saved: Saved) -> Params:
    """dlogits (B, T, V) -> {name: gradient}, in the order of param_shapes. The forward's lines in reverse.

    Takes each block's activations off their list, so that their memory is free once they have been used; so it can be
    called only once for each forward.
    """
    config, embedding_saved, embedding_scale, blocks_saved, ln_f_saved, head_saved = saved
    grads: Grads = {}
    dx, dwte_head, _ = linear_backward(dlogits, head_saved)
    dx, grads["ln_f.weight"], grads["ln_f.bias"] = layernorm_backward(dx, ln_f_saved)
    for i in reversed(range(config.n_layer)):
        dx, block_grads = block_backward(dx, blocks_saved.pop())
        grads |= {f"h.{i}.{name}": grad for name, grad in block_grads.items()}
    dx = dropout_backward(dx, embedding_scale)
    dwte, grads["wpe.weight"] = embedding_backward(dx, embedding_saved)
    grads["wte.weight"] = dwte + dwte_head  # wte is used twice, as the embedding and as the head: its gradients add
    return {name: grad for name in param_shapes(config) if (grad := grads[name]) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# The model: a thin wrapper around gpt_forward and gpt_backward


class GPT:
    """The whole model: `params` maps each name to its array, and everything else is computed from these.

    config: the sizes
    params: the weights, checked against the config; without them they are drawn from `seed`. They are copied, so that
        no two models share weights by accident; but a read-only array (a file mapped into memory) stays where it is.
    dtype: float32 or float64, of drawn weights; given ones get the wider of this and their own

    Raises ValueError that names the wrong argument, or the parameter that is missing, unknown or has a wrong shape,
    dtype or entry.
    """

    def __init__(
        self, config: GPTConfig, params: Params | None = None, *, seed: int = 1337, dtype: type = np.float32
    ) -> None:
        if (name := getattr(dtype, "__name__", str(dtype))) not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {name}")
        self.config = config
        self.params = init_params(config, seed, dtype) if params is None else check_params(config, params, dtype)

    def num_params(self) -> int:
        """How many numbers are learned. The head adds none: it is wte.weight."""
        return sum(param.size for param in self.params.values())

    def forward(
        self, idx: Array, targets: Array | None = None, *, rng: Generator | Generators | None = None
    ) -> tuple[Array, np.floating | None]:
        """idx (B, T) integers, targets (B, T) integers or None -> logits (B, T, V), mean loss in nats or None.

        rng: turns dropout on; see loss_and_grads
        Raises ValueError on bad ids, targets or weights.
        """
        idx, targets, count = check_batch(self.config, idx, targets)
        rngs = rng_per_sequence(rng, len(idx))
        logits, _ = gpt_forward(idx, self.params, self.config, rngs, for_backward=False)
        check_finite(logits, self.params)
        loss = None if targets is None else cross_entropy_forward(logits, targets, count)[0]
        return logits, loss

    def loss_and_grads(
        self, idx: Array, targets: Array, *, rng: Generator | Generators | None = None, count: int | None = None
    ) -> tuple[np.floating, Params]:
        """idx, targets (B, T) integers -> mean loss in nats, {name: gradient} with the names and shapes of params.

        rng: turns dropout on. One generator, or a sequence of B, one for each sequence: whoever cuts a batch into parts
            gives each part its share of them (rng_per_sequence), and drops what the whole batch would.
        count: if this is a part of a larger batch, how many targets in all of it are not -1; see cross_entropy_forward

        Raises ValueError as forward does, and on a bad count.
        """
        if targets is None:
            raise ValueError("targets must be an array of token ids, got None")
        idx, targets, own_count = check_batch(self.config, idx, targets, allow_no_target=count is not None)
        if count is None:
            count = own_count
        elif not is_integer(count) or count < max(own_count, 1):
            raise ValueError(f"count must be an integer of at least {max(own_count, 1)}, got {count!r}")
        rngs = rng_per_sequence(rng, len(idx))

        logits, saved = gpt_forward(idx, self.params, self.config, rngs)
        check_finite(logits, self.params)
        loss, loss_saved = cross_entropy_forward(logits, targets, count)
        dlogits = cross_entropy_backward(loss_saved)
        del logits, loss_saved  # with a large vocabulary, most of the memory
        return loss, gpt_backward(dlogits, saved)

    def generate(
        self,
        idx: Array,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: Generator | None = None,
    ) -> Array:
        """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens) int64.

        The other arguments, and the errors raised, are those of `stream`.
        """
        check_count("max_new_tokens", max_new_tokens)
        stream = self.stream(idx, temperature=temperature, top_k=top_k, rng=rng)
        new = [next(stream) for _ in range(max_new_tokens)]
        return np.concatenate([np.asarray(idx, np.int64), *(tokens[:, None] for tokens in new)], axis=1)

    def stream(
        self, idx: Array, *, temperature: float = 1.0, top_k: int | None = None, rng: Generator | None = None
    ) -> Iterator[Array]:
        """Continue each row of idx (B, T), T >= 1, without end: yields the next tokens (B,) int64, one step at a time.

        temperature: divides the logits; below 1 the likely get likelier, 0 takes the likeliest token and draws nothing
        top_k: leaves only the k likeliest tokens, and all that tie with the k-th; None or more than V leaves all
        rng: gives one uniform number for each row and token; None: a new generator with an arbitrary seed

        Raises ValueError on ids outside [0, V), temperature below 0 or not finite, top_k below 1, weights not finite.
        """
        idx = check_ids("idx", idx, 0, self.config.vocab_size)
        check_sampling(temperature, top_k)
        return self._stream(idx, temperature, top_k, np.random.default_rng() if rng is None else rng)

    def _stream(self, idx: Array, temperature: float, top_k: int | None, rng: Generator) -> Iterator[Array]:
        """The loop behind `stream`: the first step computes the whole prompt, each further one a single token.

        A token's keys and values depend on nothing after it. So they are computed once and kept in kv_cache, which
        holds those of the window's first `start` tokens.

        Once the text is longer than the window, the cache is of no more use. Each step then drops the oldest token, and
        everything in the cache becomes wrong: every token moves to another position, and from the second layer on, keys
        and values come from vectors into which attention has already mixed the token that left. So start = 0 from then
        on, and every step computes the whole window.
        """
        config, dtype = self.config, self.params["wte.weight"].dtype
        shape = (len(idx), config.n_head, config.block_size, config.n_embd // config.n_head)
        kv_cache = [(np.empty(shape, dtype), np.empty(shape, dtype)) for _ in range(config.n_layer)]
        window, start = idx[:, -config.block_size :], 0
        while True:
            new = window[:, start:]  # the tokens whose keys and values are not in the cache
            logits, _ = gpt_forward(new, self.params, config, None, kv_cache, start, for_backward=False)
            check_finite(logits, self.params)
            tokens = sample(logits[:, -1], temperature, top_k, rng)
            yield tokens
            start = window.shape[1]
            window = np.concatenate([window, tokens[:, None]], axis=1)
            if window.shape[1] > config.block_size:  # one token too many: drop the oldest
                window, start = window[:, 1:], 0


def sample(logits: Array, temperature: float, top_k: int | None, rng: Generator) -> Array:
    """Draw one token for each row by inverting the cumulative distribution: logits (B, V) -> (B,) int64.

    In float64 whatever the model's dtype, so that two engines whose logits agree draw the same token.
    """
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits.astype(np.float64)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits[logits < kth] = -np.inf
    # Subtract the maximum first, so that a tiny temperature makes the others -inf and not the largest one inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    cdf = np.exp(scaled).cumsum(axis=-1)
    total = cdf[:, -1:]
    # u < 1, but rounding could make u * total equal to total, and no entry of the cdf exceeds that.
    threshold = np.minimum(rng.random(len(logits))[:, None] * total, np.nextafter(total, 0))
    return (cdf > threshold).argmax(axis=-1)


def rng_per_sequence(rng: Generator | Generators | None, B: int) -> Generators | None:
    """One generator for each of B sequences, for dropout; None for None.

    A single one seeds them in order, so a batch in parts that share it drops what the whole batch would. Raises
    ValueError if a given sequence does not have B.
    """
    if rng is None:
        return None
    if isinstance(rng, Generator):
        return [np.random.default_rng(seed) for seed in rng.integers(2**63, size=B)]
    if len(rng) != B:
        raise ValueError(f"rng must be one generator, or one for each of the {B} sequences, got {len(rng)}")
    return rng


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def clip_grad_norm(grads: Params, max_norm: float) -> float:
    """Scale all gradients together, in place, so that their global norm is at most max_norm -> the norm before.

    All entries of all tensors count as one long vector, whose direction is kept (Pascanu et al. 2013, section 3.2).
    The 1e-6 is PyTorch's guard against a division by zero. A norm that is not finite scales nothing.
    Raises ValueError if max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm!r}")
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads.values()))
    scale = max_norm / (norm + 1e-6)
    if scale < 1 and math.isfinite(norm):
        for grad in grads.values():
            grad *= scale
    return norm


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2). Updates params in place.

    m and v are running means of the gradient and of its square, t counts the steps. A weight moves by about lr at each
    step, however large its gradients are. As in PyTorch, lr scales the decay too. Only matrices decay; biases and
    LayerNorm gains, which have one dimension, do not. The decay is decoupled: it shrinks the weight directly, and does
    not pass through m and v.

    params: the arrays to learn, which must be writable
    betas: how much of the running means of the gradient and of its square stays at each step, two numbers in [0, 1)
    eps: keeps the division finite where a gradient is 0, above 0
    weight_decay: at least 0

    Raises ValueError that names the argument or the parameter.
    """

    def __init__(
        self, params: Params, *, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8, weight_decay: float = 0.1
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
        check_learnable(params)
        self.params, self.betas, self.eps, self.weight_decay = params, betas, eps, weight_decay
        self.m = {name: np.zeros_like(param) for name, param in params.items()}
        self.v = {name: np.zeros_like(param) for name, param in params.items()}
        self.t = 0

    def step(self, grads: Params, lr: float) -> None:
        """One update with learning rate lr.

        Raises ValueError if lr is negative or not finite, or if grads does not have exactly the names and shapes of
        params; then nothing has changed.
        """
        check_update(self.params, grads, lr)
        self.t += 1
        beta1, beta2 = self.betas
        for name, param in self.params.items():
            grad, m, v = grads[name], self.m[name], self.v[name]
            m *= beta1
            m += (1 - beta1) * grad
            v *= beta2
            v += (1 - beta2) * grad**2
            # m and v start at 0 and are too small at first, by exactly these factors (Kingma & Ba 2015, section 3).
            m_hat = m / (1 - beta1**self.t)
            v_hat = v / (1 - beta2**self.t)
            if param.ndim >= 2:
                param *= 1 - lr * self.weight_decay
            param -= lr * m_hat / (np.sqrt(v_hat) + self.eps)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the polynomial in orthogonalize


def orthogonalize(g: Array, steps: int = 5) -> Array:
    """Bring all singular values of a matrix near 1 and keep its singular vectors: g (..., m, n) -> (..., m, n).

    With g = U diag(s) V.T, that is about U V.T: of all matrices that make no vector longer, the one along which the
    loss falls fastest. A step along g itself would be spent on its few largest singular values. Newton-Schulz finds U
    V.T with products alone. One step, x <- (a I + b x x.T + c (x x.T)^2) x, maps each singular value s to a s + b s^3 +
    c s^5. Dividing g by its norm puts s into [0, 1]; five steps then take whatever is above 0.0016 to between 0.68 and
    1.21, and multiply smaller ones by up to a^5 = 485 (Jordan et al. 2024, "Muon: an optimizer for hidden layers in
    neural networks", which chose a, b and c for that factor).

    g: one matrix or a stack of them, float32 or float64; the result has its dtype. The scale of g does not matter, as
        long as it is finite. A matrix of zeros stays one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = np.ascontiguousarray(g.mT) if tall else g  # x @ x.T is then the smaller of the two products
    tiny = np.finfo(g.dtype).tiny  # for a matrix of zeros
    x = x / (np.abs(x).max(axis=(-2, -1), keepdims=True) + tiny)  # first, or the norm's squares could overflow
    x = x / (np.linalg.norm(x, axis=(-2, -1), keepdims=True) + tiny)
    identity = np.eye(x.shape[-2], dtype=x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = (a * identity + b * gram + c * gram @ gram) @ x
    return np.ascontiguousarray(x.mT) if tall else x


def is_for_muon(name: str, ndim: int) -> bool:
    """Whether Muon trains the parameter of this name and number of dimensions; all others stay with AdamW.

    Muon's are the matrices inside blocks: they map vectors to vectors, and an orthogonalised update moves no vector too
    far. wte and wpe are different. Each row belongs to one token or position and is looked up alone, and
    orthogonalising would move the row of a rare token as far as that of a frequent one. The tied head is wte again, so
    it stays, too.
    """
    return name.startswith("h.") and ndim == 2


def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays or tensors by name -> those that Muon trains, and those that stay with AdamW."""
    matrices = {name: param for name, param in params.items() if is_for_muon(name, param.ndim)}
    return matrices, {name: param for name, param in params.items() if name not in matrices}


class Muon:
    """Momentum, orthogonalised, for the matrices inside blocks (Jordan et al. 2024). Updates params in place.

    m is a running mean of the gradient. Nesterov's look-ahead mixes the gradient in once more: ahead = momentum m + (1
    - momentum) grad, which is the next step's m if the gradient stays the same. Then param -= lr (sqrt(max(1, rows /
    columns)) orthogonalize(ahead) + weight_decay param): an update stretches no vector by much more than lr, whichever
    directions the gradients prefer. A tall matrix spreads a vector over more entries without making it longer, so each
    entry gets smaller; the root makes up for that. c_attn is three maps, q, k and v, each of them orthogonalised by
    itself. As in AdamW, lr scales the decay too. There is no second moment and no bias correction, as the scale of what
    is orthogonalised does not matter.

    params: the matrices to learn (see split_params), which must be writable
    momentum: how much of the running mean stays at each step, in [0, 1)
    weight_decay: at least 0

    Raises ValueError that names the argument or the parameter.
    """

    def __init__(self, params: Params, *, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
        check_learnable(params)
        for name, param in params.items():
            if param.ndim != 2:
                raise ValueError(f"Muon learns matrices, got {name} of shape {param.shape}: leave it to AdamW")
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.m = {name: np.zeros_like(param) for name, param in params.items()}

    def step(self, grads: Params, lr: float) -> None:
        """One update with learning rate lr. Matrices of one shape are orthogonalised together.

        Raises ValueError if lr is negative or not finite, or if grads does not have exactly the names and shapes of
        params; then nothing has changed.
        """
        check_update(self.params, grads, lr)
        by_shape: dict[tuple[int, ...], list[tuple[Array, Array]]] = {}
        for name, param in self.params.items():
            grad = grads[name]
            m = self.momentum * self.m[name] + (1 - self.momentum) * grad
            ahead = self.momentum * m + (1 - self.momentum) * grad
            self.m[name] = m
            maps = 3 if name.endswith("c_attn.weight") else 1  # q, k and v are three maps in one array
            for pair in zip(np.split(param, maps), np.split(ahead, maps), strict=True):
                by_shape.setdefault(pair[0].shape, []).append(pair)
        for (rows, columns), pairs in by_shape.items():
            scale = math.sqrt(max(1, rows / columns))
            updates = orthogonalize(np.stack([ahead for _, ahead in pairs]))
            for (param, _), update in zip(pairs, updates, strict=True):
                param -= lr * (scale * update + self.weight_decay * param)


# ---------------------------------------------------------------------------------------------------------------------
# What comes in from outside is checked here; torchgpt.py calls the same checks, so both engines say the same


def is_integer(value: object) -> bool:
    """True for Python's and NumPy's integers, but not for booleans."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless value is an integer of at least 0."""
    if not is_integer(value) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def check_ids(name: str, ids: Array, low: int, vocab_size: int) -> Array:
    """Token ids (B, T), B and T at least 1, integers in [low, vocab_size) -> the same as int64. Else a ValueError.

    NumPy would take an id of -1 for the last row of the table, and PyTorch on a GPU would abort the process.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"{name} must have shape (B, T) with B and T at least 1, got shape {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got dtype {ids.dtype}")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < low or largest >= vocab_size:
        wrong = smallest if smallest < low else largest
        ignored = " (or -1, to be ignored)" if low < 0 else ""
        raise ValueError(f"{name} must be in [0, {vocab_size}){ignored}, got {wrong}")
    return ids.astype(np.int64)


def check_batch(
    config: GPTConfig, idx: Array, targets: Array | None, allow_no_target: bool = False
) -> tuple[Array, Any, int]:
    """idx, targets (B, T) -> both as int64 (or targets as None), and how many are not -1. Raises ValueError."""
    idx = check_ids("idx", idx, 0, config.vocab_size)
    if idx.shape[1] > config.block_size:
        raise ValueError(f"T must be at most block_size {config.block_size}, got idx of shape {idx.shape}")
    if targets is None:
        return idx, None, 0
    targets = check_ids("targets", targets, -1, config.vocab_size)
    if targets.shape != idx.shape:
        raise ValueError(f"targets must have the shape of idx, {idx.shape}, got {targets.shape}")
    count = int((targets >= 0).sum())
    if count == 0 and not allow_no_target:
        raise ValueError(f"targets must hold at least one id that is not -1, got {targets.size} times -1")
    return idx, targets, count


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raises ValueError unless temperature is finite and at least 0, and top_k None or an integer of at least 1."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")


def check_learnable(params: Params) -> None:
    """Raises ValueError that names a parameter which an optimizer could not write to."""
    for name, param in params.items():
        if not param.flags.writeable:
            raise ValueError(f"{name} must be writable to be learned, got a read-only array: copy it first")


def check_update(params: Params, grads: Params, lr: float) -> None:
    """Raises ValueError unless grads has exactly the names and shapes of params, and lr is finite and at least 0."""
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be a finite number of at least 0, got {lr!r}")
    if grads.keys() != params.keys():
        wrong = sorted(grads.keys() ^ params.keys())
        raise ValueError(f"grads must have the names of params; missing or unknown: {', '.join(wrong)}")
    for name, param in params.items():
        if grads[name].shape != param.shape:
            raise ValueError(f"the gradient of {name} must have shape {param.shape}, got {grads[name].shape}")


def check_finite(logits: Array, params: Params) -> None:
    """Raises ValueError if a logit is NaN or infinite; the message names the first parameter that is, if one is."""
    if not np.isfinite(logits).all():
        broken = next((name for name, param in params.items() if not np.isfinite(param).all()), None)
        came = f"{broken} with NaN or infinite entries" if broken else "finite weights too large for their dtype"
        raise ValueError(f"logits must be finite, got {came}")


def check_params(config: GPTConfig, params: Params, dtype: type) -> Params:
    """The params in the order of the config, copied unless read-only. Raises ValueError that names a bad one."""
    shapes = param_shapes(config)
    for name in [*shapes, *params]:
        if name not in params or name not in shapes:
            fault = "missing from" if name in shapes else "no parameter of this config, but in"
            raise ValueError(f"{name} is {fault} params")
        if params[name].shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {params[name].shape}")
        if params[name].dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64, got {params[name].dtype}")
        if not np.isfinite(params[name]).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    widest = np.result_type(dtype, *params.values())
    # astype with copy=False copies only what has to change its dtype
    return {name: params[name].astype(widest, copy=params[name].flags.writeable) for name in shapes}
