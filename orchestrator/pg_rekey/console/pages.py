"""The pages of the console, and what their forms do. Each page is for a session; each form has its token."""

import json
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

import psycopg
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from pg_rekey import db
from pg_rekey.api import actions, guard
from pg_rekey.api.database import transaction
from pg_rekey.api.guard import needs
from pg_rekey.api.models import Id, KeyringName
from pg_rekey.api.refusals import Refusal, refused
from pg_rekey.api.tokens import Role, Tokens
from pg_rekey.console import live, views
from pg_rekey.console.sessions import (
    COOKIE,
    SIGN_IN_COOKIE,
    Session,
    Sessions,
    new_name,
    same,
    set_cookie,
)
from pg_rekey.errors import Problem
from pg_rekey.hints import Road

ROWS = 50
HISTORY = 100
MESSAGES = 20
FIELDS = 20
_REFUSALS = (Refusal, psycopg.Error, Problem, RequestValidationError)
_TEXT = Query(max_length=255, pattern=r"^[^\x00]*$")


class PageRoute(APIRoute):
    """A route that answers a browser: with a page whatever happens, for who is signed in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, behind the checks of session and form."""
        serve = super().get_route_handler()
        role: Role = self.endpoint.role  # type: ignore[attr-defined]

        async def guarded(request: Request) -> Response:
            sessions: Sessions = request.app.state.sessions
            tokens: Tokens = request.app.state.tokens
            session = sessions.find(request)
            # Whoever reads a page may have a terminal, but sends no requests.
            request.state.road = Road.COMMAND
            try:
                if session is None or not await run_in_threadpool(tokens.knows, session.token):
                    return _to_sign_in(request, session is not None)
                request.state.session, request.state.token = session, session.token
                if not request.url.path.startswith("/live"):
                    session.touch()
                guard.permit(session.token, role)
                if request.method == "POST":
                    await _read_form(request, session.csrf)
                return await serve(request)
            except _REFUSALS as error:
                return await run_in_threadpool(_refuse, request, session, error)

        return guarded


router = APIRouter(route_class=PageRoute, include_in_schema=False)
entrance = APIRouter(include_in_schema=False)


def _to_sign_in(request: Request, revoked: bool) -> Response:
    """Send whoever is not signed in there, and back to a page, but not into a form."""
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    why = "revoked" if revoked else "over" if request.cookies.get(COOKIE) else None
    there = views.link("/sign-in", next=back if request.method == "GET" and back != "/" else None, why=why)
    return RedirectResponse(there, 303)


async def _read_form(request: Request, csrf: str | None) -> dict[str, str]:
    """Return the fields of a form of ours; anybody else's is refused."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        fields = parse_qs(body, keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError:
        raise Refusal(422, "invalid_request", f"a form has {FIELDS} fields at most") from None
    form = {name: values[-1].replace("\x00", "") for name, values in fields.items()}
    if not same(form.get("csrf"), csrf):
        raise Refusal(403, "forbidden", "this form is not of this session", "Load the page again.")
    request.state.form = form
    return form


def _refuse(request: Request, session: Session | None, error: Exception) -> Response:
    """Say on the page that a form stands on what was refused; elsewhere on a page of its own."""
    answer = refused(request, error)
    said = json.loads(bytes(answer.body))
    form = getattr(request.state, "form", {})
    if session and form:
        session.notes.append(("refused", said["message"], said["hint"]))
        return RedirectResponse(local(form.get("back")), 303)
    return views.page(request, "error.html", status=answer.status_code, error=said)


def _tried(request: Request, read: Callable[[Request], list[actions.Row]]) -> list[actions.Row] | None:
    """Return what reads every row, on a page that stands without it too: it then says why."""
    try:
        return read(request)
    except _REFUSALS as error:
        said = json.loads(bytes(refused(request, error).body))
        request.state.session.notes.append(("refused", said["message"], said["hint"]))
        return None


def local(path: str | None) -> str:
    """Return a path of this server; the first page where it is none."""
    return path if path and path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


def _done(request: Request, message: str, back: str | None = None) -> Response:
    """Go back to the page of a form, which then says that it was done."""
    session: Session = request.state.session
    session.notes.append(("done", message, None))
    return RedirectResponse(back or local(request.state.form.get("back")), 303)


def _field(request: Request, name: str) -> str | None:
    """Return a field of the form; None where it is empty."""
    form: dict[str, str] = request.state.form
    return form.get(name, "").strip() or None


def _whole(request: Request, name: str) -> int:
    given = _field(request, name) or ""
    if not given.isascii() or not given.isdigit() or len(given) > 9:
        raise Refusal(422, "invalid_request", f"{name} is not a number")
    return int(given)


# Signing in and out


@entrance.get("/sign-in")
def sign_in_page(
    request: Request,
    next: Annotated[str | None, _TEXT] = None,
    why: Literal["over", "revoked", "wrong"] | None = None,
) -> Response:
    """Ask for a token."""
    csrf = new_name()
    response = views.page(request, "sign_in.html", next=local(next), why=why, csrf=csrf)
    set_cookie(request, response, SIGN_IN_COOKIE, csrf)
    return response


@entrance.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Begin a session for the bearer of a token."""
    try:
        form = await _read_form(request, request.cookies.get(SIGN_IN_COOKIE))
        token = await run_in_threadpool(guard.find, request, form.get("token", "").strip())
        if token is None:
            raise Refusal(401, "unauthorized", "this token is not known")
        request.state.token = token
        guard.permit(token, "read")
    except Refusal as error:
        await run_in_threadpool(refused, request, error)  # leaves its entry in the audit log
        csrf = new_name()
        back = local(getattr(request.state, "form", {}).get("next"))
        response: Response = views.page(
            request, "sign_in.html", status=error.status, next=back, why=error, csrf=csrf
        )
        set_cookie(request, response, SIGN_IN_COOKIE, csrf)
        return response
    sessions: Sessions = request.app.state.sessions
    sessions.end(request)
    response = RedirectResponse(local(form.get("next")), 303)
    set_cookie(request, response, COOKIE, sessions.begin(token))
    response.delete_cookie(SIGN_IN_COOKIE, path="/")
    return response


