-- Filters: what one means, said once, as conditions over d (pgshelf.documents) and c (the shelf). Values stay in $2 and are
-- reached by path, so the text of a condition holds nothing of a filter but its shape and its key names, quoted.

-- Every complaint about a filter, in one form.
create or replace function pgshelf.refuse_filter(p_path text[], p_message text, p_hint text) returns void
  stable language plpgsql
as $$
begin
  raise 'the filter%: %', coalesce(' at ' || nullif(left(array_to_string(p_path, '.'), 200), ''), ''), p_message
    using errcode = 'PS030', hint = p_hint;
end $$;

-- What a name in a filter stands for: a column of its type, or 'json' with the keys that lead to it inside metadata.
-- Arrows walk into objects only (#> would enter arrays as well, where no index can follow).
create or replace function pgshelf.filter_field(p_name text, p_path text[],
  out kind text, out expression text, out keys text[], out on_chunk boolean)
  stable language plpgsql
as $$
begin
  on_chunk := starts_with(p_name, 'chunk.');
  kind := case when p_name in ('$title', '$source', '$key', 'chunk.$text') then 'text' when p_name = '$id' then 'uuid'
    when p_name in ('$created_at', '$updated_at') then 'datetime' when p_name = 'chunk.$ordinal' then 'number'
    when p_name !~ '^(chunk\.)?\$' then 'json' end;
  if kind is null then
    perform pgshelf.refuse_filter(p_path, format('there is no operator or column %s here', quote_literal(p_name)),
      'Columns are $title, $source, $key, $created_at, $updated_at, $id, chunk.$ordinal and chunk.$text; $and, $or and $not combine.');
  elsif kind <> 'json' then
    expression := case when on_chunk then 'c.' else 'd.' end || split_part(p_name, '$', 2);
    return;
  end if;
  -- an empty name is a key like any other; splitting it would give no key at all
  keys := coalesce(nullif(string_to_array(case when on_chunk then substr(p_name, 7) else p_name end, '.'), '{}'), array['']);
  if cardinality(keys) > 32 then
    perform pgshelf.refuse_filter(p_path[1:cardinality(p_path) - 1], 'the name of a field has more than 32 parts', 'Store such values less deep.');
  end if;
  expression := case when on_chunk then 'c.metadata' else 'd.metadata' end;
  for i in 1 .. cardinality(keys) loop
    expression := format('%s -> %L::text', expression, keys[i]);
  end loop;
end $$;

-- Whether a value can be compared with a field: types never coerce, and only numbers and strings have an order.
create or replace function pgshelf.is_operand(p_kind text, p_ordered boolean, p_value jsonb) returns boolean
  stable language sql
as $$
  select case p_kind
    when 'json' then not p_ordered or jsonb_typeof(p_value) in ('number', 'string')
    when 'number' then jsonb_typeof(p_value) = 'number'
    when 'uuid' then jsonb_typeof(p_value) = 'string' and pg_input_is_valid(p_value #>> '{}', 'uuid')
    when 'datetime' then jsonb_typeof(p_value) = 'string' and pgshelf.moment(p_value #>> '{}') is not null
    else jsonb_typeof(p_value) = 'string' end
$$;

-- Refuses an operator that a field does not have, and an operand that the operator cannot take.
create or replace function pgshelf.check_condition(p_kind text, p_operator text, p_operand jsonb, p_path text[]) returns void
  stable language plpgsql
as $$
declare
  v_listed boolean;
  v_ordered boolean;
  v_type text;
  v_fits boolean;
  v_needs text;
begin
  -- the common cases, said once: each expression takes a while
  if p_kind = 'json' and (p_operator in ('$eq', '$ne')
    or p_operator in ('$gt', '$gte', '$lt', '$lte') and jsonb_typeof(p_operand) in ('number', 'string')
    or p_operator = '$between' and jsonb_typeof(p_operand) = 'array' and jsonb_array_length(p_operand) = 2
      and jsonb_typeof(p_operand -> 0) in ('number', 'string') and jsonb_typeof(p_operand -> 0) = jsonb_typeof(p_operand -> 1)) then
    return;
  end if;
  v_listed := p_operator in ('$in', '$nin', '$between', '$contains_any', '$contains_all');
  v_ordered := p_operator in ('$gt', '$gte', '$lt', '$lte', '$between');
  v_type := jsonb_typeof(p_operand);
  v_needs := case p_kind when 'number' then 'a number' when 'uuid' then 'an id (UUID)' when 'text' then 'a string'
    when 'datetime' then 'a date or time as ISO 8601, such as 2024-05-31 or 2024-05-31T12:00:00Z'
    else 'a number or a string' end;
  if not (p_operator in ('$eq', '$ne', '$in', '$nin', '$exists') or v_ordered and p_kind <> 'uuid'
    or p_operator in ('$like', '$ilike', '$regex') and p_kind in ('json', 'text')
    or p_operator in ('$contains', '$contains_any', '$contains_all') and p_kind = 'json') then
    perform pgshelf.refuse_filter(p_path, 'the field does not have this operator', case
      when p_operator like '$contains%' and p_kind = 'text' then 'The field is text; use $ilike with %, as in {"$ilike": "%sql%"}.'
      when p_operator not in ('$gt', '$gte', '$lt', '$lte', '$between', '$like', '$ilike', '$regex', '$contains', '$contains_any', '$contains_all')
        then 'Operators are $eq, $ne, $gt, $gte, $lt, $lte, $in, $nin, $between, $exists, $like, $ilike, $regex, $contains, $contains_any, $contains_all, $not.'
      else format('The field is compared with %s.', v_needs) end);
  elsif v_listed and v_type <> 'array' then
    perform pgshelf.refuse_filter(p_path, 'needs a list, not ' || left(p_operand::text, 50), 'Put the values into [ ].');
  elsif v_listed and jsonb_array_length(p_operand) > 1000 then
    perform pgshelf.refuse_filter(p_path, 'the list has more than 1000 values', 'Send several requests, or give the documents a field to filter by.');
  elsif p_operator = '$between' and jsonb_array_length(p_operand) <> 2 then
    perform pgshelf.refuse_filter(p_path, 'needs a list of two values', 'The lowest and the highest value that match.');
  elsif p_operator = '$exists' and v_type <> 'boolean' then
    perform pgshelf.refuse_filter(p_path, 'needs true or false, not ' || left(p_operand::text, 50), 'As in {"$exists": false}.');
  elsif p_operator in ('$like', '$ilike', '$regex') then
    perform pgshelf.check_pattern(p_operator, p_operand, p_path);
    return;
  elsif p_operator in ('$exists', '$contains', '$contains_any', '$contains_all') then
    return;
  end if;
  if not v_listed then
    v_fits := pgshelf.is_operand(p_kind, v_ordered, p_operand);
  else
    v_fits := not exists (select from jsonb_array_elements(p_operand) x where not pgshelf.is_operand(p_kind, v_ordered, x));
  end if;
  if not v_fits then
    perform pgshelf.refuse_filter(p_path, 'needs ' || v_needs || ', not ' || left(p_operand::text, 50), 'Types never coerce: "5" is no number.');
  elsif p_operator = '$between' and jsonb_typeof(p_operand -> 0) <> jsonb_typeof(p_operand -> 1) then
    perform pgshelf.refuse_filter(p_path, 'needs two values of the same type', 'Two numbers, or two strings.');
  end if;
end $$;

-- A pattern that PostgreSQL cannot read is refused here, not at the first row that meets it.
create or replace function pgshelf.check_pattern(p_operator text, p_operand jsonb, p_path text[]) returns void
  stable language plpgsql
as $$
begin
  if jsonb_typeof(p_operand) <> 'string' then
    perform pgshelf.refuse_filter(p_path, 'needs a pattern, not ' || left(p_operand::text, 50), 'A pattern is a string.');
  elsif p_operator <> '$regex' and p_operand #>> '{}' ~ '(^|[^\\])(\\\\)*\\$' then
    perform pgshelf.refuse_filter(p_path, 'the pattern ends with its escape character \', 'Double it: \\.');
  elsif p_operator = '$regex' then
    perform '' ~ (p_operand #>> '{}');
  end if;
exception when invalid_regular_expression then
  perform pgshelf.refuse_filter(p_path, sqlerrm, 'The syntax is that of regular expressions in PostgreSQL.');
end $$;

-- The SQL of a text expression as a value of a kind of field.
create or replace function pgshelf.filter_value(p_kind text, p_text text) returns text
  stable language sql
  as $$ select case p_kind when 'uuid' then format('(%s)::uuid', p_text) when 'number' then format('(%s)::numeric', p_text)
    when 'datetime' then format('pgshelf.moment(%s)', p_text) else p_text end $$;

-- One condition on one field, as SQL that is never null: "is true" says no where a field is missing, "is not true" yes.
-- What stands in $2 is constant when the statement is planned, so a row costs one comparison.
create or replace function pgshelf.filter_condition(p_kind text, p_field text, p_operator text, p_operand jsonb, p_path text[]) returns text
  stable language plpgsql
as $$
declare
  v_kind text := p_kind;
  v_field text := p_field;
  v_json text := format('($2 #> %L)', p_path);
  v_list text;
  v_guard text := '';
  v_type text := jsonb_typeof(case p_operator when '$between' then p_operand -> 0 else p_operand end);
  v_sign text := case p_operator when '$eq' then '=' when '$ne' then '=' when '$gt' then '>' when '$gte' then '>=' when '$lt' then '<'
    when '$lte' then '<=' when '$like' then 'like' when '$ilike' then 'ilike' when '$regex' then '~' end;
begin
  -- jsonb compares strings by the database's collation and orders values of unlike types: neither is meant
  if v_kind = 'json' and p_operator in ('$gt', '$gte', '$lt', '$lte', '$between', '$like', '$ilike', '$regex') then
    v_guard := format('jsonb_typeof(%s) = %L and ', v_field, v_type);
    if v_type = 'string' then
      v_field := format('((%s) #>> ''{}'')', v_field);
      v_kind := 'text';
    end if;
  end if;
  if v_kind = 'text' and p_operator in ('$gt', '$gte', '$lt', '$lte', '$between') then
    v_field := v_field || ' collate "C"';
  end if;
  if p_operator in ('$in', '$nin') then
    v_list := case v_kind when 'json' then format('select x from jsonb_array_elements(%s) x', v_json)
      else format('select %s from jsonb_array_elements_text(%s) x', pgshelf.filter_value(v_kind, 'x'), v_json) end;
  end if;
  return case
    when p_operator = '$exists' then format('((%s) is not null) = %s::boolean', v_field, v_json)
    when p_operator = '$in' then format('((%s) in (%s)) is true', v_field, v_list)
    when p_operator = '$nin' then format('((%s) in (%s)) is not true', v_field, v_list)
    when p_operator = '$between' then format('(%s(%s) between %s and %s) is true', v_guard, v_field,
      pgshelf.filter_operand(v_kind, p_path || '0'::text), pgshelf.filter_operand(v_kind, p_path || '1'::text))
    when p_operator like '$contains%' then pgshelf.contains_condition(v_field, p_operator, p_operand, v_json)
    else format('(%s(%s) %s %s) is %strue', v_guard, v_field, v_sign, pgshelf.filter_operand(v_kind, p_path),
      case p_operator when '$ne' then 'not ' else '' end) end;
end $$;

-- The SQL of the value at a path of the filter.
create or replace function pgshelf.filter_operand(p_kind text, p_path text[]) returns text
  stable language sql
  as $$ select case p_kind when 'json' then format('($2 #> %L)', p_path)
    else pgshelf.filter_value(p_kind, format('($2 #>> %L)', p_path)) end $$;

-- Elements of an array. For scalars containment is equality; {"a": 1, "b": 2} contains {"a": 1} and yet is another value.
create or replace function pgshelf.contains_condition(p_field text, p_operator text, p_operand jsonb, p_json text) returns text
  stable language plpgsql
as $$
declare
  v_values jsonb := case p_operator when '$contains' then jsonb_build_array(p_operand) else p_operand end;
  v_list text := case p_operator when '$contains' then format('select %s as x', p_json)
    else format('select x from jsonb_array_elements(%s) x', p_json) end;
begin
  if not exists (select from jsonb_array_elements(v_values) x where jsonb_typeof(x) in ('object', 'array')) then
    return case p_operator
      when '$contains' then format('((%s) @> (''[]''::jsonb || %s)) is true', p_field, p_json)
      when '$contains_all' then format('((%s) @> %s) is true', p_field, p_json)
      else format('((%s) @> any (array(select ''[]''::jsonb || x from jsonb_array_elements(%s) x))) is true', p_field, p_json) end;
  end if;
  return format('(case when jsonb_typeof(%1$s) = ''array'' then ' || case p_operator
      when '$contains_all' then 'not exists (select from (%2$s) w where w.x not in (select e from jsonb_array_elements(%1$s) e))'
      else 'exists (select from jsonb_array_elements(%1$s) e where e in (%2$s))' end || ' end) is true', p_field, v_list);
end $$;

-- Whether a value leaves anything in a jsonb_path_ops index: {} and [] do not, and asking for them would read it whole.
create or replace function pgshelf.has_leaf(p_value jsonb) returns boolean
  stable language sql
  as $$ select jsonb_typeof(p_value) not in ('object', 'array')
    or jsonb_path_exists(p_value, 'strict $.** ? (@.type() != "object" && @.type() != "array")') $$;

-- {"a": {"b": leaf}} of the keys a, b.
create or replace function pgshelf.nested(p_keys text[], p_leaf jsonb) returns jsonb
  stable language plpgsql
as $$
begin
  for i in reverse cardinality(p_keys) .. 1 loop
    p_leaf := jsonb_build_object(p_keys[i], p_leaf);
  end loop;
  return p_leaf;
end $$;

-- The SQL that builds the object whose leaves are SQL: a string is a value, a list of strings are lists to be joined.
create or replace function pgshelf.containment(p_tree jsonb) returns text
  stable language plpgsql
as $$
declare
  v_key text;
  v_sql text := '';
begin
  if jsonb_typeof(p_tree) = 'string' then
    return p_tree #>> '{}';
  elsif jsonb_typeof(p_tree) = 'array' then
    return (select string_agg(x, ' || ') from jsonb_array_elements_text(p_tree) x);
  end if;
  for v_key in select jsonb_object_keys(p_tree) loop
    v_sql := v_sql || format(' || jsonb_build_object(%L::text, %s)', v_key, pgshelf.containment(p_tree -> v_key));
  end loop;
  return substr(v_sql, 5);
end $$;

-- Two trees as one: objects are merged, lists joined. Where both have a leaf the first stays, and the index finds more than matches.
create or replace function pgshelf.merged(p_one jsonb, p_two jsonb) returns jsonb
  stable language plpgsql
as $$
begin
  if p_one is null or p_two is null or p_one = '{}' or p_two = '{}' then
    return coalesce(nullif(p_one, '{}'), p_two);
  elsif jsonb_typeof(p_one) = 'array' and jsonb_typeof(p_two) = 'array' then
    return p_one || p_two;
  elsif jsonb_typeof(p_one) <> 'object' or jsonb_typeof(p_two) <> 'object' then
    return p_one;
  end if;
  return p_one || coalesce((select jsonb_object_agg(t.key, pgshelf.merged(p_one -> t.key, t.value)) from jsonb_each(p_two) t), '{}');
end $$;

-- The key of the GIN index over documents d, pgshelf.scoped written out as the planner would: to inline it takes a tenth of a short search.
create or replace function pgshelf.indexed_metadata() returns text
  immutable parallel safe language sql
  as $$ select 'jsonb_set(''{}''::jsonb, array[d.library_id::text], d.metadata)' $$;

-- What an index can find of one condition, in a tree of "contained" (one containment for all), "ranges" (of ready attributes, by
-- name) and "direct" (SQL as it is). Whatever fulfils the condition is found; the condition itself decides. "decided", by name as well, is
-- the condition itself, said of the values that an attribute keeps: where all of them are exact it finds what fulfils it and nothing else.
create or replace function pgshelf.filter_index(p_library pgshelf.libraries, p_name text, p_kind text, p_keys text[], p_on_chunk boolean,
  p_operator text, p_operand jsonb, p_path text[]) returns jsonb
  stable language plpgsql
as $$
declare
  v_json text := format('($2 #> %L)', p_path);
  v_type text := case when p_library.attributes -> p_name = p_library.attributes_ready -> p_name and not p_on_chunk
    then p_library.attributes ->> p_name end;
  v_leaf text;
  v_range text;
begin
  if p_keys is null then
    return pgshelf.column_index(p_name, p_kind, p_operator, p_path);
  end if;
  v_range := pgshelf.attribute_range(v_type, p_operator, p_operand, p_path, false);
  if v_range is not null then
    return jsonb_build_object('ranges', jsonb_build_object(p_name, jsonb_build_array(v_range))) || case
      when pgshelf.kept_exactly(v_type, p_operand) then jsonb_build_object('decided', jsonb_build_object(p_name,
        jsonb_build_array(case when p_operator in ('$gt', '$lt') then pgshelf.attribute_range(v_type, p_operator, p_operand, p_path, true) else v_range end)))
      else '{}' end;
  elsif p_kind <> 'json' or p_operator not in ('$eq', '$contains', '$contains_all', '$in', '$contains_any') or not pgshelf.has_leaf(p_operand) then
    return '{}';
  elsif p_operator = '$eq' then
    return jsonb_build_object('contained', pgshelf.nested(p_keys, to_jsonb(v_json)));
  elsif p_operator = '$contains' then
    return jsonb_build_object('contained', pgshelf.nested(p_keys, to_jsonb(array[format('jsonb_build_array(%s)', v_json)])));
  elsif p_operator = '$contains_all' then
    return jsonb_build_object('contained', pgshelf.nested(p_keys, to_jsonb(array[v_json])));
  elsif exists (select from jsonb_array_elements(p_operand) x where not pgshelf.has_leaf(x)) then
    return '{}';
  end if;
  v_leaf := pgshelf.containment(pgshelf.nested(p_keys, to_jsonb(case p_operator when '$in' then 'x' else 'jsonb_build_array(x)' end)));
  if not p_on_chunk then
    v_leaf := format('jsonb_build_object(%L::text, %s)', p_library.id, v_leaf);
  end if;
  return jsonb_build_object('direct', jsonb_build_array(
    format('%s operator(pg_catalog.@>) any (array(select %s from jsonb_array_elements(%s) x))',
      case when p_on_chunk then 'c.metadata' else pgshelf.indexed_metadata() end, v_leaf, v_json)));
end $$;

-- The columns that have an index of their own.
create or replace function pgshelf.column_index(p_name text, p_kind text, p_operator text, p_path text[]) returns jsonb
  stable language plpgsql
as $$
declare
  v_sign text := case p_operator when '$eq' then '=' when '$gt' then '>' when '$gte' then '>=' when '$lt' then '<' when '$lte' then '<=' end;
  v_value text := pgshelf.filter_operand(p_kind, p_path);
begin
  return case
    when p_name in ('$id', '$key') and p_operator = '$eq' or p_name = '$created_at' and v_sign is not null then
      jsonb_build_object('direct', jsonb_build_array(format('d.%s %s %s', substr(p_name, 2), v_sign, v_value)))
    when p_name in ('$id', '$key', '$created_at') and p_operator = '$in' then jsonb_build_object('direct', jsonb_build_array(
      format('d.%s = any (array(select %s from jsonb_array_elements_text($2 #> %L) x))', substr(p_name, 2), pgshelf.filter_value(p_kind, 'x'), p_path)))
    when p_name = '$created_at' and p_operator = '$between' then jsonb_build_object('direct', jsonb_build_array(
      format('d.created_at between %s and %s', pgshelf.filter_operand(p_kind, p_path || '0'::text), pgshelf.filter_operand(p_kind, p_path || '1'::text))))
    else '{}' end;
end $$;

-- The part of attribute_values, as v, that holds every match of a condition on a ready attribute; null where it holds none of
-- some of them. Numbers and texts are stored rounded, in order: hence no < and > unless p_strict, which is for values that are exact.
create or replace function pgshelf.attribute_range(p_type text, p_operator text, p_operand jsonb, p_path text[], p_strict boolean) returns text
  stable language plpgsql
as $$
declare
  v_sign text := case p_operator when '$eq' then '=' when '$gt' then case when p_strict then '>' else '>=' end when '$gte' then '>='
    when '$lt' then case when p_strict then '<' else '<=' end when '$lte' then '<=' end;
  v_column text := case p_type when 'number' then 'v.num' when 'text' then 'v.txt' when 'datetime' then 'v.ts' end;
  v_value text := case p_type when 'number' then 'pgshelf.num(%s)' when 'text' then 'left(%s #>> ''{}'', 256)' when 'datetime' then 'pgshelf.moment(%s #>> ''{}'')' end;
  v_json_type text := case p_type when 'number' then 'number' else 'string' end;
begin
  if v_column is null then
    return null;
  elsif p_operator = '$between' then
    if jsonb_typeof(p_operand -> 0) <> v_json_type then
      return null;
    end if;
  elsif jsonb_typeof(p_operand) = 'array' then
    if exists (select from jsonb_array_elements(p_operand) x where jsonb_typeof(x) <> v_json_type) then
      return null;
    end if;
  elsif jsonb_typeof(p_operand) <> v_json_type then
    return null;
  end if;
  return case
    when p_operator = '$in' then
      format('%s = any (array(select %s from jsonb_array_elements($2 #> %L) x))', v_column, format(v_value, 'x'), p_path)
    when p_operator = '$between' then format('%s between %s and %s', v_column,
      format(v_value, format('($2 #> %L)', p_path || '0'::text)), format(v_value, format('($2 #> %L)', p_path || '1'::text)))
    when v_sign is not null and jsonb_typeof(p_operand) <> 'array' then
      format('%s %s %s', v_column, v_sign, format(v_value, format('($2 #> %L)', p_path))) end;
end $$;

-- Whether attribute_values would keep all values of an operand as they are. Moments are what datetimes are compared by.
create or replace function pgshelf.kept_exactly(p_type text, p_operand jsonb) returns boolean
  stable language plpgsql
as $$
begin
  if jsonb_typeof(p_operand) = 'array' and p_type <> 'datetime' then
    for i in 0 .. jsonb_array_length(p_operand) - 1 loop
      if not pgshelf.kept_exactly(p_type, p_operand -> i) then
        return false;
      end if;
    end loop;
    return true;
  end if;
  return case when p_type = 'datetime' then true
    when p_type = 'number' then pgshelf.num(p_operand)::text::numeric = p_operand::numeric
    else char_length(p_operand #>> '{}') <= 256 end;
end $$;

-- The documents of a library that one attribute's conditions allow.
create or replace function pgshelf.attribute_set(p_library uuid, p_attribute text, p_conditions jsonb) returns text
  stable language sql
as $$
  select format('select v.document_id from pgshelf.attribute_values v where v.library_id = %L and v.attribute = %L and %s',
    p_library, p_attribute, (select string_agg(x, ' and ') from jsonb_array_elements_text(p_conditions) x))
$$;

-- The SQL of a tree of filter_index: true where it is empty.
create or replace function pgshelf.index_condition(p_library uuid, p_index jsonb, p_on_chunk boolean) returns text
  stable language plpgsql
as $$
declare
  v_parts text[] := '{}';
begin
  -- attributes are what a library says it filters by: where they find the documents, the bitmap of the rest costs more than it saves
  if p_index ? 'ranges' then
    p_index := p_index - 'contained';
  end if;
  if p_index ? 'contained' and p_on_chunk then
    v_parts := array[format('c.metadata operator(pg_catalog.@>) (select %s)', pgshelf.containment(p_index -> 'contained'))];
  elsif p_index ? 'contained' then
    v_parts := array[format('%s operator(pg_catalog.@>) (select jsonb_build_object(%L::text, %s))', pgshelf.indexed_metadata(),
      p_library, pgshelf.containment(p_index -> 'contained'))];
  end if;
  if p_index ? 'ranges' then
    v_parts := v_parts || array(select format('d.id = any (array(%s))', pgshelf.attribute_set(p_library, r.key, r.value)) from jsonb_each(p_index -> 'ranges') r);
  end if;
  if p_index ? 'direct' or p_index ? 'sets' then
    v_parts := v_parts || array(select jsonb_array_elements_text(coalesce(p_index -> 'direct', '[]') || coalesce(p_index -> 'sets', '[]')));
  end if;
  return pgshelf.conjunction(v_parts);
end $$;

-- What an index can find of an $or: nothing unless of every arm. Arms that are lists of documents cannot share a bitmap, so they
-- are put together as one list.
create or replace function pgshelf.either_index(p_library uuid, p_arms jsonb[], p_on_chunk boolean) returns jsonb
  stable language plpgsql
as $$
begin
  if '{}' = any (p_arms) then
    return '{}';
  elsif not exists (select from unnest(p_arms) a where a ? 'ranges' or a ? 'sets') then
    return jsonb_build_object('direct', jsonb_build_array((
      select '(' || string_agg('(' || pgshelf.index_condition(p_library, a, p_on_chunk) || ')', ' or ') || ')' from unnest(p_arms) a)));
  end if;
  return jsonb_build_object('sets', jsonb_build_array((select format('d.id in (%s)', string_agg(case
      when a - '{ranges,decided}'::text[] = '{}' and (select count(*) from jsonb_object_keys(a -> 'ranges')) = 1
        then (select pgshelf.attribute_set(p_library, r.key, r.value) from jsonb_each(a -> 'ranges') r)
      else format('select d.id from pgshelf.documents d where d.library_id = %L and %s', p_library, pgshelf.index_condition(p_library, a, false)) end,
    ' union all ')) from unnest(p_arms) a)));
end $$;

-- A conjunction: an object of conditions. What concerns chunks is kept apart from what concerns documents alone.
create or replace function pgshelf.compile_conjunction(p_library pgshelf.libraries, p_filter jsonb, p_path text[], p_depth int,
  out documents text[], out chunks text[], out indexed jsonb, out chunks_indexed jsonb, out conditions int)
  stable language plpgsql
as $$
declare
  v_key text;
  v_value jsonb;
  v_part record;
begin
  documents := '{}'; chunks := '{}'; indexed := '{}'; chunks_indexed := '{}'; conditions := 0;
  if jsonb_typeof(p_filter) <> 'object' then
    perform pgshelf.refuse_filter(p_path, 'needs an object of conditions, not ' || left(p_filter::text, 50), 'As in {"year": {"$gte": 2020}, "lang": "en"}.');
  elsif p_depth > 8 then
    perform pgshelf.refuse_filter(p_path, '$and, $or and $not are nested more than 8 deep', 'Flatten it.');
  end if;
  for v_key, v_value in select f.key, f.value from jsonb_each(p_filter) f loop
    if v_key in ('$and', '$or', '$not') then
      v_part := pgshelf.compile_logic(p_library, v_key, v_value, p_path || v_key, p_depth + 1);
    else
      v_part := pgshelf.compile_field(p_library, v_key, v_value, p_path || v_key, p_depth);
    end if;
    documents := documents || v_part.documents;
    chunks := chunks || v_part.chunks;
    if v_part.indexed <> '{}' then
      indexed := pgshelf.merged(indexed, v_part.indexed);
    end if;
    if v_part.chunks_indexed <> '{}' then
      chunks_indexed := pgshelf.merged(chunks_indexed, v_part.chunks_indexed);
    end if;
    conditions := conditions + v_part.conditions;
  end loop;
  if conditions > 200 then
    perform pgshelf.refuse_filter('{}', 'it has more than 200 conditions', 'Use $in for many values of one field.');
  end if;
end $$;

-- $and, $or and $not. An arm that is about chunks makes the whole $or and $not about chunks.
create or replace function pgshelf.compile_logic(p_library pgshelf.libraries, p_operator text, p_arms jsonb, p_path text[], p_depth int,
  out documents text[], out chunks text[], out indexed jsonb, out chunks_indexed jsonb, out conditions int)
  stable language plpgsql
as $$
declare
  v_arm record;
  v_arms text[] := '{}';
  v_about_chunks boolean := false;
  v_indexes jsonb[] := '{}';
  v_chunk_indexes jsonb[] := '{}';
begin
  documents := '{}'; chunks := '{}'; indexed := '{}'; chunks_indexed := '{}'; conditions := 0;
  if p_operator = '$not' then
    v_arm := pgshelf.compile_conjunction(p_library, p_arms, p_path, p_depth);
    conditions := v_arm.conditions;
    v_arms := array[format('not (%s)', pgshelf.conjunction(v_arm.documents || v_arm.chunks))];
    v_about_chunks := v_arm.chunks <> '{}';
  elsif jsonb_typeof(p_arms) <> 'array' or p_arms = '[]' then
    perform pgshelf.refuse_filter(p_path, 'needs a list of filters, at least one', 'As in {"$or": [{"lang": "en"}, {"lang": "fr"}]}.');
  else
    for i in 0 .. jsonb_array_length(p_arms) - 1 loop
      v_arm := pgshelf.compile_conjunction(p_library, p_arms -> i, p_path || i::text, p_depth);
      conditions := conditions + greatest(v_arm.conditions, 1);
      exit when conditions > 200;
      if p_operator = '$and' then
        documents := documents || v_arm.documents;
        chunks := chunks || v_arm.chunks;
        indexed := pgshelf.merged(indexed, v_arm.indexed);
        chunks_indexed := pgshelf.merged(chunks_indexed, v_arm.chunks_indexed);
      else
        v_arms := v_arms || format('(%s)', pgshelf.conjunction(v_arm.documents || v_arm.chunks));
        v_about_chunks := v_about_chunks or v_arm.chunks <> '{}';
        v_indexes := v_indexes || v_arm.indexed;
        v_chunk_indexes := v_chunk_indexes || v_arm.chunks_indexed;
      end if;
    end loop;
  end if;
  if p_operator = '$or' then
    indexed := pgshelf.either_index(p_library.id, v_indexes, false);
    chunks_indexed := pgshelf.either_index(p_library.id, v_chunk_indexes, true);
  end if;
  if v_about_chunks then
    chunks := array[format('(%s)', array_to_string(v_arms, ' or '))];
  elsif p_operator <> '$and' then
    documents := array[format('(%s)', array_to_string(v_arms, ' or '))];
  end if;
end $$;

-- Several conditions as one.
create or replace function pgshelf.conjunction(p_conditions text[]) returns text
  stable language sql
  as $$ select coalesce(nullif(array_to_string(p_conditions, ' and '), ''), 'true') $$;

-- The conditions on one field: an object of operators, or a bare value, which it equals. An object without a $ is a value.
create or replace function pgshelf.compile_field(p_library pgshelf.libraries, p_name text, p_value jsonb, p_path text[], p_depth int,
  out documents text[], out chunks text[], out indexed jsonb, out chunks_indexed jsonb, out conditions int)
  stable language plpgsql
as $$
declare
  v_field record := pgshelf.filter_field(p_name, p_path);
  v_operators jsonb := p_value;
  v_operator text;
  v_operand jsonb;
  v_path text[];
  v_kind text;
  v_parts text[] := '{}';
  v_index jsonb := '{}';
  v_inner record;
begin
  conditions := 0;
  if jsonb_typeof(p_value) <> 'object' or not jsonb_path_exists(p_value, '$.keyvalue() ? (@.key starts with "$")') then
    v_operators := jsonb_build_object('$eq', p_value);
  elsif p_depth > 8 then
    perform pgshelf.refuse_filter(p_path, '$and, $or and $not are nested more than 8 deep', 'Flatten it.');
  end if;
  for v_operator, v_operand in select o.key, o.value from jsonb_each(v_operators) o loop
    v_path := case when v_operators is distinct from p_value then p_path else p_path || v_operator end;
    if v_operator = '$not' then
      if jsonb_typeof(v_operand) <> 'object' or not jsonb_path_exists(v_operand, '$.keyvalue() ? (@.key starts with "$")') then
        perform pgshelf.refuse_filter(v_path, 'needs an object of operators, not ' || left(v_operand::text, 50), 'As in {"year": {"$not": {"$gt": 2020}}}.');
      end if;
      v_inner := pgshelf.compile_field(p_library, p_name, v_operand, v_path, p_depth + 1);
      v_parts := v_parts || format('not (%s)', pgshelf.conjunction(v_inner.documents || v_inner.chunks));
      conditions := conditions + v_inner.conditions;
      continue;
    end if;
    -- what is declared a datetime is compared as one; its other operators see the string that it is
    v_kind := case when v_field.kind = 'json' and not v_field.on_chunk and p_library.attributes ->> p_name = 'datetime'
      and v_operator in ('$eq', '$ne', '$gt', '$gte', '$lt', '$lte', '$in', '$nin', '$between') then 'datetime' else v_field.kind end;
    perform pgshelf.check_condition(v_kind, v_operator, v_operand, v_path);
    v_parts := v_parts || pgshelf.filter_condition(v_kind,
      case when v_kind = 'datetime' and v_field.kind = 'json' then format('pgshelf.moment((%s) #>> ''{}'')', v_field.expression) else v_field.expression end,
      v_operator, v_operand, v_path);
    v_index := pgshelf.merged(v_index, pgshelf.filter_index(p_library, p_name, v_kind, v_field.keys, v_field.on_chunk, v_operator, v_operand, v_path));
    conditions := conditions + 1;
  end loop;
  documents := case when v_field.on_chunk then '{}' else v_parts end;
  chunks := case when v_field.on_chunk then v_parts else '{}' end;
  indexed := case when v_field.on_chunk then '{}' else v_index end;
  chunks_indexed := case when v_field.on_chunk then v_index else '{}' end;
end $$;

-- What of a filter's index conditions finds its documents, where both attributes and the containment could: one of them does, for together
-- they cost more than they save. A document that the containment finds costs more than twice as much as one that an attribute finds, since the
-- key of its index is computed again. Where many match, which of them leads matters little, and counting is not cheap. share: the share of
-- documents that fulfil p_documents, known from the same sample.
create or replace function pgshelf.one_index(p_library pgshelf.libraries, p_index jsonb, p_documents text, p_filter jsonb,
  out picked jsonb, out share float8)
  stable language plpgsql
as $$
declare
  v_ranges text[];
  v_contained text;
  v_documents float8;
  v_most int;
  v_counts float8[];
begin
  picked := p_index;
  if not (p_index ? 'ranges' and p_index ? 'contained') then
    return;
  end if;
  v_ranges := array(select r.key from jsonb_each(p_index -> 'ranges') r);
  v_contained := pgshelf.containment(p_index -> 'contained');
  picked := p_index - 'ranges';
  select s.share, s.number into share, v_documents from pgshelf.sampled(
    -- ids are random numbers: how far the sample reaches tells how many there are
    pgshelf.documents_sampled(p_library.id, format('d.metadata operator(pg_catalog.@>) (select %s) and %s', v_contained, p_documents),
      format('count(*) filter (where d.metadata operator(pg_catalog.@>) (select %s))
        * 4294967296.0::float8 / ((''x'' || left(max(d.id::text), 8))::bit(32)::bigint + 1)', v_contained)),
    p_filter, pgshelf.few_of(p_library)) s;
  if share >= 0.2 then
    return;
  end if;
  v_most := greatest(300, 2 * v_documents);
  v_counts := pgshelf.counted(format('select array[%s]', (select string_agg(format('(select count(*) from (%s limit $3) x)',
      pgshelf.attribute_set(p_library.id, r, p_index #> array['ranges', r])), ', ') from unnest(v_ranges) r)), p_filter, v_most);
  select p_index - 'ranges' - 'contained' || jsonb_build_object('ranges', jsonb_build_object(r.key, p_index #> array['ranges', r.key])) into picked
    from unnest(v_ranges, v_counts) r(key, documents) where r.documents < v_most order by r.documents limit 1;
  picked := coalesce(picked, p_index - 'ranges');
end $$;

-- The numbers that a statement counts for a filter, $2, in up to p_rows rows, $3. They decide how fast a search is and never what it finds, so
-- a session that has counted within the last minute need not again: it keeps them in 256 settings of its own, each for one statement.
create or replace function pgshelf.counted(p_statement text, p_filter jsonb, p_rows int) returns float8[]
  stable language plpgsql
as $$
declare
  v_key text := md5(concat(p_statement, ' ', p_filter, ' ', p_rows));
  v_place text := 'pgshelf.counted_' || (hashtext(v_key) & 255);
  v_known text[] := string_to_array(current_setting(v_place, true), ' ');
  v_now float8 := extract(epoch from now());
  v_counts float8[];
begin
  if v_known[1] = v_key and v_known[2]::float8 > v_now - 60 then
    return v_known[3]::float8[];
  end if;
  execute p_statement into v_counts using null::int, p_filter, p_rows;
  perform set_config(v_place, concat_ws(' ', v_key, v_now, v_counts), false);
  return v_counts;
end $$;

-- The first documents of a library in the order of their ids, $3 of them, a random choice since ids are random: the share that fulfils a
-- condition, and one number more.
create or replace function pgshelf.documents_sampled(p_library uuid, p_documents text, p_number text default 'null') returns text
  stable language sql
as $$
  select format('select array[count(*) filter (where %s)::float8 / greatest(count(*), 1), %s]::float8[]
    from (select d.* from pgshelf.documents d where d.library_id = %L order by d.id limit $3) d', p_documents, p_number, p_library)
$$;

-- The share that a sample finds, of $3 rows, with its other number: of as few rows as tell that less than p_few match (about four would
-- if just p_few did, and one at most is found), or that half of all do, or else of 200.
create or replace function pgshelf.sampled(p_sample text, p_filter jsonb, p_few float8, out share float8, out number float8)
  stable language plpgsql
as $$
declare
  v_rows int := least(greatest(ceil(4 / p_few), 50), 1000);
  v_counts float8[] := pgshelf.counted(p_sample, p_filter, v_rows);
begin
  if v_rows < 200 and v_counts[1] > p_few / 4 and v_counts[1] < 0.5 then
    v_counts := pgshelf.counted(p_sample, p_filter, 200);
  end if;
  share := v_counts[1];
  number := v_counts[2];
end $$;

-- A filter as SQL. documents: what concerns documents alone, over d; chunks: what concerns chunks too, over c and d; both are never
-- null. indexed and chunks_indexed: what an index finds, which is all that matches and sometimes more. share: about how many of the
-- documents fulfil `documents`, where that is known already. decided: a query for the ids of just the documents that fulfil `documents`, which
-- looks at no document; it is there if ready attributes know it all, and true in this snapshot, for these values. A filter of null has none.
create or replace function pgshelf.compile_filter(p_library pgshelf.libraries, p_filter jsonb,
  out documents text, out chunks text, out indexed text, out chunks_indexed text, out share float8, out decided text)
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_all record;
  v_one record;
begin
  documents := 'true'; chunks := 'true'; indexed := 'true'; chunks_indexed := 'true';
  if p_filter is null or p_filter = '{}' then
    return;
  end if;
  v_all := pgshelf.compile_conjunction(p_library, p_filter, '{}', 0);
  documents := pgshelf.conjunction(v_all.documents);
  chunks := pgshelf.conjunction(v_all.chunks);
  v_one := pgshelf.one_index(p_library, v_all.indexed, documents, p_filter);
  share := v_one.share;
  indexed := pgshelf.index_condition(p_library.id, v_one.picked, false);
  if v_all.chunks_indexed <> '{}' then
    chunks_indexed := pgshelf.index_condition(p_library.id, v_all.chunks_indexed, true);
  end if;
  if v_all.indexed ? 'decided' then
    decided := pgshelf.decided_by(p_library, v_all.indexed -> 'decided', cardinality(v_all.documents));
  end if;
end $$;

-- The query of compile_filter's decided; null where p_decided says less than all p_conditions, or a value is kept that is not exact: too long,
-- with too many digits, or of another type.
create or replace function pgshelf.decided_by(p_library pgshelf.libraries, p_decided jsonb, p_conditions int) returns text
  stable language plpgsql
as $$
begin
  if p_conditions > (select sum(jsonb_array_length(a.value)) from jsonb_each(p_decided) a) or exists (
    select from pgshelf.attribute_values v where v.library_id = p_library.id and not v.exact
    and v.attribute = any (array(select a from jsonb_object_keys(p_decided) a where p_library.attributes ->> a <> 'datetime'))) then
    return null;
  end if;
  -- each has a document once, so a join is what they share, by whichever way is short
  return (select 'select document_id from ' || string_agg(format('(%s) a%s', pgshelf.attribute_set(p_library.id, a.key, a.value), a.number), ' natural join ')
    from jsonb_each(p_decided) with ordinality a(key, value, number));
end $$;

-- A filter as one condition over d, for what is done to documents: a document matches when it does itself, and has a chunk that
-- does where the filter says something about chunks.
create or replace function pgshelf.document_condition(p_library pgshelf.libraries, p_filter jsonb) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_filter record;
begin
  v_filter := pgshelf.compile_filter(p_library, p_filter);
  return format('d.library_id = %L and (%s) and (%s)', p_library.id, v_filter.documents, v_filter.indexed)
    || case when v_filter.chunks = 'true' then '' else
      format(' and exists (select from pgshelf.chunks_s%s c where c.library_id = %L and c.document_id = d.id and (%s) and (%s))',
        p_library.shelf, p_library.id, v_filter.chunks, case p_library.shelf when 0 then 'true' else v_filter.chunks_indexed end) end;
end $$;
