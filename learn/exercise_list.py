"""The exercises, in the order of numpygpt.py: what to write, what it is tried with, and what should come out."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import numpygpt
from common.errors import UserError
from numpygpt import Array, GPTConfig, Params

Tensors = dict[str, Array]
Outcome = dict[str, Any]  # what came out of a learner's function, by name: arrays, if all is well
Namespace = dict[str, Any]  # the names of a module: numpygpt's, or those of a learner's file

RNG = np.random.default_rng(42)
LABELS = np.array([[0, 1, 1, 2], [3, 1, -1, 0]])  # ids, or targets, of which one is ignored


@dataclass(frozen=True)
class Exercise:
    """One function to write, or two.

    write: the functions that the learner's file leaves empty; Class.method for a method
    shown: those that it shows above them
    hints: a small one, and one that says nearly everything
    run: the names of a module -> what comes out of its functions, by name
    expected: what should come out; by default, what comes out of numpygpt's own
    """

    name: str
    topic: str
    write: tuple[str, ...]
    shown: tuple[str, ...]
    hints: tuple[str, str]
    run: Callable[[Namespace], Outcome]
    expected: Callable[[], Outcome]
    checked_against: str


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape)


def backward_exercise(
    name: str,
    topic: str,
    hint: str,
    more: str,
    tensors: Tensors,
    forward: Callable[[Tensors], tuple[Any, Any]],
    shown: tuple[str, ...] = (),
) -> Exercise:
    """An exercise for a backward, checked with finite differences.

    tensors: what the gradients are taken of. forward: those -> (out, saved). The gradients are in the order of tensors;
    those whose names have a dot come in a dict.
    """
    forward_name = name.replace("_backward", "_forward")
    out = np.asarray(forward(tensors)[0])
    dout = np.ones(()) if out.ndim == 0 else normal(*out.shape)  # of a loss it is 1, and not handed over

    def run(names: Namespace) -> Outcome:
        handed = dout.copy()
        saved = forward(tensors)[1]
        result = names[name](saved) if dout.ndim == 0 else names[name](handed, saved)
        if not np.array_equal(handed, dout):
            raise UserError(f"{name} changes its first argument in place, and the caller may still need it")
        return by_name(name, result, [tensor if "." in tensor else f"d{tensor}" for tensor in tensors])

    def expected() -> Tensors:
        grads = {}
        for tensor, value in tensors.items():
            grad = grads[tensor if "." in tensor else f"d{tensor}"] = np.zeros_like(value)
            for entry in np.ndindex(value.shape):
                losses = []
                for step in (1e-5, -1e-5):
                    moved = value.copy()
                    moved[entry] += step
                    losses.append((forward({**tensors, tensor: moved})[0] * dout).sum())
                grad[entry] = (losses[0] - losses[1]) / 2e-5
        return grads

    against = f"finite differences of {forward_name}"
    return Exercise(name, topic, (name,), (*shown, forward_name), (hint, more), run, expected, against)


def by_name(function: str, result: object, names: list[str]) -> Outcome:
    """What a backward returned, as {name: gradient}. Raises UserError if that is not as many as there are names."""
    values = result if isinstance(result, tuple) else (result,)
    single = [value for value in values if not isinstance(value, dict)]
    expected = [name for name in names if "." not in name]
    if result is None or len(single) != len(expected):
        came = "nothing" if result is None else f"{len(single)} array{'s' * (len(single) != 1)}"
        raise UserError(f"{function} must return {', '.join(expected) or 'a dict of gradients'}, it returns {came}")
    grads = dict(zip(expected, single, strict=True))
    for value in values:
        grads |= value if isinstance(value, dict) else {}
    return {name: grads.get(name) for name in names}


def copy_of_numpygpt() -> Namespace:
    """All names of numpygpt.py, made once more, so that they can be exchanged."""
    names: Namespace = {"__name__": "numpygpt"}
    exec(inspect.getsource(numpygpt), names)
    return names


def reference_exercise(
    name: str,
    topic: str,
    hint: str,
    more: str,
    run: Callable[[Namespace], Outcome],
    write: tuple[str, ...] = (),
    shown: tuple[str, ...] = (),
) -> Exercise:
    """An exercise checked against numpygpt's own function."""
    return Exercise(
        name, topic, write or (name,), shown, (hint, more), run, lambda: run(copy_of_numpygpt()), "numpygpt.py"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the functions are tried with


def random_params(config: GPTConfig) -> Params:
    """Weights with which everything matters, gains and biases too."""
    return {name: 0.5 * normal(*shape) + (len(shape) == 1) for name, shape in numpygpt.param_shapes(config).items()}


def generators() -> list[np.random.Generator]:
    """One for each of two sequences, each of which has been used before."""
    rngs = [np.random.default_rng(seed) for seed in (1, 2)]
    for rng in rngs:
        rng.random(3)
    return rngs


class FixedUniform:
    """Stands for a Generator: its "random" numbers are these, with the ends of [0, 1) among them."""

    def random(self, size: int | tuple[int, ...] = (), dtype: type = np.float64) -> Array:
        return np.resize(np.array([0.0, 0.15, 0.33, 0.38, 0.6, 0.82, 1 - 2**-53]), size)


def run_dropout(names: Namespace) -> Outcome:
    x, dout = np.arange(1.0, 25).reshape(2, 4, 3), np.arange(24.0, 0, -1).reshape(2, 4, 3)
    out, saved = names["dropout_forward"](x, 0.3, generators())
    without, _ = names["dropout_forward"](x, 0.3, None)
    return {"out": out, "dx": names["dropout_backward"](dout, saved), "out (dropout off)": without}


def run_clip(names: Namespace) -> Outcome:
    found: Outcome = {}
    for case, size in {"": 10.0, " (norm below max_norm)": 0.1, " (norm infinite)": np.inf}.items():
        grads = {"a": np.array([[0.3, -0.4], [0.2, size]]), "b": np.array([0.05, -0.06])}
        norm = names["clip_grad_norm"](grads, 2.0)
        found |= {f"norm{case}": norm, f"a{case}": grads["a"], f"b{case}": grads["b"]}
    return found


def run_adamw(names: Namespace) -> Outcome:
    rng = np.random.default_rng(3)
    params = {"w.weight": rng.standard_normal((2, 3)), "gain.weight": rng.standard_normal(3), "w.bias": np.ones(2)}
    optimizer = names["AdamW"](params, eps=1e-2, weight_decay=0.5)
    found: Outcome = {}
    for step, lr in enumerate((0.1, 0.3, 0.2), 1):
        optimizer.step({name: rng.standard_normal(param.shape) for name, param in params.items()}, lr)
        found |= {f"{name} after step {step}": param.copy() for name, param in params.items()}
    return found


def run_sample(names: Namespace) -> Outcome:
    logits = np.tile([1.0, 2.0, 0.5, 2.0, -np.inf, 1.5], (7, 1))
    logits[:, 0] = -np.inf  # the first and the last may not be drawn, whatever u is
    close = np.tile([1.0, 1.0 + 1e-9, 0.0], (7, 1))
    settings = {
        "temperature 1": (logits, 1.0, None),
        "temperature 0.5": (logits, 0.5, None),
        "temperature 0": (logits, 0, None),
        "top_k 1, two tie": (logits, 1.0, 1),
        "top_k 3": (logits, 1.0, 3),
        "top_k above V": (logits, 1.0, 9),
        "top_k 1, nearly a tie": (close, 1.0, 1),
    }
    return {f"tokens ({case})": names["sample"](x.copy(), t, k, FixedUniform()) for case, (x, t, k) in settings.items()}


def run_kv_cache(names: Namespace) -> Outcome:
    found: Outcome = {}
    gpt_forward = names["gpt_forward"]
    for case, length in {"short prompt": 3, "prompt longer than the window": 8}.items():
        computed: list[int] = []

        def counting(idx: Array, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
            computed.append(idx.shape[1])  # noqa: B023
            return gpt_forward(idx, *args, **kwargs)

        names["gpt_forward"] = counting
        model = names["GPT"](CACHED.config, CACHED.params)
        stream = model._stream(PROMPT[:, :length], 1.0, None, np.random.default_rng(5))
        tokens = np.stack([next(stream) for _ in range(7)], axis=1)
        found |= {f"tokens ({case})": tokens, f"how many tokens each step computes ({case})": np.array(computed)}
    return found


X, WEIGHT, BIAS = normal(2, 3, 5), normal(5), normal(5)
SMALL = GPTConfig(vocab_size=4, block_size=4, n_layer=2, n_head=1, n_embd=3, dropout=0.3)
PARAMS = random_params(SMALL)
BLOCK = {"x": normal(2, 3, 3), **numpygpt.select_prefix(PARAMS, "h.0.")}
CACHED = numpygpt.GPT(GPTConfig(7, 6, 2, 2, 8), dtype=np.float64)
CACHED.params = random_params(CACHED.config)
PROMPT = RNG.integers(7, size=(2, 8))


def forward_of_softmax(t: Tensors) -> tuple[Array, Array]:
    probs = numpygpt.softmax_forward(t["x"])
    return probs, probs


LIST = [
    backward_exercise(
        "softmax_backward",
        "softmax",
        "A score raises its own probability and lowers all the others of its row. What is d probs[j] / d x[i]?",
        "d probs[j] / d x[i] = probs[j] ((i == j) - probs[i]). Multiply by dprobs[j] and sum over j, row by row.",
        {"x": X},
        forward_of_softmax,
    ),
    backward_exercise(
        "cross_entropy_backward",
        "cross-entropy",
        "Write -log softmax(logits)[target] as a difference of two terms, and differentiate each.",
        "softmax(logits), minus 1 at the target; rows whose target is -1 are 0; all is divided by count.",
        {"logits": normal(2, 4, 5)},
        lambda t: numpygpt.cross_entropy_forward(t["logits"], LABELS, 7),
        shown=("softmax_forward",),
    ),
    backward_exercise(
        "linear_backward",
        "linear layer",
        "out is a product of two factors: each one's gradient is dout times the other. Let the shapes guide you.",
        "With all tokens as rows: dx = dout @ weight, dweight = dout.T @ x, and dbias sums dout over the rows.",
        {"x": X, "weight": normal(4, 5), "bias": normal(4)},
        lambda t: numpygpt.linear_forward(t["x"], t["weight"], t["bias"]),
    ),
    backward_exercise(
        "layernorm_backward",
        "LayerNorm",
        "First the gain: what is dxhat? Then x acts on xhat in three ways: directly, through mean and variance.",
        "rstd * (dxhat - its mean - xhat * the mean of dxhat * xhat), with means over the channels.",
        {"x": X, "weight": WEIGHT, "bias": BIAS},
        lambda t: numpygpt.layernorm_forward(t["x"], t["weight"], t["bias"]),
    ),
    backward_exercise(
        "gelu_backward",
        "GELU",
        "The product rule on x/2 and 1 + tanh(u), and the chain rule for u. The derivative of tanh is 1 - tanh^2.",
        "dout * (0.5 (1 + tanh) + 0.5 x (1 - tanh^2) du/dx), where du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2).",
        {"x": X},
        lambda t: numpygpt.gelu_forward(t["x"]),
    ),
    backward_exercise(
        "embedding_backward",
        "embedding",
        "A row that was copied to several places gets the sum of their gradients. Which rows are copied?",
        "np.add.at(dwte, idx, dx): dwte[idx] += dx adds only once to a repeated row. dwpe sums over sequences.",
        {"wte": normal(5, 3), "wpe": normal(6, 3)},
        lambda t: numpygpt.embedding_forward(np.maximum(LABELS, 0), t["wte"], t["wpe"]),
    ),
    reference_exercise(
        "dropout",
        "dropout",
        "The mean of the output should be x. So what must the elements that are kept be multiplied by?",
        "Keep an element where rng.random(x.shape[1:], np.float32) >= p; the scale is 1 / (1 - p), both ways.",
        run_dropout,
        ("dropout_forward", "dropout_backward"),
    ),
    backward_exercise(
        "scaled_dot_product_attention_backward",
        "attention",
        "Go backwards through the numbered steps. A product's backward is that of the linear layer.",
        "dweights = dout @ v.T, dv = weights.T @ dout; dropout, softmax; / sqrt(hs); dq and dk as for a product.",
        {"q": normal(2, 2, 4, 3), "k": normal(2, 2, 4, 3), "v": normal(2, 2, 4, 3)},
        lambda t: numpygpt.scaled_dot_product_attention_forward(t["q"], t["k"], t["v"], 0.3, generators()),
        shown=("softmax_backward", "dropout_backward"),
    ),
    backward_exercise(
        "block_backward",
        "residual stream",
        "x + branch(x): two paths lead from x to the sum. What does each hand back?",
        "mlp_backward(dx), then layernorm_backward of that; add the result to dx. The same for attention.",
        BLOCK,
        lambda t: numpygpt.block_forward(t["x"], t, 1, 0.3, generators()),
    ),
    backward_exercise(
        "gpt_backward",
        "the whole model, and the tied head",
        "The forward's lines in reverse. wte was used at both ends of the model.",
        "linear, layernorm, blocks from the last to the first, dropout, embedding; wte's two gradients are added.",
        PARAMS,
        lambda t: numpygpt.gpt_forward(np.maximum(LABELS, 0), t, SMALL, generators()),
    ),
    reference_exercise(
        "clip_grad_norm",
        "clipping",
        "All entries of all tensors are one long vector. How long is it? What factor makes it max_norm long?",
        "norm is the root of the sum of all squares. Multiply by max_norm / (norm + 1e-6) if that is below 1.",
        run_clip,
    ),
    reference_exercise(
        "adamw_step",
        "AdamW",
        "Count the step; move m and v towards the gradient and its square; correct them; decay; update.",
        "m = beta1 m + (1 - beta1) g; m_hat = m / (1 - beta1^t); param -= lr (m_hat / (sqrt(v_hat) + eps) + decay).",
        run_adamw,
        ("AdamW.step",),
        ("AdamW.__init__",),
    ),
    reference_exercise(
        "sample_top_k",
        "sampling",
        "Cut to the top k, divide by the temperature, find where u times the total falls in the cumulative sums.",
        "-inf below the k-th largest (np.partition); cdf = exp(...).cumsum(); the first entry above u * total.",
        run_sample,
        ("sample",),
    ),
    reference_exercise(
        "kv_cache",
        "the key/value cache",
        "Give gpt_forward only the tokens that the cache does not have. When is all that it has out of date?",
        "window[:, start:] is new; then start is the window's length; over block_size, drop one and start = 0.",
        run_kv_cache,
        ("GPT._stream",),
        ("gpt_forward",),
    ),
]
EXERCISES = {exercise.name: exercise for exercise in LIST}
