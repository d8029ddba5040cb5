"""Who may use a route: the token is looked at before the query, and that before the body."""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_args

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from pg_rekey import names
from pg_rekey.api.refusals import Refusal, shown
from pg_rekey.api.tokens import Role, Token, Tokens
from pg_rekey.errors import Problem
from pg_rekey.worker import log

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def needs(role: Role) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint as one that takes a token of this role, or of one that may more."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.role = role  # type: ignore[attr-defined]
        endpoint.__doc__ = f"{endpoint.__doc__}\n\nRole: `{role}`."
        return endpoint

    return mark


class GuardedRoute(APIRoute):
    """A route for tokens of the role that its endpoint needs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, behind the check of the token."""
        serve = super().get_route_handler()
        role: Role = self.endpoint.role  # type: ignore[attr-defined]
        fields = [
            name for field in self.dependant.body_params for name in _fields(field.field_info.annotation)
        ]

        async def guarded(request: Request) -> Response:
            request.state.fields = fields
            authenticate(request, role)
            self._check_query(request)
            return await serve(request)

        return guarded

    def _check_query(self, request: Request) -> None:
        """Refuse a filter that would filter nothing."""
        asked = Counter(name for name, _ in request.query_params.multi_items())
        known = [parameter.alias for parameter in self.dependant.query_params]
        for name in asked - Counter(known):
            message = f"a query parameter {shown(name)} is unknown or repeated"
            question = None if name in known else names.meant(name, known)
            hint = f"{question} See /docs." if question else "See /docs."
            raise Refusal(422, "invalid_request", message, hint)


def authenticate(request: Request, role: Role) -> None:
    """Note whose token came as a bearer's, or refuse it."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    token = find(request, given.strip()) if scheme.lower() == "bearer" else None
    if token is None:
        what = "this token is not known" if given else "a token is missing"
        raise Refusal(401, "unauthorized", what, "Send the header `Authorization: Bearer TOKEN`.")
    request.state.token = token
    permit(token, role)


def permit(token: Token, role: Role) -> None:
    """Refuse what a token is not for."""
    if not token.may(role):
        only = "for /metrics only" if token.role == "metrics" else f"of the role {token.role}"
        raise Refusal(403, "forbidden", f"this token is {only}", f"Use one of the role {role}.")


def find(request: Request, given: str) -> Token | None:
    """Return whose token this is; refuse everybody while the tokens cannot be read."""
    tokens: Tokens = request.app.state.tokens
    try:
        return tokens.find(given)
    except Problem as problem:
        log("tokens", problem=problem.message)
        raise Refusal(503, "unavailable", "the tokens cannot be read", "The log says why.") from None


def _fields(annotation: Any) -> list[str]:
    """Return the names of the fields of a body."""
    models = [
        one
        for one in (annotation, *get_args(annotation))
        if isinstance(one, type) and issubclass(one, BaseModel)
    ]
    return [name for model in models for name in model.model_fields]
