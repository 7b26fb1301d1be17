-- Where a library lives and which index it has, as desired state: what is wanted, what is there, and the steps from one to the
-- other. service/pgshelf/shelves.py takes the steps, each of these functions is one of them and a transaction of its own.

-- What is wrong with a wanted index, said when it is asked for: PS030 for what is no index at all, PS014 for what is impossible
-- for this dimension or metric, with what would work. The limits of dimension are pgvector's.
create or replace function pgshelf.check_index(p_index jsonb, p_dimension int, p_metric text) returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_type text := p_index ->> 'type';
  v_storage text := p_index ->> 'storage';
  v_instead jsonb := pgshelf.index_that_fits(p_dimension, p_metric);
  v_hint text := case when v_instead ->> 'type' = 'flat' and p_dimension <= pgshelf.index_dimensions('halfvec')
      then 'Possible here: flat, which searches exactly, and storage halfvec, if no number of a vector goes beyond 65504.'
    when v_instead ->> 'type' = 'flat' then 'Only flat is possible here: it searches exactly.'
    else format('Possible here: {"type": "hnsw", "storage": "%s"}, and flat, which searches exactly.', v_instead ->> 'storage') end;
begin
  perform pgshelf.check_index_form(p_index);
  if v_type in ('hnsw', 'ivfflat') then
    if v_type = 'ivfflat' and p_metric = 'l1' then
      raise 'there is no ivfflat index for the metric l1' using errcode = 'PS014', hint = v_hint;
    elsif v_storage = 'bit' and p_metric <> 'cosine' then
      raise 'storage bit keeps only the signs of a vector, which say nothing about the metric %', p_metric
        using errcode = 'PS014', hint = v_hint;
    elsif p_dimension > pgshelf.index_dimensions(coalesce(v_storage, 'vector'))
      and (v_storage is not null or v_instead ->> 'type' = 'flat') then
      raise 'an index with the storage % takes at most % dimensions, the library has %', coalesce(v_storage, 'vector'),
        pgshelf.index_dimensions(coalesce(v_storage, 'vector')), p_dimension using errcode = 'PS014', hint = v_hint;
    end if;
  elsif v_type = 'lsh' and p_metric <> 'cosine' then
    raise 'an lsh index compares directions, it serves the metric cosine only, the library has %', p_metric
      using errcode = 'PS014', hint = v_hint;
  elsif v_type = 'kdtree' and p_metric <> 'l2' then
    raise 'a kdtree index serves the metric l2 only, the library has %', p_metric using errcode = 'PS014', hint = v_hint;
  elsif v_type = 'kdtree' and p_dimension > pgshelf.index_dimensions('kdtree') then
    raise 'a kdtree index is of use up to % dimensions, the library has %', pgshelf.index_dimensions('kdtree'), p_dimension
      using errcode = 'PS014', hint = v_hint;
  end if;
end $$;

-- The most dimensions that a storage takes. The kdtree's is measured over 100,000 vectors of texts, their first principal axes, against exact
-- search (benchmarks/indexes.py): they are found 16, 11 and 6 times faster in 2, 3 and 4 dimensions; uniform ones in 6 no faster at all.
create or replace function pgshelf.index_dimensions(p_storage text) returns int
  immutable parallel safe language sql
  as $$ select case p_storage when 'vector' then 2000 when 'halfvec' then 4000 when 'bit' then 64000 when 'kdtree' then 4 end $$;

-- Whether a wanted index is well formed: a known type, only members that the type has, whole numbers within their bounds.
create or replace function pgshelf.check_index_form(p_index jsonb) returns void
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_members constant jsonb := '{"auto": [], "flat": [], "hnsw": ["storage", "m", "ef_construction"], "ivfflat": ["storage", "lists"],
    "lsh": ["bits", "seed", "m", "ef_construction"], "kdtree": []}';
  v_bounds constant jsonb := '{"m": [2, 100], "ef_construction": [4, 1000], "lists": [1, 32768], "bits": [32, 8192],
    "seed": [0, 2147483647]}';
  v_allowed jsonb := v_members -> (p_index ->> 'type');
  v_member record;
begin
  if v_allowed is null then
    raise 'an index has a type: auto, flat, hnsw, ivfflat, lsh or kdtree' using errcode = 'PS030';
  end if;
  for v_member in select m.key, m.value, v_bounds -> m.key as bounds from jsonb_each(p_index - 'type') m loop
    if not v_allowed ? v_member.key then
      raise 'an index of the type % has no %', p_index ->> 'type', v_member.key using errcode = 'PS030',
        hint = case v_allowed when '[]' then 'Send the type alone.' else 'It has ' || (select string_agg(x, ', ')
          from jsonb_array_elements_text(v_allowed) x) || '.' end;
    elsif v_member.key = 'storage' and v_member.value not in ('"halfvec"', '"vector"', '"bit"') then
      raise 'storage is halfvec, vector or bit' using errcode = 'PS030';
    elsif v_member.bounds is not null and (jsonb_typeof(v_member.value) <> 'number'
      or v_member.value::text !~ '^\d{1,10}$'
      or not v_member.value::text::bigint between (v_member.bounds ->> 0)::bigint and (v_member.bounds ->> 1)::bigint) then
      raise '% is a whole number from % to %', v_member.key, v_member.bounds ->> 0, v_member.bounds ->> 1 using errcode = 'PS030';
    end if;
  end loop;
  if coalesce((p_index ->> 'ef_construction')::int, 64) < 2 * coalesce((p_index ->> 'm')::int, 16) then
    raise 'ef_construction is at least twice m' using errcode = 'PS030',
      hint = format('Send ef_construction %s or more.', 2 * coalesce((p_index ->> 'm')::int, 16));
  end if;
