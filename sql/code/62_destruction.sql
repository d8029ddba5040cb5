-- Destroying key versions, and retiring keyrings.

-- Who writes into a protected table by other means than our functions and triggers takes no lock on a version. So whoever
-- writes there now is waited for, and what he stored is counted then.
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

create or replace function rekey._refuse_in_use(keyring rekey.keyrings, version integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
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
  select sum(c.rows) into v_rows from rekey._count(array[keyring.id], false) c where c.version = _refuse_in_use.version;
  select count(*) into v_failures from rekey.rotation_failures f
  where f.keyring_id = keyring.id and f.version = _refuse_in_use.version and f.resolved_at is null;
  if v_rows > 0 or v_failures > 0 then
    raise exception 'version % of keyring % is in use: % rows, % rows in quarantine', version, quote_literal(keyring.name),
      coalesce(v_rows, 0), v_failures using errcode = 'RK005',
      hint = 'Rotate the keyring, and resolve its failures: rekey.rotate_keys(), rekey.failure_status.', constraint = 'rotate_and_resolve';
  end if;
end
$$;
comment on function rekey._refuse_in_use is 'RK005 where a rotation, an open transaction, a row or a row in quarantine still needs the version.';

create or replace function rekey.schedule_key_destruction(keyring text, version integer, wait interval = null) returns timestamptz
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
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('decrypt_only', 'disabled', 'compromised') then
    raise exception 'version % is %: it cannot be scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  v_writing := rekey._open_writers();
  if v_writing is not null then
    raise exception '%: what it stores may need version %', v_writing, version using errcode = 'RK005', hint = 'Try again when it has ended.';
  end if;
  perform rekey._refuse_in_use(v_keyring, version);
  perform rekey._move_key(v_key, 'destroy_scheduled', 'key.destroy_scheduled', null, now() + v_wait);
  return now() + v_wait;
end
$$;
comment on function rekey.schedule_key_destruction is
  'Schedules a version for destruction and returns the time before which it is not destroyed. wait: 0 to 3650 days; NULL: the setting destroy_wait. Until then it opens nothing, and can be cancelled. What rekey.encrypt() made, and an application keeps in a table of its own, is not counted. 25001: not in READ COMMITTED; RK005: something still needs it; RK006: its state does not allow it; RK007: there is none.';
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
end
$$;
comment on function rekey.cancel_key_destruction is 'Cancels a scheduled destruction: the version returns to the state it came from. RK006: none is scheduled; RK007: there is no such version.';
grant execute on function rekey.cancel_key_destruction to rekey_admin;

create or replace function rekey._destroy_due(clock_jumped boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_due record;
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_writing text;
  v_postponed text;
  -- After a jump of the clock, what is due within the day may only seem so too.
  v_until timestamptz := now() + case when clock_jumped then interval '1 day' else interval '0' end;
  v_events jsonb := '[]'::jsonb;
begin
  if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled' and k.destroy_after <= v_until) then
    return;
  end if;
  v_writing := rekey._open_writers();
  perform rekey._lock_kek();  -- first, as everywhere: a KEK rotation holds every key
  for v_due in
    select r.name, k.version from rekey.encryption_keys k join rekey.keyrings r on r.id = k.keyring_id
    where k.state = 'destroy_scheduled' and k.destroy_after <= v_until
    order by k.keyring_id, k.version
  loop
    v_keyring := rekey._keyring(v_due.name, lock => true);
    v_key := rekey._key(v_keyring.id, v_due.version);
    continue when v_key.state <> 'destroy_scheduled' or v_key.destroy_after > v_until;
    v_postponed := case when clock_jumped then 'more than a day since the last tick: the clock may be wrong' else v_writing end;
    if v_postponed is null then
      begin
        perform rekey._refuse_in_use(v_keyring, v_due.version);
      exception when sqlstate 'RK005' then
        v_postponed := sqlerrm;
      end;
    end if;
    if v_postponed is not null then
      update rekey.encryption_keys k set destroy_after = now() + interval '1 day' where k.id = v_key.id;
      v_events := v_events || jsonb_build_object('event', 'key.destroy_scheduled', 'keyring', v_due.name, 'version', v_due.version,
        'details', jsonb_build_object('postponed', v_postponed, 'destroy_after', now() + interval '1 day'));
      continue;
    end if;
    update rekey.encryption_keys k
    set state = 'destroyed', wrapped_key = null, destroyed_at = now(), scheduled_from = null
    where k.id = v_key.id;
    v_events := v_events || jsonb_build_object('event', 'key.destroyed', 'keyring', v_due.name, 'version', v_due.version);
  end loop;
  perform rekey._audit_all(v_events);
end
$$;
comment on function rekey._destroy_due is
  'Destroys the versions whose time has come and that nothing needs; the others wait one more day, as all do after a jump of the clock.';

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
