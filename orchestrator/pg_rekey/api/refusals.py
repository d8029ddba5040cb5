"""Every answer that is not a success: one JSON shape, and an audit entry where somebody was refused."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pg_rekey import hints, names
from pg_rekey.api.database import OWN_ROLE, transaction
from pg_rekey.api.logs import where
from pg_rekey.api.models import Error
from pg_rekey.errors import Problem, explain, http_status
from pg_rekey.worker import log

BODY_LIMIT = 16 * 1024
DESCRIPTIONS = {
    400: "An argument cannot be.",
    401: "No token, or one that is not known.",
    403: "The token is not for this route, or the database refuses.",
    404: "There is no such thing.",
    409: "A rotation is under way, or the state does not allow it.",
    413: "The body is too large.",
    422: "The request is not as it should be.",
    500: "Something went wrong; the log says more.",
    503: "The database or the KEK is not available: try again.",
}

_FRAMEWORK: dict[int, tuple[str, str, str | None]] = {
    400: ("bad_request", "the body cannot be read", None),
    404: ("not_found", "there is no such route", "See /docs."),
    405: ("method_not_allowed", "the route does not have this method", "See /docs."),
    413: ("too_large", f"the body is larger than {BODY_LIMIT} bytes", None),
}


class Refusal(Exception):
    """Ends a request with an answer that is not a success."""

    def __init__(self, status: int, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint


def no_keyring(request: Request, keyring: str) -> Refusal:
    """Return the error that there is no such keyring, where the database returned no row."""
    hint = _joined(_meant(request, "keyring"), hints.ACTIONS["create_keyring"].on(request.state.road))
    return Refusal(404, "RK007", f"no such keyring: {keyring!r}", hint)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of these statuses."""
    return {status: {"model": Error, "description": DESCRIPTIONS[status]} for status in statuses}


def answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    hint: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the one shape that errors have."""
    error = Error(code=code, message=message, hint=hint, request_id=request.state.request_id)
    return JSONResponse(error.model_dump(), status, headers)


def internal(request: Request, error: Exception) -> JSONResponse:
    """Answer what nobody foresaw: the log says where it happened, the client learns nothing."""
    log("error", request_id=request.state.request_id, **where(error))
    return answer(request, 500, "internal", "internal error", "The log has it under this request_id.")


def too_large(request: Request) -> JSONResponse:
    """Answer a body that nobody will read."""
    return answer(request, 413, *_FRAMEWORK[413])


def install(app: FastAPI) -> None:
    """Let the app answer exceptions as this module says."""
    # Handlers that are no coroutines run in a thread, and so may wait for the database.
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


def refused(request: Request, error: Exception) -> JSONResponse:
    """Answer an exception as the API does."""
    for kind, handler in _HANDLERS.items():
        if isinstance(error, kind):
            return handler(request, error)
    return internal(request, error)


def _refusal(request: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, Refusal)
    if refusal.status in (401, 403):
        _note_denied(request)
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
    return answer(request, refusal.status, refusal.code, refusal.message, refusal.hint, headers)


def _database(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, psycopg.Error)
    request.state.sqlstate = error.sqlstate
    status = http_status(error)
    if status is None:
        return internal(request, error)
    if error.sqlstate is None:
        # What the library says then holds host, user and database.
        return answer(request, status, "unavailable", "the database is not available", "Try again.")
    if error.sqlstate == "42501":
        _note_denied(request)
    message, hint = explain(error, request.state.road)
    question = _meant(request, names.kind(error.diag.constraint_name, error.sqlstate))
    return answer(request, status, error.sqlstate, message, _joined(question, hint))


def _meant(request: Request, kind: str | None) -> str | None:
    """Ask whether another name was meant; a refusal stands without it too.

    The name that was given is in the path, in the query, or, where it came in the body, in the state of the
    request, always under its kind.
    """
    typed = {**request.query_params, **request.path_params}
    given = kind and (getattr(request.state, kind, None) or typed.get(kind))
    if not kind or not given:
        return None
    try:
        with transaction(request) as connection:
            return names.meant(given, names.known(connection, kind, **typed))
    except psycopg.Error:
        return None


def _joined(*parts: str | None) -> str | None:
    return " ".join(filter(None, parts)) or None


def _problem(request: Request, problem: Exception) -> JSONResponse:
    """Answer where the KEK of this server's environment cannot be had."""
    assert isinstance(problem, Problem)
    return answer(request, 503, "RK001", problem.message, problem.hint)


def _validation(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong with a request, without repeating what was in it, but for names of fields."""
    assert isinstance(error, RequestValidationError)
    fields = request.state.fields
    message = "; ".join(_finding(one, fields) for one in error.errors())
    return answer(request, 422, "invalid_request", message, "See /docs.")


def _finding(error: Mapping[str, Any], fields: Collection[str]) -> str:
    if error["type"] == "extra_forbidden":
        given = str(error["loc"][-1])
        known = names.meant(given, list(fields)) or f"There are: {', '.join(fields) or 'none'}."
        return f"body: there is no field {shown(given)}. {known}"
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def shown(name: object) -> str:
    """Return the name of an unknown field or parameter, unless it is none: it may be a token then."""
    given = str(name)
    return f"'{given}'" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", given) else "of that name"


def _http(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework refuses: unknown paths and methods, bodies that cannot be read."""
    assert isinstance(error, HTTPException)
    code, message, hint = _FRAMEWORK[error.status_code]
    if error.status_code == 404:
        hint = _joined(names.meant(request.url.path, list(request.app.openapi()["paths"])), hint)
    return answer(request, error.status_code, code, message, hint, error.headers)


def _note_denied(request: Request) -> None:
    """Leave an entry in the audit log; a refusal stands without it too."""
    details = {
        "via": "http",
        "route": f"{request.method} {request.scope['route'].path}",
        "client": request.state.client,
        "request_id": request.state.request_id,
    }
    try:
        with transaction(request, role=OWN_ROLE) as connection:
            connection.execute("select rekey._note_denied(%s::jsonb)", [json.dumps(details)])
    except psycopg.Error as error:
        log("refusal not audited", sqlstate=error.sqlstate, **details)


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
    Refusal: _refusal,
    psycopg.Error: _database,
    Problem: _problem,
    RequestValidationError: _validation,
    HTTPException: _http,
}
