-- Key bytes go through plain assignments of expressions that the planner can inline, with variables as arguments: a
-- statement's parameters, and those of a function that is not inlined, can be logged.
-- The key-encryption key: how a session brings it, where else it may be read, and what it derives.

-- backend_start would say more than the postmaster's start, but is hidden from a role that may not see other sessions.
create or replace function rekey._session_aad(scope text) returns bytea
language sql stable
return rekey._part('session') || rekey._part(scope) || int4send(pg_backend_pid()) || timestamptz_send(pg_postmaster_start_time())
  || rekey._part(session_user::text) || case when scope <> 's' then timestamptz_send(transaction_timestamp()) else ''::bytea end;
comment on function rekey._session_aad is 'What an unlocked session is bound to: server process, server start, login, and unless scope is s the transaction.';

create or replace function rekey._session_seal() returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seal bytea;
begin
  select s.key into v_seal from rekey._session_key s;
  if not found then
    insert into rekey._session_key (key) values (rekey._random_bytes(64)) on conflict do nothing;
    select s.key into strict v_seal from rekey._session_key s;
  end if;
  return v_seal;
end
$$;
comment on function rekey._session_seal is 'The key under which sessions carry secrets; made by the first that does.';

-- Raises nothing: an expression that failed once is evaluated with parameters from then on in that transaction, and a second
-- attempt, with the right KEK, would be logged.
create or replace function rekey._unlock(kek bytea, scope text, out fingerprint text, out problem text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_first text;
  v_second text;
  v_active text;
  v_seal bytea;
  v_iv bytea;
  v_aad bytea;
  v_sealed bytea;
  v_set text;
begin
  if scope is null or scope not in ('transaction', 'session', 'replacement') then
    problem := 'scope';
    return;
  end if;
  if coalesce(octet_length(kek), 0) not in (32, 64) then
    problem := 'length';
    return;
  end if;
  v_first := rekey._fingerprint(substr(kek, 1, 32));
  if octet_length(kek) = 64 then
    v_second := rekey._fingerprint(substr(kek, 33, 32));
  end if;
  select k.fingerprint into v_active from rekey.keks k where k.state = 'active';
  if v_active not in (v_first, coalesce(v_second, v_first)) and scope <> 'replacement' then
    problem := v_active;
    return;
  end if;
  v_seal := rekey._session_seal();
  v_iv := rekey._random_bytes(16);
  v_aad := rekey._session_aad(left(scope, 1));
  v_sealed := rekey._aead_encrypt(v_seal, v_iv, kek, v_aad);
  -- Not PERFORM, which auto_explain and pgaudit would print with its arguments.
  v_set := set_config('rekey.unlocked', left(scope, 1) || encode(v_iv || v_sealed, 'hex'), scope <> 'session');
  fingerprint := case when v_second = v_active and v_set <> '' then v_second else v_first end;
end
$$;
comment on function rekey._unlock is 'What rekey.unlock() does; problem: scope, length, or the fingerprint of the KEK that is active.';
grant execute on function rekey._unlock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey._refuse_unlock(problem text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem = 'scope' then
    raise exception 'scope is transaction, session or replacement' using errcode = 'invalid_parameter_value';
  elsif problem = 'length' then
    raise exception 'a KEK has 32 bytes' using errcode = 'invalid_parameter_value',
      hint = 'pg-rekey kek generate makes one. With 64 bytes, the current KEK and the next one are given together.';
  elsif problem is not null then
    raise exception 'wrong KEK' using errcode = 'RK002',
      hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', problem);
  end if;
end
$$;
comment on function rekey._refuse_unlock is 'Raises the error for a problem of rekey._unlock().';
grant execute on function rekey._refuse_unlock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey.unlock(kek bytea, scope text = 'transaction') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_done record;
begin
  v_done := rekey._unlock(kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;
comment on function rekey.unlock(bytea, text) is
  'Lets this transaction or session use the KEK. kek: 32 bytes, or 64: the current and the next one. scope: transaction (till its end), session (till rekey.lock(); not behind a transaction pooler) or replacement (as transaction, for a KEK that is to replace a lost one). Returns the fingerprint. A bind parameter may be logged by the server: rekey.unlock_copied() avoids that. RK002: it is not the active KEK; 22023: wrong length or scope.';
grant execute on function rekey.unlock(bytea, text) to rekey_admin, rekey_operator, rekey_app;

-- Runs with the caller's rights: what stands in pg_temp is the caller's, and may be a view.
create or replace function rekey.unlock_copied(scope text = 'transaction') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek bytea;
  v_done record;
begin
  -- Dynamic, so that whoever checks all functions does not stumble over a table that is there only for the moment.
  execute format('select string_agg(k.kek, ''''::bytea order by k.ctid) from pg_temp.%I k', 'pg_rekey_kek') into v_kek;
  v_done := rekey._unlock(v_kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;
comment on function rekey.unlock_copied is
  'As rekey.unlock(), with the KEK from the temporary table pg_rekey_kek (kek bytea), which a binary COPY filled and no log shows: one row, or two: the current and the next KEK. A standby takes no temporary tables: there, a provider or rekey.unlock() brings the KEK. 42P01 without that table.';
grant execute on function rekey.unlock_copied to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey.lock() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('rekey.unlocked', '', false), set_config('rekey.unlocked', '', true);
end
$$;
comment on function rekey.lock is 'Forgets the KEK of this session and transaction.';
grant execute on function rekey.lock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey._parse_kek(value text) returns bytea
language sql immutable parallel safe
return case
  when value ~ '^[ \t\r\n]*[0-9A-Fa-f]{64}[ \t\r\n]*$' then decode(btrim(value, E' \t\r\n'), 'hex')
  when value ~ '^[ \t\r\n]*[A-Za-z0-9+/]{43}=[ \t\r\n]*$' then decode(btrim(value, E' \t\r\n'), 'base64') end;
comment on function rekey._parse_kek is 'The 32 bytes of a KEK in hex or base64; NULL for anything else.';

create or replace function rekey._session_keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_set text := current_setting('rekey.unlocked', true);
  v_seal bytea;
  v_bytes bytea;
  v_iv bytea;
  v_aad bytea;
  v_keks bytea;
begin
  -- IV, 32 or 64 bytes with padding, tag, in hex
  if coalesce(length(v_set), 0) not in (193, 257) or v_set !~ '^[tsr][0-9a-f]+$' then
    return null;
  end if;
  select s.key into v_seal from rekey._session_key s;
  if not found then
    return null;
  end if;
  v_bytes := decode(substr(v_set, 2), 'hex');
  v_iv := substr(v_bytes, 1, 16);
  v_bytes := substr(v_bytes, 17);
  v_aad := rekey._session_aad(left(v_set, 1));
  v_keks := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  return v_keks;
end
$$;
comment on function rekey._session_keks is 'The KEK, or the current and the next one, that this session unlocked itself with; NULL if it did not.';

create or replace function rekey._provided_keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings := rekey._settings();
  v_text text;
  v_next_text text;
  v_kek bytea;
  v_next bytea;
begin
  if v_settings.kek_provider = 'vault' then
    if rekey._trusted_relation('supabase_vault', 'vault', 'decrypted_secrets') is null then
      raise exception 'this database has no Supabase Vault' using errcode = 'undefined_table';
    end if;
    execute 'select (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1),
                    (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1 || ''_new'')'
      into v_text, v_next_text using v_settings.kek_secret_name;
  elsif v_settings.kek_provider = 'file' then
    v_text := encode(pg_read_binary_file(v_settings.kek_file, 0, 200, true), 'escape');
    v_next_text := encode(pg_read_binary_file(v_settings.kek_file || '_new', 0, 200, true), 'escape');
  end if;
  v_kek := rekey._parse_kek(v_text);
  v_next := rekey._parse_kek(v_next_text);
  return coalesce(v_kek || v_next, v_kek, v_next);
exception
  when insufficient_privilege or undefined_table or undefined_function or invalid_schema_name or wrong_object_type
    or system_error or io_error then
    raise exception 'the KEK provider % cannot be read: %', v_settings.kek_provider, sqlerrm using errcode = 'RK001',
      hint = format('Run select rekey.set_setting(''kek_provider'', %L) as a role that may grant what it needs.', v_settings.kek_provider), constraint = 'set_provider';
end
$$;
comment on function rekey._provided_keks is 'The KEK, and the next one where there is one, from the Vault or the file that the settings name; NULL without. RK001: it cannot be read.';

create or replace function rekey._keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keks bytea := rekey._session_keks();
begin
  if v_keks is null then
    v_keks := rekey._provided_keks();
  end if;
  if v_keks is null then
    raise exception 'the KEK is not available' using errcode = 'RK001',
      hint = case (rekey._settings()).kek_provider
        when 'session' then 'Unlock first, in the same transaction: rekey.unlock(), or pg_rekey.unlock() in Python. Outside of a transaction it ends with its statement, unless its scope is session.'
        when 'vault' then format('The Vault has no secret %L of 64 hex characters or base64.', (rekey._settings()).kek_secret_name)
        else format('The file %L in the data directory is missing or holds no key.', (rekey._settings()).kek_file)
      end, constraint = case (rekey._settings()).kek_provider when 'session' then 'unlock' else '' end;
  end if;
  return v_keks;
end
$$;
comment on function rekey._keks is 'The KEK that can be had now, or the current and the next one. RK001: none.';

create or replace function rekey._kek(out id integer, out kek bytea)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint text;
  v_keks bytea;
begin
  select k.id, k.fingerprint into _kek.id, v_fingerprint from rekey.keks k where k.state = 'active';
  if not found then
    raise exception 'no KEK is registered' using errcode = 'RK001',
      hint = 'Register one: pg-rekey init, or select rekey.register_kek().', constraint = 'register_kek';
  end if;
  v_keks := rekey._keks();
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    kek := substr(v_keks, 1 + 32 * v_place, 32);
    if rekey._fingerprint(kek) = v_fingerprint then
      return;
    end if;
  end loop;
  raise exception 'wrong KEK' using errcode = 'RK002',
    hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', v_fingerprint);
end
$$;
comment on function rekey._kek is 'The active KEK and its number. RK001: not available; RK002: another one is.';

create or replace function rekey._lock_kek() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  for v_try in 1 .. 5 loop
    perform from rekey.keks k where k.state = 'active' for share;
    exit when found or not exists (select from rekey.keks);
  end loop;
end
$$;
comment on function rekey._lock_kek is 'Keeps the active KEK from being replaced until the end of the transaction: taken by whoever makes a DEK.';

create or replace function rekey._new_kek() returns bytea
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keks bytea := rekey._keks();
  v_kek bytea;
  v_fingerprint text;
begin
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    v_kek := substr(v_keks, 1 + 32 * v_place, 32);
    v_fingerprint := rekey._fingerprint(v_kek);
    if not exists (select from rekey.keks k where k.fingerprint = v_fingerprint) then
      return v_kek;
    end if;
  end loop;
  return null;
end
$$;
comment on function rekey._new_kek is 'The first KEK at hand that is not registered; NULL without.';

create or replace function rekey.register_kek(replace_lost boolean = false) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_active rekey.keks;
  v_kek bytea;
  v_fingerprint text;
  v_id integer;
begin
  perform rekey._ensure_rows();
  select * into v_active from rekey.keks where state = 'active' for update;
  if found and not replace_lost then
    return (select k.id from rekey._kek() k);  -- safe to repeat, and refuses another KEK
  end if;
  v_kek := rekey._new_kek();
  if v_kek is null then
    raise exception 'that KEK is registered already' using errcode = 'RK006',
      hint = 'A KEK that was retired or lost does not become active again. pg-rekey kek generate makes a new one.';
  end if;
  v_fingerprint := rekey._fingerprint(v_kek);
  update rekey.keks set state = 'lost', retired_at = now() where id = v_active.id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_id;
  if v_active.id is not null then
    perform rekey._replace_lost_keys(v_active.id);
    perform rekey._audit('kek.lost', version => v_active.id);
  end if;
  perform rekey._audit('kek.registered', version => v_id, details => jsonb_build_object('fingerprint', v_fingerprint));
  return v_id;
end
$$;
comment on function rekey.register_kek is
  'Registers the KEK that this session, the Vault or the file holds, and returns its number; repeated, it only checks it. replace_lost => true declares the active KEK lost for ever: what it wraps cannot be opened any more, every keyring gets a new version under the new KEK. RK001: no KEK at hand; RK002: another one is active; RK006: it was in use before.';
grant execute on function rekey.register_kek to rekey_admin;

create or replace function rekey.rotate_kek() returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_old_id integer;
  v_old bytea;
  v_new_id integer;
  v_new bytea;
  v_fingerprint text;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea;
  v_key record;
  v_count integer := 0;
begin
  perform from rekey.keks k where k.state = 'active' for update;
  select k.id, k.kek into v_old_id, v_old from rekey._kek() k;
  v_new := rekey._new_kek();
  if v_new is null then
    raise exception 'there is no next KEK: number % is active already, and no other is at hand', v_old_id using errcode = 'RK001',
      hint = 'Give the current and the next one: PG_REKEY_NEW_KEK for pg-rekey, the Vault secret or file with _new appended, or 64 bytes to rekey.unlock().', constraint = 'next_kek';
  end if;
  v_fingerprint := rekey._fingerprint(v_new);
  v_old := rekey._wrapping_key(v_old);
  v_new := rekey._wrapping_key(v_new);
  update rekey.keks set state = 'retired', retired_at = now() where id = v_old_id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_new_id;
  for v_key in
    select k.id, k.keyring_id, k.version, k.wrapped_key from rekey.encryption_keys k
    where k.kek_id = v_old_id and k.state <> 'destroyed'
    order by k.id for update
  loop
    v_aad := rekey._wrap_aad(v_old_id, v_key.keyring_id, v_key.version);
    v_dek := rekey._unwrap(v_old, v_key.wrapped_key, v_aad);
    if v_dek is null then
      raise exception 'version % of keyring % cannot be unwrapped: nothing was changed', v_key.version,
        (select r.name from rekey.keyrings r where r.id = v_key.keyring_id)
        using errcode = 'RK003', hint = 'Its wrapped key is damaged. Restore rekey.encryption_keys from a backup first.';
    end if;
    v_iv := rekey._random_bytes(16);
    v_aad := rekey._wrap_aad(v_new_id, v_key.keyring_id, v_key.version);
    v_wrapped := rekey._wrap(v_new, v_iv, v_dek, v_aad);
    update rekey.encryption_keys set wrapped_key = v_wrapped, kek_id = v_new_id where id = v_key.id;
    v_count := v_count + 1;
  end loop;
  -- One that does not open stays as it is: it can be added again, and holds nobody up.
  for v_key in select e.id, e.sealed from rekey._endpoints e where e.kek_id = v_old_id order by e.id for no key update loop
    v_iv := substr(v_key.sealed, 1, 16);
    v_wrapped := substr(v_key.sealed, 17);
    v_aad := rekey._endpoint_aad(v_old_id, v_key.id);
    v_dek := rekey._aead_decrypt(v_old, v_iv, v_wrapped, v_aad);
    if v_dek is not null then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._endpoint_aad(v_new_id, v_key.id);
      v_wrapped := rekey._aead_encrypt(v_new, v_iv, v_dek, v_aad);
      update rekey._endpoints set sealed = v_iv || v_wrapped, kek_id = v_new_id where id = v_key.id;
    end if;
  end loop;
  perform rekey._audit('kek.rotated', version => v_new_id,
    details => jsonb_build_object('from', v_old_id, 'fingerprint', v_fingerprint, 'keys', v_count));
  return v_new_id;
end
$$;
comment on function rekey.rotate_kek is
  'Wraps every DEK anew under the next KEK, and the addresses of endpoints, in one transaction; no data is touched. Needs the current and the next KEK at hand. Returns the number of the new one. Keep the old one as long as backups. RK001: one is missing; RK003: a wrapped key is damaged.';
grant execute on function rekey.rotate_kek to rekey_admin;
grant select on rekey.keks to rekey_admin, rekey_operator, rekey_auditor;
