"""Hints: each road says in its own words what is to be done."""

import re
from collections.abc import Iterator

import click
import psycopg
import pytest
from psycopg import sql

from api_fixtures import Api
from cli_fixtures import Cli
from helpers import Connection, connect
from pg_rekey import hints, release
from pg_rekey.cli import main
from pg_rekey.hints import Road

pytest_plugins = ["cli_fixtures", "api_fixtures"]

TABLES = hints.ACTIONS | hints.STATES | {"lost": hints.LOST, "missing": hints.MISSING}
# The condition of a trigger is SQL on each road.
SQL_WORDS = re.compile(r"=>|\brekey\.(?!is_sweeping)\w")


def raises() -> Iterator[tuple[str, str]]:
    """Yield where something is raised with a hint, and the statement."""
    statement = re.compile(r"(?i)\braise (?:exception|warning|notice) (?:\'(?:[^\']|\'\')*\'|[^\';])*;")
    for path in sorted((release.ROOT / "sql" / "code").glob("*.sql")):
        text = path.read_text()
        for found in statement.finditer(text):
            if "hint =" in found[0]:
                yield f"{path.name}:{text.count(chr(10), 0, found.start()) + 1}", found[0]


def options(group: click.Group) -> set[str]:
    found: set[str] = set()
    for command in group.commands.values():
        found |= {name for parameter in command.params for name in parameter.opts}
        found |= options(command) if isinstance(command, click.Group) else set()
    return found


def advice(statement: str) -> str:
    """Return what a hint says: its literals."""
    return " ".join(re.findall(r"'((?:[^']|'')*)'(?!::)", statement.split("hint =", 1)[1]))


def test_every_hint_in_sql_has_an_action() -> None:
    everything = list(raises())
    assert len(everything) > 50
    nameless = [
        place
        for place, statement in everything
        if SQL_WORDS.search(advice(statement))
        and "constraint =" not in statement
        # The condition of a trigger is SQL on each road, and so is a table to be restored.
        and not re.search(r"WHEN \(|Restore rekey\.", statement)
    ]
    assert nameless == []


def test_every_action_has_words() -> None:
    named = {
        code
        for _, statement in raises()
        for said in re.findall(r"constraint = (.*)", statement)
        for code in re.findall(r"'(\w+)'", said.rsplit(" then ", 1)[-1])
    }
    assert named | advised() == set(hints.ACTIONS)


def advised() -> set[str]:
    """Return the actions that findings name."""
    files = [release.ROOT / "sql" / "code" / name for name in ("54_find.sql", "55_findings.sql")]
    text = "".join(path.read_text() for path in files)
    return {code for code in hints.ACTIONS if f"'{code}'" in text}


def test_findings_advise_in_the_words_of_the_road(
    cli_ready: Cli, ready: Connection, api: Api, api_role: str
) -> None:
    ready.execute(
        """
        create table "Odd" (id integer primary key, api_key text);
        insert into "Odd" values (1, 'sk_live_51H8x2');
        create table plain (id integer primary key, api_key text);
        create table copies as select 1 as id, rekey.encrypt_text('x') as note;
        create function f() returns trigger language plpgsql as 'begin return new; end';
        create trigger early before update on plain for each row execute function f();
        select rekey.protect_column('plain', 'api_key');
        insert into plain values (1, 'sk_live_51H8x2');
        grant select on "Odd", plain, copies to rekey_admin;
        """
    )
    found = {
        row["relation"].removeprefix("public."): row for row in cli_ready.json("columns", "find", code=5)
    }
    assert "`pg-rekey columns protect 'public.\"Odd\"' api_key`, then " in found['"Odd"']["advice"]
    assert (
        found["plain"]["advice"]
        == "`pg-rekey columns adopt public.plain api_key --from plaintext` encrypts them."
    )
    assert found["copies"]["advice"].startswith("`pg-rekey columns protect public.copies note`: without it")
    over_http = {
        row["relation"].removeprefix("public."): row["advice"]
        for row in api.get("/api/columns/find")["columns"]
    }
    for relation, row in found.items():
        assert over_http[relation] == f"On the command line of the server: {row['advice']}"
    [doctor] = [row for row in cli_ready.json("doctor", code=5) if "trigger early" in row["finding"]]
    assert "`pg-rekey columns protect public.plain api_key --no-fire-triggers`" in doctor["advice"]
    assert "columns protect public.plain api_key --no-fire-triggers" in cli_ready("columns", "list")
    [column] = api.get("/api/columns")["columns"]
    assert (
        "on the command line of the server, `pg-rekey columns protect public.plain" in column["findings"][0]
    )
    ready.execute(sql.SQL("alter table plain owner to {}").format(sql.Identifier(api_role)))
    cli_ready("columns", "protect", "plain", "api_key")
    assert "--no-fire-triggers" in cli_ready.err
    said = cli_ready.out + cli_ready.err + str(found) + str(over_http) + str(doctor) + str(column)
    assert not SQL_WORDS.search(said)


