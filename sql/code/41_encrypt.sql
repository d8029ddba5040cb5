-- Encrypting and decrypting single values. The key never leaves these functions.

create or replace function rekey._max_bytes() returns integer
language sql immutable parallel safe
return 33554432;
comment on function rekey._max_bytes is 'Longest plaintext, in bytes: 32 MiB. An envelope is in memory several times while it is made.';

-- What can fail comes before a plain value is touched: PL/pgSQL gives the variables of an expression that failed once in a
-- transaction to a statement from then on, as parameters, which can be logged. So no expression with a plain value may raise.
create or replace function rekey._sealing(keyring_id integer, bytes integer = 0) returns rekey._sealing
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
  v_locked integer;
  v_sealing rekey._sealing;
begin
  if bytes > rekey._max_bytes() then
    raise exception 'a value has at most % bytes, this one has %', rekey._max_bytes(), bytes using errcode = 'invalid_parameter_value';
  end if;
  -- Looked at, locked, and looked at again, as rekey._lock_active() does with many keyrings.
  loop
    select k.version into v_version from rekey.encryption_keys k where k.keyring_id = _sealing.keyring_id and k.state = 'active';
    if not found then
      raise exception 'the keyring is retired' using errcode = 'RK006';
    end if;
    exit when v_version = v_locked;
    perform pg_advisory_xact_lock_shared(keyring_id, v_version);
    v_locked := v_version;
  end loop;
  if current_setting('transaction_isolation') <> 'read committed' then
    perform rekey._refuse_old_snapshot(array[keyring_id], array[v_version]);
  end if;
  v_sealing.key := rekey._dek(keyring_id, v_version);
  if v_sealing.key is null then
    raise exception 'the active key version % cannot be used', v_version using errcode = 'RK006',
      hint = 'Rotate the keyring: rekey.rotate_keys().', constraint = 'rotate';
  end if;
  v_sealing.header := rekey._header(keyring_id, v_version);
  return v_sealing;
end
$$;
comment on function rekey._sealing is
  'Header and DEK for values of that many bytes under the active version of the keyring, which it keeps in use until the transaction ends. 22023: too long; RK001, RK002: KEK; RK006: retired, or its key is damaged.';

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
    v_key := rekey._dek(v_keyring, v_version);
    if v_key is null then
      v_problem := rekey._dek_problem(v_keyring, v_version);
      if v_problem is not null then
        raise exception 'cannot open ciphertext: %', v_problem using errcode = 'RK006';
      end if;
    else
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

create or replace function rekey._check_label(label text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected record;
  v_shape record;
begin
  if label in ('secret', 'dek', 'session') then
    raise exception 'the context label % is reserved', label using errcode = 'insufficient_privilege',
      hint = 'Secrets are read with rekey.get_secret().', constraint = 'read_secret';
  end if;
  select c.id, c.places[1] as place, c.relation_name, c.column_name, c.owner into v_protected
  from rekey.protected_columns c where c.label = _check_label.label;
  if not found then
    return;
  end if;
  v_shape := rekey._column_shape(v_protected.id);
  if v_shape.relation is null then
    -- Where its owner dropped the table and made it anew, the new one goes on being read until it is bound.
    select r.oid::regclass as relation, array_fill(a.attnum, array[v_protected.place]) as attnums into v_shape
    from pg_class r
    join pg_attribute a on a.attrelid = r.oid and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped
    where r.oid = rekey._relation_named(v_protected.relation_name) and pg_get_userbyid(r.relowner) = v_protected.owner;
  end if;
  if not coalesce(has_column_privilege(rekey._caller(), v_shape.relation, v_shape.attnums[v_protected.place], 'select'), false) then
    raise exception 'the context label % belongs to a column that you may not read', label
      using errcode = 'insufficient_privilege', hint = 'It takes SELECT on that column.';
  end if;
end
$$;
comment on function rekey._check_label is '42501 where the label of a context is reserved, or belongs to a protected column that the caller may not read.';

create or replace function rekey._check_context(context text[], keyring_tenant uuid) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if context is null or array_ndims(context) > 1 then
    raise exception 'context is an array of text' using errcode = 'invalid_parameter_value',
      hint = 'An empty array, the default, binds the value to nothing but its keyring.';
  end if;
  perform rekey._check_label(context[array_lower(context, 1)]);
  if not rekey.can_access_tenant(keyring_tenant) then
    perform rekey._refuse_tenant();
  end if;
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
  v_bytes integer := octet_length(plaintext);
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
begin
  if v_bytes is null then
    return null;
  end if;
  v_keyring := rekey._keyring(keyring);
  v_context := rekey._check_context(context, v_keyring.tenant_id);
  v_sealing := rekey._sealing(v_keyring.id, v_bytes);
  v_iv := rekey._random_bytes(16);
  v_aad := v_sealing.header || v_context;
  return v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, plaintext, v_aad);
