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
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
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
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_chunk pgshelf.chunks := pgshelf.lock_chunk(v_library, p_chunk);
begin
  execute format('delete from pgshelf.chunks_s%s c where c.id = $1 and c.library_id = $2', v_library.shelf)
    using p_chunk, p_library;
  perform pgshelf.documents_written(v_library, array[v_chunk.document_id]);
end $$;
