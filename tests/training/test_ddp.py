"""train_torch.py beyond the plain process: DDP under torchrun, padded heads, recomputed blocks, unwatched steps."""

import dataclasses
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_torch
from common.cli import run_program
from common.errors import UserError
from numpygpt import GPTConfig
from tests.runs import ENGINES, arguments, forked, needs_fork, refused, resume, start, state, write_text
from tests.runs import run as run_trainer
from train_torch import TorchEngine
from training import memory
from training.batches import split
from training.config import PRESETS, RunFlags
from training.flops import training_flops_per_token
from training.metrics import read_metrics
from training.torch_ddp import SINGLE_PROCESS, Ddp, check_gpus, init_ddp
from training.torch_device import DeviceFlags, TorchFlags, device_defaults, memory_use, print_device, resolve_flags
from training.torch_graph import RecordedStep

ROOT = Path(__file__).resolve().parents[2]
MODEL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
TRAINING = dataclasses.replace(PRESETS["tiny"].training, dtype="float64", seed=3)
CPU = DeviceFlags("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TINY = ["--preset", "tiny", "--data", "verse", "--device", "cpu", "--dtype", "float64", "--log-interval", "1"]
TINY += ["--threads", "1"]


def train_forked(argv: Sequence[str], output: Path, environment: dict[str, str]) -> None:
    """train_torch.py in a process that was forked for it, which writes into output.out and output.err."""
    os.environ.update(environment)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream)
    os._exit(run_trainer("torch", argv))


