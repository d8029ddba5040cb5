-- The cipher: AEAD_AES_256_CBC_HMAC_SHA_512 of RFC 7518, 5.2.5, on pgcrypto; and all else that is pgcrypto's. Nothing else calls it.
-- These functions are written so that the planner inlines them: key bytes then never are parameters of a statement.

-- pgcrypto is found by the search path, wherever it is, here only: others may make functions in its schema. What the bodies
-- below were bound to is looked at in the end.
select pg_catalog.set_config('search_path', pg_catalog.format('pg_catalog, %I, pg_temp', n.nspname), true)
from pg_catalog.pg_extension e
join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) e.extnamespace
where e.extname operator(pg_catalog.=) 'pgcrypto';

create or replace function rekey._refuse_lengths(key integer, iv integer, message integer) returns bytea
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'AEAD_AES_256_CBC_HMAC_SHA_512 takes a key of 64 bytes, an IV of 16, and a message: got %, % and %',
    coalesce(key::text, 'NULL'), coalesce(iv::text, 'NULL'), coalesce(message::text, 'NULL')
    using errcode = 'invalid_parameter_value';
end
$$;
comment on function rekey._refuse_lengths is 'Raises 22023: pgcrypto itself pads and cuts in silence.';

create or replace function rekey._random_bytes(count integer) returns bytea
language sql volatile parallel safe
return gen_random_bytes(count);
comment on function rekey._random_bytes is 'count (1 to 1024) bytes from the random number generator of pgcrypto.';

create or replace function rekey._mac(key bytea, aad bytea, iv bytea, ciphertext bytea) returns bytea
language sql immutable parallel safe
return substr(
  hmac(aad || iv || ciphertext || int8send(octet_length(aad)::bigint * 8), substr(key, 1, 32), 'sha512'), 1, 32);
comment on function rekey._mac is 'Authentication tag: the first half of HMAC-SHA-512 under the first half of the key.';

create or replace function rekey._encipher(key bytea, iv bytea, plaintext bytea) returns bytea
language sql immutable parallel safe
return case
  when octet_length(key) = 64 and octet_length(iv) = 16 and plaintext is not null then
    encrypt_iv(plaintext, substr(key, 33, 32), iv, 'aes-cbc/pad:pkcs')
  else rekey._refuse_lengths(octet_length(key), octet_length(iv), octet_length(plaintext)) end;
comment on function rekey._encipher is
  'AES-256-CBC with PKCS#7 padding under the second half of a 64-byte key. 22023 for other lengths and NULL. Nothing without its tag: rekey._mac().';

create or replace function rekey._aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea) returns bytea
language sql immutable parallel safe
return case
  when aad is not null then
    rekey._encipher(key, iv, plaintext) || rekey._mac(key, aad, iv, rekey._encipher(key, iv, plaintext))
  else rekey._refuse_lengths(octet_length(key), octet_length(iv), null) end;
comment on function rekey._aead_encrypt is
  'Ciphertext and tag of plaintext under a 64-byte key (MAC key, encryption key) and a 16-byte IV, authenticating aad too. 22023 for other lengths and NULL.';

create or replace function rekey._decipher(key bytea, iv bytea, sealed bytea) returns bytea
language sql immutable parallel safe
return decrypt_iv(substr(sealed, 1, octet_length(sealed) - 32), substr(key, 33, 32), iv, 'aes-cbc/pad:pkcs');
comment on function rekey._decipher is 'Plaintext of what is authentic: its tag was checked before.';

-- Not in constant time: for sweeps and verification, which answer for thousands of rows at once.
create or replace function rekey._is_authentic(key bytea, iv bytea, sealed bytea, aad bytea) returns boolean
language sql immutable parallel safe
return case
  when octet_length(key) = 64 and octet_length(iv) = 16 and aad is not null
       and octet_length(sealed) >= 48 and octet_length(sealed) % 16 = 0 then
    substr(sealed, octet_length(sealed) - 31) = rekey._mac(key, aad, iv, substr(sealed, 1, octet_length(sealed) - 32))
  else rekey._refuse_lengths(octet_length(key), octet_length(iv), octet_length(sealed)) is not null end;
comment on function rekey._is_authentic is 'Whether the tag of what rekey._aead_encrypt sealed is right. 22023 for lengths that cannot be and NULL.';

