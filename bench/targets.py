"""What was to be reached, and whether it was."""

import statistics
from dataclasses import dataclass
from typing import Any

from bench.figures import Samples, p99, ratios, scaled


@dataclass(frozen=True)
class Target:
    """A promise about a figure; its median decides."""

    promise: str
    samples: Samples
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the median keeps the promise."""
        found = statistics.median(self.samples)
        return (self.at_least is None or found >= self.at_least) and (
            self.at_most is None or found <= self.at_most
        )


def targets(results: dict[str, Any]) -> list[Target]:
    """Return all of them, from the results of a whole run."""
    return [
        *_race(results["race"], results["scale"]["size"]),
        *_growth(results["scale"]),
        *_impact(results["impact"]),
        *_calls(results["calls"]),
        *_storage(results["scale"]),
        *_keyrings(results["scale"]),
        Target(
            "`make bench` takes at most 10 minutes", [results["about"]["seconds"] / 60], "min", at_most=10
        ),
    ]


def _race(race: list[dict[str, Any]], size: int) -> list[Target]:
    [heat] = [heat for heat in race if heat["size"] == size]
    # Seconds a row: where not all rows were rotated, the ratios are still those of the same work.
    cost = {one["name"]: scaled(one["seconds"], 1 / one["rows"]) for one in heat["competitors"]}
    others = [
        cost[one["name"]]
        for one in heat["competitors"]
        if one["authenticates"] and not one["name"].startswith("rekey")
    ]
    best = [min(together) for together in zip(*others, strict=True)]
    one, two = cost["rekey_1"], cost["rekey_2"]
    return [
        Target("one worker: time to the floor's", ratios(one, cost["floor"]), at_most=4.5),
        Target("one worker: speed to the application's", ratios(cost["application"], one), at_least=2),
        *(
            [Target("one worker: speed to OpenBao's", ratios(cost["openbao"], one), at_least=2.5)]
            if "openbao" in cost  # where it could be had
            else []
        ),
        Target("one worker: speed to the Vault stand-in's", ratios(cost["vault"], one), at_least=1.4),
        Target("one worker: speed to pgp_sym's default", ratios(cost["pgp_default"], one), at_least=20),
        Target("two workers: speed to one's", ratios(one, two), at_least=1.75),
        Target("two workers: speed to the best other that authenticates", ratios(best, two), at_least=1),
    ]


def _growth(scale: dict[str, Any]) -> list[Target]:
    first, middle, last = scale["steps"]
    row = statistics.median(scaled(first["seconds"], 1 / first["rows"]))
    memory = {who: statistics.median(middle[f"{who}_bytes"]) for who in ("server", "worker")}
    return [
        Target(
            f"a row of {last['rows']:,} to one of {first['rows']:,}: time",
            [seconds / last["rows"] / row for seconds in last["seconds"]],
            at_most=1.15,
        ),
        *(
            Target(
                f"{last['rows']:,} rows to {middle['rows']:,}: memory of the {who}",
                scaled(last[f"{who}_bytes"], 1 / memory[who]),
                at_most=1.15,
            )
            for who in memory
            if memory[who]  # 0 where the system does not tell
        ),
    ]


def _impact(impact: dict[str, Any]) -> list[Target]:
    def compared(phase: str, kind: str) -> list[float]:
        rounds = [one["calls"] for one in impact["rounds"]]
        return [p99(one[phase][kind]) / p99(one["idle"][kind]) for one in rounds]

    rates = [one["throttled_rows_per_second"] / impact["throttle"] for one in impact["rounds"]]
    paces = [one["rows_per_second"] for one in impact["rounds"]]
    longest = [1000 * max(one["locked_seconds"], default=0) for one in impact["rounds"]]
    return [
        Target("writes during a rotation: p99 to idle", compared("rotation", "write"), at_most=2),
        Target("reads during a rotation: p99 to idle", compared("rotation", "read"), at_most=1.5),
        Target(
            "the same rotation: rows a second to one that gives way to nobody",
            [one["rotation"] / one["fast"] for one in paces],
            at_least=0.25,
        ),
        Target("the longest UPDATE of a row that a sweep is about to lock", longest, "ms", at_most=15),
        *(
            Target(f"{kind}s {when}: p99 to idle", compared(phase, kind), at_most=1.5)
            for phase, when in (
                ("throttled", "during one with `max_rows_per_second`"),
                ("after", "after a rotation"),
            )
            for kind in ("read", "write")
        ),
        Target("errors of readers and writers", [impact["errors"]], at_most=0),
        Target("`max_rows_per_second`: kept to promised", rates, at_least=0.9, at_most=1.1),
    ]


def _calls(calls: dict[str, Any]) -> list[Target]:
    cost = {one["name"]: one["seconds"] for one in calls["calls"]}
    return [
        Target(
            "`get_secret`: time to the Vault stand-in's look-up by name",
            ratios(cost["get_secret"], cost["vault_view"]),
            at_most=1.5,
        ),
        Target("`read_secrets` of 1,000: a secret", scaled(cost["read_secrets"], 1e6), "µs", at_most=10),
    ]


def _storage(scale: dict[str, Any]) -> list[Target]:
    last, column = scale["steps"][-1], scale["column"]
    return [
        Target("WAL of a row", scaled(last["wal_bytes"], 1 / last["rows"]), "bytes", at_most=1200),
        Target(
            "size of `rekey.secrets` after a rotation and VACUUM to before",
            [last["table_bytes_after"] / last["table_bytes_before"]],
            at_most=1.1,
        ),
        Target(
            "size of a user's table at fillfactor 100, the same",
            [column["rotated_bytes"] / column["full_bytes"]],
            at_most=1.5,
        ),
    ]


def _keyrings(scale: dict[str, Any]) -> list[Target]:
    last, keyrings, many, small = scale["steps"][-1], scale["keyrings"], scale["many"], scale["small"]
    return [
        Target(
            f"`rotate_keys` for a keyring with {last['rows']:,} secrets",
            scaled(scale["rotate_keys_seconds"], 1000),
            "ms",
            at_most=20,
        ),
        Target(
            f"`rotate_keys` for all of {keyrings['keyrings']:,} keyrings",
            keyrings["rotate_keys_seconds"],
            "s",
            at_most=3,
        ),
        Target(
            f"`tick` with nothing due and {keyrings['keyrings']:,} keyrings",
            scaled(keyrings["tick_seconds"], 1000),
            "ms",
            at_most=5,
        ),
        Target(
            f"{many['keyrings']:,} keyrings, all due, to one, with {many['rows']:,} secrets",
            scaled(many["seconds"], 1 / statistics.median(last["seconds"])),
            at_most=1.2,
        ),
        Target(
            f"a keyring of {small['rows']:,} among {small['others']:,} secrets: rotated in",
            small["seconds"],
            "s",
            at_most=1,
        ),
    ]
