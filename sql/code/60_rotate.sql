-- Beginning a rotation: a new version, active at once; the rows follow (61_engine.sql).

-- What a step is at work in nobody sees before it commits, but its locks: the relation that it has in hand, and since when
-- (in seconds, from a time on that leaves room in an int4). Nobody takes them exclusively, so nobody waits.
create or replace function rekey._take_in_hand(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_oid bigint := relation::oid;
begin
  perform pg_advisory_xact_lock_shared(-1, (case when v_oid < 2147483648 then v_oid else v_oid - 4294967296 end)::integer);
  perform pg_advisory_xact_lock_shared(-2, (extract(epoch from clock_timestamp())::bigint - 1700000000)::integer);
end
$$;
comment on function rekey._take_in_hand is 'Shows until the end of the transaction that this session is at work in a relation, for rekey._steps_in_hand().';

create or replace function rekey._steps_in_hand() returns table (pid integer, relation oid, since timestamptz, hangs boolean, overdue boolean)
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select r.pid, r.objid, b.since, clock_timestamp() - b.since > rekey._step_limit() / 10, clock_timestamp() - b.since > rekey._step_limit()
  from pg_locks r
  join pg_locks t on t.pid = r.pid and t.database = r.database and t.locktype = 'advisory' and t.objsubid = 2 and t.classid = 4294967294 and t.granted
  cross join lateral (select to_timestamp(t.objid::bigint + 1700000000) as since) b
  where r.locktype = 'advisory' and r.objsubid = 2 and r.classid = 4294967295 and r.granted
    and r.database = (select d.oid from pg_database d where d.datname = current_database());
end;
comment on function rekey._steps_in_hand is
  'The sessions that have a batch in hand: in which relation, and since when. hangs: for a tenth of step_limit; overdue: for all of it.';
grant execute on function rekey._steps_in_hand to rekey_admin, rekey_operator, rekey_auditor;

-- What notes a blocker may not see when its transaction began; whoever reads this may.
create or replace function rekey._with_ages(blockers jsonb, since timestamptz) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_agg(case when b.blocker ? 'pid' then (b.blocker - 'age_seconds') || jsonb_strip_nulls(jsonb_build_object(
    'age_seconds', extract(epoch from clock_timestamp() - a.xact_start)::bigint)) else b.blocker end order by b.place)
  from jsonb_array_elements(blockers) with ordinality as b (blocker, place)
  left join pg_stat_activity a on a.pid = (b.blocker ->> 'pid')::integer and a.usename = b.blocker ->> 'role' and a.xact_start < since;
end;
comment on function rekey._with_ages is 'Blockers, noted since then, with the age in seconds of their transactions; without it where the caller may not see it.';
grant execute on function rekey._with_ages to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.rotation_status as
select r.id, k.name as keyring, k.tenant_id, r.state, r.trigger, r.from_versions, r.to_version, r.rows_total, r.rows_done, r.rows_failed,
  r.attempts, r.last_error,
  coalesce(r.next_attempt_at, case when r.attempts > 0 then (
    select min(c.next_attempt_at) from rekey._chunks c where c.pass_id = r.pass_id and c.attempts > 0 and not c.stuck) end) as next_attempt_at,
  coalesce(rekey._with_ages(r.blocked_by, r.blocked_since), h.steps, case when r.in_line then (
    select jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('rotation', o.id, 'state', o.state, 'adopts', q.label)))
    from rekey.rotations o left join rekey.protected_columns q on q.id = o.column_id
    where o.keyring_id = r.keyring_id and o.state in ('queued', 'running', 'paused', 'verifying', 'failed') and not o.in_line) end) as blocked_by, r.reason, r.requested_by, r.created_at, r.started_at, r.finished_at,
  p.label as adopts, r.formats, r.forced, r.unwrap,
  case when r.state = 'verifying' and r.verification_id is not null then (
    select coalesce(sum(c.until_block - split_part(trim(c.first::text, '()'), ',', 1)::bigint), 0)::bigint from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')
  end as blocks_to_verify,
  w.pace, w.gives_way_to
from rekey.rotations r
join rekey.keyrings k on k.id = r.keyring_id
left join rekey.protected_columns p on p.id = r.column_id
left join lateral (
  select c.pace, c.gives_way_to from rekey._chunks c where c.pass_id in (r.pass_id, r.verification_id) order by c.pace, c.id limit 1
) w on r.state in ('running', 'verifying')
left join (
  select u.id, jsonb_agg(distinct jsonb_build_object('pid', s.pid, 'target', d.target, 'relation', d.relation::text,
    'age_seconds', extract(epoch from clock_timestamp() - s.since)::bigint)) as steps
  from rekey._steps_in_hand() s
  join rekey._due d on d.relation = s.relation
  cross join unnest(d.rotations) as u(id)
  where s.hangs
  group by u.id) h on h.id = r.id and r.state = 'running';
comment on view rekey.rotation_status is 'Every rotation and how far it is.';
comment on column rekey.rotation_status.id is 'Number of the rotation.';
comment on column rekey.rotation_status.keyring is 'Keyring that is rotated.';
comment on column rekey.rotation_status.tenant_id is 'Tenant of the keyring.';
comment on column rekey.rotation_status.state is 'queued, running, paused, verifying, failed (these are under way), completed, completed_with_failures, rolled_back, superseded.';
comment on column rekey.rotation_status.trigger is 'Why: manual, schedule, compromise, rollback, adoption, search (a blind index is filled).';
comment on column rekey.rotation_status.from_versions is 'Versions whose rows it takes along.';
comment on column rekey.rotation_status.to_version is 'Version it brings them to.';
comment on column rekey.rotation_status.rows_total is 'Rows to re-encrypt; NULL until they are counted.';
comment on column rekey.rotation_status.rows_done is 'Rows re-encrypted.';
comment on column rekey.rotation_status.rows_failed is 'Rows in quarantine: rekey.failure_status names them.';
comment on column rekey.rotation_status.attempts is 'Failed attempts in a row, of the batch that fails.';
comment on column rekey.rotation_status.last_error is 'The last error.';
comment on column rekey.rotation_status.next_attempt_at is 'It goes on after this time; NULL: at once.';
comment on column rekey.rotation_status.blocked_by is 'What it waits for: open transactions (pid, role, age_seconds: since they began; not there where who reads this may not see it in pg_stat_activity), prepared ones (prepared, age_seconds), snapshots from before a version became active, where a column is searchable (pid, role, snapshot, age_seconds), rows (rows, why), columns (target, why), the rotation of its keyring that comes before (rotation, state, adopts), tables in which a step fails (target, relation, error, sqlstate), or in which it hangs (pid, target, relation, age_seconds).';
comment on column rekey.rotation_status.reason is 'What whoever asked for it said.';
comment on column rekey.rotation_status.requested_by is 'Who asked for it: a role; before it, through PostgREST or the HTTP API, the subject of the JWT or the name of the token.';
comment on column rekey.rotation_status.created_at is 'When it was asked for; from then on new values are encrypted with to_version.';
comment on column rekey.rotation_status.started_at is 'When the first row was looked at.';
comment on column rekey.rotation_status.finished_at is 'When it ended.';
comment on column rekey.rotation_status.adopts is 'Protected column that it adopts; NULL for other rotations.';
comment on column rekey.rotation_status.formats is 'As what its values may be taken; NULL for other rotations.';
comment on column rekey.rotation_status.forced is 'Whether values that look like another format are taken for plaintext.';
comment on column rekey.rotation_status.unwrap is 'What the client takes off opened values: json, php, pickle; NULL: nothing.';
comment on column rekey.rotation_status.blocks_to_verify is 'Blocks of large tables that its verification has yet to look at; NULL: none has begun.';
comment on column rekey.rotation_status.pace is 'Part of the time that its workers work, for the rest they pause: 1 at full speed, at least the setting min_pace. NULL: they do not work on it.';
comment on column rekey.rotation_status.gives_way_to is 'To whom they give way so; NULL: to nobody.';
grant select on rekey.rotation_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._is_under_way(state text) returns boolean
language sql immutable parallel safe
return state in ('queued', 'running', 'paused', 'verifying', 'failed');
comment on function rekey._is_under_way is 'Whether a rotation in this state still has work to do.';

create or replace function rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer = null) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint;
begin
  insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
  select a.keyring_id,
    array(select k.version from rekey.encryption_keys k
          where k.keyring_id = a.keyring_id and k.version <> a.version and k.state <> 'destroyed' order by k.version),
    a.version, _queue_sweep.previous_version, _queue_sweep.trigger, _queue_sweep.reason, rekey._requester()
  from rekey.encryption_keys a
  where a.keyring_id = _queue_sweep.keyring_id and a.state = 'active'
  returning id into v_id;
  return v_id;
