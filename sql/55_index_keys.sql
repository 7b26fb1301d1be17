-- What an index of a library is computed from, said once: index definitions and search statements both ask here.
-- An index is {"type", "serial", ...}: hnsw {m, ef_construction, storage}, ivfflat {lists, storage}, lsh {bits, seed}, kdtree {axes}.
-- Whatever of it comes into a statement is a number or a word of ours: the owner runs these, and others write the row.

-- The code of a vector under an lsh index: on which side of each hyperplane it lies. Immutable by promise: planes never change.
create or replace function pgshelf.lsh_code(p_vector @vector@.vector, p_serial int) returns bit varying
  immutable strict parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return (select @vector@.binary_quantize(array_agg(-(p_vector operator(@vector@.<#>) x.plane) order by x.number)::@vector@.vector)
    from pgshelf.planes x where x.serial = p_serial);
end $$;

-- Keeps the codes on the shelf of a library with an lsh index. They are stored because a scan puts every candidate's key into its result,
-- and computing hundreds of them takes longer than the scan.
create or replace function pgshelf.code_written() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  new.code := pgshelf.lsh_code(new.embedding, tg_argv[0]::int);
  return new;
end $$;

-- The expression of the point of a vector in the plane of two orthonormal axes, [[...], [...]]; distances there are never larger than
-- those of the vectors themselves. Written out, it costs a tenth of a function that looks the axes up. In double precision: in
-- pgvector's single precision two near points far from the origin would fall apart.
create or replace function pgshelf.kd_point(p_axes jsonb, p_vector text) returns text
  immutable parallel safe language sql
as $$
  select format('pg_catalog.point(%s)', string_agg(x.sum, ', ' order by x.axis)) from (
    select a.axis, string_agg(format('(%s::real[])[%s] * (%s)::float8', p_vector, n.place, n.number::float8), ' + ' order by n.place) as sum
    from jsonb_array_elements(p_axes) with ordinality a(numbers, axis), jsonb_array_elements_text(a.numbers) with ordinality n(number, place)
    group by a.axis) x
$$;

-- The expression that an index stores for a vector: the column (embedding, perhaps behind an alias), or the parameter of a query; null for flat.
-- Cosine distance does not depend on length, so halfvec takes vectors of length 1: nothing overflows or vanishes.
create or replace function pgshelf.index_key(p_index jsonb, p_metric text, p_dimension int, p_vector text) returns text
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_index ->> 'type' = 'lsh' then format('(%s::bit(%s))', case when starts_with(p_vector, '$')
      then format('pgshelf.lsh_code(%s, %s)', p_vector, (p_index ->> 'serial')::int) else replace(p_vector, 'embedding', 'code') end, (p_index ->> 'bits')::int)
    when p_index ->> 'type' = 'kdtree' then pgshelf.kd_point(p_index -> 'axes', p_vector)
    when p_index ->> 'storage' = 'bit' then format('(@vector_ident@.binary_quantize(%s)::bit(%s))', p_vector, p_dimension)
    when p_index ->> 'storage' = 'vector' then format('(%s::@vector_ident@.vector(%s))', p_vector, p_dimension)
    when p_index ->> 'storage' = 'halfvec' and p_metric = 'cosine'
      then format('(@vector_ident@.l2_normalize(%s)::@vector_ident@.halfvec(%s))', p_vector, p_dimension)
    when p_index ->> 'storage' = 'halfvec' then format('(%s::@vector_ident@.halfvec(%s))', p_vector, p_dimension) end;
end $$;

-- The operator that an index orders by.
create or replace function pgshelf.index_operator(p_index jsonb, p_metric text) returns text
  immutable parallel safe language sql
as $$
  select case when p_index ->> 'type' = 'kdtree' then 'operator(pg_catalog.<->)'
    when p_index ->> 'type' = 'lsh' or p_index ->> 'storage' = 'bit' then 'operator(@vector_ident@.<~>)'
    else 'operator(@vector_ident@.' || case p_metric
      when 'cosine' then '<=>' when 'l2' then '<->' when 'inner_product' then '<#>' when 'l1' then '<+>' end || ')' end
$$;

-- The definition of an index but for its name and table: "using hnsw (...) with (...)".
create or replace function pgshelf.index_definition(p_index jsonb, p_metric text, p_dimension int) returns text
  immutable parallel safe language sql
as $$
  select format('using %s (%s %s)%s',
    case p_index ->> 'type' when 'hnsw' then 'hnsw' when 'lsh' then 'hnsw' when 'ivfflat' then 'ivfflat' when 'kdtree' then 'spgist' end,
    pgshelf.index_key(p_index, p_metric, p_dimension, 'embedding'),
    case when p_index ->> 'type' = 'kdtree' then 'pg_catalog.kd_point_ops'
      when p_index ->> 'type' = 'lsh' or p_index ->> 'storage' = 'bit' then '@vector_ident@.bit_hamming_ops'
      else '@vector_ident@.' || case p_index ->> 'storage' when 'halfvec' then 'halfvec_' when 'vector' then 'vector_' end || case p_metric
        when 'cosine' then 'cosine' when 'l2' then 'l2' when 'inner_product' then 'ip' when 'l1' then 'l1' end || '_ops' end,
    case when p_index ->> 'type' = 'ivfflat' then format(' with (lists = %s)', (p_index ->> 'lists')::int)
      when p_index ->> 'type' in ('hnsw', 'lsh') then
        format(' with (m = %s, ef_construction = %s)', coalesce((p_index ->> 'm')::int, 16), coalesce((p_index ->> 'ef_construction')::int, 64))
      else '' end)
$$;
