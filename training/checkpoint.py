"""Checkpoints on disk: a crash at any moment loses nothing, and nothing that is read is trusted.

A checkpoint is a folder, last/ or best/, of three files that belong together:

    model.safetensors        the weights
    optimizer.safetensors    AdamW's moments, m.<name> and v.<name>
    state.json               the step and what else a run goes on with; the model's sizes; the SHA-256 of its other
                             files, of the run's tokenizer.json, and of itself

Writing. The three go into <name>.new, each flushed to the disk, then the folder itself. Only then is the checkpoint
swapped in: <name> is renamed to <name>.old, <name>.new to <name>, and <name>.old is deleted. A crash leaves one of:

    <name> is there                    it is whole; a .new or .old beside it is rubbish
    <name> is not there, .old is       the crash fell between the renames: .new is whole, and takes its place
    neither is there                   the first save never finished: there is no checkpoint

`recover` acts on that. A checkpoint is a matching set by construction; the hashes prove it to whoever reads.

Reading. Every file is measured before it is read, and checked before anything is built from it: the hashes, names,
shapes, dtypes, and that all numbers are finite. Whatever is wrong is a UserError that names the file and the fault.
Safetensors hold numbers and JSON holds text: no file can make this program run code.
"""

import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import UserError, shorten
from common.files import parse_json, read_bytes, read_json, sync_folder, write_new
from numpygpt import GPTConfig, Params, param_shapes

MODEL, OPTIMIZER, STATE, TOKENIZER = "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"
MAX_HEADER_BYTES = 8 << 20  # of a safetensors file: names, shapes and offsets of some 50,000 tensors
DTYPES = {"F32": np.float32, "F64": np.float64}

Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """Where a run stands, besides weights and moments. Raises ValueError that names the field."""

    step: int  # updates made
    t: int  # the optimizer's own count of them
    best_step: int | None  # of the lowest whole-split validation loss so far
    best_loss: float | None
    seconds: float  # the run has taken so far, stops not counted
    engine: str  # that made the last of the updates

    def __post_init__(self) -> None:
        for name in ("step", "t"):
            if type(value := getattr(self, name)) is not int or not 0 <= value < 2**31:
                raise ValueError(f"{name} must be an integer of at least 0, got {shorten(value)}")
        if (self.best_step is None) != (self.best_loss is None):
            raise ValueError("best_step and best_loss must be there together, or neither")
        if self.best_step is not None and (type(self.best_step) is not int or not 0 <= self.best_step <= self.step):
            raise ValueError(f"best_step must be an integer from 0 to step, got {shorten(self.best_step)}")
        for name in ("best_loss", "seconds"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e30):
                raise ValueError(f"{name} must be a number of at least 0, got {shorten(value)}")
        if self.engine not in ("numpy", "torch"):
            raise ValueError(f"engine must be numpy or torch, got {shorten(self.engine)}")


@dataclass(frozen=True)
class Checkpoint:
    """A matching set: weights, AdamW's moments m and v with the same names and shapes, and the state."""

    weights: Params
    m: Params
    v: Params
    state: State


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(run: Path, name: str, checkpoint: Checkpoint, config: GPTConfig) -> None:
    """Put a checkpoint in place of run/<name>, as told above.

    Raises OSError as any write does, and ValueError for numbers that are not finite, which no one could load. Then the
    checkpoint that was there still is.
    """
    save_checkpoints(run, [name], checkpoint, config)


def save_checkpoints(run: Path, names: Sequence[str], checkpoint: Checkpoint, config: GPTConfig) -> None:
    """save_checkpoint for each name in turn, with what they have in common made ready once."""
    from safetensors.numpy import save  # here: it takes longer to load than --help may take

    kinds = {"m": checkpoint.m, "v": checkpoint.v}
    moments = {f"{kind}.{name}": array for kind, arrays in kinds.items() for name, array in arrays.items()}
    for tensor, array in (checkpoint.weights | moments).items():
        if not np.isfinite(array).all():
            raise ValueError(f"not finite: {tensor}")
    content = {OPTIMIZER: save(moments), MODEL: save(checkpoint.weights)}
    hashes = {file: sha256(data) for file, data in content.items()} | {
        TOKENIZER: sha256((run / TOKENIZER).read_bytes())
    }
    content[STATE] = state_json(checkpoint.state, config, hashes)
    for name in names:
        put_in_place(run, name, content)


