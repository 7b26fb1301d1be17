-- Search: one statement a library, built here and run by everybody.

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
create or replace function pgshelf.score_expression(p_metric text) returns text
  immutable parallel safe language sql
  as $$ select case p_metric when 'cosine' then '1 - n.distance' when 'inner_product' then '-n.distance' else '1 / (1 + n.distance)' end $$;

-- The statement that searches a library exactly.
-- $1 vector, $2 k, $3 offset, $4 max_distance, $5 min_score, $6 include
create or replace function pgshelf.search_statement(p_library pgshelf.libraries) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format($sql$
with near as materialized (
  select c.id, c.document_id, c.ordinal, c.text, c.metadata, c.embedding, c.embedding %3$s $1 as distance
  from pgshelf.chunks_s%2$s c
  where c.library_id = %1$L and c.embedding is not null
  order by distance, c.id
  limit $2 + $3)
select n.id, n.document_id, d.key, n.ordinal, %4$s, n.distance,
  case when 'text' = any ($6) then n.text end,
  case when 'metadata' = any ($6) then n.metadata end,
  case when 'document' = any ($6) then d.title end,
  case when 'document' = any ($6) then d.source end,
  case when 'document' = any ($6) then d.metadata end,
  case when 'embedding' = any ($6) then n.embedding end
from near n join pgshelf.documents d on d.id = n.document_id
where ($4::float8 is null or n.distance <= $4) and ($5::float8 is null or %4$s >= $5) and (select pgshelf.on_shelf(%1$L, %2$s))
order by n.distance, n.id
limit $2 offset $3$sql$, p_library.id, p_library.shelf, pgshelf.distance_operator(p_library.metric), pgshelf.score_expression(p_library.metric))
$$;

-- The nearest chunks of a library to a vector, best first; ties in the order of the chunk ids.
create or replace function pgshelf.search(
  library text, embedding @vector@.vector, k int default 10, "offset" int default 0,
  max_distance float8 default null, min_score float8 default null, include text[] default '{text,metadata,document}')
  returns table (chunk_id uuid, document_id uuid, key text, ordinal int, score float8, distance float8, text text,
    metadata jsonb, title text, source text, document_metadata jsonb, chunk_embedding @vector@.vector)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(search.library);
begin
  -- "is not true": null is no number of hits either, and no vector
  if (search.k between 1 and 10000 and search.offset between 0 and 1000000) is not true then
    raise 'k must be from 1 to 10000 and offset from 0 to 1000000' using errcode = 'PS030';
  elsif search.embedding is null then
    raise 'embedding is null; a search needs a vector' using errcode = 'PS030';
  end if;
  perform pgshelf.check_vector(search.embedding, v_library.dimension, v_library.metric, 'of the query');
  return query execute pgshelf.search_statement(v_library)
    using search.embedding, search.k, search.offset, search.max_distance, search.min_score, search.include;
end $$;