end
$$;
comment on function rekey.encrypt(bytea, text, text[]) is
  'Encrypts a value of at most 32 MiB with the active version of keyring. context: what the value belongs to (its column, its row); the same is needed to open it. NULL stays NULL. 22023: too long; 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';
grant execute on function rekey.encrypt(bytea, text, text[]) to rekey_app;

-- Inlined, as encrypt_text is: the text must not become the parameter of a statement.
create or replace function rekey.encrypt(plaintext text, keyring text = 'default', context text[] = '{}') returns bytea
language sql volatile
return rekey.encrypt(convert_to(plaintext, 'UTF8'), keyring, context);
comment on function rekey.encrypt(text, text, text[]) is 'As rekey.encrypt(bytea, ...), of the UTF-8 bytes of a text.';
grant execute on function rekey.encrypt(text, text, text[]) to rekey_app;

create or replace function rekey.encrypt_text(plaintext text, keyring text = 'default', context text[] = '{}') returns text
language sql volatile
return 'rk1:' || replace(encode(rekey.encrypt(convert_to(plaintext, 'UTF8'), keyring, context), 'base64'), E'\n', '');
comment on function rekey.encrypt_text is 'As rekey.encrypt(text, ...), in the text form of an envelope: rk1: and base64.';
grant execute on function rekey.encrypt_text to rekey_app;

create or replace function rekey._decrypt(envelope bytea, context text[], pass bytea) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_place bigint;
  v_key bytea;
  v_tenant uuid;
  v_bytes bytea;
  v_iv bytea;
  v_sealed bytea;
  v_plaintext bytea;
begin
  -- A pass begins as an envelope does, with the keyring and its newest version.
  if substr(pass, 1, 7) = substr(envelope, 1, 7) and rekey._is_envelope(pass) and rekey._is_envelope(envelope) then
    v_place := rekey._int4(pass, 7)::bigint - rekey._int4(envelope, 7);
    v_key := rekey._passed_key(pass, context[array_lower(context, 1)], v_place);
    if v_key is not null then
      v_iv := substr(envelope, 12, 16);
      v_sealed := substr(envelope, 28);
      v_bytes := substr(envelope, 1, 11) || rekey._context(context);
      v_plaintext := rekey._aead_decrypt(v_key, v_iv, v_sealed, v_bytes);
    end if;
  end if;
  if v_plaintext is null then
    if rekey._is_envelope(envelope) then
      select k.tenant_id into v_tenant from rekey.keyrings k where k.id = rekey._int4(envelope, 3);
    end if;
    v_bytes := rekey._check_context(context, coalesce(v_tenant, '00000000-0000-0000-0000-000000000000'));
    v_plaintext := rekey._open(envelope, v_bytes);
  end if;
  return v_plaintext;
end
$$;
comment on function rekey._decrypt is 'What rekey.decrypt() does, of an envelope that is not NULL.';

