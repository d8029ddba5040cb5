-- Searching protected columns by equality: a blind index, a column of bytea beside the protected one. For each value it holds the
-- version of the key, and 16 bytes of an HMAC of what the value is taken for, under a key derived from that version's DEK.
-- So it is rotated, and destroyed, with its version. (62_search.sql is another search: for envelopes, before a destruction.)
--
-- A unique index on it holds during a rotation: what is written is asked for under every version that rows may stand on, by standing
-- there for a moment (docs/design.md, "How a value stays unique").

create or replace function rekey._normalized(value bytea, normalization text) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text := rekey._as_text(value);
begin
  -- Plain assignments, of which none raises: 41_encrypt.sql.
  if v_text is null then
    return value;
  end if;
  if normalization = 'digits' then
    v_text := regexp_replace(v_text collate "C", '[^0-9]', '', 'g');
  elsif normalization = 'exact' and length(v_text) = octet_length(v_text) then
    return value;  -- ASCII is in NFC
  else
    if getdatabaseencoding() = 'UTF8' then
      v_text := pg_catalog.normalize(v_text, 'NFC');
    end if;
    if normalization = 'trim_lower' then
      v_text := btrim(v_text, chr(32) || chr(9) || chr(10) || chr(11) || chr(12) || chr(13));
    end if;
    if normalization in ('lower', 'trim_lower') then
      v_text := lower(v_text);
      if getdatabaseencoding() = 'UTF8' then
        v_text := pg_catalog.normalize(v_text, 'NFC');
      end if;
    end if;
  end if;
  return convert_to(v_text, 'UTF8');
end
$$;
comment on function rekey._normalized is
  'What a value is taken for. exact: its text in NFC; lower: in NFC, lower() of the database, and in NFC again; trim_lower: the same, without blanks, tabs, line feeds, vertical tabs, form feeds and carriage returns at both ends; digits: its ASCII digits alone. What is no text stays as it is.';

create or replace function rekey._text_version(normalization text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_unicode text := (select c.catalog_version_no from pg_control_system() c);
  v_collation text;
begin
  if normalization = 'digits' then
    return '';
  end if;
  -- What NFC goes by comes with the major version, which that of the catalogs stands for where nothing says it.
  if to_regprocedure('pg_catalog.unicode_version()') is not null then
    execute format('select pg_catalog.%I()', 'unicode_version') into v_unicode;
  end if;
  if normalization <> 'exact' then
    select format(' %s %s %s %s', d.datlocprovider, d.datctype, coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), pg_database_collation_actual_version(d.oid))
    into v_collation
    from pg_database d where d.datname = current_database();
  end if;
  return v_unicode || coalesce(v_collation, '');
end
$$;
comment on function rekey._text_version is 'What values are normalized by: Unicode, where NFC matters; the collation of the database, where lower() does.';

