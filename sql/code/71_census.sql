-- What the daily count tells.

create or replace function rekey.confirm_emptied(keyring text) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring);
  v_rows bigint;
begin
  select s.rows into v_rows from rekey._secrets_seen s where s.keyring_id = v_keyring.id for update;
  if v_rows > 0 then
    update rekey._secrets_seen s set rows = 0 where s.keyring_id = v_keyring.id;
    perform rekey._audit('keyring.emptied', keyring, details => jsonb_build_object('seen', v_rows));
  end if;
  return coalesce(v_rows, 0);
end
$$;
comment on function rekey.confirm_emptied is
  'Confirms that the secrets of a keyring are gone, all of them, because they were deleted: its rotation, which held 1,000 or more at its last complete count, then completes without them. Returns how many there were. RK007: no such keyring.';
grant execute on function rekey.confirm_emptied to rekey_admin;

create or replace function rekey._census_target(
  target rekey._target, keyrings integer[], active bytea[], first bigint = 0, until bigint = 4294967294, deadline timestamptz = 'infinity'
)
returns table (keyring_id integer, version integer, problem text, failed bigint, stale bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_from tid := format('(%s,0)', first)::tid;
  v_step bigint;
  v_found record;
  v_batch record;
  v_still bigint[] := '{}'::bigint[];
  v_added jsonb := '[]'::jsonb;
  v_counted jsonb := '[]'::jsonb;
begin
  while v_from is not null loop
    select s.* into v_found from rekey._scan_on(target, keyrings, v_from, v_step, until) s;
    v_step := v_found.next_step;
    if v_found.ciphertexts is not null then
      with rows as materialized (
        select u.place::integer as place, rekey._int4(u.header, 3) as keyring_id, rekey._int4(u.header, 7) as version, u.header = any (active) as active, u.row_key
        from (select o.place, substr(o.ciphertext, 1, 11) as header, o.row_key
              from unnest(v_found.ciphertexts, v_found.keys) with ordinality as o(ciphertext, row_key, place)) u
      ), failing as materialized (
        select f.place, f.problem
        from rekey._check(v_found.ciphertexts, target.prefix, v_found.contexts, v_found.indexes, target.normalization) c
        cross join lateral unnest(c.failed_places, c.problems) as f(place, problem)
      ), noted as materialized (
        -- Discarded by somebody who has seen it, or in quarantine.
        select r.place, q.id, q.resolution
        from rows r
        join rekey.rotation_failures q on q.keyring_id = r.keyring_id and q.target = _census_target.target.target
          and q.relation = _census_target.target.relation::text and q.row_hash = rekey._row_hash(r.row_key)
          and (q.resolved_at is null or q.resolution = 'discard' and q.version = r.version)
      ), added as (
        insert into rekey.rotation_failures (keyring_id, target, relation, row_key, version, reason)
        select r.keyring_id, _census_target.target.target, _census_target.target.relation::text, r.row_key, r.version, f.problem
        from failing f
        join rows r on r.place = f.place
        join rekey.keyrings k on k.id = r.keyring_id
        where not exists (select from noted n where n.place = f.place)
        on conflict do nothing
        returning id, rotation_failures.keyring_id, rotation_failures.version, row_key, reason
      )
      select
        (select array_agg(n.id) from noted n join failing f on f.place = n.place where n.resolution is null) as still,
        (select jsonb_agg(to_jsonb(a)) from added a) as added,
        (select jsonb_agg(to_jsonb(t)) from (
          select r.keyring_id, r.version, f.problem, count(f.place) as failed, count(*) - count(f.place) as stale
          from rows r left join failing f on f.place = r.place
          -- What is in quarantine and opens is refused by its table; what was discarded is known.
          where not exists (select from noted n where n.place = r.place and (n.resolution = 'discard' or f.place is null))
            and (f.place is not null or not r.active)
          group by r.keyring_id, r.version, f.problem) t) as counted
      into v_batch;
      v_still := v_still || coalesce(v_batch.still, '{}')
        || array(select (a.value ->> 'id')::bigint from jsonb_array_elements(coalesce(v_batch.added, '[]')) a);
      -- Five of each keyring and version are enough for the audit log.
      v_added := (
        select coalesce(jsonb_agg(jsonb_build_object('keyring_id', n.keyring_id, 'version', n.version, 'rows', n.rows, 'first', n.first, 'reason', n.reason)), '[]')
        from (
          select a.keyring_id, a.version, sum(a.rows) as rows, (jsonb_agg(a.first order by a.place) -> 0) as first, (array_agg(a.reason order by a.place))[1] as reason
          from (
            select (o.value ->> 'keyring_id')::integer as keyring_id, (o.value ->> 'version')::integer as version, (o.value ->> 'rows')::bigint as rows,
              o.value -> 'first' as first, o.value ->> 'reason' as reason, 0 as place
            from jsonb_array_elements(v_added) o
            union all
            select b.keyring_id, b.version, count(*), to_jsonb((array_agg(rekey._cut(b.row_key, 100) order by b.id))[1:5]), (array_agg(b.reason order by b.id))[1], 1
            from jsonb_to_recordset(coalesce(v_batch.added, '[]')) as b(id bigint, keyring_id integer, version integer, row_key text, reason text)
            group by b.keyring_id, b.version) a
          group by a.keyring_id, a.version) n);
      v_counted := v_counted || coalesce(v_batch.counted, '[]');
    end if;
    v_from := case when clock_timestamp() < deadline then v_found.next_first end;
  end loop;
  update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
  where deadline = 'infinity' and q.rotation_id is null and q.resolved_at is null and q.target = _census_target.target.target
    and q.relation = _census_target.target.relation::text and q.keyring_id = any (keyrings) and not q.id = any (v_still);
  perform rekey._audit_all((
    select coalesce(jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', k.name, 'version', a.version,
      'details', jsonb_build_object('found_by', 'census', 'target', target.target, 'relation', target.relation::text, 'rows', a.rows,
        'first', a.first, 'problem', a.reason)) order by k.name, a.version), '[]')
    from jsonb_to_recordset(v_added) as a(keyring_id integer, version integer, rows bigint, first jsonb, reason text)
    join rekey.keyrings k on k.id = a.keyring_id));
  return query
    select c.keyring_id, c.version, min(c.problem), sum(c.failed)::bigint, sum(c.stale)::bigint
    from jsonb_to_recordset(v_counted) as c(keyring_id integer, version integer, problem text, failed bigint, stale bigint)
    group by c.keyring_id, c.version;
