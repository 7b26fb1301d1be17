-- From candidates to hits: fusion, diversity, grouping, and the one statement that does all of it.

-- Reciprocal rank fusion of `near` and `worded`, or the weighted sum of their scores brought to 0..1: a CTE `fused`. What words require,
-- and how far away a hit may be, holds for both sides: a chunk without a vector is not too far. p_any: the words are not known when this is written.
-- Sources: Cormack, Clarke, Büttcher, "Reciprocal rank fusion outperforms Condorcet ..." (SIGIR 2009), k = 60 as there.
create or replace function pgshelf.fusion(p_library pgshelf.libraries, p_method text, p_any boolean) returns text
  immutable parallel safe language sql
as $$
  select format($sql$
    v as (select n.*, %1$s as score, row_number() over (order by n.distance, n.id) as rank from near n
      where ($5::float8 is null or n.distance <= $5)%6$s),
    w as (select x.*, row_number() over (order by x.score desc, x.id) as rank from worded x
      where $5::float8 is null or coalesce((select c.embedding %5$s $1 from pgshelf.chunks_s%3$s c
        where c.library_id = %4$L and c.document_id = x.document_id and c.ordinal = x.ordinal) <= $5, true)),
    fused as materialized (select id, coalesce(v.document_id, w.document_id) as document_id, coalesce(v.ordinal, w.ordinal) as ordinal,
        v.distance, %2$s as score from v full join w using (id))$sql$,
    pgshelf.score_expression(p_library.metric),
    case when p_method = 'rrf' then 'coalesce($11[1] / ($10 + v.rank), 0) + coalesce($11[2] / ($10 + w.rank), 0)'
      else 'coalesce($11[1] * (v.score - (select min(score) from v)) / nullif((select max(score) - min(score) from v), 0), case when v.id is null then 0 else $11[1] end)
        + coalesce($11[2] * w.score / nullif((select max(score) from w), 0), 0)' end,
    p_library.shelf, p_library.id, pgshelf.distance_operator(p_library.metric),
    case when p_any then format(' and ((select q.required from w_typed q) is null or exists (select from pgshelf.chunks_s%s c
        where c.library_id = %L and c.document_id = n.document_id and c.ordinal = n.ordinal and c.tsv @@ (select q.required from w_typed q)))',
      p_library.shelf, p_library.id) end)
$$;

-- Maximal marginal relevance (Carbonell, Goldstein, SIGIR 1998): picks p_count of some candidates one after the other, each time the one with the
-- best p_lambda * relevance - (1 - p_lambda) * similarity to the nearest already picked. Similarity is that of directions, -1 to 1;
-- relevance is brought to 0..1, so that one lambda means the same in every mode. A candidate without a vector is similar to none.
create or replace function pgshelf.diverse(p_vectors @vector@.vector[], p_relevance float8[], p_lambda float8, p_count int) returns int[]
  immutable strict parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_low float8 := (select min(x) from unnest(p_relevance) x);
  v_range float8 := nullif((select max(x) from unnest(p_relevance) x) - v_low, 0);
  v_nearest float8[] := array_fill(-1::float8, array[cardinality(p_relevance)]);
  v_picked int[] := '{}';
  v_next int;
begin
  for v_turn in 1 .. least(p_count, cardinality(p_relevance)) loop
    select x.place into v_next
      from unnest(p_relevance, v_nearest) with ordinality x(relevance, nearest, place)
      where x.place <> all (v_picked)
      order by p_lambda * coalesce((x.relevance - v_low) / v_range, 1) - (1 - p_lambda) * x.nearest desc, x.place limit 1;
    v_picked := v_picked || v_next;
    select array_agg(greatest(n.nearest, coalesce(nullif(1 - (x.vector operator(@vector@.<=>) p_vectors[v_next]), 'NaN'), -1)) order by x.place) into v_nearest
      from unnest(v_nearest) with ordinality n(nearest, place)
      join (select p_vectors[i] as vector, i as place from generate_subscripts(p_relevance, 1) i) x on x.place = n.place;
  end loop;
  return v_picked;
