-- What was forgotten: envelopes in columns that are not protected, and columns that sound like secrets and hold none.

create or replace function rekey.find_unprotected()
returns table (relation regclass, column_name name, finding text, rows bigint, advice text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
as $$
declare
  v_table record;
  v_counts bigint[];
begin
  for v_table in
    select c.oid::regclass as relation, array_agg(a.attname order by a.attnum) as names,
      array_agg(a.attname ~* '(^|_)(token|secret|password|passwd|api_?key|private_?key|credentials?)(s?)(_|$)' order by a.attnum) as telling,
      array_agg(s.label is not null order by a.attnum) as protected,
      string_agg(format(case when a.atttypid = 'bytea'::regtype
          then $q$count(*) filter (where substr(t.%1$I, 1, 3) = '\x524b01'), count(*) filter (where substr(t.%1$I, 1, 3) <> '\x524b01')$q$
          else $q$count(*) filter (where left(t.%1$I, 4) collate "C" = 'rk1:'), count(*) filter (where left(t.%1$I, 4) collate "C" <> 'rk1:')$q$ end, a.attname),
        ', ' order by a.attnum) as counts
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
      and a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)
    left join rekey.column_status s on s.relation = c.oid and s.column_name = a.attname
    where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence <> 't'
      and n.nspname !~ '^(pg_|information_schema$|rekey(_targets)?$|vault$|cron$)' and n.nspowner::regrole::text !~ '^"?supabase'
    group by c.oid
    order by c.oid::regclass::text
  loop
    relation := v_table.relation;
    begin
      execute format('select array[%s] from %s t', v_table.counts, relation) into v_counts;
    exception when insufficient_privilege then
      column_name := null;
      finding := 'cannot be read';
      rows := null;
      advice := 'Look at it as its owner.';
      return next;
      continue;
    end;
    for v_place in 1 .. cardinality(v_table.names) loop
      column_name := v_table.names[v_place];
      if v_counts[2 * v_place - 1] > 0 and not v_table.protected[v_place] then
        finding := 'holds envelopes, and is not protected';
        rows := v_counts[2 * v_place - 1];
        advice := format('select rekey.protect_column(%L, %L): without it no rotation takes these rows along.', relation, column_name);
        return next;
      end if;
      if v_counts[2 * v_place] > 0 and (v_table.telling[v_place] or v_table.protected[v_place]) then
        finding := case when v_table.protected[v_place] then 'is protected, and holds values that are not encrypted'
          else 'sounds like a secret, and is not encrypted' end;
        rows := v_counts[2 * v_place];
        advice := case when v_table.protected[v_place] then format('select rekey.adopt_column(%L, %L)', relation, column_name)
          else format('select rekey.protect_column(%L, %L), then rekey.adopt_column()', relation, column_name) end;
        return next;
      end if;
    end loop;
  end loop;
end
$$;
comment on function rekey.find_unprotected is
  'Columns that were forgotten: those that hold envelopes and are not protected, found by the header of the values; and those whose name sounds like a secret, or that are protected, and hold something else. Values are counted, never shown. Reads every text and bytea column of the tables that the caller may read, with his rights; a table that he may not read whole is a finding. Left out are system schemas, those of Supabase, and temporary tables.';
grant execute on function rekey.find_unprotected to rekey_admin, rekey_operator, rekey_auditor;
