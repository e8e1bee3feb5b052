"""One trainer at a time in a run folder: a lock on its file `lock`, which the system releases when a process ends."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError, shorten

LOCK = "lock"
# A symbolic link is not followed, or what it leads to would be written; and nobody waits for the other end of a pipe.
FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Lock:
    """A lock that this process holds. Until it is signed, nothing in the folder says so, but a new file if it made one.

    Raises UserError if another process holds the lock, or if the file is not one that a trainer made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.made, self.signed = folder, folder / LOCK, False, False
        try:
            try:
                self.handle = os.open(self.path, FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
                self.made = True
            except FileExistsError:
                self.handle = os.open(self.path, FLAGS)
        except OSError as error:
            raise UserError(f"{self.path} cannot be locked: {error.strerror or error}") from error
        try:
            self.acquire()
        except BaseException:
            os.close(self.handle)
            raise

    def acquire(self) -> None:
        found = os.fstat(self.handle)
        content = os.read(self.handle, 20) if stat.S_ISREG(found.st_mode) else b"no file"
        if found.st_nlink > 1 or not (content == b"" or content.isdigit()):
            raise UserError(f"{self.path} is not a trainer's lock: move it away")
        if not try_lock(self.handle) or not self.is_held():
            raise UserError(f"{self.folder} is in use by another trainer (process {shorten(content.decode())})")

    def is_held(self) -> bool:
        """Is the file in the folder still the one that is locked?"""
        try:
            there, mine = os.stat(self.path, follow_symlinks=False), os.fstat(self.handle)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, mine)

    def check(self) -> None:
        """Raises UserError if the run's folder was moved, deleted or replaced. To be called before writing into it."""
        if not self.is_held():
            raise UserError(
                f"{self.folder} was moved, deleted or replaced meanwhile: its lock is not this trainer's any more, so "
                "nothing was written there"
            )

    def sign(self) -> None:
        """Write the process id into the file: from now on the folder is this trainer's to change."""
        os.ftruncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, str(os.getpid()).encode())
        self.signed = True

    def release(self) -> None:
        """Let go. A file that was made and never signed is deleted: whoever was refused leaves nothing behind."""
        with contextlib.suppress(OSError):
            if self.made and not self.signed and self.is_held():
                if os.name == "nt":  # which deletes no open file
                    os.close(self.handle)
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold the lock of a folder, which is made if it is missing. If the lock is never signed, what was made is deleted.

    Raises UserError if another process holds it. Then nothing is deleted: only the holder cleans up.
    """
    try:
        folder.mkdir(parents=True)
        made = True
    except FileExistsError:
        made = False
    lock = Lock(folder)
    try:
        yield lock
    finally:
        lock.release()
        if made and not lock.signed:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def try_lock(handle: int) -> bool:
    """Lock an open file for this process alone, or return False if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
