"""docs/derivations.md: its quotes are the code's own lines, and each of its formulas has a witness here.

The formulas stand here as they stand on that page. Each is compared with a derivative that nobody derived, SymPy's or a
finite difference, and with what numpygpt.py returns.
"""

import math
import re
import textwrap
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import sympy

import numpygpt
from numpygpt import GPT, AdamW, GPTConfig, Muon, orthogonalize
from tests.helpers import ROOT, central_difference, random_weights

PAGE = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "numpygpt.py").read_text(encoding="utf-8").splitlines()
EXACT = 1e-12  # relative, in float64: the rounding of a few sums
FINITE = 1e-8  # relative, of an eighth-order finite difference


def close(actual: np.ndarray, expected: np.ndarray, gate: float = EXACT) -> bool:
    """Same shape, and nowhere further apart than gate times the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return actual.shape == expected.shape and np.abs(actual - expected).max() <= gate * (1e-9 + np.abs(expected).max())


def finite_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-2) -> np.ndarray:
    """The derivative of the number f(x) with respect to every entry of x, by finite differences."""
    grad = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        unit = np.zeros_like(x)
        unit[place] = 1
        grad[place] = central_difference(lambda s, unit=unit: f(x + s * unit), h)
    return grad


def draw(*shape: int) -> np.ndarray:
    """Reproducible noise: the same for the same shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def number(expression: sympy.Expr, values: dict) -> float:
    """A symbolic expression with numbers put in, computed with 30 digits."""
    return float(expression.evalf(30, subs=values))


# ---------------------------------------------------------------------------------------------------------------------
# The page itself