-- What a searchable column asks the server that holds it.
create or replace function rekey._versions_to_ask(id integer, relation oid) returns integer[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_versions integer[];
  v_keyring integer;
  v_column name;
  v_locked integer;
  v_snapshot boolean := current_setting('transaction_isolation') <> 'read committed';
begin
  loop
    -- In a statement of its own: it sees a rotation that was committed since the row came to stand in the index.
    select a.version || array(select v from unnest(b.versions) as v where v <> a.version order by v), c.keyring_id, c.index_column
    into v_versions, v_keyring, v_column
    from rekey._blind_indexes b
    join rekey.protected_columns c on c.id = b.column_id
    join rekey.encryption_keys a on a.keyring_id = c.keyring_id and a.state = 'active'
    where b.column_id = _versions_to_ask.id;
    exit when v_versions is null or v_versions[1] = v_locked or cardinality(v_versions) = 1 and not v_snapshot;
    if v_locked is null and not exists (
         select from pg_index i
         join pg_attribute t on t.attrelid = i.indrelid and t.attname = v_column
         where i.indrelid = _versions_to_ask.relation and (i.indisunique or i.indisexclusion)
           and (t.attnum = any (i.indkey::smallint[]) or exists (
             select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = i.indexrelid and d.refclassid = 'pg_class'::regclass
               and d.refobjid = i.indrelid and d.refobjsubid = t.attnum))) then
      return null;
    end if;
    -- Where the row is to stay, no less in use than the version that its value is sealed with.
    perform pg_advisory_xact_lock_shared(v_keyring, v_versions[1]);
    v_locked := v_versions[1];
  end loop;
  -- (40001, where this snapshot does not see it.)
  perform rekey._refuse_old_snapshot(array[v_keyring], v_versions[1:1]);
  return v_versions;
end
$$;
comment on function rekey._versions_to_ask is
  'The versions under which a value is to be asked for in the unique index of a blind index, the active one first, where it stays; NULL: nothing is unique. 40001 outside READ COMMITTED, where a rotation was committed since the snapshot.';

create or replace function rekey._index_of(id integer, envelope bytea, context bytea, version integer) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
  v_plaintext bytea;
  v_normalized bytea;
  v_key bytea;
begin
  select c.keyring_id, c.normalization, rekey._part(c.label) || rekey._part(c.normalization) as info, b.versions into v_column
  from rekey.protected_columns c join rekey._blind_indexes b on b.column_id = c.id where c.id = _index_of.id;
  -- (A rotation that has completed since it was chosen: no row stands on it any more.)
  if not coalesce(version = any (v_column.versions), false) then
    return null;
  end if;
  v_key := rekey._dek(v_column.keyring_id, version);
  if v_key is null then
    raise exception 'the index cannot be asked under key version %: %', version, rekey._dek_problem(v_column.keyring_id, version) using errcode = 'RK006';
  end if;
  v_plaintext := rekey._open(envelope, context);
  v_normalized := rekey._normalized(v_plaintext, v_column.normalization);
  v_key := rekey._index_key(v_key, v_column.info);
  return rekey._index_value(version, v_key, v_normalized);
end
$$;
comment on function rekey._index_of is 'The index value of an envelope under a version; NULL where no row may stand on that. RK003: it does not open; RK006: the version may not be used.';

create or replace function rekey._further_values(versions integer[], keyring_id integer, info bytea, normalized bytea) returns bytea
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
  v_key bytea;
  v_values bytea := ''::bytea;
begin
  foreach v_version in array versions loop
    v_key := rekey._dek(keyring_id, v_version);
    if v_key is null then
      raise exception 'the index cannot be asked under key version %: %', v_version, rekey._dek_problem(keyring_id, v_version) using errcode = 'RK006',
        hint = 'Rows may stand on it. Once a rotation has taken them along, they do not: rekey.rotation_status.', constraint = 'rotations';
    end if;
    v_key := rekey._index_key(v_key, info);
    v_values := v_values || rekey._index_value(v_version, v_key, normalized);
  end loop;
  return v_values;
end
$$;
comment on function rekey._further_values is 'The index values of what a value is taken for under these versions, one after the other. RK006: one of them may not be used.';

create or replace function rekey._refuse_keyring() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'the value is sealed with another keyring than that of the column' using errcode = 'RK006',
    hint = 'A searchable column holds one keyring: store the plain value, which is encrypted on write.', constraint = 'encrypt_on_write';
end
$$;
comment on function rekey._refuse_keyring is 'Raises RK006.';

create or replace function rekey._index_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_names text[];
  v_context text;
begin
  select array_agg(quote_ident(a.attname) order by p.rank) into v_names
  from unnest(protected.places || protected.index_place) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = relation and a.attnum = attnums[p.place];
  v_context := rekey._context_expression(protected.label, v_names[2:cardinality(protected.places)]);
  -- As rekey._write_trigger_body(), and what is said beside it.
  return format($body$
declare
  v_info constant bytea := %12$L::bytea;
  v_envelope bytea;
  v_plaintext bytea;
  v_length integer;
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
  v_key bytea;
  v_normalized bytea;
  v_versions integer[];
begin
  if not rekey._is_unchanged(%7$s, %8$L, tg_name, tg_relid) then
    perform rekey._refuse_other_table(%7$s, tg_relid);
    perform rekey._refuse_renamed(%7$s, %8$L);
    perform rekey._refuse_later_trigger(tg_name, tg_relid);
  end if;
  if new.%1$s is null then
    new.%10$s := null;
    return new;
  end if;
  v_context := %2$s;
  v_envelope := rekey._envelope_of(new.%1$s);
  if tg_op = 'UPDATE' and octet_length(new.%10$s) = 4 and new.%1$s = old.%1$s%9$s and v_envelope is not null then
    -- The number of a version asks for the index value under it (column_N_carry).
    new.%10$s := coalesce(rekey._index_of(%7$s, v_envelope, v_context, rekey._int4(new.%10$s, 0)), old.%10$s);
    return new;
  end if;
  if v_envelope is not null and current_setting('session_replication_role') = 'replica' and rekey._is_of_known_version(v_envelope) then
    return new;
  end if;
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%9$s then
    if v_envelope is null or v_context = %3$s then
      -- A sweep fills the index; nobody else writes into it.
      if not rekey.is_sweeping(tg_relid) then
        new.%10$s := old.%10$s;
      end if;
      return new;
    end if;
    v_plaintext := rekey._open(v_envelope, %3$s);
    v_envelope := null;
  elsif v_envelope is null then
    v_plaintext := %4$s;
  else
    if rekey.is_sweeping(tg_relid) then
      return new;
    end if;
    v_plaintext := rekey._open_incoming(v_envelope, v_context);
    if rekey._int4(v_envelope, 3) <> %5$s then
      perform rekey._refuse_keyring();
    end if;
  end if;
  v_length := octet_length(v_plaintext);
  v_sealing := rekey._sealing_on_write(%5$s, v_length);
  if v_sealing.key is null then
    new.%10$s := null;
    return new;
  end if;
  -- An envelope of an older version is sealed anew: what stands here can be searched for.
  if v_envelope is null or substr(v_envelope, 1, 11) <> v_sealing.header then
    v_iv := rekey._random_bytes(16);
    v_aad := v_sealing.header || v_context;
    v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_plaintext, v_aad);
    new.%1$s := %6$s;
  end if;
  v_key := rekey._index_key(v_sealing.key, v_info);
  v_normalized := rekey._normalized(v_plaintext, %11$L);
  new.%10$s := rekey._index_value(rekey._int4(v_sealing.header, 7), v_key, v_normalized);
  v_versions := rekey._versions_to_ask(%7$s, tg_relid);
  if v_versions is not null then
    v_versions := array_remove(v_versions, rekey._int4(v_sealing.header, 7));
    new.%10$s := new.%10$s || rekey._further_values(v_versions, %5$s, v_info, v_normalized);
  end if;
  return new;
end
$body$, v_names[1], format(v_context, 'new'), format(v_context, 'old'),
    case when protected.is_text then format('convert_to(new.%s, ''UTF8'')', v_names[1]) else 'new.' || v_names[1] end,
    protected.keyring_id, case when protected.is_text then 'rekey._to_text(v_envelope)' else 'v_envelope' end,
    protected.id, (select array_agg(a.attname order by a.attnum) from pg_attribute a where a.attrelid = relation and a.attnum = any (attnums)),
    case when protected.is_text then ' collate "C"' end, v_names[cardinality(v_names)], protected.normalization,
    rekey._part(protected.label) || rekey._part(protected.normalization));
