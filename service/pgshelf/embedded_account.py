"""The user that the bundled PostgreSQL runs as where root starts it.

PostgreSQL refuses to run as root. Started by root, it runs as the owner of an existing cluster, else as the system user
`pgserver`, which is created. That user must reach the programs and the data, so parent directories that others may not
enter become enterable (`o+x`), not readable.
"""

import contextlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
from pathlib import Path

logger = logging.getLogger(__name__)

SYSTEM_USER = "pgserver"


def account_for(pgdata: Path) -> tuple[int, int] | None:
    """Return the uid and gid to run as: the cluster's owner, else a user of its own; None when we are not root.

    Raises LookupError where there is no such user and none can be made.
    """
    if os.geteuid() != 0:
        return None
    if pgdata.exists() and pgdata.stat().st_uid != 0:
        return pgdata.stat().st_uid, pgdata.stat().st_gid
    command = [
        shutil.which("useradd") or "/usr/sbin/useradd",
        "--system",
        "--user-group",
        "--no-create-home",
        SYSTEM_USER,
    ]
    if not any(user.pw_name == SYSTEM_USER for user in pwd.getpwall()):
        subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - constant arguments
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam(SYSTEM_USER)
        return user.pw_uid, user.pw_gid
    raise LookupError(f"PostgreSQL does not run as root: run pgshelf as another user, or add a user {SYSTEM_USER}")


def open_the_way(programs: Path, data_dir: Path) -> None:
    """Let the server's user reach the programs and the data, which root may have hidden from others."""
    for directory in sorted({*programs.parents, data_dir, *data_dir.parents}):
        _add_mode(directory, stat.S_IXOTH)
    installation = programs.parent
    if not (programs / "postgres").stat().st_mode & stat.S_IXOTH:  # installed under a strict umask
        for path in [installation, *installation.rglob("*")]:
            _add_mode(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))


def give(pgdata: Path, user: int, group: int) -> None:
    """A cluster that root has put there, from a backup say, becomes the server's; the top is last, for it tells."""
    if pgdata.stat().st_uid == 0:
        for path in [*pgdata.rglob("*"), pgdata]:
            os.chown(path, user, group, follow_symlinks=False)


def _add_mode(path: Path, bits: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & bits != bits:
        logger.info("PostgreSQL's user needs access: chmod %o %s", mode | bits, path)
        path.chmod(mode | bits)
