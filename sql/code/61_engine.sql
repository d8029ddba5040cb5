-- The engine: sweeps, waits for writers, verifies. One step is one transaction; any number of workers may step at once.
--
-- queued -> (plan) running: its keyring is due in a pass over the targets, split into chunks
-- running -> (sweep the chunks, batch by batch) verifying, once no chunk of the pass is left
-- verifying -> (barrier: no writer of an older version is left; then one snapshot of every row) completed,
--              or running again if rows moved behind the sweep

create or replace function rekey._lock_holders(keyring_id integer, versions integer[], since timestamptz = null) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
    'pid', l.pid, 'role', a.usename,
    'prepared', p.gid, 'age_seconds', extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared, since))::bigint)))
  from pg_locks l
  left join pg_stat_activity a on a.pid = l.pid
  -- A prepared transaction has no process; its locks share a virtual number with the lock on its own transaction.
  left join lateral (
    select x.gid, x.prepared from pg_locks t join pg_prepared_xacts x on x.transaction = t.transactionid
    where l.pid is null and t.pid is null and t.locktype = 'transactionid' and t.virtualtransaction = l.virtualtransaction) p on true
  where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.classid = keyring_id::oid and l.objid::bigint = any (versions::bigint[]);
end;
comment on function rekey._lock_holders is 'Who still writes with these versions. since: what counts as the beginning of a transaction whose own is hidden from us.';

create or replace function rekey._is_due(next_attempt_at timestamptz) returns boolean
language sql volatile
return next_attempt_at is null or not next_attempt_at between clock_timestamp() and clock_timestamp() + interval '10 minutes';
comment on function rekey._is_due is 'Whether a pause is over. None is as long as 10 minutes: a time beyond that was noted by a clock that was wrong.';

create or replace function rekey._barrier(keyring_id integer, versions integer[]) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_free boolean := true;
  v_version integer;
begin
  begin
    foreach v_version in array versions loop
      v_free := pg_try_advisory_xact_lock(keyring_id, v_version);
      exit when not v_free;
    end loop;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the locks back at once: nobody is to wait for them
  end;
  return v_free;
end
$$;
comment on function rekey._barrier is 'Whether no transaction is left that encrypts with one of these versions. They are no longer active: none can begin to.';

create or replace function rekey._record_error(rotations bigint[], message text, code text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  v_events jsonb;
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = r.attempts + 1, last_error = message,
        state = case when r.attempts + 1 >= v_max then 'failed' else r.state end,
        pass_id = case when r.attempts + 1 < v_max then r.pass_id end,
        next_attempt_at = case when r.attempts + 1 < v_max then
          clock_timestamp() + least(power(2, r.attempts), 300) * interval '1 second' end
    -- Not one that another worker's error has failed meanwhile.
    where r.id = any (rotations) and r.state in ('queued', 'running', 'verifying')
    returning r.id, r.keyring_id, r.to_version, r.state, r.attempts
  )
  select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
    'details', jsonb_build_object('attempt', r.attempts, 'sqlstate', code, 'error', message)) order by r.id, e.event)
  into v_events
  from noted r
  join rekey.keyrings k on k.id = r.keyring_id
  join (values ('rotation.error'), ('rotation.failed')) as e(event) on e.event = 'rotation.error' or r.state = 'failed';
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._record_error is 'Notes an error of these rotations: the next attempt comes after a growing pause, and after max_attempts they are failed.';

