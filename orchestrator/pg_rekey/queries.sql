-- Statements of the orchestrator that take more than a line, each with its name and what it is for.

-- name: init
-- description: What `init` finds: the installation, pgcrypto, and where pg_cron lives.
select current_database()::text as database,
  to_regclass('rekey.settings') is not null as installed,
  exists (select from pg_extension where extname = 'pgcrypto') as pgcrypto,
  to_regnamespace('extensions') is not null as extensions_schema,
  exists (select from pg_extension where extname = 'pg_cron') as pg_cron,
  (select setting from pg_settings where name = 'cron.database_name') as cron_database

-- name: installed
-- description: The version of an extension that is pg_rekey; no row: it is not installed.
select e.extversion as version
from (select) as one
left join pg_extension e on e.extname = 'pg_rekey'
where to_regclass('rekey.settings') is not null

-- name: has migrations
-- description: Whether there is a table of the Supabase CLI's migrations; no other relation of that name, which could run somebody's code when it is read.
select exists (
  select from pg_class c
  where c.relnamespace = to_regnamespace('supabase_migrations') and c.relname = 'schema_migrations'
    and c.relkind = 'r' and not c.relrowsecurity and not c.relhassubclass
    and 2 = (select count(*) from pg_attribute a
             where a.attrelid = c.oid and a.attname in ('version', 'name') and a.atttypid = 'text'::regtype and a.attgenerated = '')) as found

-- name: migrations
-- description: Versions under which the Supabase CLI has noted migrations of ours.
select version from only supabase_migrations.schema_migrations where name ~ '(^|_)pg_rekey$' order by version

-- name: extension path
-- description: Whether the server has the files for one step of the extension.
select exists (
  select from pg_extension_update_paths('pg_rekey') p where p.source = %s and p.target = %s and p.path is not null)

-- name: pg_tle has it
-- description: Whether it is pg_tle that keeps the scripts of the extension: there is its control function, beside one of pg_tle's own.
select exists (
  select from pg_depend d
  join pg_extension e on d.refclassid = 'pg_extension'::regclass and e.oid = d.refobjid and d.deptype = 'e' and e.extname = 'pg_tle'
  where d.classid = 'pg_proc'::regclass and d.objid = to_regprocedure('pgtle.extension_update_paths(name)')
    and to_regprocedure('pgtle."pg_rekey.control"()') is not null)

-- name: pg_tle path
-- description: Whether pg_tle has the script for one step of the extension.
select exists (
  select from pgtle.extension_update_paths('pg_rekey') p where p.source = %s and p.target = %s and p.path is not null)

-- name: installer
-- description: The role that installed it, and whether this one may replace what it owns.
select p.proowner::regrole::text as role, coalesce(pg_has_role(p.proowner, 'usage'), true) as allowed
from (select) as one
left join pg_proc p on p.oid = to_regprocedure('public.rotate_keys(text, text, boolean)')

-- name: lock holders
-- description: Whom an upgrade or an uninstallation waits for: who holds locks on our tables, or our advisory locks.
select distinct case when x.gid is not null then format('prepared transaction %L', x.gid)
  else format('pid %s (%s, since %s)', l.pid, coalesce(a.usename, a.backend_type, 'unknown'), a.xact_start::timestamptz(0)) end as holder
from pg_locks l
left join pg_stat_activity a on a.pid = l.pid
left join pg_prepared_xacts x on l.pid is null and l.virtualtransaction = '-1/' || x.transaction
where l.granted and l.pid is distinct from pg_backend_pid()
  and l.database = (select d.oid from pg_database d where d.datname = current_database())
  and (l.relation in (select c.oid from pg_class c where c.relnamespace = to_regnamespace('rekey'))
       or (l.locktype, l.classid, l.objsubid) = ('advisory', 0, 2))
order by 1

-- name: kek provider
-- description: Where the server finds the KEK by itself; no row before pg_rekey is set up.
select value from rekey.setting_status where name = 'kek_provider'

-- name: cron elsewhere
-- description: The call that schedules the worker of this database from the one that pg_cron lives in.
select string_agg(format(
  'select cron.schedule_in_database(%L, %L, %L, %L, %L);', j.name, '* * * * *', j.command, current_database(),
  case when exists (select from pg_roles where rolname = 'rekey_worker') then 'rekey_worker' else current_user end), E'\n    ' order by j.name)
from (values ('pg_rekey', 'call rekey.tick()'), ('pg_rekey_watch', 'select rekey.watch()')) as j(name, command)

-- name: set schedule
-- description: A schedule that begins after one interval.
select rekey.set_schedule(%s, %s::interval)

-- name: set schedule from
-- description: A schedule with its first time.
select rekey.set_schedule(%s, %s::interval, %s::timestamptz)

-- name: set schedule if changed
-- description: A schedule, left alone where the keyring has it already.
select rekey.set_schedule(given.keyring, given.rotate_every)
from (values (%s, %s::interval)) as given (keyring, rotate_every)
where not exists (
  select from rekey.keyrings k where k.name = given.keyring and k.rotate_every = given.rotate_every)

-- name: status keyrings
-- description: Every keyring with its active version, its last rotation, the rows that it counted and when, how long it took, and whether the next is on time.
select k.name as keyring, v.version, v.activated_at as since, l.id as last_rotation, l.rows_total as rows, l.finished_at as counted_at,
  l.finished_at - l.started_at as took, s.rotate_every, s.next_rotation_at,
  case when s.overdue then 'overdue' when s.rotate_every is null then 'none' else 'on time' end as schedule
from rekey.keyrings k
join rekey.schedule_status s on s.keyring = k.name
left join rekey.key_status v on v.keyring = k.name and v.state = 'active'
left join (
  select distinct on (r.keyring) r.keyring, r.id, r.rows_total, r.started_at, r.finished_at from rekey.rotation_status r
  where r.state in ('completed', 'completed_with_failures') and r.trigger <> 'adoption'
  order by r.keyring, r.id desc) l on l.keyring = k.name
order by k.name

-- name: status rotations
-- description: Rotations under way, and the last ones that left failures.
select r.* from rekey.rotation_status r
where r.state in ('queued', 'running', 'paused', 'verifying', 'failed')
   or exists (select from rekey.failure_status f where f.rotation_id = r.id and f.resolved_at is null)
order by r.id

-- name: status worker
-- description: When the unattended work was last done, and where the KEK comes from.
select (select value from rekey.setting_status where name = 'kek_provider') as kek_provider,
  (select id from rekey.keks where state = 'active') as kek,
  w.last_tick_at, w.locked_since, w.last_error, w.last_census_at
from (select) as one
left join rekey.worker_status w on true

-- name: status messages
-- description: Messages to endpoints that wait, or were given up; NULL: none.
select nullif(sum(s.waiting), 0)::bigint as messages_waiting, nullif(sum(s.dead), 0)::bigint as messages_given_up from rekey.endpoint_status s

