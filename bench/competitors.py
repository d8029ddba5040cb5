"""Who takes part in the race: each re-encrypts all that it holds under a new key."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import LiteralString

from cryptography.fernet import Fernet, MultiFernet

from bench.estate import fill_secrets
from bench.workers import Workers
from pg_rekey import db

FLOOR_BLOCKS = 128
APPLICATION_BATCH = 1000


@dataclass
class Competitor(ABC):
    """One way to rotate a table."""

    name: str
    label: str
    table: LiteralString
    authenticates: bool  # whether a changed ciphertext is sure to be noticed
    rows: int = field(default=0, init=False)

    @abstractmethod
    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        """Store rows of a size in the empty table."""

    @abstractmethod
    def run(self, connection: db.Connection) -> float:
        """Rotate once; return how long it took, in seconds."""


@dataclass
class Floor(Competitor):
    """No cryptography: the bytes of rekey.secrets written anew, as they are, in batches of a commit each."""

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        connection.execute("select bench.fill_floor()")
        self.rows = rows

    def run(self, connection: db.Connection) -> float:
        [found] = connection.execute(
            "select pg_relation_size('bench.floor') / current_setting('block_size')::int as blocks"
        ).fetchall()
        begun = time.monotonic()
        for first in range(0, found["blocks"], FLOOR_BLOCKS):
            until = min(first + FLOOR_BLOCKS, found["blocks"])
            connection.execute("select bench.update_floor(%s, %s)", [first, until])
        return time.monotonic() - begun


@dataclass
class Rekey(Competitor):
    """pg_rekey by its public road: rotate_keys, workers, verification, audit, progress."""

    workers: Workers
    fills: bool = True

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        if self.fills:
            fill_secrets(connection, rows, size)
        self.rows = rows

    def run(self, connection: db.Connection) -> float:
        rotation = self.workers.rotate(connection)
        assert rotation.rows == self.rows, rotation
        return rotation.seconds


@dataclass
class Application(Competitor):
    """A program that holds the keys: SELECT FOR UPDATE, MultiFernet.rotate, executemany, a commit a batch."""

    key: bytes = field(default_factory=Fernet.generate_key, repr=False)

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        fernet = Fernet(self.key)
        values = connection.execute(
            "select n, bench.value(n, %s) as value from generate_series(1, %s) n", [size, rows]
        )
        with (
            connection.cursor() as cursor,
            cursor.copy("copy bench.application (id, token) from stdin") as copy,
        ):
            for row in values:
                copy.write_row((row["n"], fernet.encrypt(row["value"].encode()).decode()))
        self.rows = rows

    def run(self, connection: db.Connection) -> float:
        before, self.key = self.key, Fernet.generate_key()
        fernet = MultiFernet([Fernet(self.key), Fernet(before)])
        done = last = 0
        begun = time.monotonic()
        while True:
            with connection.transaction(), connection.cursor() as cursor:
                rows = cursor.execute(
                    "select id, token from bench.application where id > %s order by id limit %s for update",
                    [last, APPLICATION_BATCH],
                ).fetchall()
                if not rows:
                    break
                cursor.executemany(
                    "update bench.application set token = %s where id = %s",
                    [(fernet.rotate(row["token"]).decode(), row["id"]) for row in rows],
                )
            last = rows[-1]["id"]
            done += len(rows)
        assert done == self.rows, done
        return time.monotonic() - begun


@dataclass
class Vault(Competitor):
    """A stand-in for the Supabase Vault: its update_secret over its decrypted view, in one statement."""

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        connection.execute("select bench.fill_vault(%s, %s)", [rows, size])
        self.rows = rows

    def run(self, connection: db.Connection) -> float:
        begun = time.monotonic()
        [done] = connection.execute("""
            select count(*), count(bench.update_secret(s.id, s.decrypted_secret)) as changed
            from bench.decrypted_secrets s""").fetchall()
        assert done["count"] == self.rows, done
        return time.monotonic() - begun


@dataclass
class Pgp(Competitor):
    """pgcrypto's PGP functions, in one UPDATE; over a share of the rows where that takes too long."""

    options: LiteralString
    share: float = 1.0
    generation: int = 0

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        self.rows = max(1, int(rows * self.share))
        connection.execute(
            f"""insert into {self.table}
                select n, pgp_sym_encrypt(bench.value(n, %s), %s, %s) from generate_series(1, %s) n""",
            [size, self._passphrase(), self.options, self.rows],
        )

    def run(self, connection: db.Connection) -> float:
        before = self._passphrase()
        self.generation += 1
        begun = time.monotonic()
        done = connection.execute(
            f"update {self.table} set v = pgp_sym_encrypt(pgp_sym_decrypt(v, %s), %s, %s)",
            [before, self._passphrase(), self.options],
        )
        assert done.rowcount == self.rows, done.rowcount
        return time.monotonic() - begun

    def _passphrase(self) -> str:
        return f"passphrase {self.generation}"


def all_of(one: Workers, two: Workers, share: float) -> list[Competitor]:
    """Return them all; those that copy or share rekey.secrets come after the one that fills it."""
    return [
        Rekey("rekey_1", "**pg_rekey**, one worker", "rekey.secrets", True, one),
        Rekey("rekey_2", "**pg_rekey**, two workers", "rekey.secrets", True, two, fills=False),
        Floor("floor", "bare UPDATE of the same bytes in the same batches", "bench.floor", False),
        Application(
            "application",
            "the application: SELECT FOR UPDATE, `MultiFernet.rotate`, executemany, 1,000 a batch",
            "bench.application",
            True,
        ),
        Vault(
            "vault",
            "Supabase Vault (stand-in): `update_secret(id, decrypted_secret)` over all",
            "bench.vault",
            True,
        ),
        Pgp(
            "pgp_fast",
            "pgp_sym with `s2k-mode=0`, AES-256, one UPDATE (no context, no version)",
            "bench.pgp_fast",
            False,
            "s2k-mode=0, cipher-algo=aes256",
        ),
        Pgp(
            "pgp_default",
            f"`pgp_sym_encrypt(pgp_sym_decrypt(...))`, defaults, one UPDATE, over {share:.0%} of the rows",
            "bench.pgp_default",
            False,
            "",
            share,
        ),
    ]
