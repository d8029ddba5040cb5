#!/bin/sh
# Makes the secrets of docker-compose.yml that are missing: the KEK, passwords, a token. Overwrites none. Needs
# neither Docker nor root. They lie in the directory PG_REKEY_SECRETS, ./secrets by default.
#
# Only the owner reaches the directory. The files in it can be read by everybody, since Compose mounts a file with the
# mode that it has here, and the services run as users that this machine does not know.
set -eu
umask 077
cd "$(dirname "$0")/.."
directory=${PG_REKEY_SECRETS:-$(sed -n 's/^PG_REKEY_SECRETS=//p' .env 2>/dev/null || true)}
directory=${directory:-./secrets}
mkdir -p "$directory"
chmod 700 "$directory"

random() { od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n'; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1; }

missing() { [ ! -e "$directory/$1" ]; }

keep() { # NAME: what standard input has becomes a file, whole or not at all
  cat >"$directory/.new"
  ln "$directory/.new" "$directory/$1" # fails where there is one
  rm "$directory/.new"
  echo "made $directory/$1"
}

if missing kek; then
  random | keep kek
  echo '  Keep a copy of it where the backups of the database are not: nothing opens without it.'
fi
if missing postgres; then random | keep postgres; fi
if missing jwt; then random | keep jwt; fi
# Service files of libpq: unlike .pgpass, they may be readable by others.
for name in worker api postgrest; do
  if missing $name; then printf '[pg_rekey]\npassword=%s\n' "$(random)" | keep $name; fi
done
if missing api_tokens; then
  token=$(random)
  # The hash last: as long as it is missing, both are made anew.
  rm -f "$directory/admin.header"
  printf 'Authorization: Bearer %s\n' "$token" | keep admin.header
  printf 'admin:%s\n' "$(printf %s "$token" | sha256)" | keep api_tokens
fi
for name in kek postgres jwt worker api postgrest api_tokens; do chmod 644 "$directory/$name"; done

# By this, Compose knows that they are there.
if ! grep -q '^PG_REKEY_SECRETS=' .env 2>/dev/null; then
  printf 'PG_REKEY_SECRETS=%s\n' "$directory" >>.env
fi
echo 'all secrets are there; next: docker compose up -d'
