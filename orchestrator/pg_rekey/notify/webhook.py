"""Webhooks, signed as Standard Webhooks has it (standardwebhooks.com), to the address that was looked at."""

import base64
import hashlib
import hmac
import http.client
import ssl
import time
from urllib.parse import urlsplit

from pg_rekey import release
from pg_rekey.notify import addresses
from pg_rekey.notify.addresses import Undelivered


class _Connection(http.client.HTTPConnection):
    """HTTP over a connection of ours. It follows no redirect and no proxy."""

    def __init__(self, host: str, port: int, *, tls: bool, allow_private: bool) -> None:
        self.default_port = 443 if tls else 80
        super().__init__(host, port)
        self._tls = tls
        self._allow_private = allow_private

    def connect(self) -> None:
        """Connect to an address that is allowed; the certificate has to be for the name."""
        self.sock = addresses.connect(self.host, self.port, tls=self._tls, allow_private=self._allow_private)
        if self._tls:
            context = ssl.create_default_context()
            # The handshake within reach of the deadline, which looks at self.sock.
            wire = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = wire
            wire.do_handshake()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a message, under a secret of the form whsec_BASE64."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def post(url: str, secret: str, message_id: str, body: str, *, allow_private: bool) -> None:
    """Send a message; an answer other than 2xx is none."""
    content, now = body.encode(), int(time.time())
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if tls else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"pg-rekey/{release.version()}",
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(secret, message_id, now, content),
    }
    connection = _Connection(host, port, tls=tls, allow_private=allow_private)
    try:
        with addresses.in_words(lambda: connection.sock):
            connection.request("POST", target, content, headers)
            # What is in the answer is nothing to us: it is not read.
            status = connection.getresponse().status
    except (http.client.HTTPException, ValueError):
        raise Undelivered("it does not answer in HTTP") from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise Undelivered(f"HTTP status {status}")