end $$;

-- The CTE `diverse`: some of the best p_pool of `ranked`, those that are good enough, in the order of maximal marginal relevance.
create or replace function pgshelf.diversity(p_table text, p_library uuid, p_pool int) returns text
  immutable parallel safe language sql
as $$
  select format($sql$
    pool as materialized (select r.*, c.embedding from ranked r join %1$s c on c.library_id = %2$L and c.document_id = r.document_id and c.ordinal = r.ordinal
      where r.rank <= %3$s and ($6::float8 is null or r.score >= $6)),
    diverse as (select p.id, p.document_id, p.ordinal, p.distance, p.score, x.rank from
      unnest((select pgshelf.diverse(array_agg(p.embedding order by p.rank), array_agg(p.score order by p.rank), $13, $8 + $9) from pool p))
        with ordinality x(place, rank)
      join (select p.*, row_number() over (order by p.rank) as place from pool p) p on p.place = x.place)$sql$, p_table, p_library, p_pool)
$$;

-- The CTE `hits`: what is left of a ranking after min_score, offset and k. Grouped, the documents come in the order of their best
-- chunk, each with its best few, and k and offset count documents.
create or replace function pgshelf.selection(p_from text, p_grouped boolean) returns text
  immutable parallel safe language sql
as $$
  select case when p_grouped then format($sql$
      members as (select r.*, row_number() over (partition by r.document_id order by r.rank) as nth, min(r.rank) over (partition by r.document_id) as lead
        from %s r where $6::float8 is null or r.score >= $6),
      grouped as (select m.*, dense_rank() over (order by m.lead) as place from members m where m.nth <= $12),
      hits as materialized (select g.* from grouped g where g.place > $9 and g.place <= $8 + $9)$sql$, p_from)
    else format('hits as materialized (select r.*, 0 as lead, 0 as nth from %s r where $6::float8 is null or r.score >= $6 order by r.rank limit $8 offset $9)', p_from) end
$$;

-- The same for documents by vector: their best few are looked for among all chunks of each, not only among the candidates, of which those of
-- another document may be all.
create or replace function pgshelf.selection_by_document(p_library pgshelf.libraries, p_chunks text) returns text
  immutable parallel safe language sql
as $$
  select format($sql$
      led as (select r.document_id, min(r.rank) as lead from ranked r where $6::float8 is null or r.score >= $6
        group by r.document_id order by lead limit $8 offset $9),
      hits as materialized (select m.*, g.lead, m.nth as rank from led g cross join lateral (
        select n.*, %1$s as score, row_number() over (order by n.distance, n.id) as nth from (
          select c.id, c.document_id, c.ordinal, c.embedding %2$s $1 as distance from pgshelf.chunks_s%3$s c %4$s
          where c.library_id = %5$L and c.document_id = g.document_id and c.embedding is not null and %6$s offset 0) n
        where $5::float8 is null or n.distance <= $5 order by n.distance, n.id limit $12) m
        where $6::float8 is null or m.score >= $6)$sql$,
    pgshelf.score_expression(p_library.metric), pgshelf.distance_operator(p_library.metric), p_library.shelf,
    case when p_chunks ~ '\md\.' then 'join pgshelf.documents d on d.id = c.document_id' else '' end, p_library.id, p_chunks)
$$;

-- The candidates of a mode: CTEs, the last one `near` by vector, `worded` by words, `fused` by both. Of a vector search the way is chosen
-- for p_reach candidates. p_condition: what compile_filter makes of p_filter, if that is known already; p_apart and p_way as in vector_candidates;
-- p_required: what the words of this very query require, which leads the vector side to such chunks; p_kept: the statement shall do for others.
create or replace function pgshelf.candidates(
  p_library pgshelf.libraries, p_mode text, p_filter jsonb, p_exact boolean, p_ef int, p_fusion text, p_reach int,
  p_query text default null, p_condition record default null, p_apart text default null, p_way record default null,
  p_required tsquery default null, p_kept boolean default false) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_condition record := p_condition;
  v_holding record;
  v_holds text;
  v_near text;
