"""Safetensors files: mapped and checked before they are read, streamed when they are written.

A file is the length of its header (8 bytes), the header (JSON: each tensor's dtype, shape and place; metadata, which is
strings by name), and the tensors' bytes. It holds numbers and text: reading one can run no code.

A sealed file has a SHA-256 in its metadata, taken over all of the file with the digest itself read as zeros. So a
flipped bit anywhere is found, in the header too.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError, printable
from common.files import open_regular, parse_json, refuse_lfs_pointer

# The numbers that are understood, and how their bytes lie. NumPy has no bfloat16: it is the upper half of a float32.
DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
WRITTEN = {"float32": "F32", "float64": "F64"}
MAX_HEADER_BYTES = 8 << 20  # names, shapes and places of some 50,000 tensors
PIECE = 1 << 22  # bytes that are checked, hashed or written at once
SEAL, UNSEALED = "sha256", "0" * 64  # the name of the digest in the metadata, and what it is while it is taken


@dataclass(frozen=True)
class Stored:
    """One tensor in an open file: where it is, not yet what is in it."""

    path: Path
    name: str
    content: mmap.mmap | bytes
    dtype: str
    shape: tuple[int, ...]
    start: int  # its first byte in content

    def read(self) -> np.ndarray:
        """float32 or float64: a read-only view of the file if it holds just that, else a copy.

        Raises UserError if an entry is NaN or infinite, or if the dtype is not one of DTYPES.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"{self.path}: {self.name} has dtype {self.dtype}, expected {', '.join(DTYPES)}")
        array = np.frombuffer(self.content, DTYPES[self.dtype], math.prod(self.shape), self.start).reshape(self.shape)
        if self.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "F16":
            array = array.astype(np.float32)
        elif not array.flags.aligned:
            array = array.copy()
        if not all(np.isfinite(piece).all() for piece in pieces(array)):
            raise UserError(f"{self.path}: {self.name} has NaN or infinite entries")
        return array


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file whose header, and if it was asked for whose seal, has been checked."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Stored]


def open_tensors(path: Path, expected: str, *, max_bytes: int | None = None, sealed: bool = False) -> TensorFile:
    """Map a safetensors file and check what its header says. No tensor is read yet.

    Raises UserError, at once, if there is no such file, if it is a folder, a pipe, a device, a Git LFS pointer, larger
    than max_bytes, or anything else that is not safetensors; with `sealed`, also if a byte is not what it was when the
    file was sealed, for which all of it is read. expected: what the message says should be there.
    """
    with open_regular(path, expected) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise UserError(f"{path} has {size:,} bytes, more than {max_bytes:,}: expected {expected}")
        try:
            if os.name == "nt" or size == 0:  # Windows would not let a trainer replace a mapped file
                content: mmap.mmap | bytes = file.read()
            else:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        header = read_header(path, content)
        fields = parse_json(header, str(path))
        check_layout(path, file)
        metadata = fields.pop("__metadata__", None) or {}  # the library takes null for none
        if sealed:
            check_seal(path, file, header, metadata.get(SEAL, ""))
    first = 8 + len(header)
    tensors = {
        name: Stored(path, name, content, entry["dtype"], tuple(entry["shape"]), first + entry["data_offsets"][0])
        for name, entry in fields.items()
    }
    return TensorFile(path, metadata, tensors)


def read_header(path: Path, content: mmap.mmap | bytes) -> bytes:
    """The header as it stands in the file. Raises UserError if what the file begins with is no header's length."""
    refuse_lfs_pointer(path, content)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise UserError(f"{path}: is cut short: {len(content):,} bytes, with a header of {length:,}")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{path}: its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    return content[8 : 8 + length]


def check_layout(path: Path, file: BinaryIO) -> None:
    """Have the safetensors library check each dtype, shape and place, and that together they cover the file.

    It opens the file again, by the handle where there are such names: the path may lead to a newer file by now.
    Raises UserError.
    """
    from safetensors import SafetensorError, safe_open  # slow to load: --help must not wait for it

    by_handle = Path(f"/dev/fd/{file.fileno()}")
    try:
        with safe_open(by_handle if by_handle.exists() else path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {printable(str(error))[:200]}") from error


def check_seal(path: Path, file: BinaryIO, header: bytes, seal: str) -> None:
    """Raises UserError unless the digest in the metadata is that of the file."""
    if len(seal) != len(UNSEALED) or header.count(seal.encode()) != 1:
        raise UserError(f"{path}: has no SHA-256 of its content; the file is damaged, or not from a trainer")
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + header.replace(seal.encode(), UNSEALED.encode()))
    file.seek(8 + len(header))
    while piece := file.read(PIECE):
        digest.update(piece)
    if digest.hexdigest() != seal:
        raise UserError(f"{path}: its content does not have its SHA-256; the file is damaged")


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of an array (n, ...) in order, row by row, of at most some PIECE bytes at once."""
    rows = max(1, PIECE * len(array) // max(1, array.nbytes))
    for first in range(0, len(array), rows):
        yield np.ascontiguousarray(array[first : first + rows])


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, seal: bool = False
) -> None:
    """Write a safetensors file into a new, open file. Raises OSError; ValueError that names what is not finite.

    The tensors, float32 or float64 and of at least one dimension, go to the disk from where they are, in the order of
    their names. One that does not lie in order, a view of another, is put in order piece by piece: so a transposition,
    or what np.broadcast_to makes, costs next to no memory.

    seal: put a SHA-256 of the whole file into the metadata, see TensorFile.check_seal
    """
    tensors = dict(sorted(tensors.items()))
    header: dict[str, object] = {"__metadata__": dict(metadata) | ({SEAL: UNSEALED} if seal else {})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": WRITTEN[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the numbers are aligned
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    file.write(head)
    for name, tensor in tensors.items():
        for piece in pieces(tensor):
            if not np.isfinite(piece).all():
                raise ValueError(f"not finite: {name}")
            digest.update(piece.data)
            file.write(piece.data)
    if seal:
        file.seek(head.index(UNSEALED.encode()))
        file.write(digest.hexdigest().encode())
