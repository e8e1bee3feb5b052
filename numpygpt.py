"""A GPT by hand: forward, backward, optimizer and sampling in plain NumPy, to be read from top to bottom.

A GPT reads token ids and gives, at every position, V scores (logits) for the token that comes next. On the way each
token is a vector of C numbers; together they are the residual stream x (B, T, C), to which attention (each token looks
at itself and those before it) and MLPs (each token alone) add by turns. Training makes softmax(logits[b, t]) expect
targets[b, t], the token that followed idx[b, t] in the text.

What is here: the GPT-2 architecture (Radford et al. 2019; pre-LayerNorm, learned positions, tanh GELU, the output head
tied to the token embedding), every gradient (docs/derivations.md derives them), AdamW, clipping, and generation with a
key/value cache. What is not: autograd, data, training loops, files. torchgpt.py beside this file is the same model in
PyTorch, with the same names in the same order; the tests prove that the two are one function.

Letters used for shapes, here and everywhere in the project:

    B  sequences in a batch          C  channels, n_embd               V  vocabulary size
    T  tokens in a sequence          nh, hs  heads, head size; C = nh * hs
    L  layers                        ... any leading dimensions

Conventions. Each `x_forward` returns its output and a cache, which is what its backward needs (dropout's is its scale,
softmax's its output). `x_backward` stands directly under it, unpacks the cache on its first line and returns gradients,
always of the loss: `dx` is d loss / d x and has the shape of x, and so for every name. `dout` is the gradient of the
forward's output; but where that is again x, as in the residual stream, the gradient is `dx` at both ends.
A linear layer is x @ weight.T + bias, as in PyTorch, so weights move between the two engines without a transposition.
Every function follows the dtype of the parameters: float32 to train, float64 to check gradients to many digits.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

Cache = tuple
Params = dict[str, np.ndarray]


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

    Raises ValueError that names the field.
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
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd {self.n_embd} and n_head {self.n_head}")
        number = isinstance(self.dropout, (int, float, np.number)) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if not isinstance(self.bias, (bool, np.bool_)):
            raise ValueError(f"bias must be True or False, got {self.bias!r}")


def param_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """GPT-2's name and the shape of every parameter, in the order in which they are drawn. Nothing is allocated.

    wte, wpe: token and position embedding; h.i: block i, with ln_1, attn, ln_2, mlp; ln_f: the final LayerNorm
    """
    V, C = config.vocab_size, config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (config.block_size, C)}
    for i in range(config.n_layer):
        shapes |= {
            f"h.{i}.ln_1.weight": (C,),
            f"h.{i}.ln_1.bias": (C,),
            f"h.{i}.attn.c_attn.weight": (3 * C, C),
            f"h.{i}.attn.c_attn.bias": (3 * C,),
            f"h.{i}.attn.c_proj.weight": (C, C),
            f"h.{i}.attn.c_proj.bias": (C,),
            f"h.{i}.ln_2.weight": (C,),
            f"h.{i}.ln_2.bias": (C,),
            f"h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"h.{i}.mlp.c_fc.bias": (4 * C,),
            f"h.{i}.mlp.c_proj.weight": (C, 4 * C),
            f"h.{i}.mlp.c_proj.bias": (C,),
        }
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {name: shape for name, shape in shapes.items() if config.bias or not name.endswith(".bias")}


def init_params(config: GPTConfig, seed: int = 1337, dtype: type = np.float32) -> Params:
    """Draw initial weights: Normal(0, 0.02) for matrices, zero biases, unit LayerNorm gains.

    As in GPT-2, but that it draws wpe with 0.01. Each block adds to the residual stream twice, through its two c_proj;
    drawing those with 0.02 / sqrt(2 L) keeps the stream's variance independent of depth (Radford et al. 2019, section
    2.3). The numbers are drawn in float64 and then rounded, so the float32 weights of a seed are the rounded float64
    weights of that seed. Raises ValueError if the seed is not an integer of at least 0.
    """
    check_count("seed", seed)
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        if name.endswith(".bias"):
            params[name] = np.zeros(shape, dtype)
        elif len(shape) == 1:
            params[name] = np.ones(shape, dtype)
        else:
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            params[name] = (std * rng.standard_normal(shape)).astype(dtype)
    return params


def within(params: Params, prefix: str) -> Params:
    """The parameters whose names start with prefix, under the rest of their names: a module's view of the model."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# The layers: each forward with its backward under it
#
# Two habits make plain NumPy fast, and the code below keeps to them. Long chains of elementwise operations work in
# place, on an array that nobody else holds. And sums are products with a vector of ones, which the BLAS (the library
# behind @) does several times faster than NumPy's sum along a short axis: with np.dot, which lets other threads run
# meanwhile, as @ with a vector does not. np.vecdot(a, b) is (a * b).sum(axis=-1).


