-- Replication as an operator sees it: who follows this server or whom it follows, and how far each of them is.

-- A beat notes a place in the WAL and the time at which it was written, so that distances can be told in seconds, also while
-- nobody else writes. A ring of the last 120 is kept, in one or two pages. The first caller of an interval beats; for the
-- others, on a standby, and where nobody follows, it does nothing. It waits for no disk and no synchronous standby: a beat
-- that is lost is none.
create or replace function pgshelf.beat(p_seconds float8) returns boolean
  volatile security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_n int := floor(extract(epoch from v_now) / p_seconds)::bigint % 120;
begin
  if pg_is_in_recovery() or not exists (select from pg_stat_replication)
    and not exists (select from pg_replication_slots s where s.slot_type = 'physical')
    or exists (select from pgshelf.heartbeats h where h.n = v_n and h.at > v_now - make_interval(secs => 2 * p_seconds)) then
    return false;
  end if;
  perform set_config('synchronous_commit', 'off', true);
  insert into pgshelf.heartbeats as h (n, at, wal) values (v_n, v_now, pg_current_wal_insert_lsn() - '0/0'::pg_lsn)
    on conflict on constraint heartbeats_pkey do update set at = excluded.at, wal = excluded.wal
    where h.at <= v_now - make_interval(secs => 2 * p_seconds);
  return found;
end $$;

-- The beats, for whoever may ask for the status: they are times and places, and no secret.
create or replace function pgshelf.beats() returns table (at timestamptz, wal bigint)
  stable security definer language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return query select h.at, h.wal from pgshelf.heartbeats h;
end $$;

-- The first row is the server that is asked, a primary or a standby; behind it come those that follow it: replicas, and
-- subscribers of its logical slots. It runs with the rights of whoever asks: without pg_read_all_stats (pg_monitor has it)
-- PostgreSQL hides the positions, and `visible` says so.
--
-- lag_seconds is the age of the last moment of which everything is known to be there. Of a replica: nothing but what
-- PostgreSQL itself measured when it has replayed the last beat, else the age of the last beat that it has replayed. Of a
-- standby, by its own clock: the last transaction it replayed, the last beat, or, when it has replayed all that the primary
-- says there is, the primary's last message, which comes every 30 seconds even where nobody beats.
create or replace function pgshelf.replication(max_bytes bigint default 67108864, max_seconds float8 default 60)
  returns table (role text, name text, address text, slot text, state text, sync_state text, timeline int,
    sent_lsn pg_lsn, written_lsn pg_lsn, flushed_lsn pg_lsn, replayed_lsn pg_lsn, lag_bytes bigint, lag_seconds float8,
    last_message_at timestamptz, last_heartbeat_at timestamptz, wal_status text, retained_bytes bigint, conflicts jsonb,
    health text, visible boolean)
  volatile language plpgsql set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_standby boolean := pg_is_in_recovery();
  v_visible boolean := pg_has_role('pg_read_all_stats', 'usage');
  v_received pg_lsn;
  v_here pg_lsn;
  v_last record;
