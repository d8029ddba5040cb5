"""Values as a person reads them: times, intervals, numbers, and what a rotation waits for, in a sentence."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

# Numbers that are names: they are typed again, and so have no separators.
_NAMES = ("id", "version", "versions", "kek", "pid", "first_bad", "rotation", "rotations")
# The tenant that is none, as it stands in JSON.
_NIL = "00000000-0000-0000-0000-000000000000"
_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
_SECOND, _DAY = timedelta(seconds=1), timedelta(days=1)
# In details of the audit log, JSON has these as text: times in ISO 8601, intervals as PostgreSQL writes them.
_ISO = re.compile(r"\d{4,}-\d\d-\d\dT[\d:.]+[+-]\d\d:\d\d")
_INTERVALS = ("rotate_every", "from", "to")
_CLOCK = re.compile(r"(?:(-?\d+) days? )?(-?)(\d+):(\d\d):(\d\d(?:\.\d+)?)")


def shown(name: str, value: Any, *, now: datetime | None = None, whole: bool = False) -> str:
    """Return the value of a column, with nothing in it that a terminal would obey.

    now: times are as seen from then, those that were too unless they are to be whole; without it all are.
    """
    match value:
        case None:
            text = ""
        case bool():
            text = "yes" if value else "no"
        case int() if not name.endswith(_NAMES):
            text = f"{value:,}"
        case float():
            text = f"{value:,.1f}"
        case datetime():
            text = time(value, now, whole)
        case timedelta():
            text = interval(value)
        case bytes():
            text = value.hex()
        case list() if name == "blocked_by":
            text = blockers(value)
        case list() | tuple():
            text = ", ".join(shown(name, one, now=now, whole=whole) for one in value)
        case dict():
            given = {key: one for key, one in value.items() if one not in (None, _NIL)}
            said = {key: _detail(key, one, now, whole) for key, one in given.items()}
            text = ", ".join(f"{key} {one}" for key, one in said.items())
        case _:
            text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def time(value: datetime, now: datetime | None = None, whole: bool = False) -> str:
    """Return a time in UTC; as seen from now: how long until it comes, the time of today, or the day.

    whole: one that was is not made short.
    """
    value = value.astimezone(UTC)
    if now is None or (whole and value <= now):
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    if value > now:
        return f"in {interval(value - now, parts=1)}"
    return f"{value:%H:%M:%SZ}" if now - value < _DAY else f"{value:%Y-%m-%d}"


def interval(value: timedelta, parts: int = 2) -> str:
    """Return an interval in words, no more precise than its largest parts."""
    if timedelta() < value < _SECOND:
        return f"{value / timedelta(milliseconds=1):.0f} ms"
    rest = abs(round(value.total_seconds()))
    words: list[str] = []
    for unit, seconds in _UNITS:
        count, rest = divmod(rest, seconds)
        if count:
            words.append(f"{count:,} {unit}{'s' if count > 1 else ''}")
    sign = "-" if value < timedelta() else ""
    return sign + " ".join(words[:parts] or ["0 seconds"])


def interval_of(text: str) -> str:
    """Return an interval that PostgreSQL has written, in words where there is a clock in it."""
    found = _CLOCK.fullmatch(text)
    if not found:
        return text
    days, sign, hours, minutes, seconds = found.groups()
    clock = timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))
    return interval(timedelta(days=int(days or 0)) + (-clock if sign else clock), parts=len(_UNITS))


def _detail(name: str, value: Any, now: datetime | None, whole: bool) -> str:
    if isinstance(value, str) and _ISO.fullmatch(value):
        return time(datetime.fromisoformat(value), now, whole)
    if isinstance(value, str) and name in _INTERVALS:
        return interval_of(value)
    return shown(name, value, now=now, whole=whole)


def count(number: int, thing: str, things: str | None = None) -> str:
    """Return how many of something there are."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def blockers(given: list[dict[str, Any]] | None) -> str:
    """Say what a rotation waits for."""
    return "; ".join(_blocker(one) for one in given or [])


def _blocker(one: dict[str, Any]) -> str:
    if "rotation" in one:
        what = f"adopts {one['adopts']}, and is" if "adopts" in one else "is"
        return f"rotation {one['rotation']} of its keyring, which {what} {one['state']}"
    if "rows" in one:
        return f"{count(one['rows'], 'row')} that {'is' if one['rows'] == 1 else 'are'} {one['why']}"
    if "error" in one:
        return f"another attempt: {one['error']}"
    if "relation" in one:
        return f"a batch in {one['relation']} (pid {one['pid']}), at work for {_age(one)}"
    if "target" in one:
        return f"the column {one['target']}, which is blocked: {one['why']}"
    age = "open, this role may not see since when"
    if "age_seconds" in one:
        age = f"open for {_age(one)}"
    if "prepared" in one:
        return f"the prepared transaction {one['prepared']!r}, {age}"
    return f"the transaction of pid {one.get('pid')}, {one.get('role')}, {age}"


def _age(one: dict[str, Any]) -> str:
    return interval(timedelta(seconds=one["age_seconds"]))
