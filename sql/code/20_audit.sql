-- The audit log: a hash chain. Its head is locked last in a transaction, and briefly.

create or replace function rekey._claims() returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
begin
  if v_claims is null then
    return null;
  end if;
  return case when jsonb_typeof(v_claims::jsonb) = 'object' then v_claims::jsonb else '{}' end;
exception when invalid_text_representation or untranslatable_character then
  return '{}'::jsonb;
end
$$;
comment on function rekey._claims is 'The claims of the JWT as PostgREST passes them on; NULL where there are none, {} where they are no object.';

-- Neither role nor session_user tells the code of a protected table from the worker in whose session it runs. The call
-- stack does: nobody can take a line out of it, and who adds one only loses rights. (Names are quoted in it, where the
-- setting quote_all_identifiers is on.)
-- ANALYZE, REINDEX, REFRESH MATERIALIZED VIEW and autovacuum run what an owner put into his indexes, statistics and views:
-- as the owner, but in the session of whoever maintains the table. PostgreSQL tells by what it refuses then. UNLISTEN is
-- one of these statements, and else does nothing to a channel that nobody listens to.
create or replace function rekey._in_foreign_code() returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stack text;
begin
  if current_setting('standard_conforming_strings') = 'off' then
    raise exception 'standard_conforming_strings is off: PL/pgSQL would read every backslash as an escape' using errcode = 'RK005',
      hint = 'Set standard_conforming_strings to on.';
  end if;
  get diagnostics v_stack = pg_context;
  -- Few stacks have one of the names in them: asking for those is quick, the expression is not.
  if (strpos(v_stack, '_call_') > 0 or strpos(v_stack, '_look') > 0 or strpos(v_stack, 'search_step') > 0 or strpos(v_stack, 'find_envelopes') > 0)
    and v_stack ~ '\mrekey"?\."?(_call_(count|scan|read|write|tenant_check)|search_step|_look|_look_ahead|find_envelopes)"?\(' then
    return true;
  end if;
  begin
    unlisten pg_rekey;
  exception when insufficient_privilege then
    return true;
  end;
  return false;
end
$$;
comment on function rekey._in_foreign_code is 'Whether code of somebody else is running in this session: of a protected table, or tenant_check, called by a dispatcher; or of a table, index or view that is being maintained.';

create or replace function rekey._caller() returns name
language sql volatile
return case when rekey._in_foreign_code() then 'rekey_sweeper' else coalesce(nullif(current_setting('role'), 'none'), session_user) end;
comment on function rekey._caller is 'The role that calls, seen from inside a SECURITY DEFINER function: the one set with SET ROLE, else the one that logged in. rekey_sweeper, which may nothing, in code of somebody else.';

