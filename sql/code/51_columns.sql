-- Columns of the user's own tables as targets. The functions that read and write a protected column are made by its owner,
-- from the bodies below. They find the column through a guard function, which names it and its context columns: being
-- bound early, it follows renames and restores, and keeps them from being dropped.

create or replace function rekey._column_bodies(protected rekey.protected_columns)
returns table (name text, arguments text, result text, volatility text, body text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text := 'column_' || protected.id;
  v_bytes text := 't.%1$s';
  -- What a value begins with, whether an envelope may, and the header in it, without which it is none.
  v_start text := 'substr(t.%1$s, 1, 11)';
  v_may_be text := $sql$substr(g.start, 1, 3) = '\x524b01'$sql$;
  v_header text := $sql$case when octet_length(g.start) = 11 and substr(g.start, 1, 3) = '\x524b01' then g.start end$sql$;
  v_stored text := 'u.ciphertext';
  -- Whether a value still has the header and IV that were read. (IS TRUE keeps it from being the key of a hash or merge join: the
  -- values of the whole relation would be read, wherever they are stored.)
  v_begins text := '(pg_catalog.substr(t.%1$s, 1, 27) operator(pg_catalog.=) u.start) is true';
  -- What holds for the UPDATE of a rotation. The path, in which names could be anybody's, ends with the function: to set it back
  -- would hide that a trigger has set it for the session. The other is set back for the session, for the same reason.
  v_kept_role text := case when protected.fire_triggers then '' else '
  v_role text := current_setting(''session_replication_role'');' end;
  v_before text := case when protected.fire_triggers then format('perform set_config(''search_path'', %L, true);', protected.search_path)
    else 'perform set_config(''session_replication_role'', ''replica'', true);' end;
  v_after text := case when protected.fire_triggers then '' else 'perform set_config(''session_replication_role'', v_role, false);' end;
  v_searchable boolean := protected.index_place is not null;
  v_from text;
  v_select text;
  v_page text;
  v_count text;
  v_due text := 'h.header <> all ($6)';
  v_set text;
begin
  -- The statements have places for the column (%1$s), the relation (%2$s), context (%3$s) and key (%4$s) of a row, all
  -- columns that these take (%5$s), and the bytes of context and key (%6$s); of a searchable column, for the one with its index (%7$s).
  if protected.is_text then
    -- A column may have a collation that knows no regular expressions, or takes other letters for equal.
    v_start := 'left(t.%1$s, 20) collate "C"';
    v_may_be := $sql$left(g.start, 8) = 'rk1:UksB'$sql$;
    v_header := $sql$case when g.start ~ '^rk1:UksB[A-Za-z0-9+/]{12}' then substr(decode(right(g.start, -4), 'base64'), 1, 11) end$sql$;
    -- As rekey._from_text(). Of an envelope that is damaged as a text, the header, by which its failure is noted.
    v_bytes := $sql$case
      when t.%1$s collate "C" ~ '^rk1:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$'
      then decode(right(t.%1$s, -4), 'base64') else coalesce((select $sql$ || v_header || ' from (select ' || v_start || $sql$ as start) g), convert_to(t.%1$s, 'UTF8')) end$sql$;
    v_begins := $sql$(pg_catalog.left(t.%1$s, 40) collate pg_catalog."C" operator(pg_catalog.=) ('rk1:' operator(pg_catalog.||) pg_catalog.encode(u.start, 'base64'))) is true$sql$;
    v_stored := $sql$'rk1:' operator(pg_catalog.||) pg_catalog.replace(pg_catalog.encode(u.ciphertext, 'base64'), E'\n', '')$sql$;
  end if;
  v_from := ' from only %2$s t
    cross join lateral (select ' || v_header || ' as header from (select ' || v_start || ' as start offset 0) g offset 0) h';
  -- The rows first, then what is made of those that are wanted: there may be many more in a range, or in max_rows.
  -- (What is added to the columns of the table has names of system columns, which none of them can have.)
  -- More bytes than any envelope can have (cmax is NULL then) are not read: a GB that was compressed, or stored out of line, has
  -- no room in the arrays. octet_length() asks only for the length that is stored.
  v_select := 'with page as materialized (
    select t.ctid, %5$s, case when octet_length(t.%1$s)::bigint%6$s <= 67108864 then octet_length(t.%1$s)::bigint%6$s end as cmax,
      case when octet_length(t.%1$s)::bigint%6$s > 67108864 then h.header || ''\x6c61726765'' end as xmin' || v_from;
  v_page := '), total as (
    select sum(coalesce(t.cmax, 100)) as bytes from page t
  ), sized as (
    select t.*, 0 as cmin from page t where (select a.bytes from total a) <= $5
    union all
    select t.*, sum(coalesce(t.cmax, 100)) over (order by t.ctid rows unbounded preceding) - coalesce(t.cmax, 100)
    from page t where (select a.bytes from total a) > $5
  )
  select case when count(*) filter (where t.cmin < $5) < count(*) or count(*) = $4 then max(t.ctid) filter (where t.cmin < $5) end,
    array_agg(t.ctid) filter (where t.cmin < $5), array_agg(case when t.cmax is null then t.xmin else ' || v_bytes || ' end) filter (where t.cmin < $5),
    array_agg(case when t.cmax is null then '''' else %3$s end) filter (where t.cmin < $5), array_agg(%4$s) filter (where t.cmin < $5),
    ' || case when v_searchable then 'array_agg(t.%7$s) filter (where t.cmin < $5)' else 'null::bytea[]' end || '
  from sized t';
  v_count := 'with begun as (
      select case when ' || v_may_be || ' then g.start end as start, count(*) as rows
      from (select ' || v_start || ' as start from only %2$s t where t.%1$s is not null offset 0) g group by 1
    ), headed as (
      select (get_byte(h.header, 3) << 24) | (get_byte(h.header, 4) << 16) | (get_byte(h.header, 5) << 8) | get_byte(h.header, 6) as keyring_id,
        (get_byte(h.header, 7) << 24) | (get_byte(h.header, 8) << 16) | (get_byte(h.header, 9) << 8) | get_byte(h.header, 10) as version, g.rows
      from begun g cross join lateral (select ' || v_header || ' as header offset 0) h
    )
    select e.keyring_id, e.version, sum(e.rows)::bigint from headed e where $1 is null or e.keyring_id = any ($1) group by 1, 2';
  if v_searchable then
    -- What stands in the index under another version than its value is counted once more, as of version 0, which there is not.
    v_count := 'with begun as (
      select case when ' || v_may_be || ' then g.start end as start, g.index, count(*) as rows
      from (select ' || v_start || ' as start, substr(t.%7$s, 1, 4) as index from only %2$s t where t.%1$s is not null offset 0) g group by 1, 2
    ), headed as (
      select (get_byte(h.header, 3) << 24) | (get_byte(h.header, 4) << 16) | (get_byte(h.header, 5) << 8) | get_byte(h.header, 6) as keyring_id,
        (get_byte(h.header, 7) << 24) | (get_byte(h.header, 8) << 16) | (get_byte(h.header, 9) << 8) | get_byte(h.header, 10) as version,
        h.header is not null and g.index is distinct from substr(h.header, 8, 4) as astray, g.rows
      from begun g cross join lateral (select ' || v_header || ' as header offset 0) h
    ), counted as (
      select e.keyring_id, e.version, e.rows from headed e
      union all
      select e.keyring_id, 0, e.rows from headed e where e.astray
    )
    select e.keyring_id, e.version, sum(e.rows)::bigint from counted e where $1 is null or e.keyring_id = any ($1) group by 1, 2';
    v_due := '($6 is null or h.header <> all ($6) or substr(t.%7$s, 1, 4) is distinct from substr(h.header, 8, 4))';
  end if;
  v_set := quote_literal('update only %2$s t set %1$s = ' || v_stored || case when v_searchable then ', %7$s = u.index' else '' end || '
    from rows from (pg_catalog.unnest((select $1)), pg_catalog.unnest((select $2)), pg_catalog.unnest((select $3))'
      || case when v_searchable then ', pg_catalog.unnest((select $4))' else '' end || ') as u(row, start, ciphertext' || case when v_searchable then ', index' else '' end || ')
    where t.ctid operator(pg_catalog.=) u.row and ($2 is null or ' || v_begins || ')
    returning t.%1$s operator(pg_catalog.=) (' || v_stored || ')' || case when protected.is_text then ' collate pg_catalog."C"' else '' end
      || case when v_searchable then ' and coalesce(t.%7$s operator(pg_catalog.=) u.index, false)' else '' end);
  if v_searchable then
    v_set := 'case when ciphertexts is not null then ' || v_set || ' else ' || quote_literal('update only %2$s t set %7$s = u.index
    from rows from (pg_catalog.unnest((select $1)), pg_catalog.unnest((select $2)), pg_catalog.unnest((select $4))) as u(row, start, index)
    where t.ctid operator(pg_catalog.=) u.row and ' || v_begins || ' and $3 is null
    returning coalesce(t.%7$s operator(pg_catalog.=) u.index, false)') || ' end';
  end if;

  return query
  select format('%s_%s', v_prefix, b.suffix), b.arguments, b.result, b.volatility, b.body
  from (values
    ('sql', 'relation regclass, template text', 'text', 'stable', $body$
declare
  v_table regclass;
  v_names text[];
  v_context text;
  v_key text;
  v_key_names text[];
  v_lengths text;
  v_whole regclass;
begin
  -- First the locks, so that what is found out remains true. The whole before its parts, as ALTER TABLE locks them: an UPDATE of a
  -- partition would lock it after them, to check their bounds.
  for v_whole in
    select c.oid
    from (select relation as relid, 0 as place union all select * from pg_partition_ancestors(relation) with ordinality) a join pg_class c on c.oid = a.relid
    where c.oid = relation and a.place = 0
      or c.oid <> relation and has_table_privilege(c.oid, 'select') and has_schema_privilege(c.relnamespace, 'usage')
    order by a.place desc
  loop
    execute format('select from only %s limit 0', v_whole);
  end loop;
  -- The columns that the guard names, in table order.
  select d.refobjid, array_agg(quote_ident(a.attname) order by a.attnum) into v_table, v_names
  from pg_depend d
  join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
  where d.classid = 'pg_proc'::regclass and d.objid = 'rekey_targets.$body$ || v_prefix || $body$_guard'::regproc
    and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
  group by d.refobjid;
  if relation <> v_table and not exists (select from pg_partition_ancestors(relation) a where a.relid = v_table) then
    raise exception '% is no part of the protected table any more', relation using errcode = 'serialization_failure';
  elsif template is null then
    perform from pg_partition_tree(relation);
    return null;
  end if;
  select string_agg(format($q$coalesce(int4send(octet_length(convert_to(t.%1$s::text, 'UTF8'))) || convert_to(t.%1$s::text, 'UTF8'), '\xffffffff')$q$,
      v_names[p.place]), ' || ' order by p.rank)
  into v_context
  from unnest('$body$ || protected.places[2:]::text || $body$'::integer[]) with ordinality as p(place, rank);
  -- A row is called by its primary key, where it has one.
  -- (A cast to text of a type that is not PostgreSQL's may be anybody's function; an output function may not.)
  select string_agg(format(case when (select y.typnamespace from pg_type y where y.oid = a.atttypid) = 'pg_catalog'::regnamespace
      then 't.%I::text' else $q$format('%%s', t.%I)$q$ end, a.attname), $q$ || '/' || $q$ order by k.rank), array_agg(quote_ident(a.attname))
  into v_key, v_key_names
  from pg_index i
  cross join lateral unnest(i.indkey::smallint[]) with ordinality as k(attnum, rank)
  join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
  where i.indrelid = v_table and i.indisprimary;
  select string_agg(format(case when a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'bytea'::regtype)
      then ' + coalesce(octet_length(t.%1$I), 0)' else ' + coalesce(pg_column_size(t.%1$I), 0)' end, a.attname), '')
  into v_lengths
  from pg_attribute a
  where a.attrelid = v_table and a.attlen = -1 and not a.attisdropped
    and quote_ident(a.attname) = any (array_remove(v_names, v_names[$body$ || protected.places[1] || $body$]) || v_key_names);
  return format(template, v_names[$body$ || protected.places[1] || $body$], relation, coalesce(v_context, $q$''::bytea$q$), coalesce(v_key, 't.ctid::text'),
    (select string_agg(distinct 't.' || n.name, ', ') from unnest(v_names || v_key_names) as n(name)), coalesce(v_lengths, '')$body$ || case when v_searchable then format(', v_names[%s]', protected.index_place) else '' end || $body$);
end
$body$),
    ('count', 'relation regclass, keyrings integer[]', 'table (keyring_id integer, version integer, rows bigint)', 'stable', '
begin
  if keyrings = ''{}'' then
    perform rekey_targets.' || v_prefix || '_sql(relation, null);
    return;
  end if;
  for keyring_id, version, rows in execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    v_count) || ') using keyrings loop
    return next;
  end loop;
end
'),
    ('scan', 'relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]', 'record', 'stable', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and h.header is not null and ($3 is null or substr(h.header, 4, 4) = any ($3))
      and ($6 is null or age(t.xmin) <= age($6))
    order by t.ctid limit $4' || v_page) || ')
  into next, rows, ciphertexts, contexts, keys, indexes
  using first, until, case when keyrings is not null then array(select int4send(k.id) from unnest(keyrings) as k(id)) end, max_rows, max_bytes, since;
end
'),
    ('read', 'relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[], out indexes bytea[]', 'record', 'volatile', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, case when keyrings is null then ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and t.%1$s is not null and h.header is null
    order by t.ctid limit $4 for no key update of t skip locked' || v_page) || ' else ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and substr(h.header, 4, 4) = any ($3) and ' || v_due || '
    order by t.ctid limit $4' || v_page) || ' end)
  into next, rows, ciphertexts, contexts, keys, indexes
  using first, until, array(select int4send(k.id) from unnest(keyrings) as k(id)), max_rows, max_bytes,
    ' || case when v_searchable then 'case when versions is not null then ' else '' end || 'array(select ''\x524b01'' || int4send(k.id) || int4send(k.version) from unnest(keyrings, versions) as k(id, version))'
    || case when v_searchable then ' end' else '' end || ';
end
'),
    ('write', 'relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], indexes bytea[], out locked tid[], out written bigint', 'record', 'volatile', '
declare
  -- (A subselect hides from the planner how many rows there are: for some hundreds it would rather read a whole table of some
  -- thousand blocks, batch after batch, than follow their pointers.)
  v_lock text := rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    'with held as materialized (
      select u.row, t.ctid as now from unnest((select $1), (select $2)) as u(row, start) join only %2$s t on t.ctid = u.row and ($2 is null or ' || v_begins || ')
      for ' || case when v_searchable then 'update' else 'no key update' end || ' of t skip locked
    )
    select array_agg(h.row) from held h where h.now = h.row') || ');
  v_update text := rekey_targets.' || v_prefix || '_sql(relation, ' || v_set || ');
  v_kept boolean;' || v_kept_role || '
begin
  execute v_lock into locked using rows, starts;
  written := 0;
  if locked is null then
    return;
  elsif cardinality(locked) < cardinality(rows) then
    ' || case when v_searchable then 'select array_agg(u.row), case when starts is not null then array_agg(u.start) end,
      case when ciphertexts is not null then array_agg(u.ciphertext) end, array_agg(u.index) into rows, starts, ciphertexts, indexes
    from unnest(rows, starts, ciphertexts, indexes) as u(row, start, ciphertext, index)'
    else 'select array_agg(u.row), case when starts is not null then array_agg(u.start) end, array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext)' end || ' where u.row = any (locked);
  end if;
  ' || v_before || '
  -- A trigger may have kept the row, or put another value into it.
  for v_kept in execute v_update using rows, starts, ciphertexts' || case when v_searchable then ', indexes' else '' end || ' loop
    written := written operator(pg_catalog.+) case when v_kept then 1 else 0 end;
  end loop;
  ' || v_after || '
  set constraints all immediate;
end
')
  ) as b(suffix, arguments, result, volatility, body);
end
$$;
comment on function rekey._column_bodies is
  'The functions of a protected column as they must be: sql (puts a statement together, having locked what a partition is a part of; template NULL: only locks the table, with its partitions), count, scan, read, write; each PL/pgSQL, SECURITY DEFINER, owned by the owner of the table.';

-- (PL/pgSQL, as the functions that are called for each column: it keeps its plans for the session, SQL for a statement.)
create or replace function rekey._column_shape(id integer, out relation regclass, out attnums smallint[])
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- a plan of when there were few columns is kept while they become many
as $$
begin
  select d.refobjid::regclass, array_agg(d.refobjsubid::smallint order by d.refobjsubid)
  into relation, attnums
  from pg_depend d
  where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure(format('rekey_targets.column_%s_guard()', id))
    and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
  group by d.refobjid;
end
$$;
comment on function rekey._column_shape is 'The table of a protected column now, and the numbers of the columns that its guard names, in table order.';

create or replace function rekey._home() returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return format('%s/%s', coalesce(rekey._system_identifier(), 0), (select d.oid from pg_database d where d.datname = current_database()));
end
$$;
comment on function rekey._home is 'In which cluster and database an oid is good.';

-- (pg_partition_tree() would lock them, each before what it is a part of.)
create or replace function rekey._parts(relation regclass) returns setof regclass
language sql stable rows 1  -- as rekey._relations_here()
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive parts as (
    select i.inhrelid from pg_inherits i where i.inhparent = relation and not i.inhdetachpending
    union all
    select i.inhrelid from parts p join pg_inherits i on i.inhparent = p.inhrelid and not i.inhdetachpending
  )
  select p.inhrelid from parts p;
end;
comment on function rekey._parts is 'The partitions of a partitioned table, and theirs; locks nothing.';

create or replace function rekey._relations_here(relation regclass) returns setof regclass
language plpgsql stable rows 1  -- or catalogs are read whole for each column
set search_path = pg_catalog, pg_temp
as $$
begin
  if (select c.relkind from pg_class c where c.oid = relation) = 'p' then
    return query select c.oid::regclass from rekey._parts(relation) p join pg_class c on c.oid = p where c.relkind <> 'p';
  elsif relation is not null then
    return next relation;
  end if;
end
$$;
comment on function rekey._relations_here is 'The relations of a table that have rows in this database: itself, or the leaves of its partitions.';

-- The usual rebuild of a table is a new one, a copy, and an exchange of names; that of a column too. The registration stays
-- with the old one then, and every row of the new one would be passed by.
create or replace function rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
begin
  return (select format('%s.%I', c.oid::regclass, a.attname)
  from (values (parse_ident(protected.relation_name) || protected.column_name::text), (parse_ident(protected.label))) as n(names)
  join pg_class c on c.relname = n.names[2] and c.relkind in ('r', 'p', 'f', 'm')
  join pg_namespace s on s.oid = c.relnamespace and s.nspname = n.names[1]
  join pg_attribute a on a.attrelid = c.oid and a.attname = n.names[3] and a.attnum > 0 and not a.attisdropped
  where (c.oid, a.attnum) is distinct from (_namesake.relation::oid, _namesake.attnum)
    and not exists (select from rekey._column_relations r where r.column_id = protected.id and r.relation = c.oid and r.attnum = a.attnum and r.home = rekey._home() and r.settled)
  limit 1);
end
$$;
comment on function rekey._namesake is 'Another column than this one, of this table or another, that has the name noted of a protected column, or that of its label; NULL: there is none, or it is settled.';

-- (to_regclass() takes USAGE of the schema, which rekey_owner need not have.)
create or replace function rekey._relation_named(name text) returns oid
language sql stable strict
set search_path = pg_catalog, pg_temp
begin atomic
  select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where array[n.nspname, c.relname]::text[] = parse_ident(name);
end;
comment on function rekey._relation_named is 'The relation that has this name, with its schema, now; NULL: none.';

create or replace function rekey._lost_part(protected rekey.protected_columns, leaves oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_home text := rekey._home();
begin
  return (
    select c.oid::regclass::text
    from (
      select case when r.home = v_home then r.relation else rekey._relation_named(r.relation_name) end as oid
      from rekey._column_relations r
      where r.column_id = protected.id and r.attnum = 0 and not r.settled
      except
      select u from unnest(leaves) u) l
    join pg_class c on c.oid = l.oid
    limit 1);
end
$$;
comment on function rekey._lost_part is 'A relation that held values of a protected column, is still there, and is none of these, which its table consists of; NULL: there is none.';

create or replace function rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
begin
  return (
    select o.label
    from pg_depend d
    join pg_proc p on p.oid = d.objid and p.pronamespace = 'rekey_targets'::regnamespace
    join rekey.protected_columns o on o.id = substring(p.proname from '^column_(\d{1,9})_guard$')::integer
    where o.id <> protected.id and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0 and d.classid = 'pg_proc'::regclass
      and d.refobjid = any (array_remove(leaves || array(select a.relid::oid from pg_partition_ancestors(_rival.relation) a), _rival.relation::oid))
    limit 1);
end
$$;
comment on function rekey._rival is 'Label of another protected column whose table is a partition of this one, or has it as a partition: their values would be bound to two labels. leaves: what the table consists of. NULL: there is none.';

create or replace function rekey._is_of_citus(relation regclass) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_found boolean := false;
begin
  -- Where the library is not loaded, the shell of a distributed table counts 0: the catalog table still tells.
  if exists (select from pg_class c where c.relname = 'pg_dist_partition' and c.relnamespace = 'pg_catalog'::regnamespace and c.relkind = 'r') then
    if not has_table_privilege('pg_catalog.pg_dist_partition', 'select') then
      return true;  -- unknown
    end if;
    execute format('select exists (select from pg_catalog.%I d where d.logicalrelid = $1)', 'pg_dist_partition') into v_found using relation;
  end if;
  return v_found;
end
$$;
comment on function rekey._is_of_citus is 'Whether Citus distributes a table, also where it is not loaded.';

create or replace function rekey._storage_problem(relation regclass) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._is_of_citus(relation) then
    return format('%s is a table of Citus, whose rows are on other nodes: pg_rekey cannot sweep it', relation);
  end if;
  return (
    select case
      when c.relkind not in ('r', 'p') then format('%s is a foreign table: pg_rekey cannot sweep it', relation)
      when c.relkind = 'r' and m.amname <> 'heap' then format('%s has the access method %I: pg_rekey can sweep a heap only', relation, m.amname) end
    from pg_class c left join pg_am m on m.oid = c.relam where c.oid = relation);
end
$$;
comment on function rekey._storage_problem is 'Why the rows of a table cannot be swept where they are: Citus, foreign, another access method than heap; NULL: they can.';

create or replace function rekey._trigger_names(protected rekey.protected_columns) returns text[]
language sql immutable
return array[format('zz_pg_rekey_%s_insert', protected.id), format('zz_pg_rekey_%s_update', protected.id)]
  || case when protected.encrypt_on_write then array[format('zz_pg_rekey_%s', protected.id)] else '{}'::text[] end
  || case when protected.index_place is not null and protected.encrypt_on_write then array[format('zz_pg_rekey_%s_look', protected.id), format('zz_pg_rekey_%s_carry', protected.id)] else '{}'::text[] end;
comment on function rekey._trigger_names is 'The triggers of a protected column: those that keep envelopes of versions out that are about to be destroyed, the one that encrypts, and those of a blind index.';

create or replace function rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_names name[] := rekey._trigger_names(protected);
  v_functions oid[] := array(
    select case when n.name ~ '_(insert|update)$' then to_regproc('rekey._refuse_doomed')
      else to_regproc(format('rekey_targets.column_%s_%s', protected.id, coalesce(substring(n.name from '_(look|carry)$'), 'trigger'))) end
    from unnest(v_names) with ordinality as n(name, place) order by n.place);
begin
  return (
    select format('the trigger %I of %s is off, or was dropped or replaced', w.name, w.oid::regclass)
    from (
      select t.oid, n.name, n.function
      from unnest(relations) as t(oid)
      cross join unnest(v_names, v_functions) as n(name, function)
      except
      select g.tgrelid, g.tgname, g.tgfoid
      from pg_trigger g
      where g.tgrelid = any (relations) and g.tgname = any (v_names) and g.tgenabled in ('A', 'O')) w
    limit 1);
end
$$;
comment on function rekey._trigger_problem is 'Which trigger of a protected column does not fire, on which of these relations; NULL: all do.';

create or replace function rekey._update_triggers(relation regclass, attnum smallint)
returns table (leaf regclass, trigger_id oid)
language sql stable rows 1  -- as rekey._relations_here()
set search_path = pg_catalog, pg_temp
begin atomic
  -- A sweep writes into the leaves of partitions, each by itself. 16: for UPDATE; a trigger for UPDATE OF other columns does not
  -- fire, but for those that are generated from this one.
  select h.oid, t.oid
  from rekey._relations_here(_update_triggers.relation) as h(oid)
  join pg_attribute n on n.attrelid = _update_triggers.relation and n.attnum = _update_triggers.attnum
  join pg_attribute a on a.attrelid = h.oid and a.attname = n.attname
  join pg_trigger t on t.tgrelid = h.oid and not t.tgisinternal and t.tgtype::integer & 16 = 16
  where cardinality(t.tgattr::smallint[]) = 0 or a.attnum = any (t.tgattr::smallint[])
    or exists (
      select from pg_attrdef f
      join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid and d.refclassid = 'pg_class'::regclass
        and d.refobjid = h.oid and d.refobjsubid = a.attnum
      where f.adrelid = h.oid and f.adnum = any (t.tgattr::smallint[]));
end;
comment on function rekey._update_triggers is 'The triggers, on or off, that are for the updates of a rotation of this column, on each relation that has rows. (None of PostgreSQL''s own: the column is no key.)';

create or replace function rekey._is_own_trigger(trigger_id oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgname ~ '^zz_pg_rekey_\d+(_insert|_update|_look|_carry)?$'
    and (p.pronamespace = 'rekey'::regnamespace and p.proname = '_refuse_doomed'
      or p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_(trigger|look|carry)$')
  from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where t.oid = trigger_id;
end;
comment on function rekey._is_own_trigger is 'Whether a trigger is one that pg_rekey puts on protected tables.';

-- What an UPDATE evaluates beside triggers: CHECKs, indexes, generated columns, keys of partitions; planning it, also the constant
-- parts of statistics. And the conditions of our triggers, which fire. A domain has CHECKs too, and so may whatever has parts.
create or replace function rekey._code_in_updates(leaf regclass) returns table (object text, code text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select pg_describe_object(d.classid, d.objid, 0), pg_describe_object(d.refclassid, d.refobjid, 0)
  from (
    select 'pg_constraint'::regclass as class, c.oid from pg_constraint c where c.conrelid = leaf
    union all select 'pg_class'::regclass, i.indexrelid from pg_index i where i.indrelid = leaf
    union all select 'pg_attrdef'::regclass, f.oid from pg_attrdef f
      join pg_attribute a on a.attrelid = f.adrelid and a.attnum = f.adnum and a.attgenerated <> '' where f.adrelid = leaf
    union all select 'pg_class'::regclass, p.relid from pg_partition_ancestors(leaf) p where p.relid <> leaf
    union all select 'pg_statistic_ext'::regclass, s.oid from pg_statistic_ext s where s.stxrelid = leaf
    union all select 'pg_trigger'::regclass, t.oid from pg_trigger t where t.tgrelid = leaf and rekey._is_own_trigger(t.oid)) o
  join pg_depend d on d.classid = o.class and d.objid = o.oid and d.objsubid = 0
  left join pg_operator r on d.refclassid = 'pg_operator'::regclass and r.oid = d.refobjid
  left join pg_proc p on p.oid = case d.refclassid when 'pg_proc'::regclass then d.refobjid when 'pg_operator'::regclass then r.oprcode::oid end
  left join pg_type y on d.refclassid = 'pg_type'::regclass and y.oid = d.refobjid
  where p.pronamespace <> 'pg_catalog'::regnamespace and not (o.class = 'pg_trigger'::regclass and p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace))
    or y.typnamespace <> 'pg_catalog'::regnamespace and y.typtype <> 'e' and (y.typtype <> 'b' or y.typelem <> 0) and o.class <> 'pg_class'::regclass;
end;
comment on function rekey._code_in_updates is 'Functions and types that are not PostgreSQL''s own, in what an UPDATE of this relation evaluates.';

create or replace function rekey._silence_problem(relation regclass, attnum smallint, owner oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(
    (select format('%s owns it, and may not keep triggers from firing: GRANT SET ON PARAMETER session_replication_role TO %1$s, as a superuser', owner::regrole)
     where not has_parameter_privilege(owner, 'session_replication_role', 'set')),
    (select format('the trigger %I of %s fires in the replica role too: ALTER TABLE %2$s ENABLE TRIGGER %1$I', t.tgname, u.leaf)
     from rekey._update_triggers(_silence_problem.relation, _silence_problem.attnum) u join pg_trigger t on t.oid = u.trigger_id
     where t.tgenabled in ('A', 'R') and not rekey._is_own_trigger(t.oid) order by t.tgname limit 1),
    -- 2: ON UPDATE
    (select format('the rule %I of %s applies in the replica role too: ALTER TABLE %2$s ENABLE RULE %1$I', r.rulename, r.ev_class::regclass)
     from rekey._relations_here(_silence_problem.relation) h(leaf) join pg_rewrite r on r.ev_class = h.leaf
     where r.ev_type = '2' and r.ev_enabled in ('A', 'R') order by r.rulename limit 1),
    (select format('%s of %s calls %s, which is not PostgreSQL''s own, and would run with the triggers and foreign keys of every table off: drop it', c.object, h.leaf, c.code)
     from rekey._relations_here(_silence_problem.relation) h(leaf) cross join lateral rekey._code_in_updates(h.leaf) c order by c.object, c.code limit 1))
  || ', or let triggers fire (fire_triggers)';
end;
comment on function rekey._silence_problem is 'Why a column cannot be swept without firing triggers (fire_triggers => false), by the owner of its table; NULL: it can.';

-- A name is noted anew only where nothing else has taken it, so that a rebuilt table is not lost sight of.
create or replace function rekey._note_names(only_id integer = null) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
begin atomic
  update rekey.protected_columns c
  set relation_name = n.relation_name, column_name = n.names[1], context_columns = n.names[2:n.last], index_column = n.names[n.last + 1]
  from (
    select p.id, format('%I.%I', s.nspname, r.relname) as relation_name, array_agg(a.attname order by l.rank) as names, cardinality(p.places) as last
    from rekey.protected_columns p
    cross join lateral rekey._column_shape(p.id) h
    join pg_class r on r.oid = h.relation
    join pg_namespace s on s.oid = r.relnamespace
    cross join lateral unnest(p.places || p.index_place) with ordinality as l(place, rank)
    join pg_attribute a on a.attrelid = h.relation and a.attnum = h.attnums[l.place]
    where (only_id is null or p.id = only_id) and rekey._namesake(p, h.relation, h.attnums[p.places[1]]) is null
    group by p.id, s.nspname, r.relname) n
  where n.id = c.id and (c.relation_name, c.column_name, c.context_columns, c.index_column) is distinct from (n.relation_name, n.names[1], n.names[2:n.last], n.names[n.last + 1]);

  -- After a restore into another database the names still say which relations these are.
  with noted as (
    delete from rekey._column_relations r
    where r.home <> rekey._home() and (only_id is null or r.column_id = only_id)
    returning r.column_id, rekey._relation_named(r.relation_name) as relation, r.attnum, r.relation_name, r.settled)
  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select n.column_id, n.relation, n.attnum, n.relation_name, rekey._home(), n.settled from noted n where n.relation is not null
  on conflict (column_id, relation, attnum) do nothing;

  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select p.id, t.relation, 0, t.relation::regclass::text, rekey._home(), false
  from rekey.protected_columns p
  cross join lateral rekey._column_shape(p.id) h
  cross join lateral rekey._relations_here(h.relation) as t(relation)
  where (only_id is null or p.id = only_id)
    and not exists (select from rekey._column_relations r where r.column_id = p.id and r.relation = t.relation and r.attnum = 0 and r.home = rekey._home() and not r.settled)
  on conflict (column_id, relation, attnum) do update set relation_name = excluded.relation_name, home = excluded.home, settled = false;
end;
comment on function rekey._note_names is 'Notes what the protected columns, NULL: all, are called now, and which relations their tables consist of.';

create or replace function rekey._protect_options(protected rekey.protected_columns) returns text
language sql immutable
return case when protected.encrypt_on_write then ', encrypt_on_write => true' else '' end
  || case when protected.fire_triggers then '' else ', fire_triggers => false' end;
comment on function rekey._protect_options is 'What has to be given again where rekey.protect_column() is repeated.';

create or replace function rekey._column_problem(protected rekey.protected_columns, part regclass = null) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_shape record;
  v_table pg_class;
  v_leaves oid[];
  v_looked_at oid[];
  v_other text;
  v_part record;
  v_again text := format('repeat rekey.protect_column(%s), or pg-rekey columns protect, as the owner of the table', '...' || nullif(rekey._protect_options(protected), ''));
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if current_setting('standard_conforming_strings') = 'off' then
    return 'standard_conforming_strings is off in this session: its functions would take envelopes for something else';
  elsif v_shape.relation is null then
    return format('its table or column was dropped, or its functions were not restored: %s, or, where it is gone for good, rekey.unprotect_column(%L), or pg-rekey columns unprotect', v_again, protected.label);
  end if;
  select c.* into v_table from pg_class c where c.oid = v_shape.relation;
  v_other := rekey._namesake(protected, v_shape.relation, v_shape.attnums[protected.places[1]]);
  if v_other is not null then
    return format('its name belongs to %s now, and the registration is with %s: rekey.rebind_column() with the one that holds its values, or pg-rekey columns rebind', v_other, v_shape.relation);
  end if;
  v_leaves := array(select h from rekey._relations_here(v_shape.relation) h);
  v_looked_at := array(select v_shape.relation::oid union select l from unnest(v_leaves) l where part is null or l = part);
  v_other := rekey._lost_part(protected, v_leaves);
  if v_other is not null then
    return format('%s held its values, and is no part of %s any more: attach it again, drop it, or, once it holds none, rekey.rebind_column(%L, %L), or pg-rekey columns rebind',
      v_other, v_shape.relation, v_shape.relation, protected.column_name);
  end if;
  v_other := rekey._rival(protected, v_shape.relation, v_looked_at);
  if v_other is not null then
    return format('its rows are those of %s too, by a partition: detach the partition, or let go of one of the two, by rekey.unprotect_column() or pg-rekey columns unprotect', v_other);
  end if;
  if exists (select from pg_namespace n, aclexplode(n.nspacl) a
             where n.nspname = 'rekey_targets' and a.privilege_type = 'CREATE' and a.grantee <> n.nspowner) then
    return 'somebody may make functions in schema rekey_targets, where a call of rekey.protect_column() was not finished: ' || v_again;
  end if;
  if cardinality(v_shape.attnums) <> cardinality(protected.places) + (protected.index_place is not null)::integer then
    return format('its guard was changed: %s', v_again);
  end if;
  if (select a.atttypid from pg_attribute a where a.attrelid = v_shape.relation and a.attnum = v_shape.attnums[protected.places[1]])
     not in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) then
    return 'its column has another type now';
  end if;
  if v_table.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = v_shape.relation) then
    return 'tables inherit from it, whose rows are not swept: ALTER TABLE ... NO INHERIT';
  end if;
  -- (What is looked at closer than that are few of many.)
  select w.* into v_part
  from (
    select c.oid::regclass as relation, c.relowner, c.relforcerowsecurity, rekey._storage_problem(c.oid) as storage
    from pg_class c
    where c.oid = any (v_looked_at) and (c.relforcerowsecurity or c.relowner <> v_table.relowner or c.relkind not in ('r', 'p')
      or c.relkind = 'r' and c.relam is distinct from (select m.oid from pg_am m where m.amname = 'heap')
      or to_regclass('pg_catalog.pg_dist_partition') is not null)) w
  where w.relforcerowsecurity or w.relowner <> v_table.relowner or w.storage is not null
  limit 1;
  if v_part.relforcerowsecurity then
    return format('FORCE ROW LEVEL SECURITY may hide rows of %s from its owner: ALTER TABLE %1$s NO FORCE ROW LEVEL SECURITY', v_part.relation);
  elsif v_part.storage is not null then
    return v_part.storage;
  elsif v_part.relation is not null then
    return format('the partition %s has another owner than its table: ALTER TABLE %1$s OWNER TO %s', v_part.relation, v_table.relowner::regrole);
  end if;
  -- (A subselect for each of them, found by its name: joined, the bodies of all columns would be compared.)
  if exists (
    select from rekey._column_bodies(protected) b
    where (
      select bool_or(p.prosrc = b.body and p.proowner = v_table.relowner and p.prosecdef and p.proconfig = '{"search_path=pg_catalog, pg_temp"}'
        and p.provolatile = left(b.volatility, 1)::"char" and not p.proleakproof
        and (select l.lanname from pg_language l where l.oid = p.prolang) = 'plpgsql'
        and has_function_privilege('rekey_sweeper', p.oid, 'execute'))
      from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = b.name) is not true) then
    return format('its functions are not as they were made, or its table has another owner: %s', v_again);
  end if;
  v_other := rekey._trigger_problem(protected, v_looked_at);
  if v_other is not null then
    return format('%s: %s', v_other, v_again);
  end if;
  return case when not protected.fire_triggers then rekey._silence_problem(v_shape.relation, v_shape.attnums[protected.places[1]], v_table.relowner) end;
end
$$;
comment on function rekey._column_problem is 'Why a protected column can be neither swept nor counted now, and what to do; NULL: it can. part: nothing is done now but in this one of its partitions.';

create or replace function rekey._refuse_problem(target text, problem text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem is not null then
    raise exception '% is blocked: %', target, problem using errcode = 'RK005', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;
comment on function rekey._refuse_problem is 'RK005 where a target has a problem.';

create or replace function rekey._targets(only_target text = null, only_relation regclass = null) returns setof rekey._target
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_target rekey._target;
  v_table regclass;
begin
  if only_target is null or only_target = 'rekey.secrets' then
    v_target := row('rekey.secrets', 'rekey.secrets'::regclass, 'rekey.secrets'::regclass, 'secrets', true, rekey._part('secret'), false, rekey._table_problem('rekey.secrets'), null);
    return next v_target;
  end if;
  for v_column in select * from rekey.protected_columns c where only_target is null or c.label = only_target order by c.id loop
    select s.relation into v_table from rekey._column_shape(v_column.id) s;
    v_target := row(v_column.label, v_table, v_table, 'column_' || v_column.id, false, rekey._part(v_column.label), v_column.is_text,
      rekey._column_problem(v_column, only_relation), v_column.normalization);
    if v_target.problem is not null then
      return next v_target;
    else
      for v_target.relation in select h from rekey._relations_here(v_table) h where only_relation is null or h = only_relation loop
        return next v_target;
      end loop;
    end if;
  end loop;
end
$$;
comment on function rekey._targets is
  'Every relation with row storage that holds envelopes. indexed: it has an index on the keyring, so that a few rows of many are found fast. prefix: the label of the context. problem: why it is blocked. only_relation: this one of a column.';

create or replace function rekey._targets_now(only_target text = null) returns rekey._target[]
language sql stable
return array(select t from rekey._targets(only_target) t where t.problem is null order by t.relation);
comment on function rekey._targets_now is 'The targets that are not blocked, by relation; only_target: those of this column.';

create or replace function rekey._target_of(chunk rekey._chunks) returns rekey._target
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
begin
  select * into v_target from rekey._targets(chunk.target, chunk.relation) t where t.relation = chunk.relation;
  if not found then
    v_target.problem := 'it is not protected any more, or its partition is gone';
  end if;
  return v_target;
end
$$;
comment on function rekey._target_of is 'The target of a chunk as it is now.';
