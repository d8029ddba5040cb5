"""What `protect` says of types, constraints, generated columns and names."""

from typing import LiteralString

import pytest

from cli_fixtures import Cli
from column_fixtures import protect
from driving import refused
from helpers import Connection, value

pytest_plugins = ["cli_fixtures", "column_fixtures"]

FINDINGS: LiteralString = "select finding from rekey.protection_findings() order by 1"


@pytest.mark.parametrize(("length", "room"), [(20, 128), (5000, 6760), (5007, 6760), (5008, 6784)])
def test_a_length_is_no_room_for_envelopes(app: Connection, length: int, room: int) -> None:
    app.execute(f"create table t (id int primary key, v varchar({length}))".encode())
    with refused("22023") as caught:
        protect(app, "t")
    assert f"varchar({length}) limits its length" in str(caught.value)
    hint = caught.value.diag.message_hint or ""
    assert hint == (
        f"ALTER TABLE app.t ALTER COLUMN v TYPE text: an envelope of nothing has 104 characters, one of"
        f" {length} has {room}."
    )
    app.execute(hint.split(":", maxsplit=1)[0].encode())
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t values (1, repeat('x', %s))", [length])
    assert value(app, "select length(v) from t") == room


def test_generated_columns(ready: Connection, app: Connection) -> None:
    app.execute("""
        create table t (id int primary key, v text, u text generated always as (right(v, 4)) stored);
        create function tr() returns trigger language plpgsql as 'begin return null; end';
        create trigger of_u after update of u on t for each row execute function tr();
        create trigger of_id after update of id on t for each row execute function tr()""")
    with refused("22023", match=r"column app\.t\.u is generated"):
        protect(app, "t", "u")
    protect(app, "t")
    # The server fires it for what a generated column is computed from.
    assert [row[0] for row in ready.execute(FINDINGS).fetchall()] == [
        "generated column u is computed from envelopes",
        "trigger of_u fires for every row of a rotation",
    ]
    advice: LiteralString = (
        "select split_part(advice, ' keeps', 1) from rekey.protection_findings() where kind = 'generated'"
    )
    app.execute(value(ready, advice).encode())
    assert value(ready, "select count(*) from rekey.protection_findings()") == 0


def test_what_triggers_derive_is_said_to_become_wrong(ready: Connection, app: Connection) -> None:
    app.execute("""
        create table t (id int primary key, v text, hash text);
        create function derive() returns trigger language plpgsql as
          'begin new.hash := md5(new.v); return new; end';
        create trigger derive before update on t for each row execute function derive();
        create trigger batch after update on t for each statement execute function derive()""")
    protect(app, "t")
    advice: LiteralString = "select advice from rekey.protection_findings() where finding ~ %s"
    assert "as a hash or the last characters, becomes that of the envelope" in value(ready, advice, "derive")
    assert "derives" not in value(ready, advice, "batch")
    assert "fire_triggers => false" in value(ready, advice, "derive")


def test_a_check_that_is_not_enforced(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text constraint enforced check (v <> ''))")
    if ready.info.server_version >= 180000:
        app.execute("alter table t add constraint loose check (length(v) < 9) not enforced")
    protect(app, "t")
    found = [row[0] for row in ready.execute(FINDINGS).fetchall()]
    assert found[0] == "CHECK enforced is applied to envelopes"
    loose = ["CHECK loose, which is not enforced, is not about envelopes"]
    assert found[1:] == (loose if ready.info.server_version >= 180000 else [])


@pytest.mark.parametrize("given", ["Credential", "app.Credential", "CREDENTIAL", "App.credential"])
def test_a_name_that_needs_quotes(app: Connection, cli_ready: Cli, given: str) -> None:
    app.execute('create table "Credential" (id int primary key, "encryptedKey" text)')
    cli_ready("columns", "protect", given, "encryptedKey", code=1)
    assert """There is app."Credential": give its double quotes too""" in cli_ready.err
    cli_ready("columns", "protect", 'app."Credential"', "encryptedkey", code=1)
    assert 'There is "encryptedKey". A column is named as it is, without quotes.' in cli_ready.err
    cli_ready("columns", "protect", 'app."Credential"', "encryptdKey", code=1)
    assert "Did you mean 'encryptedKey'? A column is named as it is, with its capitals" in cli_ready.err
    cli_ready("columns", "protect", 'app."Credential"', "encryptedKey")
    cli_ready("columns", "protect", "app.nothing", "v", code=1)
    assert "double quotes" not in cli_ready.err


@pytest.mark.parametrize("given", ["My App.user tokens", '"My App.user tokens"', "my app.user tokens"])
def test_names_with_spaces(ready: Connection, app: Connection, cli_ready: Cli, given: str) -> None:
    ready.execute('create schema "My App"; create table "My App"."user tokens" (id int primary key, v text)')
    cli_ready("columns", "protect", given, "v", code=1)
    assert """There is "My App"."user tokens": give its double quotes too""" in cli_ready.err


FULL: LiteralString = "alter table t replica identity full"
# What makes PostgreSQL refuse updates, and what does not.
PUBLISHED: dict[str, tuple[LiteralString, LiteralString, str | None]] = {
    "column list, full": (FULL, "for table app.t (id, v, n)", "42P10"),
    "no column list, full": (FULL, "for table app.t", None),
    "column list": ("", "for table app.t (id)", None),
    "column list without the key": ("", "for table app.t (v)", "42P10"),
    "filter": ("", "for table app.t where (id > 0)", None),
    "filter by another column": ("", "for table app.t where (n > 0)", "42P10"),
    "filter and list": ("", "for table app.t (id, n) where (n > 0)", "42P10"),
    "filter, full": (FULL, "for table app.t where (n > 0)", None),
    "nothing": ("alter table t replica identity nothing", "for all tables", "55000"),
    "no key": ("alter table t drop constraint t_pkey", "for tables in schema app", "55000"),
    "no updates": (FULL, "for table app.t (id) with (publish = 'insert')", None),
    "an index": (
        "create unique index x on t (n); alter table t alter n set not null, replica identity using index x",
        "for table app.t (id, v)",
        "42P10",
    ),
    "unlogged": ("alter table t replica identity nothing, set unlogged", "for all tables", None),
}


@pytest.mark.parametrize("case", sorted(PUBLISHED))
def test_a_publication_that_lets_no_row_be_updated(ready: Connection, app: Connection, case: str) -> None:
    """As PostgreSQL itself says it; before a rotation runs into it."""
    prepared, published, code = PUBLISHED[case]
    app.execute("create table t (id int primary key, v text, n int default 1)")
    app.execute("insert into t values (1, null)")
    if prepared:
        app.execute(prepared)
    ready.execute(f"create publication p {published}".encode())
    if code:
        with refused(code):
            app.execute("update t set v = null")
    else:
        app.execute("update t set v = null")
    protect(app, "t", context_columns="{id}")
    refusing = [row[0] for row in ready.execute(FINDINGS).fetchall() if "makes every UPDATE" in row[0]]
    assert len(refusing) == (1 if code else 0)
    if code:
        assert "publication p makes every UPDATE of app.t fail" in refusing[0]
