"""Where in a file of SQL an error is: for `make dev`."""

import re

import psycopg

_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|(\$\w*\$).*?\1|(?P<said>[A-Za-z_]\w*|\S)""",
    re.DOTALL,
)
# What PL/pgSQL closes with `end` and its own name; `begin`, and `case` within SQL, with `end` alone.
_NAMED = ("if", "loop", "case")
# What stands before a statement.
_BEFORE = (";", "then", "else", "loop", "begin")


def line(text: str, error: psycopg.errors.Diagnostic) -> int | None:
    """Return the line that an error is about, from 1; None: the server does not tell."""
    if error.statement_position:
        place = int(error.statement_position) - 1
        begun = [found.end() for found in re.finditer(r"(?i)\bas\s+\$\w*\$", text[:place])]
        # Of what was not closed, PL/pgSQL says so at the end of the function.
        if begun and re.match(r"[;\s]*\$\w*\$", text[place:]):
            place = begun[-1] + (_left_open(text[begun[-1] : place]) or place - begun[-1])
        return text[:place].count("\n") + 1
    near = re.search(r'function "?(\w+)"?.* line (\d+)', error.context or "")
    body = near and re.search(rf"(?is)\bfunction\s+(?:\w+\.)?{near[1]}\b.*?\bas\s+\$\w*\$", text)
    return text[: body.end()].count("\n") + int(near[2]) if near and body else None


def _left_open(body: str) -> int | None:
    """Return where in the body of a function something begins that has no end, if something does."""
    opened: list[tuple[str, int]] = []
    before = ";"
    tokens = [(found["said"].lower(), found.start()) for found in _TOKEN.finditer(body) if found["said"]]
    for token, place in [*tokens, ("$", len(body))]:
        last = opened[-1][0] if opened else None
        named = False
        if before == "end":
            # (`for n in 1 .. case ... end loop` begins a loop.)
            named = token in _NAMED and (token, last) != ("loop", "case")
            closed = (token,) if named else ("begin", "case")
            if last is not None and last not in closed:
                return opened[-1][1]
            del opened[-1:]
            last = opened[-1][0] if opened else None
        if token == ")" and last == "(":
            opened.pop()
        elif token == ";" and last == "(":
            return opened[-1][1]
        elif (not named and token in ("(", "loop", "begin", "case")) or (token == "if" and before in _BEFORE):
            opened.append((token, place))
        before = token
    return opened[-1][1] if opened else None
