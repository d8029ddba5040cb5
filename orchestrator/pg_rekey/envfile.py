"""Read and write .env files: python-dotenv parses them, and has to read back exactly what is written."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from pg_rekey.errors import Problem


def read(path: Path) -> dict[str, str]:
    """Return the names and values of a .env file, as they stand there: ${...} is not replaced."""
    return parse(path.read_text(encoding="utf-8-sig"), str(path))


def parse(text: str, source: str = "the file") -> dict[str, str]:
    """Return the names and values of the text of a .env file; a name without a value is left out."""
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            raise Problem(
                f"line {binding.original.line} of {source} cannot be understood",
                "It is NAME=value, where values with quotes, # or line breaks stand in quotes.",
            )
        if binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
    return values


def write(values: Mapping[str, str]) -> str:
    """Return the text of a .env file with these names and values."""
    lines = {name: f"{_name(name)}={_value(value)}\n" for name, value in values.items()}
    if lost := [name for name, line in lines.items() if not _gives(line, name, values[name])]:
        raise Problem(f"a .env file cannot hold {', '.join(map(repr, lost))}", "Export with --json instead.")
    return "".join(lines.values())


def _name(name: str) -> str:
    return name if re.fullmatch(r"[^=#\s'\"]+", name) and name != "export" else f"'{name}'"


def _value(value: str) -> str:
    if "\r" in value:  # reading a file turns a bare carriage return into a line feed
        escapes = {"\\": r"\\", '"': r"\"", "\r": r"\r", "\n": r"\n"}
        return '"' + "".join(escapes.get(character, character) for character in value) + '"'
    return "'" + value.replace("\\", r"\\").replace("'", r"\'") + "'"


def _gives(line: str, name: str, value: str) -> bool:
    """Tell whether a line of a file is read back as this name and value, and nothing else."""
    try:
        return parse(io.StringIO(line, newline=None).read()) == {name: value}
    except Problem:
        return False
