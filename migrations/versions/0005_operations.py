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
drop function if exists pgshelf.library_named(text);

create table pgshelf.grants (
  role text not null,
  library_id uuid,
  access text not null,
  constraint grants_role_library_key unique nulls not distinct (role, library_id),
  constraint grants_library_fk foreign key (library_id) references pgshelf.libraries (id) on delete cascade,
  constraint grants_access_check check (access in ('monitor', 'read', 'write'))
);
create index grants_library_idx on pgshelf.grants (library_id);
comment on table pgshelf.grants is 'Which libraries a role of PostgreSQL has in SQL; pgshelf.grant_library writes it.';
comment on column pgshelf.grants.role is 'By name, so that dumps go to other clusters; revoke before it is dropped.';
comment on column pgshelf.grants.library_id is 'Null: all libraries, those to come included.';

-- sql/14_access.sql says what these mean; until it is applied nobody but the owner sees a row
create function pgshelf.granted(p_library uuid, p_access text) returns boolean stable language sql as 'select false';
create function pgshelf.granted_libraries(p_access text) returns uuid[] stable language sql as 'select ''{}''::uuid[]';

do $$
declare
  v_table text;
  v_library text;
begin
  foreach v_table in array array['libraries', 'documents', 'chunks', 'move_log', 'attribute_values', 'terms',
    'word_statistics', 'waiting', 'events', 'imports', 'change_log', 'embedder_changes'] loop
    v_library := case v_table when 'libraries' then 'id' else 'library_id' end;
    execute format('alter table pgshelf.%I enable row level security', v_table);
    execute format($p$create policy reading on pgshelf.%I for select using ((select pgshelf.granted(null, 'read'))
      or %I = any ((select pgshelf.granted_libraries('read'))::uuid[]))$p$, v_table, v_library);
    execute format($p$create policy writing on pgshelf.%I for all using ((select pgshelf.granted(null, 'write'))
      or %I = any ((select pgshelf.granted_libraries('write'))::uuid[]))$p$, v_table, v_library);
  end loop;
end $$;
-- of no library, or of several: without a policy they are the owner's alone
alter table pgshelf.grants enable row level security;
alter table pgshelf.next_embeddings enable row level security;
alter table pgshelf.planes enable row level security;
"""

AUDIT = """
create table pgshelf.audit_log (
  at timestamptz not null default clock_timestamp(),
  id uuid not null default gen_random_uuid(),
  action text not null,
  outcome text not null,
  principal_kind text not null,
  principal text not null,
  principal_id uuid,
  library_id uuid,
  library text,
  document text,
  request_id text,
  count bigint not null,
  detail text,
  constraint audit_log_pkey primary key (at, id),
  constraint audit_log_outcome_check check (outcome in ('done', 'refused'))
);
create index audit_log_library_idx on pgshelf.audit_log (library_id, at, id) where library_id is not null;
comment on table pgshelf.audit_log is 'Who did what to which library: only added to, the worker forgets old rows.';
comment on column pgshelf.audit_log.principal_kind is 'key, token, jwt, anybody; role: of PostgreSQL.';
comment on column pgshelf.audit_log.library is 'What it was called then.';
comment on column pgshelf.audit_log.count is 'Documents, if it is about those; refused attempts.';

create function pgshelf.audit_kept() returns trigger language plpgsql
  as $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create trigger audit_kept before update or delete or truncate on pgshelf.audit_log
  for each statement execute function pgshelf.audit_kept();
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
alter table pgshelf.rate_shares enable row level security; -- the owner's alone
"""

# Writers wait from here on, and then meet stubs: whatever commits later leaves a mark.
CACHE = """
lock table pgshelf.libraries, pgshelf.documents, pgshelf.chunks in share row exclusive mode;
create or replace function pgshelf.documents_inserted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.documents_updated() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.documents_deleted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.chunk_written() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create table pgshelf.library_marks (
  library_id uuid not null,
  mark bigint not null default uuid_hash_extended(gen_random_uuid(), 0),
  constraint library_marks_pkey primary key (library_id, mark)
);
alter table pgshelf.library_marks enable row level security;
create function pgshelf.library_marked() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.chunk_marked() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create trigger library_marked after update on pgshelf.libraries
  for each row execute function pgshelf.library_marked();
create trigger chunk_marked after delete or update of shelf, ordinal, id, text, metadata, language on pgshelf.chunks
  for each row when (current_setting('pgshelf.marked', true) is distinct from old.library_id::text)
  execute function pgshelf.chunk_marked();
comment on table pgshelf.library_marks is
  'Random numbers left by whoever changes something: all of a library together are its state, for the query cache.';
comment on column pgshelf.library_marks.library_id is 'The nil id stands for all libraries.';
"""

REPLICATION = """
create table pgshelf.heartbeats (
  n int not null,
  at timestamptz not null,
  wal bigint not null,
  constraint heartbeats_pkey primary key (n)
);
comment on table pgshelf.heartbeats is 'Places in the WAL and their times, a ring: how many seconds a replica is late.';
comment on column pgshelf.heartbeats.wal is 'The LSN, as a number of bytes.';
"""

DOWN_ACCESS = """
alter table pgshelf.planes disable row level security;
alter table pgshelf.next_embeddings disable row level security;
do $$
declare
  v_policy record;
  v_role text;
begin
  for v_policy in select p.polname as name, p.polrelid::regclass as of_table from pg_policy p
    join pg_class c on c.oid = p.polrelid and c.relnamespace = 'pgshelf'::regnamespace loop
    execute format('drop policy %I on %s', v_policy.name, v_policy.of_table);
    execute format('alter table %s disable row level security', v_policy.of_table);
  end loop;
  foreach v_role in array array['pgshelf_monitor', 'pgshelf_service', 'pgshelf_worker'] loop
    continue when to_regrole(v_role) is null;
    execute format('revoke all on all tables in schema pgshelf from %I', v_role);
    execute format('revoke all on all functions in schema pgshelf from %I', v_role);
    execute format('revoke all on schema pgshelf from %I', v_role);
  end loop;
end $$;
drop function pgshelf.granted_libraries(text), pgshelf.granted(uuid, text);
drop table pgshelf.grants;
"""

DOWN_AUDIT = """
drop table pgshelf.audit_log;
drop function pgshelf.audit_kept();
"""

DOWN_LIMITS = """
drop table pgshelf.rate_shares;
"""

DOWN_CACHE = """
drop trigger chunk_marked on pgshelf.chunks;
drop trigger library_marked on pgshelf.libraries;
drop function pgshelf.chunk_marked(), pgshelf.library_marked();
drop table pgshelf.library_marks;
"""

DOWN_REPLICATION = """
drop table pgshelf.heartbeats;
"""


def upgrade() -> None:
    for part in (ACCESS, AUDIT, LIMITS, CACHE, REPLICATION):
        run(part)


def downgrade() -> None:
    clear_routines()
    for part in (DOWN_REPLICATION, DOWN_CACHE, DOWN_LIMITS, DOWN_AUDIT, DOWN_ACCESS):
        run(part)
