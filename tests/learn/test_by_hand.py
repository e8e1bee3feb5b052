"""docs/by_hand.md: its weights are read from the page, everything else is recomputed from them with numpygpt.py, and
every number of the page must be the rounded one.

On the page, a tensor is a fenced block: a line with its name, then rows of numbers behind a bar. A calculation is a
fenced block of lines with an equals sign. Code is a fenced block of Python.
"""

import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

import numpygpt
from numpygpt import GPT, GPTConfig
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "by_hand.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "numpygpt.py").read_text(encoding="utf-8")
CONFIG = GPTConfig(vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=3, dropout=0.0, bias=False)
IDX, TARGETS = np.array([[0, 1, 1]]), np.array([[1, 1, 2]])  # the text abbc
HIDDEN = 2  # of the 12 hidden units of the MLP, those that the page shows: the others have weights of 0
NUDGED = ("wte.weight", (1, 0), 1e-4)

CONSTANTS = {"0.00001", "0.044715", "1.0001", "0.75"}  # eps, GELU's, a nudged weight, and where the GELU turns
FUNCTIONS = {"sqrt": math.sqrt, "exp": math.exp, "log": math.log, "tanh": math.tanh, "pi": math.pi}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)")  # with a decimal point, and no part of a name or a version
Tensors = dict[str, np.ndarray]


def tensor_blocks(page: str) -> list[tuple[str, list[list[str]]]]:
    """[(name, rows of numbers as they are printed)]."""
    found = []
    for _, block in FENCE.findall(page):
        name, *lines = block.splitlines()
        if any("|" in line for line in lines):
            found.append((name.split("  ")[0], [line.split("|")[1].split() for line in lines if "|" in line]))
    return found


def weights(page: str) -> Tensors:
    """The parameters as the page gives them; hidden units that it does not show have weights of 0."""
    shapes = numpygpt.param_shapes(CONFIG)
    params = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, rows in tensor_blocks(page):
        if name in shapes:
            array = np.array(rows, float)
            shown = array if len(shapes[name]) == 2 else array[0]
            params[name][tuple(slice(n) for n in shown.shape)] = shown
    return params


def layernorm(tensors: Tensors, name: str, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, tuple]:
    out, saved = numpygpt.layernorm_forward(x, weight, None)
    mean = x.mean(axis=-1, keepdims=True)
    tensors[f"mean, variance, rstd ({name})"] = np.concatenate([mean, x.var(axis=-1, keepdims=True), saved[1]], axis=-1)
    tensors[f"centered ({name})"], tensors[f"xhat ({name})"] = x - mean, saved[0]
    return out, saved


def layernorm_back(tensors: Tensors, name: str, dout: np.ndarray, saved: tuple) -> np.ndarray:
    dx, tensors[f"dweight ({name})"], _ = numpygpt.layernorm_backward(dout, saved)
    dxhat = tensors[f"dxhat ({name})"] = dout * saved[2]
    means = [numpygpt.mean_last_axis(dxhat), numpygpt.mean_last_axis(dxhat * saved[0])]
    tensors[f"mean of dxhat, mean of dxhat * xhat ({name})"] = np.concatenate(means, axis=-1)
    tensors[f"dxhat * xhat ({name})"] = dxhat * saved[0]
    return dx


