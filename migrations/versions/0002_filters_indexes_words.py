"""Filters, attributes, indexes of libraries, shelves of their own, word statistics.

Revision ID: 0002
Revises: 0001
"""

from pgshelf.migrate import run

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Stubs fail closed, as in 0001. chunk_written is one again: what the older one writes, `waiting` would never hear of.
STUBS = """
create or replace function pgshelf.chunk_written() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.chunk_waits() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.documents_inserted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create function pgshelf.documents_updated() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
do $$
declare
  v_name text;
begin
  -- sql/ makes them anew, some with more parameters: beside the older ones their calls would be ambiguous. Public
  -- functions that are called as before stay, with whatever somebody has granted on them.
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype <> 'trigger'::regtype and p.proname not in ('words', 'place_of', 'is_id', 'put_document',
      'delete_document', 'library_stats') order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
end $$;
"""

# What indexes and side tables are computed from; a change of meaning needs a migration that rebuilds them.
COMPUTED = """
-- metadata below its library's id, so that every path of the one GIN index begins with the library; made to be inlined
create function pgshelf.scoped(p_library uuid, p_metadata jsonb) returns jsonb
  immutable parallel safe language sql
  as $$ select jsonb_set('{}', array[p_library::text], p_metadata) $$;

-- ISO 8601: a date, or a date and a time; without a zone it is UTC; null for anything else
create function pgshelf.moment(p_text text) returns timestamptz
  immutable parallel safe language plpgsql
as $$
declare
  -- the usual spellings first: patterns take three times as long, and filters ask for every row
  v_text text := case translate(p_text, '012345678', '999999999')
    when '9999-99-99T99:99:99Z' then p_text when '9999-99-99' then p_text || 'T00:00Z' end;
begin
  if v_text is null then
    v_text := case
      when p_text ~ '^\\d{4}-\\d\\d-\\d\\d[T ]\\d\\d:\\d\\d(:\\d\\d(\\.\\d{1,6})?)?$' then p_text || 'Z'
      when p_text ~ '^\\d{4}-\\d\\d-\\d\\d[T ]\\d\\d:\\d\\d(:\\d\\d(\\.\\d{1,6})?)?(Z|[+-]\\d\\d(:?\\d\\d)?)$'
        then p_text end;
  end if;
  return case when pg_input_is_valid(v_text, 'timestamptz') then v_text::timestamptz end;
end $$;

-- a JSON number as float8, for indexes only: order is kept (not strictly), what float8 cannot hold becomes its limit
create function pgshelf.num(p_number jsonb) returns float8
  immutable parallel safe language sql
as $$
  select case when jsonb_typeof(p_number) <> 'number' then null
    when p_number::numeric > 1e308 then 'Infinity' when p_number::numeric < -1e308 then '-Infinity'
    when abs(p_number::numeric) < 1e-307 then 0 else p_number::float8 end
$$;
"""

LIBRARIES = """
alter table pgshelf.libraries
  add column index_actual jsonb not null default '{"type": "flat"}',
  add column index_error text,
  add column index_attempts int not null default 0,
  add column index_after timestamptz not null default now(),
  add column attributes_ready jsonb not null default '{}',
  add column attributes_filling jsonb,
  add constraint libraries_attributes_check check (jsonb_typeof(attributes) = 'object'),
  add constraint libraries_index_check check (
    index ->> 'type' in ('auto', 'flat', 'hnsw', 'ivfflat', 'lsh', 'kdtree') and index_actual ? 'type'),
  add constraint libraries_index_state_check check (index_state in ('ready', 'waiting', 'building', 'failed')),
  add constraint libraries_shelf_check check (shelf >= 0);
create sequence pgshelf.shelf_seq as int;
create sequence pgshelf.index_seq as int;

-- shelves that no library uses any more; dropped when no search can still be on its way to them
create table pgshelf.retired_shelves (
  shelf int not null,
  retired_at timestamptz not null default now(),
  constraint retired_shelves_pkey primary key (shelf)
);

-- on the shelf of a library with an lsh index: a trigger there keeps it; computed once, for a scan looks at hundreds
alter table pgshelf.chunks add column code bit varying;

-- the hyperplanes of an lsh index; its codes are computed from them, so they never change
create table pgshelf.planes (
  serial int not null,
  number int not null,
  plane @vector@.vector not null,
  constraint planes_pkey primary key (serial, number)
);
-- read for every vector that is written: beside their row, not in TOAST
alter table pgshelf.planes alter column plane set storage main;
"""

