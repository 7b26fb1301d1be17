-- The embedding cache: what a provider made once is not paid for again. Its keys are computed by the service.

-- The vectors that are there, and marks them as used; at most once an hour, for a hit shall be no write. Rows that another
-- marks are left to it: two lookups never wait for each other. A standby only reads.
create or replace function pgshelf.cached_embeddings(p_keys bytea[]) returns table (key bytea, embedding @vector@.vector)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return query select c.key, c.embedding from pgshelf.embedding_cache c where c.key = any (p_keys);
  if found and current_setting('transaction_read_only') = 'off' then
    update pgshelf.embedding_cache c set used_at = now()
    from (select o.key from pgshelf.embedding_cache o
      where o.key = any (p_keys) and o.used_at < now() - interval '1 hour' for no key update skip locked) x
    where c.key = x.key;
  end if;
end $$;

-- Remembers vectors. In the order of the keys, so that two who bring the same never wait for each other in a circle.
create or replace function pgshelf.cache_embeddings(
  p_keys bytea[], p_embeddings @vector@.vector[], p_provider text, p_model text) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_read_only') = 'off' then
    insert into pgshelf.embedding_cache (key, provider, model, embedding)
      select x.key, p_provider, p_model, x.embedding from unnest(p_keys, p_embeddings) x(key, embedding) order by x.key
      on conflict on constraint embedding_cache_pkey do nothing;
  end if;
end $$;

-- Forgets the least recently used beyond p_rows, at most p_limit of them; returns how many. Two at once would take double.
create or replace function pgshelf.evict_embeddings(p_rows bigint, p_limit int) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_surplus bigint;
  v_gone int;
begin
  if current_setting('transaction_read_only') = 'on' or not pg_try_advisory_xact_lock(hashtext('pgshelf.evict_embeddings')) then
    return 0;
  end if;
  select count(*) - p_rows into v_surplus from pgshelf.embedding_cache;
  if v_surplus <= 0 then
    return 0;
  end if;
  delete from pgshelf.embedding_cache c using (select o.key from pgshelf.embedding_cache o
    order by o.used_at limit least(v_surplus, p_limit) for update skip locked) x where c.key = x.key;
  get diagnostics v_gone = row_count;
  return v_gone;
end $$;
