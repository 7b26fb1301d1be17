-- What a foreign key and a type modifier would do elsewhere; the reasons stand in docs/architecture.md.

-- A chunk needs its document, and its vector needs the dimension of the library; without one it waits for the worker.
-- Fires for every shelf, and for every row: that it plans once, and asks again only about a vector that looks wrong, halves what
-- a row costs in a session that plans each statement anew.
create or replace function pgshelf.chunk_written() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_dimension int;
  v_metric text;
  v_marked boolean;
begin
  -- rows of a move to vectors of another embedder have that one's dimension; their table checks it
  select case when new.shelf = l.moving_to and l.moving_change is not null then @vector@.vector_dims(new.embedding) else l.dimension end, l.metric,
      new.shelf <> l.shelf or current_setting('pgshelf.marked', true) is not distinct from l.id::text
    into v_dimension, v_metric, v_marked
    from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id
    where d.id = new.document_id and d.library_id = new.library_id for key share of d;
  if not found then
    raise foreign_key_violation using schema = 'pgshelf', table = 'chunks', constraint = 'chunks_document',
      message = format('document %s does not exist in library %s', new.document_id, new.library_id);
  end if;
  if not v_marked then
    perform pgshelf.mark_libraries(array[new.library_id]);
  end if;
  if new.embedding is null then
    perform pgshelf.library_waits(new.library_id, new.embed_after);
  elsif @vector@.vector_dims(new.embedding) <> v_dimension or not @vector@.vector_norm(new.embedding) between 1e-15 and 1e15 then
    perform pgshelf.check_vector(new.embedding, v_dimension, v_metric, format('of chunk %s', new.ordinal));
  end if;
  return null;
end $$;

-- A chunk that shall be tried sooner than it was to be: after a failure, or because somebody said so with an update.
create or replace function pgshelf.chunk_waits() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.library_waits(new.library_id, new.embed_after);
  return null;
end $$;

-- Notes that a library holds a chunk to embed, from p_due on. The note commits with the chunk or not at all, and it is this
-- transaction's own: writers of one library do not wait for each other here, and a claim removes none that it has not seen.
create or replace function pgshelf.library_waits(p_library uuid, p_due timestamptz) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  -- what was given up waits for nothing; of many chunks written together the first speaks for all
  if coalesce(p_due, 'infinity') = 'infinity' or exists (select 1 from pgshelf.waiting w
    where w.library_id = p_library and w.xid = pg_current_xact_id() and w.due <= p_due) then
    return;
  end if;
  insert into pgshelf.waiting as w (library_id, xid, due) values (p_library, pg_current_xact_id(), p_due)
    on conflict on constraint waiting_pkey do update set due = least(w.due, excluded.due);
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
  language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
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
    perform pgshelf.mark_libraries(array[v_gone.library_id]);
    foreach v_shelf in array case v_library.moving when 2 then array[v_library.shelf, v_library.moving_to]
      else array[v_library.shelf] end loop
      execute format('delete from pgshelf.chunks_s%s where library_id = $1 and document_id = any ($2)', v_shelf)
        using v_gone.library_id, v_gone.ids;
    end loop;
    delete from pgshelf.attribute_values v where v.library_id = v_gone.library_id and v.document_id = any (v_gone.ids);
    if v_library.deleted_at is null then
      insert into pgshelf.change_log (library_id, kind, document_id, key, version)
        select g.library_id, 'delete', g.id, g.key, g.version from gone g where g.library_id = v_gone.library_id;
    end if;
    if v_library.moving = 1 then
      insert into pgshelf.move_log (library_id, document_id) select v_gone.library_id, unnest(v_gone.ids);
    end if;
  end loop;
  return null;
end $$;
