"""Backups of the whole PostgreSQL server, as they lie in a directory: listed, claimed, pruned.

    directory/backups.lock          held exclusively by whoever takes a backup, and by the programs it started
    directory/ID/backup.json        what `Backup` says, replaced whole
    directory/ID/data/              the copy, with its manifest; complete on its own

The state is in the directory and not in a table: a backup must be found when the database is gone, and a table would be
in its own backup, and on every replica. A backup that is `running` while nobody holds the lock was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

LOCK = "backups.lock"
STATE = "backup.json"
DATA = "data"
DOOMED = ".deleting-"
BUNDLED = "pgshelf.conf"  # what the bundled server's folder has and no other
INTERRUPTED = "interrupted: the process that took it ended"
PATIENCE = 2.0  # seconds in which somebody who only looks has let go of the lock


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

    def prune(self, keep: int) -> Backup | None:
        """Delete all but the newest `keep` that are done, and return the oldest of these; None where all stay."""
        done = [each for each in self.all() if each.state == "done"]
        if not keep or len(done) < keep:
            return None
        oldest = done[keep - 1]
        for each in self.all():
            if each.started_at < oldest.started_at and each.state != "running":
                self._delete(each)
        return oldest

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