def state_json(state: State, config: GPTConfig, hashes: dict[str, str]) -> bytes:
    """The content of state.json: hashes are those of the checkpoint's two other files and of the run's tokenizer."""
    fields = asdict(state) | {"model": asdict(config), "files": hashes}
    return json.dumps(fields | {"sha256": sha256(canonical(fields))}, indent=2).encode()


def put_in_place(run: Path, name: str, content: dict[str, bytes]) -> None:
    """Make run/<name> a folder of these files, as told above. Raises OSError; then what was there still is."""
    new, old = run / f"{name}.new", run / f"{name}.old"
    try:
        remove(new)
        os.mkdir(new)
        for file, data in content.items():
            write_new(new / file, data)
        sync_folder(new)
        if (run / name).exists():
            os.rename(run / name, old)
            sync_folder(run)
        os.rename(new, run / name)
        sync_folder(run)
        remove(old)
    except OSError:
        recover(run, name)
        raise


def recover(run: Path, name: str) -> None:
    """After a crash in save_checkpoint: leave run/<name> whole, if it ever was, and nothing beside it."""
    target, new, old = run / name, run / f"{name}.new", run / f"{name}.old"
    if not target.exists() and old.exists():
        os.rename(new if new.exists() else old, target)
        sync_folder(run)
    remove(new)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def sha256(content: bytes | mmap.mmap) -> str:
    return hashlib.sha256(content).hexdigest()


def canonical(value: dict) -> bytes:
    """JSON in the one form that hashes compare."""
    return json.dumps(value, sort_keys=True).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def locate(run: Path, name: str) -> Path | None:
    """The folder of a checkpoint, or None if it was never saved. Changes nothing: a trainer may be at work on it."""
    for folder in (run / name, run / f"{name}.old"):  # between the two renames of a save the old one is there
        if folder.is_dir():
            return folder
    return None


def load_checkpoint(folder: Path, config: GPTConfig, dtype: type) -> Checkpoint:
    """Everything in a checkpoint of a model with these sizes and this dtype. Raises UserError."""
    state, hashes = load_state(folder, config)
    shapes = param_shapes(config)
    weights = read_tensors(folder / MODEL, shapes, hashes[MODEL], dtype)
    moment_shapes = {f"{moment}.{name}": shape for moment in "mv" for name, shape in shapes.items()}
    moments = read_tensors(folder / OPTIMIZER, moment_shapes, hashes[OPTIMIZER], dtype)
    m = {name: moments[f"m.{name}"] for name in shapes}
    v = {name: moments[f"v.{name}"] for name in shapes}
    for name, second_moment in v.items():
        if (second_moment < 0).any():
            raise UserError(f"{folder / OPTIMIZER}: v.{name} has negative entries, which no mean of squares has")
    return Checkpoint(weights, m, v, state)


def load_weights(folder: Path, config: GPTConfig) -> Params:
    """The weights of a checkpoint, whatever its dtype, mapped from their file: read-only, and no memory of their own.

    Raises UserError.
    """
    _, hashes = load_state(folder, config)
    return read_tensors(folder / MODEL, param_shapes(config), hashes[MODEL], None, mapped=True)


def load_state(folder: Path, config: GPTConfig) -> tuple[State, dict[str, str]]:
    """The state of a checkpoint, and the SHA-256 that each of its files must have. Raises UserError."""
    path = folder / STATE
    content = read_json(path, "the state of a checkpoint")
    own_hash = content.pop("sha256", None)
    if own_hash != sha256(canonical(content)):
        raise UserError(f"{path}: its content does not have its own sha256; the file is damaged")
    model, hashes = content.pop("model", None), content.pop("files", None)
    state = build(State, content, path)
    if type(hashes) is not dict or set(hashes) != {MODEL, OPTIMIZER, TOKENIZER}:
        raise UserError(f"{path}: files must name {MODEL}, {OPTIMIZER} and {TOKENIZER}, got {shorten(hashes)}")
    stored = build(GPTConfig, model, path)
    for name, value in asdict(config).items():
        if name != "dropout" and getattr(stored, name) != value:  # dropout is no part of what the weights mean
            raise UserError(f"{path}: the model has {name} {getattr(stored, name)}, the run's config.json {value}")
    check_hash(
        folder.parent / TOKENIZER, read_bytes(folder.parent / TOKENIZER, "the run's tokenizer"), hashes[TOKENIZER]
    )
    return state, hashes