@contextmanager
def two_processes(folder: Path, *flags: str, **variables: str) -> Iterator[list[BaseProcess]]:
    """Two processes that train together, as torchrun would start them; torchrun itself is in README, and tested there.

    Their output comes into the folder.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables
    processes = [
        forked(train_forked, [*TINY, *flags], folder / str(rank), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: list[BaseProcess], folder: Path) -> list[tuple[int, str, str]]:
    """Wait for processes -> the exit status, standard output and errors of each."""
    for process in processes:
        process.join(300)
    texts = [[(folder / f"{rank}{end}").read_text(encoding="utf-8") for end in (".out", ".err")] for rank in range(2)]
    return [(process.exitcode, *texts[rank]) for rank, process in enumerate(processes)]


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(folder / "metrics.jsonl") if m["protocol"] == "batch"]


# Measured for float32 over these steps: 2.0e-7.
@needs_fork
@pytest.mark.parametrize(
    ("dtype", "optimizer", "tolerance"),
    [("float64", "adamw", 1e-12), ("float32", "adamw", 2e-6), ("float64", "muon", 1e-12)],
)
def test_two_processes_learn_what_one_does(dtype: str, optimizer: str, tolerance: float, tmp_path: Path) -> None:
    """One batch cut among processes, unevenly and in micro-batches, is still one batch: same losses at every step."""
    flags = ["--max-steps", "12", "--batch-size", "7", "--learning-rate", "3e-3", "--dtype", dtype]
    flags += ["--optimizer", optimizer]
    assert run_trainer("torch", [*TINY, *flags, "--run-dir", str(tmp_path / "one")]) == 0
    with two_processes(tmp_path, *flags, "--grad-accum", "2", "--run-dir", str(tmp_path / "two")) as processes:
        (main, printed, errors), other = ended(processes, tmp_path)
    assert main == 0, errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12, "only the main process measures, and once"
    np.testing.assert_allclose(two, one, rtol=tolerance, err_msg="two processes' gradients do not add up to one's")
    assert "2 processes" in printed
    assert other == (0, "", ""), "only the main process reports"


@needs_fork
def test_processes_without_a_compiler_continue_together(tmp_path: Path) -> None:
    flags = ["--max-steps", "2", "--n-layer", "1", "--compile", "--run-dir", str(tmp_path / "run")]
    with two_processes(tmp_path, *flags, CXX="/nonexistent/compiler") as processes:
        (main, printed, errors), (other, _, other_errors) = ended(processes, tmp_path)
    assert (main, other) == (0, 0), errors
    assert (errors + other_errors).count("torch.compile failed, continuing without it: ") == 1
    assert "float64, eager, " in printed


@needs_fork
def test_too_few_sequences_for_the_processes_is_one_line(tmp_path: Path) -> None:
    with two_processes(tmp_path, "--batch-size", "1", "--run-dir", str(tmp_path / "run")) as processes:
        (main, _, errors), (other, _, _) = ended(processes, tmp_path)
    assert main != 0 != other
    assert "error: each of the 2 processes needs a sequence of every micro-batch" in errors
    assert not (tmp_path / "run").exists()


@needs_fork
def test_a_process_that_dies_ends_the_run_with_a_clear_line_and_a_checkpoint(tmp_path: Path) -> None:
    """Kill one of two once something is saved: the other must not hang, and last.safetensors must be whole."""
    folder = tmp_path / "run"
    flags = ["--max-steps", "100000", "--eval-interval", "40", "--run-dir", str(folder)]
    with two_processes(tmp_path, *flags) as processes:
        while not (folder / "last.safetensors").exists():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.1)
        processes[1].kill()
        (main, _, errors), _ = ended(processes, tmp_path)
    assert main == 1
    assert "process 0 of 2 lost the others, and stops; what was saved stays" in errors
    made = state(folder / "last.safetensors")["step"]
    assert resume("torch", folder, max_steps=made + 1, device="cpu") == 0


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
    weights, others = (engine.save().weights for engine in engines)
    for name in weights:
        # A key's bias has no gradient but rounding, which AdamW makes as large as any other.
        if not name.endswith("c_attn.bias"):
            np.testing.assert_allclose(others[name], weights[name], rtol=0, atol=1e-9, err_msg=name)


def test_attention_written_out_is_attention() -> None:
    model = dataclasses.replace(MODEL, dropout=0.0)  # the kernels draw their masks differently
    written_out = dataclasses.replace(CPU, attention="explicit")
    engines = [TorchEngine(model, TRAINING, flags) for flags in (CPU, written_out)]
    assert [block.attn.attention for block in engines[1].gpt.h] == ["explicit"] * 2
    for step in range(5):
        loss, other = (float(engine.train_step(step, [batch(step)], 1e-2)[0]) for engine in engines)
        assert abs(other / loss - 1) < 1e-12


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_step_does_what_the_eager_one_does(recompute: bool, capsys: pytest.CaptureFixture) -> None:
    """With dropout, and the same masks once more where blocks are recomputed: the second step sees the weights of that.

    Compiled code has a random generator of its own; here it draws from PyTorch's, as the eager step does.
    """
    import torch._inductor.config  # not above: it reads CXX, which a test sets in the processes that it forks

    torch._dynamo.reset()
    model = dataclasses.replace(MODEL, n_layer=1)
    flags = [CPU, dataclasses.replace(CPU, compile=True, recompute=recompute)]
    engines = [TorchEngine(model, TRAINING, f) for f in flags]
    with torch._inductor.config.patch(fallback_random=True):
        for step in range(2):
            (loss, norm), (other, other_norm) = (engine.train_step(step, [batch(step)], 1e-2) for engine in engines)
            assert abs(float(other / loss) - 1) < 1e-9
            assert abs(float(other_norm / norm) - 1) < 1e-9
    if "torch.compile failed" in (errors := capsys.readouterr().err):
        pytest.skip(f"torch.compile needs a C++ compiler: {errors}")


def test_a_full_device_is_one_line_that_names_the_flags_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(train_torch.Loss, "forward", full)
    flags = [*TINY, "--compile", "--run-dir", str(tmp_path / "run")]
    assert run_program(lambda: train_torch.main(flags)) == 1
    assert capsys.readouterr().err == (
        "error: not enough memory: the device is full: more --grad-accum, a lower --batch-size or --block-size, "
        "or --recompute\n"
    )


def test_the_full_model_without_a_gpu_names_the_small_one(capsys: pytest.CaptureFixture) -> None:
    """And no longer, once most of it is done."""
    training = PRESETS["full"].training
    full = SimpleNamespace(model=PRESETS["full"].model.gpt_config(65), training=training, checkpoint=None)
    print_device(full, CPU, 1)
    assert f"no GPU: {training.max_steps:,} steps of 16,384 tokens would take about" in (
        said := capsys.readouterr().out
    )
    assert "--preset small takes minutes" in said
    full.checkpoint = SimpleNamespace(state=SimpleNamespace(step=training.max_steps - 1))
    print_device(full, CPU, 1)
    assert "no GPU" not in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_nobody_looked_at_changes_nothing_once_it_is_not_finite(optimizer: str) -> None:
    """On a GPU the numbers are read late. Until then the kernel must leave weights, moments and count alone."""
    engine = TorchEngine(MODEL, dataclasses.replace(TRAINING, optimizer=optimizer), CPU)
    engine.lazy = True
    engine.train_step(0, [batch(0)], 1e-2)
    engine.check()
    with torch.no_grad():
        good = engine.gpt.wpe.weight[0, 0].clone()
        engine.gpt.wpe.weight[0, 0] = torch.nan
    engine.gpt._check_finite = lambda logits: None  # as within torch.compile, where no check is made
    before = [array.copy() for part in vars(engine.save()).values() for array in part.values()]
    engine.train_step(1, [batch(1)], 1e-2)
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = good
    engine.train_step(2, [batch(2)], 1e-2)  # finite again: still nothing may move
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = torch.nan
    after = [array for part in vars(engine.save()).values() for array in part.values()]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))
    assert {int(state["step"]) for state in engine.optimizer.state.values()} == {1}
    with pytest.raises(ValueError, match="at step 1"):
        engine.check()


def test_windows_are_gathered_as_numpy_gathers_them() -> None:
    """Of whichever tokens are asked for, though only the last ones are kept on the device."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    starts = np.array([0, 91, 17])
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(11, size=100).astype(np.int32)
        idx, targets = engine.gather(tokens, starts, 8)
        for row, first in enumerate(starts):
            assert idx[row].tolist() == tokens[first : first + 8].tolist()
            assert targets[row].tolist() == tokens[first + 1 : first + 9].tolist()
        assert isinstance(idx, torch.Tensor)


