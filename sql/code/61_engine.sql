-- The engine: sweeps, waits for writers, has the rows verified. One step is one transaction; any number of workers may step at once.
--
-- queued -> (plan) running: its keyring is due in a pass over the targets, split into chunks
-- running -> (sweep the chunks, batch by batch) verifying, once no chunk of the pass is left
-- verifying -> (barrier: no writer of an older version is left; then every row is opened: 61_verify.sql) completed,
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

create or replace function rekey._waited_for(code text) returns interval
language sql immutable parallel safe
-- Whoever locks a table ends some time. A library that cannot be loaded has been replaced under the running server, until its restart.
return case code when '55P03' then interval '5 seconds' when '58P01' then interval '1 minute' end;
comment on function rekey._waited_for is 'After which pause to try again what an error with this SQLSTATE stopped, without counting an attempt; NULL: it counts.';

create or replace function rekey._record_error(rotations bigint[], message text, code text, target text = null, relation regclass = null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  -- A lock that is in the way of no relation is one of ours.
  v_pause interval := case when code <> '55P03' or target is not null then rekey._waited_for(code) end;
  v_events jsonb;
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = a.attempts, last_error = message,
        state = case when a.failed then 'failed' else r.state end,
        pass_id = case when not a.failed then r.pass_id end,
        next_attempt_at = case when not a.failed then
          clock_timestamp() + coalesce(v_pause, least(power(2, a.attempts - 1), 300) * interval '1 second') end,
        blocked_by = case when _record_error.target is not null then jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
          'target', _record_error.target, 'relation', _record_error.relation::text, 'error', message, 'sqlstate', code))) else r.blocked_by end,
        blocked_since = case when _record_error.target is not null then coalesce(r.blocked_since, now()) else r.blocked_since end
    from (
      select t.id, case when v_pause is null then t.attempts + 1 else greatest(t.attempts, 1) end as attempts,
        v_pause is null and t.attempts + 1 >= v_max as failed
      from rekey.rotations t where t.id = any (rotations)) a
    -- Not one that another worker's error has failed meanwhile.
    where a.id = r.id and r.state in ('queued', 'running', 'verifying')
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
comment on function rekey._record_error is 'Notes an error of these rotations: the next attempt comes after a growing pause, and after max_attempts they are failed. target, relation: what it came from.';

create or replace function rekey._is_passing(code text) returns boolean
language sql immutable parallel safe
-- Connection, rollback, resources, state of other objects, operator, system; and what is damaged or ours.
return left(code, 2) = any ('{08,40,53,55,57,58,F0,XX}');
comment on function rekey._is_passing is 'Whether an error with this SQLSTATE says nothing of the row at which it came: it is tried again.';

create or replace function rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The innermost come first, and end where the function of the target is.
  v_functions text[] := array(
    select regexp_replace(f.found[1], ' line \d+ .*$', '')
    from regexp_matches(regexp_replace(context, '\mrekey(_targets)?"?\."?(_call_|column_|secrets_).*$', ''),
      '(?:PL/pgSQL function |SQL function ")([^"\n]*)', 'g') with ordinality as f(found, place)
    where f.found[1] not like 'rekey.%'
    order by f.place);
  v_path text := (select c.search_path from rekey.protected_columns c where c.label = target);
  v_function text;
  v_trigger name;
begin
  -- Without its schema, where the path of the sweep has that.
  select t.tgname, p.oid::regprocedure::text into v_trigger, v_function
  from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where t.tgrelid = relation and not t.tgisinternal and array[p.oid::regprocedure::text, quote_ident(p.proname) || '()'] && v_functions
  order by t.tgname limit 1;
  if split_part(v_functions[1], '.', 2) = '' and right(v_function, length(v_functions[1])) = v_functions[1] then
    v_functions[1] := v_function;
  end if;
  return format('%s: %s', relation,
    -- Of a row that is plain yet, the words of a table's own code may have the value in them.
    case when code = '55P03' then 'another session holds a lock that it waits for'
         when plain and left(code, 2) <> all ('{23,42,54,RK}') then 'an error of its own code' else rekey._cut(message, 500) end)
    || coalesce(' (trigger ' || quote_ident(v_trigger) || ')', '') || coalesce(', in ' || rekey._cut(v_functions[1], 200), '')
    || case when code in ('42P01', '42883', '42704', '3F000') then
      format('. A sweep runs it with search_path = %s: name it with its schema, %s, or give rekey.protect_column() or pg-rekey columns protect the path that it needs',
        coalesce(v_path, 'pg_catalog, pg_temp'),
        coalesce('ALTER FUNCTION ' || rekey._cut(v_functions[1], 200) || ' SET search_path = ...', 'give what the table calls a search path of its own')) else '' end;
end
$$;
comment on function rekey._explain_error is
  'An error in a table, as a target, in words: the table, the message, the trigger and function that it came from, and what to do where the search path is the cause. Bounded in length. plain: the column may hold plain values.';

create or replace function rekey._note_trouble(chunk rekey._chunks, message text, code text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  v_pause constant interval := rekey._waited_for(code);
  v_attempts integer := 0;
  v_ids bigint[];
  v_events jsonb;
begin
  -- Where nothing went through yet, it is not this chunk, but all of them.
  update rekey._chunks c
  set last_error = message,
      attempts = case when v_pause is null then c.attempts + 1 else greatest(c.attempts, 1) end,
      stuck = v_pause is null and c.attempts + 1 >= v_max,
      next_attempt_at = clock_timestamp() + coalesce(v_pause, least(power(2, c.attempts), 300) * interval '1 second')
  where c.id in (
    select d.id from rekey._chunks d
    where d.id = chunk.id or d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      and exists (select from rekey._due u where u.pass_id = d.pass_id and u.kind = d.kind and u.target = d.target and u.relation = d.relation and not u.passed)
    for update skip locked);
  select c.attempts into v_attempts from rekey._chunks c where c.id = chunk.id;
  v_ids := array(
    select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation);
  perform from rekey.rotations r where r.id = any (v_ids) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = v_attempts, last_error = message, blocked_since = coalesce(r.blocked_since, now()),
        blocked_by = jsonb_build_array(jsonb_build_object('target', chunk.target, 'relation', chunk.relation::text, 'error', message, 'sqlstate', code))
    where r.id = any (v_ids) and r.state = 'running' and r.pass_id = chunk.pass_id
    returning r.id, r.keyring_id, r.to_version
  ), numbered as (
    select n.*, count(*) over () as rotations, row_number() over (order by n.id) as place from noted n
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.error', 'keyring', k.name, 'version', n.to_version, 'rotation_id', n.id,
    'details', jsonb_build_object('attempt', v_attempts, 'sqlstate', code, 'error', message, 'target', chunk.target)
      || case when n.rotations > 20 then jsonb_build_object('rotations', n.rotations) else '{}' end) order by n.id)
  into v_events
  from numbered n join rekey.keyrings k on k.id = n.keyring_id
  where n.rotations <= 20 or n.place = 1;
  perform rekey._audit_all(coalesce(v_events, '[]'));
  perform rekey._fail_stuck(chunk.pass_id);
