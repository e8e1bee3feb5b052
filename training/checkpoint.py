"""Checkpoints: one safetensors file each, put in place by one atomic rename. A crash leaves the old one or the new one.

    last.safetensors    the weights by their names, and AdamW's moments m.<name> and v.<name>
    best.safetensors    the weights alone

The metadata holds the state of the run and the model's config, both as JSON, the SHA-256 of the run's tokenizer.json,
and a SHA-256 of the file itself (see common.tensors). Nothing that is read is trusted: the hash, names, shapes, dtypes
and every number are checked before anything is built from it. What is wrong is a UserError that names file and fault.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError, shorten
from common.files import build, parse_json, read_bytes, replace_atomically
from common.tensors import MAX_HEADER_BYTES, TensorFile, open_tensors, write_tensors
from data.tokenizers import MAX_FILE_BYTES
from numpygpt import GPTConfig, Params, param_shapes

TOKENIZER = "tokenizer.json"
STORED_AS = {"F32": np.float32, "F64": np.float64}
MAX_LOSS = 1e30


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its tensors. Raises ValueError that names the field."""

    step: int = 0  # updates made
    grad_norm: float | None = None  # of the last one's gradient, before clipping
    best_step: int | None = None  # of the lowest whole-split validation loss so far
    best_loss: float | None = None
    seconds: float = 0.0  # the run has taken so far, stops not counted

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step < 2**31:
            raise ValueError(f"step must be an integer of at least 0, got {shorten(self.step)}")
        if (self.best_step is None) != (self.best_loss is None):
            raise ValueError("best_step and best_loss must be there together, or neither")
        if self.best_step is not None and (type(self.best_step) is not int or not 0 <= self.best_step <= self.step):
            raise ValueError(f"best_step must be an integer from 0 to step, got {shorten(self.best_step)}")
        for name in ("grad_norm", "best_loss", "seconds"):
            value = getattr(self, name)
            optional = name != "seconds" and value is None
            if not optional and (type(value) not in (int, float) or not 0 <= value < MAX_LOSS):
                raise ValueError(f"{name} must be a number of at least 0, got {shorten(value)}")


@dataclass(frozen=True)
class Snapshot:
    """All tensors that a run resumes from, by parameter name. An optimizer without second moments for some parameters
    leaves those out of v."""

    weights: Params
    m: Params  # first moments
    v: Params  # second moments


@dataclass(frozen=True)
class Checkpoint:
    """What last.safetensors holds."""

    snapshot: Snapshot
    state: State


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_last(path: Path, snapshot: Snapshot, state: State, config: GPTConfig) -> None:
    """save_tensors, with the moments."""
    moments = {f"{kind}.{name}": array for kind in "mv" for name, array in getattr(snapshot, kind).items()}
    save_tensors(path, snapshot.weights | moments, state, config)


def save_tensors(path: Path, tensors: Params, state: State, config: GPTConfig) -> None:
    """Put tensors and state in place of the file at `path`, whose folder has the run's tokenizer.json.

    The tensors are streamed from where they are. Raises OSError as any write does, and ValueError for numbers that are
    not finite, which no one could load; then the file that was there still is.
    """
    metadata = {"state": json.dumps(asdict(state)), "config": json.dumps(asdict(config))}
    with replace_atomically(path) as file:
        write_tensors(file, tensors, metadata | {TOKENIZER: tokenizer_hash(path.parent)}, seal=True)


