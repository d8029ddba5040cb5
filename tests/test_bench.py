"""The benchmark, with little of everything: that it measures all that it should, not what."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import report
from pg_rekey import local, release

SECTIONS = [*report.SECTIONS, "asked", "targets"]
COMPETITORS = ["rekey_1", "rekey_2", "floor", "application", "vault", "pgp_fast", "pgp_default"]
CALLS = {
    *("get_secret", "set_secret", "read_secrets", "view", "encrypt", "decrypt"),
    *("column_view", "decrypt_many", "column_write", "plain_write"),
    *("vault_view", "vault_update"),
    *("pgp_encrypt", "pgp_decrypt", "pgp_fast_encrypt", "pgp_fast_decrypt"),
}


def test_smoke(installation: local.Installation, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--smoke", "--no-docs", "--json", path],
        cwd=release.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    results = json.loads(path.read_text())

    assert [heat["size"] for heat in results["race"]] == [256, 32, 1024, 16_384]
    for heat in results["race"]:
        # The package of OpenBao comes over a network.
        assert [one["name"] for one in heat["competitors"] if one["name"] != "openbao"] == COMPETITORS
        assert {len(one["seconds"]) for one in heat["competitors"]} == {2 if heat["size"] == 256 else 1}
    for one in results["impact"]["rounds"]:
        assert list(one["calls"]) == ["idle", "rotation", "fast", "after", "throttled", "bare"]
        assert all(one["calls"][phase][kind] for phase in one["calls"] for kind in ("read", "write"))
    assert {one["name"] for one in results["calls"]["calls"]} == CALLS
    assert len(results["scale"]["steps"]) == 3
    assert results["impact"]["errors"] == 0, results["impact"]["error_messages"]
    parts = {name: results[name] for name in ("about", "race", "calls", "scale")}
    parts["impact"] = results["impact"]["rounds"]
    with_openbao = any(one["name"] == "openbao" for one in results["race"][0]["competitors"])
    nothing = {place for place, number in numbers(parts) if number <= 0}
    if Path("/proc/self/status").exists():
        assert nothing == set()
        assert len(results["targets"]) == 32 + with_openbao
    else:  # the system does not tell how much memory a process has
        assert all(re.search(r"(server|worker)_bytes\[", place) for place in nothing), nothing
        assert len(results["targets"]) == 30 + with_openbao
    assert all(target["samples"] for target in results["targets"])

    made = report.sections(results)
    assert list(made) == SECTIONS
    page = tmp_path / "page.md"
    page.write_text("prose\n" + "".join(f"<!-- {name} -->\n<!-- /{name} -->\nprose\n" for name in SECTIONS))
    report.write(made, page)
    once = page.read_text()
    report.write(made, page)
    assert page.read_text() == once
    assert once.count("prose\n") == len(SECTIONS) + 1
    for name in SECTIONS:
        assert headings(page, name) == [" | ".join(table.columns) for table in made[name]]
        # The committed page is one that this code wrote.
        assert headings(report.PAGE, name) == headings(page, name)


def test_against_a_revision(installation: local.Installation, tmp_path: Path) -> None:
    """What is committed, beside what is here."""
    path = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--smoke", "--against", "HEAD", "--json", path],
        cwd=release.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    results = json.loads(path.read_text())
    seconds = results["against"]["seconds"]
    assert len(seconds) == 14
    assert all(len(one["now"]) == len(one["then"]) == 1 for one in seconds.values())
    [_, against] = report.sections(results).values()
    assert [row[0] for row in against[0].rows] == list(seconds)


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a document, and where it stands."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(one, f"{place}.{key}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from numbers(one, f"{place}[{index}]")
    elif type(value) in (int, float):
        yield place, value


def headings(page: Path, name: str) -> list[str]:
    """Return the headings of the tables between two markers of a page."""
    [between] = re.findall(rf"(?s)<!-- {name} -->\n(.*?)<!-- /{name} -->", page.read_text())
    return re.findall(r"(?m)^\| (.*) \|\n\| ---", between)
