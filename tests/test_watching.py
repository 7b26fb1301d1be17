"""Coverage watches what it is told to and nothing else, in workers of xdist too."""

from __future__ import annotations

import os
import sys

import pytest

from tests import watching


def watched() -> tuple[bool, bool]:
    """Whether coverage watches this process, and those that it starts."""
    return sys.gettrace() is not None, watching.PROCESSES in os.environ


@pytest.mark.parametrize("case", [1, 2])
def test_the_first_case_is_watched(pytestconfig: pytest.Config, case: int) -> None:
    covered = watching.coverage_of(pytestconfig) is not None
    assert watched() == ((True, True) if covered and case == 1 else (False, False))


@pytest.mark.watched
@pytest.mark.parametrize("case", [1, 2])
def test_so_are_all_with_the_marker(pytestconfig: pytest.Config, case: int) -> None:
    covered = watching.coverage_of(pytestconfig) is not None
    assert watched() == (covered, covered)


@pytest.mark.unwatched
def test_what_shall_not_be_is_not() -> None:
    assert watched() == (False, False)
