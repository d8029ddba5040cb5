"""The race: one rotation of the same values by everybody, in interleaved rounds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import openbao
from bench.competitors import all_of
from bench.estate import Estate, settle
from bench.workers import Workers


@dataclass(frozen=True)
class Heat:
    """Values of one size, in bytes."""

    size: int
    rows: int
    rounds: int


def race(estate: Estate, heats: Sequence[Heat], share: float) -> list[dict[str, Any]]:
    """Return for each size and competitor how many rows it rotated, and the seconds of each round."""
    with (
        estate.database("race") as connection,
        Workers(1) as one,
        Workers(2) as two,
        openbao.started() as server,
    ):
        competitors = all_of(one, two, share)
        if server:
            competitors.append(
                openbao.Transit("openbao", openbao.LABEL, "bench.transit", True, server, share=4 * share)
            )
        tables = sorted({competitor.table for competitor in competitors})
        results = []
        for heat in heats:
            connection.execute(f"truncate {', '.join(tables)}".encode())
            connection.execute("select rekey.confirm_emptied(k.name) from rekey.keyrings k")
            for competitor in competitors:
                competitor.fill(connection, heat.rows, heat.size)
            settle(connection, *tables)
            seconds: dict[str, list[float]] = {competitor.name: [] for competitor in competitors}
            for number in range(heat.rounds):
                for competitor in random.Random(number).sample(competitors, len(competitors)):
                    seconds[competitor.name].append(competitor.run(connection))
                    settle(connection, competitor.table)
            results.append({
                "size": heat.size,
                "rows": heat.rows,
                "competitors": [
                    {
                        "name": competitor.name,
                        "label": competitor.label,
                        "authenticates": competitor.authenticates,
                        "rows": competitor.rows,
                        "seconds": seconds[competitor.name],
                    }
                    for competitor in competitors
                ],
            })  # fmt: skip
        return results
