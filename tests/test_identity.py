"""A table is its name and its identity. Where they part, it blocks, and only whom it may concern."""

from collections.abc import Iterator

import psycopg
import pytest

from column_fixtures import protect
from helpers import Connection, connect, unlock, value

pytest_plugins = ["column_fixtures"]

REBUILD = """
    begin;
    create table {table}_new (like {table} including all);
    insert into {table}_new select * from {table};
    alter table {table} rename to {name}_old;
    alter table {table}_new rename to {name};
    commit"""


def rebuild(app: Connection, name: str) -> None:
    """Do the usual: a new table, a copy, an exchange of names."""
    app.execute(REBUILD.format(table=f"app.{name}", name=name).encode())


def fill(app: Connection, name: str, rows: int = 5, keyring: str = "default") -> str:
    app.execute(f"create table app.{name} (id int primary key, v text)".encode())
    label = protect(app, f"app.{name}", encrypt_on_write=True, keyring=keyring)
    app.execute(f"insert into app.{name} select g, 'sk_live_'||g from generate_series(1, {rows}) g".encode())
    return label


def problem(connection: Connection, label: str) -> str | None:
    found: str | None = value(connection, "select problem from rekey.column_status where label = %s", label)
    return found


def rotate(ready: Connection, keyring: str = "default") -> str:
    """Rotate, step as long as something is done, and return the state."""
    ready.execute("select rekey.rotate_keys(%s)", [keyring])
    return work(ready, keyring)


def work(ready: Connection, keyring: str = "default") -> str:
    for _ in range(60):
        event = value(ready, "select event from rekey.rotation_step()")
        if event in ("idle", "blocked", "waiting", "locked"):
            break
    state: str = value(
        ready,
        "select state from rekey.rotation_status where keyring = %s order by id desc limit 1",
        keyring,
    )
    return state


def plain(app: Connection, name: str) -> list[str]:
    query = f"select rekey.decrypt_text(v, array['app.{name}.v', id::text]) from app.{name} order by id"
    return [text for (text,) in app.execute(query.encode())]


def refused(connection: Connection, query: str, state: str) -> str:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(query.encode())
    assert caught.value.sqlstate == state, caught.value
    return str(caught.value)


@pytest.fixture
def other(db: str, ready: Connection, kek: bytes) -> Iterator[Connection]:
    """A session of somebody else who owns tables and administers keys."""
    name = f"other_{value(ready, 'select pg_backend_pid()')}"
    ready.execute(f"create role {name} login in role rekey_admin, rekey_app".encode())
    ready.execute(f"create schema elsewhere authorization {name}".encode())
    with connect(db, user=name) as connection:
        unlock(connection, kek)
        yield connection
    ready.execute(f"drop owned by {name} cascade".encode())
    ready.execute(f"drop role {name}".encode())


