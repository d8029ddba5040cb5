-- Data-encryption keys: wrapping, the state graph, and which one writers use.

create or replace function rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) returns bytea
language sql stable parallel safe
return rekey._header(keyring_id, version) || rekey._part('dek') || rekey._part(keyring_id::text) || rekey._part(version::text)
  || rekey._part(kek_id::text);
comment on function rekey._wrap_aad is 'What a wrapped DEK is bound to.';

create or replace function rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) returns bytea
language sql immutable parallel safe
return substr(aad, 1, 11) || iv || rekey._aead_encrypt(wrapping_key, iv, dek, aad);
comment on function rekey._wrap is 'A DEK sealed under the wrapping key of a KEK; aad: rekey._wrap_aad().';

-- 139 bytes: header, IV, 64 bytes with padding, tag.
create or replace function rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) returns bytea
language sql immutable parallel safe
return case when octet_length(wrapped_key) = 139 and substr(wrapped_key, 1, 11) = substr(aad, 1, 11) then
  rekey._aead_decrypt(wrapping_key, substr(wrapped_key, 12, 16), substr(wrapped_key, 28), aad) end;
comment on function rekey._unwrap is 'The DEK of a wrapped key; NULL where it does not open. aad: rekey._wrap_aad().';

create or replace function rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) returns text
language sql stable parallel safe
return case
  when state in ('disabled', 'destroyed') or state = 'destroy_scheduled' and not sweeping then format('key version %s is %s', version, state)
  when kek_state = 'lost' then format('key version %s is wrapped under KEK %s, which is lost', version, kek_id) end;
comment on function rekey._key_problem is 'Why a key may not be used; NULL: it may. sweeping: one that is scheduled for destruction may.';

-- What was unwrapped once is carried in the session, as the KEK is, and under the same key: to open it takes a third of the time.
-- Without a KEK that the session brought, till the end of the statement.
create or replace function rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) returns bytea
language sql stable
return 'key'::bytea || int4send(keyring_id) || int4send(version) || int4send(kek_id) || rekey._session_aad(coalesce(nullif(left(unlocked, 1), ''), 't'))
  || case when unlocked = '' then timestamptz_send(statement_timestamp()) else convert_to(unlocked, 'UTF8') end;
comment on function rekey._carried_aad is
  'What a DEK that the session carries is bound to: the KEK that wraps it, and the session as rekey.lock() and rekey.unlock() leave it; without an unlocked one, the statement.';

