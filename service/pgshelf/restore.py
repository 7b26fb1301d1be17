"""Restoring a backup: a new server from the copy, recovered to a moment with archived WAL."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pgshelf.backup_manifest import verify
from pgshelf.backups import Backup, BackupError, Backups

AUTO = "postgresql.auto.conf"
OURS = "^ *(recovery_target|restore_command|recovery_end_command)"
FORGET = (
    f"LC_ALL=C grep -Eiv '{OURS}' {AUTO} > {AUTO}.new; "  # it ends with 1 where nothing else is in there
    f"test $? -le 1 && sync {AUTO}.new && mv {AUTO}.new {AUTO}"
)


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
        targets = {
            "recovery_target": "",
            "recovery_target_xid": "",
            "recovery_target_time": "" if self.time is None else f"{self.time.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f+00}",
            "recovery_target_lsn": self.lsn or "",
            "recovery_target_name": self.name or "",
        }
        found = {"restore_command": restore_command(self.archive), "recovery_target_action": "promote"}
        # the one that is set comes last: PostgreSQL takes an empty one after it for a second target
        return found | dict(sorted(targets.items(), key=lambda target: target[1] != ""))


def number(lsn: str) -> int:
    """A place in the WAL as a number of bytes."""
    high, low = lsn.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def restore_command(directory: Path | None) -> str:
    """Fetch one segment from there; without an archive there is none, and recovery ends with the backup."""
    return "false" if directory is None else f"cp {shlex.quote(str(directory)).replace('%', '%%')}/%f %p"


def find(store: Backups, backup_id: str | None, recovery: Recovery) -> Backup:
    """A backup by its id, or the newest from which one gets to where it shall be recovered to; BackupError if none."""
    done = [each for each in store.all() if each.state == "done"]
    for each in done:
        if each.id == backup_id or (backup_id is None and recovery.is_behind(each)):
            return each
    if backup_id is None:
        raise BackupError(f"no backup in {store.directory} {'is old enough for that' if done else 'is done'}")
    raise BackupError(f"{store.directory} has no backup {backup_id} that is done; pgshelf backup --list shows all")


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
    """Write down for the server's next start to where it is recovered.

    It takes that out again when it has been recovered: a standby that is copied from it would stop there, too.
    """
    config = pgdata / AUTO
    kept = re.sub(f"(?im){OURS}.*\n?".encode(), b"", config.read_bytes())
    told = {**recovery.settings(), "recovery_end_command": FORGET}
    ours = [f"{name} = {quoted(value)}\n" for name, value in told.items()]
    config.write_bytes(kept + os.fsencode("".join(ours)))


def quoted(value: str) -> str:
    """A value in a file of settings."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