end
$$;
comment on function rekey._index_trigger_body is 'Body of the trigger that encrypts a searchable column on write, and keeps its index.';

-- These are the owner's, as those that sweep: what they look at and change is his. They know no key, and no value. The trigger
-- that encrypts gives them index values; to be moved to another version, they write its number.
create or replace function rekey._index_bodies(protected rekey.protected_columns, relation regclass, attnums smallint[])
returns table (name text, arguments text, result text, language text, body text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text := 'column_' || protected.id;
  v_column text := (select quote_ident(a.attname) from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.places[1]]);
  v_index text := (select quote_ident(a.attname) from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.index_place]);
  v_type text := case when protected.is_text then 'text' else 'bytea' end;
  v_collate text := case when protected.is_text then ' collate pg_catalog."C"' else '' end;
  -- As NAME_write: rekey._column_bodies().
  v_kept_role text := case when protected.fire_triggers then '' else '
  v_role text := current_setting(''session_replication_role'');' end;
  v_before text := case when protected.fire_triggers then format('perform set_config(''search_path'', %L, true);', protected.search_path)
    else 'perform set_config(''session_replication_role'', ''replica'', true);' end;
  v_after text := case when protected.fire_triggers then '' else 'perform set_config(''session_replication_role'', v_role, false);' end;
