-- How far the index of a library is, and how well it finds: what the REST interface and analysts read.

-- The index of one library. Nothing is counted: rows are null on shelf 0. A view calls functions with the rights of whoever
-- reads it, hence security definer.
-- Progress is 1 when searches use what is wanted; while work goes on: 0.2 for copying, then the keys, 0.3 to 0.9 for the vector index.
create or replace function pgshelf.library_index(p_library uuid)
  returns table (wanted jsonb, actual jsonb, state text, progress float8, phase text, error text, shelf int, moving boolean,
    bytes bigint, rows bigint, valid boolean)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library::text, 'monitor');
  v_index oid := to_regclass(format('pgshelf.chunks_s%s_v%s', v_library.shelf, v_library.index_actual ->> 'serial'));
begin
  select p.progress, p.phase into progress, phase from pgshelf.index_progress(v_library) p;
  return query select v_library.index, v_library.index_actual, v_library.index_state, library_index.progress, library_index.phase,
    v_library.index_error, v_library.shelf, v_library.moving <> 0, coalesce(pg_relation_size(v_index), 0),
    case when v_library.shelf <> 0 then pgshelf.shelf_rows(v_library.shelf) end,
    (select i.indisvalid from pg_index i where i.indexrelid = v_index);
end $$;

-- What the worker is doing for a library, read off the catalogs and PostgreSQL's own progress reports.
create or replace function pgshelf.index_progress(p_library pgshelf.libraries, out progress float8, out phase text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := coalesce(p_library.moving_to, p_library.shelf);
  v_table oid := to_regclass('pgshelf.chunks_s' || v_shelf);
  v_build pg_stat_progress_create_index;
  v_vector boolean;
begin
  if p_library.index_state in ('ready', 'waiting') and p_library.moving = 0 then
    progress := 1;
    return;
  end if;
  select * into v_build from pg_stat_progress_create_index p where p.relid = v_table and p.datid =
    (select d.oid from pg_database d where d.datname = current_database());
  if v_build.pid is not null and v_shelf <> 0 then
    v_vector := exists (select 1 from pg_class c where c.oid = v_build.index_relid and c.relname ~ '^chunks_s\d+_v');
    phase := v_build.phase;
    progress := case when not v_vector then 0.25 when v_build.phase not like 'building%' and v_build.tuples_done + v_build.blocks_done = 0
        then 0.3
      when v_build.phase not like 'building%' then 0.9
      else 0.3 + 0.6 * coalesce(greatest(v_build.tuples_done::float8 / nullif(v_build.tuples_total, 0),
        v_build.blocks_done::float8 / nullif(v_build.blocks_total, 0)), 0) end;
  elsif p_library.moving = 2 then
    progress := 0.95;
    phase := 'catching up';
  elsif p_library.moving = 1 then
    phase := 'copying';
    progress := case when v_shelf = 0 or v_table is null then 0.1 else least(0.2, 0.2 * pgshelf.shelf_rows(v_shelf)
      / nullif(case p_library.shelf when 0 then null else pgshelf.shelf_rows(p_library.shelf) end, 0)) end;
    progress := coalesce(progress, 0.1);
  else
    progress := 0;
    phase := case p_library.index_state when 'failed' then 'waiting to try again' else 'queued' end;
  end if;
end $$;

create or replace view pgshelf.index_status with (security_barrier) as
  select l.name as library, i.wanted, i.actual, i.state, i.progress, i.phase, i.bytes, i.rows, i.valid, i.error, i.shelf, i.moving,
    l.id as library_id
  from pgshelf.libraries l cross join lateral pgshelf.library_index(l.id) i
  where l.deleted_at is null and pgshelf.granted(l.id, 'monitor');

-- How well the index of a library finds, measured now: searches for vectors of the library itself, drawn at random, with the index
-- and exactly. recall is the share of the true k nearest that the index found (an equal distance counts), found_self the share of
-- vectors that found themselves, or a copy: links lost after a vacuum show here. It costs as many exact searches.
create or replace function pgshelf.index_recall(library text, samples int default 50, k int default 10,
  out recall float8, out found_self float8, out sampled int)
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(index_recall.library);
  v_vector @vector@.vector;
  v_found float8[];
  v_true float8[];
  v_recall float8 := 0;
  v_self int := 0;
begin
  if (samples between 1 and 10000 and index_recall.k between 1 and 1000) is not true then
    raise 'samples must be from 1 to 10000 and k from 1 to 1000' using errcode = 'PS030';
  end if;
  sampled := 0;
  for v_vector in execute format('select c.embedding from pgshelf.chunks_s%s c where c.library_id = $1 and c.embedding is not null
      order by random() limit $2', v_library.shelf) using v_library.id, samples loop
    select array_agg(s.distance order by s.distance) into v_found
      from pgshelf.search(v_library.id::text, v_vector, index_recall.k, include => '{}') s;
    select array_agg(s.distance order by s.distance) into v_true
      from pgshelf.search(v_library.id::text, v_vector, index_recall.k, include => '{}', exact => true) s;
    v_recall := v_recall + (select count(*) from unnest(v_found) d where d <= v_true[cardinality(v_true)])::float8 / cardinality(v_true);
    v_self := v_self + (v_found[1] <= v_true[1])::int;
    sampled := sampled + 1;
  end loop;
  recall := v_recall / nullif(sampled, 0);
  found_self := v_self::float8 / nullif(sampled, 0);
end $$;

-- A probe of an index that costs little: p_samples vectors of the library, from a random id on, look for themselves (or a copy) with the
-- index; as many of them as fit into p_rows rows looked at are compared with exact searches. recall, of the first 10, is null where none was.
create or replace function pgshelf.probe_index(p_library uuid, p_samples int, p_rows bigint,
  out sampled int, out found_self int, out compared int, out recall float8)
  volatile language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library::text);
  v_exact int := p_rows / greatest(pgshelf.shelf_rows(v_library.shelf), 1);
  v_sample record;
  v_found float8[];
  v_true float8[];
begin
  sampled := 0;
  found_self := 0;
  compared := 0;
  for v_sample in execute format('select c.embedding as vector, c.embedding %s c.embedding as distance from pgshelf.chunks_s%s c
      where c.id >= $1 and c.library_id = $2 and c.embedding is not null order by c.id limit $3',
      pgshelf.distance_operator(v_library.metric), v_library.shelf) using gen_random_uuid(), v_library.id, p_samples loop
    select array_agg(s.distance order by s.distance) into v_found from pgshelf.search(v_library.id::text, v_sample.vector, include => '{}') s;
    sampled := sampled + 1;
    found_self := found_self + coalesce(v_found[1] <= v_sample.distance, false)::int;
    if compared < v_exact then
      select array_agg(s.distance order by s.distance) into v_true
        from pgshelf.search(v_library.id::text, v_sample.vector, include => '{}', exact => true) s;
      recall := coalesce(recall, 0) + (select count(*) from unnest(v_found) d where d <= v_true[cardinality(v_true)])::float8 / cardinality(v_true);
      compared := compared + 1;
    end if;
  end loop;
  recall := recall / nullif(compared, 0);
end $$;