def test_ids_are_checked_without_a_look_at_the_device() -> None:
    """The training split once, an evaluation's batches before they go there."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    engine.gpt.checked = False  # as on a GPU
    tokens = np.array([3, 1, 11, 4])
    with pytest.raises(ValueError, match=r"the training split must be in \[0, 11\), got 11"):
        engine.gather(tokens, np.array([0]), 2)
    with pytest.raises(ValueError, match=r"idx must be in \[0, 11\), got 11"):
        engine.loss(tokens[None], tokens[None])


# ---------------------------------------------------------------------------------------------------------------------
# What goes together, and what is done when something fails


def flags_of(device: DeviceFlags, dtype: str = "float32", dropout: float = 0.0) -> TorchFlags:
    model = dataclasses.replace(PRESETS["tiny"].model, dropout=dropout)
    return TorchFlags(model, dataclasses.replace(TRAINING, dtype=dtype), RunFlags("tiny"), device)


CUDA = DeviceFlags("cuda", compile=True, pad_vocab=True)
GRAPH = dataclasses.replace(CUDA, graph=True)


@pytest.mark.parametrize(
    ("flags", "changes", "dtype", "dropout", "processes", "said"),
    [
        (GRAPH, {"device": "cpu"}, "float32", 0.0, 1, "of a CUDA GPU: leave it out"),
        (GRAPH, {}, "float32", 0.0, 2, "of one process, not of 2: leave it out"),
        (GRAPH, {}, "float64", 0.0, 1, "cannot record float64"),
        (GRAPH, {"recompute": True}, "float32", 0.1, 1, "--recompute with dropout"),
        (CUDA, {"device": "mps"}, "float64", 0.0, 1, "mps has no float64"),
    ],
)
def test_flags_that_cannot_go_together_are_one_line(
    flags: DeviceFlags, changes: dict, dtype: str, dropout: float, processes: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resolve_flags(flags_of(dataclasses.replace(flags, **changes), dtype, dropout), processes)


def test_flags_that_go_together_stay() -> None:
    for flags, dtype, dropout in ((GRAPH, "float32", 0.1), (CUDA, "float64", 0.1), (CPU, "float64", 0.0)):
        assert resolve_flags(flags_of(flags, dtype, dropout), 1).device == flags
    recomputed = dataclasses.replace(GRAPH, recompute=True)
    assert resolve_flags(flags_of(recomputed, "float32"), 1).device == recomputed


@pytest.mark.parametrize(
    ("cuda", "mps", "system", "argv", "expected"),
    [
        (True, False, "Linux", [], CUDA),
        (True, False, "Windows", [], dataclasses.replace(CUDA, compile=False)),
        (True, False, "Linux", ["--device", "cpu"], CPU),
        (False, True, "Darwin", ["--preset", "tiny"], dataclasses.replace(CPU, device="mps")),
        (False, True, "Darwin", ["--device=cpu"], CPU),
        (False, False, "Linux", [], CPU),
    ],
)
def test_the_defaults_suit_the_device(
    cuda: bool, mps: bool, system: str, argv: list[str], expected: DeviceFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert device_defaults(argv) == expected


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
TORCHRUN |= {"MASTER_PORT": "29500"}


@pytest.mark.parametrize("value", [None, "", "x", "-1", "1.5", "9" * 50, "\x1b[2J"])
@pytest.mark.parametrize("name", TORCHRUN)
def test_leftovers_of_torchruns_environment_are_named(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, value) == ("WORLD_SIZE", None) or (name == "MASTER_ADDR" and value):
        pytest.skip("then it is one process, or any name may be right")
    for variable, right in TORCHRUN.items():
        monkeypatch.setenv(variable, right)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment variable {name} is .*torchrun") as caught, init_ddp():
        pass
    assert str(caught.value).isprintable()


def test_without_torchruns_environment_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in TORCHRUN:
        monkeypatch.delenv(variable, raising=False)
    for leftover in ({}, {"RANK": "0"}, {"WORLD_SIZE": "1"}):
        for variable, value in leftover.items():
            monkeypatch.setenv(variable, value)
        with init_ddp() as ddp:
            assert ddp == SINGLE_PROCESS


def test_operations_are_deterministic_for_as_long_as_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for asked in (["--deterministic"], []):
        assert train_torch.main([*TINY, "--max-steps", "1", *asked, "--run-dir", str(tmp_path / f"{asked}")]) == 0
        assert torch.are_deterministic_algorithms_enabled() == bool(asked)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(("others", "said"), [("b", None), ("a", "2 processes, and 1 GPU: start one for each")])
def test_two_processes_on_one_gpu_are_refused(others: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the GPUs are, and not how many a process sees: it may see its own alone."""

    def gather(everyones: list, mine: object) -> None:
        everyones[:] = [mine, (mine[0], others)]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_gpus(Ddp(0, 2))


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_where_the_gpu_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_flags(flags_of(CUDA, "auto"), 1).training.dtype == ("bfloat16" if native else "float32")
    assert resolve_flags(flags_of(CPU, "auto"), 1).training.dtype == "float32"


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. And a long story\nof many lines")


