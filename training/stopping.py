"""Ctrl-C and SIGTERM: once to finish the step and save, twice to leave at once."""

import signal
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Stopping"]


class Stopping:
    """While this context is open, the first signal is only noted; it also puts the system's own handling back."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._restore()
