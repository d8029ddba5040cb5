#!/bin/sh
# Runs once, when the data directory is made.
set -eu

# The roles of PostgREST and Supabase come first: pg_rekey grants them its RPC where it finds them. Passwords come
# from the service `init`.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
create role anon nologin;
create role authenticated nologin;
create role service_role nologin bypassrls;
create role authenticator login noinherit in role anon, authenticated, service_role;
create extension pg_cron;
create extension pg_rekey cascade;
create role rekey_api login in role rekey_admin;
create role rekey_api_operate login in role rekey_operator;
create role rekey_api_read login in role rekey_auditor;
SQL

# Where the provider `file` looks for the KEK: a link, so that no copy of the data has the KEK in it.
ln -s /run/secrets/kek "$PGDATA/pg_rekey.kek"
ln -s /run/secrets/kek_new "$PGDATA/pg_rekey.kek_new"
