"""The change feed, idempotency keys, the embedding cache, embedders that change, imports.

Revision ID: 0003
Revises: 0002
"""

from pgshelf.migrate import clear_routines, run

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Writers wait from here on, and then meet stubs: whatever commits later is in the feed.
CHANGES = """
lock table pgshelf.libraries, pgshelf.documents in share row exclusive mode;
create or replace function pgshelf.documents_inserted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.documents_updated() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.documents_deleted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.library_changed() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;

create table pgshelf.change_log (
  library_id uuid not null,
  id bigint generated always as identity,
  kind text not null,
  document_id uuid,
  key text,
  version bigint not null,
  created boolean,
  position bigint,
  stamped_at timestamptz,
  constraint change_log_pkey primary key (library_id, id),
  constraint change_log_kind_check check (kind in ('put', 'delete', 'embedded', 'library'))
);
create unique index change_log_position_idx on pgshelf.change_log (library_id, position) where position is not null;
create index change_log_unstamped_idx on pgshelf.change_log (library_id, id) where position is null;
create trigger library_changed after update on pgshelf.libraries for each row
  when (old.deleted_at is null and new.deleted_at is null
    and (old.version, old.embedder, old.index_actual) is distinct from (new.version, new.embedder, new.index_actual))
  execute function pgshelf.library_changed();

comment on table pgshelf.change_log is 'The change feed: what was committed, in its order; pgshelf.changes() reads it.';
comment on column pgshelf.change_log.id is 'In the order of writing.';
comment on column pgshelf.change_log.document_id is 'Null where the library itself changed.';
comment on column pgshelf.change_log.position is
  'In the order of commits, from 1 for each library; null until it is given.';
"""

IDEMPOTENCY = """
-- scope: whose keys they are
create table pgshelf.idempotency_keys (
  scope text not null default '',
  key text not null,
  request bytea not null,
  status int,
  headers jsonb,
  body bytea,
  created_at timestamptz not null default now(),
  constraint idempotency_keys_pkey primary key (scope, key)
);
create index idempotency_keys_age_idx on pgshelf.idempotency_keys (created_at);

-- what was sent: its document may become something else, or go, and a sender that repeats itself does not undo that
create table pgshelf.events (
  library_id uuid not null,
  key text not null,
  document_id uuid not null,
  hash bytea not null,
  constraint events_pkey primary key (library_id, key)
);

comment on table pgshelf.idempotency_keys is
  'Answers to writes that came with an Idempotency-Key, for when they are sent again.';
comment on column pgshelf.idempotency_keys.scope is 'Whose keys they are.';
comment on column pgshelf.idempotency_keys.request is 'SHA-256 of what was asked for.';
comment on column pgshelf.idempotency_keys.status is
  'Of the answer; null only inside the transaction that does the work.';
comment on column pgshelf.idempotency_keys.body is 'The answer as JSON; null where it has none.';
comment on table pgshelf.events is 'Events that were taken, so that one that is sent again has no effect.';
comment on column pgshelf.events.hash is 'SHA-256 of text and metadata as they were sent first.';
"""

EMBEDDING = """
-- vectors that providers made, by a hash of all that decides them; the least recently used go
create table pgshelf.embedding_cache (
  key bytea not null,
  provider text not null,
  model text not null,
  embedding @vector@.vector not null,
  used_at timestamptz not null default now(),
  constraint embedding_cache_pkey primary key (key)
);
create index embedding_cache_used_idx on pgshelf.embedding_cache (used_at);
comment on table pgshelf.embedding_cache is 'Vectors that providers made; the least recently used go.';
comment on column pgshelf.embedding_cache.key is
  'SHA-256 of provider, model, dimension, kind, options and text: see embedding_cache.py.';
comment on column pgshelf.embedding_cache.used_at is 'Correct to the hour.';
alter table pgshelf.embedding_cache enable row level security;
-- two functions of the worker take more now; they are there unless the database comes from nothing
drop function if exists pgshelf.claim_pending(int, interval);
drop function if exists pgshelf.fail_embeddings(uuid, uuid[], text[], text, float8[]);
"""

