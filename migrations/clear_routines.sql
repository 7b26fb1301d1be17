-- The way down: everything of sql/ goes, views before functions, all without cascade: whatever depends from outside
-- refuses. The functions of triggers stay, as stubs that fail closed.
-- in the order of writers, who wait from here on
lock table pgshelf.libraries, pgshelf.documents, pgshelf.chunks in access exclusive mode;
do $$
declare
  v_name text;
begin
  for v_name in select c.oid::regclass from pg_class c
    where c.relnamespace = 'pgshelf'::regnamespace and c.relkind = 'v' order by c.oid desc loop
    execute 'drop view ' || v_name;
  end loop;
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype <> 'trigger'::regtype
    and p.proname not in ('words', 'place_of', 'is_id', 'scoped', 'moment', 'num', 'granted', 'granted_libraries') order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.prorettype = 'trigger'::regtype loop
    if exists (select 1 from pg_trigger t where t.tgfoid = v_name::regprocedure) then
      execute format('create or replace function %s returns trigger language plpgsql as %L', v_name,
        $s$ begin raise 'sql/ has not been applied; run pgshelf migrate' using errcode = 'PS900'; end $s$);
    else
      execute 'drop function ' || v_name;
    end if;
  end loop;
end $$;
