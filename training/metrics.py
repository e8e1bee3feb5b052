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
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import UserError, shorten
from common.files import plot_text, read_bytes, write_atomically, write_figure

MAX_BYTES = 1 << 30
SPLITS = ("train", "val")
PROTOCOLS = ("batch", "estimate", "full")


class MetricsWriter:
    """Appends measurements to a metrics.jsonl. Each line is a single write: whoever reads along sees whole lines.

    Raises UserError if there is a symbolic link of that name, which is not followed.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0, opener=open_unfollowed)  # noqa: SIM115  closed with the writer

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

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def open_unfollowed(path: str, flags: int) -> int:
    """An opener for files that are written where they are: not through a symbolic link, and without waiting."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if os.path.islink(path):
            raise UserError(f"{path} is a symbolic link, which is not followed for writing: delete it") from error
        raise


def read_metrics(path: Path) -> list[dict]:
    """The measurements of a metrics.jsonl, in order; none if there is no file.

    A last line without its line end is what a power cut leaves of a write: it is no measurement. Raises UserError that
    names the file and the line for anything else that MetricsWriter does not write.
    """
    if not os.path.lexists(path):
        return []
    lines = read_bytes(path, "the metrics of a run", max_bytes=MAX_BYTES).split(b"\n")
    return [parse(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def parse(line: bytes, path: Path, number: int) -> dict:
    """One line of a metrics.jsonl. Raises UserError."""
    try:
        fields = json.loads(line)
        if (
            type(fields["step"]) is int
            and 0 <= fields["step"] < 2**31
            and fields["split"] in SPLITS
            and fields["protocol"] in PROTOCOLS
            and all(is_sensible(value) for name, value in fields.items() if name not in ("split", "protocol"))
            and "loss" in fields
        ):
            return fields
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}, line {number}: not a measurement; delete the file to resume without what was measured")


def is_sensible(value: object) -> bool:
    """Is it a number that a training run measures, and that can be drawn?"""
    return type(value) in (int, float) and abs(value) < 1e30  # type: ignore[arg-type]  # which NaN is not


def metrics_until(metrics: Sequence[dict], step: int) -> list[dict]:
    """What a checkpoint at `step` knows of: the batches of the updates before it, and the evaluations up to it.

    Whoever resumes from there measures the rest again.
    """
    return [m for m in metrics if m["step"] < step or (m["step"] == step and m["protocol"] != "batch")]


def write_metrics(path: Path, metrics: Sequence[dict]) -> None:
    """Put a metrics.jsonl of these measurements in place of the one that is there. Raises OSError."""
    write_atomically(path, b"".join(json.dumps(m).encode() + b"\n" for m in metrics))


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


def draw_losses(path: Path, metrics_file: Path, title: str, lines: dict[str, float]) -> None:
    """Draw all losses over the steps into a PNG; `lines` are horizontal ones with their labels, in nats per token.

    A picture is no reason for a run to fail: whatever goes wrong is one line on standard error.
    """
    try:
        draw(path, read_metrics(metrics_file), title, lines)
    except Exception as error:
        print(f"no {path.name}: {type(error).__name__}: {shorten(str(error))}", file=sys.stderr)


def draw(path: Path, metrics: list[dict], title: str, lines: dict[str, float]) -> None:
    from matplotlib.figure import Figure  # slow to load: --help must not wait for it

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(title=plot_text(title), xlabel="step", ylabel="loss (nats per token)")
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
    write_figure(path, figure)