begin
  return query
  select format('%s_%s', v_prefix, b.suffix), b.arguments, b.result, b.language, b.body
  from (values
    ('live', 'relation regclass', 'integer[]', 'sql', format('
  select case when not rekey.is_sweeping(relation) then rekey._versions_to_ask(%s, relation) end;', protected.id)),
    ('look', '', 'trigger', 'plpgsql', format($body$
declare
  v_values bytea[] := array(select substr(new.%1$s, 1 + 20 * g.place, 20) from generate_series(0, octet_length(new.%1$s) / 20 - 1) as g(place) order by g.place);
  v_alike text;
  v_found bytea;
begin
  -- By the other columns of the unique indexes too: those of another tenant are no duplicate.
  select string_agg(coalesce(u.alike, 'true'), ' or ') into v_alike
  from (
    select string_agg(format('t.%%1$I = ($2).%%1$I', a.attname), ' and ') filter (where a.attnum > 0) as alike
    from pg_index i
    join pg_attribute x on x.attrelid = i.indrelid and quote_ident(x.attname) = %2$L and x.attnum = any (i.indkey::smallint[])
    left join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any ((i.indkey::smallint[])[0:i.indnkeyatts - 1]) and a.attnum <> x.attnum
      and a.atttypid < 16384  -- whose operators are PostgreSQL's own
    where i.indrelid = tg_relid and i.indisunique
    group by i.indexrelid) u;
  -- Where it is there already, it is asked for first under the version that it stands on: so ON CONFLICT finds it. Locked, the
  -- sweep leaves it there.
  execute format('select t.%3$s from only %%s t where t.%3$s = any ($1) and (%%s) limit 1 for key share', tg_relid::regclass, coalesce(v_alike, 'true'))
  into v_found using v_values, new;
  new.%1$s := coalesce(v_found, v_values[1]);
  return new;
end
$body$, v_index, v_index, replace(v_index, '%', '%%'))),
    ('move', format('relation regclass, row_pointer tid, index bytea, value %s, version bytea, out moved tid, out moved_index bytea', v_type), 'record', 'plpgsql', format($body$
declare
  v_statement text := format('update only %%s t set %1$s = $1 where t.ctid operator(pg_catalog.=) $2 and t.%1$s operator(pg_catalog.=) $3 returning t.ctid, t.%1$s', relation);
  v_again text := format('update only %%s t set %1$s = $1 where t.%1$s operator(pg_catalog.=) $2 and t.%2$s operator(pg_catalog.=) $3%3$s returning t.ctid, t.%1$s', relation);%4$s
begin
  %5$s
  execute v_statement into moved, moved_index using version, row_pointer, index;
  if moved is null then
    -- A trigger has updated the row since.
    execute v_again into moved, moved_index using version, index, value;
  end if;
  %6$s
end
$body$, replace(v_index, '%', '%%'), replace(v_column, '%', '%%'), v_collate, v_kept_role, v_before, v_after)),
    ('carry', '', 'trigger', 'plpgsql', format($body$
declare
  v_row tid := new.ctid;
  v_index bytea := new.%2$s;
  v_at integer := (get_byte(v_index, 0) << 24) | (get_byte(v_index, 1) << 16) | (get_byte(v_index, 2) << 8) | get_byte(v_index, 3);
  v_asked integer[] := array[v_at];
  v_live integer[];
  v_next integer;
begin
  if tg_op = 'UPDATE' and new.%1$s = old.%1$s%3$s or current_setting('session_replication_role') = 'replica' then
    return null;
  end if;
  loop
    -- After the row stands in the index: who makes a version active later will find it there.
    v_live := coalesce(rekey_targets.%4$s_live(tg_relid), v_live[1:1]);
    exit when v_live is null or v_live <@ v_asked and v_at = v_live[1];
    foreach v_next in array array(select v from unnest(v_live[2:]) as v where v <> all (v_asked) order by v) || v_live[1] loop
      continue when v_next = v_at;
      select m.moved, m.moved_index into v_row, v_index
      from rekey_targets.%4$s_move(tg_relid, v_row, v_index, new.%1$s, int4send(v_next)) m;
      if v_row is null then
        return null;  -- deleted, or changed, by a trigger of its own
      end if;
      v_asked := v_asked || v_next;
      v_at := v_next;
    end loop;
  end loop;
  return null;
end
$body$, v_column, v_index, case when protected.is_text then ' collate "C"' else '' end, v_prefix))
  ) as b(suffix, arguments, result, language, body);
end
$$;
comment on function rekey._index_bodies is
  'The functions of a blind index, owned by the owner of the table: live (the versions to ask for), look (trigger: under which version a value is asked for first), move (one row to another version), carry (trigger: asks for it under all of them, the active one last).';

create or replace function rekey._index_function_statements(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
begin
  if protected.index_place is null then
    return array[]::text[];
  end if;
  return (
    select array_agg(s.statement order by array_position('{live,look,move,carry}', substring(b.name from '[a-z]+$')), s.place)
    from rekey._index_bodies(protected, relation, attnums) b
    cross join lateral (values
      (1, format('create or replace function rekey_targets.%I(%s) returns %s language %s volatile security definer%s', b.name, b.arguments, b.result, b.language,
        case when b.language = 'sql' then ' begin atomic ' || b.body || ' end' else format(' set search_path = pg_catalog, pg_temp as %L', b.body) end)),
      (2, format('revoke all on function rekey_targets.%I from public', b.name)),
      (3, format('alter function rekey_targets.%I owner to %I', b.name, v_owner))) as s(place, statement));
end
$$;
comment on function rekey._index_function_statements is 'The statements that make the functions of rekey._index_bodies(); none for a column that is not searchable.';

create or replace function rekey._index_statements(protected rekey.protected_columns, relation regclass, attnums smallint[]) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
begin
  if protected.index_place is null or not protected.encrypt_on_write then
    return array[]::text[];
  end if;
  return rekey._index_function_statements(protected, relation, attnums) || (
    select array[
      format('create or replace trigger zz_pg_rekey_%s_look before insert or update on %s for each row when (octet_length(new.%I) > 20) execute function rekey_targets.column_%1$s_look()',
        protected.id, relation, a.attname),
      format('create or replace trigger zz_pg_rekey_%s_carry after insert or update on %s for each row when (new.%I is not null) execute function rekey_targets.column_%1$s_carry()',
        protected.id, relation, a.attname)]
    from pg_attribute a where a.attrelid = relation and a.attnum = attnums[protected.index_place]);
end
$$;
comment on function rekey._index_statements is 'The statements that make functions and triggers of a blind index; none for a column that is not searchable.';

create or replace function rekey._older_snapshots(since xid8) returns jsonb
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- (A restore brings numbers of another server.)
  if since::text::bigint >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint or pg_snapshot_xmax(pg_current_snapshot())::text::bigint - since::text::bigint > 1000000000 then
    return null;
  end if;
  perform pg_stat_clear_snapshot();
  return (
    select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('pid', a.pid, 'role', a.usename, 'snapshot', true,
      'age_seconds', extract(epoch from clock_timestamp() - a.xact_start)::bigint)))
    from pg_stat_activity a
    where a.datname = current_database() and a.pid <> pg_backend_pid() and age(a.backend_xmin) >= age(since::xid)
      -- Who sends WAL or vacuums searches for nothing. A worker's own batch is younger, and looks for no value.
      and not exists (select from pg_stat_get_wal_senders() w where w.pid = a.pid)
      and not exists (select from pg_stat_progress_vacuum v where v.pid = a.pid));
end
$$;
comment on function rekey._older_snapshots is 'Who has a snapshot in which the version that this transaction made active is not active yet; NULL: nobody.';

create or replace function rekey._activate_in_indexes(keyrings integer[], versions integer[]) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._blind_indexes b
  set versions = array_remove(b.versions, u.version) || u.version, changed_in = pg_current_xact_id()
  from rekey.protected_columns c
  join unnest(_activate_in_indexes.keyrings, _activate_in_indexes.versions) as u(keyring_id, version) on u.keyring_id = c.keyring_id
  where c.id = b.column_id;
end;
comment on function rekey._activate_in_indexes is 'Notes, in the transaction that makes these versions active, that index values may come to stand on them.';

create or replace function rekey._search_values(label text, "values" text[]) returns bytea[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
  v_versions integer[];
  v_version integer;
  v_value text;
  v_bytes bytea;
  v_normalized bytea[];
  v_key bytea;
  v_found bytea[] := '{}'::bytea[];
begin
  select c.id, c.keyring_id, c.normalization, rekey._part(c.label) || rekey._part(c.normalization) as info, k.tenant_id, b.versions, b.filled into v_column
  from rekey.protected_columns c
  join rekey.keyrings k on k.id = c.keyring_id
  left join rekey._blind_indexes b on b.column_id = c.id
  where c.label = _search_values.label;
  perform rekey._check_label(label);
  if v_column.versions is null then
    raise exception '% is not searchable', coalesce(quote_literal(label), 'NULL') using errcode = 'RK007',
      hint = 'rekey.make_searchable() makes a protected column so. It is named by its label: rekey.column_status.', constraint = 'searchable';
  end if;
  if not rekey.can_access_tenant(v_column.tenant_id) then
    perform rekey._refuse_tenant();
  end if;
  if not v_column.filled then
    raise exception 'the index of % is not filled yet', quote_literal(label) using errcode = 'RK006',
      hint = 'A worker fills it: rekey.rotation_status says how far it is.', constraint = 'rotations';
  end if;
  -- Plain assignments only, as in rekey._adopt().
  foreach v_value in array "values" loop
    if v_value is not null then
      v_bytes := convert_to(v_value, 'UTF8');
      v_bytes := rekey._normalized(v_bytes, v_column.normalization);
      v_normalized := v_normalized || v_bytes;
    end if;
  end loop;
  v_versions := v_column.versions;
  foreach v_version in array v_versions loop
    v_key := rekey._dek(v_column.keyring_id, v_version);
    if v_key is null then
      raise exception 'cannot search %: %', quote_literal(label), rekey._dek_problem(v_column.keyring_id, v_version) using errcode = 'RK006',
        hint = 'Rows may stand on that version, and would be missed.';
    end if;
    v_key := rekey._index_key(v_key, v_column.info);
    foreach v_bytes in array coalesce(v_normalized, '{}'::bytea[]) loop
      v_found := v_found || rekey._index_value(v_version, v_key, v_bytes);
    end loop;
  end loop;
  return v_found;
end
$$;
comment on function rekey._search_values is 'What rekey.search_many() returns.';

create or replace function rekey.search(label text, value text) returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._search_values(label, array[value]);
end
$$;
comment on function rekey.search is
  'What the index column of a searchable column may hold for a value, one for each key version that rows may stand on: where email_bidx = any (rekey.search(''public.users.email'', ''ada@example.org'')). label: that of the protected column. Good within this statement only: a rotation changes it. NULL finds nothing. Writes nothing. 42501: a column that the caller may not read, or another tenant''s; RK001, RK002: KEK; RK006: the index is not filled yet, or a version may not be used; RK007: not searchable.';
grant execute on function rekey.search to rekey_app;

create or replace function rekey.search_many(label text, "values" text[]) returns bytea[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return rekey._search_values(label, coalesce("values", '{}'));
end
$$;
comment on function rekey.search_many is 'As rekey.search(), of many values: rows that hold any of them. Errors: as rekey.search().';
grant execute on function rekey.search_many to rekey_app;

-- Executable by administrators because rekey.make_searchable() runs with its caller's rights.
create or replace function rekey._register_search(target regclass, column_name name, index_column name, normalization text, out id integer, out statements text[])
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_protected rekey.protected_columns;
  v_names name[];
  v_attnums smallint[];
  v_places integer[];
  v_index_place integer;
begin
  perform rekey._refuse_snapshot();
  perform rekey._refuse_stranger(target);
  perform pg_advisory_xact_lock(0, 3);  -- as rekey._register_column()
  if normalization is null or normalization not in ('exact', 'lower', 'trim_lower', 'digits') then
    raise exception 'values are not normalized as %', coalesce(quote_literal(normalization), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'normalization: exact, lower, trim_lower or digits.';
  end if;
  id := rekey._column_id(target, column_name);
  select * into v_protected from rekey.protected_columns c where c.id = _register_search.id;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) first.', constraint = 'protect';
  end if;
  -- Before its row: a rotation that has begun is waited for, so that its version is not missed.
  perform rekey._keyring(rekey._keyring_name(v_protected.keyring_id), lock => true);
  select * into v_protected from rekey.protected_columns c where c.id = _register_search.id for update;
  perform rekey._refuse_problem(v_protected.label, rekey._column_problem(v_protected));
  if not v_protected.encrypt_on_write then
    raise exception '% has no trigger that encrypts on write, which keeps the index', v_protected.label using errcode = 'RK006',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) makes it.', constraint = 'encrypt_on_write';
  end if;
  if not exists (
       select from pg_attribute a
       where a.attrelid = target and a.attname = _register_search.index_column and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
         and a.atttypid = 'bytea'::regtype and not a.attnotnull) then
    raise exception 'column %.% cannot hold an index', target, coalesce(quote_ident(index_column), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'It is bytea, may be NULL, and is not generated.';
  end if;
  if exists (
       select from rekey.protected_columns c cross join lateral rekey._column_shape(c.id) s
       join pg_attribute a on a.attrelid = s.relation and a.attname = _register_search.index_column and a.attnum = any (s.attnums)
       where s.relation = target and (c.id <> v_protected.id or a.attnum <> coalesce(s.attnums[c.index_place], 0))) then
    raise exception 'column %.% has another use', target, quote_ident(index_column) using errcode = 'invalid_parameter_value', hint = 'Name a column of its own.';
  end if;
  if v_protected.normalization is not null and (v_protected.normalization <> _register_search.normalization or rekey._index_column(v_protected) <> index_column) then
    raise exception '% is searchable already, in another way', v_protected.label using errcode = 'RK006',
      hint = format('It is normalized as %s, in column %s.', v_protected.normalization, quote_ident(rekey._index_column(v_protected)));
  end if;
  if exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey::smallint[])
             where i.indrelid = target and a.attname = _register_search.index_column and i.indisunique and not i.indimmediate) then
    raise exception 'a unique constraint on % is deferrable', quote_ident(index_column) using errcode = 'invalid_parameter_value',
      hint = 'It would not see a row that stands on another key version: make it NOT DEFERRABLE.';
  end if;
  select array_agg(a.attname order by p.rank) into v_names
  from rekey._column_shape(v_protected.id) s
  cross join lateral unnest(v_protected.places) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.place];
  select s.attnums, s.places, s.index_place into v_attnums, v_places, v_index_place from rekey._column_places(target, v_names, index_column) s;
  update rekey.protected_columns c
  set places = v_places, index_place = v_index_place, index_column = _register_search.index_column, normalization = _register_search.normalization
  where c.id = v_protected.id returning * into v_protected;
  statements := rekey._column_statements(v_protected, target, v_attnums);
