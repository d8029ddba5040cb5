-- For `supabase db reset` on a development machine: a KEK that nobody has seen, a keyring and a schedule. Safe to repeat.
select vault.create_secret(encode(extensions.gen_random_bytes(32), 'hex'), 'pg_rekey_kek', 'Key-encryption key of pg_rekey')
where not exists (select from vault.secrets where name = 'pg_rekey_kek');
select rekey.set_setting('kek_provider', 'vault');
select rekey.register_kek();
select rekey.create_keyring('default', rotate_every => '90 days')
where not exists (select from rekey.keyrings where name = 'default');
select rekey.schedule_worker() where exists (select from pg_extension where extname = 'pg_cron');
