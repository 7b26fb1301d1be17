-- A function that takes something else now than in an older version goes: `create or replace` would leave it beside the new one, to be called
-- by mistake. Only names that the files before this one define, in this transaction: what others put into the schema stays. Without cascade:
-- whatever depends on it from outside refuses. Statements that were kept go, too: an older version made them, and the worker makes them anew.
do $$
declare
  v_name text;
begin
  perform pg_advisory_xact_lock(x'6b657074'::int, 0); -- of pgshelf.keep_statements
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace and p.xmin <> pg_current_xact_id()::xid
    and (p.proname ~ '^kept_s\d+_' or exists (select 1 from pg_proc n where n.pronamespace = p.pronamespace and n.proname = p.proname
      and n.xmin = pg_current_xact_id()::xid))
    order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
end $$;