end
$$;
comment on function rekey._register_search is 'What rekey.make_searchable() does with the rights of rekey_owner; statements are what the owner of the table has to run.';
grant execute on function rekey._register_search to rekey_admin;

create or replace function rekey._finish_search(id integer) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protected rekey.protected_columns;
  v_keyring text;
  v_active integer;
  v_versions integer[];
  v_others bigint;
  v_new boolean;
  v_rotation bigint;
begin
  select * into v_protected from rekey.protected_columns c where c.id = _finish_search.id;
  perform rekey._refuse_stranger((rekey._column_shape(id)).relation);
  -- To make a trigger has locked out who writes.
  select array_agg(distinct c.version) filter (where c.keyring_id = v_protected.keyring_id and c.version > 0), sum(c.rows) filter (where c.keyring_id <> v_protected.keyring_id)
  into v_versions, v_others
  from rekey._count_rows(rekey._targets_now(v_protected.label), null) c;
  if v_others > 0 then
    raise exception '% rows of % are sealed with other keyrings than its own', v_others, v_protected.label using errcode = 'RK005',
      hint = 'A searchable column holds one keyring: write their values anew.';
  end if;
  select k.version into v_active from rekey.encryption_keys k where k.keyring_id = v_protected.keyring_id and k.state = 'active';
  if not found then
    raise exception 'the keyring is retired' using errcode = 'RK006';
  end if;
  v_new := not exists (select from rekey._blind_indexes b where b.column_id = _finish_search.id);
  insert into rekey._blind_indexes as b (column_id, versions, changed_in, text_version)
  values (v_protected.id, array_remove(coalesce(v_versions, '{}'), v_active) || v_active, pg_current_xact_id(), rekey._text_version(v_protected.normalization))
  on conflict (column_id) do update set refill = true, refill_by = null, text_version = excluded.text_version;
  v_keyring := rekey._keyring_name(v_protected.keyring_id);
  -- One that is under way takes it along.
  if not exists (select from rekey.rotations r where r.keyring_id = v_protected.keyring_id and rekey._is_under_way(r.state) and not r.in_line) then
    v_rotation := rekey._queue_sweep(v_protected.keyring_id, 'search', format('the blind index of %s is filled', v_protected.label));
  end if;
  perform rekey._audit_all(jsonb_build_array(jsonb_build_object('event', case when v_new then 'column.searchable' else 'column.refilled' end, 'keyring', v_keyring,
      'details', jsonb_build_object('column', v_protected.label, 'index_column', v_protected.index_column, 'normalization', v_protected.normalization)))
    || case when v_rotation is null then '[]' else jsonb_build_array(jsonb_build_object('event', 'rotation.requested', 'keyring', v_keyring, 'version', v_active,
      'rotation_id', v_rotation, 'details', jsonb_build_object('trigger', 'search', 'column', v_protected.label))) end);
