"""Imports run downwards only, never in a circle; those inside functions count. CONTRIBUTING.md has the same table."""

import ast
import graphlib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A room is a file or a folder; it may import from any floor below its own, and within itself.
FLOORS = [
    {"numpygpt", "common"},
    {"torchgpt", "data"},
    {"bigram"},
    {"training"},
    {"sample"},
    {"train_numpy", "train_torch"},
    {"tools"},
    {"learn", "bench"},
    {"tests"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in FLOOR_OF
    for path in [ROOT / f"{room}.py", *(ROOT / room).rglob("*.py")]
    if path.exists()
}


def imports_of(tree: ast.Module) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def project_imports() -> dict[tuple[str, str], int]:
    """{(importing module, imported module): line} of all imports between the project's own modules."""
    edges = {}
    for module, path in MODULES.items():
        for name, line in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            # "data.corpus.load_corpus" is in data.corpus; "data.corpus" may come from `from data import corpus`
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            target = next((prefix for prefix in prefixes if prefix in MODULES), None)
            if target is not None and target != module:
                edges.setdefault((module, target), line)
    return edges


EDGES = project_imports()


def test_every_file_has_a_floor() -> None:
    """A failure: a new file or folder at the top, and nobody has said which floor it is on."""
    at_the_top = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    at_the_top.discard("exercises")  # a learner's own files, which git ignores
    assert at_the_top <= FLOOR_OF.keys(), f"not in the table of floors: {at_the_top - FLOOR_OF.keys()}"


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_imports_run_downwards(room: str) -> None:
    """A failure: a lower floor knows about a higher one, or two rooms of one floor know about each other."""
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}, line {line}, imports {MODULES[target].relative_to(ROOT)}"
        for (module, target), line in EDGES.items()
        if (here := module.split(".")[0]) == room and here != (there := target.split(".")[0])
        if FLOOR_OF[there] >= FLOOR_OF[here]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_in_a_circle() -> None:
    """A failure: of the files in the circle, none can be read, or loaded, before the others."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, target in EDGES:
        graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # each imports the next
        steps = [
            f"{MODULES[a].relative_to(ROOT)}, line {EDGES[a, b]}, imports {MODULES[b].relative_to(ROOT)}"
            for a, b in pairwise(circle)
        ]
        raise AssertionError("a circle:\n" + "\n".join(steps)) from None


def test_contributing_has_the_same_table() -> None:
    """A failure: the table in CONTRIBUTING.md is not the one that is tested."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("| ") and line.split("|")[1].strip().isdigit()]
    table = [{name.strip(" `/").removesuffix(".py") for name in rooms.split(",")} for _, rooms in rows]
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS)))
    assert table == FLOORS
