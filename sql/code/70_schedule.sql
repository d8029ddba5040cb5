-- What happens unattended: schedules, and the tick that pg_cron or the orchestrator calls.

create or replace function rekey.set_schedule(keyring text, rotate_every interval, first_at timestamptz = null) returns timestamptz
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_first timestamptz;
begin
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
  end if;
  begin
    v_first := coalesce(first_at, now() + rotate_every);
    if rotate_every is null then
      raise check_violation;
    end if;
    update rekey.keyrings k set rotate_every = set_schedule.rotate_every, next_rotation_at = v_first where k.id = v_keyring.id;
  exception when check_violation or datetime_field_overflow then
    raise exception 'a keyring cannot rotate every % from % on', coalesce(rotate_every::text, 'NULL'), coalesce(first_at::text, 'NULL')
      using errcode = 'invalid_parameter_value', hint = 'The interval is between 1 minute and 36500 days, the first time finite.';
  end;
  perform rekey._audit('schedule.changed', keyring,
    details => jsonb_build_object('rotate_every', rotate_every, 'next_rotation_at', v_first));
  return v_first;
end
$$;
comment on function rekey.set_schedule is
  'Has a keyring rotated every so often (its cryptoperiod: 1 minute to 36500 days). first_at: when first; NULL, the default: after one cryptoperiod. Returns that time. 22023: interval or time cannot be; RK006: retired; RK007: there is none.';
grant execute on function rekey.set_schedule to rekey_admin;

create or replace function rekey.clear_schedule(keyring text = 'default') returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
begin
  if v_keyring.rotate_every is not null then
    update rekey.keyrings k set rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
    perform rekey._audit('schedule.changed', keyring, details => jsonb_build_object('cleared', true));
  end if;
end
$$;
comment on function rekey.clear_schedule is 'Ends the schedule of a keyring. RK007: there is none.';
grant execute on function rekey.clear_schedule to rekey_admin;

create or replace view rekey.schedule_status as
select k.name as keyring, k.tenant_id, k.rotate_every, k.next_rotation_at,
  coalesce(k.next_rotation_at < now() - interval '10 minutes', false) as overdue
from rekey.keyrings k
where k.retired_at is null;
comment on view rekey.schedule_status is 'When each keyring is rotated next; overdue: it should have been 10 minutes ago.';
comment on column rekey.schedule_status.keyring is 'Name of the keyring.';
comment on column rekey.schedule_status.tenant_id is 'Its tenant.';
comment on column rekey.schedule_status.rotate_every is 'Its cryptoperiod; NULL: no schedule.';
comment on column rekey.schedule_status.next_rotation_at is 'When the next scheduled rotation is due.';
comment on column rekey.schedule_status.overdue is 'Whether that was more than 10 minutes ago.';
grant select on rekey.schedule_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.worker_status as
select w.last_tick_at, w.last_tick_seconds, w.locked_since, w.last_error, w.last_census_at
from rekey._worker w;
comment on view rekey.worker_status is 'When the unattended work last ran, how many seconds it took, since when it lacks the KEK, what failed in it, and when rows were last counted.';
comment on column rekey.worker_status.last_tick_at is 'When the last tick ended.';
comment on column rekey.worker_status.last_tick_seconds is 'How long it took.';
comment on column rekey.worker_status.locked_since is 'Since when work waits for the KEK; NULL: it does not.';
comment on column rekey.worker_status.last_error is 'What failed in the last tick; NULL: nothing.';
comment on column rekey.worker_status.last_census_at is 'When every row was last counted.';
grant select on rekey.worker_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._rotate_due() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_due integer[];
begin
  select array_agg(k.id) into v_due
  from (select k.id from rekey.keyrings k
        where k.next_rotation_at <= now()
          and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line)) k;
  if v_due is null then
    return;
  end if;
  perform from rekey._kek();
  perform rekey._lock_kek();
  -- Looked at again under its lock: another tick may have been here.
  v_due := array(select k.id from rekey.keyrings k where k.id = any (v_due) and k.next_rotation_at <= now() order by k.id for no key update);
  perform from rekey._rotate(v_due, 'schedule', null, false);
  update rekey.keyrings k set next_rotation_at = now() + k.rotate_every where k.id = any (v_due);