end
$$;
comment on function rekey._queue_sweep is 'Queues a rotation that brings every row of a keyring to its active version. The caller holds the row of the keyring.';

create or replace function rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) returns setof bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_due integer[];
  v_from integer[];
  v_to integer[];
  v_rotations bigint[];
begin
  if keyrings = '{}' then
    return;
  end if;
  perform rekey._lock_kek();
  perform from rekey.keyrings k where k.id = any (keyrings) order by k.id for no key update;
  if supersede then
    perform from rekey.rotations r where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line order by r.id for no key update;
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line;
  end if;
  select array_agg(k.id order by k.id), array_agg(a.version order by k.id),
    array_agg((select max(m.version) + 1 from rekey.encryption_keys m where m.keyring_id = k.id) order by k.id)
  into v_due, v_from, v_to
  from rekey.keyrings k
  join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
  where k.id = any (keyrings) and k.retired_at is null
    and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line);
  if v_due is null then
    return;
  end if;

  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = any (v_due) and k.state = 'active';
  perform rekey._new_keys(v_due, v_to);
  perform rekey._activate_in_indexes(v_due, v_to);
  -- A transaction with an older snapshot must not pass by a rotation: it fails on this row (40001).
  update rekey.keyrings k set rotated_at = now() where k.id = any (v_due);
  with queued as (
    insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
    select d.keyring_id,
      array(select k.version from rekey.encryption_keys k
            where k.keyring_id = d.keyring_id and k.version <> d.to_version and k.state <> 'destroyed' order by k.version),
      d.to_version, d.from_version, _rotate.trigger, _rotate.reason, rekey._requester()
    from unnest(v_due, v_from, v_to) as d(keyring_id, from_version, to_version)
    returning id, keyring_id
  )
  select array_agg(q.id order by q.keyring_id) into v_rotations from queued q;
  perform rekey._audit_all((
    select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', e.version, 'rotation_id', e.rotation_id,
                                        'details', e.details) order by d.place, e.place)
    from unnest(v_due, v_from, v_to, v_rotations) with ordinality as d(keyring_id, from_version, to_version, rotation_id, place)
    join rekey.keyrings k on k.id = d.keyring_id
    join rekey.rotations r on r.id = d.rotation_id
    cross join lateral (values
      (1, 'rotation.requested', d.to_version, r.id,
        jsonb_strip_nulls(jsonb_build_object('trigger', r.trigger, 'reason', r.reason, 'from_versions', r.from_versions, 'supersede', nullif(_rotate.supersede, false)))),
      (2, 'key.created', d.to_version, r.id, '{}'::jsonb),
      (3, 'key.deactivated', d.from_version, r.id, '{}'),
      (4, 'key.activated', d.to_version, r.id, '{}')
    ) as e(place, event, version, rotation_id, details)));
  return query select r.id from unnest(v_rotations) as r(id);
