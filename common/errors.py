"""The error that a user caused, and how values are shown in its message."""

import reprlib


class UserError(ValueError):
    """Something that the user caused and can fix. The message is one line: what came, what was expected, what to do.

    Programs print the message and exit with status 1; a traceback would only hide it.
    """


def shorten(value: object) -> str:
    """repr on one line, cut to fit a message. A long list is not written out only to be cut."""
    return reprlib.repr(value)
