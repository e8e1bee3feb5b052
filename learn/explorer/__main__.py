"""python -m learn.explorer"""

import sys

from common.cli import run_program
from learn.explorer.page import main

sys.exit(run_program(main))
