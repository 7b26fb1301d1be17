-- Runs behind a downgrade to base: takes away what prepare.sql made, as far as nobody else uses it by now.
do $$
declare
  v_made pgshelf.installation;
  v_role text;
begin
  select * into v_made from pgshelf.installation;
  drop table pgshelf.installation;
  drop table if exists pgshelf.alembic_version;
  -- a role that could not make the schema found it made for itself, and will want it again
  if has_database_privilege(current_database(), 'create') then
    begin
      drop schema pgshelf;
    exception
      when insufficient_privilege then raise warning 'schema pgshelf belongs to another role and was left, empty';
    end;
  else
    raise warning 'schema pgshelf was left, empty: this role could not make it again';
  end if;
  if v_made.created_extension then
    begin
      drop extension vector;
    exception when dependent_objects_still_exist then null;
    end;
  end if;
  foreach v_role in array v_made.created_roles loop
    -- somebody was made a member, or it was made one: the role is in use
    continue when exists (select 1 from pg_catalog.pg_auth_members m
      where m.roleid = to_regrole(v_role) and m.member <> to_regrole(quote_ident(current_user)) or m.member = to_regrole(v_role));
    begin
      execute format('drop role if exists %I', v_role);
    exception when dependent_objects_still_exist or insufficient_privilege then null;
    end;
  end loop;
end $$;
