"""The calls of the Python API: statements with their parameters, and what to make of the rows.

A client runs them, waiting or as a coroutine. Plain values do not go as parameters, which a server may log,
but by binary COPY: rows to be copied into `table` stand in `batches`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from pg_rekey import db
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
    return Call(statement, [keyring, reason, supersede], lambda rows: [Rotation.of(row) for row in rows])


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
    sealed = value.encode() if isinstance(value, str) else value
    statement = "select rekey.encrypt(v.value, %s, %s::text[]) as sealed from pg_temp.pg_rekey_value v"
    return Call(statement, [keyring, list(context)], _only("sealed"), db.VALUE, [[(sealed,)]])


def decrypt(sealed: bytes | str, context: Sequence[str | None]) -> Call[bytes]:
    """Open a value."""
    kind = "text" if isinstance(sealed, str) else "bytea"
    statement = f"select rekey.decrypt(%b::{kind}, %s::text[]) as value"
    return Call(statement, [sealed, list(context)], _only("value"))


def get(name: str, tenant: UUID) -> Call[str]:
    """Read a secret."""
    return Call("select rekey.get_secret(%s, %s) as value", [name, tenant], _only("value"))


def get_all(names: Sequence[str] | None, tenant: UUID) -> Call[dict[str, str]]:
    """Read many secrets."""
    statement = "select name, value from rekey.read_secrets(%s::text[], %s)"
    given = None if names is None else list(names)
    return Call(statement, [given, tenant], lambda rows: {row["name"]: row["value"] for row in rows})


def store(values: Mapping[str, str], tenant: UUID, keyring: str, description: str | None) -> Call[None]:
    """Store secrets."""
    # By name, as everybody else does: so no two of them meet in a deadlock.
    batches = list(db.batches((name, values[name], description) for name in sorted(values)))
    return Call(db.query("set copied secrets"), [tenant, keyring], _none, db.SECRETS, batches)


def delete(name: str, tenant: UUID) -> Call[bool]:
    """Delete a secret."""
    return Call("select rekey.delete_secret(%s, %s) as deleted", [name, tenant], _only("deleted"))


def list_secrets(tenant: UUID) -> Call[list[Secret]]:
    """List secrets."""
    return Call(
        db.query("secrets"), [tenant, None, None, None], lambda rows: [Secret.of(row) for row in rows]
    )
