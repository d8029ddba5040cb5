-- Destroying key versions, and retiring keyrings.

-- Who writes into a protected table by other means than our functions and triggers takes no lock on a version. He is waited
-- for, so that a version that he stores is not scheduled; the destruction itself waits for every older transaction.
create or replace function rekey._open_writers() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relations oid[];
  v_writers text[];
  v_relation regclass;
begin
  select array_agg(t.relation::oid) into v_relations from rekey._targets() t where t.target <> 'rekey.secrets';
  select array_agg(distinct l.virtualtransaction) into v_writers
  from pg_locks l
  where l.locktype = 'relation' and l.granted and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    and l.relation = any (v_relations) and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.pid is distinct from pg_backend_pid();
  for v_try in 1 .. 100 loop
    select l.relation into v_relation from pg_locks l where l.virtualtransaction = any (v_writers) and l.relation = any (v_relations) limit 1;
    if not found then
      return null;
    end if;
    perform pg_sleep(0.02);
  end loop;
  return format('a transaction that writes into %s is open', v_relation);
end
$$;
comment on function rekey._open_writers is 'Waits 2 seconds for the transactions that write into protected tables now. NULL: they have ended.';

create or replace function rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint = null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint := counted;
  v_failures bigint;
begin
  perform rekey._refuse_snapshot();
  perform rekey._refuse_needed(keyring.id, version);
  perform rekey._refuse_blocked();
  if not rekey._barrier(keyring.id, array[version]) then
    raise exception 'version % of keyring % is in use by an open transaction', version, quote_literal(keyring.name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(keyring.id, array[version]));
  end if;
  -- After the barrier, and in a statement of its own: it sees every row that was ever written with this version.
  if counted is null then
    select sum(c.rows) into v_rows from rekey._count(array[keyring.id], false) c where c.version = _refuse_in_use.version;
  end if;
  select count(*) into v_failures from rekey.rotation_failures f
  where f.keyring_id = keyring.id and f.version = _refuse_in_use.version and f.resolved_at is null;
  if v_rows > 0 or v_failures > 0 then
    raise exception 'version % of keyring % is in use: % rows, % rows in quarantine', version, quote_literal(keyring.name),
      coalesce(v_rows, 0), v_failures using errcode = 'RK005',
      hint = 'Rotate the keyring, and resolve its failures: rekey.rotate_keys(), rekey.failure_status.', constraint = 'rotate_and_resolve';
  end if;
end
$$;
comment on function rekey._refuse_in_use is 'RK005 where a rotation, an open transaction, a row or a row in quarantine still needs the version. counted: its rows, where they were counted after the last transaction had ended that could write one; NULL: count them.';

-- From here on the triggers of protected columns refuse what stands on the version (52_protect.sql).
create or replace function rekey._schedule_destruction(keyring text, version integer, wait interval) returns timestamptz
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_wait interval := coalesce(wait, (rekey._settings()).destroy_wait);
  v_writing text;
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
begin
  if v_wait not between '0 s' and '3650 days' then
    raise exception 'wait is between 0 and 3650 days' using errcode = 'invalid_parameter_value';
  end if;
  v_writing := rekey._open_writers();  -- before anything is locked
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('decrypt_only', 'disabled', 'compromised') then
    raise exception 'version % is %: it cannot be scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  if v_writing is not null then
    raise exception '%: what it stores may need version %', v_writing, version using errcode = 'RK005', hint = 'Try again when it has ended.';
  end if;
  perform rekey._refuse_in_use(v_keyring, version);
  perform rekey._move_key(v_key, 'destroy_scheduled', 'key.destroy_scheduled', null, now() + v_wait);
  return now() + v_wait;
end
$$;
comment on function rekey._schedule_destruction is 'What rekey.schedule_key_destruction() does with the rights of rekey_owner.';
grant execute on function rekey._schedule_destruction to rekey_admin;

create or replace function rekey._destroyable_header(keyring text, version integer) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select rekey._header(k.keyring_id, k.version)
    from rekey.encryption_keys k join rekey.keyrings r on r.id = k.keyring_id
    where r.name = keyring and k.version = _destroyable_header.version and k.state in ('decrypt_only', 'disabled', 'compromised')
      and (rekey._settings()).destroy_search = 'database');
end
$$;
comment on function rekey._destroyable_header is 'What the envelopes of a version begin with; NULL where it cannot be destroyed, or is not looked for outside of protected columns.';
grant execute on function rekey._destroyable_header to rekey_admin;

create or replace function rekey.schedule_key_destruction(keyring text, version integer, wait interval = null) returns timestamptz
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_header bytea := rekey._destroyable_header(keyring, version);
begin
  -- Before anything is locked.
  if v_header is not null then
    perform rekey._look_ahead(v_header);
  end if;
  return rekey._schedule_destruction(keyring, version, wait);
