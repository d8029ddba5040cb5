"""What to do about an error, in the words of the road by which it came.

A hint of the database, and its advice about a finding, is in the words of SQL. Where another road says it
otherwise, the database also names the action: in the field CONSTRAINT of the error, in a column of findings.
"""

import os
import shlex
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests


class Road(Enum):
    """How a person reaches pg_rekey: each has its own words. Those of SQL are the database's own."""

    COMMAND = auto()
    HTTP = auto()
    PYTHON = auto()


class Words(NamedTuple):
    """What to do on the command line, and over HTTP and in Python where that can be done there too."""

    command: str
    http: str | None = None
    python: str | None = None

    def on(self, road: Road) -> str:
        """Return the words of a road; what it cannot do is done on the command line."""
        if road is Road.PYTHON and self.python:
            return self.python
        if road is Road.HTTP:
            return self.http or f"On the command line of the server: {self.command}"
        return self.command


BEHIND = Words(
    "A sequence may be behind its table, as after a switch-over by logical replication: `pg-rekey doctor` "
    "says so, and select rekey.resync_sequences() moves it on."
)
# In advice about a column, its own name stands in place of this.
COLUMN = "TABLE COLUMN"
ACTIONS = {
    "adopt_encrypted": Words(
        "`pg-rekey columns protect TABLE COLUMN`, then `pg-rekey columns adopt TABLE COLUMN --from FORMAT`, "
        "with what that tool writes."
    ),
    "adopt_plaintext": Words("`pg-rekey columns adopt TABLE COLUMN --from plaintext` encrypts them."),
    "anchor": Words("Give what `pg-rekey audit checkpoint` printed."),
    "apply_plaintext": Words(
        "Give the server a KEK (`pg-rekey settings set kek_provider file`), protect the column where the "
        "value comes from, or let plain values pass: `pg-rekey settings set apply_plaintext pass`."
    ),
    "cancel_destruction": Words(
        "Encrypt it anew. Who needs the old key cancels its destruction: `pg-rekey keys cancel-destruction "
        "KEYRING VERSION`.",
        "Who needs the old key cancels its destruction: POST /api/keys/cancel-destruction.",
    ),
    "columns": Words(
        "`pg-rekey columns list` shows the protected columns, and what blocks them.",
        "GET /api/columns shows the protected columns, and what blocks them.",
    ),
    "context": Words("Name in --context what its rows are told apart by: columns that do not change."),
    "context_of_conflict": Words(
        "INSERT ... ON CONFLICT (other key) DO UPDATE would store a value that is bound to a row that "
        "never was. Name that other key in --context."
    ),
    "context_of_trigger": Words(
        "If --encrypt-on-write is to come later, `pg-rekey columns unprotect` and protect it again now, with "
        "that other key in --context: later, what is bound to the primary key has to be decrypted first."
    ),
    "create_keyring": Words(
        "`pg-rekey keyrings list` shows those that there are; `pg-rekey keyrings create NAME` makes one.",
        "GET /api/keyrings shows those that there are; POST /api/keyrings/create makes one.",
        "See status().keyrings for those that there are; `pg-rekey keyrings create NAME` makes one.",
    ),
    "decrypt_bytes": Words("`pg-rekey secrets get NAME` prints text only: read its bytes in SQL."),
    "decrypt_rows": Words(
        "`pg-rekey columns unprotect --decrypt` decrypts them. Rows that stay are locked by a session, or "
        "kept by a trigger."
    ),
    "delete_secret": Words("`pg-rekey secrets rm NAME` deletes one."),
    "encrypt_on_write": Words(
        "`pg-rekey columns protect TABLE COLUMN --encrypt-on-write`, as the owner of the table, makes the "
        "trigger that encrypts."
    ),
    "endpoints": Words(
        "`pg-rekey notify list` shows those that there are.", "GET /api/endpoints shows those that there are."
    ),
    "export": Words("`pg-rekey audit export FILE` writes what `pg-rekey audit prune FILE` then removes."),
    "failures": Words("`pg-rekey rotations failures` lists them.", "GET /api/rotations/failures lists them."),
    "fire_triggers": Words("`pg-rekey columns protect TABLE COLUMN --no-fire-triggers` keeps them from it."),
    "keep_context": Words(
        "`pg-rekey columns list` shows how. Keyring and context columns, and their order, stay: the "
        "values are bound to them."
    ),
    "key_versions": Words(
        "`pg-rekey keys list` shows the versions of every keyring.",
        "GET /api/keys shows the versions of every keyring.",
    ),
    "let_trigger_pass": Words(
        "What it derives from the column, as a hash or the last characters, becomes that of the envelope. "
        "With WHEN (NOT rekey.is_sweeping('TABLE')) a trigger for each row lets it pass; `pg-rekey columns "
        "protect TABLE COLUMN --no-fire-triggers` keeps all of them from firing.",
        "What it derives from the column, as a hash or the last characters, becomes that of the envelope. "
        "With WHEN (NOT rekey.is_sweeping('TABLE')) a trigger for each row lets it pass; on the command line "
        "of the server, `pg-rekey columns protect TABLE COLUMN --no-fire-triggers` keeps all of them from "
        "firing.",
    ),
    "looks_encrypted": Words(
        "Name its format with --from; `pg-rekey columns adopt --dry-run` counts what there is. To encrypt "
        "the values as they are: --force."
    ),
    "next_kek": Words(
        "Give the current KEK and the next one: PG_REKEY_NEW_KEK, PG_REKEY_NEW_KEK_FILE or "
        "PG_REKEY_NEW_KEK_COMMAND for the next, or the Vault secret or file with _new appended."
    ),
    "pass_rule_by": Words(
        "Drop it, make it a trigger, or have it passed by: `pg-rekey columns protect TABLE COLUMN "
        "--no-fire-triggers`. What it puts in their place may leave rows as they are.",
        "Drop it, make it a trigger, or have it passed by, on the command line of the server: `pg-rekey "
        "columns protect TABLE COLUMN --no-fire-triggers`. What it puts in their place may leave rows as "
        "they are.",
    ),
    "path_of_others": Words(
        "What they make there could run as the owner of the table: names with their schema, or another path, "
        "`pg-rekey columns protect TABLE COLUMN --search-path PATH`.",
        "What they make there could run as the owner of the table: names with their schema, or another path; "
        "on the command line of the server, `pg-rekey columns protect TABLE COLUMN --search-path PATH`.",
    ),
    "protect": Words("`pg-rekey columns protect TABLE COLUMN` protects one."),
    "protect_copies": Words(
        "`pg-rekey columns protect TABLE COLUMN` and `pg-rekey rotate` take them along; or delete these "
        "copies."
    ),
    "protect_again": Words(
        "Its rows may be encrypted: `pg-rekey columns protect TABLE COLUMN`, with the options of the "
        "first time, makes the functions anew."
    ),
    "protect_and_adopt": Words(
        "`pg-rekey columns protect TABLE COLUMN`, then `pg-rekey columns adopt TABLE COLUMN --from "
        "plaintext`."
    ),
    "protect_found": Words(
        "`pg-rekey columns protect TABLE COLUMN`: without it no rotation takes these rows along."
    ),
    "read_secret": Words("Secrets are read with `pg-rekey secrets get NAME`."),
    "register_kek": Words("`pg-rekey init` registers a KEK."),
    "remove_endpoint": Words("`pg-rekey notify remove NAME` first, or take another name."),
    "renew_trigger": Words(
        "`pg-rekey columns protect TABLE COLUMN`, with the options of the first time, as the owner of the "
        "table, makes it anew."
    ),
    "rotate": Words(
        "`pg-rekey rotate --keyring NAME` makes a new version.", "POST /api/keys/rotate makes a new version."
    ),
    "rotate_and_resolve": Words(
        "`pg-rekey rotate --keyring NAME --wait` brings its rows to a new version; `pg-rekey rotations "
        "failures` and `pg-rekey rotations resolve` are for those in quarantine.",
        "POST /api/keys/rotate brings its rows to a new version; GET /api/rotations/failures and POST "
        "/api/rotations/resolve are for those in quarantine.",
    ),
    "rotations": Words("`pg-rekey rotations list` shows them.", "GET /api/rotations shows them."),
    "own_tables": Words("What is hidden would count as absent: nothing goes on until that is done."),
    "rebind": Words(
        "`pg-rekey columns rebind TABLE COLUMN` goes on with the table that has the values; "
        "`pg-rekey columns list` says what is in the way."
    ),
    "searchable": Words(
        "`pg-rekey columns search TABLE COLUMN` makes a protected column searchable, or fills its index anew."
    ),
    "secrets": Words(
        "`pg-rekey secrets list` shows the names that there are.",
        python="See secrets.list() for the names that there are.",
    ),
    "schedule_destruction": Words(
        "`pg-rekey keys schedule-destruction KEYRING VERSION` schedules one.",
        "POST /api/keys/schedule-destruction schedules one.",
    ),
    "search_now": Words("`pg-rekey keys search` looks now."),
    "schedule_worker": Words(
        "`pg-rekey work --forever` does without pg_cron; `pg-rekey init` prints the statement for the "
        "database that cron.database_name names."
    ),
    "set_provider": Words(
        "Repeat `pg-rekey settings set kek_provider`, with the provider that `pg-rekey settings show` "
        "shows, as a role that may grant what it needs."
    ),
    "search_path": Words("`pg-rekey columns protect TABLE COLUMN --search-path PATH` gives another."),
    "settings": Words("`pg-rekey settings show` lists them."),
    "supersede": Words(
        "Wait for it (`pg-rekey status` shows how far it is), or let a new one take its rows along: "
        "--supersede.",
        "Wait for it (GET /api/rotations shows how far it is), or let a new one take its rows along: "
        '"supersede": true.',
        "Wait for it (status() says how far it is), or let a new one take its rows along: supersede=True.",
    ),
    "unlock": Words(
        "Set PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND.",
        "The server has no KEK: it takes it from PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND, "
        "or the database from where kek_provider says.",
        "Give connect() the KEK, or set PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND.",
    ),
    "unprotect": Words("Name the table and the column: `pg-rekey columns unprotect TABLE COLUMN`."),
    "unreadable_secret": Words(
        "`pg-rekey secrets get NAME` says more of each; `pg-rekey verify` counts them."
    ),
    "values_are_tokens": Words(
        "If they are plain tokens or keys: --values-are-tokens. If another tool encrypted them: name its "
        "format with --from."
    ),
    "verify": Words(
        "`pg-rekey audit verify` says what is wrong with the log.",
        "GET /api/audit/verify says what is wrong with the log.",
    ),
    "wait": Words(
        "Wait until it has ended: `pg-rekey status` shows how far it is.",
        "Wait until it has ended: GET /api/rotations shows how far it is.",
    ),
}

