-- What the benchmark needs in its database: values, the tables of the competitors, and their fillers.
-- Every table has the fillfactor and the storage of rekey.secrets, so that the ways differ and not the tables.

create schema bench;

create function bench.value(n integer, size integer) returns text
language sql immutable parallel safe
return repeat(md5(n::text), size / 32);
comment on function bench.value is 'The nth plain value: hexadecimal text, size bytes, a multiple of 32.';

-- rekey.secrets, filled at once: rekey.set_secret() takes one value.

create function bench.fill_secrets(keyrings text[], first integer, last integer, size integer) returns void
language sql
begin atomic
  with wanted as materialized (
    select u.place - 1 as place, a.keyring_id, a.version
    from unnest(keyrings) with ordinality as u(name, place)
    join rekey.keyrings k on k.name = u.name
    join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
  ), opened as materialized (
    select w.place, d.keyring_id, d.key, rekey._header(d.keyring_id, d.version) as header
    from wanted w
    join rekey._deks(array(select v.keyring_id from wanted v order by v.place), array(select v.version from wanted v order by v.place)) d
      on d.keyring_id = w.keyring_id
  )
  insert into rekey.secrets (id, name, keyring_id, ciphertext)
  select s.id, s.name, s.keyring_id, s.header || s.iv || rekey._aead_encrypt(s.key, s.iv, s.plaintext, s.aad)
  from (
    select m.id, m.name, m.iv, m.plaintext, o.keyring_id, o.key, o.header,
      o.header || rekey._secret_context('00000000-0000-0000-0000-000000000000', m.id) as aad
    from (
      select gen_random_uuid() as id, 'secret-' || n as name, n % cardinality(keyrings) as place,
        rekey._random_bytes(16) as iv, convert_to(bench.value(n, size), 'UTF8') as plaintext
      from generate_series(first, last) as n
      offset 0
    ) m
    join opened o on o.place = m.place
    offset 0
  ) s;
end;
comment on function bench.fill_secrets is 'Stores the values first to last as secrets, dealt out to the keyrings in turn.';

-- The floor: the same bytes in the same table, without any cryptography.

create table bench.floor (like rekey.secrets including all) with (fillfactor = 50);

create function bench.fill_floor() returns void
language sql
begin atomic
  insert into bench.floor (tenant_id, id, name, keyring_id, ciphertext)
  select s.tenant_id, s.id, s.name, s.keyring_id, s.ciphertext from rekey.secrets s;
end;
comment on function bench.fill_floor is 'Copies rekey.secrets.';

create function bench.update_floor(first_block bigint, until_block bigint) returns void
language sql
begin atomic
  -- A value out of line would be kept as it is: appending nothing has it read and written as the others are.
  update bench.floor t set ciphertext = q.ciphertext || ''::bytea
  from (
    select f.ctid, f.ciphertext from bench.floor f
    where f.ctid >= format('(%s,0)', first_block)::tid and f.ctid < format('(%s,0)', until_block)::tid
    for no key update skip locked) q
  where t.ctid = q.ctid
    and t.ctid >= format('(%s,0)', first_block)::tid and t.ctid < format('(%s,0)', until_block)::tid;
end;
comment on function bench.update_floor is 'Writes the rows of some blocks anew, as they are.';

create procedure bench.update_at_pace(rate integer, seconds double precision)
language plpgsql
as $$
declare
  v_last bigint := pg_relation_size('rekey.secrets') / current_setting('block_size')::integer;
  v_first bigint := 0;
  v_rows bigint;
  v_begin timestamptz;
  v_until timestamptz := clock_timestamp() + seconds * interval '1 s';
begin
  while clock_timestamp() < v_until loop
    v_begin := clock_timestamp();
    with batch as materialized (
      select s.ctid, s.ciphertext from rekey.secrets s
      where s.ctid >= format('(%s,0)', v_first)::tid and s.ctid < format('(%s,0)', v_last)::tid
      order by s.ctid limit greatest(rate / 20, 1) for no key update skip locked
    ), written as (
      update rekey.secrets s set ciphertext = b.ciphertext || ''::bytea from batch b where s.ctid = b.ctid returning b.ctid
    )
    select count(*), coalesce(max(rekey._block(w.ctid)) + 1, 0) into v_rows, v_first from written w;
    commit;
    perform pg_sleep(greatest(v_rows::double precision / rate - extract(epoch from clock_timestamp() - v_begin), 0));
  end loop;
end
$$;
comment on procedure bench.update_at_pace is 'Writes secrets anew, as they are, as many a second, in batches of a twentieth of that.';

-- The application with a Fernet key, filled from Python.

create table bench.application (id integer primary key, token text not null) with (fillfactor = 50);
alter table bench.application alter column token set storage external;
create table bench.transit (id integer primary key, token text not null) with (fillfactor = 50);
alter table bench.transit alter column token set storage external;

-- A stand-in for the Supabase Vault, whose extension is in C: its table, view and function of version 0.3, with one
-- AEAD open for each row read and one AEAD seal for each row written. (Vault's update_secret also opens the old value.)

create table bench.vault_key (key bytea not null);
insert into bench.vault_key values (sha512('a stand-in'));
analyze bench.vault_key;

create table bench.vault (
  id uuid primary key default gen_random_uuid(),
  name text unique,
  secret bytea not null,
  nonce bytea not null,
  updated_at timestamptz not null default now()
) with (fillfactor = 50);
alter table bench.vault alter column secret set storage external;

create view bench.decrypted_secrets as
select s.id, s.name, convert_from(rekey._aead_decrypt(k.key, s.nonce, s.secret, uuid_send(s.id)), 'UTF8') as decrypted_secret
from bench.vault s
cross join bench.vault_key k;

create function bench.update_secret(secret_id uuid, new_secret text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  update bench.vault s
  set secret = rekey._aead_encrypt(k.key, s.nonce, convert_to(new_secret, 'UTF8'), uuid_send(s.id)), updated_at = now()
  from bench.vault_key k
  where s.id = secret_id;
end
$$;

create function bench.fill_vault(last integer, size integer) returns void
language sql
begin atomic
  insert into bench.vault (id, name, secret, nonce)
  select s.id, s.name, rekey._aead_encrypt(s.key, s.nonce, s.plaintext, uuid_send(s.id)), s.nonce
  from (
    select gen_random_uuid() as id, 'secret-' || n as name, rekey._random_bytes(16) as nonce, k.key,
      convert_to(bench.value(n, size), 'UTF8') as plaintext
    from generate_series(1, last) as n
    cross join bench.vault_key k
    offset 0
  ) s;
end;

-- pgcrypto's pgp_sym_encrypt, as it is by default, and with the fastest options.

create table bench.pgp_default (id integer primary key, v bytea not null) with (fillfactor = 50);
create table bench.pgp_fast (like bench.pgp_default including all) with (fillfactor = 50);
alter table bench.pgp_default alter column v set storage external;
alter table bench.pgp_fast alter column v set storage external;
