-- Keys: who may call, which libraries they see. The secrets themselves never come here, only their hashes.

-- Whether a scope covers a library: null covers all; an entry is the library's id, its present name, or a pattern, in
-- which * stands for any characters. A library that does not exist yet has a name and no id.
create or replace function pgshelf.in_scope(p_scope text[], p_id uuid, p_name text) returns boolean
  immutable parallel safe language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return p_scope is null or coalesce(p_id::text = any (p_scope), false) or coalesce(p_name = any (p_scope), false)
    or exists (select from unnest(p_scope) e(entry) where e.entry like '%*%'
      and p_name like replace(replace(replace(replace(e.entry, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%'));
end $$;

-- The id of a library that both scopes cover; null alike for what they do not cover and what does not exist.
create or replace function pgshelf.library_in_scope(p_library text, p_scope text[], p_within text[]) returns uuid
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid;
  v_name text;
begin
  if pgshelf.is_id(p_library) then
    select l.id, l.name into v_id, v_name from pgshelf.libraries l where l.id = p_library::uuid and l.deleted_at is null;
  else
    select l.id, l.name into v_id, v_name from pgshelf.libraries l where l.name = p_library and l.deleted_at is null;
  end if;
  return case when pgshelf.in_scope(p_scope, v_id, v_name) and pgshelf.in_scope(p_within, v_id, v_name) then v_id end;
end $$;

-- The key of a name or an id; PS004 when there is none. A name means a key that was not revoked.
create or replace function pgshelf.key_named(p_key text) returns pgshelf.keys
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_key pgshelf.keys;
begin
  if pgshelf.is_id(p_key) then
    select * into v_key from pgshelf.keys k where k.id = p_key::uuid;
  else
    select * into v_key from pgshelf.keys k where k.name = p_key and k.revoked_at is null;
  end if;
  if not found then
    raise 'there is no key %', quote_literal(p_key) using errcode = 'PS004';
  end if;
  return v_key;
end $$;

-- The same, kept from changing until the transaction ends; a revoked one is none.
create or replace function pgshelf.lock_key(p_key text) returns pgshelf.keys
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_key pgshelf.keys := pgshelf.key_named(p_key);
begin
  select * into v_key from pgshelf.keys k where k.id = v_key.id and k.revoked_at is null for no key update;
  if not found then
    raise 'there is no key %', quote_literal(p_key) using errcode = 'PS004';
  end if;
  return v_key;
end $$;

create or replace function pgshelf.create_key(
  p_name text, p_role text, p_libraries text[], p_expires_at timestamptz, p_hash bytea, p_hint text
) returns pgshelf.keys
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_key pgshelf.keys;
begin
  insert into pgshelf.keys (name, role, libraries, expires_at) values (p_name, p_role, p_libraries, p_expires_at)
    returning * into v_key;
  insert into pgshelf.key_secrets (hash, key_id, hint) values (p_hash, v_key.id, p_hint);
  return v_key;
end $$;

-- From its commit on no process accepts the key or a token made from it: each asks for every request.
create or replace function pgshelf.revoke_key(p_key text) returns pgshelf.keys
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_key pgshelf.keys := pgshelf.lock_key(p_key);
begin
  update pgshelf.keys k set revoked_at = clock_timestamp() where k.id = v_key.id returning * into v_key;
  return v_key;
end $$;

-- Another secret for the same key. The ones before it, and the tokens made from them, end after p_overlap at the latest.
create or replace function pgshelf.rotate_key(
  p_key text, p_hash bytea, p_hint text, p_overlap interval, p_expires_at timestamptz, p_renew boolean
) returns pgshelf.keys
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_key pgshelf.keys := pgshelf.lock_key(p_key);
begin
  update pgshelf.key_secrets s set expires_at = least(s.expires_at, clock_timestamp() + p_overlap) where s.key_id = v_key.id;
  insert into pgshelf.key_secrets (hash, key_id, hint) values (p_hash, v_key.id, p_hint);
  if p_renew then
    update pgshelf.keys k set expires_at = p_expires_at where k.id = v_key.id returning * into v_key;
  end if;
  return v_key;
end $$;

-- A token: another secret of the key behind p_secret, which ends with that one at the latest, and may be narrower.
create or replace function pgshelf.issue_token(
  p_secret bytea, p_hash bytea, p_hint text, p_role text, p_libraries text[], p_lifetime interval
) returns timestamptz
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_expires_at timestamptz;
begin
  -- a rotation or revocation that is under way comes first
  perform from pgshelf.keys k join pgshelf.key_secrets s on s.key_id = k.id where s.hash = p_secret for share of k;
  insert into pgshelf.key_secrets (hash, key_id, hint, token, role, libraries, expires_at)
    select p_hash, k.id, p_hint, true, p_role, p_libraries, least(s.expires_at, k.expires_at, clock_timestamp() + p_lifetime)
    from pgshelf.key_secrets s join pgshelf.keys k on k.id = s.key_id where s.hash = p_secret
    returning expires_at into strict v_expires_at;
  delete from pgshelf.key_secrets s where s.hash in (
    select x.hash from pgshelf.key_secrets x where x.token and x.expires_at < now() - interval '1 hour'
    limit 100 for update skip locked);
  return v_expires_at;
end $$;

-- At most once a minute for each key, whoever asks.
create or replace function pgshelf.key_used(p_keys uuid[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  update pgshelf.keys k set last_used_at = now() where k.id in (
    select x.id from pgshelf.keys x where x.id = any (p_keys)
      and coalesce(x.last_used_at, '-infinity') < now() - interval '1 minute' order by x.id for no key update skip locked);
end $$;
