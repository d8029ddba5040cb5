"""Connections, named queries, and unlocking: the only module that knows how pg-rekey talks to a server."""

import asyncio
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal
from urllib.parse import urlsplit

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import InvalidName, InvalidSchemaName, ReadOnlySqlTransaction, UndefinedTable
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pg_rekey import arguments, hints
from pg_rekey import kek as keks
from pg_rekey.errors import LOCKED, USAGE, Problem, from_database, wrapped

Connection = psycopg.Connection[DictRow]
Pool = ConnectionPool[Connection]
Scope = Literal["transaction", "session", "replacement"]

OWNER = "rekey_owner"
POOL_SIZE = 4
POOL_TIMEOUT = 3.0
# Prepared statements do not survive a transaction pooler.
_PARAMETERS: dict[str, Any] = {"application_name": "pg-rekey", "prepare_threshold": None}
# A server that vanished without a word is noticed within half a minute, not by the kernel's default of hours.
_PATIENCE = {
    "connect_timeout": 10,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 10,
}


@functools.cache
def query(name: str) -> str:
    """Return the statement that queries.sql has under this name."""
    text = resources.files("pg_rekey").joinpath("queries.sql").read_text(encoding="utf-8")
    found = re.search(rf"^-- name: {name}\n(.*?)(?=^-- name: |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(name)
    return found[1].strip()


def dsn(*variables: str) -> str:
    """Return the connection string of the environment, checked; empty: libpq's own variables decide.

    variables: where to look, instead of PG_REKEY_DSN and DATABASE_URL.
    """
    for variable in variables or ("PG_REKEY_DSN", "DATABASE_URL"):
        if value := os.environ.get(variable):
            _check(variable, value)
            return value
    return ""


def _conninfo(database: str | None = None, patience: int | None = None) -> str:
    """Return the connection string of the environment, with patience of our own where it names none."""
    given = conninfo_to_dict(dsn()) | ({"dbname": database} if database else {})
    return make_conninfo("", **(_PATIENCE | ({"connect_timeout": patience} if patience else {}) | given))


def connect(
    *,
    autocommit: bool = False,
    database: str | None = None,
    patience: int | None = None,
    quiet: bool = False,
    any_version: bool = False,
) -> Connection:
    """Connect to the database of the environment, or another one there; notices go to standard error.

    patience: seconds to wait for the server. quiet: notices go nowhere. any_version: another version of
    pg_rekey than this one is there for good reason; else a warning tells of it.
    """
    connection = psycopg.connect(
        _conninfo(database, patience), autocommit=autocommit, row_factory=dict_row, **_PARAMETERS
    )
    _configure(connection)
    if not quiet:
        connection.add_notice_handler(_show_notice)
    try:
        _refuse_single_user(connection)
        version = _refuse_impostor(connection)
    except BaseException:
        connection.close()
        raise
    if version and not (quiet or any_version):
        _warn_of_version(version)
    return connection


def _warn_of_version(there: str) -> None:
    from pg_rekey import release  # not above: it is also a program, `python -m pg_rekey.release`

    if there != (here := release.version()):
        print(f"Warning: pg_rekey in this database is {there}, this is {here}", file=sys.stderr)
        print(
            f"Hint: Use pg-rekey {there}; where that is the older one, run `pg-rekey upgrade`.",
            file=sys.stderr,
        )


def _refuse_single_user(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Refuse PGlite, whose server runs as for a single user: nobody logged in there, and it takes no COPY."""
    if connection.info.parameter_status("session_authorization") == "":
        raise Problem(
            "this is PGlite, or another server in single-user mode: no KEK was sent",
            "It takes no COPY from clients. In its own process SQL does all of this: docs/testing.md.",
        )


def _refuse_impostor(connection: Connection) -> str | None:
    """Refuse to go on where schema rekey is somebody else's: his functions would run with our rights.

    Return the version that is there; None: there is none.
    """
    autocommit = connection.autocommit
    connection.autocommit = True
    row = connection.execute(query("owner")).fetchone()
    connection.autocommit = autocommit
    if row and row["owner"] != OWNER:
        raise Problem(
            f"schema rekey in this database is not pg_rekey's: it belongs to {row['owner']}",
            f"Look at what is in it, and drop it. That of pg_rekey belongs to {OWNER}.",
        )
    return row["version"] if row else None


def pool(conninfo: str | None = None, application: str = "pg-rekey") -> Pool:
    """Return a pool for a database, that of the environment by default, not opened yet; notices go nowhere.

    application: what pg_stat_activity shows of its connections.

    The database may be gone, at the start too: whoever asks then waits POOL_TIMEOUT for a connection, and the
    pool comes back with the database.
    """
    return ConnectionPool(
        _given(conninfo),
        connection_class=psycopg.Connection[DictRow],
        kwargs={"row_factory": dict_row, **_PARAMETERS, "application_name": application},
        configure=_configure,
        check=ConnectionPool.check_connection,
        min_size=1,
        max_size=POOL_SIZE,
        timeout=POOL_TIMEOUT,
        # Pauses between attempts to connect double until this time has passed; the next request begins anew.
        reconnect_timeout=POOL_TIMEOUT,
        open=False,
        name="pg-rekey",
    )


def _given(conninfo: str | None) -> str:
    if conninfo is None:
        return _conninfo()
    _check("the connection string", conninfo)
    return make_conninfo("", **(_PATIENCE | conninfo_to_dict(conninfo)))


def pool_async(conninfo: str | None = None) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
    """Return a pool of asynchronous connections, as pool() does."""
    return AsyncConnectionPool(
        _given(conninfo),
        kwargs=_PARAMETERS,
        check=AsyncConnectionPool.check_connection,
        min_size=1,
        max_size=POOL_SIZE,
        timeout=POOL_TIMEOUT,
        reconnect_timeout=POOL_TIMEOUT,
        open=False,
        name="pg-rekey",
    )


def _configure(connection: Connection) -> None:
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    # Functions and operators in our statements are PostgreSQL's, and not what somebody put into a schema of
    # this login's path, where it fits a call better. A pooler hands its sessions to others: theirs stays.
    autocommit = connection.autocommit
    connection.autocommit = True
    if not is_pooled(connection):
        connection.execute(query("pin"))
    connection.autocommit = autocommit


def named(connection: Connection, table: str) -> str:
    """Return a table's name with its schema, found by the search path that this login has."""
    try:
        with connection.transaction():
            connection.execute(query("login path"))
            row = connection.execute(query("named"), [table]).fetchone()
            if not is_pooled(connection):
                connection.execute(query("pin"))
    except (UndefinedTable, InvalidSchemaName, InvalidName) as error:
        problem = from_database(error)
        alike = connection.execute(query("alike"), [table]).fetchone()
        if alike:
            problem.hint = (
                f"There is {alike['name']}: give its double quotes too, '{alike['name']}' in a shell."
            )
        raise problem from None
    return str(row["name"]) if row else table


def is_pooled(connection: Connection) -> bool:
    """Tell whether there is a pooler in between: to its clients it names another process than serves them."""
    row = connection.execute("select pg_catalog.pg_backend_pid() as pid").fetchone()
    return row is not None and row["pid"] != connection.info.backend_pid


def trusts(connection: Connection, extension: str, relation: str, *functions: str, events: int = 0) -> bool:
    """Tell whether an extension owns a relation and functions, and lock the relation in that case.

    Whoever may create schemas can give theirs the name of an extension's that is not there. The lock keeps
    the answer true until the transaction ends, which the caller has begun. Events are those of the relation
    on which no trigger of somebody else's may fire, as in pg_trigger.tgtype: 4 INSERT, 8 DELETE, 16 UPDATE.
    """
    schema, name = relation.split(".")
    asked = {"extension": extension, "schema": schema, "name": name, "events": events}
    for _ in ("before", "after"):
        row = connection.execute(query("trusted"), asked | {"functions": list(functions)}).fetchone()
        if not row or not row["trusted"]:
            return False
        locking = sql.SQL("lock table {} in access share mode")
        connection.execute(locking.format(sql.Identifier(schema, name)))
    return True


def worker_jobs(cron: Connection, database: str) -> list[DictRow]:
    """Return the worker's jobs of a database, from the one that pg_cron lives in."""
    with cron.transaction():
        if not trusts(cron, "pg_cron", "cron.job"):
            return []
        return cron.execute(query("cron jobs"), [database]).fetchall()


def is_worker(job: DictRow) -> bool:
    """Tell whether a job of pg_cron works on rotations: one calls tick(), the others run_rotations()."""
    return bool(re.search(r"rekey\.(tick|run_rotations)", job["command"].lower()))


def migrations(connection: Connection) -> list[str]:
    """Return the versions under which the Supabase CLI has noted migrations of ours."""
    with connection.transaction():
        for _ in ("before", "after"):
            row = connection.execute(query("has migrations")).fetchone()
            if not row or not row["found"]:
                return []
            connection.execute("lock table supabase_migrations.schema_migrations in access share mode")
        return [row["version"] for row in connection.execute(query("migrations")).fetchall()]


def where(connection: psycopg.Connection[Any]) -> str:
    """Say which database this is, for a person who is about to change it."""
    info = connection.info
    host = info.host or info.hostaddr
    port = "" if host.startswith("/") else f":{info.port}"
    return f"database {info.dbname} on {host}{port} as {info.user}"


def unlock(
    connection: psycopg.Connection[Any],
    kek: bytes | str | None = None,
    scope: Scope = "transaction",
    new_kek: bytes | str | None = None,
) -> str:
    """As pg_rekey.unlock(): the KEK reaches the server by a binary COPY, which no log shows."""
    if scope != "session" and connection.info.transaction_status == pq.TransactionStatus.IDLE:
        if connection.autocommit:
            raise Problem(
                "unlocking a transaction needs one: this connection is in autocommit mode",
                "Use `with connection.transaction()`, or scope='session'.",
                USAGE,
            )
        connection.execute("select")
    if kek is not None:
        return _send(connection, [kek_bytes(given) for given in (kek, new_kek) if given is not None], scope)
    try:
        return _send(connection, from_environment(), scope)
    except psycopg.Error as error:
        if error.sqlstate != "RK002":
            raise
    # A KEK rotation may have passed between reading the environment and asking the database.
    keks.forget()
    return _send(connection, from_environment(), scope)


def in_environment() -> bool:
    """Tell whether the environment gives a KEK, the current or the next one."""
    return any(os.environ.get(f"{name}{kind}") for name in (keks.CURRENT, keks.NEXT) for kind in _KINDS)


def from_environment() -> list[bytes]:
    """Return the KEKs that the environment gives: the current one, then the next one where there is one."""
    following = keks.read(keks.NEXT)
    current = keks.read() if following else keks.require()
    return [one for one in (current, following) if one]


_KINDS = ("", "_FILE", "_COMMAND")


def copy_keks(connection: psycopg.Connection[Any], given: list[bytes]) -> None:
    """Put KEKs into the temporary table pg_rekey_kek by binary COPY, which no log shows."""
    _refuse_single_user(connection)
    copy_rows(connection, _KEKS, [[one] for one in given])


@dataclass(frozen=True)
class Table:
    """A temporary table of what no log is to show: it gets there by binary COPY. Drop it after use."""

    name: str
    columns: str
    types: Sequence[str]

    @property
    def create(self) -> str:
        """Return the statement that makes it."""
        return f"create temporary table {self.name} ({self.columns}) on commit drop"

    @property
    def copy(self) -> str:
        """Return the statement that fills it."""
        return f"copy pg_temp.{self.name} from stdin binary"

    @property
    def drop(self) -> str:
        """Return the statement that drops it: the next call of a transaction makes its own."""
        return f"drop table pg_temp.{self.name}"


SECRETS = Table(
    "pg_rekey_secrets",
    "name text, value text, description text",
    ("text", "text", "text"),
)
# A batch of secrets: so many, or so many characters.
BATCH = 1000
BATCH_LENGTH = 2**23
VALUE = Table("pg_rekey_value", "value bytea", ("bytea",))
ENDPOINT = Table("pg_rekey_endpoint", "address text", ("text",))


def batches(secrets: Iterable[tuple[str, str, str | None]]) -> Iterator[list[tuple[str, str, str | None]]]:
    """Yield rows of SECRETS in batches that one call stores."""
    batch, length = [], 0
    for row in secrets:
        batch.append(row)
        length += len(row[1])
        if len(batch) == BATCH or length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def copy_rows(connection: psycopg.Connection[Any], table: Table, rows: Sequence[Sequence[Any]]) -> None:
    """Make a temporary table of these rows."""
    connection.execute(table.create)
    with connection.cursor() as cursor, cursor.copy(table.copy) as copy:
        copy.set_types(table.types)
        for row in rows:
            copy.write_row(row)


async def copy_rows_async(
    connection: psycopg.AsyncConnection[Any], table: Table, rows: Sequence[Sequence[Any]]
) -> None:
    """As copy_rows()."""
    await connection.execute(table.create)
    async with connection.cursor() as cursor, cursor.copy(table.copy) as copy:
        copy.set_types(table.types)
        for row in rows:
            await copy.write_row(row)


_KEKS = Table("pg_rekey_kek", "kek bytea", ("bytea",))


def _send(connection: psycopg.Connection[Any], given: list[bytes], scope: Scope) -> str:
    try:
        return _send_copy(connection, given, scope)
    except ReadOnlySqlTransaction:
        return _send_parameter(connection, given, scope)


def _send_parameter(connection: psycopg.Connection[Any], given: list[bytes], scope: Scope) -> str:
    """Unlock where there are no temporary tables, as on a standby, unless it could log the parameter."""
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        _refuse_logging(cursor.execute(query("doctor: logging")).fetchone())
        [row] = cursor.execute(_UNLOCK, [b"".join(given), scope]).fetchall()
    return str(row["fingerprint"])


_UNLOCK = "select rekey.unlock(%b, %s) as fingerprint"


def _refuse_logging(row: DictRow | None) -> None:
    """Refuse to send a KEK as a parameter to a server of which this is a finding of the doctor's."""
    if row:
        raise Problem(
            f"this read-only server would log the KEK: {row['finding']}",
            f"{row['advice']} Or let the server find the KEK by itself: kek_provider.",
            LOCKED,
        )


def _send_copy(connection: psycopg.Connection[Any], given: list[bytes], scope: Scope) -> str:
    with connection.transaction():
        copy_keks(connection, given)
        with connection.cursor(row_factory=psycopg.rows.scalar_row) as cursor:
            fingerprint = cursor.execute("select rekey.unlock_copied(%s)", [scope]).fetchone()
        connection.execute(_KEKS.drop)
    return str(fingerprint)


async def unlock_async(connection: psycopg.AsyncConnection[Any], kek: bytes | str | None = None) -> None:
    """As unlock(), for the transaction that an asynchronous connection is in."""
    if kek is not None:
        await _send_async(connection, [kek_bytes(kek)])
        return
    # A command of the environment may take its time.
    given = await asyncio.to_thread(from_environment)
    try:
        await _send_async(connection, given)
    except psycopg.Error as error:
        if error.sqlstate != "RK002":
            raise
        keks.forget()
        await _send_async(connection, await asyncio.to_thread(from_environment))


async def _send_async(connection: psycopg.AsyncConnection[Any], given: list[bytes]) -> None:
    _refuse_single_user(connection)
    try:
        async with connection.transaction(), connection.cursor() as cursor:
            await copy_rows_async(connection, _KEKS, [[one] for one in given])
            await cursor.execute("select rekey.unlock_copied('transaction')")
            await cursor.execute(_KEKS.drop)
    except ReadOnlySqlTransaction:
        async with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query("doctor: logging"))
            _refuse_logging(await cursor.fetchone())
            await cursor.execute(_UNLOCK, [b"".join(given), "transaction"])


def kek_bytes(kek: bytes | str) -> bytes:
    """Return the 32 bytes of a KEK that an application gives."""
    if isinstance(kek, str):
        return keks.parse(kek)
    if not isinstance(kek, bytes):
        raise arguments.wrong("kek", "32 bytes, or a str", kek)
    if len(kek) != 32:
        raise Problem("a KEK has 32 bytes", None, LOCKED)
    return kek


def _show_notice(notice: psycopg.errors.Diagnostic) -> None:
    advice = hints.hint(notice, hints.Road.COMMAND)
    said = wrapped(f"{notice.severity}: ", notice.message_primary or "")
    hint = f"\n{wrapped('  ', advice)}" if advice else ""
    # Not by click, which passes by the bar that may stand there.
    print(f"{said}{hint}", file=sys.stderr, flush=True)


def _check(variable: str, value: str) -> None:
    """Refuse what libpq would refuse, without libpq's words: those can hold the password."""
    scheme = re.match(r"([A-Za-z][\w+.:-]*)://", value)
    if scheme and scheme[1] not in ("postgres", "postgresql"):
        raise Problem(
            f"{variable} starts with {scheme[1]}://, which libpq does not know",
            "Write postgresql:// alone: +psycopg, jdbc: and the like belong to other libraries.",
            USAGE,
        )
    if scheme and "@" in value and re.search(r"[/@#?]", value[scheme.end() : value.rindex("@")]):
        raise Problem(f"{variable} has a password with characters that a URL cannot hold", _ENCODE, USAGE)
    try:
        given = conninfo_to_dict(value)
    except psycopg.Error:
        parameters = re.findall(r"[?&]([^=&]+)=", f"?{urlsplit(value).query}") if scheme else []
        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        if unknown := [name for name in parameters if name not in known]:
            raise Problem(
                f"{variable} has parameters that libpq does not know: {', '.join(unknown)}",
                "They are another library's, as `pgbouncer` and `schema` are Prisma's: take them out. For "
                "one that asks for TLS, such as `ssl`, write sslmode=require or verify-full.",
                USAGE,
            ) from None
        message = f"{variable} is not a connection string that libpq understands"
        raise Problem(message, _ENCODE if scheme else _SPELL, USAGE) from None
    if given.get("sslmode", "require") not in _SSL_MODES:
        raise Problem(
            f"{variable} has an sslmode that libpq does not know",
            "Write sslmode=require to encrypt only, as node-postgres' no-verify does, or verify-full.",
            USAGE,
        )


_ENCODE = "In a URL, write / as %2F, @ as %40, # as %23, ? as %3F and % as %25 within the password."
_SPELL = (
    "Write postgresql://USER:PASSWORD@HOST/DATABASE, with no quotes around it (`docker run --env-file` keeps "
    "them), or host=HOST dbname=DATABASE and so on."
)
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
