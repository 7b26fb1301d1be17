-- The change feed. Whoever changes a document writes a row with the change, by triggers; the row has no position yet. Rows that are
-- committed get the next positions of their library, one after the other, from whoever holds a lock for it: so a position never
-- appears behind one that was read, no commit waits for another, and a long transaction holds back nothing but its own changes.

-- Notes that chunks of some documents have got the vectors that they waited for: searches find them now.
create or replace function pgshelf.documents_embedded(p_library uuid, p_documents uuid[]) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.mark_libraries(array[p_library]);
  insert into pgshelf.change_log (library_id, kind, document_id, key, version)
    select d.library_id, 'embedded', d.id, d.key, d.version from pgshelf.documents d
    where d.library_id = p_library and d.id = any (p_documents) order by d.id;
end $$;

-- Notes what changes the answers of a whole library: its name or attributes, its embedder, the index that searches use.
create or replace function pgshelf.library_changed() returns trigger
  security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  insert into pgshelf.change_log (library_id, kind, version) values (new.id, 'library', new.version);
  return null;
end $$;

-- Gives the committed changes of a library their positions, in the order in which they were written. Changes of one document are
-- written one after the other, for writers hold its row until they commit. p_wait waits a moment for another that does the same, so
-- that what was committed before the call has its position afterwards. Made for transactions of its own: the lock lasts as long.
create or replace function pgshelf.stamp_changes(p_library uuid, p_wait boolean, p_limit int default 5000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_timeout text := current_setting('lock_timeout');
  v_last bigint;
  v_stamped int;
begin
  -- an older snapshot would not see the positions that others gave
  if current_setting('transaction_isolation') <> 'read committed' or current_setting('transaction_read_only') = 'on'
    or not exists (select from pgshelf.change_log c where c.library_id = p_library and c.position is null) then
    return 0;
  elsif p_wait then
    perform set_config('lock_timeout', '200ms', true);
    begin
      perform pg_advisory_xact_lock(x'66656564'::int, hashtext(p_library::text));
    exception when lock_not_available then
      perform set_config('lock_timeout', v_timeout, true);
      return 0;
    end;
    perform set_config('lock_timeout', v_timeout, true);
  elsif not pg_try_advisory_xact_lock(x'66656564'::int, hashtext(p_library::text)) then
    return 0;
  end if;
  -- a position that was read must outlive a crash; what this flushes holds the writers' commits, too
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  select coalesce(max(c.position), 0) into v_last from pgshelf.change_log c where c.library_id = p_library;
  update pgshelf.change_log c set position = v_last + x.place, stamped_at = clock_timestamp()
    from (select u.id, row_number() over (order by u.id) as place from (select y.id from pgshelf.change_log y
      where y.library_id = p_library and y.position is null order by y.id limit p_limit) u) x
    where c.library_id = p_library and c.id = x.id;
  get diagnostics v_stamped = row_count;
  return v_stamped;
end $$;

-- Stamps what is committed, whichever library it is of, some thousand changes at a time; tells how many.
create or replace function pgshelf.stamp_all_changes(p_limit int default 5000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
  v_library uuid;
  v_stamped int := 0;
begin
  for v_library in select distinct c.library_id from pgshelf.change_log c where c.position is null loop
    v_stamped := v_stamped + pgshelf.stamp_changes(v_library, false, p_limit - v_stamped);
    exit when v_stamped >= p_limit;
  end loop;
  return v_stamped;
end $$;

-- For readers that wait: stamps what is committed in their libraries, and tells the last position of each that is still there.
create or replace function pgshelf.look_for_changes(p_libraries uuid[]) returns table (library_id uuid, last bigint)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.stamp_changes(u.id, false) from unnest(p_libraries) u(id);
  return query select l.id, (select coalesce(max(c.position), 0) from pgshelf.change_log c where c.library_id = l.id)
    from pgshelf.libraries l where l.id = any (p_libraries) and l.deleted_at is null;
end $$;

-- The next changes of a library, from behind a position; null begins with the oldest that is kept. PS024 when changes behind that
-- position are not kept any more, or when it was never given: then the database was restored to an earlier state.
create or replace function pgshelf.read_changes(p_library uuid, p_after bigint, p_limit int) returns setof pgshelf.change_log
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_first bigint;
  v_last bigint;
begin
  select coalesce(min(c.position), 1), coalesce(max(c.position), 0) into v_first, v_last
    from pgshelf.change_log c where c.library_id = p_library;
  if p_after not between v_first - 1 and v_last then
    raise 'the changes behind this position are not kept' using errcode = 'PS024',
      hint = 'Take a new position, read the library whole, then follow from there.';
  end if;
  return query select c.* from pgshelf.change_log c where c.library_id = p_library and c.position > coalesce(p_after, v_first - 1)
    order by c.position limit p_limit;
end $$;

-- The public way to read, by position. It gives no positions itself, lest a long transaction hold up everybody: a running service
-- does so within a second.
create or replace function pgshelf.changes(library text, after bigint default null, max_rows int default 1000)
  returns table ("position" bigint, kind text, document_id uuid, key text, version bigint, created boolean, stamped_at timestamptz)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return query select c.position, c.kind, c.document_id, c.key, c.version, c.created, c.stamped_at
    from pgshelf.read_changes((pgshelf.library_named(library)).id, after, max_rows) c order by c.position;
end $$;

-- Forgets changes that got their position longer ago than p_keep, the oldest first, but never the last one: from it the next
-- position is counted. At most p_limit of each library; tells how many.
create or replace function pgshelf.prune_changes(p_keep interval, p_limit int default 5000) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library uuid;
  v_rows int;
  v_gone int := 0;
begin
  for v_library in select l.id from pgshelf.libraries l where exists (
      select from (select c.stamped_at from pgshelf.change_log c where c.library_id = l.id and c.position is not null
        order by c.position limit 1) o where o.stamped_at < now() - p_keep) loop
    delete from pgshelf.change_log c where c.library_id = v_library
      and c.position < (select max(x.position) from pgshelf.change_log x where x.library_id = v_library)
      and c.position <= (select max(o.position) from (select x.position, x.stamped_at from pgshelf.change_log x
        where x.library_id = v_library and x.position is not null order by x.position limit p_limit) o
        where o.stamped_at < now() - p_keep);
    get diagnostics v_rows = row_count;
    v_gone := v_gone + v_rows;
  end loop;
  return v_gone;
end $$;
