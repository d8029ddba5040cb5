-- The search of the whole database for envelopes of versions that are to be destroyed.
--
-- Steps, each a transaction of its own. They read with the rights of whoever calls them, since rekey_owner may read nobody's
-- tables; what they find is noted by definer functions that believe nobody but the step itself (_refuse_forger).
--
-- 1. Every relation of some size is read, some blocks at a turn. `since` is the oldest transaction under way at its first turn.
-- 2. Every transaction that is older than the end of that has to end: what it stores, or a snapshot of its shows, is seen by 3.
-- 3. A look at everything, in one snapshot: rows that `since` or a later transaction wrote, and whole relations that are
--    small, or new. All other rows were there, under the same row pointer, when their blocks were read (61_verify.sql).
--    What is large, and was made, rewritten, or given another column since its turns, goes back to 1.
--
-- Whatever is not read, for whatever reason, may hold an envelope.

-- Patterns and why: 54_find.sql. JSON may have a backslash before a slash.
create or replace function rekey._hits(place integer, value text, wanted bytea[]) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_backslash text := chr(92);  -- a literal depends on the settings of the session in which it is read first
  v_pieces text[];
  v_piece text;
  v_header bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  -- Assignments: a value may be plain, and must not become the parameter of a statement.
  if strpos(value collate "C", 'rk1:UksB') > 0 then
    v_pieces := string_to_array(value, 'rk1:UksB');
    foreach v_piece in array v_pieces[2:] loop
      v_piece := replace(left(v_piece, 200), v_backslash || '/', '/');
      if v_piece collate "C" ~ '^[A-Za-z0-9+/]{96}' then
        v_header := substr(decode('UksB' || left(v_piece, 12), 'base64'), 1, 11);
        if v_header = any (wanted) and v_header <> all (v_found) then
          v_found := v_found || v_header;
        end if;
      end if;
    end loop;
  end if;
  if strpos(value collate "C", v_backslash || 'x524b01') > 0 then
    v_pieces := string_to_array(value, v_backslash || 'x524b01');
    foreach v_piece in array v_pieces[2:] loop
      if left(v_piece, 144) collate "C" ~ '^[0-9a-f]{144}' then
        v_header := decode('524b01' || left(v_piece, 16), 'hex');
        if v_header = any (wanted) and v_header <> all (v_found) then
          v_found := v_found || v_header;
        end if;
      end if;
    end loop;
  end if;
  v_piece := null;
  foreach v_header in array v_found loop
    v_piece := concat_ws(' ', v_piece, place || ':' || encode(v_header, 'hex'));
  end loop;
  return v_piece;
end
$$;
comment on function rekey._hits(integer, text, bytea[]) is 'The wanted headers of envelopes that stand within a text, as place:hex, separated by spaces; NULL: none.';
grant execute on function rekey._hits(integer, text, bytea[]) to rekey_operator;

create or replace function rekey._hits(place integer, value bytea, wanted bytea[]) returns text
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_value bytea := value || ''::bytea;  -- decompressed once
  v_first bytea := decode('524b01', 'hex');
  v_from integer := 1;
  v_window bytea;
  v_at integer;
  v_text text;
  v_header bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  -- In windows that overlap: a value that is full of beginnings is not copied for each of them.
  while v_from <= octet_length(v_value) - 2 loop
    v_window := substr(v_value, v_from, 8192);
    loop
      v_at := position(v_first in v_window);
      exit when v_at = 0;
      v_from := v_from + v_at + 2;
      v_window := substr(v_window, v_at + 3);
      v_header := substr(v_value, v_from - 3, 11);
      if v_header = any (wanted) and v_header <> all (v_found) and octet_length(v_value) >= v_from + 71 then
        v_found := v_found || v_header;
      end if;
    end loop;
    v_from := v_from + greatest(octet_length(v_window) - 2, 0);
  end loop;
  v_text := null;
  foreach v_header in array v_found loop
    v_text := concat_ws(' ', v_text, place || ':' || encode(v_header, 'hex'));
  end loop;
  if position(convert_to('rk1:UksB', 'UTF8') in v_value) > 0 then
    v_text := concat_ws(' ', v_text, rekey._hits(place, replace(encode(v_value, 'escape'), repeat(chr(92), 2), chr(92)), wanted));
  end if;
  return nullif(v_text, '');
end
$$;
comment on function rekey._hits(integer, bytea, bytea[]) is 'As for text, of bytes: envelopes at their beginning or within, and their text form.';
grant execute on function rekey._hits(integer, bytea, bytea[]) to rekey_operator;

-- Planning a query computes constant parts of the expressions of indexes and statistics, with the rights of who reads: code
-- of whoever may make an index on a table, which a superuser would run.
create or replace function rekey._code_of_others(relation oid, reader name) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (PL/pgSQL keeps the plan: there may be many relations.)
  return (
  select format('%s calls %s, of role %I', o.name, p.oid::regprocedure, w.rolname)
  from (
    select 'pg_class'::regclass as catalog, i.indexrelid as oid, format('index %s', i.indexrelid::regclass) as name
    from pg_index i where i.indrelid = relation and (i.indexprs is not null or i.indpred is not null)
    union all
    select 'pg_statistic_ext'::regclass, s.oid, format('statistics %I.%I', n.nspname, s.stxname)
    from pg_statistic_ext s join pg_namespace n on n.oid = s.stxnamespace where s.stxrelid = relation and s.stxexprs is not null
  ) o
  join pg_depend d on d.classid = o.catalog and d.objid = o.oid and d.refclassid in ('pg_proc'::regclass, 'pg_operator'::regclass)
  left join pg_operator r on d.refclassid = 'pg_operator'::regclass and r.oid = d.refobjid
  join pg_proc p on p.oid = coalesce(r.oprcode::oid, d.refobjid)
  join pg_roles w on w.oid = p.proowner
  where not w.rolsuper and w.rolname is distinct from reader
  limit 1);
