"""Write the GPT's functions yourself: each exercise empties one function of numpygpt.py, and checks what you put there.

    python -m learn.exercises                               # the exercises, in the order of numpygpt.py
    python -m learn.exercises start layernorm_backward      # writes exercises/layernorm_backward.py: fill in the body
    python -m learn.exercises check layernorm_backward      # tensor by tensor: right, or wrong and why
    python -m learn.exercises hint layernorm_backward       # --level 2 says more
    python -m learn.exercises solution layernorm_backward   # numpygpt.py's own lines

A backward is compared with finite differences of its forward, everything else with numpygpt.py. What is wrong is also
compared with what comes out of each known mistake (learn/mistakes.py): if they are equal, the mistake is named.
"""

import ast
import builtins
import functools
import inspect
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import numpygpt
from common.cli import parse, run_program
from common.errors import UserError, shorten
from common.files import write_new
from learn.exercise_list import EXERCISES, Exercise, Namespace, Outcome
from learn.mistakes import MISTAKES

PROGRAM = "python -m learn.exercises"
TIME_LIMIT = 20  # seconds for a learner's function, which may never end
EMPTY = "    raise NotImplementedError  # your lines go here"


# ---------------------------------------------------------------------------------------------------------------------
# The learner's file


def source_of(function: str) -> str:
    """The source of a function of numpygpt.py, or of a method Class.method, from the margin on."""
    value = functools.reduce(getattr, function.split("."), numpygpt)
    return textwrap.dedent(inspect.getsource(value))


def split(source: str) -> tuple[str, str]:
    """What a learner is given of a function, and what is left to write, without the docstring.

    Given are its head, the first paragraph of its docstring, and what stands before an endless loop.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    lines, docstring = source.splitlines(), function.body[0]
    assert docstring.end_lineno is not None
    first_paragraph = (ast.get_docstring(function) or "").split("\n\n")[0]
    head = [*lines[: docstring.lineno - 1], textwrap.indent(f'"""{first_paragraph}"""', "    ")]
    last = function.body[-1]
    start = last.lineno - 1 if isinstance(last, ast.While) else docstring.end_lineno
    return "\n".join([*head, *lines[docstring.end_lineno : start]]), "\n".join(lines[start:])


def learner_file(exercise: Exercise, source: Callable[[str], str] = source_of, empty: bool = True) -> str:
    """The text of the file to fill in. With empty=False, the solution is in it, as `source` has it."""
    functions = {name: source(name).rstrip() for name in exercise.shown}
    for name in exercise.write:
        head, body = split(source(name))
        functions[name] = f"{head}\n{EMPTY if empty else body}"
    methods = [textwrap.indent(text, "    ") for name, text in functions.items() if "." in name]
    parts = [text for name, text in functions.items() if "." not in name]
    if methods:
        owner = exercise.write[0].partition(".")[0]
        parts.append(f"class {owner}(numpygpt.{owner}):\n" + "\n\n".join(methods))
    trees = [ast.parse(source_of(name)) for name in functions]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    modules = {"math", "np", "numpygpt"}
    names = sorted((used & vars(numpygpt).keys()) - modules - functions.keys() - vars(builtins).keys())
    imports = "import math\n\n" * ("math" in used) + "import numpy as np\n\n" + "import numpygpt\n" * bool(methods)
    listed = textwrap.fill(", ".join(names), 110, initial_indent="    ", subsequent_indent="    ")
    imports += f"from numpygpt import (\n{listed},\n)" if "\n" in listed else f"from numpygpt import {listed.strip()}"
    about = f"{exercise.topic}: write the body of {' and of '.join(exercise.write)}."
    commands = "".join(f"    {PROGRAM} {command} {exercise.name}\n" for command in ("check", "hint"))
    return f'"""{about[0].upper()}{about[1:]}\n\n{commands}"""\n\n{imports}\n\n\n' + "\n\n\n".join(parts) + "\n"


def load(path: Path, exercise: Exercise) -> Namespace:
    """The names that a learner's file defines. Raises UserError if it is not there or does not run."""
    if not path.exists():
        raise UserError(f"{path} is not there; {PROGRAM} start {exercise.name} writes it")
    names: Namespace = {"__name__": exercise.name, "__file__": str(path)}
    with learners_errors(path):
        exec(compile(path.read_bytes(), str(path), "exec"), names)
    for name in {function.partition(".")[0] for function in exercise.write}:
        if not callable(names.get(name)):
            raise UserError(f"{path} does not define {name}")
    return names


