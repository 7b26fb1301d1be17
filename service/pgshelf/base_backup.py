"""Taking a base backup: copied by pg_basebackup, checked, and older ones cleared away."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psycopg
from psycopg import conninfo

from pgshelf import connections
from pgshelf.backup_manifest import verify
from pgshelf.backups import INTERRUPTED, Backup, BackupError, Backups
from pgshelf.postgres_programs import find_programs, run

QUESTION = """
select current_setting('server_version_num')::int / 10000, current_setting('server_version'),
  array(select spcname::text from pg_catalog.pg_tablespace where spcname not in ('pg_default', 'pg_global') order by 1)
"""


class Job(msgspec.Struct):
    """A claimed backup, as the process that takes it reads it from its input: the address may hold a password."""

    directory: str
    backup: Backup
    lock: int
    url: str
    pg_bin: str | None = None
    keep: int = 0
    archive: str | None = None


def take(job: Job, folders: Iterable[Path], environment: Mapping[str, str]) -> Backup:
    """Carry a job out, with programs of one of `folders`, and say what became of it; the lock is given back."""
    store, backup = Backups(Path(job.directory)), job.backup
    try:
        try:
            programs, backup = _copied(store, job, folders, environment)
        except (BackupError, OSError, psycopg.Error, msgspec.MsgspecError) as error:
            backup = _failed(backup, _line(error))
            shutil.rmtree(store.data(backup), ignore_errors=True)
        else:
            store.write(backup)
            try:
                oldest = store.prune(job.keep)
                if oldest is not None and job.archive is not None:
                    clear_archive(Path(job.archive), store.data(oldest), programs)
            except (BackupError, OSError) as error:  # the backup is good all the same
                backup.error = f"older ones could not be cleared away: {_line(error)}"
        store.write(backup)
    except BaseException:
        store.write(_failed(backup, INTERRUPTED))
        raise
    finally:
        os.close(job.lock)
    return backup


def clear_archive(archive: Path, data: Path, programs: Path) -> None:
    """Delete the archived WAL that is older than the backup in `data`, the oldest there is, needs."""
    first = re.search(r"\(file ([0-9A-F]{24})\)", (data / "backup_label").read_text())
    if first is not None:
        run([programs / "pg_archivecleanup", archive, first[1]], None)


def _failed(backup: Backup, error: str) -> Backup:
    return msgspec.structs.replace(backup, state="failed", error=error, finished_at=datetime.now(UTC))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]


def _copied(store: Backups, job: Job, folders: Iterable[Path], environment: Mapping[str, str]) -> tuple[Path, Backup]:
    with connections.connect(job.url, "backup") as connection:
        row = connection.execute(QUESTION).fetchone()
    assert row is not None  # noqa: S101 - narrows the type: one row comes always
    major, version, tablespaces = row
    if tablespaces:
        raise BackupError(
            f"the server has tablespaces ({', '.join(tablespaces)}), which pgshelf backup does not copy; "
            "use pgBackRest or WAL-G"
        )
    programs = find_programs(folders, major)
    target, password = _without_password(job.url)
    data = store.data(job.backup)
    told = {**environment, "LC_ALL": "C", **({"PGPASSWORD": password} if password is not None else {})}
    copy = [programs / "pg_basebackup", f"--dbname={target}", f"--pgdata={data}", "--wal-method=stream"]
    copy += ["--checkpoint=fast", "--no-password", f"--label=pgshelf {job.backup.id}", "--manifest-checksums=SHA256"]
    run(copy, told, keep_open=[job.lock])
    ended = datetime.now(UTC)
    manifest = verify(data, programs)
    done = msgspec.structs.replace(
        job.backup,
        state="done",
        finished_at=ended,
        bytes=sum(file.lstat().st_size for file in data.rglob("*") if file.is_file()),
        start_lsn=manifest.ranges[0].start,
        end_lsn=manifest.ranges[-1].end,
        timeline=manifest.ranges[-1].timeline,
        postgres=version,
    )
    return programs, done


def _without_password(url: str) -> tuple[str, str | None]:
    """A connection string that may be seen by whoever lists processes, and the password that it had."""
    parameters = conninfo.conninfo_to_dict(connections.dsn(url))
    password = parameters.pop("password", None)
    if "sslpassword" in parameters:
        raise BackupError("the list of processes would show the sslpassword of the connection: use a key without one")
    return conninfo.make_conninfo("", **parameters), None if password is None else str(password)