-- name: status secrets
-- description: How many secrets the server takes there to be (NULL: it has not looked yet), and whether this role may count them all, which takes no time yet.
select case when c.reltuples >= 0 then c.reltuples::bigint end as secrets,
  has_table_privilege(c.oid, 'select') and not row_security_active(c.oid) and pg_relation_size(c.oid) < 67108864 as countable
from pg_class c
where c.oid = 'rekey.secrets'::regclass

-- name: keyrings
-- description: Every keyring with its active version and schedule.
select k.name, k.tenant_id, v.version as active_version, k.rotate_every, k.next_rotation_at, k.created_at, k.retired_at
from rekey.keyrings k
left join rekey.key_status v on v.keyring = k.name and v.state = 'active'
order by k.name

-- name: keys
-- description: Key versions of one keyring or of all.
select * from rekey.key_status
where %s::text is null or keyring = %s
order by keyring, version

-- name: rotations
-- description: The newest rotations of one keyring or of all.
select * from rekey.rotation_status
where %s::text is null or keyring = %s
order by id desc
limit %s

-- name: progress
-- description: How far some rotations are, taken together; without ids, all that are under way.
select array_agg(id order by id) as ids,
  count(*) filter (where state in ('queued', 'running', 'verifying')) as unfinished,
  array_agg(id order by id) filter (where state = 'paused') as paused,
  count(*) filter (where state = 'running') as running,
  count(*) filter (where state = 'verifying') as verifying,
  case when bool_and(rows_total is not null) then sum(rows_total)::bigint end as total,
  coalesce(sum(rows_done), 0)::bigint as done,
  max(blocks_to_verify) as blocks,
  (array_agg(blocked_by) filter (where blocked_by is not null))[1] as blocked_by
from rekey.rotation_status
where id = any (%s::bigint[]) or %s::bigint[] is null and state in ('queued', 'running', 'paused', 'verifying')

-- name: under way
-- description: The rotation under way of a keyring.
select r.*, false as passed_by from rekey.rotation_status r
where r.keyring = %s and r.state in ('queued', 'running', 'paused', 'verifying', 'failed')
order by r.id limit 1

-- name: worked on
-- description: Whether anybody works on what is under way: the last tick was lately, or a batch is in hand, or another pg-rekey is connected.
select exists (select from rekey.worker_status w where w.last_tick_at > clock_timestamp() - interval '2 minutes')
  or exists (select from rekey._steps_in_hand())
  or exists (select from pg_stat_activity a
             where a.datname = current_database() and a.application_name = 'pg-rekey' and a.pid <> pg_backend_pid()) as worked_on

-- name: vacuum pays
-- description: A table that its updates make larger, and that this session may vacuum: a fifth of its rows. Not a large one, whose sweep takes so long that autovacuum comes by.
select (c.reltuples / 5)::bigint as fifth
from pg_class c
where c.oid = %s
  and pg_relation_size(c.oid) between 1048576 and 268435456 and c.reltuples > 0
  and coalesce((select o.option_value::integer from pg_options_to_table(c.reloptions) o where o.option_name = 'fillfactor'), 100) > 60
  and (pg_has_role(c.relowner, 'usage') or exists (
    select from pg_database d where d.datname = current_database() and pg_has_role(d.datdba, 'usage')))

-- name: step limit
-- description: How long a batch may take; 0, for ever, before pg_rekey is set up.
select coalesce(extract(epoch from coalesce(
  (select value::interval from rekey.setting_status where name = 'step_limit'),
  (select 100 * value::interval from rekey.setting_status where name = 'batch_target'))) * 1000, 0)::bigint as milliseconds

-- name: held up
-- description: Rotations that failed or left failures, and the tables whose rows are in quarantine.
select r.id, r.keyring, r.state, r.rows_failed, case when r.state = 'failed' then r.last_error end as last_error,
  (select array_agg(distinct f.relation) from rekey.failure_status f where f.rotation_id = r.id and f.resolved_at is null) as relations
from rekey.rotation_status r
where r.state in ('failed', 'completed_with_failures') and (%s::bigint[] is null or r.id = any (%s))
order by r.id

-- name: relation name
-- description: What a relation is called now.
select n.nspname as schema, c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = %s

-- name: pace
-- description: Rows a second of the fastest of the last five rotations that had enough rows to tell: others waited for writers, or for workers.
select max(rows_done / extract(epoch from finished_at - started_at))::double precision as rows_per_second
from (
  select rows_done, started_at, finished_at from rekey.rotation_status
  where state = 'completed' and rows_done >= 1000 and finished_at > started_at
  order by id desc limit 5
) as lately

-- name: failures
-- description: Rows in quarantine, those of one rotation or of all, with or without those that are resolved.
select * from rekey.failure_status
where (%s::bigint is null or rotation_id = %s) and (%s or resolved_at is null)
order by id

-- name: secrets
-- description: Names of the secrets of a tenant, all or those that are like a pattern.
select s.name, k.name as keyring, s.key_version, s.description, s.created_at, s.updated_at
from rekey.secrets s
join rekey.keyrings k on k.id = s.keyring_id
where s.tenant_id = %s and (%s::text is null or s.name like %s)
order by s.name
limit %s

-- name: set secret
-- description: Store one secret, as an application does.
select rekey.set_secret(%s, %s, tenant_id => %s, keyring => %s, description => %s)

-- name: python keyrings
-- description: Every keyring with its active version and its schedule.
select k.name as keyring, v.version, v.activated_at as since, s.rotate_every, s.next_rotation_at, s.overdue
from rekey.keyrings k
join rekey.schedule_status s on s.keyring = k.name
left join rekey.key_status v on v.keyring = k.name and v.state = 'active'
order by k.name

-- name: set copied secrets
-- description: Store the secrets that were copied, under a tenant, with a keyring.
select rekey.set_secrets(array_agg(s.name), array_agg(s.value), %s, %s, array_agg(s.description)) as ids
from pg_temp.pg_rekey_secrets s

-- name: audit log
-- description: The newest entries of the audit log, of one keyring or all.
select * from rekey.audit_log
where %s::text is null or keyring = %s
order by id desc
limit %s

-- name: kek place
-- description: Where the server looks for the KEK; before pg_rekey is set up, where it will by default.
select coalesce(max(value) filter (where name = 'kek_secret_name'), 'pg_rekey_kek') || %s as kek_secret_name,
  coalesce(max(value) filter (where name = 'kek_file'), 'pg_rekey.kek') || %s as kek_file
from rekey.setting_status

-- name: store in vault
-- description: The copied KEK becomes a new secret of the Vault.
select vault.create_secret(encode(k.kek, 'hex')::text, %s::text, 'Key-encryption key of pg_rekey'::text, null::uuid)
from pg_temp.pg_rekey_kek k

-- name: update vault
-- description: The copied KEK replaces a secret of the Vault.
select vault.update_secret(s.id::uuid, encode(k.kek, 'hex')::text, null::text, null::text, null::uuid)
from vault.secrets s, pg_temp.pg_rekey_kek k
where s.name = %s

