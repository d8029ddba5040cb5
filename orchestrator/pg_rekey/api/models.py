"""What goes over the wire. The fields are the columns of the views; docs/reference.md describes them."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

Hex = Annotated[str, BeforeValidator(bytes.hex), Field(description="Bytes in hexadecimal.")]
# PostgreSQL's text has no NUL, and the name of a keyring no control characters.
KeyringName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[^\x00-\x1f\x7f]+$")]
Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]
# To JSON, 1.0 is an integer as well.
_Whole = BeforeValidator(
    lambda given: int(given) if isinstance(given, float) and given.is_integer() else given
)


def _written(given: object) -> object:
    """Refuse a time that is a number: pydantic takes it for seconds since 1970."""
    if not isinstance(given, str) or not re.match(r"\d{4}-", given):
        raise ValueError("a time is written as 2026-11-30T12:00:00Z")
    return given


# As far as every client of JSON counts: beyond that, many round.
Id = Annotated[int, Field(ge=1, le=2**53 - 1), _Whole]
Version = Annotated[int, Field(ge=1, le=2**31 - 1), _Whole]
# A body is JSON, which has no other way to write these than as text.
Interval = Annotated[str, Field(max_length=100, pattern=r"^[^\x00]*$", examples=["90 days"])]
Time = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_written)]
Tenant = Annotated[UUID, Field(strict=False)]
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


class Body(BaseModel):
    """What a client sends: nothing unknown, and nothing of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RotateRequest(Body):
    """What to rotate."""

    keyring: KeyringName | None = Field(default=None, description="Only this keyring; null: every one.")
    reason: Reason | None = Field(default=None, description="Why, for the audit log.")
    supersede: bool = Field(default=False, description="Take over the rows of a rotation that is under way.")


class Why(Body):
    """Why something is done."""

    reason: Reason | None = Field(default=None, description="Why, for the audit log.")


class OfKeyring(Body):
    """Which keyring."""

    keyring: KeyringName


class OfKey(OfKeyring):
    """Which version of a key."""

    version: Version


class OfKeyWhy(OfKey, Why):
    """Which version of a key, and why."""


class CreateKeyring(Body):
    """A keyring that is to be."""

    name: KeyringName
    tenant_id: Tenant = Field(default=UUID(int=0), description="Whose it is.")
    rotate_every: Interval | None = Field(default=None, description="Its cryptoperiod; null: no schedule.")


class SetSchedule(OfKeyring):
    """When a keyring is to be rotated by itself."""

    rotate_every: Interval = Field(description="Its cryptoperiod.")
    first_at: Time | None = Field(default=None, description="When first; null: after one cryptoperiod.")


class ScheduleDestruction(OfKey):
    """Which version is to be destroyed, and when."""

    wait: Interval | None = Field(
        default=None, description="Time until then; null: the setting destroy_wait."
    )


class Resolve(Why):
    """What becomes of a row in quarantine."""

    failure: Id = Field(description="Number of the entry.")
    action: Literal["retry", "discard"]


class TestEndpoint(Body):
    """Which endpoint to test."""

    __test__ = False  # it is no class of tests

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")]


class Keyring(BaseModel):
    """A keyring with its active version and its schedule."""

    name: str
    tenant_id: UUID
    active_version: int | None
    active_since: datetime | None
    rotate_every: str | None
    next_rotation_at: datetime | None
    overdue: bool
    created_at: datetime
    retired_at: datetime | None


class Keyrings(BaseModel):
    """Keyrings by name."""

    keyrings: list[Keyring]
    next: str | None = Field(description="`after` of the next page; null: this is the last one.")


class Schedule(BaseModel):
    """When a keyring is rotated next: a row of rekey.schedule_status."""

    keyring: str
    tenant_id: UUID
    rotate_every: str | None
    next_rotation_at: datetime | None
    overdue: bool


class Usage(BaseModel):
    """Rows on a version of a key: a row of rekey.key_usage()."""

    keyring: str
    version: int | None
    state: str | None
    relations: list[str] | None
    rows: int


class Usages(BaseModel):
    """Rows on each version."""

    usage: list[Usage]


class Verified(BaseModel):
    """Rows of a relation that were opened: a row of rekey.verify_ciphertexts()."""

    relation: str
    keyring: str | None
    version: int | None
    rows: int
    failed: int


class Verification(BaseModel):
    """Whether every row opens."""

    rows: int
    failed: int
    relations: list[Verified]


