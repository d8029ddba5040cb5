"""The column type for SQLAlchemy, against the real library."""

from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

from helpers import Connection
from pg_rekey.sqlalchemy import Sealed, unlock


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    api_key: Mapped[str | None] = mapped_column(Sealed())


class Document(Base):
    """Names that need quotes, a context of two columns, bytes."""

    __tablename__ = "Document"
    __table_args__ = {"schema": "Mixed"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    body: Mapped[bytes] = mapped_column("Body", Sealed("tenant", "id", binary=True))


@pytest.fixture
def engine(ready: Connection, db: str, kek: bytes) -> Iterator[sa.Engine]:
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(db))
    ready.execute('create schema "Mixed"')
    Base.metadata.create_all(engine)
    ready.execute("select rekey.protect_column('public.account', 'api_key', encrypt_on_write => true)")
    ready.execute(
        "select rekey.protect_column('\"Mixed\".\"Document\"', 'Body',"
        " context_columns => '{tenant,id}', encrypt_on_write => true)"
    )
    unlock(engine, kek)
    yield engine
    engine.dispose()


def stored(ready: Connection, statement: str) -> list[object]:
    return [row[0] for row in ready.execute(statement.encode()).fetchall()]


def test_what_is_written_is_sealed_and_opens(engine: sa.Engine, ready: Connection) -> None:
    with Session(engine) as session:
        session.add_all(Account(id=n, owner=f"o{n}", api_key=f"sk_live_{n}") for n in range(1, 501))
        session.add(Account(id=501, owner="none", api_key=None))
        session.commit()
    assert all(
        str(value).startswith("rk1:") for value in stored(ready, "select api_key from account where id < 501")
    )
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with Session(engine) as session:
        accounts = session.scalars(sa.select(Account).order_by(Account.id)).all()
        assert [one.api_key for one in accounts] == [f"sk_live_{n}" for n in range(1, 501)] + [None]
    # However many rows: one statement opens them.
    assert len([one for one in statements if "decrypt_text" in one]) == 1


def test_changed_and_rotated(engine: sa.Engine, ready: Connection) -> None:
    with Session(engine) as session:
        session.add(Account(id=1, owner="a", api_key="first"))
        session.commit()
        account = session.get_one(Account, 1)
        account.api_key = "second"
        session.commit()
        ready.execute("select rekey.rotate_keys()")
        ready.execute("call rekey.run_rotations()")
        assert stored(ready, "select sum(rows) filter (where version = 2) from rekey.key_usage()") == [1]
        session.expire_all()
        assert session.get_one(Account, 1).api_key == "second"
        account.owner = "b"
        session.commit()
        assert session.scalars(sa.select(Account.api_key)).one() == "second"


def test_aliases_and_joins(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.add_all([Account(id=1, owner="a", api_key="one"), Account(id=2, owner="a", api_key="two")])
        session.commit()
        other = aliased(Account)
        pairs = sa.select(Account.api_key, other.api_key).join(other, Account.id < other.id)
        assert session.execute(pairs).all() == [("one", "two")]


def test_bytes_under_quoted_names(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.add(Document(id=1, tenant="t", body=b"\x00\xff"))
        session.commit()
    with Session(engine) as session:
        assert session.get_one(Document, 1).body == b"\x00\xff"


def test_a_row_that_was_moved_does_not_open(engine: sa.Engine, ready: Connection) -> None:
    with Session(engine) as session:
        session.add(Account(id=1, owner="a", api_key="one"))
        session.add(Account(id=2, owner="a", api_key="two"))
        session.commit()
        ready.execute("set session_replication_role = replica")
        ready.execute("update account set api_key = (select api_key from account where id = 2) where id = 1")
        with pytest.raises(sa.exc.DBAPIError) as raised:
            session.scalars(sa.select(Account.api_key)).all()
        assert getattr(raised.value.orig, "sqlstate", None) == "RK003"


def test_only_null_can_be_asked_for(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.add(Account(id=1, owner="a", api_key=None))
        session.commit()
        assert session.scalars(sa.select(Account.id).where(Account.api_key.is_(None))).all() == [1]
        with pytest.raises(TypeError, match="for NULL only"):
            sa.select(Account).where(Account.api_key == "one")


def test_without_the_kek(engine: sa.Engine, db: str) -> None:
    locked = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(db))
    with Session(locked) as session:
        session.add(Account(id=1, owner="a", api_key="one"))
        with pytest.raises(sa.exc.DBAPIError, match="KEK"):
            session.commit()
    locked.dispose()
