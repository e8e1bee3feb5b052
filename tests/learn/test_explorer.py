"""The explorer in a real browser: numpygpt's numbers, explanations that add up, keys that work, and no requests."""

import base64
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import numpygpt
from common.cli import run_program
from data.tokenizers import CharTokenizer
from learn.explorer import page as explorer
from numpygpt import GPT, GPTConfig, Params, init_params
from tests.runs import ROOT, refused, start, write_text

sync_api = pytest.importorskip("playwright.sync_api", reason="the explorer's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found")
ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
MINUS = "\N{MINUS SIGN}"
TOLERANCE = 1e-12  # of the largest entry of a tensor
DESK, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}

Subject = tuple[GPTConfig, Params, CharTokenizer, np.ndarray]


def two_layers() -> Subject:
    """What the small model is not: two layers, three heads, no biases, weights that are not rounded."""
    tokenizer = CharTokenizer.from_text("banana split")
    config = GPTConfig(tokenizer.vocab_size, block_size=8, n_layer=2, n_head=3, n_embd=6, dropout=0.3, bias=False)
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(0.1, 0.5, value.shape) for name, value in init_params(config).items()}
    return config, weights, tokenizer, tokenizer.encode("banana s").astype(np.int64)


SLOWEST_MS = 300_000  # on a machine that has much else to do

SUBJECTS = {
    "small": functools.cache(lambda: explorer.load_subject(None, None)),
    "two layers": functools.cache(two_layers),
}


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS, timeout=SLOWEST_MS)
        yield browser
        browser.close()


@functools.cache
def html(subject_name: str) -> str:
    return explorer.write_page(*SUBJECTS[subject_name]())


@pytest.fixture(params=SUBJECTS)
def subject_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def subject(subject_name: str) -> Subject:
    return SUBJECTS[subject_name]()


@pytest.fixture
def page(subject_name: str, browser: "sync_api.Browser", tmp_path: Path) -> Iterator["sync_api.Page"]:
    """The page of a subject in a tab. Afterwards: nothing was fetched but the page, and nothing was complained of."""
    file = tmp_path / "page.html"
    file.write_text(html(subject_name), encoding="utf-8")
    tab = browser.new_page(viewport=DESK)
    tab.set_default_timeout(SLOWEST_MS)
    requests, complaints = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(file.as_uri())
    yield tab
    tab.close()
    assert requests == [file.as_uri()]
    assert complaints == []


def decode(tensors: dict[str, dict]) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(base64.b64decode(tensor["base64"]), "<f8").reshape(tensor["shape"])
        for name, tensor in tensors.items()
    }


def assert_equal(ours: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(1e-300, np.abs(expected).max()))


@needs_browser
def test_tensors_are_numpygpts(page: "sync_api.Page", subject: Subject) -> None:
    """Weights, gradients, logits and loss, as the page has decoded them, to the last bit."""
    config, weights, _, ids = subject
    model = GPT(config, weights, dtype=np.float64)
    logits, _ = model.forward(ids[None, :-1], ids[None, 1:])
    loss, grads = model.loss_and_grads(ids[None, :-1], ids[None, 1:])
    expected = weights | {explorer.gradient_name(name): grad for name, grad in grads.items()}
    expected |= {"logits": logits[0], "loss": loss}
    values = page.evaluate("Object.fromEntries(Object.entries(TENSORS).map(([k, t]) => [k, [...t.data]]))")
    for name, value in expected.items():
        np.testing.assert_array_equal(np.reshape(values[name], np.shape(value)), value, err_msg=name)


@needs_browser
def test_the_pages_own_forward_pass(page: "sync_api.Page", subject: Subject) -> None:
    """model.js gives numpygpt's logits and loss, with the weights as they are and with others."""
    config, weights, _, ids = subject
    rng = np.random.default_rng(0)
    others = {name: value + rng.normal(0, 0.3, value.shape) for name, value in weights.items()}
    for params in (weights, others):
        logits, loss = GPT(config, params, dtype=np.float64).forward(ids[None, :-1], ids[None, 1:])
        given = {name: {"shape": value.shape, "data": value.ravel().tolist()} for name, value in params.items()}
        ours = page.evaluate(
            """given => {
                for (const tensor of Object.values(given)) tensor.data = new Float64Array(tensor.data);
                const result = forward(given, DATA.config, DATA.idx, DATA.targets);
                return [result.logits.map(row => [...row]), result.loss];
            }""",
            given,
        )
        assert_equal(np.array(ours[0]), logits[0])
        assert_equal(np.array(ours[1]), np.array(loss))


