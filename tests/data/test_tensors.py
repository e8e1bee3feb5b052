"""common/tensors.py: what is written is read, by the safetensors library too; what is not safetensors is refused."""

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from common import tensors
from common.errors import UserError
from common.files import new_file


@contextmanager
def written(arrays: dict[str, np.ndarray], **options: bool) -> Iterator[Path]:
    """A file of these arrays, with metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        with new_file(path) as file:
            tensors.write_tensors(file, arrays, {"what": "a test"}, **options)
        yield path


ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([-0.0, 1e-40, 3e38], np.float32),
    "wide": np.linspace(0, 1, 7),
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "one seen often": np.broadcast_to(np.float32(2.5), (5, 2)),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("seal", [False, True])
def test_what_is_written_is_read(seal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of any size, by us and by the library."""
    for piece in (1, 8, 1 << 22):
        monkeypatch.setattr(tensors, "PIECE", piece)
        with written(ARRAYS, seal=seal) as path:
            file = tensors.open_tensors(path, "a test", sealed=seal)
            assert file.metadata["what"] == "a test"
            theirs = load_file(path)
            assert file.tensors.keys() == theirs.keys() == ARRAYS.keys()
            for name, array in ARRAYS.items():
                read = file.tensors[name].read()
                assert read.dtype == theirs[name].dtype == array.dtype
                assert np.array_equal(read, array)
                assert np.array_equal(theirs[name], array)
                assert name != "b" or not read.flags.writeable, "it lies in the file"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_all_dtypes_are_read(dtype: str) -> None:
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    tensor = torch.tensor([[1.5, -2.0, 0.0], [3.140625, 1e-3, 65000.0]]).to(kinds[dtype])
    with tempfile.TemporaryDirectory() as folder:
        save_torch({"x": tensor}, Path(folder) / "x.safetensors")
        read = tensors.open_tensors(Path(folder) / "x.safetensors", "a test").tensors["x"].read()
        assert read.dtype == (np.float64 if dtype == "F64" else np.float32)
        assert np.array_equal(read, tensor.double().numpy())


def test_a_flipped_bit_anywhere_is_found() -> None:
    """Each bit of the length, of the header with its digest, and of the numbers."""
    arrays = {"x": np.array([1.0, 2.0], np.float32)}
    with written(arrays, seal=True) as path:
        content = path.read_bytes()
        tensors.open_tensors(path, "a test", sealed=True)
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(UserError):
                tensors.open_tensors(path, "a test", sealed=True)


def test_a_file_without_a_seal_has_none() -> None:
    with written({"x": np.ones(3)}) as path, pytest.raises(UserError, match="has no SHA-256"):
        tensors.open_tensors(path, "a test", sealed=True)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    """As the library takes it: the file can be read, and has no seal."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"x": ENTRY, "__metadata__": None}, np.ones(2, np.float32).tobytes()))
    assert tensors.open_tensors(path, "a test").tensors["x"].read().tolist() == [1, 1]
    with pytest.raises(UserError, match="has no SHA-256"):
        tensors.open_tensors(path, "a test", sealed=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_neither_written_nor_read(bad: float) -> None:
    array = np.array([0.0, bad])
    with pytest.raises(ValueError, match="not finite: x"), written({"x": array}):
        pass
    with tempfile.TemporaryDirectory() as folder:
        save_file({"x": array}, Path(folder) / "x.safetensors")
        with pytest.raises(UserError, match="x has NaN or infinite entries"):
            tensors.open_tensors(Path(folder) / "x.safetensors", "a test").tensors["x"].read()


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
REFUSED = {
    "nothing": (b"", "is cut short: 0 bytes"),
    "a text": (b"hello, world, " * 9, "is cut short"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "is a Git LFS pointer",
    ),
    "no JSON": (struct.pack("<Q", 3) + b"{x}", "Expecting property name"),
    "a name twice": (struct.pack("<Q", 19) + b'{"x": {}, "x": {} }', "field 'x' is there twice"),
    "too short": (header({"x": ENTRY}, b"1234"), "not fully covered"),
    "too long": (header({"x": ENTRY}, b"1234" * 3), "not fully covered"),
    "a shape of another size": (header({"x": ENTRY | {"shape": [3]}}, b"1" * 8), "x.safetensors: "),
    "a huge shape": (header({"x": ENTRY | {"shape": [2**62, 2**62]}}, b"1" * 8), "x.safetensors: "),
    "a negative shape": (header({"x": ENTRY | {"shape": [-2]}}, b"1" * 8), "x.safetensors: "),
    "no shape": (header({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, b"1" * 8), "x.safetensors: "),
    "an unknown dtype": (header({"x": ENTRY | {"dtype": "F33"}}, b"1" * 8), "x.safetensors: "),
    "overlapping": (header({"x": ENTRY, "y": ENTRY}, b"1" * 8), "x.safetensors: "),
    "metadata of numbers": (header({"x": ENTRY, "__metadata__": {"a": 1}}, b"1" * 8), "x.safetensors: "),
    "a control character": (header({"x": ENTRY | {"dtype": "\x1b[2J" * 99}}, b"1" * 8), "x.safetensors: "),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_safetensors_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    content, said = REFUSED[fault]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError) as caught:
        tensors.open_tensors(tmp_path / "x.safetensors", "a test")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200 + len(str(tmp_path)) + 20


def test_integers_are_opened_and_not_read(tmp_path: Path) -> None:
    save_file({"x": np.ones(3, np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x has dtype I8, expected F16, BF16, F32, F64"):
        tensors.open_tensors(tmp_path / "x.safetensors", "a test").tensors["x"].read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "huge"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match=r"x\.safetensors.*: expected a test"):
        tensors.open_tensors(path, "a test", max_bytes=1 << 30)


@given(content=st.binary(max_size=300), at=st.integers(0, 200), prefix=st.booleans())
def test_no_bytes_bring_it_down(content: bytes, at: int, prefix: bool) -> None:
    """Random bytes, at the beginning or within a good file: opened and read, or refused."""
    with written({"x": np.ones(9), "y": np.zeros((2, 2))}) as path:
        good = path.read_bytes()
        path.write_bytes(content if prefix else good[:at] + content + good[at + len(content) :])
        message = ""
        try:
            for tensor in tensors.open_tensors(path, "a test").tensors.values():
                tensor.read()
        except UserError as error:
            message = str(error)
        assert "\n" not in message
