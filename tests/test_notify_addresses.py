"""Where messages may go, and where not."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pg_rekey.notify import addresses, email, webhook
from pg_rekey.notify.addresses import Undelivered
from receivers import Receiver, mail_server, make_certificate, receiver

pytest_plugins = ["receivers"]

SECRET = "whsec_" + "QUFB" * 8
BODY = '{"type": "test", "data": {"database": "d", "text": "A test"}}'


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",  # the metadata of clouds
        "100.64.0.1",  # shared by carriers
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%lo",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",  # 6to4 of 127.0.0.1
        "64:ff9b::a9fe:a9fe",  # NAT64 of 169.254.169.254
    ],
)
def test_private_addresses_are_told(address: str) -> None:
    assert not addresses.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_are_told(address: str) -> None:
    assert addresses.is_public(address)


def post(url: str, *, allow_private: bool = True) -> None:
    webhook.post(url, SECRET, "msg_1", BODY, allow_private=allow_private)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_a_private_address_is_refused_by_any_name(hook: Receiver, host: str) -> None:
    port = hook.url.split(":")[2].split("/")[0]
    with pytest.raises(Undelivered, match="private"):
        post(f"https://{host}:{port}/", allow_private=False)
    assert hook.received == []


def resolve(monkeypatch: pytest.MonkeyPatch, *found: str) -> list[Any]:
    """Have every name resolve to these addresses; return the names that were asked for."""
    asked: list[Any] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *given: Any, **named: Any) -> Any:
        if host in found:  # to connect there
            return real(host, port, *given, **named)
        asked.append(host)
        return [answer for one in found for answer in real(one, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_one_private_address_among_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "1.1.1.1", "10.0.0.1")
    with pytest.raises(Undelivered, match="private"):
        addresses.connect("mixed.example", 443, tls=True, allow_private=False)


def test_nothing_goes_without_tls_to_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "1.1.1.1")
    with pytest.raises(Undelivered, match="no TLS"):
        addresses.connect("public.example", 80, tls=False, allow_private=True)


def test_a_name_is_resolved_once_and_connected_to_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with receiver(certificate) as hook:
        port = hook.url.split(":")[2].split("/")[0]
        asked = resolve(monkeypatch, "127.0.0.1")
        post(f"https://hooks.example:{port}/a?b=c")
    assert asked == ["hooks.example"]
    assert hook.received[0].headers["host"] == f"hooks.example:{port}"
    assert hook.received[0].path == "/a?b=c"


def test_a_certificate_is_for_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "other.example")
    with receiver(certificate) as hook:
        with pytest.raises(Undelivered, match="certificate"):
            post(hook.url)  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(Undelivered, match="certificate"):
            post(hook.url)
    assert hook.received == []


def test_a_redirect_is_not_followed(hook: Receiver) -> None:
    hook.answer = lambda _: 307
    hook.headers["Location"] = hook.url
    with pytest.raises(Undelivered, match=r"^HTTP status 307$"):
        post(hook.url)
    assert len(hook.received) == 1


def test_no_proxy_is_asked(hook: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    post(hook.url)
    assert len(hook.received) == 1


@contextmanager
def talker(*said: bytes, pause: float = 0.0) -> Iterator[int]:
    """Run a server that says this to whoever connects, bit by bit; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        try:
            with listener.accept()[0] as line:
                for part in said:
                    line.sendall(part)
                    time.sleep(pause)
                while line.recv(65536):
                    pass
        except OSError:
            pass

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.close()
    thread.join(5)


@pytest.mark.parametrize(
    "said",
    [
        [b"220 hello\r\n"],
        [b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000 + b"\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n"],
    ],
)
def test_an_answer_that_is_none(said: list[bytes]) -> None:
    with talker(*said) as port, pytest.raises(Undelivered):
        post(f"http://127.0.0.1:{port}/")


def test_who_answers_bit_by_bit_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DEADLINE", 0.5)
    begun = time.monotonic()
    with talker(*[b"x"] * 50, pause=0.1) as port, pytest.raises(Undelivered):
        post(f"http://127.0.0.1:{port}/")
    assert time.monotonic() - begun < 4


def test_a_name_of_many_dead_addresses_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "PATIENCE", 0.3)
    resolve(monkeypatch, *(f"127.0.0.{n}" for n in range(1, 9)))

    def nobody(_: Any, timeout: float) -> socket.socket:
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", nobody)
    begun = time.monotonic()
    with pytest.raises(Undelivered, match="in time"):
        post("http://many.example/")
    assert time.monotonic() - begun < 1


def test_who_was_long_in_finding_is_cut_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DEADLINE", 0.3)
    real = socket.getaddrinfo

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(0.6)
        return real(*given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    begun = time.monotonic()
    with talker(*[b"x"] * 50, pause=0.1) as port, pytest.raises(Undelivered):
        post(f"http://127.0.0.1:{port}/")
    assert time.monotonic() - begun < 4


def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "PATIENCE", 0.3)
    with talker() as port, pytest.raises(Undelivered, match="in time"):
        post(f"http://127.0.0.1:{port}/")
    with pytest.raises(Undelivered, match="connection refused"):
        post(f"http://127.0.0.1:{port}/")


def test_problems_hold_no_address() -> None:
    with pytest.raises(Undelivered) as caught:
        post("https://canary.invalid/canary")
    assert "canary" not in str(caught.value)


def send(address: str) -> None:
    email.send(address, "msg_1", BODY, allow_private=True)


@pytest.mark.parametrize("direct", [True, False])
def test_email_goes_with_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct: bool) -> None:
    certificate = make_certificate(tmp_path)
    scheme = "smtps" if direct else "smtp"
    with mail_server(certificate, direct=direct) as mail:
        address = f"{scheme}://rekey:canary%2Fp%40ss@localhost:{mail.port}?from=r@example.com&to=a@example.com&to=b@example.com"
        with pytest.raises(Undelivered, match="certificate"):
            send(address)
        assert mail.logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        send(address)
        with pytest.raises(Undelivered, match=r"^SMTP status 535$"):
            send(address.replace("canary%2Fp%40ss", "wrong"))
    [got] = mail.received
    assert mail.to == [["a@example.com", "b@example.com"]]
    assert mail.logins[0] == ("rekey", "canary/p@ss")
    assert (got["Subject"], got["Message-ID"]) == ("pg_rekey, d: A test", "<msg_1@pg-rekey>")


def test_email_without_tls_is_refused_unless_it_says_so() -> None:
    with mail_server() as mail:
        address = f"smtp://localhost:{mail.port}?from=r@example.com&to=a@example.com"
        with pytest.raises(Undelivered, match="no STARTTLS"):
            send(address)
        send(f"{address}&tls=no")
        with pytest.raises(Undelivered, match="no addresses"):
            send(f"{address}%0aBcc:%20x@example.com&tls=no")
        with pytest.raises(Undelivered, match="private"):
            email.send(address, "msg_1", BODY, allow_private=False)
    assert len(mail.received) == 1


def test_who_is_no_server_for_email(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "PATIENCE", 0.5)
    with talker(b"HTTP/1.1 200 OK\r\n\r\n") as port, pytest.raises(Undelivered):
        send(f"smtp://127.0.0.1:{port}?from=r@example.com&to=a@example.com&tls=no")
