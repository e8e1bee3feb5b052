"""Write the explorer: a GPT on one page, forward and backward, to step through, to point at, and to change.

    python -m learn.explorer                                               # a small model, trained on the spot
    python -m learn.explorer --prompt "the hat sat" --out page.html
    python -m learn.explorer runs/numpy-tiny --prompt "ROMEO: O" --out page.html

One HTML file that needs nothing else, no network either. All numbers on it are numpygpt's, recorded while it ran, and
the code on it is read from numpygpt.py when the page is written. Only for moving a weight does the page compute: its
model.js is the forward pass once more, in float64.

The small model has one layer, two heads and eight channels. It learns three short sentences in about a second, and its
weights are then rounded to two decimals, so that a weight's number on the page is all of it, and so that every machine
writes the same page.
"""

import ast
import base64
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import numpygpt
from common.cli import parse
from common.errors import UserError
from common.files import write_atomically
from data.tokenizers import CharTokenizer, Tokenizer
from learn.pictures import VISIBLE
from learn.trace import Arrays, gradient_name, names_around, trace_numpy
from numpygpt import GPT, AdamW, GPTConfig, Params
from sample import load_for_sampling

TEXT = "the cat sat on the mat. the rat sat on the hat. the cat ate the rat. "  # what the small model learns, in a loop
PROMPT = "the cat sat"
STEPS, BATCH, LEARNING_RATE = 120, 16, 0.02
MAX_TOKENS = 32  # of the prompt
MAX_PARAMS = 40_000  # each has a weight and a gradient, 11 bytes each
MAX_BYTES = 1_500_000  # of the page


@dataclass(frozen=True)
class Options:
    """Write a page that shows a GPT at work, forward and backward."""

    run: tyro.conf.Positional[Path | None] = None  # show the model of this run; None: a small one, trained on the spot
    prompt: str | None = None  # the text that the model reads; a run needs one
    out: Path = Path("explorer.html")  # where the page goes; a file that is there is replaced


def train_small_model() -> tuple[GPTConfig, Params, CharTokenizer]:
    """A model that has learned TEXT, its weights rounded to two decimals."""
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(tokenizer.vocab_size, block_size=12, n_layer=1, n_head=2, n_embd=8, dropout=0.0)
    model = GPT(config, dtype=np.float64)
    optimizer = AdamW(model.params)
    rng = np.random.default_rng(0)
    ids = tokenizer.encode(TEXT + TEXT).astype(np.int64)
    for step in range(STEPS):
        windows = rng.integers(len(TEXT), size=(BATCH, 1)) + np.arange(config.block_size + 1)
        batch = ids[windows]
        _, grads = model.loss_and_grads(batch[:, :-1], batch[:, 1:])
        optimizer.step(grads, LEARNING_RATE * (1 - step / STEPS))
    return config, {name: np.round(value, 2) + 0.0 for name, value in model.params.items()}, tokenizer  # + 0.0: no -0


# ---------------------------------------------------------------------------------------------------------------------
# The tensors


def record(config: GPTConfig, weights: Params, ids: np.ndarray) -> Arrays:
    """All tensors of both directions for one text ids (T + 1,), by name, without the axis of the batch."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    trace = trace_numpy(config, weights, ids[None, :-1], ids[None, 1:])
    tensors = trace.forward | {gradient_name(name): value for name, value in trace.backward.items()}
    tensors["probs"] = numpygpt.softmax_forward(trace.forward["logits"])
    # What the trace does not keep: LayerNorm's saved activations, and both parts of a gradient that is a sum.
    for layer in [name.removesuffix(".weight") for name in weights if re.search(r"\bln_\w+\.weight", name)]:
        x, out = names_around(layer, config)
        _, saved = numpygpt.layernorm_forward(tensors[x], weights[f"{layer}.weight"], weights.get(f"{layer}.bias"))
        tensors[f"{layer}.xhat"], tensors[f"{layer}.rstd"] = saved[:2]
        tensors[f"{layer}.dx"], _, _ = numpygpt.layernorm_backward(tensors[gradient_name(out)], saved)
    head_saved = tensors["x (ln_f)"], weights["wte.weight"], False
    _, dwte_head, _ = numpygpt.linear_backward(tensors["dlogits"], head_saved)
    grads = {gradient_name(name): value for name, value in trace.grads.items()}
    activations = {name: value[0] if value.ndim else value for name, value in tensors.items()}  # the loss is a number
    return weights | grads | activations | {"wte.dweight (head)": dwte_head}


# ---------------------------------------------------------------------------------------------------------------------
# The steps, and where they stand in numpygpt.py: a place is "function: text ... text", the lines from the first that
# holds the one text to the first after it that holds the other; "function" alone stands for all of it.

BLOCK = """
fork       ln_1         block_forward: ln_1_saved =
                        block_backward: grads["ln_1.weight"] ... dx = dx + dbranch