@needs_browser
def test_every_number_is_explained(page: "sync_api.Page") -> None:
    """Each number that a step gives is what the last line of its explanation comes to."""
    steps = page.evaluate(
        """() => SEQUENCE.map(step => step.give.filter(role => step.has(role)).map(role => {
            const {shape, data} = TENSORS[step.tensor(role)];
            const explained = Array.from(data, (_, i) => step.explain(step, role, indexAt(i, shape)).at(-1).value);
            return [`${step.part} ${step.direction} ${role}`, [...data], explained];
        })).flat()"""
    )
    assert len(steps) >= 50
    for name, values, explained in steps:
        values, explained = np.array(values), np.array(explained)
        np.testing.assert_array_equal(np.isinf(values), np.isinf(explained), err_msg=name)
        finite = np.isfinite(values)
        scale = np.abs(values[finite]).max()
        # A gradient may be what is left of larger terms that cancel: those are at most about 1 here.
        np.testing.assert_allclose(
            explained[finite], values[finite], rtol=0, atol=TOLERANCE * max(scale, 1e-3), err_msg=name
        )


@needs_browser
def test_every_step_is_drawn(page: "sync_api.Page", subject_name: str) -> None:
    """On a desk and on a phone: the numbers in the tables, marked code, an explanation, nothing wider than the page."""
    for viewport in (DESK, PHONE) if subject_name == "small" else (DESK,):
        page.set_viewport_size(viewport)
        steps = page.evaluate(
            """() => SEQUENCE.map((step, i) => {
                go(i);
                const count = selector => document.querySelectorAll(selector).length;
                const figures = [...document.querySelectorAll("#give figure")].map(figure => {
                    const cells = [...figure.querySelectorAll("td")];
                    return [figure.querySelector("sup")?.textContent ?? "0", cells.map(td => td.textContent),
                            cells.map(td => step.ref(td.dataset.role, ...indexOf(td)).value)];
                });
                return [document.documentElement.scrollWidth, count("#code mark"), count("#explain p"), figures];
            })"""
        )
        for number, (width, marked, explained, figures) in enumerate(steps):
            assert width <= viewport["width"], number
            assert marked, number
            assert explained >= 2, number
            assert figures, number
            for exponent, texts, values in figures:
                shown = [float(text.replace(MINUS, "-").replace("∞", "inf").replace("~", "")) for text in texts]
                unit = 10 ** float(exponent.replace(MINUS, "-"))
                digits = 0.0501 if max(map(abs, shown)) >= 10 else 0.00501
                np.testing.assert_allclose(shown, np.array(values) / unit, rtol=0, atol=digits)


@needs_browser
def test_the_tangent_is_the_gradient(page: "sync_api.Page", subject: Subject) -> None:
    """For one entry of each parameter: the line's slope on the screen is numpygpt's gradient, and the curve's slope."""
    config, weights, _, ids = subject
    _, grads = GPT(config, weights, dtype=np.float64).loss_and_grads(ids[None, :-1], ids[None, 1:])
    rng = np.random.default_rng(0)
    for name, grad in grads.items():
        index = tuple(int(rng.integers(n)) for n in grad.shape)
        line = page.evaluate(
            """([name, index]) => {
                grab(name, index);
                const h = 1e-5, numeric = (answer(held.before + h).loss - answer(held.before - h).loss) / (2 * h);
                const ends = selector => {
                    const points = document.querySelector(selector).getAttribute("d").slice(1).split("L");
                    return points.map(point => point.split(" ").map(Number));
                };
                const losses = held.curve.map(([, loss]) => loss), curve = ends(".loss"), tangent = ends(".tangent");
                const low = losses.indexOf(Math.min(...losses)), high = losses.indexOf(Math.max(...losses));
                const lossPerPixel = (losses[high] - losses[low]) / (curve[low][1] - curve[high][1]);
                return {
                    numeric, miss: Math.abs(answer(held.before).loss - TENSORS.loss.data[0]),
                    drawn: lossPerPixel * (tangent[0][1] - tangent[1][1]) / (2 * held.reach),
                };
            }""",
            [name, list(index)],
        )
        assert line["miss"] <= 1e-12
        assert line["numeric"] == pytest.approx(grad[index], rel=1e-6, abs=1e-8), name
        assert line["drawn"] == pytest.approx(grad[index], rel=1e-6, abs=1e-9), name


