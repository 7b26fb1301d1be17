-- Embedding as desired state: a chunk without a vector is the request. Workers claim, embed outside any transaction, store.

-- Takes up to p_limit pending chunks of one library (p_limits names other bounds by provider) for p_lease; another worker may have
-- them when the lease is over. It changes nothing that a promotion must hear of, and so takes no locks. Not of embedders
-- like one in p_busy, nor of libraries that are p_full; those in p_served come last, the first of them first, so that none waits for another's
-- thousands; of the rest that which has waited longest. A batch that failed is taken in ever smaller parts, until a text at fault
-- stands alone. Only libraries in `waiting` that are due are looked at: shelves where nothing waits cost nothing, however many.
create or replace function pgshelf.claim_pending(p_limit int, p_lease interval, p_limits jsonb default '{}', p_busy jsonb default '[]',
  p_full uuid[] default '{}', p_served uuid[] default '{}')
  returns table (library_id uuid, embedder jsonb, chunk_id uuid, text text, attempts int)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_seen uuid[] := '{}';
  v_library uuid;
  v_shelf int;
  v_limit int;
  v_claimed boolean;
begin
  -- every shelf that is looked at stays locked until the transaction ends, so their number is bounded; the next claim goes on
  while cardinality(v_seen) < 32 loop
    v_library := pgshelf.next_waiting(p_busy, p_full || v_seen, p_served);
    exit when v_library is null;
    select l.shelf, coalesce((p_limits ->> (l.embedder ->> 'provider'))::int, p_limit) into v_shelf, v_limit
      from pgshelf.libraries l where l.id = v_library and l.deleted_at is null;
    if found then
      return query execute format($sql$
        with first as (select greatest(1, $1 >> least(2 * c.embed_attempts, 30)) as n from pgshelf.chunks_s%1$s c
          where c.library_id = $3 and c.embedding is null and c.embed_after <= now() order by c.embed_after limit 1),
        mine as (select c.library_id, c.document_id, c.ordinal, c.place, c.shelf
          from pgshelf.chunks_s%1$s c, pgshelf.libraries l
          where l.id = $3 and l.shelf = %1$s and c.library_id = $3 and c.embedding is null and c.embed_after <= now()
          order by c.embed_after limit (select n from first) for update of c skip locked)
        update pgshelf.chunks_s%1$s c set embed_after = now() + $2
          from mine m, pgshelf.libraries l
          where (c.library_id, c.document_id, c.ordinal, c.place, c.shelf) = (m.library_id, m.document_id, m.ordinal, m.place, m.shelf)
            and l.id = c.library_id
          returning c.library_id, l.embedder, c.id, c.text, c.embed_attempts $sql$, v_shelf) using v_limit, p_lease, v_library;
    end if;
    v_claimed := found;
    perform pgshelf.look_again(v_library, v_shelf);
    exit when v_claimed;
    v_seen := v_seen || v_library;
  end loop;
end $$;

-- The library whose pending chunks shall be taken next. While a provider is away, each writer leaves a row in `waiting`: so it is
-- read from library to library, not from row to row.
create or replace function pgshelf.next_waiting(p_busy jsonb, p_passed uuid[], p_served uuid[]) returns uuid
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    with recursive w(library_id) as (
      (select x.library_id from pgshelf.waiting x order by x.library_id limit 1)
      union all
      select (select x.library_id from pgshelf.waiting x where x.library_id > w.library_id order by x.library_id limit 1)
      from w where w.library_id is not null)
    select w.library_id
    from w
    cross join lateral (select x.due from pgshelf.waiting x where x.library_id = w.library_id and x.due <= now() order by x.xid limit 1) d
    left join pgshelf.libraries l on l.id = w.library_id and l.deleted_at is null
    where w.library_id <> all (p_passed) and not exists (select from jsonb_array_elements(p_busy) b where l.embedder @> b.value)
    order by array_position(p_served, w.library_id) nulls first, d.due limit 1);
end $$;

-- Gives claimed chunks a new lease, for as long as they are being embedded; one of nothing gives them back. A text that changed
-- meanwhile is another request. What somebody else works on is passed over: waiting for it could end in a deadlock.
create or replace function pgshelf.lease_again(p_library uuid, p_chunks uuid[], p_hashes text[], p_lease interval) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (select l.shelf from pgshelf.libraries l where l.id = p_library and l.deleted_at is null);
begin
  if v_shelf is null then
    return;
  end if;
  execute format($sql$
    with mine as (select c.library_id, c.document_id, c.ordinal, c.place, c.shelf
      from pgshelf.chunks_s%1$s c join unnest($1, $2) x(id, hash) on x.id = c.id
      where c.library_id = $3 and c.embedding is null and c.embed_after < 'infinity' and md5(c.text) = x.hash
      for update of c skip locked)
    update pgshelf.chunks_s%1$s c set embed_after = now() + $4 from mine m
    where (c.library_id, c.document_id, c.ordinal, c.place, c.shelf) = (m.library_id, m.document_id, m.ordinal, m.place, m.shelf)
    $sql$, v_shelf) using p_chunks, p_hashes, p_library, p_lease;
