-- Adoption: values that are there already, plain or encrypted by other means, become envelopes. It is a rotation with the
-- trigger adoption. Plain values any worker adopts; where a key is needed, pg-rekey columns adopt brings it.

-- Decryption under a wrong passphrase fails, and no expression with a secret may (41_encrypt.sql). So passphrases wait in a setting
-- of the transaction, sealed as the KEK of a session is, and come into the statement as a column.
create or replace function rekey._keep_passphrases(passphrases bytea[]) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seal bytea := rekey._session_seal();
  v_iv bytea := rekey._random_bytes(16);
  v_aad bytea := rekey._session_aad('p');
  v_plain bytea;
  v_sealed bytea;
  v_set text;
begin
  v_plain := convert_to(coalesce(passphrases, '{}')::text, 'UTF8');
  v_sealed := rekey._aead_encrypt(v_seal, v_iv, v_plain, v_aad);
  v_set := set_config('rekey.passphrases', encode(v_iv || v_sealed, 'hex'), true);
  return v_set <> '';
end
$$;
comment on function rekey._keep_passphrases is 'Keeps passphrases until the end of the transaction, sealed, for rekey._passphrases(). True.';
grant execute on function rekey._keep_passphrases to rekey_admin;

create or replace function rekey._passphrases() returns table (place integer, passphrase bytea)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seal bytea;
  v_bytes bytea := decode(coalesce(current_setting('rekey.passphrases', true), ''), 'hex');
  v_iv bytea := substr(v_bytes, 1, 16);
  v_aad bytea := rekey._session_aad('p');
  v_plain bytea;
  v_passphrases bytea[];
begin
  if octet_length(v_bytes) < 64 then
    return;
  end if;
  select s.key into v_seal from rekey._session_key s;
  v_bytes := substr(v_bytes, 17);
  v_plain := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  v_passphrases := convert_from(v_plain, 'UTF8')::bytea[];
  place := 0;
  foreach passphrase in array v_passphrases loop
    place := place + 1;
    return next;
  end loop;
end
$$;
comment on function rekey._passphrases is 'What rekey._keep_passphrases() keeps in this transaction.';

create or replace function rekey._pgp_message(value bytea) returns bytea
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return case when substr(value, 1, 5) = '-----'::bytea then rekey._dearmor(encode(value, 'escape')) else value end;
exception when external_routine_invocation_exception or invalid_parameter_value or data_exception then
  return null;
end
$$;
comment on function rekey._pgp_message is 'A message of OpenPGP without its armour; NULL where that is damaged.';

create or replace function rekey._open_pgp(message bytea) returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
  v_count integer;
begin
  select count(*) into v_count from rekey._passphrases();
  for v_place in 1 .. v_count loop
    begin
      select rekey._pgp_decrypt(message, convert_from(p.passphrase, 'UTF8')) into v_plaintext
      from rekey._passphrases() p where p.place = v_place;
      exit when v_plaintext is not null;
    exception when external_routine_invocation_exception or invalid_parameter_value or data_exception then
      null;  -- another passphrase, or damaged
    end;
  end loop;
  return v_plaintext;
end
$$;
comment on function rekey._open_pgp is 'Bytes of what pgp_sym_encrypt() or pgp_sym_encrypt_bytea() made; NULL where no passphrase of rekey._keep_passphrases() opens it.';

-- 13 bytes that tell the cipher, then the data: eight random bytes, the last two of them again, and the first packet within.
create or replace function rekey._pgp_problem(message bytea) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_cipher integer;
  v_length integer;