begin
  if v_condition is null then
    v_condition := pgshelf.compile_filter(p_library, p_filter);
  end if;
  if p_required is null then
    v_near := case when p_mode <> 'text' then pgshelf.vector_candidates(p_library, v_condition, p_filter, p_exact, p_ef, p_reach, p_apart, p_way) end;
  else
    v_holds := format('c.tsv @@ %L::tsquery', p_required);
    v_holding := v_condition;
    v_holding.chunks := pgshelf.conjunction(array[nullif(v_condition.chunks, 'true'), v_holds]);
    if p_library.shelf <> 0 and querytree(p_required) not in ('', 'T') then
      v_holding.chunks_indexed := pgshelf.conjunction(array[nullif(v_condition.chunks_indexed, 'true'), v_holds]);
    end if;
    v_near := pgshelf.vector_candidates(p_library, v_holding, p_filter, p_exact, p_ef, p_reach, null, null);
  end if;
  if p_mode = 'vector' then
    return v_near;
  end if;
  return concat_ws(', ', v_near, pgshelf.word_candidates(p_library, v_condition.documents, v_condition.chunks, v_condition.indexed,
      v_condition.chunks_indexed, p_query),
    case p_mode when 'hybrid' then pgshelf.fusion(p_library, p_fusion, p_kept) end);
end $$;

-- The CTE `ranked`: the candidates of a mode in their order, with score and distance.
create or replace function pgshelf.ranking(p_mode text, p_metric text) returns text
  immutable parallel safe language sql
as $$
  select case p_mode
    when 'vector' then format('ranked as (select n.*, %s as score, row_number() over (order by n.distance, n.id) as rank from near n
      where $5::float8 is null or n.distance <= $5)', pgshelf.score_expression(p_metric))
    when 'text' then 'ranked as (select x.*, null::float8 as distance, row_number() over (order by x.score desc, x.id) as rank from worded x)'
    else 'ranked as (select f.*, row_number() over (order by f.score desc, f.distance nulls last, f.id) as rank from fused f)' end
$$;

-- The statement that searches a library: mode is vector, text or hybrid, p_ef overrides ef_search (probes for ivfflat). p_filter gives the
-- shape, and with p_reach the way that is gone. It may be kept and run again, with other values too: p_kept makes it look whether the library
-- is still where it was; p_query says for about how many words it shall be fast. Who runs it in the snapshot in which it was made need not look.
-- p_condition, p_apart, p_way and p_required as in candidates; p_pool: how many diverse ones are chosen from.
create or replace function pgshelf.search_statement(
  p_library pgshelf.libraries, p_mode text, p_filter jsonb default null, p_exact boolean default false, p_ef int default null,
  p_fusion text default 'rrf', p_grouped boolean default false, p_diverse boolean default false, p_reach int default 10,
  p_kept boolean default true, p_query text default null, p_condition record default null, p_apart text default null,
  p_way record default null, p_pool int default null, p_required tsquery default null) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_plain boolean := p_mode = 'vector' and not p_grouped and not p_diverse;
  v_condition record := p_condition;
  v_parts text;
  v_score text;
