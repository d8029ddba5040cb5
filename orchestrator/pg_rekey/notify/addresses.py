"""Where messages may go. A name is resolved once, and the connection goes to the address that was looked at.

Whoever may add an endpoint could otherwise have this process talk to what only it reaches: services on its
own machine or network, the metadata of a cloud.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

# For one read or write, and for all of a delivery: less than the lease of a message.
PATIENCE = 10.0
DEADLINE = 20.0
_NAT64 = IPv6Network("64:ff9b::/96")


class Undelivered(Exception):
    """Why a message was not delivered, in words that hold no address."""


def is_public(address: str) -> bool:
    """Tell whether an IP address is of the public internet, and stands for no other one that is not."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and (inner := _inner(ip)) is not None:
        return is_public(str(inner))
    site_local = isinstance(ip, IPv6Address) and ip.is_site_local
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or site_local)


def _inner(ip: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 address stands for: mapped, 6to4, NAT64."""
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


def connect(host: str, port: int, *, tls: bool, allow_private: bool) -> socket.socket:
    """Return a connection to a host, at an address that is allowed.

    tls: what is sent will be encrypted. Without it, only private addresses will do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Undelivered("its name is not known") from None
    addresses = [str(address[0]) for *_, address in found]
    if not allow_private and not all(map(is_public, addresses)):
        raise Undelivered("its address is a private one, which this endpoint does not allow")
    if not tls and any(map(is_public, addresses)):
        raise Undelivered("its address is a public one, and there is no TLS")
    problem: OSError | None = None
    until = time.monotonic() + PATIENCE
    for address in addresses:
        if (left := until - time.monotonic()) <= 0:
            break
        try:
            wire = socket.create_connection((address, port), timeout=left)
        except OSError as error:
            problem = error
        else:
            wire.settimeout(PATIENCE)
            return wire
    raise problem or OSError("no address")


def refuse(host: str, *, allow_private: bool) -> None:
    """Refuse a host at a private address right away; what is not known here may be known to the worker."""
    with suppress(OSError, UnicodeError):
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            if not allow_private and not is_public(str(address[0])):
                raise Undelivered("its address is a private one")


@contextmanager
def in_words(wire: Callable[[], socket.socket | None]) -> Iterator[None]:
    """End a delivery that takes too long, and say what went wrong without the address."""
    over = threading.Event()
    threading.Thread(target=_cut, args=[wire, over], daemon=True).start()
    try:
        yield
    except ssl.SSLCertVerificationError:
        raise Undelivered("its certificate does not hold") from None
    except ssl.SSLError:
        raise Undelivered("there is no TLS with it") from None
    except TimeoutError:
        raise Undelivered("no answer in time") from None
    except ConnectionRefusedError:
        raise Undelivered("connection refused") from None
    except OSError as error:
        raise Undelivered(f"no connection: {type(error).__name__}") from None
    finally:
        over.set()


def _cut(wire: Callable[[], socket.socket | None], over: threading.Event) -> None:
    pause = DEADLINE
    while not over.wait(pause):
        pause = 0.5  # it may not have been connected yet
        with suppress(OSError):
            if (open_socket := wire()) is not None:
                # Not as the TLS layer has it, which another thread is reading from.
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
