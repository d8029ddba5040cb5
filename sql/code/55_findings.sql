-- What endangers protected columns, or goes along with every rotation of them: said by protect_column, and looked at again by the
-- census, `columns list` and doctor, since triggers, rules and publications come later too.

create or replace function rekey._path_schemas(search_path text, owner name) returns name[]
language sql immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select array_agg(case when n.name = '$user' then owner else n.name::name end)
  from (select coalesce(replace(m.found[1], '""', '"'), lower(m.found[2])) as name
        from regexp_matches(search_path, '"((?:[^"]|"")*)"|([^\s,"]+)', 'g') as m(found)) n;
end;
comment on function rekey._path_schemas is 'The schemas of a search path, as the owner of a table has it.';

create or replace function rekey._others_schemas(relation regclass, search_path text) returns setof name
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select n.nspname
  from pg_class c join pg_namespace n on n.nspname = any (rekey._path_schemas(search_path, pg_get_userbyid(c.relowner)))
  cross join lateral (
    select n.nspowner as role
    union
    select a.grantee from aclexplode(n.nspacl) a where a.privilege_type = 'CREATE') as m
  left join pg_roles r on r.oid = m.role
  where c.oid = relation and m.role <> c.relowner and not coalesce(r.rolsuper or r.rolname = 'pg_database_owner', false)
  group by n.nspname;
end;
comment on function rekey._others_schemas is 'The schemas of a search path in which others may create than the owner of this table, and who may do all in its database.';

