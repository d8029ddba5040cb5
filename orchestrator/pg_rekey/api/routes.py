"""The routes. Each one is a transaction of a few statements on the contract in SQL."""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from pg_rekey import db, names
from pg_rekey.api.database import transaction
from pg_rekey.api.models import (
    AuditPage,
    Begun,
    Health,
    Id,
    KeyringName,
    Keys,
    RotateRequest,
    Rotation,
    RotationPage,
    RotationState,
)
from pg_rekey.api.refusals import Refusal, documented, no_keyring
from pg_rekey.api.tokens import Tokens
from pg_rekey.metrics import exposition


class AdminRoute(APIRoute):
    """A route for administrators. The token is looked at before the body is."""

    metrics: ClassVar[bool] = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, behind the check of the token."""
        serve = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            self._authenticate(request)
            self._check_query(request)
            return await serve(request)

        return guarded

    def _authenticate(self, request: Request) -> None:
        tokens: Tokens = request.app.state.tokens
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = tokens.find(given.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            what = "this token is not known" if given else "a token is missing"
            raise Refusal(401, "unauthorized", what, "Send the header `Authorization: Bearer TOKEN`.")
        request.state.token = token.name
        if not (token.admin or self.metrics):
            raise Refusal(
                403, "forbidden", "this token is for /metrics only", "Use an administrator's token."
            )

    def _check_query(self, request: Request) -> None:
        """Refuse a filter that would filter nothing."""
        asked = Counter(name for name, _ in request.query_params.multi_items())
        known = [parameter.alias for parameter in self.dependant.query_params]
        for name in asked - Counter(known):
            question = None if name in known else names.meant(name, known)
            hint = f"{question} See /docs." if question else "See /docs."
            raise Refusal(422, "invalid_request", "a query parameter is unknown or repeated", hint)


class MetricsRoute(AdminRoute):
    """A route for those who collect metrics, too."""

    metrics = True


# Only documents the header: AdminRoute checks it.
bearer = HTTPBearer(auto_error=False, description="A token made with `pg-rekey serve --new-token NAME`.")
api = APIRouter(
    prefix="/api",
    route_class=AdminRoute,
    dependencies=[Security(bearer)],
    responses=documented(401, 403, 413, 422, 500, 503),
)
metrics = APIRouter(
    route_class=MetricsRoute,
    dependencies=[Security(bearer)],
    responses=documented(401, 403, 413, 422, 500, 503),
)
health = APIRouter(responses=documented(413, 500, 503))

KeyringFilter = Annotated[KeyringName | None, Query(description="Only of this keyring.")]
Before = Annotated[Id | None, Query(description="Only what has a smaller id: `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Length of a page.")]


@api.post(
    "/keys/rotate", status_code=202, summary="Rotate keys", tags=["keys"], responses=documented(400, 404, 409)
)
def rotate(request: Request, response: Response, body: RotateRequest | None = None) -> Begun:
    """Make a new version of one keyring or of every one, active from now on; the worker does the rows.

    Where every keyring is rotated, those under way are returned as they are, and named in `passed_by`.
    """
    body = body or RotateRequest()
    request.state.keyring = body.keyring
    with transaction(request) as connection:
        if db.in_environment():
            db.unlock(connection)
        rows = connection.execute(
            "select r.*, r.created_at <> now() as passed_by from rekey.rotate_keys(%s, %s, %s) r",
            [body.keyring, body.reason, body.supersede],
        ).fetchall()
    passed_by = [row["keyring"] for row in rows if row.pop("passed_by")]
    if len(rows) == 1:
        response.headers["Location"] = f"/api/rotations/{rows[0]['id']}"
    return Begun.model_validate({"rotations": rows, "passed_by": passed_by})


@api.get("/keys", summary="Key versions", tags=["keys"], responses=documented(404))
def keys(request: Request, keyring: KeyringFilter = None) -> Keys:
    """Every version with its state and times. No key is in it."""
    with transaction(request) as connection:
        rows = connection.execute(db.query("keys"), [keyring, keyring]).fetchall()
    _check_keyring(request, keyring, rows)
    return Keys.model_validate({"keys": rows})


@api.get("/rotations", summary="Rotations", tags=["rotations"], responses=documented(404))
def rotations(
    request: Request,
    keyring: KeyringFilter = None,
    state: Annotated[RotationState | None, Query(description="Only in this state.")] = None,
    limit: Limit = 100,
    before: Before = None,
) -> RotationPage:
    """Rotations and how far they are, newest first."""
    rows, following = _page(request, "api rotations", limit, keyring=keyring, state=state, before=before)
    return RotationPage.model_validate({"rotations": rows, "next": following})


@api.get("/rotations/{id}", summary="One rotation", tags=["rotations"], responses=documented(404))
def rotation(request: Request, id: Id) -> Rotation:
    """One rotation and how far it is; `blocked_by` says what it waits for."""
    with transaction(request) as connection:
        row = connection.execute("select * from rekey.rotation_status where id = %s", [id]).fetchone()
    if row is None:
        raise Refusal(404, "RK007", f"no such rotation: {id}", "See GET /api/rotations.")
    return Rotation.model_validate(row)


@api.get("/audit", summary="Audit log", tags=["audit"], responses=documented(404))
def audit(
    request: Request, keyring: KeyringFilter = None, limit: Limit = 100, before: Before = None
) -> AuditPage:
    """What happened to keys, newest first. `pg-rekey audit verify` checks the chain."""
    rows, following = _page(request, "api audit log", limit, keyring=keyring, before=before)
    return AuditPage.model_validate({"entries": rows, "next": following})


@metrics.get(
    "/metrics",
    summary="Metrics",
    tags=["monitoring"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def prometheus(request: Request) -> Response:
    """Figures for Prometheus, in its text format."""
    with transaction(request) as connection:
        rows = connection.execute("select * from rekey.metrics()").fetchall()
    return Response(exposition(rows), media_type=CONTENT_TYPE_LATEST)


@health.get("/healthz", summary="Health", tags=["monitoring"])
def healthz(request: Request) -> Health:
    """Whether the API runs and the database answers. It needs no token."""
    with transaction(request):
        return Health()


def _page(
    request: Request, query: str, limit: int, *, keyring: str | None, **filters: object
) -> tuple[list[dict[str, Any]], int | None]:
    """Return a page of rows, and where the next one begins if there is one."""
    with transaction(request) as connection:
        # One more than asked for tells whether there is a next page.
        rows = connection.execute(
            db.query(query), {"keyring": keyring, **filters, "limit": limit + 1}
        ).fetchall()
    _check_keyring(request, keyring, rows)
    return rows[:limit], rows[limit - 1]["id"] if len(rows) > limit else None


def _check_keyring(request: Request, keyring: str | None, rows: list[dict[str, Any]]) -> None:
    """Refuse a keyring that there is none of: an empty list would look like peace."""
    if keyring is None or rows:
        return
    with transaction(request) as connection:
        if not connection.execute("select from rekey.keyrings where name = %s", [keyring]).fetchall():
            raise no_keyring(request, keyring)
