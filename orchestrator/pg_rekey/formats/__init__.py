"""What the user's values were encrypted with before: a module for each format, or for those of one library.

The keys come by the road of a KEK: PG_REKEY_FROM_<NAME>, also as _FILE or _COMMAND, one key a line. pgp_sym
is opened by the server (sql/code/63_adopt.sql); which marks tell the others is in sql/code/63_formats.sql.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from pg_rekey import kek as keks
from pg_rekey.errors import LOCKED, Problem
from pg_rekey.formats.aes import V1, AesGcm
from pg_rekey.formats.base import Format, variable
from pg_rekey.formats.better_auth import BetterAuth
from pg_rekey.formats.cryptr import Cryptr
from pg_rekey.formats.fernet import DjangoFernet, FernetFormat, SqlalchemyFernet
from pg_rekey.formats.jwe import Jwe
from pg_rekey.formats.laravel import Laravel
from pg_rekey.formats.node import AesCbc, Calcom
from pg_rekey.formats.openssl import Openssl
from pg_rekey.formats.prisma import Prisma
from pg_rekey.formats.rails import Rails
from pg_rekey.formats.sqlalchemy import SqlalchemyAes, SqlalchemyAesGcm
from pg_rekey.formats.tink import Tink
from pg_rekey.formats.transit import Transit
from pg_rekey.formats.wrappers import WRAPPERS

OPENED: dict[str, type[Format[Any]]] = {
    one.name: one
    for one in (
        FernetFormat,
        V1,
        AesCbc,
        AesGcm,
        BetterAuth,
        Calcom,
        Cryptr,
        DjangoFernet,
        Jwe,
        Laravel,
        Openssl,
        Prisma,
        Rails,
        SqlalchemyAes,
        SqlalchemyAesGcm,
        SqlalchemyFernet,
        Tink,
        Transit,
    )
}
FORMATS = ("plaintext", "pgp_sym", *OPENED)
KEYED = FORMATS[1:]


class Opened(NamedTuple):
    """A value that the client was to open: in which format it was, and its plaintext or why there is none."""

    format: str
    plaintext: bytes | None = None
    problem: str | None = None


@dataclass
class Keys:
    """The keys of the formats that are to be opened, and what else a value may be."""

    formats: list[Format[Any]] = field(default_factory=list)
    passphrases: list[bytes] = field(default_factory=list)
    unwrap: str | None = None
    plaintext: bool = False
    force: bool = False

    @classmethod
    def from_environment(cls, formats: Iterable[str], unwrap: str | None = None, force: bool = False) -> Self:
        """Read the keys that these formats need; errors do not show them."""
        keys = cls(unwrap=unwrap, force=force)
        for name in formats:
            if name == "plaintext":
                keys.plaintext = True
            elif name == "pgp_sym":
                keys.passphrases = [line.encode() for line in _read(variable(name))]
            else:
                keys.formats.append(OPENED[name](_read(variable(name))))
        return keys

    def open(self, values: Sequence[bytes], marks: Sequence[str]) -> list[Opened]:
        """Open values by the first format that can; mark is what the database took each for."""
        opened: dict[int, Opened] = {}
        for one in self.formats:
            waiting = [at for at in range(len(values)) if at not in opened]
            for at, plaintext in zip(waiting, one.open([values[at] for at in waiting]), strict=True):
                if plaintext is not None:
                    opened[at] = self._unwrapped(one.name, plaintext)
        return [opened.get(at) or self._closed(value, marks[at]) for at, value in enumerate(values)]

    def _unwrapped(self, name: str, plaintext: bytes) -> Opened:
        if self.unwrap is None:
            return Opened(name, plaintext)
        inner = WRAPPERS[self.unwrap](plaintext)
        return Opened(name, inner, f"{name} opens, but what is in it is no text in {self.unwrap}")

    def _closed(self, value: bytes, mark: str) -> Opened:
        """Say what a value is that no key opens: damaged, or plaintext that has no format's mark or shape."""
        name = next((one.name for one in self.formats if one.recognise(value)), None)
        if self.plaintext and (self.force or (mark == "unmarked" and name is None)):
            return Opened("plaintext", value)
        if name is None:
            return Opened(mark, None, "is in none of the formats")
        return Opened(name, None, f"{name} does not open: damaged, or another key")


def _read(name: str) -> list[str]:
    text = keks.read_text(name)
    lines = [line.strip("\r") for line in (text or "").split("\n") if line.strip()]
    if not lines:
        raise Problem(
            f"no key: none of {name}, {name}_FILE and {name}_COMMAND gives one",
            "One key a line. Keys are never arguments.",
            LOCKED,
        )
    return lines
