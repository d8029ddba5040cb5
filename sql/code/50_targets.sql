-- The tables that a rotation sweeps. Each has functions in schema rekey_targets, owned by the table's owner, that read and
-- write that table and nothing else. They know no key, and none of our functions:
--   <name>_count(relation, keyrings): rows by keyring and version, in the snapshot of the calling statement; no keyrings: only locks
--     the relation, with its partitions
--   <name>_scan(relation, first, until, keyrings, since, max_rows, max_bytes): rows in that range of row pointers, in that snapshot
--   <name>_read(relation, first, until, keyrings, versions, max_rows, max_bytes): rows that are due; what is no envelope, it locks
--   <name>_write(relation, rows, starts, ciphertexts, indexes): locks those of them that still begin so, and stores what the engine made of
--     them; indexes: the values of a blind index, with the ciphertexts or without (57_blind_index.sql)
-- What has more than 64 MiB with its context and key is not read: scan and read return a header and the word "large" in its
-- place; NULL where it is no envelope.
-- rekey.secrets is the first target; protected columns are the others (51_columns.sql).

create or replace function rekey_targets.secrets_count(relation regclass, keyrings integer[])
returns table (keyring_id integer, version integer, rows bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index on keyring_id
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  return query
    select s.keyring_id, s.key_version, count(*)
    from rekey.secrets s
    where keyrings is null or s.keyring_id = any (keyrings)
    group by s.keyring_id, s.key_version;
end
$$;
comment on function rekey_targets.secrets_count is 'Counts rekey.secrets by keyring and version; keyrings NULL: all.';

create or replace function rekey_targets.secrets_scan(
  relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index too, and looks many keyrings up in a hash table
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with found as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    where s.ctid >= first and s.ctid < until and (keyrings is null or s.keyring_id = any (keyrings))
      and (since is null or age(s.xmin) <= age(since))
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(f.ciphertext)) as bytes from found f
  ), sized as (
    select f.*, 0 as before from found f where (select t.bytes from total t) <= max_bytes
    union all
    select f.*, sum(octet_length(f.ciphertext)) over (order by f.row rows unbounded preceding) - octet_length(f.ciphertext)
    from found f where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes), null::bytea[]
  into next, rows, ciphertexts, contexts, keys, indexes
  from sized s;
end
$$;
comment on function rekey_targets.secrets_scan is
  'Rows of rekey.secrets whose row pointer lies from first on and before until: at most max_rows of them, and little more than max_bytes of ciphertext. since: only what this transaction or a later one wrote; NULL: all. contexts: without the label. next: the last row returned, where more may follow; NULL at the end of the range.';

create or replace function rekey_targets.secrets_read(
  relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index too
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with due as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    join unnest(keyrings, versions) as w(keyring_id, version) on w.keyring_id = s.keyring_id and w.version <> s.key_version
    where s.ctid >= first and s.ctid < until
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(d.ciphertext)) as bytes from due d
  ), sized as (
    select d.*, 0 as before from due d where (select t.bytes from total t) <= max_bytes
    union all
    select d.*, sum(octet_length(d.ciphertext)) over (order by d.row rows unbounded preceding) - octet_length(d.ciphertext)
    from due d where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes), null::bytea[]
  into next, rows, ciphertexts, contexts, keys, indexes
  from sized s;
end
$$;
comment on function rekey_targets.secrets_read is
  'Rows of rekey.secrets in a range that stand on another version than the given one of their keyring; as secrets_scan, and without locks.';

