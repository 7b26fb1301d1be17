-- Writes that are sent twice: events by their id, answers by their Idempotency-Key.

-- Takes an event: a document of p_key, whose chunks wait for the worker. One that is sent again has no effect, whatever its document
-- has become, but it must be the same (p_hash); PS022 if not, or if somebody else wrote a document of that key.
create or replace function pgshelf.add_event(p_library uuid, p_key text, p_hash bytea, p_metadata jsonb, p_texts text[],
  out document_id uuid, out duplicate boolean)
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library pgshelf.libraries := pgshelf.lock_library(p_library);
  v_hash bytea;
begin
  document_id := gen_random_uuid();
  -- a second one waits here for the first; none of what it finds is changed by the update
  insert into pgshelf.events as e (library_id, key, document_id, hash) values (p_library, p_key, document_id, p_hash)
    on conflict on constraint events_pkey do update set hash = e.hash
    returning e.hash, e.document_id <> add_event.document_id, e.document_id into v_hash, duplicate, document_id;
  if v_hash <> p_hash then
    raise 'the event % was sent before, with another text or other metadata', quote_literal(p_key) using errcode = 'PS022',
      hint = 'An event does not change: send a new one, or change its document.';
  elsif duplicate then
    return;
  end if;
  insert into pgshelf.documents (place, library_id, id, key, metadata, content_hash)
    values (pgshelf.place_of(p_library, document_id, v_library.fanout), p_library, document_id, p_key, p_metadata,
      sha256(convert_to(array_to_json(p_texts)::text, 'UTF8')))
    on conflict on constraint documents_key_key do nothing;
  if not found then
    raise 'there is a document % that is no event', quote_literal(p_key) using errcode = 'PS022',
      hint = 'The id of an event is the key of its document: choose another id.';
  end if;
  perform pgshelf.write_chunks(v_library, document_id, true, p_texts, null, null);
end $$;

-- Forgets answers that were stored longer ago than p_keep, at most p_limit of them; tells how many.
create or replace function pgshelf.prune_idempotency_keys(p_keep interval, p_limit int default 5000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_gone int;
begin
  delete from pgshelf.idempotency_keys k where (k.scope, k.key) in (select x.scope, x.key from pgshelf.idempotency_keys x
    where x.created_at < now() - p_keep order by x.created_at limit p_limit for update skip locked);
  get diagnostics v_gone = row_count;
  return v_gone;
end $$;
