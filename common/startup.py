"""What can go wrong before a program has begun: its imports. One line, or silence, but no traceback.

A program calls prepare_imports(), if it is the one that was started, before its first import of anything that must be
installed.
"""

import signal
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent


def prepare_imports() -> None:
    """From now on, a missing package ends this process with one line, and Ctrl-C ends it without any.

    Packages may take seconds to load. After the imports, common.cli.run_program takes over.
    """
    sys.excepthook = explain
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook."""
    if isinstance(error, ModuleNotFoundError) and can_be_installed(error.name):
        print(f"error: {how_to_install(error.name)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def can_be_installed(module: str | None) -> bool:
    """Is a module that was not found a package of somebody else's? Not a part of one, of Python or of this project."""
    if module is None or "." in module or module in sys.stdlib_module_names:
        return False
    return not ((ROOT / module).is_dir() or (ROOT / f"{module}.py").exists())


def how_to_install(package: str | None) -> str:
    """One line about a package that is missing."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    enough = any(line.startswith(f"{package}==") for line in lines)
    return f"needs the package {package}: pip install -r requirements{'' if enough else '-dev'}.txt"
