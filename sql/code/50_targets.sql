-- The tables that a rotation sweeps. Each has two functions in schema rekey_targets, owned by the table's owner:
--   <name>_sweep(first, until, keyrings, versions, max_rows, max_bytes): re-encrypts what stands in that range of row
--     pointers on another version than the given one
--   <name>_count(keyrings, opening): counts rows by keyring and version, in one snapshot; opening: checks every tag
-- rekey.secrets is the first target.

create or replace function rekey._targets()
returns table (target text, relation regclass, function_name name, indexed boolean)
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
  select 'rekey.secrets', 'rekey.secrets'::regclass, 'secrets'::name, true;
end;
comment on function rekey._targets is
  'Every relation with row storage that holds envelopes. indexed: it has an index on the keyring, so that a few rows of many are found fast.';

create or replace function rekey._reencrypt(ciphertexts bytea[], contexts bytea[], out resealed bytea[], out problems text[])
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
as $$
declare
  v_keyrings integer[];
  v_versions integer[];
  v_from_keyrings integer[];
  v_from_versions integer[];
begin
  select array_agg(distinct rekey._int4(u.ciphertext, 3)) into v_keyrings
  from unnest(ciphertexts) u(ciphertext) where rekey._is_envelope(u.ciphertext);
  v_versions := rekey._lock_active(v_keyrings);
  select array_agg(w.keyring_id), array_agg(w.version) into v_from_keyrings, v_from_versions
  from (select distinct rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
        from unnest(ciphertexts) u(ciphertext) where rekey._is_envelope(u.ciphertext)) w;

  select array_agg(n.sealed order by n.place), array_agg(n.problem order by n.place) into resealed, problems
  from (
    select o.place,
      case when o.plaintext is not null and o.new_key is not null then
        o.new_header || o.new_iv || rekey._aead_encrypt(o.new_key, o.new_iv, o.plaintext, o.new_aad) end as sealed,
      case when o.plaintext is null then coalesce(o.old_problem, 'does not open: damaged, or of another row')
           when o.new_key is null then coalesce(o.new_problem, 'the keyring has no active version') end as problem
    from (
      select p.place, p.old_problem, p.new_key, p.new_problem, p.new_header, p.new_header || p.context as new_aad,
        case when p.new_key is not null then rekey._random_bytes(16) end as new_iv,
        case when p.old_key is not null then rekey._aead_decrypt(p.old_key, p.iv, p.sealed, p.aad) end as plaintext
      from (
        select u.place, u.context, d.key as old_key, a.key as new_key, a.problem as new_problem,
          substr(u.ciphertext, 12, 16) as iv, substr(u.ciphertext, 28) as sealed, substr(u.ciphertext, 1, 11) || u.context as aad,
          rekey._header(a.keyring_id, a.version) as new_header,
          case when not u.well_formed then 'is no envelope'
               when d.keyring_id is null then 'there is no such key version'
               else d.problem end as old_problem
        from (
          select c.place, c.ciphertext, c.context, rekey._is_envelope(c.ciphertext) as well_formed,
            case when rekey._is_envelope(c.ciphertext) then rekey._int4(c.ciphertext, 3) end as keyring_id,
            case when rekey._is_envelope(c.ciphertext) then rekey._int4(c.ciphertext, 7) end as version
          from unnest(ciphertexts, contexts) with ordinality as c(ciphertext, context, place)
          offset 0
        ) u
        left join rekey._deks(v_from_keyrings, v_from_versions, sweeping => true) d
          on d.keyring_id = u.keyring_id and d.version = u.version
        left join rekey._deks(v_keyrings, v_versions) a on a.keyring_id = u.keyring_id
        offset 0
      ) p
      offset 0
    ) o
    offset 0
  ) n;
end
$$;
comment on function rekey._reencrypt is
  'Re-encrypts envelopes under the active version of their keyring, in their order; each is checked first. Where one does not open, its place in resealed is NULL and problems says why. Gives back no plaintext.';

