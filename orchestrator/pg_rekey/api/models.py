"""What goes over the wire. The fields are the columns of the views; docs/reference.md describes them."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Hex = Annotated[str, BeforeValidator(bytes.hex), Field(description="Bytes in hexadecimal.")]
# PostgreSQL's text has no NUL, and the name of a keyring no control characters.
KeyringName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[^\x00-\x1f\x7f]+$")]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]
Id = Annotated[int, Field(ge=1, le=2**63 - 1)]
RotationState = Literal[
    "queued",
    "running",
    "paused",
    "verifying",
    "failed",
    "completed",
    "completed_with_failures",
    "rolled_back",
    "superseded",
]


class Error(BaseModel):
    """What went wrong."""

    code: str = Field(
        description="SQLSTATE of the database, or a word of the API. Decide on it, not on the message."
    )
    message: str
    hint: str | None = Field(description="What to do about it.")
    request_id: str = Field(description="Names the request in the log.")


class RotateRequest(BaseModel):
    """What to rotate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keyring: KeyringName | None = Field(default=None, description="Only this keyring; null: every one.")
    reason: Reason | None = Field(default=None, description="Why, for the audit log.")
    supersede: bool = Field(default=False, description="Take over the rows of a rotation that is under way.")


class Key(BaseModel):
    """A version of a key, without the key: a row of rekey.key_status."""

    keyring: str
    tenant_id: UUID
    version: int
    state: str
    kek_id: int
    kek_state: str
    created_at: datetime
    activated_at: datetime | None
    deactivated_at: datetime | None
    compromised_at: datetime | None
    destroy_after: datetime | None
    destroyed_at: datetime | None


class Keys(BaseModel):
    """Versions of keys, by keyring and version."""

    keys: list[Key]


class Rotation(BaseModel):
    """A rotation and how far it is: a row of rekey.rotation_status."""

    id: int
    keyring: str
    tenant_id: UUID
    state: RotationState
    trigger: str
    from_versions: list[int]
    to_version: int
    rows_total: int | None
    rows_done: int
    rows_failed: int
    attempts: int
    last_error: str | None
    next_attempt_at: datetime | None
    blocked_by: list[dict[str, Any]] | None
    reason: str | None
    requested_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    adopts: str | None = Field(description="Protected column that it adopts; null for other rotations.")
    formats: list[str] | None
    forced: bool
    unwrap: str | None
    blocks_to_verify: int | None = Field(
        description="Blocks of large tables that its verification has yet to look at; null: none has begun."
    )


class Begun(BaseModel):
    """Rotations that were begun, or were under way already."""

    rotations: list[Rotation]
    passed_by: list[str] = Field(
        description="Keyrings that got no new version, as a rotation is under way: `supersede` makes one."
    )


class RotationPage(BaseModel):
    """Rotations, newest first."""

    rotations: list[Rotation]
    next: int | None = Field(description="`before` of the next page; null: this is the last one.")


class AuditEntry(BaseModel):
    """An entry of the audit log: a row of rekey.audit_log."""

    id: int
    at: datetime
    actor: str
    role: str
    jwt_subject: str | None = Field(description="Name of the token, where it came through the API.")
    event: str
    keyring: str | None
    version: int | None
    rotation_id: int | None
    details: dict[str, Any]
    prev_hash: Hex
    hash: Hex


class AuditPage(BaseModel):
    """Entries of the audit log, newest first."""

    entries: list[AuditEntry]
    next: int | None = Field(description="`before` of the next page; null: this is the last one.")


class Health(BaseModel):
    """The API runs, and the database answers."""

    status: Literal["ok"] = "ok"