begin
  if v_condition is null then
    v_condition := pgshelf.compile_filter(p_library, p_filter);
  end if;
  if p_kept then
    v_condition.decided := null;
  end if;
  v_parts := pgshelf.candidates(p_library, p_mode, p_filter, p_exact, p_ef, p_fusion, p_reach, p_query, v_condition, p_apart, p_way, p_required, p_kept);
  if v_plain then
    -- the common case, kept short: what PostgreSQL need not plan it does not spend time on
    v_score := pgshelf.score_expression(p_library.metric);
    v_parts := format('%1$s, hits as materialized (select n.*, %2$s as score from near n
      where ($5::float8 is null or n.distance <= $5) and ($6::float8 is null or %2$s >= $6) order by n.distance, n.id limit $8 offset $9)',
      v_parts, v_score);
  else
    v_parts := concat_ws(', ', v_parts, pgshelf.ranking(p_mode, p_library.metric),
      case when p_diverse then pgshelf.diversity(v_table, p_library.id, coalesce(p_pool, p_reach)) end,
      case when p_grouped and p_mode = 'vector' then pgshelf.selection_by_document(p_library, v_condition.chunks)
        else pgshelf.selection(case when p_diverse then 'diverse' else 'ranked' end, p_grouped) end);
  end if;
  -- hits come first and are few; offset says so, and spares the planner the search for another order
  return format($sql$with %1$s
select h.id, h.document_id, d.key, h.ordinal, h.score, h.distance,
  case when 'text' = any ($7) then c.text end,
  case when 'metadata' = any ($7) then c.metadata end,
  case when 'document' = any ($7) then d.title end,
  case when 'document' = any ($7) then d.source end,
  case when 'document' = any ($7) then d.metadata end,
  case when 'embedding' = any ($7) then c.embedding end,
  %2$s
from hits h
cross join lateral (select c.text, c.metadata, c.embedding from %3$s c
  where c.library_id = %4$L and c.document_id = h.document_id and c.ordinal = h.ordinal offset 0) c
cross join lateral (select d.key, d.title, d.source, d.metadata from pgshelf.documents d where d.id = h.document_id offset 0) d
%5$s
order by %6$s$sql$,
    v_parts,
    case when p_mode = 'vector' then 'null::text'
      else format('case when ''highlight'' = any ($7) then
        pgshelf.highlight(%L, c.text, (select q.scored from w_typed q), (select q.required from w_typed q)) end', p_library.language) end, v_table, p_library.id,
    case when p_kept then format('where (select pgshelf.on_shelf(%L, %s))', p_library.id, p_library.shelf) else '' end,
    case when v_plain then 'h.distance, h.id' else 'h.lead, h.nth, h.rank' end);
end $$;

-- What every search is asked for must be; the messages name the parameters as they are called.
create or replace function pgshelf.check_search(
  p_k int, p_offset int, p_group_by text, p_group_size int, p_lambda float8, p_candidates int, p_ef int, p_include text[] default '{}') returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_k between 1 and 10000 and p_offset between 0 and 1000000 and p_group_size between 1 and 100
    and num_nonnulls(p_group_by, p_lambda, p_candidates, p_ef) = 0 and p_include <@ '{text,metadata,document,embedding,highlight}' then
    return; -- the common case, said once: each condition takes a while
  end if;
  -- "is not true": null is no number of hits either
  if (p_k between 1 and 10000 and p_offset between 0 and 1000000) is not true then
    raise 'k must be from 1 to 10000 and offset from 0 to 1000000' using errcode = 'PS030';
  elsif p_group_by is distinct from null and p_group_by <> 'document' then
    raise 'group_by is %, it can only be document', quote_literal(p_group_by) using errcode = 'PS030';
  elsif (p_group_size between 1 and 100) is not true then
    raise 'group_size must be from 1 to 100' using errcode = 'PS030';
  elsif p_lambda not between 0 and 1 then
    raise 'mmr_lambda must be from 0 (diverse) to 1 (relevant)' using errcode = 'PS030';
  elsif p_lambda is not null and p_group_by is not null then
    raise 'mmr and group_by cannot be combined' using errcode = 'PS030', hint = 'Groups are diverse already: one document each.';
  elsif p_candidates not between 1 and 10000 then
    raise 'candidates must be from 1 to 10000' using errcode = 'PS030';
  elsif p_ef not between 1 and 1000 then
    raise 'ef_search must be from 1 to 1000' using errcode = 'PS030';
  elsif (p_include <@ '{text,metadata,document,embedding,highlight}') is not true then
    raise 'include may hold text, metadata, document, embedding and highlight' using errcode = 'PS030';
  end if;
end $$;

-- How many a ranking is made of that changes with their number, for so many hits: in steps, so that pages of one search agree with each other as
-- long as they are within a step. (Fifty of each side of a hybrid search give the nDCG@10 of two hundred on Cranfield, 36.9.)
create or replace function pgshelf.depth(p_wanted int) returns int
  immutable parallel safe language sql
as $$
  select case when p_wanted <= 50 then 50 when p_wanted <= 250 then 250 when p_wanted <= 1250 then 1250 when p_wanted <= 6250 then 6250
    when p_wanted <= 31250 then 31250 else 1250000 end
$$;

-- Of how many candidates the diverse hits are chosen.
create or replace function pgshelf.pool(p_wanted int, p_lambda float8, p_candidates int) returns int
  immutable parallel safe language sql
  as $$ select case when p_lambda is not null then greatest(p_wanted, coalesce(p_candidates, pgshelf.depth(5 * p_wanted))) end $$;

-- How many candidates a search ranks; p_pool: of how many diverse hits are chosen, of a hybrid search if that was said, for else the same are
-- ranked as without; p_candidates: how many are wanted of each side of a hybrid search.
create or replace function pgshelf.reach(
  p_mode text, p_wanted int, p_grouped boolean, p_group_size int, p_pool int default null, p_candidates int default null) returns int
  immutable parallel safe language sql
as $$
  select case
    when p_mode = 'hybrid' then greatest(p_wanted, p_pool, coalesce(p_candidates, pgshelf.depth(greatest(p_wanted, p_pool)) * case when p_grouped then 4 else 1 end))
    when p_pool is not null then p_pool
    when p_grouped then 4 * p_wanted * case p_mode when 'vector' then 1 else p_group_size end
    else p_wanted end
$$;

-- Ranks ever more candidates until they belong to as many documents as are wanted, or there are no more. Until each of those has p_group_size, too,
-- but for that no more than sixteen times as many as at first: one that has fewer never would.
create or replace function pgshelf.grouped_reach(
  p_library pgshelf.libraries, p_candidates text, p_mode text, p_reach int, p_wanted int, p_embedding @vector@.vector, p_filter jsonb, p_query text,
  p_max_distance float8, p_min_score float8, p_fusion_k int, p_weights float8[], p_group_size int) returns int
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_reach int := p_reach;
  v_found record;
begin
  loop
    execute format('with %s, %s select sum(x.members) as ranked, count(*) as documents, min(x.members) filter (where x.place <= $8) as fewest
      from (select count(*) as members, row_number() over (order by min(r.rank)) as place from ranked r group by r.document_id) x',
      p_candidates, pgshelf.ranking(p_mode, p_library.metric))
      into v_found using p_embedding, p_filter, v_reach, p_query, p_max_distance, p_min_score, '{}'::text[], p_wanted, 0, p_fusion_k, p_weights;
    exit when v_found.documents >= p_wanted and (v_found.fewest >= p_group_size or v_reach >= 16 * p_reach)
      or coalesce(v_found.ranked, 0) < v_reach or v_reach >= 1000000;
    v_reach := v_reach * 4;
  end loop;
  return v_reach;
end $$;

-- The nearest chunks of a library to a vector, best first; ties in the order of the chunk ids. What the settings of index scans are
-- changed to inside ends with the function, because it sets them itself.
create or replace function pgshelf.search(
  library text, embedding @vector@.vector, k int default 10, "offset" int default 0, max_distance float8 default null, min_score float8 default null,
  include text[] default '{text,metadata,document}', filter jsonb default null, exact boolean default false, ef_search int default null,
  group_by text default null, group_size int default 1, mmr_lambda float8 default null, mmr_candidates int default null)
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector, highlight text)
  stable security definer language plpgsql
  set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan set hnsw.iterative_scan = relaxed_order set hnsw.ef_search = 40
  set hnsw.max_scan_tuples = 20000 set ivfflat.iterative_scan = relaxed_order set ivfflat.probes = 1 set ivfflat.max_probes = 32768
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(search.library);
  v_reach int;
  v_pool int := pgshelf.pool(search.k + search.offset, search.mmr_lambda, search.mmr_candidates);
  v_common boolean := v_library.shelf <> 0 and search.exact is not true and search.ef_search is null and search.group_by is null
    and search.mmr_lambda is null;
  v_condition record;
  v_way record;
  v_apart record;
  v_kind text;
  v_part text;
  v_statement text;