@pytest.fixture
def unrecordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA as far as it takes to see a recording fail."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", fail)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_graph_that_fails_ends_the_run_with_the_flag_to_leave_out(
    optimizer: str, unrecordable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was run to warm up is undone."""
    engine = TorchEngine(MODEL, dataclasses.replace(TRAINING, optimizer=optimizer), CPU)
    engine.update = RecordedStep(engine.update_once, engine.optimizers, [engine.broken])
    before = {name: array.copy() for name, array in engine.save().weights.items()}
    with pytest.raises(
        UserError, match=r"^the CUDA graph failed: leave out --graph \(RuntimeError: operation not perm"
    ):
        engine.train_step(0, [batch(0)], 1e-2)
    assert all(np.array_equal(before[name], array) for name, array in engine.save().weights.items())
    assert not any(array.any() for array in engine.save().m.values())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: full())
    with pytest.raises(torch.OutOfMemoryError):
        engine.train_step(0, [batch(0)], 1e-2)


def test_a_number_that_is_not_finite_is_not_the_compilers_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    engine = TorchEngine(MODEL, TRAINING, dataclasses.replace(CPU, compile=True))
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        engine.train_step(0, [batch(0)], 1e-2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_compiled_is_what_is_trained(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of another shape, or with other strides, would be compiled in the midst of an update."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    seen = []

    class Parallel(torch.nn.Module):
        def forward(self, *pair: torch.Tensor) -> torch.Tensor:
            seen.append([(ids.shape, ids.stride(), ids.dtype) for ids in pair])
            return train_torch.Loss(engine.gpt)(*pair)

        def no_sync(self) -> nullcontext:
            return nullcontext()

    engine.forward, engine.ddp = Parallel(), Ddp(rank, 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    assert engine.try_forward(engine.forward, 7) is None
    engine.train_step(0, [engine.gather(np.arange(100) % 11, np.arange(7), 8)], 1e-2)
    tried, trained = seen
    assert tried == trained
    assert tried[0][0] == (4 - rank, 8)


def test_processes_exchange_gradients_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each micro-batch: DistributedDataParallel.no_sync says so."""
    engine = TorchEngine(MODEL, TRAINING, CPU)
    events = []

    class Parallel(torch.nn.Module):
        def forward(self, *pair: torch.Tensor) -> torch.Tensor:
            events.append("batch")
            return train_torch.Loss(engine.gpt)(*pair)

        @contextmanager
        def no_sync(self) -> Iterator[None]:
            events.append("quiet")
            yield
            events.append("end")

    engine.forward, engine.ddp = Parallel(), Ddp(0, 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    engine.train_step(0, split(batch(0, B=6), 3), 1e-2)
    assert events == ["quiet", "batch", "end", "quiet", "batch", "end", "batch"]


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4100", True),
        ("Connection reset by peer", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("expected scalar type Float but found Double", False),
    ],
)
def test_only_what_is_about_the_others_is_said_to_be(said: str, lost: bool) -> None:
    for ddp, kind in ((Ddp(1, 2), UserError if lost else RuntimeError), (SINGLE_PROCESS, RuntimeError)):
        with pytest.raises(kind) as caught, train_torch.translate_errors(ddp):
            raise RuntimeError(said)
        assert ("process 1 of 2 lost the others" in str(caught.value)) == (kind is UserError)


def test_parts_of_a_batch_are_all_of_it() -> None:
    idx, targets = batch(0, B=7)
    parts = split((idx, targets), 3)
    assert sorted(len(part) for part, _ in parts) == [2, 2, 3]
    assert torch.equal(torch.cat([part for part, _ in parts]), idx)
    assert torch.equal(torch.cat([part for _, part in parts]), targets)


def test_floating_point_operations_of_the_full_model() -> None:
    """6 for each of the 10,770,816 - 256 * 384 weights that multiply, and 12 L C T for attention."""
    full = PRESETS["full"].model.gpt_config(65)
    assert training_flops_per_token(full) == 6 * (10_770_816 - 98_304) + 12 * 6 * 384 * 256


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_beyond_the_memory_is_refused_and_nothing_is_lost(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    text, folder = write_text(tmp_path), tmp_path / "run"
    monkeypatch.setattr(memory, "cpu_memory", lambda: 2**20)
    for overwrite in ({}, {"overwrite": ""}):
        _, error = refused(lambda flags=overwrite: start(engine, text, folder, batch_size=9999, **flags), capsys)
        assert re.search(r"this needs about [\d.]+ GB of memory, and a process here has 0.0: choose", error)
        assert ("--recompute" in error) == (engine == "torch"), "only where there is that flag"
        assert "more --grad-accum" in error
        assert not folder.exists()
    monkeypatch.undo()

    assert start(engine, text, folder) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert len(before) == 6, "four files of the run, and two checkpoints"
    monkeypatch.setattr(memory, "cpu_memory", lambda: 2**10)
    refused(lambda: start(engine, text, folder, overwrite=""), capsys)
    refused(lambda: resume(engine, folder, max_steps=99), capsys)
    assert before == {path: path.read_bytes() for path in before}


def test_the_memory_that_a_process_needs_and_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, training = PRESETS["gpt2"].model.gpt_config(50257), PRESETS["gpt2"].training

    def fits(there: int, processes: int = 1, **changes: object) -> bool:
        monkeypatch.setattr(memory, "cpu_memory", lambda: there << 30)
        given = {name: changes.pop(name) for name in ("batch_size", "grad_accum", "dtype") if name in changes}
        flags = dataclasses.replace(CPU, **changes)
        use = memory_use(flags, processes)
        if use is None:
            return True
        try:
            memory.check_memory(model, dataclasses.replace(training, **given), use)
        except UserError:
            return False
        return True

    assert fits(12), "8 sequences of 1,024 tokens at once, and 124M weights"
    assert not fits(10)
    assert not fits(40, grad_accum=1)
    assert fits(12, grad_accum=1, device="cuda"), "that is for the device to say"
    assert fits(10, recompute=True)
    assert fits(10, grad_accum=120)
    assert not fits(12, attention="explicit")
    assert fits(7, dtype="bfloat16")
    matrices = 12 * 12 * 768**2
    adamw, muon = (
        memory.memory_needed(model, dataclasses.replace(training, optimizer=optimizer), memory_use(CPU, 1))
        for optimizer in ("adamw", "muon")
    )
    assert adamw - muon == 4 * matrices, "no second moments of the matrices inside blocks"
    assert not fits(20, dtype="float64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fits(28, processes=4), "each of them a quarter of the batch, and of the memory"
    assert not fits(12, processes=4)


def test_the_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "no such file", limit))
    physical = memory.cpu_memory()
    assert physical == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for content, expected in (("max\n", physical), ("1048576\n", 2**20), (f"{physical * 2}\n", physical)):
        limit.write_text(content)
        assert memory.cpu_memory() == expected


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


# Over these 10 steps the losses of float32 on a CPU are up to 1.2e-7 away from float64's, of bfloat16 1.7e-4. A GPU
# adds in another order; its TF32 has three bits more than bfloat16.
WAYS = [
    ({}, "float32", 1e-5),
    ({"precision": "high"}, "float32", 1e-3),  # TF32, as the command line chooses
    ({"recompute": True}, "float32", 1e-5),
    ({"compile": True}, "float32", 1e-5),
    ({"graph": True, "recompute": True}, "float32", 1e-5),
    ({"graph": True, "compile": True}, "float32", 1e-5),
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
    change = dict(change)
    wanted = change.pop("precision", "highest")
    flags = dataclasses.replace(DeviceFlags("cuda", pad_vocab=True), **change)
    flags = resolve_flags(flags_of(flags, dtype), 1).device
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        engine, exact = TorchEngine(model, training, flags), TorchEngine(model, TRAINING, CPU)
        for step in range(10):
            micro_batches = split(batch(step), 2)
            loss, expected = (float(e.train_step(step, micro_batches, 1e-2)[0]) for e in (engine, exact))
            assert abs(loss / expected - 1) < tolerance
        ids = [part.numpy() for part in batch(99)]
        assert abs(float(engine.loss(*ids)) / float(exact.loss(*ids)) - 1) < tolerance
    finally:
        torch.set_float32_matmul_precision(precision)
    assert "failed" not in capsys.readouterr().err


@needs_gpu
def test_the_command_line_on_a_gpu_captures_compiles_and_learns(tmp_path: Path) -> None:
    flags = arguments({"--preset": "tiny", "--data": "verse", "--dropout": 0.1, "--max-steps": 100, "--graph": ""})
    done = run([sys.executable, "train_torch.py", *flags, "--run-dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert "device cuda, " in done.stdout
    assert "compiled, CUDA graph, padded head" in done.stdout
    assert "failed" not in done.stderr
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1, "on a CPU it falls from 3.9 to 2.3"


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_does_what_the_plain_one_does(optimizer: str) -> None:
    """A CUDA graph replays the very step: same losses, and warming it up leaves no trace in weights or moments."""
    training = dataclasses.replace(TRAINING, dtype="float32", optimizer=optimizer)
    model = dataclasses.replace(MODEL, dropout=0.0)
    flags = DeviceFlags("cuda", pad_vocab=True)
    engines = [TorchEngine(model, training, f) for f in (flags, dataclasses.replace(flags, graph=True))]
    for step in range(5):
        plain, recorded = (float(engine.train_step(step, [batch(step)], 1e-2)[0]) for engine in engines)
        assert abs(recorded / plain - 1) < 1e-4
    assert {int(state["step"]) for state in engines[1].optimizer.state.values()} == {5}


@needs_gpu
def test_dropout_on_a_gpu_is_addressed_by_seed_and_step() -> None:
    flags = DeviceFlags("cuda", graph=True, pad_vocab=True)
    training = dataclasses.replace(TRAINING, dtype="float32")
    first, second = (TorchEngine(MODEL, training, flags) for _ in range(2))
    one, two = ([float(e.train_step(step, [batch(0)], 0.0)[0]) for step in (3, 3, 4)] for e in (first, second))
    assert one == two
    assert one[0] == one[1] != one[2]


@needs_gpu
def test_a_recorded_run_that_is_resumed_is_the_run() -> None:
    """With dropout: recording, at the start and again after loading, changes no draw and no tensor."""
    flags = DeviceFlags("cuda", graph=True, pad_vocab=True)
    training = dataclasses.replace(TRAINING, dtype="float32")

    def losses(engine: TorchEngine, steps: range) -> list[float]:
        return [float(engine.train_step(step, [batch(step)], 1e-2)[0]) for step in steps]

    whole, first, second = (TorchEngine(MODEL, training, flags) for _ in range(3))
    expected = losses(whole, range(6))
    found = losses(first, range(3))
    second.load(first.save(), 3)
    assert found + losses(second, range(3, 6)) == pytest.approx(expected, rel=1e-5)
    first.load(first.save(), 3)  # now its recording is of tensors that it has no more
    assert losses(first, range(3, 6)) == pytest.approx(expected[3:], rel=1e-5)
    assert whole.flags == first.flags == second.flags == flags
    weights, expected_weights = second.save().weights, whole.save().weights
    for name in weights:
        if not name.endswith("c_attn.bias"):  # a key's has no gradient but rounding, see above
            np.testing.assert_allclose(weights[name], expected_weights[name], rtol=1e-3, atol=1e-5, err_msg=name)


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    """Nor does any after it; and who looks later learns which it was."""
    flags = DeviceFlags("cuda", graph=True, pad_vocab=True)
    engine = TorchEngine(MODEL, dataclasses.replace(TRAINING, dtype="float32", optimizer=optimizer), flags)
    engine.train_step(0, [batch(0)], 1e-2)
    engine.check()
    with torch.no_grad():
        engine.gpt.wpe.weight[0, 0] = torch.nan
    before = engine.save()
    for step in (1, 2):
        engine.train_step(step, [batch(step)], 1e-2)
    after = engine.save()
    for part, now in zip(vars(before).values(), vars(after).values(), strict=True):
        assert all(np.array_equal(part[name], now[name], equal_nan=True) for name in part)
    with pytest.raises(ValueError, match="at step 1"):
        engine.check()


@needs_gpu
def test_deterministic_runs_on_a_gpu_repeat_to_the_last_bit(tmp_path: Path) -> None:
    flags = ["--preset", "full", "--n-layer", "2", "--data", "verse", "--max-steps", "30", "--log-interval", "1"]
    for name in ("one", "two"):
        done = run([sys.executable, "train_torch.py", *flags, "--deterministic", "--run-dir", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
