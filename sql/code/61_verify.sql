-- Verification: that every row opens, and under which version it stands. A rotation completes by it.
--
-- What is large is checked by chunks, by any number of workers, each in a transaction of its own. `since` is the oldest
-- transaction that was under way when that began. The last step is one snapshot: it counts every row, and checks the tags of
-- those that `since` or a later transaction wrote. All others were there, under the same row pointer, when their chunk was
-- read: what is older had ended, and a row's version is neither changed nor moved, but by what gives the table a new file
-- (VACUUM FULL, CLUSTER, ALTER TABLE, TRUNCATE). Where the file or a function of a target is another one, nothing counts
-- that was checked before, and the last step opens every row; as it does in a chunk in which one did not open, in what is
-- small, and in rekey.verify_ciphertexts().

create or replace function rekey._system_identifier() returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if has_function_privilege('pg_catalog.pg_control_system()', 'execute') then
    return (select s.system_identifier from pg_control_system() s);
  end if;
  return null;
end
$$;
comment on function rekey._system_identifier is 'What initdb made to tell this cluster from others; NULL where a host of databases has revoked it.';

create or replace function rekey._checked_since(verification_id bigint, target rekey._target) returns xid
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select v.since::xid from rekey._verified v
  where v.verification_id = _checked_since.verification_id and v.target = (_checked_since.target).target and v.relation = (_checked_since.target).relation
    and v.filenode = pg_relation_filenode(v.relation) and v.functions = rekey._target_state((_checked_since.target).function_name)
    and v.system_identifier is not distinct from rekey._system_identifier()
    -- As far as the ages of transactions can be compared.
    and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - v.since::text::bigint < 2000000000;
end;
comment on function rekey._checked_since is
  'The transaction from which on a relation has yet to be checked where a verification checks it by chunks; NULL: all of it, since it does not, or the relation is another one now. The caller holds a lock on it.';

create or replace function rekey._ranges(verification_id bigint, target rekey._target)
returns table (first bigint, until bigint, since xid)
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  with checked as (
    select rekey._checked_since(_ranges.verification_id, _ranges.target) as since
  ), doubtful as (
    select case when k.since is null then '{[0,4294967294)}' else (
      select coalesce(range_agg(int8range(rekey._block(c.first), c.until_block)), '{}')
      from rekey._chunks c
      where c.pass_id = _ranges.verification_id and c.kind = 'doubtful' and c.target = (_ranges.target).target and c.relation = (_ranges.target).relation
    ) end as blocks, k.since
    from checked k
  )
  select lower(r.range), upper(r.range), null::xid from doubtful d cross join lateral unnest(d.blocks) as r(range)
  union all
  select lower(r.range), upper(r.range), d.since
  from doubtful d cross join lateral unnest('{[0,4294967294)}'::int8multirange - d.blocks) as r(range);
end;
comment on function rekey._ranges is 'The blocks of a relation in ranges, each with what is to be checked in it: as rekey._checked_since() says; NULL: all.';

create or replace function rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[])
returns table (place integer, keyring_id integer, version integer)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select u.place::integer, q.keyring_id, q.version
  from unnest(ciphertexts, keys) with ordinality as u(ciphertext, row_key, place)
  join rekey.rotation_failures q
    on q.keyring_id = rekey._int4(u.ciphertext, 3) and q.target = _refused_rows.target and q.relation = _refused_rows.relation::text
    and q.row_hash = rekey._row_hash(u.row_key)
  where q.resolved_at is null and q.sqlstate is not null and q.version = rekey._int4(u.ciphertext, 7);
end;
comment on function rekey._refused_rows is
  'Which of these rows are in quarantine because their table refused the new value, and still are as they were then.';

