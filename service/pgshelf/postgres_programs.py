"""PostgreSQL's own programs that backups need: where they are, and running them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pgshelf.backups import BackupError

PROGRAMS = ("pg_basebackup", "pg_waldump")


def find_programs(folders: Iterable[Path], major: int) -> Path:
    """The first folder that has the programs of a major version of PostgreSQL; BackupError where none has."""
    others = []
    for folder in folders:
        if not all((folder / program).exists() for program in PROGRAMS):
            continue
        said = run([folder / PROGRAMS[0], "--version"], None)
        if (found := re.search(r" (\d+)", said)) and int(found[1]) == major:
            return folder
        others.append(f"{said.strip()} in {folder}")
    seen = f"; there is {', '.join(others)}" if others else ""
    raise BackupError(f"pg_basebackup of PostgreSQL {major} is needed: name its directory in PGSHELF_PG_BIN{seen}")


def program_folders(pg_bin: Path | None, path: str, bundled: Iterable[Path]) -> list[Path]:
    """Where the programs may be, the best first; the bundled ones are the last, for they know no TLS."""
    if pg_bin is not None:
        return [pg_bin]
    on_path = shutil.which(PROGRAMS[0], path=path)
    return [*([Path(on_path).parent] if on_path else []), *bundled]


def run(command: list[Any], environment: Mapping[str, str] | None, keep_open: Iterable[int] = ()) -> str:
    """What a program writes to its output; BackupError with what it says when it fails.

    `environment`: its own where it is not ours; `keep_open`: the open files that it inherits.
    """
    done = subprocess.run(  # noqa: S603 - PostgreSQL's programs, arguments are not read by a shell
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env=environment, pass_fds=tuple(keep_open),
    )  # fmt: skip
    if done.returncode:
        raise BackupError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout
