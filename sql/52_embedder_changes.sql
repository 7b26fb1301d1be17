-- Changing the embedder of a library, as desired state: a row of embedder_changes that is not over is the request. Vectors of the new
-- embedder are gathered by text in next_embeddings, beside the rows that searches use; then one transaction switches. Small libraries
-- on shelf 0 are rewritten in it; others move to a new shelf whose rows hold the new vectors from the first on (65_shelves.sql).
-- service/pgshelf/reembedding.py takes the steps.

-- The library, for a search whose vector was made by p_embedder: PS041 if it has another one in the snapshot of the search. Null is
-- a vector that the client brought.
create or replace function pgshelf.embedded_by(p_library text, p_embedder jsonb) returns text
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_embedder is not null and (pgshelf.library_named(p_library)).embedder <> p_embedder then
    raise 'the embedder of the library has changed' using errcode = 'PS041', hint = 'Embed the text once more, by the new one.';
  end if;
  return p_library;
end $$;

-- The same for a write: the library is locked as every writer locks it, so the answer holds until the transaction ends.
create or replace function pgshelf.embedded_with(p_library uuid, p_embedder jsonb) returns uuid
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.check_embedder(pgshelf.lock_library(p_library), p_embedder);
  return p_library;
end $$;

-- PS041 if the library, which the caller has locked, has another embedder than the one that made its vectors; null made none.
create or replace function pgshelf.check_embedder(p_library pgshelf.libraries, p_embedder jsonb) returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if p_library.embedder <> p_embedder then
    raise 'the embedder of the library has changed' using errcode = 'PS041', hint = 'Embed the texts once more, by the new one.';
  end if;
end $$;

-- Asks for another embedder; the one in use calls a change off. The same wish again, after a failure, tries again at once.
-- True where something is to be done.
create or replace function pgshelf.want_embedder(p_library text, p_embedder jsonb) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
begin
  perform pgshelf.check_writable(v_library);
  select * into v_library from pgshelf.libraries l where l.id = v_library.id and l.deleted_at is null for no key update;
  if not found then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  if v_library.embedder <> p_embedder then
    perform pgshelf.check_index(v_library.index, (p_embedder ->> 'dimension')::int, v_library.metric);
    update pgshelf.embedder_changes c set due = now(), error = null, attempts = 0
      where c.library_id = v_library.id and c.phase <> 'over' and c.embedder = p_embedder;
    if found then
      update pgshelf.libraries l set index_after = now() where l.id = v_library.id;
      return true;
    end if;
  end if;
  update pgshelf.embedder_changes c set phase = 'over' where c.library_id = v_library.id and c.phase <> 'over';
  if v_library.embedder = p_embedder then
    return false;
  end if;
  insert into pgshelf.embedder_changes (library_id, embedder) values (v_library.id, p_embedder);
  return true;
end $$;

-- Calls a change off: the library keeps the embedder that it has. False when there is none, or it was too late.
create or replace function pgshelf.cancel_embedder(p_library text) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
begin
  perform pgshelf.check_writable(v_library);
  update pgshelf.embedder_changes c set phase = 'over' where c.library_id = v_library.id and c.phase <> 'over';
  return found;
end $$;

-- The changes that shall go on now and that no session looks after, which holds an advisory lock of the class p_lock.
create or replace function pgshelf.changes_due(p_lock int) returns setof int
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select c.serial from pgshelf.embedder_changes c
  where c.phase <> 'over' and c.due <= now() and not exists (select 1 from pg_locks k where k.locktype = 'advisory' and k.objsubid = 2
    and k.classid = p_lock::oid and k.objid = c.serial::oid
    and k.database = (select d.oid from pg_database d where d.datname = current_database()))
  order by c.due
$$;

