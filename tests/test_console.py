"""The console without a browser: sessions, forms, pages and what their headers let a browser do."""

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from api_fixtures import ALICE, OLAF, PROMETHEUS, ROSA, Api
from driving import rotate
from helpers import Connection, value
from pg_rekey.api import feed as feeds
from pg_rekey.console import sessions
from test_api_control import DAMAGE

pytest_plugins = ["api_fixtures"]

PAGES = ["/", "/rotate", "/rotations/1", "/keyring?name=default", "/columns", "/audit", "/history", "/health"]


class Browser:
    """A browser without a screen: cookies, and forms as they are on the page."""

    def __init__(self, api: Api) -> None:
        self.client = TestClient(api.app, client=("192.0.2.9", 50000), follow_redirects=True)
        self.page = ""

    def get(self, path: str, status: int = 200) -> Any:
        """Look at a page."""
        response = self.client.get(path)
        assert response.status_code == status, response.text
        self.page = response.text
        return response

    def post(self, path: str, status: int = 200, **fields: str) -> Any:
        """Send the form of this page that goes there."""
        form = re.search(rf'<form[^>]*action="{re.escape(path)}".*?</form>', self.page, re.DOTALL)
        assert form, f"no form for {path}"
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form[0]))
        response = self.client.post(path, data={**hidden, **fields})
        assert response.status_code == status, response.text
        self.page = response.text
        return response

    def sign_in(self, token: str = ALICE, status: int = 200) -> Any:
        """Sign in."""
        self.get("/sign-in")
        return self.post("/sign-in", status, token=token)


@pytest.fixture
def browser(api: Api) -> Iterator[Browser]:
    one = Browser(api)
    with one.client:
        yield one


# Signing in


def test_sign_in_and_out(browser: Browser) -> None:
    response = browser.client.get("/audit?event=key.created", follow_redirects=False)
    assert response.headers["location"] == "/sign-in?next=%2Faudit%3Fevent%3Dkey.created"
    browser.get("/audit?event=key.created")
    assert "Sign in" in browser.page
    response = browser.post("/sign-in", token=f" {ALICE} ")
    assert str(response.url).endswith("/audit?event=key.created")
    [cookie] = response.history[0].headers.get_list("set-cookie")[:1]
    assert cookie.startswith(f"{sessions.COOKIE}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    assert "alice" in browser.page
    kept = browser.client.cookies[sessions.COOKIE]
    browser.post("/sign-out")
    assert browser.client.cookies.get(sessions.COOKIE) is None
    # It is no session any more, whoever kept the cookie.
    browser.client.cookies.set(sessions.COOKIE, kept)
    assert "Your session has ended" in browser.get("/").text


def test_cookies_behind_tls(browser: Browser) -> None:
    browser.client.headers["X-Forwarded-Proto"] = "https"
    browser.client.base_url = "https://testserver"
    browser.sign_in()
    response = browser.client.get("/sign-in")
    assert "Secure" in response.headers["set-cookie"]


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        ("canary-stranger", 401, "this token is not known"),
        ("", 401, "this token is not known"),
        ("\u00e9\u4e2d", 401, "this token is not known"),
        (PROMETHEUS, 403, "for /metrics only"),
    ],
)
def test_who_is_not_let_in(token: str, status: int, said: str, browser: Browser, ready: Connection) -> None:
    response = browser.sign_in(token, status)
    assert said in response.text
    assert not token or token not in response.text
    assert value(ready, "select count(*) from rekey.audit_log where event = 'access.denied'") == 1
    assert browser.client.get("/", follow_redirects=False).status_code == 303


