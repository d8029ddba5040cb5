-- Format 1 (docs/format.md): 52 4B 01 | keyring, int4 | version, int4 | IV, 16 bytes | ciphertext | tag, 32 bytes.

create or replace function rekey._part(part text) returns bytea
language sql stable parallel safe
return coalesce(int4send(octet_length(convert_to(part, 'UTF8'))) || convert_to(part, 'UTF8'), '\xffffffff'::bytea);
comment on function rekey._part is 'One part of a context: its length as int4, then its UTF-8 bytes; NULL is the length -1.';

create or replace function rekey._context(parts text[]) returns bytea
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_part text;
  v_context bytea := ''::bytea;
begin
  foreach v_part in array coalesce(parts, '{}') loop
    v_context := v_context || rekey._part(v_part);
  end loop;
  return v_context;
end
$$;
comment on function rekey._context is 'A whole context: its parts one after the other.';

create or replace function rekey._header(keyring_id integer, version integer) returns bytea
language sql immutable parallel safe
return '\x524b01'::bytea || int4send(keyring_id) || int4send(version);
comment on function rekey._header is 'The first 11 bytes of an envelope.';

create or replace function rekey._int4(bytes bytea, place integer) returns integer
language sql immutable parallel safe
return (get_byte(bytes, place) << 24) | (get_byte(bytes, place + 1) << 16) | (get_byte(bytes, place + 2) << 8) | get_byte(bytes, place + 3);
comment on function rekey._int4 is 'The big-endian int4 at place (from 0).';

create or replace function rekey._is_envelope(value bytea) returns boolean
language sql immutable parallel safe
return coalesce(octet_length(value) >= 75 and octet_length(value) % 16 = 11 and substr(value, 1, 3) = '\x524b01'::bytea, false);
comment on function rekey._is_envelope is 'Whether value has the shape of an envelope. Says nothing of its tag.';

create or replace function rekey._from_text(value text) returns bytea
language sql immutable parallel safe
return case
  -- Of the last symbol before =, only the bits that stand for something may be set.
  when value ~ '^rk1:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$'
  then decode(right(value, -4), 'base64') end;
comment on function rekey._from_text is 'Envelope of its text form, rk1: and base64 without line breaks; NULL for any other text.';

create or replace function rekey._to_text(envelope bytea) returns text
language sql immutable parallel safe
return 'rk1:' || replace(encode(envelope, 'base64'), E'\n', '');
comment on function rekey._to_text is 'The text form of an envelope.';
