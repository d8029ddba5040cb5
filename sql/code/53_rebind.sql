-- A table is its name and its identity. Where the two part (a rebuild that exchanges names, a partition that is detached), the
-- column is blocked, and this is how it goes on: the registration moves to the table that has the values now, or stays.

-- What holds values of another relation's column is looked at with the rights of the caller.
create or replace function rekey._refuse_envelopes(relation regclass, column_name name) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off  -- an error, where a policy would hide rows
set bytea_output = hex
as $$
declare
  v_count bigint;
begin
  if (select c.relkind from pg_class c where c.oid = relation) in ('r', 'p', 'm') then
    execute format('lock table %s in share row exclusive mode', relation);
  end if;
  -- (A cast to text may be anybody's function; an output function may not.)
  execute format($q$select count(*) from %s t where left(format('%%s', t.%I), 12) collate "C" ~ '^(rk1:UksB|\\x524b01)'$q$, relation, column_name) into v_count;
  if v_count > 0 then
    raise exception '% holds % envelopes in %', relation, v_count, quote_ident(column_name) using errcode = 'RK005',
      hint = 'They would be passed by from now on. Empty it, drop it, or attach it again; then repeat this.', constraint = 'rebind';
  end if;
end
$$;
comment on function rekey._refuse_envelopes is 'RK005 where a column of this relation holds envelopes; 42501 where the caller may not read it whole.';
grant execute on function rekey._refuse_envelopes to rekey_admin;

create or replace function rekey._find_rebind(target regclass, column_name name, label text) returns rekey.protected_columns
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_id integer := rekey._column_id(target, column_name);
  v_name text := (select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target);
  v_protected rekey.protected_columns;
  v_old regclass;
begin
  perform rekey._refuse_stranger(target);
  select * into v_protected from rekey.protected_columns c
  where case when _find_rebind.label is not null then c.label = _find_rebind.label
             when v_id is not null then c.id = v_id
             else c.relation_name = v_name and c.column_name = _find_rebind.column_name or c.label = format('%s.%I', v_name, _find_rebind.column_name) end
  order by c.relation_name = v_name desc limit 1;
  if not found then
    raise exception 'no protected column was called %.%', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'Name it: rekey.rebind_column(target, column_name, label). See rekey.column_status.', constraint = 'columns';
  end if;
  if v_id is not null and v_id <> v_protected.id then
    raise exception 'column %.% is protected already, as %', target, quote_ident(column_name), v_protected.label using errcode = 'RK006',
      hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  v_old := (rekey._column_shape(v_protected.id)).relation;
  -- Values that open prove no right to them: they may have been copied.
  if v_old is not null then
    perform rekey._refuse_stranger(v_old);
  elsif v_protected.owner <> (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = target)
        and not (select r.rolsuper from pg_roles r where r.rolname = rekey._caller()) then
    raise exception '% was a column of %', v_protected.label, v_protected.owner using errcode = 'insufficient_privilege',
      hint = 'That role is to own the table, or a superuser calls this.';
  end if;
  return v_protected;
end
$$;
comment on function rekey._find_rebind is
  'The protected column that rekey.rebind_column() is about. 42501: the caller owns not both tables; RK006: the column is registered as another; RK007: there is none.';
grant execute on function rekey._find_rebind to rekey_admin;

create or replace function rekey._unsettled(id integer) returns table (relation regclass, column_name name)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns := (select c from rekey.protected_columns c where c.id = _unsettled.id);
  v_shape record;
begin
  select s.* into v_shape from rekey._column_shape(id) s;
  return query
    select c.oid::regclass, a.attname
    from (values (parse_ident(v_protected.relation_name) || v_protected.column_name::text), (parse_ident(v_protected.label))) as n(names)
    join pg_class c on c.relname = n.names[2] and c.relkind in ('r', 'p', 'f', 'm')
    join pg_namespace s on s.oid = c.relnamespace and s.nspname = n.names[1]
    join pg_attribute a on a.attrelid = c.oid and a.attname = n.names[3] and a.attnum > 0 and not a.attisdropped
    where (c.oid, a.attnum) is distinct from (v_shape.relation::oid, v_shape.attnums[v_protected.places[1]])
    union
    select c.oid::regclass, a.attname
    from rekey._column_relations r
    join pg_class c on c.oid = case when r.home = rekey._home() then r.relation else rekey._relation_named(r.relation_name) end
    join pg_attribute a on a.attrelid = c.oid and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped
    where r.column_id = v_protected.id and r.attnum = 0 and not r.settled
      and not exists (select from rekey._relations_here(v_shape.relation) as t(oid) where t.oid = c.oid);
end
$$;
comment on function rekey._unsettled is 'The columns that may hold values of a protected column beside it: those that have its name, and those of relations that were parts of its table.';
grant execute on function rekey._unsettled to rekey_admin;

create or replace function rekey._move_column(id integer, target regclass, column_name name) returns text[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns;
  v_column pg_attribute;
  v_attnums smallint[];
  v_places integer[];
  v_index_place integer;
begin
  perform pg_advisory_xact_lock(0, 3);  -- as rekey._register_column()
  perform rekey._refuse_stranger(target);
  select * into v_protected from rekey.protected_columns c where c.id = _move_column.id for update;
  perform rekey._find_rebind(target, column_name, v_protected.label);
  if (select c.relkind from pg_class c where c.oid = target) not in ('r', 'p') or (select c.relispartition from pg_class c where c.oid = target) then
    raise exception '% is no table whose columns can be protected', target using errcode = 'invalid_parameter_value',
      hint = 'An ordinary or partitioned table, not a partition.';
  end if;
  select * into v_column from pg_attribute a where a.attrelid = target and a.attname = _move_column.column_name and a.attnum > 0 and not a.attisdropped;
  if not coalesce(v_column.atttypid = any (case when v_protected.is_text then '{text,varchar}' else '{bytea}' end::regtype[]) and v_column.attgenerated = '', false) then
    raise exception 'column %.% has not the type of %', target, quote_ident(column_name), v_protected.label using errcode = 'invalid_parameter_value',
      hint = case when v_protected.is_text then 'It is to be text.' else 'It is to be bytea.' end;
  end if;
  if exists (
       select from unnest(v_protected.context_columns) as n(name)
       where not exists (
         select from pg_attribute a
         where a.attrelid = target and a.attname = n.name and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
           and a.atttypid in ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'uuid'::regtype, 'text'::regtype, 'varchar'::regtype, 'boolean'::regtype))) then
    raise exception '% lacks a context column of %: %', target, v_protected.label, array_to_string(v_protected.context_columns, ', ')
      using errcode = 'invalid_parameter_value', hint = 'The values are bound to these columns.';
  end if;
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_index_place
  from rekey._column_places(target, _move_column.column_name || v_protected.context_columns, v_protected.index_column) s;
  if v_protected.index_column is not null and not exists (
       select from pg_attribute a where a.attrelid = target and a.attnum = v_attnums[v_index_place] and a.atttypid = 'bytea'::regtype and a.attgenerated = '') then
    raise exception '% lacks the column with the blind index of %: %', target, v_protected.label, v_protected.index_column using errcode = 'invalid_parameter_value',
      hint = format('ALTER TABLE %s ADD COLUMN %I bytea, before this.', target, v_protected.index_column);
  end if;
  update rekey.protected_columns c
  set places = v_places, index_place = v_index_place, column_name = _move_column.column_name, owner = (select pg_get_userbyid(r.relowner) from pg_class r where r.oid = target),
    relation_name = (select format('%I.%I', n.nspname, r.relname) from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = target)
  where c.id = v_protected.id returning * into v_protected;
  return rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._move_column is
  'Moves the registration of a protected column to another table, as far as rekey_owner does it; returns what the owner of the table has to run. 22023: type or context columns do not fit; 42501, RK006: as rekey._find_rebind().';
grant execute on function rekey._move_column to rekey_admin;

create or replace function rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_relation regclass := (rekey._column_shape(id)).relation;
  v_failed bigint;
begin
  perform rekey._refuse_stranger(v_relation);
  select * into v_protected from rekey.protected_columns c where c.id = _finish_rebind.id for update;
  perform rekey._note_names(id);  -- after a restore, parts are known by name alone
  -- Settled here, and not where it was found: what is in use elsewhere stays so.
  insert into rekey._column_relations (column_id, relation, attnum, relation_name, home, settled)
  select v_protected.id, s.relation, k.attnum, s.relation::text, rekey._home(), true
  from unnest(settled, settled_columns) as s(relation, column_name)
  join pg_attribute a on a.attrelid = s.relation and a.attname = s.column_name
  cross join lateral (values (0::smallint), (a.attnum)) as k(attnum)
  where k.attnum > 0 or not exists (select from rekey._relations_here(v_relation) h where h = s.relation)
  on conflict (column_id, relation, attnum) do update set relation_name = excluded.relation_name, home = excluded.home, settled = true;
  perform rekey._finish_column(id);
  select sum(o.failed) into v_failed from rekey._open_target(v_protected.label) o;
  if v_failed > 0 then
    raise exception '% rows of % do not open under the label %', v_failed, v_relation, v_protected.label using errcode = 'RK003',
      hint = 'They belong to other rows, or to another column: copy the values with the columns that they are bound to.';
  end if;
  -- Whoever rebinds a column that was emptied says that it was to be.
  update rekey.protected_columns c
  set seen = coalesce((
    select jsonb_object_agg(s.key, coalesce(o.rows, 0))
    from jsonb_object_keys(c.seen) as s(key)
    left join (select n.keyring_id, sum(n.rows) as rows from rekey._open_target(v_protected.label) n group by n.keyring_id) o on o.keyring_id = s.key::integer), '{}')
  where c.id = v_protected.id and c.seen is not null;
  perform rekey._audit('column.rebound', rekey._keyring_name(v_protected.keyring_id), details => jsonb_strip_nulls(jsonb_build_object(
    'column', v_protected.label, 'from', from_relation, 'to', v_relation::text, 'settled', (select jsonb_agg(s.relation::text) from unnest(settled) as s(relation)))));
  return v_protected.label;
end
$$;
comment on function rekey._finish_rebind is
  'Checks that every value of a rebound column opens, and notes what was settled. RK003: one does not open; RK005: the column is blocked still.';
grant execute on function rekey._finish_rebind to rekey_admin;

create or replace function rekey._open_target(label text) returns table (keyring_id integer, version integer, rows bigint, failed bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_target rekey._target;
  v_from tid;
  v_step bigint;
  v_found record;
begin
  for v_target in select t.* from rekey._targets(label) t loop
    perform rekey._refuse_problem(label, v_target.problem);
    v_from := '(0,0)';
    while v_from is not null loop
      select s.* into v_found from rekey._scan_on(v_target, null, v_from, v_step) s;
      v_step := v_found.next_step;
      if v_found.ciphertexts is not null then
        return query
          select rekey._int4(h.header, 3), rekey._int4(h.header, 7), h.rows, coalesce(cardinality(c.failed_places), 0)::bigint
          from (select substr(u.ciphertext, 1, 11) as header, count(*) as rows from unnest(v_found.ciphertexts) as u(ciphertext) group by 1) h
          left join rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts) c on c.header = h.header;
      end if;
      v_from := v_found.next_first;
    end loop;
  end loop;
end
$$;
comment on function rekey._open_target is 'Opens every envelope of a protected column, in batches: how many there are of each version, and how many do not open. A version may come in several rows.';

create or replace function rekey.rebind_column(target regclass, column_name name, label text = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns := rekey._find_rebind(target, column_name, label);
  v_old regclass := (select s.relation from rekey.column_status s where s.label = v_protected.label);
  v_old_column name := (select s.column_name from rekey.column_status s where s.label = v_protected.label);
  v_stays boolean := coalesce(v_old = target and v_old_column = rebind_column.column_name, false);
  v_statement text;
  v_other record;
  v_settled regclass[];
  v_settled_columns name[];
  v_view text;
begin
  execute format('lock table %s in share row exclusive mode', target);
  if not v_stays then
    if v_old is not null then
      perform rekey._refuse_envelopes(v_old, v_old_column);
      if v_old <> target then
        perform rekey._drop_triggers(v_old, v_protected.id);
      end if;
    end if;
    foreach v_statement in array rekey._move_column(v_protected.id, target, column_name) loop
      execute v_statement;
    end loop;
  end if;
  for v_other in select u.relation, u.column_name from rekey._unsettled(v_protected.id) u loop
    perform rekey._refuse_envelopes(v_other.relation, v_other.column_name);
    v_settled := v_settled || v_other.relation;
    v_settled_columns := v_settled_columns || v_other.column_name;
  end loop;
  perform rekey._finish_rebind(v_protected.id, case when not v_stays then coalesce(v_old::text, v_protected.relation_name) end, v_settled, v_settled_columns);
  select format('%I.%I', n.nspname, v.relname) into v_view
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  join pg_class v on v.relnamespace = c.relnamespace and v.relkind = 'v' and v.relname = c.relname || '_decrypted'
  where c.oid = target and not v_stays;
  if v_view is not null then
    perform rekey.create_decrypted_view(target);
  end if;
  return v_protected.label;
end
$$;
comment on function rekey.rebind_column is
  'Goes on after a table was rebuilt, or lost a partition: binds a protected column to the table and column that hold its values now, with its functions, triggers and decrypted view, and returns its label. Named as it is registered, it stays there: that confirms that what has its name, what was a part of it, or where its rows are gone, is as it should be. label: which protected column, where the names do not tell. The caller owns the old and the new table, as a member of rekey_admin; where the old one was dropped, the new one has the owner that it had; or is a superuser. Every value is opened, and the table is locked against writers meanwhile. 22023: type or context columns do not fit; 42501: not the owner; RK001: KEK; RK003: a value does not open under the label; RK005: the old table, or another that has its name, holds envelopes still; RK006: protected as another column; RK007: no such protected column.';
grant execute on function rekey.rebind_column to rekey_admin;
