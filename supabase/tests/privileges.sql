-- What the roles of the API may do: two functions, and nothing else.
begin;
create extension if not exists pgtap;
select plan(21);

select is(has_function_privilege(role, function, 'execute'), allowed, format('%s, %s: %s', role, function, allowed))
from (values
  ('anon', 'public.rotate_keys(text, text, boolean)', false),
  ('anon', 'public.key_rotation_status()', false),
  ('anon', 'public.mark_key_compromised(text, integer, text)', false),
  ('anon', 'public.pause_rotation(bigint)', false),
  ('anon', 'public.retry_rotation(bigint)', false),
  ('anon', 'public.rollback_rotation(bigint, text)', false),
  ('authenticated', 'public.rotate_keys(text, text, boolean)', true),
  ('authenticated', 'public.key_rotation_status()', true),
  ('authenticated', 'public.mark_key_compromised(text, integer, text)', true),
  ('authenticated', 'public.pause_rotation(bigint)', true),
  ('authenticated', 'public.retry_rotation(bigint)', true),
  ('authenticated', 'public.rollback_rotation(bigint, text)', true),
  ('service_role', 'public.rotate_keys(text, text, boolean)', true),
  ('service_role', 'public.key_rotation_status()', true),
  ('service_role', 'public.mark_key_compromised(text, integer, text)', true),
  ('service_role', 'public.pause_rotation(bigint)', true),
  ('service_role', 'public.retry_rotation(bigint)', true),
  ('service_role', 'public.rollback_rotation(bigint, text)', true)
) as expected (role, function, allowed);

select is_empty(
  $$ select p.oid::regprocedure, r.rolname from pg_proc p, pg_roles r
     where p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
       and r.rolname in ('anon', 'authenticated', 'service_role')
       and has_function_privilege(r.oid, p.oid, 'execute')
       and not (r.rolname <> 'anon' and p.proname in ('_rpc_change', '_rpc_key_rotation_status'))
       and p.proname not in ('_is_doomed', '_may_be_doomed', '_is_scheduled', '_refuse_doomed', '_versions_to_ask', 'is_sweeping') $$,
  'they execute no function of schema rekey but the two behind the RPC, and what triggers ask');

select is_empty(
  $$ select c.oid::regclass, r.rolname from pg_class c, pg_roles r
     where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'v')
       and r.rolname in ('anon', 'authenticated', 'service_role')
       and has_table_privilege(r.oid, c.oid, 'select, insert, update, delete, truncate, references, trigger') $$,
  'they have no privilege on a table or view');

select is_empty(
  $$ select r.rolname from pg_roles r where r.rolname in ('anon', 'authenticated', 'service_role')
       and has_schema_privilege(r.oid, 'rekey', 'usage') $$,
  'they cannot look into schema rekey');

select * from finish();
rollback;