end $$;

-- The storage that a dimension and a metric get unless another is asked for. Halfvec under cosine, where vectors are made unit length
-- first; where length counts a number beyond 65504 would be refused at every write, so there it is vector.
create or replace function pgshelf.index_storage(p_dimension int, p_metric text) returns text
  immutable parallel safe language sql
as $$
  select case when p_metric <> 'cosine' then 'vector' when p_dimension <= pgshelf.index_dimensions('halfvec') then 'halfvec'
    else 'bit' end
$$;

-- A wanted index with everything that was left to us. The lists of an ivfflat depend on the data and are chosen when it is built.
create or replace function pgshelf.complete_index(p_index jsonb, p_dimension int, p_metric text) returns jsonb
  immutable parallel safe language sql
as $$
  select case p_index ->> 'type'
    when 'hnsw' then jsonb_build_object('storage', pgshelf.index_storage(p_dimension, p_metric), 'm', 16, 'ef_construction', 64)
    when 'ivfflat' then jsonb_build_object('storage', pgshelf.index_storage(p_dimension, p_metric))
    when 'lsh' then '{"bits": 512, "seed": 0, "m": 16, "ef_construction": 64}'
    else '{}' end || p_index
$$;

-- The index that auto means: hnsw with the storage that fits, flat where none does.
create or replace function pgshelf.index_that_fits(p_dimension int, p_metric text) returns jsonb
  immutable parallel safe language sql
as $$
  select case when p_dimension <= pgshelf.index_dimensions(pgshelf.index_storage(p_dimension, p_metric))
    then pgshelf.complete_index('{"type": "hnsw"}', p_dimension, p_metric) else '{"type": "flat"}' end
$$;

-- The index that a library asks for, in full, whatever its size.
create or replace function pgshelf.index_in_full(p_library pgshelf.libraries) returns jsonb
  immutable parallel safe language sql set search_path = pg_catalog, pg_temp
as $$
  select case p_library.index ->> 'type' when 'auto' then pgshelf.index_that_fits(p_library.dimension, p_library.metric)
    else pgshelf.complete_index(p_library.index, p_library.dimension, p_library.metric) end
$$;

-- The index that a library shall have with so many rows, null for a place on shelf 0 without any. Auto moves out at
-- p_promote_at and back below a quarter of it, lest a library at the border move to and fro; every other type has its own shelf.
-- An ivfflat learns its lists from data, and is not built on fewer than 1,000 vectors.
create or replace function pgshelf.index_target(p_library pgshelf.libraries, p_rows bigint, p_promote_at int) returns jsonb
  immutable parallel safe language sql
as $$
  select case
    when p_library.index ->> 'type' = 'auto' and p_rows < case p_library.shelf when 0 then p_promote_at else p_promote_at / 4 end
      then null
    when p_library.index ->> 'type' = 'ivfflat' and p_rows < 1000 and p_library.index_actual ->> 'type' <> 'ivfflat'
      then '{"type": "flat"}'
    else pgshelf.index_in_full(p_library) end
$$;

-- How many rows of a library there are, as far as the target depends on it: counted no further, over the primary key.
create or replace function pgshelf.rows_that_matter(p_library pgshelf.libraries, p_promote_at int) returns bigint
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
begin
  if p_library.index ->> 'type' not in ('auto', 'ivfflat') then
    return 0;
  end if;
  execute format('select count(*) from (select 1 from pgshelf.chunks_s%s c where c.library_id = $1 %s limit $2) x',
    p_library.shelf, case p_library.index ->> 'type' when 'ivfflat' then 'and c.embedding is not null' else '' end)
    into v_rows using p_library.id, case when p_library.index ->> 'type' = 'ivfflat' then 1000
      when p_library.shelf = 0 then p_promote_at else p_promote_at / 4 end;
  return v_rows;
end $$;

-- How many chunks a library has, counted over the primary key.
create or replace function pgshelf.count_rows(p_library pgshelf.libraries) returns bigint
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
begin
  execute format('select count(*) from pgshelf.chunks_s%s c where c.library_id = $1', p_library.shelf) into v_rows using p_library.id;
  return v_rows;
end $$;

-- About how many rows a shelf has, for nothing: what the statistics collector saw. A shelf is analyzed when it is made; a collector
-- that knows of no analysis has lost what it knew, in a crash or a failover, and saw only what came and went since.
create or replace function pgshelf.shelf_rows(p_shelf int) returns bigint
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case when num_nulls(pg_stat_get_last_analyze_time(c.oid), pg_stat_get_last_autoanalyze_time(c.oid),
      pg_stat_get_last_vacuum_time(c.oid), pg_stat_get_last_autovacuum_time(c.oid)) < 4 then pg_stat_get_live_tuples(c.oid)
    else greatest(0, greatest(c.reltuples, 0)::bigint + pg_stat_get_tuples_inserted(c.oid) - pg_stat_get_tuples_deleted(c.oid)) end
  from pg_class c where c.oid = to_regclass('pgshelf.chunks_s' || p_shelf)
$$;

-- Whether a shelf has about so many chunks with a vector: those without are counted, as far as it depends on them, over their index.
create or replace function pgshelf.holds_vectors(p_shelf int, p_number bigint) returns boolean
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_more bigint := pgshelf.shelf_rows(p_shelf) - p_number;
  v_without bigint;
begin
  if v_more < 0 then
    return false;
  end if;
  execute format('select count(*) from (select 1 from pgshelf.chunks_s%s c where c.embedding is null limit $1) x', p_shelf)
    into v_without using v_more + 1;
  return v_without <= v_more;
end $$;

