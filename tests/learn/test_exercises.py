"""learn.exercises: numpygpt.py's own lines pass, every known mistake is named, and what does not run is one line."""

import inspect
import sys
import textwrap
from pathlib import Path

import pytest

import numpygpt
from common.cli import run_program
from learn import exercises
from learn.exercise_list import EXERCISES, Exercise
from learn.exercises import EMPTY, learner_file, main
from learn.mistakes import MISTAKES
from tests.helpers import ROOT

ROWS = [
    pytest.param(exercise, function, *row, id=f"{function}: {row[0]}")
    for exercise in EXERCISES.values()
    for function in exercise.write
    for row in MISTAKES[function]
]
TRANSPOSED = ["x, d = saved[0].reshape(-1, 5), dout.reshape(-1, 4)", "return dout @ saved[1], x.T @ d, d.sum(0)"]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`check`, for a learner who has written this text -> the exit status, and what it says."""

    def write_and_check(exercise: Exercise, text: str) -> tuple[int, str]:
        (tmp_path / f"{exercise.name}.py").write_text(text, encoding="utf-8")
        status = run_program(lambda: main(["check", exercise.name, "--dir", str(tmp_path)]))
        said = capsys.readouterr()
        return status, said.out + said.err

    return write_and_check


def with_body(name: str, *lines: str) -> tuple[Exercise, str]:
    """The file of an exercise with these lines where it is empty."""
    exercise = EXERCISES[name]
    text = learner_file(exercise)
    assert text.count(EMPTY) == len(exercise.write)
    return exercise, text.replace(EMPTY, textwrap.indent("\n".join(lines), "    "))


@each_exercise
def test_the_reference_solution_passes(exercise: Exercise, check) -> None:
    status, said = check(exercise, learner_file(exercise, empty=False))
    assert status == 0, said
    assert "WRONG" not in said


@pytest.mark.parametrize(("exercise", "function", "mistake", "replaced", "by"), ROWS)
def test_every_mistake_is_named(exercise, function, mistake, replaced, by, check) -> None:
    def source(name: str) -> str:
        value = numpygpt
        for part in name.split("."):
            value = getattr(value, part)
        text = inspect.getsource(value)
        assert name != function or text.count(replaced) == 1
        return textwrap.dedent(text.replace(replaced, by) if name == function else text)

    text = learner_file(exercise, source, empty=False)
    status, said = check(exercise, text.replace("import numpy as np\n", "import numpy as np\nfrom numpygpt import *\n"))
    assert status == 1
    assert f"what comes out with this mistake: {mistake}\n" in said


@each_exercise
def test_an_empty_solution_is_one_line(exercise: Exercise, check) -> None:
    status, said = check(exercise, learner_file(exercise))
    assert (status, said.count("\n")) == (1, 1)
    assert "is still empty" in said


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("softmax_backward", ["return dprobs * prob"], ", line 24: NameError: name 'prob' is not defined"),
        ("softmax_backward", ["return dprobs *"], ", line 24: invalid syntax"),
        ("softmax_backward", ["while True:", "    pass"], "TimeoutError: not done after 1 s"),
        ("softmax_backward", ["pass"], "softmax_backward must return dx, it returns nothing"),
        ("softmax_backward", ["raise NotImplementedError()"], "is still empty"),
        ("softmax_backward", ["dprobs *= probs", "return dprobs"], "changes its first argument in place"),
        ("linear_backward", ["return dout @ saved[1]"], "must return dx, dweight, dbias, it returns 1 array"),
        ("linear_backward", ["raise SystemExit"], "SystemExit"),
        ("gpt_backward", ["return dlogits, {}"], "must return a dict of gradients, it returns 1 array"),
        ("clip_grad_norm", ["return 1 / 0"], "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_what_does_not_run_is_one_line(name, lines, expected, check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "TIME_LIMIT", 1)
    if "while True:" in lines and sys.platform == "win32":
        pytest.skip("no alarm on Windows")
    status, said = check(*with_body(name, *lines))
    assert (status, said.count("\n")) == (1, 1), said
    assert expected in said


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("softmax_backward", ["return np.full_like(probs, np.nan)"], "30 of 30 entries are NaN"),
        ("softmax_backward", ["return [1.0]"], "is [1.0], expected an array of shape (2, 3, 5)"),
        ("softmax_backward", ["return dprobs[0]"], "has shape (3, 5), expected (2, 3, 5)"),
        ("softmax_backward", ["return 0 * probs"], "all entries are 0"),
        ("softmax_backward", ["return -probs * (dprobs - (dprobs * probs).sum(-1, keepdims=True))"], "is -1 times"),
        ("softmax_backward", ["return dprobs + probs"], "30 of 30 entries are wrong; at [0, 0, 0] it is "),
        ("linear_backward", TRANSPOSED, "has shape (5, 4), its transpose, expected (4, 5)"),
        ("gpt_backward", ["return {}"], "is None, expected an array of shape (4, 3)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(name, lines, expected, check) -> None:
    status, said = check(*with_body(name, *lines))
    assert status == 1
    assert expected in said


def test_two_mistakes_in_two_tensors_are_both_named(check) -> None:
    _, said = check(
        *with_body(
            "layernorm_backward",
            "xhat, rstd, weight, _ = saved",
            "dxhat = dout * weight",
            "return rstd * (dxhat - mean_last_axis(dxhat)), sum_tokens(dout), sum_tokens(dout)",
        )
    )
    assert "right  dbias" in said
    assert "LayerNorm's backward without the projection" in said
    assert "the gain's gradient without xhat" in said


def test_a_cache_that_is_not_used_is_wrong(check) -> None:
    """The right tokens, but every step computes the whole window."""
    solution = learner_file(EXERCISES["kv_cache"], empty=False)
    status, said = check(EXERCISES["kv_cache"], solution.replace("start = window.shape[1]\n", "start = 0\n"))
    assert status == 1
    assert "right  tokens" in said
    assert "WRONG  how many tokens each step computes (short prompt)" in said


def test_start_hint_solution_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[1] for line in listed.splitlines()[: len(EXERCISES)]] == list(EXERCISES)
    start = ["start", "layernorm_backward", "--dir", str(tmp_path / "new")]
    assert main(start) == 0
    written = tmp_path / "new" / "layernorm_backward.py"
    text = written.read_text(encoding="utf-8")
    assert inspect.getsource(numpygpt.layernorm_forward) in text
    assert "dxhat" not in text
    assert run_program(lambda: main(start)) == 1
    assert "exists already" in capsys.readouterr().err
    assert written.read_text(encoding="utf-8") == text
    hints = []
    for level in ("1", "2"):
        assert main(["hint", "layernorm_backward", "--level", level]) == 0
        hints.append(capsys.readouterr().out)
    assert hints[0] != hints[1]
    assert main(["solution", "layernorm_backward"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line in inspect.getsource(numpygpt.layernorm_backward)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["check", "softmax"], "no exercise 'softmax'; there are softmax_backward, "),
        (["check"], "no exercise ''; there are softmax_backward, "),
        (["check", "softmax_backward", "--dir", "nowhere"], "start softmax_backward writes it"),
        (["hint", "softmax_backward", "--level", "3"], "(see python -m learn.exercises --help)"),
        (["begin"], "(see python -m learn.exercises --help)"),
    ],
)
def test_bad_commands_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda: main(argv)) != 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said


def test_the_mistakes_are_those_of_the_exercises() -> None:
    assert MISTAKES.keys() == {function for exercise in EXERCISES.values() for function in exercise.write}
    names = [row[0] for rows in MISTAKES.values() for row in rows]
    assert len(set(names)) == len(names)


def test_the_default_folder_is_ignored_by_git() -> None:
    assert "/exercises/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
