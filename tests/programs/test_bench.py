"""-m bench.cpu, gpt2.py and gpu.py, on models so small that they take no time: they run, and refuse what they must."""

import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_torch
from bench import cpu, gpt2, gpu, timing
from common.cli import run_program
from common.errors import UserError
from data.corpus import load_corpus
from numpygpt import GPTConfig
from tests.helpers import ROOT
from tests.runs import arguments, measured, refused, write_text
from training.config import PRESETS, ModelFlags, Preset

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
    monkeypatch.setattr(timing.Path, "exists", lambda path: True)
    monkeypatch.setattr(
        timing.Path, "read_text", lambda path: "VmPeak:\t9999999 kB\nVmHWM:\t 1000000 kB\nVmRSS:\t 9 kB\n"
    )
    assert timing.high_water() == 1024, "Linux counts in kB of 1024 bytes"
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=2_500_000))
    monkeypatch.setattr(timing.Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", usage)
    assert timing.high_water() == 2.5, "macOS in bytes"


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


@pytest.mark.parametrize("module", ["bench.cpu", "bench.subwords", "learn.trace"])
def test_a_program_loads_without_what_only_its_work_needs(module: str) -> None:
    """So that run_program can say what is missing; and Windows has no resource."""
    code = f"import sys; sys.modules.update(dict.fromkeys(['torch', 'threadpoolctl', 'resource'])); import {module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_where_memory_cannot_be_measured_nothing_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(timing.Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert run_program(lambda: cpu.main(["--preset", "gpt2", *FEW])) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: this bench measures memory too, which it can on Linux and macOS only\n"
    assert printed.out == ""


# ---------------------------------------------------------------------------------------------------------------------
# bench/gpu.py, without a GPU


RECIPE = {"--max-steps": 7, "--eval-interval": 3, "--batch-size": 4, "--warmup-steps": 2}


@pytest.fixture
def small_gpu_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """bench/gpu.py with a tiny recipe for every preset, and a short text: its path."""
    text = write_text(tmp_path)
    recipe = {name[2:].replace("-", "_"): value for name, value in RECIPE.items()}
    training = replace(PRESETS["tiny"].training, **recipe)
    preset = Preset(ModelFlags(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.2), training)
    monkeypatch.setattr(gpu, "PRESETS", {"tiny": preset, "full": preset})
    monkeypatch.setattr(gpu, "load_corpus", lambda name: load_corpus(str(text)))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # its compiler would take most of a minute
    return text


def test_every_contender_takes_turns_with_the_plain_loop(small_gpu_bench: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--device", "cpu", "--presets", "tiny", "--rounds", "1", "--steps", "2", "--seeds", "0"]) == 0
    table = rows(capsys.readouterr().out)
    ours = [f"{mode}, {dtype}" for mode in ("eager", "compiled") for dtype in ("float32", "bfloat16")]
    names = ["plain loop, compiled, bfloat16", "plain loop, eager, bfloat16", *ours]
    assert list(table) == ["", *(f"tiny: {name}" for name in names)]
    for name in table.keys() - {""}:
        ms, tokens_per_s = (float(cell.replace(",", "")) for cell in table[name][:2])
        rounded = 0.006 + 0.6 * ms / tokens_per_s  # the time to hundredths, and the tokens, which are few here, to one
        assert 4 * 16 * 1000 / tokens_per_s == pytest.approx(ms, abs=rounded), "of B 4 and T 16"
        assert float(table[name][2].split()[0]) > 0


def test_a_contender_that_fails_or_falls_back_has_no_numbers(
    small_gpu_bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def compile_fails(model: torch.nn.Module, **options: object) -> Callable:
        def call(*batch: torch.Tensor) -> None:
            raise RuntimeError("no compiler")

        return call if isinstance(model, train_torch.Loss) else model

    monkeypatch.setattr(torch, "compile", compile_fails)
    assert gpu.main(["--device", "cpu", "--presets", "tiny", "--rounds", "1", "--steps", "1", "--seeds", "0"]) == 0
    table = rows(capsys.readouterr().out)
    for dtype in ("float32", "bfloat16"):
        assert table[f"tiny: compiled, {dtype}"][0].startswith("failed: UserError: it continued without")
        assert table[f"tiny: compiled, {dtype}"][1:] == [""] * 5
        assert float(table[f"tiny: eager, {dtype}"][0]) > 0


def test_the_recipe_ends_in_the_losses_of_train_torch(
    small_gpu_bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected = {}
    for seed in (1337, 1338):
        flags = {"--preset": "tiny", "--n-layer": 1, "--n-embd": 16, "--block-size": 16, "--dropout": 0.2} | RECIPE
        flags |= {"--data": small_gpu_bench, "--run-dir": tmp_path / str(seed), "--dtype": "bfloat16", "--seed": seed}
        assert train_torch.main(arguments(flags | {"--device": "cpu"})) == 0
        lines = [line for line in measured(tmp_path / str(seed)) if line["protocol"] == "full" and line["step"]]
        expected[seed] = min((line["loss"], line["step"]) for line in lines)
    monkeypatch.setattr(gpu, "NANOGPT_LOSS", expected[1337][0])
    capsys.readouterr()

    gpu.train_recipe(gpu.Options(device="cpu", seeds=2), load_corpus(str(small_gpu_bench)))
    table = rows(capsys.readouterr().out)
    for seed, (loss, step) in expected.items():
        assert float(table[str(seed)][4]) == pytest.approx(loss, abs=6e-5)
        assert table[str(seed)][5] == str(step)
    assert table["1337"][1] == str(expected[1337][1])
    losses = [loss for loss, _ in expected.values()]
    low, mean, high = min(losses), statistics.mean(losses), max(losses)
    assert table["mean (range)"][4] == f"{mean:.4f} ({low:.4f} to {high:.4f})"


def test_a_recipe_that_lost_its_compiler_is_not_timed(small_gpu_bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.TorchEngine, "train_step", fall_back_at_once(gpu.TorchEngine.train_step))
    with pytest.raises(UserError, match="it continued without"):
        gpu.train_recipe(gpu.Options(device="cpu", seeds=1), load_corpus(str(small_gpu_bench)))


def fall_back_at_once(train_step: Callable) -> Callable:
    def step(engine: train_torch.TorchEngine, *args: object) -> object:
        engine.flags = replace(engine.flags, recompute=True)
        return train_step(engine, *args)

    return step


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--seeds", "-1"], "seeds must be at least 0, got -1"),
        (["--presets", "huge"], "huge"),
    ],
)
def test_a_gpu_bench_that_makes_no_sense_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    printed, error = refused(lambda: run_program(lambda: gpu.main(argv)), capsys)
    assert message in error
    assert printed == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_the_bench_says_so(capsys: pytest.CaptureFixture) -> None:
    _, error = refused(lambda: run_program(lambda: gpu.main([])), capsys)
    assert error.startswith("error: no CUDA GPU here, so nothing to measure")


def test_the_page_has_the_rows_that_the_bench_prints() -> None:
    """Each with its numbers, or marked."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert gpu.HEADER.strip() in page
    assert gpu.RECIPE_HEADER.strip() in page
    table = rows(page.split("## GPU")[1])
    nothing = (PRESETS["full"].model.gpt_config(65), PRESETS["full"].training, "cuda", np.arange(9))
    names = [f"{preset}: {name}" for preset in ("full", "gpt2") for name in gpu.contenders(preset, *nothing)]
    seeds = [str(PRESETS["full"].training.seed + i) for i in range(3)]
    assert list(table) == ["", *names, "seed", *seeds, "mean (range)"]
    for name in (*names, *seeds, "mean (range)"):
        assert len(table[name]) == 6
        assert table[name][0] == "not measured yet" or any(cell[:1].isdigit() for cell in table[name])
