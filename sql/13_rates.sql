-- How much a caller may ask in a time, counted for all processes of a service together.

-- Take up to p_wanted requests out of a caller's share: p_quota in p_window seconds, evenly regained, all at once if it
-- was silent for that long. `wait`: seconds until the next can be had, where none was. A share is one moment, that at
-- which all of it will be there again (the generic cell rate algorithm), so what is not in the table is whole.
create or replace function pgshelf.take_requests(
  p_caller text, p_class text, p_wanted int, p_quota int, p_window float8, out granted int, out remaining int, out wait float8
)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_each float8 := p_window / p_quota;
  v_now float8;
  v_whole float8;
  v_left int;
begin
  loop
    select extract(epoch from s.whole_at) into v_whole from pgshelf.rate_shares s
      where s.caller = p_caller and s.class = p_class for no key update;
    exit when found;
    insert into pgshelf.rate_shares (caller, class, whole_at) values (p_caller, p_class, now()) on conflict do nothing;
  end loop;
  -- after the lock, so that it is not before the time of whoever had it; a clock that was set back shuts nobody out for long
  v_now := extract(epoch from clock_timestamp());
  v_whole := least(greatest(v_whole, v_now), v_now + p_window);
  -- a millionth of a request more: floating point must not take one that is there for one that nearly is
  v_left := floor((v_now + p_window - v_whole) / v_each + 1e-6);
  granted := least(p_wanted, v_left);
  remaining := v_left - granted;
  wait := case when granted = 0 then v_whole + v_each - v_now - p_window else 0 end;
  if granted > 0 then
    update pgshelf.rate_shares s set whole_at = to_timestamp(v_whole + granted * v_each)
      where s.caller = p_caller and s.class = p_class;
  end if;
end $$;

-- Forget shares that are whole again, a batch at a time; returns how many.
create or replace function pgshelf.forget_rate_shares() returns bigint
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_count bigint;
begin
  with gone as (
    delete from pgshelf.rate_shares s where (s.caller, s.class) in (
      select x.caller, x.class from pgshelf.rate_shares x where x.whole_at < now() limit 1000 for update skip locked)
    returning 1)
  select count(*) into v_count from gone;
  return v_count;
end $$;
