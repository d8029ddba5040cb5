"""A proxy before a server that loses one COMMIT, or the answer to it, and then ends the connection."""

import contextlib
import shutil
import socket
import tempfile
import threading
from types import TracebackType
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"


class Lossy:
    """Passes everything on but what belongs to the nth COMMIT; `lost` tells whether that has come."""

    def __init__(self, dsn: str, *, nth: int = 1, answer: bool = True) -> None:
        """Listen. answer: the server gets the COMMIT, and only its answer is lost."""
        self._upstream = {name: str(it) for name, it in conninfo_to_dict(dsn).items()}
        self._nth, self._answer = nth, answer
        self.lost = threading.Event()
        self._seen = 0
        self._folder = tempfile.mkdtemp(prefix="pgrk-lossy-", dir="/tmp")
        self.dsn = make_conninfo(dsn, host=self._folder, port=5432)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._folder}/.s.PGSQL.5432")
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder)

    def _connect(self) -> socket.socket:
        host, port = self._upstream["host"], self._upstream.get("port", "5432")
        if not host.startswith("/"):
            return socket.create_connection((self._upstream.get("hostaddr", host), int(port)))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server, losing = self._connect(), threading.Event()
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target, losing), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, losing: threading.Event) -> None:
        try:
            while data := source.recv(65536):
                if losing.is_set():  # this is the answer
                    break
                if data == COMMIT:
                    self._seen += 1
                    if self._seen == self._nth:
                        losing.set()
                        if not self._answer:
                            break
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended it
        finally:
            if losing.is_set():
                self.lost.set()
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
