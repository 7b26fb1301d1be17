-- The search statement: built here for a library, a mode and the shape of a filter, and run by everybody.
-- Parameters: $1 vector, $2 filter, $3 reach (how many candidates are ranked), $4 query text, $5 max_distance, $6 min_score, $7 include,
-- $8 k, $9 offset, $10 fusion k, $11 fusion weights, $12 group size, $13 lambda of MMR. Values are bound, names of ours are literals.

-- Loads pgvector, so that the settings that functions below carry are its own and known to be ours to set.
do $$ begin perform @vector@.vector_norm('[1]'::@vector@.vector); end $$;

-- False never comes back: a statement made for another shelf raises "ask again", in the snapshot it runs in.
create or replace function pgshelf.on_shelf(p_library uuid, p_shelf int) returns boolean
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select 1 from pgshelf.libraries l where l.id = p_library and l.shelf = p_shelf and l.deleted_at is null) then
    raise 'the library has moved' using errcode = 'PS040', hint = 'Ask pgshelf.search_statement again.';
  end if;
  return true;
end $$;

-- pgvector's operator of a metric, qualified: the extension may live in any schema.
create or replace function pgshelf.distance_operator(p_metric text) returns text
  immutable parallel safe language sql
  as $$ select 'operator(@vector_ident@.' || case p_metric
    when 'cosine' then '<=>' when 'l2' then '<->' when 'inner_product' then '<#>' when 'l1' then '<+>' end || ')' $$;

-- The score of a distance, always better when higher.
create or replace function pgshelf.score_expression(p_metric text, p_distance text default 'n.distance') returns text
  immutable parallel safe language sql
  as $$ select format(case p_metric when 'cosine' then '1 - %s' when 'inner_product' then '-(%s)' else '1 / (1 + %s)' end, p_distance) $$;

-- The statement that finds the documents that fulfil a filter, $2, on a shelf of its own: a column of them, or all (*).
create or replace function pgshelf.matching_documents(p_library pgshelf.libraries, p_condition record, p_column text default 'id') returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_column = 'id' and p_condition.decided is not null then
    return p_condition.decided;
  end if;
  return format('select d.%s from pgshelf.documents d where %s and %s and %s', p_column,
    -- where an index of the filter finds the documents, that of the library is not to be combined with it: it would read all of them
    case when p_condition.indexed = 'true' then format('d.library_id = %L', p_library.id) else format('(d.library_id = %L) is true', p_library.id) end,
    p_condition.indexed, p_condition.documents);
end $$;

-- What such a statement finds.
create or replace function pgshelf.documents_found(p_statement text, p_filter jsonb) returns uuid[]
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids uuid[];
begin
  execute format('select array(%s)', p_statement) into v_ids using null::int, p_filter;
  return v_ids;
end $$;

-- The chunks that such a statement finds, of pgshelf.nearest_exactly.
create or replace function pgshelf.chunks_found(p_statement text, p_embedding @vector@.vector, p_filter jsonb, p_reach int)
  returns table (id uuid, document_id uuid, ordinal int, distance float8)
  stable language plpgsql set search_path = pg_catalog, pg_temp set enable_sort = on -- a kept statement does without
as $$ begin return query execute p_statement using p_embedding, p_filter, p_reach; end $$;

