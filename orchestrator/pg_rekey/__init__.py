"""pg_rekey: online rotation of encryption keys in PostgreSQL.

    with pg_rekey.connect() as rekey:
        rekey.secrets.set("STRIPE_KEY", "sk_live_51H8x2")
        rekey.rotate(wait=True)

connect() takes a psycopg connection, a pool, a connection string, or nothing: then the environment says which
database. connect_async() does the same with coroutines. unlock() gives the KEK to a connection of one's own.
"""

from pg_rekey.client import Client, connect, unlock
from pg_rekey.client_async import AsyncClient, connect_async
from pg_rekey.exceptions import (
    Denied,
    Error,
    InUse,
    Locked,
    NotFound,
    UnderWay,
    Unreachable,
    Unreadable,
    WrongState,
)
from pg_rekey.results import Keyring, Rotation, Secret, Status

__all__ = [
    "AsyncClient",
    "Client",
    "Denied",
    "Error",
    "InUse",
    "Keyring",
    "Locked",
    "NotFound",
    "Rotation",
    "Secret",
    "Status",
    "UnderWay",
    "Unreachable",
    "Unreadable",
    "WrongState",
    "connect",
    "connect_async",
    "unlock",
]
