-- What /metrics asks of single libraries: short counts only, for it is asked every few seconds.

-- Size and pending embeddings of p_most libraries: the largest with a shelf of their own, whose chunks PostgreSQL's statistics estimate, then
-- those with chunks that wait, then the newest; small ones are counted. bytes are those of a shelf with its indexes. Of chunks that wait no more
-- than 100,000 are counted.
create or replace function pgshelf.library_metrics(p_most int)
  returns table (library text, chunks float8, bytes float8, pending float8, failed float8)
  stable language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_library record;
  v_waiting constant text := 'select count(*) from (select from pgshelf.chunks_s%s c where c.library_id = $1 and c.embedding is null
    and c.embed_after %s ''infinity'' limit 100000) x';
begin
  for v_library in
    select l.id, l.name, l.shelf, pgshelf.shelf_rows(nullif(l.shelf, 0)) as rows from pgshelf.libraries l where l.deleted_at is null
    order by rows desc nulls last, exists (select from pgshelf.waiting w where w.library_id = l.id) desc, l.created_at desc, l.id limit p_most
  loop
    library := v_library.name;
    chunks := v_library.rows;
    bytes := null;
    if v_library.shelf = 0 then
      select count(*) into chunks from pgshelf.chunks_s0 c where c.library_id = v_library.id;
    else
      bytes := pg_total_relation_size(to_regclass('pgshelf.chunks_s' || v_library.shelf));
    end if;
    execute format(v_waiting, v_library.shelf, '<') into pending using v_library.id;
    execute format(v_waiting, v_library.shelf, '=') into failed using v_library.id;
    return next;
  end loop;
end $$;

-- Indexes of shelves that are being built. Of other roles' sessions PostgreSQL shows the progress to few: the owner builds, and is asked.
create or replace function pgshelf.builds_running() returns bigint
  stable language sql set search_path = pg_catalog, pg_temp
as $$
  select count(*) from pg_stat_progress_create_index p join pg_class c on c.oid = p.relid
  where p.datname = current_database() and c.relname ~ '^chunks_s[0-9]+$'
$$;
