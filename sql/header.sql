-- pg_rekey __VERSION__: key rotation and online re-encryption on pgcrypto and pg_cron.
-- The whole script runs in one transaction.
set local search_path = pg_catalog, pg_temp;

do $$
begin
  if current_setting('server_version_num')::int < 150000 then
    raise exception 'pg_rekey needs PostgreSQL 15 or later, this is %', current_setting('server_version')
      using errcode = 'feature_not_supported';
  end if;
  if not exists (select from pg_catalog.pg_extension where extname = 'pgcrypto') then
    raise exception 'pg_rekey needs the extension pgcrypto'
      using errcode = 'undefined_object', hint = 'Run CREATE EXTENSION pgcrypto first.';
  end if;
end
$$;
