-- What PostgREST offers: /rpc/rotate_keys, key_rotation_status, and what an incident needs. The functions in schema public have
-- no rights of their own; being bound early, they need none on schema rekey. What they call decides who may, and answers.

-- PostgREST's login alone is proof: the settings request.*, which tell of a request, are anybody's who can run SQL.
create or replace function rekey._is_postgrest() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
return coalesce((select s.postgrest_login = session_user from rekey.settings s), false);
comment on function rekey._is_postgrest is 'Whether the session is PostgREST''s: of the role that the setting postgrest_login names.';

create or replace function rekey._may_administer() returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := rekey._caller();
  v_claim text;
begin
  if rekey._is_service_role(v_caller) or pg_has_role(v_caller, 'rekey_admin', 'usage') then
    return true;
  end if;
  if v_caller <> 'authenticated' or not rekey._is_postgrest() then
    return false;
  end if;
  select s.jwt_admin_claim into v_claim from rekey.settings s;
  -- Not user_metadata, which users write themselves.
  return coalesce(rekey._claims() -> 'app_metadata' -> v_claim = 'true'::jsonb, false);
end
$$;
comment on function rekey._may_administer is
  'Whether the caller may rotate, and the like, by RPC: service_role, members of rekey_admin, and, in a session of PostgREST, a logged-in user whose app_metadata has the claim that the setting jwt_admin_claim names, with the value true.';

