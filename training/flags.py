"""A command line -> Flags. They are flat: --n-layer 4 --learning-rate 1e-3.

The defaults are those of --preset, or with --resume those of the run; --help shows whichever apply.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from common.cli import expand_home, parse
from common.errors import UserError
from training.config import PRESETS, Flags, ModelFlags, PresetName, RunFlags
from training.run import read_config

F = TypeVar("F", bound=Flags)


def parse_flags(
    argv: Sequence[str] | None, kind: type[F], program: str, preset: PresetName, description: str, **groups: object
) -> F:
    """The Flags of a command line, sys.argv's if it is None. kind may add groups of flags to Flags; their defaults come
    as keywords.

    Exits with status 0 after --help, with 2 and one line after anything that makes no sense. Raises UserError if the
    run to resume cannot be read.
    """
    argv = expand_home(sys.argv[1:] if argv is None else argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--preset", nargs="?")
    first_look.add_argument("--resume", nargs="?")
    asked, _ = first_look.parse_known_args(argv)
    if asked.resume is not None:
        if asked.preset is not None:
            raise UserError("--preset and --resume exclude each other: a run keeps the configuration it has")
        config = read_config(Path(asked.resume))
        model, training, preset = ModelFlags(**asdict(config.model)), config.training, config.preset
    else:
        preset = asked.preset if asked.preset in PRESETS else preset
        model, training = PRESETS[preset].model, PRESETS[preset].training
    default = kind(model, training, RunFlags(preset, resume=asked.resume), **groups)
    return parse(kind, program, argv, description=description, default=default)