# For errors that come without a hint.
STATES = {
    "25006": Words(
        "This server is a standby or read-only: use the primary.",
        "The database is a standby or read-only: the server needs the primary.",
    ),
    "3F000": Words("pg_rekey is not installed in this database: run `pg-rekey init`."),
    "42501": Words(
        "Connect as a member of the role that may do it: rekey_admin, rekey_operator, rekey_auditor, "
        "rekey_app.",
        "The role of the server may not: it is to be a member of rekey_admin.",
    ),
    "55P03": Words(
        "Another session holds a lock on it: try again later.",
        "Another session holds a lock on it: try again later.",
    ),
    "57014": Words(
        "The statement was cancelled, or took too long (statement_timeout): a lock may be in its way.",
        "It was cancelled, or took too long: a lock may be in its way. Try again later.",
    ),
    "58P01": Words(
        "A file of the server is not there, or of another release: where an update replaced them while the "
        "server ran, restart it. Nothing is lost meanwhile.",
        "A file of the server is not there, or of another release: after an update it needs a restart.",
    ),
}
LOST = Words(
    "What was under way may have been committed: `pg-rekey status` shows it. Repeating the command does "
    "no harm.",
    "What was under way may have been committed: GET /api/rotations shows it.",
    "What was under way may have been committed: status() shows rotations.",
)
UNREACHABLE = Words(
    "Is the server there, and does it let this account in? The connection is that of {}.",
    "The server cannot reach its database: is it there, and does it let the server in?",
    "Is the server there, and the connection open?",
)
NOWHERE = Words(
    "Set PG_REKEY_DSN to postgresql://USER:PASSWORD@HOST/DATABASE, or DATABASE_URL, or PGHOST and so on.",
    UNREACHABLE.http,
    UNREACHABLE.python,
)
NO_POOL = Words(
    UNREACHABLE.command,
    UNREACHABLE.http,
    "Use the client in a `with` statement, and a pool of your own once it is open.",
)
NONE_FREE = Words(
    UNREACHABLE.command,
    UNREACHABLE.http,
    "Is the server there, and does it let this account in? The logger psycopg.pool says what it answers. "
    "If it does, more ask at a time than the pool has connections.",
)
MISSING = Words(
    "pg_rekey is not installed in this database (run `pg-rekey init`), or in another version (run "
    "`pg-rekey upgrade`)."
)


