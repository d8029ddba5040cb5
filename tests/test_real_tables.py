"""Tables of real tools with what those tools store, under triggers as projects have them.

Airflow, cal.com and n8n here; MeshHook is tests/test_example_meshhook.py. Column by column they are what
pg_dump prints of an installation; the comments say which.
"""

import base64
import json
import os
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.fernet import Fernet, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from psycopg import sql

from cli_fixtures import Cli
from helpers import Connection, value
from pg_rekey import release

pytest_plugins = ["cli_fixtures", "column_fixtures"]

# Unqualified, as in any project: an audit of whole rows, a notification, updated_at where there is one.
TRIGGERS = """
    create table audit (id bigint generated always as identity, entry jsonb);
    create function audit() returns trigger language plpgsql as
      $$ begin insert into audit (entry) values (to_jsonb(new)); return null; end $$;
    create function tell() returns trigger language plpgsql as
      $$ begin perform pg_notify('changes', tg_table_name); return null; end $$;
    create function touch() returns trigger language plpgsql as
      $$ begin new."updatedAt" := clock_timestamp(); return new; end $$;
    create trigger audited after insert or update on {table} for each row
      when (pg_trigger_depth() = 0) execute function audit();
    create trigger told after insert or update on {table} for each row execute function tell();
"""


@dataclass
class Tool:
    """A tool's table in schema app, whose owner is who the tool logs in as."""

    cli: Cli
    admin: Connection
    login: Connection
    fires: bool
    told: list[str]

    def make(self, table: str, statements: str) -> None:
        self.login.execute(statements.encode())
        self.login.execute(TRIGGERS.format(table=table).encode())

    def fill(self, table: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.insert(table, row)
        self.heard()

    def insert(self, table: str, row: dict[str, Any]) -> None:
        names = sql.SQL(", ").join(map(sql.Identifier, row))
        values = sql.SQL(", ").join(sql.Placeholder() * len(row))
        self.login.execute(
            sql.SQL("insert into {} ({}) values ({})").format(sql.SQL(table), names, values),
            list(row.values()),
        )

    def protect(self, table: str, column: str, *options: str) -> None:
        switch = [] if self.fires else ["--no-fire-triggers"]
        command = ("columns", "protect", f"app.{table}", column, "--encrypt-on-write", "--search-path", "app")
        self.cli(*command, *switch, *options)

    def adopt(self, table: str, column: str, *options: str, code: int = 0) -> None:
        self.cli("columns", "adopt", f"app.{table}", column, *options, code=code)

    def view(self, table: str, view: str) -> None:
        self.cli("columns", "view", f"app.{table}")
        self.admin.execute(f"grant select on app.{view} to {self.login.info.user}".encode())

    def rotate(self) -> None:
        self.cli("rotate", "--wait")

    def quarantined(self) -> list[str]:
        query = "select array_agg(row_key order by row_key) from rekey.failure_status"
        return list(value(self.admin, query) or [])

    def heard(self) -> tuple[int, int]:
        """Return how many rows the audit and the listeners got since the last call."""
        counted = value(self.login, "with gone as (delete from audit returning 1) select count(*) from gone")
        told = len(self.told)
        self.told.clear()
        return counted, told

    def sees(self, rows: int) -> None:
        """What the triggers saw of that many rows."""
        audited, told = self.heard()
        assert (audited, told > 0) == ((rows, True) if self.fires else (0, False))


@pytest.fixture(params=[True, False], ids=["triggers fire", "triggers do not fire"])
def tool(
    request: pytest.FixtureRequest, cli_ready: Cli, ready: Connection, app: Connection, owner: str
) -> Tool:
    if not request.param:
        ready.execute(f"grant set on parameter session_replication_role to {owner}".encode())
    told: list[str] = []
    app.add_notify_handler(lambda notification: told.append(notification.payload))
    app.execute("listen changes")
    return Tool(cli_ready, ready, app, request.param, told)


def damaged(token: str) -> str:
    """Change a character in the middle."""
    place = len(token) // 2
    return token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]