create or replace function rekey._dek(keyring_id integer, version integer) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unlocked text := coalesce(current_setting('rekey.unlocked', true), '');
  -- A few variables, since old and new versions are read in turns.
  v_name text := 'rekey.key_' || ((keyring_id # version) & 7);
  v_carried text := current_setting(v_name, true);
  v_wrapped bytea;
  v_kek_id integer;
  v_seal bytea;
  v_wrapping bytea;
  v_aad bytea;
  v_bytes bytea;
  v_iv bytea;
  v_key bytea;
begin
  select k.wrapped_key, k.kek_id, s.key into v_wrapped, v_kek_id, v_seal
  from rekey.encryption_keys k
  join rekey.keks e on e.id = k.kek_id
  left join rekey._session_key s on true
  where k.keyring_id = _dek.keyring_id and k.version = _dek.version
    and rekey._key_problem(k.version, k.state, k.kek_id, e.state, false) is null;
  -- (It is anybody's to set.)
  if found and length(v_carried) = 256 and v_carried ~ '^[0-9a-f]+$' and v_seal is not null then
    -- IV, 64 bytes with padding, tag
    v_bytes := decode(v_carried, 'hex');
    v_iv := substr(v_bytes, 1, 16);
    v_bytes := substr(v_bytes, 17);
    v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
    v_key := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  end if;
  if v_key is null then
    v_wrapping := (rekey._kek()).kek;
    v_wrapping := rekey._wrapping_key(v_wrapping);
    v_aad := rekey._wrap_aad(v_kek_id, keyring_id, version);
    v_key := rekey._unwrap(v_wrapping, v_wrapped, v_aad);
    -- Not for a session that only says that it is unlocked: the KEK may be the server's.
    if v_key is not null and v_seal is not null and (v_unlocked = '' or rekey._session_keks() is not null) then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
      v_bytes := rekey._aead_encrypt(v_seal, v_iv, v_key, v_aad);
      v_carried := set_config(v_name, encode(v_iv || v_bytes, 'hex'), left(v_unlocked, 1) <> 's');
    end if;
  end if;
  return v_key;
end
$$;
comment on function rekey._dek is
  'Unwraps one key, for a single value; rekey._deks() is for many. NULL where it may not or cannot be used, and where there is none: rekey._dek_problem(). RK001, RK002 without the KEK.';

create or replace function rekey._dek_problem(keyring_id integer, version integer) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(rekey._key_problem(k.version, k.state, k.kek_id, e.state, false), format('the wrapped key of version %s is damaged', k.version))
    from rekey.encryption_keys k
    join rekey.keks e on e.id = k.kek_id
    where k.keyring_id = _dek_problem.keyring_id and k.version = _dek_problem.version);
end
$$;
comment on function rekey._dek_problem is 'Why rekey._dek() has no key; NULL: there is no such version.';

create or replace function rekey._deks(keyrings integer[], versions integer[], sweeping boolean = false)
returns table (keyring_id integer, version integer, key bytea, problem text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- keys that do not fit go to a temporary file
set enable_nestloop = on  -- whatever it is in the caller
as $$
begin
  -- Keys are columns here, and nowhere parameters of a statement.
  return query
    with w as materialized (
      select rekey._wrapping_key(x.kek) as wrapping_key from rekey._kek() x
    )
    select o.keyring_id, o.version, o.key,
      case when o.key is null then coalesce(o.problem, format('the wrapped key of version %s is damaged', o.version)) end
    from (
      select n.keyring_id, n.version, n.problem,
        case when n.problem is null then rekey._unwrap(n.wrapping_key, n.wrapped_key, n.aad) end as key
      from (
        select k.keyring_id, k.version, k.wrapped_key, w.wrapping_key, rekey._wrap_aad(k.kek_id, k.keyring_id, k.version) as aad,
          rekey._key_problem(k.version, k.state, k.kek_id, e.state, sweeping) as problem
        from w
        cross join (select distinct u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version)) g
        join rekey.encryption_keys k on k.keyring_id = g.keyring_id and k.version = g.version
        join rekey.keks e on e.id = k.kek_id
        offset 0
      ) n
      offset 0
    ) o;
end
$$;
comment on function rekey._deks is
  'Unwraps the keys of these versions, once each. key is NULL, and problem says why, where it may not or cannot be used. sweeping: versions scheduled for destruction open too. RK001, RK002 without the KEK.';

create or replace function rekey._check_key_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if (new.keyring_id, new.version) is distinct from (old.keyring_id, old.version) then
    raise exception 'a key keeps its keyring and version' using errcode = 'RK006';
  end if;
  if new.state <> old.state and not (old.state, new.state) in (
    ('active', 'decrypt_only'), ('active', 'compromised'),
    ('decrypt_only', 'active'), ('decrypt_only', 'disabled'), ('decrypt_only', 'compromised'), ('decrypt_only', 'destroy_scheduled'),
    ('disabled', 'decrypt_only'), ('disabled', 'destroy_scheduled'),
    ('compromised', 'destroy_scheduled'),
    ('destroy_scheduled', 'destroyed'))
    and not (old.state = 'destroy_scheduled' and new.state = old.scheduled_from) then
    raise exception 'a key cannot go from % to %', old.state, new.state using errcode = 'RK006';
  end if;
  return new;
end
$$;
comment on function rekey._check_key_change is 'Trigger: lets the state of a key move only along the graph of docs/design.md (RK006).';
create or replace trigger encryption_keys_state before update on rekey.encryption_keys
  for each row execute function rekey._check_key_change();

create or replace function rekey._keyring(name text, lock boolean = false) returns rekey.keyrings
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
begin
  if lock then
    -- Not FOR UPDATE: the foreign key of rekey.secrets would keep writers waiting.
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name for no key update;
  else
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name;
  end if;
  if v_keyring.id is null then
    raise exception 'no such keyring: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.keyrings for those that there are; rekey.create_keyring() makes one.', constraint = 'create_keyring';
  end if;
  return v_keyring;
end
$$;
comment on function rekey._keyring is 'The keyring of that name, its row locked if asked for. RK007: there is none.';

create or replace function rekey._keyring_name(id integer) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return (select k.name from rekey.keyrings k where k.id = _keyring_name.id);
comment on function rekey._keyring_name is 'The name of a keyring.';

create or replace function rekey._key(keyring_id integer, version integer) returns rekey.encryption_keys
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key rekey.encryption_keys;
begin
  select * into v_key from rekey.encryption_keys k where k.keyring_id = _key.keyring_id and k.version = _key.version for update;
  if not found then
    raise exception 'the keyring has no version %', coalesce(version::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.key_status for its versions.', constraint = 'key_versions';
  end if;
  return v_key;
end
$$;
comment on function rekey._key is 'The key of that version, its row locked. RK007: there is none.';

create or replace function rekey._active_versions(keyrings integer[]) returns integer[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select array_agg(k.version order by w.place)
    from unnest(keyrings) with ordinality as w(keyring_id, place)
    left join rekey.encryption_keys k on k.keyring_id = w.keyring_id and k.state = 'active');
end
$$;
comment on function rekey._active_versions is 'The active version of each keyring; NULL where it has none.';

create or replace function rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- This snapshot may be older than a rotation. A row lock sees the row as it is now: 40001 where it was changed.
    begin
      perform from rekey.encryption_keys k
      where (k.keyring_id, k.version) in (select u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version))
      for share nowait;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;
      when lock_not_available then null;  -- a rotation that has not committed: its barrier will see our lock
    end;
  end if;
end
$$;
comment on function rekey._refuse_old_snapshot is '40001 in REPEATABLE READ and SERIALIZABLE, where these versions were changed since the snapshot. The caller holds their advisory locks.';

-- A writer's promise to whoever waits for a version to fall out of use: a shared advisory lock on (keyring, version),
-- taken before the version is looked at for the last time.
create or replace function rekey._lock_active(keyrings integer[]) returns integer[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_versions integer[] := rekey._active_versions(keyrings);
  v_locked integer[];
begin
  loop
    perform pg_advisory_xact_lock_shared(w.keyring_id, w.version)
    from (select u.keyring_id, u.version from unnest(keyrings, v_versions) as u(keyring_id, version)
          where u.version is not null order by 1) w;
    v_locked := v_versions;
    v_versions := rekey._active_versions(keyrings);
    exit when v_versions is not distinct from v_locked;
  end loop;
  perform rekey._refuse_old_snapshot(keyrings, v_versions);
  return v_versions;
end
$$;
comment on function rekey._lock_active is
  'The active versions of these keyrings, none of which falls out of use before this transaction ends. NULL for a retired keyring. 40001 in REPEATABLE READ and SERIALIZABLE, where a rotation was committed since the snapshot.';

create or replace function rekey._new_keys(keyrings integer[], versions integer[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek_id integer;
  v_wrapping bytea;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea[];
begin
  select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_place in 1 .. cardinality(keyrings) loop
    v_iv := rekey._random_bytes(16);
    v_dek := rekey._random_bytes(64);
    v_aad := rekey._wrap_aad(v_kek_id, keyrings[v_place], versions[v_place]);
    v_wrapped[v_place] := rekey._wrap(v_wrapping, v_iv, v_dek, v_aad);
  end loop;
  insert into rekey.encryption_keys (keyring_id, version, state, wrapped_key, kek_id, activated_at)
  select n.keyring_id, n.version, 'active', n.wrapped_key, v_kek_id, now()
  from unnest(keyrings, versions, v_wrapped) as n(keyring_id, version, wrapped_key);
end
$$;
comment on function rekey._new_keys is 'Makes these versions and makes them active; the versions before must have been deactivated. The caller holds rekey._lock_kek().';

create or replace function rekey.create_keyring(
  name text, tenant_id uuid = '00000000-0000-0000-0000-000000000000', rotate_every interval = null
) returns rekey.keyrings
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_bytes bytea;
begin
  if tenant_id is null then
    raise exception 'a keyring has a tenant' using errcode = 'invalid_parameter_value',
      hint = 'Leave tenant_id out for a keyring of all tenants.';
  end if;
  perform rekey._lock_kek();
  loop
    v_bytes := rekey._random_bytes(4);
    v_keyring.id := rekey._int4(v_bytes, 0) & 2147483647;
    exit when v_keyring.id > 0 and not exists (select from rekey.keyrings k where k.id = v_keyring.id);
  end loop;
  begin
    insert into rekey.keyrings (id, name, tenant_id, rotate_every, next_rotation_at)
    values (v_keyring.id, create_keyring.name, create_keyring.tenant_id, create_keyring.rotate_every, now() + create_keyring.rotate_every)
    returning * into v_keyring;
  exception
    when check_violation or not_null_violation or datetime_field_overflow then
      raise exception 'a keyring cannot be named % and rotate every %', coalesce(quote_literal(name), 'NULL'), coalesce(rotate_every::text, 'NULL')
        using errcode = 'invalid_parameter_value',
          hint = 'The name has 1 to 63 bytes and no control characters; the interval is between 1 minute and 36500 days.';
    when unique_violation then
      raise exception 'there is a keyring % already', quote_literal(name) using errcode = 'unique_violation';
  end;
  perform rekey._new_keys(array[v_keyring.id], array[1]);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.created', 'keyring', name, 'details',
      jsonb_build_object('tenant_id', tenant_id, 'rotate_every', rotate_every)),
    jsonb_build_object('event', 'key.created', 'keyring', name, 'version', 1),
    jsonb_build_object('event', 'key.activated', 'keyring', name, 'version', 1)));
  return v_keyring;
end
$$;
comment on function rekey.create_keyring is
  'Makes a keyring and its version 1. name: 1 to 63 bytes, unique in the database. tenant_id: whose it is. rotate_every: its cryptoperiod; the first scheduled rotation is due after it. 22023: name or interval cannot be; 23505: the name is taken; RK001, RK002: KEK.';
grant execute on function rekey.create_keyring to rekey_admin;
grant select on rekey.keyrings to rekey_admin, rekey_operator, rekey_auditor, rekey_app;

-- (Where a restore left the privilege behind, nobody knows.)
create or replace function rekey._may_be_doomed() returns boolean
language sql volatile
return case when has_sequence_privilege('rekey._doomed'::regclass, 'select') then pg_sequence_last_value('rekey._doomed'::regclass) end is distinct from 0;
comment on function rekey._may_be_doomed is 'Whether a version may be scheduled for destruction, without a query.';

create or replace function rekey._expect_doomed() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- Held till the end, so that rekey._expect_none_doomed() does not take it back before the version is seen.
  perform pg_advisory_xact_lock_shared(0, 6);
  perform setval('rekey._doomed', 1);
end
$$;
comment on function rekey._expect_doomed is 'From now on what is written into protected columns is looked at for versions that are scheduled for destruction.';

create or replace function rekey._expect_none_doomed() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if not rekey._may_be_doomed() then
    return;
  end if;
  begin
    if pg_try_advisory_xact_lock(0, 6) then
      -- In a statement of its own: it sees what was committed before the lock was given.
      if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then
        perform setval('rekey._doomed', 0);
      end if;
    end if;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the lock back at once, and keeps the value
  end;
end
$$;
comment on function rekey._expect_none_doomed is 'Takes rekey._expect_doomed() back where no version is scheduled. In READ COMMITTED only.';

create or replace function rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamptz = null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if state = 'destroy_scheduled' then
    perform rekey._expect_doomed();
  end if;
  update rekey.encryption_keys k
  set state = _move_key.state,
      scheduled_from = case when _move_key.state = 'destroy_scheduled' then key.state end,
      deactivated_at = case when key.state = 'active' then now() else k.deactivated_at end,
      compromised_at = case when _move_key.state = 'compromised' then coalesce(k.compromised_at, now()) else k.compromised_at end,
      destroy_after = _move_key.destroy_after
  where k.id = key.id;
  perform rekey._audit(event, (select r.name from rekey.keyrings r where r.id = key.keyring_id), key.version,
    details => jsonb_build_object('reason', reason, 'destroy_after', destroy_after));
end
$$;
comment on function rekey._move_key is 'Moves a key to another state, and says so in the audit log.';

create or replace function rekey._refuse_needed(keyring_id integer, version integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation bigint;
begin
  select r.id into v_rotation from rekey.rotations r
  where r.keyring_id = _refuse_needed.keyring_id and (_refuse_needed.version = any (r.from_versions) or r.to_version = _refuse_needed.version)
    and r.state in ('queued', 'running', 'paused', 'verifying', 'failed') and not r.in_line;
  if found then
    raise exception 'version % is needed by rotation %', version, v_rotation using errcode = 'RK005',
      hint = 'Let the rotation complete first.';
  end if;
end
$$;
comment on function rekey._refuse_needed is 'RK005 where a rotation under way needs the version.';

create or replace function rekey.disable_key(keyring text, version integer, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'decrypt_only' then
    raise exception 'version % is %, only a decrypt_only one can be disabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_needed(v_keyring.id, version);
  perform rekey._move_key(v_key, 'disabled', 'key.disabled', reason);
end
$$;
comment on function rekey.disable_key is
  'Suspends a version: what stands on it does not open until rekey.enable_key(). RK005: a rotation needs it; RK006: it is not decrypt_only; RK007: there is none.';
grant execute on function rekey.disable_key to rekey_admin;

create or replace function rekey.enable_key(keyring text, version integer, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'disabled' then
    raise exception 'version % is %, only a disabled one can be enabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, 'decrypt_only', 'key.enabled', reason);
end
$$;
comment on function rekey.enable_key is 'Lets a disabled version open again. RK006: it is not disabled; RK007: there is none.';
grant execute on function rekey.enable_key to rekey_admin;

create or replace view rekey.key_status as
select r.name as keyring, r.tenant_id, k.version, k.state, k.kek_id, e.state as kek_state,
  k.created_at, k.activated_at, k.deactivated_at, k.compromised_at, k.destroy_after, k.destroyed_at
from rekey.encryption_keys k
join rekey.keyrings r on r.id = k.keyring_id
join rekey.keks e on e.id = k.kek_id;
comment on view rekey.key_status is 'Every key version, its state and its times. kek_state lost: it cannot be opened any more.';
comment on column rekey.key_status.keyring is 'Name of the keyring.';
comment on column rekey.key_status.tenant_id is 'Its tenant.';
comment on column rekey.key_status.version is 'Version within the keyring.';
comment on column rekey.key_status.state is 'SP 800-57 state, as in rekey.encryption_keys.';
comment on column rekey.key_status.kek_id is 'Number of the KEK that wraps it.';
comment on column rekey.key_status.kek_state is 'State of that KEK.';
comment on column rekey.key_status.created_at is 'When it was made.';
comment on column rekey.key_status.activated_at is 'When it last became active.';
comment on column rekey.key_status.deactivated_at is 'When it last ceased to be active.';
comment on column rekey.key_status.compromised_at is 'When it was marked compromised.';
comment on column rekey.key_status.destroy_after is 'Before this time it is not destroyed.';
comment on column rekey.key_status.destroyed_at is 'When its wrapped key was overwritten.';
grant select on rekey.key_status to rekey_admin, rekey_operator, rekey_auditor;