end
$$;
comment on function rekey._finish_search is 'Notes which versions the index values of a searchable column may stand on, and has a worker fill the index. RK005: rows of other keyrings; RK006: its keyring is retired.';
grant execute on function rekey._finish_search to rekey_admin;

create or replace function rekey.make_searchable(target regclass, column_name name, index_column name = null, normalization text = null) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off  -- as rekey._register_column()
as $$
declare
  v_index name := coalesce(index_column, (
    select a.index_column from rekey.column_status a where a.relation = target and a.column_name = make_searchable.column_name), left(column_name, 58) || '_bidx');
  v_made record;
  v_statement text;
  v_label text;
  v_distinct double precision;
begin
  if not exists (select from pg_attribute a where a.attrelid = target and a.attname = v_index and not a.attisdropped) then
    execute format('alter table %s add column %I bytea', target, v_index);
  end if;
  select * into v_made from rekey._register_search(target, column_name, v_index, coalesce(normalization, (
    select s.normalization from rekey.column_status s where s.relation = target and s.column_name = make_searchable.column_name), 'exact'));
  foreach v_statement in array v_made.statements loop
    execute v_statement;
  end loop;
  v_label := rekey._finish_column(v_made.id);
  perform rekey._finish_search(v_made.id);
  -- (Before an adoption, as ANALYZE saw the plain values.)
  select case when s.n_distinct < 0 then -s.n_distinct * c.reltuples else s.n_distinct end into v_distinct
  from pg_stats s join pg_class c on c.oid = target join pg_namespace n on n.oid = c.relnamespace
  where s.schemaname = n.nspname and s.tablename = c.relname and s.attname = make_searchable.column_name and c.reltuples >= 1000;
  if v_distinct < 1000 then
    raise warning '%.% has about % different values', target, quote_ident(column_name), round(v_distinct)
      using hint = 'Equal values have equal index values: whoever reads the table can count them, and tell which is which where he knows how frequent each is.';
  end if;
  raise notice 'once the index is filled: where %.% = any (rekey.search(%, ...))', target, quote_ident(v_index), quote_literal(v_label)
    using detail = format(
      'For PostgREST, the value and the query in one call: create function %s(value text) returns setof %s language sql stable as $q$ select t.* from %2$s t where t.%I = any (rekey.search(%L, value)) $q$;',
      (select format('%I.%I', n.nspname, left(c.relname || '_by_' || make_searchable.column_name, 63)) from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target),
      target, v_index, v_label);
  return format('create index concurrently on %s (%I)', target, v_index);
