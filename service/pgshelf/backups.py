"""Backups of the whole PostgreSQL server: taken by pg_basebackup, checked against its manifest, restored to a moment.

    directory/backups.lock          held exclusively by whoever takes a backup, and by the programs it started
    directory/ID/backup.json        what `Backup` says, replaced whole
    directory/ID/data/              the copy, with its manifest; complete on its own

The state is in the directory and not in a table: a backup must be found when the database is gone, and a table would be
in its own backup, and on every replica. A backup that is `running` while nobody holds the lock was interrupted.

The check is that of pg_verifybackup, which the wheel of the bundled PostgreSQL 18 has in a form that crashes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import psycopg
from msgspec import Meta
from psycopg import conninfo

from pgshelf import connections

LOCK = "backups.lock"
STATE = "backup.json"
DATA = "data"
DOOMED = ".deleting-"
BUNDLED = "pgshelf.conf"  # what the bundled server's folder has and no other
INTERRUPTED = "interrupted: the process that took it ended"
PATIENCE = 2.0  # seconds in which somebody who only looks has let go of the lock
PROGRAMS = ("pg_basebackup", "pg_waldump")
CHANGES = {"backup_manifest", "postgresql.auto.conf", "recovery.signal", "standby.signal"}  # rightly, after the backup
QUESTION = """
select current_setting('server_version_num')::int / 10000, current_setting('server_version'),
  array(select spcname::text from pg_catalog.pg_tablespace where spcname not in ('pg_default', 'pg_global') order by 1)
