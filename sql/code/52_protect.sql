-- Registering and releasing columns. What needs the rights of the table's owner is done by the caller, who is one;
-- the registry and the schema rekey_targets are rekey_owner's.

create or replace function rekey._refuse_stranger(relation regclass) returns name
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
begin
  if v_owner is null or not pg_has_role(rekey._caller(), v_owner, 'usage') then
    raise exception 'only the owner of % may do this', relation using errcode = 'insufficient_privilege';
  end if;
  return v_owner;
end
$$;
comment on function rekey._refuse_stranger is 'The owner of a table. 42501 where the caller is not a member of it.';

-- SET ROLE would not do: code of the owner's can RESET it, and SESSION AUTHORIZATION too.
create or replace function rekey._refuse_superuser(relation regclass) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
  v_login name := (select a.usename from pg_stat_activity a where a.pid = pg_backend_pid());
  v_caller name := rekey._caller();
begin
  if exists (select from pg_roles r where r.rolname in (v_login, v_caller) and r.rolsuper)
    and not exists (select from pg_roles r where r.rolname = v_owner and r.rolsuper)
  then
    raise exception 'a superuser may not decrypt the rows of %', relation using errcode = 'insufficient_privilege',
      hint = format('Triggers, constraints and rules of the table would run as superuser. Connect as %I, with rekey_admin and rekey_app.', v_owner);
  end if;
end
$$;
comment on function rekey._refuse_superuser is '42501 where a session of a superuser would run the code of another who owns a table.';

-- (From the table to its guards: looking at every column's guard for its table takes long where there are many.)
create or replace function rekey._column_id(relation regclass, column_name name) returns integer
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.id
  from (
    select distinct substring(p.proname from '^column_(\d+)_guard$')::integer as id
    from pg_depend d
    join pg_proc p on p.oid = d.objid and p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d{1,9}_guard$'
    where d.refclassid = 'pg_class'::regclass and d.refobjid = relation and d.refobjsubid > 0 and d.classid = 'pg_proc'::regclass) g
  join rekey.protected_columns c on c.id = g.id
  cross join lateral rekey._column_shape(c.id) s
  join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[c.places[1]]
  where s.relation = _column_id.relation and a.attname = _column_id.column_name;
end;
comment on function rekey._column_id is 'The number of a protected column, by what it is called now; NULL where there is none.';

create or replace function rekey._context_expression(label text, names text[]) returns text
language sql stable
return quote_literal(rekey._part(label)::text) || '::bytea' || (
  select coalesce(string_agg(format(' || rekey._part(%%1$s.%s::text)', replace(c.name, '%', '%%')), '' order by c.rank), '')
  from unnest(names) with ordinality as c(name, rank));
comment on function rekey._context_expression is 'The context of a row in a trigger, with a place (%1$s) for new or old. names: its context columns, quoted.';

create or replace function rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[];
  v_context text;
begin
  if protected.index_place is not null then
    return rekey._index_trigger_body(protected, relation, attnums);
  end if;
  select array_agg(quote_ident(a.attname) order by p.rank) into v_names
  from unnest(protected.places) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = relation and a.attnum = attnums[p.place];
  v_context := rekey._context_expression(protected.label, v_names[2:]);
  return format($body$
declare
  v_envelope bytea;
  v_plaintext bytea;
  v_length integer;
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
begin
  if not rekey._is_unchanged(%7$s, %8$L, tg_name, tg_relid) then
    perform rekey._refuse_other_table(%7$s, tg_relid);
    perform rekey._refuse_renamed(%7$s, %8$L);
    perform rekey._refuse_later_trigger(tg_name, tg_relid);
  end if;
  if new.%1$s is null then
    return new;
  end if;
  v_context := %2$s;
  v_envelope := rekey._envelope_of(new.%1$s);
  -- What a subscription applies was sealed, and checked, where it was written.
  if v_envelope is not null and current_setting('session_replication_role') = 'replica' and rekey._is_of_known_version(v_envelope) then
    return new;
  end if;
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%9$s then
    -- A value that is not adopted yet may be encrypted by other means: the trigger does not take it for plaintext.
    if v_envelope is null or v_context = %3$s then
      return new;
    end if;
    v_plaintext := rekey._open(v_envelope, %3$s);
  elsif v_envelope is null then
    v_plaintext := %4$s;
  else
    -- An envelope that comes in must be of this row. (What a sweep writes, the engine has made of the row itself.)
    if not rekey.is_sweeping(tg_relid) then
      perform rekey._refuse_foreign(v_envelope, v_context);
    end if;
    return new;
  end if;
  v_length := octet_length(v_plaintext);
  v_sealing := rekey._sealing_on_write(%5$s, v_length);
  if v_sealing.key is null then
    return new;
  end if;
  v_iv := rekey._random_bytes(16);
  v_aad := v_sealing.header || v_context;
  v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_plaintext, v_aad);
  new.%1$s := %6$s;
  return new;
end
$body$, v_names[1], format(v_context, 'new'), format(v_context, 'old'),
    case when protected.is_text then format('convert_to(new.%s, ''UTF8'')', v_names[1]) else 'new.' || v_names[1] end,
    protected.keyring_id, case when protected.is_text then 'rekey._to_text(v_envelope)' else 'v_envelope' end,
    protected.id, (select array_agg(a.attname order by a.attnum) from pg_attribute a where a.attrelid = relation and a.attnum = any (attnums)),
    case when protected.is_text then ' collate "C"' end);
end
$$;
comment on function rekey._write_trigger_body is
  'Body of the trigger that encrypts a column on write. It calls the columns by name, since values must not be parameters of a statement.';

