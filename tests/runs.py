"""Small training runs for the tests of training/, the trainers and sample.py."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import train_numpy
import train_torch
from common.cli import run_program
from data import verse
from numpygpt import GPTConfig
from training import loop
from training.config import TrainConfig
from training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"numpy": train_numpy.main, "torch": train_torch.main}
ENGINES = tuple(MAINS)

# Small enough that a run takes a second, with everything in it that a large one has.
SMALL = {
    "--preset": "tiny",
    "--n-layer": 2,
    "--n-embd": 16,
    "--block-size": 16,
    "--batch-size": 6,
    "--max-steps": 12,
    "--decay-steps": 12,
    "--warmup-steps": 3,
    "--eval-interval": 5,
    "--estimate-interval": 4,
    "--estimate-batches": 2,
    "--log-interval": 1,
    "--threads": 1,
}


def make_engine(
    kind: str, model: GPTConfig, training: TrainConfig, **device: object
) -> "train_numpy.NumpyEngine | train_torch.TorchEngine":
    """What a trainer trains with. device: fields of PyTorch's DeviceFlags, by default the plainest."""
    if kind == "numpy":
        return train_numpy.NumpyEngine(model, training, threads=1)
    return train_torch.TorchEngine(model, training, train_torch.DeviceFlags(**{"device": "cpu"} | device))


def skip_what_is_slow(patch: pytest.MonkeyPatch) -> None:
    """Pictures and samples take longer than the runs, and are tested elsewhere."""
    patch.setattr(loop, "draw_losses", lambda *_: None)
    for trainer in (train_numpy, train_torch):
        patch.setattr(trainer, "show_sample", lambda *_: None)


def write_text(folder: Path, num_chars: int = 4000) -> Path:
    """A corpus of pseudo-verse."""
    path = folder / "text.txt"
    path.write_text(verse.write(num_chars, 7), encoding="utf-8")
    return path


def arguments(flags: dict[str, object]) -> list[str]:
    """{"--n-layer": 2, "--overwrite": ""} -> ["--n-layer", "2", "--overwrite"]"""
    return [word for name, value in flags.items() for word in (name, str(value)) if word != ""]


def start(engine: str, text: Path, run_dir: Path, **flags: object) -> int:
    """Train in this process from the beginning; flags as max_steps=20 -> the exit status."""
    given = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    return run(engine, arguments(SMALL | {"--data": text, "--run-dir": run_dir} | given))


def resume(engine: str, run_dir: Path, **flags: object) -> int:
    """Go on with a run in this process -> the exit status."""
    given = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    return run(engine, arguments({"--resume": run_dir, "--threads": 1} | given))


def run(engine: str, argv: Sequence[str]) -> int:
    """A trainer's command line in this process -> the exit status."""
    return run_program(lambda: MAINS[engine](argv))


def refused(program: Callable[[], int], capsys: pytest.CaptureFixture) -> tuple[str, str]:
    """What a program printed, in this process, that must stop with one line about something the user can mend.

    -> standard output, and that line.
    """
    capsys.readouterr()
    assert program() in (1, 2)
    printed = capsys.readouterr()
    return printed.out, one_line(printed.err)


def one_line(stderr: str) -> str:
    """The error, which must be a single line."""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


def command(program: str, *argv: object, **options: object) -> subprocess.CompletedProcess:
    """A program of the project in a process of its own, without a network, its output captured as text."""
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    options = {"env": os.environ} | options
    options["env"] = options["env"] | no_network
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    argv = [sys.executable, ROOT / program, *map(str, argv)]
    return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=120, **options)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start in milliseconds")


def forked(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start target(*args) in a process of its own, without the seconds in which it would load PyTorch: it is forked off
    a server that has loaded everything already. target must be a function of a module."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=target, args=args)
    process.start()
    return process


def state(path: Path) -> dict:
    """The state in a checkpoint."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["state"])


def content(run_dir: Path) -> dict[str, object]:
    """Everything that a run came to, to the bit, without the clock."""
    files = sorted(run_dir.glob("*.safetensors"))
    tensors = {path.name: {name: array.tobytes() for name, array in load_file(path).items()} for path in files}
    states = {path.name: {k: v for k, v in state(path).items() if k != "seconds"} for path in files}
    return {"tensors": tensors, "states": states, "metrics": measured(run_dir)}


def measured(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the columns that tell the time."""
    clock = ("seconds", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(run_dir / "metrics.jsonl")]