end
$$;
comment on function rekey._census_target is
  'Opens the rows of these keyrings in one target. What does not open enters the quarantine, with one audit entry for each keyring and version; what the census had put there and opens again leaves it. failed: rows that do not open and that nobody has discarded; stale: rows that open and are not on an active version (headers in active). first, until: only these blocks; deadline: as far as it comes by then, where nothing leaves the quarantine. Takes the KEK.';

create or replace function rekey._note_findings(findings jsonb) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_new jsonb;
begin
  with now as (
    -- (How many rows there are changes, and is no new finding.)
    select distinct on (f.kind, f.target, 3, 4, 5)
      f.kind, f.target, coalesce(f.keyring, '') as keyring, coalesce(f.version, 0) as version, case when f.rows is null then f.finding else '' end as item, f.severity, f.rows, f.finding, f.advice
    from jsonb_to_recordset(findings) as f(kind text, target text, keyring text, version integer, severity text, rows bigint, finding text, advice text)
    order by f.kind, f.target, 3, 4, 5
  ), gone as (
    delete from rekey._census_findings o
    where not exists (select from now n where (n.kind, n.target, n.keyring, n.version, n.item) = (o.kind, o.target, o.keyring, o.version, o.item))
  ), kept as (
    insert into rekey._census_findings as o (kind, target, keyring, version, item, severity, rows, finding, advice)
    select n.kind, n.target, n.keyring, n.version, n.item, n.severity, n.rows, n.finding, n.advice from now n
    on conflict (kind, target, keyring, version, item) do update
    set severity = excluded.severity, rows = excluded.rows, finding = excluded.finding, advice = excluded.advice
    returning o.kind, o.target, o.finding, o.since
  )
  select jsonb_agg(jsonb_build_object('event', 'census.found', 'details', jsonb_build_object('kind', k.kind, 'count', k.count, 'first', k.first)) order by k.kind)
  into v_new
  from (
    select k.kind, count(*) as count, to_jsonb((array_agg(left(k.finding, 200) order by k.target))[1:5]) as first
    from kept k where k.since = now() group by k.kind) k;
  perform rekey._audit_all(coalesce(v_new, '[]'));