def sum_channels(x: np.ndarray) -> np.ndarray:
    """Sum along the last axis, (..., n) -> (..., 1)."""
    n = x.shape[-1]
    return np.dot(x.reshape(-1, n), np.ones(n, x.dtype)).reshape(*x.shape[:-1], 1)


def sum_rows(x: np.ndarray) -> np.ndarray:
    """Sum along all axes but the last, (..., n) -> (n,)."""
    rows = x.reshape(-1, x.shape[-1])
    return np.dot(np.ones(len(rows), x.dtype), rows)


def embedding_forward(idx: np.ndarray, wte: np.ndarray, wpe: np.ndarray) -> tuple[np.ndarray, Cache]:
    """Look up a vector for what each token is and one for where it stands, and add them: idx (B, T) -> x (B, T, C).

    wte (V, C) has a learned row for each token id, wpe (block_size, C) one for each position.
    """
    T = idx.shape[1]
    return wte[idx] + wpe[:T], (idx, wte.shape, wpe.shape)


def embedding_backward(dx: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """dx (B, T, C) -> dwte (V, C), dwpe (block_size, C).

    A row that was copied to several places gets the sum of their gradients. The rows of dx are sorted by token id, and
    each run of equal ids is added up: what np.add.at(dwte, idx, dx) does, but several times faster.
    """
    idx, wte_shape, wpe_shape = cache
    T, C = dx.shape[1:]
    order = np.argsort(idx, axis=None, kind="stable")
    ids, starts = np.unique(idx.ravel()[order], return_index=True)
    dwte = np.zeros(wte_shape, dx.dtype)
    dwte[ids] = np.add.reduceat(dx.reshape(-1, C)[order], starts, axis=0)
    dwpe = np.zeros(wpe_shape, dx.dtype)
    dwpe[:T] = dx.sum(axis=0)
    return dwte, dwpe


def layernorm_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float = 1e-5
) -> tuple[np.ndarray, Cache]:
    """Give every token mean 0 and variance 1 over its channels, then a gain and a shift (Ba et al. 2016).

    x (..., C), weight (C,), bias (C,) or None -> (..., C). eps keeps the division finite where all channels are equal.
    """
    C = x.shape[-1]
    xhat = x - sum_channels(x) / C
    variance = np.vecdot(xhat, xhat)[..., None] / C
    rstd = 1 / np.sqrt(variance + eps) + 0 * variance  # where the variance overflows, NaN: 0 would hide it
    xhat *= rstd
    out = xhat * weight
    if bias is not None:
        out += bias
    return out, (xhat, rstd, weight, bias is not None)


def layernorm_backward(dout: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dout (..., C) -> dx (..., C), dweight (C,), dbias (C,) or None.

    dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), means over the channels: x acts directly, through its mean
    and through its variance. Adding a constant to x, or stretching it about its mean, does not change xhat (but for
    eps); so dx can have no part in these two directions, and the subtractions take it away.
    """
    xhat, rstd, weight, has_bias = cache
    C = xhat.shape[-1]
    dweight = sum_rows(dout * xhat)
    dbias = sum_rows(dout) if has_bias else None
    dxhat = dout * weight
    mean, projection = sum_channels(dxhat) / C, np.vecdot(dxhat, xhat)[..., None] / C
    dx = dxhat
    dx -= mean
    dx -= xhat * projection
    dx *= rstd
    return dx, dweight, dbias


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, Cache]:
    """x (..., in), weight (out, in), bias (out,) or None -> x @ weight.T + bias (..., out)."""
    rows = x.reshape(-1, x.shape[-1])  # one large product instead of one a sequence
    out = rows @ weight.T
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight)), (x, weight, bias is not None)


def linear_backward(dout: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dout (..., out) -> dx (..., in), dweight (out, in), dbias (out,) or None.

    out[n, o] = sum_i x[n, i] weight[o, i] + bias[o]: each factor's gradient is dout times the other factor, summed
    over the index that the factor does not have. Shapes alone then say where the transposes go.
    """
    x, weight, has_bias = cache
    rows, drows = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dx = (drows @ weight).reshape(x.shape)
    dweight = drows.T @ rows
    dbias = sum_rows(drows) if has_bias else None
    return dx, dweight, dbias


GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def tanh_in_gelu(x: np.ndarray) -> np.ndarray:
    """tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3), element by element: (...) -> (...). GELU and its derivative share it.

    In place, from the inside: u = (sqrt(2/pi) 0.044715 x^2 + sqrt(2/pi)) x.
    """
    u = x * x
    u *= GELU_SCALE * GELU_CUBIC
    u += GELU_SCALE
    u *= x
    return np.tanh(u, out=u)