end
$$;
comment on function rekey._note_trouble is
  'Notes an error in a chunk of a sweep: its next attempt comes after a growing pause, after max_attempts it is stuck, and only rotations with rows in its relation have to do with it. (More than 20 have one audit entry together.)';

create or replace function rekey._unswept(pass_id bigint) returns table (rotation_id bigint, stuck boolean, last_error text)
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select u.id, bool_and(c.stuck), max(c.last_error) filter (where c.stuck)
  from (select c.kind, c.target, c.relation, bool_and(c.stuck) as stuck, max(c.last_error) as last_error
        from rekey._chunks c where c.pass_id = _unswept.pass_id group by c.kind, c.target, c.relation) c
  join rekey._due d on d.pass_id = _unswept.pass_id and d.kind = c.kind and d.target = c.target and d.relation = c.relation
  cross join unnest(d.rotations) as u(id)
  group by u.id;
end;
comment on function rekey._unswept is 'The rotations that a pass has chunks left for; stuck: none of them is tried any more.';

create or replace function rekey._fail_stuck(pass_id bigint) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stuck jsonb;
  v_events jsonb;
begin
  if not exists (select from rekey._chunks c where c.pass_id = _fail_stuck.pass_id and c.stuck) then
    return;
  end if;
  select jsonb_object_agg(u.rotation_id, u.last_error) into v_stuck from rekey._unswept(pass_id) u where u.stuck;
  perform from rekey.rotations r where v_stuck ? r.id::text order by r.id for no key update;
  with failed as (
    update rekey.rotations r
    set state = 'failed', pass_id = null, next_attempt_at = null, last_error = v_stuck ->> r.id::text
    where v_stuck ? r.id::text and r.state = 'running' and r.pass_id = _fail_stuck.pass_id
    returning r.id, r.keyring_id, r.to_version, r.attempts, r.last_error, r.blocked_by
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.failed', 'keyring', k.name, 'version', f.to_version, 'rotation_id', f.id,
    'details', jsonb_build_object('attempt', f.attempts, 'sqlstate', f.blocked_by -> 0 ->> 'sqlstate', 'error', f.last_error)) order by f.id)
  into v_events
  from failed f join rekey.keyrings k on k.id = f.keyring_id;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._fail_stuck is 'Fails the rotations of a pass of which nothing is left but what is stuck.';

create or replace function rekey._row_hash(row_key text) returns bytea
language sql immutable parallel safe
return sha256(replace(row_key, chr(92), chr(92) || chr(92))::bytea);
comment on function rekey._row_hash is 'What a row in quarantine is found by: its key may be longer than an index row. (A backslash is doubled for the cast.)';

create or replace function rekey._quarantine(
  target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[],
  codes text[] = null, verification_id bigint = null
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
-- Each row by the index: what the planner knows of this table is from before the batches that filled it.
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
  v_relation text := relation::text;
  v_events jsonb;
begin
  with found as materialized (
    select distinct on (f.keyring_id, h.hash) f.keyring_id, f.version, f.row_key, h.hash, f.problem, f.code, r.id as rotation_id,
      q.id, q.rotation_id as before
    from unnest(keyrings, versions, row_keys, problems, codes) as f(keyring_id, version, row_key, problem, code)
    cross join lateral (select rekey._row_hash(f.row_key) as hash offset 0) h
    join rekey.rotations r on r.keyring_id = f.keyring_id and rekey._is_under_way(r.state) and not r.in_line
    -- Known from an earlier rotation or pass.
    left join lateral (
      select q.id, q.rotation_id from rekey.rotation_failures q
      where q.keyring_id = f.keyring_id and q.target = _quarantine.target and q.relation = v_relation and q.row_hash = h.hash and q.resolved_at is null
      limit 1) q on true
  ), moved as (
    update rekey.rotation_failures q
    set rotation_id = f.rotation_id, version = f.version, reason = f.problem, sqlstate = f.code, verification_id = _quarantine.verification_id
    from found f where q.id = f.id
  ), added as (
    insert into rekey.rotation_failures (rotation_id, keyring_id, target, relation, row_key, version, reason, sqlstate, verification_id)
    select f.rotation_id, f.keyring_id, _quarantine.target, v_relation, f.row_key, f.version, f.problem, f.code, _quarantine.verification_id
    from found f where f.id is null
    on conflict do nothing
    returning id, rotation_id, keyring_id, row_key, version, reason
  ), failed as (
    select n.rotation_id, count(*) as rows
    from (select a.rotation_id from added a union all select f.rotation_id from found f where f.id is not null and f.before is distinct from f.rotation_id) n
    group by n.rotation_id
  ), counted as (
    update rekey.rotations r set rows_failed = r.rows_failed + f.rows from failed f where r.id = f.rotation_id
  )
  -- One entry for all rows of a version: how many there are may be anybody's to choose.
  select jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', e.keyring, 'version', e.version, 'rotation_id', e.rotation_id,
    'details', jsonb_build_object('target', _quarantine.target, 'relation', v_relation, 'rows', e.rows,
      'first', (select jsonb_agg(rekey._cut(u.row_key, 100) order by u.place) from unnest(e.row_keys[1:5]) with ordinality as u(row_key, place)),
      'problem', e.problem)) order by e.rotation_id, e.version)
  into v_events
  from (
    select a.rotation_id, a.version, k.name as keyring, count(*) as rows, array_agg(a.row_key order by a.id) as row_keys,
      (array_agg(a.reason order by a.id))[1] as problem
    from added a join rekey.keyrings k on k.id = a.keyring_id
    group by a.rotation_id, a.version, k.name) e;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._quarantine is
  'Notes rows that failed, once each, and counts them in their rotations, whose rows the caller has locked. codes: the SQLSTATE with which the table refused a row; NULL: it does not open. verification_id: the verification that saw them.';

