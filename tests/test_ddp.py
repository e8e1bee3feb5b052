"""train_torch.py beyond the plain process: teams under torchrun, padded heads, recomputed blocks, unwatched steps."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_torch
from data import UserError
from numpygpt import GPTConfig
from tests.runs import arguments
from train_torch import DeviceFlags, Recorded, Team, TorchEngine, TorchFlags, check_memory, flops_per_token, settle
from training.batches import split
from training.command import run_program
from training.config import PRESETS, RunFlags
from training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
MODEL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
TRAINING = dataclasses.replace(PRESETS["tiny"].training, dtype="float64", seed=3)
CPU = DeviceFlags("cpu", compile=False, graph=False, pad_vocab=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TINY = ["--preset", "tiny", "--data", "verse", "--device", "cpu", "--dtype", "float64", "--log-interval", "1"]


def team(processes: int, *flags: str) -> list[str]:
    """The command line that starts a team on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train_torch.py"), *TINY, *flags]


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(folder / "metrics.jsonl") if m["protocol"] == "batch"]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """One batch cut among processes, unevenly and in micro-batches, is still one batch: same losses at every step."""
    flags = ["--max-steps", "12", "--batch-size", "7", "--learning-rate", "3e-3"]
    alone = run([sys.executable, "train_torch.py", *TINY, *flags, "--run-dir", str(tmp_path / "one")])
    assert alone.returncode == 0, alone.stderr
    together = run(team(2, *flags, "--grad-accum", "2", "--run-dir", str(tmp_path / "two")))
    assert together.returncode == 0, together.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12, "only the leader measures, and once"
    np.testing.assert_allclose(two, one, rtol=1e-12, err_msg="the gradients of two processes do not add up to one's")
    assert together.stdout.count("parameters") == 1, "more than one process reports"
    assert "2 processes" in together.stdout