begin
  if coalesce(octet_length(message), 0) < 40 or get_byte(message, 2) <> 4 or get_byte(message, 3) in (2, 7, 8, 9) then
    return 'pgp_sym does not open: damaged, or another passphrase';
  end if;
  v_cipher := get_byte(message, 3);
  if not v_cipher in (3, 4) then
    return format('pgp_sym does not open: pgcrypto does not have cipher %s of OpenPGP', v_cipher);
  end if;
  v_length := case when get_byte(message, 16) = 255 then 5 when get_byte(message, 16) between 192 and 223 then 2 else 1 end;
  return format(
    case when substr(message, 24 + v_length, 2) = substr(message, 26 + v_length, 2) and get_byte(message, 27 + v_length) in (200, 203)
         then 'pgp_sym holds its value unencrypted: pgcrypto wrote it where OpenSSL did not have the cipher %s (CVE-2026-14663)'
         else 'pgp_sym does not open: made with the cipher %s, which OpenSSL 3 has in its legacy provider alone; or damaged, or another passphrase' end,
    case v_cipher when 3 then 'cast5' else 'bf' end);
end
$$;
comment on function rekey._pgp_problem is 'Why a message that no passphrase opens may be so.';

create or replace function rekey._adopt(
  "values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean, prefix bytea = null, normalization text = null
) returns rekey._sealed
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key bytea := sealing.key;
  v_header bytea := sealing.header;
  v_takes text[] := rekey._marks_of(formats);
  v_bytes bytea;
  v_inner bytea;
  v_format text;
  v_plaintext bytea;
  v_problem text;
  v_iv bytea;
  v_aad bytea;
  v_value bytea;
  v_place integer := 0;
  -- Arrays of their own: a field of v_made would be copied whole at every assignment.
  v_contexts bytea[] := contexts;
  v_ciphertexts bytea[];
  v_problems text[];
  v_formats text[];
  v_closed bytea[];
  v_info bytea := prefix || rekey._part(normalization);
  v_index_key bytea := case when normalization is not null then rekey._index_key(v_key, v_info) end;
  v_normalized bytea;
  v_indexes bytea[];
  v_made rekey._sealed;
begin
  v_contexts[1] := v_contexts[1];  -- from now on its elements are found without a search
  -- Plain assignments only: the values are plain, and parameters of statements can be logged.
  foreach v_value in array "values" loop
    v_place := v_place + 1;
    v_plaintext := null;
    v_problem := null;
    v_bytes := v_value;  -- NULL: too large to be read
    v_format := case when rekey._may_be_marked(v_value) then rekey._legacy_mark(v_value) end;
    if v_format is null and rekey._may_be_wrapped(v_value) then
      v_inner := rekey._marked_inside(v_value);
      v_format := rekey._legacy_mark(v_inner);
      v_bytes := coalesce(v_inner, v_value);
    end if;
    if v_format is null then
      v_format := case when 'unmarked' = any (v_takes) then 'unmarked' else 'plaintext' end;
    elsif forced and 'plaintext' = any (formats) and v_format <> 'envelope' and not v_format = any (v_takes) then
      v_format := 'plaintext';
      v_bytes := v_value;
    end if;
    if v_value is null then
      v_problem := 'has more than 64 MiB, and was not read';
    elsif v_format = 'envelope' then
      v_problem := 'is a damaged envelope';
    elsif v_format = 'plaintext' and not 'plaintext' = any (formats) then
      v_problem := 'is in none of the formats';
    elsif v_format <> 'plaintext' and not v_format = any (v_takes) then
      v_problem := format('looks like %s, which is not among the formats', v_format);
    elsif octet_length(v_bytes) > rekey._max_bytes() then
      v_problem := format('has more than %s bytes', rekey._max_bytes());
    elsif v_format = 'plaintext' then
      v_plaintext := v_bytes;
    elsif v_format = 'pgp_sym' then
      v_bytes := rekey._pgp_message(v_bytes);
      v_plaintext := rekey._open_pgp(v_bytes);
      if v_plaintext is null then
        v_problem := rekey._pgp_problem(v_bytes);
      end if;
    end if;
    v_ciphertexts[v_place] := null;
    v_problems[v_place] := v_problem;
    v_formats[v_place] := v_format;
    v_closed[v_place] := case when v_plaintext is null and v_problem is null then v_bytes end;
    if v_plaintext is not null then
      v_iv := rekey._random_bytes(16);
      v_aad := v_header || v_contexts[v_place];
      v_ciphertexts[v_place] := v_header || v_iv || rekey._aead_encrypt(v_key, v_iv, v_plaintext, v_aad);
      if v_index_key is not null then
        v_normalized := rekey._normalized(v_plaintext, normalization);
        v_indexes[v_place] := rekey._index_value(rekey._int4(v_header, 7), v_index_key, v_normalized);
      end if;
    end if;
  end loop;
  v_made.ciphertexts := v_ciphertexts;
  v_made.problems := v_problems;
  v_made.formats := v_formats;
  v_made.closed := v_closed;
  v_made.indexes := v_indexes;
  return v_made;
