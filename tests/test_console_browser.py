"""The console in a real browser: Debian's Chromium, without a screen. Skipped where there is none.

With PG_REKEY_SCREENSHOTS, a directory, every page is kept there as it looks.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect, sync_playwright

import npm
from api_fixtures import ALICE, ROSA, digest
from cli_fixtures import eventually, process
from helpers import Connection, connect, value
from pg_rekey.api import tokens
from test_api_control import DAMAGE

pytest_plugins = ["api_fixtures"]
pytestmark = pytest.mark.npm

PAGES = {
    "overview": "/",
    "rotate": "/rotate?keyring=default",
    "rotation": "/rotations/1",
    "keyring": "/keyring?name=default&count=1",
    "columns": "/columns?find=1",
    "audit": "/audit",
    "history": "/history",
    "health": "/health",
    "error": "/rotations/99",
}
LOOKS = [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 2560)]


expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as one:
        yield one


@pytest.fixture(scope="module")
def chromium(playwright: Playwright) -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("Chromium is not installed")
    # As root, and in a container, it has no sandbox.
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    npm.install(folder, "axe-core@^4.10.0")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


class Console:
    """The server, which can be ended and begun again on its port, and browsers that look at it."""

    def __init__(self, browser: Browser, stack: ExitStack, folder: Path) -> None:
        self._browser, self._stack = browser, stack
        self.path = folder / "tokens"
        self.path.write_text(f"alice:{digest(ALICE)}\nrosa:{digest(ROSA)}:read\n")
        self.port = 0
        self.said: list[str] = []  # what the browsers complain of
        self.start()

    def start(self) -> None:
        """Begin to serve."""
        self.server = self._stack.enter_context(
            process("serve", "--port", str(self.port), **{f"{tokens.ADMIN}_FILE": str(self.path)})
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert '"listening"' in line, line
        self.port = int(line.partition('"port": ')[2].partition(",")[0])
        threading.Thread(target=self.server.stdout.read, daemon=True).start()

    def stop(self) -> None:
        """End the server."""
        self.server.send_signal(signal.SIGTERM)
        assert self.server.wait(60) == 0

    def open(self, scheme: str = "light", width: int = 1280) -> Page:
        """Open a browser of its own; whatever goes wrong in it fails the test."""
        context = self._browser.new_context(
            base_url=f"http://127.0.0.1:{self.port}",
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": 900},
            timezone_id="Europe/Berlin",
            locale="en-GB",
        )
        self._stack.callback(context.close)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        return page

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.said.append(message.text)

    def signed_in(self, token: str = ALICE, scheme: str = "light", width: int = 1280) -> Page:
        """Open a browser and sign in, by keyboard."""
        page = self.open(scheme, width)
        page.goto("/")
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        return page


@pytest.fixture
def console(chromium: Browser, api_env: str, ready: Connection, tmp_path: Path) -> Iterator[Console]:
    with ExitStack() as stack:
        yield Console(chromium, stack, tmp_path)


@pytest.fixture
def work() -> Iterator[Callable[[], None]]:
    """Begin to work, as the superuser of the test's database may."""
    with ExitStack() as stack:
        yield lambda: (stack.enter_context(process("work", "--forever")), None)[1]


def fill(ready: Connection, rows: int) -> None:
    """Store secrets, a few of them beforehand; throttle the worker, so that somebody can look."""
    ready.execute("select rekey.set_secret('a', 'canary-value')")
    ready.execute(
        "select count(rekey.set_secret('row ' || n, 'canary-value')) from generate_series(2, %s) n", [rows]
    )


def test_a_rotation_goes_by(console: Console, ready: Connection, work: Callable[[], None]) -> None:
    """50,000 rows, without reloading: begun, paused, resumed, seen by another browser, rolled back."""
    fill(ready, 50_000)
    ready.execute("select rekey.set_setting('max_rows_per_second', '4000')")
    page, other = console.signed_in(), console.signed_in(ROSA)
    loads: list[str] = []
    other.on("framenavigated", lambda frame: loads.append(frame.url))
    work()
    page.get_by_role("link", name="Rotate now default").click()
    page.get_by_label("Reason").fill("a colleague left")
    page.get_by_role("button", name="Rotate now").click()
    expect(page.get_by_text("Version 2 of keyring default is active")).to_be_visible()
    expect(other.get_by_role("link", name="Rotation 1")).to_be_visible()
    assert loads == []
    other.goto("/rotations/1")
    loads.clear()
    for one in (page, other):
        expect(one.locator("#live .phases .now")).to_have_text("re-encrypting")
        expect(one.locator(".figures dd").nth(0)).to_contain_text("of 50,000")
    expect(other.get_by_role("button", name="Pause")).to_have_count(0)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Paused: nothing more")).to_be_visible()
    expect(other.locator("#state .state")).to_have_text("paused")
    before = page.locator(".figures dd").nth(0).inner_text()
    assert before == other.locator(".figures dd").nth(0).inner_text()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(other.locator("#state .state")).to_have_text("running")
    ready.execute("select rekey.set_setting('max_rows_per_second', null)")
    for one in (page, other):
        expect(one.locator("#state .state")).to_have_text("completed", timeout=60_000)
        expect(one.locator("#live .phases .now")).to_have_text("completed")
        expect(one.locator(".figures dd").nth(0)).to_have_text("50,000 of 50,000")
        expect(one.locator("#live svg.chart")).to_have_attribute(
            "aria-label", "50,000 of 50,000 rows are on the new version, 0 on older ones."
        )
    assert loads == []
    page.get_by_text("Roll back", exact=True).click()
    page.get_by_label("Reason").fill("a client cannot read it")
    page.get_by_role("button", name="Roll back now").click()
    expect(page.get_by_text("Version 1 is active again")).to_be_visible()
    expect(page.locator("#state .state")).to_have_text("completed", timeout=60_000)
    expect(other.locator("#state .state")).to_have_text("rolled back")
    assert "canary-value" not in page.content()
    assert console.said == []


