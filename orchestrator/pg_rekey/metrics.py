"""What Prometheus gets to see: the rows of rekey.metrics(), in its text format."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

HELP = {
    "pg_rekey_rotations": "Rotations by state, now.",
    "pg_rekey_rotations_total": "Rotations that ended, by state and trigger.",
    "pg_rekey_last_rotation_duration_seconds": "Duration of the last rotation that completed.",
    "pg_rekey_rotation_rows_total": "Rows re-encrypted.",
    "pg_rekey_rotation_failures_open": "Rows in quarantine that nobody has resolved.",
    "pg_rekey_messages": "Messages to endpoints that wait, or were given up.",
    "pg_rekey_findings": "What the last census found not to be as it should be, by kind and severity.",
    "pg_rekey_census_rows": "Rows that the last census found not to open, by kind.",
    "pg_rekey_last_census_timestamp_seconds": "When rows were last counted, in Unix time.",
    "pg_rekey_oldest_unfinished_rotation_seconds": "Age of the oldest rotation under way.",
    "pg_rekey_rotation_blocked_seconds": "How long a rotation has been waiting for writers.",
    "pg_rekey_last_tick_timestamp_seconds": "When the worker last ran, in Unix time.",
    "pg_rekey_last_tick_duration_seconds": "How long the worker's last run took.",
    "pg_rekey_keyrings": "Keyrings.",
    "pg_rekey_keyrings_overdue": "Keyrings whose scheduled rotation is overdue.",
    "pg_rekey_keyrings_unscheduled": "Keyrings without a schedule.",
    "pg_rekey_keys": "Key versions by state.",
    "pg_rekey_keyring_unhealthy": "Keyrings that need attention, and why.",
    "pg_rekey_locked": "1 where work is due and the KEK is not available.",
    "pg_rekey_audit_entries": "Entries of the audit log.",
    "pg_rekey_kek_age_seconds": "Age of the active KEK.",
}


class _Rows(Collector):
    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = list(rows)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        names = dict.fromkeys(row["name"] for row in self._rows)
        for name in names:
            samples = [row for row in self._rows if row["name"] == name]
            labels = sorted({label for row in samples for label in row["labels"]})
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, HELP.get(name, name), labels=labels)
            for row in samples:
                if row["value"] is not None:
                    family.add_metric([str(row["labels"].get(label, "")) for label in labels], row["value"])
            yield family


def exposition(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows of (name, labels, value) in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Rows(rows))
    return generate_latest(registry).decode()
