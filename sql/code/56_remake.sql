-- What an update changes in the functions of protected columns, it changes in those that are installed. Nobody else works
-- meanwhile (update.sql). Of an extension, they are no part: each table's owner has his own.

create or replace function rekey._remake_columns() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_is_extension boolean := exists (select from pg_extension e where e.extname = 'pg_rekey');
  v_column record;
  v_function regprocedure;
  v_statement text;
begin
  for v_column in
    select c as protected, c.id, c.label, s.relation, s.attnums, pg_get_userbyid(t.relowner) as owner
    from rekey.protected_columns c
    cross join lateral rekey._column_shape(c.id) s
    join pg_class t on t.oid = s.relation
    where cardinality(s.attnums) = cardinality(c.places) + (c.index_place is not null)::integer
      -- Where the table has another owner since, the column waits for him.
      and t.relowner = (select p.proowner from pg_proc p where p.oid = to_regproc(format('rekey_targets.column_%s_guard', c.id)))
    order by c.id
  loop
    v_function := to_regprocedure(format('rekey_targets.column_%s_trigger()', v_column.id));
    if v_function is not null then
      -- Triggers depend on it: it is replaced. The script of an extension replaces nothing but its own.
      if v_is_extension then
        execute format('alter extension pg_rekey add function %s', v_function);
      end if;
      execute rekey._trigger_statement(v_column.id, rekey._write_trigger_body(v_column.protected, v_column.relation, v_column.attnums));
    end if;
    if not pg_has_role(v_column.owner, 'usage') then
      raise warning '% may be blocked now: the functions of columns changed, and % owns its table', v_column.label, v_column.owner
        using hint = 'Where rekey.column_status says so, that role repeats rekey.protect_column().', constraint = 'protect_again';
      continue;
    end if;
    for v_function in
      select p.oid::regprocedure from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any ((rekey._function_names('column_' || v_column.id))[2:6])
    loop
      execute format('drop function %s', v_function);
    end loop;
    execute format('grant create on schema rekey_targets to %I', v_column.owner);
    foreach v_statement in array rekey._function_statements(v_column.protected, v_column.owner)
      || rekey._index_function_statements(v_column.protected, v_column.relation, v_column.attnums) loop
      execute v_statement;
    end loop;
    execute format('revoke create on schema rekey_targets from %I', v_column.owner);
  end loop;
  for v_function in
    select p.oid::regprocedure from pg_depend d join pg_proc p on p.oid = d.objid
    where d.classid = 'pg_proc'::regclass and d.deptype = 'e' and p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_'
  loop
    execute format('alter extension pg_rekey drop function %s', v_function);
  end loop;
end
$$;
comment on function rekey._remake_columns is
  'Makes the functions of protected columns anew, as this version has them, in the name of their owners. A warning where whoever updates is no member of an owner: that column may be blocked until its owner repeats rekey.protect_column().';
