"""The loss curves of two runs laid on each other, and how far apart they are, step by step.

    python train_numpy.py --preset small --dtype float64 --run-dir runs/numpy-float64
    python train_torch.py --preset small --dtype float64 --device cpu --run-dir runs/torch-float64
    python -m tools.curves runs/numpy-float64 runs/torch-float64 --out docs/curves.png

Two engines that start from the same seed see the same weights and the same batches: what is left between their curves
is rounding.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

from common.cli import parse, run_program
from common.errors import UserError
from common.files import plot_text, write_figure
from training.metrics import read_metrics


@dataclass(frozen=True)
class Options:
    """Draw the training losses of two runs, and their difference."""

    first: tyro.conf.Positional[Path]  # a run folder
    second: tyro.conf.Positional[Path]  # another
    out: Path = Path("docs/curves.png")  # the picture


def batch_losses(run: Path) -> dict[int, float]:
    """Step -> loss of the training batch. Raises UserError if the run has measured none."""
    losses = {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl") if m["protocol"] == "batch"}
    if not losses:
        raise UserError(f"{run}: no training losses in metrics.jsonl; give the folder of a run")
    return losses


def draw(first: Path, second: Path, out: Path) -> float:
    """Draw both curves over the steps that both runs measured -> the largest relative difference between them."""
    from matplotlib.figure import Figure  # slow to load: --help must not wait for it

    a, b = batch_losses(first), batch_losses(second)
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise UserError(f"{first} and {second} measured no step in common")
    losses_a, losses_b = np.array([a[s] for s in steps]), np.array([b[s] for s in steps])
    apart = np.abs(losses_a - losses_b) / losses_a

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(steps, losses_a, color="tab:blue", linewidth=3.5, alpha=0.4, label=plot_text(first.name))
    above.plot(steps, losses_b, color="tab:red", linewidth=0.9, label=plot_text(second.name))
    above.set_ylabel("training loss (nats per token)")
    above.set_title("Two implementations, one function")
    above.legend()
    # A difference of exactly zero has no place on a logarithmic axis: it is drawn at the rounding limit.
    below.semilogy(steps, np.maximum(apart, np.finfo(np.float64).eps), color="black", linewidth=0.9)
    below.set_ylabel("relative\ndifference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.2)
    write_figure(out, figure)
    return float(apart.max())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m tools.curves", argv)
    apart = draw(options.first, options.second, options.out)
    print(f"{options.out}: the two curves are at most {apart:.1e} apart, relative")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
