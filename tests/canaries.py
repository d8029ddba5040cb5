"""Secrets that are looked for afterwards, in every form in which they could have leaked."""

import base64
import mmap
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def explained_parameters(major: int) -> dict[str, str]:
    """Return the setting that has auto_explain log parameters; PostgreSQL 16 is the first to know it."""
    return {"auto_explain.log_parameter_max_length": "-1"} if major >= 16 else {}


def forms(secret: bytes) -> Iterator[bytes]:
    """Yield how bytes look in a log, a dump, a file or a traceback, whatever stands around them."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for before in range(3):  # a base64 text has another alignment for each
        encoded = base64.b64encode(bytes(before) + secret)
        inner = encoded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))
    for backslash in (rb"\%03o", rb"\\%03o"):  # the output format `escape`, as it is and in CSV or a COPY
        yield b"".join(bytes([c]) if 32 <= c < 127 and c != 92 else backslash % c for c in secret)
    yield repr(secret)[2:-1].encode()
    yield b" ".join(b"%d" % (c - 256 if c > 127 else c) for c in secret)  # debug_print_plan
    yield b" ".join(b"%02X" % c for c in secret)  # pg_waldump
    yield secret.decode("latin-1").encode("utf-16-le")


class Canaries:
    """Secrets by name, and files that may hold some of them."""

    def __init__(self) -> None:
        self._secrets: dict[str, bytes] = {}
        self.allowed: dict[Path, set[str]] = {}

    def add(self, name: str, secret: bytes | str) -> None:
        """Look for this secret: the first half and the second half of a key, each for itself."""
        whole = secret.encode() if isinstance(secret, str) else secret
        if len(whole) == 64:
            self._secrets |= {f"{name}, MAC key": whole[:32], f"{name}, encryption key": whole[32:]}
        else:
            self._secrets[name] = whole

    def secret(self, name: str) -> bytes:
        return self._secrets[name]

    def names(self, *prefixes: str) -> set[str]:
        return {name for name in self._secrets if name.startswith(prefixes)}

    def allow(self, path: Path, *prefixes: str) -> None:
        """Let a file hold the secrets whose names begin so: it is the place that is meant for them."""
        self.allowed.setdefault(path, set()).update(prefixes)

    def found(self, files: Iterable[Path], *prefixes: str) -> list[tuple[str, str, str]]:
        """Return file, secret and surroundings of every secret that stands where none is allowed.

        Only secrets whose names begin so are looked for.
        """
        wanted = {name: self._secrets[name] for name in self.names(*prefixes)}
        hits = []
        for path in _suspicious(files, wanted):
            for name, excerpt in _hits(path, wanted):
                if not name.startswith(tuple(self.allowed.get(path, {"\0"}))):
                    hits.append((str(path), name, excerpt))
        return hits


def _suspicious(files: Iterable[Path], secrets: Mapping[str, bytes]) -> set[Path]:
    """Return the files that hold any form of any secret: grep looks for all of them at once."""
    needles = {form for secret in secrets.values() for form in forms(secret)}
    # A pattern of grep is a line: of a form that has several, the longest.
    patterns = {max(needle.split(b"\n"), key=len) for needle in needles}
    assert min(len(pattern) for pattern in patterns) >= 8
    names = [str(path) for path in files if path.is_file() and path.stat().st_size]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\n".join(patterns) + b"\n")
        file.flush()
        command = ["grep", "-l", "-a", "-F", "-f", file.name, "--", *names]
        environment = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode < 2, done.stderr
    return {Path(name) for name in done.stdout.splitlines()}


def _hits(path: Path, secrets: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, secret in secrets.items():
            for form in forms(secret):
                if (place := content.find(form)) >= 0:
                    yield name, str(content[max(0, place - 200) : place + len(form) + 100])
                    break