begin
  perform pgshelf.check_search(search.k, search.offset, search.group_by, search.group_size, search.mmr_lambda, search.mmr_candidates, search.ef_search,
    search.include);
  if search.embedding is null then
    raise 'embedding is null; a search needs a vector' using errcode = 'PS030';
  end if;
  perform pgshelf.check_vector(search.embedding, v_library.dimension, v_library.metric, 'of the query');
  v_reach := pgshelf.reach('vector', search.k + search.offset, search.group_by is not null, search.group_size, v_pool);
  if v_common and search.filter is null then
    v_kind := 'vector';
  else
    v_condition := pgshelf.compile_filter(v_library, search.filter);
    v_way := pgshelf.way(v_library, v_condition, search.filter, search.exact, v_reach);
    if v_common and v_way.exactly and (v_condition.documents <> 'true' or v_condition.chunks <> 'true') then
      v_apart := pgshelf.apart(v_library, v_condition);
      v_kind := v_apart.kind;
      v_part := v_apart.statement;
    end if;
  end if;
  if v_kind is null then
    v_statement := pgshelf.search_statement(v_library, 'vector', search.filter, search.exact, search.ef_search, 'rrf',
      search.group_by is not null, search.mmr_lambda is not null, v_reach, false, p_condition => v_condition, p_way => v_way, p_pool => v_pool);
  end if;
  if search.group_by is not null then
    v_reach := pgshelf.grouped_reach(v_library, pgshelf.candidates(v_library, 'vector', search.filter, search.exact, search.ef_search, 'rrf', v_reach,
      p_condition => v_condition, p_way => v_way), 'vector', v_reach, search.k + search.offset, search.embedding, search.filter, null, search.max_distance, search.min_score, 60, '{1,1}', 1);
  end if;
  return query select f.* from pgshelf.found(v_library, v_kind, v_statement, search.embedding,
    search.filter, v_reach, v_part, search.max_distance, search.min_score,
    search.include, search.k, search.offset, 60, '{1,1}'::float8[], search.group_size, search.mmr_lambda) f;
