"""The manifest of a base backup: every byte of the copy is held against it.

The check is that of pg_verifybackup, which the wheel of the bundled PostgreSQL 18 has in a form that crashes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from pgshelf.backups import BackupError
from pgshelf.postgres_programs import run

CHANGES = {"backup_manifest", "postgresql.auto.conf", "recovery.signal", "standby.signal"}  # rightly, after the backup


class _File(msgspec.Struct, rename={"path": "Path", "coded": "Encoded-Path", "size": "Size", "checksum": "Checksum"}):
    size: int
    checksum: str
    path: str | None = None
    coded: str | None = None  # hexadecimal, where it is no UTF-8

    @property
    def name(self) -> str:
        return os.fsdecode(bytes.fromhex(self.coded)) if self.path is None and self.coded else str(self.path)


class _WalRange(msgspec.Struct, rename={"timeline": "Timeline", "start": "Start-LSN", "end": "End-LSN"}):
    timeline: int
    start: str
    end: str


class Manifest(msgspec.Struct, rename={"files": "Files", "ranges": "WAL-Ranges", "checksum": "Manifest-Checksum"}):
    """What pg_basebackup writes down: each file with its SHA-256, and from which LSN to which WAL is needed."""

    files: list[_File]
    ranges: list[_WalRange]
    checksum: str


def verify(data: Path, programs: Path) -> Manifest:
    """Hold a backup against its manifest, every byte, and read the WAL it needs; BackupError says what is wrong."""
    text = (data / "backup_manifest").read_bytes()
    manifest = msgspec.json.decode(text, type=Manifest)
    if hashlib.sha256(text[: text.rindex(b'"Manifest-Checksum"')]).hexdigest() != manifest.checksum:
        raise BackupError(f"the manifest of {data} is not as it was written")
    expected = {file.name: file for file in manifest.files}
    files = (path.relative_to(data) for path in data.rglob("*") if path.is_file())
    there = {str(path) for path in files if path.parts[0] != "pg_wal"}  # the WAL is read below
    for name in sorted((there ^ set(expected)) - CHANGES):
        raise BackupError(f"{data / name} is {'missing' if name in expected else 'not in the manifest'}")
    for name in sorted(set(expected) - CHANGES):
        with (data / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected[name].checksum:
                raise BackupError(f"{data / name} is not as it was written")
    for part in manifest.ranges:
        span = [f"--timeline={part.timeline}", f"--start={part.start}", f"--end={part.end}"]
        run([programs / "pg_waldump", "--quiet", f"--path={data / 'pg_wal'}", *span], None)
    return manifest
