"""The error that a user caused, and how values are shown in its message."""

import reprlib

MAX_MESSAGE = 1000  # characters of a program's error line


class UserError(ValueError):
    """Something that the user caused and can fix. The message is one line: what came, what was expected, what to do.

    Programs print the message and exit with status 1; a traceback would only hide it.
    """


def shorten(value: object) -> str:
    """repr on one line, printable, cut to fit a message. A long list is not written out only to be cut."""
    return printable(reprlib.repr(value))


def printable(text: str) -> str:
    """The text with whatever does not print, line ends included, as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def message_line(message: str) -> str:
    """A message as a program shows it: one line that any terminal can take, whatever names of files are in it."""
    line = printable(message)
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"