create or replace function rekey._quarantine(
  target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[]
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_events jsonb;
begin
  with found as (
    select distinct on (f.keyring_id, f.row_key) f.keyring_id, f.version, f.row_key, f.problem, r.id as rotation_id, k.name as keyring
    from unnest(keyrings, versions, row_keys, problems) as f(keyring_id, version, row_key, problem)
    join rekey.rotations r on r.keyring_id = f.keyring_id and rekey._is_under_way(r.state)
    join rekey.keyrings k on k.id = f.keyring_id
  ), moved as (
    -- Known from an earlier rotation or pass.
    update rekey.rotation_failures q set rotation_id = f.rotation_id, version = f.version, reason = f.problem
    from found f
    where q.keyring_id = f.keyring_id and q.target = _quarantine.target and q.row_key = f.row_key and q.resolved_at is null
    returning q.keyring_id, q.row_key
  ), added as (
    insert into rekey.rotation_failures (rotation_id, keyring_id, target, relation, row_key, version, reason)
    select f.rotation_id, f.keyring_id, _quarantine.target, _quarantine.relation::text, f.row_key, f.version, f.problem
    from found f
    where not exists (select from moved m where m.keyring_id = f.keyring_id and m.row_key = f.row_key)
    on conflict do nothing
    returning rotation_id, keyring_id, row_key, version, reason
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', k.name, 'version', a.version,
    'rotation_id', a.rotation_id,
    'details', jsonb_build_object('target', _quarantine.target, 'row', a.row_key, 'problem', a.reason)))
  into v_events
  from added a join rekey.keyrings k on k.id = a.keyring_id;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._quarantine is 'Notes rows that did not open, once each.';

