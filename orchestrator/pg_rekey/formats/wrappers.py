"""What libraries put around a text before they encrypt it: taken off where that is asked for.

Nothing is executed, and nothing but one text or bytes is taken for such a value.
"""

import json
import pickletools
import re
from collections.abc import Callable

TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
AROUND = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


def from_json(value: bytes) -> bytes | None:
    """Return the text of a JSON string."""
    try:
        text = json.loads(value)
        return text.encode() if isinstance(text, str) else None
    except ValueError:
        return None


def from_php(value: bytes) -> bytes | None:
    """Return the string that PHP's serialize() has written: s:<bytes>:"...";"""
    found = re.fullmatch(rb's:(\d{1,9}):"(.*)";', value, re.DOTALL)
    return found[2] if found and int(found[1]) == len(found[2]) else None


def from_pickle(value: bytes) -> bytes | None:
    """Return the str or bytes of a pickle that has nothing else in it; it is read, and never loaded."""
    found: list[bytes] = []
    try:
        for opcode, argument, _ in pickletools.genops(value):
            if opcode.name in TEXTS and isinstance(argument, str):
                found.append(argument.encode())
            elif opcode.name in BYTES and isinstance(argument, bytes):
                found.append(argument)
            elif opcode.name not in AROUND:
                return None
    except (ValueError, IndexError):
        return None
    return found[0] if len(found) == 1 else None


WRAPPERS: dict[str, Callable[[bytes], bytes | None]] = {
    "json": from_json,
    "php": from_php,
    "pickle": from_pickle,
}
