-- Documents by filter: listed in an order, changed, deleted. What a filter means stands in sql/57_filters.sql.

-- How a library's documents can be ordered by a field: a column, or a declared attribute as attribute_values keeps it, whether that
-- is ready or not: numbers as float8, the first 256 characters of a text, moments. Anything else is missing.
create or replace function pgshelf.sort_key(p_library pgshelf.libraries, p_field text,
  out expression text, out stored text, out type text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_attribute text := p_library.attributes ->> p_field;
begin
  type := case when p_field in ('$title', '$source', '$key') then 'text' when p_field = '$id' then 'uuid'
    when p_field in ('$created_at', '$updated_at') then 'timestamptz'
    else case v_attribute when 'number' then 'float8' when 'text' then 'text' when 'datetime' then 'timestamptz' end end;
  if type is null then
    raise 'documents cannot be sorted by %', quote_literal(left(p_field, 200)) using errcode = 'PS030',
      hint = 'Declare it among the attributes of the library, or sort by $title, $source, $key, $created_at, $updated_at or $id.';
  elsif v_attribute is null then
    expression := 'd.' || substr(p_field, 2);
  else
    expression := case v_attribute when 'number' then 'num' when 'text' then 'txt' else 'ts' end;
    stored := case when p_library.attributes_ready ->> p_field = v_attribute then 'v.' || expression end;
    expression := format('(pgshelf.attribute_row(d.metadata, %L, %L)).%s', p_field, v_attribute, expression);
  end if;
  if type = 'text' then
    expression := format('(%s collate "C")', expression);
  end if;
end $$;

-- What stands behind a position, the array $1 of the keys and the id of the last document as text: equal in the first keys and behind
-- it in the next, or equal in all of them and with a larger id. What is missing comes last.
create or replace function pgshelf.behind(p_keys text[], p_types text[], p_descending boolean[], p_id text) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_equal text := '';
  v_any text := '';
  v_value text;
begin
  for i in 1 .. cardinality(p_keys) loop
    v_value := format('($1 ->> %s)::%s', i - 1, p_types[i]);
    v_any := v_any || format('%s%s is not null and (%s %s %s or %s is null) or ', v_equal, v_value, p_keys[i],
      case when p_descending[i] then '<' else '>' end, v_value, p_keys[i]);
    v_equal := v_equal || format('%s is not distinct from %s and ', p_keys[i], v_value);
  end loop;
  return format('($1::jsonb is null or %s%s%s > ($1 ->> %s)::uuid)', v_any, v_equal, p_id, cardinality(p_keys));
end $$;

-- The statement that orders by one ready attribute: those that have it come from its index in order, and only when they run out are
-- the others looked for. $1 position, $2 filter, $3 limit.
create or replace function pgshelf.stored_order(p_library pgshelf.libraries, p_field text, p_stored text, p_type text,
  p_descending boolean, p_condition text) returns text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format($sql$
    with have as materialized (
      select d.id, %1$s as k from pgshelf.attribute_values v join pgshelf.documents d on d.id = v.document_id
      where v.library_id = %2$L and v.attribute = %3$L and %1$s is not null and (%4$s) and %5$s
        and ($1::jsonb is null or %1$s %6$s= ($1 ->> 0)::%7$s)
      order by %1$s %8$s, v.document_id limit $3),
    lack as materialized (
      select d.id, null::%7$s as k from pgshelf.documents d
      where (%4$s) and (select count(*) from have) < $3 and ($1::jsonb is null or $1 ->> 0 is not null or d.id > ($1 ->> 1)::uuid)
        and not exists (select from pgshelf.attribute_values v
          where v.library_id = %2$L and v.document_id = d.id and v.attribute = %3$L and %1$s is not null)
      order by d.id limit $3)
    select x.id, jsonb_build_array(x.k::text, x.id::text) from (select * from have union all select * from lack) x
    where $2::jsonb is not distinct from $2 order by x.k %8$s nulls last, x.id limit $3 $sql$,
    p_stored, p_library.id, p_field, p_condition, pgshelf.behind(array[p_stored], array[p_type], array[p_descending], 'v.document_id'),
    case when p_descending then '<' else '>' end, p_type, case when p_descending then 'desc' else 'asc' end)
$$;

-- Documents that match a filter, in an order such as [{"field": "year", "order": "desc"}], ties by id, missing ones last; from behind
-- a position on, with the position of each.
create or replace function pgshelf.sorted_documents(p_library pgshelf.libraries, p_filter jsonb, p_sort jsonb, p_after jsonb, p_limit int)
  returns table (id uuid, "position" jsonb)
  stable language plpgsql set search_path = pg_catalog, pg_temp set datestyle = 'ISO, YMD' set timezone = 'UTC' set extra_float_digits = 1
as $$
declare
  v_condition text := pgshelf.document_condition(p_library, p_filter);
  v_part jsonb;
  v_key record;
  v_keys text[] := '{}';
  v_types text[] := '{}';
  v_descending boolean[] := '{}';
  v_order text := '';
  v_behind text;
begin
  if p_sort is null or p_sort = '[]' then
    p_sort := '[{"field": "$created_at"}]';
  end if;
  for v_part in select * from jsonb_array_elements(p_sort) loop
    v_key := pgshelf.sort_key(p_library, v_part ->> 'field');
    v_keys := v_keys || v_key.expression;
    v_types := v_types || v_key.type;
    v_descending := v_descending || coalesce(v_part ->> 'order' = 'desc', false);
    v_order := v_order || format('%s %s nulls last, ', v_key.expression, case when v_part ->> 'order' = 'desc' then 'desc' else 'asc' end);
  end loop;
  if p_after is not null and jsonb_array_length(p_after) <> cardinality(v_keys) + 1 then
    raise 'the position belongs to another order' using errcode = 'PS030', hint = 'Ask for the next page with the sort of the page before.';
  elsif cardinality(v_keys) = 1 and v_key.stored is not null then
    return query execute pgshelf.stored_order(p_library, p_sort #>> '{0,field}', v_key.stored, v_types[1], v_descending[1], v_condition)
      using p_after, p_filter, p_limit;
    return;
  end if;
  v_behind := pgshelf.behind(v_keys, v_types, v_descending, 'd.id');
  if v_keys[1] = 'd.created_at' and not v_descending[1] then
    v_behind := v_behind || ' and ($1::jsonb is null or d.created_at >= ($1 ->> 0)::timestamptz)';  -- where the index begins
  end if;
  return query execute format('select d.id, jsonb_build_array(%s, d.id::text) from pgshelf.documents d
    where (%s) and %s and $2::jsonb is not distinct from $2 order by %s d.id limit $3',
    array_to_string(array(select k || '::text' from unnest(v_keys) with ordinality u(k, n) order by n), ', '), v_condition, v_behind, v_order)
    using p_after, p_filter, p_limit;
end $$;

-- The ids of the documents that match, locked in the order of their ids; PS021 when there are more than may be changed. Whoever
-- wants all of them must say so.
create or replace function pgshelf.documents_to_change(p_library pgshelf.libraries, p_filter jsonb, p_max bigint, p_dry_run boolean, p_lock text)
  returns uuid[]
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_condition text;
  v_ids uuid[];
begin
  if p_filter is null or p_filter = '{}' then
    raise 'a filter is required' using errcode = 'PS030', hint = 'To mean all documents say {"$id": {"$exists": true}}.';
  elsif p_max < 0 then
    raise 'max_affected must not be negative' using errcode = 'PS030';
  end if;
  v_condition := pgshelf.document_condition(p_library, p_filter);
  execute format('select array(select d.id from pgshelf.documents d where $1::int is null and $2::jsonb is not distinct from $2 and %s
    order by d.id limit $3 %s)', v_condition, case when p_dry_run then '' else p_lock end)
    into v_ids using null::int, p_filter, p_max + 1;
  if cardinality(v_ids) > p_max then
    raise 'more than % documents match', p_max using errcode = 'PS021', hint = 'Nothing was changed. Narrow the filter, or allow more by max_affected.';
  elsif v_ids <> '{}' and not p_dry_run and strpos(v_condition, 'pgshelf.chunks_s') > 0 then
    -- whom the lock waited for may have replaced chunks: of the row that is locked PostgreSQL looks again at the newest, of others it does not
    execute format('select array(select d.id from pgshelf.documents d where $1::int is null and d.id = any ($3) and %s order by d.id)', v_condition)
      into v_ids using null::int, p_filter, v_ids;
  end if;
  return v_ids;
end $$;

-- Changes the metadata of the documents that match, by a merge patch (RFC 7396); tells how many. Chunks are not touched.
create or replace function pgshelf.update_documents(
  library text, filter jsonb, patch jsonb, max_affected bigint default null, dry_run boolean default false) returns bigint
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library((pgshelf.library_named(library)).id);
  v_ids uuid[];
begin
  if jsonb_typeof(patch) is distinct from 'object' then
    raise 'a patch is an object' using errcode = 'PS030', hint = 'As in {"reviewed": true, "draft": null}; null takes a key away.';
  end if;
  v_ids := pgshelf.documents_to_change(v_library, filter, max_affected, coalesce(dry_run, false), 'for no key update');
  if dry_run is not true then
    update pgshelf.documents d set metadata = pgshelf.merge_patch(d.metadata, patch), version = d.version + 1, updated_at = now()
      where d.id = any (v_ids);
  end if;
  return cardinality(v_ids);
end $$;

-- Deletes the documents that match, with their chunks; tells how many.
create or replace function pgshelf.delete_documents(
  library text, filter jsonb, max_affected bigint default null, dry_run boolean default false) returns bigint
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library((pgshelf.library_named(library)).id);
  v_ids uuid[] := pgshelf.documents_to_change(v_library, filter, max_affected, coalesce(dry_run, false), 'for update');
begin
  if dry_run is not true then
    delete from pgshelf.documents d where d.id = any (v_ids);
  end if;
  return cardinality(v_ids);
end $$;
