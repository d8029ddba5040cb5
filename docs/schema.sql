--
-- PostgreSQL database dump
--



SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

--
-- Name: rekey; Type: SCHEMA; Schema: -; Owner: rekey_owner
--

CREATE SCHEMA rekey;


ALTER SCHEMA rekey OWNER TO rekey_owner;

--
-- Name: SCHEMA rekey; Type: COMMENT; Schema: -; Owner: rekey_owner
--

COMMENT ON SCHEMA rekey IS 'pg_rekey: encryption keys, their rotation, and the secrets they protect. Objects whose name starts with _ are private.';


--
-- Name: rekey_targets; Type: SCHEMA; Schema: -; Owner: rekey_owner
--

CREATE SCHEMA rekey_targets;


ALTER SCHEMA rekey_targets OWNER TO rekey_owner;

--
-- Name: SCHEMA rekey_targets; Type: COMMENT; Schema: -; Owner: rekey_owner
--

COMMENT ON SCHEMA rekey_targets IS 'pg_rekey: for each protected table its sweep and count functions, owned by the owner of the table.';


--
-- Name: pgcrypto; Type: EXTENSION; Schema: -; Owner: -
--

CREATE EXTENSION IF NOT EXISTS pgcrypto WITH SCHEMA public;


--
-- Name: EXTENSION pgcrypto; Type: COMMENT; Schema: -; Owner: 
--

COMMENT ON EXTENSION pgcrypto IS 'cryptographic functions';


--
-- Name: _adoption; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._adoption AS (
	relation regclass,
	rows tid[],
	keys text[],
	formats text[],
	problems text[],
	ciphertexts bytea[],
	legacy bytea[],
	next tid,
	next_relation regclass
);


ALTER TYPE rekey._adoption OWNER TO rekey_owner;

--
-- Name: TYPE _adoption; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._adoption IS 'A batch of values that are no envelopes: by row, its key, the format, why it cannot be adopted, the envelope made of it, or the value that the client has to open.';


--
-- Name: _counted; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._counted AS (
	place integer,
	keyring_id integer,
	version integer,
	rows bigint,
	next tid,
	ciphertexts bytea[],
	contexts bytea[],
	keys text[],
	error text,
	code text,
	context text
);


ALTER TYPE rekey._counted OWNER TO rekey_owner;

--
-- Name: TYPE _counted; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._counted IS 'Rows of a relation on a key version, as rekey._call_count() counts them, or the rows themselves; or the error, its SQLSTATE and context, with which it could not be counted. place: which of the relations.';


--
-- Name: _target; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._target AS (
	target text,
	relation regclass,
	whole regclass,
	function_name name,
	indexed boolean,
	prefix bytea,
	is_text boolean,
	problem text
);


ALTER TYPE rekey._target OWNER TO rekey_owner;

--
-- Name: TYPE _target; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._target IS 'A relation with row storage that holds envelopes, and what the engine needs to know of it. whole: the table that it is, or is a partition of.';


--
-- Name: _locked; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._locked AS (
	functions text,
	targets rekey._target[],
	errors jsonb
);


ALTER TYPE rekey._locked OWNER TO rekey_owner;

--
-- Name: TYPE _locked; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._locked IS 'What rekey._lock_targets() locked: the targets, blocked ones among them, as they were then; what could not be locked (target, relation, error, sqlstate); and the state of all their functions before that.';


--
-- Name: _sealed; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._sealed AS (
	ciphertexts bytea[],
	problems text[],
	formats text[],
	closed bytea[]
);


ALTER TYPE rekey._sealed OWNER TO rekey_owner;

--
-- Name: TYPE _sealed; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._sealed IS 'What the engine made of values, in their order: the ciphertext; or NULL and why not; or NULL, and what only the client can open.';


--
-- Name: _sealing; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey._sealing AS (
	header bytea,
	key bytea
);


ALTER TYPE rekey._sealing OWNER TO rekey_owner;

--
-- Name: TYPE _sealing; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey._sealing IS 'What a value is sealed with: the header of its envelope, and the DEK.';


--
-- Name: key_rows; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey.key_rows AS (
	keyring text,
	version integer,
	state text,
	rows bigint,
	relations text[]
);


ALTER TYPE rekey.key_rows OWNER TO rekey_owner;

--
-- Name: TYPE key_rows; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey.key_rows IS 'Result of rekey.key_usage(): rows that stand on a key version, and the relations they are in.';


--
-- Name: verified_rows; Type: TYPE; Schema: rekey; Owner: rekey_owner
--

CREATE TYPE rekey.verified_rows AS (
	relation text,
	keyring text,
	version integer,
	rows bigint,
	failed bigint
);


ALTER TYPE rekey.verified_rows OWNER TO rekey_owner;

--
-- Name: TYPE verified_rows; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TYPE rekey.verified_rows IS 'Result of rekey.verify_ciphertexts(): rows of a relation on a key version, and how many of them do not open.';


--
-- Name: _rpc_key_rotation_status(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rpc_key_rotation_status() RETURNS jsonb
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._rpc_key_rotation_status() OWNER TO rekey_owner;

--
-- Name: FUNCTION _rpc_key_rotation_status(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rpc_key_rotation_status() IS 'What public.key_rotation_status() does with the rights of rekey_owner.';


--
-- Name: key_rotation_status(); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.key_rotation_status() RETURNS jsonb
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.key_rotation_status() OWNER TO postgres;

--
-- Name: FUNCTION key_rotation_status(); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.key_rotation_status() IS 'How rotation stands, for PostgREST and supabase-js: version, kek (number and provider), worker (rekey.worker_status), and keyrings, each with its active version, its schedule and its last rotation: with percent, and while it re-encrypts, rows_per_second since it began and seconds_left. For whom and with which errors: as public.rotate_keys().';


--
-- Name: _rpc_change(text, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rpc_change(name text, arguments jsonb) RETURNS jsonb
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._rpc_change(name text, arguments jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rpc_change(name text, arguments jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rpc_change(name text, arguments jsonb) IS 'What the functions of schema public that change something do with the rights of rekey_owner. name: which of them; arguments: by name.';


--
-- Name: mark_key_compromised(text, integer, text); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.mark_key_compromised(keyring text, version integer, reason text DEFAULT NULL::text) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.mark_key_compromised(keyring text, version integer, reason text) OWNER TO postgres;

--
-- Name: FUNCTION mark_key_compromised(keyring text, version integer, reason text); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.mark_key_compromised(keyring text, version integer, reason text) IS 'As rekey.mark_key_compromised(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that takes the rows off the version, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';


--
-- Name: pause_rotation(bigint); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.pause_rotation(id bigint) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.pause_rotation(id bigint) OWNER TO postgres;

--
-- Name: FUNCTION pause_rotation(id bigint); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.pause_rotation(id bigint) IS 'As rekey.pause_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';


--
-- Name: retry_rotation(bigint); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.retry_rotation(id bigint) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.retry_rotation(id bigint) OWNER TO postgres;

--
-- Name: FUNCTION retry_rotation(id bigint); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.retry_rotation(id bigint) IS 'As rekey.retry_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';


--
-- Name: rollback_rotation(bigint, text); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.rollback_rotation(id bigint, reason text DEFAULT NULL::text) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.rollback_rotation(id bigint, reason text) OWNER TO postgres;

--
-- Name: FUNCTION rollback_rotation(id bigint, reason text); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.rollback_rotation(id bigint, reason text) IS 'As rekey.rollback_rotation(), for PostgREST and supabase-js: {"rotations": [...]} with the rotation that goes back, as a row of rekey.rotation_status. For whom and with which errors: as public.rotate_keys().';


--
-- Name: rotate_keys(text, text, boolean); Type: FUNCTION; Schema: public; Owner: postgres
--

CREATE FUNCTION public.rotate_keys(keyring text DEFAULT NULL::text, reason text DEFAULT NULL::text, supersede boolean DEFAULT false) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION public.rotate_keys(keyring text, reason text, supersede boolean) OWNER TO postgres;

--
-- Name: FUNCTION rotate_keys(keyring text, reason text, supersede boolean); Type: COMMENT; Schema: public; Owner: postgres
--

COMMENT ON FUNCTION public.rotate_keys(keyring text, reason text, supersede boolean) IS 'As rekey.rotate_keys(), for PostgREST and supabase-js: {"rotations": [...], "passed_by": [...]} with rows of rekey.rotation_status, and the names of keyrings that got no new version, as a rotation is under way. For service_role, members of rekey_admin, and logged-in users whose app_metadata has the claim that the setting jwt_admin_claim names; anybody else gets 403. Errors come as {"code", "message", "details", "hint"} with their HTTP status: RK001 503, RK002 500, RK004 and RK006 409, RK007 404; a caller without PostgREST gets them raised.';


--
-- Name: _active_versions(integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._active_versions(keyrings integer[]) RETURNS integer[]
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return (
    select array_agg(k.version order by w.place)
    from unnest(keyrings) with ordinality as w(keyring_id, place)
    left join rekey.encryption_keys k on k.keyring_id = w.keyring_id and k.state = 'active');
end
$$;


ALTER FUNCTION rekey._active_versions(keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _active_versions(keyrings integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._active_versions(keyrings integer[]) IS 'The active version of each keyring; NULL where it has none.';


--
-- Name: _adopt(bytea[], bytea[], rekey._sealing, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean) RETURNS rekey._sealed
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_key bytea := sealing.key;
  v_header bytea := sealing.header;
  v_takes text[] := rekey._marks_of(formats);
  v_bytes bytea;
  v_inner bytea;
  v_format text;
  v_plaintext bytea;
  v_problem text;
  v_iv bytea;
  v_aad bytea;
  v_value bytea;
  v_place integer := 0;
  -- Arrays of their own: a field of v_made would be copied whole at every assignment.
  v_contexts bytea[] := contexts;
  v_ciphertexts bytea[];
  v_problems text[];
  v_formats text[];
  v_closed bytea[];
  v_made rekey._sealed;
begin
  v_contexts[1] := v_contexts[1];  -- from now on its elements are found without a search
  -- Plain assignments only: the values are plain, and parameters of statements can be logged.
  foreach v_value in array "values" loop
    v_place := v_place + 1;
    v_plaintext := null;
    v_problem := null;
    v_bytes := v_value;  -- NULL: too large to be read
    v_format := case when rekey._may_be_marked(v_value) then rekey._legacy_mark(v_value) end;
    if v_format is null and rekey._may_be_wrapped(v_value) then
      v_inner := rekey._marked_inside(v_value);
      v_format := rekey._legacy_mark(v_inner);
      v_bytes := coalesce(v_inner, v_value);
    end if;
    if v_format is null then
      v_format := case when 'unmarked' = any (v_takes) then 'unmarked' else 'plaintext' end;
    elsif forced and 'plaintext' = any (formats) and v_format <> 'envelope' and not v_format = any (v_takes) then
      v_format := 'plaintext';
      v_bytes := v_value;
    end if;
    if v_value is null then
      v_problem := 'has more than 64 MiB, and was not read';
    elsif v_format = 'envelope' then
      v_problem := 'is a damaged envelope';
    elsif v_format = 'plaintext' and not 'plaintext' = any (formats) then
      v_problem := 'is in none of the formats';
    elsif v_format <> 'plaintext' and not v_format = any (v_takes) then
      v_problem := format('looks like %s, which is not among the formats', v_format);
    elsif octet_length(v_bytes) > rekey._max_bytes() then
      v_problem := format('has more than %s bytes', rekey._max_bytes());
    elsif v_format = 'plaintext' then
      v_plaintext := v_bytes;
    elsif v_format = 'pgp_sym' then
      v_bytes := rekey._pgp_message(v_bytes);
      v_plaintext := rekey._open_pgp(v_bytes);
      if v_plaintext is null then
        v_problem := rekey._pgp_problem(v_bytes);
      end if;
    end if;
    v_ciphertexts[v_place] := null;
    v_problems[v_place] := v_problem;
    v_formats[v_place] := v_format;
    v_closed[v_place] := case when v_plaintext is null and v_problem is null then v_bytes end;
    if v_plaintext is not null then
      v_iv := rekey._random_bytes(16);
      v_aad := v_header || v_contexts[v_place];
      v_ciphertexts[v_place] := v_header || v_iv || rekey._aead_encrypt(v_key, v_iv, v_plaintext, v_aad);
    end if;
  end loop;
  v_made.ciphertexts := v_ciphertexts;
  v_made.problems := v_problems;
  v_made.formats := v_formats;
  v_made.closed := v_closed;
  return v_made;
end
$$;


ALTER FUNCTION rekey._adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean) IS 'Seals values that are no envelopes, and raises nothing: formats says as what each may be taken, forced that whatever it looks like it is plaintext else. A value that only the client can open gets neither ciphertext nor problem, and stands in closed, without what was wrapped around it.';


--
-- Name: _adoption_batch(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_batch(rotation_id bigint) RETURNS rekey._adoption
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '2 s'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation record;
  v_chunk rekey._chunks;
  v_table regclass;
  v_target rekey._target;
  v_state text;
  v_until_block bigint;
  v_max_rows integer;
  v_adoption rekey._adoption;
  v_apart record;
  v_failed record;
  v_begin timestamptz := clock_timestamp();
begin
  perform rekey._refuse_snapshot();
  select r.*, p.label into v_rotation from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
  where r.id = _adoption_batch.rotation_id and r.trigger = 'adoption';
  if not found then
    raise exception 'no such adoption: %', coalesce(rotation_id::text, 'NULL') using errcode = 'RK007';
  end if;
  v_table := (rekey._column_shape(v_rotation.column_id)).relation;
  if v_table is not null then
    perform rekey._refuse_stranger(v_table);
  end if;
  select c.* into v_chunk from rekey._chunks c
  where v_rotation.state = 'running' and c.pass_id = v_rotation.pass_id and c.kind = 'adopt' and c.target = v_rotation.label
  order by c.id limit 1 for update skip locked;
  if not found then
    return null;
  end if;
  v_target := rekey._target_of(v_chunk);
  v_state := rekey._target_state(v_target.function_name);
  if v_target.problem is not null then
    -- As in rekey._sweep_batch(): the verification says what it waits for.
    delete from rekey._chunks c where c.id = v_chunk.id;
    return null;
  end if;
  select w.rows into v_max_rows from rekey._throttle(least(v_chunk.batch_rows, 1000)) w;
  if v_max_rows is null then
    return null;
  end if;
  perform rekey._take_in_hand(v_chunk.relation);
  v_until_block := least(rekey._block(v_chunk.first) + v_chunk.batch_blocks, v_chunk.until_block);
  v_adoption := rekey._adoption_rows(v_target, v_chunk.relation, v_chunk.first, v_until_block, v_max_rows,
    v_rotation.keyring_id, v_rotation.formats, v_rotation.forced);
  select a.* into v_apart from rekey._write_apart(v_target, v_chunk.relation, v_adoption.rows, null, v_adoption.ciphertexts, true, null) a;
  select array_agg(u.key) as keys, array_agg(coalesce(u.problem, a.problem)) as problems, array_agg(a.code) as codes into v_failed
  from unnest(v_adoption.rows, v_adoption.keys, v_adoption.problems) as u(row, key, problem)
  left join unnest(v_apart.refused, v_apart.problems, v_apart.codes) as a(row, problem, code) on a.row = u.row
  where u.problem is not null or a.row is not null;
  if rekey._target_state(v_target.function_name) <> v_state then
    raise exception 'the protected column % was changed while its rows were adopted', v_chunk.target using errcode = 'RK005', hint = 'Try again.';
  end if;
  perform rekey._note_adopted(v_rotation.id, v_rotation.keyring_id, cardinality(v_apart.written), v_chunk.target, v_chunk.relation,
    v_failed.keys, v_failed.problems, v_failed.codes);
  perform rekey._note_passed(v_chunk, cardinality(v_apart.written), cardinality(v_apart.refused));
  perform rekey._note_pace(v_begin, coalesce(cardinality(v_adoption.rows), 0));
  if v_apart.undone is null then
    perform rekey._advance(v_chunk, v_adoption.next, v_until_block, extract(epoch from clock_timestamp() - v_begin));
  else
    update rekey._chunks c set first = v_apart.undone, batch_rows = 32 where c.id = v_chunk.id;
  end if;
  return v_adoption;
end
$$;


ALTER FUNCTION rekey._adoption_batch(rotation_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_batch(rotation_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_batch(rotation_id bigint) IS 'One batch of an adoption: adopts what the server can, and returns the rest, locked. NULL at the end, where the column is blocked, where the rotation is not running, and while the throttle holds it up.';


--
-- Name: _adoption_doubt(text, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_doubt(label text, formats text[], values_are_tokens boolean) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_takes text[] := rekey._marks_of(formats);
  v_value bytea;
  v_inner bytea;
  v_mark text;
  v_marks text[] := '{}'::text[];
  v_unmarked bytea[] := '{}'::bytea[];
  v_looked_at integer := 0;
  v_doubt text;
begin
  if not 'plaintext' = any (formats) then
    return null;
  end if;
  foreach v_value in array rekey._adoption_sample(label) loop
    continue when coalesce(octet_length(v_value), 0) = 0;
    v_looked_at := v_looked_at + 1;
    v_mark := rekey._legacy_mark(v_value);
    if v_mark is null then
      v_inner := rekey._marked_inside(v_value);
      v_mark := rekey._legacy_mark(v_inner);
    end if;
    if v_mark is null then
      v_unmarked := v_unmarked || v_value;
    elsif v_mark <> 'envelope' and not v_mark = any (v_takes) then
      v_marks := v_marks || v_mark;
    end if;
  end loop;
  if cardinality(v_marks) > 0.9 * v_looked_at then
    select format('blocked: looks encrypted: %s of %s values look like %s', cardinality(v_marks), v_looked_at, string_agg(distinct m.mark, ', '))
    into v_doubt from unnest(v_marks) as m(mark);
  -- Where a key is at hand that may open them, each is tried.
  elsif not 'unmarked' = any (v_takes) then
    v_doubt := rekey._shape_doubt(v_unmarked);
  end if;
  return case when v_doubt not like 'asked:%' or not coalesce(values_are_tokens, false) then v_doubt end;
end
$$;


ALTER FUNCTION rekey._adoption_doubt(label text, formats text[], values_are_tokens boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_doubt(label text, formats text[], values_are_tokens boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_doubt(label text, formats text[], values_are_tokens boolean) IS 'Why the values of a protected column may not be the plaintext that they are to be taken for, as a sample tells: see rekey._shape_doubt(). NULL: there is no reason.';


--
-- Name: _adoption_preview(regclass, name, regclass, tid, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean) RETURNS rekey._adoption
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_column rekey.protected_columns;
  v_target rekey._target;
  v_blocks bigint;
  v_until bigint;
  v_adoption rekey._adoption;
begin
  perform rekey._refuse_stranger(target);
  select * into v_column from rekey.protected_columns c where c.id = rekey._column_id(target, _adoption_preview.column_name);
  select * into v_target from rekey._targets(v_column.label) t
  where v_column.label is not null and (t.relation = _adoption_preview.relation or _adoption_preview.relation is null)
  order by t.relation limit 1;
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007';
  end if;
  perform rekey._refuse_problem(v_column.label, v_target.problem);
  v_until := split_part(trim(first::text, '()'), ',', 1)::bigint + 64;
  v_adoption := rekey._adoption_rows(v_target, v_target.relation, first, v_until, 1000, v_column.keyring_id, formats, forced);
  v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
  if v_adoption.next is not null then
    v_adoption.next := rekey._next_row(v_adoption.next);
  elsif v_until < v_blocks then
    v_adoption.next := format('(%s,0)', v_until)::tid;
  else
    v_adoption.next := null;
    v_adoption.next_relation := (
      select min(t.relation::oid)::regclass from rekey._targets(v_column.label) t where t.relation::oid > v_target.relation::oid);
  end if;
  return v_adoption;
end
$$;


ALTER FUNCTION rekey._adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean) IS 'As rekey._adoption_batch(), before there is an adoption: writes nothing. first: where to begin in relation. next, next_relation: where to go on.';


--
-- Name: _adoption_rows(rekey._target, regclass, tid, bigint, integer, integer, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean) RETURNS rekey._adoption
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_batch record;
  v_contexts bytea[];
  v_sealing rekey._sealing;
  v_made rekey._sealed;
  v_adoption rekey._adoption;
begin
  select b.* into v_batch from rekey._call_read(
    target.function_name, relation, first, format('(%s,0)', until_block)::tid, null, null, max_rows, 2097152) b;
  v_adoption.relation := relation;
  v_adoption.next := v_batch.next;
  if v_batch.rows is not null then
    v_contexts := array(
      select target.prefix || c.context from unnest(v_batch.contexts) with ordinality as c(context, place) order by c.place);
    v_sealing := rekey._sealing(keyring_id);
    v_made := rekey._adopt(v_batch.ciphertexts, v_contexts, v_sealing, formats, forced);
    v_adoption.rows := v_batch.rows;
    v_adoption.keys := v_batch.keys;
    v_adoption.formats := v_made.formats;
    v_adoption.problems := v_made.problems;
    v_adoption.ciphertexts := v_made.ciphertexts;
    v_adoption.legacy := v_made.closed;
  end if;
  return v_adoption;
end
$$;


ALTER FUNCTION rekey._adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean) IS 'Locks values of a range that are no envelopes, and seals those that the server can open; legacy are those that the client has to.';


--
-- Name: _adoption_sample(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_sample(label text) RETURNS bytea[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_target rekey._target;
  v_blocks bigint;
  v_batch record;
  v_values bytea[] := '{}'::bytea[];
begin
  for v_target in select t.* from rekey._targets(label) t order by t.relation limit 32 loop
    v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
    for v_place in 0 .. 7 loop
      exit when cardinality(v_values) >= 1000;
      begin
        select b.* into v_batch from rekey._call_read(
          v_target.function_name, v_target.relation, format('(%s,0)', v_blocks * v_place / 8)::tid,
          format('(%s,0)', least(v_blocks * (v_place + 1) / 8, v_blocks * v_place / 8 + 256))::tid, null, null, 125, 2097152) b;
        v_values := v_values || v_batch.ciphertexts;
        raise exception using errcode = 'RKEND';
      exception when sqlstate 'RKEND' then null;  -- gives the locks of the rows back
      end;
    end loop;
  end loop;
  return v_values;
end
$$;


ALTER FUNCTION rekey._adoption_sample(label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_sample(label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_sample(label text) IS 'Up to 1,000 values of a protected column that are no envelopes, from places all over its table.';


--
-- Name: _adoption_store(bigint, regclass, tid[], bytea[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '2 s'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation record;
  v_target rekey._target;
  v_state text;
  v_batch record;
  v_given integer;
  v_values bytea[];
  v_rows tid[];
  v_contexts bytea[];
  v_failed_keys text[];
  v_failed_problems text[];
  v_failed_codes text[];
  v_sealing rekey._sealing;
  v_made rekey._sealed;
  v_apart record;
  v_done bigint := 0;
begin
  select r.*, p.label into v_rotation from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
  where r.id = _adoption_store.rotation_id and r.trigger = 'adoption';
  select * into v_target from rekey._targets(v_rotation.label) t where t.relation = _adoption_store.relation;
  if not found then
    raise exception 'no such adoption: %', coalesce(rotation_id::text, 'NULL') using errcode = 'RK007';
  end if;
  v_state := rekey._target_state(v_target.function_name);
  perform rekey._refuse_stranger((rekey._column_shape(v_rotation.column_id)).relation);
  perform rekey._refuse_problem(v_rotation.label, v_target.problem);
  if rows is null then
    return 0;
  end if;
  -- The rows once more, locked since adoption_batch: what they are bound to is not the client's to say.
  select b.* into v_batch from rekey._call_read(v_target.function_name, relation,
    (select min(u.row) from unnest(rows) as u(row)), rekey._next_row((select max(u.row) from unnest(rows) as u(row))), null, null, 2000, 1073741824) b;
  for v_place in 1 .. coalesce(cardinality(v_batch.rows), 0) loop
    v_given := array_position(rows, v_batch.rows[v_place]);
    if plaintexts[v_given] is not null then
      v_rows := v_rows || v_batch.rows[v_place];
      v_values := v_values || plaintexts[v_given];
      v_contexts := v_contexts || (v_target.prefix || v_batch.contexts[v_place]);
    elsif v_given is not null then
      v_failed_keys := v_failed_keys || v_batch.keys[v_place];
      v_failed_problems := v_failed_problems || coalesce(problems[v_given], 'does not open');
    end if;
  end loop;
  if v_rows is not null then
    v_sealing := rekey._sealing(v_rotation.keyring_id);
    v_made := rekey._adopt(v_values, v_contexts, v_sealing, '{plaintext}', true);
    for v_place in 1 .. cardinality(v_rows) loop
      if v_made.problems[v_place] is not null then
        raise exception 'a value of % cannot be sealed: it %', v_rotation.label, v_made.problems[v_place] using errcode = 'RK003';
      end if;
    end loop;
    -- (What it does not come to, the next pass does.)
    select a.* into v_apart from rekey._write_apart(v_target, relation, v_rows, null, v_made.ciphertexts, true, v_batch.state) a;
    v_done := cardinality(v_apart.written);
    v_failed_codes := array_fill(null::text, array[coalesce(cardinality(v_failed_keys), 0)]) || v_apart.codes;
    v_failed_keys := v_failed_keys || array(
      select v_batch.keys[array_position(v_batch.rows, u.row)] from unnest(v_apart.refused) with ordinality as u(row, place) order by u.place);
    v_failed_problems := v_failed_problems || v_apart.problems;
  end if;
  if rekey._target_state(v_target.function_name) <> v_state then
    raise exception 'the protected column % was changed while its rows were adopted', v_rotation.label using errcode = 'RK005', hint = 'Try again.';
  end if;
  perform rekey._note_adopted(v_rotation.id, v_rotation.keyring_id, v_done, v_rotation.label, relation,
    nullif(v_failed_keys, '{}'), v_failed_problems, v_failed_codes);
  return v_done;
end
$$;


ALTER FUNCTION rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) IS 'Seals what the client opened of a batch, and quarantines what it could not.';


SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: _chunks; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._chunks (
    id bigint NOT NULL,
    pass_id bigint NOT NULL,
    urgent boolean NOT NULL,
    kind text NOT NULL,
    target text NOT NULL,
    relation regclass NOT NULL,
    first tid NOT NULL,
    swept_from tid,
    until_block bigint NOT NULL,
    batch_rows integer DEFAULT 1000 NOT NULL,
    batch_blocks integer NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamp with time zone,
    last_error text,
    stuck boolean DEFAULT false NOT NULL,
    pace real DEFAULT 1 NOT NULL,
    gives_way_to text,
    looked_at timestamp with time zone,
    transactions bigint,
    CONSTRAINT _chunks_kind_check CHECK ((kind = ANY (ARRAY['sweep'::text, 'adopt'::text, 'verify'::text, 'doubtful'::text])))
);


ALTER TABLE rekey._chunks OWNER TO rekey_owner;

--
-- Name: TABLE _chunks; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._chunks IS 'Block ranges that the rotations of a pass or of a verification have yet to work on.';


--
-- Name: _advance(rekey._chunks, tid, bigint, double precision, double precision, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision DEFAULT 0, max_rows integer DEFAULT 4000) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  -- The next batch takes about batch_target, and has its rows locked for 10 ms of it; where nobody else is seen, for 20, and with
  -- many keyrings for up to 40.
  v_factor double precision := greatest(0.25, least(2.0,
    extract(epoch from (rekey._settings()).batch_target) / greatest(seconds, 0.000001),
    case when chunk.pace < 1 then 0.01 else max_rows / 200000.0 end / greatest(locked, 0.000001)));
begin
  chunk.batch_rows := greatest(10, least(max_rows, (chunk.batch_rows * v_factor)::integer));
  if next is null and _advance.until_block >= chunk.until_block then
    perform rekey._pass_on(chunk);
    return;
  end if;
  update rekey._chunks c
  set first = coalesce(rekey._next_row(_advance.next), format('(%s,0)', _advance.until_block)::tid), swept_from = c.first,
      batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions,
      -- No more than twice the blocks that this batch had its rows from: all are read, whatever becomes of it.
      batch_blocks = case when c.batch_blocks > 1024 then c.batch_blocks
                          when _advance.next is not null then greatest(4, least(c.batch_blocks, 2 * (rekey._block(_advance.next) - rekey._block(chunk.first) + 1)))
                          else greatest(4, least(1024, (c.batch_blocks * v_factor)::integer)) end
  where c.id = chunk.id;
end
$$;


ALTER FUNCTION rekey._advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision, max_rows integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision, max_rows integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision, max_rows integer) IS 'Moves the start of a chunk behind what was swept of it, and notes where that began; deletes it at its end. seconds: how long it took, and for how long its rows were locked; max_rows: the most that a batch may have.';


--
-- Name: _decipher(bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._decipher(key bytea, iv bytea, sealed bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._decipher(key bytea, iv bytea, sealed bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _decipher(key bytea, iv bytea, sealed bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._decipher(key bytea, iv bytea, sealed bytea) IS 'Plaintext of what is authentic: its tag was checked before.';


--
-- Name: _mac(bytea, bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._mac(key bytea, aad bytea, iv bytea, ciphertext bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._mac(key bytea, aad bytea, iv bytea, ciphertext bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _mac(key bytea, aad bytea, iv bytea, ciphertext bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._mac(key bytea, aad bytea, iv bytea, ciphertext bytea) IS 'Authentication tag: the first half of HMAC-SHA-512 under the first half of the key.';


--
-- Name: _refuse_lengths(integer, integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_lengths(key integer, iv integer, message integer) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise exception 'AEAD_AES_256_CBC_HMAC_SHA_512 takes a key of 64 bytes, an IV of 16, and a message: got %, % and %',
    coalesce(key::text, 'NULL'), coalesce(iv::text, 'NULL'), coalesce(message::text, 'NULL')
    using errcode = 'invalid_parameter_value';
end
$$;


ALTER FUNCTION rekey._refuse_lengths(key integer, iv integer, message integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_lengths(key integer, iv integer, message integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_lengths(key integer, iv integer, message integer) IS 'Raises 22023: pgcrypto itself pads and cuts in silence.';


--
-- Name: _aead_decrypt(bytea, bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea) IS 'Plaintext of what rekey._aead_encrypt sealed; NULL where the tag is wrong. 22023 for lengths that cannot be and NULL.';


--
-- Name: _encipher(bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._encipher(key bytea, iv bytea, plaintext bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._encipher(key bytea, iv bytea, plaintext bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _encipher(key bytea, iv bytea, plaintext bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._encipher(key bytea, iv bytea, plaintext bytea) IS 'AES-256-CBC with PKCS#7 padding under the second half of a 64-byte key. 22023 for other lengths and NULL. Nothing without its tag: rekey._mac().';


--
-- Name: _aead_encrypt(bytea, bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea) IS 'Ciphertext and tag of plaintext under a 64-byte key (MAC key, encryption key) and a 16-byte IV, authenticating aad too. 22023 for other lengths and NULL.';


--
-- Name: _any_opens(text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._any_opens(label text, keyring_id integer) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_target rekey._target;
  v_from tid;
  v_step bigint;
  v_found record;
begin
  for v_target in select t.* from rekey._targets(label) t loop
    v_from := '(0,0)';
    while v_from is not null loop
      select s.* into v_found from rekey._scan_on(v_target, array[keyring_id], v_from, v_step) s;
      v_step := v_found.next_step;
      if cardinality(v_found.ciphertexts) > (
           select coalesce(sum(cardinality(c.failed_places)), 0) from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts) c) then
        return true;
      end if;
      v_from := v_found.next_first;
    end loop;
  end loop;
  return false;
end
$$;


ALTER FUNCTION rekey._any_opens(label text, keyring_id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _any_opens(label text, keyring_id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._any_opens(label text, keyring_id integer) IS 'Whether a protected column holds a value of this keyring that opens.';


--
-- Name: _as_text(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._as_text(bytes bytea) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_latin text;
begin
  if getdatabaseencoding() <> 'UTF8' then
    begin
      return convert_from(bytes, 'UTF8');
    exception when character_not_in_repertoire or untranslatable_character then
      return null;
    end;
  elsif position('\x00'::bytea in bytes) > 0 then
    return null;
  end if;
  -- One character a byte, to be looked at without an error, which would quote some of them: the well-formed sequences of
  -- RFC 3629, section 4.
  v_latin := convert_from(bytes, 'LATIN1');
  if octet_length(v_latin) > octet_length(bytes) and v_latin collate "C" !~ ('^([\u0001-\u007f]|[\u00c2-\u00df][\u0080-\u00bf]'
      || '|\u00e0[\u00a0-\u00bf][\u0080-\u00bf]|[\u00e1-\u00ec\u00ee\u00ef][\u0080-\u00bf]{2}|\u00ed[\u0080-\u009f][\u0080-\u00bf]'
      || '|\u00f0[\u0090-\u00bf][\u0080-\u00bf]{2}|[\u00f1-\u00f3][\u0080-\u00bf]{3}|\u00f4[\u0080-\u008f][\u0080-\u00bf]{2})*$') then
    return null;
  end if;
  return convert_from(bytes, 'UTF8');
end
$_$;


ALTER FUNCTION rekey._as_text(bytes bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _as_text(bytes bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._as_text(bytes bytea) IS 'Text of UTF-8 bytes; NULL where they are none, or the encoding of the database lacks one of the characters.';


--
-- Name: _audit(text, text, integer, bigint, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._audit(event text, keyring text DEFAULT NULL::text, version integer DEFAULT NULL::integer, rotation_id bigint DEFAULT NULL::bigint, details jsonb DEFAULT '{}'::jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform rekey._audit_all(jsonb_build_array(jsonb_build_object(
    'event', _audit.event, 'keyring', _audit.keyring, 'version', _audit.version,
    'rotation_id', _audit.rotation_id, 'details', jsonb_strip_nulls(_audit.details))));
end
$$;


ALTER FUNCTION rekey._audit(event text, keyring text, version integer, rotation_id bigint, details jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _audit(event text, keyring text, version integer, rotation_id bigint, details jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._audit(event text, keyring text, version integer, rotation_id bigint, details jsonb) IS 'Adds one entry to the audit log.';


--
-- Name: _audit_all(jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._audit_all(events jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._audit_all(events jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _audit_all(events jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._audit_all(events jsonb) IS 'Adds entries to the audit log: an array of objects with event, keyring, version, rotation_id and details. What is long in them is cut. The transaction is on disk, and on synchronous standbys, when it ends, whatever synchronous_commit is in the session.';


--
-- Name: _part(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._part(part text) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._part(part text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _part(part text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._part(part text) IS 'One part of a context: its length as int4, then its UTF-8 bytes; NULL is the length -1.';


--
-- Name: audit_log; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.audit_log (
    id bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    actor text NOT NULL,
    role text NOT NULL,
    jwt_subject text,
    event text NOT NULL,
    keyring text,
    version integer,
    rotation_id bigint,
    details jsonb DEFAULT '{}'::jsonb NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT audit_log_event_check CHECK ((event = ANY (ARRAY['keyring.created'::text, 'keyring.retired'::text, 'keyring.emptied'::text, 'census.found'::text, 'key.created'::text, 'key.activated'::text, 'key.deactivated'::text, 'key.disabled'::text, 'key.enabled'::text, 'key.compromised'::text, 'key.destroy_scheduled'::text, 'key.destroy_cancelled'::text, 'key.destroyed'::text, 'rotation.requested'::text, 'rotation.passed_by'::text, 'rotation.started'::text, 'rotation.error'::text, 'rotation.row_failed'::text, 'rotation.failure_resolved'::text, 'rotation.retried'::text, 'rotation.paused'::text, 'rotation.resumed'::text, 'rotation.rolled_back'::text, 'rotation.completed'::text, 'rotation.failed'::text, 'kek.registered'::text, 'kek.rotated'::text, 'kek.lost'::text, 'column.protected'::text, 'column.rebound'::text, 'column.unprotected'::text, 'schedule.changed'::text, 'setting.changed'::text, 'endpoint.added'::text, 'endpoint.removed'::text, 'access.denied'::text, 'audit.pruned'::text])))
);


ALTER TABLE rekey.audit_log OWNER TO rekey_owner;

--
-- Name: TABLE audit_log; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.audit_log IS 'What happened to keys, in a hash chain. Rows are only ever added; rekey.verify_audit_log() checks it. Only rekey.prune_audit_log() removes old ones, which it leaves an entry of.';


--
-- Name: COLUMN audit_log.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.id IS 'Number in the chain, from 1, without gaps but for those that audit.pruned tells of.';


--
-- Name: COLUMN audit_log.at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.at IS 'When.';


--
-- Name: COLUMN audit_log.actor; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.actor IS 'The role that logged in (session_user).';


--
-- Name: COLUMN audit_log.role; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.role IS 'The role it had set (SET ROLE), or none.';


--
-- Name: COLUMN audit_log.jwt_subject; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.jwt_subject IS 'Subject of the JWT, behind PostgREST; at most 255 bytes of it.';


--
-- Name: COLUMN audit_log.event; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.event IS 'What happened.';


--
-- Name: COLUMN audit_log.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.keyring IS 'Keyring it happened to.';


--
-- Name: COLUMN audit_log.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.version IS 'Key version it happened to; for kek events the number of the KEK.';


--
-- Name: COLUMN audit_log.rotation_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.rotation_id IS 'Rotation it happened in.';


--
-- Name: COLUMN audit_log.details; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.details IS 'More of it, at most about 16 kB: what is longer is cut. Never a key or a value.';


--
-- Name: COLUMN audit_log.prev_hash; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.prev_hash IS 'Hash of the entry before.';


--
-- Name: COLUMN audit_log.hash; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.audit_log.hash IS 'SHA-256 over prev_hash and every other column (docs/format.md).';


--
-- Name: _audit_hash(rekey.audit_log); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._audit_hash(entry rekey.audit_log) RETURNS bytea
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._audit_hash(entry rekey.audit_log) OWNER TO rekey_owner;

--
-- Name: FUNCTION _audit_hash(entry rekey.audit_log); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._audit_hash(entry rekey.audit_log) IS 'The hash of an audit entry (docs/format.md).';


--
-- Name: _audit_start(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text) RETURNS record
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text) IS 'Where the chain begins that is all there: the last audit.pruned, number and hash of the entry that it removed last, and count and hash of the earlier ones that stayed. 0 and the first prev_hash where nothing was removed.';


--
-- Name: _barrier(integer, integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._barrier(keyring_id integer, versions integer[]) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_free boolean := true;
  v_version integer;
begin
  begin
    foreach v_version in array versions loop
      v_free := pg_try_advisory_xact_lock(keyring_id, v_version);
      exit when not v_free;
    end loop;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the locks back at once: nobody is to wait for them
  end;
  return v_free;
end
$$;


ALTER FUNCTION rekey._barrier(keyring_id integer, versions integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _barrier(keyring_id integer, versions integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._barrier(keyring_id integer, versions integer[]) IS 'Whether no transaction is left that encrypts with one of these versions. They are no longer active: none can begin to.';


--
-- Name: _batch_size(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._batch_size(keyrings integer) RETURNS double precision
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._batch_size(keyrings integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _batch_size(keyrings integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._batch_size(keyrings integer) IS 'By how much a batch is larger than one of a single keyring: each key is unwrapped once a batch.';


--
-- Name: _searches; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._searches (
    id bigint NOT NULL,
    home text NOT NULL,
    scope text NOT NULL,
    state text DEFAULT 'reading'::text NOT NULL,
    begun_in xid8 NOT NULL,
    begun_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    older xid8,
    blocked_by jsonb,
    blocked_since timestamp with time zone,
    looks integer DEFAULT 0 NOT NULL,
    incomplete_since timestamp with time zone,
    postponed boolean DEFAULT false NOT NULL,
    completed_at timestamp with time zone,
    counted_at timestamp with time zone,
    counted_as text,
    CONSTRAINT _searches_scope_check CHECK ((scope = ANY (ARRAY['database'::text, 'columns'::text]))),
    CONSTRAINT _searches_state_check CHECK ((state = ANY (ARRAY['reading'::text, 'looking'::text, 'complete'::text])))
);


ALTER TABLE rekey._searches OWNER TO rekey_owner;

--
-- Name: TABLE _searches; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._searches IS 'Searches of the database: how far the last one is. older: transactions before this one are waited for.';


--
-- Name: _begin_search(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._begin_search() RETURNS rekey._searches
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._begin_search() OWNER TO rekey_owner;

--
-- Name: FUNCTION _begin_search(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._begin_search() IS 'Begins a search for every version that is scheduled for destruction, in place of the last one.';


--
-- Name: _begin_verification(bigint[], integer[], rekey._target[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_id bigint := nextval('rekey._pass_id');
  v_due bigint := (select sum(r.rows_total) from rekey.rotations r where r.id = any (rotations));
begin
  -- (They are locked: their sizes are those of what a snapshot from before sees, or larger.)
  with large as (
    insert into rekey._verified (verification_id, target, relation, system_identifier, filenode, functions, since)
    select v_id, t.target, t.relation, rekey._system_identifier(), pg_relation_filenode(t.relation), rekey._target_state(t.function_name), pg_snapshot_xmin(pg_current_snapshot())
    from unnest(targets) t
    where t.problem is null and pg_table_size(t.relation) > 2097152
      -- A few rows of an indexed table: the index finds them, and the last step opens them. (They are counted where few are due.)
      and not (t.indexed and v_due < 5000 and (
        select coalesce(sum(c.rows), 0) from rekey._call_count(array[t.function_name], array[t.relation], keyrings) c
        ) < least(pg_relation_size(t.relation) / current_setting('block_size')::integer, 5000))
    returning target, relation
  )
  insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
  select v_id, false, 'verify', l.target, l.relation, format('(%s,0)', f.first)::tid, least(f.first + s.chunk, s.blocks), (256 * rekey._batch_size(cardinality(rotations)))::integer
  from large l
  cross join lateral (
    select pg_relation_size(l.relation) / current_setting('block_size')::integer as blocks, rekey._chunk_blocks(l.relation) as chunk) s
  cross join lateral generate_series(0, s.blocks - 1, s.chunk) as f(first);
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r set verification_id = v_id where r.id = any (rotations) and r.state = 'verifying';
  return v_id;
end
$$;


ALTER FUNCTION rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) IS 'Begins a verification of these rotations and their keyrings: splits what is large of these targets, which the caller has locked, into chunks. Returns its number.';


--
-- Name: _block(tid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._block(pointer tid) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._block(pointer tid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _block(pointer tid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._block(pointer tid) IS 'The block of a row pointer.';


--
-- Name: _blocked_targets(integer[], rekey._target[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._blocked_targets(keyrings integer[], targets rekey._target[] DEFAULT NULL::rekey._target[]) RETURNS jsonb
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return (
    select jsonb_agg(jsonb_build_object('target', t.target, 'why', t.problem) order by t.target)
    from unnest(coalesce(targets, array(select t from rekey._targets() t))) t
    left join rekey.protected_columns c on c.label = t.target
    where t.problem is not null and (keyrings is null or c.id is null or rekey._may_hold(c, keyrings)));
end
$$;


ALTER FUNCTION rekey._blocked_targets(keyrings integer[], targets rekey._target[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _blocked_targets(keyrings integer[], targets rekey._target[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._blocked_targets(keyrings integer[], targets rekey._target[]) IS 'The targets that cannot be read or counted, and why; NULL: none. keyrings: only those that may hold rows of one of these; NULL: all. targets: as they were found; NULL: as they are now.';


--
-- Name: _byte_mark(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._byte_mark(start text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_names constant text[] := '{
    envelope, pgp_sym, openpgp, fernet, aws_kms, aws_encryption, gcp_kms, dataprotection, dpapi, cloak, themis, acra,
    git_crypt, sealed_object, cms, nss, safe_storage, luks}'::text[];
  v_groups text[] := regexp_match(start, $re$(?x)^(?:
      (524b01).*
    | ((?:c3|8c)(?:0[4-9a-f]|[1-3].)04..0[013]).*
    | ((?:c3|8c)(?:0[4-9a-f]|[1-6].)(?:05|06..)0[1-9a-d]0[123]|(?:84|c1)..(?:0[36].{16}(?:01|1[0289])|062106|061504)|85....03.{16}(?:01|1[0289])|c1c...03.{16}(?:01|1[0289])).*
    | (8000000000[4-9a-f]).*
    | (010[12]020078).*
    | (01800[0-3](?:14|46|78)|020[45]78).*
    | (0a2400.{70}12).*
    | (09f0c9f0).*
    | (01000000d08c9ddf).*
    | (01..4145532e).*
    | (00010140).*
    | (2222222222222222|252525).*
    | (00474954435259505400).*
    | (aced00057372....6a617661782e63727970746f2e5365616c6564).*
    | (30(?:80|8[1-4](?:..){1,4}|..)06092a864886f70d01(?:070[36]|091001(?:17|09))).*
    | (30..0410f800000000000000).*
    | (76313[01][89a-f]).*
    | (4c554b53babe).*)$re$);
begin
  return case when v_groups is not null then v_names[rekey._first_place(v_groups)] end;
end
$_$;


ALTER FUNCTION rekey._byte_mark(start text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _byte_mark(start text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._byte_mark(start text) IS 'The mark that bytes begin with, by name; NULL: none. start: the first ones, in hexadecimal.';


--
-- Name: _call_count(name[], regclass[], integer[], boolean, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_sweeper
--

CREATE FUNCTION rekey._call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean DEFAULT false, whole boolean DEFAULT false) RETURNS SETOF rekey._counted
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'on'
    AS $_$
declare
  v_run record;
  v_state text[];
  v_changes text;
  v_keyring integer;
  v_version integer;
  v_rows bigint;
  v_next tid;
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
  v_context text;
  v_found rekey._counted[];
  v_last integer;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_count does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  for v_run in
    select c.name <> 'secrets' as foreign, keyrings = '{}' as locks, count(*)::integer as count, array_agg(c.place::integer) as places,
      array_agg(c.relation) as relations, array_agg(format(case when whole
          then 'select null, null, pg_catalog.cardinality(s.rows), s.next, s.ciphertexts, s.contexts, s.keys
            from rekey_targets.%I($1, ''(0,0)'', ''(4294967294,0)'', $2, null, 4000, 2097152) s'
          else 'select s.keyring_id, s.version, s.rows, null, null, null, null from rekey_targets.%I($1, $2) s' end,
        c.name || case when whole then '_scan' else '_count' end)) as statements
    from unnest(function_names, relations) with ordinality as c(name, relation, place)
    left join pg_proc p on p.pronamespace = 'rekey_targets'::regnamespace and p.proname = c.name || '_count'
    group by c.name <> 'secrets', p.proowner
    order by p.proowner
  loop
    v_found := '{}';
    v_last := 0;
    begin
      if v_run.foreign then
        v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
        v_changes := rekey._changes();
      end if;
      for v_place in 1 .. v_run.count loop
        begin
          if v_run.locks or pg_catalog.pg_relation_size(v_run.relations[v_place]) operator(pg_catalog.>) 0 then
            for v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys in
              execute v_run.statements[v_place] using v_run.relations[v_place], keyrings
            loop
              v_last := v_last operator(pg_catalog.+) 1;
              v_found[v_last] := row(v_run.places[v_place], v_keyring, v_version, v_rows, v_next, v_ciphertexts, v_contexts, v_keys, null, null, null)::rekey._counted;
            end loop;
          end if;
        exception when assert_failure or others then
          get stacked diagnostics v_context = pg_exception_context;
          if not apart then
            raise;
          end if;
          v_last := v_last operator(pg_catalog.+) 1;
          v_found[v_last] := row(v_run.places[v_place], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted;
        end;
      end loop;
      if v_run.foreign then
        perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
        perform rekey._refuse_changes(v_changes);
      end if;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart then
        raise;
      elsif v_run.count = 1 then
        v_found := array[row(v_run.places[1], null, null, 0, null, null, null, null, sqlerrm, sqlstate, v_context)::rekey._counted];
      else
        -- Each by itself, to find whose it is.
        v_found := array(
          select row(p.place, c.keyring_id, c.version, c.rows, c.next, c.ciphertexts, c.contexts, c.keys, c.error, c.code, c.context)::rekey._counted
          from unnest(v_run.places) as p(place)
          cross join lateral rekey._call_count(function_names[p.place:p.place], relations[p.place:p.place], keyrings, true, whole) c);
      end if;
    end;
    return query select f.* from unnest(v_found) as f;
  end loop;
end
$_$;


ALTER FUNCTION rekey._call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean) OWNER TO rekey_sweeper;

--
-- Name: FUNCTION _call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean); Type: COMMENT; Schema: rekey; Owner: rekey_sweeper
--

COMMENT ON FUNCTION rekey._call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean) IS 'Calls the count functions of targets. keyrings empty: locks each relation, with its partitions, and counts nothing. apart: an error of one is a row, and does not stop the others; what came of it before is not to be trusted. whole: calls their scan functions, for all rows of each relation, or the first of them, up to next.';


--
-- Name: _call_read(name, regclass, tid, tid, integer[], integer[], integer, bigint, tid); Type: FUNCTION; Schema: rekey; Owner: rekey_sweeper
--

CREATE FUNCTION rekey._call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid DEFAULT NULL::tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'on'
    AS $_$
declare
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_read does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  if touch_from is not null then
    execute format('select from rekey_targets.%I($1, $2, $3, null, $4, 1, 1)', function_name || '_scan')
    using relation, touch_from, first, pg_catalog.pg_current_xact_id()::xid;
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_read')
  into next, rows, ciphertexts, contexts, keys
  using relation, first, until, keyrings, versions, max_rows, max_bytes;
  if state is not null then
    perform rekey._refuse_traces(state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$_$;


ALTER FUNCTION rekey._call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]) OWNER TO rekey_sweeper;

--
-- Name: FUNCTION _call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]); Type: COMMENT; Schema: rekey; Owner: rekey_sweeper
--

COMMENT ON FUNCTION rekey._call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]) IS 'Calls the read function of a target. touch_from: its scan function before, for nothing, from there up to first. state: of the session, before and after.';


--
-- Name: _call_scan(name, regclass, tid, tid, integer[], xid, integer, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_sweeper
--

CREATE FUNCTION rekey._call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) RETURNS record
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'on'
    AS $_$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_scan does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := rekey._session_state(pg_catalog.current_setting('search_path'));
    v_changes := rekey._changes();
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6, $7) s', function_name || '_scan')
  into next, rows, ciphertexts, contexts, keys
  using relation, first, until, keyrings, since, max_rows, max_bytes;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$_$;


ALTER FUNCTION rekey._call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) OWNER TO rekey_sweeper;

--
-- Name: FUNCTION _call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: COMMENT; Schema: rekey; Owner: rekey_sweeper
--

COMMENT ON FUNCTION rekey._call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) IS 'Calls the scan function of a target.';


--
-- Name: _call_tenant_check(text, uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_sweeper
--

CREATE FUNCTION rekey._call_tenant_check(function_name text, tenant_id uuid) RETURNS boolean
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'on'
    AS $_$
declare
  v_answer boolean;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_tenant_check does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  begin
    execute format('select %s($1)', (function_name || '(uuid)')::regprocedure::oid::regproc) into v_answer using tenant_id;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- takes back all but the answer: settings, and deferred triggers that would run with the rights of the caller
  end;
  return coalesce(v_answer, false);
end
$_$;


ALTER FUNCTION rekey._call_tenant_check(function_name text, tenant_id uuid) OWNER TO rekey_sweeper;

--
-- Name: FUNCTION _call_tenant_check(function_name text, tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_sweeper
--

COMMENT ON FUNCTION rekey._call_tenant_check(function_name text, tenant_id uuid) IS 'Asks the function that the setting tenant_check names.';


--
-- Name: _call_write(name, regclass, tid[], bytea[], bytea[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_sweeper
--

CREATE FUNCTION rekey._call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'on'
    AS $_$
declare
  v_state text[];
  v_changes text;
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_write does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  if function_name operator(pg_catalog.<>) 'secrets' then
    v_state := coalesce(state, rekey._session_state(pg_catalog.current_setting('search_path')));
  end if;
  execute format('select w.* from rekey_targets.%I($1, $2, $3, $4) w', function_name || '_write')
  into locked, written using relation, rows, starts, ciphertexts;
  if v_state is not null then
    v_changes := rekey._changes();
  end if;
  set constraints all immediate;
  if v_state is not null then
    perform rekey._refuse_traces(v_state, pg_catalog.current_setting('search_path'));
    perform rekey._refuse_changes(v_changes);
  end if;
end
$_$;


ALTER FUNCTION rekey._call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) OWNER TO rekey_sweeper;

--
-- Name: FUNCTION _call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint); Type: COMMENT; Schema: rekey; Owner: rekey_sweeper
--

COMMENT ON FUNCTION rekey._call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) IS 'Calls the write function of a target. state: of the session, as rekey._call_read() left it; NULL: as it is now.';


--
-- Name: _in_foreign_code(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._in_foreign_code() RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._in_foreign_code() OWNER TO rekey_owner;

--
-- Name: FUNCTION _in_foreign_code(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._in_foreign_code() IS 'Whether code of somebody else is running in this session: of a protected table, or tenant_check, called by a dispatcher; or of a table, index or view that is being maintained.';


--
-- Name: _caller(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._caller() RETURNS name
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey._caller() OWNER TO rekey_owner;

--
-- Name: FUNCTION _caller(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._caller() IS 'The role that calls, seen from inside a SECURITY DEFINER function: the one set with SET ROLE, else the one that logged in. rekey_sweeper, which may nothing, in code of somebody else.';


--
-- Name: _session_aad(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._session_aad(scope text) RETURNS bytea
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._session_aad(scope text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _session_aad(scope text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._session_aad(scope text) IS 'What an unlocked session is bound to: server process, server start, login, and unless scope is s the transaction.';


--
-- Name: _carried_aad(integer, integer, integer, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) RETURNS bytea
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) IS 'What a DEK that the session carries is bound to: the KEK that wraps it, and the session as rekey.lock() and rekey.unlock() leave it; without an unlocked one, the statement.';


--
-- Name: _census(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._census() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_target rekey._target;
  v_keyrings integer[];
  v_current integer[];
  v_active bytea[];
  v_open boolean := true;
  v_seconds double precision;
  v_blocks bigint;
  v_state text := rekey._target_state();
  v_found jsonb := '[]'::jsonb;
  v_rows jsonb := '[]'::jsonb;
  v_stale record;
  v_id bigint;
  v_events jsonb := '[]'::jsonb;
begin
  perform rekey._refuse_snapshot();
  perform rekey._note_names();
  select array_agg(rekey._header(k.keyring_id, k.version)) into v_active from rekey.encryption_keys k where k.state = 'active';
  begin
    perform from rekey._kek();
  exception when sqlstate 'RK001' or sqlstate 'RK002' then
    v_open := false;
  end;
  select 20.0 / greatest(count(*), 1) into v_seconds from rekey._targets() t where t.problem is null;
  -- A target that cannot be counted is told of, and keeps nobody from looking at the others.
  for v_target in select t.* from rekey._targets() t where t.problem is null order by t.relation loop
    begin
      -- Locked first, counted by the next statement: as rekey._lock_targets().
      perform from rekey._count_rows(array[v_target], '{}');
      select array_agg(distinct c.keyring_id) filter (where not coalesce(rekey._header(c.keyring_id, c.version) = any (v_active), false)),
        array_agg(distinct c.keyring_id)
      into v_keyrings, v_current
      from rekey._count_rows(array[v_target], null) c
      where c.keyring_id is not null and not exists (select from rekey.rotations o where o.keyring_id = c.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
      -- And where the census has put rows into quarantine: they may open again.
      v_keyrings := array(
        select unnest(v_keyrings) union
        select q.keyring_id from rekey.rotation_failures q where q.target = v_target.target and q.rotation_id is null and q.resolved_at is null);
      if v_keyrings <> '{}' then
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_keyrings, v_active) c), '[]');
      end if;
      -- Those on the active version, where they open too: of a large table another part each day, for a few seconds.
      v_current := array(select unnest(v_current) except select unnest(v_keyrings));
      if v_open and v_current <> '{}' then
        v_blocks := pg_relation_size(v_target.relation) / current_setting('block_size')::integer;
        v_blocks := (random() * greatest(v_blocks - 8192, 0))::bigint;
        v_rows := v_rows || coalesce((
          select jsonb_agg(to_jsonb(c) || jsonb_build_object('target', v_target.target))
          from rekey._census_target(v_target, v_current, v_active, v_blocks, v_blocks + 8192, clock_timestamp() + v_seconds * interval '1 second') c), '[]');
      end if;
    exception
      when sqlstate 'RK001' or sqlstate 'RK002' or sqlstate 'RK005' then
        raise;
      when others then
        v_found := v_found || jsonb_build_object('kind', 'uncounted', 'severity', 'critical', 'target', v_target.target,
          'finding', format('%s cannot be counted: %s', v_target.target, sqlerrm), 'advice', 'Read it as its owner: an index, a function or a policy of the table may be the reason.');
    end;
  end loop;
  if rekey._target_state() is distinct from v_state then
    raise exception 'a protected column was changed while its rows were counted' using errcode = 'RK005', hint = 'Try again.';
  end if;

  -- What does not open, by keyring; a keyring that does not exist was made up, or is that of another database.
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', 'critical', 'target', f.target, 'keyring', f.keyring, 'version', f.version, 'rows', f.rows,
      'finding', case f.kind
        when 'destroyed' then format('%s rows of %s stand on version %s of keyring %s, which is destroyed', f.rows, f.target, f.version, f.keyring)
        when 'unknown' then format('%s rows of %s stand on version %s of keyring %s, which there is not', f.rows, f.target, f.version, f.keyring)
        else format('%s rows of %s do not open: version %s of keyring %s', f.rows, f.target, f.version, f.keyring) end,
      'advice', case f.kind
        when 'unopenable' then '`pg-rekey rotations failures` names them. Restore them, or give them up: `pg-rekey rotations resolve`.'
        else 'Nothing in this database opens them: restore them, or the key, from a backup. `pg-rekey rotations failures` names them.' end))
    from (
      select c.target, coalesce(r.name, format('no. %s', c.keyring_id)) as keyring, c.version, sum(c.failed) as rows,
        case when k.state = 'destroyed' then 'destroyed' when k.state is null then 'unknown' else 'unopenable' end as kind
      from jsonb_to_recordset(v_rows) as c(target text, keyring_id integer, version integer, failed bigint)
      left join rekey.keyrings r on r.id = c.keyring_id
      left join rekey.encryption_keys k on k.keyring_id = c.keyring_id and k.version = c.version
      where c.failed > 0
      group by 1, 2, 3, k.state) f), '[]');
  v_found := v_found || coalesce((
    select jsonb_agg(jsonb_build_object('kind', f.kind, 'severity', f.severity, 'target', f.target, 'keyring', f.keyring, 'version', f.version,
      'finding', f.finding, 'advice', f.advice))
    from rekey.findings() f where f.rows is null), '[]');
  perform rekey._note_findings(v_found);

  for v_stale in
    select c.keyring_id, r.name, sum(c.stale) as rows, a.version
    from jsonb_to_recordset(v_rows) as c(keyring_id integer, stale bigint)
    join rekey.keyrings r on r.id = c.keyring_id
    join rekey.encryption_keys a on a.keyring_id = c.keyring_id and a.state = 'active'
    group by c.keyring_id, r.name, a.version
    having sum(c.stale) > 0
    order by c.keyring_id
  loop
    perform rekey._keyring(v_stale.name, lock => true);
    continue when exists (select from rekey.rotations o where o.keyring_id = v_stale.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
    v_id := rekey._queue_sweep(v_stale.keyring_id, 'schedule', 'rows on an older version, found by the census');
    v_events := v_events || jsonb_build_object('event', 'rotation.requested', 'keyring', v_stale.name, 'version', v_stale.version,
      'rotation_id', v_id, 'details', jsonb_build_object('trigger', 'schedule', 'census_rows', v_stale.rows));
  end loop;
  update rekey._worker w set last_census_at = now() where w.singleton;
  perform rekey._audit_all(v_events);
end
$$;


ALTER FUNCTION rekey._census() OWNER TO rekey_owner;

--
-- Name: FUNCTION _census(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._census() IS 'Looks for rows that came to stand on an older version after its rotation (a client held the ciphertext back), and queues their sweep; puts rows that do not open into the quarantine; and notes what else is not as it should be. Of rows on active versions it opens 64 MB of each target, for 20 seconds in all, where the KEK is at hand. The KEK is needed only where a row is not on an active version.';


--
-- Name: _census_target(rekey._target, integer[], bytea[], bigint, bigint, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._census_target(target rekey._target, keyrings integer[], active bytea[], first bigint DEFAULT 0, until bigint DEFAULT '4294967294'::bigint, deadline timestamp with time zone DEFAULT 'infinity'::timestamp with time zone) RETURNS TABLE(keyring_id integer, version integer, problem text, failed bigint, stale bigint)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_from tid := format('(%s,0)', first)::tid;
  v_step bigint;
  v_found record;
  v_batch record;
  v_still bigint[] := '{}'::bigint[];
  v_added jsonb := '[]'::jsonb;
  v_counted jsonb := '[]'::jsonb;
begin
  while v_from is not null loop
    select s.* into v_found from rekey._scan_on(target, keyrings, v_from, v_step, until) s;
    v_step := v_found.next_step;
    if v_found.ciphertexts is not null then
      with rows as materialized (
        select u.place::integer as place, rekey._int4(u.header, 3) as keyring_id, rekey._int4(u.header, 7) as version, u.header = any (active) as active, u.row_key
        from (select o.place, substr(o.ciphertext, 1, 11) as header, o.row_key
              from unnest(v_found.ciphertexts, v_found.keys) with ordinality as o(ciphertext, row_key, place)) u
      ), failing as materialized (
        select f.place, f.problem
        from rekey._check(v_found.ciphertexts, target.prefix, v_found.contexts) c
        cross join lateral unnest(c.failed_places, c.problems) as f(place, problem)
      ), noted as materialized (
        -- Discarded by somebody who has seen it, or in quarantine.
        select r.place, q.id, q.resolution
        from rows r
        join rekey.rotation_failures q on q.keyring_id = r.keyring_id and q.target = _census_target.target.target
          and q.relation = _census_target.target.relation::text and q.row_hash = rekey._row_hash(r.row_key)
          and (q.resolved_at is null or q.resolution = 'discard' and q.version = r.version)
      ), added as (
        insert into rekey.rotation_failures (keyring_id, target, relation, row_key, version, reason)
        select r.keyring_id, _census_target.target.target, _census_target.target.relation::text, r.row_key, r.version, f.problem
        from failing f
        join rows r on r.place = f.place
        join rekey.keyrings k on k.id = r.keyring_id
        where not exists (select from noted n where n.place = f.place)
        on conflict do nothing
        returning id, rotation_failures.keyring_id, rotation_failures.version, row_key, reason
      )
      select
        (select array_agg(n.id) from noted n join failing f on f.place = n.place where n.resolution is null) as still,
        (select jsonb_agg(to_jsonb(a)) from added a) as added,
        (select jsonb_agg(to_jsonb(t)) from (
          select r.keyring_id, r.version, f.problem, count(f.place) as failed, count(*) - count(f.place) as stale
          from rows r left join failing f on f.place = r.place
          -- What is in quarantine and opens is refused by its table; what was discarded is known.
          where not exists (select from noted n where n.place = r.place and (n.resolution = 'discard' or f.place is null))
            and (f.place is not null or not r.active)
          group by r.keyring_id, r.version, f.problem) t) as counted
      into v_batch;
      v_still := v_still || coalesce(v_batch.still, '{}')
        || array(select (a.value ->> 'id')::bigint from jsonb_array_elements(coalesce(v_batch.added, '[]')) a);
      -- Five of each keyring and version are enough for the audit log.
      v_added := (
        select coalesce(jsonb_agg(jsonb_build_object('keyring_id', n.keyring_id, 'version', n.version, 'rows', n.rows, 'first', n.first, 'reason', n.reason)), '[]')
        from (
          select a.keyring_id, a.version, sum(a.rows) as rows, (jsonb_agg(a.first order by a.place) -> 0) as first, (array_agg(a.reason order by a.place))[1] as reason
          from (
            select (o.value ->> 'keyring_id')::integer as keyring_id, (o.value ->> 'version')::integer as version, (o.value ->> 'rows')::bigint as rows,
              o.value -> 'first' as first, o.value ->> 'reason' as reason, 0 as place
            from jsonb_array_elements(v_added) o
            union all
            select b.keyring_id, b.version, count(*), to_jsonb((array_agg(rekey._cut(b.row_key, 100) order by b.id))[1:5]), (array_agg(b.reason order by b.id))[1], 1
            from jsonb_to_recordset(coalesce(v_batch.added, '[]')) as b(id bigint, keyring_id integer, version integer, row_key text, reason text)
            group by b.keyring_id, b.version) a
          group by a.keyring_id, a.version) n);
      v_counted := v_counted || coalesce(v_batch.counted, '[]');
    end if;
    v_from := case when clock_timestamp() < deadline then v_found.next_first end;
  end loop;
  update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
  where deadline = 'infinity' and q.rotation_id is null and q.resolved_at is null and q.target = _census_target.target.target
    and q.relation = _census_target.target.relation::text and q.keyring_id = any (keyrings) and not q.id = any (v_still);
  perform rekey._audit_all((
    select coalesce(jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', k.name, 'version', a.version,
      'details', jsonb_build_object('found_by', 'census', 'target', target.target, 'relation', target.relation::text, 'rows', a.rows,
        'first', a.first, 'problem', a.reason)) order by k.name, a.version), '[]')
    from jsonb_to_recordset(v_added) as a(keyring_id integer, version integer, rows bigint, first jsonb, reason text)
    join rekey.keyrings k on k.id = a.keyring_id));
  return query
    select c.keyring_id, c.version, min(c.problem), sum(c.failed)::bigint, sum(c.stale)::bigint
    from jsonb_to_recordset(v_counted) as c(keyring_id integer, version integer, problem text, failed bigint, stale bigint)
    group by c.keyring_id, c.version;
end
$$;


ALTER FUNCTION rekey._census_target(target rekey._target, keyrings integer[], active bytea[], first bigint, until bigint, deadline timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _census_target(target rekey._target, keyrings integer[], active bytea[], first bigint, until bigint, deadline timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._census_target(target rekey._target, keyrings integer[], active bytea[], first bigint, until bigint, deadline timestamp with time zone) IS 'Opens the rows of these keyrings in one target. What does not open enters the quarantine, with one audit entry for each keyring and version; what the census had put there and opens again leaves it. failed: rows that do not open and that nobody has discarded; stale: rows that open and are not on an active version (headers in active). first, until: only these blocks; deadline: as far as it comes by then, where nothing leaves the quarantine. Takes the KEK.';


--
-- Name: _changes(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._changes() RETURNS text
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._changes() OWNER TO rekey_owner;

--
-- Name: FUNCTION _changes(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._changes() IS 'The relations that this transaction may have changed rows of, and of how many it has.';


--
-- Name: _check(bytea[], bytea, bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[]) RETURNS TABLE(header bytea, failed_places integer[], problems text[])
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET work_mem TO '64MB'
    SET enable_nestloop TO 'off'
    AS $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)) into v_keyrings, v_versions
  from unnest(v_headers) as h(header);
  return query
    select o.header, array_agg(o.place), array_agg(o.problem)
    from (
      select p.place, p.header,
        case when p.key is null then p.problem
             when not rekey._is_authentic(p.key, p.iv, p.sealed, p.aad) then 'does not open: damaged, or of another row' end as problem
      from (
        select c.place::integer as place, substr(c.ciphertext, 1, 11) as header, k.key,
          substr(c.ciphertext, 12, 16) as iv, substr(c.ciphertext, 28) as sealed, k.header || prefix || c.context as aad,
          case when k.header is not null then k.problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as problem
        from unnest(ciphertexts, contexts) with ordinality as c(ciphertext, context, place)
        left join (
          select rekey._header(d.keyring_id, d.version) as header, d.key, d.problem
          from rekey._deks(v_keyrings, v_versions, sweeping => true) d
          offset 0
        ) k on k.header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) p
      offset 0
    ) o
    where o.problem is not null
    group by o.header;
end
$$;


ALTER FUNCTION rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _check(ciphertexts bytea[], prefix bytea, contexts bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[]) IS 'Checks the tags of envelopes: the places of those that do not open, by header, with the reason. prefix: what every context begins with.';


--
-- Name: _check_context(text[], uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._check_context(context text[], keyring_tenant uuid) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if context is null or array_ndims(context) > 1 then
    raise exception 'context is an array of text' using errcode = 'invalid_parameter_value',
      hint = 'An empty array, the default, binds the value to nothing but its keyring.';
  end if;
  perform rekey._check_label(context[array_lower(context, 1)]);
  if not rekey.can_access_tenant(keyring_tenant) then
    perform rekey._refuse_tenant();
  end if;
  return rekey._context(context);
end
$$;


ALTER FUNCTION rekey._check_context(context text[], keyring_tenant uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _check_context(context text[], keyring_tenant uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._check_context(context text[], keyring_tenant uuid) IS 'The bytes of a context that a caller gave, once he may use it. 42501: reserved label, a column that he may not read, or a keyring of another tenant.';


--
-- Name: _check_key_change(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._check_key_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if (new.keyring_id, new.version) is distinct from (old.keyring_id, old.version) then
    raise exception 'a key keeps its keyring and version' using errcode = 'RK006';
  end if;
  if new.state <> old.state and not (old.state, new.state) in (
    ('active', 'decrypt_only'), ('active', 'compromised'),
    ('decrypt_only', 'active'), ('decrypt_only', 'disabled'), ('decrypt_only', 'compromised'), ('decrypt_only', 'destroy_scheduled'),
    ('disabled', 'decrypt_only'), ('disabled', 'destroy_scheduled'),
    ('compromised', 'destroy_scheduled'),
    ('destroy_scheduled', 'destroyed'))
    and not (old.state = 'destroy_scheduled' and new.state = old.scheduled_from) then
    raise exception 'a key cannot go from % to %', old.state, new.state using errcode = 'RK006';
  end if;
  return new;
end
$$;


ALTER FUNCTION rekey._check_key_change() OWNER TO rekey_owner;

--
-- Name: FUNCTION _check_key_change(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._check_key_change() IS 'Trigger: lets the state of a key move only along the graph of docs/design.md (RK006).';


--
-- Name: _check_label(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._check_label(label text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_protected record;
  v_shape record;
begin
  if label in ('secret', 'dek', 'session') then
    raise exception 'the context label % is reserved', label using errcode = 'insufficient_privilege',
      hint = 'Secrets are read with rekey.get_secret().', constraint = 'read_secret';
  end if;
  select c.id, c.places[1] as place, c.relation_name, c.column_name, c.owner into v_protected
  from rekey.protected_columns c where c.label = _check_label.label;
  if not found then
    return;
  end if;
  v_shape := rekey._column_shape(v_protected.id);
  if v_shape.relation is null then
    -- Where its owner dropped the table and made it anew, the new one goes on being read until it is bound.
    select r.oid::regclass as relation, array_fill(a.attnum, array[v_protected.place]) as attnums into v_shape
    from pg_class r
    join pg_attribute a on a.attrelid = r.oid and a.attname = v_protected.column_name and a.attnum > 0 and not a.attisdropped
    where r.oid = rekey._relation_named(v_protected.relation_name) and pg_get_userbyid(r.relowner) = v_protected.owner;
  end if;
  if not coalesce(has_column_privilege(rekey._caller(), v_shape.relation, v_shape.attnums[v_protected.place], 'select'), false) then
    raise exception 'the context label % belongs to a column that you may not read', label
      using errcode = 'insufficient_privilege', hint = 'It takes SELECT on that column.';
  end if;
end
$$;


ALTER FUNCTION rekey._check_label(label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _check_label(label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._check_label(label text) IS '42501 where the label of a context is reserved, or belongs to a protected column that the caller may not read.';


--
-- Name: _check_tenant(uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._check_tenant(tenant_id uuid) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if not rekey.can_access_tenant(tenant_id) then
    perform rekey._refuse_tenant();
  end if;
end
$$;


ALTER FUNCTION rekey._check_tenant(tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _check_tenant(tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._check_tenant(tenant_id uuid) IS 'Raises 42501 where rekey.can_access_tenant() says no.';


--
-- Name: _system_identifier(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._system_identifier() RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if has_function_privilege('pg_catalog.pg_control_system()', 'execute') then
    return (select s.system_identifier from pg_control_system() s);
  end if;
  return null;
end
$$;


ALTER FUNCTION rekey._system_identifier() OWNER TO rekey_owner;

--
-- Name: FUNCTION _system_identifier(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._system_identifier() IS 'What initdb made to tell this cluster from others; NULL where a host of databases has revoked it.';


--
-- Name: _target_state(name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._target_state(function_name name DEFAULT NULL::name) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if function_name is not null then
    return (
      select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
      from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace
        and p.proname = any (rekey._function_names(function_name)));
  end if;
  return (
    select string_agg(format('%s %s %s', p.oid, p.xmin, p.ctid), ',' order by p.oid)
    from pg_proc p where p.pronamespace = 'rekey_targets'::regnamespace);
end
$$;


ALTER FUNCTION rekey._target_state(function_name name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _target_state(function_name name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._target_state(function_name name) IS 'What changes whenever a function of a target does; NULL: of any.';


--
-- Name: _verified; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._verified (
    verification_id bigint NOT NULL,
    target text NOT NULL,
    relation regclass NOT NULL,
    system_identifier bigint,
    filenode oid NOT NULL,
    functions text NOT NULL,
    since xid8 NOT NULL
);


ALTER TABLE rekey._verified OWNER TO rekey_owner;

--
-- Name: TABLE _verified; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._verified IS 'Relations that a verification checks by chunks, and as what they were found when it began.';


--
-- Name: _checked_since(bigint, rekey._target); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._checked_since(verification_id bigint, target rekey._target) RETURNS xid
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._checked_since(verification_id bigint, target rekey._target) OWNER TO rekey_owner;

--
-- Name: FUNCTION _checked_since(verification_id bigint, target rekey._target); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._checked_since(verification_id bigint, target rekey._target) IS 'The transaction from which on a relation has yet to be checked where a verification checks it by chunks; NULL: all of it, since it does not, or the relation is another one now. The caller holds a lock on it.';


--
-- Name: _chunk_blocks(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._chunk_blocks(relation regclass) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_blocks bigint := pg_relation_size(relation) / current_setting('block_size')::integer;
  v_bytes bigint := pg_table_size(relation);
begin
  return greatest(v_blocks * greatest(least(v_bytes / 32, 33554432), 4194304) / greatest(v_bytes, 1), 1);
end
$$;


ALTER FUNCTION rekey._chunk_blocks(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _chunk_blocks(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._chunk_blocks(relation regclass) IS 'How many blocks of a relation make a chunk: 4 to 32 MB with what is stored out of line, so that several workers end together.';


--
-- Name: _notifications; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._notifications (
    id bigint NOT NULL,
    message_id uuid DEFAULT gen_random_uuid() NOT NULL,
    endpoint_id integer NOT NULL,
    event text NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    state text DEFAULT 'waiting'::text NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    request_id bigint,
    ended_at timestamp with time zone,
    last_error text,
    CONSTRAINT _notifications_ended_at_check CHECK (((state = 'waiting'::text) = (ended_at IS NULL))),
    CONSTRAINT _notifications_state_check CHECK ((state = ANY (ARRAY['waiting'::text, 'delivered'::text, 'dead'::text])))
);


ALTER TABLE rekey._notifications OWNER TO rekey_owner;

--
-- Name: TABLE _notifications; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._notifications IS 'Messages to endpoints: those that wait, and the last ones that were delivered or given up.';


--
-- Name: _claim_message(integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._claim_message(endpoints integer[]) RETURNS TABLE(id bigint, message_id uuid, endpoint_id integer, event text, body text, attempts integer)
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey._claim_message(endpoints integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _claim_message(endpoints integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._claim_message(endpoints integer[]) IS 'The next message to one of these endpoints, which nobody else gets before its pause is over; none: nothing is due.';


--
-- Name: _claims(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._claims() RETURNS jsonb
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._claims() OWNER TO rekey_owner;

--
-- Name: FUNCTION _claims(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._claims() IS 'The claims of the JWT as PostgREST passes them on; NULL where there are none, {} where they are no object.';


--
-- Name: _clear_chunks(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._clear_chunks() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  delete from rekey._chunks c
  where c.id in (
    select d.id from rekey._chunks d
    where not exists (select from rekey.rotations r where r.pass_id = d.pass_id)
      and not exists (select from rekey.rotations r where r.verification_id = d.pass_id and r.state in ('running', 'verifying'))
    for update skip locked);
  delete from rekey._due d
  where d.ctid in (
    select u.ctid from rekey._due u
    where not exists (select from rekey.rotations r where r.pass_id = u.pass_id)
    for update skip locked);
  -- The coordinator and who ends a verification may both come here, each with locks that the other waits for.
  delete from rekey._verified d
  where d.ctid in (
    select v.ctid from rekey._verified v
    where not exists (select from rekey.rotations r where r.verification_id = v.verification_id and r.state in ('running', 'verifying'))
    for update skip locked);
end
$$;


ALTER FUNCTION rekey._clear_chunks() OWNER TO rekey_owner;

--
-- Name: FUNCTION _clear_chunks(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._clear_chunks() IS 'Deletes what passes and verifications leave whose rotations were all paused, superseded, rolled back or completed.';


--
-- Name: _is_own_trigger(oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_own_trigger(trigger_id oid) RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._is_own_trigger(trigger_id oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_own_trigger(trigger_id oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_own_trigger(trigger_id oid) IS 'Whether a trigger is one that pg_rekey puts on protected tables.';


--
-- Name: _code_in_updates(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._code_in_updates(leaf regclass) RETURNS TABLE(object text, code text)
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._code_in_updates(leaf regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _code_in_updates(leaf regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._code_in_updates(leaf regclass) IS 'Functions and types that are not PostgreSQL''s own, in what an UPDATE of this relation evaluates.';


--
-- Name: _code_of_others(oid, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._code_of_others(relation oid, reader name) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._code_of_others(relation oid, reader name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _code_of_others(relation oid, reader name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._code_of_others(relation oid, reader name) IS 'A function of neither a superuser nor the reader that reading a relation may run; NULL: there is none.';


--
-- Name: _collect_notifications(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._collect_notifications() RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_read bigint;
  v_head bigint;
  v_message record;
  v_over text[];
  v_new boolean := false;
begin
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
  return (select 'deliver' from rekey._notifications n where n.state = 'waiting' limit 1);
end
$$;


ALTER FUNCTION rekey._collect_notifications() OWNER TO rekey_owner;

--
-- Name: FUNCTION _collect_notifications(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._collect_notifications() IS 'Makes messages of what happened and lasts, and sends those to channels; deliver: some wait for somebody to deliver them; NULL: none.';


--
-- Name: protected_columns; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.protected_columns (
    id integer NOT NULL,
    label text NOT NULL,
    keyring_id integer NOT NULL,
    relation_name text NOT NULL,
    column_name name NOT NULL,
    context_columns name[] NOT NULL,
    places integer[] NOT NULL,
    is_text boolean NOT NULL,
    encrypt_on_write boolean NOT NULL,
    fire_triggers boolean NOT NULL,
    search_path text NOT NULL,
    owner name NOT NULL,
    seen jsonb,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT protected_columns_places_check CHECK ((cardinality(places) = (cardinality(context_columns) + 1)))
);


ALTER TABLE rekey.protected_columns OWNER TO rekey_owner;

--
-- Name: TABLE protected_columns; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.protected_columns IS 'Columns of the user''s own tables that are under rotation. Which relation and columns they are now is known to the guard function of each (rekey_targets.column_<id>_guard), which follows renames and restores.';


--
-- Name: COLUMN protected_columns.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.id IS 'Number of the column; its functions in schema rekey_targets are named column_<id>_...';


--
-- Name: COLUMN protected_columns.label; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.label IS 'schema.table.column as first registered: the first part of the context of its values. It stays when things are renamed.';


--
-- Name: COLUMN protected_columns.keyring_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.keyring_id IS 'Keyring for adoption and encryption on write.';


--
-- Name: COLUMN protected_columns.relation_name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.relation_name IS 'Name of the table, with its schema, as last seen: by it the column is found again where a restore brought rows without functions.';


--
-- Name: COLUMN protected_columns.column_name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.column_name IS 'Name of the column as last seen.';


--
-- Name: COLUMN protected_columns.context_columns; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.context_columns IS 'Names, as last seen, of the columns whose values, as text, are the rest of the context.';


--
-- Name: COLUMN protected_columns.places; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.places IS 'Ranks of the column and its context columns among them all in table order.';


--
-- Name: COLUMN protected_columns.is_text; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.is_text IS 'Whether it holds envelopes in text form; else in bytea.';


--
-- Name: COLUMN protected_columns.encrypt_on_write; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.encrypt_on_write IS 'Whether a trigger encrypts what is written.';


--
-- Name: COLUMN protected_columns.fire_triggers; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.fire_triggers IS 'Whether the triggers and rules of the table see what a rotation writes.';


--
-- Name: COLUMN protected_columns.search_path; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.search_path IS 'The search path that is in force where a rotation fires them.';


--
-- Name: COLUMN protected_columns.owner; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.owner IS 'Owner of the table when it was registered or rebound: who may register it again after it was dropped.';


--
-- Name: COLUMN protected_columns.seen; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.seen IS 'How many rows of each keyring (by its id) opened at the last complete count; NULL: there was none. Where the column is blocked, those keyrings wait for it.';


--
-- Name: COLUMN protected_columns.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.protected_columns.created_at IS 'When it was registered.';


--
-- Name: _column_bodies(rekey.protected_columns); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_bodies(protected rekey.protected_columns) RETURNS TABLE(name text, arguments text, result text, volatility text, body text)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_X$
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
  v_from text;
  v_select text;
  v_page text;
begin
  -- The statements have places for the column (%1$s), the relation (%2$s), context (%3$s) and key (%4$s) of a row, all
  -- columns that these take (%5$s), and the bytes of context and key (%6$s).
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
    array_agg(case when t.cmax is null then '''' else %3$s end) filter (where t.cmin < $5), array_agg(%4$s) filter (where t.cmin < $5)
  from sized t';

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
    (select string_agg(distinct 't.' || n.name, ', ') from unnest(v_names || v_key_names) as n(name)), coalesce(v_lengths, ''));
end
$body$),
    ('count', 'relation regclass, keyrings integer[]', 'table (keyring_id integer, version integer, rows bigint)', 'stable', '
begin
  if keyrings = ''{}'' then
    perform rekey_targets.' || v_prefix || '_sql(relation, null);
    return;
  end if;
  for keyring_id, version, rows in execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    'with begun as (
      select case when ' || v_may_be || ' then g.start end as start, count(*) as rows
      from (select ' || v_start || ' as start from only %2$s t where t.%1$s is not null offset 0) g group by 1
    ), headed as (
      select (get_byte(h.header, 3) << 24) | (get_byte(h.header, 4) << 16) | (get_byte(h.header, 5) << 8) | get_byte(h.header, 6) as keyring_id,
        (get_byte(h.header, 7) << 24) | (get_byte(h.header, 8) << 16) | (get_byte(h.header, 9) << 8) | get_byte(h.header, 10) as version, g.rows
      from begun g cross join lateral (select ' || v_header || ' as header offset 0) h
    )
    select e.keyring_id, e.version, sum(e.rows)::bigint from headed e where $1 is null or e.keyring_id = any ($1) group by 1, 2') || ') using keyrings loop
    return next;
  end loop;
end
'),
    ('scan', 'relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[]', 'record', 'stable', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and h.header is not null and ($3 is null or substr(h.header, 4, 4) = any ($3))
      and ($6 is null or age(t.xmin) <= age($6))
    order by t.ctid limit $4' || v_page) || ')
  into next, rows, ciphertexts, contexts, keys
  using first, until, case when keyrings is not null then array(select int4send(k.id) from unnest(keyrings) as k(id)) end, max_rows, max_bytes, since;
end
'),
    ('read', 'relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, out next tid, out rows tid[], out ciphertexts bytea[], out contexts bytea[], out keys text[]', 'record', 'volatile', '
begin
  execute rekey_targets.' || v_prefix || '_sql(relation, case when keyrings is null then ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and t.%1$s is not null and h.header is null
    order by t.ctid limit $4 for no key update of t skip locked' || v_page) || ' else ' || quote_literal(
    v_select || '
    where t.ctid >= $1 and t.ctid < $2 and substr(h.header, 4, 4) = any ($3) and h.header <> all ($6)
    order by t.ctid limit $4' || v_page) || ' end)
  into next, rows, ciphertexts, contexts, keys
  using first, until, array(select int4send(k.id) from unnest(keyrings) as k(id)), max_rows, max_bytes,
    array(select ''\x524b01'' || int4send(k.id) || int4send(k.version) from unnest(keyrings, versions) as k(id, version));
end
'),
    ('write', 'relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], out locked tid[], out written bigint', 'record', 'volatile', '
declare
  -- (A subselect hides from the planner how many rows there are: for some hundreds it would rather read a whole table of some
  -- thousand blocks, batch after batch, than follow their pointers.)
  v_lock text := rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    'with held as materialized (
      select u.row, t.ctid as now from unnest((select $1), (select $2)) as u(row, start) join only %2$s t on t.ctid = u.row and ($2 is null or ' || v_begins || ')
      for no key update of t skip locked
    )
    select array_agg(h.row) from held h where h.now = h.row') || ');
  v_update text := rekey_targets.' || v_prefix || '_sql(relation, ' || quote_literal(
    'update only %2$s t set %1$s = ' || v_stored || '
    from rows from (pg_catalog.unnest((select $1)), pg_catalog.unnest((select $2)), pg_catalog.unnest((select $3))) as u(row, start, ciphertext)
    where t.ctid operator(pg_catalog.=) u.row and ($2 is null or ' || v_begins || ')
    returning t.%1$s operator(pg_catalog.=) (' || v_stored || ')' || case when protected.is_text then ' collate pg_catalog."C"' else '' end) || ');
  v_kept boolean;' || v_kept_role || '
begin
  execute v_lock into locked using rows, starts;
  written := 0;
  if locked is null then
    return;
  elsif cardinality(locked) < cardinality(rows) then
    select array_agg(u.row), case when starts is not null then array_agg(u.start) end, array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext) where u.row = any (locked);
  end if;
  ' || v_before || '
  -- A trigger may have kept the row, or put another value into it.
  for v_kept in execute v_update using rows, starts, ciphertexts loop
    written := written operator(pg_catalog.+) case when v_kept then 1 else 0 end;
  end loop;
  ' || v_after || '
  set constraints all immediate;
end
')
  ) as b(suffix, arguments, result, volatility, body);
end
$_X$;


ALTER FUNCTION rekey._column_bodies(protected rekey.protected_columns) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_bodies(protected rekey.protected_columns); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_bodies(protected rekey.protected_columns) IS 'The functions of a protected column as they must be: sql (puts a statement together, having locked what a partition is a part of; template NULL: only locks the table, with its partitions), count, scan, read, write; each PL/pgSQL, SECURITY DEFINER, owned by the owner of the table.';


--
-- Name: _path_schemas(text, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._path_schemas(search_path text, owner name) RETURNS name[]
    LANGUAGE sql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._path_schemas(search_path text, owner name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _path_schemas(search_path text, owner name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._path_schemas(search_path text, owner name) IS 'The schemas of a search path, as the owner of a table has it.';


--
-- Name: _others_schemas(regclass, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._others_schemas(relation regclass, search_path text) RETURNS SETOF name
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._others_schemas(relation regclass, search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _others_schemas(relation regclass, search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._others_schemas(relation regclass, search_path text) IS 'The schemas of a search path in which others may create than the owner of this table, and who may do all in its database.';


--
-- Name: _refused_updates(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refused_updates(relation regclass) RETURNS TABLE(publication name, why text)
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._refused_updates(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refused_updates(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refused_updates(relation regclass) IS 'The publications because of which every UPDATE of a relation, a sweep''s too, is refused by PostgreSQL (42P10, 55000), and why.';


--
-- Name: _relations_here(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._relations_here(relation regclass) RETURNS SETOF regclass
    LANGUAGE plpgsql STABLE ROWS 1
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if (select c.relkind from pg_class c where c.oid = relation) = 'p' then
    return query select c.oid::regclass from rekey._parts(relation) p join pg_class c on c.oid = p where c.relkind <> 'p';
  elsif relation is not null then
    return next relation;
  end if;
end
$$;


ALTER FUNCTION rekey._relations_here(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _relations_here(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._relations_here(relation regclass) IS 'The relations of a table that have rows in this database: itself, or the leaves of its partitions.';


--
-- Name: _update_triggers(regclass, smallint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._update_triggers(relation regclass, attnum smallint) RETURNS TABLE(leaf regclass, trigger_id oid)
    LANGUAGE sql STABLE ROWS 1
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._update_triggers(relation regclass, attnum smallint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _update_triggers(relation regclass, attnum smallint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._update_triggers(relation regclass, attnum smallint) IS 'The triggers, on or off, that are for the updates of a rotation of this column, on each relation that has rows. (None of PostgreSQL''s own: the column is no key.)';


--
-- Name: _column_findings(regclass, smallint, boolean, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text) RETURNS TABLE(kind text, fatal boolean, finding text, advice text, action text)
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text) IS 'What envelopes in a column break, and what a sweep of it fires, with this search path. fatal: it cannot be protected; action: as in rekey.find_unprotected().';


--
-- Name: _column_shape(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_shape(id integer, OUT relation regclass, OUT attnums smallint[]) RETURNS record
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
begin
  select d.refobjid::regclass, array_agg(d.refobjsubid::smallint order by d.refobjsubid)
  into relation, attnums
  from pg_depend d
  where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure(format('rekey_targets.column_%s_guard()', id))
    and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0
  group by d.refobjid;
end
$$;


ALTER FUNCTION rekey._column_shape(id integer, OUT relation regclass, OUT attnums smallint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_shape(id integer, OUT relation regclass, OUT attnums smallint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_shape(id integer, OUT relation regclass, OUT attnums smallint[]) IS 'The table of a protected column now, and the numbers of the columns that its guard names, in table order.';


--
-- Name: _column_id(regclass, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_id(relation regclass, column_name name) RETURNS integer
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._column_id(relation regclass, column_name name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_id(relation regclass, column_name name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_id(relation regclass, column_name name) IS 'The number of a protected column, by what it is called now; NULL where there is none.';


--
-- Name: _column_problem(rekey.protected_columns, regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_problem(protected rekey.protected_columns, part regclass DEFAULT NULL::regclass) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $_$
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
  if cardinality(v_shape.attnums) <> cardinality(protected.places) then
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
$_$;


ALTER FUNCTION rekey._column_problem(protected rekey.protected_columns, part regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_problem(protected rekey.protected_columns, part regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_problem(protected rekey.protected_columns, part regclass) IS 'Why a protected column can be neither swept nor counted now, and what to do; NULL: it can. part: nothing is done now but in this one of its partitions.';


--
-- Name: _column_statements(rekey.protected_columns, regclass, smallint[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) RETURNS text[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    AS $_$
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
      (select string_agg(format('t.%I', a.attname), ', ' order by p.rank) from unnest(protected.places) with ordinality as p(place, rank)
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
  -- In the replica role too, in which subscriptions apply what they get.
  foreach v_name in array rekey._trigger_names(protected) loop
    v_statements := v_statements || format('alter table %s enable always trigger %I', target, v_name);
  end loop;
  return v_statements;
end
$_$;


ALTER FUNCTION rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) IS 'Drops the functions of a protected column, and returns the statements with which the owner of the table makes them and the triggers, for this table.';


--
-- Name: _column_status(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._column_status() RETURNS TABLE(label text, relation regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, problem text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  return query
    select c.label, s.relation, coalesce(a.attname, c.column_name), rekey._keyring_name(c.keyring_id), c.context_columns, c.encrypt_on_write,
      c.fire_triggers, c.search_path, rekey._column_problem(c)
    from rekey.protected_columns c
    left join lateral rekey._column_shape(c.id) s on true
    left join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[c.places[1]]
    order by c.label;
end
$$;


ALTER FUNCTION rekey._column_status() OWNER TO rekey_owner;

--
-- Name: FUNCTION _column_status(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._column_status() IS 'What the view rekey.column_status shows.';


--
-- Name: _utc(timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._utc(at timestamp with time zone) RETURNS text
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._utc(at timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _utc(at timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._utc(at timestamp with time zone) IS 'A time as messages have it.';


--
-- Name: _notifier; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._notifier (
    singleton boolean DEFAULT true NOT NULL,
    audit_id bigint NOT NULL,
    since timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT _notifier_singleton_check CHECK (singleton)
);


ALTER TABLE rekey._notifier OWNER TO rekey_owner;

--
-- Name: TABLE _notifier; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._notifier IS 'One row while there are endpoints: up to which entry of the audit log messages were made, and since when there are endpoints.';


--
-- Name: _worker; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._worker (
    singleton boolean DEFAULT true NOT NULL,
    last_tick_at timestamp with time zone,
    last_tick_seconds double precision,
    last_census_at timestamp with time zone,
    locked_since timestamp with time zone,
    locked_noted_at timestamp with time zone,
    last_error text,
    last_error_at timestamp with time zone,
    next_batch_at timestamp with time zone,
    CONSTRAINT _worker_singleton_check CHECK (singleton)
);


ALTER TABLE rekey._worker OWNER TO rekey_owner;

--
-- Name: TABLE _worker; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._worker IS 'One row: when the unattended work last ran, since when it lacks the KEK, and when the throttle lets the next batch start.';


--
-- Name: encryption_keys; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.encryption_keys (
    id bigint NOT NULL,
    keyring_id integer NOT NULL,
    version integer NOT NULL,
    state text NOT NULL,
    is_active boolean GENERATED ALWAYS AS ((state = 'active'::text)) STORED NOT NULL,
    wrapped_key bytea,
    kek_id integer NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    activated_at timestamp with time zone,
    deactivated_at timestamp with time zone,
    compromised_at timestamp with time zone,
    destroy_after timestamp with time zone,
    destroyed_at timestamp with time zone,
    scheduled_from text,
    CONSTRAINT encryption_keys_destroy_after_check CHECK ((((state = 'destroy_scheduled'::text) = (scheduled_from IS NOT NULL)) AND ((state <> 'destroy_scheduled'::text) OR (destroy_after IS NOT NULL)))),
    CONSTRAINT encryption_keys_destroyed_at_check CHECK (((state = 'destroyed'::text) = (destroyed_at IS NOT NULL))),
    CONSTRAINT encryption_keys_state_check CHECK ((state = ANY (ARRAY['active'::text, 'decrypt_only'::text, 'disabled'::text, 'compromised'::text, 'destroy_scheduled'::text, 'destroyed'::text]))),
    CONSTRAINT encryption_keys_version_check CHECK ((version > 0)),
    CONSTRAINT encryption_keys_wrapped_key_check CHECK (((state = 'destroyed'::text) = (wrapped_key IS NULL)))
);


ALTER TABLE rekey.encryption_keys OWNER TO rekey_owner;

--
-- Name: TABLE encryption_keys; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.encryption_keys IS 'Data-encryption keys (DEKs), one row for each version of a keyring, wrapped under a KEK.';


--
-- Name: COLUMN encryption_keys.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.id IS 'Row number.';


--
-- Name: COLUMN encryption_keys.keyring_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.keyring_id IS 'The keyring.';


--
-- Name: COLUMN encryption_keys.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.version IS 'Version within the keyring, from 1.';


--
-- Name: COLUMN encryption_keys.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.state IS 'SP 800-57 state: active, decrypt_only (deactivated), disabled (suspended), compromised, destroy_scheduled, destroyed.';


--
-- Name: COLUMN encryption_keys.is_active; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.is_active IS 'Whether new values are encrypted with it.';


--
-- Name: COLUMN encryption_keys.wrapped_key; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.wrapped_key IS 'The 64-byte key sealed under the KEK (docs/format.md); NULL once destroyed.';


--
-- Name: COLUMN encryption_keys.kek_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.kek_id IS 'The KEK that wraps it.';


--
-- Name: COLUMN encryption_keys.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.created_at IS 'When it was made.';


--
-- Name: COLUMN encryption_keys.activated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.activated_at IS 'When it last became active.';


--
-- Name: COLUMN encryption_keys.deactivated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.deactivated_at IS 'When it last ceased to be active.';


--
-- Name: COLUMN encryption_keys.compromised_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.compromised_at IS 'When it was marked compromised.';


--
-- Name: COLUMN encryption_keys.destroy_after; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.destroy_after IS 'Before this time it is not destroyed.';


--
-- Name: COLUMN encryption_keys.destroyed_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.destroyed_at IS 'When its wrapped key was overwritten.';


--
-- Name: COLUMN encryption_keys.scheduled_from; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.encryption_keys.scheduled_from IS 'State that a cancelled destruction returns to.';


--
-- Name: keyrings; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.keyrings (
    id integer NOT NULL,
    name text NOT NULL,
    tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid NOT NULL,
    rotate_every interval,
    next_rotation_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    rotated_at timestamp with time zone DEFAULT now() NOT NULL,
    retired_at timestamp with time zone,
    CONSTRAINT keyrings_id_check CHECK ((id > 0)),
    CONSTRAINT keyrings_name_check CHECK ((((octet_length(name) >= 1) AND (octet_length(name) <= 63)) AND (name !~ '[\u0001-\u001F\u007F]'::text))),
    CONSTRAINT keyrings_next_rotation_at_check CHECK (isfinite(next_rotation_at)),
    CONSTRAINT keyrings_retired_check CHECK (((retired_at IS NULL) OR (rotate_every IS NULL))),
    CONSTRAINT keyrings_rotate_every_check CHECK (((rotate_every >= '00:01:00'::interval) AND (rotate_every <= '36500 days'::interval))),
    CONSTRAINT keyrings_schedule_check CHECK (((rotate_every IS NULL) = (next_rotation_at IS NULL)))
);


ALTER TABLE rekey.keyrings OWNER TO rekey_owner;

--
-- Name: TABLE keyrings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.keyrings IS 'Named lines of DEK versions: one a tenant, one an application, or just default.';


--
-- Name: COLUMN keyrings.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.id IS 'Random positive number; part of every ciphertext.';


--
-- Name: COLUMN keyrings.name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.name IS 'Unique name, 1 to 63 bytes without control characters.';


--
-- Name: COLUMN keyrings.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.tenant_id IS 'Tenant the keyring belongs to; the nil UUID: all of them.';


--
-- Name: COLUMN keyrings.rotate_every; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.rotate_every IS 'Cryptoperiod (SP 800-57): time between scheduled rotations, one minute or more; NULL: none.';


--
-- Name: COLUMN keyrings.next_rotation_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.next_rotation_at IS 'When the next scheduled rotation is due.';


--
-- Name: COLUMN keyrings.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.created_at IS 'When it was created.';


--
-- Name: COLUMN keyrings.rotated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.rotated_at IS 'When its active version was made.';


--
-- Name: COLUMN keyrings.retired_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keyrings.retired_at IS 'When it was retired: it takes no new values.';


--
-- Name: rotation_failures; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.rotation_failures (
    id bigint NOT NULL,
    rotation_id bigint,
    keyring_id integer NOT NULL,
    target text NOT NULL,
    relation text NOT NULL,
    row_key text NOT NULL,
    row_hash bytea GENERATED ALWAYS AS (sha256((replace(row_key, chr(92), (chr(92) || chr(92))))::bytea)) STORED NOT NULL,
    version integer,
    reason text NOT NULL,
    sqlstate text,
    verification_id bigint,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    resolved_at timestamp with time zone,
    resolution text,
    resolved_by text,
    resolve_reason text,
    CONSTRAINT rotation_failures_resolution_check CHECK ((resolution = ANY (ARRAY['retry'::text, 'discard'::text, 'cleared'::text]))),
    CONSTRAINT rotation_failures_resolved_check CHECK (((resolved_at IS NULL) = (resolution IS NULL)))
);


ALTER TABLE rekey.rotation_failures OWNER TO rekey_owner;

--
-- Name: TABLE rotation_failures; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.rotation_failures IS 'Quarantine: rows that did not open in a rotation, or that their table did not let it change. They are left as they were, and keep their key from destruction.';


--
-- Name: COLUMN rotation_failures.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.id IS 'Number of the entry.';


--
-- Name: COLUMN rotation_failures.rotation_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.rotation_id IS 'Rotation in which the row failed, the last one; NULL: the census found it, and no rotation has met it.';


--
-- Name: COLUMN rotation_failures.keyring_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.keyring_id IS 'Keyring of the row.';


--
-- Name: COLUMN rotation_failures.target; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.target IS 'Target the row is in.';


--
-- Name: COLUMN rotation_failures.relation; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.relation IS 'Table the row is in.';


--
-- Name: COLUMN rotation_failures.row_key; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.row_key IS 'Primary key of the row, its parts as text, separated by a slash.';


--
-- Name: COLUMN rotation_failures.row_hash; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.row_hash IS 'SHA-256 of row_key.';


--
-- Name: COLUMN rotation_failures.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.version IS 'Key version the row stands on; NULL: it is no envelope yet.';


--
-- Name: COLUMN rotation_failures.reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.reason IS 'Why it did not open, or the error with which its table refused it.';


--
-- Name: COLUMN rotation_failures.sqlstate; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.sqlstate IS 'SQLSTATE of that error; NULL: the row does not open.';


--
-- Name: COLUMN rotation_failures.verification_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.verification_id IS 'Verification that saw it last.';


--
-- Name: COLUMN rotation_failures.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.created_at IS 'When it first failed.';


--
-- Name: COLUMN rotation_failures.resolved_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.resolved_at IS 'When the entry was closed; NULL: it is open.';


--
-- Name: COLUMN rotation_failures.resolution; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.resolution IS 'retry (tried again), discard (given up), cleared (the row opens again, or is gone); NULL while it is open.';


--
-- Name: COLUMN rotation_failures.resolved_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.resolved_by IS 'Who closed it.';


--
-- Name: COLUMN rotation_failures.resolve_reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_failures.resolve_reason IS 'What whoever closed it said.';


--
-- Name: rotations; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.rotations (
    id bigint NOT NULL,
    keyring_id integer NOT NULL,
    from_versions integer[] NOT NULL,
    to_version integer NOT NULL,
    previous_version integer,
    state text DEFAULT 'queued'::text NOT NULL,
    trigger text NOT NULL,
    reason text,
    requested_by text NOT NULL,
    rows_total bigint,
    rows_done bigint DEFAULT 0 NOT NULL,
    rows_failed bigint DEFAULT 0 NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    last_error text,
    next_attempt_at timestamp with time zone,
    blocked_by jsonb,
    blocked_since timestamp with time zone,
    pass_id bigint,
    passes integer DEFAULT 0 NOT NULL,
    barrier_at timestamp with time zone,
    verification_id bigint,
    column_id integer,
    formats text[],
    forced boolean DEFAULT false NOT NULL,
    unwrap text,
    in_line boolean DEFAULT false NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    CONSTRAINT rotations_state_check CHECK ((state = ANY (ARRAY['queued'::text, 'running'::text, 'paused'::text, 'verifying'::text, 'completed'::text, 'completed_with_failures'::text, 'failed'::text, 'rolled_back'::text, 'superseded'::text]))),
    CONSTRAINT rotations_trigger_check CHECK ((trigger = ANY (ARRAY['manual'::text, 'schedule'::text, 'compromise'::text, 'rollback'::text, 'adoption'::text])))
)
WITH (fillfactor='50');


ALTER TABLE rekey.rotations OWNER TO rekey_owner;

--
-- Name: TABLE rotations; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.rotations IS 'Rotations: which keyring goes from which versions to which, and how far it is.';


--
-- Name: COLUMN rotations.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.id IS 'Number of the rotation.';


--
-- Name: COLUMN rotations.keyring_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.keyring_id IS 'Keyring that is rotated.';


--
-- Name: COLUMN rotations.from_versions; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.from_versions IS 'Versions whose rows it takes along.';


--
-- Name: COLUMN rotations.to_version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.to_version IS 'Version it brings them to.';


--
-- Name: COLUMN rotations.previous_version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.previous_version IS 'Version that was active before: what a rollback makes active again; NULL where there is none to go back to.';


--
-- Name: COLUMN rotations.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.state IS 'queued, running, paused, verifying, failed (these are under way), completed, completed_with_failures, rolled_back, superseded.';


--
-- Name: COLUMN rotations.trigger; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.trigger IS 'Why: manual, schedule, compromise, rollback, adoption.';


--
-- Name: COLUMN rotations.reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.reason IS 'What whoever asked for it said.';


--
-- Name: COLUMN rotations.requested_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.requested_by IS 'Who asked for it.';


--
-- Name: COLUMN rotations.rows_total; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.rows_total IS 'Rows to re-encrypt; NULL until they are counted.';


--
-- Name: COLUMN rotations.rows_done; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.rows_done IS 'Rows re-encrypted.';


--
-- Name: COLUMN rotations.rows_failed; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.rows_failed IS 'Rows in quarantine.';


--
-- Name: COLUMN rotations.attempts; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.attempts IS 'Failed attempts in a row: of the rotation, or of the batch that fails.';


--
-- Name: COLUMN rotations.last_error; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.last_error IS 'The last error.';


--
-- Name: COLUMN rotations.next_attempt_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.next_attempt_at IS 'It goes on after this time; NULL: at once.';


--
-- Name: COLUMN rotations.blocked_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.blocked_by IS 'What it waits for.';


--
-- Name: COLUMN rotations.blocked_since; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.blocked_since IS 'Since when it waits for that.';


--
-- Name: COLUMN rotations.pass_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.pass_id IS 'Number of the pass over the tables that it takes part in.';


--
-- Name: COLUMN rotations.passes; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.passes IS 'Passes that it has begun.';


--
-- Name: COLUMN rotations.barrier_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.barrier_at IS 'When every writer of an older version was seen to be gone.';


--
-- Name: COLUMN rotations.verification_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.verification_id IS 'Number of the verification that it takes part in; NULL: none yet.';


--
-- Name: COLUMN rotations.column_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.column_id IS 'Protected column that is adopted; NULL for other rotations, and once it is no longer protected.';


--
-- Name: COLUMN rotations.formats; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.formats IS 'Formats that are adopted; NULL for other rotations.';


--
-- Name: COLUMN rotations.forced; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.forced IS 'Whether values that look encrypted in another format are adopted as plaintext.';


--
-- Name: COLUMN rotations.unwrap; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.unwrap IS 'What the client takes off opened values: json, php, pickle; NULL: nothing.';


--
-- Name: COLUMN rotations.in_line; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.in_line IS 'Whether it is an adoption that waits, queued, until nothing else of its keyring is under way.';


--
-- Name: COLUMN rotations.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.created_at IS 'When it was asked for; from then on new values are encrypted with to_version.';


--
-- Name: COLUMN rotations.started_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.started_at IS 'When the first row was looked at.';


--
-- Name: COLUMN rotations.finished_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotations.finished_at IS 'When it ended.';


--
-- Name: schedule_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.schedule_status AS
 -- in sql/code
;


ALTER TABLE rekey.schedule_status OWNER TO rekey_owner;

--
-- Name: VIEW schedule_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.schedule_status IS 'When each keyring is rotated next; overdue: it should have been 10 minutes ago.';


--
-- Name: COLUMN schedule_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.schedule_status.keyring IS 'Name of the keyring.';


--
-- Name: COLUMN schedule_status.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.schedule_status.tenant_id IS 'Its tenant.';


--
-- Name: COLUMN schedule_status.rotate_every; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.schedule_status.rotate_every IS 'Its cryptoperiod; NULL: no schedule.';


--
-- Name: COLUMN schedule_status.next_rotation_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.schedule_status.next_rotation_at IS 'When the next scheduled rotation is due.';


--
-- Name: COLUMN schedule_status.overdue; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.schedule_status.overdue IS 'Whether that was more than 10 minutes ago.';


--
-- Name: settings; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.settings (
    singleton boolean DEFAULT true NOT NULL,
    kek_provider text DEFAULT 'session'::text NOT NULL,
    kek_secret_name text DEFAULT 'pg_rekey_kek'::text NOT NULL,
    kek_file text DEFAULT 'pg_rekey.kek'::text NOT NULL,
    destroy_wait interval DEFAULT '45 days'::interval NOT NULL,
    destroy_search text DEFAULT 'database'::text NOT NULL,
    batch_target interval DEFAULT '00:00:00.2'::interval NOT NULL,
    step_limit interval,
    max_rows_per_second integer,
    min_pace real DEFAULT 0.25 NOT NULL,
    max_attempts integer DEFAULT 8 NOT NULL,
    apply_plaintext text DEFAULT 'refuse'::text NOT NULL,
    tenant_check text,
    jwt_admin_claim text,
    postgrest_login text DEFAULT 'authenticator'::text NOT NULL,
    audit_keep interval DEFAULT '3 years'::interval NOT NULL,
    notify_blocked interval DEFAULT '00:15:00'::interval NOT NULL,
    notify_destruction interval DEFAULT '7 days'::interval NOT NULL,
    notify_silent interval DEFAULT '00:05:00'::interval NOT NULL,
    CONSTRAINT settings_apply_plaintext_check CHECK ((apply_plaintext = ANY (ARRAY['refuse'::text, 'pass'::text]))),
    CONSTRAINT settings_audit_keep_check CHECK (((('2001-01-01 00:00:00'::timestamp without time zone + audit_keep) >= '2002-01-01 00:00:00'::timestamp without time zone) AND (('2001-01-01 00:00:00'::timestamp without time zone + audit_keep) <= '2101-01-01 00:00:00'::timestamp without time zone))),
    CONSTRAINT settings_batch_target_check CHECK (((batch_target >= '00:00:00.01'::interval) AND (batch_target <= '00:01:00'::interval))),
    CONSTRAINT settings_destroy_search_check CHECK ((destroy_search = ANY (ARRAY['database'::text, 'columns'::text]))),
    CONSTRAINT settings_destroy_wait_check CHECK (((destroy_wait >= '00:00:00'::interval) AND (destroy_wait <= '3650 days'::interval))),
    CONSTRAINT settings_jwt_admin_claim_check CHECK ((jwt_admin_claim <> ''::text)),
    CONSTRAINT settings_kek_file_check CHECK (((kek_file <> ''::text) AND (kek_file !~ '^/|^[A-Za-z]:|(^|/)\.\.(/|$)'::text))),
    CONSTRAINT settings_kek_provider_check CHECK ((kek_provider = ANY (ARRAY['session'::text, 'vault'::text, 'file'::text]))),
    CONSTRAINT settings_kek_secret_name_check CHECK ((kek_secret_name <> ''::text)),
    CONSTRAINT settings_max_attempts_check CHECK (((max_attempts >= 1) AND (max_attempts <= 1000))),
    CONSTRAINT settings_max_rows_per_second_check CHECK ((max_rows_per_second > 0)),
    CONSTRAINT settings_min_pace_check CHECK (((min_pace >= (0.01)::double precision) AND (min_pace <= (1)::double precision))),
    CONSTRAINT settings_notify_blocked_check CHECK (((notify_blocked >= '00:01:00'::interval) AND (notify_blocked <= '30 days'::interval))),
    CONSTRAINT settings_notify_destruction_check CHECK (((notify_destruction >= '00:00:00'::interval) AND (notify_destruction <= '3650 days'::interval))),
    CONSTRAINT settings_notify_silent_check CHECK (((notify_silent >= '00:02:00'::interval) AND (notify_silent <= '1 day'::interval))),
    CONSTRAINT settings_postgrest_login_check CHECK ((postgrest_login <> ''::text)),
    CONSTRAINT settings_singleton_check CHECK (singleton),
    CONSTRAINT settings_step_limit_check CHECK (((step_limit >= '00:00:00.1'::interval) AND (step_limit <= '1 day'::interval)))
);


ALTER TABLE rekey.settings OWNER TO rekey_owner;

--
-- Name: TABLE settings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.settings IS 'One row: how this database rotates. Change it with rekey.set_setting().';


--
-- Name: COLUMN settings.singleton; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.singleton IS 'Always true: there is one row.';


--
-- Name: COLUMN settings.kek_provider; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.kek_provider IS 'Where the key-encryption key comes from when the session did not unlock itself: session (nowhere else), vault (Supabase Vault), file (on the database server).';


--
-- Name: COLUMN settings.kek_secret_name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.kek_secret_name IS 'Name of the KEK in vault.decrypted_secrets; the next KEK is looked for under this name with _new appended.';


--
-- Name: COLUMN settings.kek_file; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.kek_file IS 'File of the KEK, relative to the data directory (a link to a file elsewhere will do); the next KEK is looked for under this name with _new appended.';


--
-- Name: COLUMN settings.destroy_wait; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.destroy_wait IS 'Time between the request to destroy a key version and its destruction, at most 3650 days. Should be longer than backups are kept.';


--
-- Name: COLUMN settings.destroy_search; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.destroy_search IS 'Where a key version is looked for before it is destroyed: database (in every table and materialized view, with the rights of who runs the worker) or columns (in protected columns and secrets only: copies elsewhere are lost with the key).';


--
-- Name: COLUMN settings.batch_target; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.batch_target IS 'Time that one batch of re-encryption aims at, 10 ms to 60 s.';


--
-- Name: COLUMN settings.step_limit; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.step_limit IS 'Time after which a batch is cancelled, 100 ms to 1 day: a trigger of the table sleeps, or loops. Without one: 100 times batch_target. Under pg_cron a job of its own looks for it.';


--
-- Name: COLUMN settings.max_rows_per_second; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.max_rows_per_second IS 'Throttle of re-encryption over all workers, in rows a second. Without one: as fast as it goes.';


--
-- Name: COLUMN settings.min_pace; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.min_pace IS 'Part of the time, 0.01 to 1, that a worker works at least while others use the server: then it pauses after each batch, as autovacuum does. 1: it gives way to nobody. Alone it works all the time, and so it does where a key is compromised.';


--
-- Name: COLUMN settings.max_attempts; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.max_attempts IS 'Failed attempts in a row after which a rotation, or a batch of it, is not tried again: the rotation is failed once nothing else is left to do.';


--
-- Name: COLUMN settings.apply_plaintext; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.apply_plaintext IS 'What becomes of a plain value that replication brings for a column that is encrypted on write, where there is no KEK to seal it with: refuse (the subscription stops, and its error says why) or pass (it is stored plain, with a warning).';


--
-- Name: COLUMN settings.tenant_check; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.tenant_check IS 'Name, with its schema, of a function (tenant_id uuid) returns boolean that decides who reaches which tenant, in place of the default: can_access_tenant() has it.';


--
-- Name: COLUMN settings.jwt_admin_claim; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.jwt_admin_claim IS 'Key in the app_metadata of a JWT whose value true makes its bearer an administrator of rotation. Without one: nobody is.';


--
-- Name: COLUMN settings.postgrest_login; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.postgrest_login IS 'Role that PostgREST logs in as. Only from its sessions are refusals of the RPC audited and claims believed there: any other login that may set the role authenticated can run SQL, and make up both.';


--
-- Name: COLUMN settings.audit_keep; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.audit_keep IS 'How long entries of the audit log stay at least before they may be removed, 1 to 100 years.';


--
-- Name: COLUMN settings.notify_blocked; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.notify_blocked IS 'How long a rotation is held up before endpoints are told, 1 minute to 30 days.';


--
-- Name: COLUMN settings.notify_destruction; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.notify_destruction IS 'How long before a key version is destroyed endpoints are told, at most 3650 days.';


--
-- Name: COLUMN settings.notify_silent; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.settings.notify_silent IS 'How long no worker has ticked, or had the KEK, before endpoints are told, 2 minutes to 1 day.';


--
-- Name: _conditions(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._conditions() RETURNS TABLE(event text, subject text, data jsonb)
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._conditions() OWNER TO rekey_owner;

--
-- Name: FUNCTION _conditions(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._conditions() IS 'What lasts now and is worth a message: rotations that are held up, open failures, overdue keyrings, destructions that come near, no KEK, no worker.';


--
-- Name: _context(text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._context(parts text[]) RETURNS bytea
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_part text;
  v_context bytea := ''::bytea;
begin
  foreach v_part in array coalesce(parts, '{}') loop
    v_context := v_context || rekey._part(v_part);
  end loop;
  return v_context;
end
$$;


ALTER FUNCTION rekey._context(parts text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _context(parts text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._context(parts text[]) IS 'A whole context: its parts one after the other.';


--
-- Name: _coordinate(boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rotation record;
  v_unswept bigint[];
  v_count integer;
begin
  perform rekey._clear_chunks();

  keyring_count := 0;
  -- Who has no rows in what is in trouble does not wait for it.
  for v_rotation in
    select distinct r.pass_id from rekey.rotations r
    where r.state = 'running' and r.pass_id is not null and not exists (select from rekey._chunks c where c.pass_id = r.pass_id and c.attempts = 0)
  loop
    perform rekey._fail_stuck(v_rotation.pass_id);
    v_unswept := array(select u.rotation_id from rekey._unswept(v_rotation.pass_id) u);
    perform from rekey.rotations r
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept) order by r.id for no key update;
    update rekey.rotations r set state = 'verifying', pass_id = null, barrier_at = null, blocked_by = null, blocked_since = null
    where r.state = 'running' and r.pass_id = v_rotation.pass_id and r.id <> all (v_unswept);
    get diagnostics v_count = row_count;
    keyring_count := keyring_count + v_count;
  end loop;
  if keyring_count > 0 then
    event := 'swept';
    return;
  end if;

  keyring_count := 0;
  for v_rotation in
    select r.id, r.keyring_id, r.from_versions from rekey.rotations r
    where r.state = 'verifying' and r.barrier_at is null and rekey._is_due(r.next_attempt_at)
    order by r.id limit 500 for no key update skip locked
  loop
    if rekey._barrier(v_rotation.keyring_id, v_rotation.from_versions) then
      update rekey.rotations r set barrier_at = clock_timestamp(), blocked_by = null, blocked_since = null, next_attempt_at = null
      where r.id = v_rotation.id;
      keyring_count := keyring_count + 1;
      event := 'swept';
    else
      update rekey.rotations r
      set blocked_by = rekey._lock_holders(v_rotation.keyring_id, v_rotation.from_versions, coalesce(r.blocked_since, now())),
          blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '500 milliseconds'
      where r.id = v_rotation.id;
      event := coalesce(event, 'blocked');
      detail := coalesce(detail, jsonb_build_object('rotation', v_rotation.id));
    end if;
  end loop;
  if event is not null then
    return;
  end if;

  if planning then
    select p.event, p.keyring_count, p.detail into event, keyring_count, detail from rekey._plan() p;
  else
    -- As _plan() will find them: who holds one up does not hold up the batches.
    perform from rekey.rotations r
    where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line and rekey._is_due(r.next_attempt_at) limit 1 for update skip locked;
    event := case when found then 'whole' end;
  end if;
end
$$;


ALTER FUNCTION rekey._coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb) IS 'What one worker does for all: ends passes, tries the barrier, begins passes; without planning, says that one is to be begun (event whole).';


--
-- Name: _copied_passphrases(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._copied_passphrases() RETURNS bytea[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_passphrases bytea[];
begin
  if to_regclass('pg_temp.pg_rekey_passphrases') is not null then
    execute format('select array_agg(p.passphrase order by p.ctid) from pg_temp.%I p', 'pg_rekey_passphrases') into v_passphrases;
  end if;
  return v_passphrases;
end
$$;


ALTER FUNCTION rekey._copied_passphrases() OWNER TO rekey_owner;

--
-- Name: FUNCTION _copied_passphrases(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._copied_passphrases() IS 'The passphrases of the temporary table pg_rekey_passphrases (passphrase bytea), where there is one.';


--
-- Name: _count(integer[], boolean, bigint, boolean, rekey._locked); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._count(keyrings integer[], opening boolean, verification_id bigint DEFAULT NULL::bigint, apart boolean DEFAULT false, locked rekey._locked DEFAULT NULL::rekey._locked) RETURNS TABLE(target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[], refused bigint, error text, code text)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_locked rekey._locked := locked;
  v_targets rekey._target[];
  v_now rekey._target[];
begin
  if v_locked.functions is null then
    v_locked := rekey._lock_targets(apart);
  end if;
  perform rekey._refuse_blocked(keyrings, v_locked.targets);
  v_targets := array(select t from unnest(v_locked.targets) t where t.problem is null order by t.relation);
  return query
    select e.target, e.relation::regclass, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint, e.error, e.sqlstate
    from jsonb_to_recordset(v_locked.errors) as e(target text, relation oid, error text, sqlstate text);
  -- One statement, one snapshot: no row escapes by moving.
  if opening then
    return query select o.* from rekey._open_rows(v_targets, keyrings, verification_id, apart) o;
  else
    return query
      select t.target, t.relation, c.keyring_id, c.version, c.rows, 0::bigint, null::text[], null::text[], 0::bigint, null::text, null::text
      from rekey._count_rows(v_targets, keyrings) c join unnest(v_targets) with ordinality t on t.ordinality = c.place
      where c.keyring_id is not null;
  end if;
  v_now := array(select t from rekey._targets() t);
  perform rekey._refuse_blocked(keyrings, v_now);
  if rekey._target_state() is distinct from v_locked.functions
     or array(select t.relation from unnest(v_targets) t order by t.relation) is distinct from array(
       select t.relation from unnest(v_now) t
       where t.problem is null and t.target not in (select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e) order by t.relation) then
    raise exception 'a protected column or its partitions were changed while its rows were counted' using errcode = 'RK005',
      hint = 'Try again.';
  end if;
end
$$;


ALTER FUNCTION rekey._count(keyrings integer[], opening boolean, verification_id bigint, apart boolean, locked rekey._locked) OWNER TO rekey_owner;

--
-- Name: FUNCTION _count(keyrings integer[], opening boolean, verification_id bigint, apart boolean, locked rekey._locked); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._count(keyrings integer[], opening boolean, verification_id bigint, apart boolean, locked rekey._locked) IS 'Counts every target by keyring and version, in one snapshot; opening: checks every tag too, but those that the verification checked before (rekey._open_rows() says more of the columns). A combination may come in several rows. locked: what rekey._lock_targets() locked in this transaction; NULL: nothing yet. RK005: a target is blocked.';


--
-- Name: _count_rows(rekey._target[], integer[], boolean, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean DEFAULT false, whole boolean DEFAULT false) RETURNS SETOF rekey._counted
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean, whole boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _count_rows(targets rekey._target[], keyrings integer[], apart boolean, whole boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean, whole boolean) IS 'Counts targets by keyring and version, in the snapshot of the caller''s statement, as rekey._call_count(); keyring NULL: values that are no envelopes. place: which of the targets.';


--
-- Name: _cut(text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._cut(value text, bytes integer) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._cut(value text, bytes integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _cut(value text, bytes integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._cut(value text, bytes integer) IS 'A text of at most so many bytes: what is longer ends with "...".';


--
-- Name: _cut_details(jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._cut_details(details jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._cut_details(details jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _cut_details(details jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._cut_details(details jsonb) IS 'Details of an audit entry, bounded: each text of 1024 bytes at most, what else is longer as the beginning of its text; more than 16 fields, or a field name over 63 bytes, as one text.';


--
-- Name: _dearmor(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._dearmor(armored text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._dearmor(armored text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _dearmor(armored text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._dearmor(armored text) IS 'pgcrypto''s dearmor(), wherever it is.';


--
-- Name: _decoded(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._decoded(value text) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_digits text := regexp_replace(value, '^(\\\\x|0x)', '');
begin
  if length(v_digits) % 2 = 0 and v_digits ~ '^[0-9a-fA-F]+$' then
    return decode(v_digits, 'hex');
  end if;
  v_digits := rtrim(translate(value, E'-_ \r\n\t', '+/'), '=');
  -- Bits that no byte takes are 0 at the end: texts of the same alphabet seldom are base64.
  if v_digits ~ '^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048])?$' then
    return decode(rpad(v_digits, (length(v_digits) + 3) / 4 * 4, '='), 'base64');
  end if;
  return null;
end
$_$;


ALTER FUNCTION rekey._decoded(value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _decoded(value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._decoded(value text) IS 'The bytes of a text (of the encoding escape) that is hexadecimal (with \x or 0x before it, or without) or base64 (of both alphabets, with or without padding and line breaks); NULL: it is neither.';


--
-- Name: _decrypt(bytea, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._decrypt(envelope bytea, context text[], pass bytea) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_place bigint;
  v_key bytea;
  v_tenant uuid;
  v_bytes bytea;
  v_iv bytea;
  v_sealed bytea;
  v_plaintext bytea;
begin
  -- A pass begins as an envelope does, with the keyring and its newest version.
  if substr(pass, 1, 7) = substr(envelope, 1, 7) and rekey._is_envelope(pass) and rekey._is_envelope(envelope) then
    v_place := rekey._int4(pass, 7)::bigint - rekey._int4(envelope, 7);
    v_key := rekey._passed_key(pass, context[array_lower(context, 1)], v_place);
    if v_key is not null then
      v_iv := substr(envelope, 12, 16);
      v_sealed := substr(envelope, 28);
      v_bytes := substr(envelope, 1, 11) || rekey._context(context);
      v_plaintext := rekey._aead_decrypt(v_key, v_iv, v_sealed, v_bytes);
    end if;
  end if;
  if v_plaintext is null then
    if rekey._is_envelope(envelope) then
      select k.tenant_id into v_tenant from rekey.keyrings k where k.id = rekey._int4(envelope, 3);
    end if;
    v_bytes := rekey._check_context(context, coalesce(v_tenant, '00000000-0000-0000-0000-000000000000'));
    v_plaintext := rekey._open(envelope, v_bytes);
  end if;
  return v_plaintext;
end
$$;


ALTER FUNCTION rekey._decrypt(envelope bytea, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _decrypt(envelope bytea, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._decrypt(envelope bytea, context text[], pass bytea) IS 'What rekey.decrypt() does, of an envelope that is not NULL.';


--
-- Name: _dek(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._dek(keyring_id integer, version integer) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_unlocked text := coalesce(current_setting('rekey.unlocked', true), '');
  -- A few variables, since old and new versions are read in turns.
  v_name text := 'rekey.key_' || ((keyring_id # version) & 7);
  v_carried text := current_setting(v_name, true);
  v_wrapped bytea;
  v_kek_id integer;
  v_seal bytea;
  v_wrapping bytea;
  v_aad bytea;
  v_bytes bytea;
  v_iv bytea;
  v_key bytea;
begin
  select k.wrapped_key, k.kek_id, s.key into v_wrapped, v_kek_id, v_seal
  from rekey.encryption_keys k
  join rekey.keks e on e.id = k.kek_id
  left join rekey._session_key s on true
  where k.keyring_id = _dek.keyring_id and k.version = _dek.version
    and rekey._key_problem(k.version, k.state, k.kek_id, e.state, false) is null;
  -- (It is anybody's to set.)
  if found and length(v_carried) = 256 and v_carried ~ '^[0-9a-f]+$' and v_seal is not null then
    -- IV, 64 bytes with padding, tag
    v_bytes := decode(v_carried, 'hex');
    v_iv := substr(v_bytes, 1, 16);
    v_bytes := substr(v_bytes, 17);
    v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
    v_key := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  end if;
  if v_key is null then
    v_wrapping := (rekey._kek()).kek;
    v_wrapping := rekey._wrapping_key(v_wrapping);
    v_aad := rekey._wrap_aad(v_kek_id, keyring_id, version);
    v_key := rekey._unwrap(v_wrapping, v_wrapped, v_aad);
    -- Not for a session that only says that it is unlocked: the KEK may be the server's.
    if v_key is not null and v_seal is not null and (v_unlocked = '' or rekey._session_keks() is not null) then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._carried_aad(keyring_id, version, v_kek_id, v_unlocked);
      v_bytes := rekey._aead_encrypt(v_seal, v_iv, v_key, v_aad);
      v_carried := set_config(v_name, encode(v_iv || v_bytes, 'hex'), left(v_unlocked, 1) <> 's');
    end if;
  end if;
  return v_key;
end
$_$;


ALTER FUNCTION rekey._dek(keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _dek(keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._dek(keyring_id integer, version integer) IS 'Unwraps one key, for a single value; rekey._deks() is for many. NULL where it may not or cannot be used, and where there is none: rekey._dek_problem(). RK001, RK002 without the KEK.';


--
-- Name: _dek_problem(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._dek_problem(keyring_id integer, version integer) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return (
    select coalesce(rekey._key_problem(k.version, k.state, k.kek_id, e.state, false), format('the wrapped key of version %s is damaged', k.version))
    from rekey.encryption_keys k
    join rekey.keks e on e.id = k.kek_id
    where k.keyring_id = _dek_problem.keyring_id and k.version = _dek_problem.version);
end
$$;


ALTER FUNCTION rekey._dek_problem(keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _dek_problem(keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._dek_problem(keyring_id integer, version integer) IS 'Why rekey._dek() has no key; NULL: there is no such version.';


--
-- Name: _deks(integer[], integer[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._deks(keyrings integer[], versions integer[], sweeping boolean DEFAULT false) RETURNS TABLE(keyring_id integer, version integer, key bytea, problem text)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET work_mem TO '64MB'
    SET enable_nestloop TO 'on'
    AS $$
begin
  -- Keys are columns here, and nowhere parameters of a statement.
  return query
    with w as materialized (
      select rekey._wrapping_key(x.kek) as wrapping_key from rekey._kek() x
    )
    select o.keyring_id, o.version, o.key,
      case when o.key is null then coalesce(o.problem, format('the wrapped key of version %s is damaged', o.version)) end
    from (
      select n.keyring_id, n.version, n.problem,
        case when n.problem is null then rekey._unwrap(n.wrapping_key, n.wrapped_key, n.aad) end as key
      from (
        select k.keyring_id, k.version, k.wrapped_key, w.wrapping_key, rekey._wrap_aad(k.kek_id, k.keyring_id, k.version) as aad,
          rekey._key_problem(k.version, k.state, k.kek_id, e.state, sweeping) as problem
        from w
        cross join (select distinct u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version)) g
        join rekey.encryption_keys k on k.keyring_id = g.keyring_id and k.version = g.version
        join rekey.keks e on e.id = k.kek_id
        offset 0
      ) n
      offset 0
    ) o;
end
$$;


ALTER FUNCTION rekey._deks(keyrings integer[], versions integer[], sweeping boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _deks(keyrings integer[], versions integer[], sweeping boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._deks(keyrings integer[], versions integer[], sweeping boolean) IS 'Unwraps the keys of these versions, once each. key is NULL, and problem says why, where it may not or cannot be used. sweeping: versions scheduled for destruction open too. RK001, RK002 without the KEK.';


--
-- Name: _destroy(integer, integer, bigint, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_postponed text := elsewhere;
begin
  perform rekey._lock_kek();  -- first, as everywhere: a KEK rotation holds every key
  v_keyring := rekey._keyring(rekey._keyring_name(keyring_id), lock => true);
  v_key := rekey._key(keyring_id, version);
  if v_key.state <> 'destroy_scheduled' or v_key.destroy_after > now() then
    return;
  end if;
  if v_postponed is null then
    begin
      perform rekey._refuse_in_use(v_keyring, version, rows);
    exception when sqlstate 'RK005' then
      v_postponed := sqlerrm;
    end;
  end if;
  if v_postponed is not null then
    -- The next attempt looks anew.
    delete from rekey._search_versions v where (v.keyring_id, v.version) = (_destroy.keyring_id, _destroy.version);
    perform rekey._postpone(array[keyring_id], array[version], v_postponed);
    return;
  end if;
  update rekey.encryption_keys k
  set state = 'destroyed', wrapped_key = null, destroyed_at = now(), scheduled_from = null
  where k.id = v_key.id;
  perform rekey._audit('key.destroyed', v_keyring.name, version);
end
$$;


ALTER FUNCTION rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _destroy(keyring_id integer, version integer, rows bigint, elsewhere text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) IS 'Destroys a version that is due, or postpones it where something needs it. rows: as counted; elsewhere: where the search found it, NULL: nowhere.';


--
-- Name: _destroyable_header(text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._destroyable_header(keyring text, version integer) RETURNS bytea
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  return (
    select rekey._header(k.keyring_id, k.version)
    from rekey.encryption_keys k join rekey.keyrings r on r.id = k.keyring_id
    where r.name = keyring and k.version = _destroyable_header.version and k.state in ('decrypt_only', 'disabled', 'compromised')
      and (rekey._settings()).destroy_search = 'database');
end
$$;


ALTER FUNCTION rekey._destroyable_header(keyring text, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _destroyable_header(keyring text, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._destroyable_header(keyring text, version integer) IS 'What the envelopes of a version begin with; NULL where it cannot be destroyed, or is not looked for outside of protected columns.';


--
-- Name: _destruction_step(boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._destruction_step(clock_jumped boolean) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_search rekey._searches;
  v_keyrings integer[];
  v_versions integer[];
  v_covered integer;
  v_next record;
  v_problem text;
begin
  -- After a jump of the clock, what is due within the day may only seem so too.
  select array_agg(k.keyring_id order by k.id), array_agg(k.version order by k.id) into v_keyrings, v_versions
  from rekey.encryption_keys k
  where k.state = 'destroy_scheduled' and k.destroy_after <= now() + case when clock_jumped then interval '1 day' else interval '0' end;
  if v_keyrings is null then
    perform rekey._expect_none_doomed();
    return null;
  elsif clock_jumped then
    perform rekey._postpone(v_keyrings, v_versions, 'more than a day since the last tick: the clock may be wrong');
    return null;
  elsif not pg_try_advisory_xact_lock(0, 5) then
    return null;  -- another worker is at it
  end if;
  v_search := rekey._open_search();
  select count(*) into v_covered from unnest(v_keyrings, v_versions) as u(keyring_id, version)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version;
  if v_search.id is null or v_search.scope <> (rekey._settings()).destroy_search or v_covered = 0
     or v_search.state = 'complete' and v_search.completed_at not between now() - interval '36 hours' and clock_timestamp()
     or v_search.state <> 'complete' and v_search.postponed and v_covered < cardinality(v_keyrings) then
    perform rekey._begin_search();
    return 'search';
  elsif v_search.state <> 'complete' and v_search.incomplete_since is null then
    return 'search';
  elsif v_search.state <> 'complete' and v_search.postponed then
    -- The day after: somebody may have granted what was missing.
    update rekey._search_relations r set tried_by = '{}', problem = null where r.search_id = v_search.id and r.problem is not null;
    update rekey._searches s set incomplete_since = null, postponed = false where s.id = v_search.id;
    return 'search';
  elsif v_search.state <> 'complete' then
    update rekey._searches s set postponed = true where s.id = v_search.id;
    perform rekey._postpone(v_keyrings, v_versions, coalesce(rekey._search_problem(v_search.id), 'the search of the database is not complete'));
    return null;
  end if;

  if v_search.counted_as is distinct from rekey._target_state() or v_search.counted_at not between now() - interval '1 hour' and clock_timestamp()
     or exists (select from unnest(v_keyrings, v_versions) as u(keyring_id, version)
                join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version and v.rows is null) then
    -- Once for all that are due; nobody is kept waiting by it.
    begin
      with counted as materialized (
        select c.keyring_id, c.version, sum(c.rows) as rows from rekey._count(v_keyrings, false) c group by c.keyring_id, c.version
      )
      update rekey._search_versions v
      set rows = coalesce((select c.rows from counted c where c.keyring_id = v.keyring_id and c.version = v.version), 0)
      where v.search_id = v_search.id and v.keyring_id = any (v_keyrings);
      update rekey._searches s set counted_at = now(), counted_as = rekey._target_state() where s.id = v_search.id;
    exception when sqlstate 'RK005' then
      v_problem := sqlerrm;
    end;
    if v_problem is not null then
      perform rekey._postpone(v_keyrings, v_versions, v_problem);
      return null;
    end if;
    return 'more';
  end if;

  select v.keyring_id, v.version, v.rows,
    (select string_agg(format('%s.%I', f.relation_name, f.column_name), ', ' order by f.relation_name, f.column_name) || format(' holds envelopes of the version, in %s rows: see rekey.search_findings', sum(f.rows))
     from rekey._search_finds f where f.search_id = v.search_id and f.keyring_id = v.keyring_id and f.version = v.version) as elsewhere
  into v_next
  from unnest(v_keyrings, v_versions) with ordinality as u(keyring_id, version, place)
  join rekey._search_versions v on v.search_id = v_search.id and v.keyring_id = u.keyring_id and v.version = u.version
  order by u.place limit 1;
  perform rekey._destroy(v_next.keyring_id, v_next.version, v_next.rows, v_next.elsewhere);
  return 'more';
end
$$;


ALTER FUNCTION rekey._destruction_step(clock_jumped boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _destruction_step(clock_jumped boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._destruction_step(clock_jumped boolean) IS 'Destroys one version that is due, or does what has to be done before. search: it takes steps of the search, which read with the rights of who calls them; more: call again; NULL: there is nothing left to do now.';


--
-- Name: _drop_triggers(regclass, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._drop_triggers(target regclass, id integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_name name;
begin
  for v_name in
    select t.tgname from pg_trigger t where t.tgrelid = target and t.tgparentid = 0 and t.tgname ~ format('^zz_pg_rekey_%s(_insert|_update)?$', id)
  loop
    execute format('drop trigger %I on %s', v_name, target);
  end loop;
end
$_$;


ALTER FUNCTION rekey._drop_triggers(target regclass, id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _drop_triggers(target regclass, id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._drop_triggers(target regclass, id integer) IS 'Drops the triggers of a protected column, with the rights of the caller.';


--
-- Name: _due_rows(bigint[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._due_rows(rotations bigint[]) RETURNS TABLE(rotation_id bigint, target text, relation oid, indexed boolean, adopting boolean, rows bigint)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  -- Values that are no envelopes are counted only where all are.
  v_keyrings integer[] := (
    select case when bool_or(r.trigger = 'adoption') then null else array_agg(r.keyring_id) end
    from rekey.rotations r where r.id = any (rotations));
  v_targets rekey._target[];
begin
  if (select bool_and(r.trigger = 'adoption') from rekey.rotations r where r.id = any (rotations)) then
    v_targets := array(
      select t from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id cross join lateral rekey._targets(p.label) t
      where r.id = any (rotations) and t.problem is null);
  else
    v_targets := rekey._targets_now();
  end if;
  return query
    select r.id, t.target, t.relation::oid, t.indexed, r.trigger = 'adoption', sum(c.rows)::bigint
    from rekey._count_rows(v_targets, v_keyrings, apart => true) c
    join unnest(v_targets) with ordinality t on t.ordinality = c.place
    join (select r.*, p.label from rekey.rotations r left join rekey.protected_columns p on p.id = r.column_id where r.id = any (rotations)) r
      on case when r.trigger = 'adoption' then c.keyring_id is null and t.target = r.label
              else c.keyring_id = r.keyring_id and c.version <> r.to_version end
    where c.error is null  -- whom that concerns, the verification finds out, which counts again
    group by r.id, t.target, t.relation, t.indexed, r.trigger;
end
$$;


ALTER FUNCTION rekey._due_rows(rotations bigint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _due_rows(rotations bigint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._due_rows(rotations bigint[]) IS 'What these rotations have to do, by relation, where it is not blocked and can be counted. (By number: a name would take rights on its schema.)';


--
-- Name: _secrets_seen; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._secrets_seen (
    keyring_id integer NOT NULL,
    rows bigint NOT NULL
);


ALTER TABLE rekey._secrets_seen OWNER TO rekey_owner;

--
-- Name: TABLE _secrets_seen; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._secrets_seen IS 'How many secrets of a keyring the last complete count saw: where there are none any more, a rotation asks whether that is meant.';


--
-- Name: _emptied(jsonb, integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._emptied(counted jsonb, keyrings integer[]) RETURNS jsonb
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._emptied(counted jsonb, keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _emptied(counted jsonb, keyrings integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._emptied(counted jsonb, keyrings integer[]) IS 'By keyring, the protected columns, and rekey.secrets, that held 1,000 of its rows or more at their last complete count, and none at this one: what rotations have to wait for. counted: objects with target, keyring_id, rows.';


--
-- Name: _end_adoptions(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._end_adoptions(column_id integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  update rekey.rotations r
  set state = 'superseded', finished_at = now(), in_line = false, pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.column_id = _end_adoptions.column_id and rekey._is_under_way(r.state);
end
$$;


ALTER FUNCTION rekey._end_adoptions(column_id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _end_adoptions(column_id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._end_adoptions(column_id integer) IS 'Ends the adoption of a column that is in line or, where its table is gone, under way.';


--
-- Name: _endpoints; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._endpoints (
    id integer NOT NULL,
    name text NOT NULL,
    kind text NOT NULL,
    events text[],
    allow_private boolean NOT NULL,
    by_pg_net boolean NOT NULL,
    channel name,
    sealed bytea,
    kek_id integer,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT _endpoints_by_pg_net_check CHECK (((NOT by_pg_net) OR (kind = ANY (ARRAY['webhook'::text, 'slack'::text])))),
    CONSTRAINT _endpoints_kind_check CHECK ((kind = ANY (ARRAY['webhook'::text, 'slack'::text, 'email'::text, 'channel'::text]))),
    CONSTRAINT _endpoints_name_check CHECK ((name ~ '^[A-Za-z0-9._-]{1,63}$'::text)),
    CONSTRAINT _endpoints_sealed_check CHECK ((((kind = 'channel'::text) = (channel IS NOT NULL)) AND ((kind = 'channel'::text) = (sealed IS NULL)) AND ((sealed IS NULL) = (kek_id IS NULL))))
);


ALTER TABLE rekey._endpoints OWNER TO rekey_owner;

--
-- Name: TABLE _endpoints; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._endpoints IS 'Who is told what happens. sealed: the address, with the signing secret before it, under the KEK (docs/format.md).';


--
-- Name: _endpoint(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._endpoint(name text) RETURNS rekey._endpoints
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._endpoint(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _endpoint(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._endpoint(name text) IS 'An endpoint by its name. RK007: there is none.';


--
-- Name: _endpoint_aad(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._endpoint_aad(kek_id integer, endpoint_id integer) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._endpoint_aad(kek_id integer, endpoint_id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _endpoint_aad(kek_id integer, endpoint_id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._endpoint_aad(kek_id integer, endpoint_id integer) IS 'What the sealed address of an endpoint is bound to.';


--
-- Name: _enqueue(text, integer, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._enqueue(event text, count integer, subjects jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._enqueue(event text, count integer, subjects jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _enqueue(event text, count integer, subjects jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._enqueue(event text, count integer, subjects jsonb) IS 'Puts a message into the queue of every endpoint that wants events like this. count: how many there were; subjects: the first ones.';


--
-- Name: _random_bytes(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._random_bytes(count integer) RETURNS bytea
    LANGUAGE sql PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._random_bytes(count integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _random_bytes(count integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._random_bytes(count integer) IS 'count (1 to 1024) bytes from the random number generator of pgcrypto.';


--
-- Name: _session_key; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._session_key (
    singleton boolean DEFAULT true NOT NULL,
    key bytea NOT NULL,
    CONSTRAINT _session_key_length_check CHECK ((octet_length(key) = 64)),
    CONSTRAINT _session_key_singleton_check CHECK (singleton)
);


ALTER TABLE rekey._session_key OWNER TO rekey_owner;

--
-- Name: TABLE _session_key; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._session_key IS 'One row: the key under which an unlocked session carries the KEK.';


--
-- Name: _ensure_rows(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._ensure_rows() RETURNS void
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._ensure_rows() OWNER TO rekey_owner;

--
-- Name: FUNCTION _ensure_rows(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._ensure_rows() IS 'Makes the rows that there is one of. (The installation makes none: a restored dump brings its own.)';


--
-- Name: _envelope_of(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._envelope_of(value bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._envelope_of(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _envelope_of(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._envelope_of(value bytea) IS 'A value that means to be an envelope; NULL for any other.';


--
-- Name: _from_text(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._from_text(value text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._from_text(value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _from_text(value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._from_text(value text) IS 'Envelope of its text form, rk1: and base64 without line breaks; NULL for any other text.';


--
-- Name: _envelope_of(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._envelope_of(value text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._envelope_of(value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _envelope_of(value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._envelope_of(value text) IS 'As for bytea, of its text form; empty where that is damaged.';


--
-- Name: _expect_doomed(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._expect_doomed() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  -- Held till the end, so that rekey._expect_none_doomed() does not take it back before the version is seen.
  perform pg_advisory_xact_lock_shared(0, 6);
  perform setval('rekey._doomed', 1);
end
$$;


ALTER FUNCTION rekey._expect_doomed() OWNER TO rekey_owner;

--
-- Name: FUNCTION _expect_doomed(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._expect_doomed() IS 'From now on what is written into protected columns is looked at for versions that are scheduled for destruction.';


--
-- Name: _expect_none_doomed(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._expect_none_doomed() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if not rekey._may_be_doomed() then
    return;
  end if;
  begin
    if pg_try_advisory_xact_lock(0, 6) then
      -- In a statement of its own: it sees what was committed before the lock was given.
      if not exists (select from rekey.encryption_keys k where k.state = 'destroy_scheduled') then
        perform setval('rekey._doomed', 0);
      end if;
    end if;
    raise exception using errcode = 'RKEND';
  exception when sqlstate 'RKEND' then
    null;  -- gives the lock back at once, and keeps the value
  end;
end
$$;


ALTER FUNCTION rekey._expect_none_doomed() OWNER TO rekey_owner;

--
-- Name: FUNCTION _expect_none_doomed(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._expect_none_doomed() IS 'Takes rekey._expect_doomed() back where no version is scheduled. In READ COMMITTED only.';


--
-- Name: _explain_error(text, regclass, text, text, text, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  -- The innermost come first, and end where the function of the target is.
  v_functions text[] := array(
    select regexp_replace(f.found[1], ' line \d+ .*$', '')
    from regexp_matches(regexp_replace(context, '\mrekey(_targets)?"?\."?(_call_|column_|secrets_).*$', ''),
      '(?:PL/pgSQL function |SQL function ")([^"\n]*)', 'g') with ordinality as f(found, place)
    where f.found[1] not like 'rekey.%'
    order by f.place);
  v_path text := (select c.search_path from rekey.protected_columns c where c.label = target);
  v_function text;
  v_trigger name;
begin
  -- Without its schema, where the path of the sweep has that.
  select t.tgname, p.oid::regprocedure::text into v_trigger, v_function
  from pg_trigger t join pg_proc p on p.oid = t.tgfoid
  where t.tgrelid = relation and not t.tgisinternal and array[p.oid::regprocedure::text, quote_ident(p.proname) || '()'] && v_functions
  order by t.tgname limit 1;
  if split_part(v_functions[1], '.', 2) = '' and right(v_function, length(v_functions[1])) = v_functions[1] then
    v_functions[1] := v_function;
  end if;
  return format('%s: %s', relation,
    -- Of a row that is plain yet, the words of a table's own code may have the value in them.
    case when code = '55P03' then 'another session holds a lock that it waits for'
         when plain and left(code, 2) <> all ('{23,42,54,RK}') then 'an error of its own code' else rekey._cut(message, 500) end)
    || coalesce(' (trigger ' || quote_ident(v_trigger) || ')', '') || coalesce(', in ' || rekey._cut(v_functions[1], 200), '')
    || case when code in ('42P01', '42883', '42704', '3F000') then
      format('. A sweep runs it with search_path = %s: name it with its schema, %s, or give rekey.protect_column() or pg-rekey columns protect the path that it needs',
        coalesce(v_path, 'pg_catalog, pg_temp'),
        coalesce('ALTER FUNCTION ' || rekey._cut(v_functions[1], 200) || ' SET search_path = ...', 'give what the table calls a search path of its own')) else '' end;
end
$_$;


ALTER FUNCTION rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _explain_error(target text, relation regclass, message text, code text, context text, plain boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) IS 'An error in a table, as a target, in words: the table, the message, the trigger and function that it came from, and what to do where the search path is the cause. Bounded in length. plain: the column may hold plain values.';


--
-- Name: _fail_stuck(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._fail_stuck(pass_id bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_stuck jsonb;
  v_events jsonb;
begin
  if not exists (select from rekey._chunks c where c.pass_id = _fail_stuck.pass_id and c.stuck) then
    return;
  end if;
  select jsonb_object_agg(u.rotation_id, u.last_error) into v_stuck from rekey._unswept(pass_id) u where u.stuck;
  perform from rekey.rotations r where v_stuck ? r.id::text order by r.id for no key update;
  with failed as (
    update rekey.rotations r
    set state = 'failed', pass_id = null, next_attempt_at = null, last_error = v_stuck ->> r.id::text
    where v_stuck ? r.id::text and r.state = 'running' and r.pass_id = _fail_stuck.pass_id
    returning r.id, r.keyring_id, r.to_version, r.attempts, r.last_error, r.blocked_by
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.failed', 'keyring', k.name, 'version', f.to_version, 'rotation_id', f.id,
    'details', jsonb_build_object('attempt', f.attempts, 'sqlstate', f.blocked_by -> 0 ->> 'sqlstate', 'error', f.last_error)) order by f.id)
  into v_events
  from failed f join rekey.keyrings k on k.id = f.keyring_id;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;


ALTER FUNCTION rekey._fail_stuck(pass_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _fail_stuck(pass_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._fail_stuck(pass_id bigint) IS 'Fails the rotations of a pass of which nothing is left but what is stuck.';


--
-- Name: _find_rebind(regclass, name, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._find_rebind(target regclass, column_name name, label text) RETURNS rekey.protected_columns
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._find_rebind(target regclass, column_name name, label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _find_rebind(target regclass, column_name name, label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._find_rebind(target regclass, column_name name, label text) IS 'The protected column that rekey.rebind_column() is about. 42501: the caller owns not both tables; RK006: the column is registered as another; RK007: there is none.';


--
-- Name: _fingerprint(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._fingerprint(kek bytea) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._fingerprint(kek bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _fingerprint(kek bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._fingerprint(kek bytea) IS 'By which a KEK is recognised; tells nothing of it.';


--
-- Name: _finish_column(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._finish_column(id integer) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._finish_column(id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _finish_column(id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._finish_column(id integer) IS 'Takes back what rekey._register_column() lent, and checks what was made. RK005: the column cannot be swept.';


--
-- Name: _finish_rebind(integer, text, regclass[], name[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) IS 'Checks that every value of a rebound column opens, and notes what was settled. RK003: one does not open; RK005: the column is blocked still.';


--
-- Name: _is_kept(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_kept(event text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._is_kept(event text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_kept(event text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_kept(event text) IS 'Whether entries of this event are never removed from the audit log: what became of keys, and what was removed.';


--
-- Name: _first_bad(bigint, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text) RETURNS record
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text) IS 'The first entry of the audit log that is not as it should be, where the chain is all there from the entry after start on.';


--
-- Name: _first_place(text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._first_place(groups text[]) RETURNS integer
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  for v_place in 1 .. cardinality(groups) loop
    if groups[v_place] is not null then
      return v_place;
    end if;
  end loop;
  return null;
end
$$;


ALTER FUNCTION rekey._first_place(groups text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _first_place(groups text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._first_place(groups text[]) IS 'Where the first element that is not NULL stands.';


--
-- Name: _forget_column(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._forget_column(id integer) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._forget_column(id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _forget_column(id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._forget_column(id integer) IS 'Removes a column from the registry, with its functions. 25001: not in READ COMMITTED; RK005: envelopes are left, or it cannot be counted; RK007: there is none.';


--
-- Name: _forget_prepared(text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._forget_prepared(before text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_name text;
begin
  for v_name in
    select p.name from pg_prepared_statements p where not p.name || ' ' || extract(epoch from p.prepare_time) = any (before)
  loop
    execute format('deallocate %I', v_name);
  end loop;
end
$$;


ALTER FUNCTION rekey._forget_prepared(before text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _forget_prepared(before text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._forget_prepared(before text[]) IS 'Drops the prepared statements that were made since: no rollback does.';


--
-- Name: _function_names(name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._function_names(function_name name) RETURNS name[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._function_names(function_name name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _function_names(function_name name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._function_names(function_name name) IS 'What the functions of a target can be called: guard, sql, count, scan, read, write, trigger; rekey.secrets has not all of them. (An index finds them so; of a schema there is none.)';


--
-- Name: _function_statements(rekey.protected_columns, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._function_statements(protected rekey.protected_columns, owner name) RETURNS text[]
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey._function_statements(protected rekey.protected_columns, owner name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _function_statements(protected rekey.protected_columns, owner name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._function_statements(protected rekey.protected_columns, owner name) IS 'The statements that make the functions of rekey._column_bodies().';


--
-- Name: _guarded_settings(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._guarded_settings() RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return concat_ws(' ', current_setting('role'), session_user, current_setting('transaction_isolation'),
    quote_nullable(nullif(current_setting('rekey.unlocked', true), '')), quote_nullable(nullif(current_setting('request.jwt.claims', true), '')),
    quote_nullable(nullif(current_setting('request.method', true), '')));
end
$$;


ALTER FUNCTION rekey._guarded_settings() OWNER TO rekey_owner;

--
-- Name: FUNCTION _guarded_settings(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._guarded_settings() IS 'Settings of the session that say who acts, and with which KEK.';


--
-- Name: _sounds_secret(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sounds_secret(name text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._sounds_secret(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _sounds_secret(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sounds_secret(name text) IS 'Whether a name, of a column or a key of JSON, sounds like a secret: token, password, apiKey, smtpPass and their kin. token_count, passwordResetAt and the like do not.';


--
-- Name: _has_secret(json); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._has_secret(document json) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._has_secret(document json) OWNER TO rekey_owner;

--
-- Name: FUNCTION _has_secret(document json); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._has_secret(document json) IS 'Whether a JSON document has, at any depth, a string that is no envelope under a key that sounds like a secret, or in an array under one.';


--
-- Name: _header(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._header(keyring_id integer, version integer) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._header(keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _header(keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._header(keyring_id integer, version integer) IS 'The first 11 bytes of an envelope.';


--
-- Name: _headers(bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._headers(ciphertexts bytea[]) RETURNS bytea[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._headers(ciphertexts bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _headers(ciphertexts bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._headers(ciphertexts bytea[]) IS 'The different headers of envelopes.';


--
-- Name: _hits(integer, bytea, bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._hits(place integer, value bytea, wanted bytea[]) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._hits(place integer, value bytea, wanted bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _hits(place integer, value bytea, wanted bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._hits(place integer, value bytea, wanted bytea[]) IS 'As for text, of bytes: envelopes at their beginning or within, and their text form.';


--
-- Name: _hits(integer, text, bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._hits(place integer, value text, wanted bytea[]) RETURNS text
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._hits(place integer, value text, wanted bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _hits(place integer, value text, wanted bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._hits(place integer, value text, wanted bytea[]) IS 'The wanted headers of envelopes that stand within a text, as place:hex, separated by spaces; NULL: none.';


--
-- Name: _hold(oid, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._hold(relation oid, name text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '3 s'
    AS $$
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


ALTER FUNCTION rekey._hold(relation oid, name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _hold(relation oid, name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._hold(relation oid, name text) IS 'Keeps a relation from being given code until the subtransaction of the caller ends, which he undoes, and says why he is not to read it; NULL: nothing. name: by which he reads it; 42P01: it is another one''s.';


--
-- Name: _hold_blocked(bigint[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._hold_blocked(rotations bigint[]) RETURNS jsonb
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_blocked jsonb := rekey._blocked_targets((select array_agg(r.keyring_id) from rekey.rotations r where r.id = any (rotations)));
begin
  if v_blocked is null then
    return null;
  end if;
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  update rekey.rotations r
  set blocked_by = b.blocked, blocked_since = coalesce(r.blocked_since, now()), next_attempt_at = clock_timestamp() + interval '10 seconds'
  from (
    select o.id, (
      select jsonb_agg(t.value order by t.value ->> 'target') from jsonb_array_elements(v_blocked) t
      left join rekey.protected_columns c on c.label = t.value ->> 'target'
      where c.id is null or rekey._may_hold(c, array[o.keyring_id])) as blocked
    from rekey.rotations o where o.id = any (rotations)) b
  where r.id = b.id and b.blocked is not null and r.state = 'verifying';
  return v_blocked;
end
$$;


ALTER FUNCTION rekey._hold_blocked(rotations bigint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _hold_blocked(rotations bigint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._hold_blocked(rotations bigint[]) IS 'Has the rotations wait that a blocked target may hold rows of; returns which targets these are, NULL: none.';


--
-- Name: _home(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._home() RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return format('%s/%s', coalesce(rekey._system_identifier(), 0), (select d.oid from pg_database d where d.datname = current_database()));
end
$$;


ALTER FUNCTION rekey._home() OWNER TO rekey_owner;

--
-- Name: FUNCTION _home(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._home() IS 'In which cluster and database an oid is good.';


--
-- Name: _http_status(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._http_status(code text) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._http_status(code text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _http_status(code text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._http_status(code text) IS 'The HTTP status for an SQLSTATE of ours; NULL for any other.';


--
-- Name: _int4(bytea, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._int4(bytes bytea, place integer) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._int4(bytes bytea, place integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _int4(bytes bytea, place integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._int4(bytes bytea, place integer) IS 'The big-endian int4 at place (from 0).';


--
-- Name: _is_authentic(bytea, bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_authentic(key bytea, iv bytea, sealed bytea, aad bytea) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._is_authentic(key bytea, iv bytea, sealed bytea, aad bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_authentic(key bytea, iv bytea, sealed bytea, aad bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_authentic(key bytea, iv bytea, sealed bytea, aad bytea) IS 'Whether the tag of what rekey._aead_encrypt sealed is right. 22023 for lengths that cannot be and NULL.';


--
-- Name: _is_scheduled(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_scheduled(header bytea) RETURNS boolean
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._is_scheduled(header bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_scheduled(header bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_scheduled(header bytea) IS 'Whether it is the header of an envelope of a version that is scheduled for destruction.';


--
-- Name: _doomed; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

CREATE SEQUENCE rekey._doomed
    START WITH 0
    INCREMENT BY 1
    MINVALUE 0
    MAXVALUE 1
    CACHE 1;


ALTER TABLE rekey._doomed OWNER TO rekey_owner;

--
-- Name: SEQUENCE _doomed; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON SEQUENCE rekey._doomed IS '0: no version is scheduled for destruction; 1: one may be, and rekey._is_scheduled() knows.';


--
-- Name: _may_be_doomed(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_be_doomed() RETURNS boolean
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey._may_be_doomed() OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_be_doomed(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_be_doomed() IS 'Whether a version may be scheduled for destruction, without a query.';


--
-- Name: _is_doomed(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_doomed(value bytea) RETURNS boolean
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey._is_doomed(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_doomed(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_doomed(value bytea) IS 'Whether a value is an envelope of a version that is scheduled for destruction.';


--
-- Name: _is_doomed(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_doomed(value text) RETURNS boolean
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey._is_doomed(value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_doomed(value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_doomed(value text) IS 'As for bytea, of the text form.';


--
-- Name: _is_due(timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_due(next_attempt_at timestamp with time zone) RETURNS boolean
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey._is_due(next_attempt_at timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_due(next_attempt_at timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_due(next_attempt_at timestamp with time zone) IS 'Whether a pause is over. None is as long as 10 minutes: a time beyond that was noted by a clock that was wrong.';


--
-- Name: _is_envelope(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_envelope(value bytea) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._is_envelope(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_envelope(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_envelope(value bytea) IS 'Whether value has the shape of an envelope. Says nothing of its tag.';


--
-- Name: _is_extension_table(oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_extension_table(relation oid) RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._is_extension_table(relation oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_extension_table(relation oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_extension_table(relation oid) IS 'Whether a table belongs to pg_cron or Supabase Vault, which hold no envelopes.';


--
-- Name: _is_in_the_way(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_in_the_way() RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return (
    with l as materialized (select l.pid, l.granted, l.transactionid from pg_locks l where l.locktype = 'transactionid')
    select exists (
      select from l w join l h on h.transactionid = w.transactionid where not w.granted and h.granted and h.pid = pg_backend_pid()));
end
$$;


ALTER FUNCTION rekey._is_in_the_way() OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_in_the_way(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_in_the_way() IS 'Whether somebody waits for the end of this transaction.';


--
-- Name: _is_of_citus(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_of_citus(relation regclass) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._is_of_citus(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_of_citus(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_of_citus(relation regclass) IS 'Whether Citus distributes a table, also where it is not loaded.';


--
-- Name: _is_of_known_version(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_of_known_version(envelope bytea) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return rekey._is_envelope(envelope) and exists (
    select from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7) and k.state <> 'destroyed');
end
$$;


ALTER FUNCTION rekey._is_of_known_version(envelope bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_of_known_version(envelope bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_of_known_version(envelope bytea) IS 'Whether an envelope names a key version that there is.';


--
-- Name: _is_passing(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_passing(code text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._is_passing(code text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_passing(code text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_passing(code text) IS 'Whether an error with this SQLSTATE says nothing of the row at which it came: it is tried again.';


--
-- Name: _is_postgrest(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_postgrest() RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._is_postgrest() OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_postgrest(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_postgrest() IS 'Whether the session is PostgREST''s: of the role that the setting postgrest_login names.';


--
-- Name: _is_service_role(name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_service_role(caller name) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  -- Whoever may create roles can make one of that name, but none that passes by row-level security, as Supabase's does.
  return caller = 'service_role' and exists (select from pg_roles r where r.rolname = caller and r.rolbypassrls);
end
$$;


ALTER FUNCTION rekey._is_service_role(caller name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_service_role(caller name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_service_role(caller name) IS 'Whether the caller is Supabase''s service_role.';


--
-- Name: _is_trusted(name, regclass, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_trusted(extension name, class regclass, object oid) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_super boolean := (select r.rolsuper from pg_roles r where r.rolname = current_user);
begin
  return exists (
    select from pg_extension e
    join pg_depend d on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
    cross join lateral (
      select c.relowner as owner from pg_class c where d.classid = 'pg_class'::regclass and c.oid = d.objid
      union all
      select p.proowner from pg_proc p where d.classid = 'pg_proc'::regclass and p.oid = d.objid) o
    where e.extname = extension and d.classid = class and d.objid = object
      -- Who owns it can replace it. A superuser runs what superusers own; others, what belongs to who made the extension too.
      and (o.owner = e.extowner and not v_super or (select r.rolsuper from pg_roles r where r.oid = o.owner)));
end
$$;


ALTER FUNCTION rekey._is_trusted(extension name, class regclass, object oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_trusted(extension name, class regclass, object oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_trusted(extension name, class regclass, object oid) IS 'Whether an extension owns a relation or function, and nobody but superusers, or who made the extension, can replace it.';


--
-- Name: _is_unchanged(integer, name[], name, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $_$
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
        and t.tgenabled <> 'D' and t.tgfoid <> 'rekey._refuse_doomed()'::regprocedure and t.tgname !~ '^zz_pg_rekey_\d+$')
  into v_names, v_later;
  return v_names = names and not v_later;
end
$_$;


ALTER FUNCTION rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_unchanged(id integer, names name[], trigger_name name, relation oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) IS 'Whether a row may be sealed by the trigger of this name: neither rekey._refuse_other_table() nor _refuse_renamed() nor _refuse_later_trigger() would raise. false: one of them may.';


--
-- Name: _is_under_way(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._is_under_way(state text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._is_under_way(state text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _is_under_way(state text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._is_under_way(state text) IS 'Whether a rotation in this state still has work to do.';


--
-- Name: _keep_pace(timestamp with time zone, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._keep_pace(begun timestamp with time zone, rows bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
  v_ahead double precision := rows / (4 * v_rate) - extract(epoch from clock_timestamp() - begun);
begin
  if v_ahead > 0 and clock_timestamp() < begun + interval '1 minute' then
    perform pg_sleep(least(v_ahead, 60));
  end if;
end
$$;


ALTER FUNCTION rekey._keep_pace(begun timestamp with time zone, rows bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _keep_pace(begun timestamp with time zone, rows bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._keep_pace(begun timestamp with time zone, rows bigint) IS 'Sleeps where rows were opened faster since then than four times max_rows_per_second, which is the pace of a verification: within one transaction, whose snapshot holds up every VACUUM, and so no longer than a minute or two.';


--
-- Name: _keep_passphrases(bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._keep_passphrases(passphrases bytea[]) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_seal bytea := rekey._session_seal();
  v_iv bytea := rekey._random_bytes(16);
  v_aad bytea := rekey._session_aad('p');
  v_plain bytea;
  v_sealed bytea;
  v_set text;
begin
  v_plain := convert_to(coalesce(passphrases, '{}')::text, 'UTF8');
  v_sealed := rekey._aead_encrypt(v_seal, v_iv, v_plain, v_aad);
  v_set := set_config('rekey.passphrases', encode(v_iv || v_sealed, 'hex'), true);
  return v_set <> '';
end
$$;


ALTER FUNCTION rekey._keep_passphrases(passphrases bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _keep_passphrases(passphrases bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._keep_passphrases(passphrases bytea[]) IS 'Keeps passphrases until the end of the transaction, sealed, for rekey._passphrases(). True.';


--
-- Name: _kek(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._kek(OUT id integer, OUT kek bytea) RETURNS record
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_fingerprint text;
  v_keks bytea;
begin
  select k.id, k.fingerprint into _kek.id, v_fingerprint from rekey.keks k where k.state = 'active';
  if not found then
    raise exception 'no KEK is registered' using errcode = 'RK001',
      hint = 'Register one: pg-rekey init, or select rekey.register_kek().', constraint = 'register_kek';
  end if;
  v_keks := rekey._keks();
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    kek := substr(v_keks, 1 + 32 * v_place, 32);
    if rekey._fingerprint(kek) = v_fingerprint then
      return;
    end if;
  end loop;
  raise exception 'wrong KEK' using errcode = 'RK002',
    hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', v_fingerprint);
end
$$;


ALTER FUNCTION rekey._kek(OUT id integer, OUT kek bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _kek(OUT id integer, OUT kek bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._kek(OUT id integer, OUT kek bytea) IS 'The active KEK and its number. RK001: not available; RK002: another one is.';


--
-- Name: _keks(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._keks() RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_keks bytea := rekey._session_keks();
begin
  if v_keks is null then
    v_keks := rekey._provided_keks();
  end if;
  if v_keks is null then
    raise exception 'the KEK is not available' using errcode = 'RK001',
      hint = case (rekey._settings()).kek_provider
        when 'session' then 'Unlock first, in the same transaction: rekey.unlock(), or pg_rekey.unlock() in Python. Outside of a transaction it ends with its statement, unless its scope is session.'
        when 'vault' then format('The Vault has no secret %L of 64 hex characters or base64.', (rekey._settings()).kek_secret_name)
        else format('The file %L in the data directory is missing or holds no key.', (rekey._settings()).kek_file)
      end, constraint = case (rekey._settings()).kek_provider when 'session' then 'unlock' else '' end;
  end if;
  return v_keks;
end
$$;


ALTER FUNCTION rekey._keks() OWNER TO rekey_owner;

--
-- Name: FUNCTION _keks(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._keks() IS 'The KEK that can be had now, or the current and the next one. RK001: none.';


--
-- Name: _kept_hash(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._kept_hash(last bigint, OUT kept bigint, OUT hash text) RETURNS record
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._kept_hash(last bigint, OUT kept bigint, OUT hash text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _kept_hash(last bigint, OUT kept bigint, OUT hash text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._kept_hash(last bigint, OUT kept bigint, OUT hash text) IS 'How many entries up to a number are of those that are never removed, and SHA-256 over their hashes in order.';


--
-- Name: _key(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._key(keyring_id integer, version integer) RETURNS rekey.encryption_keys
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_key rekey.encryption_keys;
begin
  select * into v_key from rekey.encryption_keys k where k.keyring_id = _key.keyring_id and k.version = _key.version for update;
  if not found then
    raise exception 'the keyring has no version %', coalesce(version::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.key_status for its versions.', constraint = 'key_versions';
  end if;
  return v_key;
end
$$;


ALTER FUNCTION rekey._key(keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _key(keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._key(keyring_id integer, version integer) IS 'The key of that version, its row locked. RK007: there is none.';


--
-- Name: _key_problem(integer, text, integer, text, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) RETURNS text
    LANGUAGE sql STABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) IS 'Why a key may not be used; NULL: it may. sweeping: one that is scheduled for destruction may.';


--
-- Name: _keyring(text, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._keyring(name text, lock boolean DEFAULT false) RETURNS rekey.keyrings
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_keyring rekey.keyrings;
begin
  if lock then
    -- Not FOR UPDATE: the foreign key of rekey.secrets would keep writers waiting.
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name for no key update;
  else
    select * into v_keyring from rekey.keyrings k where k.name = _keyring.name;
  end if;
  if v_keyring.id is null then
    raise exception 'no such keyring: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.keyrings for those that there are; rekey.create_keyring() makes one.', constraint = 'create_keyring';
  end if;
  return v_keyring;
end
$$;


ALTER FUNCTION rekey._keyring(name text, lock boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _keyring(name text, lock boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._keyring(name text, lock boolean) IS 'The keyring of that name, its row locked if asked for. RK007: there is none.';


--
-- Name: _keyring_name(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._keyring_name(id integer) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._keyring_name(id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _keyring_name(id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._keyring_name(id integer) IS 'The name of a keyring.';


--
-- Name: _later_trigger(text, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._later_trigger(name text, relation oid) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._later_trigger(name text, relation oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _later_trigger(name text, relation oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._later_trigger(name text, relation oid) IS 'A trigger of a relation that may change a row after the trigger of this name; NULL: there is none.';


--
-- Name: _legacy_formats(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._legacy_formats() RETURNS TABLE(format text, marks text[])
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._legacy_formats() OWNER TO rekey_owner;

--
-- Name: FUNCTION _legacy_formats(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._legacy_formats() IS 'The formats that can be adopted, and which marks (rekey._legacy_mark) each may open; unmarked: a value without one, to be tried.';


--
-- Name: _legacy_mark(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._legacy_mark(value bytea) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_mark text;
begin
  if rekey._may_be_marked(value) then
    v_mark := coalesce(rekey._byte_mark(encode(substr(value, 1, 64), 'hex')), rekey._text_mark(encode(substr(value, 1, 1024), 'escape')),
      -- The tag comes last, behind what is looked at.
      case when octet_length(value) > 1024 and encode(substr(value, 1, 1024), 'escape')
        ~ '^(?:[0-9a-fA-F]{24}:[0-9a-fA-F]+|(?:[A-Za-z0-9+/]{16}|[A-Za-z0-9+/]{22}==):[A-Za-z0-9+/]+)$' then 'iv_tag' end);
  end if;
  -- Packets and raw tokens are told by little: so they have a length that they can have.
  return case
    when v_mark in ('pgp_sym', 'openpgp') and octet_length(value) <= 20 then null
    when v_mark = 'fernet' and substr(value, 1, 1) = '\x80' and (octet_length(value) < 73 or octet_length(value) % 16 <> 9) then null
    else v_mark end;
end
$_$;


ALTER FUNCTION rekey._legacy_mark(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _legacy_mark(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._legacy_mark(value bytea) IS 'Whose mark a value begins with, by name: envelope, the formats that open, and those that are known to be refused. NULL: none.';


--
-- Name: _lock_active(integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._lock_active(keyrings integer[]) RETURNS integer[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_versions integer[] := rekey._active_versions(keyrings);
  v_locked integer[];
begin
  loop
    perform pg_advisory_xact_lock_shared(w.keyring_id, w.version)
    from (select u.keyring_id, u.version from unnest(keyrings, v_versions) as u(keyring_id, version)
          where u.version is not null order by 1) w;
    v_locked := v_versions;
    v_versions := rekey._active_versions(keyrings);
    exit when v_versions is not distinct from v_locked;
  end loop;
  perform rekey._refuse_old_snapshot(keyrings, v_versions);
  return v_versions;
end
$$;


ALTER FUNCTION rekey._lock_active(keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _lock_active(keyrings integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._lock_active(keyrings integer[]) IS 'The active versions of these keyrings, none of which falls out of use before this transaction ends. NULL for a retired keyring. 40001 in REPEATABLE READ and SERIALIZABLE, where a rotation was committed since the snapshot.';


--
-- Name: _lock_holders(integer, integer[], timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._lock_holders(keyring_id integer, versions integer[], since timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS jsonb
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._lock_holders(keyring_id integer, versions integer[], since timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _lock_holders(keyring_id integer, versions integer[], since timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._lock_holders(keyring_id integer, versions integer[], since timestamp with time zone) IS 'Who still writes with these versions. since: what counts as the beginning of a transaction whose own is hidden from us.';


--
-- Name: _lock_kek(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._lock_kek() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  for v_try in 1 .. 5 loop
    perform from rekey.keks k where k.state = 'active' for share;
    exit when found or not exists (select from rekey.keks);
  end loop;
end
$$;


ALTER FUNCTION rekey._lock_kek() OWNER TO rekey_owner;

--
-- Name: FUNCTION _lock_kek(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._lock_kek() IS 'Keeps the active KEK from being replaced until the end of the transaction: taken by whoever makes a DEK.';


--
-- Name: _lock_targets(boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._lock_targets(apart boolean DEFAULT false) RETURNS rekey._locked
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_locked rekey._locked;
  v_tables rekey._target[];
begin
  v_locked.functions := rekey._target_state();
  v_tables := array(select distinct on (t.target) t from rekey._targets() t where t.problem is null order by t.target);
  v_locked.errors := (
    select jsonb_agg(jsonb_build_object('target', t.target, 'relation', t.whole::oid::bigint, 'sqlstate', c.code,
      'error', rekey._explain_error(t.target, t.whole, c.error, c.code, c.context, true)))
    from rekey._call_count((select array_agg(t.function_name) from unnest(v_tables) t), (select array_agg(t.whole) from unnest(v_tables) t), '{}', apart) c
    join unnest(v_tables) with ordinality t on t.ordinality = c.place);
  v_locked.targets := array(
    select t from rekey._targets() t
    where t.problem is not null
      or t.target in (select l.target from unnest(v_tables) l except select e.value ->> 'target' from jsonb_array_elements(v_locked.errors) e)
    order by t.relation);
  return v_locked;
end
$$;


ALTER FUNCTION rekey._lock_targets(apart boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _lock_targets(apart boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._lock_targets(apart boolean) IS 'Locks every target that is not blocked, with its partitions, until the transaction ends. apart: errors of one are told, and do not stop the others.';


--
-- Name: _look(bigint, bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._look(search_id bigint, wanted bytea[]) RETURNS TABLE(relation oid, name text, problem text, again boolean, hits text)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._look(search_id bigint, wanted bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _look(search_id bigint, wanted bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._look(search_id bigint, wanted bytea[]) IS 'Looks, in the snapshot of the statement that calls it and with the rights of who does, at all that the turns of a search have not read. again: it has to be read by turns, since it is large, or was rewritten.';


--
-- Name: _look_ahead(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._look_ahead(header bytea) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET standard_conforming_strings TO 'on'
    SET bytea_output TO 'hex'
    SET quote_all_identifiers TO 'off'
    SET constraint_exclusion TO 'off'
    SET lock_timeout TO '3 s'
    AS $$
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


ALTER FUNCTION rekey._look_ahead(header bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _look_ahead(header bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._look_ahead(header bytea) IS 'Says in warnings where envelopes of this header are outside of protected columns, as far as 2 seconds and the rights of the caller go.';


--
-- Name: _lost_part(rekey.protected_columns, oid[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._lost_part(protected rekey.protected_columns, leaves oid[]) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
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


ALTER FUNCTION rekey._lost_part(protected rekey.protected_columns, leaves oid[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _lost_part(protected rekey.protected_columns, leaves oid[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._lost_part(protected rekey.protected_columns, leaves oid[]) IS 'A relation that held values of a protected column, is still there, and is none of these, which its table consists of; NULL: there is none.';


--
-- Name: _mark_within(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._mark_within(value bytea) RETURNS text
    LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_mark text := rekey._legacy_mark(value);
begin
  if v_mark is null and rekey._may_be_wrapped(value) then
    v_mark := rekey._legacy_mark(rekey._marked_inside(value));
  end if;
  return v_mark;
end
$$;


ALTER FUNCTION rekey._mark_within(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _mark_within(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._mark_within(value bytea) IS 'Whose mark stands in a value, also under layers as of rekey._marked_inside(), by name; NULL: none.';


--
-- Name: _marked_inside(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._marked_inside(value bytea) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_inner bytea := value;
begin
  for v_layer in 1 .. 4 loop
    v_inner := rekey._unwrapped(v_inner);
    exit when v_inner is null or rekey._legacy_mark(v_inner) is not null;
  end loop;
  return case when rekey._legacy_mark(v_inner) is not null then v_inner end;
end
$$;


ALTER FUNCTION rekey._marked_inside(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _marked_inside(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._marked_inside(value bytea) IS 'What stands in a value under at most four layers of white space, quotes, hexadecimal and base64, where it has a mark; else NULL.';


--
-- Name: _marks_of(text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._marks_of(formats text[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._marks_of(formats text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _marks_of(formats text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._marks_of(formats text[]) IS 'The marks of the values that these formats may open.';


--
-- Name: _max_bytes(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._max_bytes() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._max_bytes() OWNER TO rekey_owner;

--
-- Name: FUNCTION _max_bytes(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._max_bytes() IS 'Longest plaintext, in bytes: 32 MiB. An envelope is in memory several times while it is made.';


--
-- Name: _may_administer(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_administer() RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._may_administer() OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_administer(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_administer() IS 'Whether the caller may rotate, and the like, by RPC: service_role, members of rekey_admin, and, in a session of PostgREST, a logged-in user whose app_metadata has the claim that the setting jwt_admin_claim names, with the value true.';


--
-- Name: _may_begin(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_begin(start bytea) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._may_begin(start bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_begin(start bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_begin(start bytea) IS 'Whether a value may have a mark, as far as its first bytes tell.';


--
-- Name: _may_be_marked(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_be_marked(value bytea) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._may_be_marked(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_be_marked(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_be_marked(value bytea) IS 'Whether a value may have a mark, as far as its first bytes tell, and where separators stand.';


--
-- Name: _may_be_wrapped(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_be_wrapped(value bytea) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._may_be_wrapped(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_be_wrapped(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_be_wrapped(value bytea) IS 'Whether something that has a mark may stand within a value, under what rekey._unwrapped() takes off.';


--
-- Name: _may_hold(rekey.protected_columns, integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) RETURNS boolean
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _may_hold(protected rekey.protected_columns, keyrings integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) IS 'Whether a protected column may hold rows of these keyrings: its own, and those that its last complete count saw.';


--
-- Name: _message_text(text, jsonb, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._message_text(event text, subject jsonb, count integer) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._message_text(event text, subject jsonb, count integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _message_text(event text, subject jsonb, count integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._message_text(event text, subject jsonb, count integer) IS 'An event in a sentence, by the first one of so many. Keyrings by name, rows by number; nothing that somebody else wrote.';


--
-- Name: _message_body(text, text, integer, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._message_body(kind text, event text, count integer, subjects jsonb) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._message_body(kind text, event text, count integer, subjects jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _message_body(kind text, event text, count integer, subjects jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._message_body(kind text, event text, count integer, subjects jsonb) IS 'The body of a message: what is signed, byte by byte.';


--
-- Name: _move_column(integer, regclass, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._move_column(id integer, target regclass, column_name name) RETURNS text[]
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    SET row_security TO 'off'
    AS $$
declare
  v_protected rekey.protected_columns;
  v_column pg_attribute;
  v_attnums smallint[];
  v_places integer[];
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
  select array_agg(a.attnum order by a.attnum) into v_attnums
  from pg_attribute a where a.attrelid = target and a.attname = any (v_protected.context_columns || _move_column.column_name) and a.attnum > 0;
  v_places := array(
    select array_position(v_attnums, a.attnum)
    from unnest(_move_column.column_name || v_protected.context_columns) with ordinality as c(name, rank)
    join pg_attribute a on a.attrelid = target and a.attname = c.name
    order by c.rank);
  update rekey.protected_columns c
  set places = v_places, column_name = _move_column.column_name, owner = (select pg_get_userbyid(r.relowner) from pg_class r where r.oid = target),
    relation_name = (select format('%I.%I', n.nspname, r.relname) from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = target)
  where c.id = v_protected.id returning * into v_protected;
  return rekey._column_statements(v_protected, target, v_attnums);
end
$$;


ALTER FUNCTION rekey._move_column(id integer, target regclass, column_name name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _move_column(id integer, target regclass, column_name name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._move_column(id integer, target regclass, column_name name) IS 'Moves the registration of a protected column to another table, as far as rekey_owner does it; returns what the owner of the table has to run. 22023: type or context columns do not fit; 42501, RK006: as rekey._find_rebind().';


--
-- Name: _move_key(rekey.encryption_keys, text, text, text, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if state = 'destroy_scheduled' then
    perform rekey._expect_doomed();
  end if;
  update rekey.encryption_keys k
  set state = _move_key.state,
      scheduled_from = case when _move_key.state = 'destroy_scheduled' then key.state end,
      deactivated_at = case when key.state = 'active' then now() else k.deactivated_at end,
      compromised_at = case when _move_key.state = 'compromised' then coalesce(k.compromised_at, now()) else k.compromised_at end,
      destroy_after = _move_key.destroy_after
  where k.id = key.id;
  perform rekey._audit(event, (select r.name from rekey.keyrings r where r.id = key.keyring_id), key.version,
    details => jsonb_build_object('reason', reason, 'destroy_after', destroy_after));
end
$$;


ALTER FUNCTION rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone) IS 'Moves a key to another state, and says so in the audit log.';


--
-- Name: _namesake(rekey.protected_columns, regclass, smallint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $$
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


ALTER FUNCTION rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _namesake(protected rekey.protected_columns, relation regclass, attnum smallint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) IS 'Another column than this one, of this table or another, that has the name noted of a protected column, or that of its label; NULL: there is none, or it is settled.';


--
-- Name: _new_kek(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._new_kek() RETURNS bytea
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_keks bytea := rekey._keks();
  v_kek bytea;
  v_fingerprint text;
begin
  for v_place in 0 .. octet_length(v_keks) / 32 - 1 loop
    v_kek := substr(v_keks, 1 + 32 * v_place, 32);
    v_fingerprint := rekey._fingerprint(v_kek);
    if not exists (select from rekey.keks k where k.fingerprint = v_fingerprint) then
      return v_kek;
    end if;
  end loop;
  return null;
end
$$;


ALTER FUNCTION rekey._new_kek() OWNER TO rekey_owner;

--
-- Name: FUNCTION _new_kek(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._new_kek() IS 'The first KEK at hand that is not registered; NULL without.';


--
-- Name: _new_keys(integer[], integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._new_keys(keyrings integer[], versions integer[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_kek_id integer;
  v_wrapping bytea;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea[];
begin
  select k.id, k.kek into v_kek_id, v_wrapping from rekey._kek() k;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_place in 1 .. cardinality(keyrings) loop
    v_iv := rekey._random_bytes(16);
    v_dek := rekey._random_bytes(64);
    v_aad := rekey._wrap_aad(v_kek_id, keyrings[v_place], versions[v_place]);
    v_wrapped[v_place] := rekey._wrap(v_wrapping, v_iv, v_dek, v_aad);
  end loop;
  insert into rekey.encryption_keys (keyring_id, version, state, wrapped_key, kek_id, activated_at)
  select n.keyring_id, n.version, 'active', n.wrapped_key, v_kek_id, now()
  from unnest(keyrings, versions, v_wrapped) as n(keyring_id, version, wrapped_key);
end
$$;


ALTER FUNCTION rekey._new_keys(keyrings integer[], versions integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _new_keys(keyrings integer[], versions integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._new_keys(keyrings integer[], versions integer[]) IS 'Makes these versions and makes them active; the versions before must have been deactivated. The caller holds rekey._lock_kek().';


--
-- Name: _newest_problem(rekey.protected_columns); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._newest_problem(protected rekey.protected_columns) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._newest_problem(protected rekey.protected_columns) OWNER TO rekey_owner;

--
-- Name: FUNCTION _newest_problem(protected rekey.protected_columns); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._newest_problem(protected rekey.protected_columns) IS 'In what the triggers of a protected column that is not blocked are behind; NULL: in nothing.';


--
-- Name: _next_in_line(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._next_in_line() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_id bigint;
begin
  -- (Whoever has a keyring in hand begins something there, or ends it: the next step looks again.)
  select r.id into v_id
  from rekey.rotations r
  join rekey.keyrings k on k.id = r.keyring_id
  where r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line)
  order by r.id limit 1 for no key update of k skip locked;
  if not found then
    return;
  end if;
  update rekey.rotations r
  set in_line = false,
      to_version = (select k.version from rekey.encryption_keys k where k.keyring_id = r.keyring_id and k.state = 'active')
  where r.id = v_id and r.state = 'queued' and r.in_line
    and not exists (select from rekey.rotations o where o.keyring_id = r.keyring_id and rekey._is_under_way(o.state) and not o.in_line);
end
$$;


ALTER FUNCTION rekey._next_in_line() OWNER TO rekey_owner;

--
-- Name: FUNCTION _next_in_line(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._next_in_line() IS 'Lets the first adoption in line begin whose keyring has nothing else under way, with the version that is active now.';


--
-- Name: _next_row(tid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._next_row(pointer tid) RETURNS tid
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._next_row(pointer tid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _next_row(pointer tid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._next_row(pointer tid) IS 'The row pointer after this one.';


--
-- Name: _note_adopted(bigint, integer, bigint, text, regclass, text[], text[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform rekey._note_batch(array[rotation_id], case when rows_done > 0 then array[keyring_id] end, array[rows_done], target, relation,
    case when failed_keys is not null then array_fill(keyring_id, array[cardinality(failed_keys)]) end,
    case when failed_keys is not null then array_fill(null::integer, array[cardinality(failed_keys)]) end, failed_keys, failed_problems, failed_codes);
end
$$;


ALTER FUNCTION rekey._note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]) IS 'rekey._note_batch() for an adoption.';


--
-- Name: _note_batch(bigint[], integer[], bigint[], text, regclass, integer[], integer[], text[], text[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[] DEFAULT NULL::text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if done_keyrings is null and failed_keyrings is null then
    return;
  end if;
  -- The rotations before the audit log, as everywhere.
  perform from rekey.rotations r
  where r.id = any (rotations) and r.keyring_id = any (done_keyrings || failed_keyrings) order by r.id for no key update;
  update rekey.rotations r set rows_done = r.rows_done + d.rows
  from unnest(done_keyrings, done_rows) as d(keyring_id, rows)
  where r.id = any (rotations) and r.keyring_id = d.keyring_id;
  if failed_keyrings is not null then
    perform rekey._quarantine(target, relation, failed_keyrings, failed_versions, failed_keys, failed_problems, failed_codes);
    -- What the table refused is not behind: the next verification has to know that.
    update rekey.rotations r set verification_id = null
    where r.id = any (rotations) and r.keyring_id = any (failed_keyrings) and r.verification_id is not null and failed_codes is not null;
  end if;
end
$$;


ALTER FUNCTION rekey._note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[]) IS 'Adds what a batch did to the progress of its rotations, and what failed to the quarantine.';


--
-- Name: _note_delivery(bigint, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_delivery(id bigint, error text DEFAULT NULL::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._note_delivery(id bigint, error text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_delivery(id bigint, error text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_delivery(id bigint, error text) IS 'Notes what came of a message; error NULL: it was delivered. After 12 attempts, in a day, it is given up.';


--
-- Name: _note_denied(jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_denied(details jsonb) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET lock_timeout TO '1s'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._note_denied(details jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_denied(details jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_denied(details jsonb) IS 'Notes in the audit log that the caller was refused, at most once a minute for each (role, subject of the JWT, and client where details name one) and 60 times for all. Not in a read-only transaction, nor where somebody holds the end of the log for more than a second.';


--
-- Name: _note_findings(jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_findings(findings jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_new jsonb;
begin
  with now as (
    -- (How many rows there are changes, and is no new finding.)
    select distinct on (f.kind, f.target, 3, 4, 5)
      f.kind, f.target, coalesce(f.keyring, '') as keyring, coalesce(f.version, 0) as version, case when f.rows is null then f.finding else '' end as item, f.severity, f.rows, f.finding, f.advice
    from jsonb_to_recordset(findings) as f(kind text, target text, keyring text, version integer, severity text, rows bigint, finding text, advice text)
    order by f.kind, f.target, 3, 4, 5
  ), gone as (
    delete from rekey._census_findings o
    where not exists (select from now n where (n.kind, n.target, n.keyring, n.version, n.item) = (o.kind, o.target, o.keyring, o.version, o.item))
  ), kept as (
    insert into rekey._census_findings as o (kind, target, keyring, version, item, severity, rows, finding, advice)
    select n.kind, n.target, n.keyring, n.version, n.item, n.severity, n.rows, n.finding, n.advice from now n
    on conflict (kind, target, keyring, version, item) do update
    set severity = excluded.severity, rows = excluded.rows, finding = excluded.finding, advice = excluded.advice
    returning o.kind, o.target, o.finding, o.since
  )
  select jsonb_agg(jsonb_build_object('event', 'census.found', 'details', jsonb_build_object('kind', k.kind, 'count', k.count, 'first', k.first)) order by k.kind)
  into v_new
  from (
    select k.kind, count(*) as count, to_jsonb((array_agg(left(k.finding, 200) order by k.target))[1:5]) as first
    from kept k where k.since = now() group by k.kind) k;
  perform rekey._audit_all(coalesce(v_new, '[]'));
end
$$;


ALTER FUNCTION rekey._note_findings(findings jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_findings(findings jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_findings(findings jsonb) IS 'Makes these the findings of the census, and notes in the audit log what is new among them, one entry for each kind.';


--
-- Name: _note_finds(bigint, oid, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_finds(search_id bigint, relation oid, hits text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._note_finds(search_id bigint, relation oid, hits text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_finds(search_id bigint, relation oid, hits text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_finds(search_id bigint, relation oid, hits text) IS 'Notes where the search found envelopes. hits: of rekey._hits().';


--
-- Name: _note_look(bigint, text, oid[], text[], text[], boolean[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) IS 'Notes what a look found: complete; looked, where something is left that another role may read; again, where something is to be read by turns. 42501: it is not the step that calls.';


--
-- Name: _relation_named(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._relation_named(name text) RETURNS oid
    LANGUAGE sql STABLE STRICT
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._relation_named(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _relation_named(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._relation_named(name text) IS 'The relation that has this name, with its schema, now; NULL: none.';


--
-- Name: _column_relations; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._column_relations (
    column_id integer NOT NULL,
    relation oid NOT NULL,
    attnum smallint NOT NULL,
    relation_name text NOT NULL,
    home text NOT NULL,
    settled boolean NOT NULL
);


ALTER TABLE rekey._column_relations OWNER TO rekey_owner;

--
-- Name: TABLE _column_relations; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._column_relations IS 'Relations that were seen to hold values of a protected column (attnum 0); or, settled, that are known not to, though they were a part of it, or have a column of its name (attnum). home: cluster and database in which the oid is good.';


--
-- Name: _note_names(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_names(only_id integer DEFAULT NULL::integer) RETURNS void
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey._note_names(only_id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_names(only_id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_names(only_id integer) IS 'Notes what the protected columns, NULL: all, are called now, and which relations their tables consist of.';


--
-- Name: _note_pace(timestamp with time zone, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_pace(begun timestamp with time zone, rows bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rate double precision := (rekey._settings()).max_rows_per_second;
begin
  if v_rate is not null then
    update rekey._worker w set next_batch_at = begun + (rows / v_rate) * interval '1 second' where w.singleton;
  end if;
end
$$;


ALTER FUNCTION rekey._note_pace(begun timestamp with time zone, rows bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_pace(begun timestamp with time zone, rows bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_pace(begun timestamp with time zone, rows bigint) IS 'Tells rekey._throttle() how many rows a batch had that began then.';


--
-- Name: _note_passed(rekey._chunks, bigint, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_refused integer;
begin
  if written > 0 then
    update rekey._due d set passed = true
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed;
  elsif refused > 0 then
    update rekey._due d set refused = d.refused + _note_passed.refused
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation and not d.passed
    returning d.refused into v_refused;
    -- It is not the rows: to put millions of them into quarantine, one by one, helps nobody.
    if v_refused > 10000 then
      raise exception '% refuses every row, % of them by now: see rekey.failure_status', chunk.relation, v_refused using errcode = 'RK005';
    end if;
  end if;
  if chunk.attempts > 0 then
    update rekey._chunks c set attempts = 0, last_error = null, next_attempt_at = null where c.id = chunk.id;
    update rekey.rotations r set attempts = 0, blocked_by = null, blocked_since = null
    where r.id in (
      select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
      where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      order by u.id)
      and r.state = 'running' and r.pass_id = chunk.pass_id;
  end if;
end
$$;


ALTER FUNCTION rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_passed(chunk rekey._chunks, written bigint, refused integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) IS 'Notes that rows of a chunk went through, or that all were refused: RK005 where more than 10,000 were, and none went through.';


--
-- Name: _note_passed_by(integer[], bigint[], text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_passed_by jsonb;
  v_said text;
begin
  with passed_by as (
    select k.name, r.id, r.to_version, row_number() over (order by r.id) as place
    from rekey.rotations r
    join rekey.keyrings k on k.id = r.keyring_id
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line and r.id <> all (begun)
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.passed_by', 'keyring', p.name, 'version', p.to_version, 'rotation_id', p.id,
                                      'details', jsonb_strip_nulls(jsonb_build_object('reason', _note_passed_by.reason))) order by p.place),
    string_agg(format('%L (rotation %s)', p.name, p.id), ', ' order by p.place) filter (where p.place <= 10)
      || case when count(*) > 10 then format(' and %s more', count(*) - 10) else '' end
  into v_passed_by, v_said
  from passed_by p;
  if v_passed_by is not null then
    perform rekey._audit_all(v_passed_by);
    raise warning 'no new version, as a rotation is under way: %', v_said using errcode = 'RK004',
      hint = 'Let new ones take their rows along: supersede => true.', constraint = 'supersede';
  end if;
end
$$;


ALTER FUNCTION rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_passed_by(keyrings integer[], begun bigint[], reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) IS 'Says which of these keyrings got no new version, as a rotation is under way that is none of those begun: a warning, and an entry with the reason in the audit log of each. The caller holds the rows of the keyrings.';


--
-- Name: _note_read(bigint, oid, text, bigint, bigint, text, oid, text, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone) IS 'Notes what a step of the search read. 42501: it is not the step that calls.';


--
-- Name: _note_request(bigint, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_request(id bigint, request_id bigint) RETURNS void
    LANGUAGE sql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey._note_request(id bigint, request_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_request(id bigint, request_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_request(id bigint, request_id bigint) IS 'Notes the number that pg_net gave a message.';


--
-- Name: _note_seen(jsonb, integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_seen(counted jsonb, keyrings integer[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_column rekey.protected_columns;
  v_before jsonb;
  v_others integer[];
begin
  if keyrings = '{}' then
    return;
  end if;
  insert into rekey._secrets_seen (keyring_id, rows)
  select k.id, coalesce(f.opened, 0)
  from unnest(keyrings) as k(id)
  left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = 'rekey.secrets' and f.keyring_id = k.id
  on conflict (keyring_id) do update set rows = excluded.rows where _secrets_seen.rows <> excluded.rows;
  for v_column in select c.* from rekey.protected_columns c order by c.id loop
    v_before := v_column.seen;
    continue when v_before is null and rekey._column_problem(v_column) is not null;
    -- The first complete count: of the other keyrings that stand there, those of which a row opens.
    if v_column.seen is null then
      select array_agg(distinct c.keyring_id) into v_others
      from rekey._count_rows(rekey._targets_now(v_column.label), null) c
      where c.keyring_id <> all (keyrings);
      v_column.seen := coalesce((select jsonb_object_agg(o.id, 1) from unnest(v_others) as o(id) where rekey._any_opens(v_column.label, o.id)), '{}');
    end if;
    v_column.seen := v_column.seen || coalesce((
      select jsonb_object_agg(k.id, coalesce(f.opened, 0))
      from unnest(keyrings) as k(id)
      left join jsonb_to_recordset(counted) as f(target text, keyring_id integer, opened bigint) on f.target = v_column.label and f.keyring_id = k.id
      where f.opened > 0 or v_column.seen ? k.id::text), '{}');
    if v_column.seen is distinct from v_before and rekey._column_problem(v_column) is null then
      update rekey.protected_columns c set seen = v_column.seen where c.id = v_column.id;
    end if;
  end loop;
end
$$;


ALTER FUNCTION rekey._note_seen(counted jsonb, keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_seen(counted jsonb, keyrings integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_seen(counted jsonb, keyrings integer[]) IS 'Notes how many rows of these keyrings a complete count saw in each protected column, and in rekey.secrets. counted: objects with target, keyring_id, opened.';


--
-- Name: _note_trouble(rekey._chunks, text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._note_trouble(chunk rekey._chunks, message text, code text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  v_pause constant interval := rekey._waited_for(code);
  v_attempts integer := 0;
  v_ids bigint[];
  v_events jsonb;
begin
  -- Where nothing went through yet, it is not this chunk, but all of them.
  update rekey._chunks c
  set last_error = message,
      attempts = case when v_pause is null then c.attempts + 1 else greatest(c.attempts, 1) end,
      stuck = v_pause is null and c.attempts + 1 >= v_max,
      next_attempt_at = clock_timestamp() + coalesce(v_pause, least(power(2, c.attempts), 300) * interval '1 second')
  where c.id in (
    select d.id from rekey._chunks d
    where d.id = chunk.id or d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation
      and exists (select from rekey._due u where u.pass_id = d.pass_id and u.kind = d.kind and u.target = d.target and u.relation = d.relation and not u.passed)
    for update skip locked);
  select c.attempts into v_attempts from rekey._chunks c where c.id = chunk.id;
  v_ids := array(
    select u.id from rekey._due d cross join unnest(d.rotations) as u(id)
    where d.pass_id = chunk.pass_id and d.kind = chunk.kind and d.target = chunk.target and d.relation = chunk.relation);
  perform from rekey.rotations r where r.id = any (v_ids) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = v_attempts, last_error = message, blocked_since = coalesce(r.blocked_since, now()),
        blocked_by = jsonb_build_array(jsonb_build_object('target', chunk.target, 'relation', chunk.relation::text, 'error', message, 'sqlstate', code))
    where r.id = any (v_ids) and r.state = 'running' and r.pass_id = chunk.pass_id
    returning r.id, r.keyring_id, r.to_version
  ), numbered as (
    select n.*, count(*) over () as rotations, row_number() over (order by n.id) as place from noted n
  )
  select jsonb_agg(jsonb_build_object('event', 'rotation.error', 'keyring', k.name, 'version', n.to_version, 'rotation_id', n.id,
    'details', jsonb_build_object('attempt', v_attempts, 'sqlstate', code, 'error', message, 'target', chunk.target)
      || case when n.rotations > 20 then jsonb_build_object('rotations', n.rotations) else '{}' end) order by n.id)
  into v_events
  from numbered n join rekey.keyrings k on k.id = n.keyring_id
  where n.rotations <= 20 or n.place = 1;
  perform rekey._audit_all(coalesce(v_events, '[]'));
  perform rekey._fail_stuck(chunk.pass_id);
end
$$;


ALTER FUNCTION rekey._note_trouble(chunk rekey._chunks, message text, code text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _note_trouble(chunk rekey._chunks, message text, code text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._note_trouble(chunk rekey._chunks, message text, code text) IS 'Notes an error in a chunk of a sweep: its next attempt comes after a growing pause, after max_attempts it is stuck, and only rotations with rows in its relation have to do with it. (More than 20 have one audit entry together.)';


--
-- Name: _older_transactions(xid8, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._older_transactions(older xid8, since timestamp with time zone) RETURNS jsonb
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._older_transactions(older xid8, since timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _older_transactions(older xid8, since timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._older_transactions(older xid8, since timestamp with time zone) IS 'Who in this database has a transaction older than this one, or a snapshot from before it; NULL: nobody. since: what counts as the beginning of a transaction whose own is hidden from us.';


--
-- Name: _opaque_bytes(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._opaque_bytes(value bytea) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  -- UTF-8 without control characters, but for a character that is cut off at the end.
  v_is_text constant text := '^(0[9ad]|[2-6].|7[0-9a-e]|(c[2-9a-f]|d.)[89ab].|e.([89ab].){2}|f[0-4]([89ab].){3})*([c-f].([89ab].){0,2})?$';
  v_text text;
  v_bytes bytea := value;
  v_part text;
  v_decoded bytea;
begin
  if encode(substr(value, 1, 64), 'hex') ~ v_is_text then
    v_text := encode(value, 'escape');
    -- One part or several; hexadecimal, or letters of both kinds and something else.
    if v_text !~ '^(\\\\x)?[A-Za-z0-9+/_-]{8,}={0,2}([.:|,][A-Za-z0-9+/_-]{8,}={0,2}){0,4}\s*$'
      or not (v_text ~ '^(\\\\x|0x)?[0-9a-fA-F.:|,\s]+$' or v_text ~ '[a-z]' and v_text ~ '[A-Z]' and v_text ~ '[0-9+/_=-]') then
      return null;
    end if;
    v_bytes := '';
    foreach v_part in array regexp_split_to_array(rtrim(v_text, E'\r\n\t '), '[.:|,]') loop
      v_decoded := rekey._decoded(v_part);
      if v_decoded is null or v_part ~ '^[0-9]+$' then
        return null;
      end if;
      v_bytes := v_bytes || v_decoded;
    end loop;
  end if;
  -- With words in it, or what keys and files begin with: DER, OpenSSH, PNG, JPEG, gzip, zip, a Java key store.
  return case
    when octet_length(v_bytes) < 16 or encode(substr(v_bytes, 1, 64), 'hex') ~ v_is_text
      or encode(substr(v_bytes, 1, 64), 'escape') ~ '[A-Za-z]{6}' or encode(substr(v_bytes, 1, 8), 'hex') ~ '^(308[1-3]|30[2-7].02|0000000[7b]|89504e47|ffd8ff|1f8b08|504b0304|feedfeed)' then null
    else v_bytes end;
end
$_$;


ALTER FUNCTION rekey._opaque_bytes(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _opaque_bytes(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._opaque_bytes(value bytea) IS 'The bytes of a value that may be ciphertext: 16 or more, without words, as they are or in hexadecimal or base64, in up to five parts. NULL: the value is something else.';


--
-- Name: _open(bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open(envelope bytea, context bytea) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_keyring integer;
  v_version integer;
  v_key bytea;
  v_problem text;
  v_iv bytea;
  v_sealed bytea;
  v_aad bytea;
  v_plaintext bytea;
begin
  if rekey._is_envelope(envelope) then
    v_keyring := rekey._int4(envelope, 3);
    v_version := rekey._int4(envelope, 7);
    v_key := rekey._dek(v_keyring, v_version);
    if v_key is null then
      v_problem := rekey._dek_problem(v_keyring, v_version);
      if v_problem is not null then
        raise exception 'cannot open ciphertext: %', v_problem using errcode = 'RK006';
      end if;
    else
      v_iv := substr(envelope, 12, 16);
      v_sealed := substr(envelope, 28);
      v_aad := substr(envelope, 1, 11) || context;
      v_plaintext := rekey._aead_decrypt(v_key, v_iv, v_sealed, v_aad);
    end if;
  end if;
  if v_plaintext is null then
    raise exception 'cannot open ciphertext' using errcode = 'RK003',
      hint = 'It was damaged, or sealed for another context: tenant, row, column, or parts in another order.';
  end if;
  return v_plaintext;
end
$$;


ALTER FUNCTION rekey._open(envelope bytea, context bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _open(envelope bytea, context bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open(envelope bytea, context bytea) IS 'Plaintext of an envelope. RK003: it does not open; RK006: its key may not be used.';


--
-- Name: _open_endpoints(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_endpoints() RETURNS TABLE(id integer, name text, kind text, allow_private boolean, by_pg_net boolean, opened text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._open_endpoints() OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_endpoints(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_endpoints() IS 'The endpoints, with signing secret and address, separated by a blank, for who delivers. Those that do not open are left out. RK001, RK002: KEK.';


--
-- Name: _open_found(rekey._target[], rekey._counted[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_found(targets rekey._target[], whole rekey._counted[]) RETURNS TABLE(target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[], refused bigint, error text, code text)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_of integer[];
  v_at integer[];
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_keys text[];
begin
  return query
    select t.target, t.relation, null::integer, null::integer, 0::bigint, 0::bigint, null::text[], null::text[], 0::bigint,
      rekey._explain_error(t.target, t.relation, f.error, f.code, f.context, true), f.code
    from unnest(whole) f join unnest(targets) with ordinality t on t.ordinality = f.place
    where f.error is not null;
  select array_agg(r.place order by r.n), array_agg(r.at order by r.n), array_agg(r.ciphertext order by r.n), array_agg(r.context order by r.n), array_agg(r.key order by r.n)
  into v_of, v_at, v_ciphertexts, v_contexts, v_keys
  from (
    select f.place, u.at::integer as at, u.ciphertext, t.prefix || u.context as context, u.key, row_number() over () as n
    from unnest(whole) f
    join unnest(targets) with ordinality t on t.ordinality = f.place
    cross join lateral unnest(f.ciphertexts, f.contexts, f.keys) with ordinality as u(ciphertext, context, key, at)
    where f.error is null) r;
  return query
    with failing as materialized (
      select f.n, f.problem
      from rekey._check(v_ciphertexts, '', v_contexts) c cross join lateral unnest(c.failed_places, c.problems) as f(n, problem)
    ), opened as (
      select u.place, u.at, u.key, f.problem, rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
      from unnest(v_of, v_at, v_ciphertexts, v_keys) with ordinality as u(place, at, ciphertext, key, n)
      left join failing f on f.n = u.n
    ), refusing as (
      select r.place as at, f.place, f.keys[r.place] as key, r.keyring_id, r.version
      from unnest(whole) f
      join unnest(targets) with ordinality t on t.ordinality = f.place
      cross join lateral rekey._refused_rows(t.target, t.relation, f.ciphertexts, f.keys) r
      where f.error is null and exists (
        select from rekey.rotation_failures q where q.target = t.target and q.resolved_at is null and q.sqlstate is not null)
    )
    select t.target, t.relation, c.keyring_id, c.version, c.rows, c.failed, c.failed_keys, c.failed_problems, c.refused, null::text, null::text
    from (
      select o.place, o.keyring_id, o.version, count(*) as rows, count(o.problem) as failed, array_agg(o.key) filter (where o.problem is not null) as failed_keys,
        array_agg(o.problem) filter (where o.problem is not null) as failed_problems, 0::bigint as refused
      from opened o group by o.place, o.keyring_id, o.version
      union all
      select r.place, r.keyring_id, r.version, 0, 0, array_agg(r.key), null, count(*)
      from refusing r where not exists (select from opened o where o.place = r.place and o.at = r.at and o.problem is not null)
      group by r.place, r.keyring_id, r.version) c
    join unnest(targets) with ordinality t on t.ordinality = c.place;
end
$$;


ALTER FUNCTION rekey._open_found(targets rekey._target[], whole rekey._counted[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_found(targets rekey._target[], whole rekey._counted[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_found(targets rekey._target[], whole rekey._counted[]) IS 'Counts and opens rows of targets, as rekey._open_rows(), that rekey._count_rows(whole => true) found.';


--
-- Name: _open_pgp(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_pgp(message bytea) RETURNS bytea
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_plaintext bytea;
  v_count integer;
begin
  select count(*) into v_count from rekey._passphrases();
  for v_place in 1 .. v_count loop
    begin
      select rekey._pgp_decrypt(message, convert_from(p.passphrase, 'UTF8')) into v_plaintext
      from rekey._passphrases() p where p.place = v_place;
      exit when v_plaintext is not null;
    exception when external_routine_invocation_exception or invalid_parameter_value or data_exception then
      null;  -- another passphrase, or damaged
    end;
  end loop;
  return v_plaintext;
end
$$;


ALTER FUNCTION rekey._open_pgp(message bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_pgp(message bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_pgp(message bytea) IS 'Bytes of what pgp_sym_encrypt() or pgp_sym_encrypt_bytea() made; NULL where no passphrase of rekey._keep_passphrases() opens it.';


--
-- Name: _open_rows(rekey._target[], integer[], bigint, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean DEFAULT false) RETURNS TABLE(target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[], refused bigint, error text, code text)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_large rekey._target[] := array(select t from unnest(targets) t where t.indexed or pg_table_size(t.relation) > 524288);
  v_group record;
  v_whole rekey._counted[];
  v_target rekey._target;
  v_count rekey._counted;
  v_rows bigint[];
  v_blocks bigint;
  v_range record;
  v_step bigint;
  v_first bigint;
  v_from tid;
  v_found record;
  v_bad record;
  v_places integer[];
  v_refused boolean;
  v_context text;
  v_place integer := 0;
  v_begin timestamptz := clock_timestamp();
  v_opened bigint := 0;
begin
  -- STABLE: every statement in here sees the snapshot of the calling one.
  -- What is small is counted by opening it, 4 MB of it at a time.
  for v_group in
    select array_agg(g.target) as targets
    from (select t as target, sum(pg_table_size(t.relation)) over (order by t.relation, t.target) / 4194304 as number
          from unnest(targets) t where not t.indexed and pg_table_size(t.relation) <= 524288) g
    group by g.number::integer
  loop
    v_whole := array(select c from rekey._count_rows(v_group.targets, keyrings, apart, whole => true) c);
    return query select o.* from rekey._open_found(v_group.targets, array(select f from unnest(v_whole) f where f.next is null)) o;
    v_large := v_large || array(select v_group.targets[f.place] from unnest(v_whole) f where f.next is not null);
    v_opened := v_opened + coalesce((select sum(f.rows) from unnest(v_whole) f), 0);
    if verification_id is not null then
      perform rekey._keep_pace(v_begin, v_opened);
    end if;
  end loop;
  for v_count in select c.* from rekey._count_rows(v_large, keyrings, apart) c loop
    target := v_large[v_count.place].target;
    relation := v_large[v_count.place].relation;
    keyring_id := v_count.keyring_id;
    version := v_count.version;
    rows := v_count.rows;
    failed := 0;
    refused := 0;
    if v_count.error is not null then
      error := rekey._explain_error(target, relation, v_count.error, v_count.code, v_count.context, true);
      code := v_count.code;
      v_rows[v_count.place] := null;
    elsif keyring_id is not null then
      v_rows[v_count.place] := coalesce(v_rows[v_count.place], 0) + rows;
    end if;
    return next;
    error := null;
    code := null;
  end loop;
  rows := 0;
  foreach v_target in array v_large loop
    v_place := v_place + 1;
    -- Where none was counted, there is none.
    continue when coalesce(v_rows[v_place], 0) = 0;
    target := v_target.target;
    relation := v_target.relation;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_target.target and q.resolved_at is null and q.sqlstate is not null);
    failed := 0;
    refused := 0;
    begin
      -- No less than the snapshot sees: the caller holds a lock that keeps the table from being rewritten.
      v_blocks := pg_relation_size(relation) / current_setting('block_size')::integer;
      for v_range in select r.* from rekey._ranges(verification_id, v_target) r loop
        -- 2 MB at a time, 32 of which little is wanted; but the few rows of small keyrings are found by an index, all at once.
        v_step := case when v_range.since is not null then 4096 when v_target.indexed and v_rows[v_place] < least(v_blocks, 5000) then 4294967294 else 256 end;
        v_first := v_range.first;
        v_from := format('(%s,0)', v_first)::tid;
        while v_first < least(v_range.until, v_blocks) loop
          select s.* into v_found from rekey._call_scan(v_target.function_name, relation, v_from,
            format('(%s,0)', least(v_first + v_step, v_range.until))::tid, keyrings, v_range.since, 4000, 2097152) s;
          if v_found.ciphertexts is not null then
            v_places := '{}';
            for v_bad in select c.* from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts) c loop
              keyring_id := rekey._int4(v_bad.header, 3);
              version := rekey._int4(v_bad.header, 7);
              failed := cardinality(v_bad.failed_places);
              failed_keys := array(select v_found.keys[f.place] from unnest(v_bad.failed_places) with ordinality as f(place, rank) order by f.rank);
              failed_problems := v_bad.problems;
              v_places := v_places || v_bad.failed_places;
              return next;
            end loop;
            failed := 0;
            failed_problems := null;
            if v_refused then
              for keyring_id, version, refused, failed_keys in
                select r.keyring_id, r.version, count(*), array_agg(v_found.keys[r.place])
                from rekey._refused_rows(v_target.target, v_target.relation, v_found.ciphertexts, v_found.keys) r
                where r.place <> all (v_places)
                group by r.keyring_id, r.version
              loop
                return next;
              end loop;
            end if;
            refused := 0;
            failed_keys := null;
            v_opened := v_opened + cardinality(v_found.ciphertexts);
            if verification_id is not null then
              perform rekey._keep_pace(v_begin, v_opened);
            end if;
          end if;
          if v_found.next is not null then
            v_from := rekey._next_row(v_found.next);
          else
            v_first := v_first + v_step;
            v_from := format('(%s,0)', least(v_first, 4294967294))::tid;
          end if;
        end loop;
      end loop;
    exception when assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      if not apart or sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      keyring_id := null;
      error := rekey._explain_error(target, relation, sqlerrm, sqlstate, v_context, true);
      code := sqlstate;
      return next;
      error := null;
      code := null;
    end;
  end loop;
end
$$;


ALTER FUNCTION rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean) IS 'Counts as rekey._count_rows(), and opens every row that the verification did not check before (NULL: every row): failed_keys and failed_problems name what does not open; refused, with failed_keys, what opens and its table refused. A combination may come in several rows. apart: an error in a target is a row without keyring, and what came of it before is not to be trusted.';


--
-- Name: _open_search(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_search() RETURNS rekey._searches
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._open_search() OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_search(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_search() IS 'The last search of this database, whatever its state; no row: NULL.';


--
-- Name: _open_target(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_target(label text) RETURNS TABLE(keyring_id integer, version integer, rows bigint, failed bigint)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._open_target(label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_target(label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_target(label text) IS 'Opens every envelope of a protected column, in batches: how many there are of each version, and how many do not open. A version may come in several rows.';


--
-- Name: _open_writers(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._open_writers() RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_relations oid[];
  v_writers text[];
  v_relation regclass;
begin
  select array_agg(t.relation::oid) into v_relations from rekey._targets() t where t.target <> 'rekey.secrets';
  select array_agg(distinct l.virtualtransaction) into v_writers
  from pg_locks l
  where l.locktype = 'relation' and l.granted and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    and l.relation = any (v_relations) and l.database = (select d.oid from pg_database d where d.datname = current_database())
    and l.pid is distinct from pg_backend_pid();
  for v_try in 1 .. 100 loop
    select l.relation into v_relation from pg_locks l where l.virtualtransaction = any (v_writers) and l.relation = any (v_relations) limit 1;
    if not found then
      return null;
    end if;
    perform pg_sleep(0.02);
  end loop;
  return format('a transaction that writes into %s is open', v_relation);
end
$$;


ALTER FUNCTION rekey._open_writers() OWNER TO rekey_owner;

--
-- Name: FUNCTION _open_writers(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._open_writers() IS 'Waits 2 seconds for the transactions that write into protected tables now. NULL: they have ended.';


--
-- Name: _table_problem(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._table_problem(relation regclass) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._table_problem(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _table_problem(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._table_problem(relation regclass) IS 'What hides or changes rows of a table of ours, and what to do about it; NULL: nothing.';


--
-- Name: _own_problem(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._own_problem() RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._own_problem() OWNER TO rekey_owner;

--
-- Name: FUNCTION _own_problem(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._own_problem() IS 'As rekey._table_problem(), of the first of our tables that has one.';


--
-- Name: _pace(rekey._chunks, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pace(INOUT chunk rekey._chunks, who_else text) RETURNS rekey._chunks
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_settings rekey.settings := rekey._settings();
  v_others text := nullif(who_else, '');
begin
  if v_settings.min_pace = 1 or v_settings.max_rows_per_second is not null or chunk.urgent or exists (
       select from rekey.rotations r where chunk.pass_id in (r.pass_id, r.verification_id) and r.state in ('running', 'verifying') and r.trigger = 'compromise') then
    chunk.pace := 1;
    chunk.gives_way_to := null;
    return;
  end if;
  if who_else is null then
    -- (A later time was noted by a clock that was wrong.)
    if chunk.looked_at between clock_timestamp() - interval '1 second' and clock_timestamp() then
      return;  -- too early to say
    end if;
    select t.told, t.looked, t.counted into v_others, chunk.looked_at, chunk.transactions from rekey._transactions(chunk.looked_at, chunk.transactions) t;
  end if;
  chunk.pace := case when v_others is not null then greatest(chunk.pace / 2, v_settings.min_pace) else least(chunk.pace * 2, 1) end;
  chunk.gives_way_to := case when chunk.pace < 1 then coalesce(v_others, chunk.gives_way_to) end;
end
$$;


ALTER FUNCTION rekey._pace(INOUT chunk rekey._chunks, who_else text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pace(INOUT chunk rekey._chunks, who_else text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pace(INOUT chunk rekey._chunks, who_else text) IS 'The chunk with the part of the time that its next batch may take (pace): half of what it was, down to min_pace, while others use the server; twice as much, up to all of it, when they do not. Nobody is given way to where a key is compromised, and where max_rows_per_second sets the pace. who_else: what rekey.who_else() said.';


--
-- Name: _parse_kek(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._parse_kek(value text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._parse_kek(value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _parse_kek(value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._parse_kek(value text) IS 'The 32 bytes of a KEK in hex or base64; NULL for anything else.';


--
-- Name: _parts(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._parts(relation regclass) RETURNS SETOF regclass
    LANGUAGE sql STABLE ROWS 1
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._parts(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _parts(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._parts(relation regclass) IS 'The partitions of a partitioned table, and theirs; locks nothing.';


--
-- Name: _pass_aad(text, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pass_aad(label text, caller name) RETURNS bytea
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._pass_aad(label text, caller name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pass_aad(label text, caller name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pass_aad(label text, caller name) IS 'What a pass is bound to: the label, the role that calls, the session, the transaction, the statement that the client sent, and what unlocked the session or says whose tenants are reached.';


--
-- Name: _pass_on(rekey._chunks); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pass_on(chunk rekey._chunks) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  delete from rekey._chunks c where c.id = chunk.id;
  update rekey._chunks c
  set batch_rows = chunk.batch_rows, pace = chunk.pace, gives_way_to = chunk.gives_way_to, looked_at = chunk.looked_at, transactions = chunk.transactions
  where c.id = (
    select n.id from rekey._chunks n
    where n.pass_id = chunk.pass_id and n.kind = chunk.kind and not n.stuck
    order by n.attempts > 0, n.urgent desc, n.id limit 1 for update skip locked);
end
$$;


ALTER FUNCTION rekey._pass_on(chunk rekey._chunks) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pass_on(chunk rekey._chunks); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pass_on(chunk rekey._chunks) IS 'Deletes a chunk that is done; the one that comes next goes on with its size of batches, and at its pace.';


--
-- Name: _passed_key(bytea, text, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._passed_key(pass bytea, label text, place bigint) RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_caller name := rekey._caller();
  v_seal bytea;
  v_iv bytea := substr(pass, 12, 16);
  v_sealed bytea := substr(pass, 28);
  v_aad bytea := substr(pass, 1, 11) || rekey._pass_aad(label, v_caller);
  v_keys bytea;
begin
  select s.key into v_seal from rekey._session_key s;
  if v_seal is not null then
    v_keys := rekey._aead_decrypt(v_seal, v_iv, v_sealed, v_aad);
  end if;
  return case when place >= 0 and octet_length(v_keys) > place * 64 then substr(v_keys, 1 + 64 * place::integer, 64) end;
end
$$;


ALTER FUNCTION rekey._passed_key(pass bytea, label text, place bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _passed_key(pass bytea, label text, place bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._passed_key(pass bytea, label text, place bigint) IS 'The key of the version that is so many before the newest, of a pass that was made for this label and statement; NULL where it was not, or has none.';


--
-- Name: _passphrases(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._passphrases() RETURNS TABLE(place integer, passphrase bytea)
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_seal bytea;
  v_bytes bytea := decode(coalesce(current_setting('rekey.passphrases', true), ''), 'hex');
  v_iv bytea := substr(v_bytes, 1, 16);
  v_aad bytea := rekey._session_aad('p');
  v_plain bytea;
  v_passphrases bytea[];
begin
  if octet_length(v_bytes) < 64 then
    return;
  end if;
  select s.key into v_seal from rekey._session_key s;
  v_bytes := substr(v_bytes, 17);
  v_plain := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  v_passphrases := convert_from(v_plain, 'UTF8')::bytea[];
  place := 0;
  foreach passphrase in array v_passphrases loop
    place := place + 1;
    return next;
  end loop;
end
$$;


ALTER FUNCTION rekey._passphrases() OWNER TO rekey_owner;

--
-- Name: FUNCTION _passphrases(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._passphrases() IS 'What rekey._keep_passphrases() keeps in this transaction.';


--
-- Name: _pg_net_requests(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pg_net_requests() RETURNS TABLE(id bigint, url text, headers jsonb, body jsonb)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._pg_net_requests() OWNER TO rekey_owner;

--
-- Name: FUNCTION _pg_net_requests(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pg_net_requests() IS 'What pg_net is to send now, signed. RK001, RK002: KEK.';


--
-- Name: _pgp_decrypt(bytea, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pgp_decrypt(message bytea, passphrase text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._pgp_decrypt(message bytea, passphrase text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pgp_decrypt(message bytea, passphrase text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pgp_decrypt(message bytea, passphrase text) IS 'pgcrypto''s pgp_sym_decrypt_bytea(), wherever it is.';


--
-- Name: _pgp_message(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pgp_message(value bytea) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return case when substr(value, 1, 5) = '-----'::bytea then rekey._dearmor(encode(value, 'escape')) else value end;
exception when external_routine_invocation_exception or invalid_parameter_value or data_exception then
  return null;
end
$$;


ALTER FUNCTION rekey._pgp_message(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pgp_message(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pgp_message(value bytea) IS 'A message of OpenPGP without its armour; NULL where that is damaged.';


--
-- Name: _pgp_problem(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._pgp_problem(message bytea) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_cipher integer;
  v_length integer;
begin
  if coalesce(octet_length(message), 0) < 40 or get_byte(message, 2) <> 4 or get_byte(message, 3) in (2, 7, 8, 9) then
    return 'pgp_sym does not open: damaged, or another passphrase';
  end if;
  v_cipher := get_byte(message, 3);
  if not v_cipher in (3, 4) then
    return format('pgp_sym does not open: pgcrypto does not have cipher %s of OpenPGP', v_cipher);
  end if;
  v_length := case when get_byte(message, 16) = 255 then 5 when get_byte(message, 16) between 192 and 223 then 2 else 1 end;
  return format(
    case when substr(message, 24 + v_length, 2) = substr(message, 26 + v_length, 2) and get_byte(message, 27 + v_length) in (200, 203)
         then 'pgp_sym holds its value unencrypted: pgcrypto wrote it where OpenSSL did not have the cipher %s (CVE-2026-14663)'
         else 'pgp_sym does not open: made with the cipher %s, which OpenSSL 3 has in its legacy provider alone; or damaged, or another passphrase' end,
    case v_cipher when 3 then 'cast5' else 'bf' end);
end
$$;


ALTER FUNCTION rekey._pgp_problem(message bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _pgp_problem(message bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._pgp_problem(message bytea) IS 'Why a message that no passphrase opens may be so.';


--
-- Name: _plan(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._plan(OUT event text, OUT keyring_count integer, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_pass bigint;
  v_size double precision;
  v_urgent boolean;
  v_rows jsonb;
begin
  select array_agg(r.id), bool_or(r.trigger = 'compromise') into v_ids, v_urgent
  from (select * from rekey.rotations r
        where r.state in ('queued', 'running') and r.pass_id is null and not r.in_line
          and rekey._is_due(r.next_attempt_at)
        order by r.id for update skip locked) r;
  if v_ids is null then
    return;
  end if;
  begin
    perform rekey._note_names();
    perform rekey._expect_none_doomed();  -- so that no row of its batches is looked at in vain
    v_pass := nextval('rekey._pass_id');
    v_size := rekey._batch_size(cardinality(v_ids));
    v_rows := (select jsonb_agg(to_jsonb(c)) from rekey._due_rows(v_ids) c);
    with counted as (
      select c.* from jsonb_to_recordset(v_rows) as c(rotation_id bigint, target text, relation oid, indexed boolean, adopting boolean, rows bigint)
    ), sizes as (
      select c.target, c.relation, c.adopting, s.blocks, c.indexed and c.rows < least(s.blocks / 10, 5000) as few,
        rekey._chunk_blocks(c.relation) as chunk
      from (select d.target, d.relation, d.indexed, d.adopting, sum(d.rows) as rows from counted d group by 1, 2, 3, 4) c
      cross join lateral (select pg_relation_size(c.relation) / current_setting('block_size')::integer as blocks offset 0) s
    ), dued as (
      insert into rekey._due (pass_id, kind, target, relation, rotations)
      select v_pass, case when c.adopting then 'adopt' else 'sweep' end, c.target, c.relation, array_agg(c.rotation_id)
      from counted c group by c.adopting, c.target, c.relation
    ), chunked as (
      insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks, batch_rows)
      select v_pass, v_urgent, case when s.adopting then 'adopt' else 'sweep' end, s.target, s.relation, format('(%s,0)', f.first)::tid,
        case when s.few then s.blocks else least(f.first + s.chunk, s.blocks) end,
        -- A few rows of an indexed table: the index finds them, so one range will do.
        case when s.few then s.blocks else (512 * v_size)::integer end, (500 * v_size)::integer
      from sizes s
      cross join lateral generate_series(0, case when s.few then 0 else s.blocks - 1 end, s.chunk) as f(first)
    )
    update rekey.rotations r
    set state = 'running', pass_id = v_pass, passes = r.passes + 1, started_at = coalesce(r.started_at, clock_timestamp()),
        next_attempt_at = null, attempts = 0,
        -- Kept where a verification found rows behind: the next one looks at what was written since.
        verification_id = case when r.state = 'running' then r.verification_id end,
        rows_total = r.rows_done + coalesce((select sum(c.rows) from counted c where c.rotation_id = r.id), 0)
    where r.id = any (v_ids);
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.started', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('rows', r.rows_total)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_ids) and r.passes = 1), '[]'));
    event := 'planned';
    keyring_count := cardinality(v_ids);
    detail := jsonb_build_object('pass', v_pass, 'rotations', v_ids[1:20]);
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;


ALTER FUNCTION rekey._plan(OUT event text, OUT keyring_count integer, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _plan(OUT event text, OUT keyring_count integer, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._plan(OUT event text, OUT keyring_count integer, OUT detail jsonb) IS 'Begins a pass for every rotation that waits for one: counts what there is to do and splits it into chunks.';


--
-- Name: _post_by_pg_net(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._post_by_pg_net() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._post_by_pg_net() OWNER TO rekey_owner;

--
-- Name: FUNCTION _post_by_pg_net(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._post_by_pg_net() IS 'Hands messages to pg_net, where that is, and notes what came of those before, with the rights of the caller.';


--
-- Name: _postpone(integer[], integer[], text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._postpone(keyrings integer[], versions integer[], reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_events jsonb;
begin
  perform from rekey.keyrings r where r.id = any (keyrings) order by r.id for no key update;
  with postponed as (
    update rekey.encryption_keys k set destroy_after = now() + interval '1 day'
    from unnest(keyrings, versions) as u(keyring_id, version)
    where k.keyring_id = u.keyring_id and k.version = u.version and k.state = 'destroy_scheduled'
    returning k.keyring_id, k.version
  )
  select jsonb_agg(jsonb_build_object('event', 'key.destroy_scheduled', 'keyring', r.name, 'version', p.version,
    'details', jsonb_build_object('postponed', reason, 'destroy_after', now() + interval '1 day')) order by r.name, p.version)
  into v_events
  from postponed p join rekey.keyrings r on r.id = p.keyring_id;
  if v_events is not null then
    update rekey._worker w
    set last_error = format('destructions: version %s of keyring %s%s waits another day: %s', v_events -> 0 ->> 'version', v_events -> 0 ->> 'keyring',
          case when jsonb_array_length(v_events) > 1 then format(', and %s more,', jsonb_array_length(v_events) - 1) else '' end, reason),
        last_error_at = clock_timestamp()
    where w.singleton;
    perform rekey._audit_all(v_events);
  end if;
end
$$;


ALTER FUNCTION rekey._postpone(keyrings integer[], versions integer[], reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _postpone(keyrings integer[], versions integer[], reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._postpone(keyrings integer[], versions integer[], reason text) IS 'Has versions wait one more day for their destruction, and says why: in the audit log and rekey.worker_status.';


--
-- Name: _prepared(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._prepared() RETURNS text[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return array(select p.name || ' ' || extract(epoch from p.prepare_time) from pg_prepared_statements p order by 1);
end
$$;


ALTER FUNCTION rekey._prepared() OWNER TO rekey_owner;

--
-- Name: FUNCTION _prepared(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._prepared() IS 'The prepared statements of the session.';


--
-- Name: _protect_options(rekey.protected_columns); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._protect_options(protected rekey.protected_columns) RETURNS text
    LANGUAGE sql IMMUTABLE
    -- in sql/code
;


ALTER FUNCTION rekey._protect_options(protected rekey.protected_columns) OWNER TO rekey_owner;

--
-- Name: FUNCTION _protect_options(protected rekey.protected_columns); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._protect_options(protected rekey.protected_columns) IS 'What has to be given again where rekey.protect_column() is repeated.';


--
-- Name: _provided_keks(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._provided_keks() RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_settings rekey.settings := rekey._settings();
  v_text text;
  v_next_text text;
  v_kek bytea;
  v_next bytea;
begin
  if v_settings.kek_provider = 'vault' then
    if rekey._trusted_relation('supabase_vault', 'vault', 'decrypted_secrets') is null then
      raise exception 'this database has no Supabase Vault' using errcode = 'undefined_table';
    end if;
    execute 'select (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1),
                    (select v.decrypted_secret from vault.decrypted_secrets v where v.name = $1 || ''_new'')'
      into v_text, v_next_text using v_settings.kek_secret_name;
  elsif v_settings.kek_provider = 'file' then
    v_text := encode(pg_read_binary_file(v_settings.kek_file, 0, 200, true), 'escape');
    v_next_text := encode(pg_read_binary_file(v_settings.kek_file || '_new', 0, 200, true), 'escape');
  end if;
  v_kek := rekey._parse_kek(v_text);
  v_next := rekey._parse_kek(v_next_text);
  return coalesce(v_kek || v_next, v_kek, v_next);
exception
  when insufficient_privilege or undefined_table or undefined_function or invalid_schema_name or wrong_object_type
    or system_error or io_error then
    raise exception 'the KEK provider % cannot be read: %', v_settings.kek_provider, sqlerrm using errcode = 'RK001',
      hint = format('Run select rekey.set_setting(''kek_provider'', %L) as a role that may grant what it needs.', v_settings.kek_provider), constraint = 'set_provider';
end
$_$;


ALTER FUNCTION rekey._provided_keks() OWNER TO rekey_owner;

--
-- Name: FUNCTION _provided_keks(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._provided_keks() IS 'The KEK, and the next one where there is one, from the Vault or the file that the settings name; NULL without. RK001: it cannot be read.';


--
-- Name: _prune_notifications(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._prune_notifications() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  delete from rekey._notifications n
  where n.state <> 'waiting' and n.id <= (
      select o.id from rekey._notifications o where o.endpoint_id = n.endpoint_id and o.state <> 'waiting' order by o.id desc offset 1000 limit 1)
    or not exists (select from rekey._endpoints e where e.id = n.endpoint_id);
end
$$;


ALTER FUNCTION rekey._prune_notifications() OWNER TO rekey_owner;

--
-- Name: FUNCTION _prune_notifications(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._prune_notifications() IS 'Keeps the last 1000 messages of each endpoint that do not wait.';


--
-- Name: _prune_run_details(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._prune_run_details() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job_run_details', 8) is not null then
    execute format($sql$
      delete from %I.job_run_details d
      where d.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and d.end_time < now() - interval '7 days'$sql$, 'cron');
  end if;
exception when insufficient_privilege then
  null;  -- somebody else's job
end
$_$;


ALTER FUNCTION rekey._prune_run_details() OWNER TO rekey_owner;

--
-- Name: FUNCTION _prune_run_details(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._prune_run_details() IS 'Deletes what pg_cron noted of our own runs more than 7 days ago, with the rights of the caller. Where cron.job_run_details is not pg_cron''s, or a trigger of others would fire: nothing.';


--
-- Name: _quarantine(text, regclass, integer[], integer[], text[], text[], text[], bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[] DEFAULT NULL::text[], verification_id bigint DEFAULT NULL::bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    AS $$
declare
  v_relation text := relation::text;
  v_events jsonb;
begin
  with found as materialized (
    select distinct on (f.keyring_id, h.hash) f.keyring_id, f.version, f.row_key, h.hash, f.problem, f.code, r.id as rotation_id,
      q.id, q.rotation_id as before
    from unnest(keyrings, versions, row_keys, problems, codes) as f(keyring_id, version, row_key, problem, code)
    cross join lateral (select rekey._row_hash(f.row_key) as hash offset 0) h
    join rekey.rotations r on r.keyring_id = f.keyring_id and rekey._is_under_way(r.state) and not r.in_line
    -- Known from an earlier rotation or pass.
    left join lateral (
      select q.id, q.rotation_id from rekey.rotation_failures q
      where q.keyring_id = f.keyring_id and q.target = _quarantine.target and q.relation = v_relation and q.row_hash = h.hash and q.resolved_at is null
      limit 1) q on true
  ), moved as (
    update rekey.rotation_failures q
    set rotation_id = f.rotation_id, version = f.version, reason = f.problem, sqlstate = f.code, verification_id = _quarantine.verification_id
    from found f where q.id = f.id
  ), added as (
    insert into rekey.rotation_failures (rotation_id, keyring_id, target, relation, row_key, version, reason, sqlstate, verification_id)
    select f.rotation_id, f.keyring_id, _quarantine.target, v_relation, f.row_key, f.version, f.problem, f.code, _quarantine.verification_id
    from found f where f.id is null
    on conflict do nothing
    returning id, rotation_id, keyring_id, row_key, version, reason
  ), failed as (
    select n.rotation_id, count(*) as rows
    from (select a.rotation_id from added a union all select f.rotation_id from found f where f.id is not null and f.before is distinct from f.rotation_id) n
    group by n.rotation_id
  ), counted as (
    update rekey.rotations r set rows_failed = r.rows_failed + f.rows from failed f where r.id = f.rotation_id
  )
  -- One entry for all rows of a version: how many there are may be anybody's to choose.
  select jsonb_agg(jsonb_build_object('event', 'rotation.row_failed', 'keyring', e.keyring, 'version', e.version, 'rotation_id', e.rotation_id,
    'details', jsonb_build_object('target', _quarantine.target, 'relation', v_relation, 'rows', e.rows,
      'first', (select jsonb_agg(rekey._cut(u.row_key, 100) order by u.place) from unnest(e.row_keys[1:5]) with ordinality as u(row_key, place)),
      'problem', e.problem)) order by e.rotation_id, e.version)
  into v_events
  from (
    select a.rotation_id, a.version, k.name as keyring, count(*) as rows, array_agg(a.row_key order by a.id) as row_keys,
      (array_agg(a.reason order by a.id))[1] as problem
    from added a join rekey.keyrings k on k.id = a.keyring_id
    group by a.rotation_id, a.version, k.name) e;
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;


ALTER FUNCTION rekey._quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[], verification_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[], verification_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[], verification_id bigint) IS 'Notes rows that failed, once each, and counts them in their rotations, whose rows the caller has locked. codes: the SQLSTATE with which the table refused a row; NULL: it does not open. verification_id: the verification that saw them.';


--
-- Name: _queue_sweep(integer, text, text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer DEFAULT NULL::integer) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_id bigint;
begin
  insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
  select a.keyring_id,
    array(select k.version from rekey.encryption_keys k
          where k.keyring_id = a.keyring_id and k.version <> a.version and k.state <> 'destroyed' order by k.version),
    a.version, _queue_sweep.previous_version, _queue_sweep.trigger, _queue_sweep.reason, rekey._requester()
  from rekey.encryption_keys a
  where a.keyring_id = _queue_sweep.keyring_id and a.state = 'active'
  returning id into v_id;
  return v_id;
end
$$;


ALTER FUNCTION rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer) IS 'Queues a rotation that brings every row of a keyring to its active version. The caller holds the row of the keyring.';


--
-- Name: _ranges(bigint, rekey._target); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._ranges(verification_id bigint, target rekey._target) RETURNS TABLE(first bigint, until bigint, since xid)
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._ranges(verification_id bigint, target rekey._target) OWNER TO rekey_owner;

--
-- Name: FUNCTION _ranges(verification_id bigint, target rekey._target); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._ranges(verification_id bigint, target rekey._target) IS 'The blocks of a relation in ranges, each with what is to be checked in it: as rekey._checked_since() says; NULL: all.';


--
-- Name: _record_error(bigint[], text, text, text, regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._record_error(rotations bigint[], message text, code text, target text DEFAULT NULL::text, relation regclass DEFAULT NULL::regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_max integer := (rekey._settings()).max_attempts;
  -- A lock that is in the way of no relation is one of ours.
  v_pause interval := case when code <> '55P03' or target is not null then rekey._waited_for(code) end;
  v_events jsonb;
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  with noted as (
    update rekey.rotations r
    set attempts = a.attempts, last_error = message,
        state = case when a.failed then 'failed' else r.state end,
        pass_id = case when not a.failed then r.pass_id end,
        next_attempt_at = case when not a.failed then
          clock_timestamp() + coalesce(v_pause, least(power(2, a.attempts - 1), 300) * interval '1 second') end,
        blocked_by = case when _record_error.target is not null then jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
          'target', _record_error.target, 'relation', _record_error.relation::text, 'error', message, 'sqlstate', code))) else r.blocked_by end,
        blocked_since = case when _record_error.target is not null then coalesce(r.blocked_since, now()) else r.blocked_since end
    from (
      select t.id, case when v_pause is null then t.attempts + 1 else greatest(t.attempts, 1) end as attempts,
        v_pause is null and t.attempts + 1 >= v_max as failed
      from rekey.rotations t where t.id = any (rotations)) a
    -- Not one that another worker's error has failed meanwhile.
    where a.id = r.id and r.state in ('queued', 'running', 'verifying')
    returning r.id, r.keyring_id, r.to_version, r.state, r.attempts
  )
  select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
    'details', jsonb_build_object('attempt', r.attempts, 'sqlstate', code, 'error', message)) order by r.id, e.event)
  into v_events
  from noted r
  join rekey.keyrings k on k.id = r.keyring_id
  join (values ('rotation.error'), ('rotation.failed')) as e(event) on e.event = 'rotation.error' or r.state = 'failed';
  perform rekey._audit_all(coalesce(v_events, '[]'));
end
$$;


ALTER FUNCTION rekey._record_error(rotations bigint[], message text, code text, target text, relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _record_error(rotations bigint[], message text, code text, target text, relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._record_error(rotations bigint[], message text, code text, target text, relation regclass) IS 'Notes an error of these rotations: the next attempt comes after a growing pause, and after max_attempts they are failed. target, relation: what it came from.';


--
-- Name: _reencrypt(tid[], bytea[], bytea, bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET work_mem TO '64MB'
    SET enable_nestloop TO 'off'
    AS $$
declare
  v_headers bytea[] := rekey._headers(ciphertexts);
  v_keyrings integer[];
  v_versions integer[];
  v_from_keyrings integer[];
  v_from_versions integer[];
  v_ivs bytea;
begin
  select array_agg(rekey._int4(h.header, 3)), array_agg(rekey._int4(h.header, 7)), array_agg(distinct rekey._int4(h.header, 3))
  into v_from_keyrings, v_from_versions, v_keyrings
  from unnest(v_headers) as h(header);
  v_versions := rekey._lock_active(v_keyrings);
  -- 64 IVs at a time: most of the cost is that of the call.
  select string_agg(rekey._random_bytes(1024), ''::bytea) into v_ivs from generate_series(1, (cardinality(ciphertexts) + 63) / 64);

  select array_agg(o.row) filter (where o.body is not null),
    array_agg(o.old_header || o.old_iv) filter (where o.body is not null),
    array_agg(o.header || o.iv || o.body || rekey._mac(o.key, o.aad, o.iv, o.body)) filter (where o.body is not null),
    array_agg(o.keyring_id) filter (where o.body is not null),
    array_agg(o.place) filter (where o.body is null),
    array_agg(case when o.plaintext is null then coalesce(o.old_problem, 'does not open: damaged, or of another row')
                   else coalesce(o.new_problem, 'the keyring has no active version') end) filter (where o.body is null)
  into made_rows, starts, made, made_keyrings, failed_places, problems
  from (
    select p.*, case when p.plaintext is not null and p.key is not null then rekey._encipher(p.key, p.iv, p.plaintext) end as body
    from (
      select u.*, substr(v_ivs, u.place * 16 - 15, 16) as iv, u.header || prefix || u.context as aad,
        case when u.old_key is not null then
          case when rekey._is_authentic(u.old_key, u.old_iv, u.sealed, u.old_header || prefix || u.context)
            then rekey._decipher(u.old_key, u.old_iv, u.sealed) end end as plaintext
      from (
        select c.place::integer as place, c.row, c.context, k.keyring_id, k.old_header, k.old_key, k.header, k.key, k.new_problem,
          substr(c.ciphertext, 12, 16) as old_iv, substr(c.ciphertext, 28) as sealed,
          case when k.old_header is not null then k.old_problem
               when not rekey._is_envelope(c.ciphertext) then rekey._shape_problem(c.ciphertext)
               else 'there is no such key version' end as old_problem
        from unnest(rows, ciphertexts, contexts) with ordinality as c(row, ciphertext, context, place)
        left join (
          with keys as materialized (
            select * from rekey._deks(v_from_keyrings || v_keyrings, v_from_versions || v_versions, sweeping => true)
          )
          select d.keyring_id, rekey._header(d.keyring_id, d.version) as old_header, d.key as old_key, d.problem as old_problem,
            rekey._header(a.keyring_id, a.version) as header, a.key, a.problem as new_problem
          from keys d
          left join (unnest(v_keyrings, v_versions) as w(keyring_id, version) join keys a using (keyring_id, version)) on w.keyring_id = d.keyring_id
          offset 0
        ) k on k.old_header = substr(c.ciphertext, 1, 11) and rekey._is_envelope(c.ciphertext)
        offset 0
      ) u
      offset 0
    ) p
    offset 0
  ) o;
end
$$;


ALTER FUNCTION rekey._reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]) IS 'Re-encrypts envelopes under the active version of their keyring; each is checked first. made: the new envelopes of made_rows, of made_keyrings; starts: header and IV of the old ones; failed_places: those of the given ones that do not open, and problems, why. prefix: what every context begins with. Gives back no plaintext.';


--
-- Name: _refuse_audit_change(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if tg_op = 'DELETE' and exists (select from rekey._audit_head h where h.pruning = pg_current_xact_id()) then
    return null;
  end if;
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Only rekey.prune_audit_log() takes something out of this table.', constraint = 'export';
end
$$;


ALTER FUNCTION rekey._refuse_audit_change() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_audit_change(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_audit_change() IS 'Trigger of the audit log: refuses every change (42501) but the removal by rekey.prune_audit_log().';


--
-- Name: _refuse_blocked(integer[], rekey._target[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_blocked(keyrings integer[] DEFAULT NULL::integer[], targets rekey._target[] DEFAULT NULL::rekey._target[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_blocked jsonb := rekey._blocked_targets(keyrings, targets);
begin
  if v_blocked is not null then
    raise exception '% is blocked: %', v_blocked -> 0 ->> 'target', v_blocked -> 0 ->> 'why' using errcode = 'RK005',
      hint = 'As long as it cannot be counted, nothing completes and no key is destroyed. See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_blocked(keyrings integer[], targets rekey._target[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_blocked(keyrings integer[], targets rekey._target[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_blocked(keyrings integer[], targets rekey._target[]) IS 'RK005 where a target is blocked that may hold rows of these keyrings, NULL: of any: what cannot be counted is never taken for empty. targets: as rekey._blocked_targets().';


--
-- Name: _refuse_bytes(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_bytes() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise exception 'the value is no text in the encoding of this database' using errcode = 'character_not_in_repertoire',
    hint = 'rekey.decrypt() returns its bytes.', constraint = 'decrypt_bytes';
end
$$;


ALTER FUNCTION rekey._refuse_bytes() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_bytes(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_bytes() IS 'Raises 22021.';


--
-- Name: _refuse_change(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise exception '% on rekey.% is refused', tg_op, tg_table_name
    using errcode = 'insufficient_privilege', hint = 'Nothing is ever taken out of this table.';
end
$$;


ALTER FUNCTION rekey._refuse_change() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_change(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_change() IS 'Trigger: refuses every statement it is set on (42501).';


--
-- Name: _refuse_changes(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_changes(before text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if current_setting('track_counts') = 'off' then
    raise exception 'track_counts is off: what the triggers of a table do cannot be checked' using errcode = 'RK005',
      hint = 'Set track_counts to on.';
  elsif rekey._changes() is distinct from before then
    raise exception 'code of the table changed rows where it may not, or queued triggers for the end of the transaction' using errcode = 'RK005',
      hint = 'A trigger that is deferred may not defer others: at COMMIT they would run as whoever works on the rotation.';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_changes(before text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_changes(before text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_changes(before text) IS 'RK005 where rows were changed since rekey._changes().';


--
-- Name: _refuse_doomed(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_doomed() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise exception 'the value stands on a key version that is scheduled for destruction' using errcode = 'RK006',
    hint = 'Encrypt it anew. Who needs the old one cancels the destruction: rekey.cancel_key_destruction().', constraint = 'cancel_destruction';
end
$$;


ALTER FUNCTION rekey._refuse_doomed() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_doomed(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_doomed() IS 'Trigger of every protected column, under the condition rekey._is_doomed(): RK006. So nothing comes to stand on a version whose destruction is scheduled.';


--
-- Name: _refuse_doubt(text, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_doubt(label text, formats text[], values_are_tokens boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_doubt text := rekey._adoption_doubt(label, formats, values_are_tokens);
  v_reason text := regexp_replace(v_doubt, '^\w+: ', '');
begin
  if v_doubt like 'asked:%' then
    raise exception 'column % %', label, v_reason using errcode = 'RK005',
      hint = 'If they are plain tokens or keys: values_are_tokens => true. If another tool encrypted them: name its format in formats.', constraint = 'values_are_tokens';
  elsif v_doubt is not null then
    raise exception 'column % %', label, v_reason using errcode = 'RK005',
      hint = 'Name the format in formats, and adopt with pg-rekey columns adopt, which has its keys. To encrypt the values as they are: force => true.', constraint = 'looks_encrypted';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_doubt(label text, formats text[], values_are_tokens boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_doubt(label text, formats text[], values_are_tokens boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_doubt(label text, formats text[], values_are_tokens boolean) IS 'RK005 where the values of a protected column look encrypted by another tool, and are to be taken for plaintext.';


--
-- Name: _refuse_encrypted(rekey.protected_columns); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_encrypted(protected rekey.protected_columns) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._refuse_encrypted(protected rekey.protected_columns) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_encrypted(protected rekey.protected_columns); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_encrypted(protected rekey.protected_columns) IS 'RK005 where a protected column holds envelopes; 25001 outside READ COMMITTED.';


--
-- Name: _refuse_endpoint(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_endpoint(problem text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if problem is not null then
    raise exception '%', problem using errcode = 'invalid_parameter_value',
      hint = 'An address is https://..., smtps://USER:PASSWORD@HOST?from=...&to=..., smtp:// the same with STARTTLS, or notify:CHANNEL.';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_endpoint(problem text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_endpoint(problem text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_endpoint(problem text) IS 'Raises 22023 for a problem, NULL: none. The address is in no message.';


--
-- Name: _refuse_envelopes(regclass, name); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_envelopes(relation regclass, column_name name) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET bytea_output TO 'hex'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._refuse_envelopes(relation regclass, column_name name) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_envelopes(relation regclass, column_name name); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_envelopes(relation regclass, column_name name) IS 'RK005 where a column of this relation holds envelopes; 42501 where the caller may not read it whole.';


--
-- Name: _refuse_foreign(bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_foreign(envelope bytea, context bytea) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_plaintext bytea;
begin
  if rekey._is_envelope(envelope) then
    -- Of a version that there is: else an envelope that was made up would hold any lock.
    perform pg_advisory_xact_lock_shared(k.keyring_id, k.version)
    from rekey.encryption_keys k where k.keyring_id = rekey._int4(envelope, 3) and k.version = rekey._int4(envelope, 7);
    perform rekey._refuse_old_snapshot(array[rekey._int4(envelope, 3)], array[rekey._int4(envelope, 7)]);
  end if;
  v_plaintext := rekey._open(envelope, context);
  if v_plaintext is null then
    raise exception 'cannot open ciphertext' using errcode = 'RK003';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_foreign(envelope bytea, context bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_foreign(envelope bytea, context bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_foreign(envelope bytea, context bytea) IS 'RK003 where an envelope does not open in this context, RK006 where its key may not be used.';


--
-- Name: _refuse_forger(text, text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_forger(stack text, callee text, caller text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if not starts_with(split_part(stack, E'\n', 2), split_part(stack, callee, 1) || caller || ' ') then
    raise exception 'only a step of the search may say what it found' using errcode = 'insufficient_privilege';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_forger(stack text, callee text, caller text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_forger(stack text, callee text, caller text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_forger(stack text, callee text, caller text) IS '42501 where a function was not called by the one that may, directly and in an assignment. stack: PG_CONTEXT of the function.';


--
-- Name: _refuse_hidden(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_hidden() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_problem text := rekey._own_problem();
begin
  if v_problem is not null then
    raise exception '%', v_problem using errcode = 'RK005', hint = 'What is hidden would count as absent: nothing goes on until that is done.', constraint = 'own_tables';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_hidden() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_hidden(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_hidden() IS 'RK005 where a table of ours is not as we made it, so that rows may be hidden.';


--
-- Name: _refuse_in_use(rekey.keyrings, integer, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint DEFAULT NULL::bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rows bigint := counted;
  v_failures bigint;
begin
  perform rekey._refuse_snapshot();
  perform rekey._refuse_needed(keyring.id, version);
  perform rekey._refuse_blocked();
  if not rekey._barrier(keyring.id, array[version]) then
    raise exception 'version % of keyring % is in use by an open transaction', version, quote_literal(keyring.name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(keyring.id, array[version]));
  end if;
  -- After the barrier, and in a statement of its own: it sees every row that was ever written with this version.
  if counted is null then
    select sum(c.rows) into v_rows from rekey._count(array[keyring.id], false) c where c.version = _refuse_in_use.version;
  end if;
  select count(*) into v_failures from rekey.rotation_failures f
  where f.keyring_id = keyring.id and f.version = _refuse_in_use.version and f.resolved_at is null;
  if v_rows > 0 or v_failures > 0 then
    raise exception 'version % of keyring % is in use: % rows, % rows in quarantine', version, quote_literal(keyring.name),
      coalesce(v_rows, 0), v_failures using errcode = 'RK005',
      hint = 'Rotate the keyring, and resolve its failures: rekey.rotate_keys(), rekey.failure_status.', constraint = 'rotate_and_resolve';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_in_use(keyring rekey.keyrings, version integer, counted bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint) IS 'RK005 where a rotation, an open transaction, a row or a row in quarantine still needs the version. counted: its rows, where they were counted after the last transaction had ended that could write one; NULL: count them.';


--
-- Name: _refuse_later_trigger(text, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_later_trigger(name text, relation oid) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_later text := rekey._later_trigger(name, relation);
begin
  if v_later is not null then
    raise exception 'trigger % of % may change a row after its value was sealed for it', quote_ident(v_later), relation::regclass using errcode = 'RK005',
      hint = format('BEFORE triggers fire in the order of their names: ALTER TRIGGER %I ON %s RENAME TO a name that sorts before %s.', v_later, relation::regclass, name);
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_later_trigger(name text, relation oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_later_trigger(name text, relation oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_later_trigger(name text, relation oid) IS 'RK005 where a trigger may change a row after the trigger of this name, which seals a value for it.';


--
-- Name: _refuse_needed(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_needed(keyring_id integer, version integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rotation bigint;
begin
  select r.id into v_rotation from rekey.rotations r
  where r.keyring_id = _refuse_needed.keyring_id and (_refuse_needed.version = any (r.from_versions) or r.to_version = _refuse_needed.version)
    and r.state in ('queued', 'running', 'paused', 'verifying', 'failed') and not r.in_line;
  if found then
    raise exception 'version % is needed by rotation %', version, v_rotation using errcode = 'RK005',
      hint = 'Let the rotation complete first.';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_needed(keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_needed(keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_needed(keyring_id integer, version integer) IS 'RK005 where a rotation under way needs the version.';


--
-- Name: _refuse_old_snapshot(integer[], integer[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    -- This snapshot may be older than a rotation. A row lock sees the row as it is now: 40001 where it was changed.
    begin
      perform from rekey.encryption_keys k
      where (k.keyring_id, k.version) in (select u.keyring_id, u.version from unnest(keyrings, versions) as u(keyring_id, version))
      for share nowait;
      raise exception using errcode = 'RKEND';
    exception
      when sqlstate 'RKEND' then null;
      when lock_not_available then null;  -- a rotation that has not committed: its barrier will see our lock
    end;
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_old_snapshot(keyrings integer[], versions integer[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) IS '40001 in REPEATABLE READ and SERIALIZABLE, where these versions were changed since the snapshot. The caller holds their advisory locks.';


--
-- Name: _refuse_other_table(integer, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_other_table(id integer, relation oid) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_table oid := (rekey._column_shape(id)).relation;
begin
  if v_table is null or relation <> v_table and not exists (select from pg_partition_ancestors(relation) a where a.relid = v_table) then
    raise exception '% is not the table that this trigger encrypts', relation::regclass using errcode = 'RK005',
      hint = 'rekey.protect_column(..., encrypt_on_write => true) makes the trigger of a table.', constraint = 'encrypt_on_write';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_other_table(id integer, relation oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_other_table(id integer, relation oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_other_table(id integer, relation oid) IS 'RK005 where the trigger that encrypts a column on write was set on a table that is not its own.';


--
-- Name: _refuse_over(rekey.rotations); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_over(rotation rekey.rotations) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  -- (No other takes along what an adoption left. One that waited in line may be under way after one with a higher number.)
  if rotation.trigger <> 'adoption' and exists (
       select from rekey.rotations r
       where r.keyring_id = rotation.keyring_id and r.id <> rotation.id and not r.in_line
         and (r.id > rotation.id or rekey._is_under_way(r.state))) then
    raise exception 'rotation % is not the last one of its keyring', rotation.id using errcode = 'RK006',
      hint = 'A later one takes its rows along; an adoption that is under way has to end first.';
  end if;
  if exists (select from rekey.keyrings k where k.id = rotation.keyring_id and k.retired_at is not null) then
    raise exception 'the keyring of rotation % is retired', rotation.id using errcode = 'RK006';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_over(rotation rekey.rotations) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_over(rotation rekey.rotations); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_over(rotation rekey.rotations) IS 'RK006 where nothing comes of a rotation any more: the keyring has a later one, or is retired; or where another is under way.';


--
-- Name: _refuse_path(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_path(search_path text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if search_path is null then
    raise exception 'search_path is NULL' using errcode = 'invalid_parameter_value', hint = 'Left out, it is that of the session.';
  end if;
  perform set_config('search_path', search_path, true);
end
$$;


ALTER FUNCTION rekey._refuse_path(search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_path(search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_path(search_path text) IS '22023 where this is no search path.';


--
-- Name: _refuse_problem(text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_problem(target text, problem text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if problem is not null then
    raise exception '% is blocked: %', target, problem using errcode = 'RK005', hint = 'See rekey.column_status.', constraint = 'columns';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_problem(target text, problem text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_problem(target text, problem text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_problem(target text, problem text) IS 'RK005 where a target has a problem.';


--
-- Name: _refuse_prune(bigint, bigint, text, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_keep interval := (rekey._settings()).audit_keep;
  v_until timestamptz;
  v_verified record;
begin
  if last <= v_start then
    raise exception 'entries up to % were removed already', v_start using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  if first <> v_start + 1 then
    raise exception 'the file begins at entry %, and the log at entry %', first, v_start + 1 using errcode = 'RK006',
      hint = 'Nothing is removed that is in no file. Export again: pg-rekey audit export.', constraint = 'export';
  end if;
  v_verified := rekey.verify_audit_log(checkpoint -> 'checkpoint');
  if not v_verified.valid then
    raise exception 'the audit log does not hold at entry %: %', v_verified.first_bad, v_verified.reason using errcode = 'RK006',
      hint = 'Nothing is removed from a log that is not whole: rekey.verify_audit_log() tells what is wrong.', constraint = 'verify';
  end if;
  if not exists (select from rekey.audit_log a where a.id = last and encode(a.hash, 'hex') = _refuse_prune.hash) then
    raise exception 'entry % of the file is not that of the log', last using errcode = 'invalid_parameter_value',
      hint = 'Give number and hash of the last entry of a file that was exported from this log.', constraint = 'export';
  end if;
  -- By the log's own time: a clock that jumped ahead makes nothing old that was written before.
  select least(a.at, clock_timestamp()) - v_keep into v_until
  from rekey.audit_log a where a.id = (checkpoint -> 'checkpoint' ->> 'id')::bigint;
  if v_until is null or exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and a.at >= v_until) then
    raise exception 'entries up to % are not older than % before the checkpoint', last, v_keep using errcode = 'RK006',
      hint = 'The setting audit_keep says how long entries stay. Export fewer of them, or wait.';
  end if;
  if not exists (select from rekey.audit_log a where a.id > v_start and a.id <= last and not rekey._is_kept(a.event)) then
    raise exception 'up to entry % there is nothing to remove', last using errcode = 'RK006',
      hint = 'Entries key.*, kek.* and audit.pruned stay for ever. Export more of them, or wait.';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) IS 'Refuses a removal from the audit log that rekey.prune_audit_log() may not do: RK006, 22023.';


--
-- Name: _refuse_renamed(integer, name[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_renamed(id integer, names name[]) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._refuse_renamed(id integer, names name[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_renamed(id integer, names name[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_renamed(id integer, names name[]) IS 'RK005 where the columns of a protected column are not called so any more, in table order, or have a type of the user''s: another column may have taken the name.';


--
-- Name: _refuse_snapshot(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_snapshot() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this runs in READ COMMITTED only' using errcode = 'active_sql_transaction',
      hint = 'An older snapshot does not see every row that stands on a key.';
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_snapshot() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_snapshot(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_snapshot() IS 'Raises 25001 outside READ COMMITTED.';


--
-- Name: _refuse_stranger(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_stranger(relation regclass) RETURNS name
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_owner name := (select pg_get_userbyid(c.relowner) from pg_class c where c.oid = relation);
begin
  if v_owner is null or not pg_has_role(rekey._caller(), v_owner, 'usage') then
    raise exception 'only the owner of % may do this', relation using errcode = 'insufficient_privilege';
  end if;
  return v_owner;
end
$$;


ALTER FUNCTION rekey._refuse_stranger(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_stranger(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_stranger(relation regclass) IS 'The owner of a table. 42501 where the caller is not a member of it.';


--
-- Name: _refuse_superuser(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_superuser(relation regclass) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._refuse_superuser(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_superuser(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_superuser(relation regclass) IS '42501 where a session of a superuser would run the code of another who owns a table.';


--
-- Name: _refuse_tenant(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_tenant() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  raise exception 'no access to this tenant' using errcode = 'insufficient_privilege';
end
$$;


ALTER FUNCTION rekey._refuse_tenant() OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_tenant(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_tenant() IS 'Raises 42501.';


--
-- Name: _refuse_traces(text[], text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_traces(before text[], search_path text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_after text[] := rekey._session_state(search_path);
begin
  for v_place in 1 .. cardinality(before) loop
    if v_after[v_place] is distinct from before[v_place] then
      raise exception 'code of the table left % behind', (array['a setting', 'a cursor', 'a temporary object', 'a prepared statement'])[v_place]
        using errcode = 'RK005', hint = 'Its triggers run in the session of whoever works on the rotation, and must leave it as it was.';
    end if;
  end loop;
end
$$;


ALTER FUNCTION rekey._refuse_traces(before text[], search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_traces(before text[], search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_traces(before text[], search_path text) IS 'RK005 where the session is not as rekey._session_state() found it before.';


--
-- Name: _refuse_unlock(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refuse_unlock(problem text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  if problem = 'scope' then
    raise exception 'scope is transaction, session or replacement' using errcode = 'invalid_parameter_value';
  elsif problem = 'length' then
    raise exception 'a KEK has 32 bytes' using errcode = 'invalid_parameter_value',
      hint = 'pg-rekey kek generate makes one. With 64 bytes, the current KEK and the next one are given together.';
  elsif problem is not null then
    raise exception 'wrong KEK' using errcode = 'RK002',
      hint = format('The active KEK has the fingerprint %s; pg-rekey kek check says which one a copy is.', problem);
  end if;
end
$$;


ALTER FUNCTION rekey._refuse_unlock(problem text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refuse_unlock(problem text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refuse_unlock(problem text) IS 'Raises the error for a problem of rekey._unlock().';


--
-- Name: _refused_plain(text, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refused_plain(label text, rotation_id bigint) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_target rekey._target;
  v_from tid;
  v_found record;
  v_refused bigint := 0;
begin
  for v_target in
    select t.* from rekey._targets(label) t
    where t.problem is null and exists (
      select from rekey.rotation_failures q
      where q.rotation_id = _refused_plain.rotation_id and q.relation = t.relation::text and q.version is null and q.resolved_at is null)
  loop
    v_from := '(0,0)';
    while v_from is not null loop
      -- They stay locked until it is noted that they are not behind.
      select s.* into v_found from rekey._call_read(v_target.function_name, v_target.relation, v_from, '(4294967294,0)', null, null, 1000, 2097152) s;
      v_refused := v_refused + (
        select count(*) from unnest(v_found.keys) as k(row_key)
        where exists (
          select from rekey.rotation_failures q
          where q.rotation_id = _refused_plain.rotation_id and q.target = label and q.relation = v_target.relation::text
            and q.row_hash = rekey._row_hash(k.row_key) and q.version is null and q.resolved_at is null));
      v_from := rekey._next_row(v_found.next);
    end loop;
  end loop;
  return v_refused;
end
$$;


ALTER FUNCTION rekey._refused_plain(label text, rotation_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refused_plain(label text, rotation_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refused_plain(label text, rotation_id bigint) IS 'How many rows of a column that hold no envelope this adoption has put into the quarantine. By their keys: an entry whose row is gone says nothing of a value that came meanwhile.';


--
-- Name: _row_hash(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._row_hash(row_key text) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._row_hash(row_key text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _row_hash(row_key text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._row_hash(row_key text) IS 'What a row in quarantine is found by: its key may be longer than an index row. (A backslash is doubled for the cast.)';


--
-- Name: _refused_rows(text, regclass, bytea[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]) RETURNS TABLE(place integer, keyring_id integer, version integer)
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]) IS 'Which of these rows are in quarantine because their table refused the new value, and still are as they were then.';


--
-- Name: _register_column(regclass, name, text, name[], boolean, boolean, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    SET row_security TO 'off'
    AS $_$
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

  select array_agg(a.attnum order by a.attnum) into v_attnums
  from pg_attribute a where a.attrelid = target and a.attname = any (v_context || _register_column.column_name) and a.attnum > 0;
  -- Repeated, for the same column or after its functions were lost, it makes them anew.
  v_id := rekey._column_id(target, _register_column.column_name);
  select * into v_protected from rekey.protected_columns c
  where c.id = v_id
     or c.relation_name = format('%I.%I', v_table.nspname, v_table.relname) and c.column_name = _register_column.column_name and (rekey._column_shape(c.id)).relation is null
  for update;
  v_places := array(
    select array_position(v_attnums, a.attnum)
    from unnest(_register_column.column_name || v_context) with ordinality as c(name, rank)
    join pg_attribute a on a.attrelid = target and a.attname = c.name
    order by c.rank);
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
      search_path = _register_column.search_path, owner = v_owner
    where c.id = v_protected.id returning * into v_protected;
  end if;
  id := v_protected.id;

  statements := rekey._column_statements(v_protected, target, v_attnums);
end
$_$;


ALTER FUNCTION rekey._register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]) IS 'What rekey.protect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';


--
-- Name: _release_column(regclass, name, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
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
  update rekey.protected_columns c set encrypt_on_write = false where c.id = v_protected.id;  -- its trigger goes
  if not decrypt then
    perform rekey._refuse_encrypted(v_protected);
  else
    perform rekey._refuse_superuser(target);
    select array_agg(quote_ident(a.attname) order by p.rank) into v_names
    from rekey._column_shape(id) s
    cross join lateral unnest(v_protected.places) with ordinality as p(place, rank)
    join pg_attribute a on a.attrelid = s.relation and a.attnum = s.attnums[p.place];
    statements := array(
      select format(
        'with due as materialized (select t.ctid as row from only %1$s t where %2$s limit 5000 for no key update skip locked)
         update only %1$s t set %3$s = rekey.%4$s(t.%3$s, array[%5$L%6$s], (select rekey.reading_pass(%5$L))) from due where t.ctid = due.row',
        t.relation,
        -- What rekey._refuse_encrypted() counts: a plain value that begins alike is none.
        format(case when v_protected.is_text then $sql$left(t.%s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$sql$
          else $sql$substr(t.%1$s, 1, 3) = '\x524b01' and octet_length(t.%1$s) >= 11$sql$ end, v_names[1]),
        v_names[1], case when v_protected.is_text then 'decrypt_text' else 'decrypt' end, v_protected.label,
        (select string_agg(format(', t.%s::text', c), '') from unnest(v_names[2:]) c))
      from rekey._targets(v_protected.label) t);
  end if;
end
$_$;


ALTER FUNCTION rekey._release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]) IS 'What rekey.unprotect_column() does with the rights of rekey_owner; statements are what the owner of the table has to run.';


--
-- Name: _remake_columns(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._remake_columns() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    AS $$
declare
  v_is_extension boolean := exists (select from pg_extension e where e.extname = 'pg_rekey');
  v_column record;
  v_function regprocedure;
  v_statement text;
begin
  for v_column in
    select c as protected, c.id, c.label, s.relation, s.attnums, pg_get_userbyid(t.relowner) as owner
    from rekey.protected_columns c
    cross join lateral rekey._column_shape(c.id) s
    join pg_class t on t.oid = s.relation
    where cardinality(s.attnums) = cardinality(c.places)
      -- Where the table has another owner since, the column waits for him.
      and t.relowner = (select p.proowner from pg_proc p where p.oid = to_regproc(format('rekey_targets.column_%s_guard', c.id)))
    order by c.id
  loop
    v_function := to_regprocedure(format('rekey_targets.column_%s_trigger()', v_column.id));
    if v_function is not null then
      -- Triggers depend on it: it is replaced. The script of an extension replaces nothing but its own.
      if v_is_extension then
        execute format('alter extension pg_rekey add function %s', v_function);
      end if;
      execute rekey._trigger_statement(v_column.id, rekey._write_trigger_body(v_column.protected, v_column.relation, v_column.attnums));
    end if;
    if not pg_has_role(v_column.owner, 'usage') then
      raise warning '% may be blocked now: the functions of columns changed, and % owns its table', v_column.label, v_column.owner
        using hint = 'Where rekey.column_status says so, that role repeats rekey.protect_column().', constraint = 'protect_again';
      continue;
    end if;
    for v_function in
      select p.oid::regprocedure from pg_proc p
      where p.pronamespace = 'rekey_targets'::regnamespace and p.proname = any ((rekey._function_names('column_' || v_column.id))[2:6])
    loop
      execute format('drop function %s', v_function);
    end loop;
    execute format('grant create on schema rekey_targets to %I', v_column.owner);
    foreach v_statement in array rekey._function_statements(v_column.protected, v_column.owner) loop
      execute v_statement;
    end loop;
    execute format('revoke create on schema rekey_targets from %I', v_column.owner);
  end loop;
  for v_function in
    select p.oid::regprocedure from pg_depend d join pg_proc p on p.oid = d.objid
    where d.classid = 'pg_proc'::regclass and d.deptype = 'e' and p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_'
  loop
    execute format('alter extension pg_rekey drop function %s', v_function);
  end loop;
end
$$;


ALTER FUNCTION rekey._remake_columns() OWNER TO rekey_owner;

--
-- Name: FUNCTION _remake_columns(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._remake_columns() IS 'Makes the functions of protected columns anew, as this version has them, in the name of their owners. A warning where whoever updates is no member of an owner: that column may be blocked until its owner repeats rekey.protect_column().';


--
-- Name: _replace_lost_keys(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._replace_lost_keys(kek_id integer) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform from rekey._rotate(
    array(select k.keyring_id from rekey.encryption_keys k where k.state = 'active' and k.kek_id = _replace_lost_keys.kek_id),
    'manual', format('KEK %s is lost', kek_id), true);
end
$$;


ALTER FUNCTION rekey._replace_lost_keys(kek_id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _replace_lost_keys(kek_id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._replace_lost_keys(kek_id integer) IS 'Gives every keyring whose active version was wrapped under a lost KEK a new one.';


--
-- Name: _subject(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._subject() RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._subject() OWNER TO rekey_owner;

--
-- Name: FUNCTION _subject(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._subject() IS 'The subject of the JWT as the audit log has it.';


--
-- Name: _requester(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._requester() RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._requester() OWNER TO rekey_owner;

--
-- Name: FUNCTION _requester(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._requester() IS 'Who asks for a rotation: the role that calls; before it the subject of the JWT, where there is one.';


--
-- Name: _reveal(bytea, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._reveal(value bytea, context text[], pass bytea) RETURNS bytea
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  if substr(value, 1, 3) = '\x524b01'::bytea then
    return rekey._decrypt(value, context, pass);
  end if;
  return value;
end
$$;


ALTER FUNCTION rekey._reveal(value bytea, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _reveal(value bytea, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._reveal(value bytea, context text[], pass bytea) IS 'Opens an envelope, as rekey.decrypt(); any other value stays as it is.';


--
-- Name: _reveal(text, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._reveal(value text, context text[], pass bytea) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._reveal(value text, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _reveal(value text, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._reveal(value text, context text[], pass bytea) IS 'As for bytea, of the text form.';


--
-- Name: _rival(rekey.protected_columns, regclass, oid[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rival(protected rekey.protected_columns, relation regclass, leaves oid[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) IS 'Label of another protected column whose table is a partition of this one, or has it as a partition: their values would be bound to two labels. leaves: what the table consists of. NULL: there is none.';


--
-- Name: _rotate(integer[], text, text, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) RETURNS SETOF bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_due integer[];
  v_from integer[];
  v_to integer[];
  v_rotations bigint[];
begin
  if keyrings = '{}' then
    return;
  end if;
  perform rekey._lock_kek();
  perform from rekey.keyrings k where k.id = any (keyrings) order by k.id for no key update;
  if supersede then
    perform from rekey.rotations r where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line order by r.id for no key update;
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = any (keyrings) and rekey._is_under_way(r.state) and not r.in_line;
  end if;
  select array_agg(k.id order by k.id), array_agg(a.version order by k.id),
    array_agg((select max(m.version) + 1 from rekey.encryption_keys m where m.keyring_id = k.id) order by k.id)
  into v_due, v_from, v_to
  from rekey.keyrings k
  join rekey.encryption_keys a on a.keyring_id = k.id and a.state = 'active'
  where k.id = any (keyrings) and k.retired_at is null
    and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line);
  if v_due is null then
    return;
  end if;

  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = any (v_due) and k.state = 'active';
  perform rekey._new_keys(v_due, v_to);
  -- A transaction with an older snapshot must not pass by a rotation: it fails on this row (40001).
  update rekey.keyrings k set rotated_at = now() where k.id = any (v_due);
  with queued as (
    insert into rekey.rotations (keyring_id, from_versions, to_version, previous_version, trigger, reason, requested_by)
    select d.keyring_id,
      array(select k.version from rekey.encryption_keys k
            where k.keyring_id = d.keyring_id and k.version <> d.to_version and k.state <> 'destroyed' order by k.version),
      d.to_version, d.from_version, _rotate.trigger, _rotate.reason, rekey._requester()
    from unnest(v_due, v_from, v_to) as d(keyring_id, from_version, to_version)
    returning id, keyring_id
  )
  select array_agg(q.id order by q.keyring_id) into v_rotations from queued q;
  perform rekey._audit_all((
    select jsonb_agg(jsonb_build_object('event', e.event, 'keyring', k.name, 'version', e.version, 'rotation_id', e.rotation_id,
                                        'details', e.details) order by d.place, e.place)
    from unnest(v_due, v_from, v_to, v_rotations) with ordinality as d(keyring_id, from_version, to_version, rotation_id, place)
    join rekey.keyrings k on k.id = d.keyring_id
    join rekey.rotations r on r.id = d.rotation_id
    cross join lateral (values
      (1, 'rotation.requested', d.to_version, r.id,
        jsonb_strip_nulls(jsonb_build_object('trigger', r.trigger, 'reason', r.reason, 'from_versions', r.from_versions, 'supersede', nullif(_rotate.supersede, false)))),
      (2, 'key.created', d.to_version, r.id, '{}'::jsonb),
      (3, 'key.deactivated', d.from_version, r.id, '{}'),
      (4, 'key.activated', d.to_version, r.id, '{}')
    ) as e(place, event, version, rotation_id, details)));
  return query select r.id from unnest(v_rotations) as r(id);
end
$$;


ALTER FUNCTION rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rotate(keyrings integer[], trigger text, reason text, supersede boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) IS 'Makes and activates the next version of each of these keyrings and queues their rotations, whose numbers it returns. Keyrings under way are left out unless supersede.';


--
-- Name: _rotate_due(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rotate_due() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_due integer[];
begin
  select array_agg(k.id) into v_due
  from (select k.id from rekey.keyrings k
        where k.next_rotation_at <= now()
          and not exists (select from rekey.rotations r where r.keyring_id = k.id and rekey._is_under_way(r.state) and not r.in_line)) k;
  if v_due is null then
    return;
  end if;
  perform from rekey._kek();
  perform rekey._lock_kek();
  -- Looked at again under its lock: another tick may have been here.
  v_due := array(select k.id from rekey.keyrings k where k.id = any (v_due) and k.next_rotation_at <= now() order by k.id for no key update);
  perform from rekey._rotate(v_due, 'schedule', null, false);
  update rekey.keyrings k set next_rotation_at = now() + k.rotate_every where k.id = any (v_due);
end
$$;


ALTER FUNCTION rekey._rotate_due() OWNER TO rekey_owner;

--
-- Name: FUNCTION _rotate_due(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rotate_due() IS 'Begins the rotations whose time has come; the next one is due a cryptoperiod from now.';


--
-- Name: _rotation(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rotation(id bigint) RETURNS rekey.rotations
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rotation rekey.rotations;
begin
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id;
  if not found then
    raise exception 'no such rotation: %', coalesce(id::text, 'NULL') using errcode = 'RK007',
      hint = 'See rekey.rotation_status.', constraint = 'rotations';
  end if;
  -- The keyring first, as everywhere.
  perform from rekey.keyrings k where k.id = v_rotation.keyring_id for no key update;
  select * into v_rotation from rekey.rotations r where r.id = _rotation.id for update;
  return v_rotation;
end
$$;


ALTER FUNCTION rekey._rotation(id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rotation(id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rotation(id bigint) IS 'A rotation, its row and that of its keyring locked. RK007: there is none.';


--
-- Name: _rpc_hint(text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rpc_hint(action text, hint text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._rpc_hint(action text, hint text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rpc_hint(action text, hint text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rpc_hint(action text, hint text) IS 'A hint in the words of PostgREST''s clients, by the action that it asks for; those of SQL where there are no others.';


--
-- Name: _rpc_problem(text, text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rpc_problem(code text, message text, hint text) RETURNS jsonb
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform set_config('response.status', rekey._http_status(code)::text, true);
  return jsonb_build_object('code', code, 'message', message, 'details', null, 'hint', nullif(hint, ''));
end
$$;


ALTER FUNCTION rekey._rpc_problem(code text, message text, hint text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _rpc_problem(code text, message text, hint text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rpc_problem(code text, message text, hint text) IS 'An error as the answer of a request, with its HTTP status.';


--
-- Name: _rpc_refusal(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._rpc_refusal() RETURNS jsonb
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._rpc_refusal() OWNER TO rekey_owner;

--
-- Name: FUNCTION _rpc_refusal(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._rpc_refusal() IS 'The answer to whoever may not: 403 by PostgREST, 42501 else.';


--
-- Name: _same_heads(bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._same_heads(heads bytea[]) RETURNS integer
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_head bytea;
  v_most bytea;
  v_votes integer := 0;
  v_count integer := 0;
begin
  -- What more than half of them have in common is left at the end of this.
  foreach v_head in array heads loop
    if v_votes = 0 then
      v_most := v_head;
    end if;
    v_votes := v_votes + case when v_head = v_most then 1 else -1 end;
  end loop;
  foreach v_head in array heads loop
    v_count := v_count + case when v_head = v_most then 1 else 0 end;
  end loop;
  return v_count;
end
$$;


ALTER FUNCTION rekey._same_heads(heads bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _same_heads(heads bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._same_heads(heads bytea[]) IS 'How many of these are equal, where they are more than half.';


--
-- Name: _scan_on(rekey._target, integer[], tid, bigint, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._scan_on(target rekey._target, keyrings integer[], first tid, step bigint DEFAULT NULL::bigint, until bigint DEFAULT '4294967294'::bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_end bigint := least(until, pg_relation_size(target.relation) / current_setting('block_size')::integer);
  v_until bigint;
  v_found record;
begin
  -- 256 blocks hold no more than 2 MB of what is not stored out of line.
  next_step := coalesce(step, 256);
  v_until := least(rekey._block(first) + next_step, v_end);
  select s.* into v_found from rekey._call_scan(
    target.function_name, target.relation, first, format('(%s,0)', v_until)::tid, keyrings, null, 4000, 2097152) s;
  ciphertexts := v_found.ciphertexts;
  contexts := v_found.contexts;
  keys := v_found.keys;
  next_first := case when v_found.next is not null then rekey._next_row(v_found.next) when v_until < v_end then format('(%s,0)', v_until)::tid end;
  next_step := case when v_found.next is not null then greatest(next_step / 2, 256)
                    when coalesce(cardinality(v_found.rows), 0) < 1000 then least(next_step * 2, 1048576) else next_step end;
end
$$;


ALTER FUNCTION rekey._scan_on(target rekey._target, keyrings integer[], first tid, step bigint, until bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _scan_on(target rekey._target, keyrings integer[], first tid, step bigint, until bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._scan_on(target rekey._target, keyrings integer[], first tid, step bigint, until bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) IS 'Some rows of a target from a row pointer on, as its scan function finds them, and where the next call goes on; next_first NULL: no more before block until. step: how many blocks to read, as the last call said; NULL at first.';


--
-- Name: _schedule_destruction(text, integer, interval); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._schedule_destruction(keyring text, version integer, wait interval) RETURNS timestamp with time zone
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_wait interval := coalesce(wait, (rekey._settings()).destroy_wait);
  v_writing text;
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
begin
  if v_wait not between '0 s' and '3650 days' then
    raise exception 'wait is between 0 and 3650 days' using errcode = 'invalid_parameter_value';
  end if;
  v_writing := rekey._open_writers();  -- before anything is locked
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('decrypt_only', 'disabled', 'compromised') then
    raise exception 'version % is %: it cannot be scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  if v_writing is not null then
    raise exception '%: what it stores may need version %', v_writing, version using errcode = 'RK005', hint = 'Try again when it has ended.';
  end if;
  perform rekey._refuse_in_use(v_keyring, version);
  perform rekey._move_key(v_key, 'destroy_scheduled', 'key.destroy_scheduled', null, now() + v_wait);
  return now() + v_wait;
end
$$;


ALTER FUNCTION rekey._schedule_destruction(keyring text, version integer, wait interval) OWNER TO rekey_owner;

--
-- Name: FUNCTION _schedule_destruction(keyring text, version integer, wait interval); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._schedule_destruction(keyring text, version integer, wait interval) IS 'What rekey.schedule_key_destruction() does with the rights of rekey_owner.';


--
-- Name: _sealing(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sealing(keyring_id integer, bytes integer DEFAULT 0) RETURNS rekey._sealing
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_version integer;
  v_locked integer;
  v_sealing rekey._sealing;
begin
  if bytes > rekey._max_bytes() then
    raise exception 'a value has at most % bytes, this one has %', rekey._max_bytes(), bytes using errcode = 'invalid_parameter_value';
  end if;
  -- Looked at, locked, and looked at again, as rekey._lock_active() does with many keyrings.
  loop
    select k.version into v_version from rekey.encryption_keys k where k.keyring_id = _sealing.keyring_id and k.state = 'active';
    if not found then
      raise exception 'the keyring is retired' using errcode = 'RK006';
    end if;
    exit when v_version = v_locked;
    perform pg_advisory_xact_lock_shared(keyring_id, v_version);
    v_locked := v_version;
  end loop;
  if current_setting('transaction_isolation') <> 'read committed' then
    perform rekey._refuse_old_snapshot(array[keyring_id], array[v_version]);
  end if;
  v_sealing.key := rekey._dek(keyring_id, v_version);
  if v_sealing.key is null then
    raise exception 'the active key version % cannot be used', v_version using errcode = 'RK006',
      hint = 'Rotate the keyring: rekey.rotate_keys().', constraint = 'rotate';
  end if;
  v_sealing.header := rekey._header(keyring_id, v_version);
  return v_sealing;
end
$$;


ALTER FUNCTION rekey._sealing(keyring_id integer, bytes integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _sealing(keyring_id integer, bytes integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sealing(keyring_id integer, bytes integer) IS 'Header and DEK for values of that many bytes under the active version of the keyring, which it keeps in use until the transaction ends. 22023: too long; RK001, RK002: KEK; RK006: retired, or its key is damaged.';


--
-- Name: _sealing_on_write(integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sealing_on_write(keyring_id integer, bytes integer) RETURNS rekey._sealing
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._sealing_on_write(keyring_id integer, bytes integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _sealing_on_write(keyring_id integer, bytes integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sealing_on_write(keyring_id integer, bytes integer) IS 'rekey._sealing() for the trigger that encrypts. In the replica role, without the KEK: RK001 that names the subscription; or, where the setting apply_plaintext lets it pass, a warning and NULL.';


--
-- Name: _search_advice(oid, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._search_advice(relation oid, role text) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._search_advice(relation oid, role text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _search_advice(relation oid, role text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._search_advice(relation oid, role text) IS 'What lets a role read a relation; NULL: nothing that could be granted.';


--
-- Name: _search_on(timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._search_on(begun timestamp with time zone) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._search_on(begun timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _search_on(begun timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._search_on(begun timestamp with time zone) IS 'A step of the search as a part of rekey.tick(), for 20 seconds of it; where transactions have to end, 2. What comes next: search, more (the duty goes on), NULL (the next tick does).';


--
-- Name: _search_relations; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._search_relations (
    search_id bigint NOT NULL,
    relation oid NOT NULL,
    name text NOT NULL,
    bytes bigint NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    statement text,
    filenode oid,
    since xid8,
    next_block bigint DEFAULT 0 NOT NULL,
    blocks bigint DEFAULT 0 NOT NULL,
    batch_blocks integer DEFAULT 256 NOT NULL,
    rows bigint DEFAULT 0 NOT NULL,
    role text,
    read_at timestamp with time zone,
    problem text,
    tried_by text[] DEFAULT '{}'::text[] NOT NULL,
    CONSTRAINT _search_relations_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'read'::text, 'looked'::text])))
);


ALTER TABLE rekey._search_relations OWNER TO rekey_owner;

--
-- Name: TABLE _search_relations; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._search_relations IS 'Relations of a search: what is read of each by its turns, by which role, as what it was found (filenode, statement), and why it was not read.';


--
-- Name: _search_problem(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._search_problem(search_id bigint) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._search_problem(search_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _search_problem(search_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._search_problem(search_id bigint) IS 'What a search could not read, by which role, and what lets it; NULL: it could read everything so far.';


--
-- Name: _search_turn(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb) IS 'What the search has to do next, as the role that reads can: read some blocks of a relation, look at everything, wait, or nothing (idle; incomplete: this role can do no more).';


--
-- Name: _searchable(oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._searchable(only_one oid DEFAULT NULL::oid) RETURNS TABLE(relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, problem text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._searchable(only_one oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _searchable(only_one oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._searchable(only_one oid) IS 'The relations of this database, or only one, that have room for an envelope where no target counts it, and the statement that reads one: $1 the headers wanted, of a heap $2 and $3 a range of row pointers, $4 the transaction from which on rows are read, NULL: all. problem: why it cannot be read.';


--
-- Name: _secret_context(uuid, uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._secret_context(tenant_id uuid, id uuid) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._secret_context(tenant_id uuid, id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _secret_context(tenant_id uuid, id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._secret_context(tenant_id uuid, id uuid) IS 'What the ciphertext of a secret is bound to.';


--
-- Name: _sequences_behind(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sequences_behind() RETURNS TABLE(sequence regclass, at bigint, needed bigint)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._sequences_behind() OWNER TO rekey_owner;

--
-- Name: FUNCTION _sequences_behind(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sequences_behind() IS 'Sequences of our tables whose next number is taken: where they are, and where they would have to be.';


--
-- Name: _session_keks(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._session_keks() RETURNS bytea
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_set text := current_setting('rekey.unlocked', true);
  v_seal bytea;
  v_bytes bytea;
  v_iv bytea;
  v_aad bytea;
  v_keks bytea;
begin
  -- IV, 32 or 64 bytes with padding, tag, in hex
  if coalesce(length(v_set), 0) not in (193, 257) or v_set !~ '^[tsr][0-9a-f]+$' then
    return null;
  end if;
  select s.key into v_seal from rekey._session_key s;
  if not found then
    return null;
  end if;
  v_bytes := decode(substr(v_set, 2), 'hex');
  v_iv := substr(v_bytes, 1, 16);
  v_bytes := substr(v_bytes, 17);
  v_aad := rekey._session_aad(left(v_set, 1));
  v_keks := rekey._aead_decrypt(v_seal, v_iv, v_bytes, v_aad);
  return v_keks;
end
$_$;


ALTER FUNCTION rekey._session_keks() OWNER TO rekey_owner;

--
-- Name: FUNCTION _session_keks(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._session_keks() IS 'The KEK, or the current and the next one, that this session unlocked itself with; NULL if it did not.';


--
-- Name: _session_seal(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._session_seal() RETURNS bytea
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_seal bytea;
begin
  select s.key into v_seal from rekey._session_key s;
  if not found then
    insert into rekey._session_key (key) values (rekey._random_bytes(64)) on conflict do nothing;
    select s.key into strict v_seal from rekey._session_key s;
  end if;
  return v_seal;
end
$$;


ALTER FUNCTION rekey._session_seal() OWNER TO rekey_owner;

--
-- Name: FUNCTION _session_seal(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._session_seal() IS 'The key under which sessions carry secrets; made by the first that does.';


--
-- Name: _session_state(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._session_state(search_path text) RETURNS text[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return array[
    -- (The view has them in the order of their names. To sort them anew takes as long as to show them.)
    search_path || ' ' || (
      select encode(sha256(convert_to(string_agg(s.name || '=' || s.setting, ','), 'UTF8')), 'hex')
      from pg_settings s where s.name <> 'search_path'),
    (select string_agg(c.name, ',' order by c.name) from pg_cursors c where c.is_holdable),
    -- (By the dependencies of the schema, which have an index: pg_type may be large.)
    (select string_agg(t.oid || ' ' || t.xmin, ',' order by t.oid)
     from pg_depend d join pg_class c on c.oid = d.objid join pg_type t on t.oid = c.reltype
     where d.refclassid = 'pg_namespace'::regclass and d.refobjid = pg_my_temp_schema() and d.classid = 'pg_class'::regclass),
    array_to_string(rekey._prepared(), ',')];
end
$$;


ALTER FUNCTION rekey._session_state(search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _session_state(search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._session_state(search_path text) IS 'What must be as before once the code of a table has run: settings, cursors, temporary objects, prepared statements. search_path: the one outside of this function.';


--
-- Name: _settings(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._settings() RETURNS rekey.settings
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_settings rekey.settings;
begin
  select * into v_settings from rekey.settings;
  if not found then
    raise exception 'pg_rekey is installed but not set up' using errcode = 'RK001',
      hint = 'Register a KEK: pg-rekey init, or select rekey.register_kek().', constraint = 'register_kek';
  end if;
  return v_settings;
end
$$;


ALTER FUNCTION rekey._settings() OWNER TO rekey_owner;

--
-- Name: FUNCTION _settings(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._settings() IS 'The settings. RK001 before rekey.register_kek().';


--
-- Name: _shape_doubt(bytea[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._shape_doubt("values" bytea[]) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_value bytea;
  v_bytes bytea;
  v_heads bytea[] := '{}'::bytea[];
  v_lengths integer[] := '{}'::integer[];
  v_distinct integer[];
  v_reason text;
begin
  foreach v_value in array "values" loop
    v_bytes := rekey._opaque_bytes(v_value);
    if v_bytes is not null then
      v_lengths := v_lengths || octet_length(v_bytes);
      -- The prefix of a token (sk_live_) is no header, and what has 16 bytes has no room for one.
      if octet_length(v_bytes) > 16 and encode(substr(v_value, 1, 6), 'escape') !~ '[_-]' then
        v_heads := v_heads || substr(v_bytes, 1, 4);
      end if;
    end if;
  end loop;
  if cardinality(v_lengths) = 0 or cardinality(v_lengths) < 0.9 * cardinality("values") then
    return null;
  end if;
  select array_agg(distinct l.length order by l.length) into v_distinct from unnest(v_lengths) as l(length);
  v_reason := case
    when rekey._same_heads(v_heads) >= greatest(2, 0.9 * cardinality(v_lengths)) then 'blocked: they begin with the same header'
    -- (Keys and tokens of several lengths have these.)
    when cardinality(v_distinct) > 1 and not v_distinct <@ '{16,20,24,32,40,64,128,256}'
      and (select count(distinct d.length % case when cardinality(v_distinct) = 2 then 16 else 8 end) from unnest(v_distinct) as d(length)) = 1 then 'blocked: their lengths go by the blocks of a cipher'
    when cardinality(v_distinct) = 1 then 'asked: they all have one length, as tokens and keys have'
    else 'asked: their lengths differ, as those of texts do' end;
  return format('%s: looks encrypted: %s of %s values are base64, hexadecimal or bytes without words, and %s', split_part(v_reason, ': ', 1),
    cardinality(v_lengths), cardinality("values"), split_part(v_reason, ': ', 2));
end
$$;


ALTER FUNCTION rekey._shape_doubt("values" bytea[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _shape_doubt("values" bytea[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._shape_doubt("values" bytea[]) IS 'Why values without a mark may be ciphertext all the same, over all of them: "blocked: ..." or, where they may as well be tokens, "asked: ...". NULL: there is no reason.';


--
-- Name: _shape_problem(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._shape_problem(ciphertext bytea) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._shape_problem(ciphertext bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _shape_problem(ciphertext bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._shape_problem(ciphertext bytea) IS 'What is wrong with what is no envelope. What is larger than any can be, targets do not read: a header, and the word large, stand for it.';


--
-- Name: _sign(bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sign(key bytea, message bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._sign(key bytea, message bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _sign(key bytea, message bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sign(key bytea, message bytea) IS 'HMAC-SHA-256 of a message, by which a webhook is known to be ours.';


--
-- Name: _silence_problem(regclass, smallint, oid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._silence_problem(relation regclass, attnum smallint, owner oid) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._silence_problem(relation regclass, attnum smallint, owner oid) OWNER TO rekey_owner;

--
-- Name: FUNCTION _silence_problem(relation regclass, attnum smallint, owner oid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._silence_problem(relation regclass, attnum smallint, owner oid) IS 'Why a column cannot be swept without firing triggers (fire_triggers => false), by the owner of its table; NULL: it can.';


--
-- Name: _step_limit(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._step_limit() RETURNS interval
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._step_limit() OWNER TO rekey_owner;

--
-- Name: FUNCTION _step_limit(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._step_limit() IS 'Time after which a batch is cancelled; NULL before rekey.register_kek().';


--
-- Name: _steps_in_hand(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._steps_in_hand() RETURNS TABLE(pid integer, relation oid, since timestamp with time zone, hangs boolean, overdue boolean)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey._steps_in_hand() OWNER TO rekey_owner;

--
-- Name: FUNCTION _steps_in_hand(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._steps_in_hand() IS 'The sessions that have a batch in hand: in which relation, and since when. hangs: for a tenth of step_limit; overdue: for all of it.';


--
-- Name: _still_verifying(bigint[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._still_verifying(rotations bigint[]) RETURNS integer[]
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform from rekey.rotations r where r.id = any (rotations) order by r.id for no key update;
  return array(select r.keyring_id from rekey.rotations r where r.id = any (rotations) and r.state = 'verifying');
end
$$;


ALTER FUNCTION rekey._still_verifying(rotations bigint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _still_verifying(rotations bigint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._still_verifying(rotations bigint[]) IS 'Locks these rotations, and returns the keyrings of those that were not paused, superseded or rolled back.';


--
-- Name: _storage_problem(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._storage_problem(relation regclass) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._storage_problem(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _storage_problem(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._storage_problem(relation regclass) IS 'Why the rows of a table cannot be swept where they are: Citus, foreign, another access method than heap; NULL: they can.';


--
-- Name: _store_setting(text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._store_setting(name text, value text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
declare
  v_type regtype;
  v_old text;
  v_new text;
begin
  select a.atttypid into v_type
  from pg_attribute a
  where a.attrelid = 'rekey.settings'::regclass and a.attname = _store_setting.name and a.attnum > 0
    and not a.attisdropped and a.attname <> 'singleton';
  if not found then
    raise exception 'no such setting: %', coalesce(quote_literal(name), 'NULL') using errcode = 'invalid_parameter_value',
      hint = 'See rekey.setting_status for their names.', constraint = 'settings';
  end if;
  if _store_setting.name = 'tenant_check' and value is not null and (
       cardinality(parse_ident(value)) <> 2
       or not exists (select from pg_proc p where p.oid = to_regprocedure(value || '(uuid)') and p.prorettype = 'boolean'::regtype)) then
    raise exception 'there is no function %(uuid) returns boolean', value using errcode = 'invalid_parameter_value',
      hint = 'Give the name of a function (uuid) returns boolean, with its schema.';
  end if;
  perform rekey._ensure_rows();
  select to_jsonb(s) ->> _store_setting.name into v_old from rekey.settings s for update;
  begin
    if value is null then
      execute format('update rekey.settings set %I = default where singleton', _store_setting.name);
    else
      execute format('update rekey.settings set %I = $1::%s where singleton', _store_setting.name, v_type) using value;
    end if;
  exception when check_violation or data_exception then
    raise exception 'setting % cannot be %', name, quote_literal(value) using errcode = 'invalid_parameter_value',
      hint = (select col_description('rekey.settings'::regclass, a.attnum)
              from pg_attribute a where a.attrelid = 'rekey.settings'::regclass and a.attname = _store_setting.name);
  end;
  select to_jsonb(s) ->> _store_setting.name into v_new from rekey.settings s;
  if v_new is distinct from v_old then
    perform rekey._audit('setting.changed', details => jsonb_build_object('name', name, 'from', v_old, 'to', v_new));
  end if;
end
$_$;


ALTER FUNCTION rekey._store_setting(name text, value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _store_setting(name text, value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._store_setting(name text, value text) IS 'What rekey.set_setting() does with the rights of rekey_owner.';


--
-- Name: _sweep_batch(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_versions integer[];
  v_target rekey._target;
  v_state text;
  v_size double precision;
  v_pace real;
  v_first_block bigint;
  v_until_block bigint;
  v_max_rows integer;
  v_forced boolean;
  v_batch record;
  v_contexts bytea[];
  v_old bytea[];
  v_sealing rekey._sealing;
  v_adopted rekey._sealed;
  v_rows tid[];
  v_starts bytea[];
  v_made bytea[];
  v_made_keyrings integer[];
  v_locking timestamptz;
  v_locked double precision := 0;
  v_left tid[];
  v_failed_places integer[];
  v_done_keyrings integer[];
  v_done_rows bigint[];
  v_failed_keyrings integer[];
  v_failed_versions integer[];
  v_failed_keys text[];
  v_failed_problems text[];
  v_failed_codes text[];
  v_apart record;
  v_undone tid;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where not c.stuck and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.pass_id = c.pass_id and r.state = 'running'
                  and rekey._is_due(r.next_attempt_at)
                  and case c.kind when 'adopt' then r.formats = '{plaintext}' when 'sweep' then r.trigger <> 'adoption' end)
  order by c.attempts > 0, c.urgent desc, c.pass_id desc, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select w.rows, w.wait into v_max_rows, wait from rekey._throttle(v_chunk.batch_rows) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;

  select array_agg(r.id order by r.id), array_agg(r.keyring_id order by r.id), array_agg(r.to_version order by r.id), bool_or(r.forced)
  into v_ids, v_keyrings, v_versions, v_forced
  from rekey.rotations r
  left join rekey.protected_columns p on p.id = r.column_id
  where r.pass_id = v_chunk.pass_id and r.state = 'running' and rekey._is_due(r.next_attempt_at)
    and case v_chunk.kind when 'adopt' then p.label = v_chunk.target else r.trigger <> 'adoption' end;
  if v_ids is null then
    return;  -- paused or superseded since
  end if;
  v_size := rekey._batch_size(cardinality(v_ids));
  v_pace := v_chunk.pace;
  v_chunk := rekey._pace(v_chunk, who_else);
  if v_chunk.pace < 1 and v_pace = 1 then
    -- Its size is one for when nobody was seen.
    v_max_rows := greatest(v_max_rows / 2, 1);
    v_chunk.batch_rows := greatest(v_chunk.batch_rows / 2, 1);
  end if;
  perform rekey._take_in_hand(v_chunk.relation);
  v_first_block := rekey._block(v_chunk.first);
  v_until_block := least(v_first_block + v_chunk.batch_blocks, v_chunk.until_block);

  begin
    v_target := rekey._target_of(v_chunk);
    v_state := rekey._target_state(v_target.function_name);
    event := 'batch';
    keyring_count := cardinality(v_ids);
    rows := 0;
    if v_target.problem is not null then
      -- The verification will find its rows behind, once it can count them.
      delete from rekey._chunks c where c.id = v_chunk.id;
      detail := jsonb_build_object('target', v_chunk.target, 'blocked', v_target.problem);
      return;
    end if;
    -- Whoever reads a page first removes what an update left in it, and notes which transactions have ended. Here (swept_from) that goes
    -- into the log without an image of the page; after the next checkpoint, the verification would write one more.
    select b.* into v_batch from rekey._call_read(
      v_target.function_name, v_chunk.relation, v_chunk.first, format('(%s,0)', v_until_block)::tid,
      case when v_chunk.kind = 'sweep' then v_keyrings end, v_versions, v_max_rows, (2097152 * v_size)::bigint, v_chunk.swept_from) b;
    if v_batch.rows is not null then
      if v_chunk.kind = 'adopt' then
        v_contexts := array(
          select v_target.prefix || c.context from unnest(v_batch.contexts) with ordinality as c(context, place) order by c.place);
        v_sealing := rekey._sealing(v_keyrings[1]);
        v_adopted := rekey._adopt(v_batch.ciphertexts, v_contexts, v_sealing, '{plaintext}', v_forced);
        v_rows := v_batch.rows;
        v_made := v_adopted.ciphertexts;
        select array_agg(u.place), array_agg(u.problem) into v_failed_places, v_failed_problems
        from unnest(v_adopted.problems) with ordinality as u(problem, place) where u.problem is not null;
      else
        v_old := v_batch.ciphertexts;  -- of an adoption they are plain, and no parameters of statements
        select r.made_rows, r.starts, r.made, r.made_keyrings, r.failed_places, r.problems
        into v_rows, v_starts, v_made, v_made_keyrings, v_failed_places, v_failed_problems
        from rekey._reencrypt(v_batch.rows, v_old, v_target.prefix, v_batch.contexts) r;
      end if;
      v_locking := clock_timestamp();
      select a.* into v_apart from rekey._write_apart(v_target, v_chunk.relation, v_rows, v_starts, v_made, v_chunk.kind = 'adopt', v_batch.state) a;
      v_locked := extract(epoch from clock_timestamp() - v_locking);
      rows := cardinality(v_apart.written);
      v_undone := v_apart.undone;
      v_left := case when rows < cardinality(v_rows) then array(select unnest(v_rows) except select unnest(v_apart.written)) end;
      select array_agg(d.keyring_id), array_agg(d.rows) into v_done_keyrings, v_done_rows
      from (select coalesce(u.keyring_id, v_keyrings[1]) as keyring_id, count(*) as rows
            from unnest(v_rows, v_made_keyrings) as u(row, keyring_id)
            where v_left is null or u.row <> all (v_left)
            group by 1) d;
      if v_failed_places is not null or v_apart.refused <> '{}' then
        -- (Joined: to look a place up in an array of texts takes as long as the place is far.)
        select array_agg(case when v_chunk.kind = 'adopt' then v_keyrings[1] else f.keyring_id end order by f.place),
          array_agg(f.version order by f.place), array_agg(f.key order by f.place), array_agg(f.problem order by f.place), array_agg(f.code order by f.place)
        into v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems, v_failed_codes
        from (
          select u.place, u.key, coalesce(p.problem, a.problem) as problem, a.code,
            case when u.header is not null then rekey._int4(u.header, 3) end as keyring_id,
            case when u.header is not null then rekey._int4(u.header, 7) end as version
          from (
            select b.row, b.key, substr(o.ciphertext, 1, 11) as header, b.place
            from unnest(v_batch.rows, v_batch.keys) with ordinality as b(row, key, place)
            left join unnest(v_old) with ordinality as o(ciphertext, place) on o.place = b.place) u
          left join unnest(v_failed_places, v_failed_problems) as p(place, problem) on p.place = u.place
          left join unnest(v_apart.refused, v_apart.problems, v_apart.codes) as a(row, problem, code) on a.row = u.row
          where p.place is not null or a.row is not null) f;
      end if;
      if rekey._target_state(v_target.function_name) <> v_state or (rekey._target_of(v_chunk)).problem is not null then
        raise exception 'the protected column % was changed while its rows were swept', v_chunk.target using errcode = 'RK005',
          hint = 'See rekey.column_status.', constraint = 'columns';
      end if;
      perform rekey._note_batch(v_ids, v_done_keyrings, v_done_rows, v_chunk.target, v_chunk.relation,
        v_failed_keyrings, v_failed_versions, v_failed_keys, v_failed_problems,
        case when v_apart.codes <> '{}' then v_failed_codes end);
      perform rekey._note_passed(v_chunk, rows, cardinality(v_apart.refused));
    end if;
    perform rekey._note_pace(v_begin, rows);
    if v_chunk.pace = 1 and rekey._is_in_the_way() then
      v_chunk.pace := (rekey._settings()).min_pace;
      v_chunk.gives_way_to := 'sessions that wait for its locks';
    end if;
    if v_undone is null then
      perform rekey._advance(v_chunk, v_batch.next, v_until_block, extract(epoch from clock_timestamp() - v_begin),
        case when v_chunk.kind = 'sweep' then v_locked else 0 end, (4000 * v_size)::integer);
    else
      update rekey._chunks c set first = v_undone, swept_from = c.first, batch_rows = 32 where c.id = v_chunk.id;
    end if;
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('pass', v_chunk.pass_id, 'target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20],
      'failed', coalesce(cardinality(v_failed_keys), 0),
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, v_chunk.kind = 'adopt');
      perform rekey._note_trouble(v_chunk, v_error, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'relation', v_chunk.relation::oid::bigint, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;


ALTER FUNCTION rekey._sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) IS 'Sweeps one batch of one chunk, if there is one that no other worker has in hand.';


--
-- Name: _take_in_hand(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._take_in_hand(relation regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_oid bigint := relation::oid;
begin
  perform pg_advisory_xact_lock_shared(-1, (case when v_oid < 2147483648 then v_oid else v_oid - 4294967296 end)::integer);
  perform pg_advisory_xact_lock_shared(-2, (extract(epoch from clock_timestamp())::bigint - 1700000000)::integer);
end
$$;


ALTER FUNCTION rekey._take_in_hand(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _take_in_hand(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._take_in_hand(relation regclass) IS 'Shows until the end of the transaction that this session is at work in a relation, for rekey._steps_in_hand().';


--
-- Name: _target_of(rekey._chunks); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._target_of(chunk rekey._chunks) RETURNS rekey._target
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey._target_of(chunk rekey._chunks) OWNER TO rekey_owner;

--
-- Name: FUNCTION _target_of(chunk rekey._chunks); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._target_of(chunk rekey._chunks) IS 'The target of a chunk as it is now.';


--
-- Name: _targets(text, regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._targets(only_target text DEFAULT NULL::text, only_relation regclass DEFAULT NULL::regclass) RETURNS SETOF rekey._target
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_column rekey.protected_columns;
  v_target rekey._target;
  v_table regclass;
begin
  if only_target is null or only_target = 'rekey.secrets' then
    v_target := row('rekey.secrets', 'rekey.secrets'::regclass, 'rekey.secrets'::regclass, 'secrets', true, rekey._part('secret'), false, rekey._table_problem('rekey.secrets'));
    return next v_target;
  end if;
  for v_column in select * from rekey.protected_columns c where only_target is null or c.label = only_target order by c.id loop
    select s.relation into v_table from rekey._column_shape(v_column.id) s;
    v_target := row(v_column.label, v_table, v_table, 'column_' || v_column.id, false, rekey._part(v_column.label), v_column.is_text,
      rekey._column_problem(v_column, only_relation));
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


ALTER FUNCTION rekey._targets(only_target text, only_relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _targets(only_target text, only_relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._targets(only_target text, only_relation regclass) IS 'Every relation with row storage that holds envelopes. indexed: it has an index on the keyring, so that a few rows of many are found fast. prefix: the label of the context. problem: why it is blocked. only_relation: this one of a column.';


--
-- Name: _targets_now(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._targets_now(only_target text DEFAULT NULL::text) RETURNS rekey._target[]
    LANGUAGE sql STABLE
    -- in sql/code
;


ALTER FUNCTION rekey._targets_now(only_target text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _targets_now(only_target text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._targets_now(only_target text) IS 'The targets that are not blocked, by relation; only_target: those of this column.';


--
-- Name: _text_mark(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._text_mark(start text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_names constant text[] := '{
    envelope, pgp_sym, fernet, v1, better_auth, jwe, laravel, openssl, prisma, rails, transit, age, ansible_vault, sops,
    paseto, k8s, iron, ciphersweet, halite, plug, grafana, jenkins, magento, nextcloud, saltpack, armored, rails_message,
    adonis, iv_tag, aes_cbc, simple_encryptor, mongodb, calcom, json, encrypted, versioned}'::text[];
  v_groups text[] := regexp_match(start, $re$(?x)^(?:
      (rk1:).*
    | (-----BEGIN\ PGP\ MESSAGE-----).*
    | (gAAAAA.{94}).*
    | (v1:[A-Za-z0-9+/]{16,24}={0,2}:).*
    | (\$ba\$\d+\$[0-9a-f]).*
    | (eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]{16,22}\.).*
    | (\{"iv":"[^"]+","value":").*
    | (Salted__).*
    | (v\d\.aesgcm\d+\.[0-9a-f]{8}\.).*
    | (\{"p":"[^"]*","h":\{).*
    | (vault:v\d+:).*
    | (-----BEGIN\ AGE\ ENCRYPTED\ FILE-----|age-encryption\.org/v\d).*
    | (\$ANSIBLE_VAULT;).*
    | (ENC\[|EJ\[\d).*
    | (v\d\.local\.[A-Za-z0-9_-]{32}).*
    | (k8s:enc:).*
    | (Fe26\.\d\*).*
    | ((?:nacl|fips|brng):[A-Za-z0-9_-]{20}).*
    | (MUI[DEFG]A[A-Za-z0-9_-]{20}).*
    | ((?:QTEyOEdDTQ|QTE5MkdDTQ|QTI1NkdDTQ|WENQ)\.).*
    | ((?:\#[A-Za-z0-9+/=]{4,99}\#)?\*YWVzL).*
    | (\{AQAAAB[A-Za-z0-9+/=]{20}).*
    | (\d:\d:[A-Za-z0-9+/=]{20}).*
    | ([0-9a-f]{32,}\|[0-9a-zA-Z/+=]{16,}\|[0-9a-f]{64}).*
    | (BEGIN\ [A-Z0-9\ ]*SALTPACK\ ENCRYPTED).*
    | (-----BEGIN\ CMS-----|-----BEGIN\ (?:[A-Z0-9]+\ )*ENCRYPTED\ (?:MESSAGE|FILE|DATA|VALUE|TEXT)).*
    | ([A-Za-z0-9+/_=%-]*--[A-Za-z0-9+/_-]{16}--[A-Za-z0-9+/_-]{22}(?:==)?$).*
    | ([A-Za-z0-9_-]+\.(?:v\d+:[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{22}|[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43})$).*
    | ((?:[0-9a-fA-F]{24}|[0-9a-fA-F]{32}):(?:[0-9a-fA-F]{32}:[0-9a-fA-F]*|[0-9a-fA-F]*:[0-9a-fA-F]{32})$|(?:[A-Za-z0-9+/]{16}|[A-Za-z0-9+/]{22}==):(?:[A-Za-z0-9+/]{22}==:[A-Za-z0-9+/]*=*|[A-Za-z0-9+/]*=*:[A-Za-z0-9+/]{22}==)$).*
    | ([0-9a-fA-F]{32}:(?:[0-9a-fA-F]{32})+(?:[0-9a-fA-F]{31})?$).*  # 31: cut off at 1,024
    | ([0-9a-f]{96}(?:[0-9a-f]*[A-Zg-z+/][A-Za-z0-9+/]*)={0,2}$).*
    | (\{.*"\$binary".*"subType":\ *"0?6").*
    | (\{"v":1,"alg":"AES-256-GCM","ring":").*
    | (\{.*"(?:iv|nonce|salt|cipher|alg|algorithm|enc)":\ *".*"(?:ct|ciphertext|cipher_text|cipherText|encrypted_data|encryptedData|encrypted|content|data|tag|auth_tag|authTag)":\ *"[A-Za-z0-9+/_=-]{8}|\{.*"(?:c|ct|ciphertext|cipher_text|cipherText|encrypted_data|encryptedData|encrypted|content|data|tag|auth_tag|authTag)":\ *"[A-Za-z0-9+/_=-]{8}.*"(?:iv|nonce|cipher|salt)":\ *"|\{.*"k":\ *"ct").*
    | ([[<_$:{(]*(?:enc|ENC|encrypted|ENCRYPTED|crypt|cipher|CIPHER|ciphertext|aes|AES|aead|sealed|secretbox|sodium|libsodium|nacl|x?chacha20|gcm|kms|KMS|awskms|gcpkms|fernet|transit|pgp|gpg|tink|jwe|bao)(?:[0-9_/-][0-9A-Za-z_/-]*)?[]>}():;|$.,!]+(?:v?\d+[:.|$])?[A-Za-z0-9+/_=-]{16}|\{(?:des|3des|3DES|xor|wsenc)\}.{8}).*
    | (v\d+[:|$][A-Za-z0-9+/_=-]{16}).*)$re$);
begin
  return case when v_groups is not null then v_names[rekey._first_place(v_groups)] end;
end
$_$;


ALTER FUNCTION rekey._text_mark(start text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _text_mark(start text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._text_mark(start text) IS 'The mark that a text begins with, by name; NULL: none. start: its first characters, where other bytes stand as the encoding escape writes them.';


--
-- Name: _throttle(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._throttle(wanted integer, OUT rows integer, OUT wait interval) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rate integer := (rekey._settings()).max_rows_per_second;
  v_next timestamptz;
begin
  rows := wanted;
  if v_rate is null then
    return;
  end if;
  -- All workers share the throttle, one batch after the other.
  select w.next_batch_at into v_next from rekey._worker w for update;
  -- (A time further ahead was noted by a clock that was wrong.)
  if v_next between clock_timestamp() and clock_timestamp() + interval '1 minute' then
    rows := null;
    wait := least(v_next - clock_timestamp(), interval '1 second');
    return;
  end if;
  rows := least(wanted, greatest(v_rate / 20, 1));
end
$$;


ALTER FUNCTION rekey._throttle(wanted integer, OUT rows integer, OUT wait interval) OWNER TO rekey_owner;

--
-- Name: FUNCTION _throttle(wanted integer, OUT rows integer, OUT wait interval); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._throttle(wanted integer, OUT rows integer, OUT wait interval) IS 'How many rows a batch may have now, of those wanted; NULL: none yet, for as long as wait.';


--
-- Name: _through_postgrest(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._through_postgrest() RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._through_postgrest() OWNER TO rekey_owner;

--
-- Name: FUNCTION _through_postgrest(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._through_postgrest() IS 'Whether PostgREST calls: it says with which HTTP method.';


--
-- Name: _tick_duty(text, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._tick_duty(duty text, begun timestamp with time zone) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_worker rekey._worker;
  v_next text;
begin
  -- Before the block that notes errors: what is made up here is nobody's entry.
  if duty is null or duty not in ('schedules', 'destructions', 'census', 'end', 'notifications') then
    raise exception 'there is no such duty' using errcode = 'invalid_parameter_value', hint = 'schedules, destructions, census, end or notifications.';
  end if;
  if coalesce(not isfinite(begun) or begun > clock_timestamp(), true) then
    raise exception 'a tick cannot have begun then' using errcode = 'invalid_parameter_value', hint = 'Give a time that has been.';
  end if;
  perform rekey._refuse_snapshot();
  perform rekey._refuse_hidden();
  select * into v_worker from rekey._worker;
  if not found then
    return null;  -- not set up yet
  end if;
  begin
    case duty
      when 'schedules' then perform rekey._rotate_due();
      when 'destructions' then v_next := rekey._destruction_step(coalesce(now() - v_worker.last_tick_at > interval '1 day', true));
      when 'census' then
        if coalesce(v_worker.last_census_at not between now() - interval '1 day' and now(), true) then
          -- Whoever asks whether a worker is at work sees it by that (75_notify.sql): it may take an hour.
          perform pg_advisory_xact_lock_shared(0, 6);
          perform rekey._census();
        end if;
      when 'end' then
        update rekey._worker w set last_tick_at = clock_timestamp(), last_tick_seconds = extract(epoch from clock_timestamp() - begun),
          last_error = case when w.last_error_at >= begun then w.last_error end
        where w.singleton;
      when 'notifications' then v_next := rekey._collect_notifications();
    end case;
    if duty = 'schedules' and (v_worker.locked_since is not null
        or exists (select from rekey.rotations r where r.state in ('queued', 'running', 'verifying'))) then
      perform from rekey._kek();
      update rekey._worker w set locked_since = null where w.locked_since is not null;
    end if;
  exception
    when sqlstate 'RK001' or sqlstate 'RK002' then
      -- Noted once: whoever has the KEK, the orchestrator's worker for one, will do it.
      if v_worker.locked_since is null then
        update rekey._worker w set locked_since = now() where w.singleton;
      end if;
      -- Once a day at most, also where pg_cron has no KEK and a worker beside it has.
      if coalesce(v_worker.locked_noted_at not between now() - interval '1 day' and now(), true) then
        update rekey._worker w set locked_noted_at = now() where w.singleton;
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
    when others then
      update rekey._worker w set last_error = format('%s: %s', duty, sqlerrm), last_error_at = clock_timestamp()
      where w.singleton;
      -- Whoever may run the worker can make a duty fail, with a lock_timeout for one, and end a tick in between.
      if v_worker.last_error is distinct from format('%s: %s', duty, sqlerrm) and not exists (
          select from rekey.audit_log a
          where a.event = 'rotation.error' and a.at between clock_timestamp() - interval '1 minute' and clock_timestamp()
            and a.details ->> 'duty' = _tick_duty.duty and a.details ->> 'sqlstate' = sqlstate) then
        perform rekey._audit('rotation.error', details => jsonb_build_object('duty', duty, 'sqlstate', sqlstate, 'error', sqlerrm));
      end if;
      v_next := null;
  end;
  return v_next;
end
$$;


ALTER FUNCTION rekey._tick_duty(duty text, begun timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _tick_duty(duty text, begun timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._tick_duty(duty text, begun timestamp with time zone) IS 'One duty of rekey.tick(): schedules, destructions (of which one step: search, more, NULL: as rekey._destruction_step()), census, end, notifications (deliver: there are some to be delivered; NULL: none). An error leaves its entry in the audit log, one while it lasts and one a minute at most, and does not stop the others. 22023 for an unknown duty, or where begun is no time that has been; RK005: a table of ours may hide rows.';


--
-- Name: _to_look(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._to_look(search_id bigint) RETURNS TABLE(relation oid, name text, bytes bigint, filenode oid, is_heap boolean, statement text, since xid, problem text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  return query
    select t.relation, t.name, t.bytes, t.filenode, t.is_heap, t.statement, case when r.filenode = t.filenode and r.statement = t.statement
      and pg_snapshot_xmax(pg_current_snapshot())::text::bigint - r.since::text::bigint < 1000000000 then r.since::xid end, t.problem
    from rekey._searchable() t
    left join rekey._search_relations r on r.search_id = _to_look.search_id and r.relation = t.relation and r.state <> 'pending'
    order by t.relation;
end
$$;


ALTER FUNCTION rekey._to_look(search_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _to_look(search_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._to_look(search_id bigint) IS 'What the look of a search has to read: the rows that this transaction or a later one wrote; NULL: all.';


--
-- Name: _to_text(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._to_text(envelope bytea) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._to_text(envelope bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _to_text(envelope bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._to_text(envelope bytea) IS 'The text form of an envelope.';


--
-- Name: _told_events(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._told_events() RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._told_events() OWNER TO rekey_owner;

--
-- Name: FUNCTION _told_events(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._told_events() IS 'What endpoints can be told of.';


--
-- Name: _transactions(timestamp with time zone, bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rate double precision;
begin
  select clock_timestamp(), sum(pg_stat_get_db_xact_commit(d.oid) + pg_stat_get_db_xact_rollback(d.oid))::bigint into looked, counted from pg_database d;
  v_rate := (counted - transactions) / extract(epoch from looked - looked_at);
  -- Workers, and who watches them, have some themselves.
  told := case when v_rate > 50 then format('%s transactions a second', round(v_rate::numeric)) end;
end
$$;


ALTER FUNCTION rekey._transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint) IS 'Whether others use this server: how many transactions it has had in all databases, and in words how many a second, where there are more than 50. looked_at, transactions: when they were counted before, and what was counted then.';


--
-- Name: _trigger_names(rekey.protected_columns); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._trigger_names(protected rekey.protected_columns) RETURNS text[]
    LANGUAGE sql IMMUTABLE
    -- in sql/code
;


ALTER FUNCTION rekey._trigger_names(protected rekey.protected_columns) OWNER TO rekey_owner;

--
-- Name: FUNCTION _trigger_names(protected rekey.protected_columns); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._trigger_names(protected rekey.protected_columns) IS 'The triggers of a protected column: those that keep envelopes of versions out that are about to be destroyed, and the one that encrypts.';


--
-- Name: _trigger_problem(rekey.protected_columns, oid[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET enable_seqscan TO 'off'
    AS $_$
declare
  v_names name[] := rekey._trigger_names(protected);
  v_functions oid[] := array(
    select case when n.name ~ '_(insert|update)$' then to_regproc('rekey._refuse_doomed') else to_regproc(format('rekey_targets.column_%s_trigger', protected.id)) end
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
$_$;


ALTER FUNCTION rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _trigger_problem(protected rekey.protected_columns, relations oid[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) IS 'Which trigger of a protected column does not fire, on which of these relations; NULL: all do.';


--
-- Name: _trigger_statement(integer, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._trigger_statement(id integer, body text) RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._trigger_statement(id integer, body text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _trigger_statement(id integer, body text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._trigger_statement(id integer, body text) IS 'The statement that makes the trigger function of a protected column.';


--
-- Name: _trusted_function(name, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._trusted_function(extension name, signature text) RETURNS regprocedure
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_function regprocedure := to_regprocedure(signature);
begin
  return case when rekey._is_trusted(extension, 'pg_proc', v_function) then v_function end;
end
$$;


ALTER FUNCTION rekey._trusted_function(extension name, signature text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _trusted_function(extension name, signature text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._trusted_function(extension name, signature text) IS 'The function of this signature, where it is the extension''s; NULL: there is none.';


--
-- Name: _trusted_relation(name, name, name, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer DEFAULT 0) RETURNS regclass
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_relation regclass;
  v_locked regclass;
begin
  -- Its lock keeps the extension, and so every name of it, as it is until the transaction ends: looked at, locked, looked at again.
  loop
    select c.oid into v_relation
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = schema and c.relname = name and c.relkind in ('r', 'v') and rekey._is_trusted(extension, 'pg_class', c.oid)
      -- Whoever has the privilege TRIGGER on a table can have his code run by who writes into it.
      and not exists (
        select from pg_trigger t join pg_proc p on p.oid = t.tgfoid
        where t.tgrelid = c.oid and not t.tgisinternal and t.tgtype::integer & events <> 0
          and not rekey._is_trusted(extension, 'pg_proc', p.oid) and not (select r.rolsuper from pg_roles r where r.oid = p.proowner));
    exit when v_relation is null or v_relation = v_locked;
    execute format('lock table %s in access share mode', v_relation);
    v_locked := v_relation;
  end loop;
  return v_relation;
end
$$;


ALTER FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _trusted_relation(extension name, schema name, name name, events integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer) IS 'A table or view, locked until the transaction ends, where it is the extension''s; NULL: there is none. events: no trigger of others may fire on these (4 INSERT, 8 DELETE, 16 UPDATE; bits of pg_trigger.tgtype). 42501: the caller may not read it.';


--
-- Name: _unlock(bytea, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_first text;
  v_second text;
  v_active text;
  v_seal bytea;
  v_iv bytea;
  v_aad bytea;
  v_sealed bytea;
  v_set text;
begin
  if scope is null or scope not in ('transaction', 'session', 'replacement') then
    problem := 'scope';
    return;
  end if;
  if coalesce(octet_length(kek), 0) not in (32, 64) then
    problem := 'length';
    return;
  end if;
  v_first := rekey._fingerprint(substr(kek, 1, 32));
  if octet_length(kek) = 64 then
    v_second := rekey._fingerprint(substr(kek, 33, 32));
  end if;
  select k.fingerprint into v_active from rekey.keks k where k.state = 'active';
  if v_active not in (v_first, coalesce(v_second, v_first)) and scope <> 'replacement' then
    problem := v_active;
    return;
  end if;
  v_seal := rekey._session_seal();
  v_iv := rekey._random_bytes(16);
  v_aad := rekey._session_aad(left(scope, 1));
  v_sealed := rekey._aead_encrypt(v_seal, v_iv, kek, v_aad);
  -- Not PERFORM, which auto_explain and pgaudit would print with its arguments.
  v_set := set_config('rekey.unlocked', left(scope, 1) || encode(v_iv || v_sealed, 'hex'), scope <> 'session');
  fingerprint := case when v_second = v_active and v_set <> '' then v_second else v_first end;
end
$$;


ALTER FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) IS 'What rekey.unlock() does; problem: scope, length, or the fingerprint of the KEK that is active.';


--
-- Name: _unsettled(integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._unsettled(id integer) RETURNS TABLE(relation regclass, column_name name)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey._unsettled(id integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _unsettled(id integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._unsettled(id integer) IS 'The columns that may hold values of a protected column beside it: those that have its name, and those of relations that were parts of its table.';


--
-- Name: _due; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._due (
    pass_id bigint NOT NULL,
    kind text NOT NULL,
    target text NOT NULL,
    relation regclass NOT NULL,
    rotations bigint[] NOT NULL,
    passed boolean DEFAULT false NOT NULL,
    refused integer DEFAULT 0 NOT NULL
);


ALTER TABLE rekey._due OWNER TO rekey_owner;

--
-- Name: TABLE _due; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._due IS 'Relations of a pass: the rotations that had rows to do there when it began, whether one row went through since, and how many were refused.';


--
-- Name: _unswept(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._unswept(pass_id bigint) RETURNS TABLE(rotation_id bigint, stuck boolean, last_error text)
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._unswept(pass_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _unswept(pass_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._unswept(pass_id bigint) IS 'The rotations that a pass has chunks left for; stuck: none of them is tried any more.';


--
-- Name: _unwrap(bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) IS 'The DEK of a wrapped key; NULL where it does not open. aad: rekey._wrap_aad().';


--
-- Name: _unwrapped(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._unwrapped(value bytea) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_bare bytea := btrim(value, '\x00090a0d20');
  v_first bytea := substr(v_bare, 1, 1);
begin
  -- "...", '...', and b'...', Python's str() of bytes.
  if v_first = '\x62' and substr(v_bare, 2, 1) in ('\x22', '\x27') then
    v_bare := substr(v_bare, 2);
    v_first := substr(v_bare, 1, 1);
  end if;
  if v_first in ('\x22', '\x27') and octet_length(v_bare) > 2 and substr(v_bare, octet_length(v_bare)) = v_first then
    v_bare := substr(v_bare, 2, octet_length(v_bare) - 2);
  end if;
  return case
    when v_bare <> value then v_bare
    when encode(substr(value, 1, 24), 'escape') ~ '^(\\\\x)?[A-Za-z0-9+/_-]{16}' then rekey._decoded(encode(value, 'escape')) end;
end
$$;


ALTER FUNCTION rekey._unwrapped(value bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _unwrapped(value bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._unwrapped(value bytea) IS 'A value without the outermost layer around it: white space, quotes, hexadecimal, base64. NULL: there is none.';


--
-- Name: _verify(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_ids bigint[];
  v_keyrings integer[];
  v_verification bigint;
  v_locked rekey._locked;
  v_results jsonb;
  v_found record;
  v_count record;
  v_error record;
  v_live integer[];
  v_targets text[];
  v_places oid[];
  v_of integer[];
  v_versions integer[];
  v_rows bigint[];
  v_failed_rows bigint[];
  v_refused_rows bigint[];
  v_errors jsonb := '[]'::jsonb;
  v_held jsonb;
  v_held_ids bigint[] := '{}'::bigint[];
  v_failed bigint;
  v_completed bigint[] := '{}'::bigint[];
  v_blocked jsonb;
  v_refused jsonb;
  v_adoptions jsonb;
  v_seen jsonb;
  v_emptied jsonb;
begin
  -- Those that begin a verification together, else those of one whose chunks are done.
  select array_agg(r.id), array_agg(r.keyring_id), r.verification_id into v_ids, v_keyrings, v_verification
  from rekey.rotations r
  where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
    and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')
  group by r.verification_id
  order by r.verification_id nulls first
  limit 1;
  if v_ids is null then
    return;
  end if;
  rows := 0;
  v_blocked := rekey._hold_blocked(v_ids);
  if v_blocked is not null then
    select array_agg(r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
    from rekey.rotations r where r.id = any (v_ids) and r.state = 'verifying' and rekey._is_due(r.next_attempt_at);
    if v_ids is null then
      event := 'blocked';
      keyring_count := 0;
      detail := jsonb_build_object('targets', v_blocked);
      return;
    end if;
  end if;
  begin
    v_locked := rekey._lock_targets(apart => true);
    if v_verification is null then
      v_verification := rekey._begin_verification(v_ids, v_keyrings, v_locked.targets);
      if exists (select from rekey._chunks c where c.pass_id = v_verification) then
        event := 'planned';
        keyring_count := cardinality(v_ids);
        detail := jsonb_build_object('verification', v_verification, 'rotations', v_ids[1:20]);
        return;
      end if;
    end if;
    for v_count in select c.* from rekey._count(v_keyrings, true, v_verification, apart => true, locked => v_locked) c loop
      -- Everything is counted by now, and the names of what failed are noted as they come: they may be too many for one value.
      if v_live is null then
        v_live := rekey._still_verifying(v_ids);
      end if;
      if v_count.error is not null then
        v_errors := v_errors || jsonb_build_object('target', v_count.target, 'relation', v_count.relation::oid, 'error', v_count.error, 'sqlstate', v_count.code);
        continue;
      end if;
      v_places := v_places || v_count.relation::oid;
      v_targets := v_targets || v_count.target;
      v_of := v_of || v_count.keyring_id;
      v_versions := v_versions || v_count.version;
      v_rows := v_rows || v_count.rows;
      v_failed_rows := v_failed_rows || v_count.failed;
      v_refused_rows := v_refused_rows || v_count.refused;
      if v_count.failed > 0 and v_count.keyring_id = any (v_live) then
        perform rekey._quarantine(v_count.target, v_count.relation, array_fill(v_count.keyring_id, array[cardinality(v_count.failed_keys)]),
          array_fill(v_count.version, array[cardinality(v_count.failed_keys)]), v_count.failed_keys, v_count.failed_problems,
          verification_id => v_verification);
      -- (After a rollback, what was refused may stand where it is to be.)
      elsif v_count.refused > 0
        and not exists (select from rekey.rotations r where r.id = any (v_ids) and (r.keyring_id, r.to_version) = (v_count.keyring_id, v_count.version)) then
        update rekey.rotation_failures q set verification_id = v_verification
        from unnest(v_count.failed_keys) as k(row_key)
        where q.keyring_id = v_count.keyring_id and q.target = v_count.target and q.relation = v_count.relation::text
          and q.row_hash = rekey._row_hash(k.row_key) and q.resolved_at is null;
      end if;
    end loop;
    with counted as (
      select u.* from unnest(v_targets, v_places, v_of, v_versions, v_rows, v_failed_rows, v_refused_rows)
        as u(target, relation, keyring_id, version, rows, failed, refused)
    ), summed as (
      select c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed - c.refused) filter (where c.version <> r.to_version) as behind
      from counted c
      join rekey.rotations r on r.keyring_id = c.keyring_id and r.id = any (v_ids)
      group by c.keyring_id
    ), held as (
      -- Whose rows are in what raised: as it counted them, or, where it did not count, as far as is known.
      select distinct on (r.id) r.id, e.error, e.sqlstate, e.target, e.relation
      from jsonb_to_recordset(v_errors) as e(target text, relation oid, error text, sqlstate text)
      left join rekey.protected_columns p on p.label = e.target
      join rekey.rotations r on r.id = any (v_ids)
        and case when exists (select from counted c where c.relation = e.relation and c.target = e.target)
                 then exists (select from counted c where c.relation = e.relation and c.target = e.target and c.keyring_id = r.keyring_id)
                 else p.id is null or rekey._may_hold(p, array[r.keyring_id]) end
      order by r.id, e.target, e.relation
    )
    select (select jsonb_agg(to_jsonb(s)) from summed s), (select coalesce(jsonb_agg(to_jsonb(h)), '[]') from held h),
      (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
        select c.target, c.keyring_id, sum(c.rows) as rows, sum(c.rows - c.failed) as opened from counted c group by c.target, c.keyring_id) t)
    into v_results, v_held, v_seen;
    v_emptied := rekey._emptied(v_seen, v_keyrings);
    -- Of an adoption, what is no envelope yet is behind, but for rows that were refused. (They are locked: so what is counted after
    -- them has them in it.)
    select jsonb_object_agg(r.id, rekey._refused_plain(p.label, r.id)) into v_refused
    from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
    where r.id = any (v_ids) and r.trigger = 'adoption';
    select jsonb_agg(to_jsonb(a)) into v_adoptions
    from (
      select r.id as rotation_id, p.label, (v_refused ->> r.id::text)::bigint as refused,
        (select sum(c.rows) from rekey._count_rows(rekey._targets_now(p.label), null) c where c.keyring_id is null) as rows
      from rekey.rotations r join rekey.protected_columns p on p.id = r.column_id
      where r.id = any (v_ids) and r.trigger = 'adoption') a;

    if v_live is null then
      v_live := rekey._still_verifying(v_ids);
    end if;
    for v_error in
      select h.error, h.sqlstate, h.target, h.relation, array_agg(h.id) as ids
      from jsonb_to_recordset(v_held) as h(id bigint, error text, sqlstate text, target text, relation oid) group by 1, 2, 3, 4
    loop
      perform rekey._record_error(v_error.ids, v_error.error, v_error.sqlstate, v_error.target, v_error.relation::regclass);
      v_held_ids := v_held_ids || v_error.ids;
    end loop;
    for v_found in
      select r.id, r.keyring_id, r.passes, coalesce(s.rows, 0) as rows, a.label as adopted,
        case when r.trigger <> 'adoption' then coalesce(s.behind, 0)
             else coalesce(a.rows, 0) - coalesce(a.refused, 0) end as behind,
        coalesce(a.rows, 0) = 0 as adopted_all
      from rekey.rotations r
      left join jsonb_to_recordset(v_results) as s(keyring_id integer, rows bigint, behind bigint) on s.keyring_id = r.keyring_id
      left join jsonb_to_recordset(v_adoptions) as a(rotation_id bigint, label text, rows bigint, refused bigint) on a.rotation_id = r.id
      where r.id = any (v_ids) and r.id <> all (v_held_ids) and r.state = 'verifying'  -- not paused, superseded or rolled back meanwhile
      order by r.id
    loop
      rows := rows + v_found.rows;
      if v_emptied ? v_found.keyring_id::text then
        update rekey.rotations r
        set blocked_by = v_emptied -> v_found.keyring_id::text, blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = clock_timestamp() + interval '10 seconds'
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotation_failures q set resolved_at = now(), resolution = 'cleared'
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.verification_id is distinct from v_verification
        and (q.version is not null or q.target = v_found.adopted and v_found.adopted_all);
      update rekey.rotation_failures q set rotation_id = v_found.id
      where q.keyring_id = v_found.keyring_id and q.resolved_at is null and q.rotation_id is distinct from v_found.id and q.verification_id = v_verification;
      select count(*) into v_failed from rekey.rotation_failures q
      where q.keyring_id = v_found.keyring_id and q.rotation_id = v_found.id and q.resolved_at is null;
      if v_found.behind > 0 then
        update rekey.rotations r
        set state = 'running', rows_failed = v_failed,
            blocked_by = jsonb_build_array(jsonb_build_object('rows', v_found.behind, 'why', 'locked or moved')),
            blocked_since = coalesce(r.blocked_since, now()),
            next_attempt_at = case when v_found.passes > 1 then
              clock_timestamp() + least(power(2, v_found.passes - 2), 30) * interval '1 second' end
        where r.id = v_found.id;
        continue;
      end if;
      update rekey.rotations r
      set state = case when v_failed > 0 then 'completed_with_failures' else 'completed' end, rows_failed = v_failed,
          rows_total = r.rows_done + v_failed,  -- what was written or deleted meanwhile needed no sweep
          blocked_by = null, blocked_since = null, next_attempt_at = null, verification_id = null, finished_at = clock_timestamp()
      where r.id = v_found.id;
      v_completed := v_completed || v_found.id;
    end loop;
    perform rekey._note_seen(v_seen, array(select r.keyring_id from rekey.rotations r where r.id = any (v_completed)));
    perform rekey._clear_chunks();
    perform rekey._audit_all(coalesce((
      select jsonb_agg(jsonb_build_object('event', 'rotation.completed', 'keyring', k.name, 'version', r.to_version, 'rotation_id', r.id,
        'details', jsonb_build_object('state', r.state, 'rows', r.rows_done, 'failures', r.rows_failed)) order by r.id)
      from rekey.rotations r join rekey.keyrings k on k.id = r.keyring_id
      where r.id = any (v_completed)), '[]'));
    event := case when v_completed <> '{}' then 'completed' when v_held_ids @> v_ids then 'error' else 'verified' end;
    keyring_count := cardinality(v_ids);
    detail := jsonb_strip_nulls(jsonb_build_object('rotations', v_ids[1:20], 'completed', v_completed[1:20], 'errors', nullif(v_errors, '[]')));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      perform rekey._record_error(v_ids, sqlerrm, sqlstate);
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      detail := jsonb_build_object('rotations', v_ids[1:20], 'error', sqlerrm, 'sqlstate', sqlstate);
  end;
end
$$;


ALTER FUNCTION rekey._verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb) IS 'Begins the verification of rotations that passed the barrier; or ends one: opens what was not checked yet, and completes the rotations that have no row left on an older version.';


--
-- Name: _verify_batch(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_prepared text[] := rekey._prepared();
  v_context text;
  v_begin timestamptz := clock_timestamp();
  v_settings rekey.settings := rekey._settings();
  v_size double precision;
  v_max_rows integer;
  v_chunk rekey._chunks;
  v_ids bigint[];
  v_keyrings integer[];
  v_target rekey._target;
  v_until bigint;
  v_found record;
  v_refused boolean;
  v_error text;
begin
  select c.* into v_chunk from rekey._chunks c
  where c.kind = 'verify' and rekey._is_due(c.next_attempt_at)
    and exists (select from rekey.rotations r where r.verification_id = c.pass_id and r.state = 'verifying' and rekey._is_due(r.next_attempt_at))
  order by c.attempts > 0, c.id
  limit 1 for update of c skip locked;
  if not found then
    return;
  end if;
  select rekey._batch_size(count(*)::integer) into v_size from rekey.rotations r where r.verification_id = v_chunk.pass_id;
  -- To check four rows costs about what it costs to re-encrypt one.
  select 4 * w.rows, w.wait into v_max_rows, wait from rekey._throttle((1000 * v_size)::integer) w;
  if v_max_rows is null then
    event := 'waiting';
    keyring_count := 0;
    return;
  end if;
  -- All of them: who leaves a verification does not come back to it.
  select array_agg(r.id order by r.id), array_agg(r.keyring_id) into v_ids, v_keyrings
  from rekey.rotations r where r.verification_id = v_chunk.pass_id and r.state = 'verifying';
  if v_ids is null then
    return;
  end if;
  v_chunk := rekey._pace(v_chunk, who_else);
  perform rekey._take_in_hand(v_chunk.relation);
  begin
    event := 'checked';
    keyring_count := cardinality(v_ids);
    rows := 0;
    v_target := rekey._target_of(v_chunk);
    if v_target.problem is null then
      -- Reads nothing, but locks the table, so that what is found out about it remains true.
      perform from rekey._count_rows(array[v_target], '{}');
      v_target := rekey._target_of(v_chunk);
    end if;
    if v_target.problem is not null or rekey._checked_since(v_chunk.pass_id, v_target) is null then
      update rekey._chunks c set kind = 'doubtful' where c.id = v_chunk.id;
      return;
    end if;
    v_refused := exists (select from rekey.rotation_failures q where q.target = v_chunk.target and q.resolved_at is null and q.sqlstate is not null);
    loop
      v_until := least(rekey._block(v_chunk.first) + v_chunk.batch_blocks, v_chunk.until_block);
      select s.* into v_found from rekey._call_scan(v_target.function_name, v_chunk.relation, v_chunk.first,
        format('(%s,0)', v_until)::tid, v_keyrings, null, v_max_rows, (2097152 * v_size)::bigint) s;
      rows := rows + coalesce(cardinality(v_found.rows), 0);
      if exists (select from rekey._check(v_found.ciphertexts, v_target.prefix, v_found.contexts))
         or v_refused and exists (select from rekey._refused_rows(v_chunk.target, v_chunk.relation, v_found.ciphertexts, v_found.keys)) then
        insert into rekey._chunks (pass_id, urgent, kind, target, relation, first, until_block, batch_blocks)
        values (v_chunk.pass_id, false, 'doubtful', v_chunk.target, v_chunk.relation, v_chunk.first,
          coalesce(rekey._block(v_found.next) + 1, v_until), v_chunk.batch_blocks);
      end if;
      v_chunk.first := coalesce(rekey._next_row(v_found.next), format('(%s,0)', v_until)::tid);
      if rekey._block(v_chunk.first) >= v_chunk.until_block then
        perform rekey._pass_on(v_chunk);
        exit;
      elsif v_settings.max_rows_per_second is not null or clock_timestamp() - v_begin >= v_settings.batch_target then
        update rekey._chunks c
        set first = v_chunk.first, attempts = 0, next_attempt_at = null,
            pace = v_chunk.pace, gives_way_to = v_chunk.gives_way_to, looked_at = v_chunk.looked_at, transactions = v_chunk.transactions
        where c.id = v_chunk.id;
        exit;
      end if;
    end loop;
    perform rekey._note_pace(v_begin, rows / 4);
    wait := rekey._wait_out(v_chunk.pace, extract(epoch from clock_timestamp() - v_begin));
    detail := jsonb_build_object('verification', v_chunk.pass_id, 'target', v_chunk.target, 'rotations', v_ids[1:20],
      'seconds', round(extract(epoch from clock_timestamp() - v_begin), 4));
  exception
    when query_canceled or assert_failure or others then
      get stacked diagnostics v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      -- Not what the code of a table calls so.
      if sqlstate in ('RK001', 'RK002') and v_context !~ '\mrekey"?\."?_call_' then
        raise;
      end if;
      v_error := rekey._explain_error(v_chunk.target, v_chunk.relation, sqlerrm, sqlstate, v_context, true);
      -- Whom it concerns is found out by the last step, which opens these rows, and waits for nobody else's.
      update rekey._chunks c
      set attempts = c.attempts + 1, last_error = v_error, next_attempt_at = clock_timestamp() + least(power(2, c.attempts), 300) * interval '1 second',
          kind = case when not rekey._is_passing(sqlstate) or c.attempts >= 2 then 'doubtful' else c.kind end
      where c.id = v_chunk.id;
      event := case when sqlstate = '57014' then 'canceled' else 'error' end;
      rows := 0;
      detail := jsonb_build_object('target', v_chunk.target, 'rotations', v_ids[1:20], 'error', v_error, 'sqlstate', sqlstate);
  end;
end
$$;


ALTER FUNCTION rekey._verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION _verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) IS 'Checks some rows of one chunk of a verification, if there is one that no other worker has in hand. Where one does not open, the relation is not as the verification found it, or an error comes again, it leaves them to the last step.';


--
-- Name: _view_columns(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._view_columns(target regclass) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
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
$_$;


ALTER FUNCTION rekey._view_columns(target regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION _view_columns(target regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._view_columns(target regclass) IS 'The columns of a table as its decrypted view has them.';


--
-- Name: _wait_out(real, double precision); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._wait_out(pace real, seconds double precision) RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._wait_out(pace real, seconds double precision) OWNER TO rekey_owner;

--
-- Name: FUNCTION _wait_out(pace real, seconds double precision); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._wait_out(pace real, seconds double precision) IS 'How long a worker pauses after a batch of so many seconds; NULL: not at all.';


--
-- Name: _waited_for(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._waited_for(code text) RETURNS interval
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._waited_for(code text) OWNER TO rekey_owner;

--
-- Name: FUNCTION _waited_for(code text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._waited_for(code text) IS 'After which pause to try again what an error with this SQLSTATE stopped, without counting an attempt; NULL: it counts.';


--
-- Name: _with_ages(jsonb, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) RETURNS jsonb
    LANGUAGE sql
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION _with_ages(blockers jsonb, since timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) IS 'Blockers, noted since then, with the age in seconds of their transactions; without it where the caller may not see it.';


--
-- Name: _wrap(bytea, bytea, bytea, bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) IS 'A DEK sealed under the wrapping key of a KEK; aad: rekey._wrap_aad().';


--
-- Name: _wrap_aad(integer, integer, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) RETURNS bytea
    LANGUAGE sql STABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION _wrap_aad(kek_id integer, keyring_id integer, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) IS 'What a wrapped DEK is bound to.';


--
-- Name: _wrapping_key(bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._wrapping_key(kek bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- in sql/code
;


ALTER FUNCTION rekey._wrapping_key(kek bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION _wrapping_key(kek bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._wrapping_key(kek bytea) IS 'The 64-byte AEAD key that wraps DEKs, derived from a KEK.';


--
-- Name: _write_apart(rekey._target, regclass, tid[], bytea[], bytea[], boolean, text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_prepared text[] := rekey._prepared();
  v_begin timestamptz := clock_timestamp();
  v_limit interval := greatest(5 * (rekey._settings()).batch_target, interval '1 second');
  v_tries integer := 0;
  v_rows tid[] := rows;
  v_starts bytea[] := starts;
  v_ciphertexts bytea[] := ciphertexts;
  -- What is still to be written, the first at the end.
  v_from integer[] := array[1];
  v_until integer[];
  v_top integer;
  v_low integer;
  v_high integer;
  v_ordered bytea[];
  v_locked tid[];
  v_message text;
  v_code text;
  v_context text;
begin
  if array_position(ciphertexts, null) is not null then
    select array_agg(u.row), array_agg(u.ciphertext) into v_rows, v_ciphertexts
    from unnest(rows, ciphertexts) as u(row, ciphertext) where u.ciphertext is not null;
  end if;
  v_until := array[cardinality(v_rows)];
  v_top := case when v_rows is null then 0 else 1 end;
  written := '{}';
  refused := '{}';
  problems := '{}';
  codes := '{}';
  while v_top > 0 loop
    v_low := v_from[v_top];
    v_high := v_until[v_top];
    if v_tries >= 60 or v_tries > 1 and clock_timestamp() - v_begin > v_limit then
      undone := v_rows[v_low];
      return;
    end if;
    v_tries := v_tries + 1;
    v_top := v_top - 1;
    begin
      if v_tries = 1 then
        v_locked := (rekey._write_rows(target, relation, v_rows, v_starts, v_ciphertexts, state)).locked;
      else
        v_locked := (rekey._write_rows(target, relation, v_rows[v_low:v_high], v_starts[v_low:v_high], v_ciphertexts[v_low:v_high], state)).locked;
      end if;
      written := written || v_locked;
      continue;
    exception when assert_failure or others then
      get stacked diagnostics v_message = message_text, v_code = returned_sqlstate, v_context = pg_exception_context;
      perform rekey._forget_prepared(v_prepared);
      if rekey._is_passing(v_code) or v_context ~ '^PL/pgSQL function "?rekey"?\."?_call_write' then
        raise;
      end if;
    end;
    if v_tries = 1 then
      select array_agg(u.row order by u.row), array_agg(u.start order by u.row), array_agg(u.ciphertext order by u.row)
      into v_rows, v_ordered, v_ciphertexts
      from unnest(v_rows, v_starts, v_ciphertexts) as u(row, start, ciphertext);
      v_starts := case when v_starts is not null then v_ordered end;
    end if;
    if v_low = v_high then
      refused := refused || v_rows[v_low];
      problems := problems || rekey._explain_error(target.target, relation, v_message, v_code, v_context, plain);
      codes := codes || v_code;
    else
      v_from[v_top + 1] := (v_low + v_high) / 2 + 1;
      v_until[v_top + 1] := v_high;
      v_from[v_top + 2] := v_low;
      v_until[v_top + 2] := (v_low + v_high) / 2;
      v_top := v_top + 2;
    end if;
  end loop;
end
$$;


ALTER FUNCTION rekey._write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]) IS 'Stores as rekey._write_rows(), leaving out what is NULL, and where the table raises, finds the rows that it does so for by halving: they are refused, with problems and codes (SQLSTATE). undone: the first row that it did not come to; NULL: it came to all. What is neither is somebody else''s now. An error that passes is raised.';


--
-- Name: _write_rows(rekey._target, regclass, tid[], bytea[], bytea[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_settings text := rekey._guarded_settings();
begin
  perform set_config('rekey.sweeping', 'on', true);
  insert into rekey._sweeping (transaction, relation) values (pg_current_xact_id(), _write_rows.relation);
  select w.locked, w.written into locked, written from rekey._call_write(target.function_name, relation, rows, starts, ciphertexts, state) w;
  delete from rekey._sweeping s where s.transaction = pg_current_xact_id();
  perform set_config('rekey.sweeping', '', true);
  -- The rows are locked: only the table itself can have kept them.
  if written is distinct from coalesce(cardinality(locked), 0)::bigint then
    raise exception '% of % rows of % were not changed: a trigger of the table, or a rule, keeps them', cardinality(locked) - coalesce(written, 0),
      cardinality(locked), relation using errcode = 'RK005',
      hint = format('Let the trigger pass by what pg_rekey does: WHEN (NOT rekey.is_sweeping(%L)).', relation);
  end if;
  if rekey._guarded_settings() <> v_settings then
    raise exception 'a trigger of % changed who acts in this session', relation using errcode = 'RK005',
      hint = 'It must leave role, JWT claims and pg_rekey''s own settings as they are.';
  end if;
end
$$;


ALTER FUNCTION rekey._write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION _write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) IS 'Stores ciphertexts in rows that still begin as they were read (starts; NULL: they are locked since), and that nobody else has: those locked. RK005: the table did not take them, or its triggers did more than they may.';


--
-- Name: _write_trigger_body(rekey.protected_columns, regclass, smallint[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_names text[];
  v_context text;
begin
  select array_agg(quote_ident(a.attname) order by p.rank) into v_names
  from unnest(protected.places) with ordinality as p(place, rank)
  join pg_attribute a on a.attrelid = relation and a.attnum = attnums[p.place];
  v_context := quote_literal(rekey._part(protected.label)::text) || '::bytea' || (
    select coalesce(string_agg(format(' || rekey._part(%%1$s.%s::text)', replace(c.name, '%', '%%')), '' order by c.rank), '')
    from unnest(v_names[2:]) with ordinality as c(name, rank));
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
$_$;


ALTER FUNCTION rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION _write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) IS 'Body of the trigger that encrypts a column on write. It calls the columns by name, since values must not be parameters of a statement.';


--
-- Name: add_endpoint(text, text, text[], boolean, boolean, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.add_endpoint(name text, address text, events text[] DEFAULT NULL::text[], slack boolean DEFAULT false, allow_private boolean DEFAULT false, by_pg_net boolean DEFAULT false) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
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
  -- What was before is not told of.
  insert into rekey._notifier (audit_id) select coalesce(max(h.id), 0) from rekey._audit_head h on conflict do nothing;
  perform rekey._audit('endpoint.added', details => jsonb_build_object('name', name, 'kind', v_kind, 'events', to_jsonb(events),
    'allow_private', nullif(allow_private, false), 'by_pg_net', nullif(by_pg_net, false)));
  return case when v_kind = 'webhook' then v_secret end;
end
$_$;


ALTER FUNCTION rekey.add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean) IS 'Has somebody told what happens. address: https://... (a webhook as Standard Webhooks has it; the signing secret is returned, once), smtps://USER:PASSWORD@HOST:465?from=...&to=... (e-mail; smtp:// with STARTTLS; several to=), or notify:CHANNEL (NOTIFY in this database). It is stored under the KEK; a statement that has it as a literal may be logged, as with rekey.set_secret(). events: only these; NULL: all. slack: the body is what incoming webhooks of Slack take. allow_private: it may be a loopback or private address, and there without TLS. by_pg_net: rekey.tick() hands it to pg_net, where that is; pg_net keeps the address in its own tables in plain, and looks at no addresses. 22023: it cannot be; 23505: there is one of that name; RK001, RK002: KEK.';


--
-- Name: rotation_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.rotation_status AS
 -- in sql/code
;


ALTER TABLE rekey.rotation_status OWNER TO rekey_owner;

--
-- Name: VIEW rotation_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.rotation_status IS 'Every rotation and how far it is.';


--
-- Name: COLUMN rotation_status.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.id IS 'Number of the rotation.';


--
-- Name: COLUMN rotation_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.keyring IS 'Keyring that is rotated.';


--
-- Name: COLUMN rotation_status.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.tenant_id IS 'Tenant of the keyring.';


--
-- Name: COLUMN rotation_status.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.state IS 'queued, running, paused, verifying, failed (these are under way), completed, completed_with_failures, rolled_back, superseded.';


--
-- Name: COLUMN rotation_status.trigger; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.trigger IS 'Why: manual, schedule, compromise, rollback, adoption.';


--
-- Name: COLUMN rotation_status.from_versions; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.from_versions IS 'Versions whose rows it takes along.';


--
-- Name: COLUMN rotation_status.to_version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.to_version IS 'Version it brings them to.';


--
-- Name: COLUMN rotation_status.rows_total; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.rows_total IS 'Rows to re-encrypt; NULL until they are counted.';


--
-- Name: COLUMN rotation_status.rows_done; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.rows_done IS 'Rows re-encrypted.';


--
-- Name: COLUMN rotation_status.rows_failed; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.rows_failed IS 'Rows in quarantine: rekey.failure_status names them.';


--
-- Name: COLUMN rotation_status.attempts; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.attempts IS 'Failed attempts in a row, of the batch that fails.';


--
-- Name: COLUMN rotation_status.last_error; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.last_error IS 'The last error.';


--
-- Name: COLUMN rotation_status.next_attempt_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.next_attempt_at IS 'It goes on after this time; NULL: at once.';


--
-- Name: COLUMN rotation_status.blocked_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.blocked_by IS 'What it waits for: open transactions (pid, role, age_seconds: since they began; not there where who reads this may not see it in pg_stat_activity), prepared ones (prepared, age_seconds), rows (rows, why), columns (target, why), the rotation of its keyring that comes before (rotation, state, adopts), tables in which a step fails (target, relation, error, sqlstate), or in which it hangs (pid, target, relation, age_seconds).';


--
-- Name: COLUMN rotation_status.reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.reason IS 'What whoever asked for it said.';


--
-- Name: COLUMN rotation_status.requested_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.requested_by IS 'Who asked for it: a role; before it, through PostgREST or the HTTP API, the subject of the JWT or the name of the token.';


--
-- Name: COLUMN rotation_status.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.created_at IS 'When it was asked for; from then on new values are encrypted with to_version.';


--
-- Name: COLUMN rotation_status.started_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.started_at IS 'When the first row was looked at.';


--
-- Name: COLUMN rotation_status.finished_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.finished_at IS 'When it ended.';


--
-- Name: COLUMN rotation_status.adopts; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.adopts IS 'Protected column that it adopts; NULL for other rotations.';


--
-- Name: COLUMN rotation_status.formats; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.formats IS 'As what its values may be taken; NULL for other rotations.';


--
-- Name: COLUMN rotation_status.forced; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.forced IS 'Whether values that look like another format are taken for plaintext.';


--
-- Name: COLUMN rotation_status.unwrap; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.unwrap IS 'What the client takes off opened values: json, php, pickle; NULL: nothing.';


--
-- Name: COLUMN rotation_status.blocks_to_verify; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.blocks_to_verify IS 'Blocks of large tables that its verification has yet to look at; NULL: none has begun.';


--
-- Name: COLUMN rotation_status.pace; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.pace IS 'Part of the time that its workers work, for the rest they pause: 1 at full speed, at least the setting min_pace. NULL: they do not work on it.';


--
-- Name: COLUMN rotation_status.gives_way_to; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.rotation_status.gives_way_to IS 'To whom they give way so; NULL: to nobody.';


--
-- Name: adopt_column(regclass, name, text[], boolean, text, boolean, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adopt_column(target regclass, column_name name, formats text[] DEFAULT '{plaintext}'::text[], force boolean DEFAULT false, reason text DEFAULT NULL::text, values_are_tokens boolean DEFAULT false, unwrap text DEFAULT NULL::text) RETURNS SETOF rekey.rotation_status
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_column rekey.protected_columns;
  v_keyring rekey.keyrings;
  v_rotation bigint;
begin
  perform rekey._refuse_stranger(target);
  if coalesce(cardinality(formats), 0) = 0 or not formats <@ array(select f.format from rekey._legacy_formats() f) then
    raise exception 'there is no such format' using errcode = 'invalid_parameter_value',
      hint = (select string_agg(f.format, ', ') from rekey._legacy_formats() f) || ': one or more of them.';
  end if;
  if unwrap not in ('json', 'php', 'pickle') then
    raise exception 'values are not unwrapped from %', quote_literal(unwrap) using errcode = 'invalid_parameter_value',
      hint = 'unwrap: json, php or pickle.';
  end if;
  select * into v_column from rekey.protected_columns c where c.id = rekey._column_id(target, adopt_column.column_name);
  if not found then
    raise exception 'column %.% is not protected', target, coalesce(quote_ident(column_name), 'NULL') using errcode = 'RK007',
      hint = 'rekey.protect_column() first.', constraint = 'protect';
  end if;
  perform rekey._refuse_problem(v_column.label, rekey._column_problem(v_column));
  if not coalesce(force, false) then
    perform rekey._refuse_doubt(v_column.label, formats, values_are_tokens);
  end if;
  v_keyring := rekey._keyring(rekey._keyring_name(v_column.keyring_id), lock => true);
  select r.id into v_rotation from rekey.rotations r where r.column_id = v_column.id and rekey._is_under_way(r.state);
  if found then
    raise exception '% is being adopted, by rotation %', v_column.label, v_rotation using errcode = 'RK004', hint = 'Wait for it.', constraint = 'wait';
  end if;
  insert into rekey.rotations (keyring_id, from_versions, to_version, trigger, reason, requested_by, column_id, formats, forced, unwrap, in_line)
  select v_keyring.id, '{}', k.version, 'adoption', adopt_column.reason, rekey._requester(), v_column.id,
    array(select distinct f from unnest(adopt_column.formats) f order by 1), coalesce(force, false), adopt_column.unwrap,
    exists (select from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state))
  from rekey.encryption_keys k where k.keyring_id = v_keyring.id and k.state = 'active'
  returning id into v_rotation;
  if v_rotation is null then
    raise exception 'keyring % is retired', quote_literal(v_keyring.name) using errcode = 'RK006';
  end if;
  perform rekey._audit('rotation.requested', v_keyring.name, (rekey._active_versions(array[v_keyring.id]))[1], v_rotation,
    jsonb_build_object('trigger', 'adoption', 'column', v_column.label, 'formats', formats, 'force', nullif(force, false), 'unwrap', unwrap, 'reason', reason));
  return query select s.* from rekey.rotation_status s where s.id = v_rotation;
end
$$;


ALTER FUNCTION rekey.adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text) OWNER TO rekey_owner;

--
-- Name: FUNCTION adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text) IS 'Queues the encryption of what stands in a protected column and is no envelope, as a rotation with the trigger adoption, which it returns. Where the keyring is under way, it waits in line, queued, and blocked_by says for what. formats: as what a value may be taken: plaintext, and those of docs/adopting.md. Each is recognised; one that looks like another format is never taken for plaintext, unless force. Where plaintext is among them, a sample of the column is looked at first: RK005 where it looks encrypted by another tool, unless force, or, where random tokens look the same, values_are_tokens. unwrap: what pg-rekey columns adopt takes off opened values. What does not open is left as it is, in quarantine. With plaintext alone any worker does it; else pg-rekey columns adopt, which has the keys. The owner of the table calls it, as a member of rekey_admin, or a superuser. 22023: no such format, or nothing to unwrap from; 42501: not the owner; RK004: the column is being adopted; RK005: blocked, or it looks encrypted; RK006: retired keyring; RK007: not protected.';


--
-- Name: adopt_vault(text, uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adopt_vault(keyring text DEFAULT 'default'::text, tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_names text[];
  v_id uuid;
  v_name text;
  v_opens boolean;
  v_count bigint := 0;
begin
  if rekey._trusted_relation('supabase_vault', 'vault', 'decrypted_secrets') is null then
    raise exception 'this database has no Supabase Vault' using errcode = 'undefined_table';
  end if;
  select array_agg(s.value || n.suffix) into v_names
  from rekey.setting_status s, (values (''), ('_new')) as n(suffix) where s.name = 'kek_secret_name';
  -- Nothing is decrypted here: the view does that for its column, and one that does not open would stop all.
  for v_id, v_name in execute format($sql$
    select v.id, coalesce(v.name, v.id::text) as name from %I.decrypted_secrets v
    where not coalesce(v.name, '') = any ($1)
      and not exists (select from rekey.secrets s where s.tenant_id = $2 and s.name = coalesce(v.name, v.id::text))
    order by v.id$sql$, 'vault') using v_names, tenant_id
  loop
    begin
      execute format('select v.decrypted_secret is not null from %I.decrypted_secrets v where v.id = $1', 'vault') into v_opens using v_id;
    exception when data_exception or external_routine_invocation_exception or invalid_parameter_value or character_not_in_repertoire then
      v_opens := false;
    end;
    if v_opens then
      -- From the one into the other: a value that is a parameter can be logged.
      execute format(
        'select rekey.set_secret($2, v.decrypted_secret, $3, $4, nullif(v.description, $5)) from %I.decrypted_secrets v where v.id = $1', 'vault')
      using v_id, v_name, tenant_id, keyring, '';
      v_count := v_count + 1;
    elsif not v_opens then
      raise warning 'secret % of the Vault does not open', quote_literal(v_name) using errcode = 'RK003',
        hint = format('Nor can vault.update_secret() replace it: DELETE FROM vault.secrets WHERE id = %L, and store it anew.', v_id);
    end if;
  end loop;
  return v_count;
end
$_$;


ALTER FUNCTION rekey.adopt_vault(keyring text, tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION adopt_vault(keyring text, tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adopt_vault(keyring text, tenant_id uuid) IS 'Copies the secrets of the Supabase Vault into rekey.secrets, under their names (a secret without one: its id), and returns how many. Names that are taken, and the KEK, are left out, so that it can be repeated. One that does not open stops no other: a warning (RK003) names it. The Vault keeps its own: delete them there afterwards. Takes the rights to read the Vault and rekey_app. 42P01: there is no Vault, or it is not the extension supabase_vault''s; and the errors of rekey.set_secret().';


--
-- Name: adoption_batch(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adoption_batch(rotation_id bigint) RETURNS rekey._adoption
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_passphrases bytea[] := rekey._copied_passphrases();
  v_kept boolean := rekey._keep_passphrases(v_passphrases);
begin
  return case when v_kept then rekey._adoption_batch(rotation_id) end;
end
$$;


ALTER FUNCTION rekey.adoption_batch(rotation_id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION adoption_batch(rotation_id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adoption_batch(rotation_id bigint) IS 'For pg-rekey columns adopt: adopts a batch of values as far as the server can open them (plaintext; pgp_sym with the passphrases in the temporary table pg_rekey_passphrases), and returns the others in legacy, their rows locked, for rekey.adoption_store() in the same transaction. NULL: nothing is left of this pass, the throttle holds it up, or the column is blocked, for which the rotation waits. 25001: not in READ COMMITTED; 42501: not the owner of the table; RK005: changed meanwhile; RK007: no such adoption.';


--
-- Name: adoption_doubt(regclass, name, text[], boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adoption_doubt(target regclass, column_name name, formats text[] DEFAULT '{plaintext}'::text[], values_are_tokens boolean DEFAULT false) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_label text;
begin
  perform rekey._refuse_stranger(target);
  select c.label into v_label from rekey.protected_columns c where c.id = rekey._column_id(target, adoption_doubt.column_name);
  return regexp_replace(rekey._adoption_doubt(v_label, formats, values_are_tokens), '^\w+: ', '');
end
$$;


ALTER FUNCTION rekey.adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean) IS 'For pg-rekey columns adopt --dry-run: why rekey.adopt_column() would refuse a protected column without force, as a sample tells: its values look encrypted by another tool. NULL: it would not. 42501: not the owner of the table.';


--
-- Name: adoption_preview(regclass, name, text[], boolean, regclass, tid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adoption_preview(target regclass, column_name name, formats text[] DEFAULT '{plaintext}'::text[], force boolean DEFAULT false, relation regclass DEFAULT NULL::regclass, first tid DEFAULT '(0,0)'::tid) RETURNS rekey._adoption
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_passphrases bytea[] := rekey._copied_passphrases();
  v_kept boolean := rekey._keep_passphrases(v_passphrases);
  v_adoption rekey._adoption;
begin
  v_adoption := case when v_kept then rekey._adoption_preview(target, column_name, relation, first, formats, force) end;
  v_adoption.ciphertexts := null;
  return v_adoption;
end
$$;


ALTER FUNCTION rekey.adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid) OWNER TO rekey_owner;

--
-- Name: FUNCTION adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid) IS 'For pg-rekey columns adopt --dry-run: what an adoption would find in one range of a protected column, by format and problem; legacy: what only the client can tell. Changes nothing, but locks the rows until the transaction ends. relation, first: where to begin; next and next_relation of the result say where to go on.';


--
-- Name: adoption_store(bigint, regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.adoption_store(rotation_id bigint, relation regclass) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_rows tid[];
  v_plaintexts bytea[];
  v_problems text[];
  v_done bigint;
begin
  execute format('select array_agg(o."row"::tid order by o.ctid), array_agg(o.plaintext order by o.ctid), array_agg(o.problem order by o.ctid) from pg_temp.%I o', 'pg_rekey_opened')
  into v_rows, v_plaintexts, v_problems;
  v_done := rekey._adoption_store(rotation_id, relation, v_rows, v_plaintexts, v_problems);
  return v_done;
end
$$;


ALTER FUNCTION rekey.adoption_store(rotation_id bigint, relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION adoption_store(rotation_id bigint, relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.adoption_store(rotation_id bigint, relation regclass) IS 'For pg-rekey columns adopt: seals what the client opened of the last rekey.adoption_batch(), from the temporary table pg_rekey_opened ("row" text, plaintext bytea, problem text), and returns how many. Where plaintext is NULL, the row goes into quarantine with its problem. Errors: as rekey.adoption_batch().';


--
-- Name: _audit_head; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._audit_head (
    singleton boolean DEFAULT true NOT NULL,
    id bigint NOT NULL,
    hash bytea NOT NULL,
    pruning xid8,
    CONSTRAINT _audit_head_singleton_check CHECK (singleton)
);


ALTER TABLE rekey._audit_head OWNER TO rekey_owner;

--
-- Name: TABLE _audit_head; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._audit_head IS 'One row: number and hash of the last entry of the audit log. pruning: the transaction that may remove entries, while rekey.prune_audit_log() does; NULL in every committed state.';


--
-- Name: audit_checkpoint(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.audit_checkpoint() RETURNS jsonb
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey.audit_checkpoint() OWNER TO rekey_owner;

--
-- Name: FUNCTION audit_checkpoint(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.audit_checkpoint() IS 'The end of the audit log now: number and hash of its last entry, count of its entries. Sign it and keep it elsewhere (pg-rekey audit checkpoint): it is the anchor of rekey.verify_audit_log().';


--
-- Name: begin_search(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.begin_search() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey.begin_search() OWNER TO rekey_owner;

--
-- Name: FUNCTION begin_search(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.begin_search() IS 'Begins a search of the database for envelopes of every version that is scheduled for destruction; or has the one under way try again what it could not read. Returns its number. rekey.search_step(), repeated, does the work, with the rights of its caller. 25001: not in READ COMMITTED; RK006: none is scheduled.';


--
-- Name: can_access_tenant(uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.can_access_tenant(tenant_id uuid) RETURNS boolean
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_caller name := rekey._caller();
  v_check text;
  v_app jsonb;
begin
  if tenant_id is null or v_caller = 'rekey_sweeper' then
    return false;
  end if;
  if v_caller = 'service_role' and rekey._is_service_role(v_caller) or pg_has_role(v_caller, 'rekey_admin', 'usage') then
    return true;
  end if;
  select s.tenant_check into v_check from rekey.settings s;
  if v_check is not null then
    return rekey._call_tenant_check(v_check, tenant_id);
  end if;
  v_app := rekey._claims();
  if v_app is null then
    return tenant_id = '00000000-0000-0000-0000-000000000000' and pg_has_role(v_caller, 'rekey_app', 'usage');
  end if;
  v_app := v_app -> 'app_metadata';
  return coalesce(
    lower(v_app ->> 'tenant_id') = tenant_id::text
    or jsonb_typeof(v_app -> 'tenant_ids') = 'array' and exists (
      select from jsonb_array_elements_text(v_app -> 'tenant_ids') t where lower(t) = tenant_id::text), false);
end
$$;


ALTER FUNCTION rekey.can_access_tenant(tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION can_access_tenant(tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.can_access_tenant(tenant_id uuid) IS 'Whether the caller reaches the secrets of this tenant. rekey_admin and service_role reach all; else the function named by the setting tenant_check decides; else a JWT reaches app_metadata.tenant_id and tenant_ids; else a rekey_app connection reaches the nil tenant.';


--
-- Name: cancel_key_destruction(text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.cancel_key_destruction(keyring text, version integer) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'destroy_scheduled' then
    raise exception 'version % is %, not scheduled for destruction', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, v_key.scheduled_from, 'key.destroy_cancelled', null);
  -- Scheduled again, it is looked for again.
  delete from rekey._search_versions v where (v.keyring_id, v.version) = (v_keyring.id, cancel_key_destruction.version);
end
$$;


ALTER FUNCTION rekey.cancel_key_destruction(keyring text, version integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION cancel_key_destruction(keyring text, version integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.cancel_key_destruction(keyring text, version integer) IS 'Cancels a scheduled destruction: the version returns to the state it came from. RK006: none is scheduled; RK007: there is no such version.';


--
-- Name: clear_schedule(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.clear_schedule(keyring text DEFAULT 'default'::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
begin
  if v_keyring.rotate_every is not null then
    update rekey.keyrings k set rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
    perform rekey._audit('schedule.changed', keyring, details => jsonb_build_object('cleared', true));
  end if;
end
$$;


ALTER FUNCTION rekey.clear_schedule(keyring text) OWNER TO rekey_owner;

--
-- Name: FUNCTION clear_schedule(keyring text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.clear_schedule(keyring text) IS 'Ends the schedule of a keyring. RK007: there is none.';


--
-- Name: confirm_emptied(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.confirm_emptied(keyring text) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring);
  v_rows bigint;
begin
  select s.rows into v_rows from rekey._secrets_seen s where s.keyring_id = v_keyring.id for update;
  if v_rows > 0 then
    update rekey._secrets_seen s set rows = 0 where s.keyring_id = v_keyring.id;
    perform rekey._audit('keyring.emptied', keyring, details => jsonb_build_object('seen', v_rows));
  end if;
  return coalesce(v_rows, 0);
end
$$;


ALTER FUNCTION rekey.confirm_emptied(keyring text) OWNER TO rekey_owner;

--
-- Name: FUNCTION confirm_emptied(keyring text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.confirm_emptied(keyring text) IS 'Confirms that the secrets of a keyring are gone, all of them, because they were deleted: its rotation, which held 1,000 or more at its last complete count, then completes without them. Returns how many there were. RK007: no such keyring.';


--
-- Name: create_decrypted_view(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.create_decrypted_view(target regclass) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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


ALTER FUNCTION rekey.create_decrypted_view(target regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION create_decrypted_view(target regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.create_decrypted_view(target regclass) IS 'Makes the view <table>_decrypted beside a table, or makes it anew, and returns its name: as the table, with its protected columns opened, under the rights and policies of whoever reads it (security_invoker). A value that is no envelope is shown as it is. Its readers need SELECT on view and table, and rekey_app. Each row is opened by itself: select few. RK007: the table has no protected column.';


--
-- Name: create_keyring(text, uuid, interval); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.create_keyring(name text, tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid, rotate_every interval DEFAULT NULL::interval) RETURNS rekey.keyrings
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_bytes bytea;
begin
  if tenant_id is null then
    raise exception 'a keyring has a tenant' using errcode = 'invalid_parameter_value',
      hint = 'Leave tenant_id out for a keyring of all tenants.';
  end if;
  perform rekey._lock_kek();
  loop
    v_bytes := rekey._random_bytes(4);
    v_keyring.id := rekey._int4(v_bytes, 0) & 2147483647;
    exit when v_keyring.id > 0 and not exists (select from rekey.keyrings k where k.id = v_keyring.id);
  end loop;
  begin
    insert into rekey.keyrings (id, name, tenant_id, rotate_every, next_rotation_at)
    values (v_keyring.id, create_keyring.name, create_keyring.tenant_id, create_keyring.rotate_every, now() + create_keyring.rotate_every)
    returning * into v_keyring;
  exception
    when check_violation or not_null_violation or datetime_field_overflow then
      raise exception 'a keyring cannot be named % and rotate every %', coalesce(quote_literal(name), 'NULL'), coalesce(rotate_every::text, 'NULL')
        using errcode = 'invalid_parameter_value',
          hint = 'The name has 1 to 63 bytes and no control characters; the interval is between 1 minute and 36500 days.';
    when unique_violation then
      raise exception 'there is a keyring % already', quote_literal(name) using errcode = 'unique_violation';
  end;
  perform rekey._new_keys(array[v_keyring.id], array[1]);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.created', 'keyring', name, 'details',
      jsonb_build_object('tenant_id', tenant_id, 'rotate_every', rotate_every)),
    jsonb_build_object('event', 'key.created', 'keyring', name, 'version', 1),
    jsonb_build_object('event', 'key.activated', 'keyring', name, 'version', 1)));
  return v_keyring;
end
$$;


ALTER FUNCTION rekey.create_keyring(name text, tenant_id uuid, rotate_every interval) OWNER TO rekey_owner;

--
-- Name: FUNCTION create_keyring(name text, tenant_id uuid, rotate_every interval); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.create_keyring(name text, tenant_id uuid, rotate_every interval) IS 'Makes a keyring and its version 1. name: 1 to 63 bytes, unique in the database. tenant_id: whose it is. rotate_every: its cryptoperiod; the first scheduled rotation is due after it. 22023: name or interval cannot be; 23505: the name is taken; RK001, RK002: KEK.';


--
-- Name: decrypt(bytea, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt(ciphertext bytea, context text[] DEFAULT '{}'::text[], pass bytea DEFAULT NULL::bytea) RETURNS bytea
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  if ciphertext is null then
    return null;
  end if;
  return rekey._decrypt(ciphertext, context, pass);
end
$$;


ALTER FUNCTION rekey.decrypt(ciphertext bytea, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt(ciphertext bytea, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt(ciphertext bytea, context text[], pass bytea) IS 'Opens what rekey.encrypt() made, with the same context. pass: for many rows of a protected column, (select rekey.reading_pass(label)). NULL stays NULL. Writes nothing. 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK003: it does not open; RK006: its key is disabled, scheduled for destruction or destroyed.';


--
-- Name: decrypt(text, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt(ciphertext text, context text[] DEFAULT '{}'::text[], pass bytea DEFAULT NULL::bytea) RETURNS bytea
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  if ciphertext is null then
    return null;
  end if;
  return rekey._decrypt(coalesce(rekey._from_text(ciphertext), ''::bytea), context, pass);
end
$$;


ALTER FUNCTION rekey.decrypt(ciphertext text, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt(ciphertext text, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt(ciphertext text, context text[], pass bytea) IS 'As rekey.decrypt(bytea, ...), of the text form of an envelope.';


--
-- Name: decrypt_many(bytea[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt_many(ciphertexts bytea[], contexts text[] DEFAULT '{}'::text[]) RETURNS bytea[]
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET work_mem TO '2000000kB'
    SET plan_cache_mode TO 'force_generic_plan'
    SET row_security TO 'off'
    AS $$
declare
  v_count integer := coalesce(cardinality(ciphertexts), 0);
  v_parts integer := array_length(contexts, 2);
  v_contexts bytea[];
  v_keyrings integer[];
  v_versions integer[];
  v_label text;
  v_tenant uuid;
  v_place integer;
  v_value bytea;
  v_values bytea[] := array_fill(null::bytea, array[v_count]);
  v_unreadable integer;
  v_keyring integer;
  v_version integer;
  v_problem text;
begin
  if array_ndims(ciphertexts) > 1 or contexts is null
    or contexts <> '{}' and (array_ndims(contexts) <> 2 or array_length(contexts, 1) <> v_count)
  then
    raise exception 'contexts is an array of two dimensions, with a row for each ciphertext' using errcode = 'invalid_parameter_value',
      hint = 'array_agg(array[''label'', id::text]) makes one. An empty one, the default, binds the values to nothing but their keyring.';
  end if;
  if v_count = 0 or array_remove(ciphertexts, null) = '{}' then
    return ciphertexts;
  end if;
  if v_parts > 0 then
    for v_label in select distinct p.part from unnest(contexts) with ordinality as p(part, place) where (p.place - 1) % v_parts = 0 loop
      perform rekey._check_label(v_label);
    end loop;
    v_contexts := array(
      select string_agg(rekey._part(p.part), ''::bytea order by p.place)
      from unnest(contexts) with ordinality as p(part, place) group by (p.place - 1) / v_parts order by (p.place - 1) / v_parts);
  end if;
  select array_agg(h.keyring_id), array_agg(h.version) into v_keyrings, v_versions
  from (select distinct rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
        from unnest(ciphertexts) as u(ciphertext) where rekey._is_envelope(u.ciphertext)) h;
  for v_tenant in
    select distinct coalesce(k.tenant_id, '00000000-0000-0000-0000-000000000000') from unnest(v_keyrings) as u(id) left join rekey.keyrings k on k.id = u.id
  loop
    perform rekey._check_tenant(v_tenant);
  end loop;
  -- In no order, as rekey.read_secrets().
  for v_place, v_value in
    select w.place, case when w.key is not null then rekey._aead_decrypt(w.key, w.iv, w.sealed, w.aad) end
    from (
      select e.place, d.key, substr(e.envelope, 12, 16) as iv, substr(e.envelope, 28) as sealed,
        substr(e.envelope, 1, 11) || coalesce(e.context, ''::bytea) as aad
      from (
        select u.place, u.context, case when rekey._is_envelope(u.ciphertext) then u.ciphertext end as envelope
        from unnest(ciphertexts, v_contexts) with ordinality as u(ciphertext, context, place)
        where u.ciphertext is not null
        offset 0
      ) e
      left join (select k.* from rekey._deks(v_keyrings, v_versions) k offset 0) d
        on d.keyring_id = rekey._int4(e.envelope, 3) and d.version = rekey._int4(e.envelope, 7)
      offset 0
    ) w
  loop
    if v_value is null then
      v_unreadable := least(v_unreadable, v_place);
    end if;
    v_values[v_place] := v_value;
  end loop;
  if v_unreadable is not null then
    if rekey._is_envelope(ciphertexts[v_unreadable]) then
      v_keyring := rekey._int4(ciphertexts[v_unreadable], 3);
      v_version := rekey._int4(ciphertexts[v_unreadable], 7);
      v_problem := case when rekey._dek(v_keyring, v_version) is null then rekey._dek_problem(v_keyring, v_version) end;
    end if;
    raise exception 'cannot open ciphertext no. %', v_unreadable || coalesce(': ' || v_problem, '')
      using errcode = case when v_problem is null then 'RK003' else 'RK006' end, hint = 'Leave it out to read the others.';
  end if;
  return v_values;
end
$$;


ALTER FUNCTION rekey.decrypt_many(ciphertexts bytea[], contexts text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt_many(ciphertexts bytea[], contexts text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt_many(ciphertexts bytea[], contexts text[]) IS 'Opens many values in one call, in their order: keys are unwrapped, and tenants and labels asked for, once. contexts: two dimensions, a row for each ciphertext, all with as many parts; empty: none has a context. NULL stays NULL. Writes nothing. 22023: contexts that do not fit; 42501: reserved context, a column that the caller may not read, or another tenant''s keyring; RK001, RK002: KEK; RK003: one of them does not open, the message says which; RK006: its key is disabled, scheduled for destruction, destroyed or damaged.';


--
-- Name: decrypt_many(text[], text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt_many(ciphertexts text[], contexts text[] DEFAULT '{}'::text[]) RETURNS bytea[]
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_ciphertexts bytea[] := array(
    select case when u.ciphertext is not null then coalesce(rekey._from_text(u.ciphertext), ''::bytea) end
    from unnest(ciphertexts) with ordinality as u(ciphertext, place) order by u.place);
begin
  return rekey.decrypt_many(v_ciphertexts, contexts);
end
$$;


ALTER FUNCTION rekey.decrypt_many(ciphertexts text[], contexts text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt_many(ciphertexts text[], contexts text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt_many(ciphertexts text[], contexts text[]) IS 'As rekey.decrypt_many(bytea[], ...), of the text forms of envelopes.';


--
-- Name: decrypt_text(bytea, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt_text(ciphertext bytea, context text[] DEFAULT '{}'::text[], pass bytea DEFAULT NULL::bytea) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_plaintext bytea;
  v_text text;
begin
  if ciphertext is not null then
    v_plaintext := rekey._decrypt(ciphertext, context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;


ALTER FUNCTION rekey.decrypt_text(ciphertext bytea, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt_text(ciphertext bytea, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt_text(ciphertext bytea, context text[], pass bytea) IS 'As rekey.decrypt(), of a value that was text. 22021: it was not.';


--
-- Name: decrypt_text(text, text[], bytea); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.decrypt_text(ciphertext text, context text[] DEFAULT '{}'::text[], pass bytea DEFAULT NULL::bytea) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_plaintext bytea;
  v_text text;
begin
  if ciphertext is not null then
    v_plaintext := rekey._decrypt(coalesce(rekey._from_text(ciphertext), ''::bytea), context, pass);
    v_text := rekey._as_text(v_plaintext);
    if v_text is null then
      perform rekey._refuse_bytes();
    end if;
  end if;
  return v_text;
end
$$;


ALTER FUNCTION rekey.decrypt_text(ciphertext text, context text[], pass bytea) OWNER TO rekey_owner;

--
-- Name: FUNCTION decrypt_text(ciphertext text, context text[], pass bytea); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.decrypt_text(ciphertext text, context text[], pass bytea) IS 'As rekey.decrypt(), of the text form of a value that was text. 22021: it was not.';


--
-- Name: delete_secret(text, uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.delete_secret(name text, tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  perform rekey._check_tenant(tenant_id);
  delete from rekey.secrets s where s.tenant_id = delete_secret.tenant_id and s.name = delete_secret.name;
  return found;
end
$$;


ALTER FUNCTION rekey.delete_secret(name text, tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION delete_secret(name text, tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.delete_secret(name text, tenant_id uuid) IS 'Deletes a secret; false where there was none. 42501: another tenant.';


--
-- Name: disable_key(text, integer, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.disable_key(keyring text, version integer, reason text DEFAULT NULL::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'decrypt_only' then
    raise exception 'version % is %, only a decrypt_only one can be disabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_needed(v_keyring.id, version);
  perform rekey._move_key(v_key, 'disabled', 'key.disabled', reason);
end
$$;


ALTER FUNCTION rekey.disable_key(keyring text, version integer, reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION disable_key(keyring text, version integer, reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.disable_key(keyring text, version integer, reason text) IS 'Suspends a version: what stands on it does not open until rekey.enable_key(). RK005: a rotation needs it; RK006: it is not decrypt_only; RK007: there is none.';


--
-- Name: enable_key(text, integer, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.enable_key(keyring text, version integer, reason text DEFAULT NULL::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_key rekey.encryption_keys := rekey._key(v_keyring.id, version);
begin
  if v_key.state <> 'disabled' then
    raise exception 'version % is %, only a disabled one can be enabled', version, v_key.state using errcode = 'RK006';
  end if;
  perform rekey._move_key(v_key, 'decrypt_only', 'key.enabled', reason);
end
$$;


ALTER FUNCTION rekey.enable_key(keyring text, version integer, reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION enable_key(keyring text, version integer, reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.enable_key(keyring text, version integer, reason text) IS 'Lets a disabled version open again. RK006: it is not disabled; RK007: there is none.';


--
-- Name: encrypt(bytea, text, text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.encrypt(plaintext bytea, keyring text DEFAULT 'default'::text, context text[] DEFAULT '{}'::text[]) RETURNS bytea
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_bytes integer := octet_length(plaintext);
  v_context bytea;
  v_sealing rekey._sealing;
  v_iv bytea;
  v_aad bytea;
begin
  if v_bytes is null then
    return null;
  end if;
  v_keyring := rekey._keyring(keyring);
  v_context := rekey._check_context(context, v_keyring.tenant_id);
  v_sealing := rekey._sealing(v_keyring.id, v_bytes);
  v_iv := rekey._random_bytes(16);
  v_aad := v_sealing.header || v_context;
  return v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, plaintext, v_aad);
end
$$;


ALTER FUNCTION rekey.encrypt(plaintext bytea, keyring text, context text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION encrypt(plaintext bytea, keyring text, context text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.encrypt(plaintext bytea, keyring text, context text[]) IS 'Encrypts a value of at most 32 MiB with the active version of keyring. context: what the value belongs to (its column, its row); the same is needed to open it. NULL stays NULL. 22023: too long; 42501: reserved context or another tenant''s keyring; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';


--
-- Name: encrypt(text, text, text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.encrypt(plaintext text, keyring text DEFAULT 'default'::text, context text[] DEFAULT '{}'::text[]) RETURNS bytea
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey.encrypt(plaintext text, keyring text, context text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION encrypt(plaintext text, keyring text, context text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.encrypt(plaintext text, keyring text, context text[]) IS 'As rekey.encrypt(bytea, ...), of the UTF-8 bytes of a text.';


--
-- Name: encrypt_text(text, text, text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.encrypt_text(plaintext text, keyring text DEFAULT 'default'::text, context text[] DEFAULT '{}'::text[]) RETURNS text
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey.encrypt_text(plaintext text, keyring text, context text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION encrypt_text(plaintext text, keyring text, context text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.encrypt_text(plaintext text, keyring text, context text[]) IS 'As rekey.encrypt(text, ...), in the text form of an envelope: rk1: and base64.';


--
-- Name: find_envelopes(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.find_envelopes() RETURNS TABLE(relation regclass, column_name name, envelopes bigint, embedded bigint, others bigint, encrypted bigint, secret_keys bigint)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET bytea_output TO 'hex'
    SET constraint_exclusion TO 'off'
    AS $_$
declare
  -- Conditions on a value.
  v_of_bytes text := $q$substr(%1$s, 1, 3) = '\x524b01' and octet_length(%1$s) >= 75 and octet_length(%1$s) %% 16 = 11$q$;
  v_of_text text := $q$left(%1$s, 20) collate "C" ~ '^rk1:UksB[A-Za-z0-9+/]{12}'$q$;
  -- In full: source text of pg_rekey, this line too, may stand in a table of migrations.
  v_within text := $q$(strpos(%1$s collate "C", 'rk1:UksB') > 0 and %1$s collate "C" ~ 'rk1:UksB[A-Za-z0-9+/]{96}'
    or strpos(%1$s collate "C", '\x524b01') > 0 and %1$s collate "C" ~ '\\x524b01[0-9a-f]{144}')$q$;
  v_of_others text := $q$octet_length(%1$s) >= 16 and coalesce(rekey._mark_within(%1$s), 'envelope') <> 'envelope'$q$;
  -- (To take a document apart takes long: not without one of these letters in a key.)
  v_of_keys text := $q$%1$s ~* '(token|secret|pass|pwd|wort|key|cred|pat|bearer|jwt|otp|cv[cv]|senha|mnemonic|phrase|word|code)[^"]*"\s*:' and rekey._has_secret(%1$s::json)$q$;
  v_table record;
  v_part oid;
  v_counts bigint[];
begin
  for v_table in
    select c.oid, c.oid::regclass as relation, array_agg(a.attname order by a.attnum) as names,
      string_agg(case k.kind
        when 'bytea' then format($q$count(*) filter (where %2$s), 0, count(*) filter (where substr(%1$s, 1, 3) <> '\x524b01'), count(*) filter (where %3$s), null$q$,
          v.value, format(v_of_bytes, v.value), format(v_of_others, v.value))
        when 'text' then format($q$count(*) filter (where %2$s), count(*) filter (where not (%2$s) and %3$s),
            count(*) filter (where left(%1$s, 4) collate "C" <> 'rk1:'), count(*) filter (where %4$s), null$q$,
          v.value, format(v_of_text, v.value), format(v_within, v.value), format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.value)))
        -- Of what else holds text, what is empty is nothing.
        else format($q$0, count(*) filter (where %2$s), %3$s, count(*) filter (where %4$s), %5$s$q$, v.value, format(v_within, v.printed),
          case when k.kind <> 'other' then format($q$count(*) filter (where %s not in ('', 'null', '""', '{}', '[]'))$q$, v.printed) else 'null' end,
          format(v_of_others, format($q$convert_to(%s, 'UTF8')$q$, v.printed)),
          case when k.kind = 'json' then format('count(*) filter (where %s)', format(v_of_keys, v.printed)) else 'null' end) end,
        ', ' order by a.attnum) as counts
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    cross join lateral (select format('t.%I', a.attname), format($q$format('%%s', t.%I)$q$, a.attname)) as v(value, printed)
    join pg_type y on y.oid = a.atttypid
    left join pg_type e on e.oid = y.typelem and y.typcategory = 'A'
    cross join lateral (
      select case
        when y.oid = 'bytea'::regtype then 'bytea'
        when y.oid in ('text'::regtype, 'varchar'::regtype) then 'text'
        when y.oid in ('json'::regtype, 'jsonb'::regtype) or y.typbasetype in ('json'::regtype, 'jsonb'::regtype) then 'json'
        when y.typcategory = 'S' or e.typcategory = 'S' or 'bytea'::regtype in (y.typbasetype, e.oid) then 'strings'
        else 'other' end) as k(kind)
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
      envelopes := v_counts[5 * v_place - 4];
      embedded := v_counts[5 * v_place - 3];
      others := v_counts[5 * v_place - 2];
      encrypted := v_counts[5 * v_place - 1];
      secret_keys := v_counts[5 * v_place];
      return next;
    end loop;
  end loop;
end
$_$;


ALTER FUNCTION rekey.find_envelopes() OWNER TO rekey_owner;

--
-- Name: FUNCTION find_envelopes(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.find_envelopes() IS 'Counts, in every column that has room for one: envelopes; values of another kind that an envelope stands in (text around it, JSON, arrays, rows, domains, and their like); of columns of text, bytea or JSON, their domains and arrays, others; of those, what looks encrypted by another tool; and JSON documents that have a string under a key that sounds like a secret. Reads every ordinary and partitioned table and materialized view that the caller may read, whole, with his rights; of one that he may not read whole, or that has an index or statistics over a function that is neither a superuser''s nor his, which reading it may run, there is a row without a column. Left out are tables of PostgreSQL, pg_rekey, pg_cron and Supabase Vault, temporary and foreign tables, large objects, and what stands within a longer bytea value.';


--
-- Name: find_unprotected(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.find_unprotected() RETURNS TABLE(relation regclass, column_name name, finding text, rows bigint, advice text, action text)
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  return query
    select f.relation, f.column_name, w.finding, w.rows, w.advice, w.action
    from rekey.find_envelopes() with ordinality f (relation, column_name, envelopes, embedded, others, encrypted, secret_keys, place)
    left join rekey.column_status s on s.relation = f.relation and s.column_name = f.column_name
    cross join lateral (
      select format('%L, %L', f.relation, f.column_name) as names,
        -- Those of Supabase's own schemas are its own affair.
        (select s.nspowner::regrole::text !~ '^"?supabase' from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = f.relation) as ours,
        exists (select from pg_attribute a where a.attrelid = f.relation and a.attname = f.column_name
                and a.atttypid in ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype)) as fit) n
    cross join lateral (values
      (f.column_name is null, 'cannot be read', null, 'Look at it as its owner.', null),
      (f.envelopes > 0 and s.label is null, 'holds envelopes, and is not protected', f.envelopes,
        format('select rekey.protect_column(%s): without it no rotation takes these rows along.', n.names), 'protect_found'),
      (f.embedded > 0, 'holds envelopes within other values', f.embedded,
        'No rotation takes them along, and a key that only they stand on counts as unused. Give them a column of their own, and protect it.', null),
      (f.others > 0 and s.label is not null, 'is protected, and holds values that are not encrypted', f.others,
        format('select rekey.adopt_column(%s)', n.names), 'adopt_plaintext'),
      (f.encrypted > 0 and s.label is null and n.ours, 'holds values that another tool encrypted', f.encrypted,
        case when n.fit then format('select rekey.protect_column(%s), then pg-rekey columns adopt --from what that tool writes', n.names)
          else 'Give them a column of type text or bytea, and protect it.' end,
        case when n.fit then 'adopt_encrypted' end),
      (f.others > coalesce(f.encrypted, 0) and s.label is null and n.ours and rekey._sounds_secret(f.column_name::text), 'sounds like a secret, and is not encrypted',
        f.others - coalesce(f.encrypted, 0),
        case when n.fit then format('select rekey.protect_column(%s), then rekey.adopt_column()', n.names)
          else 'Give the values a column of type text or bytea, and protect it.' end,
        case when n.fit then 'protect_and_adopt' end),
      (f.secret_keys > 0 and n.ours and not rekey._sounds_secret(f.column_name::text), 'has JSON keys that sound like secrets, and are not encrypted', f.secret_keys,
        'Give their values a column of type text or bytea, and protect it.', null)
    ) as w (so, finding, rows, advice, action)
    -- A materialized view is a copy, made anew by REFRESH.
    where w.so and (select c.relkind from pg_class c where c.oid = f.relation) <> 'm'
    order by f.place;
end
$$;


ALTER FUNCTION rekey.find_unprotected() OWNER TO rekey_owner;

--
-- Name: FUNCTION find_unprotected(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.find_unprotected() IS 'Columns that were forgotten: those that hold envelopes and are not protected, or hold them within other values; those that hold what another tool encrypted; and those whose name, or a key of whose JSON, sounds like a secret, or that are protected, and hold something else. Values are counted, never shown. A table that the caller may not read whole is a finding. action: what is advised, for whoever says it in other words than those of SQL; NULL: the words are the same everywhere. Reads what rekey.find_envelopes() reads, with the rights of the caller.';


--
-- Name: findings(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.findings() RETURNS TABLE(kind text, severity text, target text, keyring text, version integer, rows bigint, finding text, advice text, action text)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey.findings() OWNER TO rekey_owner;

--
-- Name: FUNCTION findings(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.findings() IS 'What is not as it should be: tables of ours that hide rows, protected columns (rekey.protection_findings()), sequences that are behind, schemas and objects that only have the names of pg_cron or the Vault, and rows that the last census found not to open, or on versions that are destroyed or unknown. severity: critical or warning; action: as in rekey.find_unprotected(). pg-rekey doctor shows it.';


--
-- Name: get_secret(text, uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.get_secret(name text, tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_id uuid;
  v_envelope bytea;
  v_context bytea;
  v_bytes bytea;
begin
  if not rekey.can_access_tenant(tenant_id) then
    perform rekey._refuse_tenant();
  end if;
  select s.id, s.ciphertext into v_id, v_envelope from rekey.secrets s
  where s.tenant_id = get_secret.tenant_id and s.name = get_secret.name;
  if not found then
    raise exception 'no such secret: %', coalesce(quote_literal(name), 'NULL') using errcode = 'RK007',
      hint = 'See rekey.secrets for the names that there are.', constraint = 'secrets';
  end if;
  v_context := rekey._secret_context(tenant_id, v_id);
  v_bytes := rekey._open(v_envelope, v_context);
  return convert_from(v_bytes, 'UTF8');
end
$$;


ALTER FUNCTION rekey.get_secret(name text, tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION get_secret(name text, tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.get_secret(name text, tenant_id uuid) IS 'The value of a secret. Writes nothing, and works on a standby. 42501: another tenant; RK001, RK002: KEK; RK003: it does not open; RK006: its key may not be used; RK007: no such secret.';


--
-- Name: is_sweeping(regclass); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.is_sweeping(relation regclass) RETURNS boolean
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  -- The setting saves the look; it proves nothing, since anybody can make it.
  return coalesce(current_setting('rekey.sweeping', true), '') = 'on' and exists (
    select from rekey._sweeping s
    where s.transaction = pg_current_xact_id_if_assigned()
      and (s.relation = is_sweeping.relation or exists (select from pg_partition_ancestors(s.relation) a where a.relid = is_sweeping.relation)));
end
$$;


ALTER FUNCTION rekey.is_sweeping(relation regclass) OWNER TO rekey_owner;

--
-- Name: FUNCTION is_sweeping(relation regclass); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.is_sweeping(relation regclass) IS 'Whether it is a rotation that writes into this table now: for the triggers of a table that are to let it pass, WHEN (NOT rekey.is_sweeping(''schema.table'')). relation: the table; of a partition, the partitioned table will do. Nobody but a rotation can make it true. No errors.';


--
-- Name: key_usage(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.key_usage(keyring text DEFAULT NULL::text) RETURNS SETOF rekey.key_rows
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_ids integer[] := case when key_usage.keyring is not null then array[(rekey._keyring(key_usage.keyring)).id] end;
begin
  perform rekey._refuse_snapshot();
  return query
    with counted as (
      select c.keyring_id, c.version, sum(c.rows)::bigint as rows, array_agg(distinct c.relation::text) as relations
      from rekey._count(v_ids, false) c
      group by c.keyring_id, c.version
    )
    select r.name, coalesce(k.version, c.version), coalesce(k.state, 'unknown'), coalesce(c.rows, 0), coalesce(c.relations, '{}')
    from (select * from rekey.encryption_keys k where v_ids is null or k.keyring_id = any (v_ids)) k
    full join counted c on c.keyring_id = k.keyring_id and c.version = k.version
    join rekey.keyrings r on r.id = coalesce(k.keyring_id, c.keyring_id)
    order by 1, 2;
end
$$;


ALTER FUNCTION rekey.key_usage(keyring text) OWNER TO rekey_owner;

--
-- Name: FUNCTION key_usage(keyring text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.key_usage(keyring text) IS 'A census: how many rows stand on each key version, and in which relations. keyring NULL: all. Reads every protected row. 25001: not in READ COMMITTED; RK005: a target is blocked; RK007: no such keyring.';


--
-- Name: lock(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.lock() RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform set_config('rekey.unlocked', '', false), set_config('rekey.unlocked', '', true);
end
$$;


ALTER FUNCTION rekey.lock() OWNER TO rekey_owner;

--
-- Name: FUNCTION lock(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.lock() IS 'Forgets the KEK of this session and transaction.';


--
-- Name: mark_key_compromised(text, integer, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.mark_key_compromised(keyring text, version integer, reason text DEFAULT NULL::text) RETURNS SETOF rekey.rotation_status
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_key rekey.encryption_keys;
  v_rotation bigint;
  v_event text;
begin
  if exists (select from rekey.keyrings k join rekey.encryption_keys e on e.keyring_id = k.id
             where k.name = keyring and e.version = mark_key_compromised.version and e.state = 'active') then
    perform rekey._lock_kek();  -- before the row of the keyring, as everywhere
  end if;
  v_keyring := rekey._keyring(keyring, lock => true);
  v_key := rekey._key(v_keyring.id, version);
  if v_key.state not in ('active', 'decrypt_only') then
    raise exception 'version % is %, only an active or decrypt_only one can be marked', version, v_key.state using errcode = 'RK006';
  end if;
  if v_key.state = 'active' then
    select r into v_rotation from rekey._rotate(array[v_keyring.id], 'compromise', reason, true) r;
    v_key := rekey._key(v_keyring.id, version);
  else
    -- An adoption takes no envelopes along: it has to be asked for again. Those in line wait for this one.
    update rekey.rotations r
    set state = 'superseded', finished_at = now(), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line and r.trigger = 'adoption';
    -- Any other that is under way takes the rows along, and does not wait any longer, whatever it was.
    update rekey.rotations r
    set trigger = 'compromise', attempts = 0, next_attempt_at = null,
        state = case when r.state in ('paused', 'failed') then 'queued' else r.state end
    where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line
    returning r.id into v_rotation;
    v_event := 'rotation.resumed';
    if not found and v_keyring.retired_at is null then
      v_rotation := rekey._queue_sweep(v_keyring.id, 'compromise', reason);
      v_event := 'rotation.requested';
    end if;
    update rekey._chunks c set urgent = true, attempts = 0, next_attempt_at = null, stuck = false
    where c.id in (
      select d.id from rekey._chunks d
      where d.pass_id = (select r.pass_id from rekey.rotations r where r.id = v_rotation)
      for update skip locked);  -- whoever has one in hand waits for the rotation's row
  end if;
  perform rekey._move_key(v_key, 'compromised', 'key.compromised', reason);
  if v_event is not null and v_rotation is not null then
    perform rekey._audit(v_event, keyring, (rekey._active_versions(array[v_keyring.id]))[1], v_rotation,
      jsonb_build_object('trigger', 'compromise', 'reason', reason));
  end if;
  return query select s.* from rekey.rotation_status s where s.id = v_rotation;
end
$$;


ALTER FUNCTION rekey.mark_key_compromised(keyring text, version integer, reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION mark_key_compromised(keyring text, version integer, reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.mark_key_compromised(keyring text, version integer, reason text) IS 'Marks a version compromised: it still opens, and never encrypts again. Its rows are re-encrypted by the rotation that is returned; an active version is replaced in the same transaction, superseding a rotation under way. An adoption under way is superseded in any case: repeat it; those in line come after. RK001, RK002: KEK; RK006: neither active nor decrypt_only; RK007: there is none.';


--
-- Name: _census_findings; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._census_findings (
    kind text NOT NULL,
    target text NOT NULL,
    keyring text DEFAULT ''::text NOT NULL,
    version integer DEFAULT 0 NOT NULL,
    item text NOT NULL,
    severity text NOT NULL,
    rows bigint,
    finding text NOT NULL,
    advice text NOT NULL,
    since timestamp with time zone DEFAULT now() NOT NULL
);


ALTER TABLE rekey._census_findings OWNER TO rekey_owner;

--
-- Name: TABLE _census_findings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._census_findings IS 'What the last census found, and since when; what it does not find any more is not here.';


--
-- Name: keks; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.keks (
    id integer NOT NULL,
    fingerprint text NOT NULL,
    state text DEFAULT 'active'::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    retired_at timestamp with time zone,
    CONSTRAINT keks_fingerprint_check CHECK ((fingerprint ~ '^[0-9a-f]{32}$'::text)),
    CONSTRAINT keks_retired_at_check CHECK (((state = 'active'::text) = (retired_at IS NULL))),
    CONSTRAINT keks_state_check CHECK ((state = ANY (ARRAY['active'::text, 'retired'::text, 'lost'::text])))
);


ALTER TABLE rekey.keks OWNER TO rekey_owner;

--
-- Name: TABLE keks; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.keks IS 'Key-encryption keys: number, fingerprint and state. The keys themselves are never stored.';


--
-- Name: COLUMN keks.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keks.id IS 'Number of the KEK.';


--
-- Name: COLUMN keks.fingerprint; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keks.fingerprint IS 'First 16 bytes of HMAC-SHA-256 of the label pg_rekey/v1/fingerprint under the KEK, in hex.';


--
-- Name: COLUMN keks.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keks.state IS 'active (wraps the DEKs), retired (replaced: keep it as long as backups), lost (what it wrapped cannot be opened).';


--
-- Name: COLUMN keks.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keks.created_at IS 'When it was registered.';


--
-- Name: COLUMN keks.retired_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.keks.retired_at IS 'When it was replaced or declared lost.';


--
-- Name: metrics(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.metrics() RETURNS TABLE(name text, labels jsonb, value double precision)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    -- in sql/code
;


ALTER FUNCTION rekey.metrics() OWNER TO rekey_owner;

--
-- Name: FUNCTION metrics(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.metrics() IS 'Figures for monitoring (docs/operations.md): name, labels, value. pg-rekey metrics prints them for Prometheus.';


--
-- Name: pause_rotation(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.pause_rotation(id bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('queued', 'running', 'verifying') then
    raise exception 'rotation % is %: it cannot be paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'paused', pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = pause_rotation.id;
  perform rekey._audit('rotation.paused', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;


ALTER FUNCTION rekey.pause_rotation(id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION pause_rotation(id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.pause_rotation(id bigint) IS 'Pauses the re-encryption; the batch in hand still ends. The new version stays active, and everything readable. RK006: not under way; RK007: no such rotation.';


--
-- Name: protect_column(regclass, name, text, name[], boolean, boolean, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.protect_column(target regclass, column_name name, keyring text DEFAULT 'default'::text, context_columns name[] DEFAULT NULL::name[], encrypt_on_write boolean DEFAULT false, fire_triggers boolean DEFAULT true, search_path text DEFAULT current_setting('search_path'::text)) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    AS $$
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


ALTER FUNCTION rekey.protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text) OWNER TO rekey_owner;

--
-- Name: FUNCTION protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text) IS 'Puts a bytea or text column under rotation, and returns its label: the values are bound to (label, context columns as text), so rekey.decrypt(value, array[label, id::text]) opens them. The owner of the table calls it, as a member of rekey_admin, or a superuser. context_columns: what tells rows apart and does not change; NULL: the primary key. encrypt_on_write: a trigger encrypts what is written, and refuses envelopes of other rows; a value that an update leaves as it is waits for rekey.adopt_column(). fire_triggers: whether the triggers and rules of the table see what a rotation or an adoption writes; false takes a right of the owner of the table: GRANT SET ON PARAMETER session_replication_role. search_path: with which they run meanwhile; left out, it is that of the session that calls. What envelopes break, and where encrypt_on_write will need other context columns, comes as warnings. Repeated, it makes the column''s functions anew. It encrypts nothing that is there: rekey.adopt_column() does. 22023: column, context, table or search path cannot be; 23505: the label is taken; 42501: not the owner; 42703: no such column; RK005: a forced policy, a foreign partition, triggers cannot be kept from firing; RK006: protected already, in another way; RK007: no such keyring.';


--
-- Name: protection_findings(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.protection_findings() RETURNS TABLE(label text, kind text, severity text, finding text, advice text, action text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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
    if v_shape.relation is not null then
      return query
        select v_column.label, f.kind, 'warning', f.finding, f.advice, f.action
        from rekey._column_findings(v_shape.relation, v_shape.attnums[v_column.places[1]], v_column.fire_triggers, v_column.search_path) f
        order by f.kind, f.finding;
    end if;
  end loop;
end
$$;


ALTER FUNCTION rekey.protection_findings() OWNER TO rekey_owner;

--
-- Name: FUNCTION protection_findings(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.protection_findings() IS 'What blocks protected columns, and what rekey.protect_column() warned of or would warn of now: triggers, rules and publications that came later too. severity: critical (blocked) or warning; action: as in rekey.find_unprotected().';


--
-- Name: prune_audit_log(bigint, bigint, text, text, jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
declare
  v_start bigint := (rekey._audit_start()).last;
  v_kept record;
  v_removed bigint;
begin
  perform rekey._refuse_snapshot();
  if not coalesce(first > 0 and last >= first and hash ~ '^[0-9a-f]{64}$' and file_sha256 ~ '^[0-9a-f]{64}$', false) then
    raise exception 'number, hash and file are not told' using errcode = 'invalid_parameter_value',
      hint = 'Give the first and last entry of an export, the hash of the last and the SHA-256 of the file, in hexadecimal: pg-rekey audit prune does.', constraint = 'export';
  end if;
  if not coalesce(checkpoint -> 'checkpoint' ->> 'id' ~ '^\d{1,18}$' and checkpoint -> 'checkpoint' ->> 'hash' ~ '^[0-9a-f]{64}$'
      and checkpoint ->> 'signature' <> '' and octet_length(checkpoint::text) <= 1000
      and (checkpoint -> 'checkpoint' ->> 'id')::bigint >= last, false) then
    raise exception 'there is no signed checkpoint from after entry %', last using errcode = 'invalid_parameter_value',
      hint = 'Export with a key that signs: pg-rekey audit export FILE --key KEY.', constraint = 'export';
  end if;
  perform rekey._refuse_prune(first, last, hash, checkpoint);
  -- Only now, since looking at the log takes a while. What it was found to be it stays, but for another removal.
  perform from rekey._audit_head for update;
  if (rekey._audit_start()).last <> v_start then
    raise exception 'entries were removed by another session meanwhile' using errcode = 'RK006',
      hint = 'Export what follows them: pg-rekey audit export.', constraint = 'export';
  end if;
  v_kept := rekey._kept_hash(last);
  update rekey._audit_head set pruning = pg_current_xact_id() where singleton;
  delete from rekey.audit_log a where a.id <= last and not rekey._is_kept(a.event);
  get diagnostics v_removed = row_count;
  update rekey._audit_head set pruning = null where singleton;
  perform rekey._audit('audit.pruned', details => jsonb_build_object(
    'first', first, 'last', last, 'hash', hash, 'removed', v_removed, 'kept', v_kept.kept, 'kept_hash', v_kept.hash,
    'file_sha256', file_sha256, 'checkpoint', checkpoint));
  return v_removed;
end
$_$;


ALTER FUNCTION rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) IS 'Removes entries from the audit log that are in a file now (pg-rekey audit export, pg-rekey audit prune), and returns how many. first, last: numbers of the first and the last entry in the file; hash: hash of the last one. file_sha256: SHA-256 of the file, in hexadecimal. checkpoint: a signed checkpoint from after that entry; who calls checks its signature. All must be older than the setting audit_keep before the checkpoint. Entries key.*, kek.* and audit.pruned stay. Leaves audit.pruned, from which rekey.verify_audit_log() goes on. A right of its own: the owner of the function, or a superuser, grants EXECUTE on it, and no role of pg_rekey has it. 22023 for arguments that cannot be or are not of this log; RK006 where entries are too new, were removed already, or the log does not hold; 25001 outside READ COMMITTED.';


--
-- Name: read_secrets(text[], uuid); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.read_secrets(names text[] DEFAULT NULL::text[], tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid) RETURNS TABLE(name text, value text)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET work_mem TO '2000000kB'
    SET plan_cache_mode TO 'force_custom_plan'
    SET row_security TO 'off'
    AS $$
declare
  v_unreadable text;
begin
  perform rekey._check_tenant(tenant_id);
  -- No ORDER BY, for the same reason.
  for name, value in
    select o.name, convert_from(o.plaintext, 'UTF8')
    from (
      select w.name, case when w.key is not null then rekey._aead_decrypt(w.key, w.iv, w.sealed, w.aad) end as plaintext
      from (
        select s.name, d.key, substr(s.ciphertext, 12, 16) as iv, substr(s.ciphertext, 28) as sealed,
          substr(s.ciphertext, 1, 11) || rekey._secret_context(s.tenant_id, s.id) as aad
        from rekey.secrets s
        left join (
          select k.* from rekey._deks(
            (select array_agg(v.keyring_id) from (
               select distinct t.keyring_id, t.key_version from rekey.secrets t
               where t.tenant_id = read_secrets.tenant_id and (names is null or t.name = any (names))) v),
            (select array_agg(v.key_version) from (
               select distinct t.keyring_id, t.key_version from rekey.secrets t
               where t.tenant_id = read_secrets.tenant_id and (names is null or t.name = any (names))) v)) k
          offset 0
        ) d on d.keyring_id = s.keyring_id and d.version = s.key_version
        where s.tenant_id = read_secrets.tenant_id and (names is null or s.name = any (names))
          and rekey._is_envelope(s.ciphertext)
        offset 0
      ) w
      offset 0
    ) o
  loop
    if value is null then
      v_unreadable := coalesce(v_unreadable, name);
    else
      return next;
    end if;
  end loop;
  if v_unreadable is not null then
    raise exception 'cannot open ciphertext of secret %', quote_literal(v_unreadable) using errcode = 'RK003',
      hint = 'Leave it out of names to read the others. rekey.get_secret() says more.', constraint = 'unreadable_secret';
  end if;
end
$$;


ALTER FUNCTION rekey.read_secrets(names text[], tenant_id uuid) OWNER TO rekey_owner;

--
-- Name: FUNCTION read_secrets(names text[], tenant_id uuid); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.read_secrets(names text[], tenant_id uuid) IS 'Many secrets of a tenant at once, in no order; names NULL: all of them. Names that there are not are left out. 42501: another tenant; RK001, RK002: KEK; RK003: one of them does not open.';


--
-- Name: reading_pass(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.reading_pass(label text) RETURNS bytea
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_caller name := rekey._caller();
  v_seal bytea;
  v_keyring integer;
  v_tenant uuid;
  v_version record;
  v_next integer;
  v_wrapping bytea;
  v_wrapped bytea;
  v_key bytea;
  v_keys bytea := ''::bytea;
  v_header bytea;
  v_iv bytea;
  v_aad bytea;
begin
  select k.id, k.tenant_id, (select s.key from rekey._session_key s) into v_keyring, v_tenant, v_seal
  from rekey.protected_columns c
  join rekey.keyrings k on k.id = c.keyring_id
  where c.label = reading_pass.label;
  if v_seal is null or not rekey.can_access_tenant(v_tenant) then
    return null;
  end if;
  perform rekey._check_label(label);
  v_wrapping := (rekey._kek()).kek;
  v_wrapping := rekey._wrapping_key(v_wrapping);
  for v_version in
    select k.version, k.kek_id, k.wrapped_key
    from rekey.encryption_keys k
    join rekey.keks e on e.id = k.kek_id
    where k.keyring_id = v_keyring and rekey._key_problem(k.version, k.state, k.kek_id, e.state, false) is null
    order by k.version desc limit 8
  loop
    v_header := coalesce(v_header, rekey._header(v_keyring, v_version.version));
    v_wrapped := v_version.wrapped_key;
    v_aad := rekey._wrap_aad(v_version.kek_id, v_keyring, v_version.version);
    v_key := rekey._unwrap(v_wrapping, v_wrapped, v_aad);
    -- One after the other, so that the place tells the version.
    exit when v_key is null or v_version.version <> v_next;
    v_next := v_version.version - 1;
    v_keys := v_keys || v_key;
  end loop;
  if v_keys = ''::bytea then
    return null;
  end if;
  v_iv := rekey._random_bytes(16);
  v_aad := v_header || rekey._pass_aad(label, v_caller);
  return v_header || v_iv || rekey._aead_encrypt(v_seal, v_iv, v_keys, v_aad);
exception when others then
  return null;  -- whoever has a value to open hears why
end
$$;


ALTER FUNCTION rekey.reading_pass(label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION reading_pass(label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.reading_pass(label text) IS 'With what many values of a protected column are opened in one statement, several times as fast: rekey.decrypt_text(api_key, array[''app.accounts.api_key'', id::text], (select rekey.reading_pass(''app.accounts.api_key''))), the subselect as it stands here, so that it is made once. label: that of the column. Good for this role, session and statement, and of no use to anybody else. Values of the 8 newest versions of the column''s keyring gain by it, all others open as without. NULL where the caller may not read the column, or the KEK is not at hand. Writes nothing. No errors.';


--
-- Name: rebind_column(regclass, name, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.rebind_column(target regclass, column_name name, label text DEFAULT NULL::text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET quote_all_identifiers TO 'off'
    AS $$
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


ALTER FUNCTION rekey.rebind_column(target regclass, column_name name, label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION rebind_column(target regclass, column_name name, label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.rebind_column(target regclass, column_name name, label text) IS 'Goes on after a table was rebuilt, or lost a partition: binds a protected column to the table and column that hold its values now, with its functions, triggers and decrypted view, and returns its label. Named as it is registered, it stays there: that confirms that what has its name, what was a part of it, or where its rows are gone, is as it should be. label: which protected column, where the names do not tell. The caller owns the old and the new table, as a member of rekey_admin; where the old one was dropped, the new one has the owner that it had; or is a superuser. Every value is opened, and the table is locked against writers meanwhile. 22023: type or context columns do not fit; 42501: not the owner; RK001: KEK; RK003: a value does not open under the label; RK005: the old table, or another that has its name, holds envelopes still; RK006: protected as another column; RK007: no such protected column.';


--
-- Name: register_kek(boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.register_kek(replace_lost boolean DEFAULT false) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_active rekey.keks;
  v_kek bytea;
  v_fingerprint text;
  v_id integer;
begin
  perform rekey._ensure_rows();
  select * into v_active from rekey.keks where state = 'active' for update;
  if found and not replace_lost then
    return (select k.id from rekey._kek() k);  -- safe to repeat, and refuses another KEK
  end if;
  v_kek := rekey._new_kek();
  if v_kek is null then
    raise exception 'that KEK is registered already' using errcode = 'RK006',
      hint = 'A KEK that was retired or lost does not become active again. pg-rekey kek generate makes a new one.';
  end if;
  v_fingerprint := rekey._fingerprint(v_kek);
  update rekey.keks set state = 'lost', retired_at = now() where id = v_active.id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_id;
  if v_active.id is not null then
    perform rekey._replace_lost_keys(v_active.id);
    perform rekey._audit('kek.lost', version => v_active.id);
  end if;
  perform rekey._audit('kek.registered', version => v_id, details => jsonb_build_object('fingerprint', v_fingerprint));
  return v_id;
end
$$;


ALTER FUNCTION rekey.register_kek(replace_lost boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION register_kek(replace_lost boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.register_kek(replace_lost boolean) IS 'Registers the KEK that this session, the Vault or the file holds, and returns its number; repeated, it only checks it. replace_lost => true declares the active KEK lost for ever: what it wraps cannot be opened any more, every keyring gets a new version under the new KEK. RK001: no KEK at hand; RK002: another one is active; RK006: it was in use before.';


--
-- Name: remove_endpoint(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.remove_endpoint(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_id integer := (rekey._endpoint(name)).id;
begin
  delete from rekey._endpoints e where e.id = v_id;
  delete from rekey._notifications n where n.endpoint_id = v_id;
  if not exists (select from rekey._endpoints) then
    delete from rekey._notifier n where n.singleton;
    delete from rekey._told t where t.event is not null;
  end if;
  perform rekey._audit('endpoint.removed', details => jsonb_build_object('name', name));
end
$$;


ALTER FUNCTION rekey.remove_endpoint(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION remove_endpoint(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.remove_endpoint(name text) IS 'Has nobody told there any more; messages that wait are dropped. RK007: there is no such endpoint.';


--
-- Name: resolve_failure(bigint, text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.resolve_failure(id bigint, action text, reason text DEFAULT NULL::text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_failure rekey.rotation_failures;
  v_rotation rekey.rotations;
begin
  if action is null or action not in ('retry', 'discard') then
    raise exception 'action is retry or discard' using errcode = 'invalid_parameter_value';
  end if;
  select * into v_failure from rekey.rotation_failures f where f.id = resolve_failure.id;
  if not found then
    raise exception 'no such failure: %', coalesce(id::text, 'NULL') using errcode = 'RK007', hint = 'See rekey.failure_status.', constraint = 'failures';
  end if;
  -- What the census found is of no rotation.
  if v_failure.rotation_id is not null then
    v_rotation := rekey._rotation(v_failure.rotation_id);
  end if;
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = action, resolved_by = rekey._requester(), resolve_reason = resolve_failure.reason
  where f.id = resolve_failure.id and f.resolved_at is null;
  if not found then
    raise exception 'failure % is resolved already', id using errcode = 'RK006';
  end if;
  update rekey.rotations r set rows_failed = greatest(r.rows_failed - 1, 0) where r.id = v_failure.rotation_id;
  if action = 'retry' and v_failure.rotation_id is not null and not exists (
       select from rekey.rotations r where r.keyring_id = v_failure.keyring_id and rekey._is_under_way(r.state) and not r.in_line) then
    perform rekey._refuse_over(v_rotation);
    update rekey.rotations r
    set state = 'queued', attempts = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
    where r.id = v_failure.rotation_id;
  end if;
  perform rekey._audit('rotation.failure_resolved', rekey._keyring_name(v_failure.keyring_id), v_failure.version, v_failure.rotation_id,
    jsonb_build_object('target', v_failure.target, 'row', v_failure.row_key, 'action', action, 'reason', reason));
end
$$;


ALTER FUNCTION rekey.resolve_failure(id bigint, action text, reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION resolve_failure(id bigint, action text, reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.resolve_failure(id bigint, action text, reason text) IS 'Closes an entry of the quarantine. action: retry (the row is tried again; one that the census found, by the next one) or discard (it is given up; it is left as it is). 22023: another action; RK006: resolved already, or a retry in a rotation that is not the last one; RK007: there is none.';


--
-- Name: resume_rotation(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.resume_rotation(id bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state <> 'paused' then
    raise exception 'rotation % is %, not paused', id, v_rotation.state using errcode = 'RK006';
  end if;
  update rekey.rotations r set state = 'queued' where r.id = resume_rotation.id;
  perform rekey._audit('rotation.resumed', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;


ALTER FUNCTION rekey.resume_rotation(id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION resume_rotation(id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.resume_rotation(id bigint) IS 'Lets a paused rotation go on. RK006: it is not paused; RK007: no such rotation.';


--
-- Name: resync_sequences(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.resync_sequences() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey.resync_sequences() OWNER TO rekey_owner;

--
-- Name: FUNCTION resync_sequences(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.resync_sequences() IS 'Moves the sequences of pg_rekey on to where their tables are, and returns how many were behind. After a switch-over by logical replication, which brings rows and no sequences: without it, rotations fail with 23505.';


--
-- Name: retire_keyring(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.retire_keyring(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(name, lock => true);
  v_key rekey.encryption_keys;
  v_rows bigint;
  v_rotation bigint;
begin
  perform rekey._refuse_snapshot();
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired already', quote_literal(name) using errcode = 'RK006';
  end if;
  select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state);
  if found then
    raise exception 'keyring % is under way in rotation %', quote_literal(name), v_rotation using errcode = 'RK004';
  end if;
  select * into v_key from rekey.encryption_keys k where k.keyring_id = v_keyring.id and k.state = 'active' for update;
  -- Held till the end: a writer that comes now finds no active version afterwards.
  if not pg_try_advisory_xact_lock(v_keyring.id, v_key.version) then
    raise exception 'keyring % is in use by an open transaction', quote_literal(name) using errcode = 'RK005',
      hint = format('Waiting for %s', rekey._lock_holders(v_keyring.id, array[v_key.version]));
  end if;
  perform rekey._refuse_blocked();
  select sum(c.rows) into v_rows from rekey._count(array[v_keyring.id], false) c;
  if v_rows > 0 then
    raise exception 'keyring % is in use: % rows', quote_literal(name), v_rows using errcode = 'RK005',
      hint = 'Delete its rows, or move them to another keyring, first.';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now() where k.id = v_key.id;
  update rekey.keyrings k set retired_at = now(), rotated_at = now(), rotate_every = null, next_rotation_at = null where k.id = v_keyring.id;
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'keyring.retired', 'keyring', name),
    jsonb_build_object('event', 'key.deactivated', 'keyring', name, 'version', v_key.version)));
end
$$;


ALTER FUNCTION rekey.retire_keyring(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION retire_keyring(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.retire_keyring(name text) IS 'Retires a keyring that no row uses any more: it takes no new values and is not rotated, and its last version can be destroyed. 25001: not in READ COMMITTED; RK004: a rotation is under way; RK005: rows or open transactions use it; RK006: retired already; RK007: there is none.';


--
-- Name: retry_rotation(bigint); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.retry_rotation(id bigint) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation rekey.rotations;
begin
  v_rotation := rekey._rotation(id);
  if v_rotation.state not in ('failed', 'completed_with_failures') then
    raise exception 'rotation % is %: there is nothing to retry', id, v_rotation.state using errcode = 'RK006';
  end if;
  perform rekey._refuse_over(v_rotation);
  update rekey.rotation_failures f
  set resolved_at = now(), resolution = 'retry', resolved_by = rekey._requester()
  where f.rotation_id = retry_rotation.id and f.resolved_at is null;
  update rekey.rotations r
  set state = 'queued', attempts = 0, rows_failed = 0, next_attempt_at = null, finished_at = null, barrier_at = null, in_line = r.trigger = 'adoption'
  where r.id = retry_rotation.id;
  perform rekey._audit('rotation.retried', rekey._keyring_name(v_rotation.keyring_id), v_rotation.to_version, id);
end
$$;


ALTER FUNCTION rekey.retry_rotation(id bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION retry_rotation(id bigint); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.retry_rotation(id bigint) IS 'Lets a failed rotation go on where it stopped, or tries the rows again that a completed one left in quarantine. RK006: neither failed nor with failures, or not the last one of its keyring; RK007: no such rotation.';


--
-- Name: rollback_rotation(bigint, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.rollback_rotation(id bigint, reason text DEFAULT NULL::text) RETURNS SETOF rekey.rotation_status
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_rotation rekey.rotations;
  v_old rekey.encryption_keys;
  v_new bigint;
begin
  v_rotation := rekey._rotation(id);
  perform rekey._refuse_over(v_rotation);
  if v_rotation.previous_version is null or v_rotation.trigger = 'compromise'
     or v_rotation.state in ('rolled_back', 'superseded') then
    raise exception 'rotation % cannot be rolled back: % after %', id, v_rotation.state, v_rotation.trigger
      using errcode = 'RK006';
  end if;
  v_old := rekey._key(v_rotation.keyring_id, v_rotation.previous_version);
  if v_old.state <> 'decrypt_only' then
    raise exception 'version % is %: it cannot become active again', v_old.version, v_old.state using errcode = 'RK006';
  end if;
  if (select e.state from rekey.keks e where e.id = v_old.kek_id) = 'lost' then
    raise exception 'version % is wrapped under a KEK that is lost', v_old.version using errcode = 'RK006';
  end if;
  update rekey.encryption_keys k set state = 'decrypt_only', deactivated_at = now()
  where k.keyring_id = v_old.keyring_id and k.state = 'active';
  update rekey.encryption_keys k set state = 'active', activated_at = now() where k.id = v_old.id;
  update rekey.keyrings k set rotated_at = now() where k.id = v_old.keyring_id;
  update rekey.rotations r
  set state = 'rolled_back', finished_at = coalesce(r.finished_at, now()), pass_id = null, blocked_by = null, blocked_since = null, next_attempt_at = null
  where r.id = rollback_rotation.id;
  v_new := rekey._queue_sweep(v_old.keyring_id, 'rollback', reason);
  perform rekey._audit_all(jsonb_build_array(
    jsonb_build_object('event', 'rotation.rolled_back', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version,
      'rotation_id', id, 'details', jsonb_strip_nulls(jsonb_build_object('reason', reason))),
    jsonb_build_object('event', 'key.deactivated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_rotation.to_version, 'rotation_id', v_new),
    jsonb_build_object('event', 'key.activated', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new),
    jsonb_build_object('event', 'rotation.requested', 'keyring', rekey._keyring_name(v_rotation.keyring_id), 'version', v_old.version, 'rotation_id', v_new,
      'details', jsonb_build_object('trigger', 'rollback', 'rolls_back', id))));
  return query select s.* from rekey.rotation_status s where s.id = v_new;
end
$$;


ALTER FUNCTION rekey.rollback_rotation(id bigint, reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION rollback_rotation(id bigint, reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.rollback_rotation(id bigint, reason text) IS 'Makes the version before active again, at once, and queues the rotation back, which it returns. Everything stays readable. RK006: not the last rotation of its keyring, after a compromise, or the version before is no longer decrypt_only; RK007: no such rotation.';


--
-- Name: rotate_kek(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.rotate_kek() RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_old_id integer;
  v_old bytea;
  v_new_id integer;
  v_new bytea;
  v_fingerprint text;
  v_iv bytea;
  v_dek bytea;
  v_aad bytea;
  v_wrapped bytea;
  v_key record;
  v_count integer := 0;
begin
  perform from rekey.keks k where k.state = 'active' for update;
  select k.id, k.kek into v_old_id, v_old from rekey._kek() k;
  v_new := rekey._new_kek();
  if v_new is null then
    raise exception 'there is no next KEK: number % is active already, and no other is at hand', v_old_id using errcode = 'RK001',
      hint = 'Give the current and the next one: PG_REKEY_NEW_KEK for pg-rekey, the Vault secret or file with _new appended, or 64 bytes to rekey.unlock().', constraint = 'next_kek';
  end if;
  v_fingerprint := rekey._fingerprint(v_new);
  v_old := rekey._wrapping_key(v_old);
  v_new := rekey._wrapping_key(v_new);
  update rekey.keks set state = 'retired', retired_at = now() where id = v_old_id;
  insert into rekey.keks (fingerprint) values (v_fingerprint) returning id into v_new_id;
  for v_key in
    select k.id, k.keyring_id, k.version, k.wrapped_key from rekey.encryption_keys k
    where k.kek_id = v_old_id and k.state <> 'destroyed'
    order by k.id for update
  loop
    v_aad := rekey._wrap_aad(v_old_id, v_key.keyring_id, v_key.version);
    v_dek := rekey._unwrap(v_old, v_key.wrapped_key, v_aad);
    if v_dek is null then
      raise exception 'version % of keyring % cannot be unwrapped: nothing was changed', v_key.version,
        (select r.name from rekey.keyrings r where r.id = v_key.keyring_id)
        using errcode = 'RK003', hint = 'Its wrapped key is damaged. Restore rekey.encryption_keys from a backup first.';
    end if;
    v_iv := rekey._random_bytes(16);
    v_aad := rekey._wrap_aad(v_new_id, v_key.keyring_id, v_key.version);
    v_wrapped := rekey._wrap(v_new, v_iv, v_dek, v_aad);
    update rekey.encryption_keys set wrapped_key = v_wrapped, kek_id = v_new_id where id = v_key.id;
    v_count := v_count + 1;
  end loop;
  -- One that does not open stays as it is: it can be added again, and holds nobody up.
  for v_key in select e.id, e.sealed from rekey._endpoints e where e.kek_id = v_old_id order by e.id for no key update loop
    v_iv := substr(v_key.sealed, 1, 16);
    v_wrapped := substr(v_key.sealed, 17);
    v_aad := rekey._endpoint_aad(v_old_id, v_key.id);
    v_dek := rekey._aead_decrypt(v_old, v_iv, v_wrapped, v_aad);
    if v_dek is not null then
      v_iv := rekey._random_bytes(16);
      v_aad := rekey._endpoint_aad(v_new_id, v_key.id);
      v_wrapped := rekey._aead_encrypt(v_new, v_iv, v_dek, v_aad);
      update rekey._endpoints set sealed = v_iv || v_wrapped, kek_id = v_new_id where id = v_key.id;
    end if;
  end loop;
  perform rekey._audit('kek.rotated', version => v_new_id,
    details => jsonb_build_object('from', v_old_id, 'fingerprint', v_fingerprint, 'keys', v_count));
  return v_new_id;
end
$$;


ALTER FUNCTION rekey.rotate_kek() OWNER TO rekey_owner;

--
-- Name: FUNCTION rotate_kek(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.rotate_kek() IS 'Wraps every DEK anew under the next KEK, and the addresses of endpoints, in one transaction; no data is touched. Needs the current and the next KEK at hand. Returns the number of the new one. Keep the old one as long as backups. RK001: one is missing; RK003: a wrapped key is damaged.';


--
-- Name: rotate_keys(text, text, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.rotate_keys(keyring text DEFAULT NULL::text, reason text DEFAULT NULL::text, supersede boolean DEFAULT false) RETURNS SETOF rekey.rotation_status
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_ids integer[];
  v_new bigint[];
  v_rotation bigint;
begin
  perform rekey._refuse_hidden();
  if keyring is not null then
    v_keyring := rekey._keyring(keyring);
    if v_keyring.retired_at is not null then
      raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
    end if;
    v_ids := array[v_keyring.id];
  else
    v_ids := array(select k.id from rekey.keyrings k where k.retired_at is null);
  end if;
  v_new := array(select r from rekey._rotate(v_ids, 'manual', reason, coalesce(supersede, false)) r);
  if keyring is null then
    perform rekey._note_passed_by(v_ids, v_new, reason);
  elsif v_new = '{}' then
    select r.id into v_rotation from rekey.rotations r where r.keyring_id = v_keyring.id and rekey._is_under_way(r.state) and not r.in_line;
    raise exception 'keyring % is under way in rotation %', quote_literal(keyring), v_rotation using errcode = 'RK004',
      hint = 'Wait for it, or let this one take its rows along: supersede => true.', constraint = 'supersede';
  end if;
  return query
    select s.* from rekey.rotation_status s
    where s.id = any (v_new)
       or rotate_keys.keyring is null and s.id in (select r.id from rekey.rotations r where rekey._is_under_way(r.state) and not r.in_line)
    order by s.id;
end
$$;


ALTER FUNCTION rekey.rotate_keys(keyring text, reason text, supersede boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION rotate_keys(keyring text, reason text, supersede boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.rotate_keys(keyring text, reason text, supersede boolean) IS 'Rotates: makes a new version of the keyring, active from now on, and queues the re-encryption of its rows, which the worker does. Returns at once. keyring NULL: every keyring; one under way gets no new version: its rotation is returned as it is (created_at is before now()), a warning names it, and the audit log has the reason in rotation.passed_by. reason: for the audit log. supersede: also where a rotation is under way, whose rows this one takes along; an adoption under way has to be asked for again, those in line come after. RK001, RK002: KEK; RK004: under way; RK005: a table of pg_rekey''s may hide rows; RK006: retired; RK007: no such keyring.';


--
-- Name: rotation_step(boolean, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.rotation_step(whole boolean DEFAULT NULL::boolean, who_else text DEFAULT NULL::text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET jit TO 'off'
    SET lock_timeout TO '2 s'
    SET row_security TO 'off'
    AS $$
declare
  v_next timestamptz;
  v_blocked jsonb;
  v_kind text;
begin
  perform rekey._refuse_snapshot();
  keyring_count := 0;
  rows := 0;
  perform rekey._next_in_line();
  if not exists (
       select from rekey.rotations r where r.state in ('queued', 'running', 'verifying') and not r.in_line
         -- An adoption whose keys only pg-rekey columns adopt has.
         and not (r.state = 'running' and r.formats is not null and r.formats <> '{plaintext}' and exists (select from rekey._chunks c where c.pass_id = r.pass_id))) then
    event := 'idle';
    return;
  end if;
  perform from rekey._kek();

  -- What was just asked for, or only waits, comes before the batches: a compromised key does not wait for a long sweep.
  if (exists (
        select from rekey.rotations r
        where rekey._is_due(r.next_attempt_at) and (r.state = 'queued' and not r.in_line or r.state = 'verifying' and r.barrier_at is null))
      or exists (
        select from (select distinct r.pass_id from rekey.rotations r where r.state = 'running' and rekey._is_due(r.next_attempt_at)) p
        where not exists (select from rekey._chunks c where c.pass_id = p.pass_id and c.attempts = 0)))
     and pg_try_advisory_xact_lock(0, 1) then
    select c.event, c.keyring_count, c.detail into event, keyring_count, detail from rekey._coordinate(whole is distinct from false) c;
    if event = 'blocked' then
      v_blocked := detail;
      event := null;
    end if;
  end if;
  if event is null and exists (select from rekey.rotations r where r.state = 'verifying' and r.barrier_at is not null)
     and pg_try_advisory_xact_lock(0, 2) then
    if whole is not distinct from false then
      event := case when exists (
        select from rekey.rotations r
        where r.state = 'verifying' and r.barrier_at is not null and rekey._is_due(r.next_attempt_at)
          and not exists (select from rekey._chunks c where c.pass_id = r.verification_id and c.kind = 'verify')) then 'whole' end;
    else
      select v.event, v.keyring_count, v.rows, v.detail into event, keyring_count, rows, detail from rekey._verify() v;
      if event = 'blocked' then
        v_blocked := detail;
        event := null;
      end if;
    end if;
  end if;
  foreach v_kind in array case when exists (select from rekey._chunks c where c.urgent) then '{sweep,verify}'::text[] else '{verify,sweep}' end loop
    exit when event is not null or whole;
    if v_kind = 'verify' then
      select v.event, v.keyring_count, v.rows, v.wait, v.detail into event, keyring_count, rows, wait, detail from rekey._verify_batch(who_else) v;
    else
      select s.event, s.keyring_count, s.rows, s.wait, s.detail into event, keyring_count, rows, wait, detail from rekey._sweep_batch(who_else) s;
    end if;
  end loop;
  if event is null and v_blocked is not null then
    event := 'blocked';
    detail := v_blocked;
    wait := interval '500 milliseconds';
  end if;
  if event is null then
    -- Something is under way, and nothing to be done now: another worker has it in hand, or its time has not come.
    event := 'waiting';
    select least((select min(r.next_attempt_at) from rekey.rotations r where r.state in ('queued', 'running', 'verifying')),
      (select min(c.next_attempt_at) from rekey._chunks c where not c.stuck)) into v_next;
    wait := greatest(interval '20 milliseconds', least(coalesce(v_next - clock_timestamp(), interval '20 milliseconds'), interval '1 second'));
  end if;
  keyring_count := coalesce(keyring_count, 0);
  rows := coalesce(rows, 0);
exception when sqlstate 'RK001' or sqlstate 'RK002' then
  event := 'locked';
  keyring_count := 0;
  rows := 0;
  wait := interval '10 seconds';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
when deadlock_detected or serialization_failure or lock_not_available or query_canceled then
  -- Outside the batches, whose errors are the rotation's: nothing was done, and the next step does it.
  event := case when sqlstate = '57014' then 'canceled' else 'error' end;
  keyring_count := 0;
  rows := 0;
  wait := interval '1 second';
  detail := jsonb_build_object('error', sqlerrm, 'sqlstate', sqlstate);
end
$$;


ALTER FUNCTION rekey.rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) IS 'One step of the rotations under way, to be committed at once; any number of sessions may step. event: planned, batch, swept, checked, verified, completed, blocked (waits for writers), waiting, locked (no KEK), error, canceled, idle. whole: true, only what reads whole tables, and so may take long; false, only what does not, and the event whole where that is due; NULL, the default: either. who_else: what rekey.who_else() tells the caller; NULL: the step looks for itself. wait: how long the caller may sleep before the next one; NULL: not at all. 25001: not in READ COMMITTED.';


--
-- Name: run_rotations(interval); Type: PROCEDURE; Schema: rekey; Owner: rekey_owner
--

CREATE PROCEDURE rekey.run_rotations(IN max_duration interval DEFAULT '00:00:50'::interval)
    LANGUAGE plpgsql
    AS $$
declare
  v_until timestamptz := pg_catalog.clock_timestamp() operator(pg_catalog.+) max_duration;
  v_step record;
begin
  if v_until is null then
    raise exception 'max_duration is an interval' using errcode = 'invalid_parameter_value';
  end if;
  loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    -- A crash takes back some batches, rows and progress together. What is audited waits for the disk all the same.
    perform pg_catalog.set_config('synchronous_commit', 'off', true);
    select s.event, s.wait into v_step from rekey.rotation_step(who_else => rekey.who_else()) s;
    commit;
    exit when v_step.event operator(pg_catalog.=) any (array['idle', 'locked', 'canceled'])
           or pg_catalog.clock_timestamp() operator(pg_catalog.>=) v_until;
    if v_step.wait is not null then
      perform pg_catalog.pg_sleep_for(v_step.wait);
    end if;
  end loop;
end
$$;


ALTER PROCEDURE rekey.run_rotations(IN max_duration interval) OWNER TO rekey_owner;

--
-- Name: PROCEDURE run_rotations(IN max_duration interval); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON PROCEDURE rekey.run_rotations(IN max_duration interval) IS 'Works on the rotations under way, a commit after each step, until nothing is left, the KEK is missing, or max_duration has passed. Call it outside a transaction.';


--
-- Name: schedule_key_destruction(text, integer, interval); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.schedule_key_destruction(keyring text, version integer, wait interval DEFAULT NULL::interval) RETURNS timestamp with time zone
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_header bytea := rekey._destroyable_header(keyring, version);
begin
  -- Before anything is locked.
  if v_header is not null then
    perform rekey._look_ahead(v_header);
  end if;
  return rekey._schedule_destruction(keyring, version, wait);
end
$$;


ALTER FUNCTION rekey.schedule_key_destruction(keyring text, version integer, wait interval) OWNER TO rekey_owner;

--
-- Name: FUNCTION schedule_key_destruction(keyring text, version integer, wait interval); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.schedule_key_destruction(keyring text, version integer, wait interval) IS 'Schedules a version for destruction and returns the time before which it is not destroyed. wait: 0 to 3650 days; NULL: the setting destroy_wait. Until then it opens nothing, nothing that stands on it can be stored in a protected column, and it can be cancelled. When the time has come, rekey.tick() looks for it in the whole database (rekey.search_status), and destroys it where nothing was found and everything could be read. Warnings tell where this call finds it already, with the rights of the caller, in 2 seconds at most. 25001: not in READ COMMITTED; RK005: something still needs it; RK006: its state does not allow it; RK007: there is none.';


--
-- Name: schedule_worker(text, integer); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.schedule_worker(schedule text DEFAULT NULL::text, workers integer DEFAULT NULL::integer) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_version text;
  v_schedule text;
  v_job bigint;
  v_watch bigint;
  v_helpers bigint[];
begin
  if workers not between 1 and 64 then
    raise exception 'there are 1 to 64 workers' using errcode = 'invalid_parameter_value';
  end if;
  select e.extversion into v_version from pg_extension e where e.extname = 'pg_cron';
  if not found then
    raise exception 'pg_cron is not in this database' using errcode = 'undefined_object',
      hint = format('In the database that cron.database_name names: select cron.schedule_in_database(''pg_rekey'', ''* * * * *'', ''call rekey.tick()'', %L, ''rekey_worker''), and the same as ''pg_rekey_watch'' for ''select rekey.watch()''. Or run pg-rekey work --forever.',
                    current_database()), constraint = 'schedule_worker';
  elsif rekey._trusted_relation('pg_cron', 'cron', 'job', 28) is null
     or rekey._trusted_function('pg_cron', 'cron.schedule(text,text,text)') is null
     or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null
     or rekey._trusted_function('pg_cron', 'cron.alter_job(bigint,text,text,text,text,boolean)') is null then
    raise exception 'cron.job or its functions are not pg_cron''s, or have a trigger of somebody else''s' using errcode = 'undefined_object',
      hint = 'Before pg_cron 1.4 there is no cron.alter_job(): update the extension. Else drop those triggers.';
  end if;
  v_schedule := coalesce(schedule, case when string_to_array(substring(v_version from '^\d+\.\d+'), '.')::integer[] >= '{1,5}' then '10 seconds' else '* * * * *' end);
  -- (Formatted, so that whoever checks all functions does not stumble where pg_cron is missing.)
  -- Looked for by what it does: cron.schedule() finds a job only under the name of its caller.
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'call rekey.tick()' and j.database = current_database() $sql$, 'cron') into v_job;
  begin
    if v_job is null then
      execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_job using 'pg_rekey', v_schedule, 'call rekey.tick()';
    else
      execute format('select %I.alter_job($1::bigint, $2::text, null::text, null::text, null::text, true)', 'cron') using v_job, v_schedule;
    end if;
  exception when invalid_parameter_value or raise_exception or internal_error then
    raise exception 'pg_cron does not take the schedule %: %', quote_literal(v_schedule), sqlerrm using errcode = 'invalid_parameter_value';
  end;
  execute format($sql$ select min(j.jobid) from %I.job j where j.command = 'select rekey.watch()' and j.database = current_database() $sql$, 'cron') into v_watch;
  if v_watch is null then
    execute format('select %I.schedule($1::text, $2::text, $3::text)', 'cron') into v_watch using 'pg_rekey_watch', '* * * * *', 'select rekey.watch()';
  end if;
  -- All but the first do nothing but rotations: what else a tick does is not more with two of them.
  execute format($sql$ select coalesce(array_agg(j.jobid), '{}') from %I.job j where j.command = 'call rekey.run_rotations()' and j.database = current_database() $sql$, 'cron') into v_helpers;
  if cardinality(v_helpers) <> workers - 1 then
    execute format('select count(%I.unschedule(j::bigint)) from unnest($1) j', 'cron') using v_helpers;
    execute format('select coalesce(array_agg(%I.schedule(''pg_rekey_'' || n, $1::text, ''call rekey.run_rotations()''::text)), ''{}'') from generate_series(2, $2) n', 'cron')
    into v_helpers using v_schedule, workers;
  else
    execute format('select count(%I.alter_job(j::bigint, $2::text, null::text, null::text, null::text, true)) from unnest($1) j', 'cron') using v_helpers, v_schedule;
  end if;
  if (select r.rolsuper from pg_roles r where r.rolname = current_user) then
    -- No job of ours runs as a superuser.
    execute 'grant usage on schema cron to rekey_worker';
    execute format('select %I.alter_job(j::bigint, null::text, null::text, null::text, $2::text, null::boolean) from unnest($1) j', 'cron') using array[v_job, v_watch] || v_helpers, 'rekey_worker';
  end if;
  return v_job;
end
$_$;


ALTER FUNCTION rekey.schedule_worker(schedule text, workers integer) OWNER TO rekey_owner;

--
-- Name: FUNCTION schedule_worker(schedule text, workers integer); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.schedule_worker(schedule text, workers integer) IS 'Has pg_cron call rekey.tick(), and returns the number of the job; another one, pg_rekey_watch, calls rekey.watch() every minute. workers: so many (1 to 64) share the rotations, NULL, the default: as many as before, at first one; each but the first is a job pg_rekey_N of its own, which calls rekey.run_rotations(). schedule: as pg_cron takes it; NULL, the default: every 10 seconds, or every minute before pg_cron 1.5. The jobs run as rekey_worker where a superuser calls this, else as the caller. Safe to repeat, with another number of workers too. 42704: pg_cron is not in this database, is older than 1.4, or somebody else''s code would run with it; 22023: it does not take the schedule, or there are not 1 to 64 workers.';


--
-- Name: search_step(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.search_step(OUT event text, OUT wait interval, OUT detail jsonb) RETURNS record
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    SET standard_conforming_strings TO 'on'
    SET bytea_output TO 'hex'
    SET quote_all_identifiers TO 'off'
    SET constraint_exclusion TO 'off'
    SET lock_timeout TO '3 s'
    AS $$
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


ALTER FUNCTION rekey.search_step(OUT event text, OUT wait interval, OUT detail jsonb) OWNER TO rekey_owner;

--
-- Name: FUNCTION search_step(OUT event text, OUT wait interval, OUT detail jsonb); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.search_step(OUT event text, OUT wait interval, OUT detail jsonb) IS 'One step of the search that rekey.begin_search() or rekey.tick() began, in a transaction of its own, with the rights of whoever calls it: reads some blocks of a relation, or looks at everything in the end. event: read, unread (it may not read a relation), rewritten, again, looked, complete; waiting (for wait: detail says for whom); incomplete (what is left takes another role: rekey.search_findings); idle (there is nothing to do). 25001: not in READ COMMITTED.';


--
-- Name: set_schedule(text, interval, timestamp with time zone); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone DEFAULT NULL::timestamp with time zone) RETURNS timestamp with time zone
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings := rekey._keyring(keyring, lock => true);
  v_first timestamptz;
begin
  if v_keyring.retired_at is not null then
    raise exception 'keyring % is retired', quote_literal(keyring) using errcode = 'RK006';
  end if;
  begin
    v_first := coalesce(first_at, now() + rotate_every);
    if rotate_every is null then
      raise check_violation;
    end if;
    update rekey.keyrings k set rotate_every = set_schedule.rotate_every, next_rotation_at = v_first where k.id = v_keyring.id;
  exception when check_violation or datetime_field_overflow then
    raise exception 'a keyring cannot rotate every % from % on', coalesce(rotate_every::text, 'NULL'), coalesce(first_at::text, 'NULL')
      using errcode = 'invalid_parameter_value', hint = 'The interval is between 1 minute and 36500 days, the first time finite.';
  end;
  perform rekey._audit('schedule.changed', keyring,
    details => jsonb_build_object('rotate_every', rotate_every, 'next_rotation_at', v_first));
  return v_first;
end
$$;


ALTER FUNCTION rekey.set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone) OWNER TO rekey_owner;

--
-- Name: FUNCTION set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone) IS 'Has a keyring rotated every so often (its cryptoperiod: 1 minute to 36500 days). first_at: when first; NULL, the default: after one cryptoperiod. Returns that time. 22023: interval or time cannot be; RK006: retired; RK007: there is none.';


--
-- Name: set_secrets(text[], text[], uuid, text, text[]); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.set_secrets(names text[], "values" text[], tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid, keyring text DEFAULT 'default'::text, descriptions text[] DEFAULT NULL::text[]) RETURNS uuid[]
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_generic_plan'
    SET row_security TO 'off'
    AS $$
declare
  v_keyring rekey.keyrings;
  v_name text;
  v_value text;
  v_bytes bytea;
  v_longest integer := 0;
  v_place integer;
  v_sealing rekey._sealing;
  v_known jsonb;
  v_id uuid;
  v_iv bytea;
  v_aad bytea;
  v_envelope bytea;
  v_stored integer;
  v_count integer;
  -- Of the length that they will have: an element that is put behind the last one makes an array anew.
  v_ids uuid[] := array_fill(null::uuid, array[coalesce(cardinality(names), 0)]);
  v_envelopes bytea[] := array_fill(null::bytea, array[coalesce(cardinality(names), 0)]);
begin
  perform rekey._check_tenant(tenant_id);
  v_keyring := rekey._keyring(keyring);
  if v_keyring.tenant_id not in (tenant_id, '00000000-0000-0000-0000-000000000000') then
    raise exception 'the keyring belongs to another tenant' using errcode = 'insufficient_privilege';
  end if;
  if names is null or cardinality("values") is distinct from cardinality(names) or cardinality(descriptions) <> cardinality(names)
     or array_ndims(names) > 1 or array_ndims(descriptions) > 1 or array_lower(names, 1) <> 1 or array_lower(descriptions, 1) <> 1 then
    raise exception 'names, values and descriptions are arrays of one length' using errcode = 'invalid_parameter_value';
  end if;
  foreach v_name in array names loop
    if v_name is null or octet_length(v_name) not between 1 and 255 or v_name ~ '[\u0001-\u001F\u007F]' then
      raise exception 'a secret has a name of 1 to 255 bytes without control characters' using errcode = 'invalid_parameter_value';
    end if;
  end loop;
  if cardinality(names) > 1 and cardinality(names) > (select count(distinct n.name) from unnest(names) as n(name)) then
    raise exception 'a name comes twice' using errcode = 'invalid_parameter_value';
  end if;
  foreach v_value in array "values" loop
    if v_value is null then
      raise exception 'a secret has a value' using errcode = 'invalid_parameter_value', hint = 'rekey.delete_secret() deletes one.', constraint = 'delete_secret';
    end if;
    v_longest := greatest(v_longest, octet_length(convert_to(v_value, 'UTF8')));
  end loop;
  v_sealing := rekey._sealing(v_keyring.id, v_longest);
  loop
    -- The ids first, then the seals: a value sealed for an id that is thrown away could never be opened.
    -- (A subquery for each name, and no join: it may be planned while the table is empty, and stays.)
    select jsonb_object_agg(o.name, o.id) into v_known
    from (select n.name, (select s.id from rekey.secrets s where s.tenant_id = set_secrets.tenant_id and s.name = n.name for no key update) as id
          from (select u.name from unnest(names) as u(name) order by u.name) n
          offset 0) o
    where o.id is not null;
    v_place := 0;
    v_stored := 0;
    foreach v_value in array "values" loop
      v_place := v_place + 1;
      v_name := names[v_place];
      v_id := coalesce((v_known ->> v_name)::uuid, gen_random_uuid());
      v_bytes := convert_to(v_value, 'UTF8');
      v_iv := rekey._random_bytes(16);
      v_aad := v_sealing.header || rekey._secret_context(tenant_id, v_id);
      v_envelope := v_sealing.header || v_iv || rekey._aead_encrypt(v_sealing.key, v_iv, v_bytes, v_aad);
      v_ids[v_place] := v_id;
      if v_known ? v_name then
        update rekey.secrets s
        set ciphertext = v_envelope, keyring_id = v_keyring.id, updated_at = now(),
            description = coalesce(descriptions[v_place], s.description)
        where s.tenant_id = set_secrets.tenant_id and s.id = v_id;
        v_stored := v_stored + 1;
        v_envelope := null;
      end if;
      v_envelopes[v_place] := v_envelope;
    end loop;
    if v_stored < cardinality(names) then
      insert into rekey.secrets (tenant_id, id, name, keyring_id, ciphertext, description)
      select set_secrets.tenant_id, n.id, n.name, v_keyring.id, n.envelope, n.description
      from unnest(v_ids, names, v_envelopes, descriptions) as n(id, name, envelope, description)
      where n.envelope is not null
      on conflict do nothing;
      get diagnostics v_count = row_count;
      v_stored := v_stored + v_count;
    end if;
    exit when v_stored = cardinality(names);  -- else somebody else has stored one of them meanwhile
  end loop;
  return v_ids;
end
$$;


ALTER FUNCTION rekey.set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]) IS 'Stores many secrets of a tenant, as rekey.set_secret() does one, and returns their ids in the order of names. names and values: arrays of one length, descriptions too, or NULL. Sessions that store the same names at once give them in the same order, or may meet in a deadlock (40P01). 22023: a name or value cannot be, or comes twice, or lengths differ; 42501: another tenant; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';


--
-- Name: set_secret(text, text, uuid, text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.set_secret(name text, value text, tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid, keyring text DEFAULT 'default'::text, description text DEFAULT NULL::text) RETURNS uuid
    LANGUAGE sql
    -- in sql/code
;


ALTER FUNCTION rekey.set_secret(name text, value text, tenant_id uuid, keyring text, description text) OWNER TO rekey_owner;

--
-- Name: FUNCTION set_secret(name text, value text, tenant_id uuid, keyring text, description text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.set_secret(name text, value text, tenant_id uuid, keyring text, description text) IS 'Stores a secret under its name, new or in place of the value before, and returns its id. value: at most 32 MiB of UTF-8. keyring: default, or one of the tenant''s own. description: NULL leaves the one that is there. 22023: name or value cannot be; 42501: another tenant; RK001, RK002: KEK; RK006: retired keyring; RK007: no such keyring.';


--
-- Name: set_setting(text, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.set_setting(name text, value text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
  perform rekey._store_setting(name, value);
  if name = 'kek_provider' and value = 'vault' and rekey._is_trusted('supabase_vault', 'pg_class', to_regclass('vault.decrypted_secrets')) then
    if not (has_schema_privilege('rekey_owner', 'vault', 'usage')
            and has_table_privilege('rekey_owner', 'vault.decrypted_secrets', 'select')) then
      grant usage on schema vault to rekey_owner;
      grant select on vault.decrypted_secrets to rekey_owner;
    end if;
    -- Supabase's view decrypts with its reader's rights.
    if rekey._trusted_function('supabase_vault', 'vault._crypto_aead_det_decrypt(bytea,bytea,bigint,bytea,bytea)') is not null
       and not has_function_privilege('rekey_owner', 'vault._crypto_aead_det_decrypt(bytea,bytea,bigint,bytea,bytea)', 'execute') then
      execute 'grant execute on function vault._crypto_aead_det_decrypt(bytea, bytea, bigint, bytea, bytea) to rekey_owner';
    end if;
  elsif name = 'kek_provider' and value = 'file'
        and not has_function_privilege('rekey_owner', 'pg_catalog.pg_read_binary_file(text,bigint,bigint,boolean)', 'execute') then
    grant execute on function pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) to rekey_owner;
  end if;
end
$$;


ALTER FUNCTION rekey.set_setting(name text, value text) OWNER TO rekey_owner;

--
-- Name: FUNCTION set_setting(name text, value text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.set_setting(name text, value text) IS 'Changes a setting (columns of rekey.settings); value NULL: back to its default. With kek_provider vault or file it also grants rekey_owner what reading the KEK there takes, with the rights of the caller. 22023 for a name or value that cannot be.';


--
-- Name: test_endpoint(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.test_endpoint(name text) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_endpoint rekey._endpoints := rekey._endpoint(name);
  v_id bigint;
begin
  insert into rekey._notifications (endpoint_id, event, body)
  values (v_endpoint.id, 'test', rekey._message_body(v_endpoint.kind, 'test', 1, '[]')) returning id into v_id;
  return v_id;
end
$$;


ALTER FUNCTION rekey.test_endpoint(name text) OWNER TO rekey_owner;

--
-- Name: FUNCTION test_endpoint(name text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.test_endpoint(name text) IS 'Puts a test into the queue of an endpoint, whatever its filter; returns the number of the message in rekey.message_status. RK007: there is no such endpoint.';


--
-- Name: tick(); Type: PROCEDURE; Schema: rekey; Owner: rekey_owner
--

CREATE PROCEDURE rekey.tick()
    LANGUAGE plpgsql
    AS $$
declare
  v_begun timestamptz := pg_catalog.clock_timestamp();
  v_duty text;
  v_next text;
begin
  foreach v_duty in array array['schedules', 'destructions', 'census', 'rotations', 'end', 'notifications'] loop
    commit;
    set transaction isolation level read committed;  -- whatever the default of the role or database
    if v_duty operator(pg_catalog.=) 'rotations' then
      call rekey.run_rotations('50 s');
      perform rekey._prune_run_details();
    elsif v_duty operator(pg_catalog.=) 'notifications' then
      perform rekey._tick_duty(v_duty, v_begun);
      commit;
      set transaction isolation level read committed;
      perform rekey._post_by_pg_net();
    else
      v_next := rekey._tick_duty(v_duty, v_begun);
      while v_next is not null and pg_catalog.clock_timestamp() operator(pg_catalog.<) (v_begun operator(pg_catalog.+) interval '50 s') loop
        commit;
        set transaction isolation level read committed;
        if v_next operator(pg_catalog.=) 'search' then
          v_next := rekey._search_on(v_begun);
        else
          v_next := rekey._tick_duty(v_duty, v_begun);
        end if;
      end loop;
    end if;
  end loop;
end
$$;


ALTER PROCEDURE rekey.tick() OWNER TO rekey_owner;

--
-- Name: PROCEDURE tick(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON PROCEDURE rekey.tick() IS 'The unattended work: rotations that are due, their re-encryption for up to 50 seconds, retries, due destructions, once a day a count of all rows, and messages to endpoints. pg_cron or pg-rekey work calls it. Call it outside a transaction.';


--
-- Name: unlock(bytea, text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.unlock(kek bytea, scope text DEFAULT 'transaction'::text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_done record;
begin
  v_done := rekey._unlock(kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;


ALTER FUNCTION rekey.unlock(kek bytea, scope text) OWNER TO rekey_owner;

--
-- Name: FUNCTION unlock(kek bytea, scope text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.unlock(kek bytea, scope text) IS 'Lets this transaction or session use the KEK. kek: 32 bytes, or 64: the current and the next one. scope: transaction (till its end), session (till rekey.lock(); not behind a transaction pooler) or replacement (as transaction, for a KEK that is to replace a lost one). Returns the fingerprint. A bind parameter may be logged by the server: rekey.unlock_copied() avoids that. RK002: it is not the active KEK; 22023: wrong length or scope.';


--
-- Name: unlock_copied(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.unlock_copied(scope text DEFAULT 'transaction'::text) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_kek bytea;
  v_done record;
begin
  -- Dynamic, so that whoever checks all functions does not stumble over a table that is there only for the moment.
  execute format('select string_agg(k.kek, ''''::bytea order by k.ctid) from pg_temp.%I k', 'pg_rekey_kek') into v_kek;
  v_done := rekey._unlock(v_kek, scope);
  perform rekey._refuse_unlock(v_done.problem);
  return v_done.fingerprint;
end
$$;


ALTER FUNCTION rekey.unlock_copied(scope text) OWNER TO rekey_owner;

--
-- Name: FUNCTION unlock_copied(scope text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.unlock_copied(scope text) IS 'As rekey.unlock(), with the KEK from the temporary table pg_rekey_kek (kek bytea), which a binary COPY filled and no log shows: one row, or two: the current and the next KEK. A standby takes no temporary tables: there, a provider or rekey.unlock() brings the KEK. 42P01 without that table.';


--
-- Name: unprotect_column(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.unprotect_column(label text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
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


ALTER FUNCTION rekey.unprotect_column(label text) OWNER TO rekey_owner;

--
-- Name: FUNCTION unprotect_column(label text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.unprotect_column(label text) IS 'Forgets a protected column whose table or column was dropped, by its label. RK006: it is there; RK007: not protected.';


--
-- Name: unprotect_column(regclass, name, boolean); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.unprotect_column(target regclass, column_name name, decrypt boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_released record;
  v_statement text;
  v_count bigint;
  v_decrypted bigint := 0;
begin
  select * into v_released from rekey._release_column(target, column_name, coalesce(decrypt, false));
  if exists (select from pg_trigger t where t.tgrelid = target and t.tgname = format('zz_pg_rekey_%s', v_released.id)) then
    execute format('drop trigger zz_pg_rekey_%s on %s', v_released.id, target);
  end if;
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


ALTER FUNCTION rekey.unprotect_column(target regclass, column_name name, decrypt boolean) OWNER TO rekey_owner;

--
-- Name: FUNCTION unprotect_column(target regclass, column_name name, decrypt boolean); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.unprotect_column(target regclass, column_name name, decrypt boolean) IS 'Ends the protection of a column. decrypt: rows that are encrypted are decrypted, at most 5,000 of each partition at a call, which returns how many: repeat it, each in its own transaction, until it returns 0. The owner of the table calls it, as a member of rekey_admin, or a superuser; but to decrypt in a session of a superuser is refused, unless one owns the table: its triggers would run with his rights. 25001: not in READ COMMITTED; 42501: not the owner, a superuser, or not rekey_app; RK003: a row does not open; RK004: it is being adopted; RK005: rows are encrypted, or it is blocked; RK007: not protected.';


--
-- Name: unschedule_worker(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.unschedule_worker() RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
  v_count integer := 0;
  v_job bigint;
begin
  if rekey._trusted_relation('pg_cron', 'cron', 'job', 8) is null or rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is null then
    return false;
  end if;
  for v_job in execute format($sql$ select j.jobid from %I.job j where j.command in ('call rekey.tick()', 'call rekey.run_rotations()', 'select rekey.watch()') and j.database = current_database() $sql$, 'cron') loop
    execute format('select %I.unschedule($1::bigint)', 'cron') using v_job;
    v_count := v_count + 1;
  end loop;
  return v_count > 0;
end
$_$;


ALTER FUNCTION rekey.unschedule_worker() OWNER TO rekey_owner;

--
-- Name: FUNCTION unschedule_worker(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.unschedule_worker() IS 'Ends the pg_cron jobs of rekey.schedule_worker(); false where there was none.';


--
-- Name: verify_audit_log(jsonb); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.verify_audit_log(anchor jsonb DEFAULT NULL::jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) RETURNS record
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $_$
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
$_$;


ALTER FUNCTION rekey.verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) OWNER TO rekey_owner;

--
-- Name: FUNCTION verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) IS 'Checks the chain of the audit log, from its beginning, or from where rekey.prune_audit_log() removed entries; of those that stayed from before, that they are all there and unchanged. valid: whether it holds; entries: how many there are; first_bad and reason: the first one that does not fit. anchor: an earlier result of rekey.audit_checkpoint(), kept elsewhere; without one, a chain that was computed anew is not found out. An anchor from before the entries that were removed is not valid by itself: pg-rekey audit verify --archive takes the files that these are in. 22023 for an anchor that is none.';


--
-- Name: verify_ciphertexts(text); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.verify_ciphertexts(keyring text DEFAULT NULL::text) RETURNS SETOF rekey.verified_rows
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
declare
  v_ids integer[] := case when verify_ciphertexts.keyring is not null then array[(rekey._keyring(verify_ciphertexts.keyring)).id] end;
begin
  return query
    select c.relation::text, r.name, c.version, sum(c.rows)::bigint, sum(c.failed)::bigint
    from rekey._count(v_ids, true) c
    join rekey.keyrings r on r.id = c.keyring_id
    group by 1, 2, 3
    order by 1, 2, 3;
end
$$;


ALTER FUNCTION rekey.verify_ciphertexts(keyring text) OWNER TO rekey_owner;

--
-- Name: FUNCTION verify_ciphertexts(keyring text); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.verify_ciphertexts(keyring text) IS 'Checks that every protected row opens, and shows nothing of what is in it. keyring NULL: all. RK001, RK002: KEK; RK005: a target is blocked; RK007: no such keyring.';


--
-- Name: version(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.version() RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path TO 'pg_catalog', 'pg_temp'
    -- in sql/code
;


ALTER FUNCTION rekey.version() OWNER TO rekey_owner;

--
-- Name: FUNCTION version(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.version() IS 'Version of pg_rekey in this database.';


--
-- Name: watch(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.watch() RETURNS integer
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_step record;
  v_count integer := 0;
begin
  for v_step in select s.pid, s.since from rekey._steps_in_hand() s where s.overdue and s.pid <> pg_backend_pid() loop
    begin
      -- Looked at again: it may have ended since.
      if exists (select from rekey._steps_in_hand() s where s.pid = v_step.pid and s.since = v_step.since) then
        -- Who catches that it is cancelled, and goes on, is ended.
        v_count := v_count + case when clock_timestamp() - v_step.since > 5 * rekey._step_limit() then pg_terminate_backend(v_step.pid) else pg_cancel_backend(v_step.pid) end::integer;
      end if;
    exception when insufficient_privilege then
      null;  -- a worker of another role
    end;
  end loop;
  return v_count;
end
$$;


ALTER FUNCTION rekey.watch() OWNER TO rekey_owner;

--
-- Name: FUNCTION watch(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.watch() IS 'Cancels batches that take longer than the setting step_limit, as far as they are sessions of the caller''s roles, and returns how many. One that goes on for five times as long is ended. The job of pg_cron beside rekey.tick() calls it; pg-rekey work has a limit of its own.';


--
-- Name: who_else(); Type: FUNCTION; Schema: rekey; Owner: rekey_owner
--

CREATE FUNCTION rekey.who_else() RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
declare
  v_sessions bigint;
begin
  if not pg_has_role('pg_read_all_stats', 'usage') then
    return null;
  end if;
  select count(*) into v_sessions
  from pg_stat_activity a
  where a.backend_type = 'client backend' and a.pid <> pg_backend_pid() and a.application_name not in ('pg-rekey', 'pg-rekey serve', 'pg_cron')
    and (a.state = 'active' or a.state_change > clock_timestamp() - interval '1 second');
  return case when v_sessions > 0 then format('%s active sessions', v_sessions) else '' end;
end
$$;


ALTER FUNCTION rekey.who_else() OWNER TO rekey_owner;

--
-- Name: FUNCTION who_else(); Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey.who_else() IS 'Who else used this server within the last second, in words, for rekey.rotation_step(); empty: nobody; NULL: the caller is no member of pg_read_all_stats, and may not see it.';


--
-- Name: secrets_count(regclass, integer[]); Type: FUNCTION; Schema: rekey_targets; Owner: rekey_owner
--

CREATE FUNCTION rekey_targets.secrets_count(relation regclass, keyrings integer[]) RETURNS TABLE(keyring_id integer, version integer, rows bigint)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_custom_plan'
    SET row_security TO 'off'
    AS $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  return query
    select s.keyring_id, s.key_version, count(*)
    from rekey.secrets s
    where keyrings is null or s.keyring_id = any (keyrings)
    group by s.keyring_id, s.key_version;
end
$$;


ALTER FUNCTION rekey_targets.secrets_count(relation regclass, keyrings integer[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION secrets_count(relation regclass, keyrings integer[]); Type: COMMENT; Schema: rekey_targets; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey_targets.secrets_count(relation regclass, keyrings integer[]) IS 'Counts rekey.secrets by keyring and version; keyrings NULL: all.';


--
-- Name: secrets_read(regclass, tid, tid, integer[], integer[], integer, bigint); Type: FUNCTION; Schema: rekey_targets; Owner: rekey_owner
--

CREATE FUNCTION rekey_targets.secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_custom_plan'
    SET row_security TO 'off'
    AS $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with due as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    join unnest(keyrings, versions) as w(keyring_id, version) on w.keyring_id = s.keyring_id and w.version <> s.key_version
    where s.ctid >= first and s.ctid < until
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(d.ciphertext)) as bytes from due d
  ), sized as (
    select d.*, 0 as before from due d where (select t.bytes from total t) <= max_bytes
    union all
    select d.*, sum(octet_length(d.ciphertext)) over (order by d.row rows unbounded preceding) - octet_length(d.ciphertext)
    from due d where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes)
  into next, rows, ciphertexts, contexts, keys
  from sized s;
end
$$;


ALTER FUNCTION rekey_targets.secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: COMMENT; Schema: rekey_targets; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey_targets.secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) IS 'Rows of rekey.secrets in a range that stand on another version than the given one of their keyring; as secrets_scan, and without locks.';


--
-- Name: secrets_scan(regclass, tid, tid, integer[], xid, integer, bigint); Type: FUNCTION; Schema: rekey_targets; Owner: rekey_owner
--

CREATE FUNCTION rekey_targets.secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) RETURNS record
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET plan_cache_mode TO 'force_custom_plan'
    SET row_security TO 'off'
    AS $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  with found as materialized (
    select s.ctid as row, s.tenant_id::text as tenant_id, s.id::text as id,
      case when octet_length(s.ciphertext) <= 67108864 then s.ciphertext else substr(s.ciphertext, 1, 11) || '\x6c61726765' end as ciphertext
    from rekey.secrets s
    where s.ctid >= first and s.ctid < until and (keyrings is null or s.keyring_id = any (keyrings))
      and (since is null or age(s.xmin) <= age(since))
    order by s.ctid
    limit max_rows
  ), total as (
    select sum(octet_length(f.ciphertext)) as bytes from found f
  ), sized as (
    select f.*, 0 as before from found f where (select t.bytes from total t) <= max_bytes
    union all
    select f.*, sum(octet_length(f.ciphertext)) over (order by f.row rows unbounded preceding) - octet_length(f.ciphertext)
    from found f where (select t.bytes from total t) > max_bytes
  )
  -- The arrays are in whatever order, but all in the same. 36 characters: as rekey._part() has it, in one go.
  select case when count(*) filter (where s.before < max_bytes) < count(*) or count(*) = max_rows then
      max(s.row) filter (where s.before < max_bytes) end,
    array_agg(s.row) filter (where s.before < max_bytes),
    array_agg(s.ciphertext) filter (where s.before < max_bytes),
    array_agg('\x00000024'::bytea || convert_to(s.tenant_id, 'UTF8') || '\x00000024'::bytea || convert_to(s.id, 'UTF8')) filter (where s.before < max_bytes),
    array_agg(s.tenant_id || '/' || s.id) filter (where s.before < max_bytes)
  into next, rows, ciphertexts, contexts, keys
  from sized s;
end
$$;


ALTER FUNCTION rekey_targets.secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) OWNER TO rekey_owner;

--
-- Name: FUNCTION secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: COMMENT; Schema: rekey_targets; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey_targets.secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) IS 'Rows of rekey.secrets whose row pointer lies from first on and before until: at most max_rows of them, and little more than max_bytes of ciphertext. since: only what this transaction or a later one wrote; NULL: all. contexts: without the label. next: the last row returned, where more may follow; NULL at the end of the range.';


--
-- Name: secrets_write(regclass, tid[], bytea[], bytea[]); Type: FUNCTION; Schema: rekey_targets; Owner: rekey_owner
--

CREATE FUNCTION rekey_targets.secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint) RETURNS record
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    SET row_security TO 'off'
    AS $$
begin
  if relation <> 'rekey.secrets'::regclass then
    raise exception '% is not rekey.secrets', relation using errcode = 'RK005';
  end if;
  -- (A subselect hides from the planner how many rows there are: it would rather read the whole table than follow so many pointers.
  -- IS TRUE keeps what a value begins with from being the key of a join, for which every value would be read.)
  with held as materialized (
    select u.row, s.ctid as now
    from unnest((select secrets_write.rows), (select secrets_write.starts)) as u(row, start)
    join rekey.secrets s on s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true
    for no key update of s skip locked
  )
  select array_agg(h.row) into locked from held h where h.now = h.row;
  if cardinality(locked) < cardinality(rows) then
    select array_agg(u.row), array_agg(u.start), array_agg(u.ciphertext) into rows, starts, ciphertexts
    from unnest(rows, starts, ciphertexts) as u(row, start, ciphertext) where u.row = any (locked);
  end if;
  update rekey.secrets s set ciphertext = u.ciphertext
  from rows from (unnest((select secrets_write.rows)), unnest((select secrets_write.starts)), unnest((select ciphertexts))) as u(row, start, ciphertext)
  where locked is not null and s.ctid = u.row and (substr(s.ciphertext, 1, 27) = u.start) is true;
  get diagnostics written = row_count;
  set constraints all immediate;
end
$$;


ALTER FUNCTION rekey_targets.secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint) OWNER TO rekey_owner;

--
-- Name: FUNCTION secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint); Type: COMMENT; Schema: rekey_targets; Owner: rekey_owner
--

COMMENT ON FUNCTION rekey_targets.secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint) IS 'Locks the rows that secrets_read returned in this statement, but those that somebody else has locked or changed, and stores new ciphertexts in them. starts: header and IV (27 bytes) of what was read. locked: the rows that it had; written: how many were changed.';


--
-- Name: _chunks_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey._chunks ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey._chunks_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: _endpoints_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey._endpoints ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey._endpoints_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: _notifications_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey._notifications ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey._notifications_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: _pass_id; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

CREATE SEQUENCE rekey._pass_id
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


ALTER TABLE rekey._pass_id OWNER TO rekey_owner;

--
-- Name: _search_finds; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._search_finds (
    search_id bigint NOT NULL,
    relation oid NOT NULL,
    attnum smallint NOT NULL,
    keyring_id integer NOT NULL,
    version integer NOT NULL,
    relation_name text NOT NULL,
    column_name name NOT NULL,
    rows bigint NOT NULL
);


ALTER TABLE rekey._search_finds OWNER TO rekey_owner;

--
-- Name: TABLE _search_finds; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._search_finds IS 'Columns in which a search found envelopes of the versions that it looks for.';


--
-- Name: _search_versions; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._search_versions (
    search_id bigint NOT NULL,
    keyring_id integer NOT NULL,
    version integer NOT NULL,
    rows bigint
);


ALTER TABLE rekey._search_versions OWNER TO rekey_owner;

--
-- Name: TABLE _search_versions; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._search_versions IS 'Versions that a search looks for: they were scheduled for destruction before it began, and are since. rows: those of protected columns and secrets, once they are counted.';


--
-- Name: _searches_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey._searches ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey._searches_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: _sweeping; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._sweeping (
    transaction xid8 NOT NULL,
    relation regclass NOT NULL
);


ALTER TABLE rekey._sweeping OWNER TO rekey_owner;

--
-- Name: TABLE _sweeping; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._sweeping IS 'What rekey.is_sweeping() goes by: into which relation this transaction writes a batch of a rotation now.';


--
-- Name: _told; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey._told (
    event text NOT NULL,
    subject text NOT NULL
);


ALTER TABLE rekey._told OWNER TO rekey_owner;

--
-- Name: TABLE _told; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey._told IS 'Conditions that hold now and were told of.';


--
-- Name: census_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.census_status AS
 -- in sql/code
;


ALTER TABLE rekey.census_status OWNER TO rekey_owner;

--
-- Name: VIEW census_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.census_status IS 'What the last census (rekey.worker_status.last_census_at) found not to be as it should be. rekey.findings() looks now, but does not count rows.';


--
-- Name: COLUMN census_status.kind; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.kind IS 'unopenable, destroyed, unknown (rows that do not open: damaged, on a version that is destroyed, or that there is not), uncounted, or as rekey.findings().';


--
-- Name: COLUMN census_status.severity; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.severity IS 'critical or warning.';


--
-- Name: COLUMN census_status.target; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.target IS 'Protected column, table or sequence.';


--
-- Name: COLUMN census_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.keyring IS 'Keyring of the rows.';


--
-- Name: COLUMN census_status.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.version IS 'Their key version.';


--
-- Name: COLUMN census_status.rows; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.rows IS 'How many rows; NULL: it is not about rows.';


--
-- Name: COLUMN census_status.finding; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.finding IS 'What was found.';


--
-- Name: COLUMN census_status.advice; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.advice IS 'What to do about it.';


--
-- Name: COLUMN census_status.since; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.census_status.since IS 'Which census found it first.';


--
-- Name: column_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.column_status AS
 -- in sql/code
;


ALTER TABLE rekey.column_status OWNER TO rekey_owner;

--
-- Name: VIEW column_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.column_status IS 'The protected columns, and whether each can be swept.';


--
-- Name: COLUMN column_status.label; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.label IS 'schema.table.column as first registered: the first part of the context of its values.';


--
-- Name: COLUMN column_status.relation; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.relation IS 'Its table now; NULL: it was dropped, or its functions were not restored.';


--
-- Name: COLUMN column_status.column_name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.column_name IS 'Its name now.';


--
-- Name: COLUMN column_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.keyring IS 'Its keyring.';


--
-- Name: COLUMN column_status.context_columns; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.context_columns IS 'The columns whose values are the rest of the context, as registered.';


--
-- Name: COLUMN column_status.encrypt_on_write; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.encrypt_on_write IS 'Whether a trigger encrypts what is written.';


--
-- Name: COLUMN column_status.fire_triggers; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.fire_triggers IS 'Whether rotations fire the triggers and rules of the table.';


--
-- Name: COLUMN column_status.search_path; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.search_path IS 'The search path that these run with.';


--
-- Name: COLUMN column_status.problem; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.column_status.problem IS 'Why it is blocked, and what to do; NULL: it is not.';


--
-- Name: secrets; Type: TABLE; Schema: rekey; Owner: rekey_owner
--

CREATE TABLE rekey.secrets (
    tenant_id uuid DEFAULT '00000000-0000-0000-0000-000000000000'::uuid NOT NULL,
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    name text NOT NULL,
    keyring_id integer NOT NULL,
    ciphertext bytea NOT NULL,
    key_version integer GENERATED ALWAYS AS (((((get_byte(ciphertext, 7) << 24) | (get_byte(ciphertext, 8) << 16)) | (get_byte(ciphertext, 9) << 8)) | get_byte(ciphertext, 10))) STORED NOT NULL,
    description text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT secrets_ciphertext_check CHECK (((octet_length(ciphertext) >= 75) AND (substr(ciphertext, 1, 7) = ('\x524b01'::bytea || int4send(keyring_id))))),
    CONSTRAINT secrets_name_check CHECK ((((octet_length(name) >= 1) AND (octet_length(name) <= 255)) AND (name !~ '[\u0001-\u001F\u007F]'::text)))
)
WITH (fillfactor='50');
ALTER TABLE ONLY rekey.secrets ALTER COLUMN ciphertext SET STORAGE EXTERNAL;


ALTER TABLE rekey.secrets OWNER TO rekey_owner;

--
-- Name: TABLE secrets; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON TABLE rekey.secrets IS 'Secrets, encrypted. Write with rekey.set_secret(), read with rekey.get_secret(). Half of each page is left free, so that a rotation updates in place.';


--
-- Name: COLUMN secrets.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.tenant_id IS 'Tenant; the nil UUID where there is only one.';


--
-- Name: COLUMN secrets.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.id IS 'Identity of the secret within the tenant; part of what its ciphertext is bound to.';


--
-- Name: COLUMN secrets.name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.name IS 'Name, unique within the tenant, 1 to 255 bytes without control characters.';


--
-- Name: COLUMN secrets.keyring_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.keyring_id IS 'Keyring it is encrypted with.';


--
-- Name: COLUMN secrets.ciphertext; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.ciphertext IS 'Envelope of format 1 (docs/format.md), bound to (secret, tenant_id, id).';


--
-- Name: COLUMN secrets.key_version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.key_version IS 'Key version, read from the envelope.';


--
-- Name: COLUMN secrets.description; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.description IS 'Free text, not encrypted.';


--
-- Name: COLUMN secrets.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.created_at IS 'When the secret was made.';


--
-- Name: COLUMN secrets.updated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.secrets.updated_at IS 'When its value last changed; a rotation leaves it.';


--
-- Name: decrypted_secrets; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.decrypted_secrets WITH (security_invoker='true') AS
 -- in sql/code
;


ALTER TABLE rekey.decrypted_secrets OWNER TO rekey_owner;

--
-- Name: VIEW decrypted_secrets; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.decrypted_secrets IS 'The secrets of the tenants that the caller reaches, with their values, opened one by one: select by name. rekey.read_secrets() is faster for many.';


--
-- Name: COLUMN decrypted_secrets.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.tenant_id IS 'Tenant of the secret.';


--
-- Name: COLUMN decrypted_secrets.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.id IS 'Its identity within the tenant.';


--
-- Name: COLUMN decrypted_secrets.name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.name IS 'Its name.';


--
-- Name: COLUMN decrypted_secrets.value; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.value IS 'Its value, opened.';


--
-- Name: COLUMN decrypted_secrets.description; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.description IS 'Free text, not encrypted.';


--
-- Name: COLUMN decrypted_secrets.key_version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.key_version IS 'Key version it stands on.';


--
-- Name: COLUMN decrypted_secrets.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.created_at IS 'When it was made.';


--
-- Name: COLUMN decrypted_secrets.updated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.decrypted_secrets.updated_at IS 'When its value last changed.';


--
-- Name: encryption_keys_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.encryption_keys ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey.encryption_keys_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: endpoint_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.endpoint_status AS
 -- in sql/code
;


ALTER TABLE rekey.endpoint_status OWNER TO rekey_owner;

--
-- Name: VIEW endpoint_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.endpoint_status IS 'Who is told what happens, and whether that works. Addresses are not shown.';


--
-- Name: COLUMN endpoint_status.name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.name IS 'Name of the endpoint.';


--
-- Name: COLUMN endpoint_status.kind; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.kind IS 'webhook, slack, email or channel.';


--
-- Name: COLUMN endpoint_status.events; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.events IS 'Events that it is told of; NULL: all.';


--
-- Name: COLUMN endpoint_status.allow_private; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.allow_private IS 'Whether its address may be a loopback or private one.';


--
-- Name: COLUMN endpoint_status.by_pg_net; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.by_pg_net IS 'Whether pg_net may send to it.';


--
-- Name: COLUMN endpoint_status.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.created_at IS 'When it was added.';


--
-- Name: COLUMN endpoint_status.waiting; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.waiting IS 'Messages that wait to be delivered, 1000 at most.';


--
-- Name: COLUMN endpoint_status.dead; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.dead IS 'Messages that were given up, of the last 1000.';


--
-- Name: COLUMN endpoint_status.last_delivered_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.last_delivered_at IS 'When a message was last delivered.';


--
-- Name: COLUMN endpoint_status.failing_since; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.failing_since IS 'Since when a message that was tried waits; NULL: none does.';


--
-- Name: COLUMN endpoint_status.last_error; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.last_error IS 'What went wrong with it last; NULL: nothing.';


--
-- Name: COLUMN endpoint_status.problem; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.endpoint_status.problem IS 'Why its address cannot be opened: remove it and add it again; NULL: it can, by who has the KEK.';


--
-- Name: failure_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.failure_status AS
 -- in sql/code
;


ALTER TABLE rekey.failure_status OWNER TO rekey_owner;

--
-- Name: VIEW failure_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.failure_status IS 'The quarantine: rows that did not open, or that their table did not let a rotation change. resolution: NULL while it is open, then retry, discard, or cleared (the row opens again, or is gone).';


--
-- Name: COLUMN failure_status.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.id IS 'Number of the entry.';


--
-- Name: COLUMN failure_status.rotation_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.rotation_id IS 'Last rotation in which the row failed; NULL: the census found it, and no rotation has met it.';


--
-- Name: COLUMN failure_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.keyring IS 'Keyring of the row.';


--
-- Name: COLUMN failure_status.target; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.target IS 'Table as it was registered.';


--
-- Name: COLUMN failure_status.row_key; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.row_key IS 'Primary key of the row, its parts separated by a slash.';


--
-- Name: COLUMN failure_status.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.version IS 'Key version that the row names.';


--
-- Name: COLUMN failure_status.reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.reason IS 'Why it does not open, or the error with which its table refused the new value.';


--
-- Name: COLUMN failure_status.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.created_at IS 'When that was noticed.';


--
-- Name: COLUMN failure_status.resolved_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.resolved_at IS 'When the entry was closed.';


--
-- Name: COLUMN failure_status.resolution; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.resolution IS 'How: retry, discard, or cleared; NULL: it is open.';


--
-- Name: COLUMN failure_status.resolved_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.resolved_by IS 'Who closed it.';


--
-- Name: COLUMN failure_status.resolve_reason; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.resolve_reason IS 'What he said.';


--
-- Name: COLUMN failure_status.relation; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.relation IS 'Table or partition that the row is in.';


--
-- Name: COLUMN failure_status.sqlstate; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.failure_status.sqlstate IS 'SQLSTATE of that error; NULL: the row does not open.';


--
-- Name: keks_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.keks ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey.keks_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: key_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.key_status AS
 -- in sql/code
;


ALTER TABLE rekey.key_status OWNER TO rekey_owner;

--
-- Name: VIEW key_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.key_status IS 'Every key version, its state and its times. kek_state lost: it cannot be opened any more.';


--
-- Name: COLUMN key_status.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.keyring IS 'Name of the keyring.';


--
-- Name: COLUMN key_status.tenant_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.tenant_id IS 'Its tenant.';


--
-- Name: COLUMN key_status.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.version IS 'Version within the keyring.';


--
-- Name: COLUMN key_status.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.state IS 'SP 800-57 state, as in rekey.encryption_keys.';


--
-- Name: COLUMN key_status.kek_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.kek_id IS 'Number of the KEK that wraps it.';


--
-- Name: COLUMN key_status.kek_state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.kek_state IS 'State of that KEK.';


--
-- Name: COLUMN key_status.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.created_at IS 'When it was made.';


--
-- Name: COLUMN key_status.activated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.activated_at IS 'When it last became active.';


--
-- Name: COLUMN key_status.deactivated_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.deactivated_at IS 'When it last ceased to be active.';


--
-- Name: COLUMN key_status.compromised_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.compromised_at IS 'When it was marked compromised.';


--
-- Name: COLUMN key_status.destroy_after; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.destroy_after IS 'Before this time it is not destroyed.';


--
-- Name: COLUMN key_status.destroyed_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.key_status.destroyed_at IS 'When its wrapped key was overwritten.';


--
-- Name: message_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.message_status AS
 -- in sql/code
;


ALTER TABLE rekey.message_status OWNER TO rekey_owner;

--
-- Name: VIEW message_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.message_status IS 'Messages to endpoints: those that wait, and of each endpoint the last 1000 that were delivered or given up.';


--
-- Name: COLUMN message_status.id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.id IS 'Number of the message.';


--
-- Name: COLUMN message_status.endpoint; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.endpoint IS 'Endpoint that it goes to.';


--
-- Name: COLUMN message_status.event; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.event IS 'What it tells of.';


--
-- Name: COLUMN message_status.text; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.text IS 'What it says.';


--
-- Name: COLUMN message_status.created_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.created_at IS 'When it was made.';


--
-- Name: COLUMN message_status.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.state IS 'waiting, delivered or dead (given up).';


--
-- Name: COLUMN message_status.attempts; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.attempts IS 'How often it was tried.';


--
-- Name: COLUMN message_status.next_attempt_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.next_attempt_at IS 'It is tried again after this time; NULL: it does not wait.';


--
-- Name: COLUMN message_status.ended_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.ended_at IS 'When it was delivered or given up.';


--
-- Name: COLUMN message_status.last_error; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.last_error IS 'What went wrong last.';


--
-- Name: COLUMN message_status.message_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.message_id IS 'What the header webhook-id has, after msg_: the same whenever it is sent again.';


--
-- Name: COLUMN message_status.request_id; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.message_status.request_id IS 'Number that pg_net gave it.';


--
-- Name: protected_columns_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.protected_columns ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey.protected_columns_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: rotation_failures_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.rotation_failures ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey.rotation_failures_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: rotations_id_seq; Type: SEQUENCE; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.rotations ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME rekey.rotations_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: search_findings; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.search_findings AS
 -- in sql/code
;


ALTER TABLE rekey.search_findings OWNER TO rekey_owner;

--
-- Name: VIEW search_findings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.search_findings IS 'What keeps versions from being destroyed: relations that the last search could not read, and where it found envelopes.';


--
-- Name: COLUMN search_findings.relation; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.relation IS 'The table or materialized view.';


--
-- Name: COLUMN search_findings.column_name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.column_name IS 'The column that holds envelopes; NULL: the relation was not read.';


--
-- Name: COLUMN search_findings.keyring; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.keyring IS 'Keyring of the version that was found.';


--
-- Name: COLUMN search_findings.version; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.version IS 'The version.';


--
-- Name: COLUMN search_findings.rows; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.rows IS 'Rows in which it was found.';


--
-- Name: COLUMN search_findings.problem; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.problem IS 'What is wrong.';


--
-- Name: COLUMN search_findings.role; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.role IS 'Role that could not read it.';


--
-- Name: COLUMN search_findings.advice; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_findings.advice IS 'What to do.';


--
-- Name: search_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.search_status AS
 -- in sql/code
;


ALTER TABLE rekey.search_status OWNER TO rekey_owner;

--
-- Name: VIEW search_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.search_status IS 'The last search of the database for envelopes of versions that are to be destroyed, and how far it is. No row: there was none.';


--
-- Name: COLUMN search_status.state; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.state IS 'reading (relations of some size, by turns), looking (waits for older transactions, then looks at everything in one snapshot), incomplete (what is left takes another role: rekey.search_findings), complete.';


--
-- Name: COLUMN search_status.scope; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.scope IS 'Where it looks: the setting destroy_search when it began.';


--
-- Name: COLUMN search_status.begun_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.begun_at IS 'When it began.';


--
-- Name: COLUMN search_status.completed_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.completed_at IS 'When it ended; NULL: it is under way.';


--
-- Name: COLUMN search_status.versions; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.versions IS 'Key versions that it looks for.';


--
-- Name: COLUMN search_status.relations_read; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.relations_read IS 'Relations that are read by turns, those that have been. (Small ones are left to the look.)';


--
-- Name: COLUMN search_status.relations; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.relations IS 'Relations that are read by turns, all.';


--
-- Name: COLUMN search_status.bytes_read; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.bytes_read IS 'Their size, as far as they have been read.';


--
-- Name: COLUMN search_status.bytes; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.bytes IS 'Their size.';


--
-- Name: COLUMN search_status.not_read; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.not_read IS 'Relations that could not be read: rekey.search_findings.';


--
-- Name: COLUMN search_status.versions_found; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.versions_found IS 'Of the versions, those that it found.';


--
-- Name: COLUMN search_status.blocked_by; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.blocked_by IS 'The transactions that it waits for: pid or name of a prepared transaction, role, age in seconds (of a pid, where who reads this may see it).';


--
-- Name: COLUMN search_status.blocked_since; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.search_status.blocked_since IS 'Since when it waits for them.';


--
-- Name: setting_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.setting_status AS
 -- in sql/code
;


ALTER TABLE rekey.setting_status OWNER TO rekey_owner;

--
-- Name: VIEW setting_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.setting_status IS 'The settings: name, value, and what it means.';


--
-- Name: COLUMN setting_status.name; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.setting_status.name IS 'Name of the setting.';


--
-- Name: COLUMN setting_status.value; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.setting_status.value IS 'Its value as text; NULL: none.';


--
-- Name: COLUMN setting_status.description; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.setting_status.description IS 'What it means.';


--
-- Name: worker_status; Type: VIEW; Schema: rekey; Owner: rekey_owner
--

CREATE VIEW rekey.worker_status AS
 -- in sql/code
;


ALTER TABLE rekey.worker_status OWNER TO rekey_owner;

--
-- Name: VIEW worker_status; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON VIEW rekey.worker_status IS 'When the unattended work last ran, how many seconds it took, since when it lacks the KEK, what failed in it, and when rows were last counted.';


--
-- Name: COLUMN worker_status.last_tick_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.worker_status.last_tick_at IS 'When the last tick ended.';


--
-- Name: COLUMN worker_status.last_tick_seconds; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.worker_status.last_tick_seconds IS 'How long it took.';


--
-- Name: COLUMN worker_status.locked_since; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.worker_status.locked_since IS 'Since when work waits for the KEK; NULL: it does not.';


--
-- Name: COLUMN worker_status.last_error; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.worker_status.last_error IS 'What failed in the last tick; NULL: nothing.';


--
-- Name: COLUMN worker_status.last_census_at; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON COLUMN rekey.worker_status.last_census_at IS 'When every row was last counted.';


--
-- Name: _audit_head _audit_head_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._audit_head
    ADD CONSTRAINT _audit_head_pkey PRIMARY KEY (singleton);


--
-- Name: _census_findings _census_findings_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._census_findings
    ADD CONSTRAINT _census_findings_pkey PRIMARY KEY (kind, target, keyring, version, item);


--
-- Name: _chunks _chunks_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._chunks
    ADD CONSTRAINT _chunks_pkey PRIMARY KEY (id);


--
-- Name: _column_relations _column_relations_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._column_relations
    ADD CONSTRAINT _column_relations_pkey PRIMARY KEY (column_id, relation, attnum);


--
-- Name: _due _due_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._due
    ADD CONSTRAINT _due_pkey PRIMARY KEY (pass_id, kind, target, relation);


--
-- Name: _endpoints _endpoints_name_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._endpoints
    ADD CONSTRAINT _endpoints_name_key UNIQUE (name);


--
-- Name: _endpoints _endpoints_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._endpoints
    ADD CONSTRAINT _endpoints_pkey PRIMARY KEY (id);


--
-- Name: _notifications _notifications_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._notifications
    ADD CONSTRAINT _notifications_pkey PRIMARY KEY (id);


--
-- Name: _notifier _notifier_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._notifier
    ADD CONSTRAINT _notifier_pkey PRIMARY KEY (singleton);


--
-- Name: _search_finds _search_finds_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_finds
    ADD CONSTRAINT _search_finds_pkey PRIMARY KEY (search_id, relation, attnum, keyring_id, version);


--
-- Name: _search_relations _search_relations_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_relations
    ADD CONSTRAINT _search_relations_pkey PRIMARY KEY (search_id, relation);


--
-- Name: _search_versions _search_versions_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_versions
    ADD CONSTRAINT _search_versions_pkey PRIMARY KEY (search_id, keyring_id, version);


--
-- Name: _searches _searches_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._searches
    ADD CONSTRAINT _searches_pkey PRIMARY KEY (id);


--
-- Name: _secrets_seen _secrets_seen_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._secrets_seen
    ADD CONSTRAINT _secrets_seen_pkey PRIMARY KEY (keyring_id);


--
-- Name: _session_key _session_key_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._session_key
    ADD CONSTRAINT _session_key_pkey PRIMARY KEY (singleton);


--
-- Name: _sweeping _sweeping_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._sweeping
    ADD CONSTRAINT _sweeping_pkey PRIMARY KEY (transaction, relation);


--
-- Name: _told _told_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._told
    ADD CONSTRAINT _told_pkey PRIMARY KEY (event, subject);


--
-- Name: _verified _verified_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._verified
    ADD CONSTRAINT _verified_pkey PRIMARY KEY (verification_id, target, relation);


--
-- Name: _worker _worker_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._worker
    ADD CONSTRAINT _worker_pkey PRIMARY KEY (singleton);


--
-- Name: audit_log audit_log_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.audit_log
    ADD CONSTRAINT audit_log_pkey PRIMARY KEY (id);


--
-- Name: encryption_keys encryption_keys_keyring_version_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.encryption_keys
    ADD CONSTRAINT encryption_keys_keyring_version_key UNIQUE (keyring_id, version);


--
-- Name: encryption_keys encryption_keys_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.encryption_keys
    ADD CONSTRAINT encryption_keys_pkey PRIMARY KEY (id);


--
-- Name: keks keks_fingerprint_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.keks
    ADD CONSTRAINT keks_fingerprint_key UNIQUE (fingerprint);


--
-- Name: keks keks_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.keks
    ADD CONSTRAINT keks_pkey PRIMARY KEY (id);


--
-- Name: keyrings keyrings_name_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.keyrings
    ADD CONSTRAINT keyrings_name_key UNIQUE (name);


--
-- Name: keyrings keyrings_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.keyrings
    ADD CONSTRAINT keyrings_pkey PRIMARY KEY (id);


--
-- Name: protected_columns protected_columns_label_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.protected_columns
    ADD CONSTRAINT protected_columns_label_key UNIQUE (label);


--
-- Name: protected_columns protected_columns_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.protected_columns
    ADD CONSTRAINT protected_columns_pkey PRIMARY KEY (id);


--
-- Name: rotation_failures rotation_failures_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotation_failures
    ADD CONSTRAINT rotation_failures_pkey PRIMARY KEY (id);


--
-- Name: rotations rotations_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotations
    ADD CONSTRAINT rotations_pkey PRIMARY KEY (id);


--
-- Name: secrets secrets_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (tenant_id, id);


--
-- Name: secrets secrets_tenant_name_key; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.secrets
    ADD CONSTRAINT secrets_tenant_name_key UNIQUE (tenant_id, name);


--
-- Name: settings settings_pkey; Type: CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.settings
    ADD CONSTRAINT settings_pkey PRIMARY KEY (singleton);


--
-- Name: _chunks_pass_id; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX _chunks_pass_id ON rekey._chunks USING btree (pass_id);


--
-- Name: _notifications_ended; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX _notifications_ended ON rekey._notifications USING btree (endpoint_id, id) WHERE (state <> 'waiting'::text);


--
-- Name: _notifications_waiting; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX _notifications_waiting ON rekey._notifications USING btree (endpoint_id, next_attempt_at) WHERE (state = 'waiting'::text);


--
-- Name: audit_log_limited; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX audit_log_limited ON rekey.audit_log USING btree (at) WHERE (event = ANY (ARRAY['access.denied'::text, 'rotation.error'::text]));


--
-- Name: encryption_keys_active_key; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE UNIQUE INDEX encryption_keys_active_key ON rekey.encryption_keys USING btree (keyring_id) WHERE (state = 'active'::text);


--
-- Name: encryption_keys_destroy_after; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX encryption_keys_destroy_after ON rekey.encryption_keys USING btree (destroy_after) WHERE (state = 'destroy_scheduled'::text);


--
-- Name: keks_active_key; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE UNIQUE INDEX keks_active_key ON rekey.keks USING btree (state) WHERE (state = 'active'::text);


--
-- Name: keyrings_next_rotation_at; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX keyrings_next_rotation_at ON rekey.keyrings USING btree (next_rotation_at) WHERE (next_rotation_at IS NOT NULL);


--
-- Name: protected_columns_keyring_id; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX protected_columns_keyring_id ON rekey.protected_columns USING btree (keyring_id);


--
-- Name: rotation_failures_open_key; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE UNIQUE INDEX rotation_failures_open_key ON rekey.rotation_failures USING btree (keyring_id, target, relation, row_hash) WHERE (resolved_at IS NULL);


--
-- Name: rotation_failures_refused; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX rotation_failures_refused ON rekey.rotation_failures USING btree (target) WHERE ((resolved_at IS NULL) AND (sqlstate IS NOT NULL));


--
-- Name: rotations_keyring_id; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX rotations_keyring_id ON rekey.rotations USING btree (keyring_id, id);


--
-- Name: rotations_open; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX rotations_open ON rekey.rotations USING btree (id) WHERE (state = ANY (ARRAY['queued'::text, 'running'::text, 'verifying'::text]));


--
-- Name: rotations_under_way_key; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE UNIQUE INDEX rotations_under_way_key ON rekey.rotations USING btree (keyring_id) WHERE ((state = ANY (ARRAY['queued'::text, 'running'::text, 'paused'::text, 'verifying'::text, 'failed'::text])) AND (NOT in_line));


--
-- Name: secrets_keyring_id; Type: INDEX; Schema: rekey; Owner: rekey_owner
--

CREATE INDEX secrets_keyring_id ON rekey.secrets USING btree (keyring_id);


--
-- Name: audit_log audit_log_append_only; Type: TRIGGER; Schema: rekey; Owner: rekey_owner
--

CREATE TRIGGER audit_log_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON rekey.audit_log FOR EACH STATEMENT EXECUTE FUNCTION rekey._refuse_audit_change();


--
-- Name: encryption_keys encryption_keys_keep; Type: TRIGGER; Schema: rekey; Owner: rekey_owner
--

CREATE TRIGGER encryption_keys_keep BEFORE DELETE OR TRUNCATE ON rekey.encryption_keys FOR EACH STATEMENT EXECUTE FUNCTION rekey._refuse_change();


--
-- Name: encryption_keys encryption_keys_state; Type: TRIGGER; Schema: rekey; Owner: rekey_owner
--

CREATE TRIGGER encryption_keys_state BEFORE UPDATE ON rekey.encryption_keys FOR EACH ROW EXECUTE FUNCTION rekey._check_key_change();


--
-- Name: _column_relations _column_relations_column_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._column_relations
    ADD CONSTRAINT _column_relations_column_fkey FOREIGN KEY (column_id) REFERENCES rekey.protected_columns(id) ON DELETE CASCADE;


--
-- Name: _endpoints _endpoints_kek_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._endpoints
    ADD CONSTRAINT _endpoints_kek_fkey FOREIGN KEY (kek_id) REFERENCES rekey.keks(id);


--
-- Name: _search_finds _search_finds_search_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_finds
    ADD CONSTRAINT _search_finds_search_fkey FOREIGN KEY (search_id) REFERENCES rekey._searches(id) ON DELETE CASCADE;


--
-- Name: _search_relations _search_relations_search_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_relations
    ADD CONSTRAINT _search_relations_search_fkey FOREIGN KEY (search_id) REFERENCES rekey._searches(id) ON DELETE CASCADE;


--
-- Name: _search_versions _search_versions_search_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._search_versions
    ADD CONSTRAINT _search_versions_search_fkey FOREIGN KEY (search_id) REFERENCES rekey._searches(id) ON DELETE CASCADE;


--
-- Name: _secrets_seen _secrets_seen_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey._secrets_seen
    ADD CONSTRAINT _secrets_seen_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: encryption_keys encryption_keys_kek_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.encryption_keys
    ADD CONSTRAINT encryption_keys_kek_fkey FOREIGN KEY (kek_id) REFERENCES rekey.keks(id);


--
-- Name: encryption_keys encryption_keys_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.encryption_keys
    ADD CONSTRAINT encryption_keys_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: protected_columns protected_columns_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.protected_columns
    ADD CONSTRAINT protected_columns_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: rotation_failures rotation_failures_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotation_failures
    ADD CONSTRAINT rotation_failures_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: rotation_failures rotation_failures_rotation_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotation_failures
    ADD CONSTRAINT rotation_failures_rotation_fkey FOREIGN KEY (rotation_id) REFERENCES rekey.rotations(id);


--
-- Name: rotations rotations_column_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotations
    ADD CONSTRAINT rotations_column_fkey FOREIGN KEY (column_id) REFERENCES rekey.protected_columns(id) ON DELETE SET NULL;


--
-- Name: rotations rotations_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotations
    ADD CONSTRAINT rotations_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: rotations rotations_to_version_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.rotations
    ADD CONSTRAINT rotations_to_version_fkey FOREIGN KEY (keyring_id, to_version) REFERENCES rekey.encryption_keys(keyring_id, version);


--
-- Name: secrets secrets_keyring_fkey; Type: FK CONSTRAINT; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE ONLY rekey.secrets
    ADD CONSTRAINT secrets_keyring_fkey FOREIGN KEY (keyring_id) REFERENCES rekey.keyrings(id);


--
-- Name: keyrings; Type: ROW SECURITY; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.keyrings ENABLE ROW LEVEL SECURITY;

--
-- Name: keyrings keyrings_all; Type: POLICY; Schema: rekey; Owner: rekey_owner
--

CREATE POLICY keyrings_all ON rekey.keyrings FOR SELECT TO rekey_admin, rekey_operator, rekey_auditor USING (true);


--
-- Name: POLICY keyrings_all ON keyrings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON POLICY keyrings_all ON rekey.keyrings IS 'Who administers, works or audits sees every keyring.';


--
-- Name: keyrings keyrings_tenant; Type: POLICY; Schema: rekey; Owner: rekey_owner
--

CREATE POLICY keyrings_tenant ON rekey.keyrings FOR SELECT TO rekey_app USING (((tenant_id = '00000000-0000-0000-0000-000000000000'::uuid) OR rekey.can_access_tenant(tenant_id)));


--
-- Name: POLICY keyrings_tenant ON keyrings; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON POLICY keyrings_tenant ON rekey.keyrings IS 'An application sees the keyrings of all tenants'' use and of the tenants that it reaches.';


--
-- Name: secrets; Type: ROW SECURITY; Schema: rekey; Owner: rekey_owner
--

ALTER TABLE rekey.secrets ENABLE ROW LEVEL SECURITY;

--
-- Name: secrets secrets_tenant; Type: POLICY; Schema: rekey; Owner: rekey_owner
--

CREATE POLICY secrets_tenant ON rekey.secrets FOR SELECT TO rekey_app USING (rekey.can_access_tenant(tenant_id));


--
-- Name: POLICY secrets_tenant ON secrets; Type: COMMENT; Schema: rekey; Owner: rekey_owner
--

COMMENT ON POLICY secrets_tenant ON rekey.secrets IS 'Rows of the tenants that the caller reaches. Writing goes through rekey.set_secret().';


--
-- Name: SCHEMA rekey; Type: ACL; Schema: -; Owner: rekey_owner
--

GRANT USAGE ON SCHEMA rekey TO rekey_admin;
GRANT USAGE ON SCHEMA rekey TO rekey_operator;
GRANT USAGE ON SCHEMA rekey TO rekey_auditor;
GRANT USAGE ON SCHEMA rekey TO rekey_app;
GRANT USAGE ON SCHEMA rekey TO rekey_sweeper;


--
-- Name: SCHEMA rekey_targets; Type: ACL; Schema: -; Owner: rekey_owner
--

GRANT USAGE ON SCHEMA rekey_targets TO rekey_sweeper;


--
-- Name: FUNCTION _rpc_key_rotation_status(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rpc_key_rotation_status() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._rpc_key_rotation_status() TO rekey_admin;


--
-- Name: FUNCTION key_rotation_status(); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.key_rotation_status() FROM PUBLIC;
GRANT ALL ON FUNCTION public.key_rotation_status() TO rekey_admin;


--
-- Name: FUNCTION _rpc_change(name text, arguments jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rpc_change(name text, arguments jsonb) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._rpc_change(name text, arguments jsonb) TO rekey_admin;


--
-- Name: FUNCTION mark_key_compromised(keyring text, version integer, reason text); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.mark_key_compromised(keyring text, version integer, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION public.mark_key_compromised(keyring text, version integer, reason text) TO rekey_admin;


--
-- Name: FUNCTION pause_rotation(id bigint); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.pause_rotation(id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION public.pause_rotation(id bigint) TO rekey_admin;


--
-- Name: FUNCTION retry_rotation(id bigint); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.retry_rotation(id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION public.retry_rotation(id bigint) TO rekey_admin;


--
-- Name: FUNCTION rollback_rotation(id bigint, reason text); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.rollback_rotation(id bigint, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION public.rollback_rotation(id bigint, reason text) TO rekey_admin;


--
-- Name: FUNCTION rotate_keys(keyring text, reason text, supersede boolean); Type: ACL; Schema: public; Owner: postgres
--

REVOKE ALL ON FUNCTION public.rotate_keys(keyring text, reason text, supersede boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION public.rotate_keys(keyring text, reason text, supersede boolean) TO rekey_admin;


--
-- Name: FUNCTION _active_versions(keyrings integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._active_versions(keyrings integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adopt("values" bytea[], contexts bytea[], sealing rekey._sealing, formats text[], forced boolean) FROM PUBLIC;


--
-- Name: FUNCTION _adoption_batch(rotation_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_batch(rotation_id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._adoption_batch(rotation_id bigint) TO rekey_admin;


--
-- Name: FUNCTION _adoption_doubt(label text, formats text[], values_are_tokens boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_doubt(label text, formats text[], values_are_tokens boolean) FROM PUBLIC;


--
-- Name: FUNCTION _adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._adoption_preview(target regclass, column_name name, relation regclass, first tid, formats text[], forced boolean) TO rekey_admin;


--
-- Name: FUNCTION _adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_rows(target rekey._target, relation regclass, first tid, until_block bigint, max_rows integer, keyring_id integer, formats text[], forced boolean) FROM PUBLIC;


--
-- Name: FUNCTION _adoption_sample(label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_sample(label text) FROM PUBLIC;


--
-- Name: FUNCTION _adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._adoption_store(rotation_id bigint, relation regclass, rows tid[], plaintexts bytea[], problems text[]) TO rekey_admin;


--
-- Name: FUNCTION _advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision, max_rows integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._advance(chunk rekey._chunks, next tid, until_block bigint, seconds double precision, locked double precision, max_rows integer) FROM PUBLIC;


--
-- Name: FUNCTION _decipher(key bytea, iv bytea, sealed bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._decipher(key bytea, iv bytea, sealed bytea) FROM PUBLIC;


--
-- Name: FUNCTION _mac(key bytea, aad bytea, iv bytea, ciphertext bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._mac(key bytea, aad bytea, iv bytea, ciphertext bytea) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_lengths(key integer, iv integer, message integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_lengths(key integer, iv integer, message integer) FROM PUBLIC;


--
-- Name: FUNCTION _aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._aead_decrypt(key bytea, iv bytea, sealed bytea, aad bytea) FROM PUBLIC;


--
-- Name: FUNCTION _encipher(key bytea, iv bytea, plaintext bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._encipher(key bytea, iv bytea, plaintext bytea) FROM PUBLIC;


--
-- Name: FUNCTION _aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._aead_encrypt(key bytea, iv bytea, plaintext bytea, aad bytea) FROM PUBLIC;


--
-- Name: FUNCTION _any_opens(label text, keyring_id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._any_opens(label text, keyring_id integer) FROM PUBLIC;


--
-- Name: FUNCTION _as_text(bytes bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._as_text(bytes bytea) FROM PUBLIC;


--
-- Name: FUNCTION _audit(event text, keyring text, version integer, rotation_id bigint, details jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._audit(event text, keyring text, version integer, rotation_id bigint, details jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _audit_all(events jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._audit_all(events jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _part(part text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._part(part text) FROM PUBLIC;


--
-- Name: TABLE audit_log; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.audit_log TO rekey_auditor;


--
-- Name: FUNCTION _audit_hash(entry rekey.audit_log); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._audit_hash(entry rekey.audit_log) FROM PUBLIC;


--
-- Name: FUNCTION _audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._audit_start(OUT id bigint, OUT last bigint, OUT hash bytea, OUT kept bigint, OUT kept_hash text) FROM PUBLIC;


--
-- Name: FUNCTION _barrier(keyring_id integer, versions integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._barrier(keyring_id integer, versions integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _batch_size(keyrings integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._batch_size(keyrings integer) FROM PUBLIC;


--
-- Name: FUNCTION _begin_search(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._begin_search() FROM PUBLIC;


--
-- Name: FUNCTION _begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._begin_verification(rotations bigint[], keyrings integer[], targets rekey._target[]) FROM PUBLIC;


--
-- Name: FUNCTION _block(pointer tid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._block(pointer tid) FROM PUBLIC;


--
-- Name: FUNCTION _blocked_targets(keyrings integer[], targets rekey._target[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._blocked_targets(keyrings integer[], targets rekey._target[]) FROM PUBLIC;


--
-- Name: FUNCTION _byte_mark(start text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._byte_mark(start text) FROM PUBLIC;


--
-- Name: FUNCTION _call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean); Type: ACL; Schema: rekey; Owner: rekey_sweeper
--

REVOKE ALL ON FUNCTION rekey._call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._call_count(function_names name[], relations regclass[], keyrings integer[], apart boolean, whole boolean) TO rekey_owner;


--
-- Name: FUNCTION _call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]); Type: ACL; Schema: rekey; Owner: rekey_sweeper
--

REVOKE ALL ON FUNCTION rekey._call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._call_read(function_name name, relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, touch_from tid, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[], OUT state text[]) TO rekey_owner;


--
-- Name: FUNCTION _call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: ACL; Schema: rekey; Owner: rekey_sweeper
--

REVOKE ALL ON FUNCTION rekey._call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._call_scan(function_name name, relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) TO rekey_owner;


--
-- Name: FUNCTION _call_tenant_check(function_name text, tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_sweeper
--

REVOKE ALL ON FUNCTION rekey._call_tenant_check(function_name text, tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._call_tenant_check(function_name text, tenant_id uuid) TO rekey_owner;


--
-- Name: FUNCTION _call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint); Type: ACL; Schema: rekey; Owner: rekey_sweeper
--

REVOKE ALL ON FUNCTION rekey._call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._call_write(function_name name, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) TO rekey_owner;


--
-- Name: FUNCTION _in_foreign_code(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._in_foreign_code() FROM PUBLIC;


--
-- Name: FUNCTION _caller(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._caller() FROM PUBLIC;


--
-- Name: FUNCTION _session_aad(scope text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._session_aad(scope text) FROM PUBLIC;


--
-- Name: FUNCTION _carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._carried_aad(keyring_id integer, version integer, kek_id integer, unlocked text) FROM PUBLIC;


--
-- Name: FUNCTION _census(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._census() FROM PUBLIC;


--
-- Name: FUNCTION _census_target(target rekey._target, keyrings integer[], active bytea[], first bigint, until bigint, deadline timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._census_target(target rekey._target, keyrings integer[], active bytea[], first bigint, until bigint, deadline timestamp with time zone) FROM PUBLIC;


--
-- Name: FUNCTION _changes(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._changes() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._changes() TO rekey_sweeper;


--
-- Name: FUNCTION _check(ciphertexts bytea[], prefix bytea, contexts bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._check(ciphertexts bytea[], prefix bytea, contexts bytea[]) FROM PUBLIC;


--
-- Name: FUNCTION _check_context(context text[], keyring_tenant uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._check_context(context text[], keyring_tenant uuid) FROM PUBLIC;


--
-- Name: FUNCTION _check_key_change(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._check_key_change() FROM PUBLIC;


--
-- Name: FUNCTION _check_label(label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._check_label(label text) FROM PUBLIC;


--
-- Name: FUNCTION _check_tenant(tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._check_tenant(tenant_id uuid) FROM PUBLIC;


--
-- Name: FUNCTION _system_identifier(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._system_identifier() FROM PUBLIC;


--
-- Name: FUNCTION _target_state(function_name name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._target_state(function_name name) FROM PUBLIC;


--
-- Name: FUNCTION _checked_since(verification_id bigint, target rekey._target); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._checked_since(verification_id bigint, target rekey._target) FROM PUBLIC;


--
-- Name: FUNCTION _chunk_blocks(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._chunk_blocks(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _claim_message(endpoints integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._claim_message(endpoints integer[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._claim_message(endpoints integer[]) TO rekey_operator;


--
-- Name: FUNCTION _claims(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._claims() FROM PUBLIC;


--
-- Name: FUNCTION _clear_chunks(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._clear_chunks() FROM PUBLIC;


--
-- Name: FUNCTION _is_own_trigger(trigger_id oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_own_trigger(trigger_id oid) FROM PUBLIC;


--
-- Name: FUNCTION _code_in_updates(leaf regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._code_in_updates(leaf regclass) FROM PUBLIC;


--
-- Name: FUNCTION _code_of_others(relation oid, reader name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._code_of_others(relation oid, reader name) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._code_of_others(relation oid, reader name) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._code_of_others(relation oid, reader name) TO rekey_auditor;


--
-- Name: FUNCTION _collect_notifications(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._collect_notifications() FROM PUBLIC;


--
-- Name: FUNCTION _column_bodies(protected rekey.protected_columns); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_bodies(protected rekey.protected_columns) FROM PUBLIC;


--
-- Name: FUNCTION _path_schemas(search_path text, owner name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._path_schemas(search_path text, owner name) FROM PUBLIC;


--
-- Name: FUNCTION _others_schemas(relation regclass, search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._others_schemas(relation regclass, search_path text) FROM PUBLIC;


--
-- Name: FUNCTION _refused_updates(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refused_updates(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _relations_here(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._relations_here(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _update_triggers(relation regclass, attnum smallint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._update_triggers(relation regclass, attnum smallint) FROM PUBLIC;


--
-- Name: FUNCTION _column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_findings(relation regclass, attnum smallint, fire_triggers boolean, search_path text) FROM PUBLIC;


--
-- Name: FUNCTION _column_shape(id integer, OUT relation regclass, OUT attnums smallint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_shape(id integer, OUT relation regclass, OUT attnums smallint[]) FROM PUBLIC;


--
-- Name: FUNCTION _column_id(relation regclass, column_name name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_id(relation regclass, column_name name) FROM PUBLIC;


--
-- Name: FUNCTION _column_problem(protected rekey.protected_columns, part regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_problem(protected rekey.protected_columns, part regclass) FROM PUBLIC;


--
-- Name: FUNCTION _column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_statements(protected rekey.protected_columns, target regclass, attnums smallint[]) FROM PUBLIC;


--
-- Name: FUNCTION _column_status(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._column_status() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._column_status() TO rekey_admin;
GRANT ALL ON FUNCTION rekey._column_status() TO rekey_operator;
GRANT ALL ON FUNCTION rekey._column_status() TO rekey_auditor;


--
-- Name: FUNCTION _utc(at timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._utc(at timestamp with time zone) FROM PUBLIC;


--
-- Name: TABLE keyrings; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.keyrings TO rekey_admin;
GRANT SELECT ON TABLE rekey.keyrings TO rekey_operator;
GRANT SELECT ON TABLE rekey.keyrings TO rekey_auditor;
GRANT SELECT ON TABLE rekey.keyrings TO rekey_app;


--
-- Name: TABLE schedule_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.schedule_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.schedule_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.schedule_status TO rekey_auditor;


--
-- Name: FUNCTION _conditions(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._conditions() FROM PUBLIC;


--
-- Name: FUNCTION _context(parts text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._context(parts text[]) FROM PUBLIC;


--
-- Name: FUNCTION _coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._coordinate(planning boolean, OUT event text, OUT keyring_count integer, OUT detail jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _copied_passphrases(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._copied_passphrases() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._copied_passphrases() TO rekey_admin;


--
-- Name: FUNCTION _count(keyrings integer[], opening boolean, verification_id bigint, apart boolean, locked rekey._locked); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._count(keyrings integer[], opening boolean, verification_id bigint, apart boolean, locked rekey._locked) FROM PUBLIC;


--
-- Name: FUNCTION _count_rows(targets rekey._target[], keyrings integer[], apart boolean, whole boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._count_rows(targets rekey._target[], keyrings integer[], apart boolean, whole boolean) FROM PUBLIC;


--
-- Name: FUNCTION _cut(value text, bytes integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._cut(value text, bytes integer) FROM PUBLIC;


--
-- Name: FUNCTION _cut_details(details jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._cut_details(details jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _dearmor(armored text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._dearmor(armored text) FROM PUBLIC;


--
-- Name: FUNCTION _decoded(value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._decoded(value text) FROM PUBLIC;


--
-- Name: FUNCTION _decrypt(envelope bytea, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._decrypt(envelope bytea, context text[], pass bytea) FROM PUBLIC;


--
-- Name: FUNCTION _dek(keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._dek(keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _dek_problem(keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._dek_problem(keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _deks(keyrings integer[], versions integer[], sweeping boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._deks(keyrings integer[], versions integer[], sweeping boolean) FROM PUBLIC;


--
-- Name: FUNCTION _destroy(keyring_id integer, version integer, rows bigint, elsewhere text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._destroy(keyring_id integer, version integer, rows bigint, elsewhere text) FROM PUBLIC;


--
-- Name: FUNCTION _destroyable_header(keyring text, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._destroyable_header(keyring text, version integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._destroyable_header(keyring text, version integer) TO rekey_admin;


--
-- Name: FUNCTION _destruction_step(clock_jumped boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._destruction_step(clock_jumped boolean) FROM PUBLIC;


--
-- Name: FUNCTION _drop_triggers(target regclass, id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._drop_triggers(target regclass, id integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._drop_triggers(target regclass, id integer) TO rekey_admin;


--
-- Name: FUNCTION _due_rows(rotations bigint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._due_rows(rotations bigint[]) FROM PUBLIC;


--
-- Name: FUNCTION _emptied(counted jsonb, keyrings integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._emptied(counted jsonb, keyrings integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _end_adoptions(column_id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._end_adoptions(column_id integer) FROM PUBLIC;


--
-- Name: FUNCTION _endpoint(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._endpoint(name text) FROM PUBLIC;


--
-- Name: FUNCTION _endpoint_aad(kek_id integer, endpoint_id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._endpoint_aad(kek_id integer, endpoint_id integer) FROM PUBLIC;


--
-- Name: FUNCTION _enqueue(event text, count integer, subjects jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._enqueue(event text, count integer, subjects jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _random_bytes(count integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._random_bytes(count integer) FROM PUBLIC;


--
-- Name: FUNCTION _ensure_rows(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._ensure_rows() FROM PUBLIC;


--
-- Name: FUNCTION _envelope_of(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._envelope_of(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _from_text(value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._from_text(value text) FROM PUBLIC;


--
-- Name: FUNCTION _envelope_of(value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._envelope_of(value text) FROM PUBLIC;


--
-- Name: FUNCTION _expect_doomed(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._expect_doomed() FROM PUBLIC;


--
-- Name: FUNCTION _expect_none_doomed(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._expect_none_doomed() FROM PUBLIC;


--
-- Name: FUNCTION _explain_error(target text, relation regclass, message text, code text, context text, plain boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._explain_error(target text, relation regclass, message text, code text, context text, plain boolean) FROM PUBLIC;


--
-- Name: FUNCTION _fail_stuck(pass_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._fail_stuck(pass_id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _find_rebind(target regclass, column_name name, label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._find_rebind(target regclass, column_name name, label text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._find_rebind(target regclass, column_name name, label text) TO rekey_admin;


--
-- Name: FUNCTION _fingerprint(kek bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._fingerprint(kek bytea) FROM PUBLIC;


--
-- Name: FUNCTION _finish_column(id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._finish_column(id integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._finish_column(id integer) TO rekey_admin;


--
-- Name: FUNCTION _finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._finish_rebind(id integer, from_relation text, settled regclass[], settled_columns name[]) TO rekey_admin;


--
-- Name: FUNCTION _is_kept(event text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_kept(event text) FROM PUBLIC;


--
-- Name: FUNCTION _first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._first_bad(start bigint, hash bytea, OUT id bigint, OUT reason text) FROM PUBLIC;


--
-- Name: FUNCTION _first_place(groups text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._first_place(groups text[]) FROM PUBLIC;


--
-- Name: FUNCTION _forget_column(id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._forget_column(id integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._forget_column(id integer) TO rekey_admin;


--
-- Name: FUNCTION _forget_prepared(before text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._forget_prepared(before text[]) FROM PUBLIC;


--
-- Name: FUNCTION _function_names(function_name name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._function_names(function_name name) FROM PUBLIC;


--
-- Name: FUNCTION _function_statements(protected rekey.protected_columns, owner name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._function_statements(protected rekey.protected_columns, owner name) FROM PUBLIC;


--
-- Name: FUNCTION _guarded_settings(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._guarded_settings() FROM PUBLIC;


--
-- Name: FUNCTION _sounds_secret(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sounds_secret(name text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._sounds_secret(name text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._sounds_secret(name text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._sounds_secret(name text) TO rekey_auditor;


--
-- Name: FUNCTION _has_secret(document json); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._has_secret(document json) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._has_secret(document json) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._has_secret(document json) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._has_secret(document json) TO rekey_auditor;


--
-- Name: FUNCTION _header(keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._header(keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _headers(ciphertexts bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._headers(ciphertexts bytea[]) FROM PUBLIC;


--
-- Name: FUNCTION _hits(place integer, value bytea, wanted bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._hits(place integer, value bytea, wanted bytea[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._hits(place integer, value bytea, wanted bytea[]) TO rekey_operator;


--
-- Name: FUNCTION _hits(place integer, value text, wanted bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._hits(place integer, value text, wanted bytea[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._hits(place integer, value text, wanted bytea[]) TO rekey_operator;


--
-- Name: FUNCTION _hold(relation oid, name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._hold(relation oid, name text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._hold(relation oid, name text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._hold(relation oid, name text) TO rekey_auditor;


--
-- Name: FUNCTION _hold_blocked(rotations bigint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._hold_blocked(rotations bigint[]) FROM PUBLIC;


--
-- Name: FUNCTION _home(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._home() FROM PUBLIC;


--
-- Name: FUNCTION _http_status(code text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._http_status(code text) FROM PUBLIC;


--
-- Name: FUNCTION _int4(bytes bytea, place integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._int4(bytes bytea, place integer) FROM PUBLIC;


--
-- Name: FUNCTION _is_authentic(key bytea, iv bytea, sealed bytea, aad bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_authentic(key bytea, iv bytea, sealed bytea, aad bytea) FROM PUBLIC;


--
-- Name: SEQUENCE _doomed; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON SEQUENCE rekey._doomed TO PUBLIC;


--
-- Name: FUNCTION _is_due(next_attempt_at timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_due(next_attempt_at timestamp with time zone) FROM PUBLIC;


--
-- Name: FUNCTION _is_envelope(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_envelope(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _is_extension_table(relation oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_extension_table(relation oid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._is_extension_table(relation oid) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._is_extension_table(relation oid) TO rekey_auditor;


--
-- Name: FUNCTION _is_in_the_way(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_in_the_way() FROM PUBLIC;


--
-- Name: FUNCTION _is_of_citus(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_of_citus(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _is_of_known_version(envelope bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_of_known_version(envelope bytea) FROM PUBLIC;


--
-- Name: FUNCTION _is_passing(code text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_passing(code text) FROM PUBLIC;


--
-- Name: FUNCTION _is_postgrest(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_postgrest() FROM PUBLIC;


--
-- Name: FUNCTION _is_service_role(caller name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_service_role(caller name) FROM PUBLIC;


--
-- Name: FUNCTION _is_trusted(extension name, class regclass, object oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_trusted(extension name, class regclass, object oid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._is_trusted(extension name, class regclass, object oid) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._is_trusted(extension name, class regclass, object oid) TO rekey_operator;


--
-- Name: FUNCTION _is_unchanged(id integer, names name[], trigger_name name, relation oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_unchanged(id integer, names name[], trigger_name name, relation oid) FROM PUBLIC;


--
-- Name: FUNCTION _is_under_way(state text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._is_under_way(state text) FROM PUBLIC;


--
-- Name: FUNCTION _keep_pace(begun timestamp with time zone, rows bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._keep_pace(begun timestamp with time zone, rows bigint) FROM PUBLIC;


--
-- Name: FUNCTION _keep_passphrases(passphrases bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._keep_passphrases(passphrases bytea[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._keep_passphrases(passphrases bytea[]) TO rekey_admin;


--
-- Name: FUNCTION _kek(OUT id integer, OUT kek bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._kek(OUT id integer, OUT kek bytea) FROM PUBLIC;


--
-- Name: FUNCTION _keks(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._keks() FROM PUBLIC;


--
-- Name: FUNCTION _kept_hash(last bigint, OUT kept bigint, OUT hash text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._kept_hash(last bigint, OUT kept bigint, OUT hash text) FROM PUBLIC;


--
-- Name: FUNCTION _key(keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._key(keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._key_problem(version integer, state text, kek_id integer, kek_state text, sweeping boolean) FROM PUBLIC;


--
-- Name: FUNCTION _keyring(name text, lock boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._keyring(name text, lock boolean) FROM PUBLIC;


--
-- Name: FUNCTION _keyring_name(id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._keyring_name(id integer) FROM PUBLIC;


--
-- Name: FUNCTION _later_trigger(name text, relation oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._later_trigger(name text, relation oid) FROM PUBLIC;


--
-- Name: FUNCTION _legacy_formats(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._legacy_formats() FROM PUBLIC;


--
-- Name: FUNCTION _legacy_mark(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._legacy_mark(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _lock_active(keyrings integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._lock_active(keyrings integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _lock_holders(keyring_id integer, versions integer[], since timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._lock_holders(keyring_id integer, versions integer[], since timestamp with time zone) FROM PUBLIC;


--
-- Name: FUNCTION _lock_kek(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._lock_kek() FROM PUBLIC;


--
-- Name: FUNCTION _lock_targets(apart boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._lock_targets(apart boolean) FROM PUBLIC;


--
-- Name: FUNCTION _look(search_id bigint, wanted bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._look(search_id bigint, wanted bytea[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._look(search_id bigint, wanted bytea[]) TO rekey_operator;


--
-- Name: FUNCTION _look_ahead(header bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._look_ahead(header bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._look_ahead(header bytea) TO rekey_admin;


--
-- Name: FUNCTION _lost_part(protected rekey.protected_columns, leaves oid[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._lost_part(protected rekey.protected_columns, leaves oid[]) FROM PUBLIC;


--
-- Name: FUNCTION _mark_within(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._mark_within(value bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._mark_within(value bytea) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._mark_within(value bytea) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._mark_within(value bytea) TO rekey_auditor;


--
-- Name: FUNCTION _marked_inside(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._marked_inside(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _marks_of(formats text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._marks_of(formats text[]) FROM PUBLIC;


--
-- Name: FUNCTION _max_bytes(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._max_bytes() FROM PUBLIC;


--
-- Name: FUNCTION _may_administer(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._may_administer() FROM PUBLIC;


--
-- Name: FUNCTION _may_begin(start bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._may_begin(start bytea) FROM PUBLIC;


--
-- Name: FUNCTION _may_be_marked(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._may_be_marked(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _may_be_wrapped(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._may_be_wrapped(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _may_hold(protected rekey.protected_columns, keyrings integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._may_hold(protected rekey.protected_columns, keyrings integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _message_text(event text, subject jsonb, count integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._message_text(event text, subject jsonb, count integer) FROM PUBLIC;


--
-- Name: FUNCTION _message_body(kind text, event text, count integer, subjects jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._message_body(kind text, event text, count integer, subjects jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _move_column(id integer, target regclass, column_name name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._move_column(id integer, target regclass, column_name name) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._move_column(id integer, target regclass, column_name name) TO rekey_admin;


--
-- Name: FUNCTION _move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._move_key(key rekey.encryption_keys, state text, event text, reason text, destroy_after timestamp with time zone) FROM PUBLIC;


--
-- Name: FUNCTION _namesake(protected rekey.protected_columns, relation regclass, attnum smallint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._namesake(protected rekey.protected_columns, relation regclass, attnum smallint) FROM PUBLIC;


--
-- Name: FUNCTION _new_kek(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._new_kek() FROM PUBLIC;


--
-- Name: FUNCTION _new_keys(keyrings integer[], versions integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._new_keys(keyrings integer[], versions integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _newest_problem(protected rekey.protected_columns); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._newest_problem(protected rekey.protected_columns) FROM PUBLIC;


--
-- Name: FUNCTION _next_in_line(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._next_in_line() FROM PUBLIC;


--
-- Name: FUNCTION _next_row(pointer tid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._next_row(pointer tid) FROM PUBLIC;


--
-- Name: FUNCTION _note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_adopted(rotation_id bigint, keyring_id integer, rows_done bigint, target text, relation regclass, failed_keys text[], failed_problems text[], failed_codes text[]) FROM PUBLIC;


--
-- Name: FUNCTION _note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_batch(rotations bigint[], done_keyrings integer[], done_rows bigint[], target text, relation regclass, failed_keyrings integer[], failed_versions integer[], failed_keys text[], failed_problems text[], failed_codes text[]) FROM PUBLIC;


--
-- Name: FUNCTION _note_delivery(id bigint, error text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_delivery(id bigint, error text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._note_delivery(id bigint, error text) TO rekey_operator;


--
-- Name: FUNCTION _note_denied(details jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_denied(details jsonb) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._note_denied(details jsonb) TO rekey_admin;


--
-- Name: FUNCTION _note_findings(findings jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_findings(findings jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _note_finds(search_id bigint, relation oid, hits text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_finds(search_id bigint, relation oid, hits text) FROM PUBLIC;


--
-- Name: FUNCTION _note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._note_look(search_id bigint, reader text, relations oid[], names text[], problems text[], again boolean[], hits text[]) TO rekey_operator;


--
-- Name: FUNCTION _relation_named(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._relation_named(name text) FROM PUBLIC;


--
-- Name: FUNCTION _note_names(only_id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_names(only_id integer) FROM PUBLIC;


--
-- Name: FUNCTION _note_pace(begun timestamp with time zone, rows bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_pace(begun timestamp with time zone, rows bigint) FROM PUBLIC;


--
-- Name: FUNCTION _note_passed(chunk rekey._chunks, written bigint, refused integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_passed(chunk rekey._chunks, written bigint, refused integer) FROM PUBLIC;


--
-- Name: FUNCTION _note_passed_by(keyrings integer[], begun bigint[], reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_passed_by(keyrings integer[], begun bigint[], reason text) FROM PUBLIC;


--
-- Name: FUNCTION _note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._note_read(search_id bigint, relation oid, reader text, until bigint, rows bigint, hits text, filenode oid, problem text, begun timestamp with time zone) TO rekey_operator;


--
-- Name: FUNCTION _note_request(id bigint, request_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_request(id bigint, request_id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._note_request(id bigint, request_id bigint) TO rekey_operator;


--
-- Name: FUNCTION _note_seen(counted jsonb, keyrings integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_seen(counted jsonb, keyrings integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _note_trouble(chunk rekey._chunks, message text, code text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._note_trouble(chunk rekey._chunks, message text, code text) FROM PUBLIC;


--
-- Name: FUNCTION _older_transactions(older xid8, since timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._older_transactions(older xid8, since timestamp with time zone) FROM PUBLIC;


--
-- Name: FUNCTION _opaque_bytes(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._opaque_bytes(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _open(envelope bytea, context bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open(envelope bytea, context bytea) FROM PUBLIC;


--
-- Name: FUNCTION _open_endpoints(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_endpoints() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._open_endpoints() TO rekey_operator;


--
-- Name: FUNCTION _open_found(targets rekey._target[], whole rekey._counted[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_found(targets rekey._target[], whole rekey._counted[]) FROM PUBLIC;


--
-- Name: FUNCTION _open_pgp(message bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_pgp(message bytea) FROM PUBLIC;


--
-- Name: FUNCTION _open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_rows(targets rekey._target[], keyrings integer[], verification_id bigint, apart boolean) FROM PUBLIC;


--
-- Name: FUNCTION _open_search(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_search() FROM PUBLIC;


--
-- Name: FUNCTION _open_target(label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_target(label text) FROM PUBLIC;


--
-- Name: FUNCTION _open_writers(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._open_writers() FROM PUBLIC;


--
-- Name: FUNCTION _table_problem(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._table_problem(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _own_problem(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._own_problem() FROM PUBLIC;


--
-- Name: FUNCTION _pace(INOUT chunk rekey._chunks, who_else text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pace(INOUT chunk rekey._chunks, who_else text) FROM PUBLIC;


--
-- Name: FUNCTION _parse_kek(value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._parse_kek(value text) FROM PUBLIC;


--
-- Name: FUNCTION _parts(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._parts(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _pass_aad(label text, caller name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pass_aad(label text, caller name) FROM PUBLIC;


--
-- Name: FUNCTION _pass_on(chunk rekey._chunks); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pass_on(chunk rekey._chunks) FROM PUBLIC;


--
-- Name: FUNCTION _passed_key(pass bytea, label text, place bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._passed_key(pass bytea, label text, place bigint) FROM PUBLIC;


--
-- Name: FUNCTION _passphrases(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._passphrases() FROM PUBLIC;


--
-- Name: FUNCTION _pg_net_requests(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pg_net_requests() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._pg_net_requests() TO rekey_operator;


--
-- Name: FUNCTION _pgp_decrypt(message bytea, passphrase text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pgp_decrypt(message bytea, passphrase text) FROM PUBLIC;


--
-- Name: FUNCTION _pgp_message(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pgp_message(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _pgp_problem(message bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._pgp_problem(message bytea) FROM PUBLIC;


--
-- Name: FUNCTION _plan(OUT event text, OUT keyring_count integer, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._plan(OUT event text, OUT keyring_count integer, OUT detail jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _post_by_pg_net(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._post_by_pg_net() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._post_by_pg_net() TO rekey_operator;


--
-- Name: FUNCTION _postpone(keyrings integer[], versions integer[], reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._postpone(keyrings integer[], versions integer[], reason text) FROM PUBLIC;


--
-- Name: FUNCTION _prepared(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._prepared() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._prepared() TO rekey_sweeper;


--
-- Name: FUNCTION _protect_options(protected rekey.protected_columns); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._protect_options(protected rekey.protected_columns) FROM PUBLIC;


--
-- Name: FUNCTION _provided_keks(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._provided_keks() FROM PUBLIC;


--
-- Name: FUNCTION _prune_notifications(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._prune_notifications() FROM PUBLIC;


--
-- Name: FUNCTION _prune_run_details(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._prune_run_details() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._prune_run_details() TO rekey_operator;


--
-- Name: FUNCTION _quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[], verification_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._quarantine(target text, relation regclass, keyrings integer[], versions integer[], row_keys text[], problems text[], codes text[], verification_id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._queue_sweep(keyring_id integer, trigger text, reason text, previous_version integer) FROM PUBLIC;


--
-- Name: FUNCTION _ranges(verification_id bigint, target rekey._target); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._ranges(verification_id bigint, target rekey._target) FROM PUBLIC;


--
-- Name: FUNCTION _record_error(rotations bigint[], message text, code text, target text, relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._record_error(rotations bigint[], message text, code text, target text, relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._reencrypt(rows tid[], ciphertexts bytea[], prefix bytea, contexts bytea[], OUT made_rows tid[], OUT starts bytea[], OUT made bytea[], OUT made_keyrings integer[], OUT failed_places integer[], OUT problems text[]) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_audit_change(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_audit_change() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_blocked(keyrings integer[], targets rekey._target[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_blocked(keyrings integer[], targets rekey._target[]) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_bytes(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_bytes() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_change(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_change() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_changes(before text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_changes(before text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._refuse_changes(before text) TO rekey_sweeper;


--
-- Name: FUNCTION _refuse_doubt(label text, formats text[], values_are_tokens boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_doubt(label text, formats text[], values_are_tokens boolean) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_encrypted(protected rekey.protected_columns); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_encrypted(protected rekey.protected_columns) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_endpoint(problem text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_endpoint(problem text) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_envelopes(relation regclass, column_name name); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_envelopes(relation regclass, column_name name) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._refuse_envelopes(relation regclass, column_name name) TO rekey_admin;


--
-- Name: FUNCTION _refuse_foreign(envelope bytea, context bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_foreign(envelope bytea, context bytea) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_forger(stack text, callee text, caller text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_forger(stack text, callee text, caller text) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_hidden(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_hidden() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_in_use(keyring rekey.keyrings, version integer, counted bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_in_use(keyring rekey.keyrings, version integer, counted bigint) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_later_trigger(name text, relation oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_later_trigger(name text, relation oid) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_needed(keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_needed(keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_old_snapshot(keyrings integer[], versions integer[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_old_snapshot(keyrings integer[], versions integer[]) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_other_table(id integer, relation oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_other_table(id integer, relation oid) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_over(rotation rekey.rotations); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_over(rotation rekey.rotations) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_path(search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_path(search_path text) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_problem(target text, problem text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_problem(target text, problem text) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_prune(first bigint, last bigint, hash text, checkpoint jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_renamed(id integer, names name[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_renamed(id integer, names name[]) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_snapshot(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_snapshot() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_stranger(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_stranger(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_superuser(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_superuser(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _refuse_tenant(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_tenant() FROM PUBLIC;


--
-- Name: FUNCTION _refuse_traces(before text[], search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_traces(before text[], search_path text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._refuse_traces(before text[], search_path text) TO rekey_sweeper;


--
-- Name: FUNCTION _refuse_unlock(problem text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refuse_unlock(problem text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._refuse_unlock(problem text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._refuse_unlock(problem text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._refuse_unlock(problem text) TO rekey_app;


--
-- Name: FUNCTION _refused_plain(label text, rotation_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refused_plain(label text, rotation_id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _row_hash(row_key text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._row_hash(row_key text) FROM PUBLIC;


--
-- Name: FUNCTION _refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._refused_rows(target text, relation regclass, ciphertexts bytea[], keys text[]) FROM PUBLIC;


--
-- Name: FUNCTION _register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._register_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text, OUT id integer, OUT statements text[]) TO rekey_admin;


--
-- Name: FUNCTION _release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._release_column(target regclass, column_name name, decrypt boolean, OUT id integer, OUT statements text[]) TO rekey_admin;


--
-- Name: FUNCTION _remake_columns(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._remake_columns() FROM PUBLIC;


--
-- Name: FUNCTION _replace_lost_keys(kek_id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._replace_lost_keys(kek_id integer) FROM PUBLIC;


--
-- Name: FUNCTION _subject(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._subject() FROM PUBLIC;


--
-- Name: FUNCTION _requester(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._requester() FROM PUBLIC;


--
-- Name: FUNCTION _reveal(value bytea, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._reveal(value bytea, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._reveal(value bytea, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION _reveal(value text, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._reveal(value text, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._reveal(value text, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION _rival(protected rekey.protected_columns, relation regclass, leaves oid[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rival(protected rekey.protected_columns, relation regclass, leaves oid[]) FROM PUBLIC;


--
-- Name: FUNCTION _rotate(keyrings integer[], trigger text, reason text, supersede boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rotate(keyrings integer[], trigger text, reason text, supersede boolean) FROM PUBLIC;


--
-- Name: FUNCTION _rotate_due(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rotate_due() FROM PUBLIC;


--
-- Name: FUNCTION _rotation(id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rotation(id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _rpc_hint(action text, hint text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rpc_hint(action text, hint text) FROM PUBLIC;


--
-- Name: FUNCTION _rpc_problem(code text, message text, hint text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rpc_problem(code text, message text, hint text) FROM PUBLIC;


--
-- Name: FUNCTION _rpc_refusal(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._rpc_refusal() FROM PUBLIC;


--
-- Name: FUNCTION _same_heads(heads bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._same_heads(heads bytea[]) FROM PUBLIC;


--
-- Name: FUNCTION _scan_on(target rekey._target, keyrings integer[], first tid, step bigint, until bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._scan_on(target rekey._target, keyrings integer[], first tid, step bigint, until bigint, OUT next_first tid, OUT next_step bigint, OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) FROM PUBLIC;


--
-- Name: FUNCTION _schedule_destruction(keyring text, version integer, wait interval); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._schedule_destruction(keyring text, version integer, wait interval) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._schedule_destruction(keyring text, version integer, wait interval) TO rekey_admin;


--
-- Name: FUNCTION _sealing(keyring_id integer, bytes integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sealing(keyring_id integer, bytes integer) FROM PUBLIC;


--
-- Name: FUNCTION _sealing_on_write(keyring_id integer, bytes integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sealing_on_write(keyring_id integer, bytes integer) FROM PUBLIC;


--
-- Name: FUNCTION _search_advice(relation oid, role text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._search_advice(relation oid, role text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._search_advice(relation oid, role text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._search_advice(relation oid, role text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._search_advice(relation oid, role text) TO rekey_auditor;


--
-- Name: FUNCTION _search_on(begun timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._search_on(begun timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._search_on(begun timestamp with time zone) TO rekey_operator;


--
-- Name: FUNCTION _search_problem(search_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._search_problem(search_id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._search_turn(reader text, OUT event text, OUT search_id bigint, OUT relation oid, OUT name text, OUT statement text, OUT first bigint, OUT until bigint, OUT wanted bytea[], OUT wait interval, OUT detail jsonb) TO rekey_operator;


--
-- Name: FUNCTION _searchable(only_one oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._searchable(only_one oid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._searchable(only_one oid) TO rekey_operator;


--
-- Name: FUNCTION _secret_context(tenant_id uuid, id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._secret_context(tenant_id uuid, id uuid) FROM PUBLIC;


--
-- Name: FUNCTION _sequences_behind(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sequences_behind() FROM PUBLIC;


--
-- Name: FUNCTION _session_keks(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._session_keks() FROM PUBLIC;


--
-- Name: FUNCTION _session_seal(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._session_seal() FROM PUBLIC;


--
-- Name: FUNCTION _session_state(search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._session_state(search_path text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._session_state(search_path text) TO rekey_sweeper;


--
-- Name: FUNCTION _settings(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._settings() FROM PUBLIC;


--
-- Name: FUNCTION _shape_doubt("values" bytea[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._shape_doubt("values" bytea[]) FROM PUBLIC;


--
-- Name: FUNCTION _shape_problem(ciphertext bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._shape_problem(ciphertext bytea) FROM PUBLIC;


--
-- Name: FUNCTION _sign(key bytea, message bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sign(key bytea, message bytea) FROM PUBLIC;


--
-- Name: FUNCTION _silence_problem(relation regclass, attnum smallint, owner oid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._silence_problem(relation regclass, attnum smallint, owner oid) FROM PUBLIC;


--
-- Name: FUNCTION _step_limit(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._step_limit() FROM PUBLIC;


--
-- Name: FUNCTION _steps_in_hand(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._steps_in_hand() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._steps_in_hand() TO rekey_admin;
GRANT ALL ON FUNCTION rekey._steps_in_hand() TO rekey_operator;
GRANT ALL ON FUNCTION rekey._steps_in_hand() TO rekey_auditor;


--
-- Name: FUNCTION _still_verifying(rotations bigint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._still_verifying(rotations bigint[]) FROM PUBLIC;


--
-- Name: FUNCTION _storage_problem(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._storage_problem(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _store_setting(name text, value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._store_setting(name text, value text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._store_setting(name text, value text) TO rekey_admin;


--
-- Name: FUNCTION _sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._sweep_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _take_in_hand(relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._take_in_hand(relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _target_of(chunk rekey._chunks); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._target_of(chunk rekey._chunks) FROM PUBLIC;


--
-- Name: FUNCTION _targets(only_target text, only_relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._targets(only_target text, only_relation regclass) FROM PUBLIC;


--
-- Name: FUNCTION _targets_now(only_target text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._targets_now(only_target text) FROM PUBLIC;


--
-- Name: FUNCTION _text_mark(start text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._text_mark(start text) FROM PUBLIC;


--
-- Name: FUNCTION _throttle(wanted integer, OUT rows integer, OUT wait interval); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._throttle(wanted integer, OUT rows integer, OUT wait interval) FROM PUBLIC;


--
-- Name: FUNCTION _through_postgrest(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._through_postgrest() FROM PUBLIC;


--
-- Name: FUNCTION _tick_duty(duty text, begun timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._tick_duty(duty text, begun timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._tick_duty(duty text, begun timestamp with time zone) TO rekey_operator;


--
-- Name: FUNCTION _to_look(search_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._to_look(search_id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._to_look(search_id bigint) TO rekey_operator;


--
-- Name: FUNCTION _to_text(envelope bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._to_text(envelope bytea) FROM PUBLIC;


--
-- Name: FUNCTION _told_events(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._told_events() FROM PUBLIC;


--
-- Name: FUNCTION _transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._transactions(looked_at timestamp with time zone, transactions bigint, OUT told text, OUT looked timestamp with time zone, OUT counted bigint) FROM PUBLIC;


--
-- Name: FUNCTION _trigger_names(protected rekey.protected_columns); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._trigger_names(protected rekey.protected_columns) FROM PUBLIC;


--
-- Name: FUNCTION _trigger_problem(protected rekey.protected_columns, relations oid[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._trigger_problem(protected rekey.protected_columns, relations oid[]) FROM PUBLIC;


--
-- Name: FUNCTION _trigger_statement(id integer, body text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._trigger_statement(id integer, body text) FROM PUBLIC;


--
-- Name: FUNCTION _trusted_function(extension name, signature text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._trusted_function(extension name, signature text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._trusted_function(extension name, signature text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._trusted_function(extension name, signature text) TO rekey_operator;


--
-- Name: FUNCTION _trusted_relation(extension name, schema name, name name, events integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._trusted_relation(extension name, schema name, name name, events integer) TO rekey_operator;


--
-- Name: FUNCTION _unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._unlock(kek bytea, scope text, OUT fingerprint text, OUT problem text) TO rekey_app;


--
-- Name: FUNCTION _unsettled(id integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._unsettled(id integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._unsettled(id integer) TO rekey_admin;


--
-- Name: FUNCTION _unswept(pass_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._unswept(pass_id bigint) FROM PUBLIC;


--
-- Name: FUNCTION _unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._unwrap(wrapping_key bytea, wrapped_key bytea, aad bytea) FROM PUBLIC;


--
-- Name: FUNCTION _unwrapped(value bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._unwrapped(value bytea) FROM PUBLIC;


--
-- Name: FUNCTION _verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._verify(OUT event text, OUT keyring_count integer, OUT rows bigint, OUT detail jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._verify_batch(who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) FROM PUBLIC;


--
-- Name: FUNCTION _view_columns(target regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._view_columns(target regclass) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._view_columns(target regclass) TO rekey_admin;


--
-- Name: FUNCTION _wait_out(pace real, seconds double precision); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._wait_out(pace real, seconds double precision) FROM PUBLIC;


--
-- Name: FUNCTION _waited_for(code text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._waited_for(code text) FROM PUBLIC;


--
-- Name: FUNCTION _with_ages(blockers jsonb, since timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) TO rekey_admin;
GRANT ALL ON FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) TO rekey_operator;
GRANT ALL ON FUNCTION rekey._with_ages(blockers jsonb, since timestamp with time zone) TO rekey_auditor;


--
-- Name: FUNCTION _wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._wrap(wrapping_key bytea, iv bytea, dek bytea, aad bytea) FROM PUBLIC;


--
-- Name: FUNCTION _wrap_aad(kek_id integer, keyring_id integer, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._wrap_aad(kek_id integer, keyring_id integer, version integer) FROM PUBLIC;


--
-- Name: FUNCTION _wrapping_key(kek bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._wrapping_key(kek bytea) FROM PUBLIC;


--
-- Name: FUNCTION _write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._write_apart(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], plain boolean, state text[], OUT written tid[], OUT undone tid, OUT refused tid[], OUT problems text[], OUT codes text[]) FROM PUBLIC;


--
-- Name: FUNCTION _write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._write_rows(target rekey._target, relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], state text[], OUT locked tid[], OUT written bigint) FROM PUBLIC;


--
-- Name: FUNCTION _write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey._write_trigger_body(protected rekey.protected_columns, relation regclass, attnums smallint[]) FROM PUBLIC;


--
-- Name: FUNCTION add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.add_endpoint(name text, address text, events text[], slack boolean, allow_private boolean, by_pg_net boolean) TO rekey_admin;


--
-- Name: TABLE rotation_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.rotation_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.rotation_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.rotation_status TO rekey_auditor;


--
-- Name: FUNCTION adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adopt_column(target regclass, column_name name, formats text[], force boolean, reason text, values_are_tokens boolean, unwrap text) TO rekey_admin;


--
-- Name: FUNCTION adopt_vault(keyring text, tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adopt_vault(keyring text, tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adopt_vault(keyring text, tenant_id uuid) TO rekey_admin;


--
-- Name: FUNCTION adoption_batch(rotation_id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adoption_batch(rotation_id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adoption_batch(rotation_id bigint) TO rekey_admin;


--
-- Name: FUNCTION adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adoption_doubt(target regclass, column_name name, formats text[], values_are_tokens boolean) TO rekey_admin;


--
-- Name: FUNCTION adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adoption_preview(target regclass, column_name name, formats text[], force boolean, relation regclass, first tid) TO rekey_admin;


--
-- Name: FUNCTION adoption_store(rotation_id bigint, relation regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.adoption_store(rotation_id bigint, relation regclass) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.adoption_store(rotation_id bigint, relation regclass) TO rekey_admin;


--
-- Name: FUNCTION audit_checkpoint(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.audit_checkpoint() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.audit_checkpoint() TO rekey_auditor;
GRANT ALL ON FUNCTION rekey.audit_checkpoint() TO rekey_operator;


--
-- Name: FUNCTION begin_search(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.begin_search() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.begin_search() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.begin_search() TO rekey_operator;


--
-- Name: FUNCTION can_access_tenant(tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.can_access_tenant(tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.can_access_tenant(tenant_id uuid) TO rekey_app;


--
-- Name: FUNCTION cancel_key_destruction(keyring text, version integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.cancel_key_destruction(keyring text, version integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.cancel_key_destruction(keyring text, version integer) TO rekey_admin;


--
-- Name: FUNCTION clear_schedule(keyring text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.clear_schedule(keyring text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.clear_schedule(keyring text) TO rekey_admin;


--
-- Name: FUNCTION confirm_emptied(keyring text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.confirm_emptied(keyring text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.confirm_emptied(keyring text) TO rekey_admin;


--
-- Name: FUNCTION create_decrypted_view(target regclass); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.create_decrypted_view(target regclass) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.create_decrypted_view(target regclass) TO rekey_admin;


--
-- Name: FUNCTION create_keyring(name text, tenant_id uuid, rotate_every interval); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.create_keyring(name text, tenant_id uuid, rotate_every interval) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.create_keyring(name text, tenant_id uuid, rotate_every interval) TO rekey_admin;


--
-- Name: FUNCTION decrypt(ciphertext bytea, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt(ciphertext bytea, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt(ciphertext bytea, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION decrypt(ciphertext text, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt(ciphertext text, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt(ciphertext text, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION decrypt_many(ciphertexts bytea[], contexts text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt_many(ciphertexts bytea[], contexts text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt_many(ciphertexts bytea[], contexts text[]) TO rekey_app;


--
-- Name: FUNCTION decrypt_many(ciphertexts text[], contexts text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt_many(ciphertexts text[], contexts text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt_many(ciphertexts text[], contexts text[]) TO rekey_app;


--
-- Name: FUNCTION decrypt_text(ciphertext bytea, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt_text(ciphertext bytea, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt_text(ciphertext bytea, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION decrypt_text(ciphertext text, context text[], pass bytea); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.decrypt_text(ciphertext text, context text[], pass bytea) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.decrypt_text(ciphertext text, context text[], pass bytea) TO rekey_app;


--
-- Name: FUNCTION delete_secret(name text, tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.delete_secret(name text, tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.delete_secret(name text, tenant_id uuid) TO rekey_app;


--
-- Name: FUNCTION disable_key(keyring text, version integer, reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.disable_key(keyring text, version integer, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.disable_key(keyring text, version integer, reason text) TO rekey_admin;


--
-- Name: FUNCTION enable_key(keyring text, version integer, reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.enable_key(keyring text, version integer, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.enable_key(keyring text, version integer, reason text) TO rekey_admin;


--
-- Name: FUNCTION encrypt(plaintext bytea, keyring text, context text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.encrypt(plaintext bytea, keyring text, context text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.encrypt(plaintext bytea, keyring text, context text[]) TO rekey_app;


--
-- Name: FUNCTION encrypt(plaintext text, keyring text, context text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.encrypt(plaintext text, keyring text, context text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.encrypt(plaintext text, keyring text, context text[]) TO rekey_app;


--
-- Name: FUNCTION encrypt_text(plaintext text, keyring text, context text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.encrypt_text(plaintext text, keyring text, context text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.encrypt_text(plaintext text, keyring text, context text[]) TO rekey_app;


--
-- Name: FUNCTION find_envelopes(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.find_envelopes() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.find_envelopes() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.find_envelopes() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.find_envelopes() TO rekey_auditor;


--
-- Name: FUNCTION find_unprotected(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.find_unprotected() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.find_unprotected() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.find_unprotected() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.find_unprotected() TO rekey_auditor;


--
-- Name: FUNCTION findings(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.findings() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.findings() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.findings() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.findings() TO rekey_auditor;


--
-- Name: FUNCTION get_secret(name text, tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.get_secret(name text, tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.get_secret(name text, tenant_id uuid) TO rekey_app;


--
-- Name: FUNCTION key_usage(keyring text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.key_usage(keyring text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.key_usage(keyring text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey.key_usage(keyring text) TO rekey_operator;


--
-- Name: FUNCTION lock(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.lock() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.lock() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.lock() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.lock() TO rekey_app;


--
-- Name: FUNCTION mark_key_compromised(keyring text, version integer, reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.mark_key_compromised(keyring text, version integer, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.mark_key_compromised(keyring text, version integer, reason text) TO rekey_admin;


--
-- Name: TABLE keks; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.keks TO rekey_admin;
GRANT SELECT ON TABLE rekey.keks TO rekey_operator;
GRANT SELECT ON TABLE rekey.keks TO rekey_auditor;


--
-- Name: FUNCTION metrics(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.metrics() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.metrics() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.metrics() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.metrics() TO rekey_auditor;


--
-- Name: FUNCTION pause_rotation(id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.pause_rotation(id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.pause_rotation(id bigint) TO rekey_admin;


--
-- Name: FUNCTION protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.protect_column(target regclass, column_name name, keyring text, context_columns name[], encrypt_on_write boolean, fire_triggers boolean, search_path text) TO rekey_admin;


--
-- Name: FUNCTION protection_findings(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.protection_findings() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.protection_findings() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.protection_findings() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.protection_findings() TO rekey_auditor;


--
-- Name: FUNCTION prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.prune_audit_log(first bigint, last bigint, hash text, file_sha256 text, checkpoint jsonb) FROM PUBLIC;


--
-- Name: FUNCTION read_secrets(names text[], tenant_id uuid); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.read_secrets(names text[], tenant_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.read_secrets(names text[], tenant_id uuid) TO rekey_app;


--
-- Name: FUNCTION reading_pass(label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.reading_pass(label text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.reading_pass(label text) TO rekey_app;


--
-- Name: FUNCTION rebind_column(target regclass, column_name name, label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.rebind_column(target regclass, column_name name, label text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.rebind_column(target regclass, column_name name, label text) TO rekey_admin;


--
-- Name: FUNCTION register_kek(replace_lost boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.register_kek(replace_lost boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.register_kek(replace_lost boolean) TO rekey_admin;


--
-- Name: FUNCTION remove_endpoint(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.remove_endpoint(name text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.remove_endpoint(name text) TO rekey_admin;


--
-- Name: FUNCTION resolve_failure(id bigint, action text, reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.resolve_failure(id bigint, action text, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.resolve_failure(id bigint, action text, reason text) TO rekey_admin;


--
-- Name: FUNCTION resume_rotation(id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.resume_rotation(id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.resume_rotation(id bigint) TO rekey_admin;


--
-- Name: FUNCTION resync_sequences(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.resync_sequences() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.resync_sequences() TO rekey_admin;


--
-- Name: FUNCTION retire_keyring(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.retire_keyring(name text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.retire_keyring(name text) TO rekey_admin;


--
-- Name: FUNCTION retry_rotation(id bigint); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.retry_rotation(id bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.retry_rotation(id bigint) TO rekey_admin;


--
-- Name: FUNCTION rollback_rotation(id bigint, reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.rollback_rotation(id bigint, reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.rollback_rotation(id bigint, reason text) TO rekey_admin;


--
-- Name: FUNCTION rotate_kek(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.rotate_kek() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.rotate_kek() TO rekey_admin;


--
-- Name: FUNCTION rotate_keys(keyring text, reason text, supersede boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.rotate_keys(keyring text, reason text, supersede boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.rotate_keys(keyring text, reason text, supersede boolean) TO rekey_admin;


--
-- Name: FUNCTION rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) TO rekey_admin;
GRANT ALL ON FUNCTION rekey.rotation_step(whole boolean, who_else text, OUT event text, OUT keyring_count integer, OUT rows bigint, OUT wait interval, OUT detail jsonb) TO rekey_operator;


--
-- Name: PROCEDURE run_rotations(IN max_duration interval); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON PROCEDURE rekey.run_rotations(IN max_duration interval) FROM PUBLIC;
GRANT ALL ON PROCEDURE rekey.run_rotations(IN max_duration interval) TO rekey_admin;
GRANT ALL ON PROCEDURE rekey.run_rotations(IN max_duration interval) TO rekey_operator;


--
-- Name: FUNCTION schedule_key_destruction(keyring text, version integer, wait interval); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.schedule_key_destruction(keyring text, version integer, wait interval) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.schedule_key_destruction(keyring text, version integer, wait interval) TO rekey_admin;


--
-- Name: FUNCTION schedule_worker(schedule text, workers integer); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.schedule_worker(schedule text, workers integer) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.schedule_worker(schedule text, workers integer) TO rekey_admin;


--
-- Name: FUNCTION search_step(OUT event text, OUT wait interval, OUT detail jsonb); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.search_step(OUT event text, OUT wait interval, OUT detail jsonb) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.search_step(OUT event text, OUT wait interval, OUT detail jsonb) TO rekey_operator;


--
-- Name: FUNCTION set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.set_schedule(keyring text, rotate_every interval, first_at timestamp with time zone) TO rekey_admin;


--
-- Name: FUNCTION set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.set_secrets(names text[], "values" text[], tenant_id uuid, keyring text, descriptions text[]) TO rekey_app;


--
-- Name: FUNCTION set_secret(name text, value text, tenant_id uuid, keyring text, description text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.set_secret(name text, value text, tenant_id uuid, keyring text, description text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.set_secret(name text, value text, tenant_id uuid, keyring text, description text) TO rekey_app;


--
-- Name: FUNCTION set_setting(name text, value text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.set_setting(name text, value text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.set_setting(name text, value text) TO rekey_admin;


--
-- Name: FUNCTION test_endpoint(name text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.test_endpoint(name text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.test_endpoint(name text) TO rekey_admin;


--
-- Name: PROCEDURE tick(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON PROCEDURE rekey.tick() FROM PUBLIC;
GRANT ALL ON PROCEDURE rekey.tick() TO rekey_operator;


--
-- Name: FUNCTION unlock(kek bytea, scope text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.unlock(kek bytea, scope text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.unlock(kek bytea, scope text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey.unlock(kek bytea, scope text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey.unlock(kek bytea, scope text) TO rekey_app;


--
-- Name: FUNCTION unlock_copied(scope text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.unlock_copied(scope text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.unlock_copied(scope text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey.unlock_copied(scope text) TO rekey_operator;
GRANT ALL ON FUNCTION rekey.unlock_copied(scope text) TO rekey_app;


--
-- Name: FUNCTION unprotect_column(label text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.unprotect_column(label text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.unprotect_column(label text) TO rekey_admin;


--
-- Name: FUNCTION unprotect_column(target regclass, column_name name, decrypt boolean); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.unprotect_column(target regclass, column_name name, decrypt boolean) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.unprotect_column(target regclass, column_name name, decrypt boolean) TO rekey_admin;


--
-- Name: FUNCTION unschedule_worker(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.unschedule_worker() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.unschedule_worker() TO rekey_admin;


--
-- Name: FUNCTION verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) TO rekey_auditor;
GRANT ALL ON FUNCTION rekey.verify_audit_log(anchor jsonb, OUT valid boolean, OUT entries bigint, OUT first_bad bigint, OUT reason text) TO rekey_operator;


--
-- Name: FUNCTION verify_ciphertexts(keyring text); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.verify_ciphertexts(keyring text) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.verify_ciphertexts(keyring text) TO rekey_admin;
GRANT ALL ON FUNCTION rekey.verify_ciphertexts(keyring text) TO rekey_operator;


--
-- Name: FUNCTION version(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.version() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.version() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.version() TO rekey_operator;
GRANT ALL ON FUNCTION rekey.version() TO rekey_auditor;
GRANT ALL ON FUNCTION rekey.version() TO rekey_app;


--
-- Name: FUNCTION watch(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.watch() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.watch() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.watch() TO rekey_operator;


--
-- Name: FUNCTION who_else(); Type: ACL; Schema: rekey; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey.who_else() FROM PUBLIC;
GRANT ALL ON FUNCTION rekey.who_else() TO rekey_admin;
GRANT ALL ON FUNCTION rekey.who_else() TO rekey_operator;


--
-- Name: FUNCTION secrets_count(relation regclass, keyrings integer[]); Type: ACL; Schema: rekey_targets; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey_targets.secrets_count(relation regclass, keyrings integer[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey_targets.secrets_count(relation regclass, keyrings integer[]) TO rekey_sweeper;


--
-- Name: FUNCTION secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: ACL; Schema: rekey_targets; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey_targets.secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey_targets.secrets_read(relation regclass, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) TO rekey_sweeper;


--
-- Name: FUNCTION secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]); Type: ACL; Schema: rekey_targets; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey_targets.secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey_targets.secrets_scan(relation regclass, first tid, until tid, keyrings integer[], since xid, max_rows integer, max_bytes bigint, OUT next tid, OUT rows tid[], OUT ciphertexts bytea[], OUT contexts bytea[], OUT keys text[]) TO rekey_sweeper;


--
-- Name: FUNCTION secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint); Type: ACL; Schema: rekey_targets; Owner: rekey_owner
--

REVOKE ALL ON FUNCTION rekey_targets.secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION rekey_targets.secrets_write(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], OUT locked tid[], OUT written bigint) TO rekey_sweeper;


--
-- Name: TABLE census_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.census_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.census_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.census_status TO rekey_auditor;


--
-- Name: TABLE column_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.column_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.column_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.column_status TO rekey_auditor;


--
-- Name: TABLE secrets; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.secrets TO rekey_app;


--
-- Name: TABLE decrypted_secrets; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.decrypted_secrets TO rekey_app;


--
-- Name: TABLE endpoint_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.endpoint_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.endpoint_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.endpoint_status TO rekey_auditor;


--
-- Name: TABLE failure_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.failure_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.failure_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.failure_status TO rekey_auditor;


--
-- Name: TABLE key_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.key_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.key_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.key_status TO rekey_auditor;


--
-- Name: TABLE message_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.message_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.message_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.message_status TO rekey_auditor;


--
-- Name: TABLE search_findings; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.search_findings TO rekey_admin;
GRANT SELECT ON TABLE rekey.search_findings TO rekey_operator;
GRANT SELECT ON TABLE rekey.search_findings TO rekey_auditor;


--
-- Name: TABLE search_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.search_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.search_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.search_status TO rekey_auditor;


--
-- Name: TABLE setting_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.setting_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.setting_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.setting_status TO rekey_auditor;


--
-- Name: TABLE worker_status; Type: ACL; Schema: rekey; Owner: rekey_owner
--

GRANT SELECT ON TABLE rekey.worker_status TO rekey_admin;
GRANT SELECT ON TABLE rekey.worker_status TO rekey_operator;
GRANT SELECT ON TABLE rekey.worker_status TO rekey_auditor;


--
-- PostgreSQL database dump complete
--


