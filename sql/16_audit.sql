-- The audit log: who did what to which library. Rows are written with what they tell of, in its transaction, and only ever added.

-- Adds a row. The library is named by whatever the request named it by: of a name the one that was made last, for it may be
-- deleted in this very transaction. What is no library's name stays as it was said.
create or replace function pgshelf.audit(
  p_action text, p_outcome text, p_kind text, p_principal text, p_principal_id uuid, p_library text, p_document text, p_request_id text,
  p_count bigint, p_detail text) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_id uuid;
  v_name text;
begin
  if pgshelf.is_id(p_library) then
    select l.id, l.name into v_id, v_name from pgshelf.libraries l where l.id = p_library::uuid;
  elsif p_library is not null then
    select l.id, l.name into v_id, v_name from pgshelf.libraries l where l.name = p_library
      order by l.deleted_at is null desc, l.created_at desc limit 1;
  end if;
  insert into pgshelf.audit_log (action, outcome, principal_kind, principal, principal_id, library_id, library, document, request_id, count, detail)
    values (p_action, p_outcome, p_kind, p_principal, p_principal_id, v_id, coalesce(v_name, p_library), p_document, p_request_id, p_count, p_detail);
end $$;

-- Adds a row about what a role of PostgreSQL did.
create or replace function pgshelf.audit_role(p_action text, p_library uuid, p_detail text) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  select pgshelf.audit(p_action, 'done', 'role', pgshelf.caller(), null, p_library::text, null, null, 1, p_detail)
$$;

-- Forgets rows that are older than p_keep, and than a day whatever is said, for the service may call this; at most p_limit of them. Tells how
-- many. Nothing else may take rows away.
create or replace function pgshelf.prune_audit(p_keep interval, p_limit int default 5000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_gone int;
begin
  perform set_config('pgshelf.prunes_audit', 'on', true);
  delete from pgshelf.audit_log a where (a.at, a.id) in (select x.at, x.id from pgshelf.audit_log x
    where x.at < now() - greatest(p_keep, interval '1 day') order by x.at, x.id limit p_limit for update skip locked);
  get diagnostics v_gone = row_count;
  perform set_config('pgshelf.prunes_audit', 'off', true);
  return v_gone;
end $$;

-- Keeps everybody from changing rows by mistake, the owner too, who could take the trigger away.
create or replace function pgshelf.audit_kept() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op <> 'DELETE' or coalesce(current_setting('pgshelf.prunes_audit', true), '') <> 'on' then
    raise 'the audit log is only added to' using errcode = '42501', hint = 'PGSHELF_AUDIT_RETENTION says how long its rows are kept.';
  end if;
  return null;
end $$;

create or replace view pgshelf.audit_view with (security_barrier) as
  select a.at, a.action, a.outcome, a.principal_kind, a.principal, a.principal_id, a.library, a.library_id, a.document, a.count, a.detail,
    a.request_id, a.id
  from pgshelf.audit_log a where (select pgshelf.granted(null, 'monitor'));