-- A row pointer names the same row as long as the statement lasts that calls all this: what its snapshot may see is not removed.
-- Whether the row is still as it was read tell its pointer, once it is locked, and the header and IV of its envelope. (Before 15.15,
-- 17.7 and 18.0, a search by pointer did not look at the pointer again where it had waited for another session's UPDATE.)
create or replace function rekey_targets.secrets_write(
  relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], indexes bytea[], out locked tid[], out written bigint
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if relation <> 'rekey.secrets'::regclass or indexes is not null then
    raise exception '% is not rekey.secrets, which has no blind index', relation using errcode = 'RK005';
  end if;
  -- (A subselect hides from the planner how many rows there are: it would rather read the whole table than follow so many pointers.
  -- IS TRUE keeps what a value begins with from being the key of a join, for which every value would be read.)
  with held as materialized (
    select u.row, s.ctid as now
    from unnest((select secrets_write.rows), (select secrets_write.starts)) as u(row, start)
    join rekey.secrets s on s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true
    for no key update of s skip locked
  )
  select array_agg(h.row) into locked from held h where h.now = h.row;
  if cardinality(locked) < cardinality(rows) then
    select array_agg(u.row), array_agg(u.start), array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext) where u.row = any (locked);
  end if;
  update rekey.secrets s set ciphertext = u.ciphertext
  from rows from (unnest((select secrets_write.rows)), unnest((select secrets_write.starts)), unnest((select ciphertexts))) as u(row, start, ciphertext)
  where locked is not null and s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true;
  get diagnostics written = row_count;
  set constraints all immediate;
end
$$;
comment on function rekey_targets.secrets_write is
  'Locks the rows that secrets_read returned in this statement, but those that somebody else has locked or changed, and stores new ciphertexts in them. starts: header and IV (27 bytes) of what was read. locked: the rows that it had; written: how many were changed.';

-- What the code of a table may leave behind in the session of the worker, there to act with the worker's rights: a search
-- path, which reaches even the functions that called it, or another setting; a cursor that is opened at COMMIT; a prepared
-- statement under a name that the client uses; a temporary view in front of a table. Run by rekey_sweeper.
create or replace function rekey._session_state(search_path text) returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array[
    -- (The view has them in the order of their names. To sort them anew takes as long as to show them.)
    search_path || ' ' || (
      select encode(sha256(convert_to(string_agg(s.name || '=' || s.setting, ','), 'UTF8')), 'hex')
      from pg_settings s where s.name <> 'search_path'),
    (select string_agg(c.name, ',' order by c.name) from pg_cursors c where c.is_holdable),
    -- (By the dependencies of the schema, which have an index: pg_type may be large.)
    (select string_agg(t.oid || ' ' || t.xmin, ',' order by t.oid)
     from pg_depend d join pg_class c on c.oid = d.objid join pg_type t on t.oid = c.reltype
     where d.refclassid = 'pg_namespace'::regclass and d.refobjid = pg_my_temp_schema() and d.classid = 'pg_class'::regclass),
    array_to_string(rekey._prepared(), ',')];
end
$$;
comment on function rekey._session_state is 'What must be as before once the code of a table has run: settings, cursors, temporary objects, prepared statements. search_path: the one outside of this function.';

