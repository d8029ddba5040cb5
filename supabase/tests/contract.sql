-- The contract: every public function, its arguments with their names and defaults, and its result.
begin;
create extension if not exists pgtap;

select plan(77 + 1);

create temporary table contract (name text, arguments text, result text);
insert into contract values
  ('add_endpoint', 'name text, address text, events text[] DEFAULT NULL::text[], slack boolean DEFAULT false, allow_private boolean DEFAULT false, by_pg_net boolean DEFAULT false', 'text'),
  ('adopt_column', 'target regclass, column_name name, formats text[] DEFAULT ''{plaintext}''::text[], force boolean DEFAULT false, reason text DEFAULT NULL::text, values_are_tokens boolean DEFAULT false, unwrap text DEFAULT NULL::text', 'SETOF rekey.rotation_status'),
  ('adopt_vault', 'keyring text DEFAULT ''default''::text, tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid', 'bigint'),
  ('adoption_batch', 'rotation_id bigint', 'rekey._adoption'),
  ('adoption_doubt', 'target regclass, column_name name, formats text[] DEFAULT ''{plaintext}''::text[], values_are_tokens boolean DEFAULT false', 'text'),
  ('adoption_preview', 'target regclass, column_name name, formats text[] DEFAULT ''{plaintext}''::text[], force boolean DEFAULT false, relation regclass DEFAULT NULL::regclass, first tid DEFAULT ''(0,0)''::tid', 'rekey._adoption'),
  ('adoption_store', 'rotation_id bigint, relation regclass', 'bigint'),
  ('audit_checkpoint', '', 'jsonb'),
  ('begin_search', '', 'bigint'),
  ('can_access_tenant', 'tenant_id uuid', 'boolean'),
  ('cancel_key_destruction', 'keyring text, version integer', 'void'),
  ('clear_schedule', 'keyring text DEFAULT ''default''::text', 'void'),
  ('confirm_emptied', 'keyring text', 'bigint'),
  ('create_decrypted_view', 'target regclass', 'text'),
  ('create_keyring', 'name text, tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid, rotate_every interval DEFAULT NULL::interval', 'rekey.keyrings'),
  ('decrypt', 'ciphertext bytea, context text[] DEFAULT ''{}''::text[], pass bytea DEFAULT NULL::bytea', 'bytea'),
  ('decrypt', 'ciphertext text, context text[] DEFAULT ''{}''::text[], pass bytea DEFAULT NULL::bytea', 'bytea'),
  ('decrypt_many', 'ciphertexts bytea[], contexts text[] DEFAULT ''{}''::text[]', 'bytea[]'),
  ('decrypt_many', 'ciphertexts text[], contexts text[] DEFAULT ''{}''::text[]', 'bytea[]'),
  ('decrypt_text', 'ciphertext bytea, context text[] DEFAULT ''{}''::text[], pass bytea DEFAULT NULL::bytea', 'text'),
  ('decrypt_text', 'ciphertext text, context text[] DEFAULT ''{}''::text[], pass bytea DEFAULT NULL::bytea', 'text'),
  ('delete_secret', 'name text, tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid', 'boolean'),
  ('disable_key', 'keyring text, version integer, reason text DEFAULT NULL::text', 'void'),
  ('enable_key', 'keyring text, version integer, reason text DEFAULT NULL::text', 'void'),
  ('encrypt', 'plaintext bytea, keyring text DEFAULT ''default''::text, context text[] DEFAULT ''{}''::text[]', 'bytea'),
  ('encrypt', 'plaintext text, keyring text DEFAULT ''default''::text, context text[] DEFAULT ''{}''::text[]', 'bytea'),
  ('encrypt_text', 'plaintext text, keyring text DEFAULT ''default''::text, context text[] DEFAULT ''{}''::text[]', 'text'),
  ('find_envelopes', '', 'TABLE(relation regclass, column_name name, envelopes bigint, embedded bigint, others bigint, encrypted bigint, secret_keys bigint)'),
  ('find_unprotected', '', 'TABLE(relation regclass, column_name name, finding text, rows bigint, advice text, action text)'),
  ('findings', '', 'TABLE(kind text, severity text, target text, keyring text, version integer, rows bigint, finding text, advice text, action text)'),
  ('get_secret', 'name text, tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid', 'text'),
  ('is_sweeping', 'relation regclass', 'boolean'),
  ('key_usage', 'keyring text DEFAULT NULL::text', 'SETOF rekey.key_rows'),
  ('lock', '', 'void'),
  ('make_searchable', 'target regclass, column_name name, index_column name DEFAULT NULL::name, normalization text DEFAULT NULL::text', 'text'),
  ('mark_key_compromised', 'keyring text, version integer, reason text DEFAULT NULL::text', 'SETOF rekey.rotation_status'),
  ('metrics', '', 'TABLE(name text, labels jsonb, value double precision)'),
  ('pause_rotation', 'id bigint', 'void'),
  ('protect_column', 'target regclass, column_name name, keyring text DEFAULT ''default''::text, context_columns name[] DEFAULT NULL::name[], encrypt_on_write boolean DEFAULT false, fire_triggers boolean DEFAULT true, search_path text DEFAULT current_setting(''search_path''::text)', 'text'),
  ('prune_audit_log', 'first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb', 'bigint'),
  ('reading_pass', 'label text', 'bytea'),
  ('rebind_column', 'target regclass, column_name name, label text DEFAULT NULL::text', 'text'),
  ('protection_findings', '', 'TABLE(label text, kind text, severity text, finding text, advice text, action text)'),
  ('read_secrets', 'names text[] DEFAULT NULL::text[], tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid', 'TABLE(name text, value text)'),
  ('register_kek', 'replace_lost boolean DEFAULT false', 'integer'),
  ('remove_endpoint', 'name text', 'void'),
  ('resolve_failure', 'id bigint, action text, reason text DEFAULT NULL::text', 'void'),
  ('resume_rotation', 'id bigint', 'void'),
  ('resync_sequences', '', 'bigint'),
  ('retire_keyring', 'name text', 'void'),
  ('retry_rotation', 'id bigint', 'void'),
  ('rollback_rotation', 'id bigint, reason text DEFAULT NULL::text', 'SETOF rekey.rotation_status'),
  ('rotate_kek', '', 'integer'),
  ('rotate_keys', 'keyring text DEFAULT NULL::text, reason text DEFAULT NULL::text, supersede boolean DEFAULT false', 'SETOF rekey.rotation_status'),
  ('rotation_step', 'whole boolean DEFAULT NULL::boolean, who_else text DEFAULT NULL::text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb', 'record'),
  ('run_rotations', 'IN max_duration interval DEFAULT ''00:00:50''::interval', 'procedure'),
  ('schedule_key_destruction', 'keyring text, version integer, wait interval DEFAULT NULL::interval', 'timestamp with time zone'),
  ('schedule_worker', 'schedule text DEFAULT NULL::text, workers integer DEFAULT NULL::integer', 'bigint'),
  ('search', 'label text, value text', 'bytea[]'),
  ('search_many', 'label text, "values" text[]', 'bytea[]'),
  ('search_step', 'OUT event text, OUT wait interval, OUT detail jsonb', 'record'),
  ('set_schedule', 'keyring text, rotate_every interval, first_at timestamp with time zone DEFAULT NULL::timestamp with time zone', 'timestamp with time zone'),
  ('set_secret', 'name text, value text, tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid, keyring text DEFAULT ''default''::text, description text DEFAULT NULL::text', 'uuid'),
  ('set_secrets', 'names text[], "values" text[], tenant_id uuid DEFAULT ''00000000-0000-0000-0000-000000000000''::uuid, keyring text DEFAULT ''default''::text, descriptions text[] DEFAULT NULL::text[]', 'uuid[]'),
  ('set_setting', 'name text, value text', 'void'),
  ('test_endpoint', 'name text', 'bigint'),
  ('tick', '', 'procedure'),
  ('unlock', 'kek bytea, scope text DEFAULT ''transaction''::text', 'text'),
  ('unlock_copied', 'scope text DEFAULT ''transaction''::text', 'text'),
  ('unprotect_column', 'label text', 'void'),
  ('unprotect_column', 'target regclass, column_name name, decrypt boolean DEFAULT false', 'bigint'),
  ('unschedule_worker', '', 'boolean'),
  ('verify_audit_log', 'anchor jsonb DEFAULT NULL::jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text', 'record'),
  ('verify_ciphertexts', 'keyring text DEFAULT NULL::text', 'SETOF rekey.verified_rows'),
  ('version', '', 'text'),
  ('watch', '', 'integer'),
  ('who_else', '', 'text');

select is(
  array(select pg_get_function_result(p.oid) from pg_proc p
        where p.pronamespace = 'rekey'::regnamespace and p.proname = c.name
          and pg_get_function_arguments(p.oid) = c.arguments),
  array[nullif(c.result, 'procedure')], format('rekey.%s(%s)', c.name, c.arguments))
from contract c;

select set_eq(
  $$ select p.proname::text from pg_proc p where p.pronamespace = 'rekey'::regnamespace and p.proname not like '\_%' $$,
  'select name from contract', 'there are no others');

select * from finish();
rollback;