@pytest.mark.parametrize("relation", ["rekey.find_unprotected()", "rekey.protection_findings()"])
def test_in_sql_findings_advise_in_sql(relation: str, ready: Connection) -> None:
    ready.execute(
        """
        create table t (id integer primary key, api_key text);
        insert into t values (1, 'sk_live_51H8x2');
        create table u (id integer primary key, note text);
        create rule r as on update to u do also select 1;
        select rekey.protect_column('u', 'note');
        """
    )
    rows = ready.execute(f"select advice, action from {relation}").fetchall()
    assert len(rows) == 1
    assert SQL_WORDS.search(rows[0][0])
    assert rows[0][1] in hints.ACTIONS


@pytest.mark.parametrize("code", sorted(TABLES))
@pytest.mark.parametrize("road", Road)
def test_words_are_those_of_the_road(code: str, road: Road) -> None:
    words = TABLES[code].on(road)
    assert words[0].isupper() or words[0] == "`" or words.startswith("pg_rekey")
    assert not SQL_WORDS.search(words)
    for called in re.findall(r"pg-rekey ((?:[a-z-]+ ?)+)", words):
        command: click.Command = main
        for name in called.split():
            if isinstance(command, click.Group):
                command = command.commands[name]
    assert set(re.findall(r"--[a-z-]+", words)) <= options(main)


def test_on_the_command_line(cli_ready: Cli, ready: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    cli_ready("rotate", "--keyring", "defualt", code=6)
    assert "`pg-rekey keyrings create NAME`" in cli_ready.err
    cli_ready("rotate")
    cli_ready("rotate", code=7)
    assert "take its rows along: --supersede." in cli_ready.err
    ready.execute("select rekey.create_keyring('other')")
    cli_ready("rotate", "--all", code=4)
    assert "WARNING: no new version" in cli_ready.err
    assert "--supersede" in cli_ready.err
    assert "=>" not in cli_ready.err
    monkeypatch.delenv("PG_REKEY_KEK")
    cli_ready("secrets", "set", "a", stdin="value", code=3)
    assert "Set PG_REKEY_KEK, PG_REKEY_KEK_FILE or PG_REKEY_KEK_COMMAND." in cli_ready.err
    assert "rekey.unlock" not in cli_ready.err


def test_over_http(api: Api) -> None:
    api.rotate(json={"keyring": "default"})
    hint = api.rotate(409, json={"keyring": "default"})["hint"]
    assert '"supersede": true' in hint
    assert "=>" not in hint
    assert "--supersede" not in hint
    hint = api.rotate(404, json={"keyring": "nope"})["hint"]
    assert hint.startswith("GET /api/keyrings ")
    hint = api.rotate(404, json={"keyring": "defualt"})["hint"]
    assert hint.startswith("Did you mean 'default'? GET /api/keyrings ")
    message = api.rotate(422, json={"keyrng": "default"})["message"]
    assert message == "body: there is no field 'keyrng'. Did you mean 'keyring'?"
    message = api.rotate(422, json={"zzz": "default"})["message"]
    assert message == "body: there is no field 'zzz'. There are: keyring, reason, supersede."


@pytest.mark.parametrize("path", ["keys", "rotations", "audit"])
def test_over_http_a_filter_that_names_no_keyring_is_an_error(path: str, api: Api, ready: Connection) -> None:
    found = api.get(f"/api/{path}?keyring=nope", 404)
    assert (found["code"], found["message"]) == ("RK007", "no such keyring: 'nope'")
    assert found["hint"].startswith("GET /api/keyrings ")
    assert api.get(f"/api/{path}?keyring=defualt", 404)["hint"].startswith("Did you mean 'default'? ")
    assert api.get(f"/api/{path}?keyrng=default", 422)["hint"] == "Did you mean 'keyring'? See /docs."
    assert api.get(f"/api/{path}?keyring=default&keyring=default", 422)["hint"] == "See /docs."
    # A keyring that is there, and of which there is nothing, is no error.
    ready.execute("delete from rekey.rotations")
    api.get(f"/api/{path}?keyring=default")


def test_over_http_the_route_that_was_meant(api: Api) -> None:
    assert api.get("/api/rotation", 404)["hint"].startswith("Did you mean '/api/rotations'")
    assert api.get("/elsewhere", 404)["hint"] == "See /docs."


def test_in_sql_the_hint_is_the_database_s_own(ready: Connection, db: str) -> None:
    ready.execute("select rekey.rotate_keys('default')")
    with pytest.raises(psycopg.Error) as raised:
        ready.execute("select rekey.rotate_keys('default')")
    assert "supersede => true" in (raised.value.diag.message_hint or "")
    with connect(db) as locked, pytest.raises(psycopg.Error) as raised:
        locked.execute("select rekey.set_secret('a', 'b')")
    assert "rekey.unlock()" in (raised.value.diag.message_hint or "")
    assert raised.value.diag.constraint_name == "unlock"


def test_a_constraint_that_is_called_as_an_action(conn: Connection) -> None:
    conn.execute("create temporary table t (n integer constraint supersede check (n > 0))")
    with pytest.raises(psycopg.Error) as raised:
        conn.execute("insert into t values (0)")
    assert hints.hint(raised.value.diag, Road.COMMAND) is None