-- Where the chunks that fulfil a filter are found, each looked at once: "from ... where ...", with c (and d where needed) in scope.
-- On a shelf of its own the documents lead, found by their indexes, and each asks for its chunks by primary key: a hash join
-- would read the whole shelf. On shelf 0 libraries are small, and the planner may choose.
create or replace function pgshelf.matching(p_library pgshelf.libraries, p_condition record) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_of_documents boolean := p_condition.documents <> 'true' or p_condition.chunks ~ '\md\.';
begin
  if not v_of_documents then
    return format('from %s c where c.library_id = %L and c.embedding is not null and %s and %s',
      v_table, p_library.id, p_condition.chunks_indexed, p_condition.chunks);
  elsif p_library.shelf = 0 or p_condition.documents = 'true' then
    return format('from %s c join pgshelf.documents d on d.id = c.document_id and d.library_id = %2$L
      where c.library_id = %2$L and c.embedding is not null and %3$s and %4$s and %5$s and %6$s',
      v_table, p_library.id, p_condition.indexed, p_condition.documents, p_condition.chunks_indexed, p_condition.chunks);
  elsif p_condition.chunks !~ '\md\.' then
    return format('from %s c where c.library_id = %L and c.document_id = any (array(%s)) and c.embedding is not null and %s',
      v_table, p_library.id, pgshelf.matching_documents(p_library, p_condition), p_condition.chunks);
  end if;
  return format('from (%s offset 0) d
    cross join lateral (select c.* from %s c where c.library_id = %L and c.document_id = d.id and c.embedding is not null
      and %s offset 0) c where true',
    pgshelf.matching_documents(p_library, p_condition, '*'), v_table, p_library.id, p_condition.chunks);
end $$;

-- The statement that looks at all chunks that fulfil a filter, for the nearest to $1.
create or replace function pgshelf.nearest_exactly(p_library pgshelf.libraries, p_condition record) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return format('select c.id, c.document_id, c.ordinal, c.embedding %s $1 as distance %s order by distance, c.id limit $3',
    pgshelf.distance_operator(p_library.metric), pgshelf.matching(p_library, p_condition));
end $$;

-- How many candidates an index hands over for a reach of $3, to be ranked again by their vectors: codes are coarse, and behind a filter the
-- first that come are not always the nearest (measured, 100,000 chunks, topical filters: at 10 % recall is 0.95 with as many as are wanted,
-- 0.98 with three times as many, 0.99 with five times). p_share is the share of the library that fulfils the filter.
create or replace function pgshelf.index_reach(p_index jsonb, p_share float8, p_chunks float8) returns text
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  -- of codes the more must be ranked again the more chunks there are: of 100,000 recall is 0.957, 0.969 and 0.975 with 200, 250 and 300;
  -- of 10,000 about half of that will do;
  -- a table that was never analyzed seems to have one
  v_codes float8 := coalesce(round(greatest(0.2, least(1, (nullif(p_chunks, 1) / 100000) ^ 0.25))::numeric, 2), 1);
begin
  return case when p_index ->> 'type' = 'lsh' then format('ceil(least(greatest($3::float8 * 20, 200), 1e6) * %s::float8)::int', v_codes) when p_index ->> 'storage' = 'bit' then 'least(greatest($3::float8 * 12, 150), 1e6)::int'
    when p_share is null or p_index ->> 'type' = 'kdtree' then '$3'
    else format('least($3::bigint * %s, 1000000)::int', case when p_share >= 0.3 then 2 when p_share >= 0.15 then 3 else 5 end) end;
end $$;