def test_a_session_ends(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    browser.sign_in()
    browser.get("/")
    clock = time.monotonic()
    monkeypatch.setattr("pg_rekey.console.sessions.time.monotonic", lambda: clock + sessions.IDLE_SECONDS - 1)
    browser.get("/audit")
    monkeypatch.setattr(
        "pg_rekey.console.sessions.time.monotonic", lambda: clock + 2 * sessions.IDLE_SECONDS - 2
    )
    # What a page does by itself does not keep it.
    assert browser.client.get("/live/session").status_code == 204
    monkeypatch.setattr("pg_rekey.console.sessions.time.monotonic", lambda: clock + 2 * sessions.IDLE_SECONDS)
    assert "Your session has ended" in browser.get("/").text
    assert browser.client.get("/live/session", follow_redirects=False).status_code == 303


def test_a_session_ends_with_its_token(browser: Browser, api: Api) -> None:
    browser.sign_in()
    api.app.state.tokens._tokens = api.app.state.tokens._tokens[1:]
    assert "Your token is not known any more" in browser.get("/").text


def test_sessions_have_a_limit(monkeypatch: pytest.MonkeyPatch, browser: Browser, api: Api) -> None:
    monkeypatch.setattr(sessions, "SESSIONS", 2)
    browser.sign_in()
    for _ in range(2):
        Browser(api).sign_in()
    assert "Sign in" in browser.get("/").text


@pytest.mark.parametrize("there", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_sign_in_leads_nowhere_else(there: str, browser: Browser) -> None:
    browser.client.get("/sign-in")
    browser.get(f"/sign-in?next={there}")
    response = browser.post("/sign-in", token=ALICE)
    assert str(response.url) == "http://testserver/"


# Forms


def test_a_forged_form_is_refused(browser: Browser, ready: Connection) -> None:
    browser.sign_in()
    for fields in ({}, {"csrf": "canary"}, {"csrf": ""}):
        response = browser.client.post("/rotate", data={"keyring": "default", **fields})
        assert response.status_code == 403
        assert "this form is not of this session" in response.text
    assert value(ready, "select count(*) from rekey.rotations") == 0
    assert browser.client.post("/sign-in", data={"token": ALICE, "csrf": "x"}).status_code == 403
    other = Browser(api=Api(browser.client.app, None))  # type: ignore[arg-type]
    other.sign_in(OLAF)
    csrf = re.findall(r'name="csrf" value="([^"]+)"', other.page)[0]
    assert browser.client.post("/rotate", data={"keyring": "default", "csrf": csrf}).status_code == 403


def test_a_form_with_too_many_fields(browser: Browser) -> None:
    browser.sign_in()
    assert browser.client.post("/rotate", data={str(n): "" for n in range(30)}).status_code == 422


def test_assets_are_asked_for_again(browser: Browser) -> None:
    response = browser.client.get("/static/console.css")
    assert response.headers["cache-control"] == "no-cache"
    again = browser.client.get("/static/console.css", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304
    assert browser.client.get("/static/../pages.py").status_code == 404


def test_what_a_role_sees_and_may(browser: Browser, api: Api, ready: Connection) -> None:
    ready.execute("select rekey.rotate_keys()")
    browser.sign_in(ROSA)
    browser.get("/rotations/1")
    assert "Pause" not in browser.page
    csrf = re.findall(r'name="csrf" value="([^"]+)"', browser.page)[0]
    for path in ("/rotate", "/rotations/1/pause", "/failures/1/retry", "/keys/disable", "/schedule/set"):
        assert browser.client.post(path, data={"csrf": csrf}).status_code == 403, path
    browser.get("/rotate", 403)
    browser.get("/keyring?name=default&count=1", 403)
    browser.sign_in(OLAF)
    browser.get("/rotations/1")
    browser.post("/rotations/1/pause")
    csrf = re.findall(r'name="csrf" value="([^"]+)"', browser.page)[0]
    response = browser.client.post("/rotations/1/rollback", data={"csrf": csrf, "back": "/rotations/1"})
    assert "of the role operate" in response.text
    assert value(ready, "select state from rekey.rotations") == "paused"


def test_rotate_pause_resume_roll_back(browser: Browser, ready: Connection) -> None:
    browser.sign_in()
    browser.get("/rotate?keyring=default")
    browser.post("/rotate", reason="a colleague left")
    assert "Version 2 of keyring default is active" in browser.page
    assert "a colleague left" in browser.page
    assert "Version 2 of keyring default is active" not in browser.get("/rotations/1").text
    browser.post("/rotations/1/pause")
    assert "Paused: nothing more" in browser.page
    browser.post("/rotations/1/resume")
    browser.get("/rotate?keyring=default")
    browser.post("/rotate")
    assert "is under way in rotation 1" in browser.page
    browser.get("/rotations/1")
    browser.post("/rotations/1/rollback", reason="a client")
    assert "Version 1 is active again" in browser.page
    who = "select distinct jwt_subject from rekey.audit_log where rotation_id is not null"
    assert ready.execute(who).fetchall() == [("alice",)]
    browser.get("/rotate")
    browser.post("/rotate", supersede="yes")
    assert "Version 3 of keyring default is active" in browser.page


def test_a_damaged_row(browser: Browser, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'canary-value')")
    ready.execute(DAMAGE)
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    browser.sign_in()
    browser.get("/rotations/1")
    assert "rekey.secrets" in browser.page
    assert "canary-value" not in browser.page
    browser.post("/failures/1/retry")
    assert "The row is tried again" in browser.page
    ready.execute("call rekey.run_rotations()")
    browser.get("/rotations/1")
    [open_one] = re.findall(r"/failures/(\d+)/discard", browser.page)
    browser.post(f"/failures/{open_one}/discard", reason="gone")
    assert "The row is given up" in browser.page


def test_keys(browser: Browser, ready: Connection) -> None:
    ready.execute("select rekey.set_secret('a', 'value')")
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    browser.sign_in()
    browser.get("/keyring?name=default&count=1")
    assert "rekey.secrets" in browser.page
    browser.post("/keys/disable", reason="doubt")
    assert "Version 1 of keyring default is disabled" in browser.page
    browser.post("/keys/enable")
    browser.post("/keys/schedule-destruction", wait="often")
    assert "invalid input syntax for type interval" in browser.page
    browser.post("/keys/schedule-destruction", wait="30 days")
    assert "Version 1 of keyring default is destroy scheduled" in browser.page
    browser.post("/keys/cancel-destruction")
    browser.post("/keys/compromise", confirm="other")
    assert "is another one" in browser.page
    assert value(ready, "select count(*) from rekey.key_status where state = 'compromised'") == 0
    browser.post("/keys/compromise", confirm="default", reason="a leak")
    assert "Version 2 of keyring default is compromised" in browser.page
    browser.post("/schedule/set", rotate_every="90 days")
    assert "rotates every 90 days" in browser.page
    browser.post("/schedule/clear")
    assert "only when somebody says so" in browser.page


# Pages


class Structure(HTMLParser):
    """What is on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what a policy would forbid, and what the page loads."""
        given = dict(attributes)
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        self.loaded += [given[name] or "" for name in ("src",) if name in given]
        self.loaded += [given["href"] or ""] if tag == "link" else []


@pytest.mark.parametrize("path", ["/sign-in", *PAGES])
def test_pages_keep_to_their_policy(path: str, browser: Browser, ready: Connection) -> None:
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    browser.sign_in()
    response = browser.get(path)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert response.headers["cache-control"] == "no-store"
    found = Structure(response.text)
    assert found.inline == []
    for asset in found.loaded:
        assert asset.startswith("/static/")
        assert browser.client.get(asset).status_code == 200


def test_names_are_text(browser: Browser, ready: Connection) -> None:
    """Whatever a keyring or a reason is called, it is no markup."""
    name = "<img src=x onerror=alert(1)>&\"'"
    ready.execute("select rekey.create_keyring(%s)", [name])
    ready.execute("select rekey.rotate_keys(%s, %s)", [name, "<script>alert(1)</script>"])
    browser.sign_in()
    for path in (*PAGES, f"/keyring?name={name}".replace("&", "%26")):
        page = browser.get(path).text
        assert "<img src=x" not in page
        assert "<script>" not in page
        assert Structure(page).inline == []


def test_errors_are_pages(browser: Browser) -> None:
    browser.sign_in()
    assert "no such rotation: 99" in browser.get("/rotations/99", 404).text
    assert "no such keyring" in browser.get("/keyring?name=none", 404).text
    assert "That did not work" in browser.get("/rotations/canary", 422).text
    assert "That did not work" in browser.get("/audit?since=yesterday", 422).text
    browser.client.app.state.pools.__exit__()  # type: ignore[attr-defined]
    assert "the database is not available" in browser.get("/", 503).text


def test_settings_in_words(browser: Browser) -> None:
    browser.sign_in()
    browser.get("/health")
    for name, words in {"batch_target": "0.2 seconds", "notify_blocked": "15 minutes"}.items():
        assert f"<code>{name}</code></th><td>{words}</td>" in browser.page


def test_the_pace_in_words(browser: Browser, ready: Connection) -> None:
    browser.sign_in()
    number = rotate(ready)
    browser.get(f"/rotations/{number}")
    assert "give way to nobody" in browser.page
    ready.execute("select rekey.set_setting('min_pace', '0.25')")
    browser.get(f"/rotations/{number}")
    assert "down to 25 % of the time" in browser.page


def test_the_audit_log(browser: Browser, ready: Connection) -> None:
    browser.sign_in()
    browser.get("/rotate?keyring=default")
    browser.post("/rotate", reason="a leak")
    browser.get("/audit?event=rotation.requested&actor=alice&since=2020-01-01T00:00&until=2100-01-01T00:00")
    assert browser.page.count('<code class="details">') == 1
    lines = browser.client.get("/audit/download?actor=alice").text.splitlines()
    assert {json.loads(line)["jwt_subject"] for line in lines} == {"alice"}
    everything = [json.loads(line) for line in browser.client.get("/audit/download").text.splitlines()]
    assert len(everything) == value(ready, "select count(*) from rekey.audit_log")
    assert everything[-1]["prev_hash"] == value(
        ready, "select encode(prev_hash, 'hex') from rekey.audit_log where id = 1"
    )
    checkpoint = browser.client.get("/audit/checkpoint")
    assert json.loads(checkpoint.text)["id"] == everything[0]["id"]
    browser.get("/audit")
    browser.post("/audit/verify")
    assert f"The chain of the audit log holds: {len(everything)} entries" in browser.page
    ready.execute("set session_replication_role = replica")
    ready.execute("update rekey.audit_log set details = '{}' where id = 2")
    browser.post("/audit/verify")
    assert "the audit log does not hold: entry 2" in browser.page


def test_a_long_audit_log_by_page(browser: Browser, ready: Connection) -> None:
    """100,000 entries: sorted, filtered and paged by the server."""
    for _ in range(10):
        ready.execute(ENTRIES)
    ready.execute("analyze rekey.audit_log")
    entries = value(ready, "select count(*) from rekey.audit_log")
    assert entries > 100_000
    browser.sign_in()
    took = {}
    for path in (
        "/audit",
        "/audit?before=50000",
        "/audit?event=key.created",  # the oldest ones
        "/audit?keyring=k9999",
        "/audit?actor=nobody",
        "/audit?since=2020-01-01T00:00&until=2021-01-01T00:00",
        "/audit?event=rotation.completed&keyring=k5&before=60000",
    ):
        begun = time.monotonic()
        browser.get(path)
        took[path] = round(1000 * (time.monotonic() - begun))
        assert browser.page.count('<code class="details">') <= 50
    print("milliseconds:", took)
    # (A page takes 0.1 s or less on a quiet machine.)
    assert max(took.values()) < 2000
    browser.get("/audit")
    older = re.search(r'href="(/audit\?before=\d+)"', browser.page)
    assert older
    browser.get(older[1])
    assert str(entries - 50) in browser.page


ENTRIES = """
    select rekey._audit_all(jsonb_agg(jsonb_build_object(
      'event', 'rotation.completed', 'keyring', 'k' || n, 'version', 2, 'rotation_id', n)))
    from generate_series(1, 10000) n"""


def test_forgotten_columns(browser: Browser, ready: Connection) -> None:
    ready.execute("create table public.account (id int primary key, api_key text)")
    ready.execute("insert into public.account values (1, 'canary-key')")
    ready.execute("grant select on public.account to rekey_auditor")
    ready.execute("create table public.card (id int primary key, number text)")
    ready.execute("select rekey.protect_column('public.card', 'number')")
    browser.sign_in()
    browser.get("/columns?find=1")
    assert "public.account" in browser.page
    assert "public.card.number" in browser.page
    assert "canary-key" not in browser.page


def test_many_keyrings_by_page(browser: Browser, ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('k' || lpad(n::text, 3, '0')) from generate_series(1, 120) n")
    browser.sign_in()
    assert "Page 1 of 3" in browser.get("/").text
    assert "k098" not in browser.page
    assert "k120" in browser.get("/?page=3").text
    assert "k120" in browser.get("/?search=K12").text
    assert "k119" not in browser.page
    ready.execute("select rekey.set_schedule('k119', '1 hour')")
    first = re.findall(r"/keyring\?name=(\w+)", browser.get("/?sort=next").text)[0]
    assert first == "k119"


# Live


def test_fragments(browser: Browser, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "STREAM_SECONDS", 1.0)
    ready.execute("select rekey.set_secret('a', 'value')")
    ready.execute("select rekey.rotate_keys()")
    browser.sign_in()
    text = browser.client.get("/live?rotation=1").text
    [document] = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert document["id"] == "live"
    assert "in line" in document["html"]
    assert "Rotation 1" in browser.client.get("/live").text