def compute(params: Tensors) -> Tensors:
    """Every tensor of the page by the name that it has there, without the axis of the one sequence and the one head."""
    t: Tensors = dict(params)
    block = numpygpt.select_prefix(params, "h.0.")
    attn, mlp = numpygpt.select_prefix(block, "attn."), numpygpt.select_prefix(block, "mlp.")

    x, embedding_saved = numpygpt.embedding_forward(IDX, params["wte.weight"], params["wpe.weight"])
    t["x (embedding)"] = x
    t["branch (ln_1)"], ln_1_saved = layernorm(t, "ln_1", x, block["ln_1.weight"])
    qkv, qkv_saved = numpygpt.linear_forward(t["branch (ln_1)"], attn["c_attn.weight"], None)
    q, k, v = t["q"], t["k"], t["v"] = np.split(qkv, 3, axis=-1)
    t["scores"] = q @ k.swapaxes(-1, -2)
    t["att"] = np.where(np.triu(np.ones((3, 3), bool), k=1), -np.inf, t["scores"] / math.sqrt(3))
    t["y"], sdpa_saved = numpygpt.scaled_dot_product_attention_forward(q[None], k[None], v[None])
    t["probs"] = sdpa_saved[3]
    t["branch (attn)"], proj_saved = numpygpt.linear_forward(t["y"][0], attn["c_proj.weight"], None)
    x = t["x (attn added)"] = x + t["branch (attn)"]
    t["branch (ln_2)"], ln_2_saved = layernorm(t, "ln_2", x, block["ln_2.weight"])
    hidden, fc_saved = numpygpt.linear_forward(t["branch (ln_2)"], mlp["c_fc.weight"], None)
    activated, gelu_saved = numpygpt.gelu_forward(hidden)
    t["hidden (c_fc)"], t["hidden (gelu)"] = hidden[..., :HIDDEN], activated[..., :HIDDEN]
    t["tanh"] = gelu_saved[1][..., :HIDDEN]
    t["branch (mlp)"], mlp_proj_saved = numpygpt.linear_forward(activated, mlp["c_proj.weight"], None)
    x = t["x (mlp added)"] = x + t["branch (mlp)"]
    t["x (ln_f)"], ln_f_saved = layernorm(t, "ln_f", x, params["ln_f.weight"])
    logits, head_saved = numpygpt.linear_forward(t["x (ln_f)"], params["wte.weight"], None)
    t["logits"], t["exp(logits)"], t["p"] = logits, np.exp(logits), numpygpt.softmax_forward(logits)
    loss, loss_saved = numpygpt.cross_entropy_forward(logits, TARGETS, 3)
    t["-log p(target)"] = -np.log(np.take_along_axis(t["p"], TARGETS[..., None], -1))
    t["loss"] = np.array(loss)

    grads: Tensors = {}
    t["dlogits"] = numpygpt.cross_entropy_backward(loss_saved)
    t["dx (head)"], t["dwte (head)"], _ = numpygpt.linear_backward(t["dlogits"], head_saved)
    dx = t["dx (ln_f)"] = layernorm_back(t, "ln_f", t["dx (head)"], ln_f_saved)
    dactivated, grads["h.0.mlp.c_proj.weight"], _ = numpygpt.linear_backward(dx, mlp_proj_saved)
    t["dhidden (gelu)"] = dactivated[..., :HIDDEN]
    t["GELU's slope"] = numpygpt.gelu_backward(np.ones_like(hidden), gelu_saved)[..., :HIDDEN]
    dhidden = numpygpt.gelu_backward(dactivated, gelu_saved)
    t["dhidden (c_fc)"] = dhidden[..., :HIDDEN]
    t["dbranch (mlp)"], grads["h.0.mlp.c_fc.weight"], _ = numpygpt.linear_backward(dhidden, fc_saved)
    t["dbranch (ln_2)"] = layernorm_back(t, "ln_2", t["dbranch (mlp)"], ln_2_saved)
    dx = t["dx (mlp added)"] = dx + t["dbranch (ln_2)"]
    t["dy"], grads["h.0.attn.c_proj.weight"], _ = numpygpt.linear_backward(dx, proj_saved)
    dq, dk, dv = (grad[0] for grad in numpygpt.scaled_dot_product_attention_backward(t["dy"][None], sdpa_saved))
    t["dprobs"] = t["dy"] @ v.swapaxes(-1, -2)
    t["dprobs * probs"] = t["dprobs"] * t["probs"][0]
    t["row sum of dprobs * probs"] = t["dprobs * probs"].sum(axis=-1, keepdims=True)
    t["datt"] = numpygpt.softmax_backward(t["dprobs"], t["probs"][0])
    t["dscores"] = t["datt"] / math.sqrt(3)
    t["dq"], t["dk"], t["dv"] = dq, dk, dv
    dqkv = np.concatenate([dq, dk, dv], axis=-1)
    t["dbranch (attn)"], grads["h.0.attn.c_attn.weight"], _ = numpygpt.linear_backward(dqkv, qkv_saved)
    t["dbranch (ln_1)"] = layernorm_back(t, "ln_1", t["dbranch (attn)"], ln_1_saved)
    dx = t["dx (attn added)"] = dx + t["dbranch (ln_1)"]
    t["dwte (embedding)"], grads["wpe.weight"] = numpygpt.embedding_backward(dx, embedding_saved)
    grads["wte.weight"] = t["dwte (head)"] + t["dwte (embedding)"]
    for name in ("ln_1", "ln_2", "ln_f"):
        grads[f"{'' if name == 'ln_f' else 'h.0.'}{name}.weight"] = t.pop(f"dweight ({name})")
    t |= {f"gradient of {name}": grad for name, grad in grads.items()}
    for prefix in ("", "gradient of "):
        t[f"{prefix}h.0.mlp.c_fc.weight"] = t[f"{prefix}h.0.mlp.c_fc.weight"][:HIDDEN]
        t[f"{prefix}h.0.mlp.c_proj.weight"] = t[f"{prefix}h.0.mlp.c_proj.weight"][:, :HIDDEN]
    t |= nudge(params, grads)
    return t


