"""The routes: each is an action for tokens of a role, under its name in SQL and on the command line."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response, Security
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from pg_rekey.api import actions, models
from pg_rekey.api.database import transaction
from pg_rekey.api.feed import events
from pg_rekey.api.guard import GuardedRoute, needs
from pg_rekey.api.models import Id, KeyringName
from pg_rekey.api.refusals import documented
from pg_rekey.metrics import exposition

# Only documents the header: GuardedRoute checks it.
bearer = HTTPBearer(auto_error=False, description="A token made with `pg-rekey serve --new-token NAME`.")
_REFUSALS = documented(401, 403, 413, 422, 500, 503)
api = APIRouter(prefix="/api", route_class=GuardedRoute, dependencies=[Security(bearer)], responses=_REFUSALS)
metrics = APIRouter(route_class=GuardedRoute, dependencies=[Security(bearer)], responses=_REFUSALS)
health = APIRouter(responses=documented(413, 500, 503))

KeyringFilter = Annotated[KeyringName | None, Query(description="Only of this keyring.")]
Before = Annotated[Id | None, Query(description="Only what has a smaller id: `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Length of a page.")]
TextFilter = Annotated[str, Query(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]
MessageState = Literal["waiting", "delivered", "dead"]
CHANGES = documented(400, 404, 409)


# Keys


@api.post("/keys/rotate", status_code=202, summary="Rotate keys", tags=["keys"], responses=CHANGES)
@needs("admin")
def rotate(request: Request, response: Response, body: models.RotateRequest | None = None) -> models.Begun:
    """Make a new version of one keyring or of every one, active from now on; the worker does the rows.

    Where every keyring is rotated, those under way are returned as they are, and named in `passed_by`.
    """
    body = body or models.RotateRequest()
    rows = actions.rotate(request, body.keyring, body.reason, body.supersede)
    passed_by = [row["keyring"] for row in rows if row.pop("passed_by")]
    if len(rows) == 1:
        response.headers["Location"] = f"/api/rotations/{rows[0]['id']}"
    return models.Begun.model_validate({"rotations": rows, "passed_by": passed_by})


@api.get("/keys", summary="Key versions", tags=["keys"], responses=documented(404))
@needs("read")
def keys(request: Request, keyring: KeyringFilter = None) -> models.Keys:
    """Every version with its state and times. No key is in it."""
    return models.Keys.model_validate({"keys": actions.keys(request, keyring)})


@api.get("/keys/usage", summary="Rows on each version", tags=["keys"], responses=CHANGES)
@needs("operate")
def usage(request: Request, keyring: KeyringFilter = None) -> models.Usages:
    """Count the rows that stand on each version: it reads every protected row."""
    return models.Usages.model_validate({"usage": actions.usage(request, keyring)})


@api.post("/keys/disable", summary="Suspend a version", tags=["keys"], responses=CHANGES)
@needs("admin")
def disable(request: Request, body: models.OfKeyWhy) -> models.Key:
    """Nothing opens with the version until it is enabled again."""
    return models.Key.model_validate(
        actions.on_key(request, "disable", body.keyring, body.version, body.reason)
    )


@api.post("/keys/enable", summary="Enable a version", tags=["keys"], responses=CHANGES)
@needs("admin")
def enable(request: Request, body: models.OfKeyWhy) -> models.Key:
    """Let a suspended version open again."""
    return models.Key.model_validate(
        actions.on_key(request, "enable", body.keyring, body.version, body.reason)
    )


@api.post("/keys/compromise", summary="Mark a version as compromised", tags=["keys"], responses=CHANGES)
@needs("admin")
def compromise(request: Request, body: models.OfKeyWhy) -> models.Key:
    """It encrypts nothing any more, for good; its rows are re-encrypted by a rotation that begins."""
    return models.Key.model_validate(
        actions.on_key(request, "compromise", body.keyring, body.version, body.reason)
    )


@api.post("/keys/schedule-destruction", summary="Schedule a destruction", tags=["keys"], responses=CHANGES)
@needs("admin")
def schedule_destruction(request: Request, body: models.ScheduleDestruction) -> models.Key:
    """Have a version destroyed once the wait is over; refused while a row needs it."""
    return models.Key.model_validate(
        actions.schedule_destruction(request, body.keyring, body.version, body.wait)
    )


@api.post("/keys/cancel-destruction", summary="Cancel a destruction", tags=["keys"], responses=CHANGES)
@needs("admin")
def cancel_destruction(request: Request, body: models.OfKey) -> models.Key:
    """The version returns to the state that it came from."""
    return models.Key.model_validate(
        actions.on_key(request, "cancel-destruction", body.keyring, body.version)
    )


# Keyrings and schedules


@api.get("/keyrings", summary="Keyrings", tags=["keyrings"])
@needs("read")
def keyrings(
    request: Request,
    limit: Limit = 100,
    after: Annotated[
        KeyringName | None, Query(description="Only later names: `next` of the page before.")
    ] = None,
) -> models.Keyrings:
    """Keyrings with their active versions and schedules, by name."""
    rows, following = actions.page(request, "api keyrings", limit, "name", after=after)
    return models.Keyrings.model_validate({"keyrings": rows, "next": following})


@api.post(
    "/keyrings/create", status_code=201, summary="Create a keyring", tags=["keyrings"], responses=CHANGES
)
@needs("admin")
def create_keyring(request: Request, body: models.CreateKeyring) -> models.Keyring:
    """Make a keyring and its first version."""
    row = actions.create_keyring(request, body.name, body.tenant_id, body.rotate_every)
    return models.Keyring.model_validate(row)


@api.post("/keyrings/retire", summary="Retire a keyring", tags=["keyrings"], responses=CHANGES)
@needs("admin")
def retire_keyring(request: Request, body: models.OfKeyring) -> models.Keyring:
    """It takes no new values, and its last version may be destroyed; refused while a row uses it."""
    return models.Keyring.model_validate(actions.retire_keyring(request, body.keyring))


@api.post("/schedule/set", summary="Set a schedule", tags=["keyrings"], responses=CHANGES)
@needs("admin")
def set_schedule(request: Request, body: models.SetSchedule) -> models.Schedule:
    """Have a keyring rotated every so often."""
    row = actions.set_schedule(request, body.keyring, body.rotate_every, body.first_at)
    return models.Schedule.model_validate(row)


@api.post("/schedule/clear", summary="Clear a schedule", tags=["keyrings"], responses=CHANGES)
@needs("admin")
def clear_schedule(request: Request, body: models.OfKeyring) -> models.Schedule:
    """Let a keyring rotate only when somebody says so."""
    return models.Schedule.model_validate(actions.clear_schedule(request, body.keyring))


# Rotations


@api.get("/rotations", summary="Rotations", tags=["rotations"], responses=documented(404))
@needs("read")
def rotations(
    request: Request,
    keyring: KeyringFilter = None,
    state: Annotated[models.RotationState | None, Query(description="Only in this state.")] = None,
    limit: Limit = 100,
    before: Before = None,
) -> models.RotationPage:
    """Rotations and how far they are, newest first."""
    rows, following = actions.page(
        request, "api rotations", limit, "id", keyring=keyring, state=state, before=before
    )
    return models.RotationPage.model_validate({"rotations": rows, "next": following})


@api.get("/rotations/failures", summary="Rows in quarantine", tags=["rotations"])
@needs("read")
def failures(
    request: Request,
    rotation: Annotated[Id | None, Query(description="Only of this rotation.")] = None,
    all: Annotated[bool, Query(description="Those that are resolved too.")] = False,
    limit: Limit = 100,
    before: Before = None,
) -> models.Failures:
    """Rows that did not open, newest first. They stay as they were, and keep their key."""
    rows, following = actions.page(
        request, "api failures", limit, "id", rotation=rotation, all=all, before=before
    )
    return models.Failures.model_validate({"failures": rows, "next": following})


@api.post("/rotations/resolve", summary="Resolve a row in quarantine", tags=["rotations"], responses=CHANGES)
@needs("admin")
def resolve(request: Request, body: models.Resolve) -> models.Failure:
    """Try the row again, or give it up; it is left as it is."""
    return models.Failure.model_validate(actions.resolve(request, body.failure, body.action, body.reason))


@api.get("/rotations/{id}", summary="One rotation", tags=["rotations"], responses=documented(404))
@needs("read")
def rotation(request: Request, id: Id) -> models.Rotation:
    """One rotation and how far it is; `blocked_by` says what it waits for."""
    return models.Rotation.model_validate(actions.rotation(request, id))


@api.post("/rotations/{id}/pause", summary="Pause a rotation", tags=["rotations"], responses=CHANGES)
@needs("operate")
def pause(request: Request, id: Id) -> models.Rotation:
    """Reads and writes go on, nothing more is re-encrypted."""
    return models.Rotation.model_validate(actions.on_rotation(request, "pause", id))


@api.post("/rotations/{id}/resume", summary="Resume a rotation", tags=["rotations"], responses=CHANGES)
@needs("operate")
def resume(request: Request, id: Id) -> models.Rotation:
    """Go on with a paused rotation."""
    return models.Rotation.model_validate(actions.on_rotation(request, "resume", id))


@api.post("/rotations/{id}/retry", summary="Retry a rotation", tags=["rotations"], responses=CHANGES)
@needs("operate")
def retry(request: Request, id: Id) -> models.Rotation:
    """Go on with a failed rotation where it stopped, or try its failed rows again."""
    return models.Rotation.model_validate(actions.on_rotation(request, "retry", id))


@api.post(
    "/rotations/{id}/rollback",
    status_code=202,
    summary="Roll a rotation back",
    tags=["rotations"],
    responses=CHANGES,
)
@needs("admin")
def rollback(request: Request, id: Id, body: models.Why | None = None) -> models.Rotation:
    """The old version is active again; the answer is the rotation that brings the rows back to it."""
    reason = body.reason if body else None
    return models.Rotation.model_validate(actions.on_rotation(request, "rollback", id, reason))


@api.get(
    "/rotations/{id}/events",
    summary="Progress of a rotation",
    tags=["rotations"],
    response_class=StreamingResponse,
    responses={**documented(404), 200: {"content": {"text/event-stream": {}}}},
)
@needs("read")
def rotation_events(request: Request, id: Id) -> Response:
    """Server-sent events `progress`, each a Progress, when something changed; `end` is the last one.

    The stream ends after 50 seconds: ask again.
    """
    actions.rotation(request, id)
    return events(request, id)


@api.get(
    "/events",
    summary="Progress of all rotations",
    tags=["rotations"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
@needs("read")
def all_events(request: Request) -> Response:
    """Server-sent events `progress`, as those of one rotation, of the first 200 that are under way.

    The stream ends after 50 seconds: ask again.
    """
    return events(request)


@api.post("/work", summary="Work for some seconds", tags=["rotations"])
@needs("operate")
def work(request: Request) -> models.Worked:
    """Re-encrypt and verify for 5 seconds at most, as `pg-rekey work` does; call again until it is idle."""
    steps, rows, event = actions.work(request)
    return models.Worked(steps=steps, rows=rows, event=event)


@api.get("/verify", summary="Verify every row", tags=["keys"], responses=CHANGES)
@needs("operate")
def verify(request: Request, keyring: KeyringFilter = None) -> models.Verification:
    """Open every row, and show none."""
    found = actions.verify(request, keyring)
    totals = {name: sum(row[name] for row in found) for name in ("rows", "failed")}
    return models.Verification.model_validate({**totals, "relations": found})


# Columns


@api.get("/columns", summary="Protected columns", tags=["columns"])
@needs("read")
def columns(request: Request) -> models.Columns:
    """Protected columns, and what blocks each of them."""
    return models.Columns.model_validate({"columns": actions.columns(request)})


@api.get("/columns/find", summary="Columns that were forgotten", tags=["columns"], responses=CHANGES)
@needs("read")
def find(request: Request) -> models.Unprotecteds:
    """Columns with envelopes that are not protected, or whose name sounds like a secret.

    A table that the role of the token may not read is a finding.
    """
    return models.Unprotecteds.model_validate({"columns": actions.find_unprotected(request)})


# Audit log, settings, health


@api.get("/audit", summary="Audit log", tags=["audit"], responses=documented(404))
@needs("read")
def audit(
    request: Request,
    keyring: KeyringFilter = None,
    event: Annotated[TextFilter | None, Query(description="Only this event.")] = None,
    actor: Annotated[TextFilter | None, Query(description="Only of this role or token.")] = None,
    since: Annotated[models.Time | None, Query(description="Only from this time on.")] = None,
    until: Annotated[models.Time | None, Query(description="Only before this time.")] = None,
    limit: Limit = 100,
    before: Before = None,
) -> models.AuditPage:
    """What happened to keys, newest first."""
    filters = {"keyring": keyring, "event": event, "actor": actor, "since": since, "until": until}
    rows, following = actions.page(request, "api audit log", limit, "id", before=before, **filters)
    return models.AuditPage.model_validate({"entries": rows, "next": following})


@api.get("/audit/verify", summary="Verify the audit log", tags=["audit"])
@needs("read")
def verify_audit(request: Request) -> models.AuditVerification:
    """Check the chain from its beginning; against an anchor: `pg-rekey audit verify`."""
    return models.AuditVerification.model_validate(actions.verify_audit_log(request))


@api.get("/audit/checkpoint", summary="Checkpoint of the audit log", tags=["audit"])
@needs("read")
def checkpoint(request: Request) -> models.Checkpoint:
    """The end of the audit log now, to be kept elsewhere; `pg-rekey audit checkpoint` signs it."""
    return models.Checkpoint(checkpoint=actions.checkpoint(request))


@api.get("/settings", summary="Settings", tags=["monitoring"])
@needs("read")
def settings(request: Request) -> models.Settings:
    """The settings and what they mean; `pg-rekey settings set` changes them."""
    return models.Settings.model_validate({"settings": actions.rows(request, "api settings")})


@api.get("/endpoints", summary="Who is told what happens", tags=["notifications"])
@needs("read")
def endpoints(request: Request) -> models.Endpoints:
    """Endpoints, and whether messages get there; `pg-rekey notify add` adds one."""
    return models.Endpoints.model_validate({"endpoints": actions.rows(request, "endpoints")})


@api.get("/endpoints/messages", summary="Messages to endpoints", tags=["notifications"])
@needs("read")
def messages(
    request: Request,
    endpoint: Annotated[TextFilter | None, Query(description="Only to this endpoint.")] = None,
    state: Annotated[MessageState | None, Query(description="Only in this state.")] = None,
    limit: Limit = 100,
    before: Before = None,
) -> models.Messages:
    """Messages that wait, and the last ones that were delivered or given up, newest first."""
    rows, following = actions.page(
        request, "messages", limit, "id", endpoint=endpoint, state=state, before=before
    )
    return models.Messages.model_validate({"messages": rows, "next": following})


@api.post(
    "/endpoints/test", status_code=202, summary="Send a test", tags=["notifications"], responses=CHANGES
)
@needs("admin")
def test_endpoint(request: Request, body: models.TestEndpoint) -> models.Message:
    """Put a test into the queue of an endpoint; this server or a worker delivers it."""
    return models.Message.model_validate(actions.test_endpoint(request, body.name))


@api.get("/doctor", summary="What should be looked at", tags=["monitoring"])
@needs("read")
def doctor(request: Request) -> models.Findings:
    """What `pg-rekey doctor` says, as this server and the role of the token see it."""
    return models.Findings.model_validate({"findings": [one.row() for one in actions.examine(request)]})


@metrics.get(
    "/metrics",
    summary="Metrics",
    tags=["monitoring"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
@needs("metrics")
def prometheus(request: Request) -> Response:
    """Figures for Prometheus, in its text format."""
    with transaction(request) as connection:
        rows = connection.execute("select * from rekey.metrics()").fetchall()
    return Response(exposition(rows), media_type=CONTENT_TYPE_LATEST)


@health.get("/healthz", summary="Health", tags=["monitoring"])
def healthz(request: Request) -> models.Health:
    """Whether the API runs and the database answers. It needs no token."""
    with transaction(request):
        return models.Health()
