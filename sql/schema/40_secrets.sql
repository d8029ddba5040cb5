create table rekey.secrets (
  tenant_id uuid not null default '00000000-0000-0000-0000-000000000000',
  id uuid not null default gen_random_uuid(),
  name text not null constraint secrets_name_check check (octet_length(name) between 1 and 255 and name !~ '[\u0001-\u001F\u007F]'),
  keyring_id integer not null constraint secrets_keyring_fkey references rekey.keyrings,
  ciphertext bytea not null,
  key_version integer not null generated always as (
    (get_byte(ciphertext, 7) << 24) | (get_byte(ciphertext, 8) << 16) | (get_byte(ciphertext, 9) << 8) | get_byte(ciphertext, 10)
  ) stored,
  description text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint secrets_pkey primary key (tenant_id, id),
  constraint secrets_tenant_name_key unique (tenant_id, name),
  constraint secrets_ciphertext_check check (
    octet_length(ciphertext) >= 75
    and substr(ciphertext, 1, 7) = '\x524b01'::bytea || int4send(keyring_id))
) with (fillfactor = 50);
create index secrets_keyring_id on rekey.secrets (keyring_id);
-- Ciphertext does not compress: trying to costs time and gains nothing.
alter table rekey.secrets alter column ciphertext set storage external;
alter table rekey.secrets enable row level security;
comment on table rekey.secrets is 'Secrets, encrypted. Write with rekey.set_secret(), read with rekey.get_secret(). Half of each page is left free, so that a rotation updates in place.';
comment on column rekey.secrets.tenant_id is 'Tenant; the nil UUID where there is only one.';
comment on column rekey.secrets.id is 'Identity of the secret within the tenant; part of what its ciphertext is bound to.';
comment on column rekey.secrets.name is 'Name, unique within the tenant, 1 to 255 bytes without control characters.';
comment on column rekey.secrets.keyring_id is 'Keyring it is encrypted with.';
comment on column rekey.secrets.ciphertext is 'Envelope of format 1 (docs/format.md), bound to (secret, tenant_id, id).';
comment on column rekey.secrets.key_version is 'Key version, read from the envelope.';
comment on column rekey.secrets.description is 'Free text, not encrypted.';
comment on column rekey.secrets.created_at is 'When the secret was made.';
comment on column rekey.secrets.updated_at is 'When its value last changed; a rotation leaves it.';
