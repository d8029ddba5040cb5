"""Who is signed in: sessions in the memory of the process, by a cookie that only their browser has."""

import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from fastapi import Request, Response

from pg_rekey.api.tokens import Token

COOKIE = "pg_rekey_session"
# Signing in needs a token of its own against forged forms, before there is a session.
SIGN_IN_COOKIE = "pg_rekey_sign_in"
# Without a page or a form asked for; what follows progress does not count.
IDLE_SECONDS = 30 * 60.0
LONGEST_SECONDS = 12 * 3600.0
SESSIONS = 1000


@dataclass
class Session:
    """A browser that is signed in."""

    token: Token
    csrf: str = field(default_factory=lambda: new_name())
    begun: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)
    notes: list[tuple[Literal["done", "refused"], str, str | None]] = field(default_factory=list)

    def is_over(self) -> bool:
        """Tell whether nobody has used it for too long, or it is too old."""
        now = time.monotonic()
        return now - self.used > IDLE_SECONDS or now - self.begun > LONGEST_SECONDS

    def touch(self) -> None:
        """Note that somebody uses it."""
        self.used = time.monotonic()

    def may(self, role: Literal["read", "operate", "admin"]) -> bool:
        """Tell whether its token may what one of this role may."""
        return self.token.may(role)

    def take_notes(self) -> list[tuple[Literal["done", "refused"], str, str | None]]:
        """Return what the next page is to say, once."""
        notes, self.notes = self.notes, []
        return notes


class Sessions:
    """The sessions, by the hash of what the cookie holds."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._lock = threading.Lock()

    def begin(self, token: Token) -> str:
        """Begin a session and return what its cookie is to hold."""
        name = new_name()
        with self._lock:
            self._sessions = {key: one for key, one in self._sessions.items() if not one.is_over()}
            if len(self._sessions) >= SESSIONS:
                del self._sessions[min(self._sessions, key=lambda key: self._sessions[key].used)]
            self._sessions[_key(name)] = Session(token)
        return name

    def find(self, request: Request) -> Session | None:
        """Return the session of a request, unless it is over."""
        with self._lock:
            session = self._sessions.get(_key(request.cookies.get(COOKIE, "")))
        return None if session is None or session.is_over() else session

    def end(self, request: Request) -> None:
        """End the session of a request."""
        with self._lock:
            self._sessions.pop(_key(request.cookies.get(COOKIE, "")), None)


def new_name() -> str:
    """Return a text that nobody guesses."""
    return secrets.token_urlsafe(32)


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    """Give the browser a cookie that no script and no other site gets at; behind TLS, by TLS only."""
    # Whoever writes this header himself has only his own cookie kept from plain HTTP.
    secure = request.headers.get("x-forwarded-proto") == "https"
    response.set_cookie(name, value, path="/", httponly=True, samesite="strict", secure=secure)


def same(given: str | None, expected: str | None) -> bool:
    """Tell whether a form has the token that it was given."""
    return bool(expected) and hmac.compare_digest((given or "").encode(), (expected or "").encode())
