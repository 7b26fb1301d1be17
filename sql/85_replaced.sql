-- What an older version made and this one does not, such as a function that takes something else now, goes: `create or replace` would
-- leave it beside the new one. Without cascade: whatever depends on it from outside refuses. All files before this one are of this transaction.
do $$
declare
  v_name text;
begin
  for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace
    and p.xmin <> pg_current_xact_id()::xid and p.prorettype <> 'trigger'::regtype
    -- those of migrations
    and p.proname not in ('words', 'place_of', 'is_id', 'scoped', 'moment', 'num', 'granted', 'granted_libraries') order by p.oid desc loop
    execute 'drop routine ' || v_name;
  end loop;
end $$;