def nudge(params: Tensors, grads: Tensors) -> Tensors:
    """The last block of the page: what the loss does when one weight moves, and what its gradient says."""
    name, entry, step = NUDGED
    moved = {key: value.copy() for key, value in params.items()}
    moved[name][entry] += step
    before, after = (float(GPT(CONFIG, p).loss_and_grads(IDX, TARGETS)[0]) for p in (params, moved))
    lines = {"loss before": before, "loss after": after, "change of the loss": after - before}
    return {key: np.array(value) for key, value in (lines | {"gradient * 0.0001": grads[name][entry] * step}).items()}


def as_rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1] if array.ndim else 1)


def rounded(value: float, printed: str) -> str:
    """The value with as many decimals as are printed, and no minus before a zero."""
    text = f"{value:.{len(printed.partition('.')[2])}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def wrong_tensors(page: str, tensors: Tensors) -> Iterator[str]:
    for name, rows in tensor_blocks(page):
        expected = as_rows(tensors[name])
        if expected.shape != (len(rows), len(rows[0])):
            yield f"{name} has {len(rows)} rows of {len(rows[0])}, expected {expected.shape}"
            return
        for (i, j), value in np.ndenumerate(expected):
            if rounded(value, rows[i][j]) != rows[i][j]:
                yield f"{name}[{i}, {j}] is {rounded(value, rows[i][j])}, the page says {rows[i][j]}"


def entries_by_print(tensors: Tensors) -> dict[str, list[float]]:
    """{what is printed: the entries, without their signs, that it can be the rounding of}."""
    entries = np.abs(np.concatenate([array.ravel() for array in tensors.values()]))
    found: dict[str, list[float]] = {}
    for entry in np.unique(entries[np.isfinite(entries)].round(14)):
        found.setdefault(f"{entry:.4f}", []).append(float(entry))
        if entry == round(entry, 1):
            found[f"{entry:.1f}"] = [float(entry)]
    return found


def holds(term: str, value: float, entries: dict[str, list[float]]) -> bool:
    """Is the term equal to the value, once its rounded numbers are replaced by the entries that they stand for?"""
    parts = re.split(r"(?<![\w.])(\d+\.\d{4})(?!\d)", term.replace("·", "*").replace("^", "**"))
    for numbers in itertools.product(*(entries.get(number, ()) for number in parts[1::2])):
        parts[1::2] = map(repr, numbers)
        if abs(eval("".join(parts), {}, dict(FUNCTIONS)) - value) < 1e-10:
            return True
    return False


