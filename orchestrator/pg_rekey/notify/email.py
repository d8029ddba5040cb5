"""E-mail, by SMTP with TLS: smtps://USER:PASSWORD@HOST:465?from=...&to=..., or smtp:// with STARTTLS."""

import json
import smtplib
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit

from pg_rekey.errors import USAGE, Problem
from pg_rekey.notify import addresses
from pg_rekey.notify.addresses import Undelivered


@dataclass(frozen=True)
class Mailbox:
    """What an address for e-mail says: the server, who sends and who gets it. tls=no in it: without TLS."""

    host: str
    port: int
    direct: bool
    tls: bool
    user: str | None
    password: str
    sender: str
    recipients: list[str]

    @classmethod
    def parse(cls, address: str) -> "Mailbox":
        """Return what an address says; an error does not show it."""
        parts = urlsplit(address)
        given = parse_qs(parts.query)
        sender, recipients = given.get("from", []), given.get("to", [])
        unknown = given.keys() - {"from", "to", "tls"}
        if unknown or given.get("tls", ["no"]) != ["no"] or len(sender) != 1 or not recipients:
            raise Problem(
                "an address for e-mail has one from=, one or more to=, and nothing else but tls=no",
                "smtps://USER:PASSWORD@HOST:465?from=SENDER&to=RECIPIENT",
                USAGE,
            )
        direct = parts.scheme == "smtps"
        return cls(
            host=parts.hostname or "",
            port=parts.port or (465 if direct else 587),
            direct=direct,
            tls="tls" not in given,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password or ""),
            sender=sender[0],
            recipients=recipients,
        )


class _Smtp(smtplib.SMTP):
    """SMTP over a connection of ours."""

    def __init__(self, box: Mailbox, allow_private: bool) -> None:
        self._box, self._allow_private = box, allow_private
        super().__init__(timeout=addresses.PATIENCE)
        self._host = box.host  # the name that the certificate is to be for

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        box = self._box
        self.sock = addresses.connect(host, port, tls=box.tls, allow_private=self._allow_private)
        if not (box.direct and box.tls):
            return self.sock
        wire = ssl.create_default_context().wrap_socket(
            self.sock, server_hostname=host, do_handshake_on_connect=False
        )
        self.sock = wire
        wire.do_handshake()
        return wire


def compose(box: Mailbox, message_id: str, body: str) -> EmailMessage:
    """Return the e-mail for the body of a message: its sentence, and all of it."""
    said = json.loads(body)
    mail = EmailMessage()
    mail["From"], mail["To"] = box.sender, ", ".join(box.recipients)
    mail["Subject"] = f"pg_rekey, {said['data']['database']}: {said['data']['text']}"
    mail["Date"] = formatdate()
    # The same whenever it is sent again.
    mail["Message-ID"] = f"<{message_id}@pg-rekey>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(f"{said['data']['text']}.\n\n{json.dumps(said, indent=2, ensure_ascii=False)}\n")
    return mail


def send(address: str, message_id: str, body: str, *, allow_private: bool) -> None:
    """Send a message."""
    box = Mailbox.parse(address)
    try:
        mail = compose(box, message_id, body)
    except ValueError:
        raise Undelivered("its sender or recipients are no addresses") from None
    smtp = _Smtp(box, allow_private)
    try:
        with addresses.in_words(lambda: smtp.sock), _in_words():
            smtp.connect(box.host, box.port)
            if box.tls and not box.direct:
                smtp.starttls(context=ssl.create_default_context())
            if box.user is not None:
                smtp.login(box.user, box.password)
            smtp.send_message(mail)
    finally:
        smtp.close()


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except smtplib.SMTPResponseException as error:
        raise Undelivered(f"SMTP status {error.smtp_code}") from None
    except smtplib.SMTPRecipientsRefused:
        raise Undelivered("the server takes none of its recipients") from None
    except smtplib.SMTPNotSupportedError:
        raise Undelivered("the server has no STARTTLS, or takes no password") from None
    except smtplib.SMTPException:
        raise Undelivered("it does not answer in SMTP") from None
