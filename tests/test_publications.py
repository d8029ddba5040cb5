"""Publications that make an UPDATE fail: said before, for just those tables on which one does."""

from contextlib import nullcontext
from typing import LiteralString

import psycopg
import pytest

from cli_fixtures import Cli
from column_fixtures import protect
from helpers import Connection

pytest_plugins = ["cli_fixtures", "column_fixtures"]

PLAIN: LiteralString = "create table app.t (id int primary key, name text not null, v text)"
PARTITIONED: LiteralString = """
    create table app.t (id int primary key, name text, v text) partition by range (id);
    create table app.t1 partition of app.t for values from (0) to (100)"""
FULL: LiteralString = "; alter table app.t replica identity full"
FULL_PART: LiteralString = "; alter table app.t1 replica identity full"
BY_NAME: LiteralString = (
    "; create unique index by_name on app.t (name); alter table app.t replica identity using index by_name"
)


@pytest.mark.parametrize(
    ("table", "publication", "fails"),
    [
        (PLAIN, "for table app.t", False),
        (PLAIN, "for table app.t (id, name)", False),
        (PLAIN, "for table app.t (name)", True),
        (PLAIN, "for table app.t (name) with (publish = 'insert')", False),
        (PLAIN, "for table app.t where (id > 1)", False),
        (PLAIN, "for table app.t where (name = 'x')", True),
        (PLAIN, "for all tables", False),
        (PLAIN + FULL, "for table app.t", False),
        (PLAIN + FULL, "for table app.t (id, name)", True),
        (PLAIN + FULL, "for table app.t (id, name, v)", True),
        (PLAIN + FULL, "for table app.t where (name = 'x')", False),
        (PLAIN + FULL, "for tables in schema app", False),
        (PLAIN + BY_NAME, "for table app.t (name)", False),
        (PLAIN + BY_NAME, "for table app.t (id)", True),
        (PLAIN + "; alter table app.t replica identity nothing", "for all tables", True),
        (PLAIN + "; alter table app.t replica identity nothing", "for tables in schema app", True),
        (PARTITIONED, "for table app.t", False),
        (PARTITIONED, "for table app.t (name) with (publish_via_partition_root)", True),
        (PARTITIONED, "for table app.t1 (name)", True),
        (PARTITIONED + FULL_PART, "for table app.t", False),
        (PARTITIONED + FULL_PART, "for table app.t (id) with (publish_via_partition_root)", True),
        (PARTITIONED, "for table app.t where (name = 'x') with (publish_via_partition_root)", True),
        (PARTITIONED + "; alter table app.t1 replica identity nothing", "for table app.t", True),
        (PARTITIONED + "; alter table app.t1 replica identity nothing", "for tables in schema app", True),
    ],
)
def test_what_makes_an_update_fail_is_said(
    ready: Connection, app: Connection, table: LiteralString, publication: LiteralString, fails: bool
) -> None:
    app.execute(table)
    app.execute("insert into app.t values (1, 'x', 'plain')")
    protect(app, "app.t")
    ready.execute("create publication watch " + publication)
    with pytest.raises(psycopg.Error) if fails else nullcontext() as caught:
        app.execute("update app.t set v = v")
    assert caught is None or caught.value.sqlstate in ("42P10", "55000")
    said = ready.execute("select finding from rekey.protection_findings() where finding ~ 'every UPDATE'")
    assert bool(said.fetchall()) is fails


def test_protect_and_doctor_say_it_before_a_sweep(ready: Connection, app: Connection, cli_ready: Cli) -> None:
    app.execute(PLAIN + FULL)
    ready.execute("create publication supabase_realtime for table app.t (id, name)")
    cli_ready("columns", "protect", "app.t", "v")
    said = (
        "publication supabase_realtime makes every UPDATE of app.t fail, and so the sweep: "
        "its column list does not cover the replica identity"
    )
    assert said in cli_ready.err
    assert "publication supabase_realtime sends every row of a rotation, without the column" in cli_ready.err
    assert said in str(cli_ready.json("doctor", code=5))
    ready.execute("alter table app.t replica identity default")
    assert said not in str(cli_ready.json("doctor", code=5))
