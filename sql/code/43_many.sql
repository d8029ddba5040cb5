-- Many values in one statement: what is the same for all of them is asked, and unwrapped, once.

-- What a statement reads a column with. In an uncorrelated subselect it is made once, and handed to each row. Whoever calls
-- gets hold of it, so it is sealed, as the KEK is in an unlocked session, and good only for what it was made for.
create or replace function rekey._pass_aad(label text, caller name) returns bytea
language sql stable
return rekey._part('pass') || rekey._part(label) || rekey._part(caller::text) || rekey._session_aad('t') || timestamptz_send(statement_timestamp())
  || rekey._part(current_setting('rekey.unlocked', true)) || rekey._part(current_setting('request.jwt.claims', true));
comment on function rekey._pass_aad is
  'What a pass is bound to: the label, the role that calls, the session, the transaction, the statement that the client sent, and what unlocked the session or says whose tenants are reached.';

create or replace function rekey.reading_pass(label text) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := rekey._caller();
  v_seal bytea;
  v_keyring integer;
  v_tenant uuid;
  v_version record;
  v_next integer;
  v_wrapping bytea;
  v_wrapped bytea;
  v_key bytea;
  v_keys bytea := ''::bytea;
  v_header bytea;
  v_iv bytea;
  v_aad bytea;
begin
  select k.id, k.tenant_id, (select s.key from rekey._session_key s) into v_keyring, v_tenant, v_seal
  from rekey.protected_columns c
  join rekey.keyrings k on k.id = c.keyring_id
  where c.label = reading_pass.label;
  if v_seal is null or not rekey.can_access_tenant(v_tenant) then
    return null;
  end if;
  perform rekey._check_label(label);
  v_wrapping := (rekey._kek()).kek;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_version in
    select k.version, k.kek_id, k.wrapped_key
    from rekey.encryption_keys k
    join rekey.keks e on e.id = k.kek_id
    where k.keyring_id = v_keyring and rekey._key_problem(k.version, k.state, k.kek_id, e.state, false) is null
    order by k.version desc limit 8
  loop
    v_header := coalesce(v_header, rekey._header(v_keyring, v_version.version));
    v_wrapped := v_version.wrapped_key;
    v_aad := rekey._wrap_aad(v_version.kek_id, v_keyring, v_version.version);
    v_key := rekey._unwrap(v_wrapping, v_wrapped, v_aad);
    -- One after the other, so that the place tells the version.
    exit when v_key is null or v_version.version <> v_next;
    v_next := v_version.version - 1;
    v_keys := v_keys || v_key;
  end loop;
  if v_keys = ''::bytea then
    return null;
  end if;
  v_iv := rekey._random_bytes(16);
  v_aad := v_header || rekey._pass_aad(label, v_caller);
  return v_header || v_iv || rekey._aead_encrypt(v_seal, v_iv, v_keys, v_aad);
exception when others then
  return null;  -- whoever has a value to open hears why
end
$$;
comment on function rekey.reading_pass is
  'With what many values of a protected column are opened in one statement, several times as fast: rekey.decrypt_text(api_key, array[''app.accounts.api_key'', id::text], (select rekey.reading_pass(''app.accounts.api_key''))), the subselect as it stands here, so that it is made once. label: that of the column. Good for this role, session and statement, and of no use to anybody else. Values of the 8 newest versions of the column''s keyring gain by it, all others open as without. NULL where the caller may not read the column, or the KEK is not at hand. Writes nothing. No errors.';
grant execute on function rekey.reading_pass to rekey_app;

create or replace function rekey._passed_key(pass bytea, label text, place bigint) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := rekey._caller();
  v_seal bytea;
  v_iv bytea := substr(pass, 12, 16);
  v_sealed bytea := substr(pass, 28);
  v_aad bytea := substr(pass, 1, 11) || rekey._pass_aad(label, v_caller);
  v_keys bytea;
begin
  select s.key into v_seal from rekey._session_key s;
  if v_seal is not null then
    v_keys := rekey._aead_decrypt(v_seal, v_iv, v_sealed, v_aad);
  end if;
  return case when place >= 0 and octet_length(v_keys) > place * 64 then substr(v_keys, 1 + 64 * place::integer, 64) end;
end
$$;
comment on function rekey._passed_key is 'The key of the version that is so many before the newest, of a pass that was made for this label and statement; NULL where it was not, or has none.';

create or replace function rekey.decrypt_many(ciphertexts bytea[], contexts text[] = '{}') returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set work_mem = '2000000kB'  -- values that do not fit go to a temporary file
set plan_cache_mode = force_generic_plan  -- to plan it takes as long as to open a hundred values
as $$
declare
  v_count integer := coalesce(cardinality(ciphertexts), 0);
  v_parts integer := array_length(contexts, 2);
  v_contexts bytea[];
  v_keyrings integer[];
  v_versions integer[];
  v_label text;
  v_tenant uuid;
  v_place integer;
  v_value bytea;
  v_values bytea[] := array_fill(null::bytea, array[v_count]);
  v_unreadable integer;
  v_keyring integer;
  v_version integer;
  v_problem text;