def wrong_calculations(page: str, tensors: Tensors) -> Iterator[str]:
    entries = entries_by_print(tensors)
    blocks = [block for kind, block in FENCE.findall(page) if kind == "" and "|" not in block]
    for line in "".join(blocks).splitlines():
        target, *terms, printed = re.split(" = |: +", line)
        name, entry = re.findall(r"^(.*?)(?:\[(\d, \d)\])?$", target)[0]
        value = as_rows(tensors[name])[tuple(map(int, (entry or "0, 0").split(", ")))] if name in tensors else math.nan
        if rounded(value, printed) != printed:
            yield f"{line}: {rounded(value, printed)} is right"
        yield from (f"{line}: {term} is something else" for term in terms if not holds(term, value, entries))


def wrong_numbers(page: str, tensors: Tensors) -> Iterator[str]:
    """Numbers in the text that no tensor has."""
    entries = entries_by_print(tensors)
    for number in NUMBER.findall(FENCE.sub("", page)):
        if number not in CONSTANTS and number not in entries:
            yield f"{number} is no entry of any tensor"


def problems(page: str) -> Iterator[str]:
    """All that is wrong with the page's numbers."""
    tensors = compute(weights(page))
    for find in (wrong_tensors, wrong_calculations, wrong_numbers):
        yield from find(page, tensors)


def test_every_number_is_right() -> None:
    found = list(problems(PAGE))
    assert not found, "\n".join(found)


def test_the_steps_are_the_whole_model() -> None:
    """The page's tensors end at what GPT computes, and every parameter and its gradient are on the page."""
    params = weights(PAGE)
    tensors = compute(params)
    loss, grads = GPT(CONFIG, params).loss_and_grads(IDX, TARGETS)
    assert loss == tensors["loss"]
    shown = {name for name, _ in tensor_blocks(PAGE)}
    for name, grad in grads.items():
        assert {name, f"gradient of {name}"} <= shown
        cut = tensors[f"gradient of {name}"]
        np.testing.assert_array_equal(grad[tuple(slice(n) for n in cut.shape)], cut)
        assert np.count_nonzero(grad) == np.count_nonzero(cut), f"{name}: a gradient that is not 0 is left out"
    assert f"{sum(grad.size for grad in grads.values())} weights" in PAGE


def test_the_masked_gradient_is_not_zero_and_nothing_comes_of_it() -> None:
    tensors = compute(weights(PAGE))
    dprobs, datt = as_rows(tensors["dprobs"]), as_rows(tensors["datt"])
    assert dprobs[1, 2] == -np.abs(dprobs[1]).max(), "the page calls it the largest of its row"
    assert not np.triu(datt, k=1).any()


def test_the_code_is_quoted() -> None:
    """A failure: numpygpt.py has changed, and the page quotes what it was."""
    source = {line.strip() for line in SOURCE.splitlines()}
    quoted = [line for kind, block in FENCE.findall(PAGE) if kind == "python" for line in block.splitlines()]
    assert len(quoted) > 20
    assert not [line for line in quoted if line not in source]


def test_a_changed_digit_is_found() -> None:
    """Change the last digit of a number, and the page is wrong. Every eleventh number: all take over a minute."""
    code = [fence.span() for fence in FENCE.finditer(PAGE) if fence[1] == "python"]
    numbers = [m for m in NUMBER.finditer(PAGE) if not any(start <= m.start() < end for start, end in code)]
    assert len(numbers) > 500
    unnoticed = []
    for number in numbers[::11]:
        last = number.end() - 1
        page = PAGE[:last] + str((int(PAGE[last]) + 1) % 10) + PAGE[last + 1 :]
        if next(problems(page), None) is None:
            unnoticed.append(PAGE[max(0, number.start() - 40) : number.end()])
    assert not unnoticed, unnoticed
