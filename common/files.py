"""Files: read with limits, written so that nothing is lost, and JSON that is checked."""

import io
import json
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_JSON_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash at any moment, sees the old file or the new one, whole.

    The bytes go to a new name in the same folder, are flushed to the disk, and only then take the final name. The
    folder is made if it is missing. Raises OSError as any write does; then nothing half-written stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        write_new(new, content)
        os.replace(new, path)
    except BaseException:  # Ctrl-C too
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet; it is on the disk when this returns. Raises OSError."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in the folder are on the disk. Windows has no way to ask for that, and does not need it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as a PNG, atomically. Needs no display. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to load: --help must not wait for it

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())


def read_bytes(path: str | os.PathLike, expected: str, *, max_bytes: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises UserError, which says what was `expected` there, if there is no such file, if it is a folder, a pipe or a
    device (which may never end), if it cannot be read, if it has more than `max_bytes`, or if it is only the pointer
    that Git LFS leaves instead of a large file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: expected {expected}")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file: expected {expected}")
        with open(path, "rb") as file:
            if max_bytes is None:
                content = file.read()
            else:  # read(n) sets n bytes aside, however few there are
                size = min(os.fstat(file.fileno()).st_size, max_bytes)
                content = file.read(size + 1)
                if len(content) > size:  # it grew meanwhile, or is one of /proc's, which have no size
                    content += file.read(max_bytes - size)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}: expected {expected}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"no file can be called {str(path)!r}: {error}") from error
    if max_bytes is not None and len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes: expected {expected}")
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch that with git lfs pull")
    return content


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