end
$$;
comment on function rekey._rotate is
  'Makes and activates the next version of each of these keyrings and queues their rotations, whose numbers it returns. Keyrings under way are left out unless supersede.';

create or replace function rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_passed_by jsonb;
  v_said text;
begin
  with passed_by as (
    select k.name, r.id, r.to_version, row_number() over (order by r.id) as place
    from rekey.rotations r
    join rekey.keyrings k on k.id = r.keyring_id
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line and r.id <> all (begun)
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.passed_by', 'keyring', p.name, 'version', p.to_version, 'rotation_id', p.id,
                                      'details', jsonb_strip_nulls(jsonb_build_object('reason', _note_passed_by.reason))) order by p.place),
    string_agg(format('%L (rotation %s)', p.name, p.id), ', ' order by p.place) filter (where p.place <= 10)
      || case when count(*) > 10 then format(' and %s more', count(*) - 10) else '' end
  into v_passed_by, v_said
  from passed_by p;
  if v_passed_by is not null then
    perform rekey._audit_all(v_passed_by);
    raise warning 'no new version, as a rotation is under way: %', v_said using errcode = 'RK004',
      hint = 'Let new ones take their rows along: supersede => true.', constraint = 'supersede';
  end if;
end
$$;
comment on function rekey._note_passed_by is
  'Says which of these keyrings got no new version, as a rotation is under way that is none of those begun: a warning, and an entry with the reason in the audit log of each. The caller holds the rows of the keyrings.';