-- Triggers fire in the order of their names: what changes the row after ours would have the value sealed for a row that never is.
create or replace function rekey._later_trigger(name text, relation oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgname::text from pg_trigger t
  -- 1: for each row, 2: before, 4 and 16: insert, update
  where t.tgrelid = relation and t.tgname > _later_trigger.name::name and t.tgtype::integer & 3 = 3 and t.tgtype::integer & 20 <> 0 and t.tgenabled <> 'D'
    and t.tgname !~ '^zz_pg_rekey_\d+(_insert|_update|_look)?$'
  order by t.tgname limit 1;
end;
comment on function rekey._later_trigger is 'A trigger of a relation that may change a row after the trigger of this name; NULL: there is none.';

create or replace function rekey._refuse_later_trigger(name text, relation oid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_later text := rekey._later_trigger(name, relation);
begin
  if v_later is not null then
    raise exception 'trigger % of % may change a row after its value was sealed for it', quote_ident(v_later), relation::regclass using errcode = 'RK005',
      hint = format('BEFORE triggers fire in the order of their names: ALTER TRIGGER %I ON %s RENAME TO a name that sorts before %s.', v_later, relation::regclass, name);
  end if;
end
$$;
comment on function rekey._refuse_later_trigger is 'RK005 where a trigger may change a row after the trigger of this name, which seals a value for it.';

create or replace function rekey._is_of_known_version(envelope bytea) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._is_envelope(envelope) and exists (
    select from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7) and k.state <> 'destroyed');
end
$$;
comment on function rekey._is_of_known_version is 'Whether an envelope names a key version that there is.';

create or replace function rekey._sealing_on_write(keyring_id integer, bytes integer) returns rekey._sealing
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription text;
begin
  if current_setting('session_replication_role') <> 'replica' then
    return rekey._sealing(keyring_id, bytes);
  end if;
  begin
    return rekey._sealing(keyring_id, bytes);
  exception when sqlstate 'RK001' then
    select format('subscription %s', quote_ident(s.subname)) into v_subscription from pg_stat_subscription s where s.pid = pg_backend_pid();
    v_subscription := coalesce(v_subscription, 'a session in the replica role');
    if (rekey._settings()).apply_plaintext = 'pass' then
      raise warning '% stores a plain value in a protected column: there is no KEK to seal it with', v_subscription;
      return null;
    end if;
    raise exception '% brings a plain value for a protected column, and there is no KEK to seal it with', v_subscription using errcode = 'RK001',
      hint = 'Give the server a KEK (provider file or vault), protect the column where the value comes from, or let plain values pass: rekey.set_setting(''apply_plaintext'', ''pass'').',
      constraint = 'apply_plaintext';
  end;
end
$$;
comment on function rekey._sealing_on_write is
  'rekey._sealing() for the trigger that encrypts. In the replica role, without the KEK: RK001 that names the subscription; or, where the setting apply_plaintext lets it pass, a warning and NULL.';

-- Asked by WHEN conditions, with the rights of whoever writes. They follow a column that is renamed.
create or replace function rekey._is_scheduled(header bytea) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_keyring integer;
  v_version integer;
begin
  if octet_length(header) = 11 and substr(header, 1, 3) = '\x524b01'::bytea then
    v_keyring := rekey._int4(header, 3);
    v_version := rekey._int4(header, 7);
    return exists (
      select from rekey.encryption_keys k
      where k.keyring_id = v_keyring and k.version = v_version and k.state = 'destroy_scheduled');
  end if;
  return false;
end
$$;
comment on function rekey._is_scheduled is 'Whether it is the header of an envelope of a version that is scheduled for destruction.';

-- What is written may be plain, and must not become the parameter of a statement: these two are inlined, as rekey.encrypt_text() is.
create or replace function rekey._is_doomed(value bytea) returns boolean
language sql volatile
return rekey._may_be_doomed() and rekey._is_scheduled(substr(value, 1, 11));
comment on function rekey._is_doomed(bytea) is 'Whether a value is an envelope of a version that is scheduled for destruction.';

create or replace function rekey._is_doomed(value text) returns boolean
language sql volatile
return rekey._may_be_doomed() and rekey._is_scheduled(
  case when left(value, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}' then substr(decode(right(left(value, 20), -4), 'base64'), 1, 11) end);
comment on function rekey._is_doomed(text) is 'As for bytea, of the text form.';

create or replace function rekey._refuse_doomed() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'the value stands on a key version that is scheduled for destruction' using errcode = 'RK006',
    hint = 'Encrypt it anew. Who needs the old one cancels the destruction: rekey.cancel_key_destruction().', constraint = 'cancel_destruction';
end
$$;
comment on function rekey._refuse_doomed is 'Trigger of every protected column, under the condition rekey._is_doomed(): RK006. So nothing comes to stand on a version whose destruction is scheduled.';

create or replace function rekey.is_sweeping(relation regclass) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  -- The setting saves the look; it proves nothing, since anybody can make it.
  return coalesce(current_setting('rekey.sweeping', true), '') = 'on' and exists (
    select from rekey._sweeping s
    where s.transaction = pg_current_xact_id_if_assigned()
      and (s.relation = is_sweeping.relation or exists (select from pg_partition_ancestors(s.relation) a where a.relid = is_sweeping.relation)));
end
$$;
comment on function rekey.is_sweeping is
  'Whether it is a rotation that writes into this table now: for the triggers of a table that are to let it pass, WHEN (NOT rekey.is_sweeping(''schema.table'')). relation: the table; of a partition, the partitioned table will do. Nobody but a rotation can make it true. No errors.';

-- The trigger runs as rekey_owner, and casts what it finds under the names of the context columns to text: on a table with a
-- column of another type, that would be a function of whoever made the type.
create or replace function rekey._refuse_other_table(id integer, relation oid) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table oid := (rekey._column_shape(id)).relation;
begin
  if v_table is null or relation <> v_table and not exists (select from pg_partition_ancestors(relation) a where a.relid = v_table) then
    raise exception '% is not the table that this trigger encrypts', relation::regclass using errcode = 'RK005',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) makes the trigger of a table.', constraint = 'encrypt_on_write';
  end if;
end
$$;
comment on function rekey._refuse_other_table is 'RK005 where the trigger that encrypts a column on write was set on a table that is not its own.';

-- The types too: whoever owns the guard can make another one, over a table with the same names.
create or replace function rekey._refuse_renamed(id integer, names name[]) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if names is distinct from (
       select array_agg(a.attname order by a.attnum)
       from rekey._column_shape(id) s join pg_attribute a on a.attrelid = s.relation and a.attnum = any (s.attnums)
       where (select t.typnamespace from pg_type t where t.oid = a.atttypid) = 'pg_catalog'::regnamespace) then
    raise exception 'a column that pg_rekey encrypts, or that values are bound to, was renamed' using errcode = 'RK005',
      hint = 'Repeat rekey.protect_column(..., encrypt_on_write => true) as the owner of the table.', constraint = 'encrypt_on_write';
  end if;
end
$$;
comment on function rekey._refuse_renamed is 'RK005 where the columns of a protected column are not called so any more, in table order, or have a type of the user''s: another column may have taken the name.';

-- The three together, in one query, since they are asked for each row. What it does not know is for them to decide.
create or replace function rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off  -- as rekey._column_shape()
as $$
declare
  v_names name[];
  v_later boolean;
begin
  select
    array(
      select a.attname
      from pg_depend d
      join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid and a.atttypid < 16384  -- a type of PostgreSQL's own
      where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure('rekey_targets.column_' || id || '_guard()')
        and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
        and (d.refobjid = _is_unchanged.relation or exists (select from pg_partition_ancestors(_is_unchanged.relation) p where p.relid = d.refobjid))
      order by a.attnum),
    exists (
      -- As rekey._later_trigger(). What only refuses a row does not change it.
      select from pg_trigger t
      where t.tgrelid = _is_unchanged.relation and t.tgname > trigger_name and t.tgtype::integer & 3 = 3 and t.tgtype::integer & 20 <> 0
        and t.tgenabled <> 'D' and t.tgfoid <> 'rekey._refuse_doomed()'::regprocedure and t.tgname !~ '^zz_pg_rekey_\d+(_look)?$')
  into v_names, v_later;
  return v_names = names and not v_later;
end
$$;
comment on function rekey._is_unchanged is
  'Whether a row may be sealed by the trigger of this name: neither rekey._refuse_other_table() nor _refuse_renamed() nor _refuse_later_trigger() would raise. false: one of them may.';

-- Inlined: what is written may be plain, and must not become the parameter of a statement.
create or replace function rekey._envelope_of(value bytea) returns bytea
language sql immutable parallel safe
return case when substr(value, 1, 3) = '\x524b01'::bytea then value end;
comment on function rekey._envelope_of(bytea) is 'A value that means to be an envelope; NULL for any other.';

create or replace function rekey._envelope_of(value text) returns bytea
language sql immutable parallel safe
return case when left(value, 4) collate "C" = 'rk1:' then coalesce(rekey._from_text(value), ''::bytea) end;
comment on function rekey._envelope_of(text) is 'As for bytea, of its text form; empty where that is damaged.';

-- Until the transaction ends, the version stays in use: what was held back and is stored now must not lose its key.
create or replace function rekey._open_incoming(envelope bytea, context bytea) returns bytea
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if rekey._is_envelope(envelope) then
    -- Of a version that there is: else an envelope that was made up would hold any lock.
    perform pg_advisory_xact_lock_shared(k.keyring_id, k.version)
    from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7);
    perform rekey._refuse_old_snapshot(array[rekey._int4(envelope, 3)], array[rekey._int4(envelope, 7)]);
  end if;
  return rekey._open(envelope, context);
