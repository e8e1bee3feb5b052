"""bench/cpu.py and bench/gpt2.py, on models so small that it takes no time: they run, and refuse what they must."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import cpu, gpt2
from numpygpt import GPTConfig
from tests.helpers import ROOT
from training.command import run_program

TINY = GPTConfig(65, 8, n_layer=1, n_head=2, n_embd=8, dropout=0.0)
FEW = ["--rounds", "1", "--threads", "1", "--no-compile"]


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PRESETS", {name: (TINY, 2) for name in cpu.PRESETS})


def rows(printed: str) -> dict[str, list[str]]:
    """The rows of all tables: name -> the other cells."""
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_steps_and_generation_of_both_engines(capsys: pytest.CaptureFixture) -> None:
    assert cpu.main(["--preset", "full", *FEW]) == 0
    table = rows(capsys.readouterr().out)
    for name in ("NumPy", "torchgpt, eager", "BLAS floor"):
        ms, tokens_per_s = (float(cell.replace(",", "")) for cell in table[name][:2])
        assert 2 * 8 * 1000 / tokens_per_s == pytest.approx(ms, abs=0.06), "of B 2 and T 8, in tenths"
    assert table["NumPy"][2] == "1.00 (1.00 to 1.00)"
    assert min(float(table[name][3]) for name in ("NumPy", "torchgpt, eager")) >= 0
    for name in ("within the window", "within the window, no cache", "past the window"):
        ours, theirs, relative = table[name]
        quotient = float(ours.replace(",", "")) / float(theirs.replace(",", ""))
        assert float(relative.split()[0]) == pytest.approx(quotient, rel=0.02, abs=0.01)


def test_a_profile_with_more_threads_than_sequences(capsys: pytest.CaptureFixture) -> None:
    assert cpu.main(["--preset", "small", "--profile", "--threads", "3"]) == 0
    table = rows(capsys.readouterr().out)
    assert {"AdamW.step", "attention_forward", "linear_backward", "all of it"} <= table.keys()


def test_gpt2_beside_the_others(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    config = GPTConfig(65, gpt2.PROMPT + 1, n_layer=1, n_head=2, n_embd=8, dropout=0.0)
    gpt2.measure_gpt2(rounds=1, threads=1, config=config)
    table = rows(capsys.readouterr().out)
    for engine in gpt2.ENGINES:
        prompt, _, generation, _, memory, _ = table[engine]
        assert min(float(cell.replace(",", "")) for cell in (prompt, generation)) > 0
        assert float(memory) >= 0
    assert table["NumPy"][1] == table["NumPy"][3] == "1.00 (1.00 to 1.00)"


def test_memory_is_in_millions_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.Path, "exists", lambda path: True)
    monkeypatch.setattr(cpu.Path, "read_text", lambda path: "VmPeak:\t9999999 kB\nVmHWM:\t 1000000 kB\nVmRSS:\t 9 kB\n")
    assert cpu.high_water() == 1024, "Linux counts in kB of 1024 bytes"
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=2_500_000))
    monkeypatch.setattr(cpu.Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert cpu.high_water() == 2.5, "macOS in bytes"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--preset", "gpt2", "--profile"], "profile is of a training step"),
        (["--preset", "tiny"], "tiny"),
    ],
)
def test_what_makes_no_sense_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_program(lambda: cpu.main(argv)) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err)
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "package"),
    [
        (["--preset", "small"], "torch"),
        (["--preset", "small"], "threadpoolctl"),
        (["--preset", "gpt2"], "transformers"),
    ],
)
def test_a_missing_package_is_one_line_before_anything_is_measured(
    argv: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ModuleNotFoundError
    monkeypatch.setattr(cpu, "alternate", measure)
    monkeypatch.setattr(gpt2, "write_models", measure)
    assert run_program(lambda: cpu.main([*argv, *FEW])) == 1
    message = f"error: needs the package {package}: pip install -r requirements-dev.txt\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("module", ["bench.cpu", "bench.tokenizers", "tools.trace"])
def test_a_program_loads_without_what_only_its_work_needs(module: str) -> None:
    """So that run_program can say what is missing; and Windows has no resource."""
    code = f"import sys; sys.modules.update(dict.fromkeys(['torch', 'threadpoolctl', 'resource'])); import {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_where_memory_cannot_be_measured_nothing_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cpu.Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert run_program(lambda: cpu.main(["--preset", "gpt2", *FEW])) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: this bench measures memory too, which it can on Linux and macOS only\n"
    assert printed.out == ""