end
$$;
comment on function rekey._adopt is
  'Seals values that are no envelopes, and raises nothing: formats says as what each may be taken, forced that whatever it looks like it is plaintext else; prefix, normalization: the label of a searchable column, and what it takes for equal. A value that only the client can open gets neither ciphertext nor problem, and stands in closed, without what was wrapped around it.';

create or replace function rekey.adopt_column(
  target regclass, column_name name, formats text[] = '{plaintext}', force boolean = false, reason text = null,
  values_are_tokens boolean = false, unwrap text = null
) returns setof rekey.rotation_status
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_keyring rekey.keyrings;
  v_rotation bigint;
begin
  perform rekey._refuse_stranger(target);
  if coalesce(cardinality(formats), 0) = 0 or not formats <@ array(select f.format from rekey._legacy_formats() f) then
    raise exception 'there is no such format' using errcode = 'invalid_parameter_value',
      hint = (select string_agg(f.format, ', ') from rekey._legacy_formats() f) || ': one or more of them.';
  end if;
  if unwrap not in ('json', 'php', 'pickle') then
    raise exception 'values are not unwrapped from %', quote_literal(unwrap) using errcode = 'invalid_parameter_value',
      hint = 'unwrap: json, php or pickle.';
  end if;
  select * into v_column from rekey.protected_columns c where c.id = rekey._column_id(target, adopt_column.column_name);
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'rekey.protect_column() first.', constraint = 'protect';
  end if;
  perform rekey._refuse_problem(v_column.label, rekey._column_problem(v_column));
  if not coalesce(force, false) then
    perform rekey._refuse_doubt(v_column.label, formats, values_are_tokens);
  end if;
  v_keyring := rekey._keyring(rekey._keyring_name(v_column.keyring_id), lock => true);
  select r.id into v_rotation from rekey.rotations r where r.column_id = v_column.id and rekey._is_under_way(r.state);
  if found then
    raise exception '% is being adopted, by rotation %', v_column.label, v_rotation using errcode = 'RK004', hint = 'Wait for it.', constraint = 'wait';
  end if;
  insert into rekey.rotations (keyring_id, from_versions, to_version, trigger, reason, requested_by, column_id, formats, forced, unwrap, in_line)
  select v_keyring.id, '{}', k.version, 'adoption', adopt_column.reason, rekey._requester(), v_column.id,
    array(select distinct f from unnest(adopt_column.formats) f order by 1), coalesce(force, false), adopt_column.unwrap,
    exists (select from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state))
  from rekey.encryption_keys k where k.keyring_id = v_keyring.id and k.state = 'active'
  returning id into v_rotation;
  if v_rotation is null then
    raise exception 'keyring % is retired', quote_literal(v_keyring.name) using errcode = 'RK006';
  end if;
  perform rekey._audit('rotation.requested', v_keyring.name, (rekey._active_versions(array[v_keyring.id]))[1], v_rotation,
    jsonb_build_object('trigger', 'adoption', 'column', v_column.label, 'formats', formats, 'force', nullif(force, false), 'unwrap', unwrap, 'reason', reason));
  return query select s.* from rekey.rotation_status s where s.id = v_rotation;
