-- The RPC stands in schema public (sql/code/90_rpc.sql), where others have things too.
do $$
declare
  v_name name;
begin
  if to_regnamespace('public') is null then
    raise exception 'there is no schema public' using errcode = 'invalid_schema_name',
      hint = 'pg_rekey puts rotate_keys() and others there: create schema public.';
  end if;
  select p.proname into v_name from pg_proc p
  where p.pronamespace = 'public'::regnamespace and p.proname in (
    'rotate_keys', 'key_rotation_status', 'pause_rotation', 'retry_rotation', 'rollback_rotation', 'mark_key_compromised')
  limit 1;
  if found then
    raise exception 'schema public has a function % already', v_name using errcode = 'duplicate_function',
      hint = 'pg_rekey does not replace it: rename or drop it first.';
  end if;
end
$$;
