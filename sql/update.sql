-- An update finds no writer or worker in the middle of the old code, and the version that it was made for.
do $$
declare
  v_table regclass;
begin
  -- Who plans or verifies only reads, so that locks on tables would not tell of him.
  perform pg_advisory_xact_lock(0, 1), pg_advisory_xact_lock(0, 2), pg_advisory_xact_lock(0, 5);
  for v_table in
    select c.oid::regclass from pg_class c
    where c.relnamespace = 'rekey'::regnamespace and c.relkind = 'r'
    order by c.relname
  loop
    execute format('lock table %s in exclusive mode', v_table);
  end loop;
  if rekey.version() <> '__SINCE__' then
    raise exception 'this updates pg_rekey __SINCE__ to __VERSION__, the database has %', rekey.version()
      using errcode = 'object_not_in_prerequisite_state',
            hint = 'Updates are applied in order, and once. pg-rekey upgrade finds those that are missing.';
  end if;
end
$$;