-- name: doctor: installed
-- description: Whether there is anything to examine.
select 'critical' as severity, 'pg_rekey is not installed in this database' as finding, 'Run `pg-rekey init`.' as advice
where to_regclass('rekey.settings') is null

-- name: names: keyring
-- description: Keyrings that are not retired.
select name from rekey.keyrings where retired_at is null order by name

-- name: names: rotation
-- description: The newest rotations.
select id::text as name from rekey.rotation_status order by id desc limit 100

-- name: names: version
-- description: The versions of a keyring that are not destroyed, newest first.
select version::text as name from rekey.key_status where keyring = %(keyring)s and state <> 'destroyed' order by version desc

-- name: names: failure
-- description: The newest rows in quarantine.
select id::text as name from rekey.failure_status where resolved_at is null order by id desc limit 100

-- name: names: secret
-- description: Secrets of a tenant, or of no tenant.
select name from rekey.secrets
where tenant_id = coalesce(%(tenant)s::uuid, '00000000-0000-0000-0000-000000000000')
order by name limit 10000

-- name: names: setting
-- description: Settings.
select name from rekey.setting_status order by name

-- name: names: table
-- description: Tables of users that may hold secrets, with their schemas.
select format('%%I.%%I', n.nspname, c.relname) as name
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'rekey', 'rekey_targets')
order by 1

-- name: names: column
-- description: Columns of a table that may hold secrets.
select a.attname::text as name from pg_attribute a
where a.attrelid = to_regclass(%(table)s) and a.attnum > 0 and not a.attisdropped and a.atttypid in ('bytea'::regtype, 'text'::regtype, 'varchar'::regtype)
order by a.attnum

-- name: membership
-- description: Who this is, and whether that is a member of one of our roles.
select current_user::text as login, quote_ident(current_user) as quoted, coalesce(pg_has_role(to_regrole(%s::text), 'usage'), true) as member

-- name: pin
-- description: From now on, names are PostgreSQL's own; what the path of the login was is kept.
select pg_catalog.set_config('pg_rekey.login_path', pg_catalog.current_setting('search_path'), false),
  pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false)
where pg_catalog.current_setting('search_path') operator(pg_catalog.<>) 'pg_catalog, pg_temp'

-- name: login path
-- description: The path of the login again, where it was kept.
select pg_catalog.set_config('search_path', pg_catalog.current_setting('pg_rekey.login_path', true), false)
where pg_catalog.current_setting('pg_rekey.login_path', true) operator(pg_catalog.<>) ''

-- name: named
-- description: A table's name with its schema.
select pg_catalog.format('%%I.%%I'::pg_catalog.text, n.nspname, c.relname) as name
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) c.relnamespace
where c.oid operator(pg_catalog.=) %s::pg_catalog.regclass::pg_catalog.oid

-- name: alike
-- description: A table that is called so but for capitals and quotes.
select pg_catalog.format('%%I.%%I'::pg_catalog.text, n.nspname, c.relname) as name
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) c.relnamespace
cross join lateral (select pg_catalog.lower(pg_catalog.replace(%s::pg_catalog.text, '"', '')) as name) g
where c.relkind operator(pg_catalog.=) any ('{r,p}'::pg_catalog."char"[])
  and g.name operator(pg_catalog.=) any (array[
    pg_catalog.lower(c.relname::pg_catalog.text),
    pg_catalog.lower(pg_catalog.format('%%s.%%s'::pg_catalog.text, n.nspname, c.relname))])
order by 1 limit 1

-- name: owner
-- description: Who owns schema rekey, and the version that is in it, for whoever may not call rekey.version(); no row: there is none.
select pg_catalog.pg_get_userbyid(n.nspowner)::pg_catalog.text as owner, (
  select pg_catalog.substring(coalesce(pg_catalog.pg_get_function_sqlbody(p.oid), p.prosrc), $$'([^']+)'$$)
  from pg_catalog.pg_proc p
  where p.pronamespace operator(pg_catalog.=) n.oid and p.proname operator(pg_catalog.=) 'version' and p.pronargs operator(pg_catalog.=) 0) as version
from pg_catalog.pg_namespace n
where n.nspname operator(pg_catalog.=) 'rekey'

-- name: doctor: findings
-- description: Tables, columns, sequences and rows that are not as they should be.
select f.severity, f.finding, f.advice, f.action, s.relation::text as relation, s.column_name::text as column_name
from rekey.findings() f
left join rekey.column_status s on s.label = f.target

-- name: doctor: row security
-- description: Tables whose policies do not apply.
select 'critical' as severity, format('row security of %s is off: every application reads the ciphertexts of all tenants', c.oid::regclass) as finding,
  format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', c.oid::regclass) as advice
from pg_class c
where c.oid in (to_regclass('rekey.secrets'), to_regclass('rekey.keyrings')) and not c.relrowsecurity

-- name: doctor: logging
-- description: Server settings that write values of statements or parameters to a log.
select 'warning' as severity, format('%s is %s: %s', name, value, why) as finding, advice
from (
  select g.name, current_setting(g.name, true) as value, g.why, g.advice
  from (values
    ('log_statement', 'statements with the values in them are logged',
      'Set log_statement to ddl or none, or send secrets only as bind parameters.'),
    ('log_min_duration_statement', 'slow statements are logged with their parameters', 'Set log_parameter_max_length to 0.'),
    ('log_min_duration_sample', 'sampled statements are logged with their parameters', 'Set log_parameter_max_length to 0.'),
    ('log_parameter_max_length_on_error', 'failed statements are logged with their parameters', 'Set it to 0.'),
    ('auto_explain.log_nested_statements', 'statements within functions are logged', 'Set it to off.'),
    ('auto_explain.log_parameter_max_length', 'plans are logged with their parameters', 'Set it to 0.'),
    ('pgaudit.log_parameter', 'audited statements are logged with their parameters', 'Set it to off.'),
    ('pg_stat_statements.track', 'with track_utility, statements are kept as they were written',
      'Set it to top, or pg_stat_statements.track_utility to off.')
  ) as g (name, why, advice)
) s
where case s.name
  when 'log_statement' then s.value = 'all'
  when 'log_min_duration_statement' then s.value <> '-1' and current_setting('log_parameter_max_length') <> '0'
  when 'log_min_duration_sample' then s.value <> '-1' and current_setting('log_parameter_max_length') <> '0'
    and current_setting('log_statement_sample_rate')::float8 > 0
  when 'log_parameter_max_length_on_error' then s.value <> '0'
  when 'auto_explain.log_nested_statements' then s.value = 'on' and current_setting('auto_explain.log_min_duration', true) <> '-1'
  when 'auto_explain.log_parameter_max_length' then s.value <> '0' and current_setting('auto_explain.log_min_duration', true) <> '-1'
  when 'pgaudit.log_parameter' then s.value = 'on' and current_setting('pgaudit.log', true) <> 'none'
  when 'pg_stat_statements.track' then s.value = 'all' and current_setting('pg_stat_statements.track_utility', true) = 'on'
  else false
