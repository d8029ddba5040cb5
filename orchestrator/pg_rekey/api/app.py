"""The ASGI application."""

from typing import Any

from fastapi import FastAPI, Response
from fastapi_offline import FastAPIOffline
from starlette.staticfiles import StaticFiles

from pg_rekey import release
from pg_rekey.api import refusals, routes
from pg_rekey.api.database import Pools
from pg_rekey.api.feed import Feed
from pg_rekey.api.middleware import Requests
from pg_rekey.api.tokens import DATABASE_ROLES, Tokens
from pg_rekey.console import live, pages
from pg_rekey.console.sessions import Sessions

DESCRIPTION = """Rotates encryption keys of a PostgreSQL database; shows keys, rotations and the audit log.

Errors have the fields code, message, hint and request_id, whatever their status."""


class Assets(StaticFiles):
    """What the console's pages load. A browser keeps it, and asks each time if it is still the same."""

    def file_response(self, *given: Any, **named: Any) -> Response:
        """Return a file."""
        response = super().file_response(*given, **named)
        response.headers["Cache-Control"] = "no-cache"
        return response


def create_app(pools: Pools, tokens: Tokens) -> FastAPI:
    """Return the application; whoever made the pools opens and closes them."""
    # /docs with its scripts from here, not from a CDN.
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        title="pg_rekey",
        version=release.version(),
        description=DESCRIPTION,
    )
    app.state.pools = pools
    app.state.tokens = tokens
    app.state.feed = Feed(pools.of(DATABASE_ROLES["read"]))
    app.state.sessions = Sessions()
    app.state.doctor = live.Doctor()
    app.state.fragments = live.Fragments()
    for router in (routes.api, routes.metrics, routes.health, pages.entrance, pages.router):
        app.include_router(router)
    app.mount("/static", Assets(packages=[("pg_rekey.console", "static")]))
    refusals.install(app)
    app.add_middleware(Requests)
    return app