end
$$;
comment on function rekey._open_incoming is 'Plaintext of an envelope that a client stores, whose version stays in use until the transaction ends. RK003: it does not open in this context; RK006: its key may not be used.';

create or replace function rekey._refuse_foreign(envelope bytea, context bytea) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea := rekey._open_incoming(envelope, context);
begin
  if v_plaintext is null then
    raise exception 'cannot open ciphertext' using errcode = 'RK003';
  end if;
end
$$;
comment on function rekey._refuse_foreign is 'RK003 where an envelope does not open in this context, RK006 where its key may not be used.';

create or replace function rekey._function_statements(protected rekey.protected_columns, owner name) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
begin atomic
  select array_agg(s.statement order by b.name, s.place)
  from rekey._column_bodies(protected) b
  cross join lateral (values
    (1, format('create function rekey_targets.%I(%s) returns %s language plpgsql %s security definer set search_path = pg_catalog, pg_temp as %L',
          b.name, b.arguments, b.result, b.volatility, b.body)),
    (2, format('revoke all on function rekey_targets.%I from public', b.name)),
    (3, format('grant execute on function rekey_targets.%I to rekey_sweeper', b.name)),
    (4, format('alter function rekey_targets.%I owner to %I', b.name, owner))) as s(place, statement);
end;
comment on function rekey._function_statements is 'The statements that make the functions of rekey._column_bodies().';

create or replace function rekey._trigger_statement(id integer, body text) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return format('create or replace function rekey_targets.column_%s_trigger() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as %L', id, body);
comment on function rekey._trigger_statement is 'The statement that makes the trigger function of a protected column.';

create or replace function rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) returns text[]
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = target);
  v_guard text := format('rekey_targets.column_%s_guard()', protected.id);
  v_column text;
  v_function regprocedure;
  v_name name;
  v_statements text[];