@contextmanager
def learners_errors(path: Path) -> Iterator[None]:
    """Inside, whatever a learner's code raises becomes one line with its place; so does code that does not end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {TIME_LIMIT} s; does a loop never end?")

    if hasattr(signal, "SIGALRM"):  # not on Windows, where Ctrl-C has to do
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(TIME_LIMIT)
    try:
        with np.errstate(all="ignore"):
            yield
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(f"{path} is still empty: put your lines where it raises NotImplementedError") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {getattr(error, 'lineno', 1)}: {error.args[0]}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{place}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------
# Right or wrong, and why


def same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-9) -> bool:
    """Equal up to rounding: the tolerance is relative to the largest entry of b."""
    a, b = np.asarray(a), np.asarray(b)
    with np.errstate(all="ignore"):
        size = np.abs(b[np.isfinite(b)]).max(initial=1e-30)
        return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)


@functools.cache
def expected(exercise: Exercise) -> Outcome:
    return exercise.expected()


@functools.cache
def outcomes_of_mistakes(exercise: Exercise) -> dict[str, Outcome]:
    """What comes out of each known mistake in this exercise's functions."""
    outcomes = {}
    for function in exercise.write:
        owner = function.partition(".")[0]
        for mistake, replaced, by in MISTAKES[function]:
            names: Namespace = dict(vars(numpygpt))
            source = inspect.getsource(getattr(numpygpt, owner))
            assert source.count(replaced) == 1, f"{mistake}: {replaced!r} is not, or not just once, in {owner}"
            exec(source.replace(replaced, by), names)
            with np.errstate(all="ignore"):
                outcomes[mistake] = exercise.run(names)
    return outcomes


def why_wrong(exercise: Exercise, name: str, came: Outcome) -> str | None:
    """One line that says what is wrong with a tensor of all that came out; None if it is right."""
    array, right = came[name], np.asarray(expected(exercise)[name])
    if not isinstance(array, (np.ndarray, np.number, float, int)):
        return f"is {shorten(array)}, expected an array of shape {right.shape}"
    array = np.asarray(array)
    if array.shape != right.shape:
        turned = ", its transpose" if array.T.shape == right.shape and same(array.T, right, 1e-6) else ""
        return f"has shape {array.shape}{turned}, expected {right.shape}"
    if same(array, right, 1e-6):
        return None
    outcomes = outcomes_of_mistakes(exercise)
    fits = {
        mistake: sum(same(came[other], outcome[other]) for other in outcome)
        for mistake, outcome in outcomes.items()
        if same(array, outcome[name])
    }
    if fits:  # of two mistakes that explain this tensor, the one that explains more of the others
        best = [mistake for mistake in fits if fits[mistake] == max(fits.values())]
        return f"this is exactly what comes out with this mistake: {', or: '.join(best)}"
    if np.isnan(array).sum() > np.isnan(right).sum():
        return f"{np.isnan(array).sum()} of {array.size} entries are NaN"
    factor = np.vdot(right, array) / np.vdot(right, right) if np.any(right) else np.nan
    if same(array, factor * right, 1e-6):
        return "all entries are 0" if abs(factor) < 1e-6 else f"every entry is {factor:.6g} times what it should be"
    wrong = ~np.isclose(array, right, rtol=0, atol=1e-6 * np.abs(right).max())
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = f" at {list(where)}" if where else ""
    return (
        f"{wrong.sum()} of {wrong.size} entries are wrong;{place} it is {array[where]:.6g}, expected {right[where]:.6g}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class Options:
    """Write the GPT's functions yourself."""

    command: tyro.conf.Positional[Literal["list", "start", "check", "hint", "solution"]] = "list"
    """what to do"""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """the exercise"""
    dir: Path = Path("exercises")
    """the folder of your files"""
    level: Literal[1, 2] = 1
    """of a hint: 1 for a small one, 2 for nearly everything"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, PROGRAM, argv)
    if options.command == "list":
        for number, exercise in enumerate(EXERCISES.values(), 1):
            print(f"{number:2}  {exercise.name:40}{exercise.topic}")
        print(f"\n{PROGRAM} start NAME, then check NAME; hint NAME and solution NAME help")
        return 0
    if options.name not in EXERCISES:
        raise UserError(f"no exercise {shorten(options.name)}; there are {', '.join(EXERCISES)}")
    exercise = EXERCISES[options.name]
    path = options.dir / f"{exercise.name}.py"
    if options.command == "check":
        return check(exercise, path)
    if options.command == "start":
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(path, learner_file(exercise).encode())
        except FileExistsError:
            raise UserError(f"{path} exists already; check it, or delete it to start again") from None
        print(f"{path} is yours to fill in; then {PROGRAM} check {exercise.name}")
    elif options.command == "hint":
        print(exercise.hints[options.level - 1])
    else:
        print("\n\n".join(split(source_of(name))[1] for name in exercise.write))
    return 0


def check(exercise: Exercise, path: Path) -> int:
    """Print what is right and what is wrong; the exit status says whether all is right."""
    names = load(path, exercise)
    with learners_errors(path):
        came = exercise.run(names)
    found = {name: why_wrong(exercise, name, came) for name in expected(exercise)}
    print(f"{exercise.name}, checked against {exercise.checked_against}:")
    kinds = list(dict.fromkeys(found.values()))  # tensors of which the same is to be said are named together
    for verdict in kinds[:5]:
        tensors = ", ".join(name for name in found if found[name] == verdict)
        print(f"  right  {tensors}" if verdict is None else f"  WRONG  {tensors}\n         {verdict}")
    if len(kinds) > 5:
        print(f"  and {sum(found[name] in kinds[5:] for name in found)} more")
    if any(found.values()):
        print(f"Stuck? {PROGRAM} hint {exercise.name}")
        return 1
    following = [*EXERCISES, None][list(EXERCISES).index(exercise.name) + 1]
    print(f"All right. Next: {following}" if following else "All right. That was the last one.")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
