-- Writing documents and their chunks. Each function is one caller's whole write, in the caller's transaction.

-- The id of a document named by its id or its key; PS002 when there is none.
create or replace function pgshelf.document_named(p_library uuid, p_document text) returns uuid
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
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
-- neither it is new. A chunk whose text stays keeps its id and, unless a vector is given, its embedding. PS041 when p_embedder, which made
-- vectors, is not the library's; null made none. pending: how many chunks lack a vector.
create or replace function pgshelf.write_document(
  p_library uuid, p_embedder jsonb, p_document uuid, p_key text, p_title text, p_source text, p_metadata jsonb,
  p_texts text[], p_embeddings @vector@.vector[], p_chunk_metadata jsonb[], p_version bigint,
  out document pgshelf.documents, out created boolean, out pending int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_hash bytea := sha256(convert_to(array_to_json(p_texts)::text, 'UTF8'));
  v_id uuid;
  v_have bigint;
begin
  perform pgshelf.check_embedder(v_library, p_embedder);
  if p_document is not null or p_version is not null then
    select d.id, d.version into v_id, v_have from pgshelf.documents d
      where d.library_id = p_library and d.id = coalesce(p_document,
        (select x.id from pgshelf.documents x where x.library_id = p_library and x.key = p_key)) for no key update;
    if not found and p_document is not null then
      raise 'there is no document % in this library', quote_literal(p_document) using errcode = 'PS002',
        hint = 'Ids are given by the server. To choose the name of a new document, use a key that is no UUID.';
    end if;
    perform pgshelf.check_version(v_have, p_version);
  end if;
  if v_id is not null then
    update pgshelf.documents d set title = p_title, source = p_source, metadata = p_metadata, content_hash = v_hash,
      version = d.version + 1, updated_at = now() where d.id = v_id returning d.* into document;
    created := false;
  else
    v_id := gen_random_uuid();
    insert into pgshelf.documents as d (place, library_id, id, key, title, source, metadata, content_hash)
      values (pgshelf.place_of(p_library, v_id, v_library.fanout), p_library, v_id, p_key, p_title, p_source, p_metadata, v_hash)
      on conflict on constraint documents_key_key do update set title = excluded.title, source = excluded.source,
        metadata = excluded.metadata, content_hash = excluded.content_hash, version = d.version + 1, updated_at = now()
      returning d.* into document;
    created := document.id = v_id;
  end if;
  pending := pgshelf.write_chunks(v_library, document.id, created, p_texts, p_embeddings, p_chunk_metadata);
end $$;

-- Makes the chunks of a document, whose row the caller has just written, what the arrays say; tells how many lack a vector.
create or replace function pgshelf.write_chunks(
  p_library pgshelf.libraries, p_document uuid, p_new boolean, p_texts text[], p_embeddings @vector@.vector[], p_metadata jsonb[]) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_count int := coalesce(cardinality(p_texts), 0);
  v_pending int;
begin
  select c.pending into v_pending from pgshelf.put_chunks(p_library, array[p_document], p_new, array_fill(1, array[v_count]),
    array(select generate_series(0, v_count - 1)), p_texts, p_embeddings, p_metadata) c;
  perform pgshelf.documents_written(p_library, array[p_document]);
  return coalesce(v_pending, 0);
end $$;

-- The public way in: insert or replace a document by its key. What has no vector is left to the worker.
create or replace function pgshelf.put_document(
  library text, key text default null, title text default null, texts text[] default '{}', metadata jsonb default '{}',
  embeddings @vector@.vector[] default null, chunk_metadata jsonb[] default null, source text default null) returns uuid
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
begin
  if cardinality(embeddings) <> coalesce(cardinality(texts), 0) or cardinality(chunk_metadata) <> coalesce(cardinality(texts), 0) then
    raise 'embeddings and chunk_metadata, where given, have one element for each of the % texts', coalesce(cardinality(texts), 0)
      using errcode = 'PS030';
  end if;
  return (w.document).id from pgshelf.write_document((pgshelf.library_named(library)).id, null, null, key, title, source,
    coalesce(metadata, '{}'), coalesce(texts, '{}'), embeddings, chunk_metadata, null) w;
end $$;

-- Deletes a document, named by its key or its id, and its chunks; PS002 when there is none.
create or replace function pgshelf.delete_document(library text, document text, version bigint default null) returns void
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
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
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
  v_id uuid := pgshelf.document_named(v_library.id, p_document);
  v_have bigint;
begin
  perform pgshelf.check_writable(v_library);
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
