-- Encrypting and decrypting single values. The key never leaves these functions.

create or replace function rekey._max_bytes() returns integer
language sql immutable parallel safe
return 33554432;
comment on function rekey._max_bytes is 'Longest plaintext, in bytes: 32 MiB. An envelope is in memory several times while it is made.';

create or replace function rekey._seal(keyring_id integer, plaintext bytea, context bytea) returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
  v_key bytea;
  v_iv bytea;
  v_aad bytea;
begin
  if octet_length(plaintext) > rekey._max_bytes() then
    raise exception 'a value has at most % bytes, this one has %', rekey._max_bytes(), octet_length(plaintext)
      using errcode = 'invalid_parameter_value';
  end if;
  v_version := (rekey._lock_active(array[keyring_id]))[1];
  if v_version is null then
    raise exception 'the keyring is retired' using errcode = 'RK006';
  end if;
  select d.key into v_key from rekey._deks(array[keyring_id], array[v_version]) d;
  if v_key is null then
    raise exception 'the active key version % cannot be used', v_version using errcode = 'RK006',
      hint = 'Rotate the keyring: rekey.rotate_keys().';
  end if;
  v_iv := rekey._random_bytes(16);
  v_aad := rekey._header(keyring_id, v_version) || context;
  return rekey._header(keyring_id, v_version) || v_iv || rekey._aead_encrypt(v_key, v_iv, plaintext, v_aad);
end
$$;
comment on function rekey._seal is 'Envelope of plaintext under the active version of the keyring, which it keeps in use until the transaction ends.';

create or replace function rekey._open(envelope bytea, context bytea) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring integer;
  v_version integer;
  v_key bytea;
  v_problem text;
  v_iv bytea;
  v_sealed bytea;
  v_aad bytea;
  v_plaintext bytea;
begin
  if rekey._is_envelope(envelope) then
    v_keyring := rekey._int4(envelope, 3);
    v_version := rekey._int4(envelope, 7);
    select d.key, d.problem into v_key, v_problem from rekey._deks(array[v_keyring], array[v_version]) d;
    if v_problem is not null then
      raise exception 'cannot open ciphertext: %', v_problem using errcode = 'RK006';
    end if;
    if v_key is not null then
      v_iv := substr(envelope, 12, 16);
      v_sealed := substr(envelope, 28);
      v_aad := substr(envelope, 1, 11) || context;
      v_plaintext := rekey._aead_decrypt(v_key, v_iv, v_sealed, v_aad);
    end if;
  end if;
  if v_plaintext is null then
    raise exception 'cannot open ciphertext' using errcode = 'RK003',
      hint = 'It was damaged, or sealed for another context: tenant, row, column, or parts in another order.';
  end if;
  return v_plaintext;
end
$$;
comment on function rekey._open is 'Plaintext of an envelope. RK003: it does not open; RK006: its key may not be used.';

create or replace function rekey._check_context(context text[], keyring_tenant uuid) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_shape record;
begin
  if context is null or array_ndims(context) > 1 then
    raise exception 'context is an array of text' using errcode = 'invalid_parameter_value',
      hint = 'An empty array, the default, binds the value to nothing but its keyring.';
  end if;
  if context[array_lower(context, 1)] in ('secret', 'dek', 'session') then
    raise exception 'the context label % is reserved', context[array_lower(context, 1)] using errcode = 'insufficient_privilege',
      hint = 'Secrets are read with rekey.get_secret().';
  end if;
  perform rekey._check_tenant(keyring_tenant);
  -- The label of a protected column: who may not read the column may not open its values either.
  for v_shape in
    select s.relation, s.attnums[c.places[1]] as attnum
    from rekey.protected_columns c cross join lateral rekey._column_shape(c.id) s
    where c.label = context[array_lower(context, 1)]
  loop
    if not coalesce(has_column_privilege(rekey._caller(), v_shape.relation, v_shape.attnum, 'select'), false) then
      raise exception 'the context label % belongs to a column that you may not read', context[array_lower(context, 1)]
        using errcode = 'insufficient_privilege', hint = 'It takes SELECT on that column.';
    end if;
  end loop;
  return rekey._context(context);
end
$$;
comment on function rekey._check_context is 'The bytes of a context that a caller gave, once he may use it. 42501: reserved label, a column that he may not read, or a keyring of another tenant.';

create or replace function rekey.encrypt(plaintext bytea, keyring text = 'default', context text[] = '{}') returns bytea
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_context bytea;
  v_envelope bytea;
