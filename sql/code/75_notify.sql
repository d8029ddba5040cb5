-- Somebody is told. The audit log is the outbox: what it tells of, it tells in the same transaction, and its numbers are given
-- in the order of the commits, under the lock of its head. So whoever has read up to a number has missed nothing before it, and
-- an event costs nothing more, and cannot fail, because somebody is to be told. What lasts (a rotation that is held up, a KEK
-- that is missing) is told of once while it does.

create or replace function rekey._utc(at timestamptz) returns text
language sql stable
return to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
comment on function rekey._utc is 'A time as messages have it.';

create or replace function rekey._told_events() returns text[]
language sql immutable parallel safe
return '{rotation.completed,rotation.failed,rotation.blocked,rotation.row_failed,keyring.overdue,key.compromised,key.destruction_due,kek.lost,kek.missing,kek.back,worker.silent,worker.back,test}'::text[];
comment on function rekey._told_events is 'What endpoints can be told of.';

create or replace function rekey._endpoint_aad(kek_id integer, endpoint_id integer) returns bytea
language sql stable parallel safe
return rekey._part('endpoint') || rekey._part(endpoint_id::text) || rekey._part(kek_id::text);
comment on function rekey._endpoint_aad is 'What the sealed address of an endpoint is bound to.';

create or replace function rekey._refuse_endpoint(problem text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if problem is not null then
    raise exception '%', problem using errcode = 'invalid_parameter_value',
      hint = 'An address is https://..., smtps://USER:PASSWORD@HOST?from=...&to=..., smtp:// the same with STARTTLS, or notify:CHANNEL.';
  end if;
end
$$;
comment on function rekey._refuse_endpoint is 'Raises 22023 for a problem, NULL: none. The address is in no message.';

-- Plain values go through plain assignments here, and the address is in no statement: see 31_kek.sql.
create or replace function rekey.add_endpoint(
  name text, address text, events text[] = null, slack boolean = false, allow_private boolean = false, by_pg_net boolean = false
) returns text
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kind text;
  v_problem text;
  v_channel text;
  v_secret text;
  v_wrapping bytea;
  v_kek_id integer;
  v_id integer;
  v_iv bytea;
  v_bytes bytea;
  v_aad bytea;
  v_sealed bytea;
begin
  v_kind := case
    when address ~ '^notify:' then 'channel'
    when address ~ '^smtps?://' then 'email'
    when slack then 'slack'
    else 'webhook' end;
  v_problem := case
    when name !~ '^[A-Za-z0-9._-]{1,63}$' or name is null then 'the name of an endpoint has 1 to 63 of: letters, digits, . _ -'
    when not events <@ rekey._told_events() or cardinality(events) = 0 then
      'there is no such event: there are ' || array_to_string(rekey._told_events(), ', ')
    when octet_length(address) > 2048 or address !~ '^[!-~]+$' or address is null then 'the address has more than 2048 characters, or others than those of a URL'
    when v_kind = 'channel' and address !~ '^notify:[a-z_][a-z0-9_]{0,62}$' then 'a channel has 1 to 63 of: a-z, 0-9, _'
    when v_kind = 'email' and address !~ '^smtps?://[^/?#]+/?\?([^#]*&)?to=[^&#]' then 'an address for e-mail has ?from=...&to=...'
    when v_kind in ('webhook', 'slack') and address !~ '^https://[^/?#@]+([/?#]|$)' and not (allow_private and address ~ '^http://[^/?#@]+([/?#]|$)')
      then 'a webhook has an https:// address, without a user'
    when (v_kind = 'slack') <> slack then 'only a webhook has the shape that Slack takes'
    when by_pg_net and (v_kind not in ('webhook', 'slack') or allow_private) then
      'pg_net sends webhooks only, and cannot look at what addresses they go to'
    when by_pg_net and address !~ '^https://[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z][A-Za-z0-9-]+(:[0-9]+)?([/?#]|$)' then
      'pg_net takes the name of a host, with its domain'
  end;
  perform rekey._refuse_endpoint(v_problem);
  v_channel := case when v_kind = 'channel' then substr(address, 8) end;
  v_id := nextval('rekey._endpoints_id_seq');
  if v_kind <> 'channel' then
    select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
    perform rekey._lock_kek();
    -- It may have been replaced while this waited for the lock.
    select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
    v_wrapping := rekey._wrapping_key(v_wrapping);
    v_bytes := rekey._random_bytes(32);
    v_secret := 'whsec_' || encode(v_bytes, 'base64');
    v_bytes := convert_to(v_secret || ' ' || address, 'UTF8');
    v_iv := rekey._random_bytes(16);
    v_aad := rekey._endpoint_aad(v_kek_id, v_id);
    v_sealed := v_iv || rekey._aead_encrypt(v_wrapping, v_iv, v_bytes, v_aad);
  end if;
  begin
    insert into rekey._endpoints (id, name, kind, events, allow_private, by_pg_net, channel, sealed, kek_id)
    values (v_id, add_endpoint.name, v_kind, add_endpoint.events, add_endpoint.allow_private, add_endpoint.by_pg_net, v_channel, v_sealed, v_kek_id);
  exception when unique_violation then
    raise exception 'there is an endpoint % already', quote_literal(name) using errcode = 'unique_violation',
      hint = 'select rekey.remove_endpoint(...) first, or take another name.', constraint = 'remove_endpoint';
  end;
  -- What was before is not told of. Locked where it is there: who removes the last endpoint has to see this one.
  insert into rekey._notifier as n (audit_id, home) select coalesce(max(h.id), 0), rekey._home() from rekey._audit_head h
  on conflict (singleton) do update set audit_id = n.audit_id;
  perform rekey._audit('endpoint.added', details => jsonb_build_object('name', name, 'kind', v_kind, 'events', to_jsonb(events),
    'allow_private', nullif(allow_private, false), 'by_pg_net', nullif(by_pg_net, false)));
  return case when v_kind = 'webhook' then v_secret end;
end
$$;
comment on function rekey.add_endpoint is
  'Has somebody told what happens. address: https://... (a webhook as Standard Webhooks has it; the signing secret is returned, once), smtps://USER:PASSWORD@HOST:465?from=...&to=... (e-mail; smtp:// with STARTTLS; several to=), or notify:CHANNEL (NOTIFY in this database). It is stored under the KEK; a statement that has it as a literal may be logged, as with rekey.set_secret(). events: only these; NULL: all. slack: the body is what incoming webhooks of Slack take. allow_private: it may be a loopback or private address, and there without TLS. by_pg_net: rekey.tick() hands it to pg_net, where that is; pg_net keeps the address in its own tables in plain, and looks at no addresses. 22023: it cannot be; 23505: there is one of that name; RK001, RK002: KEK.';
grant execute on function rekey.add_endpoint to rekey_admin;

create or replace function rekey._endpoint(name text) returns rekey._endpoints
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint rekey._endpoints;
begin
  select * into v_endpoint from rekey._endpoints e where e.name = _endpoint.name;
  if not found then
    raise exception 'no such endpoint: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.endpoint_status for those that there are.', constraint = 'endpoints';
  end if;
  return v_endpoint;
end
$$;
comment on function rekey._endpoint is 'An endpoint by its name. RK007: there is none.';

create or replace function rekey.remove_endpoint(name text) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id integer := (rekey._endpoint(name)).id;
begin
  perform from rekey._notifier for update;
  delete from rekey._endpoints e where e.id = v_id;
  delete from rekey._notifications n where n.endpoint_id = v_id;
  if not exists (select from rekey._endpoints) then
    delete from rekey._notifier n where n.singleton;
    delete from rekey._told t where t.event is not null;
  end if;
  perform rekey._audit('endpoint.removed', details => jsonb_build_object('name', name));
end
$$;
comment on function rekey.remove_endpoint is 'Has nobody told there any more; messages that wait are dropped. RK007: there is no such endpoint.';
grant execute on function rekey.remove_endpoint to rekey_admin;

create or replace function rekey._message_text(event text, subject jsonb, count integer) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return case event
    when 'rotation.completed' then format('Rotation %s of keyring %s completed (rows: %s%s)', subject ->> 'rotation', subject ->> 'keyring',
      subject ->> 'rows', case when (subject ->> 'failures')::bigint > 0 then format(', in quarantine: %s', subject ->> 'failures') else '' end)
    when 'rotation.failed' then format('Rotation %s of keyring %s failed', subject ->> 'rotation', subject ->> 'keyring')
    when 'rotation.blocked' then format('Rotation %s of keyring %s has been held up since %s', subject ->> 'rotation', subject ->> 'keyring', subject ->> 'since')
    when 'rotation.row_failed' then format('Keyring %s has rows in quarantine, which do not open, or which their table refused (rows: %s)', subject ->> 'keyring', subject ->> 'rows')
    when 'keyring.overdue' then format('Keyring %s should have been rotated at %s', subject ->> 'keyring', subject ->> 'since')
    when 'key.compromised' then format('Version %s of keyring %s was marked as compromised', subject ->> 'version', subject ->> 'keyring')
    when 'key.destruction_due' then format('Version %s of keyring %s is to be destroyed after %s: until then that can be cancelled',
      subject ->> 'version', subject ->> 'keyring', subject ->> 'destroy_after')
    when 'kek.lost' then format('KEK %s was declared lost', subject ->> 'version')
    when 'kek.missing' then format('The worker has been without the KEK since %s: nothing is rotated', subject ->> 'since')
    when 'kek.back' then 'The worker has the KEK again'
    when 'worker.silent' then format('No worker has ticked since %s: nothing is rotated', subject ->> 'since')
    when 'worker.back' then 'A worker ticks again'
    when 'test' then 'A test: messages of this database get here'
  end || case when count > 1 then format('; and %s more like this', count - 1) else '' end;
comment on function rekey._message_text is 'An event in a sentence, by the first one of so many. Keyrings by name, rows by number; nothing that somebody else wrote.';

create or replace function rekey._message_body(kind text, event text, count integer, subjects jsonb) returns text
language sql stable
set search_path = pg_catalog, pg_temp
return (
  select case when kind = 'slack' then
      -- Slack reads these three as its own.
      jsonb_build_object('text', replace(replace(replace(format('pg_rekey, database %s: %s.', current_database(), t.text), '&', '&amp;'), '<', '&lt;'), '>', '&gt;'))
    else jsonb_build_object('type', event, 'timestamp', rekey._utc(clock_timestamp()),
      'data', jsonb_build_object('database', current_database(), 'text', t.text, 'count', count, 'subjects', coalesce(subjects, '[]'))) end
  from (select rekey._message_text(event, subjects -> 0, count) as text) t)::text;
comment on function rekey._message_body is 'The body of a message: what is signed, byte by byte.';

-- Messages that wait are 1000 at most for each endpoint: who is away for so long reads the audit log.
create or replace function rekey._enqueue(event text, count integer, subjects jsonb) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into rekey._notifications (endpoint_id, event, body, state, ended_at, last_error)
  select e.id, _enqueue.event, rekey._message_body(e.kind, _enqueue.event, _enqueue.count, subjects),
    case when w.full then 'dead' else 'waiting' end, case when w.full then clock_timestamp() end, case when w.full then 'too many were waiting' end
  from rekey._endpoints e
  cross join lateral (
    select count(*) >= 1000 as full from rekey._notifications n where n.endpoint_id = e.id and n.state = 'waiting') w
  where e.events is null or _enqueue.event = any (e.events);
end
$$;
comment on function rekey._enqueue is 'Puts a message into the queue of every endpoint that wants events like this. count: how many there were; subjects: the first ones.';

create or replace function rekey._leave_original() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update rekey._notifier n set home = rekey._home(), audit_id = (select coalesce(max(h.id), 0) from rekey._audit_head h) where n.home <> rekey._home();
  if found then
    update rekey._notifications n set state = 'dead', ended_at = clock_timestamp(), last_error = 'it is of the database that this one was copied from'
    where n.state = 'waiting';
  end if;
end
$$;
comment on function rekey._leave_original is 'In a copy of a database, once: what happened before, and what waits, the original tells of.';

create or replace function rekey.test_endpoint(name text) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint rekey._endpoints := rekey._endpoint(name);
  v_id bigint;
begin
  perform rekey._leave_original();
  insert into rekey._notifications (endpoint_id, event, body)
  values (v_endpoint.id, 'test', rekey._message_body(v_endpoint.kind, 'test', 1, '[]')) returning id into v_id;
  return v_id;
end
$$;
comment on function rekey.test_endpoint is 'Puts a test into the queue of an endpoint, whatever its filter; returns the number of the message in rekey.message_status. RK007: there is no such endpoint.';
grant execute on function rekey.test_endpoint to rekey_admin;

create or replace function rekey._conditions() returns table (event text, subject text, data jsonb)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- (Times that are to come were noted by a clock that was wrong.)
  select 'rotation.blocked', r.id::text,
    jsonb_build_object('rotation', r.id, 'keyring', k.name, 'version', r.to_version, 'since', rekey._utc(r.blocked_since))
  from rekey.settings s
  join rekey.rotations r on r.state in ('queued', 'running', 'verifying') and not r.blocked_since between clock_timestamp() - s.notify_blocked and clock_timestamp() + s.notify_blocked
  join rekey.keyrings k on k.id = r.keyring_id
  union all
  select 'rotation.row_failed', format('%s/%s', f.keyring_id, f.rotation_id),
    jsonb_strip_nulls(jsonb_build_object('rotation', f.rotation_id, 'keyring', k.name, 'rows', f.rows))
  from (select o.keyring_id, o.rotation_id, count(*) as rows from rekey.rotation_failures o where o.resolved_at is null group by 1, 2) f
  join rekey.keyrings k on k.id = f.keyring_id
  union all
  select 'keyring.overdue', s.keyring, jsonb_build_object('keyring', s.keyring, 'since', rekey._utc(s.next_rotation_at))
  from rekey.schedule_status s where s.overdue
  union all
  select 'key.destruction_due', format('%s/%s', e.id, rekey._utc(e.destroy_after)),
    jsonb_build_object('keyring', k.name, 'version', e.version, 'destroy_after', rekey._utc(e.destroy_after))
  from rekey.settings s
  join rekey.encryption_keys e on e.state = 'destroy_scheduled' and e.destroy_after < clock_timestamp() + s.notify_destruction
  join rekey.keyrings k on k.id = e.keyring_id
  union all
  -- Where pg_cron has no KEK, it says so at each rotation until the worker that has it comes.
  select 'kek.missing', '', jsonb_build_object('since', rekey._utc(w.locked_since))
  from rekey.settings s join rekey._worker w on not w.locked_since between clock_timestamp() - s.notify_silent and clock_timestamp() + s.notify_silent
  union all
  select 'worker.silent', '', jsonb_build_object('since', rekey._utc(t.at))
  from rekey.settings s
  cross join rekey._notifier n
  cross join lateral (select coalesce(max(w.last_tick_at), n.since) as at from rekey._worker w) t
  where not t.at between clock_timestamp() - s.notify_silent and clock_timestamp() + s.notify_silent
    -- A worker that reads a large table holds a lock of a step, or of a census, meanwhile.
    and not exists (
      select from pg_locks l
      where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and (l.classid = 0 and l.objid in (1, 2, 5, 6) or l.classid = 4294967295)
        and l.database = (select d.oid from pg_database d where d.datname = current_database()));
end;
comment on function rekey._conditions is 'What lasts now and is worth a message: rotations that are held up, open failures, overdue keyrings, destructions that come near, no KEK, no worker.';

create or replace function rekey._prune_notifications() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from rekey._notifications n
  where n.state <> 'waiting' and n.id <= (
      select o.id from rekey._notifications o where o.endpoint_id = n.endpoint_id and o.state <> 'waiting' order by o.id desc offset 1000 limit 1)
    or not exists (select from rekey._endpoints e where e.id = n.endpoint_id);
end
$$;
comment on function rekey._prune_notifications is 'Keeps the last 1000 messages of each endpoint that do not wait.';

create or replace function rekey._collect_notifications() returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_read bigint;
  v_head bigint;
  v_message record;
  v_over text[];
  v_new boolean := false;
begin
  perform rekey._leave_original();
  -- Who finds it locked leaves it to whoever is at it.
  select n.audit_id into v_read from rekey._notifier n for update skip locked;
  if not found then
    return null;
  end if;
  select coalesce(max(h.id), 0) into v_head from rekey._audit_head h;
  for v_message in
    select e.event, count(*)::integer as count, jsonb_agg(e.subject order by e.id) filter (where e.place <= 10) as subjects
    from (
      select a.id, a.event, row_number() over (partition by a.event order by a.id) as place,
        jsonb_strip_nulls(jsonb_build_object('rotation', a.rotation_id, 'keyring', a.keyring, 'version', a.version,
          'rows', a.details -> 'rows', 'failures', a.details -> 'failures')) as subject
      from rekey.audit_log a
      where a.id > v_read and a.id <= v_head and a.event in ('rotation.completed', 'rotation.failed', 'key.compromised', 'kek.lost')
    ) e
    group by e.event
    order by min(e.id)
  loop
    perform rekey._enqueue(v_message.event, v_message.count, v_message.subjects);
    v_new := true;
  end loop;
  if v_head > v_read then
    update rekey._notifier set audit_id = v_head where singleton;
  end if;
  with over as (
    delete from rekey._told t
    where not exists (select from rekey._conditions() c where c.event = t.event and c.subject = t.subject)
    returning t.event
  )
  select array_agg(o.event) into v_over from over o;
  for v_message in
    select b.event from (values ('kek.missing', 'kek.back'), ('worker.silent', 'worker.back')) as b (over, event) where b.over = any (v_over)
  loop
    perform rekey._enqueue(v_message.event, 1, '[]');
    v_new := true;
  end loop;
  for v_message in
    with now as materialized (
      select c.event, c.subject, c.data from rekey._conditions() c
    ), told as (
      insert into rekey._told (event, subject) select n.event, n.subject from now n on conflict do nothing returning event, subject
    )
    select p.event, count(*)::integer as count, jsonb_agg(p.data order by p.place) filter (where p.place <= 10) as subjects
    from (
      select n.event, n.data, row_number() over (partition by n.event order by n.subject) as place
      from told t join now n on n.event = t.event and n.subject = t.subject
    ) p
    group by p.event
    order by p.event
  loop
    perform rekey._enqueue(v_message.event, v_message.count, v_message.subjects);
    v_new := true;
  end loop;
  if v_new then
    perform rekey._prune_notifications();
  end if;
  for v_message in
    update rekey._notifications n set state = 'delivered', attempts = n.attempts + 1, ended_at = clock_timestamp()
    from rekey._endpoints e
    where e.id = n.endpoint_id and e.kind = 'channel' and n.state = 'waiting'
    returning e.channel, n.body
  loop
    perform pg_notify(v_message.channel, v_message.body);
  end loop;
  -- Whoever noted nothing of the last attempt came to an end within it.
  update rekey._notifications n
  set state = 'dead', ended_at = clock_timestamp(), last_error = coalesce(n.last_error, 'whoever sent it came to an end each time')
  where n.state = 'waiting' and n.attempts >= 12 and n.next_attempt_at < clock_timestamp();
  return (select 'deliver' from rekey._notifications n where n.state = 'waiting' limit 1);
end
$$;
comment on function rekey._collect_notifications is 'Makes messages of what happened and lasts, and sends those to channels; deliver: some wait for somebody to deliver them; NULL: none.';

-- From here on: who delivers. A claim is a lease: whoever is killed between sending and noting leaves a message that is sent
-- again, by the same number, once its pause is over.

create or replace function rekey._open_endpoints() returns table (id integer, name text, kind text, allow_private boolean, by_pg_net boolean, opened text)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kek_id integer;
  v_wrapping bytea;
  v_endpoint record;
  v_iv bytea;
  v_bytes bytea;
  v_aad bytea;
begin
  select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_endpoint in select e.id, e.name, e.kind, e.allow_private, e.by_pg_net, e.sealed from rekey._endpoints e where e.kek_id = v_kek_id order by e.id loop
    v_iv := substr(v_endpoint.sealed, 1, 16);
    v_bytes := substr(v_endpoint.sealed, 17);
    v_aad := rekey._endpoint_aad(v_kek_id, v_endpoint.id);
    v_bytes := rekey._aead_decrypt(v_wrapping, v_iv, v_bytes, v_aad);
    if v_bytes is not null then
      id := v_endpoint.id;
      name := v_endpoint.name;
      kind := v_endpoint.kind;
      allow_private := v_endpoint.allow_private;
      by_pg_net := v_endpoint.by_pg_net;
      opened := convert_from(v_bytes, 'UTF8');
      return next;
    end if;
  end loop;
end
$$;
comment on function rekey._open_endpoints is 'The endpoints, with signing secret and address, separated by a blank, for who delivers. Those that do not open are left out. RK001, RK002: KEK.';
grant execute on function rekey._open_endpoints to rekey_operator;

create or replace function rekey._claim_message(endpoints integer[])
returns table (id bigint, message_id uuid, endpoint_id integer, event text, body text, attempts integer)
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._notifications n
  set attempts = n.attempts + 1, request_id = null,
    next_attempt_at = clock_timestamp() + ('{1 min,2 min,5 min,15 min,30 min,1 h,3 h,6 h}'::interval[])[least(n.attempts + 1, 8)]
  where n.id = (
    select w.id from rekey._notifications w
    where w.state = 'waiting' and w.endpoint_id = any (_claim_message.endpoints)
      -- (A time further away was noted by a clock that was wrong.)
      and not w.next_attempt_at between clock_timestamp() and clock_timestamp() + interval '6 hours'
    -- Somebody waits for what becomes of a test.
    order by w.event <> 'test', w.next_attempt_at, w.id limit 1 for update skip locked)
  returning n.id, n.message_id, n.endpoint_id, n.event, n.body, n.attempts;
end;
comment on function rekey._claim_message is 'The next message to one of these endpoints, which nobody else gets before its pause is over; none: nothing is due.';
grant execute on function rekey._claim_message to rekey_operator;

create or replace function rekey._note_delivery(id bigint, error text = null) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint integer;
begin
  update rekey._notifications n
  set state = case when error is null then 'delivered' when n.attempts >= 12 then 'dead' else 'waiting' end,
    ended_at = case when error is null or n.attempts >= 12 then clock_timestamp() end,
    last_error = rekey._cut(error, 255), request_id = null
  where n.id = _note_delivery.id and n.state = 'waiting'
  returning n.endpoint_id into v_endpoint;
  if error is not null then
    -- The others wait too: who does not answer is asked once a minute.
    update rekey._notifications n set next_attempt_at = clock_timestamp() + interval '1 minute'
    where n.id in (
      select w.id from rekey._notifications w
      where w.endpoint_id = v_endpoint and w.state = 'waiting' and w.next_attempt_at < clock_timestamp() + interval '1 minute'
      for update skip locked);  -- two that fail at once do not wait for each other
  end if;
end
$$;
comment on function rekey._note_delivery is 'Notes what came of a message; error NULL: it was delivered. After 12 attempts, in a day, it is given up.';
grant execute on function rekey._note_delivery to rekey_operator;

create or replace function rekey._pg_net_requests() returns table (id bigint, url text, headers jsonb, body jsonb)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint record;
  v_message record;
  v_key bytea;
  v_at text;
  v_signed bytea;
begin
  for v_endpoint in select o.id, o.opened from rekey._open_endpoints() o where o.by_pg_net loop
    v_key := decode(substr(split_part(v_endpoint.opened, ' ', 1), 7), 'base64');
    url := split_part(v_endpoint.opened, ' ', 2);
    for v_place in 1 .. 20 loop
      select * into v_message from rekey._claim_message(array[v_endpoint.id]);
      exit when not found;
      id := v_message.id;
      body := v_message.body::jsonb;
      v_at := extract(epoch from clock_timestamp())::bigint::text;
      v_signed := convert_to('msg_' || v_message.message_id || '.' || v_at || '.' || v_message.body, 'UTF8');
      v_signed := rekey._sign(v_key, v_signed);
      headers := jsonb_build_object('Content-Type', 'application/json', 'webhook-id', 'msg_' || v_message.message_id,
        'webhook-timestamp', v_at, 'webhook-signature', 'v1,' || encode(v_signed, 'base64'));
      return next;
    end loop;
  end loop;
end
$$;
comment on function rekey._pg_net_requests is 'What pg_net is to send now, signed. RK001, RK002: KEK.';
grant execute on function rekey._pg_net_requests to rekey_operator;

create or replace function rekey._note_request(id bigint, request_id bigint) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
  update rekey._notifications n set request_id = _note_request.request_id where n.id = _note_request.id and n.state = 'waiting';
end;
comment on function rekey._note_request is 'Notes the number that pg_net gave a message.';
grant execute on function rekey._note_request to rekey_operator;

-- Runs with the caller's rights: pg_net is whose it is.
create or replace function rekey._post_by_pg_net() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_statuses integer[];
  v_sent record;
  v_request bigint;
begin
  if not exists (select from rekey.endpoint_status e where e.by_pg_net and e.waiting > 0)
     or rekey._trusted_function('pg_net', 'net.http_post(text,jsonb,jsonb,jsonb,integer)') is null
     or rekey._trusted_relation('pg_net', 'net', '_http_response', 0) is null then
    return;
  end if;
  execute format($sql$
    select array_agg(m.id order by m.id), array_agg(r.status_code order by m.id)
    from rekey.message_status m join %I._http_response r on r.id = m.request_id where m.state = 'waiting'$sql$, 'net')
    into v_ids, v_statuses;
  for v_place in 1 .. coalesce(cardinality(v_ids), 0) loop
    perform rekey._note_delivery(v_ids[v_place], case when v_statuses[v_place] between 200 and 299 then null
      else coalesce('HTTP status ' || v_statuses[v_place], 'no answer') end);
  end loop;
  begin
    for v_sent in select p.* from rekey._pg_net_requests() p loop
      begin
        execute format('select %I.http_post(url => $1, headers => $2, body => $3, timeout_milliseconds => 10000)', 'net')
          into v_request using v_sent.url, v_sent.headers, v_sent.body;
        perform rekey._note_request(v_sent.id, v_request);
      exception when others then
        perform rekey._note_delivery(v_sent.id, 'pg_net refused it: ' || sqlstate);
      end;
    end loop;
  exception when sqlstate 'RK001' or sqlstate 'RK002' then
    null;  -- somebody who has the KEK delivers
  end;
exception when insufficient_privilege then
  null;  -- somebody who may use pg_net does
end
$$;
comment on function rekey._post_by_pg_net is 'Hands messages to pg_net, where that is, and notes what came of those before, with the rights of the caller.';
grant execute on function rekey._post_by_pg_net to rekey_operator;

create or replace view rekey.endpoint_status as
select e.name, e.kind, e.events, e.allow_private, e.by_pg_net, e.created_at, n.waiting, n.dead, n.last_delivered_at, n.failing_since, n.last_error,
  case when e.kek_id is not null and k.state <> 'active' then 'its address is under a KEK that is not active any more' end as problem
from rekey._endpoints e
left join rekey.keks k on k.id = e.kek_id
cross join lateral (
  select count(*) filter (where m.state = 'waiting') as waiting, count(*) filter (where m.state = 'dead') as dead,
    max(m.ended_at) filter (where m.state = 'delivered') as last_delivered_at,
    min(m.created_at) filter (where m.state = 'waiting' and m.last_error is not null) as failing_since,
    (array_agg(m.last_error order by m.id desc) filter (where m.state = 'waiting' and m.last_error is not null))[1] as last_error
  from rekey._notifications m where m.endpoint_id = e.id) n;
comment on view rekey.endpoint_status is 'Who is told what happens, and whether that works. Addresses are not shown.';
comment on column rekey.endpoint_status.name is 'Name of the endpoint.';
comment on column rekey.endpoint_status.kind is 'webhook, slack, email or channel.';
comment on column rekey.endpoint_status.events is 'Events that it is told of; NULL: all.';
comment on column rekey.endpoint_status.allow_private is 'Whether its address may be a loopback or private one.';
comment on column rekey.endpoint_status.by_pg_net is 'Whether pg_net may send to it.';
comment on column rekey.endpoint_status.created_at is 'When it was added.';
comment on column rekey.endpoint_status.waiting is 'Messages that wait to be delivered, 1000 at most.';
comment on column rekey.endpoint_status.dead is 'Messages that were given up, of the last 1000.';
comment on column rekey.endpoint_status.last_delivered_at is 'When a message was last delivered.';
comment on column rekey.endpoint_status.failing_since is 'Since when a message that was tried waits; NULL: none does.';
comment on column rekey.endpoint_status.last_error is 'What went wrong with it last; NULL: nothing.';
comment on column rekey.endpoint_status.problem is 'Why its address cannot be opened: remove it and add it again; NULL: it can, by who has the KEK.';
grant select on rekey.endpoint_status to rekey_admin, rekey_operator, rekey_auditor;

create or replace view rekey.message_status as
select n.id, e.name as endpoint, n.event, coalesce(n.body::jsonb #>> '{data,text}', n.body::jsonb ->> 'text') as text, n.created_at, n.state, n.attempts,
  case when n.state = 'waiting' then n.next_attempt_at end as next_attempt_at, n.ended_at, n.last_error, n.message_id, n.request_id
from rekey._notifications n
join rekey._endpoints e on e.id = n.endpoint_id;
comment on view rekey.message_status is 'Messages to endpoints: those that wait, and of each endpoint the last 1000 that were delivered or given up.';
comment on column rekey.message_status.id is 'Number of the message.';
comment on column rekey.message_status.endpoint is 'Endpoint that it goes to.';
comment on column rekey.message_status.event is 'What it tells of.';
comment on column rekey.message_status.text is 'What it says.';
comment on column rekey.message_status.created_at is 'When it was made.';
comment on column rekey.message_status.state is 'waiting, delivered or dead (given up).';
comment on column rekey.message_status.attempts is 'How often it was tried.';
comment on column rekey.message_status.next_attempt_at is 'It is tried again after this time; NULL: it does not wait.';
comment on column rekey.message_status.ended_at is 'When it was delivered or given up.';
comment on column rekey.message_status.last_error is 'What went wrong last.';
comment on column rekey.message_status.message_id is 'What the header webhook-id has, after msg_: the same whenever it is sent again.';
comment on column rekey.message_status.request_id is 'Number that pg_net gave it.';
grant select on rekey.message_status to rekey_admin, rekey_operator, rekey_auditor;
