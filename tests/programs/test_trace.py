"""learn.trace: it sees every tensor, changes nothing and finds a bug; and the page shows what the command prints."""

import re

import numpy as np
import pytest

import numpygpt
from common.errors import UserError
from learn import trace
from numpygpt import GPTConfig
from tests.helpers import ROOT, random_weights

PAGE = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
ROUNDING = 1e-12  # in float64, of tensors whose entries are at most some tens

CONFIGS = [
    GPTConfig(vocab_size=7, block_size=8, n_layer=3, n_head=2, n_embd=8, dropout=0.0),
    GPTConfig(vocab_size=2, block_size=80, n_layer=1, n_head=1, n_embd=3, dropout=0.5, bias=False),
]


def batch(config: GPTConfig, T: int) -> tuple[np.ndarray, np.ndarray]:
    """idx, targets (1, T)."""
    ids = np.random.default_rng(0).integers(config.vocab_size, size=T + 1)
    return ids[None, :-1], ids[None, 1:]


def read_line(line: str) -> tuple[str, list[float], float] | None:
    """A line of the table -> its name and shape, all printed values, the difference; None for any other line."""
    number = r"-?(?:inf|\d\.\d+e[+-]\d\d)"
    found = re.fullmatch(rf"(\S.*\([\d, ]*\))((?:\s+{number})+)\s+({number})", line)
    return found and (" ".join(found[1].split()), [float(value) for value in found[2].split()], float(found[3]))


def test_docs_trace_shows_what_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    assert 'python -m learn.trace "To be, or"' in PAGE
    assert trace.main(["To be, or"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rest, compared = iter(printed), 0
    for block in re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        for shown in (line for line in block.splitlines() if line != "..."):
            wanted = read_line(shown)
            if wanted is None:
                assert shown in rest, f"the command does not print this, or not here: {shown!r}"
                continue
            name, values, apart = wanted
            line = next((line for line in map(read_line, rest) if line and line[0] == name), None)
            assert line, f"the command does not print {name}, or not here"
            # Four digits are printed. The last may round either way, and so may what is 0 but for rounding.
            np.testing.assert_allclose(line[1], values, rtol=2e-3, atol=1e-14, err_msg=name)
            assert max(apart, line[2]) < ROUNDING
            compared += 1
    assert compared > 40
    assert len([line for line in map(read_line, printed) if line]) == int(printed[-1].split()[0])


def test_a_text_from_windows_is_the_same_text() -> None:
    plain, marked = (trace.example(trace.Options(text)) for text in ("a\nb", "\ufeffa\r\nb"))
    np.testing.assert_array_equal(marked[2], plain[2])


@pytest.mark.parametrize("config", CONFIGS, ids=["three layers", "longer than a block, no bias"])
def test_both_traces_hold_every_tensor_and_agree(config: GPTConfig) -> None:
    weights, (idx, targets) = random_weights(config, seed=2), batch(config, config.block_size)
    by_numpy = trace.trace_numpy(config, weights, idx, targets)
    by_torch = trace.trace_torch(config, weights, idx, targets)
    names = trace.activation_names(config)
    assert set(by_numpy.forward) == set(by_torch.forward) == set(names)
    assert set(by_numpy.backward) == set(by_torch.backward) == set(names) - {"loss"}
    assert list(by_numpy.grads) == list(numpygpt.param_shapes(config))
    for part in ("forward", "backward", "grads"):
        arrays, others = getattr(by_numpy, part), getattr(by_torch, part)
        for name, array in arrays.items():
            assert array.shape == others[name].shape, name
            assert trace.difference(array, others[name]) < ROUNDING, name
    assert by_numpy.forward["h.0.attn.att"].shape == (1, config.n_head, config.block_size, config.block_size)


def test_watching_changes_nothing() -> None:
    config = CONFIGS[0]
    weights, (idx, targets) = random_weights(config, seed=2), batch(config, 8)
    before = {name: value for name, value in vars(numpygpt).items() if callable(value)}
    traced = trace.trace_numpy(config, weights, idx, targets)
    assert {name: value for name, value in vars(numpygpt).items() if callable(value)} == before
    loss, grads = numpygpt.GPT(config, weights).loss_and_grads(idx, targets)
    assert traced.forward["loss"] == loss
    assert all((traced.grads[name] == grad).all() for name, grad in grads.items())


def test_the_first_line_that_differs_is_where_the_bug_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[0]
    weights, (idx, targets) = random_weights(config, seed=2), batch(config, 8)
    right = trace.trace_torch(config, weights, idx, targets)
    gelu_backward = numpygpt.gelu_backward
    monkeypatch.setattr(numpygpt, "gelu_backward", lambda dout, cache: 1.01 * gelu_backward(dout, cache))
    wrong = trace.trace_numpy(config, weights, idx, targets)
    differing = [
        read_line(line)[0].partition(" (1")[0]
        for line in trace.table(wrong, right, config)
        if read_line(line) and read_line(line)[2] > ROUNDING
    ]
    assert differing[0] == "h.2.mlp.dhidden (c_fc)"


def test_float32_and_another_seed(capsys: pytest.CaptureFixture) -> None:
    assert trace.main(["To be, or", "--dtype", "float32", "--seed", "7"]) == 0
    lines = [line for line in map(read_line, capsys.readouterr().out.splitlines()) if line]
    assert 1e-9 < max(apart for *_, apart in lines) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["R"], "text must have at least two tokens, got 'R'"),
        (["To be", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["To be", "--run", "no/such/run"], "no/such/run"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        trace.main(arguments)


def test_unknown_options_are_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        trace.main(["--no-such-option"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
