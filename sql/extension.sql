-- What pg_dump is to bring along.
do $$
declare
  v_relation regclass;
begin
  for v_relation in
    select c.oid::regclass from pg_class c
    where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'S')
    order by c.relkind, c.oid
  loop
    perform pg_extension_config_dump(v_relation, '');
  end loop;
end
$$;