end
$$;
comment on function rekey.adopt_column is
  'Queues the encryption of what stands in a protected column and is no envelope, as a rotation with the trigger adoption, which it returns. Where the keyring is under way, it waits in line, queued, and blocked_by says for what. formats: as what a value may be taken: plaintext, and those of docs/adopting.md. Each is recognised; one that looks like another format is never taken for plaintext, unless force. Where plaintext is among them, a sample of the column is looked at first: RK005 where it looks encrypted by another tool, unless force, or, where random tokens look the same, values_are_tokens. unwrap: what pg-rekey columns adopt takes off opened values. What does not open is left as it is, in quarantine. With plaintext alone any worker does it; else pg-rekey columns adopt, which has the keys. The owner of the table calls it, as a member of rekey_admin, or a superuser. 22023: no such format, or nothing to unwrap from; 42501: not the owner; RK004: the column is being adopted; RK005: blocked, or it looks encrypted; RK006: retired keyring; RK007: not protected.';
grant execute on function rekey.adopt_column to rekey_admin;

-- What follows is how pg-rekey columns adopt works. One batch is two calls in one transaction: in between, the client opens
-- what the server cannot, and copies the plain values into a temporary table by binary COPY, as it does passphrases.
create or replace function rekey._adoption_rows(
  target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean
) returns rekey._adoption
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_batch record;
  v_contexts bytea[];
  v_sealing rekey._sealing;
  v_made rekey._sealed;
  v_adoption rekey._adoption;
begin
  select b.* into v_batch from rekey._call_read(
    target.function_name, relation, first, format('(%s,0)', until_block)::tid, null, null, max_rows, 2097152) b;
  v_adoption.relation := relation;
  v_adoption.next := v_batch.next;
  if v_batch.rows is not null then
    v_contexts := array(
      select target.prefix || c.context from unnest(v_batch.contexts) with ordinality as c(context, place) order by c.place);
    v_sealing := rekey._sealing(keyring_id);
    v_made := rekey._adopt(v_batch.ciphertexts, v_contexts, v_sealing, formats, forced, target.prefix, target.normalization);
    v_adoption.rows := v_batch.rows;
    v_adoption.keys := v_batch.keys;
    v_adoption.formats := v_made.formats;
    v_adoption.problems := v_made.problems;
    v_adoption.ciphertexts := v_made.ciphertexts;
    v_adoption.indexes := v_made.indexes;
    v_adoption.legacy := v_made.closed;
  end if;
  return v_adoption;
end
$$;
comment on function rekey._adoption_rows is 'Locks values of a range that are no envelopes, and seals those that the server can open; legacy are those that the client has to.';

create or replace function rekey._adoption_batch(rotation_id bigint) returns rekey._adoption
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2 s'  -- as rekey.rotation_step()
as $$
declare
  v_rotation record;
  v_chunk rekey._chunks;
  v_table regclass;
  v_target rekey._target;
  v_state text;
  v_until_block bigint;
  v_max_rows integer;
  v_adoption rekey._adoption;
  v_apart record;
  v_failed record;
  v_begin timestamptz := clock_timestamp();
