-- What a database of a Supabase project has before its owner does anything, made by supabase_admin. Schemas and grants
-- after supabase/postgres (initial-schema, auth-schema, the after-create scripts of supabase_vault and pg_cron).
create schema extensions;
create extension pgcrypto schema extensions;
grant usage on schema extensions to postgres, anon, authenticated, service_role;
grant all on schema extensions to postgres;
grant all on schema public to postgres;
grant usage on schema public to anon, authenticated, service_role;
alter default privileges for role postgres in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges for role postgres in schema public grant all on functions to anon, authenticated, service_role;
alter default privileges for role postgres in schema public grant all on sequences to anon, authenticated, service_role;

create schema auth authorization supabase_auth_admin;
grant usage on schema auth to postgres, anon, authenticated, service_role;
create table auth.users (
  id uuid primary key,
  email text,
  raw_app_meta_data jsonb,
  raw_user_meta_data jsonb
);
alter table auth.users owner to supabase_auth_admin;
grant all on auth.users to postgres;
create function auth.jwt() returns jsonb language sql stable
  return nullif(current_setting('request.jwt.claims', true), '')::jsonb;
create function auth.uid() returns uuid language sql stable
  return (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid;
create function auth.role() returns text language sql stable
  return nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role';

-- The Vault of supabase_vault 0.3: same table, view, functions, who may what, and the plain value that create_secret
-- writes before the encrypted one. A stand-in for libsodium: pgcrypto, under a key that stands here.
create schema vault;
create function vault._crypto_aead_det_encrypt(message bytea, additional bytea, key_id bigint, context bytea = 'pgsodium', nonce bytea = null)
  returns bytea language sql immutable
  return extensions.encrypt_iv(message, sha256('stand-in'), substr(sha256(additional || nonce), 1, 16), 'aes');
create function vault._crypto_aead_det_decrypt(message bytea, additional bytea, key_id bigint, context bytea = 'pgsodium', nonce bytea = null)
  returns bytea language sql immutable
  return extensions.decrypt_iv(message, sha256('stand-in'), substr(sha256(additional || nonce), 1, 16), 'aes');
create table vault.secrets (
  id uuid primary key default gen_random_uuid(),
  name text,
  description text not null default '',
  secret text not null,
  key_id uuid,
  nonce bytea default extensions.gen_random_bytes(16),
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create unique index on vault.secrets (name) where name is not null;
create view vault.decrypted_secrets as
select s.id, s.name, s.description, s.secret,
  convert_from(vault._crypto_aead_det_decrypt(decode(s.secret, 'base64'), convert_to(s.id::text, 'utf8'), 0, 'pgsodium', s.nonce), 'utf8')
    as decrypted_secret,
  s.key_id, s.nonce, s.created_at, s.updated_at
from vault.secrets s;
create function vault.create_secret(new_secret text, new_name text = null, new_description text = '', new_key_id uuid = null)
returns uuid language plpgsql security definer set search_path = '' as $$
declare
  rec record;
begin
  insert into vault.secrets (secret, name, description) values (new_secret, new_name, new_description) returning * into rec;
  update vault.secrets s
  set secret = encode(vault._crypto_aead_det_encrypt(
    convert_to(rec.secret, 'utf8'), convert_to(s.id::text, 'utf8'), 0, 'pgsodium', rec.nonce), 'base64')
  where id = rec.id;
  return rec.id;
end
$$;
create function vault.update_secret(
  secret_id uuid, new_secret text = null, new_name text = null, new_description text = null, new_key_id uuid = null)
returns void language plpgsql security definer set search_path = '' as $$
declare
  decrypted_secret text := (select v.decrypted_secret from vault.decrypted_secrets v where v.id = secret_id);
begin
  update vault.secrets s
  set secret = case when new_secret is null then s.secret else encode(vault._crypto_aead_det_encrypt(
        convert_to(new_secret, 'utf8'), convert_to(s.id::text, 'utf8'), 0, 'pgsodium', s.nonce), 'base64') end,
      name = coalesce(new_name, s.name), description = coalesce(new_description, s.description), updated_at = now()
  where s.id = secret_id;
end
$$;
revoke all on all routines in schema vault from public;
grant usage on schema vault to postgres with grant option;
grant select, delete on vault.secrets, vault.decrypted_secrets to postgres with grant option;
grant execute on function vault.create_secret, vault.update_secret, vault._crypto_aead_det_decrypt to postgres with grant option;
grant usage on schema vault to service_role;
grant select, delete on vault.secrets, vault.decrypted_secrets to service_role;
grant execute on function vault.create_secret, vault.update_secret, vault._crypto_aead_det_decrypt to service_role;

-- In the one database of the server that pg_cron lives in.
do $$
begin
  if current_setting('cron.database_name', true) = current_database() then
    create extension pg_cron schema pg_catalog;
    grant usage on schema cron to postgres with grant option;
    grant all on all functions in schema cron to postgres with grant option;
    grant all on all tables in schema cron to postgres with grant option;
    revoke all on table cron.job from postgres;
    grant select on table cron.job to postgres with grant option;
  end if;
end
$$;
