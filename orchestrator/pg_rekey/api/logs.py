"""Log lines of the API, in the shape of the worker's: one JSON object a line."""

import logging
import time
import traceback
from typing import Any

from pg_rekey.worker import log

SECOND = 1.0


class JsonHandler(logging.Handler):
    """Prints what libraries log, but no text of an exception that they caught.

    What repeats is one line a second, which says how many were left out since the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        # Not what was formatted into it: there are as many of these as there are places that log.
        kind = (record.name, str(record.msg).partition("\n")[0])
        printed, left_out = self._last.get(kind, (-SECOND, 0))
        now = time.monotonic()
        if now - printed < SECOND:
            self._last[kind] = (printed, left_out + 1)
            return
        self._last[kind] = (now, 0)
        message = record.getMessage()
        origin = {}
        if record.exc_info and record.exc_info[1]:
            # asyncio appends the exception's text to the first line.
            message = message.partition("\n")[0]
            origin = where(record.exc_info[1])
        log(
            "log",
            level=record.levelname.lower(),
            logger=record.name,
            message=" ".join(message.split()),
            left_out=left_out or None,
            **origin,
        )


def where(error: BaseException) -> dict[str, Any]:
    """Say what kind of exception it is and where it came from; its text may hold values."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__qualname__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