create or replace function rekey._open_found(targets rekey._target[], whole rekey._counted[])
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_of integer[];
  v_at integer[];
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
begin
  return query
    select t.target, t.relation, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint,
      rekey._explain_error(t.target, t.relation, f.error, f.code, f.context, true), f.code
    from unnest(whole) f join unnest(targets) with ordinality t on t.ordinality = f.place
    where f.error is not null;
  select array_agg(r.place order by r.n), array_agg(r.at order by r.n), array_agg(r.ciphertext order by r.n), array_agg(r.context order by r.n), array_agg(r.key order by r.n)
  into v_of, v_at, v_ciphertexts, v_contexts, v_keys
  from (
    select f.place, u.at::integer as at, u.ciphertext, t.prefix || u.context as context, u.key, row_number() over () as n
    from unnest(whole) f
    join unnest(targets) with ordinality t on t.ordinality = f.place
    cross join lateral unnest(f.ciphertexts, f.contexts, f.keys) with ordinality as u(ciphertext, context, key, at)
    where f.error is null) r;
  return query
    with failing as materialized (
      select f.n, f.problem
      from rekey._check(v_ciphertexts, '', v_contexts) c cross join lateral unnest(c.failed_places, c.problems) as f(n, problem)
    ), opened as (
      select u.place, u.at, u.key, f.problem, rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
      from unnest(v_of, v_at, v_ciphertexts, v_keys) with ordinality as u(place, at, ciphertext, key, n)
      left join failing f on f.n = u.n
    ), refusing as (
      select r.place as at, f.place, f.keys[r.place] as key, r.keyring_id, r.version
      from unnest(whole) f
      join unnest(targets) with ordinality t on t.ordinality = f.place
      cross join lateral rekey._refused_rows(t.target, t.relation, f.ciphertexts, f.keys) r
      where f.error is null and exists (
        select from rekey.rotation_failures q where q.target = t.target and q.resolved_at is null and q.sqlstate is not null)
    )
    select t.target, t.relation, c.keyring_id, c.version, c.rows, c.failed, c.failed_keys, c.failed_problems, c.refused, null::text, null::text
    from (
      select o.place, o.keyring_id, o.version, count(*) as rows, count(o.problem) as failed, array_agg(o.key) filter (where o.problem is not null) as failed_keys,
        array_agg(o.problem) filter (where o.problem is not null) as failed_problems, 0::bigint as refused
      from opened o group by o.place, o.keyring_id, o.version
      union all
      select r.place, r.keyring_id, r.version, 0, 0, array_agg(r.key), null, count(*)
      from refusing r where not exists (select from opened o where o.place = r.place and o.at = r.at and o.problem is not null)
      group by r.place, r.keyring_id, r.version) c
    join unnest(targets) with ordinality t on t.ordinality = c.place;
end
$$;
comment on function rekey._open_found is 'Counts and opens rows of targets, as rekey._open_rows(), that rekey._count_rows(whole => true) found.';

create or replace function rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean = false)
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_large rekey._target[] := array(select t from unnest(targets) t where t.indexed or t.normalization is not null or pg_table_size(t.relation) > 524288);
  v_group record;
  v_whole rekey._counted[];
  v_target rekey._target;
  v_count rekey._counted;
  v_rows bigint[];
  v_blocks bigint;
  v_range record;
  v_step bigint;
  v_first bigint;
  v_from tid;
  v_found record;
  v_bad record;
  v_places integer[];
  v_refused boolean;
  v_context text;
  v_place integer := 0;
  v_begin timestamptz := clock_timestamp();
  v_opened bigint := 0;
begin
  -- STABLE: every statement in here sees the snapshot of the calling one.
  -- What is small is counted by opening it, 4 MB of it at a time.
  for v_group in
    select array_agg(g.target) as targets
    from (select t as target, sum(pg_table_size(t.relation)) over (order by t.relation, t.target) / 4194304 as number
          from unnest(targets) t where not t.indexed and t.normalization is null and pg_table_size(t.relation) <= 524288) g
    group by g.number::integer
  loop
    v_whole := array(select c from rekey._count_rows(v_group.targets, keyrings, apart, whole => true) c);
    return query select o.* from rekey._open_found(v_group.targets, array(select f from unnest(v_whole) f where f.next is null)) o;
    v_large := v_large || array(select v_group.targets[f.place] from unnest(v_whole) f where f.next is not null);
    v_opened := v_opened + coalesce((select sum(f.rows) from unnest(v_whole) f), 0);
    if verification_id is not null then
      perform rekey._keep_pace(v_begin, v_opened);
    end if;
  end loop;
  for v_count in select c.* from rekey._count_rows(v_large, keyrings, apart) c loop
    target := v_large[v_count.place].target;
    relation := v_large[v_count.place].relation;
    keyring_id := v_count.keyring_id;
    version := v_count.version;
    rows := v_count.rows;
    failed := 0;
    refused := 0;
    if v_count.error is not null then
      error := rekey._explain_error(target, relation, v_count.error, v_count.code, v_count.context, true);
      code := v_count.code;
      v_rows[v_count.place] := null;
    elsif keyring_id is not null then
      v_rows[v_count.place] := coalesce(v_rows[v_count.place], 0) + rows;
    end if;
    return next;
    error := null;
    code := null;
  end loop;
  rows := 0;
  foreach v_target in array v_large loop
    v_place := v_place + 1;
    -- Where none was counted, there is none.
    continue when coalesce(v_rows[v_place], 0) = 0;
    target := v_target.target;
    relation := v_target.relation;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_target.target and q.resolved_at is null and q.sqlstate is not null);
    failed := 0;
    refused := 0;
    begin
      -- No less than the snapshot sees: the caller holds a lock that keeps the table from being rewritten.
      v_blocks := pg_relation_size(relation) / current_setting('block_size')::integer;
      for v_range in select r.* from rekey._ranges(verification_id, v_target) r loop
        -- 2 MB at a time, 32 of which little is wanted; but the few rows of small keyrings are found by an index, all at once.
        v_step := case when v_range.since is not null then 4096 when v_target.indexed and v_rows[v_place] < least(v_blocks, 5000) then 4294967294 else 256 end;
        v_first := v_range.first;
        v_from := format('(%s,0)', v_first)::tid;
        while v_first < least(v_range.until, v_blocks) loop
          select s.* into v_found from rekey._call_scan(v_target.function_name, relation, v_from,
            format('(%s,0)', least(v_first + v_step, v_range.until))::tid, keyrings, v_range.since, 4000, 2097152) s;
          if v_found.ciphertexts is not null then
            v_places := '{}';
            for v_bad in select c.* from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization) c loop
              keyring_id := rekey._int4(v_bad.header, 3);
              version := rekey._int4(v_bad.header, 7);
              failed := cardinality(v_bad.failed_places);
              failed_keys := array(select v_found.keys[f.place] from unnest(v_bad.failed_places) with ordinality as f(place, rank) order by f.rank);
              failed_problems := v_bad.problems;
              v_places := v_places || v_bad.failed_places;
              return next;
            end loop;
            failed := 0;
            failed_problems := null;
            if v_refused then
              for keyring_id, version, refused, failed_keys in
                select r.keyring_id, r.version, count(*), array_agg(v_found.keys[r.place])
                from rekey._refused_rows(v_target.target, v_target.relation, v_found.ciphertexts, v_found.keys) r
                where r.place <> all (v_places)
                group by r.keyring_id, r.version
              loop
                return next;
              end loop;
            end if;
            refused := 0;
            failed_keys := null;
            v_opened := v_opened + cardinality(v_found.ciphertexts);
            if verification_id is not null then
              perform rekey._keep_pace(v_begin, v_opened);
            end if;
          end if;
          if v_found.next is not null then
            v_from := rekey._next_row(v_found.next);
          else
            v_first := v_first + v_step;
            v_from := format('(%s,0)', least(v_first, 4294967294))::tid;
          end if;
        end loop;
      end loop;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart or sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      keyring_id := null;
      error := rekey._explain_error(target, relation, sqlerrm, sqlstate, v_context, true);
      code := sqlstate;
      return next;
      error := null;
      code := null;
    end;
  end loop;