-- Sets what the index scan shall do, in the transaction (the functions that people call put it back), before the scan begins.
-- A scan for more than ef_search takes twice as many, and so on: pages of one search, each of which reaches further, see the same candidates.
-- Under a filter the scan goes on until it has enough (relaxed order, ranked again), but for no longer than looking at every match
-- would take: a step of it costs about twice as much. With ef_search 150 the recall of 100,000 chunks is 0.987, with 100 that of 20,000 is
-- 0.992 (0.995 with 150, which takes a sixth longer). Of an ivfflat over 100,000 chunks 1.8 square roots of its lists give a recall of 0.964,
-- 1.6 give 0.957 and 1.4 0.948; its centres are found by chance, and the next index may differ by 0.006. With fewer lists it takes more: over
-- 10,000 chunks 1.6 give 0.933.
create or replace function pgshelf.tuning(p_index jsonb, p_shelf int, p_ef int, p_share float8, p_chunks float8, p_reach text) returns text
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_index ->> 'type' in ('hnsw', 'lsh') then format(
      '(select set_config(''hnsw.iterative_scan'', ''relaxed_order'', true) is not null
      and set_config(''hnsw.ef_search'', (select least(case when %2$s <= e.ef then e.ef when %2$s <= 2 * e.ef then 2 * e.ef
        when %2$s <= 4 * e.ef then 4 * e.ef else 1000 end, 1000) from (select %1$s as ef offset 0) e)::text, true) is not null
      and set_config(''hnsw.max_scan_tuples'', %3$s::int::text, true) is not null)',
      coalesce(p_ef::text, case when p_index ->> 'type' = 'lsh' then '100' when p_share is not null then '200'
        -- asked when it runs, as pgshelf.known_rows does: the statement stays the same while the library grows
        else format('case when (select k.reltuples from pg_catalog.pg_class k where k.oid = ''pgshelf.chunks_s%s''::pg_catalog.regclass) between 2 and 30000
          then 100 else 150 end', p_shelf) end), p_reach,
      case when p_share is null then format('greatest(20000, 2 * %s)', p_reach)
        else format('least(greatest(5000, 2 * %s / %s::float8, %s), 40000)', p_reach, p_share, ceil(p_share * p_chunks)) end)
    when p_index ->> 'type' = 'ivfflat' then format(
      '(select set_config(''ivfflat.iterative_scan'', ''relaxed_order'', true) is not null
      and set_config(''ivfflat.probes'', %L, true) is not null and set_config(''ivfflat.max_probes'', %L, true) is not null)',
      least(coalesce(p_ef, ceil(1.6 * greatest(1, 949 / (p_index ->> 'lists')::float8) ^ 0.3 * sqrt((p_index ->> 'lists')::float8))::int), 32768), p_index ->> 'lists')
    else 'true' end;
end $$;

