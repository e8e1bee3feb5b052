"""python -m learn.explorer"""

import sys

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from common.cli import run_program
from learn.explorer.page import main

if __name__ == "__main__":
    sys.exit(run_program(main))