def test_a_damaged_row_is_resolved(console: Console, ready: Connection) -> None:
    fill(ready, 2)
    ready.execute(DAMAGE)
    ready.execute("select rekey.rotate_keys()")
    page = console.signed_in()
    page.goto("/rotations/1")
    expect(page.locator("#live .phases .now")).to_have_text("in line")
    ready.execute("call rekey.run_rotations()")
    expect(page.locator("#state .state")).to_have_text("completed with failures")
    expect(page.locator("#quarantine")).to_contain_text("rekey.secrets")
    ready.execute(DAMAGE)  # the other way round
    page.get_by_role("button", name="Retry row").click()
    expect(page.get_by_text("The row is tried again")).to_be_visible()
    ready.execute("call rekey.run_rotations()")
    expect(page.locator("#state .state")).to_have_text("completed")
    expect(page.locator("#quarantine")).to_contain_text("retry, alice as rekey_admin")
    assert "canary-value" not in page.content()
    assert console.said == []


def test_who_holds_it_up_is_named(
    console: Console, ready: Connection, session: Callable[[], Connection]
) -> None:
    fill(ready, 2)
    page = console.signed_in()
    writer = session()
    with writer.transaction():
        pid = value(writer, "select pg_backend_pid()")
        writer.execute("select rekey.set_secret('b', 'canary-value')")
        ready.execute("select rekey.rotate_keys()")
        page.goto("/rotations/1")
        for _ in range(5):
            ready.execute("select rekey.rotation_step()")
        expect(page.locator("#live .note.waiting")).to_contain_text(f"pid {pid}, postgres")
        expect(page.locator("#live .phases .now")).to_have_text("waiting for others")
    ready.execute("call rekey.run_rotations()")
    expect(page.locator("#live .note.waiting")).to_have_count(0)
    expect(page.locator("#state .state")).to_have_text("completed")


def test_the_server_is_restarted(console: Console, ready: Connection) -> None:
    """The page says so; after signing in again it is the same one, and goes on."""
    ready.execute("select rekey.rotate_keys()")
    page = console.signed_in()
    page.goto("/rotations/1")
    expect(page.locator("#live .phases .now")).to_have_text("in line")
    console.stop()
    expect(page.locator("#trouble")).to_contain_text("The server does not answer")
    console.start()
    expect(page.locator("#trouble")).to_contain_text("Your session has ended, or the server was restarted")
    page.get_by_role("link", name="Sign in again").click()
    page.get_by_label("Token").fill(ALICE)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Rotation 1 of default")).to_be_visible()
    ready.execute("call rekey.run_rotations()")
    expect(page.locator("#state .state")).to_have_text("completed")


def test_the_database_is_gone_for_a_while(console: Console, ready: Connection, db: str) -> None:
    page = console.signed_in()
    name = value(ready, "select current_database()")
    with connect(db, dbname="postgres") as admin:
        admin.execute(f'alter database "{name}" allow_connections false'.encode())
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = %s and usename ~ '^rekey_api'",
            [name],
        )
        expect(page.locator("#trouble")).to_contain_text("the database is not available")
        admin.execute(f'alter database "{name}" allow_connections true'.encode())
    expect(page.locator("#trouble")).to_be_hidden(timeout=30_000)


def test_tokens_sessions_and_forms(console: Console, ready: Connection) -> None:
    page = console.open()
    page.goto("/")
    page.get_by_label("Token").fill("canary-stranger")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("this token is not known")
    page.get_by_label("Token").fill(ALICE)
    page.get_by_role("button", name="Sign in").click()
    # Two tabs of one session: each has forms that are good.
    tab = page.context.new_page()
    tab.goto("/rotate?keyring=default")
    page.goto("/rotate?keyring=default")
    tab.get_by_role("button", name="Rotate now").click()
    expect(tab.get_by_role("heading", name="Rotation 1")).to_be_visible()
    page.get_by_role("button", name="Rotate now").click()
    expect(page.get_by_role("alert")).to_contain_text("is under way in rotation 1")
    # A form of somebody else's.
    tab.evaluate("document.querySelector('form[action$=pause] [name=csrf]').value = 'canary'")
    tab.get_by_role("button", name="Pause").click()
    expect(tab.get_by_role("alert")).to_contain_text("this form is not of this session")
    assert value(ready, "select state from rekey.rotations") == "queued"
    # A revoked token: the page says so by itself, and a form leads to signing in.
    page.goto("/rotations/1")
    console.path.write_text(f"bob:{digest('other')}\n")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("alert")).to_contain_text("Your token is not known any more")
    assert value(ready, "select state from rekey.rotations") == "queued"