def test_too_few_sequences_for_the_team_is_one_line(tmp_path: Path) -> None:
    result = run(team(2, "--batch-size", "1", "--run-dir", str(tmp_path / "run")))
    assert result.returncode != 0
    assert "error: each of the 2 processes needs a sequence of every micro-batch" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_that_dies_ends_the_run_with_a_clear_line_and_a_checkpoint(tmp_path: Path) -> None:
    """Kill one of two once something is saved: the other must not hang, and last/ must be whole."""
    folder = tmp_path / "run"
    flags = ["--max-steps", "100000", "--eval-interval", "40", "--run-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        team(2, *flags), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (folder / "last" / "state.json").exists():
                assert time.monotonic() < deadline, "nothing was saved within a minute"
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            listed = subprocess.run(
                ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
            )
            workers = [line.split()[0] for line in listed.stdout.splitlines() if "train_torch.py" in line]
            os.kill(int(workers[1]), signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert "lost the others, and stops; what was saved stays" in errors
    made = json.loads((folder / "last" / "state.json").read_text())["step"]
    more = ["--resume", str(folder), "--max-steps", str(made + 1)]
    resumed = run([sys.executable, "train_torch.py", *more, "--device", "cpu"])
    assert resumed.returncode == 0, resumed.stderr


def batch(seed: int, B: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(np.random.default_rng(seed).integers(MODEL.vocab_size, size=(2, B, 8))))


@pytest.mark.parametrize("change", [{"pad_vocab": True}, {"recompute": True}, {"pad_vocab": True, "recompute": True}])
def test_padding_and_recomputing_change_nothing(change: dict) -> None:
    """Same losses, norms and weights over several steps with dropout, and the same names and shapes to save."""
    engines = [TorchEngine(MODEL, TRAINING, flags) for flags in (CPU, dataclasses.replace(CPU, **change))]
    for step in range(5):
        (loss, norm), (other_loss, other_norm) = (engine.train_step(step, [batch(step)], 1e-2) for engine in engines)
        assert abs(other_loss / loss - 1) < 1e-12
        assert abs(other_norm / norm - 1) < 1e-12
    weights, others = (engine.save()[0] for engine in engines)
    for name in weights:
        # A key's bias has no gradient but rounding, which AdamW makes as large as any other.
        if not name.endswith("c_attn.bias"):
            np.testing.assert_allclose(others[name], weights[name], rtol=0, atol=1e-9, err_msg=name)


def test_a_compiled_step_does_what_the_eager_one_does(capsys: pytest.CaptureFixture) -> None:
    model = dataclasses.replace(MODEL, n_layer=1, dropout=0.0)
    engines = [TorchEngine(model, TRAINING, flags) for flags in (CPU, dataclasses.replace(CPU, compile=True))]
    for step in range(2):
        eager, compiled = (float(engine.train_step(step, [batch(step)], 1e-2)[0]) for engine in engines)
        assert abs(compiled / eager - 1) < 1e-9
    if "torch.compile failed" in (errors := capsys.readouterr().err):
        pytest.skip(f"torch.compile needs a C++ compiler: {errors}")


def test_a_full_device_is_one_line_that_names_the_flags_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. And a long story\nof many lines")

    monkeypatch.setattr(TorchEngine, "train_step", full)
    flags = [*TINY, "--run-dir", str(tmp_path / "run")]
    assert run_program(lambda: train_torch.main(flags)) == 1
    assert capsys.readouterr().err == (
        "error: not enough memory: the device is full: more --grad-accum, a lower --batch-size or --block-size, "
        "or --recompute\n"
    )


def test_the_full_model_without_a_gpu_names_the_small_one(capsys: pytest.CaptureFixture) -> None:
    class Full:
        model, training = PRESETS["full"].model.gpt_config(65), PRESETS["full"].training

    train_torch.describe(Full(), CPU, train_torch.Team())
    assert "--preset small takes minutes" in capsys.readouterr().out


def test_a_step_that_nobody_looked_at_changes_nothing_once_it_is_not_finite() -> None:
    """On a GPU the numbers are read late. Until then the kernel must leave weights, moments and count alone."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    engine.lazy = True
    engine.train_step(0, [batch(0)], 1e-2)
    engine.check()
    with torch.no_grad():
        good = engine.gpt.wpe.weight[0, 0].clone()
        engine.gpt.wpe.weight[0, 0] = torch.nan
    engine.gpt._check_finite = lambda logits: None  # as within torch.compile, where no check is made
    before = [array.copy() for part in engine.save()[:3] for array in part.values()]
    engine.train_step(1, [batch(1)], 1e-2)
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = good
    engine.train_step(2, [batch(2)], 1e-2)  # finite again: still nothing may move
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = torch.nan
    after = [array for part in engine.save()[:3] for array in part.values()]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))
    assert engine.save()[3] == 1
    with pytest.raises(ValueError, match="at step 1"):
        engine.check()


def test_windows_are_gathered_as_numpy_gathers_them() -> None:
    """Of whichever tokens are asked for, though only the last ones are kept on the device."""
    engine, starts = TorchEngine(MODEL, TRAINING, CPU), np.array([0, 91, 17])
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(11, size=100).astype(np.int32)
        idx, targets = engine.windows(tokens, starts, 8)
        for row, start in enumerate(starts):
            assert idx[row].tolist() == tokens[start : start + 8].tolist()
            assert targets[row].tolist() == tokens[start + 1 : start + 9].tolist()


def test_ids_are_checked_without_a_look_at_the_device() -> None:
    """The training split once, an evaluation's batches before they go there."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    engine.gpt.checked = False  # as on a GPU
    tokens = np.array([3, 1, 11, 4])
    with pytest.raises(ValueError, match=r"the training split must be in \[0, 11\), got 11"):
        engine.windows(tokens, np.array([0]), 2)
    with pytest.raises(ValueError, match=r"idx must be in \[0, 11\), got 11"):
        engine.loss(tokens[None], tokens[None])


# ---------------------------------------------------------------------------------------------------------------------
# What goes together, and what is done when something fails


def flags_of(device: DeviceFlags, dtype: str = "float32", dropout: float = 0.0) -> TorchFlags:
    model = dataclasses.replace(PRESETS["tiny"].model, dropout=dropout)
    return TorchFlags(model, dataclasses.replace(TRAINING, dtype=dtype), RunFlags("tiny"), device)


CUDA = DeviceFlags("cuda", compile=True, graph=True, pad_vocab=True)


@pytest.mark.parametrize(
    ("changes", "dtype", "processes", "said"),
    [
        ({"fused": False}, "float32", 1, "with a fused AdamW: choose --no-graph"),
        ({"device": "cpu"}, "float32", 1, "of a CUDA GPU with a fused AdamW: choose --no-graph"),
        ({}, "float32", 2, "of one process, not of 2: choose --no-graph"),
        ({"device": "mps", "graph": False}, "float64", 1, "mps has no float64"),
    ],
)
def test_flags_that_cannot_go_together_are_one_line(changes: dict, dtype: str, processes: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settle(flags_of(dataclasses.replace(CUDA, **changes), dtype), Team(0, processes))


def test_what_cannot_be_recorded_or_compiled_is_not_and_says_so(capsys: pytest.CaptureFixture) -> None:
    assert settle(flags_of(CUDA), Team()).device == CUDA
    assert settle(flags_of(CUDA, "float64"), Team()).device == dataclasses.replace(CUDA, graph=False)
    recompute = dataclasses.replace(CUDA, recompute=True)
    assert settle(flags_of(recompute), Team()).device == recompute
    assert capsys.readouterr().err == "float64 goes without a CUDA graph\n"
    eager = dataclasses.replace(recompute, graph=False, compile=False)
    assert settle(flags_of(recompute, dropout=0.1), Team()).device == eager
    assert capsys.readouterr().err == "recomputed dropout goes without a CUDA graph and torch.compile\n"
    assert settle(flags_of(eager, dropout=0.1), Team()).device == eager
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_where_the_gpu_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert settle(flags_of(CUDA, "auto"), Team()).training.dtype == ("bfloat16" if native else "float32")
    assert settle(flags_of(CPU, "auto"), Team()).training.dtype == "float32"


def test_a_step_falls_back_by_one_stage_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The CUDA graph, for want of a GPU; then torch.compile, for want of a compiler; then eagerly, as if ever so."""

    def broken_compile(*_: object, **__: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no compiler\nand a long story")

        return call

    def no_stream() -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(torch, "compile", broken_compile)
    monkeypatch.setattr(torch.cuda, "Stream", no_stream)
    engine = TorchEngine(MODEL, TRAINING, dataclasses.replace(CPU, compile=True, graph=True))
    eager = TorchEngine(MODEL, TRAINING, CPU)
    for step in range(2):
        loss, other = (float(e.train_step(step, [batch(step)], 1e-2)[0]) for e in (engine, eager))
        assert loss == pytest.approx(other, rel=1e-7), "the rate of a recorded step is a float32"
    assert capsys.readouterr().err == (
        "the CUDA graph failed, so on without it: RuntimeError: no stream\n"
        "torch.compile failed, so on without it: RuntimeError: no compiler\n"
    )
    assert engine.flags == CPU, "who measures must know"


@pytest.mark.parametrize(
    ("version", "dropout", "ends"), [("2.12", 0.3, True), ("2.12", 0.0, False), ("2.13", 0.3, False)]
)
def test_a_failed_recording_ends_the_run_where_it_ends_dropout(
    version: str, dropout: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = TorchEngine(dataclasses.replace(MODEL, dropout=dropout), TRAINING, CPU)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(UserError if ends else RuntimeError, match="--no-graph" if ends else "^operation"):
        Recorded(engine).captured(None)


def test_parts_of_a_batch_are_all_of_it() -> None:
    idx, targets = batch(0, B=7)
    parts = split((idx, targets), 3)
    assert sorted(len(part) for part, _ in parts) == [2, 2, 3]
    assert torch.equal(torch.cat([part for part, _ in parts]), idx)
    assert torch.equal(torch.cat([part for _, part in parts]), targets)


def test_floating_point_operations_of_the_full_model() -> None:
    """6 for each of the 10,770,816 - 256 * 384 weights that multiply, and 12 L C T for attention."""
    full = PRESETS["full"].model.gpt_config(65)
    assert flops_per_token(full) == 6 * (10_770_816 - 98_304) + 12 * 6 * 384 * 256


def test_a_model_beyond_the_memory_is_refused_before_it_is_made() -> None:
    class Enormous:
        model, training = GPTConfig(50257, 1024, 96, 96, 12288), PRESETS["gpt2"].training

    with pytest.raises(UserError, match=r"this needs about [\d,]+ GB of memory"):
        check_memory(Enormous(), CPU, team=dataclasses.make_dataclass("T", ["rank", "size"])(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


# Over these 10 steps the losses of float32 on a CPU are up to 1.2e-7 away from float64's, of bfloat16 1.7e-4. A GPU
# adds in another order; its TF32 has three bits more than bfloat16.
WAYS = [
    ({}, "float32", 1e-5),
    ({"tf32": True}, "float32", 1e-3),
    ({"fused": False}, "float32", 1e-5),
    ({"recompute": True}, "float32", 1e-5),
    ({"compile": True}, "float32", 1e-5),
    ({"graph": True, "recompute": True}, "float32", 1e-5),
    ({"graph": True, "compile": True}, "float32", 1e-5),
    ({"graph": True, "compile": True}, "float64", 1e-9),
    ({}, "bfloat16", 2e-3),
    ({"pad_vocab": False}, "bfloat16", 2e-3),
    ({"compile": True}, "bfloat16", 2e-3),
    ({"graph": True}, "bfloat16", 2e-3),
    ({"graph": True, "compile": True}, "bfloat16", 2e-3),
]


@needs_gpu
@pytest.mark.parametrize(("change", "dtype", "tolerance"), WAYS)
def test_every_way_to_compute_on_a_gpu_learns_the_same(
    change: dict, dtype: str, tolerance: float, capsys: pytest.CaptureFixture
) -> None:
    """The command line's switches, against float64 on the CPU."""
    model = dataclasses.replace(MODEL, dropout=0.0)
    training = dataclasses.replace(TRAINING, dtype=dtype)
    flags = dataclasses.replace(DeviceFlags("cuda", compile=False, graph=False, pad_vocab=True, tf32=False), **change)
    flags = settle(flags_of(flags, dtype), Team()).device
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if flags.tf32 else "highest")
    try:
        engine, exact = TorchEngine(model, training, flags), TorchEngine(model, TRAINING, CPU)
        for step in range(10):
            loss, expected = (float(e.train_step(step, [batch(step)], 1e-2)[0]) for e in (engine, exact))
            assert abs(loss / expected - 1) < tolerance
    finally:
        torch.set_float32_matmul_precision(precision)
    assert "failed" not in capsys.readouterr().err


@needs_gpu
def test_the_command_line_on_a_gpu_captures_compiles_and_learns(tmp_path: Path) -> None:
    flags = arguments({"--preset": "tiny", "--data": "verse", "--ema": 0.9, "--dropout": 0.1, "--max-steps": 100})
    done = run([sys.executable, "train_torch.py", *flags, "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert "device cuda, " in done.stdout
    assert "compiled, fused AdamW, CUDA graph, padded head" in done.stdout
    assert "failed" not in done.stderr
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1, "on a CPU it falls from 3.9 to 2.3"


@needs_gpu
def test_a_recorded_step_does_what_the_plain_one_does() -> None:
    """A CUDA graph replays the very step: same losses, and warming it up leaves no trace in weights or moments."""
    training = dataclasses.replace(TRAINING, dtype="float32")
    model = dataclasses.replace(MODEL, dropout=0.0)
    flags = DeviceFlags("cuda", compile=False, graph=False, pad_vocab=True)
    engines = [TorchEngine(model, training, f) for f in (flags, dataclasses.replace(flags, graph=True))]
    for step in range(5):
        plain, recorded = (float(engine.train_step(step, [batch(step)], 1e-2)[0]) for engine in engines)
        assert abs(recorded / plain - 1) < 1e-4
    assert engines[1].save()[3] == 5


@needs_gpu
def test_dropout_on_a_gpu_is_addressed_by_seed_and_step() -> None:
    flags = DeviceFlags("cuda", compile=False, graph=True, pad_vocab=True)
    training = dataclasses.replace(TRAINING, dtype="float32")
    first, second = (TorchEngine(MODEL, training, flags) for _ in range(2))
    one, two = ([float(e.train_step(step, [batch(0)], 0.0)[0]) for step in (3, 3, 4)] for e in (first, second))
    assert one == two
    assert one[0] == one[1] != one[2]


@needs_gpu
def test_a_recorded_run_that_is_resumed_is_the_run() -> None:
    """With dropout and an average: recording, at the start and again after loading, changes no draw and no tensor."""
    flags = DeviceFlags("cuda", compile=False, graph=True, pad_vocab=True)
    training = dataclasses.replace(TRAINING, dtype="float32", ema=0.9)

    def losses(engine: TorchEngine, steps: range) -> list[float]:
        return [float(engine.train_step(step, [batch(step)], 1e-2)[0]) for step in steps]

    whole, first, second = (TorchEngine(MODEL, training, flags) for _ in range(3))
    expected = losses(whole, range(6))
    found = losses(first, range(3))
    second.load(*first.save())
    assert found + losses(second, range(3, 6)) == pytest.approx(expected, rel=1e-5)
    first.load(*first.save())  # now its recording is of tensors that it has no more
    assert losses(first, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)
    assert whole.flags == first.flags == second.flags == flags
    average, expected_average = second.save()[4], whole.save()[4]
    for name in average:
        if not name.endswith("c_attn.bias"):  # a key's has no gradient but rounding, see above
            np.testing.assert_allclose(average[name], expected_average[name], rtol=1e-3, atol=1e-5, err_msg=name)