-- As PostgreSQL checks it when an UPDATE begins, whatever columns it sets.
create or replace function rekey._refused_updates(relation regclass) returns table (publication name, why text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  with identity as (
    select c.relreplident = 'f' as whole, array(
      select a.attname
      from pg_index i
      cross join lateral unnest(i.indkey::smallint[]) as k(attnum)
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
      where i.indrelid = c.oid and i.indimmediate and i.indisvalid
        and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end) as columns
    from pg_class c where c.oid = _refused_updates.relation
  ), published as (
    -- With publish_via_partition_root, list and filter are those of the topmost table; else the relation's own.
    select distinct on (b.oid) b.oid, b.pubname, o.entry, o.prrelid, o.prattrs, o.prqual
    from (
      select _refused_updates.relation::oid, 0::bigint
      union all
      select a.relid, a.place from pg_partition_ancestors(_refused_updates.relation) with ordinality as a(relid, place)
    ) as t(oid, place)
    join pg_class c on c.oid = t.oid
    cross join pg_publication b
    left join pg_publication_namespace m on m.pnpubid = b.oid and m.pnnspid = c.relnamespace
    left join pg_publication_rel r on r.prpubid = b.oid and r.prrelid = t.oid
    left join lateral (
      select r.oid as entry, r.prrelid, r.prattrs, r.prqual where b.pubviaroot or t.oid = _refused_updates.relation) o on true
    where b.pubupdate and c.relpersistence = 'p' and (b.puballtables or m.oid is not null or r.oid is not null)
    order by b.oid, o.entry is not null desc, t.place desc
  ), named as (
    select p.pubname,
      case when p.prattrs is not null then array(
        select a.attname from pg_attribute a where a.attrelid = p.prrelid and a.attnum = any (p.prattrs::smallint[])) end as listed,
      -- (By the expression: what it depends on, the column list may depend on too.)
      array(
        select a.attname from regexp_matches(p.prqual::text, ':varattno (\d+)', 'g') as v(found)
        join pg_attribute a on a.attrelid = p.prrelid and a.attnum = v.found[1]::smallint) as asked
    from published p
  )
  select n.pubname, w.why
  from identity y
  cross join named n
  cross join lateral (values
    (n.listed is not null and (y.whole or not y.columns <@ n.listed), 'its column list does not cover the replica identity'),
    (not y.whole and not n.asked <@ y.columns, 'its WHERE asks for a column that is not part of the replica identity'),
    (not y.whole and y.columns = '{}', 'the table has no replica identity')
  ) as w(so, why)
  where w.so;
end;
comment on function rekey._refused_updates is
  'The publications because of which every UPDATE of a relation, a sweep''s too, is refused by PostgreSQL (42P10, 55000), and why.';

create or replace function rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text)
returns table (kind text, fatal boolean, finding text, advice text, action text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- A sweep writes into the leaves of partitions, each by itself.
  with parts as (
    select h.oid as relation, a.attnum
    from rekey._relations_here(_column_findings.relation) as h(oid)
    join pg_attribute n on n.attrelid = _column_findings.relation and n.attnum = _column_findings.attnum
    join pg_attribute a on a.attrelid = h.oid and a.attname = n.attname
  ), triggers as (
    select t.tgname, u.leaf as relation, t.tgtype::integer & 1 = 1 as each_row, t.tgqual is not null as conditional
    from rekey._update_triggers(_column_findings.relation, _column_findings.attnum) u
    join pg_trigger t on t.oid = u.trigger_id
    where fire_triggers and t.tgenabled in ('O', 'A') and not rekey._is_own_trigger(t.oid)
      and not exists (
        select from pg_depend d
        where d.classid = 'pg_trigger'::regclass and d.objid = t.oid and d.refclassid = 'pg_proc'::regclass
          and d.refobjid in (select f.oid from pg_proc f where f.pronamespace = 'rekey'::regnamespace and f.proname = 'is_sweeping'))
  ), published as (
    -- A table may be in by itself, by its schema, by a table that it is a partition of, or with all others.
    select b.pubname, bool_and(r.prqual is not null) filter (where r.oid is not null) as filtered,
      bool_and(r.prattrs is not null and not s.attnum = any (r.prattrs::smallint[])) filter (where r.oid is not null) as without,
      bool_or(b.puballtables or m.oid is not null) as whole
    from pg_publication b
    cross join (
      select p.relation, p.attnum from parts p
      union
      select c.relid, a.attnum
      from parts p
      cross join lateral pg_partition_ancestors(p.relation) c
      join pg_attribute n on n.attrelid = p.relation and n.attnum = p.attnum
      join pg_attribute a on a.attrelid = c.relid and a.attname = n.attname) as s(relation, attnum)
    join pg_class c on c.oid = s.relation
    left join pg_publication_rel r on r.prpubid = b.oid and r.prrelid = s.relation
    left join pg_publication_namespace m on m.pnpubid = b.oid and m.pnnspid = c.relnamespace
    where b.pubupdate and c.relpersistence = 'p' and (b.puballtables or r.oid is not null or m.oid is not null)
    group by b.pubname
  )
  select 'key', true, format('constraint %I makes the column a key', c.conname), 'A key cannot be encrypted: protect another column.', null
  from pg_constraint c
  where c.contype in ('p', 'f') and (c.conrelid = relation and _column_findings.attnum = any (c.conkey)
    or c.confrelid = relation and _column_findings.attnum = any (c.confkey))
  union all
  select 'type', true, format('varchar(%s) limits its length, and an envelope is longer than its value', a.atttypmod - 4),
    format('ALTER TABLE %s ALTER COLUMN %I TYPE text: an envelope of nothing has 104 characters, one of %s has %s.',
      relation, a.attname, a.atttypmod - 4, 4 + (59 + 16 * ((a.atttypmod - 4) / 16 + 1) + 2) / 3 * 4), null
  from pg_attribute a where a.attrelid = relation and a.attnum = _column_findings.attnum and a.atttypid = 'varchar'::regtype and a.atttypmod > 0
  union all
  -- Not enforced: from version 18 on.
  select distinct 'check', false, format(case when e.enforced then 'CHECK %I is applied to envelopes' else 'CHECK %I, which is not enforced, is not about envelopes' end, c.conname),
    case when e.enforced then 'Drop it, or let it accept them: the sweep fails on rows that it refuses.' else 'Nothing fails on it; but it may not be true any more.' end, null
  from pg_constraint c cross join lateral (select coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true) as enforced) e join (select p.relation, p.attnum from parts p union select relation, _column_findings.attnum) as s on s.relation = c.conrelid
  where c.contype = 'c' and s.attnum = any (c.conkey)
  union all
  select 'index', false, format('index %s holds envelopes: no equality, no order, no uniqueness of the plain values', i.indexrelid::regclass),
    'Drop it; a value that has no room in an index row (2704 bytes) fails.', null
  from pg_index i
  where i.indrelid = relation and not i.indisprimary and (_column_findings.attnum = any (i.indkey) or exists (
    select from pg_depend d where d.objid = i.indexrelid and d.classid = 'pg_class'::regclass and d.refobjid = relation and d.refobjsubid = _column_findings.attnum))
  union all
  select 'generated', false, format('generated column %I is computed from envelopes', a.attname),
    case when a.attgenerated = 's' then format('ALTER TABLE %s ALTER COLUMN %I DROP EXPRESSION keeps what is in it; or drop it.', relation, a.attname)
         else 'Drop it, or compute it from the decrypted view.' end, null
  from pg_attrdef f
  join pg_attribute a on a.attrelid = f.adrelid and a.attnum = f.adnum and a.attgenerated <> ''
  where f.adrelid = relation and exists (
    select from pg_depend d where d.objid = f.oid and d.classid = 'pg_attrdef'::regclass and d.refobjid = relation and d.refobjsubid = _column_findings.attnum)
  union all
  select 'trigger', false,
    format(case when not t.each_row then 'trigger %I fires once a batch of a rotation'
                when t.conditional then 'trigger %I fires for every row of a rotation for which its condition is true'
                else 'trigger %I fires for every row of a rotation' end, t.tgname)
      || case when min(t.relation::oid) <> _column_findings.relation::oid and count(*) < (select count(*) from parts)
              then format(', in %s', min(t.relation::oid)::regclass) else '' end,
    case when t.each_row then 'What it derives from the column, as a hash or the last characters, becomes that of the envelope. ' else '' end
      || format('WHEN (NOT rekey.is_sweeping(%L)) lets it pass%s; rekey.protect_column(..., fire_triggers => false) keeps all of them from firing.',
        _column_findings.relation::text, case when not t.each_row then ', for each row' when t.conditional then ', beside its condition' else '' end), 'let_trigger_pass'
  from triggers t
  group by t.tgname, t.each_row, t.conditional
  union all
  -- 2: ON UPDATE
  select distinct 'rule', false, format('rule %I of %s is applied to the updates of a rotation', r.rulename, r.ev_class::regclass),
    'Drop it, make it a trigger, or have it passed by (fire_triggers => false): what it puts in their place may leave rows as they are.', 'pass_rule_by'
  from parts p join pg_rewrite r on r.ev_class = p.relation and r.ev_type = '2' and r.ev_enabled in ('O', 'A')
  where fire_triggers
  union all
  select 'search path', false, format('others may create in schema %I, in which what a rotation fires looks for names', s.nspname),
    'What they make there could run as the owner of the table: rekey.protect_column(..., search_path => ''...'') without it, or names with their schema.', 'path_of_others'
  from rekey._others_schemas(_column_findings.relation, _column_findings.search_path) as s(nspname)
  where exists (select from triggers)
  union all
  select 'publication', false,
    case when b.whole or not (b.filtered or b.without) then format('publication %I sends every row of a rotation', b.pubname)
         when b.without then format('publication %I sends every row of a rotation, without the column', b.pubname)
         else format('publication %I sends the rows of a rotation that its filter lets through', b.pubname) end,
    case when not b.whole and b.without then 'Subscribers, Supabase Realtime among them, get an update for each row, in which nothing has changed.'
         else 'Subscribers get the envelopes: they need the same keys.' end, null
  from published b
  union all
  select distinct 'publication', false, format('publication %I makes every UPDATE of %s fail, and so the sweep: %s', u.publication, p.relation, u.why),
    'ALTER TABLE ... REPLICA IDENTITY, or ALTER PUBLICATION, before anything is swept.', null
  from parts p cross join lateral rekey._refused_updates(p.relation) u;