def test_keyboard_alone(console: Console, ready: Connection) -> None:
    page = console.signed_in()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").startswith("Rotate now"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_label("Reason")).to_be_focused()
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Rotation 1")).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "pause":
            break
    page.keyboard.press("Space")
    expect(page.locator("#state .state")).to_have_text("paused")


def test_local_time_beside_utc(console: Console, ready: Connection) -> None:
    page = console.signed_in()
    page.goto("/audit")
    shown = page.locator("tbody time").first
    last = "(select at from rekey.audit_log order by id desc limit 1)"
    utc = value(ready, f"select to_char({last} at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS')")
    local = value(ready, f"select to_char({last} at time zone 'Europe/Berlin', 'HH24:MI:SS')")
    expect(shown).to_contain_text(f"{utc} UTC")
    expect(shown).to_contain_text(str(local))


def first_paint(page: Page) -> float:
    """Return how many milliseconds after the request there was something to see."""
    entries = "performance.getEntriesByName('first-contentful-paint')"
    # (Waiting by wait_for_function, a page of ours does not let Playwright evaluate anything.)
    eventually(lambda: page.evaluate(f"{entries}.length"))
    return float(page.evaluate(f"{entries}[0].startTime"))


def test_ten_thousand_keyrings(console: Console, ready: Connection) -> None:
    ready.execute(
        "select count(rekey.create_keyring('keyring ' || n, rotate_every => '90 days'))"
        " from generate_series(1, 10000) n"
    )
    page = console.signed_in()
    expect(page.get_by_text("Page 1 of 201")).to_be_visible()
    print("first paint, milliseconds:", first_paint(page))
    page.get_by_role("searchbox").fill("keyring 999")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#keyrings tbody tr")).to_have_count(11)
    page.goto("/")
    print("again, milliseconds:", first_paint(page))


@pytest.fixture
def estate(ready: Connection) -> None:
    """Something on every page: rotations that ended in each way, a blocked column, forgotten ones."""
    fill(ready, 500)
    ready.execute("select rekey.set_schedule('default', '90 days')")
    ready.execute(
        "select rekey.create_keyring(k, rotate_every => '30 days') from unnest('{billing,mail}'::text[]) k"
    )
    ready.execute("select rekey.rotate_keys('default', 'quarterly')")
    ready.execute("call rekey.run_rotations()")
    ready.execute(DAMAGE)
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    ready.execute("create table public.card (id int primary key, number text, api_key text)")
    ready.execute("select rekey.protect_column('public.card', 'number')")
    ready.execute("alter table public.card force row level security")
    ready.execute("select rekey.create_keyring('archive')")
    ready.execute("select rekey.rotate_keys('archive')")
    ready.execute("select rekey.rotate_keys('archive', supersede => true)")
    ready.execute("select rekey.add_endpoint('on-call', 'https://hooks.example.com/', slack => true)")
    ready.execute("select rekey.add_endpoint('mail', 'notify:x', events => '{kek.missing,worker.silent}')")
    ready.execute("select rekey.mark_key_compromised('billing', 1, 'a laptop was stolen')")
    ready.execute("select rekey._tick_duty('notifications', now())")
    ready.execute("select rekey._note_delivery(min(id)) from rekey.message_status")
    ready.execute("select rekey._note_delivery(max(id), 'HTTP status 404') from rekey.message_status")
    ready.execute("select rekey.test_endpoint('on-call')")


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_page_is_accessible(
    scheme: str, width: int, console: Console, ready: Connection, estate: None, axe: str, tmp_path: Path
) -> None:
    """axe-core finds nothing, nothing is wider than the window, and the policy stops nothing."""
    folder = Path(os.environ.get("PG_REKEY_SCREENSHOTS", tmp_path))
    signing = console.open(scheme, width)
    signing.goto("/sign-in")
    page = console.signed_in(scheme=scheme, width=width)
    failed = value(ready, "select id from rekey.rotation_status where state = 'completed_with_failures'")
    pages = {"sign-in": "", **PAGES, "failures": f"/rotations/{failed}"}
    found = []
    for name, path in pages.items():
        one = page if path else signing
        if path:
            page.goto(path)
            page.wait_for_timeout(300)
        one.evaluate(
            "for (const each of [...document.querySelectorAll('details')].slice(0, 2)) each.open = true"
        )
        one.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
        one.evaluate(axe)
        result = one.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        for violation in result["violations"]:
            nodes = [node["html"][:150] for node in violation["nodes"]][:3]
            found.append((name, violation["id"], violation["help"], nodes))
        wide = one.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            found.append((name, "wider than the window", f"{wide} px", []))
    assert found == []
    assert [text for text in console.said if "404" not in text] == []
