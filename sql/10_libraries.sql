-- Finding a library, and the lock order that every writer of chunks follows.

-- The library of a name or an id, if the caller was granted it; PS001 alike when it was not and when there is none. Everything that
-- people may call about a library begins here.
create or replace function pgshelf.library_named(p_library text, p_access text default 'read') returns pgshelf.libraries
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries;
begin
  if pgshelf.is_id(p_library) then
    select * into v_library from pgshelf.libraries l where l.id = p_library::uuid and l.deleted_at is null;
  else
    select * into v_library from pgshelf.libraries l where l.name = p_library and l.deleted_at is null;
  end if;
  -- asked in either case: what there is not takes as long
  if not pgshelf.granted(v_library.id, p_access) or v_library.id is null then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  return v_library;
end $$;

-- Every writer of chunks begins here, but for the worker's claim. The order is always: advisory lock of the library (shared), row of the library
-- (for key share), row of the document. A promotion takes the first two exclusively and so fences all writers out.
create or replace function pgshelf.lock_library(p_library uuid) returns pgshelf.libraries
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries;
begin
  -- the advisory space is the database's: class "lib" keeps ours apart from the application's
  perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(p_library::text));
  select * into v_library from pgshelf.libraries l where l.id = p_library and l.deleted_at is null for key share;
  if not found then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  perform pgshelf.check_writable(v_library);
  return v_library;
end $$;

-- Every writer of chunks ends here, while it still holds the documents: a library that is moving hears of them.
create or replace function pgshelf.documents_written(p_library pgshelf.libraries, p_documents uuid[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_library.moving = 1 then
    insert into pgshelf.move_log (library_id, document_id) select p_library.id, unnest(p_documents);
  elsif p_library.moving = 2 then
    -- the update makes a deleter with an older snapshot fail instead of leaving what it cannot see behind
    update pgshelf.documents d set updated_at = d.updated_at where d.id = any (p_documents);
    execute format('delete from pgshelf.chunks_s%s where library_id = $1 and document_id = any ($2)', p_library.moving_to)
      using p_library.id, p_documents;
    execute pgshelf.copying(p_library, 'library_id = $1 and document_id = any ($2)') using p_library.id, p_documents;
  end if;
end $$;

-- Hides a library at once. A shelf of its own is dropped whole afterwards, so no chunk of it need be deleted. Its documents are
-- reaped by the worker, unless somebody's table references documents: then they go in this very transaction, so that a
-- reference refuses (23503) exactly as it does for a single document.
create or replace function pgshelf.delete_library(p_library text) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid := (pgshelf.library_named(p_library)).id;
begin
  perform pgshelf.lock_library(v_id);
  insert into pgshelf.retired_shelves (shelf) select x.shelf from pgshelf.libraries l
    cross join lateral (values (l.shelf), (l.moving_to)) x(shelf) where l.id = v_id and x.shelf <> 0;
  update pgshelf.libraries l set shelf = 0, moving = 0, moving_to = null, moving_change = null, index_actual = '{"type": "flat"}' where l.id = v_id;
  update pgshelf.embedder_changes c set phase = 'over' where c.library_id = v_id and c.phase <> 'over';
  if exists (select 1 from pg_constraint c where c.contype = 'f' and c.confrelid = 'pgshelf.documents'::regclass) then
    delete from pgshelf.documents d where d.library_id = v_id;
  end if;
  update pgshelf.libraries l set deleted_at = now(), version = l.version + 1 where l.id = v_id and l.deleted_at is null;
end $$;

-- Takes away at most p_limit documents of deleted libraries, and the libraries that are empty then; tells how many rows
-- went. A library that a table of the application's has come to reference stays, and keeps no other from going.
create or replace function pgshelf.reap_deleted(p_limit int default 500) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library uuid;
  v_rows int;
  v_gone int := 0;
begin
  for v_library in select l.id from pgshelf.libraries l where l.deleted_at <= now() order by l.deleted_at, l.id loop
    begin
      perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(v_library::text));
      perform 1 from pgshelf.libraries l where l.id = v_library for key share;
      delete from pgshelf.documents d where d.id in (
        select x.id from pgshelf.documents x where x.library_id = v_library limit p_limit - v_gone for update skip locked);
      get diagnostics v_rows = row_count;
      v_gone := v_gone + v_rows;
      delete from pgshelf.change_log c where (c.library_id, c.id) in (
        select x.library_id, x.id from pgshelf.change_log x where x.library_id = v_library limit p_limit - v_gone for update skip locked);
      get diagnostics v_rows = row_count;
      v_gone := v_gone + v_rows;
      delete from pgshelf.libraries l where l.id in (
        select x.id from pgshelf.libraries x where x.id = v_library
          and not exists (select 1 from pgshelf.documents d where d.library_id = x.id)
          and not exists (select 1 from pgshelf.change_log c where c.library_id = x.id) for update skip locked);
      get diagnostics v_rows = row_count;
      v_gone := v_gone + v_rows;
      if v_rows > 0 then
        delete from pgshelf.terms t where t.library_id = v_library;
        delete from pgshelf.word_statistics w where w.library_id = v_library;
        delete from pgshelf.move_log m where m.library_id = v_library;
        delete from pgshelf.events e where e.library_id = v_library;
        delete from pgshelf.library_marks m where m.library_id = v_library;
      end if;
    exception when foreign_key_violation then
      -- tried again later: the reference may be gone by then
      update pgshelf.libraries l set deleted_at = now() + interval '1 minute' where l.id = v_library;
    end;
    exit when v_gone >= p_limit;
  end loop;
  return v_gone;
end $$;

-- RFC 7396: null takes a member away, objects merge, anything else replaces.
create or replace function pgshelf.merge_patch(p_target jsonb, p_patch jsonb) returns jsonb
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_result jsonb := case jsonb_typeof(p_target) when 'object' then p_target else '{}' end;
  v_key text;
  v_value jsonb;
begin
  if jsonb_typeof(p_patch) is distinct from 'object' then
    return p_patch;
  end if;
  for v_key, v_value in select * from jsonb_each(p_patch) loop
    if jsonb_typeof(v_value) = 'null' then
      v_result := v_result - v_key;
    else
      v_result := jsonb_set(v_result, array[v_key], pgshelf.merge_patch(v_result -> v_key, v_value));
    end if;
  end loop;
  return v_result;
end $$;
