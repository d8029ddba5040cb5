"""The transit engine of OpenBao and Vault: `vault:v<version>:<base64>`, opened by the server with the key."""

import base64
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pg_rekey.errors import LOCKED, Problem
from pg_rekey.formats.base import Format, unbase64

BATCH = 249  # what Vault takes at once by default is 250
SECONDS = 60


class _NoRedirect(HTTPRedirectHandler):
    """A redirection is an answer: followed, it would take the token to another server."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


OPENER = build_opener(_NoRedirect)


class TransitKey(NamedTuple):
    """Where a key is, and what its values are bound to."""

    path: str
    associated_data: str | None


class Transit(Format[TransitKey]):
    """Each batch is one request. The token never leaves this process but to that server."""

    name = "transit"
    key_form = (
        "MOUNT/KEY, as transit/app, and behind white space its associated data in base64, if any. The "
        "address is BAO_ADDR or VAULT_ADDR, the token BAO_TOKEN or VAULT_TOKEN."
    )

    def parse(self, line: str) -> list[TransitKey]:
        """Return where the key is."""
        path, *bound = line.split()
        mount, key = path.strip("/").rsplit("/", 1)
        if len(bound) > 1:
            raise ValueError
        for one in bound:
            unbase64(one)
        return [TransitKey(f"{quote(mount)}/decrypt/{quote(key, safe='')}", bound[0] if bound else None)]

    def recognise(self, value: bytes) -> bool:
        """Tell by the prefix."""
        return re.match(rb"vault:v\d+:", value) is not None

    def open_with(self, key: TransitKey, value: bytes) -> bytes | None:
        """Have the server open one value."""
        return _decrypt(key, [value])[0]

    def open(self, values: Sequence[bytes]) -> list[bytes | None]:
        """Have the server open them in batches, under one key after the other."""
        opened: list[bytes | None] = [None] * len(values)
        for key in self.keys:
            waiting = [at for at, value in enumerate(values) if opened[at] is None and self.recognise(value)]
            for first in range(0, len(waiting), BATCH):
                batch = waiting[first : first + BATCH]
                for at, plaintext in zip(batch, _decrypt(key, [values[at] for at in batch]), strict=True):
                    opened[at] = plaintext
        return opened


def _setting(name: str) -> str:
    for variable in (f"BAO_{name}", f"VAULT_{name}"):
        if text := os.environ.get(variable):
            return text
    raise Problem(f"neither BAO_{name} nor VAULT_{name} is set", "transit is opened by its server.", LOCKED)


def _decrypt(key: TransitKey, values: Sequence[bytes]) -> list[bytes | None]:
    """Return what the server says of each value, whatever the status of the whole answer is."""
    bound = {"associated_data": key.associated_data} if key.associated_data else {}
    items = [{"ciphertext": value.decode("ascii", "replace").strip(), **bound} for value in values]
    status, answer = _post(key.path, {"batch_input": items})
    results = (answer.get("data") or {}).get("batch_results")
    if not isinstance(results, list) or len(results) != len(values):
        raise Problem(
            f"the transit server refused {key.path}: HTTP {status}",
            "Its address, its token, the token's policy, or the name of the key may be wrong.",
        )
    return [None if one.get("error") else base64.b64decode(one.get("plaintext") or "") for one in results]


def _post(path: str, document: object) -> tuple[int, dict[str, dict[str, object]]]:
    request = Request(
        f"{_setting('ADDR').rstrip('/')}/v1/{path}",
        json.dumps(document).encode(),
        {"X-Vault-Token": _setting("TOKEN"), "Content-Type": "application/json"},
    )
    try:
        with OPENER.open(request, timeout=SECONDS) as response:
            return response.status, json.loads(response.read() or b"{}")
    except HTTPError as error:
        with error:
            try:
                return error.code, json.load(error)
            except ValueError:
                return error.code, {}
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise Problem(
            f"the transit server does not answer: {reason}", "BAO_ADDR or VAULT_ADDR says where it is."
        ) from None
