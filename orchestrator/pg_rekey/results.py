"""What calls of the Python API return."""

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, Self

from pg_rekey.exceptions import Locked


class _Row:
    """A row of the database, of which it keeps the columns that it has a field for."""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """Return the row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Rotation(_Row):
    """A rotation and how far it is: a row of rekey.rotation_status, as docs/reference.md describes it.

    state: queued, running, paused, verifying, failed (these are under way), completed,
    completed_with_failures, rolled_back, superseded. rows_total: None until they are counted. blocked_by:
    what it waits for.
    """

    id: int
    keyring: str
    state: str
    trigger: str
    to_version: int
    rows_total: int | None
    rows_done: int
    rows_failed: int
    blocked_by: list[dict[str, Any]] | None
    last_error: str | None
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Keyring(_Row):
    """A keyring: its active version, how often it rotates, when it does next, and whether that is overdue."""

    keyring: str
    version: int | None
    since: datetime | None
    rotate_every: timedelta | None
    next_rotation_at: datetime | None
    overdue: bool


@dataclass(frozen=True, slots=True)
class Status:
    """How everything stands. rotations: those under way, and the last ones that left failures."""

    version: str
    keyrings: list[Keyring]
    rotations: list[Rotation]


@dataclass(frozen=True, slots=True)
class Secret(_Row):
    """All about a secret but its value."""

    name: str
    keyring: str
    key_version: int
    description: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Step(_Row):
    """One step of the rotations under way: what happened, and how long to wait before the next one."""

    event: str
    wait: timedelta | None
    detail: dict[str, Any] | None

    def is_whole(self) -> bool:
        """Tell whether the next one reads whole tables, and so takes long; Locked: there is no KEK."""
        if self.event == "locked":
            raise Locked((self.detail or {}).get("error", "the KEK is not available"), "RK001")
        return self.event == "whole"
