"""Ctrl-C and SIGTERM: once to finish the step and save, twice to leave at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Stopping:
    """While this context is open, the first signal is noted; it also puts the handlers back that were there before.

    notice: says what is going to happen; its line goes to standard error at once, however long the step takes

    Signals reach the main thread only: in another one this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notice: Callable[[], str] | None = None) -> None:
        self.signal: int | None = None  # the one that came
        self._notice, self._before = notice, {}  # type: ignore[var-annotated]

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self._notice is not None:
            with contextlib.suppress(OSError):  # not print: what was interrupted may hold its lock
                os.write(2, f"\n{self._notice()}\n".encode(errors="backslashreplace"))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._restore()
