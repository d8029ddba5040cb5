"""Endpoints over HTTP and in the console, and `serve`, which watches over the worker."""

import json
import threading
from pathlib import Path

import pytest

from api_fixtures import ALICE, OLAF, ROSA, Api, digest
from cli_fixtures import eventually, process
from helpers import Connection, value
from pg_rekey import db as database
from pg_rekey.api.database import Pools
from pg_rekey.notify import watch as watching
from receivers import Receiver, mail_server, make_certificate
from test_console import Browser
from test_notify import add

pytest_plugins = ["api_fixtures", "receivers"]


@pytest.fixture
def browser(api: Api) -> Browser:
    return Browser(api)


def test_endpoints_are_shown_without_their_addresses(api: Api, ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/canary", events=["kek.missing"])
    add(ready, "here", "notify:rekey_test")
    found = api.get("/api/endpoints", token=ROSA)["endpoints"]
    assert [(one["name"], one["kind"], one["events"]) for one in found] == [
        ("here", "channel", None),
        ("web", "webhook", ["kek.missing"]),
    ]
    assert "canary" not in json.dumps(found)


def test_tests_are_sent_by_administrators(api: Api, ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/canary")
    for token in (ROSA, OLAF):
        assert api("POST", "/api/endpoints/test", token=token, json={"name": "web"}).status_code == 403
    answer = api("POST", "/api/endpoints/test", json={"name": "web"})
    assert (answer.status_code, answer.json()["state"]) == (202, "waiting")
    assert api("POST", "/api/endpoints/test", json={"name": "wed"}).status_code == 404
    assert api("POST", "/api/endpoints/test", json={"name": "a b"}).status_code == 422
    assert api("POST", "/api/endpoints/test", json={}).status_code == 422
    for _ in range(3):
        ready.execute("select rekey.test_endpoint('web')")
    page = api.get("/api/endpoints/messages?limit=3&state=waiting", token=ROSA)
    assert [one["event"] for one in page["messages"]] == ["test"] * 3
    last = api.get(f"/api/endpoints/messages?before={page['next']}&endpoint=web")
    assert len(last["messages"]) == 1
    assert last["next"] is None
    api.get("/api/endpoints/messages?state=gone", 422)


def test_the_console_shows_who_is_told_and_sends_a_test(browser: Browser, ready: Connection) -> None:
    with browser.client:
        browser.sign_in(ALICE)
        browser.get("/health")
        assert "Nobody is told" in browser.page
        add(ready, "web", "https://hooks.example.com/canary")
        browser.get("/health")
        browser.post("/endpoints/test")
        assert "A test is on its way to web" in browser.page
        ready.execute("select rekey._note_delivery(id, 'HTTP status 500') from rekey.message_status")
        browser.get("/health")
        assert "HTTP status 500" in browser.page
        assert "canary" not in browser.page
        browser.sign_in(ROSA)
        browser.get("/health")
        assert "Send a test" not in browser.page


def test_serve_tells_that_the_worker_is_silent_and_back(
    api_env: str, ready: Connection, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SECONDS", 0.05)
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("update rekey._worker set last_tick_at = now() - interval '6 minutes'")
    stop = threading.Event()
    with Pools.from_environment() as pools:
        thread = threading.Thread(target=watching.watch, args=[pools, stop])
        thread.start()
        try:
            eventually(lambda: hook.events() == ["worker.silent"])
            ready.execute("select rekey._tick_duty('end', now())")
            eventually(lambda: hook.events() == ["worker.silent", "worker.back"])
        finally:
            stop.set()
            thread.join()


def test_serve_says_once_that_the_database_is_gone(
    api_env: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "SECONDS", 0.01)
    monkeypatch.setattr(database, "POOL_TIMEOUT", 0.05)
    stop = threading.Event()
    with Pools(database.pool("host=127.0.0.1 port=1 dbname=canary")) as pools:
        timer = threading.Timer(0.5, stop.set)
        timer.start()
        watching.watch(pools, stop)
    said = capsys.readouterr().out
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["watch"]
    assert "canary" not in said


def test_the_process_delivers_by_email(
    api_env: str, ready: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    tokens = {"PG_REKEY_API_TOKENS": f"alice:{digest(ALICE)}", "SSL_CERT_FILE": str(certificate)}
    with mail_server(certificate, direct=True) as mail:
        address = f"smtps://r:canary%2Fp%40ss@localhost:{mail.port}?from=r@example.com&to=a@example.com"
        add(ready, "mail", address, allow_private=True)
        ready.execute("select rekey.mark_key_compromised('default', 1)")
        with process("serve", "--port", "0", **tokens) as serving:
            eventually(lambda: mail.received)
            eventually(lambda: value(ready, "select bool_and(state = 'delivered') from rekey.message_status"))
            serving.terminate()
            out, err = serving.communicate()
    [subject] = [str(one["Subject"]) for one in mail.received]
    said = "Version 1 of keyring default was marked as compromised"
    assert " ".join(subject.split()) == f"pg_rekey, {ready.info.dbname}: {said}"
    assert "canary" not in out + err