end
$$;
comment on function rekey.make_searchable is
  'Makes a protected column searchable by equality, and returns the statement that makes its index (with unique, where values are to be so). A worker fills the index column, online, as it works on a rotation; until then rekey.search() refuses. The owner of the table calls it, as a member of rekey_admin, or a superuser. index_column: bytea; NULL, the default: <column>_bidx; it is added where it is not there. normalization: what is taken for equal: exact (the text in NFC; the default), lower (and lower() of the database), trim_lower (and no white space around it), digits (its ASCII digits). Repeated, it has the index filled anew: after an update of the collation or of Unicode. 22023: column or normalization cannot be; 25001: not in READ COMMITTED; 42501: not the owner; RK005: blocked, or rows of other keyrings; RK006: no encrypt_on_write, or searchable in another way; RK007: not protected.';
grant execute on function rekey.make_searchable to rekey_admin;

create or replace function rekey._unfilled(keyring_id integer, rotation_id bigint) returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  -- What was normalized by other tables than those of now is looked at again, all of it.
  update rekey._blind_indexes b set refill = true, refill_by = null, text_version = rekey._text_version(c.normalization)
  from rekey.protected_columns c
  where c.id = b.column_id and c.keyring_id = _unfilled.keyring_id and b.text_version <> rekey._text_version(c.normalization);
  return (
    select min(c.label) from rekey._blind_indexes b join rekey.protected_columns c on c.id = b.column_id
    where c.keyring_id = _unfilled.keyring_id and b.refill and b.refill_by is distinct from rotation_id);
end
$$;
comment on function rekey._unfilled is 'A searchable column of the keyring whose rows this rotation has yet to look at, for its index; NULL: none.';

create or replace function rekey._complete_indexes(keyring_id integer, rotation_id bigint, counted jsonb) returns void
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._blind_indexes b
  set filled = true, refill = false, refill_by = null,
      versions = array(
        select distinct n.version from jsonb_to_recordset(counted) as n(target text, version integer) where n.target = c.label
        union
        select k.version from rekey.encryption_keys k where k.keyring_id = c.keyring_id and k.state = 'active'
        order by 1)
  from rekey.protected_columns c
  where c.id = b.column_id and c.keyring_id = _complete_indexes.keyring_id;
