"""Values as a person reads them: times, intervals, numbers, and what a rotation waits for, in a sentence."""

from datetime import UTC, datetime, timedelta
from typing import Any

# Numbers that are names: they are typed again, and so have no separators.
_NAMES = ("id", "version", "versions", "kek", "pid", "first_bad", "rotation", "rotations")
# The tenant that is none, as it stands in JSON.
_NIL = "00000000-0000-0000-0000-000000000000"
_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
_DAY = timedelta(days=1)


def shown(name: str, value: Any, *, now: datetime | None = None) -> str:
    """Return the value of a column, with nothing in it that a terminal would obey.

    now: times are short, as seen from then; without it they are whole.
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
            text = time(value, now)
        case timedelta():
            text = interval(value)
        case bytes():
            text = value.hex()
        case list() if name == "blocked_by":
            text = blockers(value)
        case list() | tuple():
            text = ", ".join(shown(name, one) for one in value)
        case dict():
            said = {key: shown(key, one) for key, one in value.items() if one not in (None, _NIL)}
            text = ", ".join(f"{key} {one}" for key, one in said.items())
        case _:
            text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def time(value: datetime, now: datetime | None = None) -> str:
    """Return a time in UTC; as seen from now: how long until it comes, the time of today, or the day."""
    value = value.astimezone(UTC)
    if now is None:
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    if value > now:
        return f"in {interval(value - now, parts=1)}"
    return f"{value:%H:%M:%SZ}" if now - value < _DAY else f"{value:%Y-%m-%d}"


def interval(value: timedelta, parts: int = 2) -> str:
    """Return an interval in words, no more precise than its largest parts."""
    rest = abs(round(value.total_seconds()))
    words: list[str] = []
    for unit, seconds in _UNITS:
        count, rest = divmod(rest, seconds)
        if count:
            words.append(f"{count:,} {unit}{'s' if count > 1 else ''}")
    sign = "-" if value < timedelta() else ""
    return sign + " ".join(words[:parts] or ["0 seconds"])


def blockers(given: list[dict[str, Any]] | None) -> str:
    """Say what a rotation waits for."""
    return "; ".join(_blocker(one) for one in given or [])


def _blocker(one: dict[str, Any]) -> str:
    if "rotation" in one:
        what = f"adopts {one['adopts']}, and is" if "adopts" in one else "is"
        return f"rotation {one['rotation']} of its keyring, which {what} {one['state']}"
    if "rows" in one:
        return f"{one['rows']:,} row{' that is' if one['rows'] == 1 else 's that are'} {one['why']}"
    if "error" in one:
        return f"another attempt: {one['error']}"
    if "relation" in one:
        return f"a batch in {one['relation']} (pid {one['pid']}), at work for {one['age_seconds']} s"
    if "target" in one:
        return f"the column {one['target']}, which is blocked: {one['why']}"
    age = "open, this role may not see since when"
    if "age_seconds" in one:
        age = f"open for {one['age_seconds']} s"
    if "prepared" in one:
        return f"the prepared transaction {one['prepared']!r}, {age}"
    return f"the transaction of pid {one.get('pid')}, {one.get('role')}, {age}"