def gelu_forward(x: np.ndarray) -> tuple[np.ndarray, Cache]:
    """GELU in the tanh form that GPT-2 uses (Hendrycks & Gimpel 2016, section 2), element by element: (...) -> (...).

    out = x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3): near 0 far left, near x far right. Without a bend
    like this, two linear layers would be no more than one.
    """
    out = tanh_in_gelu(x)
    out += 1
    out *= x
    out *= 0.5
    return out, (x,)


def gelu_backward(dout: np.ndarray, cache: Cache) -> np.ndarray:
    """dout (...) -> dx (...).

    Product rule on x/2 and 1 + tanh(u): dx = dout/2 (1 + tanh + x (1 - tanh^2) slope), with slope = du/dx =
    sqrt(2/pi) (1 + 3 * 0.044715 x^2). tanh is computed once more, so that one array less is kept.
    """
    (x,) = cache
    tanh = tanh_in_gelu(x)
    slope = x * x
    slope *= GELU_SCALE * 3 * GELU_CUBIC
    slope += GELU_SCALE
    dx = tanh * tanh
    np.subtract(1, dx, out=dx)
    dx *= slope
    dx *= x
    dx += tanh
    dx += 1
    dx *= 0.5
    dx *= dout
    return dx


def dropout_forward(
    x: np.ndarray, p: float, rngs: Sequence[np.random.Generator] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Drop each element with probability p and scale the others by 1 / (1 - p): x (B, ...) -> (B, ...).

    The scale keeps the expected value, so that x passes unchanged when dropout is off: rngs None (Srivastava et al.
    2014, section 10). Each sequence b has a generator of its own, rngs[b]: what is dropped in it does not depend on
    which other sequences are computed beside it.
    """
    if rngs is None or p == 0.0:
        return x, None
    mask = np.stack([rng.random(x.shape[1:], dtype=np.float32) >= p for rng in rngs])
    scale = mask * x.dtype.type(1 / (1 - p))
    return x * scale, scale


def dropout_backward(dout: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """dout (B, ...) -> dx (B, ...): out = x * scale, so dx = dout * scale, with the very scale of the forward pass."""
    return dout if scale is None else dout * scale


def softmax_forward(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) along the last axis: (..., n) -> (..., n). In place: x becomes the probabilities.

    Taking away the maximum changes nothing in the quotient and keeps exp from overflowing. An entry of -inf gets
    exactly 0. The probabilities are also the cache.
    """
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= sum_channels(x)
    return x


def softmax_backward(dprobs: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """dprobs, probs (..., n) -> dx (..., n).

    d probs[j] / d x[i] = probs[j] (1[i = j] - probs[i]); multiplying by dprobs[j] and summing over j leaves
    probs[i] (dprobs[i] - sum_j dprobs[j] probs[j]).
    """
    dx = dprobs - np.vecdot(dprobs, probs)[..., None]
    dx *= probs
    return dx


ATTENTION_BLOCK = 64  # queries at a time: fewer skip more of the future, more make larger products


def causal_blocks(T: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Cut the queries, the last T of num_keys tokens, into blocks (no relation to block_size or to block_forward's).

    Yields for each block two slices: its queries, and the keys that any of them may see. Half of the (T, T) scores lie
    in the future; those in the future of a whole block are so neither computed nor kept.
    """
    for start in range(0, T, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, T)
        yield slice(start, end), slice(0, num_keys - T + end)


def mask_future(att: np.ndarray) -> None:
    """Set to -inf, in place, each score of a query for a later token: att (..., queries, keys).

    The queries are the last of the keys' tokens, so later tokens lie above the diagonal of the last, square part. A
    finite number in place of -inf would be a bet that no score is ever as low.
    """
    rows = att.shape[-2]
    np.copyto(att[..., -rows:], -np.inf, where=np.triu(np.ones((rows, rows), bool), k=1))


def attention_forward(
    x: np.ndarray,
    params: Params,
    n_head: int,
    dropout: float = 0.0,
    rngs: Sequence[np.random.Generator] | None = None,
    past: tuple[np.ndarray, np.ndarray, int] | None = None,
) -> tuple[np.ndarray, Cache]:
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): x (B, T, C) -> (B, T, C).

    In each of nh heads, every token compares its query with the keys of the tokens up to itself, and takes the average
    of their values, weighted by softmax(query . key / sqrt(hs)): each head can look for something else. The sqrt undoes
    the growth of such products with hs. One linear layer makes all queries, keys and values; another mixes the heads.

    params: c_attn.weight (3C, C) and .bias (3C,), c_proj.weight (C, C) and .bias (C,), or no biases
    dropout, rngs: as dropout_forward's p and rngs
    past: for generation only. (keys, values, start): two arrays (B, nh, block_size, hs) that hold the first `start`
        tokens' keys and values. The T tokens of x come after those; their own keys and values are written in behind.
    """
    B, T, C = x.shape
    hs = C // n_head
    qkv, qkv_cache = linear_forward(x, params["c_attn.weight"], params.get("c_attn.bias"))
    q, k, v = qkv.reshape(B, T, 3, n_head, hs).transpose(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    if past is not None:
        keys, values, start = past
        keys[:, :, start : start + T], values[:, :, start : start + T] = k, v
        k, v = keys[:, :, : start + T], values[:, :, : start + T]

    y = np.empty((B, T, n_head, hs), x.dtype)
    heads = y.swapaxes(1, 2)  # the same memory, seen as (B, nh, T, hs)
    block_caches = []
    for rows, seen in causal_blocks(T, k.shape[2]):
        att = q[:, :, rows] @ k[:, :, seen].swapaxes(-1, -2)  # (B, nh, rows, seen)
        att *= 1 / math.sqrt(hs)
        mask_future(att)
        probs = softmax_forward(att)  # in place of att
        dropped, scale = dropout_forward(probs, dropout, rngs)
        heads[:, :, rows] = dropped @ v[:, :, seen]
        block_caches.append((rows, seen, probs, dropped, scale))

    out, proj_cache = linear_forward(y.reshape(B, T, C), params["c_proj.weight"], params.get("c_proj.bias"))
    out, out_scale = dropout_forward(out, dropout, rngs)
    return out, (qkv_cache, q, k, v, block_caches, proj_cache, out_scale)


def attention_backward(dout: np.ndarray, cache: Cache) -> tuple[np.ndarray, Params]:
    """dout (B, T, C) -> dx (B, T, C), the parameters' gradients (None for no bias). The forward's lines in reverse.

    The mask needs no line here: a masked score has probability 0, and softmax's backward multiplies by that. q, k and v
    each stand in one matrix product, so each gets the linear layer's rule.
    """
    qkv_cache, q, k, v, block_caches, proj_cache, out_scale = cache
    B, n_head, T, hs = q.shape
    grads: Params = {}
    dout = dropout_backward(dout, out_scale)
    dy, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dout, proj_cache)
    dheads = dy.reshape(B, T, n_head, hs).swapaxes(1, 2)

    dqkv = np.zeros((B, T, 3, n_head, hs), dy.dtype)
    dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)  # views, each (B, nh, T, hs): what they get lands in dqkv
    for rows, seen, probs, dropped, scale in reversed(block_caches):
        # heads = dropped @ v. Several blocks see one key, so dk and dv add up; a query is in one block only.
        ddropped = dheads[:, :, rows] @ v[:, :, seen].swapaxes(-1, -2)
        dv[:, :, seen] += dropped.swapaxes(-1, -2) @ dheads[:, :, rows]
        dprobs = dropout_backward(ddropped, scale)
        datt = softmax_backward(dprobs, probs)
        # att = q @ k.T / sqrt(hs)
        datt *= 1 / math.sqrt(hs)
        dq[:, :, rows] = datt @ k[:, :, seen]
        dk[:, :, seen] += datt.swapaxes(-1, -2) @ q[:, :, rows]

    dqkv = dqkv.reshape(B, T, 3 * n_head * hs)
    dx, grads["c_attn.weight"], grads["c_attn.bias"] = linear_backward(dqkv, qkv_cache)
    return dx, grads


def mlp_forward(
    x: np.ndarray, params: Params, dropout: float = 0.0, rngs: Sequence[np.random.Generator] | None = None
) -> tuple[np.ndarray, Cache]:
    """Two linear layers with a GELU between them, four times as wide inside, on each token alone: (B, T, C) -> same.

    params: c_fc.weight (4C, C) and .bias (4C,), c_proj.weight (C, 4C) and .bias (C,), or no biases
    """
    hidden, fc_cache = linear_forward(x, params["c_fc.weight"], params.get("c_fc.bias"))  # (B, T, 4C)
    hidden, gelu_cache = gelu_forward(hidden)
    out, proj_cache = linear_forward(hidden, params["c_proj.weight"], params.get("c_proj.bias"))
    out, out_scale = dropout_forward(out, dropout, rngs)
    return out, (fc_cache, gelu_cache, proj_cache, out_scale)


def mlp_backward(dout: np.ndarray, cache: Cache) -> tuple[np.ndarray, Params]:
    """dout (B, T, C) -> dx (B, T, C), the parameters' gradients (None for no bias): the forward's calls in reverse."""
    fc_cache, gelu_cache, proj_cache, out_scale = cache
    grads: Params = {}
    dout = dropout_backward(dout, out_scale)
    dhidden, grads["c_proj.weight"], grads["c_proj.bias"] = linear_backward(dout, proj_cache)
    dhidden = gelu_backward(dhidden, gelu_cache)
    dx, grads["c_fc.weight"], grads["c_fc.bias"] = linear_backward(dhidden, fc_cache)
    return dx, grads


def block_forward(
    x: np.ndarray,
    params: Params,
    n_head: int,
    dropout: float = 0.0,
    rngs: Sequence[np.random.Generator] | None = None,
    past: tuple[np.ndarray, np.ndarray, int] | None = None,
) -> tuple[np.ndarray, Cache]:
    """One transformer block, (B, T, C) -> (B, T, C): each branch reads the residual stream x and adds to it.

    params holds the block's parameters by their names within the block; past is explained at attention_forward.
    """
    branch, ln_1_cache = layernorm_forward(x, params["ln_1.weight"], params.get("ln_1.bias"))
    branch, attn_cache = attention_forward(branch, within(params, "attn."), n_head, dropout, rngs, past)
    x = x + branch
    branch, ln_2_cache = layernorm_forward(x, params["ln_2.weight"], params.get("ln_2.bias"))
    branch, mlp_cache = mlp_forward(branch, within(params, "mlp."), dropout, rngs)
    x = x + branch
    return x, (ln_1_cache, attn_cache, ln_2_cache, mlp_cache)


def block_backward(dx: np.ndarray, cache: Cache) -> tuple[np.ndarray, Params]:
    """dx (B, T, C) of the output -> dx (B, T, C) of the input, the parameters' gradients (None for no bias).

    A sum hands its gradient to both sides: to the branch, and unchanged around it. So each branch's gradient is
    *added* to the stream's own.
    """
    ln_1_cache, attn_cache, ln_2_cache, mlp_cache = cache
    grads: Params = {}
    dbranch, mlp_grads = mlp_backward(dx, mlp_cache)
    dbranch, grads["ln_2.weight"], grads["ln_2.bias"] = layernorm_backward(dbranch, ln_2_cache)
    dx = dx + dbranch
    dbranch, attn_grads = attention_backward(dx, attn_cache)
    dbranch, grads["ln_1.weight"], grads["ln_1.bias"] = layernorm_backward(dbranch, ln_1_cache)
    dx = dx + dbranch
    grads |= {"mlp." + name: grad for name, grad in mlp_grads.items()}
    grads |= {"attn." + name: grad for name, grad in attn_grads.items()}
    return dx, grads


def cross_entropy_forward(logits: np.ndarray, targets: np.ndarray, count: int) -> tuple[np.floating, Cache]:
    """The mean surprise at the true next tokens: logits (B, T, V), targets (B, T) -> sum of -log p(target) / count.

    p is softmax(logits), log the natural one, so the unit is the nat. Targets of -1 are ignored; count is the number of
    the others. If these sequences are part of a larger batch, count is the whole batch's: then the losses of its parts,
    and the gradients, simply add up.
    """
    rows, keep = logits.reshape(-1, logits.shape[-1]), targets.ravel() >= 0
    shifted = rows - rows.max(axis=-1, keepdims=True)
    safe = np.where(keep, targets.ravel(), 0)  # any valid id in place of -1: [keep] throws those rows away
    at_target = np.take_along_axis(shifted, safe[:, None], axis=-1)[:, 0]
    log_sum = np.log(np.exp(shifted).sum(axis=-1))  # log softmax = shifted - log_sum
    loss = (log_sum - at_target)[keep].sum() / count
    return loss.astype(logits.dtype), (logits, targets, count)


def cross_entropy_backward(cache: Cache) -> np.ndarray:
    """dlogits (B, T, V) of the loss itself.

    -log p(target) = log(sum_j exp(logits[j])) - logits[target], whose derivative is softmax(logits), less 1 at the
    target. This is the one place where the mean's division by count enters the gradients. The softmax is computed here,
    not in the forward, which evaluation uses alone.
    """
    logits, targets, count = cache
    dlogits = softmax_forward(logits.reshape(-1, logits.shape[-1]).copy())
    keep = targets.ravel() >= 0
    dlogits[np.flatnonzero(keep), targets.ravel()[keep]] -= 1
    dlogits[~keep] = 0
    dlogits /= count
    return dlogits.reshape(logits.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class GPT:
    """The whole model: `params` maps each name to its array, and everything else is computed from these.

    config: the sizes
    params: the weights, checked against the config; without them they are drawn from `seed`. They are copied, so that
        no two models share weights by accident; but a read-only array (a file mapped into memory) stays where it is.
    dtype: float32 or float64, of drawn weights; given ones get the wider of this and their own
    threads: into how many parts forward and loss_and_grads cut a batch, each computed by a thread of its own. NumPy
        lets go of Python's lock while it computes, so the parts run side by side: data parallelism, on one machine.
        It pays when the BLAS is told to use one thread itself. It changes nothing but the order in which the parts'
        gradients are added, so their rounding.

    Making one tunes the process for speed: its memory allocator (keep_freed_memory) and, for several threads, how soon
    Python switches between them.

    Raises ValueError that names the wrong argument, or the parameter that is missing, unknown or has a wrong shape,
    dtype or entry.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: Params | None = None,
        *,
        seed: int = 1337,
        dtype: type = np.float32,
        threads: int = 1,
    ) -> None:
        if (name := getattr(dtype, "__name__", str(dtype))) not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {name}")
        if not is_integer(threads) or threads < 1:
            raise ValueError(f"threads must be an integer of at least 1, got {threads!r}")
        keep_freed_memory()
        if threads > 1:
            # A thread back from the BLAS may find Python's lock taken: it shall insist before the usual 5 ms are over.
            sys.setswitchinterval(1e-4)
        self.config, self.threads = config, threads
        if params is None:
            self.params = init_params(config, seed, dtype)
        else:
            self.params = check_params(config, params, dtype)

    def num_params(self) -> int:
        """How many numbers are learnt. The head adds none: it is wte.weight."""
        return sum(param.size for param in self.params.values())

    def forward(
        self, idx: np.ndarray, targets: np.ndarray | None = None, *, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.floating | None]:
        """idx (B, T) integers, targets (B, T) integers or None -> logits (B, T, V), mean loss in nats or None.

        Dropout is on when there is a generator to draw it from. Raises ValueError on bad ids, targets or weights.
        """
        idx, targets, count = check_batch(self.config, idx, targets)
        rngs = row_generators(rng, len(idx))
        parts = in_parts(lambda rows: self._logits(idx[rows], rngs and rngs[rows])[0], len(idx), self.threads)
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        loss = None if targets is None else cross_entropy_forward(logits, targets, count)[0]
        return logits, loss

    def loss_and_grads(
        self,
        idx: np.ndarray,
        targets: np.ndarray,
        *,
        rng: np.random.Generator | None = None,
        count: int | None = None,
    ) -> tuple[np.floating, Params]:
        """idx, targets (B, T) integers -> mean loss in nats, {name: gradient} with the names and shapes of params.

        count: what to divide by, if (idx, targets) is one part of a larger batch: the number of targets that are not
        -1 in all of it. Losses and gradients of the parts then add up to those of the whole batch; and as dropout is
        drawn sequence by sequence, parts that share one rng also drop what the whole batch would.

        Raises ValueError as forward does, and on a bad count.
        """
        if targets is None:
            raise ValueError("targets must be an array of token ids, got None")
        idx, targets, own_count = check_batch(self.config, idx, targets, allow_no_target=count is not None)
        if count is None:
            count = own_count
        elif not is_integer(count) or count < max(own_count, 1):
            raise ValueError(f"count must be an integer of at least {max(own_count, 1)}, got {count!r}")
        rngs = row_generators(rng, len(idx))

        def loss_and_grads_of(rows: slice) -> tuple[np.floating, Params]:
            logits, caches = self._logits(idx[rows], rngs and rngs[rows], keep_caches=True)
            loss, loss_cache = cross_entropy_forward(logits, targets[rows], count)
            dlogits = cross_entropy_backward(loss_cache)
            del logits, loss_cache  # with a large vocabulary, most of the memory
            return loss, self._backward(dlogits, caches)

        (loss, grads), *others = in_parts(loss_and_grads_of, len(idx), self.threads)
        for part_loss, part_grads in others:
            loss += part_loss
            for name, grad in grads.items():
                grad += part_grads[name]
        return loss, grads

    def _logits(
        self,
        idx: np.ndarray,
        rngs: Sequence[np.random.Generator] | None,
        pasts: Sequence[tuple[np.ndarray, np.ndarray, int]] | None = None,
        keep_caches: bool = False,
    ) -> tuple[np.ndarray, list[Cache]]:
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) with pasts, and the caches of all layers in forward order.

        Only with keep_caches do the blocks' caches stay; without, each is freed as soon as the next block has run.
        """
        config, params = self.config, self.params
        start = 0 if pasts is None else pasts[0][2]  # the first token's position, the same in every layer
        x, embedding_cache = embedding_forward(idx, params["wte.weight"], params["wpe.weight"][start:])
        x, scale = dropout_forward(x, config.dropout, rngs)
        caches: list[Cache] = [(embedding_cache, scale)]
        for i in range(config.n_layer):
            past = None if pasts is None else pasts[i]
            x, cache = block_forward(x, within(params, f"h.{i}."), config.n_head, config.dropout, rngs, past)
            if keep_caches:
                caches.append(cache)
        if pasts is not None:
            x = x[:, -1:]  # whoever continues a text needs the logits after its last token only
        x, ln_f_cache = layernorm_forward(x, params["ln_f.weight"], params.get("ln_f.bias"))
        logits, head_cache = linear_forward(x, params["wte.weight"], None)  # the tied head: wte once more
        check_finite(logits, params)
        return logits, [*caches, ln_f_cache, head_cache]

    def _backward(self, dlogits: np.ndarray, caches: list[Cache]) -> Params:
        """dlogits (B, T, V), all caches of _logits -> {name: gradient}: the lines of _logits in reverse.

        Takes each cache off the list, so that its memory is free as soon as it has served.
        """
        grads: Params = {}
        dx, dwte, _ = linear_backward(dlogits, caches.pop())
        dx, grads["ln_f.weight"], grads["ln_f.bias"] = layernorm_backward(dx, caches.pop())
        for i in reversed(range(self.config.n_layer)):
            dx, block_grads = block_backward(dx, caches.pop())
            grads |= {f"h.{i}.{name}": grad for name, grad in block_grads.items()}
        embedding_cache, scale = caches.pop()
        dx = dropout_backward(dx, scale)
        grads["wte.weight"], grads["wpe.weight"] = embedding_backward(dx, embedding_cache)
        grads["wte.weight"] += dwte  # wte is used twice, as the embedding and as the head: its gradients add
        return {name: grads[name] for name in self.params}  # in the order of params, without the Nones

    def generate(
        self,
        idx: np.ndarray,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens) int64.

        The other arguments, and the errors raised, are those of `stream`.
        """
        check_count("max_new_tokens", max_new_tokens)
        stream = self.stream(idx, temperature=temperature, top_k=top_k, rng=rng)
        new = [next(stream) for _ in range(max_new_tokens)]
        return np.concatenate([np.asarray(idx, np.int64), *(tokens[:, None] for tokens in new)], axis=1)

    def stream(
        self,
        idx: np.ndarray,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[np.ndarray]:
        """Continue each row of idx (B, T), T >= 1, without end: yields the next tokens (B,) int64, one step at a time.

        temperature: divides the logits; below 1 the likely get likelier, 0 takes the likeliest token and draws nothing
        top_k: leaves only the k likeliest tokens, and all that tie with the k-th; None or more than V leaves all
        rng: gives one uniform number for each row and token; None: a new generator with an arbitrary seed

        Raises ValueError on ids outside [0, V), temperature below 0 or not finite, top_k below 1, weights not finite.
        """
        idx = check_ids("idx", idx, 0, self.config.vocab_size)
        check_sampling(temperature, top_k)
        return self._stream(idx, temperature, top_k, np.random.default_rng() if rng is None else rng)

    def _stream(
        self, idx: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """The loop behind `stream`: the first step computes the whole prompt, each further one a single token.

        A token's keys and values depend on nothing after it, so they are kept: in `kept`, those of the window's first
        `start` tokens. Once the text outgrows the window, every step moves every token to another position; what was
        kept is void (start = 0), and the whole window is computed anew.
        """
        config, B = self.config, len(idx)
        kept_shape = (config.n_layer, 2, B, config.n_head, config.block_size, config.n_embd // config.n_head)
        kept, start = np.empty(kept_shape, self.params["wte.weight"].dtype), 0
        window = idx[:, -config.block_size :]
        while True:
            pasts = [(keys, values, start) for keys, values in kept]
            logits, _ = self._logits(window[:, start:], None, pasts)
            tokens = sample(logits[:, -1], temperature, top_k, rng)
            yield tokens
            start = window.shape[1]
            window = np.concatenate([window, tokens[:, None]], axis=1)
            if window.shape[1] > config.block_size:
                window, start = window[:, 1:], 0


def sample(logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draw one token a row by inverting the cumulative distribution: logits (B, V) -> (B,) int64.

    In float64 whatever the model's dtype, so that two engines whose logits agree draw the same token.
    """
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits.astype(np.float64)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits[logits < kth] = -np.inf
    # The maximum goes first, so that a tiny temperature makes the others -inf and not the largest one inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    cdf = np.exp(scaled).cumsum(axis=-1)
    total = cdf[:, -1:]
    # u < 1, but u * total may round up to the total, which no cdf exceeds.
    threshold = np.minimum(rng.random(len(logits))[:, None] * total, np.nextafter(total, 0))
    return (cdf > threshold).argmax(axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# How GPT runs: random numbers, threads, memory. Nothing here is needed to understand the model


def row_generators(rng: np.random.Generator | None, B: int) -> list[np.random.Generator] | None:
    """One generator for each of B sequences, seeded from rng in order: at once or in parts, they drop the same."""
    return None if rng is None else [np.random.default_rng(seed) for seed in rng.integers(2**63, size=B)]


def in_parts(function: Callable[[slice], object], length: int, threads: int) -> list:
    """Cut range(length) into slices, one for each thread but none empty -> [function(slice), ...].

    The first slice is computed in the calling thread, each other in a new one.
    """
    n = min(threads, length)
    parts = [slice(length * i // n, length * (i + 1) // n) for i in range(n)]
    if n == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(n - 1) as pool:
        others = pool.map(function, parts[1:])  # they start now
        return [function(parts[0]), *others]


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed arrays for the next ones, in place of handing it back at once.

    By default glibc, Linux's, takes every large array from the system as fresh pages, and their first touch costs
    a good part of a small training step. The two settings are: no page mappings of their own for large arrays, and
    nothing handed back below 2 GB. They hold for the whole process. Other systems' libraries are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the names and numbers of <malloc.h>
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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

    m and v are running means of the gradient and of its square, t counts the steps. With m and v corrected as below,
    param -= lr (m / (sqrt(v) + eps) + weight_decay param): a weight moves by about lr, however large its gradients are.
    As in PyTorch, lr scales the decay too. Only matrices decay; biases and LayerNorm gains, of one dimension, do not.

    params: the arrays to learn, which must be writable
    betas: how much of the running means of the gradient and of its square stays at each step, two numbers in [0, 1)
    eps: keeps the division finite where a gradient is 0, above 0
    weight_decay: at least 0

    Raises ValueError that names the argument or the parameter.
    """

    def __init__(
        self,
        params: Params,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay!r}")
        for name, param in params.items():
            if not param.flags.writeable:
                raise ValueError(f"{name} must be writable to be learned, got a read-only array: copy it first")
        self.params, self.betas, self.eps, self.weight_decay = params, betas, eps, weight_decay
        self.m = {name: np.zeros_like(param) for name, param in params.items()}
        self.v = {name: np.zeros_like(param) for name, param in params.items()}
        self.t = 0

    def step(self, grads: Params, lr: float) -> None:
        """One update with learning rate lr, all of it in place.

        Raises ValueError if grads does not have exactly the names and shapes of params; then nothing has changed.
        """
        if grads.keys() != self.params.keys():
            wrong = sorted(grads.keys() ^ self.params.keys())
            raise ValueError(f"grads must have the names of params; missing or unknown: {', '.join(wrong)}")
        for name, param in self.params.items():
            if grads[name].shape != param.shape:
                raise ValueError(f"the gradient of {name} must have shape {param.shape}, got {grads[name].shape}")
        self.t += 1
        beta1, beta2 = self.betas
        # m and v start at 0 and are too small at first, by exactly these factors (Kingma & Ba 2015, section 3).
        correction1, correction2 = 1 - beta1**self.t, 1 - beta2**self.t
        for name, param in self.params.items():
            grad, m, v = grads[name], self.m[name], self.v[name]
            m *= beta1
            m += (1 - beta1) * grad
            square = grad * grad
            square *= 1 - beta2
            v *= beta2
            v += square
            denominator = np.sqrt(v, out=square)
            denominator /= math.sqrt(correction2)
            denominator += self.eps
            update = m / denominator
            update *= lr / correction1
            if param.ndim >= 2:
                param *= 1 - lr * self.weight_decay
            param -= update


# ---------------------------------------------------------------------------------------------------------------------
# What comes in from outside is checked here; torchgpt.py calls the same checks, so both engines say the same


def is_integer(value: object) -> bool:
    """True for Python's and NumPy's integers, but not for booleans."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless value is an integer of at least 0."""
    if not is_integer(value) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def check_ids(name: str, ids: np.ndarray, low: int, vocab_size: int) -> np.ndarray:
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
    config: GPTConfig, idx: np.ndarray, targets: np.ndarray | None, allow_no_target: bool = False
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """idx, targets (B, T) -> both as int64, and how many targets are not -1. Raises ValueError."""
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


def check_finite(logits: np.ndarray, params: Params) -> None:
    """Raises ValueError if a logit is NaN or infinite; the message names the first parameter that is, if one is."""
    if not np.isfinite(logits).all():
        broken = next((name for name, param in params.items() if not np.isfinite(param).all()), None)
        came = (
            "finite weights too large for their dtype" if broken is None else f"{broken} with NaN or infinite entries"
        )
        raise ValueError(f"logits must be finite, got {came}")


def check_params(config: GPTConfig, params: Params, dtype: type) -> Params:
    """The params in the order of the config, copied unless read-only. Raises ValueError that names a bad one."""
    shapes = param_shapes(config)
    for name in [*shapes, *params]:
        if name not in params or name not in shapes:
            raise ValueError(
                f"{name} is {'missing from' if name in shapes else 'no parameter of this config, but in'} params"
            )
        if params[name].shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {params[name].shape}")
        if params[name].dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} must be float32 or float64, got {params[name].dtype}")
        if not np.isfinite(params[name]).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    dtype = np.result_type(dtype, *params.values())
    # copy=None copies only what has to change its dtype
    return {name: np.array(params[name], dtype, copy=params[name].flags.writeable or None) for name in shapes}