create or replace function rekey._due_rows(rotations bigint[])
returns table (rotation_id bigint, target text, relation oid, indexed boolean, kind text, rows bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- Values that are no envelopes are counted only where all are.
  v_keyrings integer[] := (
    select case when bool_or(r.trigger = 'adoption') then null else array_agg(r.keyring_id) end
    from rekey.rotations r where r.id = any (rotations));
  v_targets rekey._target[];
  v_unfilled text[] := array(
    select c.label from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id
    join rekey.rotations r on r.id = any (rotations) and r.keyring_id = c.keyring_id and r.trigger <> 'adoption'
    where b.refill and b.refill_by is distinct from r.id);
begin
  if (select bool_and(r.trigger = 'adoption') from rekey.rotations r where r.id = any (rotations)) then
    v_targets := array(
      select t from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id cross join lateral rekey._targets(p.label) t
      where r.id = any (rotations) and t.problem is null);
  else
    v_targets := rekey._targets_now();
  end if;
  return query
    select r.id, t.target, t.relation::oid, t.indexed, d.kind, sum(c.rows)::bigint
    from rekey._count_rows(v_targets, v_keyrings, apart => true) c
    join unnest(v_targets) with ordinality t on t.ordinality = c.place
    join (select r.*, p.label from rekey.rotations r left join rekey.protected_columns p on p.id = r.column_id where r.id = any (rotations)) r
      on case when r.trigger = 'adoption' then c.keyring_id is null and t.target = r.label else c.keyring_id = r.keyring_id end
    join lateral (
      values (case when r.trigger = 'adoption' then 'adopt' else 'sweep' end, r.trigger = 'adoption' or c.version <> r.to_version),
        -- Every row of an index that is to be filled.
        ('fill', t.target = any (v_unfilled) and r.trigger <> 'adoption' and c.version > 0)
    ) as d(kind, due) on d.due
    where c.error is null  -- whom that concerns, the verification finds out, which counts again
    group by r.id, t.target, t.relation, t.indexed, d.kind;
end
$$;
comment on function rekey._due_rows is 'What these rotations have to do, by relation, where it is not blocked and can be counted. (By number: a name would take rights on its schema.)';

create or replace function rekey._chunk_blocks(relation regclass) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocks bigint := pg_relation_size(relation) / current_setting('block_size')::integer;
  v_bytes bigint := pg_table_size(relation);
begin
  return greatest(v_blocks * greatest(least(v_bytes / 32, 33554432), 4194304) / greatest(v_bytes, 1), 1);
end
$$;
comment on function rekey._chunk_blocks is
  'How many blocks of a relation make a chunk: 4 to 32 MB with what is stored out of line, so that several workers end together.';

create or replace function rekey._plan(out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_pass bigint;
  v_size double precision;
  v_urgent boolean;
  v_rows jsonb;
begin
  select array_agg(r.id), bool_or(r.trigger = 'compromise') into v_ids, v_urgent
  from (select * from rekey.rotations r
        where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line
          and rekey._is_due(r.next_attempt_at)
        order by r.id for update skip locked) r;
  if v_ids is null then
    return;
  end if;
  begin
    perform rekey._note_names();
    perform rekey._expect_none_doomed();  -- so that no row of its batches is looked at in vain
    v_pass := nextval('rekey._pass_id');
    v_size := rekey._batch_size(cardinality(v_ids));
    perform rekey._unfilled(r.keyring_id, r.id) from rekey.rotations r where r.id = any (v_ids) and r.trigger <> 'adoption';
    v_rows := (select jsonb_agg(to_jsonb(c)) from rekey._due_rows(v_ids) c);
    update rekey._blind_indexes b set refill_by = r.id
    from rekey.protected_columns c join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids) and r.trigger <> 'adoption'
    where c.id = b.column_id and b.refill;
    with counted as (
      select c.* from jsonb_to_recordset(v_rows) as c(rotation_id bigint, target text, relation oid, indexed boolean, kind text, rows bigint)
    ), sizes as (
      select c.target, c.relation, c.kind, s.blocks, c.indexed and c.rows < least(s.blocks / 10, 5000) as few,
        rekey._chunk_blocks(c.relation) as chunk
      from (select d.target, d.relation, d.indexed, d.kind, sum(d.rows) as rows from counted d group by 1, 2, 3, 4) c
      cross join lateral (select pg_relation_size(c.relation) / current_setting('block_size')::integer as blocks offset 0) s
    ), dued as (
      insert into rekey._due (pass_id, kind, target, relation, rotations)
      select v_pass, c.kind, c.target, c.relation, array_agg(c.rotation_id)
      from counted c group by c.kind, c.target, c.relation
    ), chunked as (
      insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks, batch_rows)
      select v_pass, v_urgent, s.kind, s.target, s.relation, format('(%s,0)', f.first)::tid,
        case when s.few then s.blocks else least(f.first + s.chunk, s.blocks) end,
        -- A few rows of an indexed table: the index finds them, so one range will do.
        case when s.few then s.blocks else (512 * v_size)::integer end, (500 * v_size)::integer
      from sizes s
      cross join lateral generate_series(0, case when s.few then 0 else s.blocks - 1 end, s.chunk) as f(first)
    )
    update rekey.rotations r
    set state = 'running', pass_id = v_pass, passes = r.passes + 1, started_at = coalesce(r.started_at, clock_timestamp()),
        next_attempt_at = null, attempts = 0,
        -- Kept where a verification found rows behind: the next one looks at what was written since.
        verification_id = case when r.state = 'running' then r.verification_id end,
        rows_total = r.rows_done + coalesce((select sum(c.rows) from counted c where c.rotation_id = r.id), 0)
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
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._plan is 'Begins a pass for every rotation that waits for one: counts what there is to do and splits it into chunks.';

create or replace function rekey._guarded_settings() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return concat_ws(' ', current_setting('role'), session_user, current_setting('transaction_isolation'),
    quote_nullable(nullif(current_setting('rekey.unlocked', true), '')), quote_nullable(nullif(current_setting('request.jwt.claims', true), '')),
    quote_nullable(nullif(current_setting('request.method', true), '')));
end
$$;
comment on function rekey._guarded_settings is 'Settings of the session that say who acts, and with which KEK.';