create or replace function rekey._plan(out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_keyrings integer[];
  v_pass bigint;
  v_urgent boolean;
begin
  select array_agg(r.id), array_agg(r.keyring_id), bool_or(r.trigger = 'compromise') into v_ids, v_keyrings, v_urgent
  from (select * from rekey.rotations r
        where r.state in ('queued', 'running') and r.pass_id is null
          and rekey._is_due(r.next_attempt_at)
        order by r.id for update skip locked) r;
  if v_ids is null then
    return;
  end if;
  begin
    v_pass := nextval('rekey._pass_id');
    with due as (
      select r.keyring_id, r.to_version from rekey.rotations r where r.id = any (v_ids)
    ), counted as (
      select c.target, c.relation, c.keyring_id, sum(c.rows) as rows
      from rekey._count(v_keyrings, false) c
      join due d on d.keyring_id = c.keyring_id and d.to_version <> c.version
      group by c.target, c.relation, c.keyring_id
    ), sizes as (
      select t.target, t.relation, t.blocks, t.indexed and sum(c.rows) < least(t.blocks, 20000) as few
      from counted c
      join (select g.*, pg_relation_size(g.relation) / current_setting('block_size')::integer as blocks from rekey._targets() g) t
        on t.relation = c.relation and t.target = c.target
      group by t.target, t.relation, t.blocks, t.indexed
    ), chunked as (
      insert into rekey._chunks (pass_id, urgent, target, relation, first, until_block, batch_blocks)
      select v_pass, v_urgent, s.target, s.relation, format('(%s,0)', f.first)::tid,
        case when s.few then s.blocks else least(f.first + 4096, s.blocks) end,
        -- A few rows of an indexed table: the index finds them, so one range will do.
        case when s.few then s.blocks else 64 end
      from sizes s
      cross join lateral generate_series(0, case when s.few then 0 else s.blocks - 1 end, 4096) as f(first)
    )
    update rekey.rotations r
    set state = 'running', pass_id = v_pass, passes = r.passes + 1, started_at = coalesce(r.started_at, clock_timestamp()),
        next_attempt_at = null,
        rows_total = r.rows_done + coalesce((select sum(c.rows) from counted c where c.keyring_id = r.keyring_id), 0)
    where r.id = any (v_ids);
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.started', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('rows', r.rows_total)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_ids) and r.passes = 1), '[]'));
    event := 'planned';
    keyring_count := cardinality(v_ids);
    detail := jsonb_build_object('pass', v_pass, 'rotations', v_ids[1:20]);
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      raise;
    when query_canceled or others then
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._plan is 'Begins a pass for every rotation that waits for one: counts what there is to do and splits it into chunks.';

create or replace function rekey._sweep_batch(out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings := rekey._settings();
  v_begin timestamptz := clock_timestamp();
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_versions integer[];
  v_function name;
  v_first_block bigint;
  v_until_block bigint;
  v_max_rows integer;
  v_next_batch timestamptz;
  v_batch record;
  v_factor double precision;
begin
  select c.* into v_chunk from rekey._chunks c
  where exists (select from rekey.rotations r where r.pass_id = c.pass_id and r.state = 'running'
                  and rekey._is_due(r.next_attempt_at))
  order by c.urgent desc, c.pass_id desc, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  v_max_rows := v_chunk.batch_rows;
  if v_settings.max_rows_per_second is not null then
    -- All workers share the throttle, one batch after the other.
    select w.next_batch_at into v_next_batch from rekey._worker w for update;
    -- (A time further ahead was noted by a clock that was wrong.)
    if v_next_batch between clock_timestamp() and clock_timestamp() + interval '1 minute' then
      event := 'waiting';
      keyring_count := 0;
      wait := least(v_next_batch - clock_timestamp(), interval '1 second');
      return;
    end if;
    v_max_rows := least(v_max_rows, greatest(v_settings.max_rows_per_second / 5, 1));
  end if;

  select array_agg(r.id order by r.id), array_agg(r.keyring_id order by r.id), array_agg(r.to_version order by r.id)
  into v_ids, v_keyrings, v_versions
  from rekey.rotations r
  where r.pass_id = v_chunk.pass_id and r.state = 'running' and rekey._is_due(r.next_attempt_at);
  select t.function_name into v_function from rekey._targets() t where t.target = v_chunk.target and t.relation = v_chunk.relation;
  v_first_block := split_part(trim(v_chunk.first::text, '()'), ',', 1)::bigint;
  v_until_block := least(v_first_block + v_chunk.batch_blocks, v_chunk.until_block);

  begin
    perform set_config('rekey.sweeping', 'on', true);
    select s.* into v_batch from rekey._call_sweep(
      v_function, v_chunk.first, format('(%s,0)', v_until_block)::tid, v_keyrings, v_versions, v_max_rows, 16777216) s;
    perform set_config('rekey.sweeping', '', true);

    rows := coalesce((select sum(n) from unnest(v_batch.done_rows) n), 0);
    if rows > 0 then
      perform from rekey.rotations r where r.id = any (v_ids) and r.keyring_id = any (v_batch.done_keyrings) order by r.id for no key update;
      update rekey.rotations r set rows_done = r.rows_done + d.rows, attempts = 0
      from unnest(v_batch.done_keyrings, v_batch.done_rows) as d(keyring_id, rows)
      where r.id = any (v_ids) and r.keyring_id = d.keyring_id;
    end if;
    if v_settings.max_rows_per_second is not null then
      update rekey._worker w set next_batch_at = v_begin + (rows / v_settings.max_rows_per_second::double precision) * interval '1 second'
      where w.singleton;
    end if;

    if v_batch.next is null and v_until_block >= v_chunk.until_block then
      delete from rekey._chunks c where c.id = v_chunk.id;
    else
      -- The next batch takes about batch_target.
      v_factor := greatest(0.5, least(2.0,
        extract(epoch from v_settings.batch_target) / greatest(extract(epoch from clock_timestamp() - v_begin), 0.000001)));
      update rekey._chunks c
      set first = coalesce(v_batch.next, format('(%s,0)', v_until_block)::tid),
          batch_rows = greatest(50, least(4000, (c.batch_rows * v_factor)::integer)),
          batch_blocks = case when c.batch_blocks >= 4096 then c.batch_blocks
                              when v_batch.next is not null then c.batch_blocks
                              else greatest(4, least(1024, (c.batch_blocks * v_factor)::integer)) end
      where c.id = v_chunk.id;
    end if;
    if v_batch.failed_keys is not null then
      -- The rotations before the audit log, as everywhere.
      perform from rekey.rotations r where r.id = any (v_ids) and r.keyring_id = any (v_batch.failed_keyrings) order by r.id for no key update;
      perform rekey._quarantine(v_chunk.target, v_chunk.relation, v_batch.failed_keyrings, v_batch.failed_versions,
        v_batch.failed_keys, v_batch.failed_problems);
      update rekey.rotations r
      set rows_failed = (select count(*) from rekey.rotation_failures f where f.rotation_id = r.id and f.resolved_at is null)
      where r.id = any (v_ids) and r.keyring_id = any (v_batch.failed_keyrings);
    end if;
    event := 'batch';
    keyring_count := cardinality(v_ids);
    detail := jsonb_build_object('pass', v_chunk.pass_id, 'target', v_chunk.target, 'rotations', v_ids[1:20],
      'failed', coalesce(cardinality(v_batch.failed_keys), 0),
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      raise;
    when query_canceled or others then
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._sweep_batch is 'Sweeps one batch of one chunk, if there is one that no other worker has in hand.';

create or replace function rekey._verify(out event text, out keyring_count integer, out rows bigint, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_keyrings integer[];
  v_results jsonb;
  v_found record;
  v_failure record;
  v_failed bigint;
  v_completed bigint[] := '{}'::bigint[];
begin
  select array_agg(r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
  from rekey.rotations r
  where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at);
  if v_ids is null then
    return;
  end if;
  rows := 0;
  begin
    -- One statement, one snapshot: no row escapes by moving.
    with counted as materialized (
      select c.* from rekey._count(v_keyrings, true) c
    ), summed as (
      select c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed) filter (where c.version <> r.to_version) as behind,
        jsonb_agg(jsonb_build_object('target', c.target, 'relation', c.relation, 'version', c.version,
          'keys', c.failed_keys, 'problems', c.failed_problems)) filter (where c.failed > 0) as failures
      from counted c
      join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids)
      group by c.keyring_id
    )
    select jsonb_agg(to_jsonb(s)) into v_results from summed s;

    perform from rekey.rotations r where r.id = any (v_ids) order by r.id for no key update;
    for v_found in
      select r.id, r.keyring_id, r.passes, coalesce(s.rows, 0) as rows, coalesce(s.behind, 0) as behind, coalesce(s.failures, '[]') as failures
      from rekey.rotations r
      left join jsonb_to_recordset(v_results) as s(keyring_id integer, rows bigint, behind bigint, failures jsonb) on s.keyring_id = r.keyring_id
      where r.id = any (v_ids) and r.state = 'verifying'  -- not paused, superseded or rolled back meanwhile
      order by r.id
    loop
      rows := rows + v_found.rows;
      for v_failure in
        select f.target, f.relation, array_agg(f.version) as versions, array_agg(k.row_key) as row_keys, array_agg(k.problem) as problems
        from jsonb_to_recordset(v_found.failures) as f(target text, relation text, version integer, keys text[], problems text[])
        cross join lateral unnest(f.keys, f.problems) as k(row_key, problem)
        group by f.target, f.relation
      loop
        perform rekey._quarantine(v_failure.target, v_failure.relation::regclass,
          array_fill(v_found.keyring_id, array[cardinality(v_failure.row_keys)]), v_failure.versions, v_failure.row_keys, v_failure.problems);
      end loop;
      with failing as materialized (
        select f.target, k.row_key
        from jsonb_to_recordset(v_found.failures) as f(target text, keys text[])
        cross join lateral unnest(f.keys) as k(row_key)
      ), closed as (
        select q.id from rekey.rotation_failures q
        left join failing f on f.target = q.target and f.row_key = q.row_key
        where q.keyring_id = v_found.keyring_id and q.resolved_at is null and f.row_key is null
      )
      update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
      from closed c where c.id = q.id;
      select count(*) into v_failed from rekey.rotation_failures q where q.rotation_id = v_found.id and q.resolved_at is null;
      if v_found.behind > 0 then
        update rekey.rotations r
        set state = 'running', rows_failed = v_failed,
            blocked_by = jsonb_build_array(jsonb_build_object('rows', v_found.behind, 'why', 'locked or moved')),
            blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = case when v_found.passes > 1 then
              clock_timestamp() + least(power(2, v_found.passes - 2), 30) * interval '1 second' end
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotations r
      set state = case when v_failed > 0 then 'completed_with_failures' else 'completed' end, rows_failed = v_failed,
          rows_total = r.rows_done + v_failed,  -- what was written or deleted meanwhile needed no sweep
          blocked_by = null, blocked_since = null, next_attempt_at = null, finished_at = clock_timestamp()
      where r.id = v_found.id;
      v_completed := v_completed || v_found.id;
    end loop;
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.completed', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('state', r.state, 'rows', r.rows_done, 'failures', r.rows_failed)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_completed)), '[]'));
    event := case when v_completed = '{}' then 'verified' else 'completed' end;
    keyring_count := cardinality(v_ids);
    detail := jsonb_build_object('rotations', v_ids[1:20], 'completed', v_completed[1:20]);
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      raise;
    when query_canceled or others then
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._verify is
  'Opens every row of the keyrings whose rotations passed the barrier, and completes those that have none left on an older version.';

create or replace function rekey._coordinate(out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation record;
begin
  -- Passes whose rotations were all paused or superseded leave chunks that nobody needs.
  delete from rekey._chunks c
  where c.id in (
    select d.id from rekey._chunks d
    where not exists (select from rekey.rotations r where r.pass_id = d.pass_id)
    for update skip locked);

  perform from rekey.rotations r
  where r.state = 'running' and r.pass_id is not null and not exists (select from rekey._chunks c where c.pass_id = r.pass_id)
  order by r.id for no key update;
  update rekey.rotations r set state = 'verifying', pass_id = null, barrier_at = null
  where r.state = 'running' and r.pass_id is not null and not exists (select from rekey._chunks c where c.pass_id = r.pass_id);
  get diagnostics keyring_count = row_count;
  if keyring_count > 0 then
    event := 'swept';
    return;
  end if;

  keyring_count := 0;
  for v_rotation in
    select r.id, r.keyring_id, r.from_versions from rekey.rotations r
    where r.state = 'verifying' and r.barrier_at is null and rekey._is_due(r.next_attempt_at)
    order by r.id limit 500 for no key update skip locked
  loop
    if rekey._barrier(v_rotation.keyring_id, v_rotation.from_versions) then
      update rekey.rotations r set barrier_at = clock_timestamp(), blocked_by = null, blocked_since = null, next_attempt_at = null
      where r.id = v_rotation.id;
      keyring_count := keyring_count + 1;
      event := 'swept';
    else
      update rekey.rotations r
      set blocked_by = rekey._lock_holders(v_rotation.keyring_id, v_rotation.from_versions, coalesce(r.blocked_since, now())),
          blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '500 milliseconds'
      where r.id = v_rotation.id;
      event := coalesce(event, 'blocked');
      detail := coalesce(detail, jsonb_build_object('rotation', v_rotation.id));
    end if;
  end loop;
  if event is not null then
    return;
  end if;

  select p.event, p.keyring_count, p.detail into event, keyring_count, detail from rekey._plan() p;
end
$$;
comment on function rekey._coordinate is 'What one worker does for all: ends passes, tries the barrier, begins passes.';

create or replace function rekey.rotation_step(
  out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_next timestamptz;
  v_blocked jsonb;
begin
  perform rekey._refuse_snapshot();
  keyring_count := 0;
  rows := 0;
  if not exists (select from rekey.rotations r where r.state in ('queued', 'running', 'verifying')) then
    event := 'idle';
    return;
  end if;
  perform from rekey._kek();

  -- What was just asked for, or only waits, comes before the batches: a compromised key does not wait for a long sweep.
  if exists (
       select from rekey.rotations r
       where rekey._is_due(r.next_attempt_at) and (
         r.state = 'queued' or r.state = 'verifying' and r.barrier_at is null
         or r.state = 'running' and not exists (select from rekey._chunks c where c.pass_id = r.pass_id)))
     and pg_try_advisory_xact_lock(0, 1) then
    select c.event, c.keyring_count, c.detail into event, keyring_count, detail from rekey._coordinate() c;
    if event = 'blocked' then
      v_blocked := detail;
      event := null;
    end if;
  end if;
  if event is null and exists (select from rekey.rotations r where r.state = 'verifying' and r.barrier_at is not null)
     and pg_try_advisory_xact_lock(0, 2) then
    select v.event, v.keyring_count, v.rows, v.detail into event, keyring_count, rows, detail from rekey._verify() v;
  end if;
  if event is null then
    select s.event, s.keyring_count, s.rows, s.wait, s.detail into event, keyring_count, rows, wait, detail from rekey._sweep_batch() s;
  end if;
  if event is null and v_blocked is not null then
    event := 'blocked';
    detail := v_blocked;
    wait := interval '500 milliseconds';
  end if;
  if event is null then
    -- Something is under way, and nothing to be done now: another worker has it in hand, or its time has not come.
    event := 'waiting';
    select min(r.next_attempt_at) into v_next from rekey.rotations r where r.state in ('queued', 'running', 'verifying');
    wait := greatest(interval '50 milliseconds', least(coalesce(v_next - clock_timestamp(), interval '50 milliseconds'), interval '1 second'));
  end if;
  keyring_count := coalesce(keyring_count, 0);
  rows := coalesce(rows, 0);
exception when sqlstate 'RK001' or sqlstate 'RK002' then
  event := 'locked';
  keyring_count := 0;
  rows := 0;
  wait := interval '10 seconds';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
when deadlock_detected or serialization_failure or lock_not_available or query_canceled then
  -- Outside the batches, whose errors are the rotation's: nothing was done, and the next step does it.
  event := case when sqlstate = '57014' then 'canceled' else 'error' end;
  keyring_count := 0;
  rows := 0;
  wait := interval '1 second';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
end
$$;
comment on function rekey.rotation_step is
  'One step of the rotations under way, to be committed at once; any number of sessions may step. event: batch, planned, swept, verified, completed, blocked (waits for writers), waiting, locked (no KEK), error, canceled, idle. wait: how long the caller may sleep before the next one; NULL: not at all. 25001: not in READ COMMITTED.';
grant execute on function rekey.rotation_step to rekey_admin, rekey_operator;

create or replace procedure rekey.run_rotations(max_duration interval = '50 s')
language plpgsql
as $$
declare
  v_until timestamptz := pg_catalog.clock_timestamp() operator(pg_catalog.+) max_duration;
  v_step record;
begin
  if v_until is null then
    raise exception 'max_duration is an interval' using errcode = 'invalid_parameter_value';
  end if;
  loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    select s.event, s.wait into v_step from rekey.rotation_step() s;
    commit;
    exit when v_step.event operator(pg_catalog.=) any (array['idle', 'locked', 'canceled'])
           or pg_catalog.clock_timestamp() operator(pg_catalog.>=) v_until;
    if v_step.wait is not null then
      perform pg_catalog.pg_sleep_for(v_step.wait);
    end if;
  end loop;
end
$$;
comment on procedure rekey.run_rotations is
  'Works on the rotations under way, a commit after each step, until nothing is left, the KEK is missing, or max_duration has passed. Call it outside a transaction.';
grant execute on procedure rekey.run_rotations to rekey_admin, rekey_operator;