-- What the next p_limit or so chunks of a library ask for: texts without a vector of the new embedder, each once. `last` is where to
-- go on, null at the end of the library; `seen` tells how many chunks were looked at, null when nobody wants the change any more.
create or replace function pgshelf.change_walk(p_change int, p_limit int, out texts text[], out seen bigint, out last uuid)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_change pgshelf.embedder_changes;
  v_shelf int;
  v_after uuid;
begin
  select * into v_change from pgshelf.embedder_changes c where c.serial = p_change and c.phase <> 'over';
  select l.shelf into v_shelf from pgshelf.libraries l where l.id = v_change.library_id and l.deleted_at is null;
  if not found then
    return;
  end if;
  v_after := coalesce(v_change.walked, '00000000-0000-0000-0000-000000000000');
  execute format('select c.document_id from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id > $2
    order by c.document_id offset $3 limit 1', v_shelf) into last using v_change.library_id, v_after, p_limit;
  execute format($sql$
    with page as materialized (select c.text, sha256(convert_to(c.text, 'UTF8')) as hash from pgshelf.chunks_s%s c
      where c.library_id = $1 and c.document_id > $2 and ($3 is null or c.document_id <= $3)),
    missing as (select distinct on (p.hash) p.text, p.hash from page p
      where not exists (select 1 from pgshelf.next_embeddings n where n.change = $4 and n.hash = p.hash) order by p.hash)
    select (select count(*) from page), array_agg(m.text) from missing m $sql$, v_shelf)
    into seen, texts using v_change.library_id, v_after, last, p_change;
end $$;

-- Notes that the chunks up to p_last have been seen to; null ends a pass. False when nobody wants the change any more.
create or replace function pgshelf.change_walked(p_change int, p_last uuid, p_seen bigint, p_found bigint) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  update pgshelf.embedder_changes c set walked = p_last, passes = c.passes + (p_last is null)::int,
    done = c.done + case c.passes when 0 then p_seen else 0 end, found = c.found + p_found
    where c.serial = p_change and c.phase <> 'over';
  return found;
end $$;

-- Keeps vectors of the new embedder, or why it refuses a text. Whoever made one of the same text first has made it.
-- False when nobody wants the change any more.
create or replace function pgshelf.change_store(p_change int, p_hashes bytea[], p_embeddings @vector@.vector[], p_errors text[]) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_change pgshelf.embedder_changes;
begin
  select * into v_change from pgshelf.embedder_changes c where c.serial = p_change and c.phase <> 'over' for key share;
  if not found then
    return false;
  end if;
  perform pgshelf.check_vector(x.embedding, (v_change.embedder ->> 'dimension')::int, l.metric, 'of the embedder')
    from pgshelf.libraries l, unnest(p_embeddings) x(embedding) where l.id = v_change.library_id and x.embedding is not null;
  -- in one order, lest two who store the same texts wait for each other
  insert into pgshelf.next_embeddings (change, hash, embedding, error)
    select p_change, x.hash, x.embedding, x.error from unnest(p_hashes, p_embeddings, p_errors) x(hash, embedding, error) order by x.hash
    on conflict on constraint next_embeddings_pkey do nothing;
  if v_change.error is not null then
    update pgshelf.embedder_changes c set error = null, attempts = 0 where c.serial = p_change;
  end if;
  return true;
end $$;

-- Says why the new embedder gave no vectors; it is asked again in p_wait.
create or replace function pgshelf.change_failed(p_change int, p_error text, p_wait interval) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.embedder_changes c set error = left(p_error, 2000), attempts = c.attempts + 1, due = now() + p_wait
    where c.serial = p_change
$$;

-- Whether the rows of a library can be rewritten where they are, in one transaction: at most p_rows on shelf 0.
create or replace function pgshelf.change_in_place(p_library pgshelf.libraries, p_rows int) returns boolean
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select p_library.shelf = 0 and (select count(*) from (
    select 1 from pgshelf.chunks_s0 c where c.library_id = p_library.id limit p_rows + 1) x) <= p_rows
$$;

-- After a pass. 'walk': it found more than p_few texts, look once more (a few times: under steady writes it would never end); 'flip': so few rows on shelf 0 can be rewritten in one
-- transaction; 'move': the reconciler of shelves has been asked to; 'wait': the library is just moving; null: nobody wants it any more.
create or replace function pgshelf.change_next(p_change int, p_few int, p_rows int) returns text
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_change pgshelf.embedder_changes;
  v_library pgshelf.libraries;
begin
  select * into v_change from pgshelf.embedder_changes c where c.serial = p_change and c.phase <> 'over';
  select * into v_library from pgshelf.libraries l where l.id = v_change.library_id and l.deleted_at is null;
  if not found then
    return null;
  elsif v_change.found > p_few and v_change.passes < 5 and v_change.phase = 'embedding' then
    update pgshelf.embedder_changes c set found = 0 where c.serial = p_change;
    return 'walk';
  elsif v_library.moving <> 0 and v_change.phase = 'embedding' then
    return 'wait';
  elsif v_change.phase = 'embedding' and pgshelf.change_in_place(v_library, p_rows) then
    return 'flip';
  elsif v_change.phase = 'embedding' then
    -- in the order of all: the library, then what belongs to it
    perform 1 from pgshelf.libraries l where l.id = v_library.id for no key update;
    update pgshelf.embedder_changes c set phase = 'switching', found = 0 where c.serial = p_change and c.phase = 'embedding';
    if not found then
      return null;
    end if;
    update pgshelf.libraries l set index_state = 'building', index_after = now(), index_attempts = 0, index_error = null
      where l.id = v_library.id;
  end if;
  return 'move';
end $$;

-- Switches a library whose rows are on shelf 0, rewriting them. Tells how many chunks that searches find lack a vector of the new
-- embedder: it switches only if those are at most p_tolerated, which wait for theirs then. -1: not here, or not now; null: nobody wants it.
create or replace function pgshelf.change_flip(p_change int, p_rows int, p_tolerated int) returns bigint
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_change pgshelf.embedder_changes;
  v_library pgshelf.libraries;
  v_missing bigint;
begin
  select * into v_change from pgshelf.embedder_changes c where c.serial = p_change;
  v_library := pgshelf.fence(v_change.library_id);
  select * into v_change from pgshelf.embedder_changes c where c.serial = p_change and c.phase <> 'over' for update;
  if not found or v_library.id is null or v_library.deleted_at is not null then
    return null;
  elsif v_library.moving <> 0 or not pgshelf.change_in_place(v_library, p_rows) then
    return -1;
  end if;
  select count(*) into v_missing from pgshelf.chunks_s0 c where c.library_id = v_library.id and c.embedding is not null
    and not exists (select 1 from pgshelf.next_embeddings n where n.change = p_change and n.hash = sha256(convert_to(c.text, 'UTF8')));
  if v_missing > p_tolerated then
    return v_missing;
  end if;
  perform pgshelf.change_over(v_change);
  -- claims put chunks off without asking the fence: the row is found by its key, whatever version it is at
  update pgshelf.chunks_s0 c set embedding = x.embedding, embed_attempts = 0, embed_error = x.error,
    embed_after = case when x.error is null then now() else 'infinity' end
    from (select o.document_id, o.ordinal, o.place, n.embedding, n.error from pgshelf.chunks_s0 o
      left join pgshelf.next_embeddings n on n.change = p_change and n.hash = sha256(convert_to(o.text, 'UTF8'))
      where o.library_id = v_library.id) x
    where (c.library_id, c.document_id, c.ordinal, c.place, c.shelf) = (v_library.id, x.document_id, x.ordinal, x.place, 0);
  return 0;
end $$;

-- From now on the library has the new embedder; the caller holds the fence and sees to the rows.
create or replace function pgshelf.change_over(p_change pgshelf.embedder_changes) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.libraries l set embedder = p_change.embedder, dimension = (p_change.embedder ->> 'dimension')::int,
    moving_change = null, version = l.version + 1, updated_at = now() where l.id = p_change.library_id;
  update pgshelf.embedder_changes c set phase = 'over' where c.serial = p_change.serial;
$$;

-- Up to p_limit texts that a library, while it moves to its new vectors, has no vector of yet: what was written since the last pass.
-- While it does not move, null: it is walked through again instead.
create or replace function pgshelf.change_stragglers(p_change int, p_limit int) returns text[]
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_texts text[];
begin
  select l.* into v_library from pgshelf.embedder_changes c join pgshelf.libraries l on l.id = c.library_id
    where c.serial = p_change and l.moving_change = p_change;
  if not found then
    return null;
  end if;
  -- documents in the log are copied once more; what was copied or written since without a vector shows on the new shelf
  execute format($sql$
    select coalesce(array_agg(x.text), '{}') from (
      select distinct on (y.hash) y.text from (
        select c.text, sha256(convert_to(c.text, 'UTF8')) as hash from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id in (
          select m.document_id from pgshelf.move_log m where m.library_id = $1)
        %s) y
      where not exists (select 1 from pgshelf.next_embeddings n where n.change = $2 and n.hash = y.hash) order by y.hash limit $3) x $sql$,
    v_library.shelf, case v_library.moving when 2 then format($sql$
        union all select c.text, sha256(convert_to(c.text, 'UTF8')) from pgshelf.chunks_s%s c
        where c.library_id = $1 and c.embedding is null and c.embed_after < 'infinity' $sql$, v_library.moving_to) else '' end)
    into v_texts using v_library.id, p_change, p_limit;
  return v_texts;
end $$;

-- Gives rows on the new shelf the vectors that came too late to be copied, those of up to p_limit documents; tells how many rows.
-- It waits for no writer, so it cannot deadlock.
create or replace function pgshelf.change_fill(p_library uuid, p_to int, p_limit int) returns bigint
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_change int := (select l.moving_change from pgshelf.libraries l where l.id = p_library and l.moving_to = p_to);
  v_documents uuid[];
  v_rows bigint;
begin
  execute format($sql$
    select array(select d.id from pgshelf.documents d where d.id in (
      select c.document_id from pgshelf.chunks_s%s c
      join pgshelf.next_embeddings n on n.change = $2 and n.hash = sha256(convert_to(c.text, 'UTF8'))
      where c.library_id = $1 and c.embedding is null and c.embed_after < 'infinity') order by d.id limit $3 for no key update skip locked)
    $sql$, p_to) into v_documents using p_library, v_change, p_limit;
  execute format($sql$
    update pgshelf.chunks_s%s c set embedding = n.embedding, embed_error = n.error,
      embed_after = case when n.error is null then c.embed_after else 'infinity' end
    from pgshelf.next_embeddings n
    where c.library_id = $1 and c.document_id = any ($3) and c.embedding is null and c.embed_after < 'infinity'
      and n.change = $2 and n.hash = sha256(convert_to(c.text, 'UTF8')) $sql$, p_to) using p_library, v_change, v_documents;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;

-- How many chunks that searches find now would lack their vector on the new shelf.
create or replace function pgshelf.change_missing(p_library uuid, p_to int) returns bigint
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_shelf int := (select l.shelf from pgshelf.libraries l where l.id = p_library);
  v_rows bigint;
begin
  execute format($sql$
    select count(*) from pgshelf.chunks_s%s c join pgshelf.chunks_s%s o
      on (o.library_id, o.document_id, o.ordinal, o.place) = (c.library_id, c.document_id, c.ordinal, c.place)
    where c.library_id = $1 and c.embedding is null and c.embed_after < 'infinity' and o.embedding is not null $sql$, p_to, v_shelf)
    into v_rows using p_library;
  return v_rows;
end $$;

-- The last fence of a move to new vectors: shelf, embedder and dimension change together. Tells how many chunks would lack their
-- vector; it switches only if those are at most p_tolerated, which wait for theirs then. Null if nobody wants it any more.
create or replace function pgshelf.change_end(p_library uuid, p_to int, p_index jsonb, p_wish jsonb, p_tolerated int) returns bigint
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.fence(p_library);
  v_change pgshelf.embedder_changes;
  v_missing bigint;
begin
  select * into v_change from pgshelf.embedder_changes c
    where c.serial = v_library.moving_change and c.phase = 'switching' for update;
  if not found or (v_library.deleted_at is null and v_library.moving = 2 and v_library.moving_to = p_to) is not true then
    return null;
  end if;
  v_missing := pgshelf.change_missing(p_library, p_to);
  if v_missing > p_tolerated then
    return v_missing;
  end if;
  perform pgshelf.change_over(v_change);
  perform pgshelf.move_end(p_library, p_to, p_index, p_wish);
  return 0;
end $$;

-- Takes away at most p_limit vectors of changes that are over, and the changes that have none left; tells how many rows went.
-- What a move is still computed from stays until its mover has noticed.
create or replace function pgshelf.reap_changes(p_limit int default 2000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows int;
  v_gone int;
begin
  delete from pgshelf.next_embeddings n where n.ctid = any (array(select x.ctid from pgshelf.next_embeddings x
    join pgshelf.embedder_changes c on c.serial = x.change and c.phase = 'over' limit p_limit));
  get diagnostics v_gone = row_count;
  delete from pgshelf.embedder_changes c where c.serial in (select x.serial from pgshelf.embedder_changes x
    where x.phase = 'over' and not exists (select 1 from pgshelf.next_embeddings n where n.change = x.serial)
      and not exists (select 1 from pgshelf.libraries l where l.moving_change = x.serial) for update skip locked);
  get diagnostics v_rows = row_count;
  return v_gone + v_rows;
end $$;

-- The embedder of one library: the one that is used, the one that is wanted (null if none else), how far the way is. Chunks on shelves of
-- their own are not counted but estimated. A view calls functions with the rights of whoever reads it, hence security definer.
create or replace function pgshelf.library_embedder(p_library uuid)
  returns table (embedder jsonb, wanted jsonb, state text, progress float8, embedded bigint, total bigint, error text)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library::text, 'monitor');
  v_change pgshelf.embedder_changes;
  v_pending bigint;
begin
  select * into v_change from pgshelf.embedder_changes c where c.library_id = p_library and c.phase <> 'over';
  embedder := v_library.embedder;
  wanted := v_change.embedder;
  total := case v_library.shelf when 0 then pgshelf.count_rows(v_library) else pgshelf.shelf_rows(v_library.shelf) end;
  if wanted is null then
    execute format('select count(*) from pgshelf.chunks_s%s c where c.library_id = $1 and c.embedding is null', v_library.shelf)
      into v_pending using p_library;
    embedded := greatest(total - v_pending, 0);
    state := 'ready';
    progress := 1;
    return next;
    return;
  end if;
  embedded := case v_change.passes when 0 then least(v_change.done, total) else total end;
  error := coalesce(v_change.error, case when v_change.phase = 'switching' then v_library.index_error end);
  state := case when error is null then v_change.phase else 'failed' end;
  -- the move of a large library takes about as long as its vectors did
  progress := case when v_change.phase = 'switching' then 0.5 + 0.5 * (pgshelf.index_progress(v_library)).progress
    else case v_library.shelf when 0 then 0.9 else 0.5 end * coalesce(embedded::float8 / nullif(total, 0), 0) end;
  return next;
end $$;

create or replace view pgshelf.embedder_status with (security_barrier) as
  select l.name as library, e.embedder, e.wanted, e.state, e.progress, e.embedded, e.total, e.error, l.id as library_id
  from pgshelf.libraries l cross join lateral pgshelf.library_embedder(l.id) e
  where l.deleted_at is null and pgshelf.granted(l.id, 'monitor');