create or replace function rekey._write_rows(
  target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], indexes bytea[] = null, out locked tid[], out written bigint
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings text := rekey._guarded_settings();
begin
  perform set_config('rekey.sweeping', 'on', true);
  insert into rekey._sweeping (transaction, relation) values (pg_current_xact_id(), _write_rows.relation);
  select w.locked, w.written into locked, written from rekey._call_write(target.function_name, relation, rows, starts, ciphertexts, state, indexes) w;
  delete from rekey._sweeping s where s.transaction = pg_current_xact_id();
  perform set_config('rekey.sweeping', '', true);
  -- The rows are locked: only the table itself can have kept them.
  if written is distinct from coalesce(cardinality(locked), 0)::bigint then
    raise exception '% of % rows of % were not changed: a trigger of the table, or a rule, keeps them', cardinality(locked) - coalesce(written, 0),
      cardinality(locked), relation using errcode = 'RK005',
      hint = format('Let the trigger pass by what pg_rekey does: WHEN (NOT rekey.is_sweeping(%L)).', relation);
  end if;
  if rekey._guarded_settings() <> v_settings then
    raise exception 'a trigger of % changed who acts in this session', relation using errcode = 'RK005',
      hint = 'It must leave role, JWT claims and pg_rekey''s own settings as they are.';
  end if;
end
$$;
comment on function rekey._write_rows is
  'Stores ciphertexts, and index values, in rows that still begin as they were read (starts; NULL: they are locked since), and that nobody else has: those locked. RK005: the table did not take them, or its triggers did more than they may.';

