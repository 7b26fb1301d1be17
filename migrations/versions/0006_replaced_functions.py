"""Functions of sql/ that return or take something else now, where `create or replace` does not do.

Revision ID: 0006
Revises: 0005
"""

from pgshelf.migrate import clear_routines, run

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UP = """
drop function if exists pgshelf.compile_filter(pgshelf.libraries, jsonb);
drop function if exists pgshelf.search_statement(
  pgshelf.libraries, text, jsonb, boolean, int, text, boolean, boolean, int, boolean, text, record, boolean);
"""

# as 0005 left them, for the policies on its tables
DOWN = """
create or replace function pgshelf.granted(p_library uuid, p_access text) returns boolean
  stable language sql as 'select false';
create or replace function pgshelf.granted_libraries(p_access text) returns uuid[]
  stable language sql as 'select ''{}''::uuid[]';
comment on function pgshelf.granted(uuid, text) is null;
comment on function pgshelf.granted_libraries(text) is null;
"""


def upgrade() -> None:
    run(UP)


def downgrade() -> None:
    clear_routines()
    run(DOWN)