end $$;

-- The chunks of a library that hold words of a query, best first by BM25.
create or replace function pgshelf.search_text(
  library text, query text, k int default 10, "offset" int default 0, min_score float8 default null,
  include text[] default '{text,metadata,document}', filter jsonb default null,
  group_by text default null, group_size int default 1, mmr_lambda float8 default null, mmr_candidates int default null)
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector, highlight text)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(search_text.library);
  v_statement text;
  v_condition record;
  v_reach int;
  v_pool int := pgshelf.pool(search_text.k + search_text.offset, search_text.mmr_lambda, search_text.mmr_candidates);
  v_kind text := case when v_library.shelf <> 0 and search_text.filter is null and search_text.group_by is null and search_text.mmr_lambda is null then 'text' end;
begin
  perform pgshelf.check_search(search_text.k, search_text.offset, search_text.group_by, search_text.group_size, search_text.mmr_lambda,
    search_text.mmr_candidates, null, search_text.include);
  if search_text.query is null then
    raise 'query is null; a search by words needs a text' using errcode = 'PS030';
  end if;
  v_reach := pgshelf.reach('text', search_text.k + search_text.offset, search_text.group_by is not null, search_text.group_size, v_pool);
  if v_kind is null then
    v_condition := pgshelf.compile_filter(v_library, search_text.filter);
    v_statement := pgshelf.search_statement(v_library, 'text', search_text.filter, false, null, 'rrf', search_text.group_by is not null,
      search_text.mmr_lambda is not null, v_reach, false, search_text.query, v_condition, p_pool => v_pool);
  end if;
  if search_text.group_by is not null then
    v_reach := pgshelf.grouped_reach(v_library, pgshelf.candidates(v_library, 'text', search_text.filter, false, null, 'rrf', v_reach,
      search_text.query, v_condition), 'text',
      v_reach, search_text.k + search_text.offset, null, search_text.filter, search_text.query, null, search_text.min_score, 60, '{1,1}', search_text.group_size);
  end if;
  return query select f.* from pgshelf.found(v_library, v_kind, v_statement, null::@vector@.vector, search_text.filter, v_reach,
    search_text.query, null::float8, search_text.min_score, search_text.include, search_text.k, search_text.offset, 60, '{1,1}'::float8[],
    search_text.group_size, search_text.mmr_lambda) f;
