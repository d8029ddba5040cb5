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
