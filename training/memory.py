"""Does it fit into this machine's memory? Said before anything is allocated, or written."""

import math
import os
from pathlib import Path

from common.errors import UserError
from numpygpt import GPTConfig, param_shapes
from training.config import TrainConfig

# Where Linux keeps the limit of a container: in its control groups of version 2, or 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

__all__ = ["check_memory", "cpu_memory", "memory_needed"]


def check_memory(needed: float, hint: str, processes: int = 1) -> None:
    """Raises UserError if `processes` on this machine, each of which needs so many bytes, cannot all have them.

    hint: what would help, even where a run goes on
    """
    if hasattr(os, "sysconf") and needed > (there := cpu_memory() / processes):  # Windows does not say
        raise UserError(
            f"this needs about {needed / 2**30:,.1f} GB of memory, and a process here has {there / 2**30:,.1f}: choose "
            f"{hint}; or for a new run a smaller --preset, or a lower --batch-size or --block-size"
        )


def memory_needed(
    model: GPTConfig, training: TrainConfig, *, scores_kept: bool, recompute: bool = False, processes: int = 1
) -> float:
    """Bytes that each of the processes which train one model needs at least.

    scores_kept: attention keeps its (T, T) matrices for the backward pass
    recompute: of each block, only the input is kept
    """
    number = 8 if training.dtype == "float64" else 4
    activation = 2 if training.dtype == "bfloat16" else number
    state = 4 * sum(math.prod(shape) for shape in param_shapes(model).values())  # weights, gradients, both moments
    rows = -(-training.batch_size // (training.grad_accum * processes)) * model.block_size
    # What the backward pass needs of each block: some 16 arrays of C channels; and three of the logits' size.
    block = 16 * model.n_embd + scores_kept * model.n_head * model.block_size
    blocks = model.n_layer * model.n_embd + block if recompute else model.n_layer * block
    return number * state + activation * rows * (blocks + 3 * model.vocab_size)


def cpu_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use, if it says so and that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in LIMITS if path.exists()]
    return min([physical, *(int(limit) for limit in limits if limit != "max")])
