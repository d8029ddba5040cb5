"""The service `init` of docker-compose.yml: runs `pg-rekey init`, then gives the other logins passwords.

Safe to repeat: it runs at each `docker compose up`, and so follows secrets that were made anew.
"""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg import sql

from pg_rekey.errors import LOCKED

SECRETS = Path("/run/secrets")
LOGINS = {
    "rekey_worker": "worker",
    "rekey_api": "api",
    "rekey_api_operate": "api",
    "rekey_api_read": "api",
    "authenticator": "postgrest",
}
KEK = """
The KEK is the file `kek` in the directory that PG_REKEY_SECRETS names. `make kek` makes it where it is
missing, and lets the containers read it. Then: docker compose up --detach --force-recreate
"""


def main() -> int:
    """Do it, and return the exit code."""
    os.environ["PGPASSWORD"] = (SECRETS / "postgres").read_text(encoding="utf-8").strip()
    command = ["pg-rekey", "init", "--provider", os.environ["PG_REKEY_PROVIDER"]]
    try:
        connection = psycopg.connect(autocommit=True)
    except psycopg.OperationalError as error:
        print(error, file=sys.stderr)
        return 1
    with connection:
        # The schedule is given once; later on it is whatever `pg-rekey schedule` made of it.
        if connection.execute("select from rekey.keyrings where name = 'default'").rowcount == 0:
            command += ["--rotate-every", os.environ["PG_REKEY_ROTATE_EVERY"]]
        if code := subprocess.run(command, check=False).returncode:
            if code == LOCKED:
                print(KEK, file=sys.stderr)
            return code
        for role, secret in LOGINS.items():
            set_password(connection, role, password(secret))
    return 0


def password(secret: str) -> bytes:
    """Return the password of a secret, which is a service file of libpq."""
    service = configparser.ConfigParser(interpolation=None)
    service.read_string((SECRETS / secret).read_text(encoding="utf-8"))
    return service["pg_rekey"]["password"].encode()


def set_password(connection: psycopg.Connection, role: str, secret: bytes) -> None:
    """Give a role its password, of which the server and its logs see only what SCRAM stores."""
    verifier = connection.pgconn.encrypt_password(secret, role.encode(), b"scram-sha-256").decode()
    connection.execute(
        sql.SQL("alter role {} password {}").format(sql.Identifier(role), sql.Literal(verifier))
    )


if __name__ == "__main__":
    sys.exit(main())