class Worked(BaseModel):
    """What was done of what is due."""

    steps: int
    rows: int = Field(description="Rows in these steps.")
    event: str = Field(
        description="What the last step was: idle, where nothing is left to do now; waiting, for writers of "
        "an older version or the next attempt; batch and others, where the time was over."
    )


class Failure(BaseModel):
    """A row in quarantine: a row of rekey.failure_status."""

    id: int
    rotation_id: int | None
    keyring: str
    target: str
    relation: str | None
    row_key: str | None
    version: int | None
    reason: str
    sqlstate: str | None
    created_at: datetime
    resolved_at: datetime | None
    resolution: str | None
    resolved_by: str | None
    resolve_reason: str | None


class Failures(BaseModel):
    """Rows in quarantine, newest first."""

    failures: list[Failure]
    next: int | None = Field(description="`before` of the next page; null: this is the last one.")


class Endpoint(BaseModel):
    """Who is told what happens: a row of rekey.endpoint_status. Its address is not shown."""

    name: str
    kind: str
    events: list[str] | None = Field(description="Only these; null: all.")
    allow_private: bool
    by_pg_net: bool
    created_at: datetime
    waiting: int
    dead: int
    last_delivered_at: datetime | None
    failing_since: datetime | None
    problem: str | None = Field(description="What went wrong last; null: nothing.")


class Endpoints(BaseModel):
    """Who is told what happens."""

    endpoints: list[Endpoint]


class Message(BaseModel):
    """A message to an endpoint: a row of rekey.message_status."""

    id: int
    endpoint: str
    event: str
    text: str
    created_at: datetime
    state: str
    attempts: int
    next_attempt_at: datetime | None
    ended_at: datetime | None
    last_error: str | None


class Messages(BaseModel):
    """Messages, newest first."""

    messages: list[Message]
    next: int | None = Field(description="`before` of the next page; null: this is the last one.")


class Column(BaseModel):
    """A protected column: a row of rekey.column_status, with what is to be looked at."""

    label: str
    relation: str | None
    column_name: str | None
    keyring: str
    context_columns: list[str]
    encrypt_on_write: bool
    fire_triggers: bool
    search_path: str
    problem: str | None
    findings: list[str]


class Columns(BaseModel):
    """Protected columns."""

    columns: list[Column]


class Unprotected(BaseModel):
    """A column that was forgotten: a row of rekey.find_unprotected()."""

    relation: str
    column_name: str | None
    finding: str
    rows: int | None
    advice: str


class Unprotecteds(BaseModel):
    """Columns that were forgotten."""

    columns: list[Unprotected]


class Setting(BaseModel):
    """A setting: a row of rekey.setting_status."""

    name: str
    value: str | None
    description: str


class Settings(BaseModel):
    """Settings by name."""

    settings: list[Setting]


class Finding(BaseModel):
    """What should be looked at."""

    severity: Literal["critical", "warning", "info"]
    finding: str
    advice: str


class Findings(BaseModel):
    """What `pg-rekey doctor` says, the worst first."""

    findings: list[Finding]


class AuditVerification(BaseModel):
    """Whether the chain of the audit log holds: rekey.verify_audit_log()."""

    valid: bool
    entries: int
    first_bad: int | None
    reason: str | None


class Checkpoint(BaseModel):
    """The end of the audit log: rekey.audit_checkpoint(). `pg-rekey audit checkpoint` signs one."""

    checkpoint: dict[str, Any]


class Progress(BaseModel):
    """How far a rotation is, as an event."""

    id: int
    keyring: str
    state: RotationState
    phase: Literal["in line", "re-encrypting", "waiting", "verifying", "paused", "failed", "ended"]
    to_version: int
    rows_total: int | None
    rows_done: int
    rows_failed: int
    percent: float | None
    rows_per_second: float | None = Field(description="Of the last seconds.")
    seconds_left: float | None = Field(description="Of the re-encryption, at that rate.")
    blocks_to_verify: int | None
    pace: float | None = Field(description="Part of the time that its workers work; 1: at full speed.")
    gives_way_to: str | None = Field(description="To whom they give way so.")
    blocked_by: list[dict[str, Any]] | None
    last_error: str | None
    finished_at: datetime | None


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
    pace: float | None = Field(description="Part of the time that its workers work; 1: at full speed.")
    gives_way_to: str | None = Field(description="To whom they give way so.")


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
