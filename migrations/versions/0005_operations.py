"""Grants and row security, the audit log, limits, the query cache, replication.

Revision ID: 0005
Revises: 0004
"""

from pgshelf.migrate import clear_routines, run

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ACCESS = """
"""

AUDIT = """
"""

LIMITS = """
"""

CACHE = """
"""

REPLICATION = """
"""

DOWN_ACCESS = """
"""

DOWN_AUDIT = """
"""

DOWN_LIMITS = """
"""

DOWN_CACHE = """
"""

DOWN_REPLICATION = """
"""


def upgrade() -> None:
    for part in (ACCESS, AUDIT, LIMITS, CACHE, REPLICATION):
        run(part)


def downgrade() -> None:
    clear_routines()
    for part in (DOWN_REPLICATION, DOWN_CACHE, DOWN_LIMITS, DOWN_AUDIT, DOWN_ACCESS):
        run(part)
