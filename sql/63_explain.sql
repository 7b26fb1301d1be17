-- What a search does: its statement, its plan, and how it compares with the truth.

-- All nodes of a plan of EXPLAIN (format json), from the root down.
create or replace function pgshelf.plan_nodes(p_plan jsonb) returns setof jsonb
  immutable parallel safe language sql
as $$
  with recursive nodes as (
    select p_plan as node
    union all
    select c.value from nodes n cross join lateral jsonb_array_elements(coalesce(n.node -> 'Plans', '[]')) c)
  select n.node from nodes n
$$;

-- Which way a search by vector went: exact, index, or index then exact (the scan did not come up with enough); words for a search by text.
create or replace function pgshelf.strategy_of(p_plan jsonb) returns text
  immutable parallel safe language sql
as $$
  with ran as (
    select n ->> 'Subplan Name' as name, (n ->> 'Actual Loops')::float8 > 0 as yes, n from pgshelf.plan_nodes(p_plan) n where n ? 'Subplan Name'),
  looked as (
    -- a gate that stays shut still counts as run; what lies below it tells
    select r.name, bool_or((x ->> 'Actual Loops')::float8 > 0) as yes from ran r cross join lateral pgshelf.plan_nodes(r.n) x
    where x ->> 'Node Type' ~ 'Scan$' and x ->> 'Node Type' <> 'CTE Scan' and x ->> 'Relation Name' ~ '^chunks_s' group by r.name)
  select case
    when not exists (select 1 from ran where name in ('CTE near', 'CTE nearest')) then 'words'
    when not exists (select 1 from ran where name = 'CTE nearest') then 'exact'
    when (select l.yes from looked l where l.name = 'CTE nearest') and (select l.yes from looked l where l.name = 'CTE exact') then 'index then exact'
    when (select l.yes from looked l where l.name = 'CTE nearest') then 'index'
    else 'exact' end
$$;

-- Runs a search and says how: {strategy, statement, plan, rows_removed, recall}. recall is the share of the true nearest k that this very search
-- finds; null for a search by words, which is exact always. Give query, embedding or both, as for search_text, search and search_hybrid.
create or replace function pgshelf.explain_search(
  library text, embedding @vector@.vector default null, query text default null, k int default 10, "offset" int default 0,
  filter jsonb default null, exact boolean default false, ef_search int default null) returns jsonb
  volatile security definer language plpgsql
  set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan set hnsw.iterative_scan = relaxed_order set hnsw.ef_search = 40
  set hnsw.max_scan_tuples = 20000 set ivfflat.iterative_scan = relaxed_order set ivfflat.probes = 1 set ivfflat.max_probes = 32768
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(explain_search.library);
  v_mode text := case when explain_search.embedding is null then 'text' when explain_search.query is null then 'vector' else 'hybrid' end;
  v_reach int := pgshelf.reach(v_mode, explain_search.k + explain_search.offset, false, 1);
  v_statement text;
  v_plan jsonb;
  v_recall float8;
begin
  perform pgshelf.check_search(explain_search.k, explain_search.offset, null, 1, null, null, explain_search.ef_search);
  if explain_search.embedding is null and explain_search.query is null then
    raise 'embedding and query are null; a search needs one of them' using errcode = 'PS030';
  elsif explain_search.embedding is not null then
    perform pgshelf.check_vector(explain_search.embedding, v_library.dimension, v_library.metric, 'of the query');
  end if;
  -- as of this moment: another one may see values that attributes do not keep exactly, and would have to compile the filter again
  v_statement := pgshelf.search_statement(v_library, v_mode, explain_search.filter, explain_search.exact, explain_search.ef_search,
    p_reach => v_reach, p_kept => false, p_query => explain_search.query,
    p_required => pgshelf.required_words(v_library.language, explain_search.query));
  execute 'explain (analyze, format json) ' || v_statement into v_plan
    using explain_search.embedding, explain_search.filter, v_reach, explain_search.query, null::float8, null::float8, '{text}'::text[],
      explain_search.k, explain_search.offset, 60, '{1,1}'::float8[], 1, null::float8;
  if v_mode = 'vector' then
    -- ties at the end of the list are no misses: what counts is how far away the hits are
    select count(h.distance) filter (where h.distance <= t.farthest + 1e-9)::float8 / nullif(max(t.hits), 0) into v_recall
      from (select max(x.distance) as farthest, count(*) as hits from pgshelf.search(explain_search.library, explain_search.embedding,
        explain_search.k, explain_search.offset, filter => explain_search.filter, exact => true, include => '{}') x) t
      left join pgshelf.search(explain_search.library, explain_search.embedding, explain_search.k, explain_search.offset,
        filter => explain_search.filter, exact => explain_search.exact, ef_search => explain_search.ef_search, include => '{}') h on true;
  end if;
  return jsonb_build_object('strategy', pgshelf.strategy_of(v_plan -> 0 -> 'Plan'), 'statement', v_statement, 'plan', v_plan -> 0,
    'rows_removed', (select coalesce(sum((n ->> 'Rows Removed by Filter')::bigint), 0) from pgshelf.plan_nodes(v_plan -> 0 -> 'Plan') n
      where n ->> 'Relation Name' ~ '^(chunks_s|documents$)'),
    'recall', v_recall);
end $$;