end $$;

-- Replaces what `waiting` says of a library by one row: when its oldest pending chunk is due; by none when it has none.
-- The order matters: rows first, then the chunks. Whoever wrote a row that is seen had committed, so the look, with a later
-- snapshot, meets the chunk too; whoever commits after the rows were read has a row of his own, which is not removed. Rows are
-- locked because two claims at once could otherwise each remove what the other relies on; one that is locked is left to its holder.
create or replace function pgshelf.look_again(p_library uuid, p_shelf int) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows xid8[] := array(select w.xid from pgshelf.waiting w where w.library_id = p_library for update skip locked);
  v_there boolean;
  v_due timestamptz;
begin
  if p_shelf is not null then
    -- shelf and chunks in one snapshot: a library that has moved in between is left for the next claim
    execute format($sql$
      select (select l.shelf = %1$s from pgshelf.libraries l where l.id = $1),
        (select min(c.embed_after) from pgshelf.chunks_s%1$s c
          where c.library_id = $1 and c.embedding is null and c.embed_after < 'infinity') $sql$, p_shelf)
      into v_there, v_due using p_library;
    if v_there is not true then
      return;
    end if;
  end if;
  delete from pgshelf.waiting w where w.library_id = p_library and w.xid = any (v_rows);
  perform pgshelf.library_waits(p_library, v_due);
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
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
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
  perform pgshelf.documents_embedded(p_library, v_documents) where v_stored > 0;
  perform pgshelf.documents_written(v_library, v_documents);
  return v_stored;
end $$;

-- Says why chunks could not be embedded, and in how many seconds to try again; null gives up, with the reason on the chunk.
-- Unless it counts it was no attempt: the provider was away. A text that changed meanwhile is another request: the reason is not its own.
create or replace function pgshelf.fail_embeddings(
  p_library uuid, p_chunks uuid[], p_hashes text[], p_error text, p_waits float8[], p_counts boolean) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_documents uuid[] := pgshelf.lock_documents_of(v_library, p_chunks);
begin
  execute format($sql$
    update pgshelf.chunks_s%s c set embed_error = $4, embed_attempts = c.embed_attempts + $6::int,
      embed_after = case when x.wait is null then 'infinity' else now() + make_interval(secs => x.wait) end
    from unnest($1, $2, $3) x(id, hash, wait)
    where c.id = x.id and c.library_id = $5 and c.embedding is null and md5(c.text) = x.hash $sql$, v_library.shelf)
    using p_chunks, p_hashes, p_waits, p_error, p_library, p_counts;
  perform pgshelf.documents_written(v_library, v_documents);
end $$;

-- Lets the worker try again what was given up, in all documents of a library or in those that match a filter; tells how many chunks.
-- The reason stays until then.
create or replace function pgshelf.retry_embeddings(library text, filter jsonb default null) returns bigint
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp set jit = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library((pgshelf.library_named(library)).id);
  v_documents uuid[];
  v_retried bigint;
begin
  if v_library.embedder ->> 'provider' = 'none' then
    return 0;
  end if;
  execute format($sql$
    select array(select d.id from pgshelf.documents d
      where $1::int is null and $2::jsonb is not distinct from $2 and d.id in (select c.document_id from pgshelf.chunks_s%s c
        where c.library_id = $3 and c.embedding is null and c.embed_after = 'infinity') and (%s)
      order by d.id for no key update) $sql$, v_library.shelf, pgshelf.document_condition(v_library, coalesce(filter, '{}')))
    into v_documents using null::int, filter, v_library.id;
  execute format($sql$
    update pgshelf.chunks_s%s c set embed_after = now(), embed_attempts = 0
    where c.library_id = $1 and c.document_id = any ($2) and c.embedding is null and c.embed_after = 'infinity' $sql$, v_library.shelf)
    using v_library.id, v_documents;
  get diagnostics v_retried = row_count;
  perform pgshelf.documents_written(v_library, v_documents);
  return v_retried;
end $$;

-- What who writes needs to know of a library, and the texts of a document (by id or key) that have a vector already: writing them
-- again need not embed them.
create or replace function pgshelf.library_config(
  p_library text, p_document uuid, p_key text,
  out id uuid, out embedder jsonb, out chunking jsonb, out change int, out next_embedder jsonb, out texts text[])
  stable language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
  v_document uuid := coalesce(p_document, (select d.id from pgshelf.documents d where d.library_id = v_library.id and d.key = p_key));
begin
  id := v_library.id;
  embedder := v_library.embedder;
  chunking := v_library.chunking;
  select c.serial, c.embedder into change, next_embedder from pgshelf.embedder_changes c where c.library_id = v_library.id and c.phase <> 'over';
  if v_document is not null then
    execute format('select array_agg(c.text) from pgshelf.chunks_s%s c
      where c.library_id = $1 and c.document_id = $2 and c.embedding is not null', v_library.shelf) into texts using v_library.id, v_document;
  end if;
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
