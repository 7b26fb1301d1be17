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

# unlogged: after a crash every share is whole again, which is no harm, and no commit waits for the disk
LIMITS = """
create unlogged table pgshelf.rate_shares (
  caller text not null,
  class text not null,
  whole_at timestamptz not null,
  constraint rate_shares_pkey primary key (caller, class)
) with (fillfactor = 50);
comment on table pgshelf.rate_shares is 'What callers have used of their shares of requests, by class.';
comment on column pgshelf.rate_shares.whole_at is 'When all of the share is there again.';
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
drop table pgshelf.rate_shares;
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