end

-- name: doctor: definer functions
-- description: Functions that would run with the rights of a superuser.
select 'critical' as severity, format('%s runs with the rights of the superuser %I', p.oid::regprocedure, r.rolname) as finding,
  'Run `pg-rekey sql` again as its owner, or ALTER FUNCTION ... OWNER TO rekey_owner.' as advice
from pg_proc p
join pg_namespace n on n.oid = p.pronamespace
join pg_roles r on r.oid = p.proowner
where n.nspname = 'rekey' and p.prosecdef and r.rolsuper

-- name: doctor: grants
-- description: What everybody, or everybody on the web, may call or read.
select 'critical' as severity, format('%s may use rekey.%s', coalesce(r.rolname, 'PUBLIC'), o.name) as finding,
  format('REVOKE ALL ON %s FROM %s;', o.what, coalesce(quote_ident(r.rolname), 'PUBLIC')) as advice
from (
  select p.proname || '()', 'ROUTINE ' || p.oid::regprocedure, coalesce(p.proacl, acldefault('f', p.proowner))
  from pg_proc p where p.pronamespace = to_regnamespace('rekey')
  union all
  select c.relname, 'TABLE ' || c.oid::regclass, c.relacl
  from pg_class c where c.relnamespace = to_regnamespace('rekey') and c.relkind in ('r', 'v')
) as o (name, what, acl)
cross join lateral aclexplode(o.acl) a
left join pg_roles r on r.oid = a.grantee
where case
  -- What triggers ask with the rights of whoever writes: it tells states of keys, and nothing of values.
  when a.grantee = 0 then o.name not in ('_is_doomed()', '_may_be_doomed()', '_is_scheduled()', '_refuse_doomed()', '_versions_to_ask()', 'is_sweeping()')
  when r.rolname = 'anon' then true
  -- What the RPC calls, which decides itself who may.
  when r.rolname = 'authenticated' then o.name not in ('_rpc_change()', '_rpc_key_rotation_status()')
end

-- name: doctor: server version
-- description: Minor releases with flaws that endanger keys or rows. All releases that are named were made: there is no 18.5.
with known (flaw, severity, majors, mended) as (
  values
    ('writes past a buffer of pgcrypto where a PGP message is damaged (CVE-2026-2005)', 'critical', '{15,16,17,18}'::int[], '{16,12,8,2}'::int[]),
    ('overwrites newer rows by UPDATE ... WHERE ctid = ...', 'critical', '{15,16,17}', '{15,11,7}'),
    ('writes plaintext by pgp_sym_encrypt() with ciphers that OpenSSL lacks (CVE-2026-14663)', 'warning', '{15,16,17,18}', '{19,15,11,6}')
), server as (
  select current_setting('server_version_num')::int / 10000 as major, current_setting('server_version_num')::int % 10000 as minor
)
select k.severity, format('PostgreSQL %s.%s %s', s.major, s.minor, k.flaw) as finding,
  format('Update the server to %s.%s or later.', s.major, max(m.minor) over ()) as advice
from server s
cross join known k
cross join lateral unnest(k.majors, k.mended) as m(major, minor)
where m.major = s.major and s.minor < m.minor

-- name: doctor: logical decoding
-- description: Slots whose plugin the server does not load, from 15.19, 16.15, 17.11 and 18.6 on. Only superusers and members of pg_read_all_settings see the setting; so it is not looked at, not even by the planner, where no slot has a plugin.
select 'warning' as severity,
  format('replication slot %s gets nothing any more: output_plugin_libraries does not name its plugin, %s', r.slot_name, r.plugin) as finding,
  format('Add %s to output_plugin_libraries, or drop the slot: it keeps WAL, and what follows the database misses its changes.', r.plugin) as advice
from pg_replication_slots r
where not r.plugin = any (regexp_split_to_array(translate(
  current_setting(case when r.plugin <> '' then 'output_plugin_libraries' end, true), ' "', ''), ','))

-- name: doctor: worker
-- description: Whether the unattended work is being done.
select 'critical' as severity, format('the worker has been without the KEK since %s', w.locked_since::timestamptz(0)) as finding,
  'Run `pg-rekey work --forever` with the KEK, or put it where the server finds it: `pg-rekey kek store`.' as advice
from rekey.worker_status w where w.locked_since is not null
union all
select 'warning', format('the last tick failed: %s', w.last_error), 'The audit log has it as rotation.error.'
from rekey.worker_status w where w.last_error is not null
union all
select 'warning', coalesce('no tick since ' || w.last_tick_at::timestamptz(0), 'there has never been a tick'),
  'Let pg_cron (`pg-rekey init`) or `pg-rekey work --forever` run.'
from (select) as one left join rekey.worker_status w on true
where coalesce(w.last_tick_at < now() - interval '5 minutes', true)

-- name: doctor: schedules
-- description: Keyrings that are overdue or never rotate.
select 'warning' as severity, format('keyring %s is overdue since %s', s.keyring, s.next_rotation_at::timestamptz(0)) as finding,
  'Look at `pg-rekey status`; `pg-rekey work` does what is due.' as advice
from rekey.schedule_status s where s.overdue
union all
select 'warning', format('keyring %s has no schedule', s.keyring),
  format('pg-rekey schedule set %s ''90 days''', s.keyring)
from rekey.schedule_status s where s.rotate_every is null

-- name: doctor: HTTP API
-- description: Whether the HTTP API has more rights than it needs.
select distinct 'warning' as severity, format('pg-rekey serve is connected as the superuser %I', a.usename) as finding,
  'Give it a role of its own: CREATE ROLE rekey_api LOGIN IN ROLE rekey_admin.' as advice
from pg_stat_activity a
join pg_roles r on r.oid = a.usesysid and r.rolsuper
where a.datname = current_database() and a.application_name = 'pg-rekey serve'

-- name: doctor: notifications
-- description: Whether whoever is to be told is told.
select 'warning' as severity, format('endpoint %s: %s', s.name, s.problem) as finding,
  format('`pg-rekey notify remove %s`, and add it again.', s.name) as advice
from rekey.endpoint_status s where s.problem is not null
union all
select 'warning', format('%s messages have waited for endpoint %s since %s: %s', s.waiting, s.name, s.failing_since::timestamptz(0), s.last_error),
  format('`pg-rekey notify test %s` tries it now.', s.name)
from rekey.endpoint_status s where s.failing_since < now() - interval '5 minutes'
union all
select 'warning', format('%s messages to endpoint %s were given up', s.dead, s.name), format('`pg-rekey notify messages --endpoint %s --state dead` shows them.', s.name)
from rekey.endpoint_status s where s.dead > 0
union all
select 'warning', 'messages wait, and nobody tries to deliver them',
  'Run `pg-rekey work --forever` or `pg-rekey serve` where the KEK is at hand.'
where exists (select from rekey.message_status m where m.state = 'waiting' and m.attempts = 0 and m.created_at < now() - interval '15 minutes')

