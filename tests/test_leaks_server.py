"""A server that writes down all it can, every function, every command: no key and no value is left anywhere.

What an application itself sends in a statement is out of scope: here, values go by binary COPY.
"""

import base64
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import psycopg
import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from psycopg.conninfo import make_conninfo

import forked
import reference
from canaries import Canaries, explained_parameters
from conftest import not_counted
from driving import refused
from helpers import (
    Connection,
    all_functions,
    belong,
    called_functions,
    connect,
    create_database,
    disconnect_others,
    install,
    unlock,
    value,
)
from pg_rekey import local, release
from pg_rekey.api import tokens
from pg_rekey.cli import main
from receivers import mail_server, receiver
from test_leaks import (
    NEXT,
    OPEN,
    PASSPHRASE,
    REPLACEMENT,
    VALUE,
    WRONG,
    Session,
    copy_in,
    deks,
    fill,
    use_all,
    use_columns,
)

COMMAND = Path(sys.executable).parent / "pg-rekey"
LOUD = {
    "logging_collector": "on",
    "log_destination": "stderr,csvlog",
    "log_directory": "loud",
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_error_verbosity": "verbose",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
    "log_replication_commands": "on",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_verbose": "on",
    "auto_explain.log_triggers": "on",
    "auto_explain.log_settings": "on",
    "pg_stat_statements.track": "all",
    "pg_stat_statements.track_utility": "on",
    "track_activity_query_size": "65536",
    "track_functions": "all",
    "wal_level": "logical",
    "wal_keep_size": "1GB",
    "max_wal_size": "2GB",
}
PGAUDIT = {
    "pgaudit.log": "all",
    "pgaudit.log_parameter": "on",
    "pgaudit.log_catalog": "on",
    "pgaudit.log_rows": "on",
    "pgaudit.log_relation": "on",
}
# A session of the test's own, which nothing is to be learnt from.
QUIET = (
    "-c log_statement=none -c log_min_duration_statement=-1 -c log_min_messages=fatal"
    " -c auto_explain.log_min_duration=-1 -c pg_stat_statements.track=none -c pgaudit.log=none"
)

# Like the real one, it shows the value to no log: there, it is for the Vault to see to that.
VAULT = """
create schema vault;
create table vault.secrets (
  id uuid default gen_random_uuid(), name text unique, description text, secret text);
create view vault.decrypted_secrets as
select id, name, description, secret as decrypted_secret from vault.secrets;
create function vault.create_secret(
  new_secret text, new_name text, new_description text, new_key_id uuid) returns uuid
language plpgsql set auto_explain.log_min_duration = -1 {quiet} as $$
begin
  insert into vault.secrets (name, description, secret) values (new_name, new_description, new_secret);
  return null;
end
$$;
create function vault.update_secret(
  secret_id uuid, new_secret text, new_name text, new_description text, new_key_id uuid) returns void
language plpgsql set auto_explain.log_min_duration = -1 {quiet} as $$
begin
  update vault.secrets set secret = new_secret where id = secret_id;
end
$$;
"""


def words(what: str) -> str:
    """Return a text that stands nowhere else."""
    return f"canary of {what} {os.urandom(8).hex()}"


