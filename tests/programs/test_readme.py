"""README.md: each of its commands is run, shortened; its numbers are those of docs/. Other pages' commands are parsed.

A command is what stands in a code block or between backticks and begins with the name of a program. It runs as it was
typed, in this process, in a folder of its own, with a few flags that make it short. Where a command names a run, that
run is there: a small one, trained on a short text.
"""

import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tests import report
from tests.mutants.table import MUTANTS
from tests.runs import ROOT, start, write_text

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARITY = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
PROGRAMS = ("python", "pip", "pytest", "torchrun", "ruff", "jupyter", "hf")

# What is not run here, by how it begins, and why. Flags are checked all the same, but for the first two kinds.
OTHERS_TOOLS = {
    "python -m venv": ".ci/run begins so",
    "pip install": "needs a package index; .ci/run does it",
    "pytest": "is this suite",
    "python -m pytest": "is this suite",
    "ruff": "is no part of the project; .ci/run does it",
    "jupyter nbconvert": "takes minutes; test_notebook.py executes the notebook, shortened",
    "hf download": "needs a network",
}
NOT_RUN = OTHERS_TOOLS | {
    "python -m bench.cpu": "measures for minutes",
    "python -m bench.gpu": "needs a GPU",
    "python -m tests.report": "measures for minutes, and writes docs/parity.md",
    "python -m data.corpus": "writes into data/, or needs a network; test_data.py does both elsewhere",
}

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --max-steps 2 --data text.txt"
SHORT = {
    "train_numpy.py": TINY,
    "train_torch.py": f"{TINY} --device cpu",
    "sample.py": "--max-new-tokens 5",
    "bigram.py": "--data text.txt --steps 2",
}
ALWAYS_SHORT = ("--max-steps", "--max-new-tokens")  # even where the command names a number


def commands(page: Path) -> list[str]:
    """Every command on a page, once, in their order."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [part for line in [*"\n".join(blocks).splitlines(), *inline] for part in line.split(" && ")]
    found = (re.sub(r"\s+#.*|\s+>.*", "", line).strip() for line in lines)
    begins = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) (?!\.\.\.)|pytest$")
    return list(dict.fromkeys(line for line in found if begins.match(line)))


def reason(command: str, reasons: dict[str, str]) -> str | None:
    """Why a command is not run, if it is not."""
    bare = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
    return next((why for beginning, why in reasons.items() if bare.startswith(beginning)), None)


def execute(program: Sequence[str], arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`python *program *arguments` in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", [program[-1], *arguments])
    try:
        if program[0] == "-m":
            monkeypatch.delitem(sys.modules, program[1], raising=False)  # or runpy warns that it is there already
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def parts(command: str) -> tuple[list[str], list[str]]:
    """A command of Python's -> the program, as [file] or as ["-m", module], and its arguments."""
    words = shlex.split(re.sub(r"\$[A-Z]+", "1", command))[1:]
    size = 2 if words[0] == "-m" else 1
    return words[:size], words[size:]


def shortened(program: str, arguments: list[str]) -> list[str]:
    """The arguments, with those of SHORT that are not there yet; a run that is resumed keeps what it has."""
    short = shlex.split(SHORT.get(program, ""))
    short = dict(zip(short[::2], short[1::2], strict=True))
    if "--resume" in arguments:
        short = {flag: value for flag, value in short.items() if flag == "--device"} | {"--max-steps": "4"}
    words = list(arguments)
    for flag, value in short.items():
        if flag not in words:
            words += [flag, value]
        elif flag in ALWAYS_SHORT:
            words[words.index(flag) + 1] = value
    return words


def prepare(command: str, folder: Path) -> None:
    """Put there what the command expects: texts, and the runs that it reads."""
    write_text(folder).rename(folder / "my.txt")
    text = write_text(folder)
    words = shlex.split(command)
    for before, word in pairwise(words):
        if word.startswith("runs/") and before != "--run-dir":
            run_dir = folder / word.removesuffix("/last.safetensors")
            assert start("numpy", text, run_dir, max_steps=2, decay_steps=4) == 0