create or replace function rekey.rotate_keys(keyring text = null, reason text = null, supersede boolean = false)
returns setof rekey.rotation_status
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_ids integer[];
  v_new bigint[];
  v_rotation bigint;
begin
  perform rekey._refuse_hidden();
  if keyring is not null then
    v_keyring := rekey._keyring(keyring);
    if v_keyring.retired_at is not null then
      raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
    end if;
    v_ids := array[v_keyring.id];
  else
    v_ids := array(select k.id from rekey.keyrings k where k.retired_at is null);
  end if;
  v_new := array(select r from rekey._rotate(v_ids, 'manual', reason, coalesce(supersede, false)) r);
  if keyring is null then
    perform rekey._note_passed_by(v_ids, v_new, reason);
  elsif v_new = '{}' then
    select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line;
    raise exception 'keyring % is under way in rotation %', quote_literal(keyring), v_rotation using errcode = 'RK004',
      hint = 'Wait for it, or let this one take its rows along: supersede => true.', constraint = 'supersede';
  end if;
  return query
    select s.* from rekey.rotation_status s
    where s.id = any (v_new)
       or rotate_keys.keyring is null and s.id in (select r.id from rekey.rotations r where rekey._is_under_way(r.state) and not r.in_line)
    order by s.id;
end
$$;
comment on function rekey.rotate_keys is
  'Rotates: makes a new version of the keyring, active from now on, and queues the re-encryption of its rows, which the worker does. Returns at once. keyring NULL: every keyring; one under way gets no new version: its rotation is returned as it is (created_at is before now()), a warning names it, and the audit log has the reason in rotation.passed_by. reason: for the audit log. supersede: also where a rotation is under way, whose rows this one takes along; an adoption under way has to be asked for again, those in line come after. RK001, RK002: KEK; RK004: under way; RK005: a table of pg_rekey''s may hide rows; RK006: retired; RK007: no such keyring.';
grant execute on function rekey.rotate_keys to rekey_admin;

