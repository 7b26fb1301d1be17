"""Libraries, documents and chunks.

Revision ID: 0001
Revises:
"""

from pgshelf.migrate import run

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Stubs fail closed: until sql/ has been applied behind this migration nothing can be written past a missing rule.
STUBS = """
create function pgshelf.chunk_written() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.documents_deleted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
"""

# What columns are computed from; a change of meaning needs a migration that rewrites them, so they live here.
COMPUTED = """
create function pgshelf.place_of(p_library uuid, p_document uuid, p_fanout int) returns int
  immutable parallel safe language sql
as $$
  select ('x' || substr(md5(p_library::text || case when p_fanout > 1 then
      (('x' || substr(md5(p_document::text), 1, 7))::bit(28)::int % p_fanout)::text else '' end), 1, 7))::bit(28)::int
$$;

-- what parses as a UUID is an id, never a name or a key; checks call it
create function pgshelf.is_id(p_text text) returns boolean
  immutable parallel safe language sql
as $$
  select p_text ~* '^([0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}|\\{[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}\\})$'
$$;

-- immutable by promise: one of PostgreSQL's own text search configurations, by name, never taken from the session
create function pgshelf.words(p_language text, p_text text) returns tsvector
  immutable parallel safe language sql
  as $$ select to_tsvector(('pg_catalog.' || quote_ident(p_language))::regconfig, p_text) $$;
"""

LIBRARIES = """
create table pgshelf.libraries (
  id uuid not null default gen_random_uuid(),
  name text not null,
  description text,
  dimension int not null,
  metric text not null default 'cosine',
  embedder jsonb not null,
  chunking jsonb not null,
  language text not null default 'english',
  index jsonb not null default '{"type": "auto"}',
  index_state text not null default 'ready',
  attributes jsonb not null default '{}',
  metadata jsonb not null default '{}',
  shelf int not null default 0,
  moving int not null default 0,
  moving_to int,
  fanout int not null default 1,
  version bigint not null default 1,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  deleted_at timestamptz,
  constraint libraries_pkey primary key (id),
  constraint libraries_name_check check (char_length(name) between 1 and 128 and name !~ '[[:cntrl:]]'
    and name = btrim(name) and name not in ('.', '..') and not pgshelf.is_id(name)),
  constraint libraries_dimension_check check (dimension between 1 and 16000),
  constraint libraries_metric_check check (metric in ('cosine', 'l2', 'inner_product', 'l1')),
  constraint libraries_embedder_check check (jsonb_typeof(embedder) = 'object' and embedder ? 'provider'
    and (embedder -> 'dimension') = to_jsonb(dimension)),
  constraint libraries_language_check check (
    ('pg_catalog.' || quote_ident(language))::pg_catalog.regconfig is not null),
  constraint libraries_moving_check check (moving between 0 and 2 and (moving = 0) = (moving_to is null)),
  constraint libraries_fanout_check check (fanout >= 1)
);
-- a deleted library frees its name at once; its rows are reaped later
create unique index libraries_name_key on pgshelf.libraries (name) where deleted_at is null;
create index libraries_order_idx on pgshelf.libraries (created_at, id);
"""

DOCUMENTS = """
create table pgshelf.documents (
  place int not null,
  library_id uuid not null,
  id uuid not null default gen_random_uuid(),
  key text,
  title text,
  source text,
  metadata jsonb not null default '{}',
  content_hash bytea,
  version bigint not null default 1,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint documents_pkey primary key (id),
  constraint documents_key_key unique (library_id, key),
  constraint documents_library_fk foreign key (library_id) references pgshelf.libraries (id),
  constraint documents_metadata_check check (jsonb_typeof(metadata) = 'object'),
  constraint documents_key_check check (char_length(key) between 1 and 512
    and key not in ('.', '..') and not pgshelf.is_id(key))
);
create index documents_order_idx on pgshelf.documents (library_id, created_at, id);
create trigger documents_deleted after delete on pgshelf.documents
  referencing old table as gone for each statement execute function pgshelf.documents_deleted();
"""