"""


class BackupError(Exception):
    """A backup could not be taken or restored; the text says why and what to do."""


class BackupRunning(BackupError):
    """Another backup is being taken into the same directory."""


class Backup(msgspec.Struct):
    """A backup of the whole PostgreSQL server."""

    id: Annotated[str, Meta(description="When it was started; `pgshelf restore` takes it.")]
    label: Annotated[str | None, Meta(description="What you called it.")]
    state: Annotated[
        Literal["running", "done", "failed"],
        Meta(description="`done`: complete and checked against its manifest; `failed`: `error` says why."),
    ]
    error: Annotated[str | None, Meta(description="Why there is none.")]
    started_at: Annotated[datetime, Meta(description="When it was started.")]
    finished_at: Annotated[
        datetime | None,
        Meta(description="When the copy ended; with archived WAL any later time can be recovered."),
    ]
    bytes: Annotated[int | None, Meta(description="What it takes on disk.")]
    start_lsn: Annotated[str | None, Meta(description="The place in the WAL from which on it is recovered.")]
    end_lsn: Annotated[str | None, Meta(description="The place in the WAL at which it is consistent.")]
    timeline: Annotated[int | None, Meta(description="Of the WAL at its end.")]
    postgres: Annotated[str | None, Meta(description="The version of the server.")]

    @property
    def major(self) -> int:
        """The major version of the server."""
        return int((self.postgres or "0").split(".")[0])


class _File(msgspec.Struct, rename={"path": "Path", "coded": "Encoded-Path", "size": "Size", "checksum": "Checksum"}):
    size: int
    checksum: str
    path: str | None = None
    coded: str | None = None  # hexadecimal, where it is no UTF-8

    @property
    def name(self) -> str:
        return os.fsdecode(bytes.fromhex(self.coded)) if self.path is None and self.coded else str(self.path)


class _Range(msgspec.Struct, rename={"timeline": "Timeline", "start": "Start-LSN", "end": "End-LSN"}):
    timeline: int
    start: str
    end: str


class _Manifest(msgspec.Struct, rename={"files": "Files", "ranges": "WAL-Ranges", "checksum": "Manifest-Checksum"}):
    files: list[_File]
    ranges: list[_Range]
    checksum: str


class Backups:
    """The backups of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> list[Backup]:
        """What is there, the newest first."""
        found = self._read()
        if any(each.state == "running" for each in found) and not self._in_use():
            # read again: it may have ended between the two looks
            found = [_interrupted(each) if each.state == "running" else each for each in self._read()]
        return found

    def data(self, backup: Backup) -> Path:
        """Where the copy is."""
        return self.directory / backup.id / DATA

    def is_bundled(self, backup: Backup) -> bool:
        """Whether it is of a bundled PostgreSQL."""
        return (self.data(backup) / BUNDLED).exists()

    def find(self, backup_id: str | None, recovery: Recovery) -> Backup:
        """A backup by its id, or the newest from which one gets to where it shall be recovered to."""
        done = [each for each in self.all() if each.state == "done"]
        for each in done:
            if each.id == backup_id or (backup_id is None and recovery.is_behind(each)):
                return each
        if backup_id is None:
            raise BackupError(f"no backup in {self.directory} {'is old enough for that' if done else 'is done'}")
        raise BackupError(f"{self.directory} has no backup {backup_id} that is done; pgshelf backup --list shows all")

    def claim(self, label: str | None) -> tuple[Backup, int]:
        """Begin a backup; with it comes the lock, a file that is to be closed when the backup has ended.

        Whoever inherits it holds it, too.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._lock()
        try:
            self._clear()
            begun = Backup(self._new_id(), label, "running", None, datetime.now(UTC), *[None] * 6)
            (self.directory / begun.id).mkdir(mode=0o700)
            self.write(begun)
        except BaseException:
            os.close(lock)
            raise
        return begun, lock

    def abandon(self, backup: Backup, lock: int) -> None:
        """Take back a claim of which nothing came."""
        shutil.rmtree(self.directory / backup.id, ignore_errors=True)
        os.close(lock)

    def write(self, backup: Backup) -> None:
        """Put down the state of a backup, whole or not at all."""
        file = self.directory / backup.id / STATE
        fresh = file.with_suffix(".new")
        with fresh.open("wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(backup)) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        fresh.rename(file)

    def prune(self, keep: int, archive: Path | None = None, cleanup: Path | None = None) -> None:
        """Delete all but the newest `keep` that are done, and the archived WAL that only those needed."""
        done = [each for each in self.all() if each.state == "done"]
        if not keep or len(done) < keep:
            return
        oldest = done[keep - 1]
        for each in self.all():
            if each.started_at < oldest.started_at and each.state != "running":
                self._delete(each)
        if archive is not None and cleanup is not None:
            first = re.search(r"\(file ([0-9A-F]{24})\)", (self.data(oldest) / "backup_label").read_text())
            if first is not None:
                _run([cleanup, archive, first[1]], None)

    @contextlib.contextmanager
    def reading(self, backup: Backup) -> Iterator[None]:
        """Keep a backup from being pruned while it is restored."""
        with (self.directory / backup.id / STATE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def _read(self) -> list[Backup]:
        found = []
        for file in sorted(self.directory.glob(f"[0-9]*/{STATE}"), reverse=True):
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):  # pruned meanwhile; not ours
                found.append(msgspec.json.decode(file.read_bytes(), type=Backup))
        return found

    def _in_use(self) -> bool:
        with (self.directory / LOCK).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _lock(self) -> int:
        lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise BackupRunning(f"another backup is being taken into {self.directory}") from None
                time.sleep(0.05)

    def _clear(self) -> None:
        """Take away what was interrupted; nobody else is at work while the lock is held."""
        for left in self.directory.glob(f"{DOOMED}*"):
            shutil.rmtree(left, ignore_errors=True)
        for each in self._read():
            if each.state == "running":
                self.write(_interrupted(each))
            if each.state != "done":
                shutil.rmtree(self.data(each), ignore_errors=True)

    def _new_id(self) -> str:
        stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        names = (stem if n == 0 else f"{stem}-{n}" for n in range(1000))
        return next(name for name in names if not (self.directory / name).exists())

    def _delete(self, backup: Backup) -> None:
        folder, doomed = self.directory / backup.id, self.directory / f"{DOOMED}{backup.id}"
        with (folder / STATE).open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it is being restored: the next time
                return
            folder.rename(doomed)  # at once, so that nobody takes half of it for a backup
        shutil.rmtree(doomed, ignore_errors=True)


def _interrupted(backup: Backup) -> Backup:
    return msgspec.structs.replace(backup, state="failed", error=INTERRUPTED)


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
                store.prune(job.keep, Path(job.archive) if job.archive else None, programs / "pg_archivecleanup")
            except (BackupError, OSError) as error:  # the backup is good all the same
                backup.error = f"older ones could not be cleared away: {_line(error)}"
        store.write(backup)
    except BaseException:
        store.write(_failed(backup, INTERRUPTED))
        raise
    finally:
        os.close(job.lock)
    return backup


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
    _run(copy, told, keep_open=[job.lock])
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


def verify(data: Path, programs: Path) -> _Manifest:
    """Hold a backup against its manifest, every byte, and read the WAL that it needs."""
    text = (data / "backup_manifest").read_bytes()
    manifest = msgspec.json.decode(text, type=_Manifest)
    if hashlib.sha256(text[: text.rindex(b'"Manifest-Checksum"')]).hexdigest() != manifest.checksum:
        raise BackupError(f"the manifest of {data} is not as it was written")
    expected = {file.name: file for file in manifest.files}
    there = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file() and path.parent.name != "pg_wal"}
    for name in sorted((there ^ set(expected)) - CHANGES):
        raise BackupError(f"{data / name} is {'missing' if name in expected else 'not in the manifest'}")
    for name in sorted(set(expected) - CHANGES):
        with (data / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected[name].checksum:
                raise BackupError(f"{data / name} is not as it was written")
    for part in manifest.ranges:
        span = [f"--timeline={part.timeline}", f"--start={part.start}", f"--end={part.end}"]
        _run([programs / "pg_waldump", "--quiet", f"--path={data / 'pg_wal'}", *span], None)
    return manifest


def find_programs(folders: Iterable[Path], major: int) -> Path:
    """The first folder that has the programs of a major version of PostgreSQL."""
    others = []
    for folder in folders:
        if not all((folder / program).exists() for program in PROGRAMS):
            continue
        said = _run([folder / PROGRAMS[0], "--version"], None)
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


def _run(command: list[Any], environment: Mapping[str, str] | None, keep_open: Iterable[int] = ()) -> str:
    done = subprocess.run(  # noqa: S603 - PostgreSQL's programs, arguments are not read by a shell
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env=environment, pass_fds=tuple(keep_open),
    )  # fmt: skip
    if done.returncode:
        raise BackupError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout


class Recovery(msgspec.Struct, frozen=True):
    """To where a backup is recovered: one of the three, or as far as the WAL goes."""

    time: datetime | None = None
    lsn: str | None = None
    name: str | None = None
    archive: Path | None = None

    def is_behind(self, backup: Backup) -> bool:
        """Whether it comes after the end of a backup; of a name nobody knows."""
        if self.time is not None and backup.finished_at is not None:
            return backup.finished_at < self.time
        if self.lsn is not None and backup.end_lsn is not None:
            return number(backup.end_lsn) <= number(self.lsn)
        return True

    def settings(self) -> dict[str, str]:
        """What PostgreSQL is told. Always a recovery: so what is restored has a timeline of its own, and no WAL of the
        server that it was taken from is ever written again.
        """
        found = {"restore_command": restore_command(self.archive), "recovery_target_action": "promote"}
        if self.time is not None:
            found["recovery_target_time"] = f"{self.time.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f+00}"
        if self.lsn is not None:
            found["recovery_target_lsn"] = self.lsn
        if self.name is not None:
            found["recovery_target_name"] = self.name
        return found


def number(lsn: str) -> int:
    """A place in the WAL as a number of bytes."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def restore_command(directory: Path | None) -> str:
    """Fetch one segment from there; without an archive there is none, and recovery ends with the backup."""
    return "false" if directory is None else f"cp {shlex.quote(str(directory)).replace('%', '%%')}/%f %p"