@needs_browser
@pytest.mark.parametrize("subject_name", ["small"])
def test_move_a_weight(page: "sync_api.Page", subject: Subject) -> None:
    """With the keyboard alone: the loss and the probabilities on the page are those of the model with that weight."""
    config, weights, _, ids = subject
    page.evaluate("grab('h.0.mlp.c_fc.weight', [3, 2])")
    page.focus("#move")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    value = float(page.input_value("#move"))
    assert value > weights["h.0.mlp.c_fc.weight"][3, 2]
    moved = {name: array.copy() for name, array in weights.items()}
    moved["h.0.mlp.c_fc.weight"][3, 2] = value
    logits, loss = GPT(config, moved, dtype=np.float64).forward(ids[None, :-1], ids[None, 1:])
    assert float(page.locator("#readout b").first.inner_text()) == pytest.approx(loss, rel=1e-5)
    probs = numpygpt.softmax_forward(logits[0])
    shown = [float(text) for text in page.locator("#targets .row > span:last-child").all_inner_texts()]
    np.testing.assert_allclose(shown, probs[np.arange(len(ids) - 1), ids[1:]], atol=5.1e-4)
    cell = page.locator("#weights figure:first-child td.chosen")
    assert float(cell.inner_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(value, abs=6e-3)
    kept = page.evaluate("[...TENSORS['h.0.mlp.c_fc.weight'].data]")
    np.testing.assert_array_equal(kept, weights["h.0.mlp.c_fc.weight"].ravel(), err_msg="the page's own weight moved")
    page.click("#back")
    assert float(page.input_value("#move")) == pytest.approx(weights["h.0.mlp.c_fc.weight"][3, 2], abs=1e-9)
    assert len(set(page.locator("#readout b").all_inner_texts())) == 1


@needs_browser
@pytest.mark.parametrize("subject_name", ["small"])
def test_keys(page: "sync_api.Page") -> None:
    """Arrow keys step; space plays and stops; in a table the arrow keys move, and Esc leaves it."""

    def press(*keys: str) -> int:
        for key in keys:
            page.keyboard.press(key)
        return page.evaluate("current")

    last = page.evaluate("SEQUENCE.length") - 1
    assert press("ArrowRight", "ArrowRight", "ArrowLeft") == 1
    assert press("End") == last
    assert press("ArrowRight") == last
    assert press("Home") == 0
    press(" ")
    assert page.inner_text("#play") == "pause"
    sync_api.expect(page.locator("#where")).to_contain_text("2 of")
    press(" ")
    assert page.inner_text("#play") == "play"
    press("Home")
    page.focus("#maps td[data-role=x][data-index='0,0']")
    assert press("ArrowDown", "ArrowDown", "ArrowRight") == 0
    assert page.inner_text("#explain b") == "x[2, 1]"
    assert press("Escape", "ArrowRight") == 1


@needs_browser
@pytest.mark.parametrize("subject_name", ["small"])
def test_point_at_a_cell(page: "sync_api.Page") -> None:
    """Its sources are framed; a click keeps it; a weight can be taken from where it is seen."""
    page.evaluate("go(3)")  # the linear layer of q, k and v
    page.hover("#maps td[data-role=out][data-index='4,7']")
    framed = page.evaluate(
        "[...document.querySelectorAll('.source')].map(td => td.dataset.role + ' ' + td.dataset.index)"
    )
    assert framed == [*(f"x 4,{i}" for i in range(8)), *(f"weight 7,{i}" for i in range(8)), "bias 7"]
    page.click("#maps td[data-role=weight][data-index='5,6']")
    page.hover("#maps td[data-role=out][data-index='0,0']")
    assert page.inner_text("#explain b") == "weight[5, 6]"
    page.click("#explain button")
    assert page.evaluate("[held.name, held.place]") == ["h.0.attn.c_attn.weight", 5 * 8 + 6]
    assert page.evaluate("document.activeElement.id") == "move"


@needs_browser
@pytest.mark.parametrize("subject_name", ["small"])
def test_light_and_dark(page: "sync_api.Page") -> None:
    """The reader's own setting decides, and text on the strongest colours has a contrast of at least 4.5 (WCAG AA)."""
    papers = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.evaluate("go(0)")
        colors = page.evaluate(
            """() => ['--paper', '--ink', '--positive', '--negative'].map(name => {
                const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
                return (hex.length === 3 ? [...hex].map(c => c + c) : hex.match(/../g)).map(c => parseInt(c, 16));
            })"""
        )
        paper, ink, *fills = (np.array(color) / 255 for color in colors)
        papers.add(tuple(paper))
        luminance = [
            np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
            for c in (ink, *fills)
        ]
        for fill in luminance[1:]:
            assert (max(fill, luminance[0]) + 0.05) / (min(fill, luminance[0]) + 0.05) >= 4.5
    assert len(papers) == 2


def split(html: str) -> tuple[str, dict[str, np.ndarray]]:
    """A page without its tensors, and the tensors."""
    match = re.search(r"const ENCODED = (\{.*?\n\});\n", html, re.DOTALL)
    return html.replace(match[1], ""), decode(json.loads(match[1]))


def test_the_committed_page_is_todays() -> None:
    """docs/explorer.html is what `python -m learn.explorer` writes, of at most 1.5 MB.

    Its weights are equal, as they are rounded to two decimals. Activations and gradients are compared to 1e-9: another
    machine's BLAS adds in another order.
    """
    committed = (ROOT / "docs/explorer.html").read_text(encoding="utf-8")
    assert len(committed.encode()) <= 1_500_000
    config, weights, tokenizer, ids = SUBJECTS["small"]()
    page, tensors = split(committed)
    page_today, tensors_today = split(explorer.write_page(config, weights, tokenizer, ids))
    hint = "write it with: python -m learn.explorer --out docs/explorer.html"
    assert page == page_today, hint
    assert tensors.keys() == tensors_today.keys(), hint
    for name, value in tensors_today.items():
        if name in weights:
            np.testing.assert_array_equal(tensors[name], value, err_msg=hint)
        largest = np.abs(value[np.isfinite(value)]).max()
        np.testing.assert_allclose(tensors[name], value, rtol=1e-9, atol=1e-9 * largest, err_msg=f"{name}: {hint}")


def test_code_is_read_from_the_file() -> None:
    """A line of code on the page is the line of numpygpt.py with its number; a place that is gone is an error."""
    lines = (ROOT / "numpygpt.py").read_text(encoding="utf-8").splitlines()
    for name in ("layernorm_backward", "scaled_dot_product_attention_forward", "gpt_backward"):
        _, code = explorer.source(name)
        assert f"def {name}(" in code[0][1]
        assert not any('"""' in line for _, line in code)
        assert all(lines[number - 1] == line for number, line in code)
    with pytest.raises(ValueError, match="no such lines: gelu_forward: sinh"):
        explorer.locate("gelu_forward: sinh")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a run without a prompt, a prompt that is too long or has strangers in it, and what is too large."""

    def refusal(*argv: object) -> str:
        return refused(lambda: run_program(lambda: explorer.main([*map(str, argv), "--out", str(out)])), capsys)[1]

    out, run = tmp_path / "page.html", tmp_path / "run"
    assert start("numpy", write_text(tmp_path), run, n_layer=1, n_embd=8, max_steps=2) == 0
    assert "--prompt must be given with a run" in refusal(run)
    assert "--prompt must have 2 to 13 tokens" in refusal("--prompt", "the cat sat on the mat")
    assert "--prompt must have 2 to 13 tokens" in refusal("--prompt", "a")
    assert "'z'" in refusal("--prompt", "the zoo")
    monkeypatch.setattr(explorer, "MAX_PARAMS", 100)
    assert "room for 100 parameters" in refusal(run, "--prompt", "The king")
    monkeypatch.setattr(explorer, "MAX_PARAMS", 40_000)
    monkeypatch.setattr(explorer, "MAX_BYTES", 50_000)
    assert "room for 50,000 bytes" in refusal(run, "--prompt", "The king")
    assert not out.exists()
    monkeypatch.setattr(explorer, "MAX_BYTES", 1_500_000)
    assert explorer.main([str(run), "--prompt", "The king", "--out", str(out)]) == 0
    assert split(out.read_text(encoding="utf-8"))[1]["logits"].shape[0] == len("The king") - 1


def test_it_needs_no_torch() -> None:
    """The explorer is for those who have installed requirements.txt alone."""
    check = "import sys, learn.explorer.page; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=60)