class Commands:
    """Runs pg-rekey; keeps what every command printed, in a file."""

    def __init__(self, folder: Path, dsn: str, canaries: Canaries) -> None:
        self.folder = folder
        self.canaries = canaries
        self.called: set[str] = set()
        self.keks: dict[str, bytes] = {}  # by variable
        self._numbers = itertools.count(1)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["forked"])
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PG_REKEY_DSN": dsn,
            "LANG": "C.UTF-8",
        }

    def environment(self, number: int) -> dict[str, str]:
        """Return the environment of a command, with the KEKs by each of the three roads in turn."""
        found = dict(self._environment)
        for name, kek in self.keks.items():
            path = self.folder / f"{name}-{kek.hex()[:6]}"
            path.write_text(kek.hex())
            self.canaries.allow(path, "key", "open key")
            roads = {"": kek.hex(), "_FILE": str(path), "_COMMAND": f"cat {path}"}
            kind = list(roads)[number % 3]
            found[name + kind] = roads[kind]
        return found

    def __call__(
        self,
        line: str,
        *,
        code: int = 0,
        stdin: str | bytes = b"",
        shows: bool = False,
        given: Mapping[str, str] | None = None,
        **environment: str,
    ) -> str:
        """Run a command that should end with this code, and return what it printed on standard output."""
        number = next(self._numbers)
        arguments = tuple(line.split())
        self.note(arguments)
        stem = self.folder / f"{number:03}-{'-'.join(arguments[:2])}"
        source, out, err = (stem.with_suffix(suffix) for suffix in (".in", ".out", ".err"))
        source.write_bytes(stdin if isinstance(stdin, bytes) else stdin.encode())
        self.canaries.allow(source, "")
        if shows:
            self.canaries.allow(out, "")
        options = self.environment(number) | dict(given or {}) | environment
        process = self._context.Process(target=forked.call, args=(arguments, options, source, out, err))
        process.start()
        process.join(60)
        assert process.exitcode == code, f"{line}: {process.exitcode}\n{out.read_text()}\n{err.read_text()}"
        return out.read_text()

    def start(self, line: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start the command that is installed."""
        number = next(self._numbers)
        arguments = tuple(line.split())
        self.note(arguments)
        stem = self.folder / f"{number:03}-{'-'.join(arguments[:2])}"
        with stem.with_suffix(".out").open("wb") as out, stem.with_suffix(".err").open("wb") as err:
            return subprocess.Popen(
                [COMMAND, *arguments], env=self.environment(number) | environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err,
            )  # fmt: skip

    def note(self, arguments: tuple[str, ...]) -> None:
        command: click.Command = main
        names = []
        for name in arguments:
            if not isinstance(command, click.Group):
                break
            command = command.commands[name]
            names.append(name)
        self.called.add(" ".join(names))


def all_commands(command: click.Command = main, *names: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            yield from all_commands(one, *names, name)
    else:
        yield " ".join(names)


class Sampler:
    """Notes, all the time, what one session can see of the others."""

    def __init__(self, dsn: str, path: Path) -> None:
        self._dsn = dsn
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples = 0

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        seen: set[str] = set()
        with self._path.open("w") as file:
            while not self._stop.is_set():
                # The server is restarted meanwhile.
                with contextlib.suppress(psycopg.Error), connect(self._dsn, options=QUIET) as connection:
                    while not self._stop.wait(0.002):
                        self.samples += 1
                        rows = connection.execute(
                            "select concat_ws(' ', application_name, query) from pg_stat_activity"
                            if self.samples % 20
                            else "select query from pg_stat_statements"
                            " union all select l::text from pg_locks l"
                        )
                        fresh = {text for (text,) in rows} - seen
                        seen |= fresh
                        file.writelines(f"{text}\n" for text in fresh)


class Scenario:
    """Everything pg_rekey can do, on a server of its own, with canaries for keys and values.

    The names of canaries begin with what they are: `key` and `value` must be nowhere; an `open` one is also a
    plain value of a user's table, the Vault or the server, and so in the data directory; a `control` is
    leaked on purpose.
    """

    def __init__(self, server: local.Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.canaries = Canaries()
        self.dsn = server.dsn("app")
        self.commands = Commands(folder, self.dsn, self.canaries)
        self.sql_functions: set[str] = set()

    def key(self, name: str, kind: str = "key") -> bytes:
        """Make a key of 32 bytes."""
        made = os.urandom(32)
        self.canaries.add(f"{kind} {name}", made)
        self.canaries.add(f"key, wrapping, of {name}", reference.wrapping_key(made))
        return made

    @property
    def vault_quiet(self) -> str:
        return "set pgaudit.log = 'none'" if self.server.installation.has("pgaudit") else ""

    def text(self, name: str, kind: str = "value") -> str:
        made = words(name)
        self.canaries.add(f"{kind} {name}", made)
        return made

    def quiet(self, database: str = "app") -> Connection:
        return connect(self.server.dsn(database), options=QUIET)

    def note_deks(self, database: str, *known: bytes) -> None:
        """Unwrap what keys there are now: later they are destroyed, or wrapped under another KEK."""
        with self.quiet(database) as connection:
            for dek in deks(connection, *known):
                self.canaries.add(f"key, DEK {dek.hex()[:6]} of {database}", dek)
            rows = connection.execute("select key from rekey._session_key").fetchall()
            for (key,) in rows:
                self.canaries.add(f"open session key of {database}", key)

    def note_functions(self, database: str) -> None:
        with self.quiet(database) as connection:
            disconnect_others(connection)
            self.sql_functions |= called_functions(connection)


def sessions(scenario: Scenario) -> None:
    """What test_leaks.py does in two sessions."""
    kek = scenario.key("of the sessions")
    scenario.canaries.add("key replacement of the sessions", REPLACEMENT)
    for name, secret in (("next", NEXT), ("wrong", WRONG)):
        scenario.canaries.add(f"open key {name} of the sessions", secret)  # in a Vault
    scenario.canaries.add("value of the sessions", VALUE.encode())
    scenario.canaries.add("value, passphrase of the sessions", PASSPHRASE.encode())
    scenario.canaries.add("open value of the sessions", OPEN.encode())
    with scenario.quiet("one") as quiet, connect(scenario.server.dsn("one")) as connection:
        for dek in use_all(Session(connection, {}), quiet, kek):
            scenario.canaries.add(f"key, DEK {dek.hex()[:6]} of one", dek)
    with scenario.quiet("two") as quiet, connect(scenario.server.dsn("two")) as connection:
        use_columns(Session(connection, {}), quiet, kek)
    for database in ("one", "two"):
        scenario.note_deks(database, kek, NEXT, REPLACEMENT)
        scenario.note_functions(database)


def begin(scenario: Scenario) -> None:
    """KEKs that are right, wrong, broken or absent; init."""
    run, first = scenario.commands, scenario.key("first")
    run("kek generate", shows=True)
    run("kek generate --json", shows=True)
    generated = scenario.folder / "generated.kek"
    run(f"kek generate --out {generated}")
    scenario.canaries.add("key generated", bytes.fromhex(generated.read_text()))
    scenario.canaries.allow(generated, "key generated")
    run("init", code=3)
    run("init", code=3, PG_REKEY_KEK=first.hex()[:62])
    run("init", code=3, PG_REKEY_KEK=first.hex(), PG_REKEY_KEK_FILE=str(generated))
    printing = f"printf '%s' {first.hex()} >&2; printf '%s' {first.hex()}; exit 1"
    run("init", code=3, PG_REKEY_KEK_COMMAND=f'sh -c "{printing}"')
    password = scenario.text("password")
    run("status", code=2, PG_REKEY_DSN=f"postgresql://user:{password.replace(' ', '/')}@localhost/x")
    run("status", code=9, PG_REKEY_DSN=f"host=127.0.0.1 port=1 user=u password='{password}'")
    run.keks["PG_REKEY_KEK"] = first
    run("init --rotate-every 90days")
    run("init --json")
    wrong = scenario.key("wrong")
    for line in ("kek check", "secrets get a", "rotate --all", "verify --json", "init"):
        run(line, code=3, PG_REKEY_KEK_FILE="", PG_REKEY_KEK_COMMAND="", PG_REKEY_KEK=wrong.hex())
    wrong_file = scenario.folder / "wrong.kek"
    wrong_file.write_bytes(wrong)
    scenario.canaries.allow(wrong_file, "key wrong")
    run(f"kek check --file {wrong_file}", code=3)
    run("kek check --json")
    run("kek list")


def use_secrets(scenario: Scenario) -> None:
    """Values by standard input and by files."""
    run, one, two, large = scenario.commands, *(scenario.text(name) for name in ("one", "two", "large"))
    run("secrets set one --description words", stdin=one)
    run("secrets set one --json", stdin=one + "\n")
    run("secrets run -- true")
    big = scenario.folder / "large.txt"
    big.write_text(os.urandom(50_000).hex() + large + os.urandom(50_000).hex())
    env = scenario.folder / "some.env"
    env.write_text(f"TWO='{two}'\nONE={two}\n")
    broken = scenario.folder / "broken.env"
    broken.write_text(f"GOOD={one}\nBAD='{two}\n")
    for path in (big, env, broken):
        scenario.canaries.allow(path, "value")
    run(f"secrets set large --file {big}")
    run(f"secrets import {env}")
    run(f"secrets import {env} --json")
    run(f"secrets import {broken}", code=1)
    run("secrets set bad", code=1, stdin=one.encode() + b"\xff")
    run("secrets set bad", code=2, stdin=one + "\0")
    run("secrets set bad --keyring none", code=6, stdin=one)
    assert run("secrets get one", shows=True) == one
    run("secrets get one --json", shows=True)
    run("secrets get none", code=6)
    run("secrets list")
    exported = scenario.folder / "exported.env"
    run(f"secrets export --out {exported}")
    assert large in exported.read_text()
    scenario.canaries.allow(exported, "value")
    run(f"secrets export --out {exported}", code=1)
    run("secrets export", shows=True)
    run("secrets export --json", shows=True)
    run("secrets rm TWO --yes")
    for path in (exported, scenario.folder / "generated.kek"):
        assert path.stat().st_mode & 0o777 == 0o600


LEGACY = {
    "pgp_sym": ("bytea", "PG_REKEY_FROM_PGP_SYM"),
    "fernet": ("text", "PG_REKEY_FROM_FERNET"),
    "v1": ("text", "PG_REKEY_FROM_V1"),
    "aes_gcm": ("bytea", "PG_REKEY_FROM_AES_GCM"),
}


def use_columns_of_the_application(scenario: Scenario) -> None:
    """Protect, adopt every format, write, read, let go."""
    run = scenario.commands
    passphrase = scenario.text("passphrase")
    keys = {name: scenario.key(name) for name in ("fernet", "v1", "aes_gcm")}
    given = {
        "pgp_sym": f"{scenario.text('wrong passphrase')}\n{passphrase}\n",
        "fernet": base64.urlsafe_b64encode(keys["fernet"]).decode(),
        "v1": base64.b64encode(keys["v1"]).decode(),
        "aes_gcm": keys["aes_gcm"].hex(),
    }
    adopted = {name: scenario.text(f"adopted from {name}") for name in LEGACY}
    with scenario.quiet() as quiet:
        for name, (kind, _) in LEGACY.items():
            quiet.execute(f"create table {name} (id int primary key, v {kind})".encode())
        message = "insert into pgp_sym select g, pgp_sym_encrypt(%s, %s) from generate_series(1, 5) g"
        quiet.execute(message, (adopted["pgp_sym"], passphrase))
        for number in range(5):
            token = Fernet(given["fernet"]).encrypt(adopted["fernet"].encode()).decode()
            quiet.execute("insert into fernet values (%s, %s)", (number, token))
            nonce = os.urandom(12)
            sealed = AESGCM(keys["v1"]).encrypt(nonce, adopted["v1"].encode(), None)
            parts = (nonce, sealed[-16:], sealed[:-16])
            text = ":".join(["v1", *(base64.b64encode(part).decode() for part in parts)])
            quiet.execute("insert into v1 values (%s, %s)", (number, text))
            sealed = nonce + AESGCM(keys["aes_gcm"]).encrypt(nonce, adopted["aes_gcm"].encode(), None)
            quiet.execute("insert into aes_gcm values (%s, %s)", (number, sealed))
        quiet.execute("insert into aes_gcm values (9, '\\x00')")  # does not open
        quiet.execute("create table plain (id int primary key, v text)")
        before = scenario.text("plain", "open")
        quiet.execute("insert into plain select g, %s from generate_series(1, 5) g", (before,))
        quiet.execute("create table written (id int primary key, v text)")
    for name, (_, variable) in LEGACY.items():
        key, damaged = {variable: given[name]}, name == "aes_gcm"
        run(f"columns protect {name} v")
        run(f"columns adopt {name} v --from {name} --dry-run", code=5 if damaged else 0, given=key)
        run(f"columns adopt {name} v --from {name}", code=4 if damaged else 0, given=key)
        run(f"columns adopt {name} v --from {name} --json", code=3)
    run("columns adopt fernet v --from fernet", code=3, PG_REKEY_FROM_FERNET=given["fernet"][:-3])
    run("columns adopt v1 v --from v1", code=3, PG_REKEY_FROM_V1=given["v1"][:20])
    run("columns protect plain v --json")
    run("columns adopt plain v --from plaintext")
    run("columns protect written v --encrypt-on-write")
    written = scenario.text("written")
    with connect(scenario.dsn) as connection:
        unlock(connection, run.keks["PG_REKEY_KEK"])
        connection.execute("create temporary table given (id int, v text)")
        copy_in(connection, "given", ["int4", "text"], (1, written), (2, written + os.urandom(50_000).hex()))
        connection.execute("insert into written select * from given")
        connection.execute("update written set v = g.v from given g where written.id = g.id and g.id = 1")
        with refused("RK003"):
            connection.execute("update written set v = (select v from written where id = 2) where id = 1")
        run("columns view written")
        connection.execute("select * from written_decrypted")
    run("columns search written v --normalization trim_lower")
    run("work")
    with connect(scenario.dsn) as connection:
        unlock(connection, run.keks["PG_REKEY_KEK"])
        connection.execute("create temporary table given (v text)")
        copy_in(connection, "given", ["text"], (written,), (scenario.text("searched for"),))
        for search in ("search('public.written.v', g.v)", "search_many('public.written.v', array[g.v])"):
            query = f"select count(*) from given g join written w on w.v_bidx = any (rekey.{search})"
            assert value(connection, query) == 1
    run("columns list")
    run("columns rebind written v --yes")
    run("columns find --json", code=5)
    run("columns unprotect plain v --decrypt --yes")
    run("rotations failures")
    run("rotations resolve 1 discard --reason test")


def use_keys(scenario: Scenario) -> None:
    """Keyrings, versions, rotations, schedules, settings, the audit log: what handles keys without values."""
    run = scenario.commands
    run("keyrings create busy")
    run("keyrings create gone --json")
    run("keyrings retire gone --yes")
    run("keyrings list")
    run("keyrings confirm-emptied default --yes")
    run("secrets set busy --keyring busy", stdin=scenario.text("busy"))
    run("rotate --keyring busy --dry-run")
    run("rotate --keyring busy --reason test")
    number = json.loads(run("rotations list --keyring busy --json"))[0]["id"]
    for verb in ("pause", "resume", "rollback", "show"):
        run(f"rotations {verb} {number}")
    run(f"rotations retry {number}", code=1)
    run("work")
    scenario.note_deks("app", run.keks["PG_REKEY_KEK"])
    run("rotate --all --wait --json")
    run("rotations watch")
    run("completion bash")
    run("keys list")
    run("keys disable busy 1")
    run("keys enable busy 1")
    run("keys compromise busy 1 --yes")
    run("work --health-file /nowhere/health", code=1)
    run("work")
    run("keys schedule-destruction busy 1 --yes")
    run("keys search")
    run("keys cancel-destruction busy 1")
    run("keys usage")
    run("schedule set busy 1day --first-at now")
    run("schedule show")
    run("schedule clear busy")
    run("settings set batch_target 100ms")
    run("settings show")
    for line in ("status", "status --json", "verify", "metrics", "sql", "upgrade", "doctor"):
        run(line, code=5 if line == "doctor" else 0)
    key = scenario.folder / "audit.key"
    run(f"audit keygen {key}")
    scenario.canaries.allow(key, "key of the audit log")
    scenario.canaries.add("key of the audit log", "".join(key.read_text().splitlines()[1:-1])[24:])
    assert key.stat().st_mode & 0o777 == 0o600
    point = scenario.folder / "checkpoint"
    run(f"audit checkpoint --key {key} --out {point}")
    run(f"audit checkpoint --key {key} --json")
    run(f"audit verify --anchor {point} --public-key {key}.pub")
    run(f"audit verify --anchor {key} --public-key {point}", code=1)
    broken = scenario.folder / "broken.key"
    broken.write_text(key.read_text().replace("BEGIN", "BEGUN"))
    scenario.canaries.allow(broken, "key of the audit log")
    run(f"audit checkpoint --key {broken}", code=1)
    run("audit list")
    entries = scenario.folder / "audit.jsonl"
    run(f"audit export {entries} --key {key} --until 2000-01-01", code=1)
    run(f"audit prune {entries} --public-key {key}.pub --yes", code=2)


ROUTES = (
    "/api/keys/rotate",
    "/api/keys",
    "/api/rotations",
    "/api/rotations/1",
    "/api/audit",
    "/metrics",
    "/healthz",
    "/openapi.json",
    "/nowhere",
)


def serve(scenario: Scenario) -> None:
    """A request of every route, with tokens that are right, wrong and misconfigured."""
    run = scenario.commands
    token, entry = run("serve --new-token alice", shows=True).split()
    scenario.canaries.add("value, API token", token)
    run("serve", code=2, given={tokens.ADMIN: f"alice:{token}"})
    unknown = scenario.text("unknown token")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = run.start(f"serve --port {port}", **{tokens.ADMIN: entry})
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        for path in ROUTES:
            for given in (token, unknown):
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                method = "POST" if path.endswith("rotate") else "GET"
                client.request(method, path, headers={"Authorization": f"Bearer {given}"})
                client.getresponse().read()
                client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def tell(scenario: Scenario) -> None:
    """Endpoints whose addresses are secrets, messages that get there and some that do not."""
    run = scenario.commands
    with receiver() as hook, mail_server() as mail:
        secret = scenario.text("address").replace(" ", "-")
        scenario.canaries.add("value, address of an endpoint", secret)
        password = scenario.text("password").replace(" ", "-")
        scenario.canaries.add("value, password of an endpoint", password)
        address = hook.url.replace("canary-in-address", secret)
        added = run("notify add web --allow-private --json", stdin=address, shows=True)
        scenario.canaries.add("value, signing secret", json.loads(added)["secret"].removeprefix("whsec_"))
        run(
            "notify add mail --allow-private",
            stdin=f"smtp://r:{password}@127.0.0.1:{mail.port}?from=r@example.com&to=a@example.com&tls=no",
        )
        run("notify add wrong", code=1, stdin=f"ftp://{secret}.example.com/")
        run("notify add private", code=2, stdin=address)
        run("notify test web")
        run("notify test mail", code=1)
        hook.answer = lambda _: 500
        run("notify test web", code=1)
        hook.answer = lambda _: 200
        run("rotate --supersede --keyring default")
        run("work")
        assert hook.events().count("test") < len(hook.events())
        run("notify list")
        run("notify messages")
        run("notify remove mail --yes")


def take_out(scenario: Scenario) -> None:
    """Uninstall in a database of its own, and take in what it exported."""
    run, here = scenario.commands, {"PG_REKEY_DSN": scenario.server.dsn("gone")}
    run("init", given=here)
    run("secrets set exported --description words", stdin=scenario.text("exported"), given=here)
    with scenario.quiet("gone") as quiet:
        quiet.execute("create table plain (id int primary key, v text)")
        row = (scenario.text("to be decrypted", "open"),)
        quiet.execute("insert into plain select g, %s from generate_series(1, 5) g", row)
    run("columns protect plain v", given=here)
    run("columns adopt plain v --from plaintext", given=here)
    scenario.note_deks("gone", run.keks["PG_REKEY_KEK"])
    exported, audit_log = scenario.folder / "exported.json", scenario.folder / "audit_log.json"
    options = f"--export {exported} --audit-log {audit_log}"
    run("uninstall --dry-run", code=5, given=here)
    run(f"uninstall {options}", code=1, given=here)
    run(f"uninstall {options} --dry-run --json", given=here)
    run(f"uninstall {options} --yes --json", given=here)
    run("uninstall --yes", given=here)
    assert scenario.canaries.secret("value exported").decode() in exported.read_text()
    scenario.canaries.allow(exported, "value")
    for path in (exported, audit_log):
        assert path.stat().st_mode & 0o777 == 0o600
    run(f"secrets import {exported}")


def call_the_rest(scenario: Scenario) -> None:
    """The functions that no command calls, and the refusals that a client may cause."""
    given = scenario.text("of a session")
    scenario.commands("work")
    with connect(scenario.dsn) as connection:
        session = Session(connection, {})
        unlock(connection, scenario.commands.keks["PG_REKEY_KEK"])
        fill(connection, "given", given)
        fill(connection, "unlocking", scenario.commands.keks["PG_REKEY_KEK"])
        session.run(
            "select rekey.unlock(v, 'session') from unlocking",
            "select rekey.version(), rekey.can_access_tenant('00000000-0000-0000-0000-000000000000')",
            "select rekey.encrypt_text(v, context => '{a}'), rekey.encrypt(convert_to(v, 'UTF8')) from given",
            "select rekey.decrypt(rekey.encrypt_text(v)), rekey.decrypt_text(rekey.encrypt(v)) from given",
            "select rekey.set_secret('rest', v) from given",
            "select rekey.delete_secret('rest')",
            "select rotate_keys('default')",
            "select key_rotation_status()",
            "select rekey.pause_rotation(max(id)), rekey.resume_rotation(max(id)) from rekey.rotations",
            "call rekey.run_rotations()",
            "select rekey.retire_keyring('none') where false",
            "select rekey.clear_schedule('default')",
            "select rekey.unschedule_worker()",
            "select rekey.resync_sequences(), rekey.confirm_emptied('default'), rekey.watch()",
            "prepare canary as select rekey.get_secret('one')",
            "execute canary",
        )
        session.fail("RK003", "select rekey.decrypt(rekey.encrypt(v, context => '{a}'), '{b}') from given")
        session.fail("RK007", "select rekey.set_secret('n', v, keyring => 'none') from given")
        session.fail("22023", "select rekey.set_secret('', v) from given")
        session.fail("RK007", "select rekey.unprotect_column('none')")
        session.fail("RK007", "select rekey.rebind_column('pg_class', 'relname')")
        session.fail("RK006", "select rekey.begin_search()")
        session.fail("22023", "select rekey.prune_audit_log(2, 1, '', '', '{}')")
        with connection.transaction():
            session.run(
                "declare canary cursor for select rekey.get_secret('one') from generate_series(1, 3)",
                "fetch 1 from canary",
            )


def move_the_kek(scenario: Scenario) -> None:
    """Rotate it, take it from the Vault and from a file, with pg_cron, and lose it."""
    run = scenario.commands
    known = [run.keks["PG_REKEY_KEK"]]

    def move(name: str, kind: str = "key") -> None:
        run.keks["PG_REKEY_NEW_KEK"] = scenario.key(name, kind)
        run("kek rotate")
        run.keks = {"PG_REKEY_KEK": run.keks["PG_REKEY_NEW_KEK"]}
        known.append(run.keks["PG_REKEY_KEK"])

    move("second")
    move("of the Vault", "open key")
    with scenario.quiet() as quiet:
        quiet.execute(VAULT.format(quiet=scenario.vault_quiet).encode())
        belong(quiet, "supabase_vault", "vault")
        row = (scenario.text("in the Vault", "open"),)
        quiet.execute("insert into vault.secrets (name, secret) values ('adopted', %s)", row)
    for _ in range(2):  # stored, then replaced
        run("kek store --provider vault")
    run("settings set kek_provider vault")
    kept, run.keks = run.keks, {}
    run("secrets get one", shows=True)
    run("secrets import --vault")
    run("rotate --all --wait")
    scenario.note_deks("app", *known)

    run.keks = kept
    run("settings set kek_provider session")
    move("in a file")
    stored = scenario.folder / "stored.kek"
    run(f"kek store --provider file --out {stored}")
    assert stored.stat().st_mode & 0o777 == 0o600
    scenario.canaries.allow(stored, "key in a file")
    scenario.server.write("data/pg_rekey.kek", stored.read_text())
    scenario.canaries.allow(scenario.server.data / "pg_rekey.kek", "key in a file")
    run("settings set kek_provider file")
    kept, run.keks = run.keks, {}
    run("secrets get one", shows=True)
    if scenario.server.installation.has("pg_cron"):
        with connect(scenario.dsn) as connection:
            connection.execute("select rekey.schedule_worker('@reboot')")
    run.keks = kept


def lose_the_server(scenario: Scenario) -> None:
    """It stops while commands are at work; pg_cron begins when it is back."""
    run = scenario.commands
    run("settings set kek_provider session")
    with connect(scenario.dsn) as connection:
        unlock(connection, run.keks["PG_REKEY_KEK"])
        with contextlib.suppress(psycopg.Error), connection.transaction():
            connection.execute("select rekey.encrypt('x'::text)")
            waiting = run.start("rotate --all --wait")
            worker = run.start("work --forever")
            until = time.monotonic() + 60
            with scenario.quiet() as quiet:
                while not value(quiet, "select count(*) from rekey.rotations where state = 'verifying'"):
                    assert time.monotonic() < until
                    time.sleep(0.05)
                quiet.execute("select rekey.set_setting('kek_provider', 'file')")
            scenario.note_functions("app")  # a server that recovers has lost its statistics
            scenario.server.restart("immediate")
            connection.execute("select 'the server is another one'")
    assert waiting.wait(60) == 1
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    with scenario.quiet() as quiet:
        if scenario.server.installation.has("pg_cron"):
            until = time.monotonic() + 60
            ended = "select count(*) from cron.job_run_details where status in ('succeeded', 'failed')"
            while not value(quiet, ended):
                assert time.monotonic() < until
                time.sleep(0.1)
            assert value(quiet, "select last_tick_at is not null from rekey._worker")
    run("work")
    scenario.note_deks("app", run.keks["PG_REKEY_KEK"])
    old = run.keks
    run.keks = {"PG_REKEY_NEW_KEK": scenario.key("after the loss")}
    run("settings set kek_provider session")
    run("kek replace", code=2)
    run("kek replace --lost --yes")
    run.keks = {"PG_REKEY_KEK": run.keks["PG_REKEY_NEW_KEK"]}
    run("secrets get one", code=1)
    run("secrets set after", stdin=scenario.text("after the loss"))
    scenario.note_deks("app", *old.values(), *run.keks.values())


# What each control must be found in: the search works there.
CONTROLS = {
    "control in a parameter": [".log", ".csv"],
    "control in a nested statement": [".log", ".csv"],
    "control in a statement": ["samples", "statements"],
    "control in a table": ["/base/", "/pg_wal/", "dump.sql", "dump.custom", "dumpall.sql", "decoded"],
    "control in the WAL": ["/pg_wal/", "waldump"],
    "control in a temporary table": ["/base/"],
    "control in output": [".out"],
}


def leak(scenario: Scenario) -> None:
    """Leak the controls, each through what it is named for."""
    controls = {name: os.urandom(24) for name in CONTROLS}
    controls["control in the WAL"] = os.urandom(12).hex().encode()
    for name, secret in controls.items():
        scenario.canaries.add(name, secret)
    texts = {name: secret.hex() for name, secret in controls.items()}
    with connect(scenario.dsn) as connection:
        connection.execute("select length(%s::bytea)", (controls["control in a parameter"],))
        fill(connection, "control", controls["control in a nested statement"])
        connection.execute("""
            do $$
            declare
              v_key bytea;
            begin
              select c.v into v_key from pg_temp.control c;
              perform set_config('rekey.control', encode(v_key, 'base64'), true);
            end
            $$""")
        literal = f"do $$ begin perform '{texts['control in a statement']}', pg_sleep(0.5); end $$"
        connection.execute(literal.encode())
        connection.execute("create table public.control (v bytea)")
        copy_in(connection, "public.control", ["bytea"], (controls["control in a table"],))
        text = controls["control in the WAL"].decode()
        connection.execute("select pg_logical_emit_message(false, 'control', %s)", (text,))
    run = scenario.commands
    run("secrets set control", stdin=texts["control in output"])
    run("secrets get control")
    stdin = next(iter(sorted(scenario.folder.glob("*-secrets-set.in"), reverse=True)))
    scenario.canaries.allow(stdin, "control")


def collect(scenario: Scenario) -> None:
    """Dump all that can be dumped, and end the server while keys are in temporary tables."""
    folder, server = scenario.folder, scenario.server
    with scenario.quiet() as quiet:
        statements = quiet.execute("select query from pg_stat_statements").fetchall()
        (folder / "statements").write_text("\n".join(query for (query,) in statements))
        changes = quiet.execute(
            "select data from pg_logical_slot_get_changes('canary', null, null)"
        ).fetchall()
        (folder / "decoded").write_text("\n".join(data for (data,) in changes))
    for arguments in (
        ("pg_dump", "-f", folder / "dump.sql", scenario.dsn),
        ("pg_dump", "-Fc", "-Z0", "-f", folder / "dump.custom", scenario.dsn),
        ("pg_dumpall", "-f", folder / "dumpall.sql", "-d", server.dsn()),
    ):
        subprocess.run([server.bindir / arguments[0], *arguments[1:]], check=True, capture_output=True)
    server.restart()  # everything is on disk
    with (
        contextlib.closing(connect(server.dsn("app"))) as unlocking,
        contextlib.closing(connect(server.dsn("app"))) as evicting,
    ):
        kek = scenario.commands.keks["PG_REKEY_KEK"]
        unlocking.execute("begin")
        unlocking.execute("create temporary table pg_rekey_kek (kek bytea)")
        copy_in(unlocking, "pg_rekey_kek", ["bytea"], (kek,))
        unlocking.execute("select rekey.unlock_copied('session')")
        evicting.execute("set temp_buffers = 100")
        control = scenario.canaries.secret("control in a temporary table")
        fill(evicting, "control", *(control + os.urandom(1000) for _ in range(2000)))
        server.kill()
    for log in (server.data / "loud").iterdir():  # where plans and texts of functions stand again and again
        lines = set(log.read_bytes().splitlines(keepends=True))
        (folder / log.name).write_bytes(b"".join(lines))
    segments = sorted(path for path in (server.data / "pg_wal").iterdir() if len(path.name) == 24)
    with (folder / "waldump").open("wb") as out:
        # From one segment at a time: the last ones may not be complete.
        for segment in segments:
            subprocess.run(
                [server.bindir / "pg_waldump", segment], stdout=out, stderr=subprocess.DEVNULL, check=False
            )


# Where the plain values of tables stand.
DUMPS = ("dump.sql", "dump.custom", "dumpall.sql", "decoded", "waldump")


def test_no_key_and_no_value_is_left_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the server that forks commands
    installation = local.ensure()
    if not installation.has("pg_stat_statements"):
        pytest.skip("pg_stat_statements is not installed")
    libraries = [name for name in ("pg_stat_statements", "pgaudit", "pg_cron") if installation.has(name)]
    settings = LOUD | explained_parameters(installation.major)
    if "pgaudit" in libraries:
        settings |= PGAUDIT
    settings["shared_preload_libraries"] = ",".join([*libraries, "auto_explain"])
    settings["wal_keep_size"] = "4GB"  # all of it is looked at, whenever a checkpoint comes
    with local.Server(settings=settings, cron_database="app") as server:
        scenario = Scenario(server, tmp_path)
        for database in ("app", "one", "two", "gone"):
            create_database(server.dsn(), database)
        with scenario.quiet() as quiet:
            quiet.execute("create extension pg_stat_statements")
            if "pg_cron" in libraries:
                quiet.execute("create extension pg_cron")
            quiet.execute("select pg_create_logical_replication_slot('canary', 'test_decoding')")
        # Quietly: each of its statements would be logged with the whole script.
        for database in ("app", "one", "two", "gone"):
            install(make_conninfo(server.dsn(database), options=QUIET), release.assemble("plain"))
        with Sampler(scenario.dsn, tmp_path / "samples") as sampler:
            sessions(scenario)
            begin(scenario)
            use_secrets(scenario)
            use_columns_of_the_application(scenario)
            use_keys(scenario)
            serve(scenario)
            tell(scenario)
            take_out(scenario)
            call_the_rest(scenario)
            scenario.note_deks("app", *scenario.commands.keks.values())
            move_the_kek(scenario)
            lose_the_server(scenario)
            leak(scenario)
        with scenario.quiet() as quiet:
            public = {name for name in all_functions(quiet) if not name.startswith("_")} - set(not_counted())
        collect(scenario)

        everything = [path for path in [*server.directory.rglob("*"), *tmp_path.rglob("*")] if path.is_file()]
        # Without the databases in which nothing was done, and the logs, which were collected.
        idle = {server.data / "loud", *(server.data / "base" / oid for oid in ("1", "4", "5"))}
        data = [path for path in everything if path.parent not in idle]
        told = [path for path in data if path.parent == tmp_path and path.name not in DUMPS]
        found = scenario.canaries.found(data, "key", "value", "control")
        found += scenario.canaries.found(told, "open")

    assert sampler.samples > 100
    assert public - scenario.sql_functions == set()
    # The demo's values are its own, which it sends as an application does; its keys are gone with it.
    assert set(all_commands()) - scenario.commands.called == {"demo"}
    assert [hit for hit in found if not hit[1].startswith("control")] == []
    controls = {name: [path for path, hit, _ in found if hit == name] for name in CONTROLS}
    unseen = [
        (name, part)
        for name, parts in CONTROLS.items()
        for part in parts
        if not any(part in path for path in controls[name])
    ]
    assert unseen == []
