"""One short text, followed through both engines: every tensor, forward and then backward, side by side.

    python -m learn.trace "To be, or"
    python -m learn.trace "To be, or" | grep -F h.0.attn
    python -m learn.trace "ROMEO: O, she" --run runs/numpy-small

The table that you want when you port a model: each line is one tensor, with its name in numpygpt.py, its shape, some of
its numbers, and how far the two engines are apart at the worst of all its entries. The first line that differs is where
to look.

The numbers are those of one token, the fourth, in the first head. The small model has 4 channels, and the fourth token
sees 4 tokens, so a line shows all of x and all weights of attention: with them LayerNorm, the softmax, GELU and the
residual stream can be computed by hand. Of a parameter's gradient the first numbers are shown.

Without a run the model is a small fresh one (2 layers, 2 heads, 4 channels), whose vocabulary is the characters of the
text; numpygpt.init_params draws its weights. The text without its last token goes in, and the text without its first
one is the target. There is no dropout.

Neither model is changed for this. In numpygpt the functions are wrapped while the trace is taken; in torchgpt a
TorchFunctionMode sees every call of PyTorch, and tensor hooks see the gradients. A tensor is recognised by the
parameter that it meets: what a linear layer does with h.0.attn.c_attn.weight is h.0.attn.qkv.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

import numpygpt
from common.cli import parse, run_program
from common.errors import UserError
from data.text import normalize_text
from data.tokenizers import CharTokenizer, Tokenizer
from numpygpt import GPTConfig, Params
from training.run import load_run

if TYPE_CHECKING:
    from torch import Tensor

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 4}  # of the model without a run
TOKEN, SHOWN = 3, 5  # which token's numbers are printed, and how many

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Options:
    """Follow one short text through both engines, forward and backward."""

    text: tyro.conf.Positional[str] = "To be, or"  # at least two tokens
    run: Path | None = None  # take the model of this run, instead of a small fresh one
    seed: int = 1337  # of the fresh model's weights
    dtype: Literal["float32", "float64"] = "float64"  # that both engines compute in


@dataclass(frozen=True)
class Trace:
    """What one engine computed, each as {name: array}."""

    forward: Arrays = field(default_factory=dict)  # activations
    backward: Arrays = field(default_factory=dict)  # their gradients, by the activations' names
    grads: Arrays = field(default_factory=dict)  # the parameters' gradients


# ---------------------------------------------------------------------------------------------------------------------
# Names. An activation is called as in numpygpt.py, after the path of the module that computes it; where a variable is
# assigned twice, the step is added. Its gradient has a d before the variable.


def activation_names(config: GPTConfig) -> list[str]:
    """All traced activations, in the order of the forward pass."""
    names = ["x (embedding)"]
    for i in range(config.n_layer):
        attention = [f"attn.{name}" for name in ("qkv", "q", "k", "v", "att", "probs", "y", "out")]
        mlp = ["mlp.hidden (c_fc)", "mlp.hidden (gelu)", "mlp.out"]
        block = ["branch (ln_1)", *attention, "x (attn added)", "branch (ln_2)", *mlp, "x (mlp added)"]
        names += [f"h.{i}.{name}" for name in block]
    return [*names, "x (ln_f)", "logits", "loss"]


def gradient_name(name: str) -> str:
    """h.0.attn.qkv -> h.0.attn.dqkv"""
    before, _, step = name.partition(" ")
    path, dot, variable = before.rpartition(".")
    return f"{path}{dot}d{variable} {step}".rstrip()


def names_around(layer: str, config: GPTConfig) -> tuple[str, str]:
    """What goes into a LayerNorm or linear layer, named as its parameters are, and what comes out of it."""
    last = f"h.{config.n_layer - 1}."
    if layer in ("ln_f", "wte"):
        return {"ln_f": (f"{last}x (mlp added)", "x (ln_f)"), "wte": ("x (ln_f)", "logits")}[layer]
    _, i, part = layer.split(".", 2)
    block = f"h.{i}."
    if part == "ln_1":
        return "x (embedding)" if i == "0" else f"h.{int(i) - 1}.x (mlp added)", f"{block}branch (ln_1)"
    goes_in, comes_out = {
        "attn.c_attn": ("branch (ln_1)", "attn.qkv"),
        "attn.c_proj": ("attn.y", "attn.out"),
        "ln_2": ("x (attn added)", "branch (ln_2)"),
        "mlp.c_fc": ("branch (ln_2)", "mlp.hidden (c_fc)"),
        "mlp.c_proj": ("mlp.hidden (gelu)", "mlp.out"),
    }[part]
    return block + goes_in, block + comes_out


# ---------------------------------------------------------------------------------------------------------------------
# The two recorders


class NumpyRecorder:
    """Stands in for numpygpt's functions while one model runs: each method calls the function of its name, and keeps.

    Attention is computed in one tile, so that `att` is one tensor (B, nh, T, T).
    """

    WATCHED: tuple[str, ...] = (
        *("layernorm_forward", "layernorm_backward", "linear_forward", "linear_backward"),
        *("softmax_forward", "softmax_backward", "attention_forward", "attention_backward"),
        *("scaled_dot_product_attention_forward", "block_backward", "cross_entropy_forward"),
    )

    def __init__(self, model: numpygpt.GPT) -> None:
        self.config, self.trace = model.config, Trace()
        self.layers = {id(value): name.removesuffix(".weight") for name, value in model.params.items()}
        self.original = {name: getattr(numpygpt, name) for name in self.WATCHED}
        self.attention = ""  # "h.0.attn." while that is at work: its softmax has no parameter to be recognised by

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, numpygpt calls the methods of this recorder."""
        stand_ins = {name: getattr(self, name) for name in self.WATCHED}
        with mock.patch.multiple(numpygpt, ATTENTION_TILE=self.config.block_size, **stand_ins):
            yield

    def around(self, weight: np.ndarray) -> tuple[str, str]:
        return names_around(self.layers[id(weight)], self.config)

    def keep(self, name: str, value: np.ndarray) -> None:
        self.trace.forward[name] = np.array(value)

    def keep_grad(self, name: str, value: np.ndarray) -> None:
        self.trace.backward[name] = np.array(value)

    def layernorm_forward(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple:
        out, saved = self.original["layernorm_forward"](x, weight, bias)
        goes_in, comes_out = self.around(weight)
        self.keep(goes_in, x)
        self.keep(comes_out, out)
        return out, saved

    def layernorm_backward(self, dout: np.ndarray, saved: tuple) -> tuple:
        dx, dweight, dbias = self.original["layernorm_backward"](dout, saved)
        goes_in, comes_out = self.around(saved[2])
        self.keep_grad(comes_out, dout)
        if comes_out == "x (ln_f)":  # around the others leads the residual stream: their dx is not all of it
            self.keep_grad(goes_in, dx)
        return dx, dweight, dbias

    def linear_forward(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple:
        out, saved = self.original["linear_forward"](x, weight, bias)
        goes_in, comes_out = self.around(weight)
        self.keep(goes_in, x)
        self.keep(comes_out, out)
        return out, saved

    def linear_backward(self, dout: np.ndarray, saved: tuple) -> tuple:
        dx, dweight, dbias = self.original["linear_backward"](dout, saved)
        goes_in, comes_out = self.around(saved[1])
        self.keep_grad(comes_out, dout)
        self.keep_grad(goes_in, dx)
        if comes_out.endswith("attn.qkv"):
            heads = dout.reshape(*dout.shape[:2], 3, self.config.n_head, -1).transpose(2, 0, 3, 1, 4)
            for name, dhead in zip("qkv", heads, strict=True):
                self.keep_grad(self.attention + name, dhead)
        return dx, dweight, dbias

    def softmax_forward(self, x: np.ndarray) -> np.ndarray:
        if not self.attention:  # the cross-entropy's
            return self.original["softmax_forward"](x)
        self.keep(self.attention + "att", x)
        probs = self.original["softmax_forward"](x)
        self.keep(self.attention + "probs", probs)
        return probs

    def softmax_backward(self, dprobs: np.ndarray, probs: np.ndarray) -> np.ndarray:
        datt = self.original["softmax_backward"](dprobs, probs)
        self.keep_grad(self.attention + "probs", dprobs)
        self.keep_grad(self.attention + "att", datt)
        return datt

    def scaled_dot_product_attention_forward(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: object) -> tuple:
        for name, head in {"q": q, "k": k, "v": v}.items():
            self.keep(self.attention + name, head)
        return self.original["scaled_dot_product_attention_forward"](q, k, v, *rest)

    def attention_forward(self, x: np.ndarray, p: Params, *rest: object) -> tuple:
        self.attention = self.layers[id(p["c_attn.weight"])].removesuffix("c_attn")
        result = self.original["attention_forward"](x, p, *rest)
        self.attention = ""
        return result

    def attention_backward(self, dout: np.ndarray, saved: tuple) -> tuple:
        self.attention = self.layers[id(saved[0][1])].removesuffix("c_attn")
        self.keep_grad(self.attention.removesuffix("attn.") + "x (attn added)", dout)
        result = self.original["attention_backward"](dout, saved)
        self.attention = ""
        return result

    def block_backward(self, dx: np.ndarray, saved: tuple) -> tuple:
        dx, grads = self.original["block_backward"](dx, saved)
        goes_in, _ = self.around(saved[0][2])
        self.keep_grad(goes_in, dx)
        return dx, grads

    def cross_entropy_forward(self, logits: np.ndarray, targets: np.ndarray, count: int) -> tuple:
        loss, saved = self.original["cross_entropy_forward"](logits, targets, count)
        self.keep("loss", loss)
        return loss, saved


def trace_numpy(config: GPTConfig, weights: Params, idx: np.ndarray, targets: np.ndarray) -> Trace:
    """numpygpt forward and backward on idx, targets (B, T), in the dtype of the weights."""
    model = numpygpt.GPT(config, weights)
    recorder = NumpyRecorder(model)
    with recorder.watching():
        _, grads = model.loss_and_grads(idx, targets)
    recorder.trace.grads.update(grads)
    return recorder.trace


def trace_torch(config: GPTConfig, weights: Params, idx: np.ndarray, targets: np.ndarray) -> Trace:
    """torchgpt forward and backward, likewise."""
    import torch  # here: learn.pictures traces too, and must run without it
    from torch.overrides import TorchFunctionMode

    import torchgpt

    model = torchgpt.GPT(config, dtype=getattr(torch, weights["wte.weight"].dtype.name), attention="explicit").eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    layers = {id(param): name.removesuffix(".weight") for name, param in model.named_parameters()}
    trace = Trace()

    def keep(name: str, value: "Tensor") -> None:
        trace.forward[name] = value.detach().numpy().copy()
        value.register_hook(lambda grad: trace.backward.update({name: grad.numpy().copy()}))

    class Recorder(TorchFunctionMode):
        """Sees every call of a PyTorch function, and keeps what the layers and attention's own steps take and give."""

        attention = ""

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            if func.__name__ in ("linear", "layer_norm"):
                weight = args[1] if func.__name__ == "linear" else kwargs["weight"]
                goes_in, comes_out = names_around(layers[id(weight)], config)
                keep(goes_in, args[0])
                keep(comes_out, result)
                if comes_out.endswith("qkv"):
                    self.attention = comes_out.removesuffix("qkv")
            elif func.__name__ == "unbind":
                for name, head in zip("qkv", result, strict=True):
                    keep(self.attention + name, head)
            elif func.__name__ == "softmax":
                keep(self.attention + "att", args[0])
                keep(self.attention + "probs", result)
            return result

    with Recorder():
        _, loss = model(torch.from_numpy(idx), torch.from_numpy(targets))
    trace.forward["loss"] = loss.detach().numpy()
    loss.backward()
    trace.grads.update({name: param.grad.numpy() for name, param in model.named_parameters() if param.grad is not None})
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# The table


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b| over all entries; where both are the same infinity it is 0."""
    with np.errstate(invalid="ignore"):
        return float(np.where(a == b, 0.0, np.abs(a - b)).max())


def values_shown(array: np.ndarray, *, of_token: bool) -> str:
    """The first few numbers of an array, or of one token (and head) of it. Adding 0 turns -0 into 0."""
    if of_token and array.ndim >= 3:
        array = array.reshape(-1, *array.shape[-2:])[0]  # (T, C), or the first head's (T, hs) or (T, T)
        array = array[min(TOKEN, len(array) - 1)]
    return "".join(f"{value + 0.0:11.3e}" for value in array.ravel()[:SHOWN])


def table(numpy_trace: Trace, torch_trace: Trace, config: GPTConfig) -> Iterator[str]:
    """The whole table, line by line."""
    names = activation_names(config)
    backward = list(reversed(names[:-1]))  # the loss itself has no gradient worth a line
    parts = {
        "forward": (names, numpy_trace.forward, torch_trace.forward),
        "backward": (backward, numpy_trace.backward, torch_trace.backward),
        "gradients of the parameters": (list(numpy_trace.grads), numpy_trace.grads, torch_trace.grads),
    }
    lines: list[tuple[str, ...]] = [("tensor", "shape", "  numbers", "apart by")]
    apart: dict[str, float] = {}
    for part, (part_names, numpy_arrays, torch_arrays) in parts.items():
        lines += [(), (part,)]
        for name in part_names:
            title, a, b = name if part == "forward" else gradient_name(name), numpy_arrays[name], torch_arrays[name]
            apart[title] = difference(a, b)
            numbers = values_shown(a, of_token=part != "gradients of the parameters")
            lines.append((title, str(a.shape), numbers, f"{apart[title]:8.1e}"))
    widths = [max(map(len, column)) + 2 for column in zip(*(line for line in lines if len(line) > 1), strict=True)]
    for line in lines:
        yield "".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip()
    worst = max(apart, key=apart.__getitem__)
    yield ""
    yield f"{len(apart)} tensors, none of which is further apart than {worst}: {apart[worst]:.1e}"


def example(options: Options) -> tuple[GPTConfig, Params, np.ndarray]:
    """The model that is asked for, its weights in the dtype that is, and the text as ids (T + 1,). Raises UserError."""
    if options.seed < 0:
        raise UserError(f"seed must be at least 0, got {options.seed}")
    text = normalize_text(options.text)
    if len(text) < 2:
        raise UserError(f"text must have at least two tokens, got {text!r}")
    if options.run is None:
        tokenizer: Tokenizer = CharTokenizer.from_text(text)
        config = GPTConfig(tokenizer.vocab_size, len(text) - 1, dropout=0.0, **SIZES)
        weights = numpygpt.init_params(config, options.seed, np.float64)
    else:
        config, weights, tokenizer = load_run(options.run)
    ids = tokenizer.encode(text).astype(np.int64)
    if not 2 <= len(ids) <= config.block_size + 1:
        raise UserError(f"text must have 2 to {config.block_size + 1} tokens for this model, got {len(ids)}")
    return config, {name: value.astype(options.dtype) for name, value in weights.items()}, ids


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m learn.trace", argv)
    config, weights, ids = example(options)
    idx, targets = ids[None, :-1], ids[None, 1:]
    numpy_trace, torch_trace = (trace(config, weights, idx, targets) for trace in (trace_numpy, trace_torch))
    for line in table(numpy_trace, torch_trace, config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
