-- What pg_dump is to bring along, where the extension is what owns it.
do $$
declare
  v_relation regclass;
begin
  if not exists (select from pg_extension where extname = 'pg_rekey') then
    return;
  end if;
  for v_relation in
    select c.oid::regclass from pg_class c
    where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'S')
    order by c.relkind, c.oid
  loop
    perform pg_extension_config_dump(v_relation, '');
  end loop;
end
$$;
