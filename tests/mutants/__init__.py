"""Small bugs, each of which the suite must notice.

A mutant is one of the project's files with a few characters replaced. table.py lists them, with the check that catches
each; `planted` loads the mutated source in place of the module, for as long as its `with` lasts.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import pytest

from tests.helpers import ROOT


@dataclass(frozen=True)
class Mutant:
    """name: what is wrong; replaced: text that stands just once in the file; by: what takes its place; killed_by: the
    test that fails, as pytest calls it, without the folder."""

    name: str
    file: str
    replaced: str
    by: str
    killed_by: str

    def source(self) -> str:
        """The mutated source. Raises ValueError if `replaced` does not stand in the file, or not just once."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if (found := source.count(self.replaced)) != 1:
            raise ValueError(
                f"mutant {self.name!r}: {self.replaced!r} stands {found} times in {self.file}, not once. "
                "The source has changed: change the table too"
            )
        return source.replace(self.replaced, self.by)


@contextmanager
def planted(file: str, source: str) -> Iterator[None]:
    """Inside, the module of `file` is what `source` says, for everyone in the project who has imported from it."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    before = dict(vars(module))
    try:
        exec(compile(source, str(ROOT / file), "exec"), vars(module))
        fresh = {
            id(value): vars(module).get(name, value) for name, value in before.items() if is_defined_in(module, value)
        }
        with rebound(fresh, but=module):
            yield
    finally:
        vars(module).clear()
        vars(module).update(before)


def is_defined_in(module: ModuleType, value: object) -> bool:
    """True for functions and classes that a reload makes anew."""
    return callable(value) and getattr(value, "__module__", None) == module.__name__


@contextmanager
def rebound(fresh: dict[int, object], but: ModuleType) -> Iterator[None]:
    """Inside, the project's other modules have the fresh objects under the names that they imported the old ones by."""
    undo = []
    for module in list(sys.modules.values()):
        if module is but or not str(getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in fresh:
                undo.append((module, name, value))
                setattr(module, name, fresh[id(value)])
    try:
        yield
    finally:
        for module, name, value in undo:
            setattr(module, name, value)


def find_check(test: str) -> Callable[[], object]:
    """The test "file.py::name" or "file.py::name[parameter]" as a call; a property test with few examples.

    Raises ValueError if there is no such test.
    """
    file, _, name = test.partition("::")
    name, _, parameter = name.removesuffix("]").partition("[")
    path = next((ROOT / "tests").rglob(file), None)
    if path is None:
        raise ValueError(f"no file {file} in tests/")
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"no test {test}")
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    cases = {"-".join(ids): values for ids, values in map(joined, product(*map(named_cases, marks)))}
    if parameter not in cases:
        raise ValueError(f"no test {test}: the parameter is one of {', '.join(cases)}")
    check = getattr(function, "quick", function)
    return lambda: check(**cases[parameter])


def named_cases(mark: pytest.Mark) -> Iterator[tuple[str, dict[str, object]]]:
    """(id, keywords) of each case of a parametrize mark, the id as pytest makes it."""
    names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
    names = [name.strip() for name in names]
    ids = mark.kwargs.get("ids")
    given = list(ids) if ids is not None and not callable(ids) else None
    for place, case in enumerate(mark.args[1]):
        values = tuple(case) if len(names) > 1 else (case,)
        named = "-".join(ids(value) if callable(ids) else getattr(value, "__name__", str(value)) for value in values)
        yield given[place] if given else named, dict(zip(names, values, strict=True))


def joined(cases: tuple[tuple[str, dict[str, object]], ...]) -> tuple[list[str], dict[str, object]]:
    """The ids and the keywords of several marks together."""
    keywords: dict[str, object] = {}
    for _, values in cases:
        keywords |= values
    return [name for name, _ in cases], keywords
