"""The suite can fail: each small bug of mutants/table.py, put into the source, is caught by the test named there."""

from contextlib import ExitStack

import numpy as np
import pytest

from tests.helpers import ROOT
from tests.mutants import Mutant, find_check, planted
from tests.mutants.table import MUTANTS

CHECKS = sorted({mutant.killed_by for mutant in MUTANTS})
FILES = sorted({mutant.file for mutant in MUTANTS})

# What a mutant may not fail by: then it would be no bug that somebody could overlook, but a program that does not run.
BROKEN = (NameError, SyntaxError, ImportError, AttributeError, TypeError)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_mutant_is_killed(mutant: Mutant) -> None:
    """A failure: this bug could be made tomorrow, and no test would say so."""
    source, check = mutant.source(), find_check(mutant.killed_by)
    with planted(mutant.file, source), np.errstate(all="ignore"):
        try:
            check()
        except BROKEN as error:
            raise AssertionError(f"{mutant.name!r} is a broken program, not a bug: {error!r}") from error
        except (Exception, pytest.fail.Exception):  # a test that fails by pytest.raises raises no Exception
            return
    raise AssertionError(f"{mutant.name!r} survives: {mutant.killed_by} passes although {mutant.by!r} is there")


@pytest.mark.parametrize("check", CHECKS)
def test_check_of_mutants_passes_without_a_mutant(check: str) -> None:
    """A failure: what test_mutant_is_killed takes for a caught bug is a fault of loading the source anew."""
    with ExitStack() as stack:
        for file in {mutant.file for mutant in MUTANTS if mutant.killed_by == check}:
            stack.enter_context(planted(file, (ROOT / file).read_text(encoding="utf-8")))
        find_check(check)()


def test_the_table_of_mutants_is_sound() -> None:
    """A failure: two rows have one name or one change, or there are fewer than the README says."""
    assert len({(mutant.file, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.source()) for mutant in MUTANTS}) == len(MUTANTS)
    assert len(MUTANTS) >= 40
    assert {"numpygpt.py", "torchgpt.py"} < set(FILES)