end
$$;
comment on function rekey._open_rows is
  'Counts as rekey._count_rows(), and opens every row that the verification did not check before (NULL: every row): failed_keys and failed_problems name what does not open; refused, with failed_keys, what opens and its table refused. A combination may come in several rows. apart: an error in a target is a row without keyring, and what came of it before is not to be trusted.';

-- To a snapshot from before it was rewritten, a table may be empty (ALTER TABLE). So the locks come first, and the snapshot of
-- the statement that counts after them.
create or replace function rekey._lock_targets(apart boolean = false) returns rekey._locked
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_locked rekey._locked;
  v_tables rekey._target[];
begin
  v_locked.functions := rekey._target_state();
  v_tables := array(select distinct on (t.target) t from rekey._targets() t where t.problem is null order by t.target);
  v_locked.errors := (
    select jsonb_agg(jsonb_build_object('target', t.target, 'relation', t.whole::oid::bigint, 'sqlstate', c.code,
      'error', rekey._explain_error(t.target, t.whole, c.error, c.code, c.context, true)))
    from rekey._call_count((select array_agg(t.function_name) from unnest(v_tables) t), (select array_agg(t.whole) from unnest(v_tables) t), '{}', apart) c
    join unnest(v_tables) with ordinality t on t.ordinality = c.place);
  v_locked.targets := array(
    select t from rekey._targets() t
    where t.problem is not null
      or t.target in (select l.target from unnest(v_tables) l except select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e)
    order by t.relation);
  return v_locked;
end
$$;
comment on function rekey._lock_targets is
  'Locks every target that is not blocked, with its partitions, until the transaction ends. apart: errors of one are told, and do not stop the others.';

create or replace function rekey._count(
  keyrings integer[], opening boolean, verification_id bigint = null, apart boolean = false, locked rekey._locked = null
)
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_locked rekey._locked := locked;
  v_targets rekey._target[];
  v_now rekey._target[];
begin
  if v_locked.functions is null then
    v_locked := rekey._lock_targets(apart);
  end if;
  perform rekey._refuse_blocked(keyrings, v_locked.targets);
  v_targets := array(select t from unnest(v_locked.targets) t where t.problem is null order by t.relation);
  return query
    select e.target, e.relation::regclass, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint, e.error, e.sqlstate
    from jsonb_to_recordset(v_locked.errors) as e(target text, relation oid, error text, sqlstate text);
  -- One statement, one snapshot: no row escapes by moving.
  if opening then
    return query select o.* from rekey._open_rows(v_targets, keyrings, verification_id, apart) o;
  else
    return query
      select t.target, t.relation, c.keyring_id, c.version, c.rows, 0::bigint, null::text[], null::text[], 0::bigint, null::text, null::text
      from rekey._count_rows(v_targets, keyrings) c join unnest(v_targets) with ordinality t on t.ordinality = c.place
      where c.keyring_id is not null;
  end if;
  v_now := array(select t from rekey._targets() t);
  perform rekey._refuse_blocked(keyrings, v_now);
  if rekey._target_state() is distinct from v_locked.functions
     or array(select t.relation from unnest(v_targets) t order by t.relation) is distinct from array(
       select t.relation from unnest(v_now) t
       where t.problem is null and t.target not in (select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e) order by t.relation) then
    raise exception 'a protected column or its partitions were changed while its rows were counted' using errcode = 'RK005',
      hint = 'Try again.';
  end if;
