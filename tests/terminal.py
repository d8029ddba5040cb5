"""The command line on a terminal of a given width, as a person sees it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyte

from cli_fixtures import COMMAND


class Terminal:
    """A process on a terminal; `screen` is what stands there now."""

    def __init__(self, columns: int, lines: int) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self.process: subprocess.Popen[bytes]
        self.master = -1

    @property
    def lines(self) -> list[str]:
        """The lines of the screen, without the empty ones at its end."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip().split("\n")

    @property
    def screen(self) -> str:
        """The screen as one text."""
        return "\n".join(self.lines)

    def type(self, text: str) -> None:
        """Type something."""
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def read(self, until: Callable[[str], object] | None = None) -> str:
        """Read until the screen is as awaited, or the process has ended; return the screen."""
        deadline = time.monotonic() + 60
        while until is None or not until(self.screen):
            assert time.monotonic() < deadline, self.screen
            if not select.select([self.master], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so when the last writer has gone
                data = b""
            if not data:
                assert until is None, self.screen
                break
            self.raw += data
            self._stream.feed(data)
        return self.screen

    def code(self) -> int:
        """Read to the end, and return the exit code."""
        self.read()
        return self.process.wait(timeout=60)


@contextmanager
def terminal(
    *arguments: str,
    columns: int = 80,
    lines: int = 60,
    command: Sequence[str] = (COMMAND,),
    **environment: str,
) -> Iterator[Terminal]:
    """Run the command line on a terminal."""
    shown = Terminal(columns, lines)
    shown.master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    unset = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", **environment}
    try:
        shown.process = subprocess.Popen(
            [*command, *arguments],
            env=environ,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
    finally:
        os.close(slave)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()
        os.close(shown.master)


def see(*arguments: str, columns: int = 80, lines: int = 60, code: int = 0, **environment: str) -> list[str]:
    """Run a command that should end with this exit code, and return the lines of the screen."""
    with terminal(*arguments, columns=columns, lines=lines, **environment) as shown:
        assert shown.code() == code, shown.screen
        return shown.lines