-- name: doctor: rotations
-- description: Rotations that ended badly.
select 'critical' as severity, format('rotation %s of keyring %s failed: %s', r.id, r.keyring, r.last_error) as finding,
  format('pg-rekey rotations retry %s', r.id) as advice
from rekey.rotation_status r where r.state = 'failed'
union all
select 'critical', format('%s did not open in rotation %s of keyring %s', case when count(*) = 1 then '1 row' else count(*) || ' rows' end,
    f.rotation_id, f.keyring),
  format('pg-rekey rotations failures %s', f.rotation_id)
from rekey.failure_status f where f.resolved_at is null and f.rotation_id is not null
group by f.rotation_id, f.keyring

-- name: doctor: KEK
-- description: Where the KEK is, how old, and whether it is still there.
select 'warning' as severity, 'the KEK is in the database that it protects' as finding,
  'PCI DSS 3.6.1.2 forbids it. Use the provider file, or session with `pg-rekey work --forever`.' as advice
from rekey.setting_status s where s.name = 'kek_provider' and s.value = 'vault'
union all
-- NIST SP 800-57 Part 1 Rev. 5, 5.3.6: a symmetric key-wrapping key wraps for two years at most.
select 'warning', format('the KEK is in use since %s, more than two years', k.created_at::timestamptz(0)),
  'Rotate it: `pg-rekey kek generate`, then `pg-rekey kek rotate`.'
from rekey.keks k where k.state = 'active' and k.created_at < now() - interval '2 years'
union all
select 'critical', 'no KEK is registered', 'Run `pg-rekey init`.'
where not exists (select from rekey.keks where state = 'active')

-- name: trusted
-- description: Whether an extension owns a relation and functions in this database, and nobody else's code can run with them: as rekey._trusted_relation(), where pg_rekey may not be.
with extension as (
  select e.oid, e.extowner from pg_extension e where e.extname = %(extension)s
), members as (
  select d.classid, d.objid from pg_depend d join extension e on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid and d.deptype = 'e'
), owners as (
  select r.oid from pg_roles r
  where r.rolsuper or not (select o.rolsuper from pg_roles o where o.rolname = current_user) and r.oid in (select e.extowner from extension e)
)
select exists (
  select from members m
  join pg_class c on m.classid = 'pg_class'::regclass and c.oid = m.objid and c.relkind in ('r', 'v')
  join pg_namespace n on n.oid = c.relnamespace
  where n.nspname = %(schema)s and c.relname = %(name)s and c.relowner in (select o.oid from owners o)
    and not exists (
      select from pg_trigger t join pg_proc p on p.oid = t.tgfoid
      where t.tgrelid = c.oid and not t.tgisinternal and t.tgtype::integer & %(events)s <> 0
        and p.oid not in (select i.objid from members i where i.classid = 'pg_proc'::regclass)
        and not (select r.rolsuper from pg_roles r where r.oid = p.proowner)))
  and not exists (
    select from unnest(%(functions)s::text[]) as f(signature)
    where not exists (
      select from members m join pg_proc p on m.classid = 'pg_proc'::regclass and p.oid = m.objid
      where p.oid = to_regprocedure(f.signature) and p.proowner in (select o.oid from owners o))) as trusted

-- name: cron jobs
-- description: The worker's jobs of a database, as far as this role may see them.
select j.jobid, j.command, j.active, j.username, r.rolsuper as superuser
from cron.job j
left join pg_roles r on r.rolname = j.username
where j.database = %s and lower(j.command) ~ 'rekey\.(tick|run_rotations|watch)'
order by j.jobid

-- name: set secrets
-- description: Store many secrets of one tenant.
select rekey.set_secrets(%s::text[], %s::text[], tenant_id => %s, keyring => %s)