end
$$;
comment on function rekey._count is
  'Counts every target by keyring and version, in one snapshot; opening: checks every tag too, but those that the verification checked before (rekey._open_rows() says more of the columns). A combination may come in several rows. locked: what rekey._lock_targets() locked in this transaction; NULL: nothing yet. RK005: a target is blocked.';

create or replace function rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint := nextval('rekey._pass_id');
  v_due bigint := (select sum(r.rows_total) from rekey.rotations r where r.id = any (rotations));
begin
  -- (They are locked: their sizes are those of what a snapshot from before sees, or larger.)
  with large as (
    insert into rekey._verified (verification_id, target, relation, system_identifier, filenode, functions, since)
    select v_id, t.target, t.relation, rekey._system_identifier(), pg_relation_filenode(t.relation), rekey._target_state(t.function_name), pg_snapshot_xmin(pg_current_snapshot())
    from unnest(targets) t
    where t.problem is null and pg_table_size(t.relation) > 2097152
      -- A few rows of an indexed table: the index finds them, and the last step opens them. (They are counted where few are due.)
      and not (t.indexed and v_due < 5000 and (
        select coalesce(sum(c.rows), 0) from rekey._call_count(array[t.function_name], array[t.relation], keyrings) c
        ) < least(pg_relation_size(t.relation) / current_setting('block_size')::integer, 5000))
    returning target, relation
  )
  insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
  select v_id, false, 'verify', l.target, l.relation, format('(%s,0)', f.first)::tid, least(f.first + s.chunk, s.blocks), (256 * rekey._batch_size(cardinality(rotations)))::integer
  from large l
  cross join lateral (
    select pg_relation_size(l.relation) / current_setting('block_size')::integer as blocks, rekey._chunk_blocks(l.relation) as chunk) s
  cross join lateral generate_series(0, s.blocks - 1, s.chunk) as f(first);
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r set verification_id = v_id where r.id = any (rotations) and r.state = 'verifying';
  return v_id;
end
$$;
comment on function rekey._begin_verification is 'Begins a verification of these rotations and their keyrings: splits what is large of these targets, which the caller has locked, into chunks. Returns its number.';

