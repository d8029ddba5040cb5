"""The ASGI application."""

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from pg_rekey import db, release
from pg_rekey.api import refusals, routes
from pg_rekey.api.feed import Feed
from pg_rekey.api.middleware import Requests
from pg_rekey.api.tokens import Tokens

DESCRIPTION = """Rotates encryption keys of a PostgreSQL database; shows keys, rotations and the audit log.

Errors have the fields code, message, hint and request_id, whatever their status."""


def create_app(pool: db.Pool, tokens: Tokens) -> FastAPI:
    """Return the application; whoever made the pool opens and closes it."""
    # /docs with its scripts from here, not from a CDN.
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        title="pg_rekey",
        version=release.version(),
        description=DESCRIPTION,
    )
    app.state.pool = pool
    app.state.tokens = tokens
    app.state.feed = Feed(pool)
    for router in (routes.api, routes.metrics, routes.health):
        app.include_router(router)
    refusals.install(app)
    app.add_middleware(Requests)
    return app
