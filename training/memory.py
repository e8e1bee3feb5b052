"""Does it fit into this machine's memory? Said before anything is allocated, or written."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from numpygpt import GPTConfig, is_for_muon, param_shapes
from training.config import TrainConfig

# Where Linux keeps the limit of a container: in its control groups of version 2, or 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class MemoryUse:
    """What an engine that computes on the CPU takes memory for."""

    scores_kept: bool  # attention keeps its (T, T) matrices for the backward pass
    recompute: bool = False  # of each block, only the input is kept
    processes: int = 1  # that share each batch
    processes_here: int = 1  # of them, how many are on this machine
    hint: str = "more --grad-accum"  # what would help, even where a run is resumed


def check_memory(model: GPTConfig, training: TrainConfig, use: MemoryUse) -> None:
    """Raises UserError if each process on this machine needs more bytes than it can have."""
    needed = memory_needed(model, training, use)
    if hasattr(os, "sysconf") and needed > (there := cpu_memory() / use.processes_here):  # Windows does not say
        raise UserError(
            f"this needs about {needed / 2**30:,.1f} GB of memory, and a process here has {there / 2**30:,.1f}: choose "
            f"{use.hint}; or for a new run a smaller --preset, or a lower --batch-size or --block-size"
        )


def memory_needed(model: GPTConfig, training: TrainConfig, use: MemoryUse) -> float:
    """Bytes that each of the processes which train one model needs at least."""
    number = 8 if training.dtype == "float64" else 4
    activation = 2 if training.dtype == "bfloat16" else number
    muon = training.optimizer == "muon"
    # Weights, gradients and both moments; Muon has only one.
    state = sum(
        (3 if muon and is_for_muon(name, len(shape)) else 4) * math.prod(shape)
        for name, shape in param_shapes(model).items()
    )
    rows = -(-training.batch_size // (training.grad_accum * use.processes)) * model.block_size
    # What the backward pass needs of each block: some 16 arrays of C channels; and three of the logits' size.
    block = 16 * model.n_embd + use.scores_kept * model.n_head * model.block_size
    blocks = model.n_layer * model.n_embd + block if use.recompute else model.n_layer * block
    return number * state + activation * rows * (blocks + 3 * model.vocab_size)


def cpu_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use, if it says so and that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in LIMITS if path.exists()]
    return min([physical, *(int(limit) for limit in limits if limit != "max")])