-- What is to be done for a library: 'promote' to a (new) shelf of its own, 'demote' to shelf 0, 'build' another index where it is,
-- or null; and the index that it shall have then. An ivfflat whose library has grown fourfold is built anew.
create or replace function pgshelf.index_task(p_library pgshelf.libraries, p_rows bigint, p_promote_at int, out task text, out target jsonb)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_next jsonb := (select c.embedder from pgshelf.embedder_changes c where c.library_id = p_library.id and c.phase = 'switching');
begin
  if v_next is not null then
    -- the vectors of another embedder need other rows, on whatever shelf; shelf 0 has room for one kind only
    p_library.dimension := (v_next ->> 'dimension')::int;
    target := coalesce(pgshelf.index_target(p_library, p_rows, p_promote_at), case p_library.shelf when 0 then pgshelf.index_in_full(p_library) end);
    task := case when target is null then 'demote' else 'promote' end;
    return;
  end if;
  target := pgshelf.index_target(p_library, p_rows, p_promote_at);
  task := case
    when p_library.shelf = 0 and target is not null
      then case when p_library.index ->> 'type' = 'auto' and pgshelf.importing(p_library.id) then null else 'promote' end
    when p_library.shelf = 0 then null
    when target is null then 'demote'
    -- the rows of an lsh index hold its codes: another one, or none, needs other rows
    when not p_library.index_actual @> target and 'lsh' in (target ->> 'type', p_library.index_actual ->> 'type') then 'promote'
    when not p_library.index_actual @> target then 'build'
    when target ->> 'type' = 'ivfflat' and pgshelf.holds_vectors(p_library.shelf, 4 * greatest((p_library.index_actual ->> 'rows')::bigint, 1000))
      then 'build' end;
end $$;

-- Asks for an index: checks it, stores it, and says 'building' where there is something to do. The same wish again, after a failure,
-- tries again at once. True where something is to be done.
create or replace function pgshelf.want_index(p_library text, p_index jsonb, p_promote_at int) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.library_named(p_library);
  v_task text;
begin
  perform pgshelf.check_writable(v_library);
  perform pgshelf.check_index(p_index, v_library.dimension, v_library.metric);
  select * into v_library from pgshelf.libraries l where l.id = v_library.id and l.deleted_at is null for no key update;
  if not found then
    raise 'there is no library %', quote_literal(p_library) using errcode = 'PS001';
  end if;
  perform pgshelf.check_index(p_index, (c.embedder ->> 'dimension')::int, v_library.metric)
    from pgshelf.embedder_changes c where c.library_id = v_library.id and c.phase <> 'over';
  v_library.index := p_index;
  select t.task into v_task from pgshelf.index_task(v_library, pgshelf.rows_that_matter(v_library, p_promote_at), p_promote_at) t;
  update pgshelf.libraries l set index = p_index, index_attempts = 0, index_after = now(), index_error = null,
    version = l.version + (l.index <> p_index)::int, updated_at = case when l.index <> p_index then now() else l.updated_at end,
    index_state = case when v_task is not null or l.moving <> 0 then 'building' else pgshelf.index_rest(v_library) end
    where l.id = v_library.id;
  return v_task is not null or v_library.moving <> 0;
end $$;

-- The state of a library for which there is nothing to do.
create or replace function pgshelf.index_rest(p_library pgshelf.libraries) returns text
  immutable parallel safe language sql
as $$
  select case when p_library.index ->> 'type' = 'ivfflat' and p_library.index_actual ->> 'type' <> 'ivfflat' then 'waiting'
    else 'ready' end
$$;

-- What the worker is to look at now: wishes that are due, and moves, whose mover may have died. One scan of libraries.
create or replace function pgshelf.index_due() returns table (library uuid, moving int)
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select l.id, l.moving from pgshelf.libraries l
  where l.moving <> 0 or l.deleted_at is null and l.index_state in ('building', 'failed') and l.index_after <= now()
  order by l.index_after, l.id
$$;

-- Looks at libraries behind p_after, in the order of their ids, whether their size asks for something; counts about p_budget rows
-- and ends there, so that each call is short however many libraries there are. Tells the last one it saw, null at the end of the round.
-- Without a budget it looks at all, and trusts no statistics, which are some seconds old.
create or replace function pgshelf.index_sized(p_after uuid, p_budget int, p_promote_at int, out tasks uuid[], out last uuid)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_left int := p_budget;
  v_rows bigint;
begin
  tasks := '{}';
  for v_library in select * from pgshelf.libraries l where l.id > coalesce(p_after, '00000000-0000-0000-0000-000000000000')
      and l.deleted_at is null and l.moving = 0 and l.index_state in ('ready', 'waiting') and l.index ->> 'type' in ('auto', 'ivfflat')
      order by l.id loop
    if v_left <= 0 then
      return;
    end if;
    last := v_library.id;
    -- a shelf of its own that is known to be far from the border is not counted
    v_left := v_left - 50;
    continue when p_budget is not null and v_library.shelf <> 0 and v_library.index ->> 'type' = 'auto' and v_library.index_actual ->> 'type' <> 'flat'
      and pgshelf.shelf_rows(v_library.shelf) >= p_promote_at / 2;
    v_rows := pgshelf.rows_that_matter(v_library, p_promote_at);
    v_left := v_left - v_rows;
    if (pgshelf.index_task(v_library, v_rows, p_promote_at)).task is not null then
      tasks := tasks || v_library.id;
    end if;
  end loop;
  last := null;
end $$;

-- Begins an attempt: the next one is due in p_wait, should nothing be heard of this one.
create or replace function pgshelf.index_attempt(p_library uuid, p_wait interval) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.libraries l set index_state = 'building', index_attempts = l.index_attempts + 1, index_after = now() + p_wait
    where l.id = p_library
