"""Templates, and how values stand in them."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pg_rekey import release
from pg_rekey.cli import words
from pg_rekey.console import charts

# No script, style, font or picture from anywhere else, and none within a page.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}


# A dash.
NONE = "\u2013"


def number(value: float | None) -> str:
    """Return a number as a person reads it; a dash for none."""
    return NONE if value is None else f"{value:,.0f}"


def moment(value: datetime | None) -> Markup:
    """Return a time in UTC; the script of the page puts local time before it."""
    if value is None:
        return Markup(NONE)
    at = value.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S} UTC")


def duration(value: timedelta | float | None) -> str:
    """Return how long something takes, in words."""
    if value is None:
        return NONE
    given = value if isinstance(value, timedelta) else timedelta(seconds=value)
    seconds = given.total_seconds()
    return f"{seconds:.1f} seconds" if 0 < seconds < 10 else words.interval(given)


def seconds(setting: str) -> str:
    """Return a setting that is an interval, as PostgreSQL writes it, in words."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", setting)
    if found is None:
        return setting
    return duration(3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]))


def marked(value: str) -> Markup:
    """Return a text of ours with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(value))))


def plain(value: str) -> str:
    """Return the word of a state without its underscores."""
    return value.replace("_", " ")


def link(path: str, **query: Any) -> str:
    """Return a path with a query, without what is empty."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


_environment = Environment(
    loader=PackageLoader("pg_rekey.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "number": number,
    "moment": moment,
    "duration": duration,
    "marked": marked,
    "plain": plain,
    "seconds": seconds,
    "json": lambda value: json.dumps(value, default=str, ensure_ascii=False),
}
_environment.globals |= {
    "link": link,
    "charts": charts,
    "blockers": words.blockers,
    "version": release.version(),
}


def render(name: str, **values: Any) -> str:
    """Return a template with its values."""
    return _environment.get_template(name).render(now=datetime.now(UTC), **values)


def page(
    request: Request, name: str, *, status: int = 200, live: str | None = None, **values: Any
) -> HTMLResponse:
    """Return a page, for whoever is signed in. live: what its events come from."""
    session = getattr(request.state, "session", None)
    given: Mapping[str, Any] = {
        "session": session,
        "notes": session.take_notes() if session else [],
        "path": request.url.path,
        "live": live,
        **values,
    }
    return HTMLResponse(render(name, **given), status, HEADERS)