-- The tags are compared as hashes under the MAC key, which no caller has: how long the comparison takes tells nothing.
create or replace function rekey._aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea) returns bytea
language sql immutable parallel safe
return case
  when octet_length(key) = 64 and octet_length(iv) = 16 and aad is not null
       and octet_length(sealed) >= 48 and octet_length(sealed) % 16 = 0 then
    case when sha256(substr(key, 1, 32) || substr(sealed, octet_length(sealed) - 31))
              = sha256(substr(key, 1, 32) || rekey._mac(key, aad, iv, substr(sealed, 1, octet_length(sealed) - 32))) then
      rekey._decipher(key, iv, sealed)
    end
  else rekey._refuse_lengths(octet_length(key), octet_length(iv), octet_length(sealed)) end;
comment on function rekey._aead_decrypt is
  'Plaintext of what rekey._aead_encrypt sealed; NULL where the tag is wrong. 22023 for lengths that cannot be and NULL.';

create or replace function rekey._fingerprint(kek bytea) returns text
language sql immutable parallel safe
return encode(substr(hmac('pg_rekey/v1/fingerprint'::bytea, kek, 'sha256'), 1, 16), 'hex');
comment on function rekey._fingerprint is 'By which a KEK is recognised; tells nothing of it.';

create or replace function rekey._wrapping_key(kek bytea) returns bytea
language sql immutable parallel safe
return hmac('pg_rekey/v1/wrap'::bytea, kek, 'sha512');
comment on function rekey._wrapping_key is 'The 64-byte AEAD key that wraps DEKs, derived from a KEK.';

create or replace function rekey._sign(key bytea, message bytea) returns bytea
language sql immutable parallel safe
return hmac(message, key, 'sha256');
comment on function rekey._sign is 'HMAC-SHA-256 of a message, by which a webhook is known to be ours.';

create or replace function rekey._index_key(dek bytea, info bytea) returns bytea
language sql immutable parallel safe
return hmac('pg_rekey/v1/index'::bytea || info, dek, 'sha256');
comment on function rekey._index_key is 'The key of a blind index under one key version, derived from its DEK. info: the label of the column and what it takes for equal.';

create or replace function rekey._index_value(version integer, key bytea, normalized bytea) returns bytea
language sql immutable parallel safe
return int4send(version) || substr(hmac(normalized, key, 'sha256'), 1, 16);
comment on function rekey._index_value is 'What a blind index holds for a value: the key version, and the first 16 bytes of its HMAC-SHA-256.';

create or replace function rekey._dearmor(armored text) returns bytea
language sql immutable parallel safe
return dearmor(armored);
comment on function rekey._dearmor is 'pgcrypto''s dearmor(), wherever it is.';

create or replace function rekey._pgp_decrypt(message bytea, passphrase text) returns bytea
language sql immutable parallel safe
return pgp_sym_decrypt_bytea(message, passphrase);
comment on function rekey._pgp_decrypt is 'pgcrypto''s pgp_sym_decrypt_bytea(), wherever it is.';

set local search_path = pg_catalog, pg_temp;
do $$
declare
  v_stranger text;
begin
  select pg_describe_object(d.refclassid, d.refobjid, 0) into v_stranger
  from pg_proc p
  join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.refclassid <> 'pg_namespace'::regclass and d.deptype = 'n'
  cross join lateral pg_identify_object(d.refclassid, d.refobjid, 0) o
  where p.pronamespace = 'rekey'::regnamespace and coalesce(o.schema, '') not in ('pg_catalog', 'rekey')
    and d.refclassid <> 'pg_language'::regclass
    and not exists (
      select from pg_depend m join pg_extension e on m.refclassid = 'pg_extension'::regclass and e.oid = m.refobjid and e.extname = 'pgcrypto'
      where m.classid = d.refclassid and m.objid = d.refobjid and m.deptype = 'e')
  limit 1;
  if found then
    raise exception '% is taken for one of pgcrypto', v_stranger using errcode = 'ambiguous_function',
      hint = 'Drop it, or move pgcrypto into a schema in which nobody else may create: ALTER EXTENSION pgcrypto SET SCHEMA extensions.';
  end if;
end
$$;