-- name: demo damage
-- description: Flip a bit in the ciphertext of a secret; return what it was.
update rekey.secrets s
set ciphertext = set_byte(s.ciphertext, 40, get_byte(s.ciphertext, 40) # 1)
from rekey.secrets o
where o.tenant_id = s.tenant_id and o.id = s.id and s.name = %s
returning o.ciphertext, s.id

-- name: open endpoints
-- description: The endpoints with their addresses, for who delivers.
select e.id, e.name, e.kind, e.allow_private, e.opened from rekey._open_endpoints() e

-- name: watch
-- description: Makes messages of what happened, where there are endpoints; deliver: some wait.
select rekey._tick_duty('notifications', now()) as next where exists (select from rekey.endpoint_status)

-- name: add endpoint
-- description: Adds an endpoint, with its address from a temporary table.
select rekey.add_endpoint(%s, e.address, %s::text[], %s, %s, %s) as secret from pg_temp.pg_rekey_endpoint e

-- name: endpoints
-- description: Who is told what happens.
select s.name, s.kind, s.events, s.allow_private, s.by_pg_net, s.created_at, s.waiting, s.dead, s.last_delivered_at, s.failing_since,
  coalesce(s.problem, s.last_error) as problem
from rekey.endpoint_status s
order by s.name

-- name: messages
-- description: Messages to endpoints, newest first.
select m.id, m.endpoint, m.event, m.text, m.created_at, m.state, m.attempts, m.next_attempt_at, m.ended_at, m.last_error
from rekey.message_status m
where (%(endpoint)s::text is null or m.endpoint = %(endpoint)s)
  and (%(state)s::text is null or m.state = %(state)s)
  and (%(before)s::bigint is null or m.id < %(before)s)
order by m.id desc
limit %(limit)s

-- name: names: endpoint
-- description: The endpoints.
select s.name from rekey.endpoint_status s order by s.name

-- name: api transaction
-- description: What every transaction of the HTTP API begins with: a time limit, who asks, for the audit log, and the role that his token has.
select set_config('statement_timeout', %s, true), set_config('request.jwt.claims', %s, true), set_config('role', %s, true)

-- name: more than
-- description: Roles of pg_rekey, beside this one, that the login is a member of.
select r.name as role
from unnest('{rekey_admin,rekey_operator,rekey_auditor,rekey_app,rekey_owner}'::text[]) as r (name)
where r.name <> %s and pg_has_role(session_user, to_regrole(r.name), 'member')

-- name: api rotations
-- description: A page of rotations, newest first.
select * from rekey.rotation_status
where (%(keyring)s::text is null or keyring = %(keyring)s)
  and (%(state)s::text is null or state = %(state)s)
  and (%(before)s::bigint is null or id < %(before)s)
order by id desc
limit %(limit)s

-- name: api keyring
-- description: Keyrings with their active versions and schedules.
select k.name, k.tenant_id, v.version as active_version, v.activated_at as active_since, s.rotate_every::text as rotate_every,
  s.next_rotation_at, coalesce(s.overdue, false) as overdue, k.created_at, k.retired_at
from rekey.keyrings k
left join rekey.schedule_status s on s.keyring = k.name
left join rekey.key_status v on v.keyring = k.name and v.state = 'active'

-- name: api keyrings
-- description: A page of keyrings, by name.
select k.name, k.tenant_id, v.version as active_version, v.activated_at as active_since, s.rotate_every::text as rotate_every,
  s.next_rotation_at, coalesce(s.overdue, false) as overdue, k.created_at, k.retired_at
from rekey.keyrings k
left join rekey.schedule_status s on s.keyring = k.name
left join rekey.key_status v on v.keyring = k.name and v.state = 'active'
where (%(after)s::text is null or k.name > %(after)s)
order by k.name
limit %(limit)s

-- name: api schedule
-- description: When a keyring is rotated next.
select keyring, tenant_id, rotate_every::text as rotate_every, next_rotation_at, overdue from rekey.schedule_status where keyring = %s

-- name: api failures
-- description: A page of the quarantine, newest first.
select * from rekey.failure_status
where (%(rotation)s::bigint is null or rotation_id = %(rotation)s)
  and (%(all)s or resolved_at is null)
  and (%(before)s::bigint is null or id < %(before)s)
order by id desc
limit %(limit)s

-- name: unprotected
-- description: Columns that were forgotten.
select relation::text as relation, column_name::text as column_name, finding, rows, advice, action from rekey.find_unprotected()

-- name: api settings
-- description: The settings.
select name, value, description from rekey.setting_status order by name

-- name: api audit log
-- description: A page of the audit log, newest first.
select * from rekey.audit_log
where (%(keyring)s::text is null or keyring = %(keyring)s)
  and (%(event)s::text is null or event = %(event)s)
  and (%(actor)s::text is null or %(actor)s in (actor, jwt_subject))
  and (%(since)s::timestamptz is null or at >= %(since)s)
  and (%(until)s::timestamptz is null or at < %(until)s)
  and (%(before)s::bigint is null or id < %(before)s)
order by id desc
limit %(limit)s

-- name: api progress
-- description: Rotations that are under way, and those that somebody follows.
select * from rekey.rotation_status
where state in ('queued', 'running', 'paused', 'verifying', 'failed') or id = any (%(ids)s)
order by id
limit %(limit)s

-- name: console keyrings
-- description: A page of keyrings, each with its active version, the rows that its last rotation found, and what is under way.
with listed as (
  select k.id, k.name, k.retired_at, v.version, v.activated_at, s.rotate_every, s.next_rotation_at, coalesce(s.overdue, false) as overdue,
    count(*) over () as total
  from rekey.keyrings k
  left join rekey.schedule_status s on s.keyring = k.name
  left join rekey.key_status v on v.keyring = k.name and v.state = 'active'
  where %(search)s::text is null or position(lower(%(search)s) in lower(k.name)) > 0
  order by case when %(sort)s = 'next' then s.next_rotation_at when %(sort)s = 'age' then v.activated_at end, k.name
  limit %(limit)s offset %(offset)s
)
select l.*, (extract(epoch from clock_timestamp() - l.activated_at) / extract(epoch from l.rotate_every))::double precision as age,
  clock_timestamp() - l.activated_at as since, r.id as rotation, r.state, r.rows_total as rows
from listed l
left join lateral (
  select r.id, r.state, r.rows_total from rekey.rotation_status r where r.keyring = l.name order by r.id desc limit 1) r on true
order by case when %(sort)s = 'next' then l.next_rotation_at when %(sort)s = 'age' then l.activated_at end, l.name

-- name: console light
-- description: What the traffic light looks at: the worker, the KEK, what is overdue, what is held up.
select w.last_tick_at, w.last_error, w.locked_since,
  coalesce(w.last_tick_at > clock_timestamp() - interval '5 minutes', false) as ticking,
  exists (select from rekey.keks e where e.state = 'active') as kek,
  (select count(*) from rekey.schedule_status s where s.overdue) as overdue,
  (select count(*) from rekey.rotation_status r where r.state in ('failed') or r.state in ('running', 'verifying') and r.blocked_by is not null) as blocked,
  (select count(*) from rekey.column_status c where c.problem is not null) as columns,
  (select count(*) from rekey.failure_status f where f.resolved_at is null) as failures
from (select) as one
left join rekey.worker_status w on true

-- name: console history
-- description: The last rotations that ended, newest first.
select r.*, r.finished_at - r.started_at as took, extract(epoch from r.finished_at - r.started_at)::double precision as seconds,
  (r.rows_done / nullif(extract(epoch from r.finished_at - r.started_at), 0))::double precision as rows_per_second
from rekey.rotation_status r
where (%(before)s::bigint is null or r.id < %(before)s)
order by r.id desc
limit %(limit)s

-- name: console latest
-- description: The last rotation of a keyring.
select max(r.id) as id from rekey.rotation_status r where r.keyring = %s

-- name: console events
-- description: The kinds of entries that the audit log may have, for a choice.
select m[1] as event
from pg_constraint c, regexp_matches(pg_get_constraintdef(c.oid), '''([a-z_.]+)''', 'g') m
where c.conrelid = 'rekey.audit_log'::regclass and c.conname = 'audit_log_event_check'
order by 1

-- name: adoption under way
-- description: The adoption of a column that has not ended.
select r.id, r.formats, r.forced, r.unwrap
from rekey.rotation_status r
join rekey.column_status s on s.label = r.adopts
where s.relation = %s::regclass and s.column_name = %s and r.state in ('queued', 'running', 'paused', 'verifying', 'failed')

-- name: adopt column
-- description: Queue the adoption of a column.
select * from rekey.adopt_column(%s::regclass, %s, %s, %s, %s, %s, %s)

-- name: adoption doubt
-- description: Why an adoption would not begin without force.
select rekey.adoption_doubt(%s::regclass, %s, %s, %s) as doubt

-- name: adoption batch
-- description: Adopt a batch as far as the server can; what only the client can open comes back.
select a.relation::oid as relation, a.rows::text[] as rows, a.keys, a.formats, a.problems, a.legacy
from rekey.adoption_batch(%s) a

-- name: adoption preview
-- description: What an adoption would find in one range of a column.
select a.relation::oid as relation, a.keys, a.formats, a.problems, a.legacy, a.next::text as next, a.next_relation::oid as next_relation
from rekey.adoption_preview(%s::regclass, %s, %s, %s, %s::oid::regclass, %s::tid) a

-- name: columns
-- description: Protected columns, and whether each can be swept.
select s.label, s.relation::text as relation, s.column_name::text as column_name, s.keyring, s.context_columns::text[] as context_columns,
  s.encrypt_on_write, s.fire_triggers, s.search_path, s.index_column::text as index_column, s.normalization, s.problem
from rekey.column_status s
order by s.label

-- name: column findings
-- description: What rotations of protected columns break or set off.
select f.label, f.finding, f.advice, f.action, s.relation::text as relation, s.column_name::text as column_name
from rekey.protection_findings() f join rekey.column_status s on s.label = f.label
where f.kind <> 'blocked'

-- name: protect column
-- description: Put a column under rotation; its triggers run with the given path, else with that of the login.
select rekey.protect_column(%s::regclass, %s, %s, %s::name[], %s, %s,
  coalesce(%s, nullif(current_setting('pg_rekey.login_path', true), ''), current_setting('search_path')))

-- name: make searchable
-- description: Has the blind index of a protected column made, or filled anew; returns the statement that indexes it.
select rekey.make_searchable(%s::regclass, %s, %s, %s) as statement

-- name: filling
-- description: The rotations that fill the blind index of a protected column.
select r.id from rekey.column_status s join rekey.rotation_status r on r.keyring = s.keyring
where s.relation = %s::regclass and s.column_name = %s and r.state in ('queued', 'running', 'paused', 'verifying') and r.trigger <> 'adoption'
order by r.id

-- name: search indexes
-- description: The indexes that begin with the blind index of a protected column.
select i.indexrelid::regclass::text as name, i.indisunique as unique, i.indisvalid as valid
from rekey.column_status s
join pg_attribute a on a.attrelid = s.relation and a.attname = s.index_column
join pg_index i on i.indrelid = s.relation and i.indkey[0] = a.attnum
where s.relation = %s::regclass and s.column_name = %s

-- name: never searched
-- description: What `columns find` does not look into, whoever asks: foreign tables, of which ten, and large objects.
(select format('foreign table %s', c.oid::regclass) as name from pg_class c where c.relkind = 'f' order by 1 limit 10)
union all
select format('%s large objects', count(*)) from pg_largeobject_metadata having count(*) > 0

-- name: rebind column
-- description: Binds a protected column to the table and column that hold its values now.
select rekey.rebind_column(%s::regclass, %s::name, %s)

-- name: unprotect column
-- description: Take a column out of rotation; how many rows were decrypted this time.
select rekey.unprotect_column(%s::regclass, %s, %s)

-- name: adopt vault
-- description: Copy the secrets of the Supabase Vault.
select rekey.adopt_vault(%s, %s)

-- name: dropped column
-- description: The label of a protected column that has lost its table.
select s.label from rekey.column_status s where s.relation is null and s.label = format('%%s.%%I', %s::text, %s::text)

-- name: uninstall
-- description: What `uninstall` finds: pg_rekey, by which road, who installed it, whether this role may remove it, and where pg_cron lives.
select current_database()::text as database,
  exists (select from pg_class c where c.relnamespace = to_regnamespace('rekey') and c.relname = 'settings') as installed,
  e.extowner is not null as extension, pg_get_userbyid(coalesce(e.extowner, p.proowner))::text as installer,
  coalesce((select r.rolsuper from pg_roles r where r.rolname = current_user)
    or (pg_has_role(to_regrole('rekey_owner'), 'usage') and pg_has_role(to_regrole('rekey_sweeper'), 'usage')
      and pg_has_role(to_regrole('rekey_admin'), 'usage') and pg_has_role(to_regrole('rekey_app'), 'usage')
      and coalesce(pg_has_role(coalesce(e.extowner, p.proowner), 'usage'), true)), false) as permitted,
  exists (select from pg_extension where extname = 'pg_cron') as pg_cron,
  (select setting from pg_settings where name = 'cron.database_name') as cron_database
from (select) as one
left join pg_extension e on e.extname = 'pg_rekey'
left join pg_proc p on p.pronamespace = to_regnamespace('public') and p.proname = 'rotate_keys'
  and pg_get_function_identity_arguments(p.oid) = 'keyring text, reason text, supersede boolean'

-- name: uninstall databases
-- description: Other databases of this server that have something of rekey_owner's: pg_rekey.
select distinct d.datname::text as name
from pg_shdepend s
join pg_database d on d.oid = s.dbid
where s.refclassid = 'pg_authid'::regclass and s.refobjid = to_regrole('rekey_owner') and d.datname <> current_database()
order by 1

-- name: uninstall roles
-- description: The roles of pg_rekey that are there, owners first, with their members, but for each other.
select r.rolname::text as name, array(
  select m.member::regrole::text from pg_auth_members m
  where m.roleid = r.oid and m.member::regrole::text !~ '^rekey_(admin|worker)$' and m.member <> current_user::regrole
  order by 1) as members
from unnest('{rekey_owner,rekey_sweeper,rekey_worker,rekey_admin,rekey_operator,rekey_auditor,rekey_app}'::name[]) with ordinality as o(name, place)
join pg_roles r on r.rolname = o.name
order by o.place

-- name: uninstall columns
-- description: Protected columns, with the owner of their table.
select s.label, s.relation::oid as relation, format('%I.%I', n.nspname, c.relname) as table, s.column_name::text as column, s.keyring,
  s.problem, pg_get_userbyid(c.relowner)::text as owner
from rekey.column_status s
left join pg_class c on c.oid = s.relation
left join pg_namespace n on n.oid = c.relnamespace
order by s.label

-- name: uninstall envelopes
-- description: Columns that hold envelopes, and tables that cannot be searched.
select f.relation::oid as relation, format('%I.%I', n.nspname, c.relname) as table, f.column_name::text as column, f.envelopes,
  f.embedded, c.relkind = 'm' as copied
from rekey.find_envelopes() f
join pg_class c on c.oid = f.relation
join pg_namespace n on n.oid = c.relnamespace
where f.column_name is null or f.envelopes > 0 or f.embedded > 0

-- name: uninstall rows
-- description: Every row that is encrypted, opened: how many do not open, and on which versions they stand.
select v.relation, v.keyring, v.version, v.rows, v.failed, k.state
from rekey.verify_ciphertexts() v
left join rekey.key_status k on k.keyring = v.keyring and k.version = v.version

-- name: uninstall counts
-- description: What is to be exported.
select (select count(*) from rekey.secrets) as secrets, (select count(distinct tenant_id) from rekey.secrets) as tenants,
  (select count(*) from rekey.audit_log) as audit_entries

-- name: uninstall objects
-- description: What lies in the schemas of pg_rekey, but for what belongs to a table, and to protected columns.
select format('%s.%s', c.relnamespace::regnamespace, c.relname) as name
from pg_class c
where c.relnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace) and c.relkind not in ('i', 'I', 't')
  and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'i' and c.relkind = 'S')
