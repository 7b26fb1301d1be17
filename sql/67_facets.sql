-- Facets and counts: how many documents have which value, how many chunks match a filter.

-- What a facet is taken from: a column of documents, or the field of metadata; SQL null where it is missing, as in filters.
create or replace function pgshelf.facet_field(p_attribute text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_field record := pgshelf.filter_field(p_attribute, array[p_attribute]);
begin
  if v_field.on_chunk then
    raise 'facets count documents; % is a field of chunks', quote_literal(p_attribute) using errcode = 'PS030',
      hint = 'Name a field of the metadata of documents, or $title, $source, $key, $created_at, $updated_at or $id.';
  end if;
  return case v_field.kind when 'json' then v_field.expression
    when 'datetime' then format('to_jsonb(to_char(%s at time zone ''UTC'', ''YYYY-MM-DD"T"HH24:MI:SS.US"Z"''))', v_field.expression)
    else format('to_jsonb(%s)', v_field.expression) end;
end $$;

-- The rows (value, n) of the values of some documents, over d; an array counts each of its elements once.
create or replace function pgshelf.facet_values(p_field text, p_source text) returns text
  immutable language sql
as $$
  select 'select x.value, 1::bigint as n from (select ' || p_field || ' as field from ' || p_source || ') f cross join lateral (
    select f.field as value where jsonb_typeof(f.field) <> ''array''
    union select e from jsonb_array_elements(case when jsonb_typeof(f.field) = ''array'' then f.field else ''[]'' end) e) x'
$$;

-- The statement that counts one attribute; $2 is the filter, $3 how many values. Without a filter a ready number or text is counted
-- in its index alone; what is not exact there is taken back and read from the documents.
create or replace function pgshelf.facet_statement(p_library pgshelf.libraries, p_attribute text, p_filter jsonb) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_field text := pgshelf.facet_field(p_attribute);
  v_column text := case p_library.attributes_ready ->> p_attribute when 'number' then 'v.num' when 'text' then 'v.txt' end;
  v_mine text := format('v.library_id = %L and v.attribute = %L', p_library.id, p_attribute);
  v_rows text;
begin
  if v_column is null or coalesce(p_filter, '{}') <> '{}' then
    v_rows := pgshelf.facet_values(v_field, 'pgshelf.documents d where ' || pgshelf.document_condition(p_library, p_filter));
  else
    v_rows := format('select to_jsonb(%1$s) as value, count(*) as n from pgshelf.attribute_values v where %2$s and %1$s is not null group by %1$s
      union all select to_jsonb(%1$s), -1 from pgshelf.attribute_values v where %2$s and not v.exact and %1$s is not null
      union all %3$s', v_column, v_mine, pgshelf.facet_values(v_field,
        'pgshelf.attribute_values v join pgshelf.documents d on d.id = v.document_id where ' || v_mine || ' and not v.exact'));
  end if;
  return format('select %L::text, r.value, sum(r.n)::bigint as documents from (%s) r where $1::int is null and $2::jsonb is not distinct from $2
    group by r.value having sum(r.n) > 0
    order by documents desc, case when jsonb_typeof(r.value) = ''number'' then r.value::numeric end nulls last,
      (r.value #>> ''{}'') collate "C", r.value limit $3', p_attribute, v_rows);
end $$;

-- How many of the documents that match a filter have which value of some attributes, most frequent first, then by value.
create or replace function pgshelf.facets(library text, attributes text[], filter jsonb default null, "limit" int default 10)
  returns table (attribute text, value jsonb, documents bigint)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(facets.library);
  v_attribute text;
begin
  if (facets.limit between 1 and 1000) is not true then
    raise 'limit must be from 1 to 1000' using errcode = 'PS030';
  elsif (cardinality(facets.attributes) between 1 and 32) is not true or array_position(facets.attributes, null) is not null then
    raise 'facets need 1 to 32 attributes' using errcode = 'PS030';
  end if;
  foreach v_attribute in array facets.attributes loop
    return query execute pgshelf.facet_statement(v_library, v_attribute, facets.filter) using null::int, facets.filter, facets.limit;
  end loop;
end $$;

-- How many documents match a filter.
create or replace function pgshelf.count_documents(library text, filter jsonb default null) returns bigint
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(library);
  v_count bigint;
begin
  execute 'select count(*) from pgshelf.documents d where $1::int is null and $2::jsonb is not distinct from $2 and '
    || pgshelf.document_condition(v_library, filter) into v_count using null::int, filter;
  return v_count;
end $$;
