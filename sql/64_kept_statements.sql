-- Statements that are kept: to write, parse and plan one takes longer than most searches. A function is made for each of the common ones, those
-- without special wishes, whose body is the statement; PostgreSQL keeps the plans of functions in each session. It is named after all that
-- the statement depends on, so it can only be the right one or be missing, and then the statement is written and planned as it comes; after a
-- new version of sql/ all are made anew (85_replaced.sql).

-- The kinds that are kept of a library: `vector`, `text` and `hybrid`, a search of that mode where nothing but k, offset and include is said, and
-- of pgshelf.search with a filter that leaves few chunks `documents` and `chunks`, see pgshelf.apart. For small libraries on shelf 0 there are
-- none, for there are many of them; nor with vectors and no filter where there is no index, for there the search itself takes long, nor
-- where it is one of axes, whose plan depends on the vector.
create or replace function pgshelf.kept_kinds(p_library pgshelf.libraries) returns text[]
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case when p_library.shelf = 0 then '{}'
    when p_library.index_actual ->> 'type' in ('hnsw', 'ivfflat', 'lsh') then '{vector,text,hybrid,documents,chunks}'
    else '{text,documents,chunks}' end::text[]
$$;

-- The statement of a kind.
create or replace function pgshelf.kept_statement(p_library pgshelf.libraries, p_kind text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_kind in ('documents', 'chunks') then
    return pgshelf.search_statement(p_library, 'vector', p_exact => true, p_kept => false, p_apart => p_kind);
  end if;
  return pgshelf.search_statement(p_library, p_kind, p_kept => false, p_reach => pgshelf.reach(p_kind, 10, false, 1));
end $$;

-- The name of its function: whatever of a library is in the statement is in here. How many codes lsh ranks again follows its size.
create or replace function pgshelf.kept_name(p_library pgshelf.libraries, p_kind text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return format('kept_s%s_%s', p_library.shelf, md5(concat_ws(' ', p_kind, p_library.id, p_library.metric, p_library.language,
    case when p_kind in ('vector', 'hybrid') then concat_ws(' ', p_library.dimension, p_library.index_actual, case p_library.index_actual ->> 'type'
      when 'lsh' then pgshelf.index_reach(p_library.index_actual, null, pgshelf.known_rows(p_library.shelf)) end) end)));
end $$;

-- Makes the functions of a library, and drops those that its shelf has no use for. A plan for any k takes it that a tenth of all rows is wanted,
-- and might rather sort them than go by the index: without sorting it goes by the index, whatever it believes.
create or replace function pgshelf.keep_statements(p_library uuid) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_kind text;
  v_names text[] := '{}';
  v_name text;
begin
  -- a new version of sql/ waits for this, for it shall find and drop what the one before it wrote; while it comes nothing is made
  if not pg_try_advisory_xact_lock_shared(x'6b657074'::int, 0) then
    return;
  end if;
  perform pg_advisory_xact_lock(x'6b657074'::int, hashtext(p_library::text));
  select l.* into v_library from pgshelf.libraries l where l.id = p_library and l.shelf <> 0 and l.deleted_at is null;
  if not found then
    return;
  end if;
  foreach v_kind in array pgshelf.kept_kinds(v_library) loop
    v_name := pgshelf.kept_name(v_library, v_kind);
    v_names := v_names || v_name;
    continue when to_regproc('pgshelf.' || v_name) is not null;
    execute format($sql$create function pgshelf.%1$I(@vector_ident@.vector, jsonb, int, text, float8, float8, text[], int, int, int, float8[], int, float8, uuid)
      returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
        metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector_ident@.vector, highlight text)
      stable language plpgsql set enable_sort = off as %2$L$sql$, v_name,
      -- everybody may read what is in a function, so the id of its library is not
      format(E'#variable_conflict use_column\nbegin return query %s; end',
        replace(pgshelf.kept_statement(v_library, v_kind), quote_literal(v_library.id), '$14')));
    execute format('revoke all on function pgshelf.%I from public', v_name);
  end loop;
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and starts_with(p.proname, format('kept_s%s_', v_library.shelf)) and p.proname <> all (v_names) loop
    execute 'drop function ' || v_name;
  end loop;
end $$;

-- Drops the functions of shelves that are gone.
create or replace function pgshelf.forget_kept() returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text;
begin
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace and p.proname ~ '^kept_s\d+_'
    and to_regclass('pgshelf.chunks_' || split_part(p.proname, '_', 2)) is null loop
    execute 'drop function ' || v_name;
  end loop;
end $$;

-- How the statement of a kind is run in this session: by its function; null where there is none. A session keeps the plans of the first 32 that it
-- runs, for each takes 0.3 to 1 MB as long as the session lasts.
create or replace function pgshelf.planned(p_library pgshelf.libraries, p_kind text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text := pgshelf.kept_name(p_library, p_kind);
  v_mine text := coalesce(current_setting('pgshelf.kept', true), '');
begin
  if to_regproc('pgshelf.' || v_name) is null then
    return null;
  elsif strpos(v_mine, v_name) = 0 then
    if length(v_mine) > 32 * length(v_name) then
      return null;
    end if;
    perform set_config('pgshelf.kept', v_mine || ' ' || v_name, false);
  end if;
  return format('select * from pgshelf.%I($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, %L)', v_name, p_library.id);
end $$;

-- Runs a search statement with its values, or that of a kind.
create or replace function pgshelf.found(
  p_library pgshelf.libraries, p_kind text, p_statement text, p_embedding @vector@.vector, p_filter jsonb, p_reach int, p_query text, p_max_distance float8,
  p_min_score float8, p_include text[], p_k int, p_offset int, p_fusion_k int, p_weights float8[], p_group_size int, p_lambda float8)
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector, highlight text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_statement text := p_statement;
  v_planned text;
begin
  if p_kind is not null then
    v_planned := pgshelf.planned(p_library, p_kind);
  end if;
  if v_planned is not null then
    begin
      return query execute v_planned using p_embedding, p_filter, p_reach, p_query, p_max_distance, p_min_score, p_include, p_k, p_offset,
        p_fusion_k, p_weights, p_group_size, p_lambda;
      return;
    exception when undefined_function or internal_error then
      null; -- it was dropped a moment ago
    end;
  end if;
  if p_kind is not null then
    v_statement := pgshelf.kept_statement(p_library, p_kind);
  end if;
  return query execute v_statement using p_embedding, p_filter, p_reach, p_query, p_max_distance, p_min_score, p_include, p_k, p_offset,
    p_fusion_k, p_weights, p_group_size, p_lambda;
end $$;
