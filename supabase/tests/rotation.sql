-- A rotation by RPC from beginning to end, in one transaction that is rolled back.
begin;
create extension if not exists pgtap;
select plan(13);

-- Uses the KEK of the project where it has one.
select vault.create_secret(encode(extensions.gen_random_bytes(32), 'hex'), 'pg_rekey_kek')
where not exists (select from vault.decrypted_secrets where name = 'pg_rekey_kek');
select rekey.set_setting('kek_provider', 'vault');
select lives_ok('select rekey.register_kek()', 'the KEK of the Vault is registered');
select lives_ok($$ select rekey.create_keyring('pgtap') $$, 'a keyring is made');
select lives_ok($$ select rekey.set_secret('pgtap', 'hunter2', keyring => 'pgtap') $$, 'a secret is stored');

-- As PostgREST calls it. Its login alone counts, which here is whoever runs the test.
select rekey.set_setting('postgrest_login', session_user::text);
create function pg_temp.rpc(role text, claims jsonb, call text, out status text, out body jsonb) language plpgsql as $$
begin
  perform set_config('role', role, true), set_config('request.jwt.claims', claims::text, true),
    set_config('request.method', 'POST', true), set_config('response.status', '', true);
  execute format('select %s', call) into body;
  status := coalesce(nullif(current_setting('response.status', true), ''), '200');
  reset role;
  perform set_config('request.jwt.claims', '', true), set_config('request.method', '', true);
end
$$;
create temporary table answer as
  select * from pg_temp.rpc('service_role', '{"role": "service_role"}', $$ public.rotate_keys('pgtap', 'pgTAP') $$);
select is(status, '200', 'service_role rotates') from answer;
select is(body -> 'rotations' -> 0 ->> 'state', 'queued', 'and gets the rotation') from answer;
select is(r.status || (r.body ->> 'code'), '409RK004', 'once at a time')
from pg_temp.rpc('service_role', '{"role": "service_role"}', $$ public.rotate_keys('pgtap') $$) r;
select is(r.status || (r.body ->> 'code'), '403' || '42501', 'a logged-in user is refused')
from pg_temp.rpc('authenticated', '{"role": "authenticated", "sub": "pgtap"}', $$ public.rotate_keys('pgtap') $$) r;
select is(count(*), 1::bigint, 'which is audited') from rekey.audit_log where event = 'access.denied' and jwt_subject = 'pgtap';
select throws_ok(
  $$ select pg_temp.rpc('anon', '{"role": "anon"}', 'public.rotate_keys()') $$, '42501', null, 'anon cannot even call');
reset role;

do $$
begin
  for v_step in 1 .. 1000 loop
    exit when (select event from rekey.rotation_step()) = 'idle';
  end loop;
end
$$;
select is(k ->> 'name' || (k -> 'rotation' ->> 'state'), 'pgtapcompleted', 'the status shows it completed')
from pg_temp.rpc('service_role', '{"role": "service_role"}', 'public.key_rotation_status()') r,
  jsonb_array_elements(r.body -> 'keyrings') k
where k ->> 'name' = 'pgtap';
select is(rekey.get_secret('pgtap'), 'hunter2', 'the secret opens');
select is(key_version, 2, 'under the new key') from rekey.secrets where name = 'pgtap';
select ok(valid, 'and the audit log is whole') from rekey.verify_audit_log();

select * from finish();
rollback;