NEXT_EMBEDDER = """
-- what sql/ has with another signature from now on
drop function if exists pgshelf.move_begin(uuid, boolean);

-- libraries that are to have another embedder; a change that is over stays until its vectors are reaped
create sequence pgshelf.change_seq as int;
create table pgshelf.embedder_changes (
  serial int not null default nextval('pgshelf.change_seq'),
  library_id uuid not null,
  embedder jsonb not null,
  phase text not null default 'embedding',
  walked uuid,
  passes int not null default 0,
  found bigint not null default 0,
  done bigint not null default 0,
  attempts int not null default 0,
  due timestamptz not null default now(),
  error text,
  started_at timestamptz not null default now(),
  constraint embedder_changes_pkey primary key (serial),
  constraint embedder_changes_embedder_check check (embedder ? 'provider' and embedder ? 'dimension'),
  constraint embedder_changes_phase_check check (phase in ('embedding', 'switching', 'over'))
);
create unique index embedder_changes_library_key on pgshelf.embedder_changes (library_id) where phase <> 'over';
create table pgshelf.next_embeddings (
  change int not null,
  hash bytea not null,
  embedding @vector@.vector,
  error text,
  constraint next_embeddings_pkey primary key (change, hash),
  constraint next_embeddings_error_check check ((embedding is null) = (error is not null))
);
-- all are read once, when the rows that searches will use are written
alter table pgshelf.next_embeddings alter column embedding set storage main;
alter table pgshelf.libraries
  add column moving_change int,
  add constraint libraries_moving_change_check check (moving_change is null or moving <> 0);
comment on column pgshelf.libraries.moving_change is
  'The change of the embedder whose vectors the rows on the new shelf hold; null where they move as they are.';
comment on table pgshelf.embedder_changes is 'Libraries that are to have another embedder, and how far each is.';
comment on column pgshelf.embedder_changes.walked is 'The last document that was looked through in this pass.';
comment on column pgshelf.embedder_changes.found is 'Texts that this pass found without a vector.';
comment on column pgshelf.embedder_changes.done is 'Chunks that the first pass has seen to.';
comment on table pgshelf.next_embeddings is
  'Vectors of an embedder that a library does not use yet, by the SHA-256 of the text.';
comment on column pgshelf.next_embeddings.error is 'Why there is none: the embedder refused the text.';
"""

IMPORTS = """
-- imports that run, and how far those with a name have come: committed with what they wrote
create table pgshelf.imports (
  id uuid not null default gen_random_uuid(),
  library_id uuid not null,
  name text,
  runner uuid not null,
  lines bigint not null default 0,
  checksum bigint not null default 0,
  started_at timestamptz not null default now(),
  written_at timestamptz not null default now(),
  lease_until timestamptz not null,
  constraint imports_pkey primary key (id),
  constraint imports_name_key unique (library_id, name),
  constraint imports_name_check check (char_length(name) between 1 and 255)
);
comment on table pgshelf.imports is 'Imports that run, and how far those with a name have come.';
comment on column pgshelf.imports.name is 'The Idempotency-Key that it came with; null ends with the import.';
comment on column pgshelf.imports.runner is 'Who may write for it: a new one each time it is sent.';
comment on column pgshelf.imports.lines is 'Lines that are committed; the next runner skips them.';
comment on column pgshelf.imports.checksum is 'CRC-32 of these lines, to tell another file of the same name.';
comment on column pgshelf.imports.lease_until is 'The runner lives, or had ended then.';
"""

# Functions of sql/ that now take or return something else: `create or replace` would leave the old ones beside the new.
SEARCH = """
drop function if exists pgshelf.search_statement(pgshelf.libraries, text, jsonb, boolean, int, text, boolean, boolean);
drop function if exists pgshelf.candidates(pgshelf.libraries, text, jsonb, boolean, int, text);
drop function if exists pgshelf.vector_candidates(pgshelf.libraries, jsonb, boolean, int);
drop function if exists pgshelf.sample(pgshelf.libraries, record, float8);
drop function if exists pgshelf.few(float8);
drop function if exists pgshelf.tuning(jsonb, int, boolean, float8);
drop function if exists pgshelf.index_reach(jsonb, boolean);
drop function if exists pgshelf.compile_filter(pgshelf.libraries, jsonb);
drop function if exists pgshelf.one_index(uuid, jsonb, jsonb);
"""

DOWN_IMPORTS = """
drop table pgshelf.imports;
"""

DOWN_NEXT_EMBEDDER = """
-- the older version knows of no move whose rows hold other vectors; what was made of the new shelf is swept away
delete from pgshelf.move_log m using pgshelf.libraries l where l.id = m.library_id and l.moving_change is not null;
update pgshelf.libraries l set moving = 0, moving_to = null, moving_change = null where l.moving_change is not null;
alter table pgshelf.libraries drop constraint libraries_moving_change_check, drop column moving_change;
drop table pgshelf.next_embeddings, pgshelf.embedder_changes;
drop sequence pgshelf.change_seq;
"""

DOWN_EMBEDDING = """
drop table pgshelf.embedding_cache;
"""

DOWN_IDEMPOTENCY = """
drop table pgshelf.events, pgshelf.idempotency_keys;
"""

DOWN_CHANGES = """
drop trigger library_changed on pgshelf.libraries;
drop function pgshelf.library_changed();
drop table pgshelf.change_log;
"""


def upgrade() -> None:
    for part in (CHANGES, IDEMPOTENCY, EMBEDDING, NEXT_EMBEDDER, IMPORTS, SEARCH):
        run(part)


def downgrade() -> None:
    clear_routines()
    for part in (DOWN_IMPORTS, DOWN_NEXT_EMBEDDER, DOWN_EMBEDDING, DOWN_IDEMPOTENCY, DOWN_CHANGES):
        run(part)