end $$;

-- Both at once, in one statement and one snapshot: the nearest chunks and those that hold the words, fused.
create or replace function pgshelf.search_hybrid(
  library text, query text, embedding @vector@.vector, k int default 10, "offset" int default 0, max_distance float8 default null,
  min_score float8 default null, include text[] default '{text,metadata,document}', filter jsonb default null, exact boolean default false,
  ef_search int default null, fusion text default 'rrf', fusion_k int default 60, weights float8[] default '{1,1}', candidates int default null,
  group_by text default null, group_size int default 1, mmr_lambda float8 default null, mmr_candidates int default null)
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector, highlight text)
  stable security definer language plpgsql
  set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan set hnsw.iterative_scan = relaxed_order set hnsw.ef_search = 40
  set hnsw.max_scan_tuples = 20000 set ivfflat.iterative_scan = relaxed_order set ivfflat.probes = 1 set ivfflat.max_probes = 32768
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(search_hybrid.library);
  v_statement text;
  v_reach int;
  v_pool int := pgshelf.pool(search_hybrid.k + search_hybrid.offset, search_hybrid.mmr_lambda, search_hybrid.mmr_candidates);
  v_required tsquery := pgshelf.required_words(v_library.language, search_hybrid.query);
  v_condition record;
  v_kind text := case when v_library.shelf <> 0 and search_hybrid.filter is null and search_hybrid.exact is not true and search_hybrid.ef_search is null
    and search_hybrid.fusion = 'rrf' and search_hybrid.group_by is null and search_hybrid.mmr_lambda is null and v_required is null then 'hybrid' end;
begin
  perform pgshelf.check_search(search_hybrid.k, search_hybrid.offset, search_hybrid.group_by, search_hybrid.group_size, search_hybrid.mmr_lambda,
    search_hybrid.mmr_candidates, search_hybrid.ef_search, search_hybrid.include);
  if search_hybrid.candidates not between 1 and 10000 then
    raise 'candidates must be from 1 to 10000' using errcode = 'PS030';
  end if;
  perform pgshelf.check_fusion(search_hybrid.fusion, search_hybrid.fusion_k, search_hybrid.weights);
  if search_hybrid.query is null or search_hybrid.embedding is null then
    raise 'query or embedding is null; a hybrid search needs both' using errcode = 'PS030',
      hint = 'Use search for a vector alone and search_text for words alone.';
  end if;
  perform pgshelf.check_vector(search_hybrid.embedding, v_library.dimension, v_library.metric, 'of the query');
  v_reach := pgshelf.reach('hybrid', search_hybrid.k + search_hybrid.offset, search_hybrid.group_by is not null, search_hybrid.group_size,
    case when search_hybrid.mmr_lambda is not null then search_hybrid.mmr_candidates end, search_hybrid.candidates);
  if v_kind is null then
    v_condition := pgshelf.compile_filter(v_library, search_hybrid.filter);
    v_statement := pgshelf.search_statement(v_library, 'hybrid', search_hybrid.filter, search_hybrid.exact, search_hybrid.ef_search, search_hybrid.fusion,
      search_hybrid.group_by is not null, search_hybrid.mmr_lambda is not null, v_reach, false, search_hybrid.query, v_condition,
      p_pool => v_pool, p_required => v_required);
  end if;
  if search_hybrid.group_by is not null then
    v_reach := pgshelf.grouped_reach(v_library, pgshelf.candidates(v_library, 'hybrid', search_hybrid.filter, search_hybrid.exact,
      search_hybrid.ef_search, search_hybrid.fusion, v_reach, search_hybrid.query, v_condition, p_required => v_required), 'hybrid', v_reach,
      search_hybrid.k + search_hybrid.offset, search_hybrid.embedding,
      search_hybrid.filter, search_hybrid.query, search_hybrid.max_distance, search_hybrid.min_score, search_hybrid.fusion_k, search_hybrid.weights,
      search_hybrid.group_size);
  end if;
  return query select f.* from pgshelf.found(v_library, v_kind, v_statement, search_hybrid.embedding, search_hybrid.filter, v_reach,
    search_hybrid.query, search_hybrid.max_distance, search_hybrid.min_score, search_hybrid.include, search_hybrid.k, search_hybrid.offset,
    search_hybrid.fusion_k, search_hybrid.weights, search_hybrid.group_size, search_hybrid.mmr_lambda) f;