create or replace function rekey._audit_hash(entry rekey.audit_log) returns bytea
language sql stable
return sha256(
  entry.prev_hash || rekey._part(entry.id::text)
  || rekey._part(to_char(entry.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'))
  || rekey._part(entry.actor) || rekey._part(entry.role) || rekey._part(entry.jwt_subject) || rekey._part(entry.event)
  || rekey._part(entry.keyring) || rekey._part(entry.version::text) || rekey._part(entry.rotation_id::text)
  || rekey._part(entry.details::text));
comment on function rekey._audit_hash is 'The hash of an audit entry (docs/format.md).';

create or replace function rekey._cut(value text, bytes integer) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case
  when octet_length(value) <= bytes then value
  -- A character has 4 bytes at most, whatever the encoding: so many fit for sure.
  when octet_length(left(value, bytes - 3)) <= bytes - 3 then left(value, bytes - 3) || '...'
  else left(value, (bytes - 3) / 4) || '...'
end;
comment on function rekey._cut is 'A text of at most so many bytes: what is longer ends with "...".';

-- However long a reason, an error or a name is, an entry stays small: nobody fills the disk with a few of them.
create or replace function rekey._cut_details(details jsonb) returns jsonb
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case
  when octet_length(details::text) <= 1024 then details
  when jsonb_typeof(details) <> 'object' or (select count(*) > 16 or max(octet_length(k)) > 63 from jsonb_object_keys(details) k)
    then jsonb_build_object('cut', rekey._cut(details::text, 1024))
  else (
    select jsonb_object_agg(d.key, case
      when octet_length(d.value::text) <= 1024 then d.value
      when jsonb_typeof(d.value) = 'string' then to_jsonb(rekey._cut(d.value #>> '{}', 1024))
      else to_jsonb(rekey._cut(d.value::text, 1024)) end)
    from jsonb_each(details) d)
end;
comment on function rekey._cut_details is 'Details of an audit entry, bounded: each text of 1024 bytes at most, what else is longer as the beginning of its text; more than 16 fields, or a field name over 63 bytes, as one text.';

create or replace function rekey._subject() returns text
language sql stable
set search_path = pg_catalog, pg_temp
return rekey._cut(rekey._claims() ->> 'sub', 255);
comment on function rekey._subject is 'The subject of the JWT as the audit log has it.';

create or replace function rekey._requester() returns text
language sql stable
set search_path = pg_catalog, pg_temp
return concat(rekey._subject() || ' as ', rekey._caller());
comment on function rekey._requester is 'Who asks for a rotation: the role that calls; before it the subject of the JWT, where there is one.';

create or replace function rekey._audit_all(events jsonb) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_head rekey._audit_head;
  v_entry rekey.audit_log;
  v_entries rekey.audit_log[];
  v_event jsonb;
  v_place integer := 0;
begin
  if jsonb_array_length(events) = 0 then
    return;
  end if;
  if rekey._in_foreign_code() then
    raise exception 'code of a table may not do what is audited' using errcode = 'insufficient_privilege',
      hint = 'The entry would name whoever works on the rotation, or maintains the table.';
  end if;
  -- A crash may not take back what was told to somebody: the key of an envelope that was handed out, the end of a rotation, a checkpoint.
  if current_setting('synchronous_commit') in ('off', 'local', 'remote_write') then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  insert into rekey._audit_head (id, hash) values (0, sha256('pg_rekey/v1/audit')) on conflict do nothing;
  select * into strict v_head from rekey._audit_head for update;
  v_entry.actor := session_user;
  v_entry.role := current_setting('role');
  v_entry.jwt_subject := rekey._subject();
  for v_event in select e.value from jsonb_array_elements(events) with ordinality e(value, place) order by e.place loop
    v_place := v_place + 1;
    v_entry.id := v_head.id + v_place;
    v_entry.at := clock_timestamp();
    v_entry.event := v_event ->> 'event';
    v_entry.keyring := rekey._cut(v_event ->> 'keyring', 255);
    v_entry.version := (v_event ->> 'version')::integer;
    v_entry.rotation_id := (v_event ->> 'rotation_id')::bigint;
    v_entry.details := coalesce(rekey._cut_details(v_event -> 'details'), '{}');
    v_entry.prev_hash := v_head.hash;
    v_entry.hash := rekey._audit_hash(v_entry);
    v_head.hash := v_entry.hash;
    v_entries[v_place] := v_entry;
  end loop;
  insert into rekey.audit_log select e.* from unnest(v_entries) e;
  update rekey._audit_head set id = v_entry.id, hash = v_entry.hash where singleton;
end
$$;
comment on function rekey._audit_all is 'Adds entries to the audit log: an array of objects with event, keyring, version, rotation_id and details. What is long in them is cut. The transaction is on disk, and on synchronous standbys, when it ends, whatever synchronous_commit is in the session.';

create or replace function rekey._audit(
  event text, keyring text = null, version integer = null, rotation_id bigint = null, details jsonb = '{}'
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform rekey._audit_all(jsonb_build_array(jsonb_build_object(
    'event', _audit.event, 'keyring', _audit.keyring, 'version', _audit.version,
    'rotation_id', _audit.rotation_id, 'details', jsonb_strip_nulls(_audit.details))));
end
$$;
comment on function rekey._audit is 'Adds one entry to the audit log.';

create or replace function rekey._refuse_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Nothing is ever taken out of this table.';
end
$$;
comment on function rekey._refuse_change is 'Trigger: refuses every statement it is set on (42501).';

-- What tells the function is a row that only it and the owner can write: a setting would be anybody's.
create or replace function rekey._refuse_audit_change() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'DELETE' and exists (select from rekey._audit_head h where h.pruning = pg_current_xact_id()) then
    return null;
  end if;
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Only rekey.prune_audit_log() takes something out of this table.', constraint = 'export';
end
$$;
comment on function rekey._refuse_audit_change is 'Trigger of the audit log: refuses every change (42501) but the removal by rekey.prune_audit_log().';

create or replace trigger audit_log_append_only before update or delete or truncate on rekey.audit_log
  for each statement execute function rekey._refuse_audit_change();
create or replace trigger encryption_keys_keep before delete or truncate on rekey.encryption_keys
  for each statement execute function rekey._refuse_change();

grant select on rekey.audit_log to rekey_auditor;

create or replace function rekey.audit_checkpoint() returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    'id', coalesce(h.id, 0), 'hash', encode(coalesce(h.hash, sha256('pg_rekey/v1/audit')), 'hex'),
    'entries', (select count(*) from rekey.audit_log),
    'at', to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), 'database', current_database())
  from (select) as one left join rekey._audit_head h on true;
end;
comment on function rekey.audit_checkpoint is
  'The end of the audit log now: number and hash of its last entry, count of its entries. Sign it and keep it elsewhere (pg-rekey audit checkpoint): it is the anchor of rekey.verify_audit_log().';
grant execute on function rekey.audit_checkpoint to rekey_auditor, rekey_operator;

create or replace function rekey._is_kept(event text) returns boolean
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return event like 'key.%' or event like 'kek.%' or event = 'audit.pruned';
comment on function rekey._is_kept is 'Whether entries of this event are never removed from the audit log: what became of keys, and what was removed.';

create or replace function rekey._audit_start(out id bigint, out last bigint, out hash bytea, out kept bigint, out kept_hash text)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select a.id, (a.details ->> 'last')::bigint, decode(a.details ->> 'hash', 'hex'), (a.details ->> 'kept')::bigint, a.details ->> 'kept_hash'
  into id, last, hash, kept, kept_hash
  from rekey.audit_log a
  where a.event = 'audit.pruned'
    -- One that somebody made up counts for nothing, and so is found.
    and a.details ->> 'last' ~ '^\d{1,18}$' and a.details ->> 'hash' ~ '^[0-9a-f]{64}$' and a.details ->> 'kept' ~ '^\d{1,18}$'
  order by a.id desc
  limit 1;
  if not found or last >= id then
    id := null;
    last := 0;
    hash := sha256('pg_rekey/v1/audit');
    kept := 0;
    kept_hash := null;
  end if;
end
$$;
comment on function rekey._audit_start is 'Where the chain begins that is all there: the last audit.pruned, number and hash of the entry that it removed last, and count and hash of the earlier ones that stayed. 0 and the first prev_hash where nothing was removed.';

create or replace function rekey._kept_hash(last bigint, out kept bigint, out hash text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select count(*), encode(sha256(coalesce(string_agg(a.hash, ''::bytea order by a.id), '')), 'hex')
  from rekey.audit_log a
  where a.id <= _kept_hash.last and rekey._is_kept(a.event);
end;
comment on function rekey._kept_hash is 'How many entries up to a number are of those that are never removed, and SHA-256 over their hashes in order.';

create or replace function rekey._first_bad(start bigint, hash bytea, out id bigint, out reason text)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.id, c.why
  from (
    select e.id,
      case
        when e.chained and e.id <> e.place then 'an entry is missing before it'
        when e.chained and e.prev_hash <> e.hash_before then 'it does not follow from the entry before it'
        when e.hash <> e.computed then 'it was changed'
        when not (e.chained or rekey._is_kept(e.event)) then 'it was removed once'
      end as why
    from (
      select a.id, a.event, a.prev_hash, a.hash, rekey._audit_hash(a) as computed, c.chained,
        _first_bad.start + row_number() over chain as place,
        lag(a.hash, 1, _first_bad.hash) over chain as hash_before
      from rekey.audit_log a
      -- Of what stayed from before a removal, each entry proves itself; rekey._kept_hash() proves all of them.
      cross join lateral (select a.id > _first_bad.start or _first_bad.start = 0 as chained) c
      window chain as (partition by c.chained order by a.id)
    ) e
  ) c
  where c.why is not null
  order by c.id
  limit 1;
end;
comment on function rekey._first_bad is 'The first entry of the audit log that is not as it should be, where the chain is all there from the entry after start on.';

create or replace function rekey.verify_audit_log(anchor jsonb = null,
  out valid boolean, out entries bigint, out first_bad bigint, out reason text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_head record;
  v_start record;
  v_kept record;
  v_last bigint;
  v_hash bytea;
  v_anchor bigint;
  v_found bytea;
begin
  if anchor is not null and not coalesce(
       jsonb_typeof(anchor) = 'object' and anchor ->> 'id' ~ '^\d{1,18}$' and anchor ->> 'hash' ~ '^[0-9a-f]{64}$', false) then
    raise exception 'the anchor has no id and hash'
      using errcode = 'invalid_parameter_value', hint = 'Give what rekey.audit_checkpoint() returned.', constraint = 'anchor';
  end if;
  v_start := rekey._audit_start();
  v_kept := rekey._kept_hash(v_start.last);
  select coalesce(h.id, 0) as id, coalesce(h.hash, sha256('pg_rekey/v1/audit')) as hash into v_head
  from (select) as one left join rekey._audit_head h on true;
  select count(*) into entries from rekey.audit_log;
  select b.id, b.reason into first_bad, reason from rekey._first_bad(v_start.last, v_start.hash) b;

  if reason is null and v_start.last > 0 and (v_kept.kept, v_kept.hash) is distinct from (v_start.kept, v_start.kept_hash) then
    first_bad := v_start.id;
    reason := 'the entries before it are not those that stayed when it was written';
  end if;
  select a.id, a.hash into v_last, v_hash from rekey.audit_log a where a.id > v_start.last order by a.id desc limit 1;
  if reason is null and (v_head.id, v_head.hash) is distinct from (coalesce(v_last, v_start.last), coalesce(v_hash, v_start.hash)) then
    first_bad := coalesce(v_last, v_start.last) + 1;
    reason := 'entries are missing at the end';
  end if;
  if reason is null and anchor is not null then
    v_anchor := (anchor ->> 'id')::bigint;
    select a.hash into v_found from rekey.audit_log a where a.id = v_anchor;
    if v_anchor = v_start.last then
      v_found := v_start.hash;
    end if;
    if v_anchor > v_head.id then
      first_bad := v_head.id + 1;
      reason := 'the log ends before the anchor';
    elsif v_anchor >= v_start.last and v_found is null or encode(v_found, 'hex') <> anchor ->> 'hash' then
      first_bad := v_anchor;
      reason := 'the log is not the one that was anchored';
    elsif v_anchor < v_start.last then
      first_bad := v_anchor;
      reason := format('the anchor is older than entry %s, up to which entries were removed: the file that they are in is needed', v_start.last);
    end if;
  end if;
  valid := reason is null;
end
$$;
comment on function rekey.verify_audit_log is
  'Checks the chain of the audit log, from its beginning, or from where rekey.prune_audit_log() removed entries; of those that stayed from before, that they are all there and unchanged. valid: whether it holds; entries: how many there are; first_bad and reason: the first one that does not fit. anchor: an earlier result of rekey.audit_checkpoint(), kept elsewhere; without one, a chain that was computed anew is not found out. An anchor from before the entries that were removed is not valid by itself: pg-rekey audit verify --archive takes the files that these are in. 22023 for an anchor that is none.';
grant execute on function rekey.verify_audit_log to rekey_auditor, rekey_operator;