begin
  for v_function in
    select p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any ((rekey._function_names('column_' || protected.id))[:6])
  loop
    execute format('drop function %s', v_function);
  end loop;
  -- To be given a function, a role needs CREATE on its schema, for that moment (rekey._finish_column).
  execute format('grant usage on schema rekey_targets to %I', v_owner);
  execute format('grant create on schema rekey_targets to %I, %I', v_owner, rekey._caller());
  select format('%I', a.attname) into v_column from pg_attribute a where a.attrelid = target and a.attnum = attnums[protected.places[1]];
  v_statements := array[
    format('create function %s returns setof record language sql stable begin atomic select %s from only %s t; end', v_guard,
      (select string_agg(format('t.%I', a.attname), ', ' order by p.rank) from unnest(protected.places || protected.index_place) with ordinality as p(place, rank)
       join pg_attribute a on a.attrelid = target and a.attnum = attnums[p.place]), target),
    format('comment on function %s is %L', v_guard, format('Keeps %s, which pg_rekey protects: rekey.unprotect_column() lets go of it.', protected.label)),
    format('revoke all on function %s from public', v_guard),
    format('alter function %s owner to %I', v_guard, v_owner)];
  v_statements := v_statements || rekey._function_statements(protected, v_owner);
  -- A sealed value goes through these too: they come after the one that seals.
  v_statements := v_statements || array[
    format('create or replace trigger zz_pg_rekey_%s_insert before insert on %s for each row when (rekey._is_doomed(new.%s)) execute function rekey._refuse_doomed()',
      protected.id, target, v_column),
    format('create or replace trigger zz_pg_rekey_%s_update before update on %s for each row when (new.%3$s is distinct from old.%3$s and rekey._is_doomed(new.%3$s)) execute function rekey._refuse_doomed()',
      protected.id, target, v_column)];
  if protected.encrypt_on_write then
    execute rekey._trigger_statement(protected.id, rekey._write_trigger_body(protected, target, attnums));
    execute format('revoke all on function rekey_targets.column_%s_trigger from public', protected.id);
    execute format('grant execute on function rekey_targets.column_%s_trigger to %I', protected.id, v_owner);
    v_statements := v_statements || format(
      'create or replace trigger zz_pg_rekey_%s before insert or update on %s for each row execute function rekey_targets.column_%1$s_trigger()', protected.id, target);
  elsif exists (select from pg_trigger t where t.tgrelid = target and t.tgname = format('zz_pg_rekey_%s', protected.id)) then
    v_statements := v_statements || format('drop trigger zz_pg_rekey_%s on %s', protected.id, target);
  end if;
  v_statements := v_statements || rekey._index_statements(protected, target, attnums);
  -- In the replica role too, in which subscriptions apply what they get.
  foreach v_name in array rekey._trigger_names(protected) loop
    v_statements := v_statements || format('alter table %s enable always trigger %I', target, v_name);
  end loop;
  return v_statements;
end
$$;
comment on function rekey._column_statements is
  'Drops the functions of a protected column, and returns the statements with which the owner of the table makes them and the triggers, for this table.';

create or replace function rekey._index_column(protected rekey.protected_columns) returns name
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce((
    select a.attname from rekey._column_shape(protected.id) s
    join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[protected.index_place]), protected.index_column);
end
$$;
comment on function rekey._index_column is 'The name of the column with the blind index of a protected column, now; NULL: it has none.';