end $$;

-- What fusion may be.
create or replace function pgshelf.check_fusion(p_method text, p_k int, p_weights float8[]) returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_method not in ('rrf', 'weighted') or p_method is null then
    raise 'fusion must be rrf or weighted' using errcode = 'PS030';
  elsif (p_k between 1 and 10000) is not true then
    raise 'fusion_k must be from 1 to 10000' using errcode = 'PS030';
  elsif (cardinality(p_weights) = 2 and p_weights[1] between 0 and 1e6 and p_weights[2] between 0 and 1e6 and p_weights[1] + p_weights[2] > 0) is not true then
    raise 'weights must be two numbers, not negative and not both zero: of the vector side and of the words' using errcode = 'PS030';
  end if;
end $$;

-- How many chunks a search could find: those that match the filter and, given a query, hold its words; without one, that have a vector.
create or replace function pgshelf.total_hits(library text, filter jsonb default null, query text default null) returns bigint
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(total_hits.library);
  v_condition record := pgshelf.compile_filter(v_library, total_hits.filter);
  v_words record;
  v_total bigint;
begin
  if total_hits.query is null then
    execute format('select count(*) %s', pgshelf.matching(v_library, v_condition)) into v_total using null::int, total_hits.filter;
    return v_total;
  end if;
  v_words := pgshelf.words_query(v_library.language, total_hits.query);
  execute format('select count(*) from pgshelf.chunks_s%s c join pgshelf.documents d on d.id = c.document_id
    where c.library_id = %L and c.tsv @@ $3 and ($4 is null or c.tsv @@ $4) and %s and %s',
    v_library.shelf, v_library.id, v_condition.documents, v_condition.chunks)
    into v_total using null::int, total_hits.filter, v_words.scored, v_words.required;
  return v_total;
end $$;

-- What "like" means: the vector of a chunk, or the mean of a document's chunks, and where it is, so that it can be left out.
create or replace function pgshelf.vector_of(p_library text, p_chunk uuid, p_document text, out vector @vector@.vector, out document_id uuid, out ordinal int)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
  v_chunk pgshelf.chunks;
begin
  if p_chunk is not null then
    v_chunk := pgshelf.chunk_named(v_library, p_chunk);
    vector := v_chunk.embedding;
    document_id := v_chunk.document_id;
    ordinal := v_chunk.ordinal;
  else
    document_id := pgshelf.document_named(v_library.id, p_document);
    execute format('select @vector_ident@.avg(c.embedding) from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id = $2', v_library.shelf)
      into vector using v_library.id, document_id;
  end if;
  if vector is null then
    raise 'it has no vector yet' using errcode = 'PS015', hint = 'Wait until it is embedded, then search again.';
  end if;
end $$;
