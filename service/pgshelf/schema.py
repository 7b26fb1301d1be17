"""What this version expects of the database: the newest migration, and sql/. Alembic is left to `migrate.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path


def resource(name: str) -> Path:
    """The folder `migrations`, `sql` or `docs`: inside the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parent / name
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / name


def sql_files() -> list[Path]:
    """The files of sql/ in the order in which they are applied."""
    return sorted(resource("sql").glob("*.sql"))


def sql_hash() -> str:
    """Fingerprint of sql/: the database remembers the one that was applied last."""
    digest = hashlib.sha256()
    for file in sql_files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def head() -> str:
    """The newest revision of this code; the files are named by theirs, so Alembic need not be asked."""
    return max(file.name.partition("_")[0] for file in resource("migrations").glob("versions/[0-9]*.py"))