union
select format('%s.%s', p.pronamespace::regnamespace, p.proname)
from pg_proc p
where p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
  and not (p.pronamespace = 'rekey_targets'::regnamespace and p.proname ~ '^column_\d+_')
union
select format('%s.%s', t.typnamespace::regnamespace, t.typname)
from pg_type t
where t.typnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace) and t.typtype in ('d', 'e', 'r')

-- name: uninstall strays
-- description: What the roles that own pg_rekey own elsewhere: DROP OWNED would take it along.
select pg_describe_object(s.classid, s.objid, s.objsubid) as object, pg_get_userbyid(s.refobjid)::text as owner
from pg_shdepend s
cross join lateral pg_identify_object(s.classid, s.objid, s.objsubid) o
where s.refclassid = 'pg_authid'::regclass and s.refobjid in (to_regrole('rekey_owner'), to_regrole('rekey_sweeper')) and s.deptype = 'o'
  and s.dbid = (select d.oid from pg_database d where d.datname = current_database())
  and coalesce(o.schema, o.name) not in ('rekey', 'rekey_targets')
order by 1

-- name: uninstall dependents
-- description: Objects of others that need something of pg_rekey.
with ours (classid, objid) as (
  select 'pg_namespace'::regclass, n.oid from pg_namespace n where n.nspname in ('rekey', 'rekey_targets')
  union all
  select 'pg_class'::regclass, c.oid from pg_class c where c.relnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
  union all
  select 'pg_type'::regclass, t.oid from pg_type t where t.typnamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
  union all
  select 'pg_proc'::regclass, p.oid from pg_proc p
  where p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)
    or p.oid in (to_regprocedure('public.rotate_keys(text,text,boolean)'), to_regprocedure('public.key_rotation_status()'),
      to_regprocedure('public.pause_rotation(bigint)'), to_regprocedure('public.retry_rotation(bigint)'),
      to_regprocedure('public.rollback_rotation(bigint,text)'), to_regprocedure('public.mark_key_compromised(text,integer,text)'))
), parts (classid, objid) as (
  select * from ours
  union all select 'pg_attrdef'::regclass, a.oid from pg_attrdef a join ours o on o.objid = a.adrelid and o.classid = 'pg_class'::regclass
  union all select 'pg_constraint'::regclass, c.oid from pg_constraint c join ours o on o.objid = c.conrelid and o.classid = 'pg_class'::regclass
  union all select 'pg_rewrite'::regclass, r.oid from pg_rewrite r join ours o on o.objid = r.ev_class and o.classid = 'pg_class'::regclass
  union all select 'pg_policy'::regclass, p.oid from pg_policy p join ours o on o.objid = p.polrelid and o.classid = 'pg_class'::regclass
  union all select 'pg_trigger'::regclass, t.oid from pg_trigger t join ours o on o.objid = t.tgrelid and o.classid = 'pg_class'::regclass
  -- Those that encrypt on write go with the protection of their column.
  union all select 'pg_trigger'::regclass, t.oid from pg_trigger t join ours o on o.objid = t.tgfoid and o.classid = 'pg_proc'::regclass
    where t.tgname ~ '^zz_pg_rekey_\d+(_insert|_update|_look|_carry)?$'
)
select distinct coalesce(
  (select pg_describe_object('pg_class'::regclass, r.ev_class, 0) from pg_rewrite r where d.classid = 'pg_rewrite'::regclass and r.oid = d.objid),
  pg_describe_object(d.classid, d.objid, d.objsubid)) as dependent
