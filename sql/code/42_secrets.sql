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