end;
comment on function rekey._complete_indexes is 'Notes, as a rotation completes, on which versions index values stand: those that were counted, and the active one. counted: objects with target and version.';

create or replace function rekey._refill(
  rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], indexes bytea[], normalization text,
  out made_rows tid[], out starts bytea[], out made_indexes bytea[], out made_keyrings integer[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
set enable_nestloop = off  -- as rekey._reencrypt()
as $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_info bytea := prefix || rekey._part(normalization);
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)) into v_keyrings, v_versions
  from unnest(v_headers) as h(header);
  -- The version stays in use while the batch is not committed.
  perform pg_advisory_xact_lock_shared(u.keyring_id, u.version) from unnest(v_keyrings, v_versions) as u(keyring_id, version);
  select array_agg(o.row), array_agg(substr(o.ciphertext, 1, 27)), array_agg(o.made), array_agg(o.keyring_id)
  into made_rows, starts, made_indexes, made_keyrings
  from (
    select u.*, case when rekey._is_authentic(u.key, u.iv, u.sealed, u.aad)
      then rekey._index_value(u.version, u.index_key, rekey._normalized(rekey._decipher(u.key, u.iv, u.sealed), _refill.normalization)) end as made
    from (
      select c.row, c.ciphertext, c.index, k.keyring_id, k.version, k.key, k.index_key,
        substr(c.ciphertext, 12, 16) as iv, substr(c.ciphertext, 28) as sealed, k.header || prefix || c.context as aad
      from unnest(rows, ciphertexts, contexts, indexes) as c(row, ciphertext, context, index)
      join (
        select d.keyring_id, d.version, d.key, rekey._header(d.keyring_id, d.version) as header, rekey._index_key(d.key, v_info) as index_key
        from rekey._deks(v_keyrings, v_versions, sweeping => true) d where d.key is not null
        offset 0
      ) k on k.header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
      offset 0
    ) u
    offset 0
  ) o
  where o.made is distinct from o.index and o.made is not null;
end
$$;
comment on function rekey._refill is
  'The index values of envelopes that have another one, or none, each under the version of its envelope: made_indexes of made_rows. What does not open is left to the verification. prefix: the label of the column.';

create or replace function rekey._refill_failed(targets text[]) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey._blind_indexes b set refill = true, refill_by = null
  from rekey.protected_columns c where c.id = b.column_id and c.label = any (targets);
end
$$;
comment on function rekey._refill_failed is 'Has the next pass look at every row of these targets, where they are searchable: the index value of one was wrong, and is to be mended.';

create or replace function rekey._index_findings(protected rekey.protected_columns)
returns table (kind text, severity text, finding text, advice text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_shape record;
  v_again text := format('rekey.make_searchable(%L, %L), or pg-rekey columns search, has a worker fill it anew.', protected.relation_name, protected.column_name);
  v_index rekey._blind_indexes;
begin
  select s.* into v_shape from rekey._column_shape(protected.id) s;
  if protected.index_place is null or v_shape.relation is null then
    return;
  end if;
  select * into v_index from rekey._blind_indexes b where b.column_id = protected.id;
  return query
    select f.kind, f.severity, f.finding, f.advice
    from (values
      (v_index.filled is not true and not exists (select from rekey.rotations r where r.keyring_id = protected.keyring_id and rekey._is_under_way(r.state)),
        'index', 'warning', 'its blind index is not filled, and nobody fills it', v_again),
      (v_index.text_version <> rekey._text_version(protected.normalization), 'index', 'critical',
        'Unicode, or the collation of the database, is not as it was when its blind index was filled: equal values may not be found', v_again),
      (not exists (
        select from pg_index i where i.indrelid = v_shape.relation and i.indisvalid and i.indkey[0] = v_shape.attnums[protected.index_place]),
        'index', 'warning', format('no index begins with %I: a search reads the whole table', protected.index_column),
        format('create index concurrently on %s (%I)', v_shape.relation, protected.index_column)),
      (exists (
        select from pg_index i
        where i.indrelid in (select v_shape.relation union select h from rekey._relations_here(v_shape.relation) h) and i.indisunique and not i.indimmediate
          and exists (select from pg_attribute a where a.attrelid = i.indrelid and a.attname = protected.index_column and a.attnum = any (i.indkey::smallint[]))),
        'index', 'critical', format('a unique constraint on %I is deferrable: it does not see a row that stands on another key version', protected.index_column),
        'Make it NOT DEFERRABLE.'),
      (exists (
        select from rekey._index_bodies(protected, v_shape.relation, v_shape.attnums) b
        where b.language <> 'sql' and not exists (
          select from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = b.name and p.prosrc = b.body)),
        'index', 'warning', 'the functions of its blind index are not as this version of pg_rekey makes them, or a column was renamed', v_again)
    ) as f(found, kind, severity, finding, advice)
    where f.found;
end
$$;
comment on function rekey._index_findings is 'What is not as it should be with the blind index of a searchable column: not filled, stale, without an index, a deferrable constraint, functions that are behind.';