begin
  perform rekey._refuse_snapshot();
  select r.*, p.label into v_rotation from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
  where r.id = _adoption_batch.rotation_id and r.trigger = 'adoption';
  if not found then
    raise exception 'no such adoption: %', coalesce(rotation_id::text, 'NULL') using errcode = 'RK007';
  end if;
  v_table := (rekey._column_shape(v_rotation.column_id)).relation;
  if v_table is not null then
    perform rekey._refuse_stranger(v_table);
  end if;
  select c.* into v_chunk from rekey._chunks c
  where v_rotation.state = 'running' and c.pass_id = v_rotation.pass_id and c.kind = 'adopt' and c.target = v_rotation.label
  order by c.id limit 1 for update skip locked;
  if not found then
    return null;
  end if;
  v_target := rekey._target_of(v_chunk);
  v_state := rekey._target_state(v_target.function_name);
  if v_target.problem is not null then
    -- As in rekey._sweep_batch(): the verification says what it waits for.
    delete from rekey._chunks c where c.id = v_chunk.id;
    return null;
  end if;
  select w.rows into v_max_rows from rekey._throttle(least(v_chunk.batch_rows, 1000)) w;
  if v_max_rows is null then
    return null;
  end if;
  perform rekey._take_in_hand(v_chunk.relation);
  v_until_block := least(rekey._block(v_chunk.first) + v_chunk.batch_blocks, v_chunk.until_block);
  v_adoption := rekey._adoption_rows(v_target, v_chunk.relation, v_chunk.first, v_until_block, v_max_rows,
    v_rotation.keyring_id, v_rotation.formats, v_rotation.forced);
  select a.* into v_apart from rekey._write_apart(v_target, v_chunk.relation, v_adoption.rows, null, v_adoption.ciphertexts, true, null, v_adoption.indexes) a;
  select array_agg(u.key) as keys, array_agg(coalesce(u.problem, a.problem)) as problems, array_agg(a.code) as codes into v_failed
  from unnest(v_adoption.rows, v_adoption.keys, v_adoption.problems) as u(row, key, problem)
  left join unnest(v_apart.refused, v_apart.problems, v_apart.codes) as a(row, problem, code) on a.row = u.row
  where u.problem is not null or a.row is not null;
  if rekey._target_state(v_target.function_name) <> v_state then
    raise exception 'the protected column % was changed while its rows were adopted', v_chunk.target using errcode = 'RK005', hint = 'Try again.';
  end if;
  perform rekey._note_adopted(v_rotation.id, v_rotation.keyring_id, cardinality(v_apart.written), v_chunk.target, v_chunk.relation,
    v_failed.keys, v_failed.problems, v_failed.codes);
  perform rekey._note_passed(v_chunk, cardinality(v_apart.written), cardinality(v_apart.refused));
  perform rekey._note_pace(v_begin, coalesce(cardinality(v_adoption.rows), 0));
  if v_apart.undone is null then
    perform rekey._advance(v_chunk, v_adoption.next, v_until_block, extract(epoch from clock_timestamp() - v_begin));
  else
    update rekey._chunks c set first = v_apart.undone, batch_rows = 32 where c.id = v_chunk.id;
  end if;
  return v_adoption;
end
$$;
comment on function rekey._adoption_batch is 'One batch of an adoption: adopts what the server can, and returns the rest, locked. NULL at the end, where the column is blocked, where the rotation is not running, and while the throttle holds it up.';
grant execute on function rekey._adoption_batch to rekey_admin;

create or replace function rekey._note_adopted(
  rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]
) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform rekey._note_batch(array[rotation_id], case when rows_done > 0 then array[keyring_id] end, array[rows_done], target, relation,
    case when failed_keys is not null then array_fill(keyring_id, array[cardinality(failed_keys)]) end,
    case when failed_keys is not null then array_fill(null::integer, array[cardinality(failed_keys)]) end, failed_keys, failed_problems, failed_codes);
end
$$;
comment on function rekey._note_adopted is 'rekey._note_batch() for an adoption.';

create or replace function rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2 s'  -- as rekey.rotation_step()
as $$
declare
  v_rotation record;
  v_target rekey._target;
  v_state text;
  v_batch record;
  v_given integer;
  v_values bytea[];
  v_rows tid[];
  v_contexts bytea[];
  v_failed_keys text[];
  v_failed_problems text[];
  v_failed_codes text[];
  v_sealing rekey._sealing;
  v_made rekey._sealed;
  v_apart record;
  v_done bigint := 0;