layernorm  ln_1         layernorm_forward | block_forward: ln_1_saved =
                        layernorm_backward | block_backward: grads["ln_1.weight"]
linear     attn.c_attn  linear_forward | attention_forward: qkv, qkv_saved
                        linear_backward | attention_backward: grads["c_attn.weight"]
split      attn         attention_forward: qkv = qkv.reshape ... q, k, v =
                        attention_backward: dqkv = np.zeros ... dqkv = dqkv.reshape
scores     attn         scaled_dot_product_attention_forward: scores = ... att = np.where
                        scaled_dot_product_attention_backward: dscores = ... dk =
softmax    attn         softmax_forward | scaled_dot_product_attention_forward: probs =
                        softmax_backward | scaled_dot_product_attention_backward: datt =
average    attn         scaled_dot_product_attention_forward: out = weights
                        scaled_dot_product_attention_backward: dweights = ... dprobs =
linear     attn.c_proj  linear_forward | attention_forward: out, proj_saved
                        linear_backward | attention_backward: grads["c_proj.weight"]
add        attn         block_forward: attn_saved = ... x = x + branch
                        block_backward: attn_grads =
fork       ln_2         block_forward: ln_2_saved =
                        block_backward: grads["ln_2.weight"] ... dx = dx + dbranch
layernorm  ln_2         layernorm_forward | block_forward: ln_2_saved =
                        layernorm_backward | block_backward: grads["ln_2.weight"]
linear     mlp.c_fc     linear_forward | mlp_forward: hidden, fc_saved
                        linear_backward | mlp_backward: grads["c_fc.weight"]
gelu       mlp          gelu_forward | mlp_forward: gelu_forward
                        gelu_backward | mlp_backward: gelu_backward
linear     mlp.c_proj   linear_forward | mlp_forward: out, proj_saved
                        linear_backward | mlp_backward: grads["c_proj.weight"]
add        mlp          block_forward: mlp_saved = ... x = x + branch
                        block_backward: mlp_grads =
"""
BEFORE = """
embedding  wte+wpe      embedding_forward: return
                        embedding_backward: np.add.at ... dwpe[:T] | gpt_backward: dwte + dwte_head
"""
AFTER = """
layernorm  ln_f         layernorm_forward | gpt_forward: ln_f_saved =
                        layernorm_backward | gpt_backward: grads["ln_f.weight"]
linear     wte          linear_forward | gpt_forward: logits, head_saved
                        linear_backward | gpt_backward: dwte_head, _
loss       logits       cross_entropy_forward
                        cross_entropy_backward
"""


def steps(config: GPTConfig) -> list[dict]:
    """All steps in the order of the forward pass, as the page gets them."""
    blocks = [(f"h.{i}.", BLOCK) for i in range(config.n_layer)]
    return [step for h, table in (("", BEFORE), *blocks, ("", AFTER)) for step in steps_of(table, h, config)]


def steps_of(table: str, h: str, config: GPTConfig) -> Iterator[dict]:
    """The steps of one of the tables above, in the block whose parameters' names begin with h."""
    lines = table.strip().splitlines()
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        kind, part, forward = first.split(maxsplit=2)
        yield {
            "kind": kind,
            "part": h + part,
            "tensors": tensors_of(kind, h + part, h, config),
            "forward": [locate(place) for place in forward.split(" | ")],
            "backward": [locate(place) for place in second.strip().split(" | ")],
        }


def tensors_of(kind: str, part: str, h: str, config: GPTConfig) -> dict[str, str]:
    """The tensors of a step, by the names that they have in its function. Of a gradient only if it needs a name."""
    if kind == "embedding":
        return {"x": "x (embedding)", "wte": "wte.weight", "wpe": "wpe.weight", "head": "wte.dweight (head)"}
    if kind in ("layernorm", "linear"):
        x, out = names_around(part, config)
        tensors = {"x": x, "out": out, "weight": f"{part}.weight", "bias": f"{part}.bias"}
        if kind == "layernorm":
            return tensors | {"xhat": f"{part}.xhat", "rstd": f"{part}.rstd", "dx": gradient_name(f"{part}.x")}
        return tensors | ({"dweight": "wte.dweight (head)"} if part == "wte" else {})
    if kind == "fork":
        x, _ = names_around(part, config)
        branch = "attn" if part.endswith("ln_1") else "mlp"
        return {"x": x, "sum": f"{h}x ({branch} added)", "dbranch": gradient_name(f"{part}.x")}
    if kind == "add":
        x, _ = names_around(h + ("ln_1" if part.endswith("attn") else "ln_2"), config)
        return {"x": x, "branch": f"{part}.out", "sum": f"{h}x ({part.removeprefix(h)} added)"}
    if kind == "gelu":
        return {"x": f"{part}.hidden (c_fc)", "out": f"{part}.hidden (gelu)"}
    if kind == "loss":
        return {"logits": "logits", "probs": "probs", "loss": "loss"}
    return {name: f"{part}.{name}" for name in ("qkv", "q", "k", "v", "att", "probs", "y")}