$$;

-- Ends an attempt that failed: the reason is kept, and it is tried again in p_wait.
create or replace function pgshelf.index_failed(p_library uuid, p_error text, p_wait interval) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.libraries l set index_state = 'failed', index_error = left(p_error, 2000), index_after = now() + p_wait
    where l.id = p_library
$$;

-- Says of a library for which there is nothing to do that this is so, unless something else was asked for meanwhile.
create or replace function pgshelf.index_settled(p_library uuid, p_wish jsonb) returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  update pgshelf.libraries l set index_state = pgshelf.index_rest(l), index_error = null, index_attempts = 0
    where l.id = p_library and l.moving = 0 and l.index = p_wish
$$;

-- The fence: whoever returns from here has the library to itself until its transaction ends; every writer is before or behind it.
-- It queues for 100 ms at most, for writers queue behind it: 55P03 then, and the caller comes again. Never any DDL in a fence.
create or replace function pgshelf.fence(p_library uuid) returns pgshelf.libraries
  volatile language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
as $$
declare
  v_library pgshelf.libraries;
begin
  perform pg_advisory_xact_lock(x'6c6962'::int, hashtext(p_library::text));
  select * into v_library from pgshelf.libraries l where l.id = p_library for update;
  return v_library;
end $$;

-- First fence of a move: from now on writers log what they write. Tells the shelf it goes to, 0 or a new one; null if the library
-- was deleted meanwhile, or p_change is no longer the change of its embedder whose vectors are to be on the new shelf.
create or replace function pgshelf.move_begin(p_library uuid, p_own boolean, p_change int default null) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.fence(p_library);
  v_to int := case when p_own then nextval('pgshelf.shelf_seq') else 0 end;
begin
  if v_library.id is null or v_library.deleted_at is not null or v_library.moving <> 0 or v_library.shelf = v_to
    or p_change is distinct from
      (select c.serial from pgshelf.embedder_changes c where c.library_id = p_library and c.phase = 'switching') then
    return null;
  end if;
  delete from pgshelf.move_log m where m.library_id = p_library;
  update pgshelf.libraries l set moving = 1, moving_to = v_to, moving_change = p_change where l.id = p_library;
  return v_to;
end $$;

-- Second fence: the log is finite now, for writers write both shelves. False if the move is not on any more.
create or replace function pgshelf.move_double(p_library uuid, p_to int) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.fence(p_library);
begin
  if (v_library.deleted_at is null and v_library.moving = 1 and v_library.moving_to = p_to) is not true then
    return false;
  end if;
  update pgshelf.libraries l set moving = 2 where l.id = p_library;
  return true;
end $$;

-- Third fence: the library lives on the new shelf. A shelf that it had for itself is dropped when no search can be on its way to it.
create or replace function pgshelf.move_end(p_library uuid, p_to int, p_index jsonb, p_wish jsonb) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries := pgshelf.fence(p_library);
begin
  if (v_library.deleted_at is null and v_library.moving = 2 and v_library.moving_to = p_to and v_library.moving_change is null) is not true then
    return false;
  end if;
  update pgshelf.libraries l set shelf = p_to, moving = 0, moving_to = null, index_actual = p_index, index_after = now()
    where l.id = p_library;
  perform pgshelf.index_settled(p_library, p_wish);
  insert into pgshelf.retired_shelves (shelf) select v_library.shelf where v_library.shelf <> 0;
  -- a claim may have put chunks off on the shelf that was left
  insert into pgshelf.waiting (library_id, xid, due) values (p_library, pg_current_xact_id(), now()) on conflict do nothing;
  return true;
end $$;

-- Gives a move up: the library stays where it is. What was made of the new shelf belongs to nobody then, and is swept away.
create or replace function pgshelf.move_abort(p_library uuid) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgshelf.fence(p_library);
  update pgshelf.libraries l set moving = 0, moving_to = null, moving_change = null where l.id = p_library and l.moving <> 0;
  delete from pgshelf.move_log m where m.library_id = p_library;
end $$;

-- Makes the table of a shelf, not yet attached. Its check on the dimension lets an index cast without being asked.
-- Vacuum comes earlier than elsewhere: dead rows use up the candidates of a vector index.
create or replace function pgshelf.make_shelf(p_shelf int, p_dimension int) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('create table pgshelf.chunks_s%1$s (
    like pgshelf.chunks including defaults including storage including generated including constraints including comments,
    constraint chunks_s%1$s_shelf_check check (shelf = %1$s),
    constraint chunks_s%1$s_dimension_check check (@vector_ident@.vector_dims(embedding) = %2$s))
    with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.1)',
    p_shelf, p_dimension);
  -- the estimates of word searches come from its statistics; MAIN keeps it beside its row, where a score reads it, and lets the text go to
  -- TOAST first, which hits alone read
  execute format('alter table pgshelf.chunks_s%s alter column tsv set statistics 300, alter column tsv set storage main', p_shelf);
end $$;

