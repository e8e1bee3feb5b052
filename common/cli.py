"""A command line -> Flags, through tyro; and every way to fail -> one line and an exit status.

Flags are flat (--n-layer 4 --learning-rate 1e-3). Their defaults are those of --preset, or with --resume those of the
run; --help shows whichever are in force.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import dropwhile, pairwise, takewhile
from typing import Any, TypeVar

import tyro

from common.errors import UserError, message_line, shorten
from common.startup import can_be_installed, how_to_install

T = TypeVar("T")

PATH_FLAGS = {"--data", "--from", "--out", "--resume", "--run", "--run-dir", "--tokenizer"}


def parse(kind: type[T] | Callable[..., T], program: str, argv: Sequence[str] | None, **options: Any) -> T:
    """tyro.cli with flat flags; where it would draw a box around an error: one line on stderr, and exit status 2."""
    argv = expand_home(sys.argv[1:] if argv is None else argv)
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)  # None is what a flag is when it is not given
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=program, args=argv, config=flat, **options)
    except SystemExit as stop:
        if stop.code:
            message = message_line(one_line(box.getvalue()))
            print(f"error: {message}{hint(message, argv)} (see {program} --help)", file=sys.stderr)
        raise


def expand_home(argv: Sequence[str]) -> list[str]:
    """The command line with ~ expanded in paths, which a shell leaves as it is in --run-dir=~/x."""
    expanded: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if equals and dashed(flag) in PATH_FLAGS:
            word = f"{flag}={os.path.expanduser(value)}"
        elif expanded and dashed(expanded[-1]) in PATH_FLAGS:
            word = os.path.expanduser(word)
        expanded.append(word)
    return expanded


def dashed(flag: str) -> str:
    """--run_dir, which tyro understands too, as --run-dir."""
    return flag.replace("_", "-")


def hint(message: str, argv: Sequence[str]) -> str:
    """What to add to tyro's message when a flag seems to have no value, because the value begins with a hyphen."""
    for flag, value in pairwise(argv):
        if re.match("-(?!-[a-z])", value) and message.startswith(f"Missing value for argument '{dashed(flag)}'"):
            return f" If {shorten(value)} is the value, write {flag}={shlex.quote(value)}"
    return ""


def one_line(box: str) -> str:
    """What tyro says in the box it draws, under the title, up to the next rule across it: after that come hints."""
    lines = [line.strip(" │╰╯") for line in box.splitlines()[1:]]
    below_title = dropwhile(is_rule, lines)
    return " ".join(takewhile(lambda line: not is_rule(line), below_title))


def is_rule(line: str) -> bool:
    """Is this line of tyro's box nothing but a line? It is drawn with hyphens where that is all one can draw."""
    return set(line) <= {"─", "-"}


def run_program(main: Callable[[], int]) -> int:
    """main()'s exit status; or 1 and one line on stderr, if something went wrong that the user can fix."""
    status, message = 1, None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is a KeyboardInterrupt again
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no console
            stream.reconfigure(errors="backslashreplace")  # a text may have characters that a terminal does not
    try:
        return run_and_flush(main)
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if not can_be_installed(error.name):
            raise
        message = how_to_install(error.name)
    except MemoryError as error:
        message = f"not enough memory: {error or 'lower batch_size or the sizes of the model'}"
    except BrokenPipeError:  # whoever read the output has seen enough
        pass
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""  # a write does not say where it failed
        message = f"{place}{error.strerror or error}"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    try:
        print(end="", flush=True)
    except OSError:  # what is still buffered would fail again when Python ends, with a message of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message is not None:
        print(f"error: {message_line(message)}", file=sys.stderr)
    return status


def run_and_flush(main: Callable[[], int]) -> int:
    """main()'s exit status, once all that it printed is written: into a pipe or a file, most of it is not before."""
    try:
        status = main()
    except SystemExit as stop:  # tyro's, after --help; parse's, after flags that make no sense
        status = stop.code or 0  # type: ignore[assignment]  # a number, both times
    print(end="", flush=True)
    return status