create or replace function rekey._rotation(id bigint) returns rekey.rotations
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id;
  if not found then
    raise exception 'no such rotation: %', coalesce(id::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.rotation_status.', constraint = 'rotations';
  end if;
  -- The keyring first, as everywhere.
  perform from rekey.keyrings k where k.id = v_rotation.keyring_id for no key update;
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id for update;
  return v_rotation;
end
$$;
comment on function rekey._rotation is 'A rotation, its row and that of its keyring locked. RK007: there is none.';

create or replace function rekey.pause_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('queued', 'running', 'verifying') then
    raise exception 'rotation % is %: it cannot be paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'paused', pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = pause_rotation.id;
  perform rekey._audit('rotation.paused', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.pause_rotation is
  'Pauses the re-encryption; the batch in hand still ends. The new version stays active, and everything readable. RK006: not under way; RK007: no such rotation.';
grant execute on function rekey.pause_rotation to rekey_admin;

create or replace function rekey.resume_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state <> 'paused' then
    raise exception 'rotation % is %, not paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'queued' where r.id = resume_rotation.id;
  perform rekey._audit('rotation.resumed', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.resume_rotation is 'Lets a paused rotation go on. RK006: it is not paused; RK007: no such rotation.';
grant execute on function rekey.resume_rotation to rekey_admin;

create or replace function rekey._refuse_over(rotation rekey.rotations) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (No other takes along what an adoption left. One that waited in line may be under way after one with a higher number.)
  if rotation.trigger <> 'adoption' and exists (
       select from rekey.rotations r
       where r.keyring_id = rotation.keyring_id and r.id <> rotation.id and not r.in_line
         and (r.id > rotation.id or rekey._is_under_way(r.state))) then
    raise exception 'rotation % is not the last one of its keyring', rotation.id using errcode = 'RK006',
      hint = 'A later one takes its rows along; an adoption that is under way has to end first.';
  end if;
  if exists (select from rekey.keyrings k where k.id = rotation.keyring_id and k.retired_at is not null) then
    raise exception 'the keyring of rotation % is retired', rotation.id using errcode = 'RK006';
  end if;
end
$$;
comment on function rekey._refuse_over is 'RK006 where nothing comes of a rotation any more: the keyring has a later one, or is retired; or where another is under way.';

create or replace function rekey.retry_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('failed', 'completed_with_failures') then
    raise exception 'rotation % is %: there is nothing to retry', id, v_rotation.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_over(v_rotation);
  perform rekey._refill_failed(array(select f.target from rekey.rotation_failures f where f.rotation_id = retry_rotation.id and f.resolved_at is null and f.sqlstate is null));
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = 'retry', resolved_by = rekey._requester()
  where f.rotation_id = retry_rotation.id and f.resolved_at is null;
  update rekey.rotations r
  set state = 'queued', attempts = 0, rows_failed = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
  where r.id = retry_rotation.id;
  perform rekey._audit('rotation.retried', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.retry_rotation is
  'Lets a failed rotation go on where it stopped, or tries the rows again that a completed one left in quarantine. RK006: neither failed nor with failures, or not the last one of its keyring; RK007: no such rotation.';
grant execute on function rekey.retry_rotation to rekey_admin;

create or replace function rekey.rollback_rotation(id bigint, reason text = null) returns setof rekey.rotation_status
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
  v_old rekey.encryption_keys;
  v_new bigint;
begin
  v_rotation := rekey._rotation(id);
  perform rekey._refuse_over(v_rotation);
  if v_rotation.previous_version is null or v_rotation.trigger = 'compromise'
     or v_rotation.state in ('rolled_back', 'superseded') then
    raise exception 'rotation % cannot be rolled back: % after %', id, v_rotation.state, v_rotation.trigger
      using errcode = 'RK006';
  end if;
  v_old := rekey._key(v_rotation.keyring_id, v_rotation.previous_version);
  if v_old.state <> 'decrypt_only' then
    raise exception 'version % is %: it cannot become active again', v_old.version, v_old.state using errcode = 'RK006';
  end if;
  if (select e.state from rekey.keks e where e.id = v_old.kek_id) = 'lost' then
    raise exception 'version % is wrapped under a KEK that is lost', v_old.version using errcode = 'RK006';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = v_old.keyring_id and k.state = 'active';
  update rekey.encryption_keys k set state = 'active', activated_at = now() where k.id = v_old.id;
  perform rekey._activate_in_indexes(array[v_old.keyring_id], array[v_old.version]);
  update rekey.keyrings k set rotated_at = now() where k.id = v_old.keyring_id;
  update rekey.rotations r
  set state = 'rolled_back', finished_at = coalesce(r.finished_at, now()), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = rollback_rotation.id;
  v_new := rekey._queue_sweep(v_old.keyring_id, 'rollback', reason);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'rotation.rolled_back', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version,
      'rotation_id', id, 'details', jsonb_strip_nulls(jsonb_build_object('reason', reason))),
    jsonb_build_object('event', 'key.deactivated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version, 'rotation_id', v_new),
    jsonb_build_object('event', 'key.activated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new),
    jsonb_build_object('event', 'rotation.requested', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new,
      'details', jsonb_build_object('trigger', 'rollback', 'rolls_back', id))));
  return query select s.* from rekey.rotation_status s where s.id = v_new;
end
$$;
comment on function rekey.rollback_rotation is
  'Makes the version before active again, at once, and queues the rotation back, which it returns. Everything stays readable. RK006: not the last rotation of its keyring, after a compromise, or the version before is no longer decrypt_only; RK007: no such rotation.';
grant execute on function rekey.rollback_rotation to rekey_admin;

create or replace function rekey.mark_key_compromised(keyring text, version integer, reason text = null) returns setof rekey.rotation_status
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_rotation bigint;
  v_event text;
begin
  if exists (select from rekey.keyrings k join rekey.encryption_keys e on e.keyring_id = k.id
             where k.name = keyring and e.version = mark_key_compromised.version and e.state = 'active') then
    perform rekey._lock_kek();  -- before the row of the keyring, as everywhere
  end if;
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('active', 'decrypt_only') then
    raise exception 'version % is %, only an active or decrypt_only one can be marked', version, v_key.state using errcode = 'RK006';
  end if;
  if v_key.state = 'active' then
    select r into v_rotation from rekey._rotate(array[v_keyring.id], 'compromise', reason, true) r;
    v_key := rekey._key(v_keyring.id, version);
  else
    -- An adoption takes no envelopes along: it has to be asked for again. Those in line wait for this one.
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line and r.trigger = 'adoption';
    -- Any other that is under way takes the rows along, and does not wait any longer, whatever it was.
    update rekey.rotations r
    set trigger = 'compromise', attempts = 0, next_attempt_at = null,
        state = case when r.state in ('paused', 'failed') then 'queued' else r.state end
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line
    returning r.id into v_rotation;
    v_event := 'rotation.resumed';
    if not found and v_keyring.retired_at is null then
      v_rotation := rekey._queue_sweep(v_keyring.id, 'compromise', reason);
      v_event := 'rotation.requested';
    end if;
    update rekey._chunks c set urgent = true, attempts = 0, next_attempt_at = null, stuck = false
    where c.id in (
      select d.id from rekey._chunks d
      where d.pass_id = (select r.pass_id from rekey.rotations r where r.id = v_rotation)
      for update skip locked);  -- whoever has one in hand waits for the rotation's row
  end if;
  perform rekey._move_key(v_key, 'compromised', 'key.compromised', reason);
  if v_event is not null and v_rotation is not null then
    perform rekey._audit(v_event, keyring, (rekey._active_versions(array[v_keyring.id]))[1], v_rotation,
      jsonb_build_object('trigger', 'compromise', 'reason', reason));
  end if;
  return query select s.* from rekey.rotation_status s where s.id = v_rotation;
end
$$;
comment on function rekey.mark_key_compromised is
  'Marks a version compromised: it still opens, and never encrypts again. Its rows are re-encrypted by the rotation that is returned; an active version is replaced in the same transaction, superseding a rotation under way. An adoption under way is superseded in any case: repeat it; those in line come after. RK001, RK002: KEK; RK006: neither active nor decrypt_only; RK007: there is none.';
grant execute on function rekey.mark_key_compromised to rekey_admin;

create or replace function rekey._replace_lost_keys(kek_id integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from rekey._rotate(
    array(select k.keyring_id from rekey.encryption_keys k where k.state = 'active' and k.kek_id = _replace_lost_keys.kek_id),
    'manual', format('KEK %s is lost', kek_id), true);
end
$$;
comment on function rekey._replace_lost_keys is 'Gives every keyring whose active version was wrapped under a lost KEK a new one.';

create or replace view rekey.failure_status as
select f.id, f.rotation_id, k.name as keyring, f.target, f.row_key, f.version, f.reason, f.created_at, f.resolved_at, f.resolution,
  f.resolved_by, f.resolve_reason, f.relation, f.sqlstate
from rekey.rotation_failures f
join rekey.keyrings k on k.id = f.keyring_id;
comment on view rekey.failure_status is 'The quarantine: rows that did not open, or that their table did not let a rotation change. resolution: NULL while it is open, then retry, discard, or cleared (the row opens again, or is gone).';
comment on column rekey.failure_status.id is 'Number of the entry.';
comment on column rekey.failure_status.rotation_id is 'Last rotation in which the row failed; NULL: the census found it, and no rotation has met it.';
comment on column rekey.failure_status.keyring is 'Keyring of the row.';
comment on column rekey.failure_status.target is 'Table as it was registered.';
comment on column rekey.failure_status.row_key is 'Primary key of the row, its parts separated by a slash.';
comment on column rekey.failure_status.version is 'Key version that the row names.';
comment on column rekey.failure_status.reason is 'Why it does not open, or the error with which its table refused the new value.';
comment on column rekey.failure_status.created_at is 'When that was noticed.';
comment on column rekey.failure_status.resolved_at is 'When the entry was closed.';
comment on column rekey.failure_status.resolution is 'How: retry, discard, or cleared; NULL: it is open.';
comment on column rekey.failure_status.resolved_by is 'Who closed it.';
comment on column rekey.failure_status.resolve_reason is 'What he said.';
comment on column rekey.failure_status.relation is 'Table or partition that the row is in.';
comment on column rekey.failure_status.sqlstate is 'SQLSTATE of that error; NULL: the row does not open.';
grant select on rekey.failure_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.resolve_failure(id bigint, action text, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_failure rekey.rotation_failures;
  v_rotation rekey.rotations;
begin
  if action is null or action not in ('retry', 'discard') then
    raise exception 'action is retry or discard' using errcode = 'invalid_parameter_value';
  end if;
  select * into v_failure from rekey.rotation_failures f where f.id = resolve_failure.id;
  if not found then
    raise exception 'no such failure: %', coalesce(id::text, 'NULL') using errcode = 'RK007', hint = 'See rekey.failure_status.', constraint = 'failures';
  end if;
  -- What the census found is of no rotation.
  if v_failure.rotation_id is not null then
    v_rotation := rekey._rotation(v_failure.rotation_id);
  end if;
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = action, resolved_by = rekey._requester(), resolve_reason = resolve_failure.reason
  where f.id = resolve_failure.id and f.resolved_at is null;
  if not found then
    raise exception 'failure % is resolved already', id using errcode = 'RK006';
  end if;
  update rekey.rotations r set rows_failed = greatest(r.rows_failed - 1, 0) where r.id = v_failure.rotation_id;
  if action = 'retry' and v_failure.sqlstate is null then
    perform rekey._refill_failed(array[v_failure.target]);
  end if;
  if action = 'retry' and v_failure.rotation_id is not null and not exists (
       select from rekey.rotations r where r.keyring_id = v_failure.keyring_id and rekey._is_under_way(r.state) and not r.in_line) then
    perform rekey._refuse_over(v_rotation);
    update rekey.rotations r
    set state = 'queued', attempts = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
    where r.id = v_failure.rotation_id;
  end if;
  perform rekey._audit('rotation.failure_resolved', rekey._keyring_name(v_failure.keyring_id), v_failure.version, v_failure.rotation_id,
    jsonb_build_object('target', v_failure.target, 'row', v_failure.row_key, 'action', action, 'reason', reason));
end
$$;
comment on function rekey.resolve_failure is
  'Closes an entry of the quarantine. action: retry (the row is tried again; one that the census found, by the next one) or discard (it is given up; it is left as it is). 22023: another action; RK006: resolved already, or a retry in a rotation that is not the last one; RK007: there is none.';
grant execute on function rekey.resolve_failure to rekey_admin;
