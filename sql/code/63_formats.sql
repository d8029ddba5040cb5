-- What a value looks like that is no envelope: the marks of other tools' ciphertext, what is wrapped around them, and the shape of
-- a whole column. Nothing here puts a value into a statement, or raises an error because of one (see 41_encrypt.sql).

create or replace function rekey._legacy_formats() returns table (format text, marks text[])
language sql immutable parallel safe
begin atomic
  values
    ('plaintext', '{}'::text[]), ('pgp_sym', '{pgp_sym}'), ('fernet', '{fernet}'), ('v1', '{v1}'), ('aes_cbc', '{aes_cbc}'), ('aes_gcm', '{unmarked}'),
    ('better_auth', '{better_auth,unmarked}'), ('calcom', '{calcom}'), ('cryptr', '{unmarked}'), ('django_fernet', '{fernet}'), ('jwe', '{jwe}'),
    ('laravel', '{laravel}'), ('openssl', '{openssl}'), ('prisma', '{prisma}'), ('rails', '{rails}'), ('sqlalchemy_aes', '{unmarked}'),
    ('sqlalchemy_aes_gcm', '{unmarked}'), ('sqlalchemy_fernet', '{fernet}'), ('tink', '{unmarked}'), ('transit', '{transit}');
end;
comment on function rekey._legacy_formats is 'The formats that can be adopted, and which marks (rekey._legacy_mark) each may open; unmarked: a value without one, to be tried.';

create or replace function rekey._marks_of(formats text[]) returns text[]
language sql immutable parallel safe
begin atomic
  select coalesce(array_agg(distinct m.mark), '{}') from rekey._legacy_formats() f, unnest(f.marks) as m(mark) where f.format = any (formats);
end;
comment on function rekey._marks_of is 'The marks of the values that these formats may open.';

create or replace function rekey._first_place(groups text[]) returns integer
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  for v_place in 1 .. cardinality(groups) loop
    if groups[v_place] is not null then
      return v_place;
    end if;
  end loop;
  return null;
end
$$;
comment on function rekey._first_place is 'Where the first element that is not NULL stands.';