-- The candidates of a scan of the library's index, nearest first: a query that ends with "limit", behind the one-time condition p_gate.
create or replace function pgshelf.index_scan(p_library pgshelf.libraries, p_condition record, p_gate text, p_reach text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_index jsonb := p_library.index_actual;
  v_key text := pgshelf.index_key(v_index, p_library.metric, p_library.dimension, 'c.embedding');
  -- a code takes a while to be made: once, not for each candidate, as a plan would that does not know the vector
  v_target text := format(case when v_index ->> 'type' = 'lsh' or v_index ->> 'storage' = 'bit' then '(select %s)' else '%s' end,
    pgshelf.index_key(v_index, p_library.metric, p_library.dimension, '$1'));
  v_filter text := case
    when p_condition.documents = 'true' and p_condition.chunks !~ '\md\.' then p_condition.chunks
    -- one look at the document by its key for each candidate; offset keeps it from becoming a join
    else format('exists (select 1 from pgshelf.documents d where d.id = c.document_id and %s and %s offset 0)',
      p_condition.documents, p_condition.chunks) end;
  v_from text := format('select c.id, c.document_id, c.ordinal, c.embedding %s $1 as distance from pgshelf.chunks_s%s c where %s and c.embedding is not null and %s',
    -- the index holds no others, but the planner may think of a way without it
    pgshelf.distance_operator(p_library.metric), p_library.shelf, p_gate, v_filter);
begin
  if v_index ->> 'type' = 'kdtree' then
    -- distances in the plane of the axes are lower bounds: whatever is nearer than the reach-th of the first few lies in this box. The more
    -- the plane leaves out, the more must be tried first for a small box: in 3 and 4 dimensions 160 and 400 instead of 40 made a search 3 times
    -- faster (100,000 chunks, k = 10).
    return format($sql$
      select b.* from (select point(k.x - k.r, k.y - k.r) as low, point(k.x + k.r, k.y + k.r) as high from (
          select (%2$s)[0] as x, (%2$s)[1] as y, coalesce((select f.distance * 1.0001 + 1e-6 from (%1$s order by %3$s operator(pg_catalog.<->) %2$s limit 4 * $3 + %5$s) f
            order by f.distance offset $3 - 1 limit 1), 'Infinity') as r where %4$s offset 0) k offset 0) x
      cross join lateral (%1$s and %3$s operator(pg_catalog.<@) box(x.low, x.high) offset 0) b order by b.distance, b.id limit $3 $sql$,
      v_from, v_target, v_key, p_gate, greatest(0, 200 * (p_library.dimension - 2)));
  end if;
  return format('%s order by %s %s %s limit %s', v_from, v_key, pgshelf.index_operator(v_index, p_library.metric), v_target, p_reach);
end $$;

-- How many rows a shelf had when it was last analyzed; 1 if it never was.
create or replace function pgshelf.known_rows(p_shelf int) returns float8
  stable language sql set search_path = pg_catalog, pg_temp
as $$ select greatest(c.reltuples, 1) from pg_class c where c.oid = to_regclass('pgshelf.chunks_s' || p_shelf) $$;

-- Which way to go: exactly, by looking at all chunks that match, or by the index. share: of the library that matches, where it was looked for;
-- chunks: how many it has, about, where that matters.
create or replace function pgshelf.way(
  p_library pgshelf.libraries, p_condition record, p_filter jsonb, p_exact boolean, p_reach int, out exactly boolean, out share float8, out chunks float8)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_type text := p_library.index_actual ->> 'type';
  v_few float8;
  v_found record;
begin
  exactly := p_exact is true or v_type = 'flat';
  if exactly then
    return;
  elsif p_condition.documents = 'true' and p_condition.chunks = 'true' then
    chunks := case v_type when 'lsh' then pgshelf.known_rows(p_library.shelf) end;
    return;
  end if;
  chunks := pgshelf.known_rows(p_library.shelf);
  v_few := pgshelf.few(chunks, p_reach);
  v_found := pgshelf.share_found(p_library, p_condition, p_filter, v_few);
  share := v_found.share;
  exactly := sqrt(v_found.looked * share) <= v_few;
end $$;

-- The chunks nearest to $1 that fulfil the filter: CTEs, the last one `near` (id, document_id, ordinal, distance), at most $3 rows.
-- Which way to go is decided before anything is planned, here unless p_way says it: planning one that is not gone takes as long as many a search. Where the
-- filter leaves few chunks, all of them are looked at. Else the index is scanned, and should it not come up with enough, all are looked
-- at after all: no row is ever lost, whatever the filter's values are when the statement runs. pgshelf.strategy says which way it was, until
-- the end of the transaction: asking costs a microsecond, and no plan need be read. p_apart: the filter stays out of what is written here
-- and is in the statement $4, see pgshelf.apart, so that this is the same for all filters and may be kept: 'documents' looks at all chunks of the
-- documents that $4 finds, 'chunks' takes what it finds.
create or replace function pgshelf.vector_candidates(
  p_library pgshelf.libraries, p_condition record, p_filter jsonb, p_exact boolean, p_ef int, p_reach int, p_apart text, p_way record) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_index jsonb := p_library.index_actual;
  v_way record := p_way;
  v_exact text := format('select c.id, c.document_id, c.ordinal, c.embedding %s $1 as distance ', pgshelf.distance_operator(p_library.metric));
  v_reach text;
begin
  if v_way is null then
    v_way := pgshelf.way(p_library, p_condition, p_filter, p_exact, p_reach);
  end if;
  if v_way.exactly then
    perform set_config('pgshelf.strategy', 'exact', true); -- not in the statement: it would keep it from running in parallel
    return format('near as materialized (%s)', case p_apart
      when 'documents' then format('%s from pgshelf.chunks_s%s c where c.library_id = %L
        and c.document_id = any ((select pgshelf.documents_found($4, $2))::uuid[]) and c.embedding is not null order by distance, c.id limit $3',
        v_exact, p_library.shelf, p_library.id)
      when 'chunks' then 'select * from pgshelf.chunks_found($4, $1, $2, $3)'
      else pgshelf.nearest_exactly(p_library, p_condition) end);
  end if;
  v_reach := pgshelf.index_reach(v_index, v_way.share, v_way.chunks);
  return format($sql$nearest as materialized (%1$s),
    enough as materialized (select x.yes from (select count(*) >= %2$s as yes from nearest) x
      where set_config('pgshelf.strategy', case when x.yes then 'index' else 'index then exact' end, true) is not null),
    exact as materialized (%3$s and not (select e.yes from enough e) order by distance, c.id limit $3),
    near as (select x.id, x.document_id, x.ordinal, x.distance from (
      select * from exact union all select * from nearest where (select e.yes from enough e)) x
      order by x.distance + 0, x.id limit $3)$sql$,
    pgshelf.index_scan(p_library, p_condition, pgshelf.tuning(v_index, p_library.shelf, p_ef, v_way.share, v_way.chunks, v_reach), v_reach), v_reach,
    v_exact || pgshelf.matching(p_library, p_condition));
end $$;

-- Which statement of a filter stands apart from the one that searches, and the statement: for a filter about documents alone the one that finds
-- them, whose chunks are then looked at by a plan that is kept, else all of the looking.
create or replace function pgshelf.apart(p_library pgshelf.libraries, p_condition record, out kind text, out statement text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('pgshelf.strategy', 'exact', true);
  if p_condition.chunks <> 'true' then
    kind := 'chunks';
    statement := pgshelf.nearest_exactly(p_library, p_condition);
  else
    kind := 'documents';
    statement := pgshelf.matching_documents(p_library, p_condition);
  end if;
end $$;

-- The share of a library that fulfils a filter, estimated from a sample of its documents, and of its chunks where the filter is about them
-- and the documents alone leave more than p_few. What is said of chunks alone is taken to be independent of the rest. looked: what an exact
-- search looks at, as a share: all chunks of those documents, a third dearer where each is asked whether it matches, unless an index of
-- chunks finds them.
create or replace function pgshelf.share_found(
  p_library pgshelf.libraries, p_condition record, p_filter jsonb, p_few float8, out looked float8, out share float8)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  share := case when p_condition.documents = 'true' then 1 else p_condition.share end;
  if share is null then
    share := (pgshelf.sampled(pgshelf.documents_sampled(p_library.id, p_condition.documents), p_filter, p_few)).share;
  end if;
  looked := share;
  if p_condition.chunks = 'true' then
    return;
  end if;
  looked := share * 1.33;
  if looked > p_few then
    share := share * (pgshelf.sampled(format('select array[count(*) filter (where %s)::float8 / greatest(count(*), 1), null]
      from (select c.* from pgshelf.chunks_s%s c order by c.id limit $3) c %s', p_condition.chunks, p_library.shelf,
      case when p_condition.chunks ~ '\md\.' then 'join pgshelf.documents d on d.id = c.document_id' else '' end), p_filter, p_few)).share;
  end if;
  if p_condition.documents = 'true' and p_condition.chunks_indexed <> 'true' then
    looked := share;
  end if;
end $$;

-- The share up to which matching chunks are looked at one by one rather than through the index. The fewer match the more steps a scan takes,
-- and each costs some ten times as much as looking at a chunk: both cost the same at about this share (measured, 100,000 chunks: 0.09),
-- and looking misses nothing.
create or replace function pgshelf.few(p_chunks float8, p_reach int) returns float8
  immutable parallel safe language sql
  as $$ select sqrt(80.0::float8 * p_reach / p_chunks) $$;

-- The same for a library as it is, ten candidates wanted; where all are looked at anyway it is a large one.
create or replace function pgshelf.few_of(p_library pgshelf.libraries) returns float8
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case when p_library.index_actual ->> 'type' = 'flat' then 0.3 else pgshelf.few(pgshelf.known_rows(p_library.shelf), 10) end
$$;
