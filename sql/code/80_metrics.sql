create or replace function rekey.version() returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return '__VERSION__';
comment on function rekey.version is 'Version of pg_rekey in this database.';
grant execute on function rekey.version to rekey_admin, rekey_operator, rekey_auditor, rekey_app;

create or replace function rekey.metrics() returns table (name text, labels jsonb, value double precision)
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  with states as (
    select unnest('{queued,running,paused,verifying,failed}'::text[]) as state
  ), rotated as (
    select r.state, r.trigger, count(*) as n from rekey.rotations r group by r.state, r.trigger
  ), finished as (
    select extract(epoch from r.finished_at - r.created_at) as seconds, r.rows_done
    from rekey.rotations r
    where r.state in ('completed', 'completed_with_failures')
    order by r.finished_at desc limit 1
  ), unhealthy as (
    select k.name,
      case when exists (select from rekey.rotations r where r.keyring_id = k.id and r.state = 'failed') then 'failed'
           when exists (select from rekey.rotation_failures f where f.keyring_id = k.id and f.resolved_at is null) then 'failures'
           when k.next_rotation_at < now() - interval '10 minutes' then 'overdue' end as why
    from rekey.keyrings k where k.retired_at is null
  )
  select m.name, m.labels, m.value::double precision
  from (
    select 'pg_rekey_rotations' as name, jsonb_build_object('state', s.state) as labels,
      (select coalesce(sum(r.n), 0) from rotated r where r.state = s.state) as value
    from states s
    union all select 'pg_rekey_rotations_total', jsonb_build_object('state', r.state, 'trigger', r.trigger), r.n
      from rotated r where r.state not in (select s.state from states s)
    union all select 'pg_rekey_last_rotation_duration_seconds', '{}', f.seconds from finished f
    union all select 'pg_rekey_rotation_rows_total', '{}', coalesce(sum(r.rows_done), 0) from rekey.rotations r
    union all select 'pg_rekey_rotation_failures_open', '{}', count(*) from rekey.rotation_failures f where f.resolved_at is null
    union all select 'pg_rekey_findings', jsonb_build_object('kind', f.kind, 'severity', f.severity), count(*) from rekey._census_findings f group by f.kind, f.severity
    union all select 'pg_rekey_census_rows', jsonb_build_object('kind', g.kind), coalesce((select sum(f.rows) from rekey._census_findings f where f.kind = g.kind), 0)
      from (values ('unopenable'), ('destroyed'), ('unknown')) as g(kind)
    union all select 'pg_rekey_last_census_timestamp_seconds', '{}', coalesce(extract(epoch from w.last_census_at), 0) from rekey._worker w
    union all select 'pg_rekey_oldest_unfinished_rotation_seconds', '{}', coalesce(extract(epoch from now() - min(r.created_at)), 0)
      from rekey.rotations r where rekey._is_under_way(r.state)
    union all select 'pg_rekey_rotation_blocked_seconds', '{}', coalesce(extract(epoch from now() - min(b.since)), 0)
      from (select r.blocked_since as since from rekey.rotations r where rekey._is_under_way(r.state) and r.blocked_since is not null
            union all select s.since from rekey._steps_in_hand() s where s.hangs) b
    union all select 'pg_rekey_last_tick_timestamp_seconds', '{}', coalesce(extract(epoch from w.last_tick_at), 0) from rekey._worker w
    union all select 'pg_rekey_last_tick_duration_seconds', '{}', coalesce(w.last_tick_seconds, 0) from rekey._worker w
    union all select 'pg_rekey_locked', '{}', (w.locked_since is not null)::integer from rekey._worker w
    union all select 'pg_rekey_keyrings', '{}', count(*) from rekey.keyrings k where k.retired_at is null
    union all select 'pg_rekey_keyrings_overdue', '{}', count(*) from rekey.keyrings k where k.next_rotation_at < now() - interval '10 minutes'
    union all select 'pg_rekey_keyrings_unscheduled', '{}', count(*) from rekey.keyrings k where k.retired_at is null and k.rotate_every is null
    union all select 'pg_rekey_keys', jsonb_build_object('state', k.state), count(*) from rekey.encryption_keys k group by k.state
    union all select 'pg_rekey_keyring_unhealthy', jsonb_build_object('keyring', u.name, 'why', u.why), 1 from unhealthy u where u.why is not null
    union all select 'pg_rekey_messages', jsonb_build_object('state', g.state), (select count(*) from rekey._notifications n where n.state = g.state)
      from (values ('waiting'), ('dead')) as g(state)
    union all select 'pg_rekey_audit_entries', '{}', coalesce(max(h.id), 0) from rekey._audit_head h
    union all select 'pg_rekey_kek_age_seconds', '{}', extract(epoch from now() - e.created_at) from rekey.keks e where e.state = 'active'
  ) m;
end;
comment on function rekey.metrics is 'Figures for monitoring (docs/operations.md): name, labels, value. pg-rekey metrics prints them for Prometheus.';
grant execute on function rekey.metrics to rekey_admin, rekey_operator, rekey_auditor;
