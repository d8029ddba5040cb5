"""Who gets messages, on this machine: servers for webhooks and for e-mail. (PYTEST_DONT_REWRITE)"""

import datetime
import email
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standardwebhooks import Webhook


@dataclass
class Received:
    """A request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    def verified(self, secret: str) -> Any:
        """Return the document, if the signature holds: by the library of Standard Webhooks."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Receiver:
    """A server for webhooks. answer: what it answers with, a status, for each request."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answer: Callable[[Received], int] = lambda _: 204
    headers: dict[str, str] = field(default_factory=dict)

    def events(self) -> list[str]:
        return [one.document["type"] for one in self.received]


@contextmanager
def receiver(certificate: Path | None = None) -> Iterator[Receiver]:
    """Run a server for webhooks."""
    got = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): text for name, text in self.headers.items()}
            one = Received(self.path, headers, body)
            got.received.append(one)
            status = got.answer(one)
            self.send_response(status)
            for name, text in got.headers.items():
                self.send_header(name, text)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # who was killed does not wait for an answer

    server = Server(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme, host = ("https", "localhost") if certificate else ("http", "127.0.0.1")
    got.url = f"{scheme}://{host}:{server.server_port}/hook?key=canary-in-address"
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hook() -> Iterator[Receiver]:
    """A server for webhooks, without TLS."""
    with receiver() as got:
        yield got


def make_certificate(directory: Path, name: str = "localhost") -> Path:
    """Return a file with a key and a certificate for a name, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@dataclass
class Mail:
    """A server for e-mail, and what it got."""

    port: int = 0
    received: list[Message] = field(default_factory=list)
    to: list[list[str]] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def mail_server(certificate: Path | None = None, *, direct: bool = False) -> Iterator[Mail]:
    """Run a server for e-mail; direct: TLS from the first byte on, else by STARTTLS where it has one."""
    # (It asks itself whether it is there, by the port that it was given.)
    with socket.create_server(("127.0.0.1", 0)) as free:
        got = Mail(free.getsockname()[1])

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            got.received.append(email.message_from_bytes(envelope.content))
            got.to.append(envelope.rcpt_tos)
            return "250 OK"

    def authenticate(
        server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword
    ) -> AuthResult:
        got.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password == b"canary/p@ss", handled=False)

    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    controller = Controller(
        Handler(),
        hostname="127.0.0.1",
        port=got.port,
        ssl_context=context if direct else None,
        tls_context=None if direct else context,
        require_starttls=context is not None and not direct,
        authenticator=authenticate,
        auth_require_tls=not direct and context is not None,
    )
    controller.start()
    try:
        yield got
    finally:
        controller.stop()
