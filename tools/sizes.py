"""The sizes of a model: parameters, memory, floating-point operations.

`python -m tools.export info RUN` prints them.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from numpygpt import GPTConfig, param_shapes
from training.flops import forward_flops_per_token
from training.run import read_config


def num_params(config: GPTConfig) -> int:
    return sum(map(prod, param_shapes(config).values()))


KINDS = {  # a part of the name -> what it is, and the usual estimate of how many parameters
    "wte.": ("token embedding, also the head", "V C", lambda c: c.vocab_size * c.n_embd),
    "wpe.": ("position embedding", "T C", lambda c: c.block_size * c.n_embd),
    ".attn.": ("attention", "4 L C^2", lambda c: 4 * c.n_layer * c.n_embd**2),
    ".mlp.": ("MLP", "8 L C^2", lambda c: 8 * c.n_layer * c.n_embd**2),
    "ln_": ("norms", "", lambda c: 0),
}


def count_kinds(config: GPTConfig) -> dict[str, tuple[int, str, int]]:
    """{kind: (exact number of parameters, the estimate's formula, the estimate)}."""
    counts = {}
    for part, (kind, formula, estimate) in KINDS.items():
        exact = sum(prod(shape) for name, shape in param_shapes(config).items() if part in name)
        counts[kind] = exact, formula, estimate(config)
    return counts


def info(run: Path) -> None:
    """Print the tables of a run's model."""
    settings = read_config(run)
    config = settings.model
    dtype = np.dtype(np.float64 if settings.training.dtype == "float64" else np.float32)
    N, counts = num_params(config), count_kinds(config)
    print(
        f"{run}: L {config.n_layer}, nh {config.n_head}, C {config.n_embd}, T {config.block_size}, "
        f"V {config.vocab_size}, {'with' if config.bias else 'no'} biases"
    )
    estimate = sum(guess for _, _, guess in counts.values())
    rows = [(kind, f"{n:,}", f"{n / N:.1%}", f"{guess:,}", formula) for kind, (n, formula, guess) in counts.items()]
    rows.append(("all", f"{N:,}", "100.0%", f"{estimate:,}", f"{estimate / N - 1:+.2%}"))
    print_table(("parameters", "exact", "share", "estimate", ""), rows)

    kept = 2 * config.n_layer * config.n_embd * dtype.itemsize
    memory = [
        ("weights", millions(N * dtype.itemsize)),
        ("to train: also gradients, m and v", millions(4 * N * dtype.itemsize)),
        ("keys and values of a full window", millions(config.block_size * kept)),
    ]
    print_table((f"memory, {dtype.name}", "MB"), memory)

    forward, estimate = forward_flops_per_token(config), 2 * N + 4 * config.n_layer * config.n_embd * config.block_size
    flops = [
        ("forward", millions(forward), millions(estimate), "2 N + 4 L C T"),
        ("forward and backward", millions(3 * forward), millions(3 * estimate), "6 N + 12 L C T"),
    ]
    print_table(("MFLOP per token", "exact", "estimate", ""), flops)


def millions(n: float) -> str:
    return f"{n / 1e6:,.2f}"


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table in columns: the first and a last without a title to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i == 0 or not head[i] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