# Airflow 3.1 (2.9 and later have the same), PostgreSQL. The unique constraint is of migration 2.2.
CONNECTION = """
    create table connection (
      id serial not null constraint connection_pkey primary key,
      conn_id character varying(250) not null constraint connection_conn_id_uq unique,
      conn_type character varying(500) not null, description text, host character varying(500),
      schema character varying(500), login text, password text, port integer, is_encrypted boolean,
      is_extra_encrypted boolean, extra text)"""


def airflow_row(
    fernet: MultiFernet | None, name: str, password: str | None, extra: str | None
) -> dict[str, Any]:
    """What Connection.set_password() and set_extra() store: what is empty is not encrypted."""

    def stored(text: str | None) -> str | None:
        return fernet.encrypt(text.encode()).decode() if fernet and text else text

    return {
        "conn_id": name,
        "conn_type": "postgres",
        "login": "someone",
        "password": stored(password),
        "is_encrypted": bool(fernet and password),
        "extra": stored(extra),
        "is_extra_encrypted": bool(fernet and extra),
    }


def test_airflow(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of two keys, plain ones of the time before there was a key, NULL, '', and one that looks so."""
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    before, now = MultiFernet([Fernet(old)]), MultiFernet([Fernet(new), Fernet(old)])
    monkeypatch.setenv("PG_REKEY_FROM_FERNET", f"{new},{old}")  # FERNET_KEY as it stands in airflow.cfg
    extra = json.dumps({"aws_access_key_id": "AKIA", "region": "zürich", "key": "-----BEGIN\n" + "x" * 3000})
    tool.make("connection", CONNECTION)
    expected = {
        "old": ("pässword", extra),
        "new": ("p", "{}"),
        "no password": (None, extra),
        "empty": ("", ""),
        "plain": ("plain password", '{"a": 1}'),
        "looks so": ("gAAAAA-not-a-token", None),
    }
    by = {"old": before, "plain": None, "looks so": None}
    rows = [airflow_row(by.get(name, now), name, *both) for name, both in expected.items()]
    bad = airflow_row(now, "damaged", "lost", None)
    bad["password"] = damaged(bad["password"])
    tool.fill("connection", [*rows, bad])
    for column in ("password", "extra"):
        tool.protect("connection", column, "--context", "conn_id")
    formats = ("--from", "fernet", "--from", "plaintext")
    tool.adopt("connection", "password", "--from", "plaintext", "--dry-run", code=5)
    tool.adopt("connection", "password", *formats, "--dry-run", code=5)
    assert tool.heard() == (0, 0)
    tool.adopt("connection", "password", *formats, code=4)
    tool.sees(5)
    assert tool.quarantined() == ["7"]
    assert value(tool.login, "select password from connection where conn_id = 'damaged'") == bad["password"]
    tool.login.execute("delete from connection where conn_id = 'damaged'")
    tool.adopt("connection", "password", *formats)
    tool.adopt("connection", "extra", *formats)
    tool.sees(5)
    # What the table holds is plain text to Airflow now.
    tool.login.execute("update connection set is_encrypted = false, is_extra_encrypted = false")
    tool.heard()

    def seen() -> dict[str, tuple[str | None, str | None]]:
        query = "select conn_id, password, extra from connection_decrypted"
        return {name: (password, extra) for name, password, extra in tool.login.execute(query)}

    tool.view("connection", "connection_decrypted")
    assert seen() == expected
    tool.rotate()
    tool.sees(10)
    assert seen() == expected
    # `airflow connections add`, and an edit in the UI, without FERNET_KEY.
    added = airflow_row(None, "added", "s3cret", extra)
    tool.insert("connection", added)
    tool.login.execute("update connection set password = 'edited', extra = '{}' where conn_id = 'plain'")
    expected |= {"added": ("s3cret", extra), "plain": ("edited", "{}")}
    assert seen() == expected
    stored = "select count(*) from connection where password !~ '^rk1:' or extra !~ '^rk1:'"
    assert value(tool.login, stored) == 0
    assert tool.heard()[0] == 2
    # A connection that is renamed.
    tool.login.execute("update connection set conn_id = 'renamed' where conn_id = 'old'")
    expected["renamed"] = expected.pop("old")
    tool.rotate()
    assert seen() == expected
    tool.cli("verify")


# cal.com 6 (packages/prisma/schema.prisma; encryptedKey since January 2026), as Prisma makes it.
CREDENTIAL = """
    create table "users" ("id" serial not null, "email" text not null,
      "twoFactorSecret" text, "backupCodes" text, constraint "users_pkey" primary key ("id"));
    create unique index "users_email_key" on "users" ("email");
    create table "Credential" ("id" serial not null, "type" text not null, "key" jsonb not null,
      "encryptedKey" text, "userId" integer, "teamId" integer, "appId" text, "subscriptionId" text,
      "paymentStatus" text, "billingCycleStart" integer, "invalid" boolean default false,
      "delegationCredentialId" text, constraint "Credential_pkey" primary key ("id"));
    create index "Credential_userId_idx" on "Credential" ("userId");
    alter table "Credential" add constraint "Credential_userId_fkey" foreign key ("userId")
      references "users" ("id") on delete cascade on update cascade;
    create table "SelectedCalendar" ("userId" integer not null, "integration" text not null,
      "externalId" text not null, "credentialId" integer,
      constraint "SelectedCalendar_pkey" primary key ("userId", "integration", "externalId"),
      constraint "SelectedCalendar_credentialId_fkey" foreign key ("credentialId")
        references "Credential" ("id") on delete cascade on update cascade)"""
TYPES = ("google_calendar", "zoom_video")


def calcom_envelope(key: bytes, type_: str, plaintext: str) -> str:
    """What encryptSecret() of packages/lib/crypto/keyring.ts stores."""
    nonce = os.urandom(12)
    aad = json.dumps({"type": type_}, separators=(",", ":")).encode()
    sealed = AESGCM(key).encrypt(nonce, plaintext.encode(), aad)
    parts = {"nonce": nonce, "ct": sealed[:-16], "tag": sealed[-16:]}
    encoded = {name: base64.urlsafe_b64encode(part).decode().rstrip("=") for name, part in parts.items()}
    document = {"v": 1, "alg": "AES-256-GCM", "ring": "CREDENTIALS", "kid": "K1", **encoded}
    return json.dumps(document, separators=(",", ":"))


def kept(format_: str, key: str | None = None) -> list[tuple[str, str, str]]:
    """Return key, plaintext and value of what the real code has written (tests/ciphertexts)."""
    entries = json.loads((release.ROOT / "tests" / "ciphertexts" / "npm.json").read_text())
    return [
        (one["key"], one["plaintext"], one["value"])
        for one in entries
        if one["format"] == format_ and key in (None, one["key"])
    ]


def test_calcom(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two forms that encryptedKey has had, side by side, and rows without it."""
    key = os.urandom(32)
    text = base64.urlsafe_b64encode(key).decode().rstrip("=")
    lines = [f'{text} {{"type": "{one}"}}' for one in TYPES]
    monkeypatch.setenv("PG_REKEY_FROM_CALCOM", "\n".join(lines))
    cbc = kept("aes_cbc")
    monkeypatch.setenv("PG_REKEY_FROM_AES_CBC", cbc[0][0])
    tool.make('"Credential"', CREDENTIAL)
    tool.login.execute("insert into users (email) values ('a@example.com'), ('b@example.com')")
    plain = [json.dumps({"access_token": f"ya29.{number}", "scope": "ü"}) for number in range(20)]
    made = [(one, calcom_envelope(key, TYPES[at % 2], one)) for at, one in enumerate(plain)]
    made += [(plaintext, stored) for _, plaintext, stored in cbc]
    rows = [
        {"type": TYPES[at % 2], "key": "{}", "encryptedKey": stored, "userId": 1 + at % 2}
        for at, (_, stored) in enumerate(made)
    ]
    other = calcom_envelope(key, "of another type", "lost")
    ends = [damaged(made[0][1]), cbc[0][2][:-2] + "00", other]
    more = [{"type": TYPES[0], "key": "{}", "encryptedKey": one, "userId": 1} for one in (*ends, None)]
    tool.fill('"Credential"', [*rows, *more])
    tool.cli("columns", "protect", "app.Credential", "encryptedKey", code=1)
    assert '"Credential"' in tool.cli.err
    tool.cli("columns", "protect", 'app."Credential"', "key", code=1)
    assert "jsonb" in tool.cli.err
    tool.protect('"Credential"', "encryptedKey")
    formats = ("--from", "calcom", "--from", "aes_cbc")
    for options in (("--dry-run",), ()):
        tool.adopt('"Credential"', "encryptedKey", "--from", "plaintext", *options, code=5)
    tool.adopt('"Credential"', "encryptedKey", *formats, "--dry-run", code=5)
    assert tool.heard() == (0, 0)
    tool.adopt('"Credential"', "encryptedKey", *formats, code=4)
    tool.sees(len(made))
    assert tool.quarantined() == [str(len(made) + number) for number in (1, 2, 3)]
    tool.login.execute('delete from "Credential" where "encryptedKey" !~ %s', ["^rk1:"])
    tool.adopt('"Credential"', "encryptedKey", *formats)
    tool.view('"Credential"', '"Credential_decrypted"')

    def seen() -> list[str | None]:
        query = 'select "encryptedKey" from "Credential_decrypted" order by id'
        return [one for (one,) in tool.login.execute(query)]

    expected: list[str | None] = [*(plaintext for plaintext, _ in made), None]
    assert seen() == expected
    tool.heard()
    tool.rotate()
    tool.sees(len(made))
    # As Prisma writes, and what foreign keys do with the rows around it.
    insert = """
        insert into "app"."Credential" ("type", "key", "encryptedKey", "userId") values (%s, %s, %s, %s)
        returning "app"."Credential"."id", "app"."Credential"."encryptedKey" """
    number, returned = tool.login.execute(insert, [TYPES[0], "{}", plain[0], 2]).fetchall()[0]
    assert returned.startswith("rk1:")
    tool.login.execute('insert into "SelectedCalendar" values (2, %s, %s, %s)', [TYPES[0], "primary", number])
    tool.login.execute('update "Credential" set "encryptedKey" = %s where id = 1', [plain[5]])
    tool.login.execute('update "Credential" set id = 1000 where id = %s', [number])
    tool.login.execute("update users set id = 7 where id = 2")
    expected[0] = plain[5]
    assert seen() == [*expected, plain[0]]
    tool.rotate()
    assert seen() == [*expected, plain[0]]
    tool.cli("verify")


def test_calcom_second_factors(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """users.twoFactorSecret and backupCodes: symmetricEncrypt() under CALENDSO_ENCRYPTION_KEY."""
    values = kept("aes_cbc")
    monkeypatch.setenv("PG_REKEY_FROM_AES_CBC", values[0][0])
    tool.make("users", CREDENTIAL)
    stored = [one for _, _, one in values]
    tool.fill("users", [{"email": f"{at}@x", "twoFactorSecret": one} for at, one in enumerate(stored)])
    tool.protect("users", "twoFactorSecret", "--context", "email")
    tool.adopt("users", "twoFactorSecret", "--from", "plaintext", code=5)
    tool.adopt("users", "twoFactorSecret", "--from", "aes_cbc")
    tool.sees(len(values))
    tool.view("users", "users_decrypted")
    seen = 'select array_agg("twoFactorSecret" order by id) from users_decrypted'
    assert value(tool.login, seen) == [plaintext for _, plaintext, _ in values]
    tool.rotate()
    assert value(tool.login, seen) == [plaintext for _, plaintext, _ in values]


# n8n 2 (as pg_dump prints it); ids are the application's, and there is a second unique index on them.
CREDENTIALS_ENTITY = """
    create table credentials_entity (
      name character varying(128) not null, data text not null, type character varying(128) not null,
      "createdAt" timestamp(3) with time zone default current_timestamp(3) not null,
      "updatedAt" timestamp(3) with time zone default current_timestamp(3) not null,
      id character varying(36) not null constraint credentials_entity_pkey primary key,
      "isManaged" boolean default false not null, "isGlobal" boolean default false not null,
      "isResolvable" boolean default false not null, "resolvableAllowFallback" boolean default false not null,
      "resolverId" character varying(16));
    create index idx_07fde106c0b471d8cc80a64fc8 on credentials_entity using btree (type);
    create unique index pk_credentials_entity_id on credentials_entity using btree (id)"""


def test_n8n(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of two encryptionKeys, of an import from another installation."""
    values = kept("openssl")
    monkeypatch.setenv("PG_REKEY_FROM_OPENSSL", "\n".join(dict.fromkeys(key for key, _, _ in values)))
    tool.make("credentials_entity", CREDENTIALS_ENTITY)
    tool.login.execute(
        "create trigger touched before update on credentials_entity for each row execute function touch()"
    )
    stored = [one for _, _, one in values]
    bad = stored[-1][:-8] + "AAAAAAA="
    rows = [
        {"id": f"id{at}", "name": "Postgres account", "type": "postgres", "data": one}
        for at, one in enumerate([*stored, bad])
    ]
    tool.fill("credentials_entity", rows)
    tool.protect("credentials_entity", "data")
    tool.adopt("credentials_entity", "data", "--from", "plaintext", code=5)
    tool.adopt("credentials_entity", "data", "--from", "openssl", "--dry-run", code=5)
    moved = 'select count(*) from credentials_entity where "updatedAt" > "createdAt" and data ~ \'^rk1:\''
    assert value(tool.login, moved) == 0
    tool.adopt("credentials_entity", "data", "--from", "openssl", code=4)
    tool.sees(len(values))
    assert value(tool.login, moved) == (len(values) if tool.fires else 0)
    assert tool.quarantined() == [f"id{len(values)}"]
    tool.login.execute("delete from credentials_entity where data = %s", [bad])
    tool.adopt("credentials_entity", "data", "--from", "openssl")
    tool.view("credentials_entity", "credentials_entity_decrypted")

    def seen() -> dict[str, str]:
        return dict(tool.login.execute("select id, data from credentials_entity_decrypted").fetchall())

    expected = {f"id{at}": plaintext for at, (_, plaintext, _) in enumerate(values)}
    assert seen() == expected
    tool.heard()
    tool.rotate()
    tool.sees(len(values))
    assert seen() == expected
    # As TypeORM saves.
    data = json.dumps({"host": "db", "password": "s3cret"})
    insert = """
        insert into "app"."credentials_entity"
        ("createdAt", "updatedAt", "id", "name", "data", "type", "isManaged")
        values (default, default, %s, %s, %s, %s, default) returning "createdAt", "updatedAt", "isManaged" """
    tool.login.execute(insert, ["new", "n", data, "postgres"])
    update = """
        update "app"."credentials_entity" set "data" = %s, "updatedAt" = current_timestamp(3)
        where "id" in (%s)"""
    tool.login.execute(update, [data, "id0"])
    expected |= {"new": data, "id0": data}
    assert seen() == expected
    assert value(tool.login, "select count(*) from credentials_entity where data !~ '^rk1:'") == 0
    tool.rotate()
    assert seen() == expected
    tool.cli("verify")