DOCUMENTS = """
create table pgshelf.attribute_values (
  library_id uuid not null,
  document_id uuid not null,
  attribute text not null,
  num float8,
  txt text collate "C",
  ts timestamptz,
  exact boolean not null default true,
  constraint attribute_values_pkey primary key (library_id, document_id, attribute)
);
create index attribute_values_num_idx on pgshelf.attribute_values (library_id, attribute, num, document_id)
  where num is not null;
create index attribute_values_txt_idx on pgshelf.attribute_values (library_id, attribute, txt, document_id)
  where txt is not null;
create index attribute_values_ts_idx on pgshelf.attribute_values (library_id, attribute, ts, document_id)
  where ts is not null;
create index attribute_values_inexact_idx on pgshelf.attribute_values (library_id, attribute, document_id)
  where not exact;

-- no pending list: it would be scanned by every search until the next vacuum
create index documents_metadata_idx on pgshelf.documents
  using gin (pgshelf.scoped(library_id, metadata) jsonb_path_ops) with (fastupdate = off);
-- ids are random, so the first hundred in this order are a random sample of a library
create index documents_sample_idx on pgshelf.documents (library_id, id);
create trigger documents_inserted after insert on pgshelf.documents
  referencing new table as fresh for each statement execute function pgshelf.documents_inserted();
create trigger documents_updated after update on pgshelf.documents
  referencing old table as gone new table as fresh for each statement execute function pgshelf.documents_updated();
"""

WORDS = """
-- how many chunks hold a word, for the frequent words of a library that has a shelf of its own
create table pgshelf.terms (
  library_id uuid not null,
  lexeme text collate "C" not null,
  chunks bigint not null,
  constraint terms_pkey primary key (library_id, lexeme)
);
create table pgshelf.word_statistics (
  library_id uuid not null,
  chunks bigint not null,
  bytes bigint not null,
  made_at timestamptz not null default now(),
  constraint word_statistics_pkey primary key (library_id)
);
"""

WAITING = """
-- libraries that may hold pending chunks: a row for each transaction that wrote some, until a claim has looked
create table pgshelf.waiting (
  library_id uuid not null,
  xid xid8 not null,
  due timestamptz not null,
  constraint waiting_pkey primary key (library_id, xid)
);
create index waiting_due_idx on pgshelf.waiting (due);
-- a claim knows its library by now, and wants the oldest chunks of that one
drop index pgshelf.chunks_pending_idx;
create index chunks_pending_idx on pgshelf.chunks (library_id, embed_after) where embedding is null;
-- "try again now", whoever says it; a claim only ever puts a chunk off
create trigger chunk_waits after update of embed_after on pgshelf.chunks
  for each row when (new.embedding is null and new.embed_after < old.embed_after)
  execute function pgshelf.chunk_waits();
-- last: the trigger has waited for everybody who was writing chunks
insert into pgshelf.waiting (library_id, xid, due)
  select c.library_id, pg_current_xact_id(), min(c.embed_after) from pgshelf.chunks c
  where c.embedding is null and c.embed_after < 'infinity' group by c.library_id;
"""

COMMENTS = """
comment on column pgshelf.libraries.index_actual is 'The index that searches use now.';
comment on column pgshelf.libraries.index_error is 'Why the last attempt to build the wanted index failed.';
comment on column pgshelf.libraries.attributes is 'Metadata fields to index: {"year": "number"}.';
comment on column pgshelf.libraries.attributes_ready is 'The attributes whose values are all in attribute_values.';
comment on column pgshelf.libraries.attributes_filling is
  'How far the worker has come with attributes that were declared; null when it is done.';
comment on column pgshelf.chunks.code is
  'On which side of each hyperplane the vector lies; null where the library has no lsh index.';
comment on table pgshelf.retired_shelves is 'Shelves that no library uses any more and that will be dropped.';
comment on table pgshelf.planes is 'Hyperplanes of lsh indexes, by the serial of the index.';
comment on table pgshelf.attribute_values is
  'Declared attributes of documents, kept by triggers, for ranges, sorting and facets.';
comment on column pgshelf.attribute_values.exact is
  'False where only the document has the whole value: another type, a long text, a number beyond float8.';
comment on table pgshelf.terms is 'How many chunks of a library hold a frequent word; made by the worker.';
comment on table pgshelf.word_statistics is
  'Chunks of a library and the bytes of their texts when its terms were counted.';
comment on table pgshelf.waiting is
  'Libraries that may hold chunks without a vector, by the transaction that wrote them.';
comment on column pgshelf.waiting.due is 'None of these chunks may be tried before.';
"""