def tokenizer_hash(folder: Path) -> str:
    """The SHA-256 of a run's tokenizer.json. Raises UserError if it cannot be read."""
    content = read_bytes(folder / TOKENIZER, "the run's tokenizer", max_bytes=MAX_FILE_BYTES)
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(
    path: Path, config: GPTConfig, dtype: type[np.floating], without_v: Sequence[str] = ()
) -> Checkpoint:
    """Everything in a last.safetensors of a model with these sizes and this dtype. Arrays are views of the mapped file.

    Before the first step there may be no moments, which are zeros then: so it is with imported weights.
    without_v: the parameters whose optimizer has no second moment. Raises UserError.
    """
    shapes = param_shapes(config)
    moments = {f"m.{name}": shape for name, shape in shapes.items()}
    moments |= {f"v.{name}": shape for name, shape in shapes.items() if name not in without_v}
    file = open_checkpoint(path, config)
    state = build(State, parse_json(file.metadata["state"].encode(), f"{path}, state"), path)
    fresh = state.step == 0 and len(file.tensors) == len(shapes)
    expected = shapes | ({} if fresh else moments)
    for name in [*expected, *file.tensors]:
        if name not in file.tensors or name not in expected:
            fault = "missing" if name in expected else "not of this model"
            raise UserError(f"{path}: tensor {shorten(name)} is {fault}")
    arrays = read_arrays(file, expected, dtype)
    if fresh:
        arrays |= {name: np.broadcast_to(dtype(0), shape) for name, shape in moments.items()}
    weights, m, v = (
        {name: arrays[prefix + name] for name in shapes if prefix + name in arrays} for prefix in ("", "m.", "v.")
    )
    for name, second_moment in v.items():
        if (second_moment < 0).any():
            raise UserError(f"{path}: v.{name} has negative entries, which no mean of squares has")
    return Checkpoint(Snapshot(weights, m, v), state)


def load_weights(path: Path, config: GPTConfig) -> Params:
    """The weights in a checkpoint of either kind, float32 or float64: views of the mapped file, so that they take no
    memory of their own. Raises UserError."""
    shapes = param_shapes(config)
    file = open_checkpoint(path, config)
    for name in [*shapes, *file.tensors]:
        if name not in file.tensors:
            raise UserError(f"{path}: tensor {shorten(name)} is missing")
        if name.removeprefix("m.").removeprefix("v.") not in shapes:
            raise UserError(f"{path}: tensor {shorten(name)} is not of this model")
    return read_arrays(file, shapes, None)


def open_checkpoint(path: Path, config: GPTConfig) -> TensorFile:
    """A checkpoint that is whole, of this config, and of the tokenizer beside it. Raises UserError."""
    max_bytes = 3 * 8 * sum(map(math.prod, param_shapes(config).values())) + MAX_HEADER_BYTES
    file = open_tensors(path, "a checkpoint of this model", max_bytes=max_bytes, sealed=True)
    for name in ("state", "config", TOKENIZER):
        if name not in file.metadata:
            raise UserError(f"{path}: is no checkpoint of a run: its metadata has no {name}")
    stored = build(GPTConfig, parse_json(file.metadata["config"].encode(), f"{path}, config"), path)
    for name, value in asdict(config).items():
        if name != "dropout" and getattr(stored, name) != value:  # dropout is no part of what the weights mean
            raise UserError(f"{path}: the model has {name} {getattr(stored, name)}, the run's config.json {value}")
    if tokenizer_hash(path.parent) != file.metadata[TOKENIZER]:
        raise UserError(f"{path.parent / TOKENIZER}: its SHA-256 is not the one in {path.name}; one of them is damaged")
    return file


def read_arrays(file: TensorFile, shapes: dict[str, tuple[int, ...]], dtype: type[np.floating] | None) -> Params:
    """These tensors of a file, all of one dtype: the given one, or that of the first. Raises UserError."""
    kinds = {name: file.tensors[name].dtype for name in shapes}
    wanted = next(iter(kinds.values())) if dtype is None else {v: k for k, v in STORED_AS.items()}[dtype]
    for name, shape in shapes.items():
        if file.tensors[name].shape != shape:
            raise UserError(f"{file.path}: {name} must have shape {shape}, got {shorten(file.tensors[name].shape)}")
        if kinds[name] != wanted or wanted not in STORED_AS:
            raise UserError(
                f"{file.path}: {name} must have dtype {wanted if wanted in STORED_AS else 'F32 or F64'}, "
                f"got {kinds[name]}"
            )
    return {name: file.tensors[name].read() for name in shapes}
