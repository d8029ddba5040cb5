\echo Use "CREATE EXTENSION pg_rekey" to load this file. \quit
-- pg_rekey 0.1.0, assembled by `make sql`: edit the sources in sql/, not this file.

-- sql/header.sql
-- pg_rekey 0.1.0: key rotation and online re-encryption on pgcrypto and pg_cron.
-- The whole script runs in one transaction.
set local search_path = pg_catalog, pg_temp;

do $$
begin
  if current_setting('server_version_num')::int < 150000 then
    raise exception 'pg_rekey needs PostgreSQL 15 or later, this is %', current_setting('server_version')
      using errcode = 'feature_not_supported';
  end if;
  if not exists (select from pg_catalog.pg_extension where extname = 'pgcrypto') then
    raise exception 'pg_rekey needs the extension pgcrypto'
      using errcode = 'undefined_object', hint = 'Run CREATE EXTENSION pgcrypto first.';
  end if;
end
$$;

-- sql/schema/10_roles.sql
-- Roles belong to the whole cluster: a second database uses the ones that are there, if they are what they should be.
do $$
declare
  v_role record;
  v_found pg_roles;
  v_member name;
  v_super boolean := (select rolsuper from pg_roles where rolname = current_user);
begin
  for v_role in
    select r.name, r.login, r.owns
    from (values ('rekey_owner', false, true), ('rekey_sweeper', false, true),
                 ('rekey_admin', false, false), ('rekey_operator', false, false),
                 ('rekey_auditor', false, false), ('rekey_app', false, false),
                 ('rekey_worker', true, false)) as r(name, login, owns)
    where v_super or r.name <> 'rekey_worker'
  loop
    select * into v_found from pg_roles where rolname = v_role.name;
    if not found then
      execute format('create role %I %s', v_role.name, case when v_role.login then 'login' else 'nologin' end);
    elsif v_found.rolsuper or v_found.rolcreaterole or v_found.rolcreatedb or v_found.rolreplication
          or v_found.rolbypassrls or v_found.rolcanlogin <> v_role.login then
      raise exception 'role % exists and is not what pg_rekey needs', v_role.name
        using errcode = 'invalid_role_specification',
              hint = format('It must be %s, and neither SUPERUSER, CREATEROLE, CREATEDB, REPLICATION nor BYPASSRLS.',
                            case when v_role.login then 'LOGIN' else 'NOLOGIN' end);
    end if;
    if v_role.owns then
      select m.member::regrole::name into v_member
      from pg_auth_members m
      where m.roleid = v_role.name::regrole and m.member <> current_user::regrole
      limit 1;
      if found then
        raise exception 'role % has the member %', v_role.name, v_member
          using errcode = 'invalid_role_specification',
                hint = format('It must have none: REVOKE %I FROM %I, or install as %I.', v_role.name, v_member, v_member);
      end if;
      if exists (select from pg_auth_members m where m.member = v_role.name::regrole) then
        raise exception 'role % is a member of other roles', v_role.name
          using errcode = 'invalid_role_specification', hint = 'It must be a member of none: revoke those memberships.';
      end if;
    end if;
    if not v_super then
      -- From PostgreSQL 16 on, whoever makes a role administers it, and cannot give that to himself.
      execute format('grant %I to current_user%s', v_role.name, case when exists (
        select from pg_auth_members m
        where m.roleid = v_role.name::regrole and m.member = current_user::regrole and m.admin_option
      ) then '' else ' with admin option' end);
    end if;
  end loop;
  for v_role in
    select g.role, g.member
    from (values ('rekey_operator', 'rekey_admin'), ('rekey_auditor', 'rekey_admin'), ('rekey_operator', 'rekey_worker')) as g(role, member)
    where (v_super or g.member <> 'rekey_worker')
      and not exists (select from pg_auth_members m where m.roleid = g.role::regrole and m.member = g.member::regrole)
  loop
    execute format('grant %I to %I', v_role.role, v_role.member);
  end loop;
end
$$;

create schema rekey;
comment on schema rekey is 'pg_rekey: encryption keys, their rotation, and the secrets they protect. Objects whose name starts with _ are private.';
grant usage on schema rekey to rekey_admin, rekey_operator, rekey_auditor, rekey_app, rekey_sweeper;

create schema rekey_targets;
comment on schema rekey_targets is 'pg_rekey: for each protected table its sweep and count functions, owned by the owner of the table.';
grant usage on schema rekey_targets to rekey_sweeper;

-- sql/schema/20_settings.sql
create table rekey.settings (
  singleton boolean constraint settings_pkey primary key default true constraint settings_singleton_check check (singleton),
  kek_provider text not null default 'session'
    constraint settings_kek_provider_check check (kek_provider in ('session', 'vault', 'file')),
  kek_secret_name text not null default 'pg_rekey_kek'
    constraint settings_kek_secret_name_check check (kek_secret_name <> ''),
  -- Relative to the data directory: an absolute path would need a role that may read every file of the server.
  kek_file text not null default 'pg_rekey.kek'
    constraint settings_kek_file_check check (kek_file <> '' and kek_file !~ '^/|^[A-Za-z]:|(^|/)\.\.(/|$)'),
  destroy_wait interval not null default '45 days'
    constraint settings_destroy_wait_check check (destroy_wait between '0 s' and '3650 days'),
  destroy_search text not null default 'database'
    constraint settings_destroy_search_check check (destroy_search in ('database', 'columns')),
  batch_target interval not null default '200 ms'
    constraint settings_batch_target_check check (batch_target between '10 ms' and '60 s'),
  step_limit interval
    constraint settings_step_limit_check check (step_limit between '100 ms' and '1 day'),
  max_rows_per_second integer
    constraint settings_max_rows_per_second_check check (max_rows_per_second > 0),
  min_pace real not null default 0.25
    constraint settings_min_pace_check check (min_pace between 0.01 and 1),
  max_attempts integer not null default 8
    constraint settings_max_attempts_check check (max_attempts between 1 and 1000),
  apply_plaintext text not null default 'refuse'
    constraint settings_apply_plaintext_check check (apply_plaintext in ('refuse', 'pass')),
  tenant_check text,
  jwt_admin_claim text constraint settings_jwt_admin_claim_check check (jwt_admin_claim <> ''),
  postgrest_login text not null default 'authenticator'
    constraint settings_postgrest_login_check check (postgrest_login <> ''),
  -- Added to a date: compared as an interval, 360 days would be a year.
  audit_keep interval not null default '3 years'
    constraint settings_audit_keep_check check (timestamp '2001-01-01' + audit_keep between '2002-01-01' and '2101-01-01'),
  notify_blocked interval not null default '15 minutes'
    constraint settings_notify_blocked_check check (notify_blocked between '1 minute' and '30 days'),
  notify_destruction interval not null default '7 days'
    constraint settings_notify_destruction_check check (notify_destruction between '0 s' and '3650 days'),
  notify_silent interval not null default '5 minutes'
    constraint settings_notify_silent_check check (notify_silent between '2 minutes' and '1 day')
);
comment on table rekey.settings is 'One row: how this database rotates. Change it with rekey.set_setting().';
comment on column rekey.settings.singleton is 'Always true: there is one row.';
comment on column rekey.settings.kek_provider is 'Where the key-encryption key comes from when the session did not unlock itself: session (nowhere else), vault (Supabase Vault), file (on the database server).';
comment on column rekey.settings.kek_secret_name is 'Name of the KEK in vault.decrypted_secrets; the next KEK is looked for under this name with _new appended.';
comment on column rekey.settings.kek_file is 'File of the KEK, relative to the data directory (a link to a file elsewhere will do); the next KEK is looked for under this name with _new appended.';
comment on column rekey.settings.destroy_wait is 'Time between the request to destroy a key version and its destruction, at most 3650 days. Should be longer than backups are kept.';
comment on column rekey.settings.destroy_search is 'Where a key version is looked for before it is destroyed: database (in every table and materialized view, with the rights of who runs the worker) or columns (in protected columns and secrets only: copies elsewhere are lost with the key).';
comment on column rekey.settings.batch_target is 'Time that one batch of re-encryption aims at, 10 ms to 60 s.';
comment on column rekey.settings.step_limit is 'Time after which a batch is cancelled, 100 ms to 1 day: a trigger of the table sleeps, or loops. Without one: 100 times batch_target. Under pg_cron a job of its own looks for it.';
comment on column rekey.settings.max_rows_per_second is 'Throttle of re-encryption over all workers, in rows a second. Without one: as fast as it goes.';
comment on column rekey.settings.min_pace is 'Part of the time, 0.01 to 1, that a worker works at least while others use the server: then it pauses after each batch, as autovacuum does. 1: it gives way to nobody. Alone it works all the time, and so it does where a key is compromised.';
comment on column rekey.settings.max_attempts is 'Failed attempts in a row after which a rotation, or a batch of it, is not tried again: the rotation is failed once nothing else is left to do.';
comment on column rekey.settings.apply_plaintext is 'What becomes of a plain value that replication brings for a column that is encrypted on write, where there is no KEK to seal it with: refuse (the subscription stops, and its error says why) or pass (it is stored plain, with a warning).';
comment on column rekey.settings.tenant_check is 'Name, with its schema, of a function (tenant_id uuid) returns boolean that decides who reaches which tenant, in place of the default: can_access_tenant() has it.';
comment on column rekey.settings.jwt_admin_claim is 'Key in the app_metadata of a JWT whose value true makes its bearer an administrator of rotation. Without one: nobody is.';
comment on column rekey.settings.postgrest_login is 'Role that PostgREST logs in as. Only from its sessions are refusals of the RPC audited and claims believed there: any other login that may set the role authenticated can run SQL, and make up both.';
comment on column rekey.settings.notify_blocked is 'How long a rotation is held up before endpoints are told, 1 minute to 30 days.';
comment on column rekey.settings.notify_destruction is 'How long before a key version is destroyed endpoints are told, at most 3650 days.';
comment on column rekey.settings.notify_silent is 'How long no worker has ticked, or had the KEK, before endpoints are told, 2 minutes to 1 day.';
comment on column rekey.settings.audit_keep is 'How long entries of the audit log stay at least before they may be removed, 1 to 100 years.';

create table rekey._worker (
  singleton boolean constraint _worker_pkey primary key default true constraint _worker_singleton_check check (singleton),
  last_tick_at timestamptz,
  last_tick_seconds double precision,
  last_census_at timestamptz,
  locked_since timestamptz,
  locked_noted_at timestamptz,
  last_error text,
  last_error_at timestamptz,
  next_batch_at timestamptz
);
comment on table rekey._worker is 'One row: when the unattended work last ran, since when it lacks the KEK, and when the throttle lets the next batch start.';

create table rekey._session_key (
  singleton boolean constraint _session_key_pkey primary key default true constraint _session_key_singleton_check check (singleton),
  key bytea not null constraint _session_key_length_check check (octet_length(key) = 64)
);
comment on table rekey._session_key is 'One row: the key under which an unlocked session carries the KEK.';

-- sql/schema/30_keys.sql
create table rekey.keks (
  id integer generated by default as identity constraint keks_pkey primary key,
  fingerprint text not null constraint keks_fingerprint_key unique
    constraint keks_fingerprint_check check (fingerprint ~ '^[0-9a-f]{32}$'),
  state text not null default 'active' constraint keks_state_check check (state in ('active', 'retired', 'lost')),
  created_at timestamptz not null default now(),
  retired_at timestamptz,
  constraint keks_retired_at_check check ((state = 'active') = (retired_at is null))
);
create unique index keks_active_key on rekey.keks (state) where state = 'active';
comment on table rekey.keks is 'Key-encryption keys: number, fingerprint and state. The keys themselves are never stored.';
comment on column rekey.keks.id is 'Number of the KEK.';
comment on column rekey.keks.fingerprint is 'First 16 bytes of HMAC-SHA-256 of the label pg_rekey/v1/fingerprint under the KEK, in hex.';
comment on column rekey.keks.state is 'active (wraps the DEKs), retired (replaced: keep it as long as backups), lost (what it wrapped cannot be opened).';
comment on column rekey.keks.created_at is 'When it was registered.';
comment on column rekey.keks.retired_at is 'When it was replaced or declared lost.';

create table rekey.keyrings (
  -- Random, so that keyrings of two databases can be brought together.
  id integer constraint keyrings_pkey primary key constraint keyrings_id_check check (id > 0),
  name text not null constraint keyrings_name_key unique
    constraint keyrings_name_check check (octet_length(name) between 1 and 63 and name !~ '[\u0001-\u001F\u007F]'),
  tenant_id uuid not null default '00000000-0000-0000-0000-000000000000',
  rotate_every interval constraint keyrings_rotate_every_check check (rotate_every between '1 minute' and '36500 days'),
  next_rotation_at timestamptz constraint keyrings_next_rotation_at_check check (isfinite(next_rotation_at)),
  created_at timestamptz not null default now(),
  rotated_at timestamptz not null default now(),
  retired_at timestamptz,
  constraint keyrings_schedule_check check ((rotate_every is null) = (next_rotation_at is null)),
  constraint keyrings_retired_check check (retired_at is null or rotate_every is null)
);
create index keyrings_next_rotation_at on rekey.keyrings (next_rotation_at) where next_rotation_at is not null;
alter table rekey.keyrings enable row level security;
comment on table rekey.keyrings is 'Named lines of DEK versions: one a tenant, one an application, or just default.';
comment on column rekey.keyrings.id is 'Random positive number; part of every ciphertext.';
comment on column rekey.keyrings.name is 'Unique name, 1 to 63 bytes without control characters.';
comment on column rekey.keyrings.tenant_id is 'Tenant the keyring belongs to; the nil UUID: all of them.';
comment on column rekey.keyrings.rotate_every is 'Cryptoperiod (SP 800-57): time between scheduled rotations, one minute or more; NULL: none.';
comment on column rekey.keyrings.next_rotation_at is 'When the next scheduled rotation is due.';
comment on column rekey.keyrings.created_at is 'When it was created.';
comment on column rekey.keyrings.rotated_at is 'When its active version was made.';
comment on column rekey.keyrings.retired_at is 'When it was retired: it takes no new values.';

create table rekey.encryption_keys (
  id bigint generated by default as identity constraint encryption_keys_pkey primary key,
  keyring_id integer not null constraint encryption_keys_keyring_fkey references rekey.keyrings,
  version integer not null constraint encryption_keys_version_check check (version > 0),
  state text not null constraint encryption_keys_state_check
    check (state in ('active', 'decrypt_only', 'disabled', 'compromised', 'destroy_scheduled', 'destroyed')),
  is_active boolean not null generated always as (state = 'active') stored,
  wrapped_key bytea,
  kek_id integer not null constraint encryption_keys_kek_fkey references rekey.keks,
  created_at timestamptz not null default now(),
  activated_at timestamptz,
  deactivated_at timestamptz,
  compromised_at timestamptz,
  destroy_after timestamptz,
  destroyed_at timestamptz,
  scheduled_from text,
  constraint encryption_keys_keyring_version_key unique (keyring_id, version),
  constraint encryption_keys_wrapped_key_check check ((state = 'destroyed') = (wrapped_key is null)),
  constraint encryption_keys_destroyed_at_check check ((state = 'destroyed') = (destroyed_at is not null)),
  constraint encryption_keys_destroy_after_check
    check ((state = 'destroy_scheduled') = (scheduled_from is not null) and (state <> 'destroy_scheduled' or destroy_after is not null))
);
create unique index encryption_keys_active_key on rekey.encryption_keys (keyring_id) where state = 'active';
create index encryption_keys_destroy_after on rekey.encryption_keys (destroy_after) where state = 'destroy_scheduled';
comment on table rekey.encryption_keys is 'Data-encryption keys (DEKs), one row for each version of a keyring, wrapped under a KEK.';
comment on column rekey.encryption_keys.id is 'Row number.';
comment on column rekey.encryption_keys.keyring_id is 'The keyring.';
comment on column rekey.encryption_keys.version is 'Version within the keyring, from 1.';
comment on column rekey.encryption_keys.state is 'SP 800-57 state: active, decrypt_only (deactivated), disabled (suspended), compromised, destroy_scheduled, destroyed.';
comment on column rekey.encryption_keys.is_active is 'Whether new values are encrypted with it.';
comment on column rekey.encryption_keys.wrapped_key is 'The 64-byte key sealed under the KEK (docs/format.md); NULL once destroyed.';
comment on column rekey.encryption_keys.kek_id is 'The KEK that wraps it.';
comment on column rekey.encryption_keys.created_at is 'When it was made.';
comment on column rekey.encryption_keys.activated_at is 'When it last became active.';
comment on column rekey.encryption_keys.deactivated_at is 'When it last ceased to be active.';
comment on column rekey.encryption_keys.compromised_at is 'When it was marked compromised.';
comment on column rekey.encryption_keys.destroy_after is 'Before this time it is not destroyed.';
comment on column rekey.encryption_keys.destroyed_at is 'When its wrapped key was overwritten.';
comment on column rekey.encryption_keys.scheduled_from is 'State that a cancelled destruction returns to.';

-- Asked for every row that is written into a protected column, where a query would cost more than all the rest. Its value does not
-- go back with a transaction: so it is set before a version is scheduled, and taken back only where none is. It has none at first.
create sequence rekey._doomed minvalue 0 maxvalue 1;
comment on sequence rekey._doomed is '0: no version is scheduled for destruction; 1: one may be, and rekey._is_scheduled() knows.';
grant select on sequence rekey._doomed to public;

-- sql/schema/40_secrets.sql
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

-- sql/schema/45_columns.sql
create table rekey.protected_columns (
  id integer generated by default as identity constraint protected_columns_pkey primary key,
  label text not null constraint protected_columns_label_key unique,
  keyring_id integer not null constraint protected_columns_keyring_fkey references rekey.keyrings,
  relation_name text not null,
  column_name name not null,
  context_columns name[] not null,
  -- Where the column and its context columns stand among the columns that the guard function names, in table order.
  places integer[] not null,
  is_text boolean not null,
  encrypt_on_write boolean not null,
  fire_triggers boolean not null,
  search_path text not null,
  owner name not null,
  seen jsonb,
  index_column name,
  index_place integer,
  normalization text constraint protected_columns_normalization_check check (normalization in ('exact', 'lower', 'trim_lower', 'digits')),
  created_at timestamptz not null default now(),
  constraint protected_columns_places_check check (cardinality(places) = cardinality(context_columns) + 1),
  constraint protected_columns_index_check check (num_nulls(index_column, index_place, normalization) in (0, 3))
);
create index protected_columns_keyring_id on rekey.protected_columns (keyring_id);
comment on table rekey.protected_columns is 'Columns of the user''s own tables that are under rotation. Which relation and columns they are now is known to the guard function of each (rekey_targets.column_<id>_guard), which follows renames and restores.';
comment on column rekey.protected_columns.id is 'Number of the column; its functions in schema rekey_targets are named column_<id>_...';
comment on column rekey.protected_columns.label is 'schema.table.column as first registered: the first part of the context of its values. It stays when things are renamed.';
comment on column rekey.protected_columns.keyring_id is 'Keyring for adoption and encryption on write.';
comment on column rekey.protected_columns.relation_name is 'Name of the table, with its schema, as last seen: by it the column is found again where a restore brought rows without functions.';
comment on column rekey.protected_columns.column_name is 'Name of the column as last seen.';
comment on column rekey.protected_columns.context_columns is 'Names, as last seen, of the columns whose values, as text, are the rest of the context.';
comment on column rekey.protected_columns.places is 'Ranks of the column and its context columns among them all in table order.';
comment on column rekey.protected_columns.is_text is 'Whether it holds envelopes in text form; else in bytea.';
comment on column rekey.protected_columns.encrypt_on_write is 'Whether a trigger encrypts what is written.';
comment on column rekey.protected_columns.fire_triggers is 'Whether the triggers and rules of the table see what a rotation writes.';
comment on column rekey.protected_columns.search_path is 'The search path that is in force where a rotation fires them.';
comment on column rekey.protected_columns.owner is 'Owner of the table when it was registered or rebound: who may register it again after it was dropped.';
comment on column rekey.protected_columns.seen is 'How many rows of each keyring (by its id) opened at the last complete count; NULL: there was none. Where the column is blocked, those keyrings wait for it.';
comment on column rekey.protected_columns.index_column is 'Name, as last seen, of the column with its blind index; NULL: it is not searchable.';
comment on column rekey.protected_columns.index_place is 'Rank of that column among all that the guard names.';
comment on column rekey.protected_columns.normalization is 'What is taken for equal: exact, lower, trim_lower or digits, as rekey.make_searchable() says.';
comment on column rekey.protected_columns.created_at is 'When it was registered.';

-- What changes with the key versions, in the transaction that changes them: a search has its versions from the same snapshot as its rows.
create table rekey._blind_indexes (
  column_id integer not null constraint _blind_indexes_pkey primary key
    constraint _blind_indexes_column_fkey references rekey.protected_columns on delete cascade,
  versions integer[] not null,
  changed_in xid8 not null,
  filled boolean not null default false,
  refill boolean not null default true,
  refill_by bigint,
  text_version text not null
);
comment on table rekey._blind_indexes is
  'The blind indexes of searchable columns. versions: those that index values may stand on; changed_in: the transaction that made the last of them active; filled: whether every value has one; refill: whether every row is to be looked at again; refill_by: the rotation whose pass does that; text_version: of Unicode and collation, by which the values were normalized.';

-- An oid says which relation it is only in the database that noted it: a restored dump has others.
create table rekey._column_relations (
  column_id integer not null constraint _column_relations_column_fkey references rekey.protected_columns on delete cascade,
  relation oid not null,
  attnum smallint not null,
  relation_name text not null,
  home text not null,
  settled boolean not null,
  constraint _column_relations_pkey primary key (column_id, relation, attnum)
);
comment on table rekey._column_relations is
  'Relations that were seen to hold values of a protected column (attnum 0); or, settled, that are known not to, though they were a part of it, or have a column of its name (attnum). home: cluster and database in which the oid is good.';

-- sql/schema/50_rotations.sql
create table rekey.rotations (
  id bigint generated by default as identity constraint rotations_pkey primary key,
  keyring_id integer not null constraint rotations_keyring_fkey references rekey.keyrings,
  from_versions integer[] not null,
  to_version integer not null,
  previous_version integer,
  state text not null default 'queued' constraint rotations_state_check check (state in (
    'queued', 'running', 'paused', 'verifying', 'completed', 'completed_with_failures', 'failed', 'rolled_back', 'superseded')),
  trigger text not null constraint rotations_trigger_check
    check (trigger in ('manual', 'schedule', 'compromise', 'rollback', 'adoption', 'search')),
  reason text,
  requested_by text not null,
  rows_total bigint,
  rows_done bigint not null default 0,
  rows_failed bigint not null default 0,
  attempts integer not null default 0,
  last_error text,
  next_attempt_at timestamptz,
  blocked_by jsonb,
  blocked_since timestamptz,
  pass_id bigint,
  passes integer not null default 0,
  barrier_at timestamptz,
  verification_id bigint,
  column_id integer constraint rotations_column_fkey references rekey.protected_columns on delete set null,
  formats text[],
  forced boolean not null default false,
  unwrap text,
  in_line boolean not null default false,
  created_at timestamptz not null default now(),
  started_at timestamptz,
  finished_at timestamptz,
  constraint rotations_to_version_fkey foreign key (keyring_id, to_version) references rekey.encryption_keys (keyring_id, version)
) with (fillfactor = 50);  -- room for the progress, which each batch notes
create unique index rotations_under_way_key on rekey.rotations (keyring_id)
  where state in ('queued', 'running', 'paused', 'verifying', 'failed') and not in_line;
create index rotations_keyring_id on rekey.rotations (keyring_id, id);
create index rotations_open on rekey.rotations (id) where state in ('queued', 'running', 'verifying');
comment on table rekey.rotations is 'Rotations: which keyring goes from which versions to which, and how far it is.';
comment on column rekey.rotations.id is 'Number of the rotation.';
comment on column rekey.rotations.keyring_id is 'Keyring that is rotated.';
comment on column rekey.rotations.from_versions is 'Versions whose rows it takes along.';
comment on column rekey.rotations.to_version is 'Version it brings them to.';
comment on column rekey.rotations.previous_version is 'Version that was active before: what a rollback makes active again; NULL where there is none to go back to.';
comment on column rekey.rotations.state is 'queued, running, paused, verifying, failed (these are under way), completed, completed_with_failures, rolled_back, superseded.';
comment on column rekey.rotations.trigger is 'Why: manual, schedule, compromise, rollback, adoption, search (a blind index is filled).';
comment on column rekey.rotations.reason is 'What whoever asked for it said.';
comment on column rekey.rotations.requested_by is 'Who asked for it.';
comment on column rekey.rotations.rows_total is 'Rows to re-encrypt; NULL until they are counted.';
comment on column rekey.rotations.rows_done is 'Rows re-encrypted.';
comment on column rekey.rotations.rows_failed is 'Rows in quarantine.';
comment on column rekey.rotations.attempts is 'Failed attempts in a row: of the rotation, or of the batch that fails.';
comment on column rekey.rotations.last_error is 'The last error.';
comment on column rekey.rotations.next_attempt_at is 'It goes on after this time; NULL: at once.';
comment on column rekey.rotations.blocked_by is 'What it waits for.';
comment on column rekey.rotations.blocked_since is 'Since when it waits for that.';
comment on column rekey.rotations.pass_id is 'Number of the pass over the tables that it takes part in.';
comment on column rekey.rotations.passes is 'Passes that it has begun.';
comment on column rekey.rotations.barrier_at is 'When every writer of an older version was seen to be gone.';
comment on column rekey.rotations.verification_id is 'Number of the verification that it takes part in; NULL: none yet.';
comment on column rekey.rotations.column_id is 'Protected column that is adopted; NULL for other rotations, and once it is no longer protected.';
comment on column rekey.rotations.formats is 'Formats that are adopted; NULL for other rotations.';
comment on column rekey.rotations.forced is 'Whether values that look encrypted in another format are adopted as plaintext.';
comment on column rekey.rotations.unwrap is 'What the client takes off opened values: json, php, pickle; NULL: nothing.';
comment on column rekey.rotations.in_line is 'Whether it is an adoption that waits, queued, until nothing else of its keyring is under way.';
comment on column rekey.rotations.created_at is 'When it was asked for; from then on new values are encrypted with to_version.';
comment on column rekey.rotations.started_at is 'When the first row was looked at.';
comment on column rekey.rotations.finished_at is 'When it ended.';

create sequence rekey._pass_id;

-- Its rows are never committed: they are there for the transaction that writes a batch, while it does.
create table rekey._sweeping (
  transaction xid8 not null,
  relation regclass not null,
  constraint _sweeping_pkey primary key (transaction, relation)
);
comment on table rekey._sweeping is 'What rekey.is_sweeping() goes by: into which relation this transaction writes a batch of a rotation now.';

-- What is still to be swept or verified: a worker locks a row, moves first on, and deletes it at the end. What is doubtful
-- stays until the end of the verification (61_verify.sql).
create table rekey._chunks (
  id bigint generated by default as identity constraint _chunks_pkey primary key,
  pass_id bigint not null,
  urgent boolean not null,
  kind text not null constraint _chunks_kind_check check (kind in ('sweep', 'adopt', 'fill', 'verify', 'doubtful')),
  target text not null,
  relation regclass not null,
  first tid not null,
  swept_from tid,
  until_block bigint not null,
  batch_rows integer not null default 1000,
  batch_blocks integer not null,
  attempts integer not null default 0,
  next_attempt_at timestamptz,
  last_error text,
  stuck boolean not null default false,
  pace real not null default 1,  -- and what it goes by: rekey._pace()
  gives_way_to text,
  looked_at timestamptz,
  transactions bigint
);
create index _chunks_pass_id on rekey._chunks (pass_id);
comment on table rekey._chunks is 'Block ranges that the rotations of a pass or of a verification have yet to work on.';

-- Whom an error in a relation concerns, and whether it refuses every row.
create table rekey._due (
  pass_id bigint not null,
  kind text not null,
  target text not null,
  relation regclass not null,
  rotations bigint[] not null,
  passed boolean not null default false,
  refused integer not null default 0,
  constraint _due_pkey primary key (pass_id, kind, target, relation)
);
comment on table rekey._due is 'Relations of a pass: the rotations that had rows to do there when it began, whether one row went through since, and how many were refused.';

-- What a verification checks by chunks. (Restored from a dump, it says nothing: the server or the file is another one.)
create table rekey._verified (
  verification_id bigint not null,
  target text not null,
  relation regclass not null,
  system_identifier bigint,
  filenode oid not null,
  functions text not null,
  since xid8 not null,
  constraint _verified_pkey primary key (verification_id, target, relation)
);
comment on table rekey._verified is 'Relations that a verification checks by chunks, and as what they were found when it began.';

create table rekey.rotation_failures (
  id bigint generated by default as identity constraint rotation_failures_pkey primary key,
  rotation_id bigint constraint rotation_failures_rotation_fkey references rekey.rotations,
  keyring_id integer not null constraint rotation_failures_keyring_fkey references rekey.keyrings,
  target text not null,
  relation text not null,
  row_key text not null,
  -- A key may be longer than an index row.
  row_hash bytea not null generated always as (sha256(replace(row_key, chr(92), chr(92) || chr(92))::bytea)) stored,
  version integer,
  reason text not null,
  sqlstate text,
  verification_id bigint,
  created_at timestamptz not null default now(),
  resolved_at timestamptz,
  resolution text constraint rotation_failures_resolution_check check (resolution in ('retry', 'discard', 'cleared')),
  resolved_by text,
  resolve_reason text,
  constraint rotation_failures_resolved_check check ((resolved_at is null) = (resolution is null))
);
create unique index rotation_failures_open_key on rekey.rotation_failures (keyring_id, target, relation, row_hash)
  where resolved_at is null;
create index rotation_failures_refused on rekey.rotation_failures (target)
  where resolved_at is null and sqlstate is not null;
comment on table rekey.rotation_failures is 'Quarantine: rows that did not open in a rotation, or that their table did not let it change. They are left as they were, and keep their key from destruction.';
comment on column rekey.rotation_failures.id is 'Number of the entry.';
comment on column rekey.rotation_failures.rotation_id is 'Rotation in which the row failed, the last one; NULL: the census found it, and no rotation has met it.';
comment on column rekey.rotation_failures.keyring_id is 'Keyring of the row.';
comment on column rekey.rotation_failures.target is 'Target the row is in.';
comment on column rekey.rotation_failures.relation is 'Table the row is in.';
comment on column rekey.rotation_failures.version is 'Key version the row stands on; NULL: it is no envelope yet.';
comment on column rekey.rotation_failures.reason is 'Why it did not open, or the error with which its table refused it.';
comment on column rekey.rotation_failures.sqlstate is 'SQLSTATE of that error; NULL: the row does not open.';
comment on column rekey.rotation_failures.verification_id is 'Verification that saw it last.';
comment on column rekey.rotation_failures.created_at is 'When it first failed.';
comment on column rekey.rotation_failures.resolved_at is 'When the entry was closed; NULL: it is open.';
comment on column rekey.rotation_failures.resolution is 'retry (tried again), discard (given up), cleared (the row opens again, or is gone); NULL while it is open.';
comment on column rekey.rotation_failures.resolved_by is 'Who closed it.';
comment on column rekey.rotation_failures.resolve_reason is 'What whoever closed it said.';
comment on column rekey.rotation_failures.row_key is 'Primary key of the row, its parts as text, separated by a slash.';
comment on column rekey.rotation_failures.row_hash is 'SHA-256 of row_key.';

-- sql/schema/55_census.sql
-- What rekey.protected_columns.seen is for a column.
create table rekey._secrets_seen (
  keyring_id integer constraint _secrets_seen_pkey primary key constraint _secrets_seen_keyring_fkey references rekey.keyrings,
  rows bigint not null
);
comment on table rekey._secrets_seen is 'How many secrets of a keyring the last complete count saw: where there are none any more, a rotation asks whether that is meant.';

create table rekey._census_findings (
  kind text not null,
  target text not null,
  keyring text not null default '',
  version integer not null default 0,
  item text not null,
  severity text not null,
  rows bigint,
  finding text not null,
  advice text not null,
  since timestamptz not null default now(),
  constraint _census_findings_pkey primary key (kind, target, keyring, version, item)
);
comment on table rekey._census_findings is 'What the last census found, and since when; what it does not find any more is not here.';

-- sql/schema/55_searches.sql
-- Searches of the whole database for envelopes of versions that are to be destroyed (62_search.sql).
create table rekey._searches (
  id bigint generated by default as identity constraint _searches_pkey primary key,
  home text not null,
  scope text not null constraint _searches_scope_check check (scope in ('database', 'columns')),
  state text not null default 'reading' constraint _searches_state_check check (state in ('reading', 'looking', 'complete')),
  begun_in xid8 not null,
  begun_at timestamptz not null default clock_timestamp(),
  older xid8,
  blocked_by jsonb,
  blocked_since timestamptz,
  looks integer not null default 0,
  incomplete_since timestamptz,
  postponed boolean not null default false,
  completed_at timestamptz,
  counted_at timestamptz,
  counted_as text
);
comment on table rekey._searches is 'Searches of the database: how far the last one is. older: transactions before this one are waited for.';

create table rekey._search_versions (
  search_id bigint not null constraint _search_versions_search_fkey references rekey._searches on delete cascade,
  keyring_id integer not null,
  version integer not null,
  rows bigint,
  constraint _search_versions_pkey primary key (search_id, keyring_id, version)
);
comment on table rekey._search_versions is 'Versions that a search looks for: they were scheduled for destruction before it began, and are since. rows: those of protected columns and secrets, once they are counted.';

create table rekey._search_relations (
  search_id bigint not null constraint _search_relations_search_fkey references rekey._searches on delete cascade,
  relation oid not null,
  name text not null,
  bytes bigint not null,
  state text not null default 'pending' constraint _search_relations_state_check check (state in ('pending', 'read', 'looked')),
  statement text,
  filenode oid,
  since xid8,
  next_block bigint not null default 0,
  blocks bigint not null default 0,
  batch_blocks integer not null default 256,
  rows bigint not null default 0,
  role text,
  read_at timestamptz,
  problem text,
  tried_by text[] not null default '{}',
  constraint _search_relations_pkey primary key (search_id, relation)
);
comment on table rekey._search_relations is 'Relations of a search: what is read of each by its turns, by which role, as what it was found (filenode, statement), and why it was not read.';

create table rekey._search_finds (
  search_id bigint not null constraint _search_finds_search_fkey references rekey._searches on delete cascade,
  relation oid not null,
  attnum smallint not null,
  keyring_id integer not null,
  version integer not null,
  relation_name text not null,
  column_name name not null,
  rows bigint not null,
  constraint _search_finds_pkey primary key (search_id, relation, attnum, keyring_id, version)
);
comment on table rekey._search_finds is 'Columns in which a search found envelopes of the versions that it looks for.';

-- sql/schema/60_audit.sql
create table rekey.audit_log (
  id bigint constraint audit_log_pkey primary key,
  at timestamptz not null,
  actor text not null,
  role text not null,
  jwt_subject text,
  event text not null constraint audit_log_event_check check (event in (
    'keyring.created', 'keyring.retired', 'keyring.emptied', 'census.found',
    'key.created', 'key.activated', 'key.deactivated', 'key.disabled', 'key.enabled', 'key.compromised',
    'key.destroy_scheduled', 'key.destroy_cancelled', 'key.destroyed',
    'rotation.requested', 'rotation.passed_by', 'rotation.started', 'rotation.error', 'rotation.row_failed', 'rotation.failure_resolved',
    'rotation.retried', 'rotation.paused', 'rotation.resumed', 'rotation.rolled_back', 'rotation.completed', 'rotation.failed',
    'kek.registered', 'kek.rotated', 'kek.lost', 'column.protected', 'column.rebound', 'column.unprotected', 'column.searchable', 'column.refilled',
    'schedule.changed', 'setting.changed', 'endpoint.added', 'endpoint.removed', 'access.denied', 'audit.pruned')),
  keyring text,
  version integer,
  rotation_id bigint,
  details jsonb not null default '{}',
  prev_hash bytea not null,
  hash bytea not null
);
comment on table rekey.audit_log is 'What happened to keys, in a hash chain. Rows are only ever added; rekey.verify_audit_log() checks it. Only rekey.prune_audit_log() removes old ones, which it leaves an entry of.';
comment on column rekey.audit_log.id is 'Number in the chain, from 1, without gaps but for those that audit.pruned tells of.';
comment on column rekey.audit_log.at is 'When.';
comment on column rekey.audit_log.actor is 'The role that logged in (session_user).';
comment on column rekey.audit_log.role is 'The role it had set (SET ROLE), or none.';
comment on column rekey.audit_log.jwt_subject is 'Subject of the JWT, behind PostgREST; at most 255 bytes of it.';
comment on column rekey.audit_log.event is 'What happened.';
comment on column rekey.audit_log.keyring is 'Keyring it happened to.';
comment on column rekey.audit_log.version is 'Key version it happened to; for kek events the number of the KEK.';
comment on column rekey.audit_log.rotation_id is 'Rotation it happened in.';
comment on column rekey.audit_log.details is 'More of it, at most about 16 kB: what is longer is cut. Never a key or a value.';
comment on column rekey.audit_log.prev_hash is 'Hash of the entry before.';
comment on column rekey.audit_log.hash is 'SHA-256 over prev_hash and every other column (docs/format.md).';

-- What those who may not administer can cause is limited by how much of it there was in the last minute.
create index audit_log_limited on rekey.audit_log (at) where event in ('access.denied', 'rotation.error');

-- Its row lock puts the writers of the chain in a row, at any isolation level.
create table rekey._audit_head (
  singleton boolean constraint _audit_head_pkey primary key default true constraint _audit_head_singleton_check check (singleton),
  id bigint not null,
  hash bytea not null,
  pruning xid8
);
comment on table rekey._audit_head is 'One row: number and hash of the last entry of the audit log. pruning: the transaction that may remove entries, while rekey.prune_audit_log() does; NULL in every committed state.';

-- sql/schema/65_notify.sql
create table rekey._endpoints (
  id integer generated by default as identity constraint _endpoints_pkey primary key,
  name text not null constraint _endpoints_name_key unique
    constraint _endpoints_name_check check (name ~ '^[A-Za-z0-9._-]{1,63}$'),
  kind text not null constraint _endpoints_kind_check check (kind in ('webhook', 'slack', 'email', 'channel')),
  events text[],
  allow_private boolean not null,
  by_pg_net boolean not null constraint _endpoints_by_pg_net_check check (not by_pg_net or kind in ('webhook', 'slack')),
  channel name,
  sealed bytea,
  kek_id integer constraint _endpoints_kek_fkey references rekey.keks,
  created_at timestamptz not null default now(),
  constraint _endpoints_sealed_check check (
    (kind = 'channel') = (channel is not null) and (kind = 'channel') = (sealed is null) and (sealed is null) = (kek_id is null))
);
comment on table rekey._endpoints is 'Who is told what happens. sealed: the address, with the signing secret before it, under the KEK (docs/format.md).';

-- No foreign key to endpoints: nobody waits for one that is being removed. What is left over is pruned.
create table rekey._notifications (
  id bigint generated by default as identity constraint _notifications_pkey primary key,
  message_id uuid not null default gen_random_uuid(),
  endpoint_id integer not null,
  event text not null,
  body text not null,
  created_at timestamptz not null default clock_timestamp(),
  state text not null default 'waiting' constraint _notifications_state_check check (state in ('waiting', 'delivered', 'dead')),
  attempts integer not null default 0,
  next_attempt_at timestamptz not null default clock_timestamp(),
  request_id bigint,
  ended_at timestamptz,
  last_error text,
  constraint _notifications_ended_at_check check ((state = 'waiting') = (ended_at is null))
);
create index _notifications_waiting on rekey._notifications (endpoint_id, next_attempt_at) where state = 'waiting';
create index _notifications_ended on rekey._notifications (endpoint_id, id) where state <> 'waiting';
comment on table rekey._notifications is 'Messages to endpoints: those that wait, and the last ones that were delivered or given up.';

create table rekey._told (
  event text not null,
  subject text not null,
  constraint _told_pkey primary key (event, subject)
);
comment on table rekey._told is 'Conditions that hold now and were told of.';

create table rekey._notifier (
  singleton boolean constraint _notifier_pkey primary key default true constraint _notifier_singleton_check check (singleton),
  audit_id bigint not null,
  home text not null,
  since timestamptz not null default now()
);
comment on table rekey._notifier is 'One row while there are endpoints: up to which entry of the audit log messages were made, since when there are endpoints, and in which database: a copy has it from the original.';

-- sql/schema/70_types.sql
create type rekey.key_rows as (keyring text, version integer, state text, rows bigint, relations text[]);
comment on type rekey.key_rows is 'Result of rekey.key_usage(): rows that stand on a key version, and the relations they are in.';

create type rekey.verified_rows as (relation text, keyring text, version integer, rows bigint, failed bigint);
comment on type rekey.verified_rows is 'Result of rekey.verify_ciphertexts(): rows of a relation on a key version, and how many of them do not open.';

create type rekey._sealing as (header bytea, key bytea);
comment on type rekey._sealing is 'What a value is sealed with: the header of its envelope, and the DEK.';

create type rekey._sealed as (ciphertexts bytea[], problems text[], formats text[], closed bytea[], indexes bytea[]);
comment on type rekey._sealed is 'What the engine made of values, in their order: the ciphertext, and the index value of a searchable column; or NULL and why not; or NULL, and what only the client can open.';

create type rekey._target as (
  target text, relation regclass, whole regclass, function_name name, indexed boolean, prefix bytea, is_text boolean, problem text,
  normalization text);
comment on type rekey._target is 'A relation with row storage that holds envelopes, and what the engine needs to know of it. whole: the table that it is, or is a partition of. normalization: of a searchable column.';

create type rekey._counted as (
  place integer, keyring_id integer, version integer, rows bigint, next tid, ciphertexts bytea[], contexts bytea[], keys text[], error text, code text, context text);
comment on type rekey._counted is 'Rows of a relation on a key version, as rekey._call_count() counts them, or the rows themselves; or the error, its SQLSTATE and context, with which it could not be counted. place: which of the relations.';

create type rekey._locked as (functions text, targets rekey._target[], errors jsonb);
comment on type rekey._locked is 'What rekey._lock_targets() locked: the targets, blocked ones among them, as they were then; what could not be locked (target, relation, error, sqlstate); and the state of all their functions before that.';

create type rekey._adoption as (
  relation regclass, rows tid[], keys text[], formats text[], problems text[], ciphertexts bytea[], legacy bytea[], next tid, next_relation regclass,
  indexes bytea[]);
comment on type rekey._adoption is 'A batch of values that are no envelopes: by row, its key, the format, why it cannot be adopted, the envelope made of it, or the value that the client has to open.';

-- sql/schema/80_public.sql
-- The RPC stands in schema public (sql/code/90_rpc.sql), where others have things too.
do $$
declare
  v_name name;
begin
  if to_regnamespace('public') is null then
    raise exception 'there is no schema public' using errcode = 'invalid_schema_name',
      hint = 'pg_rekey puts rotate_keys() and others there: create schema public.';
  end if;
  select p.proname into v_name from pg_proc p
  where p.pronamespace = 'public'::regnamespace and p.proname in (
    'rotate_keys', 'key_rotation_status', 'pause_rotation', 'retry_rotation', 'rollback_rotation', 'mark_key_compromised')
  limit 1;
  if found then
    raise exception 'schema public has a function % already', v_name using errcode = 'duplicate_function',
      hint = 'pg_rekey does not replace it: rename or drop it first.';
  end if;
end
$$;

-- sql/code/10_aead.sql
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

-- sql/code/11_envelope.sql
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

-- sql/code/12_trusted.sql
-- Objects of other extensions: pg_cron and the Supabase Vault. A name proves nothing, since whoever may CREATE on the database
-- can make a schema cron or vault where they are not: what we touch there belongs to the extension, by pg_depend. And what runs
-- is what was looked at: a function is called with the exact types of its signature, so that no overload takes its place.

create or replace function rekey._is_trusted(extension name, class regclass, object oid) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_super boolean := (select r.rolsuper from pg_roles r where r.rolname = current_user);
begin
  return exists (
    select from pg_extension e
    join pg_depend d on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
    cross join lateral (
      select c.relowner as owner from pg_class c where d.classid = 'pg_class'::regclass and c.oid = d.objid
      union all
      select p.proowner from pg_proc p where d.classid = 'pg_proc'::regclass and p.oid = d.objid) o
    where e.extname = extension and d.classid = class and d.objid = object
      -- Who owns it can replace it. A superuser runs what superusers own; others, what belongs to who made the extension too.
      and (o.owner = e.extowner and not v_super or (select r.rolsuper from pg_roles r where r.oid = o.owner)));
end
$$;
comment on function rekey._is_trusted is 'Whether an extension owns a relation or function, and nobody but superusers, or who made the extension, can replace it.';
-- These three say what the catalog says, and are called by functions that run with their caller's rights.
grant execute on function rekey._is_trusted to rekey_admin, rekey_operator;

create or replace function rekey._trusted_function(extension name, signature text) returns regprocedure
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_function regprocedure := to_regprocedure(signature);
begin
  return case when rekey._is_trusted(extension, 'pg_proc', v_function) then v_function end;
end
$$;
comment on function rekey._trusted_function is 'The function of this signature, where it is the extension''s; NULL: there is none.';
grant execute on function rekey._trusted_function to rekey_admin, rekey_operator;

create or replace function rekey._trusted_relation(extension name, schema name, name name, events integer = 0) returns regclass
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relation regclass;
  v_locked regclass;
begin
  -- Its lock keeps the extension, and so every name of it, as it is until the transaction ends: looked at, locked, looked at again.
  loop
    select c.oid into v_relation
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = schema and c.relname = name and c.relkind in ('r', 'v') and rekey._is_trusted(extension, 'pg_class', c.oid)
      -- Whoever has the privilege TRIGGER on a table can have his code run by who writes into it.
      and not exists (
        select from pg_trigger t join pg_proc p on p.oid = t.tgfoid
        where t.tgrelid = c.oid and not t.tgisinternal and t.tgtype::integer & events <> 0
          and not rekey._is_trusted(extension, 'pg_proc', p.oid) and not (select r.rolsuper from pg_roles r where r.oid = p.proowner));
    exit when v_relation is null or v_relation = v_locked;
    execute format('lock table %s in access share mode', v_relation);
    v_locked := v_relation;
  end loop;
  return v_relation;
end
$$;
comment on function rekey._trusted_relation is
  'A table or view, locked until the transaction ends, where it is the extension''s; NULL: there is none. events: no trigger of others may fire on these (4 INSERT, 8 DELETE, 16 UPDATE; bits of pg_trigger.tgtype). 42501: the caller may not read it.';
grant execute on function rekey._trusted_relation to rekey_admin, rekey_operator;

-- sql/code/13_own_tables.sql
-- Our own tables are as we made them, or nothing goes on. What hides rows of them from rekey_owner would make them count as
-- absent. (footer.sql has every definer function of rekey_owner run with row_security off, which makes PostgreSQL raise where a
-- policy would hide rows. This says it before that, in words, and finds what PostgreSQL does not mind.)

create or replace function rekey._table_problem(relation regclass) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case
    when c.relforcerowsecurity then
      format('FORCE ROW LEVEL SECURITY hides rows of %s from pg_rekey: ALTER TABLE %1$s NO FORCE ROW LEVEL SECURITY', c.oid::regclass)
    when pg_get_userbyid(c.relowner) <> 'rekey_owner' then
      format('%s belongs to %s: ALTER TABLE %1$s OWNER TO rekey_owner', c.oid::regclass, c.relowner::regrole)
    when c.relhassubclass and exists (select from pg_inherits i where i.inhparent = c.oid) then
      format('tables inherit from %s: ALTER TABLE ... NO INHERIT %1$s', c.oid::regclass)
    else coalesce(
      (select format('policy %I of %s is not pg_rekey''s: DROP POLICY %1$I ON %2$s', p.polname, c.oid::regclass)
       from pg_policy p
       where p.polrelid = c.oid and not (p.polpermissive and p.polcmd = 'r' and (c.relname, p.polname) in (
         ('secrets', 'secrets_tenant'), ('keyrings', 'keyrings_tenant'), ('keyrings', 'keyrings_all')))
       limit 1),
      (select format('rule %I of %s is not pg_rekey''s: DROP RULE %1$I ON %2$s', r.rulename, c.oid::regclass)
       from pg_rewrite r where r.ev_class = c.oid limit 1))
    end
  from pg_class c where c.oid = relation;
end;
comment on function rekey._table_problem is 'What hides or changes rows of a table of ours, and what to do about it; NULL: nothing.';

create or replace function rekey._own_problem() returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select min(rekey._table_problem(c.oid::regclass))
  -- (By what the schema has: where there are many tables, a search of pg_class takes long.)
  from pg_depend d join pg_class c on d.classid = 'pg_class'::regclass and c.oid = d.objid and c.relkind in ('r', 'p')
  where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'rekey'::regnamespace;
end;
comment on function rekey._own_problem is 'As rekey._table_problem(), of the first of our tables that has one.';

create or replace function rekey._refuse_hidden() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text := rekey._own_problem();
begin
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'RK005', hint = 'What is hidden would count as absent: nothing goes on until that is done.', constraint = 'own_tables';
  end if;
end
$$;
comment on function rekey._refuse_hidden is 'RK005 where a table of ours is not as we made it, so that rows may be hidden.';

-- sql/code/20_audit.sql
-- The audit log: a hash chain. Its head is locked last in a transaction, and briefly.

create or replace function rekey._claims() returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
begin
  if v_claims is null then
    return null;
  end if;
  return case when jsonb_typeof(v_claims::jsonb) = 'object' then v_claims::jsonb else '{}' end;
exception when invalid_text_representation or untranslatable_character then
  return '{}'::jsonb;
end
$$;
comment on function rekey._claims is 'The claims of the JWT as PostgREST passes them on; NULL where there are none, {} where they are no object.';

-- Neither role nor session_user tells the code of a protected table from the worker in whose session it runs. The call
-- stack does: nobody can take a line out of it, and who adds one only loses rights. (Names are quoted in it, where the
-- setting quote_all_identifiers is on.)
-- ANALYZE, REINDEX, REFRESH MATERIALIZED VIEW and autovacuum run what an owner put into his indexes, statistics and views:
-- as the owner, but in the session of whoever maintains the table. PostgreSQL tells by what it refuses then. UNLISTEN is
-- one of these statements, and else does nothing to a channel that nobody listens to.
create or replace function rekey._in_foreign_code() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
begin
  if current_setting('standard_conforming_strings') = 'off' then
    raise exception 'standard_conforming_strings is off: PL/pgSQL would read every backslash as an escape' using errcode = 'RK005',
      hint = 'Set standard_conforming_strings to on.';
  end if;
  get diagnostics v_stack = pg_context;
  -- Few stacks have one of the names in them: asking for those is quick, the expression is not.
  if (strpos(v_stack, '_call_') > 0 or strpos(v_stack, '_look') > 0 or strpos(v_stack, 'search_step') > 0 or strpos(v_stack, 'find_envelopes') > 0)
    and v_stack ~ '\mrekey"?\."?(_call_(count|scan|read|write|tenant_check)|search_step|_look|_look_ahead|find_envelopes)"?\(' then
    return true;
  end if;
  begin
    unlisten pg_rekey;
  exception when insufficient_privilege then
    return true;
  end;
  return false;
end
$$;
comment on function rekey._in_foreign_code is 'Whether code of somebody else is running in this session: of a protected table, or tenant_check, called by a dispatcher; or of a table, index or view that is being maintained.';

create or replace function rekey._caller() returns name
language sql volatile
return case when rekey._in_foreign_code() then 'rekey_sweeper' else coalesce(nullif(current_setting('role'), 'none'), session_user) end;
comment on function rekey._caller is 'The role that calls, seen from inside a SECURITY DEFINER function: the one set with SET ROLE, else the one that logged in. rekey_sweeper, which may nothing, in code of somebody else.';

create or replace function rekey._audit_hash(entry rekey.audit_log) returns bytea
language sql stable
return sha256(
  entry.prev_hash || rekey._part(entry.id::text)
  || rekey._part(to_char(entry.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'))
  || rekey._part(entry.actor) || rekey._part(entry.role) || rekey._part(entry.jwt_subject) || rekey._part(entry.event)
  || rekey._part(entry.keyring) || rekey._part(entry.version::text) || rekey._part(entry.rotation_id::text)
  || rekey._part(entry.details::text));
comment on function rekey._audit_hash is 'The hash of an audit entry (docs/format.md).';

create or replace function rekey._cut(value text, bytes integer) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case
  when octet_length(value) <= bytes then value
  -- A character has 4 bytes at most, whatever the encoding: so many fit for sure.
  when octet_length(left(value, bytes - 3)) <= bytes - 3 then left(value, bytes - 3) || '...'
  else left(value, (bytes - 3) / 4) || '...'
end;
comment on function rekey._cut is 'A text of at most so many bytes: what is longer ends with "...".';

-- However long a reason, an error or a name is, an entry stays small: nobody fills the disk with a few of them.
create or replace function rekey._cut_details(details jsonb) returns jsonb
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case
  when octet_length(details::text) <= 1024 then details
  when jsonb_typeof(details) <> 'object' or (select count(*) > 16 or max(octet_length(k)) > 63 from jsonb_object_keys(details) k)
    then jsonb_build_object('cut', rekey._cut(details::text, 1024))
  else (
    select jsonb_object_agg(d.key, case
      when octet_length(d.value::text) <= 1024 then d.value
      when jsonb_typeof(d.value) = 'string' then to_jsonb(rekey._cut(d.value #>> '{}', 1024))
      else to_jsonb(rekey._cut(d.value::text, 1024)) end)
    from jsonb_each(details) d)
end;
comment on function rekey._cut_details is 'Details of an audit entry, bounded: each text of 1024 bytes at most, what else is longer as the beginning of its text; more than 16 fields, or a field name over 63 bytes, as one text.';

create or replace function rekey._subject() returns text
language sql stable
set search_path = pg_catalog, pg_temp
return rekey._cut(rekey._claims() ->> 'sub', 255);
comment on function rekey._subject is 'The subject of the JWT as the audit log has it.';

create or replace function rekey._requester() returns text
language sql stable
set search_path = pg_catalog, pg_temp
return concat(rekey._subject() || ' as ', rekey._caller());
comment on function rekey._requester is 'Who asks for a rotation: the role that calls; before it the subject of the JWT, where there is one.';

create or replace function rekey._audit_all(events jsonb) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_head rekey._audit_head;
  v_entry rekey.audit_log;
  v_entries rekey.audit_log[];
  v_event jsonb;
  v_place integer := 0;
begin
  if jsonb_array_length(events) = 0 then
    return;
  end if;
  if rekey._in_foreign_code() then
    raise exception 'code of a table may not do what is audited' using errcode = 'insufficient_privilege',
      hint = 'The entry would name whoever works on the rotation, or maintains the table.';
  end if;
  -- A crash may not take back what was told to somebody: the key of an envelope that was handed out, the end of a rotation, a checkpoint.
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  insert into rekey._audit_head (id, hash) values (0, sha256('pg_rekey/v1/audit')) on conflict do nothing;
  select * into strict v_head from rekey._audit_head for update;
  v_entry.actor := session_user;
  v_entry.role := current_setting('role');
  v_entry.jwt_subject := rekey._subject();
  for v_event in select e.value from jsonb_array_elements(events) with ordinality e(value, place) order by e.place loop
    v_place := v_place + 1;
    v_entry.id := v_head.id + v_place;
    v_entry.at := clock_timestamp();
    v_entry.event := v_event ->> 'event';
    v_entry.keyring := rekey._cut(v_event ->> 'keyring', 255);
    v_entry.version := (v_event ->> 'version')::integer;
    v_entry.rotation_id := (v_event ->> 'rotation_id')::bigint;
    v_entry.details := coalesce(rekey._cut_details(v_event -> 'details'), '{}');
    v_entry.prev_hash := v_head.hash;
    v_entry.hash := rekey._audit_hash(v_entry);
    v_head.hash := v_entry.hash;
    v_entries[v_place] := v_entry;
  end loop;
  insert into rekey.audit_log select e.* from unnest(v_entries) e;
  update rekey._audit_head set id = v_entry.id, hash = v_entry.hash where singleton;
end
$$;
comment on function rekey._audit_all is 'Adds entries to the audit log: an array of objects with event, keyring, version, rotation_id and details. What is long in them is cut. The transaction is on disk, and on synchronous standbys, when it ends, whatever synchronous_commit is in the session.';

create or replace function rekey._audit(
  event text, keyring text = null, version integer = null, rotation_id bigint = null, details jsonb = '{}'
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform rekey._audit_all(jsonb_build_array(jsonb_build_object(
    'event', _audit.event, 'keyring', _audit.keyring, 'version', _audit.version,
    'rotation_id', _audit.rotation_id, 'details', jsonb_strip_nulls(_audit.details))));
end
$$;
comment on function rekey._audit is 'Adds one entry to the audit log.';

create or replace function rekey._refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Nothing is ever taken out of this table.';
end
$$;
comment on function rekey._refuse_change is 'Trigger: refuses every statement it is set on (42501).';

-- What tells the function is a row that only it and the owner can write: a setting would be anybody's.
create or replace function rekey._refuse_audit_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'DELETE' and exists (select from rekey._audit_head h where h.pruning = pg_current_xact_id()) then
    return null;
  end if;
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Only rekey.prune_audit_log() takes something out of this table.', constraint = 'export';
end
$$;
comment on function rekey._refuse_audit_change is 'Trigger of the audit log: refuses every change (42501) but the removal by rekey.prune_audit_log().';

create or replace trigger audit_log_append_only before update or delete or truncate on rekey.audit_log
  for each statement execute function rekey._refuse_audit_change();
create or replace trigger encryption_keys_keep before delete or truncate on rekey.encryption_keys
  for each statement execute function rekey._refuse_change();

grant select on rekey.audit_log to rekey_auditor;

create or replace function rekey.audit_checkpoint() returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    'id', coalesce(h.id, 0), 'hash', encode(coalesce(h.hash, sha256('pg_rekey/v1/audit')), 'hex'),
    'entries', (select count(*) from rekey.audit_log),
    'at', to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), 'database', current_database())
  from (select) as one left join rekey._audit_head h on true;
end;
comment on function rekey.audit_checkpoint is
  'The end of the audit log now: number and hash of its last entry, count of its entries. Sign it and keep it elsewhere (pg-rekey audit checkpoint): it is the anchor of rekey.verify_audit_log().';
grant execute on function rekey.audit_checkpoint to rekey_auditor, rekey_operator;

create or replace function rekey._is_kept(event text) returns boolean
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return event like 'key.%' or event like 'kek.%' or event = 'audit.pruned';
comment on function rekey._is_kept is 'Whether entries of this event are never removed from the audit log: what became of keys, and what was removed.';

create or replace function rekey._audit_start(out id bigint, out last bigint, out hash bytea, out kept bigint, out kept_hash text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select a.id, (a.details ->> 'last')::bigint, decode(a.details ->> 'hash', 'hex'), (a.details ->> 'kept')::bigint, a.details ->> 'kept_hash'
  into id, last, hash, kept, kept_hash
  from rekey.audit_log a
  where a.event = 'audit.pruned'
    -- One that somebody made up counts for nothing, and so is found.
    and a.details ->> 'last' ~ '^\d{1,18}$' and a.details ->> 'hash' ~ '^[0-9a-f]{64}$' and a.details ->> 'kept' ~ '^\d{1,18}$'
  order by a.id desc
  limit 1;
  if not found or last >= id then
    id := null;
    last := 0;
    hash := sha256('pg_rekey/v1/audit');
    kept := 0;
    kept_hash := null;
  end if;
end
$$;
comment on function rekey._audit_start is 'Where the chain begins that is all there: the last audit.pruned, number and hash of the entry that it removed last, and count and hash of the earlier ones that stayed. 0 and the first prev_hash where nothing was removed.';

create or replace function rekey._kept_hash(last bigint, out kept bigint, out hash text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select count(*), encode(sha256(coalesce(string_agg(a.hash, ''::bytea order by a.id), '')), 'hex')
  from rekey.audit_log a
  where a.id <= _kept_hash.last and rekey._is_kept(a.event);
end;
comment on function rekey._kept_hash is 'How many entries up to a number are of those that are never removed, and SHA-256 over their hashes in order.';

create or replace function rekey._first_bad(start bigint, hash bytea, out id bigint, out reason text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.id, c.why
  from (
    select e.id,
      case
        when e.chained and e.id <> e.place then 'an entry is missing before it'
        when e.chained and e.prev_hash <> e.hash_before then 'it does not follow from the entry before it'
        when e.hash <> e.computed then 'it was changed'
        when not (e.chained or rekey._is_kept(e.event)) then 'it was removed once'
      end as why
    from (
      select a.id, a.event, a.prev_hash, a.hash, rekey._audit_hash(a) as computed, c.chained,
        _first_bad.start + row_number() over chain as place,
        lag(a.hash, 1, _first_bad.hash) over chain as hash_before
      from rekey.audit_log a
      -- Of what stayed from before a removal, each entry proves itself; rekey._kept_hash() proves all of them.
      cross join lateral (select a.id > _first_bad.start or _first_bad.start = 0 as chained) c
      window chain as (partition by c.chained order by a.id)
    ) e
  ) c
  where c.why is not null
  order by c.id
  limit 1;
end;
comment on function rekey._first_bad is 'The first entry of the audit log that is not as it should be, where the chain is all there from the entry after start on.';

create or replace function rekey.verify_audit_log(anchor jsonb = null,
  out valid boolean, out entries bigint, out first_bad bigint, out reason text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_head record;
  v_start record;
  v_kept record;
  v_last bigint;
  v_hash bytea;
  v_anchor bigint;
  v_found bytea;
begin
  if anchor is not null and not coalesce(
       jsonb_typeof(anchor) = 'object' and anchor ->> 'id' ~ '^\d{1,18}$' and anchor ->> 'hash' ~ '^[0-9a-f]{64}$', false) then
    raise exception 'the anchor has no id and hash'
      using errcode = 'invalid_parameter_value', hint = 'Give what rekey.audit_checkpoint() returned.', constraint = 'anchor';
  end if;
  v_start := rekey._audit_start();
  v_kept := rekey._kept_hash(v_start.last);
  select coalesce(h.id, 0) as id, coalesce(h.hash, sha256('pg_rekey/v1/audit')) as hash into v_head
  from (select) as one left join rekey._audit_head h on true;
  select count(*) into entries from rekey.audit_log;
  select b.id, b.reason into first_bad, reason from rekey._first_bad(v_start.last, v_start.hash) b;

  if reason is null and v_start.last > 0 and (v_kept.kept, v_kept.hash) is distinct from (v_start.kept, v_start.kept_hash) then
    first_bad := v_start.id;
    reason := 'the entries before it are not those that stayed when it was written';
  end if;
  select a.id, a.hash into v_last, v_hash from rekey.audit_log a where a.id > v_start.last order by a.id desc limit 1;
  if reason is null and (v_head.id, v_head.hash) is distinct from (coalesce(v_last, v_start.last), coalesce(v_hash, v_start.hash)) then
    first_bad := coalesce(v_last, v_start.last) + 1;
    reason := 'entries are missing at the end';
  end if;
  if reason is null and anchor is not null then
    v_anchor := (anchor ->> 'id')::bigint;
    select a.hash into v_found from rekey.audit_log a where a.id = v_anchor;
    if v_anchor = v_start.last then
      v_found := v_start.hash;
    end if;
    if v_anchor > v_head.id then
      first_bad := v_head.id + 1;
      reason := 'the log ends before the anchor';
    elsif v_anchor >= v_start.last and v_found is null or encode(v_found, 'hex') <> anchor ->> 'hash' then
      first_bad := v_anchor;
      reason := 'the log is not the one that was anchored';
    elsif v_anchor < v_start.last then
      first_bad := v_anchor;
      reason := format('the anchor is older than entry %s, up to which entries were removed: the file that they are in is needed', v_start.last);
    end if;
  end if;
  valid := reason is null;
end
$$;
comment on function rekey.verify_audit_log is
  'Checks the chain of the audit log, from its beginning, or from where rekey.prune_audit_log() removed entries; of those that stayed from before, that they are all there and unchanged. valid: whether it holds; entries: how many there are; first_bad and reason: the first one that does not fit. anchor: an earlier result of rekey.audit_checkpoint(), kept elsewhere; without one, a chain that was computed anew is not found out. An anchor from before the entries that were removed is not valid by itself: pg-rekey audit verify --archive takes the files that these are in. 22023 for an anchor that is none.';
grant execute on function rekey.verify_audit_log to rekey_auditor, rekey_operator;

-- sql/code/21_audit_prune.sql
-- Old entries leave the audit log for a file, and leave an entry that tells which.

-- Before it removes anything: what is gone could not be looked at again.
create or replace function rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_keep interval := (rekey._settings()).audit_keep;
  v_until timestamptz;
  v_verified record;
begin
  if last <= v_start then
    raise exception 'entries up to % were removed already', v_start using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  if first <> v_start + 1 then
    raise exception 'the file begins at entry %, and the log at entry %', first, v_start + 1 using errcode = 'RK006',
      hint = 'Nothing is removed that is in no file. Export again: pg-rekey audit export.', constraint = 'export';
  end if;
  v_verified := rekey.verify_audit_log(checkpoint -> 'checkpoint');
  if not v_verified.valid then
    raise exception 'the audit log does not hold at entry %: %', v_verified.first_bad, v_verified.reason using errcode = 'RK006',
      hint = 'Nothing is removed from a log that is not whole: rekey.verify_audit_log() tells what is wrong.', constraint = 'verify';
  end if;
  if not exists (select from rekey.audit_log a where a.id = last and encode(a.hash, 'hex') = _refuse_prune.hash) then
    raise exception 'entry % of the file is not that of the log', last using errcode = 'invalid_parameter_value',
      hint = 'Give number and hash of the last entry of a file that was exported from this log.', constraint = 'export';
  end if;
  -- By the log's own time: a clock that jumped ahead makes nothing old that was written before.
  select least(a.at, clock_timestamp()) - v_keep into v_until
  from rekey.audit_log a where a.id = (checkpoint -> 'checkpoint' ->> 'id')::bigint;
  if v_until is null or exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and a.at >= v_until) then
    raise exception 'entries up to % are not older than % before the checkpoint', last, v_keep using errcode = 'RK006',
      hint = 'The setting audit_keep says how long entries stay. Export fewer of them, or wait.';
  end if;
  if not exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and not rekey._is_kept(a.event)) then
    raise exception 'up to entry % there is nothing to remove', last using errcode = 'RK006',
      hint = 'Entries key.*, kek.* and audit.pruned stay for ever. Export more of them, or wait.';
  end if;
end
$$;
comment on function rekey._refuse_prune is 'Refuses a removal from the audit log that rekey.prune_audit_log() may not do: RK006, 22023.';

create or replace function rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_kept record;
  v_removed bigint;
begin
  perform rekey._refuse_snapshot();
  if not coalesce(first > 0 and last >= first and hash ~ '^[0-9a-f]{64}$' and file_sha256 ~ '^[0-9a-f]{64}$', false) then
    raise exception 'number, hash and file are not told' using errcode = 'invalid_parameter_value',
      hint = 'Give the first and last entry of an export, the hash of the last and the SHA-256 of the file, in hexadecimal: pg-rekey audit prune does.', constraint = 'export';
  end if;
  if not coalesce(checkpoint -> 'checkpoint' ->> 'id' ~ '^\d{1,18}$' and checkpoint -> 'checkpoint' ->> 'hash' ~ '^[0-9a-f]{64}$'
      and checkpoint ->> 'signature' <> '' and octet_length(checkpoint::text) <= 1000
      and (checkpoint -> 'checkpoint' ->> 'id')::bigint >= last, false) then
    raise exception 'there is no signed checkpoint from after entry %', last using errcode = 'invalid_parameter_value',
      hint = 'Export with a key that signs: pg-rekey audit export FILE --key KEY.', constraint = 'export';
  end if;
  perform rekey._refuse_prune(first, last, hash, checkpoint);
  -- Only now, since looking at the log takes a while. What it was found to be it stays, but for another removal.
  perform from rekey._audit_head for update;
  if (rekey._audit_start()).last <> v_start then
    raise exception 'entries were removed by another session meanwhile' using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  v_kept := rekey._kept_hash(last);
  update rekey._audit_head set pruning = pg_current_xact_id() where singleton;
  delete from rekey.audit_log a where a.id <= last and not rekey._is_kept(a.event);
  get diagnostics v_removed = row_count;
  update rekey._audit_head set pruning = null where singleton;
  perform rekey._audit('audit.pruned', details => jsonb_build_object(
    'first', first, 'last', last, 'hash', hash, 'removed', v_removed, 'kept', v_kept.kept, 'kept_hash', v_kept.hash,
    'file_sha256', file_sha256, 'checkpoint', checkpoint));
  return v_removed;
end
$$;
comment on function rekey.prune_audit_log is
  'Removes entries from the audit log that are in a file now (pg-rekey audit export, pg-rekey audit prune), and returns how many. first, last: numbers of the first and the last entry in the file; hash: hash of the last one. file_sha256: SHA-256 of the file, in hexadecimal. checkpoint: a signed checkpoint from after that entry; who calls checks its signature. All must be older than the setting audit_keep before the checkpoint. Entries key.*, kek.* and audit.pruned stay. Leaves audit.pruned, from which rekey.verify_audit_log() goes on. A right of its own: the owner of the function, or a superuser, grants EXECUTE on it, and no role of pg_rekey has it. 22023 for arguments that cannot be or are not of this log; RK006 where entries are too new, were removed already, or the log does not hold; 25001 outside READ COMMITTED.';

-- sql/code/30_settings.sql
create or replace function rekey._settings() returns rekey.settings
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings;
begin
  select * into v_settings from rekey.settings;
  if not found then
    raise exception 'pg_rekey is installed but not set up' using errcode = 'RK001',
      hint = 'Register a KEK: pg-rekey init, or select rekey.register_kek().', constraint = 'register_kek';
  end if;
  return v_settings;
end
$$;
comment on function rekey._settings is 'The settings. RK001 before rekey.register_kek().';

create or replace function rekey._step_limit() returns interval
language sql stable
set search_path = pg_catalog, pg_temp
return (select coalesce(s.step_limit, 100 * s.batch_target) from rekey.settings s);
comment on function rekey._step_limit is 'Time after which a batch is cancelled; NULL before rekey.register_kek().';

create or replace function rekey._ensure_rows() returns void
language sql
set search_path = pg_catalog, pg_temp
begin atomic
  insert into rekey.settings default values on conflict do nothing;
  insert into rekey._worker default values on conflict do nothing;
  insert into rekey._session_key (key) values (rekey._random_bytes(64)) on conflict do nothing;  -- a standby makes none
end;
comment on function rekey._ensure_rows is 'Makes the rows that there is one of. (The installation makes none: a restored dump brings its own.)';

-- Executable by administrators because rekey.set_setting() runs with its caller's rights.
create or replace function rekey._store_setting(name text, value text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_type regtype;
  v_old text;
  v_new text;
begin
  select a.atttypid into v_type
  from pg_attribute a
  where a.attrelid = 'rekey.settings'::regclass and a.attname = _store_setting.name and a.attnum > 0
    and not a.attisdropped and a.attname <> 'singleton';
  if not found then
    raise exception 'no such setting: %', coalesce(quote_literal(name), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'See rekey.setting_status for their names.', constraint = 'settings';
  end if;
  if _store_setting.name = 'tenant_check' and value is not null and (
       cardinality(parse_ident(value)) <> 2
       or not exists (select from pg_proc p where p.oid = to_regprocedure(value || '(uuid)') and p.prorettype = 'boolean'::regtype)) then
    raise exception 'there is no function %(uuid) returns boolean', value using errcode = 'invalid_parameter_value',
      hint = 'Give the name of a function (uuid) returns boolean, with its schema.';
  end if;
  perform rekey._ensure_rows();
  select to_jsonb(s) ->> _store_setting.name into v_old from rekey.settings s for update;
  begin
    if value is null then
      execute format('update rekey.settings set %I = default where singleton', _store_setting.name);
    else
      execute format('update rekey.settings set %I = $1::%s where singleton', _store_setting.name, v_type) using value;
    end if;
  exception when check_violation or data_exception then
    raise exception 'setting % cannot be %', name, quote_literal(value) using errcode = 'invalid_parameter_value',
      hint = (select col_description('rekey.settings'::regclass, a.attnum)
              from pg_attribute a where a.attrelid = 'rekey.settings'::regclass and a.attname = _store_setting.name);
  end;
  select to_jsonb(s) ->> _store_setting.name into v_new from rekey.settings s;
  if v_new is distinct from v_old then
    perform rekey._audit('setting.changed', details => jsonb_build_object('name', name, 'from', v_old, 'to', v_new));
  end if;
end
$$;
comment on function rekey._store_setting is 'What rekey.set_setting() does with the rights of rekey_owner.';
grant execute on function rekey._store_setting to rekey_admin;

create or replace function rekey.set_setting(name text, value text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform rekey._store_setting(name, value);
  if name = 'kek_provider' and value = 'vault' and rekey._is_trusted('supabase_vault', 'pg_class', to_regclass('vault.decrypted_secrets')) then
    if not (has_schema_privilege('rekey_owner', 'vault', 'usage')
            and has_table_privilege('rekey_owner', 'vault.decrypted_secrets', 'select')) then
      grant usage on schema vault to rekey_owner;
      grant select on vault.decrypted_secrets to rekey_owner;
    end if;
    -- Supabase's view decrypts with its reader's rights.
    if rekey._trusted_function('supabase_vault', 'vault._crypto_aead_det_decrypt(bytea,bytea,bigint,bytea,bytea)') is not null
       and not has_function_privilege('rekey_owner', 'vault._crypto_aead_det_decrypt(bytea,bytea,bigint,bytea,bytea)', 'execute') then
      execute 'grant execute on function vault._crypto_aead_det_decrypt(bytea, bytea, bigint, bytea, bytea) to rekey_owner';
    end if;
  elsif name = 'kek_provider' and value = 'file'
        and not has_function_privilege('rekey_owner', 'pg_catalog.pg_read_binary_file(text,bigint,bigint,boolean)', 'execute') then
    grant execute on function pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) to rekey_owner;
  end if;
end
$$;
comment on function rekey.set_setting is
  'Changes a setting (columns of rekey.settings); value NULL: back to its default. With kek_provider vault or file it also grants rekey_owner what reading the KEK there takes, with the rights of the caller. 22023 for a name or value that cannot be.';
grant execute on function rekey.set_setting to rekey_admin;

create or replace view rekey.setting_status as
select a.attname::text as name, to_jsonb(s) ->> a.attname as value, col_description(a.attrelid, a.attnum) as description
from pg_attribute a
cross join rekey.settings s
where a.attrelid = 'rekey.settings'::regclass and a.attnum > 0 and not a.attisdropped and a.attname <> 'singleton';
comment on view rekey.setting_status is 'The settings: name, value, and what it means.';
comment on column rekey.setting_status.name is 'Name of the setting.';
comment on column rekey.setting_status.value is 'Its value as text; NULL: none.';
comment on column rekey.setting_status.description is 'What it means.';
grant select on rekey.setting_status to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/31_kek.sql
-- Key bytes go through plain assignments of expressions that the planner can inline, with variables as arguments: a
-- statement's parameters, and those of a function that is not inlined, can be logged.
-- The key-encryption key: how a session brings it, where else it may be read, and what it derives.

-- backend_start would say more than the postmaster's start, but is hidden from a role that may not see other sessions.
create or replace function rekey._session_aad(scope text) returns bytea
language sql stable
return rekey._part('session') || rekey._part(scope) || int4send(pg_backend_pid()) || timestamptz_send(pg_postmaster_start_time())
  || rekey._part(session_user::text) || case when scope <> 's' then timestamptz_send(transaction_timestamp()) else ''::bytea end;
comment on function rekey._session_aad is 'What an unlocked session is bound to: server process, server start, login, and unless scope is s the transaction.';

create or replace function rekey._session_seal() returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seal bytea;
begin
  select s.key into v_seal from rekey._session_key s;
  if not found then
    insert into rekey._session_key (key) values (rekey._random_bytes(64)) on conflict do nothing;
    select s.key into strict v_seal from rekey._session_key s;
  end if;
  return v_seal;
end
$$;
comment on function rekey._session_seal is 'The key under which sessions carry secrets; made by the first that does.';

-- Raises nothing: an expression that failed once is evaluated with parameters from then on in that transaction, and a second
-- attempt, with the right KEK, would be logged.
create or replace function rekey._unlock(kek bytea, scope text, out fingerprint text, out problem text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_first text;
  v_second text;
  v_active text;
  v_seal bytea;
  v_iv bytea;
  v_aad bytea;
  v_sealed bytea;
  v_set text;
begin
  if scope is null or scope not in ('transaction', 'session', 'replacement') then
    problem := 'scope';
    return;
  end if;
  if coalesce(octet_length(kek), 0) not in (32, 64) then
    problem := 'length';
    return;
  end if;
  v_first := rekey._fingerprint(substr(kek, 1, 32));
  if octet_length(kek) = 64 then
    v_second := rekey._fingerprint(substr(kek, 33, 32));
  end if;
  select k.fingerprint into v_active from rekey.keks k where k.state = 'active';
  if v_active not in (v_first, coalesce(v_second, v_first)) and scope <> 'replacement' then
    problem := v_active;
    return;
  end if;
  v_seal := rekey._session_seal();
  v_iv := rekey._random_bytes(16);
  v_aad := rekey._session_aad(left(scope, 1));
  v_sealed := rekey._aead_encrypt(v_seal, v_iv, kek, v_aad);
  -- Not PERFORM, which auto_explain and pgaudit would print with its arguments.
  v_set := set_config('rekey.unlocked', left(scope, 1) || encode(v_iv || v_sealed, 'hex'), scope <> 'session');
  fingerprint := case when v_second = v_active and v_set <> '' then v_second else v_first end;
end
$$;
comment on function rekey._unlock is 'What rekey.unlock() does; problem: scope, length, or the fingerprint of the KEK that is active.';
grant execute on function rekey._unlock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey._refuse_unlock(problem text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem = 'scope' then
    raise exception 'scope is transaction, session or replacement' using errcode = 'invalid_parameter_value';
  elsif problem = 'length' then
    raise exception 'a KEK has 32 bytes' using errcode = 'invalid_parameter_value',
      hint = 'pg-rekey kek generate makes one. With 64 bytes, the current KEK and the next one are given together.';
  elsif problem is not null then
    raise exception 'wrong KEK' using errcode = 'RK002',
      hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', problem);
  end if;
end
$$;
comment on function rekey._refuse_unlock is 'Raises the error for a problem of rekey._unlock().';
grant execute on function rekey._refuse_unlock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey.unlock(kek bytea, scope text = 'transaction') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_done record;
begin
  v_done := rekey._unlock(kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;
comment on function rekey.unlock(bytea, text) is
  'Lets this transaction or session use the KEK. kek: 32 bytes, or 64: the current and the next one. scope: transaction (till its end), session (till rekey.lock(); not behind a transaction pooler) or replacement (as transaction, for a KEK that is to replace a lost one). Returns the fingerprint. A bind parameter may be logged by the server: rekey.unlock_copied() avoids that. RK002: it is not the active KEK; 22023: wrong length or scope.';
grant execute on function rekey.unlock(bytea, text) to rekey_admin, rekey_operator, rekey_app;

-- Runs with the caller's rights: what stands in pg_temp is the caller's, and may be a view.
create or replace function rekey.unlock_copied(scope text = 'transaction') returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek bytea;
  v_done record;
begin
  -- Dynamic, so that whoever checks all functions does not stumble over a table that is there only for the moment.
  execute format('select string_agg(k.kek, ''''::bytea order by k.ctid) from pg_temp.%I k', 'pg_rekey_kek') into v_kek;
  v_done := rekey._unlock(v_kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;
comment on function rekey.unlock_copied is
  'As rekey.unlock(), with the KEK from the temporary table pg_rekey_kek (kek bytea), which a binary COPY filled and no log shows: one row, or two: the current and the next KEK. A standby takes no temporary tables: there, a provider or rekey.unlock() brings the KEK. 42P01 without that table.';
grant execute on function rekey.unlock_copied to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey.lock() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('rekey.unlocked', '', false), set_config('rekey.unlocked', '', true);
end
$$;
comment on function rekey.lock is 'Forgets the KEK of this session and transaction.';
grant execute on function rekey.lock to rekey_admin, rekey_operator, rekey_app;

create or replace function rekey._parse_kek(value text) returns bytea
language sql immutable parallel safe
return case
  when value ~ '^[ \t\r\n]*[0-9A-Fa-f]{64}[ \t\r\n]*$' then decode(btrim(value, E' \t\r\n'), 'hex')
  when value ~ '^[ \t\r\n]*[A-Za-z0-9+/]{43}=[ \t\r\n]*$' then decode(btrim(value, E' \t\r\n'), 'base64') end;
comment on function rekey._parse_kek is 'The 32 bytes of a KEK in hex or base64; NULL for anything else.';

create or replace function rekey._session_keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_set text := current_setting('rekey.unlocked', true);
  v_seal bytea;
  v_bytes bytea;
  v_iv bytea;
  v_aad bytea;
  v_keks bytea;
begin
  -- IV, 32 or 64 bytes with padding, tag, in hex
  if coalesce(length(v_set), 0) not in (193, 257) or v_set !~ '^[tsr][0-9a-f]+$' then
    return null;
  end if;
  select s.key into v_seal from rekey._session_key s;
  if not found then
    return null;
  end if;
  v_bytes := decode(substr(v_set, 2), 'hex');
  v_iv := substr(v_bytes, 1, 16);
  v_bytes := substr(v_bytes, 17);
  v_aad := rekey._session_aad(left(v_set, 1));
  v_keks := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  return v_keks;
end
$$;
comment on function rekey._session_keks is 'The KEK, or the current and the next one, that this session unlocked itself with; NULL if it did not.';

create or replace function rekey._provided_keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings := rekey._settings();
  v_text text;
  v_next_text text;
  v_kek bytea;
  v_next bytea;
begin
  if v_settings.kek_provider = 'vault' then
    if rekey._trusted_relation('supabase_vault', 'vault', 'decrypted_secrets') is null then
      raise exception 'this database has no Supabase Vault' using errcode = 'undefined_table';
    end if;
    execute 'select (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1),
                    (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1 || ''_new'')'
      into v_text, v_next_text using v_settings.kek_secret_name;
  elsif v_settings.kek_provider = 'file' then
    v_text := encode(pg_read_binary_file(v_settings.kek_file, 0, 200, true), 'escape');
    v_next_text := encode(pg_read_binary_file(v_settings.kek_file || '_new', 0, 200, true), 'escape');
  end if;
  v_kek := rekey._parse_kek(v_text);
  v_next := rekey._parse_kek(v_next_text);
  return coalesce(v_kek || v_next, v_kek, v_next);
exception
  when insufficient_privilege or undefined_table or undefined_function or invalid_schema_name or wrong_object_type
    or system_error or io_error then
    raise exception 'the KEK provider % cannot be read: %', v_settings.kek_provider, sqlerrm using errcode = 'RK001',
      hint = format('Run select rekey.set_setting(''kek_provider'', %L) as a role that may grant what it needs.', v_settings.kek_provider), constraint = 'set_provider';
end
$$;
comment on function rekey._provided_keks is 'The KEK, and the next one where there is one, from the Vault or the file that the settings name; NULL without. RK001: it cannot be read.';

create or replace function rekey._keks() returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keks bytea := rekey._session_keks();
begin
  if v_keks is null then
    v_keks := rekey._provided_keks();
  end if;
  if v_keks is null then
    raise exception 'the KEK is not available' using errcode = 'RK001',
      hint = case (rekey._settings()).kek_provider
        when 'session' then 'Unlock first, in the same transaction: rekey.unlock(), or pg_rekey.unlock() in Python. Outside of a transaction it ends with its statement, unless its scope is session.'
        when 'vault' then format('The Vault has no secret %L of 64 hex characters or base64.', (rekey._settings()).kek_secret_name)
        else format('The file %L in the data directory is missing or holds no key.', (rekey._settings()).kek_file)
      end, constraint = case (rekey._settings()).kek_provider when 'session' then 'unlock' else '' end;
  end if;
  return v_keks;
end
$$;
comment on function rekey._keks is 'The KEK that can be had now, or the current and the next one. RK001: none.';

create or replace function rekey._kek(out id integer, out kek bytea)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint text;
  v_keks bytea;
begin
  select k.id, k.fingerprint into _kek.id, v_fingerprint from rekey.keks k where k.state = 'active';
  if not found then
    raise exception 'no KEK is registered' using errcode = 'RK001',
      hint = 'Register one: pg-rekey init, or select rekey.register_kek().', constraint = 'register_kek';
  end if;
  v_keks := rekey._keks();
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    kek := substr(v_keks, 1 + 32 * v_place, 32);
    if rekey._fingerprint(kek) = v_fingerprint then
      return;
    end if;
  end loop;
  raise exception 'wrong KEK' using errcode = 'RK002',
    hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', v_fingerprint);
end
$$;
comment on function rekey._kek is 'The active KEK and its number. RK001: not available; RK002: another one is.';

create or replace function rekey._lock_kek() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  for v_try in 1 .. 5 loop
    perform from rekey.keks k where k.state = 'active' for share;
    exit when found or not exists (select from rekey.keks);
  end loop;
end
$$;
comment on function rekey._lock_kek is 'Keeps the active KEK from being replaced until the end of the transaction: taken by whoever makes a DEK.';

create or replace function rekey._new_kek() returns bytea
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keks bytea := rekey._keks();
  v_kek bytea;
  v_fingerprint text;
begin
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    v_kek := substr(v_keks, 1 + 32 * v_place, 32);
    v_fingerprint := rekey._fingerprint(v_kek);
    if not exists (select from rekey.keks k where k.fingerprint = v_fingerprint) then
      return v_kek;
    end if;
  end loop;
  return null;
end
$$;
comment on function rekey._new_kek is 'The first KEK at hand that is not registered; NULL without.';

create or replace function rekey.register_kek(replace_lost boolean = false) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_active rekey.keks;
  v_kek bytea;
  v_fingerprint text;
  v_id integer;
begin
  perform rekey._ensure_rows();
  select * into v_active from rekey.keks where state = 'active' for update;
  if found and not replace_lost then
    return (select k.id from rekey._kek() k);  -- safe to repeat, and refuses another KEK
  end if;
  v_kek := rekey._new_kek();
  if v_kek is null then
    raise exception 'that KEK is registered already' using errcode = 'RK006',
      hint = 'A KEK that was retired or lost does not become active again. pg-rekey kek generate makes a new one.';
  end if;
  v_fingerprint := rekey._fingerprint(v_kek);
  update rekey.keks set state = 'lost', retired_at = now() where id = v_active.id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_id;
  if v_active.id is not null then
    perform rekey._replace_lost_keys(v_active.id);
    perform rekey._audit('kek.lost', version => v_active.id);
  end if;
  perform rekey._audit('kek.registered', version => v_id, details => jsonb_build_object('fingerprint', v_fingerprint));
  return v_id;
end
$$;
comment on function rekey.register_kek is
  'Registers the KEK that this session, the Vault or the file holds, and returns its number; repeated, it only checks it. replace_lost => true declares the active KEK lost for ever: what it wraps cannot be opened any more, every keyring gets a new version under the new KEK. RK001: no KEK at hand; RK002: another one is active; RK006: it was in use before.';
grant execute on function rekey.register_kek to rekey_admin;

create or replace function rekey.rotate_kek() returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_old_id integer;
  v_old bytea;
  v_new_id integer;
  v_new bytea;
  v_fingerprint text;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea;
  v_key record;
  v_count integer := 0;
begin
  perform from rekey.keks k where k.state = 'active' for update;
  select k.id, k.kek into v_old_id, v_old from rekey._kek() k;
  v_new := rekey._new_kek();
  if v_new is null then
    raise exception 'there is no next KEK: number % is active already, and no other is at hand', v_old_id using errcode = 'RK001',
      hint = 'Give the current and the next one: PG_REKEY_NEW_KEK for pg-rekey, the Vault secret or file with _new appended, or 64 bytes to rekey.unlock().', constraint = 'next_kek';
  end if;
  v_fingerprint := rekey._fingerprint(v_new);
  v_old := rekey._wrapping_key(v_old);
  v_new := rekey._wrapping_key(v_new);
  update rekey.keks set state = 'retired', retired_at = now() where id = v_old_id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_new_id;
  for v_key in
    select k.id, k.keyring_id, k.version, k.wrapped_key from rekey.encryption_keys k
    where k.kek_id = v_old_id and k.state <> 'destroyed'
    order by k.id for update
  loop
    v_aad := rekey._wrap_aad(v_old_id, v_key.keyring_id, v_key.version);
    v_dek := rekey._unwrap(v_old, v_key.wrapped_key, v_aad);
    if v_dek is null then
      raise exception 'version % of keyring % cannot be unwrapped: nothing was changed', v_key.version,
        (select r.name from rekey.keyrings r where r.id = v_key.keyring_id)
        using errcode = 'RK003', hint = 'Its wrapped key is damaged. Restore rekey.encryption_keys from a backup first.';
    end if;
    v_iv := rekey._random_bytes(16);
    v_aad := rekey._wrap_aad(v_new_id, v_key.keyring_id, v_key.version);
    v_wrapped := rekey._wrap(v_new, v_iv, v_dek, v_aad);
    update rekey.encryption_keys set wrapped_key = v_wrapped, kek_id = v_new_id where id = v_key.id;
    v_count := v_count + 1;
  end loop;
  -- One that does not open stays as it is: it can be added again, and holds nobody up.
  for v_key in select e.id, e.sealed from rekey._endpoints e where e.kek_id = v_old_id order by e.id for no key update loop
    v_iv := substr(v_key.sealed, 1, 16);
    v_wrapped := substr(v_key.sealed, 17);
    v_aad := rekey._endpoint_aad(v_old_id, v_key.id);
    v_dek := rekey._aead_decrypt(v_old, v_iv, v_wrapped, v_aad);
    if v_dek is not null then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._endpoint_aad(v_new_id, v_key.id);
      v_wrapped := rekey._aead_encrypt(v_new, v_iv, v_dek, v_aad);
      update rekey._endpoints set sealed = v_iv || v_wrapped, kek_id = v_new_id where id = v_key.id;
    end if;
  end loop;
  perform rekey._audit('kek.rotated', version => v_new_id,
    details => jsonb_build_object('from', v_old_id, 'fingerprint', v_fingerprint, 'keys', v_count));
  return v_new_id;
end
$$;
comment on function rekey.rotate_kek is
  'Wraps every DEK anew under the next KEK, and the addresses of endpoints, in one transaction; no data is touched. Needs the current and the next KEK at hand. Returns the number of the new one. Keep the old one as long as backups. RK001: one is missing; RK003: a wrapped key is damaged.';
grant execute on function rekey.rotate_kek to rekey_admin;
grant select on rekey.keks to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/32_keys.sql
-- Data-encryption keys: wrapping, the state graph, and which one writers use.

create or replace function rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) returns bytea
language sql stable parallel safe
return rekey._header(keyring_id, version) || rekey._part('dek') || rekey._part(keyring_id::text) || rekey._part(version::text)
  || rekey._part(kek_id::text);
comment on function rekey._wrap_aad is 'What a wrapped DEK is bound to.';

create or replace function rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) returns bytea
language sql immutable parallel safe
return substr(aad, 1, 11) || iv || rekey._aead_encrypt(wrapping_key, iv, dek, aad);
comment on function rekey._wrap is 'A DEK sealed under the wrapping key of a KEK; aad: rekey._wrap_aad().';

-- 139 bytes: header, IV, 64 bytes with padding, tag.
create or replace function rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) returns bytea
language sql immutable parallel safe
return case when octet_length(wrapped_key) = 139 and substr(wrapped_key, 1, 11) = substr(aad, 1, 11) then
  rekey._aead_decrypt(wrapping_key, substr(wrapped_key, 12, 16), substr(wrapped_key, 28), aad) end;
comment on function rekey._unwrap is 'The DEK of a wrapped key; NULL where it does not open. aad: rekey._wrap_aad().';

create or replace function rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) returns text
language sql stable parallel safe
return case
  when state in ('disabled', 'destroyed') or state = 'destroy_scheduled' and not sweeping then format('key version %s is %s', version, state)
  when kek_state = 'lost' then format('key version %s is wrapped under KEK %s, which is lost', version, kek_id) end;
comment on function rekey._key_problem is 'Why a key may not be used; NULL: it may. sweeping: one that is scheduled for destruction may.';

-- What was unwrapped once is carried in the session, as the KEK is, and under the same key: to open it takes a third of the time.
-- Without a KEK that the session brought, till the end of the statement.
create or replace function rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) returns bytea
language sql stable
return 'key'::bytea || int4send(keyring_id) || int4send(version) || int4send(kek_id) || rekey._session_aad(coalesce(nullif(left(unlocked, 1), ''), 't'))
  || case when unlocked = '' then timestamptz_send(statement_timestamp()) else convert_to(unlocked, 'UTF8') end;
comment on function rekey._carried_aad is
  'What a DEK that the session carries is bound to: the KEK that wraps it, and the session as rekey.lock() and rekey.unlock() leave it; without an unlocked one, the statement.';

create or replace function rekey._dek(keyring_id integer, version integer) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unlocked text := coalesce(current_setting('rekey.unlocked', true), '');
  -- A few variables, since old and new versions are read in turns.
  v_name text := 'rekey.key_' || ((keyring_id # version) & 7);
  v_carried text := current_setting(v_name, true);
  v_wrapped bytea;
  v_kek_id integer;
  v_seal bytea;
  v_wrapping bytea;
  v_aad bytea;
  v_bytes bytea;
  v_iv bytea;
  v_key bytea;
begin
  select k.wrapped_key, k.kek_id, s.key into v_wrapped, v_kek_id, v_seal
  from rekey.encryption_keys k
  join rekey.keks e on e.id = k.kek_id
  left join rekey._session_key s on true
  where k.keyring_id = _dek.keyring_id and k.version = _dek.version
    and rekey._key_problem(k.version, k.state, k.kek_id, e.state, false) is null;
  -- (It is anybody's to set.)
  if found and length(v_carried) = 256 and v_carried ~ '^[0-9a-f]+$' and v_seal is not null then
    -- IV, 64 bytes with padding, tag
    v_bytes := decode(v_carried, 'hex');
    v_iv := substr(v_bytes, 1, 16);
    v_bytes := substr(v_bytes, 17);
    v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
    v_key := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  end if;
  if v_key is null then
    v_wrapping := (rekey._kek()).kek;
    v_wrapping := rekey._wrapping_key(v_wrapping);
    v_aad := rekey._wrap_aad(v_kek_id, keyring_id, version);
    v_key := rekey._unwrap(v_wrapping, v_wrapped, v_aad);
    -- Not for a session that only says that it is unlocked: the KEK may be the server's.
    if v_key is not null and v_seal is not null and (v_unlocked = '' or rekey._session_keks() is not null) then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
      v_bytes := rekey._aead_encrypt(v_seal, v_iv, v_key, v_aad);
      v_carried := set_config(v_name, encode(v_iv || v_bytes, 'hex'), left(v_unlocked, 1) <> 's');
    end if;
  end if;
  return v_key;
end
$$;
comment on function rekey._dek is
  'Unwraps one key, for a single value; rekey._deks() is for many. NULL where it may not or cannot be used, and where there is none: rekey._dek_problem(). RK001, RK002 without the KEK.';

create or replace function rekey._dek_problem(keyring_id integer, version integer) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(rekey._key_problem(k.version, k.state, k.kek_id, e.state, false), format('the wrapped key of version %s is damaged', k.version))
    from rekey.encryption_keys k
    join rekey.keks e on e.id = k.kek_id
    where k.keyring_id = _dek_problem.keyring_id and k.version = _dek_problem.version);
end
$$;
comment on function rekey._dek_problem is 'Why rekey._dek() has no key; NULL: there is no such version.';

create or replace function rekey._deks(keyrings integer[], versions integer[], sweeping boolean = false)
returns table (keyring_id integer, version integer, key bytea, problem text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- keys that do not fit go to a temporary file
set enable_nestloop = on  -- whatever it is in the caller
as $$
begin
  -- Keys are columns here, and nowhere parameters of a statement.
  return query
    with w as materialized (
      select rekey._wrapping_key(x.kek) as wrapping_key from rekey._kek() x
    )
    select o.keyring_id, o.version, o.key,
      case when o.key is null then coalesce(o.problem, format('the wrapped key of version %s is damaged', o.version)) end
    from (
      select n.keyring_id, n.version, n.problem,
        case when n.problem is null then rekey._unwrap(n.wrapping_key, n.wrapped_key, n.aad) end as key
      from (
        select k.keyring_id, k.version, k.wrapped_key, w.wrapping_key, rekey._wrap_aad(k.kek_id, k.keyring_id, k.version) as aad,
          rekey._key_problem(k.version, k.state, k.kek_id, e.state, sweeping) as problem
        from w
        cross join (select distinct u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version)) g
        join rekey.encryption_keys k on k.keyring_id = g.keyring_id and k.version = g.version
        join rekey.keks e on e.id = k.kek_id
        offset 0
      ) n
      offset 0
    ) o;
end
$$;
comment on function rekey._deks is
  'Unwraps the keys of these versions, once each. key is NULL, and problem says why, where it may not or cannot be used. sweeping: versions scheduled for destruction open too. RK001, RK002 without the KEK.';

create or replace function rekey._check_key_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if (new.keyring_id, new.version) is distinct from (old.keyring_id, old.version) then
    raise exception 'a key keeps its keyring and version' using errcode = 'RK006';
  end if;
  if new.state <> old.state and not (old.state, new.state) in (
    ('active', 'decrypt_only'), ('active', 'compromised'),
    ('decrypt_only', 'active'), ('decrypt_only', 'disabled'), ('decrypt_only', 'compromised'), ('decrypt_only', 'destroy_scheduled'),
    ('disabled', 'decrypt_only'), ('disabled', 'destroy_scheduled'),
    ('compromised', 'destroy_scheduled'),
    ('destroy_scheduled', 'destroyed'))
    and not (old.state = 'destroy_scheduled' and new.state = old.scheduled_from) then
    raise exception 'a key cannot go from % to %', old.state, new.state using errcode = 'RK006';
  end if;
  return new;
end
$$;
comment on function rekey._check_key_change is 'Trigger: lets the state of a key move only along the graph of docs/design.md (RK006).';
create or replace trigger encryption_keys_state before update on rekey.encryption_keys
  for each row execute function rekey._check_key_change();

create or replace function rekey._keyring(name text, lock boolean = false) returns rekey.keyrings
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
begin
  if lock then
    -- Not FOR UPDATE: the foreign key of rekey.secrets would keep writers waiting.
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name for no key update;
  else
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name;
  end if;
  if v_keyring.id is null then
    raise exception 'no such keyring: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.keyrings for those that there are; rekey.create_keyring() makes one.', constraint = 'create_keyring';
  end if;
  return v_keyring;
end
$$;
comment on function rekey._keyring is 'The keyring of that name, its row locked if asked for. RK007: there is none.';

create or replace function rekey._keyring_name(id integer) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return (select k.name from rekey.keyrings k where k.id = _keyring_name.id);
comment on function rekey._keyring_name is 'The name of a keyring.';

create or replace function rekey._key(keyring_id integer, version integer) returns rekey.encryption_keys
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key rekey.encryption_keys;
begin
  select * into v_key from rekey.encryption_keys k where k.keyring_id = _key.keyring_id and k.version = _key.version for update;
  if not found then
    raise exception 'the keyring has no version %', coalesce(version::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.key_status for its versions.', constraint = 'key_versions';
  end if;
  return v_key;
end
$$;
comment on function rekey._key is 'The key of that version, its row locked. RK007: there is none.';

create or replace function rekey._active_versions(keyrings integer[]) returns integer[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select array_agg(k.version order by w.place)
    from unnest(keyrings) with ordinality as w(keyring_id, place)
    left join rekey.encryption_keys k on k.keyring_id = w.keyring_id and k.state = 'active');
end
$$;
comment on function rekey._active_versions is 'The active version of each keyring; NULL where it has none.';

create or replace function rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- This snapshot may be older than a rotation. A row lock sees the row as it is now: 40001 where it was changed.
    begin
      perform from rekey.encryption_keys k
      where (k.keyring_id, k.version) in (select u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version))
      for share nowait;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;
      when lock_not_available then null;  -- a rotation that has not committed: its barrier will see our lock
    end;
  end if;
end
$$;
comment on function rekey._refuse_old_snapshot is '40001 in REPEATABLE READ and SERIALIZABLE, where these versions were changed since the snapshot. The caller holds their advisory locks.';

-- A writer's promise to whoever waits for a version to fall out of use: a shared advisory lock on (keyring, version),
-- taken before the version is looked at for the last time.
create or replace function rekey._lock_active(keyrings integer[]) returns integer[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_versions integer[] := rekey._active_versions(keyrings);
  v_locked integer[];
begin
  loop
    perform pg_advisory_xact_lock_shared(w.keyring_id, w.version)
    from (select u.keyring_id, u.version from unnest(keyrings, v_versions) as u(keyring_id, version)
          where u.version is not null order by 1) w;
    v_locked := v_versions;
    v_versions := rekey._active_versions(keyrings);
    exit when v_versions is not distinct from v_locked;
  end loop;
  perform rekey._refuse_old_snapshot(keyrings, v_versions);
  return v_versions;
end
$$;
comment on function rekey._lock_active is
  'The active versions of these keyrings, none of which falls out of use before this transaction ends. NULL for a retired keyring. 40001 in REPEATABLE READ and SERIALIZABLE, where a rotation was committed since the snapshot.';

create or replace function rekey._new_keys(keyrings integer[], versions integer[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek_id integer;
  v_wrapping bytea;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea[];
begin
  select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_place in 1 .. cardinality(keyrings) loop
    v_iv := rekey._random_bytes(16);
    v_dek := rekey._random_bytes(64);
    v_aad := rekey._wrap_aad(v_kek_id, keyrings[v_place], versions[v_place]);
    v_wrapped[v_place] := rekey._wrap(v_wrapping, v_iv, v_dek, v_aad);
  end loop;
  insert into rekey.encryption_keys (keyring_id, version, state, wrapped_key, kek_id, activated_at)
  select n.keyring_id, n.version, 'active', n.wrapped_key, v_kek_id, now()
  from unnest(keyrings, versions, v_wrapped) as n(keyring_id, version, wrapped_key);
end
$$;
comment on function rekey._new_keys is 'Makes these versions and makes them active; the versions before must have been deactivated. The caller holds rekey._lock_kek().';

create or replace function rekey.create_keyring(
  name text, tenant_id uuid = '00000000-0000-0000-0000-000000000000', rotate_every interval = null
) returns rekey.keyrings
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_bytes bytea;
begin
  if tenant_id is null then
    raise exception 'a keyring has a tenant' using errcode = 'invalid_parameter_value',
      hint = 'Leave tenant_id out for a keyring of all tenants.';
  end if;
  perform rekey._lock_kek();
  loop
    v_bytes := rekey._random_bytes(4);
    v_keyring.id := rekey._int4(v_bytes, 0) & 2147483647;
    exit when v_keyring.id > 0 and not exists (select from rekey.keyrings k where k.id = v_keyring.id);
  end loop;
  begin
    insert into rekey.keyrings (id, name, tenant_id, rotate_every, next_rotation_at)
    values (v_keyring.id, create_keyring.name, create_keyring.tenant_id, create_keyring.rotate_every, now() + create_keyring.rotate_every)
    returning * into v_keyring;
  exception
    when check_violation or not_null_violation or datetime_field_overflow then
      raise exception 'a keyring cannot be named % and rotate every %', coalesce(quote_literal(name), 'NULL'), coalesce(rotate_every::text, 'NULL')
        using errcode = 'invalid_parameter_value',
          hint = 'The name has 1 to 63 bytes and no control characters; the interval is between 1 minute and 36500 days.';
    when unique_violation then
      raise exception 'there is a keyring % already', quote_literal(name) using errcode = 'unique_violation';
  end;
  perform rekey._new_keys(array[v_keyring.id], array[1]);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.created', 'keyring', name, 'details',
      jsonb_build_object('tenant_id', tenant_id, 'rotate_every', rotate_every)),
    jsonb_build_object('event', 'key.created', 'keyring', name, 'version', 1),
    jsonb_build_object('event', 'key.activated', 'keyring', name, 'version', 1)));
  return v_keyring;
end
$$;
comment on function rekey.create_keyring is
  'Makes a keyring and its version 1. name: 1 to 63 bytes, unique in the database. tenant_id: whose it is. rotate_every: its cryptoperiod; the first scheduled rotation is due after it. 22023: name or interval cannot be; 23505: the name is taken; RK001, RK002: KEK.';
grant execute on function rekey.create_keyring to rekey_admin;
grant select on rekey.keyrings to rekey_admin, rekey_operator, rekey_auditor, rekey_app;

-- (Where a restore left the privilege behind, nobody knows.)
create or replace function rekey._may_be_doomed() returns boolean
language sql volatile
return case when has_sequence_privilege('rekey._doomed'::regclass, 'select') then pg_sequence_last_value('rekey._doomed'::regclass) end is distinct from 0;
comment on function rekey._may_be_doomed is 'Whether a version may be scheduled for destruction, without a query.';

create or replace function rekey._expect_doomed() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- Held till the end, so that rekey._expect_none_doomed() does not take it back before the version is seen.
  perform pg_advisory_xact_lock_shared(0, 6);
  perform setval('rekey._doomed', 1);
end
$$;
comment on function rekey._expect_doomed is 'From now on what is written into protected columns is looked at for versions that are scheduled for destruction.';

create or replace function rekey._expect_none_doomed() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if not rekey._may_be_doomed() then
    return;
  end if;
  begin
    if pg_try_advisory_xact_lock(0, 6) then
      -- In a statement of its own: it sees what was committed before the lock was given.
      if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then
        perform setval('rekey._doomed', 0);
      end if;
    end if;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the lock back at once, and keeps the value
  end;
end
$$;
comment on function rekey._expect_none_doomed is 'Takes rekey._expect_doomed() back where no version is scheduled. In READ COMMITTED only.';

create or replace function rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamptz = null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if state = 'destroy_scheduled' then
    perform rekey._expect_doomed();
  end if;
  update rekey.encryption_keys k
  set state = _move_key.state,
      scheduled_from = case when _move_key.state = 'destroy_scheduled' then key.state end,
      deactivated_at = case when key.state = 'active' then now() else k.deactivated_at end,
      compromised_at = case when _move_key.state = 'compromised' then coalesce(k.compromised_at, now()) else k.compromised_at end,
      destroy_after = _move_key.destroy_after
  where k.id = key.id;
  perform rekey._audit(event, (select r.name from rekey.keyrings r where r.id = key.keyring_id), key.version,
    details => jsonb_build_object('reason', reason, 'destroy_after', destroy_after));
end
$$;
comment on function rekey._move_key is 'Moves a key to another state, and says so in the audit log.';

create or replace function rekey._refuse_needed(keyring_id integer, version integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation bigint;
begin
  select r.id into v_rotation from rekey.rotations r
  where r.keyring_id = _refuse_needed.keyring_id and (_refuse_needed.version = any (r.from_versions) or r.to_version = _refuse_needed.version)
    and r.state in ('queued', 'running', 'paused', 'verifying', 'failed') and not r.in_line;
  if found then
    raise exception 'version % is needed by rotation %', version, v_rotation using errcode = 'RK005',
      hint = 'Let the rotation complete first.';
  end if;
end
$$;
comment on function rekey._refuse_needed is 'RK005 where a rotation under way needs the version.';

create or replace function rekey.disable_key(keyring text, version integer, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'decrypt_only' then
    raise exception 'version % is %, only a decrypt_only one can be disabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_needed(v_keyring.id, version);
  perform rekey._move_key(v_key, 'disabled', 'key.disabled', reason);
end
$$;
comment on function rekey.disable_key is
  'Suspends a version: what stands on it does not open until rekey.enable_key(). RK005: a rotation needs it; RK006: it is not decrypt_only; RK007: there is none.';
grant execute on function rekey.disable_key to rekey_admin;

create or replace function rekey.enable_key(keyring text, version integer, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'disabled' then
    raise exception 'version % is %, only a disabled one can be enabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, 'decrypt_only', 'key.enabled', reason);
end
$$;
comment on function rekey.enable_key is 'Lets a disabled version open again. RK006: it is not disabled; RK007: there is none.';
grant execute on function rekey.enable_key to rekey_admin;

create or replace view rekey.key_status as
select r.name as keyring, r.tenant_id, k.version, k.state, k.kek_id, e.state as kek_state,
  k.created_at, k.activated_at, k.deactivated_at, k.compromised_at, k.destroy_after, k.destroyed_at
from rekey.encryption_keys k
join rekey.keyrings r on r.id = k.keyring_id
join rekey.keks e on e.id = k.kek_id;
comment on view rekey.key_status is 'Every key version, its state and its times. kek_state lost: it cannot be opened any more.';
comment on column rekey.key_status.keyring is 'Name of the keyring.';
comment on column rekey.key_status.tenant_id is 'Its tenant.';
comment on column rekey.key_status.version is 'Version within the keyring.';
comment on column rekey.key_status.state is 'SP 800-57 state, as in rekey.encryption_keys.';
comment on column rekey.key_status.kek_id is 'Number of the KEK that wraps it.';
comment on column rekey.key_status.kek_state is 'State of that KEK.';
comment on column rekey.key_status.created_at is 'When it was made.';
comment on column rekey.key_status.activated_at is 'When it last became active.';
comment on column rekey.key_status.deactivated_at is 'When it last ceased to be active.';
comment on column rekey.key_status.compromised_at is 'When it was marked compromised.';
comment on column rekey.key_status.destroy_after is 'Before this time it is not destroyed.';
comment on column rekey.key_status.destroyed_at is 'When its wrapped key was overwritten.';
grant select on rekey.key_status to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/40_tenants.sql
-- Who reaches which tenant.

-- Owned by rekey_sweeper (footer.sql): the user's function runs with no right of ours. It can alter this one though, even
-- into SECURITY INVOKER, since it runs as its owner: so the body, which it cannot change, begins by refusing to run as
-- anybody else, in terms that no search path changes.
create or replace function rekey._call_tenant_check(function_name text, tenant_id uuid) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_answer boolean;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_tenant_check does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  begin
    execute format('select %s($1)', (function_name || '(uuid)')::regprocedure::oid::regproc) into v_answer using tenant_id;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- takes back all but the answer: settings, and deferred triggers that would run with the rights of the caller
  end;
  return coalesce(v_answer, false);
end
$$;
comment on function rekey._call_tenant_check is 'Asks the function that the setting tenant_check names.';

create or replace function rekey._is_service_role(caller name) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  -- Whoever may create roles can make one of that name, but none that passes by row-level security, as Supabase's does.
  return caller = 'service_role' and exists (select from pg_roles r where r.rolname = caller and r.rolbypassrls);
end
$$;
comment on function rekey._is_service_role is 'Whether the caller is Supabase''s service_role.';

create or replace function rekey.can_access_tenant(tenant_id uuid) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := rekey._caller();
  v_check text;
  v_app jsonb;
begin
  if tenant_id is null or v_caller = 'rekey_sweeper' then
    return false;
  end if;
  if v_caller = 'service_role' and rekey._is_service_role(v_caller) or pg_has_role(v_caller, 'rekey_admin', 'usage') then
    return true;
  end if;
  select s.tenant_check into v_check from rekey.settings s;
  if v_check is not null then
    return rekey._call_tenant_check(v_check, tenant_id);
  end if;
  v_app := rekey._claims();
  if v_app is null then
    return tenant_id = '00000000-0000-0000-0000-000000000000' and pg_has_role(v_caller, 'rekey_app', 'usage');
  end if;
  v_app := v_app -> 'app_metadata';
  return coalesce(
    lower(v_app ->> 'tenant_id') = tenant_id::text
    or jsonb_typeof(v_app -> 'tenant_ids') = 'array' and exists (
      select from jsonb_array_elements_text(v_app -> 'tenant_ids') t where lower(t) = tenant_id::text), false);
end
$$;
comment on function rekey.can_access_tenant is
  'Whether the caller reaches the secrets of this tenant. rekey_admin and service_role reach all; else the function named by the setting tenant_check decides; else a JWT reaches app_metadata.tenant_id and tenant_ids; else a rekey_app connection reaches the nil tenant.';
grant execute on function rekey.can_access_tenant to rekey_app;

create or replace function rekey._refuse_tenant() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'no access to this tenant' using errcode = 'insufficient_privilege';
end
$$;
comment on function rekey._refuse_tenant is 'Raises 42501.';

create or replace function rekey._check_tenant(tenant_id uuid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not rekey.can_access_tenant(tenant_id) then
    perform rekey._refuse_tenant();
  end if;
end
$$;
comment on function rekey._check_tenant is 'Raises 42501 where rekey.can_access_tenant() says no.';

do $$
begin
  if not exists (select from pg_policies where schemaname = 'rekey' and policyname = 'secrets_tenant') then
    create policy secrets_tenant on rekey.secrets for select to rekey_app using (rekey.can_access_tenant(tenant_id));
  end if;
  if not exists (select from pg_policies where schemaname = 'rekey' and policyname = 'keyrings_tenant') then
    create policy keyrings_tenant on rekey.keyrings for select to rekey_app
      using (tenant_id = '00000000-0000-0000-0000-000000000000' or rekey.can_access_tenant(tenant_id));
  end if;
  if not exists (select from pg_policies where schemaname = 'rekey' and policyname = 'keyrings_all') then
    create policy keyrings_all on rekey.keyrings for select to rekey_admin, rekey_operator, rekey_auditor using (true);
  end if;
end
$$;
comment on policy secrets_tenant on rekey.secrets is 'Rows of the tenants that the caller reaches. Writing goes through rekey.set_secret().';
comment on policy keyrings_tenant on rekey.keyrings is 'An application sees the keyrings of all tenants'' use and of the tenants that it reaches.';
comment on policy keyrings_all on rekey.keyrings is 'Who administers, works or audits sees every keyring.';
grant select on rekey.secrets to rekey_app;

-- sql/code/41_encrypt.sql
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

-- sql/code/42_secrets.sql
-- Secrets: rekey.secrets with a name, for applications that have no table of their own.

create or replace function rekey._secret_context(tenant_id uuid, id uuid) returns bytea
language sql stable parallel safe
return rekey._part('secret') || rekey._part(tenant_id::text) || rekey._part(id::text);
comment on function rekey._secret_context is 'What the ciphertext of a secret is bound to.';

create or replace function rekey.set_secrets(
  names text[], "values" text[], tenant_id uuid = '00000000-0000-0000-0000-000000000000', keyring text = 'default', descriptions text[] = null
) returns uuid[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan  -- to plan takes longer than to store a secret
as $$
declare
  v_keyring rekey.keyrings;
  v_name text;
  v_value text;
  v_bytes bytea;
  v_longest integer := 0;
  v_place integer;
  v_sealing rekey._sealing;
  v_known jsonb;
  v_id uuid;
  v_iv bytea;
  v_aad bytea;
  v_envelope bytea;
  v_stored integer;
  v_count integer;
  -- Of the length that they will have: an element that is put behind the last one makes an array anew.
  v_ids uuid[] := array_fill(null::uuid, array[coalesce(cardinality(names), 0)]);
  v_envelopes bytea[] := array_fill(null::bytea, array[coalesce(cardinality(names), 0)]);
begin
  perform rekey._check_tenant(tenant_id);
  v_keyring := rekey._keyring(keyring);
  if v_keyring.tenant_id not in (tenant_id, '00000000-0000-0000-0000-000000000000') then
    raise exception 'the keyring belongs to another tenant' using errcode = 'insufficient_privilege';
  end if;
  if names is null or cardinality("values") is distinct from cardinality(names) or cardinality(descriptions) <> cardinality(names)
     or array_ndims(names) > 1 or array_ndims(descriptions) > 1 or array_lower(names, 1) <> 1 or array_lower(descriptions, 1) <> 1 then
    raise exception 'names, values and descriptions are arrays of one length' using errcode = 'invalid_parameter_value';
  end if;
  foreach v_name in array names loop
    if v_name is null or octet_length(v_name) not between 1 and 255 or v_name ~ '[\u0001-\u001F\u007F]' then
      raise exception 'a secret has a name of 1 to 255 bytes without control characters' using errcode = 'invalid_parameter_value';
    end if;
  end loop;
  if cardinality(names) > 1 and cardinality(names) > (select count(distinct n.name) from unnest(names) as n(name)) then
    raise exception 'a name comes twice' using errcode = 'invalid_parameter_value';
  end if;
  foreach v_value in array "values" loop
    if v_value is null then
      raise exception 'a secret has a value' using errcode = 'invalid_parameter_value', hint = 'rekey.delete_secret() deletes one.', constraint = 'delete_secret';
    end if;
    v_longest := greatest(v_longest, octet_length(convert_to(v_value, 'UTF8')));
  end loop;
  v_sealing := rekey._sealing(v_keyring.id, v_longest);
  loop
    -- The ids first, then the seals: a value sealed for an id that is thrown away could never be opened.
    -- (A subquery for each name, and no join: it may be planned while the table is empty, and stays.)
    select jsonb_object_agg(o.name, o.id) into v_known
    from (select n.name, (select s.id from rekey.secrets s where s.tenant_id = set_secrets.tenant_id and s.name = n.name for no key update) as id
          from (select u.name from unnest(names) as u(name) order by u.name) n
          offset 0) o
    where o.id is not null;
    v_place := 0;
    v_stored := 0;
    foreach v_value in array "values" loop
      v_place := v_place + 1;
      v_name := names[v_place];
      v_id := coalesce((v_known ->> v_name)::uuid, gen_random_uuid());
      v_bytes := convert_to(v_value, 'UTF8');
      v_iv := rekey._random_bytes(16);
      v_aad := v_sealing.header || rekey._secret_context(tenant_id, v_id);
      v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_bytes, v_aad);
      v_ids[v_place] := v_id;
      if v_known ? v_name then
        update rekey.secrets s
        set ciphertext = v_envelope, keyring_id = v_keyring.id, updated_at = now(),
            description = coalesce(descriptions[v_place], s.description)
        where s.tenant_id = set_secrets.tenant_id and s.id = v_id;
        v_stored := v_stored + 1;
        v_envelope := null;
      end if;
      v_envelopes[v_place] := v_envelope;
    end loop;
    if v_stored < cardinality(names) then
      insert into rekey.secrets (tenant_id, id, name, keyring_id, ciphertext, description)
      select set_secrets.tenant_id, n.id, n.name, v_keyring.id, n.envelope, n.description
      from unnest(v_ids, names, v_envelopes, descriptions) as n(id, name, envelope, description)
      where n.envelope is not null
      on conflict do nothing;
      get diagnostics v_count = row_count;
      v_stored := v_stored + v_count;
    end if;
    exit when v_stored = cardinality(names);  -- else somebody else has stored one of them meanwhile
  end loop;
  return v_ids;
end
$$;
comment on function rekey.set_secrets is
  'Stores many secrets of a tenant, as rekey.set_secret() does one, and returns their ids in the order of names. names and values: arrays of one length, descriptions too, or NULL. Sessions that store the same names at once give them in the same order, or may meet in a deadlock (40P01). 22023: a name or value cannot be, or comes twice, or lengths differ; 42501: another tenant; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';
grant execute on function rekey.set_secrets to rekey_app;

-- Inlined, as rekey.encrypt(text, ...) is.
create or replace function rekey.set_secret(
  name text, value text, tenant_id uuid = '00000000-0000-0000-0000-000000000000', keyring text = 'default', description text = null
) returns uuid
language sql volatile
return (rekey.set_secrets(array[name], array[value], tenant_id, keyring, array[description]))[1];
comment on function rekey.set_secret is
  'Stores a secret under its name, new or in place of the value before, and returns its id. value: at most 32 MiB of UTF-8. keyring: default, or one of the tenant''s own. description: NULL leaves the one that is there. 22023: name or value cannot be; 42501: another tenant; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';
grant execute on function rekey.set_secret to rekey_app;

create or replace function rekey.get_secret(name text, tenant_id uuid = '00000000-0000-0000-0000-000000000000') returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid;
  v_envelope bytea;
  v_context bytea;
  v_bytes bytea;
begin
  if not rekey.can_access_tenant(tenant_id) then
    perform rekey._refuse_tenant();
  end if;
  select s.id, s.ciphertext into v_id, v_envelope from rekey.secrets s
  where s.tenant_id = get_secret.tenant_id and s.name = get_secret.name;
  if not found then
    raise exception 'no such secret: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.secrets for the names that there are.', constraint = 'secrets';
  end if;
  v_context := rekey._secret_context(tenant_id, v_id);
  v_bytes := rekey._open(v_envelope, v_context);
  return convert_from(v_bytes, 'UTF8');
end
$$;
comment on function rekey.get_secret is
  'The value of a secret. Writes nothing, and works on a standby. 42501: another tenant; RK001, RK002: KEK; RK003: it does not open; RK006: its key may not be used; RK007: no such secret.';
grant execute on function rekey.get_secret to rekey_app;

create or replace function rekey.delete_secret(name text, tenant_id uuid = '00000000-0000-0000-0000-000000000000') returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform rekey._check_tenant(tenant_id);
  delete from rekey.secrets s where s.tenant_id = delete_secret.tenant_id and s.name = delete_secret.name;
  return found;
end
$$;
comment on function rekey.delete_secret is 'Deletes a secret; false where there was none. 42501: another tenant.';
grant execute on function rekey.delete_secret to rekey_app;

create or replace function rekey.read_secrets(
  names text[] = null, tenant_id uuid = '00000000-0000-0000-0000-000000000000'
) returns table (name text, value text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set work_mem = '2000000kB'  -- values that do not fit go to a temporary file
set plan_cache_mode = force_custom_plan  -- which knows the names
as $$
declare
  v_unreadable text;
begin
  perform rekey._check_tenant(tenant_id);
  -- No ORDER BY, for the same reason.
  for name, value in
    select o.name, convert_from(o.plaintext, 'UTF8')
    from (
      select w.name, case when w.key is not null then rekey._aead_decrypt(w.key, w.iv, w.sealed, w.aad) end as plaintext
      from (
        select s.name, d.key, substr(s.ciphertext, 12, 16) as iv, substr(s.ciphertext, 28) as sealed,
          substr(s.ciphertext, 1, 11) || rekey._secret_context(s.tenant_id, s.id) as aad
        from rekey.secrets s
        left join (
          select k.* from rekey._deks(
            (select array_agg(v.keyring_id) from (
               select distinct t.keyring_id, t.key_version from rekey.secrets t
               where t.tenant_id = read_secrets.tenant_id and (names is null or t.name = any (names))) v),
            (select array_agg(v.key_version) from (
               select distinct t.keyring_id, t.key_version from rekey.secrets t
               where t.tenant_id = read_secrets.tenant_id and (names is null or t.name = any (names))) v)) k
          offset 0
        ) d on d.keyring_id = s.keyring_id and d.version = s.key_version
        where s.tenant_id = read_secrets.tenant_id and (names is null or s.name = any (names))
          and rekey._is_envelope(s.ciphertext)
        offset 0
      ) w
      offset 0
    ) o
  loop
    if value is null then
      v_unreadable := coalesce(v_unreadable, name);
    else
      return next;
    end if;
  end loop;
  if v_unreadable is not null then
    raise exception 'cannot open ciphertext of secret %', quote_literal(v_unreadable) using errcode = 'RK003',
      hint = 'Leave it out of names to read the others. rekey.get_secret() says more.', constraint = 'unreadable_secret';
  end if;
end
$$;
comment on function rekey.read_secrets is
  'Many secrets of a tenant at once, in no order; names NULL: all of them. Names that there are not are left out. 42501: another tenant; RK001, RK002: KEK; RK003: one of them does not open.';
grant execute on function rekey.read_secrets to rekey_app;

create or replace view rekey.decrypted_secrets with (security_invoker = true) as
select s.tenant_id, s.id, s.name, rekey.get_secret(s.name, s.tenant_id) as value, s.description, s.key_version, s.created_at, s.updated_at
from rekey.secrets s;
comment on view rekey.decrypted_secrets is 'The secrets of the tenants that the caller reaches, with their values, opened one by one: select by name. rekey.read_secrets() is faster for many.';
comment on column rekey.decrypted_secrets.tenant_id is 'Tenant of the secret.';
comment on column rekey.decrypted_secrets.id is 'Its identity within the tenant.';
comment on column rekey.decrypted_secrets.name is 'Its name.';
comment on column rekey.decrypted_secrets.value is 'Its value, opened.';
comment on column rekey.decrypted_secrets.description is 'Free text, not encrypted.';
comment on column rekey.decrypted_secrets.key_version is 'Key version it stands on.';
comment on column rekey.decrypted_secrets.created_at is 'When it was made.';
comment on column rekey.decrypted_secrets.updated_at is 'When its value last changed.';
grant select on rekey.decrypted_secrets to rekey_app;

-- sql/code/43_many.sql
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

-- sql/code/50_targets.sql
-- The tables that a rotation sweeps. Each has functions in schema rekey_targets, owned by the table's owner, that read and
-- write that table and nothing else. They know no key, and none of our functions:
--   <name>_count(relation, keyrings): rows by keyring and version, in the snapshot of the calling statement; no keyrings: only locks
--     the relation, with its partitions
--   <name>_scan(relation, first, until, keyrings, since, max_rows, max_bytes): rows in that range of row pointers, in that snapshot
--   <name>_read(relation, first, until, keyrings, versions, max_rows, max_bytes): rows that are due; what is no envelope, it locks
--   <name>_write(relation, rows, starts, ciphertexts, indexes): locks those of them that still begin so, and stores what the engine made of
--     them; indexes: the values of a blind index, with the ciphertexts or without (57_blind_index.sql)
-- What has more than 64 MiB with its context and key is not read: scan and read return a header and the word "large" in its
-- place; NULL where it is no envelope.
-- rekey.secrets is the first target; protected columns are the others (51_columns.sql).

create or replace function rekey_targets.secrets_count(relation regclass, keyrings integer[])
returns table (keyring_id integer, version integer, rows bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index on keyring_id
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  return query
    select s.keyring_id, s.key_version, count(*)
    from rekey.secrets s
    where keyrings is null or s.keyring_id = any (keyrings)
    group by s.keyring_id, s.key_version;
end
$$;
comment on function rekey_targets.secrets_count is 'Counts rekey.secrets by keyring and version; keyrings NULL: all.';

create or replace function rekey_targets.secrets_scan(
  relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index too, and looks many keyrings up in a hash table
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with found as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    where s.ctid >= first and s.ctid < until and (keyrings is null or s.keyring_id = any (keyrings))
      and (since is null or age(s.xmin) <= age(since))
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(f.ciphertext)) as bytes from found f
  ), sized as (
    select f.*, 0 as before from found f where (select t.bytes from total t) <= max_bytes
    union all
    select f.*, sum(octet_length(f.ciphertext)) over (order by f.row rows unbounded preceding) - octet_length(f.ciphertext)
    from found f where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes), null::bytea[]
  into next, rows, ciphertexts, contexts, keys, indexes
  from sized s;
end
$$;
comment on function rekey_targets.secrets_scan is
  'Rows of rekey.secrets whose row pointer lies from first on and before until: at most max_rows of them, and little more than max_bytes of ciphertext. since: only what this transaction or a later one wrote; NULL: all. contexts: without the label. next: the last row returned, where more may follow; NULL at the end of the range.';

create or replace function rekey_targets.secrets_read(
  relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan  -- which may use the index too
as $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with due as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    join unnest(keyrings, versions) as w(keyring_id, version) on w.keyring_id = s.keyring_id and w.version <> s.key_version
    where s.ctid >= first and s.ctid < until
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(d.ciphertext)) as bytes from due d
  ), sized as (
    select d.*, 0 as before from due d where (select t.bytes from total t) <= max_bytes
    union all
    select d.*, sum(octet_length(d.ciphertext)) over (order by d.row rows unbounded preceding) - octet_length(d.ciphertext)
    from due d where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes), null::bytea[]
  into next, rows, ciphertexts, contexts, keys, indexes
  from sized s;
end
$$;
comment on function rekey_targets.secrets_read is
  'Rows of rekey.secrets in a range that stand on another version than the given one of their keyring; as secrets_scan, and without locks.';

-- A row pointer names the same row as long as the statement lasts that calls all this: what its snapshot may see is not removed.
-- Whether the row is still as it was read tell its pointer, once it is locked, and the header and IV of its envelope. (Before 15.15,
-- 17.7 and 18.0, a search by pointer did not look at the pointer again where it had waited for another session's UPDATE.)
create or replace function rekey_targets.secrets_write(
  relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], indexes bytea[], out locked tid[], out written bigint
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if relation <> 'rekey.secrets'::regclass or indexes is not null then
    raise exception '% is not rekey.secrets, which has no blind index', relation using errcode = 'RK005';
  end if;
  -- (A subselect hides from the planner how many rows there are: it would rather read the whole table than follow so many pointers.
  -- IS TRUE keeps what a value begins with from being the key of a join, for which every value would be read.)
  with held as materialized (
    select u.row, s.ctid as now
    from unnest((select secrets_write.rows), (select secrets_write.starts)) as u(row, start)
    join rekey.secrets s on s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true
    for no key update of s skip locked
  )
  select array_agg(h.row) into locked from held h where h.now = h.row;
  if cardinality(locked) < cardinality(rows) then
    select array_agg(u.row), array_agg(u.start), array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext) where u.row = any (locked);
  end if;
  update rekey.secrets s set ciphertext = u.ciphertext
  from rows from (unnest((select secrets_write.rows)), unnest((select secrets_write.starts)), unnest((select ciphertexts))) as u(row, start, ciphertext)
  where locked is not null and s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true;
  get diagnostics written = row_count;
  set constraints all immediate;
end
$$;
comment on function rekey_targets.secrets_write is
  'Locks the rows that secrets_read returned in this statement, but those that somebody else has locked or changed, and stores new ciphertexts in them. starts: header and IV (27 bytes) of what was read. locked: the rows that it had; written: how many were changed.';

-- What the code of a table may leave behind in the session of the worker, there to act with the worker's rights: a search
-- path, which reaches even the functions that called it, or another setting; a cursor that is opened at COMMIT; a prepared
-- statement under a name that the client uses; a temporary view in front of a table. Run by rekey_sweeper.
create or replace function rekey._session_state(search_path text) returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array[
    -- (The view has them in the order of their names. To sort them anew takes as long as to show them.)
    search_path || ' ' || (
      select encode(sha256(convert_to(string_agg(s.name || '=' || s.setting, ','), 'UTF8')), 'hex')
      from pg_settings s where s.name <> 'search_path'),
    (select string_agg(c.name, ',' order by c.name) from pg_cursors c where c.is_holdable),
    -- (By the dependencies of the schema, which have an index: pg_type may be large.)
    (select string_agg(t.oid || ' ' || t.xmin, ',' order by t.oid)
     from pg_depend d join pg_class c on c.oid = d.objid join pg_type t on t.oid = c.reltype
     where d.refclassid = 'pg_namespace'::regclass and d.refobjid = pg_my_temp_schema() and d.classid = 'pg_class'::regclass),
    array_to_string(rekey._prepared(), ',')];
end
$$;
comment on function rekey._session_state is 'What must be as before once the code of a table has run: settings, cursors, temporary objects, prepared statements. search_path: the one outside of this function.';

create or replace function rekey._refuse_traces(before text[], search_path text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_after text[] := rekey._session_state(search_path);
begin
  for v_place in 1 .. cardinality(before) loop
    if v_after[v_place] is distinct from before[v_place] then
      raise exception 'code of the table left % behind', (array['a setting', 'a cursor', 'a temporary object', 'a prepared statement'])[v_place]
        using errcode = 'RK005', hint = 'Its triggers run in the session of whoever works on the rotation, and must leave it as it was.';
    end if;
  end loop;
end
$$;
comment on function rekey._refuse_traces is 'RK005 where the session is not as rekey._session_state() found it before.';

create or replace function rekey._prepared() returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(select p.name || ' ' || extract(epoch from p.prepare_time) from pg_prepared_statements p order by 1);
end
$$;
comment on function rekey._prepared is 'The prepared statements of the session.';

create or replace function rekey._forget_prepared(before text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text;
begin
  for v_name in
    select p.name from pg_prepared_statements p where not p.name || ' ' || extract(epoch from p.prepare_time) = any (before)
  loop
    execute format('deallocate %I', v_name);
  end loop;
end
$$;
comment on function rekey._forget_prepared is 'Drops the prepared statements that were made since: no rollback does.';

-- Row triggers are queued by changes of rows, and by nothing else. So where firing all that is queued changes no row,
-- nothing is queued any more, and nothing is left for COMMIT, where it would run as the worker.
-- Who changes a row of a relation holds such a lock on it until the transaction ends. The counts have a part of earlier
-- transactions that was not reported yet: they tell by being compared.
create or replace function rekey._changes() returns text
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(string_agg(format('%s %s', c.oid,
    pg_stat_get_xact_tuples_inserted(c.oid) + pg_stat_get_xact_tuples_updated(c.oid) + pg_stat_get_xact_tuples_deleted(c.oid)), ',' order by c.oid), '')
  from (select distinct l.relation as oid from pg_locks l
        where l.pid = pg_backend_pid() and l.locktype = 'relation'
          and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) c;
end;
comment on function rekey._changes is 'The relations that this transaction may have changed rows of, and of how many it has.';

create or replace function rekey._refuse_changes(before text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('track_counts') = 'off' then
    raise exception 'track_counts is off: what the triggers of a table do cannot be checked' using errcode = 'RK005',
      hint = 'Set track_counts to on.';
  elsif rekey._changes() is distinct from before then
    raise exception 'code of the table changed rows where it may not, or queued triggers for the end of the transaction' using errcode = 'RK005',
      hint = 'A trigger that is deferred may not defer others: at COMMIT they would run as whoever works on the rotation.';
  end if;
end
$$;
comment on function rekey._refuse_changes is 'RK005 where rows were changed since rekey._changes().';

-- These are owned by rekey_sweeper (footer.sql), which has no other right: whatever a target's function has become,
-- it gains nothing from being called here. Why they begin as they do: rekey._call_tenant_check (40_tenants.sql). What follows
-- the call is named with its schema: the search path may be another one now.
-- What one owner's code leaves behind is looked for before another's is called. (An empty file holds no rows for any snapshot.)
create or replace function rekey._call_count(
  function_names name[], relations regclass[], keyrings integer[], apart boolean = false, whole boolean = false
)
returns setof rekey._counted
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_run record;
  v_state text[];
  v_changes text;
  v_keyring integer;
  v_version integer;
  v_rows bigint;
  v_next tid;
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
  v_context text;
  v_found rekey._counted[];
  v_last integer;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_count does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  for v_run in
    select c.name <> 'secrets' as foreign, keyrings = '{}' as locks, count(*)::integer as count, array_agg(c.place::integer) as places,
      array_agg(c.relation) as relations, array_agg(format(case when whole
          then 'select null, null, pg_catalog.cardinality(s.rows), s.next, s.ciphertexts, s.contexts, s.keys
            from rekey_targets.%I($1, ''(0,0)'', ''(4294967294,0)'', $2, null, 4000, 2097152) s'
          else 'select s.keyring_id, s.version, s.rows, null, null, null, null from rekey_targets.%I($1, $2) s' end,
        c.name || case when whole then '_scan' else '_count' end)) as statements
    from unnest(function_names, relations) with ordinality as c(name, relation, place)
    left join pg_proc p on p.pronamespace = 'rekey_targets'::regnamespace and p.proname = c.name || '_count'
    group by c.name <> 'secrets', p.proowner
    order by p.proowner
  loop
    v_found := '{}';
    v_last := 0;
    begin
      if v_run.foreign then
        v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
        v_changes := rekey._changes();
      end if;
      for v_place in 1 .. v_run.count loop
        begin
          if v_run.locks or pg_catalog.pg_relation_size(v_run.relations[v_place]) operator(pg_catalog.>) 0 then
            for v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys in
              execute v_run.statements[v_place] using v_run.relations[v_place], keyrings
            loop
              v_last := v_last operator(pg_catalog.+) 1;
              v_found[v_last] := row(v_run.places[v_place], v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys, null, null, null)::rekey._counted;
            end loop;
          end if;
        exception when assert_failure or others then
          get stacked diagnostics v_context = pg_exception_context;
          if not apart then
            raise;
          end if;
          v_last := v_last operator(pg_catalog.+) 1;
          v_found[v_last] := row(v_run.places[v_place], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted;
        end;
      end loop;
      if v_run.foreign then
        perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
        perform rekey._refuse_changes(v_changes);
      end if;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart then
        raise;
      elsif v_run.count = 1 then
        v_found := array[row(v_run.places[1], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted];
      else
        -- Each by itself, to find whose it is.
        v_found := array(
          select row(p.place, c.keyring_id, c.version, c.rows, c.next, c.ciphertexts, c.contexts, c.keys, c.error, c.code, c.context)::rekey._counted
          from unnest(v_run.places) as p(place)
          cross join lateral rekey._call_count(function_names[p.place:p.place], relations[p.place:p.place], keyrings, true, whole) c);
      end if;
    end;
    return query select f.* from unnest(v_found) as f;
  end loop;
end
$$;
comment on function rekey._call_count is 'Calls the count functions of targets. keyrings empty: locks each relation, with its partitions, and counts nothing. apart: an error of one is a row, and does not stop the others; what came of it before is not to be trusted. whole: calls their scan functions, for all rows of each relation, or the first of them, up to next.';

create or replace function rekey._call_scan(
  function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint,
  out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_scan does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_scan')
  into next, rows, ciphertexts, contexts, keys, indexes
  using relation, first, until, keyrings, since, max_rows, max_bytes;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_scan is 'Calls the scan function of a target.';

create or replace function rekey._call_read(
  function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  touch_from tid = null, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[], out state text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_read does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  if touch_from is not null then
    execute format('select from rekey_targets.%I($1, $2, $3, null, $4, 1, 1)', function_name || '_scan')
    using relation, touch_from, first, pg_catalog.pg_current_xact_id()::xid;
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_read')
  into next, rows, ciphertexts, contexts, keys, indexes
  using relation, first, until, keyrings, versions, max_rows, max_bytes;
  if state is not null then
    perform rekey._refuse_traces(state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_read is
  'Calls the read function of a target. touch_from: its scan function before, for nothing, from there up to first. state: of the session, before and after.';

create or replace function rekey._call_write(
  function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], indexes bytea[] = null, out locked tid[], out written bigint
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_write does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := coalesce(state, rekey._session_state(pg_catalog.current_setting('search_path')));
  end if;
  execute format('select w.* from rekey_targets.%I($1, $2, $3, $4, $5) w', function_name || '_write')
  into locked, written using relation, rows, starts, ciphertexts, indexes;
  if v_state is not null then
    v_changes := rekey._changes();
  end if;
  set constraints all immediate;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$$;
comment on function rekey._call_write is 'Calls the write function of a target. state: of the session, as rekey._call_read() left it; NULL: as it is now.';

create or replace function rekey._headers(ciphertexts bytea[]) returns bytea[]
language sql immutable parallel safe
begin atomic
  select array_agg(h.header)
  from (select distinct substr(u.ciphertext, 1, 11) as header from unnest(ciphertexts) as u(ciphertext)) h
  where octet_length(h.header) = 11 and substr(h.header, 1, 3) = '\x524b01'::bytea;
end;
comment on function rekey._headers is 'The different headers of envelopes.';

create or replace function rekey._shape_problem(ciphertext bytea) returns text
language sql immutable parallel safe
return case when octet_length(ciphertext) = 16 and substr(ciphertext, 12) = '\x6c61726765'::bytea then 'has more than 64 MiB, and was not read' else 'is no envelope' end;
comment on function rekey._shape_problem is 'What is wrong with what is no envelope. What is larger than any can be, targets do not read: a header, and the word large, stand for it.';

create or replace function rekey._reencrypt(
  rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], normalization text = null,
  out made_rows tid[], out starts bytea[], out made bytea[], out made_keyrings integer[], out failed_places integer[], out problems text[],
  out indexes bytea[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- the plan is kept, and does not know how many values and keys there will be
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_from_keyrings integer[];
  v_from_versions integer[];
  v_ivs bytea;
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)), array_agg(distinct rekey._int4(h.header, 3))
  into v_from_keyrings, v_from_versions, v_keyrings
  from unnest(v_headers) as h(header);
  v_versions := rekey._lock_active(v_keyrings);
  -- 64 IVs at a time: most of the cost is that of the call.
  select string_agg(rekey._random_bytes(1024), ''::bytea) into v_ivs from generate_series(1, (cardinality(ciphertexts) + 63) / 64);

  select array_agg(o.row) filter (where o.body is not null),
    array_agg(o.old_header || o.old_iv) filter (where o.body is not null),
    array_agg(o.header || o.iv || o.body || rekey._mac(o.key, o.aad, o.iv, o.body)) filter (where o.body is not null),
    array_agg(o.keyring_id) filter (where o.body is not null),
    array_agg(o.place) filter (where o.body is null),
    array_agg(case when o.plaintext is null then coalesce(o.old_problem, 'does not open: damaged, or of another row')
                   else coalesce(o.new_problem, 'the keyring has no active version') end) filter (where o.body is null),
    case when _reencrypt.normalization is not null then array_agg(o.index) filter (where o.body is not null) end
  into made_rows, starts, made, made_keyrings, failed_places, problems, indexes
  from (
    select p.*, case when p.plaintext is not null and p.key is not null then rekey._encipher(p.key, p.iv, p.plaintext) end as body,
      case when _reencrypt.normalization is not null then rekey._index_value(p.version, p.index_key, rekey._normalized(p.plaintext, _reencrypt.normalization)) end as index
    from (
      select u.*, substr(v_ivs, u.place * 16 - 15, 16) as iv, u.header || prefix || u.context as aad,
        case when u.old_key is not null then
          case when rekey._is_authentic(u.old_key, u.old_iv, u.sealed, u.old_header || prefix || u.context)
            then rekey._decipher(u.old_key, u.old_iv, u.sealed) end end as plaintext
      from (
        select c.place::integer as place, c.row, c.context, k.keyring_id, k.old_header, k.old_key, k.header, k.key, k.version, k.index_key, k.new_problem,
          substr(c.ciphertext, 12, 16) as old_iv, substr(c.ciphertext, 28) as sealed,
          case when k.old_header is not null then k.old_problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as old_problem
        from unnest(rows, ciphertexts, contexts) with ordinality as c(row, ciphertext, context, place)
        left join (
          with keys as materialized (
            select * from rekey._deks(v_from_keyrings || v_keyrings, v_from_versions || v_versions, sweeping => true)
          )
          select d.keyring_id, rekey._header(d.keyring_id, d.version) as old_header, d.key as old_key, d.problem as old_problem,
            rekey._header(a.keyring_id, a.version) as header, a.key, a.version, a.problem as new_problem,
            case when _reencrypt.normalization is not null then rekey._index_key(a.key, v_info) end as index_key
          from keys d
          left join (unnest(v_keyrings, v_versions) as w(keyring_id, version) join keys a using (keyring_id, version)) on w.keyring_id = d.keyring_id
          offset 0
        ) k on k.old_header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) u
      offset 0
    ) p
    offset 0
  ) o;
end
$$;
comment on function rekey._reencrypt is
  'Re-encrypts envelopes under the active version of their keyring; each is checked first. made: the new envelopes of made_rows, of made_keyrings; starts: header and IV of the old ones; failed_places: those of the given ones that do not open, and problems, why. prefix: what every context begins with. normalization: of a searchable column, whose index values are made too. Gives back no plaintext.';

create or replace function rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[], indexes bytea[] = null, normalization text = null)
returns table (header bytea, failed_places integer[], problems text[])
language plpgsql stable
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- as rekey._reencrypt()
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)) into v_keyrings, v_versions
  from unnest(v_headers) as h(header);
  return query
    select o.header, array_agg(o.place), array_agg(o.problem)
    from (
      select p.place, p.header,
        case when p.key is null then p.problem
             when not rekey._is_authentic(p.key, p.iv, p.sealed, p.aad) then 'does not open: damaged, or of another row'
             -- (What stands in the index under another version is behind: the next pass makes it anew.)
             when p.index is not null and substr(p.index, 1, 4) = substr(p.header, 8, 4)
               and p.index <> rekey._index_value(p.version, p.index_key, rekey._normalized(rekey._decipher(p.key, p.iv, p.sealed), _check.normalization))
               then 'its index value is not that of its value' end as problem
      from (
        select c.place::integer as place, substr(c.ciphertext, 1, 11) as header, k.key, k.version, k.index_key,
          case when _check.normalization is not null then c.index end as index,
          substr(c.ciphertext, 12, 16) as iv, substr(c.ciphertext, 28) as sealed, k.header || prefix || c.context as aad,
          case when k.header is not null then k.problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as problem
        from unnest(ciphertexts, contexts, indexes) with ordinality as c(ciphertext, context, index, place)
        left join (
          select rekey._header(d.keyring_id, d.version) as header, d.key, d.version, d.problem,
            case when _check.normalization is not null then rekey._index_key(d.key, v_info) end as index_key
          from rekey._deks(v_keyrings, v_versions, sweeping => true) d
          offset 0
        ) k on k.header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) p
      offset 0
    ) o
    where o.problem is not null
    group by o.header;
end
$$;
comment on function rekey._check is
  'Checks the tags of envelopes: the places of those that do not open, by header, with the reason. prefix: what every context begins with. normalization: of a searchable column, whose index values are compared too.';

create or replace function rekey._block(pointer tid) returns bigint
language sql immutable parallel safe
return split_part(trim(pointer::text, '()'), ',', 1)::bigint;
comment on function rekey._block is 'The block of a row pointer.';

create or replace function rekey._next_row(pointer tid) returns tid
language sql immutable parallel safe
return case when pointer is not null then format('(%s,%s)', rekey._block(pointer), split_part(trim(pointer::text, '()'), ',', 2)::integer + 1)::tid end;
comment on function rekey._next_row is 'The row pointer after this one.';

-- A part at a time: who asks for the first rows of all that is left has all of it read, each time. (Rows found by their pointers come in no
-- order that the server knows of.)
create or replace function rekey._scan_on(
  target rekey._target, keyrings integer[], first tid, step bigint = null, until bigint = 4294967294,
  out next_first tid, out next_step bigint, out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_end bigint := least(until, pg_relation_size(target.relation) / current_setting('block_size')::integer);
  v_until bigint;
  v_found record;
begin
  -- 256 blocks hold no more than 2 MB of what is not stored out of line.
  next_step := coalesce(step, 256);
  v_until := least(rekey._block(first) + next_step, v_end);
  select s.* into v_found from rekey._call_scan(
    target.function_name, target.relation, first, format('(%s,0)', v_until)::tid, keyrings, null, 4000, 2097152) s;
  ciphertexts := v_found.ciphertexts;
  contexts := v_found.contexts;
  keys := v_found.keys;
  indexes := v_found.indexes;
  next_first := case when v_found.next is not null then rekey._next_row(v_found.next) when v_until < v_end then format('(%s,0)', v_until)::tid end;
  next_step := case when v_found.next is not null then greatest(next_step / 2, 256)
                    when coalesce(cardinality(v_found.rows), 0) < 1000 then least(next_step * 2, 1048576) else next_step end;
end
$$;
comment on function rekey._scan_on is
  'Some rows of a target from a row pointer on, as its scan function finds them, and where the next call goes on; next_first NULL: no more before block until. step: how many blocks to read, as the last call said; NULL at first.';

create or replace function rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean = false, whole boolean = false)
returns setof rekey._counted
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.*
  from (select array_agg(t.function_name) as functions, array_agg(t.relation) as relations from unnest(targets) as t) a
  cross join lateral rekey._call_count(a.functions, a.relations, keyrings, apart, whole) c;
end;
comment on function rekey._count_rows is
  'Counts targets by keyring and version, in the snapshot of the caller''s statement, as rekey._call_count(); keyring NULL: values that are no envelopes. place: which of the targets.';

-- A blocked target may hold rows of the keyring that it is registered with, and of those that its last complete count saw.
-- Only rows that opened were counted there: whoever owns a table can write any header into it, and would block others by it.
create or replace function rekey._blocked_targets(keyrings integer[], targets rekey._target[] = null) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_agg(jsonb_build_object('target', t.target, 'why', t.problem) order by t.target)
    from unnest(coalesce(targets, array(select t from rekey._targets() t))) t
    left join rekey.protected_columns c on c.label = t.target
    where t.problem is not null and (keyrings is null or c.id is null or rekey._may_hold(c, keyrings)));
end
$$;
comment on function rekey._blocked_targets is
  'The targets that cannot be read or counted, and why; NULL: none. keyrings: only those that may hold rows of one of these; NULL: all. targets: as they were found; NULL: as they are now.';

create or replace function rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) returns boolean
language sql stable
return protected.seen is null or protected.keyring_id = any (keyrings)
  or exists (select from jsonb_each_text(protected.seen) s where s.key::integer = any (keyrings) and s.value::bigint > 0);
comment on function rekey._may_hold is 'Whether a protected column may hold rows of these keyrings: its own, and those that its last complete count saw.';

create or replace function rekey._refuse_blocked(keyrings integer[] = null, targets rekey._target[] = null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocked jsonb := rekey._blocked_targets(keyrings, targets);
begin
  if v_blocked is not null then
    raise exception '% is blocked: %', v_blocked -> 0 ->> 'target', v_blocked -> 0 ->> 'why' using errcode = 'RK005',
      hint = 'As long as it cannot be counted, nothing completes and no key is destroyed. See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;
comment on function rekey._refuse_blocked is
  'RK005 where a target is blocked that may hold rows of these keyrings, NULL: of any: what cannot be counted is never taken for empty. targets: as rekey._blocked_targets().';

-- The functions of the targets are looked at before and after they are called, each time as they are at that moment: what
-- an owner changes in between has no effect. After the call, its locks keep the tables from being changed.
create or replace function rekey._function_names(function_name name) returns name[]
language sql immutable parallel safe
return array[function_name || '_guard', function_name || '_sql', function_name || '_count', function_name || '_scan', function_name || '_read',
  function_name || '_write', function_name || '_trigger', function_name || '_look', function_name || '_carry', function_name || '_move', function_name || '_live']::name[];
comment on function rekey._function_names is 'What the functions of a target can be called: guard, sql, count, scan, read, write, trigger, and those of a blind index; not all have all of them. (An index finds them so; of a schema there is none.)';

create or replace function rekey._target_state(function_name name = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if function_name is not null then
    return (
      select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
      from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace
        and p.proname = any (rekey._function_names(function_name)));
  end if;
  return (
    select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
    from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace);
end
$$;
comment on function rekey._target_state is 'What changes whenever a function of a target does; NULL: of any.';

create or replace function rekey._refuse_snapshot() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this runs in READ COMMITTED only' using errcode = 'active_sql_transaction',
      hint = 'An older snapshot does not see every row that stands on a key.';
  end if;
end
$$;
comment on function rekey._refuse_snapshot is 'Raises 25001 outside READ COMMITTED.';

create or replace function rekey.key_usage(keyring text = null) returns setof rekey.key_rows
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids integer[] := case when key_usage.keyring is not null then array[(rekey._keyring(key_usage.keyring)).id] end;
begin
  perform rekey._refuse_snapshot();
  return query
    with counted as (
      select c.keyring_id, c.version, sum(c.rows)::bigint as rows, array_agg(distinct c.relation::text) as relations
      from rekey._count(v_ids, false) c
      where c.version > 0
      group by c.keyring_id, c.version
    )
    select r.name, coalesce(k.version, c.version), coalesce(k.state, 'unknown'), coalesce(c.rows, 0), coalesce(c.relations, '{}')
    from (select * from rekey.encryption_keys k where v_ids is null or k.keyring_id = any (v_ids)) k
    full join counted c on c.keyring_id = k.keyring_id and c.version = k.version
    join rekey.keyrings r on r.id = coalesce(k.keyring_id, c.keyring_id)
    order by 1, 2;
end
$$;
comment on function rekey.key_usage is
  'A census: how many rows stand on each key version, and in which relations. keyring NULL: all. Reads every protected row. 25001: not in READ COMMITTED; RK005: a target is blocked; RK007: no such keyring.';
grant execute on function rekey.key_usage to rekey_admin, rekey_operator;

create or replace function rekey.verify_ciphertexts(keyring text = null) returns setof rekey.verified_rows
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids integer[] := case when verify_ciphertexts.keyring is not null then array[(rekey._keyring(verify_ciphertexts.keyring)).id] end;
begin
  return query
    select c.relation::text, r.name, c.version, sum(c.rows)::bigint, sum(c.failed)::bigint
    from rekey._count(v_ids, true) c
    join rekey.keyrings r on r.id = c.keyring_id
    where c.version > 0
    group by 1, 2, 3
    order by 1, 2, 3;
end
$$;
comment on function rekey.verify_ciphertexts is
  'Checks that every protected row opens, and shows nothing of what is in it. keyring NULL: all. RK001, RK002: KEK; RK005: a target is blocked; RK007: no such keyring.';
grant execute on function rekey.verify_ciphertexts to rekey_admin, rekey_operator;

-- sql/code/51_columns.sql
-- Columns of the user's own tables as targets. The functions that read and write a protected column are made by its owner,
-- from the bodies below. They find the column through a guard function, which names it and its context columns: being
-- bound early, it follows renames and restores, and keeps them from being dropped.

create or replace function rekey._column_bodies(protected rekey.protected_columns)
returns table (name text, arguments text, result text, volatility text, body text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text := 'column_' || protected.id;
  v_bytes text := 't.%1$s';
  -- What a value begins with, whether an envelope may, and the header in it, without which it is none.
  v_start text := 'substr(t.%1$s, 1, 11)';
  v_may_be text := $sql$substr(g.start, 1, 3) = '\x524b01'$sql$;
  v_header text := $sql$case when octet_length(g.start) = 11 and substr(g.start, 1, 3) = '\x524b01' then g.start end$sql$;
  v_stored text := 'u.ciphertext';
  -- Whether a value still has the header and IV that were read. (IS TRUE keeps it from being the key of a hash or merge join: the
  -- values of the whole relation would be read, wherever they are stored.)
  v_begins text := '(pg_catalog.substr(t.%1$s, 1, 27) operator(pg_catalog.=) u.start) is true';
  -- What holds for the UPDATE of a rotation. The path, in which names could be anybody's, ends with the function: to set it back
  -- would hide that a trigger has set it for the session. The other is set back for the session, for the same reason.
  v_kept_role text := case when protected.fire_triggers then '' else '
  v_role text := current_setting(''session_replication_role'');' end;
  v_before text := case when protected.fire_triggers then format('perform set_config(''search_path'', %L, true);', protected.search_path)
    else 'perform set_config(''session_replication_role'', ''replica'', true);' end;
  v_after text := case when protected.fire_triggers then '' else 'perform set_config(''session_replication_role'', v_role, false);' end;
  v_searchable boolean := protected.index_place is not null;
  v_from text;
  v_select text;
  v_page text;
  v_count text;
  v_due text := 'h.header <> all ($6)';
  v_set text;
begin
  -- The statements have places for the column (%1$s), the relation (%2$s), context (%3$s) and key (%4$s) of a row, all
  -- columns that these take (%5$s), and the bytes of context and key (%6$s); of a searchable column, for the one with its index (%7$s).
  if protected.is_text then
    -- A column may have a collation that knows no regular expressions, or takes other letters for equal.
    v_start := 'left(t.%1$s, 20) collate "C"';
    v_may_be := $sql$left(g.start, 8) = 'rk1:UksB'$sql$;
    v_header := $sql$case when g.start ~ '^rk1:UksB[A-Za-z0-9+/]{12}' then substr(decode(right(g.start, -4), 'base64'), 1, 11) end$sql$;
    -- As rekey._from_text(). Of an envelope that is damaged as a text, the header, by which its failure is noted.
    v_bytes := $sql$case
      when t.%1$s collate "C" ~ '^rk1:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$'
      then decode(right(t.%1$s, -4), 'base64') else coalesce((select $sql$ || v_header || ' from (select ' || v_start || $sql$ as start) g), convert_to(t.%1$s, 'UTF8')) end$sql$;
    v_begins := $sql$(pg_catalog.left(t.%1$s, 40) collate pg_catalog."C" operator(pg_catalog.=) ('rk1:' operator(pg_catalog.||) pg_catalog.encode(u.start, 'base64'))) is true$sql$;
    v_stored := $sql$'rk1:' operator(pg_catalog.||) pg_catalog.replace(pg_catalog.encode(u.ciphertext, 'base64'), E'\n', '')$sql$;
  end if;
  v_from := ' from only %2$s t
    cross join lateral (select ' || v_header || ' as header from (select ' || v_start || ' as start offset 0) g offset 0) h';
  -- The rows first, then what is made of those that are wanted: there may be many more in a range, or in max_rows.
  -- (What is added to the columns of the table has names of system columns, which none of them can have.)
  -- More bytes than any envelope can have (cmax is NULL then) are not read: a GB that was compressed, or stored out of line, has
  -- no room in the arrays. octet_length() asks only for the length that is stored.
  v_select := 'with page as materialized (
    select t.ctid, %5$s, case when octet_length(t.%1$s)::bigint%6$s <= 67108864 then octet_length(t.%1$s)::bigint%6$s end as cmax,
      case when octet_length(t.%1$s)::bigint%6$s > 67108864 then h.header || ''\x6c61726765'' end as xmin' || v_from;
  v_page := '), total as (
    select sum(coalesce(t.cmax, 100)) as bytes from page t
  ), sized as (
    select t.*, 0 as cmin from page t where (select a.bytes from total a) <= $5
    union all
    select t.*, sum(coalesce(t.cmax, 100)) over (order by t.ctid rows unbounded preceding) - coalesce(t.cmax, 100)
    from page t where (select a.bytes from total a) > $5
  )
  select case when count(*) filter (where t.cmin < $5) < count(*) or count(*) = $4 then max(t.ctid) filter (where t.cmin < $5) end,
    array_agg(t.ctid) filter (where t.cmin < $5), array_agg(case when t.cmax is null then t.xmin else ' || v_bytes || ' end) filter (where t.cmin < $5),
    array_agg(case when t.cmax is null then '''' else %3$s end) filter (where t.cmin < $5), array_agg(%4$s) filter (where t.cmin < $5),
    ' || case when v_searchable then 'array_agg(t.%7$s) filter (where t.cmin < $5)' else 'null::bytea[]' end || '
  from sized t';
  v_count := 'with begun as (
      select case when ' || v_may_be || ' then g.start end as start, count(*) as rows
      from (select ' || v_start || ' as start from only %2$s t where t.%1$s is not null offset 0) g group by 1
    ), headed as (
      select (get_byte(h.header, 3) << 24) | (get_byte(h.header, 4) << 16) | (get_byte(h.header, 5) << 8) | get_byte(h.header, 6) as keyring_id,
        (get_byte(h.header, 7) << 24) | (get_byte(h.header, 8) << 16) | (get_byte(h.header, 9) << 8) | get_byte(h.header, 10) as version, g.rows
      from begun g cross join lateral (select ' || v_header || ' as header offset 0) h
    )
    select e.keyring_id, e.version, sum(e.rows)::bigint from headed e where $1 is null or e.keyring_id = any ($1) group by 1, 2';
  if v_searchable then
    -- What stands in the index under another version than its value is counted once more, as of version 0, which there is not.
    v_count := 'with begun as (
      select case when ' || v_may_be || ' then g.start end as start, g.index, count(*) as rows
      from (select ' || v_start || ' as start, substr(t.%7$s, 1, 4) as index from only %2$s t where t.%1$s is not null offset 0) g group by 1, 2
    ), headed as (
      select (get_byte(h.header, 3) << 24) | (get_byte(h.header, 4) << 16) | (get_byte(h.header, 5) << 8) | get_byte(h.header, 6) as keyring_id,
        (get_byte(h.header, 7) << 24) | (get_byte(h.header, 8) << 16) | (get_byte(h.header, 9) << 8) | get_byte(h.header, 10) as version,
        h.header is not null and g.index is distinct from substr(h.header, 8, 4) as astray, g.rows
      from begun g cross join lateral (select ' || v_header || ' as header offset 0) h
    ), counted as (
      select e.keyring_id, e.version, e.rows from headed e
      union all
      select e.keyring_id, 0, e.rows from headed e where e.astray
    )
    select e.keyring_id, e.version, sum(e.rows)::bigint from counted e where $1 is null or e.keyring_id = any ($1) group by 1, 2';
    v_due := '($6 is null or h.header <> all ($6) or substr(t.%7$s, 1, 4) is distinct from substr(h.header, 8, 4))';
  end if;
  v_set := quote_literal('update only %2$s t set %1$s = ' || v_stored || case when v_searchable then ', %7$s = u.index' else '' end || '
    from rows from (pg_catalog.unnest((select $1)), pg_catalog.unnest((select $2)), pg_catalog.unnest((select $3))'
      || case when v_searchable then ', pg_catalog.unnest((select $4))' else '' end || ') as u(row, start, ciphertext' || case when v_searchable then ', index' else '' end || ')
    where t.ctid operator(pg_catalog.=) u.row and ($2 is null or ' || v_begins || ')
    returning t.%1$s operator(pg_catalog.=) (' || v_stored || ')' || case when protected.is_text then ' collate pg_catalog."C"' else '' end
      || case when v_searchable then ' and coalesce(t.%7$s operator(pg_catalog.=) u.index, false)' else '' end);
  if v_searchable then
    v_set := 'case when ciphertexts is not null then ' || v_set || ' else ' || quote_literal('update only %2$s t set %7$s = u.index
    from rows from (pg_catalog.unnest((select $1)), pg_catalog.unnest((select $2)), pg_catalog.unnest((select $4))) as u(row, start, index)
    where t.ctid operator(pg_catalog.=) u.row and ' || v_begins || ' and $3 is null
    returning coalesce(t.%7$s operator(pg_catalog.=) u.index, false)') || ' end';
  end if;

  return query
  select format('%s_%s', v_prefix, b.suffix), b.arguments, b.result, b.volatility, b.body
  from (values
    ('sql', 'relation regclass, template text', 'text', 'stable', $body$
declare
  v_table regclass;
  v_names text[];
  v_context text;
  v_key text;
  v_key_names text[];
  v_lengths text;
  v_whole regclass;
begin
  -- First the locks, so that what is found out remains true. The whole before its parts, as ALTER TABLE locks them: an UPDATE of a
  -- partition would lock it after them, to check their bounds.
  for v_whole in
    select c.oid
    from (select relation as relid, 0 as place union all select * from pg_partition_ancestors(relation) with ordinality) a join pg_class c on c.oid = a.relid
    where c.oid = relation and a.place = 0
      or c.oid <> relation and has_table_privilege(c.oid, 'select') and has_schema_privilege(c.relnamespace, 'usage')
    order by a.place desc
  loop
    execute format('select from only %s limit 0', v_whole);
  end loop;
  -- The columns that the guard names, in table order.
  select d.refobjid, array_agg(quote_ident(a.attname) order by a.attnum) into v_table, v_names
  from pg_depend d
  join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
  where d.classid = 'pg_proc'::regclass and d.objid = 'rekey_targets.$body$ || v_prefix || $body$_guard'::regproc
    and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
  group by d.refobjid;
  if relation <> v_table and not exists (select from pg_partition_ancestors(relation) a where a.relid = v_table) then
    raise exception '% is no part of the protected table any more', relation using errcode = 'serialization_failure';
  elsif template is null then
    perform from pg_partition_tree(relation);
    return null;
  end if;
  select string_agg(format($q$coalesce(int4send(octet_length(convert_to(t.%1$s::text, 'UTF8'))) || convert_to(t.%1$s::text, 'UTF8'), '\xffffffff')$q$,
      v_names[p.place]), ' || ' order by p.rank)
  into v_context
  from unnest('$body$ || protected.places[2:]::text || $body$'::integer[]) with ordinality as p(place, rank);
  -- A row is called by its primary key, where it has one.
  -- (A cast to text of a type that is not PostgreSQL's may be anybody's function; an output function may not.)
  select string_agg(format(case when (select y.typnamespace from pg_type y where y.oid = a.atttypid) = 'pg_catalog'::regnamespace
      then 't.%I::text' else $q$format('%%s', t.%I)$q$ end, a.attname), $q$ || '/' || $q$ order by k.rank), array_agg(quote_ident(a.attname))
  into v_key, v_key_names
  from pg_index i
  cross join lateral unnest(i.indkey::smallint[]) with ordinality as k(attnum, rank)
  join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
  where i.indrelid = v_table and i.indisprimary;
  select string_agg(format(case when a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'bytea'::regtype)
      then ' + coalesce(octet_length(t.%1$I), 0)' else ' + coalesce(pg_column_size(t.%1$I), 0)' end, a.attname), '')
  into v_lengths
  from pg_attribute a
  where a.attrelid = v_table and a.attlen = -1 and not a.attisdropped
    and quote_ident(a.attname) = any (array_remove(v_names, v_names[$body$ || protected.places[1] || $body$]) || v_key_names);
  return format(template, v_names[$body$ || protected.places[1] || $body$], relation, coalesce(v_context, $q$''::bytea$q$), coalesce(v_key, 't.ctid::text'),
    (select string_agg(distinct 't.' || n.name, ', ') from unnest(v_names || v_key_names) as n(name)), coalesce(v_lengths, '')$body$ || case when v_searchable then format(', v_names[%s]', protected.index_place) else '' end || $body$);
end
$body$),
    ('count', 'relation regclass, keyrings integer[]', 'table (keyring_id integer, version integer, rows bigint)', 'stable', '
begin
  if keyrings = ''{}'' then
    perform rekey_targets.' || v_prefix || '_sql(relation, null);
    return;
  end if;
  for keyring_id, version, rows in execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    v_count) || ') using keyrings loop
    return next;
  end loop;
end
'),
    ('scan', 'relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]', 'record', 'stable', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and h.header is not null and ($3 is null or substr(h.header, 4, 4) = any ($3))
      and ($6 is null or age(t.xmin) <= age($6))
    order by t.ctid limit $4' || v_page) || ')
  into next, rows, ciphertexts, contexts, keys, indexes
  using first, until, case when keyrings is not null then array(select int4send(k.id) from unnest(keyrings) as k(id)) end, max_rows, max_bytes, since;
end
'),
    ('read', 'relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]', 'record', 'volatile', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, case when keyrings is null then ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and t.%1$s is not null and h.header is null
    order by t.ctid limit $4 for no key update of t skip locked' || v_page) || ' else ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and substr(h.header, 4, 4) = any ($3) and ' || v_due || '
    order by t.ctid limit $4' || v_page) || ' end)
  into next, rows, ciphertexts, contexts, keys, indexes
  using first, until, array(select int4send(k.id) from unnest(keyrings) as k(id)), max_rows, max_bytes,
    ' || case when v_searchable then 'case when versions is not null then ' else '' end || 'array(select ''\x524b01'' || int4send(k.id) || int4send(k.version) from unnest(keyrings, versions) as k(id, version))'
    || case when v_searchable then ' end' else '' end || ';
end
'),
    ('write', 'relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], indexes bytea[], out locked tid[], out written bigint', 'record', 'volatile', '
declare
  -- (A subselect hides from the planner how many rows there are: for some hundreds it would rather read a whole table of some
  -- thousand blocks, batch after batch, than follow their pointers.)
  v_lock text := rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    'with held as materialized (
      select u.row, t.ctid as now from unnest((select $1), (select $2)) as u(row, start) join only %2$s t on t.ctid = u.row and ($2 is null or ' || v_begins || ')
      for ' || case when v_searchable then 'update' else 'no key update' end || ' of t skip locked
    )
    select array_agg(h.row) from held h where h.now = h.row') || ');
  v_update text := rekey_targets.' || v_prefix || '_sql(relation, ' || v_set || ');
  v_kept boolean;' || v_kept_role || '
begin
  execute v_lock into locked using rows, starts;
  written := 0;
  if locked is null then
    return;
  elsif cardinality(locked) < cardinality(rows) then
    ' || case when v_searchable then 'select array_agg(u.row), case when starts is not null then array_agg(u.start) end,
      case when ciphertexts is not null then array_agg(u.ciphertext) end, array_agg(u.index) into rows, starts, ciphertexts, indexes
    from unnest(rows, starts, ciphertexts, indexes) as u(row, start, ciphertext, index)'
    else 'select array_agg(u.row), case when starts is not null then array_agg(u.start) end, array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext)' end || ' where u.row = any (locked);
  end if;
  ' || v_before || '
  -- A trigger may have kept the row, or put another value into it.
  for v_kept in execute v_update using rows, starts, ciphertexts' || case when v_searchable then ', indexes' else '' end || ' loop
    written := written operator(pg_catalog.+) case when v_kept then 1 else 0 end;
  end loop;
  ' || v_after || '
  set constraints all immediate;
end
')
  ) as b(suffix, arguments, result, volatility, body);
end
$$;
comment on function rekey._column_bodies is
  'The functions of a protected column as they must be: sql (puts a statement together, having locked what a partition is a part of; template NULL: only locks the table, with its partitions), count, scan, read, write; each PL/pgSQL, SECURITY DEFINER, owned by the owner of the table.';

-- (PL/pgSQL, as the functions that are called for each column: it keeps its plans for the session, SQL for a statement.)
create or replace function rekey._column_shape(id integer, out relation regclass, out attnums smallint[])
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- a plan of when there were few columns is kept while they become many
as $$
begin
  select d.refobjid::regclass, array_agg(d.refobjsubid::smallint order by d.refobjsubid)
  into relation, attnums
  from pg_depend d
  where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure(format('rekey_targets.column_%s_guard()', id))
    and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
  group by d.refobjid;
end
$$;
comment on function rekey._column_shape is 'The table of a protected column now, and the numbers of the columns that its guard names, in table order.';

create or replace function rekey._home() returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return format('%s/%s', coalesce(rekey._system_identifier(), 0), (select d.oid from pg_database d where d.datname = current_database()));
end
$$;
comment on function rekey._home is 'In which cluster and database an oid is good.';

-- (pg_partition_tree() would lock them, each before what it is a part of.)
create or replace function rekey._parts(relation regclass) returns setof regclass
language sql stable rows 1  -- as rekey._relations_here()
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive parts as (
    select i.inhrelid from pg_inherits i where i.inhparent = relation and not i.inhdetachpending
    union all
    select i.inhrelid from parts p join pg_inherits i on i.inhparent = p.inhrelid and not i.inhdetachpending
  )
  select p.inhrelid from parts p;
end;
comment on function rekey._parts is 'The partitions of a partitioned table, and theirs; locks nothing.';

create or replace function rekey._relations_here(relation regclass) returns setof regclass
language plpgsql stable rows 1  -- or catalogs are read whole for each column
set search_path = pg_catalog, pg_temp
as $$
begin
  if (select c.relkind from pg_class c where c.oid = relation) = 'p' then
    return query select c.oid::regclass from rekey._parts(relation) p join pg_class c on c.oid = p where c.relkind <> 'p';
  elsif relation is not null then
    return next relation;
  end if;
end
$$;
comment on function rekey._relations_here is 'The relations of a table that have rows in this database: itself, or the leaves of its partitions.';

-- The usual rebuild of a table is a new one, a copy, and an exchange of names; that of a column too. The registration stays
-- with the old one then, and every row of the new one would be passed by.
create or replace function rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
begin
  return (select format('%s.%I', c.oid::regclass, a.attname)
  from (values (parse_ident(protected.relation_name) || protected.column_name::text), (parse_ident(protected.label))) as n(names)
  join pg_class c on c.relname = n.names[2] and c.relkind in ('r', 'p', 'f', 'm')
  join pg_namespace s on s.oid = c.relnamespace and s.nspname = n.names[1]
  join pg_attribute a on a.attrelid = c.oid and a.attname = n.names[3] and a.attnum > 0 and not a.attisdropped
  where (c.oid, a.attnum) is distinct from (_namesake.relation::oid, _namesake.attnum)
    and not exists (select from rekey._column_relations r where r.column_id = protected.id and r.relation = c.oid and r.attnum = a.attnum and r.home = rekey._home() and r.settled)
  limit 1);
end
$$;
comment on function rekey._namesake is 'Another column than this one, of this table or another, that has the name noted of a protected column, or that of its label; NULL: there is none, or it is settled.';

-- (to_regclass() takes USAGE of the schema, which rekey_owner need not have.)
create or replace function rekey._relation_named(name text) returns oid
language sql stable strict
set search_path = pg_catalog, pg_temp
begin atomic
  select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where array[n.nspname, c.relname]::text[] = parse_ident(name);
end;
comment on function rekey._relation_named is 'The relation that has this name, with its schema, now; NULL: none.';

create or replace function rekey._lost_part(protected rekey.protected_columns, leaves oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_home text := rekey._home();
begin
  return (
    select c.oid::regclass::text
    from (
      select case when r.home = v_home then r.relation else rekey._relation_named(r.relation_name) end as oid
      from rekey._column_relations r
      where r.column_id = protected.id and r.attnum = 0 and not r.settled
      except
      select u from unnest(leaves) u) l
    join pg_class c on c.oid = l.oid
    limit 1);
end
$$;
comment on function rekey._lost_part is 'A relation that held values of a protected column, is still there, and is none of these, which its table consists of; NULL: there is none.';

create or replace function rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
begin
  return (
    select o.label
    from pg_depend d
    join pg_proc p on p.oid = d.objid and p.pronamespace = 'rekey_targets'::regnamespace
    join rekey.protected_columns o on o.id = substring(p.proname from '^column_(\d{1,9})_guard$')::integer
    where o.id <> protected.id and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0 and d.classid = 'pg_proc'::regclass
      and d.refobjid = any (array_remove(leaves || array(select a.relid::oid from pg_partition_ancestors(_rival.relation) a), _rival.relation::oid))
    limit 1);
end
$$;
comment on function rekey._rival is 'Label of another protected column whose table is a partition of this one, or has it as a partition: their values would be bound to two labels. leaves: what the table consists of. NULL: there is none.';

create or replace function rekey._is_of_citus(relation regclass) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_found boolean := false;
begin
  -- Where the library is not loaded, the shell of a distributed table counts 0: the catalog table still tells.
  if exists (select from pg_class c where c.relname = 'pg_dist_partition' and c.relnamespace = 'pg_catalog'::regnamespace and c.relkind = 'r') then
    if not has_table_privilege('pg_catalog.pg_dist_partition', 'select') then
      return true;  -- unknown
    end if;
    execute format('select exists (select from pg_catalog.%I d where d.logicalrelid = $1)', 'pg_dist_partition') into v_found using relation;
  end if;
  return v_found;
end
$$;
comment on function rekey._is_of_citus is 'Whether Citus distributes a table, also where it is not loaded.';

create or replace function rekey._storage_problem(relation regclass) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._is_of_citus(relation) then
    return format('%s is a table of Citus, whose rows are on other nodes: pg_rekey cannot sweep it', relation);
  end if;
  return (
    select case
      when c.relkind not in ('r', 'p') then format('%s is a foreign table: pg_rekey cannot sweep it', relation)
      when c.relkind = 'r' and m.amname <> 'heap' then format('%s has the access method %I: pg_rekey can sweep a heap only', relation, m.amname) end
    from pg_class c left join pg_am m on m.oid = c.relam where c.oid = relation);
end
$$;
comment on function rekey._storage_problem is 'Why the rows of a table cannot be swept where they are: Citus, foreign, another access method than heap; NULL: they can.';

create or replace function rekey._trigger_names(protected rekey.protected_columns) returns text[]
language sql immutable
return array[format('zz_pg_rekey_%s_insert', protected.id), format('zz_pg_rekey_%s_update', protected.id)]
  || case when protected.encrypt_on_write then array[format('zz_pg_rekey_%s', protected.id)] else '{}'::text[] end
  || case when protected.index_place is not null and protected.encrypt_on_write then array[format('zz_pg_rekey_%s_look', protected.id), format('zz_pg_rekey_%s_carry', protected.id)] else '{}'::text[] end;
comment on function rekey._trigger_names is 'The triggers of a protected column: those that keep envelopes of versions out that are about to be destroyed, the one that encrypts, and those of a blind index.';

create or replace function rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_names name[] := rekey._trigger_names(protected);
  v_functions oid[] := array(
    select case when n.name ~ '_(insert|update)$' then to_regproc('rekey._refuse_doomed')
      else to_regproc(format('rekey_targets.column_%s_%s', protected.id, coalesce(substring(n.name from '_(look|carry)$'), 'trigger'))) end
    from unnest(v_names) with ordinality as n(name, place) order by n.place);
begin
  return (
    select format('the trigger %I of %s is off, or was dropped or replaced', w.name, w.oid::regclass)
    from (
      select t.oid, n.name, n.function
      from unnest(relations) as t(oid)
      cross join unnest(v_names, v_functions) as n(name, function)
      except
      select g.tgrelid, g.tgname, g.tgfoid
      from pg_trigger g
      where g.tgrelid = any (relations) and g.tgname = any (v_names) and g.tgenabled in ('A', 'O')) w
    limit 1);
end
$$;
comment on function rekey._trigger_problem is 'Which trigger of a protected column does not fire, on which of these relations; NULL: all do.';

create or replace function rekey._update_triggers(relation regclass, attnum smallint)
returns table (leaf regclass, trigger_id oid)
language sql stable rows 1  -- as rekey._relations_here()
set search_path = pg_catalog, pg_temp
begin atomic
  -- A sweep writes into the leaves of partitions, each by itself. 16: for UPDATE; a trigger for UPDATE OF other columns does not
  -- fire, but for those that are generated from this one.
  select h.oid, t.oid
  from rekey._relations_here(_update_triggers.relation) as h(oid)
  join pg_attribute n on n.attrelid = _update_triggers.relation and n.attnum = _update_triggers.attnum
  join pg_attribute a on a.attrelid = h.oid and a.attname = n.attname
  join pg_trigger t on t.tgrelid = h.oid and not t.tgisinternal and t.tgtype::integer & 16 = 16
  where cardinality(t.tgattr::smallint[]) = 0 or a.attnum = any (t.tgattr::smallint[])
    or exists (
      select from pg_attrdef f
      join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid and d.refclassid = 'pg_class'::regclass
        and d.refobjid = h.oid and d.refobjsubid = a.attnum
      where f.adrelid = h.oid and f.adnum = any (t.tgattr::smallint[]));
end;
comment on function rekey._update_triggers is 'The triggers, on or off, that are for the updates of a rotation of this column, on each relation that has rows. (None of PostgreSQL''s own: the column is no key.)';

create or replace function rekey._is_own_trigger(trigger_id oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgname ~ '^zz_pg_rekey_\d+(_insert|_update|_look|_carry)?$'
    and (p.pronamespace = 'rekey'::regnamespace and p.proname = '_refuse_doomed'
      or p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_(trigger|look|carry)$')
  from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where t.oid = trigger_id;
end;
comment on function rekey._is_own_trigger is 'Whether a trigger is one that pg_rekey puts on protected tables.';

-- What an UPDATE evaluates beside triggers: CHECKs, indexes, generated columns, keys of partitions; planning it, also the constant
-- parts of statistics. And the conditions of our triggers, which fire. A domain has CHECKs too, and so may whatever has parts.
create or replace function rekey._code_in_updates(leaf regclass) returns table (object text, code text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select pg_describe_object(d.classid, d.objid, 0), pg_describe_object(d.refclassid, d.refobjid, 0)
  from (
    select 'pg_constraint'::regclass as class, c.oid from pg_constraint c where c.conrelid = leaf
    union all select 'pg_class'::regclass, i.indexrelid from pg_index i where i.indrelid = leaf
    union all select 'pg_attrdef'::regclass, f.oid from pg_attrdef f
      join pg_attribute a on a.attrelid = f.adrelid and a.attnum = f.adnum and a.attgenerated <> '' where f.adrelid = leaf
    union all select 'pg_class'::regclass, p.relid from pg_partition_ancestors(leaf) p where p.relid <> leaf
    union all select 'pg_statistic_ext'::regclass, s.oid from pg_statistic_ext s where s.stxrelid = leaf
    union all select 'pg_trigger'::regclass, t.oid from pg_trigger t where t.tgrelid = leaf and rekey._is_own_trigger(t.oid)) o
  join pg_depend d on d.classid = o.class and d.objid = o.oid and d.objsubid = 0
  left join pg_operator r on d.refclassid = 'pg_operator'::regclass and r.oid = d.refobjid
  left join pg_proc p on p.oid = case d.refclassid when 'pg_proc'::regclass then d.refobjid when 'pg_operator'::regclass then r.oprcode::oid end
  left join pg_type y on d.refclassid = 'pg_type'::regclass and y.oid = d.refobjid
  where p.pronamespace <> 'pg_catalog'::regnamespace and not (o.class = 'pg_trigger'::regclass and p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace))
    or y.typnamespace <> 'pg_catalog'::regnamespace and y.typtype <> 'e' and (y.typtype <> 'b' or y.typelem <> 0) and o.class <> 'pg_class'::regclass;
end;
comment on function rekey._code_in_updates is 'Functions and types that are not PostgreSQL''s own, in what an UPDATE of this relation evaluates.';

create or replace function rekey._silence_problem(relation regclass, attnum smallint, owner oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(
    (select format('%s owns it, and may not keep triggers from firing: GRANT SET ON PARAMETER session_replication_role TO %1$s, as a superuser', owner::regrole)
     where not has_parameter_privilege(owner, 'session_replication_role', 'set')),
    (select format('the trigger %I of %s fires in the replica role too: ALTER TABLE %2$s ENABLE TRIGGER %1$I', t.tgname, u.leaf)
     from rekey._update_triggers(_silence_problem.relation, _silence_problem.attnum) u join pg_trigger t on t.oid = u.trigger_id
     where t.tgenabled in ('A', 'R') and not rekey._is_own_trigger(t.oid) order by t.tgname limit 1),
    -- 2: ON UPDATE
    (select format('the rule %I of %s applies in the replica role too: ALTER TABLE %2$s ENABLE RULE %1$I', r.rulename, r.ev_class::regclass)
     from rekey._relations_here(_silence_problem.relation) h(leaf) join pg_rewrite r on r.ev_class = h.leaf
     where r.ev_type = '2' and r.ev_enabled in ('A', 'R') order by r.rulename limit 1),
    (select format('%s of %s calls %s, which is not PostgreSQL''s own, and would run with the triggers and foreign keys of every table off: drop it', c.object, h.leaf, c.code)
     from rekey._relations_here(_silence_problem.relation) h(leaf) cross join lateral rekey._code_in_updates(h.leaf) c order by c.object, c.code limit 1))
  || ', or let triggers fire (fire_triggers)';
end;
comment on function rekey._silence_problem is 'Why a column cannot be swept without firing triggers (fire_triggers => false), by the owner of its table; NULL: it can.';

-- A name is noted anew only where nothing else has taken it, so that a rebuilt table is not lost sight of.
create or replace function rekey._note_names(only_id integer = null) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
begin atomic
  update rekey.protected_columns c
  set relation_name = n.relation_name, column_name = n.names[1], context_columns = n.names[2:n.last], index_column = n.names[n.last + 1]
  from (
    select p.id, format('%I.%I', s.nspname, r.relname) as relation_name, array_agg(a.attname order by l.rank) as names, cardinality(p.places) as last
    from rekey.protected_columns p
    cross join lateral rekey._column_shape(p.id) h
    join pg_class r on r.oid = h.relation
    join pg_namespace s on s.oid = r.relnamespace
    cross join lateral unnest(p.places || p.index_place) with ordinality as l(place, rank)
    join pg_attribute a on a.attrelid = h.relation and a.attnum = h.attnums[l.place]
    where (only_id is null or p.id = only_id) and rekey._namesake(p, h.relation, h.attnums[p.places[1]]) is null
    group by p.id, s.nspname, r.relname) n
  where n.id = c.id and (c.relation_name, c.column_name, c.context_columns, c.index_column) is distinct from (n.relation_name, n.names[1], n.names[2:n.last], n.names[n.last + 1]);

  -- After a restore into another database the names still say which relations these are.
  with noted as (
    delete from rekey._column_relations r
    where r.home <> rekey._home() and (only_id is null or r.column_id = only_id)
    returning r.column_id, rekey._relation_named(r.relation_name) as relation, r.attnum, r.relation_name, r.settled)
  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select n.column_id, n.relation, n.attnum, n.relation_name, rekey._home(), n.settled from noted n where n.relation is not null
  on conflict (column_id, relation, attnum) do nothing;

  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select p.id, t.relation, 0, t.relation::regclass::text, rekey._home(), false
  from rekey.protected_columns p
  cross join lateral rekey._column_shape(p.id) h
  cross join lateral rekey._relations_here(h.relation) as t(relation)
  where (only_id is null or p.id = only_id)
    and not exists (select from rekey._column_relations r where r.column_id = p.id and r.relation = t.relation and r.attnum = 0 and r.home = rekey._home() and not r.settled)
  on conflict (column_id, relation, attnum) do update set relation_name = excluded.relation_name, home = excluded.home, settled = false;
end;
comment on function rekey._note_names is 'Notes what the protected columns, NULL: all, are called now, and which relations their tables consist of.';

create or replace function rekey._protect_options(protected rekey.protected_columns) returns text
language sql immutable
return case when protected.encrypt_on_write then ', encrypt_on_write => true' else '' end
  || case when protected.fire_triggers then '' else ', fire_triggers => false' end;
comment on function rekey._protect_options is 'What has to be given again where rekey.protect_column() is repeated.';

create or replace function rekey._column_problem(protected rekey.protected_columns, part regclass = null) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_shape record;
  v_table pg_class;
  v_leaves oid[];
  v_looked_at oid[];
  v_other text;
  v_part record;
  v_again text := format('repeat rekey.protect_column(%s), or pg-rekey columns protect, as the owner of the table', '...' || nullif(rekey._protect_options(protected), ''));
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if current_setting('standard_conforming_strings') = 'off' then
    return 'standard_conforming_strings is off in this session: its functions would take envelopes for something else';
  elsif v_shape.relation is null then
    return format('its table or column was dropped, or its functions were not restored: %s, or, where it is gone for good, rekey.unprotect_column(%L), or pg-rekey columns unprotect', v_again, protected.label);
  end if;
  select c.* into v_table from pg_class c where c.oid = v_shape.relation;
  v_other := rekey._namesake(protected, v_shape.relation, v_shape.attnums[protected.places[1]]);
  if v_other is not null then
    return format('its name belongs to %s now, and the registration is with %s: rekey.rebind_column() with the one that holds its values, or pg-rekey columns rebind', v_other, v_shape.relation);
  end if;
  v_leaves := array(select h from rekey._relations_here(v_shape.relation) h);
  v_looked_at := array(select v_shape.relation::oid union select l from unnest(v_leaves) l where part is null or l = part);
  v_other := rekey._lost_part(protected, v_leaves);
  if v_other is not null then
    return format('%s held its values, and is no part of %s any more: attach it again, drop it, or, once it holds none, rekey.rebind_column(%L, %L), or pg-rekey columns rebind',
      v_other, v_shape.relation, v_shape.relation, protected.column_name);
  end if;
  v_other := rekey._rival(protected, v_shape.relation, v_looked_at);
  if v_other is not null then
    return format('its rows are those of %s too, by a partition: detach the partition, or let go of one of the two, by rekey.unprotect_column() or pg-rekey columns unprotect', v_other);
  end if;
  if exists (select from pg_namespace n, aclexplode(n.nspacl) a
             where n.nspname = 'rekey_targets' and a.privilege_type = 'CREATE' and a.grantee <> n.nspowner) then
    return 'somebody may make functions in schema rekey_targets, where a call of rekey.protect_column() was not finished: ' || v_again;
  end if;
  if cardinality(v_shape.attnums) <> cardinality(protected.places) + (protected.index_place is not null)::integer then
    return format('its guard was changed: %s', v_again);
  end if;
  if (select a.atttypid from pg_attribute a where a.attrelid = v_shape.relation and a.attnum = v_shape.attnums[protected.places[1]])
     not in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) then
    return 'its column has another type now';
  end if;
  if v_table.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = v_shape.relation) then
    return 'tables inherit from it, whose rows are not swept: ALTER TABLE ... NO INHERIT';
  end if;
  -- (What is looked at closer than that are few of many.)
  select w.* into v_part
  from (
    select c.oid::regclass as relation, c.relowner, c.relforcerowsecurity, rekey._storage_problem(c.oid) as storage
    from pg_class c
    where c.oid = any (v_looked_at) and (c.relforcerowsecurity or c.relowner <> v_table.relowner or c.relkind not in ('r', 'p')
      or c.relkind = 'r' and c.relam is distinct from (select m.oid from pg_am m where m.amname = 'heap')
      or to_regclass('pg_catalog.pg_dist_partition') is not null)) w
  where w.relforcerowsecurity or w.relowner <> v_table.relowner or w.storage is not null
  limit 1;
  if v_part.relforcerowsecurity then
    return format('FORCE ROW LEVEL SECURITY may hide rows of %s from its owner: ALTER TABLE %1$s NO FORCE ROW LEVEL SECURITY', v_part.relation);
  elsif v_part.storage is not null then
    return v_part.storage;
  elsif v_part.relation is not null then
    return format('the partition %s has another owner than its table: ALTER TABLE %1$s OWNER TO %s', v_part.relation, v_table.relowner::regrole);
  end if;
  -- (A subselect for each of them, found by its name: joined, the bodies of all columns would be compared.)
  if exists (
    select from rekey._column_bodies(protected) b
    where (
      select bool_or(p.prosrc = b.body and p.proowner = v_table.relowner and p.prosecdef and p.proconfig = '{"search_path=pg_catalog, pg_temp"}'
        and p.provolatile = left(b.volatility, 1)::"char" and not p.proleakproof
        and (select l.lanname from pg_language l where l.oid = p.prolang) = 'plpgsql'
        and has_function_privilege('rekey_sweeper', p.oid, 'execute'))
      from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = b.name) is not true) then
    return format('its functions are not as they were made, or its table has another owner: %s', v_again);
  end if;
  v_other := rekey._trigger_problem(protected, v_looked_at);
  if v_other is not null then
    return format('%s: %s', v_other, v_again);
  end if;
  return case when not protected.fire_triggers then rekey._silence_problem(v_shape.relation, v_shape.attnums[protected.places[1]], v_table.relowner) end;
end
$$;
comment on function rekey._column_problem is 'Why a protected column can be neither swept nor counted now, and what to do; NULL: it can. part: nothing is done now but in this one of its partitions.';

create or replace function rekey._refuse_problem(target text, problem text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem is not null then
    raise exception '% is blocked: %', target, problem using errcode = 'RK005', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;
comment on function rekey._refuse_problem is 'RK005 where a target has a problem.';

create or replace function rekey._targets(only_target text = null, only_relation regclass = null) returns setof rekey._target
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_target rekey._target;
  v_table regclass;
begin
  if only_target is null or only_target = 'rekey.secrets' then
    v_target := row('rekey.secrets', 'rekey.secrets'::regclass, 'rekey.secrets'::regclass, 'secrets', true, rekey._part('secret'), false, rekey._table_problem('rekey.secrets'), null);
    return next v_target;
  end if;
  for v_column in select * from rekey.protected_columns c where only_target is null or c.label = only_target order by c.id loop
    select s.relation into v_table from rekey._column_shape(v_column.id) s;
    v_target := row(v_column.label, v_table, v_table, 'column_' || v_column.id, false, rekey._part(v_column.label), v_column.is_text,
      rekey._column_problem(v_column, only_relation), v_column.normalization);
    if v_target.problem is not null then
      return next v_target;
    else
      for v_target.relation in select h from rekey._relations_here(v_table) h where only_relation is null or h = only_relation loop
        return next v_target;
      end loop;
    end if;
  end loop;
end
$$;
comment on function rekey._targets is
  'Every relation with row storage that holds envelopes. indexed: it has an index on the keyring, so that a few rows of many are found fast. prefix: the label of the context. problem: why it is blocked. only_relation: this one of a column.';

create or replace function rekey._targets_now(only_target text = null) returns rekey._target[]
language sql stable
return array(select t from rekey._targets(only_target) t where t.problem is null order by t.relation);
comment on function rekey._targets_now is 'The targets that are not blocked, by relation; only_target: those of this column.';

create or replace function rekey._target_of(chunk rekey._chunks) returns rekey._target
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
begin
  select * into v_target from rekey._targets(chunk.target, chunk.relation) t where t.relation = chunk.relation;
  if not found then
    v_target.problem := 'it is not protected any more, or its partition is gone';
  end if;
  return v_target;
end
$$;
comment on function rekey._target_of is 'The target of a chunk as it is now.';

-- sql/code/52_protect.sql
-- Registering and releasing columns. What needs the rights of the table's owner is done by the caller, who is one;
-- the registry and the schema rekey_targets are rekey_owner's.

create or replace function rekey._refuse_stranger(relation regclass) returns name
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
begin
  if v_owner is null or not pg_has_role(rekey._caller(), v_owner, 'usage') then
    raise exception 'only the owner of % may do this', relation using errcode = 'insufficient_privilege';
  end if;
  return v_owner;
end
$$;
comment on function rekey._refuse_stranger is 'The owner of a table. 42501 where the caller is not a member of it.';

-- SET ROLE would not do: code of the owner's can RESET it, and SESSION AUTHORIZATION too.
create or replace function rekey._refuse_superuser(relation regclass) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
  v_login name := (select a.usename from pg_stat_activity a where a.pid = pg_backend_pid());
  v_caller name := rekey._caller();
begin
  if exists (select from pg_roles r where r.rolname in (v_login, v_caller) and r.rolsuper)
    and not exists (select from pg_roles r where r.rolname = v_owner and r.rolsuper)
  then
    raise exception 'a superuser may not decrypt the rows of %', relation using errcode = 'insufficient_privilege',
      hint = format('Triggers, constraints and rules of the table would run as superuser. Connect as %I, with rekey_admin and rekey_app.', v_owner);
  end if;
end
$$;
comment on function rekey._refuse_superuser is '42501 where a session of a superuser would run the code of another who owns a table.';

-- (From the table to its guards: looking at every column's guard for its table takes long where there are many.)
create or replace function rekey._column_id(relation regclass, column_name name) returns integer
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.id
  from (
    select distinct substring(p.proname from '^column_(\d+)_guard$')::integer as id
    from pg_depend d
    join pg_proc p on p.oid = d.objid and p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d{1,9}_guard$'
    where d.refclassid = 'pg_class'::regclass and d.refobjid = relation and d.refobjsubid > 0 and d.classid = 'pg_proc'::regclass) g
  join rekey.protected_columns c on c.id = g.id
  cross join lateral rekey._column_shape(c.id) s
  join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[c.places[1]]
  where s.relation = _column_id.relation and a.attname = _column_id.column_name;
end;
comment on function rekey._column_id is 'The number of a protected column, by what it is called now; NULL where there is none.';

create or replace function rekey._context_expression(label text, names text[]) returns text
language sql stable
return quote_literal(rekey._part(label)::text) || '::bytea' || (
  select coalesce(string_agg(format(' || rekey._part(%%1$s.%s::text)', replace(c.name, '%', '%%')), '' order by c.rank), '')
  from unnest(names) with ordinality as c(name, rank));
comment on function rekey._context_expression is 'The context of a row in a trigger, with a place (%1$s) for new or old. names: its context columns, quoted.';

create or replace function rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[];
  v_context text;
begin
  if protected.index_place is not null then
    return rekey._index_trigger_body(protected, relation, attnums);
  end if;
  select array_agg(quote_ident(a.attname) order by p.rank) into v_names
  from unnest(protected.places) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = relation and a.attnum = attnums[p.place];
  v_context := rekey._context_expression(protected.label, v_names[2:]);
  return format($body$
declare
  v_envelope bytea;
  v_plaintext bytea;
  v_length integer;
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
begin
  if not rekey._is_unchanged(%7$s, %8$L, tg_name, tg_relid) then
    perform rekey._refuse_other_table(%7$s, tg_relid);
    perform rekey._refuse_renamed(%7$s, %8$L);
    perform rekey._refuse_later_trigger(tg_name, tg_relid);
  end if;
  if new.%1$s is null then
    return new;
  end if;
  v_context := %2$s;
  v_envelope := rekey._envelope_of(new.%1$s);
  -- What a subscription applies was sealed, and checked, where it was written.
  if v_envelope is not null and current_setting('session_replication_role') = 'replica' and rekey._is_of_known_version(v_envelope) then
    return new;
  end if;
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%9$s then
    -- A value that is not adopted yet may be encrypted by other means: the trigger does not take it for plaintext.
    if v_envelope is null or v_context = %3$s then
      return new;
    end if;
    v_plaintext := rekey._open(v_envelope, %3$s);
  elsif v_envelope is null then
    v_plaintext := %4$s;
  else
    -- An envelope that comes in must be of this row. (What a sweep writes, the engine has made of the row itself.)
    if not rekey.is_sweeping(tg_relid) then
      perform rekey._refuse_foreign(v_envelope, v_context);
    end if;
    return new;
  end if;
  v_length := octet_length(v_plaintext);
  v_sealing := rekey._sealing_on_write(%5$s, v_length);
  if v_sealing.key is null then
    return new;
  end if;
  v_iv := rekey._random_bytes(16);
  v_aad := v_sealing.header || v_context;
  v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_plaintext, v_aad);
  new.%1$s := %6$s;
  return new;
end
$body$, v_names[1], format(v_context, 'new'), format(v_context, 'old'),
    case when protected.is_text then format('convert_to(new.%s, ''UTF8'')', v_names[1]) else 'new.' || v_names[1] end,
    protected.keyring_id, case when protected.is_text then 'rekey._to_text(v_envelope)' else 'v_envelope' end,
    protected.id, (select array_agg(a.attname order by a.attnum) from pg_attribute a where a.attrelid = relation and a.attnum = any (attnums)),
    case when protected.is_text then ' collate "C"' end);
end
$$;
comment on function rekey._write_trigger_body is
  'Body of the trigger that encrypts a column on write. It calls the columns by name, since values must not be parameters of a statement.';

-- Triggers fire in the order of their names: what changes the row after ours would have the value sealed for a row that never is.
create or replace function rekey._later_trigger(name text, relation oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgname::text from pg_trigger t
  -- 1: for each row, 2: before, 4 and 16: insert, update
  where t.tgrelid = relation and t.tgname > _later_trigger.name::name and t.tgtype::integer & 3 = 3 and t.tgtype::integer & 20 <> 0 and t.tgenabled <> 'D'
    and t.tgname !~ '^zz_pg_rekey_\d+(_insert|_update|_look)?$'
  order by t.tgname limit 1;
end;
comment on function rekey._later_trigger is 'A trigger of a relation that may change a row after the trigger of this name; NULL: there is none.';

create or replace function rekey._refuse_later_trigger(name text, relation oid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_later text := rekey._later_trigger(name, relation);
begin
  if v_later is not null then
    raise exception 'trigger % of % may change a row after its value was sealed for it', quote_ident(v_later), relation::regclass using errcode = 'RK005',
      hint = format('BEFORE triggers fire in the order of their names: ALTER TRIGGER %I ON %s RENAME TO a name that sorts before %s.', v_later, relation::regclass, name);
  end if;
end
$$;
comment on function rekey._refuse_later_trigger is 'RK005 where a trigger may change a row after the trigger of this name, which seals a value for it.';

create or replace function rekey._is_of_known_version(envelope bytea) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._is_envelope(envelope) and exists (
    select from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7) and k.state <> 'destroyed');
end
$$;
comment on function rekey._is_of_known_version is 'Whether an envelope names a key version that there is.';

create or replace function rekey._sealing_on_write(keyring_id integer, bytes integer) returns rekey._sealing
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription text;
begin
  if current_setting('session_replication_role') <> 'replica' then
    return rekey._sealing(keyring_id, bytes);
  end if;
  begin
    return rekey._sealing(keyring_id, bytes);
  exception when sqlstate 'RK001' then
    select format('subscription %s', quote_ident(s.subname)) into v_subscription from pg_stat_subscription s where s.pid = pg_backend_pid();
    v_subscription := coalesce(v_subscription, 'a session in the replica role');
    if (rekey._settings()).apply_plaintext = 'pass' then
      raise warning '% stores a plain value in a protected column: there is no KEK to seal it with', v_subscription;
      return null;
    end if;
    raise exception '% brings a plain value for a protected column, and there is no KEK to seal it with', v_subscription using errcode = 'RK001',
      hint = 'Give the server a KEK (provider file or vault), protect the column where the value comes from, or let plain values pass: rekey.set_setting(''apply_plaintext'', ''pass'').',
      constraint = 'apply_plaintext';
  end;
end
$$;
comment on function rekey._sealing_on_write is
  'rekey._sealing() for the trigger that encrypts. In the replica role, without the KEK: RK001 that names the subscription; or, where the setting apply_plaintext lets it pass, a warning and NULL.';

-- Asked by WHEN conditions, with the rights of whoever writes. They follow a column that is renamed.
create or replace function rekey._is_scheduled(header bytea) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring integer;
  v_version integer;
begin
  if octet_length(header) = 11 and substr(header, 1, 3) = '\x524b01'::bytea then
    v_keyring := rekey._int4(header, 3);
    v_version := rekey._int4(header, 7);
    return exists (
      select from rekey.encryption_keys k
      where k.keyring_id = v_keyring and k.version = v_version and k.state = 'destroy_scheduled');
  end if;
  return false;
end
$$;
comment on function rekey._is_scheduled is 'Whether it is the header of an envelope of a version that is scheduled for destruction.';

-- What is written may be plain, and must not become the parameter of a statement: these two are inlined, as rekey.encrypt_text() is.
create or replace function rekey._is_doomed(value bytea) returns boolean
language sql volatile
return rekey._may_be_doomed() and rekey._is_scheduled(substr(value, 1, 11));
comment on function rekey._is_doomed(bytea) is 'Whether a value is an envelope of a version that is scheduled for destruction.';

create or replace function rekey._is_doomed(value text) returns boolean
language sql volatile
return rekey._may_be_doomed() and rekey._is_scheduled(
  case when left(value, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}' then substr(decode(right(left(value, 20), -4), 'base64'), 1, 11) end);
comment on function rekey._is_doomed(text) is 'As for bytea, of the text form.';

create or replace function rekey._refuse_doomed() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'the value stands on a key version that is scheduled for destruction' using errcode = 'RK006',
    hint = 'Encrypt it anew. Who needs the old one cancels the destruction: rekey.cancel_key_destruction().', constraint = 'cancel_destruction';
end
$$;
comment on function rekey._refuse_doomed is 'Trigger of every protected column, under the condition rekey._is_doomed(): RK006. So nothing comes to stand on a version whose destruction is scheduled.';

create or replace function rekey.is_sweeping(relation regclass) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  -- The setting saves the look; it proves nothing, since anybody can make it.
  return coalesce(current_setting('rekey.sweeping', true), '') = 'on' and exists (
    select from rekey._sweeping s
    where s.transaction = pg_current_xact_id_if_assigned()
      and (s.relation = is_sweeping.relation or exists (select from pg_partition_ancestors(s.relation) a where a.relid = is_sweeping.relation)));
end
$$;
comment on function rekey.is_sweeping is
  'Whether it is a rotation that writes into this table now: for the triggers of a table that are to let it pass, WHEN (NOT rekey.is_sweeping(''schema.table'')). relation: the table; of a partition, the partitioned table will do. Nobody but a rotation can make it true. No errors.';

-- The trigger runs as rekey_owner, and casts what it finds under the names of the context columns to text: on a table with a
-- column of another type, that would be a function of whoever made the type.
create or replace function rekey._refuse_other_table(id integer, relation oid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table oid := (rekey._column_shape(id)).relation;
begin
  if v_table is null or relation <> v_table and not exists (select from pg_partition_ancestors(relation) a where a.relid = v_table) then
    raise exception '% is not the table that this trigger encrypts', relation::regclass using errcode = 'RK005',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) makes the trigger of a table.', constraint = 'encrypt_on_write';
  end if;
end
$$;
comment on function rekey._refuse_other_table is 'RK005 where the trigger that encrypts a column on write was set on a table that is not its own.';

-- The types too: whoever owns the guard can make another one, over a table with the same names.
create or replace function rekey._refuse_renamed(id integer, names name[]) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if names is distinct from (
       select array_agg(a.attname order by a.attnum)
       from rekey._column_shape(id) s join pg_attribute a on a.attrelid = s.relation and a.attnum = any (s.attnums)
       where (select t.typnamespace from pg_type t where t.oid = a.atttypid) = 'pg_catalog'::regnamespace) then
    raise exception 'a column that pg_rekey encrypts, or that values are bound to, was renamed' using errcode = 'RK005',
      hint = 'Repeat rekey.protect_column(..., encrypt_on_write => true) as the owner of the table.', constraint = 'encrypt_on_write';
  end if;
end
$$;
comment on function rekey._refuse_renamed is 'RK005 where the columns of a protected column are not called so any more, in table order, or have a type of the user''s: another column may have taken the name.';

-- The three together, in one query, since they are asked for each row. What it does not know is for them to decide.
create or replace function rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_names name[];
  v_later boolean;
begin
  select
    array(
      select a.attname
      from pg_depend d
      join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid and a.atttypid < 16384  -- a type of PostgreSQL's own
      where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure('rekey_targets.column_' || id || '_guard()')
        and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
        and (d.refobjid = _is_unchanged.relation or exists (select from pg_partition_ancestors(_is_unchanged.relation) p where p.relid = d.refobjid))
      order by a.attnum),
    exists (
      -- As rekey._later_trigger(). What only refuses a row does not change it.
      select from pg_trigger t
      where t.tgrelid = _is_unchanged.relation and t.tgname > trigger_name and t.tgtype::integer & 3 = 3 and t.tgtype::integer & 20 <> 0
        and t.tgenabled <> 'D' and t.tgfoid <> 'rekey._refuse_doomed()'::regprocedure and t.tgname !~ '^zz_pg_rekey_\d+(_look)?$')
  into v_names, v_later;
  return v_names = names and not v_later;
end
$$;
comment on function rekey._is_unchanged is
  'Whether a row may be sealed by the trigger of this name: neither rekey._refuse_other_table() nor _refuse_renamed() nor _refuse_later_trigger() would raise. false: one of them may.';

-- Inlined: what is written may be plain, and must not become the parameter of a statement.
create or replace function rekey._envelope_of(value bytea) returns bytea
language sql immutable parallel safe
return case when substr(value, 1, 3) = '\x524b01'::bytea then value end;
comment on function rekey._envelope_of(bytea) is 'A value that means to be an envelope; NULL for any other.';

create or replace function rekey._envelope_of(value text) returns bytea
language sql immutable parallel safe
return case when left(value, 4) collate "C" = 'rk1:' then coalesce(rekey._from_text(value), ''::bytea) end;
comment on function rekey._envelope_of(text) is 'As for bytea, of its text form; empty where that is damaged.';

-- Until the transaction ends, the version stays in use: what was held back and is stored now must not lose its key.
create or replace function rekey._open_incoming(envelope bytea, context bytea) returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._is_envelope(envelope) then
    -- Of a version that there is: else an envelope that was made up would hold any lock.
    perform pg_advisory_xact_lock_shared(k.keyring_id, k.version)
    from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7);
    perform rekey._refuse_old_snapshot(array[rekey._int4(envelope, 3)], array[rekey._int4(envelope, 7)]);
  end if;
  return rekey._open(envelope, context);
end
$$;
comment on function rekey._open_incoming is 'Plaintext of an envelope that a client stores, whose version stays in use until the transaction ends. RK003: it does not open in this context; RK006: its key may not be used.';

create or replace function rekey._refuse_foreign(envelope bytea, context bytea) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea := rekey._open_incoming(envelope, context);
begin
  if v_plaintext is null then
    raise exception 'cannot open ciphertext' using errcode = 'RK003';
  end if;
end
$$;
comment on function rekey._refuse_foreign is 'RK003 where an envelope does not open in this context, RK006 where its key may not be used.';

create or replace function rekey._function_statements(protected rekey.protected_columns, owner name) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
begin atomic
  select array_agg(s.statement order by b.name, s.place)
  from rekey._column_bodies(protected) b
  cross join lateral (values
    (1, format('create function rekey_targets.%I(%s) returns %s language plpgsql %s security definer set search_path = pg_catalog, pg_temp as %L',
          b.name, b.arguments, b.result, b.volatility, b.body)),
    (2, format('revoke all on function rekey_targets.%I from public', b.name)),
    (3, format('grant execute on function rekey_targets.%I to rekey_sweeper', b.name)),
    (4, format('alter function rekey_targets.%I owner to %I', b.name, owner))) as s(place, statement);
end;
comment on function rekey._function_statements is 'The statements that make the functions of rekey._column_bodies().';

create or replace function rekey._trigger_statement(id integer, body text) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return format('create or replace function rekey_targets.column_%s_trigger() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as %L', id, body);
comment on function rekey._trigger_statement is 'The statement that makes the trigger function of a protected column.';

create or replace function rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = target);
  v_guard text := format('rekey_targets.column_%s_guard()', protected.id);
  v_column text;
  v_function regprocedure;
  v_name name;
  v_statements text[];
begin
  for v_function in
    select p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any ((rekey._function_names('column_' || protected.id))[:6])
  loop
    execute format('drop function %s', v_function);
  end loop;
  -- To be given a function, a role needs CREATE on its schema, for that moment (rekey._finish_column).
  execute format('grant usage on schema rekey_targets to %I', v_owner);
  execute format('grant create on schema rekey_targets to %I, %I', v_owner, rekey._caller());
  select format('%I', a.attname) into v_column from pg_attribute a where a.attrelid = target and a.attnum = attnums[protected.places[1]];
  v_statements := array[
    format('create function %s returns setof record language sql stable begin atomic select %s from only %s t; end', v_guard,
      (select string_agg(format('t.%I', a.attname), ', ' order by p.rank) from unnest(protected.places || protected.index_place) with ordinality as p(place, rank)
       join pg_attribute a on a.attrelid = target and a.attnum = attnums[p.place]), target),
    format('comment on function %s is %L', v_guard, format('Keeps %s, which pg_rekey protects: rekey.unprotect_column() lets go of it.', protected.label)),
    format('revoke all on function %s from public', v_guard),
    format('alter function %s owner to %I', v_guard, v_owner)];
  v_statements := v_statements || rekey._function_statements(protected, v_owner);
  -- A sealed value goes through these too: they come after the one that seals.
  v_statements := v_statements || array[
    format('create or replace trigger zz_pg_rekey_%s_insert before insert on %s for each row when (rekey._is_doomed(new.%s)) execute function rekey._refuse_doomed()',
      protected.id, target, v_column),
    format('create or replace trigger zz_pg_rekey_%s_update before update on %s for each row when (new.%3$s is distinct from old.%3$s and rekey._is_doomed(new.%3$s)) execute function rekey._refuse_doomed()',
      protected.id, target, v_column)];
  if protected.encrypt_on_write then
    execute rekey._trigger_statement(protected.id, rekey._write_trigger_body(protected, target, attnums));
    execute format('revoke all on function rekey_targets.column_%s_trigger from public', protected.id);
    execute format('grant execute on function rekey_targets.column_%s_trigger to %I', protected.id, v_owner);
    v_statements := v_statements || format(
      'create or replace trigger zz_pg_rekey_%s before insert or update on %s for each row execute function rekey_targets.column_%1$s_trigger()', protected.id, target);
  elsif exists (select from pg_trigger t where t.tgrelid = target and t.tgname = format('zz_pg_rekey_%s', protected.id)) then
    v_statements := v_statements || format('drop trigger zz_pg_rekey_%s on %s', protected.id, target);
  end if;
  v_statements := v_statements || rekey._index_statements(protected, target, attnums);
  -- In the replica role too, in which subscriptions apply what they get.
  foreach v_name in array rekey._trigger_names(protected) loop
    v_statements := v_statements || format('alter table %s enable always trigger %I', target, v_name);
  end loop;
  return v_statements;
end
$$;
comment on function rekey._column_statements is
  'Drops the functions of a protected column, and returns the statements with which the owner of the table makes them and the triggers, for this table.';

create or replace function rekey._index_column(protected rekey.protected_columns) returns name
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((
    select a.attname from rekey._column_shape(protected.id) s
    join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[protected.index_place]), protected.index_column);
end
$$;
comment on function rekey._index_column is 'The name of the column with the blind index of a protected column, now; NULL: it has none.';

create or replace function rekey._column_places(
  target regclass, names name[], index_column name, out attnums smallint[], out places integer[], out index_place integer
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select array_agg(a.attnum order by a.attnum) into attnums
  from pg_attribute a where a.attrelid = target and a.attname = any (names || index_column) and a.attnum > 0;
  places := array(
    select array_position(attnums, a.attnum)
    from unnest(names) with ordinality as c(name, rank)
    join pg_attribute a on a.attrelid = target and a.attname = c.name
    order by c.rank);
  select array_position(attnums, a.attnum) into index_place
  from pg_attribute a where a.attrelid = target and a.attname = _column_places.index_column;
end
$$;
comment on function rekey._column_places is 'The numbers of the columns that a guard names, in table order, and the ranks among them of a protected column and its context (names), and of its blind index.';

create or replace function rekey._refuse_path(search_path text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp  -- again, when it ends
as $$
begin
  if search_path is null then
    raise exception 'search_path is NULL' using errcode = 'invalid_parameter_value', hint = 'Left out, it is that of the session.';
  end if;
  perform set_config('search_path', search_path, true);
end
$$;
comment on function rekey._refuse_path is '22023 where this is no search path.';

-- Executable by administrators because rekey.protect_column() runs with its caller's rights.
create or replace function rekey._register_column(
  target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text,
  out id integer, out statements text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- names are kept, and found, as %I writes them
as $$
declare
  v_owner name := rekey._refuse_stranger(target);
  v_keyring rekey.keyrings := rekey._keyring(keyring);
  v_table record;
  v_attribute pg_attribute;
  v_context name[] := context_columns;
  v_attnums smallint[];
  v_places integer[];
  v_id integer;
  v_protected rekey.protected_columns;
  v_found record;
  v_name name;
  v_problem text;
begin
  perform rekey._refuse_path(search_path);
  -- One at a time: what is lent to one caller, the end of another would take back.
  perform pg_advisory_xact_lock(0, 3);
  perform rekey._check_tenant(v_keyring.tenant_id);
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
  end if;
  select c.relkind, c.relpersistence, n.nspname, c.relname into v_table
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  if v_table.relkind not in ('r', 'p') or v_table.relpersistence = 't' or v_table.nspname ~ '^(pg_|rekey(_targets)?$|information_schema$)' then
    raise exception '% is no table whose columns can be protected', target using errcode = 'invalid_parameter_value',
      hint = 'An ordinary or partitioned table, neither temporary nor of the system.';
  end if;
  v_problem := (select min(rekey._storage_problem(r.relation)) from (select target as relation union select h from rekey._relations_here(target) h) r);
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'invalid_parameter_value', hint = 'Protect a column of a table whose rows are here.';
  end if;
  if exists (select from pg_inherits i join pg_class c on c.oid = i.inhparent where i.inhrelid = target and c.relkind = 'p') then
    raise exception '% is a partition', target using errcode = 'invalid_parameter_value', hint = 'Protect the column of the partitioned table.';
  elsif v_table.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = target) then
    raise exception '% has children by inheritance', target using errcode = 'invalid_parameter_value',
      hint = 'Make them partitions, or tables of their own.';
  end if;
  select * into v_attribute from pg_attribute a
  where a.attrelid = target and a.attname = _register_column.column_name and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception '% has no column %', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'undefined_column',
      hint = coalesce((
        select format('There is %s. A column is named as it is, without quotes.', string_agg(quote_ident(a.attname), ', ' order by a.attnum))
        from pg_attribute a
        where a.attrelid = target and a.attnum > 0 and not a.attisdropped and lower(a.attname) = lower(replace(column_name, '"', ''))
        having count(*) > 0),
        'A column is named as it is, with its capitals, and without quotes.');
  elsif v_attribute.attgenerated <> '' then
    raise exception 'column %.% is generated', target, quote_ident(column_name) using errcode = 'invalid_parameter_value',
      hint = 'Nothing but its expression writes it: protect the column that it is computed from.';
  elsif v_attribute.atttypid not in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) then
    raise exception 'column %.% has the type %', target, quote_ident(column_name), format_type(v_attribute.atttypid, v_attribute.atttypmod)
      using errcode = 'invalid_parameter_value', hint = 'A protected column is bytea or text.';
  end if;

  if cardinality(v_context) = 0 then
    raise exception 'context_columns is empty' using errcode = 'invalid_parameter_value',
      hint = 'Name what rows are told apart by: a value could be moved to any other row. NULL, the default, takes the primary key.', constraint = 'context';
  end if;
  if v_context is null then
    select array_agg(a.attname order by k.rank) into v_context
    from pg_index i
    cross join lateral unnest(i.indkey::smallint[]) with ordinality as k(attnum, rank)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = target and i.indisprimary;
    if not found or v_context is null then
      raise exception '% has no primary key', target using errcode = 'invalid_parameter_value',
        hint = 'Name in context_columns what its rows are told apart by: columns that do not change.', constraint = 'context';
    end if;
    if exists (
         select from pg_attribute a where a.attrelid = target and a.attname = any (v_context) and (a.atthasdef or a.attidentity <> ''))
       and exists (select from pg_index i where i.indrelid = target and i.indisunique and not i.indisprimary) then
      if encrypt_on_write then
        raise exception 'the primary key of % has a default, and another key is unique', target using errcode = 'invalid_parameter_value',
          hint = 'INSERT ... ON CONFLICT (other key) DO UPDATE would store a value that is bound to a row that never was. Name that other key in context_columns.', constraint = 'context_of_conflict';
      end if;
      -- Said before any value is bound to it: context stays.
      raise warning 'encrypt_on_write will be refused with this context: the primary key of % has a default, and another key is unique', target
        using hint = 'If a trigger is to encrypt what is written, name that other key in context_columns now, before values are bound to the primary key.', constraint = 'context_of_trigger';
    end if;
  end if;
  foreach v_name in array v_context loop
    if v_name = column_name or (select count(*) from unnest(v_context) c where c = v_name) > 1 or not exists (
         select from pg_attribute a
         where a.attrelid = target and a.attname = v_name and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
           and a.atttypid in ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'uuid'::regtype, 'text'::regtype, 'varchar'::regtype, 'boolean'::regtype)) then
      raise exception 'column % cannot be part of the context', coalesce(quote_literal(v_name), 'NULL') using errcode = 'invalid_parameter_value',
        hint = 'Context columns are other columns, each once, of type integer, uuid, text, varchar or boolean, and not generated.';
    end if;
  end loop;
  for v_found in select * from rekey._column_findings(target, v_attribute.attnum, fire_triggers, search_path) f order by f.fatal desc loop
    if v_found.fatal then
      raise exception 'column %.% cannot be protected: %', target, column_name, v_found.finding using errcode = 'invalid_parameter_value', hint = v_found.advice;
    end if;
    raise warning '%', v_found.finding using hint = v_found.advice, constraint = coalesce(v_found.action, '');
  end loop;

  if encrypt_on_write then
    select rekey._later_trigger('zz_pg_rekey_', r.relation), r.relation into v_found
    from (select target as relation union select h from rekey._relations_here(target) h) r
    where rekey._later_trigger('zz_pg_rekey_', r.relation) is not null limit 1;
    if found then
      perform rekey._refuse_later_trigger('zz_pg_rekey_', v_found.relation);
    end if;
  end if;

  -- Repeated, for the same column or after its functions were lost, it makes them anew.
  v_id := rekey._column_id(target, _register_column.column_name);
  select * into v_protected from rekey.protected_columns c
  where c.id = v_id
     or c.relation_name = format('%I.%I', v_table.nspname, v_table.relname) and c.column_name = _register_column.column_name and (rekey._column_shape(c.id)).relation is null
  for update;
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_protected.index_place
  from rekey._column_places(target, _register_column.column_name || v_context, rekey._index_column(v_protected)) s;
  if v_protected.index_column is not null and not encrypt_on_write then
    raise exception 'column %.% is searchable, and takes the trigger that encrypts', target, quote_ident(column_name) using errcode = 'RK006',
      hint = 'encrypt_on_write => true keeps it.', constraint = 'encrypt_on_write';
  end if;
  -- Whoever makes a table of that name anew must not get at the values of another.
  if v_protected.id is not null and (rekey._column_shape(v_protected.id)).relation is null and v_protected.owner <> v_owner
     and not (select r.rolsuper from pg_roles r where r.rolname = rekey._caller()) then
    raise exception '%.% was protected as a column of %', target, column_name, v_protected.owner using errcode = 'insufficient_privilege',
      hint = 'That role is to own it, or a superuser calls this.';
  end if;
  if v_protected.id is not null and (v_protected.keyring_id <> v_keyring.id or v_protected.places <> v_places
      or (select s.attnums from rekey._column_shape(v_protected.id) s) <> v_attnums) then
    raise exception 'column %.% is protected already, in another way', target, column_name using errcode = 'RK006',
      hint = 'See rekey.column_status. Keyring and context columns, and their order, stay: the values are bound to them.', constraint = 'keep_context';
  end if;
  if v_protected.id is null then
    v_protected.label := format('%I.%I.%I', v_table.nspname, v_table.relname, column_name);
    begin
      insert into rekey.protected_columns
        (label, keyring_id, relation_name, column_name, context_columns, places, is_text, encrypt_on_write, fire_triggers, search_path, owner)
      values (v_protected.label, v_keyring.id, format('%I.%I', v_table.nspname, v_table.relname), _register_column.column_name, v_context, v_places,
        v_attribute.atttypid <> 'bytea'::regtype, _register_column.encrypt_on_write, _register_column.fire_triggers, _register_column.search_path, v_owner)
      returning * into v_protected;
    exception when unique_violation then
      raise exception 'the label % is taken, by a table that was called so', v_protected.label using errcode = 'unique_violation',
        hint = 'Where this table holds its values now: rekey.rebind_column(). See rekey.column_status.', constraint = 'rebind';
    end;
  else
    if v_protected.encrypt_on_write and not _register_column.encrypt_on_write then
      raise warning 'from now on, what is written into %.% is not encrypted', target, quote_ident(column_name)
        using hint = 'encrypt_on_write => true keeps the trigger that encrypts it.', constraint = 'encrypt_on_write';
    end if;
    if _register_column.fire_triggers and not v_protected.fire_triggers then
      raise warning 'from now on, rotations fire the triggers of %', target
        using hint = 'fire_triggers => false keeps them from it.', constraint = 'fire_triggers';
    end if;
    if _register_column.search_path <> v_protected.search_path then
      raise warning 'from now on, what rotations of %.% fire runs with search_path = %, and no longer with %',
        target, quote_ident(column_name), _register_column.search_path, v_protected.search_path
        using hint = 'search_path => ''...'' gives another.', constraint = 'search_path';
    end if;
    update rekey.protected_columns c
    set encrypt_on_write = _register_column.encrypt_on_write, fire_triggers = _register_column.fire_triggers,
      search_path = _register_column.search_path, owner = v_owner, index_place = v_protected.index_place
    where c.id = v_protected.id returning * into v_protected;
  end if;
  id := v_protected.id;

  statements := rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._register_column is 'What rekey.protect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._register_column to rekey_admin;

create or replace function rekey._finish_column(id integer) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_problem text;
  v_role name;
begin
  for v_role in
    select distinct pg_get_userbyid(a.grantee) from pg_namespace n, aclexplode(n.nspacl) a
    where n.nspname = 'rekey_targets' and a.privilege_type = 'CREATE' and a.grantee not in (0, n.nspowner)
  loop
    execute format('revoke create on schema rekey_targets from %I', v_role);
  end loop;
  select * into v_protected from rekey.protected_columns c where c.id = _finish_column.id;
  if not found then
    return null;
  end if;
  v_problem := rekey._column_problem(v_protected);
  if v_problem is not null then
    raise exception '% cannot be protected: %', v_protected.label, v_problem using errcode = 'RK005';
  end if;
  perform rekey._note_names(id);
  -- Small, and without an envelope: that is its first complete count. Else the first verification makes it.
  if v_protected.seen is null
     and (select coalesce(sum(pg_relation_size(t.relation)), 0) from rekey._targets(v_protected.label) t) < 33554432
     and not exists (select from rekey._count_rows(rekey._targets_now(v_protected.label), null) c where c.keyring_id is not null) then
    update rekey.protected_columns c set seen = '{}' where c.id = v_protected.id;
  end if;
  if not v_protected.encrypt_on_write and to_regproc(format('rekey_targets.column_%s_trigger', id)) is not null then
    execute format('drop function rekey_targets.column_%s_trigger()', id);
  end if;
  -- The audit log last, as everywhere; and once.
  if v_protected.created_at = now() then
    perform rekey._audit('column.protected', rekey._keyring_name(v_protected.keyring_id), details => jsonb_build_object(
      'column', v_protected.label, 'context_columns', v_protected.context_columns, 'encrypt_on_write', v_protected.encrypt_on_write,
      'fire_triggers', v_protected.fire_triggers, 'search_path', v_protected.search_path));
  end if;
  return v_protected.label;
end
$$;
comment on function rekey._finish_column is 'Takes back what rekey._register_column() lent, and checks what was made. RK005: the column cannot be swept.';
grant execute on function rekey._finish_column to rekey_admin;

create or replace function rekey.protect_column(
  target regclass, column_name name, keyring text = 'default', context_columns name[] = null, encrypt_on_write boolean = false,
  fire_triggers boolean = true, search_path text = current_setting('search_path')  -- evaluated by the caller, in his
) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_made record;
  v_statement text;
begin
  select * into v_made from rekey._register_column(
    target, column_name, keyring, context_columns, coalesce(encrypt_on_write, false), coalesce(fire_triggers, true), search_path);
  foreach v_statement in array v_made.statements loop
    execute v_statement;
  end loop;
  return rekey._finish_column(v_made.id);
end
$$;
comment on function rekey.protect_column is
  'Puts a bytea or text column under rotation, and returns its label: the values are bound to (label, context columns as text), so rekey.decrypt(value, array[label, id::text]) opens them. The owner of the table calls it, as a member of rekey_admin, or a superuser. context_columns: what tells rows apart and does not change; NULL: the primary key. encrypt_on_write: a trigger encrypts what is written, and refuses envelopes of other rows; a value that an update leaves as it is waits for rekey.adopt_column(). fire_triggers: whether the triggers and rules of the table see what a rotation or an adoption writes; false takes a right of the owner of the table: GRANT SET ON PARAMETER session_replication_role. search_path: with which they run meanwhile; left out, it is that of the session that calls. What envelopes break, and where encrypt_on_write will need other context columns, comes as warnings. Repeated, it makes the column''s functions anew. It encrypts nothing that is there: rekey.adopt_column() does. 22023: column, context, table or search path cannot be; 23505: the label is taken; 42501: not the owner; 42703: no such column; RK005: a forced policy, a foreign partition, triggers cannot be kept from firing; RK006: protected already, in another way; RK007: no such keyring.';
grant execute on function rekey.protect_column to rekey_admin;

create or replace function rekey._refuse_encrypted(protected rekey.protected_columns) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
begin
  perform rekey._refuse_snapshot();
  select sum(c.rows) into v_rows
  from rekey._count_rows(rekey._targets_now(protected.label), null) c
  where c.keyring_id is not null;
  if v_rows > 0 then
    raise exception '% rows of % are encrypted', v_rows, protected.label using errcode = 'RK005',
      hint = 'decrypt => true decrypts them, some at each call: --decrypt of pg-rekey columns unprotect. Rows that stay are locked by a session, or kept by a trigger.', constraint = 'decrypt_rows';
  end if;
end
$$;
comment on function rekey._refuse_encrypted is 'RK005 where a protected column holds envelopes; 25001 outside READ COMMITTED.';

create or replace function rekey._end_adoptions(column_id integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey.rotations r
  set state = 'superseded', finished_at = now(), in_line = false, pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.column_id = _end_adoptions.column_id and rekey._is_under_way(r.state);
end
$$;
comment on function rekey._end_adoptions is 'Ends the adoption of a column that is in line or, where its table is gone, under way.';

create or replace function rekey._release_column(target regclass, column_name name, decrypt boolean, out id integer, out statements text[])
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_names text[];
  v_rotation bigint;
begin
  perform rekey._refuse_stranger(target);
  id := rekey._column_id(target, column_name);
  select * into v_protected from rekey.protected_columns c where c.id = _release_column.id for update;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
  select r.id into v_rotation from rekey.rotations r where r.column_id = _release_column.id and rekey._is_under_way(r.state) and not r.in_line;
  if found then
    raise exception '% is being adopted, by rotation %', v_protected.label, v_rotation using errcode = 'RK004';
  end if;
  perform rekey._end_adoptions(id);
  update rekey.protected_columns c set encrypt_on_write = false where c.id = v_protected.id;  -- its triggers go
  update rekey._blind_indexes b set filled = false, refill = true, refill_by = null where b.column_id = v_protected.id;
  if not decrypt then
    perform rekey._refuse_encrypted(v_protected);
  else
    perform rekey._refuse_superuser(target);
    select array_agg(quote_ident(a.attname) order by p.rank) into v_names
    from rekey._column_shape(id) s
    cross join lateral unnest(v_protected.places || v_protected.index_place) with ordinality as p(place, rank)
    join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.place];
    statements := array(
      select format(
        'with due as materialized (select t.ctid as row from only %1$s t where %2$s limit 5000 for no key update skip locked)
         update only %1$s t set %3$s = rekey.%4$s(t.%3$s, array[%5$L%6$s], (select rekey.reading_pass(%5$L)))%7$s from due where t.ctid = due.row',
        t.relation,
        -- What rekey._refuse_encrypted() counts: a plain value that begins alike is none.
        format(case when v_protected.is_text then $sql$left(t.%s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$sql$
          else $sql$substr(t.%1$s, 1, 3) = '\x524b01' and octet_length(t.%1$s) >= 11$sql$ end, v_names[1]),
        v_names[1], case when v_protected.is_text then 'decrypt_text' else 'decrypt' end, v_protected.label,
        (select string_agg(format(', t.%s::text', c), '') from unnest(v_names[2:cardinality(v_protected.places)]) c),
        case when v_protected.index_place is not null then format(', %s = null', v_names[cardinality(v_names)]) end)
      from rekey._targets(v_protected.label) t);
  end if;
end
$$;
comment on function rekey._release_column is 'What rekey.unprotect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._release_column to rekey_admin;

create or replace function rekey._forget_column(id integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns;
  v_shape record;
  v_function regprocedure;
begin
  select * into v_protected from rekey.protected_columns c where c.id = _forget_column.id for update;
  if not found then
    raise exception 'no such protected column' using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  select * into v_shape from rekey._column_shape(id) s;
  if v_shape.relation is not null then
    perform rekey._refuse_stranger(v_shape.relation);
    perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
    perform rekey._refuse_encrypted(v_protected);
  elsif exists (select from pg_attribute a
                join pg_class c on c.oid = a.attrelid
                join pg_namespace n on n.oid = c.relnamespace
                where format('%I.%I', n.nspname, c.relname) = v_protected.relation_name
                  and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped) then
    raise exception 'the table of % is there, without its functions', v_protected.label using errcode = 'RK006',
      hint = format('Its rows may be encrypted: rekey.protect_column(%L, %L%s) makes the functions anew.', v_protected.relation_name, v_protected.column_name,
        rekey._protect_options(v_protected)), constraint = 'protect_again';
  end if;
  for v_function in
    select p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any (rekey._function_names('column_' || id))
  loop
    execute format('drop function %s', v_function);
  end loop;
  perform rekey._end_adoptions(id);
  update rekey.rotation_failures f set resolved_at = now(), resolution = 'cleared'
  where f.target = v_protected.label and f.resolved_at is null;
  delete from rekey.protected_columns c where c.id = _forget_column.id;
  perform rekey._audit('column.unprotected', rekey._keyring_name(v_protected.keyring_id), details => jsonb_build_object('column', v_protected.label));
end
$$;
comment on function rekey._forget_column is 'Removes a column from the registry, with its functions. 25001: not in READ COMMITTED; RK005: envelopes are left, or it cannot be counted; RK007: there is none.';
grant execute on function rekey._forget_column to rekey_admin;

create or replace function rekey._drop_triggers(target regclass, id integer, suffixes text = '_insert|_update|_look|_carry') returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name name;
begin
  for v_name in
    select t.tgname from pg_trigger t where t.tgrelid = target and t.tgparentid = 0 and t.tgname ~ format('^zz_pg_rekey_%s(%s)?$', id, suffixes)
  loop
    execute format('drop trigger %I on %s', v_name, target);
  end loop;
end
$$;
comment on function rekey._drop_triggers is 'Drops the triggers of a protected column, with the rights of the caller: the one that encrypts, and those with these suffixes.';
grant execute on function rekey._drop_triggers to rekey_admin;

create or replace function rekey.unprotect_column(target regclass, column_name name, decrypt boolean = false) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_released record;
  v_statement text;
  v_count bigint;
  v_decrypted bigint := 0;
begin
  select * into v_released from rekey._release_column(target, column_name, coalesce(decrypt, false));
  perform rekey._drop_triggers(target, v_released.id, '_look|_carry');
  execute format('lock table %s in access share mode', target);  -- the whole before its parts, as ALTER TABLE locks them
  foreach v_statement in array coalesce(v_released.statements, '{}') loop
    execute v_statement;
    get diagnostics v_count = row_count;
    v_decrypted := v_decrypted + v_count;
  end loop;
  if v_decrypted = 0 then
    -- Waits for those who write, and looks again.
    execute format('lock table %s in share row exclusive mode', target);
    perform rekey._forget_column(v_released.id);
    perform rekey._drop_triggers(target, v_released.id);
  end if;
  return v_decrypted;
end
$$;
comment on function rekey.unprotect_column(regclass, name, boolean) is
  'Ends the protection of a column. decrypt: rows that are encrypted are decrypted, at most 5,000 of each partition at a call, which returns how many: repeat it, each in its own transaction, until it returns 0. The owner of the table calls it, as a member of rekey_admin, or a superuser; but to decrypt in a session of a superuser is refused, unless one owns the table: its triggers would run with his rights. 25001: not in READ COMMITTED; 42501: not the owner, a superuser, or not rekey_app; RK003: a row does not open; RK004: it is being adopted; RK005: rows are encrypted, or it is blocked; RK007: not protected.';
grant execute on function rekey.unprotect_column(regclass, name, boolean) to rekey_admin;

create or replace function rekey.unprotect_column(label text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id integer := (select c.id from rekey.protected_columns c where c.label = unprotect_column.label);
begin
  if v_id is null then
    raise exception 'there is no protected column %', coalesce(quote_literal(label), 'NULL') using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  if (rekey._column_shape(v_id)).relation is not null then
    raise exception 'the table of % is there', label using errcode = 'RK006', hint = 'Name the table and the column: rekey.unprotect_column(target, column_name).', constraint = 'unprotect';
  end if;
  perform rekey._forget_column(v_id);
end
$$;
comment on function rekey.unprotect_column(text) is
  'Forgets a protected column whose table or column was dropped, by its label. RK006: it is there; RK007: not protected.';
grant execute on function rekey.unprotect_column(text) to rekey_admin;

create or replace function rekey._column_status()
returns table (label text, relation regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean,
  fire_triggers boolean, search_path text, problem text, index_column name, normalization text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select c.label, s.relation, coalesce(a.attname, c.column_name), rekey._keyring_name(c.keyring_id), c.context_columns, c.encrypt_on_write,
      c.fire_triggers, c.search_path, rekey._column_problem(c), rekey._index_column(c), c.normalization
    from rekey.protected_columns c
    left join lateral rekey._column_shape(c.id) s on true
    left join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[c.places[1]]
    order by c.label;
end
$$;
comment on function rekey._column_status is 'What the view rekey.column_status shows.';
grant execute on function rekey._column_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.column_status as select s.* from rekey._column_status() s;
comment on view rekey.column_status is 'The protected columns, and whether each can be swept.';
comment on column rekey.column_status.label is 'schema.table.column as first registered: the first part of the context of its values.';
comment on column rekey.column_status.relation is 'Its table now; NULL: it was dropped, or its functions were not restored.';
comment on column rekey.column_status.column_name is 'Its name now.';
comment on column rekey.column_status.keyring is 'Its keyring.';
comment on column rekey.column_status.context_columns is 'The columns whose values are the rest of the context, as registered.';
comment on column rekey.column_status.encrypt_on_write is 'Whether a trigger encrypts what is written.';
comment on column rekey.column_status.fire_triggers is 'Whether rotations fire the triggers and rules of the table.';
comment on column rekey.column_status.search_path is 'The search path that these run with.';
comment on column rekey.column_status.problem is 'Why it is blocked, and what to do; NULL: it is not.';
comment on column rekey.column_status.index_column is 'The column with its blind index now; NULL: it is not searchable.';
comment on column rekey.column_status.normalization is 'What it takes for equal: exact, lower, trim_lower or digits.';
grant select on rekey.column_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._reveal(value bytea, context text[], pass bytea) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if substr(value, 1, 3) = '\x524b01'::bytea then
    return rekey._decrypt(value, context, pass);
  end if;
  return value;
end
$$;
comment on function rekey._reveal(bytea, text[], bytea) is 'Opens an envelope, as rekey.decrypt(); any other value stays as it is.';
grant execute on function rekey._reveal(bytea, text[], bytea) to rekey_app;

create or replace function rekey._reveal(value text, context text[], pass bytea) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
  v_text text := value;
begin
  if left(value, 4) collate "C" = 'rk1:' then
    v_plaintext := rekey._decrypt(coalesce(rekey._from_text(value), ''::bytea), context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;
comment on function rekey._reveal(text, text[], bytea) is 'As for bytea, of the text form.';
grant execute on function rekey._reveal(text, text[], bytea) to rekey_app;

create or replace function rekey._view_columns(target regclass) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select string_agg(case when c.id is null then format('t.%I', a.attname)
        else format('rekey._reveal(t.%1$I, array[%2$L%3$s], (select rekey.reading_pass(%2$L))) as %1$I', a.attname, c.label,
          (select string_agg(format(', t.%I::text', b.attname), '' order by p.rank)
           from unnest(c.places) with ordinality as p(place, rank)
           join pg_attribute b on b.attrelid = target and b.attnum = c.attnums[p.place]
           where p.rank > 1)) end, ', ' order by a.attnum)
    from pg_attribute a
    left join (select p.*, s.relation, s.attnums from rekey.protected_columns p cross join lateral rekey._column_shape(p.id) s) c
      on c.relation = a.attrelid and c.attnums[c.places[1]] = a.attnum
    where a.attrelid = target and a.attnum > 0 and not a.attisdropped);
end
$$;
comment on function rekey._view_columns is 'The columns of a table as its decrypted view has them.';
grant execute on function rekey._view_columns to rekey_admin;

create or replace function rekey.create_decrypted_view(target regclass) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table record;
  v_name name;
begin
  if not exists (select from rekey.column_status s where s.relation = target) then
    raise exception '% has no protected column', target using errcode = 'RK007', hint = 'rekey.protect_column() protects one.', constraint = 'protect';
  end if;
  select n.nspname, c.relname into v_table from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  v_name := v_table.relname || '_decrypted';
  execute format('create or replace view %I.%I with (security_invoker = true) as select %s from %s t', v_table.nspname, v_name, rekey._view_columns(target), target);
  return format('%I.%I', v_table.nspname, v_name);
end
$$;
comment on function rekey.create_decrypted_view is
  'Makes the view <table>_decrypted beside a table, or makes it anew, and returns its name: as the table, with its protected columns opened, under the rights and policies of whoever reads it (security_invoker). A value that is no envelope is shown as it is. Its readers need SELECT on view and table, and rekey_app. Each row is opened by itself: select few. RK007: the table has no protected column.';
grant execute on function rekey.create_decrypted_view to rekey_admin;

-- sql/code/53_rebind.sql
-- A table is its name and its identity. Where the two part (a rebuild that exchanges names, a partition that is detached), the
-- column is blocked, and this is how it goes on: the registration moves to the table that has the values now, or stays.

-- What holds values of another relation's column is looked at with the rights of the caller.
create or replace function rekey._refuse_envelopes(relation regclass, column_name name) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
set bytea_output = hex
as $$
declare
  v_count bigint;
begin
  if (select c.relkind from pg_class c where c.oid = relation) in ('r', 'p', 'm') then
    execute format('lock table %s in share row exclusive mode', relation);
  end if;
  -- (A cast to text may be anybody's function; an output function may not.)
  execute format($q$select count(*) from %s t where left(format('%%s', t.%I), 12) collate "C" ~ '^(rk1:UksB|\\x524b01)'$q$, relation, column_name) into v_count;
  if v_count > 0 then
    raise exception '% holds % envelopes in %', relation, v_count, quote_ident(column_name) using errcode = 'RK005',
      hint = 'They would be passed by from now on. Empty it, drop it, or attach it again; then repeat this.', constraint = 'rebind';
  end if;
end
$$;
comment on function rekey._refuse_envelopes is 'RK005 where a column of this relation holds envelopes; 42501 where the caller may not read it whole.';
grant execute on function rekey._refuse_envelopes to rekey_admin;

create or replace function rekey._find_rebind(target regclass, column_name name, label text) returns rekey.protected_columns
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_id integer := rekey._column_id(target, column_name);
  v_name text := (select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target);
  v_protected rekey.protected_columns;
  v_old regclass;
begin
  perform rekey._refuse_stranger(target);
  select * into v_protected from rekey.protected_columns c
  where case when _find_rebind.label is not null then c.label = _find_rebind.label
             when v_id is not null then c.id = v_id
             else c.relation_name = v_name and c.column_name = _find_rebind.column_name or c.label = format('%s.%I', v_name, _find_rebind.column_name) end
  order by c.relation_name = v_name desc limit 1;
  if not found then
    raise exception 'no protected column was called %.%', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'Name it: rekey.rebind_column(target, column_name, label). See rekey.column_status.', constraint = 'columns';
  end if;
  if v_id is not null and v_id <> v_protected.id then
    raise exception 'column %.% is protected already, as %', target, quote_ident(column_name), v_protected.label using errcode = 'RK006',
      hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  v_old := (rekey._column_shape(v_protected.id)).relation;
  -- Values that open prove no right to them: they may have been copied.
  if v_old is not null then
    perform rekey._refuse_stranger(v_old);
  elsif v_protected.owner <> (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = target)
        and not (select r.rolsuper from pg_roles r where r.rolname = rekey._caller()) then
    raise exception '% was a column of %', v_protected.label, v_protected.owner using errcode = 'insufficient_privilege',
      hint = 'That role is to own the table, or a superuser calls this.';
  end if;
  return v_protected;
end
$$;
comment on function rekey._find_rebind is
  'The protected column that rekey.rebind_column() is about. 42501: the caller owns not both tables; RK006: the column is registered as another; RK007: there is none.';
grant execute on function rekey._find_rebind to rekey_admin;

create or replace function rekey._unsettled(id integer) returns table (relation regclass, column_name name)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns := (select c from rekey.protected_columns c where c.id = _unsettled.id);
  v_shape record;
begin
  select s.* into v_shape from rekey._column_shape(id) s;
  return query
    select c.oid::regclass, a.attname
    from (values (parse_ident(v_protected.relation_name) || v_protected.column_name::text), (parse_ident(v_protected.label))) as n(names)
    join pg_class c on c.relname = n.names[2] and c.relkind in ('r', 'p', 'f', 'm')
    join pg_namespace s on s.oid = c.relnamespace and s.nspname = n.names[1]
    join pg_attribute a on a.attrelid = c.oid and a.attname = n.names[3] and a.attnum > 0 and not a.attisdropped
    where (c.oid, a.attnum) is distinct from (v_shape.relation::oid, v_shape.attnums[v_protected.places[1]])
    union
    select c.oid::regclass, a.attname
    from rekey._column_relations r
    join pg_class c on c.oid = case when r.home = rekey._home() then r.relation else rekey._relation_named(r.relation_name) end
    join pg_attribute a on a.attrelid = c.oid and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped
    where r.column_id = v_protected.id and r.attnum = 0 and not r.settled
      and not exists (select from rekey._relations_here(v_shape.relation) as t(oid) where t.oid = c.oid);
end
$$;
comment on function rekey._unsettled is 'The columns that may hold values of a protected column beside it: those that have its name, and those of relations that were parts of its table.';
grant execute on function rekey._unsettled to rekey_admin;

create or replace function rekey._move_column(id integer, target regclass, column_name name) returns text[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns;
  v_column pg_attribute;
  v_attnums smallint[];
  v_places integer[];
  v_index_place integer;
begin
  perform pg_advisory_xact_lock(0, 3);  -- as rekey._register_column()
  perform rekey._refuse_stranger(target);
  select * into v_protected from rekey.protected_columns c where c.id = _move_column.id for update;
  perform rekey._find_rebind(target, column_name, v_protected.label);
  if (select c.relkind from pg_class c where c.oid = target) not in ('r', 'p') or (select c.relispartition from pg_class c where c.oid = target) then
    raise exception '% is no table whose columns can be protected', target using errcode = 'invalid_parameter_value',
      hint = 'An ordinary or partitioned table, not a partition.';
  end if;
  select * into v_column from pg_attribute a where a.attrelid = target and a.attname = _move_column.column_name and a.attnum > 0 and not a.attisdropped;
  if not coalesce(v_column.atttypid = any (case when v_protected.is_text then '{text,varchar}' else '{bytea}' end::regtype[]) and v_column.attgenerated = '', false) then
    raise exception 'column %.% has not the type of %', target, quote_ident(column_name), v_protected.label using errcode = 'invalid_parameter_value',
      hint = case when v_protected.is_text then 'It is to be text.' else 'It is to be bytea.' end;
  end if;
  if exists (
       select from unnest(v_protected.context_columns) as n(name)
       where not exists (
         select from pg_attribute a
         where a.attrelid = target and a.attname = n.name and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
           and a.atttypid in ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'uuid'::regtype, 'text'::regtype, 'varchar'::regtype, 'boolean'::regtype))) then
    raise exception '% lacks a context column of %: %', target, v_protected.label, array_to_string(v_protected.context_columns, ', ')
      using errcode = 'invalid_parameter_value', hint = 'The values are bound to these columns.';
  end if;
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_index_place
  from rekey._column_places(target, _move_column.column_name || v_protected.context_columns, v_protected.index_column) s;
  if v_protected.index_column is not null and not exists (
       select from pg_attribute a where a.attrelid = target and a.attnum = v_attnums[v_index_place] and a.atttypid = 'bytea'::regtype and a.attgenerated = '') then
    raise exception '% lacks the column with the blind index of %: %', target, v_protected.label, v_protected.index_column using errcode = 'invalid_parameter_value',
      hint = format('ALTER TABLE %s ADD COLUMN %I bytea, before this.', target, v_protected.index_column);
  end if;
  update rekey.protected_columns c
  set places = v_places, index_place = v_index_place, column_name = _move_column.column_name, owner = (select pg_get_userbyid(r.relowner) from pg_class r where r.oid = target),
    relation_name = (select format('%I.%I', n.nspname, r.relname) from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = target)
  where c.id = v_protected.id returning * into v_protected;
  return rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._move_column is
  'Moves the registration of a protected column to another table, as far as rekey_owner does it; returns what the owner of the table has to run. 22023: type or context columns do not fit; 42501, RK006: as rekey._find_rebind().';
grant execute on function rekey._move_column to rekey_admin;

create or replace function rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_relation regclass := (rekey._column_shape(id)).relation;
  v_failed bigint;
begin
  perform rekey._refuse_stranger(v_relation);
  select * into v_protected from rekey.protected_columns c where c.id = _finish_rebind.id for update;
  perform rekey._note_names(id);  -- after a restore, parts are known by name alone
  -- Settled here, and not where it was found: what is in use elsewhere stays so.
  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select v_protected.id, s.relation, k.attnum, s.relation::text, rekey._home(), true
  from unnest(settled, settled_columns) as s(relation, column_name)
  join pg_attribute a on a.attrelid = s.relation and a.attname = s.column_name
  cross join lateral (values (0::smallint), (a.attnum)) as k(attnum)
  where k.attnum > 0 or not exists (select from rekey._relations_here(v_relation) h where h = s.relation)
  on conflict (column_id, relation, attnum) do update set relation_name = excluded.relation_name, home = excluded.home, settled = true;
  perform rekey._finish_column(id);
  select sum(o.failed) into v_failed from rekey._open_target(v_protected.label) o;
  if v_failed > 0 then
    raise exception '% rows of % do not open under the label %', v_failed, v_relation, v_protected.label using errcode = 'RK003',
      hint = 'They belong to other rows, or to another column: copy the values with the columns that they are bound to.';
  end if;
  -- Whoever rebinds a column that was emptied says that it was to be.
  update rekey.protected_columns c
  set seen = coalesce((
    select jsonb_object_agg(s.key, coalesce(o.rows, 0))
    from jsonb_object_keys(c.seen) as s(key)
    left join (select n.keyring_id, sum(n.rows) as rows from rekey._open_target(v_protected.label) n group by n.keyring_id) o on o.keyring_id = s.key::integer), '{}')
  where c.id = v_protected.id and c.seen is not null;
  perform rekey._audit('column.rebound', rekey._keyring_name(v_protected.keyring_id), details => jsonb_strip_nulls(jsonb_build_object(
    'column', v_protected.label, 'from', from_relation, 'to', v_relation::text, 'settled', (select jsonb_agg(s.relation::text) from unnest(settled) as s(relation)))));
  return v_protected.label;
end
$$;
comment on function rekey._finish_rebind is
  'Checks that every value of a rebound column opens, and notes what was settled. RK003: one does not open; RK005: the column is blocked still.';
grant execute on function rekey._finish_rebind to rekey_admin;

create or replace function rekey._open_target(label text) returns table (keyring_id integer, version integer, rows bigint, failed bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_step bigint;
  v_found record;
begin
  for v_target in select t.* from rekey._targets(label) t loop
    perform rekey._refuse_problem(label, v_target.problem);
    v_from := '(0,0)';
    while v_from is not null loop
      select s.* into v_found from rekey._scan_on(v_target, null, v_from, v_step) s;
      v_step := v_found.next_step;
      if v_found.ciphertexts is not null then
        return query
          select rekey._int4(h.header, 3), rekey._int4(h.header, 7), h.rows, coalesce(cardinality(c.failed_places), 0)::bigint
          from (select substr(u.ciphertext, 1, 11) as header, count(*) as rows from unnest(v_found.ciphertexts) as u(ciphertext) group by 1) h
          left join rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts) c on c.header = h.header;
      end if;
      v_from := v_found.next_first;
    end loop;
  end loop;
end
$$;
comment on function rekey._open_target is 'Opens every envelope of a protected column, in batches: how many there are of each version, and how many do not open. A version may come in several rows.';

create or replace function rekey.rebind_column(target regclass, column_name name, label text = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns := rekey._find_rebind(target, column_name, label);
  v_old regclass := (select s.relation from rekey.column_status s where s.label = v_protected.label);
  v_old_column name := (select s.column_name from rekey.column_status s where s.label = v_protected.label);
  v_stays boolean := coalesce(v_old = target and v_old_column = rebind_column.column_name, false);
  v_statement text;
  v_other record;
  v_settled regclass[];
  v_settled_columns name[];
  v_view text;
begin
  execute format('lock table %s in share row exclusive mode', target);
  if not v_stays then
    if v_old is not null then
      perform rekey._refuse_envelopes(v_old, v_old_column);
      if v_old <> target then
        perform rekey._drop_triggers(v_old, v_protected.id);
      end if;
    end if;
    foreach v_statement in array rekey._move_column(v_protected.id, target, column_name) loop
      execute v_statement;
    end loop;
  end if;
  for v_other in select u.relation, u.column_name from rekey._unsettled(v_protected.id) u loop
    perform rekey._refuse_envelopes(v_other.relation, v_other.column_name);
    v_settled := v_settled || v_other.relation;
    v_settled_columns := v_settled_columns || v_other.column_name;
  end loop;
  perform rekey._finish_rebind(v_protected.id, case when not v_stays then coalesce(v_old::text, v_protected.relation_name) end, v_settled, v_settled_columns);
  select format('%I.%I', n.nspname, v.relname) into v_view
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  join pg_class v on v.relnamespace = c.relnamespace and v.relkind = 'v' and v.relname = c.relname || '_decrypted'
  where c.oid = target and not v_stays;
  if v_view is not null then
    perform rekey.create_decrypted_view(target);
  end if;
  return v_protected.label;
end
$$;
comment on function rekey.rebind_column is
  'Goes on after a table was rebuilt, or lost a partition: binds a protected column to the table and column that hold its values now, with its functions, triggers and decrypted view, and returns its label. Named as it is registered, it stays there: that confirms that what has its name, what was a part of it, or where its rows are gone, is as it should be. label: which protected column, where the names do not tell. The caller owns the old and the new table, as a member of rekey_admin; where the old one was dropped, the new one has the owner that it had; or is a superuser. Every value is opened, and the table is locked against writers meanwhile. 22023: type or context columns do not fit; 42501: not the owner; RK001: KEK; RK003: a value does not open under the label; RK005: the old table, or another that has its name, holds envelopes still; RK006: protected as another column; RK007: no such protected column.';
grant execute on function rekey.rebind_column to rekey_admin;

-- sql/code/54_find.sql
-- Where envelopes are, and what was forgotten: envelopes in columns that are not protected, what other tools encrypted, and
-- columns, and keys of JSON, that sound like secrets and hold none.

-- The text form of an envelope begins with rk1:UksB and has 104 characters or more; its bytes, 75 or more, are printed as
-- \x524b01..., in an array, a row or JSON too. Nothing is cast to text, which may be anybody's function: format() calls the
-- output function of a type.
-- A name proves nothing: whoever may make a schema may call it cron.
create or replace function rekey._is_extension_table(relation oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_depend d join pg_extension x on x.oid = d.refobjid
    where d.classid = 'pg_class'::regclass and d.objid = relation and d.deptype = 'e' and d.refclassid = 'pg_extension'::regclass
      and x.extname in ('pg_cron', 'supabase_vault'));
end;
comment on function rekey._is_extension_table is 'Whether a table belongs to pg_cron or Supabase Vault, which hold no envelopes.';
grant execute on function rekey._is_extension_table to rekey_operator, rekey_auditor;

create or replace function rekey._sounds_secret(name text) returns boolean
language sql immutable parallel safe
begin atomic
  select w.words ~ (' [a-z]*(token|secret|password|passwd|passwort|kennwort|passphrase|passcode|(api|private|secret|access|signing|encryption)key|credential)s? '
      || '| (pwd|pat|bearer|creds?|jwt|[th]?otp|cvv|cvc|senha|mnemonic) '
      || '| (api|private|secret|access|signing|encryption|encrypted|decryption|master|hmac|aes|rsa|ssh|pgp|gpg|ssl|tls|vapid|deploy|shared|session|auth|account|server|service|role|webhook) keys? '
      || '| (seed|recovery|backup) (phrase|word|code)s? '
      || '| (smtp|imap|pop|mail|email|db|database|postgres|pg|mysql|redis|mongo|amqp|mqtt|user|admin|root|ftp|sftp|ssh|ldap|bind|proxy|wifi|vpn|http|auth|login) ?pass '
      || '|^ pass $')
    -- What is said of a secret is none.
    and w.words !~ (' (id|ids|uuid|name|label|title|type|kind|status|state|version|format|scope|scopes|prefix|suffix|hint|count|counts|length|len|size|limit|usage|used|remaining|quota|budget'
      || '|cost|price|at|on|by|date|time|timestamp|ttl|age|lifetime|expiry|expires|expired|expiration|created|updated|changed|rotated|revoked|issued|reset|enabled|disabled|required|valid|verified'
      || '|policy|strategy|strength|score|algorithm|alg|issuer|audience|provider|source|owner|manager|url|uri|endpoint|path|file|filename|location|arn|ref|reference'
      || '|hash|hashes|digest|checksum|fingerprint|salt|symbol|address|balance|supply|decimals|description|comment|note|notes|question|attempts|flag|index|position) $')
    and w.words !~ '^ (is|has|have|needs?|requires?|uses?|allows?|shows?|max|min|num|number|non?|total|prompt|completion|input|output|cached|design|public) '
    and w.words !~ ' (next|prev|previous|page|paging|sync|cursor|continuation) tokens? | public keys? $'
  from (
    -- The words of camelCase, PascalCase and snake_case, with blanks, hyphens or digits in between.
    select ' ' || btrim(lower(regexp_replace(regexp_replace(regexp_replace(
      name collate "C", '([a-z])([A-Z])', '\1 \2', 'g'), '([A-Z])([A-Z][a-z])', '\1 \2', 'g'), '[^A-Za-z]+', ' ', 'g'))) || ' ' as words) w;
end;
comment on function rekey._sounds_secret is
  'Whether a name, of a column or a key of JSON, sounds like a secret: token, password, apiKey, smtpPass and their kin. token_count, passwordResetAt and the like do not.';
grant execute on function rekey._sounds_secret to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._has_secret(document json) returns boolean
language sql immutable parallel safe
begin atomic
  with recursive parts (name, value) as (
    select null::text, document
    union all
    select e.name, e.value
    from parts p
    cross join lateral (
      select o.key, o.value from json_each(case when json_typeof(p.value) = 'object' then p.value end) o
      union all
      select p.name, a.value from json_array_elements(case when json_typeof(p.value) = 'array' then p.value end) a
    ) as e(name, value)
  )
  select exists (
    select from parts p
    where json_typeof(p.value) = 'string' and p.value::text <> '""' and left(p.value::text, 5) <> '"rk1:' and rekey._sounds_secret(p.name));
end;
comment on function rekey._has_secret is 'Whether a JSON document has, at any depth, a string that is no envelope under a key that sounds like a secret, or in an array under one.';
grant execute on function rekey._has_secret to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.find_envelopes()
returns table (relation regclass, column_name name, envelopes bigint, embedded bigint, others bigint, encrypted bigint, secret_keys bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
set bytea_output = hex
set constraint_exclusion = off  -- as rekey.search_step()
as $$
declare
  -- Conditions on a value.
  v_of_bytes text := $q$substr(%1$s, 1, 3) = '\x524b01' and octet_length(%1$s) >= 75 and octet_length(%1$s) %% 16 = 11$q$;
  v_of_text text := $q$left(%1$s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$q$;
  -- In full: source text of pg_rekey, this line too, may stand in a table of migrations.
  v_within text := $q$(strpos(%1$s collate "C", 'rk1:UksB') > 0 and %1$s collate "C" ~ 'rk1:UksB[A-Za-z0-9+/]{96}'
    or strpos(%1$s collate "C", '\x524b01') > 0 and %1$s collate "C" ~ '\\x524b01[0-9a-f]{144}')$q$;
  v_of_others text := $q$octet_length(%1$s) >= 16 and coalesce(rekey._mark_within(%1$s), 'envelope') <> 'envelope'$q$;
  -- (To take a document apart takes long: not without one of these letters in a key.)
  v_of_keys text := $q$%1$s ~* '(token|secret|pass|pwd|wort|key|cred|pat|bearer|jwt|otp|cv[cv]|senha|mnemonic|phrase|word|code)[^"]*"\s*:' and rekey._has_secret(%1$s::json)$q$;
  v_table record;
  v_part oid;
  v_counts bigint[];
begin
  for v_table in
    select c.oid, c.oid::regclass as relation, array_agg(a.attname order by a.attnum) as names,
      string_agg(case k.kind
        when 'bytea' then format($q$count(*) filter (where %2$s), 0, count(*) filter (where substr(%1$s, 1, 3) <> '\x524b01'), count(*) filter (where %3$s), null$q$,
          v.value, format(v_of_bytes, v.value), format(v_of_others, v.value))
        when 'text' then format($q$count(*) filter (where %2$s), count(*) filter (where not (%2$s) and %3$s),
            count(*) filter (where left(%1$s, 4) collate "C" <> 'rk1:'), count(*) filter (where %4$s), null$q$,
          v.value, format(v_of_text, v.value), format(v_within, v.value), format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.value)))
        -- Of what else holds text, what is empty is nothing.
        else format($q$0, count(*) filter (where %2$s), %3$s, count(*) filter (where %4$s), %5$s$q$, v.value, format(v_within, v.printed),
          case when k.kind <> 'other' then format($q$count(*) filter (where %s not in ('', 'null', '""', '{}', '[]'))$q$, v.printed) else 'null' end,
          format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.printed)),
          case when k.kind = 'json' then format('count(*) filter (where %s)', format(v_of_keys, v.printed)) else 'null' end) end,
        ', ' order by a.attnum) as counts
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    cross join lateral (select format('t.%I', a.attname), format($q$format('%%s', t.%I)$q$, a.attname)) as v(value, printed)
    join pg_type y on y.oid = a.atttypid
    left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
    cross join lateral (
      select case
        when y.oid = 'bytea'::regtype then 'bytea'
        when y.oid in ('text'::regtype, 'varchar'::regtype) then 'text'
        when y.oid in ('json'::regtype, 'jsonb'::regtype) or y.typbasetype in ('json'::regtype, 'jsonb'::regtype) then 'json'
        when y.typcategory = 'S' or e.typcategory = 'S' or 'bytea'::regtype in (y.typbasetype, e.oid) then 'strings'
        else 'other' end) as k(kind)
    where c.relkind in ('r', 'p', 'm') and not c.relispartition and c.relpersistence <> 't' and c.relispopulated
      and c.oid >= 16384 and not (n.nspname in ('rekey', 'rekey_targets') and c.relowner = 'rekey_owner'::regrole) and rekey._is_extension_table(c.oid) is false
      -- Numbers, times, network addresses and the like have no room for one.
      and coalesce(e.typlen, y.typlen) not between 1 and 74 and coalesce(e.typcategory, y.typcategory) not in ('N', 'B', 'D', 'T', 'E', 'G', 'I', 'V')
    group by c.oid
    order by c.oid::regclass::text
  loop
    relation := v_table.relation;
    v_counts := null;
    begin
      for v_part in
        with recursive parts as (
          select v_table.oid as oid
          union select i.inhrelid from pg_inherits i join parts p on p.oid = i.inhparent
        )
        select p.oid from parts p
      loop
        if rekey._hold(v_part, v_part::regclass::text) is not null then
          raise exception using errcode = 'RKEND';
        end if;
      end loop;
      execute format('select array[%s] from %s t', v_table.counts, relation) into v_counts;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;  -- gives the locks back
      when others then null;  -- nothing is known of it
    end;
    for v_place in 1 .. case when v_counts is null then 1 else cardinality(v_table.names) end loop
      column_name := case when v_counts is not null then v_table.names[v_place] end;
      envelopes := v_counts[5 * v_place - 4];
      embedded := v_counts[5 * v_place - 3];
      others := v_counts[5 * v_place - 2];
      encrypted := v_counts[5 * v_place - 1];
      secret_keys := v_counts[5 * v_place];
      return next;
    end loop;
  end loop;
end
$$;
comment on function rekey.find_envelopes is
  'Counts, in every column that has room for one: envelopes; values of another kind that an envelope stands in (text around it, JSON, arrays, rows, domains, and their like); of columns of text, bytea or JSON, their domains and arrays, others; of those, what looks encrypted by another tool; and JSON documents that have a string under a key that sounds like a secret. Reads every ordinary and partitioned table and materialized view that the caller may read, whole, with his rights; of one that he may not read whole, or that has an index or statistics over a function that is neither a superuser''s nor his, which reading it may run, there is a row without a column. Left out are tables of PostgreSQL, pg_rekey, pg_cron and Supabase Vault, temporary and foreign tables, large objects, and what stands within a longer bytea value.';
grant execute on function rekey.find_envelopes to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.find_unprotected()
returns table (relation regclass, column_name name, finding text, rows bigint, advice text, action text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select f.relation, f.column_name, w.finding, w.rows, w.advice, w.action
    from rekey.find_envelopes() with ordinality f (relation, column_name, envelopes, embedded, others, encrypted, secret_keys, place)
    left join rekey.column_status s on s.relation = f.relation and s.column_name = f.column_name
    cross join lateral (
      select format('%L, %L', f.relation, f.column_name) as names,
        -- Those of Supabase's own schemas are its own affair.
        (select s.nspowner::regrole::text !~ '^"?supabase' from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = f.relation) as ours,
        exists (select from pg_attribute a where a.attrelid = f.relation and a.attname = f.column_name
                and a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)) as fit) n
    cross join lateral (values
      (f.column_name is null, 'cannot be read', null, 'Look at it as its owner.', null),
      (f.envelopes > 0 and s.label is null, 'holds envelopes, and is not protected', f.envelopes,
        format('select rekey.protect_column(%s): without it no rotation takes these rows along.', n.names), 'protect_found'),
      (f.embedded > 0, 'holds envelopes within other values', f.embedded,
        'No rotation takes them along, and a key that only they stand on counts as unused. Give them a column of their own, and protect it.', null),
      (f.others > 0 and s.label is not null, 'is protected, and holds values that are not encrypted', f.others,
        format('select rekey.adopt_column(%s)', n.names), 'adopt_plaintext'),
      (f.encrypted > 0 and s.label is null and n.ours, 'holds values that another tool encrypted', f.encrypted,
        case when n.fit then format('select rekey.protect_column(%s), then pg-rekey columns adopt --from what that tool writes', n.names)
          else 'Give them a column of type text or bytea, and protect it.' end,
        case when n.fit then 'adopt_encrypted' end),
      (f.others > coalesce(f.encrypted, 0) and s.label is null and n.ours and rekey._sounds_secret(f.column_name::text), 'sounds like a secret, and is not encrypted',
        f.others - coalesce(f.encrypted, 0),
        case when n.fit then format('select rekey.protect_column(%s), then rekey.adopt_column()', n.names)
          else 'Give the values a column of type text or bytea, and protect it.' end,
        case when n.fit then 'protect_and_adopt' end),
      (f.secret_keys > 0 and n.ours and not rekey._sounds_secret(f.column_name::text), 'has JSON keys that sound like secrets, and are not encrypted', f.secret_keys,
        'Give their values a column of type text or bytea, and protect it.', null)
    ) as w (so, finding, rows, advice, action)
    -- A materialized view is a copy, made anew by REFRESH.
    where w.so and (select c.relkind from pg_class c where c.oid = f.relation) <> 'm'
    order by f.place;
end
$$;
comment on function rekey.find_unprotected is
  'Columns that were forgotten: those that hold envelopes and are not protected, or hold them within other values; those that hold what another tool encrypted; and those whose name, or a key of whose JSON, sounds like a secret, or that are protected, and hold something else. Values are counted, never shown. A table that the caller may not read whole is a finding. action: what is advised, for whoever says it in other words than those of SQL; NULL: the words are the same everywhere. Reads what rekey.find_envelopes() reads, with the rights of the caller.';
grant execute on function rekey.find_unprotected to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/55_findings.sql
-- What endangers protected columns, or goes along with every rotation of them: said by protect_column, and looked at again by the
-- census, `columns list` and doctor, since triggers, rules and publications come later too.

create or replace function rekey._path_schemas(search_path text, owner name) returns name[]
language sql immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select array_agg(case when n.name = '$user' then owner else n.name::name end)
  from (select coalesce(replace(m.found[1], '""', '"'), lower(m.found[2])) as name
        from regexp_matches(search_path, '"((?:[^"]|"")*)"|([^\s,"]+)', 'g') as m(found)) n;
end;
comment on function rekey._path_schemas is 'The schemas of a search path, as the owner of a table has it.';

create or replace function rekey._others_schemas(relation regclass, search_path text) returns setof name
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select n.nspname
  from pg_class c join pg_namespace n on n.nspname = any (rekey._path_schemas(search_path, pg_get_userbyid(c.relowner)))
  cross join lateral (
    select n.nspowner as role
    union
    select a.grantee from aclexplode(n.nspacl) a where a.privilege_type = 'CREATE') as m
  left join pg_roles r on r.oid = m.role
  where c.oid = relation and m.role <> c.relowner and not coalesce(r.rolsuper or r.rolname = 'pg_database_owner', false)
  group by n.nspname;
end;
comment on function rekey._others_schemas is 'The schemas of a search path in which others may create than the owner of this table, and who may do all in its database.';

-- As PostgreSQL checks it when an UPDATE begins, whatever columns it sets.
create or replace function rekey._refused_updates(relation regclass) returns table (publication name, why text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  with identity as (
    select c.relreplident = 'f' as whole, array(
      select a.attname
      from pg_index i
      cross join lateral unnest(i.indkey::smallint[]) as k(attnum)
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
      where i.indrelid = c.oid and i.indimmediate and i.indisvalid
        and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end) as columns
    from pg_class c where c.oid = _refused_updates.relation
  ), published as (
    -- With publish_via_partition_root, list and filter are those of the topmost table; else the relation's own.
    select distinct on (b.oid) b.oid, b.pubname, o.entry, o.prrelid, o.prattrs, o.prqual
    from (
      select _refused_updates.relation::oid, 0::bigint
      union all
      select a.relid, a.place from pg_partition_ancestors(_refused_updates.relation) with ordinality as a(relid, place)
    ) as t(oid, place)
    join pg_class c on c.oid = t.oid
    cross join pg_publication b
    left join pg_publication_namespace m on m.pnpubid = b.oid and m.pnnspid = c.relnamespace
    left join pg_publication_rel r on r.prpubid = b.oid and r.prrelid = t.oid
    left join lateral (
      select r.oid as entry, r.prrelid, r.prattrs, r.prqual where b.pubviaroot or t.oid = _refused_updates.relation) o on true
    where b.pubupdate and c.relpersistence = 'p' and (b.puballtables or m.oid is not null or r.oid is not null)
    order by b.oid, o.entry is not null desc, t.place desc
  ), named as (
    select p.pubname,
      case when p.prattrs is not null then array(
        select a.attname from pg_attribute a where a.attrelid = p.prrelid and a.attnum = any (p.prattrs::smallint[])) end as listed,
      -- (By the expression: what it depends on, the column list may depend on too.)
      array(
        select a.attname from regexp_matches(p.prqual::text, ':varattno (\d+)', 'g') as v(found)
        join pg_attribute a on a.attrelid = p.prrelid and a.attnum = v.found[1]::smallint) as asked
    from published p
  )
  select n.pubname, w.why
  from identity y
  cross join named n
  cross join lateral (values
    (n.listed is not null and (y.whole or not y.columns <@ n.listed), 'its column list does not cover the replica identity'),
    (not y.whole and not n.asked <@ y.columns, 'its WHERE asks for a column that is not part of the replica identity'),
    (not y.whole and y.columns = '{}', 'the table has no replica identity')
  ) as w(so, why)
  where w.so;
end;
comment on function rekey._refused_updates is
  'The publications because of which every UPDATE of a relation, a sweep''s too, is refused by PostgreSQL (42P10, 55000), and why.';

create or replace function rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text)
returns table (kind text, fatal boolean, finding text, advice text, action text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- A sweep writes into the leaves of partitions, each by itself.
  with parts as (
    select h.oid as relation, a.attnum
    from rekey._relations_here(_column_findings.relation) as h(oid)
    join pg_attribute n on n.attrelid = _column_findings.relation and n.attnum = _column_findings.attnum
    join pg_attribute a on a.attrelid = h.oid and a.attname = n.attname
  ), triggers as (
    select t.tgname, u.leaf as relation, t.tgtype::integer & 1 = 1 as each_row, t.tgqual is not null as conditional
    from rekey._update_triggers(_column_findings.relation, _column_findings.attnum) u
    join pg_trigger t on t.oid = u.trigger_id
    where fire_triggers and t.tgenabled in ('O', 'A') and not rekey._is_own_trigger(t.oid)
      and not exists (
        select from pg_depend d
        where d.classid = 'pg_trigger'::regclass and d.objid = t.oid and d.refclassid = 'pg_proc'::regclass
          and d.refobjid in (select f.oid from pg_proc f where f.pronamespace = 'rekey'::regnamespace and f.proname = 'is_sweeping'))
  ), published as (
    -- A table may be in by itself, by its schema, by a table that it is a partition of, or with all others.
    select b.pubname, bool_and(r.prqual is not null) filter (where r.oid is not null) as filtered,
      bool_and(r.prattrs is not null and not s.attnum = any (r.prattrs::smallint[])) filter (where r.oid is not null) as without,
      bool_or(b.puballtables or m.oid is not null) as whole
    from pg_publication b
    cross join (
      select p.relation, p.attnum from parts p
      union
      select c.relid, a.attnum
      from parts p
      cross join lateral pg_partition_ancestors(p.relation) c
      join pg_attribute n on n.attrelid = p.relation and n.attnum = p.attnum
      join pg_attribute a on a.attrelid = c.relid and a.attname = n.attname) as s(relation, attnum)
    join pg_class c on c.oid = s.relation
    left join pg_publication_rel r on r.prpubid = b.oid and r.prrelid = s.relation
    left join pg_publication_namespace m on m.pnpubid = b.oid and m.pnnspid = c.relnamespace
    where b.pubupdate and c.relpersistence = 'p' and (b.puballtables or r.oid is not null or m.oid is not null)
    group by b.pubname
  )
  select 'key', true, format('constraint %I makes the column a key', c.conname), 'A key cannot be encrypted: protect another column.', null
  from pg_constraint c
  where c.contype in ('p', 'f') and (c.conrelid = relation and _column_findings.attnum = any (c.conkey)
    or c.confrelid = relation and _column_findings.attnum = any (c.confkey))
  union all
  select 'type', true, format('varchar(%s) limits its length, and an envelope is longer than its value', a.atttypmod - 4),
    format('ALTER TABLE %s ALTER COLUMN %I TYPE text: an envelope of nothing has 104 characters, one of %s has %s.',
      relation, a.attname, a.atttypmod - 4, 4 + (59 + 16 * ((a.atttypmod - 4) / 16 + 1) + 2) / 3 * 4), null
  from pg_attribute a where a.attrelid = relation and a.attnum = _column_findings.attnum and a.atttypid = 'varchar'::regtype and a.atttypmod > 0
  union all
  -- Not enforced: from version 18 on.
  select distinct 'check', false, format(case when e.enforced then 'CHECK %I is applied to envelopes' else 'CHECK %I, which is not enforced, is not about envelopes' end, c.conname),
    case when e.enforced then 'Drop it, or let it accept them: the sweep fails on rows that it refuses.' else 'Nothing fails on it; but it may not be true any more.' end, null
  from pg_constraint c cross join lateral (select coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true) as enforced) e join (select p.relation, p.attnum from parts p union select relation, _column_findings.attnum) as s on s.relation = c.conrelid
  where c.contype = 'c' and s.attnum = any (c.conkey)
  union all
  select 'index', false, format('index %s holds envelopes: no equality, no order, no uniqueness of the plain values', i.indexrelid::regclass),
    'Drop it; a value that has no room in an index row (2704 bytes) fails.', null
  from pg_index i
  where i.indrelid = relation and not i.indisprimary and (_column_findings.attnum = any (i.indkey) or exists (
    select from pg_depend d where d.objid = i.indexrelid and d.classid = 'pg_class'::regclass and d.refobjid = relation and d.refobjsubid = _column_findings.attnum))
  union all
  select 'generated', false, format('generated column %I is computed from envelopes', a.attname),
    case when a.attgenerated = 's' then format('ALTER TABLE %s ALTER COLUMN %I DROP EXPRESSION keeps what is in it; or drop it.', relation, a.attname)
         else 'Drop it, or compute it from the decrypted view.' end, null
  from pg_attrdef f
  join pg_attribute a on a.attrelid = f.adrelid and a.attnum = f.adnum and a.attgenerated <> ''
  where f.adrelid = relation and exists (
    select from pg_depend d where d.objid = f.oid and d.classid = 'pg_attrdef'::regclass and d.refobjid = relation and d.refobjsubid = _column_findings.attnum)
  union all
  select 'trigger', false,
    format(case when not t.each_row then 'trigger %I fires once a batch of a rotation'
                when t.conditional then 'trigger %I fires for every row of a rotation for which its condition is true'
                else 'trigger %I fires for every row of a rotation' end, t.tgname)
      || case when min(t.relation::oid) <> _column_findings.relation::oid and count(*) < (select count(*) from parts)
              then format(', in %s', min(t.relation::oid)::regclass) else '' end,
    case when t.each_row then 'What it derives from the column, as a hash or the last characters, becomes that of the envelope. ' else '' end
      || format('WHEN (NOT rekey.is_sweeping(%L)) lets it pass%s; rekey.protect_column(..., fire_triggers => false) keeps all of them from firing.',
        _column_findings.relation::text, case when not t.each_row then ', for each row' when t.conditional then ', beside its condition' else '' end), 'let_trigger_pass'
  from triggers t
  group by t.tgname, t.each_row, t.conditional
  union all
  -- 2: ON UPDATE
  select distinct 'rule', false, format('rule %I of %s is applied to the updates of a rotation', r.rulename, r.ev_class::regclass),
    'Drop it, make it a trigger, or have it passed by (fire_triggers => false): what it puts in their place may leave rows as they are.', 'pass_rule_by'
  from parts p join pg_rewrite r on r.ev_class = p.relation and r.ev_type = '2' and r.ev_enabled in ('O', 'A')
  where fire_triggers
  union all
  select 'search path', false, format('others may create in schema %I, in which what a rotation fires looks for names', s.nspname),
    'What they make there could run as the owner of the table: rekey.protect_column(..., search_path => ''...'') without it, or names with their schema.', 'path_of_others'
  from rekey._others_schemas(_column_findings.relation, _column_findings.search_path) as s(nspname)
  where exists (select from triggers)
  union all
  select 'publication', false,
    case when b.whole or not (b.filtered or b.without) then format('publication %I sends every row of a rotation', b.pubname)
         when b.without then format('publication %I sends every row of a rotation, without the column', b.pubname)
         else format('publication %I sends the rows of a rotation that its filter lets through', b.pubname) end,
    case when not b.whole and b.without then 'Subscribers, Supabase Realtime among them, get an update for each row, in which nothing has changed.'
         else 'Subscribers get the envelopes: they need the same keys.' end, null
  from published b
  union all
  select distinct 'publication', false, format('publication %I makes every UPDATE of %s fail, and so the sweep: %s', u.publication, p.relation, u.why),
    'ALTER TABLE ... REPLICA IDENTITY, or ALTER PUBLICATION, before anything is swept.', null
  from parts p cross join lateral rekey._refused_updates(p.relation) u;
end;
comment on function rekey._column_findings is 'What envelopes in a column break, and what a sweep of it fires, with this search path. fatal: it cannot be protected; action: as in rekey.find_unprotected().';

create or replace function rekey._newest_problem(protected rekey.protected_columns) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_shape record;
  v_relation regclass;
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if protected.encrypt_on_write and not exists (
       select from pg_proc p
       where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = format('column_%s_trigger', protected.id)
         and p.prosrc = rekey._write_trigger_body(protected, v_shape.relation, v_shape.attnums)) then
    return 'the trigger that encrypts on write is not as this version of pg_rekey makes it, or a column was renamed';
  end if;
  select g.tgrelid into v_relation
  from (select v_shape.relation as relation union select h from rekey._relations_here(v_shape.relation) h) t
  join pg_trigger g on g.tgrelid = t.relation and g.tgname = any (rekey._trigger_names(protected)) and g.tgenabled <> 'A'
  limit 1;
  return case when v_relation is not null then format('the triggers of %s do not fire in the replica role', v_relation) end;
end
$$;
comment on function rekey._newest_problem is 'In what the triggers of a protected column that is not blocked are behind; NULL: in nothing.';

create or replace function rekey.protection_findings()
returns table (label text, kind text, severity text, finding text, advice text, action text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_shape record;
begin
  for v_column in select * from rekey.protected_columns c order by c.label loop
    label := v_column.label;
    action := null;
    select s.* into v_shape from rekey._column_shape(v_column.id) s;
    finding := rekey._column_problem(v_column);
    if finding is not null then
      kind := 'blocked';
      severity := 'critical';
      advice := 'As long as it cannot be counted, rotations of keyrings that it may hold do not complete, and no key is destroyed.';
      return next;
    else
      finding := rekey._newest_problem(v_column);
      if finding is not null then
        kind := 'write trigger';
        severity := 'warning';
        advice := format('Repeat rekey.protect_column(%L, %L%s) as the owner of the table.', v_column.relation_name, v_column.column_name, rekey._protect_options(v_column));
        action := 'renew_trigger';
        return next;
      end if;
    end if;
    return query select v_column.label, f.kind, f.severity, f.finding, f.advice, null from rekey._index_findings(v_column) f;
    if v_shape.relation is not null then
      return query
        select v_column.label, f.kind, 'warning', f.finding, f.advice, f.action
        from rekey._column_findings(v_shape.relation, v_shape.attnums[v_column.places[1]], v_column.fire_triggers, v_column.search_path) f
        order by f.kind, f.finding;
    end if;
  end loop;
end
$$;
comment on function rekey.protection_findings is
  'What blocks protected columns, and what rekey.protect_column() warned of or would warn of now: triggers, rules and publications that came later too. severity: critical (blocked) or warning; action: as in rekey.find_unprotected().';
grant execute on function rekey.protection_findings to rekey_admin, rekey_operator, rekey_auditor;

-- Logical replication brings rows, and not the sequences that numbered them.
create or replace function rekey._sequences_behind() returns table (sequence regclass, at bigint, needed bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
begin
  for v_column in
    select a.attrelid::regclass as relation, a.attname, pg_get_serial_sequence(a.attrelid::regclass::text, a.attname)::regclass as sequence
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attidentity <> '' and not a.attisdropped
    where c.relnamespace = 'rekey'::regnamespace and c.relkind = 'r'
    union all
    select r.relation, r.attname, 'rekey._pass_id'::regclass
    from (values ('rekey.rotations'::regclass, 'pass_id'), ('rekey.rotations', 'verification_id'), ('rekey._chunks', 'pass_id'), ('rekey._verified', 'verification_id'))
      as r(relation, attname)
  loop
    sequence := v_column.sequence;
    execute format('select max(t.%I) from %s t', v_column.attname, v_column.relation) into needed;
    execute format('select case when s.is_called then s.last_value else s.last_value - 1 end from %s s', sequence) into at;
    if needed > at then
      return next;
    end if;
  end loop;
end
$$;
comment on function rekey._sequences_behind is 'Sequences of our tables whose next number is taken: where they are, and where they would have to be.';

create or replace function rekey.resync_sequences() returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_behind record;
  v_count bigint := 0;
begin
  for v_behind in select s.sequence, max(s.needed) as needed from rekey._sequences_behind() s group by s.sequence loop
    perform setval(v_behind.sequence, v_behind.needed);
    v_count := v_count + 1;
  end loop;
  return v_count;
end
$$;
comment on function rekey.resync_sequences is
  'Moves the sequences of pg_rekey on to where their tables are, and returns how many were behind. After a switch-over by logical replication, which brings rows and no sequences: without it, rotations fail with 23505.';
grant execute on function rekey.resync_sequences to rekey_admin;

create or replace function rekey.findings()
returns table (kind text, severity text, target text, keyring text, version integer, rows bigint, finding text, advice text, action text)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select 'own tables', 'critical', 'rekey', null::text, null::integer, null::bigint, o.problem, 'Nothing completes and no key is destroyed until that is done.', null::text
    from rekey._own_problem() as o(problem) where o.problem is not null
    union all
    -- 1: for each row, 2: before. Whoever made it may want it; it could also keep rows as they are, and say nothing.
    select 'own tables', 'warning', t.tgrelid::regclass::text, null, null, null,
      format('trigger %I of %s may change what pg_rekey writes', t.tgname, t.tgrelid::regclass), format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass), null
    from pg_depend d
    join pg_trigger t on d.classid = 'pg_class'::regclass and t.tgrelid = d.objid and not t.tgisinternal and t.tgtype::integer & 3 = 3
    join pg_proc p on p.oid = t.tgfoid and p.pronamespace <> 'rekey'::regnamespace
    where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'rekey'::regnamespace
    union all
    select c.kind, c.severity, c.label, null, null, null, format('%s: %s', c.label, c.finding), c.advice, c.action from rekey.protection_findings() c
    union all
    select 'sequence', 'critical', s.sequence::text, null, null, null,
      format('the sequence %s is at %s, and its table at %s: rotations will fail with 23505', s.sequence, s.at, s.needed),
      format('select rekey.resync_sequences(), or: select setval(%L, %s)', s.sequence::text, s.needed), null
    from rekey._sequences_behind() s
    union all
    select 'name', 'warning', n.nspname::text, null, null, null,
      format('schema %I belongs to %s, and not to the extension %s', n.nspname, pg_get_userbyid(n.nspowner), s.extension),
      'pg_rekey passes it by. Whoever reads or calls what is in it runs the code of that role: DROP SCHEMA, or REVOKE CREATE ON DATABASE.', null
    from (values ('cron', 'pg_cron'), ('vault', 'supabase_vault')) as s(schema, extension)
    join pg_namespace n on n.nspname = s.schema
    where not exists (
      select from pg_extension e
      where e.extname = s.extension and (e.extnamespace = n.oid or exists (
        select from pg_depend d
        where d.classid = 'pg_namespace'::regclass and d.objid = n.oid and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e')))
    union all
    select 'name', 'warning', o.name, null, null, null,
      format('%s of %s is in a schema of the extension %s, and not of the extension', o.name, pg_get_userbyid(o.owner), s.extension),
      'pg_rekey passes it by. Look at what it is for, and who may CREATE in that schema.', null
    from (values ('cron', 'pg_cron'), ('vault', 'supabase_vault')) as s(schema, extension)
    join pg_namespace n on n.nspname = s.schema
    join pg_extension e on e.extname = s.extension
    join (
      select c.relnamespace, c.oid, c.relowner, 'pg_class'::regclass, c.oid::regclass::text from pg_class c where c.relkind in ('r', 'p', 'v', 'm', 'f')
      union all
      select p.pronamespace, p.oid, p.proowner, 'pg_proc'::regclass, p.oid::regprocedure::text from pg_proc p
    ) as o(namespace, oid, owner, class, name) on o.namespace = n.oid
    where not exists (
      select from pg_depend d
      where d.classid = o.class and d.objid = o.oid and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e')
    union all
    select f.kind, f.severity, f.target, nullif(f.keyring, ''), nullif(f.version, 0), f.rows, f.finding, f.advice, null
    from rekey._census_findings f where f.rows is not null;
end
$$;
comment on function rekey.findings is
  'What is not as it should be: tables of ours that hide rows, protected columns (rekey.protection_findings()), sequences that are behind, schemas and objects that only have the names of pg_cron or the Vault, and rows that the last census found not to open, or on versions that are destroyed or unknown. severity: critical or warning; action: as in rekey.find_unprotected(). pg-rekey doctor shows it.';
grant execute on function rekey.findings to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/56_remake.sql
-- What an update changes in the functions of protected columns, it changes in those that are installed. Nobody else works
-- meanwhile (update.sql). Of an extension, they are no part: each table's owner has his own.

create or replace function rekey._remake_columns() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_is_extension boolean := exists (select from pg_extension e where e.extname = 'pg_rekey');
  v_column record;
  v_function regprocedure;
  v_statement text;
begin
  for v_column in
    select c as protected, c.id, c.label, s.relation, s.attnums, pg_get_userbyid(t.relowner) as owner
    from rekey.protected_columns c
    cross join lateral rekey._column_shape(c.id) s
    join pg_class t on t.oid = s.relation
    where cardinality(s.attnums) = cardinality(c.places) + (c.index_place is not null)::integer
      -- Where the table has another owner since, the column waits for him.
      and t.relowner = (select p.proowner from pg_proc p where p.oid = to_regproc(format('rekey_targets.column_%s_guard', c.id)))
    order by c.id
  loop
    v_function := to_regprocedure(format('rekey_targets.column_%s_trigger()', v_column.id));
    if v_function is not null then
      -- Triggers depend on it: it is replaced. The script of an extension replaces nothing but its own.
      if v_is_extension then
        execute format('alter extension pg_rekey add function %s', v_function);
      end if;
      execute rekey._trigger_statement(v_column.id, rekey._write_trigger_body(v_column.protected, v_column.relation, v_column.attnums));
    end if;
    if not pg_has_role(v_column.owner, 'usage') then
      raise warning '% may be blocked now: the functions of columns changed, and % owns its table', v_column.label, v_column.owner
        using hint = 'Where rekey.column_status says so, that role repeats rekey.protect_column().', constraint = 'protect_again';
      continue;
    end if;
    for v_function in
      select p.oid::regprocedure from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any ((rekey._function_names('column_' || v_column.id))[2:6])
    loop
      execute format('drop function %s', v_function);
    end loop;
    execute format('grant create on schema rekey_targets to %I', v_column.owner);
    foreach v_statement in array rekey._function_statements(v_column.protected, v_column.owner)
      || rekey._index_function_statements(v_column.protected, v_column.relation, v_column.attnums) loop
      execute v_statement;
    end loop;
    execute format('revoke create on schema rekey_targets from %I', v_column.owner);
  end loop;
  for v_function in
    select p.oid::regprocedure from pg_depend d join pg_proc p on p.oid = d.objid
    where d.classid = 'pg_proc'::regclass and d.deptype = 'e' and p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_'
  loop
    execute format('alter extension pg_rekey drop function %s', v_function);
  end loop;
end
$$;
comment on function rekey._remake_columns is
  'Makes the functions of protected columns anew, as this version has them, in the name of their owners. A warning where whoever updates is no member of an owner: that column may be blocked until its owner repeats rekey.protect_column().';

-- sql/code/57_blind_index.sql
-- Searching protected columns by equality: a blind index, a column of bytea beside the protected one. For each value it holds the
-- version of the key, and 16 bytes of an HMAC of what the value is taken for, under a key derived from that version's DEK.
-- So it is rotated, and destroyed, with its version. (62_search.sql is another search: for envelopes, before a destruction.)
--
-- A unique index on it holds during a rotation: what is written is asked for under every version that rows may stand on, by standing
-- there for a moment (docs/design.md, "How a value stays unique").

create or replace function rekey._normalized(value bytea, normalization text) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := rekey._as_text(value);
begin
  -- Plain assignments, of which none raises: 41_encrypt.sql.
  if v_text is null then
    return value;
  end if;
  if normalization = 'digits' then
    v_text := regexp_replace(v_text collate "C", '[^0-9]', '', 'g');
  elsif normalization = 'exact' and length(v_text) = octet_length(v_text) then
    return value;  -- ASCII is in NFC
  else
    if getdatabaseencoding() = 'UTF8' then
      v_text := pg_catalog.normalize(v_text, 'NFC');
    end if;
    if normalization = 'trim_lower' then
      v_text := btrim(v_text, chr(32) || chr(9) || chr(10) || chr(11) || chr(12) || chr(13));
    end if;
    if normalization in ('lower', 'trim_lower') then
      v_text := lower(v_text);
      if getdatabaseencoding() = 'UTF8' then
        v_text := pg_catalog.normalize(v_text, 'NFC');
      end if;
    end if;
  end if;
  return convert_to(v_text, 'UTF8');
end
$$;
comment on function rekey._normalized is
  'What a value is taken for. exact: its text in NFC; lower: in NFC, lower() of the database, and in NFC again; trim_lower: the same, without blanks, tabs, line feeds, vertical tabs, form feeds and carriage returns at both ends; digits: its ASCII digits alone. What is no text stays as it is.';

create or replace function rekey._text_version(normalization text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unicode text := (select c.catalog_version_no from pg_control_system() c);
  v_collation text;
begin
  if normalization = 'digits' then
    return '';
  end if;
  -- What NFC goes by comes with the major version, which that of the catalogs stands for where nothing says it.
  if to_regprocedure('pg_catalog.unicode_version()') is not null then
    execute format('select pg_catalog.%I()', 'unicode_version') into v_unicode;
  end if;
  if normalization <> 'exact' then
    select format(' %s %s %s %s', d.datlocprovider, d.datctype, coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), pg_database_collation_actual_version(d.oid))
    into v_collation
    from pg_database d where d.datname = current_database();
  end if;
  return v_unicode || coalesce(v_collation, '');
end
$$;
comment on function rekey._text_version is 'What values are normalized by: Unicode, where NFC matters; the collation of the database, where lower() does.';

-- What a searchable column asks the server that holds it.
create or replace function rekey._versions_to_ask(id integer, relation oid) returns integer[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_versions integer[];
  v_keyring integer;
  v_column name;
  v_locked integer;
  v_snapshot boolean := current_setting('transaction_isolation') <> 'read committed';
begin
  loop
    -- In a statement of its own: it sees a rotation that was committed since the row came to stand in the index.
    select a.version || array(select v from unnest(b.versions) as v where v <> a.version order by v), c.keyring_id, c.index_column
    into v_versions, v_keyring, v_column
    from rekey._blind_indexes b
    join rekey.protected_columns c on c.id = b.column_id
    join rekey.encryption_keys a on a.keyring_id = c.keyring_id and a.state = 'active'
    where b.column_id = _versions_to_ask.id;
    exit when v_versions is null or v_versions[1] = v_locked or cardinality(v_versions) = 1 and not v_snapshot;
    if v_locked is null and not exists (
         select from pg_index i
         join pg_attribute t on t.attrelid = i.indrelid and t.attname = v_column
         where i.indrelid = _versions_to_ask.relation and (i.indisunique or i.indisexclusion)
           and (t.attnum = any (i.indkey::smallint[]) or exists (
             select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = i.indexrelid and d.refclassid = 'pg_class'::regclass
               and d.refobjid = i.indrelid and d.refobjsubid = t.attnum))) then
      return null;
    end if;
    -- Where the row is to stay, no less in use than the version that its value is sealed with.
    perform pg_advisory_xact_lock_shared(v_keyring, v_versions[1]);
    v_locked := v_versions[1];
  end loop;
  -- (40001, where this snapshot does not see it.)
  perform rekey._refuse_old_snapshot(array[v_keyring], v_versions[1:1]);
  return v_versions;
end
$$;
comment on function rekey._versions_to_ask is
  'The versions under which a value is to be asked for in the unique index of a blind index, the active one first, where it stays; NULL: nothing is unique. 40001 outside READ COMMITTED, where a rotation was committed since the snapshot.';

create or replace function rekey._index_of(id integer, envelope bytea, context bytea, version integer) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
  v_plaintext bytea;
  v_normalized bytea;
  v_key bytea;
begin
  select c.keyring_id, c.normalization, rekey._part(c.label) || rekey._part(c.normalization) as info, b.versions into v_column
  from rekey.protected_columns c join rekey._blind_indexes b on b.column_id = c.id where c.id = _index_of.id;
  -- (A rotation that has completed since it was chosen: no row stands on it any more.)
  if not coalesce(version = any (v_column.versions), false) then
    return null;
  end if;
  v_key := rekey._dek(v_column.keyring_id, version);
  if v_key is null then
    raise exception 'the index cannot be asked under key version %: %', version, rekey._dek_problem(v_column.keyring_id, version) using errcode = 'RK006';
  end if;
  v_plaintext := rekey._open(envelope, context);
  v_normalized := rekey._normalized(v_plaintext, v_column.normalization);
  v_key := rekey._index_key(v_key, v_column.info);
  return rekey._index_value(version, v_key, v_normalized);
end
$$;
comment on function rekey._index_of is 'The index value of an envelope under a version; NULL where no row may stand on that. RK003: it does not open; RK006: the version may not be used.';

create or replace function rekey._further_values(versions integer[], keyring_id integer, info bytea, normalized bytea) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
  v_key bytea;
  v_values bytea := ''::bytea;
begin
  foreach v_version in array versions loop
    v_key := rekey._dek(keyring_id, v_version);
    if v_key is null then
      raise exception 'the index cannot be asked under key version %: %', v_version, rekey._dek_problem(keyring_id, v_version) using errcode = 'RK006',
        hint = 'Rows may stand on it. Once a rotation has taken them along, they do not: rekey.rotation_status.', constraint = 'rotations';
    end if;
    v_key := rekey._index_key(v_key, info);
    v_values := v_values || rekey._index_value(v_version, v_key, normalized);
  end loop;
  return v_values;
end
$$;
comment on function rekey._further_values is 'The index values of what a value is taken for under these versions, one after the other. RK006: one of them may not be used.';

create or replace function rekey._refuse_keyring() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'the value is sealed with another keyring than that of the column' using errcode = 'RK006',
    hint = 'A searchable column holds one keyring: store the plain value, which is encrypted on write.', constraint = 'encrypt_on_write';
end
$$;
comment on function rekey._refuse_keyring is 'Raises RK006.';

create or replace function rekey._index_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[];
  v_context text;
begin
  select array_agg(quote_ident(a.attname) order by p.rank) into v_names
  from unnest(protected.places || protected.index_place) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = relation and a.attnum = attnums[p.place];
  v_context := rekey._context_expression(protected.label, v_names[2:cardinality(protected.places)]);
  -- As rekey._write_trigger_body(), and what is said beside it.
  return format($body$
declare
  v_info constant bytea := %12$L::bytea;
  v_envelope bytea;
  v_plaintext bytea;
  v_length integer;
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
  v_key bytea;
  v_normalized bytea;
  v_versions integer[];
begin
  if not rekey._is_unchanged(%7$s, %8$L, tg_name, tg_relid) then
    perform rekey._refuse_other_table(%7$s, tg_relid);
    perform rekey._refuse_renamed(%7$s, %8$L);
    perform rekey._refuse_later_trigger(tg_name, tg_relid);
  end if;
  if new.%1$s is null then
    new.%10$s := null;
    return new;
  end if;
  v_context := %2$s;
  v_envelope := rekey._envelope_of(new.%1$s);
  if tg_op = 'UPDATE' and octet_length(new.%10$s) = 4 and new.%1$s = old.%1$s%9$s and v_envelope is not null then
    -- The number of a version asks for the index value under it (column_N_carry).
    new.%10$s := coalesce(rekey._index_of(%7$s, v_envelope, v_context, rekey._int4(new.%10$s, 0)), old.%10$s);
    return new;
  end if;
  if v_envelope is not null and current_setting('session_replication_role') = 'replica' and rekey._is_of_known_version(v_envelope) then
    return new;
  end if;
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%9$s then
    if v_envelope is null or v_context = %3$s then
      -- A sweep fills the index; nobody else writes into it.
      if not rekey.is_sweeping(tg_relid) then
        new.%10$s := old.%10$s;
      end if;
      return new;
    end if;
    v_plaintext := rekey._open(v_envelope, %3$s);
    v_envelope := null;
  elsif v_envelope is null then
    v_plaintext := %4$s;
  else
    if rekey.is_sweeping(tg_relid) then
      return new;
    end if;
    v_plaintext := rekey._open_incoming(v_envelope, v_context);
    if rekey._int4(v_envelope, 3) <> %5$s then
      perform rekey._refuse_keyring();
    end if;
  end if;
  v_length := octet_length(v_plaintext);
  v_sealing := rekey._sealing_on_write(%5$s, v_length);
  if v_sealing.key is null then
    new.%10$s := null;
    return new;
  end if;
  -- An envelope of an older version is sealed anew: what stands here can be searched for.
  if v_envelope is null or substr(v_envelope, 1, 11) <> v_sealing.header then
    v_iv := rekey._random_bytes(16);
    v_aad := v_sealing.header || v_context;
    v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_plaintext, v_aad);
    new.%1$s := %6$s;
  end if;
  v_key := rekey._index_key(v_sealing.key, v_info);
  v_normalized := rekey._normalized(v_plaintext, %11$L);
  new.%10$s := rekey._index_value(rekey._int4(v_sealing.header, 7), v_key, v_normalized);
  v_versions := rekey._versions_to_ask(%7$s, tg_relid);
  if v_versions is not null then
    v_versions := array_remove(v_versions, rekey._int4(v_sealing.header, 7));
    new.%10$s := new.%10$s || rekey._further_values(v_versions, %5$s, v_info, v_normalized);
  end if;
  return new;
end
$body$, v_names[1], format(v_context, 'new'), format(v_context, 'old'),
    case when protected.is_text then format('convert_to(new.%s, ''UTF8'')', v_names[1]) else 'new.' || v_names[1] end,
    protected.keyring_id, case when protected.is_text then 'rekey._to_text(v_envelope)' else 'v_envelope' end,
    protected.id, (select array_agg(a.attname order by a.attnum) from pg_attribute a where a.attrelid = relation and a.attnum = any (attnums)),
    case when protected.is_text then ' collate "C"' end, v_names[cardinality(v_names)], protected.normalization,
    rekey._part(protected.label) || rekey._part(protected.normalization));
end
$$;
comment on function rekey._index_trigger_body is 'Body of the trigger that encrypts a searchable column on write, and keeps its index.';

-- These are the owner's, as those that sweep: what they look at and change is his. They know no key, and no value. The trigger
-- that encrypts gives them index values; to be moved to another version, they write its number.
create or replace function rekey._index_bodies(protected rekey.protected_columns, relation regclass, attnums smallint[])
returns table (name text, arguments text, result text, language text, body text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text := 'column_' || protected.id;
  v_column text := (select quote_ident(a.attname) from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.places[1]]);
  v_index text := (select quote_ident(a.attname) from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.index_place]);
  v_type text := case when protected.is_text then 'text' else 'bytea' end;
  v_collate text := case when protected.is_text then ' collate pg_catalog."C"' else '' end;
  -- As NAME_write: rekey._column_bodies().
  v_kept_role text := case when protected.fire_triggers then '' else '
  v_role text := current_setting(''session_replication_role'');' end;
  v_before text := case when protected.fire_triggers then format('perform set_config(''search_path'', %L, true);', protected.search_path)
    else 'perform set_config(''session_replication_role'', ''replica'', true);' end;
  v_after text := case when protected.fire_triggers then '' else 'perform set_config(''session_replication_role'', v_role, false);' end;
begin
  return query
  select format('%s_%s', v_prefix, b.suffix), b.arguments, b.result, b.language, b.body
  from (values
    ('live', 'relation regclass', 'integer[]', 'sql', format('
  select case when not rekey.is_sweeping(relation) then rekey._versions_to_ask(%s, relation) end;', protected.id)),
    ('look', '', 'trigger', 'plpgsql', format($body$
declare
  v_values bytea[] := array(select substr(new.%1$s, 1 + 20 * g.place, 20) from generate_series(0, octet_length(new.%1$s) / 20 - 1) as g(place) order by g.place);
  v_alike text;
  v_found bytea;
begin
  -- By the other columns of the unique indexes too: those of another tenant are no duplicate.
  select string_agg(coalesce(u.alike, 'true'), ' or ') into v_alike
  from (
    select string_agg(format('t.%%1$I = ($2).%%1$I', a.attname), ' and ') filter (where a.attnum > 0) as alike
    from pg_index i
    join pg_attribute x on x.attrelid = i.indrelid and quote_ident(x.attname) = %2$L and x.attnum = any (i.indkey::smallint[])
    left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any ((i.indkey::smallint[])[0:i.indnkeyatts - 1]) and a.attnum <> x.attnum
      and a.atttypid < 16384  -- whose operators are PostgreSQL's own
    where i.indrelid = tg_relid and i.indisunique
    group by i.indexrelid) u;
  -- Where it is there already, it is asked for first under the version that it stands on: so ON CONFLICT finds it. Locked, the
  -- sweep leaves it there.
  execute format('select t.%3$s from only %%s t where t.%3$s = any ($1) and (%%s) limit 1 for key share', tg_relid::regclass, coalesce(v_alike, 'true'))
  into v_found using v_values, new;
  new.%1$s := coalesce(v_found, v_values[1]);
  return new;
end
$body$, v_index, v_index, replace(v_index, '%', '%%'))),
    ('move', format('relation regclass, row_pointer tid, index bytea, value %s, version bytea, out moved tid, out moved_index bytea', v_type), 'record', 'plpgsql', format($body$
declare
  v_statement text := format('update only %%s t set %1$s = $1 where t.ctid operator(pg_catalog.=) $2 and t.%1$s operator(pg_catalog.=) $3 returning t.ctid, t.%1$s', relation);
  v_again text := format('update only %%s t set %1$s = $1 where t.%1$s operator(pg_catalog.=) $2 and t.%2$s operator(pg_catalog.=) $3%3$s returning t.ctid, t.%1$s', relation);%4$s
begin
  %5$s
  execute v_statement into moved, moved_index using version, row_pointer, index;
  if moved is null then
    -- A trigger has updated the row since.
    execute v_again into moved, moved_index using version, index, value;
  end if;
  %6$s
end
$body$, replace(v_index, '%', '%%'), replace(v_column, '%', '%%'), v_collate, v_kept_role, v_before, v_after)),
    ('carry', '', 'trigger', 'plpgsql', format($body$
declare
  v_row tid := new.ctid;
  v_index bytea := new.%2$s;
  v_at integer := (get_byte(v_index, 0) << 24) | (get_byte(v_index, 1) << 16) | (get_byte(v_index, 2) << 8) | get_byte(v_index, 3);
  v_asked integer[] := array[v_at];
  v_live integer[];
  v_next integer;
begin
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%3$s or current_setting('session_replication_role') = 'replica' then
    return null;
  end if;
  loop
    -- After the row stands in the index: who makes a version active later will find it there.
    v_live := coalesce(rekey_targets.%4$s_live(tg_relid), v_live[1:1]);
    exit when v_live is null or v_live <@ v_asked and v_at = v_live[1];
    foreach v_next in array array(select v from unnest(v_live[2:]) as v where v <> all (v_asked) order by v) || v_live[1] loop
      continue when v_next = v_at;
      select m.moved, m.moved_index into v_row, v_index
      from rekey_targets.%4$s_move(tg_relid, v_row, v_index, new.%1$s, int4send(v_next)) m;
      if v_row is null then
        return null;  -- deleted, or changed, by a trigger of its own
      end if;
      v_asked := v_asked || v_next;
      v_at := v_next;
    end loop;
  end loop;
  return null;
end
$body$, v_column, v_index, case when protected.is_text then ' collate "C"' else '' end, v_prefix))
  ) as b(suffix, arguments, result, language, body);
end
$$;
comment on function rekey._index_bodies is
  'The functions of a blind index, owned by the owner of the table: live (the versions to ask for), look (trigger: under which version a value is asked for first), move (one row to another version), carry (trigger: asks for it under all of them, the active one last).';

create or replace function rekey._index_function_statements(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
begin
  if protected.index_place is null then
    return array[]::text[];
  end if;
  return (
    select array_agg(s.statement order by array_position('{live,look,move,carry}', substring(b.name from '[a-z]+$')), s.place)
    from rekey._index_bodies(protected, relation, attnums) b
    cross join lateral (values
      (1, format('create or replace function rekey_targets.%I(%s) returns %s language %s volatile security definer%s', b.name, b.arguments, b.result, b.language,
        case when b.language = 'sql' then ' begin atomic ' || b.body || ' end' else format(' set search_path = pg_catalog, pg_temp as %L', b.body) end)),
      (2, format('revoke all on function rekey_targets.%I from public', b.name)),
      (3, format('alter function rekey_targets.%I owner to %I', b.name, v_owner))) as s(place, statement));
end
$$;
comment on function rekey._index_function_statements is 'The statements that make the functions of rekey._index_bodies(); none for a column that is not searchable.';

create or replace function rekey._index_statements(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
begin
  if protected.index_place is null or not protected.encrypt_on_write then
    return array[]::text[];
  end if;
  return rekey._index_function_statements(protected, relation, attnums) || (
    select array[
      format('create or replace trigger zz_pg_rekey_%s_look before insert or update on %s for each row when (octet_length(new.%I) > 20) execute function rekey_targets.column_%1$s_look()',
        protected.id, relation, a.attname),
      format('create or replace trigger zz_pg_rekey_%s_carry after insert or update on %s for each row when (new.%I is not null) execute function rekey_targets.column_%1$s_carry()',
        protected.id, relation, a.attname)]
    from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.index_place]);
end
$$;
comment on function rekey._index_statements is 'The statements that make functions and triggers of a blind index; none for a column that is not searchable.';

create or replace function rekey._older_snapshots(since xid8) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (A restore brings numbers of another server.)
  if since::text::bigint >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint or pg_snapshot_xmax(pg_current_snapshot())::text::bigint - since::text::bigint > 1000000000 then
    return null;
  end if;
  perform pg_stat_clear_snapshot();
  return (
    select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('pid', a.pid, 'role', a.usename, 'snapshot', true,
      'age_seconds', extract(epoch from clock_timestamp() - a.xact_start)::bigint)))
    from pg_stat_activity a
    where a.datname = current_database() and a.pid <> pg_backend_pid() and age(a.backend_xmin) >= age(since::xid)
      -- Who sends WAL or vacuums searches for nothing. A worker's own batch is younger, and looks for no value.
      and not exists (select from pg_stat_get_wal_senders() w where w.pid = a.pid)
      and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid));
end
$$;
comment on function rekey._older_snapshots is 'Who has a snapshot in which the version that this transaction made active is not active yet; NULL: nobody.';

create or replace function rekey._activate_in_indexes(keyrings integer[], versions integer[]) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._blind_indexes b
  set versions = array_remove(b.versions, u.version) || u.version, changed_in = pg_current_xact_id()
  from rekey.protected_columns c
  join unnest(_activate_in_indexes.keyrings, _activate_in_indexes.versions) as u(keyring_id, version) on u.keyring_id = c.keyring_id
  where c.id = b.column_id;
end;
comment on function rekey._activate_in_indexes is 'Notes, in the transaction that makes these versions active, that index values may come to stand on them.';

create or replace function rekey._search_values(label text, "values" text[]) returns bytea[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
  v_versions integer[];
  v_version integer;
  v_value text;
  v_bytes bytea;
  v_normalized bytea[];
  v_key bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  select c.id, c.keyring_id, c.normalization, rekey._part(c.label) || rekey._part(c.normalization) as info, k.tenant_id, b.versions, b.filled into v_column
  from rekey.protected_columns c
  join rekey.keyrings k on k.id = c.keyring_id
  left join rekey._blind_indexes b on b.column_id = c.id
  where c.label = _search_values.label;
  perform rekey._check_label(label);
  if v_column.versions is null then
    raise exception '% is not searchable', coalesce(quote_literal(label), 'NULL') using errcode = 'RK007',
      hint = 'rekey.make_searchable() makes a protected column so. It is named by its label: rekey.column_status.', constraint = 'searchable';
  end if;
  if not rekey.can_access_tenant(v_column.tenant_id) then
    perform rekey._refuse_tenant();
  end if;
  if not v_column.filled then
    raise exception 'the index of % is not filled yet', quote_literal(label) using errcode = 'RK006',
      hint = 'A worker fills it: rekey.rotation_status says how far it is.', constraint = 'rotations';
  end if;
  -- Plain assignments only, as in rekey._adopt().
  foreach v_value in array "values" loop
    if v_value is not null then
      v_bytes := convert_to(v_value, 'UTF8');
      v_bytes := rekey._normalized(v_bytes, v_column.normalization);
      v_normalized := v_normalized || v_bytes;
    end if;
  end loop;
  v_versions := v_column.versions;
  foreach v_version in array v_versions loop
    v_key := rekey._dek(v_column.keyring_id, v_version);
    if v_key is null then
      raise exception 'cannot search %: %', quote_literal(label), rekey._dek_problem(v_column.keyring_id, v_version) using errcode = 'RK006',
        hint = 'Rows may stand on that version, and would be missed.';
    end if;
    v_key := rekey._index_key(v_key, v_column.info);
    foreach v_bytes in array coalesce(v_normalized, '{}'::bytea[]) loop
      v_found := v_found || rekey._index_value(v_version, v_key, v_bytes);
    end loop;
  end loop;
  return v_found;
end
$$;
comment on function rekey._search_values is 'What rekey.search_many() returns.';

create or replace function rekey.search(label text, value text) returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._search_values(label, array[value]);
end
$$;
comment on function rekey.search is
  'What the index column of a searchable column may hold for a value, one for each key version that rows may stand on: where email_bidx = any (rekey.search(''public.users.email'', ''ada@example.org'')). label: that of the protected column. Good within this statement only: a rotation changes it. NULL finds nothing. Writes nothing. 42501: a column that the caller may not read, or another tenant''s; RK001, RK002: KEK; RK006: the index is not filled yet, or a version may not be used; RK007: not searchable.';
grant execute on function rekey.search to rekey_app;

create or replace function rekey.search_many(label text, "values" text[]) returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._search_values(label, coalesce("values", '{}'));
end
$$;
comment on function rekey.search_many is 'As rekey.search(), of many values: rows that hold any of them. Errors: as rekey.search().';
grant execute on function rekey.search_many to rekey_app;

-- Executable by administrators because rekey.make_searchable() runs with its caller's rights.
create or replace function rekey._register_search(target regclass, column_name name, index_column name, normalization text, out id integer, out statements text[])
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_protected rekey.protected_columns;
  v_names name[];
  v_attnums smallint[];
  v_places integer[];
  v_index_place integer;
begin
  perform rekey._refuse_snapshot();
  perform rekey._refuse_stranger(target);
  perform pg_advisory_xact_lock(0, 3);  -- as rekey._register_column()
  if normalization is null or normalization not in ('exact', 'lower', 'trim_lower', 'digits') then
    raise exception 'values are not normalized as %', coalesce(quote_literal(normalization), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'normalization: exact, lower, trim_lower or digits.';
  end if;
  id := rekey._column_id(target, column_name);
  select * into v_protected from rekey.protected_columns c where c.id = _register_search.id;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) first.', constraint = 'protect';
  end if;
  -- Before its row: a rotation that has begun is waited for, so that its version is not missed.
  perform rekey._keyring(rekey._keyring_name(v_protected.keyring_id), lock => true);
  select * into v_protected from rekey.protected_columns c where c.id = _register_search.id for update;
  perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
  if not v_protected.encrypt_on_write then
    raise exception '% has no trigger that encrypts on write, which keeps the index', v_protected.label using errcode = 'RK006',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) makes it.', constraint = 'encrypt_on_write';
  end if;
  if not exists (
       select from pg_attribute a
       where a.attrelid = target and a.attname = _register_search.index_column and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
         and a.atttypid = 'bytea'::regtype and not a.attnotnull) then
    raise exception 'column %.% cannot hold an index', target, coalesce(quote_ident(index_column), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'It is bytea, may be NULL, and is not generated.';
  end if;
  if exists (
       select from rekey.protected_columns c cross join lateral rekey._column_shape(c.id) s
       join pg_attribute a on a.attrelid = s.relation and a.attname = _register_search.index_column and a.attnum = any (s.attnums)
       where s.relation = target and (c.id <> v_protected.id or a.attnum <> coalesce(s.attnums[c.index_place], 0))) then
    raise exception 'column %.% has another use', target, quote_ident(index_column) using errcode = 'invalid_parameter_value', hint = 'Name a column of its own.';
  end if;
  if v_protected.normalization is not null and (v_protected.normalization <> _register_search.normalization or rekey._index_column(v_protected) <> index_column) then
    raise exception '% is searchable already, in another way', v_protected.label using errcode = 'RK006',
      hint = format('It is normalized as %s, in column %s.', v_protected.normalization, quote_ident(rekey._index_column(v_protected)));
  end if;
  if exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey::smallint[])
             where i.indrelid = target and a.attname = _register_search.index_column and i.indisunique and not i.indimmediate) then
    raise exception 'a unique constraint on % is deferrable', quote_ident(index_column) using errcode = 'invalid_parameter_value',
      hint = 'It would not see a row that stands on another key version: make it NOT DEFERRABLE.';
  end if;
  select array_agg(a.attname order by p.rank) into v_names
  from rekey._column_shape(v_protected.id) s
  cross join lateral unnest(v_protected.places) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.place];
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_index_place from rekey._column_places(target, v_names, index_column) s;
  update rekey.protected_columns c
  set places = v_places, index_place = v_index_place, index_column = _register_search.index_column, normalization = _register_search.normalization
  where c.id = v_protected.id returning * into v_protected;
  statements := rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._register_search is 'What rekey.make_searchable() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._register_search to rekey_admin;

create or replace function rekey._finish_search(id integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_keyring text;
  v_active integer;
  v_versions integer[];
  v_others bigint;
  v_new boolean;
  v_rotation bigint;
begin
  select * into v_protected from rekey.protected_columns c where c.id = _finish_search.id;
  perform rekey._refuse_stranger((rekey._column_shape(id)).relation);
  -- To make a trigger has locked out who writes.
  select array_agg(distinct c.version) filter (where c.keyring_id = v_protected.keyring_id and c.version > 0), sum(c.rows) filter (where c.keyring_id <> v_protected.keyring_id)
  into v_versions, v_others
  from rekey._count_rows(rekey._targets_now(v_protected.label), null) c;
  if v_others > 0 then
    raise exception '% rows of % are sealed with other keyrings than its own', v_others, v_protected.label using errcode = 'RK005',
      hint = 'A searchable column holds one keyring: write their values anew.';
  end if;
  select k.version into v_active from rekey.encryption_keys k where k.keyring_id = v_protected.keyring_id and k.state = 'active';
  if not found then
    raise exception 'the keyring is retired' using errcode = 'RK006';
  end if;
  v_new := not exists (select from rekey._blind_indexes b where b.column_id = _finish_search.id);
  insert into rekey._blind_indexes as b (column_id, versions, changed_in, text_version)
  values (v_protected.id, array_remove(coalesce(v_versions, '{}'), v_active) || v_active, pg_current_xact_id(), rekey._text_version(v_protected.normalization))
  on conflict (column_id) do update set refill = true, refill_by = null, text_version = excluded.text_version;
  v_keyring := rekey._keyring_name(v_protected.keyring_id);
  -- One that is under way takes it along.
  if not exists (select from rekey.rotations r where r.keyring_id = v_protected.keyring_id and rekey._is_under_way(r.state) and not r.in_line) then
    v_rotation := rekey._queue_sweep(v_protected.keyring_id, 'search', format('the blind index of %s is filled', v_protected.label));
  end if;
  perform rekey._audit_all(jsonb_build_array(jsonb_build_object('event', case when v_new then 'column.searchable' else 'column.refilled' end, 'keyring', v_keyring,
      'details', jsonb_build_object('column', v_protected.label, 'index_column', v_protected.index_column, 'normalization', v_protected.normalization)))
    || case when v_rotation is null then '[]' else jsonb_build_array(jsonb_build_object('event', 'rotation.requested', 'keyring', v_keyring, 'version', v_active,
      'rotation_id', v_rotation, 'details', jsonb_build_object('trigger', 'search', 'column', v_protected.label))) end);
end
$$;
comment on function rekey._finish_search is 'Notes which versions the index values of a searchable column may stand on, and has a worker fill the index. RK005: rows of other keyrings; RK006: its keyring is retired.';
grant execute on function rekey._finish_search to rekey_admin;

create or replace function rekey.make_searchable(target regclass, column_name name, index_column name = null, normalization text = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_index name := coalesce(index_column, (
    select a.index_column from rekey.column_status a where a.relation = target and a.column_name = make_searchable.column_name), left(column_name, 58) || '_bidx');
  v_made record;
  v_statement text;
  v_label text;
  v_distinct double precision;
begin
  if not exists (select from pg_attribute a where a.attrelid = target and a.attname = v_index and not a.attisdropped) then
    execute format('alter table %s add column %I bytea', target, v_index);
  end if;
  select * into v_made from rekey._register_search(target, column_name, v_index, coalesce(normalization, (
    select s.normalization from rekey.column_status s where s.relation = target and s.column_name = make_searchable.column_name), 'exact'));
  foreach v_statement in array v_made.statements loop
    execute v_statement;
  end loop;
  v_label := rekey._finish_column(v_made.id);
  perform rekey._finish_search(v_made.id);
  -- (Before an adoption, as ANALYZE saw the plain values.)
  select case when s.n_distinct < 0 then -s.n_distinct * c.reltuples else s.n_distinct end into v_distinct
  from pg_stats s join pg_class c on c.oid = target join pg_namespace n on n.oid = c.relnamespace
  where s.schemaname = n.nspname and s.tablename = c.relname and s.attname = make_searchable.column_name and c.reltuples >= 1000;
  if v_distinct < 1000 then
    raise warning '%.% has about % different values', target, quote_ident(column_name), round(v_distinct)
      using hint = 'Equal values have equal index values: whoever reads the table can count them, and tell which is which where he knows how frequent each is.';
  end if;
  raise notice 'once the index is filled: where %.% = any (rekey.search(%, ...))', target, quote_ident(v_index), quote_literal(v_label)
    using detail = format(
      'For PostgREST, the value and the query in one call: create function %s(value text) returns setof %s language sql stable as $q$ select t.* from %2$s t where t.%I = any (rekey.search(%L, value)) $q$;',
      (select format('%I.%I', n.nspname, left(c.relname || '_by_' || make_searchable.column_name, 63)) from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target),
      target, v_index, v_label);
  return format('create index concurrently on %s (%I)', target, v_index);
end
$$;
comment on function rekey.make_searchable is
  'Makes a protected column searchable by equality, and returns the statement that makes its index (with unique, where values are to be so). A worker fills the index column, online, as it works on a rotation; until then rekey.search() refuses. The owner of the table calls it, as a member of rekey_admin, or a superuser. index_column: bytea; NULL, the default: <column>_bidx; it is added where it is not there. normalization: what is taken for equal: exact (the text in NFC; the default), lower (and lower() of the database), trim_lower (and no white space around it), digits (its ASCII digits). Repeated, it has the index filled anew: after an update of the collation or of Unicode. 22023: column or normalization cannot be; 25001: not in READ COMMITTED; 42501: not the owner; RK005: blocked, or rows of other keyrings; RK006: no encrypt_on_write, or searchable in another way; RK007: not protected.';
grant execute on function rekey.make_searchable to rekey_admin;

create or replace function rekey._unfilled(keyring_id integer, rotation_id bigint) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- What was normalized by other tables than those of now is looked at again, all of it.
  update rekey._blind_indexes b set refill = true, refill_by = null, text_version = rekey._text_version(c.normalization)
  from rekey.protected_columns c
  where c.id = b.column_id and c.keyring_id = _unfilled.keyring_id and b.text_version <> rekey._text_version(c.normalization);
  return (
    select min(c.label) from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id
    where c.keyring_id = _unfilled.keyring_id and b.refill and b.refill_by is distinct from rotation_id);
end
$$;
comment on function rekey._unfilled is 'A searchable column of the keyring whose rows this rotation has yet to look at, for its index; NULL: none.';

create or replace function rekey._complete_indexes(keyring_id integer, rotation_id bigint, counted jsonb) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._blind_indexes b
  set filled = true, refill = false, refill_by = null,
      versions = array(
        select distinct n.version from jsonb_to_recordset(counted) as n(target text, version integer) where n.target = c.label
        union
        select k.version from rekey.encryption_keys k where k.keyring_id = c.keyring_id and k.state = 'active'
        order by 1)
  from rekey.protected_columns c
  where c.id = b.column_id and c.keyring_id = _complete_indexes.keyring_id;
end;
comment on function rekey._complete_indexes is 'Notes, as a rotation completes, on which versions index values stand: those that were counted, and the active one. counted: objects with target and version.';

create or replace function rekey._refill(
  rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], indexes bytea[], normalization text,
  out made_rows tid[], out starts bytea[], out made_indexes bytea[], out made_keyrings integer[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- as rekey._reencrypt()
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)) into v_keyrings, v_versions
  from unnest(v_headers) as h(header);
  -- The version stays in use while the batch is not committed.
  perform pg_advisory_xact_lock_shared(u.keyring_id, u.version) from unnest(v_keyrings, v_versions) as u(keyring_id, version);
  select array_agg(o.row), array_agg(substr(o.ciphertext, 1, 27)), array_agg(o.made), array_agg(o.keyring_id)
  into made_rows, starts, made_indexes, made_keyrings
  from (
    select u.*, case when rekey._is_authentic(u.key, u.iv, u.sealed, u.aad)
      then rekey._index_value(u.version, u.index_key, rekey._normalized(rekey._decipher(u.key, u.iv, u.sealed), _refill.normalization)) end as made
    from (
      select c.row, c.ciphertext, c.index, k.keyring_id, k.version, k.key, k.index_key,
        substr(c.ciphertext, 12, 16) as iv, substr(c.ciphertext, 28) as sealed, k.header || prefix || c.context as aad
      from unnest(rows, ciphertexts, contexts, indexes) as c(row, ciphertext, context, index)
      join (
        select d.keyring_id, d.version, d.key, rekey._header(d.keyring_id, d.version) as header, rekey._index_key(d.key, v_info) as index_key
        from rekey._deks(v_keyrings, v_versions, sweeping => true) d where d.key is not null
        offset 0
      ) k on k.header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
      offset 0
    ) u
    offset 0
  ) o
  where o.made is distinct from o.index and o.made is not null;
end
$$;
comment on function rekey._refill is
  'The index values of envelopes that have another one, or none, each under the version of its envelope: made_indexes of made_rows. What does not open is left to the verification. prefix: the label of the column.';

create or replace function rekey._refill_failed(targets text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey._blind_indexes b set refill = true, refill_by = null
  from rekey.protected_columns c where c.id = b.column_id and c.label = any (targets);
end
$$;
comment on function rekey._refill_failed is 'Has the next pass look at every row of these targets, where they are searchable: the index value of one was wrong, and is to be mended.';

create or replace function rekey._index_findings(protected rekey.protected_columns)
returns table (kind text, severity text, finding text, advice text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_shape record;
  v_again text := format('rekey.make_searchable(%L, %L), or pg-rekey columns search, has a worker fill it anew.', protected.relation_name, protected.column_name);
  v_index rekey._blind_indexes;
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if protected.index_place is null or v_shape.relation is null then
    return;
  end if;
  select * into v_index from rekey._blind_indexes b where b.column_id = protected.id;
  return query
    select f.kind, f.severity, f.finding, f.advice
    from (values
      (v_index.filled is not true and not exists (select from rekey.rotations r where r.keyring_id = protected.keyring_id and rekey._is_under_way(r.state)),
        'index', 'warning', 'its blind index is not filled, and nobody fills it', v_again),
      (v_index.text_version <> rekey._text_version(protected.normalization), 'index', 'critical',
        'Unicode, or the collation of the database, is not as it was when its blind index was filled: equal values may not be found', v_again),
      (not exists (
        select from pg_index i where i.indrelid = v_shape.relation and i.indisvalid and i.indkey[0] = v_shape.attnums[protected.index_place]),
        'index', 'warning', format('no index begins with %I: a search reads the whole table', protected.index_column),
        format('create index concurrently on %s (%I)', v_shape.relation, protected.index_column)),
      (exists (
        select from pg_index i
        where i.indrelid in (select v_shape.relation union select h from rekey._relations_here(v_shape.relation) h) and i.indisunique and not i.indimmediate
          and exists (select from pg_attribute a where a.attrelid = i.indrelid and a.attname = protected.index_column and a.attnum = any (i.indkey::smallint[]))),
        'index', 'critical', format('a unique constraint on %I is deferrable: it does not see a row that stands on another key version', protected.index_column),
        'Make it NOT DEFERRABLE.'),
      (exists (
        select from rekey._index_bodies(protected, v_shape.relation, v_shape.attnums) b
        where b.language <> 'sql' and not exists (
          select from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = b.name and p.prosrc = b.body)),
        'index', 'warning', 'the functions of its blind index are not as this version of pg_rekey makes them, or a column was renamed', v_again)
    ) as f(found, kind, severity, finding, advice)
    where f.found;
end
$$;
comment on function rekey._index_findings is 'What is not as it should be with the blind index of a searchable column: not filled, stale, without an index, a deferrable constraint, functions that are behind.';

-- sql/code/60_rotate.sql
-- Beginning a rotation: a new version, active at once; the rows follow (61_engine.sql).

-- What a step is at work in nobody sees before it commits, but its locks: the relation that it has in hand, and since when
-- (in seconds, from a time on that leaves room in an int4). Nobody takes them exclusively, so nobody waits.
create or replace function rekey._take_in_hand(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_oid bigint := relation::oid;
begin
  perform pg_advisory_xact_lock_shared(-1, (case when v_oid < 2147483648 then v_oid else v_oid - 4294967296 end)::integer);
  perform pg_advisory_xact_lock_shared(-2, (extract(epoch from clock_timestamp())::bigint - 1700000000)::integer);
end
$$;
comment on function rekey._take_in_hand is 'Shows until the end of the transaction that this session is at work in a relation, for rekey._steps_in_hand().';

create or replace function rekey._steps_in_hand() returns table (pid integer, relation oid, since timestamptz, hangs boolean, overdue boolean)
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select r.pid, r.objid, b.since, clock_timestamp() - b.since > rekey._step_limit() / 10, clock_timestamp() - b.since > rekey._step_limit()
  from pg_locks r
  join pg_locks t on t.pid = r.pid and t.database = r.database and t.locktype = 'advisory' and t.objsubid = 2 and t.classid = 4294967294 and t.granted
  cross join lateral (select to_timestamp(t.objid::bigint + 1700000000) as since) b
  where r.locktype = 'advisory' and r.objsubid = 2 and r.classid = 4294967295 and r.granted
    and r.database = (select d.oid from pg_database d where d.datname = current_database());
end;
comment on function rekey._steps_in_hand is
  'The sessions that have a batch in hand: in which relation, and since when. hangs: for a tenth of step_limit; overdue: for all of it.';
grant execute on function rekey._steps_in_hand to rekey_admin, rekey_operator, rekey_auditor;

-- What notes a blocker may not see when its transaction began; whoever reads this may.
create or replace function rekey._with_ages(blockers jsonb, since timestamptz) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_agg(case when b.blocker ? 'pid' then (b.blocker - 'age_seconds') || jsonb_strip_nulls(jsonb_build_object(
    'age_seconds', extract(epoch from clock_timestamp() - a.xact_start)::bigint)) else b.blocker end order by b.place)
  from jsonb_array_elements(blockers) with ordinality as b (blocker, place)
  left join pg_stat_activity a on a.pid = (b.blocker ->> 'pid')::integer and a.usename = b.blocker ->> 'role' and a.xact_start < since;
end;
comment on function rekey._with_ages is 'Blockers, noted since then, with the age in seconds of their transactions; without it where the caller may not see it.';
grant execute on function rekey._with_ages to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.rotation_status as
select r.id, k.name as keyring, k.tenant_id, r.state, r.trigger, r.from_versions, r.to_version, r.rows_total, r.rows_done, r.rows_failed,
  r.attempts, r.last_error,
  coalesce(r.next_attempt_at, case when r.attempts > 0 then (
    select min(c.next_attempt_at) from rekey._chunks c where c.pass_id = r.pass_id and c.attempts > 0 and not c.stuck) end) as next_attempt_at,
  coalesce(rekey._with_ages(r.blocked_by, r.blocked_since), h.steps, case when r.in_line then (
    select jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('rotation', o.id, 'state', o.state, 'adopts', q.label)))
    from rekey.rotations o left join rekey.protected_columns q on q.id = o.column_id
    where o.keyring_id = r.keyring_id and o.state in ('queued', 'running', 'paused', 'verifying', 'failed') and not o.in_line) end) as blocked_by, r.reason, r.requested_by, r.created_at, r.started_at, r.finished_at,
  p.label as adopts, r.formats, r.forced, r.unwrap,
  case when r.state = 'verifying' and r.verification_id is not null then (
    select coalesce(sum(c.until_block - split_part(trim(c.first::text, '()'), ',', 1)::bigint), 0)::bigint from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')
  end as blocks_to_verify,
  w.pace, w.gives_way_to
from rekey.rotations r
join rekey.keyrings k on k.id = r.keyring_id
left join rekey.protected_columns p on p.id = r.column_id
left join lateral (
  select c.pace, c.gives_way_to from rekey._chunks c where c.pass_id in (r.pass_id, r.verification_id) order by c.pace, c.id limit 1
) w on r.state in ('running', 'verifying')
left join (
  select u.id, jsonb_agg(distinct jsonb_build_object('pid', s.pid, 'target', d.target, 'relation', d.relation::text,
    'age_seconds', extract(epoch from clock_timestamp() - s.since)::bigint)) as steps
  from rekey._steps_in_hand() s
  join rekey._due d on d.relation = s.relation
  cross join unnest(d.rotations) as u(id)
  where s.hangs
  group by u.id) h on h.id = r.id and r.state = 'running';
comment on view rekey.rotation_status is 'Every rotation and how far it is.';
comment on column rekey.rotation_status.id is 'Number of the rotation.';
comment on column rekey.rotation_status.keyring is 'Keyring that is rotated.';
comment on column rekey.rotation_status.tenant_id is 'Tenant of the keyring.';
comment on column rekey.rotation_status.state is 'queued, running, paused, verifying, failed (these are under way), completed, completed_with_failures, rolled_back, superseded.';
comment on column rekey.rotation_status.trigger is 'Why: manual, schedule, compromise, rollback, adoption, search (a blind index is filled).';
comment on column rekey.rotation_status.from_versions is 'Versions whose rows it takes along.';
comment on column rekey.rotation_status.to_version is 'Version it brings them to.';
comment on column rekey.rotation_status.rows_total is 'Rows to re-encrypt; NULL until they are counted.';
comment on column rekey.rotation_status.rows_done is 'Rows re-encrypted.';
comment on column rekey.rotation_status.rows_failed is 'Rows in quarantine: rekey.failure_status names them.';
comment on column rekey.rotation_status.attempts is 'Failed attempts in a row, of the batch that fails.';
comment on column rekey.rotation_status.last_error is 'The last error.';
comment on column rekey.rotation_status.next_attempt_at is 'It goes on after this time; NULL: at once.';
comment on column rekey.rotation_status.blocked_by is 'What it waits for: open transactions (pid, role, age_seconds: since they began; not there where who reads this may not see it in pg_stat_activity), prepared ones (prepared, age_seconds), snapshots from before a version became active, where a column is searchable (pid, role, snapshot, age_seconds), rows (rows, why), columns (target, why), the rotation of its keyring that comes before (rotation, state, adopts), tables in which a step fails (target, relation, error, sqlstate), or in which it hangs (pid, target, relation, age_seconds).';
comment on column rekey.rotation_status.reason is 'What whoever asked for it said.';
comment on column rekey.rotation_status.requested_by is 'Who asked for it: a role; before it, through PostgREST or the HTTP API, the subject of the JWT or the name of the token.';
comment on column rekey.rotation_status.created_at is 'When it was asked for; from then on new values are encrypted with to_version.';
comment on column rekey.rotation_status.started_at is 'When the first row was looked at.';
comment on column rekey.rotation_status.finished_at is 'When it ended.';
comment on column rekey.rotation_status.adopts is 'Protected column that it adopts; NULL for other rotations.';
comment on column rekey.rotation_status.formats is 'As what its values may be taken; NULL for other rotations.';
comment on column rekey.rotation_status.forced is 'Whether values that look like another format are taken for plaintext.';
comment on column rekey.rotation_status.unwrap is 'What the client takes off opened values: json, php, pickle; NULL: nothing.';
comment on column rekey.rotation_status.blocks_to_verify is 'Blocks of large tables that its verification has yet to look at; NULL: none has begun.';
comment on column rekey.rotation_status.pace is 'Part of the time that its workers work, for the rest they pause: 1 at full speed, at least the setting min_pace. NULL: they do not work on it.';
comment on column rekey.rotation_status.gives_way_to is 'To whom they give way so; NULL: to nobody.';
grant select on rekey.rotation_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._is_under_way(state text) returns boolean
language sql immutable parallel safe
return state in ('queued', 'running', 'paused', 'verifying', 'failed');
comment on function rekey._is_under_way is 'Whether a rotation in this state still has work to do.';

create or replace function rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer = null) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint;
begin
  insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
  select a.keyring_id,
    array(select k.version from rekey.encryption_keys k
          where k.keyring_id = a.keyring_id and k.version <> a.version and k.state <> 'destroyed' order by k.version),
    a.version, _queue_sweep.previous_version, _queue_sweep.trigger, _queue_sweep.reason, rekey._requester()
  from rekey.encryption_keys a
  where a.keyring_id = _queue_sweep.keyring_id and a.state = 'active'
  returning id into v_id;
  return v_id;
end
$$;
comment on function rekey._queue_sweep is 'Queues a rotation that brings every row of a keyring to its active version. The caller holds the row of the keyring.';

create or replace function rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) returns setof bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_due integer[];
  v_from integer[];
  v_to integer[];
  v_rotations bigint[];
begin
  if keyrings = '{}' then
    return;
  end if;
  perform rekey._lock_kek();
  perform from rekey.keyrings k where k.id = any (keyrings) order by k.id for no key update;
  if supersede then
    perform from rekey.rotations r where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line order by r.id for no key update;
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line;
  end if;
  select array_agg(k.id order by k.id), array_agg(a.version order by k.id),
    array_agg((select max(m.version) + 1 from rekey.encryption_keys m where m.keyring_id = k.id) order by k.id)
  into v_due, v_from, v_to
  from rekey.keyrings k
  join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
  where k.id = any (keyrings) and k.retired_at is null
    and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line);
  if v_due is null then
    return;
  end if;

  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = any (v_due) and k.state = 'active';
  perform rekey._new_keys(v_due, v_to);
  perform rekey._activate_in_indexes(v_due, v_to);
  -- A transaction with an older snapshot must not pass by a rotation: it fails on this row (40001).
  update rekey.keyrings k set rotated_at = now() where k.id = any (v_due);
  with queued as (
    insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
    select d.keyring_id,
      array(select k.version from rekey.encryption_keys k
            where k.keyring_id = d.keyring_id and k.version <> d.to_version and k.state <> 'destroyed' order by k.version),
      d.to_version, d.from_version, _rotate.trigger, _rotate.reason, rekey._requester()
    from unnest(v_due, v_from, v_to) as d(keyring_id, from_version, to_version)
    returning id, keyring_id
  )
  select array_agg(q.id order by q.keyring_id) into v_rotations from queued q;
  perform rekey._audit_all((
    select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', e.version, 'rotation_id', e.rotation_id,
                                        'details', e.details) order by d.place, e.place)
    from unnest(v_due, v_from, v_to, v_rotations) with ordinality as d(keyring_id, from_version, to_version, rotation_id, place)
    join rekey.keyrings k on k.id = d.keyring_id
    join rekey.rotations r on r.id = d.rotation_id
    cross join lateral (values
      (1, 'rotation.requested', d.to_version, r.id,
        jsonb_strip_nulls(jsonb_build_object('trigger', r.trigger, 'reason', r.reason, 'from_versions', r.from_versions, 'supersede', nullif(_rotate.supersede, false)))),
      (2, 'key.created', d.to_version, r.id, '{}'::jsonb),
      (3, 'key.deactivated', d.from_version, r.id, '{}'),
      (4, 'key.activated', d.to_version, r.id, '{}')
    ) as e(place, event, version, rotation_id, details)));
  return query select r.id from unnest(v_rotations) as r(id);
end
$$;
comment on function rekey._rotate is
  'Makes and activates the next version of each of these keyrings and queues their rotations, whose numbers it returns. Keyrings under way are left out unless supersede.';

create or replace function rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_passed_by jsonb;
  v_said text;
begin
  with passed_by as (
    select k.name, r.id, r.to_version, row_number() over (order by r.id) as place
    from rekey.rotations r
    join rekey.keyrings k on k.id = r.keyring_id
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line and r.id <> all (begun)
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.passed_by', 'keyring', p.name, 'version', p.to_version, 'rotation_id', p.id,
                                      'details', jsonb_strip_nulls(jsonb_build_object('reason', _note_passed_by.reason))) order by p.place),
    string_agg(format('%L (rotation %s)', p.name, p.id), ', ' order by p.place) filter (where p.place <= 10)
      || case when count(*) > 10 then format(' and %s more', count(*) - 10) else '' end
  into v_passed_by, v_said
  from passed_by p;
  if v_passed_by is not null then
    perform rekey._audit_all(v_passed_by);
    raise warning 'no new version, as a rotation is under way: %', v_said using errcode = 'RK004',
      hint = 'Let new ones take their rows along: supersede => true.', constraint = 'supersede';
  end if;
end
$$;
comment on function rekey._note_passed_by is
  'Says which of these keyrings got no new version, as a rotation is under way that is none of those begun: a warning, and an entry with the reason in the audit log of each. The caller holds the rows of the keyrings.';

create or replace function rekey.rotate_keys(keyring text = null, reason text = null, supersede boolean = false)
returns setof rekey.rotation_status
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_ids integer[];
  v_new bigint[];
  v_rotation bigint;
begin
  perform rekey._refuse_hidden();
  if keyring is not null then
    v_keyring := rekey._keyring(keyring);
    if v_keyring.retired_at is not null then
      raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
    end if;
    v_ids := array[v_keyring.id];
  else
    v_ids := array(select k.id from rekey.keyrings k where k.retired_at is null);
  end if;
  v_new := array(select r from rekey._rotate(v_ids, 'manual', reason, coalesce(supersede, false)) r);
  if keyring is null then
    perform rekey._note_passed_by(v_ids, v_new, reason);
  elsif v_new = '{}' then
    select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line;
    raise exception 'keyring % is under way in rotation %', quote_literal(keyring), v_rotation using errcode = 'RK004',
      hint = 'Wait for it, or let this one take its rows along: supersede => true.', constraint = 'supersede';
  end if;
  return query
    select s.* from rekey.rotation_status s
    where s.id = any (v_new)
       or rotate_keys.keyring is null and s.id in (select r.id from rekey.rotations r where rekey._is_under_way(r.state) and not r.in_line)
    order by s.id;
end
$$;
comment on function rekey.rotate_keys is
  'Rotates: makes a new version of the keyring, active from now on, and queues the re-encryption of its rows, which the worker does. Returns at once. keyring NULL: every keyring; one under way gets no new version: its rotation is returned as it is (created_at is before now()), a warning names it, and the audit log has the reason in rotation.passed_by. reason: for the audit log. supersede: also where a rotation is under way, whose rows this one takes along; an adoption under way has to be asked for again, those in line come after. RK001, RK002: KEK; RK004: under way; RK005: a table of pg_rekey''s may hide rows; RK006: retired; RK007: no such keyring.';
grant execute on function rekey.rotate_keys to rekey_admin;

create or replace function rekey._rotation(id bigint) returns rekey.rotations
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id;
  if not found then
    raise exception 'no such rotation: %', coalesce(id::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.rotation_status.', constraint = 'rotations';
  end if;
  -- The keyring first, as everywhere.
  perform from rekey.keyrings k where k.id = v_rotation.keyring_id for no key update;
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id for update;
  return v_rotation;
end
$$;
comment on function rekey._rotation is 'A rotation, its row and that of its keyring locked. RK007: there is none.';

create or replace function rekey.pause_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('queued', 'running', 'verifying') then
    raise exception 'rotation % is %: it cannot be paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'paused', pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = pause_rotation.id;
  perform rekey._audit('rotation.paused', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.pause_rotation is
  'Pauses the re-encryption; the batch in hand still ends. The new version stays active, and everything readable. RK006: not under way; RK007: no such rotation.';
grant execute on function rekey.pause_rotation to rekey_admin;

create or replace function rekey.resume_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state <> 'paused' then
    raise exception 'rotation % is %, not paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'queued' where r.id = resume_rotation.id;
  perform rekey._audit('rotation.resumed', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.resume_rotation is 'Lets a paused rotation go on. RK006: it is not paused; RK007: no such rotation.';
grant execute on function rekey.resume_rotation to rekey_admin;

create or replace function rekey._refuse_over(rotation rekey.rotations) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (No other takes along what an adoption left. One that waited in line may be under way after one with a higher number.)
  if rotation.trigger <> 'adoption' and exists (
       select from rekey.rotations r
       where r.keyring_id = rotation.keyring_id and r.id <> rotation.id and not r.in_line
         and (r.id > rotation.id or rekey._is_under_way(r.state))) then
    raise exception 'rotation % is not the last one of its keyring', rotation.id using errcode = 'RK006',
      hint = 'A later one takes its rows along; an adoption that is under way has to end first.';
  end if;
  if exists (select from rekey.keyrings k where k.id = rotation.keyring_id and k.retired_at is not null) then
    raise exception 'the keyring of rotation % is retired', rotation.id using errcode = 'RK006';
  end if;
end
$$;
comment on function rekey._refuse_over is 'RK006 where nothing comes of a rotation any more: the keyring has a later one, or is retired; or where another is under way.';

create or replace function rekey.retry_rotation(id bigint) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('failed', 'completed_with_failures') then
    raise exception 'rotation % is %: there is nothing to retry', id, v_rotation.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_over(v_rotation);
  perform rekey._refill_failed(array(select f.target from rekey.rotation_failures f where f.rotation_id = retry_rotation.id and f.resolved_at is null and f.sqlstate is null));
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = 'retry', resolved_by = rekey._requester()
  where f.rotation_id = retry_rotation.id and f.resolved_at is null;
  update rekey.rotations r
  set state = 'queued', attempts = 0, rows_failed = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
  where r.id = retry_rotation.id;
  perform rekey._audit('rotation.retried', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;
comment on function rekey.retry_rotation is
  'Lets a failed rotation go on where it stopped, or tries the rows again that a completed one left in quarantine. RK006: neither failed nor with failures, or not the last one of its keyring; RK007: no such rotation.';
grant execute on function rekey.retry_rotation to rekey_admin;

create or replace function rekey.rollback_rotation(id bigint, reason text = null) returns setof rekey.rotation_status
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation rekey.rotations;
  v_old rekey.encryption_keys;
  v_new bigint;
begin
  v_rotation := rekey._rotation(id);
  perform rekey._refuse_over(v_rotation);
  if v_rotation.previous_version is null or v_rotation.trigger = 'compromise'
     or v_rotation.state in ('rolled_back', 'superseded') then
    raise exception 'rotation % cannot be rolled back: % after %', id, v_rotation.state, v_rotation.trigger
      using errcode = 'RK006';
  end if;
  v_old := rekey._key(v_rotation.keyring_id, v_rotation.previous_version);
  if v_old.state <> 'decrypt_only' then
    raise exception 'version % is %: it cannot become active again', v_old.version, v_old.state using errcode = 'RK006';
  end if;
  if (select e.state from rekey.keks e where e.id = v_old.kek_id) = 'lost' then
    raise exception 'version % is wrapped under a KEK that is lost', v_old.version using errcode = 'RK006';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = v_old.keyring_id and k.state = 'active';
  update rekey.encryption_keys k set state = 'active', activated_at = now() where k.id = v_old.id;
  perform rekey._activate_in_indexes(array[v_old.keyring_id], array[v_old.version]);
  update rekey.keyrings k set rotated_at = now() where k.id = v_old.keyring_id;
  update rekey.rotations r
  set state = 'rolled_back', finished_at = coalesce(r.finished_at, now()), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = rollback_rotation.id;
  v_new := rekey._queue_sweep(v_old.keyring_id, 'rollback', reason);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'rotation.rolled_back', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version,
      'rotation_id', id, 'details', jsonb_strip_nulls(jsonb_build_object('reason', reason))),
    jsonb_build_object('event', 'key.deactivated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version, 'rotation_id', v_new),
    jsonb_build_object('event', 'key.activated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new),
    jsonb_build_object('event', 'rotation.requested', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new,
      'details', jsonb_build_object('trigger', 'rollback', 'rolls_back', id))));
  return query select s.* from rekey.rotation_status s where s.id = v_new;
end
$$;
comment on function rekey.rollback_rotation is
  'Makes the version before active again, at once, and queues the rotation back, which it returns. Everything stays readable. RK006: not the last rotation of its keyring, after a compromise, or the version before is no longer decrypt_only; RK007: no such rotation.';
grant execute on function rekey.rollback_rotation to rekey_admin;

create or replace function rekey.mark_key_compromised(keyring text, version integer, reason text = null) returns setof rekey.rotation_status
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_rotation bigint;
  v_event text;
begin
  if exists (select from rekey.keyrings k join rekey.encryption_keys e on e.keyring_id = k.id
             where k.name = keyring and e.version = mark_key_compromised.version and e.state = 'active') then
    perform rekey._lock_kek();  -- before the row of the keyring, as everywhere
  end if;
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('active', 'decrypt_only') then
    raise exception 'version % is %, only an active or decrypt_only one can be marked', version, v_key.state using errcode = 'RK006';
  end if;
  if v_key.state = 'active' then
    select r into v_rotation from rekey._rotate(array[v_keyring.id], 'compromise', reason, true) r;
    v_key := rekey._key(v_keyring.id, version);
  else
    -- An adoption takes no envelopes along: it has to be asked for again. Those in line wait for this one.
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line and r.trigger = 'adoption';
    -- Any other that is under way takes the rows along, and does not wait any longer, whatever it was.
    update rekey.rotations r
    set trigger = 'compromise', attempts = 0, next_attempt_at = null,
        state = case when r.state in ('paused', 'failed') then 'queued' else r.state end
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line
    returning r.id into v_rotation;
    v_event := 'rotation.resumed';
    if not found and v_keyring.retired_at is null then
      v_rotation := rekey._queue_sweep(v_keyring.id, 'compromise', reason);
      v_event := 'rotation.requested';
    end if;
    update rekey._chunks c set urgent = true, attempts = 0, next_attempt_at = null, stuck = false
    where c.id in (
      select d.id from rekey._chunks d
      where d.pass_id = (select r.pass_id from rekey.rotations r where r.id = v_rotation)
      for update skip locked);  -- whoever has one in hand waits for the rotation's row
  end if;
  perform rekey._move_key(v_key, 'compromised', 'key.compromised', reason);
  if v_event is not null and v_rotation is not null then
    perform rekey._audit(v_event, keyring, (rekey._active_versions(array[v_keyring.id]))[1], v_rotation,
      jsonb_build_object('trigger', 'compromise', 'reason', reason));
  end if;
  return query select s.* from rekey.rotation_status s where s.id = v_rotation;
end
$$;
comment on function rekey.mark_key_compromised is
  'Marks a version compromised: it still opens, and never encrypts again. Its rows are re-encrypted by the rotation that is returned; an active version is replaced in the same transaction, superseding a rotation under way. An adoption under way is superseded in any case: repeat it; those in line come after. RK001, RK002: KEK; RK006: neither active nor decrypt_only; RK007: there is none.';
grant execute on function rekey.mark_key_compromised to rekey_admin;

create or replace function rekey._replace_lost_keys(kek_id integer) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from rekey._rotate(
    array(select k.keyring_id from rekey.encryption_keys k where k.state = 'active' and k.kek_id = _replace_lost_keys.kek_id),
    'manual', format('KEK %s is lost', kek_id), true);
end
$$;
comment on function rekey._replace_lost_keys is 'Gives every keyring whose active version was wrapped under a lost KEK a new one.';

create or replace view rekey.failure_status as
select f.id, f.rotation_id, k.name as keyring, f.target, f.row_key, f.version, f.reason, f.created_at, f.resolved_at, f.resolution,
  f.resolved_by, f.resolve_reason, f.relation, f.sqlstate
from rekey.rotation_failures f
join rekey.keyrings k on k.id = f.keyring_id;
comment on view rekey.failure_status is 'The quarantine: rows that did not open, or that their table did not let a rotation change. resolution: NULL while it is open, then retry, discard, or cleared (the row opens again, or is gone).';
comment on column rekey.failure_status.id is 'Number of the entry.';
comment on column rekey.failure_status.rotation_id is 'Last rotation in which the row failed; NULL: the census found it, and no rotation has met it.';
comment on column rekey.failure_status.keyring is 'Keyring of the row.';
comment on column rekey.failure_status.target is 'Table as it was registered.';
comment on column rekey.failure_status.row_key is 'Primary key of the row, its parts separated by a slash.';
comment on column rekey.failure_status.version is 'Key version that the row names.';
comment on column rekey.failure_status.reason is 'Why it does not open, or the error with which its table refused the new value.';
comment on column rekey.failure_status.created_at is 'When that was noticed.';
comment on column rekey.failure_status.resolved_at is 'When the entry was closed.';
comment on column rekey.failure_status.resolution is 'How: retry, discard, or cleared; NULL: it is open.';
comment on column rekey.failure_status.resolved_by is 'Who closed it.';
comment on column rekey.failure_status.resolve_reason is 'What he said.';
comment on column rekey.failure_status.relation is 'Table or partition that the row is in.';
comment on column rekey.failure_status.sqlstate is 'SQLSTATE of that error; NULL: the row does not open.';
grant select on rekey.failure_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.resolve_failure(id bigint, action text, reason text = null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_failure rekey.rotation_failures;
  v_rotation rekey.rotations;
begin
  if action is null or action not in ('retry', 'discard') then
    raise exception 'action is retry or discard' using errcode = 'invalid_parameter_value';
  end if;
  select * into v_failure from rekey.rotation_failures f where f.id = resolve_failure.id;
  if not found then
    raise exception 'no such failure: %', coalesce(id::text, 'NULL') using errcode = 'RK007', hint = 'See rekey.failure_status.', constraint = 'failures';
  end if;
  -- What the census found is of no rotation.
  if v_failure.rotation_id is not null then
    v_rotation := rekey._rotation(v_failure.rotation_id);
  end if;
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = action, resolved_by = rekey._requester(), resolve_reason = resolve_failure.reason
  where f.id = resolve_failure.id and f.resolved_at is null;
  if not found then
    raise exception 'failure % is resolved already', id using errcode = 'RK006';
  end if;
  update rekey.rotations r set rows_failed = greatest(r.rows_failed - 1, 0) where r.id = v_failure.rotation_id;
  if action = 'retry' and v_failure.sqlstate is null then
    perform rekey._refill_failed(array[v_failure.target]);
  end if;
  if action = 'retry' and v_failure.rotation_id is not null and not exists (
       select from rekey.rotations r where r.keyring_id = v_failure.keyring_id and rekey._is_under_way(r.state) and not r.in_line) then
    perform rekey._refuse_over(v_rotation);
    update rekey.rotations r
    set state = 'queued', attempts = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
    where r.id = v_failure.rotation_id;
  end if;
  perform rekey._audit('rotation.failure_resolved', rekey._keyring_name(v_failure.keyring_id), v_failure.version, v_failure.rotation_id,
    jsonb_build_object('target', v_failure.target, 'row', v_failure.row_key, 'action', action, 'reason', reason));
end
$$;
comment on function rekey.resolve_failure is
  'Closes an entry of the quarantine. action: retry (the row is tried again; one that the census found, by the next one) or discard (it is given up; it is left as it is). 22023: another action; RK006: resolved already, or a retry in a rotation that is not the last one; RK007: there is none.';
grant execute on function rekey.resolve_failure to rekey_admin;

-- sql/code/61_engine.sql
-- The engine: sweeps, waits for writers, has the rows verified. One step is one transaction; any number of workers may step at once.
--
-- queued -> (plan) running: its keyring is due in a pass over the targets, split into chunks
-- running -> (sweep the chunks, batch by batch) verifying, once no chunk of the pass is left
-- verifying -> (barrier: no writer of an older version is left; then every row is opened: 61_verify.sql) completed,
--              or running again if rows moved behind the sweep

create or replace function rekey._lock_holders(keyring_id integer, versions integer[], since timestamptz = null) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
    'pid', l.pid, 'role', a.usename,
    'prepared', p.gid, 'age_seconds', extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared, since))::bigint)))
  from pg_locks l
  left join pg_stat_activity a on a.pid = l.pid
  -- A prepared transaction has no process; its locks share a virtual number with the lock on its own transaction.
  left join lateral (
    select x.gid, x.prepared from pg_locks t join pg_prepared_xacts x on x.transaction = t.transactionid
    where l.pid is null and t.pid is null and t.locktype = 'transactionid' and t.virtualtransaction = l.virtualtransaction) p on true
  where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.classid = keyring_id::oid and l.objid::bigint = any (versions::bigint[]);
end;
comment on function rekey._lock_holders is 'Who still writes with these versions. since: what counts as the beginning of a transaction whose own is hidden from us.';

create or replace function rekey._is_due(next_attempt_at timestamptz) returns boolean
language sql volatile
return next_attempt_at is null or not next_attempt_at between clock_timestamp() and clock_timestamp() + interval '10 minutes';
comment on function rekey._is_due is 'Whether a pause is over. None is as long as 10 minutes: a time beyond that was noted by a clock that was wrong.';

create or replace function rekey._barrier(keyring_id integer, versions integer[]) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_free boolean := true;
  v_version integer;
begin
  begin
    foreach v_version in array versions loop
      v_free := pg_try_advisory_xact_lock(keyring_id, v_version);
      exit when not v_free;
    end loop;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the locks back at once: nobody is to wait for them
  end;
  return v_free;
end
$$;
comment on function rekey._barrier is 'Whether no transaction is left that encrypts with one of these versions. They are no longer active: none can begin to.';

create or replace function rekey._waited_for(code text) returns interval
language sql immutable parallel safe
-- Whoever locks a table ends some time. A library that cannot be loaded has been replaced under the running server, until its restart.
return case code when '55P03' then interval '5 seconds' when '58P01' then interval '1 minute' end;
comment on function rekey._waited_for is 'After which pause to try again what an error with this SQLSTATE stopped, without counting an attempt; NULL: it counts.';

create or replace function rekey._record_error(rotations bigint[], message text, code text, target text = null, relation regclass = null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  -- A lock that is in the way of no relation is one of ours.
  v_pause interval := case when code <> '55P03' or target is not null then rekey._waited_for(code) end;
  v_events jsonb;
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = a.attempts, last_error = message,
        state = case when a.failed then 'failed' else r.state end,
        pass_id = case when not a.failed then r.pass_id end,
        next_attempt_at = case when not a.failed then
          clock_timestamp() + coalesce(v_pause, least(power(2, a.attempts - 1), 300) * interval '1 second') end,
        blocked_by = case when _record_error.target is not null then jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
          'target', _record_error.target, 'relation', _record_error.relation::text, 'error', message, 'sqlstate', code))) else r.blocked_by end,
        blocked_since = case when _record_error.target is not null then coalesce(r.blocked_since, now()) else r.blocked_since end
    from (
      select t.id, case when v_pause is null then t.attempts + 1 else greatest(t.attempts, 1) end as attempts,
        v_pause is null and t.attempts + 1 >= v_max as failed
      from rekey.rotations t where t.id = any (rotations)) a
    -- Not one that another worker's error has failed meanwhile.
    where a.id = r.id and r.state in ('queued', 'running', 'verifying')
    returning r.id, r.keyring_id, r.to_version, r.state, r.attempts
  )
  select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
    'details', jsonb_build_object('attempt', r.attempts, 'sqlstate', code, 'error', message)) order by r.id, e.event)
  into v_events
  from noted r
  join rekey.keyrings k on k.id = r.keyring_id
  join (values ('rotation.error'), ('rotation.failed')) as e(event) on e.event = 'rotation.error' or r.state = 'failed';
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._record_error is 'Notes an error of these rotations: the next attempt comes after a growing pause, and after max_attempts they are failed. target, relation: what it came from.';

create or replace function rekey._is_passing(code text) returns boolean
language sql immutable parallel safe
-- Connection, rollback, resources, state of other objects, operator, system; and what is damaged or ours.
return left(code, 2) = any ('{08,40,53,55,57,58,F0,XX}');
comment on function rekey._is_passing is 'Whether an error with this SQLSTATE says nothing of the row at which it came: it is tried again.';

create or replace function rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The innermost come first, and end where the function of the target is.
  v_functions text[] := array(
    select regexp_replace(f.found[1], ' line \d+ .*$', '')
    from regexp_matches(regexp_replace(context, '\mrekey(_targets)?"?\."?(_call_|column_|secrets_).*$', ''),
      '(?:PL/pgSQL function |SQL function ")([^"\n]*)', 'g') with ordinality as f(found, place)
    where f.found[1] not like 'rekey.%'
    order by f.place);
  v_path text := (select c.search_path from rekey.protected_columns c where c.label = target);
  v_function text;
  v_trigger name;
begin
  -- Without its schema, where the path of the sweep has that.
  select t.tgname, p.oid::regprocedure::text into v_trigger, v_function
  from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where t.tgrelid = relation and not t.tgisinternal and array[p.oid::regprocedure::text, quote_ident(p.proname) || '()'] && v_functions
  order by t.tgname limit 1;
  if split_part(v_functions[1], '.', 2) = '' and right(v_function, length(v_functions[1])) = v_functions[1] then
    v_functions[1] := v_function;
  end if;
  return format('%s: %s', relation,
    -- Of a row that is plain yet, the words of a table's own code may have the value in them.
    case when code = '55P03' then 'another session holds a lock that it waits for'
         when plain and left(code, 2) <> all ('{23,42,54,RK}') then 'an error of its own code' else rekey._cut(message, 500) end)
    || coalesce(' (trigger ' || quote_ident(v_trigger) || ')', '') || coalesce(', in ' || rekey._cut(v_functions[1], 200), '')
    || case when code in ('42P01', '42883', '42704', '3F000') then
      format('. A sweep runs it with search_path = %s: name it with its schema, %s, or give rekey.protect_column() or pg-rekey columns protect the path that it needs',
        coalesce(v_path, 'pg_catalog, pg_temp'),
        coalesce('ALTER FUNCTION ' || rekey._cut(v_functions[1], 200) || ' SET search_path = ...', 'give what the table calls a search path of its own')) else '' end;
end
$$;
comment on function rekey._explain_error is
  'An error in a table, as a target, in words: the table, the message, the trigger and function that it came from, and what to do where the search path is the cause. Bounded in length. plain: the column may hold plain values.';

create or replace function rekey._note_trouble(chunk rekey._chunks, message text, code text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  v_pause constant interval := rekey._waited_for(code);
  v_attempts integer := 0;
  v_ids bigint[];
  v_events jsonb;
begin
  -- Where nothing went through yet, it is not this chunk, but all of them.
  update rekey._chunks c
  set last_error = message,
      attempts = case when v_pause is null then c.attempts + 1 else greatest(c.attempts, 1) end,
      stuck = v_pause is null and c.attempts + 1 >= v_max,
      next_attempt_at = clock_timestamp() + coalesce(v_pause, least(power(2, c.attempts), 300) * interval '1 second')
  where c.id in (
    select d.id from rekey._chunks d
    where d.id = chunk.id or d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      and exists (select from rekey._due u where u.pass_id = d.pass_id and u.kind = d.kind and u.target = d.target and u.relation = d.relation and not u.passed)
    for update skip locked);
  select c.attempts into v_attempts from rekey._chunks c where c.id = chunk.id;
  v_ids := array(
    select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation);
  perform from rekey.rotations r where r.id = any (v_ids) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = v_attempts, last_error = message, blocked_since = coalesce(r.blocked_since, now()),
        blocked_by = jsonb_build_array(jsonb_build_object('target', chunk.target, 'relation', chunk.relation::text, 'error', message, 'sqlstate', code))
    where r.id = any (v_ids) and r.state = 'running' and r.pass_id = chunk.pass_id
    returning r.id, r.keyring_id, r.to_version
  ), numbered as (
    select n.*, count(*) over () as rotations, row_number() over (order by n.id) as place from noted n
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.error', 'keyring', k.name, 'version', n.to_version, 'rotation_id', n.id,
    'details', jsonb_build_object('attempt', v_attempts, 'sqlstate', code, 'error', message, 'target', chunk.target)
      || case when n.rotations > 20 then jsonb_build_object('rotations', n.rotations) else '{}' end) order by n.id)
  into v_events
  from numbered n join rekey.keyrings k on k.id = n.keyring_id
  where n.rotations <= 20 or n.place = 1;
  perform rekey._audit_all(coalesce(v_events, '[]'));
  perform rekey._fail_stuck(chunk.pass_id);
end
$$;
comment on function rekey._note_trouble is
  'Notes an error in a chunk of a sweep: its next attempt comes after a growing pause, after max_attempts it is stuck, and only rotations with rows in its relation have to do with it. (More than 20 have one audit entry together.)';

create or replace function rekey._unswept(pass_id bigint) returns table (rotation_id bigint, stuck boolean, last_error text)
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select u.id, bool_and(c.stuck), max(c.last_error) filter (where c.stuck)
  from (select c.kind, c.target, c.relation, bool_and(c.stuck) as stuck, max(c.last_error) as last_error
        from rekey._chunks c where c.pass_id = _unswept.pass_id group by c.kind, c.target, c.relation) c
  join rekey._due d on d.pass_id = _unswept.pass_id and d.kind = c.kind and d.target = c.target and d.relation = c.relation
  cross join unnest(d.rotations) as u(id)
  group by u.id;
end;
comment on function rekey._unswept is 'The rotations that a pass has chunks left for; stuck: none of them is tried any more.';

create or replace function rekey._fail_stuck(pass_id bigint) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stuck jsonb;
  v_events jsonb;
begin
  if not exists (select from rekey._chunks c where c.pass_id = _fail_stuck.pass_id and c.stuck) then
    return;
  end if;
  select jsonb_object_agg(u.rotation_id, u.last_error) into v_stuck from rekey._unswept(pass_id) u where u.stuck;
  perform from rekey.rotations r where v_stuck ? r.id::text order by r.id for no key update;
  with failed as (
    update rekey.rotations r
    set state = 'failed', pass_id = null, next_attempt_at = null, last_error = v_stuck ->> r.id::text
    where v_stuck ? r.id::text and r.state = 'running' and r.pass_id = _fail_stuck.pass_id
    returning r.id, r.keyring_id, r.to_version, r.attempts, r.last_error, r.blocked_by
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.failed', 'keyring', k.name, 'version', f.to_version, 'rotation_id', f.id,
    'details', jsonb_build_object('attempt', f.attempts, 'sqlstate', f.blocked_by -> 0 ->> 'sqlstate', 'error', f.last_error)) order by f.id)
  into v_events
  from failed f join rekey.keyrings k on k.id = f.keyring_id;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._fail_stuck is 'Fails the rotations of a pass of which nothing is left but what is stuck.';

create or replace function rekey._row_hash(row_key text) returns bytea
language sql immutable parallel safe
return sha256(replace(row_key, chr(92), chr(92) || chr(92))::bytea);
comment on function rekey._row_hash is 'What a row in quarantine is found by: its key may be longer than an index row. (A backslash is doubled for the cast.)';

create or replace function rekey._quarantine(
  target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[],
  codes text[] = null, verification_id bigint = null
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
-- Each row by the index: what the planner knows of this table is from before the batches that filled it.
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
  v_relation text := relation::text;
  v_events jsonb;
begin
  with found as materialized (
    select distinct on (f.keyring_id, h.hash) f.keyring_id, f.version, f.row_key, h.hash, f.problem, f.code, r.id as rotation_id,
      q.id, q.rotation_id as before
    from unnest(keyrings, versions, row_keys, problems, codes) as f(keyring_id, version, row_key, problem, code)
    cross join lateral (select rekey._row_hash(f.row_key) as hash offset 0) h
    join rekey.rotations r on r.keyring_id = f.keyring_id and rekey._is_under_way(r.state) and not r.in_line
    -- Known from an earlier rotation or pass.
    left join lateral (
      select q.id, q.rotation_id from rekey.rotation_failures q
      where q.keyring_id = f.keyring_id and q.target = _quarantine.target and q.relation = v_relation and q.row_hash = h.hash and q.resolved_at is null
      limit 1) q on true
  ), moved as (
    update rekey.rotation_failures q
    set rotation_id = f.rotation_id, version = f.version, reason = f.problem, sqlstate = f.code, verification_id = _quarantine.verification_id
    from found f where q.id = f.id
  ), added as (
    insert into rekey.rotation_failures (rotation_id, keyring_id, target, relation, row_key, version, reason, sqlstate, verification_id)
    select f.rotation_id, f.keyring_id, _quarantine.target, v_relation, f.row_key, f.version, f.problem, f.code, _quarantine.verification_id
    from found f where f.id is null
    on conflict do nothing
    returning id, rotation_id, keyring_id, row_key, version, reason
  ), failed as (
    select n.rotation_id, count(*) as rows
    from (select a.rotation_id from added a union all select f.rotation_id from found f where f.id is not null and f.before is distinct from f.rotation_id) n
    group by n.rotation_id
  ), counted as (
    update rekey.rotations r set rows_failed = r.rows_failed + f.rows from failed f where r.id = f.rotation_id
  )
  -- One entry for all rows of a version: how many there are may be anybody's to choose.
  select jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', e.keyring, 'version', e.version, 'rotation_id', e.rotation_id,
    'details', jsonb_build_object('target', _quarantine.target, 'relation', v_relation, 'rows', e.rows,
      'first', (select jsonb_agg(rekey._cut(u.row_key, 100) order by u.place) from unnest(e.row_keys[1:5]) with ordinality as u(row_key, place)),
      'problem', e.problem)) order by e.rotation_id, e.version)
  into v_events
  from (
    select a.rotation_id, a.version, k.name as keyring, count(*) as rows, array_agg(a.row_key order by a.id) as row_keys,
      (array_agg(a.reason order by a.id))[1] as problem
    from added a join rekey.keyrings k on k.id = a.keyring_id
    group by a.rotation_id, a.version, k.name) e;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;
comment on function rekey._quarantine is
  'Notes rows that failed, once each, and counts them in their rotations, whose rows the caller has locked. codes: the SQLSTATE with which the table refused a row; NULL: it does not open. verification_id: the verification that saw them.';

create or replace function rekey._due_rows(rotations bigint[])
returns table (rotation_id bigint, target text, relation oid, indexed boolean, kind text, rows bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- Values that are no envelopes are counted only where all are.
  v_keyrings integer[] := (
    select case when bool_or(r.trigger = 'adoption') then null else array_agg(r.keyring_id) end
    from rekey.rotations r where r.id = any (rotations));
  v_targets rekey._target[];
  v_unfilled text[] := array(
    select c.label from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id
    join rekey.rotations r on r.id = any (rotations) and r.keyring_id = c.keyring_id and r.trigger <> 'adoption'
    where b.refill and b.refill_by is distinct from r.id);
begin
  if (select bool_and(r.trigger = 'adoption') from rekey.rotations r where r.id = any (rotations)) then
    v_targets := array(
      select t from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id cross join lateral rekey._targets(p.label) t
      where r.id = any (rotations) and t.problem is null);
  else
    v_targets := rekey._targets_now();
  end if;
  return query
    select r.id, t.target, t.relation::oid, t.indexed, d.kind, sum(c.rows)::bigint
    from rekey._count_rows(v_targets, v_keyrings, apart => true) c
    join unnest(v_targets) with ordinality t on t.ordinality = c.place
    join (select r.*, p.label from rekey.rotations r left join rekey.protected_columns p on p.id = r.column_id where r.id = any (rotations)) r
      on case when r.trigger = 'adoption' then c.keyring_id is null and t.target = r.label else c.keyring_id = r.keyring_id end
    join lateral (
      values (case when r.trigger = 'adoption' then 'adopt' else 'sweep' end, r.trigger = 'adoption' or c.version <> r.to_version),
        -- Every row of an index that is to be filled.
        ('fill', t.target = any (v_unfilled) and r.trigger <> 'adoption' and c.version > 0)
    ) as d(kind, due) on d.due
    where c.error is null  -- whom that concerns, the verification finds out, which counts again
    group by r.id, t.target, t.relation, t.indexed, d.kind;
end
$$;
comment on function rekey._due_rows is 'What these rotations have to do, by relation, where it is not blocked and can be counted. (By number: a name would take rights on its schema.)';

create or replace function rekey._chunk_blocks(relation regclass) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocks bigint := pg_relation_size(relation) / current_setting('block_size')::integer;
  v_bytes bigint := pg_table_size(relation);
begin
  return greatest(v_blocks * greatest(least(v_bytes / 32, 33554432), 4194304) / greatest(v_bytes, 1), 1);
end
$$;
comment on function rekey._chunk_blocks is
  'How many blocks of a relation make a chunk: 4 to 32 MB with what is stored out of line, so that several workers end together.';

create or replace function rekey._plan(out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_pass bigint;
  v_size double precision;
  v_urgent boolean;
  v_rows jsonb;
begin
  select array_agg(r.id), bool_or(r.trigger = 'compromise') into v_ids, v_urgent
  from (select * from rekey.rotations r
        where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line
          and rekey._is_due(r.next_attempt_at)
        order by r.id for update skip locked) r;
  if v_ids is null then
    return;
  end if;
  begin
    perform rekey._note_names();
    perform rekey._expect_none_doomed();  -- so that no row of its batches is looked at in vain
    v_pass := nextval('rekey._pass_id');
    v_size := rekey._batch_size(cardinality(v_ids));
    perform rekey._unfilled(r.keyring_id, r.id) from rekey.rotations r where r.id = any (v_ids) and r.trigger <> 'adoption';
    v_rows := (select jsonb_agg(to_jsonb(c)) from rekey._due_rows(v_ids) c);
    update rekey._blind_indexes b set refill_by = r.id
    from rekey.protected_columns c join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids) and r.trigger <> 'adoption'
    where c.id = b.column_id and b.refill;
    with counted as (
      select c.* from jsonb_to_recordset(v_rows) as c(rotation_id bigint, target text, relation oid, indexed boolean, kind text, rows bigint)
    ), sizes as (
      select c.target, c.relation, c.kind, s.blocks, c.indexed and c.rows < least(s.blocks / 10, 5000) as few,
        rekey._chunk_blocks(c.relation) as chunk
      from (select d.target, d.relation, d.indexed, d.kind, sum(d.rows) as rows from counted d group by 1, 2, 3, 4) c
      cross join lateral (select pg_relation_size(c.relation) / current_setting('block_size')::integer as blocks offset 0) s
    ), dued as (
      insert into rekey._due (pass_id, kind, target, relation, rotations)
      select v_pass, c.kind, c.target, c.relation, array_agg(c.rotation_id)
      from counted c group by c.kind, c.target, c.relation
    ), chunked as (
      insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks, batch_rows)
      select v_pass, v_urgent, s.kind, s.target, s.relation, format('(%s,0)', f.first)::tid,
        case when s.few then s.blocks else least(f.first + s.chunk, s.blocks) end,
        -- A few rows of an indexed table: the index finds them, so one range will do.
        case when s.few then s.blocks else (512 * v_size)::integer end, (500 * v_size)::integer
      from sizes s
      cross join lateral generate_series(0, case when s.few then 0 else s.blocks - 1 end, s.chunk) as f(first)
    )
    update rekey.rotations r
    set state = 'running', pass_id = v_pass, passes = r.passes + 1, started_at = coalesce(r.started_at, clock_timestamp()),
        next_attempt_at = null, attempts = 0,
        -- Kept where a verification found rows behind: the next one looks at what was written since.
        verification_id = case when r.state = 'running' then r.verification_id end,
        rows_total = r.rows_done + coalesce((select sum(c.rows) from counted c where c.rotation_id = r.id), 0)
    where r.id = any (v_ids);
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.started', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('rows', r.rows_total)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_ids) and r.passes = 1), '[]'));
    event := 'planned';
    keyring_count := cardinality(v_ids);
    detail := jsonb_build_object('pass', v_pass, 'rotations', v_ids[1:20]);
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._plan is 'Begins a pass for every rotation that waits for one: counts what there is to do and splits it into chunks.';

create or replace function rekey._guarded_settings() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return concat_ws(' ', current_setting('role'), session_user, current_setting('transaction_isolation'),
    quote_nullable(nullif(current_setting('rekey.unlocked', true), '')), quote_nullable(nullif(current_setting('request.jwt.claims', true), '')),
    quote_nullable(nullif(current_setting('request.method', true), '')));
end
$$;
comment on function rekey._guarded_settings is 'Settings of the session that say who acts, and with which KEK.';

create or replace function rekey._write_rows(
  target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], indexes bytea[] = null, out locked tid[], out written bigint
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings text := rekey._guarded_settings();
begin
  perform set_config('rekey.sweeping', 'on', true);
  insert into rekey._sweeping (transaction, relation) values (pg_current_xact_id(), _write_rows.relation);
  select w.locked, w.written into locked, written from rekey._call_write(target.function_name, relation, rows, starts, ciphertexts, state, indexes) w;
  delete from rekey._sweeping s where s.transaction = pg_current_xact_id();
  perform set_config('rekey.sweeping', '', true);
  -- The rows are locked: only the table itself can have kept them.
  if written is distinct from coalesce(cardinality(locked), 0)::bigint then
    raise exception '% of % rows of % were not changed: a trigger of the table, or a rule, keeps them', cardinality(locked) - coalesce(written, 0),
      cardinality(locked), relation using errcode = 'RK005',
      hint = format('Let the trigger pass by what pg_rekey does: WHEN (NOT rekey.is_sweeping(%L)).', relation);
  end if;
  if rekey._guarded_settings() <> v_settings then
    raise exception 'a trigger of % changed who acts in this session', relation using errcode = 'RK005',
      hint = 'It must leave role, JWT claims and pg_rekey''s own settings as they are.';
  end if;
end
$$;
comment on function rekey._write_rows is
  'Stores ciphertexts, and index values, in rows that still begin as they were read (starts; NULL: they are locked since), and that nobody else has: those locked. RK005: the table did not take them, or its triggers did more than they may.';

-- At most 60 subtransactions: 64 is as many as a session keeps count of in shared memory. A batch of 4,000 rows with one
-- that raises takes 25.
create or replace function rekey._write_apart(
  target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], indexes bytea[] = null,
  out written tid[], out undone tid, out refused tid[], out problems text[], out codes text[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_begin timestamptz := clock_timestamp();
  v_limit interval := greatest(5 * (rekey._settings()).batch_target, interval '1 second');
  v_tries integer := 0;
  v_rows tid[] := rows;
  v_starts bytea[] := starts;
  v_ciphertexts bytea[] := ciphertexts;
  v_indexes bytea[] := indexes;
  -- What is still to be written, the first at the end.
  v_from integer[] := array[1];
  v_until integer[];
  v_top integer;
  v_low integer;
  v_high integer;
  v_ordered bytea[];
  v_locked tid[];
  v_message text;
  v_code text;
  v_context text;
begin
  if array_position(ciphertexts, null) is not null then
    select array_agg(u.row), array_agg(u.ciphertext), case when indexes is not null then array_agg(u.index) end into v_rows, v_ciphertexts, v_indexes
    from unnest(rows, ciphertexts, indexes) as u(row, ciphertext, index) where u.ciphertext is not null;
  end if;
  v_until := array[cardinality(v_rows)];
  v_top := case when v_rows is null then 0 else 1 end;
  written := '{}';
  refused := '{}';
  problems := '{}';
  codes := '{}';
  while v_top > 0 loop
    v_low := v_from[v_top];
    v_high := v_until[v_top];
    if v_tries >= 60 or v_tries > 1 and clock_timestamp() - v_begin > v_limit then
      undone := v_rows[v_low];
      return;
    end if;
    v_tries := v_tries + 1;
    v_top := v_top - 1;
    begin
      if v_tries = 1 then
        v_locked := (rekey._write_rows(target, relation, v_rows, v_starts, v_ciphertexts, state, v_indexes)).locked;
      else
        v_locked := (rekey._write_rows(target, relation, v_rows[v_low:v_high], v_starts[v_low:v_high], v_ciphertexts[v_low:v_high], state, v_indexes[v_low:v_high])).locked;
      end if;
      written := written || v_locked;
      continue;
    exception when assert_failure or others then
      get stacked diagnostics v_message = message_text, v_code = returned_sqlstate, v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      if rekey._is_passing(v_code) or v_context ~ '^PL/pgSQL function "?rekey"?\."?_call_write' then
        raise;
      end if;
    end;
    if v_tries = 1 then
      select array_agg(u.row order by u.row), array_agg(u.start order by u.row),
        case when v_ciphertexts is not null then array_agg(u.ciphertext order by u.row) end, case when v_indexes is not null then array_agg(u.index order by u.row) end
      into v_rows, v_ordered, v_ciphertexts, v_indexes
      from unnest(v_rows, v_starts, v_ciphertexts, v_indexes) as u(row, start, ciphertext, index);
      v_starts := case when v_starts is not null then v_ordered end;
    end if;
    if v_low = v_high then
      refused := refused || v_rows[v_low];
      problems := problems || rekey._explain_error(target.target, relation, v_message, v_code, v_context, plain);
      codes := codes || v_code;
    else
      v_from[v_top + 1] := (v_low + v_high) / 2 + 1;
      v_until[v_top + 1] := v_high;
      v_from[v_top + 2] := v_low;
      v_until[v_top + 2] := (v_low + v_high) / 2;
      v_top := v_top + 2;
    end if;
  end loop;
end
$$;
comment on function rekey._write_apart is
  'Stores as rekey._write_rows(), leaving out ciphertexts that are NULL, and where the table raises, finds the rows that it does so for by halving: they are refused, with problems and codes (SQLSTATE). undone: the first row that it did not come to; NULL: it came to all. What is neither is somebody else''s now. An error that passes is raised.';

create or replace function rekey._batch_size(keyrings integer) returns double precision
language sql immutable parallel safe
return 1 + least(keyrings - 1, 1000) / 1000.0;
comment on function rekey._batch_size is
  'By how much a batch is larger than one of a single keyring: each key is unwrapped once a batch.';

create or replace function rekey._pass_on(chunk rekey._chunks) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._chunks c where c.id = chunk.id;
  update rekey._chunks c
  set batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions
  where c.id = (
    select n.id from rekey._chunks n
    where n.pass_id = chunk.pass_id and n.kind = chunk.kind and not n.stuck
    order by n.attempts > 0, n.urgent desc, n.id limit 1 for update skip locked);
end
$$;
comment on function rekey._pass_on is 'Deletes a chunk that is done; the one that comes next goes on with its size of batches, and at its pace.';

create or replace function rekey._advance(
  chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision = 0, max_rows integer = 4000
) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  -- The next batch takes about batch_target, and has its rows locked for 10 ms of it; where nobody else is seen, for 20, and with
  -- many keyrings for up to 40.
  v_factor double precision := greatest(0.25, least(2.0,
    extract(epoch from (rekey._settings()).batch_target) / greatest(seconds, 0.000001),
    case when chunk.pace < 1 then 0.01 else max_rows / 200000.0 end / greatest(locked, 0.000001)));
begin
  -- (What ended with its range had fewer rows than it might have: it says nothing for more.)
  chunk.batch_rows := greatest(10, least(max_rows, (chunk.batch_rows * case when next is null then least(v_factor, 1) else v_factor end)::integer));
  if next is null and _advance.until_block >= chunk.until_block then
    perform rekey._pass_on(chunk);
    return;
  end if;
  update rekey._chunks c
  set first = coalesce(rekey._next_row(_advance.next), format('(%s,0)', _advance.until_block)::tid), swept_from = c.first,
      batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions,
      -- No more than twice the blocks that this batch had its rows from: all are read, whatever becomes of it.
      batch_blocks = case when c.batch_blocks > 1024 then c.batch_blocks
                          when _advance.next is not null then greatest(4, least(c.batch_blocks, 2 * (rekey._block(_advance.next) - rekey._block(chunk.first) + 1)))
                          else greatest(4, least(1024, (c.batch_blocks * v_factor)::integer)) end
  where c.id = chunk.id;
end
$$;
comment on function rekey._advance is 'Moves the start of a chunk behind what was swept of it, and notes where that began; deletes it at its end. seconds: how long it took, and for how long its rows were locked; max_rows: the most that a batch may have.';

create or replace function rekey._note_batch(
  rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass,
  failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[] = null
) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if done_keyrings is null and failed_keyrings is null then
    return;
  end if;
  -- The rotations before the audit log, as everywhere.
  perform from rekey.rotations r
  where r.id = any (rotations) and r.keyring_id = any (done_keyrings || failed_keyrings) order by r.id for no key update;
  update rekey.rotations r set rows_done = r.rows_done + d.rows
  from unnest(done_keyrings, done_rows) as d(keyring_id, rows)
  where r.id = any (rotations) and r.keyring_id = d.keyring_id;
  if failed_keyrings is not null then
    perform rekey._quarantine(target, relation, failed_keyrings, failed_versions, failed_keys, failed_problems, failed_codes);
    -- What the table refused is not behind: the next verification has to know that.
    update rekey.rotations r set verification_id = null
    where r.id = any (rotations) and r.keyring_id = any (failed_keyrings) and r.verification_id is not null and failed_codes is not null;
  end if;
end
$$;
comment on function rekey._note_batch is 'Adds what a batch did to the progress of its rotations, and what failed to the quarantine.';

create or replace function rekey._throttle(wanted integer, out rows integer, out wait interval)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate integer := (rekey._settings()).max_rows_per_second;
  v_next timestamptz;
begin
  rows := wanted;
  if v_rate is null then
    return;
  end if;
  -- All workers share the throttle, one batch after the other.
  select w.next_batch_at into v_next from rekey._worker w for update;
  -- (A time further ahead was noted by a clock that was wrong.)
  if v_next between clock_timestamp() and clock_timestamp() + interval '1 minute' then
    rows := null;
    wait := least(v_next - clock_timestamp(), interval '1 second');
    return;
  end if;
  rows := least(wanted, greatest(v_rate / 20, 1));
end
$$;
comment on function rekey._throttle is 'How many rows a batch may have now, of those wanted; NULL: none yet, for as long as wait.';

create or replace function rekey._note_pace(begun timestamptz, rows bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
begin
  if v_rate is not null then
    update rekey._worker w set next_batch_at = begun + (rows / v_rate) * interval '1 second' where w.singleton;
  end if;
end
$$;
comment on function rekey._note_pace is 'Tells rekey._throttle() how many rows a batch had that began then.';

create or replace function rekey._keep_pace(begun timestamptz, rows bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
  v_ahead double precision := rows / (4 * v_rate) - extract(epoch from clock_timestamp() - begun);
begin
  if v_ahead > 0 then
    perform pg_sleep(least(v_ahead, extract(epoch from begun + interval '1 minute' - clock_timestamp())));
  end if;
end
$$;
comment on function rekey._keep_pace is
  'Sleeps where rows were opened faster since then than four times max_rows_per_second, which is the pace of a verification: within one transaction, whose snapshot holds up every VACUUM, and so until a minute has passed since then, and no longer.';

create or replace function rekey.who_else() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sessions bigint;
begin
  if not pg_has_role('pg_read_all_stats', 'usage') then
    return null;
  end if;
  select count(*) into v_sessions
  from pg_stat_activity a
  where a.backend_type = 'client backend' and a.pid <> pg_backend_pid() and a.application_name not in ('pg-rekey', 'pg-rekey serve', 'pg_cron')
    and (a.state = 'active' or a.state_change > clock_timestamp() - interval '1 second');
  return case when v_sessions > 0 then format('%s active sessions', v_sessions) else '' end;
end
$$;
comment on function rekey.who_else is
  'Who else used this server within the last second, in words, for rekey.rotation_step(); empty: nobody; NULL: the caller is no member of pg_read_all_stats, and may not see it.';
grant execute on function rekey.who_else to rekey_admin, rekey_operator;

-- What all may see: how many transactions there were, which sessions tell once a second.
create or replace function rekey._transactions(looked_at timestamptz, transactions bigint, out told text, out looked timestamptz, out counted bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rate double precision;
begin
  select clock_timestamp(), sum(pg_stat_get_db_xact_commit(d.oid) + pg_stat_get_db_xact_rollback(d.oid))::bigint into looked, counted from pg_database d;
  v_rate := (counted - transactions) / extract(epoch from looked - looked_at);
  -- Workers, and who watches them, have some themselves.
  told := case when v_rate > 50 then format('%s transactions a second', round(v_rate::numeric)) end;
end
$$;
comment on function rekey._transactions is
  'Whether others use this server: how many transactions it has had in all databases, and in words how many a second, where there are more than 50. looked_at, transactions: when they were counted before, and what was counted then.';

create or replace function rekey._pace(inout chunk rekey._chunks, who_else text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings rekey.settings := rekey._settings();
  v_others text := nullif(who_else, '');
begin
  if v_settings.min_pace = 1 or v_settings.max_rows_per_second is not null or chunk.urgent or exists (
       select from rekey.rotations r where chunk.pass_id in (r.pass_id, r.verification_id) and r.state in ('running', 'verifying') and r.trigger = 'compromise') then
    chunk.pace := 1;
    chunk.gives_way_to := null;
    return;
  end if;
  if who_else is null then
    -- (A later time was noted by a clock that was wrong.)
    if chunk.looked_at between clock_timestamp() - interval '1 second' and clock_timestamp() then
      return;  -- too early to say
    end if;
    select t.told, t.looked, t.counted into v_others, chunk.looked_at, chunk.transactions from rekey._transactions(chunk.looked_at, chunk.transactions) t;
  end if;
  chunk.pace := case when v_others is not null then greatest(chunk.pace / 2, v_settings.min_pace) else least(chunk.pace * 2, 1) end;
  chunk.gives_way_to := case when chunk.pace < 1 then coalesce(v_others, chunk.gives_way_to) end;
end
$$;
comment on function rekey._pace is
  'The chunk with the part of the time that its next batch may take (pace): half of what it was, down to min_pace, while others use the server; twice as much, up to all of it, when they do not. Nobody is given way to where a key is compromised, and where max_rows_per_second sets the pace. who_else: what rekey.who_else() said.';

create or replace function rekey._is_in_the_way() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    with l as materialized (select l.pid, l.granted, l.transactionid from pg_locks l where l.locktype = 'transactionid')
    select exists (
      select from l w join l h on h.transactionid = w.transactionid where not w.granted and h.granted and h.pid = pg_backend_pid()));
end
$$;
comment on function rekey._is_in_the_way is 'Whether somebody waits for the end of this transaction.';

create or replace function rekey._wait_out(pace real, seconds double precision) returns interval
language sql immutable parallel safe
return case when pace < 1 then least(seconds * (1 / pace - 1), 10) * interval '1 second' end;
comment on function rekey._wait_out is 'How long a worker pauses after a batch of so many seconds; NULL: not at all.';

create or replace function rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_refused integer;
begin
  if written > 0 then
    update rekey._due d set passed = true
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed;
  elsif refused > 0 then
    update rekey._due d set refused = d.refused + _note_passed.refused
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed
    returning d.refused into v_refused;
    -- It is not the rows: to put millions of them into quarantine, one by one, helps nobody.
    if v_refused > 10000 then
      raise exception '% refuses every row, % of them by now: see rekey.failure_status', chunk.relation, v_refused using errcode = 'RK005';
    end if;
  end if;
  if chunk.attempts > 0 then
    update rekey._chunks c set attempts = 0, last_error = null, next_attempt_at = null where c.id = chunk.id;
    update rekey.rotations r set attempts = 0, blocked_by = null, blocked_since = null
    where r.id in (
      select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
      where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      order by u.id)
      and r.state = 'running' and r.pass_id = chunk.pass_id;
  end if;
end
$$;
comment on function rekey._note_passed is 'Notes that rows of a chunk went through, or that all were refused: RK005 where more than 10,000 were, and none went through.';

create or replace function rekey._sweep_batch(who_else text, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_versions integer[];
  v_target rekey._target;
  v_state text;
  v_size double precision;
  v_pace real;
  v_first_block bigint;
  v_until_block bigint;
  v_max_rows integer;
  v_forced boolean;
  v_batch record;
  v_contexts bytea[];
  v_old bytea[];
  v_sealing rekey._sealing;
  v_adopted rekey._sealed;
  v_rows tid[];
  v_starts bytea[];
  v_made bytea[];
  v_made_keyrings integer[];
  v_locking timestamptz;
  v_locked double precision := 0;
  v_left tid[];
  v_failed_places integer[];
  v_done_keyrings integer[];
  v_done_rows bigint[];
  v_failed_keyrings integer[];
  v_failed_versions integer[];
  v_failed_keys text[];
  v_failed_problems text[];
  v_failed_codes text[];
  v_indexes bytea[];
  v_blocked jsonb;
  v_apart record;
  v_undone tid;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where not c.stuck and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.pass_id = c.pass_id and r.state = 'running'
                  and rekey._is_due(r.next_attempt_at)
                  and case when c.kind = 'adopt' then r.formats = '{plaintext}' when c.kind in ('sweep', 'fill') then r.trigger <> 'adoption' end)
  order by c.attempts > 0, c.urgent desc, c.pass_id desc, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select w.rows, w.wait into v_max_rows, wait from rekey._throttle(v_chunk.batch_rows) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;

  select array_agg(r.id order by r.id), array_agg(r.keyring_id order by r.id), array_agg(r.to_version order by r.id), bool_or(r.forced)
  into v_ids, v_keyrings, v_versions, v_forced
  from rekey.rotations r
  left join rekey.protected_columns p on p.id = r.column_id
  where r.pass_id = v_chunk.pass_id and r.state = 'running' and rekey._is_due(r.next_attempt_at)
    and case v_chunk.kind when 'adopt' then p.label = v_chunk.target else r.trigger <> 'adoption' end;
  if v_ids is null then
    return;  -- paused or superseded since
  end if;
  v_size := rekey._batch_size(cardinality(v_ids));
  v_pace := v_chunk.pace;
  v_chunk := rekey._pace(v_chunk, who_else);
  if v_chunk.pace < 1 and v_pace = 1 then
    -- Its size is one for when nobody was seen.
    v_max_rows := greatest(v_max_rows / 2, 1);
    v_chunk.batch_rows := greatest(v_chunk.batch_rows / 2, 1);
  end if;
  perform rekey._take_in_hand(v_chunk.relation);
  v_first_block := rekey._block(v_chunk.first);
  v_until_block := least(v_first_block + v_chunk.batch_blocks, v_chunk.until_block);

  begin
    v_target := rekey._target_of(v_chunk);
    v_state := rekey._target_state(v_target.function_name);
    event := 'batch';
    keyring_count := cardinality(v_ids);
    rows := 0;
    if v_target.problem is not null then
      -- The verification will find its rows behind, once it can count them.
      delete from rekey._chunks c where c.id = v_chunk.id;
      detail := jsonb_build_object('target', v_chunk.target, 'blocked', v_target.problem);
      return;
    end if;
    if v_target.normalization is not null then
      -- A statement that goes on with a row as it is now would not find it under a version that its search did not know.
      v_blocked := (
        select rekey._older_snapshots(b.changed_in) from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id where c.label = v_chunk.target);
      update rekey.rotations r set blocked_by = v_blocked, blocked_since = case when v_blocked is not null then coalesce(r.blocked_since, now()) end
      where r.id = any (v_ids) and (v_blocked is not null and r.blocked_by is distinct from v_blocked or v_blocked is null and r.blocked_by -> 0 ? 'snapshot');
      if v_blocked is not null then
        update rekey._chunks c set next_attempt_at = clock_timestamp() + interval '200 milliseconds' where c.id = v_chunk.id;
        event := 'waiting';
        keyring_count := 0;
        wait := interval '100 milliseconds';
        return;
      end if;
    end if;
    -- Whoever reads a page first removes what an update left in it, and notes which transactions have ended. Here (swept_from) that goes
    -- into the log without an image of the page; after the next checkpoint, the verification would write one more.
    select b.* into v_batch from rekey._call_read(
      v_target.function_name, v_chunk.relation, v_chunk.first, format('(%s,0)', v_until_block)::tid,
      case when v_chunk.kind <> 'adopt' then v_keyrings end, case when v_chunk.kind <> 'fill' then v_versions end, v_max_rows, (2097152 * v_size)::bigint, v_chunk.swept_from) b;
    if v_batch.rows is not null then
      if v_chunk.kind = 'adopt' then
        v_contexts := array(
          select v_target.prefix || c.context from unnest(v_batch.contexts) with ordinality as c(context, place) order by c.place);
        v_sealing := rekey._sealing(v_keyrings[1]);
        v_adopted := rekey._adopt(v_batch.ciphertexts, v_contexts, v_sealing, '{plaintext}', v_forced, v_target.prefix, v_target.normalization);
        v_rows := v_batch.rows;
        v_made := v_adopted.ciphertexts;
        v_indexes := v_adopted.indexes;
        select array_agg(u.place), array_agg(u.problem) into v_failed_places, v_failed_problems
        from unnest(v_adopted.problems) with ordinality as u(problem, place) where u.problem is not null;
      elsif v_chunk.kind = 'fill' then
        v_old := v_batch.ciphertexts;
        select r.made_rows, r.starts, r.made_indexes, r.made_keyrings into v_rows, v_starts, v_indexes, v_made_keyrings
        from rekey._refill(v_batch.rows, v_old, v_target.prefix, v_batch.contexts, v_batch.indexes, v_target.normalization) r;
      else
        v_old := v_batch.ciphertexts;  -- of an adoption they are plain, and no parameters of statements
        select r.made_rows, r.starts, r.made, r.made_keyrings, r.failed_places, r.problems, r.indexes
        into v_rows, v_starts, v_made, v_made_keyrings, v_failed_places, v_failed_problems, v_indexes
        from rekey._reencrypt(v_batch.rows, v_old, v_target.prefix, v_batch.contexts, v_target.normalization) r;
      end if;
      v_locking := clock_timestamp();
      select a.* into v_apart from rekey._write_apart(v_target, v_chunk.relation, v_rows, v_starts, v_made, v_chunk.kind = 'adopt', v_batch.state, v_indexes) a;
      v_locked := extract(epoch from clock_timestamp() - v_locking);
      rows := cardinality(v_apart.written);
      v_undone := v_apart.undone;
      v_left := case when rows < cardinality(v_rows) then array(select unnest(v_rows) except select unnest(v_apart.written)) end;
      select array_agg(d.keyring_id), array_agg(d.rows) into v_done_keyrings, v_done_rows
      from (select coalesce(u.keyring_id, v_keyrings[1]) as keyring_id, count(*) as rows
            from unnest(v_rows, v_made_keyrings) as u(row, keyring_id)
            where v_left is null or u.row <> all (v_left)
            group by 1) d;
      if v_failed_places is not null or v_apart.refused <> '{}' then
        -- (Joined: to look a place up in an array of texts takes as long as the place is far.)
        select array_agg(case when v_chunk.kind = 'adopt' then v_keyrings[1] else f.keyring_id end order by f.place),
          array_agg(f.version order by f.place), array_agg(f.key order by f.place), array_agg(f.problem order by f.place), array_agg(f.code order by f.place)
        into v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems, v_failed_codes
        from (
          select u.place, u.key, coalesce(p.problem, a.problem) as problem, a.code,
            case when u.header is not null then rekey._int4(u.header, 3) end as keyring_id,
            case when u.header is not null then rekey._int4(u.header, 7) end as version
          from (
            select b.row, b.key, substr(o.ciphertext, 1, 11) as header, b.place
            from unnest(v_batch.rows, v_batch.keys) with ordinality as b(row, key, place)
            left join unnest(v_old) with ordinality as o(ciphertext, place) on o.place = b.place) u
          left join unnest(v_failed_places, v_failed_problems) as p(place, problem) on p.place = u.place
          left join unnest(v_apart.refused, v_apart.problems, v_apart.codes) as a(row, problem, code) on a.row = u.row
          where p.place is not null or a.row is not null) f;
      end if;
      if rekey._target_state(v_target.function_name) <> v_state or (rekey._target_of(v_chunk)).problem is not null then
        raise exception 'the protected column % was changed while its rows were swept', v_chunk.target using errcode = 'RK005',
          hint = 'See rekey.column_status.', constraint = 'columns';
      end if;
      perform rekey._note_batch(v_ids, v_done_keyrings, v_done_rows, v_chunk.target, v_chunk.relation,
        v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems,
        case when v_apart.codes <> '{}' then v_failed_codes end);
      perform rekey._note_passed(v_chunk, rows, cardinality(v_apart.refused));
    end if;
    perform rekey._note_pace(v_begin, rows);
    if v_chunk.pace = 1 and rekey._is_in_the_way() then
      v_chunk.pace := (rekey._settings()).min_pace;
      v_chunk.gives_way_to := 'sessions that wait for its locks';
    end if;
    if v_undone is null then
      perform rekey._advance(v_chunk, v_batch.next, v_until_block, extract(epoch from clock_timestamp() - v_begin),
        case when v_chunk.kind <> 'adopt' then v_locked else 0 end, (4000 * v_size)::integer);
    else
      update rekey._chunks c set first = v_undone, swept_from = c.first, batch_rows = 32 where c.id = v_chunk.id;
    end if;
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('pass', v_chunk.pass_id, 'target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20],
      'failed', coalesce(cardinality(v_failed_keys), 0),
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, v_chunk.kind = 'adopt');
      perform rekey._note_trouble(v_chunk, v_error, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._sweep_batch is 'Sweeps one batch of one chunk, if there is one that no other worker has in hand.';

create or replace function rekey._clear_chunks() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._chunks c
  where c.id in (
    select d.id from rekey._chunks d
    where not exists (select from rekey.rotations r where r.pass_id = d.pass_id)
      and not exists (select from rekey.rotations r where r.verification_id = d.pass_id and r.state in ('running', 'verifying'))
    for update skip locked);
  delete from rekey._due d
  where d.ctid in (
    select u.ctid from rekey._due u
    where not exists (select from rekey.rotations r where r.pass_id = u.pass_id)
    for update skip locked);
  -- The coordinator and who ends a verification may both come here, each with locks that the other waits for.
  delete from rekey._verified d
  where d.ctid in (
    select v.ctid from rekey._verified v
    where not exists (select from rekey.rotations r where r.verification_id = v.verification_id and r.state in ('running', 'verifying'))
    for update skip locked);
end
$$;
comment on function rekey._clear_chunks is
  'Deletes what passes and verifications leave whose rotations were all paused, superseded, rolled back or completed.';

create or replace function rekey._coordinate(planning boolean, out event text, out keyring_count integer, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotation record;
  v_unswept bigint[];
  v_count integer;
begin
  perform rekey._clear_chunks();

  keyring_count := 0;
  -- Who has no rows in what is in trouble does not wait for it.
  for v_rotation in
    select distinct r.pass_id from rekey.rotations r
    where r.state = 'running' and r.pass_id is not null and not exists (select from rekey._chunks c where c.pass_id = r.pass_id and c.attempts = 0)
  loop
    perform rekey._fail_stuck(v_rotation.pass_id);
    v_unswept := array(select u.rotation_id from rekey._unswept(v_rotation.pass_id) u);
    perform from rekey.rotations r
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept) order by r.id for no key update;
    update rekey.rotations r set state = 'verifying', pass_id = null, barrier_at = null, blocked_by = null, blocked_since = null
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept);
    get diagnostics v_count = row_count;
    keyring_count := keyring_count + v_count;
  end loop;
  if keyring_count > 0 then
    event := 'swept';
    return;
  end if;

  keyring_count := 0;
  for v_rotation in
    select r.id, r.keyring_id, r.from_versions from rekey.rotations r
    where r.state = 'verifying' and r.barrier_at is null and rekey._is_due(r.next_attempt_at)
    order by r.id limit 500 for no key update skip locked
  loop
    if rekey._barrier(v_rotation.keyring_id, v_rotation.from_versions) then
      update rekey.rotations r set barrier_at = clock_timestamp(), blocked_by = null, blocked_since = null, next_attempt_at = null
      where r.id = v_rotation.id;
      keyring_count := keyring_count + 1;
      event := 'swept';
    else
      update rekey.rotations r
      set blocked_by = rekey._lock_holders(v_rotation.keyring_id, v_rotation.from_versions, coalesce(r.blocked_since, now())),
          blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '500 milliseconds'
      where r.id = v_rotation.id;
      event := coalesce(event, 'blocked');
      detail := coalesce(detail, jsonb_build_object('rotation', v_rotation.id));
    end if;
  end loop;
  if event is not null then
    return;
  end if;

  if planning then
    select p.event, p.keyring_count, p.detail into event, keyring_count, detail from rekey._plan() p;
  else
    -- As _plan() will find them: who holds one up does not hold up the batches.
    perform from rekey.rotations r
    where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line and rekey._is_due(r.next_attempt_at) limit 1 for update skip locked;
    event := case when found then 'whole' end;
  end if;
end
$$;
comment on function rekey._coordinate is 'What one worker does for all: ends passes, tries the barrier, begins passes; without planning, says that one is to be begun (event whole).';

create or replace function rekey._next_in_line() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint;
begin
  -- (Whoever has a keyring in hand begins something there, or ends it: the next step looks again.)
  select r.id into v_id
  from rekey.rotations r
  join rekey.keyrings k on k.id = r.keyring_id
  where r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line)
  order by r.id limit 1 for no key update of k skip locked;
  if not found then
    return;
  end if;
  update rekey.rotations r
  set in_line = false,
      to_version = (select k.version from rekey.encryption_keys k where k.keyring_id = r.keyring_id and k.state = 'active')
  where r.id = v_id and r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
end
$$;
comment on function rekey._next_in_line is 'Lets the first adoption in line begin whose keyring has nothing else under way, with the version that is active now.';

create or replace function rekey.rotation_step(
  whole boolean = null, who_else text = null, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set jit = off  -- which takes 10 MB of each session that counts a large table, and saves no time
set lock_timeout = '2 s'  -- whoever locks a table holds up nothing else
as $$
declare
  v_next timestamptz;
  v_blocked jsonb;
  v_kind text;
begin
  perform rekey._refuse_snapshot();
  keyring_count := 0;
  rows := 0;
  perform rekey._next_in_line();
  if not exists (
       select from rekey.rotations r where r.state in ('queued', 'running', 'verifying') and not r.in_line
         -- An adoption whose keys only pg-rekey columns adopt has.
         and not (r.state = 'running' and r.formats is not null and r.formats <> '{plaintext}' and exists (select from rekey._chunks c where c.pass_id = r.pass_id))) then
    event := 'idle';
    return;
  end if;
  perform from rekey._kek();

  -- What was just asked for, or only waits, comes before the batches: a compromised key does not wait for a long sweep.
  if (exists (
        select from rekey.rotations r
        where rekey._is_due(r.next_attempt_at) and (r.state = 'queued' and not r.in_line or r.state = 'verifying' and r.barrier_at is null))
      or exists (
        select from (select distinct r.pass_id from rekey.rotations r where r.state = 'running' and rekey._is_due(r.next_attempt_at)) p
        where not exists (select from rekey._chunks c where c.pass_id = p.pass_id and c.attempts = 0)))
     and pg_try_advisory_xact_lock(0, 1) then
    select c.event, c.keyring_count, c.detail into event, keyring_count, detail from rekey._coordinate(whole is distinct from false) c;
    if event = 'blocked' then
      v_blocked := detail;
      event := null;
    end if;
  end if;
  if event is null and exists (select from rekey.rotations r where r.state = 'verifying' and r.barrier_at is not null)
     and pg_try_advisory_xact_lock(0, 2) then
    if whole is not distinct from false then
      event := case when exists (
        select from rekey.rotations r
        where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
          and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')) then 'whole' end;
    else
      select v.event, v.keyring_count, v.rows, v.detail into event, keyring_count, rows, detail from rekey._verify() v;
      if event = 'blocked' then
        v_blocked := detail;
        event := null;
      end if;
    end if;
  end if;
  foreach v_kind in array case when exists (select from rekey._chunks c where c.urgent) then '{sweep,verify}'::text[] else '{verify,sweep}' end loop
    exit when event is not null or whole;
    if v_kind = 'verify' then
      select v.event, v.keyring_count, v.rows, v.wait, v.detail into event, keyring_count, rows, wait, detail from rekey._verify_batch(who_else) v;
    else
      select s.event, s.keyring_count, s.rows, s.wait, s.detail into event, keyring_count, rows, wait, detail from rekey._sweep_batch(who_else) s;
    end if;
  end loop;
  if event is null and v_blocked is not null then
    event := 'blocked';
    detail := v_blocked;
    wait := interval '500 milliseconds';
  end if;
  if event is null then
    -- Something is under way, and nothing to be done now: another worker has it in hand, or its time has not come.
    event := 'waiting';
    select least((select min(r.next_attempt_at) from rekey.rotations r where r.state in ('queued', 'running', 'verifying')),
      (select min(c.next_attempt_at) from rekey._chunks c where not c.stuck)) into v_next;
    wait := greatest(interval '20 milliseconds', least(coalesce(v_next - clock_timestamp(), interval '20 milliseconds'), interval '1 second'));
  end if;
  keyring_count := coalesce(keyring_count, 0);
  rows := coalesce(rows, 0);
exception when sqlstate 'RK001' or sqlstate 'RK002' then
  event := 'locked';
  keyring_count := 0;
  rows := 0;
  wait := interval '10 seconds';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
when deadlock_detected or serialization_failure or lock_not_available or query_canceled then
  -- Outside the batches, whose errors are the rotation's: nothing was done, and the next step does it.
  event := case when sqlstate = '57014' then 'canceled' else 'error' end;
  keyring_count := 0;
  rows := 0;
  wait := interval '1 second';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
end
$$;
comment on function rekey.rotation_step is
  'One step of the rotations under way, to be committed at once; any number of sessions may step. event: planned, batch, swept, checked, verified, completed, blocked (waits for writers), waiting, locked (no KEK), error, canceled, idle. whole: true, only what reads whole tables, and so may take long; false, only what does not, and the event whole where that is due; NULL, the default: either. who_else: what rekey.who_else() tells the caller; NULL: the step looks for itself. wait: how long the caller may sleep before the next one; NULL: not at all. 25001: not in READ COMMITTED.';
grant execute on function rekey.rotation_step to rekey_admin, rekey_operator;

create or replace procedure rekey.run_rotations(max_duration interval = '50 s')
language plpgsql
as $$
declare
  v_until timestamptz := pg_catalog.clock_timestamp() operator(pg_catalog.+) max_duration;
  v_step record;
begin
  if v_until is null then
    raise exception 'max_duration is an interval' using errcode = 'invalid_parameter_value';
  end if;
  loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    -- A crash takes back some batches, rows and progress together. What is audited waits for the disk all the same.
    perform pg_catalog.set_config('synchronous_commit', 'off', true);
    select s.event, s.wait into v_step from rekey.rotation_step(who_else => rekey.who_else()) s;
    commit;
    exit when v_step.event operator(pg_catalog.=) any (array['idle', 'locked', 'canceled'])
           or pg_catalog.clock_timestamp() operator(pg_catalog.>=) v_until;
    if v_step.wait is not null then
      perform pg_catalog.pg_sleep_for(v_step.wait);
    end if;
  end loop;
end
$$;
comment on procedure rekey.run_rotations is
  'Works on the rotations under way, a commit after each step, until nothing is left, the KEK is missing, or max_duration has passed. Call it outside a transaction.';
grant execute on procedure rekey.run_rotations to rekey_admin, rekey_operator;

-- sql/code/61_verify.sql
-- Verification: that every row opens, and under which version it stands. A rotation completes by it.
--
-- What is large is checked by chunks, by any number of workers, each in a transaction of its own. `since` is the oldest
-- transaction that was under way when that began. The last step is one snapshot: it counts every row, and checks the tags of
-- those that `since` or a later transaction wrote. All others were there, under the same row pointer, when their chunk was
-- read: what is older had ended, and a row's version is neither changed nor moved, but by what gives the table a new file
-- (VACUUM FULL, CLUSTER, ALTER TABLE, TRUNCATE). Where the file or a function of a target is another one, nothing counts
-- that was checked before, and the last step opens every row; as it does in a chunk in which one did not open, in what is
-- small, and in rekey.verify_ciphertexts().

create or replace function rekey._system_identifier() returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if has_function_privilege('pg_catalog.pg_control_system()', 'execute') then
    return (select s.system_identifier from pg_control_system() s);
  end if;
  return null;
end
$$;
comment on function rekey._system_identifier is 'What initdb made to tell this cluster from others; NULL where a host of databases has revoked it.';

create or replace function rekey._checked_since(verification_id bigint, target rekey._target) returns xid
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select v.since::xid from rekey._verified v
  where v.verification_id = _checked_since.verification_id and v.target = (_checked_since.target).target and v.relation = (_checked_since.target).relation
    and v.filenode = pg_relation_filenode(v.relation) and v.functions = rekey._target_state((_checked_since.target).function_name)
    and v.system_identifier is not distinct from rekey._system_identifier()
    -- As far as the ages of transactions can be compared.
    and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - v.since::text::bigint < 2000000000;
end;
comment on function rekey._checked_since is
  'The transaction from which on a relation has yet to be checked where a verification checks it by chunks; NULL: all of it, since it does not, or the relation is another one now. The caller holds a lock on it.';

create or replace function rekey._ranges(verification_id bigint, target rekey._target)
returns table (first bigint, until bigint, since xid)
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  with checked as (
    select rekey._checked_since(_ranges.verification_id, _ranges.target) as since
  ), doubtful as (
    select case when k.since is null then '{[0,4294967294)}' else (
      select coalesce(range_agg(int8range(rekey._block(c.first), c.until_block)), '{}')
      from rekey._chunks c
      where c.pass_id = _ranges.verification_id and c.kind = 'doubtful' and c.target = (_ranges.target).target and c.relation = (_ranges.target).relation
    ) end as blocks, k.since
    from checked k
  )
  select lower(r.range), upper(r.range), null::xid from doubtful d cross join lateral unnest(d.blocks) as r(range)
  union all
  select lower(r.range), upper(r.range), d.since
  from doubtful d cross join lateral unnest('{[0,4294967294)}'::int8multirange - d.blocks) as r(range);
end;
comment on function rekey._ranges is 'The blocks of a relation in ranges, each with what is to be checked in it: as rekey._checked_since() says; NULL: all.';

create or replace function rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[])
returns table (place integer, keyring_id integer, version integer)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select u.place::integer, q.keyring_id, q.version
  from unnest(ciphertexts, keys) with ordinality as u(ciphertext, row_key, place)
  join rekey.rotation_failures q
    on q.keyring_id = rekey._int4(u.ciphertext, 3) and q.target = _refused_rows.target and q.relation = _refused_rows.relation::text
    and q.row_hash = rekey._row_hash(u.row_key)
  where q.resolved_at is null and q.sqlstate is not null and q.version = rekey._int4(u.ciphertext, 7);
end;
comment on function rekey._refused_rows is
  'Which of these rows are in quarantine because their table refused the new value, and still are as they were then.';

create or replace function rekey._open_found(targets rekey._target[], whole rekey._counted[])
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_of integer[];
  v_at integer[];
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
begin
  return query
    select t.target, t.relation, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint,
      rekey._explain_error(t.target, t.relation, f.error, f.code, f.context, true), f.code
    from unnest(whole) f join unnest(targets) with ordinality t on t.ordinality = f.place
    where f.error is not null;
  select array_agg(r.place order by r.n), array_agg(r.at order by r.n), array_agg(r.ciphertext order by r.n), array_agg(r.context order by r.n), array_agg(r.key order by r.n)
  into v_of, v_at, v_ciphertexts, v_contexts, v_keys
  from (
    select f.place, u.at::integer as at, u.ciphertext, t.prefix || u.context as context, u.key, row_number() over () as n
    from unnest(whole) f
    join unnest(targets) with ordinality t on t.ordinality = f.place
    cross join lateral unnest(f.ciphertexts, f.contexts, f.keys) with ordinality as u(ciphertext, context, key, at)
    where f.error is null) r;
  return query
    with failing as materialized (
      select f.n, f.problem
      from rekey._check(v_ciphertexts, '', v_contexts) c cross join lateral unnest(c.failed_places, c.problems) as f(n, problem)
    ), opened as (
      select u.place, u.at, u.key, f.problem, rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
      from unnest(v_of, v_at, v_ciphertexts, v_keys) with ordinality as u(place, at, ciphertext, key, n)
      left join failing f on f.n = u.n
    ), refusing as (
      select r.place as at, f.place, f.keys[r.place] as key, r.keyring_id, r.version
      from unnest(whole) f
      join unnest(targets) with ordinality t on t.ordinality = f.place
      cross join lateral rekey._refused_rows(t.target, t.relation, f.ciphertexts, f.keys) r
      where f.error is null and exists (
        select from rekey.rotation_failures q where q.target = t.target and q.resolved_at is null and q.sqlstate is not null)
    )
    select t.target, t.relation, c.keyring_id, c.version, c.rows, c.failed, c.failed_keys, c.failed_problems, c.refused, null::text, null::text
    from (
      select o.place, o.keyring_id, o.version, count(*) as rows, count(o.problem) as failed, array_agg(o.key) filter (where o.problem is not null) as failed_keys,
        array_agg(o.problem) filter (where o.problem is not null) as failed_problems, 0::bigint as refused
      from opened o group by o.place, o.keyring_id, o.version
      union all
      select r.place, r.keyring_id, r.version, 0, 0, array_agg(r.key), null, count(*)
      from refusing r where not exists (select from opened o where o.place = r.place and o.at = r.at and o.problem is not null)
      group by r.place, r.keyring_id, r.version) c
    join unnest(targets) with ordinality t on t.ordinality = c.place;
end
$$;
comment on function rekey._open_found is 'Counts and opens rows of targets, as rekey._open_rows(), that rekey._count_rows(whole => true) found.';

create or replace function rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean = false)
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_large rekey._target[] := array(select t from unnest(targets) t where t.indexed or t.normalization is not null or pg_table_size(t.relation) > 524288);
  v_group record;
  v_whole rekey._counted[];
  v_target rekey._target;
  v_count rekey._counted;
  v_rows bigint[];
  v_blocks bigint;
  v_range record;
  v_step bigint;
  v_first bigint;
  v_from tid;
  v_found record;
  v_bad record;
  v_places integer[];
  v_refused boolean;
  v_context text;
  v_place integer := 0;
  v_begin timestamptz := clock_timestamp();
  v_opened bigint := 0;
begin
  -- STABLE: every statement in here sees the snapshot of the calling one.
  -- What is small is counted by opening it, 4 MB of it at a time.
  for v_group in
    select array_agg(g.target) as targets
    from (select t as target, sum(pg_table_size(t.relation)) over (order by t.relation, t.target) / 4194304 as number
          from unnest(targets) t where not t.indexed and t.normalization is null and pg_table_size(t.relation) <= 524288) g
    group by g.number::integer
  loop
    v_whole := array(select c from rekey._count_rows(v_group.targets, keyrings, apart, whole => true) c);
    return query select o.* from rekey._open_found(v_group.targets, array(select f from unnest(v_whole) f where f.next is null)) o;
    v_large := v_large || array(select v_group.targets[f.place] from unnest(v_whole) f where f.next is not null);
    v_opened := v_opened + coalesce((select sum(f.rows) from unnest(v_whole) f), 0);
    if verification_id is not null then
      perform rekey._keep_pace(v_begin, v_opened);
    end if;
  end loop;
  for v_count in select c.* from rekey._count_rows(v_large, keyrings, apart) c loop
    target := v_large[v_count.place].target;
    relation := v_large[v_count.place].relation;
    keyring_id := v_count.keyring_id;
    version := v_count.version;
    rows := v_count.rows;
    failed := 0;
    refused := 0;
    if v_count.error is not null then
      error := rekey._explain_error(target, relation, v_count.error, v_count.code, v_count.context, true);
      code := v_count.code;
      v_rows[v_count.place] := null;
    elsif keyring_id is not null then
      v_rows[v_count.place] := coalesce(v_rows[v_count.place], 0) + rows;
    end if;
    return next;
    error := null;
    code := null;
  end loop;
  rows := 0;
  foreach v_target in array v_large loop
    v_place := v_place + 1;
    -- Where none was counted, there is none.
    continue when coalesce(v_rows[v_place], 0) = 0;
    target := v_target.target;
    relation := v_target.relation;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_target.target and q.resolved_at is null and q.sqlstate is not null);
    failed := 0;
    refused := 0;
    begin
      -- No less than the snapshot sees: the caller holds a lock that keeps the table from being rewritten.
      v_blocks := pg_relation_size(relation) / current_setting('block_size')::integer;
      for v_range in select r.* from rekey._ranges(verification_id, v_target) r loop
        -- 2 MB at a time, 32 of which little is wanted; but the few rows of small keyrings are found by an index, all at once.
        v_step := case when v_range.since is not null then 4096 when v_target.indexed and v_rows[v_place] < least(v_blocks, 5000) then 4294967294 else 256 end;
        v_first := v_range.first;
        v_from := format('(%s,0)', v_first)::tid;
        while v_first < least(v_range.until, v_blocks) loop
          select s.* into v_found from rekey._call_scan(v_target.function_name, relation, v_from,
            format('(%s,0)', least(v_first + v_step, v_range.until))::tid, keyrings, v_range.since, 4000, 2097152) s;
          if v_found.ciphertexts is not null then
            v_places := '{}';
            for v_bad in select c.* from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization) c loop
              keyring_id := rekey._int4(v_bad.header, 3);
              version := rekey._int4(v_bad.header, 7);
              failed := cardinality(v_bad.failed_places);
              failed_keys := array(select v_found.keys[f.place] from unnest(v_bad.failed_places) with ordinality as f(place, rank) order by f.rank);
              failed_problems := v_bad.problems;
              v_places := v_places || v_bad.failed_places;
              return next;
            end loop;
            failed := 0;
            failed_problems := null;
            if v_refused then
              for keyring_id, version, refused, failed_keys in
                select r.keyring_id, r.version, count(*), array_agg(v_found.keys[r.place])
                from rekey._refused_rows(v_target.target, v_target.relation, v_found.ciphertexts, v_found.keys) r
                where r.place <> all (v_places)
                group by r.keyring_id, r.version
              loop
                return next;
              end loop;
            end if;
            refused := 0;
            failed_keys := null;
            v_opened := v_opened + cardinality(v_found.ciphertexts);
            if verification_id is not null then
              perform rekey._keep_pace(v_begin, v_opened);
            end if;
          end if;
          if v_found.next is not null then
            v_from := rekey._next_row(v_found.next);
          else
            v_first := v_first + v_step;
            v_from := format('(%s,0)', least(v_first, 4294967294))::tid;
          end if;
        end loop;
      end loop;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart or sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      keyring_id := null;
      error := rekey._explain_error(target, relation, sqlerrm, sqlstate, v_context, true);
      code := sqlstate;
      return next;
      error := null;
      code := null;
    end;
  end loop;
end
$$;
comment on function rekey._open_rows is
  'Counts as rekey._count_rows(), and opens every row that the verification did not check before (NULL: every row): failed_keys and failed_problems name what does not open; refused, with failed_keys, what opens and its table refused. A combination may come in several rows. apart: an error in a target is a row without keyring, and what came of it before is not to be trusted.';

-- To a snapshot from before it was rewritten, a table may be empty (ALTER TABLE). So the locks come first, and the snapshot of
-- the statement that counts after them.
create or replace function rekey._lock_targets(apart boolean = false) returns rekey._locked
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_locked rekey._locked;
  v_tables rekey._target[];
begin
  v_locked.functions := rekey._target_state();
  v_tables := array(select distinct on (t.target) t from rekey._targets() t where t.problem is null order by t.target);
  v_locked.errors := (
    select jsonb_agg(jsonb_build_object('target', t.target, 'relation', t.whole::oid::bigint, 'sqlstate', c.code,
      'error', rekey._explain_error(t.target, t.whole, c.error, c.code, c.context, true)))
    from rekey._call_count((select array_agg(t.function_name) from unnest(v_tables) t), (select array_agg(t.whole) from unnest(v_tables) t), '{}', apart) c
    join unnest(v_tables) with ordinality t on t.ordinality = c.place);
  v_locked.targets := array(
    select t from rekey._targets() t
    where t.problem is not null
      or t.target in (select l.target from unnest(v_tables) l except select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e)
    order by t.relation);
  return v_locked;
end
$$;
comment on function rekey._lock_targets is
  'Locks every target that is not blocked, with its partitions, until the transaction ends. apart: errors of one are told, and do not stop the others.';

create or replace function rekey._count(
  keyrings integer[], opening boolean, verification_id bigint = null, apart boolean = false, locked rekey._locked = null
)
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[],
               refused bigint, error text, code text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_locked rekey._locked := locked;
  v_targets rekey._target[];
  v_now rekey._target[];
begin
  if v_locked.functions is null then
    v_locked := rekey._lock_targets(apart);
  end if;
  perform rekey._refuse_blocked(keyrings, v_locked.targets);
  v_targets := array(select t from unnest(v_locked.targets) t where t.problem is null order by t.relation);
  return query
    select e.target, e.relation::regclass, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint, e.error, e.sqlstate
    from jsonb_to_recordset(v_locked.errors) as e(target text, relation oid, error text, sqlstate text);
  -- One statement, one snapshot: no row escapes by moving.
  if opening then
    return query select o.* from rekey._open_rows(v_targets, keyrings, verification_id, apart) o;
  else
    return query
      select t.target, t.relation, c.keyring_id, c.version, c.rows, 0::bigint, null::text[], null::text[], 0::bigint, null::text, null::text
      from rekey._count_rows(v_targets, keyrings) c join unnest(v_targets) with ordinality t on t.ordinality = c.place
      where c.keyring_id is not null;
  end if;
  v_now := array(select t from rekey._targets() t);
  perform rekey._refuse_blocked(keyrings, v_now);
  if rekey._target_state() is distinct from v_locked.functions
     or array(select t.relation from unnest(v_targets) t order by t.relation) is distinct from array(
       select t.relation from unnest(v_now) t
       where t.problem is null and t.target not in (select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e) order by t.relation) then
    raise exception 'a protected column or its partitions were changed while its rows were counted' using errcode = 'RK005',
      hint = 'Try again.';
  end if;
end
$$;
comment on function rekey._count is
  'Counts every target by keyring and version, in one snapshot; opening: checks every tag too, but those that the verification checked before (rekey._open_rows() says more of the columns). A combination may come in several rows. locked: what rekey._lock_targets() locked in this transaction; NULL: nothing yet. RK005: a target is blocked.';

create or replace function rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id bigint := nextval('rekey._pass_id');
  v_due bigint := (select sum(r.rows_total) from rekey.rotations r where r.id = any (rotations));
begin
  -- (They are locked: their sizes are those of what a snapshot from before sees, or larger.)
  with large as (
    insert into rekey._verified (verification_id, target, relation, system_identifier, filenode, functions, since)
    select v_id, t.target, t.relation, rekey._system_identifier(), pg_relation_filenode(t.relation), rekey._target_state(t.function_name), pg_snapshot_xmin(pg_current_snapshot())
    from unnest(targets) t
    where t.problem is null and pg_table_size(t.relation) > 2097152
      -- A few rows of an indexed table: the index finds them, and the last step opens them. (They are counted where few are due.)
      and not (t.indexed and v_due < 5000 and (
        select coalesce(sum(c.rows), 0) from rekey._call_count(array[t.function_name], array[t.relation], keyrings) c
        ) < least(pg_relation_size(t.relation) / current_setting('block_size')::integer, 5000))
    returning target, relation
  )
  insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
  select v_id, false, 'verify', l.target, l.relation, format('(%s,0)', f.first)::tid, least(f.first + s.chunk, s.blocks), (256 * rekey._batch_size(cardinality(rotations)))::integer
  from large l
  cross join lateral (
    select pg_relation_size(l.relation) / current_setting('block_size')::integer as blocks, rekey._chunk_blocks(l.relation) as chunk) s
  cross join lateral generate_series(0, s.blocks - 1, s.chunk) as f(first);
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r set verification_id = v_id where r.id = any (rotations) and r.state = 'verifying';
  return v_id;
end
$$;
comment on function rekey._begin_verification is 'Begins a verification of these rotations and their keyrings: splits what is large of these targets, which the caller has locked, into chunks. Returns its number.';

create or replace function rekey._verify_batch(who_else text, out event text, out keyring_count integer, out rows bigint, out wait interval, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_settings rekey.settings := rekey._settings();
  v_size double precision;
  v_max_rows integer;
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_target rekey._target;
  v_until bigint;
  v_found record;
  v_refused boolean;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where c.kind = 'verify' and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.verification_id = c.pass_id and r.state = 'verifying' and rekey._is_due(r.next_attempt_at))
  order by c.attempts > 0, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select rekey._batch_size(count(*)::integer) into v_size from rekey.rotations r where r.verification_id = v_chunk.pass_id;
  -- To check four rows costs about what it costs to re-encrypt one.
  select 4 * w.rows, w.wait into v_max_rows, wait from rekey._throttle((1000 * v_size)::integer) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;
  -- All of them: who leaves a verification does not come back to it.
  select array_agg(r.id order by r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
  from rekey.rotations r where r.verification_id = v_chunk.pass_id and r.state = 'verifying';
  if v_ids is null then
    return;
  end if;
  v_chunk := rekey._pace(v_chunk, who_else);
  perform rekey._take_in_hand(v_chunk.relation);
  begin
    event := 'checked';
    keyring_count := cardinality(v_ids);
    rows := 0;
    v_target := rekey._target_of(v_chunk);
    if v_target.problem is null then
      -- Reads nothing, but locks the table, so that what is found out about it remains true.
      perform from rekey._count_rows(array[v_target], '{}');
      v_target := rekey._target_of(v_chunk);
    end if;
    if v_target.problem is not null or rekey._checked_since(v_chunk.pass_id, v_target) is null then
      update rekey._chunks c set kind = 'doubtful' where c.id = v_chunk.id;
      return;
    end if;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_chunk.target and q.resolved_at is null and q.sqlstate is not null);
    loop
      v_until := least(rekey._block(v_chunk.first) + v_chunk.batch_blocks, v_chunk.until_block);
      select s.* into v_found from rekey._call_scan(v_target.function_name, v_chunk.relation, v_chunk.first,
        format('(%s,0)', v_until)::tid, v_keyrings, null, v_max_rows, (2097152 * v_size)::bigint) s;
      rows := rows + coalesce(cardinality(v_found.rows), 0);
      if exists (select from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization))
         or v_refused and exists (select from rekey._refused_rows(v_chunk.target, v_chunk.relation, v_found.ciphertexts, v_found.keys)) then
        insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
        values (v_chunk.pass_id, false, 'doubtful', v_chunk.target, v_chunk.relation, v_chunk.first,
          coalesce(rekey._block(v_found.next) + 1, v_until), v_chunk.batch_blocks);
      end if;
      v_chunk.first := coalesce(rekey._next_row(v_found.next), format('(%s,0)', v_until)::tid);
      if rekey._block(v_chunk.first) >= v_chunk.until_block then
        perform rekey._pass_on(v_chunk);
        exit;
      elsif v_settings.max_rows_per_second is not null or clock_timestamp() - v_begin >= v_settings.batch_target then
        update rekey._chunks c
        set first = v_chunk.first, attempts = 0, next_attempt_at = null,
            pace = v_chunk.pace, gives_way_to = v_chunk.gives_way_to, looked_at = v_chunk.looked_at, transactions = v_chunk.transactions
        where c.id = v_chunk.id;
        exit;
      end if;
    end loop;
    perform rekey._note_pace(v_begin, rows / 4);
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('verification', v_chunk.pass_id, 'target', v_chunk.target, 'rotations', v_ids[1:20],
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, true);
      -- Whom it concerns is found out by the last step, which opens these rows, and waits for nobody else's.
      update rekey._chunks c
      set attempts = c.attempts + 1, last_error = v_error, next_attempt_at = clock_timestamp() + least(power(2, c.attempts), 300) * interval '1 second',
          kind = case when not rekey._is_passing(sqlstate) or c.attempts >= 2 then 'doubtful' else c.kind end
      where c.id = v_chunk.id;
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._verify_batch is
  'Checks some rows of one chunk of a verification, if there is one that no other worker has in hand. Where one does not open, the relation is not as the verification found it, or an error comes again, it leaves them to the last step.';

-- To be taken for what it is, or for a table whose rows something hides: whoever emptied it says so.
create or replace function rekey._emptied(counted jsonb, keyrings integer[]) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_object_agg(e.keyring_id, e.targets)
  from (
    select h.keyring_id, jsonb_agg(jsonb_build_object('target', h.target, 'why',
      format('it held %s rows of the keyring at the last complete count, and holds none now: %s confirms that', h.rows, h.way)) order by h.target) as targets
    from (
      select c.label, s.key::integer, s.value::bigint, format('rekey.rebind_column(%L, %L), or pg-rekey columns rebind,', c.relation_name, c.column_name)
      from rekey.protected_columns c cross join lateral jsonb_each_text(c.seen) s
      union all
      select 'rekey.secrets', s.keyring_id, s.rows, format('rekey.confirm_emptied(%L), or pg-rekey keyrings confirm-emptied,', k.name)
      from rekey._secrets_seen s join rekey.keyrings k on k.id = s.keyring_id
    ) as h(target, keyring_id, rows, way)
    where h.rows >= 1000 and h.keyring_id = any (keyrings)
      and not exists (select from jsonb_to_recordset(counted) as f(target text, keyring_id integer, rows bigint)
                      where f.target = h.target and f.keyring_id = h.keyring_id and f.rows > 0)
    group by h.keyring_id) e;
end;
comment on function rekey._emptied is
  'By keyring, the protected columns, and rekey.secrets, that held 1,000 of its rows or more at their last complete count, and none at this one: what rotations have to wait for. counted: objects with target, keyring_id, rows.';

create or replace function rekey._note_seen(counted jsonb, keyrings integer[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_before jsonb;
  v_others integer[];
begin
  if keyrings = '{}' then
    return;
  end if;
  insert into rekey._secrets_seen (keyring_id, rows)
  select k.id, coalesce(f.opened, 0)
  from unnest(keyrings) as k(id)
  left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = 'rekey.secrets' and f.keyring_id = k.id
  on conflict (keyring_id) do update set rows = excluded.rows where _secrets_seen.rows <> excluded.rows;
  for v_column in select c.* from rekey.protected_columns c order by c.id loop
    v_before := v_column.seen;
    continue when v_before is null and rekey._column_problem(v_column) is not null;
    -- The first complete count: of the other keyrings that stand there, those of which a row opens.
    if v_column.seen is null then
      select array_agg(distinct c.keyring_id) into v_others
      from rekey._count_rows(rekey._targets_now(v_column.label), null) c
      where c.keyring_id <> all (keyrings);
      v_column.seen := coalesce((select jsonb_object_agg(o.id, 1) from unnest(v_others) as o(id) where rekey._any_opens(v_column.label, o.id)), '{}');
    end if;
    v_column.seen := v_column.seen || coalesce((
      select jsonb_object_agg(k.id, coalesce(f.opened, 0))
      from unnest(keyrings) as k(id)
      left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = v_column.label and f.keyring_id = k.id
      where f.opened > 0 or v_column.seen ? k.id::text), '{}');
    if v_column.seen is distinct from v_before and rekey._column_problem(v_column) is null then
      update rekey.protected_columns c set seen = v_column.seen where c.id = v_column.id;
    end if;
  end loop;
end
$$;
comment on function rekey._note_seen is
  'Notes how many rows of these keyrings a complete count saw in each protected column, and in rekey.secrets. counted: objects with target, keyring_id, opened.';

create or replace function rekey._any_opens(label text, keyring_id integer) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_step bigint;
  v_found record;
begin
  for v_target in select t.* from rekey._targets(label) t loop
    v_from := '(0,0)';
    while v_from is not null loop
      select s.* into v_found from rekey._scan_on(v_target, array[keyring_id], v_from, v_step) s;
      v_step := v_found.next_step;
      if cardinality(v_found.ciphertexts) > (
           select coalesce(sum(cardinality(c.failed_places)), 0) from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts, v_found.indexes, v_target.normalization) c) then
        return true;
      end if;
      v_from := v_found.next_first;
    end loop;
  end loop;
  return false;
end
$$;
comment on function rekey._any_opens is 'Whether a protected column holds a value of this keyring that opens.';

create or replace function rekey._refused_plain(label text, rotation_id bigint) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_found record;
  v_refused bigint := 0;
begin
  for v_target in
    select t.* from rekey._targets(label) t
    where t.problem is null and exists (
      select from rekey.rotation_failures q
      where q.rotation_id = _refused_plain.rotation_id and q.relation = t.relation::text and q.version is null and q.resolved_at is null)
  loop
    v_from := '(0,0)';
    while v_from is not null loop
      -- They stay locked until it is noted that they are not behind.
      select s.* into v_found from rekey._call_read(v_target.function_name, v_target.relation, v_from, '(4294967294,0)', null, null, 1000, 2097152) s;
      v_refused := v_refused + (
        select count(*) from unnest(v_found.keys) as k(row_key)
        where exists (
          select from rekey.rotation_failures q
          where q.rotation_id = _refused_plain.rotation_id and q.target = label and q.relation = v_target.relation::text
            and q.row_hash = rekey._row_hash(k.row_key) and q.version is null and q.resolved_at is null));
      v_from := rekey._next_row(v_found.next);
    end loop;
  end loop;
  return v_refused;
end
$$;
comment on function rekey._refused_plain is
  'How many rows of a column that hold no envelope this adoption has put into the quarantine. By their keys: an entry whose row is gone says nothing of a value that came meanwhile.';

-- What cannot be counted is not complete. The rotations of other keyrings go on.
create or replace function rekey._hold_blocked(rotations bigint[]) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocked jsonb := rekey._blocked_targets((select array_agg(r.keyring_id) from rekey.rotations r where r.id = any (rotations)));
begin
  if v_blocked is null then
    return null;
  end if;
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r
  set blocked_by = b.blocked, blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '10 seconds'
  from (
    select o.id, (
      select jsonb_agg(t.value order by t.value ->> 'target') from jsonb_array_elements(v_blocked) t
      left join rekey.protected_columns c on c.label = t.value ->> 'target'
      where c.id is null or rekey._may_hold(c, array[o.keyring_id])) as blocked
    from rekey.rotations o where o.id = any (rotations)) b
  where r.id = b.id and b.blocked is not null and r.state = 'verifying';
  return v_blocked;
end
$$;
comment on function rekey._hold_blocked is 'Has the rotations wait that a blocked target may hold rows of; returns which targets these are, NULL: none.';

create or replace function rekey._still_verifying(rotations bigint[]) returns integer[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  return array(select r.keyring_id from rekey.rotations r where r.id = any (rotations) and r.state = 'verifying');
end
$$;
comment on function rekey._still_verifying is 'Locks these rotations, and returns the keyrings of those that were not paused, superseded or rolled back.';

create or replace function rekey._verify(out event text, out keyring_count integer, out rows bigint, out detail jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_keyrings integer[];
  v_verification bigint;
  v_locked rekey._locked;
  v_results jsonb;
  v_found record;
  v_count record;
  v_error record;
  v_live integer[];
  v_targets text[];
  v_places oid[];
  v_of integer[];
  v_versions integer[];
  v_rows bigint[];
  v_failed_rows bigint[];
  v_refused_rows bigint[];
  v_errors jsonb := '[]'::jsonb;
  v_held jsonb;
  v_held_ids bigint[] := '{}'::bigint[];
  v_failed bigint;
  v_completed bigint[] := '{}'::bigint[];
  v_blocked jsonb;
  v_refused jsonb;
  v_adoptions jsonb;
  v_seen jsonb;
  v_emptied jsonb;
  v_unfilled text;
begin
  -- Those that begin a verification together, else those of one whose chunks are done.
  select array_agg(r.id), array_agg(r.keyring_id), r.verification_id into v_ids, v_keyrings, v_verification
  from rekey.rotations r
  where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
    and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')
  group by r.verification_id
  order by r.verification_id nulls first
  limit 1;
  if v_ids is null then
    return;
  end if;
  rows := 0;
  v_blocked := rekey._hold_blocked(v_ids);
  if v_blocked is not null then
    select array_agg(r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
    from rekey.rotations r where r.id = any (v_ids) and r.state = 'verifying' and rekey._is_due(r.next_attempt_at);
    if v_ids is null then
      event := 'blocked';
      keyring_count := 0;
      detail := jsonb_build_object('targets', v_blocked);
      return;
    end if;
  end if;
  begin
    v_locked := rekey._lock_targets(apart => true);
    if v_verification is null then
      v_verification := rekey._begin_verification(v_ids, v_keyrings, v_locked.targets);
      if exists (select from rekey._chunks c where c.pass_id = v_verification) then
        event := 'planned';
        keyring_count := cardinality(v_ids);
        detail := jsonb_build_object('verification', v_verification, 'rotations', v_ids[1:20]);
        return;
      end if;
    end if;
    for v_count in select c.* from rekey._count(v_keyrings, true, v_verification, apart => true, locked => v_locked) c loop
      -- Everything is counted by now, and the names of what failed are noted as they come: they may be too many for one value.
      if v_live is null then
        v_live := rekey._still_verifying(v_ids);
      end if;
      if v_count.error is not null then
        v_errors := v_errors || jsonb_build_object('target', v_count.target, 'relation', v_count.relation::oid, 'error', v_count.error, 'sqlstate', v_count.code);
        continue;
      end if;
      v_places := v_places || v_count.relation::oid;
      v_targets := v_targets || v_count.target;
      v_of := v_of || v_count.keyring_id;
      v_versions := v_versions || v_count.version;
      v_rows := v_rows || v_count.rows;
      v_failed_rows := v_failed_rows || v_count.failed;
      v_refused_rows := v_refused_rows || v_count.refused;
      if v_count.failed > 0 and v_count.keyring_id = any (v_live) then
        perform rekey._quarantine(v_count.target, v_count.relation, array_fill(v_count.keyring_id, array[cardinality(v_count.failed_keys)]),
          array_fill(v_count.version, array[cardinality(v_count.failed_keys)]), v_count.failed_keys, v_count.failed_problems,
          verification_id => v_verification);
      -- (After a rollback, what was refused may stand where it is to be.)
      elsif v_count.refused > 0
        and not exists (select from rekey.rotations r where r.id = any (v_ids) and (r.keyring_id, r.to_version) = (v_count.keyring_id, v_count.version)) then
        update rekey.rotation_failures q set verification_id = v_verification
        from unnest(v_count.failed_keys) as k(row_key)
        where q.keyring_id = v_count.keyring_id and q.target = v_count.target and q.relation = v_count.relation::text
          and q.row_hash = rekey._row_hash(k.row_key) and q.resolved_at is null;
      end if;
    end loop;
    with counted as (
      select u.* from unnest(v_targets, v_places, v_of, v_versions, v_rows, v_failed_rows, v_refused_rows)
        as u(target, relation, keyring_id, version, rows, failed, refused)
    ), summed as (
      select c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed - c.refused) filter (where c.version <> r.to_version) as behind
      from counted c
      join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids)
      group by c.keyring_id
    ), held as (
      -- Whose rows are in what raised: as it counted them, or, where it did not count, as far as is known.
      select distinct on (r.id) r.id, e.error, e.sqlstate, e.target, e.relation
      from jsonb_to_recordset(v_errors) as e(target text, relation oid, error text, sqlstate text)
      left join rekey.protected_columns p on p.label = e.target
      join rekey.rotations r on r.id = any (v_ids)
        and case when exists (select from counted c where c.relation = e.relation and c.target = e.target)
                 then exists (select from counted c where c.relation = e.relation and c.target = e.target and c.keyring_id = r.keyring_id)
                 else p.id is null or rekey._may_hold(p, array[r.keyring_id]) end
      order by r.id, e.target, e.relation
    )
    select (select jsonb_agg(to_jsonb(s)) from summed s), (select coalesce(jsonb_agg(to_jsonb(h)), '[]') from held h),
      (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
        select c.target, c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed) as opened from counted c where c.version > 0 group by c.target, c.keyring_id) t)
    into v_results, v_held, v_seen;
    v_emptied := rekey._emptied(v_seen, v_keyrings);
    -- Of an adoption, what is no envelope yet is behind, but for rows that were refused. (They are locked: so what is counted after
    -- them has them in it.)
    select jsonb_object_agg(r.id, rekey._refused_plain(p.label, r.id)) into v_refused
    from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
    where r.id = any (v_ids) and r.trigger = 'adoption';
    select jsonb_agg(to_jsonb(a)) into v_adoptions
    from (
      select r.id as rotation_id, p.label, (v_refused ->> r.id::text)::bigint as refused,
        (select sum(c.rows) from rekey._count_rows(rekey._targets_now(p.label), null) c where c.keyring_id is null) as rows
      from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
      where r.id = any (v_ids) and r.trigger = 'adoption') a;

    if v_live is null then
      v_live := rekey._still_verifying(v_ids);
    end if;
    for v_error in
      select h.error, h.sqlstate, h.target, h.relation, array_agg(h.id) as ids
      from jsonb_to_recordset(v_held) as h(id bigint, error text, sqlstate text, target text, relation oid) group by 1, 2, 3, 4
    loop
      perform rekey._record_error(v_error.ids, v_error.error, v_error.sqlstate, v_error.target, v_error.relation::regclass);
      v_held_ids := v_held_ids || v_error.ids;
    end loop;
    for v_found in
      select r.id, r.keyring_id, r.passes, coalesce(s.rows, 0) as rows, a.label as adopted,
        case when r.trigger <> 'adoption' then coalesce(s.behind, 0)
             else coalesce(a.rows, 0) - coalesce(a.refused, 0) end as behind,
        coalesce(a.rows, 0) = 0 as adopted_all
      from rekey.rotations r
      left join jsonb_to_recordset(v_results) as s(keyring_id integer, rows bigint, behind bigint) on s.keyring_id = r.keyring_id
      left join jsonb_to_recordset(v_adoptions) as a(rotation_id bigint, label text, rows bigint, refused bigint) on a.rotation_id = r.id
      where r.id = any (v_ids) and r.id <> all (v_held_ids) and r.state = 'verifying'  -- not paused, superseded or rolled back meanwhile
      order by r.id
    loop
      rows := rows + v_found.rows;
      if v_emptied ? v_found.keyring_id::text then
        update rekey.rotations r
        set blocked_by = v_emptied -> v_found.keyring_id::text, blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = clock_timestamp() + interval '10 seconds'
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.verification_id is distinct from v_verification
        and (q.version is not null or q.target = v_found.adopted and v_found.adopted_all);
      update rekey.rotation_failures q set rotation_id = v_found.id
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.rotation_id is distinct from v_found.id and q.verification_id = v_verification;
      select count(*) into v_failed from rekey.rotation_failures q
      where q.keyring_id = v_found.keyring_id and q.rotation_id = v_found.id and q.resolved_at is null;
      v_unfilled := case when v_found.adopted is null then rekey._unfilled(v_found.keyring_id, v_found.id) end;
      if v_found.behind > 0 or v_unfilled is not null then
        update rekey.rotations r
        set state = 'running', rows_failed = v_failed,
            blocked_by = case when v_found.behind > 0 then jsonb_build_array(jsonb_build_object('rows', v_found.behind, 'why', 'locked or moved'))
              else jsonb_build_array(jsonb_build_object('target', v_unfilled, 'why', 'its index is to be filled')) end,
            blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = case when v_found.passes > 1 then
              clock_timestamp() + least(power(2, v_found.passes - 2), 30) * interval '1 second' end
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotations r
      set state = case when v_failed > 0 then 'completed_with_failures' else 'completed' end, rows_failed = v_failed,
          rows_total = r.rows_done + v_failed,  -- what was written or deleted meanwhile needed no sweep
          blocked_by = null, blocked_since = null, next_attempt_at = null, verification_id = null, finished_at = clock_timestamp()
      where r.id = v_found.id;
      v_completed := v_completed || v_found.id;
      if v_found.adopted is null then
        perform rekey._complete_indexes(v_found.keyring_id, v_found.id, (
          select jsonb_agg(jsonb_build_object('target', u.target, 'version', u.version))
          from unnest(v_targets, v_of, v_versions) as u(target, keyring_id, version) where u.keyring_id = v_found.keyring_id and u.version > 0));
      end if;
    end loop;
    perform rekey._note_seen(v_seen, array(select r.keyring_id from rekey.rotations r where r.id = any (v_completed)));
    perform rekey._clear_chunks();
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.completed', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('state', r.state, 'rows', r.rows_done, 'failures', r.rows_failed)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_completed)), '[]'));
    event := case when v_completed <> '{}' then 'completed' when v_held_ids @> v_ids then 'error' else 'verified' end;
    keyring_count := cardinality(v_ids);
    detail := jsonb_strip_nulls(jsonb_build_object('rotations', v_ids[1:20], 'completed', v_completed[1:20], 'errors', nullif(v_errors, '[]')));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;
comment on function rekey._verify is
  'Begins the verification of rotations that passed the barrier; or ends one: opens what was not checked yet, and completes the rotations that have no row left on an older version.';

-- sql/code/62_destruction.sql
-- Destroying key versions, and retiring keyrings.

-- Who writes into a protected table by other means than our functions and triggers takes no lock on a version. He is waited
-- for, so that a version that he stores is not scheduled; the destruction itself waits for every older transaction.
create or replace function rekey._open_writers() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relations oid[];
  v_writers text[];
  v_relation regclass;
begin
  select array_agg(t.relation::oid) into v_relations from rekey._targets() t where t.target <> 'rekey.secrets';
  select array_agg(distinct l.virtualtransaction) into v_writers
  from pg_locks l
  where l.locktype = 'relation' and l.granted and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    and l.relation = any (v_relations) and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.pid is distinct from pg_backend_pid();
  for v_try in 1 .. 100 loop
    select l.relation into v_relation from pg_locks l where l.virtualtransaction = any (v_writers) and l.relation = any (v_relations) limit 1;
    if not found then
      return null;
    end if;
    perform pg_sleep(0.02);
  end loop;
  return format('a transaction that writes into %s is open', v_relation);
end
$$;
comment on function rekey._open_writers is 'Waits 2 seconds for the transactions that write into protected tables now. NULL: they have ended.';

create or replace function rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint = null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint := counted;
  v_failures bigint;
begin
  perform rekey._refuse_snapshot();
  perform rekey._refuse_needed(keyring.id, version);
  perform rekey._refuse_blocked();
  if not rekey._barrier(keyring.id, array[version]) then
    raise exception 'version % of keyring % is in use by an open transaction', version, quote_literal(keyring.name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(keyring.id, array[version]));
  end if;
  -- After the barrier, and in a statement of its own: it sees every row that was ever written with this version.
  if counted is null then
    select sum(c.rows) into v_rows from rekey._count(array[keyring.id], false) c where c.version = _refuse_in_use.version;
  end if;
  select count(*) into v_failures from rekey.rotation_failures f
  where f.keyring_id = keyring.id and f.version = _refuse_in_use.version and f.resolved_at is null;
  if v_rows > 0 or v_failures > 0 then
    raise exception 'version % of keyring % is in use: % rows, % rows in quarantine', version, quote_literal(keyring.name),
      coalesce(v_rows, 0), v_failures using errcode = 'RK005',
      hint = 'Rotate the keyring, and resolve its failures: rekey.rotate_keys(), rekey.failure_status.', constraint = 'rotate_and_resolve';
  end if;
end
$$;
comment on function rekey._refuse_in_use is 'RK005 where a rotation, an open transaction, a row or a row in quarantine still needs the version. counted: its rows, where they were counted after the last transaction had ended that could write one; NULL: count them.';

-- From here on the triggers of protected columns refuse what stands on the version (52_protect.sql).
create or replace function rekey._schedule_destruction(keyring text, version integer, wait interval) returns timestamptz
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_wait interval := coalesce(wait, (rekey._settings()).destroy_wait);
  v_writing text;
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
begin
  if v_wait not between '0 s' and '3650 days' then
    raise exception 'wait is between 0 and 3650 days' using errcode = 'invalid_parameter_value';
  end if;
  v_writing := rekey._open_writers();  -- before anything is locked
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('decrypt_only', 'disabled', 'compromised') then
    raise exception 'version % is %: it cannot be scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  if v_writing is not null then
    raise exception '%: what it stores may need version %', v_writing, version using errcode = 'RK005', hint = 'Try again when it has ended.';
  end if;
  perform rekey._refuse_in_use(v_keyring, version);
  perform rekey._move_key(v_key, 'destroy_scheduled', 'key.destroy_scheduled', null, now() + v_wait);
  return now() + v_wait;
end
$$;
comment on function rekey._schedule_destruction is 'What rekey.schedule_key_destruction() does with the rights of rekey_owner.';
grant execute on function rekey._schedule_destruction to rekey_admin;

create or replace function rekey._destroyable_header(keyring text, version integer) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select rekey._header(k.keyring_id, k.version)
    from rekey.encryption_keys k join rekey.keyrings r on r.id = k.keyring_id
    where r.name = keyring and k.version = _destroyable_header.version and k.state in ('decrypt_only', 'disabled', 'compromised')
      and (rekey._settings()).destroy_search = 'database');
end
$$;
comment on function rekey._destroyable_header is 'What the envelopes of a version begin with; NULL where it cannot be destroyed, or is not looked for outside of protected columns.';
grant execute on function rekey._destroyable_header to rekey_admin;

create or replace function rekey.schedule_key_destruction(keyring text, version integer, wait interval = null) returns timestamptz
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_header bytea := rekey._destroyable_header(keyring, version);
begin
  -- Before anything is locked.
  if v_header is not null then
    perform rekey._look_ahead(v_header);
  end if;
  return rekey._schedule_destruction(keyring, version, wait);
end
$$;
comment on function rekey.schedule_key_destruction is
  'Schedules a version for destruction and returns the time before which it is not destroyed. wait: 0 to 3650 days; NULL: the setting destroy_wait. Until then it opens nothing, nothing that stands on it can be stored in a protected column, and it can be cancelled. When the time has come, rekey.tick() looks for it in the whole database (rekey.search_status), and destroys it where nothing was found and everything could be read. Warnings tell where this call finds it already, with the rights of the caller, in 2 seconds at most. 25001: not in READ COMMITTED; RK005: something still needs it; RK006: its state does not allow it; RK007: there is none.';
grant execute on function rekey.schedule_key_destruction to rekey_admin;

create or replace function rekey.cancel_key_destruction(keyring text, version integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'destroy_scheduled' then
    raise exception 'version % is %, not scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, v_key.scheduled_from, 'key.destroy_cancelled', null);
  -- Scheduled again, it is looked for again.
  delete from rekey._search_versions v where (v.keyring_id, v.version) = (v_keyring.id, cancel_key_destruction.version);
end
$$;
comment on function rekey.cancel_key_destruction is 'Cancels a scheduled destruction: the version returns to the state it came from. RK006: none is scheduled; RK007: there is no such version.';
grant execute on function rekey.cancel_key_destruction to rekey_admin;

create or replace function rekey._postpone(keyrings integer[], versions integer[], reason text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_events jsonb;
begin
  perform from rekey.keyrings r where r.id = any (keyrings) order by r.id for no key update;
  with postponed as (
    update rekey.encryption_keys k set destroy_after = now() + interval '1 day'
    from unnest(keyrings, versions) as u(keyring_id, version)
    where k.keyring_id = u.keyring_id and k.version = u.version and k.state = 'destroy_scheduled'
    returning k.keyring_id, k.version
  )
  select jsonb_agg(jsonb_build_object('event', 'key.destroy_scheduled', 'keyring', r.name, 'version', p.version,
    'details', jsonb_build_object('postponed', reason, 'destroy_after', now() + interval '1 day')) order by r.name, p.version)
  into v_events
  from postponed p join rekey.keyrings r on r.id = p.keyring_id;
  if v_events is not null then
    update rekey._worker w
    set last_error = format('destructions: version %s of keyring %s%s waits another day: %s', v_events -> 0 ->> 'version', v_events -> 0 ->> 'keyring',
          case when jsonb_array_length(v_events) > 1 then format(', and %s more,', jsonb_array_length(v_events) - 1) else '' end, reason),
        last_error_at = clock_timestamp()
    where w.singleton;
    perform rekey._audit_all(v_events);
  end if;
end
$$;
comment on function rekey._postpone is 'Has versions wait one more day for their destruction, and says why: in the audit log and rekey.worker_status.';

create or replace function rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_postponed text := elsewhere;
begin
  perform rekey._lock_kek();  -- first, as everywhere: a KEK rotation holds every key
  v_keyring := rekey._keyring(rekey._keyring_name(keyring_id), lock => true);
  v_key := rekey._key(keyring_id, version);
  if v_key.state <> 'destroy_scheduled' or v_key.destroy_after > now() then
    return;
  end if;
  if v_postponed is null then
    begin
      perform rekey._refuse_in_use(v_keyring, version, rows);
    exception when sqlstate 'RK005' then
      v_postponed := sqlerrm;
    end;
  end if;
  if v_postponed is not null then
    -- The next attempt looks anew.
    delete from rekey._search_versions v where (v.keyring_id, v.version) = (_destroy.keyring_id, _destroy.version);
    perform rekey._postpone(array[keyring_id], array[version], v_postponed);
    return;
  end if;
  update rekey.encryption_keys k
  set state = 'destroyed', wrapped_key = null, destroyed_at = now(), scheduled_from = null
  where k.id = v_key.id;
  update rekey._blind_indexes b set versions = array_remove(b.versions, _destroy.version)
  from rekey.protected_columns c where c.id = b.column_id and c.keyring_id = _destroy.keyring_id and _destroy.version = any (b.versions);
  perform rekey._audit('key.destroyed', v_keyring.name, version);
end
$$;
comment on function rekey._destroy is 'Destroys a version that is due, or postpones it where something needs it. rows: as counted; elsewhere: where the search found it, NULL: nowhere.';

-- One key, one short transaction: who answers to a compromise does not wait behind those that are due.
create or replace function rekey._destruction_step(clock_jumped boolean) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
  v_keyrings integer[];
  v_versions integer[];
  v_covered integer;
  v_next record;
  v_problem text;
begin
  -- After a jump of the clock, what is due within the day may only seem so too.
  select array_agg(k.keyring_id order by k.id), array_agg(k.version order by k.id) into v_keyrings, v_versions
  from rekey.encryption_keys k
  where k.state = 'destroy_scheduled' and k.destroy_after <= now() + case when clock_jumped then interval '1 day' else interval '0' end;
  if v_keyrings is null then
    perform rekey._expect_none_doomed();
    return null;
  elsif clock_jumped then
    perform rekey._postpone(v_keyrings, v_versions, 'more than a day since the last tick: the clock may be wrong');
    return null;
  elsif not pg_try_advisory_xact_lock(0, 5) then
    return null;  -- another worker is at it
  end if;
  v_search := rekey._open_search();
  select count(*) into v_covered from unnest(v_keyrings, v_versions) as u(keyring_id, version)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version;
  if v_search.id is null or v_search.scope <> (rekey._settings()).destroy_search or v_covered = 0
     or v_search.state = 'complete' and v_search.completed_at not between now() - interval '36 hours' and clock_timestamp()
     or v_search.state <> 'complete' and v_search.postponed and v_covered < cardinality(v_keyrings) then
    perform rekey._begin_search();
    return 'search';
  elsif v_search.state <> 'complete' and v_search.incomplete_since is null then
    return 'search';
  elsif v_search.state <> 'complete' and v_search.postponed then
    -- The day after: somebody may have granted what was missing.
    update rekey._search_relations r set tried_by = '{}', problem = null where r.search_id = v_search.id and r.problem is not null;
    update rekey._searches s set incomplete_since = null, postponed = false where s.id = v_search.id;
    return 'search';
  elsif v_search.state <> 'complete' then
    update rekey._searches s set postponed = true where s.id = v_search.id;
    perform rekey._postpone(v_keyrings, v_versions, coalesce(rekey._search_problem(v_search.id), 'the search of the database is not complete'));
    return null;
  end if;

  if v_search.counted_as is distinct from rekey._target_state() or v_search.counted_at not between now() - interval '1 hour' and clock_timestamp()
     or exists (select from unnest(v_keyrings, v_versions) as u(keyring_id, version)
                join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version and v.rows is null) then
    -- Once for all that are due; nobody is kept waiting by it.
    begin
      with counted as materialized (
        select c.keyring_id, c.version, sum(c.rows) as rows from rekey._count(v_keyrings, false) c group by c.keyring_id, c.version
      )
      update rekey._search_versions v
      set rows = coalesce((select c.rows from counted c where c.keyring_id = v.keyring_id and c.version = v.version), 0)
      where v.search_id = v_search.id and v.keyring_id = any (v_keyrings);
      update rekey._searches s set counted_at = now(), counted_as = rekey._target_state() where s.id = v_search.id;
    exception when sqlstate 'RK005' then
      v_problem := sqlerrm;
    end;
    if v_problem is not null then
      perform rekey._postpone(v_keyrings, v_versions, v_problem);
      return null;
    end if;
    return 'more';
  end if;

  select v.keyring_id, v.version, v.rows,
    (select string_agg(format('%s.%I', f.relation_name, f.column_name), ', ' order by f.relation_name, f.column_name) || format(' holds envelopes of the version, in %s rows: see rekey.search_findings', sum(f.rows))
     from rekey._search_finds f where f.search_id = v.search_id and f.keyring_id = v.keyring_id and f.version = v.version) as elsewhere
  into v_next
  from unnest(v_keyrings, v_versions) with ordinality as u(keyring_id, version, place)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version
  order by u.place limit 1;
  perform rekey._destroy(v_next.keyring_id, v_next.version, v_next.rows, v_next.elsewhere);
  return 'more';
end
$$;
comment on function rekey._destruction_step is
  'Destroys one version that is due, or does what has to be done before. search: it takes steps of the search, which read with the rights of who calls them; more: call again; NULL: there is nothing left to do now.';

create or replace function rekey.retire_keyring(name text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(name, lock => true);
  v_key rekey.encryption_keys;
  v_rows bigint;
  v_rotation bigint;
begin
  perform rekey._refuse_snapshot();
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired already', quote_literal(name) using errcode = 'RK006';
  end if;
  select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state);
  if found then
    raise exception 'keyring % is under way in rotation %', quote_literal(name), v_rotation using errcode = 'RK004';
  end if;
  select * into v_key from rekey.encryption_keys k where k.keyring_id = v_keyring.id and k.state = 'active' for update;
  -- Held till the end: a writer that comes now finds no active version afterwards.
  if not pg_try_advisory_xact_lock(v_keyring.id, v_key.version) then
    raise exception 'keyring % is in use by an open transaction', quote_literal(name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(v_keyring.id, array[v_key.version]));
  end if;
  perform rekey._refuse_blocked();
  select sum(c.rows) into v_rows from rekey._count(array[v_keyring.id], false) c;
  if v_rows > 0 then
    raise exception 'keyring % is in use: % rows', quote_literal(name), v_rows using errcode = 'RK005',
      hint = 'Delete its rows, or move them to another keyring, first.';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now() where k.id = v_key.id;
  update rekey.keyrings k set retired_at = now(), rotated_at = now(), rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.retired', 'keyring', name),
    jsonb_build_object('event', 'key.deactivated', 'keyring', name, 'version', v_key.version)));
end
$$;
comment on function rekey.retire_keyring is
  'Retires a keyring that no row uses any more: it takes no new values and is not rotated, and its last version can be destroyed. 25001: not in READ COMMITTED; RK004: a rotation is under way; RK005: rows or open transactions use it; RK006: retired already; RK007: there is none.';
grant execute on function rekey.retire_keyring to rekey_admin;

-- sql/code/62_search.sql
-- The search of the whole database for envelopes of versions that are to be destroyed.
--
-- Steps, each a transaction of its own. They read with the rights of whoever calls them, since rekey_owner may read nobody's
-- tables; what they find is noted by definer functions that believe nobody but the step itself (_refuse_forger).
--
-- 1. Every relation of some size is read, some blocks at a turn. `since` is the oldest transaction under way at its first turn.
-- 2. Every transaction that is older than the end of that has to end: what it stores, or a snapshot of its shows, is seen by 3.
-- 3. A look at everything, in one snapshot: rows that `since` or a later transaction wrote, and whole relations that are
--    small, or new. All other rows were there, under the same row pointer, when their blocks were read (61_verify.sql).
--    What is large, and was made, rewritten, or given another column since its turns, goes back to 1.
--
-- Whatever is not read, for whatever reason, may hold an envelope.

-- Patterns and why: 54_find.sql. JSON may have a backslash before a slash.
create or replace function rekey._hits(place integer, value text, wanted bytea[]) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_backslash text := chr(92);  -- a literal depends on the settings of the session in which it is read first
  v_pieces text[];
  v_piece text;
  v_header bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  -- Assignments: a value may be plain, and must not become the parameter of a statement.
  if strpos(value collate "C", 'rk1:UksB') > 0 then
    v_pieces := string_to_array(value, 'rk1:UksB');
    foreach v_piece in array v_pieces[2:] loop
      v_piece := replace(left(v_piece, 200), v_backslash || '/', '/');
      if v_piece collate "C" ~ '^[A-Za-z0-9+/]{96}' then
        v_header := substr(decode('UksB' || left(v_piece, 12), 'base64'), 1, 11);
        if v_header = any (wanted) and v_header <> all (v_found) then
          v_found := v_found || v_header;
        end if;
      end if;
    end loop;
  end if;
  if strpos(value collate "C", v_backslash || 'x524b01') > 0 then
    v_pieces := string_to_array(value, v_backslash || 'x524b01');
    foreach v_piece in array v_pieces[2:] loop
      if left(v_piece, 144) collate "C" ~ '^[0-9a-f]{144}' then
        v_header := decode('524b01' || left(v_piece, 16), 'hex');
        if v_header = any (wanted) and v_header <> all (v_found) then
          v_found := v_found || v_header;
        end if;
      end if;
    end loop;
  end if;
  v_piece := null;
  foreach v_header in array v_found loop
    v_piece := concat_ws(' ', v_piece, place || ':' || encode(v_header, 'hex'));
  end loop;
  return v_piece;
end
$$;
comment on function rekey._hits(integer, text, bytea[]) is 'The wanted headers of envelopes that stand within a text, as place:hex, separated by spaces; NULL: none.';
grant execute on function rekey._hits(integer, text, bytea[]) to rekey_operator;

create or replace function rekey._hits(place integer, value bytea, wanted bytea[]) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_value bytea := value || ''::bytea;  -- decompressed once
  v_first bytea := decode('524b01', 'hex');
  v_from integer := 1;
  v_window bytea;
  v_at integer;
  v_text text;
  v_header bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  -- In windows that overlap: a value that is full of beginnings is not copied for each of them.
  while v_from <= octet_length(v_value) - 2 loop
    v_window := substr(v_value, v_from, 8192);
    loop
      v_at := position(v_first in v_window);
      exit when v_at = 0;
      v_from := v_from + v_at + 2;
      v_window := substr(v_window, v_at + 3);
      v_header := substr(v_value, v_from - 3, 11);
      if v_header = any (wanted) and v_header <> all (v_found) and octet_length(v_value) >= v_from + 71 then
        v_found := v_found || v_header;
      end if;
    end loop;
    v_from := v_from + greatest(octet_length(v_window) - 2, 0);
  end loop;
  v_text := null;
  foreach v_header in array v_found loop
    v_text := concat_ws(' ', v_text, place || ':' || encode(v_header, 'hex'));
  end loop;
  if position(convert_to('rk1:UksB', 'UTF8') in v_value) > 0 then
    v_text := concat_ws(' ', v_text, rekey._hits(place, replace(encode(v_value, 'escape'), repeat(chr(92), 2), chr(92)), wanted));
  end if;
  return nullif(v_text, '');
end
$$;
comment on function rekey._hits(integer, bytea, bytea[]) is 'As for text, of bytes: envelopes at their beginning or within, and their text form.';
grant execute on function rekey._hits(integer, bytea, bytea[]) to rekey_operator;

-- Planning a query computes constant parts of the expressions of indexes and statistics, with the rights of who reads: code
-- of whoever may make an index on a table, which a superuser would run.
create or replace function rekey._code_of_others(relation oid, reader name) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (PL/pgSQL keeps the plan: there may be many relations.)
  return (
  select format('%s calls %s, of role %I', o.name, p.oid::regprocedure, w.rolname)
  from (
    select 'pg_class'::regclass as catalog, i.indexrelid as oid, format('index %s', i.indexrelid::regclass) as name
    from pg_index i where i.indrelid = relation and (i.indexprs is not null or i.indpred is not null)
    union all
    select 'pg_statistic_ext'::regclass, s.oid, format('statistics %I.%I', n.nspname, s.stxname)
    from pg_statistic_ext s join pg_namespace n on n.oid = s.stxnamespace where s.stxrelid = relation and s.stxexprs is not null
  ) o
  join pg_depend d on d.classid = o.catalog and d.objid = o.oid and d.refclassid in ('pg_proc'::regclass, 'pg_operator'::regclass)
  left join pg_operator r on d.refclassid = 'pg_operator'::regclass and r.oid = d.refobjid
  join pg_proc p on p.oid = coalesce(r.oprcode::oid, d.refobjid)
  join pg_roles w on w.oid = p.proowner
  where not w.rolsuper and w.rolname is distinct from reader
  limit 1);
end
$$;
comment on function rekey._code_of_others is 'A function of neither a superuser nor the reader that reading a relation may run; NULL: there is none.';
grant execute on function rekey._code_of_others to rekey_operator, rekey_auditor;

create or replace function rekey._hold(relation oid, name text) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '3 s'  -- longer than deadlock_timeout: autovacuum gives way
as $$
declare
  v_reader name;
  v_owner record;
  v_code text;
begin
  -- Whom a function runs as is not all: it can RESET ROLE to the one who logged in.
  -- (Of all sessions, only this one is asked for: there may be many relations.)
  select case when r.rolname = session_user and session_user = current_user then current_user end into v_reader
  from pg_stat_get_activity(pg_backend_pid()) a join pg_roles r on r.oid = a.usesysid;
  select c.relkind, r.rolname, r.rolsuper into v_owner from pg_class c join pg_roles r on r.oid = c.relowner where c.oid = relation;
  if not found then
    return 'it was dropped';
  end if;
  if not v_owner.rolsuper and v_owner.rolname is distinct from v_reader then
    -- From here on nobody makes an index on it. (Who may only SELECT may not lock it so.)
    if v_owner.relkind = 'r' and has_table_privilege(relation, 'update, delete, truncate') then
      execute format('lock table only %s in share update exclusive mode', relation::regclass);
    elsif v_owner.relkind = 'm' and (select u.rolsuper from pg_roles u where u.rolname = current_user) then
      execute format('comment on materialized view %s is null', relation::regclass);  -- the only lock there is; the caller takes it back
    end if;
  end if;
  -- What is read by that name must be what was looked at: from here on the lock keeps it.
  if to_regclass(name) is distinct from relation::regclass then
    raise exception '% is another relation now', name using errcode = 'undefined_table';
  end if;
  v_code := rekey._code_of_others(relation, v_reader);
  return v_code || ': it can have the table read by connecting itself; or, if you trust that code, give the function to a superuser';
end
$$;
comment on function rekey._hold is 'Keeps a relation from being given code until the subtransaction of the caller ends, which he undoes, and says why he is not to read it; NULL: nothing. name: by which he reads it; 42P01: it is another one''s.';
grant execute on function rekey._hold to rekey_operator, rekey_auditor;


-- What holds no rows here is left out: views, partitioned and foreign tables. So is what belongs to PostgreSQL itself, to
-- pg_rekey, pg_cron and Supabase Vault: by owner or extension, since a name proves nothing.
create or replace function rekey._searchable(only_one oid = null)
returns table (relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, problem text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with counted as materialized (
      -- Values of these are counted by their own functions. (In a text column, an envelope may stand within another text.)
      select h.oid as relation, a.attname
      from rekey.protected_columns p
      cross join lateral rekey._column_shape(p.id) s
      join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.places[1]]
      cross join lateral rekey._relations_here(s.relation) as h(oid)
      where not p.is_text
    ), altered as materialized (
      -- Asked for the size of these, we would wait.
      select l.relation from pg_locks l where l.locktype = 'relation' and l.mode = 'AccessExclusiveLock' and l.granted and l.pid is distinct from pg_backend_pid()
    )
    select c.oid, c.oid::regclass::text,
      case when c.oid in (select a.relation from altered a) then greatest(c.relpages, 0)::bigint * current_setting('block_size')::integer else pg_table_size(c.oid) end,
      c.relfilenode, m.amname = 'heap',
      format('select count(*) as rows, bool_and(t.tableoid = %s) as same, string_agg(f.hits, '' '') as hits from only %s t
        cross join lateral (select nullif(array_to_string(array[%s], '' ''), '''') as hits offset 0) f%s',
        c.oid, c.oid::regclass, k.hits,
        case when m.amname = 'heap' then ' where t.ctid >= $2 and t.ctid < $3 and ($4 is null or age(t.xmin) <= age($4))' end),
      case when rekey._is_of_citus(c.oid) then 'its rows are on other nodes of Citus' end
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    left join pg_am m on m.oid = c.relam
    cross join lateral (
      -- An envelope has 75 bytes or more, which no compression of values makes fewer.
      select string_agg(format(case
          when v.base = 'bytea'::regtype then
            $q$case when pg_column_size(%1$s) >= 75 and (position('\x524b01'::bytea in %1$s) > 0 or position('\x726b313a556b7342'::bytea in %1$s) > 0)
              then rekey._hits(%2$s, %1$s::bytea, $1) end$q$
          when v.base in ('text'::regtype, 'varchar'::regtype) then
            -- Most values that have one are one, of another version.
            $q$case when pg_column_size(%1$s) >= 75 and (strpos(%1$s collate "C", 'rk1:UksB') > 0 or strpos(%1$s collate "C", '\x524b01') > 0)
              and case when %1$s collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12,}={0,2}$' then substr(decode(substr(%1$s, 5, 16), 'base64'), 1, 11) = any ($1) else true end
              then rekey._hits(%2$s, %1$s::text, $1) end$q$
          else $q$case when pg_column_size(%1$s) >= 75 and format('%%s', %1$s) collate "C" ~ 'rk1:UksB|\\x524b01' then rekey._hits(%2$s, format('%%s', %1$s), $1) end$q$ end,
        format('t.%I', a.attname), a.attnum), ', ' order by a.attnum) as hits
      from pg_attribute a
      join pg_type y on y.oid = a.atttypid
      left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
      cross join lateral (select case when y.typtype = 'd' and y.typnamespace = 'pg_catalog'::regnamespace then y.typbasetype else y.oid end as base) v
      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v'
        -- As in rekey.find_envelopes().
        and coalesce(e.typlen, y.typlen) not between 1 and 74 and coalesce(e.typcategory, y.typcategory) not in ('N', 'B', 'D', 'T', 'E', 'G', 'I', 'V')
        and not exists (select from counted p where p.relation = c.oid and p.attname = a.attname)
    ) k
    where (only_one is null or c.oid = only_one) and c.relkind in ('r', 'm') and c.relpersistence <> 't' and c.relispopulated and c.oid >= 16384 and k.hits is not null
      and not (n.nspname in ('rekey', 'rekey_targets') and c.relowner = 'rekey_owner'::regrole)
      and not rekey._is_extension_table(c.oid);
end
$$;
comment on function rekey._searchable is
  'The relations of this database, or only one, that have room for an envelope where no target counts it, and the statement that reads one: $1 the headers wanted, of a heap $2 and $3 a range of row pointers, $4 the transaction from which on rows are read, NULL: all. problem: why it cannot be read.';
grant execute on function rekey._searchable to rekey_operator;

-- Whom to believe. The call stack says who calls, in whatever language: its second line begins as the first one does.
create or replace function rekey._refuse_forger(stack text, callee text, caller text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not starts_with(split_part(stack, E'\n', 2), split_part(stack, callee, 1) || caller || ' ') then
    raise exception 'only a step of the search may say what it found' using errcode = 'insufficient_privilege';
  end if;
end
$$;
comment on function rekey._refuse_forger is '42501 where a function was not called by the one that may, directly and in an assignment. stack: PG_CONTEXT of the function.';

create or replace function rekey._older_transactions(older xid8, since timestamptz) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_stat_clear_snapshot();
  -- Who sends WAL or vacuums writes nothing into a table, and may have a snapshot for ever.
  return (
    select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('pid', o.pid, 'role', o.role, 'prepared', o.gid,
      'age_seconds', extract(epoch from clock_timestamp() - coalesce(o.begun, since))::bigint)))
    from (
      select a.pid, a.usename as role, null as gid, a.xact_start as begun
      from pg_stat_activity a
      where a.datname = current_database() and a.pid <> pg_backend_pid()
        and (age(a.backend_xid) > age(older::xid) or age(a.backend_xmin) > age(older::xid))
        and not exists (select from pg_stat_get_wal_senders() w where w.pid = a.pid)
        and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid)
      union all
      select null, p.owner, p.gid, p.prepared from pg_prepared_xacts p
      where p.database = current_database() and age(p.transaction) > age(older::xid)) o);
end
$$;
comment on function rekey._older_transactions is
  'Who in this database has a transaction older than this one, or a snapshot from before it; NULL: nobody. since: what counts as the beginning of a transaction whose own is hidden from us.';

create or replace function rekey._open_search() returns rekey._searches
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  -- (Restored from a dump, or made by the clock of another time, it says nothing.)
  select s.* into v_search from rekey._searches s
  where s.home = rekey._home() and s.begun_at <= clock_timestamp()
    and coalesce(pg_snapshot_xmax(pg_current_snapshot())::text::bigint - s.begun_in::text::bigint, 0) between 0 and 1000000000
  order by s.id desc limit 1;
  return v_search;
end
$$;
comment on function rekey._open_search is 'The last search of this database, whatever its state; no row: NULL.';

create or replace function rekey._begin_search() returns rekey._searches
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  perform rekey._expect_doomed();  -- whatever a restore may have made of it
  delete from rekey._searches s where s.id is not null;
  insert into rekey._searches (home, scope, begun_in)
  values (rekey._home(), (rekey._settings()).destroy_search, pg_current_xact_id()) returning * into v_search;
  insert into rekey._search_versions (search_id, keyring_id, version)
  select v_search.id, k.keyring_id, k.version from rekey.encryption_keys k where k.state = 'destroy_scheduled';
  if v_search.scope = 'database' then
    -- Small relations are left to the look, up to 128 MB of them.
    insert into rekey._search_relations (search_id, relation, name, bytes)
    select v_search.id, r.relation, r.name, r.bytes
    from (select t.*, sum(t.bytes) over (order by t.bytes, t.relation rows unbounded preceding) as total from rekey._searchable() t) r
    where (r.bytes > 1048576 or r.total > 134217728) and r.problem is null and r.is_heap;
  end if;
  return v_search;
end
$$;
comment on function rekey._begin_search is 'Begins a search for every version that is scheduled for destruction, in place of the last one.';

create or replace function rekey.begin_search() returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  perform rekey._refuse_snapshot();
  if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then
    raise exception 'no version is scheduled for destruction' using errcode = 'RK006', hint = 'rekey.schedule_key_destruction() schedules one.',
      constraint = 'schedule_destruction';
  end if;
  perform pg_advisory_xact_lock(0, 5);
  v_search := rekey._open_search();
  if v_search.id is null or v_search.state = 'complete' or v_search.scope <> (rekey._settings()).destroy_search or exists (
       select from rekey.encryption_keys k where k.state = 'destroy_scheduled'
         and not exists (select from rekey._search_versions v where v.search_id = v_search.id and (v.keyring_id, v.version) = (k.keyring_id, k.version))) then
    v_search := rekey._begin_search();
  else
    update rekey._search_relations r set tried_by = '{}', problem = null where r.search_id = v_search.id and r.problem is not null;
    update rekey._searches s set incomplete_since = null where s.id = v_search.id;
  end if;
  return v_search.id;
end
$$;
comment on function rekey.begin_search is
  'Begins a search of the database for envelopes of every version that is scheduled for destruction; or has the one under way try again what it could not read. Returns its number. rekey.search_step(), repeated, does the work, with the rights of its caller. 25001: not in READ COMMITTED; RK006: none is scheduled.';
grant execute on function rekey.begin_search to rekey_admin, rekey_operator;

create or replace function rekey._search_turn(reader text, out event text, out search_id bigint, out relation oid, out name text, out statement text,
  out first bigint, out until bigint, out wanted bytea[], out wait interval, out detail jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
  v_relation rekey._search_relations;
  v_found record;
  v_rows integer;
begin
  perform rekey._refuse_snapshot();
  if not pg_try_advisory_xact_lock(0, 5) then
    event := 'waiting';
    wait := '1 s';
    return;
  end if;
  v_search := rekey._open_search();
  if v_search.id is null or v_search.state = 'complete' then
    event := 'idle';
    return;
  elsif v_search.begun_in = pg_current_xact_id_if_assigned() then
    event := 'waiting';  -- until then nobody else knows that the versions are to be destroyed
    wait := '0 s';
    detail := jsonb_build_object('for', 'COMMIT of this transaction');
    return;
  end if;
  search_id := v_search.id;
  wanted := array(select rekey._header(v.keyring_id, v.version) from rekey._search_versions v where v.search_id = v_search.id);
  select r.* into v_relation from rekey._search_relations r
  where r.search_id = v_search.id and r.state = 'pending' and r.tried_by @> array[reader] is false
  order by r.next_block > 0 desc, r.bytes, r.relation limit 1;
  if found then
    select t.* into v_found from rekey._searchable(v_relation.relation) t;
    if not found then
      delete from rekey._search_relations r where (r.search_id, r.relation) = (v_search.id, v_relation.relation);
      event := 'begun';
      return;
    end if;
    if v_relation.since is null or v_relation.statement is distinct from v_found.statement then
      delete from rekey._search_finds f where (f.search_id, f.relation) = (v_search.id, v_relation.relation);
      v_relation.next_block := 0;
      v_relation.since := pg_snapshot_xmin(pg_current_snapshot());
      -- (Of rows that come later, the look sees all.)
      update rekey._search_relations r
      set since = v_relation.since, statement = v_found.statement, name = v_found.name, next_block = 0, rows = 0, filenode = null,
          blocks = pg_relation_size(v_relation.relation) / current_setting('block_size')::integer
      where (r.search_id, r.relation) = (v_search.id, v_relation.relation);
    end if;
    -- Four rows that are read cost about what it costs to re-encrypt one.
    select w.rows, w.wait into v_rows, wait from rekey._throttle(100000) w;
    if v_rows is null then
      event := 'waiting';
      return;
    end if;
    event := 'read';
    relation := v_relation.relation;
    name := v_found.name;
    statement := v_found.statement;
    first := v_relation.next_block;
    until := first + case when v_rows = 100000 then v_relation.batch_blocks else least(v_relation.batch_blocks, greatest(v_rows / 8, 1)) end;
    return;
  end if;
  if exists (select from rekey._search_relations r where r.search_id = v_search.id and r.state = 'pending')
     or exists (select from rekey._search_relations r where r.search_id = v_search.id and r.problem is not null and r.tried_by @> array[reader]) then
    update rekey._searches s set incomplete_since = coalesce(s.incomplete_since, now()) where s.id = v_search.id;
    event := 'incomplete';
    return;
  end if;
  -- What these store, or show to a snapshot of theirs, the look is to see: so it comes after their end.
  if v_search.older is null then
    v_search.older := pg_snapshot_xmax(pg_current_snapshot());
    update rekey._searches s set older = v_search.older, state = 'looking', blocked_since = null where s.id = v_search.id;
  end if;
  v_search.blocked_by := rekey._older_transactions(v_search.older, coalesce(v_search.blocked_since, now()));
  update rekey._searches s
  set blocked_by = v_search.blocked_by, blocked_since = case when v_search.blocked_by is not null then coalesce(s.blocked_since, now()) end
  where s.id = v_search.id and s.blocked_by is distinct from v_search.blocked_by;
  if v_search.blocked_by is not null then
    event := 'waiting';
    wait := '500 ms';
    detail := jsonb_build_object('blocked_by', v_search.blocked_by);
    return;
  end if;
  event := 'look';
  if v_search.scope = 'columns' then
    update rekey._searches s set state = 'complete', completed_at = clock_timestamp() where s.id = v_search.id;
    event := 'complete';
  end if;
end
$$;
comment on function rekey._search_turn is 'What the search has to do next, as the role that reads can: read some blocks of a relation, look at everything, wait, or nothing (idle; incomplete: this role can do no more).';
grant execute on function rekey._search_turn to rekey_operator;

create or replace function rekey._note_finds(search_id bigint, relation oid, hits text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into rekey._search_finds as f (search_id, relation, attnum, keyring_id, version, relation_name, column_name, rows)
  select _note_finds.search_id, _note_finds.relation, h.attnum, rekey._int4(h.header, 3), rekey._int4(h.header, 7),
    _note_finds.relation::regclass::text, a.attname, count(*)
  from (select split_part(x.hit, ':', 1)::smallint as attnum, decode(split_part(x.hit, ':', 2), 'hex') as header
        from string_to_table(hits, ' ') as x(hit) where x.hit <> '') h
  join pg_attribute a on a.attrelid = _note_finds.relation and a.attnum = h.attnum
  group by h.attnum, h.header, a.attname
  on conflict on constraint _search_finds_pkey do update set rows = f.rows + excluded.rows;
end
$$;
comment on function rekey._note_finds is 'Notes where the search found envelopes. hits: of rekey._hits().';

create or replace function rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid,
  problem text, begun timestamptz) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
  v_relation rekey._search_relations;
  v_pace double precision;
begin
  get diagnostics v_stack = pg_context;
  perform rekey._refuse_forger(v_stack, 'rekey._note_read(', 'rekey.search_step()');
  select r.* into strict v_relation from rekey._search_relations r where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
  if problem is not null then
    update rekey._search_relations r
    set problem = _note_read.problem, role = reader, read_at = clock_timestamp(), tried_by = array_append(r.tried_by, reader)
    where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
    return 'unread';
  elsif _note_read.filenode = 0 or v_relation.filenode <> _note_read.filenode then
    -- From the beginning: what has another file has other row pointers.
    update rekey._search_relations r set since = null, filenode = null
    where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
    return 'rewritten';
  end if;
  perform rekey._note_finds(search_id, relation, hits);
  v_pace := extract(epoch from (rekey._settings()).batch_target) / greatest(extract(epoch from clock_timestamp() - begun), 0.001);
  update rekey._search_relations r
  set next_block = until, filenode = _note_read.filenode, rows = r.rows + _note_read.rows, role = reader, read_at = clock_timestamp(), problem = null,
      state = case when until >= r.blocks then 'read' else 'pending' end,
      batch_blocks = greatest(16, least(65536, r.batch_blocks * least(v_pace, 4)))::integer
  where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
  perform rekey._note_pace(begun, rows / 4);
  return 'read';
end
$$;
comment on function rekey._note_read is 'Notes what a step of the search read. 42501: it is not the step that calls.';
grant execute on function rekey._note_read to rekey_operator;

-- In the snapshot of the statement that calls it: as STABLE.
create or replace function rekey._to_look(search_id bigint)
returns table (relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, since xid, problem text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select t.relation, t.name, t.bytes, t.filenode, t.is_heap, t.statement, case when r.filenode = t.filenode and r.statement = t.statement
      and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - r.since::text::bigint < 1000000000 then r.since::xid end, t.problem
    from rekey._searchable() t
    left join rekey._search_relations r on r.search_id = _to_look.search_id and r.relation = t.relation and r.state <> 'pending'
    order by t.relation;
end
$$;
comment on function rekey._to_look is 'What the look of a search has to read: the rows that this transaction or a later one wrote; NULL: all.';
grant execute on function rekey._to_look to rekey_operator;

create or replace function rekey._look(search_id bigint, wanted bytea[])
returns table (relation oid, name text, problem text, again boolean, hits text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_to_look record;
  v_first bigint;
  v_blocks bigint;
  v_step bigint;
  v_same boolean;
  v_hits text;
begin
  for v_to_look in select t.* from rekey._to_look(search_id) t loop
    relation := v_to_look.relation;
    name := v_to_look.name;
    problem := v_to_look.problem;
    again := v_to_look.is_heap and v_to_look.since is null and v_to_look.bytes > 8388608;
    hits := null;
    if pg_relation_filenode(relation) is null then
      again := true;  -- dropped since the snapshot: its rows may have gone elsewhere
    elsif problem is null and not again then
      begin
        problem := rekey._hold(relation, name);
        v_blocks := case when v_to_look.is_heap then pg_relation_size(relation) / current_setting('block_size')::integer else 1 end;
        v_step := case when v_to_look.since is null then 512 else 8192 end;
        v_first := 0;
        while problem is null and v_first < v_blocks loop
          execute format('select r.same, r.hits from (%s) r', v_to_look.statement) into v_same, v_hits
          using wanted, format('(%s,0)', v_first)::tid, format('(%s,0)', v_first + v_step)::tid, v_to_look.since;
          again := again or v_same is false;
          hits := concat_ws(' ', hits, v_hits);
          v_first := v_first + v_step;
        end loop;
        -- A table that was rewritten since the snapshot may seem empty to it. Its lock keeps it now, where it is not empty.
        again := again or problem is null and (pg_relation_filenode(relation) is distinct from v_to_look.filenode
          or v_blocks > 0 and to_regclass(v_to_look.name) is distinct from relation::regclass);
        raise exception using errcode = 'RKEND';
      exception
        when sqlstate 'RKEND' then null;  -- gives the locks back
        when undefined_table then again := true;
        when others then problem := sqlerrm;
      end;
    end if;
    return next;
  end loop;
end
$$;
comment on function rekey._look is 'Looks, in the snapshot of the statement that calls it and with the rights of who does, at all that the turns of a search have not read. again: it has to be read by turns, since it is large, or was rewritten.';
grant execute on function rekey._look to rekey_operator;

create or replace function rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
  v_found record;
  v_looks integer;
begin
  get diagnostics v_stack = pg_context;
  perform rekey._refuse_forger(v_stack, 'rekey._note_look(', 'rekey.search_step()');
  for v_found in
    select u.relation, u.hits from unnest(relations, hits) as u(relation, hits) where u.hits is not null
  loop
    perform rekey._note_finds(search_id, v_found.relation, v_found.hits);
  end loop;
  delete from rekey._search_relations r where r.search_id = _note_look.search_id and not r.relation = any (coalesce(relations, '{}'));
  update rekey._searches s set looks = s.looks + 1 where s.id = _note_look.search_id returning s.looks into v_looks;
  if true = any (again) and v_looks < 20 then
    insert into rekey._search_relations as r (search_id, relation, name, bytes)
    select _note_look.search_id, u.relation, u.name, pg_table_size(u.relation)
    from unnest(relations, names, again) as u(relation, name, again)
    where u.again and exists (select from pg_class c where c.oid = u.relation)
    on conflict on constraint _search_relations_pkey do update set state = 'pending', since = null, filenode = null, bytes = excluded.bytes, tried_by = '{}', problem = null;
    update rekey._search_relations r set state = 'read' where r.search_id = _note_look.search_id and r.state = 'looked';
    update rekey._searches s set state = 'reading', older = null where s.id = _note_look.search_id;
    return 'again';
  end if;
  -- What another role has looked at since the same time counts; what this one could not, another may.
  insert into rekey._search_relations as r (search_id, relation, name, bytes, state, problem, role, read_at, tried_by)
  select _note_look.search_id, u.relation, u.name, pg_table_size(u.relation), case when l.problem is null then 'looked' else 'read' end, l.problem, reader,
    clock_timestamp(), case when l.problem is null then '{}' else array[reader] end
  from unnest(relations, names, problems, again) as u(relation, name, problem, again)
  cross join lateral (select case when u.again then 'it is changed again and again' else u.problem end as problem) l
  on conflict on constraint _search_relations_pkey do update
  set state = case when r.state = 'looked' then r.state else excluded.state end,
      problem = case when r.state = 'looked' then null else excluded.problem end,
      role = case when r.state = 'looked' then r.role else excluded.role end,
      read_at = case when r.state = 'looked' then r.read_at else excluded.read_at end,
      tried_by = case when excluded.problem is null then r.tried_by else array_append(r.tried_by, reader) end;
  if exists (select from rekey._search_relations r where r.search_id = _note_look.search_id and r.state <> 'looked') then
    return 'looked';
  end if;
  update rekey._searches s set state = 'complete', completed_at = clock_timestamp() where s.id = _note_look.search_id;
  return 'complete';
end
$$;
comment on function rekey._note_look is 'Notes what a look found: complete; looked, where something is left that another role may read; again, where something is to be read by turns. 42501: it is not the step that calls.';
grant execute on function rekey._note_look to rekey_operator;

create or replace function rekey.search_step(out event text, out wait interval, out detail jsonb)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- What is hidden, or read otherwise, would count as not there.
set row_security = off
set standard_conforming_strings = on
set bytea_output = hex
set quote_all_identifiers = off
-- CHECK constraints would be computed too: _code_of_others().
set constraint_exclusion = off
set lock_timeout = '3 s'
as $$
declare
  v_begun timestamptz := clock_timestamp();
  v_turn record;
  v_reader text := current_user;
  v_relations oid[];
  v_names text[];
  v_problems text[];
  v_again boolean[];
  v_all_hits text[];
  v_rows bigint;
  v_same boolean;
  v_hits text;
  v_filenode oid;
  v_problem text;
begin
  select t.* into v_turn from rekey._search_turn(v_reader) t;
  event := v_turn.event;
  wait := v_turn.wait;
  detail := v_turn.detail;
  if event = 'read' then
    begin
      v_problem := rekey._hold(v_turn.relation, v_turn.name);
      if v_problem is null then
        execute v_turn.statement into v_rows, v_same, v_hits
        using v_turn.wanted, format('(%s,0)', v_turn.first)::tid, format('(%s,0)', v_turn.until)::tid, null::xid;
        -- The statement goes by the name, which may have become another relation's. Now its lock keeps it.
        v_filenode := case when v_same is not false and to_regclass(v_turn.name) = v_turn.relation then pg_relation_filenode(v_turn.relation) else 0 end;
      end if;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;  -- gives the locks back
      when undefined_table then v_filenode := 0;
      when others then v_problem := sqlerrm;
    end;
    event := rekey._note_read(v_turn.search_id, v_turn.relation, v_reader, v_turn.until, v_rows, v_hits, v_filenode, v_problem, v_begun);
    detail := jsonb_strip_nulls(jsonb_build_object('relation', v_turn.relation::regclass::text, 'rows', v_rows, 'problem', v_problem));
  elsif event = 'look' then
    -- One statement, one snapshot: no row escapes by moving.
    select array_agg(l.relation), array_agg(l.name), array_agg(l.problem), array_agg(l.again), array_agg(l.hits)
    into v_relations, v_names, v_problems, v_again, v_all_hits
    from rekey._look(v_turn.search_id, v_turn.wanted) l;
    event := rekey._note_look(v_turn.search_id, v_reader, v_relations, v_names, v_problems, v_again, v_all_hits);
  end if;
end
$$;
comment on function rekey.search_step is
  'One step of the search that rekey.begin_search() or rekey.tick() began, in a transaction of its own, with the rights of whoever calls it: reads some blocks of a relation, or looks at everything in the end. event: read, unread (it may not read a relation), rewritten, again, looked, complete; waiting (for wait: detail says for whom); incomplete (what is left takes another role: rekey.search_findings); idle (there is nothing to do). 25001: not in READ COMMITTED.';
grant execute on function rekey.search_step to rekey_operator;

create or replace function rekey._search_on(begun timestamptz) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step record;
begin
  begin
    select s.* into v_step from rekey.search_step() s;
  exception when others then
    raise warning 'the search of the database: %', sqlerrm;
    return null;  -- the other duties are not to wait for it
  end;
  if v_step.event in ('complete', 'incomplete', 'idle') then
    return 'more';
  elsif v_step.event = 'waiting' and v_step.detail is not null and clock_timestamp() > begun + interval '2 s' or clock_timestamp() > begun + interval '20 s' then
    return null;
  end if;
  perform pg_sleep(extract(epoch from least(v_step.wait, interval '200 ms')));
  return 'search';
end
$$;
comment on function rekey._search_on is 'A step of the search as a part of rekey.tick(), for 20 seconds of it; where transactions have to end, 2. What comes next: search, more (the duty goes on), NULL (the next tick does).';
grant execute on function rekey._search_on to rekey_operator;

create or replace function rekey._search_advice(relation oid, role text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table record;
begin
  select n.nspname, c.relrowsecurity, pg_get_userbyid(c.relowner) as owner into v_table
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
  if not found or not exists (select from pg_roles r where r.rolname = role) then
    return null;
  elsif not has_schema_privilege(role, v_table.nspname, 'usage') then
    return format('GRANT USAGE ON SCHEMA %I TO %I; GRANT SELECT ON %s TO %2$I', v_table.nspname, role, relation::regclass);
  elsif not has_table_privilege(role, relation, 'select') then
    return format('GRANT SELECT ON %s TO %I', relation::regclass, role);
  elsif v_table.relrowsecurity and not (select r.rolbypassrls or r.rolsuper from pg_roles r where r.rolname = role) then
    return format('ALTER ROLE %I BYPASSRLS', role);
  end if;
  return null;
end
$$;
comment on function rekey._search_advice is 'What lets a role read a relation; NULL: nothing that could be granted.';
grant execute on function rekey._search_advice to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._search_problem(search_id bigint) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('%s relations were not searched, %s the first: %s, as %s. %s', count(*) over (), r.name, r.problem, r.role,
    coalesce(rekey._search_advice(r.relation, r.role) || ', or ', '') || 'have it read by another role: pg-rekey keys search')
  from rekey._search_relations r where r.search_id = _search_problem.search_id and r.problem is not null
  order by r.name limit 1;
end;
comment on function rekey._search_problem is 'What a search could not read, by which role, and what lets it; NULL: it could read everything so far.';

create or replace view rekey.search_status as
select case when s.incomplete_since is not null and s.state <> 'complete' then 'incomplete' else s.state end as state, s.scope, s.begun_at, s.completed_at,
  (select count(*) from rekey._search_versions v where v.search_id = s.id) as versions,
  r.relations_read, r.relations, r.bytes_read, r.bytes, r.not_read,
  (select count(distinct (f.keyring_id, f.version)) from rekey._search_finds f where f.search_id = s.id) as versions_found,
  case when s.state = 'looking' then rekey._with_ages(s.blocked_by, s.blocked_since) end as blocked_by, case when s.state = 'looking' then s.blocked_since end as blocked_since
from rekey._searches s
cross join lateral (
  select count(*) filter (where r.state <> 'pending' and r.problem is null) as relations_read, count(*) as relations,
    coalesce(sum(case when r.state <> 'pending' then r.bytes else r.bytes * least(r.next_block::numeric / greatest(r.blocks, 1), 1) end), 0)::bigint as bytes_read,
    coalesce(sum(r.bytes), 0)::bigint as bytes, count(*) filter (where r.problem is not null) as not_read
  from rekey._search_relations r where r.search_id = s.id) r;
comment on view rekey.search_status is 'The last search of the database for envelopes of versions that are to be destroyed, and how far it is. No row: there was none.';
comment on column rekey.search_status.state is 'reading (relations of some size, by turns), looking (waits for older transactions, then looks at everything in one snapshot), incomplete (what is left takes another role: rekey.search_findings), complete.';
comment on column rekey.search_status.scope is 'Where it looks: the setting destroy_search when it began.';
comment on column rekey.search_status.begun_at is 'When it began.';
comment on column rekey.search_status.completed_at is 'When it ended; NULL: it is under way.';
comment on column rekey.search_status.versions is 'Key versions that it looks for.';
comment on column rekey.search_status.relations_read is 'Relations that are read by turns, those that have been. (Small ones are left to the look.)';
comment on column rekey.search_status.relations is 'Relations that are read by turns, all.';
comment on column rekey.search_status.bytes_read is 'Their size, as far as they have been read.';
comment on column rekey.search_status.bytes is 'Their size.';
comment on column rekey.search_status.not_read is 'Relations that could not be read: rekey.search_findings.';
comment on column rekey.search_status.versions_found is 'Of the versions, those that it found.';
comment on column rekey.search_status.blocked_by is 'The transactions that it waits for: pid or name of a prepared transaction, role, age in seconds (of a pid, where who reads this may see it).';
comment on column rekey.search_status.blocked_since is 'Since when it waits for them.';
grant select on rekey.search_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.search_findings as
select r.name as relation, null::text as column_name, null::text as keyring, null::integer as version, null::bigint as rows, r.problem, r.role,
  coalesce(rekey._search_advice(r.relation, r.role) || ', or ', '') || format('have it read by another role, the owner or a superuser, with pg-rekey keys search') as advice
from rekey._search_relations r where r.problem is not null
union all
select f.relation_name, f.column_name::text, k.name, f.version, f.rows,
  'holds envelopes of the version', null, 'Protect the column and rotate the keyring, or delete these copies.'
from rekey._search_finds f join rekey.keyrings k on k.id = f.keyring_id;
comment on view rekey.search_findings is 'What keeps versions from being destroyed: relations that the last search could not read, and where it found envelopes.';
comment on column rekey.search_findings.relation is 'The table or materialized view.';
comment on column rekey.search_findings.column_name is 'The column that holds envelopes; NULL: the relation was not read.';
comment on column rekey.search_findings.keyring is 'Keyring of the version that was found.';
comment on column rekey.search_findings.version is 'The version.';
comment on column rekey.search_findings.rows is 'Rows in which it was found.';
comment on column rekey.search_findings.problem is 'What is wrong.';
comment on column rekey.search_findings.role is 'Role that could not read it.';
comment on column rekey.search_findings.advice is 'What to do.';
grant select on rekey.search_findings to rekey_admin, rekey_operator, rekey_auditor;

-- What a call that schedules a destruction says at once. It has no time for everything.
create or replace function rekey._look_ahead(header bytea) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off
set standard_conforming_strings = on
set bytea_output = hex
set quote_all_identifiers = off
set constraint_exclusion = off
set lock_timeout = '3 s'
as $$
declare
  v_until timestamptz := clock_timestamp() + interval '2 s';
  v_to_look record;
  v_first bigint;
  v_blocks bigint;
  v_hits text;
  v_found boolean;
  v_problem text;
  v_unread text[] := '{}'::text[];
  v_left bigint := 0;
  v_bytes bigint := 0;
begin
  for v_to_look in select t.* from rekey._searchable() t order by t.bytes, t.relation loop
    if clock_timestamp() > v_until then
      v_left := v_left + 1;
      v_bytes := v_bytes + v_to_look.bytes;
      continue;
    end if;
    v_problem := v_to_look.problem;
    v_found := false;
    begin
      v_problem := coalesce(v_problem, rekey._hold(v_to_look.relation, v_to_look.name));
      v_blocks := case when v_to_look.is_heap then pg_relation_size(v_to_look.relation) / current_setting('block_size')::integer else 1 end;
      v_first := 0;
      while v_problem is null and v_first < v_blocks and not v_found and clock_timestamp() < v_until loop
        execute format('select r.hits from (%s) r', v_to_look.statement) into v_hits
        using array[header], format('(%s,0)', v_first)::tid, format('(%s,0)', v_first + 1024)::tid, null::xid;
        v_found := v_hits is not null;
        v_first := v_first + 1024;
      end loop;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;
      when others then v_problem := sqlerrm;
    end;
    if v_found then
      raise warning '% holds envelopes of the version: while it does, the version is not destroyed', v_to_look.name
        using hint = 'Protect the column and rotate the keyring, or delete these copies: rekey.protect_column().', constraint = 'protect_copies';
    elsif v_problem is not null then
      v_unread := v_unread || format('%s (%s)', v_to_look.name, v_problem);
    elsif v_first < v_blocks then
      v_left := v_left + 1;
      v_bytes := v_bytes + v_to_look.bytes;
    end if;
  end loop;
  if v_unread <> '{}' then
    raise warning '% cannot read % relations: while no role can that runs the worker, the version is not destroyed: %', current_user, cardinality(v_unread),
      array_to_string(v_unread[1:5], ', ') || case when cardinality(v_unread) > 5 then ', ...' else '' end;
  end if;
  if v_left > 0 then
    raise notice '% relations (%) are looked at when the time comes', v_left, pg_size_pretty(v_bytes)
      using hint = 'rekey.begin_search(), and rekey.search_step() until it says complete, look now.', constraint = 'search_now';
  end if;
end
$$;
comment on function rekey._look_ahead is 'Says in warnings where envelopes of this header are outside of protected columns, as far as 2 seconds and the rights of the caller go.';
grant execute on function rekey._look_ahead to rekey_admin;

-- sql/code/63_adopt.sql
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

-- sql/code/63_formats.sql
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

-- sql/code/70_schedule.sql
-- What happens unattended: schedules, and the tick that pg_cron or the orchestrator calls.

create or replace function rekey.set_schedule(keyring text, rotate_every interval, first_at timestamptz = null) returns timestamptz
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_first timestamptz;
begin
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
  end if;
  begin
    v_first := coalesce(first_at, now() + rotate_every);
    if rotate_every is null then
      raise check_violation;
    end if;
    update rekey.keyrings k set rotate_every = set_schedule.rotate_every, next_rotation_at = v_first where k.id = v_keyring.id;
  exception when check_violation or datetime_field_overflow then
    raise exception 'a keyring cannot rotate every % from % on', coalesce(rotate_every::text, 'NULL'), coalesce(first_at::text, 'NULL')
      using errcode = 'invalid_parameter_value', hint = 'The interval is between 1 minute and 36500 days, the first time finite.';
  end;
  perform rekey._audit('schedule.changed', keyring,
    details => jsonb_build_object('rotate_every', rotate_every, 'next_rotation_at', v_first));
  return v_first;
end
$$;
comment on function rekey.set_schedule is
  'Has a keyring rotated every so often (its cryptoperiod: 1 minute to 36500 days). first_at: when first; NULL, the default: after one cryptoperiod. Returns that time. 22023: interval or time cannot be; RK006: retired; RK007: there is none.';
grant execute on function rekey.set_schedule to rekey_admin;

create or replace function rekey.clear_schedule(keyring text = 'default') returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
begin
  if v_keyring.rotate_every is not null then
    update rekey.keyrings k set rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
    perform rekey._audit('schedule.changed', keyring, details => jsonb_build_object('cleared', true));
  end if;
end
$$;
comment on function rekey.clear_schedule is 'Ends the schedule of a keyring. RK007: there is none.';
grant execute on function rekey.clear_schedule to rekey_admin;

create or replace view rekey.schedule_status as
select k.name as keyring, k.tenant_id, k.rotate_every, k.next_rotation_at,
  coalesce(k.next_rotation_at < now() - interval '10 minutes', false) as overdue
from rekey.keyrings k
where k.retired_at is null;
comment on view rekey.schedule_status is 'When each keyring is rotated next; overdue: it should have been 10 minutes ago.';
comment on column rekey.schedule_status.keyring is 'Name of the keyring.';
comment on column rekey.schedule_status.tenant_id is 'Its tenant.';
comment on column rekey.schedule_status.rotate_every is 'Its cryptoperiod; NULL: no schedule.';
comment on column rekey.schedule_status.next_rotation_at is 'When the next scheduled rotation is due.';
comment on column rekey.schedule_status.overdue is 'Whether that was more than 10 minutes ago.';
grant select on rekey.schedule_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.worker_status as
select w.last_tick_at, w.last_tick_seconds, w.locked_since, w.last_error, w.last_census_at
from rekey._worker w;
comment on view rekey.worker_status is 'When the unattended work last ran, how many seconds it took, since when it lacks the KEK, what failed in it, and when rows were last counted.';
comment on column rekey.worker_status.last_tick_at is 'When the last tick ended.';
comment on column rekey.worker_status.last_tick_seconds is 'How long it took.';
comment on column rekey.worker_status.locked_since is 'Since when work waits for the KEK; NULL: it does not.';
comment on column rekey.worker_status.last_error is 'What failed in the last tick; NULL: nothing.';
comment on column rekey.worker_status.last_census_at is 'When every row was last counted.';
grant select on rekey.worker_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._rotate_due() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_due integer[];
begin
  select array_agg(k.id) into v_due
  from (select k.id from rekey.keyrings k
        where k.next_rotation_at <= now()
          and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line)) k;
  if v_due is null then
    return;
  end if;
  perform from rekey._kek();
  perform rekey._lock_kek();
  -- Looked at again under its lock: another tick may have been here.
  v_due := array(select k.id from rekey.keyrings k where k.id = any (v_due) and k.next_rotation_at <= now() order by k.id for no key update);
  perform from rekey._rotate(v_due, 'schedule', null, false);
  update rekey.keyrings k set next_rotation_at = now() + k.rotate_every where k.id = any (v_due);
end
$$;
comment on function rekey._rotate_due is 'Begins the rotations whose time has come; the next one is due a cryptoperiod from now.';

-- Executable by operators because rekey.tick(), which commits, runs with its caller's rights.
create or replace function rekey._tick_duty(duty text, begun timestamptz) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_worker rekey._worker;
  v_next text;
begin
  -- Before the block that notes errors: what is made up here is nobody's entry.
  if duty is null or duty not in ('schedules', 'destructions', 'census', 'end', 'notifications') then
    raise exception 'there is no such duty' using errcode = 'invalid_parameter_value', hint = 'schedules, destructions, census, end or notifications.';
  end if;
  if coalesce(not isfinite(begun) or begun > clock_timestamp(), true) then
    raise exception 'a tick cannot have begun then' using errcode = 'invalid_parameter_value', hint = 'Give a time that has been.';
  end if;
  perform rekey._refuse_snapshot();
  perform rekey._refuse_hidden();
  select * into v_worker from rekey._worker;
  if not found then
    return null;  -- not set up yet
  end if;
  begin
    case duty
      when 'schedules' then perform rekey._rotate_due();
      when 'destructions' then v_next := rekey._destruction_step(coalesce(now() - v_worker.last_tick_at > interval '1 day', true));
      when 'census' then
        if coalesce(v_worker.last_census_at not between now() - interval '1 day' and now(), true) then
          -- Whoever asks whether a worker is at work sees it by that (75_notify.sql): it may take an hour.
          perform pg_advisory_xact_lock_shared(0, 6);
          perform rekey._census();
        end if;
      when 'end' then
        update rekey._worker w set last_tick_at = clock_timestamp(), last_tick_seconds = extract(epoch from clock_timestamp() - begun),
          last_error = case when w.last_error_at >= begun then w.last_error end
        where w.singleton;
      when 'notifications' then v_next := rekey._collect_notifications();
    end case;
    if duty = 'schedules' and (v_worker.locked_since is not null
        or exists (select from rekey.rotations r where r.state in ('queued', 'running', 'verifying'))) then
      perform from rekey._kek();
      update rekey._worker w set locked_since = null where w.locked_since is not null;
    end if;
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      -- Noted once: whoever has the KEK, the orchestrator's worker for one, will do it.
      if v_worker.locked_since is null then
        update rekey._worker w set locked_since = now() where w.singleton;
      end if;
      -- Once a day at most, also where pg_cron has no KEK and a worker beside it has.
      if coalesce(v_worker.locked_noted_at not between now() - interval '1 day' and now(), true) then
        update rekey._worker w set locked_noted_at = now() where w.singleton;
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
    when others then
      update rekey._worker w set last_error = format('%s: %s', duty, sqlerrm), last_error_at = clock_timestamp()
      where w.singleton;
      -- Whoever may run the worker can make a duty fail, with a lock_timeout for one, and end a tick in between.
      if v_worker.last_error is distinct from format('%s: %s', duty, sqlerrm) and not exists (
          select from rekey.audit_log a
          where a.event = 'rotation.error' and a.at between clock_timestamp() - interval '1 minute' and clock_timestamp()
            and a.details ->> 'duty' = _tick_duty.duty and a.details ->> 'sqlstate' = sqlstate) then
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
      v_next := null;
  end;
  return v_next;
end
$$;
comment on function rekey._tick_duty is 'One duty of rekey.tick(): schedules, destructions (of which one step: search, more, NULL: as rekey._destruction_step()), census, end, notifications (deliver: there are some to be delivered; NULL: none). An error leaves its entry in the audit log, one while it lasts and one a minute at most, and does not stop the others. 22023 for an unknown duty, or where begun is no time that has been; RK005: a table of ours may hide rows.';
grant execute on function rekey._tick_duty to rekey_operator;

create or replace function rekey._prune_run_details() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job_run_details', 8) is not null then
    execute format($sql$
      delete from %I.job_run_details d
      where d.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and d.end_time < now() - interval '7 days'$sql$, 'cron');
  end if;
exception when insufficient_privilege then
  null;  -- somebody else's job
end
$$;
comment on function rekey._prune_run_details is 'Deletes what pg_cron noted of our own runs more than 7 days ago, with the rights of the caller. Where cron.job_run_details is not pg_cron''s, or a trigger of others would fire: nothing.';
grant execute on function rekey._prune_run_details to rekey_operator;

create or replace procedure rekey.tick()
language plpgsql
as $$
declare
  v_begun timestamptz := pg_catalog.clock_timestamp();
  v_duty text;
  v_next text;
begin
  foreach v_duty in array array['schedules', 'destructions', 'census', 'rotations', 'end', 'notifications'] loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    if v_duty operator(pg_catalog.=) 'rotations' then
      call rekey.run_rotations('50 s');
      perform rekey._prune_run_details();
    elsif v_duty operator(pg_catalog.=) 'notifications' then
      perform rekey._tick_duty(v_duty, v_begun);
      commit;
      set transaction isolation level read committed;
      perform rekey._post_by_pg_net();
    else
      v_next := rekey._tick_duty(v_duty, v_begun);
      while v_next is not null and pg_catalog.clock_timestamp() operator(pg_catalog.<) (v_begun operator(pg_catalog.+) interval '50 s') loop
        commit;
        set transaction isolation level read committed;
        if v_next operator(pg_catalog.=) 'search' then
          v_next := rekey._search_on(v_begun);
        else
          v_next := rekey._tick_duty(v_duty, v_begun);
        end if;
      end loop;
    end if;
  end loop;
end
$$;
comment on procedure rekey.tick is
  'The unattended work: rotations that are due, their re-encryption for up to 50 seconds, retries, due destructions, once a day a count of all rows, and messages to endpoints. pg_cron or pg-rekey work calls it. Call it outside a transaction.';
grant execute on procedure rekey.tick to rekey_operator;

-- A CALL of pg_cron is one statement, whose statement_timeout would end the tick and not the batch. So a second job cancels
-- the batch. Whoever it cancels too late is not harmed: a step that is undone is done again.
create or replace function rekey.watch() returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step record;
  v_count integer := 0;
begin
  for v_step in select s.pid, s.since from rekey._steps_in_hand() s where s.overdue and s.pid <> pg_backend_pid() loop
    begin
      -- Looked at again: it may have ended since.
      if exists (select from rekey._steps_in_hand() s where s.pid = v_step.pid and s.since = v_step.since) then
        -- Who catches that it is cancelled, and goes on, is ended.
        v_count := v_count + case when clock_timestamp() - v_step.since > 5 * rekey._step_limit() then pg_terminate_backend(v_step.pid) else pg_cancel_backend(v_step.pid) end::integer;
      end if;
    exception when insufficient_privilege then
      null;  -- a worker of another role
    end;
  end loop;
  return v_count;
end
$$;
comment on function rekey.watch is
  'Cancels batches that take longer than the setting step_limit, as far as they are sessions of the caller''s roles, and returns how many. One that goes on for five times as long is ended. The job of pg_cron beside rekey.tick() calls it; pg-rekey work has a limit of its own.';
grant execute on function rekey.watch to rekey_admin, rekey_operator;

create or replace function rekey.schedule_worker(schedule text = null, workers integer = null) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version text;
  v_schedule text;
  v_job bigint;
  v_watch bigint;
  v_helpers bigint[];
begin
  if workers not between 1 and 64 then
    raise exception 'there are 1 to 64 workers' using errcode = 'invalid_parameter_value';
  end if;
  select e.extversion into v_version from pg_extension e where e.extname = 'pg_cron';
  if not found then
    raise exception 'pg_cron is not in this database' using errcode = 'undefined_object',
      hint = format('In the database that cron.database_name names: select cron.schedule_in_database(''pg_rekey'', ''* * * * *'', ''call rekey.tick()'', %L, ''rekey_worker''), and the same as ''pg_rekey_watch'' for ''select rekey.watch()''. Or run pg-rekey work --forever.',
                    current_database()), constraint = 'schedule_worker';
  elsif rekey._trusted_relation('pg_cron', 'cron', 'job', 28) is null
     or rekey._trusted_function('pg_cron', 'cron.schedule(text,text,text)') is null
     or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null
     or rekey._trusted_function('pg_cron', 'cron.alter_job(bigint,text,text,text,text,boolean)') is null then
    raise exception 'cron.job or its functions are not pg_cron''s, or have a trigger of somebody else''s' using errcode = 'undefined_object',
      hint = 'Before pg_cron 1.4 there is no cron.alter_job(): update the extension. Else drop those triggers.';
  end if;
  v_schedule := coalesce(schedule, case when string_to_array(substring(v_version from '^\d+\.\d+'), '.')::integer[] >= '{1,5}' then '10 seconds' else '* * * * *' end);
  -- (Formatted, so that whoever checks all functions does not stumble where pg_cron is missing.)
  -- Looked for by what it does: cron.schedule() finds a job only under the name of its caller.
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'call rekey.tick()' and j.database = current_database() $sql$, 'cron') into v_job;
  begin
    if v_job is null then
      execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_job using 'pg_rekey', v_schedule, 'call rekey.tick()';
    else
      execute format('select %I.alter_job($1::bigint, $2::text, null::text, null::text, null::text, true)', 'cron') using v_job, v_schedule;
    end if;
  exception when invalid_parameter_value or raise_exception or internal_error then
    raise exception 'pg_cron does not take the schedule %: %', quote_literal(v_schedule), sqlerrm using errcode = 'invalid_parameter_value';
  end;
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'select rekey.watch()' and j.database = current_database() $sql$, 'cron') into v_watch;
  if v_watch is null then
    execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_watch using 'pg_rekey_watch', '* * * * *', 'select rekey.watch()';
  end if;
  -- All but the first do nothing but rotations: what else a tick does is not more with two of them.
  execute format($sql$ select coalesce(array_agg(j.jobid), '{}') from %I.job j where j.command = 'call rekey.run_rotations()' and j.database = current_database() $sql$, 'cron') into v_helpers;
  if cardinality(v_helpers) <> workers - 1 then
    execute format('select count(%I.unschedule(j::bigint)) from unnest($1) j', 'cron') using v_helpers;
    execute format('select coalesce(array_agg(%I.schedule(''pg_rekey_'' || n, $1::text, ''call rekey.run_rotations()''::text)), ''{}'') from generate_series(2, $2) n', 'cron')
    into v_helpers using v_schedule, workers;
  else
    execute format('select count(%I.alter_job(j::bigint, $2::text, null::text, null::text, null::text, true)) from unnest($1) j', 'cron') using v_helpers, v_schedule;
  end if;
  if (select r.rolsuper from pg_roles r where r.rolname = current_user) then
    -- No job of ours runs as a superuser.
    execute 'grant usage on schema cron to rekey_worker';
    execute format('select %I.alter_job(j::bigint, null::text, null::text, null::text, $2::text, null::boolean) from unnest($1) j', 'cron') using array[v_job, v_watch] || v_helpers, 'rekey_worker';
  end if;
  return v_job;
end
$$;
comment on function rekey.schedule_worker is
  'Has pg_cron call rekey.tick(), and returns the number of the job; another one, pg_rekey_watch, calls rekey.watch() every minute. workers: so many (1 to 64) share the rotations, NULL, the default: as many as before, at first one; each but the first is a job pg_rekey_N of its own, which calls rekey.run_rotations(). schedule: as pg_cron takes it; NULL, the default: every 10 seconds, or every minute before pg_cron 1.5. The jobs run as rekey_worker where a superuser calls this, else as the caller. Safe to repeat, with another number of workers too. 42704: pg_cron is not in this database, is older than 1.4, or somebody else''s code would run with it; 22023: it does not take the schedule, or there are not 1 to 64 workers.';
grant execute on function rekey.schedule_worker to rekey_admin;

create or replace function rekey.unschedule_worker() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer := 0;
  v_job bigint;
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job', 8) is null or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null then
    return false;
  end if;
  for v_job in execute format($sql$ select j.jobid from %I.job j where j.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and j.database = current_database() $sql$, 'cron') loop
    execute format('select %I.unschedule($1::bigint)', 'cron') using v_job;
    v_count := v_count + 1;
  end loop;
  return v_count > 0;
end
$$;
comment on function rekey.unschedule_worker is 'Ends the pg_cron jobs of rekey.schedule_worker(); false where there was none.';
grant execute on function rekey.unschedule_worker to rekey_admin;

-- sql/code/71_census.sql
-- What the daily count tells.

create or replace function rekey.confirm_emptied(keyring text) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring);
  v_rows bigint;
begin
  select s.rows into v_rows from rekey._secrets_seen s where s.keyring_id = v_keyring.id for update;
  if v_rows > 0 then
    update rekey._secrets_seen s set rows = 0 where s.keyring_id = v_keyring.id;
    perform rekey._audit('keyring.emptied', keyring, details => jsonb_build_object('seen', v_rows));
  end if;
  return coalesce(v_rows, 0);
end
$$;
comment on function rekey.confirm_emptied is
  'Confirms that the secrets of a keyring are gone, all of them, because they were deleted: its rotation, which held 1,000 or more at its last complete count, then completes without them. Returns how many there were. RK007: no such keyring.';
grant execute on function rekey.confirm_emptied to rekey_admin;

create or replace function rekey._census_target(
  target rekey._target, keyrings integer[], active bytea[], first bigint = 0, until bigint = 4294967294, deadline timestamptz = 'infinity'
)
returns table (keyring_id integer, version integer, problem text, failed bigint, stale bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_from tid := format('(%s,0)', first)::tid;
  v_step bigint;
  v_found record;
  v_batch record;
  v_still bigint[] := '{}'::bigint[];
  v_added jsonb := '[]'::jsonb;
  v_counted jsonb := '[]'::jsonb;
begin
  while v_from is not null loop
    select s.* into v_found from rekey._scan_on(target, keyrings, v_from, v_step, until) s;
    v_step := v_found.next_step;
    if v_found.ciphertexts is not null then
      with rows as materialized (
        select u.place::integer as place, rekey._int4(u.header, 3) as keyring_id, rekey._int4(u.header, 7) as version, u.header = any (active) as active, u.row_key
        from (select o.place, substr(o.ciphertext, 1, 11) as header, o.row_key
              from unnest(v_found.ciphertexts, v_found.keys) with ordinality as o(ciphertext, row_key, place)) u
      ), failing as materialized (
        select f.place, f.problem
        from rekey._check(v_found.ciphertexts, target.prefix, v_found.contexts, v_found.indexes, target.normalization) c
        cross join lateral unnest(c.failed_places, c.problems) as f(place, problem)
      ), noted as materialized (
        -- Discarded by somebody who has seen it, or in quarantine.
        select r.place, q.id, q.resolution
        from rows r
        join rekey.rotation_failures q on q.keyring_id = r.keyring_id and q.target = _census_target.target.target
          and q.relation = _census_target.target.relation::text and q.row_hash = rekey._row_hash(r.row_key)
          and (q.resolved_at is null or q.resolution = 'discard' and q.version = r.version)
      ), added as (
        insert into rekey.rotation_failures (keyring_id, target, relation, row_key, version, reason)
        select r.keyring_id, _census_target.target.target, _census_target.target.relation::text, r.row_key, r.version, f.problem
        from failing f
        join rows r on r.place = f.place
        join rekey.keyrings k on k.id = r.keyring_id
        where not exists (select from noted n where n.place = f.place)
        on conflict do nothing
        returning id, rotation_failures.keyring_id, rotation_failures.version, row_key, reason
      )
      select
        (select array_agg(n.id) from noted n join failing f on f.place = n.place where n.resolution is null) as still,
        (select jsonb_agg(to_jsonb(a)) from added a) as added,
        (select jsonb_agg(to_jsonb(t)) from (
          select r.keyring_id, r.version, f.problem, count(f.place) as failed, count(*) - count(f.place) as stale
          from rows r left join failing f on f.place = r.place
          -- What is in quarantine and opens is refused by its table; what was discarded is known.
          where not exists (select from noted n where n.place = r.place and (n.resolution = 'discard' or f.place is null))
            and (f.place is not null or not r.active)
          group by r.keyring_id, r.version, f.problem) t) as counted
      into v_batch;
      v_still := v_still || coalesce(v_batch.still, '{}')
        || array(select (a.value ->> 'id')::bigint from jsonb_array_elements(coalesce(v_batch.added, '[]')) a);
      -- Five of each keyring and version are enough for the audit log.
      v_added := (
        select coalesce(jsonb_agg(jsonb_build_object('keyring_id', n.keyring_id, 'version', n.version, 'rows', n.rows, 'first', n.first, 'reason', n.reason)), '[]')
        from (
          select a.keyring_id, a.version, sum(a.rows) as rows, (jsonb_agg(a.first order by a.place) -> 0) as first, (array_agg(a.reason order by a.place))[1] as reason
          from (
            select (o.value ->> 'keyring_id')::integer as keyring_id, (o.value ->> 'version')::integer as version, (o.value ->> 'rows')::bigint as rows,
              o.value -> 'first' as first, o.value ->> 'reason' as reason, 0 as place
            from jsonb_array_elements(v_added) o
            union all
            select b.keyring_id, b.version, count(*), to_jsonb((array_agg(rekey._cut(b.row_key, 100) order by b.id))[1:5]), (array_agg(b.reason order by b.id))[1], 1
            from jsonb_to_recordset(coalesce(v_batch.added, '[]')) as b(id bigint, keyring_id integer, version integer, row_key text, reason text)
            group by b.keyring_id, b.version) a
          group by a.keyring_id, a.version) n);
      v_counted := v_counted || coalesce(v_batch.counted, '[]');
    end if;
    v_from := case when clock_timestamp() < deadline then v_found.next_first end;
  end loop;
  update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
  where deadline = 'infinity' and q.rotation_id is null and q.resolved_at is null and q.target = _census_target.target.target
    and q.relation = _census_target.target.relation::text and q.keyring_id = any (keyrings) and not q.id = any (v_still);
  perform rekey._audit_all((
    select coalesce(jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', k.name, 'version', a.version,
      'details', jsonb_build_object('found_by', 'census', 'target', target.target, 'relation', target.relation::text, 'rows', a.rows,
        'first', a.first, 'problem', a.reason)) order by k.name, a.version), '[]')
    from jsonb_to_recordset(v_added) as a(keyring_id integer, version integer, rows bigint, first jsonb, reason text)
    join rekey.keyrings k on k.id = a.keyring_id));
  return query
    select c.keyring_id, c.version, min(c.problem), sum(c.failed)::bigint, sum(c.stale)::bigint
    from jsonb_to_recordset(v_counted) as c(keyring_id integer, version integer, problem text, failed bigint, stale bigint)
    group by c.keyring_id, c.version;
end
$$;
comment on function rekey._census_target is
  'Opens the rows of these keyrings in one target. What does not open enters the quarantine, with one audit entry for each keyring and version; what the census had put there and opens again leaves it. failed: rows that do not open and that nobody has discarded; stale: rows that open and are not on an active version (headers in active). first, until: only these blocks; deadline: as far as it comes by then, where nothing leaves the quarantine. Takes the KEK.';

create or replace function rekey._note_findings(findings jsonb) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_new jsonb;
begin
  with now as (
    -- (How many rows there are changes, and is no new finding.)
    select distinct on (f.kind, f.target, 3, 4, 5)
      f.kind, f.target, coalesce(f.keyring, '') as keyring, coalesce(f.version, 0) as version, case when f.rows is null then f.finding else '' end as item, f.severity, f.rows, f.finding, f.advice
    from jsonb_to_recordset(findings) as f(kind text, target text, keyring text, version integer, severity text, rows bigint, finding text, advice text)
    order by f.kind, f.target, 3, 4, 5
  ), gone as (
    delete from rekey._census_findings o
    where not exists (select from now n where (n.kind, n.target, n.keyring, n.version, n.item) = (o.kind, o.target, o.keyring, o.version, o.item))
  ), kept as (
    insert into rekey._census_findings as o (kind, target, keyring, version, item, severity, rows, finding, advice)
    select n.kind, n.target, n.keyring, n.version, n.item, n.severity, n.rows, n.finding, n.advice from now n
    on conflict (kind, target, keyring, version, item) do update
    set severity = excluded.severity, rows = excluded.rows, finding = excluded.finding, advice = excluded.advice
    returning o.kind, o.target, o.finding, o.since
  )
  select jsonb_agg(jsonb_build_object('event', 'census.found', 'details', jsonb_build_object('kind', k.kind, 'count', k.count, 'first', k.first)) order by k.kind)
  into v_new
  from (
    select k.kind, count(*) as count, to_jsonb((array_agg(left(k.finding, 200) order by k.target))[1:5]) as first
    from kept k where k.since = now() group by k.kind) k;
  perform rekey._audit_all(coalesce(v_new, '[]'));
end
$$;
comment on function rekey._note_findings is 'Makes these the findings of the census, and notes in the audit log what is new among them, one entry for each kind.';

create or replace function rekey._census() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_keyrings integer[];
  v_current integer[];
  v_active bytea[];
  v_open boolean := true;
  v_seconds double precision;
  v_blocks bigint;
  v_state text := rekey._target_state();
  v_found jsonb := '[]'::jsonb;
  v_rows jsonb := '[]'::jsonb;
  v_stale record;
  v_id bigint;
  v_events jsonb := '[]'::jsonb;
begin
  perform rekey._refuse_snapshot();
  perform rekey._note_names();
  select array_agg(rekey._header(k.keyring_id, k.version)) into v_active from rekey.encryption_keys k where k.state = 'active';
  begin
    perform from rekey._kek();
  exception when sqlstate 'RK001' or sqlstate 'RK002' then
    v_open := false;
  end;
  select 20.0 / greatest(count(*), 1) into v_seconds from rekey._targets() t where t.problem is null;
  -- A target that cannot be counted is told of, and keeps nobody from looking at the others.
  for v_target in select t.* from rekey._targets() t where t.problem is null order by t.relation loop
    begin
      -- Locked first, counted by the next statement: as rekey._lock_targets().
      perform from rekey._count_rows(array[v_target], '{}');
      select array_agg(distinct c.keyring_id) filter (where not coalesce(rekey._header(c.keyring_id, c.version) = any (v_active), false)),
        array_agg(distinct c.keyring_id)
      into v_keyrings, v_current
      from rekey._count_rows(array[v_target], null) c
      where c.keyring_id is not null and not exists (select from rekey.rotations o where o.keyring_id = c.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
      -- And where the census has put rows into quarantine: they may open again.
      v_keyrings := array(
        select unnest(v_keyrings) union
        select q.keyring_id from rekey.rotation_failures q where q.target = v_target.target and q.rotation_id is null and q.resolved_at is null);
      if v_keyrings <> '{}' then
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_keyrings, v_active) c), '[]');
      end if;
      -- What stands in a blind index under another version than its value is behind as well.
      v_rows := v_rows || coalesce((
        select jsonb_agg(jsonb_build_object('target', v_target.target, 'keyring_id', c.keyring_id, 'version', 0, 'failed', 0, 'stale', c.rows))
        from rekey._count_rows(array[v_target], v_keyrings) c
        where v_target.normalization is not null and c.version = 0
          and not exists (select from rekey.rotations o where o.keyring_id = c.keyring_id and rekey._is_under_way(o.state) and not o.in_line)), '[]');
      -- Those on the active version, where they open too: of a large table another part each day, for a few seconds.
      v_current := array(select unnest(v_current) except select unnest(v_keyrings));
      if v_open and v_current <> '{}' then
        v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
        v_blocks := (random() * greatest(v_blocks - 8192, 0))::bigint;
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_current, v_active, v_blocks, v_blocks + 8192, clock_timestamp() + v_seconds * interval '1 second') c), '[]');
      end if;
    exception
      when sqlstate 'RK001' or sqlstate 'RK002' or sqlstate 'RK005' then
        raise;
      when others then
        v_found := v_found || jsonb_build_object('kind', 'uncounted', 'severity', 'critical', 'target', v_target.target,
          'finding', format('%s cannot be counted: %s', v_target.target, sqlerrm), 'advice', 'Read it as its owner: an index, a function or a policy of the table may be the reason.');
    end;
  end loop;
  if rekey._target_state() is distinct from v_state then
    raise exception 'a protected column was changed while its rows were counted' using errcode = 'RK005', hint = 'Try again.';
  end if;

  -- What does not open, by keyring; a keyring that does not exist was made up, or is that of another database.
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', 'critical', 'target', f.target, 'keyring', f.keyring, 'version', f.version, 'rows', f.rows,
      'finding', case f.kind
        when 'destroyed' then format('%s rows of %s stand on version %s of keyring %s, which is destroyed', f.rows, f.target, f.version, f.keyring)
        when 'unknown' then format('%s rows of %s stand on version %s of keyring %s, which there is not', f.rows, f.target, f.version, f.keyring)
        else format('%s rows of %s do not open: version %s of keyring %s', f.rows, f.target, f.version, f.keyring) end,
      'advice', case f.kind
        when 'unopenable' then '`pg-rekey rotations failures` names them. Restore them, or give them up: `pg-rekey rotations resolve`.'
        else 'Nothing in this database opens them: restore them, or the key, from a backup. `pg-rekey rotations failures` names them.' end))
    from (
      select c.target, coalesce(r.name, format('no. %s', c.keyring_id)) as keyring, c.version, sum(c.failed) as rows,
        case when k.state = 'destroyed' then 'destroyed' when k.state is null then 'unknown' else 'unopenable' end as kind
      from jsonb_to_recordset(v_rows) as c(target text, keyring_id integer, version integer, failed bigint)
      left join rekey.keyrings r on r.id = c.keyring_id
      left join rekey.encryption_keys k on k.keyring_id = c.keyring_id and k.version = c.version
      where c.failed > 0
      group by 1, 2, 3, k.state) f), '[]');
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', f.severity, 'target', f.target, 'keyring', f.keyring, 'version', f.version,
      'finding', f.finding, 'advice', f.advice))
    from rekey.findings() f where f.rows is null), '[]');
  perform rekey._note_findings(v_found);

  for v_stale in
    select c.keyring_id, r.name, sum(c.stale) as rows, a.version
    from jsonb_to_recordset(v_rows) as c(keyring_id integer, stale bigint)
    join rekey.keyrings r on r.id = c.keyring_id
    join rekey.encryption_keys a on a.keyring_id = c.keyring_id and a.state = 'active'
    group by c.keyring_id, r.name, a.version
    having sum(c.stale) > 0
    order by c.keyring_id
  loop
    perform rekey._keyring(v_stale.name, lock => true);
    continue when exists (select from rekey.rotations o where o.keyring_id = v_stale.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
    v_id := rekey._queue_sweep(v_stale.keyring_id, 'schedule', 'rows on an older version, found by the census');
    v_events := v_events || jsonb_build_object('event', 'rotation.requested', 'keyring', v_stale.name, 'version', v_stale.version,
      'rotation_id', v_id, 'details', jsonb_build_object('trigger', 'schedule', 'census_rows', v_stale.rows));
  end loop;
  update rekey._worker w set last_census_at = now() where w.singleton;
  perform rekey._audit_all(v_events);
end
$$;
comment on function rekey._census is
  'Looks for rows that came to stand on an older version after its rotation (a client held the ciphertext back), and queues their sweep; puts rows that do not open into the quarantine; and notes what else is not as it should be. Of rows on active versions it opens 64 MB of each target, for 20 seconds in all, where the KEK is at hand. The KEK is needed only where a row is not on an active version.';

create or replace view rekey.census_status as
select f.kind, f.severity, f.target, nullif(f.keyring, '') as keyring, nullif(f.version, 0) as version, f.rows, f.finding, f.advice, f.since
from rekey._census_findings f;
comment on view rekey.census_status is 'What the last census (rekey.worker_status.last_census_at) found not to be as it should be. rekey.findings() looks now, but does not count rows.';
comment on column rekey.census_status.kind is 'unopenable, destroyed, unknown (rows that do not open: damaged, on a version that is destroyed, or that there is not), uncounted, or as rekey.findings().';
comment on column rekey.census_status.severity is 'critical or warning.';
comment on column rekey.census_status.target is 'Protected column, table or sequence.';
comment on column rekey.census_status.keyring is 'Keyring of the rows.';
comment on column rekey.census_status.version is 'Their key version.';
comment on column rekey.census_status.rows is 'How many rows; NULL: it is not about rows.';
comment on column rekey.census_status.finding is 'What was found.';
comment on column rekey.census_status.advice is 'What to do about it.';
comment on column rekey.census_status.since is 'Which census found it first.';
grant select on rekey.census_status to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/75_notify.sql
-- Somebody is told. The audit log is the outbox: what it tells of, it tells in the same transaction, and its numbers are given
-- in the order of the commits, under the lock of its head. So whoever has read up to a number has missed nothing before it, and
-- an event costs nothing more, and cannot fail, because somebody is to be told. What lasts (a rotation that is held up, a KEK
-- that is missing) is told of once while it does.

create or replace function rekey._utc(at timestamptz) returns text
language sql stable
return to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
comment on function rekey._utc is 'A time as messages have it.';

create or replace function rekey._told_events() returns text[]
language sql immutable parallel safe
return '{rotation.completed,rotation.failed,rotation.blocked,rotation.row_failed,keyring.overdue,key.compromised,key.destruction_due,kek.lost,kek.missing,kek.back,worker.silent,worker.back,test}'::text[];
comment on function rekey._told_events is 'What endpoints can be told of.';

create or replace function rekey._endpoint_aad(kek_id integer, endpoint_id integer) returns bytea
language sql stable parallel safe
return rekey._part('endpoint') || rekey._part(endpoint_id::text) || rekey._part(kek_id::text);
comment on function rekey._endpoint_aad is 'What the sealed address of an endpoint is bound to.';

create or replace function rekey._refuse_endpoint(problem text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem is not null then
    raise exception '%', problem using errcode = 'invalid_parameter_value',
      hint = 'An address is https://..., smtps://USER:PASSWORD@HOST?from=...&to=..., smtp:// the same with STARTTLS, or notify:CHANNEL.';
  end if;
end
$$;
comment on function rekey._refuse_endpoint is 'Raises 22023 for a problem, NULL: none. The address is in no message.';

-- Plain values go through plain assignments here, and the address is in no statement: see 31_kek.sql.
create or replace function rekey.add_endpoint(
  name text, address text, events text[] = null, slack boolean = false, allow_private boolean = false, by_pg_net boolean = false
) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kind text;
  v_problem text;
  v_channel text;
  v_secret text;
  v_wrapping bytea;
  v_kek_id integer;
  v_id integer;
  v_iv bytea;
  v_bytes bytea;
  v_aad bytea;
  v_sealed bytea;
begin
  v_kind := case
    when address ~ '^notify:' then 'channel'
    when address ~ '^smtps?://' then 'email'
    when slack then 'slack'
    else 'webhook' end;
  v_problem := case
    when name !~ '^[A-Za-z0-9._-]{1,63}$' or name is null then 'the name of an endpoint has 1 to 63 of: letters, digits, . _ -'
    when not events <@ rekey._told_events() or cardinality(events) = 0 then
      'there is no such event: there are ' || array_to_string(rekey._told_events(), ', ')
    when octet_length(address) > 2048 or address !~ '^[!-~]+$' or address is null then 'the address has more than 2048 characters, or others than those of a URL'
    when v_kind = 'channel' and address !~ '^notify:[a-z_][a-z0-9_]{0,62}$' then 'a channel has 1 to 63 of: a-z, 0-9, _'
    when v_kind = 'email' and address !~ '^smtps?://[^/?#]+/?\?([^#]*&)?to=[^&#]' then 'an address for e-mail has ?from=...&to=...'
    when v_kind in ('webhook', 'slack') and address !~ '^https://[^/?#@]+([/?#]|$)' and not (allow_private and address ~ '^http://[^/?#@]+([/?#]|$)')
      then 'a webhook has an https:// address, without a user'
    when (v_kind = 'slack') <> slack then 'only a webhook has the shape that Slack takes'
    when by_pg_net and (v_kind not in ('webhook', 'slack') or allow_private) then
      'pg_net sends webhooks only, and cannot look at what addresses they go to'
    when by_pg_net and address !~ '^https://[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z][A-Za-z0-9-]+(:[0-9]+)?([/?#]|$)' then
      'pg_net takes the name of a host, with its domain'
  end;
  perform rekey._refuse_endpoint(v_problem);
  v_channel := case when v_kind = 'channel' then substr(address, 8) end;
  v_id := nextval('rekey._endpoints_id_seq');
  if v_kind <> 'channel' then
    select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
    perform rekey._lock_kek();
    -- It may have been replaced while this waited for the lock.
    select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
    v_wrapping := rekey._wrapping_key(v_wrapping);
    v_bytes := rekey._random_bytes(32);
    v_secret := 'whsec_' || encode(v_bytes, 'base64');
    v_bytes := convert_to(v_secret || ' ' || address, 'UTF8');
    v_iv := rekey._random_bytes(16);
    v_aad := rekey._endpoint_aad(v_kek_id, v_id);
    v_sealed := v_iv || rekey._aead_encrypt(v_wrapping, v_iv, v_bytes, v_aad);
  end if;
  begin
    insert into rekey._endpoints (id, name, kind, events, allow_private, by_pg_net, channel, sealed, kek_id)
    values (v_id, add_endpoint.name, v_kind, add_endpoint.events, add_endpoint.allow_private, add_endpoint.by_pg_net, v_channel, v_sealed, v_kek_id);
  exception when unique_violation then
    raise exception 'there is an endpoint % already', quote_literal(name) using errcode = 'unique_violation',
      hint = 'select rekey.remove_endpoint(...) first, or take another name.', constraint = 'remove_endpoint';
  end;
  -- What was before is not told of. Locked where it is there: who removes the last endpoint has to see this one.
  insert into rekey._notifier as n (audit_id, home) select coalesce(max(h.id), 0), rekey._home() from rekey._audit_head h
  on conflict (singleton) do update set audit_id = n.audit_id;
  perform rekey._audit('endpoint.added', details => jsonb_build_object('name', name, 'kind', v_kind, 'events', to_jsonb(events),
    'allow_private', nullif(allow_private, false), 'by_pg_net', nullif(by_pg_net, false)));
  return case when v_kind = 'webhook' then v_secret end;
end
$$;
comment on function rekey.add_endpoint is
  'Has somebody told what happens. address: https://... (a webhook as Standard Webhooks has it; the signing secret is returned, once), smtps://USER:PASSWORD@HOST:465?from=...&to=... (e-mail; smtp:// with STARTTLS; several to=), or notify:CHANNEL (NOTIFY in this database). It is stored under the KEK; a statement that has it as a literal may be logged, as with rekey.set_secret(). events: only these; NULL: all. slack: the body is what incoming webhooks of Slack take. allow_private: it may be a loopback or private address, and there without TLS. by_pg_net: rekey.tick() hands it to pg_net, where that is; pg_net keeps the address in its own tables in plain, and looks at no addresses. 22023: it cannot be; 23505: there is one of that name; RK001, RK002: KEK.';
grant execute on function rekey.add_endpoint to rekey_admin;

create or replace function rekey._endpoint(name text) returns rekey._endpoints
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint rekey._endpoints;
begin
  select * into v_endpoint from rekey._endpoints e where e.name = _endpoint.name;
  if not found then
    raise exception 'no such endpoint: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.endpoint_status for those that there are.', constraint = 'endpoints';
  end if;
  return v_endpoint;
end
$$;
comment on function rekey._endpoint is 'An endpoint by its name. RK007: there is none.';

create or replace function rekey.remove_endpoint(name text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id integer := (rekey._endpoint(name)).id;
begin
  perform from rekey._notifier for update;
  delete from rekey._endpoints e where e.id = v_id;
  delete from rekey._notifications n where n.endpoint_id = v_id;
  if not exists (select from rekey._endpoints) then
    delete from rekey._notifier n where n.singleton;
    delete from rekey._told t where t.event is not null;
  end if;
  perform rekey._audit('endpoint.removed', details => jsonb_build_object('name', name));
end
$$;
comment on function rekey.remove_endpoint is 'Has nobody told there any more; messages that wait are dropped. RK007: there is no such endpoint.';
grant execute on function rekey.remove_endpoint to rekey_admin;

create or replace function rekey._message_text(event text, subject jsonb, count integer) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return case event
    when 'rotation.completed' then format('Rotation %s of keyring %s completed (rows: %s%s)', subject ->> 'rotation', subject ->> 'keyring',
      subject ->> 'rows', case when (subject ->> 'failures')::bigint > 0 then format(', in quarantine: %s', subject ->> 'failures') else '' end)
    when 'rotation.failed' then format('Rotation %s of keyring %s failed', subject ->> 'rotation', subject ->> 'keyring')
    when 'rotation.blocked' then format('Rotation %s of keyring %s has been held up since %s', subject ->> 'rotation', subject ->> 'keyring', subject ->> 'since')
    when 'rotation.row_failed' then format('Keyring %s has rows in quarantine, which do not open, or which their table refused (rows: %s)', subject ->> 'keyring', subject ->> 'rows')
    when 'keyring.overdue' then format('Keyring %s should have been rotated at %s', subject ->> 'keyring', subject ->> 'since')
    when 'key.compromised' then format('Version %s of keyring %s was marked as compromised', subject ->> 'version', subject ->> 'keyring')
    when 'key.destruction_due' then format('Version %s of keyring %s is to be destroyed after %s: until then that can be cancelled',
      subject ->> 'version', subject ->> 'keyring', subject ->> 'destroy_after')
    when 'kek.lost' then format('KEK %s was declared lost', subject ->> 'version')
    when 'kek.missing' then format('The worker has been without the KEK since %s: nothing is rotated', subject ->> 'since')
    when 'kek.back' then 'The worker has the KEK again'
    when 'worker.silent' then format('No worker has ticked since %s: nothing is rotated', subject ->> 'since')
    when 'worker.back' then 'A worker ticks again'
    when 'test' then 'A test: messages of this database get here'
  end || case when count > 1 then format('; and %s more like this', count - 1) else '' end;
comment on function rekey._message_text is 'An event in a sentence, by the first one of so many. Keyrings by name, rows by number; nothing that somebody else wrote.';

create or replace function rekey._message_body(kind text, event text, count integer, subjects jsonb) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return (
  select case when kind = 'slack' then
      -- Slack reads these three as its own.
      jsonb_build_object('text', replace(replace(replace(format('pg_rekey, database %s: %s.', current_database(), t.text), '&', '&amp;'), '<', '&lt;'), '>', '&gt;'))
    else jsonb_build_object('type', event, 'timestamp', rekey._utc(clock_timestamp()),
      'data', jsonb_build_object('database', current_database(), 'text', t.text, 'count', count, 'subjects', coalesce(subjects, '[]'))) end
  from (select rekey._message_text(event, subjects -> 0, count) as text) t)::text;
comment on function rekey._message_body is 'The body of a message: what is signed, byte by byte.';

-- Messages that wait are 1000 at most for each endpoint: who is away for so long reads the audit log.
create or replace function rekey._enqueue(event text, count integer, subjects jsonb) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into rekey._notifications (endpoint_id, event, body, state, ended_at, last_error)
  select e.id, _enqueue.event, rekey._message_body(e.kind, _enqueue.event, _enqueue.count, subjects),
    case when w.full then 'dead' else 'waiting' end, case when w.full then clock_timestamp() end, case when w.full then 'too many were waiting' end
  from rekey._endpoints e
  cross join lateral (
    select count(*) >= 1000 as full from rekey._notifications n where n.endpoint_id = e.id and n.state = 'waiting') w
  where e.events is null or _enqueue.event = any (e.events);
end
$$;
comment on function rekey._enqueue is 'Puts a message into the queue of every endpoint that wants events like this. count: how many there were; subjects: the first ones.';

create or replace function rekey._leave_original() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey._notifier n set home = rekey._home(), audit_id = (select coalesce(max(h.id), 0) from rekey._audit_head h) where n.home <> rekey._home();
  if found then
    update rekey._notifications n set state = 'dead', ended_at = clock_timestamp(), last_error = 'it is of the database that this one was copied from'
    where n.state = 'waiting';
  end if;
end
$$;
comment on function rekey._leave_original is 'In a copy of a database, once: what happened before, and what waits, the original tells of.';

create or replace function rekey.test_endpoint(name text) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint rekey._endpoints := rekey._endpoint(name);
  v_id bigint;
begin
  perform rekey._leave_original();
  insert into rekey._notifications (endpoint_id, event, body)
  values (v_endpoint.id, 'test', rekey._message_body(v_endpoint.kind, 'test', 1, '[]')) returning id into v_id;
  return v_id;
end
$$;
comment on function rekey.test_endpoint is 'Puts a test into the queue of an endpoint, whatever its filter; returns the number of the message in rekey.message_status. RK007: there is no such endpoint.';
grant execute on function rekey.test_endpoint to rekey_admin;

create or replace function rekey._conditions() returns table (event text, subject text, data jsonb)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- (Times that are to come were noted by a clock that was wrong.)
  select 'rotation.blocked', r.id::text,
    jsonb_build_object('rotation', r.id, 'keyring', k.name, 'version', r.to_version, 'since', rekey._utc(r.blocked_since))
  from rekey.settings s
  join rekey.rotations r on r.state in ('queued', 'running', 'verifying') and not r.blocked_since between clock_timestamp() - s.notify_blocked and clock_timestamp() + s.notify_blocked
  join rekey.keyrings k on k.id = r.keyring_id
  union all
  select 'rotation.row_failed', format('%s/%s', f.keyring_id, f.rotation_id),
    jsonb_strip_nulls(jsonb_build_object('rotation', f.rotation_id, 'keyring', k.name, 'rows', f.rows))
  from (select o.keyring_id, o.rotation_id, count(*) as rows from rekey.rotation_failures o where o.resolved_at is null group by 1, 2) f
  join rekey.keyrings k on k.id = f.keyring_id
  union all
  select 'keyring.overdue', s.keyring, jsonb_build_object('keyring', s.keyring, 'since', rekey._utc(s.next_rotation_at))
  from rekey.schedule_status s where s.overdue
  union all
  select 'key.destruction_due', format('%s/%s', e.id, rekey._utc(e.destroy_after)),
    jsonb_build_object('keyring', k.name, 'version', e.version, 'destroy_after', rekey._utc(e.destroy_after))
  from rekey.settings s
  join rekey.encryption_keys e on e.state = 'destroy_scheduled' and e.destroy_after < clock_timestamp() + s.notify_destruction
  join rekey.keyrings k on k.id = e.keyring_id
  union all
  -- Where pg_cron has no KEK, it says so at each rotation until the worker that has it comes.
  select 'kek.missing', '', jsonb_build_object('since', rekey._utc(w.locked_since))
  from rekey.settings s join rekey._worker w on not w.locked_since between clock_timestamp() - s.notify_silent and clock_timestamp() + s.notify_silent
  union all
  select 'worker.silent', '', jsonb_build_object('since', rekey._utc(t.at))
  from rekey.settings s
  cross join rekey._notifier n
  cross join lateral (select coalesce(max(w.last_tick_at), n.since) as at from rekey._worker w) t
  where not t.at between clock_timestamp() - s.notify_silent and clock_timestamp() + s.notify_silent
    -- A worker that reads a large table holds a lock of a step, or of a census, meanwhile.
    and not exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and (l.classid = 0 and l.objid in (1, 2, 5, 6) or l.classid = 4294967295)
        and l.database = (select d.oid from pg_database d where d.datname = current_database()));
end;
comment on function rekey._conditions is 'What lasts now and is worth a message: rotations that are held up, open failures, overdue keyrings, destructions that come near, no KEK, no worker.';

create or replace function rekey._prune_notifications() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._notifications n
  where n.state <> 'waiting' and n.id <= (
      select o.id from rekey._notifications o where o.endpoint_id = n.endpoint_id and o.state <> 'waiting' order by o.id desc offset 1000 limit 1)
    or not exists (select from rekey._endpoints e where e.id = n.endpoint_id);
end
$$;
comment on function rekey._prune_notifications is 'Keeps the last 1000 messages of each endpoint that do not wait.';

create or replace function rekey._collect_notifications() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_read bigint;
  v_head bigint;
  v_message record;
  v_over text[];
  v_new boolean := false;
begin
  perform rekey._leave_original();
  -- Who finds it locked leaves it to whoever is at it.
  select n.audit_id into v_read from rekey._notifier n for update skip locked;
  if not found then
    return null;
  end if;
  select coalesce(max(h.id), 0) into v_head from rekey._audit_head h;
  for v_message in
    select e.event, count(*)::integer as count, jsonb_agg(e.subject order by e.id) filter (where e.place <= 10) as subjects
    from (
      select a.id, a.event, row_number() over (partition by a.event order by a.id) as place,
        jsonb_strip_nulls(jsonb_build_object('rotation', a.rotation_id, 'keyring', a.keyring, 'version', a.version,
          'rows', a.details -> 'rows', 'failures', a.details -> 'failures')) as subject
      from rekey.audit_log a
      where a.id > v_read and a.id <= v_head and a.event in ('rotation.completed', 'rotation.failed', 'key.compromised', 'kek.lost')
    ) e
    group by e.event
    order by min(e.id)
  loop
    perform rekey._enqueue(v_message.event, v_message.count, v_message.subjects);
    v_new := true;
  end loop;
  if v_head > v_read then
    update rekey._notifier set audit_id = v_head where singleton;
  end if;
  with over as (
    delete from rekey._told t
    where not exists (select from rekey._conditions() c where c.event = t.event and c.subject = t.subject)
    returning t.event
  )
  select array_agg(o.event) into v_over from over o;
  for v_message in
    select b.event from (values ('kek.missing', 'kek.back'), ('worker.silent', 'worker.back')) as b (over, event) where b.over = any (v_over)
  loop
    perform rekey._enqueue(v_message.event, 1, '[]');
    v_new := true;
  end loop;
  for v_message in
    with now as materialized (
      select c.event, c.subject, c.data from rekey._conditions() c
    ), told as (
      insert into rekey._told (event, subject) select n.event, n.subject from now n on conflict do nothing returning event, subject
    )
    select p.event, count(*)::integer as count, jsonb_agg(p.data order by p.place) filter (where p.place <= 10) as subjects
    from (
      select n.event, n.data, row_number() over (partition by n.event order by n.subject) as place
      from told t join now n on n.event = t.event and n.subject = t.subject
    ) p
    group by p.event
    order by p.event
  loop
    perform rekey._enqueue(v_message.event, v_message.count, v_message.subjects);
    v_new := true;
  end loop;
  if v_new then
    perform rekey._prune_notifications();
  end if;
  for v_message in
    update rekey._notifications n set state = 'delivered', attempts = n.attempts + 1, ended_at = clock_timestamp()
    from rekey._endpoints e
    where e.id = n.endpoint_id and e.kind = 'channel' and n.state = 'waiting'
    returning e.channel, n.body
  loop
    perform pg_notify(v_message.channel, v_message.body);
  end loop;
  -- Whoever noted nothing of the last attempt came to an end within it.
  update rekey._notifications n
  set state = 'dead', ended_at = clock_timestamp(), last_error = coalesce(n.last_error, 'whoever sent it came to an end each time')
  where n.state = 'waiting' and n.attempts >= 12 and n.next_attempt_at < clock_timestamp();
  return (select 'deliver' from rekey._notifications n where n.state = 'waiting' limit 1);
end
$$;
comment on function rekey._collect_notifications is 'Makes messages of what happened and lasts, and sends those to channels; deliver: some wait for somebody to deliver them; NULL: none.';

-- From here on: who delivers. A claim is a lease: whoever is killed between sending and noting leaves a message that is sent
-- again, by the same number, once its pause is over.

create or replace function rekey._open_endpoints() returns table (id integer, name text, kind text, allow_private boolean, by_pg_net boolean, opened text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek_id integer;
  v_wrapping bytea;
  v_endpoint record;
  v_iv bytea;
  v_bytes bytea;
  v_aad bytea;
begin
  select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_endpoint in select e.id, e.name, e.kind, e.allow_private, e.by_pg_net, e.sealed from rekey._endpoints e where e.kek_id = v_kek_id order by e.id loop
    v_iv := substr(v_endpoint.sealed, 1, 16);
    v_bytes := substr(v_endpoint.sealed, 17);
    v_aad := rekey._endpoint_aad(v_kek_id, v_endpoint.id);
    v_bytes := rekey._aead_decrypt(v_wrapping, v_iv, v_bytes, v_aad);
    if v_bytes is not null then
      id := v_endpoint.id;
      name := v_endpoint.name;
      kind := v_endpoint.kind;
      allow_private := v_endpoint.allow_private;
      by_pg_net := v_endpoint.by_pg_net;
      opened := convert_from(v_bytes, 'UTF8');
      return next;
    end if;
  end loop;
end
$$;
comment on function rekey._open_endpoints is 'The endpoints, with signing secret and address, separated by a blank, for who delivers. Those that do not open are left out. RK001, RK002: KEK.';
grant execute on function rekey._open_endpoints to rekey_operator;

create or replace function rekey._claim_message(endpoints integer[])
returns table (id bigint, message_id uuid, endpoint_id integer, event text, body text, attempts integer)
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._notifications n
  set attempts = n.attempts + 1, request_id = null,
    next_attempt_at = clock_timestamp() + ('{1 min,2 min,5 min,15 min,30 min,1 h,3 h,6 h}'::interval[])[least(n.attempts + 1, 8)]
  where n.id = (
    select w.id from rekey._notifications w
    where w.state = 'waiting' and w.endpoint_id = any (_claim_message.endpoints)
      -- (A time further away was noted by a clock that was wrong.)
      and not w.next_attempt_at between clock_timestamp() and clock_timestamp() + interval '6 hours'
    -- Somebody waits for what becomes of a test.
    order by w.event <> 'test', w.next_attempt_at, w.id limit 1 for update skip locked)
  returning n.id, n.message_id, n.endpoint_id, n.event, n.body, n.attempts;
end;
comment on function rekey._claim_message is 'The next message to one of these endpoints, which nobody else gets before its pause is over; none: nothing is due.';
grant execute on function rekey._claim_message to rekey_operator;

create or replace function rekey._note_delivery(id bigint, error text = null) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint integer;
begin
  update rekey._notifications n
  set state = case when error is null then 'delivered' when n.attempts >= 12 then 'dead' else 'waiting' end,
    ended_at = case when error is null or n.attempts >= 12 then clock_timestamp() end,
    last_error = rekey._cut(error, 255), request_id = null
  where n.id = _note_delivery.id and n.state = 'waiting'
  returning n.endpoint_id into v_endpoint;
  if error is not null then
    -- The others wait too: who does not answer is asked once a minute.
    update rekey._notifications n set next_attempt_at = clock_timestamp() + interval '1 minute'
    where n.id in (
      select w.id from rekey._notifications w
      where w.endpoint_id = v_endpoint and w.state = 'waiting' and w.next_attempt_at < clock_timestamp() + interval '1 minute'
      for update skip locked);  -- two that fail at once do not wait for each other
  end if;
end
$$;
comment on function rekey._note_delivery is 'Notes what came of a message; error NULL: it was delivered. After 12 attempts, in a day, it is given up.';
grant execute on function rekey._note_delivery to rekey_operator;

create or replace function rekey._pg_net_requests() returns table (id bigint, url text, headers jsonb, body jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint record;
  v_message record;
  v_key bytea;
  v_at text;
  v_signed bytea;
begin
  for v_endpoint in select o.id, o.opened from rekey._open_endpoints() o where o.by_pg_net loop
    v_key := decode(substr(split_part(v_endpoint.opened, ' ', 1), 7), 'base64');
    url := split_part(v_endpoint.opened, ' ', 2);
    for v_place in 1 .. 20 loop
      select * into v_message from rekey._claim_message(array[v_endpoint.id]);
      exit when not found;
      id := v_message.id;
      body := v_message.body::jsonb;
      v_at := extract(epoch from clock_timestamp())::bigint::text;
      v_signed := convert_to('msg_' || v_message.message_id || '.' || v_at || '.' || v_message.body, 'UTF8');
      v_signed := rekey._sign(v_key, v_signed);
      headers := jsonb_build_object('Content-Type', 'application/json', 'webhook-id', 'msg_' || v_message.message_id,
        'webhook-timestamp', v_at, 'webhook-signature', 'v1,' || encode(v_signed, 'base64'));
      return next;
    end loop;
  end loop;
end
$$;
comment on function rekey._pg_net_requests is 'What pg_net is to send now, signed. RK001, RK002: KEK.';
grant execute on function rekey._pg_net_requests to rekey_operator;

create or replace function rekey._note_request(id bigint, request_id bigint) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._notifications n set request_id = _note_request.request_id where n.id = _note_request.id and n.state = 'waiting';
end;
comment on function rekey._note_request is 'Notes the number that pg_net gave a message.';
grant execute on function rekey._note_request to rekey_operator;

-- Runs with the caller's rights: pg_net is whose it is.
create or replace function rekey._post_by_pg_net() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_statuses integer[];
  v_sent record;
  v_request bigint;
begin
  if not exists (select from rekey.endpoint_status e where e.by_pg_net and e.waiting > 0)
     or rekey._trusted_function('pg_net', 'net.http_post(text,jsonb,jsonb,jsonb,integer)') is null
     or rekey._trusted_relation('pg_net', 'net', '_http_response', 0) is null then
    return;
  end if;
  execute format($sql$
    select array_agg(m.id order by m.id), array_agg(r.status_code order by m.id)
    from rekey.message_status m join %I._http_response r on r.id = m.request_id where m.state = 'waiting'$sql$, 'net')
    into v_ids, v_statuses;
  for v_place in 1 .. coalesce(cardinality(v_ids), 0) loop
    perform rekey._note_delivery(v_ids[v_place], case when v_statuses[v_place] between 200 and 299 then null
      else coalesce('HTTP status ' || v_statuses[v_place], 'no answer') end);
  end loop;
  begin
    for v_sent in select p.* from rekey._pg_net_requests() p loop
      begin
        execute format('select %I.http_post(url => $1, headers => $2, body => $3, timeout_milliseconds => 10000)', 'net')
          into v_request using v_sent.url, v_sent.headers, v_sent.body;
        perform rekey._note_request(v_sent.id, v_request);
      exception when others then
        perform rekey._note_delivery(v_sent.id, 'pg_net refused it: ' || sqlstate);
      end;
    end loop;
  exception when sqlstate 'RK001' or sqlstate 'RK002' then
    null;  -- somebody who has the KEK delivers
  end;
exception when insufficient_privilege then
  null;  -- somebody who may use pg_net does
end
$$;
comment on function rekey._post_by_pg_net is 'Hands messages to pg_net, where that is, and notes what came of those before, with the rights of the caller.';
grant execute on function rekey._post_by_pg_net to rekey_operator;

create or replace view rekey.endpoint_status as
select e.name, e.kind, e.events, e.allow_private, e.by_pg_net, e.created_at, n.waiting, n.dead, n.last_delivered_at, n.failing_since, n.last_error,
  case when e.kek_id is not null and k.state <> 'active' then 'its address is under a KEK that is not active any more' end as problem
from rekey._endpoints e
left join rekey.keks k on k.id = e.kek_id
cross join lateral (
  select count(*) filter (where m.state = 'waiting') as waiting, count(*) filter (where m.state = 'dead') as dead,
    max(m.ended_at) filter (where m.state = 'delivered') as last_delivered_at,
    min(m.created_at) filter (where m.state = 'waiting' and m.last_error is not null) as failing_since,
    (array_agg(m.last_error order by m.id desc) filter (where m.state = 'waiting' and m.last_error is not null))[1] as last_error
  from rekey._notifications m where m.endpoint_id = e.id) n;
comment on view rekey.endpoint_status is 'Who is told what happens, and whether that works. Addresses are not shown.';
comment on column rekey.endpoint_status.name is 'Name of the endpoint.';
comment on column rekey.endpoint_status.kind is 'webhook, slack, email or channel.';
comment on column rekey.endpoint_status.events is 'Events that it is told of; NULL: all.';
comment on column rekey.endpoint_status.allow_private is 'Whether its address may be a loopback or private one.';
comment on column rekey.endpoint_status.by_pg_net is 'Whether pg_net may send to it.';
comment on column rekey.endpoint_status.created_at is 'When it was added.';
comment on column rekey.endpoint_status.waiting is 'Messages that wait to be delivered, 1000 at most.';
comment on column rekey.endpoint_status.dead is 'Messages that were given up, of the last 1000.';
comment on column rekey.endpoint_status.last_delivered_at is 'When a message was last delivered.';
comment on column rekey.endpoint_status.failing_since is 'Since when a message that was tried waits; NULL: none does.';
comment on column rekey.endpoint_status.last_error is 'What went wrong with it last; NULL: nothing.';
comment on column rekey.endpoint_status.problem is 'Why its address cannot be opened: remove it and add it again; NULL: it can, by who has the KEK.';
grant select on rekey.endpoint_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.message_status as
select n.id, e.name as endpoint, n.event, coalesce(n.body::jsonb #>> '{data,text}', n.body::jsonb ->> 'text') as text, n.created_at, n.state, n.attempts,
  case when n.state = 'waiting' then n.next_attempt_at end as next_attempt_at, n.ended_at, n.last_error, n.message_id, n.request_id
from rekey._notifications n
join rekey._endpoints e on e.id = n.endpoint_id;
comment on view rekey.message_status is 'Messages to endpoints: those that wait, and of each endpoint the last 1000 that were delivered or given up.';
comment on column rekey.message_status.id is 'Number of the message.';
comment on column rekey.message_status.endpoint is 'Endpoint that it goes to.';
comment on column rekey.message_status.event is 'What it tells of.';
comment on column rekey.message_status.text is 'What it says.';
comment on column rekey.message_status.created_at is 'When it was made.';
comment on column rekey.message_status.state is 'waiting, delivered or dead (given up).';
comment on column rekey.message_status.attempts is 'How often it was tried.';
comment on column rekey.message_status.next_attempt_at is 'It is tried again after this time; NULL: it does not wait.';
comment on column rekey.message_status.ended_at is 'When it was delivered or given up.';
comment on column rekey.message_status.last_error is 'What went wrong last.';
comment on column rekey.message_status.message_id is 'What the header webhook-id has, after msg_: the same whenever it is sent again.';
comment on column rekey.message_status.request_id is 'Number that pg_net gave it.';
grant select on rekey.message_status to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/80_metrics.sql
create or replace function rekey.version() returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return '0.1.0';
comment on function rekey.version is 'Version of pg_rekey in this database.';
grant execute on function rekey.version to rekey_admin, rekey_operator, rekey_auditor, rekey_app;

create or replace function rekey.metrics() returns table (name text, labels jsonb, value double precision)
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  with states as (
    select unnest('{queued,running,paused,verifying,failed}'::text[]) as state
  ), rotated as (
    select r.state, r.trigger, count(*) as n from rekey.rotations r group by r.state, r.trigger
  ), finished as (
    select extract(epoch from r.finished_at - r.created_at) as seconds, r.rows_done
    from rekey.rotations r
    where r.state in ('completed', 'completed_with_failures')
    order by r.finished_at desc limit 1
  ), unhealthy as (
    select k.name,
      case when exists (select from rekey.rotations r where r.keyring_id = k.id and r.state = 'failed') then 'failed'
           when exists (select from rekey.rotation_failures f where f.keyring_id = k.id and f.resolved_at is null) then 'failures'
           when k.next_rotation_at < now() - interval '10 minutes' then 'overdue' end as why
    from rekey.keyrings k where k.retired_at is null
  )
  select m.name, m.labels, m.value::double precision
  from (
    select 'pg_rekey_rotations' as name, jsonb_build_object('state', s.state) as labels,
      (select coalesce(sum(r.n), 0) from rotated r where r.state = s.state) as value
    from states s
    union all select 'pg_rekey_rotations_total', jsonb_build_object('state', r.state, 'trigger', r.trigger), r.n
      from rotated r where r.state not in (select s.state from states s)
    union all select 'pg_rekey_last_rotation_duration_seconds', '{}', f.seconds from finished f
    union all select 'pg_rekey_rotation_rows_total', '{}', coalesce(sum(r.rows_done), 0) from rekey.rotations r
    union all select 'pg_rekey_rotation_failures_open', '{}', count(*) from rekey.rotation_failures f where f.resolved_at is null
    union all select 'pg_rekey_findings', jsonb_build_object('kind', f.kind, 'severity', f.severity), count(*) from rekey._census_findings f group by f.kind, f.severity
    union all select 'pg_rekey_census_rows', jsonb_build_object('kind', g.kind), coalesce((select sum(f.rows) from rekey._census_findings f where f.kind = g.kind), 0)
      from (values ('unopenable'), ('destroyed'), ('unknown')) as g(kind)
    union all select 'pg_rekey_last_census_timestamp_seconds', '{}', coalesce(extract(epoch from w.last_census_at), 0) from rekey._worker w
    union all select 'pg_rekey_oldest_unfinished_rotation_seconds', '{}', coalesce(extract(epoch from now() - min(r.created_at)), 0)
      from rekey.rotations r where rekey._is_under_way(r.state)
    union all select 'pg_rekey_rotation_blocked_seconds', '{}', coalesce(extract(epoch from now() - min(b.since)), 0)
      from (select r.blocked_since as since from rekey.rotations r where rekey._is_under_way(r.state) and r.blocked_since is not null
            union all select s.since from rekey._steps_in_hand() s where s.hangs) b
    union all select 'pg_rekey_last_tick_timestamp_seconds', '{}', coalesce(extract(epoch from w.last_tick_at), 0) from rekey._worker w
    union all select 'pg_rekey_last_tick_duration_seconds', '{}', coalesce(w.last_tick_seconds, 0) from rekey._worker w
    union all select 'pg_rekey_locked', '{}', (w.locked_since is not null)::integer from rekey._worker w
    union all select 'pg_rekey_keyrings', '{}', count(*) from rekey.keyrings k where k.retired_at is null
    union all select 'pg_rekey_keyrings_overdue', '{}', count(*) from rekey.keyrings k where k.next_rotation_at < now() - interval '10 minutes'
    union all select 'pg_rekey_keyrings_unscheduled', '{}', count(*) from rekey.keyrings k where k.retired_at is null and k.rotate_every is null
    union all select 'pg_rekey_keys', jsonb_build_object('state', k.state), count(*) from rekey.encryption_keys k group by k.state
    union all select 'pg_rekey_keyring_unhealthy', jsonb_build_object('keyring', u.name, 'why', u.why), 1 from unhealthy u where u.why is not null
    union all select 'pg_rekey_messages', jsonb_build_object('state', g.state), (select count(*) from rekey._notifications n where n.state = g.state)
      from (values ('waiting'), ('dead')) as g(state)
    union all select 'pg_rekey_audit_entries', '{}', coalesce(max(h.id), 0) from rekey._audit_head h
    union all select 'pg_rekey_kek_age_seconds', '{}', extract(epoch from now() - e.created_at) from rekey.keks e where e.state = 'active'
  ) m;
end;
comment on function rekey.metrics is 'Figures for monitoring (docs/operations.md): name, labels, value. pg-rekey metrics prints them for Prometheus.';
grant execute on function rekey.metrics to rekey_admin, rekey_operator, rekey_auditor;

-- sql/code/90_rpc.sql
-- What PostgREST offers: /rpc/rotate_keys, key_rotation_status, and what an incident needs. The functions in schema public have
-- no rights of their own; being bound early, they need none on schema rekey. What they call decides who may, and answers.

-- PostgREST's login alone is proof: the settings request.*, which tell of a request, are anybody's who can run SQL.
create or replace function rekey._is_postgrest() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
return coalesce((select s.postgrest_login = session_user from rekey.settings s), false);
comment on function rekey._is_postgrest is 'Whether the session is PostgREST''s: of the role that the setting postgrest_login names.';

create or replace function rekey._may_administer() returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := rekey._caller();
  v_claim text;
begin
  if rekey._is_service_role(v_caller) or pg_has_role(v_caller, 'rekey_admin', 'usage') then
    return true;
  end if;
  if v_caller <> 'authenticated' or not rekey._is_postgrest() then
    return false;
  end if;
  select s.jwt_admin_claim into v_claim from rekey.settings s;
  -- Not user_metadata, which users write themselves.
  return coalesce(rekey._claims() -> 'app_metadata' -> v_claim = 'true'::jsonb, false);
end
$$;
comment on function rekey._may_administer is
  'Whether the caller may rotate, and the like, by RPC: service_role, members of rekey_admin, and, in a session of PostgREST, a logged-in user whose app_metadata has the claim that the setting jwt_admin_claim names, with the value true.';

-- Executable by administrators because pg-rekey serve refuses callers of its own, who have no role here.
create or replace function rekey._note_denied(details jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
  v_subject text := rekey._subject();
  v_details jsonb := rekey._cut_details(details);
begin
  if current_setting('transaction_read_only')::boolean then
    return;
  end if;
  -- Looked at again under the lock of the chain: nobody who is refused often holds it more than once a minute.
  for v_try in 1 .. 2 loop
    if (select count(*) >= 60 or bool_or(
          a.actor = session_user and a.role = current_setting('role') and a.jwt_subject is not distinct from v_subject
          and a.details ->> 'client' is not distinct from v_details ->> 'client')
        from rekey.audit_log a
        where a.event = 'access.denied' and a.at between clock_timestamp() - interval '1 minute' and clock_timestamp()) then
      return;
    end if;
    if v_try = 1 then
      perform from rekey._audit_head for update;
    end if;
  end loop;
  perform rekey._audit('access.denied', details => v_details);
exception when lock_not_available then
  return;  -- A refusal does not wait for who holds the chain, and stands without its entry.
end
$$;
comment on function rekey._note_denied is
  'Notes in the audit log that the caller was refused, at most once a minute for each (role, subject of the JWT, and client where details name one) and 60 times for all. Not in a read-only transaction, nor where somebody holds the end of the log for more than a second.';
grant execute on function rekey._note_denied to rekey_admin;

create or replace function rekey._http_status(code text) returns integer
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case code
  when 'RK001' then 503 when 'RK002' then 500 when 'RK003' then 422
  when 'RK004' then 409 when 'RK005' then 409 when 'RK006' then 409 when 'RK007' then 404
  when '42501' then 403 when '22023' then 400
end;
comment on function rekey._http_status is 'The HTTP status for an SQLSTATE of ours; NULL for any other.';

-- An error that is raised would undo the audit entry of a refusal, and PostgREST answers 400 to codes that it does not
-- know. So the error is the answer, in the shape that PostgREST gives errors. A caller without PostgREST gets it raised.
create or replace function rekey._through_postgrest() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
return coalesce(current_setting('request.method', true), '') <> '';
comment on function rekey._through_postgrest is 'Whether PostgREST calls: it says with which HTTP method.';

create or replace function rekey._rpc_problem(code text, message text, hint text) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('response.status', rekey._http_status(code)::text, true);
  return jsonb_build_object('code', code, 'message', message, 'details', null, 'hint', nullif(hint, ''));
end
$$;
comment on function rekey._rpc_problem is 'An error as the answer of a request, with its HTTP status.';

create or replace function rekey._rpc_hint(action text, hint text) returns text
language sql immutable parallel safe
return case
  when action = 'supersede' then 'Wait for it, or let this one take its rows along: "supersede": true.'
  when action = 'create_keyring' then 'key_rotation_status names the keyrings that there are.'
  when action in ('register_kek', 'set_provider', 'unlock') then 'Whoever administers the database makes the KEK available.'
  else nullif(hint, '')
end;
comment on function rekey._rpc_hint is 'A hint in the words of PostgREST''s clients, by the action that it asks for; those of SQL where there are no others.';

create or replace function rekey._rpc_refusal() returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_message text := 'only administrators of keys may do this';
  v_hint text := 'They are service_role, members of rekey_admin, and users whose app_metadata has the claim that the setting jwt_admin_claim names.';
begin
  if not rekey._through_postgrest() then
    raise exception '%', v_message using errcode = 'insufficient_privilege', hint = v_hint;
  end if;
  return rekey._rpc_problem('42501', v_message, v_hint);
end
$$;
comment on function rekey._rpc_refusal is 'The answer to whoever may not: 403 by PostgREST, 42501 else.';

create or replace function rekey._rpc_change(name text, arguments jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotations jsonb;
  v_passed_by jsonb;
  v_hint text;
  v_action text;
begin
  if not rekey._may_administer() then
    if rekey._is_postgrest() then
      perform rekey._note_denied(jsonb_build_object('function', name));
    end if;
    return rekey._rpc_refusal();
  end if;
  case name
    when 'rotate_keys' then
      select coalesce(jsonb_agg(to_jsonb(r) order by r.id), '[]'),
        coalesce(jsonb_agg(r.keyring order by r.id) filter (where r.created_at <> now()), '[]')
      into v_rotations, v_passed_by
      from rekey.rotate_keys(arguments ->> 'keyring', arguments ->> 'reason', (arguments ->> 'supersede')::boolean) r;
      return jsonb_build_object('rotations', v_rotations, 'passed_by', v_passed_by);
    when 'pause_rotation' then
      perform rekey.pause_rotation((arguments ->> 'id')::bigint);
    when 'retry_rotation' then
      perform rekey.retry_rotation((arguments ->> 'id')::bigint);
    when 'rollback_rotation' then
      select jsonb_agg(to_jsonb(r)) into v_rotations
      from rekey.rollback_rotation((arguments ->> 'id')::bigint, arguments ->> 'reason') r;
    when 'mark_key_compromised' then
      select coalesce(jsonb_agg(to_jsonb(r)), '[]') into v_rotations
      from rekey.mark_key_compromised(arguments ->> 'keyring', (arguments ->> 'version')::integer, arguments ->> 'reason') r;
  end case;
  if v_rotations is null then
    select jsonb_agg(to_jsonb(r)) into v_rotations from rekey.rotation_status r where r.id = (arguments ->> 'id')::bigint;
  end if;
  return jsonb_build_object('rotations', v_rotations);
exception when others then
  if not rekey._through_postgrest() or rekey._http_status(sqlstate) is null then
    raise;
  end if;
  get stacked diagnostics v_hint = pg_exception_hint, v_action = constraint_name;
  return rekey._rpc_problem(sqlstate, sqlerrm, rekey._rpc_hint(v_action, v_hint));
end
$$;
comment on function rekey._rpc_change is
  'What the functions of schema public that change something do with the rights of rekey_owner. name: which of them; arguments: by name.';

create or replace function public.rotate_keys(keyring text = null, reason text = null, supersede boolean = false) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('rotate_keys', jsonb_build_object('keyring', keyring, 'reason', reason, 'supersede', supersede));
end;
comment on function public.rotate_keys is
  'As rekey.rotate_keys(), for PostgREST and supabase-js: {"rotations": [...], "passed_by": [...]} with rows of rekey.rotation_status, and the names of keyrings that got no new version, as a rotation is under way. For service_role, members of rekey_admin, and logged-in users whose app_metadata has the claim that the setting jwt_admin_claim names; anybody else gets 403. Errors come as {"code", "message", "details", "hint"} with their HTTP status: RK001 503, RK002 500, RK004 and RK006 409, RK007 404; a caller without PostgREST gets them raised.';

create or replace function public.pause_rotation(id bigint) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('pause_rotation', jsonb_build_object('id', id));
end;
comment on function public.pause_rotation is
  'As rekey.pause_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.retry_rotation(id bigint) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('retry_rotation', jsonb_build_object('id', id));
end;
comment on function public.retry_rotation is
  'As rekey.retry_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.rollback_rotation(id bigint, reason text = null) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('rollback_rotation', jsonb_build_object('id', id, 'reason', reason));
end;
comment on function public.rollback_rotation is
  'As rekey.rollback_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that goes back, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.mark_key_compromised(keyring text, version integer, reason text = null) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('mark_key_compromised', jsonb_build_object('keyring', keyring, 'version', version, 'reason', reason));
end;
comment on function public.mark_key_compromised is
  'As rekey.mark_key_compromised(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that takes the rows off the version, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function rekey._rpc_key_rotation_status() returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_status jsonb;
begin
  if not rekey._may_administer() then
    return rekey._rpc_refusal();
  end if;
  select jsonb_build_object(
    'version', rekey.version(),
    'kek', (select jsonb_build_object('id', e.id, 'provider', s.kek_provider) from rekey.keks e, rekey.settings s where e.state = 'active'),
    'worker', (select to_jsonb(w) from rekey.worker_status w),
    'keyrings', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'name', k.name, 'tenant_id', k.tenant_id, 'version', a.version, 'rotated_at', k.rotated_at,
        'rotate_every', k.rotate_every, 'next_rotation_at', s.next_rotation_at, 'overdue', s.overdue,
        'rotation', to_jsonb(r)) order by k.name), '[]')
      from rekey.keyrings k
      join rekey.schedule_status s on s.keyring = k.name
      left join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
      left join lateral (
        select t.id, t.state, t.trigger, t.to_version, t.rows_total, t.rows_done, t.rows_failed,
          round(100.0 * least(t.rows_done, t.rows_total) / nullif(t.rows_total, 0), 1) as percent,
          case when t.state = 'running' then p.rate end as rows_per_second,
          case when t.state = 'running' then ceil((t.rows_total - t.rows_done) / p.rate) end as seconds_left,
          t.blocked_by, t.last_error, t.created_at, t.started_at, t.finished_at
        from rekey.rotations t
        cross join lateral (
          select nullif(round(t.rows_done / nullif(extract(epoch from clock_timestamp() - t.started_at), 0)), 0) as rate) p
        where t.keyring_id = k.id order by t.id desc limit 1) r on true))
  into v_status;
  return v_status;
end
$$;
comment on function rekey._rpc_key_rotation_status is 'What public.key_rotation_status() does with the rights of rekey_owner.';

create or replace function public.key_rotation_status() returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_key_rotation_status();
end;
comment on function public.key_rotation_status is
  'How rotation stands, for PostgREST and supabase-js: version, kek (number and provider), worker (rekey.worker_status), and keyrings, each with its active version, its schedule and its last rotation: with percent, and while it re-encrypts, rows_per_second since it began and seconds_left. For whom and with which errors: as public.rotate_keys().';

-- sql/footer.sql
-- Who owns what, and who may do nothing. Safe to repeat.
-- (In rekey_targets are functions of others too, of which whoever updates may not revoke anything.)
revoke all on all routines in schema rekey from public;
revoke all on function rekey_targets.secrets_count, rekey_targets.secrets_scan, rekey_targets.secrets_read, rekey_targets.secrets_write from public;
revoke all on function public.rotate_keys, public.key_rotation_status, public.pause_rotation, public.retry_rotation, public.rollback_rotation,
  public.mark_key_compromised from public;

do $$
declare
  v_object record;
  v_role name;
begin
  -- Default privileges of Supabase and others.
  for v_role in select r.rolname from pg_roles r where r.rolname in ('anon', 'authenticated', 'service_role') loop
    execute format('revoke all on all routines in schema rekey from %I', v_role);
    execute format('revoke all on function rekey_targets.secrets_count, rekey_targets.secrets_scan, rekey_targets.secrets_read, rekey_targets.secrets_write from %I', v_role);
    execute format('revoke all on all tables in schema rekey from %I', v_role);
    execute format('revoke all on all sequences in schema rekey from %I', v_role);
    execute format('revoke all on function public.rotate_keys, public.key_rotation_status, public.pause_rotation, public.retry_rotation, public.rollback_rotation,
  public.mark_key_compromised from %I', v_role);
    -- After that, since it would take these too: what the RPC of 90_rpc.sql takes.
    if v_role <> 'anon' then
      execute format('grant execute on function public.rotate_keys, public.key_rotation_status, public.pause_rotation, public.retry_rotation, public.rollback_rotation,
  public.mark_key_compromised to %I', v_role);
      execute format('grant execute on function rekey._rpc_change, rekey._rpc_key_rotation_status to %I', v_role);
    end if;
  end loop;

  execute 'alter schema rekey owner to rekey_owner';
  execute 'alter schema rekey_targets owner to rekey_owner';
  for v_object in
    select format('%I.%I', n.nspname, c.relname) as name,
      case c.relkind when 'v' then 'view' when 'S' then 'sequence' when 'c' then 'type' else 'table' end as kind
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('rekey', 'rekey_targets') and c.relkind in ('r', 'v', 'S', 'c')
      and c.relowner <> 'rekey_owner'::regrole
      -- An identity's sequence goes with its table.
      and not exists (select from pg_depend d where d.objid = c.oid and d.classid = 'pg_class'::regclass and d.deptype = 'i' and c.relkind = 'S')
  loop
    execute format('alter %s %s owner to rekey_owner', v_object.kind, v_object.name);
  end loop;

  -- To be given a function, a role needs CREATE on its schema, for that moment.
  execute 'grant create on schema rekey to rekey_sweeper';
  for v_object in
    select p.oid::regprocedure::text as name,
      case when n.nspname = 'rekey' and p.proname in ('_call_count', '_call_scan', '_call_read', '_call_write', '_call_tenant_check') then 'rekey_sweeper' else 'rekey_owner' end as owner
    from pg_proc p
    join pg_namespace n on n.oid = p.pronamespace
    where (n.nspname = 'rekey' or n.nspname = 'rekey_targets' and p.proname in ('secrets_count', 'secrets_scan', 'secrets_read', 'secrets_write'))
  loop
    execute format('alter routine %s owner to %I', v_object.name, v_object.owner);
  end loop;
  execute 'revoke create on schema rekey from rekey_sweeper';
end
$$;
do $$
declare
  v_object record;
begin
  -- What hides rows raises an error in place of it. Not in what others' functions do that we call: their tables may have policies.
  for v_object in
    select p.oid::regprocedure::text as name, p.proowner = 'rekey_sweeper'::regrole as calls_others
    from pg_proc p
    where p.prosecdef and (p.pronamespace = 'rekey'::regnamespace
      or p.pronamespace = 'rekey_targets'::regnamespace and p.proname in ('secrets_count', 'secrets_scan', 'secrets_read', 'secrets_write'))
  loop
    execute format('alter function %s set row_security = %s', v_object.name, case when v_object.calls_others then 'on' else 'off' end);
  end loop;
end
$$;
grant execute on function rekey._call_count, rekey._call_scan, rekey._call_read, rekey._call_write, rekey._call_tenant_check to rekey_owner;
grant execute on function rekey._session_state, rekey._refuse_traces, rekey._prepared, rekey._changes, rekey._refuse_changes to rekey_sweeper;
-- Conditions of triggers on users' tables, evaluated with the rights of whoever writes; what they tell is no secret.
grant execute on function rekey._is_doomed(bytea), rekey._is_doomed(text), rekey._may_be_doomed(), rekey._is_scheduled(bytea), rekey.is_sweeping(regclass),
  rekey._refuse_doomed() to public;
-- What the functions of a blind index ask, with the rights of the owner of its table: numbers of versions.
grant execute on function rekey._versions_to_ask(integer, oid) to public;
grant execute on function rekey_targets.secrets_count, rekey_targets.secrets_scan, rekey_targets.secrets_read, rekey_targets.secrets_write to rekey_sweeper;
grant execute on function public.rotate_keys, public.key_rotation_status, public.pause_rotation, public.retry_rotation, public.rollback_rotation,
  public.mark_key_compromised, rekey._rpc_change, rekey._rpc_key_rotation_status
  to rekey_admin;
do $$ begin perform rekey._remake_columns(); end $$;

-- sql/extension.sql
-- What pg_dump is to bring along, where the extension is what owns it.
do $$
declare
  v_relation regclass;
begin
  if not exists (select from pg_extension where extname = 'pg_rekey') then
    return;
  end if;
  for v_relation in
    select c.oid::regclass from pg_class c
    where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'S')
    order by c.relkind, c.oid
  loop
    perform pg_extension_config_dump(v_relation, '');
  end loop;
end
$$;