end
$$;
comment on function rekey._code_of_others is 'A function of neither a superuser nor the reader that reading a relation may run; NULL: there is none.';
grant execute on function rekey._code_of_others to rekey_operator, rekey_auditor;

create or replace function rekey._hold(relation oid, name text) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '3 s'  -- longer than deadlock_timeout: autovacuum gives way
as $$
declare
  v_reader name;
  v_owner record;
  v_code text;
begin
  -- Whom a function runs as is not all: it can RESET ROLE to the one who logged in.
  -- (Of all sessions, only this one is asked for: there may be many relations.)
  select case when r.rolname = session_user and session_user = current_user then current_user end into v_reader
  from pg_stat_get_activity(pg_backend_pid()) a join pg_roles r on r.oid = a.usesysid;
  select c.relkind, r.rolname, r.rolsuper into v_owner from pg_class c join pg_roles r on r.oid = c.relowner where c.oid = relation;
  if not found then
    return 'it was dropped';
  end if;
  if not v_owner.rolsuper and v_owner.rolname is distinct from v_reader then
    -- From here on nobody makes an index on it. (Who may only SELECT may not lock it so.)
    if v_owner.relkind = 'r' and has_table_privilege(relation, 'update, delete, truncate') then
      execute format('lock table only %s in share update exclusive mode', relation::regclass);
    elsif v_owner.relkind = 'm' and (select u.rolsuper from pg_roles u where u.rolname = current_user) then
      execute format('comment on materialized view %s is null', relation::regclass);  -- the only lock there is; the caller takes it back
    end if;
  end if;
  -- What is read by that name must be what was looked at: from here on the lock keeps it.
  if to_regclass(name) is distinct from relation::regclass then
    raise exception '% is another relation now', name using errcode = 'undefined_table';
  end if;
  v_code := rekey._code_of_others(relation, v_reader);
  return v_code || ': it can have the table read by connecting itself; or, if you trust that code, give the function to a superuser';
end
$$;
comment on function rekey._hold is 'Keeps a relation from being given code until the subtransaction of the caller ends, which he undoes, and says why he is not to read it; NULL: nothing. name: by which he reads it; 42P01: it is another one''s.';
grant execute on function rekey._hold to rekey_operator, rekey_auditor;


