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