CHUNKS = """
create table pgshelf.chunks (
  shelf int not null,
  place int not null,
  library_id uuid not null,
  document_id uuid not null,
  ordinal int not null,
  id uuid not null default gen_random_uuid(),
  text text not null,
  metadata jsonb not null default '{}',
  embedding @vector@.vector,
  language text not null,
  tsv tsvector generated always as (pgshelf.words(language, text)) stored,
  embed_attempts int not null default 0,
  embed_after timestamptz not null default now(),
  embed_error text,
  constraint chunks_pkey primary key (library_id, document_id, ordinal, place, shelf),
  constraint chunks_text_check check (text ~ '\\S'),
  constraint chunks_metadata_check check (jsonb_typeof(metadata) = 'object')
) partition by list (shelf);
-- MAIN keeps vectors beside their row: exact scans are four to five times faster than from TOAST
alter table pgshelf.chunks alter column embedding set storage main;
create index chunks_id_idx on pgshelf.chunks (id);
create index chunks_pending_idx on pgshelf.chunks (embed_after, library_id) where embedding is null;
create trigger chunk_written after insert or update of library_id, document_id, embedding on pgshelf.chunks
  for each row execute function pgshelf.chunk_written();
-- shelf 0, shared by every library that has no shelf of its own; there is no default partition on purpose
create table pgshelf.chunks_s0 partition of pgshelf.chunks for values in (0);

-- documents written while their library moves to a shelf of its own, to be copied again
create table pgshelf.move_log (
  library_id uuid not null,
  document_id uuid not null
);
create index move_log_library_idx on pgshelf.move_log (library_id);
"""

COMMENTS = """
comment on table pgshelf.libraries is 'A library: documents that share an embedder, a dimension and a metric.';
comment on column pgshelf.libraries.embedder is 'Who makes the vectors: {"provider", "model", "dimension"}.';
comment on column pgshelf.libraries.chunking is 'How text is split: {"size", "overlap"} in characters.';
comment on column pgshelf.libraries.index is 'The wanted index; index_state tells how far the actual one is.';
comment on column pgshelf.libraries.shelf is 'The partition of chunks that counts for this library; 0 is shared.';
comment on column pgshelf.libraries.moving is '0 at rest, 1 writers log documents, 2 writers write both shelves.';
comment on column pgshelf.libraries.deleted_at is 'Set when the library was deleted; its rows are reaped afterwards.';
comment on table pgshelf.documents is 'A document of a library; business tables may reference its id.';
comment on column pgshelf.documents.key is 'The caller''s own name for the document, unique in its library.';
comment on column pgshelf.documents.version is 'Grows with every change of the document or its chunks; the ETag.';
comment on column pgshelf.documents.content_hash is
  'SHA-256 of the texts as they were written together; null once a single chunk was changed.';
comment on column pgshelf.documents.place is 'Stable hash of the library, the distribution column on a cluster.';
comment on table pgshelf.chunks is 'The passages that are searched; rows count where their shelf is their library''s.';
comment on column pgshelf.chunks.embedding is 'The vector; null asks the worker to make one.';
comment on column pgshelf.chunks.embed_error is 'Why the last attempt to embed this chunk failed.';
comment on table pgshelf.move_log is 'Documents written while their library moves between shelves.';
"""

DOWN = """
do $$
declare
  v_name text;
begin
  -- everything of sql/ first, views before functions, all without cascade: whatever depends from outside refuses
  for v_name in select c.oid::regclass from pg_class c
    where c.relnamespace = 'pgshelf'::regnamespace and c.relkind = 'v' order by c.oid desc loop
    execute 'drop view ' || v_name;
  end loop;
  -- the tables need these three kinds: their triggers' functions and what their columns are computed from
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype <> 'trigger'::regtype and p.proname not in ('words', 'place_of', 'is_id') order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
  drop table pgshelf.move_log, pgshelf.chunks, pgshelf.documents, pgshelf.libraries;
  drop function pgshelf.chunk_written(), pgshelf.documents_deleted();
  drop function pgshelf.words(text, text), pgshelf.place_of(uuid, uuid, int), pgshelf.is_id(text);
  -- what somebody else put into the schema would keep it from being dropped, when all of ours is gone already
  select string_agg(pg_describe_object(d.classid, d.objid, d.objsubid), ', ') into v_name from pg_depend d
    where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'pgshelf'::regnamespace and d.deptype = 'n'
    and not (d.classid = 'pg_class'::regclass
      and d.objid in ('pgshelf.installation'::regclass, 'pgshelf.alembic_version'::regclass));
  if v_name is not null then
    raise dependent_objects_still_exist using
      message = 'the schema pgshelf holds what pgshelf has not made', detail = v_name;
  end if;
end $$;
"""


def upgrade() -> None:
    for part in (STUBS, COMPUTED, LIBRARIES, DOCUMENTS, CHUNKS, COMMENTS):
        run(part)


def downgrade() -> None:
    run(DOWN)