def test_a_table_that_its_owner_made_anew_goes_on_being_read(
    ready: Connection, app: Connection, other: Connection
) -> None:
    label = fill(app, "accounts")
    app.execute("create table app.anew (like app.accounts including all)")
    app.execute("insert into app.anew select * from app.accounts; drop table app.accounts cascade")
    envelope = value(app, "select v from app.anew where id = 1")
    opens = "select rekey.decrypt_text(%s, array['app.accounts.v', '1'])"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute(opens, [envelope])
    app.execute("alter table app.anew rename to accounts")
    assert plain(app, "accounts")[0] == "sk_live_1"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        other.execute(opens, [envelope])
    assert value(app, "select rekey.rebind_column('app.accounts', 'v')") == label
    # Another's table of that name is not the one.
    app.execute("drop table app.accounts cascade; create table app.accounts (id int primary key, v text)")
    ready.execute(f"alter table app.accounts owner to {other.info.user}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        other.execute(opens, [envelope])


@pytest.mark.parametrize("emptied", [False, True])
def test_a_rebuilt_table_blocks_until_it_is_rebound(
    ready: Connection, app: Connection, emptied: bool
) -> None:
    label = fill(app, "accounts")
    rebuild(app, "accounts")
    if emptied:
        app.execute("delete from app.accounts_old")
    assert "rebind_column" in (problem(ready, label) or "")
    assert rotate(ready) == "verifying"
    refused(ready, "select rekey.schedule_key_destruction('default', 1, '0 s')", "RK005")
    if not emptied:
        refused(app, "select rekey.rebind_column('app.accounts', 'v')", "RK005")
        app.execute("delete from app.accounts_old")
    assert value(app, "select rekey.rebind_column('app.accounts', 'v')") == label
    ready.execute("update rekey.rotations set next_attempt_at = null")
    assert work(ready) == "completed"
    assert value(ready, "select rows from rekey.verify_ciphertexts() where relation = 'app.accounts'") == 5
    app.execute("insert into app.accounts values (100, 'sk_live_NEW')")
    assert plain(app, "accounts") == [*(f"sk_live_{n}" for n in range(1, 6)), "sk_live_NEW"]
    assert value(ready, "select count(*) from rekey.audit_log where event = 'column.rebound'") == 1


def test_a_rebuilt_column_blocks_until_it_is_rebound(ready: Connection, app: Connection) -> None:
    label = fill(app, "accounts")
    app.execute(
        "alter table app.accounts rename v to v_old; alter table app.accounts add v text;"
        "alter table app.accounts disable trigger user; update app.accounts set v = v_old;"
        "alter table app.accounts enable trigger user"
    )
    assert "rebind_column" in (problem(ready, label) or "")
    refused(app, "select rekey.rebind_column('app.accounts', 'v', 'app.accounts.v')", "RK005")
    app.execute("alter table app.accounts disable trigger user; update app.accounts set v_old = null")
    assert value(app, "select rekey.rebind_column('app.accounts', 'v', 'app.accounts.v')") == label
    assert rotate(ready) == "completed"
    assert plain(app, "accounts")[0] == "sk_live_1"


def test_values_of_other_rows_are_not_rebound(ready: Connection, app: Connection) -> None:
    fill(app, "accounts")
    app.execute("create table app.fake (id int primary key, v text)")
    app.execute("insert into app.fake select id + 100, v from app.accounts; delete from app.accounts")
    app.execute("alter table app.accounts rename to accounts_old; alter table app.fake rename to accounts")
    refused(app, "select rekey.rebind_column('app.accounts', 'v')", "RK003")


def test_a_stranger_rebinds_nothing(ready: Connection, app: Connection, other: Connection) -> None:
    label = fill(app, "accounts")
    other.execute("create table elsewhere.accounts (id int primary key, v text)")
    refused(other, f"select rekey.rebind_column('elsewhere.accounts', 'v', '{label}')", "42501")
    app.execute("drop table app.accounts cascade")
    refused(other, f"select rekey.rebind_column('elsewhere.accounts', 'v', '{label}')", "42501")
    app.execute("create table app.accounts (id int primary key, v text)")
    ready.execute(f"alter table app.accounts owner to {other.info.user}".encode())
    ready.execute(f"grant usage on schema app to {other.info.user}".encode())
    refused(other, "select rekey.protect_column('app.accounts', 'v')", "42501")


def test_a_partition_that_left_blocks_until_it_is_back_or_gone(ready: Connection, app: Connection) -> None:
    app.execute(
        "create table app.ev (region text, id int, v text, primary key (region, id))"
        " partition by list (region);"
        "create table app.ev_eu partition of app.ev for values in ('eu');"
        "create table app.ev_us partition of app.ev for values in ('us')"
    )
    label = protect(app, "app.ev", encrypt_on_write=True)
    app.execute(
        "insert into app.ev select r, g, 'x' from unnest('{eu,us}'::text[]) r, generate_series(1, 4) g"
    )
    assert rotate(ready) == "completed"
    app.execute("alter table app.ev detach partition app.ev_us")
    assert "app.ev_us" in (problem(ready, label) or "")
    assert rotate(ready) == "verifying"
    refused(ready, "select rekey.schedule_key_destruction('default', 1, '0 s')", "RK005")
    app.execute("alter table app.ev attach partition app.ev_us for values in ('us')")
    ready.execute("update rekey.rotations set next_attempt_at = null")
    assert work(ready) == "completed"
    assert value(ready, "select sum(rows) from rekey.verify_ciphertexts()") == 8
    app.execute("alter table app.ev detach partition app.ev_us")
    refused(app, "select rekey.rebind_column('app.ev', 'v')", "RK005")
    app.execute("truncate app.ev_us")
    assert value(app, "select rekey.rebind_column('app.ev', 'v')") == label
    assert problem(ready, label) is None


def test_one_column_in_two_targets_blocks_both(ready: Connection, app: Connection) -> None:
    app.execute(
        "create table app.whole (id int primary key, v text) partition by range (id);"
        "create table app.part (id int primary key, v text)"
    )
    protect(app, "app.whole")
    protect(app, "app.part")
    app.execute("alter table app.whole attach partition app.part for values from (1) to (9)")
    assert "app.part.v" in (problem(ready, "app.whole.v") or "")
    assert "app.whole.v" in (problem(ready, "app.part.v") or "")


def test_a_blocked_table_stops_only_whom_it_may_concern(ready: Connection, app: Connection) -> None:
    """The owner of a table stops his keyring, and nobody else's: not by headers that he makes up either."""
    ready.execute("select rekey.create_keyring('tenant_a')")
    fill(app, "mine", keyring="tenant_a")
    assert rotate(ready, "tenant_a") == "completed"
    ready.execute("select rekey.set_secret('s', 'x')")
    header = value(ready, "select substr(ciphertext, 1, 11) from rekey.secrets")
    app.execute("alter table app.mine disable trigger user")
    app.execute(
        "insert into app.mine"
        " values (1000, 'rk1:' || replace(encode(%s::bytea || sha256(''), 'base64'), e'\\n', ''))",
        [header],
    )
    assert rotate(ready) in ("completed", "completed_with_failures")
    assert rotate(ready, "tenant_a") == "verifying"
    assert rotate(ready) in ("completed", "completed_with_failures")
    refused(ready, "select rekey.schedule_key_destruction('default', 1, '0 s')", "RK005")


def test_the_first_count_sees_the_keyrings_whose_values_open(ready: Connection, app: Connection) -> None:
    for keyring in ("second", "third"):
        ready.execute("select rekey.create_keyring(%s)", [keyring])
    app.execute("create table app.mine (id int primary key, v text)")
    app.execute(
        "insert into app.mine values (50, rekey.encrypt_text('x', 'second', '{app.mine.v,50}')),"
        " (51, rekey.encrypt_text('x', 'third', '{app.mine.v,another row}'))"
    )
    protect(app, "app.mine")
    assert rotate(ready) == "completed"
    app.execute("alter table app.mine disable trigger user")
    assert rotate(ready, "second") == "verifying"
    assert rotate(ready, "third") == "completed"


def test_a_keyring_that_was_seen_in_a_blocked_table_waits(ready: Connection, app: Connection) -> None:
    ready.execute("select rekey.create_keyring('second')")
    fill(app, "mine")
    app.execute("alter table app.mine disable trigger user")
    app.execute("insert into app.mine values (50, rekey.encrypt_text('x', 'second', '{app.mine.v,50}'))")
    app.execute("alter table app.mine enable always trigger zz_pg_rekey_1")
    app.execute("alter table app.mine enable always trigger zz_pg_rekey_1_insert")
    app.execute("alter table app.mine enable always trigger zz_pg_rekey_1_update")
    assert rotate(ready, "second") == "completed"
    app.execute("alter table app.mine disable trigger zz_pg_rekey_1")
    assert rotate(ready, "second") == "verifying"
    assert (
        value(
            ready, "select blocked_by -> 0 ->> 'target' from rekey.rotation_status order by id desc limit 1"
        )
        == "app.mine.v"
    )


def test_a_table_whose_rows_are_gone_asks_to_be_confirmed(ready: Connection, app: Connection) -> None:
    fill(app, "mine", rows=1200)
    assert rotate(ready) == "completed"
    app.execute("truncate app.mine")
    assert rotate(ready) == "verifying"
    assert "1200 rows" in str(
        value(ready, "select blocked_by from rekey.rotation_status order by id desc limit 1")
    )
    app.execute("select rekey.rebind_column('app.mine', 'v')")
    ready.execute("update rekey.rotations set next_attempt_at = null")
    assert work(ready) == "completed"


def test_a_table_of_citus_is_refused_and_blocked(ready: Connection, app: Connection) -> None:
    """A table of that name stands in for the catalog of Citus, which cannot be had here."""
    label = fill(app, "mine")
    ready.execute("set allow_system_table_mods = on")
    ready.execute(
        "create table pg_catalog.pg_dist_partition (logicalrelid regclass);"
        " grant select on pg_catalog.pg_dist_partition to public"
    )
    try:
        ready.execute("insert into pg_catalog.pg_dist_partition values ('app.mine')")
        assert "Citus" in (problem(ready, label) or "")
        assert rotate(ready) == "verifying"
        app.execute("create table app.next (id int primary key, v text)")
        ready.execute("insert into pg_catalog.pg_dist_partition values ('app.next')")
        assert "Citus" in refused(app, "select rekey.protect_column('app.next', 'v')", "22023")
    finally:
        ready.execute("drop table pg_catalog.pg_dist_partition")


def test_another_access_method_is_refused(ready: Connection, app: Connection) -> None:
    ready.execute("create access method other_heap type table handler heap_tableam_handler")
    app.execute("create table app.mine (id int primary key, v text) using other_heap")
    assert "other_heap" in refused(app, "select rekey.protect_column('app.mine', 'v')", "22023")


def test_a_table_that_moves_to_another_access_method_is_blocked(ready: Connection, app: Connection) -> None:
    ready.execute("create access method other_heap type table handler heap_tableam_handler")
    label = fill(app, "mine")
    app.execute("alter table app.mine set access method other_heap")
    assert "other_heap" in (problem(ready, label) or "")
    assert rotate(ready) == "verifying"


def test_foreign_tables_are_refused_and_blocked(ready: Connection, app: Connection) -> None:
    """By themselves, and as partitions, whose rows are elsewhere too."""
    ready.execute(
        "create foreign data wrapper elsewhere; create server elsewhere foreign data wrapper elsewhere"
    )
    ready.execute("grant usage on foreign server elsewhere to public")
    app.execute("create foreign table app.far (id int, v text) server elsewhere")
    refused(app, "select rekey.protect_column('app.far', 'v', context_columns => '{id}')", "22023")
    app.execute("create table app.parts (id int not null, v text) partition by range (id)")
    app.execute("create table app.near partition of app.parts for values from (0) to (10)")
    protect(app, "app.parts", context_columns=["id"])
    app.execute(
        "create foreign table app.later partition of app.parts for values from (10) to (20) server elsewhere"
    )
    assert "app.later is a foreign table" in (problem(ready, "app.parts.v") or "")
    assert rotate(ready) == "verifying"
    app.execute("create table app.more (id int not null, v text) partition by range (id)")
    app.execute("create foreign table app.afar partition of app.more default server elsewhere")
    said = refused(app, "select rekey.protect_column('app.more', 'v', context_columns => '{id}')", "22023")
    assert "app.afar is a foreign table" in said


def test_nothing_comes_to_stand_on_a_version_that_is_to_be_destroyed(
    ready: Connection, app: Connection
) -> None:
    app.execute("create table app.mine (id int primary key, v text)")
    protect(app, "app.mine")
    app.execute("insert into app.mine values (1, rekey.encrypt_text('x', 'default', '{app.mine.v,1}'))")
    old = value(app, "select v from app.mine")
    assert rotate(ready) == "completed"
    ready.execute("select rekey.schedule_key_destruction('default', 1, '1 day')")
    refused(app, f"insert into app.mine values (2, '{old}')", "RK006")
    refused(app, f"update app.mine set v = '{old}'", "RK006")
    with (
        pytest.raises(psycopg.Error) as caught,
        app.cursor() as cursor,
        cursor.copy("copy app.mine from stdin") as copy,
    ):
        copy.write_row([3, old])
    assert caught.value.sqlstate == "RK006"
    app.execute("alter table app.mine rename v to w")  # the condition follows
    refused(app, f"update app.mine set w = '{old}'", "RK006")
    ready.execute("set session_replication_role = replica")
    refused(ready, f"insert into app.mine values (4, '{old}')", "RK006")
    ready.execute("reset session_replication_role")


def test_a_trigger_that_is_off_blocks(ready: Connection, app: Connection) -> None:
    label = fill(app, "mine")
    app.execute("alter table app.mine disable trigger zz_pg_rekey_1")
    assert "is off" in (problem(ready, label) or "")
    app.execute("drop trigger zz_pg_rekey_1 on app.mine")
    assert "was dropped" in (problem(ready, label) or "")
    app.execute("select rekey.protect_column('app.mine', 'v', encrypt_on_write => true)")
    assert problem(ready, label) is None


@pytest.mark.parametrize("after", [False, True])
def test_a_value_is_sealed_for_the_row_that_is_stored(
    ready: Connection, app: Connection, after: bool
) -> None:
    app.execute("create table app.mine (id int primary key, tenant int, v text)")
    app.execute(
        "create function app.set_tenant() returns trigger language plpgsql"
        " as 'begin new.tenant := 7; return new; end'"
    )
    trigger = "create trigger zzz before insert on app.mine for each row execute function app.set_tenant()"
    options = "context_columns => '{tenant,id}', encrypt_on_write => true"
    call = f"select rekey.protect_column('app.mine', 'v', {options})"
    if after:
        app.execute(call.encode())
        app.execute(trigger.encode())
        assert "zzz" in refused(app, "insert into app.mine (id, v) values (1, 'precious')", "RK005")
    else:
        app.execute(trigger.encode())
        assert "zzz" in refused(app, call, "RK005")
    app.execute("alter trigger zzz on app.mine rename to aaa")
    app.execute(call.encode())
    app.execute("insert into app.mine (id, v) values (1, 'precious')")
    assert (
        value(app, "select rekey.decrypt_text(v, array['app.mine.v', '7', '1']) from app.mine") == "precious"
    )


def test_a_setting_passes_for_no_sweep(ready: Connection, app: Connection) -> None:
    fill(app, "mine")
    app.execute("create table app.log (n int)")
    app.execute(
        "create function app.note() returns trigger language plpgsql"
        " as 'begin insert into app.log values (1); return null; end'"
    )
    app.execute(
        "create trigger note after update on app.mine for each row"
        " when (not rekey.is_sweeping('app.mine')) execute function app.note()"
    )
    app.execute("set rekey.sweeping = 'on'")
    refused(app, "update app.mine set v = (select v from app.mine where id = 2) where id = 1", "RK003")
    app.execute("update app.mine set v = 'new' where id = 1")
    assert value(app, "select count(*) from app.log") == 1
    assert rotate(ready) == "completed"
    assert value(app, "select count(*) from app.log") == 1
    assert value(ready, "select count(*) from rekey._sweeping") == 0


def test_the_replica_role_seals_takes_or_stops(db: str, ready: Connection, app: Connection) -> None:
    fill(app, "mine")
    envelope = value(app, "select v from app.mine where id = 1")
    with connect(db, options="-c session_replication_role=replica") as applying:
        # No KEK in this session, as in that of a subscription.
        applying.execute("delete from app.mine where id = 1")
        applying.execute("insert into app.mine values (1, %s)", [envelope])
        assert "there is no KEK" in refused(applying, "insert into app.mine values (20, 'plain')", "RK001")
        ready.execute("select rekey.set_setting('apply_plaintext', 'pass')")
        applying.execute("insert into app.mine values (20, 'plain')")
        assert value(applying, "select v from app.mine where id = 20") == "plain"
    ready.execute("set session_replication_role = replica")
    ready.execute("insert into app.mine values (21, 'sealed')")
    ready.execute("reset session_replication_role")
    assert value(app, "select v from app.mine where id = 21").startswith("rk1:")