end
$$;
comment on function rekey._rotate_due is 'Begins the rotations whose time has come; the next one is due a cryptoperiod from now.';

-- Executable by operators because rekey.tick(), which commits, runs with its caller's rights.
create or replace function rekey._tick_duty(duty text, begun timestamptz) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker rekey._worker;
  v_next text;
begin
  -- Before the block that notes errors: what is made up here is nobody's entry.
  if duty is null or duty not in ('schedules', 'destructions', 'census', 'end', 'notifications') then
    raise exception 'there is no such duty' using errcode = 'invalid_parameter_value', hint = 'schedules, destructions, census, end or notifications.';
  end if;
  if coalesce(not isfinite(begun) or begun > clock_timestamp(), true) then
    raise exception 'a tick cannot have begun then' using errcode = 'invalid_parameter_value', hint = 'Give a time that has been.';
  end if;
  perform rekey._refuse_snapshot();
  perform rekey._refuse_hidden();
  select * into v_worker from rekey._worker;
  if not found then
    return null;  -- not set up yet
  end if;
  begin
    case duty
      when 'schedules' then perform rekey._rotate_due();
      when 'destructions' then v_next := rekey._destruction_step(coalesce(now() - v_worker.last_tick_at > interval '1 day', true));
      when 'census' then
        if coalesce(v_worker.last_census_at not between now() - interval '1 day' and now(), true) then
          -- Whoever asks whether a worker is at work sees it by that (75_notify.sql): it may take an hour.
          perform pg_advisory_xact_lock_shared(0, 6);
          perform rekey._census();
        end if;
      when 'end' then
        update rekey._worker w set last_tick_at = clock_timestamp(), last_tick_seconds = extract(epoch from clock_timestamp() - begun),
          last_error = case when w.last_error_at >= begun then w.last_error end
        where w.singleton;
      when 'notifications' then v_next := rekey._collect_notifications();
    end case;
    if duty = 'schedules' and (v_worker.locked_since is not null
        or exists (select from rekey.rotations r where r.state in ('queued', 'running', 'verifying'))) then
      perform from rekey._kek();
      update rekey._worker w set locked_since = null where w.locked_since is not null;
    end if;
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      -- Noted once: whoever has the KEK, the orchestrator's worker for one, will do it.
      if v_worker.locked_since is null then
        update rekey._worker w set locked_since = now() where w.singleton;
      end if;
      -- Once a day at most, also where pg_cron has no KEK and a worker beside it has.
      if coalesce(v_worker.locked_noted_at not between now() - interval '1 day' and now(), true) then
        update rekey._worker w set locked_noted_at = now() where w.singleton;
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
    when others then
      update rekey._worker w set last_error = format('%s: %s', duty, sqlerrm), last_error_at = clock_timestamp()
      where w.singleton;
      -- Whoever may run the worker can make a duty fail, with a lock_timeout for one, and end a tick in between.
      if v_worker.last_error is distinct from format('%s: %s', duty, sqlerrm) and not exists (
          select from rekey.audit_log a
          where a.event = 'rotation.error' and a.at between clock_timestamp() - interval '1 minute' and clock_timestamp()
            and a.details ->> 'duty' = _tick_duty.duty and a.details ->> 'sqlstate' = sqlstate) then
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
      v_next := null;
  end;
  return v_next;
end
$$;
comment on function rekey._tick_duty is 'One duty of rekey.tick(): schedules, destructions (of which one step: search, more, NULL: as rekey._destruction_step()), census, end, notifications (deliver: there are some to be delivered; NULL: none). An error leaves its entry in the audit log, one while it lasts and one a minute at most, and does not stop the others. 22023 for an unknown duty, or where begun is no time that has been; RK005: a table of ours may hide rows.';
grant execute on function rekey._tick_duty to rekey_operator;

create or replace function rekey._prune_run_details() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job_run_details', 8) is not null then
    execute format($sql$
      delete from %I.job_run_details d
      where d.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and d.end_time < now() - interval '7 days'$sql$, 'cron');
  end if;
exception when insufficient_privilege then
  null;  -- somebody else's job