create or replace function rekey.decrypt(ciphertext bytea, context text[] = '{}', pass bytea = null) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if ciphertext is null then
    return null;
  end if;
  return rekey._decrypt(ciphertext, context, pass);
end
$$;
comment on function rekey.decrypt(bytea, text[], bytea) is
  'Opens what rekey.encrypt() made, with the same context. pass: for many rows of a protected column, (select rekey.reading_pass(label)). NULL stays NULL. Writes nothing. 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK003: it does not open; RK006: its key is disabled, scheduled for destruction or destroyed.';
grant execute on function rekey.decrypt(bytea, text[], bytea) to rekey_app;

create or replace function rekey.decrypt(ciphertext text, context text[] = '{}', pass bytea = null) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if ciphertext is null then
    return null;
  end if;
  return rekey._decrypt(coalesce(rekey._from_text(ciphertext), ''::bytea), context, pass);
end
$$;
comment on function rekey.decrypt(text, text[], bytea) is 'As rekey.decrypt(bytea, ...), of the text form of an envelope.';
grant execute on function rekey.decrypt(text, text[], bytea) to rekey_app;

create or replace function rekey._as_text(bytes bytea) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_latin text;
begin
  if getdatabaseencoding() <> 'UTF8' then
    begin
      return convert_from(bytes, 'UTF8');
    exception when character_not_in_repertoire or untranslatable_character then
      return null;
    end;
  elsif position('\x00'::bytea in bytes) > 0 then
    return null;
  end if;
  -- One character a byte, to be looked at without an error, which would quote some of them: the well-formed sequences of
  -- RFC 3629, section 4.
  v_latin := convert_from(bytes, 'LATIN1');
  if octet_length(v_latin) > octet_length(bytes) and v_latin collate "C" !~ ('^([\u0001-\u007f]|[\u00c2-\u00df][\u0080-\u00bf]'
      || '|\u00e0[\u00a0-\u00bf][\u0080-\u00bf]|[\u00e1-\u00ec\u00ee\u00ef][\u0080-\u00bf]{2}|\u00ed[\u0080-\u009f][\u0080-\u00bf]'
      || '|\u00f0[\u0090-\u00bf][\u0080-\u00bf]{2}|[\u00f1-\u00f3][\u0080-\u00bf]{3}|\u00f4[\u0080-\u008f][\u0080-\u00bf]{2})*$') then
    return null;
  end if;
  return convert_from(bytes, 'UTF8');
end
$$;
comment on function rekey._as_text is 'Text of UTF-8 bytes; NULL where they are none, or the encoding of the database lacks one of the characters.';

create or replace function rekey._refuse_bytes() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'the value is no text in the encoding of this database' using errcode = 'character_not_in_repertoire',
    hint = 'rekey.decrypt() returns its bytes.', constraint = 'decrypt_bytes';
end
$$;
comment on function rekey._refuse_bytes is 'Raises 22021.';

create or replace function rekey.decrypt_text(ciphertext bytea, context text[] = '{}', pass bytea = null) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
  v_text text;
begin
  if ciphertext is not null then
    v_plaintext := rekey._decrypt(ciphertext, context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;
comment on function rekey.decrypt_text(bytea, text[], bytea) is 'As rekey.decrypt(), of a value that was text. 22021: it was not.';
grant execute on function rekey.decrypt_text(bytea, text[], bytea) to rekey_app;

create or replace function rekey.decrypt_text(ciphertext text, context text[] = '{}', pass bytea = null) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
  v_text text;
begin
  if ciphertext is not null then
    v_plaintext := rekey._decrypt(coalesce(rekey._from_text(ciphertext), ''::bytea), context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;
comment on function rekey.decrypt_text(text, text[], bytea) is 'As rekey.decrypt(), of the text form of a value that was text. 22021: it was not.';
grant execute on function rekey.decrypt_text(text, text[], bytea) to rekey_app;
