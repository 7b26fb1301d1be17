-- Functions whose form has changed since an older version, where `create or replace` refuses, or leaves two that a call could mean: they go before
-- the files behind this one make them, in the same transaction. 85_replaced.sql sees to the rest.
do $$
begin
  if pg_get_function_arguments(to_regprocedure('pgshelf.compile_filter(pgshelf.libraries, jsonb)')) !~ 'decided' then
    drop function pgshelf.compile_filter(pgshelf.libraries, jsonb);
  end if;
end $$;
drop function if exists pgshelf.search_statement(
  pgshelf.libraries, text, jsonb, boolean, int, text, boolean, boolean, int, boolean, text, record, boolean);
drop function if exists pgshelf.kept_statements(pgshelf.libraries);