begin
  select r.*, p.label into v_rotation from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
  where r.id = _adoption_store.rotation_id and r.trigger = 'adoption';
  select * into v_target from rekey._targets(v_rotation.label) t where t.relation = _adoption_store.relation;
  if not found then
    raise exception 'no such adoption: %', coalesce(rotation_id::text, 'NULL') using errcode = 'RK007';
  end if;
  v_state := rekey._target_state(v_target.function_name);
  perform rekey._refuse_stranger((rekey._column_shape(v_rotation.column_id)).relation);
  perform rekey._refuse_problem(v_rotation.label, v_target.problem);
  if rows is null then
    return 0;
  end if;
  -- The rows once more, locked since adoption_batch: what they are bound to is not the client's to say.
  select b.* into v_batch from rekey._call_read(v_target.function_name, relation,
    (select min(u.row) from unnest(rows) as u(row)), rekey._next_row((select max(u.row) from unnest(rows) as u(row))), null, null, 2000, 1073741824) b;
  for v_place in 1 .. coalesce(cardinality(v_batch.rows), 0) loop
    v_given := array_position(rows, v_batch.rows[v_place]);
    if plaintexts[v_given] is not null then
      v_rows := v_rows || v_batch.rows[v_place];
      v_values := v_values || plaintexts[v_given];
      v_contexts := v_contexts || (v_target.prefix || v_batch.contexts[v_place]);
    elsif v_given is not null then
      v_failed_keys := v_failed_keys || v_batch.keys[v_place];
      v_failed_problems := v_failed_problems || coalesce(problems[v_given], 'does not open');
    end if;
  end loop;
  if v_rows is not null then
    v_sealing := rekey._sealing(v_rotation.keyring_id);
    v_made := rekey._adopt(v_values, v_contexts, v_sealing, '{plaintext}', true, v_target.prefix, v_target.normalization);
    for v_place in 1 .. cardinality(v_rows) loop
      if v_made.problems[v_place] is not null then
        raise exception 'a value of % cannot be sealed: it %', v_rotation.label, v_made.problems[v_place] using errcode = 'RK003';
      end if;
    end loop;
    -- (What it does not come to, the next pass does.)
    select a.* into v_apart from rekey._write_apart(v_target, relation, v_rows, null, v_made.ciphertexts, true, v_batch.state, v_made.indexes) a;
    v_done := cardinality(v_apart.written);
    v_failed_codes := array_fill(null::text, array[coalesce(cardinality(v_failed_keys), 0)]) || v_apart.codes;
    v_failed_keys := v_failed_keys || array(
      select v_batch.keys[array_position(v_batch.rows, u.row)] from unnest(v_apart.refused) with ordinality as u(row, place) order by u.place);
    v_failed_problems := v_failed_problems || v_apart.problems;
  end if;
  if rekey._target_state(v_target.function_name) <> v_state then
    raise exception 'the protected column % was changed while its rows were adopted', v_rotation.label using errcode = 'RK005', hint = 'Try again.';
  end if;
  perform rekey._note_adopted(v_rotation.id, v_rotation.keyring_id, v_done, v_rotation.label, relation,
    nullif(v_failed_keys, '{}'), v_failed_problems, v_failed_codes);
  return v_done;
end
$$;
comment on function rekey._adoption_store is 'Seals what the client opened of a batch, and quarantines what it could not.';
grant execute on function rekey._adoption_store to rekey_admin;

create or replace function rekey._adoption_preview(
  target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean
) returns rekey._adoption
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_target rekey._target;
  v_blocks bigint;
  v_until bigint;
  v_adoption rekey._adoption;
