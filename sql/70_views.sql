-- What analysts read, of the libraries that they were granted; security_barrier keeps their own conditions behind that. A chunk counts
-- only where its shelf is its library's.

create or replace view pgshelf.documents_view with (security_barrier) as
  select l.name as library, d.id, d.key, d.title, d.source, d.metadata, d.version, d.created_at, d.updated_at, d.library_id
  from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id
  where l.deleted_at is null and pgshelf.granted(l.id, 'read');

create or replace view pgshelf.chunks_view with (security_barrier) as
  select l.name as library, d.key as document_key, c.id, c.document_id, c.ordinal, c.text, c.metadata, c.embedding,
    case when c.embedding is not null then 'ready' when c.embed_after = 'infinity' then 'failed' else 'pending' end as status,
    c.library_id
  from pgshelf.chunks c
  join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf
  join pgshelf.documents d on d.id = c.document_id
  where l.deleted_at is null and pgshelf.granted(l.id, 'read');

create or replace view pgshelf.pending_embeddings with (security_barrier) as
  select l.name as library, c.document_id, c.id as chunk_id, c.ordinal, c.embed_attempts as attempts, c.embed_error as error,
    nullif(c.embed_after, 'infinity') as next_attempt_at, c.embed_after = 'infinity' as failed
  from pgshelf.chunks c
  join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf
  where c.embedding is null and l.deleted_at is null and pgshelf.granted(l.id, 'monitor');

-- Numbers of one library; bytes are its own rows as they lie in the tables, without indexes. A view calls functions with
-- the rights of whoever reads it, hence security definer.
create or replace function pgshelf.library_stats(p_library uuid)
  returns table (documents bigint, chunks bigint, pending bigint, failed bigint, bytes bigint)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (pgshelf.library_named(p_library::text, 'monitor')).shelf;
begin
  return query execute format($sql$
    select d.n, c.n, c.pending, c.failed, (d.bytes + c.bytes)::bigint
    from (select count(*) as n, coalesce(sum(pg_column_size(d.*)), 0) as bytes from pgshelf.documents d where d.library_id = $1) d,
      (select count(*) as n, coalesce(sum(pg_column_size(c.*)), 0) as bytes,
         count(*) filter (where c.embedding is null and c.embed_after < 'infinity') as pending,
         count(*) filter (where c.embedding is null and c.embed_after = 'infinity') as failed
       from pgshelf.chunks_s%s c where c.library_id = $1) c $sql$, v_shelf) using p_library;
end $$;

create or replace view pgshelf.libraries_overview with (security_barrier) as
  select l.name, l.description, s.documents, s.chunks, s.pending, s.failed, s.bytes, l.embedder ->> 'provider' as provider,
    l.embedder ->> 'model' as model, l.dimension, l.metric, l.language, l.shelf, l.metadata, l.created_at, l.id
  from pgshelf.libraries l cross join lateral pgshelf.library_stats(l.id) s
  where l.deleted_at is null and pgshelf.granted(l.id, 'monitor');