from pg_depend d
join ours o on o.classid = d.refclassid and o.objid = d.refobjid
where d.deptype = 'n' and not exists (select from parts p where p.classid = d.classid and p.objid = d.objid)
order by 1

-- name: uninstall RPC
-- description: The functions of schema public that are ours.
select distinct p.oid::regprocedure::text as function
from pg_proc p
join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.refclassid = 'pg_proc'::regclass
join pg_proc r on r.oid = d.refobjid and r.pronamespace = 'rekey'::regnamespace
where p.pronamespace = 'public'::regnamespace and (p.proname, r.proname) in (
  ('rotate_keys', '_rpc_change'), ('key_rotation_status', '_rpc_key_rotation_status'), ('pause_rotation', '_rpc_change'),
  ('retry_rotation', '_rpc_change'), ('rollback_rotation', '_rpc_change'), ('mark_key_compromised', '_rpc_change'))

-- name: uninstall locks
-- description: What locks the views and tables of pg_rekey, in the order in which whoever reads them locks them. LOCK TABLE of a view would lock what it reads, system catalogs too.
select case c.relkind when 'v' then format('alter view %I.%I owner to %I', n.nspname, c.relname, pg_get_userbyid(c.relowner))
  else format('lock table %I.%I in access exclusive mode', n.nspname, c.relname) end as statement
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'rekey' and c.relkind in ('v', 'r')
order by c.relkind desc, c.relname

-- name: uninstall cron usage
-- description: Whether rekey_worker has what rekey.schedule_worker() grants it.
select exists (
  select from pg_namespace n, aclexplode(n.nspacl) a where n.nspname = 'cron' and a.grantee = to_regrole('rekey_worker')) as granted

-- name: export keyrings
-- description: The keyrings that secrets stand on, with the interval in ISO 8601.
select k.name, k.tenant_id, k.rotate_every::text as rotate_every
from rekey.keyrings k
where exists (select from rekey.secrets s where s.keyring_id = k.id)
order by k.name

-- name: export secrets
-- description: All there is about every secret, but for its value.
select s.tenant_id, s.id, s.name, k.name as keyring, s.description, s.created_at, s.updated_at
from rekey.secrets s
join rekey.keyrings k on k.id = s.keyring_id
order by s.tenant_id, s.name

-- name: export audit log
-- description: Entries of the audit log, with every part of a hash as it goes into it.
select a.id, to_char(a.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') as at, a.actor, a.role, a.jwt_subject, a.event, a.keyring,
  a.version, a.rotation_id, a.details::text as details, encode(a.prev_hash, 'hex') as prev_hash, encode(a.hash, 'hex') as hash
from rekey.audit_log a
where a.id between %(first)s and %(last)s
order by a.id

-- name: audit archive range
-- description: The entries after the last removal that are older than a time; without one, those that may be removed.
with pruned as (
  select coalesce(max((a.details ->> 'last')::bigint), 0) as last from rekey.audit_log a where a.event = 'audit.pruned'
), newest as (
  select least(a.at, clock_timestamp()) as at from rekey.audit_log a order by a.id desc limit 1
), old as (
  select coalesce(%(until)s, newest.at - s.value::interval) as until
  from newest join rekey.setting_status s on s.name = 'audit_keep'
), range as (
  select pruned.last + 1 as first,
    coalesce(min(a.id) filter (where a.at >= old.until) - 1, max(a.id)) as last
  from pruned, old, rekey.audit_log a
  where a.id > pruned.last
  group by pruned.last
)
select r.first, r.last, encode(f.prev_hash, 'hex') as prev_hash, encode(l.hash, 'hex') as hash
from range r
join rekey.audit_log f on f.id = r.first
join rekey.audit_log l on l.id = r.last
where r.last >= r.first

-- name: audit removals
-- description: What was removed from the audit log, and to which files.
select a.id, a.details from rekey.audit_log a where a.event = 'audit.pruned' order by a.id

-- name: audit kept
-- description: The entries of the audit log that stayed when those around them were removed.
select a.id, encode(a.hash, 'hex') as hash from rekey.audit_log a where a.id <= %s order by a.id

-- name: import keyring
-- description: A keyring of an export, where there is none of that name.
select rekey.create_keyring(given.name, given.tenant_id, given.rotate_every)
from (values (%s, %s::uuid, %s::interval)) as given (name, tenant_id, rotate_every)
where not exists (select from rekey.keyrings k where k.name = given.name)
