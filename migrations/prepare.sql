-- Runs before every upgrade and may run any number of times: the schema, the extension, the roles and what was found or made.
-- @vector_literal@ is the schema where pgvector is, or shall be, installed; @vector_ident@ the same inside a literal.
do $$
begin
  if current_setting('server_version_num')::int < 160000 then
    raise 'pgshelf needs PostgreSQL 16 or newer, this is %', current_setting('server_version') using errcode = 'PS901';
  end if;
  -- "create schema if not exists" would ask for a right on the database even where the schema is already there
  if to_regnamespace('pgshelf') is null then
    create schema pgshelf;
    comment on schema pgshelf is 'pgshelf: libraries of documents, searched by meaning. Query the views, call the functions.';
  end if;
end $$;

create table if not exists pgshelf.installation (
  only_row boolean not null default true,
  created_extension boolean not null default false,
  created_roles text[] not null default '{}',
  sql_hash text,
  constraint installation_pkey primary key (only_row),
  constraint installation_only_row_check check (only_row)
);
comment on table pgshelf.installation is 'What the migrations made outside the tables, so that a downgrade takes away no more.';
insert into pgshelf.installation default values on conflict do nothing;

do $$
declare
  v_schema text;
  v_version int[];
begin
  select n.nspname, string_to_array(regexp_replace(e.extversion, '[^0-9.].*', ''), '.')::int[] into v_schema, v_version
    from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector';
  if not found then
    begin
      create extension vector schema @vector@;
    exception when insufficient_privilege then
      raise 'the extension "vector" is not installed and this role may not install it' using errcode = 'PS902',
        hint = 'Ask a superuser to run in this database: create extension vector schema @vector_ident@;';
    end;
    update pgshelf.installation set created_extension = true;
    select n.nspname, string_to_array(regexp_replace(e.extversion, '[^0-9.].*', ''), '.')::int[] into v_schema, v_version
      from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector';
  end if;
  if v_schema <> @vector_literal@ then
    raise 'pgvector is installed in schema %, but these statements were made for schema %', v_schema, @vector_literal@
      using errcode = 'PS903', hint = format('Make them again with PGSHELF_VECTOR_SCHEMA=%s.', v_schema);
  end if;
  if v_schema = 'pgshelf' then
    raise 'pgvector is installed in schema pgshelf, which holds pgshelf only' using errcode = 'PS903',
      hint = 'Move it: alter extension vector set schema public;';
  end if;
  if v_version < array[0, 8, 0] then
    raise 'pgshelf needs pgvector 0.8.0 or newer, this database has %', array_to_string(v_version, '.') using errcode = 'PS904',
      hint = 'Install a newer pgvector on the server, then run: alter extension vector update;';
  elsif v_version < array[0, 8, 6] then
    raise warning 'pgvector % works, but 0.8.6 or newer is recommended: earlier releases can lose index links after vacuum',
      array_to_string(v_version, '.');
  end if;
end $$;

do $$
declare
  v_role text;
begin
  foreach v_role in array array['pgshelf_reader', 'pgshelf_writer', 'pgshelf_monitor', 'pgshelf_service', 'pgshelf_worker'] loop
    continue when to_regrole(v_role) is not null;
    begin
      execute format('create role %I nologin', v_role);
      update pgshelf.installation set created_roles = created_roles || v_role;
    exception
      when insufficient_privilege then
        raise warning 'role % is missing and this role may not create it; ask the DBA to run: create role % nologin; then run pgshelf migrate again',
          v_role, v_role;
      when duplicate_object or unique_violation then null;  -- made by another database of the cluster at this very moment
    end;
  end loop;
end $$;