begin
  if array_ndims(ciphertexts) > 1 or contexts is null
    or contexts <> '{}' and (array_ndims(contexts) <> 2 or array_length(contexts, 1) <> v_count)
  then
    raise exception 'contexts is an array of two dimensions, with a row for each ciphertext' using errcode = 'invalid_parameter_value',
      hint = 'array_agg(array[''label'', id::text]) makes one. An empty one, the default, binds the values to nothing but their keyring.';
  end if;
  if v_count = 0 or array_remove(ciphertexts, null) = '{}' then
    return ciphertexts;
  end if;
  if v_parts > 0 then
    for v_label in select distinct p.part from unnest(contexts) with ordinality as p(part, place) where (p.place - 1) % v_parts = 0 loop
      perform rekey._check_label(v_label);
    end loop;
    v_contexts := array(
      select string_agg(rekey._part(p.part), ''::bytea order by p.place)
      from unnest(contexts) with ordinality as p(part, place) group by (p.place - 1) / v_parts order by (p.place - 1) / v_parts);
  end if;
  select array_agg(h.keyring_id), array_agg(h.version) into v_keyrings, v_versions
  from (select distinct rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
        from unnest(ciphertexts) as u(ciphertext) where rekey._is_envelope(u.ciphertext)) h;
  for v_tenant in
    select distinct coalesce(k.tenant_id, '00000000-0000-0000-0000-000000000000') from unnest(v_keyrings) as u(id) left join rekey.keyrings k on k.id = u.id
  loop
    perform rekey._check_tenant(v_tenant);
  end loop;
  -- In no order, as rekey.read_secrets().
  for v_place, v_value in
    select w.place, case when w.key is not null then rekey._aead_decrypt(w.key, w.iv, w.sealed, w.aad) end
    from (
      select e.place, d.key, substr(e.envelope, 12, 16) as iv, substr(e.envelope, 28) as sealed,
        substr(e.envelope, 1, 11) || coalesce(e.context, ''::bytea) as aad
      from (
        select u.place, u.context, case when rekey._is_envelope(u.ciphertext) then u.ciphertext end as envelope
        from unnest(ciphertexts, v_contexts) with ordinality as u(ciphertext, context, place)
        where u.ciphertext is not null
        offset 0
      ) e
      left join (select k.* from rekey._deks(v_keyrings, v_versions) k offset 0) d
        on d.keyring_id = rekey._int4(e.envelope, 3) and d.version = rekey._int4(e.envelope, 7)
      offset 0
    ) w
  loop
    if v_value is null then
      v_unreadable := least(v_unreadable, v_place);
    end if;
    v_values[v_place] := v_value;
  end loop;
  if v_unreadable is not null then
    if rekey._is_envelope(ciphertexts[v_unreadable]) then
      v_keyring := rekey._int4(ciphertexts[v_unreadable], 3);
      v_version := rekey._int4(ciphertexts[v_unreadable], 7);
      v_problem := case when rekey._dek(v_keyring, v_version) is null then rekey._dek_problem(v_keyring, v_version) end;
    end if;
    raise exception 'cannot open ciphertext no. %', v_unreadable || coalesce(': ' || v_problem, '')
      using errcode = case when v_problem is null then 'RK003' else 'RK006' end, hint = 'Leave it out to read the others.';
  end if;
  return v_values;
end
$$;
comment on function rekey.decrypt_many(bytea[], text[]) is
  'Opens many values in one call, in their order: keys are unwrapped, and tenants and labels asked for, once. contexts: two dimensions, a row for each ciphertext, all with as many parts; empty: none has a context. NULL stays NULL. Writes nothing. 22023: contexts that do not fit; 42501: reserved context, a column that the caller may not read, or another tenant''s keyring; RK001, RK002: KEK; RK003: one of them does not open, the message says which; RK006: its key is disabled, scheduled for destruction, destroyed or damaged.';
grant execute on function rekey.decrypt_many(bytea[], text[]) to rekey_app;

create or replace function rekey.decrypt_many(ciphertexts text[], contexts text[] = '{}') returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ciphertexts bytea[] := array(
    select case when u.ciphertext is not null then coalesce(rekey._from_text(u.ciphertext), ''::bytea) end
    from unnest(ciphertexts) with ordinality as u(ciphertext, place) order by u.place);
begin
  return rekey.decrypt_many(v_ciphertexts, contexts);
end
$$;
comment on function rekey.decrypt_many(text[], text[]) is 'As rekey.decrypt_many(bytea[], ...), of the text forms of envelopes.';
grant execute on function rekey.decrypt_many(text[], text[]) to rekey_app;