create or replace function rekey._verify_batch(who_else text, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_settings rekey.settings := rekey._settings();
  v_size double precision;
  v_max_rows integer;
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_target rekey._target;
  v_until bigint;
  v_found record;
  v_refused boolean;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where c.kind = 'verify' and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.verification_id = c.pass_id and r.state = 'verifying' and rekey._is_due(r.next_attempt_at))
  order by c.attempts > 0, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select rekey._batch_size(count(*)::integer) into v_size from rekey.rotations r where r.verification_id = v_chunk.pass_id;
  -- To check four rows costs about what it costs to re-encrypt one.
  select 4 * w.rows, w.wait into v_max_rows, wait from rekey._throttle((1000 * v_size)::integer) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;
  -- All of them: who leaves a verification does not come back to it.
  select array_agg(r.id order by r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
  from rekey.rotations r where r.verification_id = v_chunk.pass_id and r.state = 'verifying';
  if v_ids is null then
    return;
  end if;
  v_chunk := rekey._pace(v_chunk, who_else);
  perform rekey._take_in_hand(v_chunk.relation);
  begin
    event := 'checked';
    keyring_count := cardinality(v_ids);
    rows := 0;
    v_target := rekey._target_of(v_chunk);
    if v_target.problem is null then
      -- Reads nothing, but locks the table, so that what is found out about it remains true.
      perform from rekey._count_rows(array[v_target], '{}');
      v_target := rekey._target_of(v_chunk);
    end if;
    if v_target.problem is not null or rekey._checked_since(v_chunk.pass_id, v_target) is null then
      update rekey._chunks c set kind = 'doubtful' where c.id = v_chunk.id;
      return;
    end if;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_chunk.target and q.resolved_at is null and q.sqlstate is not null);
    loop
      v_until := least(rekey._block(v_chunk.first) + v_chunk.batch_blocks, v_chunk.until_block);
      select s.* into v_found from rekey._call_scan(v_target.function_name, v_chunk.relation, v_chunk.first,
        format('(%s,0)', v_until)::tid, v_keyrings, null, v_max_rows, (2097152 * v_size)::bigint) s;
      rows := rows + coalesce(cardinality(v_found.rows), 0);
      if exists (select from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization))
         or v_refused and exists (select from rekey._refused_rows(v_chunk.target, v_chunk.relation, v_found.ciphertexts, v_found.keys)) then
        insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
        values (v_chunk.pass_id, false, 'doubtful', v_chunk.target, v_chunk.relation, v_chunk.first,
          coalesce(rekey._block(v_found.next) + 1, v_until), v_chunk.batch_blocks);
      end if;
      v_chunk.first := coalesce(rekey._next_row(v_found.next), format('(%s,0)', v_until)::tid);
      if rekey._block(v_chunk.first) >= v_chunk.until_block then
        perform rekey._pass_on(v_chunk);
        exit;
      elsif v_settings.max_rows_per_second is not null or clock_timestamp() - v_begin >= v_settings.batch_target then
        update rekey._chunks c
        set first = v_chunk.first, attempts = 0, next_attempt_at = null,
            pace = v_chunk.pace, gives_way_to = v_chunk.gives_way_to, looked_at = v_chunk.looked_at, transactions = v_chunk.transactions
        where c.id = v_chunk.id;
        exit;
      end if;
    end loop;
    perform rekey._note_pace(v_begin, rows / 4);
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('verification', v_chunk.pass_id, 'target', v_chunk.target, 'rotations', v_ids[1:20],
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, true);
      -- Whom it concerns is found out by the last step, which opens these rows, and waits for nobody else's.
      update rekey._chunks c
      set attempts = c.attempts + 1, last_error = v_error, next_attempt_at = clock_timestamp() + least(power(2, c.attempts), 300) * interval '1 second',
          kind = case when not rekey._is_passing(sqlstate) or c.attempts >= 2 then 'doubtful' else c.kind end
      where c.id = v_chunk.id;
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._verify_batch is
  'Checks some rows of one chunk of a verification, if there is one that no other worker has in hand. Where one does not open, the relation is not as the verification found it, or an error comes again, it leaves them to the last step.';

-- To be taken for what it is, or for a table whose rows something hides: whoever emptied it says so.
create or replace function rekey._emptied(counted jsonb, keyrings integer[]) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_object_agg(e.keyring_id, e.targets)
  from (
    select h.keyring_id, jsonb_agg(jsonb_build_object('target', h.target, 'why',
      format('it held %s rows of the keyring at the last complete count, and holds none now: %s confirms that', h.rows, h.way)) order by h.target) as targets
    from (
      select c.label, s.key::integer, s.value::bigint, format('rekey.rebind_column(%L, %L), or pg-rekey columns rebind,', c.relation_name, c.column_name)
      from rekey.protected_columns c cross join lateral jsonb_each_text(c.seen) s
      union all
      select 'rekey.secrets', s.keyring_id, s.rows, format('rekey.confirm_emptied(%L), or pg-rekey keyrings confirm-emptied,', k.name)
      from rekey._secrets_seen s join rekey.keyrings k on k.id = s.keyring_id
    ) as h(target, keyring_id, rows, way)
    where h.rows >= 1000 and h.keyring_id = any (keyrings)
      and not exists (select from jsonb_to_recordset(counted) as f(target text, keyring_id integer, rows bigint)
                      where f.target = h.target and f.keyring_id = h.keyring_id and f.rows > 0)
    group by h.keyring_id) e;
end;
comment on function rekey._emptied is
  'By keyring, the protected columns, and rekey.secrets, that held 1,000 of its rows or more at their last complete count, and none at this one: what rotations have to wait for. counted: objects with target, keyring_id, rows.';