end
$$;
comment on function rekey._prune_run_details is 'Deletes what pg_cron noted of our own runs more than 7 days ago, with the rights of the caller. Where cron.job_run_details is not pg_cron''s, or a trigger of others would fire: nothing.';
grant execute on function rekey._prune_run_details to rekey_operator;

create or replace procedure rekey.tick()
language plpgsql
as $$
declare
  v_begun timestamptz := pg_catalog.clock_timestamp();
  v_duty text;
  v_next text;
begin
  foreach v_duty in array array['schedules', 'destructions', 'census', 'rotations', 'end', 'notifications'] loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    if v_duty operator(pg_catalog.=) 'rotations' then
      call rekey.run_rotations('50 s');
      perform rekey._prune_run_details();
    elsif v_duty operator(pg_catalog.=) 'notifications' then
      perform rekey._tick_duty(v_duty, v_begun);
      commit;
      set transaction isolation level read committed;
      perform rekey._post_by_pg_net();
    else
      v_next := rekey._tick_duty(v_duty, v_begun);
      while v_next is not null and pg_catalog.clock_timestamp() operator(pg_catalog.<) (v_begun operator(pg_catalog.+) interval '50 s') loop
        commit;
        set transaction isolation level read committed;
        if v_next operator(pg_catalog.=) 'search' then
          v_next := rekey._search_on(v_begun);
        else
          v_next := rekey._tick_duty(v_duty, v_begun);
        end if;
      end loop;
    end if;
  end loop;
end
$$;
comment on procedure rekey.tick is
  'The unattended work: rotations that are due, their re-encryption for up to 50 seconds, retries, due destructions, once a day a count of all rows, and messages to endpoints. pg_cron or pg-rekey work calls it. Call it outside a transaction.';
grant execute on procedure rekey.tick to rekey_operator;

-- A CALL of pg_cron is one statement, whose statement_timeout would end the tick and not the batch. So a second job cancels
-- the batch. Whoever it cancels too late is not harmed: a step that is undone is done again.
create or replace function rekey.watch() returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step record;
  v_count integer := 0;
begin
  for v_step in select s.pid, s.since from rekey._steps_in_hand() s where s.overdue and s.pid <> pg_backend_pid() loop
    begin
      -- Looked at again: it may have ended since.
      if exists (select from rekey._steps_in_hand() s where s.pid = v_step.pid and s.since = v_step.since) then
        -- Who catches that it is cancelled, and goes on, is ended.
        v_count := v_count + case when clock_timestamp() - v_step.since > 5 * rekey._step_limit() then pg_terminate_backend(v_step.pid) else pg_cancel_backend(v_step.pid) end::integer;
      end if;
    exception when insufficient_privilege then
      null;  -- a worker of another role
    end;
  end loop;
  return v_count;
end
$$;
comment on function rekey.watch is
  'Cancels batches that take longer than the setting step_limit, as far as they are sessions of the caller''s roles, and returns how many. One that goes on for five times as long is ended. The job of pg_cron beside rekey.tick() calls it; pg-rekey work has a limit of its own.';
grant execute on function rekey.watch to rekey_admin, rekey_operator;

create or replace function rekey.schedule_worker(schedule text = null, workers integer = null) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version text;
  v_schedule text;
  v_job bigint;
  v_watch bigint;
  v_helpers bigint[];
