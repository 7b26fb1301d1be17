-- sql/ as it stood at revision 0001: what a database holds that was migrated then, for tests of the way from there.
-- Finding a library, and the lock order that every writer of chunks follows.

-- The library of a name or an id; PS001 when there is none.
create or replace function pgshelf.library_named(p_library text) returns pgshelf.libraries
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
begin
  if pgshelf.is_id(p_library) then
    select * into v_library from pgshelf.libraries l where l.id = p_library::uuid and l.deleted_at is null;
  else
    select * into v_library from pgshelf.libraries l where l.name = p_library and l.deleted_at is null;
  end if;
  if not found then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  return v_library;
end $$;

-- Every writer of chunks begins here, but for the worker's claim. The order is always: advisory lock of the library (shared), row of the library
-- (for key share), row of the document. A promotion takes the first two exclusively and so fences all writers out.
create or replace function pgshelf.lock_library(p_library uuid) returns pgshelf.libraries
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
begin
  -- the advisory space is the database's: class "lib" keeps ours apart from the application's
  perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(p_library::text));
  select * into v_library from pgshelf.libraries l where l.id = p_library and l.deleted_at is null for key share;
  if not found then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  return v_library;
end $$;

-- Every writer of chunks ends here, while it still holds the documents: a library that is moving hears of them.
create or replace function pgshelf.documents_written(p_library pgshelf.libraries, p_documents uuid[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_columns constant text := 'place, library_id, document_id, ordinal, id, text, metadata, embedding, language,
    embed_attempts, embed_after, embed_error';
begin
  if p_library.moving = 1 then
    insert into pgshelf.move_log (library_id, document_id) select p_library.id, unnest(p_documents);
  elsif p_library.moving = 2 then
    -- the update makes a deleter with an older snapshot fail instead of leaving what it cannot see behind
    update pgshelf.documents d set updated_at = d.updated_at where d.id = any (p_documents);
    execute format('delete from pgshelf.chunks_s%s where library_id = $1 and document_id = any ($2)', p_library.moving_to)
      using p_library.id, p_documents;
    execute format('insert into pgshelf.chunks_s%1$s (shelf, %3$s) select %1$s, %3$s from pgshelf.chunks_s%2$s
      where library_id = $1 and document_id = any ($2)', p_library.moving_to, p_library.shelf, v_columns)
      using p_library.id, p_documents;
  end if;
end $$;

-- Hides a library at once. Its rows are reaped by the worker, unless somebody's table references documents: then they
-- go in this very transaction, so that a reference refuses (23503) exactly as it does for a single document.
create or replace function pgshelf.delete_library(p_library text) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid := (pgshelf.library_named(p_library)).id;
begin
  perform pgshelf.lock_library(v_id);
  if exists (select 1 from pg_constraint c where c.contype = 'f' and c.confrelid = 'pgshelf.documents'::regclass) then
    delete from pgshelf.documents d where d.library_id = v_id;
  end if;
  update pgshelf.libraries l set deleted_at = now(), version = l.version + 1 where l.id = v_id and l.deleted_at is null;
end $$;

-- Takes away at most p_limit documents of deleted libraries, and the libraries that are empty then; tells how many rows
-- went. A library that a table of the application's has come to reference stays, and keeps no other from going.
create or replace function pgshelf.reap_deleted(p_limit int default 500) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library uuid;
  v_rows int;
  v_gone int := 0;
begin
  for v_library in select l.id from pgshelf.libraries l where l.deleted_at <= now() order by l.deleted_at, l.id loop
    begin
      perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(v_library::text));
      perform 1 from pgshelf.libraries l where l.id = v_library for key share;
      delete from pgshelf.documents d where d.id in (
        select x.id from pgshelf.documents x where x.library_id = v_library limit p_limit - v_gone for update skip locked);
      get diagnostics v_rows = row_count;
      v_gone := v_gone + v_rows;
      delete from pgshelf.libraries l where l.id in (
        select x.id from pgshelf.libraries x where x.id = v_library
          and not exists (select 1 from pgshelf.documents d where d.library_id = x.id) for update skip locked);
      get diagnostics v_rows = row_count;
      v_gone := v_gone + v_rows;
    exception when foreign_key_violation then
      -- tried again later: the reference may be gone by then
      update pgshelf.libraries l set deleted_at = now() + interval '1 minute' where l.id = v_library;
    end;
    exit when v_gone >= p_limit;
  end loop;
  return v_gone;
end $$;

-- RFC 7396: null takes a member away, objects merge, anything else replaces.
create or replace function pgshelf.merge_patch(p_target jsonb, p_patch jsonb) returns jsonb
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_result jsonb := case jsonb_typeof(p_target) when 'object' then p_target else '{}' end;
  v_key text;
  v_value jsonb;
begin
  if jsonb_typeof(p_patch) is distinct from 'object' then
    return p_patch;
  end if;
  for v_key, v_value in select * from jsonb_each(p_patch) loop
    if jsonb_typeof(v_value) = 'null' then
      v_result := v_result - v_key;
    else
      v_result := jsonb_set(v_result, array[v_key], pgshelf.merge_patch(v_result -> v_key, v_value));
    end if;
  end loop;
  return v_result;
end $$;
-- What a foreign key and a type modifier would do elsewhere; the reasons stand in docs/architecture.md.

-- A chunk needs its document, and its vector needs the dimension of the library. Fires for every shelf.
create or replace function pgshelf.chunk_written() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_dimension int;
  v_metric text;
begin
  select l.dimension, l.metric into v_dimension, v_metric
    from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id
    where d.id = new.document_id and d.library_id = new.library_id for key share of d;
  if not found then
    raise foreign_key_violation using schema = 'pgshelf', table = 'chunks', constraint = 'chunks_document',
      message = format('document %s does not exist in library %s', new.document_id, new.library_id);
  end if;
  if new.embedding is null then
    return null;
  end if;
  perform pgshelf.check_vector(new.embedding, v_dimension, v_metric, format('of chunk %s', new.ordinal));
  return null;
end $$;

-- What a vector must be, said once, for rows and for queries. Squares of a norm outside 1e-15 .. 1e15 leave float4.
create or replace function pgshelf.check_vector(p_vector @vector@.vector, p_dimension int, p_metric text, p_where text) returns void
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_norm float8;
begin
  if @vector@.vector_dims(p_vector) <> p_dimension then
    raise 'the vector % has % dimensions, the library has %', p_where, @vector@.vector_dims(p_vector), p_dimension
      using errcode = 'PS010', hint = format('Send a vector of %s numbers, made by the model of the library.', p_dimension);
  end if;
  v_norm := @vector@.vector_norm(p_vector);
  if v_norm = 0 and p_metric <> 'cosine' then
    return;
  elsif v_norm = 0 then
    raise 'the vector % is zero and has no direction, so cosine distance is undefined for it', p_where
      using errcode = 'PS011', hint = 'Leave the chunk out, or use a library with the metric l2.';
  elsif not v_norm between 1e-15 and 1e15 then
    raise 'the norm of the vector % is %, outside 1e-15 to 1e15', p_where, v_norm
      using errcode = 'PS012', hint = 'Scale the vectors; distances of such numbers are not exact in single precision.';
  end if;
end $$;

-- Deleting documents deletes their chunks, by the literal name of the library's shelf: no other partition is touched.
create or replace function pgshelf.documents_deleted() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_gone record;
  v_library pgshelf.libraries;
  v_shelf int;
begin
  for v_gone in select g.library_id, array_agg(g.id) as ids from gone g group by g.library_id order by g.library_id loop
    perform pg_advisory_xact_lock_shared(x'6c6962'::int, hashtext(v_gone.library_id::text));
    select * into v_library from pgshelf.libraries l where l.id = v_gone.library_id for key share;
    continue when not found;
    foreach v_shelf in array case v_library.moving when 2 then array[v_library.shelf, v_library.moving_to]
      else array[v_library.shelf] end loop
      execute format('delete from pgshelf.chunks_s%s where library_id = $1 and document_id = any ($2)', v_shelf)
        using v_gone.library_id, v_gone.ids;
    end loop;
    if v_library.moving = 1 then
      insert into pgshelf.move_log (library_id, document_id) select v_gone.library_id, unnest(v_gone.ids);
    end if;
  end loop;
  return null;
end $$;
-- Writing documents and their chunks. Each function is one caller's whole write, in the caller's transaction.

-- The id of a document named by its id or its key; PS002 when there is none.
create or replace function pgshelf.document_named(p_library uuid, p_document text) returns uuid
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid;
begin
  if pgshelf.is_id(p_document) then
    select d.id into v_id from pgshelf.documents d where d.id = p_document::uuid and d.library_id = p_library;
  else
    select d.id into v_id from pgshelf.documents d where d.library_id = p_library and d.key = p_document;
  end if;
  if not found then
    raise 'there is no document % in this library', quote_literal(p_document) using errcode = 'PS002';
  end if;
  return v_id;
end $$;

-- Refuses a stale version (If-Match); p_have is null when there is no such document. A wish of -1 means any version.
create or replace function pgshelf.check_version(p_have bigint, p_want bigint) returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_have is null and p_want is not null or p_have <> nullif(p_want, -1) then
    raise 'the document is at version %, not %', coalesce(p_have::text, 'none'), coalesce(nullif(p_want, -1)::text, 'any')
      using errcode = 'PS020', hint = 'Read the document again and repeat the change on what it is now.';
  end if;
end $$;

-- Inserts or replaces one document with all its chunks. By p_document it must exist; by p_key it is an upsert; with
-- neither it is new. A chunk whose text stays keeps its id and, unless a vector is given, its embedding.
create or replace function pgshelf.write_document(
  p_library uuid, p_document uuid, p_key text, p_title text, p_source text, p_metadata jsonb,
  p_texts text[], p_embeddings @vector@.vector[], p_chunk_metadata jsonb[], p_version bigint,
  out document_id uuid, out created boolean, out pending int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_have bigint;
  v_hash bytea := sha256(convert_to(array_to_json(p_texts)::text, 'UTF8'));
begin
  if p_document is not null or p_version is not null then
    select d.id, d.version into document_id, v_have from pgshelf.documents d
      where d.library_id = p_library and d.id = coalesce(p_document,
        (select x.id from pgshelf.documents x where x.library_id = p_library and x.key = p_key)) for no key update;
    if not found and p_document is not null then
      raise 'there is no document % in this library', quote_literal(p_document) using errcode = 'PS002',
        hint = 'Ids are given by the server. To choose the name of a new document, use a key that is no UUID.';
    end if;
    perform pgshelf.check_version(v_have, p_version);
  end if;
  if document_id is not null then
    update pgshelf.documents d set title = p_title, source = p_source, metadata = p_metadata, content_hash = v_hash,
      version = d.version + 1, updated_at = now() where d.id = document_id;
    created := false;
  else
    document_id := gen_random_uuid();
    insert into pgshelf.documents as d (place, library_id, id, key, title, source, metadata, content_hash)
      values (pgshelf.place_of(p_library, document_id, v_library.fanout), p_library, document_id, p_key, p_title, p_source,
        p_metadata, v_hash)
      on conflict on constraint documents_key_key do update set title = excluded.title, source = excluded.source,
        metadata = excluded.metadata, content_hash = excluded.content_hash, version = d.version + 1, updated_at = now()
      returning d.id, d.id = document_id into document_id, created;
  end if;
  pending := pgshelf.write_chunks(v_library, document_id, p_texts, p_embeddings, p_chunk_metadata);
end $$;

-- Makes the chunks of a document, whose row the caller has just written, what the arrays say; tells how many lack a vector.
create or replace function pgshelf.write_chunks(
  p_library pgshelf.libraries, p_document uuid, p_texts text[], p_embeddings @vector@.vector[], p_metadata jsonb[]) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := 'pgshelf.chunks_s' || p_library.shelf;
  v_old pgshelf.chunks[];
  v_pending int;
begin
  -- what stays in its place is left alone; what goes is kept at hand, so that a text that only moved keeps its vector
  execute format($sql$
    with wanted as (select w.ordinal - 1 as ordinal, w.text, w.embedding, coalesce(w.metadata, '{}') as metadata
      from unnest($3, $4, $5) with ordinality w(text, embedding, metadata, ordinal)),
    gone as (delete from %s c where c.library_id = $1 and c.document_id = $2 and not exists (select 1 from wanted w
      where w.ordinal = c.ordinal and w.text = c.text and w.metadata = c.metadata and w.embedding is null
        and c.embedding is not null) returning c::pgshelf.chunks as chunk)
    select array_agg(gone.chunk) from gone $sql$, v_table)
    into v_old using p_library.id, p_document, p_texts, p_embeddings, p_metadata;
  execute format($sql$
    insert into %s (shelf, place, library_id, document_id, ordinal, id, text, metadata, embedding, language)
    select $6, $7, $1, $2, w.ordinal, coalesce(o.id, gen_random_uuid()), w.text, w.metadata, coalesce(w.embedding, o.embedding), $8
    from (select u.ordinal - 1 as ordinal, u.text, u.embedding, coalesce(u.metadata, '{}') as metadata,
            row_number() over (partition by u.text order by u.ordinal) as nth
          from unnest($3, $4, $5) with ordinality u(text, embedding, metadata, ordinal)
          where not exists (select 1 from %1$s c where c.library_id = $1 and c.document_id = $2 and c.ordinal = u.ordinal - 1)) w
    left join (select x.*, row_number() over (partition by x.text order by x.ordinal) as nth
               from unnest($9) x) o on o.text = w.text and o.nth = w.nth $sql$, v_table)
    using p_library.id, p_document, p_texts, p_embeddings, p_metadata, p_library.shelf,
      pgshelf.place_of(p_library.id, p_document, p_library.fanout), p_library.language, v_old;
  execute format('select count(*) from %s c where c.library_id = $1 and c.document_id = $2 and c.embedding is null', v_table)
    into v_pending using p_library.id, p_document;
  if v_pending > 0 and p_library.embedder ->> 'provider' = 'none' then
    raise '% of the chunks have no vector, and the library has no embedder to make one', v_pending using errcode = 'PS013',
      hint = 'Send an embedding with every chunk, or use a library with an embedder.';
  end if;
  perform pgshelf.documents_written(p_library, array[p_document]);
  return v_pending;
end $$;

-- The public way in: insert or replace a document by its key. What has no vector is left to the worker.
create or replace function pgshelf.put_document(
  library text, key text default null, title text default null, texts text[] default '{}', metadata jsonb default '{}',
  embeddings @vector@.vector[] default null, chunk_metadata jsonb[] default null, source text default null) returns uuid
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(embeddings) <> coalesce(cardinality(texts), 0) or cardinality(chunk_metadata) <> coalesce(cardinality(texts), 0) then
    raise 'embeddings and chunk_metadata, where given, have one element for each of the % texts', coalesce(cardinality(texts), 0)
      using errcode = 'PS030';
  end if;
  return (pgshelf.write_document((pgshelf.library_named(library)).id, null, key, title, source, coalesce(metadata, '{}'),
    coalesce(texts, '{}'), embeddings, chunk_metadata, null)).document_id;
end $$;

-- Deletes a document, named by its key or its id, and its chunks; PS002 when there is none.
create or replace function pgshelf.delete_document(library text, document text, version bigint default null) returns void
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library((pgshelf.library_named(library)).id);
  v_id uuid := pgshelf.document_named(v_library.id, document);
  v_have bigint;
begin
  select d.version into v_have from pgshelf.documents d where d.id = v_id for update;
  if not found then
    raise 'the document was deleted meanwhile' using errcode = 'PS002';
  end if;
  perform pgshelf.check_version(v_have, delete_document.version);
  delete from pgshelf.documents d where d.id = v_id;
end $$;

-- Changes title, source (members of p_columns) and metadata (a merge patch) of a document; its chunks stay.
create or replace function pgshelf.patch_document(p_library text, p_document text, p_columns jsonb, p_metadata jsonb, p_version bigint)
  returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid := pgshelf.document_named((pgshelf.library_named(p_library)).id, p_document);
  v_have bigint;
begin
  select d.version into v_have from pgshelf.documents d where d.id = v_id for no key update;
  if not found then
    raise 'the document was deleted meanwhile' using errcode = 'PS002';
  end if;
  perform pgshelf.check_version(v_have, p_version);
  update pgshelf.documents d set version = d.version + 1, updated_at = now(),
    title = case when p_columns ? 'title' then p_columns ->> 'title' else d.title end,
    source = case when p_columns ? 'source' then p_columns ->> 'source' else d.source end,
    metadata = case when p_metadata is null then d.metadata else pgshelf.merge_patch(d.metadata, p_metadata) end
    where d.id = v_id;
end $$;
-- Reading and changing single chunks, by the literal name of the library's shelf.

-- Chunks of one document in order, from behind an ordinal.
create or replace function pgshelf.document_chunks(p_library pgshelf.libraries, p_document uuid, p_after int, p_limit int)
  returns setof pgshelf.chunks
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return query execute format('select c.* from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id = $2
    and c.ordinal > $3 order by c.ordinal limit $4', p_library.shelf) using p_library.id, p_document, p_after, p_limit;
end $$;

-- How many chunks each of some documents has, how many wait for a vector, and how many were given up.
create or replace function pgshelf.count_chunks(p_library pgshelf.libraries, p_documents uuid[])
  returns table (document_id uuid, total int, pending int, failed int)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return query execute format($sql$
    select c.document_id, count(*)::int,
      (count(*) filter (where c.embedding is null and c.embed_after < 'infinity'))::int,
      (count(*) filter (where c.embedding is null and c.embed_after = 'infinity'))::int
    from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id = any ($2) group by c.document_id $sql$, p_library.shelf)
    using p_library.id, p_documents;
end $$;

-- One chunk of a library; PS003 when there is none.
create or replace function pgshelf.chunk_named(p_library pgshelf.libraries, p_chunk uuid) returns pgshelf.chunks
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_chunk pgshelf.chunks;
begin
  execute format('select c.* from pgshelf.chunks_s%s c where c.id = $1 and c.library_id = $2', p_library.shelf)
    into v_chunk using p_chunk, p_library.id;
  if v_chunk.id is null then
    raise 'there is no chunk % in this library', quote_literal(p_chunk) using errcode = 'PS003';
  end if;
  return v_chunk;
end $$;

-- Locks the document of a chunk, bumps its version, forgets its hash, and reads the chunk again: the lock order, and no lost update.
create or replace function pgshelf.lock_chunk(p_library pgshelf.libraries, p_chunk uuid) returns pgshelf.chunks
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_document uuid := (pgshelf.chunk_named(p_library, p_chunk)).document_id;
begin
  update pgshelf.documents d set version = d.version + 1, updated_at = now(), content_hash = null where d.id = v_document;
  return pgshelf.chunk_named(p_library, p_chunk);
end $$;

-- Changes a chunk in place. A new text without a vector asks for a new one; null leaves a part as it is.
create or replace function pgshelf.patch_chunk(p_library uuid, p_chunk uuid, p_text text, p_embedding @vector@.vector, p_metadata jsonb)
  returns pgshelf.chunks
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_chunk pgshelf.chunks := pgshelf.lock_chunk(v_library, p_chunk);
  v_new_text boolean := p_text is not null and p_text <> v_chunk.text;
begin
  if v_new_text and p_embedding is null and v_library.embedder ->> 'provider' = 'none' then
    raise 'a new text needs a new vector, and the library has no embedder to make one' using errcode = 'PS013',
      hint = 'Send text and embedding together.';
  end if;
  execute format($sql$
    update pgshelf.chunks_s%s c set text = coalesce($2, c.text), metadata = coalesce($4, c.metadata),
      embedding = case when $3 is not null then $3 when $5 then null else c.embedding end,
      embed_attempts = case when $5 then 0 else c.embed_attempts end, embed_error = case when $5 or $3 is not null then null else c.embed_error end,
      embed_after = case when $5 then now() else c.embed_after end
    where c.id = $1 and c.library_id = $6 returning c.* $sql$, v_library.shelf)
    into v_chunk using p_chunk, p_text, p_embedding, pgshelf.merge_patch(v_chunk.metadata, p_metadata), v_new_text, p_library;
  perform pgshelf.documents_written(v_library, array[v_chunk.document_id]);
  return v_chunk;
end $$;

-- Deletes one chunk; the ordinals of the others stay.
create or replace function pgshelf.delete_chunk(p_library uuid, p_chunk uuid) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_chunk pgshelf.chunks := pgshelf.lock_chunk(v_library, p_chunk);
begin
  execute format('delete from pgshelf.chunks_s%s c where c.id = $1 and c.library_id = $2', v_library.shelf)
    using p_chunk, p_library;
  perform pgshelf.documents_written(v_library, array[v_chunk.document_id]);
end $$;
-- Embedding as desired state: a chunk without a vector is the request. Workers claim, embed outside any transaction, store.

-- Takes up to p_limit pending chunks of one library, that of the chunk that has waited longest, for p_lease; another
-- worker may have them when the lease is over. It changes nothing that a promotion must hear of, and so takes no locks.
create or replace function pgshelf.claim_pending(p_limit int, p_lease interval)
  returns table (library_id uuid, embedder jsonb, chunk_id uuid, text text, attempts int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_shelf int;
begin
  for v_shelf in select distinct l.shelf from pgshelf.libraries l where l.deleted_at is null order by 1 loop
    return query execute format($sql$
      with first as (select c.library_id from pgshelf.chunks_s%1$s c join pgshelf.libraries l on l.id = c.library_id
          where c.embedding is null and c.embed_after <= now() and l.shelf = %1$s and l.deleted_at is null
          order by c.embed_after limit 1),
      mine as (select c.library_id, c.document_id, c.ordinal, c.place, c.shelf from pgshelf.chunks_s%1$s c, first f
          where c.library_id = f.library_id and c.embedding is null and c.embed_after <= now()
          order by c.embed_after limit $1 for update of c skip locked)
      update pgshelf.chunks_s%1$s c set embed_after = now() + $2, embed_attempts = c.embed_attempts + 1
        from mine m, pgshelf.libraries l
        where (c.library_id, c.document_id, c.ordinal, c.place, c.shelf) = (m.library_id, m.document_id, m.ordinal, m.place, m.shelf)
          and l.id = c.library_id
        returning c.library_id, l.embedder, c.id, c.text, c.embed_attempts $sql$, v_shelf) using p_limit, p_lease;
    if found then
      return;
    end if;
  end loop;
end $$;

-- Locks the documents of some chunks in the order of their ids, as a writer of each of them does: no deadlock.
create or replace function pgshelf.lock_documents_of(p_library pgshelf.libraries, p_chunks uuid[]) returns uuid[]
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_documents uuid[];
begin
  execute format('select array_agg(distinct c.document_id) from pgshelf.chunks_s%s c
    where c.id = any ($1) and c.library_id = $2', p_library.shelf) into v_documents using p_chunks, p_library.id;
  perform 1 from pgshelf.documents d where d.id = any (v_documents) order by d.id for no key update;
  return v_documents;
end $$;

-- Stores vectors for chunks whose text is still the one that was embedded and that nobody has served meanwhile.
create or replace function pgshelf.store_embeddings(p_library uuid, p_chunks uuid[], p_hashes text[], p_embeddings @vector@.vector[])
  returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_documents uuid[] := pgshelf.lock_documents_of(v_library, p_chunks);
  v_stored int;
begin
  execute format($sql$
    update pgshelf.chunks_s%s c set embedding = x.embedding, embed_error = null
    from unnest($1, $2, $3) x(id, hash, embedding)
    where c.id = x.id and c.library_id = $4 and c.embedding is null and md5(c.text) = x.hash $sql$, v_library.shelf)
    using p_chunks, p_hashes, p_embeddings, p_library;
  get diagnostics v_stored = row_count;
  perform pgshelf.documents_written(v_library, v_documents);
  return v_stored;
end $$;

-- Says why chunks could not be embedded, and in how many seconds to try again; null gives up, with the reason on the chunk.
-- A text that changed meanwhile is another request: the reason is not its own.
create or replace function pgshelf.fail_embeddings(
  p_library uuid, p_chunks uuid[], p_hashes text[], p_error text, p_waits float8[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_documents uuid[] := pgshelf.lock_documents_of(v_library, p_chunks);
begin
  execute format($sql$
    update pgshelf.chunks_s%s c set embed_error = $4,
      embed_after = case when x.wait is null then 'infinity' else now() + make_interval(secs => x.wait) end
    from unnest($1, $2, $3) x(id, hash, wait)
    where c.id = x.id and c.library_id = $5 and c.embedding is null and md5(c.text) = x.hash $sql$, v_library.shelf)
    using p_chunks, p_hashes, p_waits, p_error, p_library;
  perform pgshelf.documents_written(v_library, v_documents);
end $$;

-- The texts of a document (by id or key) that have a vector already: writing them again need not embed them.
create or replace function pgshelf.embedded_texts(p_library uuid, p_document uuid, p_key text) returns setof text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (pgshelf.library_named(p_library::text)).shelf;
  v_document uuid := coalesce(p_document, (select d.id from pgshelf.documents d where d.library_id = p_library and d.key = p_key));
begin
  return query execute format('select c.text from pgshelf.chunks_s%s c
    where c.library_id = $1 and c.document_id = $2 and c.embedding is not null', v_shelf) using p_library, v_document;
end $$;

-- The chunks of one document that have no vector.
create or replace function pgshelf.pending_chunks(p_library uuid, p_document uuid) returns table (chunk_id uuid, text text)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (pgshelf.library_named(p_library::text)).shelf;
begin
  return query execute format('select c.id, c.text from pgshelf.chunks_s%s c
    where c.library_id = $1 and c.document_id = $2 and c.embedding is null order by c.ordinal', v_shelf) using p_library, p_document;
end $$;
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
-- What analysts read. A chunk counts only where its shelf is its library's.

create or replace view pgshelf.documents_view as
  select l.name as library, d.id, d.key, d.title, d.source, d.metadata, d.version, d.created_at, d.updated_at, d.library_id
  from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id
  where l.deleted_at is null;

create or replace view pgshelf.chunks_view as
  select l.name as library, d.key as document_key, c.id, c.document_id, c.ordinal, c.text, c.metadata, c.embedding,
    case when c.embedding is not null then 'ready' when c.embed_after = 'infinity' then 'failed' else 'pending' end as status,
    c.library_id
  from pgshelf.chunks c
  join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf
  join pgshelf.documents d on d.id = c.document_id
  where l.deleted_at is null;

create or replace view pgshelf.pending_embeddings as
  select l.name as library, c.document_id, c.id as chunk_id, c.ordinal, c.embed_attempts as attempts, c.embed_error as error,
    nullif(c.embed_after, 'infinity') as next_attempt_at, c.embed_after = 'infinity' as failed
  from pgshelf.chunks c
  join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf
  where c.embedding is null and l.deleted_at is null;

-- Numbers of one library; bytes are its own rows as they lie in the tables, without indexes. A view calls functions with
-- the rights of whoever reads it, hence security definer.
create or replace function pgshelf.library_stats(p_library uuid)
  returns table (documents bigint, chunks bigint, pending bigint, failed bigint, bytes bigint)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (pgshelf.library_named(p_library::text)).shelf;
begin
  return query execute format($sql$
    select d.n, c.n, c.pending, c.failed, (d.bytes + c.bytes)::bigint
    from (select count(*) as n, coalesce(sum(pg_column_size(d.*)), 0) as bytes from pgshelf.documents d where d.library_id = $1) d,
      (select count(*) as n, coalesce(sum(pg_column_size(c.*)), 0) as bytes,
         count(*) filter (where c.embedding is null and c.embed_after < 'infinity') as pending,
         count(*) filter (where c.embedding is null and c.embed_after = 'infinity') as failed
       from pgshelf.chunks_s%s c where c.library_id = $1) c $sql$, v_shelf) using p_library;
end $$;

create or replace view pgshelf.libraries_overview as
  select l.name, l.description, s.documents, s.chunks, s.pending, s.failed, s.bytes, l.embedder ->> 'provider' as provider,
    l.embedder ->> 'model' as model, l.dimension, l.metric, l.language, l.shelf, l.metadata, l.created_at, l.id
  from pgshelf.libraries l cross join lateral pgshelf.library_stats(l.id) s
  where l.deleted_at is null;
-- What an analyst reads in psql (\d+, \df+).

comment on view pgshelf.libraries_overview is 'Every library with its numbers: documents, chunks, pending and failed embeddings, bytes.';
comment on view pgshelf.documents_view is 'Every document with the name of its library; join your tables to its id.';
comment on column pgshelf.documents_view.version is 'Grows with every change of the document or its chunks.';
comment on view pgshelf.chunks_view is 'Every chunk with the name of its library and the key of its document. To search, call pgshelf.search.';
comment on column pgshelf.chunks_view.status is 'ready; pending: waits for its vector; failed: given up, see pending_embeddings.error.';
comment on view pgshelf.pending_embeddings is 'Chunks that wait for a vector, how often it was tried and why it failed.';

comment on function pgshelf.search(text, @vector@.vector, int, int, float8, float8, text[]) is
  'The nearest chunks of a library to a vector, best first: select * from pgshelf.search(''handbook'', :embedding, k => 10). '
  'The library is a name or an id; include names what to return: text, metadata, document, embedding.';
comment on function pgshelf.put_document(text, text, text, text[], jsonb, @vector@.vector[], jsonb[], text) is
  'Inserts or replaces the document of a key in the caller''s transaction; the worker embeds chunks that bring no vector. Returns its id.';
comment on function pgshelf.delete_document(text, text, bigint) is
  'Deletes a document, named by its key or its id, with its chunks; a given version must be the current one.';
comment on function pgshelf.library_stats(uuid) is
  'Numbers of the library of an id; libraries_overview shows them for all. Bytes are those of its rows, without indexes.';
-- The public SQL interface, as grants. Nothing else of the schema is for others; shelves are granted to nobody.

revoke all on all routines in schema pgshelf from public;

do $$
begin
  -- a role that could not be created is reported by pgshelf migrate; the rest of the upgrade does not wait for it
  if to_regrole('pgshelf_reader') is not null then
    grant usage on schema pgshelf to pgshelf_reader;
    grant select on pgshelf.libraries_overview, pgshelf.documents_view, pgshelf.chunks_view, pgshelf.pending_embeddings to pgshelf_reader;
    grant execute on function pgshelf.search(text, @vector@.vector, int, int, float8, float8, text[]) to pgshelf_reader;
    grant execute on function pgshelf.library_stats(uuid) to pgshelf_reader;
    -- a business table may hold a foreign key to a document
    grant references (id) on pgshelf.documents to pgshelf_reader;
  end if;
  if to_regrole('pgshelf_writer') is not null then
    grant usage on schema pgshelf to pgshelf_writer;
    grant select on pgshelf.libraries_overview, pgshelf.documents_view, pgshelf.chunks_view, pgshelf.pending_embeddings to pgshelf_writer;
    grant execute on function
      pgshelf.search(text, @vector@.vector, int, int, float8, float8, text[]),
      pgshelf.library_stats(uuid),
      pgshelf.put_document(text, text, text, text[], jsonb, @vector@.vector[], jsonb[], text),
      pgshelf.delete_document(text, text, bigint) to pgshelf_writer;
    grant references (id) on pgshelf.documents to pgshelf_writer;
  end if;
end $$;
