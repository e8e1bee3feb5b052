"""metrics.jsonl, one measurement to a line, and loss.png, its picture.

    {"step": 250, "split": "val", "protocol": "full", "loss": 1.93, "bits_per_char": 2.78, "tokens": 192000, ...}

step       how many updates the measured weights have had
split      train, val
protocol   batch: the training batch that the next update learns from; estimate: random batches; full: the whole split
loss       nats per token

Where they apply: lr and grad_norm of the update (of a batch, the one it leads to; else the last one), tokens learned
from so far, seconds since the run began (stops not counted), tokens_per_s since the last such line, bits_per_char.
"""

import errno
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import UserError
from common.files import write_atomically
from training.checkpoint import read_measured

__all__ = ["MetricsWriter", "draw_losses", "read_metrics", "trim_metrics"]

MAX_BYTES = 1 << 30
SPLITS = ("train", "val")
PROTOCOLS = ("batch", "estimate", "full")


class MetricsWriter:
    """Appends measurements to a metrics.jsonl. Each line is a single write: whoever reads along sees whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed when the writer's own context is

    def write(self, step: int, split: str, protocol: str, loss: float, **others: float) -> None:
        """Append one measurement. Raises OSError as any write does."""
        fields = {"step": step, "split": split, "protocol": protocol, "loss": loss, **others}
        line = json.dumps(fields, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) < len(line):  # the disk is full: no half lines
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def sync(self) -> None:
        """Return once all lines are on the disk: before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The measurements of a metrics.jsonl, in order; none if there is no file.

    A last line without its line end is what a power cut leaves of a write: it is no measurement. Raises UserError that
    names the file and the line for anything else that MetricsWriter does not write.
    """
    if not path.exists():
        return []
    lines = read_measured(path, "the metrics of a run", MAX_BYTES).split(b"\n")
    return [parse(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def parse(line: bytes, path: Path, number: int) -> dict:
    """One line of a metrics.jsonl. Raises UserError."""
    try:
        fields = json.loads(line)
        if (
            type(fields["step"]) is int
            and fields["split"] in SPLITS
            and fields["protocol"] in PROTOCOLS
            and math.isfinite(fields["loss"])
        ):
            return fields
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        pass
    raise UserError(f"{path}, line {number}: not a measurement; delete the file to go on without what was measured")


def trim_metrics(path: Path, step: int) -> None:
    """Forget what was measured after a checkpoint at `step`: whoever goes on from there measures it again.

    What stays are the batches of the updates before it and the evaluations up to it.
    """
    kept = [m for m in read_metrics(path) if m["step"] < step or (m["step"] == step and m["protocol"] != "batch")]
    write_atomically(path, b"".join(json.dumps(m).encode() + b"\n" for m in kept))


def curve(metrics: list[dict], split: str, protocol: str) -> tuple[list[int], list[float]]:
    """Steps and losses of one kind of measurement."""
    chosen = [m for m in metrics if m["split"] == split and m["protocol"] == protocol]
    return [m["step"] for m in chosen], [m["loss"] for m in chosen]


def smooth(values: list[float], weight: float = 0.9) -> Iterator[float]:
    """The running mean in which each earlier value counts `weight` times the next one."""
    total = count = 0.0
    for value in values:
        total, count = weight * total + value, weight * count + 1
        yield total / count


def draw_losses(path: Path, metrics: list[dict], title: str, lines: dict[str, float]) -> None:
    """Draw all losses over the steps into a PNG; `lines` are horizontal ones with their labels, in nats per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes longer to load than --help may take
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss (nats per token)")
    steps, losses = curve(metrics, "train", "batch")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, list(smooth(losses)), color="tab:blue", label="training batches, smoothed")
    for split, colour in (("train", "tab:blue"), ("val", "tab:orange")):
        axes.plot(*curve(metrics, split, "estimate"), "o--", color=colour, markersize=3, label=f"{split}, estimate")
    axes.plot(*curve(metrics, "val", "full"), "s-", color="tab:red", markersize=4, label="val, whole split")
    for (label, height), style in zip(lines.items(), ("--", ":"), strict=False):
        axes.axhline(height, color="grey", linestyle=style, linewidth=1, label=f"{label} {height:.4f}")
    axes.legend()
    axes.grid(alpha=0.2)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(path, png.getvalue())