-- Executable by administrators because pg-rekey serve refuses callers of its own, who have no role here.
create or replace function rekey._note_denied(details jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
  v_subject text := rekey._subject();
  v_details jsonb := rekey._cut_details(details);
begin
  if current_setting('transaction_read_only')::boolean then
    return;
  end if;
  -- Looked at again under the lock of the chain: nobody who is refused often holds it more than once a minute.
  for v_try in 1 .. 2 loop
    if (select count(*) >= 60 or bool_or(
          a.actor = session_user and a.role = current_setting('role') and a.jwt_subject is not distinct from v_subject
          and a.details ->> 'client' is not distinct from v_details ->> 'client')
        from rekey.audit_log a
        where a.event = 'access.denied' and a.at between clock_timestamp() - interval '1 minute' and clock_timestamp()) then
      return;
    end if;
    if v_try = 1 then
      perform from rekey._audit_head for update;
    end if;
  end loop;
  perform rekey._audit('access.denied', details => v_details);
exception when lock_not_available then
  return;  -- A refusal does not wait for who holds the chain, and stands without its entry.
end
$$;
comment on function rekey._note_denied is
  'Notes in the audit log that the caller was refused, at most once a minute for each (role, subject of the JWT, and client where details name one) and 60 times for all. Not in a read-only transaction, nor where somebody holds the end of the log for more than a second.';
grant execute on function rekey._note_denied to rekey_admin;

create or replace function rekey._http_status(code text) returns integer
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case code
  when 'RK001' then 503 when 'RK002' then 500 when 'RK003' then 422
  when 'RK004' then 409 when 'RK005' then 409 when 'RK006' then 409 when 'RK007' then 404
  when '42501' then 403 when '22023' then 400
end;
comment on function rekey._http_status is 'The HTTP status for an SQLSTATE of ours; NULL for any other.';

-- An error that is raised would undo the audit entry of a refusal, and PostgREST answers 400 to codes that it does not
-- know. So the error is the answer, in the shape that PostgREST gives errors. A caller without PostgREST gets it raised.
create or replace function rekey._through_postgrest() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
return coalesce(current_setting('request.method', true), '') <> '';
comment on function rekey._through_postgrest is 'Whether PostgREST calls: it says with which HTTP method.';

create or replace function rekey._rpc_problem(code text, message text, hint text) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('response.status', rekey._http_status(code)::text, true);
  return jsonb_build_object('code', code, 'message', message, 'details', null, 'hint', nullif(hint, ''));
end
$$;
comment on function rekey._rpc_problem is 'An error as the answer of a request, with its HTTP status.';

create or replace function rekey._rpc_hint(action text, hint text) returns text
language sql immutable parallel safe
return case
  when action = 'supersede' then 'Wait for it, or let this one take its rows along: "supersede": true.'
  when action = 'create_keyring' then 'key_rotation_status names the keyrings that there are.'
  when action in ('register_kek', 'set_provider', 'unlock') then 'Whoever administers the database makes the KEK available.'
  else nullif(hint, '')
end;
comment on function rekey._rpc_hint is 'A hint in the words of PostgREST''s clients, by the action that it asks for; those of SQL where there are no others.';

create or replace function rekey._rpc_refusal() returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_message text := 'only administrators of keys may do this';
  v_hint text := 'They are service_role, members of rekey_admin, and users whose app_metadata has the claim that the setting jwt_admin_claim names.';
begin
  if not rekey._through_postgrest() then
    raise exception '%', v_message using errcode = 'insufficient_privilege', hint = v_hint;
  end if;
  return rekey._rpc_problem('42501', v_message, v_hint);
end
$$;
comment on function rekey._rpc_refusal is 'The answer to whoever may not: 403 by PostgREST, 42501 else.';

create or replace function rekey._rpc_change(name text, arguments jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rotations jsonb;
  v_passed_by jsonb;
  v_hint text;
  v_action text;
begin
  if not rekey._may_administer() then
    if rekey._is_postgrest() then
      perform rekey._note_denied(jsonb_build_object('function', name));
    end if;
    return rekey._rpc_refusal();
  end if;
  case name
    when 'rotate_keys' then
      select coalesce(jsonb_agg(to_jsonb(r) order by r.id), '[]'),
        coalesce(jsonb_agg(r.keyring order by r.id) filter (where r.created_at <> now()), '[]')
      into v_rotations, v_passed_by
      from rekey.rotate_keys(arguments ->> 'keyring', arguments ->> 'reason', (arguments ->> 'supersede')::boolean) r;
      return jsonb_build_object('rotations', v_rotations, 'passed_by', v_passed_by);
    when 'pause_rotation' then
      perform rekey.pause_rotation((arguments ->> 'id')::bigint);
    when 'retry_rotation' then
      perform rekey.retry_rotation((arguments ->> 'id')::bigint);
    when 'rollback_rotation' then
      select jsonb_agg(to_jsonb(r)) into v_rotations
      from rekey.rollback_rotation((arguments ->> 'id')::bigint, arguments ->> 'reason') r;
    when 'mark_key_compromised' then
      select coalesce(jsonb_agg(to_jsonb(r)), '[]') into v_rotations
      from rekey.mark_key_compromised(arguments ->> 'keyring', (arguments ->> 'version')::integer, arguments ->> 'reason') r;
  end case;
  if v_rotations is null then
    select jsonb_agg(to_jsonb(r)) into v_rotations from rekey.rotation_status r where r.id = (arguments ->> 'id')::bigint;
  end if;
  return jsonb_build_object('rotations', v_rotations);
exception when others then
  if not rekey._through_postgrest() or rekey._http_status(sqlstate) is null then
    raise;
  end if;
  get stacked diagnostics v_hint = pg_exception_hint, v_action = constraint_name;
  return rekey._rpc_problem(sqlstate, sqlerrm, rekey._rpc_hint(v_action, v_hint));
end
$$;
comment on function rekey._rpc_change is
  'What the functions of schema public that change something do with the rights of rekey_owner. name: which of them; arguments: by name.';

create or replace function public.rotate_keys(keyring text = null, reason text = null, supersede boolean = false) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('rotate_keys', jsonb_build_object('keyring', keyring, 'reason', reason, 'supersede', supersede));
end;
comment on function public.rotate_keys is
  'As rekey.rotate_keys(), for PostgREST and supabase-js: {"rotations": [...], "passed_by": [...]} with rows of rekey.rotation_status, and the names of keyrings that got no new version, as a rotation is under way. For service_role, members of rekey_admin, and logged-in users whose app_metadata has the claim that the setting jwt_admin_claim names; anybody else gets 403. Errors come as {"code", "message", "details", "hint"} with their HTTP status: RK001 503, RK002 500, RK004 and RK006 409, RK007 404; a caller without PostgREST gets them raised.';

create or replace function public.pause_rotation(id bigint) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('pause_rotation', jsonb_build_object('id', id));
end;
comment on function public.pause_rotation is
  'As rekey.pause_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.retry_rotation(id bigint) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('retry_rotation', jsonb_build_object('id', id));
end;
comment on function public.retry_rotation is
  'As rekey.retry_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.rollback_rotation(id bigint, reason text = null) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('rollback_rotation', jsonb_build_object('id', id, 'reason', reason));
end;
comment on function public.rollback_rotation is
  'As rekey.rollback_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that goes back, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function public.mark_key_compromised(keyring text, version integer, reason text = null) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_change('mark_key_compromised', jsonb_build_object('keyring', keyring, 'version', version, 'reason', reason));
end;
comment on function public.mark_key_compromised is
  'As rekey.mark_key_compromised(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that takes the rows off the version, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';

create or replace function rekey._rpc_key_rotation_status() returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_status jsonb;
begin
  if not rekey._may_administer() then
    return rekey._rpc_refusal();
  end if;
  select jsonb_build_object(
    'version', rekey.version(),
    'kek', (select jsonb_build_object('id', e.id, 'provider', s.kek_provider) from rekey.keks e, rekey.settings s where e.state = 'active'),
    'worker', (select to_jsonb(w) from rekey.worker_status w),
    'keyrings', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'name', k.name, 'tenant_id', k.tenant_id, 'version', a.version, 'rotated_at', k.rotated_at,
        'rotate_every', k.rotate_every, 'next_rotation_at', s.next_rotation_at, 'overdue', s.overdue,
        'rotation', to_jsonb(r)) order by k.name), '[]')
      from rekey.keyrings k
      join rekey.schedule_status s on s.keyring = k.name
      left join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
      left join lateral (
        select t.id, t.state, t.trigger, t.to_version, t.rows_total, t.rows_done, t.rows_failed,
          round(100.0 * least(t.rows_done, t.rows_total) / nullif(t.rows_total, 0), 1) as percent,
          case when t.state = 'running' then p.rate end as rows_per_second,
          case when t.state = 'running' then ceil((t.rows_total - t.rows_done) / p.rate) end as seconds_left,
          t.blocked_by, t.last_error, t.created_at, t.started_at, t.finished_at
        from rekey.rotations t
        cross join lateral (
          select nullif(round(t.rows_done / nullif(extract(epoch from clock_timestamp() - t.started_at), 0)), 0) as rate) p
        where t.keyring_id = k.id order by t.id desc limit 1) r on true))
  into v_status;
  return v_status;
end
$$;
comment on function rekey._rpc_key_rotation_status is 'What public.key_rotation_status() does with the rights of rekey_owner.';

create or replace function public.key_rotation_status() returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select rekey._rpc_key_rotation_status();
end;
comment on function public.key_rotation_status is
  'How rotation stands, for PostgREST and supabase-js: version, kek (number and provider), worker (rekey.worker_status), and keyrings, each with its active version, its schedule and its last rotation: with percent, and while it re-encrypts, rows_per_second since it began and seconds_left. For whom and with which errors: as public.rotate_keys().';
