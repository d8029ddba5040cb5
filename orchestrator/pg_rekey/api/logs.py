"""Log lines of the API, in the shape of the worker's: one JSON object a line."""

import logging
import traceback
from typing import Any

from pg_rekey.worker import log


class JsonHandler(logging.Handler):
    """Prints what libraries log, but no text of an exception that they caught."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
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
            **origin,
        )


def where(error: BaseException) -> dict[str, Any]:
    """Say what kind of exception it is and where it came from; its text may hold values."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__qualname__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