-- One pattern for all marks, since most values differ from each at their first characters. A group stands for the name in the same
-- place of the list above it. Each goes on to the end: of matches that are as long as each other, the first one counts.
create or replace function rekey._text_mark(start text) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names constant text[] := '{
    envelope, pgp_sym, fernet, v1, better_auth, jwe, laravel, openssl, prisma, rails, transit, age, ansible_vault, sops,
    paseto, k8s, iron, ciphersweet, halite, plug, grafana, jenkins, magento, nextcloud, saltpack, armored, rails_message,
    adonis, iv_tag, aes_cbc, simple_encryptor, mongodb, calcom, json, encrypted, versioned}'::text[];
  v_groups text[] := regexp_match(start, $re$(?x)^(?:
      (rk1:).*
    | (-----BEGIN\ PGP\ MESSAGE-----).*
    | (gAAAAA.{94}).*
    | (v1:[A-Za-z0-9+/]{16,24}={0,2}:).*
    | (\$ba\$\d+\$[0-9a-f]).*
    | (eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]{16,22}\.).*
    | (\{"iv":"[^"]+","value":").*
    | (Salted__).*
    | (v\d\.aesgcm\d+\.[0-9a-f]{8}\.).*
    | (\{"p":"[^"]*","h":\{).*
    | (vault:v\d+:).*
    | (-----BEGIN\ AGE\ ENCRYPTED\ FILE-----|age-encryption\.org/v\d).*
    | (\$ANSIBLE_VAULT;).*
    | (ENC\[|EJ\[\d).*
    | (v\d\.local\.[A-Za-z0-9_-]{32}).*
    | (k8s:enc:).*
    | (Fe26\.\d\*).*
    | ((?:nacl|fips|brng):[A-Za-z0-9_-]{20}).*
    | (MUI[DEFG]A[A-Za-z0-9_-]{20}).*
    | ((?:QTEyOEdDTQ|QTE5MkdDTQ|QTI1NkdDTQ|WENQ)\.).*
    | ((?:\#[A-Za-z0-9+/=]{4,99}\#)?\*YWVzL).*
    | (\{AQAAAB[A-Za-z0-9+/=]{20}).*
    | (\d:\d:[A-Za-z0-9+/=]{20}).*
    | ([0-9a-f]{32,}\|[0-9a-zA-Z/+=]{16,}\|[0-9a-f]{64}).*
    | (BEGIN\ [A-Z0-9\ ]*SALTPACK\ ENCRYPTED).*
    | (-----BEGIN\ CMS-----|-----BEGIN\ (?:[A-Z0-9]+\ )*ENCRYPTED\ (?:MESSAGE|FILE|DATA|VALUE|TEXT)).*
    | ([A-Za-z0-9+/_=%-]*--[A-Za-z0-9+/_-]{16}--[A-Za-z0-9+/_-]{22}(?:==)?$).*
    | ([A-Za-z0-9_-]+\.(?:v\d+:[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{22}|[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})$).*
    | ((?:[0-9a-fA-F]{24}|[0-9a-fA-F]{32}):(?:[0-9a-fA-F]{32}:[0-9a-fA-F]*|[0-9a-fA-F]*:[0-9a-fA-F]{32})$|(?:[A-Za-z0-9+/]{16}|[A-Za-z0-9+/]{22}==):(?:[A-Za-z0-9+/]{22}==:[A-Za-z0-9+/]*=*|[A-Za-z0-9+/]*=*:[A-Za-z0-9+/]{22}==)$).*
    | ([0-9a-fA-F]{32}:(?:[0-9a-fA-F]{32})+(?:[0-9a-fA-F]{31})?$).*  # 31: cut off at 1,024
    | ([0-9a-f]{96}(?:[0-9a-f]*[A-Zg-z+/][A-Za-z0-9+/]*)={0,2}$).*
    | (\{.*"\$binary".*"subType":\ *"0?6").*
    | (\{"v":1,"alg":"AES-256-GCM","ring":").*
    | (\{.*"(?:iv|nonce|salt|cipher|alg|algorithm|enc)":\ *".*"(?:ct|ciphertext|cipher_text|cipherText|encrypted_data|encryptedData|encrypted|content|data|tag|auth_tag|authTag)":\ *"[A-Za-z0-9+/_=-]{8}|\{.*"(?:c|ct|ciphertext|cipher_text|cipherText|encrypted_data|encryptedData|encrypted|content|data|tag|auth_tag|authTag)":\ *"[A-Za-z0-9+/_=-]{8}.*"(?:iv|nonce|cipher|salt)":\ *"|\{.*"k":\ *"ct").*
    | ([[<_$:{(]*(?:enc|ENC|encrypted|ENCRYPTED|crypt|cipher|CIPHER|ciphertext|aes|AES|aead|sealed|secretbox|sodium|libsodium|nacl|x?chacha20|gcm|kms|KMS|awskms|gcpkms|fernet|transit|pgp|gpg|tink|jwe|bao)(?:[0-9_/-][0-9A-Za-z_/-]*)?[]>}():;|$.,!]+(?:v?\d+[:.|$])?[A-Za-z0-9+/_=-]{16}|\{(?:des|3des|3DES|xor|wsenc)\}.{8}).*
    | (v\d+[:|$][A-Za-z0-9+/_=-]{16}).*)$re$);
begin
  return case when v_groups is not null then v_names[rekey._first_place(v_groups)] end;
end
$$;
comment on function rekey._text_mark is 'The mark that a text begins with, by name; NULL: none. start: its first characters, where other bytes stand as the encoding escape writes them.';

create or replace function rekey._byte_mark(start text) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names constant text[] := '{
    envelope, pgp_sym, openpgp, fernet, aws_kms, aws_encryption, gcp_kms, dataprotection, dpapi, cloak, themis, acra,
    git_crypt, sealed_object, cms, nss, safe_storage, luks}'::text[];
  v_groups text[] := regexp_match(start, $re$(?x)^(?:
      (524b01).*
    | ((?:c3|8c)(?:0[4-9a-f]|[1-3].)04..0[013]).*
    | ((?:c3|8c)(?:0[4-9a-f]|[1-6].)(?:05|06..)0[1-9a-d]0[123]|(?:84|c1)..(?:0[36].{16}(?:01|1[0289])|062106|061504)|85....03.{16}(?:01|1[0289])|c1c...03.{16}(?:01|1[0289])).*
    | (8000000000[4-9a-f]).*
    | (010[12]020078).*
    | (01800[0-3](?:14|46|78)|020[45]78).*
    | (0a2400.{70}12).*
    | (09f0c9f0).*
    | (01000000d08c9ddf).*
    | (01..4145532e).*
    | (00010140).*
    | (2222222222222222|252525).*
    | (00474954435259505400).*
    | (aced00057372....6a617661782e63727970746f2e5365616c6564).*
    | (30(?:80|8[1-4](?:..){1,4}|..)06092a864886f70d01(?:070[36]|091001(?:17|09))).*
    | (30..0410f800000000000000).*
    | (76313[01][89a-f]).*
    | (4c554b53babe).*)$re$);
begin
  return case when v_groups is not null then v_names[rekey._first_place(v_groups)] end;
end
$$;
comment on function rekey._byte_mark is 'The mark that bytes begin with, by name; NULL: none. start: the first ones, in hexadecimal.';

-- Patterns cost more than the rest of an adoption. So most values are passed by, by their first bytes and by where separators
-- stand. These three are inlined.
create or replace function rekey._may_begin(start bytea) returns boolean
language sql immutable parallel safe
return encode(substr(start, 1, 1), 'hex') in ('c3', '8c', '84', 'c1', '85', '80', '01', '02', '0a', '09', '00', 'ac')
  or encode(substr(start, 1, 3), 'hex') ~~ any ('{524b01,308%,30__04,222222,252525,763130,763131,4c554b}')
  or left(ltrim(encode(substr(start, 1, 8), 'escape'), '[<_$:{('), 3) in (
    'rk1', 'gAA', 'Sal', 'vau', 'age', 'ANS', 'ENC', 'EJ[', 'k8s', 'Fe2', 'nac', 'fip', 'brn', 'MUI', 'QTE', 'QTI', 'WEN', '*YW', 'AQA', 'BEG',
    'ba$', 'enc', 'cry', 'cip', 'CIP', 'aes', 'AES', 'aea', 'sea', 'sod', 'lib', 'xch', 'cha', 'gcm', 'kms', 'KMS', 'aws', 'gcp', 'fer', 'tra',
    'pgp', 'gpg', 'tin', 'jwe', 'bao', 'xor', 'wse', 'des', '3de', '3DE')
  or left(encode(substr(start, 1, 9), 'escape'), 9) = 'secretbox'
  or encode(substr(start, 1, 2), 'hex') between '7630' and '7639';
comment on function rekey._may_begin is 'Whether a value may have a mark, as far as its first bytes tell.';

create or replace function rekey._may_be_marked(value bytea) returns boolean
language sql immutable parallel safe
return rekey._may_begin(value) or case encode(substr(value, 1, 1), 'escape')
  when '{' then strpos(encode(substr(value, 1, 1024), 'escape'), '"iv"') > 0
    or encode(substr(value, 1, 1024), 'escape') ~ '"(p|k|nonce|ct|c|ciphertext|cipher|salt|tag|subType|encrypted[_A-Za-z]*)":'
  when '-' then position('\x454e43525950544544' in substr(value, 1, 60)) > 0 or position('\x4d455353414745' in substr(value, 1, 60)) > 0
    or position('\x424547494e20434d53' in substr(value, 1, 60)) > 0
  when '#' then position('\x2a5957567a4c' in substr(value, 1, 120)) > 0
  else position('\x3a' in substr(value, 1, 40)) in (2, 17, 25, 33) or position('\x7c' in substr(value, 1, 99)) > 32
    or position('\x2d2d' in value) > 1 or position('\x2e76' in value) > 1
    or octet_length(value) > 90 and substr(value, octet_length(value) - 43, 1) = '\x2e'
    or octet_length(value) >= 118 and substr(value, 5, 1) between '\x30' and '\x66' and position('\x20' in substr(value, 1, 96)) = 0
    or substr(value, 1, 1) = '\x65' and (strpos(encode(substr(value, 1, 1024), 'escape'), '..') > 0
      or split_part(encode(substr(value, 1, 1024), 'escape'), '.', 4) <> '')
  end;
comment on function rekey._may_be_marked is 'Whether a value may have a mark, as far as its first bytes tell, and where separators stand.';

create or replace function rekey._may_be_wrapped(value bytea) returns boolean
language sql immutable parallel safe
return substr(value, 1, 1) in ('\x00', '\x09', '\x0a', '\x0d', '\x20', '\x22', '\x27') or substr(value, octet_length(value), 1) in ('\x00', '\x09', '\x0a', '\x0d', '\x20')
  or substr(value, 1, 2) in ('\x6227', '\x6222', '\x5c78', '\x3078')
  or case when octet_length(value) >= 16 and encode(substr(value, 1, 8), 'escape') ~ '^[A-Za-z0-9+/_-]{8}$'
    -- (In base64 no mark begins with eight such digits.)
    then case when encode(substr(value, 1, 8), 'escape') ~ '^([0-9a-f]{8}|[0-9A-F]{8})$'
      then rekey._may_begin(decode(encode(substr(value, 1, 8), 'escape'), 'hex'))
      else rekey._may_begin(decode(translate(encode(substr(value, 1, 8), 'escape'), '-_', '+/'), 'base64'))
        or substr(value, 1, 2) = '\x6579' and position('\x2e' in substr(value, 1, 1024)) = 0 end
    end;
comment on function rekey._may_be_wrapped is 'Whether something that has a mark may stand within a value, under what rekey._unwrapped() takes off.';

create or replace function rekey._legacy_mark(value bytea) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mark text;
begin
  if rekey._may_be_marked(value) then
    v_mark := coalesce(rekey._byte_mark(encode(substr(value, 1, 64), 'hex')), rekey._text_mark(encode(substr(value, 1, 1024), 'escape')),
      -- The tag comes last, behind what is looked at.
      case when octet_length(value) > 1024 and encode(substr(value, 1, 1024), 'escape')
        ~ '^(?:[0-9a-fA-F]{24}:[0-9a-fA-F]+|(?:[A-Za-z0-9+/]{16}|[A-Za-z0-9+/]{22}==):[A-Za-z0-9+/]+)$' then 'iv_tag' end);
  end if;
  -- Packets and raw tokens are told by little: so they have a length that they can have.
  return case
    when v_mark in ('pgp_sym', 'openpgp') and octet_length(value) <= 20 then null
    when v_mark = 'fernet' and substr(value, 1, 1) = '\x80' and (octet_length(value) < 73 or octet_length(value) % 16 <> 9) then null
    else v_mark end;
end
$$;
comment on function rekey._legacy_mark is 'Whose mark a value begins with, by name: envelope, the formats that open, and those that are known to be refused. NULL: none.';

create or replace function rekey._decoded(value text) returns bytea
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_digits text := regexp_replace(value, '^(\\\\x|0x)', '');
begin
  if length(v_digits) % 2 = 0 and v_digits ~ '^[0-9a-fA-F]+$' then
    return decode(v_digits, 'hex');
  end if;
  v_digits := rtrim(translate(value, E'-_ \r\n\t', '+/'), '=');
  -- Bits that no byte takes are 0 at the end: texts of the same alphabet seldom are base64.
  if v_digits ~ '^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048])?$' then
    return decode(rpad(v_digits, (length(v_digits) + 3) / 4 * 4, '='), 'base64');
  end if;
  return null;
end
$$;
comment on function rekey._decoded is 'The bytes of a text (of the encoding escape) that is hexadecimal (with \x or 0x before it, or without) or base64 (of both alphabets, with or without padding and line breaks); NULL: it is neither.';

create or replace function rekey._unwrapped(value bytea) returns bytea
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_bare bytea := btrim(value, '\x00090a0d20');
  v_first bytea := substr(v_bare, 1, 1);
begin
  -- "...", '...', and b'...', Python's str() of bytes.
  if v_first = '\x62' and substr(v_bare, 2, 1) in ('\x22', '\x27') then
    v_bare := substr(v_bare, 2);
    v_first := substr(v_bare, 1, 1);
  end if;
  if v_first in ('\x22', '\x27') and octet_length(v_bare) > 2 and substr(v_bare, octet_length(v_bare)) = v_first then
    v_bare := substr(v_bare, 2, octet_length(v_bare) - 2);
  end if;
  return case
    when v_bare <> value then v_bare
    when encode(substr(value, 1, 24), 'escape') ~ '^(\\\\x)?[A-Za-z0-9+/_-]{16}' then rekey._decoded(encode(value, 'escape')) end;
end
$$;
comment on function rekey._unwrapped is 'A value without the outermost layer around it: white space, quotes, hexadecimal, base64. NULL: there is none.';

create or replace function rekey._marked_inside(value bytea) returns bytea
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_inner bytea := value;
begin
  for v_layer in 1 .. 4 loop
    v_inner := rekey._unwrapped(v_inner);
    exit when v_inner is null or rekey._legacy_mark(v_inner) is not null;
  end loop;
  return case when rekey._legacy_mark(v_inner) is not null then v_inner end;
end
$$;
comment on function rekey._marked_inside is 'What stands in a value under at most four layers of white space, quotes, hexadecimal and base64, where it has a mark; else NULL.';

-- Executable by those who search, with their own rights: rekey.find_envelopes().
create or replace function rekey._mark_within(value bytea) returns text
language plpgsql immutable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mark text := rekey._legacy_mark(value);
begin
  if v_mark is null and rekey._may_be_wrapped(value) then
    v_mark := rekey._legacy_mark(rekey._marked_inside(value));
  end if;
  return v_mark;
end
$$;
comment on function rekey._mark_within is 'Whose mark stands in a value, also under layers as of rekey._marked_inside(), by name; NULL: none.';
grant execute on function rekey._mark_within to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._opaque_bytes(value bytea) returns bytea
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- UTF-8 without control characters, but for a character that is cut off at the end.
  v_is_text constant text := '^(0[9ad]|[2-6].|7[0-9a-e]|(c[2-9a-f]|d.)[89ab].|e.([89ab].){2}|f[0-4]([89ab].){3})*([c-f].([89ab].){0,2})?$';
  v_text text;
  v_bytes bytea := value;
  v_part text;
  v_decoded bytea;
begin
  if encode(substr(value, 1, 64), 'hex') ~ v_is_text then
    v_text := encode(value, 'escape');
    -- One part or several; hexadecimal, or letters of both kinds and something else.
    if v_text !~ '^(\\\\x)?[A-Za-z0-9+/_-]{8,}={0,2}([.:|,][A-Za-z0-9+/_-]{8,}={0,2}){0,4}\s*$'
      or not (v_text ~ '^(\\\\x|0x)?[0-9a-fA-F.:|,\s]+$' or v_text ~ '[a-z]' and v_text ~ '[A-Z]' and v_text ~ '[0-9+/_=-]') then
      return null;
    end if;
    v_bytes := '';
    foreach v_part in array regexp_split_to_array(rtrim(v_text, E'\r\n\t '), '[.:|,]') loop
      v_decoded := rekey._decoded(v_part);
      if v_decoded is null or v_part ~ '^[0-9]+$' then
        return null;
      end if;
      v_bytes := v_bytes || v_decoded;
    end loop;
  end if;
  -- With words in it, or what keys and files begin with: DER, OpenSSH, PNG, JPEG, gzip, zip, a Java key store.
  return case
    when octet_length(v_bytes) < 16 or encode(substr(v_bytes, 1, 64), 'hex') ~ v_is_text
      or encode(substr(v_bytes, 1, 64), 'escape') ~ '[A-Za-z]{6}' or encode(substr(v_bytes, 1, 8), 'hex') ~ '^(308[1-3]|30[2-7].02|0000000[7b]|89504e47|ffd8ff|1f8b08|504b0304|feedfeed)' then null
    else v_bytes end;
end
$$;
comment on function rekey._opaque_bytes is 'The bytes of a value that may be ciphertext: 16 or more, without words, as they are or in hexadecimal or base64, in up to five parts. NULL: the value is something else.';

create or replace function rekey._adoption_sample(label text) returns bytea[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_blocks bigint;
  v_batch record;
  v_values bytea[] := '{}'::bytea[];
begin
  for v_target in select t.* from rekey._targets(label) t order by t.relation limit 32 loop
    v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
    for v_place in 0 .. 7 loop
      exit when cardinality(v_values) >= 1000;
      begin
        select b.* into v_batch from rekey._call_read(
          v_target.function_name, v_target.relation, format('(%s,0)', v_blocks * v_place / 8)::tid,
          format('(%s,0)', least(v_blocks * (v_place + 1) / 8, v_blocks * v_place / 8 + 256))::tid, null, null, 125, 2097152) b;
        v_values := v_values || v_batch.ciphertexts;
        raise exception using errcode = 'RKEND';
      exception when sqlstate 'RKEND' then null;  -- gives the locks of the rows back
      end;
    end loop;
  end loop;
  return v_values;
end
$$;
comment on function rekey._adoption_sample is 'Up to 1,000 values of a protected column that are no envelopes, from places all over its table.';

create or replace function rekey._same_heads(heads bytea[]) returns integer
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_head bytea;
  v_most bytea;
  v_votes integer := 0;
  v_count integer := 0;
begin
  -- What more than half of them have in common is left at the end of this.
  foreach v_head in array heads loop
    if v_votes = 0 then
      v_most := v_head;
    end if;
    v_votes := v_votes + case when v_head = v_most then 1 else -1 end;
  end loop;
  foreach v_head in array heads loop
    v_count := v_count + case when v_head = v_most then 1 else 0 end;
  end loop;
  return v_count;
end
$$;
comment on function rekey._same_heads is 'How many of these are equal, where they are more than half.';

create or replace function rekey._shape_doubt("values" bytea[]) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_value bytea;
  v_bytes bytea;
  v_heads bytea[] := '{}'::bytea[];
  v_lengths integer[] := '{}'::integer[];
  v_distinct integer[];
  v_reason text;
begin
  foreach v_value in array "values" loop
    v_bytes := rekey._opaque_bytes(v_value);
    if v_bytes is not null then
      v_lengths := v_lengths || octet_length(v_bytes);
      -- The prefix of a token (sk_live_) is no header, and what has 16 bytes has no room for one.
      if octet_length(v_bytes) > 16 and encode(substr(v_value, 1, 6), 'escape') !~ '[_-]' then
        v_heads := v_heads || substr(v_bytes, 1, 4);
      end if;
    end if;
  end loop;
  if cardinality(v_lengths) = 0 or cardinality(v_lengths) < 0.9 * cardinality("values") then
    return null;
  end if;
  select array_agg(distinct l.length order by l.length) into v_distinct from unnest(v_lengths) as l(length);
  v_reason := case
    when rekey._same_heads(v_heads) >= greatest(2, 0.9 * cardinality(v_lengths)) then 'blocked: they begin with the same header'
    -- (Keys and tokens of several lengths have these.)
    when cardinality(v_distinct) > 1 and not v_distinct <@ '{16,20,24,32,40,64,128,256}'
      and (select count(distinct d.length % case when cardinality(v_distinct) = 2 then 16 else 8 end) from unnest(v_distinct) as d(length)) = 1 then 'blocked: their lengths go by the blocks of a cipher'
    when cardinality(v_distinct) = 1 then 'asked: they all have one length, as tokens and keys have'
    else 'asked: their lengths differ, as those of texts do' end;
  return format('%s: looks encrypted: %s of %s values are base64, hexadecimal or bytes without words, and %s', split_part(v_reason, ': ', 1),
    cardinality(v_lengths), cardinality("values"), split_part(v_reason, ': ', 2));
end
$$;
comment on function rekey._shape_doubt is 'Why values without a mark may be ciphertext all the same, over all of them: "blocked: ..." or, where they may as well be tokens, "asked: ...". NULL: there is no reason.';

create or replace function rekey._adoption_doubt(label text, formats text[], values_are_tokens boolean) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_takes text[] := rekey._marks_of(formats);
  v_value bytea;
  v_inner bytea;
  v_mark text;
  v_marks text[] := '{}'::text[];
  v_unmarked bytea[] := '{}'::bytea[];
  v_looked_at integer := 0;
  v_doubt text;
begin
  if not 'plaintext' = any (formats) then
    return null;
  end if;
  foreach v_value in array rekey._adoption_sample(label) loop
    continue when coalesce(octet_length(v_value), 0) = 0;
    v_looked_at := v_looked_at + 1;
    v_mark := rekey._legacy_mark(v_value);
    if v_mark is null then
      v_inner := rekey._marked_inside(v_value);
      v_mark := rekey._legacy_mark(v_inner);
    end if;
    if v_mark is null then
      v_unmarked := v_unmarked || v_value;
    elsif v_mark <> 'envelope' and not v_mark = any (v_takes) then
      v_marks := v_marks || v_mark;
    end if;
  end loop;
  if cardinality(v_marks) > 0.9 * v_looked_at then
    select format('blocked: looks encrypted: %s of %s values look like %s', cardinality(v_marks), v_looked_at, string_agg(distinct m.mark, ', '))
    into v_doubt from unnest(v_marks) as m(mark);
  -- Where a key is at hand that may open them, each is tried.
  elsif not 'unmarked' = any (v_takes) then
    v_doubt := rekey._shape_doubt(v_unmarked);
  end if;
  return case when v_doubt not like 'asked:%' or not coalesce(values_are_tokens, false) then v_doubt end;
end
$$;
comment on function rekey._adoption_doubt is 'Why the values of a protected column may not be the plaintext that they are to be taken for, as a sample tells: see rekey._shape_doubt(). NULL: there is no reason.';

create or replace function rekey._refuse_doubt(label text, formats text[], values_are_tokens boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_doubt text := rekey._adoption_doubt(label, formats, values_are_tokens);
  v_reason text := regexp_replace(v_doubt, '^\w+: ', '');
begin
  if v_doubt like 'asked:%' then
    raise exception 'column % %', label, v_reason using errcode = 'RK005',
      hint = 'If they are plain tokens or keys: values_are_tokens => true. If another tool encrypted them: name its format in formats.', constraint = 'values_are_tokens';
  elsif v_doubt is not null then
    raise exception 'column % %', label, v_reason using errcode = 'RK005',
      hint = 'Name the format in formats, and adopt with pg-rekey columns adopt, which has its keys. To encrypt the values as they are: force => true.', constraint = 'looks_encrypted';
  end if;
end
$$;
comment on function rekey._refuse_doubt is 'RK005 where the values of a protected column look encrypted by another tool, and are to be taken for plaintext.';
