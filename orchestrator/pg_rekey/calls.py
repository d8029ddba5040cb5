"""The calls of the Python API: statements with their parameters, and what to make of the rows.

A client runs them, waiting or as a coroutine. Plain values do not go as parameters, which a server may log,
but by binary COPY: rows to be copied into `table` stand in `batches`. Arguments of a wrong type are a
TypeError, those that cannot be sent a ValueError, before anything is.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from pg_rekey import arguments, db
from pg_rekey.results import Keyring, Rotation, Secret, Step

T = TypeVar("T")
Rows = list[dict[str, Any]]
NIL = UUID(int=0)


@dataclass(frozen=True)
class Call(Generic[T]):
    """A statement, its parameters, and what its rows are."""

    statement: str
    parameters: Sequence[Any]
    result: Callable[[Rows], T]
    table: db.Table | None = None
    batches: Sequence[Sequence[tuple[Any, ...]]] = ((),)  # the statement runs once for each
    before: str | None = None  # a statement to begin with


def _only(name: str) -> Callable[[Rows], Any]:
    def value(rows: Rows) -> Any:
        return rows[0][name]

    return value


def _none(rows: Rows) -> None:
    pass


def rotate(keyring: str | None, reason: str | None, supersede: bool) -> Call[list[Rotation]]:
    """Rotate one keyring, or all."""
    statement = "select * from rekey.rotate_keys(%s, %s, %s)"
    given = [
        arguments.optional_text("keyring", keyring),
        arguments.optional_text("reason", reason),
        arguments.flag("supersede", supersede),
    ]
    return Call(statement, given, lambda rows: [Rotation.of(row) for row in rows])


def rotations(ids: list[int]) -> Call[list[Rotation]]:
    """Look at rotations."""
    statement = "select * from rekey.rotation_status where id = any (%s) order by id"
    return Call(statement, [ids], lambda rows: [Rotation.of(row) for row in rows])


def step(whole: bool) -> Call[Step]:
    """Take one step of what is under way."""
    # A trigger may sleep in a batch; what reads whole tables takes long for good reason.
    limit = "'0'" if whole else f"(select s.milliseconds || ' ms' from ({db.query('step limit')}) s)"
    return Call(
        "select * from rekey.rotation_step(%s, rekey.who_else())",
        [whole],
        lambda rows: Step.of(rows[0]),
        before=f"select set_config('statement_timeout', {limit}, true)",
    )


def unfinished(rotations: Sequence[Rotation]) -> bool:
    """Tell whether one of them has work left that a step does."""
    return any(one.state in ("queued", "running", "verifying") for one in rotations)


def version() -> Call[str]:
    """Ask for the version in the database."""
    return Call("select rekey.version() as version", [], _only("version"))


def keyrings() -> Call[list[Keyring]]:
    """Look at keyrings."""
    return Call(db.query("python keyrings"), [], lambda rows: [Keyring.of(row) for row in rows])


def under_way() -> Call[list[Rotation]]:
    """Look at rotations under way, and those that left failures."""
    return Call(db.query("status rotations"), [], lambda rows: [Rotation.of(row) for row in rows])


def encrypt(value: bytes | str, keyring: str, context: Sequence[str | None]) -> Call[bytes]:
    """Seal a value."""
    plain = arguments.encoded("value", value)
    given = [arguments.text("keyring", keyring), arguments.context("context", context)]
    statement = "select rekey.encrypt(v.value, %s, %s::text[]) as sealed from pg_temp.pg_rekey_value v"
    return Call(statement, given, _only("sealed"), db.VALUE, [[(plain,)]])


def decrypt(sealed: bytes | str, context: Sequence[str | None]) -> Call[bytes]:
    """Open a value."""
    kind = "text" if isinstance(sealed, str) else "bytea"
    given = [arguments.sealed("sealed", sealed), arguments.context("context", context)]
    return Call(f"select rekey.decrypt(%b::{kind}, %s::text[]) as value", given, _only("value"))


def decrypt_many(
    sealed: Sequence[bytes | str], contexts: Sequence[Sequence[str | None]]
) -> Call[list[bytes]]:
    """Open many values."""
    listed = arguments.sequence("sealed", sealed, "sealed values")
    given = [arguments.sealed("each of sealed", one) for one in listed]
    parts = [
        arguments.context("each of contexts", one)
        for one in arguments.sequence("contexts", contexts, "contexts")
    ]
    if parts and len(parts) != len(given):
        raise ValueError(f"contexts are one for each value: {len(given)}, not {len(parts)}")
    if len({len(one) for one in parts}) > 1:
        raise ValueError("contexts that are opened together have as many parts each")
    texts = [one if isinstance(one, str) else f"rk1:{b64encode(one).decode()}" for one in given]
    statement = "select rekey.decrypt_many(%s::text[], %s::text[]) as values"
    return Call(statement, [texts, parts], _only("values"))


def get(name: str, tenant: UUID) -> Call[str]:
    """Read a secret."""
    return Call("select rekey.get_secret(%s, %s) as value", _named(name, tenant), _only("value"))


def get_all(names: Sequence[str] | None, tenant: UUID) -> Call[dict[str, str]]:
    """Read many secrets."""
    statement = "select name, value from rekey.read_secrets(%s::text[], %s)"
    wanted = None if names is None else arguments.texts("names", names)
    return Call(
        statement,
        [wanted, arguments.tenant(tenant)],
        lambda rows: {row["name"]: row["value"] for row in rows},
    )


def store(values: Mapping[str, str], tenant: UUID, keyring: str, description: str | None) -> Call[None]:
    """Store secrets."""
    given = [arguments.tenant(tenant), arguments.text("keyring", keyring)]
    said = arguments.optional_text("description", description)
    texts = arguments.values("values", values)
    # By name, as everybody else does: so no two of them meet in a deadlock.
    batches = list(db.batches((name, texts[name], said) for name in sorted(texts)))
    return Call(db.query("set copied secrets"), given, _none, db.SECRETS, batches)


def store_one(name: str, value: str, tenant: UUID, keyring: str, description: str | None) -> Call[None]:
    """Store a secret."""
    named = {arguments.text("name", name): arguments.text("value", value)}
    return store(named, tenant, keyring, description)


def delete(name: str, tenant: UUID) -> Call[bool]:
    """Delete a secret."""
    return Call("select rekey.delete_secret(%s, %s) as deleted", _named(name, tenant), _only("deleted"))


def list_secrets(tenant: UUID) -> Call[list[Secret]]:
    """List secrets."""
    given = [arguments.tenant(tenant), None, None, None]
    return Call(db.query("secrets"), given, lambda rows: [Secret.of(row) for row in rows])


def _named(name: str, tenant: UUID) -> list[Any]:
    return [arguments.text("name", name), arguments.tenant(tenant)]
