"""What others feel of a rotation, as a picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.svg"
WORDS = {"idle": "before", "rotation": "rotations", "after": "after"}


def draw(impact: dict[str, Any], path: Path = PICTURE) -> None:
    """Draw the 99th percentiles of reads and writes before, during and after rotations."""
    timeline = impact["timeline"]
    # (Text stays text; nothing in the file depends on the day.)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pg_rekey", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        for kind, points in timeline.items():
            for phase in WORDS:
                known = [one for one in points if one["phase"] == phase and one["p99"] is not None]
                axes.plot(
                    [one["second"] for one in known],
                    [1000 * one["p99"] for one in known],
                    color={"read": "tab:blue", "write": "tab:orange"}[kind],
                    label=f"{kind}s" if phase == "idle" else None,
                )
        [points, *_] = timeline.values()
        for phase, word in WORDS.items():
            seconds = [one["second"] for one in points if one["phase"] == phase]
            if seconds:
                axes.axvspan(
                    min(seconds), max(seconds), alpha=0.08 if phase == "rotation" else 0, color="black"
                )
                axes.text(
                    sum(seconds) / len(seconds),
                    0.95,
                    word,
                    ha="center",
                    va="top",
                    transform=axes.get_xaxis_transform(),
                )
        axes.set(xlabel="seconds", ylabel="99th percentile, ms", ylim=(0, None))
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
