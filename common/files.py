"""Files: read with limits, written so that nothing is lost, and JSON that is checked."""

import io
import json
import mmap
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from common.errors import UserError, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_JSON_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins

T = TypeVar("T")


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` as replace_atomically does. The folder is made if it is missing. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as file:
        file.write(content)


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which takes the name `path` when the block ends.

    A reader, or a crash at any moment, sees the old file or the new one, whole: the bytes go to a new name in the same
    folder, are flushed to the disk, and only then take the final name. A symbolic link of that name is replaced, not
    followed. Raises OSError as any write does; then nothing half-written stays behind.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with new_file(new) as file:
            yield file
        os.replace(new, path)
    except BaseException:  # Ctrl-C too
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in that must not exist yet; it is on the disk when the block ends. Raises OSError."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet; it is on the disk when this returns. Raises OSError."""
    with new_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Return once the names in the folder are on the disk. Windows has no way to ask for that, and does not need it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plot_text(text: str) -> str:
    """A text for a plot, whose library takes what stands between two $ for a formula, and knows no lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("$", r"\$")


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as a PNG, atomically. Needs no display. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to load: --help must not wait for it

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())


def open_regular(path: str | os.PathLike, expected: str) -> BinaryIO:
    """Open a regular file to read it.

    Raises UserError, which says what was `expected` there, if there is no such file, if it is a folder, a pipe or a
    device (which may never end), or if it cannot be read. It never waits: not even for a pipe's other end.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: expected {expected}")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path} is not a regular file: expected {expected}")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}: expected {expected}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"no file can be called {str(path)!r}: {error}") from error
    return os.fdopen(handle, "rb")


def read_bytes(path: str | os.PathLike, expected: str, *, max_bytes: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises UserError as open_regular does, or if it has more than `max_bytes`, or if it is only the pointer that Git LFS
    leaves instead of a large file.
    """
    too_large = f"{path} has more than {max_bytes or 0:,} bytes: expected {expected}"
    with open_regular(path, expected) as file:
        try:
            if max_bytes is None:
                content = file.read()
            else:  # read(n) sets n bytes aside, however few there are
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise UserError(too_large)
                content = file.read(size + 1)
                if len(content) > size:  # it grew meanwhile, or is one of /proc's, which have no size
                    content += file.read(max_bytes - size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(too_large)
    refuse_lfs_pointer(path, content)
    return content


def refuse_lfs_pointer(path: str | os.PathLike, content: bytes | mmap.mmap) -> None:
    """Raises UserError if this is what Git LFS leaves instead of a large file."""
    if content[: len(LFS_POINTER)] == LFS_POINTER:
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch that with git lfs pull")


def read_json(path: Path, expected: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """The object in a JSON file. Raises UserError if there is no file, or anything else in it."""
    return parse_json(read_bytes(path, expected, max_bytes=max_bytes), str(path))


def parse_json(content: bytes, where: str) -> dict:
    """The JSON object in `content`, which came from `where`.

    Raises UserError for anything that is not a JSON object, is nested too deeply, has a name twice, or holds NaN.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique_names, parse_constant=refuse_constant)
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:  # also JSONDecodeError, UnicodeDecodeError, UserError
        raise UserError(f"{where}: {error}") from error
    if type(value) is not dict:
        raise UserError(f"{where}: expected an object, got {shorten(value)}")
    return value


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict. Raises UserError if a name comes twice, which JSON readers resolve differently."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise UserError(f"field {shorten(twice)} is there twice")
    return fields


def refuse_constant(name: str) -> None:
    """Python's json reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not a number")


def build(kind: type[T], values: object, path: Path) -> T:
    """A dataclass from the object of a JSON file. Raises UserError that names the file and the field."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if type(values) is not dict or set(values) != names:
        wrong = sorted(names ^ set(values)) if type(values) is dict else sorted(names)
        raise UserError(f"{path}: fields missing or unknown: {shorten(', '.join(wrong))}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{path}: {str(error)[:200]}") from error  # it quotes the value, which may be long
