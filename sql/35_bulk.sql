-- Writing many documents at once, and imports: what 30_documents.sql does for one, in a few statements for all of them.

-- Inserts or replaces documents by their keys, no key twice; those without a key are new. Chunks come in arrays of their own: of which
-- document (1 for the first) and at which place in it. New ones are inserted in the order of their keys, and only then those that are
-- there are locked, in the order of their ids, as every writer of several does: who has locked one waits for no new one, so that such
-- writes cannot deadlock. One that a deleter has taken meanwhile would be new: 40001, for the caller to begin again with no lock held.
-- Their times of creation are microseconds apart, as p_places says, so that a listing, and an export, has them in the order they came in.
create or replace function pgshelf.write_documents(
  p_library uuid, p_places int[], p_keys text[], p_titles text[], p_sources text[], p_metadata jsonb[],
  p_of int[], p_ordinals int[], p_texts text[], p_embeddings @vector@.vector[], p_chunk_metadata jsonb[])
  returns table (n int, document_id uuid, created boolean, pending int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_hashes bytea[] := array(select coalesce(h.hash, sha256('[]')) from generate_subscripts(p_places, 1) s(n)
    left join (select u.n, sha256(convert_to(array_to_json(array_agg(u.text order by u.ordinal))::text, 'UTF8')) as hash
      from unnest(p_of, p_ordinals, p_texts) u(n, ordinal, text) group by u.n) h on h.n = s.n order by s.n);
  v_numbers bigint[];
  v_ids uuid[];
  v_fresh uuid[];
  v_there text[];
  v_locked int;
begin
  with given as materialized (
    select u.n, gen_random_uuid() as id, now() + u.place * interval '1 microsecond' as moment, u.key, u.title, u.source, u.metadata, u.hash
    from unnest(p_places, p_keys, p_titles, p_sources, p_metadata, v_hashes) with ordinality u(place, key, title, source, metadata, hash, n)
    where not exists (select from pgshelf.documents d where d.library_id = p_library and d.key = u.key)),
  written as (
    insert into pgshelf.documents as d (place, library_id, id, key, title, source, metadata, content_hash, created_at, updated_at)
    select pgshelf.place_of(p_library, g.id, v_library.fanout), p_library, g.id, g.key, g.title, g.source, g.metadata, g.hash,
      g.moment, g.moment
    from given g order by g.key collate "C", g.n on conflict on constraint documents_key_key do nothing returning d.id)
  select coalesce(array_agg(g.n), '{}'), coalesce(array_agg(g.id), '{}') into v_numbers, v_ids from given g join written w on w.id = g.id;
  v_there := array(select u.key from unnest(p_keys) with ordinality u(key, n) where u.n <> all (v_numbers));
  v_fresh := v_ids;
  if v_there <> '{}' then
    perform 1 from pgshelf.documents d where d.library_id = p_library and d.key = any (v_there) order by d.id for no key update;
    get diagnostics v_locked = row_count;
    if v_locked < cardinality(v_there) then
      -- not caught here: who waits for a lock of an inner block waits for the whole transaction, even when that is rolled back
      raise 'a document was deleted meanwhile' using errcode = '40001', hint = 'Repeat the transaction.';
    end if;
    -- all are there: so it is an update, by the index of the keys whatever the planner thinks of the library
    with written as (
      insert into pgshelf.documents as d (place, library_id, id, key, title, source, metadata, content_hash)
      select 0, p_library, gen_random_uuid(), u.key, u.title, u.source, u.metadata, u.hash
      from unnest(p_keys, p_titles, p_sources, p_metadata, v_hashes) u(key, title, source, metadata, hash) where u.key = any (v_there)
      on conflict on constraint documents_key_key do update set title = excluded.title, source = excluded.source,
        metadata = excluded.metadata, content_hash = excluded.content_hash, version = d.version + 1, updated_at = now()
      returning d.id, d.key)
    select v_numbers || array_agg(u.n), v_ids || array_agg(w.id) into v_numbers, v_ids
      from unnest(p_keys) with ordinality u(key, n) join written w on w.key = u.key;
  end if;
  v_ids := array(select u.id from unnest(v_numbers, v_ids) u(n, id) order by u.n);
  return query select u.n::int, u.id, u.id = any (v_fresh), coalesce(c.pending, 0) from unnest(v_ids) with ordinality u(id, n)
    left join pgshelf.put_chunks(v_library, v_ids, v_there = '{}', p_of, p_ordinals, p_texts, p_embeddings, p_chunk_metadata) c
      on c.document_id = u.id;
  perform pgshelf.documents_written(v_library, v_ids);
end $$;

-- Makes the chunks of documents what the arrays say; of none that is p_new there are any. A chunk whose text stays keeps its id and, unless
-- another vector is given, its embedding: what stays in its place is left alone; what goes is kept at hand, so that a text that only moved
-- keeps its vector. Tells of each document that got chunks how many of them lack a vector (of those that stay none does); PS013 where
-- nobody would ever make one.
create or replace function pgshelf.put_chunks(p_library pgshelf.libraries, p_documents uuid[], p_new boolean, p_of int[], p_ordinals int[],
  p_texts text[], p_embeddings @vector@.vector[], p_metadata jsonb[]) returns table (document_id uuid, pending int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_chunks text;
  v_old pgshelf.chunks[];
begin
  if p_new then
    v_chunks := $sql$select $1, d.place, $2, d.id, u.ordinal, gen_random_uuid(), u.text, coalesce(u.metadata, '{}'), u.embedding, $3
      from unnest($4, $5, $6, $7, $8) u(n, ordinal, text, embedding, metadata)
      join (select x.n, x.id, pgshelf.place_of($2, x.id, $9) as place from unnest($10) with ordinality x(id, n)) d on d.n = u.n$sql$;
  else
    execute format($sql$
      with wanted as materialized (select d.id as document_id, u.ordinal, u.text, u.embedding, coalesce(u.metadata, '{}') as metadata
        from unnest($3, $4, $5, $6, $7) u(n, ordinal, text, embedding, metadata) join unnest($2) with ordinality d(id, n) on d.n = u.n),
      gone as (delete from %1$s c where c.library_id = $1 and c.document_id = any ($2) and not exists (select 1 from wanted w
        where w.document_id = c.document_id and w.ordinal = c.ordinal and w.text = c.text and w.metadata = c.metadata
          and c.embedding is not null and (w.embedding is null or w.embedding %2$s c.embedding))
        returning c::pgshelf.chunks as chunk)
      select array_agg(gone.chunk) from gone $sql$, v_table, 'operator(@vector_ident@.=)')
      into v_old using p_library.id, p_documents, p_of, p_ordinals, p_texts, p_embeddings, p_metadata;
    v_chunks := format($sql$select $1, d.place, $2, w.document_id, w.ordinal, coalesce(o.id, gen_random_uuid()), w.text, w.metadata,
        coalesce(w.embedding, o.embedding), $3
      from (select d.id as document_id, u.ordinal, u.text, u.embedding, coalesce(u.metadata, '{}') as metadata,
              row_number() over (partition by d.id, u.text order by u.ordinal) as nth
            from unnest($4, $5, $6, $7, $8) u(n, ordinal, text, embedding, metadata) join unnest($10) with ordinality d(id, n) on d.n = u.n
            where not exists (select 1 from %s c where c.library_id = $2 and c.document_id = d.id and c.ordinal = u.ordinal)) w
      join (select x.id, pgshelf.place_of($2, x.id, $9) as place from unnest($10) x(id)) d on d.id = w.document_id
      left join (select x.*, row_number() over (partition by x.document_id, x.text order by x.embedding is null, x.ordinal) as nth
                 from unnest($11) x) o on o.document_id = w.document_id and o.text = w.text and o.nth = w.nth $sql$, v_table);
  end if;
  for document_id, pending in execute format($sql$
    with written as (insert into %s as c (shelf, place, library_id, document_id, ordinal, id, text, metadata, embedding, language) %s
      returning c.document_id, c.embedding is null as waits)
    select w.document_id, (count(*) filter (where w.waits))::int from written w group by w.document_id $sql$, v_table, v_chunks)
    using p_library.shelf, p_library.id, p_library.language, p_of, p_ordinals, p_texts, p_embeddings, p_metadata, p_library.fanout, p_documents,
      v_old loop
    if pending > 0 and p_library.embedder ->> 'provider' = 'none' then
      raise '% of the chunks have no vector, and the library has no embedder to make one', pending using errcode = 'PS013',
        hint = 'Send an embedding with every chunk, or use a library with an embedder.';
    end if;
    return next;
  end loop;
end $$;

-- Of documents that write_documents has refused, those whose vectors are wrong or missing, with what is wrong: a file that was made
-- for another library need not be tried line by line.
create or replace function pgshelf.refused_documents(
  p_library uuid, p_keys text[], p_of int[], p_ordinals int[], p_embeddings @vector@.vector[])
  returns table (n int, state text, message text, hint text)
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library::text);
  v_chunk record;
begin
  if v_library.embedder ->> 'provider' = 'none' then
    -- one that is there may hold the text with its vector
    return query select u.n, 'PS013', format('%s of the chunks have no vector, and the library has no embedder to make one', count(*)),
        'Send an embedding with every chunk, or use a library with an embedder.'
      from unnest(p_of, p_embeddings) u(n, embedding) where u.embedding is null
        and not exists (select from pgshelf.documents d where d.library_id = p_library and d.key = p_keys[u.n]) group by u.n;
  end if;
  for v_chunk in select distinct on (u.n) u.n, u.ordinal, u.embedding from unnest(p_of, p_ordinals, p_embeddings) u(n, ordinal, embedding)
    where @vector@.vector_dims(u.embedding) <> v_library.dimension or not @vector@.vector_norm(u.embedding) between 1e-15 and 1e15
    order by u.n, u.ordinal loop
    begin
      perform pgshelf.check_vector(v_chunk.embedding, v_library.dimension, v_library.metric, format('of chunk %s', v_chunk.ordinal));
    exception when others then
      n := v_chunk.n;
      get stacked diagnostics state = returned_sqlstate, message = message_text, hint = pg_exception_hint;
      return next;
    end;
  end loop;
end $$;

-- The texts of documents, by their keys, that have a vector already: writing them again need not embed them.
create or replace function pgshelf.embedded_texts_of(p_library uuid, p_keys text[]) returns table (key text, text text)
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
begin
  return query execute format('select d.key, c.text from pgshelf.documents d
    join pgshelf.chunks_s%s c on c.library_id = d.library_id and c.document_id = d.id and c.embedding is not null
    where d.library_id = $1 and d.key = any ($2)', (pgshelf.library_named(p_library::text)).shelf) using p_library, p_keys;
end $$;

-- Begins an import, or goes on with the one of that name where the last runner ended; PS023 while another one runs.
create or replace function pgshelf.begin_import(p_library uuid, p_name text, p_runner uuid, p_lease interval,
  out import uuid, out lines bigint, out checksum bigint)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  -- a client may send its documents as many imports: the first of a row of them is when it began
  insert into pgshelf.imports as i (library_id, name, runner, lease_until, started_at)
    select p_library, p_name, p_runner, clock_timestamp() + p_lease, coalesce(min(x.started_at), now()) from pgshelf.imports x
    where x.library_id = p_library and x.written_at > clock_timestamp() - interval '10 seconds'
    on conflict on constraint imports_name_key do update set runner = excluded.runner, lease_until = excluded.lease_until,
      started_at = excluded.started_at, written_at = excluded.written_at where i.lease_until <= clock_timestamp()
    returning i.id, i.lines, i.checksum into import, lines, checksum;
  if import is null then
    raise 'an import of the name % is running', quote_literal(p_name) using errcode = 'PS023',
      hint = format('Wait until it has ended; one whose client or server was killed ends within %s seconds.', extract(epoch from p_lease)::int);
  end if;
end $$;

-- Notes with the batch that is written in this transaction how far an import has come; null leaves that as it is, and only says that
-- the runner lives. PS023 when another runner has taken over: what this one wrote is not committed then.
create or replace function pgshelf.continue_import(p_import uuid, p_runner uuid, p_lease interval, p_lines bigint, p_checksum bigint) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  update pgshelf.imports i set lines = coalesce(p_lines, i.lines), checksum = coalesce(p_checksum, i.checksum),
    written_at = case when p_lines is null then i.written_at else clock_timestamp() end,
    lease_until = clock_timestamp() + p_lease where i.id = p_import and i.runner = p_runner;
  if not found then
    raise 'the import was taken over by another one of its name' using errcode = 'PS023', hint = 'Send it once at a time.';
  end if;
end $$;

-- Ends an import: it is remembered, so that sending it again under its name writes nothing twice.
create or replace function pgshelf.end_import(p_import uuid, p_runner uuid) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.imports i set lease_until = clock_timestamp() where i.id = p_import and i.runner = p_runner
$$;

-- Forgets imports that ended long ago, or without a name; tells how many.
create or replace function pgshelf.forget_imports(p_after interval) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows int;
begin
  delete from pgshelf.imports i where i.ctid = any (array(select x.ctid from pgshelf.imports x
    where x.lease_until < clock_timestamp() - case when x.name is null then '1 minute' else p_after end limit 1000 for update skip locked));
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;

-- Whether somebody is filling a library: it pays to wait with its move, for an index is built several times faster than it is filled.
-- Only while batches come, or have just come, and for an hour at most.
create or replace function pgshelf.importing(p_library uuid) returns boolean
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  select exists (select from pgshelf.imports i where i.library_id = p_library and i.started_at > clock_timestamp() - interval '1 hour'
    and i.written_at > clock_timestamp() - case when i.lease_until > clock_timestamp() then interval '10 seconds' else '1 second' end)
$$;

-- Opens the cursor `export`: a row for each chunk, in the order of the documents' creation, with the beginning of its document's line
-- before the first one. JSON as it shall be sent; numbers of vectors are the shortest that read back the same. It begins at once
-- and needs no memory, for the documents come in the order of an index: plans that sort all of them first are ruled out.
create or replace function pgshelf.open_export(p_library text, p_filter jsonb, p_embeddings boolean) returns refcursor
  volatile language plpgsql set search_path = pg_catalog, pg_temp set enable_sort = off set enable_hashjoin = off set enable_mergejoin = off
  set jit = off set extra_float_digits = 1
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
  v_cursor refcursor := 'export';
begin
  open v_cursor no scroll for execute format($sql$
    select case when coalesce(c.nth, 1) = 1 then concat('{', '"key":' || to_json(d.key)::text || ',', '"title":' || to_json(d.title)::text || ',',
        '"source":' || to_json(d.source)::text || ',', '"metadata":', d.metadata, ',"chunks":[') end,
      case when c.nth is not null then concat('{"text":', to_json(c.text), %1$s ',"metadata":' || nullif(c.metadata, '{}')::text, '}') end
    from pgshelf.documents d
    left join lateral (select x.text, x.metadata, x.embedding, row_number() over (order by x.ordinal) as nth
      from pgshelf.chunks_s%3$s x where x.library_id = %4$L and x.document_id = d.id) c on true
    where $1::int is null and $2::jsonb is not distinct from $2 and %2$s
    order by d.created_at, d.id, c.nth $sql$,
    case when p_embeddings then $sql$',"embedding":' || c.embedding::text,$sql$ else '' end,
    pgshelf.document_condition(v_library, p_filter), v_library.shelf, v_library.id) using null::int, p_filter;
  return v_cursor;
end $$;