-- What holds no rows here is left out: views, partitioned and foreign tables. So is what belongs to PostgreSQL itself, to
-- pg_rekey, pg_cron and Supabase Vault: by owner or extension, since a name proves nothing.
create or replace function rekey._searchable(only_one oid = null)
returns table (relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, problem text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    with counted as materialized (
      -- Values of these are counted by their own functions. (In a text column, an envelope may stand within another text.)
      select h.oid as relation, a.attname
      from rekey.protected_columns p
      cross join lateral rekey._column_shape(p.id) s
      join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.places[1]]
      cross join lateral rekey._relations_here(s.relation) as h(oid)
      where not p.is_text
    ), altered as materialized (
      -- Asked for the size of these, we would wait.
      select l.relation from pg_locks l where l.locktype = 'relation' and l.mode = 'AccessExclusiveLock' and l.granted and l.pid is distinct from pg_backend_pid()
    )
    select c.oid, c.oid::regclass::text,
      case when c.oid in (select a.relation from altered a) then greatest(c.relpages, 0)::bigint * current_setting('block_size')::integer else pg_table_size(c.oid) end,
      c.relfilenode, m.amname = 'heap',
      format('select count(*) as rows, bool_and(t.tableoid = %s) as same, string_agg(f.hits, '' '') as hits from only %s t
        cross join lateral (select nullif(array_to_string(array[%s], '' ''), '''') as hits offset 0) f%s',
        c.oid, c.oid::regclass, k.hits,
        case when m.amname = 'heap' then ' where t.ctid >= $2 and t.ctid < $3 and ($4 is null or age(t.xmin) <= age($4))' end),
      case when rekey._is_of_citus(c.oid) then 'its rows are on other nodes of Citus' end
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    left join pg_am m on m.oid = c.relam
    cross join lateral (
      -- An envelope has 75 bytes or more, which no compression of values makes fewer.
      select string_agg(format(case
          when v.base = 'bytea'::regtype then
            $q$case when pg_column_size(%1$s) >= 75 and (position('\x524b01'::bytea in %1$s) > 0 or position('\x726b313a556b7342'::bytea in %1$s) > 0)
              then rekey._hits(%2$s, %1$s::bytea, $1) end$q$
          when v.base in ('text'::regtype, 'varchar'::regtype) then
            -- Most values that have one are one, of another version.
            $q$case when pg_column_size(%1$s) >= 75 and (strpos(%1$s collate "C", 'rk1:UksB') > 0 or strpos(%1$s collate "C", '\x524b01') > 0)
              and case when %1$s collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12,}={0,2}$' then substr(decode(substr(%1$s, 5, 16), 'base64'), 1, 11) = any ($1) else true end
              then rekey._hits(%2$s, %1$s::text, $1) end$q$
          else $q$case when pg_column_size(%1$s) >= 75 and format('%%s', %1$s) collate "C" ~ 'rk1:UksB|\\x524b01' then rekey._hits(%2$s, format('%%s', %1$s), $1) end$q$ end,
        format('t.%I', a.attname), a.attnum), ', ' order by a.attnum) as hits
      from pg_attribute a
      join pg_type y on y.oid = a.atttypid
      left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
      cross join lateral (select case when y.typtype = 'd' and y.typnamespace = 'pg_catalog'::regnamespace then y.typbasetype else y.oid end as base) v
      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v'
        -- As in rekey.find_envelopes().
        and coalesce(e.typlen, y.typlen) not between 1 and 74 and coalesce(e.typcategory, y.typcategory) not in ('N', 'B', 'D', 'T', 'E', 'G', 'I', 'V')
        and not exists (select from counted p where p.relation = c.oid and p.attname = a.attname)
    ) k
    where (only_one is null or c.oid = only_one) and c.relkind in ('r', 'm') and c.relpersistence <> 't' and c.relispopulated and c.oid >= 16384 and k.hits is not null
      and not (n.nspname in ('rekey', 'rekey_targets') and c.relowner = 'rekey_owner'::regrole)
      and not rekey._is_extension_table(c.oid);
end
$$;
comment on function rekey._searchable is
  'The relations of this database, or only one, that have room for an envelope where no target counts it, and the statement that reads one: $1 the headers wanted, of a heap $2 and $3 a range of row pointers, $4 the transaction from which on rows are read, NULL: all. problem: why it cannot be read.';
grant execute on function rekey._searchable to rekey_operator;

-- Whom to believe. The call stack says who calls, in whatever language: its second line begins as the first one does.
create or replace function rekey._refuse_forger(stack text, callee text, caller text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not starts_with(split_part(stack, E'\n', 2), split_part(stack, callee, 1) || caller || ' ') then
    raise exception 'only a step of the search may say what it found' using errcode = 'insufficient_privilege';
  end if;
end
$$;
comment on function rekey._refuse_forger is '42501 where a function was not called by the one that may, directly and in an assignment. stack: PG_CONTEXT of the function.';

create or replace function rekey._older_transactions(older xid8, since timestamptz) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_stat_clear_snapshot();
  -- Who sends WAL or vacuums writes nothing into a table, and may have a snapshot for ever.
  return (
    select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('pid', o.pid, 'role', o.role, 'prepared', o.gid,
      'age_seconds', extract(epoch from clock_timestamp() - coalesce(o.begun, since))::bigint)))
    from (
      select a.pid, a.usename as role, null as gid, a.xact_start as begun
      from pg_stat_activity a
      where a.datname = current_database() and a.pid <> pg_backend_pid()
        and (age(a.backend_xid) > age(older::xid) or age(a.backend_xmin) > age(older::xid))
        and not exists (select from pg_stat_get_wal_senders() w where w.pid = a.pid)
        and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid)
      union all
      select null, p.owner, p.gid, p.prepared from pg_prepared_xacts p
      where p.database = current_database() and age(p.transaction) > age(older::xid)) o);
end
$$;
comment on function rekey._older_transactions is
  'Who in this database has a transaction older than this one, or a snapshot from before it; NULL: nobody. since: what counts as the beginning of a transaction whose own is hidden from us.';

create or replace function rekey._open_search() returns rekey._searches
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  -- (Restored from a dump, or made by the clock of another time, it says nothing.)
  select s.* into v_search from rekey._searches s
  where s.home = rekey._home() and s.begun_at <= clock_timestamp()
    and coalesce(pg_snapshot_xmax(pg_current_snapshot())::text::bigint - s.begun_in::text::bigint, 0) between 0 and 1000000000
  order by s.id desc limit 1;
  return v_search;
end
$$;
comment on function rekey._open_search is 'The last search of this database, whatever its state; no row: NULL.';

create or replace function rekey._begin_search() returns rekey._searches
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  perform rekey._expect_doomed();  -- whatever a restore may have made of it
  delete from rekey._searches s where s.id is not null;
  insert into rekey._searches (home, scope, begun_in)
  values (rekey._home(), (rekey._settings()).destroy_search, pg_current_xact_id()) returning * into v_search;
  insert into rekey._search_versions (search_id, keyring_id, version)
  select v_search.id, k.keyring_id, k.version from rekey.encryption_keys k where k.state = 'destroy_scheduled';
  if v_search.scope = 'database' then
    -- Small relations are left to the look, up to 128 MB of them.
    insert into rekey._search_relations (search_id, relation, name, bytes)
    select v_search.id, r.relation, r.name, r.bytes
    from (select t.*, sum(t.bytes) over (order by t.bytes, t.relation rows unbounded preceding) as total from rekey._searchable() t) r
    where (r.bytes > 1048576 or r.total > 134217728) and r.problem is null and r.is_heap;
  end if;
  return v_search;
end
$$;
comment on function rekey._begin_search is 'Begins a search for every version that is scheduled for destruction, in place of the last one.';

create or replace function rekey.begin_search() returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
begin
  perform rekey._refuse_snapshot();
  if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then
    raise exception 'no version is scheduled for destruction' using errcode = 'RK006', hint = 'rekey.schedule_key_destruction() schedules one.',
      constraint = 'schedule_destruction';
  end if;
  perform pg_advisory_xact_lock(0, 5);
  v_search := rekey._open_search();
  if v_search.id is null or v_search.state = 'complete' or v_search.scope <> (rekey._settings()).destroy_search or exists (
       select from rekey.encryption_keys k where k.state = 'destroy_scheduled'
         and not exists (select from rekey._search_versions v where v.search_id = v_search.id and (v.keyring_id, v.version) = (k.keyring_id, k.version))) then
    v_search := rekey._begin_search();
  else
    update rekey._search_relations r set tried_by = '{}', problem = null where r.search_id = v_search.id and r.problem is not null;
    update rekey._searches s set incomplete_since = null where s.id = v_search.id;
  end if;
  return v_search.id;
end
$$;
comment on function rekey.begin_search is
  'Begins a search of the database for envelopes of every version that is scheduled for destruction; or has the one under way try again what it could not read. Returns its number. rekey.search_step(), repeated, does the work, with the rights of its caller. 25001: not in READ COMMITTED; RK006: none is scheduled.';
grant execute on function rekey.begin_search to rekey_admin, rekey_operator;

create or replace function rekey._search_turn(reader text, out event text, out search_id bigint, out relation oid, out name text, out statement text,
  out first bigint, out until bigint, out wanted bytea[], out wait interval, out detail jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_search rekey._searches;
  v_relation rekey._search_relations;
  v_found record;
  v_rows integer;
begin
  perform rekey._refuse_snapshot();
  if not pg_try_advisory_xact_lock(0, 5) then
    event := 'waiting';
    wait := '1 s';
    return;
  end if;
  v_search := rekey._open_search();
  if v_search.id is null or v_search.state = 'complete' then
    event := 'idle';
    return;
  elsif v_search.begun_in = pg_current_xact_id_if_assigned() then
    event := 'waiting';  -- until then nobody else knows that the versions are to be destroyed
    wait := '0 s';
    detail := jsonb_build_object('for', 'COMMIT of this transaction');
    return;
  end if;
  search_id := v_search.id;
  wanted := array(select rekey._header(v.keyring_id, v.version) from rekey._search_versions v where v.search_id = v_search.id);
  select r.* into v_relation from rekey._search_relations r
  where r.search_id = v_search.id and r.state = 'pending' and r.tried_by @> array[reader] is false
  order by r.next_block > 0 desc, r.bytes, r.relation limit 1;
  if found then
    select t.* into v_found from rekey._searchable(v_relation.relation) t;
    if not found then
      delete from rekey._search_relations r where (r.search_id, r.relation) = (v_search.id, v_relation.relation);
      event := 'begun';
      return;
    end if;
    if v_relation.since is null or v_relation.statement is distinct from v_found.statement then
      delete from rekey._search_finds f where (f.search_id, f.relation) = (v_search.id, v_relation.relation);
      v_relation.next_block := 0;
      v_relation.since := pg_snapshot_xmin(pg_current_snapshot());
      -- (Of rows that come later, the look sees all.)
      update rekey._search_relations r
      set since = v_relation.since, statement = v_found.statement, name = v_found.name, next_block = 0, rows = 0, filenode = null,
          blocks = pg_relation_size(v_relation.relation) / current_setting('block_size')::integer
      where (r.search_id, r.relation) = (v_search.id, v_relation.relation);
    end if;
    -- Four rows that are read cost about what it costs to re-encrypt one.
    select w.rows, w.wait into v_rows, wait from rekey._throttle(100000) w;
    if v_rows is null then
      event := 'waiting';
      return;
    end if;
    event := 'read';
    relation := v_relation.relation;
    name := v_found.name;
    statement := v_found.statement;
    first := v_relation.next_block;
    until := first + case when v_rows = 100000 then v_relation.batch_blocks else least(v_relation.batch_blocks, greatest(v_rows / 8, 1)) end;
    return;
  end if;
  if exists (select from rekey._search_relations r where r.search_id = v_search.id and r.state = 'pending')
     or exists (select from rekey._search_relations r where r.search_id = v_search.id and r.problem is not null and r.tried_by @> array[reader]) then
    update rekey._searches s set incomplete_since = coalesce(s.incomplete_since, now()) where s.id = v_search.id;
    event := 'incomplete';
    return;
  end if;
  -- What these store, or show to a snapshot of theirs, the look is to see: so it comes after their end.
  if v_search.older is null then
    v_search.older := pg_snapshot_xmax(pg_current_snapshot());
    update rekey._searches s set older = v_search.older, state = 'looking', blocked_since = null where s.id = v_search.id;
  end if;
  v_search.blocked_by := rekey._older_transactions(v_search.older, coalesce(v_search.blocked_since, now()));
  update rekey._searches s
  set blocked_by = v_search.blocked_by, blocked_since = case when v_search.blocked_by is not null then coalesce(s.blocked_since, now()) end
  where s.id = v_search.id and s.blocked_by is distinct from v_search.blocked_by;
  if v_search.blocked_by is not null then
    event := 'waiting';
    wait := '500 ms';
    detail := jsonb_build_object('blocked_by', v_search.blocked_by);
    return;
  end if;
  event := 'look';
  if v_search.scope = 'columns' then
    update rekey._searches s set state = 'complete', completed_at = clock_timestamp() where s.id = v_search.id;
    event := 'complete';
  end if;
end
$$;
comment on function rekey._search_turn is 'What the search has to do next, as the role that reads can: read some blocks of a relation, look at everything, wait, or nothing (idle; incomplete: this role can do no more).';
grant execute on function rekey._search_turn to rekey_operator;

create or replace function rekey._note_finds(search_id bigint, relation oid, hits text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into rekey._search_finds as f (search_id, relation, attnum, keyring_id, version, relation_name, column_name, rows)
  select _note_finds.search_id, _note_finds.relation, h.attnum, rekey._int4(h.header, 3), rekey._int4(h.header, 7),
    _note_finds.relation::regclass::text, a.attname, count(*)
  from (select split_part(x.hit, ':', 1)::smallint as attnum, decode(split_part(x.hit, ':', 2), 'hex') as header
        from string_to_table(hits, ' ') as x(hit) where x.hit <> '') h
  join pg_attribute a on a.attrelid = _note_finds.relation and a.attnum = h.attnum
  group by h.attnum, h.header, a.attname
  on conflict on constraint _search_finds_pkey do update set rows = f.rows + excluded.rows;
end
$$;
comment on function rekey._note_finds is 'Notes where the search found envelopes. hits: of rekey._hits().';

create or replace function rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid,
  problem text, begun timestamptz) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
  v_relation rekey._search_relations;
  v_pace double precision;
begin
  get diagnostics v_stack = pg_context;
  perform rekey._refuse_forger(v_stack, 'rekey._note_read(', 'rekey.search_step()');
  select r.* into strict v_relation from rekey._search_relations r where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
  if problem is not null then
    update rekey._search_relations r
    set problem = _note_read.problem, role = reader, read_at = clock_timestamp(), tried_by = array_append(r.tried_by, reader)
    where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
    return 'unread';
  elsif _note_read.filenode = 0 or v_relation.filenode <> _note_read.filenode then
    -- From the beginning: what has another file has other row pointers.
    update rekey._search_relations r set since = null, filenode = null
    where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
    return 'rewritten';
  end if;
  perform rekey._note_finds(search_id, relation, hits);
  v_pace := extract(epoch from (rekey._settings()).batch_target) / greatest(extract(epoch from clock_timestamp() - begun), 0.001);
  update rekey._search_relations r
  set next_block = until, filenode = _note_read.filenode, rows = r.rows + _note_read.rows, role = reader, read_at = clock_timestamp(), problem = null,
      state = case when until >= r.blocks then 'read' else 'pending' end,
      batch_blocks = greatest(16, least(65536, r.batch_blocks * least(v_pace, 4)))::integer
  where (r.search_id, r.relation) = (_note_read.search_id, _note_read.relation);
  perform rekey._note_pace(begun, rows / 4);
  return 'read';
end
$$;
comment on function rekey._note_read is 'Notes what a step of the search read. 42501: it is not the step that calls.';
grant execute on function rekey._note_read to rekey_operator;

-- In the snapshot of the statement that calls it: as STABLE.
create or replace function rekey._to_look(search_id bigint)
returns table (relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, since xid, problem text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select t.relation, t.name, t.bytes, t.filenode, t.is_heap, t.statement, case when r.filenode = t.filenode and r.statement = t.statement
      and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - r.since::text::bigint < 1000000000 then r.since::xid end, t.problem
    from rekey._searchable() t
    left join rekey._search_relations r on r.search_id = _to_look.search_id and r.relation = t.relation and r.state <> 'pending'
    order by t.relation;
end
$$;
comment on function rekey._to_look is 'What the look of a search has to read: the rows that this transaction or a later one wrote; NULL: all.';
grant execute on function rekey._to_look to rekey_operator;

create or replace function rekey._look(search_id bigint, wanted bytea[])
returns table (relation oid, name text, problem text, again boolean, hits text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_to_look record;
  v_first bigint;
  v_blocks bigint;
  v_step bigint;
  v_same boolean;
  v_hits text;
begin
  for v_to_look in select t.* from rekey._to_look(search_id) t loop
    relation := v_to_look.relation;
    name := v_to_look.name;
    problem := v_to_look.problem;
    again := v_to_look.is_heap and v_to_look.since is null and v_to_look.bytes > 8388608;
    hits := null;
    if pg_relation_filenode(relation) is null then
      again := true;  -- dropped since the snapshot: its rows may have gone elsewhere
    elsif problem is null and not again then
      begin
        problem := rekey._hold(relation, name);
        v_blocks := case when v_to_look.is_heap then pg_relation_size(relation) / current_setting('block_size')::integer else 1 end;
        v_step := case when v_to_look.since is null then 512 else 8192 end;
        v_first := 0;
        while problem is null and v_first < v_blocks loop
          execute format('select r.same, r.hits from (%s) r', v_to_look.statement) into v_same, v_hits
          using wanted, format('(%s,0)', v_first)::tid, format('(%s,0)', v_first + v_step)::tid, v_to_look.since;
          again := again or v_same is false;
          hits := concat_ws(' ', hits, v_hits);
          v_first := v_first + v_step;
        end loop;
        -- A table that was rewritten since the snapshot may seem empty to it. Its lock keeps it now, where it is not empty.
        again := again or problem is null and (pg_relation_filenode(relation) is distinct from v_to_look.filenode
          or v_blocks > 0 and to_regclass(v_to_look.name) is distinct from relation::regclass);
        raise exception using errcode = 'RKEND';
      exception
        when sqlstate 'RKEND' then null;  -- gives the locks back
        when undefined_table then again := true;
        when others then problem := sqlerrm;
      end;
    end if;
    return next;
  end loop;
end
$$;
comment on function rekey._look is 'Looks, in the snapshot of the statement that calls it and with the rights of who does, at all that the turns of a search have not read. again: it has to be read by turns, since it is large, or was rewritten.';
grant execute on function rekey._look to rekey_operator;

create or replace function rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
  v_found record;
  v_looks integer;
begin
  get diagnostics v_stack = pg_context;
  perform rekey._refuse_forger(v_stack, 'rekey._note_look(', 'rekey.search_step()');
  for v_found in
    select u.relation, u.hits from unnest(relations, hits) as u(relation, hits) where u.hits is not null
  loop
    perform rekey._note_finds(search_id, v_found.relation, v_found.hits);
  end loop;
  delete from rekey._search_relations r where r.search_id = _note_look.search_id and not r.relation = any (coalesce(relations, '{}'));
  update rekey._searches s set looks = s.looks + 1 where s.id = _note_look.search_id returning s.looks into v_looks;
  if true = any (again) and v_looks < 20 then
    insert into rekey._search_relations as r (search_id, relation, name, bytes)
    select _note_look.search_id, u.relation, u.name, pg_table_size(u.relation)
    from unnest(relations, names, again) as u(relation, name, again)
    where u.again and exists (select from pg_class c where c.oid = u.relation)
    on conflict on constraint _search_relations_pkey do update set state = 'pending', since = null, filenode = null, bytes = excluded.bytes, tried_by = '{}', problem = null;
    update rekey._search_relations r set state = 'read' where r.search_id = _note_look.search_id and r.state = 'looked';
    update rekey._searches s set state = 'reading', older = null where s.id = _note_look.search_id;
    return 'again';
  end if;
  -- What another role has looked at since the same time counts; what this one could not, another may.
  insert into rekey._search_relations as r (search_id, relation, name, bytes, state, problem, role, read_at, tried_by)
  select _note_look.search_id, u.relation, u.name, pg_table_size(u.relation), case when l.problem is null then 'looked' else 'read' end, l.problem, reader,
    clock_timestamp(), case when l.problem is null then '{}' else array[reader] end
  from unnest(relations, names, problems, again) as u(relation, name, problem, again)
  cross join lateral (select case when u.again then 'it is changed again and again' else u.problem end as problem) l
  on conflict on constraint _search_relations_pkey do update
  set state = case when r.state = 'looked' then r.state else excluded.state end,
      problem = case when r.state = 'looked' then null else excluded.problem end,
      role = case when r.state = 'looked' then r.role else excluded.role end,
      read_at = case when r.state = 'looked' then r.read_at else excluded.read_at end,
      tried_by = case when excluded.problem is null then r.tried_by else array_append(r.tried_by, reader) end;
  if exists (select from rekey._search_relations r where r.search_id = _note_look.search_id and r.state <> 'looked') then
    return 'looked';
  end if;
  update rekey._searches s set state = 'complete', completed_at = clock_timestamp() where s.id = _note_look.search_id;
  return 'complete';
end
$$;
comment on function rekey._note_look is 'Notes what a look found: complete; looked, where something is left that another role may read; again, where something is to be read by turns. 42501: it is not the step that calls.';
grant execute on function rekey._note_look to rekey_operator;

create or replace function rekey.search_step(out event text, out wait interval, out detail jsonb)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- What is hidden, or read otherwise, would count as not there.
set row_security = off
set standard_conforming_strings = on
set bytea_output = hex
set quote_all_identifiers = off
-- CHECK constraints would be computed too: _code_of_others().
set constraint_exclusion = off
set lock_timeout = '3 s'
as $$
declare
  v_begun timestamptz := clock_timestamp();
  v_turn record;
  v_reader text := current_user;
  v_relations oid[];
  v_names text[];
  v_problems text[];
  v_again boolean[];
  v_all_hits text[];
  v_rows bigint;
  v_same boolean;
  v_hits text;
  v_filenode oid;
  v_problem text;
begin
  select t.* into v_turn from rekey._search_turn(v_reader) t;
  event := v_turn.event;
  wait := v_turn.wait;
  detail := v_turn.detail;
  if event = 'read' then
    begin
      v_problem := rekey._hold(v_turn.relation, v_turn.name);
      if v_problem is null then
        execute v_turn.statement into v_rows, v_same, v_hits
        using v_turn.wanted, format('(%s,0)', v_turn.first)::tid, format('(%s,0)', v_turn.until)::tid, null::xid;
        -- The statement goes by the name, which may have become another relation's. Now its lock keeps it.
        v_filenode := case when v_same is not false and to_regclass(v_turn.name) = v_turn.relation then pg_relation_filenode(v_turn.relation) else 0 end;
      end if;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;  -- gives the locks back
      when undefined_table then v_filenode := 0;
      when others then v_problem := sqlerrm;
    end;
    event := rekey._note_read(v_turn.search_id, v_turn.relation, v_reader, v_turn.until, v_rows, v_hits, v_filenode, v_problem, v_begun);
    detail := jsonb_strip_nulls(jsonb_build_object('relation', v_turn.relation::regclass::text, 'rows', v_rows, 'problem', v_problem));
  elsif event = 'look' then
    -- One statement, one snapshot: no row escapes by moving.
    select array_agg(l.relation), array_agg(l.name), array_agg(l.problem), array_agg(l.again), array_agg(l.hits)
    into v_relations, v_names, v_problems, v_again, v_all_hits
    from rekey._look(v_turn.search_id, v_turn.wanted) l;
    event := rekey._note_look(v_turn.search_id, v_reader, v_relations, v_names, v_problems, v_again, v_all_hits);
  end if;
end
$$;
comment on function rekey.search_step is
  'One step of the search that rekey.begin_search() or rekey.tick() began, in a transaction of its own, with the rights of whoever calls it: reads some blocks of a relation, or looks at everything in the end. event: read, unread (it may not read a relation), rewritten, again, looked, complete; waiting (for wait: detail says for whom); incomplete (what is left takes another role: rekey.search_findings); idle (there is nothing to do). 25001: not in READ COMMITTED.';
grant execute on function rekey.search_step to rekey_operator;

create or replace function rekey._search_on(begun timestamptz) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step record;
begin
  begin
    select s.* into v_step from rekey.search_step() s;
  exception when others then
    raise warning 'the search of the database: %', sqlerrm;
    return null;  -- the other duties are not to wait for it
  end;
  if v_step.event in ('complete', 'incomplete', 'idle') then
    return 'more';
  elsif v_step.event = 'waiting' and v_step.detail is not null and clock_timestamp() > begun + interval '2 s' or clock_timestamp() > begun + interval '20 s' then
    return null;
  end if;
  perform pg_sleep(extract(epoch from least(v_step.wait, interval '200 ms')));
  return 'search';
end
$$;
comment on function rekey._search_on is 'A step of the search as a part of rekey.tick(), for 20 seconds of it; where transactions have to end, 2. What comes next: search, more (the duty goes on), NULL (the next tick does).';
grant execute on function rekey._search_on to rekey_operator;

create or replace function rekey._search_advice(relation oid, role text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table record;
begin
  select n.nspname, c.relrowsecurity, pg_get_userbyid(c.relowner) as owner into v_table
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
  if not found or not exists (select from pg_roles r where r.rolname = role) then
    return null;
  elsif not has_schema_privilege(role, v_table.nspname, 'usage') then
    return format('GRANT USAGE ON SCHEMA %I TO %I; GRANT SELECT ON %s TO %2$I', v_table.nspname, role, relation::regclass);
  elsif not has_table_privilege(role, relation, 'select') then
    return format('GRANT SELECT ON %s TO %I', relation::regclass, role);
  elsif v_table.relrowsecurity and not (select r.rolbypassrls or r.rolsuper from pg_roles r where r.rolname = role) then
    return format('ALTER ROLE %I BYPASSRLS', role);
  end if;
  return null;
end
$$;
comment on function rekey._search_advice is 'What lets a role read a relation; NULL: nothing that could be granted.';
grant execute on function rekey._search_advice to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._search_problem(search_id bigint) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('%s relations were not searched, %s the first: %s, as %s. %s', count(*) over (), r.name, r.problem, r.role,
    coalesce(rekey._search_advice(r.relation, r.role) || ', or ', '') || 'have it read by another role: pg-rekey keys search')
  from rekey._search_relations r where r.search_id = _search_problem.search_id and r.problem is not null
  order by r.name limit 1;
end;
comment on function rekey._search_problem is 'What a search could not read, by which role, and what lets it; NULL: it could read everything so far.';

create or replace view rekey.search_status as
select case when s.incomplete_since is not null and s.state <> 'complete' then 'incomplete' else s.state end as state, s.scope, s.begun_at, s.completed_at,
  (select count(*) from rekey._search_versions v where v.search_id = s.id) as versions,
  r.relations_read, r.relations, r.bytes_read, r.bytes, r.not_read,
  (select count(distinct (f.keyring_id, f.version)) from rekey._search_finds f where f.search_id = s.id) as versions_found,
  case when s.state = 'looking' then rekey._with_ages(s.blocked_by, s.blocked_since) end as blocked_by, case when s.state = 'looking' then s.blocked_since end as blocked_since
from rekey._searches s
cross join lateral (
  select count(*) filter (where r.state <> 'pending' and r.problem is null) as relations_read, count(*) as relations,
    coalesce(sum(case when r.state <> 'pending' then r.bytes else r.bytes * least(r.next_block::numeric / greatest(r.blocks, 1), 1) end), 0)::bigint as bytes_read,
    coalesce(sum(r.bytes), 0)::bigint as bytes, count(*) filter (where r.problem is not null) as not_read
  from rekey._search_relations r where r.search_id = s.id) r;
comment on view rekey.search_status is 'The last search of the database for envelopes of versions that are to be destroyed, and how far it is. No row: there was none.';
comment on column rekey.search_status.state is 'reading (relations of some size, by turns), looking (waits for older transactions, then looks at everything in one snapshot), incomplete (what is left takes another role: rekey.search_findings), complete.';
comment on column rekey.search_status.scope is 'Where it looks: the setting destroy_search when it began.';
comment on column rekey.search_status.begun_at is 'When it began.';
comment on column rekey.search_status.completed_at is 'When it ended; NULL: it is under way.';
comment on column rekey.search_status.versions is 'Key versions that it looks for.';
comment on column rekey.search_status.relations_read is 'Relations that are read by turns, those that have been. (Small ones are left to the look.)';
comment on column rekey.search_status.relations is 'Relations that are read by turns, all.';
comment on column rekey.search_status.bytes_read is 'Their size, as far as they have been read.';
comment on column rekey.search_status.bytes is 'Their size.';
comment on column rekey.search_status.not_read is 'Relations that could not be read: rekey.search_findings.';
comment on column rekey.search_status.versions_found is 'Of the versions, those that it found.';
comment on column rekey.search_status.blocked_by is 'The transactions that it waits for: pid or name of a prepared transaction, role, age in seconds (of a pid, where who reads this may see it).';
comment on column rekey.search_status.blocked_since is 'Since when it waits for them.';
grant select on rekey.search_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.search_findings as
select r.name as relation, null::text as column_name, null::text as keyring, null::integer as version, null::bigint as rows, r.problem, r.role,
  coalesce(rekey._search_advice(r.relation, r.role) || ', or ', '') || format('have it read by another role, the owner or a superuser, with pg-rekey keys search') as advice
from rekey._search_relations r where r.problem is not null
union all
select f.relation_name, f.column_name::text, k.name, f.version, f.rows,
  'holds envelopes of the version', null, 'Protect the column and rotate the keyring, or delete these copies.'
from rekey._search_finds f join rekey.keyrings k on k.id = f.keyring_id;
comment on view rekey.search_findings is 'What keeps versions from being destroyed: relations that the last search could not read, and where it found envelopes.';
comment on column rekey.search_findings.relation is 'The table or materialized view.';
comment on column rekey.search_findings.column_name is 'The column that holds envelopes; NULL: the relation was not read.';
comment on column rekey.search_findings.keyring is 'Keyring of the version that was found.';
comment on column rekey.search_findings.version is 'The version.';
comment on column rekey.search_findings.rows is 'Rows in which it was found.';
comment on column rekey.search_findings.problem is 'What is wrong.';
comment on column rekey.search_findings.role is 'Role that could not read it.';
comment on column rekey.search_findings.advice is 'What to do.';
grant select on rekey.search_findings to rekey_admin, rekey_operator, rekey_auditor;

-- What a call that schedules a destruction says at once. It has no time for everything.
create or replace function rekey._look_ahead(header bytea) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set row_security = off
set standard_conforming_strings = on
set bytea_output = hex
set quote_all_identifiers = off
set constraint_exclusion = off
set lock_timeout = '3 s'
as $$
declare
  v_until timestamptz := clock_timestamp() + interval '2 s';
  v_to_look record;
  v_first bigint;
  v_blocks bigint;
  v_hits text;
  v_found boolean;
  v_problem text;
  v_unread text[] := '{}'::text[];
  v_left bigint := 0;
  v_bytes bigint := 0;
begin
  for v_to_look in select t.* from rekey._searchable() t order by t.bytes, t.relation loop
    if clock_timestamp() > v_until then
      v_left := v_left + 1;
      v_bytes := v_bytes + v_to_look.bytes;
      continue;
    end if;
    v_problem := v_to_look.problem;
    v_found := false;
    begin
      v_problem := coalesce(v_problem, rekey._hold(v_to_look.relation, v_to_look.name));
      v_blocks := case when v_to_look.is_heap then pg_relation_size(v_to_look.relation) / current_setting('block_size')::integer else 1 end;
      v_first := 0;
      while v_problem is null and v_first < v_blocks and not v_found and clock_timestamp() < v_until loop
        execute format('select r.hits from (%s) r', v_to_look.statement) into v_hits
        using array[header], format('(%s,0)', v_first)::tid, format('(%s,0)', v_first + 1024)::tid, null::xid;
        v_found := v_hits is not null;
        v_first := v_first + 1024;
      end loop;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;
      when others then v_problem := sqlerrm;
    end;
    if v_found then
      raise warning '% holds envelopes of the version: while it does, the version is not destroyed', v_to_look.name
        using hint = 'Protect the column and rotate the keyring, or delete these copies: rekey.protect_column().', constraint = 'protect_copies';
    elsif v_problem is not null then
      v_unread := v_unread || format('%s (%s)', v_to_look.name, v_problem);
    elsif v_first < v_blocks then
      v_left := v_left + 1;
      v_bytes := v_bytes + v_to_look.bytes;
    end if;
  end loop;
  if v_unread <> '{}' then
    raise warning '% cannot read % relations: while no role can that runs the worker, the version is not destroyed: %', current_user, cardinality(v_unread),
      array_to_string(v_unread[1:5], ', ') || case when cardinality(v_unread) > 5 then ', ...' else '' end;
  end if;
  if v_left > 0 then
    raise notice '% relations (%) are looked at when the time comes', v_left, pg_size_pretty(v_bytes)
      using hint = 'rekey.begin_search(), and rekey.search_step() until it says complete, look now.', constraint = 'search_now';
  end if;
end
$$;
comment on function rekey._look_ahead is 'Says in warnings where envelopes of this header are outside of protected columns, as far as 2 seconds and the rights of the caller go.';
grant execute on function rekey._look_ahead to rekey_admin;
