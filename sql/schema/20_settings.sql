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