begin
  if plaintext is null then
    return null;
  end if;
  v_keyring := rekey._keyring(keyring);
  v_context := rekey._check_context(context, v_keyring.tenant_id);
  v_envelope := rekey._seal(v_keyring.id, plaintext, v_context);
  return v_envelope;
end
$$;
comment on function rekey.encrypt(bytea, text, text[]) is
  'Encrypts a value of at most 32 MiB with the active version of keyring. context: what the value belongs to (its column, its row); the same is needed to open it. NULL stays NULL. 22023: too long; 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';
grant execute on function rekey.encrypt(bytea, text, text[]) to rekey_app;

create or replace function rekey.encrypt(plaintext text, keyring text = 'default', context text[] = '{}') returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey.encrypt(convert_to(plaintext, 'UTF8'), keyring, context);
end
$$;
comment on function rekey.encrypt(text, text, text[]) is 'As rekey.encrypt(bytea, ...), of the UTF-8 bytes of a text.';
grant execute on function rekey.encrypt(text, text, text[]) to rekey_app;

create or replace function rekey.encrypt_text(plaintext text, keyring text = 'default', context text[] = '{}') returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_envelope bytea := rekey.encrypt(plaintext, keyring, context);
begin
  return 'rk1:' || translate(encode(v_envelope, 'base64'), E'\n', '');
end
$$;
comment on function rekey.encrypt_text is 'As rekey.encrypt(text, ...), in the text form of an envelope: rk1: and base64.';
grant execute on function rekey.encrypt_text to rekey_app;

create or replace function rekey.decrypt(ciphertext bytea, context text[] = '{}') returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_tenant uuid;
  v_context bytea;
  v_plaintext bytea;
begin
  if ciphertext is null then
    return null;
  end if;
  if rekey._is_envelope(ciphertext) then
    select k.tenant_id into v_tenant from rekey.keyrings k where k.id = rekey._int4(ciphertext, 3);
  end if;
  v_context := rekey._check_context(context, coalesce(v_tenant, '00000000-0000-0000-0000-000000000000'));
  v_plaintext := rekey._open(ciphertext, v_context);
  return v_plaintext;
end
$$;
comment on function rekey.decrypt(bytea, text[]) is
  'Opens what rekey.encrypt() made, with the same context. NULL stays NULL. Writes nothing. 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK003: it does not open; RK006: its key is disabled, scheduled for destruction or destroyed.';
grant execute on function rekey.decrypt(bytea, text[]) to rekey_app;

create or replace function rekey.decrypt(ciphertext text, context text[] = '{}') returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
begin
  if ciphertext is null then
    return null;
  end if;
  v_plaintext := rekey.decrypt(coalesce(rekey._from_text(ciphertext), ''::bytea), context);
  return v_plaintext;
end
$$;
comment on function rekey.decrypt(text, text[]) is 'As rekey.decrypt(bytea, ...), of the text form of an envelope.';
grant execute on function rekey.decrypt(text, text[]) to rekey_app;

create or replace function rekey._as_text(bytes bytea) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return convert_from(bytes, 'UTF8');
exception when character_not_in_repertoire or untranslatable_character then
  -- PostgreSQL's own message would quote some of the bytes.
  raise exception 'the value is no text in the encoding of this database' using errcode = 'character_not_in_repertoire',
    hint = 'rekey.decrypt() returns its bytes.';
end
$$;
comment on function rekey._as_text is 'Text of UTF-8 bytes. 22021: they are none.';

create or replace function rekey.decrypt_text(ciphertext bytea, context text[] = '{}') returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea := rekey.decrypt(ciphertext, context);
begin
  return rekey._as_text(v_plaintext);
end
$$;
comment on function rekey.decrypt_text(bytea, text[]) is 'As rekey.decrypt(), of a value that was text. 22021: it was not.';
grant execute on function rekey.decrypt_text(bytea, text[]) to rekey_app;

create or replace function rekey.decrypt_text(ciphertext text, context text[] = '{}') returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea := rekey.decrypt(ciphertext, context);
begin
  return rekey._as_text(v_plaintext);
end
$$;
comment on function rekey.decrypt_text(text, text[]) is 'As rekey.decrypt(), of the text form of a value that was text. 22021: it was not.';
grant execute on function rekey.decrypt_text(text, text[]) to rekey_app;