def readme_commands() -> list[str]:
    return [command for command in commands(README) if reason(command, NOT_RUN) is None]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(command, tmp_path)
    if command.startswith("torchrun "):
        words = shlex.split(command)[1:]
        place = words.index("train_torch.py")
        launcher = [sys.executable, "-m", "torch.distributed.run", *words[:place], str(ROOT / words[place])]
        argv = [*launcher, *shortened(words[place], words[place + 1 :])]
        done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        return
    program, arguments = parts(command)
    status = execute(program, shortened(program[-1], arguments), monkeypatch)
    assert status == 0, f"{command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_commands_have_their_flags(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A failure: a page names a program or a flag that is not there."""
    monkeypatch.setenv("COLUMNS", "200")
    for command in commands(page):
        if reason(command, OTHERS_TOOLS) is not None:
            continue
        if command.startswith("torchrun "):
            command = "python " + command[command.index("train_torch.py") :]
        program, arguments = parts(command)
        subcommand = arguments[:1] if program[-1] == "tools.export" else []
        status = execute(program, [*subcommand, "--help"], monkeypatch)
        printed = capsys.readouterr()
        assert status == 0, f"{page.name}: {command}: {printed.err}"
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert re.search(rf"{flag}(?![\w-])", printed.out), f"{page.name}: {command}: no {flag}"


def test_readme_commands_are_found() -> None:
    """A failure: the search for commands has gone blind, or a reason for not running one is out of date."""
    every = [command for page in PAGES for command in commands(page)]
    assert len(readme_commands()) >= 12
    assert {"python train_numpy.py", "python bigram.py"} <= set(readme_commands())
    assert any(command.startswith("torchrun ") for command in readme_commands())
    for beginning in NOT_RUN:
        assert any(reason(command, {beginning: ""}) is not None for command in every), f"nobody writes {beginning}"


def test_readme_leads_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    for page in [*PAGES[1:], *(ROOT / "notebooks").glob("*.ipynb")]:
        assert f"]({page.relative_to(ROOT).as_posix()})" in text, f"README.md has no link to {page.name}"


def test_readme_files_of_requirements_are_there() -> None:
    for page in PAGES:
        for file in re.findall(r"pip install -r (\S+)", page.read_text(encoding="utf-8")):
            assert (ROOT / file).exists(), f"{page.name}: no {file}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: what README says is what the pages say, which the programs wrote


def test_the_report_calls_tests_as_they_are() -> None:
    """A failure: a test has other parameters now, and python -m tests.report would end in a traceback."""
    for test, calls in report.tests_that_measure():
        for arguments in calls:
            inspect.signature(test).bind(*arguments)


def test_docs_parity_lists_the_mutants() -> None:
    """A failure: the table of mutants has changed since; `python -m tests.report --only-mutants` writes it anew."""
    written = PARITY[PARITY.index(report.MUTANTS_HEADING) :].splitlines()
    expected = report.mutants().splitlines()
    assert set(expected) - set(written) == set(), "mutants that docs/parity.md does not have"
    assert set(written) - set(expected) == set(), "mutants of docs/parity.md that are not there"
    assert written == expected


def test_readme_numbers_are_those_of_docs_parity() -> None:
    text = README.read_text(encoding="utf-8")
    assert f"{len(MUTANTS)} small bugs" in text
    (examples,) = re.findall(r"(\d+) random models a column", PARITY)
    assert f"errors of {examples} random models" in text
    header, *rows = [cells(line) for line in re.findall(r"^\|(?: tensor | `).*$", PARITY, flags=re.MULTILINE)]
    rows = [row for row in rows if len(row) == len(header) and row[0].strip("`") in report.KINDS]
    assert len(rows) == len(report.KINDS)
    columns = [header.index(name) for name in ("PyTorch, float64", "with dropout, float64", "Hugging Face, float64")]
    logits, loss, *gradients = ([row[column] for column in columns] for row in rows)
    largest = [max(column, key=float) for column in zip(*gradients, strict=True)]
    for name, expected in {"logits": logits, "loss": loss, "any gradient": largest}.items():
        (line,) = re.findall(rf"^\| {name} \|.*$", text, flags=re.MULTILINE)
        assert cells(line)[1:4] == expected, name


def test_readme_speeds_are_those_of_docs_benchmarks() -> None:
    _, _, after = README.read_text(encoding="utf-8").partition("## Speed")
    ratios = re.findall(r"^\| [^|]+ \| (\d\.\d\d) \|$", after.partition("\n## ")[0], flags=re.MULTILINE)
    assert len(ratios) == 3
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for ratio in ratios:
        assert f"| {ratio} (" in measured, ratio


def cells(line: str) -> list[str]:
    """The cells of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]