begin
  if v_standby then
    v_received := coalesce(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0');
    v_here := v_received;
  else
    v_here := pg_current_wal_lsn();
  end if;
  select b.at, b.wal into v_last from pgshelf.beats() b order by b.at desc limit 1;

  if v_standby then
    return query
    select 'standby', nullif(current_setting('cluster_name'), ''), w.sender_host || ':' || w.sender_port, nullif(w.slot_name, ''),
      w.status, null, coalesce(w.received_tli, nullif(c.min_recovery_end_timeline, 0), p.timeline_id),
      w.latest_end_lsn, coalesce(w.written_lsn, v_received), coalesce(w.flushed_lsn, v_received), n.replayed,
      n.bytes, s.seconds, w.last_msg_receipt_time, v_last.at, null, null::bigint, d.conflicts,
      case when w.pid is null then 'disconnected'
        -- where the receiver is hidden nobody knows how old the last message is, but it is there, so messages come
        when n.bytes > nullif(max_bytes, 0) or s.seconds > nullif(max_seconds, 0) and (v_visible or n.bytes > 0) then 'lagging'
        else 'healthy' end,
      v_visible
    from pg_control_recovery() c cross join pg_control_checkpoint() p
    left join pg_stat_wal_receiver w on true
    cross join lateral (select pg_last_wal_replay_lsn() as replayed,
      greatest(0, greatest(w.latest_end_lsn, v_received) - coalesce(pg_last_wal_replay_lsn(), '0/0'))::bigint as bytes) n
    cross join lateral (select greatest(0, extract(epoch from clock_timestamp() - greatest(pg_last_xact_replay_timestamp(), v_last.at,
      case when n.bytes = 0 then w.last_msg_send_time end)))::float8 as seconds) s
    left join lateral (select jsonb_build_object('tablespace', f.confl_tablespace, 'lock', f.confl_lock, 'snapshot', f.confl_snapshot,
      'buffer_pin', f.confl_bufferpin, 'deadlock', f.confl_deadlock, 'logical_slot', f.confl_active_logicalslot) as conflicts
      from pg_stat_database_conflicts f where f.datname = current_database()) d on true;
  else
    return query
    select 'primary', nullif(current_setting('cluster_name'), ''), null, null, null, null,
      ('x' || left(pg_walfile_name(v_here), 8))::bit(32)::int, null::pg_lsn, v_here, pg_current_wal_flush_lsn(), null::pg_lsn,
      null::bigint, null::float8, null::timestamptz, v_last.at, null, null::bigint, null::jsonb, 'healthy', v_visible;
  end if;

  return query
  select case when s.slot_type = 'logical' then 'subscriber' else 'replica' end, coalesce(nullif(r.application_name, ''), s.slot_name::text),
    coalesce(host(r.client_addr), case when r.client_port = -1 then 'local' end), s.slot_name::text, r.state, r.sync_state, null::int,
    r.sent_lsn, r.write_lsn, r.flush_lsn, r.replay_lsn, n.bytes, t.seconds, r.reply_time, v_last.at, s.wal_status,
    case when s.restart_lsn is not null then greatest(0, v_here - s.restart_lsn)::bigint end, null::jsonb,
    case when r.pid is null then 'disconnected'
      when not v_visible then null
      when n.bytes > nullif(max_bytes, 0) or t.seconds > nullif(max_seconds, 0) then 'lagging'
      else 'healthy' end,
    v_visible
  from (select * from pg_stat_replication a where coalesce(a.state, '') <> 'backup' and a.application_name <> 'pg_basebackup') r
  full join (select * from pg_replication_slots a where not a.temporary and coalesce(to_jsonb(a) ->> 'synced', 'false') = 'false') s
    on s.active_pid = r.pid
  -- one that is away has what its slot says; pg_receivewal replays nothing
  cross join lateral (select case when r.pid is null then coalesce(s.confirmed_flush_lsn, s.restart_lsn)
    else coalesce(r.replay_lsn, r.flush_lsn, r.write_lsn) end as reached) p
  cross join lateral (select case when p.reached is not null then greatest(0, v_here - p.reached)::bigint end as bytes) n
  cross join lateral (select case when p.reached is null then null
      when v_last.wal is null or p.reached - '0/0'::pg_lsn >= v_last.wal then coalesce(extract(epoch from r.replay_lag), 0)::float8
      else extract(epoch from clock_timestamp() - coalesce(
        (select max(b.at) from pgshelf.beats() b where b.wal <= p.reached - '0/0'::pg_lsn), (select min(b.at) from pgshelf.beats() b)))::float8
      end as seconds) t
  order by 1, 2;
end $$;

create or replace view pgshelf.replication_status as
  select role, name, address, slot, state, sync_state, timeline, sent_lsn, written_lsn, flushed_lsn, replayed_lsn, lag_bytes,
    lag_seconds, last_message_at, last_heartbeat_at, wal_status, retained_bytes, conflicts, health, visible
  from pgshelf.replication();
