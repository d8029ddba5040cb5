#!/bin/sh
# Runs once, when the data directory is made.
set -eu

# The roles of PostgREST and Supabase come first: pg_rekey grants them its RPC where it finds them.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
create role anon nologin;
create role authenticated nologin;
create role service_role nologin bypassrls;
create extension pg_cron;
create extension pg_rekey cascade;
SQL

# Where the provider `file` looks for the KEK: a link, so that no copy of the data has the KEK in it.
ln -s /run/secrets/kek "$PGDATA/pg_rekey.kek"