end
$$;
comment on function rekey.schedule_key_destruction is
  'Schedules a version for destruction and returns the time before which it is not destroyed. wait: 0 to 3650 days; NULL: the setting destroy_wait. Until then it opens nothing, nothing that stands on it can be stored in a protected column, and it can be cancelled. When the time has come, rekey.tick() looks for it in the whole database (rekey.search_status), and destroys it where nothing was found and everything could be read. Warnings tell where this call finds it already, with the rights of the caller, in 2 seconds at most. 25001: not in READ COMMITTED; RK005: something still needs it; RK006: its state does not allow it; RK007: there is none.';
grant execute on function rekey.schedule_key_destruction to rekey_admin;

create or replace function rekey.cancel_key_destruction(keyring text, version integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'destroy_scheduled' then
    raise exception 'version % is %, not scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, v_key.scheduled_from, 'key.destroy_cancelled', null);
  -- Scheduled again, it is looked for again.
  delete from rekey._search_versions v where (v.keyring_id, v.version) = (v_keyring.id, cancel_key_destruction.version);
end
$$;
comment on function rekey.cancel_key_destruction is 'Cancels a scheduled destruction: the version returns to the state it came from. RK006: none is scheduled; RK007: there is no such version.';
grant execute on function rekey.cancel_key_destruction to rekey_admin;

create or replace function rekey._postpone(keyrings integer[], versions integer[], reason text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_events jsonb;
begin
  perform from rekey.keyrings r where r.id = any (keyrings) order by r.id for no key update;
  with postponed as (
    update rekey.encryption_keys k set destroy_after = now() + interval '1 day'
    from unnest(keyrings, versions) as u(keyring_id, version)
    where k.keyring_id = u.keyring_id and k.version = u.version and k.state = 'destroy_scheduled'
    returning k.keyring_id, k.version
  )
  select jsonb_agg(jsonb_build_object('event', 'key.destroy_scheduled', 'keyring', r.name, 'version', p.version,
    'details', jsonb_build_object('postponed', reason, 'destroy_after', now() + interval '1 day')) order by r.name, p.version)
  into v_events
  from postponed p join rekey.keyrings r on r.id = p.keyring_id;
  if v_events is not null then
    update rekey._worker w
    set last_error = format('destructions: version %s of keyring %s%s waits another day: %s', v_events -> 0 ->> 'version', v_events -> 0 ->> 'keyring',
          case when jsonb_array_length(v_events) > 1 then format(', and %s more,', jsonb_array_length(v_events) - 1) else '' end, reason),
        last_error_at = clock_timestamp()
    where w.singleton;
    perform rekey._audit_all(v_events);
  end if;
end
$$;
comment on function rekey._postpone is 'Has versions wait one more day for their destruction, and says why: in the audit log and rekey.worker_status.';

create or replace function rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_postponed text := elsewhere;
begin
  perform rekey._lock_kek();  -- first, as everywhere: a KEK rotation holds every key
  v_keyring := rekey._keyring(rekey._keyring_name(keyring_id), lock => true);
  v_key := rekey._key(keyring_id, version);
  if v_key.state <> 'destroy_scheduled' or v_key.destroy_after > now() then
    return;
  end if;
  if v_postponed is null then
    begin
      perform rekey._refuse_in_use(v_keyring, version, rows);
    exception when sqlstate 'RK005' then
      v_postponed := sqlerrm;
    end;
  end if;
  if v_postponed is not null then
    -- The next attempt looks anew.
    delete from rekey._search_versions v where (v.keyring_id, v.version) = (_destroy.keyring_id, _destroy.version);
    perform rekey._postpone(array[keyring_id], array[version], v_postponed);
    return;
  end if;
  update rekey.encryption_keys k
  set state = 'destroyed', wrapped_key = null, destroyed_at = now(), scheduled_from = null
  where k.id = v_key.id;
  update rekey._blind_indexes b set versions = array_remove(b.versions, _destroy.version)
  from rekey.protected_columns c where c.id = b.column_id and c.keyring_id = _destroy.keyring_id and _destroy.version = any (b.versions);
  perform rekey._audit('key.destroyed', v_keyring.name, version);
end
$$;
comment on function rekey._destroy is 'Destroys a version that is due, or postpones it where something needs it. rows: as counted; elsewhere: where the search found it, NULL: nowhere.';

-- One key, one short transaction: who answers to a compromise does not wait behind those that are due.
create or replace function rekey._destruction_step(clock_jumped boolean) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
  v_keyrings integer[];
  v_versions integer[];
  v_covered integer;
  v_next record;
  v_problem text;
begin
  -- After a jump of the clock, what is due within the day may only seem so too.
  select array_agg(k.keyring_id order by k.id), array_agg(k.version order by k.id) into v_keyrings, v_versions
  from rekey.encryption_keys k
  where k.state = 'destroy_scheduled' and k.destroy_after <= now() + case when clock_jumped then interval '1 day' else interval '0' end;
  if v_keyrings is null then
    perform rekey._expect_none_doomed();
    return null;
  elsif clock_jumped then
    perform rekey._postpone(v_keyrings, v_versions, 'more than a day since the last tick: the clock may be wrong');
    return null;
  elsif not pg_try_advisory_xact_lock(0, 5) then
    return null;  -- another worker is at it
  end if;
  v_search := rekey._open_search();
  select count(*) into v_covered from unnest(v_keyrings, v_versions) as u(keyring_id, version)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version;
  if v_search.id is null or v_search.scope <> (rekey._settings()).destroy_search or v_covered = 0
     or v_search.state = 'complete' and v_search.completed_at not between now() - interval '36 hours' and clock_timestamp()
     or v_search.state <> 'complete' and v_search.postponed and v_covered < cardinality(v_keyrings) then
    perform rekey._begin_search();
    return 'search';
  elsif v_search.state <> 'complete' and v_search.incomplete_since is null then
    return 'search';
  elsif v_search.state <> 'complete' and v_search.postponed then
    -- The day after: somebody may have granted what was missing.
    update rekey._search_relations r set tried_by = '{}', problem = null where r.search_id = v_search.id and r.problem is not null;
    update rekey._searches s set incomplete_since = null, postponed = false where s.id = v_search.id;
    return 'search';
  elsif v_search.state <> 'complete' then
    update rekey._searches s set postponed = true where s.id = v_search.id;
    perform rekey._postpone(v_keyrings, v_versions, coalesce(rekey._search_problem(v_search.id), 'the search of the database is not complete'));
    return null;
  end if;

  if v_search.counted_as is distinct from rekey._target_state() or v_search.counted_at not between now() - interval '1 hour' and clock_timestamp()
     or exists (select from unnest(v_keyrings, v_versions) as u(keyring_id, version)
                join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version and v.rows is null) then
    -- Once for all that are due; nobody is kept waiting by it.
    begin
      with counted as materialized (
        select c.keyring_id, c.version, sum(c.rows) as rows from rekey._count(v_keyrings, false) c group by c.keyring_id, c.version
      )
      update rekey._search_versions v
      set rows = coalesce((select c.rows from counted c where c.keyring_id = v.keyring_id and c.version = v.version), 0)
      where v.search_id = v_search.id and v.keyring_id = any (v_keyrings);
      update rekey._searches s set counted_at = now(), counted_as = rekey._target_state() where s.id = v_search.id;
    exception when sqlstate 'RK005' then
      v_problem := sqlerrm;
    end;
    if v_problem is not null then
      perform rekey._postpone(v_keyrings, v_versions, v_problem);
      return null;
    end if;
    return 'more';
  end if;

  select v.keyring_id, v.version, v.rows,
    (select string_agg(format('%s.%I', f.relation_name, f.column_name), ', ' order by f.relation_name, f.column_name) || format(' holds envelopes of the version, in %s rows: see rekey.search_findings', sum(f.rows))
     from rekey._search_finds f where f.search_id = v.search_id and f.keyring_id = v.keyring_id and f.version = v.version) as elsewhere
  into v_next
  from unnest(v_keyrings, v_versions) with ordinality as u(keyring_id, version, place)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version
  order by u.place limit 1;
  perform rekey._destroy(v_next.keyring_id, v_next.version, v_next.rows, v_next.elsewhere);
  return 'more';
end
$$;
comment on function rekey._destruction_step is
  'Destroys one version that is due, or does what has to be done before. search: it takes steps of the search, which read with the rights of who calls them; more: call again; NULL: there is nothing left to do now.';

create or replace function rekey.retire_keyring(name text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(name, lock => true);
  v_key rekey.encryption_keys;
  v_rows bigint;
  v_rotation bigint;
begin
  perform rekey._refuse_snapshot();
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired already', quote_literal(name) using errcode = 'RK006';
  end if;
  select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state);
  if found then
    raise exception 'keyring % is under way in rotation %', quote_literal(name), v_rotation using errcode = 'RK004';
  end if;
  select * into v_key from rekey.encryption_keys k where k.keyring_id = v_keyring.id and k.state = 'active' for update;
  -- Held till the end: a writer that comes now finds no active version afterwards.
  if not pg_try_advisory_xact_lock(v_keyring.id, v_key.version) then
    raise exception 'keyring % is in use by an open transaction', quote_literal(name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(v_keyring.id, array[v_key.version]));
  end if;
  perform rekey._refuse_blocked();
  select sum(c.rows) into v_rows from rekey._count(array[v_keyring.id], false) c;
  if v_rows > 0 then
    raise exception 'keyring % is in use: % rows', quote_literal(name), v_rows using errcode = 'RK005',
      hint = 'Delete its rows, or move them to another keyring, first.';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now() where k.id = v_key.id;
  update rekey.keyrings k set retired_at = now(), rotated_at = now(), rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.retired', 'keyring', name),
    jsonb_build_object('event', 'key.deactivated', 'keyring', name, 'version', v_key.version)));
end
$$;
comment on function rekey.retire_keyring is
  'Retires a keyring that no row uses any more: it takes no new values and is not rotated, and its last version can be destroyed. 25001: not in READ COMMITTED; RK004: a rotation is under way; RK005: rows or open transactions use it; RK006: retired already; RK007: there is none.';
grant execute on function rekey.retire_keyring to rekey_admin;
