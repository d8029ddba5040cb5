"""The model field for Django, against the real library."""

from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.conf import settings
from django.db import connection, connections, models
from django.db.backends.signals import connection_created
from django.db.migrations.writer import MigrationWriter
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext
from psycopg.conninfo import conninfo_to_dict

from helpers import Connection

NAMES = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}

if not settings.configured:
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "unknown"}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
    )
    django.setup()

from pg_rekey.django import SealedTextField, unlock  # noqa: E402  # Django wants its settings first


class Account(models.Model):
    owner: "models.TextField[str, str]" = models.TextField()
    api_key = SealedTextField(null=True)

    class Meta:
        app_label = "tests"
        db_table = "account"


class Device(models.Model):
    """A name that needs quotes, and a context of two columns."""

    tenant: "models.TextField[str, str]" = models.TextField()
    token = SealedTextField(context=("tenant", "id"), db_column="accessToken")

    class Meta:
        app_label = "tests"
        db_table = "Device"


@pytest.fixture
def orm(ready: Connection, db: str, kek: bytes) -> Iterator[None]:
    """Django's own connection to the database, with the KEK."""
    given = conninfo_to_dict(db)
    settings_dict = connections["default"].settings_dict
    settings_dict.update({name: str(given.get(key) or "") for name, key in NAMES.items()})
    unlock(kek)
    with connection.schema_editor() as editor:
        editor.create_model(Account)
        editor.create_model(Device)
    ready.execute("select rekey.protect_column('public.account', 'api_key', encrypt_on_write => true)")
    ready.execute(
        "select rekey.protect_column('public.\"Device\"', 'accessToken', context_columns => '{tenant,id}',"
        " encrypt_on_write => true)"
    )
    yield
    connection_created.disconnect(dispatch_uid="pg_rekey")
    connection.close()


def test_what_is_written_is_sealed_and_opens(orm: None, ready: Connection) -> None:
    Account.objects.bulk_create(Account(owner=f"o{n}", api_key=f"sk_live_{n}") for n in range(500))
    Account.objects.create(owner="none", api_key=None)
    sealed = [value for (value,) in ready.execute("select api_key from account where api_key is not null")]
    assert all(str(value).startswith("rk1:") for value in sealed)
    with CaptureQueriesContext(connection) as queries:
        found = [one.api_key for one in Account.objects.order_by("id")]
    assert found == [f"sk_live_{n}" for n in range(500)] + [None]
    assert len(queries) == 1


def test_changed_and_rotated(orm: None, ready: Connection) -> None:
    account = Account.objects.create(owner="a", api_key="first")
    account.api_key = "second"
    account.save()
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    account.refresh_from_db()
    assert account.api_key == "second"
    account.owner = "b"
    account.save()
    assert Account.objects.values_list("api_key", "owner").get() == ("second", "b")


def test_a_context_of_two_columns_under_quoted_names(orm: None) -> None:
    device = Device.objects.create(tenant="t", token="value")
    assert Device.objects.get(pk=device.pk).token == "value"
    assert Device.objects.values("token").get() == {"token": "value"}


def test_a_row_that_was_moved_does_not_open(orm: None, ready: Connection) -> None:
    one, two = (Account.objects.create(owner="a", api_key=value) for value in ("one", "two"))
    ready.execute("set session_replication_role = replica")
    ready.execute(
        "update account set api_key = (select api_key from account where id = %s) where id = %s",
        [two.pk, one.pk],
    )
    with pytest.raises(DatabaseError, match="cannot open"):
        list(Account.objects.all())


def test_only_null_can_be_looked_up(orm: None) -> None:
    Account.objects.create(owner="a", api_key=None)
    assert Account.objects.filter(api_key__isnull=True).count() == 1
    for lookup in ("api_key", "api_key__contains"):
        with pytest.raises(TypeError, match="api_key is sealed"):
            Account.objects.filter(**{lookup: "x"})


def test_in_a_migration() -> None:
    field: Any = Device._meta.get_field("token")
    text, imports = MigrationWriter.serialize(field)
    assert text == "pg_rekey.django.SealedTextField(context=('tenant', 'id'), db_column='accessToken')"
    assert imports == {"import pg_rekey.django"}
