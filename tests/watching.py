"""Which tests coverage need not watch, since others run the same lines: being watched doubles what Python takes.

Watch all, with their names, then let this choose: it writes unwatched.txt, which conftest.py reads. A test that is not
named there is watched.

    make test ARGS="--cov-context=test tests/rest tests/sdk" && .venv/bin/python -m tests.watching
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from coverage import CoverageData

FILE = Path(__file__).with_name("unwatched.txt")
BEHIND = re.compile(r"[[|@]")  # the name of a test: its case, its phase, its xdist group
Lines = set[tuple[str, int]]


def lines_by_test() -> dict[str, Lines]:
    """The lines that each test ran, but for those that ran anyway: at import, or in a process of its own."""
    data = CoverageData()
    data.read()
    found: dict[str, Lines] = defaultdict(set)
    for file in data.measured_files():
        for line, contexts in data.contexts_by_lineno(file).items():
            if "" not in contexts:
                for context in contexts:
                    found[BEHIND.split(context, maxsplit=1)[0]].add((file, line))
    return found


def chosen(tests: dict[str, Lines]) -> set[str]:
    """Tests that together run every line that all of them do: the greedy set cover."""
    wanted, watched = set[tuple[str, int]]().union(*tests.values()), set[str]()
    while wanted:
        # by name where two are as good, so that the same measurement gives the same file
        best = max(sorted(tests), key=lambda test: len(tests[test] & wanted))
        watched.add(best)
        wanted -= tests[best]
    return watched


def main() -> None:
    """Write the file."""
    tests = lines_by_test()
    watched = chosen(tests)
    FILE.write_text("".join(f"{test}\n" for test in sorted(set(tests) - watched)))
    print(f"{len(watched)} of {len(tests)} tests are watched")


if __name__ == "__main__":
    main()
