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