-- From now on the rows of a shelf hold their codes under the planes of an lsh index.
create or replace function pgshelf.keep_codes(p_shelf int, p_serial int) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('create trigger code_written before insert or update of embedding on pgshelf.chunks_s%s
    for each row execute function pgshelf.code_written(%L)', p_shelf, p_serial);
end $$;

-- The statements that give a filled shelf its keys, to be run one by one: those of the partitioned table, so that ATTACH finds them
-- and builds none under its lock, and those for words and for metadata, without a pending list that every search would scan.
create or replace function pgshelf.shelf_keys(p_shelf int) returns setof text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format('alter table pgshelf.chunks_s%1$s add constraint chunks_s%1$s_pkey %2$s', p_shelf, pg_get_constraintdef(k.oid))
    from pg_constraint k where k.conrelid = 'pgshelf.chunks'::regclass and k.contype = 'p'
  union all
  select format('create index %s on pgshelf.chunks_s%s %s', replace(c.relname, 'chunks_', format('chunks_s%s_', p_shelf)), p_shelf,
      substring(pg_get_indexdef(c.oid) from ' (USING .*)$'))
    from pg_index i join pg_class c on c.oid = i.indexrelid
    where i.indrelid = 'pgshelf.chunks'::regclass and not i.indisprimary
  union all
  select format('create index chunks_s%1$s_%2$s_idx on pgshelf.chunks_s%1$s using gin (%2$s%3$s) with (fastupdate = off)',
      p_shelf, x.name, x.class)
    from (values ('tsv', ''), ('metadata', ' jsonb_path_ops')) x(name, class)
$$;

-- Copies the chunks of about p_limit rows' worth of documents, behind p_after and up to p_until, to another shelf; tells the last document,
-- null at the end.
-- Batches need no common snapshot: what is written meanwhile is in the log. On shelf 0 every chunk asks for its document, so those are
-- held, but not waited for (waiting could deadlock): whatever somebody is deleting goes into the log.
create or replace function pgshelf.copy_chunks(p_library uuid, p_to int, p_after uuid, p_until uuid, p_limit int) returns uuid
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_after uuid := coalesce(p_after, '00000000-0000-0000-0000-000000000000');
  v_until uuid := coalesce(p_until, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_last uuid;
  v_held uuid[];
begin
  select * into v_library from pgshelf.libraries l where l.id = p_library;
  v_library.moving_to := p_to;
  execute format('select c.document_id from pgshelf.chunks_s%s c where c.library_id = $1 and c.document_id > $2 and c.document_id <= $3
    order by c.document_id offset $4 limit 1', v_library.shelf) into v_last using p_library, v_after, v_until, p_limit;
  v_until := coalesce(v_last, v_until);
  if p_to = 0 then
    v_held := array(select d.id from pgshelf.documents d where d.library_id = p_library and d.id > v_after and d.id <= v_until
      for key share skip locked);
    insert into pgshelf.move_log (library_id, document_id) select p_library, d.id from pgshelf.documents d
      where d.library_id = p_library and d.id > v_after and d.id <= v_until and d.id <> all (v_held);
  end if;
  execute pgshelf.copying(v_library, 'library_id = $1 and document_id > $2 and document_id <= $3'
    || case when p_to = 0 then ' and document_id = any ($4)' else '' end) using p_library, v_after, v_until, v_held;
  return v_last;
end $$;

-- The columns of a chunk that a move takes along, all but the shelf and what is computed.
create or replace function pgshelf.chunk_columns() returns text
  immutable parallel safe language sql
as $$ select 'place, library_id, document_id, ordinal, id, text, metadata, embedding, language, embed_attempts, embed_after, embed_error' $$;

-- The statement that copies the chunks of a library that fulfil a condition to the shelf it is moving to. On the way to another
-- embedder its vectors take the place of those that are used; a text that it refused is given up, one that has none yet waits.
create or replace function pgshelf.copying(p_library pgshelf.libraries, p_condition text) returns text
  immutable parallel safe language sql
as $$
  select format('insert into pgshelf.chunks_s%1$s (shelf, %2$s) select %1$s, %3$s from pgshelf.chunks_s%4$s c %5$s where %6$s',
    p_library.moving_to, pgshelf.chunk_columns(),
    case when p_library.moving_change is null then pgshelf.chunk_columns() else replace(pgshelf.chunk_columns(),
      'embedding, language, embed_attempts, embed_after, embed_error',
      'n.embedding, language, 0, case when n.error is null then now() else ''infinity'' end, n.error') end, p_library.shelf,
    case when p_library.moving_change is not null then format('left join pgshelf.next_embeddings n
      on n.change = %s and n.hash = sha256(convert_to(c.text, ''UTF8''))', p_library.moving_change) end, p_condition)
$$;

-- The dimension of the vectors on a shelf of a library: while it moves to another embedder, that one's on the new shelf. Null when
-- nobody wants that any more.
create or replace function pgshelf.shelf_dimension(p_library pgshelf.libraries, p_shelf int) returns int
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select case when p_shelf = p_library.moving_to and p_library.moving_change is not null
    then (select (c.embedder ->> 'dimension')::int from pgshelf.embedder_changes c
      where c.serial = p_library.moving_change and c.phase = 'switching')
    else p_library.dimension end
$$;

-- Copies up to p_limit documents of the log once more, now that writers write both shelves; tells how many are left, or -1 if there
-- are some that writers hold. It waits for nobody, so it cannot deadlock. The update makes a deleter with an older snapshot fail,
-- which would leave behind what it cannot see.
create or replace function pgshelf.move_drain(p_library uuid, p_to int, p_limit int) returns bigint
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library pgshelf.libraries;
  v_documents uuid[];
begin
  select * into v_library from pgshelf.libraries l where l.id = p_library;
  v_library.moving_to := p_to;
  select array_agg(x.id) into v_documents from (select d.id from pgshelf.documents d
    where d.id in (select m.document_id from pgshelf.move_log m where m.library_id = p_library) order by d.id
    limit p_limit for no key update skip locked) x;
  -- a document that is gone was committed with its line in the log, so it has been deleted
  v_documents := v_documents || array(select distinct m.document_id from pgshelf.move_log m where m.library_id = p_library
    and not exists (select 1 from pgshelf.documents d where d.id = m.document_id) limit p_limit);
  update pgshelf.documents d set updated_at = d.updated_at where d.id = any (v_documents);
  execute format('delete from pgshelf.chunks_s%s where library_id = $1 and document_id = any ($2)', p_to) using p_library, v_documents;
  execute pgshelf.copying(v_library, 'library_id = $1 and document_id = any ($2)') using p_library, v_documents;
  delete from pgshelf.move_log m where m.library_id = p_library and m.document_id = any (v_documents);
  return case when coalesce(cardinality(v_documents), 0) = 0 and exists (select 1 from pgshelf.move_log m where m.library_id = p_library)
    then -1 else (select count(*) from pgshelf.move_log m where m.library_id = p_library) end;
end $$;

-- Deletes up to p_limit rows on shelf 0 of a library that lives elsewhere; tells how many.
create or replace function pgshelf.reap_left_over(p_library uuid, p_limit int) returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows int;
begin
  delete from pgshelf.chunks_s0 c where c.ctid = any (array(select x.ctid from pgshelf.chunks_s0 x
    join pgshelf.libraries l on l.id = x.library_id and l.shelf <> 0 and l.moving = 0
    where x.library_id = p_library limit p_limit));
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;

-- How many vectors there are on a shelf.
create or replace function pgshelf.shelf_vectors(p_shelf int) returns bigint
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
begin
  execute format('select count(embedding) from pgshelf.chunks_s%s', p_shelf) into v_rows;
  return v_rows;
end $$;

-- A new index for a shelf: its number, its planes if it has any, and everything else that was left open. Committed before the
-- index is built, which is computed from it.
create or replace function pgshelf.new_index(p_index jsonb, p_shelf int, p_dimension int, p_memory bigint) returns jsonb
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial int;
  v_rows bigint := pgshelf.shelf_vectors(p_shelf);
begin
  if p_index ->> 'type' = 'flat' then
    return p_index;
  end if;
  v_serial := nextval('pgshelf.index_seq');
  if p_index ->> 'type' = 'ivfflat' and not p_index ? 'lists' then
    p_index := p_index || jsonb_build_object('lists',
      pgshelf.index_lists(v_rows, pgshelf.index_bytes(p_index, p_dimension), p_memory));
  elsif p_index ->> 'type' = 'lsh' then
    perform pgshelf.make_planes(v_serial, (p_index ->> 'bits')::int, (p_index ->> 'seed')::int, p_dimension);
  elsif p_index ->> 'type' = 'kdtree' then
    p_index := p_index || jsonb_build_object('axes', pgshelf.principal_axes(p_shelf, p_dimension, v_rows));
  end if;
  return p_index || jsonb_build_object('serial', v_serial, 'rows', v_rows);
end $$;

-- How many lists an ivfflat over so many vectors has: three times the square root, and no fewer than a thousandth, as far as the memory of a
-- build allows. Of 100,000 chunks (bare scans, 100 queries): with twice the square root a search takes 5.5 ms and the index 17 s, with three
-- times 4.6 ms and 40 s, with four times (on a busy machine) 4.4 ms and 64 s, for about the same recall. k-means keeps 50 vectors a list, 10,000 at least, and one number
-- for each of them and each list.
create or replace function pgshelf.index_lists(p_rows bigint, p_bytes int, p_memory bigint) returns int
  immutable parallel safe language sql
as $$
  select greatest(1, least(32768, greatest(10, p_rows / 1000, 3 * sqrt(p_rows)), (p_memory / 12500 - p_bytes) / 4,
    (sqrt(2500.0 * p_bytes * p_bytes + 800.0 * p_memory) - 50.0 * p_bytes) / 410))::int
$$;

-- Bytes of a vector as an index keeps it.
create or replace function pgshelf.index_bytes(p_index jsonb, p_dimension int) returns int
  immutable parallel safe language sql
as $$
  select 8 + case when p_index ->> 'type' = 'lsh' then (p_index ->> 'bits')::int / 8 when p_index ->> 'storage' = 'bit' then p_dimension / 8
    when p_index ->> 'storage' = 'halfvec' then p_dimension * 2 else p_dimension * 4 end
$$;

-- Hyperplanes through the origin, their normals drawn from a rotation-invariant distribution: two vectors lie on different sides of
-- one with a probability proportional to their angle. As many of them as there are dimensions are made orthogonal to each other
-- (Ji, Li, Yan, Zhang, Tian: Super-Bit Locality-Sensitive Hashing, NIPS 2012), which leaves that so and estimates the angle better: by
-- 512 of them, 98.6 % of the ten nearest of 100,000 texts are among the 300 with the most alike codes; by independent ones 96.9 %.
-- One plane after the other, and sums in order, so that equal seeds give equal planes.
create or replace function pgshelf.make_planes(p_serial int, p_bits int, p_seed int, p_dimension int) returns void
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_plane @vector@.vector;
  v_first int;
begin
  perform setseed(p_seed / 2147483648.0);
  for v_number in 1 .. p_bits loop
    v_first := v_number - (v_number - 1) % p_dimension;
    v_plane := @vector@.l2_normalize(array(select random_normal() from generate_series(1, p_dimension))::@vector@.vector);
    v_plane := @vector@.l2_normalize(v_plane operator(@vector@.-) coalesce(
      (select @vector@.sum(x.plane operator(@vector@.*)
          array_fill(-(v_plane operator(@vector@.<#>) x.plane), array[p_dimension])::@vector@.vector order by x.number)
        from pgshelf.planes x where x.serial = p_serial and x.number >= v_first),
      array_fill(0, array[p_dimension])::@vector@.vector));
    insert into pgshelf.planes (serial, number, plane) values (p_serial, v_number, v_plane);
  end loop;
end $$;

-- Two orthonormal axes of largest variance, from a sample of about 2,000 vectors. They are shortened by 1e-6, beyond what rounding can
-- add, so that a distance in their plane is never larger than the distance itself.
create or replace function pgshelf.principal_axes(p_shelf int, p_dimension int, p_rows bigint) returns jsonb
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_covariance float8[];
  v_first float8[];
  v_second float8[];
begin
  execute format($sql$
    with sample as materialized (select c.embedding::real[] as v from pgshelf.chunks_s%s c tablesample bernoulli ($1) repeatable (0)
      where c.embedding is not null)
    select array_agg(coalesce(x.covariance, 0) order by i, j) from (
      select i, j, (select covar_pop(s.v[i]::float8, s.v[j]::float8) from sample s) as covariance
      from generate_series(1, $2) i, generate_series(1, $2) j) x $sql$, p_shelf)
    into v_covariance using least(100, 100.0 * 2000 / greatest(p_rows, 1))::real, p_dimension;
  v_first := pgshelf.principal_axis(v_covariance, array_fill(0::float8, array[p_dimension]));
  v_second := pgshelf.principal_axis(v_covariance, v_first);
  return (select jsonb_agg((select jsonb_agg(u.x * (1 - 1e-6) order by u.n) from unnest(a.axis) with ordinality u(x, n)) order by a.number)
    from (values (1, v_first), (2, v_second)) a(number, axis));
end $$;

-- The unit vector of largest variance orthogonal to p_not, by power iteration; zero where there is no direction left.
create or replace function pgshelf.principal_axis(p_covariance float8[], p_not float8[]) returns float8[]
  immutable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_size int := cardinality(p_not);
  v_axis float8[];
  v_next float8[];
  v_length float8;
begin
  -- begin with the coordinate of largest variance after what p_not takes of it
  select array_agg((i = best.place)::int::float8 order by i) into v_axis from generate_series(1, v_size) i,
    (select k as place from generate_series(1, v_size) k
      order by abs(p_not[k]) > 0.9, p_covariance[(k - 1) * v_size + k] desc, k limit 1) best;
  for v_round in 0 .. 100 loop
    if v_round > 0 then
      select array_agg((select sum(p_covariance[(i - 1) * v_size + j] * v_axis[j]) from generate_series(1, v_size) j) order by i)
        into v_next from generate_series(1, v_size) i;
    else
      v_next := v_axis;
    end if;
    select array_agg(v_next[i] - p_not[i] * (select sum(v_next[j] * p_not[j]) from generate_series(1, v_size) j) order by i)
      into v_next from generate_series(1, v_size) i;
    v_length := sqrt((select sum(x * x) from unnest(v_next) x));
    exit when v_length < 1e-30;
    select array_agg(v_next[i] / v_length order by i) into v_axis from generate_series(1, v_size) i;
  end loop;
  -- rounding in the last step is taken out once more; in one dimension nothing is left
  select array_agg(v_axis[i] - p_not[i] * (select sum(v_axis[j] * p_not[j]) from generate_series(1, v_size) j) order by i)
    into v_next from generate_series(1, v_size) i;
  v_length := sqrt((select sum(x * x) from unnest(v_next) x));
  return (select array_agg(case when v_length < 1e-6 then 0 else v_next[i] / v_length end order by i) from generate_series(1, v_size) i);
end $$;

-- The statements that build an index on a shelf, to be run one by one; concurrently, searches and writes go on meanwhile. A shelf that
-- nobody uses yet needs none of that, and a build over an expression holds vacuum back either way, as long as it takes. Nobody
-- needs statistics about its column, and each ANALYZE would compute all keys of its sample for them.
create or replace function pgshelf.build_statements(p_library uuid, p_shelf int, p_index jsonb, p_concurrently boolean) returns setof text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select format(s, p_shelf, (p_index ->> 'serial')::int, pgshelf.index_definition(p_index, l.metric, pgshelf.shelf_dimension(l, p_shelf)),
    case when p_concurrently then 'concurrently' end)
  from pgshelf.libraries l, unnest(array[
    'create index %4$s chunks_s%1$s_v%2$s on pgshelf.chunks_s%1$s %3$s',
    'alter index pgshelf.chunks_s%1$s_v%2$s alter column 1 set statistics 0']) s where l.id = p_library
$$;

-- From now on searches use another index of the same shelf. False if the library is not there any more.
create or replace function pgshelf.use_index(p_library uuid, p_shelf int, p_index jsonb, p_wish jsonb) returns boolean
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  update pgshelf.libraries l set index_actual = p_index
    where l.id = p_library and l.shelf = p_shelf and l.moving = 0 and l.deleted_at is null;
  if not found then
    return false;
  end if;
  perform pgshelf.index_settled(p_library, p_wish);
  return true;
end $$;

-- What an index over so many rows will take: bytes on disk, memory while it is built, about how many seconds. The sizes were measured
-- with pgvector 0.8.5, the seconds on two cores of a small server; those are no promise.
create or replace function pgshelf.index_estimate(p_index jsonb, p_rows bigint, p_dimension int, p_memory bigint,
  out bytes bigint, out memory_bytes bigint, out seconds float8)
  immutable parallel safe language sql set search_path = pg_catalog, pg_temp
as $$
  select (p_rows * case v.type when 'flat' then 0 when 'kdtree' then 80 when 'ivfflat' then v.key + 24
      else 1.05 * (v.key + 104 + 12.5 * v.m) end
      + case v.type when 'ivfflat' then 4096 * v.lists else 0 end)::bigint,  -- the last page of each list is half empty
    (case v.type when 'flat' then 0 when 'kdtree' then 0
      when 'ivfflat' then greatest(50.0 * v.lists, 10000) * (v.key + 4.0 * v.lists + 8) + v.lists * (12.0 * v.key + 4.0 * v.lists)
      else p_rows * (v.key + 200 + 33.0 * v.m) end)::bigint,
    p_rows * case v.type when 'flat' then 0 when 'kdtree' then 4e-6 when 'ivfflat' then 1e-7 * v.lists * p_dimension / 20 + 1e-5
      else 1e-6 * v.m * v.ef / 1024 * (60 + v.key / 4.0) end
  from (select p_index ->> 'type' as type, coalesce((p_index ->> 'm')::int, 16) as m, coalesce((p_index ->> 'ef_construction')::int, 64) as ef,
      coalesce((p_index ->> 'lists')::int, pgshelf.index_lists(p_rows, k.key, p_memory)) as lists, k.key
    from (select pgshelf.index_bytes(p_index, p_dimension) as key) k) v
$$;

-- Tables of shelves that belong to nobody: neither shelf nor destination of a library, nor retired within p_grace.
create or replace function pgshelf.lost_shelves(p_grace interval) returns table (shelf int, attached boolean, pending boolean)
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select t.shelf, i.inhrelid is not null, coalesce(i.inhdetachpending, false)
  from (select c.oid, substr(c.relname, 9)::int as shelf from pg_class c where c.relnamespace = 'pgshelf'::regnamespace
    and c.relkind = 'r' and c.relname ~ '^chunks_s[1-9]\d{0,8}$') t
  left join pg_inherits i on i.inhrelid = t.oid
  where not exists (select 1 from pgshelf.libraries l where l.shelf = t.shelf)
    and not exists (select 1 from pgshelf.libraries l where l.moving_to = t.shelf)
    and not exists (select 1 from pgshelf.retired_shelves r where r.shelf = t.shelf and r.retired_at > now() - p_grace)
  order by 1
$$;

-- Whether somebody else builds, cleans or analyzes a table at this moment: everybody may see locks, but not what other roles do.
create or replace function pgshelf.worked_on(p_table oid) returns boolean
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  select exists (select from pg_locks k where k.locktype = 'relation' and k.relation = p_table and k.granted and k.pid <> pg_backend_pid()
    and k.mode = 'ShareUpdateExclusiveLock' and k.database = (select d.oid from pg_database d where d.datname = current_database()))
$$;

-- Vector indexes that no search uses: of another serial than their library's, or invalid while nobody builds on their table, such
-- as what a killed REINDEX CONCURRENTLY leaves. Those of shelves that are moving or retired go with their table. Ask only while
-- holding the lock of builds.
create or replace function pgshelf.lost_indexes() returns setof text
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select t.relname from (
    select c.relname::text, substring(c.relname from '^chunks_s(\d+)')::int as shelf, substring(c.relname from '_v(\d+)')::int as serial,
      i.indisvalid and c.relname !~ '_cc' as good from pg_class c join pg_index i on i.indexrelid = c.oid
    where c.relnamespace = 'pgshelf'::regnamespace and c.relkind = 'i' and c.relname ~ '^chunks_s\d{1,9}_v\d{1,9}(_cc(new|old)\d*)?$'
      and not pgshelf.worked_on(i.indrelid)) t
  where not exists (select 1 from pgshelf.libraries l where t.good and l.shelf = t.shelf and (l.index_actual ->> 'serial')::int = t.serial)
    and exists (select 1 from pgshelf.libraries l where l.shelf = t.shelf)
$$;

-- Libraries whose index is not there, or not valid, whoever took it away: searches are exact until it is built again.
create or replace function pgshelf.miss_indexes() returns int
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows int;
begin
  update pgshelf.libraries l set index_actual = '{"type": "flat"}', index_state = 'building', index_after = now()
    where l.deleted_at is null and l.moving = 0 and l.index_actual ? 'serial' and not exists (select 1 from pg_index i
      where i.indexrelid = to_regclass(format('pgshelf.chunks_s%s_v%s', l.shelf, l.index_actual ->> 'serial')) and i.indisvalid);
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;

-- Forgets planes whose index is gone, and retired shelves and kept statements whose table is. Ask only while holding the lock of builds.
create or replace function pgshelf.forget_lost() returns void
  volatile language sql set search_path = pg_catalog, pg_temp
as $$
  delete from pgshelf.planes p where p.serial not in (select substring(c.relname from '_v(\d+)$')::int from pg_class c
    where c.relnamespace = 'pgshelf'::regnamespace and c.relname ~ '^chunks_s\d{1,9}_v\d{1,9}$');
  delete from pgshelf.retired_shelves r where to_regclass('pgshelf.chunks_s' || r.shelf) is null;
  select pgshelf.forget_kept();
$$;

-- Libraries that live elsewhere and have rows on shelf 0: one probe of the primary key for each.
create or replace function pgshelf.left_over() returns setof uuid
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select l.id from pgshelf.libraries l
  cross join lateral (select 1 from pgshelf.chunks_s0 c where c.library_id = l.id limit 1) c
  where l.shelf <> 0 and l.moving = 0
$$;

-- Libraries on shelves of their own whose word statistics are missing or off by a fifth.
create or replace function pgshelf.words_due(p_limit int) returns setof uuid
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select l.id from pgshelf.libraries l left join pgshelf.word_statistics w on w.library_id = l.id
  where l.shelf <> 0 and l.deleted_at is null
    -- the statistics collector may be behind what was counted: not again and again for that
    and (w.library_id is null or w.made_at < now() - interval '1 minute'
      and abs(pgshelf.shelf_rows(l.shelf) - w.chunks) > 0.2 * w.chunks)
  order by w.made_at nulls first limit p_limit
$$;
