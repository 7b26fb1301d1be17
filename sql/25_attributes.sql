-- Declared attributes: values of metadata in a narrow table, kept by triggers, so that ranges, sorting and facets have an index.
-- libraries.attributes is what is wanted, attributes_ready what searches may use, attributes_filling how far the worker has come.

-- The field of a name: dots walk into objects, and not into arrays; filters say it in the same way.
create or replace function pgshelf.field(p_metadata jsonb, p_name text) returns jsonb
  immutable parallel safe language plpgsql
as $$
declare
  v_key text;
begin
  foreach v_key in array string_to_array(p_name, '.') loop
    p_metadata := p_metadata -> v_key;
  end loop;
  return p_metadata;
end $$;

-- The row of attribute_values that a document's metadata makes for one attribute: exact is null where the field is missing. A number
-- is rounded, a text cut to what a btree can hold, another type not kept: then it is not exact, and the document has the value.
create or replace function pgshelf.attribute_row(p_metadata jsonb, p_attribute text, p_type text,
  out num float8, out txt text, out ts timestamptz, out exact boolean)
  immutable parallel safe language plpgsql
as $$
declare
  v_value jsonb := pgshelf.field(p_metadata, p_attribute);
  v_type text := jsonb_typeof(v_value);
begin
  if v_value is null then
    return;
  elsif p_type = 'number' and v_type = 'number' then
    num := pgshelf.num(v_value);
    exact := num::text::numeric = v_value::numeric;
  elsif p_type = 'text' and v_type = 'string' then
    txt := left(v_value #>> '{}', 256);
    exact := txt = v_value #>> '{}';
  elsif p_type = 'datetime' and v_type = 'string' then
    ts := pgshelf.moment(v_value #>> '{}');
  end if;
  exact := coalesce(exact, false);
end $$;

-- Refuses what cannot be declared.
create or replace function pgshelf.check_attributes(p_attributes jsonb) returns void
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_wrong text;
begin
  if jsonb_typeof(p_attributes) is distinct from 'object' then
    raise 'attributes are an object, such as {"year": "number"}' using errcode = 'PS030';
  elsif (select count(*) from jsonb_object_keys(p_attributes)) > 32 then
    raise 'there are more than 32 attributes' using errcode = 'PS030', hint = 'Equality needs no attribute; declare what is sorted, counted or compared.';
  end if;
  select a.key into v_wrong from jsonb_each(p_attributes) a
    where not char_length(a.key) between 1 and 200 or a.key ~ '^(\$|chunk\.)' or cardinality(string_to_array(a.key, '.')) > 32 limit 1;
  if found then
    raise 'attribute %: a name has 1 to 200 characters and does not begin with $ or chunk.', quote_literal(left(v_wrong, 200)) using errcode = 'PS030',
      hint = 'Attributes are fields of the metadata of documents; dots lead into objects.';
  end if;
  select a.key into v_wrong from jsonb_each(p_attributes) a where a.value not in ('"number"', '"text"', '"datetime"') limit 1;
  if found then
    raise 'attribute %: there is no type %', quote_literal(v_wrong), left(p_attributes ->> v_wrong, 50) using errcode = 'PS030',
      hint = 'Types are number, text and datetime.';
  end if;
end $$;

-- Declares the attributes of a library, all of them. Searches stop using those that go or change their type at once; the worker
-- does the rest. A library that has no documents yet is ready.
create or replace function pgshelf.declare_attributes(p_library uuid, p_attributes jsonb) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.check_attributes(p_attributes);
  update pgshelf.libraries l set attributes = p_attributes, attributes_filling = '{}',
    attributes_ready = (select coalesce(jsonb_object_agg(r.key, r.value), '{}') from jsonb_each(l.attributes_ready) r where p_attributes -> r.key = r.value)
    where l.id = p_library and l.attributes <> p_attributes;
end $$;

-- Every writer of documents passes here before it reads what is declared: who read it too early is waited for by the fence of
-- fill_attributes. An older snapshot could not see what is declared now, so there the row of the library must not have changed.
create or replace function pgshelf.lock_attributes(p_libraries uuid[]) returns void
  volatile language plpgsql
as $$
begin
  perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(x.id::text)) from (select u.id from unnest(p_libraries) u(id) order by u.id) x;
  if current_setting('transaction_isolation') <> 'read committed' then
    perform 1 from pgshelf.libraries l where l.id = any (p_libraries) order by l.id for share;
  end if;
end $$;

create or replace function pgshelf.documents_inserted() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.mark_libraries(array(select distinct f.library_id from fresh f));
  insert into pgshelf.change_log (library_id, kind, document_id, key, version, created)
    select f.library_id, 'put', f.id, f.key, f.version, true from fresh f;
  perform pgshelf.lock_attributes(array(select distinct f.library_id from fresh f));
  insert into pgshelf.attribute_values (library_id, document_id, attribute, num, txt, ts, exact)
    select f.library_id, f.id, a.key, r.num, r.txt, r.ts, r.exact
    from (select distinct x.library_id from fresh x) y
    join pgshelf.libraries l on l.id = y.library_id and l.attributes <> '{}'
    join fresh f on f.library_id = l.id
    cross join lateral jsonb_each_text(l.attributes) a
    cross join lateral pgshelf.attribute_row(f.metadata, a.key, a.value) r
    where r.exact is not null
    on conflict on constraint attribute_values_pkey do update set num = excluded.num, txt = excluded.txt, ts = excluded.ts,
      exact = excluded.exact;
  return null;
end $$;

-- Only what changed in metadata is written again: most updates of documents bump a version and touch nothing here.
create or replace function pgshelf.documents_updated() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_libraries uuid[] := array(select distinct f.library_id from fresh f join gone g on g.id = f.id where f.metadata is distinct from g.metadata);
begin
  perform pgshelf.mark_libraries(array(select f.library_id from fresh f union select g.library_id from gone g));
  -- an update that changes nothing, as of a library that moves, is no change
  insert into pgshelf.change_log (library_id, kind, document_id, key, version, created)
    select f.library_id, 'put', f.id, f.key, f.version, false from fresh f join gone g on g.id = f.id
    where f.version <> g.version or (f.key, f.title, f.source, f.metadata) is distinct from (g.key, g.title, g.source, g.metadata);
  if v_libraries = '{}' then
    return null;
  end if;
  perform pgshelf.lock_attributes(v_libraries);
  v_libraries := array(select l.id from pgshelf.libraries l where l.attributes <> '{}' and l.id = any (v_libraries));
  if v_libraries = '{}' then
    return null;
  end if;
  delete from pgshelf.attribute_values v using gone g, fresh f
    where f.id = g.id and f.metadata is distinct from g.metadata and f.library_id = any (v_libraries)
    and v.library_id = g.library_id and v.document_id = g.id;
  insert into pgshelf.attribute_values (library_id, document_id, attribute, num, txt, ts, exact)
    select f.library_id, f.id, a.key, r.num, r.txt, r.ts, r.exact
    from fresh f join gone g on g.id = f.id and f.metadata is distinct from g.metadata
    join pgshelf.libraries l on l.id = f.library_id and l.id = any (v_libraries)
    cross join lateral jsonb_each_text(l.attributes) a
    cross join lateral pgshelf.attribute_row(f.metadata, a.key, a.value) r
    where r.exact is not null
    on conflict on constraint attribute_values_pkey do update set num = excluded.num, txt = excluded.txt, ts = excluded.ts,
      exact = excluded.exact;
  return null;
end $$;

-- One step towards declared attributes, at most p_limit documents of one library; tells whether there was something to do. It may
-- be killed anywhere: the position is committed with what was written, and writing a value twice is no harm.
create or replace function pgshelf.fill_attributes(p_limit int default 1000) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library uuid;
begin
  for v_library in select l.id from pgshelf.libraries l where l.attributes_filling is not null and l.deleted_at is null order by l.id loop
    if pgshelf.fence_attributes(v_library) or pgshelf.fill_library(v_library, p_limit) then
      return true;
    end if;
  end loop;
  return false;
end $$;

-- Waits, a moment only, until nobody writes who may have read what was declared before; all later writers keep the new attributes.
create or replace function pgshelf.fence_attributes(p_library uuid) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_timeout text := current_setting('lock_timeout');
begin
  if not exists (select from pgshelf.libraries l where l.id = p_library and l.attributes_filling = '{}') then
    return false;
  end if;
  perform set_config('lock_timeout', '100ms', true);
  begin
    perform pg_advisory_xact_lock(x'6c6962'::int, hashtext(p_library::text));
    update pgshelf.libraries l set attributes_filling = '{"after": "00000000-0000-0000-0000-000000000000"}'
      where l.id = p_library and l.attributes_filling = '{}';
  exception when lock_not_available then
    perform set_config('lock_timeout', v_timeout, true);
    return false;
  end;
  perform set_config('lock_timeout', v_timeout, true);
  return true;
end $$;

-- Writes the attributes of the next documents in the order of their ids. They are locked meanwhile, lest a writer's newer value be
-- overwritten with what was read before. The last batch makes the attributes ready.
create or replace function pgshelf.fill_library(p_library uuid, p_limit int) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_documents uuid[];
begin
  perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(p_library::text));
  select * into v_library from pgshelf.libraries l
    where l.id = p_library and l.attributes_filling ? 'after' and l.deleted_at is null for no key update skip locked;
  if not found then
    return false;
  end if;
  v_documents := array(select d.id from pgshelf.documents d where d.library_id = p_library
    and d.id > (v_library.attributes_filling ->> 'after')::uuid order by d.id limit p_limit for no key update);
  delete from pgshelf.attribute_values v where v.library_id = p_library and v.document_id = any (v_documents)
    and not v_library.attributes_ready ? v.attribute;
  insert into pgshelf.attribute_values (library_id, document_id, attribute, num, txt, ts, exact)
    select d.library_id, d.id, a.key, r.num, r.txt, r.ts, r.exact
    from pgshelf.documents d cross join lateral jsonb_each_text(v_library.attributes) a
    cross join lateral pgshelf.attribute_row(d.metadata, a.key, a.value) r
    where d.id = any (v_documents) and not v_library.attributes_ready ? a.key and r.exact is not null;
  if cardinality(v_documents) < p_limit then
    update pgshelf.libraries l set attributes_filling = null, attributes_ready = l.attributes where l.id = p_library;
  else
    update pgshelf.libraries l set attributes_filling = jsonb_build_object('after', v_documents[cardinality(v_documents)]) where l.id = p_library;
  end if;
  return true;
end $$;