def hint(diagnostics: psycopg.errors.Diagnostic, road: Road) -> str | None:
    """Return what the database advises, in the words of a road; its own where the road has none."""
    if diagnostics.sqlstate == "23505" and diagnostics.schema_name == "rekey":
        return BEHIND.on(road)
    # A constraint that was violated has its name there too, but no hint.
    words = ACTIONS.get(diagnostics.constraint_name or "") if diagnostics.message_hint else None
    return words.on(road) if words else diagnostics.message_hint


def advice(found: Mapping[str, Any], road: Road) -> str:
    """Return what the database advises about a finding, in the words of a road.

    found: advice and action; relation and column_name, where the finding is about a column.
    """
    words = ACTIONS.get(found["action"] or "")
    if not words:
        return str(found["advice"])
    names = [str(found[name]) for name in ("relation", "column_name") if found[name]]
    return words.on(road).replace(COLUMN, shlex.join(names) if len(names) == 2 else COLUMN)


def unreachable(error: psycopg.OperationalError) -> Words:
    """Return what to do where there is no connection: it depends on what was set."""
    if isinstance(error, PoolClosed):
        return NO_POOL
    if isinstance(error, PoolTimeout | TooManyRequests):
        return NONE_FREE
    for variable in ("PG_REKEY_DSN", "DATABASE_URL", "PGSERVICE", "PGHOST", "PGHOSTADDR"):
        if os.environ.get(variable):
            return UNREACHABLE._replace(command=UNREACHABLE.command.format(variable))
    return NOWHERE


def of_state(sqlstate: str | None, road: Road) -> str | None:
    """Return what there is to say of an error that came without a hint."""
    words = STATES.get(sqlstate or "")
    return words.on(road) if words else None