begin
  perform rekey._refuse_stranger(target);
  select * into v_column from rekey.protected_columns c where c.id = rekey._column_id(target, _adoption_preview.column_name);
  select * into v_target from rekey._targets(v_column.label) t
  where v_column.label is not null and (t.relation = _adoption_preview.relation or _adoption_preview.relation is null)
  order by t.relation limit 1;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007';
  end if;
  perform rekey._refuse_problem(v_column.label, v_target.problem);
  v_until := split_part(trim(first::text, '()'), ',', 1)::bigint + 64;
  v_adoption := rekey._adoption_rows(v_target, v_target.relation, first, v_until, 1000, v_column.keyring_id, formats, forced);
  v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
  if v_adoption.next is not null then
    v_adoption.next := rekey._next_row(v_adoption.next);
  elsif v_until < v_blocks then
    v_adoption.next := format('(%s,0)', v_until)::tid;
  else
    v_adoption.next := null;
    v_adoption.next_relation := (
      select min(t.relation::oid)::regclass from rekey._targets(v_column.label) t where t.relation::oid > v_target.relation::oid);
  end if;
  return v_adoption;
end
$$;
comment on function rekey._adoption_preview is 'As rekey._adoption_batch(), before there is an adoption: writes nothing. first: where to begin in relation. next, next_relation: where to go on.';
grant execute on function rekey._adoption_preview to rekey_admin;

create or replace function rekey.adoption_doubt(
  target regclass, column_name name, formats text[] = '{plaintext}', values_are_tokens boolean = false
) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_label text;
begin
  perform rekey._refuse_stranger(target);
  select c.label into v_label from rekey.protected_columns c where c.id = rekey._column_id(target, adoption_doubt.column_name);
  return regexp_replace(rekey._adoption_doubt(v_label, formats, values_are_tokens), '^\w+: ', '');
end
$$;
comment on function rekey.adoption_doubt is
  'For pg-rekey columns adopt --dry-run: why rekey.adopt_column() would refuse a protected column without force, as a sample tells: its values look encrypted by another tool. NULL: it would not. 42501: not the owner of the table.';
grant execute on function rekey.adoption_doubt to rekey_admin;

