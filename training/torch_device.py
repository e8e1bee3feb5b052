"""Where and how PyTorch computes: the flags of train_torch.py, what suits which device, and what goes together."""

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from common.cores import usable_cores
from common.errors import UserError
from training.config import Flags
from training.flops import training_flops_per_token
from training.memory import MemoryUse
from training.run import Run

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class DeviceFlags:
    """Where and how PyTorch computes. The defaults are those that suit the device; see `device_defaults`."""

    device: Device  # by default a CUDA GPU if there is one, else Apple's, else the CPU
    compile: bool = False  # torch.compile; elsewhere than on a CUDA GPU it may cost more than it gains
    pad_vocab: bool = False  # compute the head in a multiple of 64 columns, a width that tensor cores like
    graph: bool = False  # record a whole step as a CUDA graph and replay it: Python no longer holds up the GPU
    attention: Literal["sdpa", "explicit"] = "sdpa"  # PyTorch's fused kernel, or softmax(QK')V written out
    recompute: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more time
    deterministic: bool = False  # a GPU adds in one order: a seed gives the same bits again, at a lower speed


@dataclass(frozen=True)
class TorchFlags(Flags):
    """All flags of train_torch.py."""

    device: DeviceFlags


def device_defaults(argv: Sequence[str] | None) -> DeviceFlags:
    """What suits the device that the command line names, or else the best there is. Raises UserError."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--device", nargs="?")
    asked = first_look.parse_known_args(argv)[0].device
    available: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [kind for kind in available if available[kind]]
    if asked in available and asked not in there:
        raise UserError(f"device {asked} is not available here: choose {' or '.join(there)}")
    kind: Device = asked if asked in available else there[0]
    # Triton, which torch.compile needs on a GPU, is not made for Windows.
    return DeviceFlags(kind, compile=kind == "cuda" and platform.system() != "Windows", pad_vocab=kind == "cuda")


def resolve_flags(flags: TorchFlags, world_size: int) -> TorchFlags:
    """The flags with `auto` decided, for so many processes. Raises UserError for combinations that cannot be."""
    device, training = flags.device, flags.training
    dtype = training.dtype
    if dtype == "auto":  # bfloat16 can be emulated, but that is slow
        native = device.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    if dtype == "float64" and device.device == "mps":
        raise UserError("device mps has no float64: choose --dtype float32 or --device cpu")
    if device.graph:
        if device.device != "cuda":
            raise UserError("--graph records the work of a CUDA GPU: leave it out")
        if world_size > 1:
            raise UserError(f"--graph records the work of one process, not of {world_size}: leave it out")
        if dtype == "float64":
            raise UserError("--graph cannot record float64: leave it out")
        if device.recompute and flags.model.dropout > 0:  # which sets the random generator back
            raise UserError("--graph cannot record --recompute with dropout: leave one out")
    if training.batch_size // training.grad_accum < world_size:
        raise UserError(
            f"each of the {world_size} processes needs a sequence of every micro-batch: batch_size "
            f"{training.batch_size} in {training.grad_accum} parts has too few"
        )
    return replace(flags, training=replace(training, dtype=dtype))


def configure_torch(flags: DeviceFlags, threads: int | None) -> None:
    """Settings of the whole process. Before anything runs on a GPU."""
    # PyTorch's own number respects taskset and OMP_NUM_THREADS, but not the quota of a container.
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
    torch.set_float32_matmul_precision("high" if flags.device == "cuda" else "highest")  # high: TF32
    if flags.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
    torch.use_deterministic_algorithms(flags.deterministic)
    deterministic: Any = torch.utils.deterministic  # which has no type hints
    deterministic.fill_uninitialized_memory = False  # nothing here reads such memory


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32 inside, so that the loss reported is the one that any engine finds."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def memory_use(flags: DeviceFlags, world_size: int) -> MemoryUse | None:
    """What training takes this machine's memory for; None on a GPU, which says itself when it is full."""
    if flags.device != "cpu":
        return None
    return MemoryUse(
        scores_kept=flags.attention == "explicit",
        recompute=flags.recompute,
        processes=world_size,
        processes_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size > 1 else 1,
        hint="more --grad-accum, or --recompute",
    )


def print_device(run: Run, flags: DeviceFlags, world_size: int) -> None:
    """Say what was chosen; and where there is no GPU, what that means."""
    modes = ["compiled" if flags.compile else "eager"]
    modes += ["CUDA graph"] if flags.graph else []
    modes += ["padded head"] if flags.pad_vocab else []
    modes += ["recomputed blocks"] if flags.recompute else []
    modes += [f"{world_size} processes"] if world_size > 1 else []
    print(f"device {flags.device}, {run.training.dtype}, {', '.join(modes)}")
    made = run.checkpoint.state.step if run.checkpoint else 0
    steps, tokens = run.training.max_steps - made, run.training.batch_size * run.model.block_size
    hours = steps * tokens * training_flops_per_token(run.model) / 1e11 / 3600
    if flags.device == "cpu" and hours > 0.5:
        print(
            f"no GPU: {steps:,} steps of {tokens:,} tokens would take about {hours:,.0f} hours at 100 GFLOP/s, a rate "
            "that two CPU cores may reach; --preset small takes minutes"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Is the device full? On a CPU that is a RuntimeError like any other."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """What kind of error it is, and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