def locate(place: str) -> dict:
    """A place in numpygpt.py -> its function, and its first and last line. Raises ValueError if it isn't there."""
    name, _, texts = place.partition(": ")
    first, _, last = texts.partition(" ... ")
    _, code = source(name)
    start = next((number for number, line in code if first in line), 0)
    end = next((number for number, line in code if number >= start and last in line), 0) if last else start
    if not (start and end):
        raise ValueError(f"numpygpt.py has no such lines: {place}")
    return {"function": name, "first": start, "last": end if texts else code[-1][0]}


@functools.cache
def source(name: str) -> tuple[str, list[tuple[int, str]]]:
    """The first two paragraphs of a function's docstring, and its other lines, each with its number in numpygpt.py."""
    function = getattr(numpygpt, name)
    lines, start = inspect.getsourcelines(function)
    docstring = ast.parse("".join(lines)).body[0].body[0]  # type: ignore[attr-defined]
    numbered = list(enumerate((line.rstrip("\n") for line in lines), start))
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return " ".join(paragraphs[:2]), numbered[: docstring.lineno - 1] + numbered[docstring.end_lineno :]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_page(config: GPTConfig, weights: Params, tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The page as HTML, for the text ids (T + 1,)."""
    all_steps = steps(config)
    functions = {place["function"] for step in all_steps for place in (*step["forward"], *step["backward"])}
    tokens = [tokenizer.decode([token]) for token in range(config.vocab_size)]
    data = {
        "config": asdict(config),
        "tokens": ["".join(VISIBLE.get(char, char) for char in token) for token in tokens],
        "idx": ids[:-1].tolist(),
        "targets": ids[1:].tolist(),
        "functions": {name: source(name) for name in sorted(functions)},
        "steps": all_steps,
    }
    parts = {"data": as_json(data), "tensors": as_json(record(config, weights, ids), encode)}
    folder = Path(__file__).parent
    for file in ("page.css", "model.js", "steps.js", "page.js"):
        parts[file] = (folder / file).read_text(encoding="utf-8")
    html = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([a-z.]+)\}\}", lambda match: parts[match[1]], html)


def as_json(fields: dict[str, Any], encoder: Callable[[Any], object] = lambda value: value) -> str:
    """A JSON object with a line for each field, that can stand inside a <script>."""
    lines = [f"{json.dumps(name)}: {json.dumps(encoder(value), ensure_ascii=False)}" for name, value in fields.items()]
    return ("{\n" + ",\n".join(lines) + "\n}").replace("<", "\\u003c")


def encode(array: np.ndarray) -> dict:
    """The shape, and all bits of the float64 entries, in base64."""
    return {"shape": array.shape, "base64": base64.b64encode(array.astype("<f8").tobytes()).decode("ascii")}


def load_subject(run: Path | None, prompt: str | None) -> tuple[GPTConfig, Params, Tokenizer, np.ndarray]:
    """What the page shows: a model, and the ids (T + 1,) of a text. Raises UserError if it cannot."""
    if run is not None and prompt is None:
        raise UserError(f"--prompt must be given with a run: the text that the model of {run} is to read")
    config, weights, tokenizer = train_small_model() if run is None else load_for_sampling(run)
    ids = tokenizer.encode(PROMPT if prompt is None else prompt).astype(np.int64)
    longest = min(config.block_size, MAX_TOKENS) + 1
    if not 2 <= len(ids) <= longest:
        raise UserError(f"--prompt must have 2 to {longest} tokens for this page, got {len(ids)}")
    params = sum(value.size for value in weights.values())
    if params > MAX_PARAMS:
        raise UserError(f"the page has room for {MAX_PARAMS:,} parameters, got {params:,}: show a smaller model")
    return config, weights, tokenizer, ids


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m learn.explorer", argv)
    page = write_page(*load_subject(options.run, options.prompt)).encode()
    if len(page) > MAX_BYTES:
        raise UserError(f"the page has room for {MAX_BYTES:,} bytes, got {len(page):,}: show a shorter --prompt")
    write_atomically(options.out, page)
    print(f"{options.out}: {len(page) / 1000:,.0f} KB. Open it in a browser.")
    return 0
