-- Who may see which library in SQL. The table of grants decides: for the functions that people call, for the views, and by row
-- security for whatever else is granted to somebody. The owner is not held to it, nor are superusers and roles with BYPASSRLS.

-- Who asks: the role that SET ROLE chose, else the one that logged in. Neither changes inside a function with its owner's rights.
create or replace function pgshelf.caller() returns text
  stable parallel restricted language sql
  as $$ select coalesce(nullif(current_setting('role'), 'none'), session_user::text) $$;

-- Whether the caller has a library: to see its numbers ('monitor'), to read it, to write it. A grant counts for the members of its
-- role that inherit its rights. Null means all libraries, those to come included. Inside, current_user is the owner.
create or replace function pgshelf.granted(p_library uuid, p_access text) returns boolean
  stable parallel restricted security definer language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_caller text := pgshelf.caller();
begin
  if pg_has_role(v_caller, current_user, 'usage') then
    return true;
  end if;
  return exists (select from pgshelf.grants g where (g.library_id is null or g.library_id = p_library)
      and pgshelf.suffices(g.access, p_access) and pg_has_role(v_caller, to_regrole(quote_ident(g.role)), 'usage'))
    or exists (select from pg_roles r where r.rolname = v_caller and r.rolbypassrls);
end $$;

-- The libraries that were granted to the caller one by one; for policies, which ask once for a statement and not for each row.
create or replace function pgshelf.granted_libraries(p_access text) returns uuid[]
  stable parallel restricted security definer language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
begin
  return array(select g.library_id from pgshelf.grants g where g.library_id is not null
    and pgshelf.suffices(g.access, p_access) and pg_has_role(pgshelf.caller(), to_regrole(quote_ident(g.role)), 'usage'));
end $$;

-- Whether one kind of access includes another.
create or replace function pgshelf.suffices(p_have text, p_want text) returns boolean
  immutable parallel safe language sql
  as $$ select p_have = p_want or p_have = 'write' or p_want = 'monitor' $$;

-- Raises unless the caller may write the library; only for one that the caller is known to see.
create or replace function pgshelf.check_writable(p_library pgshelf.libraries) returns void
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if not pgshelf.granted(p_library.id, 'write') then
    raise 'role % may not write the library %', quote_ident(pgshelf.caller()), quote_literal(p_library.name) using errcode = '42501',
      hint = 'Its owner may grant that: select pgshelf.grant_library(role, library, ''write'').';
  end if;
end $$;

-- The ids of the libraries that a name, an id or a pattern (team-*) means at this moment; PS001 when there is none.
create or replace function pgshelf.libraries_like(p_library text) returns uuid[]
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids uuid[] := array(select l.id from pgshelf.libraries l where l.deleted_at is null
    and pgshelf.in_scope(array[case when pgshelf.is_id(p_library) then p_library::uuid::text else p_library end], l.id, l.name));
begin
  if v_ids = '{}' then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  return v_ids;
end $$;

-- Lets a role see the numbers of libraries ('monitor'), read or write them; what was granted before on the same libraries is
-- replaced. A pattern means the libraries of now; '*' alone is all libraries, those to come included. Tells how many grants it made.
create or replace function pgshelf.grant_library(role text, library text, access text default 'read') returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_ids uuid[] := case when grant_library.library = '*' then array[null::uuid] else pgshelf.libraries_like(grant_library.library) end;
begin
  if to_regrole(quote_ident(grant_library.role)) is null then
    raise 'there is no role %', quote_literal(grant_library.role) using errcode = '42704';
  elsif grant_library.access in ('monitor', 'read', 'write') is not true then
    raise 'access is %, it can be monitor, read or write', coalesce(quote_literal(grant_library.access), 'null') using errcode = 'PS030';
  end if;
  insert into pgshelf.grants (role, library_id, access) select grant_library.role, u.id, grant_library.access from unnest(v_ids) u(id)
    on conflict on constraint grants_role_library_key do update set access = excluded.access;
  perform pgshelf.audit_role('grant.create', u.id, grant_library.role || ' ' || grant_library.access) from unnest(v_ids) u(id);
  return cardinality(v_ids);
end $$;

-- Takes back what grant_library gave; '*' takes back everything of a role. Tells how many grants there were. Works for roles that
-- are gone, too.
create or replace function pgshelf.revoke_library(role text, library text) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_gone uuid[];
begin
  with gone as (
    delete from pgshelf.grants g where g.role = revoke_library.role
      and (revoke_library.library = '*' or g.library_id = any (pgshelf.libraries_like(revoke_library.library))) returning g.library_id)
  select array_agg(g.library_id) into v_gone from gone g;
  perform pgshelf.audit_role('grant.revoke', u.id, revoke_library.role) from unnest(v_gone) u(id);
  if revoke_library.library <> '*' and exists (select from pgshelf.grants g where g.role = revoke_library.role and g.library_id is null) then
    raise warning 'role % sees all libraries, so this one, too; revoke ''*'' and grant those that it shall see', quote_ident(revoke_library.role);
  end if;
  return coalesce(cardinality(v_gone), 0);
end $$;
