"""Corpora and tokenizers: text in, token ids out. Nothing here knows about models or frameworks.

data.corpus       the texts to train on: Tiny Shakespeare, verse, any UTF-8 file
data.verse        a small probabilistic grammar whose exact entropy is known
data.tokenizers   characters, and byte-pair encoding by hand
"""

import os
import secrets
from pathlib import Path

__all__ = ["UserError", "read_bytes", "write_atomically"]


class UserError(ValueError):
    """Something that the user caused and can mend. The message is one line: what came, what was expected, what to do.

    Programs print the message and exit with status 1; a traceback would only hide it.
    """


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash at any moment, sees the old file or the new one, whole.

    The bytes go to a new name in the same folder, are flushed to the disk, and only then take the final name. The
    folder is made if it is missing. Raises OSError as any write does; then nothing half-written stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:  # Ctrl-C too
        new.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name itself is on the disk only once its folder is; Windows cannot say so
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_bytes(path: str | os.PathLike, expected: str, *, max_bytes: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises UserError, which says what was `expected` there, if there is no such file, if it is a folder, a pipe or a
    device (which may never end), if it cannot be read, or if it has more than `max_bytes`.
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
    return content