end;
comment on function rekey._column_findings is 'What envelopes in a column break, and what a sweep of it fires, with this search path. fatal: it cannot be protected; action: as in rekey.find_unprotected().';

create or replace function rekey._newest_problem(protected rekey.protected_columns) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_shape record;
  v_relation regclass;
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if protected.encrypt_on_write and not exists (
       select from pg_proc p
       where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = format('column_%s_trigger', protected.id)
         and p.prosrc = rekey._write_trigger_body(protected, v_shape.relation, v_shape.attnums)) then
    return 'the trigger that encrypts on write is not as this version of pg_rekey makes it, or a column was renamed';
  end if;
  select g.tgrelid into v_relation
  from (select v_shape.relation as relation union select h from rekey._relations_here(v_shape.relation) h) t
  join pg_trigger g on g.tgrelid = t.relation and g.tgname = any (rekey._trigger_names(protected)) and g.tgenabled <> 'A'
  limit 1;
  return case when v_relation is not null then format('the triggers of %s do not fire in the replica role', v_relation) end;
end
$$;
comment on function rekey._newest_problem is 'In what the triggers of a protected column that is not blocked are behind; NULL: in nothing.';

create or replace function rekey.protection_findings()
returns table (label text, kind text, severity text, finding text, advice text, action text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column rekey.protected_columns;
  v_shape record;
begin
  for v_column in select * from rekey.protected_columns c order by c.label loop
    label := v_column.label;
    action := null;
    select s.* into v_shape from rekey._column_shape(v_column.id) s;
    finding := rekey._column_problem(v_column);
    if finding is not null then
      kind := 'blocked';
      severity := 'critical';
      advice := 'As long as it cannot be counted, rotations of keyrings that it may hold do not complete, and no key is destroyed.';
      return next;
    else
      finding := rekey._newest_problem(v_column);
      if finding is not null then
        kind := 'write trigger';
        severity := 'warning';
        advice := format('Repeat rekey.protect_column(%L, %L%s) as the owner of the table.', v_column.relation_name, v_column.column_name, rekey._protect_options(v_column));
        action := 'renew_trigger';
        return next;
      end if;
    end if;
    return query select v_column.label, f.kind, f.severity, f.finding, f.advice, null from rekey._index_findings(v_column) f;
    if v_shape.relation is not null then
      return query
        select v_column.label, f.kind, 'warning', f.finding, f.advice, f.action
        from rekey._column_findings(v_shape.relation, v_shape.attnums[v_column.places[1]], v_column.fire_triggers, v_column.search_path) f
        order by f.kind, f.finding;
    end if;
  end loop;
end
$$;
comment on function rekey.protection_findings is
  'What blocks protected columns, and what rekey.protect_column() warned of or would warn of now: triggers, rules and publications that came later too. severity: critical (blocked) or warning; action: as in rekey.find_unprotected().';
grant execute on function rekey.protection_findings to rekey_admin, rekey_operator, rekey_auditor;

-- Logical replication brings rows, and not the sequences that numbered them.
create or replace function rekey._sequences_behind() returns table (sequence regclass, at bigint, needed bigint)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
begin
  for v_column in
    select a.attrelid::regclass as relation, a.attname, pg_get_serial_sequence(a.attrelid::regclass::text, a.attname)::regclass as sequence
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attidentity <> '' and not a.attisdropped
    where c.relnamespace = 'rekey'::regnamespace and c.relkind = 'r'
    union all
    select r.relation, r.attname, 'rekey._pass_id'::regclass
    from (values ('rekey.rotations'::regclass, 'pass_id'), ('rekey.rotations', 'verification_id'), ('rekey._chunks', 'pass_id'), ('rekey._verified', 'verification_id'))
      as r(relation, attname)
  loop
    sequence := v_column.sequence;
    execute format('select max(t.%I) from %s t', v_column.attname, v_column.relation) into needed;
    execute format('select case when s.is_called then s.last_value else s.last_value - 1 end from %s s', sequence) into at;
    if needed > at then
      return next;
    end if;
  end loop;
end
$$;
comment on function rekey._sequences_behind is 'Sequences of our tables whose next number is taken: where they are, and where they would have to be.';

create or replace function rekey.resync_sequences() returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_behind record;
  v_count bigint := 0;
begin
  for v_behind in select s.sequence, max(s.needed) as needed from rekey._sequences_behind() s group by s.sequence loop
    perform setval(v_behind.sequence, v_behind.needed);
    v_count := v_count + 1;
  end loop;
  return v_count;
end
$$;
comment on function rekey.resync_sequences is
  'Moves the sequences of pg_rekey on to where their tables are, and returns how many were behind. After a switch-over by logical replication, which brings rows and no sequences: without it, rotations fail with 23505.';
grant execute on function rekey.resync_sequences to rekey_admin;

create or replace function rekey.findings()
returns table (kind text, severity text, target text, keyring text, version integer, rows bigint, finding text, advice text, action text)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select 'own tables', 'critical', 'rekey', null::text, null::integer, null::bigint, o.problem, 'Nothing completes and no key is destroyed until that is done.', null::text
    from rekey._own_problem() as o(problem) where o.problem is not null
    union all
    -- 1: for each row, 2: before. Whoever made it may want it; it could also keep rows as they are, and say nothing.
    select 'own tables', 'warning', t.tgrelid::regclass::text, null, null, null,
      format('trigger %I of %s may change what pg_rekey writes', t.tgname, t.tgrelid::regclass), format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass), null
    from pg_depend d
    join pg_trigger t on d.classid = 'pg_class'::regclass and t.tgrelid = d.objid and not t.tgisinternal and t.tgtype::integer & 3 = 3
    join pg_proc p on p.oid = t.tgfoid and p.pronamespace <> 'rekey'::regnamespace
    where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'rekey'::regnamespace
    union all
    select c.kind, c.severity, c.label, null, null, null, format('%s: %s', c.label, c.finding), c.advice, c.action from rekey.protection_findings() c
    union all
    select 'sequence', 'critical', s.sequence::text, null, null, null,
      format('the sequence %s is at %s, and its table at %s: rotations will fail with 23505', s.sequence, s.at, s.needed),
      format('select rekey.resync_sequences(), or: select setval(%L, %s)', s.sequence::text, s.needed), null
    from rekey._sequences_behind() s
    union all
    select 'name', 'warning', n.nspname::text, null, null, null,
      format('schema %I belongs to %s, and not to the extension %s', n.nspname, pg_get_userbyid(n.nspowner), s.extension),
      'pg_rekey passes it by. Whoever reads or calls what is in it runs the code of that role: DROP SCHEMA, or REVOKE CREATE ON DATABASE.', null
    from (values ('cron', 'pg_cron'), ('vault', 'supabase_vault')) as s(schema, extension)
    join pg_namespace n on n.nspname = s.schema
    where not exists (
      select from pg_extension e
      where e.extname = s.extension and (e.extnamespace = n.oid or exists (
        select from pg_depend d
        where d.classid = 'pg_namespace'::regclass and d.objid = n.oid and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e')))
    union all
    select 'name', 'warning', o.name, null, null, null,
      format('%s of %s is in a schema of the extension %s, and not of the extension', o.name, pg_get_userbyid(o.owner), s.extension),
      'pg_rekey passes it by. Look at what it is for, and who may CREATE in that schema.', null
    from (values ('cron', 'pg_cron'), ('vault', 'supabase_vault')) as s(schema, extension)
    join pg_namespace n on n.nspname = s.schema
    join pg_extension e on e.extname = s.extension
    join (
      select c.relnamespace, c.oid, c.relowner, 'pg_class'::regclass, c.oid::regclass::text from pg_class c where c.relkind in ('r', 'p', 'v', 'm', 'f')
      union all
      select p.pronamespace, p.oid, p.proowner, 'pg_proc'::regclass, p.oid::regprocedure::text from pg_proc p
    ) as o(namespace, oid, owner, class, name) on o.namespace = n.oid
    where not exists (
      select from pg_depend d
      where d.classid = o.class and d.objid = o.oid and d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e')
    union all
    select f.kind, f.severity, f.target, nullif(f.keyring, ''), nullif(f.version, 0), f.rows, f.finding, f.advice, null
    from rekey._census_findings f where f.rows is not null;
end
$$;
comment on function rekey.findings is
  'What is not as it should be: tables of ours that hide rows, protected columns (rekey.protection_findings()), sequences that are behind, schemas and objects that only have the names of pg_cron or the Vault, and rows that the last census found not to open, or on versions that are destroyed or unknown. severity: critical or warning; action: as in rekey.find_unprotected(). pg-rekey doctor shows it.';
grant execute on function rekey.findings to rekey_admin, rekey_operator, rekey_auditor;