-- Run with the caller's rights: what stands in pg_temp is the caller's.
create or replace function rekey._copied_passphrases() returns bytea[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_passphrases bytea[];
begin
  if to_regclass('pg_temp.pg_rekey_passphrases') is not null then
    execute format('select array_agg(p.passphrase order by p.ctid) from pg_temp.%I p', 'pg_rekey_passphrases') into v_passphrases;
  end if;
  return v_passphrases;
end
$$;
comment on function rekey._copied_passphrases is 'The passphrases of the temporary table pg_rekey_passphrases (passphrase bytea), where there is one.';
grant execute on function rekey._copied_passphrases to rekey_admin;

create or replace function rekey.adoption_batch(rotation_id bigint) returns rekey._adoption
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_passphrases bytea[] := rekey._copied_passphrases();
  v_kept boolean := rekey._keep_passphrases(v_passphrases);
begin
  return case when v_kept then rekey._adoption_batch(rotation_id) end;
end
$$;
comment on function rekey.adoption_batch is
  'For pg-rekey columns adopt: adopts a batch of values as far as the server can open them (plaintext; pgp_sym with the passphrases in the temporary table pg_rekey_passphrases), and returns the others in legacy, their rows locked, for rekey.adoption_store() in the same transaction. NULL: nothing is left of this pass, the throttle holds it up, or the column is blocked, for which the rotation waits. 25001: not in READ COMMITTED; 42501: not the owner of the table; RK005: changed meanwhile; RK007: no such adoption.';
grant execute on function rekey.adoption_batch to rekey_admin;

create or replace function rekey.adoption_store(rotation_id bigint, relation regclass) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows tid[];
  v_plaintexts bytea[];
  v_problems text[];
  v_done bigint;
begin
  execute format('select array_agg(o."row"::tid order by o.ctid), array_agg(o.plaintext order by o.ctid), array_agg(o.problem order by o.ctid) from pg_temp.%I o', 'pg_rekey_opened')
  into v_rows, v_plaintexts, v_problems;
  v_done := rekey._adoption_store(rotation_id, relation, v_rows, v_plaintexts, v_problems);
  return v_done;
end
$$;
comment on function rekey.adoption_store is
  'For pg-rekey columns adopt: seals what the client opened of the last rekey.adoption_batch(), from the temporary table pg_rekey_opened ("row" text, plaintext bytea, problem text), and returns how many. Where plaintext is NULL, the row goes into quarantine with its problem. Errors: as rekey.adoption_batch().';
grant execute on function rekey.adoption_store to rekey_admin;

create or replace function rekey.adoption_preview(
  target regclass, column_name name, formats text[] = '{plaintext}', force boolean = false, relation regclass = null, first tid = '(0,0)'
) returns rekey._adoption
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_passphrases bytea[] := rekey._copied_passphrases();
  v_kept boolean := rekey._keep_passphrases(v_passphrases);
  v_adoption rekey._adoption;
begin
  v_adoption := case when v_kept then rekey._adoption_preview(target, column_name, relation, first, formats, force) end;
  v_adoption.ciphertexts := null;
  return v_adoption;
end
$$;
comment on function rekey.adoption_preview is
  'For pg-rekey columns adopt --dry-run: what an adoption would find in one range of a protected column, by format and problem; legacy: what only the client can tell. Changes nothing, but locks the rows until the transaction ends. relation, first: where to begin; next and next_relation of the result say where to go on.';
grant execute on function rekey.adoption_preview to rekey_admin;

create or replace function rekey.adopt_vault(keyring text = 'default', tenant_id uuid = '00000000-0000-0000-0000-000000000000') returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[];
  v_id uuid;
  v_name text;
  v_opens boolean;
  v_count bigint := 0;
begin
  if rekey._trusted_relation('supabase_vault', 'vault', 'decrypted_secrets') is null then
    raise exception 'this database has no Supabase Vault' using errcode = 'undefined_table';
  end if;
  select array_agg(s.value || n.suffix) into v_names
  from rekey.setting_status s, (values (''), ('_new')) as n(suffix) where s.name = 'kek_secret_name';
  -- Nothing is decrypted here: the view does that for its column, and one that does not open would stop all.
  for v_id, v_name in execute format($sql$
    select v.id, coalesce(v.name, v.id::text) as name from %I.decrypted_secrets v
    where not coalesce(v.name, '') = any ($1)
      and not exists (select from rekey.secrets s where s.tenant_id = $2 and s.name = coalesce(v.name, v.id::text))
    order by v.id$sql$, 'vault') using v_names, tenant_id
  loop
    begin
      execute format('select v.decrypted_secret is not null from %I.decrypted_secrets v where v.id = $1', 'vault') into v_opens using v_id;
    exception when data_exception or external_routine_invocation_exception or invalid_parameter_value or character_not_in_repertoire then
      v_opens := false;
    end;
    if v_opens then
      -- From the one into the other: a value that is a parameter can be logged.
      execute format(
        'select rekey.set_secret($2, v.decrypted_secret, $3, $4, nullif(v.description, $5)) from %I.decrypted_secrets v where v.id = $1', 'vault')
      using v_id, v_name, tenant_id, keyring, '';
      v_count := v_count + 1;
    elsif not v_opens then
      raise warning 'secret % of the Vault does not open', quote_literal(v_name) using errcode = 'RK003',
        hint = format('Nor can vault.update_secret() replace it: DELETE FROM vault.secrets WHERE id = %L, and store it anew.', v_id);
    end if;
  end loop;
  return v_count;
end
$$;
comment on function rekey.adopt_vault is
  'Copies the secrets of the Supabase Vault into rekey.secrets, under their names (a secret without one: its id), and returns how many. Names that are taken, and the KEK, are left out, so that it can be repeated. One that does not open stops no other: a warning (RK003) names it. The Vault keeps its own: delete them there afterwards. Takes the rights to read the Vault and rekey_app. 42P01: there is no Vault, or it is not the extension supabase_vault''s; and the errors of rekey.set_secret().';
grant execute on function rekey.adopt_vault to rekey_admin;