create or replace function rekey._column_places(
  target regclass, names name[], index_column name, out attnums smallint[], out places integer[], out index_place integer
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select array_agg(a.attnum order by a.attnum) into attnums
  from pg_attribute a where a.attrelid = target and a.attname = any (names || index_column) and a.attnum > 0;
  places := array(
    select array_position(attnums, a.attnum)
    from unnest(names) with ordinality as c(name, rank)
    join pg_attribute a on a.attrelid = target and a.attname = c.name
    order by c.rank);
  select array_position(attnums, a.attnum) into index_place
  from pg_attribute a where a.attrelid = target and a.attname = _column_places.index_column;
end
$$;
comment on function rekey._column_places is 'The numbers of the columns that a guard names, in table order, and the ranks among them of a protected column and its context (names), and of its blind index.';

create or replace function rekey._refuse_path(search_path text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp  -- again, when it ends
as $$
begin
  if search_path is null then
    raise exception 'search_path is NULL' using errcode = 'invalid_parameter_value', hint = 'Left out, it is that of the session.';
  end if;
  perform set_config('search_path', search_path, true);
end
$$;
comment on function rekey._refuse_path is '22023 where this is no search path.';

-- Executable by administrators because rekey.protect_column() runs with its caller's rights.
create or replace function rekey._register_column(
  target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text,
  out id integer, out statements text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- names are kept, and found, as %I writes them
as $$
declare
  v_owner name := rekey._refuse_stranger(target);
  v_keyring rekey.keyrings := rekey._keyring(keyring);
  v_table record;
  v_attribute pg_attribute;
  v_context name[] := context_columns;
  v_attnums smallint[];
  v_places integer[];
  v_id integer;
  v_protected rekey.protected_columns;
  v_found record;
  v_name name;
  v_problem text;
begin
  perform rekey._refuse_path(search_path);
  -- One at a time: what is lent to one caller, the end of another would take back.
  perform pg_advisory_xact_lock(0, 3);
  perform rekey._check_tenant(v_keyring.tenant_id);
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
  end if;
  select c.relkind, c.relpersistence, n.nspname, c.relname into v_table
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  if v_table.relkind not in ('r', 'p') or v_table.relpersistence = 't' or v_table.nspname ~ '^(pg_|rekey(_targets)?$|information_schema$)' then
    raise exception '% is no table whose columns can be protected', target using errcode = 'invalid_parameter_value',
      hint = 'An ordinary or partitioned table, neither temporary nor of the system.';
  end if;
  v_problem := (select min(rekey._storage_problem(r.relation)) from (select target as relation union select h from rekey._relations_here(target) h) r);
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'invalid_parameter_value', hint = 'Protect a column of a table whose rows are here.';
  end if;
  if exists (select from pg_inherits i join pg_class c on c.oid = i.inhparent where i.inhrelid = target and c.relkind = 'p') then
    raise exception '% is a partition', target using errcode = 'invalid_parameter_value', hint = 'Protect the column of the partitioned table.';
  elsif v_table.relkind = 'r' and exists (select from pg_inherits i where i.inhparent = target) then
    raise exception '% has children by inheritance', target using errcode = 'invalid_parameter_value',
      hint = 'Make them partitions, or tables of their own.';
  end if;
  select * into v_attribute from pg_attribute a
  where a.attrelid = target and a.attname = _register_column.column_name and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception '% has no column %', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'undefined_column',
      hint = coalesce((
        select format('There is %s. A column is named as it is, without quotes.', string_agg(quote_ident(a.attname), ', ' order by a.attnum))
        from pg_attribute a
        where a.attrelid = target and a.attnum > 0 and not a.attisdropped and lower(a.attname) = lower(replace(column_name, '"', ''))
        having count(*) > 0),
        'A column is named as it is, with its capitals, and without quotes.');
  elsif v_attribute.attgenerated <> '' then
    raise exception 'column %.% is generated', target, quote_ident(column_name) using errcode = 'invalid_parameter_value',
      hint = 'Nothing but its expression writes it: protect the column that it is computed from.';
  elsif v_attribute.atttypid not in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) then
    raise exception 'column %.% has the type %', target, quote_ident(column_name), format_type(v_attribute.atttypid, v_attribute.atttypmod)
      using errcode = 'invalid_parameter_value', hint = 'A protected column is bytea or text.';
  end if;

  if cardinality(v_context) = 0 then
    raise exception 'context_columns is empty' using errcode = 'invalid_parameter_value',
      hint = 'Name what rows are told apart by: a value could be moved to any other row. NULL, the default, takes the primary key.', constraint = 'context';
  end if;
  if v_context is null then
    select array_agg(a.attname order by k.rank) into v_context
    from pg_index i
    cross join lateral unnest(i.indkey::smallint[]) with ordinality as k(attnum, rank)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where i.indrelid = target and i.indisprimary;
    if not found or v_context is null then
      raise exception '% has no primary key', target using errcode = 'invalid_parameter_value',
        hint = 'Name in context_columns what its rows are told apart by: columns that do not change.', constraint = 'context';
    end if;
    if exists (
         select from pg_attribute a where a.attrelid = target and a.attname = any (v_context) and (a.atthasdef or a.attidentity <> ''))
       and exists (select from pg_index i where i.indrelid = target and i.indisunique and not i.indisprimary) then
      if encrypt_on_write then
        raise exception 'the primary key of % has a default, and another key is unique', target using errcode = 'invalid_parameter_value',
          hint = 'INSERT ... ON CONFLICT (other key) DO UPDATE would store a value that is bound to a row that never was. Name that other key in context_columns.', constraint = 'context_of_conflict';
      end if;
      -- Said before any value is bound to it: context stays.
      raise warning 'encrypt_on_write will be refused with this context: the primary key of % has a default, and another key is unique', target
        using hint = 'If a trigger is to encrypt what is written, name that other key in context_columns now, before values are bound to the primary key.', constraint = 'context_of_trigger';
    end if;
  end if;
  foreach v_name in array v_context loop
    if v_name = column_name or (select count(*) from unnest(v_context) c where c = v_name) > 1 or not exists (
         select from pg_attribute a
         where a.attrelid = target and a.attname = v_name and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
           and a.atttypid in ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'uuid'::regtype, 'text'::regtype, 'varchar'::regtype, 'boolean'::regtype)) then
      raise exception 'column % cannot be part of the context', coalesce(quote_literal(v_name), 'NULL') using errcode = 'invalid_parameter_value',
        hint = 'Context columns are other columns, each once, of type integer, uuid, text, varchar or boolean, and not generated.';
    end if;
  end loop;
  for v_found in select * from rekey._column_findings(target, v_attribute.attnum, fire_triggers, search_path) f order by f.fatal desc loop
    if v_found.fatal then
      raise exception 'column %.% cannot be protected: %', target, column_name, v_found.finding using errcode = 'invalid_parameter_value', hint = v_found.advice;
    end if;
    raise warning '%', v_found.finding using hint = v_found.advice, constraint = coalesce(v_found.action, '');
  end loop;

  if encrypt_on_write then
    select rekey._later_trigger('zz_pg_rekey_', r.relation), r.relation into v_found
    from (select target as relation union select h from rekey._relations_here(target) h) r
    where rekey._later_trigger('zz_pg_rekey_', r.relation) is not null limit 1;
    if found then
      perform rekey._refuse_later_trigger('zz_pg_rekey_', v_found.relation);
    end if;
  end if;

  -- Repeated, for the same column or after its functions were lost, it makes them anew.
  v_id := rekey._column_id(target, _register_column.column_name);
  select * into v_protected from rekey.protected_columns c
  where c.id = v_id
     or c.relation_name = format('%I.%I', v_table.nspname, v_table.relname) and c.column_name = _register_column.column_name and (rekey._column_shape(c.id)).relation is null
  for update;
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_protected.index_place
  from rekey._column_places(target, _register_column.column_name || v_context, rekey._index_column(v_protected)) s;
  if v_protected.index_column is not null and not encrypt_on_write then
    raise exception 'column %.% is searchable, and takes the trigger that encrypts', target, quote_ident(column_name) using errcode = 'RK006',
      hint = 'encrypt_on_write => true keeps it.', constraint = 'encrypt_on_write';
  end if;
  -- Whoever makes a table of that name anew must not get at the values of another.
  if v_protected.id is not null and (rekey._column_shape(v_protected.id)).relation is null and v_protected.owner <> v_owner
     and not (select r.rolsuper from pg_roles r where r.rolname = rekey._caller()) then
    raise exception '%.% was protected as a column of %', target, column_name, v_protected.owner using errcode = 'insufficient_privilege',
      hint = 'That role is to own it, or a superuser calls this.';
  end if;
  if v_protected.id is not null and (v_protected.keyring_id <> v_keyring.id or v_protected.places <> v_places
      or (select s.attnums from rekey._column_shape(v_protected.id) s) <> v_attnums) then
    raise exception 'column %.% is protected already, in another way', target, column_name using errcode = 'RK006',
      hint = 'See rekey.column_status. Keyring and context columns, and their order, stay: the values are bound to them.', constraint = 'keep_context';
  end if;
  if v_protected.id is null then
    v_protected.label := format('%I.%I.%I', v_table.nspname, v_table.relname, column_name);
    begin
      insert into rekey.protected_columns
        (label, keyring_id, relation_name, column_name, context_columns, places, is_text, encrypt_on_write, fire_triggers, search_path, owner)
      values (v_protected.label, v_keyring.id, format('%I.%I', v_table.nspname, v_table.relname), _register_column.column_name, v_context, v_places,
        v_attribute.atttypid <> 'bytea'::regtype, _register_column.encrypt_on_write, _register_column.fire_triggers, _register_column.search_path, v_owner)
      returning * into v_protected;
    exception when unique_violation then
      raise exception 'the label % is taken, by a table that was called so', v_protected.label using errcode = 'unique_violation',
        hint = 'Where this table holds its values now: rekey.rebind_column(). See rekey.column_status.', constraint = 'rebind';
    end;
  else
    if v_protected.encrypt_on_write and not _register_column.encrypt_on_write then
      raise warning 'from now on, what is written into %.% is not encrypted', target, quote_ident(column_name)
        using hint = 'encrypt_on_write => true keeps the trigger that encrypts it.', constraint = 'encrypt_on_write';
    end if;
    if _register_column.fire_triggers and not v_protected.fire_triggers then
      raise warning 'from now on, rotations fire the triggers of %', target
        using hint = 'fire_triggers => false keeps them from it.', constraint = 'fire_triggers';
    end if;
    if _register_column.search_path <> v_protected.search_path then
      raise warning 'from now on, what rotations of %.% fire runs with search_path = %, and no longer with %',
        target, quote_ident(column_name), _register_column.search_path, v_protected.search_path
        using hint = 'search_path => ''...'' gives another.', constraint = 'search_path';
    end if;
    update rekey.protected_columns c
    set encrypt_on_write = _register_column.encrypt_on_write, fire_triggers = _register_column.fire_triggers,
      search_path = _register_column.search_path, owner = v_owner, index_place = v_protected.index_place
    where c.id = v_protected.id returning * into v_protected;
  end if;
  id := v_protected.id;

  statements := rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._register_column is 'What rekey.protect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._register_column to rekey_admin;

create or replace function rekey._finish_column(id integer) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_problem text;
  v_role name;
begin
  for v_role in
    select distinct pg_get_userbyid(a.grantee) from pg_namespace n, aclexplode(n.nspacl) a
    where n.nspname = 'rekey_targets' and a.privilege_type = 'CREATE' and a.grantee not in (0, n.nspowner)
  loop
    execute format('revoke create on schema rekey_targets from %I', v_role);
  end loop;
  select * into v_protected from rekey.protected_columns c where c.id = _finish_column.id;
  if not found then
    return null;
  end if;
  v_problem := rekey._column_problem(v_protected);
  if v_problem is not null then
    raise exception '% cannot be protected: %', v_protected.label, v_problem using errcode = 'RK005';
  end if;
  perform rekey._note_names(id);
  -- Small, and without an envelope: that is its first complete count. Else the first verification makes it.
  if v_protected.seen is null
     and (select coalesce(sum(pg_relation_size(t.relation)), 0) from rekey._targets(v_protected.label) t) < 33554432
     and not exists (select from rekey._count_rows(rekey._targets_now(v_protected.label), null) c where c.keyring_id is not null) then
    update rekey.protected_columns c set seen = '{}' where c.id = v_protected.id;
  end if;
  if not v_protected.encrypt_on_write and to_regproc(format('rekey_targets.column_%s_trigger', id)) is not null then
    execute format('drop function rekey_targets.column_%s_trigger()', id);
  end if;
  -- The audit log last, as everywhere; and once.
  if v_protected.created_at = now() then
    perform rekey._audit('column.protected', rekey._keyring_name(v_protected.keyring_id), details => jsonb_build_object(
      'column', v_protected.label, 'context_columns', v_protected.context_columns, 'encrypt_on_write', v_protected.encrypt_on_write,
      'fire_triggers', v_protected.fire_triggers, 'search_path', v_protected.search_path));
  end if;
  return v_protected.label;
end
$$;
comment on function rekey._finish_column is 'Takes back what rekey._register_column() lent, and checks what was made. RK005: the column cannot be swept.';
grant execute on function rekey._finish_column to rekey_admin;

create or replace function rekey.protect_column(
  target regclass, column_name name, keyring text = 'default', context_columns name[] = null, encrypt_on_write boolean = false,
  fire_triggers boolean = true, search_path text = current_setting('search_path')  -- evaluated by the caller, in his
) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_made record;
  v_statement text;
begin
  select * into v_made from rekey._register_column(
    target, column_name, keyring, context_columns, coalesce(encrypt_on_write, false), coalesce(fire_triggers, true), search_path);
  foreach v_statement in array v_made.statements loop
    execute v_statement;
  end loop;
  return rekey._finish_column(v_made.id);
end
$$;
comment on function rekey.protect_column is
  'Puts a bytea or text column under rotation, and returns its label: the values are bound to (label, context columns as text), so rekey.decrypt(value, array[label, id::text]) opens them. The owner of the table calls it, as a member of rekey_admin, or a superuser. context_columns: what tells rows apart and does not change; NULL: the primary key. encrypt_on_write: a trigger encrypts what is written, and refuses envelopes of other rows; a value that an update leaves as it is waits for rekey.adopt_column(). fire_triggers: whether the triggers and rules of the table see what a rotation or an adoption writes; false takes a right of the owner of the table: GRANT SET ON PARAMETER session_replication_role. search_path: with which they run meanwhile; left out, it is that of the session that calls. What envelopes break, and where encrypt_on_write will need other context columns, comes as warnings. Repeated, it makes the column''s functions anew. It encrypts nothing that is there: rekey.adopt_column() does. 22023: column, context, table or search path cannot be; 23505: the label is taken; 42501: not the owner; 42703: no such column; RK005: a forced policy, a foreign partition, triggers cannot be kept from firing; RK006: protected already, in another way; RK007: no such keyring.';
grant execute on function rekey.protect_column to rekey_admin;

create or replace function rekey._refuse_encrypted(protected rekey.protected_columns) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows bigint;
begin
  perform rekey._refuse_snapshot();
  select sum(c.rows) into v_rows
  from rekey._count_rows(rekey._targets_now(protected.label), null) c
  where c.keyring_id is not null;
  if v_rows > 0 then
    raise exception '% rows of % are encrypted', v_rows, protected.label using errcode = 'RK005',
      hint = 'decrypt => true decrypts them, some at each call: --decrypt of pg-rekey columns unprotect. Rows that stay are locked by a session, or kept by a trigger.', constraint = 'decrypt_rows';
  end if;
end
$$;
comment on function rekey._refuse_encrypted is 'RK005 where a protected column holds envelopes; 25001 outside READ COMMITTED.';

create or replace function rekey._end_adoptions(column_id integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey.rotations r
  set state = 'superseded', finished_at = now(), in_line = false, pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.column_id = _end_adoptions.column_id and rekey._is_under_way(r.state);
end
$$;
comment on function rekey._end_adoptions is 'Ends the adoption of a column that is in line or, where its table is gone, under way.';

create or replace function rekey._release_column(target regclass, column_name name, decrypt boolean, out id integer, out statements text[])
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_names text[];
  v_rotation bigint;
begin
  perform rekey._refuse_stranger(target);
  id := rekey._column_id(target, column_name);
  select * into v_protected from rekey.protected_columns c where c.id = _release_column.id for update;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
  select r.id into v_rotation from rekey.rotations r where r.column_id = _release_column.id and rekey._is_under_way(r.state) and not r.in_line;
  if found then
    raise exception '% is being adopted, by rotation %', v_protected.label, v_rotation using errcode = 'RK004';
  end if;
  perform rekey._end_adoptions(id);
  update rekey.protected_columns c set encrypt_on_write = false where c.id = v_protected.id;  -- its triggers go
  update rekey._blind_indexes b set filled = false, refill = true, refill_by = null where b.column_id = v_protected.id;
  if not decrypt then
    perform rekey._refuse_encrypted(v_protected);
  else
    perform rekey._refuse_superuser(target);
    select array_agg(quote_ident(a.attname) order by p.rank) into v_names
    from rekey._column_shape(id) s
    cross join lateral unnest(v_protected.places || v_protected.index_place) with ordinality as p(place, rank)
    join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.place];
    statements := array(
      select format(
        'with due as materialized (select t.ctid as row from only %1$s t where %2$s limit 5000 for no key update skip locked)
         update only %1$s t set %3$s = rekey.%4$s(t.%3$s, array[%5$L%6$s], (select rekey.reading_pass(%5$L)))%7$s from due where t.ctid = due.row',
        t.relation,
        -- What rekey._refuse_encrypted() counts: a plain value that begins alike is none.
        format(case when v_protected.is_text then $sql$left(t.%s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$sql$
          else $sql$substr(t.%1$s, 1, 3) = '\x524b01' and octet_length(t.%1$s) >= 11$sql$ end, v_names[1]),
        v_names[1], case when v_protected.is_text then 'decrypt_text' else 'decrypt' end, v_protected.label,
        (select string_agg(format(', t.%s::text', c), '') from unnest(v_names[2:cardinality(v_protected.places)]) c),
        case when v_protected.index_place is not null then format(', %s = null', v_names[cardinality(v_names)]) end)
      from rekey._targets(v_protected.label) t);
  end if;
end
$$;
comment on function rekey._release_column is 'What rekey.unprotect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._release_column to rekey_admin;

create or replace function rekey._forget_column(id integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_protected rekey.protected_columns;
  v_shape record;
  v_function regprocedure;
begin
  select * into v_protected from rekey.protected_columns c where c.id = _forget_column.id for update;
  if not found then
    raise exception 'no such protected column' using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  select * into v_shape from rekey._column_shape(id) s;
  if v_shape.relation is not null then
    perform rekey._refuse_stranger(v_shape.relation);
    perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
    perform rekey._refuse_encrypted(v_protected);
  elsif exists (select from pg_attribute a
                join pg_class c on c.oid = a.attrelid
                join pg_namespace n on n.oid = c.relnamespace
                where format('%I.%I', n.nspname, c.relname) = v_protected.relation_name
                  and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped) then
    raise exception 'the table of % is there, without its functions', v_protected.label using errcode = 'RK006',
      hint = format('Its rows may be encrypted: rekey.protect_column(%L, %L%s) makes the functions anew.', v_protected.relation_name, v_protected.column_name,
        rekey._protect_options(v_protected)), constraint = 'protect_again';
  end if;
  for v_function in
    select p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any (rekey._function_names('column_' || id))
  loop
    execute format('drop function %s', v_function);
  end loop;
  perform rekey._end_adoptions(id);
  update rekey.rotation_failures f set resolved_at = now(), resolution = 'cleared'
  where f.target = v_protected.label and f.resolved_at is null;
  delete from rekey.protected_columns c where c.id = _forget_column.id;
  perform rekey._audit('column.unprotected', rekey._keyring_name(v_protected.keyring_id), details => jsonb_build_object('column', v_protected.label));
end
$$;
comment on function rekey._forget_column is 'Removes a column from the registry, with its functions. 25001: not in READ COMMITTED; RK005: envelopes are left, or it cannot be counted; RK007: there is none.';
grant execute on function rekey._forget_column to rekey_admin;

create or replace function rekey._drop_triggers(target regclass, id integer, suffixes text = '_insert|_update|_look|_carry') returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name name;
begin
  for v_name in
    select t.tgname from pg_trigger t where t.tgrelid = target and t.tgparentid = 0 and t.tgname ~ format('^zz_pg_rekey_%s(%s)?$', id, suffixes)
  loop
    execute format('drop trigger %I on %s', v_name, target);
  end loop;
end
$$;
comment on function rekey._drop_triggers is 'Drops the triggers of a protected column, with the rights of the caller: the one that encrypts, and those with these suffixes.';
grant execute on function rekey._drop_triggers to rekey_admin;

create or replace function rekey.unprotect_column(target regclass, column_name name, decrypt boolean = false) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_released record;
  v_statement text;
  v_count bigint;
  v_decrypted bigint := 0;
begin
  select * into v_released from rekey._release_column(target, column_name, coalesce(decrypt, false));
  perform rekey._drop_triggers(target, v_released.id, '_look|_carry');
  execute format('lock table %s in access share mode', target);  -- the whole before its parts, as ALTER TABLE locks them
  foreach v_statement in array coalesce(v_released.statements, '{}') loop
    execute v_statement;
    get diagnostics v_count = row_count;
    v_decrypted := v_decrypted + v_count;
  end loop;
  if v_decrypted = 0 then
    -- Waits for those who write, and looks again.
    execute format('lock table %s in share row exclusive mode', target);
    perform rekey._forget_column(v_released.id);
    perform rekey._drop_triggers(target, v_released.id);
  end if;
  return v_decrypted;
end
$$;
comment on function rekey.unprotect_column(regclass, name, boolean) is
  'Ends the protection of a column. decrypt: rows that are encrypted are decrypted, at most 5,000 of each partition at a call, which returns how many: repeat it, each in its own transaction, until it returns 0. The owner of the table calls it, as a member of rekey_admin, or a superuser; but to decrypt in a session of a superuser is refused, unless one owns the table: its triggers would run with his rights. 25001: not in READ COMMITTED; 42501: not the owner, a superuser, or not rekey_app; RK003: a row does not open; RK004: it is being adopted; RK005: rows are encrypted, or it is blocked; RK007: not protected.';
grant execute on function rekey.unprotect_column(regclass, name, boolean) to rekey_admin;

create or replace function rekey.unprotect_column(label text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id integer := (select c.id from rekey.protected_columns c where c.label = unprotect_column.label);
begin
  if v_id is null then
    raise exception 'there is no protected column %', coalesce(quote_literal(label), 'NULL') using errcode = 'RK007', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
  if (rekey._column_shape(v_id)).relation is not null then
    raise exception 'the table of % is there', label using errcode = 'RK006', hint = 'Name the table and the column: rekey.unprotect_column(target, column_name).', constraint = 'unprotect';
  end if;
  perform rekey._forget_column(v_id);
end
$$;
comment on function rekey.unprotect_column(text) is
  'Forgets a protected column whose table or column was dropped, by its label. RK006: it is there; RK007: not protected.';
grant execute on function rekey.unprotect_column(text) to rekey_admin;

create or replace function rekey._column_status()
returns table (label text, relation regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean,
  fire_triggers boolean, search_path text, problem text, index_column name, normalization text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select c.label, s.relation, coalesce(a.attname, c.column_name), rekey._keyring_name(c.keyring_id), c.context_columns, c.encrypt_on_write,
      c.fire_triggers, c.search_path, rekey._column_problem(c), rekey._index_column(c), c.normalization
    from rekey.protected_columns c
    left join lateral rekey._column_shape(c.id) s on true
    left join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[c.places[1]]
    order by c.label;
end
$$;
comment on function rekey._column_status is 'What the view rekey.column_status shows.';
grant execute on function rekey._column_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.column_status as select s.* from rekey._column_status() s;
comment on view rekey.column_status is 'The protected columns, and whether each can be swept.';
comment on column rekey.column_status.label is 'schema.table.column as first registered: the first part of the context of its values.';
comment on column rekey.column_status.relation is 'Its table now; NULL: it was dropped, or its functions were not restored.';
comment on column rekey.column_status.column_name is 'Its name now.';
comment on column rekey.column_status.keyring is 'Its keyring.';
comment on column rekey.column_status.context_columns is 'The columns whose values are the rest of the context, as registered.';
comment on column rekey.column_status.encrypt_on_write is 'Whether a trigger encrypts what is written.';
comment on column rekey.column_status.fire_triggers is 'Whether rotations fire the triggers and rules of the table.';
comment on column rekey.column_status.search_path is 'The search path that these run with.';
comment on column rekey.column_status.problem is 'Why it is blocked, and what to do; NULL: it is not.';
comment on column rekey.column_status.index_column is 'The column with its blind index now; NULL: it is not searchable.';
comment on column rekey.column_status.normalization is 'What it takes for equal: exact, lower, trim_lower or digits.';
grant select on rekey.column_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace function rekey._reveal(value bytea, context text[], pass bytea) returns bytea
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if substr(value, 1, 3) = '\x524b01'::bytea then
    return rekey._decrypt(value, context, pass);
  end if;
  return value;
end
$$;
comment on function rekey._reveal(bytea, text[], bytea) is 'Opens an envelope, as rekey.decrypt(); any other value stays as it is.';
grant execute on function rekey._reveal(bytea, text[], bytea) to rekey_app;

create or replace function rekey._reveal(value text, context text[], pass bytea) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_plaintext bytea;
  v_text text := value;
begin
  if left(value, 4) collate "C" = 'rk1:' then
    v_plaintext := rekey._decrypt(coalesce(rekey._from_text(value), ''::bytea), context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;
comment on function rekey._reveal(text, text[], bytea) is 'As for bytea, of the text form.';
grant execute on function rekey._reveal(text, text[], bytea) to rekey_app;

create or replace function rekey._view_columns(target regclass) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select string_agg(case when c.id is null then format('t.%I', a.attname)
        else format('rekey._reveal(t.%1$I, array[%2$L%3$s], (select rekey.reading_pass(%2$L))) as %1$I', a.attname, c.label,
          (select string_agg(format(', t.%I::text', b.attname), '' order by p.rank)
           from unnest(c.places) with ordinality as p(place, rank)
           join pg_attribute b on b.attrelid = target and b.attnum = c.attnums[p.place]
           where p.rank > 1)) end, ', ' order by a.attnum)
    from pg_attribute a
    left join (select p.*, s.relation, s.attnums from rekey.protected_columns p cross join lateral rekey._column_shape(p.id) s) c
      on c.relation = a.attrelid and c.attnums[c.places[1]] = a.attnum
    where a.attrelid = target and a.attnum > 0 and not a.attisdropped);
end
$$;
comment on function rekey._view_columns is 'The columns of a table as its decrypted view has them.';
grant execute on function rekey._view_columns to rekey_admin;

create or replace function rekey.create_decrypted_view(target regclass) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table record;
  v_name name;
begin
  if not exists (select from rekey.column_status s where s.relation = target) then
    raise exception '% has no protected column', target using errcode = 'RK007', hint = 'rekey.protect_column() protects one.', constraint = 'protect';
  end if;
  select n.nspname, c.relname into v_table from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  v_name := v_table.relname || '_decrypted';
  execute format('create or replace view %I.%I with (security_invoker = true) as select %s from %s t', v_table.nspname, v_name, rekey._view_columns(target), target);
  return format('%I.%I', v_table.nspname, v_name);
end
$$;
comment on function rekey.create_decrypted_view is
  'Makes the view <table>_decrypted beside a table, or makes it anew, and returns its name: as the table, with its protected columns opened, under the rights and policies of whoever reads it (security_invoker). A value that is no envelope is shown as it is. Its readers need SELECT on view and table, and rekey_app. Each row is opened by itself: select few. RK007: the table has no protected column.';
grant execute on function rekey.create_decrypted_view to rekey_admin;