begin
  if workers not between 1 and 64 then
    raise exception 'there are 1 to 64 workers' using errcode = 'invalid_parameter_value';
  end if;
  select e.extversion into v_version from pg_extension e where e.extname = 'pg_cron';
  if not found then
    raise exception 'pg_cron is not in this database' using errcode = 'undefined_object',
      hint = format('In the database that cron.database_name names: select cron.schedule_in_database(''pg_rekey'', ''* * * * *'', ''call rekey.tick()'', %L, ''rekey_worker''), and the same as ''pg_rekey_watch'' for ''select rekey.watch()''. Or run pg-rekey work --forever.',
                    current_database()), constraint = 'schedule_worker';
  elsif rekey._trusted_relation('pg_cron', 'cron', 'job', 28) is null
     or rekey._trusted_function('pg_cron', 'cron.schedule(text,text,text)') is null
     or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null
     or rekey._trusted_function('pg_cron', 'cron.alter_job(bigint,text,text,text,text,boolean)') is null then
    raise exception 'cron.job or its functions are not pg_cron''s, or have a trigger of somebody else''s' using errcode = 'undefined_object',
      hint = 'Before pg_cron 1.4 there is no cron.alter_job(): update the extension. Else drop those triggers.';
  end if;
  v_schedule := coalesce(schedule, case when string_to_array(substring(v_version from '^\d+\.\d+'), '.')::integer[] >= '{1,5}' then '10 seconds' else '* * * * *' end);
  -- (Formatted, so that whoever checks all functions does not stumble where pg_cron is missing.)
  -- Looked for by what it does: cron.schedule() finds a job only under the name of its caller.
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'call rekey.tick()' and j.database = current_database() $sql$, 'cron') into v_job;
  begin
    if v_job is null then
      execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_job using 'pg_rekey', v_schedule, 'call rekey.tick()';
    else
      execute format('select %I.alter_job($1::bigint, $2::text, null::text, null::text, null::text, true)', 'cron') using v_job, v_schedule;
    end if;
  exception when invalid_parameter_value or raise_exception or internal_error then
    raise exception 'pg_cron does not take the schedule %: %', quote_literal(v_schedule), sqlerrm using errcode = 'invalid_parameter_value';
  end;
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'select rekey.watch()' and j.database = current_database() $sql$, 'cron') into v_watch;
  if v_watch is null then
    execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_watch using 'pg_rekey_watch', '* * * * *', 'select rekey.watch()';
  end if;
  -- All but the first do nothing but rotations: what else a tick does is not more with two of them.
  execute format($sql$ select coalesce(array_agg(j.jobid), '{}') from %I.job j where j.command = 'call rekey.run_rotations()' and j.database = current_database() $sql$, 'cron') into v_helpers;
  if cardinality(v_helpers) <> workers - 1 then
    execute format('select count(%I.unschedule(j::bigint)) from unnest($1) j', 'cron') using v_helpers;
    execute format('select coalesce(array_agg(%I.schedule(''pg_rekey_'' || n, $1::text, ''call rekey.run_rotations()''::text)), ''{}'') from generate_series(2, $2) n', 'cron')
    into v_helpers using v_schedule, workers;
  else
    execute format('select count(%I.alter_job(j::bigint, $2::text, null::text, null::text, null::text, true)) from unnest($1) j', 'cron') using v_helpers, v_schedule;
  end if;
  if (select r.rolsuper from pg_roles r where r.rolname = current_user) then
    -- No job of ours runs as a superuser.
    execute 'grant usage on schema cron to rekey_worker';
    execute format('select %I.alter_job(j::bigint, null::text, null::text, null::text, $2::text, null::boolean) from unnest($1) j', 'cron') using array[v_job, v_watch] || v_helpers, 'rekey_worker';
  end if;
  return v_job;
end
$$;
comment on function rekey.schedule_worker is
  'Has pg_cron call rekey.tick(), and returns the number of the job; another one, pg_rekey_watch, calls rekey.watch() every minute. workers: so many (1 to 64) share the rotations, NULL, the default: as many as before, at first one; each but the first is a job pg_rekey_N of its own, which calls rekey.run_rotations(). schedule: as pg_cron takes it; NULL, the default: every 10 seconds, or every minute before pg_cron 1.5. The jobs run as rekey_worker where a superuser calls this, else as the caller. Safe to repeat, with another number of workers too. 42704: pg_cron is not in this database, is older than 1.4, or somebody else''s code would run with it; 22023: it does not take the schedule, or there are not 1 to 64 workers.';
grant execute on function rekey.schedule_worker to rekey_admin;

create or replace function rekey.unschedule_worker() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer := 0;
  v_job bigint;
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job', 8) is null or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null then
    return false;
  end if;
  for v_job in execute format($sql$ select j.jobid from %I.job j where j.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and j.database = current_database() $sql$, 'cron') loop
    execute format('select %I.unschedule($1::bigint)', 'cron') using v_job;
    v_count := v_count + 1;
  end loop;
  return v_count > 0;
end
$$;
comment on function rekey.unschedule_worker is 'Ends the pg_cron jobs of rekey.schedule_worker(); false where there was none.';
grant execute on function rekey.unschedule_worker to rekey_admin;
