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
