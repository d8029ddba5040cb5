-- Where envelopes are, and what was forgotten: envelopes in columns that are not protected, and columns that sound like
-- secrets and hold none.

-- The text form of an envelope begins with rk1:UksB and has 104 characters or more; its bytes, 75 or more, are printed as
-- \x524b01..., in an array, a row or JSON too. Nothing is cast to text, which may be anybody's function: format() calls the
-- output function of a type.
-- A name proves nothing: whoever may make a schema may call it cron.
create or replace function rekey._is_extension_table(relation oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_depend d join pg_extension x on x.oid = d.refobjid
    where d.classid = 'pg_class'::regclass and d.objid = relation and d.deptype = 'e' and d.refclassid = 'pg_extension'::regclass
      and x.extname in ('pg_cron', 'supabase_vault'));
end;
comment on function rekey._is_extension_table is 'Whether a table belongs to pg_cron or Supabase Vault, which hold no envelopes.';
grant execute on function rekey._is_extension_table to rekey_operator, rekey_auditor;

create or replace function rekey.find_envelopes()
returns table (relation regclass, column_name name, envelopes bigint, embedded bigint, others bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
set bytea_output = hex
set constraint_exclusion = off  -- as rekey.search_step()
as $$
declare
  -- Conditions on a value.
  v_of_bytes text := $q$substr(%1$s, 1, 3) = '\x524b01' and octet_length(%1$s) >= 75 and octet_length(%1$s) %% 16 = 11$q$;
  v_of_text text := $q$left(%1$s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$q$;
  -- In full: source text of pg_rekey, this line too, may stand in a table of migrations.
  v_within text := $q$(strpos(%1$s collate "C", 'rk1:UksB') > 0 and %1$s collate "C" ~ 'rk1:UksB[A-Za-z0-9+/]{96}'
    or strpos(%1$s collate "C", '\x524b01') > 0 and %1$s collate "C" ~ '\\x524b01[0-9a-f]{144}')$q$;
  v_table record;
  v_part oid;
  v_counts bigint[];
begin
  for v_table in
    select c.oid, c.oid::regclass as relation, array_agg(a.attname order by a.attnum) as names,
      string_agg(case
        when a.atttypid = 'bytea'::regtype then
          format($q$count(*) filter (where %2$s), 0, count(*) filter (where substr(%1$s, 1, 3) <> '\x524b01')$q$, v.value, format(v_of_bytes, v.value))
        when a.atttypid in ('text'::regtype, 'varchar'::regtype) then
          format($q$count(*) filter (where %2$s), count(*) filter (where not (%2$s) and %3$s),
            count(*) filter (where left(%1$s, 4) collate "C" <> 'rk1:')$q$, v.value, format(v_of_text, v.value), format(v_within, v.value))
        else format('0, count(*) filter (where %s), null', format(v_within, format($q$format('%%s', %s)$q$, v.value))) end,
        ', ' order by a.attnum) as counts
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    cross join lateral (select format('t.%I', a.attname)) as v(value)
    join pg_type y on y.oid = a.atttypid
    left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
    where c.relkind in ('r', 'p', 'm') and not c.relispartition and c.relpersistence <> 't' and c.relispopulated
      and c.oid >= 16384 and not (n.nspname in ('rekey', 'rekey_targets') and c.relowner = 'rekey_owner'::regrole) and rekey._is_extension_table(c.oid) is false
      -- Numbers, times, network addresses and the like have no room for one.
      and coalesce(e.typlen, y.typlen) not between 1 and 74 and coalesce(e.typcategory, y.typcategory) not in ('N', 'B', 'D', 'T', 'E', 'G', 'I', 'V')
    group by c.oid
    order by c.oid::regclass::text
  loop
    relation := v_table.relation;
    v_counts := null;
    begin
      for v_part in
        with recursive parts as (
          select v_table.oid as oid
          union select i.inhrelid from pg_inherits i join parts p on p.oid = i.inhparent
        )
        select p.oid from parts p
      loop
        if rekey._hold(v_part, v_part::regclass::text) is not null then
          raise exception using errcode = 'RKEND';
        end if;
      end loop;
      execute format('select array[%s] from %s t', v_table.counts, relation) into v_counts;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;  -- gives the locks back
      when others then null;  -- nothing is known of it
    end;
    for v_place in 1 .. case when v_counts is null then 1 else cardinality(v_table.names) end loop
      column_name := case when v_counts is not null then v_table.names[v_place] end;
      envelopes := v_counts[3 * v_place - 2];
      embedded := v_counts[3 * v_place - 1];
      others := v_counts[3 * v_place];
      return next;
    end loop;
  end loop;
end
$$;
comment on function rekey.find_envelopes is
  'Counts, in every column that has room for one: envelopes; values of another kind that an envelope stands in (text around it, JSON, arrays, rows, domains, and their like); and, of text and bytea columns, others. Reads every ordinary and partitioned table and materialized view that the caller may read, whole, with his rights; of one that he may not read whole, or that has an index or statistics over a function that is neither a superuser''s nor his, which reading it may run, there is a row without a column. Left out are tables of PostgreSQL, pg_rekey, pg_cron and Supabase Vault, temporary and foreign tables, large objects, and what stands within a longer bytea value.';
grant execute on function rekey.find_envelopes to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey.find_unprotected()
returns table (relation regclass, column_name name, finding text, rows bigint, advice text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select f.relation, f.column_name, w.finding, w.rows, w.advice
    from rekey.find_envelopes() with ordinality f (relation, column_name, envelopes, embedded, others, place)
    left join rekey.column_status s on s.relation = f.relation and s.column_name = f.column_name
    cross join lateral (
      select f.column_name ~* '(^|_)(token|secret|password|passwd|api_?key|private_?key|credentials?)(s?)(_|$)'
          -- Those of Supabase's own schemas are its own affair.
          and (select s.nspowner::regrole::text !~ '^"?supabase' from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = f.relation) as telling,
        format('%L, %L', f.relation, f.column_name) as names) n
    cross join lateral (values
      (f.column_name is null, 'cannot be read', null, 'Look at it as its owner.'),
      (f.envelopes > 0 and s.label is null, 'holds envelopes, and is not protected', f.envelopes,
        format('select rekey.protect_column(%s): without it no rotation takes these rows along.', n.names)),
      (f.embedded > 0, 'holds envelopes within other values', f.embedded,
        'No rotation takes them along, and a key that only they stand on counts as unused. Give them a column of their own, and protect it.'),
      (f.others > 0 and s.label is not null, 'is protected, and holds values that are not encrypted', f.others,
        format('select rekey.adopt_column(%s)', n.names)),
      (f.others > 0 and s.label is null and n.telling, 'sounds like a secret, and is not encrypted', f.others,
        format('select rekey.protect_column(%s), then rekey.adopt_column()', n.names))
    ) as w (so, finding, rows, advice)
    -- A materialized view is a copy, made anew by REFRESH.
    where w.so and (select c.relkind from pg_class c where c.oid = f.relation) <> 'm'
    order by f.place;
end
$$;
comment on function rekey.find_unprotected is
  'Columns that were forgotten: those that hold envelopes and are not protected, or hold them within other values; and those whose name sounds like a secret, or that are protected, and hold something else. Values are counted, never shown. A table that the caller may not read whole is a finding. Reads what rekey.find_envelopes() reads, with the rights of the caller.';
grant execute on function rekey.find_unprotected to rekey_admin, rekey_operator, rekey_auditor;
