-- The state of a library, a number that stands for everything that decides the answers of its searches: the query cache keeps answers
-- under it. Whoever changes something leaves a random number of his own, a mark, so writers do not meet. The marks that a snapshot sees,
-- joined by XOR, say what was committed for it, in whatever order: two states that are not the same have the same number once in 2^64.
-- Unlike a count this holds across servers, too, and when commits were lost, undone by a restore, or begun anew from a dump.

-- Leaves a mark for each of some libraries. The setting, which ends with the transaction or the savepoint as the marks do, spares
-- pgshelf.chunk_marked the work: what only owners do to chunks needs no second mark. All else marks whatever the setting says.
create or replace function pgshelf.mark_libraries(p_libraries uuid[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
begin
  insert into pgshelf.library_marks (library_id) select distinct u.id from unnest(p_libraries) u(id);
  perform set_config('pgshelf.marked', p_libraries[1]::text, true) where p_libraries <> '{}';
end $$;

-- Any change of a library's own row.
create or replace function pgshelf.library_marked() returns trigger
  security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgshelf.library_marks (library_id) values (new.id);
  return null;
end $$;

-- A chunk that was changed or deleted by itself, not with its document, whose triggers mark. A row on another shelf than its
-- library's is no chunk of it.
create or replace function pgshelf.chunk_marked() returns trigger
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  -- asked again: the trigger's condition was evaluated for all rows before the first came here
  if current_setting('pgshelf.marked', true) is distinct from old.library_id::text then
    perform pgshelf.mark_libraries(array[l.id]) from pgshelf.libraries l where l.id = old.library_id and l.shelf = old.shelf;
  end if;
  return null;
end $$;

-- The state of a library in the caller's snapshot. The functions that search belong to it, and marks of the nil id stand for all. What
-- pgshelf.library_named does is done here in one statement with the rest: each search asks.
create or replace function pgshelf.search_state(library text) returns bigint
  stable strict language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_id uuid;
  v_state bigint;
begin
  select l.id, (select coalesce(bit_xor(m.mark), 0) from pgshelf.library_marks m
      where m.library_id in (l.id, '00000000-0000-0000-0000-000000000000'))
    # uuid_hash_extended(l.id, 1) # (select coalesce(hashtextextended(i.sql_hash, 1), 0) from pgshelf.installation i)
    into v_id, v_state from pgshelf.libraries l
    where l.deleted_at is null and l.id = case when pgshelf.is_id(library) then library::uuid
      else (select n.id from pgshelf.libraries n where n.name = library and n.deleted_at is null) end;
  if not pgshelf.granted(v_id, 'read') or v_id is null then
    perform pgshelf.library_named(library);
  end if;
  return v_state;
end $$;

-- Makes every process forget the answers that it keeps of a library; null: of all.
create or replace function pgshelf.forget_answers(library text default null) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgshelf.library_marks (library_id)
    values (case when library is null then '00000000-0000-0000-0000-000000000000' else (pgshelf.library_named(library)).id end);
end $$;

-- Joins the marks of libraries that have many, at most p_limit of each: no state changes by it. Nobody waits for it, nor it for anybody.
create or replace function pgshelf.join_marks(p_many int default 16, p_limit int default 10000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library uuid;
  v_libraries int := 0;
begin
  for v_library in select m.library_id from pgshelf.library_marks m group by m.library_id having count(*) >= p_many loop
    with gone as (delete from pgshelf.library_marks m where (m.library_id, m.mark) in (
        select x.library_id, x.mark from pgshelf.library_marks x where x.library_id = v_library limit p_limit for update skip locked)
      returning m.mark)
    insert into pgshelf.library_marks (library_id, mark) select v_library, bit_xor(g.mark) from gone g having count(*) > 0;
    v_libraries := v_libraries + 1;
  end loop;
  return v_libraries;
end $$;