-- At most 60 subtransactions: 64 is as many as a session keeps count of in shared memory. A batch of 4,000 rows with one
-- that raises takes 25.
create or replace function rekey._write_apart(
  target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], indexes bytea[] = null,
  out written tid[], out undone tid, out refused tid[], out problems text[], out codes text[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_begin timestamptz := clock_timestamp();
  v_limit interval := greatest(5 * (rekey._settings()).batch_target, interval '1 second');
  v_tries integer := 0;
  v_rows tid[] := rows;
  v_starts bytea[] := starts;
  v_ciphertexts bytea[] := ciphertexts;
  v_indexes bytea[] := indexes;
  -- What is still to be written, the first at the end.
  v_from integer[] := array[1];
  v_until integer[];
  v_top integer;
  v_low integer;
  v_high integer;
  v_ordered bytea[];
  v_locked tid[];
  v_message text;
  v_code text;
  v_context text;
begin
  if array_position(ciphertexts, null) is not null then
    select array_agg(u.row), array_agg(u.ciphertext), case when indexes is not null then array_agg(u.index) end into v_rows, v_ciphertexts, v_indexes
    from unnest(rows, ciphertexts, indexes) as u(row, ciphertext, index) where u.ciphertext is not null;
  end if;
  v_until := array[cardinality(v_rows)];
  v_top := case when v_rows is null then 0 else 1 end;
  written := '{}';
  refused := '{}';
  problems := '{}';
  codes := '{}';
  while v_top > 0 loop
    v_low := v_from[v_top];
    v_high := v_until[v_top];
    if v_tries >= 60 or v_tries > 1 and clock_timestamp() - v_begin > v_limit then
      undone := v_rows[v_low];
      return;
    end if;
    v_tries := v_tries + 1;
    v_top := v_top - 1;
    begin
      if v_tries = 1 then
        v_locked := (rekey._write_rows(target, relation, v_rows, v_starts, v_ciphertexts, state, v_indexes)).locked;
      else
        v_locked := (rekey._write_rows(target, relation, v_rows[v_low:v_high], v_starts[v_low:v_high], v_ciphertexts[v_low:v_high], state, v_indexes[v_low:v_high])).locked;
      end if;
      written := written || v_locked;
      continue;
    exception when assert_failure or others then
      get stacked diagnostics v_message = message_text, v_code = returned_sqlstate, v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      if rekey._is_passing(v_code) or v_context ~ '^PL/pgSQL function "?rekey"?\."?_call_write' then
        raise;
      end if;
    end;
    if v_tries = 1 then
      select array_agg(u.row order by u.row), array_agg(u.start order by u.row),
        case when v_ciphertexts is not null then array_agg(u.ciphertext order by u.row) end, case when v_indexes is not null then array_agg(u.index order by u.row) end
      into v_rows, v_ordered, v_ciphertexts, v_indexes
      from unnest(v_rows, v_starts, v_ciphertexts, v_indexes) as u(row, start, ciphertext, index);
      v_starts := case when v_starts is not null then v_ordered end;
    end if;
    if v_low = v_high then
      refused := refused || v_rows[v_low];
      problems := problems || rekey._explain_error(target.target, relation, v_message, v_code, v_context, plain);
      codes := codes || v_code;
    else
      v_from[v_top + 1] := (v_low + v_high) / 2 + 1;
      v_until[v_top + 1] := v_high;
      v_from[v_top + 2] := v_low;
      v_until[v_top + 2] := (v_low + v_high) / 2;
      v_top := v_top + 2;
    end if;
  end loop;
end
$$;
comment on function rekey._write_apart is
  'Stores as rekey._write_rows(), leaving out ciphertexts that are NULL, and where the table raises, finds the rows that it does so for by halving: they are refused, with problems and codes (SQLSTATE). undone: the first row that it did not come to; NULL: it came to all. What is neither is somebody else''s now. An error that passes is raised.';

create or replace function rekey._batch_size(keyrings integer) returns double precision
language sql immutable parallel safe
return 1 + least(keyrings - 1, 1000) / 1000.0;
comment on function rekey._batch_size is
  'By how much a batch is larger than one of a single keyring: each key is unwrapped once a batch.';

create or replace function rekey._pass_on(chunk rekey._chunks) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._chunks c where c.id = chunk.id;
  update rekey._chunks c
  set batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions
  where c.id = (
    select n.id from rekey._chunks n
    where n.pass_id = chunk.pass_id and n.kind = chunk.kind and not n.stuck
    order by n.attempts > 0, n.urgent desc, n.id limit 1 for update skip locked);
end
$$;
comment on function rekey._pass_on is 'Deletes a chunk that is done; the one that comes next goes on with its size of batches, and at its pace.';

create or replace function rekey._advance(
  chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision = 0, max_rows integer = 4000
) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The next batch takes about batch_target, and has its rows locked for 10 ms of it; where nobody else is seen, for 20, and with
  -- many keyrings for up to 40.
  v_factor double precision := greatest(0.25, least(2.0,
    extract(epoch from (rekey._settings()).batch_target) / greatest(seconds, 0.000001),
    case when chunk.pace < 1 then 0.01 else max_rows / 200000.0 end / greatest(locked, 0.000001)));
begin
  -- (What ended with its range had fewer rows than it might have: it says nothing for more.)
  chunk.batch_rows := greatest(10, least(max_rows, (chunk.batch_rows * case when next is null then least(v_factor, 1) else v_factor end)::integer));
  if next is null and _advance.until_block >= chunk.until_block then
    perform rekey._pass_on(chunk);
    return;
  end if;
  update rekey._chunks c
  set first = coalesce(rekey._next_row(_advance.next), format('(%s,0)', _advance.until_block)::tid), swept_from = c.first,
      batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions,
      -- No more than twice the blocks that this batch had its rows from: all are read, whatever becomes of it.
      batch_blocks = case when c.batch_blocks > 1024 then c.batch_blocks
                          when _advance.next is not null then greatest(4, least(c.batch_blocks, 2 * (rekey._block(_advance.next) - rekey._block(chunk.first) + 1)))
                          else greatest(4, least(1024, (c.batch_blocks * v_factor)::integer)) end
  where c.id = chunk.id;
end
$$;
comment on function rekey._advance is 'Moves the start of a chunk behind what was swept of it, and notes where that began; deletes it at its end. seconds: how long it took, and for how long its rows were locked; max_rows: the most that a batch may have.';

create or replace function rekey._note_batch(
  rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass,
  failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[] = null
) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if done_keyrings is null and failed_keyrings is null then
    return;
  end if;
  -- The rotations before the audit log, as everywhere.
  perform from rekey.rotations r
  where r.id = any (rotations) and r.keyring_id = any (done_keyrings || failed_keyrings) order by r.id for no key update;
  update rekey.rotations r set rows_done = r.rows_done + d.rows
  from unnest(done_keyrings, done_rows) as d(keyring_id, rows)
  where r.id = any (rotations) and r.keyring_id = d.keyring_id;
  if failed_keyrings is not null then
    perform rekey._quarantine(target, relation, failed_keyrings, failed_versions, failed_keys, failed_problems, failed_codes);
    -- What the table refused is not behind: the next verification has to know that.
    update rekey.rotations r set verification_id = null
    where r.id = any (rotations) and r.keyring_id = any (failed_keyrings) and r.verification_id is not null and failed_codes is not null;
  end if;
end
$$;
comment on function rekey._note_batch is 'Adds what a batch did to the progress of its rotations, and what failed to the quarantine.';

create or replace function rekey._throttle(wanted integer, out rows integer, out wait interval)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate integer := (rekey._settings()).max_rows_per_second;
  v_next timestamptz;
begin
  rows := wanted;
  if v_rate is null then
    return;
  end if;
  -- All workers share the throttle, one batch after the other.
  select w.next_batch_at into v_next from rekey._worker w for update;
  -- (A time further ahead was noted by a clock that was wrong.)
  if v_next between clock_timestamp() and clock_timestamp() + interval '1 minute' then
    rows := null;
    wait := least(v_next - clock_timestamp(), interval '1 second');
    return;
  end if;
  rows := least(wanted, greatest(v_rate / 20, 1));
end
$$;
comment on function rekey._throttle is 'How many rows a batch may have now, of those wanted; NULL: none yet, for as long as wait.';

create or replace function rekey._note_pace(begun timestamptz, rows bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
begin
  if v_rate is not null then
    update rekey._worker w set next_batch_at = begun + (rows / v_rate) * interval '1 second' where w.singleton;
  end if;
end
$$;
comment on function rekey._note_pace is 'Tells rekey._throttle() how many rows a batch had that began then.';

create or replace function rekey._keep_pace(begun timestamptz, rows bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
  v_ahead double precision := rows / (4 * v_rate) - extract(epoch from clock_timestamp() - begun);
begin
  if v_ahead > 0 then
    perform pg_sleep(least(v_ahead, extract(epoch from begun + interval '1 minute' - clock_timestamp())));
  end if;
end
$$;
comment on function rekey._keep_pace is
  'Sleeps where rows were opened faster since then than four times max_rows_per_second, which is the pace of a verification: within one transaction, whose snapshot holds up every VACUUM, and so until a minute has passed since then, and no longer.';

create or replace function rekey.who_else() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sessions bigint;
begin
  if not pg_has_role('pg_read_all_stats', 'usage') then
    return null;
  end if;
  select count(*) into v_sessions
  from pg_stat_activity a
  where a.backend_type = 'client backend' and a.pid <> pg_backend_pid() and a.application_name not in ('pg-rekey', 'pg-rekey serve', 'pg_cron')
    and (a.state = 'active' or a.state_change > clock_timestamp() - interval '1 second');
  return case when v_sessions > 0 then format('%s active sessions', v_sessions) else '' end;
end
$$;
comment on function rekey.who_else is
  'Who else used this server within the last second, in words, for rekey.rotation_step(); empty: nobody; NULL: the caller is no member of pg_read_all_stats, and may not see it.';
grant execute on function rekey.who_else to rekey_admin, rekey_operator;

-- What all may see: how many transactions there were, which sessions tell once a second.
create or replace function rekey._transactions(looked_at timestamptz, transactions bigint, out told text, out looked timestamptz, out counted bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision;
begin
  select clock_timestamp(), sum(pg_stat_get_db_xact_commit(d.oid) + pg_stat_get_db_xact_rollback(d.oid))::bigint into looked, counted from pg_database d;
  v_rate := (counted - transactions) / extract(epoch from looked - looked_at);
  -- Workers, and who watches them, have some themselves.
  told := case when v_rate > 50 then format('%s transactions a second', round(v_rate::numeric)) end;
end
$$;
comment on function rekey._transactions is
  'Whether others use this server: how many transactions it has had in all databases, and in words how many a second, where there are more than 50. looked_at, transactions: when they were counted before, and what was counted then.';

create or replace function rekey._pace(inout chunk rekey._chunks, who_else text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings := rekey._settings();
  v_others text := nullif(who_else, '');
begin
  if v_settings.min_pace = 1 or v_settings.max_rows_per_second is not null or chunk.urgent or exists (
       select from rekey.rotations r where chunk.pass_id in (r.pass_id, r.verification_id) and r.state in ('running', 'verifying') and r.trigger = 'compromise') then
    chunk.pace := 1;
    chunk.gives_way_to := null;
    return;
  end if;
  if who_else is null then
    -- (A later time was noted by a clock that was wrong.)
    if chunk.looked_at between clock_timestamp() - interval '1 second' and clock_timestamp() then
      return;  -- too early to say
    end if;
    select t.told, t.looked, t.counted into v_others, chunk.looked_at, chunk.transactions from rekey._transactions(chunk.looked_at, chunk.transactions) t;
  end if;
  chunk.pace := case when v_others is not null then greatest(chunk.pace / 2, v_settings.min_pace) else least(chunk.pace * 2, 1) end;
  chunk.gives_way_to := case when chunk.pace < 1 then coalesce(v_others, chunk.gives_way_to) end;
end
$$;
comment on function rekey._pace is
  'The chunk with the part of the time that its next batch may take (pace): half of what it was, down to min_pace, while others use the server; twice as much, up to all of it, when they do not. Nobody is given way to where a key is compromised, and where max_rows_per_second sets the pace. who_else: what rekey.who_else() said.';

create or replace function rekey._is_in_the_way() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    with l as materialized (select l.pid, l.granted, l.transactionid from pg_locks l where l.locktype = 'transactionid')
    select exists (
      select from l w join l h on h.transactionid = w.transactionid where not w.granted and h.granted and h.pid = pg_backend_pid()));
end
$$;
comment on function rekey._is_in_the_way is 'Whether somebody waits for the end of this transaction.';

create or replace function rekey._wait_out(pace real, seconds double precision) returns interval
language sql immutable parallel safe
return case when pace < 1 then least(seconds * (1 / pace - 1), 10) * interval '1 second' end;
comment on function rekey._wait_out is 'How long a worker pauses after a batch of so many seconds; NULL: not at all.';

create or replace function rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_refused integer;
begin
  if written > 0 then
    update rekey._due d set passed = true
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed;
  elsif refused > 0 then
    update rekey._due d set refused = d.refused + _note_passed.refused
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed
    returning d.refused into v_refused;
    -- It is not the rows: to put millions of them into quarantine, one by one, helps nobody.
    if v_refused > 10000 then
      raise exception '% refuses every row, % of them by now: see rekey.failure_status', chunk.relation, v_refused using errcode = 'RK005';
    end if;
  end if;
  if chunk.attempts > 0 then
    update rekey._chunks c set attempts = 0, last_error = null, next_attempt_at = null where c.id = chunk.id;
    update rekey.rotations r set attempts = 0, blocked_by = null, blocked_since = null
    where r.id in (
      select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
      where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      order by u.id)
      and r.state = 'running' and r.pass_id = chunk.pass_id;
  end if;
end
$$;
comment on function rekey._note_passed is 'Notes that rows of a chunk went through, or that all were refused: RK005 where more than 10,000 were, and none went through.';

create or replace function rekey._sweep_batch(who_else text, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_versions integer[];
  v_target rekey._target;
  v_state text;
  v_size double precision;
  v_pace real;
  v_first_block bigint;
  v_until_block bigint;
  v_max_rows integer;
  v_forced boolean;
  v_batch record;
  v_contexts bytea[];
  v_old bytea[];
  v_sealing rekey._sealing;
  v_adopted rekey._sealed;
  v_rows tid[];
  v_starts bytea[];
  v_made bytea[];
  v_made_keyrings integer[];
  v_locking timestamptz;
  v_locked double precision := 0;
  v_left tid[];
  v_failed_places integer[];
  v_done_keyrings integer[];
  v_done_rows bigint[];
  v_failed_keyrings integer[];
  v_failed_versions integer[];
  v_failed_keys text[];
  v_failed_problems text[];
  v_failed_codes text[];
  v_indexes bytea[];
  v_blocked jsonb;
  v_apart record;
  v_undone tid;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where not c.stuck and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.pass_id = c.pass_id and r.state = 'running'
                  and rekey._is_due(r.next_attempt_at)
                  and case when c.kind = 'adopt' then r.formats = '{plaintext}' when c.kind in ('sweep', 'fill') then r.trigger <> 'adoption' end)
  order by c.attempts > 0, c.urgent desc, c.pass_id desc, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select w.rows, w.wait into v_max_rows, wait from rekey._throttle(v_chunk.batch_rows) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;

  select array_agg(r.id order by r.id), array_agg(r.keyring_id order by r.id), array_agg(r.to_version order by r.id), bool_or(r.forced)
  into v_ids, v_keyrings, v_versions, v_forced
  from rekey.rotations r
  left join rekey.protected_columns p on p.id = r.column_id
  where r.pass_id = v_chunk.pass_id and r.state = 'running' and rekey._is_due(r.next_attempt_at)
    and case v_chunk.kind when 'adopt' then p.label = v_chunk.target else r.trigger <> 'adoption' end;
  if v_ids is null then
    return;  -- paused or superseded since
  end if;
  v_size := rekey._batch_size(cardinality(v_ids));
  v_pace := v_chunk.pace;
  v_chunk := rekey._pace(v_chunk, who_else);
  if v_chunk.pace < 1 and v_pace = 1 then
    -- Its size is one for when nobody was seen.
    v_max_rows := greatest(v_max_rows / 2, 1);
    v_chunk.batch_rows := greatest(v_chunk.batch_rows / 2, 1);
  end if;
  perform rekey._take_in_hand(v_chunk.relation);
  v_first_block := rekey._block(v_chunk.first);
  v_until_block := least(v_first_block + v_chunk.batch_blocks, v_chunk.until_block);

  begin
    v_target := rekey._target_of(v_chunk);
    v_state := rekey._target_state(v_target.function_name);
    event := 'batch';
    keyring_count := cardinality(v_ids);
    rows := 0;
    if v_target.problem is not null then
      -- The verification will find its rows behind, once it can count them.
      delete from rekey._chunks c where c.id = v_chunk.id;
      detail := jsonb_build_object('target', v_chunk.target, 'blocked', v_target.problem);
      return;
    end if;
    if v_target.normalization is not null then
      -- A statement that goes on with a row as it is now would not find it under a version that its search did not know.
      v_blocked := (
        select rekey._older_snapshots(b.changed_in) from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id where c.label = v_chunk.target);
      update rekey.rotations r set blocked_by = v_blocked, blocked_since = case when v_blocked is not null then coalesce(r.blocked_since, now()) end
      where r.id = any (v_ids) and (v_blocked is not null and r.blocked_by is distinct from v_blocked or v_blocked is null and r.blocked_by -> 0 ? 'snapshot');
      if v_blocked is not null then
        update rekey._chunks c set next_attempt_at = clock_timestamp() + interval '200 milliseconds' where c.id = v_chunk.id;
        event := 'waiting';
        keyring_count := 0;
        wait := interval '100 milliseconds';
        return;
      end if;
    end if;
    -- Whoever reads a page first removes what an update left in it, and notes which transactions have ended. Here (swept_from) that goes
    -- into the log without an image of the page; after the next checkpoint, the verification would write one more.
    select b.* into v_batch from rekey._call_read(
      v_target.function_name, v_chunk.relation, v_chunk.first, format('(%s,0)', v_until_block)::tid,
      case when v_chunk.kind <> 'adopt' then v_keyrings end, case when v_chunk.kind <> 'fill' then v_versions end, v_max_rows, (2097152 * v_size)::bigint, v_chunk.swept_from) b;
    if v_batch.rows is not null then
      if v_chunk.kind = 'adopt' then
        v_contexts := array(
          select v_target.prefix || c.context from unnest(v_batch.contexts) with ordinality as c(context, place) order by c.place);
        v_sealing := rekey._sealing(v_keyrings[1]);
        v_adopted := rekey._adopt(v_batch.ciphertexts, v_contexts, v_sealing, '{plaintext}', v_forced, v_target.prefix, v_target.normalization);
        v_rows := v_batch.rows;
        v_made := v_adopted.ciphertexts;
        v_indexes := v_adopted.indexes;
        select array_agg(u.place), array_agg(u.problem) into v_failed_places, v_failed_problems
        from unnest(v_adopted.problems) with ordinality as u(problem, place) where u.problem is not null;
      elsif v_chunk.kind = 'fill' then
        v_old := v_batch.ciphertexts;
        select r.made_rows, r.starts, r.made_indexes, r.made_keyrings into v_rows, v_starts, v_indexes, v_made_keyrings
        from rekey._refill(v_batch.rows, v_old, v_target.prefix, v_batch.contexts, v_batch.indexes, v_target.normalization) r;
      else
        v_old := v_batch.ciphertexts;  -- of an adoption they are plain, and no parameters of statements
        select r.made_rows, r.starts, r.made, r.made_keyrings, r.failed_places, r.problems, r.indexes
        into v_rows, v_starts, v_made, v_made_keyrings, v_failed_places, v_failed_problems, v_indexes
        from rekey._reencrypt(v_batch.rows, v_old, v_target.prefix, v_batch.contexts, v_target.normalization) r;
      end if;
      v_locking := clock_timestamp();
      select a.* into v_apart from rekey._write_apart(v_target, v_chunk.relation, v_rows, v_starts, v_made, v_chunk.kind = 'adopt', v_batch.state, v_indexes) a;
      v_locked := extract(epoch from clock_timestamp() - v_locking);
      rows := cardinality(v_apart.written);
      v_undone := v_apart.undone;
      v_left := case when rows < cardinality(v_rows) then array(select unnest(v_rows) except select unnest(v_apart.written)) end;
      select array_agg(d.keyring_id), array_agg(d.rows) into v_done_keyrings, v_done_rows
      from (select coalesce(u.keyring_id, v_keyrings[1]) as keyring_id, count(*) as rows
            from unnest(v_rows, v_made_keyrings) as u(row, keyring_id)
            where v_left is null or u.row <> all (v_left)
            group by 1) d;
      if v_failed_places is not null or v_apart.refused <> '{}' then
        -- (Joined: to look a place up in an array of texts takes as long as the place is far.)
        select array_agg(case when v_chunk.kind = 'adopt' then v_keyrings[1] else f.keyring_id end order by f.place),
          array_agg(f.version order by f.place), array_agg(f.key order by f.place), array_agg(f.problem order by f.place), array_agg(f.code order by f.place)
        into v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems, v_failed_codes
        from (
          select u.place, u.key, coalesce(p.problem, a.problem) as problem, a.code,
            case when u.header is not null then rekey._int4(u.header, 3) end as keyring_id,
            case when u.header is not null then rekey._int4(u.header, 7) end as version
          from (
            select b.row, b.key, substr(o.ciphertext, 1, 11) as header, b.place
            from unnest(v_batch.rows, v_batch.keys) with ordinality as b(row, key, place)
            left join unnest(v_old) with ordinality as o(ciphertext, place) on o.place = b.place) u
          left join unnest(v_failed_places, v_failed_problems) as p(place, problem) on p.place = u.place
          left join unnest(v_apart.refused, v_apart.problems, v_apart.codes) as a(row, problem, code) on a.row = u.row
          where p.place is not null or a.row is not null) f;
      end if;
      if rekey._target_state(v_target.function_name) <> v_state or (rekey._target_of(v_chunk)).problem is not null then
        raise exception 'the protected column % was changed while its rows were swept', v_chunk.target using errcode = 'RK005',
          hint = 'See rekey.column_status.', constraint = 'columns';
      end if;
      perform rekey._note_batch(v_ids, v_done_keyrings, v_done_rows, v_chunk.target, v_chunk.relation,
        v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems,
        case when v_apart.codes <> '{}' then v_failed_codes end);
      perform rekey._note_passed(v_chunk, rows, cardinality(v_apart.refused));
    end if;
    perform rekey._note_pace(v_begin, rows);
    if v_chunk.pace = 1 and rekey._is_in_the_way() then
      v_chunk.pace := (rekey._settings()).min_pace;
      v_chunk.gives_way_to := 'sessions that wait for its locks';
    end if;
    if v_undone is null then
      perform rekey._advance(v_chunk, v_batch.next, v_until_block, extract(epoch from clock_timestamp() - v_begin),
        case when v_chunk.kind <> 'adopt' then v_locked else 0 end, (4000 * v_size)::integer);
    else
      update rekey._chunks c set first = v_undone, swept_from = c.first, batch_rows = 32 where c.id = v_chunk.id;
    end if;
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('pass', v_chunk.pass_id, 'target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20],
      'failed', coalesce(cardinality(v_failed_keys), 0),
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, v_chunk.kind = 'adopt');
      perform rekey._note_trouble(v_chunk, v_error, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._sweep_batch is 'Sweeps one batch of one chunk, if there is one that no other worker has in hand.';

create or replace function rekey._clear_chunks() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._chunks c
  where c.id in (
    select d.id from rekey._chunks d
    where not exists (select from rekey.rotations r where r.pass_id = d.pass_id)
      and not exists (select from rekey.rotations r where r.verification_id = d.pass_id and r.state in ('running', 'verifying'))
    for update skip locked);
  delete from rekey._due d
  where d.ctid in (
    select u.ctid from rekey._due u
    where not exists (select from rekey.rotations r where r.pass_id = u.pass_id)
    for update skip locked);
  -- The coordinator and who ends a verification may both come here, each with locks that the other waits for.
  delete from rekey._verified d
  where d.ctid in (
    select v.ctid from rekey._verified v
    where not exists (select from rekey.rotations r where r.verification_id = v.verification_id and r.state in ('running', 'verifying'))
    for update skip locked);
end
$$;
comment on function rekey._clear_chunks is
  'Deletes what passes and verifications leave whose rotations were all paused, superseded, rolled back or completed.';

create or replace function rekey._coordinate(planning boolean, out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation record;
  v_unswept bigint[];
  v_count integer;
begin
  perform rekey._clear_chunks();

  keyring_count := 0;
  -- Who has no rows in what is in trouble does not wait for it.
  for v_rotation in
    select distinct r.pass_id from rekey.rotations r
    where r.state = 'running' and r.pass_id is not null and not exists (select from rekey._chunks c where c.pass_id = r.pass_id and c.attempts = 0)
  loop
    perform rekey._fail_stuck(v_rotation.pass_id);
    v_unswept := array(select u.rotation_id from rekey._unswept(v_rotation.pass_id) u);
    perform from rekey.rotations r
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept) order by r.id for no key update;
    update rekey.rotations r set state = 'verifying', pass_id = null, barrier_at = null, blocked_by = null, blocked_since = null
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept);
    get diagnostics v_count = row_count;
    keyring_count := keyring_count + v_count;
  end loop;
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

  if planning then
    select p.event, p.keyring_count, p.detail into event, keyring_count, detail from rekey._plan() p;
  else
    -- As _plan() will find them: who holds one up does not hold up the batches.
    perform from rekey.rotations r
    where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line and rekey._is_due(r.next_attempt_at) limit 1 for update skip locked;
    event := case when found then 'whole' end;
  end if;
end
$$;
comment on function rekey._coordinate is 'What one worker does for all: ends passes, tries the barrier, begins passes; without planning, says that one is to be begun (event whole).';

create or replace function rekey._next_in_line() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint;
begin
  -- (Whoever has a keyring in hand begins something there, or ends it: the next step looks again.)
  select r.id into v_id
  from rekey.rotations r
  join rekey.keyrings k on k.id = r.keyring_id
  where r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line)
  order by r.id limit 1 for no key update of k skip locked;
  if not found then
    return;
  end if;
  update rekey.rotations r
  set in_line = false,
      to_version = (select k.version from rekey.encryption_keys k where k.keyring_id = r.keyring_id and k.state = 'active')
  where r.id = v_id and r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
end
$$;
comment on function rekey._next_in_line is 'Lets the first adoption in line begin whose keyring has nothing else under way, with the version that is active now.';

create or replace function rekey.rotation_step(
  whole boolean = null, who_else text = null, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set jit = off  -- which takes 10 MB of each session that counts a large table, and saves no time
set lock_timeout = '2 s'  -- whoever locks a table holds up nothing else
as $$
declare
  v_next timestamptz;
  v_blocked jsonb;
  v_kind text;
begin
  perform rekey._refuse_snapshot();
  keyring_count := 0;
  rows := 0;
  perform rekey._next_in_line();
  if not exists (
       select from rekey.rotations r where r.state in ('queued', 'running', 'verifying') and not r.in_line
         -- An adoption whose keys only pg-rekey columns adopt has.
         and not (r.state = 'running' and r.formats is not null and r.formats <> '{plaintext}' and exists (select from rekey._chunks c where c.pass_id = r.pass_id))) then
    event := 'idle';
    return;
  end if;
  perform from rekey._kek();

  -- What was just asked for, or only waits, comes before the batches: a compromised key does not wait for a long sweep.
  if (exists (
        select from rekey.rotations r
        where rekey._is_due(r.next_attempt_at) and (r.state = 'queued' and not r.in_line or r.state = 'verifying' and r.barrier_at is null))
      or exists (
        select from (select distinct r.pass_id from rekey.rotations r where r.state = 'running' and rekey._is_due(r.next_attempt_at)) p
        where not exists (select from rekey._chunks c where c.pass_id = p.pass_id and c.attempts = 0)))
     and pg_try_advisory_xact_lock(0, 1) then
    select c.event, c.keyring_count, c.detail into event, keyring_count, detail from rekey._coordinate(whole is distinct from false) c;
    if event = 'blocked' then
      v_blocked := detail;
      event := null;
    end if;
  end if;
  if event is null and exists (select from rekey.rotations r where r.state = 'verifying' and r.barrier_at is not null)
     and pg_try_advisory_xact_lock(0, 2) then
    if whole is not distinct from false then
      event := case when exists (
        select from rekey.rotations r
        where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
          and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')) then 'whole' end;
    else
      select v.event, v.keyring_count, v.rows, v.detail into event, keyring_count, rows, detail from rekey._verify() v;
      if event = 'blocked' then
        v_blocked := detail;
        event := null;
      end if;
    end if;
  end if;
  foreach v_kind in array case when exists (select from rekey._chunks c where c.urgent) then '{sweep,verify}'::text[] else '{verify,sweep}' end loop
    exit when event is not null or whole;
    if v_kind = 'verify' then
      select v.event, v.keyring_count, v.rows, v.wait, v.detail into event, keyring_count, rows, wait, detail from rekey._verify_batch(who_else) v;
    else
      select s.event, s.keyring_count, s.rows, s.wait, s.detail into event, keyring_count, rows, wait, detail from rekey._sweep_batch(who_else) s;
    end if;
  end loop;
  if event is null and v_blocked is not null then
    event := 'blocked';
    detail := v_blocked;
    wait := interval '500 milliseconds';
  end if;
  if event is null then
    -- Something is under way, and nothing to be done now: another worker has it in hand, or its time has not come.
    event := 'waiting';
    select least((select min(r.next_attempt_at) from rekey.rotations r where r.state in ('queued', 'running', 'verifying')),
      (select min(c.next_attempt_at) from rekey._chunks c where not c.stuck)) into v_next;
    wait := greatest(interval '20 milliseconds', least(coalesce(v_next - clock_timestamp(), interval '20 milliseconds'), interval '1 second'));
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
  'One step of the rotations under way, to be committed at once; any number of sessions may step. event: planned, batch, swept, checked, verified, completed, blocked (waits for writers), waiting, locked (no KEK), error, canceled, idle. whole: true, only what reads whole tables, and so may take long; false, only what does not, and the event whole where that is due; NULL, the default: either. who_else: what rekey.who_else() tells the caller; NULL: the step looks for itself. wait: how long the caller may sleep before the next one; NULL: not at all. 25001: not in READ COMMITTED.';
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
    -- A crash takes back some batches, rows and progress together. What is audited waits for the disk all the same.
    perform pg_catalog.set_config('synchronous_commit', 'off', true);
    select s.event, s.wait into v_step from rekey.rotation_step(who_else => rekey.who_else()) s;
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
