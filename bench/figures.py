"""Medians, ranges and ratios of samples, and how they are written."""

import statistics
from collections.abc import Iterable, Sequence

Samples = Sequence[float]


def scaled(samples: Iterable[float], factor: float) -> list[float]:
    """Return the samples in another unit."""
    return [sample * factor for sample in samples]


def ratios(these: Samples, those: Samples) -> list[float]:
    """Return these to those, pair by pair: what was measured in the same round."""
    return [this / that for this, that in zip(these, those, strict=True)]


def p99(samples: Samples) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(samples, n=100, method="inclusive")[98]


def number(value: float) -> str:
    """Write three significant digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median(samples: Samples) -> str:
    """Write the median."""
    return number(statistics.median(samples))


def extent(samples: Samples) -> str:
    """Write the range; nothing of a single sample."""
    return f"{number(min(samples))} to {number(max(samples))}" if len(samples) > 1 else ""


def spread(samples: Samples, unit: str = "") -> str:
    """Write median, unit, and range."""
    text = f"{median(samples)} {unit}".strip()
    return f"{text} ({extent(samples)})" if len(samples) > 1 else text