end
$$;
comment on function rekey._note_findings is 'Makes these the findings of the census, and notes in the audit log what is new among them, one entry for each kind.';

create or replace function rekey._census() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_keyrings integer[];
  v_current integer[];
  v_active bytea[];
  v_open boolean := true;
  v_seconds double precision;
  v_blocks bigint;
  v_state text := rekey._target_state();
  v_found jsonb := '[]'::jsonb;
  v_rows jsonb := '[]'::jsonb;
  v_stale record;
  v_id bigint;
  v_events jsonb := '[]'::jsonb;
begin
  perform rekey._refuse_snapshot();
  perform rekey._note_names();
  select array_agg(rekey._header(k.keyring_id, k.version)) into v_active from rekey.encryption_keys k where k.state = 'active';
  begin
    perform from rekey._kek();
  exception when sqlstate 'RK001' or sqlstate 'RK002' then
    v_open := false;
  end;
  select 20.0 / greatest(count(*), 1) into v_seconds from rekey._targets() t where t.problem is null;
  -- A target that cannot be counted is told of, and keeps nobody from looking at the others.
  for v_target in select t.* from rekey._targets() t where t.problem is null order by t.relation loop
    begin
      -- Locked first, counted by the next statement: as rekey._lock_targets().
      perform from rekey._count_rows(array[v_target], '{}');
      select array_agg(distinct c.keyring_id) filter (where not coalesce(rekey._header(c.keyring_id, c.version) = any (v_active), false)),
        array_agg(distinct c.keyring_id)
      into v_keyrings, v_current
      from rekey._count_rows(array[v_target], null) c
      where c.keyring_id is not null and not exists (select from rekey.rotations o where o.keyring_id = c.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
      -- And where the census has put rows into quarantine: they may open again.
      v_keyrings := array(
        select unnest(v_keyrings) union
        select q.keyring_id from rekey.rotation_failures q where q.target = v_target.target and q.rotation_id is null and q.resolved_at is null);
      if v_keyrings <> '{}' then
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_keyrings, v_active) c), '[]');
      end if;
      -- What stands in a blind index under another version than its value is behind as well.
      v_rows := v_rows || coalesce((
        select jsonb_agg(jsonb_build_object('target', v_target.target, 'keyring_id', c.keyring_id, 'version', 0, 'failed', 0, 'stale', c.rows))
        from rekey._count_rows(array[v_target], v_keyrings) c
        where v_target.normalization is not null and c.version = 0
          and not exists (select from rekey.rotations o where o.keyring_id = c.keyring_id and rekey._is_under_way(o.state) and not o.in_line)), '[]');
      -- Those on the active version, where they open too: of a large table another part each day, for a few seconds.
      v_current := array(select unnest(v_current) except select unnest(v_keyrings));
      if v_open and v_current <> '{}' then
        v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
        v_blocks := (random() * greatest(v_blocks - 8192, 0))::bigint;
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_current, v_active, v_blocks, v_blocks + 8192, clock_timestamp() + v_seconds * interval '1 second') c), '[]');
      end if;
    exception
      when sqlstate 'RK001' or sqlstate 'RK002' or sqlstate 'RK005' then
        raise;
      when others then
        v_found := v_found || jsonb_build_object('kind', 'uncounted', 'severity', 'critical', 'target', v_target.target,
          'finding', format('%s cannot be counted: %s', v_target.target, sqlerrm), 'advice', 'Read it as its owner: an index, a function or a policy of the table may be the reason.');
    end;
  end loop;
  if rekey._target_state() is distinct from v_state then
    raise exception 'a protected column was changed while its rows were counted' using errcode = 'RK005', hint = 'Try again.';
  end if;

  -- What does not open, by keyring; a keyring that does not exist was made up, or is that of another database.
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', 'critical', 'target', f.target, 'keyring', f.keyring, 'version', f.version, 'rows', f.rows,
      'finding', case f.kind
        when 'destroyed' then format('%s rows of %s stand on version %s of keyring %s, which is destroyed', f.rows, f.target, f.version, f.keyring)
        when 'unknown' then format('%s rows of %s stand on version %s of keyring %s, which there is not', f.rows, f.target, f.version, f.keyring)
        else format('%s rows of %s do not open: version %s of keyring %s', f.rows, f.target, f.version, f.keyring) end,
      'advice', case f.kind
        when 'unopenable' then '`pg-rekey rotations failures` names them. Restore them, or give them up: `pg-rekey rotations resolve`.'
        else 'Nothing in this database opens them: restore them, or the key, from a backup. `pg-rekey rotations failures` names them.' end))
    from (
      select c.target, coalesce(r.name, format('no. %s', c.keyring_id)) as keyring, c.version, sum(c.failed) as rows,
        case when k.state = 'destroyed' then 'destroyed' when k.state is null then 'unknown' else 'unopenable' end as kind
      from jsonb_to_recordset(v_rows) as c(target text, keyring_id integer, version integer, failed bigint)
      left join rekey.keyrings r on r.id = c.keyring_id
      left join rekey.encryption_keys k on k.keyring_id = c.keyring_id and k.version = c.version
      where c.failed > 0
      group by 1, 2, 3, k.state) f), '[]');
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', f.severity, 'target', f.target, 'keyring', f.keyring, 'version', f.version,
      'finding', f.finding, 'advice', f.advice))
    from rekey.findings() f where f.rows is null), '[]');
  perform rekey._note_findings(v_found);

  for v_stale in
    select c.keyring_id, r.name, sum(c.stale) as rows, a.version
    from jsonb_to_recordset(v_rows) as c(keyring_id integer, stale bigint)
    join rekey.keyrings r on r.id = c.keyring_id
    join rekey.encryption_keys a on a.keyring_id = c.keyring_id and a.state = 'active'
    group by c.keyring_id, r.name, a.version
    having sum(c.stale) > 0
    order by c.keyring_id
  loop
    perform rekey._keyring(v_stale.name, lock => true);
    continue when exists (select from rekey.rotations o where o.keyring_id = v_stale.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
    v_id := rekey._queue_sweep(v_stale.keyring_id, 'schedule', 'rows on an older version, found by the census');
    v_events := v_events || jsonb_build_object('event', 'rotation.requested', 'keyring', v_stale.name, 'version', v_stale.version,
      'rotation_id', v_id, 'details', jsonb_build_object('trigger', 'schedule', 'census_rows', v_stale.rows));
  end loop;
  update rekey._worker w set last_census_at = now() where w.singleton;
  perform rekey._audit_all(v_events);
end
$$;
comment on function rekey._census is
  'Looks for rows that came to stand on an older version after its rotation (a client held the ciphertext back), and queues their sweep; puts rows that do not open into the quarantine; and notes what else is not as it should be. Of rows on active versions it opens 64 MB of each target, for 20 seconds in all, where the KEK is at hand. The KEK is needed only where a row is not on an active version.';

create or replace view rekey.census_status as
select f.kind, f.severity, f.target, nullif(f.keyring, '') as keyring, nullif(f.version, 0) as version, f.rows, f.finding, f.advice, f.since
from rekey._census_findings f;
comment on view rekey.census_status is 'What the last census (rekey.worker_status.last_census_at) found not to be as it should be. rekey.findings() looks now, but does not count rows.';
comment on column rekey.census_status.kind is 'unopenable, destroyed, unknown (rows that do not open: damaged, on a version that is destroyed, or that there is not), uncounted, or as rekey.findings().';
comment on column rekey.census_status.severity is 'critical or warning.';
comment on column rekey.census_status.target is 'Protected column, table or sequence.';
comment on column rekey.census_status.keyring is 'Keyring of the rows.';
comment on column rekey.census_status.version is 'Their key version.';
comment on column rekey.census_status.rows is 'How many rows; NULL: it is not about rows.';
comment on column rekey.census_status.finding is 'What was found.';
comment on column rekey.census_status.advice is 'What to do about it.';
comment on column rekey.census_status.since is 'Which census found it first.';
grant select on rekey.census_status to rekey_admin, rekey_operator, rekey_auditor;