create or replace function rekey._note_seen(counted jsonb, keyrings integer[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_before jsonb;
  v_others integer[];
begin
  if keyrings = '{}' then
    return;
  end if;
  insert into rekey._secrets_seen (keyring_id, rows)
  select k.id, coalesce(f.opened, 0)
  from unnest(keyrings) as k(id)
  left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = 'rekey.secrets' and f.keyring_id = k.id
  on conflict (keyring_id) do update set rows = excluded.rows where _secrets_seen.rows <> excluded.rows;
  for v_column in select c.* from rekey.protected_columns c order by c.id loop
    v_before := v_column.seen;
    continue when v_before is null and rekey._column_problem(v_column) is not null;
    -- The first complete count: of the other keyrings that stand there, those of which a row opens.
    if v_column.seen is null then
      select array_agg(distinct c.keyring_id) into v_others
      from rekey._count_rows(rekey._targets_now(v_column.label), null) c
      where c.keyring_id <> all (keyrings);
      v_column.seen := coalesce((select jsonb_object_agg(o.id, 1) from unnest(v_others) as o(id) where rekey._any_opens(v_column.label, o.id)), '{}');
    end if;
    v_column.seen := v_column.seen || coalesce((
      select jsonb_object_agg(k.id, coalesce(f.opened, 0))
      from unnest(keyrings) as k(id)
      left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = v_column.label and f.keyring_id = k.id
      where f.opened > 0 or v_column.seen ? k.id::text), '{}');
    if v_column.seen is distinct from v_before and rekey._column_problem(v_column) is null then
      update rekey.protected_columns c set seen = v_column.seen where c.id = v_column.id;
    end if;
  end loop;
end
$$;
comment on function rekey._note_seen is
  'Notes how many rows of these keyrings a complete count saw in each protected column, and in rekey.secrets. counted: objects with target, keyring_id, opened.';

create or replace function rekey._any_opens(label text, keyring_id integer) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_step bigint;
  v_found record;
begin
  for v_target in select t.* from rekey._targets(label) t loop
    v_from := '(0,0)';
    while v_from is not null loop
      select s.* into v_found from rekey._scan_on(v_target, array[keyring_id], v_from, v_step) s;
      v_step := v_found.next_step;
      if cardinality(v_found.ciphertexts) > (
           select coalesce(sum(cardinality(c.failed_places)), 0) from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization) c) then
        return true;
      end if;
      v_from := v_found.next_first;
    end loop;
  end loop;
  return false;
end
$$;
comment on function rekey._any_opens is 'Whether a protected column holds a value of this keyring that opens.';

create or replace function rekey._refused_plain(label text, rotation_id bigint) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_found record;
  v_refused bigint := 0;
begin
  for v_target in
    select t.* from rekey._targets(label) t
    where t.problem is null and exists (
      select from rekey.rotation_failures q
      where q.rotation_id = _refused_plain.rotation_id and q.relation = t.relation::text and q.version is null and q.resolved_at is null)
  loop
    v_from := '(0,0)';
    while v_from is not null loop
      -- They stay locked until it is noted that they are not behind.
      select s.* into v_found from rekey._call_read(v_target.function_name, v_target.relation, v_from, '(4294967294,0)', null, null, 1000, 2097152) s;
      v_refused := v_refused + (
        select count(*) from unnest(v_found.keys) as k(row_key)
        where exists (
          select from rekey.rotation_failures q
          where q.rotation_id = _refused_plain.rotation_id and q.target = label and q.relation = v_target.relation::text
            and q.row_hash = rekey._row_hash(k.row_key) and q.version is null and q.resolved_at is null));
      v_from := rekey._next_row(v_found.next);
    end loop;
  end loop;
  return v_refused;
end
$$;
comment on function rekey._refused_plain is
  'How many rows of a column that hold no envelope this adoption has put into the quarantine. By their keys: an entry whose row is gone says nothing of a value that came meanwhile.';

-- What cannot be counted is not complete. The rotations of other keyrings go on.
create or replace function rekey._hold_blocked(rotations bigint[]) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocked jsonb := rekey._blocked_targets((select array_agg(r.keyring_id) from rekey.rotations r where r.id = any (rotations)));
begin
  if v_blocked is null then
    return null;
  end if;
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r
  set blocked_by = b.blocked, blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '10 seconds'
  from (
    select o.id, (
      select jsonb_agg(t.value order by t.value ->> 'target') from jsonb_array_elements(v_blocked) t
      left join rekey.protected_columns c on c.label = t.value ->> 'target'
      where c.id is null or rekey._may_hold(c, array[o.keyring_id])) as blocked
    from rekey.rotations o where o.id = any (rotations)) b
  where r.id = b.id and b.blocked is not null and r.state = 'verifying';
  return v_blocked;
end
$$;
comment on function rekey._hold_blocked is 'Has the rotations wait that a blocked target may hold rows of; returns which targets these are, NULL: none.';

create or replace function rekey._still_verifying(rotations bigint[]) returns integer[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  return array(select r.keyring_id from rekey.rotations r where r.id = any (rotations) and r.state = 'verifying');
end
$$;
comment on function rekey._still_verifying is 'Locks these rotations, and returns the keyrings of those that were not paused, superseded or rolled back.';

create or replace function rekey._verify(out event text, out keyring_count integer, out rows bigint, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_keyrings integer[];
  v_verification bigint;
  v_locked rekey._locked;
  v_results jsonb;
  v_found record;
  v_count record;
  v_error record;
  v_live integer[];
  v_targets text[];
  v_places oid[];
  v_of integer[];
  v_versions integer[];
  v_rows bigint[];
  v_failed_rows bigint[];
  v_refused_rows bigint[];
  v_errors jsonb := '[]'::jsonb;
  v_held jsonb;
  v_held_ids bigint[] := '{}'::bigint[];
  v_failed bigint;
  v_completed bigint[] := '{}'::bigint[];
  v_blocked jsonb;
  v_refused jsonb;
  v_adoptions jsonb;
  v_seen jsonb;
  v_emptied jsonb;
  v_unfilled text;
begin
  -- Those that begin a verification together, else those of one whose chunks are done.
  select array_agg(r.id), array_agg(r.keyring_id), r.verification_id into v_ids, v_keyrings, v_verification
  from rekey.rotations r
  where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
    and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')
  group by r.verification_id
  order by r.verification_id nulls first
  limit 1;
  if v_ids is null then
    return;
  end if;
  rows := 0;
  v_blocked := rekey._hold_blocked(v_ids);
  if v_blocked is not null then
    select array_agg(r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
    from rekey.rotations r where r.id = any (v_ids) and r.state = 'verifying' and rekey._is_due(r.next_attempt_at);
    if v_ids is null then
      event := 'blocked';
      keyring_count := 0;
      detail := jsonb_build_object('targets', v_blocked);
      return;
    end if;
  end if;
  begin
    v_locked := rekey._lock_targets(apart => true);
    if v_verification is null then
      v_verification := rekey._begin_verification(v_ids, v_keyrings, v_locked.targets);
      if exists (select from rekey._chunks c where c.pass_id = v_verification) then
        event := 'planned';
        keyring_count := cardinality(v_ids);
        detail := jsonb_build_object('verification', v_verification, 'rotations', v_ids[1:20]);
        return;
      end if;
    end if;
    for v_count in select c.* from rekey._count(v_keyrings, true, v_verification, apart => true, locked => v_locked) c loop
      -- Everything is counted by now, and the names of what failed are noted as they come: they may be too many for one value.
      if v_live is null then
        v_live := rekey._still_verifying(v_ids);
      end if;
      if v_count.error is not null then
        v_errors := v_errors || jsonb_build_object('target', v_count.target, 'relation', v_count.relation::oid, 'error', v_count.error, 'sqlstate', v_count.code);
        continue;
      end if;
      v_places := v_places || v_count.relation::oid;
      v_targets := v_targets || v_count.target;
      v_of := v_of || v_count.keyring_id;
      v_versions := v_versions || v_count.version;
      v_rows := v_rows || v_count.rows;
      v_failed_rows := v_failed_rows || v_count.failed;
      v_refused_rows := v_refused_rows || v_count.refused;
      if v_count.failed > 0 and v_count.keyring_id = any (v_live) then
        perform rekey._quarantine(v_count.target, v_count.relation, array_fill(v_count.keyring_id, array[cardinality(v_count.failed_keys)]),
          array_fill(v_count.version, array[cardinality(v_count.failed_keys)]), v_count.failed_keys, v_count.failed_problems,
          verification_id => v_verification);
      -- (After a rollback, what was refused may stand where it is to be.)
      elsif v_count.refused > 0
        and not exists (select from rekey.rotations r where r.id = any (v_ids) and (r.keyring_id, r.to_version) = (v_count.keyring_id, v_count.version)) then
        update rekey.rotation_failures q set verification_id = v_verification
        from unnest(v_count.failed_keys) as k(row_key)
        where q.keyring_id = v_count.keyring_id and q.target = v_count.target and q.relation = v_count.relation::text
          and q.row_hash = rekey._row_hash(k.row_key) and q.resolved_at is null;
      end if;
    end loop;
    with counted as (
      select u.* from unnest(v_targets, v_places, v_of, v_versions, v_rows, v_failed_rows, v_refused_rows)
        as u(target, relation, keyring_id, version, rows, failed, refused)
    ), summed as (
      select c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed - c.refused) filter (where c.version <> r.to_version) as behind
      from counted c
      join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids)
      group by c.keyring_id
    ), held as (
      -- Whose rows are in what raised: as it counted them, or, where it did not count, as far as is known.
      select distinct on (r.id) r.id, e.error, e.sqlstate, e.target, e.relation
      from jsonb_to_recordset(v_errors) as e(target text, relation oid, error text, sqlstate text)
      left join rekey.protected_columns p on p.label = e.target
      join rekey.rotations r on r.id = any (v_ids)
        and case when exists (select from counted c where c.relation = e.relation and c.target = e.target)
                 then exists (select from counted c where c.relation = e.relation and c.target = e.target and c.keyring_id = r.keyring_id)
                 else p.id is null or rekey._may_hold(p, array[r.keyring_id]) end
      order by r.id, e.target, e.relation
    )
    select (select jsonb_agg(to_jsonb(s)) from summed s), (select coalesce(jsonb_agg(to_jsonb(h)), '[]') from held h),
      (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
        select c.target, c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed) as opened from counted c where c.version > 0 group by c.target, c.keyring_id) t)
    into v_results, v_held, v_seen;
    v_emptied := rekey._emptied(v_seen, v_keyrings);
    -- Of an adoption, what is no envelope yet is behind, but for rows that were refused. (They are locked: so what is counted after
    -- them has them in it.)
    select jsonb_object_agg(r.id, rekey._refused_plain(p.label, r.id)) into v_refused
    from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
    where r.id = any (v_ids) and r.trigger = 'adoption';
    select jsonb_agg(to_jsonb(a)) into v_adoptions
    from (
      select r.id as rotation_id, p.label, (v_refused ->> r.id::text)::bigint as refused,
        (select sum(c.rows) from rekey._count_rows(rekey._targets_now(p.label), null) c where c.keyring_id is null) as rows
      from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
      where r.id = any (v_ids) and r.trigger = 'adoption') a;

    if v_live is null then
      v_live := rekey._still_verifying(v_ids);
    end if;
    for v_error in
      select h.error, h.sqlstate, h.target, h.relation, array_agg(h.id) as ids
      from jsonb_to_recordset(v_held) as h(id bigint, error text, sqlstate text, target text, relation oid) group by 1, 2, 3, 4
    loop
      perform rekey._record_error(v_error.ids, v_error.error, v_error.sqlstate, v_error.target, v_error.relation::regclass);
      v_held_ids := v_held_ids || v_error.ids;
    end loop;
    for v_found in
      select r.id, r.keyring_id, r.passes, coalesce(s.rows, 0) as rows, a.label as adopted,
        case when r.trigger <> 'adoption' then coalesce(s.behind, 0)
             else coalesce(a.rows, 0) - coalesce(a.refused, 0) end as behind,
        coalesce(a.rows, 0) = 0 as adopted_all
      from rekey.rotations r
      left join jsonb_to_recordset(v_results) as s(keyring_id integer, rows bigint, behind bigint) on s.keyring_id = r.keyring_id
      left join jsonb_to_recordset(v_adoptions) as a(rotation_id bigint, label text, rows bigint, refused bigint) on a.rotation_id = r.id
      where r.id = any (v_ids) and r.id <> all (v_held_ids) and r.state = 'verifying'  -- not paused, superseded or rolled back meanwhile
      order by r.id
    loop
      rows := rows + v_found.rows;
      if v_emptied ? v_found.keyring_id::text then
        update rekey.rotations r
        set blocked_by = v_emptied -> v_found.keyring_id::text, blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = clock_timestamp() + interval '10 seconds'
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.verification_id is distinct from v_verification
        and (q.version is not null or q.target = v_found.adopted and v_found.adopted_all);
      update rekey.rotation_failures q set rotation_id = v_found.id
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.rotation_id is distinct from v_found.id and q.verification_id = v_verification;
      select count(*) into v_failed from rekey.rotation_failures q
      where q.keyring_id = v_found.keyring_id and q.rotation_id = v_found.id and q.resolved_at is null;
      v_unfilled := case when v_found.adopted is null then rekey._unfilled(v_found.keyring_id, v_found.id) end;
      if v_found.behind > 0 or v_unfilled is not null then
        update rekey.rotations r
        set state = 'running', rows_failed = v_failed,
            blocked_by = case when v_found.behind > 0 then jsonb_build_array(jsonb_build_object('rows', v_found.behind, 'why', 'locked or moved'))
              else jsonb_build_array(jsonb_build_object('target', v_unfilled, 'why', 'its index is to be filled')) end,
            blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = case when v_found.passes > 1 then
              clock_timestamp() + least(power(2, v_found.passes - 2), 30) * interval '1 second' end
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotations r
      set state = case when v_failed > 0 then 'completed_with_failures' else 'completed' end, rows_failed = v_failed,
          rows_total = r.rows_done + v_failed,  -- what was written or deleted meanwhile needed no sweep
          blocked_by = null, blocked_since = null, next_attempt_at = null, verification_id = null, finished_at = clock_timestamp()
      where r.id = v_found.id;
      v_completed := v_completed || v_found.id;
      if v_found.adopted is null then
        perform rekey._complete_indexes(v_found.keyring_id, v_found.id, (
          select jsonb_agg(jsonb_build_object('target', u.target, 'version', u.version))
          from unnest(v_targets, v_of, v_versions) as u(target, keyring_id, version) where u.keyring_id = v_found.keyring_id and u.version > 0));
      end if;
    end loop;
    perform rekey._note_seen(v_seen, array(select r.keyring_id from rekey.rotations r where r.id = any (v_completed)));
    perform rekey._clear_chunks();
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.completed', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('state', r.state, 'rows', r.rows_done, 'failures', r.rows_failed)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_completed)), '[]'));
    event := case when v_completed <> '{}' then 'completed' when v_held_ids @> v_ids then 'error' else 'verified' end;
    keyring_count := cardinality(v_ids);
    detail := jsonb_strip_nulls(jsonb_build_object('rotations', v_ids[1:20], 'completed', v_completed[1:20], 'errors', nullif(v_errors, '[]')));
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
comment on function rekey._verify is
  'Begins the verification of rotations that passed the barrier; or ends one: opens what was not checked yet, and completes the rotations that have no row left on an older version.';