create or replace function rekey._refuse_traces(before text[], search_path text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_after text[] := rekey._session_state(search_path);
begin
  for v_place in 1 .. cardinality(before) loop
    if v_after[v_place] is distinct from before[v_place] then
      raise exception 'code of the table left % behind', (array['a setting', 'a cursor', 'a temporary object', 'a prepared statement'])[v_place]
        using errcode = 'RK005', hint = 'Its triggers run in the session of whoever works on the rotation, and must leave it as it was.';
    end if;
  end loop;
end
$$;
comment on function rekey._refuse_traces is 'RK005 where the session is not as rekey._session_state() found it before.';

create or replace function rekey._prepared() returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(select p.name || ' ' || extract(epoch from p.prepare_time) from pg_prepared_statements p order by 1);
end
$$;
comment on function rekey._prepared is 'The prepared statements of the session.';

create or replace function rekey._forget_prepared(before text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text;
begin
  for v_name in
    select p.name from pg_prepared_statements p where not p.name || ' ' || extract(epoch from p.prepare_time) = any (before)
  loop
    execute format('deallocate %I', v_name);
  end loop;
end
$$;
comment on function rekey._forget_prepared is 'Drops the prepared statements that were made since: no rollback does.';

-- Row triggers are queued by changes of rows, and by nothing else. So where firing all that is queued changes no row,
-- nothing is queued any more, and nothing is left for COMMIT, where it would run as the worker.
-- Who changes a row of a relation holds such a lock on it until the transaction ends. The counts have a part of earlier
-- transactions that was not reported yet: they tell by being compared.
create or replace function rekey._changes() returns text
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(string_agg(format('%s %s', c.oid,
    pg_stat_get_xact_tuples_inserted(c.oid) + pg_stat_get_xact_tuples_updated(c.oid) + pg_stat_get_xact_tuples_deleted(c.oid)), ',' order by c.oid), '')
  from (select distinct l.relation as oid from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'relation'
          and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) c;
end;
comment on function rekey._changes is 'The relations that this transaction may have changed rows of, and of how many it has.';

create or replace function rekey._refuse_changes(before text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('track_counts') = 'off' then
    raise exception 'track_counts is off: what the triggers of a table do cannot be checked' using errcode = 'RK005',
      hint = 'Set track_counts to on.';
  elsif rekey._changes() is distinct from before then
    raise exception 'code of the table changed rows where it may not, or queued triggers for the end of the transaction' using errcode = 'RK005',
      hint = 'A trigger that is deferred may not defer others: at COMMIT they would run as whoever works on the rotation.';
  end if;
end
$$;
comment on function rekey._refuse_changes is 'RK005 where rows were changed since rekey._changes().';

-- These are owned by rekey_sweeper (footer.sql), which has no other right: whatever a target's function has become,
-- it gains nothing from being called here. Why they begin as they do: rekey._call_tenant_check (40_tenants.sql). What follows
-- the call is named with its schema: the search path may be another one now.
-- What one owner's code leaves behind is looked for before another's is called. (An empty file holds no rows for any snapshot.)
create or replace function rekey._call_count(
  function_names name[], relations regclass[], keyrings integer[], apart boolean = false, whole boolean = false
)
returns setof rekey._counted
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_run record;
  v_state text[];
  v_changes text;
  v_keyring integer;
  v_version integer;
  v_rows bigint;
  v_next tid;
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
  v_context text;
  v_found rekey._counted[];
  v_last integer;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_count does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  for v_run in
    select c.name <> 'secrets' as foreign, keyrings = '{}' as locks, count(*)::integer as count, array_agg(c.place::integer) as places,
      array_agg(c.relation) as relations, array_agg(format(case when whole
          then 'select null, null, pg_catalog.cardinality(s.rows), s.next, s.ciphertexts, s.contexts, s.keys
            from rekey_targets.%I($1, ''(0,0)'', ''(4294967294,0)'', $2, null, 4000, 2097152) s'
          else 'select s.keyring_id, s.version, s.rows, null, null, null, null from rekey_targets.%I($1, $2) s' end,
        c.name || case when whole then '_scan' else '_count' end)) as statements
    from unnest(function_names, relations) with ordinality as c(name, relation, place)
    left join pg_proc p on p.pronamespace = 'rekey_targets'::regnamespace and p.proname = c.name || '_count'
    group by c.name <> 'secrets', p.proowner
    order by p.proowner
  loop
    v_found := '{}';
    v_last := 0;
    begin
      if v_run.foreign then
        v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
        v_changes := rekey._changes();
      end if;
      for v_place in 1 .. v_run.count loop
        begin
          if v_run.locks or pg_catalog.pg_relation_size(v_run.relations[v_place]) operator(pg_catalog.>) 0 then
            for v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys in
              execute v_run.statements[v_place] using v_run.relations[v_place], keyrings
            loop
              v_last := v_last operator(pg_catalog.+) 1;
              v_found[v_last] := row(v_run.places[v_place], v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys, null, null, null)::rekey._counted;
            end loop;
          end if;
        exception when assert_failure or others then
          get stacked diagnostics v_context = pg_exception_context;
          if not apart then
            raise;
          end if;
          v_last := v_last operator(pg_catalog.+) 1;
          v_found[v_last] := row(v_run.places[v_place], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted;
        end;
      end loop;
      if v_run.foreign then
        perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
        perform rekey._refuse_changes(v_changes);
      end if;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart then
        raise;
      elsif v_run.count = 1 then
        v_found := array[row(v_run.places[1], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted];
      else
        -- Each by itself, to find whose it is.
        v_found := array(
          select row(p.place, c.keyring_id, c.version, c.rows, c.next, c.ciphertexts, c.contexts, c.keys, c.error, c.code, c.context)::rekey._counted
          from unnest(v_run.places) as p(place)
          cross join lateral rekey._call_count(function_names[p.place:p.place], relations[p.place:p.place], keyrings, true, whole) c);
      end if;
    end;
    return query select f.* from unnest(v_found) as f;
  end loop;
end
$$;
comment on function rekey._call_count is 'Calls the count functions of targets. keyrings empty: locks each relation, with its partitions, and counts nothing. apart: an error of one is a row, and does not stop the others; what came of it before is not to be trusted. whole: calls their scan functions, for all rows of each relation, or the first of them, up to next.';

create or replace function rekey._call_scan(
  function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_scan does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_scan')
  into next, rows, ciphertexts, contexts, keys, indexes
  using relation, first, until, keyrings, since, max_rows, max_bytes;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_scan is 'Calls the scan function of a target.';

create or replace function rekey._call_read(
  function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  touch_from tid = null, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[], out state text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_read does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  if touch_from is not null then
    execute format('select from rekey_targets.%I($1, $2, $3, null, $4, 1, 1)', function_name || '_scan')
    using relation, touch_from, first, pg_catalog.pg_current_xact_id()::xid;
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_read')
  into next, rows, ciphertexts, contexts, keys, indexes
  using relation, first, until, keyrings, versions, max_rows, max_bytes;
  if state is not null then
    perform rekey._refuse_traces(state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_read is
  'Calls the read function of a target. touch_from: its scan function before, for nothing, from there up to first. state: of the session, before and after.';

create or replace function rekey._call_write(
  function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], indexes bytea[] = null, out locked tid[], out written bigint
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_write does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := coalesce(state, rekey._session_state(pg_catalog.current_setting('search_path')));
  end if;
  execute format('select w.* from rekey_targets.%I($1, $2, $3, $4, $5) w', function_name || '_write')
  into locked, written using relation, rows, starts, ciphertexts, indexes;
  if v_state is not null then
    v_changes := rekey._changes();
  end if;
  set constraints all immediate;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_write is 'Calls the write function of a target. state: of the session, as rekey._call_read() left it; NULL: as it is now.';

create or replace function rekey._headers(ciphertexts bytea[]) returns bytea[]
language sql immutable parallel safe
begin atomic
  select array_agg(h.header)
  from (select distinct substr(u.ciphertext, 1, 11) as header from unnest(ciphertexts) as u(ciphertext)) h
  where octet_length(h.header) = 11 and substr(h.header, 1, 3) = '\x524b01'::bytea;
end;
comment on function rekey._headers is 'The different headers of envelopes.';

create or replace function rekey._shape_problem(ciphertext bytea) returns text
language sql immutable parallel safe
return case when octet_length(ciphertext) = 16 and substr(ciphertext, 12) = '\x6c61726765'::bytea then 'has more than 64 MiB, and was not read' else 'is no envelope' end;
comment on function rekey._shape_problem is 'What is wrong with what is no envelope. What is larger than any can be, targets do not read: a header, and the word large, stand for it.';

create or replace function rekey._reencrypt(
  rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], normalization text = null,
  out made_rows tid[], out starts bytea[], out made bytea[], out made_keyrings integer[], out failed_places integer[], out problems text[],
  out indexes bytea[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- the plan is kept, and does not know how many values and keys there will be
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_from_keyrings integer[];
  v_from_versions integer[];
  v_ivs bytea;
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)), array_agg(distinct rekey._int4(h.header, 3))
  into v_from_keyrings, v_from_versions, v_keyrings
  from unnest(v_headers) as h(header);
  v_versions := rekey._lock_active(v_keyrings);
  -- 64 IVs at a time: most of the cost is that of the call.
  select string_agg(rekey._random_bytes(1024), ''::bytea) into v_ivs from generate_series(1, (cardinality(ciphertexts) + 63) / 64);

  select array_agg(o.row) filter (where o.body is not null),
    array_agg(o.old_header || o.old_iv) filter (where o.body is not null),
    array_agg(o.header || o.iv || o.body || rekey._mac(o.key, o.aad, o.iv, o.body)) filter (where o.body is not null),
    array_agg(o.keyring_id) filter (where o.body is not null),
    array_agg(o.place) filter (where o.body is null),
    array_agg(case when o.plaintext is null then coalesce(o.old_problem, 'does not open: damaged, or of another row')
                   else coalesce(o.new_problem, 'the keyring has no active version') end) filter (where o.body is null),
    case when _reencrypt.normalization is not null then array_agg(o.index) filter (where o.body is not null) end
  into made_rows, starts, made, made_keyrings, failed_places, problems, indexes
  from (
    select p.*, case when p.plaintext is not null and p.key is not null then rekey._encipher(p.key, p.iv, p.plaintext) end as body,
      case when _reencrypt.normalization is not null then rekey._index_value(p.version, p.index_key, rekey._normalized(p.plaintext, _reencrypt.normalization)) end as index
    from (
      select u.*, substr(v_ivs, u.place * 16 - 15, 16) as iv, u.header || prefix || u.context as aad,
        case when u.old_key is not null then
          case when rekey._is_authentic(u.old_key, u.old_iv, u.sealed, u.old_header || prefix || u.context)
            then rekey._decipher(u.old_key, u.old_iv, u.sealed) end end as plaintext
      from (
        select c.place::integer as place, c.row, c.context, k.keyring_id, k.old_header, k.old_key, k.header, k.key, k.version, k.index_key, k.new_problem,
          substr(c.ciphertext, 12, 16) as old_iv, substr(c.ciphertext, 28) as sealed,
          case when k.old_header is not null then k.old_problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as old_problem
        from unnest(rows, ciphertexts, contexts) with ordinality as c(row, ciphertext, context, place)
        left join (
          with keys as materialized (
            select * from rekey._deks(v_from_keyrings || v_keyrings, v_from_versions || v_versions, sweeping => true)
          )
          select d.keyring_id, rekey._header(d.keyring_id, d.version) as old_header, d.key as old_key, d.problem as old_problem,
            rekey._header(a.keyring_id, a.version) as header, a.key, a.version, a.problem as new_problem,
            case when _reencrypt.normalization is not null then rekey._index_key(a.key, v_info) end as index_key
          from keys d
          left join (unnest(v_keyrings, v_versions) as w(keyring_id, version) join keys a using (keyring_id, version)) on w.keyring_id = d.keyring_id
          offset 0
        ) k on k.old_header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) u
      offset 0
    ) p
    offset 0
  ) o;
end
$$;
comment on function rekey._reencrypt is
  'Re-encrypts envelopes under the active version of their keyring; each is checked first. made: the new envelopes of made_rows, of made_keyrings; starts: header and IV of the old ones; failed_places: those of the given ones that do not open, and problems, why. prefix: what every context begins with. normalization: of a searchable column, whose index values are made too. Gives back no plaintext.';

create or replace function rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[], indexes bytea[] = null, normalization text = null)
returns table (header bytea, failed_places integer[], problems text[])
language plpgsql stable
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- as rekey._reencrypt()
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)) into v_keyrings, v_versions
  from unnest(v_headers) as h(header);
  return query
    select o.header, array_agg(o.place), array_agg(o.problem)
    from (
      select p.place, p.header,
        case when p.key is null then p.problem
             when not rekey._is_authentic(p.key, p.iv, p.sealed, p.aad) then 'does not open: damaged, or of another row'
             -- (What stands in the index under another version is behind: the next pass makes it anew.)
             when p.index is not null and substr(p.index, 1, 4) = substr(p.header, 8, 4)
               and p.index <> rekey._index_value(p.version, p.index_key, rekey._normalized(rekey._decipher(p.key, p.iv, p.sealed), _check.normalization))
               then 'its index value is not that of its value' end as problem
      from (
        select c.place::integer as place, substr(c.ciphertext, 1, 11) as header, k.key, k.version, k.index_key,
          case when _check.normalization is not null then c.index end as index,
          substr(c.ciphertext, 12, 16) as iv, substr(c.ciphertext, 28) as sealed, k.header || prefix || c.context as aad,
          case when k.header is not null then k.problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as problem
        from unnest(ciphertexts, contexts, indexes) with ordinality as c(ciphertext, context, index, place)
        left join (
          select rekey._header(d.keyring_id, d.version) as header, d.key, d.version, d.problem,
            case when _check.normalization is not null then rekey._index_key(d.key, v_info) end as index_key
          from rekey._deks(v_keyrings, v_versions, sweeping => true) d
          offset 0
        ) k on k.header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) p
      offset 0
    ) o
    where o.problem is not null
    group by o.header;
end
$$;
comment on function rekey._check is
  'Checks the tags of envelopes: the places of those that do not open, by header, with the reason. prefix: what every context begins with. normalization: of a searchable column, whose index values are compared too.';

create or replace function rekey._block(pointer tid) returns bigint
language sql immutable parallel safe
return split_part(trim(pointer::text, '()'), ',', 1)::bigint;
comment on function rekey._block is 'The block of a row pointer.';

create or replace function rekey._next_row(pointer tid) returns tid
language sql immutable parallel safe
return case when pointer is not null then format('(%s,%s)', rekey._block(pointer), split_part(trim(pointer::text, '()'), ',', 2)::integer + 1)::tid end;
comment on function rekey._next_row is 'The row pointer after this one.';

-- A part at a time: who asks for the first rows of all that is left has all of it read, each time. (Rows found by their pointers come in no
-- order that the server knows of.)
create or replace function rekey._scan_on(
  target rekey._target, keyrings integer[], first tid, step bigint = null, until bigint = 4294967294,
  out next_first tid, out next_step bigint, out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_end bigint := least(until, pg_relation_size(target.relation) / current_setting('block_size')::integer);
  v_until bigint;
  v_found record;
begin
  -- 256 blocks hold no more than 2 MB of what is not stored out of line.
  next_step := coalesce(step, 256);
  v_until := least(rekey._block(first) + next_step, v_end);
  select s.* into v_found from rekey._call_scan(
    target.function_name, target.relation, first, format('(%s,0)', v_until)::tid, keyrings, null, 4000, 2097152) s;
  ciphertexts := v_found.ciphertexts;
  contexts := v_found.contexts;
  keys := v_found.keys;
  indexes := v_found.indexes;
  next_first := case when v_found.next is not null then rekey._next_row(v_found.next) when v_until < v_end then format('(%s,0)', v_until)::tid end;
  next_step := case when v_found.next is not null then greatest(next_step / 2, 256)
                    when coalesce(cardinality(v_found.rows), 0) < 1000 then least(next_step * 2, 1048576) else next_step end;
end
$$;
comment on function rekey._scan_on is
  'Some rows of a target from a row pointer on, as its scan function finds them, and where the next call goes on; next_first NULL: no more before block until. step: how many blocks to read, as the last call said; NULL at first.';

create or replace function rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean = false, whole boolean = false)
returns setof rekey._counted
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.*
  from (select array_agg(t.function_name) as functions, array_agg(t.relation) as relations from unnest(targets) as t) a
  cross join lateral rekey._call_count(a.functions, a.relations, keyrings, apart, whole) c;
end;
comment on function rekey._count_rows is
  'Counts targets by keyring and version, in the snapshot of the caller''s statement, as rekey._call_count(); keyring NULL: values that are no envelopes. place: which of the targets.';

-- A blocked target may hold rows of the keyring that it is registered with, and of those that its last complete count saw.
-- Only rows that opened were counted there: whoever owns a table can write any header into it, and would block others by it.
create or replace function rekey._blocked_targets(keyrings integer[], targets rekey._target[] = null) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_agg(jsonb_build_object('target', t.target, 'why', t.problem) order by t.target)
    from unnest(coalesce(targets, array(select t from rekey._targets() t))) t
    left join rekey.protected_columns c on c.label = t.target
    where t.problem is not null and (keyrings is null or c.id is null or rekey._may_hold(c, keyrings)));
end
$$;
comment on function rekey._blocked_targets is
  'The targets that cannot be read or counted, and why; NULL: none. keyrings: only those that may hold rows of one of these; NULL: all. targets: as they were found; NULL: as they are now.';

create or replace function rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) returns boolean
language sql stable
return protected.seen is null or protected.keyring_id = any (keyrings)
  or exists (select from jsonb_each_text(protected.seen) s where s.key::integer = any (keyrings) and s.value::bigint > 0);
comment on function rekey._may_hold is 'Whether a protected column may hold rows of these keyrings: its own, and those that its last complete count saw.';

create or replace function rekey._refuse_blocked(keyrings integer[] = null, targets rekey._target[] = null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocked jsonb := rekey._blocked_targets(keyrings, targets);
begin
  if v_blocked is not null then
    raise exception '% is blocked: %', v_blocked -> 0 ->> 'target', v_blocked -> 0 ->> 'why' using errcode = 'RK005',
      hint = 'As long as it cannot be counted, nothing completes and no key is destroyed. See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;
comment on function rekey._refuse_blocked is
  'RK005 where a target is blocked that may hold rows of these keyrings, NULL: of any: what cannot be counted is never taken for empty. targets: as rekey._blocked_targets().';

-- The functions of the targets are looked at before and after they are called, each time as they are at that moment: what
-- an owner changes in between has no effect. After the call, its locks keep the tables from being changed.
create or replace function rekey._function_names(function_name name) returns name[]
language sql immutable parallel safe
return array[function_name || '_guard', function_name || '_sql', function_name || '_count', function_name || '_scan', function_name || '_read',
  function_name || '_write', function_name || '_trigger', function_name || '_look', function_name || '_carry', function_name || '_move', function_name || '_live']::name[];
comment on function rekey._function_names is 'What the functions of a target can be called: guard, sql, count, scan, read, write, trigger, and those of a blind index; not all have all of them. (An index finds them so; of a schema there is none.)';

create or replace function rekey._target_state(function_name name = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if function_name is not null then
    return (
      select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
      from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace
        and p.proname = any (rekey._function_names(function_name)));
  end if;
  return (
    select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
    from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace);
end
$$;
comment on function rekey._target_state is 'What changes whenever a function of a target does; NULL: of any.';

create or replace function rekey._refuse_snapshot() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this runs in READ COMMITTED only' using errcode = 'active_sql_transaction',
      hint = 'An older snapshot does not see every row that stands on a key.';
  end if;
end
$$;
comment on function rekey._refuse_snapshot is 'Raises 25001 outside READ COMMITTED.';

create or replace function rekey.key_usage(keyring text = null) returns setof rekey.key_rows
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids integer[] := case when key_usage.keyring is not null then array[(rekey._keyring(key_usage.keyring)).id] end;
begin
  perform rekey._refuse_snapshot();
  return query
    with counted as (
      select c.keyring_id, c.version, sum(c.rows)::bigint as rows, array_agg(distinct c.relation::text) as relations
      from rekey._count(v_ids, false) c
      where c.version > 0
      group by c.keyring_id, c.version
    )
    select r.name, coalesce(k.version, c.version), coalesce(k.state, 'unknown'), coalesce(c.rows, 0), coalesce(c.relations, '{}')
    from (select * from rekey.encryption_keys k where v_ids is null or k.keyring_id = any (v_ids)) k
    full join counted c on c.keyring_id = k.keyring_id and c.version = k.version
    join rekey.keyrings r on r.id = coalesce(k.keyring_id, c.keyring_id)
    order by 1, 2;
end
$$;
comment on function rekey.key_usage is
  'A census: how many rows stand on each key version, and in which relations. keyring NULL: all. Reads every protected row. 25001: not in READ COMMITTED; RK005: a target is blocked; RK007: no such keyring.';
grant execute on function rekey.key_usage to rekey_admin, rekey_operator;

create or replace function rekey.verify_ciphertexts(keyring text = null) returns setof rekey.verified_rows
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids integer[] := case when verify_ciphertexts.keyring is not null then array[(rekey._keyring(verify_ciphertexts.keyring)).id] end;
begin
  return query
    select c.relation::text, r.name, c.version, sum(c.rows)::bigint, sum(c.failed)::bigint
    from rekey._count(v_ids, true) c
    join rekey.keyrings r on r.id = c.keyring_id
    where c.version > 0
    group by 1, 2, 3
    order by 1, 2, 3;
end
$$;
comment on function rekey.verify_ciphertexts is
  'Checks that every protected row opens, and shows nothing of what is in it. keyring NULL: all. RK001, RK002: KEK; RK005: a target is blocked; RK007: no such keyring.';
grant execute on function rekey.verify_ciphertexts to rekey_admin, rekey_operator;