def restore(store: Backups, backup: Backup, pgdata: Path, programs: Path) -> None:
    """Check a backup and copy it to `pgdata`, which must be missing or empty.

    Under its name there is all of it or nothing. What it is to be recovered to is written by `prepare`, or by whoever
    starts it.
    """
    if pgdata.exists() and any(pgdata.iterdir()):
        raise BackupError(f"{pgdata} is not empty; restore to a new directory")
    pgdata.parent.mkdir(parents=True, exist_ok=True)
    with store.reading(backup):
        data = store.data(backup)
        verify(data, programs)
        part = pgdata.with_name(f"{pgdata.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(data, part, symlinks=True)
    part.chmod(0o700)
    for left in ("standby.signal", "backup_manifest"):  # it may have been taken from a standby
        (part / left).unlink(missing_ok=True)
    (part / "recovery.signal").touch(0o600)
    os.sync()
    part.replace(pgdata)


def prepare(pgdata: Path, recovery: Recovery) -> None:
    """Write down for the server's next start to where it is recovered."""
    with (pgdata / "postgresql.auto.conf").open("a") as config:
        config.write("# written by pgshelf restore; of no use once the server has started\n")
        for name, value in recovery.settings().items():
            config.write(f"{name} = {quoted(value)}\n")


def quoted(value: str) -> str:
    """A value in a file of settings."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
