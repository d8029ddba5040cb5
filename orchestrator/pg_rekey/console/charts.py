"""Charts as SVG that the server draws: shapes without text, which stretch; words stand around them.

No style is inline, so that the Content-Security-Policy needs no exception: classes say what a shape is.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import svg
from markupsafe import Markup, escape

WIDTH, HEIGHT = 600, 160
BAR = 10


def drain(points: Sequence[tuple[datetime, int]], total: int, now: datetime) -> Markup:
    """Draw how rows leave the older versions for the new one, over time, one area upon the other."""
    if not points or not total:
        return _chart("No row has been re-encrypted yet.", [])
    known = list(points) if points[-1][0] >= now else [*points, (now, points[-1][1])]
    begun = known[0][0]
    span = max((known[-1][0] - begun).total_seconds(), 0.001)
    line = [
        (WIDTH * (at - begun).total_seconds() / span, HEIGHT * (1 - min(rows / total, 1)))
        for at, rows in known
    ]
    below = [
        svg.M(0, HEIGHT),
        *(svg.L(round(x, 1), round(y, 1)) for x, y in line),
        svg.L(WIDTH, HEIGHT),
        svg.Z(),
    ]
    above = [svg.M(0, 0), *(svg.L(round(x, 1), round(y, 1)) for x, y in line), svg.L(WIDTH, 0), svg.Z()]
    done = known[-1][1]
    words = f"{done:,} of {total:,} rows are on the new version, {max(total - done, 0):,} on older ones."
    return _chart(words, [svg.Path(d=above, class_=["old"]), svg.Path(d=below, class_=["new"])])


def bars(values: Sequence[float | None], words: str) -> Markup:
    """Draw a bar for each value, the oldest first."""
    most = max((value for value in values if value), default=0)
    step = WIDTH / max(len(values), BAR)
    shapes: list[svg.Element] = []
    for place, value in enumerate(values):
        if value and most:
            height = max(HEIGHT * value / most, 2)
            shapes.append(
                svg.Rect(
                    x=round(place * step + step * 0.1, 1),
                    y=round(HEIGHT - height, 1),
                    width=round(step * 0.8, 1),
                    height=round(height, 1),
                    class_=["bar"],
                )
            )
    return _chart(words, shapes)


def life(key: dict[str, Any], begun: datetime, now: datetime) -> Markup:
    """Draw a version's life on the line of its keyring: when it encrypted, and when it only decrypted."""
    span = max((now - begun).total_seconds(), 0.001)

    def place(at: datetime) -> float:
        return round(WIDTH * min(max((at - begun).total_seconds() / span, 0), 1), 1)

    active_from = key["activated_at"] or key["created_at"]
    active_to = key["deactivated_at"] or now
    ends = key["destroyed_at"] or now
    parts = [("active", active_from, active_to)]
    if key["deactivated_at"]:
        lost = min(key["compromised_at"] or ends, ends)
        parts += [("idle", active_to, max(lost, active_to)), ("lost", max(lost, active_to), ends)]
    shapes: list[svg.Element] = [
        svg.Rect(x=place(a), y=0, width=max(place(b) - place(a), 2), height=HEIGHT, class_=[name])
        for name, a, b in parts
        if b > a
    ]
    return _chart(f"Version {key['version']} is {key['state'].replace('_', ' ')}.", shapes, "life")


def _chart(words: str, shapes: list[svg.Element], kind: str = "chart") -> Markup:
    # The library escapes nothing: it gets numbers and fixed words only.
    drawn = svg.SVG(
        viewBox=svg.ViewBoxSpec(0, 0, WIDTH, HEIGHT),
        preserveAspectRatio=svg.PreserveAspectRatio("none"),
        class_=[kind],
        elements=shapes,
    ).as_str()
    return Markup(drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1))