DOWN = """
-- in the order of writers, who wait from here on; what they write meanwhile would be left on a shelf that goes
lock table pgshelf.libraries, pgshelf.documents, pgshelf.chunks in access exclusive mode;
-- a later step may have made stubs of their functions; what is only moved has passed them
alter table pgshelf.chunks_s0 disable trigger user;
do $$
declare
  v_columns constant text := 'place, library_id, document_id, ordinal, id, text, metadata, embedding, language,
    embed_attempts, embed_after, embed_error';
  v_library record;
  v_name text;
begin
  -- chunks go home to shelf 0, the only one that the older version knows; what lies there of them counts for nothing
  for v_library in select l.id, l.shelf from pgshelf.libraries l where l.shelf <> 0 loop
    delete from pgshelf.chunks_s0 c where c.library_id = v_library.id;
    -- the shelf of a deleted library may be gone already
    if to_regclass('pgshelf.chunks_s' || v_library.shelf) is not null then
      execute format('insert into pgshelf.chunks_s0 (shelf, %1$s) select 0, %1$s from pgshelf.chunks_s%2$s
        where library_id = $1', v_columns, v_library.shelf) using v_library.id;
    end if;
  end loop;
  update pgshelf.libraries l set shelf = 0, moving = 0, moving_to = null where l.shelf <> 0 or l.moving <> 0;
  delete from pgshelf.move_log;
  for v_name in select c.oid::regclass from pg_class c where c.relnamespace = 'pgshelf'::regnamespace
    and c.relkind = 'r' and c.relname ~ '^chunks_s[1-9]' loop
    execute 'drop table ' || v_name;
  end loop;
  -- everything of sql/, views before functions, all without cascade: whatever depends from outside refuses
  for v_name in select c.oid::regclass from pg_class c
    where c.relnamespace = 'pgshelf'::regnamespace and c.relkind = 'v' order by c.oid desc loop
    execute 'drop view ' || v_name;
  end loop;
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype <> 'trigger'::regtype
    and p.proname not in ('words', 'place_of', 'is_id', 'scoped', 'moment', 'num') order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
end $$;
alter table pgshelf.chunks_s0 enable trigger user;
drop trigger documents_inserted on pgshelf.documents;
drop trigger documents_updated on pgshelf.documents;
drop trigger chunk_waits on pgshelf.chunks;
do $$
declare
  v_name text;
begin
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype = 'trigger'::regtype and p.proname not in ('chunk_written', 'documents_deleted') loop
    execute 'drop function ' || v_name;
  end loop;
end $$;
create or replace function pgshelf.chunk_written() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
create or replace function pgshelf.documents_deleted() returns trigger language plpgsql as
  $$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $$;
drop index pgshelf.chunks_pending_idx;
create index chunks_pending_idx on pgshelf.chunks (embed_after, library_id) where embedding is null;
drop index pgshelf.documents_metadata_idx, pgshelf.documents_sample_idx;
drop function pgshelf.scoped(uuid, jsonb), pgshelf.moment(text), pgshelf.num(jsonb);
drop table pgshelf.waiting, pgshelf.word_statistics, pgshelf.terms, pgshelf.attribute_values, pgshelf.planes,
  pgshelf.retired_shelves;
drop sequence pgshelf.shelf_seq, pgshelf.index_seq;
comment on column pgshelf.libraries.attributes is null;
alter table pgshelf.libraries drop constraint libraries_shelf_check, drop constraint libraries_index_state_check,
  drop constraint libraries_index_check, drop constraint libraries_attributes_check,
  drop column attributes_filling, drop column attributes_ready, drop column index_after, drop column index_attempts,
  drop column index_error, drop column index_actual;
alter table pgshelf.chunks drop column code;
"""


def upgrade() -> None:
    for part in (STUBS, COMPUTED, LIBRARIES, DOCUMENTS, WORDS, WAITING, COMMENTS):
        run(part)


def downgrade() -> None:
    run(DOWN)