def sections() -> dict[str, str]:
    """The page's sections with formulas: heading -> text."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return {title: text for title, text in zip(parts[1::2], parts[2::2], strict=True) if "*Witness:*" in text}


def in_source(quote: str) -> bool:
    """Whether these lines stand in numpygpt.py, one under the other, at any one indentation."""
    lines = quote.splitlines()
    return any(
        textwrap.dedent("\n".join(SOURCE[i : i + len(lines)])) == "\n".join(lines)
        for i in range(len(SOURCE) - len(lines) + 1)
    )


def test_docs_derivations_quote_the_code() -> None:
    quotes = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(quotes) >= len(sections())
    for quote in quotes:
        assert in_source(quote.rstrip("\n")), (
            f"numpygpt.py does not have these lines; does the page lag behind?\n{quote}"
        )


def test_docs_derivations_quotes_can_fail() -> None:
    assert in_source("dwte = np.zeros(wte_shape, dx.dtype)\nnp.add.at(dwte, idx, dx)")
    assert not in_source("dwte = np.zeros(wte_shape, dx.dtype)\nnp.add.at(dwte, idx, -dx)")


def test_docs_derivations_name_their_witnesses() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    assert list(sections()) == headings[1:], "each section but the first has a witness"
    for title, text in sections().items():
        (name,) = re.findall(r"^\*Witness:\* `(\w+)`", text, flags=re.MULTILINE)
        assert callable(globals().get(name)), f"{title}: no test {name}"
        assert "```python" in text, f"{title} quotes no code"


def test_docs_math_is_what_github_renders() -> None:
    assert PAGE.count("```") % 2 == 0
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert prose.count("$") % 2 == 0
    for formula in re.findall(r"\$([^$]*)\$", prose):
        assert "\n" not in formula, f"${formula}$: inline formulas do not break over lines"
        assert not re.search(r"\\[_,;!{}]|\}_|\*", formula), f"${formula}$: Markdown would take a part of this away"
    assert "\\operatorname" not in PAGE, "GitHub refuses this macro"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_docs_links_lead_somewhere(page) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        goal = page if not path else page.parent / path
        assert goal.exists(), f"{page.name}: no {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: no heading for {target}"


# ---------------------------------------------------------------------------------------------------------------------
# The witnesses, in the order of the page


def test_linear() -> None:
    x, weight, bias, dout = draw(2, 3, 4), draw(5, 4), draw(5), draw(2, 3, 5)
    _, saved = numpygpt.linear_forward(x, weight, bias)
    dx, dweight, dbias = numpygpt.linear_backward(dout, saved)
    rows, drows = x.reshape(6, 4), dout.reshape(6, 5)
    assert close(dx.reshape(6, 4), np.einsum("no,oi->ni", drows, weight))
    assert close(dweight, np.einsum("no,ni->oi", drows, rows))
    assert close(dbias, np.einsum("no->o", drows))

    def loss(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
        return float(np.vdot(numpygpt.linear_forward(x, weight, bias)[0], dout))

    assert close(dx, finite_gradient(lambda a: loss(a, weight, bias), x), FINITE)
    assert close(dweight, finite_gradient(lambda a: loss(x, a, bias), weight), FINITE)
    assert close(dbias, finite_gradient(lambda a: loss(x, weight, a), bias), FINITE)


def test_embedding() -> None:
    idx, wte, wpe, dx = np.array([[4, 0, 4], [1, 4, 0]]), draw(6, 2), draw(5, 2), draw(2, 3, 2)
    _, saved = numpygpt.embedding_forward(idx, wte, wpe)
    dwte, dwpe = numpygpt.embedding_backward(dx, saved)
    onehot = np.eye(6)[idx.ravel()]
    assert close(dwte, onehot.T @ dx.reshape(6, 2))
    assert close(dwpe[:3], dx.sum(axis=0))
    assert not dwte[[2, 3, 5]].any()
    assert not dwpe[3:].any()

    def loss(wte: np.ndarray, wpe: np.ndarray) -> float:
        return float(np.vdot(numpygpt.embedding_forward(idx, wte, wpe)[0], dx))

    assert close(dwte, finite_gradient(lambda a: loss(a, wpe), wte), FINITE)
    assert close(dwpe, finite_gradient(lambda a: loss(wte, a), wpe), FINITE)

    # The example on the page: idx [[2, 0, 2]]
    r = draw(1, 3, 2)
    dwte, _ = numpygpt.embedding_backward(r, (np.array([[2, 0, 2]]), (3, 2), (3, 2)))
    assert close(dwte, np.stack([r[0, 1], np.zeros(2), r[0, 0] + r[0, 2]]))


def test_weight_tying() -> None:
    config = GPTConfig(vocab_size=4, block_size=3, n_layer=1, n_head=1, n_embd=4, dropout=0.0)
    params, idx, targets = random_weights(config, seed=1), np.array([[2, 0, 2]]), np.array([[0, 2, 3]])
    model = GPT(config, params)
    head_backward, embedding_backward = numpygpt.linear_backward, numpygpt.embedding_backward
    parts: list[np.ndarray] = []

    def keep_head(dout: np.ndarray, saved: tuple) -> tuple:
        grads = head_backward(dout, saved)
        if saved[1] is model.params["wte.weight"]:
            parts.append(grads[1].copy())
        return grads

    def keep_embedding(dx: np.ndarray, saved: tuple) -> tuple:
        grads = embedding_backward(dx, saved)
        parts.append(grads[0].copy())
        return grads

    with mock.patch.multiple(numpygpt, linear_backward=keep_head, embedding_backward=keep_embedding):
        _, grads = model.loss_and_grads(idx, targets)

    def loss(head: np.ndarray, embedding: np.ndarray) -> float:
        """F(A, E): the model with a matrix of its own in each place."""
        untied = {**params, "wte.weight": embedding}
        linear_forward = numpygpt.linear_forward

        def with_head(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple:
            return linear_forward(x, head if weight.shape == (4, 4) and bias is None else weight, bias)

        with mock.patch.object(numpygpt, "linear_forward", with_head):
            return float(GPT(config, untied).forward(idx, targets)[1])

    wte = params["wte.weight"]
    of_head, of_embedding = parts
    assert close(of_head, finite_gradient(lambda a: loss(a, wte), wte), FINITE)
    assert close(of_embedding, finite_gradient(lambda a: loss(wte, a), wte), FINITE)
    assert close(grads["wte.weight"], finite_gradient(lambda a: loss(a, a), wte), FINITE)
    assert close(grads["wte.weight"], of_head + of_embedding)
    assert not of_embedding[[1, 3]].any()
    assert of_head.all()


def test_layernorm() -> None:
    C, eps = 3, sympy.Rational(1, 100_000)
    x = sympy.symbols("x:3", real=True)
    mean = sum(x) / C
    variance = sum((xc - mean) ** 2 for xc in x) / C
    rstd = 1 / sympy.sqrt(variance + eps)
    xhat = [(xc - mean) * rstd for xc in x]
    dxhat = sympy.symbols("dxhat:3", real=True)
    values = dict(zip([*x, *dxhat], map(sympy.Rational, ["3/2", "-1/3", "2", "1", "-2", "3/5"]), strict=True))
    for i in range(C):
        assert sympy.simplify(sympy.diff(variance, x[i]) - 2 * (x[i] - mean) / C) == 0
        assert abs(number(sympy.diff(rstd, x[i]) + rstd**2 * xhat[i] / C, values)) < 1e-25
        for j in range(C):
            direct = rstd * ((1 if i == j else 0) - sympy.Rational(1, C))
            product_rule = direct + (x[j] - mean) * sympy.diff(rstd, x[i])
            formula = rstd * ((1 if i == j else 0) - sympy.Rational(1, C) - xhat[i] * xhat[j] / C)
            assert abs(number(sympy.diff(xhat[j], x[i]) - product_rule, values)) < 1e-25
            assert abs(number(sympy.diff(xhat[j], x[i]) - formula, values)) < 1e-25

    # The three terms of dx against SymPy's derivative of the whole, and the code against both
    loss = sum(d * h for d, h in zip(dxhat, xhat, strict=True))
    projection = sum(d * h for d, h in zip(dxhat, xhat, strict=True)) / C
    terms = [number(rstd * (dxhat[i] - sum(dxhat) / C - xhat[i] * projection), values) for i in range(C)]
    assert close(terms, [number(sympy.diff(loss, x[i]), values) for i in range(C)])
    weight = np.array([0.5, 2.0, -1.0])
    dout = np.array([float(values[d]) for d in dxhat]) / weight
    _, saved = numpygpt.layernorm_forward(np.array([float(values[xc]) for xc in x]), weight, weight)
    assert close(numpygpt.layernorm_backward(dout, saved)[0], terms)

    # Gain and shift, summed over the tokens
    tokens, douts = draw(2, 3, 4), draw(3, 2, 4).reshape(2, 3, 4)
    out, saved = numpygpt.layernorm_forward(tokens, np.ones(4), np.zeros(4))
    dx, dweight, dbias = numpygpt.layernorm_backward(douts, saved)
    assert close(dweight, np.einsum("btc,btc->c", douts, out))
    assert close(dbias, np.einsum("btc->c", douts))
    # No component along the two directions that do not change xhat, the second but for eps
    assert np.abs(dx.sum(axis=-1)).max() < 1e-14
    assert np.abs(np.vecdot(dx, out)).max() < 1e-3


def test_gelu() -> None:
    x = sympy.symbols("x", real=True)
    k, c = sympy.sqrt(2 / sympy.pi), sympy.Rational("0.044715")
    u = k * (x + c * x**3)
    out = x / 2 * (1 + sympy.tanh(u))
    du = k * (1 + 3 * c * x**2)
    formula = (1 + sympy.tanh(u)) / 2 + x / 2 * (1 - sympy.tanh(u) ** 2) * du
    assert sympy.simplify(sympy.diff(u, x) - du) == 0
    assert sympy.simplify(sympy.diff(out, x) - formula) == 0
    places = np.linspace(-6, 6, 49)
    got, saved = numpygpt.gelu_forward(places.copy())
    assert close(got, sympy.lambdify(x, out)(places))
    assert close(numpygpt.gelu_backward(np.full(49, 2.0), saved), 2 * sympy.lambdify(x, formula)(places))

    # What the page says of the curve
    fine = np.linspace(-4, 4, 8001)
    curve, saved = numpygpt.gelu_forward(fine)
    slope = numpygpt.gelu_backward(np.ones_like(fine), saved)
    assert (round(curve.min(), 3), round(fine[curve.argmin()], 3)) == (-0.170, -0.752)
    assert (slope < 0)[fine < -0.753].all()
    assert (slope > 0)[fine > -0.752].all()
    assert (slope > 1)[fine > 0.753].all()
    assert (slope < 1)[fine < 0.752].all()
    assert round(slope.max(), 3) == 1.129
    assert slope[4000] == 0.5


def test_dropout() -> None:
    x, dout, p = draw(3, 4), draw(4, 3).reshape(3, 4), 0.25
    out, scale = numpygpt.dropout_forward(x, p, [np.random.default_rng(b) for b in range(3)])
    assert set(np.unique(scale)) == {0.0, 1 / (1 - p)}
    assert close(out, x * scale)
    dx = numpygpt.dropout_backward(dout, scale)
    assert close(dx, finite_gradient(lambda a: float(np.vdot(a * scale, dout)), x), FINITE)
    _, large = numpygpt.dropout_forward(np.ones((1, 200_000)), p, [np.random.default_rng(0)])
    deviation = math.sqrt(p / (1 - p) / large.size)  # of the mean of `scale`
    assert abs(large.mean() - 1) < 4 * deviation


def test_softmax() -> None:
    n = 4
    x = sympy.symbols("x:4", real=True)
    S = sum(map(sympy.exp, x))
    probs = [sympy.exp(xj) / S for xj in x]
    for i in range(n):
        for j in range(n):
            formula = probs[j] * ((1 if i == j else 0) - probs[i])
            assert sympy.simplify(sympy.diff(probs[j], x[i]) - formula) == 0

    scores, dprobs = draw(n), draw(n, 1)[:, 0]
    got = numpygpt.softmax_forward(scores)
    assert close(got, sympy.lambdify([x], probs)(scores))
    jacobian = np.array(sympy.lambdify([x], [[sympy.diff(pj, xi) for pj in probs] for xi in x])(scores))
    dx = numpygpt.softmax_backward(dprobs, got)
    assert close(dx, jacobian @ dprobs)
    assert abs(dx.sum()) < 1e-15
    assert close(numpygpt.softmax_forward(scores + 1000), got)


def attention_example(T: int = 5, n_head: int = 2, hs: int = 3, B: int = 2) -> tuple[np.ndarray, dict, np.ndarray]:
    """x (B, T, C), the parameters of one attention layer, and dout (B, T, C)."""
    C = n_head * hs
    p = {
        "c_attn.weight": draw(3 * C, C),
        "c_attn.bias": draw(3 * C),
        "c_proj.weight": draw(C, C),
        "c_proj.bias": draw(C),
    }
    return draw(B, T, C), p, draw(T, B, C).swapaxes(0, 1)


def test_scaled_dot_product_attention() -> None:
    B, nh, T, hs = 2, 2, 5, 3
    q, k, v, dout = (
        draw(B, nh, T, hs),
        draw(nh, B, T, hs),
        draw(T, B, nh, hs).transpose(1, 2, 0, 3),
        draw(hs, B, nh, T).transpose(1, 2, 3, 0),
    )
    out, saved = numpygpt.scaled_dot_product_attention_forward(q, k, v)
    dq, dk, dv = numpygpt.scaled_dot_product_attention_backward(dout, saved)
    for b, head in np.ndindex(B, nh):  # the page's sums
        Q, K, V, dO = (array[b, head] for array in (q, k, v, dout))
        scores = np.einsum("td,sd->ts", Q, K)
        att = np.where(np.tri(T, dtype=bool), scores / math.sqrt(hs), -np.inf)
        probs = np.exp(att) / np.exp(att).sum(axis=-1, keepdims=True)
        assert close(out[b, head], np.einsum("ts,sd->td", probs, V))
        dprobs = np.einsum("td,sd->ts", dO, V)
        assert close(dv[b, head], np.einsum("ts,td->sd", probs, dO))
        datt = probs * (dprobs - np.einsum("tr,tr->t", dprobs, probs)[:, None])
        dscores = datt / math.sqrt(hs)
        assert close(dq[b, head], np.einsum("ts,sd->td", dscores, K))
        assert close(dk[b, head], np.einsum("ts,td->sd", dscores, Q))

    # Scores of independent entries have variance hs
    scores = np.einsum("nd,nd->n", *np.random.default_rng(0).standard_normal((2, 100_000, 64)))
    assert scores.var() == pytest.approx(64, rel=0.02)

    # Finite differences, with dropout on the weights too, the same in every call
    def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple:
        rngs = [np.random.default_rng(b) for b in range(B)]
        return numpygpt.scaled_dot_product_attention_forward(q, k, v, 0.3, rngs)

    tensors = {"q": q, "k": k, "v": v}
    grads = numpygpt.scaled_dot_product_attention_backward(dout, forward(q, k, v)[1])
    for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
        numeric = finite_gradient(lambda a, name=name: float(np.vdot(forward(**{**tensors, name: a})[0], dout)), tensor)
        assert close(grad, numeric, FINITE), name


def test_heads() -> None:
    x, p, dout = attention_example()
    (B, T, C), n_head, hs = x.shape, 2, 3
    _, saved = numpygpt.attention_forward(x, p, n_head)
    dx, grads = numpygpt.attention_backward(dout, saved)

    # The page's sums, for each sequence and head by itself
    qkv = x @ p["c_attn.weight"].T + p["c_attn.bias"]
    dqkv, dy = np.zeros_like(qkv), dout @ p["c_proj.weight"]
    for b in range(B):
        for head in range(n_head):
            columns = [slice(part * C + head * hs, part * C + (head + 1) * hs) for part in range(3)]
            q, k, v = (qkv[b, :, place] for place in columns)
            dheads = dy[b, :, head * hs : (head + 1) * hs]
            att = np.where(np.tri(T, dtype=bool), np.einsum("td,sd->ts", q, k) / math.sqrt(hs), -np.inf)
            probs = np.exp(att) / np.exp(att).sum(axis=-1, keepdims=True)
            dprobs = np.einsum("td,sd->ts", dheads, v)
            datt = probs * (dprobs - np.einsum("tr,tr->t", dprobs, probs)[:, None])
            dqkv[b, :, columns[0]] = np.einsum("ts,sd->td", datt, k) / math.sqrt(hs)
            dqkv[b, :, columns[1]] = np.einsum("ts,td->sd", datt, q) / math.sqrt(hs)
            dqkv[b, :, columns[2]] = np.einsum("ts,td->sd", probs, dheads)
    assert close(dx, dqkv @ p["c_attn.weight"])
    assert close(grads["c_attn.weight"], np.einsum("btj,bti->ji", dqkv, x))
    assert close(grads["c_attn.bias"], dqkv.sum(axis=(0, 1)))
    assert np.abs(grads["c_attn.bias"][C : 2 * C]).max() < 1e-13  # of the keys

    # Finite differences, with dropout on the weights too, the same in every call
    def rngs() -> list[np.random.Generator]:
        return [np.random.default_rng(b) for b in range(B)]

    _, saved = numpygpt.attention_forward(x, p, n_head, 0.3, rngs())
    dx, grads = numpygpt.attention_backward(dout, saved)
    tensors = {"x": x, **p}
    for name, grad in {"x": dx, **grads}.items():

        def loss(changed: np.ndarray, name: str = name) -> float:
            at = {**tensors, name: changed}
            return float(np.vdot(numpygpt.attention_forward(at["x"], at, n_head, 0.3, rngs())[0], dout))

        assert close(grad, finite_gradient(loss, tensors[name], 1e-3), FINITE), name


def test_causal_mask() -> None:
    x, p, dout = attention_example()
    t = 2
    dout[:, t + 1 :] = 0  # a loss of the tokens up to t alone
    softmax_backward = numpygpt.softmax_backward
    datts: list[np.ndarray] = []

    def keep(dprobs: np.ndarray, probs: np.ndarray) -> np.ndarray:
        datts.append(softmax_backward(dprobs, probs).copy())
        return datts[-1].copy()

    _, saved = numpygpt.attention_forward(x, p, n_head=2)
    with mock.patch.object(numpygpt, "softmax_backward", keep):
        dx, _ = numpygpt.attention_backward(dout, saved)
    (datt,) = datts
    future = ~np.tri(5, dtype=bool)
    assert not datt[..., future].any()
    assert datt[:, :, 1, :2].all()
    assert dx[:, : t + 1].all()
    assert not dx[:, t + 1 :].any()

    # dprobs is not 0 in the future, and whatever it holds there changes nothing
    probs = numpygpt.softmax_forward(np.where(future, -np.inf, draw(5, 5)))
    dprobs = draw(2, 5, 5)[1]
    disturbed = np.where(future, 1e6 * draw(5, 5), dprobs)
    assert (softmax_backward(disturbed, probs) == softmax_backward(np.where(future, 0, dprobs), probs)).all()


def test_tiles() -> None:
    x, p, dout = attention_example(T=12)
    results = []
    for tile in (12, 1, 3, 5):
        with mock.patch.object(numpygpt, "ATTENTION_TILE", tile):
            out, saved = numpygpt.attention_forward(x, p, n_head=2)
            dx, grads = numpygpt.attention_backward(dout, saved)
            results.append([out, dx, *grads.values()])
            computed = sum((rows.stop - rows.start) * keys.stop for rows, keys in numpygpt.causal_tiles(12, 12))
        if 12 % tile == 0:
            n = 12 // tile
            assert computed / 12**2 == pytest.approx((1 + 1 / n) / 2)
    for others in results[1:]:
        assert all(close(a, b) for a, b in zip(others, results[0], strict=True))


def test_residual() -> None:
    config = GPTConfig(vocab_size=2, block_size=4, n_layer=1, n_head=2, n_embd=6, dropout=0.0)
    p = numpygpt.select_prefix(random_weights(config, seed=3), "h.0.")
    x, dout = draw(2, 4, 6), draw(4, 2, 6).swapaxes(0, 1)
    _, saved = numpygpt.block_forward(x, p, n_head=2)
    before = dout.copy()
    dx, _ = numpygpt.block_backward(dout, saved)
    assert (dout == before).all()
    assert close(
        dx, finite_gradient(lambda a: float(np.vdot(numpygpt.block_forward(a, p, 2)[0], dout)), x, 1e-3), FINITE
    )

    silent = p | {
        f"{part}.c_proj.{kind}": 0 * p[f"{part}.c_proj.{kind}"]
        for part in ("attn", "mlp")
        for kind in ("weight", "bias")
    }
    out, saved = numpygpt.block_forward(x, silent, n_head=2)
    assert (out == x).all()
    assert (numpygpt.block_backward(dout, saved)[0] == dout).all()


def test_cross_entropy() -> None:
    V = 4
    logits = sympy.symbols("l:4", real=True)
    S = sum(map(sympy.exp, logits))
    for y in range(V):
        loss = sympy.log(S) - logits[y]
        assert sympy.simplify(sympy.exp(-loss) - sympy.exp(logits[y]) / S) == 0
        for v in range(V):
            formula = sympy.exp(logits[v]) / S - (1 if v == y else 0)
            assert sympy.simplify(sympy.diff(loss, logits[v]) - formula) == 0

    rows, targets = draw(2, 3, V), np.array([[0, -1, 3], [-1, 2, 2]])
    loss, saved = numpygpt.cross_entropy_forward(rows, targets, 4)
    dlogits = numpygpt.cross_entropy_backward(saved)
    probs = np.exp(rows) / np.exp(rows).sum(axis=-1, keepdims=True)
    expected = np.where(targets[..., None] >= 0, probs - np.eye(V)[targets], 0) / 4
    assert close(dlogits, expected)
    assert close(loss, -np.log(np.take_along_axis(probs, abs(targets)[..., None], -1)[..., 0][targets >= 0]).sum() / 4)
    assert np.abs(dlogits.sum(axis=-1)).max() < 1e-15
    parts = [numpygpt.cross_entropy_forward(rows[b : b + 1], targets[b : b + 1], 4) for b in range(2)]
    assert close(sum(part for part, _ in parts), loss)
    assert close(np.concatenate([numpygpt.cross_entropy_backward(saved) for _, saved in parts]), dlogits)


def test_clipping() -> None:
    grads = {"a": draw(3, 4), "b": draw(5)}
    vector = np.concatenate([grad.ravel() for grad in grads.values()])
    norm = numpygpt.clip_grad_norm(grads, 0.5)
    clipped = np.concatenate([grad.ravel() for grad in grads.values()])
    assert close(norm, np.linalg.norm(vector))
    assert close(clipped, vector * min(1, 0.5 / (norm + 1e-6)))
    distance = np.linalg.norm(clipped - vector)
    for seed in range(100):
        other = clipped + 0.1 * np.random.default_rng(seed).standard_normal(17)
        other *= min(1, 0.5 / np.linalg.norm(other))
        assert np.linalg.norm(other - vector) > distance - 1e-5
    assert close(numpygpt.clip_grad_norm(grads, 1.0), np.linalg.norm(clipped))
    assert (np.concatenate([grad.ravel() for grad in grads.values()]) == clipped).all()


def test_adamw() -> None:
    beta1, beta2, eps, decay, lr = 0.8, 0.95, 1e-8, 0.1, 0.01
    start = {"matrix": draw(2, 3), "gain": draw(3)}
    history = [{name: (t + 1) * draw(t + 1, *value.shape)[t] for name, value in start.items()} for t in range(10)]
    params = {name: value.copy() for name, value in start.items()}
    optimizer = AdamW(params, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    expected = {name: value.copy() for name, value in start.items()}
    for t, grads in enumerate(history, start=1):
        optimizer.step(grads, lr)
        weights1 = [(1 - beta1) * beta1 ** (t - s) for s in range(1, t + 1)]
        weights2 = [(1 - beta2) * beta2 ** (t - s) for s in range(1, t + 1)]
        assert sum(weights1) == pytest.approx(1 - beta1**t, rel=1e-14)
        for name, param in expected.items():
            m = sum(w * g[name] for w, g in zip(weights1, history, strict=False))
            v = sum(w * g[name] ** 2 for w, g in zip(weights2, history, strict=False))
            assert close(optimizer.m[name], m)
            assert close(optimizer.v[name], v)
            update = lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
            expected[name] = (1 - lr * decay if param.ndim >= 2 else 1) * param - update
            assert close(params[name], expected[name])
            if t == 1:
                assert close(update, lr * np.sign(grads[name]), 1e-6)


def test_orthogonalize() -> None:
    # the steepest descent under the spectral norm
    g = draw(4, 6)
    U, s, Vt = np.linalg.svd(g, full_matrices=False)
    assert close((g * -(U @ Vt)).sum(), -s.sum())
    rng = np.random.default_rng(0)
    for _ in range(200):
        update = rng.standard_normal(g.shape) - rng.uniform(0, 3) * U @ Vt
        assert (g * update).sum() >= -s.sum() * np.linalg.norm(update, 2)

    # a polynomial of each singular value
    x = g / np.linalg.norm(g)
    a, b, c = 3.4445, -4.7750, 2.0315
    sigma = sympy.Symbol("s", positive=True)
    p = a * sigma + b * sigma**3 + c * sigma**5
    once = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    polynomial = sympy.lambdify(sigma, p)
    assert close(once, (U * polynomial(s / np.linalg.norm(s))) @ Vt)
    assert close(orthogonalize(g, 1), once)
    assert close(orthogonalize(3 * g, 1), once)
    repeated = s / np.linalg.norm(s)
    for _ in range(5):
        repeated = polynomial(repeated)
    assert close(orthogonalize(g), (U * repeated) @ Vt)

    # its slope at 0, its flat places, its fixed point, its band
    assert p.diff(sigma).subs(sigma, 0) == a
    assert round(a**5) == 485
    assert round(1.5**5, 1) == 7.6
    flat = sorted(float(root) for root in sympy.Poly(p.diff(sigma)).nroots() if root > 0)
    assert [round(place, 4) for place in flat] == [0.5545, 1.0501]
    highest, lowest = polynomial(np.array(flat))
    assert (round(highest, 4), round(lowest, 4)) == (1.2024, 0.6818)
    below, inside = np.linspace(0, highest, 10_001), np.linspace(lowest, highest, 10_001)
    assert polynomial(below).max() <= highest
    assert polynomial(inside).min() >= lowest
    fixed = float(sympy.nsolve(p - sigma, 0.87))
    assert round(fixed, 4) == 0.8680
    assert round(float(p.diff(sigma).subs(sigma, fixed)), 1) == -1.6
    after = np.linspace(0.0016, 1, 10_001)
    small = np.linspace(1e-9, 0.0016, 1001)
    for _ in range(5):
        after, small = polynomial(after), polynomial(small)
    assert lowest <= after.min()
    assert after.max() <= highest
    assert (small <= 485 * np.linspace(1e-9, 0.0016, 1001)).all()


def test_muon() -> None:
    momentum, decay, lr = 0.9, 0.1, 0.05
    start = {"tall": draw(6, 3), "wide": draw(3, 6)}
    history = [{name: draw(t + 2, *value.shape)[t] for name, value in start.items()} for t in range(10)]
    params = {name: value.copy() for name, value in start.items()}
    optimizer = Muon(params, momentum=momentum, weight_decay=decay)
    expected = {name: value.copy() for name, value in start.items()}
    for t, grads in enumerate(history):
        optimizer.step(grads, lr)
        for name, param in expected.items():
            m = sum((1 - momentum) * momentum ** (t - s) * history[s][name] for s in range(t + 1))
            u = momentum * m + (1 - momentum) * grads[name]
            rows, columns = param.shape
            update = lr * math.sqrt(max(1, rows / columns)) * orthogonalize(u)
            expected[name] = (1 - lr * decay) * param - update
            assert close(optimizer.m[name], m)
            assert close(params[name], expected[name])

    # an entry of the output moves by about lr times an entry of the input, whatever the shape
    rng = np.random.default_rng(0)
    for rows, columns in ((512, 128), (128, 128), (128, 512)):
        U, _, Vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
        x = rng.standard_normal((columns, 100))
        moved = math.sqrt(max(1, rows / columns)) * (U @ Vt) @ x
        assert np.sqrt(np.mean(moved**2)) == pytest.approx(1, abs=0.05)

    # weights pushed in one direction for ever stay below the bound
    params = {"tall": np.zeros((6, 3))}
    optimizer = Muon(params, weight_decay=decay)
    for _ in range(2000):
        optimizer.step({"tall": history[0]["tall"]}, lr)
    assert 6 < np.linalg.norm(params["tall"], 2) / math.sqrt(2) < 12.1