def read_tensors(
    path: Path,
    shapes: Shapes,
    expected_hash: str,
    dtype: type | None,
    *,
    mapped: bool = False,
) -> Params:
    """The tensors of a safetensors file that must have exactly these names and shapes, all of one dtype.

    dtype: the one they must have, or None for float32 or float64
    mapped: leave them in the file, as read-only arrays, in place of copying them

    Raises UserError that names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load

    needed = sum(math.prod(shape) for shape in shapes.values()) * 8 + MAX_HEADER_BYTES
    content = read_measured(path, "the tensors of this model", needed, mapped)
    header = read_header(path, content)
    for name in [*shapes, *header]:
        if name not in header or name not in shapes:
            raise UserError(f"{path}: tensor {shorten(name)} is {'missing' if name in shapes else 'not of this model'}")
    wanted = next(iter(header.values())).get("dtype") if dtype is None else {v: k for k, v in DTYPES.items()}[dtype]
    for name, shape in shapes.items():
        if header[name].get("shape") != list(shape):
            raise UserError(f"{path}: {name} must have shape {list(shape)}, got {shorten(header[name].get('shape'))}")
        if header[name].get("dtype") != wanted or wanted not in DTYPES:
            expected = wanted if wanted in DTYPES else "F32 or F64"
            raise UserError(f"{path}: {name} must have dtype {expected}, got {shorten(header[name].get('dtype'))}")
    check_hash(path, content, expected_hash)
    try:
        if mapped:
            with safe_open(path, "numpy"):  # which checks where each tensor is said to be
                start = 8 + int.from_bytes(content[:8], "little")
            tensors = {name: view(content, start, header[name]) for name in shapes}
        else:
            tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{path}: {error}") from error
    for name in shapes:
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} has NaN or infinite entries")
    return {name: tensors[name] for name in shapes}


def view(content: mmap.mmap, start: int, entry: dict) -> np.ndarray:
    """A tensor where it lies in a mapped file, by its entry in the header; offsets count from start."""
    shape, offset = entry["shape"], start + entry["data_offsets"][0]
    return np.frombuffer(content, DTYPES[entry["dtype"]], math.prod(shape), offset).reshape(shape)


def read_header(path: Path, content: bytes | mmap.mmap) -> dict[str, dict]:
    """What a safetensors file says about each of its tensors. Raises UserError."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise UserError(f"{path}: is cut short: {len(content):,} bytes, with a header of {length:,}")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{path}: its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    header = parse_json(content[8 : 8 + length], str(path))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if type(entry) is not dict:
            raise UserError(f"{path}: tensor {shorten(name)} is described by {shorten(entry)}, expected an object")
    return header


def check_hash(path: Path, content: bytes | mmap.mmap, expected: str) -> None:
    """Raises UserError unless the content of a file is what it was when the checkpoint was saved."""
    if sha256(content) != expected:
        raise UserError(f"{path}: its SHA-256 is not the one in {STATE}; the file is damaged, or of another checkpoint")


def read_measured(path: Path, expected: str, max_bytes: int, mapped: bool = False) -> bytes | mmap.mmap:
    """All bytes of a regular file, measured before anything is allocated for them, or mapped. Raises UserError."""
    size = path.stat().st_size if path.is_file() else 0
    if size > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, more than {max_bytes:,}: expected {expected}")
    if mapped and size:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return read_bytes(path, expected, max_bytes=size)


def build(kind: type[T], values: object, path: Path) -> T:
    """A dataclass from the object of a JSON file. Raises UserError that names the file and the field."""
    names = {field.name for field in fields(kind)}
    if type(values) is not dict or set(values) != names:
        wrong = sorted(names ^ set(values)) if type(values) is dict else sorted(names)
        raise UserError(f"{path}: fields missing or unknown: {shorten(', '.join(wrong))}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{path}: {str(error)[:200]}") from error  # it quotes the value, which may be long