@router.post("/sign-out")
@needs("read")
def sign_out(request: Request) -> Response:
    """End the session."""
    sessions: Sessions = request.app.state.sessions
    sessions.end(request)
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(COOKIE, path="/")
    return response


# Pages


@router.get("/")
@needs("read")
def overview(
    request: Request,
    search: Annotated[str | None, _TEXT] = None,
    sort: Literal["name", "age", "next"] = "name",
    page: Annotated[int, Query(ge=1, le=100_000)] = 1,
) -> Response:
    """Is everything in order, and how old is each key."""
    given = {"search": search or None, "sort": sort, "limit": ROWS, "offset": ROWS * (page - 1)}
    with transaction(request) as connection:
        keyrings = connection.execute(db.query("console keyrings"), given).fetchall()
        light = actions.one(connection, db.query("console light"))
        under_way = connection.execute(db.query("api progress"), {"ids": [], "limit": live.SHOWN}).fetchall()
    return views.page(
        request,
        "overview.html",
        live="/live",
        keyrings=keyrings,
        total=keyrings[0]["total"] if keyrings else 0,
        pages=-(-keyrings[0]["total"] // ROWS) if keyrings else 1,
        page=page,
        sort=sort,
        search=search or "",
        light=light,
        doctor=live.doctor(request, live.PATIENCE),
        progress=live.under_way(request, under_way),
    )


@router.get("/rotate")
@needs("admin")
def rotate_page(request: Request, keyring: Annotated[KeyringName | None, Query()] = None) -> Response:
    """Ask why, before a rotation."""
    return views.page(request, "rotate.html", keyring=keyring)


@router.post("/rotate")
@needs("admin")
def rotate(request: Request) -> Response:
    """Rotate one keyring or every one, and show how it goes."""
    supersede = _field(request, "supersede") == "yes"
    begun = actions.rotate(request, _field(request, "keyring"), _field(request, "reason"), supersede)
    if len(begun) != 1:
        passed_by = sum(row["passed_by"] for row in begun)
        already = f"; {passed_by} were under way already and got no new key" if passed_by else ""
        return _done(request, f"{len(begun) - passed_by} keyrings have a new active key{already}.", "/")
    [row] = begun
    return _done(
        request,
        f"Version {row['to_version']} of keyring {row['keyring']} is active: what is written from now on is "
        "encrypted with it. The worker re-encrypts the rows that are there, waits for writers of the old "
        "version, and then opens every row to prove it. Everything stays readable meanwhile.",
        f"/rotations/{row['id']}",
    )


@router.get("/rotations/{id}")
@needs("read")
def rotation(request: Request, id: Id, before: Annotated[Id | None, Query()] = None) -> Response:
    """How far a rotation is, and what can be done about it."""
    row = actions.rotation(request, id)
    failures, following = actions.page(
        request, "api failures", ROWS, "id", rotation=id, all=True, before=before
    )
    with transaction(request) as connection:
        latest = actions.one(connection, db.query("console latest"), row["keyring"])["id"]
        settings = {
            one["name"]: one["value"] for one in connection.execute(db.query("api settings")).fetchall()
        }
    return views.page(
        request,
        "rotation.html",
        live=f"/live?rotation={id}",
        row=row,
        progress=live.rotation(request, row),
        is_latest=latest == id,
        failures=failures,
        following=following,
        settings=settings,
    )


@router.post("/rotations/{id}/{verb}")
@needs("operate")
def on_rotation(request: Request, id: Id, verb: Literal["pause", "resume", "retry", "rollback"]) -> Response:
    """Pause, resume, retry or roll back."""
    if verb == "rollback":
        guard.permit(request.state.token, "admin")
    row = actions.on_rotation(request, verb, id, _field(request, "reason"))
    said = {
        "pause": "Paused: nothing more is re-encrypted. The new version stays active, everything readable.",
        "resume": "It goes on.",
        "retry": "It is tried again.",
        "rollback": f"Version {row['to_version']} is active again. This rotation brings the rows back to it.",
    }
    return _done(request, said[verb], f"/rotations/{row['id']}")


@router.post("/failures/{id}/{action}")
@needs("admin")
def resolve(request: Request, id: Id, action: Literal["retry", "discard"]) -> Response:
    """Try a row of the quarantine again, or give it up."""
    actions.resolve(request, id, action, _field(request, "reason"))
    return _done(
        request, "The row is tried again." if action == "retry" else "The row is given up; it stays as it is."
    )


@router.get("/keyring")
@needs("read")
def keyring(
    request: Request, name: Annotated[KeyringName, Query()], count: Annotated[bool, Query()] = False
) -> Response:
    """A keyring: its versions and their lives, its schedule, its rotations."""
    with transaction(request) as connection:
        known = connection.execute(f"{db.query('api keyring')} where k.name = %s", [name]).fetchone()
        if known is None:
            raise Refusal(404, "RK007", f"no such keyring: {name!r}")
        keys = connection.execute(db.query("keys"), [name, name]).fetchall()
        latest = {"keyring": name, "state": None, "before": None, "limit": 10}
        rotations = connection.execute(db.query("api rotations"), latest).fetchall()
    if count:
        guard.permit(request.state.token, "operate")
    return views.page(
        request,
        "keyring.html",
        live="/live",
        keyring=known,
        keys=keys[::-1],
        rotations=rotations,
        usage=_tried(request, lambda asking: actions.usage(asking, name)) if count else None,
    )


@router.post("/keys/{verb}")
@needs("admin")
def on_key(
    request: Request,
    verb: Literal["disable", "enable", "compromise", "cancel-destruction", "schedule-destruction"],
) -> Response:
    """Change the state of a version."""
    name, version = _field(request, "keyring") or "", _whole(request, "version")
    if verb == "compromise" and _field(request, "confirm") != name:
        raise Refusal(422, "invalid_request", "the name of the keyring that you typed is another one")
    if verb == "schedule-destruction":
        row = actions.schedule_destruction(request, name, version, _field(request, "wait"))
    else:
        row = actions.on_key(request, verb, name, version, _field(request, "reason"))
    return _done(request, f"Version {version} of keyring {name} is {views.plain(row['state'])}.")


@router.post("/schedule/{verb}")
@needs("admin")
def schedule(request: Request, verb: Literal["set", "clear"]) -> Response:
    """Set or clear the schedule of a keyring."""
    name = _field(request, "keyring") or ""
    if verb == "clear":
        actions.clear_schedule(request, name)
        return _done(request, f"Keyring {name} rotates only when somebody says so.")
    row = actions.set_schedule(request, name, _field(request, "rotate_every") or "", None)
    return _done(
        request,
        f"Keyring {name} rotates every {row['rotate_every']}, next after "
        f"{row['next_rotation_at'].astimezone(UTC):%Y-%m-%d %H:%M} UTC.",
    )


@router.get("/columns")
@needs("read")
def columns(request: Request, find: Annotated[bool, Query()] = False) -> Response:
    """Protected columns; on demand, those that were forgotten."""
    protected = actions.columns(request)
    unprotected = _tried(request, actions.find_unprotected) if find else None
    return views.page(request, "columns.html", columns=protected, unprotected=unprotected)


def _filters(request: Request) -> dict[str, Any]:
    """Return the filters of the audit log that the query has; times are UTC."""
    given: dict[str, Any] = {
        name: request.query_params.get(name) or None
        for name in ("keyring", "event", "actor", "since", "until")
    }
    for name in ("since", "until"):
        if given[name]:
            try:
                at = datetime.fromisoformat(given[name])
            except ValueError:
                raise Refusal(422, "invalid_request", f"{name} is not a time") from None
            given[name] = at if at.tzinfo else at.replace(tzinfo=UTC)
    return given


@router.get("/audit")
@needs("read")
def audit(request: Request, before: Annotated[Id | None, Query()] = None) -> Response:
    """What happened to keys."""
    entries, following = actions.page(
        request, "api audit log", ROWS, "id", before=before, **_filters(request)
    )
    given = {
        name: request.query_params.get(name, "") for name in ("keyring", "event", "actor", "since", "until")
    }
    events = [one["event"] for one in actions.rows(request, "console events")]
    return views.page(request, "audit.html", entries=entries, following=following, given=given, events=events)


@router.post("/audit/verify")
@needs("read")
def verify_audit(request: Request) -> Response:
    """Check the chain of the audit log."""
    found = actions.verify_audit_log(request)
    if not found["valid"]:
        raise Refusal(
            409, "RK006", f"the audit log does not hold: entry {found['first_bad']}, {found['reason']}"
        )
    return _done(request, f"The chain of the audit log holds: {found['entries']:,} entries.")


@router.get("/audit/download")
@needs("read")
def download_audit(request: Request) -> Response:
    """The entries of the filters as JSON lines, newest first."""
    filters = _filters(request)

    def lines() -> Iterator[str]:
        before: int | None = None
        while True:
            entries, before = actions.page(request, "api audit log", 1000, "id", before=before, **filters)
            yield "".join(
                f"{json.dumps(entry, default=_jsonable, ensure_ascii=False)}\n" for entry in entries
            )
            if before is None:
                return

    headers = {**views.HEADERS, "Content-Disposition": 'attachment; filename="audit.jsonl"'}
    return StreamingResponse(lines(), media_type="application/jsonl", headers=headers)


@router.get("/audit/checkpoint")
@needs("read")
def checkpoint(request: Request) -> Response:
    """The end of the audit log, to be kept elsewhere."""
    document = json.dumps(actions.checkpoint(request), indent=2)
    headers = {**views.HEADERS, "Content-Disposition": 'attachment; filename="checkpoint.json"'}
    return Response(document, media_type="application/json", headers=headers)


def _jsonable(value: object) -> str:
    return (
        value.hex()
        if isinstance(value, bytes)
        else value.isoformat()
        if isinstance(value, datetime)
        else str(value)
    )


@router.get("/history")
@needs("read")
def history(request: Request, before: Annotated[Id | None, Query()] = None) -> Response:
    """The last rotations: how long they took, and how fast they were."""
    rotations, following = actions.page(request, "console history", HISTORY, "id", before=before)
    return views.page(request, "history.html", live="/live", rotations=rotations, following=following)


@router.get("/health")
@needs("read")
def health(request: Request) -> Response:
    """What `pg-rekey doctor` says, who is told of it, and the settings."""
    last = {"endpoint": None, "state": None, "before": None, "limit": MESSAGES}
    return views.page(
        request,
        "health.html",
        doctor=live.doctor(request),
        endpoints=actions.rows(request, "endpoints"),
        messages=actions.rows(request, "messages", **last),
        settings=actions.rows(request, "api settings"),
    )


@router.post("/endpoints/test")
@needs("admin")
def test_endpoint(request: Request) -> Response:
    """Send a test to an endpoint."""
    name = _field(request, "name") or ""
    actions.test_endpoint(request, name)
    return _done(
        request, f"A test is on its way to {name}: load the page again in a moment to see it arrive."
    )


@router.get("/live")
@needs("read")
def events(request: Request, rotation: Annotated[Id | None, Query()] = None) -> Response:
    """What changes on a page, as server-sent events."""
    return live.events(request, rotation)


@router.get("/live/session")
@needs("read")
def alive(request: Request) -> Response:
    """Tell a page whose stream was refused that it is still signed in."""
    return Response(status_code=204, headers=views.HEADERS)
