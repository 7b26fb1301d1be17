-- Statements that are kept: to parse and plan a search takes about as long as a search. A function is made for each of the common ones, those
-- without special wishes, whose body is the statement; PostgreSQL keeps the plans of functions in each session. It is found by what
-- the statement says, so it can only be the right one or be missing, and then the statement is planned as it comes.

-- The name of the function for a statement on a shelf.
create or replace function pgshelf.kept_name(p_shelf int, p_statement text) returns text
  immutable parallel safe language sql
  as $$ select format('kept_s%s_%s', p_shelf, md5(p_statement)) $$;

-- The statements that are kept of a library: those of pgshelf.search, search_text and search_hybrid where nothing but k, offset and include
-- is said, and that of pgshelf.search where a filter leaves few documents. For small ones on shelf 0 there are none, for there are many of
-- them; nor with vectors and no filter where there is no index, for there the search itself takes long, nor where it is one of axes, whose
-- plan depends on the vector.
create or replace function pgshelf.kept_statements(p_library pgshelf.libraries) returns setof text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select pgshelf.search_statement(p_library, m.mode, p_kept => false, p_reach => pgshelf.reach(m.mode, 10, false, 1, null, null))
  from unnest(array['vector', 'text', 'hybrid']) m(mode)
  where p_library.shelf <> 0 and (m.mode = 'text'
    or p_library.index_actual ->> 'type' in ('hnsw', 'ivfflat', 'lsh'))
  union all
  select pgshelf.search_statement(p_library, 'vector', p_exact => true, p_kept => false, p_apart => a.kind) from unnest(array['documents', 'chunks']) a(kind)
  where p_library.shelf <> 0
$$;

-- Makes the functions of a library, and drops those that its shelf has no use for. A plan for any k takes it that a tenth of all rows is wanted,
-- and might rather sort them than go by the index: without sorting it goes by the index, whatever it believes.
create or replace function pgshelf.keep_statements(p_library uuid) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_statement text;
  v_names text[] := '{}';
  v_name text;
begin
  perform pg_advisory_xact_lock(x'6b657074'::int, hashtext(p_library::text));
  select l.* into v_library from pgshelf.libraries l where l.id = p_library and l.shelf <> 0 and l.deleted_at is null;
  if not found then
    return;
  end if;
  for v_statement in select s.* from pgshelf.kept_statements(v_library) s loop
    v_name := pgshelf.kept_name(v_library.shelf, v_statement);
    v_names := v_names || v_name;
    continue when to_regproc('pgshelf.' || v_name) is not null;
    execute format($sql$create function pgshelf.%1$I(@vector_ident@.vector, jsonb, int, text, float8, float8, text[], int, int, int, float8[], int, float8)
      returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
        metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector_ident@.vector, highlight text)
      stable language plpgsql set enable_sort = off as %2$L$sql$, v_name, E'#variable_conflict use_column\nbegin return query ' || v_statement || '; end');
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

-- How a statement is run in this session: by its function, or as it is where there is none. A session keeps the plans of the first 32 that it
-- runs, for each takes 0.3 to 1 MB as long as the session lasts.
create or replace function pgshelf.planned(p_shelf int, p_statement text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text := pgshelf.kept_name(p_shelf, p_statement);
  v_mine text := coalesce(current_setting('pgshelf.kept', true), '');
begin
  if to_regproc('pgshelf.' || v_name) is null then
    return p_statement;
  elsif strpos(v_mine, v_name) = 0 then
    if length(v_mine) > 32 * length(v_name) then
      return p_statement;
    end if;
    perform set_config('pgshelf.kept', v_mine || ' ' || v_name, false);
  end if;
  return format('select * from pgshelf.%I($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)', v_name);
end $$;

-- Runs a search statement with its values; p_common where it may be one that is kept.
create or replace function pgshelf.found(
  p_shelf int, p_statement text, p_common boolean, p_embedding @vector@.vector, p_filter jsonb, p_reach int, p_query text, p_max_distance float8,
  p_min_score float8, p_include text[], p_k int, p_offset int, p_fusion_k int, p_weights float8[], p_group_size int, p_lambda float8)
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector, highlight text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_planned text;
begin
  if p_common and p_shelf <> 0 then
    v_planned := pgshelf.planned(p_shelf, p_statement);
  end if;
  if v_planned <> p_statement then
    begin
      return query execute v_planned using p_embedding, p_filter, p_reach, p_query, p_max_distance, p_min_score, p_include, p_k, p_offset,
        p_fusion_k, p_weights, p_group_size, p_lambda;
      return;
    exception when undefined_function or internal_error then
      null; -- it was dropped a moment ago
    end;
  end if;
  return query execute p_statement using p_embedding, p_filter, p_reach, p_query, p_max_distance, p_min_score, p_include, p_k, p_offset,
    p_fusion_k, p_weights, p_group_size, p_lambda;
end $$;
