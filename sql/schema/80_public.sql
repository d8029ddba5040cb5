-- The RPC stands in schema public (sql/code/90_rpc.sql), where others have things too.
do $$
begin
  if to_regnamespace('public') is null then
    raise exception 'there is no schema public' using errcode = 'invalid_schema_name',
      hint = 'pg_rekey puts rotate_keys() and key_rotation_status() there: create schema public.';
  end if;
  if exists (select from pg_proc p where p.pronamespace = 'public'::regnamespace and p.proname in ('rotate_keys', 'key_rotation_status')) then
    raise exception 'schema public has a function rotate_keys or key_rotation_status already' using errcode = 'duplicate_function',
      hint = 'pg_rekey does not replace it: rename or drop it first.';
  end if;
end
$$;