create or replace function rekey._check(ciphertexts bytea[], contexts bytea[]) returns text[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set work_mem = '64MB'  -- as rekey._deks()
as $$
declare
  v_keyrings integer[];
  v_versions integer[];
  v_problems text[];
begin
  select array_agg(w.keyring_id), array_agg(w.version) into v_keyrings, v_versions
  from (select distinct rekey._int4(u.ciphertext, 3) as keyring_id, rekey._int4(u.ciphertext, 7) as version
        from unnest(ciphertexts) u(ciphertext) where rekey._is_envelope(u.ciphertext)) w;

  select array_agg(o.problem order by o.place) into v_problems
  from (
    select p.place,
      case when p.old_key is null then p.problem
           when rekey._aead_decrypt(p.old_key, p.iv, p.sealed, p.aad) is null then 'does not open: damaged, or of another row' end as problem
    from (
      select u.place, d.key as old_key, substr(u.ciphertext, 12, 16) as iv, substr(u.ciphertext, 28) as sealed,
        substr(u.ciphertext, 1, 11) || u.context as aad,
        case when not u.well_formed then 'is no envelope'
             when d.keyring_id is null then 'there is no such key version'
             else d.problem end as problem
      from (
        select c.place, c.ciphertext, c.context, rekey._is_envelope(c.ciphertext) as well_formed,
          case when rekey._is_envelope(c.ciphertext) then rekey._int4(c.ciphertext, 3) end as keyring_id,
          case when rekey._is_envelope(c.ciphertext) then rekey._int4(c.ciphertext, 7) end as version
        from unnest(ciphertexts, contexts) with ordinality as c(ciphertext, context, place)
        offset 0
      ) u
      left join rekey._deks(v_keyrings, v_versions, sweeping => true) d
        on d.keyring_id = u.keyring_id and d.version = u.version
      offset 0
    ) p
    offset 0
  ) o;
  return v_problems;
end
$$;
comment on function rekey._check is 'Opens envelopes and says, in their order, why one does not open; NULL where it does.';

create or replace function rekey_targets.secrets_sweep(
  first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  out next tid, out done_keyrings integer[], out done_rows bigint[],
  out failed_keyrings integer[], out failed_versions integer[], out failed_keys text[], out failed_problems text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows tid[];
  v_ciphertexts bytea[];
  v_contexts bytea[];
  v_found integer;
  v_last tid;
  v_resealed bytea[];
  v_problems text[];
begin
  with due as materialized (
    select s.ctid as row, s.tenant_id, s.id, s.ciphertext
    from rekey.secrets s
    join unnest(keyrings, versions) as w(keyring_id, version) on w.keyring_id = s.keyring_id and w.version <> s.key_version
    where s.ctid >= first and s.ctid < until
    order by s.ctid
    limit max_rows
    for no key update of s skip locked
  ), sized as (
    select d.*, sum(octet_length(d.ciphertext)) over (order by d.row rows unbounded preceding) - octet_length(d.ciphertext) as before
    from due d
  )
  select array_agg(t.row order by t.row), array_agg(t.ciphertext order by t.row),
    array_agg(rekey._secret_context(t.tenant_id, t.id) order by t.row), (select count(*) from due)
  into v_rows, v_ciphertexts, v_contexts, v_found
  from sized t
  where t.before < max_bytes;

  if v_found > 0 then
    v_last := v_rows[cardinality(v_rows)];
    select r.resealed, r.problems into v_resealed, v_problems from rekey._reencrypt(v_ciphertexts, v_contexts) r;
    with changed as (
      update rekey.secrets s set ciphertext = u.resealed
      from unnest(v_rows, v_resealed) as u(row, resealed)
      where s.ctid = u.row and u.resealed is not null
      returning s.keyring_id
    )
    select array_agg(c.keyring_id), array_agg(c.rows) into done_keyrings, done_rows
    from (select keyring_id, count(*) as rows from changed group by keyring_id) c;
    if array_position(v_resealed, null) is not null then
      select array_agg(s.keyring_id), array_agg(s.key_version), array_agg(s.tenant_id || '/' || s.id), array_agg(u.problem)
      into failed_keyrings, failed_versions, failed_keys, failed_problems
      from unnest(v_rows, v_resealed, v_problems) as u(row, resealed, problem)
      join rekey.secrets s on s.ctid = u.row
      where u.resealed is null;
    end if;
    if v_found >= max_rows or cardinality(v_rows) < v_found then
      -- The rows that follow the last one that was treated.
      next := format('(%s,%s)', split_part(trim(v_last::text, '()'), ',', 1), split_part(trim(v_last::text, '()'), ',', 2)::integer + 1)::tid;
    end if;
  end if;
  set constraints all immediate;
end
$$;
comment on function rekey_targets.secrets_sweep is
  'Re-encrypts the due rows of rekey.secrets whose row pointer lies from first on and before until: at most max_rows of them, and max_bytes of ciphertext. next: where to go on, NULL at the end of the range.';

create or replace function rekey_targets.secrets_count(keyrings integer[], opening boolean)
returns table (keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[])
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocks bigint;
  v_first bigint := 0;
  v_step bigint := 256;
begin
  if not opening then
    return query
      select s.keyring_id, s.key_version, count(*), 0::bigint, null::text[], null::text[]
      from rekey.secrets s
      where keyrings is null or s.keyring_id = any (keyrings)
      group by s.keyring_id, s.key_version;
    return;
  end if;
  perform from rekey.secrets where false;  -- its lock keeps the table from being rewritten after it was measured
  v_blocks := pg_relation_size('rekey.secrets') / current_setting('block_size')::integer;
  -- The few rows of small keyrings are found by the index, all at once; many are read 2 MB at a time.
  if keyrings is not null and (select count(*) from (select from rekey.secrets s where s.keyring_id = any (keyrings) limit 5000) few) < 5000 then
    v_step := v_blocks;
  end if;
  -- STABLE: every statement in here sees the snapshot of the calling one.
  while v_first < v_blocks loop
    return query
      with found as materialized (
        select s.keyring_id, s.key_version, s.ciphertext, rekey._secret_context(s.tenant_id, s.id) as context,
          s.tenant_id, s.id, row_number() over () as place
        from rekey.secrets s
        where (keyrings is null or s.keyring_id = any (keyrings))
          and s.ctid >= format('(%s,0)', v_first)::tid and s.ctid < format('(%s,0)', v_first + v_step)::tid
      ), checked as (
        select p.place, p.problem
        from (select rekey._check(array_agg(f.ciphertext order by f.place), array_agg(f.context order by f.place)) as problems
              from found f) c, unnest(c.problems) with ordinality as p(problem, place)
      )
      select f.keyring_id, f.key_version, count(*), count(c.problem),
        array_agg(f.tenant_id || '/' || f.id) filter (where c.problem is not null),
        array_agg(c.problem) filter (where c.problem is not null)
      from found f
      join checked c on c.place = f.place
      group by f.keyring_id, f.key_version;
    v_first := v_first + v_step;
  end loop;
end
$$;
comment on function rekey_targets.secrets_count is
  'Counts rekey.secrets by keyring and version; keyrings NULL: all. opening: checks every tag too; failed_keys and failed_problems name what does not open.';

-- These two are owned by rekey_sweeper (footer.sql), which has no other right: whatever a target's function has become,
-- it gains nothing from being called here. Why they begin as they do: rekey._call_tenant_check (40_tenants.sql).
create or replace function rekey._call_sweep(
  function_name name, first tid, until tid, keyrings integer[], versions integer[], max_rows integer, max_bytes bigint,
  out next tid, out done_keyrings integer[], out done_rows bigint[],
  out failed_keyrings integer[], out failed_versions integer[], out failed_keys text[], out failed_problems text[]
)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_sweep does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  execute format('select s.* from rekey_targets.%I($1, $2, $3, $4, $5, $6) s', function_name || '_sweep')
  into next, done_keyrings, done_rows, failed_keyrings, failed_versions, failed_keys, failed_problems
  using first, until, keyrings, versions, max_rows, max_bytes;
  set constraints all immediate;
end
$$;
comment on function rekey._call_sweep is 'Calls the sweep function of a target.';

create or replace function rekey._call_count(function_name name, keyrings integer[], opening boolean)
returns table (keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[])
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_user operator(pg_catalog.<>) 'rekey_sweeper' then
    raise exception 'rekey._call_count does not run as rekey_sweeper' using errcode = 'RK005',
      hint = 'It was altered, or restored by a role that is no superuser: make it SECURITY DEFINER and owned by rekey_sweeper again.';
  end if;
  for keyring_id, version, rows, failed, failed_keys, failed_problems in
    execute format('select s.* from rekey_targets.%I($1, $2) s', function_name || '_count') using keyrings, opening
  loop
    return next;
  end loop;
end
$$;
comment on function rekey._call_count is 'Calls the count function of a target.';

create or replace function rekey._count(keyrings integer[], opening boolean)
returns table (target text, relation regclass, keyring_id integer, version integer, rows bigint, failed bigint, failed_keys text[], failed_problems text[])
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select t.target, t.relation, c.keyring_id, c.version, c.rows, c.failed, c.failed_keys, c.failed_problems
    from rekey._targets() t
    cross join lateral rekey._call_count(t.function_name, _count.keyrings, opening) c;
end
$$;
comment on function rekey._count is
  'Counts every target by keyring and version, in the snapshot of the caller''s statement; a combination may come in several rows.';

create or replace function rekey._refuse_snapshot() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this runs in READ COMMITTED only' using errcode = 'active_sql_transaction',
      hint = 'An older snapshot does not see every row that stands on a key.';
  end if;
end
$$;
comment on function rekey._refuse_snapshot is 'Raises 25001 outside READ COMMITTED.';

create or replace function rekey.key_usage(keyring text = null) returns setof rekey.key_rows
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
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
comment on function rekey.key_usage is
  'A census: how many rows stand on each key version, and in which relations. keyring NULL: all. Reads every protected row. 25001: not in READ COMMITTED; RK007: no such keyring.';
grant execute on function rekey.key_usage to rekey_admin, rekey_operator;

create or replace function rekey.verify_ciphertexts(keyring text = null) returns setof rekey.verified_rows
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
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
comment on function rekey.verify_ciphertexts is
  'Checks that every protected row opens, and shows nothing of what is in it. keyring NULL: all. RK001, RK002: KEK; RK007: no such keyring.';
grant execute on function rekey.verify_ciphertexts to rekey_admin, rekey_operator;
